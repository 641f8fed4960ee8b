"""Configuration of pytest: the option `--backend` chooses the backend under test, one per process.

    cpu        the CPU kernels; runs all tests
    emulated   the CUDA kernels on the CPU (tools/emulator); runs tests/ops
    cuda       the CUDA kernels on a GPU; runs tests/ops, and skips every test if there is no GPU

A test in tests/ops runs on all three backends unless `@pytest.mark.backends` names others.
"""

import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# The root comes last, so that `tools` is importable while an installed package still precedes the source tree.
sys.path.append(str(ROOT))
BACKENDS = ("cpu", "emulated", "cuda")


def pytest_addoption(parser):
    parser.addoption("--backend", default="cpu", choices=BACKENDS, help="kernels to run the tests on")
    group = parser.getgroup("emulation", "--backend emulated")
    group.addoption(
        "--emulation",
        default="plain",
        choices=("plain", "asan", "races"),
        help="variant of the emulated kernels",
    )
    group.addoption(
        "--schedule", default="fifo", metavar="fifo|lifo|random:SEED", help="order in which threads and blocks run"
    )
    group.addoption("--with-once", action="store_true", help="run the tests marked once in any variant and schedule")


def pytest_configure(config):
    config.addinivalue_line("markers", "backends(*names): run on these backends instead of the folder's")
    config.addinivalue_line("markers", "once: of all variants and schedules of the emulator, run in one only")
    # An op that falls back to plain PyTorch would compare the reference with itself.
    config.addinivalue_line("filterwarnings", "error::retinanet_ops.FallbackWarning")
    if config.getoption("--backend") == "emulated":
        use_emulated_ops(config.getoption("--emulation"))
        parse_schedule(config)


def use_emulated_ops(variant):
    """Build the variant and put its folder first on sys.path, where `import retinanet_ops` finds it."""
    from tools.emulator import build

    try:
        (folder,) = build.build(variant)
    except build.BuildError as error:
        raise pytest.UsageError(str(error)) from None
    if variant == "asan" and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        raise pytest.UsageError("AddressSanitizer must be preloaded: run `python -m tools.emulator.run asan`")
    sys.path.insert(0, str(folder))
    import retinanet_ops

    assert Path(retinanet_ops.__file__).is_relative_to(folder), f"imported too early: {retinanet_ops.__file__}"


def parse_schedule(config):
    order, _, seed = config.getoption("--schedule").partition(":")
    if order not in ("fifo", "lifo", "random") or (order != "random" and seed) or not (seed or "1").isdecimal():
        raise pytest.UsageError(f"--schedule: expected fifo, lifo or random:SEED, got {order}:{seed}")
    return order, int(seed or "1")


def backends_of(item):
    marker = item.get_closest_marker("backends")
    if marker:
        return marker.args
    return BACKENDS if item.path.parent == HERE / "ops" else ("cpu",)


def is_once(item):
    """Return whether the emulator runs a test in one variant and schedule only.

    Tests of torch.compile do not depend on the schedule or on how kernels are compiled. The hundreds of cases of a
    property test, and tests marked `once`, which are about numbers or the largest sizes, would take too long for every
    variant and schedule. `make fuzz` runs the properties in each schedule.
    """
    is_property = item.module.__name__.endswith("_properties") and "FUZZ_EXAMPLES" not in os.environ
    is_compile = getattr(item.cls, "__name__", "") == "TestCompile"
    return is_property or is_compile or item.get_closest_marker("once") is not None


def is_wanted(item, config):
    backend = config.getoption("--backend")
    if backend not in backends_of(item):
        return False
    first = config.getoption("--emulation") == "plain" and config.getoption("--schedule") == "fifo"
    return backend != "emulated" or first or config.getoption("--with-once") or not is_once(item)


@pytest.hookimpl(tryfirst=True)  # before `-m once` selects tests by their markers
def pytest_collection_modifyitems(config, items):
    backend = config.getoption("--backend")
    for item in items:
        if is_once(item):
            item.add_marker("once")
    chosen = [item for item in items if is_wanted(item, config)]
    config.hook.pytest_deselected(items=[item for item in items if not is_wanted(item, config)])
    # The summary names the tests that this run has left out.
    config.stash[NOT_RUN] = Counter(name for item in items for name in backends_of(item) if name != backend)
    items[:] = chosen
    if backend == "cuda" and not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


NOT_RUN = pytest.StashKey[Counter]()


def pytest_terminal_summary(terminalreporter, config):
    backend = config.getoption("--backend")
    if backend == "cuda" and not torch.cuda.is_available():
        skipped = len(terminalreporter.stats.get("skipped", []))
        terminalreporter.write_line(
            f"NOTHING RAN ON CUDA: {skipped} tests skipped, because torch sees no GPU", red=True, bold=True
        )
    not_run = config.stash.get(NOT_RUN, Counter())
    if not_run:
        counts = ", ".join(f"{name} ({not_run[name]} tests)" for name in BACKENDS if name in not_run)
        terminalreporter.write_line(f"ran on the backend {backend} only; NOT RUN: {counts}", yellow=True)


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return torch.device("cuda" if request.config.getoption("--backend") == "cuda" else "cpu")


@pytest.fixture(scope="session")
def backend(request) -> str:
    return request.config.getoption("--backend")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def emulator():
    """Return the emulator's Python module, with an empty log of launches."""
    from retinanet_ops import _C

    _C.take_launches()
    return _C


@pytest.fixture
def tracing(emulator):
    """Return the emulator's Python module if its build counts bytes; skip the test otherwise."""
    if not emulator.TRACES:
        pytest.skip("bytes are counted by --emulation races")
    return emulator


def watched(item, phase):
    """Restart the schedule for each emulated test, so that tests do not depend on each other, and fail on a race."""
    if item.config.getoption("--backend") != "emulated":
        return (yield)
    from retinanet_ops import _C

    _C.set_schedule(*parse_schedule(item.config))
    _C.take_launches()
    try:
        result = yield
    except BaseException:
        item.add_report_section(phase, "races", "\n".join(_C.take_races()))
        raise
    if races := _C.take_races():
        pytest.fail("\n".join(races), pytrace=False)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    return (yield from watched(item, "setup"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    return (yield from watched(item, "call"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    return (yield from watched(item, "teardown"))

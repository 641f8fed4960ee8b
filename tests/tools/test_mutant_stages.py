"""The stages of tests that a mutant passes, and the tests that are run on it."""

import ctypes
import json
import signal
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import tools.mutants.__main__ as program
from tools.mutants import mutations, server, tree

ROOT = Path(__file__).resolve().parents[2]


def test_an_op_is_tested_by_the_files_of_its_name() -> None:
    matching = tree.tests_of("matching")
    assert matching[0] == "tests/ops/test_matching.py" and "tests/ops/test_matching_grid.py" in matching
    assert "tests/ops/test_detect.py" in tree.tests_of("nms")
    ops = [path.name.removesuffix("_cuda.cu") for path in (ROOT / "csrc").glob("*_cuda.cu")]
    assert all((ROOT / file).exists() for op in ops for file in tree.tests_of(op))


def test_the_tests_that_killed_others_of_the_file_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    file = "common/boxes.h"
    chosen = tree.Tree.__new__(tree.Tree)
    chosen.lock, chosen.killers = threading.Lock(), defaultdict(Counter)
    first, second, *_ = mutations.mutants(file, (ROOT / "csrc" / file).read_text())
    chosen.numbers = {first: 1, second: 2}
    ran: list[list[str]] = []

    def run_tests(job: int, stage: tree.Stage, tests: Sequence[str], number: int, seconds: object) -> str | None:
        ran.append(list(tests))
        return "test_c.py::test_kills" if stage == tree.ASAN else None

    names = [f"tests/ops/test_c.py::test_{name}" for name in ("fast[1]", "kills[1]", "kills[2]")]
    monkeypatch.setattr(chosen, "run_tests", run_tests)
    monkeypatch.setattr(chosen, "tests_reaching", lambda *arguments: dict(zip(names, (1.0, 2.0, 3.0), strict=True)))
    killed = {"stage": "asan", "by": "test_c.py::test_kills"}
    assert chosen.judge(0, first, [tree.FIFO, tree.ASAN]) == killed
    assert ran == [names, names]  # the fastest first, because no test has killed any yet
    ran.clear()
    assert chosen.judge(0, second, [tree.FIFO, tree.ASAN]) == killed
    assert ran == [names, [*names[1:], names[0]]]  # in the other stage, it has killed none


def test_survivors_pass_more_stages_where_threads_interact() -> None:
    def stages(file: str, kind: str, text: str = "", proven: bool = False) -> list[str]:
        everything = mutations.mutants(file, (ROOT / "csrc" / file).read_text())
        mutant = next(m for m in everything if m.kind == kind and text in m.id)
        return [stage.name for stage in tree.stages_of(mutant, proven)]

    assert stages("common/boxes.h", "compare") == ["plain fifo", "asan", "plain fifo, once"]
    assert stages("matching_cuda.cu", "compare") == ["plain fifo", "asan", "races", "plain fifo, once"]
    orders = ["plain lifo", "plain random:1", "plain random:2"]
    racing = ["races", "plain fifo", "asan"]
    assert stages("matching_cuda.cu", "barrier") == [*racing, *orders, "plain fifo, once", "plain lifo, once"]
    for kind, text in (("guard", "`threadIdx.x == 0`"), ("compare", "`threadIdx.x % kWarp == 0`")):
        assert stages("matching_cuda_bounds.h" if "%" in text else "detect_cuda_tile.h", kind, text)[:3] == racing
    assert stages("matching_cuda.cu", "barrier", proven=True) == ["plain fifo"]


def test_a_stage_that_a_mutant_has_passed_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quick run tries the first stage, a proof asks for no other, and a later run tries what is left."""
    everything = mutations.mutants("common/boxes.h", (ROOT / "csrc" / "common/boxes.h").read_text())[:3]
    killed, proven, survivor = everything
    chosen = tree.Tree.__new__(tree.Tree)
    chosen.lock, chosen.killers = threading.Lock(), defaultdict(Counter)
    chosen.servers, chosen.numbers = {}, {mutant: number for number, mutant in enumerate(everything, 1)}
    tried: list[tuple[str, str]] = []

    def run_tests(job: int, stage: tree.Stage, tests: Sequence[str], number: int, seconds: object) -> str | None:
        mutant = everything[number - 1]
        tried.append((mutant.id, stage.name))
        return "exit status 1" if mutant is killed else None

    monkeypatch.setattr(chosen, "run_tests", run_tests)
    monkeypatch.setattr(chosen, "tests_reaching", lambda *arguments: {"test_a.py::test": 1.0})
    monkeypatch.setattr(tree, "ops_of", lambda *arguments: ["nms"])
    monkeypatch.setattr(program, "store", lambda results: None)
    results: dict[str, Any] = {}
    keys = {mutant.id: mutant.id for mutant in everything}

    def run(quick: bool) -> list[tuple[str, str]]:
        tried.clear()
        waiting = [m for m in everything if not program.is_decided(m, results.get(m.id), m is proven, quick)]
        program.run(chosen, waiting, keys, {proven.id}, results, 1, float("inf"), quick)
        return tried

    assert run(quick=True) == [(mutant.id, "plain fifo") for mutant in everything]
    assert run(quick=True) == []
    assert run(quick=False) == [(survivor.id, "asan"), (survivor.id, "plain fifo, once")]
    assert run(quick=False) == []


def test_only_tests_that_reach_a_mutant_are_run_the_fastest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests of an op are measured once."""
    chosen = tree.Tree.__new__(tree.Tree)
    chosen.root, chosen.measured = tmp_path, {}
    reached = {
        "box_iou": {"a.py::one[x]": (2.0, [1, 3]), "a.py::one[y]": (1.0, [3])},
        "nms": {"a.py::one[y]": (1.0, [3]), "b.py::three": (0.5, [2, 3])},
    }
    measured: list[str] = []

    def run_tests(
        job: int, stage: tree.Stage, tests: Sequence[str], number: int, seconds: object, file: Path | None = None
    ) -> str | None:
        assert file and number == 0
        op = next(op for op in reached if f"tests/ops/test_{op}.py" in tests)
        measured.append(op)
        file.write_text(json.dumps(reached[op]))
        return None

    monkeypatch.setattr(chosen, "run_tests", run_tests)
    tests = [list(chosen.tests_reaching(0, tree.FIFO, list(reached), number)) for number in range(5)]
    assert tests == [[], ["a.py::one[x]"], ["b.py::three"], ["b.py::three", "a.py::one[y]", "a.py::one[x]"], []]
    assert measured == list(reached)
    assert chosen.tests_reaching(0, tree.FIFO, ["nms"], 3) == {"b.py::three": 0.5, "a.py::one[y]": 1.0}


def test_a_test_that_takes_too_long_ends_the_process(tmp_path: Path) -> None:
    """Each test has its own limit, so that an endless loop costs seconds. A loop in C++ lets no Python code run."""
    (tmp_path / "test_loop.py").write_text(
        "import ctypes, pathlib\n\n"
        f"def test_quick():\n    pathlib.Path({str(tmp_path)!r}, 'ran').touch()\n\n"
        "def test_endless():\n    ctypes.PyDLL(None).sleep(60)\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    def run(limits: dict[str, float], limit: float) -> int:
        arguments = ["-q", "-p", "no:cacheprovider", str(tmp_path)]
        program = f"import pytest\nfrom tools.mutants.server import Limits\nplugins = [Limits({limits}, {limit})]\n"
        program += f"raise SystemExit(pytest.main({arguments}, plugins))"
        return subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode

    assert run({"test_loop.py::test_endless": 1.0}, 60) == -signal.SIGALRM
    (tmp_path / "ran").unlink()
    assert run({"test_loop.py::test_quick": 60.0}, 10.0) == -signal.SIGALRM
    assert (tmp_path / "ran").exists()  # the limit for all that comes before the first test was long enough


def test_the_unchanged_code_notes_the_mutants_that_it_reaches(tmp_path: Path) -> None:
    source, library = tmp_path / "switch.cpp", tmp_path / "switch.so"
    source.write_text(tree.SWITCH_TEXT % 4 + 'extern "C" bool visit(int number) { return mutant_is(number); }\n')
    subprocess.run(["c++", "-std=c++20", "-shared", "-fPIC", source, "-o", library], check=True)
    recorder = server.Reached(library, 3, tmp_path / "reached.json")
    visit = ctypes.CDLL(str(library)).visit
    assert not any(visit(number) & 1 for number in (3, 1))
    assert recorder.take() == {1, 3} and recorder.take() == set()

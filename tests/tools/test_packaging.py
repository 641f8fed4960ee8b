"""The built libraries, how they load, and what the package says about them."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import retinanet_ops
from retinanet_ops import __main__ as diagnosis
from retinanet_ops import _library

FOLDER = Path(_library.FOLDER)
ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = sorted(FOLDER.glob("*.so"))
CUDA13 = {"version": "13.2", "archs": "9.0+PTX"}
BUILT = {**retinanet_ops.build_info(), "cuda_builds": {"13": CUDA13}, "cuda_omitted": None}
BUILT_FOR_TWO = {**BUILT, "cuda_builds": {"12": {"version": "12.9", "archs": "7.0;9.0"}, "13": CUDA13}}


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter in a folder, from which it imports `retinanet_ops`."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


def test_import_is_silent_needs_torch_and_numpy_only_and_leaves_cuda_alone():
    program = """
import sys

for name in ("torchvision", "pycocotools", "PIL", "matplotlib", "tqdm", "safetensors", "retinanet"):
    sys.modules[name] = None  # importing it raises ImportError
import torch
import retinanet_ops
import retinanet_ops.reference

print(torch.cuda.is_initialized())
"""
    result = run_python(FOLDER.parent, "-W", "error", "-c", program)
    assert result.returncode == 0, result.stderr
    assert (result.stdout.strip(), result.stderr) == ("False", "")


CAPABILITIES = ("default", "avx2", "avx512")


def capabilities(wish: str | None) -> tuple[int, int]:
    """Return the CPU capabilities of torch and of our kernels for a value of ATEN_CPU_CAPABILITY, as positions."""
    environment = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"}
    if wish is not None:
        environment["ATEN_CPU_CAPABILITY"] = wish
    program = (
        "import torch; from retinanet_ops import _library; "
        "print(torch.backends.cpu.get_cpu_capability(), _library.cpu_capability())"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parent, env=environment, check=True)
    theirs, ours = result.stdout.lower().split()
    return CAPABILITIES.index(theirs if theirs in CAPABILITIES else "default"), CAPABILITIES.index(ours)


@pytest.mark.parametrize("wish", ("default", "avx2", "avx512", "unknown", "", None))
def test_kernels_follow_the_cpu_capability_of_torch(wish):
    theirs, ours = capabilities(wish)
    # torch believes a wish that the CPU cannot fulfil.
    detected, _ = capabilities(None)
    assert ours == min(theirs, detected)


def test_build_info_describes_the_build():
    info = retinanet_ops.build_info()
    assert set(info) == {
        "version",
        "torch",
        "torch_target",
        "compiler",
        "debug",
        "cuda_builds",
        "cuda_omitted",
        "cuda_loaded",
        "cuda_missing",
    }
    assert info["torch_target"] == "2.10"
    assert (info["cuda_builds"] == {}) == (info["cuda_omitted"] is not None)
    assert {f"_cuda{major}.so" for major in info["cuda_builds"]} == {path.name for path in LIBRARIES} - {"_C.so"}
    for major, cuda in info["cuda_builds"].items():
        assert set(cuda) == {"version", "archs"} and cuda["version"].startswith(f"{major}.")
    assert info["cuda_loaded"] == (info["cuda_missing"] is None)


def test_build_info_is_a_copy():
    info = retinanet_ops.build_info()
    info["version"] = info["cuda_builds"]["99"] = "changed"
    assert retinanet_ops.build_info()["version"] != "changed"
    assert "99" not in retinanet_ops.build_info()["cuda_builds"]


def test_version_is_the_installed_one():
    try:
        installed = metadata.version("retinanet-ops")
    except metadata.PackageNotFoundError:
        pytest.skip("retinanet-ops is not installed but imported from a folder")
    assert retinanet_ops.build_info()["version"] == installed


def test_every_operator_has_the_kernels_of_each_loaded_library():
    names = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    ours = {name for name in names if name.startswith("retinanet_ops::")}
    keys = ["CPU", "CUDA"] if retinanet_ops.build_info()["cuda_loaded"] else ["CPU"]
    missing = [
        (name, key)
        for name in sorted(ours)
        for key in keys
        if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, key)
    ]
    assert ours
    assert missing == []


def test_libraries_keep_to_the_stable_abi():
    if not (ROOT / "tools" / "check_abi.sh").exists() or shutil.which("nm") is None:
        pytest.skip("needs the source tree and nm")
    command = [str(ROOT / "tools" / "check_abi.sh"), *map(str, LIBRARIES)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "line",
    [
        "#include <ATen/ATen.h>",
        "#include <torch/extension.h>",
        "# include <c10/util/Half.h>",
        "#include <Python.h>",
    ],
)
def test_abi_check_refuses_a_foreign_include(tmp_path: Path, line: str):
    script = ROOT / "tools" / "check_abi.sh"
    if not script.exists() or shutil.which("nm") is None:
        pytest.skip("needs the source tree and nm")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "op.h").write_text(f"#include <torch/csrc/stable/tensor.h>\n{line}\n")
    (tmp_path / "tools").mkdir()
    copy = shutil.copy(script, tmp_path / "tools")
    result = subprocess.run([copy, str(LIBRARIES[0])], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"op.h:2:{line}" in result.stdout


def test_abi_check_refuses_a_torch_symbol():
    script = ROOT / "tools" / "check_abi.sh"
    foreign = Path(torch.__file__).parent / "lib" / "libtorch_python.so"
    if not script.exists() or shutil.which("nm") is None or not foreign.exists():
        pytest.skip("needs the source tree, nm and libtorch_python.so")
    result = subprocess.run([str(script), str(foreign)], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "c10::" in result.stdout


def test_libraries_do_not_point_to_the_machine_they_were_built_on():
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    for library in LIBRARIES:
        dynamic = subprocess.run(
            ["readelf", "--dynamic", "--wide", str(library)], capture_output=True, text=True, check=True
        ).stdout
        assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
        needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
        assert not any(name.startswith(("libpython", "libtorch_python", "libcudart")) for name in needed)
        assert ("libtorch_cuda.so" in needed) == library.name.startswith("_cuda")


def test_cuda_runs_only_beside_torch_of_the_same_major():
    assert _library._cuda_obstacle(BUILT, "2.15.0", "13.2") is None
    assert _library._cuda_obstacle(BUILT, "2.12.0", "13.0") is None
    assert _library._cuda_obstacle(BUILT_FOR_TWO, "2.10.0", "12.6") is None


@pytest.mark.parametrize(
    ("build", "torch_cuda", "words"),
    [
        (BUILT, "12.8", ["built for CUDA 13.2", "CUDA 12.8", "install a build of torch for CUDA 13"]),
        (BUILT, None, ["without CUDA", "install a build of torch for CUDA 13"]),
        (BUILT_FOR_TWO, "14.1", ["built for CUDA 12.9 and 13.2", "CUDA 14.1", "torch for CUDA 12 or 13"]),
        (BUILT_FOR_TWO, None, ["without CUDA", "install a build of torch for CUDA 12 or 13"]),
        ({**BUILT, "cuda_builds": {}, "cuda_omitted": "no nvcc"}, "13.2", ["(no nvcc)", "RETINANET_OPS_CUDA=1"]),
        ({"cuda": "13.0"}, "13.2", [f"the libraries in {FOLDER} are older than this version", "build or install"]),
    ],
)
def test_missing_cuda_kernels_are_an_error_with_a_remedy(monkeypatch, build, torch_cuda, words):
    obstacle = _library._cuda_obstacle(build, "2.10.0", torch_cuda)
    monkeypatch.setattr(_library, "_CUDA_MISSING", obstacle)
    with pytest.raises(RuntimeError) as raised:
        _library.kernels_available("cuda")
    message = str(raised.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert retinanet_ops.build_info()["cuda_missing"] == obstacle
    assert not retinanet_ops.build_info()["cuda_loaded"]


@pytest.mark.skipif(not retinanet_ops.build_info()["cuda_loaded"], reason="needs CUDA kernels that load")
def test_library_is_chosen_by_the_cuda_version_of_torch(tmp_path: Path):
    """Two copies of the CUDA library stand for two CUDA majors. Loading needs no GPU."""
    built = _library.cuda_major(torch.version.cuda)
    package = tmp_path / "retinanet_ops"
    shutil.copytree(FOLDER, package, ignore=shutil.ignore_patterns("__pycache__"))
    for major in ("98", "99"):
        shutil.copy(FOLDER / f"_cuda{built}.so", package / f"_cuda{major}.so")
    info = json.loads((package / "_build_info.json").read_text())
    info["cuda_builds"] = {major: {"version": f"{major}.1", "archs": "9.0"} for major in ("98", "99")}
    (package / "_build_info.json").write_text(json.dumps(info))
    program = """
import sys
from pathlib import Path
import torch
torch.version.cuda = sys.argv[1]
import retinanet_ops
print(sorted(Path(path).name for path in torch.ops.loaded_libraries if "retinanet_ops" in path))
print(retinanet_ops.build_info()["cuda_missing"])
"""
    for version, expected in (("98.6", "['_C.so', '_cuda98.so']\nNone"), ("99.0", "['_C.so', '_cuda99.so']\nNone")):
        result = run_python(tmp_path, "-W", "ignore", "-c", program, version)
        assert result.stdout.strip() == expected, result.stdout + result.stderr
    report = json.loads(run_python(tmp_path, "-m", "retinanet_ops", "--json").stdout)
    cpu, *cuda = report["libraries"]
    assert cpu == {"name": "_C.so", "loaded": True, "missing": None}
    reason = f"torch {torch.__version__} is for CUDA {torch.version.cuda}"
    assert cuda == [
        {"name": f"_cuda{major}.so", "cuda": info["cuda_builds"][major], "loaded": False, "missing": reason}
        for major in ("98", "99")
    ]
    assert len(report["problems"]) == 1 and "built for CUDA 98.1 and 99.1" in report["problems"][0]


def test_kernels_available_by_device():
    assert _library.kernels_available("cpu")
    assert _library.kernels_available("meta")
    assert not _library.kernels_available("mps")
    assert not _library.kernels_available("xpu")


def test_kernels_available_is_traced_without_a_graph_break():
    @torch.compile(fullgraph=True, backend="eager")
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if _library.kernels_available(x.device.type) else x

    assert double(torch.ones(2)).tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("beside", "remedy"),
    [("setup.py", "run Python in another folder"), ("README.md", "install the package again")],
)
def test_unbuilt_package_says_how_to_build_it(tmp_path: Path, beside: str, remedy: str):
    (tmp_path / beside).touch()
    package = tmp_path / "retinanet_ops"
    shutil.copytree(FOLDER, package, ignore=shutil.ignore_patterns("*.so", "*.json", "__pycache__"))
    result = run_python(tmp_path, "-c", "import retinanet_ops")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and remedy in last and str(package) in last


def test_library_that_does_not_load_names_the_versions(tmp_path: Path):
    package = tmp_path / "retinanet_ops"
    shutil.copytree(FOLDER, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / "_C.so").write_bytes(b"no library")
    result = run_python(tmp_path, "-c", "import retinanet_ops")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and f"torch {torch.__version__}" in last and "reinstall" in last
    # The import fails in other programs that Python runs with -m, too.
    (tmp_path / "other.py").write_text("import retinanet_ops")
    assert run_python(tmp_path, "-m", "other").stderr.strip().splitlines()[-1] == last
    result = run_python(tmp_path, "-W", "ignore", "-m", "retinanet_ops", "--json")
    assert (result.returncode, result.stderr) == (1, "")
    report = json.loads(result.stdout)
    reason = last.removeprefix("ImportError: ")
    assert report["libraries"][0] == {"name": "_C.so", "loaded": False, "missing": reason}
    assert report["problems"] == [reason] and report["operators"] == {} and report["torch"] == torch.__version__


def test_diagnosis_of_a_library_that_does_not_load(monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(_library, "_CPU_MISSING", "no such symbol")
    monkeypatch.setattr(_library, "_CUDA_MISSING", "no such symbol")
    assert diagnosis.main(as_json=False) == 1
    text = capsys.readouterr().out
    assert "_C.so          not loaded: no such symbol" in text and "our kernels are not loaded" in text
    assert text.count("PROBLEM: no such symbol") == 1


def test_diagnosis():
    info = retinanet_ops.build_info()
    result = run_python(FOLDER.parent, "-m", "retinanet_ops")
    healthy = info["cuda_loaded"] or torch.version.cuda is None
    assert result.returncode == (0 if healthy else 1), result.stdout + result.stderr
    assert f"retinanet-ops {info['version']}" in result.stdout
    assert "retinanet_ops::box_iou" in result.stdout
    assert ("No problem found." in result.stdout) == healthy
    assert healthy or f"PROBLEM: {info['cuda_missing']}" in result.stdout


def test_diagnosis_as_json(capsys: pytest.CaptureFixture[str]):
    info = retinanet_ops.build_info()
    healthy = info["cuda_loaded"] or torch.version.cuda is None
    assert diagnosis.main(as_json=True) == (0 if healthy else 1)
    report = json.loads(capsys.readouterr().out)
    assert report["build"] == info
    assert report["torch"] == torch.__version__ and report["python"] == platform.python_version()
    name = "CS_GNU_LIBC_VERSION"  # macOS lacks it
    glibc = os.confstr(name) if name in os.confstr_names else None
    assert report["glibc"] == (glibc.removeprefix("glibc ") if glibc else None)
    assert report["cpu"]["capability"] == _library.cpu_capability()
    assert {library["name"] for library in report["libraries"]} == {path.name for path in LIBRARIES}
    keys = {"CPU", "CUDA"} if info["cuda_loaded"] else {"CPU"}
    assert report["operators"]["retinanet_ops::nms"] == dict.fromkeys(keys, True)
    assert report["problems"] == ([] if healthy else [info["cuda_missing"]])


@pytest.mark.skipif(not retinanet_ops.build_info()["cuda_loaded"], reason="needs CUDA kernels that load")
def test_diagnosis_names_gpus_without_kernels(monkeypatch, capsys: pytest.CaptureFixture[str]):
    gpus = [("old", (6, 1)), ("same major", (8, 9)), ("newer", (13, 0))]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: gpus[index][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index][1])
    cuda = {_library.cuda_major(torch.version.cuda): {"version": "13.2", "archs": "7.5;8.6;9.0+PTX"}}
    monkeypatch.setitem(_library._BUILD, "cuda_builds", cuda)
    assert diagnosis.main(as_json=True) == 1
    report = json.loads(capsys.readouterr().out)
    assert [gpu["supported"] for gpu in report["gpus"]] == [False, True, True]
    (problem,) = report["problems"]
    assert "do not run on GPU 0 (6.1)" in problem and 'TORCH_CUDA_ARCH_LIST="6.1"' in problem


@pytest.mark.parametrize("flags", [(), ("-u",)], ids=["buffered", "unbuffered"])
def test_diagnosis_ends_quietly_when_its_reader_has_ended(flags: tuple[str, ...]):
    expected = run_python(FOLDER.parent, "-m", "retinanet_ops").returncode
    command = [sys.executable, *flags, "-W", "ignore", "-m", "retinanet_ops"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=FOLDER.parent
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == expected


def test_diagnosis_of_a_build_without_cuda(tmp_path: Path):
    package = tmp_path / "retinanet_ops"
    shutil.copytree(FOLDER, package, ignore=shutil.ignore_patterns("_cuda*.so", "__pycache__"))
    build = json.loads((package / "_build_info.json").read_text())
    build |= {"cuda_builds": {}, "cuda_omitted": "built with RETINANET_OPS_CUDA=0"}
    (package / "_build_info.json").write_text(json.dumps(build))
    result = run_python(tmp_path, "-m", "retinanet_ops")
    assert "CUDA kernels   not built: built with RETINANET_OPS_CUDA=0" in result.stdout
    assert result.returncode == (0 if torch.version.cuda is None else 1)
    assert ("PROBLEM: " in result.stdout) == (torch.version.cuda is not None)


def test_package_is_typed_and_has_no_python_extension_modules():
    assert (FOLDER / "py.typed").exists()
    assert all(re.fullmatch(r"_C|_cuda\d+", path.stem) for path in LIBRARIES)
    assert all(b"PyInit_" not in path.read_bytes() for path in LIBRARIES)

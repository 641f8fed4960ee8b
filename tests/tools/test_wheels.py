"""Making release wheels: linking for an old glibc, and merging the wheels of several CUDA major versions."""

import base64
import hashlib
import json
import os
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("wheel", reason="needs wheel, which the extra dev installs")

from tools.wheels import archive, manylinux
from tools.wheels.archive import WheelError
from tools.wheels.check_release import release_faults
from tools.wheels.merge import merge

NAME = "retinanet_ops-0.1.0-py3-none-manylinux_2_28_x86_64.whl"
DIST_INFO = "retinanet_ops-0.1.0.dist-info"
INFO = {"version": "0.1.0", "torch_target": "2.10", "debug": False, "cuda_omitted": None}


def record_line(name: str, content: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(content)}"


def make_wheel(folder: Path, cuda: str | None, **changes: object) -> Path:
    """Write a wheel with stand-ins for its libraries, built for a CUDA version. `changes` adds to its build info."""
    builds = {cuda.split(".")[0]: {"version": cuda, "archs": f"archs of {cuda}"}} if cuda else {}
    torch = f"2.14.1+cu{(cuda or '').replace('.', '')}"
    files = {
        "retinanet_ops/__init__.py": "",
        "retinanet_ops/_C.so": "CPU kernels",
        "retinanet_ops/_build_info.json": json.dumps({**INFO, "torch": torch, "cuda_builds": builds, **changes}),
        **{f"retinanet_ops/_cuda{major}.so": f"kernels of {cuda}" for major in builds},
        f"{DIST_INFO}/METADATA": "Metadata-Version: 2.4\nName: retinanet-ops\nVersion: 0.1.0\n",
        f"{DIST_INFO}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: py3-none-manylinux_2_28_x86_64\n",
    }
    return write_wheel(folder, files)


def write_wheel(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / NAME
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        lines = [record_line(name, content.encode()) for name, content in files.items()]
        archive.writestr(f"{DIST_INFO}/RECORD", "\n".join([*lines, f"{DIST_INFO}/RECORD,,", ""]))
    return path


def read_wheel(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_merged_wheel_has_all_cuda_libraries_and_a_true_record(tmp_path: Path):
    merged = merge([make_wheel(tmp_path / "b", "13.0"), make_wheel(tmp_path / "a", "12.9")], tmp_path / "merged")
    assert merged == tmp_path / "merged" / NAME
    files = read_wheel(merged)
    assert files["retinanet_ops/_cuda12.so"] == b"kernels of 12.9"
    assert files["retinanet_ops/_cuda13.so"] == b"kernels of 13.0"
    info = json.loads(files["retinanet_ops/_build_info.json"])
    assert info == {
        **INFO,
        "torch": "2.14.1",
        "cuda_builds": {
            "12": {"version": "12.9", "archs": "archs of 12.9"},
            "13": {"version": "13.0", "archs": "archs of 13.0"},
        },
    }
    record = f"{DIST_INFO}/RECORD"
    expected = {record_line(name, content) for name, content in files.items() if name != record}
    assert set(files[record].decode().split()) == {*expected, f"{record},,"}


def test_merged_wheel_can_be_merged_again(tmp_path: Path):
    pair = merge([make_wheel(tmp_path / "a", "12.9"), make_wheel(tmp_path / "b", "13.0")], tmp_path / "ab")
    names = set(read_wheel(merge([pair, make_wheel(tmp_path / "c", "14.0")], tmp_path / "abc")))
    assert {f"retinanet_ops/_cuda{major}.so" for major in (12, 13, 14)} <= names


def test_wheels_that_differ_elsewhere_are_refused(tmp_path: Path):
    ours = make_wheel(tmp_path / "a", "12.9")
    files = {name: content.decode() for name, content in read_wheel(make_wheel(tmp_path / "b", "13.0")).items()}
    del files[f"{DIST_INFO}/RECORD"], files["retinanet_ops/__init__.py"]
    theirs = write_wheel(tmp_path / "c", {**files, "retinanet_ops/_C.so": "others"})
    with pytest.raises(WheelError, match=r"differ in retinanet_ops/_C\.so, retinanet_ops/__init__\.py$"):
        merge([ours, theirs], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("cuda", "changes", "message"),
    [
        (None, {"cuda_omitted": "no nvcc"}, r"has no CUDA library \(no nvcc\)"),
        ("12.6", {}, "a library for CUDA 12, which another wheel has"),
        ("13.0", {"torch": "2.13.0+cu130"}, "_build_info.json of .* differ: .*2.14.1.*2.13.0"),
        ("13.0", {"torch_target": "2.11"}, "_build_info.json of .* differ"),
    ],
)
def test_unfit_builds_are_refused(tmp_path: Path, cuda: str | None, changes: dict[str, str], message: str):
    ours, theirs = make_wheel(tmp_path / "a", "12.9"), make_wheel(tmp_path / "b", cuda, **changes)
    with pytest.raises(WheelError, match=message):
        merge([ours, theirs], tmp_path / "merged")


def test_unfit_files_are_refused(tmp_path: Path):
    ours, theirs = make_wheel(tmp_path / "a", "12.9"), make_wheel(tmp_path / "b", "13.0")
    with pytest.raises(WheelError, match="at least two wheels, got 1"):
        merge([ours], tmp_path)
    with pytest.raises(WheelError, match="would be overwritten; choose another --output-dir"):
        merge([ours, theirs], tmp_path / "b")
    other = theirs.rename(theirs.with_name(NAME.replace("0.1.0", "0.2.0")))
    with pytest.raises(WheelError, match="must have one file name"):
        merge([ours, other], tmp_path / "merged")
    theirs.write_bytes(ours.read_bytes()[:-30])
    with pytest.raises(WheelError, match="`wheel unpack .*` failed"):
        merge([ours, theirs], tmp_path / "merged")


def test_wheel_that_cannot_be_packed_leaves_the_older_one(tmp_path: Path, monkeypatch):
    wheels = [make_wheel(tmp_path / "a", "12.9"), make_wheel(tmp_path / "b", "13.0")]
    older = merge(wheels, tmp_path / "merged").read_bytes()
    run = archive._wheel

    def fail_to_pack(command: str, path: Path, option: str, dest: Path) -> None:
        if command == "unpack":
            return run(command, path, option, dest)
        (dest / NAME).write_bytes(b"half a wheel")
        raise WheelError("no space left on the device")

    monkeypatch.setattr(archive, "_wheel", fail_to_pack)
    with pytest.raises(WheelError, match="no space left"):
        merge(wheels, tmp_path / "merged")
    assert os.listdir(tmp_path / "merged") == [NAME]
    assert (tmp_path / "merged" / NAME).read_bytes() == older


# ---- manylinux ---------------------------------------------------------------------------------

OBJDUMP = """
_C.so:     file format elf64-x86-64

DYNAMIC SYMBOL TABLE:
0000000000000000      DF *UND*  0000000000000000 (GLIBC_2.2.5)  memcpy
0000000000000000      DF *UND*  0000000000000000 (GLIBC_2.27) expf
0000000000000000      DF *UND*  0000000000000000  GLIBC_2.17  clock_gettime
0000000000000000      DF *UND*  0000000000000000 (GLIBCXX_3.4.21) _ZNSo9_M_insertIbEERSoT_
0000000000000000      DF *UND*  0000000000000000 (CXXABI_1.3.11) _ZdlPvSt11align_val_t
0000000000000000  w   D  *UND*  0000000000000000  Base        __gmon_start__
"""


def test_symbols_newer_than_manylinux_2_28_are_faults():
    assert manylinux.symbol_faults("_C.so", OBJDUMP) == []
    newer = OBJDUMP.replace("GLIBC_2.27", "GLIBC_2.29").replace("GLIBCXX_3.4.21", "GLIBCXX_3.4.26")
    assert manylinux.symbol_faults("_C.so", newer) == [
        "_C.so needs expf of GLIBC 2.29, but manylinux_2_28 ends at 2.28",
        "_C.so needs _ZNSo9_M_insertIbEERSoT_ of GLIBCXX 3.4.26, but manylinux_2_28 ends at 3.4.24",
    ]
    newer = OBJDUMP.replace("GLIBC_2.17 ", "GLIBC_2.34 ")
    (fault,) = manylinux.symbol_faults("_C.so", newer)
    assert fault == "_C.so needs clock_gettime of GLIBC 2.34, but manylinux_2_28 ends at 2.28"


def test_symbols_without_versions_cannot_be_checked():
    with pytest.raises(WheelError, match=r"names no version of a symbol of _C\.so"):
        manylinux.symbol_faults("_C.so", "\n_C.so:     file format elf64-x86-64\n\nDYNAMIC SYMBOL TABLE:\nno symbols\n")


def test_a_wheel_of_another_tree_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(manylinux, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "library.cpp").touch()
    with pytest.raises(WheelError, match=r"library\.o does not exist; build library\.cpp first"):
        manylinux.make_manylinux(make_wheel(tmp_path / "a", "13.0"), tmp_path / "dist")
    assert not (tmp_path / "dist").exists()


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (
            {"csrc/library.cpp": 30, "object": 20, "wheel": 40},
            r"library\.o is older than .*library\.cpp; build the wheel",
        ),
        (
            {"csrc/library.cpp": 10, "object": 50, "wheel": 40},
            r"library\.o is newer than .*\.whl; build the wheel again",
        ),
        # Both times may be the same where a file system rounds them.
        ({"csrc/library.cpp": 20, "object": 20, "wheel": 20}, "the linker runs"),
    ],
)
def test_objects_of_another_build_are_refused(tmp_path: Path, monkeypatch, times: dict[str, int], message: str):
    monkeypatch.setattr(manylinux, "ROOT", tmp_path)

    def run(*command: str | Path) -> str:
        raise WheelError("the linker runs")

    monkeypatch.setattr(manylinux, "_run", run)
    wheel = make_wheel(tmp_path / "a", "13.0")
    for key, time in times.items():
        path = {"object": tmp_path / "build" / "objects" / "csrc" / "library.o", "wheel": wheel}.get(
            key, tmp_path / key
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (time, time))
    with pytest.raises(WheelError, match=message):
        manylinux.make_manylinux(wheel, tmp_path / "dist")


def test_wheels_of_several_builds_are_refused(tmp_path: Path):
    merged = merge([make_wheel(tmp_path / "a", "12.9"), make_wheel(tmp_path / "b", "13.0")], tmp_path / "merged")
    with pytest.raises(WheelError, match="has libraries for CUDA 12 and 13, .* link each wheel before it is merged"):
        manylinux.make_manylinux(merged, tmp_path / "dist")
    other = make_wheel(tmp_path / "c", "13.0", cuda_builds={"12": {"version": "12.9", "archs": "9.0"}})
    with pytest.raises(WheelError, match=r"holds the CUDA libraries \['_cuda13.so'\] but .* lists \['_cuda12.so'\]"):
        manylinux.make_manylinux(other, tmp_path / "dist")
    assert not (tmp_path / "dist").exists()


# ---- Files of a release ------------------------------------------------------------------------


def make_release(folder: Path, cuda: tuple[int, ...]) -> None:
    folder.mkdir()
    (folder / "retinanet_ops-0.1.0.tar.gz").touch()
    platforms = ("manylinux_2_27_x86_64.manylinux_2_28_x86_64", "manylinux_2_28_aarch64", "macosx_14_0_arm64")
    for platform in platforms:
        with zipfile.ZipFile(folder / f"retinanet_ops-0.1.0-py3-none-{platform}.whl", "w") as wheel:
            wheel.writestr("retinanet_ops/_C.so", "")
            for major in cuda if "x86_64" in platform else ():
                wheel.writestr(f"retinanet_ops/_cuda{major}.so", "")


def test_release_has_a_wheel_for_each_platform_and_cuda_major(tmp_path: Path):
    make_release(tmp_path / "good", cuda=(12, 13))
    assert release_faults("v0.1.0", "0.1.0", tmp_path / "good") == []
    make_release(tmp_path / "bad", cuda=(13,))
    (tmp_path / "bad" / "retinanet_ops-0.1.0-py3-none-manylinux_2_28_aarch64.whl").unlink()
    (tmp_path / "bad" / "retinanet_ops-0.0.9.tar.gz").touch()
    faults = release_faults("v0.1.1", "0.1.0", tmp_path / "bad")
    assert len(faults) == 4
    assert "the tag is v0.1.1, but pyproject.toml has version 0.1.0" in faults[0]
    assert "holds kernels for CUDA ['13'], expected ['12', '13']" in faults[1]
    assert "needs one wheel for *manylinux_2_28_aarch64*, found none" in faults[2]
    assert faults[3] == "retinanet_ops-0.0.9.tar.gz does not belong to the release"

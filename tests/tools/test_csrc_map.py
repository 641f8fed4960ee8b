"""The map of `csrc/README.md` against the files of the folder."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"


@pytest.mark.skipif(not CSRC.exists(), reason="csrc is only in the source tree")
def test_the_map_names_every_shared_file():
    ops = [path.name.removesuffix("_cuda.cu") for path in CSRC.glob("*_cuda.cu")]
    own = {op + end for op in ops for end in (".h", "_cpu.cpp", "_cuda.cu")}
    files = {path.name for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu")}
    page = (CSRC / "README.md").read_text()
    named = set(re.findall(r"`(\w+\.(?:h|cpp|cu))`", page))
    for stem, suffixes in re.findall(r"`(\w+)\.\{([\w,]+)\}`", page):
        named |= {f"{stem}.{suffix}" for suffix in suffixes.split(",")}
    assert len(ops) >= 11
    assert files - own - named == set(), "csrc/README.md lacks these files"
    assert named - files == set(), "csrc/README.md names files that do not exist"

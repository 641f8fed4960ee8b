"""One name follows an op through schema, header, kernels, Python module, reference, test and benchmark."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPS = sorted(path.name.removesuffix("_cuda.cu") for path in (ROOT / "csrc").glob("*_cuda.cu"))
PLACES = (
    "csrc/{}.h",
    "csrc/{}_cpu.cpp",
    "csrc/{}_cuda.cu",
    "retinanet_ops/{}.py",
    "retinanet_ops/reference/{}.py",
    "tests/ops/test_{}.py",
    "benchmarks/{}.py",
)


def schemas_of(op: str) -> list[str]:
    """Return the names of the schemas that follow the comment `// op` in csrc/library.cpp."""
    groups = re.split(r"^ *// (\w+)$", (ROOT / "csrc/library.cpp").read_text(), flags=re.MULTILINE)
    text = dict(zip(groups[1::2], groups[2::2], strict=True)).get(op, "")
    return re.findall(r'm\.def\(\s*"(\w+)\(', text)


def test_ops_are_found():
    assert len(OPS) >= 11, OPS


@pytest.mark.parametrize("op", OPS)
def test_one_name_follows_an_op(op):
    assert [place.format(op) for place in PLACES if not (ROOT / place.format(op)).is_file()] == []
    schemas = schemas_of(op)
    assert schemas, f"csrc/library.cpp has no schemas under a comment `// {op}`"
    for backend in ("cpu.cpp", "cuda.cu"):
        registered = re.findall(r'm\.impl\("(\w+)"', (ROOT / f"csrc/{op}_{backend}").read_text())
        assert set(registered) <= set(schemas), f"{op}_{backend} registers kernels for schemas of another op"
    module = (ROOT / f"retinanet_ops/{op}.py").read_text()
    fakes = re.findall(r'register_fake\("retinanet_ops::(\w+)"\)', module)
    assert sorted(fakes) == sorted(schemas), f"retinanet_ops/{op}.py must register a fake kernel for each schema"


def test_every_schema_belongs_to_an_op():
    text = (ROOT / "csrc/library.cpp").read_text()
    assert sorted(name for op in OPS for name in schemas_of(op)) == sorted(re.findall(r'm\.def\(\s*"(\w+)\(', text))


def test_every_reference_belongs_to_an_op():
    names = {path.stem for path in (ROOT / "retinanet_ops/reference").glob("[!_]*.py")}
    assert names == set(OPS)

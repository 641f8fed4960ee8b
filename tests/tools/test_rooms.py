"""The rooms (subpackages) of `retinanet`: which may import which, and the limits that keep the model small."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "retinanet"
#: The floors (layers) of the package, lowest first. A room may import only from lower floors, not from its own floor.
FLOORS = (
    {"common"},
    {"model", "data"},
    {"detection", "checkpoints"},
    {"training", "export"},
    {"comparison"},
    {"cli"},
    {"demo", "__main__", "__init__"},
)
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}
MOST_ROOMS = 12
#: Packages that the model may import besides the standard library.
MODEL_IMPORTS = {"torch", "torchvision", "retinanet_ops", "retinanet.model", "retinanet.common"}
MOST_MODEL_LINES = 3600


def imported_modules(file: Path) -> Iterator[str]:
    """Yield every module that a file imports, including imports inside functions and for type checking only."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            # `from retinanet import x` imports the room x.
            yield from (f"retinanet.{a.name}" for a in node.names) if node.module == "retinanet" else [node.module]


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(file) for file in FILES}
    assert rooms == set(FLOOR_OF)
    assert len(rooms) <= MOST_ROOMS


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_lead_to_lower_floors(file: Path) -> None:
    room = room_of(file)
    for module in imported_modules(file):
        top, _, rest = module.partition(".")
        if top != "retinanet":
            continue
        target = rest.partition(".")[0]
        assert target in FLOOR_OF, f"{file}: imports {module}, which is not in a room"
        if target != room:
            assert FLOOR_OF[target] < FLOOR_OF[room], f"{file}: {room} must not import {module}"


@pytest.mark.parametrize("file", sorted((PACKAGE / "model").glob("*.py")), ids=lambda file: file.name)
def test_the_model_stands_alone(file: Path) -> None:
    for module in imported_modules(file):
        names = module.split(".")
        allowed = names[0] in sys.stdlib_module_names | MODEL_IMPORTS or ".".join(names[:2]) in MODEL_IMPORTS
        assert allowed, f"{file}: the model must not import {module}"


def test_the_model_is_thin() -> None:
    files = list((PACKAGE / "model").rglob("*.py"))
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    assert lines < MOST_MODEL_LINES, f"{lines} lines in {len(files)} files of retinanet/model"

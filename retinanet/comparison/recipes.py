"""Recipes of `retinanet compare`: TOML files with a title and options of `retinanet train`."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from retinanet.common.errors import DataError, UsageError
from retinanet.common.files import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Options with a path, and the words that stand for something else than a path.
_PATHS = {"config": (), "weights": (), "backbone-weights": ("imagenet",), "class-weights": ("auto",)}


@dataclass(frozen=True)
class Recipe:
    """A model and how it is trained.

    Attributes:
        name: Name of the file without its suffix, which is also the name of the folder of its runs.
        title: What tables and plots call the model.
        source: The file.
        options: Options of `retinanet train` without the dashes, such as `batch-size`, with their values. Relative
            paths have been completed by the folder of the file.
    """

    name: str
    title: str
    source: Path
    options: dict[str, Any]


def shipped_recipes() -> dict[str, Path]:
    """Return the files of the recipes that come with this package, by name."""
    folder = Path(str(files(__package__) / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read_recipes(names: Sequence[str], known: Collection[str]) -> list[Recipe]:
    """Read recipes.

    Args:
        names: Files, or names of recipes that come with this package.
        known: Keys that a recipe may have besides `title`: options of `retinanet train` without the dashes.

    Raises:
        UsageError: There are fewer than two recipes, or two have the same name or the same title.
        DataError: A recipe is missing, or is not TOML, or has an unknown key or a value of a wrong type.
    """
    recipes = [_read_recipe(name, known) for name in names]
    if len(recipes) < 2:
        raise UsageError(f"RECIPE: expected at least two recipes to compare, got {len(recipes)}")
    for index, recipe in enumerate(recipes):
        for other in recipes[:index]:
            if recipe.name == other.name:
                raise UsageError(
                    f"{recipe.source}: its runs would have the same folder as those of {other.source}; rename a file"
                )
            if recipe.title == other.title:
                raise UsageError(f"{recipe.source}: title: {recipe.title!r} is that of {other.source}, too; change one")
    return recipes


def _read_recipe(name: str, known: Collection[str]) -> Recipe:
    shipped = shipped_recipes()
    path = shipped[name] if name in shipped and not Path(name).is_file() else Path(name)
    if not path.exists():
        raise DataError(f"{name}: no such file; expected a TOML file, or one of {', '.join(shipped)}")
    try:
        content = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{path}: not valid TOML: {error}") from error
    title = content.pop("title", path.stem)
    if not isinstance(title, str) or not title.strip() or not title.isprintable():
        raise DataError(f"{path}: title: expected one line of text, got {title!r}")
    for key, value in content.items():
        if key not in known:
            similar = difflib.get_close_matches(key.replace("_", "-"), known, n=1)
            hint = f", did you mean {similar[0]}?" if similar else ""
            raise DataError(f"{path}: {key}: expected an option of `retinanet train` that a recipe may have{hint}")
        if not _is_value(value):
            raise DataError(f"{path}: {key}: expected text, a number, true, false or a list, got {value!r}")
    for key, words in _PATHS.items():
        if isinstance(value := content.get(key), str) and value not in words:
            content[key] = str(path.parent / value)
    return Recipe(path.stem, title.strip(), path, content)


def _is_value(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_value(part) for part in value)
    return isinstance(value, (str, int, float))

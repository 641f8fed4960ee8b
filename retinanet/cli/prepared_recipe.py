"""Recipes of `retinanet compare` with everything that `retinanet train` needs, and the checks before any training."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from retinanet.cli import train
from retinanet.cli.arguments import READING, CommandParser
from retinanet.cli.train_arguments import DATA_PATHS
from retinanet.cli.train_config import build_config, build_options
from retinanet.common.errors import DataError, UsageError
from retinanet.common.files import output_folder, read_json, write_json

if TYPE_CHECKING:
    from retinanet.comparison.recipes import Recipe
    from retinanet.data import DetectionDataset
    from retinanet.training.options import TrainOptions

#: Options that may stand in recipes and, for all models, on the command line.
BUDGET = ("epochs", "batch_size", "evaluate_every")
# Options of `retinanet train` that all models of a comparison share, so that no recipe has them.
_PLACES = ("output", "resume", "seed", "device", "threads", "workers")
_SHARED = (*DATA_PATHS, *READING, *_PLACES, "save_every", "patience", "log")
# File in the folder of the runs of a recipe with the options that they were started with.
_OPTIONS = "options.json"


class _RecipeParser(CommandParser):
    """Parser of the options of a recipe; its errors name the file."""

    source: Path

    def error(self, message: str) -> NoReturn:
        """Raise DataError."""
        raise DataError(f"{self.source}: {message.removeprefix('argument --')}")

    def words_of(self, key: str, value: Any) -> list[str]:
        """Return an option of a recipe as words of the command line.

        Raises:
            DataError: The option takes another number of values, or the value is of a wrong type.
        """
        action = self._option_string_actions[f"--{key}"]
        if action.nargs == 0:
            if not isinstance(value, bool):
                self.error(f"{key}: expected true or false, got {value!r}")
            return [f"--{key}"] if value else []
        values = value if isinstance(value, list) else [value]
        texts = [",".join(map(str, v)) if isinstance(v, list) else str(v) for v in values]
        if any(isinstance(v, bool) for v in values) or not values or (action.nargs is None and len(values) > 1):
            expected = "a value" if action.nargs is None else "one or more values"
            self.error(f"{key}: expected {expected}, got {value!r}")
        if action.nargs is None:
            return [f"--{key}={texts[0]}"]
        if any(text.startswith("--") for text in texts):
            self.error(f"{key}: expected values, got {value!r}")
        return [f"--{key}", *texts]


class PreparedRecipe:
    """A recipe with everything that `retinanet train` needs.

    Args:
        recipe: The recipe.
        parser: Parser of the options of a recipe.
        args: The parsed arguments of the comparison.

    Attributes:
        recipe: The recipe.
        options: Its options, overridden by those that the command line sets for all recipes.

    Raises:
        DataError: An option of the recipe is wrong.
    """

    def __init__(self, recipe: Recipe, parser: _RecipeParser, args: argparse.Namespace) -> None:
        """Parse the options of the recipe, and complete them."""
        self.recipe = recipe
        self.options = dict(recipe.options)
        if args.backbone_weights is not None and not recipe.options.keys() & {"weights", "backbone-weights"}:
            self.options["backbone-weights"] = args.backbone_weights
        for name in BUDGET:
            if hasattr(args, name):
                self.options[name.replace("_", "-")] = getattr(args, name)
        self._folder = Path(args.output) / "runs" / recipe.name
        self._data = data_words(args)
        parser.source = recipe.source
        self._words = [word for key, value in self.options.items() for word in parser.words_of(key, value)]
        self._parsed = parser.parse_args([*self._words, *self._data])
        for name in ("device", "threads", "workers"):
            if hasattr(args, name):
                setattr(self._parsed, name, getattr(args, name))

    def run_dir(self, seed: int) -> Path:
        """Return the folder of a run."""
        return self._folder / f"seed_{seed}"

    def arguments(self, seed: int) -> argparse.Namespace:
        """Return the arguments of `retinanet train` for a run, which starts or continues it."""
        from retinanet.training.run_folder import STATE_NAME

        run_dir = str(self.run_dir(seed))
        resume = True if (self.run_dir(seed) / STATE_NAME).exists() else None
        return argparse.Namespace(**{**vars(self._parsed), "seed": seed, "output": run_dir, "resume": resume})

    def command(self, seed: int) -> str:
        """Return the command that starts a run."""
        words = [*self._words, *self._data, "--seed", str(seed), "--output", str(self.run_dir(seed))]
        return shlex.join(["retinanet", "train", *words])

    def check(self, train_set: DetectionDataset, val_set: DetectionDataset) -> TrainOptions:
        """Build the model and check it with the data, as a training would, and return the options of the training.

        Raises:
            UsageError: An option is wrong.
            DataError: Weights cannot be read or do not fit, or the data does not fit the model.
        """
        from retinanet.checkpoints.model_file import read_model
        from retinanet.model.architectures import build_model
        from retinanet.training.run import check_data

        parsed = self.arguments(0)
        try:
            start = None if parsed.weights is None else read_model(parsed.weights)
            config = build_config(parsed, train_set, {}, start)
            options = build_options(parsed, {})
            check_data(build_model(config, train.backbone_weights(parsed, config)), train_set, val_set, options)
        except UsageError as error:
            raise UsageError(f"{self.recipe.source}: {error}") from error
        return options

    def claim_folder(self) -> None:
        """Write the options into the folder of the runs, in which runs with other options must not be continued.

        Raises:
            UsageError: The folder holds runs with other options.
        """
        path = self._folder / _OPTIONS
        before = read_json(path) if path.is_file() else self.options
        if before == self.options:
            write_json(output_folder(self._folder) / _OPTIONS, self.options)
            return
        for key in {**before, **self.options}:
            if before.get(key) != self.options.get(key):
                was, now = (_shown(options.get(key)) for options in (before, self.options))
                raise UsageError(
                    f"{self.recipe.source}: {key}: the runs in {self._folder} had {was}, now the recipe has {now}; "
                    "choose another --output, or remove that folder"
                )


def prepare_recipes(args: argparse.Namespace) -> list[PreparedRecipe]:
    """Read the recipes that the arguments of the comparison name.

    Raises:
        UsageError: There are fewer than two recipes, or two have the same name or the same title.
        DataError: A recipe is missing or wrong.
    """
    from retinanet.comparison.recipes import read_recipes

    parser = _RecipeParser(prog="retinanet train", add_help=False)
    train.add_arguments(parser)
    options = {action.dest: action.option_strings for action in parser._actions}
    known = [texts[0].removeprefix("--") for name, texts in options.items() if name not in _SHARED]
    return [PreparedRecipe(recipe, parser, args) for recipe in read_recipes(args.recipes, known)]


def data_words(args: argparse.Namespace) -> list[str]:
    """Return the options of the data as words of the command line."""
    words = []
    for name in (*DATA_PATHS, *READING):
        value = getattr(args, name)
        if value is not None:
            text = ",".join(value) if isinstance(value, list) else value
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [text])]
    return words


def common_options(
    recipes: Sequence[PreparedRecipe], train_set: DetectionDataset, val_set: DetectionDataset
) -> list[TrainOptions]:
    """Check all recipes before any training, and return the options of each.

    Raises:
        UsageError: An option is wrong, or the models would not be trained on the same number of images.
        DataError: Weights cannot be read or do not fit, or the data does not fit a model.
    """
    options = [recipe.check(train_set, val_set) for recipe in recipes]
    first = options[0]
    for prepared, other in zip(recipes, options, strict=True):
        for name in ("epochs", "batch_size"):
            expected, got = getattr(first, name), getattr(other, name)
            if expected != got:
                option = name.replace("_", "-")
                raise UsageError(
                    f"{prepared.recipe.source}: {option}: expected {expected}, as in {recipes[0].recipe.source}, "
                    f"got {got}; a comparison gives every model the same number of images (--{option} sets it for all)"
                )
    for prepared in recipes:
        prepared.claim_folder()
    return options


def differences(recipes: Sequence[PreparedRecipe]) -> list[tuple[str, list[str]]]:
    """Return the options in which recipes differ, each with its value in every recipe."""
    names = dict.fromkeys(name for prepared in recipes for name in prepared.options)
    values = {name: [_shown(prepared.options.get(name)) for prepared in recipes] for name in names}
    return [(name, texts) for name, texts in values.items() if len(set(texts)) > 1]


def _shown(value: Any) -> str:
    if value is None:
        return "default"
    if isinstance(value, list):
        return " ".join(",".join(map(str, v)) if isinstance(v, list) else str(v) for v in value)
    return str(value).lower() if isinstance(value, bool) else str(value)

"""Recipes of `retinanet compare` with everything that `retinanet train` needs, and the checks before any training."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from retinanet.cli import train
from retinanet.cli.arguments import READING, CommandParser
from retinanet.cli.train_arguments import DATA_PATHS
from retinanet.cli.train_config import build_config, build_options
from retinanet.common.errors import DataError, UsageError

if TYPE_CHECKING:
    from retinanet.comparison.recipes import Recipe
    from retinanet.data import DetectionDataset
    from retinanet.training.options import TrainOptions

#: Options that may stand in recipes and, for all models, on the command line.
BUDGET = ("epochs", "batch_size", "evaluate_every", "workers")
# Options of `retinanet train` that all models of a comparison share, so that no recipe has them.
_SHARED = (*DATA_PATHS, *READING, "output", "resume", "save_every", "seed", "device", "threads", "patience", "log")


class _RecipeParser(CommandParser):
    """Parser of the options of a recipe; its errors name the file."""

    source: Path

    def error(self, message: str) -> NoReturn:
        """Raise DataError."""
        raise DataError(f"{self.source}: {message.removeprefix('argument --')}")


class Contender:
    """A recipe with everything that `retinanet train` needs.

    Args:
        recipe: The recipe.
        parser: Parser of the options of a recipe.
        args: The parsed arguments of the comparison.

    Raises:
        DataError: An option of the recipe is wrong.
    """

    def __init__(self, recipe: Recipe, parser: _RecipeParser, args: argparse.Namespace) -> None:
        """Parse the options of the recipe, and complete them."""
        self.recipe = recipe
        self.folder = Path(args.output) / "runs" / recipe.name
        words = recipe.arguments()
        if args.backbone_weights is not None and not recipe.options.keys() & {"weights", "backbone-weights"}:
            words += ["--backbone-weights", args.backbone_weights]
        for name in BUDGET:
            if hasattr(args, name):
                words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        self.words = words + data_words(args)
        parser.source = recipe.source
        self.parsed = parser.parse_args(self.words)
        self.parsed.device, self.parsed.threads = args.device, args.threads

    def run_dir(self, seed: int) -> Path:
        """Return the folder of a run."""
        return self.folder / f"seed_{seed}"

    def arguments(self, seed: int) -> argparse.Namespace:
        """Return the arguments of `retinanet train` for a run, which starts or continues it."""
        from retinanet.training.run_folder import STATE_NAME

        run_dir = str(self.run_dir(seed))
        resume = True if (self.run_dir(seed) / STATE_NAME).exists() else None
        return argparse.Namespace(**{**vars(self.parsed), "seed": seed, "output": run_dir, "resume": resume})

    def command(self, seed: int) -> str:
        """Return the command that starts a run."""
        words = [*self.words, "--seed", str(seed), "--output", str(self.run_dir(seed))]
        return shlex.join(["retinanet", "train", *words])


def contenders_of(args: argparse.Namespace) -> list[Contender]:
    """Read the recipes that the arguments of the comparison name.

    Raises:
        UsageError: There are fewer than two recipes, or two have the same name.
        DataError: A recipe is missing or wrong.
    """
    from retinanet.comparison.recipes import read_recipes

    parser = _RecipeParser(prog="retinanet train", add_help=False)
    train.add_arguments(parser)
    return [Contender(recipe, parser, args) for recipe in read_recipes(args.recipes, _recipe_keys(parser))]


def data_words(args: argparse.Namespace) -> list[str]:
    """Return the options of the data as words of the command line."""
    words = []
    for name in (*DATA_PATHS, *READING):
        value = getattr(args, name)
        if value is not None:
            text = ",".join(value) if isinstance(value, list) else value
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [text])]
    return words


def _recipe_keys(parser: argparse.ArgumentParser) -> list[str]:
    """Return the options of `retinanet train` that a recipe may have, without the dashes."""
    options = {action.dest: action.option_strings for action in parser._actions}
    return [texts[0].removeprefix("--") for name, texts in options.items() if name not in _SHARED]


def common_options(contenders: Sequence[Contender], train_set: DetectionDataset) -> TrainOptions:
    """Check every model and its recipe before any training, and return the options of the first.

    Raises:
        UsageError: An option is wrong, or the models would not be trained on the same number of images.
    """
    from retinanet.checkpoints.model_file import read_model

    options = []
    for contender in contenders:
        parsed = contender.arguments(0)
        try:
            start = None if parsed.weights is None else read_model(parsed.weights)
            build_config(parsed, train_set, {}, start)
            options.append(build_options(parsed, {}))
        except UsageError as error:
            raise UsageError(f"{contender.recipe.source}: {error}") from error
    first = options[0]
    for contender, other in zip(contenders, options, strict=True):
        for name in ("epochs", "batch_size"):
            expected, got = getattr(first, name), getattr(other, name)
            if expected != got:
                option = name.replace("_", "-")
                raise UsageError(
                    f"{contender.recipe.source}: {option}: expected {expected}, as in {contenders[0].recipe.source}, "
                    f"got {got}; a comparison gives every model the same number of images (--{option} sets it for all)"
                )
    return first

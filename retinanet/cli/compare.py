"""The command `retinanet compare`: it trains several models on the same data and puts their results side by side."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retinanet.cli import train
from retinanet.cli.arguments import (
    add_device,
    add_list,
    natural_int,
    positive_int,
    read_options,
    use_device,
)
from retinanet.cli.console import progress_bar
from retinanet.cli.contender import BUDGET, Contender, common_options, contenders_of, data_words
from retinanet.cli.train_arguments import add_train_and_val
from retinanet.common.errors import UsageError
from retinanet.common.files import check_output_folder, output_folder

if TYPE_CHECKING:
    from retinanet.comparison.page import Setting, Shown
    from retinanet.comparison.recipes import Recipe
    from retinanet.comparison.results import ModelResult
    from retinanet.data import DetectionDataset
    from retinanet.training.options import TrainOptions

HELP = "train several models on the same data and compare them"
DESCRIPTION = (
    "Train models on the same data, for the same number of steps and with the same seeds, and write a page with a "
    "table, curves and pictures. A recipe is a TOML file with a title and options of `retinanet train`, such as "
    '`model = "ssdlite320"`, or the name of a recipe that comes with this package. An interrupted comparison continues '
    "where it stopped when the command is repeated."
)
# Images of the training data on which durations are measured.
_MEASURED_IMAGES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `retinanet compare`."""
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="TOML file, or name of a recipe of this package")
    group = parser.add_argument_group("data")
    add_train_and_val(group)
    group.add_argument("--output", metavar="DIR", required=True, help="folder of the page and the runs")
    group = parser.add_argument_group("training of all models", argument_default=argparse.SUPPRESS)
    add_list(
        group,
        "--seeds",
        natural_int,
        convert=_seeds,
        default=(0, 1, 2),
        metavar="N",
        help="seeds; each model is trained once with each (default: 0 1 2)",
    )
    group.add_argument("--epochs", type=positive_int, metavar="N", help="passes over the training images")
    group.add_argument("--batch-size", type=positive_int, metavar="N", help="images per step")
    group.add_argument(
        "--backbone-weights",
        metavar="FILE",
        default=None,
        help="as in retinanet train, for all recipes without `weights` and `backbone-weights`",
    )
    group.add_argument("--evaluate-every", type=positive_int, metavar="EPOCHS", help="epochs between evaluations")
    group.add_argument("--workers", type=natural_int, metavar="N", help="processes that load images")
    add_device(parser)


def _seeds(values: tuple[int, ...]) -> tuple[int, ...]:
    if not values or len(set(values)) < len(values):
        raise ValueError(f"expected different numbers, got {' '.join(map(str, values))}")
    return values


def run(args: argparse.Namespace) -> int:
    """Train, evaluate and measure the models, and write the page."""
    from retinanet.comparison.page import write_comparison
    from retinanet.comparison.results import conclusions
    from retinanet.data import open_dataset

    for name in ("train", "val"):
        if getattr(args, name) is None:
            raise UsageError(f"--{name}: required; see retinanet compare --help")
    use_device(args)
    folder = Path(args.output)
    check_output_folder(folder)
    contenders = contenders_of(args)
    reading = {**read_options(vars(args)), "progress": progress_bar("checking images", "image", delay=2)}
    train_set = open_dataset(args.train, args.images, split="train", **reading)
    val_images = args.images if args.val_images is None else args.val_images
    val_set = open_dataset(args.val, val_images, class_names=train_set.class_names, split="val", **reading)
    options = common_options(contenders, train_set)
    runs = [(contender, seed) for seed in args.seeds for contender in contenders]
    for number, (contender, seed) in enumerate(runs, 1):
        print(f"\n{contender.recipe.title}, seed {seed} (run {number} of {len(runs)})")
        train.run(contender.arguments(seed))
    output_folder(folder)
    models, shown = _results(contenders, args.seeds, train_set, val_set)
    setting = _setting(args, options, train_set, val_set)
    differences = _differences([contender.recipe for contender in contenders])
    page = write_comparison(folder, setting, models, differences, val_set, shown)
    print("\n".join(["", *conclusions(models)]))
    print(f"{page}: written")
    return 0


def _results(
    contenders: Sequence[Contender], seeds: Sequence[int], train_set: DetectionDataset, val_set: DetectionDataset
) -> tuple[list[ModelResult], list[Shown]]:
    """Evaluate all runs, and measure the models of the first seed."""
    from retinanet.checkpoints.model_file import load_model
    from retinanet.common.devices import resolve_device
    from retinanet.comparison.page import Shown
    from retinanet.comparison.results import ModelResult, Run
    from retinanet.comparison.timing import measure_in_turns
    from retinanet.detection.evaluate import evaluate
    from retinanet.training.run_folder import LAST_NAME

    samples = [train_set.load(index) for index in range(min(_MEASURED_IMAGES, len(train_set)))]
    device = resolve_device(contenders[0].parsed.device)
    firsts = [load_model(contender.run_dir(seeds[0]) / LAST_NAME, device) for contender in contenders]
    times = measure_in_turns(firsts, [image for image, _ in samples], [target for _, target in samples])
    results, shown = [], []
    for contender, first, of_model in zip(contenders, firsts, times, strict=True):
        runs = []
        for seed in seeds:
            model = load_model(contender.run_dir(seed) / LAST_NAME, device)
            evaluation = evaluate(model, val_set, progress=progress_bar("evaluating", "image"))
            threshold = evaluation.curves.overall.best_threshold() or 0.0
            lines = _metrics(contender.run_dir(seed))
            runs.append(Run.from_lines(seed, evaluation.stats, evaluation.curves.overall.at(threshold), lines))
            if seed == seeds[0]:
                shown.append(Shown(evaluation.detections, threshold))
        parameters = sum(parameter.numel() for parameter in first.parameters())
        recipe = contender.recipe
        results.append(ModelResult(recipe.name, recipe.title, contender.command(seeds[0]), parameters, of_model, runs))
    return results, shown


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    from retinanet.training.run_folder import METRICS_NAME

    return [json.loads(line) for line in (run_dir / METRICS_NAME).read_text(encoding="utf-8").splitlines()]


def _setting(
    args: argparse.Namespace, options: TrainOptions, train_set: DetectionDataset, val_set: DetectionDataset
) -> Setting:
    import torch

    from retinanet.common.devices import resolve_device
    from retinanet.comparison.page import Setting

    words = ["retinanet", "compare", *args.recipes, *data_words(args)]
    for name in ("backbone_weights", *BUDGET):
        if getattr(args, name, None) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    words += ["--seeds", *map(str, args.seeds), "--output", args.output]
    device = resolve_device(args.device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        machine = f"{threads} CPU thread{'' if threads == 1 else 's'} ({platform.machine()})"
    else:
        machine = f"one {torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}"
    return Setting(
        command=shlex.join(words),
        train=f"{args.train}: {train_set.summary()}",
        val=f"{args.val}: {val_set.summary()}",
        epochs=options.epochs,
        batch_size=options.batch_size,
        steps=options.epochs * -(-len(train_set) // options.batch_size),
        seeds=args.seeds,
        machine=f"{machine} and PyTorch {torch.__version__}",
    )


def _differences(recipes: Sequence[Recipe]) -> list[tuple[str, list[str]]]:
    """Return the options in which recipes differ, each with its value in every recipe."""
    names = dict.fromkeys(name for recipe in recipes for name in recipe.options)
    values = {name: [_text(recipe.options.get(name)) for recipe in recipes] for name in names}
    return [(name, texts) for name, texts in values.items() if len(set(texts)) > 1]


def _text(value: Any) -> str:
    if value is None:
        return "default"
    if isinstance(value, list):
        return " ".join(",".join(map(str, v)) if isinstance(v, list) else str(v) for v in value)
    return str(value).lower() if isinstance(value, bool) else str(value)

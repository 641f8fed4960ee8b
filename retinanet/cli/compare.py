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
from retinanet.cli.prepared_recipe import (
    BUDGET,
    PreparedRecipe,
    common_options,
    data_words,
    differences,
    prepare_recipes,
)
from retinanet.cli.train_arguments import add_train_and_val
from retinanet.common.errors import UsageError
from retinanet.common.files import check_output_folder
from retinanet.common.launch import launched_processes

if TYPE_CHECKING:
    import torch

    from retinanet.comparison.page import Setting, Shown
    from retinanet.comparison.results import ModelResult
    from retinanet.comparison.timing import Times
    from retinanet.data import DetectionDataset
    from retinanet.training.options import TrainOptions

HELP = "train several models on the same data and compare them"
DESCRIPTION = (
    "Train models on the same data, for the same number of steps and with the same seeds, and write a page with a "
    "table, curves and pictures. A recipe is a TOML file with a title and options of `retinanet train`, such as "
    '`model = "ssdlite320"`, or the name of a recipe that comes with this package. An interrupted comparison continues '
    "where it stopped when the command is repeated."
)


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
        raise ValueError(f"expected one or more numbers, all different, got {' '.join(map(str, values)) or 'none'}")
    return values


def run(args: argparse.Namespace) -> int:
    """Train, evaluate and measure the models, and write the page."""
    from retinanet.comparison.page import write_comparison
    from retinanet.comparison.results import conclusions
    from retinanet.data import open_dataset

    for name in ("train", "val"):
        if getattr(args, name) is None:
            raise UsageError(f"--{name}: required; see retinanet compare --help")
    if launched_processes() > 1:
        raise UsageError("compare: expected a single process, got several; train with torchrun and `retinanet train`")
    device = use_device(args)
    folder = Path(args.output)
    check_output_folder(folder)
    recipes = prepare_recipes(args)
    reading = {**read_options(vars(args)), "progress": progress_bar("checking images", "image", delay=2)}
    train_set = open_dataset(args.train, args.images, split="train", **reading)
    val_images = args.images if args.val_images is None else args.val_images
    val_set = open_dataset(args.val, val_images, class_names=train_set.class_names, split="val", **reading)
    options = common_options(recipes, train_set, val_set)
    runs = [(prepared, seed) for seed in args.seeds for prepared in recipes]
    for number, (prepared, seed) in enumerate(runs, 1):
        print(f"\n{prepared.recipe.title}, seed {seed} (run {number} of {len(runs)})")
        train.run(prepared.arguments(seed))
    print("\nevaluating and measuring the models")
    times = _times(recipes, options, args.seeds[0], train_set, device)
    models, shown = _results(recipes, args.seeds, times, val_set, device)
    setting = _setting(args, options[0], train_set, val_set, device)
    page = write_comparison(folder, setting, models, differences(recipes), val_set, shown)
    print("\n".join(["", *conclusions(models)]))
    print(f"{page}: written")
    return 0


def _times(
    recipes: Sequence[PreparedRecipe],
    options: Sequence[TrainOptions],
    seed: int,
    train_set: DetectionDataset,
    device: torch.device,
) -> list[Times]:
    """Measure the models of a seed on images of the training data."""
    from retinanet.checkpoints.model_file import load_model
    from retinanet.comparison.timing import measure_in_turns
    from retinanet.training.options import AUTOCAST_DTYPES
    from retinanet.training.run_folder import LAST_NAME

    # No more than a batch of training, for which there is memory.
    samples = [train_set.load(index) for index in range(min(options[0].batch_size, len(train_set)))]
    return measure_in_turns(
        [load_model(prepared.run_dir(seed) / LAST_NAME, device) for prepared in recipes],
        [AUTOCAST_DTYPES[of_recipe.precision] for of_recipe in options],
        [image for image, _ in samples],
        [target for _, target in samples],
    )


def _results(
    recipes: Sequence[PreparedRecipe],
    seeds: Sequence[int],
    times: Sequence[Times],
    val_set: DetectionDataset,
    device: torch.device,
) -> tuple[list[ModelResult], list[Shown]]:
    """Evaluate all runs, and return what is known of each model, with the detections of the first seed."""
    from retinanet.checkpoints.model_file import load_model
    from retinanet.comparison.page import Shown
    from retinanet.comparison.results import ModelResult, Run
    from retinanet.detection.evaluate import evaluate
    from retinanet.training.run_folder import LAST_NAME

    results, shown = [], []
    for prepared, of_model in zip(recipes, times, strict=True):
        runs, parameters = [], 0
        for seed in seeds:
            model = load_model(prepared.run_dir(seed) / LAST_NAME, device)
            evaluation = evaluate(model, val_set, progress=progress_bar("evaluating", "image"))
            threshold = evaluation.curves.overall.best_threshold()
            counts = None if threshold is None else evaluation.curves.overall.at(threshold)
            runs.append(Run.from_lines(seed, evaluation.stats, counts, _metrics(prepared.run_dir(seed))))
            if seed == seeds[0]:
                shown.append(Shown(evaluation.detections, threshold or 0.0))
                parameters = sum(parameter.numel() for parameter in model.parameters())
        recipe = prepared.recipe
        results.append(ModelResult(recipe.name, recipe.title, prepared.command(seeds[0]), parameters, of_model, runs))
    return results, shown


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    from retinanet.training.run_folder import METRICS_NAME

    return [json.loads(line) for line in (run_dir / METRICS_NAME).read_text(encoding="utf-8").splitlines()]


def _setting(
    args: argparse.Namespace,
    options: TrainOptions,
    train_set: DetectionDataset,
    val_set: DetectionDataset,
    device: torch.device,
) -> Setting:
    import torch

    from retinanet.comparison.page import Setting

    words = ["retinanet", "compare", *args.recipes, *data_words(args)]
    for name in ("backbone_weights", *BUDGET, "workers", "threads"):
        if getattr(args, name, None) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    words += ["--seeds", *map(str, args.seeds), "--output", args.output]
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
        machine=f"{machine}, PyTorch {torch.__version__}",
    )

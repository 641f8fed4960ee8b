"""The command `retinanet train`: it trains a model, or continues a run."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retinanet.cli.arguments import DATA_FORMS, read_options, use_device
from retinanet.cli.console import print_stats, print_warning, progress_bar
from retinanet.cli.train_arguments import DATA_PATHS, PYRAMIDS, add_arguments, data_options
from retinanet.cli.train_config import build_config, build_options
from retinanet.common.errors import DataError, UsageError
from retinanet.common.files import check_output_folder, read_json
from retinanet.common.launch import launched_rank

if TYPE_CHECKING:
    from retinanet.model.detector_config import DetectorConfig

__all__ = ["DESCRIPTION", "HELP", "add_arguments", "run"]

HELP = "train a model"
DESCRIPTION = (
    "Train a RetinaNet, an FCOS, a Faster R-CNN or an SSD. The folder RUN_DIR receives config.json, metrics.jsonl, "
    "best.safetensors, last.safetensors and last.pt, the training state from which --resume continues. Ctrl-C saves "
    "this state before the command ends."
)

RANDOM_START = (
    "training starts from random weights, so it takes thousands of steps to detect anything. Start from ImageNet "
    "weights with --backbone-weights imagenet (downloaded) or FILE, or from a whole model with --weights FILE"
)
RANDOM_PYRAMID = ". `retinanet sample trees DIR` also fetches ImageNet weights, for --backbone mobilenet_v2"


def run(args: argparse.Namespace) -> int:
    """Check the data and the options, then train. Of several processes, the main one alone prints."""
    with contextlib.ExitStack() as stack:
        if launched_rank():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        return _train(args)


def _train(args: argparse.Namespace) -> int:
    import torch

    from retinanet.checkpoints.model_file import read_model
    from retinanet.checkpoints.transfer import copy_weights
    from retinanet.data import open_dataset
    from retinanet.model.architectures import build_model
    from retinanet.training.run import train
    from retinanet.training.summary import describe_training, size_warnings

    use_device(args)
    run_dir = _run_folder(args)
    stored = {} if args.resume is None else _stored_run(run_dir)
    where = _data_options(args, run_dir, stored)
    checking = progress_bar("checking images", "image", delay=2)
    reading = {**read_options(where), "progress": checking}
    train_set = open_dataset(where["train"], where.get("images"), split="train", **reading)
    val_images = where.get("val_images", where.get("images"))
    val_set = open_dataset(where["val"], val_images, class_names=train_set.class_names, split="val", **reading)
    start = None if args.weights is None or stored else read_model(args.weights)
    config = build_config(args, train_set, stored, start)
    options = build_options(args, stored.get("options", {}))
    # The seed also determines the initial weights. A continued run replaces these by its saved weights.
    torch.manual_seed(options.seed)
    model = build_model(config, None if stored else backbone_weights(args, config))
    if start is not None:
        print(f"{args.weights}: {copy_weights(start, model)}")
    if stored and (unread := args.weights or args.backbone_weights):
        print(f"{unread}: not read, because a resumed run continues with its own weights and configuration")
    print(f"{train_set.source}: {train_set.summary()}")
    print(f"{val_set.source}: {val_set.summary()}")
    print("\n".join(describe_training(config, options, train_set, val_set)))
    if not launched_rank():
        warnings = size_warnings(config, options, train_set, val_set)
        if not (stored or args.weights or args.backbone_weights):
            warnings.append(RANDOM_START + (RANDOM_PYRAMID if config.architecture in PYRAMIDS else ""))
        for warning in warnings:
            print_warning(warning)
    result = train(model, train_set, val_set, options, run_dir, resume=bool(stored), data_options=where)
    if result.stats is not None:
        print_stats(result.stats)
    best = f"best {options.best_metric} {result.best:.3f} (epoch {result.best_epoch})"
    print(f"{run_dir}: {result.epochs} epoch{'' if result.epochs == 1 else 's'}; {best}")
    if result.best_threshold is not None:
        threshold = f"{result.best_threshold:.3f}"
        print(f"  best.safetensors: score threshold with the best F1 on {val_set.source}: {threshold}")
    return 0


def backbone_weights(args: argparse.Namespace, config: DetectorConfig) -> str | Path | None:
    """Return the file that --backbone-weights names, after downloading it if it is `imagenet`; None without it."""
    from retinanet.checkpoints.imagenet import IMAGENET, imagenet_weights

    return imagenet_weights(config.backbone) if args.backbone_weights == IMAGENET else args.backbone_weights


def _run_folder(args: argparse.Namespace) -> Path:
    """Return the folder that --output or --resume names.

    Raises:
        UsageError: Neither names a folder, both name different ones, the folder cannot be written, or it holds a run
            and --resume is absent, or the reverse.
    """
    from retinanet.training.run_folder import check_presence

    resumed = args.resume if isinstance(args.resume, str) else None
    if resumed is not None and args.output is not None and os.path.abspath(resumed) != os.path.abspath(args.output):
        raise UsageError(f"--resume {resumed}: expected the folder of --output {args.output}, or no --output")
    name = args.output or resumed
    if name is None:
        if args.resume:
            raise UsageError("--resume: expected the folder of the run to continue")
        missing = " and ".join(f"--{name}" for name in ("train", "val", "output") if getattr(args, name) is None)
        raise UsageError(f"{missing}: required, unless --resume continues a run; see retinanet train --help")
    run_dir = Path(name)
    if not launched_rank():
        # The other processes may be later than the first save of the main one, which alone writes there.
        check_presence(run_dir, resume=args.resume is not None)
        check_output_folder(run_dir)
    return run_dir


def _data_options(args: argparse.Namespace, run_dir: Path, stored: dict[str, Any]) -> dict[str, Any]:
    """Return the options that say where the data is: those that were given, else those of the continued run.

    Raises:
        UsageError: --train or --val is missing, or a path of the continued run no longer exists.
    """
    given = data_options(args)
    kept = stored.get("data_options", {})
    for name, path in kept.items():
        if name in DATA_PATHS and name not in given and not Path(path).exists():
            raise UsageError(
                f"{run_dir}: {path}, which this run was started with, no longer exists; "
                f"give its new place with --{name.replace('_', '-')}"
            )
    where = {**kept, **given}
    missing = [name for name in ("train", "val") if name not in where]
    if missing:
        reason = f"; {run_dir} does not say where its data is" if stored else ""
        options = " and ".join(f"--{name}" for name in missing)
        raise UsageError(f"{options}: expected a {DATA_FORMS}{reason}")
    return where


def _stored_run(run_dir: Path) -> dict[str, Any]:
    """Return the content of the run's `config.json`.

    Raises:
        UsageError: The folder holds no run.
        DataError: The file is not the configuration of a run.
    """
    path = run_dir / "config.json"
    if not path.is_file():
        raise UsageError(f"{run_dir}: no run to resume: the folder has no {path.name}")
    content = read_json(path)
    if not isinstance(content, dict) or not {"model", "options"} <= content.keys():
        raise DataError(f"{path}: expected the configuration of a run, a JSON object with `model` and `options`")
    return content

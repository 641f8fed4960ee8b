"""Formats of annotated pictures: a copy is stored like the picture that it shows, in about as many bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, JpegImagePlugin

from retinanet.common.errors import DataError, one_line, printable
from retinanet.common.files import replacing
from retinanet.data.images import open_image


@dataclass(frozen=True)
class PictureFormat:
    """How to store a picture.

    Attributes:
        name: Pillow's name of the format.
        suffix: Suffix of the file.
        options: Options of Pillow's `save`.
    """

    name: str
    suffix: str
    options: Mapping[str, Any] = field(default_factory=dict)


_PNG = PictureFormat("PNG", ".png")
_JPEG = PictureFormat("JPEG", ".jpg", {"quality": 90})
#: Formats that copies are stored in. Pictures of other formats are copied to the second table's format, or to PNG.
_WRITTEN = {
    "PNG": _PNG,
    "JPEG": _JPEG,
    "TIFF": PictureFormat("TIFF", ".tif", {"compression": "tiff_adobe_deflate"}),
    "BMP": PictureFormat("BMP", ".bmp"),
    "WEBP": PictureFormat("WEBP", ".webp", {"quality": 90}),
}
#: Lossy formats, whose pictures would take many times as many bytes in PNG. MPO is the JPEG of some phones.
_LOSSY = dict.fromkeys(("MPO", "JPEG2000", "AVIF", "HEIF"), _JPEG)
#: Longest side in pixels.
_LONGEST = {"JPEG": 65_500, "WEBP": 16_383}


def format_like(path: Path) -> PictureFormat:
    """Return the format in which to store a picture that was made from the one in a file.

    It is that of the file: for JPEG with the same quantisation tables and colour subsampling, and the suffix that the
    file has. A GIF, whose palette has no room for other colours, and a format that is seldom read become PNG; other
    lossy formats become JPEG of quality 90. The colour profile of an RGB picture is kept.

    Raises:
        DataError: The file cannot be opened as an image.
    """
    with open_image(path, max_pixels=None) as image:
        known = _WRITTEN.get(image.format or "") or _LOSSY.get(image.format or "", _PNG)
        same_name = Image.registered_extensions().get(path.suffix.lower()) == known.name
        options = dict(known.options)
        if isinstance(image, JpegImagePlugin.JpegImageFile) and image.quantization:
            options = {"qtables": image.quantization, "subsampling": _subsampling(image)}
        if image.mode in ("RGB", "RGBA") and isinstance(image.info.get("icc_profile"), bytes):
            options["icc_profile"] = image.info["icc_profile"]
        return PictureFormat(known.name, path.suffix if same_name else known.suffix, options)


def save_picture(picture: Image.Image, path: Path, chosen: PictureFormat = _PNG) -> None:
    """Write a picture atomically.

    Raises:
        DataError: Pillow cannot store the picture in this format.
    """
    with replacing(path) as temporary:
        try:
            picture.save(temporary, format=chosen.name, **chosen.options)
        except OSError as error:
            if error.errno is not None:  # A full disk, for example.
                raise
            raise DataError(_refusal(path, chosen, error)) from error
        except (ValueError, MemoryError, OverflowError) as error:
            raise DataError(_refusal(path, chosen, error)) from error


def fitting(chosen: PictureFormat, size: tuple[int, int]) -> PictureFormat:
    """Return the format, or PNG if the format does not take pictures of this size."""
    return _PNG if max(size) > _LONGEST.get(chosen.name, max(size)) else chosen


def _subsampling(image: JpegImagePlugin.JpegImageFile) -> int:
    value = JpegImagePlugin.get_sampling(image)
    return value if value >= 0 else 0  # A grey picture has none, and 0 keeps all colours of the boxes.


def _refusal(path: Path, chosen: PictureFormat, error: Exception) -> str:
    return f"{printable(str(path))}: the annotated copy cannot be stored as {chosen.name} ({one_line(error)})"

"""Reading pictures with Pillow: the EXIF orientation is applied, and every picture becomes 8-bit RGB."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from retinanet.common.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
_ORIENTATION = 0x0112  # EXIF tag.
#: What makes a stored picture upright, by its EXIF orientation.
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: Orientations that exchange width and height.
_TURNED = (5, 6, 7, 8)
_EIGHT_BIT_MODES = (
    "RGB",
    "RGBA",
    "RGBX",
    "L",
    "LA",
    "La",
    "RGBa",
    "P",
    "PA",
    "1",
    "CMYK",
    "YCbCr",
    "HSV",
    "LAB",
)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "expected an image, got a folder"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a format that Pillow reads"
    text = " ".join(str(error).split())
    return f"cannot be decoded as an image ({text or type(error).__name__})"


# Pillow's decoders mostly raise OSError for damaged files, but the other errors occur, too.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    OverflowError,
    Image.DecompressionBombError,
)


def _open(path: Path) -> Image.Image:
    image = Image.open(path)
    if image.mode not in _EIGHT_BIT_MODES:
        image.close()
        raise ValueError(f"expected 8 bits per channel, got pixel mode {image.mode}")
    return image


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of a picture, 1 to 8; 1 if it has none, or one that cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of damaged EXIF blocks.
            value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow's reader of damaged EXIF blocks raises errors of many types.
        return 1
    return value if value in _TRANSPOSITIONS else 1


def upright(image: Image.Image) -> Image.Image:
    """Return the picture with its EXIF orientation applied.

    `PIL.ImageOps.exif_transpose` also writes the EXIF block anew, which fails for blocks that Pillow reads but cannot
    write.
    """
    transposition = _TRANSPOSITIONS.get(exif_orientation(image))
    return image if transposition is None else image.transpose(transposition)


def image_size(path: Path) -> tuple[int, int]:
    """Return height and width of a picture after its EXIF orientation; only the header is read.

    Raises:
        DataError: The file is missing, is not an image, or has more than 8 bits per channel.
    """
    try:
        with _open(path) as image:
            width, height = image.size
            turned = exif_orientation(image) in _TURNED
    except _DECODE_ERRORS as error:
        raise DataError(f"{path}: {_reason(error)}") from error
    return (width, height) if turned else (height, width)


def check_image(path: Path) -> None:
    """Decode a picture and discard the pixels; JPEG is decoded at an eighth of the size, which is cheaper.

    Raises:
        DataError: The file is missing, is not an image, is cut short or damaged, or has more than 8 bits per
            channel.
    """
    try:
        with _open(path) as image:
            image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
    except _DECODE_ERRORS as error:
        raise DataError(f"{path}: {_reason(error)}") from error


def read_image(path: Path | str) -> Tensor:
    """Read a picture as RGB with its EXIF orientation applied.

    Args:
        path: A file in any format that Pillow reads, with 8 bits per channel. Transparency is dropped.

    Returns:
        The picture, uint8 `[3, height, width]`.

    Raises:
        DataError: The file is missing, is not an image, is cut short or damaged, or has more than 8 bits per
            channel.
    """
    try:
        with _open(Path(path)) as image:
            return pil_to_tensor(upright(image).convert("RGB"))
    except _DECODE_ERRORS as error:
        raise DataError(f"{path}: {_reason(error)}") from error

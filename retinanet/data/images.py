"""Reading pictures: Pillow decodes, EXIF orientation is applied, everything becomes 8-bit RGB."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from retinanet.common.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
_ORIENTATION = 0x0112  # the EXIF tag; values 5 to 8 exchange width and height
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
        return "is a folder, expected an image"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, UnidentifiedImageError):
        return "not an image that can be read"
    text = " ".join(str(error).split())
    return f"cannot be decoded as an image ({text or type(error).__name__})"


# Pillow's decoders raise whatever the damaged bytes provoke: OSError mostly, but also these.
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
        raise ValueError(f"pixel mode {image.mode}, expected 8 bits per channel")
    return image


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of a picture after its EXIF orientation, from the header alone.

    Raises:
        DataError: the file is missing or is not an image.
    """
    try:
        with _open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    except _DECODE_ERRORS as error:
        raise DataError(f"{path}: {_reason(error)}") from error
    return (width, height) if turned else (height, width)


def check_image(path: Path) -> None:
    """Decodes a picture and throws the pixels away; JPEG at an eighth of the size, which is cheaper.

    Raises:
        DataError: the file is missing, is not an image, is cut short or damaged.
    """
    try:
        with _open(path) as image:
            image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
    except _DECODE_ERRORS as error:
        raise DataError(f"{path}: {_reason(error)}") from error


def read_image(path: Path | str) -> Tensor:
    """Reads a picture as RGB with its EXIF orientation applied.

    Args:
        path: PNG, JPEG, TIFF or whatever else Pillow reads, 8 bits per channel. Transparency is dropped.

    Returns:
        uint8 tensor `[3, height, width]`.

    Raises:
        DataError: the file is missing, is not an image, is cut short or damaged, or has more than 8 bits per
            channel.
    """
    try:
        with _open(Path(path)) as image:
            upright = ImageOps.exif_transpose(image)
            return pil_to_tensor(upright.convert("RGB"))
    except _DECODE_ERRORS as error:
        raise DataError(f"{path}: {_reason(error)}") from error

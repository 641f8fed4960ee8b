"""Reading images with Pillow: the EXIF orientation is applied, and every image becomes 8-bit RGB."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from retinanet.common.errors import DataError, one_line, printable
from retinanet.common.files import check_readable, unreadable

#: Suffixes, in lower case, of the files that a folder of images is searched for.
IMAGE_SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".tif",
    ".tiff",
    ".bmp",
    ".dib",
    ".webp",
    ".gif",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
    ".tga",
    ".jp2",
    ".j2k",
    ".avif",
    ".mpo",
)
#: Pixels of the largest image that is read whole unless the caller says otherwise; the limit at which Pillow refuses.
MAX_PIXELS = 178_956_970

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
    "RGBa",
    "P",
    "PA",
    "1",
    "CMYK",
    "YCbCr",
    "HSV",
    "LAB",
)
# Pillow warns of damaged EXIF blocks, which count as none. The filter is set once, because `catch_warnings` changes the
# filters of the whole process, which threads that overlap would not restore.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")


class _PillowLimit:
    """Lifts the limit that Pillow sets on pixels, while any thread of this process reads an image.

    The limit is one for the whole process, and knows no exception for images that will be cut into tiles.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.readers = 0
        self.saved: int | None = None

    def __enter__(self) -> None:
        with self.lock:
            if self.readers == 0:
                self.saved, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self.readers += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.readers -= 1
            if self.readers == 0:
                Image.MAX_IMAGE_PIXELS = self.saved


_pillow_limit_lifted = _PillowLimit()


def _reason(error: Exception) -> str:
    if isinstance(error, IsADirectoryError):
        return "expected an image, got a folder"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a format that Pillow reads"
    if isinstance(error, OSError) and error.errno is not None:
        return unreadable(error)
    return f"cannot be decoded as an image ({one_line(error)})"


def _open(path: Path, max_pixels: int | None) -> Image.Image:
    """Open an image and check its mode and size; only the header is read."""
    check_readable(path)
    image = Image.open(path)
    try:
        if image.mode not in _EIGHT_BIT_MODES:
            raise ValueError(f"expected 8 bits per channel, got pixel mode {image.mode}; convert it")
        width, height = image.size
        if min(width, height) < 1:
            raise ValueError(f"it has {width} x {height} pixels")
        if max_pixels is not None and width * height > max_pixels:
            raise _TooLarge(
                f"{width} x {height} pixels are more than {max_pixels:,}; cut the image with `retinanet tile`"
            )
    except Exception:
        image.close()
        raise
    return image


class _TooLarge(ValueError):
    """An image has too many pixels to be read whole."""


@contextmanager
def open_image(path: Path, max_pixels: int | None = MAX_PIXELS) -> Iterator[Image.Image]:
    """Open an image with Pillow, which reads only the header; what the block reads is subject to the same errors.

    Args:
        path: The file.
        max_pixels: As in `image_size`.

    Raises:
        DataError: The file is missing, is not an image, is too large, is damaged, or has more than 8 bits per channel.
    """
    try:
        with _pillow_limit_lifted, _open(path, max_pixels) as image:
            yield image
    except Exception as error:  # Pillow's decoders raise errors of many types for damaged files.
        reason = str(error) if isinstance(error, _TooLarge) else _reason(error)
        raise DataError(f"{printable(str(path))}: {reason}") from error


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of a picture, 1 to 8; 1 if it has none, or one that cannot be read."""
    # The method of PNG decodes the whole picture, to find an eXIf chunk after the pixels; the one of its base does not.
    # Every caller asks before the pixels are decoded, so that such a chunk counts for none of them.
    getexif = Image.Image.getexif if isinstance(image, PngImageFile) else type(image).getexif
    try:
        value = getexif(image).get(_ORIENTATION, 1)
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


def image_size(path: Path, max_pixels: int | None = MAX_PIXELS) -> tuple[int, int]:
    """Return height and width of an image after its EXIF orientation; only the header is read.

    Args:
        path: The file.
        max_pixels: Pixels of the largest image that is accepted; None accepts any.

    Raises:
        DataError: The file is missing, is not an image, is too large, or has more than 8 bits per channel.
    """
    with open_image(path, max_pixels) as image:
        width, height = image.size
        turned = exif_orientation(image) in _TURNED
    return (width, height) if turned else (height, width)


def check_image(path: Path, max_pixels: int | None = MAX_PIXELS) -> None:
    """Decode an image and discard the pixels; JPEG is decoded at an eighth of the size, which is cheaper.

    Args:
        path: The file.
        max_pixels: As in `image_size`.

    Raises:
        DataError: The file is missing, is not an image, is too large, is cut short or damaged, or has more than 8 bits
            per channel.
    """
    with open_image(path, max_pixels) as image:
        image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()


def read_image(path: Path | str, max_pixels: int | None = MAX_PIXELS) -> Tensor:
    """Read an image as RGB with its EXIF orientation applied.

    Args:
        path: A file in any format that Pillow reads, with 8 bits per channel. Transparency is dropped. Of an animation,
            the first picture is taken.
        max_pixels: As in `image_size`.

    Returns:
        The image, uint8 `[3, height, width]`.

    Raises:
        DataError: The file is missing, is not an image, is too large, is cut short or damaged, or has more than 8 bits
            per channel.
    """
    with open_image(Path(path), max_pixels) as image:
        return pil_to_tensor(upright(image).convert("RGB"))

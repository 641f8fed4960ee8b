"""Reading pictures: orientation, pixel modes and damaged files."""

import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from dataset_cases import PHOTO
from PIL import Image, ImageFile, ImageOps
from torchvision.transforms.v2.functional import pil_to_tensor

from retinanet.common.errors import DataError
from retinanet.common.files import read_text
from retinanet.data.images import IMAGE_SUFFIXES, check_image, image_size, read_image


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    picture = Image.open(PHOTO).crop((0, 0, 60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # The camera was turned: the upright picture is 40 wide and 60 high.
    picture.save(tmp_path / "turned.png", exif=exif)
    assert image_size(tmp_path / "turned.png") == (60, 40)
    picture.save(tmp_path / "plain.png")
    assert torch.equal(read_image(tmp_path / "turned.png"), torch.rot90(read_image(tmp_path / "plain.png"), -1, (1, 2)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_are_those_of_pillow(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(PHOTO).crop((0, 0, 6, 4)).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as picture:
        expected = pil_to_tensor(ImageOps.exif_transpose(picture).convert("RGB"))
    assert torch.equal(read_image(tmp_path / "a.png"), expected)
    assert image_size(tmp_path / "a.png") == tuple(expected.shape[1:])


def test_an_exif_block_that_pillow_reads_and_cannot_rewrite(tmp_path: Path) -> None:
    """ResolutionUnit, a short integer, holds text here, which Pillow's writer does not accept."""
    text_as_resolution_unit = struct.pack("<HHI4s", 0x0128, 2, 4, b"abc\0")
    orientation = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + orientation + text_as_resolution_unit + bytes(4)
    picture = Image.open(PHOTO).crop((0, 0, 60, 40))
    picture.save(tmp_path / "a.jpg", exif=block)
    with Image.open(tmp_path / "a.jpg") as opened, pytest.raises((struct.error, TypeError, ValueError)):
        ImageOps.exif_transpose(opened)
    assert read_image(tmp_path / "a.jpg").shape == (3, 60, 40) and image_size(tmp_path / "a.jpg") == (60, 40)


def test_an_exif_block_that_cannot_be_read_counts_as_none(tmp_path: Path) -> None:
    Image.open(PHOTO).crop((0, 0, 60, 40)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0" + b"\xff" * 9)
    assert read_image(tmp_path / "a.jpg").shape == (3, 40, 60) and image_size(tmp_path / "a.jpg") == (40, 60)


def test_the_size_of_a_png_is_read_without_its_pixels(tmp_path: Path, monkeypatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.png", exif=exif)
    Image.new("RGB", (60, 40)).save(tmp_path / "plain.png")
    monkeypatch.delattr(ImageFile.ImageFile, "load")
    assert image_size(tmp_path / "turned.png") == (60, 40) and image_size(tmp_path / "plain.png") == (40, 60)


def test_an_exif_block_after_the_pixels_counts_neither_for_the_size_nor_for_the_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "plain.png")
    data, block = (tmp_path / "plain.png").read_bytes(), b"eXIf" + exif.tobytes()[6:]
    chunk = struct.pack(">I", len(block) - 4) + block + struct.pack(">I", zlib.crc32(block))
    (tmp_path / "late.png").write_bytes(data[:-12] + chunk + data[-12:])
    with Image.open(tmp_path / "late.png") as picture:
        assert picture.getexif()[0x0112] == 6
    assert image_size(tmp_path / "late.png") == (40, 60) == read_image(tmp_path / "late.png").shape[1:]


def test_reading_pictures_leaves_the_filters_of_warnings_alone(tmp_path: Path) -> None:
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0" + b"\xff" * 9)
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(image_size, [tmp_path / "a.jpg"] * 40)) == {(40, 60)}
    assert warnings.filters == before


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    for read in (image_size, check_image, read_image, read_text):
        with pytest.raises(
            DataError, match=r"a\.png: cannot be read \(expected a file, got a pipe, a device or a socket"
        ):
            read(tmp_path / "a.png")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_every_eight_bit_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.open(PHOTO).crop((0, 0, 30, 20)).convert(mode).save(path)
    assert read_image(path).shape == (3, 20, 30)


def test_check_image_notices_a_jpeg_that_is_cut_short(tmp_path: Path) -> None:
    Image.open(PHOTO).save(tmp_path / "a.jpg", quality=95)
    check_image(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(DataError, match=r"a\.jpg: cannot be decoded as an image"):
        check_image(tmp_path / "a.jpg")


def test_deep_images_are_refused_instead_of_clipped(tmp_path: Path) -> None:
    Image.new("I;16", (8, 8), 40000).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png: .*expected 8 bits per channel, got pixel mode I;16"):
        read_image(tmp_path / "deep.png")


def test_an_image_above_the_limit_is_read_only_where_the_caller_allows_it(tmp_path: Path) -> None:
    Image.open(PHOTO).crop((0, 0, 60, 40)).save(tmp_path / "a.png")
    for read in (image_size, check_image, read_image):
        with pytest.raises(DataError, match=r"a\.png: 60 x 40 pixels are more than 2,000; cut the image with"):
            read(tmp_path / "a.png", 2000)
    assert read_image(tmp_path / "a.png", None).shape == (3, 40, 60)


def test_an_image_above_pillows_limit_is_read(tmp_path: Path) -> None:
    Image.new("1", (20_000, 9_000)).save(tmp_path / "wide.tif", compression="group4")
    with pytest.raises(DataError, match=r"20000 x 9000 pixels are more than 178,956,970; cut the image with"):
        image_size(tmp_path / "wide.tif")
    assert image_size(tmp_path / "wide.tif", None) == (9_000, 20_000)
    check_image(tmp_path / "wide.tif", None)


@pytest.mark.parametrize("error", [struct.error, zlib.error, SyntaxError, RecursionError, MemoryError, KeyError])
def test_whatever_a_decoder_raises_is_a_data_error(tmp_path: Path, monkeypatch, error: type[Exception]) -> None:
    Image.open(PHOTO).crop((0, 0, 60, 40)).save(tmp_path / "a.png")

    def fail(*_: object) -> None:
        raise error("reason")

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(DataError, match=r"a\.png: cannot be decoded as an image \('?reason"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "a\0.png", "\ud800.png", "no/such.png", "."])
def test_a_name_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    for read in (image_size, check_image, read_image):
        with pytest.raises(DataError) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_pillow_reads_every_suffix(suffix: str) -> None:
    Image.init()
    assert suffix in Image.EXTENSION

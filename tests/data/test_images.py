"""Reading pictures: orientation, pixel modes and damaged files."""

from pathlib import Path

import pytest
import torch
from dataset_cases import PHOTO
from PIL import Image

from retinanet.common.errors import DataError
from retinanet.data.images import check_image, image_size, read_image


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    picture = Image.open(PHOTO).crop((0, 0, 60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # The camera was turned: the upright picture is 40 wide and 60 high.
    picture.save(tmp_path / "turned.png", exif=exif)
    assert image_size(tmp_path / "turned.png") == (60, 40)
    picture.save(tmp_path / "plain.png")
    assert torch.equal(read_image(tmp_path / "turned.png"), torch.rot90(read_image(tmp_path / "plain.png"), -1, (1, 2)))


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

"""Annotated copies have the format of their picture and about its size in bytes."""

from pathlib import Path

import pytest
from PIL import Image

from retinanet.common.errors import DataError
from retinanet.detection.picture_format import PictureFormat, fitting, format_like, save_picture

PHOTO = Path(__file__).parent.parent / "fixtures" / "OSBS_029.png"


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.open(PHOTO).convert("RGB")


@pytest.mark.parametrize(
    ("name", "written", "suffix"),
    [
        ("a.png", "PNG", ".png"),
        ("a.JPG", "JPEG", ".JPG"),
        ("a.jfif", "JPEG", ".jfif"),
        ("a.tiff", "TIFF", ".tiff"),
        ("a.bmp", "BMP", ".bmp"),
        ("a.webp", "WEBP", ".webp"),
        ("a.gif", "PNG", ".png"),
        ("a.ppm", "PNG", ".png"),
        ("a.jp2", "JPEG", ".jpg"),
        ("a.mpo", "JPEG", ".jpg"),
    ],
)
def test_format_of_the_copy(tmp_path: Path, photo: Image.Image, name: str, written: str, suffix: str) -> None:
    photo.save(tmp_path / name, **({"save_all": True, "append_images": [photo]} if name == "a.mpo" else {}))
    chosen = format_like(tmp_path / name)
    assert (chosen.name, chosen.suffix) == (written, suffix)
    save_picture(photo, tmp_path / f"copy{suffix}", chosen)
    with Image.open(tmp_path / f"copy{suffix}") as copy:
        assert copy.format == written and copy.size == photo.size
        copy.load()


@pytest.mark.parametrize("quality", [30, 75, 95])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_a_jpeg_keeps_its_quality(tmp_path: Path, photo: Image.Image, quality: int, subsampling: int) -> None:
    path = tmp_path / "a.jpg"
    photo.save(path, quality=quality, subsampling=subsampling)
    save_picture(photo, tmp_path / "copy.jpg", format_like(path))
    assert (tmp_path / "copy.jpg").stat().st_size == pytest.approx(path.stat().st_size, rel=0.02)
    with Image.open(path) as original, Image.open(tmp_path / "copy.jpg") as copy:
        assert copy.quantization == original.quantization


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpeg_of_other_colours(tmp_path: Path, photo: Image.Image, mode: str) -> None:
    photo.convert(mode).save(tmp_path / "a.jpg")
    save_picture(photo, tmp_path / "copy.jpg", format_like(tmp_path / "a.jpg"))
    with Image.open(tmp_path / "copy.jpg") as copy:
        assert copy.mode == "RGB" and copy.size == photo.size


def test_the_content_and_not_the_suffix_decides(tmp_path: Path, photo: Image.Image) -> None:
    photo.save(tmp_path / "a.png", format="JPEG")
    assert format_like(tmp_path / "a.png").suffix == ".jpg"


def test_the_colour_profile_is_kept(tmp_path: Path, photo: Image.Image) -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo.save(tmp_path / "a.jpg", icc_profile=profile)
    save_picture(photo, tmp_path / "copy.jpg", format_like(tmp_path / "a.jpg"))
    with Image.open(tmp_path / "copy.jpg") as copy:
        assert copy.info["icc_profile"] == profile


def test_a_picture_that_is_too_large_for_its_format_becomes_png() -> None:
    jpeg = PictureFormat("JPEG", ".jpg")
    assert fitting(jpeg, (65_500, 3)) is jpeg and fitting(jpeg, (3, 65_501)).suffix == ".png"


def test_a_picture_that_cannot_be_stored(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.webp: the annotated copy cannot be stored as WEBP \("):
        save_picture(Image.new("RGB", (16_400, 1)), tmp_path / "a.webp", PictureFormat("WEBP", ".webp"))
    assert not list(tmp_path.iterdir())

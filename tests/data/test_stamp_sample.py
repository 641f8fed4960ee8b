"""The composed sample, on packages that the tests make; the network is not used."""

import hashlib
import inspect
import io
import json
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from package_cases import make_debian_package
from PIL import Image, ImageDraw

from retinanet.cli.main import build_parser, main
from retinanet.common.errors import DataError, UsageError
from retinanet.data import open_dataset, packages
from retinanet.data import stamp_sample as sample

WORDS = ("ant", "bee_red", "bee-green", "cow", "dog", "elk", "fox", "gnu")
EXCLUDED = ("animals/birds/cartoon/x", "animals/birds/crow_mirror", "animals/mammals/hedgehog", "vehicles/flight/747")
SMALL = {"images": (12, 6), "size": 96}


def stamp(number: int) -> bytes:
    """Return a PNG of an ellipse with a transparent margin."""
    picture = Image.new("RGBA", (70, 60))
    ImageDraw.Draw(picture).ellipse((5, 5, 60, 50), fill=(40 * number % 256, 200, 90, 255))
    return encoded(picture, "PNG")


def encoded(picture: Image.Image, form: str) -> bytes:
    content = io.BytesIO()
    picture.save(content, form)
    return content.getvalue()


@pytest.fixture(scope="module")
def made_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of small packages with the published names."""
    folder = tmp_path_factory.mktemp("packages")
    names = [f"{of_class.folders[0]}/{word}" for of_class in sample.CLASSES for word in WORDS]
    stamps = {f"usr/share/tuxpaint/stamps/{name}.png": stamp(k) for k, name in enumerate([*names, *EXCLUDED])}
    stamps["usr/share/doc/tuxpaint-stamps-default/copyright"] = b"License: GPL-2"
    photographs = {
        name: encoded(Image.linear_gradient("L").convert("RGB"), "JPEG" if name.endswith(".jpg") else "PNG")
        for part in sample.PARTS
        for name in sample.PHOTOGRAPHS[part]
    }
    make_debian_package(folder / sample.STAMPS.file_name, stamps)
    nature = {name: content for name, content in photographs.items() if name.startswith("usr/")}
    make_debian_package(
        folder / sample.BACKGROUNDS.file_name, nature | {"usr/share/doc/mate-backgrounds/copyright": b"GPL-2+"}
    )
    with zipfile.ZipFile(folder / sample.AERIAL.file_name, "w") as wheel:
        for name in photographs.keys() - nature.keys():
            wheel.writestr(name, photographs[name])
        for name in ("LICENSE", "AUTHORS.md"):
            wheel.writestr(f"deepforest-2.1.0.dist-info/licenses/{name}", "MIT License")
    return folder


@pytest.fixture
def folder(made_packages: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of packages, whose checksums replace the published ones; downloads are refused."""
    for name in ("STAMPS", "BACKGROUNDS", "AERIAL"):
        package = getattr(sample, name)
        digest = hashlib.sha256((made_packages / package.file_name).read_bytes()).hexdigest()
        monkeypatch.setattr(sample, name, type(package)(**{**vars(package), "sha256": digest}))

    def no_network(*_args: object, **_options: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(packages, "subprocess", SimpleNamespace(run=no_network))
    return made_packages


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_sample_is_composed_from_the_packages(folder: Path, tmp_path: Path) -> None:
    stamps = sample.fetch_stamps(tmp_path / "stamps", folder, **SMALL)
    assert not stamps.cached
    shown, backgrounds = {}, {}
    for part, path, count in (("train", stamps.train, 12), ("val", stamps.val, 6)):
        data = open_dataset(path, strict=True)
        assert "(composed images" in data.summary()
        assert len(data) == count and data.sizes == [(96, 96)] * count
        assert data.class_names == tuple(of_class.name for of_class in sample.CLASSES)
        content = json.loads(path.read_text())
        shown[part] = {entry["stamp"] for entry in content["annotations"]}
        backgrounds[part] = {entry["background"] for entry in content["images"]}
        for entry in content["annotations"]:
            of_class = sample.CLASSES[entry["category_id"] - 1]
            assert of_class.has(entry["stamp"]) and entry["area"] <= entry["bbox"][2] * entry["bbox"][3]
        assert backgrounds[part] <= set(sample.PHOTOGRAPHS[part])
        assert {Path(entry["file_name"]).suffix for entry in content["images"]} == {".jpg"}
    assert shown["train"] and shown["val"] and not shown["train"] & shown["val"]
    assert not {f"{name}.png" for name in EXCLUDED} & (shown["train"] | shown["val"])
    assert not backgrounds["train"] & backgrounds["val"]
    text = (stamps.root / "ATTRIBUTION.md").read_text()
    assert "composed" in text and "GPL, version 2" in text and "{" not in text
    for name in ("LICENSE.stamps", "LICENSE.backgrounds"):
        assert "GPL-2" in (stamps.root / name).read_text()
    listed = json.loads((stamps.root / "sample.json").read_text())["sha256"]
    assert contents(stamps.root).keys() == set(listed) | {"sample.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["stamps"]


def test_the_same_options_give_the_same_files(folder: Path, tmp_path: Path) -> None:
    first = contents(sample.fetch_stamps(tmp_path / "a", folder, **SMALL).root)
    assert contents(sample.fetch_stamps(tmp_path / "b", folder, **SMALL).root) == first
    more = contents(sample.fetch_stamps(tmp_path / "c", folder, images=(13, 7), size=96).root)
    images = {name for name in first if name.endswith(".jpg")}
    assert len(images) == 18 and all(more[name] == first[name] for name in images)
    other = contents(sample.fetch_stamps(tmp_path / "d", folder, **SMALL, seed=1).root)
    assert all(other[name] != first[name] for name in images)


def test_a_second_run_verifies_and_composes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", "stamps", str(tmp_path / "stamps"), "--images", "3", "2", "--size", "96"]
    assert main([*command, "--packages", str(folder)]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/stamps: composed\n")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "stamps").rglob("*")}
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "already there, all files verified" in out and f"{tmp_path}/stamps/train.json: 3 images, " in out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "stamps").rglob("*")}


@pytest.mark.parametrize("change", ["file", "missing", "seed", "size", "images"])
def test_a_damaged_sample_or_one_of_other_options_is_replaced(folder: Path, tmp_path: Path, change: str) -> None:
    options: dict = {"images": (3, 2), "size": 96, "seed": 0}
    stamps = sample.fetch_stamps(tmp_path / "stamps", folder, **options)
    before = contents(stamps.root)
    if change == "file":
        (stamps.root / "images/val/000001.jpg").write_bytes(b"")
    elif change == "missing":
        stamps.val.unlink()
    else:
        options[change] = {"seed": 1, "size": 97, "images": (2, 2)}[change]
    again = sample.fetch_stamps(tmp_path / "stamps", folder, **options)
    assert not again.cached and len(open_dataset(again.train)) == options["images"][0]
    assert (contents(again.root) == before) == (change in ("file", "missing"))


def test_a_folder_with_other_files_is_kept(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match=r"thesis\.txt: not part of the sample; choose a new or empty folder$"):
        sample.fetch_stamps(tmp_path, folder, **SMALL)
    assert contents(tmp_path) == {"thesis.txt": b"precious"}


def test_the_folder_of_another_sample_is_kept(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("{}")
    manifest = {"sample": "trees", "recipe": [], "sha256": {"train.json": "0"}}
    (tmp_path / "sample.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=r"train\.json: not part of the sample"):
        sample.fetch_stamps(tmp_path, folder, **SMALL)


def test_a_missing_package_names_its_sources(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["sample", "stamps", str(tmp_path / "x"), "--packages", str(tmp_path / "empty")]) == 3
    stamps, backgrounds = sample.STAMPS.file_name, sample.BACKGROUNDS.file_name
    pool = "https://deb.debian.org/debian/pool/main"
    assert capsys.readouterr().err == (
        f"retinanet: error: {tmp_path}/empty/{stamps}: no such file; on a machine with a network, fetch into a folder:"
        f" {stamps} (`apt-get download tuxpaint-stamps-default=2022.06.04-1` or {pool}/t/tuxpaint-stamps/{stamps}),"
        f" {backgrounds} (`apt-get download mate-backgrounds=1.26.0-1` or {pool}/m/mate-backgrounds/{backgrounds}),"
        " deepforest-2.1.0-py3-none-any.whl (`python -m pip download --no-deps --only-binary=:all: deepforest==2.1.0`);"
        " copy the folder to this machine, and run the same command with --packages FOLDER\n"
    )
    assert not (tmp_path / "x").exists()


def test_a_package_that_is_not_the_published_one(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "STAMPS", type(sample.STAMPS)("a=1", sample.STAMPS.file_name, "0" * 64, "pool"))
    with pytest.raises(
        DataError, match=r"_all\.deb: not the published file: expected SHA-256 0{64}, got [0-9a-f]{64}$"
    ):
        sample.fetch_stamps(tmp_path / "x", folder, **SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ("unknown", "E: Version '2022.06.04-1' for 'tuxpaint-stamps-default' was not found"),
        ("no apt-get", "apt-get: No such file or directory"),
    ],
)
def test_a_failed_download_says_why(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str, reason: str
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if command[0] != "apt-get":
            return subprocess.CompletedProcess(command, 0, "", "")
        if failure == "no apt-get":
            raise FileNotFoundError(2, "No such file or directory", "apt-get")
        return subprocess.CompletedProcess(command, 100, "", f"W: no sandbox\n{reason}\n")

    monkeypatch.setattr(packages, "subprocess", SimpleNamespace(run=run))
    with pytest.raises(DataError) as caught:
        sample.fetch_stamps(tmp_path / "x", **SMALL)
    assert f"x: the sample cannot be downloaded ({reason}); on a machine with a network, " in str(caught.value)
    requirements = ["tuxpaint-stamps-default=2022.06.04-1", "mate-backgrounds=1.26.0-1"]
    assert commands[0][-1] == "deepforest==2.1.0" and commands[1][-3:] == ["download", *requirements]
    assert not list(tmp_path.iterdir())


def test_downloaded_packages_are_used(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], cwd: Path, **_options: object) -> subprocess.CompletedProcess[str]:
        suffix = ".deb" if command[0] == "apt-get" else ".whl"
        for path in folder.glob(f"*{suffix}"):
            (cwd / path.name).write_bytes(path.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages, "subprocess", SimpleNamespace(run=run))
    assert len(open_dataset(sample.fetch_stamps(tmp_path / "x", images=(2, 1), size=96).train)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": (0, 5)}, r"images: expected two numbers of at least 1, got \[0, 5\]"),
        ({"images": (5,)}, r"images: expected two numbers of at least 1, got \[5\]"),
        ({"size": 95}, "size: expected at least 96 pixels, got 95"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}$"):
        sample.fetch_stamps(tmp_path / "x", **options)


def test_the_defaults_of_the_command_are_those_of_the_function() -> None:
    args = build_parser().parse_args(["sample", "stamps", "x"])
    parameters = inspect.signature(sample.fetch_stamps).parameters
    assert tuple(args.images) == parameters["images"].default
    for name in ("packages", "size", "seed"):
        assert getattr(args, name) == parameters[name].default


def test_an_interrupted_run_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "write_json", interrupted)
    assert main(["sample", "stamps", str(tmp_path / "x"), "--packages", str(folder), "--images", "1", "1"]) == 130
    assert not list(tmp_path.iterdir())


def test_the_split_keeps_similar_names_together() -> None:
    words = ("ant", "cow", "dog", "elk", "fox", "gnu", "hen", "owl", "pig", "rat")
    names = [name for word in words for name in (f"a/{word}_red.png", f"b/{word.title()}-2.png")]
    train, val = sample.split_stamps(names)
    assert sorted(train + val) == sorted(names) and len(val) == 6 == round(sample.VAL_SHARE * len(names))
    of_val = {word for word in words if any(word in name.lower() for name in val)}
    assert len(of_val) == 3 and not any(word in name.lower() for name in train for word in of_val)
    assert sample.split_stamps(reversed(names)) == (train, val), "the order of the names does not matter"


def test_what_belongs_to_a_class() -> None:
    def classes(name: str) -> list[str]:
        return [of_class.name for of_class in sample.CLASSES if of_class.has(name)]

    assert classes("animals/birds/crow.png") == ["bird"]
    assert classes("vehicles/auto/sedan.png") == classes("military/vehicles/bradley.png") == ["vehicle"]
    assert classes("symbols/money/us/coins/001penny.png") == ["coin"]
    for name in ("animals/birds/cartoon/crow.png", "town/roadsigns/xing_school_mirror.png", "animals/birds/crow.txt"):
        assert classes(name) == []
    for name in ("vehicles/emergency/sedan_police.png", "vehicles/ship/chineseJunk.png", "animals/birdsong/x.png"):
        assert classes(name) == []


def test_the_published_names_are_the_ones_in_the_code() -> None:
    """Guard against an accidental edit."""
    for package in (sample.STAMPS, sample.BACKGROUNDS):
        name, version = package.requirement.split("=")
        assert package.file_name == f"{name}_{version}_all.deb" and len(bytes.fromhex(package.sha256)) == 32
    assert not set(sample.PHOTOGRAPHS["train"]) & set(sample.PHOTOGRAPHS["val"])

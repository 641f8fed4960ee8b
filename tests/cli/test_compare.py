"""The command `retinanet compare`: recipes, runs with several seeds, the page, and the errors of what does not fit."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli_cases import data, one_error, run
from PIL import Image

from retinanet import load_model
from retinanet.cli import compare as command
from retinanet.cli.contender import common_options, contenders_of
from retinanet.cli.main import build_parser
from retinanet.comparison import timing
from retinanet.comparison.recipes import shipped_recipes
from retinanet.comparison.results import ModelResult, Run, conclusions, table
from retinanet.comparison.timing import Times
from retinanet.data import open_dataset
from retinanet.detection.coco_numbers import STAT_NAMES
from retinanet.detection.score_curves import Counts
from retinanet.training.run_folder import LAST_NAME, METRICS_NAME, STATE_NAME

__all__ = ["data"]

SSD = """
title = "SSD | focal"
model = "ssdlite320"
cls-loss = "focal"
epochs = 2
batch-size = 3
optimizer = "adamw"
"""
RETINANET = """
backbone = "mobilenet_v2"
fpn-levels = [4, 5]
fpn-channels = 8
head-depth = 0
min-size = 0
anchor-sizes = [[16, 24], [32, 40]]
aspect-ratios = [1]
epochs = 2
batch-size = 3
quarter-turns = true
"""


def write(folder: Path, **recipes: str) -> list[Path]:
    for name, text in recipes.items():
        (folder / f"{name}.toml").write_text(text)
    return [folder / f"{name}.toml" for name in recipes]


def compare(data: Path, output: Path, *more: object) -> int:
    places = ["--train", data, "--val", data, "--output", output]
    return run("compare", *places, "--device", "cpu", "--threads", 1, *more)


@pytest.fixture(scope="module", autouse=True)
def short_measurements() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "_ROUNDS", 1)
        patch.setattr(command, "_MEASURED_IMAGES", 2)
        yield


@pytest.fixture(scope="module")
def compared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    assert compare(data, folder / "out", *write(folder, ssd=SSD, retinanet=RETINANET), "--seeds", 3, 5) == 0
    return folder


def test_every_model_is_trained_with_every_seed(compared: Path) -> None:
    models = {path: load_model(compared / "out" / "runs" / path / LAST_NAME) for path in runs()}
    assert {path: model.config.architecture for path, model in models.items()} == {
        path: path.split("/")[0] for path in runs()
    }
    assert models["retinanet/seed_3"].config.anchor_sizes == ((16.0, 24.0), (32.0, 40.0))
    for name in ("ssd", "retinanet"):
        one, other = (models[f"{name}/seed_{seed}"].state_dict() for seed in (3, 5))
        assert not all(torch.equal(one[key], other[key]) for key in one)
    options = json.loads((compared / "out/runs/retinanet/seed_5/config.json").read_text())["options"]
    assert options["seed"] == 5 and options["transform"]["quarter_turns"]


def runs() -> list[str]:
    return [f"{name}/seed_{seed}" for name in ("ssd", "retinanet") for seed in (3, 5)]


def test_page_and_numbers(compared: Path, data: Path, tmp_path: Path) -> None:
    content = json.loads((compared / "out/comparison.json").read_text())
    assert (content["seeds"], content["epochs"], content["batch_size"], content["steps"]) == ([3, 5], 2, 3, 4)
    page = (compared / "out/comparison.md").read_text()
    assert page.startswith("# SSD | focal and retinanet\n")
    assert r"| | SSD \| focal | retinanet |" in page
    for model in content["models"]:
        path = compared / "out" / "runs" / model["name"] / "seed_3" / LAST_NAME
        assert model["parameters"] == sum(p.numel() for p in load_model(path).parameters())
        assert all(0 < model["times"][name] for name in ("detection_seconds", "step_seconds"))
        assert all(0 < model["times"][name] < 1 for name in ("post_processing_share", "loss_share"))
        # The command `evaluate` finds the same numbers.
        assert (
            run("evaluate", path, data, "--output", tmp_path / "numbers.json", "--device", "cpu", "--threads", 1) == 0
        )
        numbers = json.loads((tmp_path / "numbers.json").read_text())
        assert model["runs"][0]["stats"] == numbers["stats"]
        best = next(
            p
            for p in numbers["operating_points"]
            if p["chosen_by"] in ("best F1 on this data set", "no detection is correct")
        )
        assert model["runs"][0]["best_f1"]["f1"] == best["f1"]
        metrics = compared / "out" / "runs" / model["name"] / "seed_5" / METRICS_NAME
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        # Four steps are too few for lines of steps.
        assert model["runs"][1]["losses"] == [[line["step"], line["loss"]] for line in lines]
        assert model["runs"][1]["evaluations"] == [[line["step"], line["AP50"]] for line in lines]
        assert [line["step"] for line in lines] == [2, 4]
    options = page[page.index("| option |") : page.index("All other options")]
    assert "| `cls-loss` | focal | default |" in options and "| `anchor-sizes` | default | 16,24 32,40 |" in options
    assert "epochs" not in options
    places = re.findall(r"\]\((\S+)\)", page)
    assert places == ["curves.svg", *(f"pictures/{n}.jpg" for n in (1, 2, 3, 4))]
    assert (compared / "out/curves.svg").read_text().count("<path") > 20
    picture = Image.open(compared / "out/pictures/1.jpg")
    assert picture.width == 3 * 360 + 2 * 12


def test_repeated_command_continues_and_repeats_nothing(
    compared: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = compared / "out/runs/ssd"
    before = (folder / "seed_3" / STATE_NAME).stat().st_mtime_ns, (folder / "seed_5" / LAST_NAME).read_bytes()
    for path in (folder / "seed_5").iterdir():
        path.unlink()
    recipes = [compared / "ssd.toml", compared / "retinanet.toml"]
    assert compare(data, compared / "out", *recipes, "--seeds", 3, 5) == 0
    assert ((folder / "seed_3" / STATE_NAME).stat().st_mtime_ns, (folder / "seed_5" / LAST_NAME).read_bytes()) == before
    assert compare(data, compared / "out", *recipes, "--seeds", 3, 5, "--epochs", 3) == 2
    assert "cannot resume" in one_error(capsys)


def test_printed_commands_train_the_same_model(compared: Path, tmp_path: Path) -> None:
    content = json.loads((compared / "out/comparison.json").read_text())
    words = shlex.split(content["models"][1]["command"])
    assert words[:2] == ["retinanet", "train"]
    words[words.index("--output") + 1] = str(tmp_path / "again")
    assert run(*words[1:], "--device", "cpu", "--threads", 1) == 0
    expected = (compared / "out/runs/retinanet/seed_3" / LAST_NAME).read_bytes()
    assert (tmp_path / "again" / LAST_NAME).read_bytes() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("epochs = 3", "{b}: epochs: expected 2, as in {a}, got 3; a comparison gives every model the same number"),
        ("seed = 1", "{b}: seed: expected an option of `retinanet train` that a recipe may have"),
        ("lerning-rate = 1", "{b}: lerning-rate: expected an option of `retinanet train` that a recipe may have"),
        ("momentum = {x = 1}", "{b}: momentum: expected"),
        ("lr = {x = 1}", "{b}: lr: expected text, a number, true, false or a list, got {{'x': 1}}"),
        ("lr = -1", "{b}: lr: expected a number above 0, got '-1'"),
        ("optimizer = 'adam'", "{b}: --optimizer: expected one of sgd, adamw, got 'adam'"),
        ("cls-loss = 'focal'", "{b}: --cls-loss: does not apply to --model retinanet"),
        ("weights = 'none.safetensors'", "{folder}/none.safetensors: no such file"),
        ("title = 3", "{b}: title: expected text, got 3"),
        ("lr = ", "{b}: not valid TOML"),
    ],
)
def test_errors_name_the_recipe(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    key = change.partition(" ")[0]
    other = "\n".join(line for line in RETINANET.splitlines() if not line.startswith(f"{key} ="))
    a, b = write(tmp_path, a=SSD, b=f"{change}\n{other}")
    assert compare(data, tmp_path / "out", a, b) in (2, 3)
    assert one_error(capsys).startswith(message.format(a=a, b=b, folder=tmp_path))
    assert not (tmp_path / "out").exists()


def test_errors_of_the_list_of_recipes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [a] = write(tmp_path, a=SSD)
    (tmp_path / "other").mkdir()
    [same] = write(tmp_path / "other", a=SSD)
    for recipes, message in (
        ([a], "RECIPE: expected at least two recipes to compare, got 1"),
        ([a, same], f"{same}: its runs would have the same folder as those of {a}; rename a file"),
        ([a, "none"], "none: no such file; expected a TOML file, or one of "),
    ):
        assert compare(data, tmp_path / "out", *recipes) in (2, 3)
        assert one_error(capsys).startswith(message)
    assert run("compare", a, same, "--output", tmp_path / "out", "--train", data) == 2
    assert one_error(capsys) == "--val: required; see retinanet compare --help"


def test_shipped_recipes_of_a_data_set_can_be_compared(data: Path) -> None:
    train_set = open_dataset(data)
    names = sorted(shipped_recipes())
    groups = {name.partition("_")[0]: [] for name in names}
    for name in names:
        groups[name.partition("_")[0]].append(name)
    assert all(len(group) >= 2 for group in groups.values())
    for group in groups.values():
        words = [*group, "--train", str(data), "--val", str(data), "--output", "out", "--batch-size", "2"]
        args = build_parser().parse_args(["compare", *words])
        options = common_options(contenders_of(args), train_set)
        assert options.batch_size == 2 and options.epochs > 1


def test_conclusions_say_what_the_seeds_show() -> None:
    def model(title: str, *values: float) -> ModelResult:
        runs = [Run(n, dict.fromkeys(STAT_NAMES, v), Counts(0.5, 1, 1, 1), [], []) for n, v in enumerate(values)]
        return ModelResult(title, title, "", 10, Times(1, 0.1, 1, 0.1), runs)

    better, worse, mixed = model("A", 0.5, 0.6, 0.7), model("B", 0.4, 0.4, 0.5), model("C", 0.6, 0.5, 0.7)
    assert conclusions([worse, better])[0] == "AP: *A* is above *B* with each of 3 seeds, by 0.100 to 0.200."
    assert conclusions([better, worse]) == conclusions([worse, better])
    assert "is -0.100 to +0.100 in 3 seeds. The sign depends on the seed" in conclusions([better, mixed])[0]
    assert "is +0.100. A single seed does not show" in conclusions([model("A", 0.5), model("B", 0.4)])[0]
    assert conclusions([model("A", -1), model("B", -1)]) == []
    rows = {row.label: row.cells for row in table([better, model("D", -1, -1, -1)])}
    assert rows["AP50"] == ["0.600 (0.500 to 0.700)", "undefined"]
    assert rows["F1 at the best threshold"] == ["0.500 (0.500 to 0.500)"] * 2

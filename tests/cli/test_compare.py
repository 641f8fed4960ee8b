"""The command `retinanet compare`: recipes, runs with several seeds, the page, and the errors of what does not fit."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_cases import data, one_error, run
from PIL import Image

from retinanet import load_model
from retinanet.cli.main import build_parser
from retinanet.cli.prepared_recipe import PreparedRecipe, common_options, differences, prepare_recipes
from retinanet.common.errors import UsageError
from retinanet.comparison import timing
from retinanet.comparison.recipes import shipped_recipes
from retinanet.comparison.results import ModelResult, Run, conclusions, table
from retinanet.comparison.timing import Times, measure_in_turns
from retinanet.data import open_dataset
from retinanet.detection.coco_numbers import STAT_NAMES
from retinanet.detection.score_curves import Counts
from retinanet.model.architectures import build_model
from retinanet.model.detector_config import config_from_dict
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
    assert page.startswith("# SSD \\| focal, retinanet\n")
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
        if best["chosen_by"] == "best F1 on this data set":
            assert model["runs"][0]["best_f1"]["f1"] == best["f1"]
        else:
            assert model["runs"][0]["best_f1"] is None
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
    capsys.readouterr()


def test_runs_with_other_options_are_not_continued(
    compared: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = compared / "out/runs"
    changed = write(tmp_path, ssd=SSD, retinanet=RETINANET.replace("quarter-turns = true\n", ""))
    remedy = "choose another --output, or remove that folder"
    assert compare(data, compared / "out", *changed) == 2
    assert one_error(capsys) == (
        f"{changed[1]}: quarter-turns: the runs in {folder}/retinanet had true, now the recipe has default; {remedy}"
    )
    assert compare(data, compared / "out", compared / "ssd.toml", compared / "retinanet.toml", "--epochs", 3) == 2
    assert one_error(capsys) == (
        f"{compared / 'ssd.toml'}: epochs: the runs in {folder / 'ssd'} had 2, now the recipe has 3; {remedy}"
    )


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
        ("weights = 'a'\nbackbone-weights = 'b'", "{b}: backbone-weights: not allowed with argument --weights"),
        ("quarter-turns = 'yes'", "{b}: quarter-turns: expected true or false, got 'yes'"),
        ("lr = false", "{b}: lr: expected a value, got False"),
        ("lr = [1, 2]", "{b}: lr: expected a value, got [1, 2]"),
        ("fpn-levels = []", "{b}: fpn-levels: expected one or more values, got []"),
        ("fpn-levels = ['4', '--seed', '9']", "{b}: fpn-levels: expected values, got ['4', '--seed', '9']"),
        ("backbone-weights = 'none.pth'", "{folder}/none.pth: no such file"),
        ("seed = 1", "{b}: seed: expected an option of `retinanet train` that a recipe may have"),
        ("lerning-rate = 1", "{b}: lerning-rate: expected an option of `retinanet train` that a recipe may have"),
        ("momentum = {x = 1}", "{b}: momentum: expected"),
        ("lr = {x = 1}", "{b}: lr: expected text, a number, true, false or a list, got {{'x': 1}}"),
        ("lr = -1", "{b}: lr: expected a number above 0, got '-1'"),
        ("optimizer = 'adam'", "{b}: --optimizer: expected one of sgd, adamw, got 'adam'"),
        ("cls-loss = 'focal'", "{b}: --cls-loss: does not apply to --model retinanet"),
        ("weights = 'none.safetensors'", "{folder}/none.safetensors: no such file"),
        ("title = 3", "{b}: title: expected one line of text, got 3"),
        (r'title = "a\nb"', r"{b}: title: expected one line of text, got 'a\nb'"),
        ("title = 'SSD | focal'", "{b}: title: 'SSD | focal' is that of {a}, too; change one"),
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
        for prepared in prepared_of(data, "out", *group):
            options = prepared.check(train_set, train_set)
            assert options.epochs > 1


def prepared_of(data: Path, output: object, *words: object) -> list[PreparedRecipe]:
    arguments = ["compare", *words, "--train", data, "--val", data, "--output", output]
    return prepare_recipes(build_parser().parse_args([str(word) for word in arguments]))


def test_options_of_the_command_line_override_those_of_recipes(data: Path, tmp_path: Path) -> None:
    recipes = write(tmp_path, a=f"{SSD}backbone-weights = 'imagenet'", b=RETINANET.replace("epochs = 2", "epochs = 7"))
    prepared = prepared_of(data, tmp_path, *recipes, "--epochs", 5, "--backbone-weights", "weights.pth", "--workers", 1)
    assert [p.arguments(0).epochs for p in prepared] == [5, 5]
    assert [p.arguments(0).backbone_weights for p in prepared] == ["imagenet", "weights.pth"]
    assert [p.arguments(0).workers for p in prepared] == [1, 1]
    shown = dict(differences(prepared))
    assert shown["backbone-weights"] == ["imagenet", "weights.pth"] and "epochs" not in shown
    words = shlex.split(prepared[1].command(4))
    assert {"--epochs=5", "--backbone-weights=weights.pth"} <= set(words)
    assert words[-4:] == ["--seed", "4", "--output", str(tmp_path / "runs/b/seed_4")]
    [a, b] = write(tmp_path, a=SSD, b=RETINANET.replace("epochs = 2", "epochs = 3"))
    with pytest.raises(UsageError, match=r"b.toml: epochs: expected 2, as in .*a.toml, got 3"):
        common_options(prepared_of(data, tmp_path, a, b), open_dataset(data), open_dataset(data))


def test_data_options_are_part_of_the_printed_commands(data: Path, tmp_path: Path) -> None:
    recipes = write(tmp_path, a=SSD, b=RETINANET)
    more = ["--images", "my photos", "--strict", "--csv-columns", "path,x1,y1,x2,y2,class"]
    words = shlex.split(prepared_of(data, tmp_path, *recipes, *more)[0].command(0))
    for i, word in enumerate(more[:2]):
        assert words[words.index("--images") + i] == word
    assert "--strict" in words and words[words.index("--csv-columns") + 1] == "path,x1,y1,x2,y2,class"


def test_a_path_counts_from_the_folder_of_the_recipe(data: Path, tmp_path: Path) -> None:
    [a, b] = write(tmp_path, a=f"{SSD}weights = 'model.safetensors'", b=f"{RETINANET}class-weights = 'auto'")
    first, second = prepared_of(data, tmp_path, a, b)
    assert first.arguments(0).weights == str(tmp_path / "model.safetensors")
    assert second.arguments(0).class_weights_from == "auto"


def test_several_processes_are_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["compare", "a.toml", "b.toml", "--train", str(data), "--val", str(data), "--output", str(tmp_path / "out")]
    args = build_parser().parse_args(words)
    with pytest.raises(UsageError, match="compare: expected a single process, got several"):
        args.run(args)


@pytest.mark.parametrize(
    ("architecture", "dtype", "options"),
    [
        ("fcos", torch.bfloat16, {"fpn_levels": (4, 5)}),
        ("fasterrcnn", None, {"proposals": 20, "proposals_training": 20, "representation_size": 16}),
    ],
)
def test_durations_of_other_detectors(architecture: str, dtype: torch.dtype | None, options: dict[str, object]) -> None:
    common = {"class_names": ("a",), "backbone": "resnet18", "fpn_channels": 32, "min_size": None}
    model = build_model(config_from_dict({**common, **options}, architecture))
    image, target = torch.rand(3, 64, 64), {"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([0])}
    [times] = measure_in_turns([model], [dtype], [image, image], [target, target])
    assert times.detection_seconds > 0 and times.step_seconds > 0
    shares = (times.post_processing_share, times.loss_share)
    if architecture == "fcos":
        assert all(share is not None and 0 < share < 1 for share in shares)
    else:
        assert shares == (None, None)


def test_conclusions_say_what_the_seeds_show() -> None:
    def model(title: str, *values: float) -> ModelResult:
        runs = [Run(n, dict.fromkeys(STAT_NAMES, v), Counts(0.5, 1, 1, 1), [], []) for n, v in enumerate(values)]
        return ModelResult(title, title, "", 10, Times(1, 0.1, 1, 0.1), runs)

    better, worse, mixed = model("A", 0.5, 0.6, 0.7), model("B", 0.4, 0.4, 0.5), model("C", 0.6, 0.5, 0.7)
    assert conclusions([worse, better])[0] == "AP: “A” is above “B” with each of 3 seeds, by 0.100 to 0.200."
    assert conclusions([better, worse]) == conclusions([worse, better])
    assert "is -0.100 to +0.100 in 3 seeds. Not all seeds agree" in conclusions([better, mixed])[0]
    assert "is +0.100. A single seed does not show" in conclusions([model("A", 0.5), model("B", 0.4)])[0]
    assert conclusions([model("A", -1), model("B", -1)]) == []
    equal = conclusions([model("A", 0, 0.1), model("B", 0, 0.1002)])[0]
    assert equal == "AP: “A” and “B” are equal with each of 2 seeds, to three digits."
    assert "Not all seeds agree" in conclusions([model("A", 0.2, 0.1), model("B", 0.1, 0.1)])[0]
    rows = {row.label: row.cells for row in table([better, model("D", -1, -1, -1)])}
    assert rows["AP50"] == ["0.600 (0.500 to 0.700)", "undefined"]
    assert rows["F1 at the best threshold"] == ["0.500 (0.500 to 0.500)"] * 2
    lost = replace(better, runs=[replace(better.runs[0], counts=None), *better.runs[1:]])
    rows = {row.label: row.cells for row in table([lost, better])}
    assert rows["precision at the best threshold"][0] == "0.500 (0.500 to 0.500), undefined for 1 of 3 seeds"

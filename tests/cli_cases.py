"""A tiny data set, an untrained model and a recipe that the tests of the command line share."""

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from retinanet import RetinaNet, RetinaNetConfig, save_model
from retinanet.cli.main import main

ROOT = Path(__file__).parent.parent
MODEL_OPTIONS = "--backbone mobilenet_v2 --fpn-levels 4 5 --fpn-channels 8 --head-depth 0 --min-size 0".split()
MODEL_OPTIONS += "--anchor-sizes 16 32 --aspect-ratios 1".split()
RECIPE = "--batch-size 2 --optimizer adamw --device cpu --threads 1".split()
SUBPROCESS = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def make_data(folder: Path, count: int = 6, names: tuple[str, ...] = ("square",)) -> Path:
    """Write images of a bright square on a dark ground, and return the path of their COCO json.

    The category ids are not contiguous.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(count)
    content: dict = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 5 * k + 2, "name": n} for k, n in enumerate(names)],
    }
    for number in range(1, count + 1):
        image = Image.new("RGB", (64, 48), (20, 30, 20))
        x, y = torch.randint(0, 24, (2,), generator=generator).tolist()
        image.paste((220, 220, 60), (x, y, x + 16, y + 16))
        image.save(folder / f"{number}.png")
        content["images"].append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 48})
        content["annotations"].append({"id": number, "image_id": number, "category_id": 2, "bbox": [x, y, 16, 16]})
    (folder / "ann.json").write_text(json.dumps(content))
    return folder / "ann.json"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of an untrained model, which detects many boxes."""
    torch.manual_seed(0)
    config = RetinaNetConfig(
        class_names=("square",),
        category_ids=(2,),
        backbone="mobilenet_v2",
        backbone_norm="batch",
        fpn_levels=(4, 5),
        fpn_channels=8,
        head_depth=0,
        anchor_sizes=((16,), (32,)),
        aspect_ratios=(1.0,),
        min_size=None,
        prior_probability=0.5,
    )
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(path, RetinaNet(config))
    return path


def run(*arguments: object) -> int:
    """Run a command and return its exit code."""
    return main([str(argument) for argument in arguments])


def train_arguments(data: Path, output: Path, *more: object) -> list[str]:
    """Return the arguments of a short training of a small model."""
    command = ["train", "--train", data, "--val", data, "--output", output, *MODEL_OPTIONS, *RECIPE, *more]
    return [str(argument) for argument in command]


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the only error that a command has printed."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("retinanet: error: ")]
    assert len(lines) == 1, lines
    return lines[0].removeprefix("retinanet: error: ")

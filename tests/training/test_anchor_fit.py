"""Anchors fitted to a data set: the clusters, their recall, and their way into a model file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from retinanet.checkpoints.model_file import load_model, save_model
from retinanet.cli.main import build_parser, main
from retinanet.cli.train_config import build_config
from retinanet.common.errors import DataError
from retinanet.data import open_dataset
from retinanet.model.anchors import base_anchors
from retinanet.model.config import RetinaNetConfig
from retinanet.model.faster_rcnn_config import FasterRCNNConfig
from retinanet.model.network import RetinaNet
from retinanet.training.anchor_fit import fit_shapes, shape_ious
from retinanet.training.anchor_reach import best_anchor_ious


@pytest.fixture(scope="module")
def tall(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return annotations of boxes that are six times as high as wide, in nine sizes, which no usual anchor fits."""
    folder = tmp_path_factory.mktemp("tall")
    annotations = []
    for number in range(54):
        width = 4 + number % 9
        box = [5 * number % 150, number % 20, width, 6 * width]
        annotations.append({"id": number + 1, "image_id": 1, "category_id": 1, "bbox": box})
    Image.new("RGB", (200, 100)).save(folder / "1.png")
    content = {
        "images": [{"id": 1, "file_name": "1.png", "width": 200, "height": 100}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "mast"}],
    }
    (folder / "tall.json").write_text(json.dumps(content))
    return folder / "tall.json"


def test_clusters_of_a_hand_made_case() -> None:
    boxes = torch.tensor([[10.0, 10], [12, 10], [100, 50], [104, 50], [30, 90]])
    shapes = fit_shapes(boxes[torch.tensor([3, 0, 4, 2, 1])], 3)
    assert shapes.tolist() == [[11.0, 10.0], [30.0, 90.0], [102.0, 50.0]]
    torch.testing.assert_close(shape_ious(boxes[:1], boxes[1:3]), torch.tensor([[100 / 120, 100 / 5000]]))


def test_clusters_are_deterministic_and_better_than_a_grid() -> None:
    torch.manual_seed(0)
    boxes = torch.exp(torch.randn(2000, 2) * 0.8 + 3.5)
    one, two = fit_shapes(boxes, 9, seed=4), fit_shapes(boxes, 9, seed=4)
    assert torch.equal(one, two) and not torch.equal(one, fit_shapes(boxes, 9, seed=5))
    assert (one.prod(1).diff() > 0).all()
    # The shapes of k-means beat shapes that are drawn from the boxes.
    drawn = max(shape_ious(boxes, boxes[i : i + 9]).amax(1).mean() for i in range(0, 900, 9))
    assert shape_ious(boxes, one).amax(1).mean() > drawn + 0.005


def test_more_anchors_than_sizes() -> None:
    assert fit_shapes(torch.tensor([[5.0, 5], [7, 7]]), 2).tolist() == [[5.0, 5.0], [7.0, 7.0]]
    with pytest.raises(DataError, match="at least 3 different sizes for 3 anchors, got 2"):
        fit_shapes(torch.tensor([[5.0, 5], [5, 5], [7, 7]]), 3)


def test_command_config_and_model_file(tall: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "anchors.json"
    assert main(["anchors", "fit", str(tall), "--output", str(output), "--min-size", "0"]) == 0
    printed = capsys.readouterr().out
    assert "before: 9 anchors on each of the levels 3 4 5 6 7: recall 0.000 at IoU 0.5" in printed
    assert "after:  3 anchors on each of the levels 3 4 5: recall " in printed
    arguments = ["train", "--train", "a", "--val", "a", "--output", "b", "--config", str(output)]
    args = build_parser().parse_args([*arguments, "--backbone", "mobilenet_v3_small", "--fpn-channels", "8"])
    dataset = open_dataset(tall)
    config = build_config(args, dataset, {}, None)
    assert config.fpn_levels == (3, 4, 5) and config.anchors_per_cell == 3 and config.min_size is None
    assert config.anchor_shapes[0] == ((4.0, 24.0), (5.0, 30.0), (6.0, 36.0))
    usual = RetinaNetConfig(min_size=None)
    assert best_anchor_ious(config, dataset).mean() > best_anchor_ious(usual, dataset).mean() + 0.1
    torch.manual_seed(0)
    save_model(tmp_path / "model.safetensors", RetinaNet(config))
    loaded = load_model(tmp_path / "model.safetensors")
    assert loaded.config == config
    assert loaded.base_anchors[0].tolist() == [-2.0, -12.0, 2.0, 12.0] and len(loaded.base_anchors) == 9
    with torch.inference_mode():
        loaded.eval()([torch.rand(3, 64, 64)])
    # Anchors that are given as options replace those of the file.
    args = build_parser().parse_args([*arguments, "--anchor-sizes", "16", "32", "64"])
    assert build_config(args, dataset, {}, None).anchor_shapes == ()


def test_anchors_of_a_faster_rcnn(tall: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "anchors.json"
    arguments = ["anchors", "fit", str(tall), "--output", str(output), "--min-size", "0", "--model", "fasterrcnn"]
    assert main([*arguments, "--per-level", "1"]) == 0
    printed = capsys.readouterr().out
    assert "before: 3 anchors on each of the levels 2 3 4 5 6: recall 0.000 at IoU 0.7" in printed
    assert "after:  1 anchor on each of the levels 2 3 4 5 6: recall " in printed
    assert f"for `retinanet train --model fasterrcnn --config {output}`" in printed
    arguments = ["train", "--train", "a", "--val", "a", "--output", "b", "--config", str(output)]
    config = build_config(
        build_parser().parse_args([*arguments, "--model", "fasterrcnn"]), open_dataset(tall), {}, None
    )
    assert isinstance(config, FasterRCNNConfig) and config.anchors_per_cell == 1


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ((((4, 5),),) * 4, "anchor_shapes: expected 5 lists of"),
        ((((4, 0),),) * 5, "anchor_shapes: expected 5 lists of .* above 0"),
        ((((4, 5),),) * 4 + (((4, 5), (6, 7)),), "anchor_shapes: expected equally many on each level"),
        (((4, 5),) * 5, "anchor_shapes: expected 5 lists of"),
        (7, "anchor_shapes: expected 5 lists of"),
    ],
)
def test_wrong_shapes(shapes: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetinaNetConfig.from_dict({"anchor_shapes": shapes})


def test_shapes_are_centred_boxes() -> None:
    config = RetinaNetConfig.from_dict({"fpn_levels": [3, 4], "anchor_shapes": [[[4, 6]], [[8, 3]]]})
    assert base_anchors(config).tolist() == [[-2, -3, 2, 3], [-4, -1.5, 4, 1.5]]


def test_wrong_use(tall: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path / "out.json")]
    assert main(["anchors", "fit", str(tall), *output, "--per-level", "40"]) == 3
    assert "at least 120 different sizes for 120 anchors, got 9; give a smaller --per-level" in capsys.readouterr().err
    assert main(["anchors", "fit", str(tall), *output, "--fpn-levels", "3", "5"]) == 2
    assert "fpn_levels: expected consecutive levels" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text('{"fpn_level": 3}')
    assert main(["anchors", "fit", str(tall), *output, "--config", str(tmp_path / "bad.json")]) == 2
    assert "bad.json: fpn_level: no such field" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()

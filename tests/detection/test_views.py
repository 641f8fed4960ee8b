"""Detection in several views: equivariance, box voting against known results, and checks of arguments."""

from __future__ import annotations

import pytest
import torch
from synthetic import rectangles, tiny_config

from retinanet.detection.evaluate import evaluate
from retinanet.detection.tiled import detect_image
from retinanet.detection.views import MultiViewDetector, with_views
from retinanet.model.network import RetinaNet
from retinanet.model.targets import ImageDetections, split_detections


@pytest.fixture(scope="module")
def model() -> RetinaNet:
    torch.manual_seed(0)
    model = RetinaNet(tiny_config(score_threshold=0.0, max_detections=20)).eval()
    # Give scores and boxes that vary over the image, as those of a trained network do.
    for name, parameter in model.head.named_parameters():
        if name.endswith("cls_logits.weight"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def flipped(detections: dict[str, torch.Tensor], size: tuple[int, int], axes: tuple[int, ...]) -> torch.Tensor:
    x1, y1, x2, y2 = detections["boxes"].unbind(1)
    height, width = size
    if -1 in axes:
        x1, x2 = width - x2, width - x1
    if -2 in axes:
        y1, y2 = height - y2, height - y1
    return torch.stack([x1, y1, x2, y2], dim=1)


@pytest.mark.parametrize(("views", "axes"), [(2, (-1,)), (4, (-1,)), (4, (-2,)), (4, (-2, -1))])
def test_a_mirrored_image_has_mirrored_detections(model: RetinaNet, views: int, axes: tuple[int, ...]) -> None:
    images = [torch.rand(3, 64, 96), torch.rand(3, 48, 40)]
    detector = with_views(model, views)
    with torch.inference_mode():
        detections = detector(images)
        mirrored = detector([image.flip(axes) for image in images])
        plain = model([image.flip(axes) for image in images])
    for image, a, b, c in zip(images, detections, mirrored, plain, strict=True):
        assert len(a["boxes"]) == 20
        # Equal scores may come in another order.
        expected = torch.cat([flipped(a, image.shape[1:], axes), a["scores"][:, None], a["labels"][:, None]], dim=1)
        rows = torch.cat([b["boxes"], b["scores"][:, None], b["labels"][:, None]], dim=1)
        distance = (expected[:, None] - rows).abs().amax(2)
        assert distance.amin(0).max() < 1e-3 and distance.amin(1).max() < 1e-3
        assert not torch.allclose(b["boxes"], c["boxes"], atol=0.1)  # one view alone is not equivariant


def test_boxes_vote_within_their_class(model: RetinaNet) -> None:
    detector = MultiViewDetector(model, 2)
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 12], [2, 0, 10, 10], [0, 0, 10, 10], [50, 50, 60, 60]])
    scores = torch.tensor([0.8, 0.4, 0.2, 0.6, 0.0])
    labels = torch.tensor([0, 0, 0, 1, 0])
    half = [tuple(column[rows] for column in (boxes, scores, labels)) for rows in (slice(0, 2), slice(2, 5))]
    merged = detector._merge([ImageDetections(*columns) for columns in half])
    weights = torch.tensor([0.64, 0.16, 0.04])
    expected = (weights[:, None] * boxes[:3]).sum(0) / weights.sum()
    torch.testing.assert_close(merged.boxes, torch.stack([expected, boxes[3], boxes[4]]))
    assert merged.scores.tolist() == pytest.approx([0.8, 0.6, 0.0]) and merged.labels.tolist() == [0, 1, 0]


def test_boxes_that_nms_keeps_do_not_vote_for_each_other() -> None:
    detector = MultiViewDetector(RetinaNet(tiny_config(nms_threshold=0.7)), 2)
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 4, 10, 14], [0, 0, 10, 9]])  # the first two: IoU 0.43; last: 0.9
    boxes[1, 1::2] -= 1.5  # IoU 0.6
    merged = detector._merge([ImageDetections(boxes, torch.tensor([0.9, 0.8, 0.1]), torch.zeros(3, dtype=torch.int64))])
    torch.testing.assert_close(merged.boxes[1], boxes[1])
    expected = (0.81 * boxes[0] + 0.01 * boxes[2]) / 0.82
    torch.testing.assert_close(merged.boxes[0], expected)


@pytest.mark.parametrize("views", [2, 4])
def test_resized_images_and_images_without_detections(views: int) -> None:
    torch.manual_seed(0)
    model = RetinaNet(tiny_config(score_threshold=0.0, min_size=(80,), max_size=200, max_detections=5)).eval()
    images = [torch.rand(3, 40, 60), torch.rand(3, 50, 30)]
    with torch.inference_mode():
        for detections, image in zip(with_views(model, views)(images), images, strict=True):
            assert len(detections["boxes"]) == 5
            limit = torch.tensor([image.shape[2], image.shape[1]] * 2)
            assert (detections["boxes"] >= -1e-3).all() and (detections["boxes"] <= limit + 1e-3).all()
            assert detections["boxes"].amax() > 20  # the boxes are not confined to a corner of the image
        model.config = tiny_config(score_threshold=0.999)
        empty = with_views(model, views)(images)[0]
    assert empty["boxes"].shape == (0, 4) and empty["scores"].shape == empty["labels"].shape == (0,)


def test_autocast_does_not_round_coordinates(model: RetinaNet) -> None:
    boxes = torch.tensor([[300.3, 10, 333.7, 40], [301.1, 10, 334.9, 41]])
    view = ImageDetections(boxes, torch.tensor([0.9, 0.8]), torch.zeros(2, dtype=torch.int64))
    detector = MultiViewDetector(model, 2)
    expected = detector._merge([view]).boxes
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(detector._merge([view]).boxes, expected)


def test_images_are_checked_as_without_views(model: RetinaNet) -> None:
    with pytest.raises(ValueError, match="images: expected at least one image, got none"):
        with_views(model, 2)([])
    with pytest.raises(ValueError, match=r"images\[0\]: expected shape \[3, H, W\]"):
        with_views(model, 2)([torch.rand(4, 4)])


def test_one_view_is_the_model_itself(model: RetinaNet) -> None:
    assert with_views(model, 1) is model


def test_evaluation_and_detection_use_the_number_of_views(model: RetinaNet, tmp_path) -> None:
    dataset = rectangles(tmp_path, 2)
    image, _ = dataset.load(0)
    results = [evaluate(model, dataset, views=views).detections for views in (1, 2, 4)]
    assert all(results) and results[0] != results[1] != results[2]
    boxes = [detect_image(model, image, views=views).boxes for views in (1, 4)]
    assert not torch.equal(*boxes)
    assert boxes[1].tolist() == [
        pytest.approx([x, y, x + w, y + h], abs=1e-3)
        for x, y, w, h in (d["bbox"] for d in results[2] if d["image_id"] == results[2][0]["image_id"])
    ]


@pytest.mark.parametrize("views", [0, 3])
def test_wrong_number_of_views(model: RetinaNet, tmp_path, views: int) -> None:
    with pytest.raises(ValueError, match=rf"views: expected 1, 2, 4, got {views}"):
        evaluate(model, rectangles(tmp_path, 1), views=views)
    with pytest.raises(ValueError, match=f"views: expected 2 or 4, got {views}"):
        MultiViewDetector(model, views)


def test_candidates_are_not_suppressed(model: RetinaNet) -> None:
    batch, sizes = torch.rand(1, 3, 64, 64), torch.tensor([[64, 64]])
    with torch.inference_mode():
        outputs = model.heads(batch)
        candidates = model.candidates(batch, sizes)
    expected = sum(min(level[0].numel(), model.config.topk) for level in outputs.cls_logits)
    assert (candidates.anchor_index >= 0).sum() == expected
    (image,) = split_detections(candidates)
    assert len(image.boxes) == len(image.scores) == len(image.labels) == expected
    assert (image.scores[:-1] >= image.scores[1:]).all()

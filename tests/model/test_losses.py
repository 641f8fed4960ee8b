"""The losses of a padded batch: torchvision's values, exact gradients, crowds, and the rules of the divisor."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from synthetic import random_boxes
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder, _box_loss
from torchvision.ops import sigmoid_focal_loss

import retinanet_ops as ops
from retinanet.model.config import CompatConfig, RetinaNetConfig
from retinanet.model.heads import HeadOutputs
from retinanet.model.losses import LossNormaliser, retinanet_losses
from retinanet.model.targets import pad_targets


def synthetic_outputs(seed: int = 0) -> tuple[HeadOutputs, ops.AnchorGrid, list[dict[str, Tensor]]]:
    torch.manual_seed(seed)
    grid_sizes = ((12, 16), (6, 8))
    grid = ops.AnchorGrid.torchvision(grid_sizes, (96, 128), ((16.0, 20.0), (32.0, 40.0)), ((0.5, 1.0),) * 2)
    outputs = HeadOutputs(
        [torch.randn(2, 4 * 3, h, w, dtype=torch.float64, requires_grad=True) for h, w in grid_sizes],
        [torch.randn(2, 4 * 4, h, w, dtype=torch.float64, requires_grad=True) for h, w in grid_sizes],
    )
    targets = [
        {"boxes": random_boxes(7, 96, 128), "labels": torch.randint(0, 3, (7,))},
        {"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64)},
    ]
    return outputs, grid, targets


def losses_of(
    outputs: HeadOutputs,
    grid: ops.AnchorGrid,
    truth: ops.GroundTruth,
    config: RetinaNetConfig,
    crowds: ops.PaddedBoxes | None = None,
) -> dict[str, Tensor]:
    return retinanet_losses(outputs, grid, truth, config, LossNormaliser(config), crowds)


@pytest.mark.parametrize("kind", ["l1", "smooth_l1", "giou", "diou", "ciou"])
def test_box_losses_are_torchvisions(kind: str) -> None:
    outputs, grid, targets = synthetic_outputs()
    config = RetinaNetConfig(class_names=("a", "b", "c"), box_loss=kind)
    truth, _ = pad_targets(targets)
    got = losses_of(outputs, grid, truth, config)["bbox_regression"]

    matches = ops.match_anchors(grid, truth.boxes, truth.count)[0]
    positive = matches >= 0
    assert positive.sum() > 5
    rows = [d[0].reshape(4, 4, *d.shape[-2:]).permute(2, 3, 0, 1).reshape(-1, 4) for d in outputs.box_deltas]
    expected = _box_loss(
        kind,
        BoxCoder((1.0, 1.0, 1.0, 1.0)),
        grid.boxes()[positive].double(),
        truth.boxes[0][matches[positive].long()].double(),
        torch.cat(rows)[positive],
        cnf={"beta": config.smooth_l1_beta},
    )
    # The second image has no objects and no box loss, but counts in the mean over the images.
    torch.testing.assert_close(got, expected / positive.sum() / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["l1", "smooth_l1", "giou", "diou", "ciou"])
def test_box_gradient_reaches_positives_only(kind: str) -> None:
    outputs, grid, targets = synthetic_outputs()
    for level in outputs.box_deltas:
        level.data[1] = math.nan  # an image without objects has no box loss, even if its deltas are NaN
    truth, _ = pad_targets(targets)
    config = RetinaNetConfig(class_names=("a", "b", "c"), box_loss=kind)
    losses_of(outputs, grid, truth, config)["bbox_regression"].backward()
    gradient = torch.cat(
        [d.grad.reshape(2, 4, 4, *d.shape[-2:]).permute(0, 3, 4, 1, 2).reshape(2, -1, 4) for d in outputs.box_deltas],
        dim=1,
    )
    assert gradient.isfinite().all()
    matched = ops.match_anchors(grid, truth.boxes, truth.count) >= 0
    assert torch.equal((gradient != 0).any(-1), matched)


@pytest.mark.parametrize("kind", ["l1", "smooth_l1", "giou"])
def test_loss_gradients_are_the_derivatives(kind: str) -> None:
    outputs, grid, targets = synthetic_outputs()
    truth, _ = pad_targets(targets)
    config = RetinaNetConfig(class_names=("a", "b", "c"), box_loss=kind)

    def loss(*flat: Tensor) -> tuple[Tensor, ...]:
        return tuple(losses_of(HeadOutputs(list(flat[:2]), list(flat[2:])), grid, truth, config).values())

    inputs = (*outputs.cls_logits, *outputs.box_deltas)
    assert torch.autograd.gradcheck(loss, inputs, atol=1e-6, fast_mode=True)


def test_anchors_in_crowd_regions_have_no_loss() -> None:
    outputs, grid, targets = synthetic_outputs()
    config = RetinaNetConfig(class_names=("a", "b", "c"))
    crowd_box = torch.tensor([[0.0, 0.0, 128.0, 96.0]])
    truth, none = pad_targets(targets)
    assert none is None
    truth, crowd = pad_targets([targets[0], {**targets[1], "crowd_boxes": crowd_box}])
    assert crowd is not None and crowd.count.tolist() == [0, 1]
    classification = losses_of(outputs, grid, truth, config, crowd)["classification"]
    classification.backward()
    # Anchors with less than half of their area in the crowd region remain background.
    boxes = grid.boxes()
    inside = (boxes[:, 2:].minimum(crowd_box[0, 2:]) - boxes[:, :2].maximum(crowd_box[0, :2])).prod(1)
    covered = inside / (boxes[:, 2:] - boxes[:, :2]).prod(1) >= 0.5
    gradient = torch.cat(
        [c.grad[1].reshape(4, 3, *c.shape[-2:]).permute(2, 3, 0, 1).reshape(-1, 3) for c in outputs.cls_logits]
    )
    assert torch.equal((gradient != 0).any(1), ~covered)


def test_batch_normaliser_divides_by_the_mean_of_the_batch() -> None:
    outputs, grid, targets = synthetic_outputs()
    truth, _ = pad_targets(targets)
    names = ("a", "b", "c")
    each = losses_of(outputs, grid, truth, RetinaNetConfig(class_names=names))
    batch = losses_of(outputs, grid, truth, RetinaNetConfig(class_names=names, loss_normaliser="batch"))
    positives = int((ops.match_anchors(grid, truth.boxes, truth.count) >= 0).sum())
    # All objects are in the first of two images. "batch" divides the sum over the batch by the positives of the batch,
    # while "per_image" takes the mean of the images' losses.
    torch.testing.assert_close(batch["bbox_regression"], 2 * each["bbox_regression"])
    logits = torch.cat([t.reshape(2, 4, 3, -1).permute(0, 3, 1, 2).reshape(2, -1, 3) for t in outputs.cls_logits], 1)
    labels = ops.assign_targets(grid, truth.boxes, truth.labels, truth.count).labels
    expected = ops.sigmoid_focal_loss(logits, labels, reduction="sum") / positives
    torch.testing.assert_close(batch["classification"], expected)


def test_ema_normaliser_divides_by_the_moving_average() -> None:
    config = RetinaNetConfig(loss_normaliser="ema", compat=CompatConfig(loss_ema_decay=0.75))
    normaliser = LossNormaliser(config)
    counts = [torch.tensor([10, 30]), torch.tensor([0, 0]), torch.tensor([6, 0])]
    # The mean of the first step is 20; means are at least 1.
    expected = [20.0, 0.75 * 20 + 0.25 * 1, 0.75 * 15.25 + 0.25 * 3]
    assert [normaliser(count).item() for count in counts] == expected
    assert normaliser.average.item() == expected[-1]
    normaliser.eval()
    assert normaliser(torch.tensor([100])).item() == 0.75 * expected[-1] + 25
    assert normaliser.average.item() == expected[-1]
    again = LossNormaliser(config)
    again.load_state_dict(normaliser.state_dict())
    assert again(counts[0]).item() == 0.75 * expected[-1] + 5
    assert not LossNormaliser(RetinaNetConfig()).state_dict()


@pytest.mark.parametrize("rule", ["batch", "ema"])
def test_evaluation_does_not_wait_for_other_processes(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    def alone(*args: object) -> None:
        raise AssertionError("no other process has this step")

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", alone)
    normaliser = LossNormaliser(RetinaNetConfig(loss_normaliser=rule))
    with pytest.raises(AssertionError, match="no other process"):
        normaliser(torch.tensor([4, 8]))
    assert normaliser.eval()(torch.tensor([4, 8])) == 6


def test_moving_average_stays_float32() -> None:
    normaliser = LossNormaliser(RetinaNetConfig(loss_normaliser="ema"))
    normaliser(torch.tensor([2049]))  # not representable in float16
    assert normaliser.half().double().average.dtype == torch.float32
    assert normaliser.average.item() == 2049


def test_smoothed_labels_are_soft_targets() -> None:
    outputs, grid, targets = synthetic_outputs()
    truth, _ = pad_targets(targets)
    config = RetinaNetConfig(class_names=("a", "b", "c"), label_smoothing=0.2)
    got = losses_of(outputs, grid, truth, config)["classification"]
    assigned = ops.assign_targets(grid, truth.boxes, truth.labels, truth.count)
    rows = [t.reshape(2, 4, 3, *t.shape[-2:]).permute(0, 3, 4, 1, 2).reshape(2, -1, 3) for t in outputs.cls_logits]
    one_hot = torch.nn.functional.one_hot(assigned.labels.clamp(min=0).long(), 3) * (assigned.labels >= 0)[..., None]
    soft = one_hot * 0.8 + 0.1
    each = sigmoid_focal_loss(torch.cat(rows, dim=1), soft.double(), alpha=0.25, gamma=2)
    sums = (each.sum(-1) * (assigned.labels != -2)).sum(1)
    torch.testing.assert_close(got, (sums / assigned.num_positive.clamp(min=1)).mean(), rtol=1e-5, atol=0)


def _mean_in_one_of_two_processes(rank: int, meeting_point: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
    try:
        # Three images in this process, one in the other.
        counts = torch.tensor([8, 2, 0]) if rank == 0 else torch.tensor([50])
        of_images = [8.0, 2.0, 1.0] if rank == 0 else [50.0]
        for rule, expected in (("per_image", of_images), ("batch", 15.0), ("ema", 15.0)):
            normaliser = LossNormaliser(RetinaNetConfig(loss_normaliser=rule))
            assert normaliser(counts).tolist() == expected, rule
            compiled = torch.compile(normaliser, fullgraph=True, backend="aot_eager")
            assert compiled(counts).tolist() == expected, rule
    finally:
        dist.destroy_process_group()


def test_normaliser_of_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_mean_in_one_of_two_processes, (str(tmp_path / "meeting"),), nprocs=2)

"""The stages of a RetinaNet, one by one: ours beside torchvision's, with the same weights and input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_cases import CLASSES, NETWORKS, check_detections, models, name_of
from torch import Tensor
from torchvision.ops import box_iou

import retinanet_ops as ops
from retinanet.model.losses import retinanet_losses
from retinanet.model.targets import pad_targets, split_detections
from retinanet_ops.reference._rows import rows_of


@pytest.mark.parametrize("row", ("ours", "torchvision"))
@pytest.mark.parametrize("network", NETWORKS)
def test_preparing_images(compare, device, network, row):
    shared = models(network, device)
    model = shared.of(row).train()
    compare(
        row,
        lambda: model.transform(shared.images, shared.targets)[0].tensors,
        shared.torchvision.transform(shared.images, shared.targets)[0].tensors,
        group=name_of("preparing images", network),
    )


@pytest.mark.parametrize("row", ("ours", "torchvision"))
@pytest.mark.parametrize("network", NETWORKS)
def test_backbone(compare, device, network, row):
    shared = models(network, device)
    body, batch = shared.of(row).eval().backbone.body, torch.stack(shared.images)

    @torch.no_grad()
    def run() -> list[Tensor]:
        return list(body(batch).values())

    compare(row, run, run(), group=name_of("backbone, forward", network))


@pytest.mark.parametrize("row", ("ours", "torchvision"))
@pytest.mark.parametrize("network", NETWORKS)
def test_pyramid(compare, device, network, row):
    shared = models(network, device)
    pyramid = shared.of(row).eval().backbone.fpn
    with torch.no_grad():
        maps = shared.ours.eval().backbone.body(torch.stack(shared.images))

    @torch.no_grad()
    def run() -> list[Tensor]:
        return list(pyramid(maps).values())

    compare(row, run, run(), group=name_of("feature pyramid, forward", network))


@pytest.mark.parametrize("row", ("ours", "torchvision"))
@pytest.mark.parametrize("network", NETWORKS)
def test_heads(compare, device, network, row):
    shared = models(network, device)
    model = shared.of(row).eval()
    with torch.no_grad():
        features = list(shared.ours.eval().backbone(torch.stack(shared.images)).values())

    @torch.no_grad()
    def run() -> Any:
        return model.head(features)

    def rows(outputs: Any) -> Tensor:
        if isinstance(outputs, dict):
            return outputs["cls_logits"]
        return rows_of(outputs.cls_logits, CLASSES)

    compare(
        row,
        run,
        rows(run()),
        check=lambda actual, expected: torch.testing.assert_close(rows(actual), expected),
        group=name_of("heads, forward", network),
    )


@pytest.mark.parametrize("row", ("ours", "torchvision"))
@pytest.mark.parametrize("network", NETWORKS)
def test_matching(compare, device, network, row):
    """Measure all steps from the images' boxes to the match of each anchor."""
    shared = models(network, device)
    ours, theirs = shared.ours.train(), shared.torchvision.train()
    batch, scaled = theirs.transform(shared.images, shared.targets)
    with torch.no_grad():
        outputs = ours.heads(batch.tensors)

    def our_matches() -> Tensor:  # [N, anchors]
        truth, _ = pad_targets(scaled)
        anchors = ours.anchor_grid(batch.tensors, outputs)
        return ops.assign_targets(anchors, truth.boxes, truth.labels, truth.count).matches

    def their_matches() -> Tensor:  # [N, anchors]
        anchors = theirs.anchor_generator(batch, outputs.cls_logits)
        pairs = zip(scaled, anchors, strict=True)
        return torch.stack([theirs.proposal_matcher(box_iou(t["boxes"], each)) for t, each in pairs])

    def check(actual: Tensor, expected: Tensor) -> None:
        assert (actual == expected).float().mean() > 0.99999  # the last bits of IoUs may differ

    compare(
        row,
        our_matches if row == "ours" else their_matches,
        their_matches(),
        check=check,
        group=name_of("matching", network),
    )


@pytest.mark.parametrize("row", ("ours", "torchvision"))
@pytest.mark.parametrize("network", NETWORKS)
def test_losses(compare, device, network, row):
    """Measure matching and both losses, from the heads' outputs to the gradients of these outputs."""
    shared = models(network, device)
    ours, theirs = shared.ours.train(), shared.torchvision.train()
    batch, scaled = theirs.transform(shared.images, shared.targets)
    with torch.no_grad():
        outputs = ours.heads(batch.tensors)
    leaves = [level.detach().requires_grad_() for level in (*outputs.cls_logits, *outputs.box_deltas)]
    levels = len(outputs.cls_logits)

    def our_losses() -> Tensor:
        grouped = type(outputs)(leaves[:levels], leaves[levels:])
        truth, _ = pad_targets(scaled)
        losses = retinanet_losses(
            grouped, ours.anchor_grid(batch.tensors, outputs), truth, ours.config, ours.normaliser
        )
        return torch.stack(list(losses.values()))

    def their_losses() -> Tensor:
        rows = {
            "cls_logits": rows_of(leaves[:levels], CLASSES),
            "bbox_regression": rows_of(leaves[levels:], 4),
        }
        anchors = theirs.anchor_generator(batch, leaves[:levels])
        return torch.stack(list(theirs.compute_loss(scaled, rows, anchors).values()))

    def with_gradients(losses: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        values = losses()
        return (values.detach(), *torch.autograd.grad(values.sum(), leaves))

    compare(
        row,
        lambda: with_gradients(our_losses if row == "ours" else their_losses),
        with_gradients(their_losses),
        check=lambda actual, expected: torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-6),
        group=name_of("matching and losses, forward + backward", network),
    )


@pytest.mark.parametrize("row", ("ours", "torchvision"))
@pytest.mark.parametrize("network", NETWORKS)
def test_post_processing(compare, device, network, row):
    """Measure all steps from the heads' outputs to the detections of each image."""
    shared = models(network, device)
    ours, theirs = shared.ours.eval(), shared.torchvision.eval()
    batch = theirs.transform(shared.images)[0]
    sizes = torch.tensor(batch.image_sizes, device=device)
    with torch.no_grad():
        outputs = ours.heads(batch.tensors)

    @torch.no_grad()
    def ours_from_heads() -> list[dict[str, Tensor]]:
        detections = ops.detect(
            outputs.cls_logits, outputs.box_deltas, ours.anchor_grid(batch.tensors, outputs), sizes, max_detections=300
        )
        return [image._asdict() for image in split_detections(detections)]

    @torch.no_grad()
    def theirs_from_heads() -> list[dict[str, Tensor]]:
        rows = {
            "cls_logits": rows_of(outputs.cls_logits, CLASSES),
            "bbox_regression": rows_of(outputs.box_deltas, 4),
        }
        anchors = theirs.anchor_generator(batch, outputs.cls_logits)
        cells = [level.shape[2] * level.shape[3] for level in outputs.cls_logits]
        per_cell = rows["cls_logits"].shape[1] // sum(cells)
        counts = [cell * per_cell for cell in cells]
        split = {name: list(value.split(counts, dim=1)) for name, value in rows.items()}
        return theirs.postprocess_detections(split, [list(a.split(counts)) for a in anchors], batch.image_sizes)

    compare(
        row,
        ours_from_heads if row == "ours" else theirs_from_heads,
        theirs_from_heads(),
        check=check_detections,
        group=name_of("post-processing", network),
    )

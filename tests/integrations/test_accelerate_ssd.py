"""An accelerated SSD has the assignments, losses, gradients and detections of torchvision's own."""

from __future__ import annotations

import copy
import math
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate_cases import CLASSES, Batch, assert_same_detections, assert_same_gradients, assert_same_losses, pair
from ssd_cases import RATIOS, SSDS, plain_ssd, small_ssd, ssd_batch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder, SSDMatcher
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD, SSDHead

import retinanet_ops as ops
from retinanet_ops.integrations.torchvision import accelerate


def assignments(theirs: SSD, ours: SSD, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Return the matches [N, A] of both models."""
    expected, got, assign = [], [], ops.assign_targets
    compute_loss = theirs.compute_loss
    theirs.compute_loss = lambda *args: expected.append(torch.stack(args[3])) or compute_loss(*args)
    monkeypatch.setattr(ops, "assign_targets", lambda *args, **opts: got.append(assign(*args, **opts)) or got[-1])
    theirs(*batch), ours(*batch)
    del theirs.compute_loss
    monkeypatch.undo()
    return expected[0], got[0].matches.long()


def random_case(seed: int) -> tuple[SSD, Batch]:
    """Return a small model and a batch with 0 to 100 boxes per image."""
    torch.manual_seed(seed)
    counts = tuple(torch.randint(0, 101, (1 + seed % 3,)).tolist())
    options = dict(score_thresh=(0.01, 0.1, 0.3)[seed % 3], nms_thresh=(0.45, 0.3, 0.7)[seed // 3 % 3])
    return small_ssd(iou_thresh=(0.6, 0.7)[seed % 2], topk_candidates=(400, 30)[seed // 2 % 2], **options), ssd_batch(
        counts
    )


def check_random_case(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = random_case(seed)
    theirs, ours = pair(model)
    expected, got = assignments(theirs, ours, batch, monkeypatch)
    assert torch.equal(got, expected)
    # Otherwise torchvision counts positives twice; see TestDeviations.
    assert (3 * (got >= 0).sum(1) <= (got < 0).sum(1)).all()
    if any(len(target["boxes"]) for target in batch[1]):
        assert_same_losses(theirs, ours, batch)
        assert_same_gradients(theirs, ours, batch)
    assert_same_detections(theirs, ours, batch[0])


class TestResults:
    @pytest.mark.parametrize("name", SSDS)
    def test_losses_and_detections_equal_torchvisions(self, name: str) -> None:
        theirs, ours = pair(SSDS[name]())
        for counts in ((5, 0), (12, 1)):
            assert_same_losses(theirs, ours, ssd_batch(counts))
        assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
        assert_same_detections(theirs, ours, ssd_batch((1, 1))[0])

    @pytest.mark.parametrize("seed", range(6))
    def test_random_batches(self, seed: int, monkeypatch) -> None:
        check_random_case(seed, monkeypatch)

    def test_gradients_of_a_single_map_equal_torchvisions(self) -> None:
        assert_same_gradients(*pair(SSDS["single map"]()), ssd_batch())

    @pytest.mark.parametrize("seed", range(4))
    def test_post_processing_options(self, seed: int) -> None:
        torch.manual_seed(seed)
        theirs, ours = pair(small_ssd())
        for model in (theirs, ours):
            model.score_thresh = (0.0, -1e6, 0.05, 0.2)[seed]
            model.nms_thresh = (0.5, 0.05, 0.9, 1.0)[seed]
            model.detections_per_img = (300, 7, 10**12, 3)[seed]  # no memory holds 10^12 slots
            model.topk_candidates = (10**9, 50, 400, 10)[seed]
            model.box_coder = BoxCoder((10.0, 5.0, 2.0, 3.0), bbox_xform_clip=(4.0, 0.1, 1.0, 2.0)[seed])
        assert_same_detections(theirs, ours, ssd_batch()[0], least=(50, 7, 50, 3)[seed])

    def test_no_detections(self) -> None:
        theirs, ours = pair(small_ssd(score_thresh=0.9999))
        assert_same_detections(theirs, ours, ssd_batch((1, 1))[0], least=0)
        ours.topk_candidates = 0
        with pytest.raises(ValueError, match="accelerate: topk_candidates must be .* 1, got 0"):
            ours(ssd_batch((1,))[0])

    def test_training_options(self) -> None:
        theirs, ours = pair(small_ssd())
        batch = ssd_batch()
        before = ours(*batch)
        for model in (theirs, ours):
            model.proposal_matcher = SSDMatcher(0.3)
            model.proposal_matcher.low_threshold = 0.1  # default boxes between the thresholds are background
            model.neg_to_pos_ratio = 1.7
            model.box_coder = BoxCoder((1.0, 2.0, 3.0, 4.0))
        assert_same_losses(theirs, ours, batch)
        assert_same_gradients(theirs, ours, batch)
        assert all(ours(*batch)[name] != value for name, value in before.items())

    def test_batch_without_boxes(self) -> None:
        theirs, ours = pair(small_ssd())
        batch = ssd_batch((0, 0))
        expected, got = theirs(*batch), ours(*batch)
        assert got == expected == {"bbox_regression": 0, "classification": 0}
        sum(got.values()).backward()

    def test_objects_labelled_as_background(self) -> None:
        # torchvision counts them as positives in the box loss and in the denominators only.
        theirs, ours = pair(small_ssd())
        images, targets = ssd_batch()
        targets[2]["labels"][::2] = 0
        assert_same_losses(theirs, ours, (images, targets))
        assert_same_gradients(theirs, ours, (images, targets))

    def test_object_beside_all_default_boxes_takes_the_first(self, monkeypatch) -> None:
        theirs, ours = pair(small_ssd())
        images, targets = ssd_batch()
        targets[1] = {"boxes": torch.tensor([[900.0, 900, 910, 910]]), "labels": torch.tensor([2])}
        expected, got = assignments(theirs, ours, (images, targets), monkeypatch)
        assert torch.equal(got, expected) and (got[1] >= 0).nonzero().tolist() == [[0]]
        assert_same_losses(theirs, ours, (images, targets))

    def test_train_and_eval_alternate(self) -> None:
        theirs, ours = pair(small_ssd())
        batch = ssd_batch()
        for _ in range(2):
            assert_same_losses(theirs.train(), ours.train(), batch)
            assert_same_detections(theirs, ours, batch[0])

    def test_float64(self) -> None:
        theirs, ours = pair(small_ssd().double())
        images, targets = ssd_batch()
        batch = [image.double() for image in images], targets
        expected, got = theirs(*batch), ours(*batch)
        assert all(value.dtype == torch.float64 for value in got.values())
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=0)
        assert_same_detections(theirs, ours, batch[0])


class Shifted(DefaultBoxGenerator):
    """A generator whose boxes differ from image to image."""

    def forward(self, *args: Any) -> list[Tensor]:
        return [boxes + 3 * i for i, boxes in enumerate(super().forward(*args))]


class Wider(DefaultBoxGenerator):
    def _grid_default_boxes(self, *args: Any, **options: Any) -> Tensor:
        return super()._grid_default_boxes(*args, **options) * torch.tensor([1.0, 1.0, 1.2, 1.0])


class TestParts:
    @pytest.mark.parametrize("generator", [Shifted, Wider])
    def test_other_generators_are_called(self, generator: type[DefaultBoxGenerator], monkeypatch) -> None:
        theirs, ours = pair(small_ssd())
        plain = ours(*(batch := ssd_batch()))
        for model in (theirs, ours):
            model.anchor_generator = generator(RATIOS)
        expected, got = assignments(theirs, ours, batch, monkeypatch)
        assert torch.equal(got, expected) and ours(*batch)["bbox_regression"] != plain["bbox_regression"]
        assert_same_losses(theirs, ours, batch)
        assert_same_detections(theirs, ours, batch[0])

    def test_hook_of_the_generator_is_called(self) -> None:
        theirs, ours = pair(small_ssd())
        for model in (theirs, ours):
            model.anchor_generator.register_forward_hook(lambda module, args, output: [a + 3 for a in output])
        assert_same_losses(theirs, ours, ssd_batch())

    def test_overridden_heads_and_hooks_are_used(self) -> None:
        theirs, ours = pair(small_ssd())
        plain = ours(*(batch := ssd_batch()))
        for model in (theirs, ours):
            head = model.head
            head.forward = MethodType(lambda self, x: {k: v * 0.7 for k, v in SSDHead.forward(self, x).items()}, head)
            head.classification_head.register_forward_hook(lambda module, args, output: output + 0.1)
        assert_same_losses(theirs, ours, batch)
        assert ours(*batch)["classification"] != plain["classification"]
        assert_same_detections(theirs, ours, batch[0])


class TestDeviations:
    def test_positives_do_not_count_twice_when_negatives_are_few(self, monkeypatch) -> None:
        theirs, ours = pair(small_ssd())
        for model in (theirs, ours):
            model.proposal_matcher = SSDMatcher(0.05)  # nearly every default box is positive
        images, targets = ssd_batch((40,))
        _, matches = assignments(theirs, ours, (images, targets), monkeypatch)
        assert (matches >= 0).sum() * 3 > (matches < 0).sum()
        features = list(ours.backbone(ours.transform(images)[0].tensors).values())
        logits = ours.head(features)["cls_logits"][0]
        classes = torch.where(matches[0] >= 0, targets[0]["labels"][matches[0].clamp(min=0)], 0)
        expected = F.cross_entropy(logits, classes, reduction="sum") / (matches >= 0).sum()
        got = ours(images, targets)
        torch.testing.assert_close(got["classification"], expected, rtol=1e-5, atol=0)
        assert theirs(images, targets)["classification"] > 1.1 * expected

    @pytest.mark.parametrize("label", [-1, CLASSES])
    def test_ssd_label_out_of_range_raises(self, label: int) -> None:
        images, targets = ssd_batch()
        targets[2]["labels"][4] = label
        with pytest.raises(ValueError, match=rf"targets\[2\].* class ids in 0..{CLASSES - 1}, got {label}"):
            accelerate(plain_ssd())(images, targets)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_losses_of_infinite_and_nan_boxes_equal_torchvisions(self, value: float) -> None:
        images, targets = ssd_batch()
        targets[0]["boxes"][1, 2] = value
        for theirs, ours in zip(*(model(images, targets).values() for model in pair(small_ssd())), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0, equal_nan=True)

    def test_ssd_under_autocast_keeps_default_boxes_and_results_in_float32(self, monkeypatch) -> None:
        plain, ours = pair(small_ssd())
        batch = ssd_batch()
        expected, seen, assign = plain(*batch), [], ops.assign_targets
        monkeypatch.setattr(ops, "assign_targets", lambda *args, **opts: seen.append(args[0]) or assign(*args, **opts))
        with torch.autocast("cpu", torch.bfloat16):
            losses = ours(*batch)
            detections = ours.eval()(batch[0])
        torch.testing.assert_close(losses, expected, rtol=0.05, atol=0)
        assert all(value.dtype == torch.float32 for value in losses.values())
        assert all(image[key].dtype == torch.float32 for image in detections for key in ("boxes", "scores"))
        features = list(plain.backbone(plain.transform(batch[0])[0].tensors).values())
        assert torch.equal(seen[0], plain.anchor_generator(plain.transform(batch[0])[0], features)[0])

    def test_half_precision(self) -> None:
        plain, ours = pair(small_ssd())
        images, targets = ssd_batch()
        losses = ours.bfloat16()([image.bfloat16() for image in images], targets)
        torch.testing.assert_close(losses, plain(images, targets), rtol=0.1, atol=0)
        assert all(value.dtype == torch.float32 for value in losses.values())

    def test_equal_scores_are_ordered_by_class_then_default_box(self) -> None:
        ours = accelerate(copy.deepcopy(small_ssd(nms_thresh=1.0, topk_candidates=3, detections_per_img=8))).eval()
        for module in ours.head.classification_head.module_list:
            torch.nn.init.zeros_(module.weight)
        detections = ours(ssd_batch((1,))[0])[0]
        assert detections["labels"].tolist() == [1, 1, 1, 2, 2, 2, 3, 3]
        assert torch.equal(detections["boxes"][:2], detections["boxes"][3:5])

    def test_detections_of_an_ssd_have_no_gradient(self) -> None:
        detections = accelerate(plain_ssd()).eval()(ssd_batch((1,))[0])
        assert not any(value.requires_grad for value in detections[0].values())

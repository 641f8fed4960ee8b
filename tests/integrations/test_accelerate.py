"""An accelerated RetinaNet has the losses, gradients and detections of torchvision's own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import MethodType

import pytest
import torch
from accelerate_cases import (
    CLASSES,
    MODELS,
    SMALL_ANCHORS,
    assert_same_detections,
    assert_same_gradients,
    assert_same_losses,
    pair,
    random_batch,
    resnet18_model,
    small_model,
)
from torch import Tensor
from torchvision.models.detection import RetinaNet
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetClassificationHead, RetinaNetHead, RetinaNetRegressionHead

import retinanet_ops as ops
from retinanet_ops.integrations.torchvision import accelerate


class TestResults:
    @pytest.mark.parametrize("name", MODELS)
    def test_losses_and_detections_equal_torchvisions(self, name: str) -> None:
        theirs, ours = pair(MODELS[name]())
        for counts in ((5, 0, 30), (1, 12)):
            assert_same_losses(theirs, ours, random_batch(counts))
        assert all(
            torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items()
        )  # including the statistics of batch norm
        assert_same_detections(theirs, ours, random_batch((1, 1, 1))[0])

    @pytest.mark.parametrize("name", ["resnet18", "single map", "small"])
    def test_gradients_equal_torchvisions(self, name: str) -> None:
        assert_same_gradients(*pair(MODELS[name]()), random_batch())

    @pytest.mark.parametrize("kind", ["l1", "smooth_l1", "giou", "diou", "ciou"])
    def test_box_losses_and_coders(self, kind: str) -> None:
        theirs, ours = pair(small_model())
        for model in (theirs, ours):
            model.head.regression_head._loss_type = kind
        for weights, clip in (((1.0, 1.0, 1.0, 1.0), 4.0), ((10.0, 5.0, 2.0, 3.0), 0.1)):
            for model in (theirs, ours):
                for owner in (model, model.head.regression_head):
                    owner.box_coder.weights, owner.box_coder.bbox_xform_clip = weights, clip
            batch = random_batch()
            assert_same_losses(theirs, ours, batch)
            assert_same_gradients(theirs, ours, batch)
            assert_same_detections(*pair(theirs), batch[0])
            theirs.train(), ours.train()

    def test_losses_use_the_coder_of_the_head_and_detections_that_of_the_model(self) -> None:
        theirs, ours = pair(small_model())
        for model in (theirs, ours):
            model.head.regression_head.box_coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
        batch = random_batch()
        assert_same_losses(theirs, ours, batch)
        assert_same_detections(theirs, ours, batch[0])

    @pytest.mark.parametrize("seed", range(6))
    def test_post_processing_options(self, seed: int) -> None:
        torch.manual_seed(seed)
        theirs, ours = pair(small_model())
        for model in (theirs, ours):
            model.score_thresh = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3)[seed]
            model.nms_thresh = (0.5, 0.05, 0.3, 0.7, 0.9, 1.0)[seed]
            model.detections_per_img = (300, 7, 100, 40, 10**12, 3)[seed]  # no memory holds 10^12 slots
            model.topk_candidates = (1000, 50, 10**9, 3, 200, 10)[seed]
        assert_same_detections(theirs, ours, random_batch((1, 1, 1))[0], least=(300, 7, 100, 3, 200, 3)[seed])

    def test_no_detections(self) -> None:
        theirs, ours = pair(small_model(score_thresh=0.999))
        assert_same_detections(theirs, ours, random_batch((1, 1))[0], least=0)
        assert ours(random_batch((1,))[0])[0]["boxes"].shape == (0, 4)

    @pytest.mark.parametrize("low_quality", [True, False])
    def test_matcher_options(self, low_quality: bool) -> None:
        theirs, ours = pair(small_model())
        batch = random_batch()
        before = ours(*batch)
        for model in (theirs, ours):
            model.proposal_matcher = Matcher(0.4, 0.3, allow_low_quality_matches=low_quality)
        assert_same_losses(theirs, ours, batch)
        assert ours(*batch)["classification"] != before["classification"]

    def test_batch_without_boxes(self) -> None:
        theirs, ours = pair(small_model())
        batch = random_batch((0, 0))
        expected, got = theirs(*batch), ours(*batch)
        torch.testing.assert_close(got["classification"], expected["classification"], rtol=1e-5, atol=0)
        assert got["bbox_regression"] == expected["bbox_regression"] == 0
        sum(got.values()).backward()

    def test_train_and_eval_alternate(self) -> None:
        theirs, ours = pair(small_model())
        batch = random_batch()
        for _ in range(2):
            assert_same_losses(theirs.train(), ours.train(), batch)
            assert_same_detections(theirs, ours, batch[0])

    def test_random_training_sizes_equal_torchvisions(self) -> None:
        theirs, ours = pair(small_model(min_size=(64, 80, 96, 112)))
        batch = random_batch()
        for seed in range(4):
            losses = []
            for model in (theirs, ours):
                torch.manual_seed(seed)
                losses.append(model(*batch))
            torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


class Halved(RetinaNetClassificationHead):
    def forward(self, x: list[Tensor]) -> Tensor:
        return RetinaNetClassificationHead.forward(self, x) * 0.5


class Shifted(RetinaNetRegressionHead):
    def forward(self, x: list[Tensor]) -> Tensor:
        return super().forward(x) + 0.1


class Whole(RetinaNetHead):
    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        logits, deltas = super().forward(x).values()
        return {"cls_logits": logits + 0.3, "bbox_regression": deltas * 2, "more": logits}


class Centred(AnchorGenerator):
    def grid_anchors(self, grid_sizes: list[list[int]], strides: list[list[Tensor]]) -> list[Tensor]:
        anchors = super().grid_anchors(grid_sizes, strides)
        return [a + torch.stack((x, y, x, y)) / 2 for a, (y, x) in zip(anchors, strides, strict=True)]


class Fractional(AnchorGenerator):
    def generate_anchors(self, *args: object, **kwargs: object) -> Tensor:
        return super().generate_anchors(*args, **kwargs) * 1.037


def override_classification(model: RetinaNet) -> None:
    model.head.classification_head.__class__ = Halved


def override_regression(model: RetinaNet) -> None:
    model.head.regression_head.__class__ = Shifted


def override_head(model: RetinaNet) -> None:
    model.head.__class__ = Whole


def set_forward(model: RetinaNet) -> None:
    head = model.head.classification_head
    head.forward = MethodType(Halved.forward, head)


def hook_head(model: RetinaNet) -> None:
    model.head.register_forward_hook(lambda module, args, output: {k: v * 0.7 for k, v in output.items()})


def hook_input(model: RetinaNet) -> None:
    model.head.regression_head.register_forward_pre_hook(lambda module, args: ([x * 2 for x in args[0]],))


class TestHeads:
    CHANGES = (override_classification, override_regression, override_head, set_forward, hook_head, hook_input)

    @pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
    def test_overridden_forwards_and_hooks_are_used(self, change: Callable[[RetinaNet], None]) -> None:
        plain, model = small_model(), small_model()
        plain.load_state_dict(model.state_dict())
        theirs = copy.deepcopy(model)
        change(theirs), change(model)
        ours = accelerate(model)
        batch = random_batch()
        assert_same_losses(theirs, ours, batch)
        assert sum(ours(*batch).values()) != sum(plain(*batch).values())
        assert_same_gradients(theirs, ours, batch)
        assert_same_detections(theirs, ours, batch[0])

    def test_head_overridden_after_accelerate(self) -> None:
        theirs, ours = pair(small_model())
        override_classification(theirs), override_classification(ours)
        assert_same_losses(theirs, ours, random_batch())

    @pytest.mark.filterwarnings("ignore:Full backward hook")  # the input, a list of maps, has no gradient for the hook
    def test_backward_hook_and_compiled_head_are_called(self) -> None:
        ours = accelerate(small_model())
        calls = []
        ours.head.classification_head.register_full_backward_hook(lambda *args: calls.append("backward"))
        ours.head.regression_head._compiled_call_impl = lambda x: (
            calls.append("compiled") or RetinaNetRegressionHead.forward(ours.head.regression_head, x)
        )
        sum(ours(*random_batch()).values()).backward()
        assert calls == ["compiled", "backward"]

    def test_torchvisions_heads_pass_their_own_tensors(self, monkeypatch) -> None:
        seen = spy_on(monkeypatch, "dense_focal_loss")
        accelerate(resnet18_model())(*random_batch())
        sizes = [(16, 20), (8, 10), (4, 5), (2, 3), (1, 2)]
        assert [tuple(level.shape[1:]) for level in seen[0]] == [(9 * CLASSES, h, w) for h, w in sizes]
        assert all(level.grad_fn.name() == "ConvolutionBackward0" for level in seen[0])

    def test_rows_of_other_heads_reach_the_ops_as_channels_last(self, monkeypatch) -> None:
        losses, detections, rows = spy_on(monkeypatch, "dense_focal_loss"), spy_on(monkeypatch, "detect"), []
        ours = accelerate(small_model())
        ours.head.classification_head.register_forward_hook(lambda module, args, output: rows.append(output))
        ours(*random_batch())
        ours.eval()(random_batch()[0])
        assert [level.data_ptr() for level in losses[0]] == [rows[0].data_ptr()]  # without a copy
        assert [tuple(level.shape[1:]) for level in detections[0]] == [(6 * CLASSES, n, n + n // 4) for n in (16, 8, 4)]
        for level in (*losses[0], *detections[0]):
            _, c, h, w = level.shape
            assert level.stride() == (h * w * c, 1, w * c, c)


def spy_on(monkeypatch, name: str) -> list[object]:
    """Return a list that collects the first argument of every call of an op."""
    seen, original = [], getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *args, **options: seen.append(args[0]) or original(*args, **options))
    return seen


class TestAnchors:
    def anchors_of(self, model: RetinaNet, monkeypatch) -> tuple[object, Tensor]:
        """Return the anchors that the ops receive, and those that torchvision's generator returns."""
        seen, theirs = spy_on(monkeypatch, "assign_targets"), []
        ours = accelerate(copy.deepcopy(model))
        model.anchor_generator.register_forward_hook(lambda module, args, output: theirs.append(torch.stack(output)))
        batch = random_batch()
        assert_same_losses(model, ours, batch)
        assert_same_detections(model, ours, batch[0])
        return seen[0], theirs[0]

    @pytest.mark.parametrize("generator", [None, AnchorGenerator, Fractional])
    def test_grid_equals_torchvisions_anchors(self, generator: type[AnchorGenerator] | None, monkeypatch) -> None:
        # The upper levels of resnet18_model have different strides in y and x, which do not divide the image size.
        model = small_model(anchor_generator=generator(*SMALL_ANCHORS)) if generator else resnet18_model()
        ours, theirs = self.anchors_of(model, monkeypatch)
        assert isinstance(ours, ops.AnchorGrid)
        assert all(torch.equal(ours.boxes(), image) for image in theirs)

    def test_other_generators_are_called(self, monkeypatch) -> None:
        anchors = Centred(*SMALL_ANCHORS)
        ours, theirs = self.anchors_of(small_model(anchor_generator=anchors), monkeypatch)
        assert torch.equal(ours, theirs)

    def test_hook_of_the_generator_is_called(self) -> None:
        theirs, ours = pair(small_model())
        for model in (theirs, ours):
            model.anchor_generator.register_forward_hook(lambda module, args, output: [a + 3 for a in output])
        assert_same_losses(theirs, ours, random_batch())

    def test_generator_set_later(self) -> None:
        theirs, ours = pair(small_model())
        for model in (theirs, ours):
            model.anchor_generator = AnchorGenerator(((10, 20), (30, 40), (50, 60)), ((0.4, 1.0, 1.5),) * 3)
        assert_same_losses(theirs, ours, random_batch())

    def test_wrong_number_of_levels(self) -> None:
        ours = accelerate(small_model())
        ours.anchor_generator = AnchorGenerator(((16, 24),), ((0.5, 1.0, 2.0),))
        with pytest.raises(AssertionError, match="Anchors should be"):
            ours(*random_batch())


class TestDeviations:
    def test_box_that_overlaps_no_anchor_has_no_positives(self) -> None:
        generator = AnchorGenerator(((4,), (4,), (4,)), ((1.0,),) * 3)
        theirs, ours = pair(small_model(anchor_generator=generator, _skip_resize=True))
        # Anchors are 4 x 4 boxes centred on multiples of 8, so none overlaps the box.
        batch = [torch.rand(3, 64, 64)], [{"boxes": torch.tensor([[3.0, 3, 5, 5]]), "labels": torch.tensor([1])}]
        assert theirs(*batch)["bbox_regression"] > 1
        assert ours(*batch)["bbox_regression"] == 0
        torch.testing.assert_close(
            ours(*batch)["classification"],
            theirs(batch[0], [{"boxes": torch.empty(0, 4), "labels": torch.empty(0).long()}])["classification"],
        )

    @pytest.mark.parametrize("label", [-1, CLASSES])
    def test_label_out_of_range_raises(self, label: int) -> None:
        images, targets = random_batch()
        targets[2]["labels"][4] = label
        with pytest.raises(ValueError, match=rf"targets\[2\].* class ids in 0..{CLASSES - 1}, got {label}"):
            accelerate(small_model())(images, targets)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_losses_of_infinite_and_nan_boxes_equal_torchvisions(self, value: float) -> None:
        images, targets = random_batch()
        targets[0]["boxes"][1, 2] = value
        for theirs, ours in zip(*(model(images, targets).values() for model in pair(small_model())), strict=True):
            assert torch.equal(theirs.isnan(), ours.isnan())
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0, equal_nan=True)

    def test_no_limit_of_detections(self) -> None:
        theirs, ours = pair(small_model(score_thresh=0.3))
        theirs.detections_per_img = ours.detections_per_img = None
        assert_same_detections(theirs, ours, random_batch((1, 1, 1))[0])

    def test_detections_have_no_gradient(self) -> None:
        detections = accelerate(small_model()).eval()(random_batch((1,))[0])
        assert not any(value.requires_grad for value in detections[0].values())

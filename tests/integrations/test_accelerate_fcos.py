"""An accelerated FCOS has the assignments, losses, gradients and detections of torchvision's own."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from types import MethodType

import pytest
import torch
from accelerate_cases import CLASSES, assert_same_detections, assert_same_gradients, pair
from fcos_cases import MODELS, POINTS, assert_same_losses, default_model, random_batch, small_model
from torch import Tensor
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead

import retinanet_ops as ops
from retinanet_ops.integrations.torchvision import accelerate

#: Number of random batches: PARITY_BATCHES=50 tries many.
BATCHES = int(os.environ.get("PARITY_BATCHES", 3))


def assignments_of(theirs: FCOS, monkeypatch) -> tuple[list[Tensor], list[Tensor]]:
    """Return two lists that collect the assignments of every batch: torchvision's and ours."""
    expected, got = [], []
    compute_loss, assign_points = theirs.head.compute_loss, ops.assign_points

    def recorded_loss(targets, outputs, anchors, matches):
        expected.append(torch.stack(matches))
        return compute_loss(targets, outputs, anchors, matches)

    def recorded_points(*args, **options):
        targets = assign_points(*args, **options)
        got.append(targets.matches.long())
        return targets

    theirs.head.compute_loss = recorded_loss
    monkeypatch.setattr(ops, "assign_points", recorded_points)
    return expected, got


class TestResults:
    @pytest.mark.parametrize("name", MODELS)
    def test_losses_and_detections_equal_torchvisions(self, name: str) -> None:
        theirs, ours = pair(MODELS[name]())
        for counts in ((5, 0, 30), (1, 12), (100, 3), (0, 0)):
            assert_same_losses(theirs, ours, random_batch(counts))
        assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
        assert_same_detections(theirs, ours, random_batch((1, 1, 1))[0])

    @pytest.mark.parametrize("seed", range(BATCHES))
    def test_random_batches(self, seed: int, monkeypatch) -> None:
        torch.manual_seed(seed)
        theirs, ours = pair(default_model() if seed % 2 else small_model())
        expected, got = assignments_of(theirs, monkeypatch)
        batch = random_batch(tuple(torch.randint(0, 101, (3,)).tolist()))
        assert_same_losses(theirs, ours, batch)
        assert torch.equal(got[0], expected[0]) and (got[0] >= 0).any()
        del theirs.head.compute_loss
        assert_same_gradients(theirs, ours, batch)
        # The padding of a batch has equal scores, of which any may be the last that torchvision returns.
        theirs.detections_per_img = ours.detections_per_img = 10_000
        assert_same_detections(theirs, ours, batch[0])

    def test_boxes_of_equal_area_go_to_the_same_object(self, monkeypatch) -> None:
        theirs, ours = pair(small_model(min_size=128, max_size=128))
        expected, got = assignments_of(theirs, monkeypatch)
        corner = torch.randint(0, 24, (40, 2)) * 4.0
        boxes = torch.cat((corner, corner + 8 * torch.randint(1, 4, (40, 1))), dim=1)
        batch = [torch.rand(3, 128, 128)], [{"boxes": boxes, "labels": torch.randint(0, CLASSES, (40,))}]
        assert_same_losses(theirs, ours, batch)
        assert torch.equal(got[0], expected[0])

    @pytest.mark.parametrize("radius", [0.0, 0.5, 3.0, float("inf")])
    def test_radius_of_centre_sampling(self, radius: float, monkeypatch) -> None:
        theirs, ours = pair(small_model(center_sampling_radius=radius))
        expected, got = assignments_of(theirs, monkeypatch)
        batch = random_batch()
        torch.testing.assert_close(ours(*batch), theirs(*batch), rtol=1e-5, atol=0)
        assert torch.equal(got[0], expected[0]) and (got[0] >= 0).any() == (radius > 0)

    def test_distances_in_pixels(self) -> None:
        theirs, ours = pair(small_model())
        for model in (theirs, ours):
            model.box_coder.normalize_by_size = model.head.box_coder.normalize_by_size = False
            torch.nn.init.constant_(model.head.regression_head.bbox_reg.bias, 12.0)
        batch = random_batch()
        assert_same_losses(theirs, ours, batch)
        assert_same_gradients(theirs, ours, batch)
        assert_same_detections(theirs, ours, batch[0])

    def test_losses_use_the_coder_of_the_head_and_detections_that_of_the_model(self) -> None:
        theirs, ours = pair(small_model())
        for model in (theirs, ours):
            model.head.box_coder.normalize_by_size = False
        batch = random_batch()
        assert_same_losses(theirs, ours, batch)
        assert_same_detections(theirs, ours, batch[0])

    @pytest.mark.parametrize("seed", range(5))
    def test_post_processing_options(self, seed: int) -> None:
        torch.manual_seed(seed)
        theirs, ours = pair(small_model())
        for model in (theirs, ours):
            model.score_thresh = (0.0, 0.01, 0.1, 0.2, 0.3)[seed]
            model.nms_thresh = (0.5, 0.05, 0.3, 0.7, 1.0)[seed]
            model.detections_per_img = (300, 7, 100, 10**12, 3)[seed]  # no memory holds 10^12 slots
            model.topk_candidates = (1000, 50, 10**9, 30, 10)[seed]
        assert_same_detections(theirs, ours, random_batch((1, 1, 1))[0], least=(300, 7, 100, 20, 3)[seed])

    def test_no_detections_and_no_limit(self) -> None:
        theirs, ours = pair(small_model(score_thresh=0.999))
        assert_same_detections(theirs, ours, random_batch((1, 1))[0], least=0)
        assert ours(random_batch((1,))[0])[0]["boxes"].shape == (0, 4)
        for model in (theirs, ours):
            model.score_thresh, model.detections_per_img = 0.3, None
        assert_same_detections(theirs, ours, random_batch((1, 1))[0])

    def test_a_negative_number_of_detections_is_refused(self) -> None:
        _, ours = pair(small_model(detections_per_img=-1))
        with pytest.raises(ValueError, match="accelerate: model.detections_per_img must not be negative, got -1"):
            ours.eval()(random_batch((1,))[0])

    def test_logits_beyond_the_range_of_the_sigmoid(self) -> None:
        model = small_model(score_thresh=0.0)
        torch.nn.init.constant_(model.head.regression_head.bbox_ctrness.bias, 200.0)  # a probability of 1
        model.head.classification_head.cls_logits.bias.data[1] = -200.0  # of 0
        assert_same_detections(*pair(model), random_batch((1, 1))[0])

    def test_random_training_sizes_equal_torchvisions(self) -> None:
        theirs, ours = pair(small_model(min_size=(96, 112, 128)))
        batch = random_batch()
        for seed in range(3):
            losses = []
            for model in (theirs, ours):
                torch.manual_seed(seed)
                losses.append(model(*batch))
            torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)

    def test_detections_have_no_gradient(self) -> None:
        detections = accelerate(small_model()).eval()(random_batch((1,))[0])
        assert not any(value.requires_grad for value in detections[0].values())

    def test_outputs_of_background_do_not_reach_the_gradient(self) -> None:
        class Broken(FCOSRegressionHead):
            def forward(self, x: list[Tensor]) -> tuple[Tensor, Tensor]:
                distances, centreness = super().forward(x)
                bad = torch.zeros_like(centreness)
                bad[:, 0] = float("nan")  # the point in the corner of the image takes no part
                return distances + bad, centreness + bad

        theirs, ours = pair(small_model())
        for model in (theirs, ours):
            model.head.regression_head.__class__ = Broken
        images, _ = random_batch((1,))
        batch = images, [{"boxes": torch.tensor([[30.0, 30, 70, 80]]), "labels": torch.tensor([1])}]
        assert_same_losses(theirs, ours, batch)
        sum(ours(*batch).values()).backward()
        assert all(p.grad.isfinite().all() for p in ours.head.classification_head.parameters())
        sum(theirs(*batch).values()).backward()
        finite = [p.grad.isfinite().all() for p in theirs.parameters()]
        assert [p.grad.isfinite().all() for p in ours.parameters()] == finite


class Halved(FCOSClassificationHead):
    def forward(self, x: list[Tensor]) -> Tensor:
        return FCOSClassificationHead.forward(self, x) * 0.5


class Shifted(FCOSRegressionHead):
    def forward(self, x: list[Tensor]) -> tuple[Tensor, Tensor]:
        distances, centreness = super().forward(x)
        return distances + 0.1, centreness * 2


class Whole(FCOSHead):
    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        outputs = super().forward(x)
        outputs["bbox_regression"] = outputs["bbox_regression"] * 1.5
        return {"more": outputs["cls_logits"], **outputs}


def override_classification(model: FCOS) -> None:
    model.head.classification_head.__class__ = Halved


def override_regression(model: FCOS) -> None:
    model.head.regression_head.__class__ = Shifted


def override_head(model: FCOS) -> None:
    model.head.__class__ = Whole


def set_forward(model: FCOS) -> None:
    head = model.head.classification_head
    head.forward = MethodType(Halved.forward, head)


def hook_head(model: FCOS) -> None:
    model.head.register_forward_hook(lambda module, args, output: {k: v * 0.7 for k, v in output.items()})


def hook_input(model: FCOS) -> None:
    model.head.regression_head.register_forward_pre_hook(lambda module, args: ([x * 2 for x in args[0]],))


class TestHeads:
    CHANGES = (override_classification, override_regression, override_head, set_forward, hook_head, hook_input)

    @pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
    def test_overridden_forwards_and_hooks_are_used(self, change: Callable[[FCOS], None]) -> None:
        plain = small_model()
        theirs, ours = pair(copy.deepcopy(plain))
        change(theirs), change(ours)
        batch = random_batch()
        assert_same_losses(theirs, ours, batch)
        assert sum(ours(*batch).values()) != sum(plain(*batch).values())
        assert_same_gradients(theirs, ours, batch)
        assert_same_detections(theirs, ours, batch[0])

    def test_torchvisions_heads_pass_their_own_tensors(self, monkeypatch) -> None:
        seen, original = [], ops.dense_focal_loss
        monkeypatch.setattr(ops, "dense_focal_loss", lambda *args, **options: seen.append(args[0]) or original(*args))
        accelerate(small_model())(*random_batch())
        assert len(seen[0]) == 3 and all(level.grad_fn.name() == "ConvolutionBackward0" for level in seen[0])


class Centred(AnchorGenerator):
    def grid_anchors(self, grid_sizes: list[list[int]], strides: list[list[Tensor]]) -> list[Tensor]:
        anchors = super().grid_anchors(grid_sizes, strides)
        return [a + torch.stack((x, y, x, y)) / 2 for a, (y, x) in zip(anchors, strides, strict=True)]


class TestAnchors:
    @pytest.mark.parametrize("generator", [AnchorGenerator, Centred])
    def test_points_are_those_of_the_generator(self, generator: type[AnchorGenerator], monkeypatch) -> None:
        theirs, ours = pair(small_model(anchor_generator=generator(*POINTS)))
        seen, original = [], ops.assign_points
        monkeypatch.setattr(ops, "assign_points", lambda *args, **kw: seen.append(args[0]) or original(*args, **kw))
        batch = random_batch()
        assert_same_losses(theirs, ours, batch)
        assert_same_detections(theirs, ours, batch[0])
        assert isinstance(seen[0], ops.AnchorGrid) == (generator is AnchorGenerator)

    def test_generator_set_later(self) -> None:
        theirs, ours = pair(small_model())
        for model in (theirs, ours):
            model.anchor_generator = AnchorGenerator(((10,), (30,), (50,)), ((0.5,), (1.0,), (2.0,)))
        assert_same_losses(theirs, ours, random_batch())

    def test_wrong_number_of_levels(self) -> None:
        ours = accelerate(small_model())
        ours.anchor_generator = AnchorGenerator(((16,),), ((1.0,),))
        with pytest.raises(AssertionError, match="Anchors should be"):
            ours(*random_batch())

    def test_several_anchors_in_a_cell_raise(self) -> None:
        ours = accelerate(small_model())
        ours.anchor_generator = AnchorGenerator(((8, 10), (16, 20), (32, 40)), ((1.0,),) * 3)
        with pytest.raises(ValueError, match=r"anchor_generator must make one anchor for each of the \d+ cells, got"):
            ours(*random_batch())

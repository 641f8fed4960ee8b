"""An accelerated R-CNN remains the same model, names what it would bypass, and differs only where the docs say so."""

from __future__ import annotations

import copy
import functools
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate_cases import Pyramid
from rcnn_cases import (
    assert_same_detections,
    assert_same_training,
    pair,
    plain_rcnn,
    random_batch,
    run,
    small_rcnn,
)
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection import FasterRCNN, _utils, fasterrcnn_mobilenet_v3_large_320_fpn, rpn
from torchvision.models.detection._utils import BoxCoder, Matcher, SSDMatcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import boxes

import retinanet_ops as ops
from retinanet_ops.integrations.torchvision import accelerate, restore


class Labelled(FasterRCNN):
    """A client's subclass that overrides `forward`, which is not bypassed."""

    label = "tree"

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        return super().forward(images, targets), self.label


def modules_of(model: Any) -> list[Any]:
    return [model, model.rpn, model.roi_heads]


def calls_of(monkeypatch, name: str) -> list[str]:
    """Return a list that grows with every call of an op."""
    calls, original = [], getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *args, **options: calls.append(name) or original(*args, **options))
    return calls


class TestModel:
    def test_accelerate_and_restore_change_only_the_classes(self) -> None:
        model = plain_rcnn()
        before = [dict(vars(module)) for module in modules_of(model)]
        keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
        ours = accelerate(model)
        names = ["AcceleratedFasterRCNN", "AcceleratedRegionProposalNetwork", "AcceleratedRoIHeads"]
        assert ours is model and [type(module).__name__ for module in modules_of(ours)] == names
        assert accelerate(ours) is ours and [vars(module) for module in modules_of(ours)] == before
        assert list(ours.state_dict()) == keys and [id(p) for p in ours.parameters()] == parameters
        assert restore(ours) is model and [vars(module) for module in modules_of(ours)] == before
        assert [type(module) for module in modules_of(model)] == [FasterRCNN, RegionProposalNetwork, RoIHeads]
        assert restore(model) is model

    def test_restored_model_equals_torchvisions(self) -> None:
        theirs, ours = pair(plain_rcnn())
        batch = random_batch()
        run(ours, *batch)
        expected, got = run(theirs, *batch), run(restore(ours), *batch)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)

    def test_file_loads_in_a_fresh_process(self, tmp_path) -> None:
        ours = accelerate(fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)).eval()
        ours.roi_heads.score_thresh = 0.0
        images = random_batch((1,))[0]
        torch.save((ours, images, ours(images)[0]["boxes"]), tmp_path / "model.pt")
        program = """
import sys, torch
model, images, boxes = torch.load(sys.argv[1], weights_only=False)
assert "retinanet_ops.integrations.torchvision" in sys.modules
names = [type(module).__name__ for module in (model, model.rpn, model.roi_heads)]
assert names == ["AcceleratedFasterRCNN", "AcceleratedRegionProposalNetwork", "AcceleratedRoIHeads"], names
assert len(boxes) == 100
torch.testing.assert_close(model(images)[0]["boxes"], boxes, rtol=0, atol=1e-3)
from retinanet_ops.integrations.torchvision import restore
assert type(restore(model).rpn).__module__ == "torchvision.models.detection.rpn"
"""
        subprocess.run([sys.executable, "-c", program, str(tmp_path / "model.pt")], check=True)

    def test_pickle_and_copies(self) -> None:
        ours = accelerate(plain_rcnn(Labelled))
        batch = random_batch()
        expected = run(ours, *batch)
        for copied in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
            assert [type(module) for module in modules_of(copied)] == [type(module) for module in modules_of(ours)]
            torch.testing.assert_close(run(copied, *batch)[0], expected[0], rtol=0, atol=0)
            restore(copied)
        assert type(ours.rpn).__name__ == "AcceleratedRegionProposalNetwork"
        shallow = copy.copy(ours)
        assert type(shallow) is type(ours) and shallow.rpn is ours.rpn

    def test_subclass_that_overrides_forward(self) -> None:
        theirs, ours = pair(small_rcnn(Labelled))
        assert isinstance(ours, Labelled)
        (expected, _), (got, label) = run(theirs, *(batch := random_batch())), run(ours, *batch)
        assert label == "tree"
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
        assert type(restore(ours)) is Labelled

    @pytest.mark.filterwarnings("ignore")
    def test_script_and_trace_compile_torchvisions_methods(self) -> None:
        theirs, ours = (model.eval() for model in pair(plain_rcnn()))
        for model in (theirs, ours):
            model.roi_heads.score_thresh = 0.0
        images = random_batch((1,))[0]
        expected = theirs(images)[0]
        assert len(expected["boxes"]) == 100
        assert torch.equal(torch.jit.script(ours)(images)[1][0]["boxes"], expected["boxes"])
        assert [type(module).__name__[:11] for module in modules_of(ours)] == ["Accelerated"] * 3

        class Boxes(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = ours

            def forward(self, image: Tensor) -> Tensor:
                return self.model([image])[0]["boxes"]

        assert torch.equal(torch.jit.trace(Boxes(), images, check_trace=False)(images[0]), expected["boxes"])

    def test_compile(self) -> None:
        theirs, ours = pair(small_rcnn())
        batch = random_batch((3, 2))
        torch.testing.assert_close(
            run(torch.compile(ours, backend="eager"), *batch), run(theirs, *batch), rtol=1e-5, atol=1e-7
        )

    def test_distributed_data_parallel(self, tmp_path, monkeypatch) -> None:
        calls = calls_of(monkeypatch, "match_anchors")
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path / 'group'}")
        try:
            sum(nn.parallel.DistributedDataParallel(accelerate(plain_rcnn()))(*random_batch()).values()).backward()
        finally:
            torch.distributed.destroy_process_group()
        assert calls == ["match_anchors"] * 2  # anchors and proposals

    def test_half_precision(self) -> None:
        plain, ours = pair(small_rcnn())
        images, targets = random_batch()
        images = [image.half() for image in images]
        proposals = []
        ours.half().rpn.register_forward_hook(lambda module, args, output: proposals.extend(output[0]))
        losses, expected = run(ours, images, targets), run(plain, [image.float() for image in images], targets)
        for name in ("loss_objectness", "loss_rpn_box_reg"):  # those of the RoI heads depend on the sampled proposals
            torch.testing.assert_close(losses[name], expected[name], rtol=0.05, atol=0)
        assert all(image.dtype == torch.float16 for image in proposals)
        detections = ours.eval()(images)[0]
        assert len(detections["boxes"]) > 20 and detections["boxes"].dtype == detections["scores"].dtype == torch.half

    def test_synchronises_with_the_device_once_per_batch_for_each_size_that_depends_on_data(self) -> None:
        class Count(TorchDispatchMode):
            calls: list[str] = []

            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                depends = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
                by_number = func is torch.ops.aten.index.Tensor and all(i.dtype == torch.int64 for i in args[1])
                if depends and not by_number:
                    self.calls.append(str(func))
                return func(*args, **(kwargs or {}))

        ours = accelerate(small_rcnn()).eval()
        logits, deltas = torch.randn(60, 6) * 3, torch.randn(60, 24)
        corner = torch.rand(3, 20, 2) * 60
        proposals = list(torch.cat((corner, corner + 20), 2))
        with Count() as count:
            detections = ours.roi_heads.postprocess_detections(logits, deltas, proposals, [(96, 96)] * 3)
        assert count.calls == ["aten.nonzero.default"] and all(len(image) for image in detections[0])


class TestParts:
    def test_part_of_a_model(self) -> None:
        theirs = small_rcnn()
        for name in ("rpn", "roi_heads"):
            ours = copy.deepcopy(theirs)
            part = getattr(ours, name)
            assert accelerate(part) is part and type(ours) is FasterRCNN
            assert_same_training(theirs, ours, random_batch())
            assert type(restore(part)) is type(getattr(theirs, name))

    @pytest.mark.parametrize("name", ["rpn", "roi_heads"])
    def test_other_classes_are_refused(self, name: str) -> None:
        model = plain_rcnn()
        setattr(model, name, nn.Identity())
        kind = {"rpn": "RegionProposalNetwork", "roi_heads": "RoIHeads"}[name]
        with pytest.raises(
            TypeError, match=rf"accelerate: model.{name} must be a torchvision {kind}, got Identity; pass"
        ):
            accelerate(model)
        assert type(model) is FasterRCNN

    @pytest.mark.parametrize("name", ["rpn", "roi_heads"])
    def test_replaced_part_warns_and_can_be_accelerated(self, name: str) -> None:
        ours = accelerate(plain_rcnn())
        with pytest.warns(UserWarning, match=rf"model.{name} was replaced .* Call accelerate\(\) again"):
            setattr(ours, name, getattr(plain_rcnn(), name))
        accelerate(ours)
        assert [type(module).__name__[:11] for module in modules_of(ours)] == ["Accelerated"] * 3
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            setattr(ours, name, checkpoint_wrapper(getattr(ours, name)))
            accelerate(ours)
            restore(ours)
        assert not any(type(module).__name__.startswith("Accelerated") for module in ours.modules())

    @pytest.mark.parametrize("wrapper", [checkpoint_wrapper, functools.partial(torch.compile, backend="eager")])
    def test_wrapped_parts(self, wrapper: Callable[[nn.Module], nn.Module]) -> None:
        theirs = small_rcnn()
        ours = copy.deepcopy(theirs)
        ours.rpn, ours.roi_heads = wrapper(ours.rpn), wrapper(ours.roi_heads)
        batch = random_batch()
        torch.testing.assert_close(run(accelerate(ours), *batch), run(theirs, *batch), rtol=1e-5, atol=1e-7)
        assert_same_detections(theirs, ours, batch[0])

    def test_replaced_methods_warn(self) -> None:
        ours = accelerate(plain_rcnn())
        with pytest.warns(UserWarning, match="model.roi_heads.postprocess_detections was replaced"):
            ours.roi_heads.postprocess_detections = lambda *args: ([], [], [])
        with pytest.warns(UserWarning, match="model.rpn.forward was replaced"):
            ours.rpn.forward = lambda *args: ([], {})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours.forward = lambda *args: "forward of the client"
            ours.roi_heads.forward = ours.roi_heads.forward
        assert ours() == "forward of the client"


def override(path: str, method: str) -> Callable[[FasterRCNN], None]:
    """Return a function that gives a part of a model a subclass `Own`, which overrides the method."""

    def change(model: FasterRCNN) -> None:
        part = functools.reduce(getattr, path.split("."), model)
        base = type(part)
        part.__class__ = type("Own", (base,), {method: lambda self, *args: getattr(base, method)(self, *args)})

    return change


def set_similarity(model: FasterRCNN) -> None:
    model.rpn.box_similarity = boxes.generalized_box_iou


def set_matcher(model: FasterRCNN) -> None:
    model.roi_heads.proposal_matcher = SSDMatcher(0.5)


def wrapped(function: Callable) -> Callable:
    """Wrap a function as a decorator that logs or times does."""

    @functools.wraps(function)
    def wrapper(*args: object, **options: object) -> object:
        return function(*args, **options)

    return wrapper


class TestRefusals:
    CASES = [
        (override("rpn", "filter_proposals"), "model.rpn.filter_proposals must be torchvision's own Region"),
        (override("rpn", "_get_top_n_idx"), "model.rpn._get_top_n_idx must"),
        (override("rpn", "assign_targets_to_anchors"), "model.rpn.assign_targets_to_anchors must .* got that of Own"),
        (override("rpn", "compute_loss"), "model.rpn.compute_loss must"),
        (override("rpn.box_coder", "decode_single"), "model.rpn.box_coder.decode_single must be torchvision's own"),
        (override("rpn.box_coder", "encode"), "model.rpn.box_coder.encode must be torchvision's own BoxCoder.encode"),
        (override("rpn.proposal_matcher", "__call__"), "model.rpn.proposal_matcher.__call__ must"),
        (override("roi_heads.box_coder", "decode"), "model.roi_heads.box_coder.decode must"),
        (override("roi_heads.proposal_matcher", "__call__"), "model.roi_heads.proposal_matcher.__call__ must"),
        (set_similarity, "model.rpn.box_similarity must be box_iou of torchvision or retinanet_ops"),
        (set_matcher, "model.roi_heads.proposal_matcher.__call__ must .* got that of SSDMatcher"),
    ]
    BEFORE = [
        (override("rpn", "forward"), "model.rpn.forward must be torchvision's own RegionProposalNetwork.forward"),
        (override("roi_heads", "assign_targets_to_proposals"), "model.roi_heads.assign_targets_to_proposals must"),
        (override("roi_heads", "postprocess_detections"), "model.roi_heads.postprocess_detections must .* of Own"),
    ]

    @pytest.mark.parametrize(("change", "message"), CASES + BEFORE)
    def test_names_the_override_that_would_be_bypassed(self, change: Callable, message: str) -> None:
        model = plain_rcnn()
        change(model)
        own = [type(module) for module in modules_of(model)]
        with pytest.raises(ValueError, match=f"accelerate: .*{message}"):
            accelerate(model)
        assert [type(module) for module in modules_of(model)] == own

    @pytest.mark.parametrize(("change", "message"), CASES)
    def test_names_an_override_made_after_accelerate(self, change: Callable, message: str) -> None:
        ours = accelerate(plain_rcnn())
        change(ours)
        with pytest.raises(ValueError, match=message):  # in the mode that would bypass it
            ours(*random_batch())
            ours.eval()(random_batch()[0])

    METHODS = (
        (RegionProposalNetwork, "forward", True),
        (RegionProposalNetwork, "filter_proposals", False),
        (RoIHeads, "assign_targets_to_proposals", True),
        (RoIHeads, "postprocess_detections", False),
        (BoxCoder, "decode_single", False),
        (Matcher, "set_low_quality_matches_", True),
    )
    FUNCTIONS = (
        (rpn, "concat_box_prediction_layers", False),
        (rpn, "permute_and_flatten", True),
        (_utils, "_topk_min", False),
        (_utils, "encode_boxes", True),
        (boxes, "remove_small_boxes", False),
        (boxes, "clip_boxes_to_image", False),
        (boxes, "batched_nms", False),
        (boxes, "box_iou", True),
    )

    @pytest.mark.parametrize(("owner", "name", "training"), METHODS)
    def test_patched_methods_are_named(self, owner: type, name: str, training: bool, monkeypatch) -> None:
        ours = accelerate(plain_rcnn())
        monkeypatch.setattr(owner, name, wrapped(getattr(owner, name)))
        for action in (lambda: ours.train(training)(*random_batch()), lambda: accelerate(plain_rcnn())):
            with pytest.raises(ValueError, match=f"{name} must be .* got a function patched into {owner.__name__}"):
                action()

    @pytest.mark.parametrize(("module", "name", "training"), FUNCTIONS)
    def test_patched_functions_are_named(self, module: ModuleType, name: str, training: bool, monkeypatch) -> None:
        ours = accelerate(plain_rcnn())
        monkeypatch.setattr(module, name, wrapped(getattr(module, name)))
        for action in (lambda: ours.train(training)(*random_batch()), lambda: accelerate(plain_rcnn())):
            with pytest.raises(ValueError, match=rf"{module.__name__}.{name} must be torchvision's own.*; undo"):
                action()

    def test_our_own_functions_are_accepted(self, monkeypatch) -> None:
        for name in ("box_iou", "batched_nms", "nms", "clip_boxes_to_image"):
            monkeypatch.setattr(boxes, name, getattr(ops, name))
        ours = accelerate(plain_rcnn())  # its box_similarity is ours, too
        ours(*random_batch())
        ours.eval()(random_batch()[0])

    def test_targets_are_required_in_training(self) -> None:
        for model in pair(plain_rcnn()):
            images = torch.zeros(1, 3, 96, 96)
            features = model.backbone(images)
            with pytest.raises(ValueError, match="targets should not be None"):
                model.rpn(_image_list(images), features)


def _image_list(images: Tensor) -> ImageList:
    return ImageList(images, [(96, 96)])


class TestDeviations:
    def test_object_that_overlaps_no_anchor_has_no_positive_anchor(self) -> None:
        generator = AnchorGenerator(((4,), (4,), (4,)), ((1.0,),) * 3)
        theirs, ours = pair(small_rcnn(rpn_anchor_generator=generator, _skip_resize=True))
        # Anchors are 4 x 4 boxes centred on multiples of 8, so none overlaps the box.
        batch = [torch.rand(3, 64, 64)], [{"boxes": torch.tensor([[3.0, 3, 5, 5]]), "labels": torch.tensor([1])}]
        assert run(theirs, *batch)["loss_rpn_box_reg"] > 0.1
        assert run(ours, *batch)["loss_rpn_box_reg"] == 0

    def test_object_with_nan_matches_no_anchor(self) -> None:
        losses = []
        for model in pair(small_rcnn()):
            target = {"boxes": torch.tensor([[10.0, 10, 50, 60], [10, 20, torch.nan, 40]])}
            images = _image_list(torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)))
            losses.append(run(model.rpn, images, model.backbone(images.tensors), [target])[1]["loss_rpn_box_reg"])
        assert losses[0].isnan() and losses[1] > 0

    def test_equal_objectness_is_ordered_by_anchor(self) -> None:
        ours = accelerate(plain_rcnn(rpn_nms_thresh=1.0)).eval()
        levels = [torch.zeros(1, Pyramid.out_channels, 96 // stride, 96 // stride) for stride in (8, 16, 32)]
        nn.init.zeros_(ours.rpn.head.bbox_pred.bias)
        (proposals,), _ = ours.rpn(_image_list(torch.zeros(1, 3, 96, 96)), dict(enumerate(levels)))
        anchors = ours.rpn.anchor_generator(_image_list(torch.zeros(1, 3, 96, 96)), levels)[0]
        torch.testing.assert_close(proposals, anchors[: len(proposals)].clamp(0, 96), rtol=0, atol=1e-4)

    def test_autocast_keeps_boxes_and_scores_in_float32(self) -> None:
        plain, ours = pair(small_rcnn())
        batch = random_batch()
        proposals = []
        ours.rpn.register_forward_hook(lambda module, args, output: proposals.extend(output[0]))
        with torch.autocast("cpu", torch.bfloat16):
            losses = run(ours, *batch)
            detections = ours.eval()(batch[0])
        expected = run(plain, *batch)
        for name in ("loss_objectness", "loss_rpn_box_reg"):
            assert losses[name].dtype == torch.float32
            torch.testing.assert_close(losses[name], expected[name], rtol=0.05, atol=0)
        assert all(image.dtype == torch.float32 for image in proposals)
        assert all(image[key].dtype == torch.float32 for image in detections for key in ("boxes", "scores"))

    def test_label_for_each_box_is_required(self) -> None:
        images, targets = random_batch()
        targets[0]["labels"] = torch.cat((targets[0]["labels"], torch.ones(1, dtype=torch.int64)))
        with pytest.raises(ValueError, match=r"labels\[0\] must have shape \[5\], got \[6\]"):
            accelerate(plain_rcnn())(images, targets)

    def test_few_boxes_are_not_moved_apart_before_nms(self) -> None:
        # The IoU of the first two is just above 0.5. torchvision adds 5 * 1001 to their coordinates, which rounds it.
        proposals = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5.0001], [980, 980, 1000, 1000]])
        logits = torch.tensor([2.0, 1.0, 0.0])[:, None] * torch.eye(6)[5]
        kept = []
        for model in pair(plain_rcnn(box_score_thresh=0.16)):
            found = model.roi_heads.postprocess_detections(logits, torch.zeros(3, 24), [proposals], [(1000, 1000)])
            boxes, labels = found[0][0], found[2][0]
            kept.append(boxes[labels == 5][:, 3].round(decimals=3).tolist())
        assert kept == [[10, 5, 1000], [10, 1000]]

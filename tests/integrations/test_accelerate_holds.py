"""What clients do to an accelerated model keeps the acceleration, or is reported where it would end or be ignored."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
import warnings
from collections.abc import Callable
from types import MethodType, ModuleType
from typing import Any

import pytest
import torch
from accelerate_cases import (
    assert_same_detections,
    assert_same_losses,
    pair,
    plain_model,
    random_batch,
    small_model,
)
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.modules.module import register_module_forward_pre_hook
from torchvision.models.detection import RetinaNet, _utils, retinanet
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import boxes

import retinanet_ops as ops
from retinanet_ops.integrations.torchvision import accelerate, restore


class Counted(nn.Module):
    """A wrapper like DataParallel, which counts its calls."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, x: list[Tensor]) -> Any:
        self.calls += 1
        return self.module(x)


def wrap(model: RetinaNet, path: str, wrapper: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Put a wrapper around a part of a model and return the wrapper."""
    parent, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
    setattr(parent, name, wrapper(getattr(parent, name)))
    return getattr(parent, name)


def calls_of(monkeypatch, name: str) -> list[str]:
    """Return a list that grows with every call of an op."""
    calls, original = [], getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *args, **options: calls.append(name) or original(*args, **options))
    return calls


class TestWrappedParts:
    HEADS = ("head", "head.classification_head", "head.regression_head")

    @pytest.mark.parametrize("path", HEADS)
    def test_wrapper_is_called(self, path: str) -> None:
        theirs, ours = pair(small_model())
        wrapper = wrap(ours, path, Counted)
        assert_same_losses(theirs, ours, random_batch())
        assert_same_detections(theirs, ours, random_batch()[0])
        assert wrapper.calls == 2

    @pytest.mark.parametrize(
        "wrapper",
        [checkpoint_wrapper, nn.DataParallel, functools.partial(torch.compile, backend="eager")],
        ids=["checkpoint_wrapper", "DataParallel", "compile"],
    )
    def test_wrappers_of_torch(self, wrapper: Callable[[nn.Module], nn.Module]) -> None:
        model = small_model()
        theirs = copy.deepcopy(model)
        # Set on the head inside the wrappers.
        for head in (theirs.head.regression_head, model.head.regression_head):
            head._loss_type, head.box_coder = "giou", BoxCoder((10.0, 5.0, 2.0, 3.0), 0.2)
        wrap(model, "head.regression_head", checkpoint_wrapper)
        wrap(model, "head", wrapper)
        ours = accelerate(model)
        assert_same_losses(theirs, ours, random_batch())
        assert_same_detections(theirs, ours, random_batch()[0])

    def test_override_inside_a_wrapper_is_named(self) -> None:
        model = plain_model()
        model.head.compute_loss = lambda *args: {}
        wrap(model, "head", checkpoint_wrapper)
        with pytest.raises(ValueError, match=r"model.head.compute_loss must .* got an attribute set on the object"):
            accelerate(model)

    def test_override_by_a_wrapper_is_named(self) -> None:
        class Weighted(Counted):
            def compute_loss(self, *args: object) -> dict[str, Tensor]:
                return {}

        ours = accelerate(plain_model())
        wrap(ours, "head", Weighted)
        with pytest.raises(ValueError, match=r"model.head.compute_loss must .* got that of Weighted"):
            ours(*random_batch())

    def test_head_without_losses_detects(self) -> None:
        class Outputs(nn.Module):
            def __init__(self, head: RetinaNetHead) -> None:
                super().__init__()
                self.inner = head

            def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
                return self.inner(x)

        model = small_model()
        theirs = copy.deepcopy(model)
        wrap(model, "head", Outputs)
        ours = accelerate(model)
        assert_same_detections(theirs, ours, random_batch()[0])
        with pytest.raises(ValueError, match=r"model.head.compute_loss must .* got Outputs without such a method"):
            ours.train()(*random_batch())

    def test_heads_are_called_under_hooks_of_all_modules(self) -> None:
        ours, seen = accelerate(plain_model()), []
        handle = register_module_forward_pre_hook(lambda module, args: seen.append(module))
        try:
            ours(*random_batch())
        finally:
            handle.remove()
        assert {ours.head, ours.head.classification_head, ours.head.regression_head, ours.anchor_generator} <= set(seen)


class TestWrappedModels:
    def test_distributed_data_parallel(self, tmp_path, monkeypatch) -> None:
        calls = calls_of(monkeypatch, "assign_targets")
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path / 'group'}")
        try:
            sum(nn.parallel.DistributedDataParallel(accelerate(plain_model()))(*random_batch()).values()).backward()
        finally:
            torch.distributed.destroy_process_group()
        assert calls == ["assign_targets"]

    @pytest.mark.parametrize("wrapper", [nn.DataParallel, torch.optim.swa_utils.AveragedModel])
    def test_other_wrappers(self, wrapper: Callable[[nn.Module], nn.Module], monkeypatch) -> None:
        calls = calls_of(monkeypatch, "detect")
        wrapper(accelerate(plain_model()).eval())(random_batch()[0])
        assert calls == ["detect"]


def wrapped(function: Callable) -> Callable:
    """Wrap a function as a decorator that logs or times does."""

    @functools.wraps(function)
    def wrapper(*args: object, **options: object) -> object:
        return function(*args, **options)

    return wrapper


class TestReplacedFunctions:
    METHODS = (
        (RetinaNet, "forward", "model.forward", True),
        (RetinaNet, "compute_loss", "model.compute_loss", True),
        (RetinaNet, "postprocess_detections", "model.postprocess_detections", False),
        (RetinaNetHead, "compute_loss", "model.head.compute_loss", True),
        (BoxCoder, "encode_single", "model.head.regression_head.box_coder.encode_single", True),
        (BoxCoder, "decode_single", "model.box_coder.decode_single", False),
        (Matcher, "__call__", "model.proposal_matcher.__call__", True),
    )
    FUNCTIONS = (
        *((retinanet, name, True) for name in ("sigmoid_focal_loss", "_box_loss")),
        *((boxes, name, True) for name in ("box_iou", "_box_inter_union")),
        (_utils, "encode_boxes", True),
        *((_utils, f"{kind}_box_iou_loss", True) for kind in ("generalized", "distance", "complete")),
        *((boxes, name, False) for name in ("batched_nms", "nms", "clip_boxes_to_image")),
        *((boxes, f"_batched_nms_{name}", False) for name in ("coordinate_trick", "vanilla")),
    )

    @pytest.mark.parametrize(("owner", "name", "where", "training"), METHODS)
    def test_patched_methods_are_named(self, owner: type, name: str, where: str, training: bool, monkeypatch) -> None:
        ours = accelerate(plain_model())
        monkeypatch.setattr(owner, name, wrapped(getattr(owner, name)))
        with pytest.raises(ValueError, match=f"{where} must be .* got a function patched into {owner.__name__}"):
            ours.train(training)(*random_batch())
        with pytest.raises(ValueError, match=f"{name} must be .* got a function patched into {owner.__name__}"):
            accelerate(plain_model())

    @pytest.mark.parametrize(("module", "name", "training"), FUNCTIONS)
    def test_patched_functions_are_named(self, module: ModuleType, name: str, training: bool, monkeypatch) -> None:
        ours = accelerate(plain_model())
        monkeypatch.setattr(module, name, wrapped(getattr(module, name)))
        for action in (lambda: ours.train(training)(*random_batch()), lambda: accelerate(plain_model())):
            with pytest.raises(ValueError, match=rf"{module.__name__}.{name} must be torchvision's own.*; undo"):
                action()

    def test_functions_without_a_name_are_named(self, monkeypatch) -> None:
        monkeypatch.setattr(boxes, "nms", functools.partial(boxes.nms))
        with pytest.raises(ValueError, match=r"boxes.nms must be torchvision's own"):
            accelerate(plain_model())

    @pytest.mark.parametrize(
        ("module", "name", "function", "training"),
        [
            (retinanet, "sigmoid_focal_loss", ops.sigmoid_focal_loss, True),
            (boxes, "box_iou", ops.box_iou, True),
            (boxes, "batched_nms", ops.batched_nms, False),
            (boxes, "nms", ops.nms, False),
            (boxes, "clip_boxes_to_image", ops.clip_boxes_to_image, False),
        ],
    )
    def test_our_own_functions_are_accepted(
        self, module: ModuleType, name: str, function: Callable, training: bool, monkeypatch
    ) -> None:
        monkeypatch.setattr(module, name, function)
        accelerate(plain_model()).train(training)(*random_batch())

    def test_functions_replaced_before_the_import_are_named(self) -> None:
        # A fresh process, because this one has imported the integrations.
        program = """
import sys, torchvision
from torchvision.models.detection import retinanet
from torchvision.ops import boxes

import retinanet_ops as ops

original = boxes.batched_nms
def batched_nms(*arguments):
    return original(*arguments)[:1]
torchvision.ops.sigmoid_focal_loss = ops.sigmoid_focal_loss  # ours, which no one calls by this name
if sys.argv[1] == "theirs":
    boxes.batched_nms = batched_nms

from retinanet_ops.integrations.torchvision import accelerate
try:
    accelerate(retinanet.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2))
    print("accelerated")
except ValueError as error:
    print(error)
"""
        for case, message in (
            ("ours", "accelerated"),
            ("theirs", "boxes.batched_nms must be torchvision's own"),
        ):
            command = [sys.executable, "-W", "ignore", "-c", program, case]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            assert message in run.stdout, run.stdout

    def test_what_is_not_bypassed_in_a_mode_may_be_changed(self) -> None:
        ours = accelerate(plain_model())
        ours.postprocess_detections = lambda *args: []
        ours(*random_batch())
        del ours.postprocess_detections
        ours.compute_loss = lambda *args: {}
        ours.eval()(random_batch()[0])


class TestReplacedForward:
    def test_warns_if_it_may_end_the_acceleration(self) -> None:
        ours = accelerate(plain_model())
        with pytest.warns(UserWarning, match=r"model.forward was replaced.* Undo with `del model.forward`"):
            ours.forward = lambda images, targets=None: {}
        assert ours(*random_batch()) == {}
        del ours.forward
        assert set(ours(*random_batch())) == {"classification", "bbox_regression"}

    def test_wrapper_that_names_the_accelerated_forward_does_not_warn(self) -> None:
        ours = accelerate(plain_model())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours.forward = MethodType(torch.autocast("cpu", torch.bfloat16)(ours.forward.__func__), ours)
            ours.forward = wrapped(ours.forward)
        assert set(ours(*random_batch())) == {"classification", "bbox_regression"}

    def test_wrapper_runs_torchvisions_forward_after_restore(self, monkeypatch) -> None:
        calls = calls_of(monkeypatch, "assign_targets")
        ours = accelerate(plain_model())
        ours.forward = wrapped(ours.forward)
        ours(*random_batch())
        restore(ours)(*random_batch())
        assert calls == ["assign_targets"]

    def test_forward_left_behind_by_a_wrapper_does_not_hide_the_accelerated_one(self, monkeypatch) -> None:
        calls = calls_of(monkeypatch, "assign_targets")
        model = plain_model()
        model.forward = model.forward
        accelerate(model)(*random_batch())
        assert calls == ["assign_targets"]

    def test_other_class_warns(self) -> None:
        class Own(RetinaNet):
            pass

        ours = accelerate(plain_model())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours.__class__ = type("Sharded", (type(ours),), {})
            restored = restore(accelerate(plain_model()))
        assert type(restored) is RetinaNet
        with pytest.warns(UserWarning, match=r"the class of the model was replaced by Own.* Call accelerate\(\) again"):
            ours.__class__ = Own

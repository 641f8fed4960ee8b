"""An accelerated FCOS remains the same model, and `accelerate` rejects overrides that it would bypass."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate_cases import CLASSES, assert_same_detections, pair
from fcos_cases import LOSSES, assert_same_losses, random_batch, small_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection import FCOS, fcos
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops import boxes

import retinanet_ops as ops
from retinanet_ops.integrations.torchvision import accelerate, restore


class Labelled(FCOS):
    """A user's subclass with an argument and an attribute."""

    def __init__(self, *args: object, label: str = "tree", **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.label = label

    def eager_outputs(self, losses: dict[str, Tensor], detections: list[dict[str, Tensor]]) -> object:
        return super().eager_outputs(losses, detections), self.label


class TestModel:
    def test_accelerate_and_restore_change_only_the_class(self) -> None:
        model = small_model()
        before = dict(vars(model))
        keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
        ours = accelerate(model)
        assert ours is model and isinstance(ours, FCOS) and type(ours).__name__ == "AcceleratedFCOS"
        assert accelerate(ours) is ours and vars(ours) == before
        assert list(ours.state_dict()) == keys and [id(p) for p in ours.parameters()] == parameters
        assert restore(ours) is model and type(model) is FCOS and vars(model) == before

    def test_restored_model_equals_torchvisions(self) -> None:
        theirs, ours = pair(small_model())
        batch = random_batch()
        ours(*batch)
        assert theirs(*batch) == restore(ours)(*batch)

    def test_state_dicts_are_interchangeable(self) -> None:
        theirs, ours = small_model(), accelerate(small_model())
        assert ours.load_state_dict(theirs.state_dict()) == theirs.load_state_dict(ours.state_dict())
        assert_same_losses(theirs, ours, random_batch())

    def test_pickle_and_copies(self) -> None:
        ours = accelerate(small_model(Labelled, label="birch"))
        batch = random_batch()
        for copied in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours), copy.copy(ours)):
            assert type(copied) is type(ours) and copied.label == "birch"
            assert copied(*batch) == ours(*batch)
        assert type(restore(copied)) is Labelled and type(ours) is not Labelled

    def test_float64(self) -> None:
        model = small_model().double()
        images, targets = random_batch()
        images = [image.double() for image in images]
        theirs, ours = pair(model)
        torch.testing.assert_close(ours(images, targets), theirs(images, targets), rtol=1e-7, atol=0)
        with torch.no_grad():
            expected, got = theirs.eval()(images), ours.eval()(images)
        for e, g in zip(expected, got, strict=True):
            torch.testing.assert_close(g["boxes"], e["boxes"], rtol=1e-7, atol=1e-5)

    def test_autocast_keeps_results_in_float32(self) -> None:
        plain, ours = pair(small_model())
        batch = random_batch()
        with torch.autocast("cpu", torch.bfloat16):
            losses = ours(*batch)
            detections = ours.eval()(batch[0])
        torch.testing.assert_close(losses, plain(*batch), rtol=0.02, atol=0)
        assert all(value.dtype == torch.float32 for value in losses.values())
        assert all(image[key].dtype == torch.float32 for image in detections for key in ("boxes", "scores"))

    def test_half_precision(self) -> None:
        plain, ours = pair(small_model())
        images, targets = random_batch()
        losses = ours.bfloat16()([image.bfloat16() for image in images], targets)
        torch.testing.assert_close(losses, plain(images, targets), rtol=0.05, atol=0)
        assert all(len(d["scores"]) > 20 for d in ours.eval()([image.bfloat16() for image in images]))

    def test_only_the_forced_synchronisations_are_left(self) -> None:
        """The host reads what torchvision checks of the targets and the number of detections, with `tolist`."""

        class Waiting(TorchDispatchMode):
            names = ("_local_scalar_dense", "nonzero", "masked_select", "equal")

            def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                indices = args[1] if op.name().startswith("aten::index") and isinstance(args[1], (list, tuple)) else ()
                by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
                name = op.name().removeprefix("aten::").partition(".")[0]
                if by_mask or name in self.names:
                    seen.append(name)
                return op(*args, **(kwargs or {}))

        seen: list[str] = []
        theirs, ours = pair(small_model())
        for model in (theirs, ours):
            model.transform.torch_choice = lambda sizes: sizes[0]  # torchvision draws a random size of each image
        batch = random_batch()
        with Waiting():
            sum(ours(*batch).values()).backward()
            ours.eval()(batch[0])
        assert seen == []
        with Waiting():
            theirs(*batch)
        assert {"_local_scalar_dense", "index"} <= set(seen)

    @pytest.mark.filterwarnings("ignore")
    def test_script_and_trace_compile_torchvisions_forward(self) -> None:
        theirs, ours = (model.eval() for model in pair(small_model()))
        images = random_batch((1,))[0]
        expected = theirs(images)[0]
        assert torch.equal(torch.jit.script(ours)(images)[1][0]["boxes"], expected["boxes"])

        class Boxes(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = ours

            def forward(self, image: Tensor) -> Tensor:
                return self.model([image])[0]["boxes"]

        assert torch.equal(torch.jit.trace(Boxes(), images, check_trace=False)(images[0]), expected["boxes"])

    def test_compile(self) -> None:
        theirs, ours = pair(small_model())
        batch = random_batch((3, 2))
        torch.testing.assert_close(torch.compile(ours, backend="eager")(*batch), theirs(*batch), rtol=1e-5, atol=0)

    @pytest.mark.parametrize("path", ["head", "head.classification_head", "head.regression_head"])
    def test_wrapped_parts_are_called(self, path: str) -> None:
        theirs, ours = pair(small_model())
        parent, name = ours.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        setattr(parent, name, checkpoint_wrapper(getattr(parent, name)))
        calls: list[str] = []
        getattr(parent, name).register_forward_hook(lambda *args: calls.append(name))
        assert_same_losses(theirs, ours, random_batch())
        assert_same_detections(theirs, ours, random_batch()[0])
        assert calls == [name] * 2

    def test_head_without_losses_detects(self) -> None:
        class Outputs(nn.Module):
            def __init__(self, head: FCOSHead) -> None:
                super().__init__()
                self.inner = head

            def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
                return self.inner(x)

        model = small_model()
        theirs = copy.deepcopy(model)
        model.head = Outputs(model.head)
        ours = accelerate(model)
        assert_same_detections(theirs, ours, random_batch()[0])
        with pytest.raises(ValueError, match=r"model.head.compute_loss must .* got Outputs without such a method"):
            ours.train()(*random_batch())

    def test_restored_model_inside_a_wrapper_of_forward(self) -> None:
        theirs, ours = pair(small_model())
        ours.forward = wrapped(ours.forward)
        batch = random_batch()
        assert restore(ours)(*batch) == theirs(*batch)


class TestTargets:
    def with_boxes(self, value: Any) -> tuple[list[Tensor], list[dict[str, Any]]]:
        images, targets = random_batch()
        targets[0]["boxes"][1] = value
        return images, targets

    def test_degenerate_box_has_torchvisions_error(self) -> None:
        batch = self.with_boxes(torch.tensor([1.0, 3, 1, 4]))
        for model in pair(small_model()):
            with pytest.raises(AssertionError, match=r"positive height and width.* at index 0"):
                model(*batch)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_losses_of_infinite_and_nan_boxes_are_torchvisions(self, value: float) -> None:
        batch = self.with_boxes(torch.tensor([0.0, 0, 9, value]))
        theirs, ours = (model(*batch) for model in pair(small_model()))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0, equal_nan=True)

    @pytest.mark.parametrize("label", [-1, CLASSES])
    def test_label_out_of_range_raises(self, label: int) -> None:
        images, targets = random_batch()
        targets[2]["labels"][4] = label
        with pytest.raises(ValueError, match=rf"targets\[2\].* class ids in 0..{CLASSES - 1}, got {label}"):
            accelerate(small_model())(images, targets)

    def test_missing_targets(self) -> None:
        images, targets = random_batch()
        ours = accelerate(small_model())
        with pytest.raises(AssertionError, match="targets should not be none"):
            ours(images)
        with pytest.raises(ValueError, match=r"targets\[0\] must have an entry 'labels'"):
            ours(images, [{"boxes": t["boxes"]} for t in targets])


def override(path: str, method: str) -> Callable[[FCOS], None]:
    """Return a function that gives a part of a model a subclass `Own`, which overrides the method."""

    def change(model: FCOS) -> None:
        part = model
        for name in path.split(".") if path else ():
            part = getattr(part, name)
        base = type(part)
        part.__class__ = type("Own", (base,), {method: lambda self, *args: getattr(base, method)(self, *args)})

    return change


def set_method(model: FCOS) -> None:
    model.head.compute_loss = lambda *args: {}


def wrapped(function: Callable) -> Callable:
    return functools.wraps(function)(lambda *args, **options: function(*args, **options))


class TestRefusals:
    CASES = [
        (override("", "compute_loss"), r"model.compute_loss must be torchvision's own FCOS.compute_loss, .* of Own"),
        (override("", "postprocess_detections"), "model.postprocess_detections must .* got that of Own"),
        (override("head", "compute_loss"), "model.head.compute_loss must be torchvision's own FCOSHead.compute_loss"),
        (override("head.box_coder", "encode"), "model.head.box_coder.encode must be torchvision's own BoxLinearCoder"),
        (override("head.box_coder", "decode"), "model.head.box_coder.decode must be torchvision's own BoxLinearCoder"),
        (override("box_coder", "decode"), "model.box_coder.decode must be torchvision's own BoxLinearCoder"),
        (set_method, "model.head.compute_loss must .* got an attribute set on the object"),
    ]

    @pytest.mark.parametrize(("change", "message"), CASES)
    def test_names_the_override_that_would_be_bypassed(self, change: Callable[[FCOS], None], message: str) -> None:
        model = small_model()
        change(model)
        own = type(model)
        with pytest.raises(ValueError, match=f"accelerate: .*{message}"):
            accelerate(model)
        assert type(model) is own

    @pytest.mark.parametrize(("change", "message"), CASES)
    def test_names_an_override_made_after_accelerate(self, change: Callable[[FCOS], None], message: str) -> None:
        ours = accelerate(small_model())
        change(ours)
        with pytest.raises(ValueError, match=message):  # in the mode that would bypass it
            ours(*random_batch())
            ours.eval()(random_batch()[0])

    def test_forward(self) -> None:
        model = small_model()
        override("", "forward")(model)
        with pytest.raises(ValueError, match=r"model.forward must be torchvision's own FCOS.forward, .* that of Own"):
            accelerate(model)

    @pytest.mark.parametrize(
        ("owner", "name", "where", "training"),
        [
            (FCOS, "forward", "model.forward", True),
            (FCOS, "compute_loss", "model.compute_loss", True),
            (FCOS, "postprocess_detections", "model.postprocess_detections", False),
            (FCOSHead, "compute_loss", "model.head.compute_loss", True),
            (BoxLinearCoder, "encode", "model.head.box_coder.encode", True),
            (BoxLinearCoder, "decode", "model.box_coder.decode", False),
        ],
    )
    def test_patched_methods_are_named(self, owner: type, name: str, where: str, training: bool, monkeypatch) -> None:
        ours = accelerate(small_model())
        monkeypatch.setattr(owner, name, wrapped(getattr(owner, name)))
        with pytest.raises(ValueError, match=f"{where} must be .* got a function patched into {owner.__name__}"):
            ours.train(training)(*random_batch())
        with pytest.raises(ValueError, match=f"{name} must be .* got a function patched into {owner.__name__}"):
            accelerate(small_model())

    @pytest.mark.parametrize(
        ("module", "name", "training"),
        [
            (fcos, "sigmoid_focal_loss", True),
            (fcos, "generalized_box_iou_loss", True),
            (boxes, "batched_nms", False),
            (boxes, "nms", False),
            (boxes, "clip_boxes_to_image", False),
        ],
    )
    def test_patched_functions_are_named(self, module: ModuleType, name: str, training: bool, monkeypatch) -> None:
        ours = accelerate(small_model())
        monkeypatch.setattr(module, name, wrapped(getattr(module, name)))
        for action in (lambda: ours.train(training)(*random_batch()), lambda: accelerate(small_model())):
            with pytest.raises(ValueError, match=rf"{module.__name__}.{name} must be torchvision's own.*; undo"):
                action()
        monkeypatch.setattr(module, name, getattr(ops, name))
        assert ours.train(training)(*random_batch())

    def test_what_is_not_bypassed_in_a_mode_may_be_changed(self) -> None:
        ours = accelerate(small_model())
        ours.postprocess_detections = lambda *args: []
        assert list(ours(*random_batch())) == LOSSES
        del ours.postprocess_detections
        ours.compute_loss = lambda *args: {}
        ours.eval()(random_batch()[0])

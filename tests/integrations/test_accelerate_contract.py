"""An accelerated RetinaNet remains the same model, and `accelerate` rejects overrides that it would bypass."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from accelerate_cases import (
    assert_same_detections,
    assert_same_losses,
    pair,
    random_batch,
    single_map_model,
    small_model,
)
from torch import Tensor, nn
from torchvision.models import mobilenet_v2
from torchvision.models.detection import RetinaNet
from torchvision.models.detection._utils import SSDMatcher

from retinanet_ops.integrations.torchvision import accelerate, restore


class Labelled(RetinaNet):
    """A user's subclass with an argument, an attribute, and a registry of its subclasses."""

    made: list[type] = []

    def __init_subclass__(cls, *, name: str) -> None:
        Labelled.made.append(cls)

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
        assert ours is model and isinstance(ours, RetinaNet) and type(ours).__name__ == "AcceleratedRetinaNet"
        assert accelerate(ours) is ours and vars(ours) == before
        assert list(ours.state_dict()) == keys and [id(p) for p in ours.parameters()] == parameters
        assert restore(ours) is model and type(model) is RetinaNet and vars(model) == before
        assert restore(model) is model

    def test_restored_model_equals_torchvisions(self) -> None:
        theirs, ours = pair(small_model())
        batch = random_batch()
        ours(*batch)
        assert all(
            torch.equal(a, b) for a, b in zip(theirs(*batch).values(), restore(ours)(*batch).values(), strict=True)
        )

    def test_state_dicts_are_interchangeable(self) -> None:
        theirs, ours = small_model(), accelerate(small_model())
        assert ours.load_state_dict(theirs.state_dict()) == theirs.load_state_dict(ours.state_dict())
        assert_same_losses(theirs, ours, random_batch())

    def test_file_loads_in_a_fresh_process(self, tmp_path) -> None:
        ours = accelerate(single_map_model()).eval()
        images = random_batch((1,))[0]
        torch.save((ours, images, ours(images)[0]["boxes"]), tmp_path / "model.pt")
        program = """
import sys, torch
model, images, boxes = torch.load(sys.argv[1], weights_only=False)
assert "retinanet_ops.integrations.torchvision" in sys.modules and type(model).__name__ == "AcceleratedRetinaNet"
assert len(boxes) > 20
torch.testing.assert_close(model(images)[0]["boxes"], boxes, rtol=0, atol=1e-3)
from retinanet_ops.integrations.torchvision import restore
assert type(restore(model)).__module__ == "torchvision.models.detection.retinanet"
"""
        subprocess.run([sys.executable, "-c", program, str(tmp_path / "model.pt")], check=True)

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_pickle(self, protocol: int) -> None:
        ours = accelerate(small_model(Labelled, label="birch"))
        loaded = pickle.loads(pickle.dumps(ours, protocol))
        assert type(loaded) is type(ours) and loaded.label == "birch"
        batch = random_batch()
        assert loaded(*batch) == ours(*batch)

    def test_copies_are_independent(self) -> None:
        ours = accelerate(small_model()).eval()
        images = random_batch((1,))[0]
        expected = len(ours(images)[0]["scores"])
        for copied in (copy.deepcopy(ours), copy.copy(ours)):
            assert type(copied) is type(ours)
            copied.detections_per_img = 3
            assert len(copied(images)[0]["scores"]) == 3 and len(ours(images)[0]["scores"]) == expected
        restore(copied)
        assert type(ours) is not RetinaNet

    def test_subclass(self) -> None:
        theirs, ours = pair(small_model(Labelled, label="birch"))
        assert isinstance(ours, Labelled) and not Labelled.made
        expected, got = theirs(*(batch := random_batch())), ours(*batch)
        assert got[1] == "birch"
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=0)
        detections, label = ours.eval()(batch[0])
        assert label == "birch" and [set(image) for image in detections] == [{"boxes", "scores", "labels"}] * 3
        assert type(restore(ours)) is Labelled

    def test_hooks_of_the_model(self) -> None:
        ours = small_model()
        ours.register_forward_hook(lambda module, args, output: sum(output.values()))
        assert accelerate(ours)(*random_batch()).shape == ()

    @pytest.mark.filterwarnings("ignore:accelerate. model.forward was replaced")
    def test_forward_wrapped_later(self) -> None:
        ours = accelerate(small_model())
        forward = ours.forward
        ours.forward = lambda *args: {"wrapped": sum(forward(*args).values())}
        assert list(ours(*random_batch())) == ["wrapped"]

    def test_class_changed_later(self) -> None:
        ours = accelerate(small_model())
        ours.__class__ = type("Sharded", (type(ours),), {})
        with pytest.raises(ValueError, match=r"restore: model's class must be the one of accelerate\(\), got Sharded"):
            restore(ours)

    def test_float64(self) -> None:
        model = small_model().double()
        images, targets = random_batch()
        images = [image.double() for image in images]
        expected = model(images, targets)  # leaves the generator with anchors in float64
        theirs, ours = pair(model)
        torch.testing.assert_close(ours(images, targets), expected, rtol=1e-7, atol=0)
        assert_same_detections(theirs, ours, images)

    def test_autocast_keeps_anchors_and_results_in_float32(self) -> None:
        plain, ours = pair(small_model())
        batch = random_batch()
        with torch.autocast("cpu", torch.bfloat16):
            losses = ours(*batch)
            detections = ours.eval()(batch[0])
        torch.testing.assert_close(losses, plain(*batch), rtol=0.02, atol=0)
        assert all(value.dtype == torch.float32 for value in losses.values())
        assert all(image[key].dtype == torch.float32 for image in detections for key in ("boxes", "scores"))
        assert all(base.dtype == torch.float32 for base in ours.anchor_generator.cell_anchors)
        assert_same_losses(plain, ours.train(), batch)

    def test_half_precision(self) -> None:
        plain, ours = pair(small_model())
        images, targets = random_batch()
        losses = ours.bfloat16()([image.bfloat16() for image in images], targets)
        torch.testing.assert_close(losses, plain(images, targets), rtol=0.05, atol=0)

    @pytest.mark.filterwarnings("ignore")
    def test_script_and_trace_compile_torchvisions_forward(self) -> None:
        theirs, ours = (model.eval() for model in pair(small_model()))
        images = random_batch((1,))[0]
        expected = theirs(images)[0]
        assert torch.equal(torch.jit.script(ours)(images)[1][0]["boxes"], expected["boxes"])
        assert type(ours).__name__ == "AcceleratedRetinaNet"

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


class TestOtherModels:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: mobilenet_v2(weights=None), "got MobileNetV2$"),
            (lambda: nn.DataParallel(small_model()), "got DataParallel, whose 'module' is one; pass that module"),
            (lambda: "model.pt", "got str"),
            (lambda: RetinaNet, "got type"),
        ],
        ids=["classifier", "wrapped", "str", "class"],
    )
    def test_not_a_detector(self, make: Callable, message: str) -> None:
        model = make()
        for function in (accelerate, restore):
            name = function.__name__
            with pytest.raises(TypeError, match=f"{name}: model must be a torchvision RetinaNet.*, {message}"):
                function(model)


def override(path: str, method: str) -> Callable[[RetinaNet], None]:
    """Return a function that gives a part of a model a subclass `Own`, which overrides the method."""

    def change(model: RetinaNet) -> None:
        part = model
        for name in path.split(".") if path else ():
            part = getattr(part, name)
        base = type(part)
        part.__class__ = type("Own", (base,), {method: lambda self, *args: getattr(base, method)(self, *args)})

    return change


def change_loss_type(model: RetinaNet) -> None:
    model.head.regression_head._loss_type = "huber"


def set_matcher(model: RetinaNet) -> None:
    model.proposal_matcher = SSDMatcher(0.5)


def set_method(model: RetinaNet) -> None:
    model.head.classification_head.compute_loss = lambda targets, outputs, matched: 0


class TestRefusals:
    CASES = [
        (
            override("", "compute_loss"),
            r"model.compute_loss must be torchvision's own RetinaNet.compute_loss, .* of Own",
        ),
        (override("", "postprocess_detections"), "model.postprocess_detections must .* got that of Own"),
        (
            override("head", "compute_loss"),
            "model.head.compute_loss must be torchvision's own RetinaNetHead.compute_loss",
        ),
        (override("head.classification_head", "compute_loss"), "model.head.classification_head.compute_loss must"),
        (override("head.regression_head", "compute_loss"), "model.head.regression_head.compute_loss must"),
        (override("head.regression_head.box_coder", "encode_single"), "regression_head.box_coder.encode_single must"),
        (override("head.regression_head.box_coder", "decode_single"), "regression_head.box_coder.decode_single must"),
        (override("box_coder", "decode_single"), "model.box_coder.decode_single must be torchvision's own BoxCoder"),
        (override("proposal_matcher", "__call__"), "model.proposal_matcher.__call__ must be torchvision's own Matcher"),
        (override("proposal_matcher", "set_low_quality_matches_"), "proposal_matcher.set_low_quality_matches_ must"),
        (set_matcher, "model.proposal_matcher.__call__ must .* got that of SSDMatcher"),
        (set_method, "model.head.classification_head.compute_loss must .* got an attribute set on the object"),
        (change_loss_type, "_loss_type must be one of l1, smooth_l1, .* got 'huber'"),
    ]

    @pytest.mark.parametrize(("change", "message"), CASES)
    def test_names_the_override_that_would_be_bypassed(self, change: Callable[[RetinaNet], None], message: str) -> None:
        model = small_model()
        change(model)
        own = type(model)
        with pytest.raises(ValueError, match=f"accelerate: .*{message}"):
            accelerate(model)
        assert type(model) is own

    @pytest.mark.parametrize(("change", "message"), CASES)
    def test_names_an_override_made_after_accelerate(self, change: Callable[[RetinaNet], None], message: str) -> None:
        ours = accelerate(small_model())
        change(ours)
        with pytest.raises(ValueError, match=message):  # in the mode that would bypass it
            ours(*random_batch())
            ours.eval()(random_batch()[0])

    def test_forward(self) -> None:
        model = small_model()
        override("", "forward")(model)
        with pytest.raises(
            ValueError, match="model.forward must be torchvision's own RetinaNet.forward, .* that of Own"
        ):
            accelerate(model)
        model = small_model()
        model.forward = lambda images, targets=None: {}
        with pytest.raises(ValueError, match="model.forward must .* got an attribute set on the object"):
            accelerate(model)

"""An accelerated SSD remains the same model, and `accelerate` rejects overrides that it would bypass."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate_cases import assert_same_detections, assert_same_losses, pair
from ssd_cases import plain_ssd, small_ssd, ssd_batch
from torch import Tensor, nn
from torchvision.models.detection import _utils
from torchvision.models.detection._utils import BoxCoder, Matcher, SSDMatcher
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.ops import boxes

import retinanet_ops as ops
from retinanet_ops.integrations.torchvision import accelerate, restore


class Labelled(SSD):
    """A user's subclass with an argument and an attribute."""

    def __init__(self, *args: Any, label: str = "tree", **options: Any) -> None:
        super().__init__(*args, **options)
        self.label = label

    def eager_outputs(self, losses: dict[str, Tensor], detections: list[dict[str, Tensor]]) -> Any:
        return super().eager_outputs(losses, detections), self.label


class TestModel:
    def test_accelerate_and_restore_change_only_the_class(self) -> None:
        model = small_ssd()
        before = dict(vars(model))
        keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
        ours = accelerate(model)
        assert ours is model and isinstance(ours, SSD) and type(ours).__name__ == "AcceleratedSSD"
        ours(*ssd_batch())
        ours.eval()(ssd_batch()[0])
        assert accelerate(ours.train()) is ours and vars(ours) == before
        assert list(ours.state_dict()) == keys and [id(p) for p in ours.parameters()] == parameters
        assert restore(ours) is model and type(model) is SSD and vars(model) == before
        assert restore(model) is model

    def test_restored_model_equals_torchvisions(self) -> None:
        theirs, ours = pair(small_ssd())
        batch = ssd_batch()
        ours(*batch)
        assert theirs(*batch) == restore(ours)(*batch)

    def test_state_dicts_are_interchangeable(self) -> None:
        theirs, ours = small_ssd(), accelerate(small_ssd())
        assert ours.load_state_dict(theirs.state_dict()) == theirs.load_state_dict(ours.state_dict())
        assert_same_losses(theirs, ours, ssd_batch())

    def test_file_loads_in_a_fresh_process(self, tmp_path) -> None:
        # The classes of the model must be importable there.
        backbone = nn.Sequential(nn.Conv2d(3, 16, 3, 8, 1), nn.ReLU())
        ours = accelerate(SSD(backbone, DefaultBoxGenerator([[2, 3]]), (96, 96), 4)).eval()
        images = ssd_batch((1,))[0]
        torch.save((ours, images, ours(images)[0]["boxes"]), tmp_path / "model.pt")
        program = """
import sys, torch
model, images, boxes = torch.load(sys.argv[1], weights_only=False)
assert "retinanet_ops.integrations.torchvision" in sys.modules and type(model).__name__ == "AcceleratedSSD"
assert len(boxes) > 20
torch.testing.assert_close(model(images)[0]["boxes"], boxes, rtol=0, atol=1e-3)
from retinanet_ops.integrations.torchvision import restore
assert type(restore(model)).__module__ == "torchvision.models.detection.ssd"
"""
        subprocess.run([sys.executable, "-c", program, str(tmp_path / "model.pt")], check=True)

    @pytest.mark.parametrize("protocol", (2, pickle.HIGHEST_PROTOCOL))
    def test_pickle(self, protocol: int) -> None:
        ours = accelerate(small_ssd(Labelled, label="birch"))
        loaded = pickle.loads(pickle.dumps(ours, protocol))
        assert type(loaded) is type(ours) and loaded.label == "birch"
        batch = ssd_batch()
        assert loaded(*batch) == ours(*batch)

    def test_copies_are_independent(self) -> None:
        ours = accelerate(small_ssd()).eval()
        images = ssd_batch((1,))[0]
        expected = len(ours(images)[0]["scores"])
        for copied in (copy.deepcopy(ours), copy.copy(ours)):
            assert type(copied) is type(ours)
            copied.detections_per_img = 3
            assert len(copied(images)[0]["scores"]) == 3 and len(ours(images)[0]["scores"]) == expected
        restore(copied)
        assert type(ours) is not SSD

    def test_subclass(self) -> None:
        theirs, ours = pair(small_ssd(Labelled, label="birch"))
        assert isinstance(ours, Labelled)
        expected, got = theirs(*(batch := ssd_batch())), ours(*batch)
        assert got[1] == "birch"
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=0)
        detections, label = ours.eval()(batch[0])
        assert label == "birch" and [set(image) for image in detections] == [{"boxes", "scores", "labels"}] * 3
        assert type(restore(ours)) is Labelled

    def test_wrapper_runs_torchvisions_forward_after_restore(self, monkeypatch) -> None:
        calls, assign = [], ops.assign_targets
        monkeypatch.setattr(ops, "assign_targets", lambda *args, **options: calls.append(1) or assign(*args, **options))
        ours = accelerate(plain_ssd())
        forward = ours.forward
        ours(*ssd_batch())
        restore(ours)
        forward(*ssd_batch())
        assert calls == [1]

    def test_degenerate_box_raises_torchvisions_error(self) -> None:
        images, targets = ssd_batch()
        targets[1] = {"boxes": torch.tensor([[1.0, 3, 1, 4]])}
        for model in pair(plain_ssd()):
            with pytest.raises(AssertionError, match="positive height and width.* at index 1"):
                model(images, targets)

    @pytest.mark.filterwarnings("ignore")
    def test_script_compiles_torchvisions_forward(self) -> None:
        theirs, ours = (model.eval() for model in pair(small_ssd()))
        images = ssd_batch((1,))[0]
        assert torch.equal(torch.jit.script(ours)(images)[1][0]["boxes"], theirs(images)[0]["boxes"])
        assert type(ours).__name__ == "AcceleratedSSD"

    def test_compile(self) -> None:
        theirs, ours = pair(small_ssd())
        batch = ssd_batch((3, 2))
        torch.testing.assert_close(torch.compile(ours, backend="eager")(*batch), theirs(*batch), rtol=1e-5, atol=0)

    def test_wrapped_head_is_called(self) -> None:
        theirs, ours = pair(small_ssd())
        ours.head = nn.DataParallel(ours.head)
        assert_same_losses(theirs, ours, ssd_batch())
        assert_same_detections(theirs, ours, ssd_batch()[0])


def override(path: str, method: str) -> Callable[[SSD], None]:
    """Return a function that gives a part of a model a subclass `Own`, which overrides the method."""

    def change(model: SSD) -> None:
        part = model.get_submodule("") if not path else getattr(model, path)
        base = type(part)
        part.__class__ = type("Own", (base,), {method: lambda self, *args: getattr(base, method)(self, *args)})

    return change


def set_matcher(model: SSD) -> None:
    model.proposal_matcher = Matcher(0.5, 0.5)


def allow_low_quality(model: SSD) -> None:
    model.proposal_matcher.allow_low_quality_matches = True


class TestRefusals:
    CASES = [
        (override("", "compute_loss"), r"model.compute_loss must be torchvision's own SSD.compute_loss, .* of Own"),
        (override("", "postprocess_detections"), "model.postprocess_detections must .* got that of Own"),
        (override("box_coder", "encode_single"), "model.box_coder.encode_single must be torchvision's own BoxCoder"),
        (override("box_coder", "decode_single"), "model.box_coder.decode_single must be torchvision's own BoxCoder"),
        (override("proposal_matcher", "__call__"), "model.proposal_matcher.__call__ must be .* own SSDMatcher"),
        (set_matcher, "model.proposal_matcher.__call__ must .* got that of Matcher"),
        (allow_low_quality, "model.proposal_matcher.allow_low_quality_matches must be False, got True"),
    ]

    @pytest.mark.parametrize(("change", "message"), CASES)
    def test_names_the_override_that_would_be_bypassed(self, change: Callable[[SSD], None], message: str) -> None:
        model = plain_ssd()
        change(model)
        own = type(model)
        with pytest.raises(ValueError, match=f"accelerate: .*{message}"):
            accelerate(model)
        assert type(model) is own

    @pytest.mark.parametrize(("change", "message"), CASES)
    def test_names_an_override_made_after_accelerate(self, change: Callable[[SSD], None], message: str) -> None:
        ours = accelerate(plain_ssd())
        change(ours)
        with pytest.raises(ValueError, match=message):  # in the mode that would bypass it
            ours(*ssd_batch())
            ours.eval()(ssd_batch()[0])

    def test_forward(self) -> None:
        model = plain_ssd()
        model.forward = lambda images, targets=None: {}
        with pytest.raises(ValueError, match="model.forward must .* own SSD.forward.* got an attribute set on the"):
            accelerate(model)

    @pytest.mark.parametrize(
        ("owner", "name", "training"),
        [
            (SSD, "compute_loss", True),
            (SSD, "postprocess_detections", False),
            (BoxCoder, "encode_single", True),
            (BoxCoder, "decode_single", False),
            (Matcher, "__call__", True),
            (SSDMatcher, "__call__", True),
            (_utils, "encode_boxes", True),
            (boxes, "box_iou", True),
            (_utils, "_topk_min", False),
            (boxes, "batched_nms", False),
            (boxes, "nms", False),
            (boxes, "clip_boxes_to_image", False),
        ],
    )
    def test_patched_code_is_named(self, owner: type | ModuleType, name: str, training: bool, monkeypatch) -> None:
        ours = accelerate(plain_ssd())
        own = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **options: own(*args, **options))
        for action in (lambda: ours.train(training)(*ssd_batch()), lambda: accelerate(plain_ssd())):
            with pytest.raises(ValueError, match=rf"accelerate: .*{name} must be torchvision's own"):
                action()

    def test_our_own_functions_are_accepted(self, monkeypatch) -> None:
        for name in ("box_iou", "batched_nms", "clip_boxes_to_image"):
            monkeypatch.setattr(boxes, name, getattr(ops, name))
        ours = accelerate(plain_ssd())
        ours(*ssd_batch())
        ours.eval()(ssd_batch()[0])

    def test_head_may_be_patched(self, monkeypatch) -> None:
        theirs, ours = pair(small_ssd())
        forward = SSDHead.forward
        monkeypatch.setattr(SSDHead, "forward", lambda self, x: {k: v * 0.7 for k, v in forward(self, x).items()})
        assert_same_losses(theirs, ours, ssd_batch())

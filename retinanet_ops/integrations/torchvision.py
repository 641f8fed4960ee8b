"""Adapter that runs torchvision's RetinaNet with the matching, the losses and the post-processing of this package.

`accelerate` replaces the class of a model by a subclass that overrides only `forward`. Parameters, submodules,
attributes and hooks remain the same objects, and `restore` sets the original class again.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection import retinanet as tv
from torchvision.models.detection._utils import BoxCoder, Matcher, _box_loss
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms, box_iou, boxes, clip_boxes_to_image, sigmoid_focal_loss

import retinanet_ops as ops
from retinanet_ops.constants import BOX_LOSS_KINDS

#: Methods that the accelerated `forward` bypasses: path in the model, class that must define them, method names. An
#: override would be ignored silently, so `_check_parts` rejects it.
_BYPASSED: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("", RetinaNet, ("compute_loss", "postprocess_detections")),
    ("head", tv.RetinaNetHead, ("compute_loss",)),
    ("head.classification_head", tv.RetinaNetClassificationHead, ("compute_loss",)),
    ("head.regression_head", tv.RetinaNetRegressionHead, ("compute_loss",)),
    ("head.regression_head.box_coder", BoxCoder, ("encode_single", "decode_single")),
    ("box_coder", BoxCoder, ("decode_single",)),
    ("proposal_matcher", Matcher, ("__call__", "set_low_quality_matches_")),
)
#: Functions that the bypassed methods call, and the modules in which the functions must not have been replaced.
_BYPASSED_FUNCTIONS: tuple[tuple[ModuleType, Any], ...] = (
    *((tv, function) for function in (sigmoid_focal_loss, _box_loss)),
    *((boxes, function) for function in (batched_nms, box_iou, clip_boxes_to_image)),
)


def accelerate(model: RetinaNet) -> RetinaNet:
    """Make a torchvision RetinaNet use the ops of this package for matching, losses and post-processing.

    The model may come from `retinanet_resnet50_fpn` or `retinanet_resnet50_fpn_v2`, or be any other `RetinaNet` or
    subclass that does not override the bypassed methods. Backbone, transform, anchor generator and the `forward` of the
    heads may be of any kind.

    Args:
        model: The model. It is changed in place: its class is replaced by a subclass of it, and nothing else changes.

    Returns:
        The same object. A model that is already accelerated is returned unchanged.

    Raises:
        TypeError: `model` is not a torchvision RetinaNet.
        ValueError: The model overrides a method that would be bypassed (`forward`, `compute_loss` or
            `postprocess_detections` of the model, `compute_loss` of a head, the coding of boxes, or the matching), or
            its box loss is unknown. The message names the method. An override made after this call raises in the next
            `forward`.

    Inputs, outputs, state dict, `torch.save` and copies work as before. Loading a file of the whole model requires this
    package, unless the file was saved after `restore`. Attributes such as `score_thresh`, `_loss_type` and the
    matcher's thresholds are read at each call. `torch.jit.script` and `torch.jit.trace` compile torchvision's
    `forward`.

    torchvision's own heads run without their permute and cat. A head that overrides `forward`, has hooks or is compiled
    is called, and its outputs are used.

    Losses and detections equal torchvision's up to float32 rounding, with these exceptions:

    - A ground truth that overlaps no anchor has no positives. torchvision makes every anchor positive.
    - More labels than boxes raise ValueError. torchvision ignores the surplus.
    - A label outside 0..K-1 raises ValueError. torchvision takes -1 as class K-1, and fails with IndexError or a CUDA
      assertion for K.
    - `topk_candidates` below 1 and negative `detections_per_img` raise ValueError.
    - In half precision and under autocast, anchors, losses and detections are float32. torchvision rounds them to half
      precision.
    - Detections have no gradient. Equal scores are ordered by anchor, then by class.
    """
    _check_model("accelerate", model)
    if isinstance(model, _Accelerated):
        return model
    _check_parts(model, (("", RetinaNet, ("forward",)), *_BYPASSED))
    model.__class__ = _accelerated_class(type(model))
    return model


def restore(model: RetinaNet) -> RetinaNet:
    """Undo `accelerate`.

    Args:
        model: The model. It is changed in place: its original class is set again.

    Returns:
        The same object. A model that is not accelerated is returned unchanged.

    Raises:
        TypeError: `model` is not a torchvision RetinaNet.
        ValueError: The class of the model was changed after `accelerate`.
    """
    _check_model("restore", model)
    if isinstance(model, _Accelerated):
        if "_original" not in vars(type(model)):
            raise ValueError(f"restore: model's class must be the one of accelerate(), got {type(model).__name__}")
        model.__class__ = type(model)._original
    return model


class _Accelerated(RetinaNet):
    """First base of the classes that `accelerate` makes; the second is the model's own class."""

    _original: type[RetinaNet]

    def __init_subclass__(cls) -> None:
        # Do not run the hook of the model's own class, which may register subclasses as new models.
        pass

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle and copy cannot find a class made at run time, so they store the model's own class and make it again.
        if "_original" not in vars(type(self)):
            return super().__reduce_ex__(protocol)
        function, arguments, *state = super().__reduce_ex__(protocol)
        own = [self._original if a is type(self) else a for a in arguments]
        return (_rebuild, (function, *own), *state)

    def __prepare_scriptable__(self) -> RetinaNet:
        """Return the model for `torch.jit.script` to compile, with torchvision's `forward`."""
        return restore(copy.copy(self))

    def forward(
        self,
        images: list[Tensor],  # N tensors [3, H_i, W_i]
        targets: list[dict[str, Tensor]] | None = None,  # `boxes` [M_i, 4] and `labels` [M_i] of each image
    ) -> Any:
        """Return losses in training mode and detections in evaluation mode; see torchvision's `RetinaNet`."""
        if torch.jit.is_tracing() or (self.training and not _are_boxes(targets)):
            return super().forward(images, targets)  # torchvision reports what is wrong with the targets
        _check_parts(self, _BYPASSED)
        original_sizes = [tuple(image.shape[-2:]) for image in images]
        batch, scaled = self.transform(images, targets)
        boxes_are_valid, label_range = _check_boxes_and_label_range(scaled or [], self.training)
        if not boxes_are_valid:
            return super().forward(images, targets)
        features = self.backbone(batch.tensors)
        features = [features] if isinstance(features, Tensor) else list(features.values())
        sizes = [(level.shape[-2], level.shape[-1]) for level in features]
        logits, deltas = _run_heads(self.head, features, None if self.training else sizes)
        anchors = _anchors(self.anchor_generator, batch, features)
        if self.training:
            return self.eager_outputs(_losses(self, logits, deltas, anchors, scaled, label_range), [])
        detections = _detections(self, logits, deltas, anchors, batch.image_sizes)
        return self.eager_outputs({}, self.transform.postprocess(detections, batch.image_sizes, original_sizes))


#: The accelerated class of each class seen so far.
_CLASSES: dict[type, Any] = {}


def _accelerated_class(own: type) -> Any:
    if own not in _CLASSES:
        entries = {"__module__": __name__, "_original": own}
        _CLASSES[own] = type(f"Accelerated{own.__name__}", (_Accelerated, own), entries)
    return _CLASSES[own]


def _rebuild(function: Any, *arguments: Any) -> RetinaNet:
    """Call the function by which pickle or copy makes an object of the original class, and set the accelerated class.

    The state of the model is restored afterwards.
    """
    model = function(*arguments)
    model.__class__ = _accelerated_class(type(model))
    return model


def _check_model(function: str, model: Any) -> None:
    if isinstance(model, RetinaNet):
        return
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    inside = next((f", whose {name!r} is one" for name, module in modules if isinstance(module, RetinaNet)), "")
    raise TypeError(f"{function}: model must be a torchvision RetinaNet, got {type(model).__name__}{inside}")


def _check_parts(model: RetinaNet, bypassed: Sequence[tuple[str, Any, tuple[str, ...]]]) -> None:
    """Raise ValueError if the model or one of its parts overrides a method or function that would be bypassed."""
    for path, owner, methods in bypassed:
        part = model
        for name in path.split(".") if path else ():
            part = getattr(part, name, None)
        for method in methods:
            if not _is_own(part, method, owner):
                where = f"model.{path}.{method}" if path else f"model.{method}"
                on_object = method in getattr(part, "__dict__", ())
                got = "an attribute set on the object" if on_object else f"that of {type(part).__name__}"
                raise ValueError(
                    f"accelerate: {where} must be torchvision's own {owner.__name__}.{method}, which would be "
                    f"bypassed, got {got}"
                )
    for module, function in _BYPASSED_FUNCTIONS:
        name = function.__name__
        if getattr(module, name) is not function:
            raise ValueError(f"accelerate: {module.__name__}.{name} must be torchvision's own, got another function")
    kind = model.head.regression_head._loss_type
    if kind not in BOX_LOSS_KINDS:
        raise ValueError(
            f"accelerate: model.head.regression_head._loss_type must be one of {', '.join(BOX_LOSS_KINDS)}, "
            f"got {kind!r}"
        )


def _is_own(part: Any, method: str, owner: Any) -> bool:
    """Return whether the method of this object is the one that `owner` defines, not overridden and not patched."""
    function = getattr(owner, method)
    patched = function.__module__ != owner.__module__ or method in getattr(part, "__dict__", ())
    return not patched and getattr(type(part), method, None) is function


def _are_boxes(targets: Sequence[dict[str, Tensor]] | None) -> bool:
    """Return whether there are targets and all their boxes are tensors [M, 4]."""
    return targets is not None and all(
        isinstance(t["boxes"], Tensor) and t["boxes"].dim() == 2 and t["boxes"].shape[1] == 4 for t in targets
    )


def _check_boxes_and_label_range(
    targets: Sequence[dict[str, Tensor]],  # `boxes` [M_i, 4] and `labels` [M_i] of each image
    training: bool,
) -> tuple[bool, tuple[int, int]]:
    """Return whether all boxes are finite with positive area, and in training the lowest and highest label.

    Synchronises with the device once. torchvision's `forward` handles invalid boxes: it raises for a box without area,
    and its losses are NaN for a box that is not finite.
    """
    if not sum(len(t["boxes"]) for t in targets):
        return True, (0, 0)
    boxes = torch.cat([t["boxes"] for t in targets])
    values = [(boxes[:, 2:] > boxes[:, :2]).all() & boxes.isfinite().all()]
    if training:
        labels = torch.cat([t["labels"] for t in targets])
        if labels.is_floating_point():
            raise TypeError(f"targets: expected integer labels, got {labels.dtype}")
        values += labels.aminmax()
    valid, *label_range = torch.stack([value.to(torch.int64) for value in values]).tolist()
    return bool(valid), (label_range[0], label_range[1]) if label_range else (0, 0)


def _run_heads(
    head: Any,
    features: list[Tensor],  # L tensors [N, C, H, W]
    sizes: Sequence[tuple[int, int]] | None,  # height and width of each level
) -> tuple[list[Tensor], list[Tensor]]:  # L tensors [N, A*K, H, W], L tensors [N, A*4, H, W]
    """Return logits and deltas of each level: tensors of torchvision's heads, or maps made from rows of other heads."""
    if not _runs_as_written(head, tv.RetinaNetHead):
        outputs = head(features)
        return _as_maps(outputs["cls_logits"], sizes), _as_maps(outputs["bbox_regression"], sizes)

    def run(part: Any, owner: Any, last: str) -> list[Tensor]:
        if not _runs_as_written(part, owner):
            return _as_maps(part(features), sizes)
        return [getattr(part, last)(part.conv(level)) for level in features]

    # As in torchvision, all logits come before all deltas, because a head may draw random numbers.
    logits = run(head.classification_head, tv.RetinaNetClassificationHead, "cls_logits")
    return logits, run(head.regression_head, tv.RetinaNetRegressionHead, "bbox_reg")


def _runs_as_written(module: Any, owner: Any) -> bool:
    """Return whether calling the module runs torchvision's `forward` and nothing else, such as hooks."""
    watched = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_compiled_call_impl")
    return _is_own(module, "forward", owner) and not any(getattr(module, name) for name in watched)


def _as_maps(
    rows: Tensor,  # [N, R, C]
    sizes: Sequence[tuple[int, int]] | None,
) -> list[Tensor]:  # L tensors [N, A*C, H, W], channels_last
    """Return the rows of a head as maps of the given sizes, or without sizes as one map of R x 1 cells.

    The single map needs no copy and is enough for the losses.
    """
    sizes = [(rows.shape[1], 1)] if sizes is None else sizes
    per_cell = rows.shape[1] // sum(h * w for h, w in sizes)
    levels = rows.split([per_cell * h * w for h, w in sizes], dim=1)
    # Flatten first. A view of a slice of the batch would keep strides that kernels do not accept as channels_last.
    flat = [level.reshape(-1) for level in levels]
    return [x.view(len(rows), h, w, -1).permute(0, 3, 1, 2) for x, (h, w) in zip(flat, sizes, strict=True)]


def _anchors(
    generator: Any,
    batch: ImageList,
    features: list[Tensor],  # L tensors [N, C, H, W]
) -> Tensor | ops.AnchorGrid:  # [N, A, 4]
    """Return a grid for torchvision's anchor generator, and the boxes themselves for any other generator."""
    is_grid = _runs_as_written(generator, AnchorGenerator)
    is_grid &= all(_is_own(generator, name, AnchorGenerator) for name in ("grid_anchors", "set_cell_anchors"))
    # torchvision raises for a wrong number of levels.
    if not is_grid or len(generator.cell_anchors) != len(features):
        return torch.stack(list(generator(batch, features)))
    generator.set_cell_anchors(generator.cell_anchors[0].dtype, features[0].device)
    height, width = batch.tensors.shape[-2:]
    return ops.AnchorGrid.from_base_anchors(
        [base.to(torch.float32) for base in generator.cell_anchors],
        [(level.shape[-2], level.shape[-1]) for level in features],
        image_size=(height, width),
    )


def _losses(
    model: RetinaNet,
    logits: list[Tensor],  # L tensors [N, A*K, H, W]
    deltas: list[Tensor],  # L tensors [N, A*4, H, W]
    anchors: Tensor | ops.AnchorGrid,  # [N, A, 4]
    targets: list[dict[str, Tensor]],
    label_range: tuple[int, int],  # lowest and highest label
) -> dict[str, Tensor]:
    """Return both losses as in torchvision: the batch mean of each image's sum over its positives (at least 1)."""
    truth = ops.pad_ground_truth([t["boxes"] for t in targets], [t["labels"] for t in targets])
    matcher, head = model.proposal_matcher, model.head.regression_head
    assigned = ops.assign_targets(
        anchors,
        truth.boxes,
        truth.labels,
        truth.count,
        rule=ops.MatchRule(
            fg_iou=matcher.high_threshold,
            bg_iou=matcher.low_threshold,
            low_quality="torchvision" if matcher.allow_low_quality_matches else "off",
        ),
    )
    num_classes = sum(level[0].numel() for level in logits) // assigned.labels.shape[1]
    low, high = label_range
    if low < 0 or high >= num_classes:
        raise ValueError(f"targets: expected labels in 0..{num_classes - 1}, got {low} to {high} in the batch")
    classification = ops.dense_focal_loss(logits, assigned.labels, num_classes, alpha=0.25, gamma=2.0)
    box = ops.dense_box_loss(
        deltas,
        anchors,
        truth.boxes,
        assigned.matches,
        kind=head._loss_type,
        beta=1.0,
        coder_weights=head.box_coder.weights,
        max_log_ratio=head.box_coder.bbox_xform_clip,
    )
    positives = assigned.num_positive.clamp(min=1)
    return {"classification": (classification / positives).mean(), "bbox_regression": (box / positives).mean()}


def _detections(
    model: RetinaNet,
    logits: list[Tensor],  # L tensors [N, A*K, H, W]
    deltas: list[Tensor],  # L tensors [N, A*4, H, W]
    anchors: Tensor | ops.AnchorGrid,  # [N, A, 4]
    image_sizes: list[tuple[int, int]],  # height and width of each image inside the batch
) -> list[dict[str, Tensor]]:
    """Return a dict per image with `boxes` [D, 4], `scores` [D], `labels` [D], best first, in pixels of the batch."""
    # A large `detections_per_img` stands for no limit. Slots beyond the number of candidates would only take memory.
    candidates = sum(min(model.topk_candidates, level[0].numel()) for level in logits)
    limit = candidates if model.detections_per_img is None else min(model.detections_per_img, candidates)
    detections = ops.detect(
        logits,
        deltas,
        anchors,
        torch.tensor(image_sizes, device=logits[0].device),
        score_threshold=model.score_thresh,
        topk_per_level=model.topk_candidates,
        iou_threshold=model.nms_thresh,
        max_detections=limit,
        coder_weights=model.box_coder.weights,
        max_log_ratio=model.box_coder.bbox_xform_clip,
    )
    scores = detections.scores.to(detections.boxes.dtype)
    return [
        {"boxes": detections.boxes[i, :n], "scores": scores[i, :n], "labels": detections.labels[i, :n]}
        for i, n in enumerate(detections.count.tolist())
    ]

"""torchvision's RetinaNet with the matching, the losses and the post-processing of this package.

`accelerate` gives a model a class of its own, made from the one it has: all that differs is `forward`.  Parameters,
submodules, attributes and hooks stay the objects they are, and `restore` gives the old class back.
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

#: What an accelerated `forward` no longer calls: where it is in the model, whose it must be, and its names there.
_REPLACED: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("", RetinaNet, ("compute_loss", "postprocess_detections")),
    ("head", tv.RetinaNetHead, ("compute_loss",)),
    ("head.classification_head", tv.RetinaNetClassificationHead, ("compute_loss",)),
    ("head.regression_head", tv.RetinaNetRegressionHead, ("compute_loss",)),
    ("head.regression_head.box_coder", BoxCoder, ("encode_single", "decode_single")),
    ("box_coder", BoxCoder, ("decode_single",)),
    ("proposal_matcher", Matcher, ("__call__", "set_low_quality_matches_")),
)
#: Functions that the methods above call, and that are sometimes replaced in torchvision's modules.
_CALLED: tuple[tuple[ModuleType, Any], ...] = (
    *((tv, function) for function in (sigmoid_focal_loss, _box_loss)),
    *((boxes, function) for function in (batched_nms, box_iou, clip_boxes_to_image)),
)


def accelerate(model: RetinaNet) -> RetinaNet:
    """Lets a torchvision RetinaNet match, compute its losses and post-process by this package's ops.

    It takes what `retinanet_resnet50_fpn` and `retinanet_resnet50_fpn_v2` return, and any other `RetinaNet` or subclass
    that leaves the replaced methods alone, whatever its backbone, transform, anchor generator and heads' `forward`.

    Args:
        model: The model.  It is changed in place: it gets a subclass of its class, and nothing else changes.

    Returns:
        The same object.  An accelerated model is returned as it is.

    Raises:
        TypeError: `model` is no torchvision RetinaNet.
        ValueError: The model overrides what would be passed over: `forward`, `compute_loss` or `postprocess_detections`
            of the model, `compute_loss` of a head, coding of boxes or matching; or its box loss is unknown.  The
            message names it.  What is overridden after the call raises in the next `forward`.

    Inputs, outputs, state dict, `torch.save` and copies stay what they were; who loads a file of the whole model needs
    this package, unless it was saved after `restore`.  Attributes such as `score_thresh`, `_loss_type` and the
    matcher's thresholds are read at each call.  `torch.jit.script` and `torch.jit.trace` see torchvision's `forward`.

    torchvision's heads run without their permute and cat.  A head that overrides `forward`, has hooks or is compiled is
    called, and what it returns is used.

    Losses and detections are torchvision's to float32 rounding, but for these:

    - A ground truth that overlaps no anchor has no positives; torchvision makes all anchors without overlap positive.
    - More labels than boxes raise ValueError; torchvision passes over the surplus.
    - A label outside 0..K-1 raises ValueError; in torchvision -1 is class K-1, and K an IndexError or a CUDA assertion.
    - At least one candidate of each level is kept, and no number of detections is negative: others raise ValueError.
    - In half precision and under autocast, anchors, losses and detections are float32; torchvision rounds them.
    - Detections have no gradient.  Equal scores are ordered by anchor, then class.
    """
    _check_model("accelerate", model)
    if isinstance(model, _Accelerated):
        return model
    _check_parts(model, (("", RetinaNet, ("forward",)), *_REPLACED))
    model.__class__ = _accelerated_class(type(model))
    return model


def restore(model: RetinaNet) -> RetinaNet:
    """Undoes `accelerate`.

    Args:
        model: The model, changed in place: it gets its own class back.

    Returns:
        The same object.  A model that is not accelerated is returned as it is.

    Raises:
        TypeError: `model` is no torchvision RetinaNet.
        ValueError: Its class has been changed again after `accelerate`.
    """
    _check_model("restore", model)
    if isinstance(model, _Accelerated):
        if "_original" not in vars(type(model)):
            raise ValueError(f"restore: model's class must be the one of accelerate(), got {type(model).__name__}")
        model.__class__ = type(model)._original
    return model


class _Accelerated(RetinaNet):
    """Stands before a model's own class in the class that `accelerate` makes."""

    _original: type[RetinaNet]

    def __init_subclass__(cls) -> None:
        # The classes made here are no new models: registries and the like of the model's own class must not see them.
        pass

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle and copy cannot find a class that was made at run time: they take the model's own and make it again.
        if "_original" not in vars(type(self)):
            return super().__reduce_ex__(protocol)
        function, arguments, *state = super().__reduce_ex__(protocol)
        own = [self._original if a is type(self) else a for a in arguments]
        return (_rebuild, (function, *own), *state)

    def __prepare_scriptable__(self) -> RetinaNet:
        """What `torch.jit.script` compiles."""
        return restore(copy.copy(self))

    def forward(
        self,
        images: list[Tensor],  # N tensors [3, H_i, W_i]
        targets: list[dict[str, Tensor]] | None = None,  # `boxes` [M_i, 4] and `labels` [M_i] of each image
    ) -> Any:
        """Losses in training mode, detections in evaluation mode; see torchvision's `RetinaNet`."""
        if torch.jit.is_tracing() or (self.training and not _are_boxes(targets)):
            return super().forward(images, targets)  # what is wrong with the targets is left to torchvision to say
        _check_parts(self, _REPLACED)
        original_sizes = [tuple(image.shape[-2:]) for image in images]
        batch, scaled = self.transform(images, targets)
        wrong, labels = _survey(scaled or [], self.training)
        if wrong:
            return super().forward(images, targets)
        features = self.backbone(batch.tensors)
        features = [features] if isinstance(features, Tensor) else list(features.values())
        sizes = [(level.shape[-2], level.shape[-1]) for level in features]
        logits, deltas = _run_heads(self.head, features, None if self.training else sizes)
        anchors = _anchors(self.anchor_generator, batch, features)
        if self.training:
            return self.eager_outputs(_losses(self, logits, deltas, anchors, scaled, labels), [])
        found = _detections(self, logits, deltas, anchors, batch.image_sizes)
        return self.eager_outputs({}, self.transform.postprocess(found, batch.image_sizes, original_sizes))


#: The classes made so far, by the classes they were made from.
_CLASSES: dict[type, Any] = {}


def _accelerated_class(own: type) -> Any:
    if own not in _CLASSES:
        entries = {"__module__": __name__, "_original": own}
        _CLASSES[own] = type(f"Accelerated{own.__name__}", (_Accelerated, own), entries)
    return _CLASSES[own]


def _rebuild(function: Any, *arguments: Any) -> RetinaNet:
    """Makes an accelerated model, still without its state, where pickle or copy make one of its own class."""
    model = function(*arguments)
    model.__class__ = _accelerated_class(type(model))
    return model


def _check_model(function: str, model: Any) -> None:
    if isinstance(model, RetinaNet):
        return
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    inside = next((f", whose {name!r} is one" for name, module in modules if isinstance(module, RetinaNet)), "")
    raise TypeError(f"{function}: model must be a torchvision RetinaNet, got {type(model).__name__}{inside}")


def _check_parts(model: RetinaNet, replaced: Sequence[tuple[str, Any, tuple[str, ...]]]) -> None:
    """Raise ValueError if the model, or a part of it, overrides what would be passed over."""
    for path, owner, methods in replaced:
        part = model
        for name in path.split(".") if path else ():
            part = getattr(part, name, None)
        for method in methods:
            if not _is_own(part, method, owner):
                where = f"model.{path}.{method}" if path else f"model.{method}"
                of_class = method not in getattr(part, "__dict__", ())
                raise ValueError(
                    f"accelerate: {where} must be torchvision's own {owner.__name__}.{method}, which would be passed "
                    f"over, got {f'that of {type(part).__name__}' if of_class else 'an attribute set on the object'}"
                )
    for module, function in _CALLED:
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
    """Whether calling the method on this object runs its owner's code, in which nobody has put another's."""
    function = getattr(owner, method)
    replaced = function.__module__ != owner.__module__ or method in getattr(part, "__dict__", ())
    return not replaced and getattr(type(part), method, None) is function


def _are_boxes(targets: Sequence[dict[str, Tensor]] | None) -> bool:
    """Whether there are targets, whose boxes are tensors [M, 4]."""
    return targets is not None and all(
        isinstance(t["boxes"], Tensor) and t["boxes"].dim() == 2 and t["boxes"].shape[1] == 4 for t in targets
    )


def _survey(targets: Sequence[dict[str, Tensor]], training: bool) -> tuple[bool, tuple[int, int]]:
    """Whether any box is degenerate or not finite, in training also the least and the greatest label; waits once."""
    if not sum(len(t["boxes"]) for t in targets):
        return False, (0, 0)
    rows = torch.cat([t["boxes"] for t in targets])
    # torchvision says what is wrong with a box without area, and has NaN losses for one that is not finite.
    facts = [~((rows[:, 2:] > rows[:, :2]).all() & rows.isfinite().all())]
    if training:
        labels = torch.cat([t["labels"] for t in targets])
        if labels.is_floating_point():
            raise TypeError(f"targets: expected integer labels, got {labels.dtype}")
        facts += labels.aminmax()
    wrong, *extremes = torch.stack([fact.to(torch.int64) for fact in facts]).tolist()
    return bool(wrong), (extremes[0], extremes[-1]) if extremes else (0, 0)


def _run_heads(
    head: Any,
    features: list[Tensor],  # L tensors [N, C, H, W]
    sizes: Sequence[tuple[int, int]] | None,  # height and width of each level
) -> tuple[list[Tensor], list[Tensor]]:  # L tensors [N, A*K, H, W], L tensors [N, A*4, H, W]
    """Logits and deltas as `_as_maps` has them, but from torchvision's own heads each level's own tensors."""
    if not _runs_as_written(head, tv.RetinaNetHead):
        outputs = head(features)
        return _as_maps(outputs["cls_logits"], sizes), _as_maps(outputs["bbox_regression"], sizes)

    def run(part: Any, owner: Any, last: str) -> list[Tensor]:
        if not _runs_as_written(part, owner):
            return _as_maps(part(features), sizes)
        return [getattr(part, last)(part.conv(level)) for level in features]

    # All logits before all deltas, as in torchvision: a head may draw random numbers.
    logits = run(head.classification_head, tv.RetinaNetClassificationHead, "cls_logits")
    return logits, run(head.regression_head, tv.RetinaNetRegressionHead, "bbox_reg")


def _runs_as_written(module: Any, owner: Any) -> bool:
    """Whether a call of the module does what torchvision's `forward` says, and no more."""
    watched = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_compiled_call_impl")
    return _is_own(module, "forward", owner) and not any(getattr(module, name) for name in watched)


def _as_maps(
    rows: Tensor,  # [N, R, C]
    sizes: Sequence[tuple[int, int]] | None,
) -> list[Tensor]:  # L tensors [N, A*C, H, W], channels_last
    """A head's rows as maps of these sizes; or, enough for losses, as one map of R x 1 cells, which costs no copy."""
    sizes = [(rows.shape[1], 1)] if sizes is None else sizes
    per_cell = rows.shape[1] // sum(h * w for h, w in sizes)
    levels = rows.split([per_cell * h * w for h, w in sizes], dim=1)
    # Flat first: a view of the batch's slice would keep its strides, which the kernels do not take for channels_last.
    flat = [level.reshape(-1) for level in levels]
    return [x.view(len(rows), h, w, -1).permute(0, 3, 1, 2) for x, (h, w) in zip(flat, sizes, strict=True)]


def _anchors(
    generator: Any,
    batch: ImageList,
    features: list[Tensor],  # L tensors [N, C, H, W]
) -> Tensor | ops.AnchorGrid:  # [N, A, 4]
    """The anchors of torchvision's generator described, those of any other as it gives them."""
    described = _runs_as_written(generator, AnchorGenerator)
    described &= all(_is_own(generator, name, AnchorGenerator) for name in ("grid_anchors", "set_cell_anchors"))
    # For a wrong number of levels torchvision has a message.
    if not described or len(generator.cell_anchors) != len(features):
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
    labels: tuple[int, int],  # the least and the greatest of them
) -> dict[str, Tensor]:
    """Both losses as torchvision has them: sums of each image over its positives (at least 1), mean of the batch."""
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
    low, high = labels
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
    """One dict per image with `boxes` [D, 4], `scores` [D] and `labels` [D], best first, in pixels of the batch."""
    # More slots than candidates, for a `detections_per_img` that stands for no limit, would only take memory.
    candidates = sum(min(model.topk_candidates, level[0].numel()) for level in logits)
    limit = candidates if model.detections_per_img is None else min(model.detections_per_img, candidates)
    found = ops.detect(
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
    scores = found.scores.to(found.boxes.dtype)
    return [
        {"boxes": found.boxes[i, :n], "scores": scores[i, :n], "labels": found.labels[i, :n]}
        for i, n in enumerate(found.count.tolist())
    ]

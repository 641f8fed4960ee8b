"""Heads and detections of accelerated models as functions of tensors alone, for programs that are exported."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

import retinanet_ops as ops
from retinanet_ops._fcos import detect

from . import _fcos, _retinanet
from ._anchors import anchors_of
from ._inputs import run_backbone


class HeadMaps(NamedTuple):
    """The outputs of a RetinaNet's heads, one tensor per level, finest first."""

    cls_logits: list[Tensor]  # L tensors [N, A*K, H, W]
    box_deltas: list[Tensor]  # L tensors [N, A*4, H, W]


def is_exportable(model: nn.Module) -> bool:
    """Return whether the functions of this module take a model: an accelerated RetinaNet or FCOS."""
    return isinstance(model, (_retinanet.AcceleratedForward, _fcos.AcceleratedForward))


def heads(model: Any, pixels: Tensor) -> Any:  # [N, 3, H, W] normalised -> a named tuple of lists of maps
    """Run the network alone."""
    features = list(run_backbone(model, ImageList(pixels, [])).values())
    if isinstance(model, _fcos.AcceleratedForward):
        return _fcos._run_head(model.head, features)
    sizes = [(level.shape[-2], level.shape[-1]) for level in features]
    return HeadMaps(*_retinanet._run_heads(model.head, features, sizes))


def detections(
    model: Any,
    outputs: Any,  # what `heads` returns
    pixels: Tensor,  # [N, 3, H, W], of which only the size is used
    image_sizes: Tensor,  # [N, 2] (height, width) of each image inside the batch
) -> ops.Detections:
    """Return detections in pixels of the batch, in `model.detections_per_img` slots for each image.

    Raises:
        ValueError: The anchors are not those of torchvision's `AnchorGenerator`, the number of detections has no limit,
            or an FCOS measures distances in pixels. The message has the remedy.
    """
    # Other generators, which are refused, make anchors for each image, and need one.
    batch = ImageList(pixels, [(pixels.shape[-2], pixels.shape[-1])])
    anchors = anchors_of(model.anchor_generator, batch, outputs[0])
    if not isinstance(anchors, ops.AnchorGrid):
        raise ValueError(
            "model.anchor_generator: expected torchvision's AnchorGenerator with its own methods, got "
            f"{type(model.anchor_generator).__name__}, whose anchors the exported file cannot compute; give its sizes "
            "and aspect ratios to an AnchorGenerator"
        )
    if model.detections_per_img is None:
        raise ValueError(
            "model.detections_per_img: expected the number of slots for the detections in an image, got None; set it "
            "to the most that an image may have"
        )
    options: dict[str, Any] = {
        "score_threshold": model.score_thresh,
        "topk_per_level": model.topk_candidates,
        "iou_threshold": model.nms_thresh,
        "max_detections": model.detections_per_img,
    }
    if isinstance(model, _fcos.AcceleratedForward):
        if not model.box_coder.normalize_by_size:
            raise ValueError(
                "model.box_coder.normalize_by_size: expected True, got False; distances in pixels cannot be "
                "exported, so train with BoxLinearCoder(normalize_by_size=True)"
            )
        return detect(outputs, anchors, image_sizes, **options)
    coder = model.box_coder
    return ops.detect(
        outputs.cls_logits,
        outputs.box_deltas,
        anchors,
        image_sizes,
        coder_weights=coder.weights,
        max_log_ratio=coder.bbox_xform_clip,
        **options,
    )


def reference(
    model: Any,
    pixels: Tensor,  # [N, 3, H, W] normalised
    image_sizes: Tensor,  # [N, 2] (height, width) of each image inside the batch
) -> list[dict[str, Tensor]]:
    """Return what `forward` finds between the two transforms: a dict for each image, in pixels of the batch."""
    sizes = [(height, width) for height, width in image_sizes.tolist()]
    batch = ImageList(pixels, sizes)
    features = list(run_backbone(model, batch).values())
    anchors = anchors_of(model.anchor_generator, batch, features)
    if isinstance(model, _fcos.AcceleratedForward):
        outputs = _fcos._run_head(model.head, features)
        return _fcos._detections(model, outputs, _fcos._points(anchors, features), sizes)
    shapes = [(level.shape[-2], level.shape[-1]) for level in features]
    return _retinanet._detections(model, *_retinanet._run_heads(model.head, features, shapes), anchors, sizes)

"""The detectors that can be exported, in the one form that the other modules take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS as TorchvisionFCOS

import retinanet_ops as ops
from retinanet.common.errors import ConfigError, DataError, listed
from retinanet.common.modes import evaluation_mode
from retinanet.model.detector import Detector
from retinanet.model.fcos import FCOS
from retinanet.model.network import RetinaNet
from retinanet.model.pyramid_config import CUSTOM
from retinanet.model.ssd import SSD
from retinanet.model.targets import ImageDetections, split_detections
from retinanet.model.thresholds import ScoreThresholds
from retinanet_ops.integrations.torchvision import _export

#: Height and width of the image whose maps tell the stride of a network.
_PROBE = 256


class ExportError(DataError):
    """A model cannot be exported. The message is one line with the reason and the remedy."""


class Exportable(NamedTuple):
    """What the export needs to know of a detector.

    Attributes:
        module: The detector.
        architecture: Its name in the metadata.
        heads: Returns the maps of each level for normalised pixels, as a named tuple of lists.
        detections: Returns the detections for these maps, for the pixels, of which only the size is used, and for the
            sizes of the images.
        reference: Returns the detections of each image for normalised pixels and the sizes of the images, by the code
            that the model itself runs.
        normalize: Normalises an image [3, H, W] in 0..1.
        mean: Mean of each colour.
        std: Standard deviation of each colour.
        class_names: Name of each class by label; empty if they are not known.
        category_ids: Id of each class in the data set; empty if they are not known.
        min_size: Length to which the shorter side of an image is resized, or None to keep its size.
        max_size: Upper bound on the longer side.
        score_threshold: Detections have a score above this.
        score_thresholds: The score thresholds with the best F1 on a validation set, or None if none were chosen.
        stretched: Height and width to which every image is resized, whatever its aspect ratio, or None.
        fixed_size: The only height and width of the input, to which these images are padded, or None if it has several.
        divisor: Multiple to which the model itself pads its batches.
        stride: Stride of the coarsest level, if the network takes several sizes.
        backbone: What an error names if the network cannot be traced.
    """

    module: nn.Module
    architecture: str
    heads: Callable[[Tensor], Any]
    detections: Callable[[Any, Tensor, Tensor], ops.Detections]
    reference: Callable[[Tensor, Tensor], list[ImageDetections]]
    normalize: Callable[[Tensor], Tensor]
    mean: Tensor  # [3, 1, 1] float32
    std: Tensor  # [3, 1, 1] float32
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    min_size: int | None
    max_size: int
    score_threshold: float
    score_thresholds: ScoreThresholds | None
    stretched: tuple[int, int] | None
    fixed_size: tuple[int, int] | None
    divisor: int
    stride: int
    backbone: str


def exportable(model: nn.Module, class_names: Sequence[str] = ()) -> Exportable:
    """Return the form of a detector that the export takes.

    Args:
        model: A RetinaNet, FCOS or SSD of this package, or an accelerated RetinaNet or FCOS of torchvision.
        class_names: Name of each label of a model of torchvision, or none if they are not known.

    Raises:
        ConfigError: Another number of names is given than the model has labels, or the model knows its own.
        ExportError: The model is another one, or has a setting that cannot be exported. The message names it.
    """
    name = type(model).__name__
    if isinstance(model, (RetinaNet, FCOS, SSD)):
        if class_names:
            raise ConfigError(
                f"class_names: expected none, because this {name} has its own in config.class_names, got "
                f"{listed(class_names)}; leave them out"
            )
        return _own(model)
    if _export.is_exportable(model):
        return _accelerated(model, class_names)
    if isinstance(model, Detector):
        raise ExportError(
            f"{name}: cannot be exported, because its number of proposals depends on values, which only the host can "
            "read; export a RetinaNet, an FCOS or an SSD"
        )
    raise ExportError(
        f"{name}: cannot be exported; expected a RetinaNet, an FCOS or an SSD of this package, or a RetinaNet or an "
        "FCOS of torchvision after retinanet_ops.integrations.torchvision.accelerate"
    )


def _own(model: RetinaNet | FCOS | SSD) -> Exportable:
    config = model.config
    mean, std = model.transform.colours.sum(0)[..., None, None]
    fixed, stride, backbone = config.fixed_size, 1, "the network"
    if not isinstance(model, SSD):
        levels = model.config.fpn_levels
        stride = 2 ** levels[-1]
        if model.config.backbone == CUSTOM:
            backbone = f"the custom backbone {type(model.backbone).__name__}"
    return Exportable(
        module=model,
        architecture=config.architecture,
        heads=model.heads,
        detections=model.detections_of,
        reference=lambda pixels, sizes: split_detections(model.detections(pixels, sizes)),
        normalize=model.transform.normalize,
        mean=mean,
        std=std,
        class_names=config.class_names,
        category_ids=config.category_ids,
        min_size=config.min_size[-1] if config.min_size else None,
        max_size=config.max_size,
        score_threshold=config.score_threshold,
        score_thresholds=model.score_thresholds,
        stretched=fixed,
        fixed_size=fixed,
        divisor=config.size_divisible,
        stride=stride,
        backbone=backbone,
    )


def _accelerated(model: Any, class_names: Sequence[str]) -> Exportable:
    transform, parameter = model.transform, next(model.parameters())
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=parameter.device)[:, None, None]
        for values in (transform.image_mean, transform.image_std)
    )

    def heads(pixels: Tensor) -> Any:
        return _export.heads(model, pixels)

    def detections(outputs: Any, pixels: Tensor, sizes: Tensor) -> ops.Detections:
        return _export.detections(model, outputs, pixels, sizes)

    def reference(pixels: Tensor, sizes: Tensor) -> list[ImageDetections]:
        return [ImageDetections(**found) for found in _export.reference(model, pixels, sizes)]

    architecture = "torchvision_fcos" if isinstance(model, TorchvisionFCOS) else "torchvision_retinanet"
    pixels = parameter.new_zeros(1, 3, _PROBE, _PROBE)
    with torch.no_grad(), evaluation_mode(model):
        outputs = heads(pixels)
        try:
            detections(in_float32(outputs), pixels, torch.full((1, 2), _PROBE, device=pixels.device))
        except ValueError as error:
            raise ExportError(f"{architecture}: cannot be exported: {error}") from error
    logits, boxes = (levels[-1] for levels in outputs[:2])
    num_labels = logits.shape[1] * 4 // boxes.shape[1]
    if class_names and len(class_names) != num_labels:
        raise ConfigError(
            f"class_names: expected {num_labels} names, one for each label of the model from 0, got {len(class_names)}"
        )
    stretched = fixed = None
    divisor = transform.size_divisible
    if transform.fixed_size is not None:
        # torchvision takes the width first.
        stretched = transform.fixed_size[1], transform.fixed_size[0]
        fixed = -(-stretched[0] // divisor) * divisor, -(-stretched[1] // divisor) * divisor
    return Exportable(
        module=model,
        architecture=architecture,
        heads=heads,
        detections=detections,
        reference=reference,
        normalize=transform.normalize,
        mean=mean,
        std=std,
        class_names=tuple(class_names),
        category_ids=(),
        min_size=transform.min_size[-1],
        max_size=transform.max_size,
        score_threshold=model.score_thresh,
        score_thresholds=None,
        stretched=stretched,
        fixed_size=fixed,
        divisor=divisor,
        stride=_PROBE // logits.shape[-1],
        backbone=f"the backbone {type(model.backbone).__name__}",
    )


def in_float32(outputs: Any) -> Any:
    """Return the maps of all levels in float32."""
    return type(outputs)(*([level.to(torch.float32) for level in levels] for levels in outputs))

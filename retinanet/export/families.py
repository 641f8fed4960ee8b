"""The detectors that can be exported, in the one form that the other modules take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS as TorchvisionFCOS

import retinanet_ops as ops
from retinanet.common.errors import DataError
from retinanet.model.detector import Detector
from retinanet.model.fcos import FCOS
from retinanet.model.network import RetinaNet
from retinanet.model.pyramid_config import CUSTOM
from retinanet.model.ssd import SSD
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
        reference: Returns the detections for normalised pixels and the sizes of the images, as the model computes them.
        normalize: Normalises an image [3, H, W] in 0..1.
        mean: Mean of each colour.
        std: Standard deviation of each colour.
        class_names: Name of each class by label; empty if they are not known.
        category_ids: Id of each class in the data set; empty if they are not known.
        min_size: Length to which the shorter side of an image is resized, or None to keep its size.
        max_size: Upper bound on the longer side.
        score_threshold: Detections have a score above this.
        fixed_size: The only height and width that the network takes, or None if it takes several.
        divisor: Multiple to which the model itself pads its batches.
        stride: Stride of the coarsest level, if the network takes several sizes.
        backbone: What an error names if the network cannot be traced.
    """

    module: nn.Module
    architecture: str
    heads: Callable[[Tensor], Any]
    detections: Callable[[Any, Tensor, Tensor], ops.Detections]
    reference: Callable[[Tensor, Tensor], ops.Detections]
    normalize: Callable[[Tensor], Tensor]
    mean: Tensor  # [3, 1, 1] float32
    std: Tensor  # [3, 1, 1] float32
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    min_size: int | None
    max_size: int
    score_threshold: float
    fixed_size: tuple[int, int] | None
    divisor: int
    stride: int
    backbone: str


def exportable(model: nn.Module, class_names: Sequence[str] = ()) -> Exportable:
    """Return the form of a detector that the export takes.

    Args:
        model: A RetinaNet, FCOS or SSD of this package, or an accelerated RetinaNet or FCOS of torchvision.
        class_names: Names of the classes of a model that does not know them.

    Raises:
        ExportError: The model is another one. The message names its class.
    """
    if isinstance(model, (RetinaNet, FCOS, SSD)):
        return _own(model)
    if _export.is_exportable(model):
        return _accelerated(model, class_names)
    name = type(model).__name__
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
        reference=model.detections,
        normalize=model.transform.normalize,
        mean=mean,
        std=std,
        class_names=config.class_names,
        category_ids=config.category_ids,
        min_size=config.min_size[-1] if config.min_size else None,
        max_size=config.max_size,
        score_threshold=config.score_threshold,
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

    with torch.no_grad():
        coarsest = heads(parameter.new_zeros(1, 3, _PROBE, _PROBE))[0][-1]
    return Exportable(
        module=model,
        architecture="torchvision_fcos" if isinstance(model, TorchvisionFCOS) else "torchvision_retinanet",
        heads=heads,
        detections=detections,
        reference=lambda pixels, sizes: detections(heads(pixels), pixels, sizes),
        normalize=transform.normalize,
        mean=mean,
        std=std,
        class_names=tuple(class_names),
        category_ids=(),
        min_size=transform.min_size[-1],
        max_size=transform.max_size,
        score_threshold=model.score_thresh,
        fixed_size=None,
        divisor=transform.size_divisible,
        stride=_PROBE // coarsest.shape[-1],
        backbone=f"the backbone {type(model.backbone).__name__}",
    )


def in_float32(outputs: Any) -> Any:
    """Return the maps of all levels in float32."""
    return type(outputs)(*([level.to(torch.float32) for level in levels] for levels in outputs))

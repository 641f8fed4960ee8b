"""What the detectors with a feature pyramid share: the backbone, its maps, and its mode."""

from __future__ import annotations

import os

from torch import Tensor, nn

from retinanet.model.backbone import build_backbone
from retinanet.model.detector import Detector
from retinanet.model.detector_config import PyramidConfig
from retinanet.model.losses import Normaliser
from retinanet.model.pyramid_config import CUSTOM


class PyramidDetector(Detector):
    """Base of the detectors with a feature pyramid.

    Args:
        config: The configuration, which is kept as `model.config`.
        normaliser: The divisor of an image's loss sums.
        backbone_weights: Path to a torchvision state dict of the backbone (ImageNet), or None.
        backbone: Module for a configuration whose backbone is `custom`. It takes images `[N, 3, H, W]` and returns one
            map `[N, out_channels, H_l, W_l]` for each of `config.fpn_levels`, as a dict or, for one level, as a
            tensor. Its attribute `out_channels` must be `config.fpn_channels`. The module itself decides which of its
            parameters are trained.

    Raises:
        DataError: The weights of the backbone cannot be read or do not fit.
        ValueError: `backbone` is missing, is given for another configuration, or does not fit the configuration.
    """

    config: PyramidConfig

    def __init__(
        self,
        config: PyramidConfig,
        normaliser: Normaliser,
        backbone_weights: str | os.PathLike[str] | None,
        backbone: nn.Module | None,
    ) -> None:
        """Build the backbone with random weights, unless weights are given."""
        super().__init__(config, normaliser)
        _check_backbone(config, backbone)
        self.backbone: nn.Module = build_backbone(config, backbone_weights) if backbone is None else backbone

    @property
    def body(self) -> nn.Module:
        """The backbone without its pyramid, which is its module `body`, or the whole backbone if there is none."""
        body = getattr(self.backbone, "body", self.backbone)
        return body if isinstance(body, nn.Module) else self.backbone

    def maps(self, pixels: Tensor) -> list[Tensor]:  # [N, 3, H, W] normalised -> L tensors [N, C, H_l, W_l]
        """Run the backbone and return the map of each pyramid level, finest first.

        Raises:
            ValueError: A custom backbone does not return one map for each pyramid level.
        """
        maps = self.backbone(pixels)
        levels = [maps] if isinstance(maps, Tensor) else list(maps.values())
        if len(levels) != len(self.config.fpn_levels):
            raise ValueError(
                f"backbone: expected a map for each of the configuration's fpn_levels {self.config.fpn_levels}, "
                f"got {len(levels)}"
            )
        return levels

    def train(self, mode: bool = True) -> PyramidDetector:
        """Set the mode; under `backbone_norm="eval"`, the backbone's normalisation layers stay in evaluation mode."""
        super().train(mode)
        if self.config.backbone_norm == "eval":
            for module in self.body.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


def _check_backbone(config: PyramidConfig, backbone: nn.Module | None) -> None:
    if (backbone is None) == (config.backbone == CUSTOM):
        raise ValueError(
            f"backbone: expected a module if and only if the configuration's backbone is {CUSTOM!r}, "
            f"got {type(backbone).__name__} with {config.backbone!r}"
        )
    if backbone is not None and getattr(backbone, "out_channels", None) != config.fpn_channels:
        raise ValueError(
            f"backbone: expected out_channels to be the configuration's fpn_channels {config.fpn_channels}, "
            f"got {getattr(backbone, 'out_channels', 'no such attribute')}"
        )

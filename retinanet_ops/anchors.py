"""Where the anchors are: `AnchorGrid` describes them, and every op can compute their coordinates on the fly.

Conventions of the package: boxes are `(x1, y1, x2, y2)` in absolute pixels, continuous (width = x2 - x1).  Anchor rows
are ordered by level, then y, then x, then the anchor `a` within the cell (`a = ratio * scales + scale` in the
torchvision, mmdet and yhenon layouts).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .constants import ANCHOR_ASPECT_RATIOS, ANCHOR_SIZES, ANCHOR_STRIDES, MAX_LEVELS, TORCHVISION_ANCHOR_SIZES


class AnchorArguments(NamedTuple):
    """Anchors in the form that the kernels' schemas take."""

    tensor: Tensor  # [A, 4], [N, A, 4], or with a grid the base anchors [sum of anchors_per_cell, 4]
    grid_sizes: list[int]  # height, width and anchors per cell of each level; empty without a grid
    grid_steps: list[float]  # stride y, stride x, offset y, offset x of each level; empty without a grid


@dataclass(frozen=True, eq=False)
class AnchorGrid:
    """Anchors of a feature pyramid, described instead of stored.

    Anchor `a` of the cell (y, x) is the base anchor `a` of its level, moved by `(x * stride_x + offset_x,
    y * stride_y + offset_y)`, computed in float32 in this order, whatever the autocast state.

    Attributes:
        base_anchors: Base anchors of all levels, one level after the other, around the origin of their cell.
        anchors_per_cell: Number of base anchors of each level.
        grid_sizes: Height and width, in cells, of each level.
        strides: Distance between cells in pixels, (y, x), of each level.
        offsets: Position of the first cell in pixels, (y, x), of each level.

    Raises:
        ValueError: The levels disagree in number, a size or count is negative, or there are more than 16 levels.
        TypeError: `base_anchors` is not a float32 tensor.
    """

    base_anchors: Tensor  # [sum of anchors_per_cell, 4] float32
    anchors_per_cell: tuple[int, ...]
    grid_sizes: tuple[tuple[int, int], ...]
    strides: tuple[tuple[float, float], ...]
    offsets: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if self.base_anchors.dtype != torch.float32:
            raise TypeError(f"AnchorGrid: base_anchors must be float32, got {self.base_anchors.dtype}")
        levels = len(self.grid_sizes)
        if levels > MAX_LEVELS:
            raise ValueError(f"AnchorGrid: expected at most {MAX_LEVELS} levels, got {levels}")
        for name in ("anchors_per_cell", "strides", "offsets"):
            entries = len(getattr(self, name))
            if entries != levels:
                raise ValueError(
                    f"AnchorGrid: {name} must have one entry for each of the {levels} grid_sizes, got {entries}"
                )
        for size in self.grid_sizes:
            if min(size) < 0:
                raise ValueError(f"AnchorGrid: grid_sizes must not be negative, got {size}")
        if any(count < 0 for count in self.anchors_per_cell):
            raise ValueError(f"AnchorGrid: anchors_per_cell must not be negative, got {self.anchors_per_cell}")
        expected = [sum(self.anchors_per_cell), 4]
        if list(self.base_anchors.shape) != expected:
            raise ValueError(
                f"AnchorGrid: base_anchors must have shape {expected} (sum of anchors_per_cell, 4), "
                f"got {list(self.base_anchors.shape)}"
            )

    @property
    def num_anchors(self) -> int:
        """Number of anchors of all levels."""
        return sum(h * w * a for (h, w), a in zip(self.grid_sizes, self.anchors_per_cell, strict=True))

    def to(self, device: torch.device | str) -> AnchorGrid:
        """The same grid with its base anchors on `device`."""
        return replace(self, base_anchors=self.base_anchors.to(device))

    def boxes(self) -> Tensor:  # [A, 4] float32
        """All anchors, in the package's row order, on the device of `base_anchors`."""
        device = self.base_anchors.device
        levels = []
        for base, (h, w), (stride_y, stride_x), (offset_y, offset_x) in zip(
            self.base_anchors.split(list(self.anchors_per_cell)),
            self.grid_sizes,
            self.strides,
            self.offsets,
            strict=True,
        ):
            y = torch.arange(h, dtype=torch.float32, device=device) * stride_y + offset_y
            x = torch.arange(w, dtype=torch.float32, device=device) * stride_x + offset_x
            y, x = torch.meshgrid(y, x, indexing="ij")
            shifts = torch.stack((x, y, x, y), dim=-1)  # [H, W, 4]
            levels.append((shifts[:, :, None] + base).reshape(-1, 4))
        return torch.cat(levels) if levels else self.base_anchors.new_empty(0, 4)

    def arguments(self) -> AnchorArguments:
        """The grid in the form that the kernels' schemas take."""
        sizes: list[int] = []
        steps: list[float] = []
        for (h, w), per_cell, stride, offset in zip(
            self.grid_sizes, self.anchors_per_cell, self.strides, self.offsets, strict=True
        ):
            sizes += [h, w, per_cell]
            steps += [float(stride[0]), float(stride[1]), float(offset[0]), float(offset[1])]
        return AnchorArguments(self.base_anchors, sizes, steps)

    @classmethod
    def torchvision(
        cls,
        grid_sizes: Sequence[tuple[int, int]],
        image_size: tuple[int, int],
        sizes: Sequence[Sequence[float]] = TORCHVISION_ANCHOR_SIZES,
        aspect_ratios: Sequence[Sequence[float]] | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> AnchorGrid:
        """Anchors of `torchvision.models.detection` (0.29): rounded base anchors, strides derived from the image.

        Args:
            grid_sizes: Height and width of each feature map.
            image_size: Height and width in pixels of the padded batch; strides are `image_size // grid_size` per axis.
            sizes: Anchor sizes (square root of the area, pixels) of each level; default: torchvision's RetinaNet.
            aspect_ratios: Height / width ratios of each level; default: 0.5, 1, 2 everywhere.
            device: Where the base anchors live.
        """
        ratios = [ANCHOR_ASPECT_RATIOS] * len(sizes) if aspect_ratios is None else aspect_ratios
        base = [torchvision_base_anchors(s, r) for s, r in zip(sizes, ratios, strict=True)]
        strides = [(image_size[0] // h, image_size[1] // w) for h, w in grid_sizes]
        return cls._of_levels(base, grid_sizes, strides, offset=0.0, device=device)

    @classmethod
    def detectron2(
        cls,
        grid_sizes: Sequence[tuple[int, int]],
        strides: Sequence[int] = ANCHOR_STRIDES,
        sizes: Sequence[Sequence[float]] = ANCHOR_SIZES,
        aspect_ratios: Sequence[float] = ANCHOR_ASPECT_RATIOS,
        *,
        offset: float = 0.0,
        device: torch.device | str | None = None,
    ) -> AnchorGrid:
        """Anchors of detectron2's `DefaultAnchorGenerator`: not rounded, fixed strides, `a = size * ratios + ratio`.

        `offset` is the centre of the first anchor in units of the stride.
        """
        base = []
        for level in sizes:
            rows = []
            for size in level:
                for ratio in aspect_ratios:
                    width = (size**2.0 / ratio) ** 0.5
                    rows.append(_centred(width, ratio * width))
            base.append(torch.tensor(rows, dtype=torch.float32).reshape(-1, 4))
        return cls._of_levels(base, grid_sizes, [(s, s) for s in strides], offset=offset, device=device)

    @classmethod
    def mmdet(
        cls,
        grid_sizes: Sequence[tuple[int, int]],
        strides: Sequence[int] = ANCHOR_STRIDES,
        *,
        octave_base_scale: float = 4.0,
        scales_per_octave: int = 3,
        sizes: Sequence[Sequence[float]] | None = None,
        aspect_ratios: Sequence[float] = ANCHOR_ASPECT_RATIOS,
        centre_offset: float = 0.0,
        device: torch.device | str | None = None,
    ) -> AnchorGrid:
        """Anchors of mmdet 3's `AnchorGenerator`: not rounded, fixed strides, `a = ratio * scales + scale`.

        `sizes` of each level may stand in the place of `octave_base_scale * 2**(i / scales_per_octave) * stride`.

        With a `centre_offset` of 0.5 they are those of yhenon's pytorch-retinanet, which computes in float64 and rounds
        last: 1 coordinate in 20 differs in its last bit.
        """
        if sizes is None:
            scales = [octave_base_scale * 2 ** (i / scales_per_octave) for i in range(scales_per_octave)]
            sizes = [[s * stride for s in scales] for stride in strides]
        base = [_ratio_major(torch.tensor(level, dtype=torch.float32), aspect_ratios) for level in sizes]
        return cls._of_levels(base, grid_sizes, [(s, s) for s in strides], offset=centre_offset, device=device)

    @classmethod
    def odtk(
        cls,
        grid_sizes: Sequence[tuple[int, int]],
        strides: Sequence[int] = ANCHOR_STRIDES,
        *,
        aspect_ratios: Sequence[float] = (1.0, 2.0, 0.5),
        scales: Sequence[float] = (4.0, 4.0 * 2 ** (1 / 3), 4.0 * 2 ** (2 / 3)),
        sizes: Sequence[Sequence[float]] | None = None,
        device: torch.device | str | None = None,
    ) -> AnchorGrid:
        """Anchors of NVIDIA's ODTK: not rounded, centred on the cell (+0.5 stride), `a = scale * ratios + ratio`.

        `sizes` of each level may stand in the place of `scale * stride`.
        """
        if sizes is None:
            sizes = [[scale * stride for scale in scales] for stride in strides]
        base = []
        for level in sizes:
            rows = []
            for size in level:
                for ratio in aspect_ratios:
                    width = size / ratio**0.5
                    rows.append(_centred(width, width * ratio))
            base.append(torch.tensor(rows, dtype=torch.float32).reshape(-1, 4))
        return cls._of_levels(base, grid_sizes, [(s, s) for s in strides], offset=0.5, device=device)

    @classmethod
    def _of_levels(
        cls,
        base: Sequence[Tensor],  # one [a, 4] float32 per level
        grid_sizes: Sequence[tuple[int, int]],
        strides: Sequence[tuple[float, float]],
        *,
        offset: float,
        device: torch.device | str | None,
    ) -> AnchorGrid:
        empty = torch.empty(0, 4)
        return cls(
            base_anchors=torch.cat([empty, *base]).to(device) if device is not None else torch.cat([empty, *base]),
            anchors_per_cell=tuple(len(b) for b in base),
            grid_sizes=tuple((int(h), int(w)) for h, w in grid_sizes),
            strides=tuple((float(y), float(x)) for y, x in strides),
            offsets=tuple((offset * y, offset * x) for y, x in strides),
        )


def torchvision_base_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:  # [ratios * sizes, 4]
    """Rounded base anchors of one level as torchvision makes them: ratio-major, centred on the origin, half to even."""
    return _ratio_major(torch.tensor(sizes, dtype=torch.float32), aspect_ratios).round()


def as_arguments(anchors: Tensor | AnchorGrid) -> AnchorArguments:
    """Either form of anchors in the form that the kernels' schemas take."""
    return anchors.arguments() if isinstance(anchors, AnchorGrid) else AnchorArguments(anchors, [], [])


def as_boxes(anchors: Tensor | AnchorGrid) -> Tensor:  # [A, 4] or [N, A, 4]
    """Either form of anchors as explicit boxes."""
    return anchors.boxes() if isinstance(anchors, AnchorGrid) else anchors


def _centred(width: float, height: float) -> list[float]:
    return [-width / 2, -height / 2, width / 2, height / 2]


def _ratio_major(
    sizes: Tensor,  # [scales] float32
    aspect_ratios: Sequence[float],
) -> Tensor:  # [ratios * scales, 4] float32
    height_ratio = torch.tensor(aspect_ratios, dtype=torch.float32).sqrt()
    width_ratio = 1 / height_ratio
    widths = (width_ratio[:, None] * sizes).flatten()
    heights = (height_ratio[:, None] * sizes).flatten()
    return torch.stack((-widths, -heights, widths, heights), dim=1) / 2

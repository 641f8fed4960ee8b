"""`AnchorGrid` describes the anchors of a feature pyramid, so that ops compute coordinates instead of loading them.

Conventions of the package: boxes are `(x1, y1, x2, y2)` in absolute pixels, continuous (width = x2 - x1). Anchor rows
are ordered by level, then y, then x, then the anchor `a` within the cell. In the torchvision, mmdet and yhenon layouts,
`a = ratio * sizes + size`, where `ratio` and `size` are indices and `sizes` is the number of sizes. In the detectron2
and ODTK layouts, `a = size * ratios + ratio`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .constants import (
    ANCHOR_ASPECT_RATIOS,
    ANCHOR_PROFILES,
    ANCHOR_SIZES,
    ANCHOR_STRIDES,
    MAX_LEVELS,
    TORCHVISION_ANCHOR_SIZES,
)


class AnchorArguments(NamedTuple):
    """Anchors as the three arguments of an op's schema."""

    tensor: Tensor  # [A, 4], [N, A, 4], or with a grid the base anchors [sum of anchors_per_cell, 4]
    grid_sizes: list[int]  # height, width and anchors per cell of each level; empty without a grid
    grid_steps: list[float]  # stride y, stride x, offset y, offset x of each level; empty without a grid


@dataclass(frozen=True, eq=False)
class AnchorGrid:
    """The anchors of a feature pyramid, described instead of stored.

    Anchor `a` of the cell (y, x) is the base anchor `a` of its level, shifted by `x * stride_x + offset_x` in x and by
    `y * stride_y + offset_y` in y. Coordinates are computed in float32 in this order of operations, whatever the
    autocast state.

    Attributes:
        base_anchors: Base anchors around the origin of their cell, one level after the other.
        anchors_per_cell: Number of base anchors of each level.
        grid_sizes: Height and width of each level, in cells.
        strides: Distance between cells of each level, (y, x) in pixels.
        offsets: Origin of the first cell of each level, (y, x) in pixels.

    Raises:
        ValueError: The attributes have different numbers of levels, a size or count is negative, there are more than 16
            levels, or `base_anchors` does not have the shape that `anchors_per_cell` implies.
        TypeError: `base_anchors` is not a float32 tensor.
    """

    base_anchors: Tensor  # [sum of anchors_per_cell, 4] float32
    anchors_per_cell: tuple[int, ...]
    grid_sizes: tuple[tuple[int, int], ...]
    strides: tuple[tuple[float, float], ...]
    offsets: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        """Check every attribute."""
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
        """The number of anchors of all levels."""
        return self.arguments_and_count()[1]

    def to(self, device: torch.device | str) -> AnchorGrid:
        """Return the same grid with its base anchors on `device`."""
        return replace(self, base_anchors=self.base_anchors.to(device))

    def boxes(self) -> Tensor:  # [A, 4] float32
        """Return all anchors, in the package's row order, on the device of `base_anchors`."""
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
        """Return the grid as the three arguments of an op's schema."""
        return self.arguments_and_count()[0]

    def arguments_and_count(self) -> tuple[AnchorArguments, int]:
        """Return the arguments of a schema and the number of anchors. Eager mode computes them once for each grid."""
        if torch.compiler.is_compiling():  # the sizes may be symbols of one graph
            return self._new_arguments_and_count()
        cached: tuple[AnchorArguments, int] | None = self.__dict__.get("_arguments_and_count")
        if cached is None:
            cached = self._new_arguments_and_count()
            object.__setattr__(self, "_arguments_and_count", cached)
        return cached

    def _new_arguments_and_count(self) -> tuple[AnchorArguments, int]:
        sizes: list[int] = []
        steps: list[float] = []
        for (h, w), per_cell, stride, offset in zip(
            self.grid_sizes, self.anchors_per_cell, self.strides, self.offsets, strict=True
        ):
            sizes += [h, w, per_cell]
            steps += [float(stride[0]), float(stride[1]), float(offset[0]), float(offset[1])]
        count = sum(h * w * a for (h, w), a in zip(self.grid_sizes, self.anchors_per_cell, strict=True))
        return AnchorArguments(self.base_anchors, sizes, steps), count

    @classmethod
    def from_base_anchors(
        cls,
        base_anchors: Tensor | Sequence[Tensor],  # [L * anchors per cell, 4] or L tensors [anchors per cell, 4]
        grid_sizes: Sequence[tuple[int, int]],
        strides: Sequence[float] | None = None,
        *,
        image_size: tuple[int, int] | None = None,
        centre_offset: float = 0.0,
        device: torch.device | str | None = None,
    ) -> AnchorGrid:
        """Return the grid that repeats base anchors at every cell of feature maps of the given sizes.

        Args:
            base_anchors: Boxes around the origin of their cell, float32: either one tensor with the same number of
                boxes for each level, as `retinanet_ops.base_anchors` returns it, or a list of one tensor per level.
            grid_sizes: Height and width of each feature map.
            strides: Distance between cells of each level in pixels, in both directions.
            image_size: Height and width in pixels of the padded batch, instead of `strides`. The strides are then
                `image_size // grid_size` per axis, as in torchvision.
            centre_offset: Origin of the first cell, in units of the stride.
            device: Device of the base anchors; None leaves them where they are.

        Raises:
            ValueError: Both or neither of `strides` and `image_size` are given, or `AnchorGrid` does not accept the
                result, for example because the arguments have different numbers of levels.
        """
        if (strides is None) == (image_size is None):
            raise ValueError("AnchorGrid: expected either strides or image_size, got both or neither")
        if isinstance(base_anchors, Tensor):
            per_cell = (len(base_anchors) // max(1, len(grid_sizes)),) * len(grid_sizes)
        else:
            per_cell = tuple(len(level) for level in base_anchors)
            base_anchors = torch.cat(list(base_anchors)) if base_anchors else torch.empty(0, 4)
        if image_size is not None:
            steps = [(float(image_size[0] // h), float(image_size[1] // w)) for h, w in grid_sizes]
        else:
            steps = [(float(s), float(s)) for s in strides or ()]
        return cls(
            base_anchors=base_anchors if device is None else base_anchors.to(device),
            anchors_per_cell=per_cell,
            grid_sizes=tuple((h, w) for h, w in grid_sizes),
            strides=tuple(steps),
            offsets=tuple((centre_offset * y, centre_offset * x) for y, x in steps),
        )

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
        """Return the anchors of `torchvision.models.detection` (torchvision 0.29).

        Base anchors are rounded to pixels, and strides are `image_size // grid_size` per axis.

        Args:
            grid_sizes: Height and width of each feature map.
            image_size: Height and width in pixels of the padded batch.
            sizes: Anchor sizes (square root of the area, in pixels) of each level, by default those of torchvision's
                RetinaNet.
            aspect_ratios: Ratios of height to width of each level, by default 0.5, 1 and 2 on every level.
            device: Device of the base anchors, by default the CPU.
        """
        ratios = [ANCHOR_ASPECT_RATIOS] * len(sizes) if aspect_ratios is None else aspect_ratios
        base = [_level_anchors("torchvision", s, r).reshape(-1, 4) for s, r in zip(sizes, ratios, strict=True)]
        return cls.from_base_anchors(base, grid_sizes, image_size=image_size, device=device)

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
        """Return the anchors of detectron2's `DefaultAnchorGenerator`, ordered as `a = size * ratios + ratio`.

        Base anchors are not rounded, and strides are fixed.

        Args:
            grid_sizes: Height and width of each feature map.
            strides: Distance between cells of each level in pixels.
            sizes: Anchor sizes (square root of the area, in pixels) of each level.
            aspect_ratios: Ratios of height to width, the same on every level.
            offset: Centre of the anchors of the first cell, in units of the stride.
            device: Device of the base anchors, by default the CPU.
        """
        base = [_level_anchors("detectron2", s, aspect_ratios).transpose(0, 1).reshape(-1, 4) for s in sizes]
        return cls.from_base_anchors(base, grid_sizes, strides, centre_offset=offset, device=device)

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
        """Return the anchors of mmdet 3's `AnchorGenerator`, ordered as `a = ratio * sizes + size`.

        Base anchors are not rounded, and strides are fixed. With a `centre_offset` of 0.5 the result is that of
        yhenon's pytorch-retinanet, except that about 1 coordinate in 20 differs in its last bit. That project computes
        in float64 and rounds at the end.

        Args:
            grid_sizes: Height and width of each feature map.
            strides: Distance between cells of each level in pixels.
            octave_base_scale: Smallest anchor size, in units of the stride.
            scales_per_octave: Number of sizes of each level, `octave_base_scale * 2**(i / scales_per_octave) * stride`.
            sizes: Anchor sizes (square root of the area, in pixels) of each level, instead of `octave_base_scale` and
                `scales_per_octave`.
            aspect_ratios: Ratios of height to width, the same on every level.
            centre_offset: Centre of the anchors of the first cell, in units of the stride.
            device: Device of the base anchors, by default the CPU.
        """
        if sizes is None:
            scales = [octave_base_scale * 2 ** (i / scales_per_octave) for i in range(scales_per_octave)]
            sizes = [[s * stride for s in scales] for stride in strides]
        base = [_level_anchors("mmdet", level, aspect_ratios).reshape(-1, 4) for level in sizes]
        return cls.from_base_anchors(base, grid_sizes, strides, centre_offset=centre_offset, device=device)

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
        """Return the anchors of NVIDIA's ODTK, ordered as `a = size * ratios + ratio`.

        Base anchors are not rounded, strides are fixed, and anchors are centred on their cell (+0.5 stride).

        Args:
            grid_sizes: Height and width of each feature map.
            strides: Distance between cells of each level in pixels.
            aspect_ratios: Ratios of height to width, the same on every level.
            scales: Anchor sizes of each level, in units of the stride.
            sizes: Anchor sizes (square root of the area, in pixels) of each level, instead of `scales`.
            device: Device of the base anchors, by default the CPU.
        """
        if sizes is None:
            sizes = [[scale * stride for scale in scales] for stride in strides]
        base = [_level_anchors("odtk", s, aspect_ratios).transpose(0, 1).reshape(-1, 4) for s in sizes]
        return cls.from_base_anchors(base, grid_sizes, strides, centre_offset=0.5, device=device)


def base_anchors(
    sizes: Sequence[Sequence[float]],
    aspect_ratios: Sequence[float] = ANCHOR_ASPECT_RATIOS,
    *,
    profile: str = "torchvision",
) -> Tensor:  # [levels * ratios * sizes, 4] float32
    """Return the base anchors of all levels, boxes around the origin of their cell, by the rules of one project.

    Args:
        sizes: Anchor sizes (square root of the area, in pixels) of each level.
        aspect_ratios: Ratios of height to width, the same on every level.
        profile: "torchvision" rounds coordinates to pixels, half to even. "detectron2", "mmdet", "yhenon" and "odtk" do
            not round; their results differ from each other in the last bits only.

    Returns:
        The boxes of one level after the other. Within a level the order is `a = ratio * sizes + size` for every
        profile, while detectron2 and ODTK themselves use `a = size * ratios + ratio`.

    Raises:
        ValueError: `profile` is unknown.
    """
    if profile not in ANCHOR_PROFILES:
        raise ValueError(f"base_anchors: profile must be one of {', '.join(ANCHOR_PROFILES)}, got {profile!r}")
    levels = [_level_anchors(profile, level, aspect_ratios).reshape(-1, 4) for level in sizes]
    return torch.cat([torch.empty(0, 4), *levels])


def as_arguments(anchors: Tensor | AnchorGrid) -> AnchorArguments:
    """Return either form of anchors as the three arguments of an op's schema."""
    return anchors.arguments() if isinstance(anchors, AnchorGrid) else AnchorArguments(anchors, [], [])


def as_boxes(anchors: Tensor | AnchorGrid) -> Tensor:  # [A, 4] or [N, A, 4]
    """Return either form of anchors as boxes."""
    return anchors.boxes() if isinstance(anchors, AnchorGrid) else anchors


def _level_anchors(
    profile: str,
    sizes: Sequence[float],
    aspect_ratios: Sequence[float],
) -> Tensor:  # [ratios, sizes, 4] float32
    """Return the base anchors of one level, computed in the order and precision of the project.

    The bits therefore equal the project's own. yhenon's are the exception, because that project computes in float64.
    """
    if profile in ("detectron2", "odtk"):  # these two compute in Python floats and round to float32 at the end
        rows = []
        for ratio in aspect_ratios:
            for size in sizes:
                width = (size**2.0 / ratio) ** 0.5 if profile == "detectron2" else size / ratio**0.5
                height = ratio * width
                rows.append([-width / 2, -height / 2, width / 2, height / 2])
        return torch.tensor(rows, dtype=torch.float32).reshape(len(aspect_ratios), len(sizes), 4)
    # The others compute in float32 throughout.
    height_ratios = torch.tensor(aspect_ratios, dtype=torch.float32).sqrt()[:, None]
    roots = torch.tensor(sizes, dtype=torch.float32)  # square roots of the areas
    widths, heights = (1 / height_ratios) * roots, height_ratios * roots
    boxes = torch.stack((-widths, -heights, widths, heights), dim=-1) / 2
    return boxes.round() if profile == "torchvision" else boxes

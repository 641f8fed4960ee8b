"""The program that is exported: from images in 0..1 to detections in fixed slots, or to the outputs of the heads."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from retinanet.common.errors import one_line
from retinanet.common.memory import is_out_of_memory
from retinanet.export.families import Exportable, ExportError, exportable, in_float32
from retinanet.export.metadata import OUTPUT_NAMES

#: Number of images with which a program for any number is traced. torch.export takes 1 for a constant.
_TRACED_BATCH = 2
#: Smallest height and width of a program for any size, in strides of the coarsest level. torch.export takes a level of
#: one cell for a constant.
LEAST_STRIDES = 2


class DetectionProgram(nn.Module):
    """A detector as an engine runs it: tensors in, tensors out, and nothing that depends on values.

    The images are normalised inside. Pixels outside an image become zero after that, as in `Detector.prepare`, whatever
    values the padding has.

    Args:
        source: The detector.
        raw: Return the outputs of the heads instead of detections.
        half: Compute the network, but neither normalisation nor post-processing, in half precision.
    """

    mean: Tensor  # [3, 1, 1] float32
    std: Tensor  # [3, 1, 1] float32

    def __init__(self, source: Exportable, *, raw: bool = False, half: bool = False) -> None:
        """Keep the detector, or a copy of it in half precision."""
        super().__init__()
        if half:
            names = source.class_names
            source = exportable(copy.deepcopy(source.module).half())._replace(class_names=names)
        self.source = source
        self.raw, self.half_precision = raw, half
        self.model = source.module  # registers the parameters
        self.register_buffer("mean", source.mean, persistent=False)
        self.register_buffer("std", source.std, persistent=False)
        self.eval()

    def forward(
        self,
        images: Tensor,  # [N, 3, H, W] float32 in 0..1, RGB, resized and padded
        sizes: Tensor,  # [N, 2] int64, height and width of each image without its padding
    ) -> tuple[Tensor, ...]:
        """Return detections, or the maps of each level with `raw`.

        Returns:
            `boxes` [N, D, 4] in pixels of the input, `scores` [N, D] and `labels` [N, D], best first, with zero boxes,
            scores of 0 and labels of -1 in unused slots, and `count` [N]. With `raw`, the outputs of the heads in the
            order of `output_names`, float32.
        """
        rows, columns = (torch.arange(side, device=images.device) for side in images.shape[-2:])
        inside = (rows < sizes[:, :1])[:, None, :, None] & (columns < sizes[:, 1:])[:, None, None, :]
        pixels = torch.where(inside, (images - self.mean) / self.std, 0.0)
        outputs = self.source.heads(pixels.half() if self.half_precision else pixels)
        if self.half_precision:
            outputs = in_float32(outputs)
        if self.raw:
            return tuple(level for levels in outputs for level in levels)
        found = self.source.detections(outputs, pixels, sizes)
        return found.boxes, found.scores, found.labels, found.count

    def output_names(self) -> tuple[str, ...]:
        """Return the names of the outputs, in their order; those of the heads end in the number of the level from 0."""
        if not self.raw:
            return OUTPUT_NAMES
        height, width = self.source.fixed_size or (LEAST_STRIDES * self.step,) * 2
        pixels = self.mean.new_zeros(1, 3, height, width)
        with torch.no_grad():
            outputs = self.source.heads(pixels.half() if self.half_precision else pixels)
        return tuple(f"{name}_{i}" for name in outputs._fields for i in range(len(getattr(outputs, name))))

    @property
    def step(self) -> int:
        """The number of which height and width are multiples in a program for any size."""
        return math.lcm(self.source.stride, self.source.divisor)


def trace(program: DetectionProgram, size: tuple[int, int] | None, batch: int | None) -> torch.export.ExportedProgram:
    """Return a program as a graph.

    Args:
        program: The program.
        size: Height and width of the input; None traces a program for any multiples of `program.step`.
        batch: Number of images; None traces a program for any number.

    Raises:
        ExportError: torch.export cannot trace the network.
    """
    height, width = size or (LEAST_STRIDES * program.step, (LEAST_STRIDES + 1) * program.step)
    number = batch or _TRACED_BATCH
    images = program.mean.new_zeros(number, 3, height, width)
    sizes = torch.tensor([[height, width]] * number, device=images.device)
    of_images: dict[int, Any] = {}
    of_sizes: dict[int, Any] = {}
    if batch is None:
        of_images[0] = of_sizes[0] = torch.export.Dim("batch", min=1)
    if size is None:
        for axis, name in ((2, "height"), (3, "width")):
            of_images[axis] = program.step * torch.export.Dim(name, min=LEAST_STRIDES)
    try:
        with torch.no_grad():
            return torch.export.export(program, (images, sizes), dynamic_shapes=(of_images, of_sizes))
    except Exception as error:  # torch.export raises errors of many classes, and those of the network.
        if is_out_of_memory(error):
            raise
        remedy = "its code must not depend on values of tensors"
        if size is None:
            remedy += "; a network that needs one size may be traced with a fixed size"
        raise ExportError(
            f"{program.source.backbone} cannot be traced by torch.export: {one_line(error)}; {remedy}"
        ) from error

"""`export_model`, which writes a detector as one file that runs without this package's Python code."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from retinanet.common.errors import ConfigError
from retinanet.common.export_options import POSTPROCESSING, SUFFIXES
from retinanet.common.modes import evaluation_mode
from retinanet.export.families import Exportable, exportable
from retinanet.export.formats import check_modules, write
from retinanet.export.metadata import InputRule, Metadata
from retinanet.export.program import LEAST_STRIDES, DetectionProgram, trace


def export_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    postprocess: str = "nms",
    half: bool = False,
    class_names: Sequence[str] = (),
) -> Metadata:
    """Write a detector to one file, with normalisation and post-processing inside.

    Args:
        model: A RetinaNet, FCOS or SSD of this package, or a RetinaNet or FCOS of torchvision that
            `retinanet_ops.integrations.torchvision.accelerate` has accelerated. It is not changed, and is exported in
            evaluation mode for the device that it is on. The labels of torchvision's models stay torchvision's.
        path: The file. An interrupted or failed call leaves the old file.
        format: `pt2` (torch.export), `onnx` or `aoti` (a package of AOTInductor). None takes `onnx` for a path that
            ends in `.onnx`, and `pt2` for one that ends in `.pt2`.
        size: Height and width of the input. None exports for any multiples of the stride of the coarsest level, or for
            the only size that the network takes.
        batch: Number of images of the input. None exports for any number.
        postprocess: `nms` returns detections in fixed slots, `raw` the outputs of the heads.
        half: Compute the network in half precision. Inputs, outputs and post-processing stay float32.
        class_names: Name of each label of a model of torchvision, the background included, for the metadata. This
            package's own models know their classes.

    Returns:
        The metadata that the file carries.

    Raises:
        ConfigError: An argument is wrong. The message names it.
        UsageError: A package that the format needs is not installed.
        ExportError: The model is of another kind, or cannot be traced or written in this format.
        OSError: The file cannot be written.

    See `DetectionProgram.forward` for the inputs and outputs.
    """
    path = Path(path)
    export_format = check_format(path, format)
    if postprocess not in POSTPROCESSING:
        raise ConfigError(f"postprocess: expected one of {', '.join(POSTPROCESSING)}, got {postprocess!r}")
    if batch is not None and batch < 1:
        raise ConfigError(f"batch: expected at least 1, or any number of images, got {batch}")
    source = exportable(model, class_names)
    size = _input_size(source, size)
    check_modules(export_format)
    # The program shares the modules of the model.
    with evaluation_mode(model):
        program = DetectionProgram(source, raw=postprocess == "raw", half=half)
        metadata = Metadata(
            architecture=source.architecture,
            class_names=source.class_names,
            category_ids=source.category_ids,
            size=size,
            batch=batch,
            postprocess=postprocess,
            half=half,
            score_threshold=source.score_threshold,
            score_thresholds=source.score_thresholds,
            rule=input_rule(source, size, program.step),
            outputs=program.output_names(),
        )
        write(path, trace(program, size, batch), export_format, metadata)
    return metadata


def check_format(path: Path, export_format: str | None) -> str:
    """Return the format of a file, by its suffix if None is given.

    Raises:
        ConfigError: There is no such format, or the suffix is another one.
    """
    if export_format is None:
        by_suffix = {".onnx": "onnx", ".pt2": "pt2"}
        if path.suffix not in by_suffix:
            raise ConfigError(f"format: expected one of {', '.join(SUFFIXES)}, or a file name in .onnx or .pt2")
        return by_suffix[path.suffix]
    if export_format not in SUFFIXES:
        raise ConfigError(f"format: expected one of {', '.join(SUFFIXES)}, got {export_format!r}")
    suffix = SUFFIXES[export_format]
    if path.suffix != suffix:
        raise ConfigError(f"format {export_format}: expected a file name that ends in {suffix}, got {path}")
    return export_format


def _input_size(source: Exportable, size: tuple[int, int] | None) -> tuple[int, int] | None:
    """Return the height and width of the input, or None for any.

    Raises:
        ConfigError: The network does not take the size.
    """
    if source.fixed_size is not None:
        if size not in (None, source.fixed_size):
            height, width = source.fixed_size
            raise ConfigError(
                f"size: expected {height} {width}, the only size that this {source.architecture} takes, got {size[0]} "
                f"{size[1]}; leave it out"
            )
        return source.fixed_size
    if size is not None and (min(size) < 1 or size[0] % source.divisor or size[1] % source.divisor):
        raise ConfigError(
            f"size: expected multiples of {source.divisor}, to which the model pads its batches, got {size[0]} "
            f"{size[1]}"
        )
    return size


def input_rule(source: Exportable, size: tuple[int, int] | None, step: int) -> InputRule:
    """Return how images become inputs of a program.

    Args:
        source: The detector.
        size: Height and width of the input, or None for any multiples of `step`.
        step: The number of which height and width are multiples, if they are not fixed.
    """
    rule = InputRule(min_size=source.min_size, max_size=source.max_size, stretched=source.stretched)
    if size is None:
        return dataclasses.replace(rule, multiple=step, least=LEAST_STRIDES * step)
    return dataclasses.replace(rule, padded=size)

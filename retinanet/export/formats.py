"""The files that an exported program is written to: torch.export, AOTInductor and ONNX."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from retinanet.common.errors import UsageError, one_line
from retinanet.common.files import replacing
from retinanet.common.memory import is_out_of_memory
from retinanet.export.families import ExportError
from retinanet.export.metadata import INPUT_NAMES, Metadata

#: Name of the file with the metadata inside a `.pt2` file of torch.export.
EXTRA_FILE = "retinanet.json"
OPSET = 18
#: Modules that a format needs besides the dependencies of the detectors, with the extra that installs them.
_MODULES = {"onnx": (("onnx", "onnx"), ("onnxscript", "onnx"))}


def check_modules(export_format: str) -> None:
    """Check that the packages that a format needs are installed.

    Raises:
        UsageError: One is not. The message has the command that installs it.
    """
    for module, extra in _MODULES.get(export_format, ()):
        require(module, extra, f"format {export_format}")


def require(module: str, extra: str, purpose: str) -> None:
    """Import a module of an optional package.

    Raises:
        UsageError: It is not installed. The message has the command that installs it.
    """
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{purpose}: the Python module {error.name} is not installed: run pip install 'retinanet-ops[{extra}]'"
        ) from error


def write(path: Path, program: torch.export.ExportedProgram, export_format: str, metadata: Metadata) -> None:
    """Write a program to a file; an interrupted or failed call leaves the old file.

    Raises:
        ExportError: The format cannot hold the program, or its compiler fails.
        OSError: The file cannot be written.
    """
    writer = {"pt2": _write_pt2, "onnx": _write_onnx, "aoti": _write_aoti}[export_format]
    with replacing(path) as temporary:
        try:
            with _quiet():
                writer(temporary, program, metadata)
        except OSError:
            raise
        except Exception as error:  # The exporters raise errors of many classes.
            if is_out_of_memory(error) or isinstance(error, ExportError):
                raise
            raise ExportError(f"{path}: cannot be written as {export_format}: {one_line(error)}") from error


def _write_pt2(path: Path, program: torch.export.ExportedProgram, metadata: Metadata) -> None:
    # torch.export takes an open file under any name.
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={EXTRA_FILE: json.dumps(metadata.to_texts(), indent=2)})


def _write_aoti(path: Path, program: torch.export.ExportedProgram, metadata: Metadata) -> None:
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "package.pt2"
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(package), inductor_configs={"aot_inductor.metadata": metadata.to_texts()}
        )
        path.write_bytes(package.read_bytes())


def _write_onnx(path: Path, program: torch.export.ExportedProgram, metadata: Metadata) -> None:
    import onnx

    from retinanet_ops.onnx import translations

    exported = torch.onnx.export(
        program,
        dynamo=True,
        input_names=INPUT_NAMES,
        output_names=metadata.outputs,
        opset_version=OPSET,
        custom_translation_table=translations(),
        verbose=False,
    )
    assert exported is not None
    exported.model.metadata_props.update(metadata.to_texts())
    onnx.save(exported.model_proto, path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' own messages away; what matters to the caller is raised as an error."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.utils.cpp_extension")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

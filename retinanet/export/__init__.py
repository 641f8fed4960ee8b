"""Export of detectors to files that run without this package's Python code: torch.export, ONNX and AOTInductor."""

from retinanet.export.exporting import export_model
from retinanet.export.families import ExportError
from retinanet.export.metadata import InputRule, Metadata

__all__ = ["ExportError", "InputRule", "Metadata", "export_model"]

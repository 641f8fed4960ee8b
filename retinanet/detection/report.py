"""The report of an evaluation: one HTML page with numbers, plots and pictures, which loads nothing from elsewhere."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from retinanet.common.files import replacing
from retinanet.data import DetectionDataset
from retinanet.detection import report_plots as plots
from retinanet.detection.coco_input import CocoInput
from retinanet.detection.coco_numbers import STAT_MEANINGS
from retinanet.detection.evaluate import EvaluationResult
from retinanet.detection.image_errors import list_errors, match_image
from retinanet.detection.report_pictures import error_picture
from retinanet.detection.score_curves import IOU, OperatingPoint

#: File name of the page.
REPORT = "report.html"
_WORST_IMAGES = 12
_SUSPICIONS = 20
# The kinds of errors of TIDE (Bolya et al. 2020, arXiv:2008.08115), with hotcoco's keys.
_TIDE_KINDS = {
    "Cls": "right place, wrong class",
    "Loc": "right class, IoU from 0.1 to 0.5",
    "Both": "wrong class, IoU from 0.1 to 0.5",
    "Dupe": "a second detection of an object",
    "Bkg": "a detection where no object is (IoU up to 0.1)",
    "Miss": "an object that no detection explains",
}


def write_report(
    path: Path,
    title: str,
    dataset: DetectionDataset,
    result: EvaluationResult,
    points: Sequence[OperatingPoint],
) -> None:
    """Write the report of an evaluation to one HTML file.

    Args:
        path: The file, replaced atomically.
        title: What was evaluated, such as the name of the model file.
        dataset: The images and their ground truth.
        result: The evaluation.
        points: What `operating_points` returned. The errors are shown at the threshold of the first.

    Raises:
        DataError: An image of the data set has vanished or been damaged.
    """
    content = CocoInput.from_coco(dataset.coco, result.detections)
    counts = points[0].counts
    errors = list_errors(content.above(counts.threshold))
    position = {identity: index for index, identity in enumerate(dataset.image_ids)}
    indices = [position[identity] for identity in content.image_ids]
    page = _template().render(
        title=title,
        source=dataset.source,
        summary=dataset.summary(),
        detections=len(result.detections),
        stats=[(name, result.stats[name], meaning) for name, meaning in STAT_MEANINGS.items()],
        points=points,
        counts=counts,
        plots=_plots(content, result, counts.threshold),
        worst=[
            {
                "name": dataset.paths[indices[entry.image]].name,
                "errors": entry,
                "picture": _data_uri("image/jpeg", _picture(content, counts.threshold, entry.image, dataset, indices)),
            }
            for entry in errors.images[:_WORST_IMAGES]
        ],
        images_with_errors=len(errors.images),
        suspicions=[
            {"name": dataset.paths[indices[entry.image]].name, "entry": entry}
            for entry in errors.suspicions[:_SUSPICIONS]
        ],
        all_suspicions=len(errors.suspicions),
        several_classes=len(content.class_names) > 1,
        iou=IOU,
        versions={name: version(name) for name in ("hotcoco", "pycocotools")},
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _plots(content: CocoInput, result: EvaluationResult, threshold: float) -> dict[str, Any]:
    """Return the plots that the evaluation has numbers for, as data URIs, and the numbers that the page explains."""
    shown: dict[str, Any] = {}
    # No curve exists without detections, or where the average precision is undefined.
    if not len(result.detections) or result.stats["AP"] < 0:
        return shown
    evaluation = content.hotcoco()
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    overall = result.curves.overall
    tide, calibration = evaluation.tide_errors(), evaluation.calibration(iou_threshold=IOU)
    svgs = {
        "scores": plots.score_plot(overall, overall.at(threshold)),
        "precision_recall": plots.precision_recall_plot(evaluation),
        "tide": plots.tide_plot(tide),
        "calibration": plots.calibration_plot(calibration),
    }
    if len(content.class_names) > 1:
        most = max(1, len(result.detections))
        confusion = content.hotcoco().confusion_matrix(iou_thr=IOU, max_det=most, min_score=threshold)
        svgs["class_f1"] = plots.class_f1_plot(result.curves)
        svgs["class_precision_recall"] = plots.class_plot(evaluation)
        svgs["confusion"] = plots.confusion_plot(confusion)
    shown |= {name: _data_uri("image/svg+xml", svg.encode()) for name, svg in svgs.items()}
    kinds = [(meaning, tide["counts"][key], tide["delta_ap"][key]) for key, meaning in _TIDE_KINDS.items()]
    return shown | {"tide_kinds": list(zip(_TIDE_KINDS, kinds, strict=True)), "calibration_error": calibration["ece"]}


def _picture(
    content: CocoInput, threshold: float, image: int, dataset: DetectionDataset, indices: Sequence[int]
) -> bytes:
    matches = match_image(content.above(threshold), image)
    return error_picture(dataset.load(indices[image])[0], matches, content.class_names)


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["ratio"] = lambda value: "undefined" if value is None or value < 0 else f"{value:.3f}"
    return environment.from_string((files(__package__) / "report_template.html").read_text(encoding="utf-8"))

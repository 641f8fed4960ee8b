"""Writes docs/generated/gallery.md: each op beside the PyTorch code that it replaces, with its speed-ups.

The code and the prose stand in gallery.template.md, the summaries in the docstrings, and the speed-ups in
benchmarks/results.

python -m tools.pages.gallery            write the page
python -m tools.pages.gallery --check    fail if the page is out of date
"""

from __future__ import annotations

import inspect
import json
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import retinanet_ops
from tools.pages.writing import ROOT, write_or_check

PAGE = ROOT / "docs" / "generated" / "gallery.md"
TEMPLATE = Path(__file__).with_name("gallery.template.md")
RESULTS = ROOT / "benchmarks" / "results"


class Case(NamedTuple):
    """Rows of a file of results that time an op and the code that it replaces."""

    file: str
    group: str
    other: str = "torchvision"
    ours: str = "ours"
    least: bool = False  # compare the least times instead of the medians, because the machine was busy


def _losses(dtype: str) -> list[Case]:
    layouts = ("contiguous", "channels_last")
    return [
        Case("focal_loss_cpu", f"dense focal loss, forward + backward, 201,600 x 80, {x}, {dtype}") for x in layouts
    ]


def _single(group: str, other: str = "torchvision", ours: str = "ours") -> Case:
    return Case("single_ops_cpu", group, other, ours, least=True)


def _tiny(op: str, suffix: str = "") -> Case:
    return Case("overhead_cpu", f"overhead, {op}{suffix}", least=True)


_NMS = "nms_and_detect_cpu"
_MATCHING = "matching_and_box_loss_cpu"
_PAIRS = "forward + backward, 2,000 pairs, float32"

#: The results of each op. An op without any has not been timed beside the code that it replaces.
CASES: dict[str, list[Case]] = {
    "match_anchors": [
        Case(_MATCHING, "matching, 201,600 anchors, 100 ground truths, float32"),
        Case(_MATCHING, "matching, 201,600 anchors, 300 ground truths, float32"),
        Case(
            _MATCHING, "matching, 201,600 anchors, 300 ground truths, float32", "torchvision", "ours, explicit anchors"
        ),
    ],
    "assign_targets": [Case("model_resnet50_cpu", "matching, resnet50, 2 x 800 x 1344, 91 classes, float32")],
    "assign_points": [_single("assignment of 22,400 points, 100 ground truths, float32")],
    "sigmoid_focal_loss": [
        Case("focal_loss_cpu", "focal loss, forward + backward, 201,600 x 80, torch.float32"),
        Case("focal_loss_cpu", "focal loss, forward + backward, 201,600 x 80, torch.bfloat16"),
        _tiny("sigmoid_focal_loss", ", with gradients"),
    ],
    "dense_focal_loss": [*_losses("torch.float32"), *_losses("torch.bfloat16")],
    "dense_softmax_cross_entropy": [
        Case("single_ops_cpu", "softmax cross-entropy, 8 x 8,732 x 91, forward and backward, float32", "torch")
    ],
    "hard_negative_mask": [
        _single("hard negatives, 16 x 8,732 anchors, float32", "two sorts"),
        _single("hard negatives, 2 x 201,600 anchors, float32", "two sorts"),
    ],
    "dense_box_loss": [
        Case(_MATCHING, "box loss, forward + backward, 201,600 anchors, l1, float32"),
        Case(_MATCHING, "box loss, forward + backward, 201,600 anchors, giou, float32"),
    ],
    "generalized_box_iou_loss": [_single(f"generalized_box_iou_loss, {_PAIRS}")],
    "complete_box_iou_loss": [_single(f"complete_box_iou_loss, {_PAIRS}")],
    "encode_boxes": [_single("encode boxes, 2 x 201,600, float32"), _tiny("encode_boxes")],
    "decode_boxes": [
        _single("decode boxes, 2 x 201,600, float32"),
        _tiny("decode_boxes"),
        _tiny("decode_boxes", ", with gradients"),
    ],
    "clip_boxes": [_tiny("clip_boxes")],
    "box_iou": [
        _single("box IoU, 20 x 201,600, float32"),
        _tiny("box_iou"),
        _tiny("box_iou", ", with gradients"),
    ],
    "generalized_box_iou": [_tiny("generalized_box_iou"), _tiny("generalized_box_iou", ", with gradients")],
    "distance_box_iou": [_tiny("distance_box_iou"), _tiny("distance_box_iou", ", with gradients")],
    "complete_box_iou": [_tiny("complete_box_iou"), _tiny("complete_box_iou", ", with gradients")],
    "detect": [
        Case(_NMS, "detect, 2 x 800 x 1344, 91 classes, 0.01 M candidates, float32"),
        Case(_NMS, "detect, 2 x 800 x 1344, 91 classes, 1.80 M candidates, float32"),
        Case(_NMS, "detect, 2 x 800 x 1344, 91 classes, 10.62 M candidates, float32"),
    ],
    "gather_class_scores": [
        _single("class scores of 2 x 100 detections, 201,600 anchors x 80 classes, float32", "permute, cat and gather")
    ],
    "nms": [
        Case(_NMS, "NMS, 5,000 boxes, 1 classes, float32"),
        Case(_NMS, "NMS, 20,000 boxes, 1 classes, float32"),
        _tiny("nms"),
    ],
    "batched_nms": [
        Case(_NMS, "NMS, 5,000 boxes, 80 classes, float32"),
        Case(_NMS, "NMS, 20,000 boxes, 80 classes, float32"),
        _tiny("batched_nms"),
    ],
    "batched_nms_padded": [
        Case(_NMS, f"padded NMS, {n} x 5,000 boxes, 80 classes, best 100, float32", "torchvision, image by image")
        for n in (2, 16)
    ],
    "soft_nms": [
        _single("soft-NMS, gaussian, best 100 of 2 x 1,000 boxes, 80 classes, float32", "reference"),
        _single("soft-NMS, linear, best 100 of 2 x 1,000 boxes, 80 classes, float32", "reference"),
    ],
    "soft_nms_scores": [
        _single("soft-NMS in one pass, gaussian, 2 x 300 boxes, 10 classes, float32", "reference"),
        _single("soft-NMS in one pass, linear, 2 x 300 boxes, 10 classes, float32", "reference"),
    ],
}


def page() -> str:
    """Return the page as Markdown."""
    parts = re.split(r"^### `(\w+)`\n", TEMPLATE.read_text(), flags=re.MULTILINE)
    text = [parts[0]]
    for op, entry in zip(parts[1::2], parts[2::2], strict=True):
        entry, section, rest = entry.partition("\n## ")
        first, second, prose = re.split(r"(?<=```)\n\n", entry.strip("\n"), maxsplit=2)
        function = getattr(retinanet_ops, op)
        summary = (inspect.getdoc(function) or "").partition("\n")[0]
        source = f"../../{function.__module__.replace('.', '/')}.py"
        text.append(
            f"### `{op}`\n\n[`{op}`]({source}): {summary}\n\nInstead of\n\n{first}\n\nwrite\n\n{second}\n\n"
            f"{prose.strip()}\n\n{speed(op)}\n\n{section.lstrip()}{rest}"
        )
    return "".join(text).rstrip("\n") + "\n"


def speed(op: str) -> str:
    """Return the table of the speed-ups of an op."""
    if not CASES.get(op):
        return "This op has not been timed beside that code."
    lines = ["| timed | ours | other code | speed-up | machine |", "|---|---|---|---|---|"]
    return "\n".join(lines + [_row(case) for case in CASES[op]])


def _row(case: Case) -> str:
    content = _content(case.file)
    found = {b["extra_info"]["row"]: b for b in content["benchmarks"] if b["group"] == case.group}
    missing = {case.ours, case.other} - set(found)
    if missing:
        raise KeyError(f"{case.file}.json has no row {sorted(missing)} in the group {case.group!r}")
    ours, other = found[case.ours], found[case.other]
    ratio = ours["extra_info"].get("rival_ratio")
    if ratio is None or case.least:
        kind = "min" if case.least else "median"
        ratio, times = other["stats"][kind] / ours["stats"][kind], [_time(b["stats"][kind]) for b in (ours, other)]
    else:
        times = ["", ""]
    rounds = min(b["stats"]["rounds"] * b["stats"].get("iterations", 1) for b in (ours, other))
    how = f" (least of {rounds})" if case.least else "" if times[0] else " (in turns)"
    group = case.group.replace("torch.", "").replace("overhead, ", "tiny inputs, ")
    group = re.sub(r"\b1 classes", "1 class", group)
    group += f"; {case.ours.removeprefix('ours, ')}" if case.ours != "ours" else ""
    machine = content["machine_info"]
    where = f"{machine['cpu']['brand_raw'].replace('(R)', '')}, {machine['cpu_capability'].upper()}, "
    where += f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}, torch {machine['torch'].partition('+')[0]}"
    link = f"[{where}](../../benchmarks/results/{case.file}.json)"
    name = {"reference": "plain PyTorch", "torch": "PyTorch"}.get(case.other, case.other)
    return f"| {group} | {times[0]} | {name}{': ' * bool(times[1])}{times[1]} | **{_ratio(ratio)}**{how} | {link} |"


@cache
def _content(file: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{file}.json").read_text())
    return content


def _ratio(ratio: float) -> str:
    return f"{ratio:,.0f}x" if ratio >= 9.95 else f"{ratio:.1f}x"


def _time(seconds: float) -> str:
    """Return a time with two digits or, above a hundred, none after the point."""
    value, unit = (seconds * 1e6, "us") if seconds < 1e-4 else (seconds * 1e3, "ms")
    return f"{value:,.{0 if value >= 9.95 else 1 if value >= 0.995 else 2}f} {unit}"


if __name__ == "__main__":
    write_or_check(__doc__, PAGE, page)

"""The command `retinanet check`: it reports everything that is wrong with a data set, and what the data set is like."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retinanet.cli.anchors import MATCHED_IMAGES
from retinanet.cli.arguments import (
    DATA_FORMS,
    add_data,
    check_overwrites,
    config_error,
    config_fields,
    output_file,
    read_options,
    split_of,
)
from retinanet.common.errors import ConfigError, DataError, listed, printable
from retinanet.common.files import new_output_folder, replacing_folder, write_json
from retinanet.common.progress import progress_bar

if TYPE_CHECKING:
    from retinanet.data import DetectionDataset
    from retinanet.data.opening import Inspection
    from retinanet.data.problems import Finding
    from retinanet.data.statistics import Statistics
    from retinanet.model.detector_config import DetectorConfig

HELP = "report what is wrong with a data set, and what it is like"
DESCRIPTION = (
    "Read a data set as train and evaluate do, and list every error and everything that is mended, by file and entry. "
    "Then show the balance of the classes, the sizes of images and boxes, and how many boxes no anchor reaches. The "
    "exit code is 3 if there are errors."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `retinanet check`."""
    parser.add_argument("data", metavar="DATA", help=DATA_FORMS)
    add_data(parser)
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--config",
        metavar="FILE",
        help="JSON object with fields of RetinaNetConfig, or of SSDConfig if it has a network, whose image size and "
        "anchors count (default: those of train)",
    )
    model.add_argument(
        "--model", metavar="FILE", help="model file of any model, whose image size, anchors and classes count"
    )
    parser.add_argument(
        "--fix",
        metavar="OUT",
        help="write a copy without the errors into this new folder: a COCO json and its images, which are links to the "
        "files where possible",
    )
    parser.add_argument("--json", metavar="FILE", help="write the report to this file as JSON")


def run(args: argparse.Namespace) -> int:
    """Report on each part of the data set, and write the clean copy if one is wanted."""
    from retinanet.data.forms import parts_of

    output = None if args.json is None else output_file(args.json)
    if output is not None:
        check_overwrites(output, (args.data, args.config, args.model))
    fixed = None if args.fix is None else new_output_folder(args.fix)
    config, class_names = _model(args)
    split = split_of(args.data, args.split)
    parts = [split] if split else parts_of(args.data)
    reports: list[Report | Unread] = []
    for part in parts:
        try:
            reports.append(_inspect(args, part, config, class_names))
        except DataError as error:
            if len(parts) == 1:
                raise
            reports.append(Unread(args.data, part, error))
    for number, report in enumerate(reports):
        print("\n".join(["", *report.lines()] if number else report.lines()))
    if output is not None:
        write_json(output, [report.to_dict() for report in reports])
        print(f"{output}: written")
    readable = [report for report in reports if isinstance(report, Report)]
    if fixed is not None and readable:
        _fix(fixed, readable)
    return DataError.exit_code if any(report.errors for report in reports) else 0


@dataclass(frozen=True)
class Report:
    """Everything that `retinanet check` found in one part of a data set.

    Attributes:
        part: "train", "val" or "test" of a YOLO data set; None for other forms.
        inspection: What reading found.
        errors: Everything for which train or evaluate would refuse the data.
        notes: What deserves a look although it is no fault.
        vanishing: Indices of the images that resizing makes vanish.
        numbers: The numbers of images, boxes and classes.
        anchor_ious: Best IoU of each box with any anchor; empty for an FCOS, which has no anchors.
        config: The configuration whose image size and anchors count.
    """

    part: str | None
    inspection: Inspection
    errors: list[Finding]
    notes: list[Finding]
    vanishing: list[int]
    numbers: Statistics
    anchor_ious: Sequence[float]
    config: DetectorConfig

    @property
    def dataset(self) -> DetectionDataset:
        """The images and boxes that are free of errors."""
        return self.inspection.dataset

    @property
    def unfit(self) -> set[int]:
        """The indices of the images with an error, which a clean copy leaves out."""
        incomplete = self.inspection.problems.incomplete
        return {index for index, image_id in enumerate(self.dataset.image_ids) if image_id in incomplete}.union(
            self.vanishing
        )

    def copied(self) -> str:
        """Return what is in a clean copy and what is not, in words."""
        unfit = self.unfit
        ids = {self.dataset.image_ids[index] for index in unfit}
        left = sum(record.image_id in ids for record in self.dataset.boxes)
        text = f"a clean copy, {len(self.dataset) - len(unfit)} images, {len(self.dataset.boxes) - left} boxes"
        if unfit:
            text += f"; left out because of errors: {len(unfit)} images that can be read, with {left} good boxes"
        return text

    @property
    def thresholds(self) -> dict[str, float]:
        """The IoU thresholds of the anchors by `fg_iou_threshold` and `bg_iou_threshold`; empty for an FCOS."""
        from retinanet.model.fcos_config import FCOSConfig

        config = self.config
        if isinstance(config, FCOSConfig):
            return {}
        return {"fg_iou_threshold": config.fg_iou_threshold, "bg_iou_threshold": config.bg_iou_threshold}

    def share_below(self, threshold: float) -> float:
        """Return the share of boxes whose best IoU with an anchor is below a threshold."""
        return sum(iou < threshold for iou in self.anchor_ious) / max(1, len(self.anchor_ious))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        findings = {"errors": self.errors, "mended": self.inspection.problems.mended, "notes": self.notes}
        shares = {name: {"threshold": t, "share_below": self.share_below(t)} for name, t in self.thresholds.items()}
        return {
            "data": str(self.dataset.source),
            "form": self.inspection.form,
            "part": self.part,
            **{name: _entries(found) for name, found in findings.items()},
            "statistics": self.numbers.to_dict(),
            "anchors": shares or None,
        }

    def lines(self) -> list[str]:
        """Return the report as text."""
        numbers, mended = self.numbers, self.inspection.problems.mended
        lines = [f"{self.dataset.source}: {self.inspection.form}; {self.dataset.contents()}"]
        lines += _section("errors", self.errors) or ["no errors"]
        lines += _section("mended when it is read, refused with --strict", mended, remedies=True)
        lines += _section("worth a look", self.notes)
        if not numbers.images:
            return lines
        lines += ["classes:", *_class_lines(numbers)]
        shorter, longer = (" / ".join(f"{value:g}" for value in spread) for spread in numbers.image_sizes)
        lines.append(f"images: shorter side {shorter}, longer side {longer} pixels (smallest / median / largest)")
        if numbers.boxes:
            sides = " / ".join(f"{value:.3g}" for value in numbers.box_sides)
            small, medium, large = (f"{100 * share:.0f} %" for share in numbers.box_share)
            lines.append(f"boxes: side {sides} pixels, the square root of the area; {small} small (below 32 x 32),")
            lines.append(f"  {medium} medium, {large} large (from 96 x 96)")
        lines += self._anchor_lines()
        return lines

    def _anchor_lines(self) -> list[str]:
        config = self.config
        if not len(self.anchor_ious):
            return []
        size = "as they are"
        if config.fixed_size is not None:
            size = f"resized to {config.fixed_size[0]} x {config.fixed_size[1]} pixels"
        elif config.min_size:
            size = f"resized to {config.min_size[-1]}..{config.max_size} pixels"
        first, *rest = (
            f"below {threshold:g} for {100 * self.share_below(threshold):.1f} %"
            for threshold in sorted(set(self.thresholds.values()))
        )
        line = ", ".join([f"anchors, with images {size}: the best IoU is {first} of the boxes", *rest])
        count = len(self.dataset)
        return [line + (f"; matched on {MATCHED_IMAGES:,} of the {count:,} images" if count > MATCHED_IMAGES else "")]


@dataclass(frozen=True)
class Unread:
    """A part of a data set that cannot be read at all; the other parts have a `Report`.

    Attributes:
        data: The data set.
        part: "train", "val" or "test".
        error: Why the part cannot be read.
    """

    data: str
    part: str | None
    error: DataError

    @property
    def errors(self) -> list[Finding]:
        """The error as findings, one for each of its lines."""
        from retinanet.data.forms import find_annotations
        from retinanet.data.problems import Finding, Kind

        file = find_annotations(self.data).path
        lines = (line.removeprefix(f"{file}: ").removeprefix(f"{self.part}: ") for line in str(self.error).splitlines())
        return [Finding.of(Kind.FILE, f"{file}: {self.part}", line) for line in lines]

    def to_dict(self) -> dict[str, Any]:
        """Return the same keys as a `Report`, without statistics and anchors."""
        empty: dict[str, Any] = {"mended": [], "notes": [], "statistics": None, "anchors": None}
        return {"data": self.data, "form": None, "part": self.part, "errors": _entries(self.errors), **empty}

    def lines(self) -> list[str]:
        """Return the error as text."""
        return [f"{self.data}: {self.part} cannot be read", *_section("errors", self.errors)]


def _entries(findings: Iterable[Finding]) -> list[dict[str, str]]:
    return [{"kind": f.kind.name.lower(), "where": f.where, "reason": f.reason} for f in findings]


def _model(args: argparse.Namespace) -> tuple[DetectorConfig, tuple[str, ...] | None]:
    """Return the configuration that counts, and the classes of --model.

    Raises:
        DataError: A file cannot be read, or holds no configuration.
    """
    from retinanet.checkpoints.model_file import read_model
    from retinanet.model.detector_config import config_from_dict

    if args.model is not None:
        config = read_model(args.model).config
        return config, config.class_names
    fields = config_fields(args.config)
    try:
        return config_from_dict(fields, "ssd" if "network" in fields else "retinanet"), None
    except ConfigError as error:
        remedy = "expected fields of RetinaNetConfig, or of SSDConfig with its network; give --model with a model file"
        raise DataError(config_error(args.config, error, f"{remedy} for other models")) from error


def _inspect(
    args: argparse.Namespace, part: str | None, config: DetectorConfig, class_names: tuple[str, ...] | None
) -> Report:
    from retinanet.data.fitness import vanishing, why_unlearnable
    from retinanet.data.forms import find_annotations
    from retinanet.data.opening import ReadOptions, inspect_dataset
    from retinanet.data.problems import Finding, Kind
    from retinanet.data.statistics import remarkable, statistics
    from retinanet.model.fcos_config import FCOSConfig
    from retinanet.model.preprocessing import Preprocessing
    from retinanet.training.anchor_reach import best_anchor_ious

    lists_classes = find_annotations(args.data).form.lists_classes
    options = ReadOptions(
        **read_options(vars(args)), class_names=None if lists_classes else class_names, split=part, cache_bytes=0
    )
    inspection = inspect_dataset(args.data, args.images, options, progress_bar("checking images", "image", delay=2))
    dataset, errors = inspection.dataset, list(inspection.problems.errors)
    gone = list(vanishing(dataset, Preprocessing(config).vanishes))
    for index in gone:
        height, width = dataset.sizes[index]
        reason = f"resizing {width} x {height} pixels to max_size {config.max_size} leaves less than one pixel"
        errors.append(Finding.of(Kind.TOO_ELONGATED, f"{dataset.source}: {dataset.paths[index]}", reason))
    if lists_classes and class_names is not None:
        for name in dataset.class_names:
            if name not in class_names:
                reason = f"expected a class of the model ({listed(class_names)})"
                errors.append(Finding.of(Kind.CLASS, f"{dataset.source}: class {name}", reason))
    nothing = why_unlearnable(dataset)
    if nothing is not None and not (errors and not len(dataset)):
        errors.append(Finding.of(Kind.UNLEARNABLE, str(dataset.source), nothing))
    ious = []
    if not isinstance(config, FCOSConfig):
        matching = progress_bar("matching anchors", "batch", delay=2)
        ious = best_anchor_ious(config, dataset, MATCHED_IMAGES, matching).tolist()
    return Report(part, inspection, errors, remarkable(dataset), gone, statistics(dataset), ious, config)


def _section(title: str, findings: Iterable[Finding], *, remedies: bool = False) -> list[str]:
    """Return findings as lines, grouped by their kind in the order of the kinds.

    Args:
        title: Heading of the section.
        findings: The findings.
        remedies: Whether to say what was done about them.
    """
    from retinanet.data.problems import Kind

    groups = defaultdict(list)
    for finding in findings:
        groups[finding.kind].append(finding)
    lines = [f"{title}: {sum(map(len, groups.values()))}"] if groups else []
    for kind in sorted(groups, key=list(Kind).index):
        count = len(groups[kind])
        lines.append(f"  {kind.count_mended(count) if remedies else kind.count(count)}:")
        lines += [f"    {finding}" for finding in groups[kind]]
    return lines


def _class_lines(numbers: Statistics) -> list[str]:
    names = [printable(entry.name, 60) for entry in numbers.classes]
    width, total = max(map(len, names), default=0), max(1, numbers.boxes)
    return [
        f"  {name:<{width}}  {entry.boxes:>7} boxes  {100 * entry.boxes / total:5.1f} %  in {entry.images} images"
        for name, entry in zip(names, numbers.classes, strict=True)
    ]


def _fix(folder: Path, reports: list[Report]) -> None:
    from retinanet.data.clean_copy import write_clean_copy

    with replacing_folder(folder) as building:
        for report in reports:
            write_clean_copy(report.dataset, building, report.part or "annotations", report.unfit)
    for report in reports:
        print(f"{folder / (report.part or 'annotations')}.json: {report.copied()}")

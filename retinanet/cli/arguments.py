"""Parsers of numbers on the command line, and the options and files that several commands share."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from retinanet.common.errors import ConfigError, DataError, UsageError
from retinanet.common.files import is_special_file, read_json

if TYPE_CHECKING:
    import torch

    from retinanet.data import DetectionDataset


def positive_int(text: str) -> int:
    """Parse an integer of at least 1."""
    return _number(text, int, lambda value: value >= 1, "an integer of at least 1")


def natural_int(text: str) -> int:
    """Parse an integer of at least 0."""
    return _number(text, int, lambda value: value >= 0, "an integer of at least 0")


def positive_float(text: str) -> float:
    """Parse a finite number above 0."""
    return _number(text, float, lambda value: 0 < value < float("inf"), "a number above 0")


def natural_float(text: str) -> float:
    """Parse a finite number of at least 0."""
    return _number(text, float, lambda value: 0 <= value < float("inf"), "a number of at least 0")


def share(text: str) -> float:
    """Parse a number from 0 to 1."""
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def number_list(text: str) -> tuple[float, ...]:
    """Parse numbers above 0 that are separated by commas."""
    return tuple(positive_float(part) for part in text.split(","))


def add_list(
    parser: argparse._ActionsContainer,
    name: str,
    parse: Callable[[str], Any],
    *,
    convert: Callable[[tuple[Any, ...]], Any] = tuple,
    **options: Any,
) -> None:
    """Add an option that takes several values, separated by commas, blanks or both.

    Args:
        parser: The parser or group that receives the option.
        name: The option, such as `--fpn-levels`.
        parse: Parser of one value.
        convert: Makes the value of the option from the tuple of values. Raises ValueError, with what was expected, for
            a tuple that the option does not take.
        **options: Arguments of `add_argument`.
    """

    def parse_part(text: str) -> tuple[Any, ...]:
        return tuple(parse(part) for part in text.split(",") if part.strip())

    class Join(argparse.Action):
        def __call__(
            self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
        ) -> None:
            joined = tuple(value for part in values for value in part)
            try:
                setattr(namespace, self.dest, convert(joined))
            except ValueError as error:
                raise argparse.ArgumentError(self, str(error)) from error

    parser.add_argument(name, type=parse_part, nargs="+", action=Join, **options)


class CommandParser(argparse.ArgumentParser):
    """Parser whose errors are one line, which names the option; the usage is left to --help."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with code 2."""
        reason = message.removeprefix("argument ")
        self.exit(UsageError.exit_code, f"retinanet: error: {reason}; see {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments; report an unknown one here, because this parser knows the options that are similar."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            name = next((text for text in unknown if text.startswith("-")), unknown[0]).partition("=")[0]
            similar = difflib.get_close_matches(name.replace("_", "-"), self._option_string_actions, n=1)
            hint = f", did you mean {similar[0]}?" if similar else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return parsed, unknown


def _number(text: str, kind: Callable[[str], Any], accepts: Callable[[Any], bool], expected: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accepts(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


def add_data(parser: argparse._ActionsContainer, default_split: str | None = None) -> None:
    """Add the options of a data set that a command reads: --images, --split and those of `READING`.

    Args:
        parser: The parser or group that receives the options.
        default_split: The part that is read without --split, for its help; None stands for all parts.
    """
    add_images(parser)
    parser.add_argument(
        "--split",
        choices=("train", "val", "test"),
        help=f"part of a YOLO data set (default: {default_split or 'all parts that it has'})",
    )
    add_reading(parser)


def open_data(args: argparse.Namespace, data: str, default_split: str, **options: Any) -> DetectionDataset:
    """Open a data set as the options that `add_data` has added say.

    Args:
        args: The parsed arguments.
        data: The data set.
        default_split: As in `add_data`.
        **options: Other arguments of `open_dataset`.

    Raises:
        UsageError: --split is given for a form of data without parts.
        DataError: Anything is wrong with the data.
    """
    from retinanet.data import open_dataset

    split = split_of(data, args.split) or default_split
    return open_dataset(data, args.images, split=split, **read_options(vars(args)), **options)


def add_images(parser: argparse._ActionsContainer) -> None:
    """Add --images."""
    parser.add_argument("--images", metavar="DIR", help="folder of the images (default: beside the annotations)")


#: The forms of data, for the help of an argument.
DATA_FORMS = "COCO json, folder of Pascal VOC xml files, YOLO data.yaml, or CSV table"
#: Options that say how annotations are read, beside the paths.
READING = ("strict", "voc_zero_based", "csv_columns")


def add_reading(parser: argparse._ActionsContainer) -> None:
    """Add the options of `READING`, from which `read_options` makes arguments of `open_dataset`."""
    parser.add_argument(
        "--strict",
        action="store_true",
        default=None,
        help="refuse data in which anything is mended, such as boxes without area (default: mend and count)",
    )
    parser.add_argument(
        "--voc-zero-based",
        action="store_true",
        default=None,
        help="the boxes of Pascal VOC xml files are 0-based corners, as some tools write them (default: VOC's own "
        "1-based corners)",
    )
    parser.add_argument(
        "--csv-columns",
        type=csv_columns,
        metavar="NAMES",
        help="columns of a CSV table in their order, such as path,xmin,xmax,ymin,ymax,class; other names are ignored "
        "(default: its header, or path,x1,y1,x2,y2,class)",
    )


def read_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of `open_dataset` for the values of the options of `READING`."""
    return {
        "strict": bool(values.get("strict")),
        "voc_one_based": not values.get("voc_zero_based"),
        "csv_columns": values.get("csv_columns"),
    }


def csv_columns(text: str) -> list[str]:
    """Parse the names of the columns of a CSV table, separated by commas."""
    from retinanet.data.csv_table import column_positions

    names = text.split(",")
    try:
        column_positions(names)
    except ValueError as error:
        expected = "expected columns such as path,x1,y1,x2,y2,class"
        raise argparse.ArgumentTypeError(f"{expected}, got {text}: {error}") from error
    return names


def split_of(data: str, split: str | None) -> str | None:
    """Return the part of a data set that --split names, or None without it.

    Raises:
        UsageError: --split is given for another form than YOLO, which has no parts.
        DataError: There are no annotations.
    """
    from retinanet.data.forms import Form, find_annotations

    if split is not None and (form := find_annotations(data).form) is not Form.YOLO:
        raise UsageError(
            f"--split {split}: expected only with a YOLO data set, got {data}, a {form.value}; leave it out"
        )
    return split


def add_views(parser: argparse.ArgumentParser) -> None:
    """Add --views."""
    parser.add_argument(
        "--views",
        type=int,
        choices=(1, 2, 4),
        default=1,
        help="detect in each picture as it is (1), also in its mirror image (2), also in both turned upside down (4), "
        "and merge the detections (default: 1)",
    )


def add_device(parser: argparse.ArgumentParser, default: str = "auto") -> None:
    """Add --device and --threads, which `use_device` applies."""
    meaning = "auto, which takes a GPU if there is one" if default == "auto" else default
    parser.add_argument(
        "--device",
        default=default,
        metavar="NAME",
        help=f"auto, cpu, cuda, cuda:1, ... (default: {meaning})",
    )
    parser.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads (default: PyTorch's choice)")


def use_device(args: argparse.Namespace) -> torch.device:
    """Set the number of CPU threads to --threads, and return the device that --device names.

    Raises:
        UsageError: There is no such device.
    """
    import torch

    from retinanet.common.devices import resolve_device

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        return resolve_device(args.device)
    except ValueError as error:
        raise UsageError(f"--{error}") from error


def output_file(text: str) -> Path:
    """Return the path of a file to write.

    Raises:
        UsageError: The path is a folder, or its parent folder does not exist or may not be written.
    """
    path = Path(text)
    if path.is_dir():
        raise UsageError(f"{path}: expected a file name for the output, got a folder")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: cannot be written: the folder {path.parent} does not exist")
    # A file is replaced by a new one, which its folder must take.
    if not os.access(path if is_special_file(path) else path.resolve().parent, os.W_OK):
        raise UsageError(f"{path}: cannot be written: no permission to write into its folder")
    return path


def check_overwrites(output: Path, others: Iterable[str | Path | None]) -> None:
    """Check that an output file is none of the inputs and other outputs; None stands for one that is not given.

    Raises:
        UsageError: It is.
    """
    for other in others:
        if other is not None and _same_file(output, Path(other)):
            raise UsageError(f"{output}: output would overwrite an input or another output: {other}; choose a new name")


def _same_file(path: Path, other: Path) -> bool:
    """Return whether both paths name one file, which need not exist yet."""
    return path.resolve() == other.resolve() or (path.exists() and other.exists() and path.samefile(other))


def config_fields(text: str | None) -> dict[str, Any]:
    """Return the fields of a configuration in the JSON file that --config names, or an empty dict without it.

    Raises:
        DataError: The file cannot be read, or holds no JSON object.
    """
    if text is None:
        return {}
    fields = read_json(Path(text))
    if not isinstance(fields, dict):
        raise DataError(f"{text}: expected a JSON object with fields of a configuration, got {type(fields).__name__}")
    return fields


def config_error(path: str, error: ConfigError, remedy: str) -> str:
    """Return what is wrong with the file of --config.

    Args:
        path: The file.
        error: The error.
        remedy: What to do if the wrong field is one of other models.
    """
    from retinanet.model.detector_config import owners_of

    field, _, reason = str(error).partition(":")
    owners = owners_of(field) if "no such field" in reason else []
    if not owners:
        return f"{path}: {error}"
    # The field is spelt right, so the similar one that the error may propose is left out.
    return f"{path}: {field}: no such field in the configuration; it is a field of {' and '.join(owners)}: {remedy}"

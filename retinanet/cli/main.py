"""The entry point of the command `retinanet`: it parses the arguments and runs one of the commands."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from retinanet.cli import anchors, check, compare, convert, detect, evaluate, export, sample, tile, train
from retinanet.cli.arguments import CommandParser
from retinanet.cli.errors import report_errors

_COMMANDS = {
    "sample": sample,
    "check": check,
    "anchors": anchors,
    "tile": tile,
    "train": train,
    "compare": compare,
    "evaluate": evaluate,
    "detect": detect,
    "convert": convert,
    "export": export,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name. None takes those of the process.

    Returns:
        The exit code, see `retinanet.cli.errors`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Without line buffering, a log that takes both streams would have the lines of standard output at its end.
            # The name of a file may hold bytes that are no text; they are printed as escapes.
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    return report_errors(lambda: args.run(args))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; each sets `run` to a function of the parsed arguments."""
    parser = CommandParser(
        prog="retinanet",
        description="Train, evaluate and use an object detector: RetinaNet, FCOS, Faster R-CNN or SSD.",
        epilog="Exit codes: 0 success, 2 wrong usage, 3 wrong data or checkpoint, 4 training diverged, 130 interrupted "
        "by Ctrl-C, 143 terminated, 129 terminal closed.",
    )
    parser.add_argument("--version", action="version", version=f"retinanet-ops {_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, module in _COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.DESCRIPTION)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _version() -> str:
    try:
        return version("retinanet-ops")
    except PackageNotFoundError:
        return "(not installed)"

"""The command line of the programs that write a page, or check that it is up to date."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def write_or_check(description: str | None, path: Path, page: Callable[[], str]) -> None:
    """Write a page, or with --check, exit with status 1 if it is out of date."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is out of date")
    if not parser.parse_args().check:
        path.write_text(page())
    elif not path.exists() or path.read_text() != page():
        sys.exit(f"{path.name} is out of date; run `make pages`")

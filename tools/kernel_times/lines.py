"""Lists the source lines where a launch's instructions go."""

from __future__ import annotations

import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

#: Number of places to list, and of the lines that name each: its own and those of the calls that led to it.
MOST_LINES, MOST_CALLS = 40, 4


def source_lines(library: Path, offsets: list[int]) -> dict[int, str]:
    """Return the source line of each offset, followed by the lines into which it was inlined."""
    command = ["addr2line", "-a", "-i", "-s", "-e", str(library)]
    addresses = "\n".join(f"{offset:#x}" for offset in offsets)
    output = subprocess.run(command, input=addresses, capture_output=True, text=True, check=True).stdout
    found: dict[int, list[str]] = {}
    for line in output.splitlines():
        if line.startswith("0x"):
            current = found.setdefault(int(line, 16), [])
        else:
            current.append(line.split(" ")[0])
    return {offset: " < ".join(lines[:MOST_CALLS]) for offset, lines in found.items()}


def hottest_lines(launches: list[Any], library: Path) -> list[str]:
    """Return the lines of code with the most warp instructions, with their share, one text per line."""
    profile: dict[int, float] = defaultdict(float)
    for launch in launches:
        for offset, instructions in launch.cost.profile.items():
            profile[offset] += instructions
    places = source_lines(library, list(profile))
    by_place: dict[str, float] = defaultdict(float)
    for offset, instructions in profile.items():
        by_place[places[offset]] += instructions
    total = sum(by_place.values())
    most = sorted(by_place.items(), key=lambda item: -item[1])[:MOST_LINES]
    return [f"{instructions / total:7.1%}  {place}" for place, instructions in most]

"""Writes docs/generated/kernel_times.md from page.template.md and the table of predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.emulator.build import ROOT
from tools.kernel_times import check, extrapolation, torch_calls
from tools.kernel_times.cases import CASES
from tools.kernel_times.machines import H200, MACHINES

PAGE = ROOT / "docs" / "generated" / "kernel_times.md"
TEMPLATE = Path(__file__).with_name("page.template.md")


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """Format a table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("|" + "|".join(cell if cell == "---" else f" {cell} " for cell in line) + "|" for line in lines)


def number(value: float) -> str:
    """Format a time: without decimals from 100 on, and with one decimal below."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def percent(share: float) -> str:
    """Format a share as in the prose of the page."""
    return f"{100 * share:.0f} %"


def summary_cells(name: str, row: dict[str, Any]) -> list[str]:
    """Return the row of a case in the table of times."""
    goal = row["goal"]
    met = goal is None or row["us"][H200.name] <= goal
    longest = max(row["kernels"].values(), key=lambda kernel: kernel["us"])
    return [
        name,
        "" if goal is None else f"{goal:,.0f}" if met else f"**{goal:,.0f}**",
        *(number(row["us"][machine.name]) for machine in MACHINES),
        longest["binds"],
        str(row["launches"]),
        str(sum(row["torch_operations"].values())),
        str(row["dispatcher_calls"]),
    ]


def kernel_cells(case: str, kernel: str, row: dict[str, Any]) -> list[str]:
    """Return the row of a kernel in the table of kernels."""
    remarks = [
        row["binds"],
        f"one warp {percent(row['one_warp'])}" if row["one_warp"] > check.MOST_ONE_WARP else "",
        "" if row["registers_known"] else f"{row['registers']} registers assumed",
    ]
    return [
        case,
        f"`{kernel}`" + (f" x {row['launches']}" if row["launches"] > 1 else ""),
        number(row["us"]),
        ", ".join(remark for remark in remarks if remark),
        f"{row['blocks']:,} / {row['multiprocessors']}",
        str(row["warps"]),
        f"{row['instructions'] / 1e6:,.2f}",
        f"{row['bytes'] / 1e6:,.1f}",
        number(row["span"]),
        " / ".join(f"{count:.0f}" for count in row.get("hot_loop", [])),
    ]


def page(table: dict[str, Any]) -> str:
    """Return the page as Markdown."""
    cases = table["cases"]
    kernels = [
        kernel_cells("" if i else name, kernel, its)
        for name, row in cases.items()
        for i, (kernel, its) in enumerate(row["kernels"].items())
    ]
    notes = {case.name: case.note for case in CASES} | {extrapolation.NAME: extrapolation.NOTE}
    machines = [[m.name, str(m.multiprocessors), f"{m.clock / 1e3:.2f}", f"{m.copy / 1e3:.0f}"] for m in MACHINES]
    names = [machine.name for machine in MACHINES]
    return TEMPLATE.read_text().format(
        summary=markdown(
            ["case", "goal", *names, "bound by", "launches", "torch's GPU operations", "dispatcher calls"],
            [summary_cells(name, row) for name, row in cases.items()],
        ),
        notes="\n".join(f"- {name}: {note}." for name, note in notes.items() if note),
        launch=H200.launch,
        sort_rows=torch_calls.SORT_ROWS,
        sort=torch_calls.SORT,
        machines=markdown(["machine", "multiprocessors", "GHz", "copy, GB/s"], machines),
        most_growth=percent(check.MOST_GROWTH - 1),
        least_growth=f"{check.LEAST_GROWTH_US:.0f}",
        long_us=f"{check.LONG_US:.0f}",
        least_machine=percent(check.LEAST_MACHINE),
        most_one_warp=percent(check.MOST_ONE_WARP),
        disagreement=f"{check.DISAGREEMENT:.0f}",
        accepted="\n".join(f"- `{kernel}` in {case}: {reason}" for case, kernel, reason in check.ACCEPTED) or "- none",
        kernels=markdown(
            ["case", "kernel", "us", "bound by", "blocks / multiprocessors", "warps of each", "M instructions", "MB"]
            + ["span, us", "hot loop"],
            kernels,
        ),
    )

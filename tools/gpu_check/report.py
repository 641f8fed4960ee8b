"""Reads the output of the stages of gpu_check and writes the summary."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

#: Messages of compute-sanitizer when it does not support the machine.
UNUSABLE = ("Device not supported", "not supported on this device", "Unable to find injection library")

#: The first two lines of a finding, or the line that reports a race.
FINDING = r"^=========\s+\S.*\n=========\s+at |Race reported between|hazard"


def last_json(log: str) -> dict[str, Any]:
    """Return the last line that is a JSON object. Raise `ValueError` if there is none."""
    for line in reversed(log.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    raise ValueError("expected a JSON object in the output, got none")


def test_counts(junit: Path) -> dict[str, Any]:
    """Count the tests that passed, failed and were skipped, and list the failures and the reasons of skips."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures, reasons = [], set()
    try:
        tree = ElementTree.parse(junit)
    except ElementTree.ParseError as error:  # the test run was stopped while it wrote the file
        raise ValueError(f"{junit.name}: {error}") from None
    for case in tree.iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"] += 1
            failures.append(f"{case.get('classname')}::{case.get('name')}")
        elif (skipped := case.find("skipped")) is not None:
            counts["skipped"] += 1
            reasons.add(skipped.get("message", ""))
        else:
            counts["passed"] += 1
    return {**counts, "failures": failures[:50], "skip_reasons": sorted(reasons)}


def sanitizer_findings(log: str, status: int, filtered: bool) -> tuple[dict[str, Any], bool]:
    """Read the findings of compute-sanitizer.

    Args:
        log: Output of compute-sanitizer.
        status: Exit status of compute-sanitizer.
        filtered: Whether the tool watched only our kernels. If it did, every finding fails the stage. Otherwise only
            findings that name our kernels fail the stage, and the others are counted.

    Returns:
        The results, and whether the stage passed.
    """
    if any(words in log for words in UNUSABLE):
        return {"missing": True, "note": "compute-sanitizer does not work on this device"}, False
    summary_line = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", log)
    if summary_line is None:
        return {"note": f"no summary; exit status {status}"}, False
    findings = [block for block in re.split(r"\n=========[ ]*\n", log) if re.search(FINDING, block, re.MULTILINE)]
    ours = [block for block in findings if re.search(r"\bat .*retinanet::", block)]
    completed = any(re.fullmatch(r"\{.*\}", line) for line in log.splitlines())  # the line that a probe prints last
    passed = completed and (int(summary_line[1]) == status == 0 if filtered else not ours)
    note = f"{len(ours)} findings in our kernels, {int(summary_line[1])} in all" + (
        "" if completed else "; not completed"
    )
    return {"ours": ours[:5], "findings": int(summary_line[1]), "note": note}, passed


def benchmark_rows(file: Path) -> list[dict[str, Any]]:
    """Read the rows of a benchmark's JSON: the group and row, times, share of the copy bandwidth, peak memory."""
    content = json.loads(file.read_text())
    rows = []
    for entry in content["benchmarks"]:
        info = entry["extra_info"]
        rows.append(
            {
                "group": entry["group"],
                "row": info.get("row"),
                "median_s": entry["stats"]["median"],
                "iqr_s": entry["stats"]["iqr"],
                "rounds": entry["stats"]["rounds"],
                "copy_share": info.get("copy_share"),
                "peak_extra_bytes": info.get("peak_extra_bytes"),
            }
        )
    return rows


def benchmark_table(rows: list[dict[str, Any]]) -> list[str]:
    """Format the rows as Markdown, with the ratio to our row of the same group."""
    ours = {row["group"]: row["median_s"] for row in rows if row["row"] == "ours"}
    lines = ["| what | who | ms | x ours | share of copy | MiB extra |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["group"]):
        ratio = f"{row['median_s'] / ours[row['group']]:.2f}" if row["group"] in ours else ""
        share = f"{row['copy_share']:.0%}" if row["copy_share"] else ""
        extra = f"{row['peak_extra_bytes'] / 2**20:.1f}" if row["peak_extra_bytes"] is not None else ""
        lines.append(f"| {row['group']} | {row['row']} | {row['median_s'] * 1e3:.3f} | {ratio} | {share} | {extra} |")
    return lines


def not_passed(stages: list[dict[str, Any]]) -> list[str]:
    """Return the stages that make the check fail: failed and unfinished ones, and the build if it was skipped."""
    bad = ("failed", "unfinished")
    return [s["name"] for s in stages if s["status"] in bad or (s["name"], s["status"]) == ("build", "skipped")]


def verdict(stages: list[dict[str, Any]]) -> str:
    """Summarise the outcome in one line, which names everything that was skipped."""
    if bad := not_passed(stages):
        return f"not passed: {', '.join(bad)}"
    skipped = [f"{stage['name']} ({stage['note']})" for stage in stages if stage["status"] == "skipped"]
    skipped += [file for stage in stages for file in stage["results"].get("left_out", [])]
    return f"passed, but skipped: {', '.join(skipped)}" if skipped else "passed"


def summary(report: dict[str, Any]) -> str:
    """Format the report as Markdown."""
    machine, stages = report["machine"], report["stages"]
    lines = [
        "# Check of the CUDA kernels" + (" (rehearsal: emulated kernels, no GPU)" if report["rehearsal"] else ""),
        "",
        f"**{verdict(stages)}**, {report['date']}, {report['seconds']:.0f} s",
        "",
        *(f"- {name}: {value}" for name, value in machine.items() if not isinstance(value, dict)),
        *(
            f"- {name}: {', '.join(k for k, v in machine[name].items() if v)}"
            for name in ("tools", "modules")
            if name in machine
        ),
        "",
        "| stage | status | s | |",
        "|---|---|---|---|",
        *(f"| {s['name']} | {s['status']} | {s['seconds']:.0f} | {s['note']} |" for s in stages),
        "",
    ]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for stage in stages:
        results = {name: value for name, value in stage["results"].items() if name != "rows"}
        rows |= {(row["group"], row["row"]): row for row in stage["results"].get("rows", [])}
        if results and stage["name"] != "machine":
            lines += [f"## {stage['name']}", "", "```", json.dumps(results, indent=1), "```", ""]
        if stage["log"]:
            lines += [f"## The last output of {stage['name']}", "", "```", *stage["log"], "```", ""]
    if rows:
        lines += ["## Benchmarks", "", *benchmark_table(list(rows.values())), ""]
    return "\n".join(lines)

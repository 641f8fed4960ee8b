"""Writes docs/generated/ops.md, the table of all ops, from the first line of each docstring.

python -m tools.pages.ops            write the page
python -m tools.pages.ops --check    fail if the page is out of date
"""

from __future__ import annotations

import inspect

import retinanet_ops as ops
from retinanet_ops import reference
from tools.pages.writing import ROOT, write_or_check

PAGE = ROOT / "docs" / "generated" / "ops.md"


def page() -> str:
    """Return the page as Markdown. An op is a public function with a reference of the same name."""
    lines = [
        "# All ops",
        "",
        "Written by `make pages` from the docstrings, which describe arguments, results, errors and special cases:",
        "`help(retinanet_ops.nms)`. `retinanet_ops.reference` has a twin of each op in plain PyTorch, with the same",
        "signature.",
        "",
        "| op | what it does |",
        "|---|---|",
    ]
    functions = [getattr(ops, name) for name in ops.__all__ if hasattr(reference, name)]
    for function in sorted(functions, key=lambda function: (function.__module__, function.__name__)):
        first_line = (inspect.getdoc(function) or "").partition("\n")[0].replace("|", "\\|")
        source = f"../../{function.__module__.replace('.', '/')}.py"
        lines.append(f"| [`{function.__name__}`]({source}) | {first_line} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    write_or_check(__doc__, PAGE, page)

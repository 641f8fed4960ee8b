"""Shows the cells of the notebooks, which are Markdown files in jupytext's MyST format, as code."""

from __future__ import annotations

from docutils import nodes
from docutils.parsers.rst import Directive, directives


class CodeCell(Directive):
    """The directive `code-cell`: Python code of a notebook, without its output."""

    has_content = True
    optional_arguments = 1  # the lexer, which is always Python's
    option_spec = {"tags": directives.unchanged}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        """Return the code as a block."""
        code = "\n".join(self.content)
        return [nodes.literal_block(code, code, language="python")]

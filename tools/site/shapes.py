"""Shows the shapes of the source beside the arguments of the API reference.

In this project, the shape and dtype of a tensor stand as a comment behind each argument and field, and behind the colon
that ends a signature (`boxes: Tensor,  # [C, 4] floating`). Sphinx drops comments. This module reads them from the
source, and adds them to the signatures and to the lists of arguments, fields and results.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import textwrap
import tokenize
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

_NO_SHAPE = re.compile(r"type:|noqa")
_ENTRY = re.compile(r"^    (\*{0,2}\w+): ")


@dataclass(frozen=True)
class Shapes:
    """The shape comments of a function or class."""

    names: dict[str, str]  # of each argument or field that has one
    result: str = ""


def shapes_of(documented: Any) -> Shapes:
    """Return the shape comments in the source of a function, or of the fields of a class."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(documented)))
    except (OSError, TypeError):  # a value, or something that Python or C++ made
        return Shapes({})
    comments = _comments(source)
    node = ast.parse(source).body[0]
    if isinstance(node, ast.ClassDef):
        fields = [item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)]
        found = {item.target.id: _comment(comments, item) for item in fields if isinstance(item.target, ast.Name)}
        return Shapes({name: text for name, text in found.items() if text})
    if not isinstance(node, ast.FunctionDef):
        return Shapes({})
    # A signature on one line has room for one comment, which is that of the result.
    last_line = node.returns.end_lineno if node.returns else node.lineno
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    found = {
        item.arg: comments.get(item.end_lineno or 0, ("", ""))[0] for item in arguments if item.lineno != last_line
    }
    return Shapes({name: text for name, text in found.items() if text}, comments.get(last_line or 0, ("", ""))[0])


def _comments(source: str) -> dict[int, tuple[str, bool]]:
    """Return the comment of each line, and whether it has the line to itself."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            parts = [part.strip() for part in token.string.split("#")]
            text = "; ".join(part for part in parts if part and not _NO_SHAPE.match(part))
            found[token.start[0]] = text, not token.line[: token.start[1]].strip()
    return found


def _comment(comments: dict[int, tuple[str, bool]], field: ast.AnnAssign) -> str:
    """Return the comment behind a field, or above it if it begins with a shape."""
    text, _ = comments.get(field.end_lineno or 0, ("", False))
    above, alone = comments.get(field.lineno - 1, ("", False))
    return text or (above if alone and above.startswith("[") else "")


def add_to_docstring(app: Sphinx, what: str, name: str, documented: Any, options: Any, lines: list[str]) -> None:
    """Add the shapes to the sections of arguments, fields and results; give a NamedTuple a section of fields."""
    shapes = shapes_of(documented)
    section, own_names = "", set()
    # Sphinx's own section Attributes would be headed "Variables".
    lines[:] = ["Fields:" if line == "Attributes:" else line for line in lines]
    for number, line in enumerate(lines):
        if re.match(r"\w+:$", line):
            section = line[:-1]
        elif line and not line.startswith(" "):
            section = ""
        elif section in ("Args", "Fields") and (entry := _ENTRY.match(line)):
            own_names.add(entry[1].lstrip("*"))
            if shape := shapes.names.get(entry[1].lstrip("*")):
                lines[number] = f"    {entry[1]}: :shape:`{shape}`. {line[entry.end() :]}"
        elif section == "Returns" and line.strip():
            # Napoleon takes the text before a colon for the type.
            kind = shapes.result or (_result(documented) if ": " in line else "")
            if kind:
                lines[number] = f"    {kind}: {line.strip()}"
            section = ""
    # An argument is code, even if an op has the same name.
    for number, line in enumerate(lines):
        lines[number] = re.sub(r"(?<!`)`(\w+)`(?!`)", lambda n: f"`{n[0]}`" if n[1] in own_names else n[0], line)
    if what == "class" and issubclass(documented, tuple) and shapes.names:
        lines += ["", "Fields:"]
        for field, shape in shapes.names.items():
            lines.append(f"    {field}: :shape:`{shape}`")


def _result(function: Any) -> str:
    annotation = inspect.signature(function).return_annotation
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def add_to_signature(app: Sphinx, domain: str, kind: str, content: addnodes.desc_content) -> None:
    """Add the shapes to the arguments and the result of a signature."""
    if domain != "py" or kind not in ("function", "method", "class", "exception"):
        return
    for signature in content.parent.children[: content.parent.index(content)]:
        shapes = shapes_of(_documented(signature))
        for parameter in signature.findall(addnodes.desc_parameter):
            names = [name.astext() for name in parameter.findall(addnodes.desc_sig_name)]
            if shape := shapes.names.get(names[0] if names else ""):  # `*` and `/` have no name
                # Behind the type, and before " = " and a default value.
                texts = [child.astext() for child in parameter.children]
                place = texts.index("=") - (texts[texts.index("=") - 1] == " ") if "=" in texts else len(texts)
                parameter[place:place] = [nodes.Text(" "), nodes.inline("", shape, classes=["shape"])]
        for result in signature.findall(addnodes.desc_returns):
            if shapes.result:
                result += [nodes.Text(" "), nodes.inline("", shapes.result, classes=["shape"])]


def _documented(signature: addnodes.desc_signature) -> Any:
    """Return the object that a signature describes, or None."""
    found: Any = import_module(signature["module"])
    for name in signature["fullname"].split("."):
        found = getattr(found, name, None)
    return found


def shape_role(
    role: str, raw: str, text: str, line: int, inliner: Any, options: Any = None, content: Any = None
) -> tuple[list[nodes.Node], list[nodes.Node]]:
    """Render the text of the role `shape`, which `add_to_docstring` writes."""
    return [nodes.inline(raw, text, classes=["shape"])], []

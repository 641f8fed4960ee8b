"""Turns the names in the backticks of a docstring into links where they are public names of the packages."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from docutils import nodes
from sphinx import addnodes

MODULES = (
    "retinanet_ops",
    "retinanet_ops.integrations.torchvision",
    "retinanet_ops.onnx",
    "retinanet",
    "retinanet.data",
    "retinanet.export",
)


@cache
def public_names() -> dict[str, str]:
    """Return the full name of each public class and function, by its last part and by its full name."""
    found: dict[str, str] = {}
    for module in reversed(MODULES):  # a name of the ops comes before the same name of the detectors
        for name in import_module(module).__all__:
            found[name] = found[f"{module}.{name}"] = f"{module}.{name}"
    return found


def name_role(
    role: str, raw: str, text: str, line: int, inliner: Any, options: Any = None, content: Any = None
) -> tuple[list[nodes.Node], list[nodes.Node]]:
    """Render text in single backticks: a link to the public class or function of this name, or else code.

    Sphinx's own role `py:obj` would also link the name of an argument, such as `boxes`, to any field of that name.
    """
    literal = nodes.literal(raw, text)
    full_name = public_names().get(text)
    module = inliner.document.settings.env.ref_context.get("py:module") or ""
    # In the ops, `RetinaNet` is torchvision's.
    foreign = module.startswith("retinanet_ops") and not (full_name or "").startswith("retinanet_ops")
    if full_name is None or foreign:
        return [literal], []
    link = addnodes.pending_xref(
        raw, literal, refdomain="py", reftype="obj", reftarget=full_name, refexplicit=True, refwarn=True
    )
    return [link], []

"""Settings of the docs site, which `make docs` builds into build/docs."""

import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parents[1]))

import retinanet_ops  # noqa: E402
from tools.site import links, names, notebooks, shapes  # noqa: E402

project = "retinanet-ops"
author = "The retinanet-ops developers"
version = release = retinanet_ops.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["attrs_inline"]
myst_heading_anchors = 4

# Shapes stand in the signatures, one argument to a line, as in the source.
python_maximum_signature_line_length = 60
python_use_unqualified_type_names = True
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
default_role = "name"  # of tools/site/names.py
napoleon_custom_sections = [("Fields", "params_style")]
napoleon_use_param = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
toc_object_entries_show_parents = "hide"

html_theme = "pydata_sphinx_theme"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"{project} {version}"
html_show_sourcelink = False
html_copy_source = False
html_context = {"default_mode": "auto"}  # the light or dark mode of the reader's system
html_theme_options = {
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "show_prev_next": False,
    "footer_start": ["sphinx-version"],
    "footer_end": ["theme-version"],
}


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect what the site adds to Sphinx."""
    app.add_directive("code-cell", notebooks.CodeCell)
    app.add_role("name", names.name_role)
    app.add_role("shape", shapes.shape_role)
    app.connect("source-read", links.read_page)
    app.connect("autodoc-process-docstring", shapes.add_to_docstring, priority=400)  # before napoleon
    app.connect("object-description-transform", shapes.add_to_signature)
    return {"parallel_read_safe": True}

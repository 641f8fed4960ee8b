"""Makes the links of the Markdown pages, which lead to files of the repository, lead to pages of the site.

The pages are read on GitHub as well, so their links name files. A link to a page under docs/ works in both places. This
module changes the others: those to pages that stand outside docs/, to modules that the API reference describes, and to
folders.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

import retinanet_ops

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

#: The pages of the site whose text is a file outside docs/.
FOREIGN = {
    "site/overview": ROOT / "README.md",
    "site/contributing": ROOT / "CONTRIBUTING.md",
    "site/changelog": ROOT / "CHANGELOG.md",
    "site/kernels": ROOT / "csrc" / "README.md",
    "site/attribution": ROOT / "tests" / "fixtures" / "ATTRIBUTION.md",
    "site/releasing": ROOT / "RELEASING.md",
    "site/security": ROOT / "SECURITY.md",
}

_FENCE = re.compile(r"^(`{3,}).*?^\1`*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")
_IMAGE = re.compile(r"!\[(?P<text>[^\]]*)\]\((?P<target>[^)\s:]+)\)")


def read_page(app: Sphinx, page: str, content: list[str]) -> None:
    """Put the text of a foreign page in place of its stub, and change the links of any Markdown page."""
    source = FOREIGN.get(page, DOCS / f"{page}.md")
    content[0] = with_links(source.read_text() if page in FOREIGN else content[0], source, DOCS / f"{page}.md")


def with_links(text: str, source: Path, page: Path) -> str:
    """Return the text of the file `source` with links that work from the file `page` of the site."""
    kept, start = [], 0
    for fence in [*_FENCE.finditer(text), None]:
        prose = text[start : fence.start() if fence else len(text)]
        prose = _LINK.sub(lambda link: _link(link, source, page), prose)
        kept.append(_IMAGE.sub(lambda image: f"![{image['text']}]({_path(image['target'], source, page)})", prose))
        if fence:
            kept.append(fence[0])
            start = fence.end()
    return "".join(kept)


def _link(link: re.Match[str], source: Path, page: Path) -> str:
    target = (source.parent / link["target"]).resolve()
    name = link["text"].strip("`")
    if target.is_dir():
        return link["text"]
    if target.suffix == ".py" and target.parent.name == "retinanet_ops" and name in retinanet_ops.__all__:
        return f"{{py:obj}}`{name} <retinanet_ops.{name}>`"
    return f"[{link['text']}]({_path(link['target'], source, page)}{link['anchor'] or ''})"


def _path(target: str, source: Path, page: Path) -> str:
    path = (source.parent / target).resolve()
    for name, foreign in FOREIGN.items():
        if path == foreign:
            path = DOCS / f"{name}.md"
    return os.path.relpath(path, page.parent)

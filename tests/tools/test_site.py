"""The docs site builds without warnings, shows the shapes of the source, and loads in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("sphinx", reason="needs the extra `docs`")
pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="the documents are only in the source tree")

from tools.site import links, names, shapes  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site, and return its folder."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "--quiet", "-d", folder / "doctrees"]
    done = subprocess.run([*command, "docs", folder / "html"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "html"


def text_of(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", "", html)).split())


def signatures(site: Path) -> dict[str, str]:
    """Return the HTML of the signature of each documented object, by its full name."""
    found = {}
    for page in (site / "api").glob("*.html"):
        found |= dict(re.findall(r'<dt class="sig [^>]*id="([\w.]+)">(.*?)</dt>', page.read_text(), re.DOTALL))
    return found


def test_every_public_name_is_in_the_api_reference(site: Path) -> None:
    documented = signatures(site)
    missing = [name for name in names.public_names().values() if name not in documented]
    assert set(missing) == {"retinanet_ops.reference"}  # its functions have the signatures of the ops


def test_signatures_have_shapes(site: Path) -> None:
    documented = signatures(site)
    nms = text_of(documented["retinanet_ops.nms"])
    assert "boxes: Tensor [C, 4] floating, scores: Tensor [C] floating," in nms
    assert "→ Tensor [kept] int64" in nms
    padded = text_of(documented["retinanet_ops.batched_nms_padded"])
    assert "labels: Tensor | None [N, C] integer = None," in padded
    arguments = [
        (name, text_of(argument), 'class="shape"' in argument)
        for name, signature in documented.items()
        for argument in re.findall(r'<em class="sig-param">.*?</em>', signature, re.DOTALL)
        if name.startswith("retinanet_ops.") and "Tensor" in argument
    ]
    assert len(arguments) > 80
    assert [argument for argument in arguments if not argument[2]] == []


def test_fields_and_arguments_have_shapes(site: Path) -> None:
    text = text_of((site / "api" / "records.html").read_text())
    assert "num_positive – [N] int32: number of anchors with a match >= 0" in text
    assert "ious – [N, A]: IoU with the matched ground truth" in text  # its comment stands above the field
    text = text_of((site / "api" / "ops.html").read_text())
    assert "counts – [N] integer. Number of valid candidates of each image" in text


def test_names_in_docstrings_are_links(site: Path) -> None:
    page = (site / "api" / "ops.html").read_text()
    assert re.search(r'<a class="reference internal" href="#retinanet_ops.batched_nms_padded"[^>]*><code', page)
    assert re.search(r"base_anchors</span></code> does not have", page)  # a field, not the op of this name
    page = (site / "api" / "integrations.html").read_text()
    assert re.search(r"<p><code [^>]*><span [^>]*>RetinaNet</span></code>, for example from", page)  # torchvision's


def load_page(page: Path, profile: Path) -> tuple[str, list[str]]:
    """Load a page in Chromium, and return its document and the messages on its console."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--disable-component-update", "--disable-sync", "--disable-quic", "--enable-logging=stderr"]
    options += [f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run([str(BROWSER), *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # The theme says which mode it shows.
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line and '"[PST]: ' not in line]
    return done.stdout, console


needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium, which checks that the pages load")


@needs_browser
@pytest.mark.parametrize("page", ["index", "api/ops", "benchmarks"])
def test_pages_load_without_console_errors(site: Path, tmp_path: Path, page: str) -> None:
    document, console = load_page(site / f"{page}.html", tmp_path / "profile")
    assert console == []
    assert 'data-theme="light"' in document  # set by the theme's script


@needs_browser
def test_console_errors_are_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<script>console.error("planted by console.error"); throw new Error("planted by throw")</script>')
    _, console = load_page(page, tmp_path / "profile")
    assert len(console) == 2
    assert "planted by console.error" in console[0] and "planted by throw" in console[1]


def planted(
    boxes: Tensor,  # [N, 4] floating
    rule: str = "a",
    weights: Tensor | None = None,  # [N]
) -> Tensor:  # [kept]
    return torch.zeros(0)


def test_shapes_of_a_function_come_from_its_source() -> None:
    found = shapes.shapes_of(planted)
    assert found.names == {"boxes": "[N, 4] floating", "weights": "[N]"} and found.result == "[kept]"
    lines = ["Do it.", "", "Args:", "    boxes: Boxes of `rule`.", "", "Returns:", "    Indices: `nms`."]
    shapes.add_to_docstring(None, "function", "planted", planted, None, lines)  # type: ignore[arg-type]
    assert lines[3] == "    boxes: :shape:`[N, 4] floating`. Boxes of `rule`."
    assert lines[6] == "    [kept]: Indices: `nms`."


def test_links_out_of_the_docs_lead_to_pages_of_the_site() -> None:
    page = links.DOCS / "benchmarks.md"
    text = "[a](../CONTRIBUTING.md#add-an-op) [b](data.md) [`nms`](../retinanet_ops/nms.py) [tools](../tools/emulator)"
    changed = links.with_links(f"{text}\n```\n[c](../CHANGELOG.md)\n```", page, page)
    expected = "[a](site/contributing.md#add-an-op) [b](data.md) {py:obj}`nms <retinanet_ops.nms>` tools"
    assert changed == f"{expected}\n```\n[c](../CHANGELOG.md)\n```"
    overview = links.DOCS / "site" / "overview.md"
    assert links.with_links("![d](docs/a/b.png)", ROOT / "README.md", overview) == "![d](../a/b.png)"

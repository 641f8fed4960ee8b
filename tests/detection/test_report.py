"""The report of an evaluation: a page that is complete by itself, in every case, and that a browser shows."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image
from synthetic import rectangles

from retinanet.data import DetectionDataset, open_dataset
from retinanet.detection.detection_table import DetectionTable
from retinanet.detection.evaluate import evaluate_detections
from retinanet.detection.report import write_report
from retinanet.detection.score_curves import operating_points
from retinanet.model.thresholds import ScoreThresholds

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NAMES = (r'<b>"Trees" & $\frac$</b>', "<script>alert(1)</script>")


class Page(HTMLParser):
    """The parts of a page that a test looks at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, Any]] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attributes))
        for name, value in attributes:
            assert name not in ("href", "srcset", "background") and not name.startswith("on"), (tag, name)
            assert name != "src" or str(value).startswith("data:image/"), (tag, value)

    def handle_data(self, data: str) -> None:
        self.text += f" {data} "


def detections_of(dataset: DetectionDataset) -> list[dict[str, Any]]:
    """Return detections of most objects, some with another class, and some wrong ones."""
    found = []
    for number, annotation in enumerate(dataset.coco["annotations"]):
        category = annotation["category_id"] if number % 7 else dataset.category_ids[0]
        x, y, width, height = annotation["bbox"]
        shifts = [[0.1 * width, 0, 0.9]] + [[0.6 * width, 0.5 * height, 0.3]] * (number % 3 == 0)
        for dx, dy, score in shifts if number % 4 else []:
            bbox = [x + dx, y + dy, width, height]
            score = score - 0.001 * number
            found.append({"image_id": annotation["image_id"], "category_id": category, "bbox": bbox, "score": score})
    return found


def report(folder: Path, dataset: DetectionDataset, found: list[dict[str, Any]], thresholds=None) -> Path:
    table = DetectionTable.from_results(dataset.image_ids, dataset.category_ids, found)
    result = evaluate_detections(dataset, table, "hotcoco")
    points = operating_points(result.curves, thresholds, dataset.class_names)
    path = folder / "report.html"
    write_report(path, "model <1>.safetensors", dataset, result, points)
    assert [file.name for file in folder.iterdir() if file.name.startswith(("report", "."))] == ["report.html"]
    return path


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    folder = tmp_path_factory.mktemp("two")
    rectangles(folder, 20, size=72)
    content = json.loads((folder / "annotations.json").read_text())
    for category, name in zip(content["categories"], NAMES, strict=True):
        category["name"] = name
    content["annotations"][3]["iscrowd"] = 1
    (folder / "annotations.json").write_text(json.dumps(content))
    return open_dataset(folder / "annotations.json")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, two_classes: DetectionDataset) -> Path:
    thresholds = ScoreThresholds(0.25, (0.25, None))
    return report(tmp_path_factory.mktemp("page"), two_classes, detections_of(two_classes), thresholds)


def test_page_is_complete_by_itself(page: Path) -> None:
    text = page.read_text()
    parsed = Page(text)
    assert not {"script", "link", "iframe", "object", "base"} & set(parsed.tags)
    assert "default-src 'none'" in text
    assert re.findall(r"url\(|@import|https?:", text) == []
    assert all(name in parsed.text for name in NAMES) and "model <1>.safetensors" in parsed.text
    # Seven plots of two classes, and the twelve worst images.
    kinds = [re.match(r"data:image/([\w+]+);base64,", image["src"])[1] for image in parsed.images]
    assert kinds.count("svg+xml") == 7 and kinds.count("jpeg") == 12
    for image in parsed.images:
        assert len(image["alt"]) > 10
        content = base64.b64decode(image["src"].partition(",")[2], validate=True)
        if "jpeg" in image["src"][:20]:
            assert Image.open(io.BytesIO(content)).size == (2 * 720 + 12, 720)
        else:
            root = ElementTree.fromstring(content)
            links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
            assert root.tag.endswith("svg") and all(link.startswith(("#", "data:")) for link in links)


def test_page_has_the_numbers(page: Path, two_classes: DetectionDataset) -> None:
    text = " ".join(Page(page.read_text()).text.split())
    table = DetectionTable.from_results(two_classes.image_ids, two_classes.category_ids, detections_of(two_classes))
    result = evaluate_detections(two_classes, table)
    counts = result.curves.overall.at(0.25)
    assert 0 < counts.true_positives and 0 < counts.false_positives and 0 < counts.false_negatives
    assert (
        f"score above 0.250 (threshold of the model) at IoU 0.5: {counts.true_positives} correct and "
        f"{counts.false_positives} wrong detections, {counts.false_negatives} objects missed."
    ) in text
    for value in (result.stats["AP"], result.stats["AP50"], counts.f1, counts.precision, counts.recall):
        assert f"{value:.3f}" in text
    assert "APl undefined large objects (area from 96 x 96 pixels); the data set has no such objects" in text
    # The worst images come first.
    shown = [float(value) for value in re.findall(r"\.png : F1 ([\d.]+),", text)]
    assert shown == sorted(shown) and len(shown) == 12 and shown[0] < shown[-1]


@pytest.mark.parametrize("case", ["no detections", "no objects", "no errors"])
def test_cases_without_curves_or_errors(tmp_path: Path, case: str) -> None:
    dataset = rectangles(tmp_path, 2)
    found = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.75}
        for a in dataset.coco["annotations"]
    ]
    if case == "no detections":
        found = []
    if case == "no objects":
        dataset.__dict__["coco"] = {**dataset.coco, "annotations": []}
    text = " ".join(Page(report(tmp_path, dataset, found).read_text()).text.split())
    expected = {
        "no detections": "There are no curves, because there are no detections.",
        "no objects": "There are no curves, because no object counts.",
        "no errors": "No image has an error at a score above 0.375.",
    }
    assert expected[case] in text
    assert ("undefined" in text) and not re.search(r"(?<!\w)-1(?!\d)", text)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed to open the report")
def test_browser_shows_every_picture_without_an_error(page: Path, tmp_path: Path) -> None:
    # A script in a copy of the page reports what the browser has loaded. The page itself forbids scripts.
    script = (
        "<script>addEventListener('load', () => document.title = JSON.stringify("
        "[...document.images].map(i => i.complete ? i.naturalWidth : 0)))</script>"
    )
    text = page.read_text()
    copy = tmp_path / "copy.html"
    copy.write_text(
        text.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'").replace(
            "</body>", script + "</body>"
        )
    )
    for path in (page, copy):
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        options += ["--disable-component-update", "--disable-sync", "--disable-quic", "--enable-logging=stderr"]
        options += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
        done = subprocess.run([str(BROWSER), *options], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    widths = json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1])
    assert len(widths) == 19 and min(widths) > 200

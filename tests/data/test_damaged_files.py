"""Whatever the bytes of a file, reading it raises nothing but DataError, in lines that a terminal can show."""

import io
import json
import os
import random
import shutil
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from dataset_cases import coco, write_image
from PIL import Image

from retinanet.common.errors import DataError
from retinanet.data import open_dataset
from retinanet.data.images import check_image, image_size, read_image
from retinanet.data.opening import ReadOptions, inspect_dataset
from retinanet.data.statistics import remarkable, statistics

#: Changed files of each form; a fixed choice, or FUZZ_EXAMPLES new ones.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 40))
RANDOM = random.Random(None if "FUZZ_EXAMPLES" in os.environ else 0)

VOC = """<?xml version="1.0" encoding="utf-8"?>
<annotation><filename>a.png</filename><size><width>60</width><height>40</height></size><object><name>tree</name>
<difficult>0</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>"""
COCO = coco()
COCO["annotations"] += [
    {"id": 11, "image_id": 10, "category_id": 7, "segmentation": [[1, 2, 9, 2, 9, 9]]},
    {"id": 12, "image_id": 10, "category_id": 7, "segmentation": {"size": [40, 60], "counts": "X6`2XR2"}},
]
#: Each form: the file that is changed, its content, and the path that is opened.
FORMS = {
    "coco": ("ann.json", json.dumps(COCO), "ann.json"),
    "voc": ("voc/a.xml", VOC, "voc"),
    "voc list": ("VOC/ImageSets/list.txt", "a\na 1\n", "VOC/ImageSets/list.txt"),
    "csv": ("t.csv", "path,x1,y1,x2,y2,class\na.png,5,6,25,16,tree\nb.png,,,,,\n", "t.csv"),
    "yaml": ("data.yaml", 'path: .\ntrain: images\nnames: {0: tree, 1: "bush"}\n', "data.yaml"),
    "yolo": ("labels/a.txt", "0 0.5 0.5 0.1 0.1\n1 0.1 0.1 0.5 0.2 0.3 0.6\n", "data.yaml"),
}
#: Pieces that have a meaning in one of the forms, or that readers of text stumble over.
PIECES = [
    *(b"\0", b"\xff", b"\xfe\xff", b"-", b"nan", b"1e999", b"9" * 5000, b"[" * 9000, b"<a>" * 9000, b'"', b"'", b"&"),
    *(b"*", b",", b";", b"\n", b"\r", b"\x85", b"\xe2\x80\xa8", b"&a;", b'encoding="gbk"', b"../", b"\\", b": ", b"- "),
    *(
        b"0x1f",
        b"1_000",
        b"2020-99-99",
        b"&x [*x]",
        b"<<: 5\n",
        b"? [a]\n: b\n",
        b"!!python/object:os.system",
        b"\x1b[0m",
    ),
]
VALUES: list[Any] = [
    *(None, True, 0, -1, 1.5, 1e308, float("nan"), float("inf"), 10**30, 10**400, 2**63, "", "a.png", "\ud800", "a\0b"),
    *("x" * 5000, "../../etc/passwd", "/", ".", "..", [], {}, [[]], {"a": 1}, "\n\r\x1b[0m", [1, 2, 3, 4], ["1"] * 4),
    *([float("nan")] * 4, [10**400, 1, 1, 1], [True, 1, 1, 1], {"size": [0, 0], "counts": [0]}),
]


def changed(data: bytes) -> bytes:
    """Return data with a few pieces replaced, removed, repeated or added."""
    result = bytearray(data)
    for _ in range(RANDOM.randint(1, 4)):
        start = RANDOM.randrange(len(result) + 1)
        end = min(len(result), start + RANDOM.randrange(1, 20))
        piece = RANDOM.choice([b"", bytes([RANDOM.randrange(256)]), result[start:end] * 3, *PIECES])
        result[start : RANDOM.choice([start, end])] = piece
    return bytes(result[: RANDOM.choice([len(result), RANDOM.randrange(len(result) + 1)])])


def with_other_values(content: Any) -> Any:
    """Return JSON content with some values replaced and some left out."""
    if RANDOM.random() < 0.06:
        return RANDOM.choice(VALUES)
    if isinstance(content, dict):
        return {key: with_other_values(value) for key, value in content.items() if RANDOM.random() > 0.03}
    return [with_other_values(value) for value in content] if isinstance(content, list) else content


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    for name in ("voc", "VOC/ImageSets", "VOC/Annotations", "images", "labels"):
        (folder / name).mkdir(parents=True)
    write_image(folder / "a.png")
    write_image(folder / "b.png", seed=1)
    for name in ("voc", "VOC/Annotations", "images"):
        shutil.copy(folder / "a.png", folder / name)
    (folder / "VOC" / "Annotations" / "a.xml").write_text(VOC)
    for name, text, _ in FORMS.values():
        (folder / name).write_text(text)
    return folder


def read_everything(folder: Path, form: str, data: bytes) -> list[str]:
    """Read a data set whose file has this content, and return the lines of all findings."""
    name, text, opened = FORMS[form]
    (folder / name).write_bytes(data)
    try:
        inspection = inspect_dataset(folder / opened, None, ReadOptions(split="train"))
    except DataError as error:
        return str(error).splitlines()
    finally:
        (folder / name).write_text(text)
    dataset = inspection.dataset
    for index in range(len(dataset)):
        dataset.load(index)
    statistics(dataset)
    assert len(json.dumps(dataset.coco)) > 0
    findings = inspection.problems.errors + inspection.problems.mended + remarkable(dataset)
    return [str(finding) for finding in findings]


def check_lines(lines: list[str]) -> None:
    for line in lines:
        assert line.isprintable() and len(line) < 1000, line[:2000]


@pytest.mark.parametrize("form", FORMS)
def test_changed_annotations(folder: Path, form: str) -> None:
    text = FORMS[form][1]
    found = 0
    for number in range(EXAMPLES):
        data = changed(text.encode())
        if form == "coco" and number % 2:
            data = json.dumps(with_other_values(COCO)).encode()
        elif number % 20 == 0:
            data = RANDOM.randbytes(number)
        lines = read_everything(folder, form, data)
        check_lines(lines)
        found += bool(lines)
    assert found > EXAMPLES / 3


@pytest.mark.parametrize(
    ("form", "data", "reason"),
    [
        ("coco", b"[" * 100_000, "not usable JSON: lists or objects are nested too deeply"),
        ("coco", b'{"images": ' + b"9" * 5000 + b"}", "not usable JSON: Exceeds the limit (4300 digits)"),
        ("coco", b"\xff\xd8\xff\xe0", "expected text in UTF-8, got something else"),
        ("voc", b'<!DOCTYPE a [<!ENTITY b "&b;&b;">]><annotation>&b;</annotation>', "not well-formed xml"),
        ("yaml", b"names: !!python/object/apply:os.system [ls]", "not valid YAML: could not determine a constructor"),
        ("yaml", b"[" * 500, "not valid YAML: "),
        ("yaml", b"&x [*x]", "expected a YOLO data file"),
        ("yaml", b"\x07", "not valid YAML: unacceptable character"),
    ],
)
def test_hostile_annotations(folder: Path, form: str, data: bytes, reason: str) -> None:
    lines = read_everything(folder, form, data)
    check_lines(lines)
    assert reason in lines[0]


@contextmanager
def no_endless_wait() -> Iterator[None]:
    """Fail after a minute in a block that waits for something that does not happen."""

    def fail(*_: object) -> None:
        raise AssertionError("waits for the other end of the pipe")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("form", FORMS)
def test_a_pipe_in_place_of_a_file(folder: Path, tmp_path: Path, form: str) -> None:
    shutil.copytree(folder, tmp_path / "data")
    name, _, opened = FORMS[form]
    pipe = tmp_path / "data" / name
    pipe.unlink()
    os.mkfifo(pipe)
    with no_endless_wait(), pytest.raises(DataError) as caught:
        open_dataset(tmp_path / "data" / opened, split="train")
    assert str(caught.value) == f"{pipe}: cannot be read (expected a file, got a pipe, a device or a socket)"


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tif", "webp", "ppm", "tga", "mpo"])
def test_changed_images(tmp_path: Path, suffix: str) -> None:
    buffer, path = io.BytesIO(), tmp_path / f"a.{suffix}"
    picture = Image.effect_noise((40, 30), 90).convert("RGB")
    picture.save(buffer, format=Image.registered_extensions()[f".{suffix}"])
    refused = 0
    for _ in range(EXAMPLES):
        path.write_bytes(changed(buffer.getvalue()))
        for read in (image_size, check_image, read_image):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # Pillow warns of what it mends.
                    read(path, 2**20)
            except DataError as error:
                check_lines(str(error).splitlines())
                refused += 1
    assert refused > EXAMPLES / 2

"""The commands of docs/data.md run on files of the forms that the page describes."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_cases import SUBPROCESS, make_data, run

from retinanet.data import open_dataset

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the documents are only in the source tree")

CVAT = """<annotations><version>1.1</version><meta><task>
<labels><label><name>square</name></label></labels></task></meta>
<image id="0" name="1.png" width="64" height="48"><box label="square" xtl="1" ytl="2" xbr="9.5" ybr="12"/></image>
</annotations>"""


def commands() -> list[str]:
    return re.findall(r"^    ((?:retinanet|coco) .*)$", PAGE.read_text(), flags=re.MULTILINE)


def make_forms(folder: Path) -> None:
    """Write the same three images and boxes in every form, under the names of the page."""
    path = make_data(folder / "photos", 3)
    content = json.loads(path.read_text())
    path.rename(folder / "annotations.json")
    (folder / "annotations.xml").write_text(CVAT)
    voc = folder / "VOC2012"
    for name in ("VOC2012/JPEGImages", "VOC2012/Annotations", "VOC2012/ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for kind in ("images", "labels"):
        for part in ("train", "val"):
            (folder / kind / part).mkdir(parents=True)
    (folder / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [square]\n")
    plain, udacity = [], []
    for entry in content["annotations"]:
        number, (x, y, width, height) = entry["image_id"], entry["bbox"]
        image = folder / "photos" / f"{number}.png"
        corners = x, y, x + width, y + height
        shutil.copy(image, voc / "JPEGImages")
        tags = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin"), (x + 1, y + 1), strict=True))
        tags += f"<xmax>{x + width}</xmax><ymax>{y + height}</ymax>"
        (voc / "Annotations" / f"{number}.xml").write_text(
            f"<annotation><filename>{image.name}</filename><object><name>square</name><bndbox>{tags}</bndbox></object>"
            "</annotation>"
        )
        for part in ("train", "val"):
            shutil.copy(image, folder / "images" / part)
            shares = (x + width / 2) / 64, (y + height / 2) / 48, width / 64, height / 48
            (folder / "labels" / part / f"{number}.txt").write_text(f"0 {' '.join(map(repr, shares))}\n")
        plain.append(f"photos/{image.name},{','.join(map(str, corners))},square\n")
        udacity.append(f"{corners[0]},{corners[2]},{corners[1]},{corners[3]},photos/{image.name},square\n")
    (voc / "ImageSets" / "Main" / "train.txt").write_text("1\n2\n3\n")
    (folder / "boxes.csv").write_text("".join(plain))
    (folder / "udacity.csv").write_text("".join(udacity))


def test_commands_of_the_data_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_forms(tmp_path)
    monkeypatch.chdir(tmp_path)
    boxes = [[round(v, 3) for v in record.box] for record in open_dataset("annotations.json", "photos").boxes]
    checked = set()
    for command in commands():
        program, *arguments = shlex.split(command)
        if program == "coco":
            # The page converts into the name that it uses elsewhere.
            arguments = [argument.replace("annotations.json", "converted.json") for argument in arguments]
            main = [sys.executable, "-c", "from hotcoco.cli import main; main()", *arguments]
            subprocess.run(main, env=SUBPROCESS, check=True, capture_output=True)
            assert open_dataset("converted.json", "photos", strict=True).boxes[0].box == (1, 2, 9.5, 12)
            continue
        assert run(*arguments) == 0, command
        if arguments[0] == "check" and "--fix" not in arguments:
            assert run(*arguments, "--fix", f"copy{len(checked)}") == 0
            for path in Path(f"copy{len(checked)}").glob("*.json"):
                copied = [[round(v, 3) for v in record.box] for record in open_dataset(path, strict=True).boxes]
                assert copied == boxes, command
            checked.add(command)
    assert len(checked) == 9
    assert len(open_dataset("tiles/annotations.json", strict=True)) == 3

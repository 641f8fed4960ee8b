"""Reading tables of boxes."""

from pathlib import Path

import pytest
from dataset_cases import folder, write_image  # noqa: F401  fixture

from retinanet.common.errors import DataError
from retinanet.data import DetectionDataset, open_dataset
from retinanet.data.csv_table import column_positions

BOXES = [[5, 6, 25, 16], [1.5, 2.5, 4.75, 6.5]]
#: keras-retinanet's own form: no header, floats, and an image without boxes.
PLAIN = "a.png,5,6,25,16,tree\na.png,1.5,2.5,4.75,6.5,bush\nb.png,,,,,\n"


def opened(folder: Path, text: str | bytes, name: str = "boxes.csv", **options: object) -> DetectionDataset:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return open_dataset(folder / name, **options)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (PLAIN, {}),
        ("\n" + PLAIN.replace("\n", "\r\n\r\n"), {}),
        (PLAIN.replace(",", ";"), {}),
        (PLAIN.replace(",", "\t"), {}),
        (PLAIN.replace(",", " , "), {}),
        (PLAIN.replace("b.png,,,,,", "b.png"), {}),
        (PLAIN.encode("utf-8-sig"), {}),
        (PLAIN.encode("utf-16"), {}),
        ("path,x1,y1,x2,y2,class\n" + PLAIN, {}),
        (
            "filename,width,height,class,xmin,ymin,xmax,ymax\n"
            "a.png,60,40,tree,5,6,25,16\na.png,60,40,bush,1.5,2.5,4.75,6.5\nb.png,60,40,,,,,\n",
            {},
        ),
        (
            "xmin,xmax,ymin,ymax,Frame,Label,Preview URL\n"
            '5,25,6,16,a.png,tree,"http://x/1,2"\n1.5,4.75,2.5,6.5,a.png,bush,\n,,,,b.png,,\n',
            {},
        ),
        (
            "image_path,xmin,ymin,xmax,ymax,label,score\n"
            "a.png,5,6,25,16,tree,0.9\na.png,1.5,2.5,4.75,6.5,bush,0.8\nb.png,,,,,,\n",
            {},
        ),
        (
            'a.png 5 6 25 16 0 "tree"\na.png 1.5 2.5 4.75 6.5 0 "bush"\nb.png\n',
            {"csv_columns": "path x1 y1 x2 y2 occluded class".split()},
        ),
        (
            # The header is wrong, as that of a well-known set is; --csv-columns overrides it.
            "xmin,xmax,ymin,ymax,Frame,Label\n5,6,25,16,a.png,tree\n1.5,2.5,4.75,6.5,a.png,bush\n,,,,b.png,\n",
            {"csv_columns": "xmin,ymin,xmax,ymax,frame,label".split(",")},
        ),
    ],
)
def test_forms_of_tables(folder: Path, text: str | bytes, options: dict) -> None:
    dataset = opened(folder, text, strict=True, **options)
    assert dataset.paths == [folder / "a.png", folder / "b.png"]
    assert (dataset.class_names, dataset.category_ids) == (("bush", "tree"), (1, 2))
    assert [list(record.box) for record in dataset.boxes] == BOXES
    assert [record.label for record in dataset.boxes] == [1, 0]
    assert len(dataset.load(1)[1]["boxes"]) == 0


def test_the_classes_of_the_training_set(folder: Path) -> None:
    dataset = opened(folder, PLAIN, class_names=("zebra", "tree", "bush"))
    assert [record.label for record in dataset.boxes] == [1, 2]
    with pytest.raises(DataError, match=r"boxes\.csv: line 2: expected a class among tree, got 'bush'$"):
        opened(folder, PLAIN, class_names=("tree",))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("a.png,5,6,25,16", "expected a class, got nothing"),
        (",5,6,25,16,tree", "expected the path of an image, got nothing"),
        ("a.png,5,,25,16,tree", "y1: expected a number, got ''"),
        ("a.png,5,6,x,16,tree", "x2: expected a number, got 'x'"),
        ("a.png,5,6,nan,16,tree", "box (x1 y1 x2 y2) 5 6 nan 16 has a coordinate that is not finite"),
        ("a.png,5,6,1e40,16,tree", "box (x1 y1 x2 y2) 5 6 1e+40 16 has a coordinate that is not finite"),
        (
            "a.png,25,6,5,16,tree",
            "box (x1 y1 x2 y2) 25 6 5 16 is inverted; if the columns have another order, name them with --csv-columns",
        ),
        (
            "a.png,5,6,25,16,0,tree",
            "expected 6 columns path,x1,y1,x2,y2,class, got 7; name the columns with a header or --csv-columns",
        ),
        (
            "c.png,5,6,25,16,tree",
            "{folder}/c.png: no such file; looked in {folder}, name another folder of images with --images",
        ),
    ],
)
def test_a_wrong_line(folder: Path, line: str, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        opened(folder, PLAIN + line + "\n")
    assert str(caught.value) == f"{folder}/boxes.csv: line 4: {reason.format(folder=folder)}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expected lines path,x1,y1,x2,y2,class, got an empty file"),
        ("a.png,,,,,\n", "expected at least one box, got none"),
        (
            "file,a,b,c,d,e\na.png,1,2,3,4,tree\n",
            "line 1: expected a header with the columns path,x1,y1,x2,y2,class, got 'file,a,b,c,d,e': "
            "no column is a x1 (known names: x1, xmin, x_min, left); name the columns with --csv-columns",
        ),
        ("a.png,.1,.2,.5,.5,tree", "no coordinate is above 1; expected pixels, got shares of width and height"),
        ('a.png,1,2,3,4,"' + "x" * 200_000, "line 1: not a line of a table (field larger than field limit (131072))"),
        (b"a.png,1,2,3,4,b\xe4ume", "expected text in UTF-8, got something else; save it as UTF-8"),
    ],
)
def test_a_wrong_table(folder: Path, text: str | bytes, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        opened(folder, text)
    assert str(caught.value) == f"{folder}/boxes.csv: {reason}"


def test_a_stated_size_is_compared(folder: Path) -> None:
    with pytest.raises(DataError, match=r"line 2: the annotations say 50 x 40 pixels, .*a\.png is 60 x 40"):
        opened(folder, "path,width,height,x1,y1,x2,y2,class\na.png,50,40,5,6,25,16,tree\n")


def test_columns() -> None:
    assert column_positions(["Label", "-", "xmin", "XMAX", "y1", "bottom", "File"])["y2"] == 5
    with pytest.raises(ValueError, match=r"^two columns are a x1: x1 and xmin$"):
        column_positions(["x1", "xmin"])
    with pytest.raises(
        ValueError, match=r"^no column is a class \(known names: class, class_name, label, name, category"
    ):
        column_positions(["path", "x1", "y1", "x2", "y2"])

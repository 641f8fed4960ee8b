"""Tables of detections, and the map coordinates of pictures with a world file."""

import csv
import json
import os
from pathlib import Path

import pytest
import torch
from synthetic import tiny_config

from retinanet.common.errors import DataError
from retinanet.detection.tables import Source, Tables, polygon
from retinanet.detection.world_file import WorldFile, find_world_file, read_world_file
from retinanet.model.targets import ImageDetections

#: Pixels of 0.5 map units, turned so that a column leads to (0.4, 0.3) and a row to (0.3, -0.4).
TURNED = WorldFile(a=0.4, d=0.3, b=0.3, e=-0.4, c=1000.0, f=2000.0)
FOUND = ImageDetections(
    torch.tensor([[0.5, 0.5, 10.5, 20.5], [1.0, 2.0, 3.0, 5.0]]), torch.tensor([0.75, 0.5]), torch.tensor([1, 0])
)
NONE = ImageDetections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))


def write(
    folder: Path, *found: tuple[ImageDetections, Source], formats: tuple[str, ...], videos: bool = False
) -> Tables:
    tables = Tables(folder, formats, tiny_config(), videos=videos)
    for detections, source in found:
        tables.add(detections, source)
    tables.close()
    return tables


def test_csv_and_coco(tmp_path: Path) -> None:
    pictures = (NONE, Source(1, Path("empty.png"))), (FOUND, Source(2, Path("a.png")))
    tables = write(tmp_path, *pictures, formats=("csv", "coco"))
    assert tables.count == 2 and tables.names == ["detections.csv", "detections.json"]
    assert (tmp_path / "detections.csv").read_text().splitlines() == [
        "file_name,x1,y1,x2,y2,score,label,class_name",
        "a.png,0.50,0.50,10.50,20.50,0.7500,1,blue",
        "a.png,1.00,2.00,3.00,5.00,0.5000,0,red",
    ]
    first, second = json.loads((tmp_path / "detections.json").read_text())
    assert first == {
        "image_id": 2,
        "file_name": "a.png",
        "category_id": 11,
        "category_name": "blue",
        "bbox": [0.5, 0.5, 10.0, 20.0],
        "score": 0.75,
    }
    assert second["bbox"] == [1, 2, 2, 3] and second["category_id"] == 3
    assert {path.name for path in tmp_path.iterdir()} == {"detections.csv", "detections.json"}


def test_no_detections_give_valid_files(tmp_path: Path) -> None:
    write(tmp_path, (NONE, Source(1, Path("a.png"))), formats=("csv", "coco", "geojson"))
    assert json.loads((tmp_path / "detections.json").read_text()) == []
    content = json.loads((tmp_path / "detections_pixels.geojson").read_text())
    assert content == {"type": "FeatureCollection", "features": []}
    assert len((tmp_path / "detections.csv").read_text().splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_a_full_disk_is_named_and_leaves_no_tables(tmp_path: Path) -> None:
    tables = Tables(tmp_path, ("csv", "coco"), tiny_config())
    tables.add(FOUND, Source(1, Path("a.png")))
    rows = tables._lists["detections.json"]
    rows.file.close()
    rows.file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(OSError, match="No space left on device") as caught:
        for number in range(1000):
            tables.add(FOUND, Source(number, Path("a.png")))
    assert caught.value.filename == str(tmp_path)
    rows.file.buffer.raw.close()
    with pytest.raises(ValueError, match="closed file"):
        tables.close()
    assert not list(tmp_path.iterdir())


def test_frames_of_a_video(tmp_path: Path) -> None:
    sources = Source(1, Path("a.mp4"), 30, 1.001), Source(2, Path("a.png"))
    write(tmp_path, *((FOUND, source) for source in sources), formats=("csv", "coco"), videos=True)
    with (tmp_path / "detections.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["frame"], row["time"]) for row in rows] == [("30", "1.001")] * 2 + [("", "")] * 2
    results = json.loads((tmp_path / "detections.json").read_text())
    assert [(entry.get("frame"), entry.get("time")) for entry in results] == [(30, 1.001)] * 2 + [(None, None)] * 2


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(b"caf\xe9.png"))
    write(tmp_path, (FOUND, Source(1, path)), formats=("csv", "coco", "geojson"))
    for name in ("detections.csv", "detections.json", "detections_pixels.geojson"):
        assert "caf" in (tmp_path / name).read_text(encoding="utf-8")


def test_map_units_of_a_turned_picture_worked_by_hand(tmp_path: Path) -> None:
    """The centre of the upper left pixel, (0.5, 0.5), lies at (c, f); ten columns to its right lie 4 east, 3 north."""
    assert TURNED.to_map(0.5, 0.5) == (1000, 2000)
    assert TURNED.to_map(10.5, 0.5) == pytest.approx((1004, 2003))
    assert TURNED.to_map(0.5, 20.5) == pytest.approx((1006, 1992))
    sources = Source(1, Path("map.jpg"), world=TURNED), Source(2, Path("plain.jpg"))
    write(tmp_path, *((FOUND, source) for source in sources), formats=("geojson",))
    content = json.loads((tmp_path / "detections.geojson").read_text())
    assert content["type"] == "FeatureCollection" and len(content["features"]) == 2
    feature = content["features"][0]
    assert feature["properties"]["file_name"] == "map.jpg" and feature["properties"]["bbox"] == [0.5, 0.5, 10, 20]
    (ring,) = feature["geometry"]["coordinates"]
    expected = [(1006, 1992), (1010, 1995), (1004, 2003), (1000, 2000), (1006, 1992)]
    assert [tuple(point) for point in ring] == [pytest.approx(point) for point in expected]
    pixels = json.loads((tmp_path / "detections_pixels.geojson").read_text())["features"]
    assert [feature["properties"]["file_name"] for feature in pixels] == ["plain.jpg"] * 2
    assert pixels[1]["geometry"]["coordinates"] == [[[1, 2], [3, 2], [3, 5], [1, 5], [1, 2]]]


@pytest.mark.parametrize("world", [None, TURNED, TURNED._replace(a=-0.4, d=-0.3), WorldFile(1, 0, 0, 1, 0, 0)])
def test_rings_are_counterclockwise(world: WorldFile | None) -> None:
    ring = polygon([1, 2, 5, 9], world)
    area = sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in zip(ring, ring[1:], strict=False)) / 2
    scale = 1 if world is None else abs(world.a * world.e - world.b * world.d)
    assert area == pytest.approx(28 * scale) and ring[0] == ring[-1] and len(ring) == 5


@pytest.mark.parametrize(
    ("picture", "name"),
    [
        ("a.jpg", "a.jgw"),
        ("a.jpg", "a.jpgw"),
        ("a.JPG", "a.JGW"),
        ("a.jpeg", "a.jgw"),
        ("a.png", "a.pgw"),
        ("a.tif", "a.tfw"),
        ("a.tif", "a.tifw"),
        ("a.tiff", "a.wld"),
    ],
)
def test_names_of_world_files(tmp_path: Path, picture: str, name: str) -> None:
    (tmp_path / "b.jgw").touch()
    assert find_world_file(tmp_path / picture) is None
    (tmp_path / name).write_text("0.5\r\n0\r\n0\r\n-0,5\r\n440720,25\r\n3751320.0\r\n")
    found = find_world_file(tmp_path / picture)
    assert found is not None and found.name == name
    assert read_world_file(found) == WorldFile(0.5, 0, 0, -0.5, 440720.25, 3751320)


@pytest.mark.parametrize(
    "content", [b"", b"1\n2\n3\n4\n5\n", b"1\n0\n0\nx\n0\n0\n", b"1\n0\n0\nnan\n0\n0\n", b"\xff\xfe\x00", b"0\n" * 6]
)
def test_damaged_world_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jgw").write_bytes(content)
    with pytest.raises(DataError, match=rf"^{tmp_path}/a\.jgw: ") as caught:
        read_world_file(tmp_path / "a.jgw")
    assert str(caught.value).isprintable()

"""Tables of detections: CSV, COCO results and GeoJSON, written while the detections are made."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

from retinanet.common.files import replacing, writing
from retinanet.detection.world_file import WorldFile
from retinanet.model.detector_config import DetectorConfig
from retinanet.model.targets import ImageDetections

CSV_COLUMNS = ("file_name", "x1", "y1", "x2", "y2", "score", "label", "class_name")
#: Columns that follow if there are frames of videos.
VIDEO_COLUMNS = ("frame", "time")


class Source(NamedTuple):
    """The picture, or the frame of a video, that detections belong to.

    Attributes:
        image_id: A number of its own, for COCO results.
        path: The file.
        frame: Number of the frame, from 0; None for a picture.
        time: Seconds from the first frame of the video to this one; None for a picture.
        world: The picture's world file, or None.
    """

    image_id: int
    path: Path
    frame: int | None = None
    time: float | None = None
    world: WorldFile | None = None

    @property
    def file_name(self) -> str:
        """The path as text that can be written in UTF-8; bytes of another encoding become escapes."""
        return str(self.path).encode("utf-8", "backslashreplace").decode("utf-8")


class Tables:
    """Writers of detections in several formats.

    The files are `detections.csv`, `detections.json` (COCO results with the names of file and class added), and for
    GeoJSON `detections.geojson` in map units for pictures with a world file and `detections_pixels.geojson` in pixels
    for the others, so that no file mixes the two. A file replaces that of an earlier run when `close` is called.

    Args:
        folder: An existing folder.
        formats: Some of `retinanet.detection.table_formats.FORMATS`.
        config: Configuration of the model, for the names and ids of classes.
        videos: Add columns for the frames of videos to the CSV table.
    """

    def __init__(self, folder: Path, formats: Sequence[str], config: DetectorConfig, *, videos: bool = False) -> None:
        """Keep the arguments; `add` opens the files."""
        self.folder, self.formats, self.config, self.videos = folder, tuple(formats), config, videos
        self.count = 0
        self.names: list[str] = []
        self._stack = ExitStack()
        self._lists: dict[str, _JsonList] = {}
        self._rows: Any = None

    def add(self, detections: ImageDetections, source: Source) -> None:
        """Append the detections of one picture or frame, which may be none.

        Raises:
            OSError: The tables cannot be written; `filename` names the folder.
        """
        with writing(self.folder):
            self._add(detections, source)

    def close(self) -> None:
        """Finish the files and put them into the folder.

        Raises:
            OSError: The tables cannot be written; `filename` names the folder.
        """
        with self._stack, writing(self.folder):
            for content in self._lists.values():
                content.finish()

    def _add(self, detections: ImageDetections, source: Source) -> None:
        self.count += len(detections.scores)
        columns = (detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist())
        found = list(zip(*columns, strict=True))
        if "csv" in self.formats:
            self._csv().writerows(self._row(source, *detection) for detection in found)
        if "coco" in self.formats:
            self._json("detections.json", "[", "]").extend(self._result(source, *detection) for detection in found)
        if "geojson" in self.formats:
            name = "detections_pixels.geojson" if source.world is None else "detections.geojson"
            features = self._json(name, '{"type": "FeatureCollection", "features": [', "]}")
            features.extend(self._feature(source, *detection) for detection in found)

    def _row(self, source: Source, box: list[float], score: float, label: int) -> tuple[Any, ...]:
        numbers = (*(f"{value:.2f}" for value in box), f"{score:.4f}", label)
        row = (source.file_name, *numbers, self.config.class_names[label])
        if not self.videos:
            return row
        return *row, "" if source.frame is None else source.frame, "" if source.time is None else f"{source.time:.3f}"

    def _result(self, source: Source, box: list[float], score: float, label: int) -> dict[str, Any]:
        return {"image_id": source.image_id, **self._properties(source, box, score, label)}

    def _feature(self, source: Source, box: list[float], score: float, label: int) -> dict[str, Any]:
        geometry = {"type": "Polygon", "coordinates": [polygon(box, source.world)]}
        return {"type": "Feature", "geometry": geometry, "properties": self._properties(source, box, score, label)}

    def _properties(self, source: Source, box: list[float], score: float, label: int) -> dict[str, Any]:
        x1, y1, x2, y2 = box
        moment = {} if source.frame is None else {"frame": source.frame, "time": source.time}
        return {
            "file_name": source.file_name,
            **moment,
            "category_id": self.config.category_ids[label],
            "category_name": self.config.class_names[label],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }

    def _csv(self) -> Any:
        if self._rows is None:
            self._rows = csv.writer(self._open("detections.csv"))
            self._rows.writerow((*CSV_COLUMNS, *VIDEO_COLUMNS) if self.videos else CSV_COLUMNS)
        return self._rows

    def _json(self, name: str, head: str, tail: str) -> _JsonList:
        if name not in self._lists:
            self._lists[name] = _JsonList(self._open(name), head, tail)
        return self._lists[name]

    def _open(self, name: str) -> IO[str]:
        self.names.append(name)
        temporary = self._stack.enter_context(replacing(self.folder / name))
        return self._stack.enter_context(temporary.open("w", newline="", encoding="utf-8"))


class _JsonList:
    """A JSON file with one element of a list a line, which need not fit into memory."""

    def __init__(self, file: IO[str], head: str, tail: str) -> None:
        self.file, self.tail = file, tail
        self.file.write(head + "\n")
        self.separator = ""

    def extend(self, elements: Any) -> None:
        for element in elements:
            self.file.write(self.separator + json.dumps(element))
            self.separator = ",\n"

    def finish(self) -> None:
        self.file.write(f"\n{self.tail}\n" if self.separator else f"{self.tail}\n")


def polygon(box: Sequence[float], world: WorldFile | None) -> list[list[float]]:
    """Return the corners of a box as a closed ring, counterclockwise as GeoJSON (RFC 7946) asks.

    Args:
        box: `(x1, y1, x2, y2)` in pixels, y pointing down.
        world: The picture's world file. None leaves the corners in pixels.

    Returns:
        Five `[x, y]`, of which the last is the first.
    """
    x1, y1, x2, y2 = box
    corners = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    if world is not None:
        corners = [world.to_map(x, y) for x, y in corners]
        if world.a * world.e < world.b * world.d:  # The map mirrors, as it does where its y axis points north.
            corners.reverse()
    return [[x, y] for x, y in (*corners, corners[0])]

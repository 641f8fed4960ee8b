"""Detection in files: pictures and videos become rows of the tables and annotated copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from retinanet.common.errors import DataError, printable
from retinanet.common.files import output_folder
from retinanet.common.names import FreeNames
from retinanet.data.images import exif_orientation, open_image, read_image
from retinanet.detection.drawing import draw_detections
from retinanet.detection.inputs import is_video
from retinanet.detection.picture_format import fitting, format_like, save_picture
from retinanet.detection.tables import Source, Tables
from retinanet.detection.tiled import count_passes, detect_image
from retinanet.detection.video import Video, VideoWriter
from retinanet.detection.world_file import WorldFile, find_world_file, read_world_file
from retinanet.model.detector import Detector
from retinanet.model.targets import ImageDetections

_ANNOTATED = "_detections"

#: Shows the progress inside one file, given the number of steps or None, what is counted and the file's name; the
#: context yields a function that counts one step.
Steps = Callable[[int | None, str, str], AbstractContextManager[Callable[[], Any]]]


@dataclass
class FileDetector:
    """Detects objects in files, one after another, and writes the results into one folder.

    The folder is created by the first file that can be read.

    Attributes:
        model: The model, in evaluation mode.
        folder: Folder of the results.
        formats: Formats of the tables, see `retinanet.detection.table_formats.FORMATS`.
        score_threshold: Detections need a score above this.
        tile: As in `detect_image`.
        overlap: As in `detect_image`.
        views: As in `detect_image`.
        every: Frames of a video from one detection to the next.
        copies: Write annotated copies.
        videos: Add columns for the frames of videos to the CSV table.
        steps: Shows the progress inside a file.
    """

    model: Detector
    folder: Path
    formats: tuple[str, ...]
    score_threshold: float
    tile: int | None = None
    overlap: int | None = None
    views: int = 1
    every: int = 1
    copies: bool = True
    videos: bool = False
    steps: Steps | None = None
    tables: Tables | None = field(default=None, init=False)
    _images: int = field(default=0, init=False)
    _names: FreeNames | None = field(default=None, init=False)

    def detect(self, path: Path) -> str:
        """Detect in one file, and return what was found as text.

        Raises:
            DataError: The file cannot be read, or only in part, or its annotated copy cannot be stored. What was read
                is in the results.
        """
        return self._video(path) if is_video(path) else self._picture(path)

    def close(self) -> None:
        """Put the tables into the folder."""
        if self.tables is not None:
            self.tables.close()

    def _picture(self, path: Path) -> str:
        self._images += 1
        source = Source(self._images, path, world=self._world(path))
        # Even a large orthophoto is read whole, because the tiles are cut from it in memory.
        image = read_image(path, max_pixels=None)
        self._check_size(path, image)
        height, width = image.shape[-2:]
        passes = count_passes(height, width, tile=self.tile, overlap=self.overlap, views=self.views)
        if self.steps is None or passes == 1:
            found = self._found(image)
        else:
            with self.steps(passes, "tile" if self.views == 1 else "view", path.name) as step:
                found = self._found(image, step)
        tables = self._tables()
        tables.add(found, source)
        if self.copies:
            chosen = fitting(format_like(path), (width, height))
            save_picture(self._drawn(image, found), self.folder / self._copy_name(path, chosen.suffix), chosen)
        return counted(len(found.scores), "detection")

    def _video(self, path: Path) -> str:
        with Video(path) as video:
            count = before = 0
            total = None if video.expected_frames is None else -(-video.expected_frames // self.every)
            writer = None
            try:
                for frame in self._stepped(video.frames(self.every), total, path):
                    if not count:
                        self._check_size(path, frame.pixels)
                        tables = self._tables()
                        before = tables.count
                        if self.copies:
                            writer = VideoWriter(self.folder / self._copy_name(path, ".mp4"))
                    found = self._found(frame.pixels)
                    self._images += 1
                    tables.add(found, Source(self._images, path, frame.number, round(frame.time, 6)))
                    if writer is not None:
                        writer.add(self._drawn(frame.pixels, found), frame.time)
                    count += 1
            finally:
                if writer is not None:
                    writer.close()
            detections = self.tables.count - before if count and self.tables is not None else 0
            text = f"{counted(detections, 'detection')} in {counted(count, 'frame')}"
            if video.damage:
                raise DataError(f"{video.damage}; kept {text}" if count else video.damage)
            return text

    def _stepped(self, frames: Iterable[Any], total: int | None, path: Path) -> Iterable[Any]:
        if self.steps is None:
            yield from frames
            return
        with self.steps(total, "frame", path.name) as step:
            for frame in frames:
                yield frame
                step()

    def _found(self, image: Tensor, step: Callable[[], Any] | None = None) -> ImageDetections:
        return detect_image(
            self.model,
            image,
            tile=self.tile,
            overlap=self.overlap,
            score_threshold=self.score_threshold,
            views=self.views,
            after_pass=step,
        )

    def _drawn(self, image: Tensor, found: ImageDetections) -> Image.Image:
        return draw_detections(image, found.boxes, found.scores, found.labels, self.model.config.class_names)

    def _tables(self) -> Tables:
        if self.tables is None:
            self.tables = Tables(output_folder(self.folder), self.formats, self.model.config, videos=self.videos)
        return self.tables

    def _world(self, path: Path) -> WorldFile | None:
        """Return the picture's world file if GeoJSON is written."""
        found = find_world_file(path) if "geojson" in self.formats else None
        if found is None:
            return None
        with open_image(path, max_pixels=None) as image:
            if (orientation := exif_orientation(image)) != 1:
                raise DataError(
                    f"{printable(str(path))}: EXIF orientation: expected 1 beside the world file {found.name}, got "
                    f"{orientation}: the world file may describe the pixels before or after turning; save the picture "
                    "upright"
                )
        return read_world_file(found)

    def _check_size(self, path: Path, image: Tensor) -> None:
        """Raise DataError if resizing the picture or its tiles for the model leaves a side below one pixel."""
        height, width = (min(side, self.tile or side) for side in image.shape[-2:])
        if self.model.transform.vanishes(height, width):
            raise DataError(
                f"{printable(str(path))}: size: {width} x {height} pixels are too elongated: resizing to the model's "
                f"max_size {self.model.config.max_size} leaves less than one pixel; crop the picture or choose smaller "
                "tiles (--tile)"
            )

    def _copy_name(self, path: Path, suffix: str) -> str:
        """Return a file name for the annotated copy that no other copy of this run has."""
        if self._names is None:
            self._names = FreeNames(self.folder)
        return self._names.take(path.stem, _ANNOTATED, suffix)


def counted(count: int, thing: str) -> str:
    """Return a count with what is counted, such as "1 frame" or "2 frames"."""
    return f"{count} {thing}{'s' * (count != 1)}"

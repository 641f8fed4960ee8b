"""Reading and writing of videos with PyAV, frame by frame."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from retinanet.common.errors import DataError, one_line, printable
from retinanet.common.files import replacing

if TYPE_CHECKING:
    import av

#: Encoders of annotated videos, the preferred one first, with their options. Builds of FFmpeg without GPL lack libx264.
_ENCODERS = {"libx264": {"crf": "23"}, "mpeg4": {"q:v": "3"}}
#: Unit of the times of written frames. The encoder mpeg4 accepts no unit below 1/65535 s.
_TIME_BASE = Fraction(1, 10_000)
#: A video counts as cut short if more than this many seconds, and more than this share of it, are missing at its end.
_MISSING_SECONDS, _MISSING_SHARE = 0.5, 0.02


class VideoFrame(NamedTuple):
    """One frame of a video.

    Attributes:
        number: Position among the frames that can be decoded, from 0.
        time: Seconds since the first frame.
        pixels: The frame, upright, RGB, uint8 `[3, height, width]`.
    """

    number: int
    time: float
    pixels: Tensor


class Video:
    """A video file, open for reading; a context manager.

    Args:
        path: The file, in any format that FFmpeg reads.

    Attributes:
        expected_frames: Number of frames that the file states or that follows from its length; None if unknown.
        damage: After the last frame has been read, what was wrong with the file, or None.

    Raises:
        DataError: PyAV is not installed, or the file is missing, is no video, is damaged, or has no picture track.
    """

    def __init__(self, path: Path) -> None:
        """Open the file and read its header."""
        self._name = printable(str(path))
        self.damage: str | None = None
        av = _library(self._name)
        try:
            # Cameras write titles in encodings of their own.
            self._container = av.open(_url(path), metadata_errors="replace")
        except (av.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            raise DataError(f"{self._name}: cannot be read as a video ({reason})") from error
        if not self._container.streams.video:
            self._container.close()
            raise DataError(f"{self._name}: expected a video, got a file without pictures")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self._rate = float(self._stream.average_rate or self._stream.guessed_rate or 25)
        self._seconds = _duration(self._container, self._stream)
        if self._stream.frames:
            self.expected_frames: int | None = self._stream.frames
        else:
            self.expected_frames = None if self._seconds is None else max(1, round(self._seconds * self._rate))

    def __enter__(self) -> Video:
        """Return the video."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self._container.close()

    def frames(self, every: int = 1) -> Iterator[VideoFrame]:
        """Yield every `every`-th frame, the first one included. Frames that are damaged are left out; see `damage`."""
        number, time = 0, 0.0
        start = broken = None
        for frame, error in self._decoded():
            if frame is None:
                broken = broken or error
                continue
            moment = frame.time if frame.time is not None else number / self._rate
            start = moment if start is None else start
            time = moment - start
            if number % every == 0:
                yield VideoFrame(number, time, _pixels(frame))
            number += 1
        self.damage = self._damage(number, time + 1 / self._rate, broken)

    def _damage(self, read: int, end: float, broken: str | None) -> str | None:
        """Return what was wrong with a file of which `read` frames were read, up to `end` seconds."""
        if not read:
            return f"{self._name}: expected a video, got no frame ({broken or 'cut short'})"
        if self._seconds is not None and self._seconds - end > max(_MISSING_SECONDS, _MISSING_SHARE * self._seconds):
            return f"{self._name}: cut short: it ends after {end:.1f} of {self._seconds:.1f} seconds"
        if broken:
            return f"{self._name}: damaged: frames that cannot be decoded were left out ({broken})"
        return None

    def _decoded(self) -> Iterator[tuple[Any, str | None]]:
        """Yield each frame with None, and for each packet that cannot be decoded None with the reason."""
        av = _library(self._name)
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
            except (av.FFmpegError, OSError) as error:  # The rest of the file cannot be read.
                yield None, one_line(error)
                return
            if packet is None:
                return
            try:
                frames = packet.decode()
            except (av.FFmpegError, ValueError) as error:
                yield None, getattr(error, "strerror", None) or one_line(error)
                continue
            for frame in frames:
                yield frame, None


class VideoWriter:
    """Writes annotated frames, without sound, to an MP4 file, which appears when the writer is closed.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        """Keep the path; the file is opened by the first frame, which decides the size."""
        self._path = path
        self._stack = ExitStack()
        self._container: Any = None
        self._stream: Any = None
        self._last = -1

    def add(self, picture: Image.Image, time: float) -> None:
        """Append a frame that is shown from `time` on, in seconds. Frames get the size of the first.

        Raises:
            DataError: The frame cannot be encoded.
        """
        av = _library(str(self._path))
        with self._errors(av):
            if self._container is None:
                self._open(av, picture.size)
            size = (self._stream.width, self._stream.height)
            # The usual pixel format of MP4 needs even sides.
            picture = picture.crop((0, 0, *size)) if _even(picture.size) == size else picture.resize(size)
            frame = av.VideoFrame.from_ndarray(np.asarray(picture.convert("RGB")), format="rgb24")
            self._last = max(self._last + 1, round(time / _TIME_BASE))
            frame.pts, frame.time_base = self._last, _TIME_BASE
            self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write the rest and put the file in its place.

        Raises:
            DataError: The rest cannot be encoded.
        """
        if self._container is None:
            return
        av = _library(str(self._path))
        with self._stack, self._errors(av), closing(self._container):
            self._container.mux(self._stream.encode())

    def _open(self, av: Any, size: tuple[int, int]) -> None:
        name = next((name for name in _ENCODERS if name in av.codecs_available), None)
        if name is None:
            raise DataError(f"{printable(str(self._path))}: this PyAV has no encoder {' or '.join(_ENCODERS)}")
        temporary = self._stack.enter_context(replacing(self._path))
        self._container = av.open(_url(temporary), "w", format="mp4")
        self._stream = self._container.add_stream(name, rate=Fraction(25), options=dict(_ENCODERS[name]))
        self._stream.width, self._stream.height = _even(size)
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = _TIME_BASE

    @contextmanager
    def _errors(self, av: Any) -> Iterator[None]:
        try:
            yield
        except av.FFmpegError as error:
            name = printable(str(self._path))
            raise DataError(f"{name}: the annotated video cannot be written ({one_line(error)})") from error


def _url(path: Path) -> str:
    """Return a path as FFmpeg takes it; of a bare `10:20.mp4`, it would take `10` for a protocol."""
    return f"file:{os.path.abspath(path)}"


def _library(name: str) -> Any:
    """Return the module `av`.

    Raises:
        DataError: It is not installed.
    """
    try:
        import av
    except ModuleNotFoundError as error:
        raise DataError(f"{name}: reading a video needs PyAV: run pip install 'retinanet-ops[video]'") from error
    return av


def _duration(container: av.container.InputContainer, stream: av.VideoStream) -> float | None:
    """Return the length of the pictures in seconds, or None if the file does not state it."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    # The length of the file is also that of its sound, which may be longer.
    alone = len(container.streams) == 1
    return container.duration / 1e6 if container.duration and alone else None


def _pixels(frame: av.VideoFrame) -> Tensor:  # [3, H, W] uint8
    pixels = frame.to_ndarray(format="rgb24")
    # A phone held upright stores its frames lying, with the angle by which a player turns them, counterclockwise.
    pixels = np.rot90(pixels, round(getattr(frame, "rotation", 0) / 90) % 4)
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def _even(size: tuple[int, int]) -> tuple[int, int]:
    width, height = size
    return max(2, width // 2 * 2), max(2, height // 2 * 2)

"""Tiny videos that the tests of detection share."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest


def make_video(
    path: Path,
    *,
    times: Sequence[float] = tuple(0.1 * k for k in range(20)),
    size: tuple[int, int] = (64, 48),
    codec: str = "mpeg4",
) -> Path:
    """Write a bright square that moves to the right on a dark ground; frame `k` has it at `x = k`."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        # An AVI file has a frame in every unit of time.
        stream.codec_context.time_base = unit = Fraction(1, 10 if path.suffix == ".avi" else 1000)
        for k, time in enumerate(times):
            picture = np.full((size[1], size[0], 3), 20, np.uint8)
            picture[10:26, k : k + 16] = 220
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(time / unit), unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path

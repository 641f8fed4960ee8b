"""Reading and writing videos: frames, times, orientation, and damaged files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from video_cases import make_video

from retinanet.common.errors import DataError
from retinanet.detection import video
from retinanet.detection.video import Video, VideoWriter

pytest.importorskip("av")


def bright_column(pixels: torch.Tensor) -> int:
    """Return the first column that shows the square."""
    return int((pixels.float().mean(0)[16] > 120).nonzero()[0])


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_frames_and_their_times(tmp_path: Path, name: str) -> None:
    with Video(make_video(tmp_path / name)) as opened:
        frames = list(opened.frames())
        assert opened.expected_frames == 20 and opened.damage is None
    assert [frame.number for frame in frames] == list(range(20))
    assert [frame.time for frame in frames] == pytest.approx([0.1 * k for k in range(20)], abs=1e-3)
    assert frames[0].pixels.shape == (3, 48, 64) and frames[0].pixels.dtype == torch.uint8
    assert abs(bright_column(frames[12].pixels) - 12) <= 1


def test_every_third_frame_and_times_that_are_not_even(tmp_path: Path) -> None:
    times = [2.0, 2.1, 2.5, 2.6, 3.2, 3.3, 3.4]  # The clock of a video may start anywhere.
    with Video(make_video(tmp_path / "a.mkv", times=times)) as opened:
        frames = list(opened.frames(3))
    assert [frame.number for frame in frames] == [0, 3, 6]
    assert [frame.time for frame in frames] == pytest.approx([0, 0.6, 1.4], abs=2e-3)
    assert [bright_column(frame.pixels) for frame in frames] == pytest.approx([0, 3, 6], abs=1)


def test_a_name_with_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_video(tmp_path / "a.mp4", times=(0, 0.1)).rename(tmp_path / "10:20.mp4")
    monkeypatch.chdir(tmp_path)
    writer = VideoWriter(Path("copy:1.mp4"))
    with Video(Path("10:20.mp4")) as video:
        for frame in video.frames():
            writer.add(Image.fromarray(frame.pixels.permute(1, 2, 0).numpy()), frame.time)
    writer.close()
    with Video(Path("copy:1.mp4")) as video:
        assert len(list(video.frames())) == 2


def test_a_video_of_a_phone_held_upright_is_turned(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", codec="libx264" if has_encoder("libx264") else "mpeg4")
    whole = path.read_bytes()
    unit = (1 << 16).to_bytes(4, "big")
    identity = unit + bytes(12) + unit + bytes(12) + (1 << 30).to_bytes(4, "big")
    # The second matrix of the file is that of the track: x' = -y, y' = x turns a quarter clockwise.
    position = whole.index(identity, whole.index(identity) + 1)
    turned = bytes(4) + unit + bytes(4) + (-(1 << 16)).to_bytes(4, "big", signed=True) + bytes(16) + identity[-4:]
    assert len(turned) == len(identity)
    path.write_bytes(whole[:position] + turned + whole[position + len(turned) :])
    with Video(path) as opened:
        frame = next(iter(opened.frames()))
    assert frame.pixels.shape == (3, 64, 48)
    # The square is 10 pixels below the top and at the left edge, so now it is 10 pixels from the right, at the top.
    rows, columns = (frame.pixels.float().mean(0) > 120).nonzero().unbind(1)
    assert rows.min() <= 1 and abs(int(columns.max()) - (47 - 10)) <= 1 and abs(int(columns.min()) - (47 - 25)) <= 1


def has_encoder(name: str) -> bool:
    import av

    return name in av.codecs_available


def test_a_video_that_is_cut_short(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(whole[: len(whole) * 3 // 5])
    with Video(tmp_path / "a.mkv") as opened:
        count = len(list(opened.frames()))
        assert 3 <= count < 16
        assert opened.damage.startswith(f"{tmp_path}/a.mkv: cut short: it ends after ")
        assert opened.damage.endswith(" of 2.0 seconds")


def test_a_damaged_middle_costs_only_its_frames(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.avi")
    content = bytearray(path.read_bytes())
    chunks = [k for k in range(len(content)) if content[k : k + 4] == b"00dc"]
    start, end = chunks[8] + 8, chunks[9]  # A chunk has a name and a length of 4 bytes each.
    content[start:end] = b"\xff" * (end - start)
    path.write_bytes(content)
    with Video(path) as opened:
        times = [frame.time for frame in opened.frames()]
        # Decoders work on several frames at a time, and may lose another frame than the damaged one.
        assert len(times) == 19 and times[:7] + times[8:] == pytest.approx(
            [0.1 * k for k in range(20) if k not in (7, 8)], abs=1e-3
        )
        assert opened.damage.startswith(f"{tmp_path}/a.avi: damaged: frames that cannot be decoded were left out (")


@pytest.mark.parametrize("content", [b"", b"junk" * 500, b"\x00\x00\x00\x18ftypmp42" + bytes(300)])
def test_files_that_are_no_videos(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(DataError, match=rf"^{tmp_path}/a\.mp4: (cannot be read as a video|expected a video)") as caught:
        with Video(tmp_path / "a.mp4") as opened:
            assert list(opened.frames()) == []
            raise DataError(opened.damage)
    assert "\n" not in str(caught.value)


def test_a_title_in_another_encoding(tmp_path: Path) -> None:
    import av

    path = make_video(tmp_path / "plain.mkv")
    with av.open(str(path)) as source, av.open(str(tmp_path / "a.mkv"), "w") as copy:
        copy.metadata["title"] = "un caf?"
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    content = (tmp_path / "a.mkv").read_bytes()
    assert content.count(b"un caf?") == 1
    (tmp_path / "a.mkv").write_bytes(content.replace(b"un caf?", b"un caf\xe9"))
    with Video(tmp_path / "a.mkv") as opened:
        assert len(list(opened.frames())) == 20


def test_a_missing_file_and_a_file_of_sound_only(tmp_path: Path) -> None:
    import av

    with pytest.raises(DataError, match=r"none\.mp4: cannot be read as a video \(No such file or directory\)"):
        Video(tmp_path / "none.mp4")
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
    with pytest.raises(DataError, match=r"sound\.mkv: expected a video, got a file without pictures"):
        Video(tmp_path / "sound.mkv")


def test_without_pyav_the_error_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(
        DataError, match=r"a\.mp4: reading a video needs PyAV: run pip install 'retinanet-ops\[video\]'"
    ):
        Video(tmp_path / "a.mp4")


@pytest.mark.parametrize("encoder", ["libx264", "mpeg4"])
def test_written_frames_have_their_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: str) -> None:
    """Sides are rounded down to even numbers, which MP4 needs."""
    if not has_encoder(encoder):
        pytest.skip(f"this PyAV has no {encoder}")
    monkeypatch.setattr(video, "_ENCODERS", {encoder: video._ENCODERS[encoder]})
    writer = VideoWriter(tmp_path / "out.mp4")
    times = [0, 0.04, 0.5, 0.5, 1.25]
    for k, time in enumerate(times):
        writer.add(Image.new("RGB", (65, 49), (40 * k, 90, 90)), time)
    assert [entry.suffix for entry in tmp_path.iterdir()] == [".tmp"]
    writer.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.mp4"]
    with Video(tmp_path / "out.mp4") as opened:
        frames = list(opened.frames())
    assert [frame.time for frame in frames] == pytest.approx(times, abs=2e-3)
    assert frames[0].pixels.shape == (3, 48, 64)
    assert [int(frame.pixels[0].float().mean()) for frame in frames] == pytest.approx([0, 40, 80, 120, 160], abs=8)


def test_a_writer_without_frames_leaves_no_file(tmp_path: Path) -> None:
    VideoWriter(tmp_path / "out.mp4").close()
    assert not list(tmp_path.iterdir())

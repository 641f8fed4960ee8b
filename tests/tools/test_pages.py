"""The generated pages that need neither a GPU nor a long run are up to date."""

import retinanet_ops
from retinanet_ops import reference
from tools.pages import gallery, ops


def test_every_op_is_in_the_table_of_ops() -> None:
    page = ops.page()
    assert all(f"[`{name}`](" in page for name in reference.__all__ if hasattr(retinanet_ops, name))
    assert ops.PAGE.read_text() == page, "run `make pages`"


def test_every_op_is_in_the_gallery() -> None:
    page = gallery.page()
    assert all(f"\n### `{name}`\n" in page for name in reference.__all__ if hasattr(retinanet_ops, name))
    assert gallery.PAGE.read_text() == page, "run `make pages`"
    assert set(gallery.CASES) <= set(reference.__all__)


def test_speed_ups_come_from_the_results() -> None:
    (row,) = [line for line in gallery.speed("nms").splitlines() if "20,000" in line]
    ours, theirs = 0.007392, 1.097264  # medians of benchmarks/results/nms_and_detect_cpu.json, in seconds
    assert f"**{theirs / ours:.0f}x**" in row and "7.4 ms" in row and "1,097 ms" in row
    (row,) = [line for line in gallery.speed("dense_softmax_cross_entropy").splitlines() if "torch" in line]
    assert "(in turns)" in row and " ms" not in row
    assert "has not been timed" in gallery.speed("candidates")

"""The generated pages that need neither a GPU nor a long run are up to date."""

import retinanet_ops
from retinanet_ops import reference
from tools.pages import ops


def test_every_op_is_in_the_table_of_ops() -> None:
    page = ops.page()
    assert all(f"[`{name}`](" in page for name in reference.__all__ if hasattr(retinanet_ops, name))
    assert ops.PAGE.read_text() == page, "run `make pages`"

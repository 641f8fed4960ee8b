"""Names of state-dict entries that torch.compile and data parallelism have changed."""

import pytest

from retinanet.common.errors import DataError
from retinanet.common.torch_files import unwrapped


def test_parts_of_wrappers_are_removed_wherever_they_stand() -> None:
    state = {"_orig_mod.a.weight": 1, "module.b._orig_mod.0.module.weight": 2, "c.modules.weight": 3}
    assert unwrapped(state, "x.pt") == {"a.weight": 1, "b.0.weight": 2, "c.modules.weight": 3}


def test_a_module_may_have_such_parts_itself() -> None:
    expected = ["a.module.weight", "_orig_mod.b.weight"]
    for state in (
        {"a.module.weight": 1, "b.weight": 2},
        {"a.weight": 1, "_orig_mod.b.weight": 2},
        {"_orig_mod.a.module.weight": 1, "module.b._orig_mod.weight": 2},
    ):
        assert unwrapped(state, "x.pt", expected) == {"a.module.weight": 1, "_orig_mod.b.weight": 2}


def test_two_entries_of_one_name_are_an_error() -> None:
    reason = r"^x\.pt: module\.a: expected one entry for a, got this one and a$"
    with pytest.raises(DataError, match=reason):
        unwrapped({"a": 1, "module.a": 2}, "x.pt")

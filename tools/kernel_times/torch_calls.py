"""Counts what a call of an op asks of torch: calls of the dispatcher, and the GPU operations of torch's own kernels.

The profiler records every call of the dispatcher, those from C++ included, which a `TorchDispatchMode` does not see.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would report that there is no GPU

#: aten ops that neither launch a kernel nor copy: they allocate, return a view, or ask about a tensor.
FREE = frozenset(
    """
    _reshape_alias _unsafe_view alias as_strided broadcast_tensors chunk detach detach_ empty empty_like empty_strided
    expand expand_as is_nonzero lift_fresh movedim new_empty new_empty_strided numel permute
    requires_grad_ resize_ resolve_conj resolve_neg result_type select set_ size slice split split_with_sizes
    squeeze stride swapaxes t transpose unbind unflatten unsafe_split unsqueeze view view_as
    """.split()
)
#: aten ops that only call other ones if there is something to do.
COMPOSITE = frozenset("contiguous flatten item narrow reshape to type_as".split())
#: GPU operations of the aten ops that take more than one. Those of sort are histogram, scan and passes of the radix
#: sort of 64-bit keys in CUB, and for several rows a second sort that restores the rows.
SORT_ROWS, SORT = 26, 12
OPERATIONS = {"nonzero": 4, "masked_select": 5, "topk": 6, "unique": 8, "cumsum": 2}


@dataclass
class TorchCalls:
    """What a call asked of torch.

    Attributes:
        dispatcher_calls: Calls of the dispatcher from Python or autograd.
        operations: GPU operations of torch's own kernels, by the name of the op.
    """

    dispatcher_calls: int = 0
    operations: Counter[str] = field(default_factory=Counter)


def _ancestors(event: Any) -> Iterator[str]:
    while event := event.cpu_parent:
        yield event.name


def _operations(name: str, shapes: list[list[int]]) -> int:
    """Return how many GPU operations an aten op takes."""
    if name in FREE | COMPOSITE:
        return 0
    if name in ("sort", "argsort", "msort"):
        shape = shapes[0] if shapes else []
        return SORT_ROWS if len(shape) > 1 and shape[0] > 1 else SORT
    return OPERATIONS.get(name, 1)


def count(call: Callable[[], object]) -> TorchCalls:
    """Run a call and count."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True) as profile:
        call()
    counted = TorchCalls()
    for event in profile.events() or ():
        namespace, _, name = event.name.partition("::")
        if namespace not in ("aten", "retinanet_ops"):
            continue
        outer = [ancestor for ancestor in _ancestors(event) if ancestor.startswith(("aten::", "retinanet_ops::"))]
        counted.dispatcher_calls += not outer
        parts = {ancestor.removeprefix("aten::") for ancestor in outer if ancestor.startswith("aten::")}
        if namespace == "aten" and parts <= COMPOSITE:
            counted.operations[name] += _operations(name, event.input_shapes)
    counted.operations = +counted.operations  # without zeros
    return counted

"""Shared code of the benchmarks: a check before timing, peak memory, copy bandwidth, shapes of real detectors."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from retinanet_ops import AnchorGrid

#: Feature maps of a COCO batch of 800 x 1344 pixels: 201,600 anchors with 9 per cell.
COCO_SIZE = (800, 1344)
COCO_GRIDS = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
COCO_CLASSES = 80

#: Seconds for all rounds of one row, and the least number of rounds.
SECONDS_PER_ROW = 1.5
MIN_ROUNDS = 5


@contextlib.contextmanager
def one_thread(only: bool = True) -> Iterator[None]:
    """Limit PyTorch, and therefore our kernels, to one thread inside the block if `only` is true."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if only else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Make malloc keep large freed blocks for the rest of the process, as MALLOC_MMAP_MAX_=0 does."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        pytest.skip("needs glibc")
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX in malloc.h
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)


class Comparison:
    """Checks one row of a benchmark and times it. A wrong result is an error and is not timed."""

    def __init__(self, benchmark: Any, device: torch.device, group: str) -> None:
        """Wrap the fixture of pytest-benchmark."""
        self.benchmark = benchmark
        self.device = device
        self.benchmark.group = group

    def __call__(
        self,
        row: str,
        function: Callable[[], Any],
        expected: Any,
        *,
        check: Callable[[Any, Any], None] | None = None,
        bytes_moved: int | None = None,
        group: str | None = None,
        rival: Callable[[], Any] | None = None,
        calls_per_round: int = 1,
    ) -> None:
        """Check `function()` against `expected`, then measure it.

        Args:
            row: The implementation: "ours", "torchvision", "torch.compile" ...
            function: The code to time. Its inputs must exist already.
            expected: The reference's result.
            check: Asserts that the result equals `expected`. Default: `torch.testing.assert_close`.
            bytes_moved: The least number of bytes that the algorithm must move, for the share of the copy bandwidth.
            group: Rows of one group are compared with each other.
            rival: Another implementation. After `function` has been timed alone, both run in turns, and the median of
                the ratios of all pairs is recorded. A machine that slows down for a minute does not change that ratio.
            calls_per_round: Number of calls that are timed together, for calls that take microseconds.
        """
        (check or torch.testing.assert_close)(function(), expected)
        self.benchmark.group = group or self.benchmark.group
        peak, resident = peak_extra_bytes(function, self.device), peak_resident_bytes(function, self.device)
        synchronised = self._synchronised(function)
        rounds = self._rounds(synchronised)
        self.benchmark.pedantic(synchronised, rounds=rounds, iterations=calls_per_round, warmup_rounds=2)
        median = self.benchmark.stats.stats.median
        share = bytes_moved / median / copy_bandwidth(self.device) if bytes_moved else None
        self.benchmark.extra_info.update(
            row=row, peak_extra_bytes=peak, peak_resident_bytes=resident, bytes_moved=bytes_moved, copy_share=share
        )
        if rival:
            self.benchmark.extra_info["rival_ratio"] = _ratio_in_turns(self._synchronised(rival), synchronised, rounds)

    def _synchronised(self, function: Callable[[], Any]) -> Callable[[], Any]:
        if self.device.type != "cuda":
            return function

        def call() -> Any:
            result = function()
            torch.cuda.synchronize(self.device)
            return result

        return call

    @staticmethod
    def _rounds(function: Callable[[], Any]) -> int:
        return max(MIN_ROUNDS, min(200, int(SECONDS_PER_ROW / max(_seconds(function), 1e-6))))


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _ratio_in_turns(rival: Callable[[], Any], function: Callable[[], Any], rounds: int) -> float:
    """Return the median ratio of the times of `rival` and `function`.

    The two take turns in running first. The first pair is a warm-up and is not counted.
    """
    ratios = []
    for i in range(1 + rounds):
        if i % 2:
            theirs, ours = _seconds(rival), _seconds(function)
        else:
            ours, theirs = _seconds(function), _seconds(rival)
        ratios.append(theirs / ours)
    return statistics.median(ratios[1:])


def peak_extra_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """Measure the peak memory of torch's allocator that one call adds, its result included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = function()
    del result
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def peak_resident_bytes(function: Callable[[], Any], device: torch.device) -> int | None:
    """Measure the peak memory that one call adds to the process, by any allocator.

    The result is None on a GPU or without Linux.
    """
    clear_refs = Path("/proc/self/clear_refs")
    if device.type != "cpu" or not clear_refs.exists():
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # a call that reuses memory kept by malloc would seem to need none
        clear_refs.write_text("5")  # resets the high-water mark to the resident size
    except (OSError, AttributeError):
        return None
    before = _status_bytes("VmRSS")
    result = function()
    peak = _status_bytes("VmHWM")
    del result
    return max(0, peak - before)


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Measure the bytes per second, read plus written, of a copy between warm buffers of 64 MiB."""
    source = torch.zeros(2**24, device=device)
    target = torch.zeros_like(source)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * source.numel() * source.element_size() / sorted(times)[len(times) // 2]


def coco_anchors(device: torch.device) -> AnchorGrid:
    """Return the 201,600 anchors of torchvision's RetinaNet on a COCO batch."""
    return AnchorGrid.torchvision(COCO_GRIDS, COCO_SIZE, device=device)


def ground_truth(count: int, device: torch.device) -> Tensor:  # [count, 4]
    """Return boxes of COCO-like sizes, 8 to 400 pixels, within a COCO image."""
    side = torch.exp(torch.rand(count, 2) * 3.9 + 2.1)
    corner = torch.rand(count, 2) * (torch.tensor([COCO_SIZE[1], COCO_SIZE[0]]) - side).clamp(min=0)
    return torch.cat((corner, corner + side), dim=1).to(device)


def coco_heads(images: int, num_classes: int, device: torch.device, bias: float) -> tuple[list[Tensor], list[Tensor]]:
    """Return outputs of a RetinaNet's heads: `[N, 9 * K, H, W]` and `[N, 36, H, W]` for each level."""
    logits = [torch.randn(images, 9 * num_classes, h, w).mul_(1.2).add_(bias).to(device) for h, w in COCO_GRIDS]
    deltas = [torch.randn(images, 36, h, w).mul_(0.3).to(device) for h, w in COCO_GRIDS]
    return logits, deltas

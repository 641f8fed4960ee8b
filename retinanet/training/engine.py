"""The processes that train together: one by itself, or several that a launcher has started, through Accelerate.

Every process has a copy of the model and computes its share of each batch. Accelerate sets up the devices and their
connections, and sums the gradients over the processes (DistributedDataParallel).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from retinanet.common.devices import resolve_device
from retinanet.common.errors import RetinaNetError, UsageError
from retinanet.common.launch import launched_processes

Value = TypeVar("Value")

# The main process evaluates and saves while the others wait for it, which may take long. They wait in exchanges between
# the hosts, which notice a process that has ended at once, because its connections close.
_HOST_PATIENCE = timedelta(days=7)
# NCCL does not notice it: it ends the processes that wait in a sum over the devices for longer than this. All processes
# have met on the host just before such a sum, so none of them waits long otherwise.
_DEVICE_PATIENCE = timedelta(minutes=10)


class LostProcessError(RetinaNetError):
    """Another process of the run has ended, so this one cannot go on."""


class Engine:
    """A single process.

    Args:
        device: The device that it computes on.
    """

    #: Number of processes that train together.
    processes = 1
    #: Number of this process, from 0.
    rank = 0

    def __init__(self, device: torch.device) -> None:
        """Keep the device."""
        self.device = device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return a module that computes the same, and sums its gradients over the processes when it goes backward.

        The gradients are divided by the number of processes. The weights of the main process replace the others'.
        """
        return module

    def without_sum(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Return a context in which a wrapped module keeps its gradients to itself, to be summed later."""
        return nullcontext()

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes."""
        return values

    def exchange(self, values: list[int]) -> list[list[int]]:
        """Return the integers of every process, by process, without synchronising with the device."""
        return [values]

    def from_main(self, value: Value) -> Value:
        """Return the value that the main process has given; the others' arguments are ignored."""
        return value

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all processes, by process, to the main one, and an empty list to the others."""
        return [value]

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors on the device with those of the main process."""

    @contextmanager
    def noticing_losses(self) -> Iterator[None]:
        """Turn the errors of broken connections into LostProcessError."""
        yield


class AccelerateEngine(Engine):
    """One of several processes, which Accelerate connects.

    Args:
        device: A device type, `cpu` or `cuda`. On GPUs, each process of a machine takes another one.

    Raises:
        UsageError: Accelerate is missing, or the environment asks it for something that a run decides.
    """

    def __init__(self, device: str) -> None:
        """Connect to the other processes."""
        try:
            from accelerate import Accelerator
            from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
        except ModuleNotFoundError as error:
            raise UsageError(
                f"{launched_processes()} processes train together through Accelerate, which is not installed: "
                "run pip install 'retinanet-ops[distributed]'"
            ) from error
        _check_environment()
        self.accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision="no",  # the options of the run decide
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=_DEVICE_PATIENCE),
            ],
        )
        super().__init__(self.accelerator.device)
        self.processes, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.host_group: Any = dist.new_group(backend="gloo", timeout=_HOST_PATIENCE)

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return the module in DistributedDataParallel."""
        wrapped: nn.Module = self.accelerator.prepare_model(module)
        return wrapped

    def without_sum(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Return a context in which a wrapped module keeps its gradients to itself, to be summed later."""
        context: AbstractContextManager[Any] = self.accelerator.no_sync(module)
        return context

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes."""
        summed = values.clone()
        dist.all_reduce(summed)
        return summed

    def exchange(self, values: list[int]) -> list[list[int]]:
        """Return the integers of every process, by process, without synchronising with the device."""
        mine = torch.tensor(values, dtype=torch.int64)
        gathered = [torch.empty_like(mine) for _ in range(self.processes)]
        dist.all_gather(gathered, mine, group=self.host_group)
        return [row.tolist() for row in gathered]

    def from_main(self, value: Value) -> Value:
        """Return the value that the main process has given; the others' arguments are ignored."""
        values = [value if self.is_main else None]
        dist.broadcast_object_list(values, src=0, group=self.host_group)
        received: Value = values[0]  # type: ignore[assignment]
        return received

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all processes, by process, to the main one, and an empty list to the others."""
        values: list[Any] = [None] * self.processes if self.is_main else []
        dist.gather_object(value, values if self.is_main else None, dst=0, group=self.host_group)
        return values

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors on the device with those of the main process."""
        dist.barrier(group=self.host_group)  # the main process may have to save first
        for tensor in tensors:
            dist.broadcast(tensor, src=0)

    @contextmanager
    def noticing_losses(self) -> Iterator[None]:
        """Turn the errors of broken connections into LostProcessError."""
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            broken = isinstance(error, (dist.DistBackendError, dist.DistNetworkError)) or "gloo" in text
            if not broken and "Connection" not in text:
                raise
            raise LostProcessError(
                "another of the processes that train together has ended; its own message or the launcher's says why. "
                "Resume the run, which continues from its last save"
            ) from error


def start_engine(device: str) -> Engine:
    """Return the engine of this process: Accelerate's if a launcher has started several processes, else its own.

    Args:
        device: The name of a device; see `TrainOptions.device`.

    Raises:
        ValueError: This machine has no such device.
        UsageError: Several processes are to share one device of a GPU machine, or Accelerate cannot be used.
    """
    if launched_processes() == 1:
        return Engine(resolve_device(device))
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"device: expected auto, cpu or cuda for {launched_processes()} processes, each of which takes another "
            f"GPU; got {device!r}"
        )
    return AccelerateEngine(resolve_device(device).type)


def _check_environment() -> None:
    """Refuse what `accelerate launch` would decide instead of the options of the run, so that nothing is ignored."""
    for variable, neutral, remedy in (
        ("ACCELERATE_MIXED_PRECISION", ("", "no"), "give the option --precision of the run instead"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("", "1"), "give the option --accumulate of the run instead"),
        (
            "ACCELERATE_USE_DEEPSPEED",
            ("", "false"),
            "the processes hold whole copies of the model; leave DeepSpeed out",
        ),
        ("ACCELERATE_USE_FSDP", ("", "false"), "the processes hold whole copies of the model; leave FSDP out"),
    ):
        value = os.environ.get(variable, "")
        if value.lower() not in neutral:
            raise UsageError(f"{variable}={value}: {remedy}")

"""Accelerated models whose parameters are sharded by PyTorch's FSDP, in one process on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate_cases import assert_same_detections, assert_same_losses, pair, random_batch, small_model
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import retinanet_ops as ops
from retinanet_ops.integrations.torchvision import accelerate


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """Start a group of one process, and return its mesh."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_fully_shard_keeps_the_acceleration(mesh: DeviceMesh, monkeypatch) -> None:
    calls, assign_targets = [], ops.assign_targets
    monkeypatch.setattr(
        ops, "assign_targets", lambda *args, **options: calls.append(1) or assign_targets(*args, **options)
    )
    theirs, ours = pair(small_model())
    for part in (ours.backbone, ours.head.classification_head, ours.head, ours):
        fully_shard(part, mesh=mesh)
    assert_same_losses(theirs, ours, random_batch())
    assert_same_detections(theirs, ours, random_batch()[0])
    assert calls


def test_sharded_parameters_have_the_gradients_of_the_plain_model(mesh: DeviceMesh) -> None:
    theirs, ours = pair(small_model())
    fully_shard(ours.head, mesh=mesh)
    fully_shard(ours, mesh=mesh)
    batch = random_batch()
    for model in (theirs, ours):
        sum(model(*batch).values()).backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.grad is None:
            assert gradients[name].grad is None
            continue
        expected = gradients[name].grad
        difference = (parameter.grad.full_tensor() - expected).norm()
        assert difference <= 1e-4 * expected.norm() + 1e-9, name


@pytest.mark.parametrize("path", ("head", "backbone"))
def test_parts_wrapped_in_fsdp_are_called(mesh: DeviceMesh, path: str) -> None:
    theirs, ours = pair(small_model())
    setattr(
        ours, path, FullyShardedDataParallel(getattr(ours, path), device_id=torch.device("cpu"), use_orig_params=True)
    )
    assert isinstance(getattr(ours, path), nn.Module)
    assert_same_losses(theirs, ours, random_batch())
    assert_same_detections(theirs, ours, random_batch()[0])


def test_a_model_inside_fsdp_is_named(mesh: DeviceMesh) -> None:
    wrapped = FullyShardedDataParallel(small_model(), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(TypeError, match="got FullyShardedDataParallel, whose '_fsdp_wrapped_module' is one"):
        accelerate(wrapped)

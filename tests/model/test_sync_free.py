"""A training step and an inference on a batch never synchronise with the device, and are one graph each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from synthetic import random_boxes
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection import retinanet_resnet50_fpn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import retinanet_ops as ops
from retinanet.model.architectures import build_model
from retinanet.model.config import CompatConfig, RetinaNetConfig
from retinanet.model.fcos_config import FCOSConfig
from retinanet.model.network import RetinaNet
from retinanet.model.ssd_config import SSDConfig
from retinanet.model.targets import pad_targets

pytestmark = pytest.mark.backends("cpu", "cuda")
OPTIONS = (
    {"loss_normaliser": "per_image", "box_loss": "l1"},
    {"loss_normaliser": "batch", "box_loss": "giou", "label_smoothing": 0.1},
    {"loss_normaliser": "ema", "box_loss": "smooth_l1", "low_quality": "mmdet"},
    {
        "min_size": None,
        "box_loss": "ciou",
        "compat": CompatConfig(anchor_profile="detectron2", clip_after_nms=True, min_log_ratio=-4.0),
    },
)


#: Methods that copy values to the host without a dispatched operator that would show it.
TO_THE_HOST = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}


class NoCopyToTheHost(TorchFunctionMode):
    """Mode that raises where the values of a tensor are copied to Python or NumPy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in TO_THE_HOST:
            raise AssertionError(f"{func} synchronises with the device")
        return func(*args, **(kwargs or {}))


class NoOperatorThatSynchronises(TorchDispatchMode):
    """Mode that raises where the host needs a value or a shape that only the device knows."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        synchronises = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
        # A tensor made from Python numbers is copied to the device.
        synchronises |= func.overloadpacket is torch.ops.aten.lift_fresh
        # The shape of an indexed tensor depends on values only if an index is a mask.
        if func.overloadpacket in INDEXING:
            synchronises = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if synchronises:
            raise AssertionError(f"{func} synchronises with the device")
        return func(*args, **(kwargs or {}))


INDEXING = tuple(getattr(torch.ops.aten, name) for name in ("index", "index_put", "index_put_", "_index_put_impl_"))


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """Raise if anything inside the block synchronises with the device."""
    with NoCopyToTheHost(), NoOperatorThatSynchronises():
        yield


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(force=True),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.__setitem__(x > 0, x[:1]),
        lambda x: torch.index_put(x, (x > 0,), x[:1]),
        lambda x: x + x.new_tensor([1.0]),
    ],
)
def test_operations_that_synchronise_are_noticed(device: torch.device, operation: Callable[[Tensor], object]) -> None:
    x = torch.tensor([1.0, -1.0, 2.0], device=device)
    with pytest.raises(AssertionError, match="synchronises with the device"), no_synchronisation():
        operation(x)
    with no_synchronisation():
        x[x.argsort()] = torch.where(x > 0, x, 0).clone()
        x.masked_fill_(x > 1, 1)


def build(device: torch.device, **options: object) -> RetinaNet:
    torch.manual_seed(0)
    fields = {
        "backbone": "resnet18",
        "backbone_norm": "batch",
        "fpn_levels": (3, 4),
        "fpn_channels": 32,
        "head_depth": 1,
    }
    anchors = {"anchor_sizes": ((16.0, 24.0), (32.0, 48.0)), "aspect_ratios": (1.0,)}
    return RetinaNet(RetinaNetConfig(class_names=("a", "b"), score_threshold=0.005, **fields, **anchors, **options)).to(
        device
    )


def batch(device: torch.device) -> tuple[Tensor, ops.GroundTruth, ops.PaddedBoxes]:
    targets = [
        {"boxes": random_boxes(n, 60, 60), "labels": torch.zeros(n, dtype=torch.int64), "crowd_boxes": crowd}
        for n, crowd in ((5, random_boxes(1, 60, 60)), (0, torch.empty(0, 4)))
    ]
    truth, crowds = pad_targets(targets)
    assert crowds is not None
    return (
        torch.rand(2, 3, 64, 96, device=device),
        ops.GroundTruth(*(t.to(device) for t in truth)),
        ops.PaddedBoxes(*(t.to(device) for t in crowds)),
    )


class Step:
    """A training step on fixed tensors, as a CUDA graph needs it."""

    def __init__(self, device: torch.device, **options: object) -> None:
        self.model = build(device, **options)
        self.images, self.truth, self.crowd = batch(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=False)
        loss = torch.stack(list(self.model.losses(self.images, self.truth, self.crowd).values())).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
        self.optimizer.step()
        return loss.detach()


@pytest.mark.parametrize("options", OPTIONS)
def test_training_step_does_not_synchronise(device: torch.device, options: dict[str, object]) -> None:
    step = Step(device, **options)
    first = step()
    with no_synchronisation():
        second = step()
    assert second < first


@pytest.mark.parametrize("options", OPTIONS)
def test_inference_does_not_synchronise(device: torch.device, options: dict[str, object]) -> None:
    model = build(device, **options).eval()
    sizes = torch.tensor([[64, 96], [60, 90]], device=device)
    with torch.no_grad(), no_synchronisation():
        detections = model.detections(torch.rand(2, 3, 64, 96, device=device), sizes)
    assert (detections.count > 0).all()


def test_preprocessing_does_not_synchronise(device: torch.device) -> None:
    model = build(device, min_size=None)
    images = [torch.rand(3, 64, 96, device=device), torch.rand(3, 50, 60, device=device)]
    with no_synchronisation():
        prepared = model.prepare(images)
    theirs = GeneralizedRCNNTransform(64, 96, model.transform.image_mean, model.transform.image_std)
    torch.testing.assert_close(prepared.pixels[0], theirs.normalize(images[0]), rtol=0, atol=0)
    exact = images[0].double()
    torch.testing.assert_close(model.half().transform.normalize(exact), theirs.normalize(exact), rtol=1e-13, atol=1e-13)
    with pytest.raises(AssertionError, match="synchronises with the device"), no_synchronisation():
        theirs.normalize(images[0])


def test_torchvisions_model_synchronises() -> None:
    model = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2, min_size=64, max_size=64)
    images, targets = (
        [torch.rand(3, 64, 64)],
        [{"boxes": random_boxes(3, 40, 40), "labels": torch.ones(3).long()}],
    )
    with pytest.raises(AssertionError, match="synchronises with the device"), no_synchronisation():
        model(images, targets)
    with pytest.raises(AssertionError, match="synchronises with the device"), no_synchronisation():
        model.eval()(images)


@pytest.mark.parametrize(
    "config",
    [
        SSDConfig(class_names=("a", "b"), network="ssdlite320", cls_loss="mining"),
        SSDConfig(class_names=("a", "b"), network="ssdlite320", cls_loss="focal"),
        FCOSConfig(
            class_names=("a", "b"), backbone="resnet18", fpn_channels=32, score_threshold=0, class_weights=(1, 2)
        ),
    ],
)
def test_other_detectors_do_not_synchronise(device: torch.device, config: SSDConfig | FCOSConfig) -> None:
    torch.manual_seed(0)
    model = build_model(config).to(device)
    _, truth, crowds = batch(device)
    pixels, sizes = torch.rand(2, 3, 320, 320, device=device), torch.full((2, 2), 320, device=device)
    with no_synchronisation():
        losses = model.losses(pixels, truth, crowds)
        sum(losses.values()).backward()
        detections = model.eval().detections(pixels, sizes)
    assert (detections.count > 0).all()


@pytest.mark.parametrize("options", OPTIONS)
def test_training_and_inference_are_one_graph_each(device: torch.device, options: dict[str, object]) -> None:
    torch._dynamo.reset()
    model = build(device, **options)
    images, truth, crowd = batch(device)
    expected = model.losses(images, truth, crowd)
    again = build(device, **options)
    compiled = torch.compile(again.losses, fullgraph=True, backend="aot_eager")(images, truth, crowd)
    for name, value in compiled.items():
        torch.testing.assert_close(value, expected[name])
    sum(compiled.values()).backward()
    model.eval()
    sizes = torch.tensor([[64, 96], [60, 90]], device=device)
    with torch.no_grad():
        detections = torch.compile(model.detections, fullgraph=True, backend="aot_eager")(images, sizes)
        for got, want in zip(detections, model.detections(images, sizes), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.backends("cuda")
@pytest.mark.parametrize("options", OPTIONS)
class TestCudaGraphs:
    def test_training_step(self, device: torch.device, options: dict[str, object]) -> None:
        eager, captured = Step(device, **options), Step(device, **options)
        expected = [eager() for _ in range(5)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got = [captured().clone() for _ in range(3)]
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = captured()
        for _ in range(2):
            graph.replay()
            got.append(loss.clone())
        torch.testing.assert_close(torch.stack(got), torch.stack(expected), rtol=1e-3, atol=1e-4)

    def test_inference(self, device: torch.device, options: dict[str, object]) -> None:
        model = build(device, **options).eval()
        images, sizes = torch.rand(2, 3, 64, 96, device=device), torch.tensor([[64, 96], [60, 90]], device=device)
        with torch.no_grad():
            for _ in range(3):
                expected = model.detections(images, sizes)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                detections = model.detections(images, sizes)
            graph.replay()
        for got, want in zip(detections, expected, strict=True):
            torch.testing.assert_close(got, want)

    def test_no_synchronisation(self, device: torch.device, options: dict[str, object]) -> None:
        step = Step(device, **options)
        step()
        sizes = torch.tensor([[64, 96], [60, 90]], device=device)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step.model.prepare(list(step.images))
            step()
            with torch.no_grad():
                step.model.eval().detections(step.images, sizes)
        finally:
            torch.cuda.set_sync_debug_mode(before)

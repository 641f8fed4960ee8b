"""Gradients of `dense_box_loss` on levels of all shapes; `make fuzz` tries many more of them."""

import torch
from box_loss_cases import LAYOUTS
from cases import random_boxes
from hypothesis import given
from hypothesis import strategies as st
from properties import Cases, many_cases

import retinanet_ops as ops
from retinanet_ops import reference

RTOL = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@given(seed=st.integers(0, 2**63 - 1))
@many_cases
def test_gradient_equals_the_reference(device, seed):
    cases = Cases(seed)
    dtype, layout, images = cases.one_of(*RTOL), cases.one_of(*LAYOUTS), cases.integer(1, 3)
    # A tile of a CUDA block has 4,096 anchors: a part of a level, a whole level, or a part of a cell.
    shapes = [
        cases.one_of(
            (cases.integer(1, 9), cases.integer(0, 9), cases.integer(1, 9)),
            (cases.integer(1, 9), cases.integer(15, 30), cases.integer(15, 30)),
            (cases.integer(4000, 4200), 1, cases.integer(1, 3)),
        )
        for _ in range(cases.integer(1, 3))
    ]
    torch.manual_seed(seed % 2**32)
    levels = [(torch.randn(images, 4 * a, h, w) * 0.3).to(dtype).contiguous(memory_format=layout) for a, h, w in shapes]
    count = sum(a * h * w for a, h, w in shapes)
    anchors, gt_boxes = random_boxes(count, size=90.0), random_boxes(images, 5, size=90.0)
    matches = torch.randint(0, 5, (images, count), dtype=torch.int32)
    matches[torch.rand(images, count) > cases.one_of(0.01, 0.5, 1.0)] = cases.one_of(-1, -2)

    def gradients(function, levels, device):
        levels = [level.to(device).requires_grad_() for level in levels]
        compute = torch.float64 if levels[0].dtype == torch.float64 else torch.float32
        tensors = anchors.to(device, compute), gt_boxes.to(device, compute), matches.to(device)
        # Smooth L1 has a continuous gradient, so that rounding cannot change a sign.
        loss = function(levels, *tensors, kind="smooth_l1", beta=0.5)
        return torch.autograd.grad(loss, levels, torch.linspace(0.5, 1.5, images, dtype=loss.dtype, device=device))

    actual = gradients(ops.dense_box_loss, levels, device)
    expected = gradients(reference.dense_box_loss, [level.double() for level in levels], "cpu")
    for level, grad, wanted in zip(levels, actual, expected, strict=True):
        assert grad.dtype == dtype and grad.stride() == level.stride()
        # The gradient is a difference of an offset and its target, which may be several hundred for a small anchor.
        torch.testing.assert_close(grad.cpu().double(), wanted, rtol=RTOL[dtype], atol=RTOL[dtype])

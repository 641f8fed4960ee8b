import pytest
import torch
from cases import DEGENERATE_BOXES, FLOATING, random_boxes, unaligned
from torch.library import opcheck

import retinanet_ops as ops
from retinanet_ops import reference


class TestForward:
    @pytest.mark.parametrize("dtype", FLOATING)
    def test_equals_reference(self, device, dtype):
        a, b = random_boxes(37).to(device, dtype), random_boxes(130).to(device, dtype)
        iou = ops.box_iou(a, b)
        assert iou.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(iou, reference.box_iou(a, b))
        torch.testing.assert_close(iou.double(), reference.box_iou(a.double(), b.double()), rtol=1e-5, atol=1e-6)
        assert (iou > 0).any() and (iou == 0).any()

    @pytest.mark.parametrize(("m", "n"), ((0, 5), (5, 0), (1, 1), (31, 127), (32, 128), (33, 129), (65, 257)))
    def test_sizes(self, device, m, n):
        a, b = random_boxes(m).to(device), random_boxes(n).to(device)
        assert torch.equal(ops.box_iou(a, b), reference.box_iou(a, b))

    def test_blocks_that_take_several_tiles(self, device):
        rows = torch.arange(2 * 32 * 1024 + 5, dtype=torch.float32, device=device)[:, None]
        boxes1 = torch.cat((rows, rows, rows + 3, rows + 3), dim=1)
        boxes2 = boxes1[[7, 32 * 1024 + 7, len(rows) - 1]]
        assert torch.equal(ops.box_iou(boxes1, boxes2), reference.box_iou(boxes1, boxes2))

    @pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
    def test_bits_equal_torchvision(self, device, dtype):
        torchvision = pytest.importorskip("torchvision")
        a, b = random_boxes(200).to(device, dtype), random_boxes(300).to(device, dtype)
        assert torch.equal(ops.box_iou(a, b), torchvision.ops.box_iou(a, b))

    def test_published_value(self, device):
        iou = ops.box_iou(
            torch.tensor([[0.0, 0, 32, 32]], device=device), torch.tensor([[8.0, 4, 40, 52]], device=device)
        )
        torch.testing.assert_close(iou.cpu(), torch.tensor([[0.35593220]]))


class TestGradient:
    def test_gradcheck(self, device):
        a = random_boxes(4).to(device, torch.float64).requires_grad_()
        b = random_boxes(5).to(device, torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(ops.box_iou, (a, b))
        assert torch.autograd.gradgradcheck(ops.box_iou, (a, b))


class TestEdgeCases:
    def test_degenerate_pairs_are_zero(self, device):
        valid, degenerate = random_boxes(20).to(device), DEGENERATE_BOXES.to(device)
        assert (ops.box_iou(degenerate, valid) == 0).all() and (ops.box_iou(valid, degenerate) == 0).all()
        assert (ops.box_iou(degenerate, degenerate) == 0).all()
        assert torch.equal(ops.box_iou(degenerate, valid), reference.box_iou(degenerate, valid))

    def test_degenerate_pairs_have_finite_gradients(self, device):
        a, b = DEGENERATE_BOXES[:4].to(device).requires_grad_(), random_boxes(20).to(device).requires_grad_()
        for grad in torch.autograd.grad(ops.box_iou(a, b).sum(), (a, b)):
            assert grad.isfinite().all()

    def test_negative_coordinates_and_identical_boxes(self, device):
        a = random_boxes(30).to(device) - 200
        assert (ops.box_iou(a, a).diagonal() == 1).all()

    def test_unaligned(self, device):
        a, b = random_boxes(9).to(device), random_boxes(7).to(device)
        assert torch.equal(ops.box_iou(unaligned(a), b[:, [0, 1, 2, 3]].t().contiguous().t()), ops.box_iou(a, b))


class TestErrors:
    def test_messages(self):
        with pytest.raises(ValueError, match=r"box_iou: boxes2 must have shape \[N, 4\], got \[2, 3, 4\]"):
            ops.box_iou(torch.zeros(2, 4), torch.zeros(2, 3, 4))
        with pytest.raises(TypeError, match="box_iou: boxes1 must be float16.* got torch.int64"):
            ops.box_iou(torch.zeros(2, 4).long(), torch.zeros(2, 4))


class TestCompile:
    def test_opcheck_and_one_graph(self, device):
        a, b = random_boxes(4).to(device).requires_grad_(), random_boxes(6).to(device)
        opcheck(torch.ops.retinanet_ops.box_iou, (a, b))

        def function(a):
            return (ops.box_iou(a + 1, b) * 2).sum()

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
        torch.testing.assert_close(torch.autograd.grad(compiled(a), a), torch.autograd.grad(function(a), a))

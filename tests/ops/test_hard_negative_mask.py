"""`hard_negative_mask` against the reference and torchvision's SSD."""

import math

import pytest
import torch
from cases import FLOATING, SIZES, unaligned
from torch.library import opcheck

import retinanet_ops as ops
from retinanet_ops import reference


def anchors(*shape):
    """Return losses with ties, and labels: about three in four are background, the others ignored or 0 to 2."""
    labels = torch.where(torch.rand(shape) < 0.8, -1, torch.randint(-1, 3, shape))
    return torch.randint(0, 30, shape) / 30, torch.where(torch.rand(shape) < 0.1, -2, labels)


class TestForward:
    @pytest.mark.parametrize("n", SIZES)
    @pytest.mark.parametrize("ratio", (0.0, 0.5, 3.0))
    def test_sizes(self, device, n, ratio):
        loss, labels = anchors(3, n)
        mask = ops.hard_negative_mask(loss.to(device), labels.to(device), ratio=ratio)
        assert mask.dtype == torch.bool
        assert torch.equal(mask.cpu(), reference.hard_negative_mask(loss, labels, ratio=ratio))

    @pytest.mark.parametrize("dtype", FLOATING)
    @pytest.mark.parametrize("label_dtype", (torch.int32, torch.int64))
    def test_dtypes(self, device, dtype, label_dtype):
        loss, labels = torch.randn(2, 500).to(dtype), anchors(2, 500)[1].to(label_dtype)
        mask = ops.hard_negative_mask(loss.to(device), labels.to(device))
        assert torch.equal(mask.cpu(), reference.hard_negative_mask(loss, labels))

    @pytest.mark.parametrize("bound", (2.0**-20, 2.0**12))
    @pytest.mark.parametrize("ratio", (0.02, 1.0, 5.0))
    def test_losses_around_the_bounds_of_the_bins(self, device, bound, ratio):
        # The CUDA kernels count losses in bins from 2^-20 to 2^12. The outermost bins also hold all losses beyond.
        loss = bound * (1 + torch.randint(-64, 64, (2, 2000)) / 512)
        loss[:, ::50] *= 8
        labels = anchors(2, 2000)[1]
        mask = ops.hard_negative_mask(loss.to(device), labels.to(device), ratio=ratio)
        assert torch.equal(mask.cpu(), reference.hard_negative_mask(loss, labels, ratio=ratio))

    def test_two_positives_take_six_negatives(self, device):
        loss = torch.arange(20.0, device=device)[None]
        labels = torch.full((1, 20), -1, device=device)
        labels[0, 18:] = 1
        labels[0, 17] = -2
        assert ops.hard_negative_mask(loss, labels)[0].nonzero()[:, 0].tolist() == [11, 12, 13, 14, 15, 16]

    def test_equals_torchvisions_mining(self, device):
        """Compare with the two sorts of torchvision's SSD.compute_loss, on losses without ties."""
        loss = torch.randperm(4000).view(2, 2000).float()
        labels = torch.randint(0, 40, (2, 2000)).sub(39)  # label 0 is positive, all others become background
        labels = torch.where(labels == 0, 0, -1)
        negative_loss = torch.where(labels >= 0, -math.inf, loss)
        rank = negative_loss.argsort(1, descending=True).argsort(1)
        expected = rank < 3 * (labels >= 0).sum(1, keepdim=True)
        assert torch.equal(ops.hard_negative_mask(loss.to(device), labels.to(device)).cpu(), expected)


class TestEdgeCases:
    def test_background_images(self, device):
        loss, labels = torch.rand(2, 50, device=device), torch.full((2, 50), -1, device=device)
        assert not ops.hard_negative_mask(loss, labels).any()
        assert not ops.hard_negative_mask(loss * math.nan, labels).any()
        assert ops.hard_negative_mask(loss, labels, min_negatives=7).sum(1).tolist() == [7, 7]

    def test_labels_beyond_int32(self, device):
        labels = torch.tensor([[2**32 - 1, -1, -1, 2**31, -(2**40)]], device=device)
        mask = ops.hard_negative_mask(torch.arange(5.0, device=device)[None], labels, ratio=0.5)
        assert mask.tolist() == [[False, False, True, False, False]]

    def test_no_more_negatives_than_background_anchors(self, device):
        labels = torch.tensor([[0, 0, -1, -2, -1]], device=device)
        for options in ({}, {"min_negatives": 2**40}, {"ratio": 1e300}):
            mask = ops.hard_negative_mask(torch.zeros(1, 5, device=device), labels, **options)
            assert mask.tolist() == [[False, False, True, False, True]]

    def test_nan_ranks_first_and_ties_go_to_the_lower_anchor(self, device):
        loss = torch.tensor([[5.0, 1, 1, math.nan, 1, 0, -math.nan]], device=device)
        labels = torch.tensor([[3, -1, -1, -1, -1, -1, -1]], device=device)
        for count, expected in ((2, [3, 6]), (3, [1, 3, 6]), (4, [1, 2, 3, 6])):
            mask = ops.hard_negative_mask(loss, labels, ratio=0, min_negatives=count)
            assert mask[0].nonzero()[:, 0].tolist() == expected

    def test_strided_and_unaligned(self, device):
        loss, labels = (t.to(device) for t in anchors(3, 101))
        expected = ops.hard_negative_mask(loss, labels)
        assert torch.equal(ops.hard_negative_mask(unaligned(loss), unaligned(labels)), expected)
        wide = torch.stack((loss, loss), dim=-1)[..., 0]
        assert torch.equal(ops.hard_negative_mask(wide, labels.t().contiguous().t()), expected)


class TestTiles:
    """Images of several tiles, which the CUDA kernels cut into at most 16 tiles of whole packs of four anchors."""

    @pytest.mark.parametrize(
        ("images", "n"),
        [(i, n) for i in (1, 3) for n in (4092, 4093, 4096, 4097, 8190, 12_289, 65_541, 70_001)]
        + [pytest.param(150, 4093, marks=pytest.mark.once)],
    )
    def test_sizes(self, device, images, n):
        loss, labels = anchors(images, n)
        loss = loss + torch.rand(images, n).mul(3).floor() / 1000
        for options in ({"ratio": 0.5}, {"ratio": 0, "min_negatives": 7}):
            mask = ops.hard_negative_mask(loss.to(device), labels.to(device), **options)
            assert torch.equal(mask.cpu(), reference.hard_negative_mask(loss, labels, **options))

    @pytest.mark.parametrize(
        "value", (0.0, -3.0, 1e-42, 2.0**-20, 0.7, 2.0**12 * (1 - 2.0**-8), 1e30, math.inf, math.nan)
    )
    def test_equal_losses(self, device, value):
        loss, labels = torch.full((2, 9001), value), torch.full((2, 9001), -1)
        labels[1, 0::3] = -2
        for count in (1, 1024, 4097, 6000, 9001):
            mask = ops.hard_negative_mask(loss.to(device), labels.to(device), ratio=0, min_negatives=count)
            assert torch.equal(mask.cpu(), reference.hard_negative_mask(loss, labels, ratio=0, min_negatives=count))

    @pytest.mark.parametrize("edge", (2.0**-20, 2.0**-20 * (1 + 2.0**-6), 1.0, 2.0**12 * (1 - 2.0**-7), 2.0**12))
    def test_losses_around_the_edge_of_a_bin(self, device, edge):
        below = torch.tensor(edge).nextafter(torch.tensor(0.0))
        loss = torch.where(torch.rand(2, 5000) < 0.5, below, edge)
        labels = torch.full((2, 5000), -1)
        above = int((loss[0] == edge).sum())
        for count in (above - 1, above, above + 1):
            mask = ops.hard_negative_mask(loss.to(device), labels.to(device), ratio=0, min_negatives=count)
            assert torch.equal(mask.cpu(), reference.hard_negative_mask(loss, labels, ratio=0, min_negatives=count))


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"loss": torch.zeros(3)}, ValueError, r"hard_negative_mask: loss must have shape \[N, A\], got \[3\]"),
            (
                {"loss": torch.zeros(1, 3).int()},
                TypeError,
                "hard_negative_mask: loss must be float16.* got torch.int32",
            ),
            ({"labels": torch.zeros(1, 3)}, TypeError, "hard_negative_mask: labels must be an integer tensor"),
            ({"labels": torch.zeros(1, 2).int()}, ValueError, r"labels must have shape \[1, 3\], got \[1, 2\]"),
            ({"ratio": -1.0}, ValueError, "hard_negative_mask: ratio must be finite and not negative, got -1.0"),
            ({"ratio": math.inf}, ValueError, "hard_negative_mask: ratio must be finite and not negative, got inf"),
            ({"labels": torch.zeros(1, 3, device="meta").int()}, ValueError, "labels must be on loss's device cpu"),
            ({"ratio": "3"}, TypeError, "hard_negative_mask: ratio must be a number, got '3'"),
            ({"min_negatives": 2.5}, TypeError, "hard_negative_mask: min_negatives must be an integer, got 2.5"),
            ({"min_negatives": -1}, ValueError, "hard_negative_mask: min_negatives must not be negative, got -1"),
        ],
    )
    def test_message_names_the_argument(self, change, error, message):
        arguments = {"loss": torch.zeros(1, 3), "labels": torch.zeros(1, 3).int()} | change
        with pytest.raises(error, match=message):
            ops.hard_negative_mask(**arguments)

    def test_direct_call_of_the_op(self, device):
        loss, labels = torch.zeros(1, 3, device=device), torch.zeros(1, 3, device=device, dtype=torch.int32)
        op = torch.ops.retinanet_ops.hard_negative_mask
        for arguments, message in (
            ((loss[0], labels, 3.0, 0), "loss must have shape"),
            ((loss.double(), labels, 3.0, 0), "loss must be Float"),
            ((loss, labels[:, :2], 3.0, 0), "labels must have shape"),
            ((loss, labels.long(), 3.0, 0), "labels must be Int"),
            ((loss, labels, -1.0, 0), "ratio must be finite and not negative"),
            ((loss, labels, math.inf, 0), "ratio must be finite and not negative"),
            ((loss, labels, 3.0, -1), "min_negatives must not be negative"),
        ):
            with pytest.raises(RuntimeError, match=message):
                op(*arguments)


class TestCompile:
    def test_opcheck_and_one_graph(self, device):
        loss, labels = (t.to(device) for t in anchors(2, 60))
        opcheck(torch.ops.retinanet_ops.hard_negative_mask, (loss, labels.int(), 3.0, 0))
        compiled = torch.compile(ops.hard_negative_mask, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(loss, labels, ratio=2.0), ops.hard_negative_mask(loss, labels, ratio=2.0))

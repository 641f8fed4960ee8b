"""Detection from the outputs of the heads."""

import math
import warnings

import pytest
import torch
from cases import FLOATING
from detect_cases import GRID_SIZES, IMAGE_SIZES, assert_same, grid_anchors, heads
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import retinanet_ops as ops
from retinanet_ops import AnchorGrid, reference


class TestForward:
    @pytest.mark.parametrize("dtype", FLOATING)
    @pytest.mark.parametrize("topk", (7, 100, 100_000))
    def test_equals_reference(self, device, dtype, topk):
        logits, deltas = heads(device, dtype)
        sizes = IMAGE_SIZES.to(device)
        detections = ops.detect(logits, deltas, grid_anchors(device), sizes, topk_per_level=topk)
        assert detections.boxes.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert detections.scores.dtype == torch.float32 and (detections.count > 5).all()
        assert_same(detections, reference.detect(logits, deltas, grid_anchors(device), sizes, topk_per_level=topk))

    @pytest.mark.parametrize("class_agnostic", (False, True))
    @pytest.mark.parametrize("max_per_class", (None, 1, 3))
    @pytest.mark.parametrize("max_detections", (0, 1, 10, 300))
    def test_options(self, device, class_agnostic, max_per_class, max_detections):
        logits, deltas = heads(device)
        options = {
            "class_agnostic": class_agnostic,
            "max_per_class": max_per_class,
            "max_detections": max_detections,
            "score_threshold": 0.2,
            "iou_threshold": 0.3,
            "coder_weights": (10.0, 10.0, 5.0, 5.0),
            "offset": 1.0,
            "max_log_ratio": 0.01,
            "min_log_ratio": -0.02,
        }
        sizes = IMAGE_SIZES.to(device)
        detections = ops.detect(logits, deltas, grid_anchors(device), sizes, **options)
        assert_same(detections, reference.detect(logits, deltas, grid_anchors(device), sizes, **options))
        if max_per_class and max_detections:
            for labels in detections.labels:
                assert labels[labels >= 0].bincount().max() <= max_per_class

    @pytest.mark.parametrize("num_classes", (1, 3, 80))
    def test_layouts_do_not_change_bits(self, device, num_classes):
        logits, deltas = heads(device, num_classes=num_classes)
        sizes = IMAGE_SIZES.to(device)
        expected = ops.detect(logits, deltas, grid_anchors(device), sizes)
        layouts = [[t.contiguous(memory_format=torch.channels_last) for t in level] for level in (logits, deltas)]
        strided = [[torch.stack((t, t), dim=-1)[..., 0] for t in level] for level in (logits, deltas)]
        for other in (layouts, strided):
            for a, b in zip(ops.detect(*other, grid_anchors(device), sizes), expected, strict=True):
                assert torch.equal(a, b)
        for anchors in (grid_anchors(device).boxes(), grid_anchors(device).boxes().expand(2, -1, 4)):
            for a, b in zip(ops.detect(logits, deltas, anchors, sizes), expected, strict=True):
                assert torch.equal(a, b)

    def test_many_candidates_over_several_tiles(self, device):
        # Each level has several tiles. Most logits pass, more than the buffer of a block holds.
        grid_sizes = ((40, 50), (20, 25))
        grid = AnchorGrid.torchvision(grid_sizes, (320, 400), sizes=((16, 20), (32, 40)), device=device)
        logits, deltas = heads(device, num_classes=7, grid_sizes=grid_sizes, spread=6.0)
        for topk in (50, 1000, 3000):
            sizes = torch.tensor([[320, 400], [300, 300]], device=device)
            detections = ops.detect(logits, deltas, grid, sizes, topk_per_level=topk)
            assert_same(detections, reference.detect(logits, deltas, grid, sizes, topk_per_level=topk))
            assert detections.truncated.all()

    @pytest.mark.parametrize("slope", (1, 0, -1))
    @pytest.mark.parametrize("topk", (1, 1000, 2048, 2049, 3000, 3001, 5000))
    @pytest.mark.parametrize("size", ((25, 41), (1, 3001), (33, 331), (64, 64)))
    def test_candidates_in_order(self, device, size, topk, slope):
        # The sizes include whole buffers, one logit more than whole tiles and than `topk`, and images that start at odd
        # addresses. The best logits come last, anywhere, or first.
        elements = size[0] * size[1]
        rank = torch.arange(elements).float() * slope / elements
        logits = [torch.stack((rank, rank - 0.5)).reshape(2, 1, *size).to(device)]
        keys, truncated = torch.ops.retinanet_ops.select_candidates(logits, 1, 0.0, topk)
        kept = min(topk, elements)
        first = torch.arange(kept) if slope <= 0 else elements - 1 - torch.arange(kept)
        assert torch.equal((~keys.cpu()) & 0xFFFFFFFF, first.expand(2, -1))
        assert truncated.tolist() == [[topk < elements]] * 2

    @pytest.mark.parametrize("seed", range(5))
    def test_equals_torchvision_post_processing(self, device, seed):
        """Compare every detection with the post-processing of torchvision's RetinaNet."""
        pytest.importorskip("torchvision")
        torch.manual_seed(seed)
        from torchvision.models.detection._utils import BoxCoder
        from torchvision.models.detection.retinanet import RetinaNet

        logits, deltas = heads(device)
        anchors = grid_anchors(device)

        class Postprocess:
            box_coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
            score_thresh, topk_candidates, nms_thresh, detections_per_img = 0.05, 40, 0.5, 30

        def rows(levels, size):
            return [t.view(2, -1, size, *t.shape[2:]).permute(0, 3, 4, 1, 2).reshape(2, -1, size) for t in levels]

        outputs = {"cls_logits": rows(logits, 5), "bbox_regression": rows(deltas, 4)}
        split = list(anchors.boxes().split([h * w * 6 for h, w in GRID_SIZES]))
        expected = RetinaNet.postprocess_detections(Postprocess(), outputs, [split, split], [(96, 128), (80, 100)])
        detections = ops.detect(logits, deltas, anchors, IMAGE_SIZES.to(device), topk_per_level=40, max_detections=30)
        for n, image in enumerate(expected):
            count = int(detections.count[n])
            assert count == len(image["boxes"])
            assert torch.equal(detections.labels[n, :count], image["labels"])
            torch.testing.assert_close(detections.scores[n, :count], image["scores"])
            torch.testing.assert_close(detections.boxes[n, :count], image["boxes"], rtol=0, atol=1e-3)


class TestEdgeCases:
    def test_ties_go_to_the_lower_anchor_then_the_lower_class(self, device):
        logits = [torch.full((1, 6 * 3, h, w), 1.0, device=device) for h, w in GRID_SIZES]
        deltas = [torch.zeros(1, 6 * 4, h, w, device=device) for h, w in GRID_SIZES]
        detections = ops.detect(
            logits, deltas, grid_anchors(device), IMAGE_SIZES[:1].to(device), topk_per_level=4, iou_threshold=1.0
        )
        first = [sum(h * w * 6 for h, w in GRID_SIZES[:level]) for level in range(3)]
        expected = [(anchor + i // 3, i % 3) for anchor in first for i in range(4)]
        count = int(detections.count)
        assert (
            list(
                zip(
                    detections.anchor_index[0, :count].tolist(),
                    detections.labels[0, :count].tolist(),
                    strict=True,
                )
            )
            == expected
        )

    def test_different_logits_with_equal_scores_are_ranked_by_the_logit(self, device):
        logits = [torch.tensor([20.0, 21.0], device=device).view(1, 1, 1, 2)]
        anchors = torch.tensor([[0.0, 0, 8, 8], [20, 0, 28, 8]], device=device)
        sizes = torch.tensor([[32, 32]], device=device)
        detections = ops.detect(logits, [torch.zeros(1, 4, 1, 2, device=device)], anchors, sizes, max_detections=2)
        assert detections.scores.tolist() == [[1, 1]] and detections.anchor_index.tolist() == [[1, 0]]

    def test_zeros_of_both_signs_tie(self, device):
        logits = [torch.tensor([-0.0, 0.0], device=device).view(1, 1, 1, 2)]
        anchors = torch.tensor([[0.0, 0, 8, 8], [20, 0, 28, 8]], device=device)
        sizes = torch.tensor([[32, 32]], device=device)
        detections = ops.detect(logits, [torch.zeros(1, 4, 1, 2, device=device)], anchors, sizes, max_detections=2)
        assert detections.anchor_index.tolist() == [[0, 1]]

    def test_nothing_passes(self, device):
        logits, deltas = heads(device)
        logits = [level - 1000 for level in logits]
        detections = ops.detect(logits, deltas, grid_anchors(device), IMAGE_SIZES.to(device), max_detections=7)
        assert (detections.count == 0).all() and not detections.truncated.any()
        assert (detections.boxes == 0).all() and (detections.scores == 0).all()
        assert (detections.labels == -1).all() and (detections.anchor_index == -1).all()

    def test_empty_levels_and_no_images(self, device):
        grid = AnchorGrid.detectron2([(0, 4), (2, 2)], strides=[8, 16], sizes=[(32.0,), (64.0,)], device=device)
        logits = [torch.ones(1, 3 * 2, 0, 4, device=device), torch.ones(1, 3 * 2, 2, 2, device=device)]
        deltas = [torch.ones(1, 12, 0, 4, device=device), torch.ones(1, 12, 2, 2, device=device)]
        sizes = torch.tensor([[32, 32]], device=device)
        assert_same(ops.detect(logits, deltas, grid, sizes), reference.detect(logits, deltas, grid, sizes))
        none = ops.detect([t[:0] for t in logits], [t[:0] for t in deltas], grid, sizes[:0])
        assert none.boxes.shape == (0, 100, 4) and none.count.shape == (0,)
        everything_empty = ops.detect(
            logits[:1], deltas[:1], AnchorGrid.detectron2([(0, 4)], [8], [(32.0,)], device=device), sizes
        )
        assert everything_empty.count.tolist() == [0]

    def test_nan_deltas_do_not_affect_other_candidates(self, device):
        logits, deltas = heads(device, images=1)
        sizes = IMAGE_SIZES[:1].to(device)
        clean = ops.detect(logits, deltas, grid_anchors(device), sizes, max_detections=2000)
        victim = int(clean.anchor_index[0, 0])
        logits[0].view(1, 6, 5, -1)[0, victim % 6, :, victim // 6] = -1000.0
        without = ops.detect(logits, deltas, grid_anchors(device), sizes, max_detections=2000)
        logits[0].view(1, 6, 5, -1)[0, victim % 6, :, victim // 6] = 50.0
        deltas[0].view(1, 6, 4, -1)[0, victim % 6, :, victim // 6] = math.nan
        poisoned = ops.detect(logits, deltas, grid_anchors(device), sizes, max_detections=2000)
        keep = poisoned.anchor_index[0] != victim
        assert not keep[:5].any() and keep[5:].all()
        assert torch.equal(poisoned.boxes[0, 5:50], without.boxes[0, :45])

    def test_image_sizes_clip_each_image(self, device):
        logits, deltas = heads(device)
        detections = ops.detect(logits, [d + 1 for d in deltas], grid_anchors(device), IMAGE_SIZES.to(device))
        for n in range(2):
            height, width = IMAGE_SIZES[n].tolist()
            boxes = detections.boxes[n, : detections.count[n]]
            assert boxes.min() >= 0 and boxes[:, 2].max() == width and boxes[:, 3].max() == height

    def test_truncated_reports_each_limit(self, device):
        logits, deltas = heads(device, images=1)
        sizes, anchors = IMAGE_SIZES[:1].to(device), grid_anchors(device)
        free = ops.detect(logits, deltas, anchors, sizes, topk_per_level=10**6, max_detections=10**4)
        count = int(free.count)
        assert not free.truncated
        exact = ops.detect(logits, deltas, anchors, sizes, topk_per_level=10**6, max_detections=count)
        assert int(exact.count) == count and not exact.truncated
        assert ops.detect(logits, deltas, anchors, sizes, topk_per_level=10**6, max_detections=count - 1).truncated
        assert ops.detect(logits, deltas, anchors, sizes, topk_per_level=20, max_detections=10**4).truncated
        assert ops.detect(
            logits, deltas, anchors, sizes, topk_per_level=10**6, max_detections=10**4, max_per_class=3
        ).truncated

    def test_independent_of_threads(self, device):
        logits, deltas = heads(device, num_classes=80, spread=4.0)
        threads, results = torch.get_num_threads(), []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(ops.detect(logits, deltas, grid_anchors(device), IMAGE_SIZES.to(device)))
        torch.set_num_threads(threads)
        for a, b, c in zip(*results, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)


class TestCompile:
    def test_opcheck(self, device):
        logits, deltas = heads(device)
        opcheck(torch.ops.retinanet_ops.select_candidates, (logits, 5, 0.05, 10))
        keys, _ = torch.ops.retinanet_ops.select_candidates(logits, 5, 0.05, 10)
        assert torch.equal(keys, keys.sort(descending=True).values)
        sizes = IMAGE_SIZES.to(device).float()
        weights = [1.0, 1.0, 1.0, 1.0]
        opcheck(
            torch.ops.retinanet_ops.decode_candidates,
            (
                keys.t().contiguous().t(),  # a layout that the results must not inherit
                deltas,
                *grid_anchors(device).arguments(),
                sizes,
                5,
                weights,
                -4.0,
                4.0,
                0.0,
            ),
        )

    @pytest.mark.parametrize("explicit", (False, True))
    def test_opcheck_of_the_whole(self, device, explicit):
        grid = grid_anchors(device)
        anchors = (grid.boxes().double(), [], []) if explicit else grid.arguments()
        options = (0.05, 100, 0.5, 10, 3, False, [1.0] * 4, None, 4.0, 0.0, True)
        for dtype in (torch.bfloat16, torch.float64):
            heads_and_anchors = (*heads(device, dtype), *anchors, IMAGE_SIZES.to(device))
            opcheck(torch.ops.retinanet_ops.detect, (*heads_and_anchors, *options))

    def test_is_one_call(self, device):
        class Calls(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                called.append(str(function))
                return function(*args, **(kwargs or {}))

        called, (logits, deltas) = [], heads(device)
        with Calls():
            ops.detect(logits, deltas, grid_anchors(device), IMAGE_SIZES.to(device))
            ops.detect(logits, deltas, grid_anchors(device).boxes().double(), IMAGE_SIZES.to(device))
        assert called.count("retinanet_ops.detect.default") == 2
        assert [name for name in called if name.startswith("retinanet_ops")] == ["retinanet_ops.detect.default"] * 2

    def test_compiles_in_one_graph(self, device):
        logits, deltas = heads(device)
        anchors, sizes = grid_anchors(device), IMAGE_SIZES.to(device)

        def function(logits, deltas):
            return ops.detect([level + 1 for level in logits], deltas, anchors, sizes, topk_per_level=50)

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for a, b in zip(compiled(logits, deltas), function(logits, deltas), strict=True):
            assert torch.equal(a, b)

    def test_exports(self, device):
        anchors, sizes = grid_anchors(device), IMAGE_SIZES.to(device)

        class Module(torch.nn.Module):
            def forward(self, logits, deltas):
                detections = ops.detect(logits, deltas, anchors, sizes, topk_per_level=50)
                return *detections, ops.gather_class_scores(logits, detections.anchor_index, 5)

        exported = torch.export.export(Module(), heads(device)).module()
        arguments = heads(device)
        assert all(torch.equal(a, b) for a, b in zip(exported(*arguments), Module()(*arguments), strict=True))

    def test_heads_that_require_gradients(self, device):
        logits, deltas = heads(device)
        detections = ops.detect(
            [t.requires_grad_() for t in logits],
            [t.requires_grad_() for t in deltas],
            grid_anchors(device),
            IMAGE_SIZES.to(device),
        )
        assert not detections.boxes.requires_grad and not detections.scores.requires_grad


class TestTransforms:
    def test_detections_are_constants(self, device):
        logits, deltas = heads(device)
        anchors, sizes = grid_anchors(device), IMAGE_SIZES.to(device)

        def scores(level):
            return ops.detect([level, *logits[1:]], deltas, anchors, sizes).scores.sum()

        assert torch.func.jvp(scores, (logits[0],), (torch.ones_like(logits[0]),))[1] == 0
        assert not torch.func.grad(scores)(logits[0]).any()

    def test_lists_of_tensors_have_no_vmap(self, device):
        logits, _ = heads(device)
        index = torch.zeros(2, 1, 3, dtype=torch.int64, device=device)
        with warnings.catch_warnings(), pytest.raises(RuntimeError, match="Batching rule not implemented"):
            warnings.simplefilter("ignore")
            torch.vmap(lambda x, i: ops.gather_class_scores([x], i, 5))(logits[0][:, None], index)

import itertools
import math

import pytest
import torch

from retinanet_ops import AnchorGrid, torchvision_base_anchors

GRID_SIZES = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))


def cell(x1, y1, x2, y2):
    return torch.tensor([x1, y1, x2, y2])


class TestTorchvision:
    def test_equals_its_generator(self):
        pytest.importorskip("torchvision")
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        from torchvision.models.detection.image_list import ImageList

        sizes = tuple((s, int(s * 2 ** (1 / 3)), int(s * 2 ** (2 / 3))) for s in (32, 64, 128, 256, 512))
        generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
        for height, width, grid_sizes in (
            (800, 1344, GRID_SIZES),
            (96, 160, ((12, 20), (6, 10), (3, 5), (2, 3), (1, 2))),
        ):
            maps = [torch.zeros(1, 1, *size) for size in grid_sizes]
            expected = generator(ImageList(torch.zeros(1, 3, height, width), [(height, width)]), maps)[0]
            assert torch.equal(AnchorGrid.torchvision(grid_sizes, (height, width)).boxes(), expected)

    def test_published_base_anchors(self):
        expected = [
            [-23, -11, 23, 11], [-28, -14, 28, 14], [-35, -18, 35, 18],
            [-16, -16, 16, 16], [-20, -20, 20, 20], [-25, -25, 25, 25],
            [-11, -23, 11, 23], [-14, -28, 14, 28], [-18, -35, 18, 35],
        ]  # fmt: skip
        assert torchvision_base_anchors((32, 40, 50), (0.5, 1.0, 2.0)).tolist() == expected

    def test_derives_strides_from_the_image(self):
        # 800 x 1344 does not divide by 64 or 128: torchvision's strides are not powers of two there.
        grid = AnchorGrid.torchvision(GRID_SIZES, (800, 1344))
        assert grid.strides == ((8, 8), (16, 16), (32, 32), (61, 64), (114, 122))
        assert grid.num_anchors == 201_600 == len(grid.boxes())


class TestOtherLayouts:
    def test_detectron2(self):
        grid = AnchorGrid.detectron2(GRID_SIZES)
        boxes = grid.boxes()
        # Size-major: the second row of a cell is the next ratio.
        torch.testing.assert_close(boxes[0], cell(-22.627417, -11.3137085, 22.627417, 11.3137085))
        torch.testing.assert_close(boxes[1], cell(-16.0, -16.0, 16.0, 16.0))
        torch.testing.assert_close(boxes[9] - boxes[0], cell(8.0, 0.0, 8.0, 0.0))
        assert grid.strides[-1] == (128, 128)

    def test_mmdet_is_detectron2_in_another_order(self):
        mmdet, detectron2 = AnchorGrid.mmdet(GRID_SIZES).boxes(), AnchorGrid.detectron2(GRID_SIZES).boxes()
        permutation = [0, 3, 6, 1, 4, 7, 2, 5, 8]
        torch.testing.assert_close(
            mmdet.view(-1, 9, 4), detectron2.view(-1, 9, 4)[:, permutation], rtol=1e-6, atol=1e-4
        )

    def test_odtk_is_centred_and_permuted(self):
        odtk, mmdet = AnchorGrid.odtk(GRID_SIZES), AnchorGrid.mmdet(GRID_SIZES, centre_offset=0.5)
        permutation = [2, 5, 8, 0, 3, 6, 1, 4, 7]
        torch.testing.assert_close(
            odtk.boxes().view(-1, 9, 4)[:, permutation], mmdet.boxes().view(-1, 9, 4), rtol=1e-6, atol=1e-3
        )
        centre = (odtk.boxes()[0, :2] + odtk.boxes()[0, 2:]) / 2
        torch.testing.assert_close(centre, torch.tensor([4.0, 4.0]))

    def test_mmdet_centred_is_yhenon(self):
        rows = []
        for level, (height, width) in enumerate(GRID_SIZES):
            stride = 8 * 2**level
            for y, x in itertools.product(range(height), range(width)):
                for ratio, octave in itertools.product((0.5, 1, 2), (0, 1 / 3, 2 / 3)):
                    size = 4 * stride * 2**octave
                    w = math.sqrt(size * size / ratio)
                    cx, cy = (x + 0.5) * stride, (y + 0.5) * stride
                    rows.append((cx - w / 2, cy - w * ratio / 2, cx + w / 2, cy + w * ratio / 2))
        expected = torch.tensor(rows, dtype=torch.float64).float()
        boxes = AnchorGrid.mmdet(GRID_SIZES, centre_offset=0.5).boxes()
        torch.testing.assert_close(boxes, expected, rtol=2e-7, atol=1e-5)
        assert (boxes != expected).float().mean() < 0.1

    def test_coordinates_are_float32_under_autocast(self):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            boxes = AnchorGrid.torchvision(GRID_SIZES, (800, 1344)).boxes()
        assert torch.equal(boxes, AnchorGrid.torchvision(GRID_SIZES, (800, 1344)).boxes())


class TestEdgeCasesAndErrors:
    def test_empty_grids(self):
        assert AnchorGrid.torchvision((), (8, 8), sizes=()).boxes().shape == (0, 4)
        grid = AnchorGrid.detectron2([(0, 5)], strides=[8], sizes=[(32.0,)])
        assert grid.num_anchors == 0 and grid.boxes().shape == (0, 4)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (
                {"base_anchors": torch.zeros(2, 4, dtype=torch.float16)},
                TypeError,
                "base_anchors must be float32, got torch.float16",
            ),
            (
                {"base_anchors": torch.zeros(3, 4)},
                ValueError,
                r"base_anchors must have shape \[2, 4\].* got \[3, 4\]",
            ),
            ({"strides": ()}, ValueError, "strides must have one entry for each of the 1 grid_sizes, got 0"),
            ({"anchors_per_cell": (-1,)}, ValueError, r"anchors_per_cell must not be negative, got \(-1,\)"),
            ({"grid_sizes": ((-1, 2),)}, ValueError, r"grid_sizes must not be negative, got \(-1, 2\)"),
            ({"grid_sizes": ((1, 1),) * 17}, ValueError, "at most 16 levels, got 17"),
        ],
    )
    def test_message_names_the_argument(self, change, error, message):
        arguments = {
            "base_anchors": torch.zeros(2, 4),
            "anchors_per_cell": (2,),
            "grid_sizes": ((3, 3),),
            "strides": ((8, 8),),
            "offsets": ((0, 0),),
        }
        with pytest.raises(error, match=f"AnchorGrid: .*{message}"):
            AnchorGrid(**(arguments | change))

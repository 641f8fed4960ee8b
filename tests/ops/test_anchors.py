"""Anchor grids and base anchors against the projects whose rules they follow."""

import itertools
import math
from functools import partial

import pytest
import torch

from retinanet_ops import AnchorGrid, base_anchors
from retinanet_ops.constants import ANCHOR_PROFILES, ANCHOR_SIZES, ANCHOR_STRIDES

pytestmark = pytest.mark.backends("cpu")

GRID_SIZES = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))


def cell(x1, y1, x2, y2):
    return torch.tensor([x1, y1, x2, y2])


class TestTorchvision:
    def test_equals_the_anchor_generator(self):
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
        assert base_anchors([(32, 40, 50)], (0.5, 1.0, 2.0)).tolist() == expected

    def test_derives_strides_from_the_image(self):
        # 800 is not a multiple of 64 or 128, so torchvision's strides are not powers of two on the last levels.
        grid = AnchorGrid.torchvision(GRID_SIZES, (800, 1344))
        assert grid.strides == ((8, 8), (16, 16), (32, 32), (61, 64), (114, 122))
        assert grid.num_anchors == 201_600 == len(grid.boxes())


class TestOtherLayouts:
    def test_detectron2(self):
        grid = AnchorGrid.detectron2(GRID_SIZES)
        boxes = grid.boxes()
        # The order is size-major, so the second row of a cell has the next ratio.
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

    def test_centred_mmdet_equals_yhenon(self):
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


def on_grid(
    base: torch.Tensor,  # [a, 4] float32
    stride: int,
    size: tuple[int, int],
) -> torch.Tensor:  # [H * W * a, 4]
    """Return base anchors shifted to every cell as all of these projects do it: shift + base in float32."""
    y, x = (torch.arange(0, n * stride, step=stride, dtype=torch.float32) for n in size)
    y, x = torch.meshgrid(y, x, indexing="ij")
    return (torch.stack((x, y, x, y), -1).reshape(-1, 1, 4) + base).reshape(-1, 4)


def detectron2_base(stride: int, centre: float) -> torch.Tensor:
    """Return base anchors computed in Python floats and rounded once."""
    rows = []
    for size, ratio in itertools.product([4 * stride * 2 ** (i / 3) for i in range(3)], (0.5, 1.0, 2.0)):
        width = math.sqrt(size**2 / ratio)
        rows.append([-width / 2, -ratio * width / 2, width / 2, ratio * width / 2])
    return torch.tensor(rows)


def mmdet_base(stride: int, centre: float) -> torch.Tensor:
    """Return base anchors computed in float32 from the roots of the ratios."""
    scales = torch.tensor([4 * 2 ** (i / 3) for i in range(3)])
    height_ratios = torch.tensor([0.5, 1.0, 2.0]).sqrt()
    width = (stride * (1 / height_ratios)[:, None] * scales).flatten()
    height = (stride * height_ratios[:, None] * scales).flatten()
    c = centre * stride
    return torch.stack((c - 0.5 * width, c - 0.5 * height, c + 0.5 * width, c + 0.5 * height), -1)


def odtk_base(stride: int, centre: float) -> torch.Tensor:
    """Return base anchors computed in float32 from the root of the area, around the centre of the cell."""
    scales = torch.tensor([4 * 2 ** (i / 3) for i in range(3)]).repeat_interleave(3)[:, None]
    ratios = torch.tensor([1.0, 2.0, 0.5] * 3)
    cell = torch.full((9, 2), float(stride))
    width = (cell[:, 0] * cell[:, 1] / ratios).sqrt()
    sides = torch.stack((width, width * ratios), 1)
    return torch.cat((0.5 * (cell - sides * scales), 0.5 * (cell + sides * scales)), 1)


@pytest.mark.parametrize(
    ("grid", "base", "centre"),
    [
        (AnchorGrid.detectron2, detectron2_base, 0.0),
        (AnchorGrid.mmdet, mmdet_base, 0.0),
        (partial(AnchorGrid.mmdet, centre_offset=0.5), mmdet_base, 0.5),
        (AnchorGrid.odtk, odtk_base, 0.5),
    ],
)
def test_bits_equal_those_of_the_project(grid, base, centre):
    expected = [on_grid(base(8 * 2**i, centre), 8 * 2**i, size) for i, size in enumerate(GRID_SIZES)]
    assert torch.equal(grid(GRID_SIZES).boxes(), torch.cat(expected))


class TestBaseAnchors:
    @pytest.mark.parametrize("profile", ANCHOR_PROFILES)
    def test_order_is_the_same_for_every_profile(self, profile):
        # The tolerances cover torchvision's rounding to pixels.
        base = base_anchors([(20.0, 200.0), (40.0, 400.0)], (0.5, 1.0, 2.0), profile=profile).view(2, 3, 2, 4)
        width, height = (base[..., 2:] - base[..., :2]).unbind(-1)
        roots = torch.tensor([[20.0, 200], [40, 400]])[:, None].expand(2, 3, 2)
        ratios = torch.tensor([0.5, 1, 2])[None, :, None].expand(2, 3, 2)
        torch.testing.assert_close((width * height).sqrt(), roots, rtol=0.05, atol=0)
        torch.testing.assert_close(height / width, ratios, rtol=0.1, atol=0)

    def test_equal_the_base_anchors_of_the_grids(self):
        sizes = (1, 1)
        grids = {
            "mmdet": AnchorGrid.mmdet([sizes] * 5),
            "yhenon": AnchorGrid.mmdet([sizes] * 5, centre_offset=0.5),
            "torchvision": AnchorGrid.torchvision([sizes] * 5, (8, 8), ANCHOR_SIZES),
        }
        for profile, grid in grids.items():
            assert torch.equal(base_anchors(ANCHOR_SIZES, profile=profile), grid.base_anchors)
        by_size = {
            "detectron2": AnchorGrid.detectron2([sizes] * 5),
            "odtk": AnchorGrid.odtk([sizes] * 5, aspect_ratios=(0.5, 1.0, 2.0)),
        }
        for profile, grid in by_size.items():
            expected = grid.base_anchors.view(5, 3, 3, 4).transpose(1, 2).reshape(-1, 4)
            assert torch.equal(base_anchors(ANCHOR_SIZES, profile=profile), expected)

    def test_unknown_profile(self):
        with pytest.raises(ValueError, match="base_anchors: profile must be one of torchvision, .* got 'ssd'"):
            base_anchors(ANCHOR_SIZES, profile="ssd")


class TestFromBaseAnchors:
    def test_makes_the_grids_of_the_projects(self):
        base = base_anchors(ANCHOR_SIZES, profile="mmdet")
        for form in (base, list(base.split(9))):
            grid = AnchorGrid.from_base_anchors(form, GRID_SIZES, ANCHOR_STRIDES, centre_offset=0.5)
            assert torch.equal(grid.boxes(), AnchorGrid.mmdet(GRID_SIZES, centre_offset=0.5).boxes())
        base = base_anchors(ANCHOR_SIZES)
        grid = AnchorGrid.from_base_anchors(base, GRID_SIZES, image_size=(800, 1344))
        assert torch.equal(grid.boxes(), AnchorGrid.torchvision(GRID_SIZES, (800, 1344), ANCHOR_SIZES).boxes())

    def test_levels_with_unequal_numbers_of_anchors(self):
        grid = AnchorGrid.from_base_anchors([torch.zeros(1, 4), torch.ones(2, 4)], ((2, 3), (1, 1)), (8, 16))
        assert grid.anchors_per_cell == (1, 2) and grid.num_anchors == 8 and grid.boxes()[-1].tolist() == [1] * 4

    def test_errors(self):
        base = torch.zeros(5, 4)
        for options in ({}, {"strides": (8, 16), "image_size": (8, 8)}):
            with pytest.raises(ValueError, match="expected either strides or image_size, got both or neither"):
                AnchorGrid.from_base_anchors(base, ((1, 1), (1, 1)), **options)
        with pytest.raises(ValueError, match=r"base_anchors must have shape \[4, 4\] .* got \[5, 4\]"):
            AnchorGrid.from_base_anchors(base, ((1, 1), (1, 1)), (8, 16))
        with pytest.raises(ValueError, match="strides must have one entry for each of the 2 grid_sizes, got 1"):
            AnchorGrid.from_base_anchors(base[:4], ((1, 1), (1, 1)), (8,))


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


@pytest.mark.parametrize(("sizes", "steps"), [([4], []), ([4, 4], []), ([], [8.0]), ([4, 4, 1, 2], [8.0] * 4)])
def test_incomplete_levels_are_refused(sizes, steps):
    """A direct call cannot mistake the base anchors of an incomplete grid for explicit anchors."""
    with pytest.raises(RuntimeError, match="grid_sizes and grid_steps must hold 3 and 4 numbers for each of 1 to 16"):
        torch.ops.retinanet_ops.encode_boxes(torch.zeros(3, 4), torch.zeros(3, 4), sizes, steps, [1.0] * 4, 0.0)

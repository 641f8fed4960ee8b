"""Detection in tiles: objects at the edges of tiles are detected once."""

import pytest
import torch

from retinanet import RetinaNetConfig
from retinanet.detection.tiled import ImageDetections, detect_image


class RectangleDetector(torch.nn.Module):
    """A stand-in for a model that detects every bright rectangle in its input, even one that the edge cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.config = RetinaNetConfig(class_names=("square",))
        self.device = torch.device("cpu")
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        self.sizes += [tuple(image.shape[1:]) for image in images]
        bright = images[0][0] > 0.5
        boxes = []
        while bright.any():
            y, x = bright.nonzero()[0].tolist()
            width = int((~bright[y, x:]).nonzero()[0]) if not bright[y, x:].all() else bright.shape[1] - x
            height = int((~bright[y:, x]).nonzero()[0]) if not bright[y:, x].all() else bright.shape[0] - y
            bright[y : y + height, x : x + width] = False
            boxes.append([x, y, x + width, y + height])
        tensor = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        scores = torch.linspace(0.9, 0.5, len(boxes))
        return [{"boxes": tensor, "scores": scores, "labels": torch.zeros(len(boxes), dtype=torch.int64)}]


@pytest.mark.parametrize(("tile", "overlap"), [(60, 20), (80, None), (100, 50), (1000, None), (None, None)])
def test_tiled_detection_finds_each_object_once(tile: int | None, overlap: int | None) -> None:
    image = torch.zeros(3, 203, 317, dtype=torch.uint8)
    truth = [[x, y, x + 15, y + 13] for y in range(1, 190, 19) for x in range(2, 300, 23)]
    for x1, y1, x2, y2 in truth:
        image[:, y1:y2, x1:x2] = 255
    model = RectangleDetector()
    detections = detect_image(model, image, tile=tile, overlap=overlap)
    assert sorted(detections.boxes.tolist()) == sorted(truth)
    assert isinstance(detections, ImageDetections) and detections.scores.shape == (len(truth),)
    if tile is not None:
        assert max(max(size) for size in model.sizes) <= tile
    assert bool((detections.scores[:-1] >= detections.scores[1:]).all())


def test_score_threshold_of_tiled_detection() -> None:
    image = torch.zeros(3, 40, 100, dtype=torch.uint8)
    image[:, 10:20, 10:20] = 255
    assert len(detect_image(RectangleDetector(), image, tile=50, score_threshold=0.95).scores) == 0

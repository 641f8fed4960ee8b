"""Annotated pictures: which detections match the ground truth, and in which colours boxes are drawn."""

import torch

from retinanet.detection.coco_input import CocoInput
from retinanet.detection.drawing import draw_comparison
from retinanet.detection.image_errors import match_image
from retinanet.model.targets import ImageDetections


def test_comparison_counts_each_truth_once() -> None:
    truth = torch.tensor([[10.0, 10, 30, 30], [50, 50, 70, 70]])
    boxes = torch.tensor([[11.0, 10, 30, 30], [10, 10, 30, 30], [80, 80, 90, 90], [50, 50, 70, 64]])
    scores = torch.tensor([0.6, 0.9, 0.8, 0.7])
    content = CocoInput.of_one_class([truth], [ImageDetections(boxes, scores, torch.zeros(4, dtype=torch.int64))])
    correct = (match_image(content, 0).correct > 0).tolist()
    assert correct == [False, True, False, True]
    picture = draw_comparison(torch.zeros(3, 100, 100, dtype=torch.uint8), boxes, scores, truth, correct)
    assert picture.size == (800, 830)
    colours = {colour for _, colour in picture.getcolors(10**6)}
    assert {(60, 230, 90), (255, 90, 60), (255, 255, 255)} <= colours
    empty = torch.zeros(3, 50, 50, dtype=torch.uint8)
    assert draw_comparison(empty, boxes[:0], scores[:0], truth[:0], []).size == (800, 830)

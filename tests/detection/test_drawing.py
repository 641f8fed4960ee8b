"""Annotated pictures: which detections match the ground truth, and in which colours boxes are drawn."""

import torch

from retinanet.detection.drawing import draw_comparison, match_greedily


def test_comparison_counts_each_truth_once() -> None:
    truth = torch.tensor([[10.0, 10, 30, 30], [50, 50, 70, 70]])
    boxes = torch.tensor([[11.0, 10, 30, 30], [10, 10, 30, 30], [80, 80, 90, 90], [50, 50, 70, 64]])
    scores = torch.tensor([0.6, 0.9, 0.8, 0.7])
    assert match_greedily(boxes, scores, truth) == [False, True, False, True]
    picture, correct = draw_comparison(torch.zeros(3, 100, 100, dtype=torch.uint8), boxes, scores, truth)
    assert correct == 2 and picture.size == (800, 830)
    colours = {colour for _, colour in picture.getcolors(10**6)}
    assert {(60, 230, 90), (255, 90, 60), (255, 255, 255)} <= colours
    picture, correct = draw_comparison(torch.zeros(3, 50, 50, dtype=torch.uint8), boxes[:0], scores[:0], truth[:0])
    assert correct == 0

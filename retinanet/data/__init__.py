"""Data sets of images with boxes: COCO json, Pascal VOC xml, YOLO and CSV, checks, augmentation and tiling.

Boxes are xyxy in absolute continuous pixels. Labels are 0..K-1. Images are 8-bit RGB.
"""

from retinanet.data.dataset import DetectionDataset
from retinanet.data.forms import find_annotations
from retinanet.data.images import read_image
from retinanet.data.opening import inspect_dataset, open_dataset
from retinanet.data.tiling import tile_dataset, tile_windows
from retinanet.data.transforms import TrainTransform

__all__ = [
    "DetectionDataset",
    "TrainTransform",
    "find_annotations",
    "inspect_dataset",
    "open_dataset",
    "read_image",
    "tile_dataset",
    "tile_windows",
]

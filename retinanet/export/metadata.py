"""What an exported file says about itself: classes, input size, preprocessing and outputs.

The metadata are texts by key, as ONNX and AOTInductor store them; values other than names are JSON. A program that only
has the file can resize, pad and name the classes as `retinanet detect` does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from retinanet.model.thresholds import ScoreThresholds

FORMAT_VERSION = 1
#: Names of the inputs, in their order.
INPUT_NAMES = ("images", "sizes")
#: Names of the outputs with `postprocess="nms"`, in their order.
OUTPUT_NAMES = ("boxes", "scores", "labels", "count")


@dataclass(frozen=True)
class InputRule:
    """How an image becomes an input of the network: it is resized, and padded at its right and lower side.

    Attributes:
        min_size: Length in pixels to which the shorter side is resized, or None to keep the size of the image.
        max_size: Upper bound in pixels on the longer side after resizing; only with `min_size`.
        stretched: Height and width to which every image is resized, whatever its aspect ratio, or None.
        padded: Height and width to which every image is padded, or None for sizes that are not fixed. An image that is
            larger after resizing is resized such that it fits, with at least one side of full length.
        multiple: Height and width of a batch are multiples of this, if they are not fixed.
        least: Height and width of a batch are at least this, if they are not fixed.
    """

    min_size: int | None
    max_size: int
    stretched: tuple[int, int] | None = None
    padded: tuple[int, int] | None = None
    multiple: int = 1
    least: int = 1

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of an image after resizing, each at least 1."""
        if self.stretched is not None:
            return self.stretched
        scale = 1.0
        if self.min_size is not None:
            scale = min(self.min_size / min(height, width), self.max_size / max(height, width))
        resized = max(1, math.floor(height * scale)), max(1, math.floor(width * scale))
        if self.padded is None or (resized[0] <= self.padded[0] and resized[1] <= self.padded[1]):
            return resized
        # Integers, because `floor(height * (padded / height))` may be one pixel less than `padded`.
        if self.padded[0] * width <= self.padded[1] * height:
            return self.padded[0], max(1, self.padded[0] * width // height)
        return max(1, self.padded[1] * height // width), self.padded[1]

    def padded_size(self, sizes: list[tuple[int, int]]) -> tuple[int, int]:
        """Return the height and width of a batch of images of some sizes after resizing."""
        if self.padded is not None:
            return self.padded
        height, width = (
            max(self.least, -(-max(side) // self.multiple) * self.multiple) for side in zip(*sizes, strict=True)
        )
        return height, width

    def to_dict(self) -> dict[str, Any]:
        """Return the rule for the key `preprocessing`."""
        resize: dict[str, Any] = {"rule": "none"}
        if self.stretched is not None:
            resize = {"rule": "stretch", "size": list(self.stretched)}
        elif self.min_size is not None:
            resize = {"rule": "shorter_side", "min_size": self.min_size, "max_size": self.max_size}
        if self.stretched is None and self.padded is not None:
            resize["fit"] = list(self.padded)
        padding = (
            {"size": list(self.padded)} if self.padded is not None else {"multiple": self.multiple, "least": self.least}
        )
        return {
            "colour": "RGB",
            "range": [0, 1],
            "resize": {**resize, "interpolation": "bilinear", "antialias": False},
            "padding": padding,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> InputRule:
        """Return the rule that `to_dict` described."""
        resize, padding = content["resize"], content["padding"]
        size = padding.get("size")
        return cls(
            min_size=resize.get("min_size"),
            max_size=resize.get("max_size", 1),
            stretched=tuple(resize["size"]) if "size" in resize else None,
            padded=None if size is None else tuple(size),
            multiple=padding.get("multiple", 1),
            least=padding.get("least", 1),
        )


@dataclass(frozen=True)
class Metadata:
    """The description of an exported file.

    Attributes:
        architecture: Name of the detector, such as `retinanet`.
        class_names: Name of each class by label; empty if they are not known.
        category_ids: Id of each class in the data set that the model was trained on; empty if they are not known.
        size: Height and width of the input, or None if they are not fixed.
        batch: Number of images of the input, or None if it is not fixed.
        postprocess: `nms` or `raw`.
        half: Whether the convolutions compute in half precision.
        score_threshold: The file returns detections with a score above this.
        score_thresholds: The score thresholds with the best F1 on a validation set, which the file does not apply, or
            None if none were chosen. `retinanet detect` shows detections with a score above the one for all classes.
        rule: How images become inputs.
        outputs: Names of the outputs, in their order.
    """

    architecture: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    size: tuple[int, int] | None
    batch: int | None
    postprocess: str
    half: bool
    score_threshold: float
    score_thresholds: ScoreThresholds | None
    rule: InputRule
    outputs: tuple[str, ...] = OUTPUT_NAMES

    def to_texts(self) -> dict[str, str]:
        """Return the metadata as texts by key."""
        content = {
            "class_names": self.class_names,
            "category_ids": self.category_ids,
            "size": "dynamic" if self.size is None else self.size,
            "batch": "dynamic" if self.batch is None else self.batch,
            "half": self.half,
            "score_threshold": self.score_threshold,
            "score_thresholds": None if self.score_thresholds is None else self.score_thresholds.to_dict(),
            "preprocessing": self.rule.to_dict(),
            "inputs": INPUT_NAMES,
            "outputs": self.outputs,
        }
        return {
            "producer": "retinanet-ops",
            "format_version": str(FORMAT_VERSION),
            "architecture": self.architecture,
            "postprocess": self.postprocess,
            **{key: json.dumps(value) for key, value in content.items()},
        }

    @classmethod
    def from_texts(cls, texts: Mapping[str, str]) -> Metadata:
        """Return the metadata that `to_texts` described.

        Raises:
            ValueError: The texts are of another program, or of another version.
        """
        version = texts.get("format_version")
        if texts.get("producer") != "retinanet-ops" or version != str(FORMAT_VERSION):
            raise ValueError(f"expected metadata of format_version {FORMAT_VERSION} by retinanet-ops, got {version}")
        size, batch = json.loads(texts["size"]), json.loads(texts["batch"])
        class_names, thresholds = json.loads(texts["class_names"]), json.loads(texts["score_thresholds"])
        return cls(
            architecture=texts["architecture"],
            class_names=tuple(class_names),
            category_ids=tuple(json.loads(texts["category_ids"])),
            size=None if size == "dynamic" else tuple(size),
            batch=None if batch == "dynamic" else batch,
            postprocess=texts["postprocess"],
            half=json.loads(texts["half"]),
            score_threshold=json.loads(texts["score_threshold"]),
            score_thresholds=None if thresholds is None else ScoreThresholds.from_dict(thresholds, len(class_names)),
            rule=InputRule.from_dict(json.loads(texts["preprocessing"])),
            outputs=tuple(json.loads(texts["outputs"])),
        )

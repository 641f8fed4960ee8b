"""What a run is about to do, in a few lines: the sizes that the network sees, what it can match, and the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from retinanet.data import DetectionDataset, TrainTransform
from retinanet.model.architectures import anchor_shapes
from retinanet.model.config import RetinaNetConfig
from retinanet.model.detector_config import DetectorConfig
from retinanet.model.fcos_config import FCOSConfig
from retinanet.model.preprocessing import Preprocessing
from retinanet.model.ssd_config import SSDConfig
from retinanet.training.anchor_reach import best_anchor_ious
from retinanet.training.options import TrainOptions

# Enlarging pictures by more than this is pointed out, and so is an object scale that differs by more between training
# and validation.
_NOTABLE_FACTOR = 1.25
# Images whose boxes are matched with the anchors.
_SAMPLED_IMAGES = 500

Size = tuple[int, int]  # height, width in pixels


@dataclass(frozen=True)
class SeenSizes:
    """The sizes of the pictures of a data set on their way into the network.

    Attributes:
        pictures: Size of each picture, or of a crop of it, before the model resizes it.
        network: Size of each after resizing.
        factors: Factor on the size of the objects of each picture, augmentation included.
    """

    pictures: list[Size]
    network: list[Size]
    factors: list[float]

    @property
    def factor(self) -> float:
        """The median factor."""
        return sorted(self.factors)[len(self.factors) // 2]


def seen_sizes(config: DetectorConfig, sizes: Sequence[Size], transform: TrainTransform | None = None) -> SeenSizes:
    """Compute the sizes that the network sees.

    Args:
        config: The configuration of the model. Of several sizes to resize to, the last counts, as in evaluation.
        sizes: Size of each picture.
        transform: The augmentation, of which the middle of the range of scales counts; None for validation.
    """
    preprocessing = Preprocessing(config)
    pictures, network, factors = [], [], []
    scale = 1.0 if transform is None else math.sqrt(transform.scale[0] * transform.scale[1])
    limit = math.inf if transform is None or transform.crop is None else transform.crop
    for height, width in sizes:
        rows, columns = (max(1, round(min(side * scale, limit))) for side in (height, width))
        pictures.append((rows, columns))
        network.append(preprocessing.resized_size(rows, columns))
        if config.fixed_size is None:
            # The longer side is the one that rounding changes least.
            factors.append(scale * max(network[-1]) / max(pictures[-1]))
        else:
            factors.append(scale * math.sqrt(math.prod(network[-1]) / math.prod(pictures[-1])))
    return SeenSizes(pictures, network, factors)


def describe_training(
    config: DetectorConfig, options: TrainOptions, train_set: DetectionDataset, val_set: DetectionDataset | None
) -> list[str]:
    """Return lines about the sizes that the network sees, the objects that it can match, and the number of steps."""
    train = seen_sizes(config, train_set.sizes, options.transform)
    crops = options.transform.crop is not None and not _crop_is_idle(options.transform, train_set.sizes)
    val = train if val_set is None else seen_sizes(config, val_set.sizes)
    same = (set(train.pictures), set(train.network)) == (set(val.pictures), set(val.network))
    kind = "" if same else "training "
    lines = [f"the network sees {kind}{'crops' if crops else 'pictures'} {_seen(train)}"]
    if train.factor > _NOTABLE_FACTOR and config.min_size is not None:
        lines[0] += f"; --min-size 0 leaves them as they are, for 1/{train.factor**2:.0f} of the work in a step"
    if not same:
        lines.append(f"the network sees validation pictures {_seen(val)}")
    lines.append(_describe_objects(config, train_set, train))
    steps = -(-len(train_set) // options.batch_size)
    every = "each epoch" if options.evaluate_every == 1 else f"every {options.evaluate_every} epochs"
    lines.append(
        f"{_count(options.epochs, 'epoch')} of {_count(steps, 'step')} with {_count(options.batch_size, 'picture')} "
        f"each: {_count(options.epochs * steps, 'step')}, and an evaluation after {every}"
    )
    return lines


def size_warnings(
    config: DetectorConfig, options: TrainOptions, train_set: DetectionDataset, val_set: DetectionDataset | None
) -> list[str]:
    """Return a line for each choice of sizes that is probably not meant."""
    warnings = []
    transform = options.transform
    if _crop_is_idle(transform, train_set.sizes):
        longest = max(max(size) for size in train_set.sizes)
        warnings.append(
            f"--crop {transform.crop}: nothing is cropped, because no training picture has a side of more than "
            f"{longest} pixels"
        )
    if val_set is not None:
        train, val = seen_sizes(config, train_set.sizes, transform).factor, seen_sizes(config, val_set.sizes).factor
        ratio = max(train / val, val / train)
        if ratio > _NOTABLE_FACTOR:
            larger, smaller = ("training", "validation") if train > val else ("validation", "training")
            remedy = "" if config.fixed_size else "; --min-size 0 resizes neither"
            warnings.append(
                f"objects are {ratio:.1f} times as large in {larger} as in {smaller}, because crops and whole pictures "
                f"are resized to the same size{remedy}"
            )
    return warnings


def _crop_is_idle(transform: TrainTransform, sizes: Sequence[Size]) -> bool:
    """Return whether a crop is asked for that is larger than every picture at every scale."""
    return transform.crop is not None and transform.crop >= transform.scale[1] * max(max(size) for size in sizes)


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def _seen(sizes: SeenSizes) -> str:
    if sizes.pictures == sizes.network:
        return f"of {_range(sizes.pictures)} pixels as they are"
    pairs = zip(sizes.pictures, sizes.network, strict=True)
    ratios = sorted(math.sqrt(math.prod(seen) / math.prod(picture)) for picture, seen in pairs)
    factor = ratios[len(ratios) // 2]
    change = f"enlarged {factor:.1f} times" if factor > 1 else f"reduced to {factor:.2f} of their size"
    median = "" if len(set(sizes.pictures)) == 1 else " in the median"
    return f"of {_range(sizes.pictures)} pixels at {_range(sizes.network)}, {change}{median}"


def _range(sizes: Sequence[Size]) -> str:
    """Return the smallest and the largest size as width x height."""
    ordered = sorted(set(sizes), key=lambda size: (size[0] * size[1], size))
    ends = [ordered[0], ordered[-1]] if len(ordered) > 1 else ordered
    return " to ".join(f"{width} x {height}" for height, width in ends)


def _describe_objects(config: DetectorConfig, dataset: DetectionDataset, sizes: SeenSizes) -> str:
    if isinstance(config, FCOSConfig):
        # Points are one stride apart, so a box with longer sides has one inside.
        side = max(1, round(2 ** config.fpn_levels[0] / sizes.factor))
        return (
            f"objects from about {side} x {side} pixels in the pictures have a point of the finest level inside; of "
            "smaller ones, some have none and teach nothing"
        )
    shapes = anchor_shapes(config)
    # A square of side s inside an anchor of area A has the IoU s * s / A with it.
    sides = (config.fg_iou_threshold * shapes.prod(dim=1)).sqrt()
    inside = sides[sides <= shapes.amin(dim=1)]
    side = max(1, round(float((inside if len(inside) else sides).min()) / sizes.factor))
    text = f"the smallest objects that it can match have about {side} x {side} pixels in the pictures"
    anchor = "a default box" if isinstance(config, SSDConfig) else "an anchor"
    if not isinstance(config, RetinaNetConfig):
        text = (
            f"objects from about {side} x {side} pixels in the pictures reach an IoU of {config.fg_iou_threshold:g} "
            f"with {anchor}; smaller ones are matched to their best one alone"
        )
    if sizes.factors == seen_sizes(config, dataset.sizes).factors:
        threshold = config.fg_iou_threshold
        missed = float((best_anchor_ious(config, dataset, _SAMPLED_IMAGES) < threshold).float().mean())
        if missed:
            what = "no anchor (see --anchor-sizes, --aspect-ratios and --min-size)"
            if isinstance(config, SSDConfig):
                what = "no default box"
            text += f"; {100 * missed:.1f} % of the boxes reach an IoU of {threshold:g} with {what}"
    return text

"""Fine-tune torchvision's RetinaNet on the demo's tree crowns, unchanged and accelerated, and compare both.

    python -m benchmarks.finetune_torchvision --seeds 3 --output benchmarks/results/finetune_trees_cpu.json

Both models start from the same weights and see the same crops. They take turns, step by step, so that other load on the
machine slows both alike. AP50 is measured on the validation tiles, with the moving average of the weights after the
last step and each model's own post-processing. Several seeds show how much of a difference is due to chance.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import math
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from tqdm import tqdm

from retinanet.common.files import write_json
from retinanet.data import open_dataset
from retinanet.data.tree_sample import TILE, TreeSample, fetch_trees
from retinanet.demo import EPOCHS, tree_config, tree_options
from retinanet.detection.evaluate import evaluate
from retinanet.model.backbone import build_backbone
from retinanet.model.config import RetinaNetConfig
from retinanet.model.preprocessing import to_float
from retinanet.training.batches import AugmentedImages, EpochBatches, batch_loader
from retinanet.training.ema import WeightAverage
from retinanet.training.optimizer import build_optimizer, build_schedule
from retinanet_ops.integrations.torchvision import accelerate


class Detector(RetinaNet):
    """torchvision's model with the attributes that `build_optimizer` and `evaluate` need."""

    config: RetinaNetConfig

    @property
    def body(self) -> nn.Module:
        """Return the backbone without its pyramid."""
        return self.backbone.body


class Finetuning:
    """One model with its optimizer, schedule and moving average, and the seconds of each step."""

    def __init__(self, model: Detector, seed: int, steps: int) -> None:
        """Set training mode and build the optimizer, the schedule and the moving average."""
        self.model = model.train()
        self.seconds: list[float] = []
        options = tree_options(seed)
        optimized: Any = model
        self.optimizer = build_optimizer(optimized, options)
        self.schedule = build_schedule(self.optimizer, options, steps)
        self.clip_norm = options.clip_norm or math.inf
        self.average = WeightAverage(model, options.ema_decay or 0.0)

    def step(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> None:
        """Run one training step."""
        start = time.perf_counter()
        losses = self.model(images, targets)
        self.optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        self.average.update(self.model, self.schedule.last_epoch)
        self.seconds.append(time.perf_counter() - start)


def torchvision_model(sample: TreeSample, config: RetinaNetConfig) -> Detector:
    """Build torchvision's model with the demo's backbone and anchors of the sizes of tree crowns."""
    backbone = build_backbone(config, sample.weights)
    norm = functools.partial(nn.GroupNorm, 16)
    head = RetinaNetHead(backbone.out_channels, config.anchors_per_cell, config.num_classes, norm_layer=norm)
    model = Detector(
        backbone,
        config.num_classes,
        min_size=TILE,
        max_size=TILE,
        anchor_generator=AnchorGenerator(config.anchor_sizes, (config.aspect_ratios,) * len(config.anchor_sizes)),
        head=head,
        nms_thresh=config.nms_threshold,
    )
    model.config = config
    return model


def finetune(sample: TreeSample, seed: int, epochs: int) -> dict[str, dict[str, float]]:
    """Fine-tune both models with one seed and return their AP50 and times."""
    train_set, val_set = open_dataset(sample.train), open_dataset(sample.val)
    config = dataclasses.replace(tree_config(train_set), backbone_norm="frozen")
    options = tree_options(seed, epochs)
    torch.manual_seed(seed)
    plain = torchvision_model(sample, config)
    images = AugmentedImages(train_set, dataclasses.replace(options.transform, crop=TILE), seed, config.num_classes)
    batches = EpochBatches(len(train_set), options.batch_size, epochs, seed)
    runs = {
        "torchvision": Finetuning(plain, seed, len(batches)),
        "accelerated": Finetuning(accelerate(copy.deepcopy(plain)), seed, len(batches)),
    }
    order = list(runs.values())
    for batch in tqdm(batch_loader(images, batches, 0, False), total=len(batches), desc=f"seed {seed}"):
        shown = [to_float(image) for image, _ in batch]
        targets = [{name: target[name] for name in ("boxes", "labels")} for _, target in batch]
        for run in order:
            run.step(shown, targets)
        order.reverse()
    averages: dict[str, Any] = {name: run.average.model for name, run in runs.items()}
    return {
        name: {
            "AP50": evaluate(averages[name], val_set, "cpu").stats["AP50"],
            "seconds": sum(run.seconds),
            "median_step": statistics.median(run.seconds),
        }
        for name, run in runs.items()
    }


def main() -> int:
    """Fine-tune with each seed, print one line per seed, and write all results so far."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="number of seeds, from 0")
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help=f"epochs per seed (default {EPOCHS})")
    parser.add_argument(
        "--sample", default="demo/trees", metavar="DIR", help="folder of the sample (default demo/trees)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file for the results")
    args = parser.parse_args()
    sample = fetch_trees(args.sample)
    record: dict[str, Any] = {
        "epochs": args.epochs,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "seeds": {},
    }
    for seed in range(args.seeds):
        results = finetune(sample, seed, args.epochs)
        record["seeds"][seed] = results
        numbers = (f"{name}: AP50 {r['AP50']:.3f}, {r['seconds']:.1f} s" for name, r in results.items())
        print(f"seed {seed}: {'; '.join(numbers)}", flush=True)
        if args.output:
            write_json(args.output, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())

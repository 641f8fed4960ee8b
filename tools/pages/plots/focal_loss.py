"""Draws the focal loss over the probability of the truth into docs/generated/images/focal_loss.png.

python -m tools.pages.plots.focal_loss
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import retinanet_ops as ops

FILE = Path(__file__).resolve().parents[3] / "docs" / "generated" / "images" / "focal_loss.png"
#: The values of the paper's figure 1.
GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)


def curve(gamma: float, probability: Tensor) -> Tensor:  # [P] -> [P]
    """Return the focal loss of objects that are predicted with these probabilities, without the weight alpha."""
    return ops.sigmoid_focal_loss(probability.logit(), torch.ones_like(probability), alpha=-1, gamma=gamma)


def draw(file: Path) -> None:
    """Draw the curves of all values of gamma into a file."""
    probability = torch.linspace(0.005, 0.999, 400, dtype=torch.float64)
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for gamma in GAMMAS:
        axes.plot(probability, curve(gamma, probability), label=f"γ = {gamma:g}{'  (cross-entropy)' * (gamma == 0)}")
    axes.set(xlim=(0, 1), ylim=(0, 5), xlabel="$p_t$, probability of the truth", ylabel="loss, without $α_t$")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    draw(FILE)

"""Measures the accuracy of focal losses and writes docs/generated/accuracy.md.

    python -m tools.pages.focal_accuracy            write the page
    python -m tools.pages.focal_accuracy --check    fail if another implementation is better by more than half an ulp

The losses and gradients of single logits with targets 0 and 1 are compared with the formula in float64, evaluated at
the same rounded logit. mmcv and apex cannot be installed beside a current torch, so the formulas of their kernels are
evaluated here step by step, in the precisions that the kernels use.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor

import retinanet_ops as ops
from retinanet_ops import reference

PAGE = Path(__file__).resolve().parents[2] / "docs" / "generated" / "accuracy.md"
ALPHA, GAMMA = 0.25, 2.0
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Bounds of the ranges of z, which is the logit of a negative and minus the logit of a positive.
EDGES = (-104.0, -16.0, -8.0, -2.0, 0.0, 2.0, 8.0, 16.0, 104.0)
#: Largest number of ulps by which another implementation may be better.
MARGIN = 0.5

#: Losses and gradients.
Pair = tuple[Tensor, Tensor]
Implementation = Callable[[Tensor, float], Pair | None]


def by_autograd(function: Callable[..., Tensor]) -> Implementation:
    """Return an implementation that differentiates a loss of logits and dense targets by autograd."""

    def run(x: Tensor, target: float) -> Pair:
        x = x.detach().requires_grad_()
        loss = function(x, torch.full_like(x, target).detach(), ALPHA, GAMMA, "none")
        return loss.detach(), torch.autograd.grad(loss, x, torch.ones_like(loss))[0]

    return run


def mmcv(x: Tensor, target: float) -> Pair | None:
    """Compute as mmcv does: in the logits' dtype, with probabilities clamped to FLT_MIN, which is 0 in float16."""
    if x.dtype == torch.bfloat16:
        return None  # the kernels do not support bfloat16
    tiny = torch.tensor(torch.finfo(torch.float32).tiny).to(x.dtype)
    p = 1 / (1 + torch.exp(-x))
    if target:
        scale, log = ALPHA * (1 - p) ** GAMMA, torch.log(torch.maximum(p, tiny))
        return -scale * log, -scale * ((1 - p) - GAMMA * p * log)
    scale, log = (1 - ALPHA) * p**GAMMA, torch.log(torch.maximum(1 - p, tiny))
    return -scale * log, -scale * (GAMMA * (1 - p) * log - p)


def apex(x: Tensor, target: float) -> Pair | None:
    """Compute as apex does: in float32, with the gradient stored in the logits' dtype before it is scaled."""
    if x.dtype == torch.bfloat16:
        return None  # the kernels do not support bfloat16
    y = x.float()
    sigma = 1 / (1 + torch.exp(-y))
    entropy = torch.where(y >= 0, 0.0, -y) + torch.log(1 + torch.exp(-y.abs()))
    if target:
        scale, slope, rest = ALPHA * (1 - sigma) ** GAMMA, -GAMMA * sigma, 1 - sigma
    else:
        scale, slope, rest, entropy = (1 - ALPHA) * sigma**GAMMA, GAMMA * (1 - sigma), -sigma, y + entropy
    return (scale * entropy).to(x.dtype), (scale * (slope * entropy - rest)).to(x.dtype)


IMPLEMENTATIONS: dict[str, Implementation] = {
    "retinanet_ops": by_autograd(ops.sigmoid_focal_loss),
    "torchvision": by_autograd(torchvision.ops.sigmoid_focal_loss),
    "mmcv's formula": mmcv,
    "apex's formula": apex,
}


def logits(dtype: torch.dtype) -> Tensor:
    """Return all numbers of a half-precision dtype within the range, or a million float32 samples."""
    if dtype == torch.float32:
        generator = torch.Generator().manual_seed(0)
        wide = (torch.rand(700_000, generator=generator, dtype=torch.float64) * 2 - 1) * EDGES[-1]
        return torch.cat((wide, wide[:300_000] / 13)).float()
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return x[x.abs() <= EDGES[-1]]


def ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the spacing of a dtype's numbers around exact values, in float64."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(exact.abs().clamp(min=info.tiny)))
    return info.eps * 2.0**exponent


def errors(actual: Tensor, exact: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Return the largest error in ulps and the largest relative error of normal numbers. NaN propagates."""
    difference = (actual.double() - exact).abs()
    normal = exact.abs() >= torch.finfo(dtype).tiny
    relative = difference[normal] / exact[normal].abs()
    return (difference / ulp(exact, dtype)).max().item(), relative.max().item() if len(relative) else 0.0


Cell = tuple[float, float]


def measure(dtype: torch.dtype) -> dict[tuple[str, float, float], dict[str, Cell]]:
    """Return the errors of each implementation, by (loss or gradient, lower bound of z, upper bound of z)."""
    x = logits(dtype)
    table: dict[tuple[str, float, float], dict[str, Cell]] = {}
    for target in (0.0, 1.0):
        z = x.double() * (1 - 2 * target)
        exact = by_autograd(reference.sigmoid_focal_loss)(x.double(), target)
        assert exact is not None
        for name, run in IMPLEMENTATIONS.items():
            got = run(x, target)
            for low, high in zip(EDGES[:-1], EDGES[1:], strict=True):
                inside = (z >= low) & (z <= high)
                for i, what in enumerate(("loss", "gradient")):
                    if got is not None:
                        cells = table.setdefault((what, low, high), {})
                        cell = errors(got[i][inside], exact[i][inside], dtype)
                        cells[name] = worst(cell, cells.get(name, (0.0, 0.0)))
    return table


def worst(a: Cell, b: Cell) -> Cell:
    """Return the larger of each pair of numbers. NaN propagates."""
    return tuple(math.nan if math.isnan(x) or math.isnan(y) else max(x, y) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def text(cell: Cell | None) -> str:
    """Format a cell of the page."""
    if cell is None:
        return "not supported"
    steps, relative = cell
    if math.isnan(steps) or math.isinf(steps):
        return "**NaN**" if math.isnan(steps) else "**inf**"
    share = f"{relative:.0%}" if relative >= 0.01 else f"{relative:.1e}"
    return f"{steps:.3g} ulp, {share}" if steps < 1e4 else f"**{share}**"


def main() -> int:
    """Measure, and write the page or check the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; fail if another implementation is clearly better",
    )
    arguments = parser.parse_args()
    lines = [
        "# Accuracy of the focal loss",
        "",
        "Written by `make accuracy` ([tools/pages/focal_accuracy.py](../../tools/pages/focal_accuracy.py)). The table",
        "shows the largest errors of losses and gradients of single logits, compared with the formula in float64, for",
        f"alpha {ALPHA} and gamma {GAMMA:g}. An error is given in units in the last place (ulp) of the dtype, and as a",
        "relative error where the exact value is a normal number. z is the logit of a negative, or minus the logit of",
        "a positive. The prediction is right far below 0 and wrong far above 0. float32 is sampled at a million",
        "logits, and float16 and bfloat16 are tested at every number. For mmcv and apex, the formulas of their CUDA",
        "kernels are evaluated.",
        "",
    ]
    worse = 0
    for dtype in DTYPES:
        lines += [f"## {str(dtype).removeprefix('torch.')}", "", f"| | z | {' | '.join(IMPLEMENTATIONS)} |"]
        lines.append("|---" * (2 + len(IMPLEMENTATIONS)) + "|")
        for (what, low, high), cells in sorted(measure(dtype).items(), key=lambda item: item[0][0], reverse=True):
            row = " | ".join(text(cells.get(name)) for name in IMPLEMENTATIONS)
            lines.append(f"| {what} | {low:g} .. {high:g} | {row} |")
            best = min(
                (c[0] for n, c in cells.items() if n != "retinanet_ops" and not math.isnan(c[0])), default=math.inf
            )
            if not cells["retinanet_ops"][0] <= best + MARGIN:
                worse += 1
                print(
                    f"{dtype}, {what}, z {low:g} .. {high:g}: {cells['retinanet_ops'][0]:.3g} ulp, another {best:.3g}"
                )
        lines.append("")
    if not arguments.check:
        PAGE.write_text("\n".join(lines))
    return int(worse > 0)


if __name__ == "__main__":
    sys.exit(main())

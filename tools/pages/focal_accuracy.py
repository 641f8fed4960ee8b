"""Measures the accuracy of focal losses and writes docs/accuracy.md.

    python scripts/focal_accuracy.py            write the page
    python scripts/focal_accuracy.py --check    fail if another implementation is better by more than half an ulp

The losses and gradients of single logits with targets 0 and 1 are compared with the formula in float64, at the same
rounded logit. mmcv and apex are judged by their kernels' formulas, step by step in the precisions they use, since
neither can be installed beside a current torch.
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

PAGE = Path(__file__).resolve().parent.parent / "docs" / "accuracy.md"
ALPHA, GAMMA = 0.25, 2.0
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Bounds of z: the logit of a negative, or minus that of a positive.
EDGES = (-104.0, -16.0, -8.0, -2.0, 0.0, 2.0, 8.0, 16.0, 104.0)
#: Half an ulp: how much better another implementation may be.
MARGIN = 0.5

Pair = tuple[Tensor, Tensor]  # losses and gradients
Implementation = Callable[[Tensor, float], Pair | None]


def by_autograd(function: Callable[..., Tensor]) -> Implementation:
    """Losses and gradients of a function of logits and dense targets."""

    def run(x: Tensor, target: float) -> Pair:
        x = x.detach().requires_grad_()
        loss = function(x, torch.full_like(x, target).detach(), ALPHA, GAMMA, "none")
        return loss.detach(), torch.autograd.grad(loss, x, torch.ones_like(loss))[0]

    return run


def mmcv(x: Tensor, target: float) -> Pair | None:
    """Everything in the logits' dtype; probabilities are kept above FLT_MIN, which is 0 in float16."""
    if x.dtype == torch.bfloat16:
        return None  # its kernels have no bfloat16
    tiny = torch.tensor(torch.finfo(torch.float32).tiny).to(x.dtype)
    p = 1 / (1 + torch.exp(-x))
    if target:
        scale, log = ALPHA * (1 - p) ** GAMMA, torch.log(torch.maximum(p, tiny))
        return -scale * log, -scale * ((1 - p) - GAMMA * p * log)
    scale, log = (1 - ALPHA) * p**GAMMA, torch.log(torch.maximum(1 - p, tiny))
    return -scale * log, -scale * (GAMMA * (1 - p) * log - p)


def apex(x: Tensor, target: float) -> Pair | None:
    """In float32; the gradient is stored in the logits' dtype before it is scaled."""
    if x.dtype == torch.bfloat16:
        return None  # its kernels have no bfloat16
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
    """Every number of a half-precision dtype, or a million float32, in the range."""
    if dtype == torch.float32:
        generator = torch.Generator().manual_seed(0)
        wide = (torch.rand(700_000, generator=generator, dtype=torch.float64) * 2 - 1) * EDGES[-1]
        return torch.cat((wide, wide[:300_000] / 13)).float()
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return x[x.abs() <= EDGES[-1]]


def ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of the numbers of a dtype around exact values, float64."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(exact.abs().clamp(min=info.tiny)))
    return info.eps * 2.0**exponent


def errors(actual: Tensor, exact: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Largest error in ulps, and largest relative error where the exact value is a normal number; NaN if one is."""
    difference = (actual.double() - exact).abs()
    normal = exact.abs() >= torch.finfo(dtype).tiny
    relative = difference[normal] / exact[normal].abs()
    return (difference / ulp(exact, dtype)).max().item(), relative.max().item() if len(relative) else 0.0


Cell = tuple[float, float]


def measure(dtype: torch.dtype) -> dict[tuple[str, float, float], dict[str, Cell]]:
    """Errors of each implementation by what is computed and the range of z."""
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
    """The larger of either number; NaN is the largest."""
    return tuple(math.nan if math.isnan(x) or math.isnan(y) else max(x, y) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def text(cell: Cell | None) -> str:
    """A cell of the page."""
    if cell is None:
        return "not supported"
    steps, relative = cell
    if math.isnan(steps) or math.isinf(steps):
        return "**NaN**" if math.isnan(steps) else "**inf**"
    share = f"{relative:.0%}" if relative >= 0.01 else f"{relative:.1e}"
    return f"{steps:.3g} ulp, {share}" if steps < 1e4 else f"**{share}**"


def main() -> int:
    """Measure and write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if another implementation is better")
    arguments = parser.parse_args()
    lines = [
        "# Accuracy of the focal loss",
        "",
        "Written by `make accuracy` ([scripts/focal_accuracy.py](../scripts/focal_accuracy.py)). Largest errors of",
        f"losses and gradients of single logits against the formula in float64, alpha {ALPHA}, gamma {GAMMA:g}: in",
        "units in the last place (ulp) of the dtype, and relative where the exact value is a normal number. z is the",
        "logit of a negative, or minus the logit of a positive: far below 0 it is right, far above 0 wrong. float32 is",
        "sampled at a million logits; of float16 and bfloat16 every number is taken. mmcv and apex are judged by the",
        "formulas of their CUDA kernels.",
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

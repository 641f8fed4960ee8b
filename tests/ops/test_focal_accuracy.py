"""Accuracy of the focal loss for hard targets and every logit up to 104 in magnitude."""

import itertools
from pathlib import Path

import mpmath
import pytest
import torch

import retinanet_ops as ops
from retinanet_ops import reference

GAMMAS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
ALPHAS = (-1.0, 0.0, 0.25, 1.0)
LIMIT = 104.0
PAGE = Path(__file__).resolve().parents[2] / "docs" / "generated" / "accuracy.md"


def float_logits(count, dtype=torch.float32):
    """Return uniform logits, small ones around the sign change of the formula, and the limits."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(count, generator=generator, dtype=torch.float64) * 2 - 1) * LIMIT
    scale = torch.rand(count, generator=generator, dtype=torch.float64)
    return torch.cat((x, x / LIMIT * 20 * scale, torch.tensor([-LIMIT, -0.0, 0.0, LIMIT]))).to(dtype)


def all_logits(dtype):
    """Return every number of a half-precision dtype within the limit."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype)
    return x[x.abs() <= LIMIT]


def loss_and_grad(function, x, target, **options):
    x = x.detach().requires_grad_()
    loss = function(x, torch.full(x.shape, target, dtype=x.dtype, device=x.device), **options)
    return loss.detach(), torch.autograd.grad(loss, x, torch.ones_like(loss))[0]


def ordinal(t):
    """Return the rank of each number among all numbers of its half-precision dtype."""
    bits = t.view(torch.int16).int()
    return torch.where(bits >= 0, bits, -(bits & 0x7FFF))


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_float32(device, alpha, gamma):
    x = float_logits(3_000)
    for target in (0.0, 1.0):
        got = loss_and_grad(ops.sigmoid_focal_loss, x.to(device), target, alpha=alpha, gamma=gamma)
        expected = loss_and_grad(reference.sigmoid_focal_loss, x.double(), target, alpha=alpha, gamma=gamma)
        for actual, exact in zip(got, expected, strict=True):
            normal = exact.abs() >= torch.finfo(torch.float32).tiny
            error = (actual.cpu().double() - exact).abs()
            assert (error[normal] <= 2e-6 * exact[normal].abs()).all()
            assert (error[~normal] <= 2e-6 * torch.finfo(torch.float32).tiny).all()


@pytest.mark.parametrize("gamma", (0.3, 1.2, 2.7, 4.1, 9.6))
def test_float32_of_any_gamma(device, gamma):
    x = float_logits(3_000)
    for target in (0.0, 1.0):
        got = loss_and_grad(ops.sigmoid_focal_loss, x.to(device), target, gamma=gamma)
        expected = loss_and_grad(reference.sigmoid_focal_loss, x.double(), target, gamma=gamma)
        for actual, exact in zip(got, expected, strict=True):
            normal = exact.abs() >= torch.finfo(torch.float32).tiny
            assert ((actual.cpu().double() - exact).abs()[normal] <= 1e-4 * exact[normal].abs()).all()


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_is_at_most_one_number_off(device, dtype, gamma):
    x = all_logits(dtype)
    for alpha, target in itertools.product(ALPHAS, (0.0, 1.0)):
        got = loss_and_grad(ops.sigmoid_focal_loss, x.to(device), target, alpha=alpha, gamma=gamma)
        expected = loss_and_grad(reference.sigmoid_focal_loss, x.double(), target, alpha=alpha, gamma=gamma)
        for actual, exact in zip(got, expected, strict=True):
            assert (ordinal(actual.cpu()) - ordinal(exact.to(dtype))).abs().max() <= 1


@pytest.mark.parametrize("gamma", GAMMAS)
def test_float64_against_50_digits(device, gamma):
    x = float_logits(40, torch.float64)
    for alpha, target in itertools.product((-1.0, 0.25), (0.0, 1.0)):
        got = loss_and_grad(ops.sigmoid_focal_loss, x.to(device), target, alpha=alpha, gamma=gamma)
        for value, loss, grad in zip(x.tolist(), *(t.tolist() for t in got), strict=True):
            exact_loss, exact_grad = exact_focal(value, target, alpha, gamma)
            assert abs(loss - exact_loss) <= 1e-14 * exact_loss
            assert abs(grad - exact_grad) <= 1e-14 * abs(exact_grad)


def exact_focal(x, target, alpha, gamma):
    with mpmath.workdps(50):
        z = mpmath.mpf(x) if target == 0 else -mpmath.mpf(x)
        weight = 1 if alpha < 0 else mpmath.mpf(alpha) if target == 1 else 1 - mpmath.mpf(alpha)
        s, softplus = 1 / (1 + mpmath.exp(-z)), mpmath.log1p(mpmath.exp(z))
        grad = weight * s**gamma * (gamma * (1 - s) * softplus + s)
        return weight * s**gamma * softplus, grad if target == 0 else -grad


@pytest.mark.parametrize("gamma", GAMMAS)
def test_error_of_soft_targets_relative_to_their_terms(device, gamma):
    x, t = float_logits(1_000), torch.rand(2_004)
    y = x.to(device).requires_grad_()
    loss = ops.sigmoid_focal_loss(y, t.to(device), gamma=gamma)
    grad = torch.autograd.grad(loss.sum(), y)[0].cpu().double()
    x64, t64 = x.double(), t.double()
    # The gradient is alpha_t q^gamma (gamma dq / q CE + dCE) with q = 1 - p_t. Its terms may have opposite signs.
    s, rest = x64.sigmoid(), (-x64).sigmoid()
    q = s * (1 - t64) + rest * t64
    entropy = -(t64 * torch.nn.functional.logsigmoid(x64) + (1 - t64) * torch.nn.functional.logsigmoid(-x64))
    factor = (0.25 * t64 + 0.75 * (1 - t64)) * q**gamma
    first, second = s * rest * gamma / q * entropy, s * (1 - t64) + rest * t64
    exact = factor * (first * (1 - 2 * t64) + s * (1 - t64) - rest * t64)
    assert ((grad - exact).abs() <= 2e-6 * factor * (first + second) + 1e-38).all()
    assert ((loss.detach().cpu().double() - factor * entropy).abs() <= 2e-6 * factor * entropy).all()


def page_errors(dtype):
    """Return the errors of this package on the accuracy page, in ulps, by (loss or gradient, range of z)."""
    section = PAGE.read_text().split(f"## {dtype}")[1].split("##")[0]
    rows = (line.split("|")[1:] for line in section.splitlines() if " ulp" in line)
    return {(row[0].strip(), row[1].strip()): float(row[2].split()[0]) for row in rows}


@pytest.mark.skipif(not PAGE.exists(), reason="needs the source tree")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_every_backend_is_as_accurate_as_the_page_says(device, dtype):
    pytest.importorskip("torchvision")
    from tools.pages import focal_accuracy as page

    expected = page_errors(str(dtype).removeprefix("torch."))
    assert len(expected) == 16
    x = page.logits(dtype)
    worst = dict.fromkeys(expected, 0.0)
    for target in (0.0, 1.0):
        z = x.double() * (1 - 2 * target)
        got = loss_and_grad(ops.sigmoid_focal_loss, x.to(device), target)
        exact = loss_and_grad(reference.sigmoid_focal_loss, x.double(), target)
        for low, high in itertools.pairwise(page.EDGES):
            inside = (z >= low) & (z <= high)
            for what, actual, true in zip(("loss", "gradient"), got, exact, strict=True):
                key = what, f"{low:g} .. {high:g}"
                worst[key] = max(worst[key], page.errors(actual.cpu()[inside], true[inside], dtype)[0])
    # The page rounds to three digits.
    assert {key: error for key, error in worst.items() if error > 1.005 * expected[key]} == {}

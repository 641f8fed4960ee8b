"""Random cases of both focal losses: tile edges, odd addresses, unusual logits and labels. `make fuzz` tries more."""

import math

import torch
from cases import FLOATING, assert_close
from hypothesis import given
from hypothesis import strategies as st
from properties import Cases, many_cases

import retinanet_ops as ops
from retinanet_ops import reference
from retinanet_ops.reference._rows import rows_of

LAYOUTS = (torch.contiguous_format, torch.channels_last)
# Class counts around the sizes of packs, and those of COCO.
CLASSES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 80, 91)
# Areas around the sizes of packs and of a tile of 256 cells.
GRIDS = ((1, 1), (1, 3), (2, 2), (1, 7), (3, 3), (4, 4), (5, 51), (16, 16), (1, 257), (2, 130), (13, 21), (19, 27))
UNUSUAL = (0.0, -0.0, 1e-30, -1e-3, 2.0**-10, -(2.0**-10), 63.75, -63.75, 64.0, -64.0, 86.9, -87.0, 87.1, 104.0, -2e4)


def random_logits(cases, count, dtype):
    x = (cases.uniform(count) * 2 - 1) * cases.one_of(1.0, 6.0, 30.0, 100.0)
    unusual = torch.tensor(UNUSUAL)[cases.integers(count, 0, len(UNUSUAL) - 1)]
    return torch.where(cases.uniform(count) < cases.one_of(0.0, 0.01, 0.3), unusual, x).to(dtype)


def random_labels(cases, shape, num_classes):
    count = math.prod(shape)
    some = torch.where(
        cases.uniform(count) < cases.one_of(0.0, 0.02, 0.5), cases.integers(count, -2, num_classes - 1), -1
    )
    return torch.where(cases.uniform(count) < cases.one_of(0.0, 0.1), -2, some).reshape(shape)


def shifted(t, by):
    """Return the same values in a tensor of the same strides that starts `by` elements after an aligned address."""
    buffer = t.new_empty(t.numel() + by)
    return buffer[by:].as_strided(t.shape, t.stride(), by).copy_(t)


@given(seed=st.integers(0, 2**63 - 1))
@many_cases
def test_dense_loss(device, seed):
    cases = Cases(seed)
    dtype, num_classes, per_cell = cases.one_of(*FLOATING), cases.one_of(*CLASSES), cases.one_of(1, 2, 3)
    images, grids = cases.one_of(1, 2), [cases.one_of(*GRIDS) for _ in range(cases.one_of(1, 1, 2, 3))]
    levels = []
    for h, w in grids:
        shape = (images, per_cell * num_classes, h, w)
        level = random_logits(cases, math.prod(shape), dtype).reshape(shape)
        level = level.contiguous(memory_format=cases.one_of(*LAYOUTS)).to(device)
        levels.append(shifted(level, cases.one_of(0, 0, 1, 3)).requires_grad_())
    labels = random_labels(cases, (images, sum(per_cell * h * w for h, w in grids)), num_classes).to(device)
    options = {"alpha": cases.one_of(0.25, 0.25, -1.0, 0.6), "gamma": cases.one_of(2.0, 2.0, 2.0, 1.5)}
    if cases.one_of(False, False, True):
        weight = torch.where(cases.uniform(labels.numel()) < 0.2, 0.0, cases.uniform(labels.numel()) * 3)
        options["anchor_weight"] = weight.reshape(labels.shape).to(device)
    scale = torch.tensor([1.0, cases.one_of(1.0, -0.3, 1024.0)])[:images].to(device)

    loss = ops.dense_focal_loss(levels, labels, num_classes, **options)
    grads = torch.autograd.grad(loss, levels, scale.to(loss.dtype))
    wide = [level.detach().double().requires_grad_() for level in levels]
    expected = reference.dense_focal_loss(wide, labels, num_classes, **options)
    assert_close(loss, expected, scale=2)
    expected_grads = torch.autograd.grad(expected, wide, scale.double())
    for grad, expected_grad, level in zip(grads, expected_grads, levels, strict=True):
        assert grad.stride() == level.stride()
        assert_close(grad, expected_grad, scale=2)
    again = ops.dense_focal_loss(levels, labels, num_classes, **options)
    assert torch.equal(again, loss)

    # The bits of a gradient depend on the logit, its target and its weight only, so all layouts agree.
    packed = [level.detach().contiguous(memory_format=cases.one_of(*LAYOUTS)).requires_grad_() for level in levels]
    other = ops.dense_focal_loss(packed, labels, num_classes, **options)
    others = torch.autograd.grad(other, packed, scale.to(loss.dtype))
    assert all(torch.equal(a, b) for a, b in zip(others, grads, strict=True))
    if "anchor_weight" not in options and options["gamma"] == 2 and (scale == 1).all():
        rows = rows_of([level.detach() for level in levels], num_classes).contiguous().requires_grad_()
        total = ops.sigmoid_focal_loss(rows, labels, reduction="sum", **options)
        (row_grads,) = torch.autograd.grad(total, rows)
        assert torch.equal(rows_of(list(grads), num_classes), row_grads)


@given(seed=st.integers(0, 2**63 - 1))
@many_cases
def test_rows(device, seed):
    cases = Cases(seed)
    dtype, num_classes = cases.one_of(*FLOATING), cases.one_of(*CLASSES)
    count = cases.one_of(cases.integer(1, 40), cases.integer(1, 700), 1023, 1025)
    x = random_logits(cases, count * num_classes, dtype).reshape(count, num_classes).to(device)
    x = shifted(x, cases.one_of(0, 1)).requires_grad_()
    labels = random_labels(cases, (count,), num_classes).to(device, cases.one_of(torch.int32, torch.int64))
    options = {"alpha": cases.one_of(0.25, -1.0), "gamma": cases.one_of(2.0, 2.0, 0.7)}

    losses = ops.sigmoid_focal_loss(x, labels, **options)
    total = ops.sigmoid_focal_loss(x, labels, reduction="sum", **options)
    wide = x.detach().double().requires_grad_()
    expected = reference.sigmoid_focal_loss(wide, labels, **options)
    assert_close(losses, expected, scale=2)
    assert_close(total, expected.sum(), scale=2)
    scale = cases.one_of(1.0, -0.5, 3.0)
    (grad,) = torch.autograd.grad(total, x, torch.tensor(scale, dtype=total.dtype, device=device))
    (expected_grad,) = torch.autograd.grad(
        expected.sum(), wide, torch.tensor(scale, dtype=torch.float64, device=device)
    )
    assert_close(grad, expected_grad, scale=2)
    # One gradient per loss gives the same bits as one for all, if they are equal.
    (each,) = torch.autograd.grad(losses, x, torch.full_like(losses, scale))
    assert torch.equal(each, grad)
    # Targets of 0 and 1 give the same bits as class labels.
    targets = (labels[:, None] == torch.arange(num_classes, device=device)).to(dtype)
    kept = labels != -2
    assert torch.equal(ops.sigmoid_focal_loss(x, targets, **options)[kept], losses[kept])


@given(seed=st.integers(0, 2**63 - 1))
@many_cases
def test_nan_and_infinite_logits_affect_only_themselves(device, seed):
    cases = Cases(seed)
    dtype, num_classes = cases.one_of(*FLOATING), cases.one_of(*CLASSES)
    shape = (1, 2 * num_classes, *cases.one_of(*GRIDS))
    plain = random_logits(cases, math.prod(shape), dtype).reshape(shape)
    special = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)[cases.integers(plain.numel(), 0, 2)]
    where = (cases.uniform(plain.numel()) < cases.one_of(0.001, 0.1)).reshape(shape)
    labels = random_labels(cases, (1, 2 * shape[2] * shape[3]), num_classes).to(device)
    layout = cases.one_of(*LAYOUTS)
    grads = []
    for x in (plain, torch.where(where, special.reshape(shape), plain)):
        level = x.contiguous(memory_format=layout).to(device).requires_grad_()
        loss = ops.dense_focal_loss([level], labels, num_classes)
        grads.append(torch.autograd.grad(loss.sum(), level)[0].cpu())
    assert torch.equal(grads[0][~where], grads[1][~where])
    rows = rows_of([torch.where(where, special.reshape(shape), plain)], num_classes)[0]
    ignored = (labels[0].cpu() == -2)[:, None]
    got = rows_of([grads[1]], num_classes)[0]
    assert torch.equal(got.isnan(), rows.isnan() & ~ignored)
    assert (got[ignored.expand_as(got)] == 0).all()

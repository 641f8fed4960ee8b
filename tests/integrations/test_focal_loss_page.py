"""Every number of docs/focal-loss.md is what the ops compute, and its examples show what the page says about them."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import retinanet_ops as ops

PAGE = Path(__file__).parents[2] / "docs" / "focal-loss.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the documents are only in the source tree")

ALPHA, GAMMA = (inspect.signature(ops.sigmoid_focal_loss).parameters[name].default for name in ("alpha", "gamma"))
#: The probability that a network gives to every class before training.
PRIOR = 0.01


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def loss_of_logit(x: float, is_object: bool, alpha: float = ALPHA, gamma: float = GAMMA) -> float:
    target = torch.tensor([float(is_object)], dtype=torch.float64)
    return float(ops.sigmoid_focal_loss(torch.tensor([x], dtype=torch.float64), target, alpha, gamma))


def focal(p: float, is_object: bool) -> float:
    """Return the focal loss of the paper, which weights background by 1 - alpha."""
    return loss_of_logit(logit(p), is_object)


def focal_of_tutorials(p: float, is_object: bool) -> float:
    """Return the focal loss with which tutorials calculate: alpha weights background, too."""
    return ALPHA * loss_of_logit(logit(p), is_object, alpha=-1)


def cross_entropy(p: float, is_object: bool) -> float:
    return loss_of_logit(logit(p), is_object, alpha=-1, gamma=0)


# Arguments (p, is_object) of the functions above.
EASY_OBJECT, EASY_BACKGROUND = (0.9, True), (0.1, False)
HARD_OBJECT, HARD_BACKGROUND = (0.1, True), (0.9, False)
VERY_EASY_OBJECT, VERY_EASY_BACKGROUND = (0.99, True), (0.01, False)


def printed(value: float) -> str:
    """Return a loss as the page prints it."""
    return f"{value:.8f}" if value >= 0.01 else f"{value:.6e}".replace("e-0", "e-")


def prediction(name: str, p: float, is_object: bool) -> str:
    """Return the row of a prediction in the page's first table."""
    truth = p if is_object else 1 - p
    losses = (f(p, is_object) for f in (cross_entropy, focal_of_tutorials, focal))
    return f"| {name} | {logit(p):.6f} | {p} | {truth:g} | {' | '.join(map(printed, losses))} |"


def ratio(p: float, is_object: bool, loss: Callable[[float, bool], float] = focal) -> float:
    return cross_entropy(p, is_object) / loss(p, is_object)


def ratios(name: str, p: float) -> str:
    """Return the row of the predictions that give the truth the probability p in the page's second table."""
    values = ratio(p, True, focal_of_tutorials), ratio(p, True), ratio(1 - p, False)
    places = 6 if p < 0.5 else 2
    cells = (f"{value:,.{places}f}".removesuffix(".00") for value in values)
    return f"| {name} | {p} | {' | '.join(cells)} |"


def sums(name: str, easy: float, hard: float, places: int = 3) -> str:
    """Return the row of 100,000 easy and 100 hard predictions with these losses in the page's third table."""
    easy, hard = 100_000 * easy, 100 * hard
    return f"| {name} | {easy:,.2f} | {hard:.2f} | {easy / hard:.{places}f} |"


def anchors_and_logits() -> tuple[int, int]:
    """Return the number of RetinaNet's anchors of an image of 800 x 1344 pixels, and of the logits of 80 classes."""
    grid = ops.AnchorGrid.torchvision([(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)], (800, 1344))
    return len(grid.boxes()), 80 * len(grid.boxes())


@functools.cache
def statements() -> dict[str, str]:
    """Return by subject what the page must say, with all numbers computed."""
    easy, hard = cross_entropy(*EASY_OBJECT), cross_entropy(*HARD_OBJECT)
    anchors, logits = anchors_and_logits()
    first_loss = logits * focal(PRIOR, False)
    factor = focal(*EASY_BACKGROUND) / focal_of_tutorials(*EASY_BACKGROUND)
    easy_to_hard = f"{1000 * easy / hard:.2f}"
    focal_to_hard = f"{1000 * focal(*EASY_OBJECT) / focal(*HARD_OBJECT):.3f}"
    both = focal_of_tutorials(*EASY_OBJECT), focal_of_tutorials(*HARD_OBJECT)
    return {
        "defaults": f"trains with γ = {GAMMA:g} and α = {ALPHA}, which are the defaults of this package",
        "weight of background": f"The paper weights background by 1 - α = {1 - ALPHA}",
        "weight of tutorials": f"Many tutorials weight background by α = {ALPHA}, too",
        "easy object": prediction("easy object", *EASY_OBJECT),
        "easy background": prediction("easy background", *EASY_BACKGROUND),
        "hard object": prediction("hard object", *HARD_OBJECT),
        "hard background": prediction("hard background", *HARD_BACKGROUND),
        "very easy object": prediction("very easy object", *VERY_EASY_OBJECT),
        "very easy background": prediction("very easy background", *VERY_EASY_BACKGROUND),
        "ratios, very easy": ratios("very easy", 0.99),
        "ratios, easy": ratios("easy", 0.9),
        "ratios, hard": ratios("hard", 0.1),
        "many predictions": "An image has 100,000 easy predictions with p_t = 0.9, and 100 hard ones with p_t = 0.1.",
        "sums of CE": sums("CE", easy, hard, places=2),
        "sums of FL, alpha for both": sums("FL, α for both", *both),
        "sums of FL, background": sums(
            "FL of the paper, all of them background", focal(*EASY_BACKGROUND), focal(*HARD_BACKGROUND)
        ),
        "sums of FL, background and objects": sums(
            "FL of the paper, easy background and hard objects", focal(*EASY_BACKGROUND), focal(*HARD_OBJECT)
        ),
        "sum of CE": f"The cross-entropy of the easy predictions is {easy_to_hard} times that of the hard ones.",
        "sum of FL": f"Their focal loss is {focal_to_hard} times that of the hard ones, so the hard ones now dominate",
        "weights": f"the weights {1 - ALPHA} and {ALPHA} favour the background by a factor of {(1 - ALPHA) / ALPHA:g}",
        "half": "With `gamma=0` and `alpha=0.5`, it is half of that.",
        "bias": f"With π = {PRIOR}, the bias is {logit(PRIOR):.6f}, and every prediction starts at p = {PRIOR}.",
        "logits": f"An image of 800 x 1344 pixels has {anchors:,} anchors, which is {logits:,} logits of 80 classes.",
        "first loss": f"{logits:,} x {printed(focal(PRIOR, False))} = {first_loss:.3f}.",
        "first loss without a bias": (
            f"every prediction starts at p = 0.5, and the first loss would be {logits * focal(0.5, False):,.0f}."
        ),
        "far from the first loss": f"If the first loss of such an image is far from {first_loss:.0f}, the bias",
        "float32": "For float32 logits from -100 to 100, the relative error of the loss is below 1e-6.",
        "hopeless object": (
            f"an object with a logit of -10,000 has a loss of {loss_of_logit(-10_000, True):,.0f}, and background with "
            f"a logit of 10,000 has a loss of {loss_of_logit(10_000, False):,.0f}."
        ),
        "slip 1": f"is then {printed(focal(*EASY_BACKGROUND))}, which is {factor:g} times as much.",
        "slip 2": f"is printed as 0.4667.** It is {focal(*HARD_OBJECT):.4f}.",
        "slip 3": f"is printed as 2.3025.** It is {hard:.4f}.",
        "slip 4": f"is printed as 0.1053.** It is {cross_entropy(*VERY_EASY_BACKGROUND):.5f}.",
        "slip 4, rounded": f"and is cut off instead of rounded to {cross_entropy(*EASY_BACKGROUND):.4f}.",
        "slip 5": f"is printed as 384.** It is {ratio(*EASY_OBJECT):.0f}.",
        "slip 5, rounded": f"The rounded losses give 0.1 / 0.00026 = {0.1 / 0.00026:.1f}.",
        "slip 6": f"40 times the loss of the hard ones.** They have {easy_to_hard} times their cross-entropy.",
        "slip 6, rounded": f"The rounded losses 0.1 and 2.3 give {0.1 * 100_000 / (2.3 * 100):.1f} times.",
        "slip 6, focal loss": f"With the focal loss the ratio is {focal_to_hard}.",
        "slip 7": f"An image has {default_boxes():,} default boxes in SSD300. If 10 of them are matched",
        "slip 7, factor": f"makes the loss {default_boxes() / 10:.1f} times smaller.",
    }


def default_boxes() -> int:
    """Return the number of default boxes of an image in SSD300: 4 or 6 in each cell of six feature maps."""
    return sum(boxes * side**2 for side, boxes in zip((38, 19, 10, 5, 3, 1), (4, 6, 6, 6, 4, 4), strict=True))


def prose() -> str:
    """Return the page without code blocks, addresses of links and numbers of list items, on one line."""
    text = re.sub(r"```.*?```", "", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r"^\d+\. ", "", re.sub(r"\]\([^)]*\)", "]", text), flags=re.MULTILINE)
    return " ".join(text.split())


NUMBER = re.compile(r"(?<![A-Za-z_\d])\d+(?:[.,]\d+)*(?:e-\d+)?")


def faults(text: str, said: list[str]) -> list[str]:
    """Return the statements that a text lacks, and its numbers other than 0 and 1 that belong to no statement."""
    covered = [match.span() for statement in said for match in re.finditer(re.escape(statement), text)]
    found = [statement for statement in said if statement not in text]
    for number in NUMBER.finditer(text):
        inside = any(start <= number.start() and number.end() <= end for start, end in covered)
        if not inside and number[0] not in ("0", "1"):
            found.append(text[max(0, number.start() - 30) : number.end() + 10])
    return found


def assert_page_says(*subjects: str) -> None:
    text, said = prose(), statements()
    assert [said[subject] for subject in subjects if said[subject] not in text] == []


class TestSinglePredictions:
    def test_an_easy_object_keeps_a_400th_of_its_cross_entropy(self):
        assert cross_entropy(*EASY_OBJECT) == pytest.approx(0.10536052, abs=5e-9)
        assert focal(*EASY_OBJECT) == focal_of_tutorials(*EASY_OBJECT) == pytest.approx(2.634013e-4, abs=5e-11)
        assert_page_says("easy object")

    def test_easy_background_weighs_three_times_as_much_as_an_easy_object(self):
        assert cross_entropy(*EASY_BACKGROUND) == pytest.approx(cross_entropy(*EASY_OBJECT), rel=1e-12)
        assert focal_of_tutorials(*EASY_BACKGROUND) == pytest.approx(2.634013e-4, abs=5e-11)
        assert focal(*EASY_BACKGROUND) == pytest.approx(7.902039e-4, abs=5e-11)
        assert_page_says("easy background", "weight of background", "weight of tutorials", "slip 1")

    def test_a_hard_object_keeps_a_fifth_of_its_cross_entropy(self):
        assert cross_entropy(*HARD_OBJECT) == pytest.approx(2.30258509, abs=5e-9)
        assert focal(*HARD_OBJECT) == focal_of_tutorials(*HARD_OBJECT) == pytest.approx(0.46627348, abs=5e-9)
        assert_page_says("hard object", "slip 2", "slip 3")

    def test_hard_background_has_three_times_the_loss_of_a_hard_object(self):
        assert cross_entropy(*HARD_BACKGROUND) == pytest.approx(2.30258509, abs=5e-9)
        assert focal_of_tutorials(*HARD_BACKGROUND) == pytest.approx(0.46627348, abs=5e-9)
        assert focal(*HARD_BACKGROUND) == pytest.approx(1.39882044, abs=5e-9)
        assert_page_says("hard background")

    def test_a_very_easy_object_keeps_a_40000th_of_its_cross_entropy(self):
        assert cross_entropy(*VERY_EASY_OBJECT) == pytest.approx(0.01005034, abs=5e-9)
        assert focal(*VERY_EASY_OBJECT) == pytest.approx(2.512584e-7, abs=5e-14)
        assert_page_says("very easy object")

    def test_very_easy_background_has_the_cross_entropy_of_a_very_easy_object(self):
        assert cross_entropy(*VERY_EASY_BACKGROUND) == pytest.approx(0.01005034, abs=5e-9)
        assert focal_of_tutorials(*VERY_EASY_BACKGROUND) == pytest.approx(2.512584e-7, abs=5e-14)
        assert focal(*VERY_EASY_BACKGROUND) == pytest.approx(7.537752e-7, abs=5e-14)
        assert_page_says("very easy background", "slip 4", "slip 4, rounded")

    def test_the_ratio_of_the_losses_depends_on_the_probability_of_the_truth_alone(self):
        for truth, of_object, of_background in ((0.9, 400, 400 / 3), (0.1, 400 / 81, 400 / 243), (0.99, 4e4, 4e4 / 3)):
            assert ratio(truth, True) == pytest.approx(of_object, rel=1e-12)
            assert ratio(1 - truth, False, focal_of_tutorials) == pytest.approx(of_object, rel=1e-12)
            assert ratio(1 - truth, False) == pytest.approx(of_background, rel=1e-12)
        assert_page_says("ratios, very easy", "ratios, easy", "ratios, hard", "slip 5", "slip 5, rounded")


def test_hard_predictions_outweigh_a_thousand_times_as_many_easy_ones():
    truth = torch.cat((torch.full((100_000,), 0.9), torch.full((100,), 0.1))).double()
    labels = torch.zeros(len(truth), dtype=torch.int64)

    def easy_to_hard(**options: float) -> float:
        losses = ops.sigmoid_focal_loss(truth.logit()[:, None], labels, **options)[:, 0]
        return float(losses[:100_000].sum() / losses[100_000:].sum())

    assert easy_to_hard(alpha=-1, gamma=0) == pytest.approx(45.76, abs=0.005)
    assert easy_to_hard() == pytest.approx(0.565, abs=0.0005)
    subjects = [subject for subject in statements() if subject.startswith(("sum", "slip 6"))]
    assert len(subjects) == 9
    assert_page_says("many predictions", "weights", *subjects)


def test_losses_of_all_logits_are_accurate_and_finite():
    x = torch.cat((torch.linspace(-100, 100, 20_001), torch.tensor([-1e4, 1e4])))
    for target in (torch.zeros_like(x), torch.ones_like(x)):
        exact = ops.reference.sigmoid_focal_loss(x.double(), target.double())
        loss = ops.sigmoid_focal_loss(x, target)
        assert loss.isfinite().all()
        normal = exact >= torch.finfo(torch.float32).tiny
        assert ((loss.double() - exact).abs()[normal] < 1e-6 * exact[normal]).all()
        for dtype in (torch.float16, torch.bfloat16):
            rounded = x[x.abs() <= 100].to(dtype)
            in_float32 = ops.sigmoid_focal_loss(rounded.float(), target[: len(rounded)])
            half = ops.sigmoid_focal_loss(rounded, target[: len(rounded)])
            assert torch.equal(half, in_float32.to(dtype))
    logits = torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.sigmoid_focal_loss(x, torch.ones_like(x)), logits)
    assert_page_says("float32", "hopeless object")


class TestSpecialCases:
    X = torch.linspace(-8, 8, 65, dtype=torch.float64)

    @pytest.mark.parametrize("target", (0.0, 1.0))
    def test_without_gamma_and_alpha_it_is_the_binary_cross_entropy(self, target):
        targets = torch.full_like(self.X, target)
        expected = F.binary_cross_entropy_with_logits(self.X, targets, reduction="none")
        torch.testing.assert_close(ops.sigmoid_focal_loss(self.X, targets, alpha=-1, gamma=0), expected)
        torch.testing.assert_close(ops.sigmoid_focal_loss(self.X, targets, alpha=0.5, gamma=0), expected / 2)
        assert_page_says("half")

    def test_it_falls_as_the_probability_of_the_truth_grows_and_as_gamma_grows(self):
        from tools.pages.plots.focal_loss import GAMMAS, curve

        probability = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
        curves = torch.stack([curve(gamma, probability) for gamma in GAMMAS])
        assert GAMMAS[0] == 0 and GAMMAS[-1] == 5
        assert (curves.diff(dim=1) < 0).all() and (curves.diff(dim=0) < 0).all()
        torch.testing.assert_close(curves[0], -probability.log())


def test_ignored_anchors_count_nothing_and_an_image_of_background_is_divided_by_1():
    boxes = torch.tensor([[[0.0, 0, 10, 10]], [[0, 0, 0, 0]]])
    # The IoUs with the object of the first image are 1, 0.45 (ignored) and 0.
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 4.5, 10], [20, 20, 30, 30]])
    targets = ops.assign_targets(anchors, boxes, torch.zeros(2, 1, dtype=torch.int64), torch.tensor([1, 0]))
    assert targets.labels.tolist() == [[0, -2, -1], [-1, -1, -1]]
    logits = torch.randn(2, 3, 4, requires_grad=True)
    loss = ops.sigmoid_focal_loss(logits, targets.labels).sum(dim=(1, 2)) / targets.num_positive.clamp(min=1)
    loss.sum().backward()
    assert logits.grad is not None
    assert (logits.grad != 0).all(dim=2).tolist() == [[True, False, True], [True, True, True]]
    assert not logits.grad[0, 1].any()
    expected = loss_sum(logits[1], torch.zeros(3, 4))
    torch.testing.assert_close(loss[1], expected)
    one_hot = torch.eye(4)[:1]
    expected = loss_sum(logits[0, :1], one_hot) + loss_sum(logits[0, 2:], torch.zeros(1, 4))
    torch.testing.assert_close(loss[0], expected)


def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    return ops.sigmoid_focal_loss(logits, targets, reduction="sum")


def test_the_first_loss_of_an_image_without_objects_is_about_12():
    sizes = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]
    heads = [torch.full((1, 1, 1, 1), logit(PRIOR)).expand(1, 9 * 80, *size) for size in sizes]
    labels = torch.full((1, anchors_and_logits()[0]), -1)
    assert float(ops.dense_focal_loss(heads, labels, num_classes=80)) == pytest.approx(12.157, abs=5e-4)
    assert_page_says("bias", "logits", "first loss", "first loss without a bias", "far from the first loss")


def test_the_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 1 and blocks[0].count("assert") == 3
    exec(blocks[0], {})
    # The tolerance of the block is too large for the last digits of its numbers.
    assert f"torch.full((2, 5, 3), {logit(PRIOR):.6f}," in blocks[0]
    hard, easy = f"{ALPHA} * {1 - PRIOR}**{GAMMA:g} * {cross_entropy(PRIOR, True):.6f}", printed(focal(PRIOR, False))
    assert f"hard, easy = {hard}, {easy}\n" in blocks[0]


def test_every_number_is_computed():
    assert faults(prose(), list(statements().values())) == []


def test_every_wrong_digit_is_found():
    text, said = prose(), list(statements().values())
    positions = [at for number in NUMBER.finditer(text) for at in range(*number.span()) if text[at].isdigit()]
    assert len(positions) > 400
    for position in positions:
        wrong = f"{text[:position]}{(int(text[position]) + 5) % 10}{text[position + 1 :]}"
        assert faults(wrong, said), text[max(0, position - 30) : position + 10]


def test_the_figure_is_drawn(tmp_path):
    from PIL import Image

    from tools.pages.plots import focal_loss

    focal_loss.draw(tmp_path / "drawn.png")
    with Image.open(tmp_path / "drawn.png") as drawn, Image.open(focal_loss.FILE) as committed:
        assert drawn.size == committed.size
    assert focal_loss.FILE.relative_to(PAGE.parent).as_posix() in PAGE.read_text(encoding="utf-8")

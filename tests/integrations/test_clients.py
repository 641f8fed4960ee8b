"""The lines of docs/clients.md run, and their results equal the client's own on random boxes.

Scores are distinct, because the clients order equal scores differently: sahi by coordinates, supervision, kornia and
ultralytics by an unstable sort.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor

import retinanet_ops as ops

np = pytest.importorskip("numpy")
torchvision = pytest.importorskip("torchvision")

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the documents are only in the source tree")

DTYPES = (torch.float32, torch.float64)
SIZES = (0, 1, 50, 3000)


def sections() -> dict[str, str]:
    """Return the text of each section of the page by its title."""
    parts = re.split(r"^## (.*)\n", PAGE.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def versions() -> dict[str, str]:
    """Return the versions of each client for which the page claims to be right."""
    return dict(re.findall(r"^\| \[(\w+)\]\(#\w+\) \| `([^`]+)` \|", PAGE.read_text(), flags=re.MULTILINE))


def client(name: str, module: str = "") -> ModuleType:
    """Import a client, or skip the test if it is missing or has a version for which the page makes no claim."""
    # Packages such as opencv-python need libraries of the system.
    imported = pytest.importorskip(module or name.lower(), exc_type=ImportError)
    version = importlib.metadata.version(name)
    if version not in SpecifierSet(versions()[name]):
        pytest.skip(f"docs/clients.md is about {name} {versions()[name]}, not {version}")
    return imported


def run_lines(title: str, monkeypatch: pytest.MonkeyPatch, *assigned: tuple[Any, str], **names: Any) -> dict[str, Any]:
    """Run the code of a section and return the names that it defines. The test's end undoes its assignments."""
    for owner, name in assigned:
        monkeypatch.setattr(owner, name, vars(owner)[name])
    for block in re.findall(r"```python\n(.*?)```", sections()[title], flags=re.DOTALL):
        exec(block, names)
    return names


def random_boxes(count: int, side: int, dtype: torch.dtype = torch.float32, whole_pixels: bool = False) -> Tensor:
    """Return boxes [count, 4] with sides of 4 to 40 pixels. Of 1,000 in 200 x 200 pixels, NMS suppresses many."""
    sides, corner = 4 * 10 ** torch.rand(count, 2), torch.rand(count, 2) * side
    boxes = torch.cat((corner, corner + sides), dim=1).to(dtype)
    return boxes.round() if whole_pixels else boxes


def distinct_scores(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return ((torch.randperm(count) + 1) / (count + 1)).to(dtype)


def predictions(count: int, dtype: torch.dtype, classes: int = 5, whole_pixels: bool = False, side: int = 500) -> Any:
    """Return an array [count, 6] of corners, scores and class ids."""
    columns = (
        random_boxes(count, side, dtype, whole_pixels),
        distinct_scores(count, dtype)[:, None],
        torch.randint(0, classes, (count, 1)).to(dtype),
    )
    return torch.cat(columns, dim=1).numpy()


class TestPage:
    def test_each_client_of_the_table_has_a_section_with_code(self):
        assert set(versions()) == set(sections()) - {"Speed"}
        assert all("```python\n" in sections()[name] for name in versions())

    def test_each_client_is_tested_here(self):
        tested = {name for name in vars(sys.modules[__name__]) if name.startswith("Test")} - {"TestPage"}
        assert {name.lower() for name in versions()} == {name.removeprefix("Test").lower() for name in tested}


class TestSahi:
    @pytest.fixture
    def combine(self):
        client("sahi")
        from sahi.postprocess import backends, combine

        before = backends.get_postprocess_backend()
        backends.set_postprocess_backend("numpy")
        yield combine
        backends.set_postprocess_backend(before)

    @pytest.fixture
    def cases(self):
        return [predictions(n, d, whole_pixels=w) for n in SIZES for d in DTYPES for w in (False, True)]

    @pytest.mark.parametrize("metric", ("IOU", "IOS"))
    @pytest.mark.parametrize("name", ("nms", "batched_nms"))
    def test_kept_indices_are_sahis(self, monkeypatch, combine, cases, name, metric):
        thresholds = (0.3, 0.5, 0.0) if metric == "IOU" else (0.5,)
        calls = [(case, metric, threshold) for case in cases for threshold in thresholds]
        expected = [getattr(combine, name)(*call) for call in calls]
        names = run_lines("sahi", monkeypatch, (combine, "nms"), (combine, "batched_nms"))
        assert getattr(combine, name) is names[name]
        assert [names[name](*call) for call in calls] == expected
        assert any(50 < len(kept) < 2950 for kept in expected)

    @pytest.mark.parametrize("agnostic", (False, True))
    def test_postprocessing_uses_them(self, monkeypatch, combine, agnostic):
        from sahi.prediction import ObjectPrediction

        rows = predictions(200, torch.float32, side=100).tolist()
        objects = [
            ObjectPrediction(
                bbox=row[:4], score=row[4], category_id=int(row[5]), category_name="a", full_shape=[600, 600]
            )
            for row in rows
        ]
        postprocess = combine.NMSPostprocess(match_threshold=0.3, match_metric="IOU", class_agnostic=agnostic)
        expected = [p.score.value for p in postprocess(objects)]
        names = run_lines("sahi", monkeypatch, (combine, "nms"), (combine, "batched_nms"))
        calls = []
        name = "nms" if agnostic else "batched_nms"
        monkeypatch.setattr(combine, name, lambda *args, **kwargs: calls.append(1) or names[name](*args, **kwargs))
        assert [p.score.value for p in postprocess(objects)] == expected and calls == [1]
        assert 0 < len(expected) < len(objects)


class TestSupervision:
    @pytest.fixture
    def sv(self):
        return client("supervision")

    @pytest.fixture
    def names(self, sv, monkeypatch):
        from supervision.detection import core
        from supervision.metrics import detection as metrics

        return run_lines("supervision", monkeypatch, *self.assigned(core, metrics))

    @staticmethod
    def assigned(core: Any, metrics: Any) -> tuple[tuple[Any, str], ...]:
        replaced = ("box_non_max_suppression", "box_soft_non_max_suppression")
        return *((core, name) for name in replaced), (metrics, "box_iou_batch")

    @pytest.mark.parametrize("metric", ("IOU", "IOS"))
    @pytest.mark.parametrize("columns", (5, 6))
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_kept_boxes_are_supervisions(self, sv, names, dtype, columns, metric):
        for count in (0, 1, 50, 1000):
            rows = predictions(count, dtype)[:, :columns]
            call = rows, 0.4, sv.OverlapMetric(metric)
            keep = names["box_non_max_suppression"](*call)
            assert keep.dtype == bool and np.array_equal(keep, sv.box_non_max_suppression(*call))
        assert 100 < keep.sum() < 1000

    @pytest.mark.parametrize("metric", ("IOU", "IOS"))
    @pytest.mark.parametrize("columns", (5, 6))
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_lowered_scores_are_supervisions(self, sv, names, dtype, columns, metric):
        for count in (1, 50, 700):
            rows = predictions(count, dtype, side=200)[:, :columns]
            call = rows, 0.4, sv.OverlapMetric(metric)
            lowered, expected = names["box_soft_non_max_suppression"](*call), sv.box_soft_non_max_suppression(*call)
            assert lowered.dtype == (rows.dtype if metric == "IOU" else expected.dtype)
            # supervision adds the squares of IoUs, and the op multiplies factors.
            np.testing.assert_allclose(lowered, expected, rtol=1e-4, atol=1e-12)
        assert (expected < 0.9 * rows[:, 4]).sum() > 100

    @pytest.mark.parametrize("metric", ("IOU", "IOS"))
    @pytest.mark.parametrize("dtype", (*DTYPES, torch.int32))
    def test_matrices_are_supervisions(self, sv, names, dtype, metric):
        for m, n in ((0, 3), (3, 0), (40, 600)):
            boxes, others = (random_boxes(count, 100).to(dtype).numpy() for count in (m, n))
            call = boxes, others, sv.OverlapMetric(metric)
            got, expected = names["box_iou_batch"](*call), sv.box_iou_batch(*call)
            assert got.dtype == expected.dtype == np.float32 and got.shape == expected.shape
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
        assert (expected > 0.3).any()

    @pytest.mark.parametrize("agnostic", (False, True))
    def test_detections_use_them(self, sv, monkeypatch, agnostic):
        rows = predictions(400, torch.float32, side=150)
        detections = sv.Detections(xyxy=rows[:, :4], confidence=rows[:, 4], class_id=rows[:, 5].astype(int))
        expected = detections.with_nms(0.3, class_agnostic=agnostic)
        softly = detections.with_soft_nms(0.3, class_agnostic=agnostic)
        self.use_lines_only(monkeypatch)
        got = detections.with_nms(0.3, class_agnostic=agnostic)
        np.testing.assert_allclose(
            detections.with_soft_nms(0.3, class_agnostic=agnostic).confidence, softly.confidence, rtol=1e-4, atol=1e-12
        )
        assert (softly.confidence < detections.confidence).sum() > 100
        assert 0 < len(expected) < 400
        for name in ("xyxy", "confidence", "class_id"):
            assert np.array_equal(getattr(got, name), getattr(expected, name)), name

    def test_confusion_matrices_use_them(self, sv, monkeypatch):
        rows = predictions(100, torch.float32, classes=3)
        truth = sv.Detections(xyxy=rows[:, :4], class_id=rows[:, 5].astype(int))
        moved = rows[:, :4] + np.random.default_rng(0).normal(0, 2, (100, 4)).astype(np.float32)
        found = sv.Detections(xyxy=moved, confidence=rows[:, 4], class_id=np.roll(truth.class_id, 30))
        matrix = lambda: sv.ConfusionMatrix.from_detections([found], [truth], classes=list("abc")).matrix  # noqa: E731
        expected = matrix()
        self.use_lines_only(monkeypatch)
        assert np.array_equal(matrix(), expected) and (expected[:3, :3] > 0).sum() > 3

    @staticmethod
    def use_lines_only(monkeypatch: pytest.MonkeyPatch) -> None:
        """Run the page's lines, and make an overlap that supervision computes itself an error."""
        from supervision.detection import core
        from supervision.detection.utils import iou_and_nms
        from supervision.metrics import detection as metrics

        run_lines("supervision", monkeypatch, *TestSupervision.assigned(core, metrics))
        monkeypatch.setattr(iou_and_nms, "box_iou_batch", None)


class TestKornia:
    @pytest.fixture
    def kornia(self):
        return client("kornia")

    @pytest.fixture
    def names(self, kornia, monkeypatch):
        return run_lines("kornia", monkeypatch)

    @staticmethod
    def loss_and_gradient(criterion: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        leaf = logits.detach().requires_grad_()
        loss = criterion(leaf, targets)
        loss.sum().backward()
        return loss.detach(), leaf.grad

    @pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
    @pytest.mark.parametrize("alpha", (0.25, None))
    @pytest.mark.parametrize("gamma", (2.0, 1.5))
    @pytest.mark.parametrize("shape", ((6, 3), (2, 4, 16, 8)))
    def test_losses_and_gradients_are_kornias(self, monkeypatch, kornia, names, shape, gamma, alpha, reduction):
        options = {"alpha": alpha, "gamma": gamma, "reduction": reduction}
        logits, targets = torch.randn(shape) * 3, torch.randint(0, 2, shape).float()
        targets[0, 1] = -100  # kornia's default for targets to ignore
        theirs = kornia.losses.BinaryFocalLossWithLogits
        kinds = {}, {"pos_weight": 0.5 + torch.rand(shape[1])}, {"ignore_index": 0}
        wanted = [self.loss_and_gradient(theirs(**options, **kind), logits, targets) for kind in kinds[:2]]
        targets_of = [targets, targets, targets.clamp(min=0)]
        wanted.append(self.loss_and_gradient(theirs(**options, ignore_index=0), logits, targets_of[2]))
        monkeypatch.setattr(kornia.losses.focal, "binary_focal_loss_with_logits", None)  # which kornia would call
        for kind, target, (loss, grad) in zip(kinds, targets_of, wanted, strict=True):
            got = self.loss_and_gradient(names["OpsFocalLoss"](**options, **kind), logits, target)
            torch.testing.assert_close(got[0], loss, rtol=1e-5, atol=1e-8)
            torch.testing.assert_close(got[1], grad, rtol=0, atol=1e-5 * float(grad.abs().max()))

    def test_weights_of_classes_are_kornias_own(self, kornia, names):
        logits, targets = torch.randn(2, 3, 8, 8), torch.randint(0, 2, (2, 3, 8, 8)).float()
        options = {"alpha": 0.25, "weight": torch.rand(3)}
        criterion, expected = (c(**options) for c in (names["OpsFocalLoss"], kornia.losses.BinaryFocalLossWithLogits))
        assert torch.equal(criterion(logits, targets), expected(logits, targets))

    def test_class_ids_equal_one_hot_targets(self, names):
        logits, classes = torch.randn(2, 4, 9, 7), torch.randint(-1, 4, (2, 9, 7))
        one_hot = (classes[:, None] == torch.arange(4)[:, None, None]).float()
        criterion = names["OpsFocalLoss"](alpha=0.25, reduction="none", ignore_index=None)
        got = names["focal_loss_of_classes"](logits, classes)
        torch.testing.assert_close(got, criterion(logits, one_hot).sum((1, 2, 3)), rtol=1e-5, atol=0)

    @pytest.mark.parametrize("count", (0, 1, 600))
    def test_calls_of_the_table_are_kornias(self, kornia, count):
        import kornia.metrics

        names = {"kornia": kornia, "ops": ops, "boxes": random_boxes(count, 200), "scores": distinct_scores(count)}
        names["others"] = random_boxes(30, 200)
        rows = re.findall(r"^\| `(kornia[^`]+)` \| `(ops[^`]+)` \|", sections()["kornia"], flags=re.MULTILINE)
        assert len(rows) == 2
        for theirs, ours in rows:
            got = eval(ours, names)
            torch.testing.assert_close(got, eval(theirs, names), rtol=0, atol=1e-6, msg=ours)
            assert count < 600 or len(got) == 600 or 50 < len(got) < 580

    def test_face_detector_uses_the_nms_of_its_attribute(self, monkeypatch, kornia):
        from kornia.contrib import face_detection

        untrained = face_detection.YuNet
        # The weights would have to be downloaded.
        monkeypatch.setattr(face_detection, "YuNet", lambda phase, pretrained: untrained(phase, pretrained=False))
        detector = kornia.contrib.FaceDetector(confidence_threshold=0.0, nms_threshold=0.3).eval()
        images = torch.rand(1, 3, 96, 128) * 255
        with torch.no_grad():
            expected = detector(images)[0]
            called = []
            detector.nms = lambda *args: called.append(ops.nms(*args)) or called[0]
            got = detector(images)[0]
        assert len(called) == 1 and 1 < len(called[0]) == len(got)
        # kornia sorts by score without keeping the order of equal scores.
        assert sorted(got.tolist()) == sorted(expected.tolist())


class TestTorchmetrics:
    @pytest.mark.parametrize("kind", ("intersection_over_union", "generalized", "distance", "complete"))
    def test_metrics_agree(self, monkeypatch, kind):
        client("torchmetrics", "torchmetrics.functional.detection")
        from torchmetrics.functional import detection as metrics

        function = getattr(metrics, kind if "_" in kind else f"{kind}_intersection_over_union")
        preds = random_boxes(80, 100)
        target = preds + torch.randn(80, 4)
        calls = [{"aggregate": aggregate, "iou_threshold": t} for aggregate in (False, True) for t in (None, 0.4)]
        expected = [function(preds, target, **options) for options in calls]
        replaced = {f"{prefix}box_iou": [] for prefix in ("", "generalized_", "distance_", "complete_")}
        run_lines("torchmetrics", monkeypatch, *((torchvision.ops, name) for name in replaced))
        assert all(getattr(torchvision.ops, name) is getattr(ops, name) for name in replaced)
        for options, wanted in zip(calls, expected, strict=True):
            torch.testing.assert_close(function(preds, target, **options), wanted, rtol=0, atol=1e-5)


class TestUltralytics:
    @pytest.fixture(autouse=True)
    def installed(self):
        client("ultralytics")

    @staticmethod
    def run(monkeypatch: pytest.MonkeyPatch) -> None:
        from ultralytics.models.yolo.detect import val
        from ultralytics.utils.nms import TorchNMS

        run_lines("ultralytics", monkeypatch, (torchvision.ops, "nms"), (TorchNMS, "nms"), (val, "box_iou"))

    def test_nms_and_matrices_are_ultralytics(self, monkeypatch):
        from ultralytics.models.yolo.detect import val
        from ultralytics.utils.nms import TorchNMS

        cases = [(random_boxes(n, 300), distinct_scores(n)) for n in (0, 1, 500)]
        others = random_boxes(20, 300)
        expected = [TorchNMS.nms(*case, 0.4) for case in cases], [val.box_iou(others, boxes) for boxes, _ in cases]
        self.run(monkeypatch)
        assert TorchNMS.nms is torchvision.ops.nms is ops.nms and val.box_iou is ops.box_iou
        got = [TorchNMS.nms(*case, 0.4) for case in cases], [val.box_iou(others, boxes) for boxes, _ in cases]
        torch.testing.assert_close(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1], rtol=0, atol=1e-6)
        assert 50 < len(got[0][-1]) < 480

    @pytest.mark.parametrize("agnostic", (False, True))
    def test_non_max_suppression_of_a_batch(self, monkeypatch, agnostic):
        from ultralytics.utils.nms import non_max_suppression

        corners = random_boxes(2 * 400, 80).view(2, 400, 4)
        centre, size = (corners[..., :2] + corners[..., 2:]) / 2, corners[..., 2:] - corners[..., :2]
        classes = torch.nn.functional.one_hot(torch.randint(0, 3, (2, 400)), 3)
        scores = distinct_scores(2 * 400).view(2, 400, 1) * classes
        prediction = torch.cat((centre, size, scores), dim=2).transpose(1, 2)  # [2, 4 + 3, 400]
        call = lambda: non_max_suppression(prediction.clone(), 0.25, 0.45, agnostic=agnostic)  # noqa: E731
        expected = call()
        self.run(monkeypatch)
        for got, wanted in zip(call(), expected, strict=True):
            assert torch.equal(got, wanted) and 20 < len(got) < 300


class TestLibreyolo:
    PROGRAM = """
import re, sys
import torch

if sys.argv[1] == "ours":
    section = open(sys.argv[2]).read().split("\\n## libreyolo\\n")[1]
    exec(re.search(r"```python\\n(.*?)```", section, flags=re.DOTALL)[1])
from libreyolo.postprocess import common, retinanet

torch.manual_seed(0)
sides, corner = 4 * 10 ** torch.rand(900, 2), torch.rand(900, 2) * 200
boxes, scores = torch.cat((corner, corner + sides), dim=1), (torch.randperm(900) + 1) / 901
found = common.postprocess_detections(boxes, scores, torch.randint(0, 4, (900,)), conf_thres=0.1, iou_thres=0.4)
print(retinanet.batched_nms.__module__, found["num_detections"], [list(map(float, box)) for box in found["boxes"]])
"""

    def test_detections_are_libreyolos(self):
        client("libreyolo", "libreyolo.postprocess.common")
        runs = {}
        for case in ("ours", "theirs"):
            # A process of its own, because modules of libreyolo import torchvision's functions by name.
            command = [sys.executable, "-W", "ignore", "-c", self.PROGRAM, case, str(PAGE)]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            runs[case] = run.stdout.split(maxsplit=2)
        assert runs["ours"][0] == "retinanet_ops.nms" and runs["theirs"][0] == "torchvision.ops.boxes"
        assert runs["ours"][1:] == runs["theirs"][1:] and 100 < int(runs["ours"][1]) < 800


class TestRfdetr:
    @pytest.mark.parametrize("alpha", (0.25, -1.0))
    def test_losses_and_gradients_are_rfdetrs(self, monkeypatch, alpha):
        client("rfdetr", "rfdetr.models.criterion")
        from rfdetr.models import criterion
        from rfdetr.utilities import box_ops

        logits, targets = torch.randn(2, 300, 7) * 3, (torch.rand(2, 300, 7) < 0.05).float()
        pairs, num_boxes = (random_boxes(40, 100), random_boxes(40, 100)), torch.tensor(11.0)

        def losses() -> list[Tensor]:
            x, boxes = logits.clone().requires_grad_(), pairs[0].clone().requires_grad_()
            focal = criterion.sigmoid_focal_loss(x, targets, num_boxes, alpha=alpha, gamma=2)
            giou = box_ops.elementwise_generalized_box_iou(boxes, pairs[1])
            (focal + (1 - giou).sum()).backward()
            return [focal.detach(), giou.detach(), x.grad, boxes.grad]

        expected = losses()
        assigned = (criterion, "sigmoid_focal_loss"), (box_ops, "elementwise_generalized_box_iou")
        names = run_lines("rfdetr", monkeypatch, *assigned)
        assert criterion.sigmoid_focal_loss is names["sigmoid_focal_loss"]
        for got, wanted in zip(losses(), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))

    def test_the_criterion_uses_them(self, monkeypatch):
        client("rfdetr", "rfdetr.models.criterion")
        from rfdetr.models import criterion
        from rfdetr.utilities import box_ops

        called = []
        assigned = (criterion, "sigmoid_focal_loss"), (box_ops, "elementwise_generalized_box_iou")
        run_lines("rfdetr", monkeypatch, *assigned)
        for owner, name in assigned:
            own = getattr(owner, name)
            monkeypatch.setattr(
                owner, name, lambda *args, name=name, own=own, **k: called.append(name) or own(*args, **k)
            )
        outputs = {"pred_logits": torch.randn(1, 20, 5), "pred_boxes": torch.rand(1, 20, 4) * 0.3 + 0.3}
        targets = [{"labels": torch.tensor([1, 3]), "boxes": torch.rand(2, 4) * 0.3 + 0.3}]
        indices = [(torch.tensor([4, 9]), torch.tensor([0, 1]))]
        losses = criterion.SetCriterion(5, None, {}, 0.25, ["labels", "boxes"])
        for compute in (losses.loss_labels, losses.loss_boxes):
            compute(outputs, targets, indices, torch.tensor(2.0))
        assert called == ["sigmoid_focal_loss", "elementwise_generalized_box_iou"]


class TestLsnms:
    @pytest.mark.parametrize("classes", (None, 4))
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_kept_indices_are_those_of_lsnms(self, monkeypatch, dtype, classes):
        lsnms = client("lsnms")
        nms = run_lines("lsnms", monkeypatch)["nms"]
        for count in (1, 50, 3000):
            boxes, scores = random_boxes(count, 200, dtype).numpy(), distinct_scores(count, dtype).numpy()
            ids = None if classes is None else torch.randint(0, classes, (count,)).numpy()
            options = {"iou_threshold": 0.4, "score_threshold": float(scores.mean()), "class_ids": ids}
            got = nms(boxes, scores, **options)
            assert got.dtype == np.int64 and got.tolist() == lsnms.nms(boxes, scores, **options).tolist()
        assert 50 < len(got) < 1450

    def test_boxes_at_the_thresholds(self, monkeypatch):
        lsnms = client("lsnms")
        nms = run_lines("lsnms", monkeypatch)["nms"]
        boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 5], [20, 20, 30, 30]], dtype=np.float32)  # an IoU of 0.5
        scores = np.array([0.75, 0.5, 0.25], dtype=np.float32)
        for options in ({"iou_threshold": 0.5}, {"iou_threshold": 0.51}, {"score_threshold": 0.5}):
            assert nms(boxes, scores, **options).tolist() == lsnms.nms(boxes, scores, **options).tolist()
        assert nms(boxes, scores, 0.5).tolist() == [0, 2] and nms(boxes, scores, 0.51).tolist() == [0, 1, 2]


class TestDeepForest:
    @pytest.fixture
    def m(self, monkeypatch):
        main = client("DeepForest", "deepforest.main")
        detection = torchvision.models.detection
        original = detection.retinanet_resnet50_fpn
        # The weights would have to be downloaded.
        monkeypatch.setattr(
            detection, "retinanet_resnet50_fpn", lambda weights: original(weights=None, weights_backbone=None)
        )
        options = {"model": {"name": None}, "num_classes": 1, "label_dict": {"Tree": 0}, "score_thresh": 0.005}
        m = main.deepforest(config_args={**options, "workers": 0, "accelerator": "cpu"})
        torch.nn.init.normal_(m.model.head.classification_head.cls_logits.weight, std=0.02)  # spreads the scores
        m.model.transform.min_size = (256,)
        return m

    @pytest.fixture
    def accelerated(self, m, monkeypatch):
        from deepforest import predict

        return lambda: run_lines("DeepForest", monkeypatch, (predict, "nms"), m=m)

    def test_losses_and_predictions_are_the_models_own(self, m, accelerated):
        image = torch.rand(3, 200, 200)
        targets = [{"boxes": torch.tensor([[10.0, 10, 40, 50], [60, 80, 120, 110]]), "labels": torch.tensor([0, 0])}]
        pixels = (image.permute(1, 2, 0).numpy() * 255).astype("float32")

        def results():
            m.model.train()
            m.model.backbone.eval()  # batch norm would change its statistics
            losses = m.model([image], targets)
            return losses, m.predict_image(image=pixels)

        losses, found = results()
        accelerated()
        assert type(m.model).__name__ == "AcceleratedRetinaNetHub"
        got, got_found = results()
        torch.testing.assert_close(got, losses, rtol=1e-5, atol=0)
        assert len(found) == len(got_found) > 5
        columns = ["xmin", "ymin", "xmax", "ymax", "score"]
        np.testing.assert_allclose(got_found[columns].to_numpy(), found[columns].to_numpy(), rtol=0, atol=1e-5)

    def test_tiles_are_joined_by_our_nms(self, m, accelerated):
        from deepforest import predict

        boxes, scores = random_boxes(300, 200), distinct_scores(300)
        call = boxes, scores, torch.zeros(300, dtype=torch.int64), 0.15
        expected = predict.apply_nms(*call)
        accelerated()
        assert predict.nms is ops.nms
        assert predict.apply_nms(*call).equals(expected) and 5 < len(expected) < 290

    def test_models_that_are_built_anew_are_not_accelerated(self, m, accelerated, tmp_path):
        accelerated()
        m.create_trainer()
        m.trainer.strategy.connect(m)
        m.trainer.save_checkpoint(tmp_path / "m.ckpt")
        assert type(m.model).__name__ == "AcceleratedRetinaNetHub"
        loaded = type(m).load_from_checkpoint(tmp_path / "m.ckpt", weights_only=False)
        m.create_model()
        assert type(loaded.model).__name__ == type(m.model).__name__ == "RetinaNetHub"

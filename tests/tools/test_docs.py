"""The documentation matches the code: examples run, commands parse, links resolve, and no option is missing."""

import doctest
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="the documents are only in the source tree")

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "csrc").glob("*.md")])


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def python_block(page: str, mark: str) -> str:
    """Return the first Python block of a page that contains the mark."""
    return next(block for block in python_blocks(page) if mark in block)


def tensors(value) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [tensor for item in value for tensor in tensors(item)]


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> str:
    try:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3, check_dtype=False)
    except AssertionError as error:
        return str(error)
    return ""


def commands() -> list[str]:
    """Return the indented command lines of all pages, without comments; a line of several commands is split."""
    lines = []
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for line in re.findall(
            r"^ {4}((?:retinanet|make|pip|python|torchrun|accelerate) .*)$", text, flags=re.MULTILINE
        ):
            lines += [part.strip() for part in re.sub(r"\s#.*", "", line).split("&&")]
    return lines


class TestExamples:
    def test_ops_from_heads_to_detections(self):
        names: dict = {}
        exec(python_block("docs/quickstart.md", "import retinanet_ops as ops"), names)
        assert names["loss"].isfinite() and all(level.grad is not None for level in names["logits"])
        assert (names["detections"].count > 0).all()

    @pytest.fixture
    def small_torchvision_model(self, monkeypatch):
        detection = pytest.importorskip("torchvision.models.detection")
        small = partial(detection.retinanet_resnet50_fpn_v2, weights_backbone=None, min_size=64, max_size=64)
        monkeypatch.setattr(detection, "retinanet_resnet50_fpn_v2", small)
        return detection

    def test_accelerate(self, tmp_path, small_torchvision_model):
        target = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1])}
        names = {"images": [torch.rand(3, 64, 64)], "targets": [target], "path": tmp_path / "model.pt"}
        exec(python_block("docs/quickstart.md", "accelerate("), names)
        assert names["losses"]["classification"].requires_grad and len(names["detections"]) == 1
        assert type(torch.load(names["path"], weights_only=False)) is small_torchvision_model.RetinaNet

    def test_retinanet(self):
        target = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([0])}
        names = {"images": [torch.rand(3, 64, 64)], "targets": [target]}
        exec(
            python_block("docs/quickstart.md", "RetinaNetConfig(").replace('"resnet18"', '"resnet18", min_size=(64,)'),
            names,
        )
        assert names["losses"]["bbox_regression"].requires_grad and len(names["detections"]) == 1

    def test_detection(self, tmp_path, monkeypatch, capsys):
        pytest.importorskip("torchvision")
        from PIL import Image
        from synthetic import tiny_config

        from retinanet import RetinaNet, save_model

        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs" / "mine").mkdir(parents=True)
        model = RetinaNet(tiny_config(prior_probability=0.6, nms_threshold=0.2))
        save_model(tmp_path / "runs" / "mine" / "best.safetensors", model)
        Image.new("RGB", (96, 64), (90, 90, 90)).save("orthophoto.tif")
        exec(python_block("docs/detection.md", "detect_image("), {})
        assert re.match(r"(red|blue) 0\.\d\d \[", capsys.readouterr().out)

    def test_readme(self, small_torchvision_model):
        names: dict = {}
        for block in python_blocks("README.md"):
            exec(block, names)
        assert type(names["model"]) is not small_torchvision_model.RetinaNet
        assert names["logits"].grad.isfinite().all()

    def test_ops_equal_the_code_that_they_replace(self):
        pytest.importorskip("torchvision")
        torch.manual_seed(0)
        names: dict = {}
        first, *sections = re.split(r"^### ", (ROOT / "docs" / "generated" / "gallery.md").read_text(), flags=re.M)
        exec(re.findall(r"```python\n(.*?)```", first, re.DOTALL)[0], names)
        for section in sections:
            plain, ours = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
            exec(plain, names)
            exec(ours, names)
            title = section.partition("\n")[0]
            for theirs, ours in zip(tensors(names["plain"]), tensors(names["ours"]), strict=True):
                assert theirs.numel() > 0 and theirs.any(), title
                assert difference(ours, theirs) == "", title


class TestComingFrom:
    PAGE = "docs/coming-from.md"

    def rows(self) -> list[tuple[str, str, str]]:
        """Return project, its call and our call of every row of the tables of calls."""
        found = []
        for section in re.split(r"^## ", (ROOT / self.PAGE).read_text(), flags=re.MULTILINE)[1:]:
            project = section.splitlines()[0]
            found += [
                (project, *calls) for calls in re.findall(r"^\| `([^|]+)` \| `([^|]+)` \|", section, re.MULTILINE)
            ]
        return found

    @pytest.fixture
    def names(self) -> dict:
        names: dict = {}
        exec(python_blocks(self.PAGE)[0], names)
        return names

    def test_every_call_runs(self, names):
        rows = self.rows()
        assert len(rows) > 30 and len({project for project, *_ in rows}) == 4
        table_lines = re.findall(r"^\| .*`ops\.\w+.*$", (ROOT / self.PAGE).read_text(), flags=re.MULTILINE)
        assert len(table_lines) == len(rows)
        for _, _, call in rows:
            eval(call, names)

    def test_calls_equal_torchvisions(self, names):
        torchvision = pytest.importorskip("torchvision")
        from torchvision.models.detection import _utils, anchor_utils, image_list

        images = image_list.ImageList(torch.zeros(1, 3, 96, 128), [(96, 128)])
        names |= vars(_utils) | vars(anchor_utils) | {"torchvision": torchvision, "images": images}
        names["features"] = [torch.zeros(1, 1, *size) for size in names["grid_sizes"]]
        calls = [(theirs, ours) for project, theirs, ours in self.rows() if project == "torchvision"]
        assert len(calls) > 10
        for theirs, ours in calls:
            expected, got = eval(theirs, names), eval(ours, names)
            assert len(expected.shape) == 0 or len(expected) > 0
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, check_dtype=False, msg=ours)

    def test_accelerate(self):
        detection = pytest.importorskip("torchvision.models.detection")
        names: dict = {}
        exec(python_block(self.PAGE, "accelerate("), names)
        assert isinstance(names["model"], detection.RetinaNet) and type(names["model"]) is not detection.RetinaNet

    def test_non_max_suppression_of_ultralytics(self, names):
        exec(python_block(self.PAGE, "def non_max_suppression"), names)
        assert names["index"].shape == (1, 300) and names["count"].tolist() == [1]
        assert names["index"][0, :2].tolist() == [0, -1]
        prediction = torch.cat((names["prediction"], names["prediction"] + 200), dim=2)
        prediction[:, 4:] = torch.tensor([[0.9, 0.1, 0.2, 0.1], [0.1, 0.8, 0.2, 0.4]])
        index, count = names["non_max_suppression"](prediction)
        assert count.tolist() == [3] and index[0, :3].tolist() == [0, 1, 3]  # another class, and a score below 0.25


class TestDocstrings:
    @pytest.mark.parametrize("name", ["FCOS", "SSD", "FasterRCNN", "RetinaNet"])
    def test_examples_run(self, name):
        pytest.importorskip("torchvision")
        import retinanet

        examples = doctest.DocTestParser().get_examples(getattr(retinanet, name).__doc__)
        source = "".join(example.source for example in examples)
        # The networks see small images.
        source = re.sub(r'backbone="(resnet\d+)"', r'backbone="\1", min_size=(64,), max_size=64', source)
        names = {"torch": torch} | {public: getattr(retinanet, public) for public in retinanet.__all__}
        exec(source, names)
        assert set(names["losses"]) == set(getattr(retinanet, name).loss_names)
        assert [set(found) for found in names["detections"]] == [{"boxes", "scores", "labels"}] * 2


class TestProjectFiles:
    def test_versions_agree(self):
        version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)[1]
        citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
        assert citation["version"] == version and citation["license"] == "BSD-3-Clause"
        assert re.search(rf"^## {re.escape(version)} ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)

    def test_issue_forms_ask_for_what_is_needed(self):
        for form in ("bug", "feature"):
            content = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml").read_text())
            assert {"name", "description", "body"} <= set(content) <= {"name", "description", "body", "labels"}
            assert len({field["id"] for field in content["body"]}) == len(content["body"])
            for field in content["body"]:
                assert field["type"] == "textarea"
                assert {"label"} <= set(field["attributes"]) <= {"label", "description", "render"}
                assert field.get("validations", {"required": True}) == {"required": True}

    def test_versions_that_ci_tests_are_those_of_the_scripts(self):
        script = (ROOT / "tools" / "check_wheel.sh").read_text()
        older = re.findall(r"([\d.]+):\w+", re.search(r"set -- (.*)", script)[1])
        page = (ROOT / "docs" / "compatibility.md").read_text()
        section = page.partition("## torch")[2].partition("\n## ")[0]
        assert re.findall(r"^\| ([\d.]+) \|.*tested by CI", section, flags=re.MULTILINE) == older


class TestReferences:
    def test_every_deviation_has_its_test(self):
        named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "deviations.md").read_text()))
        tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
        assert len(named) > 25
        assert {name for name in named if f"def {name}(" not in tests} == set()

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
    def test_links_lead_to_files_and_headings(self, page):
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text()):
            path = (page.parent / target).resolve() if target else page
            assert path.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
                slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in slugs, f"{page.name}: {target}#{anchor}"

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
    def test_files_that_are_named_exist(self, page):
        folders = "csrc|retinanet|retinanet_ops|tests|tools|benchmarks|docs"
        named = set(re.findall(rf"`((?:{folders})/[\w./-]+)`", page.read_text()))
        # `my_op` stands for an op that the reader adds.
        missing = [name for name in named if not (ROOT / name).exists() and "my_op" not in name]
        assert missing == []


class TestCommands:
    def test_pages_have_commands(self):
        assert len(commands()) > 12

    def test_make_targets_exist(self):
        makefile = (ROOT / "Makefile").read_text()
        text = "\n".join(page.read_text() for page in PAGES)
        named = set(re.findall(r"`make ([\w-]+)", text)) | {c.split()[1] for c in commands() if c.startswith("make ")}
        assert "test" in named
        targets = set(re.findall(r"^([\w -]+):", makefile, flags=re.MULTILINE))
        targets = {target for group in targets for target in group.split()}
        assert named - targets == set()

    def test_retinanet_commands_parse(self):
        pytest.importorskip("torchvision")
        from retinanet.cli.main import build_parser

        # A launcher starts the same commands.
        lines = [re.sub(r"^(torchrun|accelerate) .* -m retinanet ", "retinanet ", line) for line in commands()]
        lines = [line for line in lines if line.startswith("retinanet ") and "..." not in line]
        complete = [line for line in lines if not re.search(r"\b[A-Z]{3,}\b|\[", line)]
        assert len(complete) >= 6
        for line in complete:
            build_parser().parse_args(shlex.split(line)[1:])

    def test_training_page_lists_every_option_with_its_default(self):
        pytest.importorskip("torchvision")
        from retinanet import FasterRCNNConfig, FCOSConfig, RetinaNetConfig, SSDConfig, TrainOptions
        from retinanet.cli.main import build_parser
        from retinanet.data import TrainTransform

        page = (ROOT / "docs" / "training.md").read_text()
        rows = {}
        for names, default in re.findall(r"^\| (`--[^|]*) \|([^|]*)\|", page, flags=re.MULTILINE):
            rows |= dict.fromkeys(re.findall(r"--([\w-]+)", names), default.strip())
        (commands_action,) = (a for a in build_parser()._actions if a.choices and "train" in a.choices)
        options = {
            name.removeprefix("--")
            for action in commands_action.choices["train"]._actions
            for name in action.option_strings
            if name.startswith("--") and name != "--help"
        }
        assert set(rows) == options
        defaults = {"min_size": 800, "trainable_backbone_layers": None}
        models = (RetinaNetConfig(), SSDConfig(), FCOSConfig(), FasterRCNNConfig())
        for source in (*models, TrainOptions(), TrainTransform()):
            defaults = {**vars(source), **defaults}
        for name, default in rows.items():
            value = defaults.get(name.replace("-", "_"))
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                assert float(default) == value, name
            elif isinstance(value, str):
                assert default == f"`{value}`", name

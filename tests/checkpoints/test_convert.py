"""Converting other projects' checkpoints: reports, and one clear line for each error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import one_error, run
from convert_cases import random_state, resnet, resnet_shapes, small_state, torchvision_names
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50

from retinanet import RetinaNet, RetinaNetConfig, load_model
from retinanet.checkpoints.convert import PROJECTS, STYLES, convert_checkpoint
from retinanet.cli.main import build_parser
from retinanet.common.errors import DataError


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return small_state()


@pytest.fixture(scope="module")
def file(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model.pt"
    torch.save(state, path)
    return path


@pytest.mark.parametrize(("network", "depth"), [(resnet18, 18), (resnet50, 50)])
def test_the_resnet_of_these_tests_is_torchvisions(network: Any, depth: int) -> None:
    torch.manual_seed(0)
    theirs = network(weights=None).eval()
    state = random_state(resnet_shapes(torchvision_names(""), depth, counters=True))
    theirs.fc = nn.Identity()
    theirs.load_state_dict(state)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image)))))
        maps = resnet(state, torchvision_names(""), depth, image)
        for layer, got in zip((theirs.layer2, theirs.layer3, theirs.layer4), maps, strict=True):
            expected = layer(expected)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


class TestCommand:
    def test_converts_and_reports(self, state: dict[str, Tensor], file: Path, tmp_path: Path, capsys) -> None:
        (tmp_path / "names.txt").write_text("cat\n\n dog \n", encoding="utf-8")
        (tmp_path / "config.json").write_text('{"min_size": [64], "max_detections": 7}')
        classifier = {"fc.weight": torch.zeros(2), "fc.bias": torch.zeros(2)}
        torch.save({"state_dict": state | classifier}, tmp_path / "in.pt")
        out = tmp_path / "out.safetensors"
        options = ("--class-names", tmp_path / "names.txt", "--config", tmp_path / "config.json")
        assert run("convert", tmp_path / "in.pt", out, "--from", "yhenon", *options) == 0
        printed = capsys.readouterr().out.splitlines()
        assert printed == [
            f"{tmp_path / 'in.pt'}: {len(state)} tensors of yhenon used, 2 unused",
            "  unused: fc.weight and 1 more: the classifier of the backbone, which a detector does not use",
            "  resnet18, eval normalisation",
            "  P3 to P7, P6 from c5; heads of 4 convolutions",
            "  anchors of yhenon: 9 per position",
            "  scores above 0.05, NMS at IoU 0.5, at most 7 detections",
            "  2 classes: cat, dog",
            "  note: at most 10000 candidates per level and 10000 detections, whereas the original has no limit",
            f"{out}: written",
        ]
        model = load_model(out)
        assert model.config.class_names == ("cat", "dog") and model.config.min_size == (64,)
        ours = model.state_dict()
        assert torch.equal(ours["backbone.body.conv1.weight"], state["conv1.weight"])
        assert torch.equal(ours["head.classification_head.conv.2.0.bias"], state["classificationModel.conv3.bias"])
        # A second conversion writes the same bytes over the existing file.
        before = out.read_bytes()
        report = tmp_path / "report.json"
        assert run("convert", tmp_path / "in.pt", out, "--from", "yhenon", *options, "--report", report) == 0
        assert out.read_bytes() == before and not list(tmp_path.glob(".*"))
        assert capsys.readouterr().out.splitlines()[-1] == f"{report}: written"
        content = json.loads(report.read_text())
        assert content["mapped"].keys() == state.keys() and content["unused"].keys() == classifier.keys()
        assert content["mapped"]["conv1.weight"] == "backbone.body.conv1.weight" and len(content["notes"]) == 1

    @pytest.mark.parametrize("wrapper", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
    def test_names_of_wrapped_models(self, state: dict[str, Tensor], tmp_path: Path, wrapper: str) -> None:
        torch.save({f"{wrapper}{name}": value for name, value in state.items()}, tmp_path / "in.pt")
        assert convert_checkpoint(tmp_path / "in.pt", "yhenon")[1].mapped.keys() == state.keys()

    def test_projects_and_styles_are_those_of_the_library(self) -> None:
        for project in PROJECTS:
            for style in STYLES:
                arguments = ["convert", "a", "b", "--from", project, "--style", style]
                assert build_parser().parse_args(arguments).project == project

    def test_wrong_usage(self, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "out.safetensors"
        assert run("convert", file, out) == 2 and run("convert", file, out, "--from", "keras") == 2
        assert run("convert", file, out, "--from", "torchvision", "--classes", 79) == 2
        capsys.readouterr()
        for arguments, message in (
            (
                (file, tmp_path / "out.pth"),
                f"{tmp_path}/out.pth: expected an output file name that ends in .safetensors",
            ),
            (
                (file, tmp_path / "no" / "a.safetensors"),
                f"{tmp_path}/no/a.safetensors: cannot be written: the folder {tmp_path}/no does",
            ),
            ((file, out, "--report", tmp_path), f"{tmp_path}: expected a file name for the output, got a folder"),
            (
                (file, out, "--style", "caffe"),
                "--style: expected only with --from detectron2 or mmdet, got --from yhenon",
            ),
        ):
            assert run("convert", *arguments, "--from", "yhenon") == 2
            assert one_error(capsys).startswith(message)
        save_file(small_state(), out)
        assert run("convert", out, out, "--from", "yhenon") == 2
        assert one_error(capsys).startswith(f"{out}: output would overwrite an input")
        before, fields = out.read_bytes(), tmp_path / "fields.json"
        fields.write_text("{}")
        (tmp_path / "link.json").hardlink_to(fields)
        new = tmp_path / "new.safetensors"
        for report in (out, tmp_path / "link.json", new, tmp_path / "." / "new.safetensors"):
            options = ("--from", "yhenon", "--config", fields, "--report", report)
            assert run("convert", out, new, *options) == 2
            assert one_error(capsys).startswith(f"{report}: output would overwrite")
        assert out.read_bytes() == before and fields.read_text() == "{}" and not new.exists()

    def test_wrong_data(self, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "out.safetensors"
        (tmp_path / "empty.txt").write_text("\n")
        (tmp_path / "list.json").write_text("[]")
        (tmp_path / "field.json").write_text('{"anchors": 9}')
        (tmp_path / "custom.json").write_text('{"backbone": "custom"}')
        for arguments, message in (
            ((tmp_path / "none.pt",), f"{tmp_path}/none.pt: no such file"),
            (
                (file, "--class-names", tmp_path / "empty.txt"),
                f"{tmp_path}/empty.txt: expected one class name per line",
            ),
            ((file, "--config", tmp_path / "list.json"), f"{tmp_path}/list.json: expected a JSON object"),
            ((file, "--config", tmp_path / "field.json"), f"{file}: anchors: no such field"),
            (
                (file, "--config", tmp_path / "custom.json"),
                f"{file}: backbone: expected the file's resnet18, got 'custom'",
            ),
            ((file, "--classes", 80), f"{file}: classes: expected 80 of torchvision's 91 classes"),
        ):
            source, *options = arguments
            assert run("convert", source, out, "--from", "yhenon", *options) == 3
            assert one_error(capsys).startswith(message)
        assert not out.exists()

    def test_class_names_that_are_not_utf8(self, file: Path, tmp_path: Path, capsys) -> None:
        (tmp_path / "names.txt").write_bytes(b"caf\xe9\n")
        options = ("--from", "yhenon", "--class-names", tmp_path / "names.txt")
        assert run("convert", file, tmp_path / "out.safetensors", *options) == 3
        assert one_error(capsys).startswith(f"{tmp_path}/names.txt: expected text in UTF-8")


class TestTensors:
    def check(self, path: Path, state: dict[str, Tensor], message: str, project: str = "yhenon") -> None:
        torch.save(state, path)
        with pytest.raises(DataError, match=message) as caught:
            convert_checkpoint(path, project)
        assert all(line.startswith(f"{path}: ") for line in str(caught.value).splitlines())

    def test_unknown_and_missing_tensors_are_errors(self, state: dict[str, Tensor], tmp_path: Path) -> None:
        path = tmp_path / "model.pt"
        zero = torch.zeros(1)
        self.check(path, {**state, "conv9.weight": zero}, "conv9.weight: not a tensor of this RetinaNet")
        # These names only begin like known ones.
        self.check(path, {**state, "layer1.0.se.weight": zero}, "layer1.0.se.weight: not a tensor of this RetinaNet")
        self.check(path, {**state, "fpn.P3_1.scale": zero}, "fpn.P3_1.scale: not a tensor of this RetinaNet")
        many = {f"extra.{i}": zero for i in range(11)}
        self.check(path, {**state, **many}, r"(?s)extra.7: not a tensor.*: and 3 more: not a tensor of this RetinaNet")
        lacking = {name: value for name, value in state.items() if not name.startswith("bn1.running")}
        self.check(path, lacking, r"backbone.body.bn1.running_mean: the file has no counterpart(?s:.*)running_var")
        for name, ours in (
            ("fpn.P5_1.weight", "backbone.fpn.inner_blocks.2.0.weight"),
            ("fpn.P6.weight", "backbone.fpn.extra_blocks.p6.weight"),
            ("fpn.P7_2.bias", "backbone.fpn.extra_blocks.p7.bias"),
            ("layer4.1.conv1.weight", "backbone.body.layer4.1.conv1.weight"),
            ("classificationModel.conv3.weight", "head.classification_head.conv.2.0.weight"),
            ("regressionModel.output.bias", "head.regression_head.bbox_reg.bias"),
        ):
            lacking = {key: value for key, value in state.items() if key != name}
            self.check(path, lacking, f"{ours}: the file has no counterpart of this tensor of the model$")
        self.check(path, {}, "not a RetinaNet of yhenon: the state dict has no classificationModel.output.weight$")
        self.check(path, state, "has no bbox_head.retina_cls.weight; the file has the layout of yhenon", "mmdet")

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            (
                "layer1.0.conv1.weight",
                torch.zeros(64, 64, 1, 1),
                r"expected shape \[64, 64, 3, 3\], got \[64, 64, 1, 1\]",
            ),
            ("layer1.0.conv2.weight", torch.zeros(64), r"expected the weight of a convolution, got shape \[64\]"),
            ("regressionModel.output.weight", torch.zeros(35, 8, 3, 3), "expected a multiple of 4 rows, got 35"),
            ("classificationModel.output.weight", torch.zeros(19, 8, 3, 3), "expected a multiple of 9 rows, got 19"),
            ("classificationModel.output.bias", torch.zeros(9), "expected 18 biases, one for each row, got 9"),
            ("bn1.running_var", torch.full((64,), torch.nan), "expected finite numbers, got NaN or infinity"),
            ("bn1.running_var", "much", "expected a tensor, got str"),
            (
                "bn1.running_var",
                {"a": torch.zeros(1)},
                "expected a tensor, got a dict; if it is the state dict, save it alone",
            ),
            ("bn1.running_var", torch.ones(64, dtype=torch.int8), "expected floating-point numbers, got torch.int8"),
            ("bn1.running_var", torch.ones(64, dtype=torch.cfloat), "expected .* real numbers, got one of .*complex64"),
            ("bn1.running_var", torch.ones(64).to_sparse(), "expected a dense tensor .*, got one of sparse_coo"),
            (
                "bn1.running_var",
                torch.quantize_per_tensor(torch.ones(64), 0.1, 0, torch.qint8),
                "expected a dense tensor of real numbers, got one of strided, qint8",
            ),
        ],
    )
    def test_unusable_tensors(
        self, state: dict[str, Tensor], tmp_path: Path, name: str, value: Any, message: str
    ) -> None:
        self.check(tmp_path / "model.pt", {**state, name: value}, f"{name}: {message}")

    def test_unknown_backbones(self, state: dict[str, Tensor], tmp_path: Path) -> None:
        deeper = {name.replace("layer3.1", "layer3.2"): v for name, v in state.items() if name.startswith("layer3.1")}
        self.check(tmp_path / "model.pt", {**state, **deeper}, r"expected one of resnet18, .* \(2, 2, 3, 2\) blocks")

    def test_two_tensors_with_one_name_in_the_model(self, tmp_path: Path) -> None:
        config = RetinaNetConfig(class_names=("a",), backbone="resnet18", fpn_channels=8, head_depth=1)
        state = RetinaNet(config).state_dict()
        state["backbone.fpn.inner_blocks.0.bias"] = state["backbone.fpn.inner_blocks.0.0.bias"]
        message = (
            "expected one tensor for backbone.fpn.inner_blocks.0.0.bias of the model, got this one and backbone.fpn."
        )
        self.check(tmp_path / "model.pt", state, message, "torchvision")


def test_wrong_arguments(file: Path) -> None:
    with pytest.raises(ValueError, match="project: expected one of torchvision, .* got 'keras'"):
        convert_checkpoint(file, "keras")
    with pytest.raises(
        ValueError, match="style: expected pytorch or caffe for detectron2 or mmdet, else None, got 'caffe' for yh"
    ):
        convert_checkpoint(file, "yhenon", style="caffe")

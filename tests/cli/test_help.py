"""Help and version of the command line: they need no torch, and the stated defaults are the real ones."""

import argparse
import dataclasses
import re
import subprocess
import sys

import pytest
from cli_cases import SUBPROCESS, run

from retinanet import FasterRCNNConfig, FCOSConfig, RetinaNetConfig, SSDConfig, TrainOptions
from retinanet.cli.main import build_parser
from retinanet.cli.train_arguments import MODELS, PYRAMIDS
from retinanet.data import TrainTransform
from retinanet.model.detector_config import CONFIG_CLASSES
from retinanet.model.ssd_config import NETWORKS

COMMANDS = (
    "sample",
    "sample trees",
    "sample stamps",
    "check",
    "tile",
    "train",
    "compare",
    "evaluate",
    "detect",
    "convert",
    "export",
)


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("retinanet-ops ")
    for command in ("", *COMMANDS):
        assert run(*command.split(), "--help") == 0
    assert "--resume" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_none_of_the_dependencies(command: str) -> None:
    program = """
import sys

for name in ("torch", "torchvision", "numpy", "PIL", "pycocotools", "matplotlib", "tqdm", "safetensors", "av"):
    sys.modules[name] = None  # Importing it raises ImportError.
from retinanet.cli.main import main

sys.exit(main([*sys.argv[1:], "--help"]))
"""
    arguments = [sys.executable, "-c", program, *command.split()]
    result = subprocess.run(arguments, env=SUBPROCESS, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: retinanet")


#: Options whose help explains the default in words.
EXPLAINED = {"lr", "anchor_sizes", "trainable_backbone_layers", "fpn_levels", "device"}


@pytest.mark.parametrize(
    ("record", "least"),
    [
        (RetinaNetConfig, 6),
        (FCOSConfig, 4),
        (FasterRCNNConfig, 4),
        (SSDConfig, 3),
        (TrainOptions, 6),
        (TrainTransform, 6),
    ],
)
def test_stated_defaults_of_train_are_those_of_the_dataclasses(record: type, least: int) -> None:
    defaults, helps = record(), helps_of_train()
    compared = 0
    for field in dataclasses.fields(record):
        stated = re.search(r"\(default: ([^()]*)\)", helps.get(field.name, ""))
        if stated and field.name not in EXPLAINED:
            assert stated[1] in shown(getattr(defaults, field.name)), field.name
            compared += 1
    assert compared >= least


def test_stated_models_and_detections_of_train() -> None:
    assert MODELS == (*PYRAMIDS, *NETWORKS)
    assert {*PYRAMIDS, "ssd"} == CONFIG_CLASSES.keys()
    stated = f"by default {RetinaNetConfig().max_detections} (SSD: {SSDConfig().max_detections}, "
    assert FCOSConfig().max_detections == FasterRCNNConfig().max_detections
    stated += f"FCOS and Faster R-CNN: {FCOSConfig().max_detections})"
    assert stated in helps_of_train()["max_detections"]


def helps_of_train() -> dict[str, str]:
    """Return the help of the options of `retinanet train`, by the name of the option's value."""
    commands = next(action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return {action.dest: action.help or "" for action in commands.choices["train"]._actions}


def shown(value: object) -> tuple[str, ...]:
    """Return the forms in which help may show a default: numbers separated by spaces, and None in words."""
    if value is None:
        return "none", "no average"
    values = value if isinstance(value, tuple) else (value,)
    return (" ".join(format(v, "g") if isinstance(v, float) else str(v) for v in values),)

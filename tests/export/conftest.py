"""A model and its exports, which the tests of the export share: those of the commands of docs/deploy.md."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from cli_cases import ROOT, make_data, run
from export_cases import make_model

from retinanet.model.detector import Detector
from retinanet.model.thresholds import ScoreThresholds

PAGE = ROOT / "docs" / "deploy.md"


@pytest.fixture(scope="session")
def model() -> Detector:
    """Return a model with the score thresholds that a training leaves."""
    model = make_model("retinanet")
    model.score_thresholds = ScoreThresholds(0.2, (0.2, None, 0.3))
    return model


@pytest.fixture(scope="session")
def deployed(model: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the commands `retinanet export` of docs/deploy.md have run, on a tiny model."""
    if not PAGE.exists():
        pytest.skip("the documents are only in the source tree")
    folder = tmp_path_factory.mktemp("deployed")
    make_data(folder / "photos", 3, model.config.class_names).rename(folder / "val.json")
    commands = re.findall(r"^    (retinanet export .*)$", PAGE.read_text(), flags=re.MULTILINE)
    assert len(commands) == 5
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # Files of models with a custom backbone, which is the quickest to compile, do not load from a command.
        patch.setattr("retinanet.checkpoints.model_file.load_model", lambda *_: model)
        for command in commands:
            assert run(*shlex.split(command)[1:], *(["--images", "photos"] if "val.json" in command else [])) == 0
    return folder

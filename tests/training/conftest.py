"""The data and the uninterrupted run that the tests of training share, and the number of their threads."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from synthetic import rectangles
from training_cases import OPTIONS, new_model, one_thread

from retinanet.data import DetectionDataset
from retinanet.training.run import train


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    return rectangles(tmp_path_factory.mktemp("training"), 5, size=80)


@pytest.fixture(scope="session")
def uninterrupted(data: DetectionDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of `OPTIONS` that nothing has stopped."""
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    with one_thread():  # A fixture of the session is made before those of a module.
        train(new_model(), data, data, OPTIONS, run_dir, progress=None)
    return run_dir

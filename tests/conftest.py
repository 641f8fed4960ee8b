"""The backend under test and the tolerances, for all tests of the ops."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--backend", default="cpu", choices=("cpu", "cuda"), help="the kernels that the tests run on")


def pytest_configure(config):
    # Whatever falls back to plain PyTorch would test the oracle against itself.
    config.addinivalue_line("filterwarnings", "error::retinanet_ops.FallbackWarning")
    if config.getoption("--backend") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--backend cuda needs a CUDA device, and torch sees none")


@pytest.fixture
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--backend"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

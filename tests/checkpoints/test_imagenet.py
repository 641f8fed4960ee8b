"""torchvision's ImageNet weights: downloaded once, checked, and an error that says what to do without a network."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from retinanet.checkpoints import imagenet
from retinanet.checkpoints.imagenet import imagenet_weights
from retinanet.common.errors import UsageError
from retinanet.model.ssd_config import SSDConfig


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Publish a file at a file:// address, with the beginning of its SHA-256 sum in its name as torchvision does."""
    content = b"weights"
    path = tmp_path / f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    path.write_bytes(content)
    weights = SimpleNamespace(url=path.as_uri())
    monkeypatch.setattr(imagenet, "get_model_weights", lambda name: {"IMAGENET1K_V1": weights})
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    return path


def test_weights_are_downloaded_once(published: Path, tmp_path: Path) -> None:
    path = imagenet_weights("resnet18")
    assert path == tmp_path / "cache" / "checkpoints" / published.name and path.read_bytes() == b"weights"
    published.unlink()
    assert imagenet_weights("resnet18") == path


def test_a_failed_download_names_address_and_remedy(published: Path) -> None:
    published.unlink()
    with pytest.raises(UsageError, match=rf"^{published.as_uri()}: cannot be downloaded to \S+ .*; download it elsewh"):
        imagenet_weights("resnet18")


def test_a_damaged_download_is_not_kept(published: Path, tmp_path: Path) -> None:
    published.write_bytes(b"something else")
    with pytest.raises(UsageError, match="invalid hash value"):
        imagenet_weights("resnet18")
    assert not list((tmp_path / "cache" / "checkpoints").iterdir())


def test_every_backbone_has_weights() -> None:
    from retinanet.model.pyramid_config import BACKBONE_STAGES

    for name in BACKBONE_STAGES:
        assert imagenet.get_model_weights(name)["IMAGENET1K_V1"].url.endswith(".pth")


def test_weights_of_vgg16_are_those_for_the_colours_of_ssd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = imagenet.get_model_weights("vgg16")["IMAGENET1K_FEATURES"]
    assert tuple(weights.transforms().mean) == SSDConfig(network="ssd300_vgg16").image_mean
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / weights.url.rpartition("/")[2]
    path.parent.mkdir()
    path.touch()
    assert imagenet_weights("vgg16") == path

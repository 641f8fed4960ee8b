"""torchvision's ImageNet weights of the backbones, downloaded once into torch's cache."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from urllib.parse import urlparse

import torch
from torchvision.models import get_model_weights

from retinanet.common.errors import UsageError, one_line

#: The word that stands for these weights where a file of weights is expected.
IMAGENET = "imagenet"


def imagenet_weights(backbone: str) -> Path:
    """Return the file of torchvision's first ImageNet weights of a backbone, and download it if it is not there.

    Args:
        backbone: torchvision's name of a network, such as `resnet50`.

    Raises:
        UsageError: The file cannot be downloaded.
    """
    # The images of this VGG16 are normalised as SSD does it.
    version = "IMAGENET1K_FEATURES" if backbone == "vgg16" else "IMAGENET1K_V1"
    url = get_model_weights(backbone)[version].url
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / os.path.basename(urlparse(url).path)
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # The name of the file holds the beginning of its SHA-256 sum.
            torch.hub.download_url_to_file(url, str(path), path.stem.rpartition("-")[2], progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:  # RuntimeError: the sum is wrong.
            raise UsageError(
                f"{url}: cannot be downloaded to {path} ({one_line(error)}); download it elsewhere and name the file"
            ) from error
    return path

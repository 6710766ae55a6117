"""Every Python with this folder on its PYTHONPATH downloads from the test's server.

The file that SERVED_DOWNLOADS names (JSON) says what torchvision's CIFAR-10 and its ResNets' ImageNet weights are there.
"""

import json
import os
from pathlib import Path

from kdutils.compat import ensure_torchvision


def download_from(cifar10, weights, replace=setattr):
    """Give torchvision's CIFAR-10 these attributes, and the ImageNet weights of these networks these addresses."""
    torchvision = ensure_torchvision()
    for name, value in cifar10.items():
        replace(torchvision.datasets.CIFAR10, name, value)
    for name, url in weights.items():
        replace(torchvision.models.get_model_weights(name).IMAGENET1K_V1.value, "url", url)


if "SERVED_DOWNLOADS" in os.environ:
    download_from(**json.loads(Path(os.environ["SERVED_DOWNLOADS"]).read_text(encoding="utf-8")))

"""Knowledge distillation from pre-trained ResNets into a small CNN: the helper package of the four notebooks."""

from kdutils.compat import ensure_torchvision

__version__ = "0.1.0"

ensure_torchvision()

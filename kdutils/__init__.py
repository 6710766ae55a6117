"""Knowledge distillation from pre-trained ResNets into a small CNN: the helper package of the four notebooks."""

__version__ = "0.2.0"

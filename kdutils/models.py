"""The student, and pretrained CNNs, each cut into a frozen part and a trained part."""

import copy
import functools
import itertools
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kdutils.settings import UserError
from kdutils.weights import head_of, seeded

# mean and standard deviation of ImageNet's channels (R, G, B), which torchvision's models expect
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalise(pixels: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Pixels [B, 3, H, W] from 0 to 255 as float32 of mean 0 and variance 1 over ImageNet; keeps the memory layout.

    mean, std: of each channel, from 0 to 1.
    """
    return (pixels.float() - _channels(tuple(mean), pixels.device)) / _channels(tuple(std), pixels.device)


@functools.lru_cache(maxsize=32)  # a copy in every step would make a GPU wait, and cannot be part of a CUDA graph
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(1, 3, 1, 1) * 255


class SmallCNN(nn.Module):
    """The student: two 3x3 convolutions, each with ReLU and 2x2 max-pooling, and two fully connected layers.

    Input: normalised images float [B, 3, 32, 32]; output: logits [B, num_classes]. 268,650 parameters at 10 classes.
    """

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, padding=1)
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(32 * 8 * 8, 128)
        self.fc2 = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        # ReLU after pooling gives the same numbers as before it, and works on a quarter of the values
        x = F.relu(self.pool1(self.conv1(x)))
        x = F.relu(self.pool2(self.conv2(x)))
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc2(x)


class Normalise(nn.Module):
    """`normalise` with a network's own mean and standard deviation."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)

    def forward(self, x: Tensor) -> Tensor:
        return normalise(x, self.mean, self.std)


class Resize(nn.Module):
    """Resizes float [B, 3, H, W] to `size` x `size`; `mode`: `bilinear`, `bicubic` or `nearest`."""

    def __init__(self, size: int, mode: str = "bilinear"):
        super().__init__()
        self.size, self.mode = size, mode

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] == (self.size, self.size):
            return x
        aligned = {} if self.mode == "nearest" else {"align_corners": False}
        return F.interpolate(x, (self.size, self.size), mode=self.mode, **aligned)


def cut(
    network: nn.Module,
    name: str,
    trainable: str,
    size: int,
    num_classes: int,
    seed: int,
    *,
    resize: str = "bilinear",
    standardize: bool = False,
) -> tuple[nn.Sequential, nn.Sequential]:
    """Cut a classifier into (frozen part, trained part); a new last layer `fc` for `num_classes` is drawn from `seed`.

    One after the other, they take pixels [B, 3, H, W] from 0 to 255, normalise them as the network wants it, resize
    them to `size` and give logits [B, num_classes]. `trainable` names the trained part: `last_layer`; `last_block`, all
    that works at the coarsest resolution, and the last layer; `all` (the frozen part is then empty). `standardize`
    gives the last layer features of mean 0 and variance 1 (a BatchNorm without weights). The parts share modules with
    the network. Raises `UserError` for a network whose last layer, or last block, is not known.
    """
    config = getattr(network, "pretrained_cfg", None) or {"mean": MEAN, "std": STD}
    head = head_of(network, name)
    features: int = network.get_submodule(head).in_features  # type: ignore[assignment]
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        normalise=Normalise(config["mean"], config["std"]), resize=Resize(size, resize), **_body(network, head)
    )
    if standardize:
        parts["standardize"] = nn.BatchNorm1d(features, affine=False)
    parts["fc"] = seeded(seed, nn.Linear, features, num_classes)
    first = {"last_layer": "standardize" if standardize else "fc", "all": "normalise"}.get(trainable)
    names = list(parts)
    at = names.index(first or _last_block(parts, name))
    frozen = nn.Sequential(OrderedDict((name, parts[name]) for name in names[:at]))
    trained = nn.Sequential(OrderedDict((name, parts[name]) for name in names[at:]))
    depthwise_in_float32(trained)
    return frozen.eval().requires_grad_(False), trained.requires_grad_(True)


def _body(network: nn.Module, head: str) -> dict[str, nn.Module]:
    """What comes before the last layer, as modules to be called one after the other. Of ResNets and EfficientNets of
    either library these are their own; any other network is one module."""
    if type(network).__name__ not in ("ResNet", "EfficientNet"):
        body = copy.deepcopy(network)
        parent, _, child = head.rpartition(".")
        setattr(body.get_submodule(parent), child, nn.Identity())
        return {"body": body, "flatten": nn.Flatten()}
    parts: dict[str, nn.Module] = {}
    for name, module in network.named_children():
        if name in ("features", "blocks"):
            parts |= {f"{name}{number}": stage for number, stage in module.named_children()}
        elif name != head.partition(".")[0]:
            parts[name] = module
    return {**parts, "flatten": nn.Flatten()}


def _last_block(parts: dict[str, nn.Module], name: str) -> str:
    """The first part at the coarsest resolution: the last that halves it."""
    if "body" in parts:
        raise UserError(
            f"teachers: the last block of {name} is not known (it is that of ResNets and EfficientNets); use "
            "trainable: last_layer"
        )
    halving = [part for part, module in parts.items() if any(map(_halves, module.modules()))]
    return halving[-1]


def _halves(module: nn.Module) -> bool:
    return getattr(module, "stride", None) in (2, (2, 2))  # of a convolution or a pooling


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """Fold every BatchNorm into the convolution before it, in place. For a frozen network in eval mode.

    "Before it" means in order of definition, as in ResNets and EfficientNets. timm's norms include an activation, which
    stays.
    """
    for parent in list(module.modules()):
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, getattr(norm, "act", nn.Identity()))
    return module


class InFloat32(nn.Conv2d):
    """A convolution which computes in float32 under a CPU's autocast; it gives values of its input's type."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).to(x.dtype)


def depthwise_in_float32(module: nn.Module) -> nn.Module:
    """Let every depthwise convolution compute in float32 on a CPU, in place; parameters keep their names.

    For a network that is trained with bfloat16 autocast, of which the rest stays in bfloat16: on a CPU, torch has no
    fast backward pass in bfloat16 for depthwise convolutions with a stride, or with filters larger than 3x3.
    """
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d) and conv.groups == conv.in_channels > 1 and not isinstance(conv, InFloat32):
            conv.__class__ = type(type(conv).__name__, (InFloat32, type(conv)), {})
    return module

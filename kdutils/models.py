"""The student, and pretrained ResNets, each cut into a frozen part and a trained part."""

import hashlib
import itertools
import json
from collections import OrderedDict
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kdutils.cache import network_timeout
from kdutils.compat import ensure_torchvision
from kdutils.settings import UserError, project_path, shown_path, weights_file

# mean and standard deviation of ImageNet's channels (R, G, B), which torchvision's models expect
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] to float32 with ImageNet's mean and standard deviation; keeps the memory layout."""
    # non_blocking: a blocking copy would make the GPU wait in every step
    mean, std = ((torch.tensor(x) * 255).to(pixels.device, non_blocking=True).view(1, 3, 1, 1) for x in (MEAN, STD))
    return (pixels.float() - mean) / std


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


def seeded(seed: int, build, *args):
    """`build(*args)`, its random initial weights drawn from `seed`; the global random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(*args)


class Source(NamedTuple):
    """Where pretrained weights come from; `pretraining`: what their file says about how they were made."""

    description: str
    is_standin: bool
    checksum: str
    pretraining: dict


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


def backbone_source(arch: str, weights: str) -> Source:
    """Where the weights come from; does not load them. `weights`: `imagenet`, `none` or a folder.

    Raises `UserError` when the folder has no weights for `arch`, or their file is damaged.
    """
    if weights == "none":
        return Source("not pretrained: the whole network is trained from random weights", True, "none", {})
    if weights == "imagenet":
        return Source("ImageNet-1k (torchvision IMAGENET1K_V1)", False, _imagenet_weights(arch)[1], {})
    path = weights_file(project_path(weights), arch)
    header = read_header(path)
    description = header.get("description") or f"pretrained weights of {shown_path(path)}"
    is_standin = header.get("standin", "").lower() == "true"
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return Source(description, is_standin, checksum, pretraining_facts(header))


def load_backbone(arch: str, weights: str) -> nn.Module:
    """A torchvision ResNet with pretrained weights. `weights`: `imagenet`, `none` (random) or a folder.

    Raises `UserError` when the weights are missing, damaged or of another network, or when a download fails.
    """
    if weights == "none":
        return seeded(0, getattr(ensure_torchvision().models, arch))
    if weights == "imagenet":
        return with_state(arch, _imagenet_state(arch))
    return with_state(arch, read_state(weights_file(project_path(weights), arch))[0])


def with_state(arch: str, state: dict[str, Tensor]) -> nn.Module:
    """A torchvision ResNet with the weights of a state dict, except the last layer's, which stay random.

    Raises `UserError` if the state dict does not fit the architecture.
    """
    models = ensure_torchvision().models
    model = seeded(0, getattr(models, arch))
    body = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    body = {name: tensor for name, tensor in body.items() if not name.startswith("fc.")}
    try:
        odd = model.load_state_dict(body, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip().rstrip(".")
        raise UserError(
            f"weights: this is not the state dict of a torchvision {arch} ({reason}); use one that is"
        ) from error
    missing = [name for name in odd.missing_keys if not name.startswith("fc.") and "num_batches" not in name]
    if missing or odd.unexpected_keys:
        names = ", ".join((missing + odd.unexpected_keys)[:3])
        raise UserError(f"weights: this is not the state dict of a torchvision {arch} (see {names}); use one that is")
    return model


def read_header(path: Path) -> dict[str, str]:
    """The header of a .safetensors file; empty for a .pth. Raises `UserError` for a damaged file."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"weights: {shown_path(path)} cannot be read ({error}); use an undamaged file") from error


def pretraining_facts(header: Mapping[str, str]) -> dict:
    """How this project made a weights file, from the file's header; empty for a file from elsewhere."""
    try:
        facts = json.loads(header.get("pretraining", "{}"))
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """State dict and header of a .safetensors or .pth file; no code in the file is executed.

    Raises `UserError` for a damaged file, and for a .pth with anything but a state dict.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:160] or "the file is truncated"
        raise UserError(f"weights: {shown_path(path)} cannot be read ({reason}); use an undamaged file") from error
    except Exception as error:  # pickle.UnpicklingError: content that weights_only refuses
        raise UserError(f"weights: {shown_path(path)} holds more than tensors; save model.state_dict()") from error
    if not isinstance(state, dict) or not all(isinstance(x, str) and isinstance(y, Tensor) for x, y in state.items()):
        raise UserError(f"weights: {shown_path(path)} is not a state dict; save model.state_dict()")
    return state, {}


def _imagenet_weights(arch: str):
    """torchvision's weights, and the start of their SHA-256, which their file's name ends with."""
    weights = ensure_torchvision().models.get_model_weights(arch).IMAGENET1K_V1
    return weights, weights.url.rsplit("-", 1)[-1].removesuffix(".pth")


def _imagenet_state(arch: str) -> dict[str, Tensor]:
    weights, expected = _imagenet_weights(arch)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    if cached.is_file() and not hashlib.sha256(cached.read_bytes()).hexdigest().startswith(expected):
        raise UserError(f"weights: {cached} is damaged (its checksum does not match); delete it, and run again")
    try:
        with network_timeout():
            return weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError, HTTPException) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"weights: the ImageNet weights of {arch} cannot be downloaded ({reason}); save {weights.url} as "
            f"FOLDER/{arch}.pth and use weights = FOLDER, or use weights = generated or none"
        ) from error


def cut(
    model: nn.Module,
    trainable: str,
    size: int,
    num_classes: int,
    seed: int,
    *,
    resize: str = "bilinear",
    standardize: bool = False,
) -> tuple[nn.Sequential, nn.Sequential]:
    """Cut a ResNet into (frozen part, trained part), with a new last layer for `num_classes` drawn from `seed`.

    One after the other, they take normalised images float [B, 3, H, W], resize them to `size` and give logits
    [B, num_classes]. `trainable` names the trained part: `last_layer` (fc), `last_block` (layer4 and fc) or `all` (the
    frozen part is then empty). `standardize` gives the last layer features of mean 0 and variance 1 (a BatchNorm
    without weights). Both parts share their modules with `model`.
    """
    features: int = model.fc.in_features  # type: ignore[union-attr, assignment]
    parts: OrderedDict[str, nn.Module] = OrderedDict(resize=Resize(size, resize))
    parts |= {name: module for name, module in model.named_children() if name != "fc"}
    parts["flatten"] = nn.Flatten()
    if standardize:
        parts["standardize"] = nn.BatchNorm1d(features, affine=False)
    parts["fc"] = seeded(seed, nn.Linear, features, num_classes)
    first = {"last_layer": "standardize" if standardize else "fc", "last_block": "layer4", "all": "resize"}[trainable]
    names = list(parts)
    at = names.index(first)
    frozen = nn.Sequential(OrderedDict((name, parts[name]) for name in names[:at]))
    trained = nn.Sequential(OrderedDict((name, parts[name]) for name in names[at:]))
    return frozen.eval().requires_grad_(False), trained.requires_grad_(True)


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """Fold every BatchNorm into the convolution before it, in place. For a frozen network in eval mode.

    "Before it" means in order of definition, as in torchvision's ResNets.
    """
    for parent in list(module.modules()):
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())
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

    For a network that is trained with bfloat16 autocast: the rest stays in bfloat16. On a CPU, torch has no fast
    backward pass in bfloat16 for depthwise convolutions with a stride, or with filters larger than 3x3.
    """
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d) and conv.groups == conv.in_channels > 1 and not isinstance(conv, InFloat32):
            conv.__class__ = type(type(conv).__name__, (InFloat32, type(conv)), {})
    return module

"""The same work as the PyTorch tutorials do it: what `kdutils.lab.bench` measures against.

Its steps stay as they are: a slower baseline is no speed. Imports nothing from kdutils. The workers of a DataLoader
augment and normalise images one by one, all networks compute in float32, optimizers are torch's own, and teachers run
in every step.
"""

import os
import random
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import models, transforms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Student(nn.Module):
    """Two convolutions and two fully connected layers: normalised images [B, 3, 32, 32] to logits [B, num_classes]."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(32 * 8 * 8, 128)
        self.fc2 = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc2(x)


class Images(Dataset):
    """Arrays uint8 [N, H, W, 3] as PIL images through a transform, as torchvision's CIFAR10 gives them."""

    def __init__(self, data: np.ndarray, targets: Sequence[int], transform: Callable):
        self.data, self.targets, self.transform = data, list(targets), transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


class RandomShift:
    """RandomCrop with reflection padding, with shifts by multiples of `step` only."""

    def __init__(self, margin: int, step: int):
        self.pad = transforms.Pad(margin, padding_mode="reflect")
        self.offsets = range(0, 2 * margin + 1, step)

    def __call__(self, image: Image.Image) -> Image.Image:
        left, top = random.choice(self.offsets), random.choice(self.offsets)
        return self.pad(image).crop((left, top, left + image.width, top + image.height))


def transform(max_shift: int = 0, shift_step: int = 1, augment: bool = True) -> transforms.Compose:
    """PIL image to normalised tensor float32 [3, H, W]; with `augment`, a random flip and shift."""
    shift = [RandomShift(max_shift, shift_step)] if max_shift else []
    random_steps = [*shift, transforms.RandomHorizontalFlip()] if augment else []
    return transforms.Compose([*random_steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def loader(images: Images, batch_size: int, device: str) -> DataLoader:
    """Shuffled batches from one worker on each core, which start once; leaves out the last, incomplete batch."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return DataLoader(
        images,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=cores,
        pin_memory=device == "cuda",
        persistent_workers=True,
        multiprocessing_context="fork" if sys.platform == "linux" else None,
    )


def resnet(arch: str, state: dict[str, Tensor]) -> nn.Module:
    """A torchvision ResNet with these weights, in eval mode, on the CPU."""
    model = getattr(models, arch)(num_classes=len(state["fc.bias"]))
    model.load_state_dict(state)
    return model.eval()


def freeze_for_fine_tuning(model: nn.Module, trainable: str) -> nn.Module:
    """Freeze all but the last layer (`last_layer`), or all but layer4 and the last layer (`last_block`)."""
    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    if trainable == "last_block":
        model.layer4.requires_grad_(True)
    return model


def enlarge(x: Tensor, size: int, mode: str) -> Tensor:
    """Images [B, 3, H, W] resized to `size` x `size` (`bilinear`, `bicubic` or `nearest`)."""
    return F.interpolate(x, (size, size), mode=mode, align_corners=None if mode == "nearest" else False)


def cross_entropy_loss(
    model: nn.Module, x: Tensor, y: Tensor, label_smoothing: float, size: int | None = None, mode: str = "bilinear"
) -> Tensor:
    """Cross-entropy of a batch, resized to `size` if given."""
    return F.cross_entropy(model(x if size is None else enlarge(x, size, mode)), y, label_smoothing=label_smoothing)


def distillation_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    teachers: Sequence[nn.Module],
    temperature: float,
    alpha: float,
    label_smoothing: float,
    size: int,
    mode: str,
) -> Tensor:
    """Hinton's loss (2015, arXiv:1503.02531) with the mean of the teachers' softened probabilities.

    The teachers run on this batch.
    """
    with torch.no_grad():
        large = enlarge(x, size, mode)
        soft = torch.stack([F.softmax(teacher(large) / temperature, dim=1) for teacher in teachers]).mean(dim=0)
    logits = model(x)
    kl = F.kl_div(F.log_softmax(logits / temperature, dim=1), soft, reduction="batchmean")
    return alpha * temperature**2 * kl + (1 - alpha) * F.cross_entropy(logits, y, label_smoothing=label_smoothing)


def train(
    model: nn.Module,
    batches: DataLoader,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor],
    device: str,
    *,
    epochs: int,
    optimizer: str,
    schedule: str,
    learning_rate: float,
    weight_decay: float,
) -> None:
    """Train what is not frozen, in place; what is frozen stays in eval mode."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if optimizer == "sgd":
        optim = torch.optim.SGD(trained, learning_rate, weight_decay=weight_decay, momentum=0.9, nesterov=True)
    else:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer]
        optim = kind(trained, learning_rate, weight_decay=weight_decay)
    steps = epochs * len(batches)
    rates: torch.optim.lr_scheduler.LRScheduler
    if schedule == "one_cycle":
        # at least 8: it divides by the length of the rise, less a step
        rates = torch.optim.lr_scheduler.OneCycleLR(
            optim, learning_rate, total_steps=max(8, steps), pct_start=0.25, cycle_momentum=False
        )
    elif schedule == "cosine":
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(optim, steps)
    else:
        rates = torch.optim.lr_scheduler.ConstantLR(optim, factor=1.0)
    model.eval()
    for part in model.children():
        part.train(any(p.requires_grad for p in part.parameters()))
    for _ in range(epochs):
        for x, y in batches:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            value = loss(model, x, y)
            optim.zero_grad()
            value.backward()
            optim.step()
            rates.step()

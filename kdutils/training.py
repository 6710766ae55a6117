"""One `fit` for everything that is trained, and `predict`."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdutils.cache import Checkpoint, History
from kdutils.progress import TrainingProgress
from kdutils.settings import UserError

Network = TypeVar("Network", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    optimizer: `adam`, `adamw` or `sgd` (Nesterov momentum 0.9); weight decay on matrices and filters only.
    schedule, over all steps: `constant`; `cosine` (from the rate down to 0); `one_cycle` (linear rise over the first
    quarter, then cosine to 0; after Smith and Topin 2018, arXiv:1708.07120).
    """

    epochs: int
    batch_size: int
    optimizer: str
    schedule: str
    learning_rate: float
    weight_decay: float


class TrainingError(UserError):
    """A training that went wrong: names what was trained, the epoch and what to change."""


def autocast(device: str, precision: str) -> torch.autocast:
    """Mixed precision as the settings' `precision` says."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def memory_format(model: Network) -> Network:
    """Lay out convolution weights channels-last, the faster layout of both CPUs and GPUs."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def draw(seed: int, epoch: int, num_examples: int, num_views: int) -> tuple[Tensor, Tensor]:
    """The order of the images and the view of each in one epoch: two int64 [N].

    Depends on its arguments alone: arms with one seed see the same, and a resumed training goes on with the same.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(num_examples, generator=generator)
    return order, torch.randint(num_views, (num_examples,), generator=generator)


def fit(
    model: nn.Module,
    inputs: Callable[[Tensor, Tensor], Tensor],
    labels: Tensor,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    recipe: Recipe,
    *,
    num_views: int,
    seed: int,
    validation: tuple[Tensor, Tensor],
    precision: str = "float32",
    name: str = "training",
    checkpoint: Checkpoint | None = None,
    last_layer_factor: float = 1.0,
) -> History:
    """Train `model` in place; the last epoch counts. Returns loss and accuracy of every epoch.

    Every step takes a batch of (index [B], view [B]) pairs: `inputs(index, view)` is what the model is given,
    `loss(logits [B, C], index, view)` a scalar. `labels` int64 [N] (-1: none) are for the training accuracy, which is
    measured on the augmented views of the labelled images while training. `validation` holds inputs and labels. The
    last, incomplete batch of an epoch is left out. `last_layer_factor`: the learning rate of the layer called `fc`, in
    terms of the recipe's.
    With a `checkpoint`, an interrupted training resumes from the step it was last saved at.

    Raises `TrainingError` when an epoch's loss or the logits after it are not finite, or the loss of an epoch so far
    where it would be saved.
    """
    device = labels.device
    memory_format(model.to(device))
    optimizer = make_optimizer(model, recipe, device, last_layer_factor)
    batch_size = min(recipe.batch_size, len(labels))
    steps = len(labels) // batch_size
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate(recipe.schedule, steps * recipe.epochs))
    history: History = {key: [] for key in ("train_loss", "train_accuracy", "val_loss", "val_accuracy")}
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    checkpoint = checkpoint or Checkpoint(None)
    first, first_step = 0, 0
    total, correct = torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device)
    if saved := checkpoint.load():
        for part in parts:
            parts[part].load_state_dict(saved[part])
        history.update(saved["history"])
        first, first_step = saved["epoch"], saved["step"]
        total, correct = saved["total"].to(device), saved["correct"].to(device)

    def save(epoch: int, step: int) -> None:
        state = {part: parts[part].state_dict() for part in parts}
        checkpoint.save(state | {"history": history, "epoch": epoch, "step": step, "total": total, "correct": correct})

    def mean_loss(epoch: int, step: int) -> float:
        return finite(total.item() / step, "the loss", epoch)

    def finite(value: float, what: str, epoch: int) -> float:
        if not math.isfinite(value):
            raise TrainingError(
                f"{name}: {what} is {value} in epoch {epoch + 1} (seed {seed}); lower the learning rate"
            )
        return value

    with TrainingProgress(name) as report:
        report.begin(recipe.epochs, steps, first + first_step / steps)
        for epoch in range(first, recipe.epochs):
            order, view = (t.to(device) for t in draw(seed, epoch, len(labels), num_views))
            batches = list(zip(order.split(batch_size), view.split(batch_size)))[first_step:steps]
            model.train()
            for step, (batch, batch_view) in enumerate(batches, start=first_step + 1):
                x = inputs(batch, batch_view)
                with autocast(device.type, precision):
                    logits = model(x)
                logits = logits.float()
                value = loss(logits, batch, batch_view)
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                optimizer.step()
                schedule.step()
                # kept on the device: reading a number each step would stall a GPU
                total += value.detach()
                correct += (logits.detach().argmax(dim=1) == labels[batch]).sum()
                if step < steps:
                    report.step(epoch, step)
                    if checkpoint.is_due(end_of_epoch=False):
                        mean_loss(epoch, step)  # what is not finite must not be saved
                        save(epoch, step)
            history["train_loss"].append(mean_loss(epoch, steps))
            logits = predict(model, validation[0], precision=precision)
            finite(logits.abs().max().item(), "the largest of the validation images' logits", epoch)
            labelled = (labels[order[: steps * batch_size]] >= 0).sum().item()
            history["train_accuracy"].append(correct.item() / max(1, labelled))
            history["val_loss"].append(F.cross_entropy(logits, validation[1]).item())
            history["val_accuracy"].append((logits.argmax(dim=1) == validation[1]).float().mean().item())
            report.epoch(history)
            first_step = 0
            total, correct = torch.zeros_like(total), torch.zeros_like(correct)
            if epoch + 1 < recipe.epochs and checkpoint.is_due(end_of_epoch=True):
                save(epoch + 1, 0)
    model.eval()
    return history


@torch.inference_mode()
def predict(model: nn.Module, inputs: Tensor, precision: str = "float32", batch_size: int = 1000) -> Tensor:
    """Logits float32 [N, C] of the model, in eval mode, for inputs [N, ...] (float, or float16 features)."""
    model.eval()
    results = []
    for batch in inputs.split(batch_size):
        batch = batch.float()
        if batch.dim() == 4:
            batch = batch.contiguous(memory_format=torch.channels_last)
        with autocast(inputs.device.type, precision):
            results.append(model(batch).float())
    return torch.cat(results)


def make_optimizer(
    model: nn.Module, recipe: Recipe, device: torch.device, last_layer_factor: float = 1.0
) -> torch.optim.Optimizer:
    """The recipe's optimizer for what can be trained of the model; fused where torch has that."""
    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = recipe.weight_decay if parameter.dim() > 1 else 0.0
            rate = recipe.learning_rate * (last_layer_factor if name.startswith("fc.") else 1.0)
            members.setdefault((decay, rate), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": alike, "weight_decay": decay, "lr": rate} for (decay, rate), alike in members.items()
    ]
    fused = device.type in ("cpu", "cuda")
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=0.9, nesterov=True, fused=fused)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
    return kind(groups, lr=recipe.learning_rate, fused=fused)


def _rate(schedule: str, steps: int) -> Callable[[int], float]:
    """The learning rate at a step, as a fraction of the recipe's."""
    if schedule == "constant":
        return lambda step: 1.0
    if schedule == "cosine":
        return lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    rise = max(1, steps // 4)
    return lambda step: (
        (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
    )

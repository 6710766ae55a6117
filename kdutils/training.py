"""One `fit` for everything that is trained, and `predict`."""

import dataclasses
import hashlib
import io
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from kdutils.runs import write_atomically
from kdutils.settings import UserError, shown_path

History = dict[str, list[float]]
CHECKPOINT_EVERY = 15.0  # seconds


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


def memory_format(model: nn.Module) -> nn.Module:
    """Lay out convolution weights channels-last, the faster layout of both CPUs and GPUs."""
    return model.to(memory_format=torch.channels_last)


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
    checkpoint: Path | None = None,
) -> History:
    """Train `model` in place; the last epoch counts. Returns loss and accuracy of every epoch.

    Every step takes a batch of (index [B], view [B]) pairs: `inputs(index, view)` is what the model is given,
    `loss(logits [B, C], index, view)` a scalar. `labels` int64 [N] (-1: none) are for the training accuracy, which is
    measured on the augmented views while training. `validation` holds inputs and labels. The last, incomplete batch
    of an epoch is left out. With a `checkpoint` path, a training that was cut goes on from its last saved epoch.

    Raises `TrainingError` as soon as an epoch's loss is not finite.
    """
    device = labels.device
    memory_format(model.to(device))
    optimizer = _optimizer(model, recipe, device)
    batch_size = min(recipe.batch_size, len(labels))
    steps = len(labels) // batch_size
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate(recipe.schedule, steps * recipe.epochs))
    history: History = {key: [] for key in ("train_loss", "train_accuracy", "val_loss", "val_accuracy")}
    first = _restore(checkpoint, model, optimizer, schedule, history)
    saved = time.monotonic()
    with _progress(name, recipe.epochs, first) as report:
        for epoch in range(first, recipe.epochs):
            order, view = (t.to(device) for t in draw(seed, epoch, len(labels), num_views))
            model.train()
            total = torch.zeros((), device=device)
            correct = torch.zeros((), device=device, dtype=torch.int64)
            for batch, batch_view in zip(order.split(batch_size)[:steps], view.split(batch_size)):
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
            mean_loss = total.item() / steps
            if not math.isfinite(mean_loss):
                raise TrainingError(
                    f"{name}: the loss is {mean_loss} in epoch {epoch + 1} (seed {seed}); lower the learning rate"
                )
            logits = predict(model, validation[0], precision=precision)
            history["train_loss"].append(mean_loss)
            history["train_accuracy"].append(correct.item() / (steps * batch_size))
            history["val_loss"].append(F.cross_entropy(logits, validation[1]).item())
            history["val_accuracy"].append((logits.argmax(dim=1) == validation[1]).float().mean().item())
            report(epoch + 1, history)
            if checkpoint is not None and epoch + 1 < recipe.epochs and time.monotonic() - saved > CHECKPOINT_EVERY:
                _save(checkpoint, model, optimizer, schedule, history)
                saved = time.monotonic()
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


def _optimizer(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
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


def _save(path: Path, model: nn.Module, optimizer, schedule, history: History) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    content = io.BytesIO()
    torch.save({**state, "history": history}, content)
    # torch.load does not check what it reads
    checksum = hashlib.sha256(content.getbuffer()).digest()
    write_atomically(path, lambda temporary: temporary.write_bytes(checksum + content.getbuffer()))


def _restore(path: Path | None, model: nn.Module, optimizer, schedule, history: History) -> int:
    """Load a checkpoint where there is an undamaged one; returns the number of epochs already done."""
    if path is None or not path.exists():
        return 0
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        print(f"{shown_path(path)}: is damaged (its checksum does not fit); this training starts anew")
        return 0
    state = torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    history.update(state["history"])
    return len(history["train_loss"])


class _progress:
    """Shows a training's progress: a tqdm bar for people, one plain line an epoch for files and batch runs."""

    def __init__(self, name: str, epochs: int, first: int):
        self.name, self.epochs, self.first, self.start = name, epochs, first, time.monotonic()

    def __enter__(self) -> Callable[[int, History], None]:
        self.plain = open_progress_log()
        self.bar = None
        if self.plain is None:
            self.bar = tqdm(total=self.epochs, initial=self.first, desc=self.name, unit="epoch", **bar_options())
        return self._report

    def _report(self, done: int, history: History) -> None:
        loss, accuracy = history["train_loss"][-1], history["val_accuracy"][-1]
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.3f}, val {accuracy:.1%}", refresh=False)
            self.bar.update()
            return
        left = (time.monotonic() - self.start) / (done - self.first) * (self.epochs - done)
        line = f"{self.name}: epoch {done}/{self.epochs}, loss {loss:.3f}, val {accuracy:.1%}, {left:.0f} s left"
        print(line, file=self.plain, flush=True)

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.plain not in (None, sys.stdout):
            self.plain.close()


def open_progress_log():
    """Where plain progress lines go: the batch run's log, or stdout when nobody watches; None for a live bar."""
    if "KDUTILS_PROGRESS" in os.environ:
        return open(os.environ["KDUTILS_PROGRESS"], "a", encoding="utf-8")
    return None if sys.stderr.isatty() or _in_notebook() else sys.stdout


def _in_notebook() -> bool:
    return "ipykernel" in sys.modules and type(sys.stdout).__module__.startswith("ipykernel")


def bar_options() -> dict:
    """tqdm's options for a bar that suits both a terminal and a notebook cell."""
    return {"leave": not _in_notebook(), "dynamic_ncols": not _in_notebook(), "file": sys.stdout}


def progress_lines(items, name: str) -> Iterator:
    """Go through `items` (a sequence) with a bar, or with a plain line about every ten seconds."""
    plain = open_progress_log()
    if plain is None:
        yield from tqdm(items, desc=name, **bar_options())
        return
    start = shown = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - shown > 10:
            left = (now - start) / done * (len(items) - done)
            print(f"{name}: {done}/{len(items)}, {left:.0f} s left", file=plain, flush=True)
            shown = now
    if plain is not sys.stdout:
        plain.close()

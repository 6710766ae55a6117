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
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from kdutils.runs import write_atomically
from kdutils.settings import UserError, shown_path

History = dict[str, list[float]]
Network = TypeVar("Network", bound=nn.Module)
# seconds between checkpoints, at least: within an epoch; at its end, so that what is cut goes on within one epoch
CHECKPOINT_EVERY, CHECKPOINT_AT_END = 15.0, 1.0


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
    checkpoint: Path | None = None,
    last_layer_factor: float = 1.0,
) -> History:
    """Train `model` in place; the last epoch counts. Returns loss and accuracy of every epoch.

    Every step takes a batch of (index [B], view [B]) pairs: `inputs(index, view)` is what the model is given,
    `loss(logits [B, C], index, view)` a scalar. `labels` int64 [N] (-1: none) are for the training accuracy, which is
    measured on the augmented views of the labelled images while training. `validation` holds inputs and labels. The
    last, incomplete batch of an epoch is left out. `last_layer_factor`: the learning rate of the layer called `fc`, in
    terms of the recipe's.
    With a `checkpoint` path, a training that was cut goes on from the step it was last saved at.

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
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    saver = _Saver(checkpoint, parts, history)
    first, first_step, total, correct = saver.restore()
    total, correct = total.to(device), correct.to(device)

    def mean_loss(epoch: int, step: int) -> float:
        return finite(total.item() / step, "the loss", epoch)

    def finite(value: float, what: str, epoch: int) -> float:
        if not math.isfinite(value):
            raise TrainingError(
                f"{name}: {what} is {value} in epoch {epoch + 1} (seed {seed}); lower the learning rate"
            )
        return value

    with _progress(name, recipe.epochs, steps, first + first_step / steps) as report:
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
                    if saver.is_due(CHECKPOINT_EVERY):
                        mean_loss(epoch, step)  # what is not finite must not be saved
                        saver.save(epoch, step, total, correct)
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
            if epoch + 1 < recipe.epochs and saver.is_due(CHECKPOINT_AT_END):
                saver.save(epoch + 1, 0, total, correct)
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


class _Saver:
    """Writes the checkpoint of a training now and then, and finds it again."""

    def __init__(self, path: Path | None, parts: dict, history: History):
        self.path, self.parts, self.history = path, parts, history
        self.last, self.cost = time.monotonic(), 0.0

    def is_due(self, every: float) -> bool:
        """Whether so many seconds have passed since the last one; writing takes a sixtieth of the time at most."""
        return self.path is not None and time.monotonic() - self.last >= max(every, CHECKPOINT_EVERY * 4 * self.cost)

    def save(self, epoch: int, step: int, total: Tensor, correct: Tensor) -> None:
        assert self.path is not None  # nothing is due without one
        start = time.monotonic()
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"history": self.history, "epoch": epoch, "step": step, "total": total, "correct": correct}
        content = io.BytesIO()
        torch.save(state, content)
        # torch.load does not check what it reads
        checksum = hashlib.sha256(content.getbuffer()).digest()

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                file.write(checksum)
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())  # a machine that goes down now must find the new one or the old one whole

        write_atomically(self.path, write)
        self.last = time.monotonic()
        self.cost = self.last - start

    def restore(self) -> tuple[int, int, Tensor, Tensor]:
        """Load a checkpoint where there is an undamaged one: the epochs and steps done, and that epoch's sums."""
        anew = 0, 0, torch.zeros(()), torch.zeros((), dtype=torch.int64)
        if self.path is None or not self.path.exists():
            return anew
        content = self.path.read_bytes()
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            print(f"{shown_path(self.path)}: is damaged (its checksum does not fit); this training starts anew")
            return anew
        state = torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)
        if not state.keys() >= {*self.parts, "history", "epoch", "step", "total", "correct"}:
            print(f"{shown_path(self.path)}: was written by an earlier version; this training starts anew")
            return anew
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.history.update(state["history"])
        return state["epoch"], state["step"], state["total"], state["correct"]


class _progress:
    """Shows a training's progress: a tqdm bar for people, plain lines for files and batch runs (one an epoch, and one
    a minute in long epochs)."""

    def __init__(self, name: str, epochs: int, steps: int, first: float):
        self.name, self.epochs, self.steps, self.first = name, epochs, steps, first
        self.start = self.shown = time.monotonic()

    def __enter__(self) -> "_progress":
        self.plain = open_progress_log()
        self.bar = None
        if self.plain is None:
            # n counts epochs, by steps
            form = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} epochs [{elapsed}<{remaining}{postfix}]"
            self.bar = _bar(desc=self.name, total=self.epochs, initial=self.first, bar_format=form)
        return self

    def step(self, epoch: int, step: int) -> None:
        if self.bar is not None:
            self.bar.update(1 / self.steps)
        elif time.monotonic() - self.shown > 60:
            self._line(f"epoch {epoch + 1}/{self.epochs}, step {step:,} of {self.steps:,}", epoch + step / self.steps)

    def epoch(self, history: History) -> None:
        done, loss, accuracy = len(history["train_loss"]), history["train_loss"][-1], history["val_accuracy"][-1]
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.3f}, val {accuracy:.1%}", refresh=False)
            self.bar.update(done - self.bar.n)  # exactly, whatever the steps' fractions came to
        else:
            self._line(f"epoch {done}/{self.epochs}, loss {loss:.3f}, val {accuracy:.1%}", done)

    def _line(self, text: str, done: float) -> None:
        self.shown = time.monotonic()
        left = (self.shown - self.start) / (done - self.first) * (self.epochs - done)
        print(f"{self.name}: {text}, {left:.0f} s left", file=self.plain, flush=True)

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.plain not in (None, sys.stdout):
            self.plain.close()


def open_progress_log():
    """Where plain progress lines go: the batch run's log, or stdout when nobody watches; None for a live bar."""
    if "KDUTILS_PROGRESS" in os.environ:
        return open(os.environ["KDUTILS_PROGRESS"], "a", encoding="utf-8")
    return None if _is_watched() else sys.stdout


def _is_watched() -> bool:
    """Whether somebody sees a live bar: in a terminal, or in a notebook that can ask for input (papermill's cannot)."""
    if _in_notebook():
        from IPython import get_ipython

        return getattr(get_ipython().kernel, "_allow_stdin", True)
    return sys.stderr.isatty()


def _in_notebook() -> bool:
    return "ipykernel" in sys.modules and type(sys.stdout).__module__.startswith("ipykernel")


class _CellBar(tqdm):
    """A bar that is one output of a notebook's cell, rewritten in place: a saved file holds its last state."""

    output = None

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        from IPython.display import display

        shown = {"text/plain": str(self) if msg is None else msg}
        if self.output is None:
            self.output = display(shown, raw=True, display_id=True)
        else:
            self.output.update(shown, raw=True)


def _bar(items=None, **options: Any) -> tqdm:
    """A live bar that stays when it is done, in a terminal or in a notebook's cell."""
    if _in_notebook():
        return _CellBar(items, file=io.StringIO(), ncols=100, mininterval=0.5, ascii=False, **options)
    return tqdm(items, file=sys.stdout, dynamic_ncols=True, **options)


def progress_lines(items, name: str) -> Iterator:
    """Go through `items` (a sequence) with a bar, or with a plain line about every ten seconds."""
    plain = open_progress_log()
    if plain is None:
        yield from _bar(items, desc=name)
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

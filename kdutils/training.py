"""The only training loop: `fit` trains a network, `predict` runs one."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdutils.cache import Checkpoint, History
from kdutils.parallel import check_stopped
from kdutils.progress import TrainingProgress
from kdutils.settings import UserError

WARM_UP = 3  # steps before one is recorded as a CUDA graph

Network = TypeVar("Network", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    optimizer: `adam`, `adamw` or `sgd` (Nesterov momentum 0.9); weight decay acts on matrices and filters only.
    schedule, over all steps: `constant`; `cosine` (from the learning rate down to 0); `one_cycle` (linear rise over the
    first quarter, then cosine to 0; after Smith and Topin 2018, arXiv:1708.07120).
    """

    epochs: int
    batch_size: int
    optimizer: str
    schedule: str
    learning_rate: float
    weight_decay: float


class TrainingError(UserError):
    """A training diverged. The message names what was trained, the epoch and what to change."""


def autocast(device: str, precision: str) -> torch.autocast:
    """A context of bfloat16 autocast if `precision` is `bfloat16`, else one without effect."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def channels_last(model: Network) -> Network:
    """Lay out convolution weights channels-last, the faster layout on CPUs and GPUs."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def draw(
    seed: int, epoch: int, num_examples: int, num_views: int, epoch_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The order of the images and the view of each image in one epoch: two int64 [N], or [epoch_size] if that is less:
    a random sample, no image twice.

    They depend on the arguments alone: methods with the same seed see the same batches, and so does a resumed training.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(num_examples, generator=generator)[:epoch_size]
    return order, torch.randint(num_views, (len(order),), generator=generator)


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
    epoch_size: int | None = None,
    precision: str = "float32",
    last_layer_factor: float = 1.0,
    progress: TrainingProgress | None = None,
    checkpoint: Checkpoint | None = None,
) -> History:
    """Train `model` in place; it keeps the weights of the last epoch. Returns loss and accuracy of every epoch.

    A batch is a pair (index [B], view [B]), the numbers of the images and of their views: `inputs(index, view)` is the
    network's input, `loss(logits [B, C], index, view)` a scalar. `labels` int64 [N] (-1: none) serve the training
    accuracy, which is measured while training, on the views drawn. `validation`: inputs and labels. An epoch sees
    every image once, or `epoch_size` images drawn at random where there are more; it leaves out its last, incomplete
    batch. `last_layer_factor` multiplies the learning rate of the layer called `fc`. With a
    checkpoint, an interrupted training resumes at the step that was saved last.

    Raises `TrainingError` when the loss or the validation logits are not finite; checked at the end of each epoch, the
    loss also before a checkpoint is saved.
    """
    device = labels.device
    channels_last(model.to(device))
    optimizer = make_optimizer(model, recipe, device, last_layer_factor)
    size = min(len(labels), epoch_size or len(labels))
    batch_size = min(recipe.batch_size, size)
    steps = size // batch_size
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate(recipe.schedule, steps * recipe.epochs))
    state = _State({"model": model, "optimizer": optimizer, "schedule": schedule}, checkpoint, device)
    on_gpu = device.type == "cuda"
    for group in optimizer.param_groups:  # as numbers they would be part of a CUDA graph; a checkpoint may hold either
        group["lr"] = torch.tensor(float(group["lr"]), device=device) if on_gpu else float(group["lr"])
        group["capturable"] = on_gpu

    def step(index: Tensor, view: Tensor) -> None:
        x = inputs(index, view)
        with autocast(device.type, precision):
            logits = model(x)
        logits = logits.float()
        value = loss(logits, index, view)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        state.count(value, logits, labels[index])

    take_step = _AsGraph(step, optimizer) if on_gpu else step
    with progress or TrainingProgress("training") as shown:
        shown.begin(recipe.epochs, steps, state.epoch + state.step / steps)
        for epoch in range(state.epoch, recipe.epochs):
            order, views = (drawn.to(device) for drawn in draw(seed, epoch, len(labels), num_views, size))
            batches = list(zip(order.split(batch_size), views.split(batch_size)))[state.step : steps]
            model.train()
            for index, view in batches:
                check_stopped()
                take_step(index, view)
                schedule.step()
                state.step += 1
                if state.step < steps:
                    shown.step(epoch, state.step)
                    state.save_if_due(shown.name)
            val_logits = predict(model, validation[0], precision=precision)
            state.end_epoch(shown.name, val_logits, validation[1], (labels[order[: steps * batch_size]] >= 0).sum())
            shown.epoch(state.history)
            if epoch + 1 < recipe.epochs:
                state.save_if_due(shown.name, end_of_epoch=True)
    model.eval()
    return state.history


class _AsGraph:
    """A step as a CUDA graph: one launch in place of a hundred, which are most of a small network's time on a GPU.

    The first steps run one by one, as CUDA graphs ask for; then one is recorded, and all others replay it. A step that
    waits for the GPU cannot be recorded: a line says so, and all steps run one by one.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], None], optimizer: torch.optim.Optimizer):
        self.step, self.optimizer, self.taken = step, optimizer, 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, index: Tensor, view: Tensor) -> None:
        if self.taken == WARM_UP:
            self._record(index, view)
        self.taken += 1
        if self.graph is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.step(index, view)
            torch.cuda.current_stream().wait_stream(stream)
            return
        self.index.copy_(index)
        self.view.copy_(view)
        self.graph.replay()

    def _record(self, index: Tensor, view: Tensor) -> None:
        self.index, self.view = index.clone(), view.clone()
        self.optimizer.zero_grad(set_to_none=True)  # the graph has gradients of its own
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.step(self.index, self.view)
        except RuntimeError as error:
            print(f"no CUDA graph, and slower steps: {' '.join(str(error).split())[:120]}")
            return
        self.graph = graph


class _State:
    """Where a training stands, which is what its checkpoint holds: epochs and steps done, the running epoch's sums."""

    def __init__(self, parts: dict[str, Any], checkpoint: Checkpoint | None, device: torch.device):
        self.parts, self.checkpoint = parts, checkpoint
        self.history: History = {key: [] for key in ("train_loss", "train_accuracy", "val_loss", "val_accuracy")}
        self.epoch = self.step = 0
        # kept on the device: reading a number in each step would stall a GPU
        self.total, self.correct = torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device)
        if checkpoint is not None and (saved := checkpoint.load()) is not None:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            self.history, self.epoch, self.step = saved["history"], saved["epoch"], saved["step"]
            self.total, self.correct = saved["total"].to(device), saved["correct"].to(device)

    def count(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.total += loss.detach()
        self.correct += (logits.detach().argmax(dim=1) == labels).sum()

    def end_epoch(self, name: str, logits: Tensor, labels: Tensor, labelled: Tensor) -> None:
        """Add the epoch to the history; logits and labels are those of the validation images."""
        self.history["train_loss"].append(self._mean_loss(name))
        _finite(logits.abs().max().item(), "the largest of the validation logits", name, self.epoch)
        self.history["train_accuracy"].append(self.correct.item() / max(1, labelled.item()))
        self.history["val_loss"].append(F.cross_entropy(logits, labels).item())
        self.history["val_accuracy"].append((logits.argmax(dim=1) == labels).float().mean().item())
        self.epoch, self.step = self.epoch + 1, 0
        self.total.zero_()
        self.correct.zero_()

    def save_if_due(self, name: str, end_of_epoch: bool = False) -> None:
        if self.checkpoint is None or not self.checkpoint.is_due(end_of_epoch):
            return
        if self.step:
            self._mean_loss(name)  # a state that has diverged must not be saved
        state = {part: value.state_dict() for part, value in self.parts.items()}
        facts = ("history", "epoch", "step", "total", "correct")
        self.checkpoint.save(state | {fact: getattr(self, fact) for fact in facts})

    def _mean_loss(self, name: str) -> float:
        return _finite(self.total.item() / self.step, "the loss", name, self.epoch)


def _finite(value: float, what: str, name: str, epoch: int) -> float:
    if not math.isfinite(value):
        raise TrainingError(f"{name}: {what} is {value} in epoch {epoch + 1}; lower the learning rate")
    return value


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
    """The recipe's optimizer for the trainable parameters of the model; fused where torch has that."""
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

"""The benchmark: this project's own code against the plain way (`kdutils.reference`) and against the bare step.

Every time is the median of alternating repetitions: ours, the reference, the limit, ours again, ... Speed depends
neither on what the images show nor on the ResNets' weights, so the images are generated and the weights random.
"""

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from kdutils import shapes
from kdutils.compat import ensure_torchvision
from kdutils.data import Dataset, Split
from kdutils.losses import combine_teachers, cross_entropy, distillation_loss
from kdutils.models import SmallCNN, load_backbone, normalise, seeded
from kdutils.runs import write_text
from kdutils.settings import ARCHITECTURES, ROOT, Settings, UserError, apply_threads, project_path, shown_path
from kdutils.students import Arm, fit_arguments, student_recipe, train_students
from kdutils.teachers import FineTuning, Teacher, fine_tune, teacher_recipe
from kdutils.training import Recipe, autocast, draw, fit, make_optimizer, memory_format, predict, progress_lines
from kdutils.views import make_views, view_pixels, view_table

PAGE = ROOT / "docs" / "performance.md"
NOTES = ("<!-- notes:begin -->", "<!-- notes:end -->")
LABELS = {"resnet50": "ResNet-50", "resnet18": "ResNet-18"}
WORDS = {"last_layer": "last layer", "last_block": "last block and last layer"}
FEATURE_BYTES = 1e9  # of features that are looked up while fine-tuning is timed: more than any cache holds
# The relative difference that the first step's loss may have. Where a teacher takes part, our numbers went through
# float16, in which features and logits are stored.
EXACT, STORED = 1e-4, 5e-3


class Plan(NamedTuple):
    """How much is measured: repetitions, and `seconds` for each of the three sides in each of them. A side whose
    epoch takes longer is timed for at most `steps` steps, and scaled."""

    repetitions: int
    seconds: float
    steps: int
    forward_images: int
    train_size: int | None
    held_out: int
    image_counts: tuple[int, ...]
    views: tuple[tuple[int, int], ...]
    seed_counts: tuple[int, ...]
    seed_steps: int
    accuracy_seeds: int
    accuracy_epochs: int


# the views (max_shift, shift_step) are 2, 18 and 162
FULL = Plan(5, 4.0, 20, 50, None, 1000, (1000, 3000, 9000, 27000), ((0, 1), (3, 3), (4, 1)), (1, 5, 20), 12, 3, 2)
QUICK = Plan(2, 0.1, 2, 5, 600, 100, (150, 300, 600), ((0, 1), (3, 3)), (1, 2), 1, 1, 1)

# What is aimed at: (key of a row, or of a ratio; what is compared; on a 2-core CPU; on one data-centre GPU)
TARGETS = (
    ("student_ce", "at least", 5, 10),
    ("student_kd", "at least", 50, 50),
    ("student_kd_shared", "at least", 10, 10),
    ("resnet50_fit", "at least", 20, 20),
    ("resnet18_fit", "at least", 2.5, 2.5),
    ("resnet50_forward", "at least", 2, 2),
    ("resnet18_forward", "at least", 2, 2),
    ("distillation_over_cross_entropy", "at most", 1.05, 1.05),
    ("student_over_bare_step", "at most", 1.15, 1.3),
    ("five_seeds_over_one", "at most", 5.0, 1.5),
    ("end_to_end_minutes", "at most", 30, 3),
)
RATIO_NAMES = {
    "distillation_over_cross_entropy": "Distillation epoch over cross-entropy epoch",
    "student_over_bare_step": "Student epoch over the bare step",
    "five_seeds_over_one": "Five seeds of one arm over one seed",
    "end_to_end_minutes": "The four notebooks end to end, minutes",
}


class Side(NamedTuple):
    """One way of doing a row's work: `prepare(steps)` returns what does that many of an epoch's `whole` steps."""

    whole: int
    prepare: Callable[[int], Callable[[], object]]


# The work, done our way, the plain way, and as the bare step


class _Bench(NamedTuple):
    """What all rows share: settings (their folders are temporary), images, the random ResNets' state dicts."""

    settings: Settings
    plan: Plan
    train: Split
    held_out: Split
    states: dict[str, dict[str, Tensor]]
    backbones: dict[str, nn.Module]

    def fine_tuning(self, arch: str, count: int) -> FineTuning:
        """Of `count` images; the backbone is not read again each time."""
        work = FineTuning(arch, self.dataset(count), self.settings)
        work.backbone = self.backbones[arch]
        return work

    def dataset(self, count: int) -> Dataset:
        """A data set of `count` training images, repeated where there are fewer, and 10 for validation and test."""
        index = torch.arange(count, device=self.train.labels.device) % len(self.train.labels)
        few = Split(*(tensor[:10] for tensor in self.held_out))
        train = Split(*(tensor[index] for tensor in self.train))
        sums = {"train": f"bench{count}", "val": "bench", "test": "bench"}
        return Dataset("generated images", list(shapes.SHAPES10), train, few, few, f"bench{count}", sums, True, False)

    def plain_images(self, count: int, split: Split | None = None, augment: bool = True):
        """The same images as the reference holds them."""
        from kdutils import reference

        images, labels = split or self.dataset(count).train
        arrays = images[:count].permute(0, 2, 3, 1).contiguous().cpu().numpy()
        transform = reference.transform(**self.settings.views, augment=augment)
        return reference.Images(arrays, labels[:count].tolist(), transform)


def scratch_arm(settings: Settings) -> Arm:
    """The student's baseline, as in notebook 01."""
    return Arm("scratch", partial(cross_entropy, label_smoothing=settings.label_smoothing))


def distillation_arm(settings: Settings, teachers: Sequence[Teacher]) -> Arm:
    """The student taught by both teachers, as in notebook 04."""
    loss = partial(
        distillation_loss, temperature=settings.temperature, alpha=settings.alpha,
        label_smoothing=settings.kd_label_smoothing,
    )  # fmt: skip
    combine = partial(combine_teachers, rule="mean_prob", temperature=settings.temperature)
    return Arm("kd_mean_prob", loss, tuple(teachers), combine)


def _fit_quietly(model: nn.Module, **arguments: Any) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        fit(model, **arguments)


def _our_student(bench: _Bench, arm_of: Callable[[int], Arm], settings: Settings, whole: int) -> Side:
    """One epoch of `fit`; its images are laid out, and its teachers' targets combined, before."""

    def prepare(steps: int) -> Callable[[], None]:
        count = steps * settings.batch_size
        one_epoch = dataclasses.replace(settings, epochs=1)
        arguments = fit_arguments(arm_of(count), bench.dataset(count), one_epoch, seed=0)
        return partial(_fit_quietly, seeded(0, SmallCNN), **arguments)

    return Side(whole, prepare)


def _plain_training(bench: _Bench, model: nn.Module, loss: Callable, recipe: Recipe, whole: int) -> Side:
    from kdutils import reference

    device = bench.settings.device
    model = model.to(device)
    how = dataclasses.asdict(recipe) | {"epochs": 1}
    batch_size = how.pop("batch_size")

    def prepare(steps: int) -> Callable[[], None]:
        batches = reference.loader(bench.plain_images(steps * batch_size), batch_size, device)
        return lambda: reference.train(model, batches, loss, device, **how)

    return Side(whole, prepare)


def _bare_step(model: nn.Module, x: Tensor, labels: Tensor, recipe: Recipe, precision: str, whole: int) -> Side:
    """Forward, backward, optimiser on one resident batch, in our precision and layout: no data, no teacher."""
    device = labels.device
    model = memory_format(model.to(device)).train()
    optimizer = make_optimizer(model, recipe, device)

    def work(steps: int) -> None:
        for _ in range(steps):
            with autocast(device.type, precision):
                logits = model(x)
            value = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()

    return Side(whole, lambda steps: partial(work, steps))


def _first_batch(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The (index, view) pairs [B] that `fit` begins with."""
    labels, size = arguments["labels"], min(arguments["recipe"].batch_size, len(arguments["labels"]))
    order, view = draw(arguments["seed"], 0, len(labels), arguments["num_views"])
    return order[:size].to(labels.device), view[:size].to(labels.device)


def _student_sides(bench: _Bench, arm_of: Callable[[int], Arm], loss: Callable) -> dict[str, Side]:
    from kdutils import reference

    settings, recipe = bench.settings, student_recipe(bench.settings)
    whole = max(1, settings.train_size // settings.batch_size)
    arguments = fit_arguments(scratch_arm(settings), bench.dataset(settings.batch_size), settings, seed=0)
    index, view = _first_batch(arguments)
    x, labels = arguments["inputs"](index, view), arguments["labels"][index]
    return {
        "ours": _our_student(bench, arm_of, settings, whole),
        "reference": _plain_training(bench, reference.Student(), loss, recipe, whole),
        "limit": _bare_step(seeded(0, SmallCNN), x, labels, recipe, settings.precision, whole),
    }


def _fine_tuning_arguments(bench: _Bench, arch: str, count: int) -> tuple[FineTuning, dict[str, Any]]:
    """A fine-tuning on `count` images whose features are there: a few real ones, repeated to the number it looks up."""
    work = bench.fine_tuning(arch, count)
    with contextlib.redirect_stdout(io.StringIO()):  # it says when features must be fewer for want of memory
        arguments = work.fit_arguments(seed=0)
        one = work.block_features("train", slice(0, min(count, bench.plan.forward_images)), 0)[0]["features"]
    features = one.repeat(math.ceil(count / len(one)), *[1] * (one.dim() - 1))[:count]
    views = max(1, min(arguments["num_views"], int(FEATURE_BYTES / (features.numel() * features.element_size()))))
    work.cached = torch.stack([features] * views)
    return work, arguments | {"num_views": views, "recipe": dataclasses.replace(arguments["recipe"], epochs=1)}


def _fine_tuning_sides(bench: _Bench, arch: str) -> dict[str, Side]:
    from kdutils import reference

    settings, recipe = bench.settings, teacher_recipe(arch, bench.settings)
    whole = max(1, settings.train_size // settings.teacher_batch_size)

    def prepare(steps: int) -> Callable[[], None]:
        work, arguments = _fine_tuning_arguments(bench, arch, steps * settings.teacher_batch_size)
        return partial(_fit_quietly, work.cut(0)[1], **arguments)

    plain = reference.freeze_for_fine_tuning(
        reference.resnet(arch, bench.states[arch]), settings.of_teacher(arch, "trainable")
    )
    loss = partial(
        reference.cross_entropy_loss, label_smoothing=settings.teacher_label_smoothing, size=settings.teacher_size,
        mode=settings.teacher_resize,
    )  # fmt: skip
    work, arguments = _fine_tuning_arguments(bench, arch, settings.teacher_batch_size)
    index, view = _first_batch(arguments)
    x, labels = arguments["inputs"](index, view), arguments["labels"][index]
    return {
        "ours": Side(whole, prepare),
        "reference": _plain_training(bench, plain, loss, recipe, whole),
        "limit": _bare_step(work.cut(0)[1], x, labels, recipe, settings.precision, whole),
    }


def _forward_sides(bench: _Bench, arch: str) -> dict[str, Side]:
    """A teacher's logits for blocks of images: `prefix` is the part of ours that all its seeds share."""
    from kdutils import reference

    settings, size = bench.settings, bench.plan.forward_images
    whole = max(1, settings.train_size // size)
    work = bench.fine_tuning(arch, size)
    suffix = memory_format(work.cut(0)[1].to(settings.device))
    plain = reference.resnet(arch, bench.states[arch]).to(settings.device)
    x = normalise(bench.dataset(size).train.images)
    resident = reference.enlarge(x, settings.teacher_size, settings.teacher_resize)
    resident = resident.contiguous(memory_format=torch.channels_last)

    def prefix() -> Tensor:
        return work.block_features("train", slice(None), 0)[0]["features"]

    @torch.no_grad()
    def plainly() -> Tensor:
        return plain(reference.enlarge(x, settings.teacher_size, settings.teacher_resize))

    @torch.inference_mode()
    def bare() -> Tensor:
        with autocast(settings.device, settings.precision):
            return suffix(work.frozen(resident))

    def repeated(once: Callable[[], object]) -> Side:
        return Side(whole, lambda steps: lambda: [once() for _ in range(steps)])

    return {
        "ours": repeated(lambda: predict(suffix, prefix(), settings.precision, batch_size=250)),
        "reference": repeated(plainly), "limit": repeated(bare), "prefix": repeated(prefix),
    }  # fmt: skip


# Timing


def _seconds(work: Callable[[], object], device: str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        with contextlib.suppress(OSError):  # then the peak is that of the whole run
            Path("/proc/self/clear_refs").write_text("5")


def _peak_mb(device: str) -> float | None:
    """The peak since `_reset_peak` in MB (10^6 bytes): allocated on CUDA, else the process's; None if unknown."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6
    return None


def race(row: dict[str, Any], sides: Callable[[], Mapping[str, Side]], plan: Plan, device: str) -> Iterator[None]:
    """Time a row's sides, alternating; pauses after the warm-up and after every repetition, and completes `row`."""
    works, timed = {}, {}
    prepared = sides()
    for name, side in prepared.items():
        work = side.prepare(1)
        first = _seconds(work, device)  # warm-up
        one = first if first > plan.seconds else _seconds(work, device)
        steps = side.whole if one * side.whole <= plan.seconds else max(1, min(plan.steps, int(plan.seconds / one)))
        timed[name] = min(steps, side.whole)
        if timed[name] > 1:
            work = side.prepare(timed[name])
            work()
        works[name] = work
    yield
    seconds: dict[str, list[float]] = {name: [] for name in works}
    peak = None
    for repetition in range(plan.repetitions):
        for name, work in works.items():
            if name == "ours":
                _reset_peak(device)
            seconds[name].append(_seconds(work, device) * prepared[name].whole / timed[name])
            if name == "ours":
                peak = max(filter(None, (peak, _peak_mb(device))), default=None)
        if repetition + 1 == plan.repetitions:
            row.update(_row_numbers(seconds), device=device, peak_mb=peak, steps=timed)
            row["whole"] = {name: side.whole for name, side in prepared.items()}
        yield


def _row_numbers(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ours, plain, limit = (median.get(name) for name in ("ours", "reference", "limit"))
    return {
        "ours_s": ours, "reference_s": plain, "speedup": plain and plain / ours,
        "limit_s": limit, "of_limit": limit and limit / ours,
        "spread": {name: [min(values), max(values)] for name, values in seconds.items()},
        "times": {name: list(values) for name, values in seconds.items()},
        **({"prefix_s": median["prefix"]} if "prefix" in median else {}),
    }  # fmt: skip


def _shared(row: Mapping[str, Any], key: str, name: str, once: float, times: int) -> dict[str, Any]:
    """A row with `once` seconds, spent for `times` epochs together, shared out among them."""
    more = once / times
    ours = row["ours_s"] + more
    spread = row["spread"] | {"ours": [value + more for value in row["spread"]["ours"]]}
    return {
        **row, "key": key, "name": name, "ours_s": ours, "speedup": row["reference_s"] / ours, "limit_s": None,
        "of_limit": None, "spread": {name: spread[name] for name in ("ours", "reference")},
        "note": f"{once:,.3g} s once, for {times:,} epochs; from the rows of the forward pass",
    }  # fmt: skip


def growth(
    found: dict[str, Any], works: Mapping[float, Callable[[], float]], repetitions: int, per: str
) -> Iterator[None]:
    """Time every size in turn, `repetitions` times; pauses after each; completes `found`: the seconds of every size
    (median, least, most) and their least-squares slope (seconds `per` what the sizes count)."""
    seconds: dict[float, list[float]] = {size: [] for size in works}
    for repetition in range(repetitions + 1):
        for size, work in works.items():
            taken = work()
            if repetition:  # the first is the warm-up
                seconds[size].append(taken)
        if repetition == repetitions:
            sizes = list(seconds)
            centred = np.array(sizes) - np.mean(sizes)
            slopes = [
                float(centred @ np.array([seconds[size][i] for size in sizes]) / max(centred @ centred, 1e-12))
                for i in range(repetitions)
            ]
            found.update(
                per=per, slope_s=statistics.median(slopes), slope_spread=[min(slopes), max(slopes)],
                seconds={str(size): [statistics.median(s), min(s), max(s)] for size, s in seconds.items()},
            )  # fmt: skip
        yield


def _growth_works(bench: _Bench) -> dict[str, tuple[str, dict[float, Callable[[], float]]]]:
    """Student epochs by training images and by views; trainings of one arm by seeds."""
    settings, plan = bench.settings, bench.plan
    scratch = scratch_arm(settings)
    whole = max(1, settings.train_size // settings.batch_size)

    def epoch(changed: Settings, steps: int, scale: float = 1.0) -> Callable[[], float]:
        work = _our_student(bench, lambda _: scratch, changed, steps).prepare(steps)
        return lambda: scale * _seconds(work, settings.device)

    steps_of = sorted({max(1, count // settings.batch_size) for count in plan.image_counts})
    by_images = {steps * settings.batch_size / 1000: epoch(settings, steps) for steps in steps_of}
    steps = min(plan.steps, whole)
    by_views = {}
    for max_shift, shift_step in plan.views:
        changed = dataclasses.replace(settings, max_shift=max_shift, shift_step=shift_step)
        by_views[len(view_table(max_shift, shift_step))] = epoch(changed, steps, whole / steps)

    def trainings(number: int) -> float:
        """Of one epoch each, whole: network, predictions and files included."""
        dataset = bench.dataset(plan.seed_steps * settings.batch_size)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            changed = dataclasses.replace(settings, runs_dir=folder, seeds=list(range(number)), epochs=1)
            return _seconds(lambda: train_students(scratch, dataset, changed), settings.device)

    counts = sorted({len(settings.seeds), *plan.seed_counts})
    return {
        "training images": ("s per epoch and 1,000 images", by_images),
        "views": ("s per epoch and view", by_views),
        "seeds": (f"s per seed, {plan.seed_steps} steps each", {n: partial(trainings, n) for n in counts}),
    }


# Both compute the same


def random_resnet(arch: str, x: Tensor) -> dict[str, Tensor]:
    """The state dict of a ResNet with random weights and ten outputs. Its norms know the means and variances that the
    normalised images x [B, 3, H, W] lead to, or a deep one's numbers would outgrow 16 bits."""
    model = seeded(0, partial(getattr(ensure_torchvision().models, arch), num_classes=10))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def check_first_steps(bench: _Bench) -> tuple[list[dict[str, Any]], tuple[Teacher, ...], list[nn.Module]]:
    """Compare the first step's loss, ours and the reference's, on the same weights and pixels, in float32.

    Our teachers are fine-tuned on a few images as always, and their stored logits used; the reference's have the same
    weights and run live. Returns the losses, our teachers and the reference's (in eval mode, on the CPU).
    Raises `UserError` where the losses differ.
    """
    from kdutils import reference

    settings = dataclasses.replace(
        bench.settings, precision="float32", max_shift=0, shift_step=1, batch_size=16, teacher_batch_size=16,
        teacher_seeds=[0], resnet50_epochs=1, resnet18_epochs=1,
        runs_dir=str(Path(bench.settings.runs_dir) / "checks"),
    )  # fmt: skip
    few = bench.dataset(32)
    pixels = make_views(few.train.images, **settings.views)
    checks: list[dict[str, Any]] = []

    def compare(
        name: str, model: nn.Module, arguments: dict, plain: nn.Module, loss: Callable, tolerance: float
    ) -> None:
        index, view = _first_batch(arguments)
        model.to(settings.device).train()
        ours = arguments["loss"](model(arguments["inputs"](index, view)).float(), index, view).item()
        batch = Split(view_pixels(pixels, index, view), few.train.labels[index])
        inputs = bench.plain_images(len(index), batch, augment=False)
        x = torch.stack([inputs[i][0] for i in range(len(inputs))]).to(settings.device)
        plainly = loss(plain.to(settings.device), x, batch.labels).item()
        if not math.isclose(ours, plainly, rel_tol=tolerance):
            raise UserError(
                f"bench: {name}: our first loss is {ours:.6f}, the reference's {plainly:.6f}; find out which is wrong"
            )
        checks.append({"name": name, "ours": ours, "reference": plainly, "tolerance": tolerance})

    mode = {"size": settings.teacher_size, "mode": settings.teacher_resize}
    teachers, plain_teachers = [], []
    for arch in ARCHITECTURES:
        with contextlib.redirect_stdout(io.StringIO()):
            teachers.append(fine_tune(arch, few, settings))
            work = FineTuning(arch, few, settings)
            arguments, suffix = work.fit_arguments(seed=0), work.suffix(0).tensors
        trainable = settings.of_teacher(arch, "trainable")
        start = bench.states[arch] | work.cut(0)[1].state_dict()
        plain = reference.freeze_for_fine_tuning(reference.resnet(arch, start), trainable)
        for name in ("layer4", "fc") if trainable == "last_block" else ("fc",):
            getattr(plain, name).train()
        loss = partial(reference.cross_entropy_loss, label_smoothing=settings.teacher_label_smoothing, **mode)
        compare(f"{LABELS[arch]}, {WORDS[trainable]}", work.cut(0)[1], arguments, plain, loss, STORED)
        plain_teachers.append(reference.resnet(arch, bench.states[arch] | suffix))

    student, plain = seeded(0, SmallCNN), reference.Student()
    plain.load_state_dict(student.state_dict())
    arguments = fit_arguments(scratch_arm(settings), few, settings, seed=0)
    loss = partial(reference.cross_entropy_loss, label_smoothing=settings.label_smoothing)
    compare("student, cross-entropy", student, arguments, plain, loss, EXACT)
    arguments = fit_arguments(distillation_arm(settings, teachers), few, settings, seed=0)
    on_device = [teacher.to(settings.device) for teacher in plain_teachers]
    compare("student, distillation", student, arguments, plain, _plain_distillation(settings, on_device), STORED)
    return checks, tuple(teachers), plain_teachers


def _plain_distillation(settings: Settings, teachers: Sequence[nn.Module]) -> Callable:
    from kdutils import reference

    return partial(
        reference.distillation_loss, teachers=teachers, temperature=settings.temperature, alpha=settings.alpha,
        label_smoothing=settings.kd_label_smoothing, size=settings.teacher_size, mode=settings.teacher_resize,
    )  # fmt: skip


def compare_accuracy(bench: _Bench, seed: int) -> tuple[float, float]:
    """Accuracy on held-out images after the same short training from the same weights: ours, and the reference's."""
    from kdutils import reference

    settings, plan = bench.settings, bench.plan
    settings = dataclasses.replace(settings, epochs=plan.accuracy_epochs)
    model, plain = seeded(seed, SmallCNN), reference.Student()
    plain.load_state_dict(model.state_dict())
    dataset = bench.dataset(settings.train_size)
    _fit_quietly(model, **fit_arguments(scratch_arm(settings), dataset, settings, seed))
    logits = predict(model, normalise(bench.held_out.images), settings.precision)
    ours = (logits.argmax(dim=1) == bench.held_out.labels).float().mean().item()
    how = dataclasses.asdict(student_recipe(settings))
    batches = reference.loader(bench.plain_images(settings.train_size), how.pop("batch_size"), settings.device)
    loss = partial(reference.cross_entropy_loss, label_smoothing=settings.label_smoothing)
    reference.train(plain.to(settings.device), batches, loss, settings.device, **how)
    held_out = bench.plain_images(len(bench.held_out.labels), bench.held_out, augment=False)
    return ours, reference.accuracy(plain, held_out, settings.device)


# The whole


def run(settings: Settings, quick: bool = False) -> dict[str, Any]:
    """Measure, print the table and write `bench/bench.json` in the settings' folder of runs; returns its content.

    The data and the weights of the settings are not needed. `quick` shows that everything works, with few and small
    repetitions: its numbers say little. Raises `UserError` if the reference does not compute the same.
    """
    apply_threads(settings)
    ensure_torchvision()  # or the reference could not import it beside a CPU-only torch
    plan = QUICK if quick else FULL
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bench = _prepare(settings, plan, Path(folder))
        found = _measure(bench)
    found = {
        "profile": Path(settings.profile).stem, "quick": quick, "machine": machine(settings),
        "conditions": _conditions(bench.settings, plan), **found,
        "end_to_end": end_to_end(settings.run_folder, settings),
    }  # fmt: skip
    if found["end_to_end"]:
        found["ratios"]["end_to_end_minutes"] = found["end_to_end"]["seconds"] / 60
    found["took_s"] = time.monotonic() - start
    path = project_path(settings.runs_dir) / "bench" / "bench.json"
    write_text(path, json.dumps(found, indent=1) + "\n")
    print("\n".join(summary(found)))
    print(f"benchmark: {found['took_s']:.0f} s; {shown_path(path)}")
    return found


def _prepare(settings: Settings, plan: Plan, folder: Path) -> _Bench:
    size = min(settings.train_size, plan.train_size or settings.train_size)
    images, labels = shapes.draw(shapes.SHAPES10, size + plan.held_out, seed=0)
    some = F.interpolate(normalise(images[:32]), (settings.teacher_size,) * 2)
    states = {arch: random_resnet(arch, some) for arch in ARCHITECTURES}
    (folder / "weights").mkdir()
    for arch, state in states.items():
        save_file(state, folder / "weights" / f"{arch}.safetensors")
    # the reference does without what torchvision's ResNets do not have
    settings = dataclasses.replace(
        settings, train_size=size, weights=str(folder / "weights"), runs_dir=str(folder / "runs"), profile="bench",
        resnet50_standardize=False, resnet18_standardize=False,
    )  # fmt: skip
    train = Split(images[:size], labels[:size]).to(settings.device)
    held_out = Split(images[size:], labels[size:]).to(settings.device)
    backbones = {arch: load_backbone(arch, settings.weights) for arch in ARCHITECTURES}
    return _Bench(settings, plan, train, held_out, states, backbones)


def _measure(bench: _Bench) -> dict[str, Any]:
    """Checks, accuracy, rows and slopes, behind one progress bar."""
    from kdutils import reference

    settings, plan, device = bench.settings, bench.plan, bench.settings.device
    found: dict[str, Any] = {"accuracy": {"ours": [], "reference": [], "epochs": plan.accuracy_epochs}}
    teachers: list[Teacher] = []
    plain_teachers: list[nn.Module] = []

    def check() -> Iterator[None]:
        found["checks"], ours, plain = check_first_steps(bench)
        teachers.extend(ours)
        plain_teachers.extend(teacher.to(device) for teacher in plain)
        yield

    def accuracy() -> Iterator[None]:
        for seed in range(plan.accuracy_seeds):
            for name, value in zip(("ours", "reference"), compare_accuracy(bench, seed)):
                found["accuracy"][name].append(value)
            yield

    def baseline(_: int) -> Arm:
        return scratch_arm(settings)

    def distilling(count: int) -> Arm:
        """With stored logits of the number of images: any will do."""
        logits = torch.randn(count, len(view_table(**settings.views)), 10, device=device).half()
        given = [dataclasses.replace(t, runs=[dataclasses.replace(t.runs[0], view_logits=logits)]) for t in teachers]
        return distillation_arm(settings, given)

    epoch = f"one epoch of {settings.train_size:,} images"
    plain_loss = partial(reference.cross_entropy_loss, label_smoothing=settings.label_smoothing)
    rows = {"student_ce": (
        f"Student, cross-entropy, {epoch}", lambda: _student_sides(bench, baseline, plain_loss)
    )}  # fmt: skip

    def distillation_sides() -> dict[str, Side]:
        sides = _student_sides(bench, distilling, _plain_distillation(settings, plain_teachers))
        # beside it, for their ratio
        return sides | {"cross_entropy": _our_student(bench, baseline, settings, sides["ours"].whole)}

    rows["student_kd"] = f"Student, distillation from both teachers, {epoch}", distillation_sides
    for arch in ARCHITECTURES:
        trained = WORDS[settings.of_teacher(arch, "trainable")]
        rows[f"{arch}_fit"] = f"{LABELS[arch]}, {trained}, {epoch}", partial(_fine_tuning_sides, bench, arch)
    for arch in ARCHITECTURES:
        name = f"{LABELS[arch]}, forward pass of {settings.train_size:,} images at {settings.teacher_size} px"
        rows[f"{arch}_forward"] = name, partial(_forward_sides, bench, arch)
    made = {key: {"key": key, "name": name} for key, (name, _) in rows.items()}
    slopes: dict[str, dict] = {"training images": {}, "views": {}, "seeds": {}}

    def slope(name: str) -> Iterator[None]:  # its data sets are made when their turn comes
        per, works = _growth_works(bench)[name]
        yield from growth(slopes[name], works, plan.repetitions, per)

    parts: list[tuple[int, Iterator[None]]] = [(1, check()), (plan.accuracy_seeds, accuracy())]
    parts += [(plan.repetitions + 1, race(made[key], sides, plan, device)) for key, (_, sides) in rows.items()]
    parts += [(plan.repetitions + 1, slope(name)) for name in slopes]
    turns = [(part, turn == count) for count, part in parts for turn in range(1, count + 1)]
    for part, is_last in progress_lines(turns, "bench"):
        next(part)
        if is_last:
            part.close()  # lets go of its workers and tensors
    return found | {"rows": _all_rows(bench, made, slopes["seeds"]), "growth": slopes, "ratios": _ratios(made, slopes)}


def _all_rows(bench: _Bench, made: dict[str, dict[str, Any]], by_seeds: dict[str, Any]) -> list[dict[str, Any]]:
    """The measured rows, those with a one-off pass shared out, and that of an arm's seeds."""
    settings, size = bench.settings, bench.settings.train_size
    views = len(view_table(**settings.views))
    epoch = f"one epoch of {size:,} images"
    for row in made.values():
        parts = [
            f"{name}: {row['steps'][name]} of {row['whole'][name]}, scaled"
            for name in ("ours", "reference", "limit")
            if row["steps"][name] < row["whole"][name]
        ]
        row["note"] = "; ".join(parts)
        if row["key"].endswith("_forward"):
            row["images_per_s"] = {"ours": size / row["ours_s"], "reference": size / row["reference_s"]}
            speeds = f"{size / row['ours_s']:,.0f} against {size / row['reference_s']:,.0f} images/s"
            row["note"] = "; ".join([speeds, *parts])
    once = 0.0
    result = [made["student_ce"], made["student_kd"]]
    tuned = []
    for arch in ARCHITECTURES:
        forward, seeds = made[f"{arch}_forward"], len(settings.teacher_seeds)
        # the suffix, which is the rest of the forward pass, runs once for every teacher seed
        once += views * (forward["prefix_s"] + seeds * max(0.0, forward["ours_s"] - forward["prefix_s"]))
        with contextlib.redirect_stdout(io.StringIO()):
            trained_views = bench.fine_tuning(arch, 10).trained_views
        key, epochs = f"{arch}_fit", settings.of_teacher(arch, "epochs")
        name = f"{made[key]['name'].removesuffix(epoch)}its share of the feature pass included"
        features = trained_views * forward["prefix_s"]
        tuned += [made[key], _shared(made[key], f"{key}_shared", name, features, seeds * epochs)]
    name = "Student, distillation from both teachers, its share of the teachers' pass included"
    times = len(settings.seeds) * settings.epochs
    result.append(_shared(made["student_kd"], "student_kd_shared", name, once, times))
    result += tuned + [made[f"{arch}_forward"] for arch in ARCHITECTURES]
    many = len(settings.seeds)
    median, least, most = by_seeds["seconds"][str(many)]
    result.append({
        "key": "seeds", "name": f"{many} seeds of one arm", "ours_s": median, "reference_s": None, "speedup": None,
        "limit_s": None, "of_limit": None, "spread": {"ours": [least, most]}, "device": settings.device,
        "peak_mb": None, "steps": {"ours": many * bench.plan.seed_steps},
        "note": f"{median / by_seeds['seconds']['1'][0]:.2f} times one seed; {bench.plan.seed_steps} steps a seed, not "
        "scaled, predictions and files included",
    })  # fmt: skip
    return result


def _ratios(made: Mapping[str, Mapping[str, Any]], slopes: Mapping[str, Mapping]) -> dict[str, float]:
    """Medians over the repetitions, in which what is compared was timed one after the other."""

    def ratio(key: str, over: str) -> float:
        times = made[key]["times"]
        return statistics.median(a / b for a, b in zip(times["ours"], times[over], strict=True))

    seconds = slopes["seeds"]["seconds"]
    ratios = {
        "distillation_over_cross_entropy": ratio("student_kd", "cross_entropy"),
        "student_over_bare_step": ratio("student_ce", "limit"),
    }
    if "5" in seconds:
        ratios["five_seeds_over_one"] = seconds["5"][0] / seconds["1"][0]
    return ratios


def machine(settings: Settings) -> dict[str, Any]:
    """What the times were measured on: processor, cores, GPU if one is used, torch, precision, threads."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if settings.device == "cuda" else None
    return {
        "cpu": cpu, "cores": cores, "gpu": gpu, "device": settings.device, "precision": settings.precision,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip


def _conditions(settings: Settings, plan: Plan) -> list[str]:
    """What the table's head says."""
    return [
        "Images: generated (shapes10). ResNets: random weights. Speed depends on neither.",
        f"Median of {plan.repetitions} alternating repetitions, in seconds. What would take more than "
        f"{plan.seconds:g} s each is timed for {plan.steps} steps, or fewer where a step takes long, and scaled.",
        f"Ours: {settings.precision}, channels-last. Reference: float32, DataLoader with a worker on every core, "
        "teachers run in every step. Limit: forward, backward and optimiser on one resident batch, in our precision; "
        "of the forward passes, the networks alone.",
        "Of the limit: limit / ours. Peak: of ours; "
        + ("on the GPU." if settings.device == "cuda" else "of the whole process, the benchmark's own data included."),
        f"Batches: {settings.batch_size} (student), {settings.teacher_batch_size} (ResNets), {plan.forward_images} "
        f"(forward passes). Views: {len(view_table(**settings.views))}.",
    ]  # fmt: skip


def end_to_end(folder: Path, settings: Settings) -> dict[str, Any] | None:
    """Seconds of the four notebooks in the last run of that folder, from its timings.csv; None if there is none.

    A teacher's first fine-tuning computed features that `features of every view` counts, too: it counts here for what
    it took beyond them.
    """
    path = folder / "timings.csv"
    if not path.is_file():
        return None
    about = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    if (about["device"], about["precision"]) != (settings.device, settings.precision):
        return None  # a run elsewhere says nothing here
    with path.open(encoding="utf-8", newline="") as file:
        seconds = {line["stage"]: float(line["seconds"]) for line in csv.DictReader(file)}
    total = sum(seconds.values())
    for arch in ARCHITECTURES:
        features = seconds.get(f"{arch}: features of every view", 0.0)
        fits = [value for stage, value in seconds.items() if stage.startswith(f"{arch}: fine-tuning")]
        total -= min(features, max(fits, default=0.0))
    return {"seconds": total, "stages": len(seconds), "source": f"from the last run ({shown_path(path)})"}


# What is shown


def _number(value: float | None, digits: str = ".3g") -> str:
    return "–" if value is None else f"{value:,.0f}" if abs(value) >= 100 else format(value, digits)


HEAD = ("What", "Ours (s)", "Reference (s)", "Speed-up", "Limit (s)", "Of the limit", "Peak (MB)", "Steps timed")


def _cells(row: Mapping[str, Any]) -> list[str]:
    def with_spread(name: str) -> str:
        spread = row["spread"].get(name)
        return _number(row[f"{name}_s"]) + (f" ({_number(spread[0])}–{_number(spread[1])})" if spread else "")

    return [
        row["name"], with_spread("ours"), with_spread("reference"),
        "–" if row["speedup"] is None else f"{_number(row['speedup'])}x", with_spread("limit"),
        _number(row["of_limit"], ".2f"), _number(row["peak_mb"]),
        " / ".join(str(row["steps"][name]) for name in ("ours", "reference", "limit") if name in row["steps"]),
    ]  # fmt: skip


def _table(lines: Sequence[Sequence[str]]) -> list[str]:
    """Aligned text, the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return [
        "  ".join([line[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])])
        for line in lines
    ]


def _about_machine(found: Mapping[str, Any]) -> str:
    about = found["machine"]
    gpu = f"{about['gpu']}, " if about["gpu"] else ""
    return (
        f"{gpu}{about['cpu']}, {about['cores']} cores, {about['threads']} threads; torch {about['torch']}; device "
        f"{about['device']}, {about['precision']}; profile {found['profile']}"
    )


def _findings(found: Mapping[str, Any]) -> list[str]:
    """Losses, accuracy, ratios, slopes and the whole, a line each."""
    lines = [f"First loss, {c['name']}: ours {c['ours']:.5f}, reference {c['reference']:.5f}" for c in found["checks"]]
    accuracy = found["accuracy"]
    shown = {name: ", ".join(f"{value:.1%}" for value in accuracy[name]) for name in ("ours", "reference")}
    lines.append(
        f"Accuracy on held-out images after {accuracy['epochs']} epoch(s), by seed: ours {shown['ours']}; reference "
        f"{shown['reference']}"
    )
    lines += [f"{RATIO_NAMES[key]}: {value:.2f}" for key, value in found["ratios"].items()]
    for name, one in found["growth"].items():
        low, high = one["slope_spread"]
        points = "; ".join(
            f"{float(size) * 1000 if name == 'training images' else float(size):,.0f}: {_number(seconds[0])} s"
            for size, seconds in one["seconds"].items()
        )
        slope = f"{_number(one['slope_s'])} ({_number(low)} to {_number(high)}) {one['per']}"
        lines.append(f"Growth with {name}: {slope} [{points}]")
    whole = found["end_to_end"]
    if whole:
        lines.append(f"End to end, {whole['stages']} stages: {whole['seconds'] / 60:.1f} minutes, {whole['source']}")
    else:
        lines.append("End to end: left out, because this profile's notebooks were not run here yet (no timings.csv)")
    return lines


def summary(found: Mapping[str, Any]) -> list[str]:
    """The benchmark's table and findings, as the terminal shows them."""
    notes = [f"  {row['name']}: {row['note']}" for row in found["rows"] if row["note"]]
    head = [_about_machine(found), *found["conditions"], ""]
    table = _table([HEAD, *map(_cells, found["rows"])])
    return [*head, *table, "", "Notes", *notes, "", *_findings(found)]


def _target_lines(found: Mapping[str, Any]) -> list[list[str]]:
    """Targets beside what was measured: a column for a CPU, one for a GPU, of which this run fills one."""
    speed_ups = {row["key"]: row for row in found["rows"]}
    on_gpu = found["machine"]["device"] == "cuda"
    lines = []
    for key, kind, cpu, gpu in TARGETS:
        if key in speed_ups:
            name, value, unit = f"{speed_ups[key]['name']}: speed-up", speed_ups[key]["speedup"], "x"
        else:
            name, value, unit = RATIO_NAMES[key], found["ratios"].get(key), ""
        target = gpu if on_gpu else cpu
        shown = "not measured"
        if value is not None:
            met = value >= target if kind == "at least" else value <= target
            shown = f"{_number(value)}{unit}, {'met' if met else 'missed'}"
        measured = ["open", shown] if on_gpu else [shown, "open"]
        lines.append([name, f"{kind} {cpu}{unit}", measured[0], f"{kind} {gpu}{unit}", measured[1]])
    return lines


def performance_page(bench: Mapping[str, Any], notes: str) -> str:
    """docs/performance.md: what was measured, the targets, and `notes`, the hand-written part, between its marks."""
    on_gpu = bench["machine"]["device"] == "cuda"
    left_open = (
        "The CPU column is open: this run used the GPU." if on_gpu
        else "The GPU column is open: no CUDA machine was at hand."
    )  # fmt: skip

    def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
        return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]

    noted = [f"- {row['name']}: {row['note']}" for row in bench["rows"] if row["note"]]
    quick = ["A quick run, to see that everything works: its numbers say little.", ""] if bench["quick"] else []
    lines = [
        "# Performance", "",
        "Made by `python -m kdutils bench --page` from `bench.json`; only the last section is written by hand.", "",
        *quick, _about_machine(bench) + ".", "",
        "## Measured", "", *(f"- {condition}" for condition in bench["conditions"]), "",
        *markdown(HEAD, [_cells(row) for row in bench["rows"]]), "", "Steps timed: ours / reference / limit.", "",
        *noted, "",
        "## Targets", "",
        *markdown(("What", "2-core CPU", "measured", "one data-centre GPU", "measured"), _target_lines(bench)),
        "", left_open, "",
        "## Same losses, accuracy, growth", "", *(f"- {line}" for line in _findings(bench)), "",
        "## What was tried and did not pay", "", NOTES[0], notes.strip("\n"), NOTES[1], "",
    ]  # fmt: skip
    return "\n".join(lines)


def read_notes(page: Path) -> str:
    """The hand-written part of an existing page; empty without one. Raises `UserError` if its marks are lost."""
    if not page.is_file():
        return ""
    text = page.read_text(encoding="utf-8")
    if any(text.count(mark) != 1 for mark in NOTES):
        raise UserError(f"{shown_path(page)}: must hold {' and '.join(NOTES)} once each; put them around what to keep")
    return text.partition(NOTES[0])[2].partition(NOTES[1])[0].strip("\n")


def write_page(bench: Mapping[str, Any], page: Path) -> Path:
    """Write the page anew, with the hand-written part of the one that is there."""
    write_text(page, performance_page(bench, read_notes(page)))
    return page

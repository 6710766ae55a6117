"""The benchmark: our code against the tutorial's way (`kdutils.lab.tutorial`) and against the limit, the bare step.

Every time is the median of alternating repetitions: ours, the tutorial's, the limit, ours again, ... Speed depends
neither on what images show nor on weights, so the images are generated and the teachers' weights are random.
"""

import contextlib
import dataclasses
import io
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from kdutils.cache import write_text
from kdutils.compat import ensure_torchvision
from kdutils.data import shapes
from kdutils.data.images import Dataset, Split
from kdutils.data.views import view_table
from kdutils.lab.performance import conditions, machine, summary
from kdutils.models import SmallCNN, normalise
from kdutils.progress import progress_lines
from kdutils.settings import Settings, TeacherSettings, apply_threads, project_path, shown_path
from kdutils.students import Method, fit_arguments, named_method, train_students
from kdutils.teachers import FineTuning
from kdutils.training import autocast, channels_last, draw, fit, make_optimizer, predict
from kdutils.weights import seeded

ensure_torchvision()  # or the tutorial could not import it beside a CPU-only torch
from kdutils.lab import tutorial  # noqa: E402

ARCHITECTURES = ("resnet50", "resnet18")
TRAINED = {"resnet50": "last_layer", "resnet18": "last_block"}
LABELS = {"resnet50": "ResNet-50", "resnet18": "ResNet-18"}
WORDS = {"last_layer": "last layer", "last_block": "last block and last layer"}
METHODS = 6  # of the four notebooks: from scratch, from each teacher, and from both by three rules
FEATURE_BYTES = 1e9  # of features that a timed fine-tuning looks up: more than any processor's cache holds

Work = Callable[[], object]


class Plan(NamedTuple):
    """How much is measured: repetitions, and about `seconds` for each side in each of them.

    A side whose epoch takes longer is timed for at most `steps` steps, and scaled.
    """

    repetitions: int
    seconds: float
    steps: int
    forward_images: int
    train_size: int | None
    seed_steps: int


FULL = Plan(5, 4.0, 20, 50, None, 12)
QUICK = Plan(2, 0.1, 2, 5, 600, 1)


class Side(NamedTuple):
    """One way to do a row's work: `prepare(steps)` returns a function that does so many of its `whole` steps."""

    whole: int
    prepare: Callable[[int], Work]


class _Bench(NamedTuple):
    """What all rows share: settings (with temporary folders), training images, state dicts of the random ResNets."""

    settings: Settings
    plan: Plan
    train: Split
    states: dict[str, dict[str, Tensor]]

    def dataset(self, count: int) -> Dataset:
        """A data set of `count` training images, repeated where there are fewer, and 10 for validation and test."""
        index = torch.arange(count, device=self.train.labels.device) % len(self.train.labels)
        train, few = Split(*(tensor[index] for tensor in self.train)), Split(*(tensor[:10] for tensor in self.train))
        sums = {"train": f"bench{count}", "val": "bench", "test": "bench"}
        return Dataset("generated images", list(shapes.SHAPES10), train, few, few, f"bench{count}", sums, True, False)

    def method(self, name: str, count: int) -> Method:
        """The student's method: `scratch`, or `kd` from both teachers, with random soft labels of `count` images."""
        table = view_table(**self.settings.views)
        logits = torch.randn((count, len(table), 10), device=self.settings.device).half()
        teachers: Any = [_RandomTeacher(arch, logits, table) for arch in ARCHITECTURES] if name == "kd" else []
        return named_method(name, self.settings, teachers)

    def plain_resnet(self, arch: str) -> nn.Module:
        """The tutorial's ResNet, on the device."""
        return tutorial.resnet(arch, self.states[arch]).to(self.settings.device)

    def plain_loss(self, name: str) -> Callable:
        """The tutorial's loss of a `teacher`, or of the student's method `scratch` or `kd`."""
        s = self.settings
        seen: dict[str, Any] = {"size": s.teacher_size, "mode": s.teacher_resize}
        if name == "teacher":
            return partial(tutorial.cross_entropy_loss, label_smoothing=s.teacher_label_smoothing, **seen)
        if name == "scratch":
            return partial(tutorial.cross_entropy_loss, label_smoothing=s.label_smoothing)
        soft: dict[str, Any] = {"temperature": s.temperature, "alpha": s.alpha, "label_smoothing": s.kd_label_smoothing}
        teachers = [self.plain_resnet(arch) for arch in ARCHITECTURES]
        return partial(tutorial.distillation_loss, teachers=teachers, **soft, **seen)


# --- what is used of the inside of `teachers` and `students` ---


class _RandomTeacher(NamedTuple):
    """A teacher of one run, with random soft labels float16 [N, V, C]: one for every (index, view) of its images."""

    label: str
    soft_labels: Tensor
    table: Tensor

    def logits(self, images: Tensor, view: int = 0) -> Tensor:
        return self.soft_labels[None, :, view]

    def run_number(self, student_seed: int) -> int:
        return 0


def _features(work: FineTuning, count: int) -> Tensor:
    """Features float16 [count, ...] of the first training images in view 0: computed now, and not kept."""
    return work._make_features(work.dataset.train.images[:count], 0)[0]["features"]


def _train_on(work: FineTuning, features: Tensor) -> None:
    """Make the fine-tuning look up these features [V, N, ...] of its training images."""
    work.training_features = features


# --- the work: our way, the tutorial's, and the bare step ---


def _quietly(function: Callable, *given: Any, **named: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*given, **named)


def _plain_images(split: Split, settings: Settings) -> tutorial.Images:
    """Images as the tutorial holds them, augmented as the settings say."""
    arrays = split.images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    augmented = tutorial.transform(settings.max_shift, settings.shift_step)
    return tutorial.Images(arrays, split.labels.tolist(), augmented)


def _first_batch(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The (index, view) pairs [B] that `fit` begins with."""
    labels, size = arguments["labels"], arguments["recipe"].batch_size
    order, view = draw(arguments["seed"], 0, len(labels), arguments["num_views"])
    return order[:size].to(labels.device), view[:size].to(labels.device)


def _training_sides(
    bench: _Bench, ours: Callable[[int], Work], plain: nn.Module, loss: Callable, bare: nn.Module, arguments: Mapping
) -> dict[str, Side]:
    """Our epoch; the tutorial's, of the network `plain`; and steps of the network `bare` on the first batch that `fit`
    would take with these arguments, in our precision and layout."""
    settings, device, recipe = bench.settings, bench.train.labels.device, arguments["recipe"]
    plain, bare = plain.to(device), channels_last(bare.to(device)).train()
    how = dataclasses.asdict(recipe)
    batch_size = how.pop("batch_size")
    index, view = _first_batch(arguments)
    x, labels = arguments["inputs"](index, view), arguments["labels"][index]
    optimizer = make_optimizer(bare, recipe, device)

    def plainly(steps: int) -> Work:
        images = _plain_images(bench.dataset(steps * batch_size).train, settings)
        batches = tutorial.loader(images, batch_size, settings.device)
        return lambda: tutorial.train(plain, batches, loss, settings.device, **how)

    def barely(steps: int) -> None:
        for _ in range(steps):
            with autocast(device.type, settings.precision):
                logits = bare(x)
            value = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()

    whole = max(1, settings.train_size // batch_size)
    limit = Side(whole, lambda steps: partial(barely, steps))
    return {"ours": Side(whole, ours), "tutorial": Side(whole, plainly), "limit": limit}


def _student_sides(bench: _Bench, method: str) -> dict[str, Side]:
    """An epoch of the student. Beside distillation stands cross-entropy, for their ratio."""
    settings = dataclasses.replace(bench.settings, epochs=1)

    def arguments(name: str, steps: int) -> dict[str, Any]:
        count = steps * settings.batch_size
        return _quietly(fit_arguments, bench.method(name, count), bench.dataset(count), settings, seed=0)

    def epoch(name: str, steps: int) -> Work:
        return partial(_quietly, fit, seeded(0, SmallCNN), **arguments(name, steps))

    plain, bare = tutorial.Student(), seeded(0, SmallCNN)
    ours, loss = partial(epoch, method), bench.plain_loss(method)
    sides = _training_sides(bench, ours, plain, loss, bare, arguments("scratch", 1))
    if method != "scratch":
        sides["cross_entropy"] = sides["ours"]._replace(prepare=partial(epoch, "scratch"))
    return sides


def _fine_tuning_sides(bench: _Bench, arch: str) -> dict[str, Side]:
    """An epoch of a fine-tuning, on features that are there."""
    settings = bench.settings

    def prepared(steps: int) -> tuple[nn.Module, dict[str, Any]]:
        """The trained part and the arguments to fit it: features of a few images, repeated to as many as needed."""
        count = steps * settings.teacher_batch_size
        work = FineTuning(arch, bench.dataset(count), settings)
        arguments = _quietly(work.fit_arguments, seed=0)  # it tells where views must be fewer for want of memory
        few = _features(work, min(count, bench.plan.forward_images))
        features = few.repeat(math.ceil(count / len(few)), *[1] * (few.dim() - 1))[:count]
        affordable = max(1, int(FEATURE_BYTES / (features.numel() * features.element_size())))
        views = min(arguments["num_views"], affordable)
        _train_on(work, torch.stack([features] * views))
        one_epoch = dataclasses.replace(arguments["recipe"], epochs=1)
        return work.cut(0)[1], arguments | {"num_views": views, "recipe": one_epoch}

    def ours(steps: int) -> Work:
        trained, arguments = prepared(steps)
        return partial(_quietly, fit, trained, **arguments)

    plain = tutorial.freeze_for_fine_tuning(bench.plain_resnet(arch), TRAINED[arch])
    return _training_sides(bench, ours, plain, bench.plain_loss("teacher"), *prepared(1))


def _forward_sides(bench: _Bench, arch: str) -> dict[str, Side]:
    """A teacher's logits for blocks of images. `frozen`: the part of ours that all its seeds share."""
    settings, size = bench.settings, bench.plan.forward_images
    work = FineTuning(arch, bench.dataset(size), settings)
    trained = channels_last(work.cut(0)[1].to(settings.device))
    plain = bench.plain_resnet(arch)
    x = normalise(bench.dataset(size).train.images)
    resident = tutorial.enlarge(x, settings.teacher_size, settings.teacher_resize)
    resident = resident.contiguous(memory_format=torch.channels_last)
    alone = nn.Sequential(*list(work.frozen.children())[2:])  # without normalising and resizing

    @torch.no_grad()
    def plainly() -> Tensor:
        return plain(tutorial.enlarge(x, settings.teacher_size, settings.teacher_resize))

    @torch.inference_mode()
    def bare() -> Tensor:
        with autocast(settings.device, settings.precision):
            return trained(alone(resident))

    def ours() -> Tensor:
        return predict(trained, _features(work, size), settings.precision, batch_size=250)

    def repeated(once: Work) -> Side:
        return Side(max(1, settings.train_size // size), lambda steps: lambda: [once() for _ in range(steps)])

    frozen = repeated(partial(_features, work, size))
    return {"ours": repeated(ours), "tutorial": repeated(plainly), "limit": repeated(bare), "frozen": frozen}


def _seeds_sides(bench: _Bench) -> dict[str, Side]:
    """Short trainings of all seeds and of one: networks, predictions and files included."""
    dataset = bench.dataset(bench.plan.seed_steps * bench.settings.batch_size)

    def trainings(seeds: list[int]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            settings = dataclasses.replace(bench.settings, runs_dir=folder, seeds=seeds, epochs=1)
            _quietly(train_students, bench.method("scratch", 0), dataset, settings)

    def side(seeds: list[int]) -> Side:
        return Side(1, lambda steps: partial(trainings, seeds))

    return {"ours": side(bench.settings.seeds), "one_seed": side(bench.settings.seeds[:1])}


# --- timing ---


def _seconds(work: Work, device: str) -> float:
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device, lambda: None)
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def race(sides: Mapping[str, Side], plan: Plan, device: str) -> dict[str, Any]:
    """Time the sides in turn, again and again.

    Returns `times` (seconds of each side's whole work, by repetition), `seconds` (their median, least and most) and
    `steps` (how many were timed, of how many).
    """
    works, steps = {}, {}
    for name, side in sides.items():
        work = side.prepare(1)
        first = _seconds(work, device)  # warm-up
        one = first if first > plan.seconds else _seconds(work, device)
        some = side.whole if one * side.whole <= plan.seconds else max(1, min(plan.steps, int(plan.seconds / one)))
        steps[name] = min(some, side.whole)
        if steps[name] > 1:
            work = side.prepare(steps[name])
            work()
        works[name] = work
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(plan.repetitions):
        for name, work in works.items():
            times[name].append(_seconds(work, device) * sides[name].whole / steps[name])
    return {
        "seconds": {name: [statistics.median(values), min(values), max(values)] for name, values in times.items()},
        "times": times,
        "steps": {name: [steps[name], side.whole] for name, side in sides.items()},
    }


# --- the whole ---


def run(settings: Settings, quick: bool = False) -> dict[str, Any]:
    """Measure, print the table and write `bench/bench.json` in the settings' folder of runs; returns its content.

    Needs neither the data nor the weights of the settings. `quick` shows that everything works, with few and small
    repetitions: its numbers say little.
    """
    apply_threads(settings)
    plan = QUICK if quick else FULL
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(settings, plan, Path(folder))
        rows = _measure(bench)
    found = {
        "profile": Path(settings.profile).stem,
        "quick": quick,
        "machine": machine(settings),
        "conditions": conditions(bench.settings, plan.repetitions, plan.seconds, plan.steps),
        "rows": rows,
        "took_s": time.monotonic() - start,
    }
    path = project_path(settings.runs_dir) / "bench" / "bench.json"
    write_text(path, json.dumps(found, indent=1) + "\n")
    print("\n".join(summary(found)))
    print(f"benchmark: {found['took_s']:.0f} s; {shown_path(path)}")
    return found


def random_resnet(arch: str, x: Tensor) -> dict[str, Tensor]:
    """The state dict of a ResNet with random weights and ten outputs.

    Its norms know the means and variances of the normalised images x [B, 3, H, W]: else the activations of a deep
    network would overflow float16.
    """
    model = seeded(0, partial(getattr(ensure_torchvision().models, arch), num_classes=10))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def prepare(settings: Settings, plan: Plan, folder: Path) -> _Bench:
    """Generate the images and the ResNets' weights of a benchmark whose files lie in `folder`."""
    size = min(settings.train_size, plan.train_size or settings.train_size)
    images, labels = shapes.draw(shapes.SHAPES10, size, seed=0)
    some = F.interpolate(normalise(images[:32]), (settings.teacher_size,) * 2)
    states = {arch: random_resnet(arch, some) for arch in ARCHITECTURES}
    (folder / "weights").mkdir()
    for arch, state in states.items():
        save_file(state, folder / "weights" / f"{arch}.safetensors")
    settings = dataclasses.replace(
        settings,
        teachers=_resnets(settings, str(folder / "weights")),
        train_size=size,
        runs_dir=str(folder / "runs"),
        profile="bench",
    )
    return _Bench(settings, plan, Split(images, labels).to(settings.device), states)


def _resnets(settings: Settings, weights: str) -> list[TeacherSettings]:
    """The two ResNets with the recipes of the settings' teachers, and what the tutorial's networks have alone."""
    names = ("size", "resize", "batch_size", "label_smoothing")
    common: dict[str, Any] = {name: getattr(settings, f"teacher_{name}") for name in names}
    common |= {"weights": weights, "standardize": False, "last_layer_factor": 1.0, "folds": 1}
    return [
        dataclasses.replace(teacher, name=arch, label=arch, trainable=TRAINED[arch], **common)
        for arch, teacher in zip(ARCHITECTURES, settings.teachers, strict=True)
    ]


def _measure(bench: _Bench) -> list[dict[str, Any]]:
    """The rows: `key`, `name` and what `race` found; the last is added up from the others."""
    settings = bench.settings
    epoch = f"one epoch of {settings.train_size:,} images"
    jobs: dict[str, tuple[str, Callable[[], dict[str, Side]]]] = {
        "student_ce": (f"Student, cross-entropy, {epoch}", partial(_student_sides, bench, "scratch")),
        "student_kd": (f"Student, distillation from both teachers, {epoch}", partial(_student_sides, bench, "kd")),
    }
    for arch, label in LABELS.items():
        trained = WORDS[TRAINED[arch]]
        forward = f"{label}, forward pass of {settings.train_size:,} images at {settings.teacher_size} px"
        jobs[f"{arch}_fit"] = f"{label}, {trained}, {epoch}", partial(_fine_tuning_sides, bench, arch)
        jobs[f"{arch}_forward"] = forward, partial(_forward_sides, bench, arch)
    seeds = f"Student, {len(settings.seeds)} seeds of {bench.plan.seed_steps} steps"
    jobs["seeds"] = seeds, partial(_seeds_sides, bench)
    rows = {}
    for key in progress_lines(list(jobs), "bench"):
        name, sides = jobs[key]
        rows[key] = {"key": key, "name": name, **race(sides(), bench.plan, settings.device)}
    medians = {key: {side: times[0] for side, times in row["seconds"].items()} for key, row in rows.items()}
    name = f"The four notebooks: {METHODS * len(settings.seeds)} students of {settings.epochs} epochs"
    seconds = {side: [value] for side, value in notebooks_seconds(settings, medians).items()}
    return [*rows.values(), {"key": "notebooks", "name": name, "seconds": seconds}]


def notebooks_seconds(settings: Settings, medians: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Seconds of the four notebooks, ours and the tutorial's, added up from the rows' epochs and forward passes.

    Ours pass every view of the training images through the teachers once; the tutorial's only the images they score.
    """
    student_epochs, seeds = len(settings.seeds) * settings.epochs, len(settings.teacher_seeds)
    scored = (settings.val_size + settings.test_size) / settings.train_size  # in terms of a pass
    # The tutorial's students of one teacher run one in every step: both together take as long as one without a teacher
    # and one with both.
    counts = {"ours": (1, 5, len(view_table(**settings.views)) + scored), "tutorial": (2, 4, scored)}
    total = {}
    for side, (alone, distilled, passes) in counts.items():
        takes = {key: row[side] for key, row in medians.items() if side in row}
        total[side] = student_epochs * (alone * takes["student_ce"] + distilled * takes["student_kd"])
        for arch in ARCHITECTURES:
            shared = medians[f"{arch}_forward"]["frozen"] if side == "ours" else 0.0  # by all seeds
            one_pass = shared + seeds * max(0.0, takes[f"{arch}_forward"] - shared)
            total[side] += seeds * settings.teacher(arch).epochs * takes[f"{arch}_fit"] + passes * one_pass
    return total

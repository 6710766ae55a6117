"""The benchmark: this project's own code against the plain way (`kdutils.reference`) and against the bare step.

Every time is the median of alternating repetitions: ours, the reference, the limit, ours again, ... Speed depends
neither on what the images show nor on the ResNets' weights, so the images are generated and the weights random.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from kdutils.data.views import make_views, view_pixels, view_table
from kdutils.lab.performance import SIDES, conditions, end_to_end, machine, summary
from kdutils.models import SmallCNN, normalise, seeded
from kdutils.progress import progress_lines
from kdutils.settings import ARCHITECTURES, Settings, UserError, apply_threads, project_path, shown_path
from kdutils.students import Method, fit_arguments, named_method, student_recipe, train_students
from kdutils.teachers import FineTuning, Teacher, fine_tune, teacher_recipe
from kdutils.training import Recipe, autocast, draw, fit, make_optimizer, memory_format, predict

ensure_torchvision()  # or the reference could not import it beside a CPU-only torch
from kdutils.lab import tutorial as reference  # noqa: E402

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


def _quietly(function: Callable, *given: Any, **named: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*given, **named)


# The work, done our way, the plain way, and as the bare step


class Side(NamedTuple):
    """One way of doing a row's work: `prepare(steps)` returns what does that many of an epoch's `whole` steps."""

    whole: int
    prepare: Callable[[int], Callable[[], object]]


class _Bench(NamedTuple):
    """What all rows share: settings (their folders are temporary), images, the random ResNets' state dicts, and what
    `check_first_steps` made of them: our teachers and the reference's."""

    settings: Settings
    plan: Plan
    train: Split
    held_out: Split
    states: dict[str, dict[str, Tensor]]
    teachers: Sequence[Teacher] = ()
    plain_teachers: Sequence[nn.Module] = ()

    def dataset(self, count: int) -> Dataset:
        """A data set of `count` training images, repeated where there are fewer, and 10 for validation and test."""
        index = torch.arange(count, device=self.train.labels.device) % len(self.train.labels)
        few = Split(*(tensor[:10] for tensor in self.held_out))
        train = Split(*(tensor[index] for tensor in self.train))
        sums = {"train": f"bench{count}", "val": "bench", "test": "bench"}
        return Dataset("generated images", list(shapes.SHAPES10), train, few, few, f"bench{count}", sums, True, False)

    def arm(self, name: str, count: int) -> Method:
        """The student's arm; its teachers' stored logits, of so many images, are random: any will do."""
        if name == "scratch":
            return named_method(name, self.settings)
        views = len(view_table(**self.settings.views))
        logits = torch.randn(count, views, 10, device=self.settings.device).half()
        runs = [dataclasses.replace(teacher.runs[0], view_logits=logits) for teacher in self.teachers]
        given = [dataclasses.replace(teacher, runs=[run]) for teacher, run in zip(self.teachers, runs)]
        return named_method(name, self.settings, given)

    def plain_loss(self, name: str) -> Callable:
        """The reference's loss of a student's arm, or a `teacher`'s; teachers run in every step."""
        s = self.settings
        seen: dict[str, Any] = {"size": s.teacher_size, "mode": s.teacher_resize}
        if name == "kd":
            return partial(
                reference.distillation_loss, teachers=self.plain_teachers, temperature=s.temperature, alpha=s.alpha,
                label_smoothing=s.kd_label_smoothing, **seen,
            )  # fmt: skip
        if name == "teacher":
            return partial(reference.cross_entropy_loss, label_smoothing=s.teacher_label_smoothing, **seen)
        return partial(reference.cross_entropy_loss, label_smoothing=s.label_smoothing)


def _plain_images(split: Split, settings: Settings, augment: bool = True) -> reference.Images:
    """Images as the reference holds them."""
    arrays = split.images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return reference.Images(arrays, split.labels.tolist(), reference.transform(**settings.views, augment=augment))


def _our_epoch(bench: _Bench, arm: str, settings: Settings, steps: int) -> Callable[[], object]:
    """An epoch of `fit` of so many steps; its images are laid out, and its teachers' targets combined, before."""
    count = steps * settings.batch_size
    one_epoch = dataclasses.replace(settings, epochs=1)
    arguments = fit_arguments(bench.arm(arm, count), bench.dataset(count), one_epoch, seed=0)
    return partial(_quietly, fit, seeded(0, SmallCNN), **arguments)


def _first_batch(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The (index, view) pairs [B] that `fit` begins with."""
    labels, size = arguments["labels"], arguments["recipe"].batch_size
    order, view = draw(arguments["seed"], 0, len(labels), arguments["num_views"])
    return order[:size].to(labels.device), view[:size].to(labels.device)


def _training_sides(
    bench: _Bench, recipe: Recipe, ours: Callable[[int], Callable], plain: nn.Module, loss: Callable,
    bare: nn.Module, arguments: Mapping[str, Any],
) -> dict[str, Side]:  # fmt: skip
    """Our epoch; the reference's, of the network `plain`; steps of the network `bare` on the first batch that `fit`
    would take with these arguments, in our precision and layout."""
    settings, device = bench.settings, bench.train.labels.device
    plain, bare = plain.to(device), memory_format(bare.to(device)).train()
    how = dataclasses.asdict(recipe) | {"epochs": 1}
    batch_size = how.pop("batch_size")
    index, view = _first_batch(arguments)
    x, labels = arguments["inputs"](index, view), arguments["labels"][index]
    optimizer = make_optimizer(bare, recipe, device)

    def plainly(steps: int) -> Callable[[], object]:
        images = _plain_images(bench.dataset(steps * batch_size).train, settings)
        batches = reference.loader(images, batch_size, settings.device)
        return lambda: reference.train(plain, batches, loss, settings.device, **how)

    def barely(steps: int) -> None:
        for _ in range(steps):
            with autocast(device.type, settings.precision):
                logits = bare(x)
            value = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()

    whole = max(1, settings.train_size // batch_size)
    return dict(zip(SIDES, (Side(whole, ours), Side(whole, plainly), Side(whole, lambda n: partial(barely, n)))))


def _student_sides(bench: _Bench, arm: str) -> dict[str, Side]:
    settings, scratch = bench.settings, bench.arm("scratch", 0)
    arguments = fit_arguments(scratch, bench.dataset(settings.batch_size), settings, seed=0)
    sides = _training_sides(
        bench, student_recipe(settings), partial(_our_epoch, bench, arm, settings), reference.Student(),
        bench.plain_loss(arm), seeded(0, SmallCNN), arguments,
    )  # fmt: skip
    if arm != "scratch":  # beside it, for their ratio
        sides["cross_entropy"] = sides["ours"]._replace(prepare=partial(_our_epoch, bench, "scratch", settings))
    return sides


def _fine_tuning_sides(bench: _Bench, arch: str) -> dict[str, Side]:
    settings, recipe = bench.settings, teacher_recipe(arch, bench.settings)

    def prepared(count: int) -> tuple[nn.Module, dict[str, Any]]:
        """The suffix, and how it is fitted on features that are there: a few real ones, repeated to the number it
        looks up."""
        work = FineTuning(arch, bench.dataset(count), settings)
        arguments = _quietly(work.fit_arguments, seed=0)  # it says when features must be fewer for want of memory
        one = work.block_features("train", slice(0, min(count, bench.plan.forward_images)), 0)[0]["features"]
        features = one.repeat(math.ceil(count / len(one)), *[1] * (one.dim() - 1))[:count]
        views = max(1, min(arguments["num_views"], int(FEATURE_BYTES / (features.numel() * features.element_size()))))
        work.cached = torch.stack([features] * views)
        return work.cut(0)[1], arguments | {"num_views": views, "recipe": dataclasses.replace(recipe, epochs=1)}

    def ours(steps: int) -> Callable[[], object]:
        suffix, arguments = prepared(steps * recipe.batch_size)
        return partial(_quietly, fit, suffix, **arguments)

    trainable = settings.of_teacher(arch, "trainable")
    plain = reference.freeze_for_fine_tuning(reference.resnet(arch, bench.states[arch]), trainable)
    return _training_sides(bench, recipe, ours, plain, bench.plain_loss("teacher"), *prepared(recipe.batch_size))


def _forward_sides(bench: _Bench, arch: str) -> dict[str, Side]:
    """A teacher's logits for blocks of images: `prefix` is the part of ours that all its seeds share."""
    settings, size = bench.settings, bench.plan.forward_images
    work = FineTuning(arch, bench.dataset(size), settings)
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

    def ours() -> Tensor:
        return predict(suffix, prefix(), settings.precision, batch_size=250)

    def repeated(once: Callable[[], object]) -> Side:
        return Side(max(1, settings.train_size // size), lambda steps: lambda: [once() for _ in range(steps)])

    return {name: repeated(once) for name, once in zip((*SIDES, "prefix"), (ours, plainly, bare, prefix))}


# Timing


def _seconds(work: Callable[[], object], device: str) -> float:
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device, lambda: None)
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
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
    works, timed, prepared, peaks = {}, {}, sides(), []
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
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(plan.repetitions):
        for name, work in works.items():
            _reset_peak(device)
            times[name].append(_seconds(work, device) * prepared[name].whole / timed[name])
            if name == "ours":
                peaks.append(_peak_mb(device))
        yield
    row.update({f"{name}_s": statistics.median(values) for name, values in times.items()})
    ours, plain, limit = (row[f"{name}_s"] for name in SIDES)
    row.update(
        speedup=plain / ours, of_limit=limit / ours, times=times, device=device, steps=timed,
        peak_mb=max(filter(None, peaks), default=None),
        spread={name: [min(values), max(values)] for name, values in times.items()},
        whole={name: side.whole for name, side in prepared.items()},
    )  # fmt: skip


def _shared(row: Mapping[str, Any], name: str, once: float, times: int) -> dict[str, Any]:
    """A row with `once` seconds, spent for `times` epochs together, shared out among them."""
    ours = row["ours_s"] + once / times
    spread = {"ours": [value + once / times for value in row["spread"]["ours"]]}
    spread["reference"] = row["spread"]["reference"]
    return {
        **row, "key": f"{row['key']}_shared", "name": name, "ours_s": ours, "speedup": row["reference_s"] / ours,
        "limit_s": None, "of_limit": None, "spread": spread,
        "note": f"{once:,.3g} s once, for {times:,} epochs; from the rows of the forward pass",
    }  # fmt: skip


def growth(
    found: dict[str, Any], works: Mapping[float, Callable[[], float]], repetitions: int, per: str
) -> Iterator[None]:
    """Time every size in turn, `repetitions` times; pauses after each; completes `found`: the seconds of every size
    (median, least, most) and their least-squares slope (seconds `per` what the sizes count)."""
    times = []
    for _ in range(repetitions + 1):
        times.append([work() for work in works.values()])
        yield
    del times[0]  # the warm-up
    sizes = list(works)
    slopes = [statistics.linear_regression(sizes, one).slope if len(sizes) > 1 else 0.0 for one in times]
    by_size = {str(size): [statistics.median(s), min(s), max(s)] for size, s in zip(sizes, zip(*times))}
    found.update(per=per, slope_s=statistics.median(slopes), slope_spread=[min(slopes), max(slopes)], seconds=by_size)


def _growth_works(bench: _Bench) -> dict[str, tuple[str, dict[float, Callable[[], float]]]]:
    """Student epochs by training images and by views; trainings of one arm by seeds."""
    settings, plan = bench.settings, bench.plan
    whole = max(1, settings.train_size // settings.batch_size)

    def epoch(steps: int, scale: float = 1.0, **changes: Any) -> Callable[[], float]:
        work = _our_epoch(bench, "scratch", dataclasses.replace(settings, **changes), steps)
        return lambda: scale * _seconds(work, settings.device)

    def trainings(number: int) -> float:
        """Of one epoch each, whole: network, predictions and files included."""
        dataset = bench.dataset(plan.seed_steps * settings.batch_size)
        with tempfile.TemporaryDirectory() as folder:
            changed = dataclasses.replace(settings, runs_dir=folder, seeds=list(range(number)), epochs=1)
            train = partial(_quietly, train_students, bench.arm("scratch", 0), dataset, changed)
            return _seconds(train, settings.device)

    steps_of = sorted({max(1, count // settings.batch_size) for count in plan.image_counts})
    steps = min(plan.steps, whole)
    return {
        "training images": (
            "s per epoch and 1,000 images", {n * settings.batch_size / 1000: epoch(n) for n in steps_of},
        ),
        "views": ("s per epoch and view", {
            len(view_table(shift, step)): epoch(steps, whole / steps, max_shift=shift, shift_step=step)
            for shift, step in plan.views
        }),
        "seeds": (
            f"s per seed, {plan.seed_steps} steps each",
            {n: partial(trainings, n) for n in sorted({len(settings.seeds), *plan.seed_counts})},
        ),
    }  # fmt: skip


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


def check_first_steps(bench: _Bench) -> tuple[list[dict[str, Any]], _Bench]:
    """Compare the first step's loss, ours and the reference's, on the same weights and pixels, in float32.

    Our teachers are fine-tuned on a few images as always, and their stored logits used; the reference's have the same
    weights and run live. Returns the losses, and what was given with both added.
    Raises `UserError` where the losses differ.
    """
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
        inputs = _plain_images(batch, settings, augment=False)
        x = torch.stack([inputs[i][0] for i in range(len(inputs))]).to(settings.device)
        plainly = loss(plain.to(settings.device), x, batch.labels).item()
        if not math.isclose(ours, plainly, rel_tol=tolerance):
            raise UserError(
                f"bench: {name}: our first loss is {ours:.6f}, the reference's {plainly:.6f}; find out which is wrong"
            )
        checks.append({"name": name, "ours": ours, "reference": plainly, "tolerance": tolerance})

    teachers, plain_teachers = [], []
    for arch in ARCHITECTURES:
        teachers.append(_quietly(fine_tune, arch, few, settings))
        work = FineTuning(arch, few, settings)
        arguments, fitted = _quietly(work.fit_arguments, seed=0), _quietly(work.suffix, 0).tensors
        trainable = settings.of_teacher(arch, "trainable")
        start = bench.states[arch] | work.cut(0)[1].state_dict()
        plain = reference.freeze_for_fine_tuning(reference.resnet(arch, start), trainable)
        for name in ("layer4", "fc") if trainable == "last_block" else ("fc",):
            getattr(plain, name).train()
        name, loss = f"{LABELS[arch]}, {WORDS[trainable]}", bench.plain_loss("teacher")
        compare(name, work.cut(0)[1], arguments, plain, loss, STORED)
        plain_teachers.append(reference.resnet(arch, bench.states[arch] | fitted).to(settings.device))

    bench = bench._replace(teachers=teachers, plain_teachers=plain_teachers)
    student, plain = seeded(0, SmallCNN), reference.Student()
    plain.load_state_dict(student.state_dict())
    for name, arm, tolerance in (
        ("student, cross-entropy", named_method("scratch", settings), EXACT),
        ("student, distillation", named_method("kd", settings, teachers), STORED),
    ):
        arguments = fit_arguments(arm, few, settings, seed=0)
        compare(name, student, arguments, plain, bench.plain_loss("kd" if arm.teachers else "scratch"), tolerance)
    return checks, bench


def compare_accuracy(bench: _Bench, seed: int) -> tuple[float, float]:
    """Accuracy on held-out images after the same short training from the same weights: ours, and the reference's."""
    settings = dataclasses.replace(bench.settings, epochs=bench.plan.accuracy_epochs)
    model, plain = seeded(seed, SmallCNN), reference.Student()
    plain.load_state_dict(model.state_dict())
    dataset, how = bench.dataset(settings.train_size), dataclasses.asdict(student_recipe(settings))
    _quietly(fit, model, **fit_arguments(bench.arm("scratch", 0), dataset, settings, seed))
    logits = predict(model, normalise(bench.held_out.images), settings.precision)
    ours = (logits.argmax(dim=1) == bench.held_out.labels).float().mean().item()
    batches = reference.loader(_plain_images(dataset.train, settings), how.pop("batch_size"), settings.device)
    reference.train(plain.to(settings.device), batches, bench.plain_loss("scratch"), settings.device, **how)
    return ours, reference.accuracy(plain, _plain_images(bench.held_out, settings, augment=False), settings.device)


# The whole


def run(settings: Settings, quick: bool = False) -> dict[str, Any]:
    """Measure, print the table and write `bench/bench.json` in the settings' folder of runs; returns its content.

    The data and the weights of the settings are not needed. `quick` shows that everything works, with few and small
    repetitions: its numbers say little. Raises `UserError` if the reference does not compute the same.
    """
    apply_threads(settings)
    plan = QUICK if quick else FULL
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bench = _prepare(settings, plan, Path(folder))
        found = _measure(bench)
    found = {
        "profile": Path(settings.profile).stem, "quick": quick, "machine": machine(settings),
        "conditions": conditions(bench.settings, *plan[:4]), **found,
    }  # fmt: skip
    found["end_to_end"] = end_to_end(settings.run_folder, settings, found["rows"])
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
    parts = slice(size), slice(size, None)
    train, held_out = (Split(images[part], labels[part]).to(settings.device) for part in parts)
    return _Bench(settings, plan, train, held_out, states)


def _measure(bench: _Bench) -> dict[str, Any]:
    """Checks, accuracy, rows and slopes; all but the checks behind one progress bar."""
    checks, bench = check_first_steps(bench)
    settings, plan = bench.settings, bench.plan
    accuracy: dict[str, Any] = {"ours": [], "reference": [], "epochs": plan.accuracy_epochs}
    slopes: dict[str, dict] = {"training images": {}, "views": {}, "seeds": {}}

    def accuracies() -> Iterator[None]:
        for seed in range(plan.accuracy_seeds):
            for name, value in zip(("ours", "reference"), compare_accuracy(bench, seed)):
                accuracy[name].append(value)
            yield

    def slope(name: str) -> Iterator[None]:  # its data sets are made when their turn comes
        per, works = _growth_works(bench)[name]
        yield from growth(slopes[name], works, plan.repetitions, per)

    epoch = f"one epoch of {settings.train_size:,} images"
    forward = f"forward pass of {settings.train_size:,} images at {settings.teacher_size} px"
    rows: dict[str, tuple[str, Callable[[], dict[str, Side]]]] = {
        "student_ce": (f"Student, cross-entropy, {epoch}", partial(_student_sides, bench, "scratch")),
        "student_kd": (f"Student, distillation from both teachers, {epoch}", partial(_student_sides, bench, "kd")),
    }
    for arch in ARCHITECTURES:
        trained = WORDS[settings.of_teacher(arch, "trainable")]
        rows[f"{arch}_fit"] = f"{LABELS[arch]}, {trained}, {epoch}", partial(_fine_tuning_sides, bench, arch)
        rows[f"{arch}_forward"] = f"{LABELS[arch]}, {forward}", partial(_forward_sides, bench, arch)
    made = {key: {"key": key, "name": name} for key, (name, _) in rows.items()}
    races = (race(made[key], sides, plan, settings.device) for key, (_, sides) in rows.items())
    work = itertools.chain(accuracies(), *races, *map(slope, slopes))
    for _ in progress_lines(range(plan.accuracy_seeds + (plan.repetitions + 1) * (len(rows) + len(slopes))), "bench"):
        next(work)
    next(work, None)  # what the last part does after its last pause
    return {
        "accuracy": accuracy, "checks": checks, "rows": _all_rows(bench, made, slopes["seeds"]), "growth": slopes,
        "ratios": _ratios(made, slopes),
    }  # fmt: skip


def _all_rows(bench: _Bench, made: dict[str, dict[str, Any]], by_seeds: dict[str, Any]) -> list[dict[str, Any]]:
    """The measured rows, those with a one-off pass shared out, and that of an arm's seeds."""
    settings, size, steps = bench.settings, bench.settings.train_size, bench.plan.seed_steps
    for row in made.values():
        notes = [
            f"{name}: {row['steps'][name]} of {row['whole'][name]}, scaled"
            for name in SIDES
            if row["steps"][name] < row["whole"][name]
        ]
        if row["key"].endswith("_forward"):
            row["images_per_s"] = {name: size / row[f"{name}_s"] for name in ("ours", "reference")}
            notes.insert(0, "{ours:,.0f} against {reference:,.0f} images/s".format(**row["images_per_s"]))
        row["note"] = "; ".join(notes)
    once, tuned = 0.0, []
    for arch in ARCHITECTURES:
        row, forward, seeds = made[f"{arch}_fit"], made[f"{arch}_forward"], len(settings.teacher_seeds)
        # the suffix, which is the rest of the forward pass, runs once for every teacher seed
        suffix = max(0.0, forward["ours_s"] - forward["prefix_s"])
        once += len(view_table(**settings.views)) * (forward["prefix_s"] + seeds * suffix)
        views = _quietly(getattr, FineTuning(arch, bench.dataset(10), settings), "trained_views")
        name = f"{row['name'].rpartition(', ')[0]}, its share of the feature pass included"
        tuned += [row, _shared(row, name, views * forward["prefix_s"], seeds * settings.of_teacher(arch, "epochs"))]
    many = len(settings.seeds)
    name = "Student, distillation from both teachers, its share of the teachers' pass included"
    taught = _shared(made["student_kd"], name, once, many * settings.epochs)
    median, *spread = by_seeds["seconds"][str(many)]
    of_seeds = dict.fromkeys(("reference_s", "speedup", "limit_s", "of_limit", "peak_mb")) | {
        "key": "seeds", "name": f"{many} seeds of one arm", "ours_s": median, "spread": {"ours": spread},
        "device": settings.device, "steps": {"ours": many * steps},
        "note": f"{median / by_seeds['seconds']['1'][0]:.2f} times one seed; {steps} steps a seed, not scaled, "
        "predictions and files included",
    }  # fmt: skip
    forwards = [made[f"{arch}_forward"] for arch in ARCHITECTURES]
    return [made["student_ce"], made["student_kd"], taught, *tuned, *forwards, of_seeds]


def _ratios(made: Mapping[str, Mapping[str, Any]], slopes: Mapping[str, Mapping]) -> dict[str, float]:
    """Medians over the repetitions, in which what is compared was timed one after the other."""

    def ratio(key: str, over: str) -> float:
        times = made[key]["times"]
        return statistics.median(a / b for a, b in zip(times["ours"], times[over], strict=True))

    seconds = slopes["seeds"]["seconds"]
    return {
        "distillation_over_cross_entropy": ratio("student_kd", "cross_entropy"),
        "student_over_bare_step": ratio("student_ce", "limit"),
        **({"five_seeds_over_one": seconds["5"][0] / seconds["1"][0]} if "5" in seconds else {}),
    }

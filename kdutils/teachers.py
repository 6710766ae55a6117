"""Teachers: prefix features computed once, a suffix fitted on them, logits stored for every (index, view)."""

import copy
import dataclasses
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdutils.cache import (
    Cached,
    cache_path,
    cached,
    fingerprint,
    lower_if_out_of_memory,
    read_cached,
    resumable,
    tensor_checksum,
    write_cached,
)
from kdutils.compat import ensure_torchvision
from kdutils.data import shapes
from kdutils.data.images import Dataset, Split
from kdutils.data.views import Pool, ViewedImages, make_views, view_pixels, view_table
from kdutils.losses import cross_entropy
from kdutils.models import Source, backbone_source, cut, fold_batch_norms, load_backbone, normalise, with_state
from kdutils.pretraining import Pretraining, pretrain
from kdutils.progress import progress_lines
from kdutils.settings import ARCHITECTURES, Settings, UserError, logits_file, shown_path
from kdutils.training import History, Recipe, autocast, fit, memory_format, predict

SETTING_OF = {  # how messages call the entries of a teacher's key
    "seeds": "teacher_seeds", "size": "teacher_size", "resize": "teacher_resize", "data": "data (checksum)",
    "label_smoothing": "teacher_label_smoothing",
}  # fmt: skip
BLOCK = 1000  # features are computed and kept for so many images at a time


@dataclasses.dataclass(frozen=True)
class TeacherRun:
    """One fine-tuning: logits float32 [N, C] of `train`, `val`, `test` (view 0); `view_logits` float16 [N, V, C].

    `fingerprint` names all that `view_logits` depend on.
    """

    arch: str
    trainable: str
    seed: int
    history: History
    logits: dict[str, Tensor]
    view_logits: Tensor
    seconds: float
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A pre-trained ResNet fine-tuned once per teacher seed."""

    arch: str
    trainable: str
    runs: list[TeacherRun]
    description: str
    is_standin: bool
    checksum: str
    parameters_total: int
    parameters_trained: int
    views_trained: int
    feature_seconds: float
    pretraining: dict = dataclasses.field(default_factory=dict)

    def run_for(self, student_seed: int) -> TeacherRun:
        """The run that the student of this seed learns from: run number `student_seed` modulo the number of runs."""
        return self.runs[student_seed % len(self.runs)]

    @property
    def facts(self) -> dict:
        """What the report and the provenance say about this teacher."""
        return {
            "description": self.description, "is_standin": self.is_standin, "checksum": self.checksum,
            "trainable": self.trainable, "parameters_total": self.parameters_total,
            "parameters_trained": self.parameters_trained, "views_trained": self.views_trained,
            "pretraining": self.pretraining,
        }  # fmt: skip


def teacher_recipe(arch: str, settings: Settings) -> Recipe:
    """How the settings want this teacher's suffix fitted."""
    return Recipe(
        epochs=settings.of_teacher(arch, "epochs"),
        batch_size=settings.teacher_batch_size,
        optimizer=settings.teacher_optimizer,
        schedule=settings.teacher_schedule,
        learning_rate=settings.of_teacher(arch, "learning_rate"),
        weight_decay=settings.of_teacher(arch, "weight_decay"),
    )


def fine_tune(arch: str, dataset: Dataset, settings: Settings) -> Teacher:
    """Fine-tune a ResNet's last layer, or last block and last layer, as the settings say; once per teacher seed.

    The frozen prefix's features of every view are computed once, in float16, and kept; each seed fits a suffix on
    them, and the suffixes' logits for every (index, view) are what students learn from. With weights = `none` there
    is nothing worth freezing, and the whole network is trained. Whatever was made before and still fits is loaded.
    Where the `weights` folder holds a fine-tuned teacher's logits in place of weights, they are the teacher.
    """
    kept = logits_file(settings.weights, arch)
    if kept is not None:
        return _from_logits(kept, arch, dataset, settings)
    work = FineTuning(arch, dataset, settings)
    return _teacher(work.logits(), settings)


def check_weights(arch: str, dataset: Dataset, settings: Settings) -> None:
    """Raise `UserError` for weights that are absent or unfit, before anything is trained; a teacher that is made
    already needs none to be loaded."""
    if settings.weights == "generated" or logits_file(settings.weights, arch) is not None:
        return
    work = FineTuning(arch, dataset, settings)
    made = list(work.folder.glob(f"{work.name}-logits-*.safetensors"))
    if not made or work.logits_path not in made:
        load_backbone(arch, settings.weights)


def check_space(dataset: Dataset, settings: Settings, architectures: Sequence[str] = ARCHITECTURES) -> None:
    """Raise `UserError` where the disk has no room for the teachers' features, before any of them is computed."""
    needed = sum(FineTuning(arch, dataset, settings).missing_bytes() for arch in architectures)
    folder = settings.run_folder
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if needed > free:
        raise UserError(
            f"runs_dir: the features of {' and '.join(architectures)} will take {needed / 1e9:.2f} GB, but "
            f"{shown_path(folder)} has {free / 1e9:.2f} GB left; free space, choose another, or lower teacher_size or "
            "max_shift"
        )


def try_fine_tuning(arch: str, dataset: Dataset, settings: Settings, seed: int) -> Cached:
    """One seed's fine-tuning for its history alone, scored on the validation images; test images are not looked at.

    Keeps the facts `history`, `trained_views` and `weights` (their checksum), and no network.
    """
    work = FineTuning(arch, dataset, settings)

    def make(checkpoint: Path) -> tuple[dict[str, Tensor], dict]:
        history = work.fit(seed, checkpoint)[1]
        return {}, {**history, "trained_views": work.trained_views, "weights": work.source.checksum}

    return resumable(*work.trial(seed), make)


def prepare_fine_tuning(arch: str, dataset: Dataset, settings: Settings, seeds: Iterable[int]) -> None:
    """Compute and keep the features that `try_fine_tuning` reads, unless it has done all of these seeds."""
    work = FineTuning(arch, dataset, settings)
    if work.trainable == "all" or all(cache_path(*work.trial(seed)).exists() for seed in seeds):
        return
    parts = [("val", 0)] + [("train", view) for view in range(work.trained_views)]
    for part, view in progress_lines(parts, f"{arch}: features of every view"):
        for block in work._blocks(part):
            place = work._block_place(part, block, view)
            if not cache_path(*place).exists():
                cached(*place, partial(work.block_features, part, block, view))


def teach(teacher: Teacher, pool: Pool, dataset: Dataset, settings: Settings) -> Teacher:
    """The same teacher with `view_logits` for the images and views of another pool, labelled by each of its runs.

    Raises `UserError` where only the teacher's logits are at hand.
    """
    if logits_file(settings.weights, teacher.arch) is not None:
        raise UserError(
            f"weights: {settings.weights} holds {teacher.arch}'s logits for the training images only; to label "
            f"{pool.name}, give the ResNet's weights"
        )
    work = FineTuning(teacher.arch, dataset, settings)
    logits = torch.stack([work.label(pool, view) for view in range(pool.num_views)], dim=2)  # [S, N, V, C]
    return dataclasses.replace(teacher, runs=[
        dataclasses.replace(
            run, view_logits=logits[i].to(settings.device),
            fingerprint=fingerprint({"what": "taught", "run": run.fingerprint, "pool": pool.fingerprint}),
        )
        for i, run in enumerate(teacher.runs)
    ])  # fmt: skip


def out_of_fold(teacher: Teacher, dataset: Dataset, settings: Settings, folds: int = 3) -> Teacher:
    """A control: `view_logits` by runs that did not see the image. The training images are cut into `folds` parts, and
    each is labelled by fine-tunings on the others, one a teacher seed, by the settings' recipe.

    A teacher that remembers its training images says little more of them than their labels; these do not remember.
    Raises `UserError` where only the teacher's logits are at hand.
    """
    if logits_file(settings.weights, teacher.arch) is not None:
        raise UserError(
            f"weights: {settings.weights} holds {teacher.arch}'s logits only; to fine-tune it on parts of the training "
            "images, give the ResNet's weights"
        )
    every, found = torch.arange(len(dataset.train.labels)), []
    for number, held in enumerate(every.chunk(folds)):
        rest = torch.cat([every[: held[0]], every[held[-1] + 1 :]])
        taught, asked = (FineTuning(teacher.arch, training_part(dataset, part), settings) for part in (rest, held))
        key = taught.key("out of fold", seeds=settings.teacher_seeds, images=asked.dataset.part_checksums["train"])
        found.append(cached(taught.folder, f"{taught.name}-fold{number}", key, partial(_labelled, taught, asked)))
    logits = torch.cat([one.tensors["logits"] for one in found], dim=1)  # [S, N, V, C]
    made_by = [one.fingerprint for one in found]
    return dataclasses.replace(teacher, runs=[
        dataclasses.replace(
            run, view_logits=logits[i].to(settings.device),
            fingerprint=fingerprint({"what": "out of fold", "run": run.fingerprint, "folds": made_by}),
        )
        for i, run in enumerate(teacher.runs)
    ])  # fmt: skip


def ensemble(teachers: Sequence[Teacher], combine: Callable[[list[Tensor]], Tensor]) -> list[TeacherRun]:
    """Several teachers as one classifier: run by run, the logits of train, val and test that `combine` makes of theirs.

    combine: as `losses.combine_teachers` with a rule and temperature 1. There are as many runs as the teacher with the
    fewest has. They are there to be scored, and cannot teach: `view_logits` is empty.
    """
    return [
        dataclasses.replace(
            runs[0], arch="+".join(run.arch for run in runs), view_logits=runs[0].view_logits[:0], seconds=0.0,
            logits={part: combine([run.logits[part] for run in runs]) for part in runs[0].logits},
            fingerprint=fingerprint({"what": "as one", "runs": [run.fingerprint for run in runs]}),
        )
        for runs in zip(*(teacher.runs for teacher in teachers))
    ]  # fmt: skip


def _labelled(taught: "FineTuning", asked: "FineTuning") -> tuple[dict[str, Tensor], dict]:
    """What one fine-tuning says of another's training images, as a cached result's content."""
    suffixes = taught.fitted
    views = progress_lines(range(asked.num_views), f"{asked.arch}: labels held-out images")
    found = [asked.view_logits(suffixes, "train", view)[0]["logits"] for view in views]
    return {"logits": torch.stack(found, dim=2)}, {}


def shuffled_within_classes(teacher: Teacher, labels: Tensor, seed: int = 0) -> Teacher:
    """A control: every image gets the logits, in all views, of a random image of its class.

    The soft labels then say what a class looks like on average, and nothing of the image. labels: int64 [N].
    """
    generator = torch.Generator().manual_seed(seed)
    other = torch.arange(len(labels))
    for label in labels.unique().tolist():
        members = torch.nonzero(labels.cpu() == label).flatten()
        other[members] = members[torch.randperm(len(members), generator=generator)]
    return dataclasses.replace(teacher, runs=[
        dataclasses.replace(
            run, view_logits=run.view_logits[other.to(run.view_logits.device)],
            fingerprint=fingerprint({"what": "shuffled", "run": run.fingerprint, "seed": seed}),
        )
        for run in teacher.runs
    ])  # fmt: skip


def save_logits(arch: str, dataset: Dataset, settings: Settings, folder: Path) -> Path:
    """Keep the logits of the first teacher seed in `folder`, which then serves as the setting `weights`."""
    work = FineTuning(arch, dataset, settings)
    made = work.logits()
    first = {part: tensor[:1].contiguous() for part, tensor in made.tensors.items()}
    key = work.logits_key | {"seeds": settings.teacher_seeds[:1]}
    kept = Cached(first, made.facts | {"runs": made.facts["runs"][:1]}, fingerprint(key), made.seconds)
    return write_cached(folder / f"{arch}-logits.safetensors", key, kept)


def _teacher(found: Cached, settings: Settings) -> Teacher:
    on_device = {part: tensor.to(settings.device) for part, tensor in found.tensors.items()}
    facts = found.facts
    runs = [
        TeacherRun(
            facts["arch"], facts["trainable"], run["seed"], run["history"],
            {"train": on_device["train"][i, :, 0].float(), "val": on_device["val"][i].float(),
             "test": on_device["test"][i].float()},
            on_device["train"][i], run["seconds"], run["fingerprint"],
        )
        for i, run in enumerate(facts["runs"])
    ]  # fmt: skip
    return Teacher(runs=runs, **{name: value for name, value in facts.items() if name != "runs"})


def _from_logits(path: Path, arch: str, dataset: Dataset, settings: Settings) -> Teacher:
    """A teacher out of its kept logits: right only for the very images, views and fine-tuning it was made with."""
    key, found = read_cached(path)
    asked = FineTuning(arch, dataset, settings).logits_key
    for name in sorted(asked.keys() - {"weights", "precision", "trained_views"}):
        if key.get(name) != asked[name]:
            called = SETTING_OF.get(name, name)
            raise UserError(
                f"weights: the logits in {shown_path(path)} were made with {called} = {key.get(name)!r:.150}, not "
                f"{asked[name]!r:.150}; use those settings and data, or give the ResNet's weights"
            )
    try:
        return _teacher(found, settings)
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"weights: the logits in {shown_path(path)} are not of a whole teacher; get the file again, or give the "
            "ResNet's weights"
        ) from error


class FineTuning:
    """One backbone's fine-tuning: what it depends on, and its steps. The network is built when first needed."""

    def __init__(self, arch: str, dataset: Dataset, settings: Settings):
        self.arch, self.dataset, self.settings = arch, dataset, settings
        self.trainable = "all" if settings.weights == "none" else settings.of_teacher(arch, "trainable")
        self.folder = settings.run_folder / "teachers"
        self.name = f"{arch}-{self.trainable}"
        self.num_views = len(view_table(**settings.views))
        self.feature_seconds = 0.0
        self._checksums: dict[tuple[str, int], str] = {}
        self.cached: Tensor | None = None  # the training features, read only if a suffix must be fitted

    @cached_property
    def source(self) -> Source:
        kept = logits_file(self.settings.weights, self.arch)
        if kept is not None:
            return Source("fine-tuned elsewhere", True, "logits", {})
        if self.settings.weights == "generated":
            return _generated(self.arch, self.settings)[0]
        return backbone_source(self.arch, self.settings.weights)

    @cached_property
    def backbone(self) -> nn.Module:
        if self.settings.weights == "generated":
            return with_state(self.arch, _generated(self.arch, self.settings)[1])
        return load_backbone(self.arch, self.settings.weights)

    def cut(self, seed: int) -> tuple[nn.Sequential, nn.Sequential]:
        """The frozen prefix, and a suffix of its own for a seed."""
        settings = self.settings
        prefix, suffix = cut(
            self.backbone, self.trainable, settings.teacher_size, len(self.dataset.classes), seed,
            resize=settings.teacher_resize, standardize=settings.of_teacher(self.arch, "standardize"),
        )  # fmt: skip
        # the modules are shared among seeds: each starts from the backbone's own weights
        return prefix, copy.deepcopy(suffix)

    @cached_property
    def prefix_key(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "what": "features", "arch": self.arch, "weights": self.source.checksum, "trainable": self.trainable,
            "size": settings.teacher_size, "resize": settings.teacher_resize, "precision": settings.precision,
        }  # fmt: skip

    def key(self, what: str, **more: Any) -> dict[str, Any]:
        """What a suffix (with its seed) or the logits (with their seeds) depend on."""
        settings, of = self.settings, partial(self.settings.of_teacher, self.arch)
        return {
            **self.prefix_key, "what": what, "recipe": dataclasses.asdict(teacher_recipe(self.arch, settings)),
            "trained_views": self.trained_views, "views": settings.views,
            "data": [self.dataset.part_checksums[part] for part in ("train", "val")],
            "label_smoothing": settings.teacher_label_smoothing, "standardize": of("standardize"),
            "last_layer_factor": of("last_layer_factor"), **more,
        }  # fmt: skip

    def trial(self, seed: int) -> tuple[Path, str, dict[str, Any]]:
        """Folder, name and key of what `try_fine_tuning` keeps."""
        return self.folder / "trials", f"{self.name}-seed{seed}", self.key("trial", seed=seed)

    @cached_property
    def logits_key(self) -> dict[str, Any]:
        return self.key("logits", seeds=self.settings.teacher_seeds, data=self.dataset.checksum)

    @property
    def logits_path(self) -> Path:
        return cache_path(self.folder, f"{self.name}-logits", self.logits_key)

    def logits(self) -> Cached:
        """The cached result that a `Teacher` is made of."""
        made = cached(self.folder, f"{self.name}-logits", self.logits_key, self.make)
        shutil.rmtree(self.logits_path.with_suffix(".views"), ignore_errors=True)
        return made

    @cached_property
    def trained_views(self) -> int:
        """How many views the suffix is fitted on: as set, or fewer if their features exceed the memory budget."""
        settings = self.settings
        asked = min(settings.teacher_views, self.num_views)
        if self.trainable == "all":
            return self.num_views
        if logits_file(settings.weights, self.arch) is not None:
            return asked
        one = self.features("val", 0)
        per_view = one[0].numel() * one.element_size() * settings.train_size / 1e9
        affordable = max(1, min(asked, int(settings.feature_memory_gb / per_view)))
        if affordable < asked:
            print(
                f"{self.name}: fitted on {affordable} of {asked} views, because one view's features take "
                f"{per_view:.2f} GB and feature_memory_gb is {settings.feature_memory_gb}"
            )
        return affordable

    @cached_property
    def viewed(self) -> dict[str, ViewedImages]:
        views = {"train": self.settings.views, "val": {"max_shift": 0, "shift_step": 1}}
        return {
            part: make_views(getattr(self.dataset, part).images, **views.get(part, views["val"]))
            for part in ("train", "val", "test")
        }

    def features(self, part: str, view: int) -> Tensor:
        """What the suffix is given for one view of every image of a part: [N, ...]."""
        if self.trainable == "all":
            return normalise(_pixels(self.viewed[part], slice(None), view))
        found = []
        for block in self._blocks(part):
            make = partial(self.block_features, part, block, view)
            one = cached(*self._block_place(part, block, view), make)
            self.feature_seconds += one.seconds
            found.append(one.tensors["features"])
        return torch.cat(found).to(self.settings.device)

    def _blocks(self, part: str) -> list[slice]:
        count = len(getattr(self.dataset, part).labels)
        return [slice(first, min(first + BLOCK, count)) for first in range(0, count, BLOCK)]

    def _block_place(self, part: str, block: slice, view: int) -> tuple[Path, str, dict[str, Any]]:
        """The folder, name and key of the features of some images of a part, all in one view."""
        key = {
            **self.prefix_key, "images": self._block_checksum(part, block),
            "view": self.viewed[part].table[view].tolist(),
        }  # fmt: skip
        return self.folder / f"{self.name}-features", f"view{view:03d}", key

    def missing_bytes(self) -> int:
        """How much more the features of every view will take on the disk; 0 where the teacher is made, or its
        logits are kept."""
        settings = self.settings
        if self.trainable == "all" or logits_file(settings.weights, self.arch) is not None:
            return 0
        if any(self.folder.glob(f"{self.name}-logits-*.safetensors")) and self.logits_path.exists():
            return 0
        jobs = [("val", 0), ("test", 0)] + [("train", view) for view in range(self.num_views)]
        images = sum(
            block.stop - block.start
            for part, view in jobs
            for block in self._blocks(part)
            if not cache_path(*self._block_place(part, block, view)).exists()
        )
        with torch.device("meta"):  # shapes alone, no numbers
            model = getattr(ensure_torchvision().models, self.arch)()
            prefix = cut(model, self.trainable, settings.teacher_size, len(self.dataset.classes), 0)[0]
            return images * prefix(torch.empty(1, 3, *self.dataset.val.images.shape[-2:])).numel() * 2  # float16

    def _block_checksum(self, part: str, block: slice) -> str:
        """Of the images alone: another split of the same images finds the blocks that stayed together."""
        if (part, block.start) not in self._checksums:
            images = getattr(self.dataset, part).images[block]
            self._checksums[part, block.start] = tensor_checksum({"images": images})[:16]
        return self._checksums[part, block.start]

    def block_features(self, part: str, block: slice, view: int) -> tuple[dict[str, Tensor], dict]:
        """The frozen prefix's features float16 of some images of a part, all in one view, as a cached result."""
        frozen, found = self.frozen, []
        with lower_if_out_of_memory(f"{self.name}: features", "teacher_size"):
            for pixels in _pixels(self.viewed[part], block, view).split(250):
                with torch.inference_mode(), autocast(self.settings.device, self.settings.precision):
                    found.append(frozen(normalise(pixels)).half())
            features = torch.cat(found)
        if not features.isfinite().all():
            raise UserError(
                f"weights: with these, {self.arch} gives features that are not finite ({self.source.description}); "
                "give weights that are undamaged and of this network"
            )
        return {"features": features}, {}

    @cached_property
    def frozen(self) -> nn.Module:
        """The frozen prefix as it computes: norms folded, on the device."""
        prefix = copy.deepcopy(self.cut(0)[0])
        return memory_format(fold_batch_norms(prefix).to(self.settings.device))

    def suffix(self, seed: int) -> Cached:
        """The fitted suffix of a seed."""
        return resumable(self.folder, f"{self.name}-seed{seed}", self.key("suffix", seed=seed), partial(self.fit, seed))

    def fit(self, seed: int, checkpoint: Path) -> tuple[dict[str, Tensor], dict]:
        """Fit a seed's suffix: its tensors and its history."""
        suffix, name = self.cut(seed)[1], f"{self.arch}, {self.trainable}, seed {seed}"
        with lower_if_out_of_memory(name, "teacher_batch_size or feature_memory_gb"):
            history = fit(suffix, **self.fit_arguments(seed), checkpoint=checkpoint, name=name)
        return suffix.state_dict(), {"history": history}

    def fit_arguments(self, seed: int) -> dict[str, Any]:
        """What `training.fit` is given to fit a seed's suffix, but for the suffix and where it is kept."""
        settings, labels = self.settings, self.dataset.train.labels
        return {
            "inputs": self._inputs, "labels": labels, "recipe": teacher_recipe(self.arch, settings),
            "loss": lambda logits, index, view: cross_entropy(logits, labels[index], settings.teacher_label_smoothing),
            "num_views": self.trained_views, "seed": seed, "precision": settings.precision,
            "validation": (self.features("val", 0), self.dataset.val.labels),
            "last_layer_factor": settings.of_teacher(self.arch, "last_layer_factor"),
        }  # fmt: skip

    def _inputs(self, index: Tensor, view: Tensor) -> Tensor:
        """What the suffix is given for (index, view) pairs, in the layout it is fastest with."""
        if self.trainable == "all":
            return normalise(view_pixels(self.viewed["train"], index, view))
        if self.cached is None:
            one = self.features("train", 0)
            self.cached = one.new_empty(self.trained_views, *one.shape)
            for number in progress_lines(range(self.trained_views), f"{self.arch}: features of every view"):
                self.cached[number] = self.features("train", number)
        x = self.cached[view, index].float()
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

    @cached_property
    def fitted(self) -> dict[int, nn.Module]:
        """The fitted suffixes by teacher seed."""
        suffixes: dict[int, nn.Module] = {}
        for seed in self.settings.teacher_seeds:
            suffixes[seed] = memory_format(self.cut(seed)[1].to(self.settings.device))
            suffixes[seed].load_state_dict(self.suffix(seed).tensors)
        return suffixes

    def label(self, pool: Pool, view: int) -> Tensor:
        """The logits float16 [S, N, C] of every seed for one view of a pool's images."""
        settings, found = self.settings, []

        def make() -> tuple[dict[str, Tensor], dict]:
            frozen, fitted = self.frozen, self.fitted  # built here: what is built in inference mode cannot be trained
            blocks = torch.arange(len(pool.labels), device=settings.device).split(250)
            for index in progress_lines(blocks, f"{self.arch}: labels {pool.name}, view {view + 1}/{pool.num_views}"):
                x = normalise(pool.pixels(index, torch.full_like(index, view)))
                with torch.inference_mode(), autocast(settings.device, settings.precision):
                    x = frozen(x).half() if self.trainable != "all" else x
                found.append(torch.stack([predict(suffix, x, settings.precision) for suffix in fitted.values()]).half())
            return {"logits": torch.cat(found, dim=1)}, {}

        key = self.key("labels", seeds=settings.teacher_seeds, pool=pool.fingerprint, view=view)
        return cached(self.folder, f"{self.name}-labels-{pool.name}", key, make).tensors["logits"]

    def make(self) -> tuple[dict[str, Tensor], dict]:
        """The logits of every seed for every (index, view), and what else a `Teacher` is made of."""
        settings = self.settings
        check_space(self.dataset, settings, [self.arch])
        fitted = {seed: self.suffix(seed) for seed in settings.teacher_seeds}
        suffixes = self.fitted
        prefix_parameters = sum(p.numel() for p in self.cut(0)[0].parameters())
        trained = sum(p.numel() for p in suffixes[settings.teacher_seeds[0]].parameters())
        self.cached, self.feature_seconds = None, 0.0
        jobs = [("val", 0), ("test", 0)] + [("train", view) for view in range(self.num_views)]
        logits: dict[str, list[Tensor]] = {"val": [], "test": [], "train": []}
        for part, view in progress_lines(jobs, f"{self.arch}: logits of every view"):
            # each view is kept until all are there: this may take as long as the fitting
            key = {"what": "logits of a view", "logits": fingerprint(self.logits_key), "part": part, "view": view}
            make = partial(self.view_logits, suffixes, part, view)
            one = cached(self.logits_path.with_suffix(".views"), f"{part}{view:03d}", key, make)
            logits[part].append(one.tensors["logits"])
        tensors = {
            "val": logits["val"][0], "test": logits["test"][0],
            "train": torch.stack(logits["train"], dim=2),  # [S, N, V, C]
        }  # fmt: skip
        runs = [
            {"seed": seed, "history": f.facts["history"], "seconds": f.seconds, "fingerprint": f.fingerprint}
            for seed, f in fitted.items()
        ]
        return tensors, {
            "arch": self.arch, "trainable": self.trainable, "runs": runs, **self.source._asdict(),
            "parameters_total": prefix_parameters + trained, "parameters_trained": trained,
            "views_trained": self.trained_views, "feature_seconds": self.feature_seconds,
        }  # fmt: skip

    def view_logits(self, suffixes: dict[int, nn.Module], part: str, view: int) -> tuple[dict[str, Tensor], dict]:
        """The logits float16 [S, N, C] of every seed's suffix for one view of a part, as a cached result's content."""
        found, precision = [], self.settings.precision
        with lower_if_out_of_memory(f"{self.name}: logits", "teacher_size"):
            x = self.features(part, view)
            for seed, suffix in suffixes.items():
                found.append(predict(suffix, x, precision, batch_size=250).half())
                if not found[-1].isfinite().all():
                    raise UserError(
                        f"{self.name}, seed {seed}: its logits of the {part} images are too large for float16; lower "
                        f"{self.arch}_learning_rate or raise teacher_label_smoothing"
                    )
        return {"logits": torch.stack(found)}, {}


def _pixels(viewed: ViewedImages, block: slice, view: int) -> Tensor:
    index = torch.arange(len(viewed.padded), device=viewed.padded.device)[block]
    return view_pixels(viewed, index, torch.full_like(index, view))


def _generated(arch: str, settings: Settings) -> tuple[Source, dict[str, Tensor]]:
    """A ResNet pre-trained on the spot, once per run folder, on generated images of other shapes."""
    recipe = Recipe(settings.generated_epochs, 64, "adamw", "one_cycle", 2e-3, 0.02)
    how = Pretraining(arch, settings.teacher_size, recipe, 0, settings.precision, settings.device)
    count = settings.generated_images
    key = {
        "what": "pre-training on whole generated images", "classes": list(shapes.OTHER_SHAPES), "images": count,
        "arch": arch, "size": how.size, "recipe": dataclasses.asdict(recipe), "precision": how.precision,
    }  # fmt: skip
    made = resumable(settings.run_folder / "pretrained", arch, key, partial(_pretrain_generated, how, count))
    accuracy = made.facts["history"]["val_accuracy"][-1]
    description = (
        f"pre-trained here for {recipe.epochs} epochs on {count:,} generated images of "
        f"{len(shapes.OTHER_SHAPES)} other shapes ({accuracy:.0%} right on new ones)"
    )
    return Source(description, True, made.fingerprint, {}), made.tensors


def _pretrain_generated(how: Pretraining, count: int, checkpoint: Path) -> tuple[dict[str, Tensor], dict]:
    """Pre-train a whole ResNet on generated images of shapes that shapes10 does not have."""
    names = list(shapes.OTHER_SHAPES)
    train, val = (
        Split(*shapes.draw(names, images, seed)).to(how.device)
        for images, seed in ((count, 1000), (max(100, count // 8), 1001))
    )
    name = f"{how.arch}: pre-training on other shapes"
    with lower_if_out_of_memory(name, "teacher_size or generated_images"):
        state, history = pretrain(how, train, val, len(names), crops=False, name=name, checkpoint=checkpoint)
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}, {"history": history}

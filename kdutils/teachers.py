"""Teachers: pretrained CNNs, cut into a frozen and a trained part, fine-tuned, and asked for soft labels.

The features of the frozen part are computed once and kept; the trained part is fitted on them, once per teacher seed.
What comes out is one function, `teacher.logits(images, view)`, whose results are kept per thousand images.

The settings name the networks (`teachers`); README.md, "Your own two teachers", says how.
"""

import copy
import dataclasses
import itertools
import shutil
import statistics
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdutils.cache import (
    Cached,
    Checkpoint,
    History,
    cache_path,
    cached,
    fingerprint,
    lower_if_out_of_memory,
    resumable,
    tensor_checksum,
)
from kdutils.data.images import Dataset
from kdutils.data.views import make_views, view_pixels, view_table
from kdutils.losses import cross_entropy
from kdutils.models import cut, fold_batch_norms
from kdutils.parallel import side_by_side
from kdutils.progress import TrainingProgress, progress_lines
from kdutils.settings import Settings, TeacherSettings, UserError, shown_path
from kdutils.training import Recipe, autocast, channels_last, fit, predict
from kdutils.weights import Source, build, file_stem, load_pretrained, weights_source

BLOCK = 1000  # images per file of kept features or logits
BATCH = 250  # images per forward pass
CPU_BATCH = 25  # of the frozen part, whose activations then stay in a CPU's cache


@dataclasses.dataclass(frozen=True)
class TeacherRun:
    """One fine-tuning. logits: float32 [N, C] of `train`, `val` and `test`, the images as they are (view 0).

    `fingerprint` names all that its logits depend on.
    """

    label: str
    trainable: str
    seed: int
    history: History
    logits: dict[str, Tensor]
    seconds: float
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A pretrained CNN, fine-tuned once per teacher seed.

    logits: `logits(images, view=0)` gives float16 [S, N, C], what each of the S runs says of images uint8
    [N, 3, 32, 32] in one view, a row of `table`, the `data.views.view_table` of its settings.
    """

    settings: TeacherSettings
    trainable: str
    runs: list[TeacherRun]
    logits: Callable[..., Tensor]
    table: Tensor
    description: str
    is_standin: bool
    checksum: str
    parameters_total: int
    parameters_trained: int
    views_trained: int
    feature_seconds: float

    @property
    def label(self) -> str:
        """What tables and results.csv call it."""
        return self.settings.label

    def run_number(self, student_seed: int) -> int:
        """Which run teaches the student of this seed: `student_seed` modulo the number of runs."""
        return student_seed % len(self.runs)

    def run_for(self, student_seed: int) -> TeacherRun:
        """The run that teaches the student of this seed."""
        return self.runs[self.run_number(student_seed)]

    @property
    def facts(self) -> dict:
        """What the report and the provenance say about this teacher."""
        names = ("description", "is_standin", "checksum", "trainable", "parameters_total", "parameters_trained")
        facts = {name: getattr(self, name) for name in (*names, "views_trained")}
        return facts | {"settings": dataclasses.asdict(self.settings)}


def fine_tune(teacher: TeacherSettings | str, dataset: Dataset, settings: Settings) -> Teacher:
    """Fine-tune the last layer of a CNN, or its last block and last layer, as its settings say; once per teacher seed.

    teacher: one of the settings' `teachers` or `backbones`, or its label.

    What was made under the same settings is loaded. With weights = `none` there is nothing worth freezing, and
    the whole network is trained.
    """
    work = FineTuning(teacher, dataset, settings)
    check_space(dataset, settings, [work.teacher])
    pairs = list(itertools.product(settings.teacher_seeds, work.folds))
    if not all(cache_path(*work.trained_place(*pair)).exists() for pair in pairs):
        work.prepare()  # once for all seeds, with all threads
    made = dict(zip(pairs, side_by_side([partial(work.trained, *pair) for pair in pairs], settings.device)))
    trained = {seed: [made[seed, fold] for fold in work.folds] for seed in settings.teacher_seeds}
    logits = {part: work.logits(getattr(dataset, part).images).float() for part in ("train", "val", "test")}
    runs = [
        TeacherRun(
            label=work.label,
            trainable=work.trainable,
            seed=seed,
            history=_mean_history([made.facts["history"] for made in folds]),
            logits={part: of_runs[number] for part, of_runs in logits.items()},
            seconds=sum(made.seconds for made in folds),
            fingerprint=fingerprint({"folds": [made.fingerprint for made in folds]}),
        )
        for number, (seed, folds) in enumerate(trained.items())
    ]
    frozen, fitted = work.parameter_counts
    return Teacher(
        settings=work.teacher,
        trainable=work.trainable,
        runs=runs,
        logits=work.logits,
        table=work.table,
        parameters_total=frozen + fitted,
        parameters_trained=fitted,
        views_trained=work.trained_views,
        feature_seconds=max(made.facts.get("feature_seconds", 0.0) for folds in trained.values() for made in folds),
        **work.source._asdict(),
    )


def _mean_history(histories: Sequence[History]) -> History:
    return {
        name: [statistics.fmean(values) for values in zip(*(history[name] for history in histories))]
        for name in histories[0]
    }


def teacher_recipe(teacher: TeacherSettings) -> Recipe:
    """The training recipe in a teacher's settings."""
    return Recipe(**{field.name: getattr(teacher, field.name) for field in dataclasses.fields(Recipe)})


def better_teacher(teachers: Sequence[Teacher]) -> Teacher:
    """The teacher with the highest validation accuracy after the last epoch, mean over its runs."""

    def accuracy(teacher: Teacher) -> float:
        return sum(run.history["val_accuracy"][-1] for run in teacher.runs) / len(teacher.runs)

    return max(teachers, key=accuracy)


def soft_labels(teacher: Teacher, images: Tensor, num_views: int) -> Tensor:
    """Logits float16 [S, N, V, C] of every run of the teacher, for images uint8 [N, 3, 32, 32] in all views."""
    views = progress_lines(range(num_views), f"{teacher.label}: soft labels of every view")
    return torch.stack([teacher.logits(images, view) for view in views], dim=2)


def ensemble(teachers: Sequence[Teacher], combine: Callable[[list[Tensor]], Tensor]) -> list[TeacherRun]:
    """Several teachers as one classifier: run by run, the logits that `combine` makes of theirs.

    combine: as `losses.combine_teachers` with a rule and temperature 1. There are as many runs as the teacher with the
    fewest has. The runs serve as results, not as teachers.
    """
    return [
        dataclasses.replace(
            runs[0],
            label="+".join(run.label for run in runs),
            seconds=0.0,
            logits={part: combine([run.logits[part] for run in runs]) for part in runs[0].logits},
            fingerprint=fingerprint({"what": "ensemble", "runs": [run.fingerprint for run in runs]}),
        )
        for runs in zip(*(teacher.runs for teacher in teachers))
    ]


def check_weights(teacher: TeacherSettings, dataset: Dataset, settings: Settings) -> None:
    """Raise `UserError` for a network or weights that are absent or unfit, before anything is trained.

    A teacher whose results are all there needs no weights.
    """
    work = FineTuning(teacher, dataset, settings)
    _ = work.parameter_counts  # whether it can be cut
    if not work.is_made():
        load_pretrained(teacher.name, teacher.weights)


def check_space(dataset: Dataset, settings: Settings, teachers: Sequence[TeacherSettings]) -> None:
    """Raise `UserError` where the disk has no room for the teachers' features, before any of them is computed."""
    needed = sum(FineTuning(teacher, dataset, settings).missing_bytes() for teacher in teachers)
    folder = settings.run_folder
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if needed > free:
        raise UserError(
            f"runs_dir: the features of {' and '.join(teacher.label for teacher in teachers)} need "
            f"{needed / 1e9:.2f} GB, but {shown_path(folder)} has {free / 1e9:.2f} GB left; free space, choose another "
            "folder, or lower teacher_size or teacher_views"
        )


def try_fine_tuning(teacher: TeacherSettings, dataset: Dataset, settings: Settings, seed: int) -> Cached:
    """Fine-tune with one seed and keep the history alone; sweeps choose by it. The test images are not touched.

    Keeps the facts `history`, `trained_views` and `weights` (their checksum), and no network.
    """
    work = FineTuning(teacher, dataset, settings)

    def make(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict]:
        history = work.fit(seed, 0, checkpoint)[1]["history"]
        return {}, {"history": history, "trained_views": work.trained_views, "weights": work.source.checksum}

    return resumable(*work.trial(seed), make)


def prepare_fine_tuning(teacher: TeacherSettings, dataset: Dataset, settings: Settings, seeds: Iterable[int]) -> None:
    """Compute the features that `try_fine_tuning` reads, unless it has done all of these seeds."""
    work = FineTuning(teacher, dataset, settings)
    if not all(cache_path(*work.trial(seed)).exists() for seed in seeds):
        work.prepare()


class FineTuning:
    """The fine-tuning of one network: what it depends on, and its steps. The network is built when first needed."""

    def __init__(self, teacher: TeacherSettings | str, dataset: Dataset, settings: Settings):
        self.teacher = settings.teacher(teacher) if isinstance(teacher, str) else teacher
        self.dataset, self.settings, self.label = dataset, settings, self.teacher.label
        self.trainable = "all" if self.teacher.weights == "none" else self.teacher.trainable
        self.folder = settings.run_folder / "teachers"
        self.name = f"{file_stem(self.teacher.name)}-{self.trainable}"
        self.folds = range(self.teacher.folds)
        self.table = view_table(**settings.views)
        self.num_views = len(self.table)
        self._feature_seconds: dict[Path, float] = {}  # by file
        self._blocks: dict[int, tuple[Tensor, list[tuple[Tensor, str]]]] = {}
        self._logits: dict[tuple[int, int], Tensor] = {}
        self._lock = threading.RLock()

    # The network

    @cached_property
    def source(self) -> Source:
        return weights_source(self.teacher.name, self.teacher.weights)

    @cached_property
    def backbone(self) -> nn.Module:
        return load_pretrained(self.teacher.name, self.teacher.weights)

    def cut(self, seed: int, backbone: nn.Module | None = None) -> tuple[nn.Sequential, nn.Sequential]:
        """The frozen part, and a trained part of its own for a seed."""
        teacher = self.teacher
        frozen, trained = cut(
            self.backbone if backbone is None else backbone,
            teacher.name,
            self.trainable,
            teacher.size,
            len(self.dataset.classes),
            seed,
            resize=teacher.resize,
            standardize=teacher.standardize,
        )
        # seeds share the modules of the backbone: each starts from a copy of its weights
        return frozen, copy.deepcopy(trained)

    @cached_property
    def frozen(self) -> nn.Module:
        """The frozen part as it runs: norms folded into convolutions, on the device."""
        frozen: nn.Module = copy.deepcopy(self.cut(0)[0])
        if not hasattr(frozen, "body"):  # what is one module may call its layers in any order
            frozen = fold_batch_norms(frozen)
        return channels_last(frozen.to(self.settings.device))

    @cached_property
    def networks(self) -> dict[tuple[int, int], nn.Module]:
        """The fitted trained parts by teacher seed and fold."""
        networks: dict[tuple[int, int], nn.Module] = {}
        for seed, fold in itertools.product(self.settings.teacher_seeds, self.folds):
            networks[seed, fold] = channels_last(self.cut(seed)[1].to(self.settings.device))
            networks[seed, fold].load_state_dict(self.trained(seed, fold).tensors)
        return networks

    @cached_property
    def _shapes(self) -> tuple[nn.Module, nn.Module, Tensor]:
        """Frozen part, trained part and features of one image on the meta device: shapes without values."""
        backbone = build(self.teacher.name).to("meta")
        images = torch.empty(1, 3, *self.dataset.val.images.shape[-2:], device="meta")
        with torch.device("meta"):
            parts = self.cut(0, backbone)
            try:
                features = parts[0](images)
                parts[1].eval()(features)
                return *parts, features
            except (RuntimeError, AssertionError, ValueError) as error:  # many transformers take images of one size
                raise UserError(
                    f"teachers: {self.label} cannot take images of {self.teacher.size} pixels "
                    f"({' '.join(str(error).split())[:120]}); set its size to what the network expects"
                ) from error

    @property
    def parameter_counts(self) -> tuple[int, int]:
        """How many parameters the frozen and the trained part have."""
        frozen, trained = (sum(p.numel() for p in part.parameters()) for part in self._shapes[:2])
        return frozen, trained

    # What results depend on

    @cached_property
    def frozen_key(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "what": "features",
            "network": self.teacher.name,
            "weights": self.source.checksum,
            "trainable": self.trainable,
            "size": self.teacher.size,
            "resize": self.teacher.resize,
            "precision": settings.precision,
        }

    def key(self, what: str, **more: Any) -> dict[str, Any]:
        """What a trained part (with its seed) or the logits (with their seeds) depend on."""
        settings = self.settings
        return {
            **self.frozen_key,
            "what": what,
            "recipe": dataclasses.asdict(teacher_recipe(self.teacher)),
            "trained_views": self.trained_views,
            "views": settings.views,
            "data": [self.dataset.part_checksums[part] for part in ("train", "val")],
            "label_smoothing": self.teacher.label_smoothing,
            "standardize": self.teacher.standardize,
            "last_layer_factor": self.teacher.last_layer_factor,
            **({"folds": len(self.folds)} if len(self.folds) > 1 else {}),
            **more,
        }

    def trial(self, seed: int) -> tuple[Path, str, dict[str, Any]]:
        """Folder, name and key of what `try_fine_tuning` keeps."""
        return self.folder / "trials", f"{self.name}-seed{seed}", self.key("trial", seed=seed)

    @cached_property
    def trained_views(self) -> int:
        """How many views the trained part is fitted on: as set, or fewer where their features take too much memory."""
        settings = self.settings
        if self.trainable == "all":
            return self.num_views
        asked = min(self.teacher.views, self.num_views)
        per_view = self._shapes[2].numel() * 2 * settings.train_size / 1e9  # float16
        affordable = max(1, min(asked, int(settings.feature_memory_gb / per_view)))
        if affordable < asked:
            print(
                f"{self.name}: trains on {affordable} of {asked} views, because the features of one view take "
                f"{per_view:.2f} GB and feature_memory_gb is {settings.feature_memory_gb}"
            )
        return affordable

    # Features of the frozen part

    def features(self, images: Tensor, view: int = 0) -> Tensor:
        """What the trained part is given: features float16 [N, ...] of images in one view; made once, kept.

        Where nothing is frozen: the pixels, float32 from 0 to 255.
        """
        if self.trainable == "all":
            return self._pixels(images, view).float()
        places = [(block, self._feature_place(checksum, view)) for block, checksum in self._in_blocks(images)]
        jobs = [partial(cached, *place, partial(self._make_features, block, view)) for block, place in places]
        found = side_by_side(jobs, self.settings.device)
        self._feature_seconds |= {cache_path(*place): made.seconds for (_, place), made in zip(places, found)}
        return torch.cat([made.tensors["features"] for made in found]).to(self.settings.device)

    def prepare(self) -> None:
        """Compute the features that the fitting needs, if there is a frozen part."""
        if self.trainable == "all":
            return
        for images, view in progress_lines(self._fitted_on(), f"{self.label}: features of every view"):
            self.features(images, view)

    def _fitted_on(self) -> list[tuple[Tensor, int]]:
        """The images and views whose features the fitting needs."""
        train, val = self.dataset.train.images, self.dataset.val.images
        return [(val, 0), *((train, view) for view in range(self.trained_views))]

    def missing_bytes(self) -> int:
        """How much more disk the features will take."""
        if self.trainable == "all" or self.is_made():
            return 0
        count = sum(
            len(block)
            for images, view in self._fitted_on()
            for block, checksum in self._in_blocks(images)
            if not cache_path(*self._feature_place(checksum, view)).exists()
        )
        return count * self._shapes[2].numel() * 2  # float16

    def _make_features(self, block: Tensor, view: int) -> tuple[dict[str, Tensor], dict]:
        with self._lock:
            frozen, found = self.frozen, []
        with lower_if_out_of_memory(f"{self.name}: features", "teacher_size"):
            for pixels in self._pixels(block, view).split(CPU_BATCH if self.settings.device == "cpu" else BATCH):
                with torch.inference_mode(), autocast(self.settings.device, self.settings.precision):
                    found.append(frozen(pixels.float()).half())
            features = torch.cat(found)
        if not features.isfinite().all():
            raise UserError(
                f"weights: {self.label} gives features that are not finite with these ({self.source.description}); "
                "give undamaged weights of this network"
            )
        return {"features": features}, {}

    def _feature_place(self, checksum: str, view: int) -> tuple[Path, str, dict[str, Any]]:
        """Folder, name and key of a block's features. They depend on its images alone, not on the split."""
        key = {**self.frozen_key, "images": checksum, "view": self.table[view].tolist()}
        return self.folder / f"{self.name}-features", f"view{view:03d}", key

    def _in_blocks(self, images: Tensor) -> list[tuple[Tensor, str]]:
        """The images in blocks, each with its checksum."""
        if id(images) not in self._blocks:  # the tuple keeps the images alive, so their id is not reused
            blocks = [(block, tensor_checksum({"images": block})[:16]) for block in images.split(BLOCK)]
            self._blocks[id(images)] = images, blocks
        return self._blocks[id(images)][1]

    def _pixels(self, images: Tensor, view: int) -> Tensor:
        index = torch.arange(len(images), device=images.device)
        return view_pixels(make_views(images, **self.settings.views), index, torch.full_like(index, view))

    # Fitting the trained part

    def trained(self, seed: int, fold: int = 0) -> Cached:
        """The trained part of a seed and fold, fitted."""
        return resumable(*self.trained_place(seed, fold), partial(self.fit, seed, fold))

    def trained_place(self, seed: int, fold: int) -> tuple[Path, str, dict[str, Any]]:
        """Folder, name and key of a fitted trained part."""
        name = f"{self.name}-seed{seed}" + (f"-fold{fold}" if len(self.folds) > 1 else "")
        return self.folder, name, self.key("trained part", seed=seed, fold=fold)

    def fit(self, seed: int, fold: int, checkpoint: Checkpoint | None = None) -> tuple[dict[str, Tensor], dict]:
        """Fit the trained part of a seed and fold: its tensors and its history."""
        name = f"{self.label}, {self.trainable}, seed {seed}"
        name += f", fold {fold + 1} of {len(self.folds)}" if len(self.folds) > 1 else ""
        with lower_if_out_of_memory(name, "teacher_batch_size or feature_memory_gb"):
            with self._lock:  # what all seeds share is made once
                trained, arguments = self.cut(seed)[1], self.fit_arguments(seed, fold)
            history = fit(trained, **arguments, progress=TrainingProgress(name), checkpoint=checkpoint)
        return trained.state_dict(), {"history": history, "feature_seconds": sum(self._feature_seconds.values())}

    def fit_arguments(self, seed: int, fold: int = 0) -> dict[str, Any]:
        """What `training.fit` needs to fit the trained part of a seed and fold, but for the network and checkpoint."""
        teacher, train = self.teacher, self.dataset.train
        kept = torch.arange(len(train.labels), device=train.labels.device)
        if len(self.folds) > 1:
            kept = kept[self._fold_of(train.images) != fold]
        labels = train.labels[kept]
        return {
            "inputs": lambda index, view: self._inputs(kept[index], view),
            "labels": labels,
            "loss": lambda logits, index, view: cross_entropy(logits, labels[index], teacher.label_smoothing),
            "recipe": teacher_recipe(teacher),
            "num_views": self.trained_views,
            "seed": seed,
            "validation": (self.features(self.dataset.val.images), self.dataset.val.labels),
            "precision": self.settings.precision,
            "last_layer_factor": teacher.last_layer_factor,
        }

    def _fold_of(self, images: Tensor) -> Tensor:
        """The fold that holds an image out, int64 [N]; -1 for images that no fold was trained on.

        images: the training images, these and others after them, or others.
        """
        train = self.dataset.train.images
        fold = torch.full((len(images),), -1, device=images.device)
        if torch.equal(images[: len(train)], train):
            fold[: len(train)] = torch.arange(len(train), device=images.device) % len(self.folds)
        return fold

    def _inputs(self, index: Tensor, view: Tensor) -> Tensor:
        if self.trainable == "all":
            return view_pixels(self._viewed, index, view).float()
        x = self.training_features[view, index].float()
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

    @cached_property
    def _viewed(self):
        return make_views(self.dataset.train.images, **self.settings.views)

    @cached_property
    def training_features(self) -> Tensor:
        """Features float16 [V, N, ...] of the training images in every view that is trained on."""
        images = self.dataset.train.images
        features = None
        for view in progress_lines(range(self.trained_views), f"{self.label}: features of every view"):
            one = self.features(images, view)
            features = one.new_empty(self.trained_views, *one.shape) if features is None else features
            features[view] = one
        assert features is not None
        return features

    # Logits

    def logits(self, images: Tensor, view: int = 0) -> Tensor:
        """`Teacher.logits`: float16 [S, N, C] for images uint8 [N, 3, 32, 32] in one view; made once, kept."""
        blocks = self._in_blocks(images)
        if (id(images), view) not in self._logits:
            places = [self._logits_place(checksum, view) for _, checksum in blocks]
            jobs = [
                partial(cached, *place, partial(self._make_logits, block, checksum, view))
                for place, (block, checksum) in zip(places, blocks)
            ]
            found = side_by_side(jobs, self.settings.device)
            logits = torch.cat([one.tensors["logits"] for one in found], dim=1).to(self.settings.device)
            self._logits[id(images), view] = self._one_per_seed(logits, images)
        return self._logits[id(images), view]

    def _one_per_seed(self, logits: Tensor, images: Tensor) -> Tensor:
        """float16 [S, N, C] from the logits [S x folds, N, C] of all networks: of a training image those of the network
        that did not train on it, of any other the mean over the folds."""
        if len(self.folds) == 1:
            return logits
        by_fold = logits.unflatten(0, (-1, len(self.folds)))
        fold = self._fold_of(images)
        held_out = by_fold[:, fold.clamp(min=0), torch.arange(len(fold), device=fold.device)]
        return torch.where((fold >= 0)[:, None], held_out, by_fold.float().mean(1).half())

    def is_made(self) -> bool:
        """Whether all logits of the data set, in every view of the training images, are there."""
        if not any((self.folder / f"{self.name}-logits").glob("*")):
            return False
        jobs = [(self.dataset.val, 0), (self.dataset.test, 0)]
        jobs += [(self.dataset.train, view) for view in range(self.num_views)]
        return all(
            cache_path(*self._logits_place(checksum, view)).exists()
            for part, view in jobs
            for _, checksum in self._in_blocks(part.images)
        )

    @cached_property
    def _runs_fingerprint(self) -> str:
        return fingerprint(self.key("suffixes", seeds=self.settings.teacher_seeds))

    def _logits_place(self, checksum: str, view: int) -> tuple[Path, str, dict[str, Any]]:
        """Folder, name and key of a block's logits."""
        key = {"what": "logits", "runs": self._runs_fingerprint, "images": checksum, "view": self.table[view].tolist()}
        return self.folder / f"{self.name}-logits", f"view{view:03d}", key

    def _make_logits(self, block: Tensor, checksum: str, view: int) -> tuple[dict[str, Tensor], dict]:
        with self._lock:
            networks, found = self.networks, []
        with lower_if_out_of_memory(f"{self.name}: logits", "teacher_size"):
            if self.trainable == "all":
                x = self._pixels(block, view).float()
            elif cache_path(*(place := self._feature_place(checksum, view))).exists():
                x = cached(*place, partial(self._make_features, block, view)).tensors["features"]
            else:  # not needed for fitting, and too large to keep
                x = self._make_features(block, view)[0]["features"]
            for (seed, _), network in networks.items():
                found.append(predict(network, x.to(self.settings.device), self.settings.precision, BATCH).half())
                if not found[-1].isfinite().all():
                    raise UserError(
                        f"{self.name}, seed {seed}: its logits are too large for float16; lower its "
                        "learning_rate or raise its label_smoothing"
                    )
        return {"logits": torch.stack(found)}, {}

"""Teachers: prefix features computed once, a suffix fitted on them, logits stored for every (index, view)."""

import copy
import dataclasses
from functools import partial

import torch
from torch import Tensor, nn

from kdutils import shapes
from kdutils.compat import ensure_torchvision
from kdutils.data import Dataset
from kdutils.losses import cross_entropy
from kdutils.models import Backbone, cut, fold_batch_norms, load_backbone, normalise, seeded, with_state
from kdutils.runs import Artefact, artefact, artefact_path
from kdutils.settings import Settings
from kdutils.training import History, Recipe, autocast, fit, memory_format, predict, progress_lines
from kdutils.views import ViewedImages, make_views, view_pixels


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
    """
    backbone = _backbone(arch, settings)
    trainable = "all" if settings.weights == "none" else settings.of_teacher(arch, "trainable")
    size, classes = settings.teacher_size, len(dataset.classes)
    folder = settings.run_folder / "teachers"
    name = f"{arch}-{trainable}"
    viewed = {
        "train": make_views(dataset.train.images, **settings.views),
        "val": make_views(dataset.val.images, 0, 1),
        "test": make_views(dataset.test.images, 0, 1),
    }
    num_views = len(viewed["train"].table)
    seed_suffix = {seed: cut(backbone.model, trainable, size, classes, seed)[1] for seed in settings.teacher_seeds}
    prefix = cut(backbone.model, trainable, size, classes, 0)[0]
    key = {
        "what": "features", "arch": arch, "weights": backbone.checksum, "trainable": trainable, "size": size,
        "precision": settings.precision,
    }  # fmt: skip
    cost: dict[tuple[str, int], float] = {}

    def features(part: str, view: int) -> Tensor:
        """What the suffix is given for one view of every image of a part: [N, ...]."""
        if not len(prefix):
            return normalise(_all_pixels(viewed[part], view))
        here = folder / f"{name}-features"
        make = partial(_prefix_features, prefix, viewed[part], view, settings, f"{arch}: {part} view {view}")
        shifted = viewed[part].table[view].tolist()
        this_view = {**key, "images": dataset.part_checksums[part], "view": shifted}
        found = artefact(here, f"{part}-view{view:03d}", this_view, make)
        cost[part, view] = found.seconds
        return found.tensors["features"].to(settings.device)

    trained_views = num_views if not len(prefix) else _affordable_views(features, num_views, settings, name)
    recipe = teacher_recipe(arch, settings)
    fit_key = {
        **key, "what": "suffix", "recipe": dataclasses.asdict(recipe), "trained_views": trained_views,
        "views": settings.views, "data": [dataset.part_checksums[part] for part in ("train", "val")],
        "label_smoothing": settings.teacher_label_smoothing,
    }  # fmt: skip
    seed_key = {seed: {**fit_key, "seed": seed} for seed in settings.teacher_seeds}
    logits_key = {**fit_key, "what": "logits", "seeds": settings.teacher_seeds, "data": dataset.checksum}
    cached: list[Tensor] = []  # the training features, read only if a suffix must be fitted

    def fit_suffix(seed: int) -> Artefact:
        def make() -> tuple[dict[str, Tensor], dict]:
            if len(prefix) and not cached:
                one = features("train", 0)
                cached.append(one.new_empty(trained_views, *one.shape))
                for view in range(trained_views):
                    cached[0][view] = features("train", view)
            if len(prefix):
                inputs = partial(_gather_features, cached[0])
            else:
                inputs = lambda index, view: normalise(view_pixels(viewed["train"], index, view))  # noqa: E731
            # the modules are shared among seeds: each starts from the backbone's own weights
            suffix = copy.deepcopy(seed_suffix[seed])
            labels = dataset.train.labels
            checkpoint = artefact_path(folder, f"{name}-seed{seed}", seed_key[seed]).with_suffix(".checkpoint")
            history = fit(
                suffix, inputs, labels,
                lambda logits, index, view: cross_entropy(logits, labels[index], settings.teacher_label_smoothing),
                recipe, num_views=trained_views, seed=seed, validation=(features("val", 0), dataset.val.labels),
                precision=settings.precision, name=f"{arch}, {trainable}, seed {seed}", checkpoint=checkpoint,
            )  # fmt: skip
            return suffix.state_dict(), {"history": history}

        made = artefact(folder, f"{name}-seed{seed}", seed_key[seed], make)
        artefact_path(folder, f"{name}-seed{seed}", seed_key[seed]).with_suffix(".checkpoint").unlink(missing_ok=True)
        return made

    fitted = {seed: fit_suffix(seed) for seed in settings.teacher_seeds}

    def make_logits() -> tuple[dict[str, Tensor], dict]:
        suffixes = []
        for seed in settings.teacher_seeds:
            suffix = memory_format(copy.deepcopy(seed_suffix[seed]).to(settings.device))
            suffix.load_state_dict(fitted[seed].tensors)
            suffixes.append(suffix)
        jobs = [("val", 0), ("test", 0)] + [("train", view) for view in range(num_views)]
        found: dict[str, list[Tensor]] = {"val": [], "test": [], "train": []}
        for part, view in progress_lines(jobs, f"{arch}: logits of every view"):
            x = features(part, view)
            found[part].append(torch.stack([predict(s, x, settings.precision, batch_size=250) for s in suffixes]).half())
        return {
            "val": found["val"][0], "test": found["test"][0],
            "train": torch.stack(found["train"], dim=2),  # [S, N, V, C]
        }, {"feature_seconds": sum(cost.values())}  # fmt: skip

    logits = artefact(folder, f"{name}-logits", logits_key, make_logits)
    on_device = {part: tensor.to(settings.device) for part, tensor in logits.tensors.items()}
    runs = [
        TeacherRun(
            arch, trainable, seed, fitted[seed].facts["history"],
            {"train": on_device["train"][i, :, 0].float(), "val": on_device["val"][i].float(),
             "test": on_device["test"][i].float()},
            on_device["train"][i], fitted[seed].seconds, fitted[seed].fingerprint,
        )
        for i, seed in enumerate(settings.teacher_seeds)
    ]  # fmt: skip
    trained = sum(p.numel() for p in seed_suffix[settings.teacher_seeds[0]].parameters())
    return Teacher(
        arch, trainable, runs, backbone.description, backbone.is_standin, backbone.checksum,
        trained + sum(p.numel() for p in prefix.parameters()), trained, trained_views,
        logits.facts["feature_seconds"],
    )  # fmt: skip


def _gather_features(cached: Tensor, index: Tensor, view: Tensor) -> Tensor:
    """The features [B, ...] of (index, view) pairs out of [V, N, ...], in the layout the suffix is fastest with."""
    x = cached[view, index].float()
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _all_pixels(viewed: ViewedImages, view: int) -> Tensor:
    index = torch.arange(len(viewed.padded), device=viewed.padded.device)
    return view_pixels(viewed, index, torch.full_like(index, view))


@torch.inference_mode()
def _prefix_features(
    prefix: nn.Sequential, viewed: ViewedImages, view: int, settings: Settings, name: str, batch_size: int = 250
) -> tuple[dict[str, Tensor], dict]:
    frozen = memory_format(fold_batch_norms(copy.deepcopy(prefix)).to(settings.device))
    batches = _all_pixels(viewed, view).split(batch_size)
    found = []
    for pixels in progress_lines(batches, name):
        with autocast(settings.device, settings.precision):
            found.append(frozen(normalise(pixels)).half())
    return {"features": torch.cat(found)}, {}


def _affordable_views(features, num_views: int, settings: Settings, name: str) -> int:
    """How many views the suffix is fitted on: as set, or fewer if their features exceed the memory budget."""
    asked = min(settings.teacher_views, num_views)
    one = features("val", 0)
    per_view = one[0].numel() * one.element_size() * settings.train_size / 1e9
    affordable = max(1, min(asked, int(settings.feature_memory_gb / per_view)))
    if affordable < asked:
        print(
            f"{name}: fitted on {affordable} of {asked} views, because one view's features take {per_view:.2f} GB "
            f"and feature_memory_gb is {settings.feature_memory_gb}"
        )
    return affordable


def _backbone(arch: str, settings: Settings) -> Backbone:
    if settings.weights != "generated":
        return load_backbone(arch, settings.weights)
    recipe = Recipe(settings.generated_epochs, 64, "adamw", "one_cycle", 2e-3, 0.02)
    count, size = settings.generated_images, settings.teacher_size
    key = {
        "what": "pre-training on generated images", "arch": arch, "classes": list(shapes.OTHER_SHAPES),
        "images": count, "size": size, "recipe": dataclasses.asdict(recipe), "views": settings.views,
        "precision": settings.precision,
    }  # fmt: skip
    made = artefact(
        settings.run_folder / "pretrained", arch, key, partial(_pretrain_generated, arch, recipe, count, settings)
    )
    accuracy = made.facts["history"]["val_accuracy"][-1]
    description = (
        f"pre-trained here for {recipe.epochs} epochs on {count:,} generated images of "
        f"{len(shapes.OTHER_SHAPES)} other shapes ({accuracy:.0%} right on new ones)"
    )
    return Backbone(with_state(arch, made.tensors), description, True, made.fingerprint)


def _pretrain_generated(arch: str, recipe: Recipe, count: int, settings: Settings) -> tuple[dict[str, Tensor], dict]:
    """Pre-train a whole ResNet on generated images of shapes that shapes10 does not have."""
    names = list(shapes.OTHER_SHAPES)
    images, labels = (t.to(settings.device) for t in shapes.draw(names, count, seed=1000))
    new_images, new_labels = (t.to(settings.device) for t in shapes.draw(names, max(100, count // 8), seed=1001))
    viewed = make_views(images, **settings.views)
    model = seeded(0, getattr(ensure_torchvision().models, arch))
    network = cut(model, "all", settings.teacher_size, len(names), seed=0)[1]
    history = fit(
        network, lambda index, view: normalise(view_pixels(viewed, index, view)), labels,
        lambda logits, index, view: cross_entropy(logits, labels[index], label_smoothing=0.1),
        recipe, num_views=len(viewed.table), seed=0, validation=(normalise(new_images), new_labels),
        precision=settings.precision, name=f"{arch}: pre-training on other shapes",
    )  # fmt: skip
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("fc.")}
    return state, {"history": history}

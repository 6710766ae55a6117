"""Ten-class image sets, split with a seed and kept whole on the device as uint8."""

import contextlib
import hashlib
import io
import os
import stat
import warnings
from collections.abc import Iterable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from kdutils.cache import cached, check_writable, fingerprint, network_timeout, tensor_checksum
from kdutils.compat import ensure_torchvision
from kdutils.data import shapes
from kdutils.settings import Settings, UserError, project_path, shown_path

NUM_CLASSES = 10
IMAGE_SIZE = 32
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
CIFAR10_NAME = "CIFAR-10"
SHAPES10_SIZES = {"train": 12_000, "test": 10_000}  # images that can be drawn for each part


class Split(NamedTuple):
    """Images uint8 [N, 3, 32, 32] and labels int64 [N], on one device."""

    images: Tensor
    labels: Tensor

    def to(self, device: str) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


class Dataset(NamedTuple):
    """A ten-class image set, split. `name` is how the report calls it; `checksum` covers all pixels and labels."""

    name: str
    classes: list[str]
    train: Split
    val: Split
    test: Split
    checksum: str
    part_checksums: dict[str, str]
    is_generated: bool
    is_cifar10: bool

    @property
    def facts(self) -> dict:
        """What the report and the provenance say about the data."""
        sizes = {part: len(getattr(self, part).labels) for part in ("train", "val", "test")}
        return {
            "name": self.name, "classes": self.classes, "checksum": self.checksum,
            "is_generated": self.is_generated, "is_cifar10": self.is_cifar10, **sizes,
        }  # fmt: skip


def load_data(settings: Settings) -> Dataset:
    """The data set of the settings, split and on the device.

    Raises `UserError` for a missing or unfit folder, an unreadable image, sizes larger than the data, no network.
    """
    folder = settings.run_folder
    check_writable(next(path for path in (folder, *folder.parents) if path.exists()), "runs_dir")
    kind = settings.data
    default_name, classes, train, test = _whole(settings)
    name = settings.data_name or default_name
    if kind != "cifar10" and name == CIFAR10_NAME:
        raise UserError(
            f"data_name: '{CIFAR10_NAME}' names the original images (data = cifar10); "
            "give another, for example 'CIFAR-10, JPEG re-encoding'"
        )
    indices = _train_and_val(train, settings)
    (test_indices,) = stratified_split(test.labels, (settings.test_size,), settings.split_seed, "test_size")
    parts = {
        "train": Split(train.images[indices[0]], train.labels[indices[0]]),
        "val": Split(train.images[indices[1]], train.labels[indices[1]]),
        "test": Split(test.images[test_indices], test.labels[test_indices]),
    }
    checksums = {part: tensor_checksum(split._asdict())[:16] for part, split in parts.items()}
    return Dataset(
        name, classes, **{part: split.to(settings.device) for part, split in parts.items()},
        checksum=fingerprint(checksums), part_checksums=checksums,
        is_generated=kind == "shapes10", is_cifar10=kind == "cifar10",
    )  # fmt: skip


def left_over(settings: Settings) -> Split:
    """The training images of the data that are neither training nor validation images of the settings, on the device.

    In class order. There may be none.
    """
    train = _whole(settings)[2]
    unused = torch.ones(len(train.labels), dtype=torch.bool)
    unused[torch.cat(_train_and_val(train, settings))] = False
    return Split(train.images[unused], train.labels[unused]).to(settings.device)


def _whole(settings: Settings) -> tuple[str, list[str], Split, Split]:
    """The name, the classes, all training and all test images of the settings' data."""
    if settings.data == "cifar10":
        return CIFAR10_NAME, *_cifar10(project_path(settings.data_dir))
    if settings.data == "shapes10":
        return "shapes10 (generated images)", *_shapes10(settings)
    folder = project_path(settings.data.removeprefix("folder:").strip())
    return folder.name, *_folder(folder, settings)


def _train_and_val(train: Split, settings: Settings) -> list[Tensor]:
    sizes = (settings.train_size, settings.val_size)
    return stratified_split(train.labels, sizes, settings.split_seed, "train_size + val_size")


def rotate_validation(dataset: Dataset, fold: int) -> Dataset:
    """The same labelled images with other ones held out: fold 0 is the data set as it is; in fold k the k-th
    `len(val)` training images are the validation images, and the former ones train in their place.

    Raises `UserError` for a fold that the training images do not have.
    """
    if fold == 0:
        return dataset
    size = len(dataset.val.labels)
    held_out = slice((fold - 1) * size, fold * size)
    if held_out.stop > len(dataset.train.labels):
        raise UserError(f"fold: there are folds 0 to {len(dataset.train.labels) // size} of {size} images, not {fold}")
    val = Split(*(tensor[held_out] for tensor in dataset.train))
    train = Split(*(
        torch.cat([mine[: held_out.start], former, mine[held_out.stop :]])
        for mine, former in zip(dataset.train, dataset.val, strict=True)
    ))  # fmt: skip
    return _with_parts(dataset, train, val)


def training_part(dataset: Dataset, index: Tensor) -> Dataset:
    """The data set with some of its training images alone, by their numbers int64 [n]."""
    index = index.to(dataset.train.labels.device)
    return _with_parts(dataset, Split(*(tensor[index] for tensor in dataset.train)), dataset.val)


def _with_parts(dataset: Dataset, train: Split, val: Split) -> Dataset:
    checksums = {part: tensor_checksum(split._asdict())[:16] for part, split in (("train", train), ("val", val))}
    checksums = dataset.part_checksums | checksums
    return dataset._replace(train=train, val=val, part_checksums=checksums, checksum=fingerprint(checksums))


def stratified_split(labels: Tensor, sizes: Sequence[int], seed: int, name: str = "sizes") -> list[Tensor]:
    """Disjoint index sets of the given sizes, each with the classes in the proportions of `labels`, shuffled.

    Class counts differ from the exact proportion by less than one (largest remainders). The same labels, sizes and
    seed give the same sets. Raises `UserError` when there are fewer labels than asked for.
    """
    if sum(sizes) > len(labels):
        raise UserError(f"{name}: {sum(sizes)} images were asked for, but the data holds {len(labels)}; lower it")
    generator = torch.Generator().manual_seed(seed)
    members = [torch.nonzero(labels == c).flatten() for c in labels.unique()]
    members = [indices[torch.randperm(len(indices), generator=generator)] for indices in members]
    taken = [0] * len(members)
    result = []
    for size in sizes:
        left = torch.tensor([len(m) - t for m, t in zip(members, taken)])
        exact = size * torch.tensor([len(m) for m in members], dtype=torch.float64) / len(labels)
        counts = torch.minimum(exact.floor().long(), left)
        order = torch.argsort(exact - counts, descending=True, stable=True).tolist()
        while int(counts.sum()) < size:
            for c in order:
                if int(counts.sum()) < size and counts[c] < left[c]:
                    counts[c] += 1
        picked = torch.cat([m[t : t + int(n)] for m, t, n in zip(members, taken, counts)])
        taken = [t + int(n) for t, n in zip(taken, counts)]
        result.append(picked[torch.randperm(len(picked), generator=generator)])
    return result


def _cifar10(folder: Path) -> tuple[list[str], Split, Split]:
    parts = []
    for train in (True, False):
        try:
            # redirected: torchvision's "already downloaded"
            with contextlib.redirect_stdout(io.StringIO()), network_timeout():
                part = ensure_torchvision().datasets.CIFAR10(str(folder), train=train, download=True)
        except (OSError, RuntimeError, HTTPException) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"data: CIFAR-10 is not in {shown_path(folder)} and cannot be downloaded ({reason}); put "
                "cifar-10-python.tar.gz (https://www.cs.toronto.edu/~kriz/cifar.html) there, or use "
                "data = shapes10 or data = folder:PATH"
            ) from error
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        parts.append(Split(images, torch.tensor(part.targets)))
    return list(part.classes), parts[0], parts[1]


def _shapes10(settings: Settings) -> tuple[list[str], Split, Split]:
    classes = list(shapes.SHAPES10)
    asked = {"train": settings.train_size + settings.val_size, "test": settings.test_size}
    parts = []
    for seed, (part, count) in enumerate(asked.items()):
        if count > SHAPES10_SIZES[part]:
            size = "train_size or val_size" if part == "train" else "test_size"
            raise UserError(
                f"data: shapes10 has {SHAPES10_SIZES[part]} images for {part}, {count} were asked for; lower {size}"
            )
        parts.append(Split(*shapes.draw(classes, count, seed=seed)))
    return classes, parts[0], parts[1]


def _folder(folder: Path, settings: Settings) -> tuple[list[str], Split, Split]:
    classes, parts = read_image_folder(folder, ("train", "test"), IMAGE_SIZE, settings.run_folder / "data", NUM_CLASSES)
    return classes, parts["train"], parts["test"]


def read_image_folder(
    folder: Path, names: Sequence[str], size: int, cache: Path, num_classes: int | None = None
) -> tuple[list[str], dict[str, Split]]:
    """The images of `folder/<part>/<class>/*` for the parts `names`, size x size; decoded once, then kept in `cache`.

    Raises `UserError` for missing folders, classes that differ among the parts or are not `num_classes`, bad images.
    """
    files = {part: _list_images(folder / part) for part in names}
    first = files[names[0]]
    classes = sorted(first)
    if not classes:
        raise UserError(
            f"data: {shown_path(folder / names[0])} holds no class folders; it must hold one folder of images a class"
        )
    for part, by_class in files.items():
        if odd := sorted(set(first) ^ set(by_class)):
            raise UserError(
                f"data: {names[0]} and {part} of {shown_path(folder)} must hold the same class folders; only one has "
                f"{', '.join(odd[:10])}"
            )
    if num_classes not in (None, len(classes)):
        raise UserError(
            f"data: {shown_path(folder / names[0])} holds {len(classes)} class folders; it must be {num_classes}"
        )
    listed = hashlib.sha256()
    for part, by_class in files.items():
        for name in classes:
            for path, facts in by_class[name].items():
                listed.update(f"{part}/{name}/{os.path.basename(path)} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    key = {"what": "decoded images", "files": listed.hexdigest(), "size": size, "transparent": "white"}

    def make() -> tuple[dict[str, Tensor], dict]:
        return {
            f"{part}_{field}": tensor
            for part, by_class in files.items()
            for field, tensor in _decode(by_class, classes, part, size)._asdict().items()
        }, {"classes": classes}

    tensors = cached(cache, "images", key, make).tensors
    return classes, {part: Split(tensors[f"{part}_images"], tensors[f"{part}_labels"]) for part in names}


def _list_images(folder: Path) -> dict[str, dict[str, os.stat_result]]:
    """The image files of every class folder, by name, with their sizes and times."""
    if not folder.is_dir():
        raise UserError(f"data: there is no folder {shown_path(folder)}; it must hold one folder of images a class")
    found, others, links = {}, [], []
    for sub in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        with os.scandir(sub) as entries:
            files = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
        images = [entry for entry in files if os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES]
        if not images:
            raise UserError(f"data: the class folder {shown_path(sub)} holds no images; add some or remove it")
        found[sub.name] = {entry.path: _stat(entry) for entry in images}
        others += [entry.path for entry in files if entry.path not in found[sub.name] and entry.name != "Thumbs.db"]
        may_lead_out = [str(sub), *(entry.path for entry in images if entry.is_symlink())]
        links += [Path(path) for path in may_lead_out if os.path.islink(path)]
    links = [link for link in links if not link.resolve().is_relative_to(folder.resolve())]
    for what, paths in (("no images by their names, and passed over", others), ("links to what lies elsewhere", links)):
        if paths:
            print(f"data: {len(paths)} in {shown_path(folder)} are {what}, for example {shown_path(paths[0])}")
    return found


def _stat(entry: os.DirEntry) -> os.stat_result:
    name = shown_path(entry.path)
    try:
        facts = entry.stat()
    except OSError as error:
        raise UserError(f"data: {name} cannot be read ({error.strerror}); mend or remove it") from error
    if not stat.S_ISREG(facts.st_mode):  # a pipe would be waited for
        raise UserError(f"data: {name} is called an image, but is no file; mend or remove it")
    return facts


def _decode(by_class: Mapping[str, Iterable[str]], classes: Sequence[str], part: str, size: int) -> Split:
    paths = [(path, label) for label, name in enumerate(classes) for path in by_class[name]]
    images = np.empty((len(paths), 3, size, size), dtype=np.uint8)
    for i, (path, _) in enumerate(tqdm(paths, desc=f"reading {part} images", leave=False, disable=None)):
        images[i] = read_image(Path(path), size).transpose(2, 0, 1)
    return Split(torch.from_numpy(images), torch.tensor([label for _, label in paths]))


def read_image(path: Path, size: int = IMAGE_SIZE) -> np.ndarray:
    """An image file as uint8 [size, size, 3]: any mode made RGB, what is transparent made white, the first of several
    frames; not square: the middle; not `size`: resized.

    Raises `UserError` naming a file that cannot be read, or that is large beyond reason (Pillow's limit: 89 million
    pixels).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                rgb = _as_rgb(ImageOps.exif_transpose(image))
    except MemoryError:
        raise
    except Exception as error:  # of damaged files, Pillow raises whatever its readers ran into
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
            reason = "it has far too many pixels"
        elif isinstance(error, UnidentifiedImageError):
            reason = "its content is of no kind that is known here"
        raise UserError(f"data: {shown_path(path)} cannot be read as an image ({reason}); mend or remove it") from error
    if rgb.size != (size, size):
        rgb = ImageOps.fit(rgb, (size, size), method=Image.Resampling.LANCZOS)
    return np.asarray(rgb)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are numbers with a fraction, of no known range: save it with 8 bits a channel")
    if image.mode.startswith("I"):  # 16 bits a pixel: convert() would clip to white
        return Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")

"""Ten-class image sets, split with a seed and kept whole on the device as uint8."""

import contextlib
import hashlib
import io
import os
import stat
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from kdutils.cache import (
    DOWNLOAD_ERRORS,
    cached,
    check_writable,
    download_reason,
    fingerprint,
    lock,
    network_timeout,
    tensor_checksum,
)
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

    def at(self, index: Tensor | slice) -> "Split":
        """Some of the images: by their numbers, a mask or a slice."""
        return Split(self.images[index], self.labels[index])


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
        names = ("name", "classes", "checksum", "is_generated", "is_cifar10")
        return {name: getattr(self, name) for name in names} | sizes


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
    (test_indices,) = stratified_split(test.labels, (settings.test_size,), settings.split_seed, "test_size")
    train_indices, val_indices = _train_and_val(train, settings)
    parts = {"train": train.at(train_indices), "val": train.at(val_indices), "test": test.at(test_indices)}
    checksums = {part: _checksum(split) for part, split in parts.items()}
    return Dataset(
        name,
        classes,
        **{part: split.to(settings.device) for part, split in parts.items()},
        checksum=fingerprint(checksums),
        part_checksums=checksums,
        is_generated=kind == "shapes10",
        is_cifar10=kind == "cifar10",
    )


def left_over(settings: Settings) -> Split:
    """The training images of the data that the split leaves, in class order, on the device. There may be none."""
    train = _whole(settings)[2]
    unused = torch.ones(len(train.labels), dtype=torch.bool)
    unused[torch.cat(_train_and_val(train, settings))] = False
    return train.at(unused).to(settings.device)


def _whole(settings: Settings) -> tuple[str, list[str], Split, Split]:
    """The name, the classes, all training and all test images of the settings' data."""
    if settings.data == "cifar10":
        return CIFAR10_NAME, *_cifar10(project_path(settings.data_dir))
    if settings.data == "shapes10":
        return "shapes10 (generated images)", *_shapes10(settings)
    folder = project_path(settings.data.removeprefix("folder:").strip())
    classes, parts = read_image_folder(folder, ("train", "test"), IMAGE_SIZE, settings.run_folder / "data", NUM_CLASSES)
    return folder.name, classes, parts["train"], parts["test"]


def _train_and_val(train: Split, settings: Settings) -> list[Tensor]:
    sizes = (settings.train_size, settings.val_size)
    return stratified_split(train.labels, sizes, settings.split_seed, "train_size + val_size")


def rotate_validation(dataset: Dataset, fold: int) -> Dataset:
    """The same labelled images with other validation images, for cross-validation.

    Fold 0 is the data set as it is. In fold k, the k-th `len(val)` training images are the validation images, and the
    former ones train in their place. Raises `UserError` for a fold that the training images do not have.
    """
    if fold == 0:
        return dataset
    size, train, old_val = len(dataset.val.labels), dataset.train, dataset.val
    held_out = slice((fold - 1) * size, fold * size)
    if held_out.stop > len(train.labels):
        raise UserError(
            f"fold: {fold} is too large; {len(train.labels)} training images make folds 0 to "
            f"{len(train.labels) // size} of {size}, use one of them"
        )
    before, after = train.at(slice(held_out.start)), train.at(slice(held_out.stop, None))
    val, train = train.at(held_out), Split(*map(torch.cat, zip(before, old_val, after)))
    checksums = dataset.part_checksums | {"train": _checksum(train), "val": _checksum(val)}
    return dataset._replace(train=train, val=val, part_checksums=checksums, checksum=fingerprint(checksums))


def _checksum(split: Split) -> str:
    return tensor_checksum(split._asdict())[:16]


def stratified_split(labels: Tensor, sizes: Sequence[int], seed: int, name: str = "sizes") -> list[Tensor]:
    """Disjoint index sets of the given sizes, each with the classes in the proportions of `labels`, shuffled.

    Class counts differ from the exact proportion by less than one (largest remainders). The same labels, sizes and
    seed give the same sets. Raises `UserError` when there are fewer labels than asked for.
    """
    if sum(sizes) > len(labels):
        raise UserError(f"{name}: {sum(sizes)} is more than the {len(labels)} images of the data; lower it")
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
    source = ensure_torchvision().datasets.CIFAR10
    try:
        try:
            train, test = (source(str(folder), train=train) for train in (True, False))
        except RuntimeError:  # a file is not there, or its checksum does not match
            _fetch_cifar10(source, folder)
            train, test = (source(str(folder), train=train) for train in (True, False))
    except DOWNLOAD_ERRORS as error:
        raise UserError(
            f"data: CIFAR-10 is not in {shown_path(folder)} and cannot be downloaded ({download_reason(error)}); run "
            "again, put cifar-10-python.tar.gz (https://www.cs.toronto.edu/~kriz/cifar.html) there, or use "
            "data = shapes10 or data = folder:PATH"
        ) from error
    parts = [
        Split(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in (train, test)
    ]
    return list(train.classes), parts[0], parts[1]


def _fetch_cifar10(source: Any, folder: Path) -> None:
    """Download and unpack torchvision's CIFAR-10; an archive that is there and whole is only unpacked.

    A line names each file that is cut off or damaged. Raises one of `DOWNLOAD_ERRORS` when the download fails.
    """
    utils = ensure_torchvision().datasets.utils
    archive = folder / source.filename
    unpacked = [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]
    checksums = {folder / source.base_folder / name: md5 for name, md5 in unpacked} | {archive: source.tgz_md5}
    check_writable(folder, "data_dir")
    with lock(archive):
        wrong = [path for path, md5 in checksums.items() if not utils.check_integrity(str(path), md5)]
        for path in filter(Path.is_file, wrong):
            again = "downloaded" if path == archive else "unpacked"
            print(f"data: {shown_path(path)} is cut off or damaged (its checksum does not match); {again} again")
        if wrong:  # else another process fetched it meanwhile
            with contextlib.redirect_stdout(io.StringIO()), network_timeout():  # older torchvisions print what they do
                utils.download_and_extract_archive(source.url, str(folder), None, source.filename, source.tgz_md5)


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


def read_image_folder(
    folder: Path, names: Sequence[str], size: int, cache: Path, num_classes: int | None = None
) -> tuple[list[str], dict[str, Split]]:
    """The images of `folder/<part>/<class>/*` for the parts `names`, size x size. Decoded once, then kept in `cache`.

    Raises `UserError` for missing folders, classes that differ among the parts or are not `num_classes`, bad images.
    """
    files = {part: _list_images(folder / part) for part in names}
    first = files[names[0]]
    classes = sorted(first)
    if not classes:
        raise UserError(
            f"data: {shown_path(folder / names[0])} holds no class folders; it must hold one folder of images per class"
        )
    for part, by_class in files.items():
        if odd := sorted(set(first) ^ set(by_class)):
            raise UserError(
                f"data: {names[0]} and {part} of {shown_path(folder)} must hold the same class folders; only one of "
                f"them has {', '.join(odd[:10])}"
            )
    if num_classes not in (None, len(classes)):
        raise UserError(
            f"data: {shown_path(folder / names[0])} holds {len(classes)} class folders; it must hold {num_classes}"
        )
    listed = "".join(
        f"{part}/{name}/{os.path.basename(path)} {facts.st_size} {facts.st_mtime_ns}\n"
        for part, by_class in files.items()
        for name in classes
        for path, facts in by_class[name].items()
    )
    digest = hashlib.sha256(listed.encode()).hexdigest()
    key = {"what": "decoded images", "files": digest, "size": size, "transparent": "white"}

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
        raise UserError(f"data: there is no folder {shown_path(folder)}; it must hold one folder of images per class")
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
    for what, paths in (("files are not images by their names: ignored", others), ("links lead out of it", links)):
        if paths:
            print(f"data: {shown_path(folder)}: {len(paths)} {what}, for example {shown_path(paths[0])}")
    return found


def _stat(entry: os.DirEntry) -> os.stat_result:
    name = shown_path(entry.path)
    try:
        facts = entry.stat()
    except OSError as error:
        raise UserError(f"data: {name} cannot be read ({error.strerror}); fix or remove it") from error
    if not stat.S_ISREG(facts.st_mode):  # reading a pipe would wait for ever
        raise UserError(f"data: {name} has the name of an image, but is not a file; fix or remove it")
    return facts


def _decode(by_class: Mapping[str, Iterable[str]], classes: Sequence[str], part: str, size: int) -> Split:
    paths = [(path, label) for label, name in enumerate(classes) for path in by_class[name]]
    images = np.empty((len(paths), 3, size, size), dtype=np.uint8)
    for i, (path, _) in enumerate(tqdm(paths, desc=f"reading {part} images", leave=False, disable=None)):
        images[i] = read_image(Path(path), size).transpose(2, 0, 1)
    return Split(torch.from_numpy(images), torch.tensor([label for _, label in paths]))


def read_image(path: Path, size: int = IMAGE_SIZE) -> np.ndarray:
    """An image file as uint8 [size, size, 3].

    Converts any mode to RGB, transparent pixels to white; takes the first frame of several, and the middle square of
    an image that is not square; resizes. Raises `UserError` that names a file which cannot be read, or has more pixels
    than Pillow's limit (89 million).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                rgb = _as_rgb(ImageOps.exif_transpose(image))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
            reason = "too many pixels"
        elif isinstance(error, UnidentifiedImageError):
            reason = "unknown format"
        raise UserError(f"data: {shown_path(path)} cannot be read as an image ({reason}); fix or remove it") from error
    if rgb.size != (size, size):
        rgb = ImageOps.fit(rgb, (size, size), method=Image.Resampling.LANCZOS)
    return np.asarray(rgb)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels of unknown range; save it with 8 bits per channel")
    if image.mode.startswith("I"):  # 16 bits a pixel: convert() would clip to white
        return Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")

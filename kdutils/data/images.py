"""Ten-class image sets, split with a seed and kept whole on the device as uint8."""

import contextlib
import hashlib
import io
import os
import stat
import warnings
from collections.abc import Mapping, Sequence
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
PARTS = ("train", "val", "test")  # the labelled ones
SHAPES10_SIZES = {"train": 12_000, "test": 10_000, "unlabelled": 20_000}  # images that can be drawn for each part

Files = dict[str, dict[str, os.stat_result]]  # image files, by their folder's name and by their path


class Split(NamedTuple):
    """Images uint8 [N, 3, 32, 32] and labels int64 [N], on one device."""

    images: Tensor
    labels: Tensor

    def to(self, device: str) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))

    def at(self, index: Tensor | slice) -> "Split":
        """Some of the images: by their numbers, a mask or a slice."""
        return Split(self.images[index], self.labels[index])


NOTHING = Split(torch.empty(0, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))


class Dataset(NamedTuple):
    """A ten-class image set, split.

    - name: how the report calls it
    - checksum: of all pixels and labels of `train`, `val` and `test`; `part_checksums` has that of `unlabelled`, too
    - unlabelled: more images, whose labels are all -1; there may be none
    - hidden_labels: int64 [N], the labels of the unlabelled images where they are known. Only a control may look at
      them, which says what they are worth.
    """

    name: str
    classes: list[str]
    train: Split
    val: Split
    test: Split
    checksum: str
    part_checksums: dict[str, str]
    is_generated: bool
    is_cifar10: bool
    unlabelled: Split = NOTHING
    hidden_labels: Tensor | None = None

    @property
    def with_unlabelled(self) -> Split:
        """The training images and, after them, the unlabelled ones."""
        return _joined(self.train, self.unlabelled) if len(self.unlabelled.labels) else self.train

    @property
    def all_labelled(self) -> Split | None:
        """The same images with all labels; None where no unlabelled images are there, or their labels are not known."""
        if self.hidden_labels is None:
            return None
        return _joined(self.train, Split(self.unlabelled.images, self.hidden_labels))

    @property
    def facts(self) -> dict:
        """What the report and the provenance say about the data."""
        sizes = {part: len(getattr(self, part).labels) for part in (*PARTS, "unlabelled")}
        names = ("name", "classes", "checksum", "is_generated", "is_cifar10")
        return {name: getattr(self, name) for name in names} | sizes


class _Source(NamedTuple):
    """All images that there are, before the split.

    - unlabelled: None where these are the training images that the split leaves
    - files: by part, in the order of the images, where they are files
    """

    name: str
    classes: list[str]
    train: Split
    test: Split
    unlabelled: Split | None = None
    files: Mapping[str, Sequence[str]] = {}


def load_data(settings: Settings) -> Dataset:
    """The data set of the settings, split and on the device.

    Raises `UserError` for a missing or unfit folder, an unreadable image, sizes larger than the data, no network, and
    an unlabelled image that is also a test image.
    """
    folder = settings.run_folder
    check_writable(next(path for path in (folder, *folder.parents) if path.exists()), "runs_dir")
    kind = settings.data
    source = _source(settings)
    name = settings.data_name or source.name
    if kind != "cifar10" and name == CIFAR10_NAME:
        raise UserError(
            f"data_name: '{CIFAR10_NAME}' names the original images (data = cifar10); "
            "give another, for example 'CIFAR-10, JPEG re-encoding'"
        )
    (test_indices,) = stratified_split(source.test.labels, (settings.test_size,), settings.split_seed, "test_size")
    sizes = (settings.train_size, settings.val_size)
    train_indices, val_indices = stratified_split(
        source.train.labels, sizes, settings.split_seed, "train_size + val_size"
    )
    test = source.test.at(test_indices)
    more = _unlabelled(source, settings, test)
    is_known = len(more.labels) > 0 and bool((more.labels >= 0).all())
    parts = {"train": source.train.at(train_indices), "val": source.train.at(val_indices), "test": test}
    parts["unlabelled"] = Split(more.images, torch.full_like(more.labels, -1))
    checksums = {part: _checksum(split) for part, split in parts.items()}
    return Dataset(
        name,
        source.classes,
        **{part: split.to(settings.device) for part, split in parts.items()},
        hidden_labels=more.labels.to(settings.device) if is_known else None,
        checksum=_labelled_checksum(checksums),
        part_checksums=checksums,
        is_generated=kind == "shapes10",
        is_cifar10=kind == "cifar10",
    )


def _source(settings: Settings) -> _Source:
    if settings.data == "cifar10":
        return _Source(CIFAR10_NAME, *_cifar10(project_path(settings.data_dir)))
    if settings.data == "shapes10":
        train, test, more = _shapes10(settings)
        return _Source("shapes10 (generated images)", list(shapes.SHAPES10), train, test, more)
    folder, cache = project_path(settings.data.removeprefix("folder:").strip()), settings.run_folder / "data"
    classes, listed = _list_parts(folder, ("train", "test"), NUM_CLASSES)
    parts = _decoded(classes, listed, IMAGE_SIZE, cache)
    source = _Source(folder.name, classes, parts["train"], parts["test"])
    if settings.unlabelled_size == 0 or not (folder / "unlabelled").is_dir():
        return source._replace(files={"train": _paths(listed["train"], classes)})
    files = _list_unlabelled(folder / "unlabelled")
    images = _decoded(list(files), {"unlabelled": files}, IMAGE_SIZE, cache)["unlabelled"].images
    without_labels = Split(images, torch.full((len(images),), -1))
    return source._replace(unlabelled=without_labels, files={"unlabelled": _paths(files, list(files))})


def _unlabelled(source: _Source, settings: Settings, test: Split) -> Split:
    """The unlabelled images, drawn class by class where their labels are known, with these labels."""
    pool, part, of_what, taken = source.unlabelled, "unlabelled", "unlabelled images of the data", list[int]()
    if pool is None:
        pool, part, of_what = source.train, "train", "training images that the split leaves"
        taken = [settings.train_size, settings.val_size]
    there = len(pool.labels) - sum(taken)
    size = there if settings.unlabelled_size is None else settings.unlabelled_size
    if size > there:
        raise UserError(f"unlabelled_size: {size} is more than the {there} {of_what}; lower it")
    if settings.unlabelled_size is None and not there:
        print("data: the split leaves no training images: there are no unlabelled images")
    if not size:
        return NOTHING
    *_, index = stratified_split(pool.labels, (*taken, size), settings.split_seed)
    more = pool.at(index)
    tested = {image.tobytes() for image in test.images.numpy()}
    if both := [i for i, image in zip(index.tolist(), more.images.numpy()) if image.tobytes() in tested]:
        first = shown_path(source.files[part][both[0]]) if part in source.files else f"number {both[0]} of {part}"
        raise UserError(
            f"data: {len(both)} of the {size} unlabelled images are test images, too (equal pixels), for example "
            f"{first}; remove them from one of the two, or use unlabelled_size = 0"
        )
    return more


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
    val, train = train.at(held_out), _joined(before, old_val, after)
    checksums = dataset.part_checksums | {"train": _checksum(train), "val": _checksum(val)}
    return dataset._replace(train=train, val=val, part_checksums=checksums, checksum=_labelled_checksum(checksums))


def _joined(*splits: Split) -> Split:
    return Split(*map(torch.cat, zip(*splits)))


def _checksum(split: Split) -> str:
    return tensor_checksum(split._asdict())[:16]


def _labelled_checksum(checksums: Mapping[str, str]) -> str:
    """Without that of the unlabelled images: what does not use them does not depend on them."""
    return fingerprint({part: checksums[part] for part in PARTS})


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
    parts = []
    for train in (True, False):
        try:
            # torchvision prints "already downloaded"
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


def _shapes10(settings: Settings) -> list[Split]:
    """Images for training, testing, and without labels."""
    asked = {"train": settings.train_size + settings.val_size, "test": settings.test_size}
    asked["unlabelled"] = SHAPES10_SIZES["unlabelled"] if settings.unlabelled_size is None else settings.unlabelled_size
    parts = []
    for seed, (part, count) in enumerate(asked.items()):
        if count > SHAPES10_SIZES[part]:
            size = "train_size or val_size" if part == "train" else f"{part}_size"
            raise UserError(
                f"data: shapes10 has {SHAPES10_SIZES[part]} images for {part}, {count} were asked for; lower {size}"
            )
        parts.append(Split(*shapes.draw(shapes.SHAPES10, count, seed=seed)))
    return parts


def read_image_folder(
    folder: Path, names: Sequence[str], size: int, cache: Path, num_classes: int | None = None
) -> tuple[list[str], dict[str, Split]]:
    """The images of `folder/<part>/<class>/*` for the parts `names`, size x size. Decoded once, then kept in `cache`.

    Raises `UserError` for missing folders, classes that differ among the parts or are not `num_classes`, bad images.
    """
    classes, files = _list_parts(folder, names, num_classes)
    return classes, _decoded(classes, files, size, cache)


def _list_parts(folder: Path, names: Sequence[str], num_classes: int | None) -> tuple[list[str], dict[str, Files]]:
    """The classes, and the files of each part."""
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
    return classes, files


def _decoded(classes: Sequence[str], files: Mapping[str, Files], size: int, cache: Path) -> dict[str, Split]:
    """The images of each part; the label is the number of the folder in `classes`. Decoded once, then kept."""
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
        }, {"classes": list(classes)}

    tensors = cached(cache, "images", key, make).tensors
    return {part: Split(tensors[f"{part}_images"], tensors[f"{part}_labels"]) for part in files}


class _Listing(NamedTuple):
    """What lies in a folder: image files with their sizes and times, other entries, links (itself among them)."""

    images: dict[str, os.stat_result]
    others: list[str]
    links: list[str]


def _list_images(folder: Path) -> Files:
    """The image files of every class folder, by name, with their sizes and times."""
    if not folder.is_dir():
        raise UserError(f"data: there is no folder {shown_path(folder)}; it must hold one folder of images per class")
    found = {sub.name: _list(sub) for sub in _folders_in(folder)}
    for name, listing in found.items():
        if not listing.images:
            raise UserError(
                f"data: the class folder {shown_path(folder / name)} holds no images; add some or remove it"
            )
    return _told(folder, found)


def _list_unlabelled(folder: Path) -> Files:
    """The image files of a folder (by the name '') and of the folders in it, with their sizes and times."""
    own, within = _list(folder), _folders_in(folder)
    own = own._replace(others=[path for path in own.others if not os.path.isdir(path)])
    found = {"": own, **{sub.name: _list(sub) for sub in within}}
    if not any(listing.images for listing in found.values()):
        raise UserError(f"data: the folder {shown_path(folder)} holds no images; add some or remove it")
    return _told(folder, found)


def _folders_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _list(folder: Path) -> _Listing:
    with os.scandir(folder) as entries:
        files = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    images = [entry for entry in files if os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES]
    found = {entry.path: _stat(entry) for entry in images}
    others = [entry.path for entry in files if entry.path not in found and entry.name != "Thumbs.db"]
    links = [str(folder)] if folder.is_symlink() else []
    return _Listing(found, others, [*links, *(entry.path for entry in images if entry.is_symlink())])


def _told(folder: Path, found: Mapping[str, _Listing]) -> Files:
    """The files, after a line on those that are ignored, and one on links out of the folder."""
    others = [path for listing in found.values() for path in listing.others]
    links = [path for listing in found.values() for path in listing.links]
    links = [link for link in links if not Path(link).resolve().is_relative_to(folder.resolve())]
    for what, paths in (("files are not images by their names: ignored", others), ("links lead out of it", links)):
        if paths:
            print(f"data: {shown_path(folder)}: {len(paths)} {what}, for example {shown_path(paths[0])}")
    return {name: listing.images for name, listing in found.items()}


def _stat(entry: os.DirEntry) -> os.stat_result:
    name = shown_path(entry.path)
    try:
        facts = entry.stat()
    except OSError as error:
        raise UserError(f"data: {name} cannot be read ({error.strerror}); fix or remove it") from error
    if not stat.S_ISREG(facts.st_mode):  # reading a pipe would wait for ever
        raise UserError(f"data: {name} has the name of an image, but is not a file; fix or remove it")
    return facts


def _decode(by_class: Files, classes: Sequence[str], part: str, size: int) -> Split:
    paths = _paths(by_class, classes)
    images = np.empty((len(paths), 3, size, size), dtype=np.uint8)
    for i, path in enumerate(tqdm(paths, desc=f"reading {part} images", leave=False, disable=None)):
        images[i] = read_image(Path(path), size).transpose(2, 0, 1)
    labels = [label for label, name in enumerate(classes) for _ in by_class[name]]
    return Split(torch.from_numpy(images), torch.tensor(labels))


def _paths(by_class: Files, classes: Sequence[str]) -> list[str]:
    """The files in the order of the images."""
    return [path for name in classes for path in by_class[name]]


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

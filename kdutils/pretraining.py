"""Pre-training: a whole ResNet trained on images of other classes, for where ImageNet's weights cannot be had."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdutils.cache import (
    Checkpoint,
    History,
    cache_path,
    check_writable,
    fingerprint,
    lower_if_out_of_memory,
    resumable,
    tensor_checksum,
    write_tensors,
)
from kdutils.compat import ensure_torchvision
from kdutils.data.images import Split, read_image_folder
from kdutils.data.views import make_views, view_pixels
from kdutils.losses import cross_entropy
from kdutils.models import cut, normalise, pretraining_facts, read_header, read_state, seeded, with_state
from kdutils.progress import TrainingProgress
from kdutils.settings import ROOT, UserError, shown_path
from kdutils.training import Recipe, fit

IMAGE_SIZE = 40  # images are kept at this size; crops of 40 to 100 % of their area are 25 to 40 pixels wide
CROP_SIZE = 32  # and are resized to that of CIFAR-10's images: a teacher meets the same blur here and there
LABEL_SMOOTHING = 0.1
# Peak learning rates per 128 images of a batch; they grow with it (Goyal et al. 2017, arXiv:1706.02677)
RATE_FROM_RANDOM, RATE_TO_CONTINUE = 0.2, 0.06
NUM_CROPS = 2**61  # 20 bits each for a crop's size and place, one for its flip


class Pretraining(NamedTuple):
    """What is pre-trained, and how: everything the weights depend on but the data."""

    arch: str
    size: int
    recipe: Recipe
    seed: int
    precision: str
    device: str


def default_recipe(epochs: int, batch_size: int, learning_rate: float | None, schedule: str, continues: bool) -> Recipe:
    """SGD with Nesterov momentum; without a learning rate, that of the batch size."""
    rate = (RATE_TO_CONTINUE if continues else RATE_FROM_RANDOM) * batch_size / 128
    return Recipe(epochs, batch_size, "sgd", schedule, learning_rate or rate, weight_decay=1e-4)


def pretrain(
    how: Pretraining, train: Split, val: Split, num_classes: int, *, crops: bool = True,
    init: Mapping[str, Tensor] | None = None, name: str | None = None, checkpoint: Checkpoint | None = None,
) -> tuple[dict[str, Tensor], History]:  # fmt: skip
    """Train a ResNet on random crops of `train`; returns its state dict and the history.

    Every crop goes the way of a teacher's images: reduced to CROP_SIZE, enlarged to `how.size`. Images uint8
    [N, 3, H, W] of any size above CROP_SIZE, on the device. Without crops, which short trainings learn slowly from:
    whole images of CROP_SIZE, and their mirror images. `init`: a state dict to begin with; a last layer of another
    width is dropped, and one of the same width must stand for the same classes. Raises `TrainingError` if the loss is
    no number.
    """
    network = _network(how, num_classes, init)
    labels = train.labels
    if crops:
        pixels, num_views = partial(crop_pixels, train.images, size=CROP_SIZE), NUM_CROPS
    else:
        whole = make_views(train.images, max_shift=0, shift_step=1)
        pixels, num_views = partial(view_pixels, whole), len(whole.table)
    history = fit(
        network, lambda index, view: normalise(pixels(index, view)), labels,
        lambda logits, index, view: cross_entropy(logits, labels[index], label_smoothing=LABEL_SMOOTHING),
        how.recipe, num_views=num_views, seed=how.seed, validation=(_whole(val.images), val.labels),
        precision=how.precision, progress=TrainingProgress(name or f"{how.arch}: pre-training"),
        checkpoint=checkpoint,
    )  # fmt: skip
    return network.state_dict(), history


def crop_pixels(images: Tensor, index: Tensor, crop: Tensor, size: int) -> Tensor:
    """Square crops of 40 to 100 % of an image's area, flipped or not, resized to `size`: float [B, 3, size, size].

    images: uint8 [N, 3, H, W]; index: int64 [B]; crop: int64 [B], 0 to NUM_CROPS - 1, names a crop exactly. Values
    stay within 0..255; bilinear, so meant for images at most about one and a half times as large as the crops.
    """
    fractions = [((crop >> shift) & 0xFFFFF).float() / 0xFFFFF for shift in (1, 21, 41)]
    side = (0.4 + 0.6 * fractions[0]).sqrt()
    right, down = ((1 - side) * (2 * fraction - 1) for fraction in fractions[1:])
    flip = 1.0 - 2.0 * (crop & 1)
    zero = torch.zeros_like(side)
    where = torch.stack([torch.stack([side * flip, zero, right], 1), torch.stack([zero, side, down], 1)], 1)
    grid = F.affine_grid(where, [len(index), images.shape[1], size, size], align_corners=False)
    pixels = F.grid_sample(images[index].float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return pixels.contiguous(memory_format=torch.channels_last)


def _network(how: Pretraining, num_classes: int, init: Mapping[str, Tensor] | None) -> torch.nn.Module:
    if init is None:
        # each residual branch begins as zero (Goyal et al. 2017)
        model = seeded(how.seed, partial(getattr(ensure_torchvision().models, how.arch), zero_init_residual=True))
    else:
        model = with_state(how.arch, dict(init))
    network = cut(model, "all", how.size, num_classes, how.seed)[1]
    given, layer = init or {}, network.get_submodule("fc")
    last = {name: given[f"fc.{name}"].float() for name in ("weight", "bias") if f"fc.{name}" in given}
    if last.keys() == {"weight", "bias"} and last["weight"].shape == layer.weight.shape:
        layer.load_state_dict(last)
    return network


def _whole(images: Tensor) -> Tensor:
    reduce = partial(F.interpolate, size=(CROP_SIZE, CROP_SIZE), mode="bilinear", antialias=True, align_corners=False)
    return torch.cat([normalise(reduce(part.float())) for part in images.split(1000)])


def pretrain_on_folder(
    images: Path, how: Pretraining, out: Path, *, init: Path | None = None, runs: Path = ROOT / "runs", name: str = ""
) -> Path:
    """Pre-train on `images/{train,val}/<class>/*` and write `out/<arch>.safetensors`; returns its path.

    The file holds a torchvision state dict in float16; its header says what it was trained on and how. The same call
    resumes an interrupted training. Raises `UserError` for unfit images, weights, or a file that is in the way.
    """
    path = out / f"{how.arch}.safetensors"
    before, about_init, classes_of_init = _read_init(init)
    folder = runs / "pretrained"
    classes, parts = read_image_folder(images, ("train", "val"), IMAGE_SIZE, folder)
    if how.recipe.batch_size > len(parts["train"].labels):
        raise UserError(
            f"--batch-size: no batch of {how.recipe.batch_size} fits into the {len(parts['train'].labels)} training "
            "images; lower it"
        )
    data = {
        "name": name or images.name, "classes": len(classes), "train": len(parts["train"].labels),
        "val": len(parts["val"].labels),
        "checksum": fingerprint({part: tensor_checksum(split._asdict()) for part, split in parts.items()}),
    }  # fmt: skip
    key = {
        "what": "pre-training", "arch": how.arch, "data": data["checksum"], "size": how.size, "seed": how.seed,
        "recipe": dataclasses.asdict(how.recipe), "precision": how.precision, "init": about_init,
        "crop": CROP_SIZE, "label_smoothing": LABEL_SMOOTHING,
    }  # fmt: skip
    _refuse_to_replace(path, cache_path(folder, how.arch, key))
    check_writable(out, "--out")
    if before is not None and classes_of_init != data["checksum"]:
        # its outputs may stand for other classes, or the same in another order
        before = {name: tensor for name, tensor in before.items() if not name.startswith("fc.")}

    def make(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict]:
        with lower_if_out_of_memory(f"{how.arch}: pre-training", "--batch-size or --size"):
            on_device = {part: split.to(how.device) for part, split in parts.items()}
            state, history = pretrain(
                how, on_device["train"], on_device["val"], len(classes), init=before, checkpoint=checkpoint
            )
        return state, {"history": history}

    made = resumable(folder, how.arch, key, make)
    facts = {
        "data": data, "size": how.size, "crop": CROP_SIZE, "recipe": key["recipe"], "label_smoothing": LABEL_SMOOTHING,
        "seed": how.seed, "precision": how.precision, "init": about_init, "epochs": how.recipe.epochs,
        "val_accuracy": made.facts["history"]["val_accuracy"][-1], "history": made.facts["history"],
        "fingerprint": made.fingerprint,
    }  # fmt: skip
    how_long = f"{how.recipe.epochs} epoch{'s' * (how.recipe.epochs > 1)}, {how.size} px from {CROP_SIZE} px crops"
    description = f"{data['name']} ({data['classes']} classes, {data['train']:,} images), {how_long}"
    if about_init is not None:
        description = f"{about_init['description']}; then {description}"
    header = {
        "arch": how.arch, "num_classes": str(len(classes)), "standin": "true", "description": description,
        "pretraining": json.dumps(facts, sort_keys=True),
    }  # fmt: skip
    return write_tensors(path, {name: _half(tensor) for name, tensor in made.tensors.items()}, header)


def _half(tensor: Tensor) -> Tensor:
    """In float16 where that holds all values, for half the file."""
    half = tensor.half() if tensor.is_floating_point() else tensor
    return half if half.isfinite().all() else tensor


def _read_init(path: Path | None) -> tuple[dict[str, Tensor] | None, dict[str, str] | None, str | None]:
    """State dict, what is told of it, and the checksum of the data it was trained on, where known."""
    if path is None:
        return None, None, None
    if not path.is_file():
        raise UserError(f"--init: there is no file {shown_path(path)}; give a ResNet's .safetensors or .pth")
    state, header = read_state(path)
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    facts = {"checksum": checksum, "description": header.get("description") or path.name}
    data = pretraining_facts(header).get("data")
    return state, facts, data.get("checksum") if isinstance(data, dict) else None


def _refuse_to_replace(path: Path, cached_file: Path) -> None:
    """Hours of somebody's training are not written over; this training's own result may be."""
    if not path.exists():
        return
    own = pretraining_facts(read_header(path)).get("fingerprint")
    if own is None or own != cached_file.stem.rsplit("-", 1)[-1]:
        raise UserError(f"--out: {shown_path(path)} is there already; give another folder, or move it away")

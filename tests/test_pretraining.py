"""kdutils.pretraining: a ResNet made from a folder of images, once; its file says how, and nothing is written over."""

import dataclasses
import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import message_of
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import kdutils.__main__ as command_line
from kdutils import pretraining
from kdutils.cache import Checkpoint
from kdutils.pretraining import NUM_CROPS, Pretraining, crop_pixels, default_recipe, pretrain_on_folder
from kdutils.training import draw

HOW = Pretraining("resnet18", 32, default_recipe(2, 8, None, "one_cycle", False), 0, "float32", "cpu")
STILL = dataclasses.replace(HOW.recipe, epochs=1, learning_rate=1e-30)  # weights stay as they are


def draw_pictures(folder, classes, train=6, val=2):
    """Images of 40 or 44 pixels, each class with a colour of its own."""
    generator = np.random.default_rng(len(classes))
    for part, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(60 * label, 60 * label + 90, (40 + 4 * (i % 2),) * 2 + (3,), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return draw_pictures(tmp_path_factory.mktemp("images") / "my pictures", ["ant", "bee", "cow"])


@pytest.fixture(scope="module")
def made(pictures, tmp_path_factory):
    """The file of one pre-training, and the folder of its runs."""
    folder = tmp_path_factory.mktemp("made")
    return pretrain_on_folder(pictures, HOW, folder / "weights", runs=folder / "runs"), folder / "runs"


def read(path):
    with safe_open(path, framework="pt") as file:
        return load_file(path), file.metadata()


def test_the_file_says_what_it_is_and_how_it_was_made(made, pictures):
    path, runs = made
    state, header = read(path)
    assert [other.name for other in path.parent.iterdir()] == ["resnet18.safetensors"]
    assert state["fc.weight"].shape == (3, 512) and state["bn1.num_batches_tracked"] == 4  # 18 images, batches of 8
    assert {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {torch.float16}
    assert (header["arch"], header["num_classes"], header["standin"]) == ("resnet18", "3", "true")
    assert header["description"] == "my pictures (3 classes, 18 images), 2 epochs, 32 px from 32 px crops"
    facts = json.loads(header["pretraining"])
    assert facts["recipe"] == dataclasses.asdict(HOW.recipe)
    assert facts["val_accuracy"] == facts["history"]["val_accuracy"][-1] and facts["data"]["train"] == 18
    assert str(pictures.parent) not in json.dumps(header) and not list(runs.rglob("*.checkpoint"))


@pytest.fixture
def command(pictures, tmp_path, monkeypatch):
    """Runs `pretrain` on the pictures with the options above, changed as asked (None leaves one out)."""
    runs = tmp_path / "runs"
    monkeypatch.setattr(pretraining, "pretrain_on_folder", partial(pretrain_on_folder, runs=runs))

    def arguments(folder=pictures, **changes):
        options = {
            "arch": "resnet18", "epochs": 2, "batch_size": 8, "size": 32, "device": "cpu", "precision": "float32",
            "out": tmp_path / "out", **changes,
        }  # fmt: skip
        given = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items() if value is not None]
        return ["pretrain", str(folder), *sum(given, ())]

    return arguments


def test_an_interrupted_training_resumes_to_the_same_weights(made, command, tmp_path, monkeypatch):
    """Two steps an epoch: cut in the fourth, after a checkpoint of the third. Equal in every bit."""
    real, steps = pretraining.cross_entropy, []

    def counted(*arguments, **named):
        steps.append(None)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(Checkpoint, "is_due", lambda self, end_of_epoch: True)
    monkeypatch.setattr(pretraining, "cross_entropy", counted)
    assert command_line.main(command()) == 130 and not list((tmp_path / "out").iterdir())
    assert command_line.main(command()) == 0 and len(steps) == 5  # 4, one of them begun twice
    (state, header), (expected, first) = read(tmp_path / "out" / "resnet18.safetensors"), read(made[0])
    assert header == first and state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert not list((tmp_path / "runs").rglob("*.checkpoint"))


def never(*_, **__):
    raise AssertionError("was not to be called")


def test_the_same_again_trains_nothing_and_writes_the_same_file(made, pictures, monkeypatch):
    """To the byte: the teachers fine-tuned from a file are made again when its checksum changes."""
    path, runs = made
    content = path.read_bytes()
    monkeypatch.setattr(pretraining, "fit", never)
    assert pretrain_on_folder(pictures, HOW, path.parent, runs=runs).read_bytes() == content


@pytest.mark.parametrize("change", [
    {"seed": 1}, {"size": 40}, {"precision": "bfloat16"}, {"recipe": STILL}, "pixels", "labels",
], ids=str)  # fmt: skip
def test_what_the_weights_depend_on_trains_anew(tmp_path, monkeypatch, change):
    trained, folder = [], draw_pictures(tmp_path / "pictures", ["ant", "bee", "cow"])

    def pretrain(how, train, val, num_classes, *, init=None, checkpoint=None):
        trained.append(how)
        return {"fc.bias": torch.zeros(num_classes)}, {"val_accuracy": [0.5]}

    monkeypatch.setattr(pretraining, "pretrain", pretrain)
    first = pretrain_on_folder(folder, HOW, tmp_path / "one", runs=tmp_path / "runs")
    if change == "pixels":
        Image.new("RGB", (40, 40)).save(folder / "val" / "bee" / "1.png")
    elif change == "labels":  # the same images in the same order
        (folder / "train" / "bee" / "0.png").rename(folder / "train" / "ant" / "9.png")
    how = HOW if isinstance(change, str) else HOW._replace(**change)
    other = pretrain_on_folder(folder, how, tmp_path / "other", runs=tmp_path / "runs")
    assert trained == [HOW, how] and read(first)[1] != read(other)[1]


def write_weights(path, made, **header):
    save_file({"conv1.weight": torch.zeros(1)}, path, metadata=header or None)


@pytest.mark.parametrize("there", [
    write_weights, partial(write_weights, description="ImageNet", standin="false"),
    lambda path, made: path.write_bytes(made[0].read_bytes()), lambda path, made: path.write_bytes(b"x"),
], ids=["plain", "described", "other settings", "no weights"])  # fmt: skip
def test_a_file_of_another_making_is_not_replaced(made, command, error_of, tmp_path, monkeypatch, there):
    monkeypatch.setattr(pretraining, "pretrain", never)
    path = tmp_path / "out" / "resnet18.safetensors"
    path.parent.mkdir()
    there(path, made)
    content = path.read_bytes()
    message = error_of(command(epochs=3))
    assert str(path) in message and path.read_bytes() == content
    assert "--out: " in message or "cannot be read" in message
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_init_begins_with_those_weights_and_their_last_layer(made, pictures, tmp_path):
    how = HOW._replace(recipe=STILL, seed=9)
    path = pretrain_on_folder(pictures, how, tmp_path / "out", init=made[0], runs=tmp_path / "runs", name="more")
    (state, header), (before, first) = read(path), read(made[0])
    for name, tensor in before.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(state[name].float(), tensor.float(), rtol=1e-3, atol=1e-7)
    added = "more (3 classes, 18 images), 1 epoch, 32 px from 32 px crops"
    assert header["description"] == f"{first['description']}; then {added}"
    init = json.loads(header["pretraining"])["init"]
    assert init["description"] == first["description"] and len(init["checksum"]) == 16


BAD = {
    "no folder": (lambda folder: None, {"folder": "no/such/place"}, ["data: ", "no/such/place/train"]),
    "no val": (lambda folder: (folder / "val").rename(folder / "test"), {}, ["data: ", "pictures/val"]),
    "classes": (lambda folder: (folder / "val" / "bee").rename(folder / "val" / "wasp"), {}, ["data: ", "bee, wasp"]),
    "empty": (lambda folder: (folder / "val" / "yak").mkdir(), {}, ["data: ", "val/yak", "no images"]),
    "image": (lambda folder: (folder / "val" / "bee" / "0.png").write_bytes(b"x"), {}, ["data: ", "val/bee/0.png"]),
    "batch": (lambda folder: None, {"batch_size": 19}, ["--batch-size: ", "19", "18", "lower it"]),
}  # fmt: skip


@pytest.mark.parametrize("change, options, fragments", BAD.values(), ids=BAD)
def test_unfit_images_are_one_line(command, error_of, tmp_path, monkeypatch, change, options, fragments):
    monkeypatch.setattr(pretraining, "pretrain", never)
    folder = draw_pictures(tmp_path / "pictures", ["ant", "bee", "cow"])
    change(folder)
    message = error_of(command(**{"folder": folder, **options}))
    assert all(fragment in message for fragment in fragments), message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options, fragments", [
    *(({"epochs": value}, ["epochs: ", repr(str(value)), "1 or more"]) for value in (0, -2, 1.5, "many", "")),
    ({"batch_size": 1}, ["'1'", "a whole number, 2 or more"]), ({"size": 31}, ["size: '31'", "from 32 to 512"]),
    ({"learning_rate": 0}, ["'0'", "above 0"]), ({"learning_rate": "fast"}, ["'fast'", "above 0"]),
    ({"schedule": "step"}, ["'step'", "'one_cycle'"]), ({"seed": -1}, ["seed: '-1'", "from 0"]),
    ({"device": "abacus"}, ["device: 'abacus'", "'cpu'"]), ({"precision": "float8"}, ["'float8'", "'bfloat16'"]),
    ({"threads": 0}, ["threads: '0'", "1 or more"]), ({"init": "no/such.pth"}, ["--init: ", "no/such.pth"]),
    ({"init": "kdutils"}, ["--init: ", "kdutils"]), ({"init": "Makefile"}, ["Makefile", "more than tensors"]),
])  # fmt: skip
def test_unfit_options_are_one_line(command, error_of, tmp_path, monkeypatch, options, fragments):
    monkeypatch.setattr(pretraining, "pretrain", never)
    message = error_of(command(**options))
    assert all(fragment in message for fragment in fragments), message
    assert not (tmp_path / "out").exists() and not (tmp_path / "runs").exists()


def test_weights_of_another_network_are_no_start(made, command, error_of, tmp_path):
    message = error_of(command(arch="resnet50", init=made[0]))
    assert "resnet50" in message and not list((tmp_path / "out").iterdir())


def test_there_is_nothing_to_train_on_without_classes(tmp_path):
    for part in ("train", "val"):
        (tmp_path / "bare" / part).mkdir(parents=True)
    message = message_of(pretrain_on_folder, tmp_path / "bare", HOW, tmp_path / "out", runs=tmp_path / "runs")
    assert message.startswith("data: ") and str(tmp_path / "bare") in message


@pytest.mark.parametrize("size", [0, 0.25, 1])
@pytest.mark.parametrize("right, down", [(0, 0), (1, 1), (0.2, 0.9), (1, 0)])
def test_a_crop_is_a_square_of_its_area_at_its_place_within_the_image(size, right, down):
    """The image's red rises by 6 a column, its green by 6 a row."""
    ramp = (6 * torch.arange(40)).to(torch.uint8)
    image = torch.stack([channel.expand(40, 40) for channel in (ramp, ramp[:, None], torch.zeros_like(ramp))])[None]
    fractions = (round(fraction * (2**20 - 1)) for fraction in (size, right, down))  # of what is possible
    crop = torch.tensor([sum(fraction << at for fraction, at in zip(fractions, (1, 21, 41)))])
    pixels = crop_pixels(image, torch.tensor([0]), crop, 32)[0].numpy()
    side = 40 * np.sqrt(0.4 + 0.6 * size)
    for channel, axis, place in ((0, 0, right), (1, 1, down)):
        expected = (40 - side) * place + side * (np.arange(32) + 0.5) / 32 - 0.5  # columns or rows of the image
        np.testing.assert_allclose(pixels[channel].mean(axis=axis), 6 * expected.clip(0, 39), atol=0.05)
        assert np.ptp(pixels[channel], axis=axis).max() < 0.05


def test_any_crop_depends_on_its_own_pair_alone_and_its_flip_is_its_mirror_image():
    images = torch.randint(0, 256, (20, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    index, crop = draw(0, 0, 20, NUM_CROPS)
    crop[0] = NUM_CROPS - 1
    together = crop_pixels(images, index, crop, 32)
    alone = torch.cat([crop_pixels(images, index[[i]], crop[[i]], 32) for i in range(20)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-3)
    torch.testing.assert_close(crop_pixels(images, index, crop ^ 1, 32), together.flip(-1), rtol=0, atol=0.05)
    assert together.min() >= 0 and together.max() <= 255.001

"""kdutils.pretraining: a ResNet made from a folder of images, once; its file says how, and nothing is written over."""

import dataclasses
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import message_of
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchvision import models as zoo

import kdutils.__main__ as command_line
from kdutils import pretraining, training
from kdutils.data.images import Split, read_image
from kdutils.models import backbone_source, load_backbone, normalise
from kdutils.pretraining import Pretraining, default_recipe, pretrain_on_folder
from kdutils.training import predict

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
    assert path.name == "resnet18.safetensors" and [other.name for other in path.parent.iterdir()] == [path.name]
    assert state.keys() == zoo.resnet18(num_classes=3).state_dict().keys() and state["fc.weight"].shape == (3, 512)
    assert {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {torch.float16}
    assert state["bn1.num_batches_tracked"] == 4  # 18 images are two batches of 8, twice
    assert (header["arch"], header["num_classes"], header["standin"]) == ("resnet18", "3", "true")
    assert header["description"] == "my pictures (3 classes, 18 images), 2 epochs, 32 px from 32 px crops"
    facts = json.loads(header["pretraining"])
    assert {name: facts["data"][name] for name in ("name", "classes", "train", "val")} == {
        "name": "my pictures", "classes": 3, "train": 18, "val": 6}  # fmt: skip
    assert len(facts["data"]["checksum"]) == 16
    assert facts["recipe"] == dataclasses.asdict(HOW.recipe)
    assert (facts["epochs"], facts["size"], facts["seed"]) == (2, 32, 0)
    assert facts["precision"] == "float32" and facts["init"] is None
    assert all(len(values) == 2 for values in facts["history"].values()) and len(facts["history"]) == 4
    assert facts["val_accuracy"] == facts["history"]["val_accuracy"][-1]
    assert str(pictures.parent) not in json.dumps(header)
    assert not list(runs.rglob("*.checkpoint"))


def test_it_was_validated_on_whole_images_at_the_size_of_the_crops(made, pictures):
    (exact,) = (made[1] / "pretrained").glob("resnet18-*.safetensors")  # before they were rounded to float16
    images = [read_image(pictures / "val" / name / f"{i}.png", 40) for name in ("ant", "bee", "cow") for i in range(2)]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    pixels = F.interpolate(pixels, (32, 32), mode="bilinear", antialias=True, align_corners=False)
    network = zoo.resnet18(num_classes=3)
    network.load_state_dict(load_file(exact))
    logits, labels = predict(network, normalise(pixels)), torch.arange(3).repeat_interleave(2)
    history = json.loads(read(made[0])[1]["pretraining"])["history"]
    assert F.cross_entropy(logits, labels).item() == pytest.approx(history["val_loss"][-1], rel=1e-5)
    assert (logits.argmax(1) == labels).float().mean().item() == pytest.approx(history["val_accuracy"][-1])


def test_it_serves_as_a_teachers_weights(made):
    path = made[0]
    state, header = read(path)
    source = backbone_source("resnet18", str(path.parent))
    assert source.is_standin and source.description == header["description"]
    assert source.pretraining == json.loads(header["pretraining"])
    body = load_backbone("resnet18", str(path.parent)).state_dict()
    names = [name for name in state if not name.startswith("fc.")]
    assert all(torch.equal(body[name], state[name].to(body[name].dtype)) for name in names)


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


def test_a_training_that_was_cut_goes_on_to_the_same_weights(made, command, tmp_path, monkeypatch, capsys):
    """Two steps an epoch: saved after the third, cut in the fourth."""
    clock, real, steps = [0.0], pretraining.cross_entropy, []
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def counted(*arguments, **named):
        steps.append(None)
        clock[0] = 100.0 * (len(steps) == 3)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(pretraining, "cross_entropy", counted)
    assert command_line.main(command()) == 130
    assert "repeat the command to resume" in capsys.readouterr().err and not list((tmp_path / "out").iterdir())
    assert command_line.main(command()) == 0
    assert len(steps) == 5  # 4, one of them begun twice
    (state, header), (expected, first) = read(tmp_path / "out" / "resnet18.safetensors"), read(made[0])
    assert header == first and state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert not list((tmp_path / "runs").rglob("*.checkpoint"))
    out = capsys.readouterr().out
    assert str(tmp_path / "out") in out and "my pictures (3 classes, 18 images)" in out and "validation" in out


def never(*_, **__):
    raise AssertionError("was not to be called")


def test_the_same_again_trains_nothing_and_writes_the_same_file(made, pictures, monkeypatch):
    """To the byte: the teachers fine-tuned from a file are made again when its checksum changes."""
    path, runs = made
    content, found = path.read_bytes(), read(path)
    monkeypatch.setattr(pretraining, "fit", never)
    again = pretrain_on_folder(pictures, HOW, path.parent, runs=runs)
    assert read(again)[1] == found[1]
    assert all(torch.equal(tensor, found[0][name]) for name, tensor in read(again)[0].items())
    assert again.read_bytes() == content


@pytest.fixture
def count_trainings(monkeypatch):
    """Stands in for the training itself; returns the list of what was trained."""
    trained = []

    def pretrain(how, train, val, num_classes, *, init=None, checkpoint=None):
        trained.append((how, num_classes))
        names = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
        history = {name: [0.5] * how.recipe.epochs for name in names}
        return {"fc.weight": torch.zeros(num_classes, 512), "fc.bias": torch.zeros(num_classes)}, history

    monkeypatch.setattr(pretraining, "pretrain", pretrain)
    return trained


@pytest.mark.parametrize("change", [
    {"seed": 1}, {"size": 40}, {"precision": "bfloat16"}, {"arch": "resnet50"},
    *({"recipe": dataclasses.replace(HOW.recipe, **{name: value})} for name, value in (
        ("epochs", 3), ("batch_size", 9), ("learning_rate", 0.1), ("schedule", "cosine"))),
], ids=str)  # fmt: skip
def test_what_the_weights_depend_on_trains_anew(count_trainings, pictures, tmp_path, change):
    for number, how in enumerate((HOW, HOW._replace(**change), HOW)):
        pretrain_on_folder(pictures, how, tmp_path / f"out{number}", runs=tmp_path / "runs")
    assert count_trainings == [(HOW, 3), (HOW._replace(**change), 3)]


def test_a_name_is_only_a_name(count_trainings, pictures, tmp_path):
    for name in ("", "holiday"):
        path = pretrain_on_folder(pictures, HOW, tmp_path / "out", runs=tmp_path / "runs", name=name)
    assert len(count_trainings) == 1 and read(path)[1]["description"].startswith("holiday (3 classes, 18 images), ")


def test_one_epoch_is_told_as_one(count_trainings, pictures, tmp_path):
    path = pretrain_on_folder(pictures, HOW._replace(recipe=STILL), tmp_path / "out", runs=tmp_path / "runs")
    assert ", 1 epoch, 32 px" in read(path)[1]["description"]


@pytest.mark.parametrize("change", ["pixels", "labels", "classes"])
def test_other_images_and_other_labels_train_anew(count_trainings, tmp_path, change):
    folder = draw_pictures(tmp_path / "pictures", ["ant", "bee", "cow"])
    pretrain_on_folder(folder, HOW, tmp_path / "one", runs=tmp_path / "runs")
    if change == "pixels":
        Image.new("RGB", (40, 40)).save(folder / "val" / "bee" / "1.png")
    elif change == "labels":  # the same images in the same order
        (folder / "train" / "bee" / "0.png").rename(folder / "train" / "ant" / "9.png")
    else:
        for part in ("train", "val"):
            for path in list((folder / part / "bee").iterdir()):
                path.rename(folder / part / "ant" / f"bee{path.name}")
            (folder / part / "bee").rmdir()
    header = read(pretrain_on_folder(folder, HOW, tmp_path / "other", runs=tmp_path / "runs"))[1]
    assert [classes for _, classes in count_trainings] == [3, 2 if change == "classes" else 3]
    first = json.loads(read(tmp_path / "one" / "resnet18.safetensors")[1]["pretraining"])["data"]["checksum"]
    assert json.loads(header["pretraining"])["data"]["checksum"] != first


def somebodys(path, made):
    save_file({"conv1.weight": torch.zeros(1)}, path)


def with_a_header(path, made):
    save_file({"conv1.weight": torch.zeros(1)}, path, metadata={"description": "ImageNet", "standin": "false"})


def of_other_settings(path, made):
    path.write_bytes(made[0].read_bytes())


@pytest.mark.parametrize("there", [
    somebodys, with_a_header, of_other_settings, lambda path, made: path.write_bytes(b"x"),
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


def test_init_leaves_out_a_last_layer_of_another_width(made, tmp_path):
    folder = draw_pictures(tmp_path / "two", ["dog", "elk"], train=4, val=1)
    torch.save(load_file(made[0]), tmp_path / "mine.pth")
    how = HOW._replace(recipe=STILL)
    path = pretrain_on_folder(folder, how, tmp_path / "out", init=tmp_path / "mine.pth", runs=tmp_path / "runs")
    (state, header), before = read(path), load_file(made[0])
    torch.testing.assert_close(state["layer4.1.conv2.weight"].float(), before["layer4.1.conv2.weight"].float())
    assert state["fc.weight"].shape == (2, 512) and header["num_classes"] == "2"
    assert header["description"] == "mine.pth; then two (2 classes, 8 images), 1 epoch, 32 px from 32 px crops"


def test_init_leaves_out_a_last_layer_that_was_trained_on_other_data(made, pictures, tmp_path):
    """Its outputs may stand for the same classes in another order."""
    header = read(made[0])[1]
    facts = json.loads(header["pretraining"])
    for number, data in enumerate(({**facts["data"], "checksum": "of others"}, "no facts", None)):
        there = {**header, "pretraining": json.dumps({**facts, "data": data})}
        save_file(load_file(made[0]), tmp_path / f"{number}.safetensors", metadata=there)
        how = HOW._replace(recipe=STILL, seed=9)
        path = pretrain_on_folder(pictures, how, tmp_path / f"out{number}", init=tmp_path / f"{number}.safetensors",
                                  runs=tmp_path / "runs")  # fmt: skip
        state, before = load_file(path), load_file(made[0])
        torch.testing.assert_close(state["layer4.1.conv2.weight"].float(), before["layer4.1.conv2.weight"].float())
        assert (state["fc.weight"].float() - before["fc.weight"].float()).abs().max() > 1e-3


def test_other_first_weights_train_anew(count_trainings, made, pictures, tmp_path):
    other = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in load_file(made[0]).items()}
    save_file(other, tmp_path / "other.safetensors", metadata=read(made[0])[1])
    for number, init in enumerate((None, made[0], tmp_path / "other.safetensors", made[0])):
        pretrain_on_folder(pictures, HOW, tmp_path / f"out{number}", init=init, runs=tmp_path / "runs")
    assert len(count_trainings) == 3


def test_the_recipe_that_is_taken_without_a_rate():
    def rate(batch_size, continues, given=None):
        return default_recipe(5, batch_size, given, "cosine", continues).learning_rate

    assert rate(256, False) == 2 * rate(128, False) and rate(64, True) == rate(128, True) / 2
    assert 0 < rate(128, True) < rate(128, False) and rate(128, True, 0.7) == rate(64, False, 0.7) == 0.7


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
    ({"init": "kdutils"}, ["--init: ", "kdutils"]), ({"init": "Makefile"}, ["Makefile", "plain state dict"]),
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


def test_without_crops_it_learns_from_whole_images_and_their_mirror_images(monkeypatch):
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    split, seen = Split(images, torch.arange(6) % 3), []

    def look(network, inputs, labels, *arguments, num_views, **options):
        index = torch.arange(6).repeat(num_views)
        seen.append(inputs(index, torch.arange(num_views).repeat_interleave(6)))
        return {}

    monkeypatch.setattr(pretraining, "fit", look)
    pretraining.pretrain(HOW, split, split, 3, crops=False)
    assert torch.equal(seen[0], normalise(torch.cat([images, images.flip(3)])))

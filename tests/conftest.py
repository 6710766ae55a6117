"""What several test files share: a tiny profile whose runs lie in the test's own folder, a tiny data set, messages."""

import dataclasses
from functools import cache

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from kdutils.compat import ensure_torchvision
from kdutils.data.images import Dataset, Split
from kdutils.data.views import view_table
from kdutils.settings import TeacherSettings, UserError, load_settings
from kdutils.teachers import Teacher, TeacherRun
from kdutils.weights import build, seeded

ensure_torchvision()  # for the tests that import torchvision themselves

TINY = {
    "data": "shapes10", "train_size": 40, "val_size": 10, "test_size": 10, "split_seed": 0, "unlabelled_size": 0,
    "max_shift": 1, "shift_step": 1,
    "seeds": [0, 1], "epochs": 2, "batch_size": 10, "optimizer": "adamw", "schedule": "one_cycle",
    "learning_rate": 0.003, "weight_decay": 0.01, "label_smoothing": 0.1,
    "unlabelled_epochs": 2, "unlabelled_views": 2,
    "temperature": 4.0, "alpha": 0.9, "kd_label_smoothing": 0.0,
    "teachers": [
        {"name": "resnet50", "learning_rate": 0.003, "weight_decay": 0.01},
        {"name": "resnet18", "trainable": "last_block"},
    ],
    "weights": "none", "teacher_size": 32, "teacher_seeds": [0], "teacher_views": 2, "teacher_epochs": 1,
    "teacher_batch_size": 20, "teacher_optimizer": "adamw", "teacher_schedule": "one_cycle",
    "teacher_learning_rate": 0.0005, "teacher_weight_decay": 0.05, "teacher_label_smoothing": 0.0,
    "device": "cpu", "precision": "float32",
}  # fmt: skip


def message_of(call, *arguments, **named):
    """The message of the `UserError` that this call must end in: one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **named)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def error_of(capsys):
    """Runs a command that must fail; returns its one line."""
    from kdutils.__main__ import main  # takes seconds, and most tests have no need of it

    def run(arguments):
        assert main(arguments) == 1
        out, err = capsys.readouterr()
        assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err + out
        return err

    return run


@pytest.fixture
def tiny_profile(tmp_path):
    """Writes a complete profile, changed as asked (None leaves a setting out); returns its path as text."""

    def write(name="tiny", **changes):
        values = {**TINY, "runs_dir": str(tmp_path / "runs"), **changes}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return str(path)

    return write


@pytest.fixture
def tiny(tiny_profile):
    """The settings of the tiny profile with the given overrides."""
    path = tiny_profile()
    return lambda **overrides: load_settings(path, **overrides)


@pytest.fixture
def toy_data():
    """A data set of random images; every class has its own mean colour, so there is something to learn."""
    generator = torch.Generator().manual_seed(7)
    colours = torch.randint(40, 215, (10, 3, 1, 1), generator=generator)

    def split(count):
        labels = torch.arange(count) % 10
        noise = torch.randint(-40, 41, (count, 3, 32, 32), generator=generator)
        return Split((colours[labels] + noise).to(torch.uint8), labels)

    return Dataset(
        "toy", [f"class{i}" for i in range(10)], split(40), split(10), split(10), checksum="toy",
        part_checksums={"train": "a", "val": "b", "test": "c"}, is_generated=False, is_cifar10=False,
    )  # fmt: skip


A_TEACHER = TeacherSettings(
    name="resnet18", label="resnet18", weights="none", trainable="last_layer", size=32, resize="bilinear", views=2,
    epochs=1, batch_size=20, optimizer="adamw", schedule="one_cycle", learning_rate=0.0005, weight_decay=0.05,
    label_smoothing=0.0, last_layer_factor=1.0, standardize=False, folds=1,
)  # fmt: skip


def fake_teacher(data, label="resnet50", seeds=(0,)):
    """A teacher with random opinions of the training images, other ones in every view and run."""

    def logits(images, view=0):
        generator = torch.Generator().manual_seed(view + 100 * len(label))
        return 3 * torch.randn(len(seeds), len(images), 10, generator=generator).half()

    runs = [TeacherRun(label, "last_layer", seed, {}, {}, 0.0, f"{label} {seed}") for seed in seeds]
    settings = dataclasses.replace(A_TEACHER, label=label)
    return Teacher(settings, "last_layer", runs, logits, view_table(1, 1), "a fake", True, "x", 1, 1, 1, 0.0)


def stirred(network):
    """The network with norms that are not the identity, as fresh ones are: those would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.0, generator=generator)
            nn.init.normal_(module.bias, 0.0, 0.2, generator=generator)
    return network.eval()


@cache
def random_network(name="resnet18"):
    """A network of random weights, the same in all tests: copy it before you change it."""
    of_torchvision = getattr(ensure_torchvision().models, name, None)
    return stirred(seeded(1, of_torchvision) if of_torchvision else build(name))


@pytest.fixture(scope="session")
def weights_folder(tmp_path_factory):
    """Random weights of two networks as files, of two libraries and families."""
    folder = tmp_path_factory.mktemp("weights")
    for name in ("resnet18", "mobilenetv3_small_100"):
        header = {"description": "random", "standin": "true"}
        save_file(random_network(name).state_dict(), folder / f"{name}.safetensors", metadata=header)
    return str(folder)

"""What several test files share: a tiny profile whose runs lie in the test's own folder, a tiny data set, messages."""

import pytest
import torch
import yaml
from torch import nn

from kdutils.compat import ensure_torchvision
from kdutils.data.images import Dataset, Split
from kdutils.data.views import view_table
from kdutils.models import seeded
from kdutils.settings import UserError, load_settings
from kdutils.teachers import Teacher, TeacherRun

ensure_torchvision()  # for the tests that import torchvision themselves

TINY = {
    "data": "shapes10", "train_size": 40, "val_size": 10, "test_size": 10, "split_seed": 0, "unlabelled_size": 0,
    "max_shift": 1, "shift_step": 1,
    "seeds": [0, 1], "epochs": 2, "batch_size": 10, "optimizer": "adamw", "schedule": "one_cycle",
    "learning_rate": 0.003, "weight_decay": 0.01, "label_smoothing": 0.1,
    "unlabelled_epochs": 2, "unlabelled_views": 2,
    "temperature": 4.0, "alpha": 0.9, "kd_label_smoothing": 0.0,
    "weights": "none", "teacher_size": 32, "teacher_seeds": [0], "teacher_views": 2, "teacher_batch_size": 20,
    "teacher_optimizer": "adamw", "teacher_schedule": "one_cycle", "teacher_label_smoothing": 0.0,
    "resnet50_trainable": "last_layer", "resnet50_epochs": 1, "resnet50_learning_rate": 0.003,
    "resnet50_weight_decay": 0.01,
    "resnet18_trainable": "last_block", "resnet18_epochs": 1, "resnet18_learning_rate": 0.0005,
    "resnet18_weight_decay": 0.05,
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


def fake_teacher(data, arch="resnet50", seeds=(0,)):
    """A teacher with random opinions of the training images, other ones in every view and run."""

    def logits(images, view=0):
        generator = torch.Generator().manual_seed(view + 100 * len(arch))
        return 3 * torch.randn(len(seeds), len(images), 10, generator=generator).half()

    runs = [TeacherRun(arch, "last_layer", seed, {}, {}, 0.0, f"{arch} {seed}") for seed in seeds]
    return Teacher(arch, "last_layer", runs, logits, view_table(1, 1), "a fake", True, "x", 1, 1, 1, 0.0)


def random_resnet(arch="resnet18"):
    """With norms that are not the identity, as fresh ones are: those would hide mistakes in folding them."""
    model = seeded(1, getattr(ensure_torchvision().models, arch))
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.0, generator=generator)
            nn.init.normal_(module.bias, 0.0, 0.2, generator=generator)
    return model.eval()

"""A tiny run of the four tasks, with its numbers: whatever is rebuilt, they stay. To 1e-3, as processors differ."""

from functools import partial

import pytest
from conftest import random_network
from safetensors.torch import save_file

from kdutils import combine_teachers, cross_entropy, distillation_loss, fine_tune, load_data, train_students
from kdutils.results import metrics
from kdutils.students import Method

NUMBERS = {  # NLL of the test images in nats, and the training loss of the last epoch
    "scratch": (2.314504, 2.262088),
    "kd resnet18": (2.310713, 1.137676),
    "kd_mean_prob resnet50 resnet18": (2.356468, 1.189023),
    "last_layer": (2.931968, 3.245331),
    "last_block": (2.316568, 2.482934),
}


def test_a_tiny_run_has_these_numbers(tiny, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    for arch in ("resnet18", "resnet50"):
        save_file(random_network(arch).state_dict(), folder / f"{arch}.safetensors")
    sizes = {
        "train_size": 200,
        "val_size": 50,
        "test_size": 100,
        "batch_size": 20,
        "learning_rate": 0.001,
        "teacher_learning_rate": 1e-4,
    }
    settings = tiny(**sizes, weights=str(folder), max_shift=0, seeds=[0])
    dataset = load_data(settings)
    resnet50, resnet18 = (fine_tune(arch, dataset, settings) for arch in ("resnet50", "resnet18"))
    distil = partial(distillation_loss, temperature=4.0, alpha=0.5)
    combine = partial(combine_teachers, rule="mean_prob", temperature=4.0)
    methods = [
        Method("scratch", partial(cross_entropy, label_smoothing=0.1)),
        Method("kd", distil, (resnet18,)),
        Method("kd_mean_prob", distil, (resnet50, resnet18), combine),
    ]
    runs = {method.words: train_students(method, dataset, settings)[0] for method in methods}
    runs |= {"last_layer": resnet50.runs[0], "last_block": resnet18.runs[0]}
    found = {
        name: (metrics.nll(run.logits["test"], dataset.test.labels), run.history["train_loss"][-1])
        for name, run in runs.items()
    }
    assert found.keys() == NUMBERS.keys()
    for name, numbers in NUMBERS.items():
        assert found[name] == pytest.approx(numbers, rel=1e-3), name

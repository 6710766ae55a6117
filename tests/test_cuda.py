"""What a GPU alone does: steps recorded as a CUDA graph. Skipped where there is no GPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdutils import cache, training
from kdutils.cache import Checkpoint
from kdutils.models import SmallCNN, normalise
from kdutils.settings import load_settings
from kdutils.students import LOSSES
from kdutils.training import Recipe, fit, predict
from kdutils.weights import seeded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")

PIXELS = torch.randint(0, 256, (2, 96, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(96) % 10
TEACHER = torch.randn(96, 2, 10, generator=torch.Generator().manual_seed(1)) * 3


def train(loss="kd", device="cuda", checkpoint=None, network=None, **named):
    """Fit the student on random images, of which view 1 is another; its history and its logits."""
    pixels, labels, teacher = (tensor.to(device) for tensor in (PIXELS, LABELS, TEACHER))
    if isinstance(loss, str):
        made, taught = LOSSES[loss](load_settings("demo")), loss != "scratch"

        def loss(logits, index, view):
            return made(logits, *([teacher[index, view]] if taught else []), labels[index])

    network = network or seeded(0, SmallCNN)
    recipe = {"epochs": 4, "batch_size": 16, "optimizer": "adamw", "schedule": "one_cycle", "learning_rate": 0.002}
    recipe = Recipe(**{**recipe, "weight_decay": 0.01, **{k: named.pop(k) for k in list(named) if k in recipe}})
    validation = normalise(pixels[0, :20]), labels[:20]
    history = fit(
        network, lambda index, view: normalise(pixels[view, index]), labels, loss, recipe,
        num_views=2, seed=0, validation=validation, checkpoint=Checkpoint(checkpoint), **named,
    )  # fmt: skip
    return history, predict(network, validation[0]).cpu()


@pytest.fixture
def one_by_one(monkeypatch):
    """Call it, and steps are no longer recorded."""
    return lambda: monkeypatch.setattr(training, "_AsGraph", lambda step, optimizer: step)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_recorded_steps_do_what_steps_do_one_by_one(loss, optimizer, one_by_one, capsys):
    recorded, logits = train(loss, optimizer=optimizer)
    assert "no CUDA graph" not in capsys.readouterr().out
    one_by_one()
    expected, expected_logits = train(loss, optimizer=optimizer)
    for name, values in expected.items():
        assert recorded[name] == pytest.approx(values, rel=1e-3, abs=0.03 if "accuracy" in name else 1e-3)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-2, atol=1e-2)
    still, _ = train(loss, optimizer=optimizer, learning_rate=1e-9)
    assert abs(still["train_loss"][-1] - expected["train_loss"][-1]) > 0.01  # the comparison can fail


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_gpu_trains_as_the_cpu_does(precision):
    on_gpu, logits = train(precision=precision)
    on_cpu, expected = train(device="cpu")
    assert on_gpu["train_loss"] == pytest.approx(on_cpu["train_loss"], rel=0.03)
    assert (logits - expected).abs().mean() < 0.4 * expected.abs().mean()


def test_the_running_statistics_of_norms_are_followed(one_by_one):
    def network():
        return seeded(0, lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
                                               nn.LazyLinear(10)))  # fmt: skip

    def built():
        made = network()
        made(torch.zeros(2, 3, 32, 32))
        return made

    one, other = built(), built()
    train(network=one, learning_rate=1e-5)
    one_by_one()
    train(network=other, learning_rate=1e-5)
    assert one[1].num_batches_tracked == other[1].num_batches_tracked
    torch.testing.assert_close(one[1].running_mean, other[1].running_mean, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("on", ["cuda", "cpu"])
@pytest.mark.parametrize("after", [1, 5, 6, 13])
def test_a_training_cut_on_the_gpu_resumes_there_or_on_the_cpu(on, after, tmp_path, monkeypatch):
    for name in ("CHECKPOINT_EVERY", "CHECKPOINT_AT_END"):
        monkeypatch.setattr(cache, name, 0.0)
    saved, save = [], Checkpoint.save

    def save_until_cut(self, state):
        save(self, state)
        saved.append(state["step"])
        if len(saved) == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Checkpoint, "save", save_until_cut)
        train(checkpoint=tmp_path / "x")
    resumed, logits = train(checkpoint=tmp_path / "x", device=on)
    whole, expected = train()
    assert resumed["train_loss"] == pytest.approx(whole["train_loss"], rel=2e-3)
    torch.testing.assert_close(logits, expected, rtol=2e-2, atol=2e-2)


def test_a_loss_that_waits_for_the_gpu_is_told_and_trains_all_the_same(capsys):
    labels = LABELS.cuda()

    def loss(logits, index, view):
        value = F.cross_entropy(logits, labels[index])
        return value if value.item() > 0 else value * 0

    history, _ = train(loss)
    assert capsys.readouterr().out.count("no CUDA graph, and slower steps") == 1
    expected, _ = train(lambda logits, index, view: F.cross_entropy(logits, labels[index]))
    assert history["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3)

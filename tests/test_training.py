"""kdutils.training: one loop trains everything; a resumed training equals the uninterrupted one."""

import errno
import math
import os
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import message_of
from torch import nn

from kdutils import cache, progress
from kdutils.cache import Checkpoint
from kdutils.progress import TrainingProgress
from kdutils.training import Recipe, TrainingError, draw, fit, predict


def recipe(**changes):
    return Recipe(**{"epochs": 4, "batch_size": 8, "optimizer": "adamw", "schedule": "one_cycle",
                     "learning_rate": 0.01, "weight_decay": 0.01, **changes})  # fmt: skip


def network(seed=0, last="fc"):
    """A small network with filters and BatchNorm, so that a checkpoint holds buffers and 4-D weights too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
        return nn.Sequential(OrderedDict(zip(("conv", "norm", "relu", "flatten", last), layers, strict=True)))


LABELS = torch.arange(30) % 3
INPUTS = torch.randn(30, 2, 4, 4, generator=torch.Generator().manual_seed(0)) + LABELS[:, None, None, None]


def train(model, recipe=recipe(), loss=None, **named):
    """Fit on the toy problem above; view 1 is the mirror image."""
    if loss is None:
        loss = lambda logits, index, view: F.cross_entropy(logits, LABELS[index])  # noqa: E731
    named = {"num_views": 2, "seed": 0, "validation": (INPUTS[:9], LABELS[:9]), **named}
    named["progress"] = TrainingProgress(named.pop("name", "toy"))
    named["checkpoint"] = Checkpoint(named.pop("checkpoint", None))
    inputs = lambda index, view: torch.where(view[:, None, None, None] == 1, INPUTS[index].flip(-1), INPUTS[index])  # noqa: E731
    return fit(model, inputs, LABELS, loss, recipe, **named)


def same_state(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("seed, epoch, count, views", [(0, 0, 10, 2), (3, 7, 101, 18), (2**31 - 1, 500, 5, 1)])
def test_draw_is_a_permutation_and_views_in_range(seed, epoch, count, views):
    order, view = draw(seed, epoch, count, views)
    assert order.sort().values.tolist() == list(range(count))
    assert view.shape == (count,) and view.min() >= 0 and view.max() < views
    assert order.dtype == view.dtype == torch.int64


def test_draw_depends_on_its_arguments_alone():
    first = draw(1, 2, 50, 18)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = draw(1, 2, 50, 18)
    assert all(torch.equal(*pair) for pair in zip(first, again))
    assert torch.equal(torch.get_rng_state(), before)
    for other in (draw(2, 2, 50, 18), draw(1, 3, 50, 18)):
        assert not torch.equal(other[0], first[0]) and not torch.equal(other[1], first[1])


def test_every_view_is_drawn_about_equally_often():
    counts = draw(0, 0, 18_000, 18)[1].bincount(minlength=18)
    assert 850 < counts.min() and counts.max() < 1150


@pytest.mark.parametrize("optimizer, learning_rate", [("adam", 0.03), ("adamw", 0.03), ("sgd", 0.03)])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle"])
def test_training_learns(optimizer, learning_rate, schedule):
    history = train(network(), recipe(optimizer=optimizer, schedule=schedule, learning_rate=learning_rate, epochs=15))
    assert history["train_loss"][-1] < 0.6 * history["train_loss"][0]
    assert history["val_accuracy"][-1] > 0.75


def test_the_history_is_one_entry_an_epoch():
    history = train(network())
    assert set(history) == {"train_loss", "train_accuracy", "val_loss", "val_accuracy"}
    assert all(len(values) == 4 and all(math.isfinite(v) for v in values) for values in history.values())
    assert all(0 <= v <= 1 for key in ("train_accuracy", "val_accuracy") for v in history[key])


def test_the_same_training_twice_is_the_same_bit_for_bit():
    one, other = network(), network()
    assert train(one) == train(other) and same_state(one, other)
    other = network()
    train(other, seed=1)
    assert not same_state(one, other)


def test_every_step_is_one_whole_batch_and_an_epoch_sees_an_image_once():
    seen = []

    def loss(logits, index, view):
        seen.append((index.tolist(), view.tolist()))
        return logits.sum()

    train(network(), recipe(epochs=2), loss=loss)
    assert [len(index) for index, _ in seen] == [8] * 6  # 30 images: the last 6 of an epoch are left out
    for epoch in range(2):
        order, view = draw(0, epoch, 30, 2)
        assert sum((index for index, _ in seen[3 * epoch : 3 * epoch + 3]), []) == order[:24].tolist()
        assert sum((v for _, v in seen[3 * epoch : 3 * epoch + 3]), []) == view[:24].tolist()


def test_fewer_images_than_a_batch_are_one_batch():
    history = train(network(), recipe(batch_size=1000))
    assert len(history["train_loss"]) == 4 and history["train_loss"][-1] < history["train_loss"][0]


def test_the_last_epoch_counts_even_when_it_is_worse():
    steps = []

    def loss(logits, index, view):
        steps.append(None)
        return F.cross_entropy(logits, LABELS[index]) * (1 if len(steps) <= 27 else -20)

    model = network()
    history = train(model, recipe(epochs=10, schedule="constant"), loss=loss)
    assert history["val_loss"][-1] > min(history["val_loss"])
    logits = predict(model, INPUTS[:9])
    assert F.cross_entropy(logits, LABELS[:9]).item() == pytest.approx(history["val_loss"][-1], rel=1e-6)
    assert (logits.argmax(1) == LABELS[:9]).float().mean().item() == pytest.approx(history["val_accuracy"][-1])
    assert not model.training


def rates(schedule, epochs):
    """The learning rates of a training, step by step: on a constant gradient, each step of Adam is one rate long."""

    class Slope(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, x):
            return self.w.expand(len(x), 3)

    model, places = Slope(), []

    def loss(logits, index, view):
        places.append(model.w.item())
        return model.w.sum()

    train(
        model, recipe(epochs=epochs, optimizer="adam", schedule=schedule, learning_rate=1.0, weight_decay=0), loss=loss
    )
    return [one - other for one, other in zip(places, [*places[1:], model.w.item()])]


def test_rates_that_stay_and_that_fall_along_a_cosine():
    assert rates("constant", 4) == pytest.approx([1.0] * 12, rel=1e-6)
    assert rates("cosine", 4) == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 12)) for i in range(12)], rel=1e-5)


def test_one_cycle_rises_for_a_quarter_and_falls_to_0():
    found = rates("one_cycle", 8)  # 24 steps, 6 of them rising
    assert found[:6] == pytest.approx([(i + 1) / 6 for i in range(6)], rel=1e-5)
    assert found[6] == pytest.approx(1.0, rel=1e-5) == max(found)
    assert all(a > b for a, b in zip(found[6:], found[7:])) and 0 < found[-1] < 0.05


def test_one_cycle_of_a_single_step():
    model = network()
    train(model, recipe(epochs=1, batch_size=30))
    assert not same_state(model, network())


def test_weight_decay_spares_biases_and_norms():
    heavy, light = network(), network()
    loss = lambda logits, index, view: logits.sum() * 0.0  # noqa: E731
    train(heavy, recipe(weight_decay=1.0, learning_rate=0.1), loss=loss)
    train(light, recipe(weight_decay=0.0, learning_rate=0.1), loss=loss)
    for (name, one), other in zip(heavy.named_parameters(), light.parameters()):
        assert (one.norm() < 0.9 * other.norm()) == (one.dim() > 1), name


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_the_last_layer_is_trained_at_its_own_rate(optimizer, factor):
    """On a constant gradient, the way a weight goes in the whole training is in proportion to its rate."""
    start, one, other = network(), network(), network()
    how = recipe(optimizer=optimizer, weight_decay=0.0)
    train(one, how, loss=lambda logits, index, view: sum(p.sum() for p in one.parameters()))
    named = {"last_layer_factor": factor}
    train(other, how, loss=lambda logits, index, view: sum(p.sum() for p in other.parameters()), **named)
    for (name, first), a, b in zip(start.named_parameters(), one.parameters(), other.parameters(), strict=True):
        times = factor if name.startswith("fc.") else 1.0
        torch.testing.assert_close(b - first, times * (a - first), rtol=1e-3, atol=1e-5)
        assert (a - first).abs().min() > 1e-3


def test_no_other_layer_has_a_rate_of_its_own():
    plain, other = network(), network(last="fc2")
    assert train(other, last_layer_factor=0.1) == train(plain) and same_state(other, plain)


def cut_training(checkpoint, after_steps, **named):
    """Train until a power cut."""
    steps = []

    def loss(logits, index, view):
        steps.append(None)
        if len(steps) > after_steps:
            raise KeyboardInterrupt
        return F.cross_entropy(logits, LABELS[index])

    with pytest.raises(KeyboardInterrupt):
        train(network(), loss=loss, checkpoint=checkpoint, **named)


@pytest.fixture
def always_save(monkeypatch):
    monkeypatch.setattr(cache, "CHECKPOINT_EVERY", 0.0)
    monkeypatch.setattr(cache, "CHECKPOINT_AT_END", 0.0)


def resume_training(model, checkpoint, **named):
    """Train to the end; the history and the number of steps that were left."""
    steps = []

    def loss(logits, index, view):
        steps.append(None)
        return F.cross_entropy(logits, LABELS[index])

    return train(model, loss=loss, checkpoint=checkpoint, **named), len(steps)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("after_steps", [1, 2, 3, 4, 7, 11])
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, always_save, optimizer, after_steps):
    """3 steps an epoch: cut in the first epoch, between epochs, in later ones."""
    whole, resumed, path = network(), network(seed=5), tmp_path / "x.checkpoint"
    named = {"recipe": recipe(optimizer=optimizer), "last_layer_factor": 0.3}
    history = train(whole, **named)
    cut_training(path, after_steps, **named)
    assert [path.name for path in tmp_path.iterdir()] == ["x.checkpoint"]
    assert resume_training(resumed, path, **named) == (history, 12 - after_steps)
    assert same_state(whole, resumed)


def test_a_training_may_be_cut_again_and_again(tmp_path, always_save):
    whole, resumed, path = network(), network(seed=5), tmp_path / "x.checkpoint"
    history = train(whole)
    for after_steps in (2, 3, 1, 4):  # 10 in all
        cut_training(path, after_steps)
    assert resume_training(resumed, path) == (history, 2) and same_state(whole, resumed)


def test_a_training_cut_in_its_first_step_starts_anew(tmp_path, always_save):
    cut_training(tmp_path / "x.checkpoint", 0)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets, as a list of one number."""
    now = [0.0]
    for module in (cache, progress):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


@pytest.mark.parametrize("seconds, after_steps, done", [
    (4, 2, 0), (4, 3, 3), (4, 5, 3), (4, 6, 6), (4, 11, 9),  # epochs of 12 s: saved after each
    (16, 1, 1), (16, 2, 2), (16, 3, 3), (16, 4, 4),  # of 48 s: in the middle too
    (0.1, 4, 0), (0.2, 5, 0), (0.2, 7, 6), (0.2, 11, 6),  # shorter than a second
])  # fmt: skip
def test_steps_after_the_last_checkpoint_are_done_again(tmp_path, clock, seconds, after_steps, done):
    """3 steps an epoch; a step that was cut counts for the clock, and is begun again."""
    whole, resumed, steps, path = network(), network(seed=5 if done else 0), [], tmp_path / "x.checkpoint"

    def loss(logits, index, view):
        clock[0] += seconds
        steps.append(None)
        if len(steps) > after_steps:
            raise KeyboardInterrupt
        return F.cross_entropy(logits, LABELS[index])

    with pytest.raises(KeyboardInterrupt):
        train(network(), loss=loss, checkpoint=path)
    assert resume_training(resumed, path) == (train(whole), 12 - done) and same_state(whole, resumed)


@pytest.mark.parametrize("cost, least, most", [(0.1, 11, 13), (1, 60, 72), (2, 120, 132)])
def test_the_longer_a_checkpoint_takes_to_write_the_rarer_it_is(tmp_path, clock, monkeypatch, cost, least, most):
    written = []

    def write(path, fill):
        written.append(clock[0])
        clock[0] += cost

    monkeypatch.setattr(cache, "write_atomically", write)

    def loss(logits, index, view):
        clock[0] += 4
        return F.cross_entropy(logits, LABELS[index])

    train(network(), recipe(epochs=40), loss=loss, checkpoint=tmp_path / "x.checkpoint")
    gaps = [later - earlier - cost for earlier, later in zip(written, written[1:])]
    assert written[0] == 12 and len(gaps) >= 2 and all(least <= gap < most for gap in gaps), gaps
    assert cost * len(written) < clock[0] / 50


def test_checkpoints_are_not_written_all_the_time(tmp_path):
    train(network(), checkpoint=tmp_path / "x.checkpoint")
    assert list(tmp_path.iterdir()) == []


def flip_in_the_middle(content):
    at = len(content) // 3
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: b"no checkpoint", lambda content: content[: len(content) // 2],
    lambda content: content[:-1], flip_in_the_middle,
], ids=["empty", "text", "half", "last byte", "flipped byte"])  # fmt: skip
def test_a_damaged_checkpoint_starts_the_training_anew_with_a_line(tmp_path, always_save, capsys, damage):
    path = tmp_path / "x.checkpoint"
    cut_training(path, 7)
    path.write_bytes(damage(path.read_bytes()))
    capsys.readouterr()
    whole, again = network(), network()
    history = train(whole)
    assert train(again, checkpoint=path) == history and same_state(whole, again)
    out = capsys.readouterr().out
    assert "x.checkpoint" in out and "starts anew" in out


def test_no_flipped_byte_of_a_checkpoint_changes_the_outcome(tmp_path, always_save, monkeypatch):
    path = tmp_path / "x.checkpoint"
    cut_training(path, 7)
    monkeypatch.setattr(cache, "CHECKPOINT_EVERY", 15.0)
    good = path.read_bytes()
    whole = network()
    history = train(whole)
    wrong = []
    for at in range(0, len(good), len(good) // 60):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
        again = network()
        try:
            right = train(again, checkpoint=path) == history and same_state(whole, again)
        except Exception as error:
            right, at = False, (at, repr(error)[:80])
        if not right:
            wrong.append(at)
    assert wrong == []


@pytest.mark.parametrize("content", [{}, [1, 2], {"model": {}, "optimizer": {}, "schedule": {}, "history": {}}],
                         ids=["empty", "list", "empty parts"])  # fmt: skip
def test_another_programs_file_is_no_checkpoint(tmp_path, capsys, content):
    torch.save(content, tmp_path / "x.checkpoint")
    whole, again = network(), network()
    assert train(again, checkpoint=tmp_path / "x.checkpoint") == train(whole) and same_state(whole, again)
    assert "starts anew" in capsys.readouterr().out


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_training(value):
    steps = []

    def loss(logits, index, view):
        steps.append(None)
        return logits.sum() * (value if len(steps) == 5 else 0.0)

    with pytest.raises(TrainingError) as caught:
        train(network(), loss=loss, name="kd resnet50, seed 3", seed=3)
    message = str(caught.value)
    assert message.startswith("kd resnet50, seed 3: ") and "epoch 2" in message
    assert "lower the learning rate" in message and "\n" not in message
    assert len(steps) == 6  # the epoch it happened in was the last


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("step", [1, 5, 6, 12])
def test_a_loss_that_is_not_finite_is_never_saved(tmp_path, always_save, value, step):
    """Step 6 ends an epoch, step 12 the training. What was saved before is good to go on from."""
    path, saved, steps = tmp_path / "x.checkpoint", [], []

    def loss(logits, index, view):
        steps.append(None)
        saved.append(path.read_bytes() if path.exists() else None)
        return F.cross_entropy(logits, LABELS[index]) * (value if len(steps) == step else 1)

    with pytest.raises(TrainingError, match=f"epoch {(step + 2) // 3};"):
        train(network(), loss=loss, checkpoint=path)
    assert len(steps) == step and (path.read_bytes() if path.exists() else None) == saved[-1]
    whole, resumed = network(), network(seed=5 if step > 1 else 0)
    assert resume_training(resumed, path) == (train(whole), 13 - step) and same_state(whole, resumed)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_stop_the_training_though_the_loss_is(value):
    """A loss may hide them, and images that it never saw may meet them first."""
    model = network()

    def loss(logits, index, view):
        model.fc.bias.data[0] = value if len(history) >= 4 else 0.0
        history.append(None)
        return logits.nan_to_num(0.0, 0.0, 0.0).square().mean()

    history = []
    with pytest.raises(TrainingError) as caught:
        train(model, recipe(learning_rate=1e-9), loss=loss, name="kd resnet50, seed 3", seed=3)
    message = str(caught.value)
    assert message.startswith("kd resnet50, seed 3: ") and "logits" in message and "epoch 2" in message
    assert "lower the learning rate" in message and len(history) == 6


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, always_save, monkeypatch):
    """The disk is full from the second checkpoint on: told in one line, and the first is good to go on from."""
    path, fsync = tmp_path / "x.checkpoint", os.fsync

    def full(descriptor):
        if path.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    message = message_of(train, network(), checkpoint=path)
    assert str(path) in message and "No space left on device" in message and "repeat the command" in message
    assert [file.name for file in tmp_path.iterdir()] == ["x.checkpoint"]
    monkeypatch.setattr(os, "fsync", fsync)
    whole, resumed = network(), network(seed=5)
    assert resume_training(resumed, path) == (train(whole), 11) and same_state(whole, resumed)


def test_progress_is_one_plain_line_an_epoch_where_nobody_watches(capsys):
    train(network(), name="scratch, seed 4")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.startswith("scratch, seed 4: epoch ") for line in lines)
    assert "4/4" in lines[-1] and "loss" in lines[-1] and "val" in lines[-1] and "left" in lines[-1]


@pytest.mark.parametrize("seconds, steps", [(25, [3, 6, 9, 12]), (70, list(range(1, 15))), (10, [7, 14]), (4, [])])
def test_progress_is_a_line_a_minute_within_a_long_epoch(capsys, clock, seconds, steps):
    def loss(logits, index, view):
        clock[0] += seconds
        return F.cross_entropy(logits, LABELS[index])

    train(network(), recipe(epochs=2, batch_size=2), loss=loss, name="scratch, seed 4")  # 15 steps an epoch
    lines = capsys.readouterr().out.splitlines()
    first, second = lines[: len(steps) + 1], lines[len(steps) + 1 :]
    for epoch, found in ((1, first), (2, second)):
        expected = [f"scratch, seed 4: epoch {epoch}/2, step {step} of 15, " for step in steps]
        assert [line[: len(start)] for line, start in zip(found, expected)] == expected
        assert len(found) == len(steps) + 1 and f"epoch {epoch}/2, loss" in found[-1]
        left = [(30 - 15 * (epoch - 1) - step) * seconds for step in (*steps, 15)]
        assert [line.split(", ")[-1] for line in found] == [f"{number} s left" for number in left]


def test_a_resumed_training_tells_the_time_that_is_left(tmp_path, always_save, capsys, clock):
    """By what was done since: 18 of 30 steps lie behind, and were slower."""
    cut_training(tmp_path / "x.checkpoint", 18, recipe=recipe(epochs=2, batch_size=2))
    capsys.readouterr()

    def loss(logits, index, view):
        clock[0] += 25
        return F.cross_entropy(logits, LABELS[index])

    train(network(), recipe(epochs=2, batch_size=2), loss=loss, checkpoint=tmp_path / "x.checkpoint")
    lines = capsys.readouterr().out.splitlines()
    assert "epoch 2/2, step 6 of 15" in lines[0] and lines[0].endswith(f", {9 * 25} s left")
    assert len(lines) == 4 and lines[-1].endswith(", 0 s left")


def test_progress_goes_to_the_batch_runs_log(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("KDUTILS_PROGRESS", str(tmp_path / "log"))
    train(network())
    assert capsys.readouterr().out == "" and len((tmp_path / "log").read_text().splitlines()) == 4


@pytest.mark.parametrize("batch_size", [1, 7, 30, 1000])
def test_predictions_do_not_depend_on_the_batches(batch_size):
    model = network().train()
    model.norm.running_mean.add_(0.3)
    expected = network()
    expected.norm.running_mean.add_(0.3)
    expected = expected.eval()(INPUTS)
    torch.testing.assert_close(predict(model, INPUTS, batch_size=batch_size), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(predict(model, INPUTS.half()), expected, rtol=0.02, atol=0.02)

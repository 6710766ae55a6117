"""kdutils.training: one loop trains everything; a resumed training equals the uninterrupted one."""

import errno
import io
import math
import os
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import message_of
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kdutils import cache, parallel, progress
from kdutils.cache import Checkpoint
from kdutils.models import seeded
from kdutils.progress import TrainingProgress
from kdutils.training import Recipe, TrainingError, draw, fit, predict

LABELS = torch.arange(30) % 3
INPUTS = torch.randn(30, 2, 4, 4, generator=torch.Generator().manual_seed(0)) + LABELS[:, None, None, None]


def recipe(**changes):
    """With the 30 images above: 4 epochs of 3 steps."""
    values = {"epochs": 4, "batch_size": 8, "optimizer": "adamw", "schedule": "one_cycle"}
    return Recipe(**{**values, "learning_rate": 0.01, "weight_decay": 0.01, **changes})


def network(seed=0, last="fc"):
    """A small network with filters and BatchNorm, so that a checkpoint holds buffers and 4-D weights too."""

    def build():
        layers = (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
        return nn.Sequential(OrderedDict(zip(("conv", "norm", "relu", "flatten", last), layers, strict=True)))

    return seeded(seed, build)


class Loss:
    """The cross-entropy of the toy problem; counts its steps.

    `before(step)` is called first. It may raise, or return a factor for the loss.
    """

    def __init__(self, before=lambda step: None):
        self.steps, self.before = 0, before

    def __call__(self, logits, index, view):
        self.steps += 1
        factor = self.before(self.steps)
        value = F.cross_entropy(logits, LABELS[index])
        return value if factor is None else factor * value


def train(model, recipe=recipe(), loss=None, *, name="toy", checkpoint=None, **named):
    """Fit on the toy problem; view 1 is the mirror image."""

    def inputs(index, view):
        return torch.where(view[:, None, None, None] == 1, INPUTS[index].flip(-1), INPUTS[index])

    named = {"num_views": 2, "seed": 0, "validation": (INPUTS[:9], LABELS[:9]), **named}
    handed = {"progress": TrainingProgress(name), "checkpoint": Checkpoint(checkpoint)}
    return fit(model, inputs, LABELS, loss or Loss(), recipe, **named, **handed)


def same_state(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("seed, epoch, count, views", [(0, 0, 18_000, 18), (3, 7, 101, 18), (2**31 - 1, 500, 5, 1)])
def test_draw_is_a_permutation_and_every_view_about_equally_often(seed, epoch, count, views):
    order, view = draw(seed, epoch, count, views)
    assert order.dtype == view.dtype == torch.int64 and order.sort().values.tolist() == list(range(count))
    counts = view.bincount(minlength=views)
    assert view.shape == (count,) and len(counts) == views
    assert count < 1000 or 0.85 * count / views < counts.min() <= counts.max() < 1.15 * count / views


def test_draw_depends_on_its_arguments_alone():
    first = draw(1, 2, 50, 18)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert all(torch.equal(*pair) for pair in zip(first, draw(1, 2, 50, 18)))
    assert torch.equal(torch.get_rng_state(), before)
    for other in (draw(2, 2, 50, 18), draw(1, 3, 50, 18)):
        assert not torch.equal(other[0], first[0]) and not torch.equal(other[1], first[1])


@pytest.mark.parametrize("epoch_size", [1, 9, 49])
def test_a_shorter_epoch_is_a_sample_without_repetition_and_another_one_every_time(epoch_size):
    epochs = [draw(3, epoch, 50, 18, epoch_size) for epoch in range(40)]
    for order, view in epochs:
        assert order.shape == view.shape == (epoch_size,) and len(order.unique()) == epoch_size
        assert 0 <= order.min() and order.max() < 50 and 0 <= view.min() and view.max() < 18
    assert all(torch.equal(*pair) for pair in zip(epochs[7], draw(3, 7, 50, 18, epoch_size)))
    counts = torch.cat([order for order, _ in epochs]).bincount(minlength=50)
    assert epoch_size == 1 or counts.min() > 0  # over the epochs, every image has its turn


@pytest.mark.parametrize("epoch_size", [None, 50, 51, 1000])
def test_an_epoch_of_all_images_is_what_it_is_without_a_size(epoch_size):
    assert all(torch.equal(*pair) for pair in zip(draw(1, 2, 50, 18, epoch_size), draw(1, 2, 50, 18)))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_training_learns_and_its_history_is_one_entry_an_epoch(optimizer):
    history = train(network(), recipe(optimizer=optimizer, learning_rate=0.03, epochs=15))
    assert set(history) == {"train_loss", "train_accuracy", "val_loss", "val_accuracy"}
    assert all(len(values) == 15 and all(math.isfinite(v) for v in values) for values in history.values())
    assert all(0 <= v <= 1 for key in ("train_accuracy", "val_accuracy") for v in history[key])
    assert history["train_loss"][-1] < 0.6 * history["train_loss"][0] and history["val_accuracy"][-1] > 0.75


def test_the_same_training_twice_is_the_same_bit_for_bit_and_another_seed_is_not():
    one, again, other = network(), network(), network()
    assert train(one) == train(again) and same_state(one, again)
    assert train(other, seed=1) != train(network()) and not same_state(one, other)


def test_every_step_is_one_whole_batch_and_an_epoch_sees_an_image_once():
    seen = []

    def loss(logits, index, view):
        seen.append((index, view))
        return logits.sum()

    train(network(), recipe(epochs=2), loss)
    assert [len(index) for index, _ in seen] == [8] * 6  # 30 images: the last 6 of an epoch are left out
    for epoch in range(2):
        for found, drawn in zip(zip(*seen[3 * epoch : 3 * epoch + 3]), draw(0, epoch, 30, 2)):
            assert torch.equal(torch.cat(found), drawn[:24])


def test_an_epochs_size_sets_its_steps_and_what_its_accuracy_counts():
    """Of 30 images 20 an epoch: 2 steps of 8, and the 16 images of these are those that are right or wrong."""
    seen = []

    def loss(logits, index, view):
        seen.append((index, (logits.argmax(1) == LABELS[index]).sum()))
        return logits.sum() * 0

    history = train(network(), recipe(epochs=3), loss, epoch_size=20)
    assert len(seen) == 6
    for epoch in range(3):
        index, right = zip(*seen[2 * epoch : 2 * epoch + 2])
        assert torch.equal(torch.cat(index), draw(0, epoch, 30, 2, 20)[0][:16])
        assert history["train_accuracy"][epoch] == pytest.approx(sum(right).item() / 16)


@pytest.mark.parametrize("epoch_size", [30, 31])
def test_an_epoch_no_smaller_than_the_images_changes_nothing(epoch_size):
    one, other = network(), network()
    assert train(one, epoch_size=epoch_size) == train(other) and same_state(one, other)


def test_fewer_images_than_a_batch_are_one_batch():
    model, loss = network(), Loss()
    train(model, recipe(epochs=1, batch_size=1000), loss)
    assert loss.steps == 1 and not same_state(model, network())


def test_the_last_epoch_counts_even_when_it_is_worse():
    model = network()
    gets_worse = Loss(lambda step: 1 if step <= 27 else -20)
    history = train(model, recipe(epochs=10, schedule="constant"), gets_worse)
    assert history["val_loss"][-1] > min(history["val_loss"]) and not model.training
    logits = predict(model, INPUTS[:9])
    assert F.cross_entropy(logits, LABELS[:9]).item() == pytest.approx(history["val_loss"][-1], rel=1e-6)
    assert (logits.argmax(1) == LABELS[:9]).float().mean().item() == pytest.approx(history["val_accuracy"][-1])


@pytest.mark.parametrize("schedule, expected", [
    ("constant", [1.0] * 24),
    ("cosine", [0.5 * (1 + math.cos(math.pi * i / 24)) for i in range(24)]),
    ("one_cycle", [(i + 1) / 6 for i in range(6)] + [0.5 * (1 + math.cos(math.pi * i / 18)) for i in range(18)]),
])  # fmt: skip
def test_the_learning_rate_follows_its_schedule(schedule, expected):
    found = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: found.append(optimizer.param_groups[0]["lr"]))
    train(network(), recipe(epochs=8, schedule=schedule, learning_rate=0.01))
    hook.remove()
    assert found == pytest.approx([0.01 * rate for rate in expected])


def test_weight_decay_spares_biases_and_norms():
    heavy, light = network(), network()
    for model, decay in ((heavy, 1.0), (light, 0.0)):
        train(model, recipe(weight_decay=decay, learning_rate=0.1), Loss(lambda step: 0.0))
    for (name, one), other in zip(heavy.named_parameters(), light.parameters()):
        assert (one.norm() < 0.9 * other.norm()) == (one.dim() > 1), name


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("last", ["fc", "fc2"])
def test_a_last_layer_called_fc_is_trained_at_its_own_rate(optimizer, last):
    """On a constant gradient, the way a weight goes in the whole training is in proportion to its rate."""
    start, plain, other = (network(last=last) for _ in range(3))
    for model, named in ((plain, {}), (other, {"last_layer_factor": 0.25})):
        constant = lambda logits, index, view, model=model: sum(p.sum() for p in model.parameters())  # noqa: E731
        train(model, recipe(optimizer=optimizer, weight_decay=0.0), constant, **named)
    for (name, first), a, b in zip(start.named_parameters(), plain.parameters(), other.parameters(), strict=True):
        times = 0.25 if name.startswith("fc.") else 1.0
        torch.testing.assert_close(b - first, times * (a - first), rtol=1e-3, atol=1e-5)
        assert (a - first).abs().min() > 1e-3


def test_a_training_that_is_told_to_stop_ends_at_its_next_step():
    loss = Loss(lambda step: parallel._stop.set() if step == 2 else None)
    try:
        with pytest.raises(parallel.Stopped):
            train(network(), loss=loss)
    finally:
        parallel._stop.clear()
    assert loss.steps == 2


# Checkpoints


def train_until_a_power_cut(checkpoint, after_steps, seconds=0.0, clock=None, **named):
    """Train until a power cut in the step after these; by the clock, a step takes so many seconds."""

    def before(step):
        if clock is not None:
            clock[0] += seconds
        if step > after_steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(network(), loss=Loss(before), checkpoint=checkpoint, **named)


def assert_resumes(checkpoint, done, **named):
    """After `done` steps, the training goes on from the checkpoint to the end of the uninterrupted one, bit for bit."""
    whole, resumed, loss = network(), network(seed=5 if done else 0), Loss()
    assert train(resumed, loss=loss, checkpoint=checkpoint, **named) == train(whole, **named)
    assert loss.steps == 12 - done and same_state(resumed, whole)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.checkpoint"


@pytest.fixture
def always_save(monkeypatch):
    monkeypatch.setattr(cache, "CHECKPOINT_EVERY", 0.0)
    monkeypatch.setattr(cache, "CHECKPOINT_AT_END", 0.0)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("cuts", [[0], [1], [2], [3], [4], [7], [11], [2, 3, 1, 4]], ids=str)
def test_a_resumed_training_is_the_uninterrupted_one(path, always_save, optimizer, cuts):
    """Cut in the first step, the first epoch, between epochs, in later ones, and again and again."""
    named = {"recipe": recipe(optimizer=optimizer), "last_layer_factor": 0.3}
    for after_steps in cuts:
        train_until_a_power_cut(path, after_steps, **named)
    assert [file.name for file in path.parent.iterdir()] == (["x.checkpoint"] if sum(cuts) else [])
    assert_resumes(path, sum(cuts), **named)


@pytest.mark.parametrize("cuts", [[1], [3], [7], [2, 3, 1, 4]], ids=str)
def test_a_training_of_shorter_epochs_resumes_too(path, always_save, cuts):
    """24 of the 30 images an epoch: 3 steps each, as above."""
    for after_steps in cuts:
        train_until_a_power_cut(path, after_steps, epoch_size=24)
    assert_resumes(path, sum(cuts), epoch_size=24)


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
def test_steps_after_the_last_checkpoint_are_done_again(path, clock, seconds, after_steps, done):
    """A step that was cut counts for the clock, and is begun again."""
    train_until_a_power_cut(path, after_steps, seconds, clock)
    assert_resumes(path, done)


@pytest.mark.parametrize("cost, least, most", [(0.1, 11, 13), (1, 60, 72), (2, 120, 132)])
def test_the_longer_a_checkpoint_takes_to_write_the_rarer_it_is(path, clock, monkeypatch, cost, least, most):
    written = []

    def write(path, fill):
        written.append(clock[0])
        clock[0] += cost

    def four_seconds(step):
        clock[0] += 4

    monkeypatch.setattr(cache, "write_atomically", write)
    train(network(), recipe(epochs=40), Loss(four_seconds), checkpoint=path)
    gaps = [later - earlier - cost for earlier, later in zip(written, written[1:])]
    assert written[0] == 12 and len(gaps) >= 2 and all(least <= gap < most for gap in gaps), gaps
    assert cost * len(written) < clock[0] / 50


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: b"no checkpoint", lambda content: content[: len(content) // 2],
    lambda content: content[:-1], lambda content: saved({}), lambda content: saved([1, 2]),
    lambda content: saved({"model": {}, "optimizer": {}, "schedule": {}, "history": {}}),
], ids=["empty", "text", "half", "last byte", "another's empty", "another's list", "another's parts"])  # fmt: skip
def test_a_damaged_or_foreign_checkpoint_starts_the_training_anew_with_a_line(path, always_save, capsys, damage):
    train_until_a_power_cut(path, 7)
    path.write_bytes(damage(path.read_bytes()))
    capsys.readouterr()
    assert_resumes(path, 0)
    out = capsys.readouterr().out
    assert "x.checkpoint" in out and "starts anew" in out


def test_no_flipped_byte_of_a_checkpoint_changes_the_outcome(path, always_save, monkeypatch, capsys):
    train_until_a_power_cut(path, 7)
    monkeypatch.setattr(cache, "CHECKPOINT_EVERY", 15.0)
    good, whole = path.read_bytes(), network()
    history = train(whole)
    for at in range(0, len(good), len(good) // 40):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
        again = network()
        assert train(again, checkpoint=path) == history and same_state(whole, again), at
    assert "starts anew" in capsys.readouterr().out


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(path, always_save, monkeypatch):
    """The disk is full from the second checkpoint on: told in one line, and the first is good to go on from."""
    fsync = os.fsync

    def full(descriptor):
        if path.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    message = message_of(train, network(), checkpoint=path)
    assert str(path) in message and "No space left on device" in message and "repeat the command" in message
    assert [file.name for file in path.parent.iterdir()] == ["x.checkpoint"]
    monkeypatch.setattr(os, "fsync", fsync)
    assert_resumes(path, 1)


# Numbers that are not finite


def divergence_of(loss, model=None, **named):
    """The message of the `TrainingError` that this training must end in: one line that names it."""
    with pytest.raises(TrainingError) as caught:
        train(model or network(), loss=loss, name="kd resnet50, seed 3", **named)
    message = str(caught.value)
    assert message.startswith("kd resnet50, seed 3: ") and "lower the learning rate" in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("step", [1, 5, 6, 12])
def test_a_loss_that_is_not_finite_stops_the_training_and_is_never_saved(path, always_save, value, step):
    """Step 6 ends an epoch, step 12 the training. What was saved before is good to go on from."""
    states = []

    def before(number):
        states.append(path.read_bytes() if path.exists() else None)
        return value if number == step else 1

    loss = Loss(before)
    message = divergence_of(loss, checkpoint=path)
    assert "the loss is" in message and f"in epoch {(step + 2) // 3};" in message and loss.steps == step
    assert (path.read_bytes() if path.exists() else None) == states[-1]
    assert_resumes(path, step - 1)


def test_a_training_that_saves_nothing_stops_after_the_epoch_of_a_loss_that_is_not_finite():
    loss = Loss(lambda step: math.nan if step == 5 else 1)
    assert "epoch 2" in divergence_of(loss) and loss.steps == 6


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_stop_the_training_though_the_loss_is(value):
    """A loss may hide them, and images that it never saw may meet them first."""
    model, steps = network(), []

    def loss(logits, index, view):
        steps.append(None)
        model.fc.bias.data[0] = value if len(steps) > 4 else 0.0
        return logits.nan_to_num(0.0, 0.0, 0.0).square().mean()

    message = divergence_of(loss, model=model, recipe=recipe(learning_rate=1e-9))
    assert "logits" in message and "epoch 2" in message and len(steps) == 6


# What people see


@pytest.mark.parametrize("seconds, steps", [(25, [3, 6, 9, 12]), (70, list(range(1, 15))), (10, [7, 14]), (4, [])])
def test_progress_is_a_line_an_epoch_and_a_line_a_minute_within_a_long_one(capsys, clock, seconds, steps):
    def before(step):
        clock[0] += seconds

    train(network(), recipe(epochs=2, batch_size=2), Loss(before), name="scratch, seed 4")  # 15 steps an epoch
    lines = capsys.readouterr().out.splitlines()
    for epoch in (1, 2):
        found, lines = lines[: len(steps) + 1], lines[len(steps) + 1 :]
        expected = [f"scratch, seed 4: epoch {epoch}/2, step {step} of 15, " for step in steps]
        assert [line[: len(start)] for line, start in zip(found, expected)] == expected
        assert f"scratch, seed 4: epoch {epoch}/2, loss" in found[-1] and "val" in found[-1]
        left = [(30 - 15 * (epoch - 1) - step) * seconds for step in (*steps, 15)]
        assert [line.split(", ")[-1] for line in found] == [f"{number} s left" for number in left]
    assert lines == []


def test_a_resumed_training_tells_the_time_that_is_left(path, always_save, capsys, clock):
    """By what was done since: 18 of 30 steps lie behind, and were slower."""
    how = recipe(epochs=2, batch_size=2)
    train_until_a_power_cut(path, 18, 99, clock, recipe=how)
    capsys.readouterr()

    def before(step):
        clock[0] += 25

    train(network(), how, Loss(before), checkpoint=path)
    lines = capsys.readouterr().out.splitlines()
    assert "epoch 2/2, step 6 of 15" in lines[0] and lines[0].endswith(f", {9 * 25} s left")
    assert len(lines) == 4 and lines[-1].endswith(", 0 s left")


def test_progress_goes_to_the_batch_runs_log(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("KDUTILS_PROGRESS", str(tmp_path / "log"))
    train(network())
    assert capsys.readouterr().out == "" and len((tmp_path / "log").read_text().splitlines()) == 4


@pytest.mark.parametrize("batch_size", [1, 7, 30, 1000])
def test_predictions_do_not_depend_on_the_batches(batch_size):
    model, whole = network().train(), network().eval()
    for one in (model, whole):
        one.norm.running_mean.add_(0.3)
    torch.testing.assert_close(predict(model, INPUTS, batch_size=batch_size), whole(INPUTS), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(predict(model, INPUTS.half()), whole(INPUTS), rtol=0.02, atol=0.02)

"""kdutils.study and what it is made of: pools, warm starts, shuffled soft labels, unlabelled images, every arm."""

import dataclasses
import itertools
import json
from functools import partial

import pytest
import torch
import yaml
from conftest import TINY, message_of
from PIL import Image
from safetensors.torch import save_file
from test_students import fake_teacher, same_runs
from torchvision import models as zoo

from kdutils.data.images import Split, left_over, load_data, training_part
from kdutils.data.views import make_views, pool_of_draws, pool_of_views, view_pixels, view_table
from kdutils.lab import study as study_module
from kdutils.lab.study import ENTRIES, OTHER_LOSSES, TUNED, Study, earlier_augmentation, train_entry, tuned_words
from kdutils.lab.sweeps import read_rows, read_sweep, settings_of_trials
from kdutils.losses import cross_entropy, distillation_loss
from kdutils.models import normalise, seeded
from kdutils.results.tables import FREEZE, teacher_rows
from kdutils.settings import ARCHITECTURES, ROOT, load_settings
from kdutils.students import Method, as_teacher, train_students
from kdutils.teachers import out_of_fold, shuffled_within_classes, teach


def test_a_pool_of_the_training_images_trains_the_same_students(tiny, toy_data):
    settings, arm = tiny(), Method("scratch", cross_entropy)
    pool = pool_of_views("same", toy_data.train.images, toy_data.train.labels, **settings.views)
    assert same_runs(train_students(arm, toy_data, settings), train_students(arm, toy_data, settings, pool))


def test_a_pool_of_draws_shows_what_was_drawn(toy_data):
    viewed = make_views(toy_data.train.images, 1, 1)
    every = torch.arange(40)
    draws = torch.stack([view_pixels(viewed, every, torch.full_like(every, v)).permute(0, 2, 3, 1) for v in (3, 0)], 1)
    pool = pool_of_draws("draws", draws, toy_data.train.labels)
    assert pool.num_views == 2
    index, view = torch.tensor([5, 7]), torch.tensor([1, 0])
    expected = torch.cat([toy_data.train.images[5:6], view_pixels(viewed, index[1:], torch.tensor([3]))])
    assert torch.equal(pool.pixels(index, view), expected)


@pytest.mark.parametrize("change", ["images", "labels", "views"])
def test_another_pool_is_another_fingerprint(toy_data, change):
    images, labels = toy_data.train
    other = {
        "images": (images + 1, labels, 1, 1), "labels": (images, labels.flip(0), 1, 1), "views": (images, labels, 0, 1),
    }[change]  # fmt: skip
    one, again = (pool_of_views("pool", images, labels, 1, 1) for _ in range(2))
    assert one.fingerprint == again.fingerprint != pool_of_views("pool", *other).fingerprint


def test_soft_labels_of_other_images_than_the_students_are_refused(tiny, toy_data):
    pool = pool_of_views("others", toy_data.val.images, toy_data.val.labels, 0, 1)
    arm = Method("kd", partial(distillation_loss, temperature=4.0, alpha=0.5), (fake_teacher(toy_data),))
    message = message_of(train_students, arm, toy_data, tiny(), pool)
    assert "40 images in 18 views" in message and "10 in 2" in message and "teachers.teach" in message


def test_a_student_goes_on_from_another(tiny, toy_data):
    settings = tiny(schedule="constant", learning_rate=1e-30, optimizer="adam")
    start = train_students(Method("scratch", cross_entropy), toy_data, tiny())
    longer = train_students(Method("longer", cross_entropy, start=start), toy_data, settings)
    for before, after in zip(start, longer, strict=True):  # a vanishing rate leaves it where it started
        assert all(torch.equal(before.state[name], after.state[name]) for name in before.state)
    others = train_students(Method("scratch", cross_entropy), toy_data, tiny(epochs=1))
    assert train_students(Method("longer", cross_entropy, start=others), toy_data, settings)[0].fingerprint not in {
        longer[0].fingerprint,
        start[0].fingerprint,
    }
    message = message_of(train_students, Method("longer", cross_entropy, start=start), toy_data, tiny(seeds=[7]))
    assert "longer" in message and "seed 7" in message


def test_images_without_labels_are_learnt_from_the_teacher_alone(tiny, toy_data):
    """Labels that are not known must make no difference, and training accuracy counts the labelled images only."""
    settings = tiny(seeds=[0], max_shift=0, shift_step=1)
    images, labels = toy_data.train
    hidden = labels.clone()
    hidden[20:] = -1
    teacher = fake_teacher(toy_data, num_views=2)
    arm = Method("kd_unlabelled", partial(distillation_loss, temperature=4.0, alpha=1.0), (teacher,))
    known = train_students(arm, toy_data, settings, pool_of_views("known", images, labels, 0, 1))
    unknown = train_students(arm, toy_data, settings, pool_of_views("unknown", images, hidden, 0, 1))
    assert all(torch.equal(known[0].state[name], unknown[0].state[name]) for name in known[0].state)
    none = torch.full_like(labels, -1)
    (blind,) = train_students(arm, toy_data, settings, pool_of_views("none", images, none, 0, 1))
    assert (
        blind.history["train_accuracy"] == [0.0, 0.0] and blind.history["train_loss"] == known[0].history["train_loss"]
    )


def test_shuffled_soft_labels_stay_within_their_class(toy_data):
    labels, teacher = toy_data.train.labels, fake_teacher(toy_data, seeds=(0, 1))
    shuffled = shuffled_within_classes(teacher, labels, seed=1)
    for before, after in zip(teacher.runs, shuffled.runs, strict=True):
        assert before.fingerprint != after.fingerprint and not torch.equal(before.view_logits, after.view_logits)
        for label in range(10):
            mine = labels == label
            rows = [{tuple(row.flatten().tolist()) for row in run.view_logits[mine]} for run in (before, after)]
            assert rows[0] == rows[1]
    again, other = (shuffled_within_classes(teacher, labels, seed).runs[0] for seed in (1, 2))
    assert torch.equal(again.view_logits, shuffled.runs[0].view_logits)
    assert again.fingerprint == shuffled.runs[0].fingerprint != other.fingerprint


def test_the_earlier_augmentation_is_the_same_every_time(toy_data):
    images = toy_data.train.images[:4]
    before = torch.random.get_rng_state()
    one, again, other = (earlier_augmentation(images, 3, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.shape == (4, 3, 32, 32, 3) and one.dtype == torch.uint8
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert not torch.equal(one[:, 0], one[:, 1])


# --- on a folder of images, with images left over ---


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A data set of files: of 100 training images 40 train and 10 validate; and a ResNet of random weights each."""
    folder = tmp_path_factory.mktemp("study")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 10), ("test", 2)):
        for label in range(10):
            (here := folder / "images" / part / f"class{label}").mkdir(parents=True)
            for number in range(count):
                noise = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8) // 2 + 12 * label
                Image.fromarray(noise.numpy()).save(here / f"{number}.png")
    (folder / "weights").mkdir()
    for arch in ("resnet18", "resnet50"):
        save_file(seeded(0, getattr(zoo, arch)).state_dict(), folder / "weights" / f"{arch}.safetensors")
    values = TINY | {
        "data": f"folder:{folder / 'images'}", "weights": str(folder / "weights"), "runs_dir": str(folder / "runs"),
        "max_shift": 0, "test_size": 20,
    }  # fmt: skip
    (folder / "study.yaml").write_text(yaml.safe_dump(values))
    return load_settings(str(folder / "study.yaml"))


@pytest.fixture(scope="module")
def study(settings):
    return Study(settings)


def test_what_is_left_over_is_in_no_part(settings):
    dataset, rest = load_data(settings), left_over(settings)
    assert len(rest.labels) == 100 - 40 - 10
    seen = {tuple(image.flatten().tolist()) for part in (dataset.train, dataset.val) for image in part.images}
    assert len(seen) == 50 and not seen & {tuple(image.flatten().tolist()) for image in rest.images}


def test_a_teacher_labels_its_own_images_as_before(study):
    """Cached equals recomputed: the pool of the training images gets the logits that the students learn from."""
    settings, train = study.settings, study.dataset.train
    pool = pool_of_views("train", train.images, train.labels, **settings.views)
    for teacher in study.teachers:
        taught = teach(teacher, pool, study.dataset, settings)
        for before, after in zip(teacher.runs, taught.runs, strict=True):
            torch.testing.assert_close(after.view_logits, before.view_logits, rtol=2e-3, atol=2e-3)
            assert after.fingerprint != before.fingerprint


def test_held_out_images_are_labelled_by_fine_tunings_on_the_others(study):
    """Other labels of a part change what is said of the rest, and not what is said of that part."""
    settings, dataset, teacher = study.settings, study.dataset, study.teacher
    found = out_of_fold(teacher, dataset, settings, folds=4)
    images, labels = dataset.train
    part = torch.arange(len(labels)).chunk(4)[1]
    others = labels.clone()
    others[part] = (labels[part] + 1) % 10
    changed = training_part(dataset, torch.arange(len(labels)))._replace(train=Split(images, others))
    checksums = changed.part_checksums | {"train": "other labels"}
    again = out_of_fold(teacher, changed._replace(part_checksums=checksums), settings, folds=4)
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[part] = False
    for own, before, after in zip(teacher.runs, found.runs, again.runs, strict=True):
        assert before.view_logits.shape == own.view_logits.shape and before.view_logits.dtype == own.view_logits.dtype
        assert len({own.fingerprint, before.fingerprint, after.fingerprint}) == 3
        assert torch.equal(before.view_logits[part], after.view_logits[part])
        differs = (before.view_logits != after.view_logits).flatten(1).any(dim=1)
        assert differs[rest].all()
    loaded = out_of_fold(teacher, dataset, settings, folds=4)
    assert torch.equal(loaded.runs[0].view_logits, found.runs[0].view_logits)
    assert loaded.runs[0].fingerprint == found.runs[0].fingerprint
    message = message_of(out_of_fold, teacher, dataset, dataclasses.replace(settings, weights="report/teachers"))
    assert "logits only" in message and "give the ResNet's weights" in message


def test_a_student_learns_from_another_student(tiny, toy_data):
    """What the teacher says of every view is what the network says of those pixels, and it is never the student itself."""
    settings = tiny(seeds=[0, 1, 2])
    students = train_students(Method("scratch", cross_entropy), toy_data, settings)
    teacher = as_teacher(students, toy_data, settings)
    assert [teacher.run_for(seed).seed for seed in settings.seeds] == [1, 2, 0]
    viewed, every = make_views(toy_data.train.images, **settings.views), torch.arange(40)
    for student in students:
        (run,) = [run for run in teacher.runs if run.seed == student.seed]
        with torch.no_grad():
            for view in (0, 5):
                expected = student.network()(normalise(view_pixels(viewed, every, torch.full_like(every, view))))
                torch.testing.assert_close(run.view_logits[:, view].float(), expected, rtol=2e-3, atol=2e-3)
    again = as_teacher(students, toy_data, settings)
    assert [run.fingerprint for run in again.runs] == [run.fingerprint for run in teacher.runs]
    arm = Method("kd_self", partial(distillation_loss, temperature=4.0, alpha=0.5), (teacher,))
    taught = train_students(arm, toy_data, settings)
    assert not same_runs(taught, students) and taught[0].teachers == ("student",)


def test_the_teacher_is_chosen_on_validation_images(study):
    better = study.teachers[1]
    swapped = Study(study.settings)
    swapped.dataset = study.dataset
    for run in (*study.teachers[0].runs, *better.runs):
        assert run.logits["val"].shape == (10, 10)
    right = torch.nn.functional.one_hot(study.dataset.val.labels, 10).float()
    good, bad = (
        [dataclasses.replace(run, logits=run.logits | {"val": x}) for run in better.runs] for x in (right, -right)
    )
    swapped.teachers = (dataclasses.replace(better, runs=bad), dataclasses.replace(better, arch="resnet50", runs=good))
    assert swapped.teacher.arch == "resnet50"


CHOSEN = {name.replace("_", "-"): (name, "resnet18", chosen) for name, chosen in OTHER_LOSSES.items()} | {
    "temperature-alpha": ("kd", "resnet18", TUNED["resnet18"]),
    "temperature-alpha-resnet50": ("kd", "resnet50", TUNED["resnet50"]),
}


@pytest.mark.parametrize("file", CHOSEN)
def test_the_losses_are_set_as_their_committed_sweeps_found_best(file):
    what, taught_by, chosen = CHOSEN[file]
    (path,) = (ROOT / "report" / "sweeps").glob(f"*/{file}.csv")
    sweep, rows = read_sweep(path.with_suffix(".yaml")), settings_of_trials(read_rows(path))
    assert sweep.what == what and sweep.trials["baseline"]["teachers"] == taught_by and sweep.seeds == [0, 1, 2]
    assert len(rows.dropna().groupby(["temperature", "alpha"])) == 12  # as many trials for each
    means = rows.groupby(["temperature", "alpha"]).val_accuracy.mean()
    assert means[tuple(chosen[key] for key in ("temperature", "alpha"))] == pytest.approx(means.max())


def test_each_part_is_trained_on_the_same_views_by_its_own_recipe(study):
    wanted = study.settings
    for arch, like in itertools.product(ARCHITECTURES, repeat=2):
        of_part = study.settings_of_part(arch, like)
        for name in ("trainable", "epochs", "learning_rate", "weight_decay"):
            assert of_part.of_teacher(arch, name) == wanted.of_teacher(like, name)
        other = next(name for name in ARCHITECTURES if name != arch)
        assert of_part.of_teacher(other, "epochs") == wanted.of_teacher(other, "epochs")
        assert len(view_table(**of_part.views)) == 2
    parts = study.parts()
    assert [(teacher.arch, teacher.trainable) for teacher, _ in parts] == [
        (arch, part)
        for arch in ("resnet50", "resnet18")
        for part in (wanted.resnet50_trainable, wanted.resnet18_trainable)
    ]
    rows = [row for teacher, of_part in parts for row in teacher_rows(2, teacher, study.dataset, of_part, FREEZE)]
    assert {row["arm"] for row in rows} == {FREEZE + teacher.trainable for teacher, _ in parts}


def test_the_words_about_tuned_losses_name_every_value():
    words = tuned_words()
    for values in (*TUNED.values(), *OTHER_LOSSES.values()):
        assert f"T = {values['temperature']:g}, α = {values['alpha']:g}" in words
    assert "DKD (its own α = 1, β = 2)" in words and words.count(";") == 4


@pytest.mark.parametrize("name", ENTRIES)
def test_every_arm_trains(study, name, monkeypatch):
    monkeypatch.setattr(study_module, "EARLIER_RECIPE", study_module.EARLIER_RECIPE | {"epochs": 1, "batch_size": 10})
    monkeypatch.setattr(study_module, "LONG", 2)
    monkeypatch.setattr(study_module, "DRAWS", 2)
    study.__dict__.pop("earlier", None)
    entry = ENTRIES[name](study)
    (run,) = study.train(entry, [0])
    assert run.arm == entry.arm.name and run.logits["test"].isfinite().all()
    assert entry.task in ("1", "3", "4", "extra")
    if entry.pool is not None and name in ("kd_unlabelled", "scratch_all_labels"):
        assert len(entry.pool.labels) == 90 and entry.settings.epochs == 1  # 2 epochs of 4 steps in steps of 9
        assert (entry.pool.labels == -1).sum() == (50 if name == "kd_unlabelled" else 0)


def test_a_job_trains_one_seed(settings, study, monkeypatch):
    parameters = json.dumps({"runs_dir": settings.runs_dir})
    train_entry(settings.profile, parameters, "no_label_smoothing", 1)
    monkeypatch.setattr("kdutils.training.fit", None)  # would fail
    assert study.train(ENTRIES["no_label_smoothing"](study), [1])[0].seed == 1


def test_logits_alone_cannot_label_other_images(study, tmp_path, monkeypatch):
    (tmp_path / "resnet18-logits.safetensors").write_bytes(b"")
    settings = dataclasses.replace(study.settings, weights=str(tmp_path))
    pool = pool_of_views("others", study.dataset.val.images, study.dataset.val.labels, 0, 1)
    message = message_of(teach, study.teachers[1], pool, study.dataset, settings)
    assert "resnet18" in message and "others" in message and "weights" in message

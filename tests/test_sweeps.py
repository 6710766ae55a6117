"""Sweeps: what is tried, on which images, and what the table says of it."""

from functools import partial

import pandas as pd
import pytest
import torch
import yaml
from conftest import message_of
from safetensors.torch import save_file
from test_students import fake_teacher

from kdutils import students, teachers
from kdutils.__main__ import main
from kdutils.compat import ensure_torchvision
from kdutils.data.images import load_data, rotate_validation
from kdutils.lab import sweeps
from kdutils.lab.sweeps import (
    COLUMNS,
    committed_sweeps,
    grid_sweep,
    is_map,
    labelled_checksum,
    read_rows,
    read_sweep,
    run_sweep,
    sweep_table,
    try_grid,
)
from kdutils.losses import combine_teachers, distillation_loss
from kdutils.models import seeded
from kdutils.settings import ROOT, load_settings
from kdutils.students import Method, train_students
from kdutils.teachers import check_weights, fine_tune

GOOD = {
    "title": "A title", "what": "resnet18", "folds": [0, 2], "seeds": [0], "fixed": {"resnet18_epochs": 2},
    "grids": [{}, {"resnet18_learning_rate": [0.001, 0.01], "teacher_views": [1]}],
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def to_file(**changes):
        path = tmp_path / "try.yaml"
        path.write_text(
            yaml.safe_dump({name: value for name, value in {**GOOD, **changes}.items() if value is not None})
        )
        return path

    return to_file


@pytest.fixture
def profile(tiny_profile, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    for arch in ("resnet18", "resnet50"):
        save_file(seeded(0, getattr(ensure_torchvision().models, arch)).state_dict(), folder / f"{arch}.safetensors")
    return tiny_profile(weights=str(folder), max_shift=0, resnet18_trainable="last_layer")


def test_a_grid_is_all_combinations_on_top_of_what_is_fixed(write):
    sweep = read_sweep(write())
    assert sweep.trials == {
        "baseline": {"resnet18_epochs": 2},
        "resnet18_learning_rate = 0.001, teacher_views = 1":
            {"resnet18_epochs": 2, "resnet18_learning_rate": 0.001, "teacher_views": 1},
        "resnet18_learning_rate = 0.01, teacher_views = 1":
            {"resnet18_epochs": 2, "resnet18_learning_rate": 0.01, "teacher_views": 1},
    }  # fmt: skip
    assert sweep.name == "try" and sweep.baseline == "resnet18_epochs = 2"


@pytest.mark.parametrize("changes, fragments", [
    ({"title": None}, ["title", "text"]), ({"grids": []}, ["grids", "list"]), ({"folds": 0}, ["folds", "list"]),
    ({"folds": [0, -1]}, ["folds", "whole numbers"]), ({"folds": [1, 1]}, ["folds", "different"]),
    ({"grids": [5]}, ["setting: values"]), ({"fixed": ["epochs"]}, ["setting: values"]),
    ({"grids": [{"alpha": 0.5}]}, ["baseline"]), ({"grids": [{}, {"alpha": []}]}, ["a value"]),
    ({"grids": [{}, {"profile": "demo"}]}, ["profile"]), ({"seeds": ["x"]}, ["seeds", "whole numbers"]),
    ({"what": "vgg"}, ["vgg", "resnet50", "resnet18"]), ({"extra": 1}, ["extra"]),
    ({"grids": [{}, {"resnet18_learning": [1]}]}, ["resnet18_learning", "did you mean 'resnet18_learning_rate'"]),
])  # fmt: skip
def test_an_unfit_sweep_is_named(write, changes, fragments):
    message = message_of(read_sweep, write(**changes))
    assert message.startswith("sweep") and all(fragment in message for fragment in fragments), message


def test_a_sweep_that_is_not_there(tmp_path):
    assert "none.yaml" in message_of(read_sweep, tmp_path / "none.yaml")


@pytest.mark.parametrize("grid", [{"train_size": [20]}, {"data": ["cifar10"]}, {"split_seed": [1]}])
def test_all_trials_see_the_same_images(write, profile, tmp_path, grid):
    assert "same images" in message_of(run_sweep, read_sweep(write(grids=[{}, grid])), profile, {}, tmp_path / "x.csv")


def test_unfit_settings_stop_a_sweep_before_its_first_trial(write, profile, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "try_fine_tuning", lambda *_: pytest.fail("something was trained"))
    sweep = read_sweep(write(grids=[{}, {"resnet18_learning_rate": [-1]}]))
    assert message_of(run_sweep, sweep, profile, {}, tmp_path / "x.csv").startswith("resnet18_learning_rate: ")


def test_a_sweep_is_every_trial_on_every_fold_and_nothing_twice(write, profile, tmp_path, capsys, monkeypatch):
    path = write()
    command = ["sweep", str(path), "--profile", profile, "--out", str(tmp_path / "out")]
    assert main(command) == 0
    rows = pd.read_csv(tmp_path / "out" / "try.csv")
    assert tuple(rows.columns) == COLUMNS and len(rows) == 3 * 2 and set(rows.fold) == {0, 2}
    assert list(rows.trial.unique()) == list(read_sweep(path).trials) and set(rows.epochs) == {2}
    assert set(rows.views[rows.trial == "baseline"]) == {2} and set(rows.views[rows.trial != "baseline"]) == {1}
    assert rows.val_accuracy.between(0, 1).all() and (rows.val_nll > 0).all()
    text = (tmp_path / "out" / "try.csv").read_text()
    assert "epoch" in capsys.readouterr().out
    monkeypatch.setattr(teachers, "fit", lambda *_, **__: pytest.fail("something was trained again"))
    assert main(command) == 0 and (tmp_path / "out" / "try.csv").read_text() == text
    assert "baseline" in capsys.readouterr().out


def test_a_sweep_never_looks_at_test_images(write, profile, tmp_path, monkeypatch):
    real = teachers.FineTuning.features

    def features(self, part, view):
        assert part != "test"
        return real(self, part, view)

    monkeypatch.setattr(teachers.FineTuning, "features", features)
    run_sweep(read_sweep(write(grids=[{}])), profile, {}, tmp_path / "x.csv")


def test_the_table_compares_with_the_first_trial_in_pairs():
    rows = pd.DataFrame({
        "trial": ["a"] * 3 + ["b"] * 3, "val_accuracy": [0.5, 0.6, 0.7, 0.52, 0.62, 0.72], "val_nll": 1.0,
        "train_accuracy": 0.9, "views": 2, "epochs": 5,
    })  # fmt: skip
    table = sweep_table(rows)
    assert list(table["Difference"]) == ["–", "+2.00 [+2.00, +2.00]"] and list(table["n"]) == [3, 3]
    assert list(table["Validation (%)"]) == ["60.00 ± 10.00", "62.00 ± 10.00"]
    assert list(sweep_table(rows.iloc[[0, 3]])["Difference"]) == ["–", "+2.00"]
    of_two = sweep_table(rows.iloc[[0, 1, 3, 4]])  # an interval of two runs would say nothing
    assert list(of_two["Difference"]) == ["–", "+2.00"] and list(of_two["n"]) == [2, 2]
    again = rows[rows.trial == "a"].assign(trial="the same as a")
    assert sweep_table(pd.concat([rows, again])).equals(table)


def test_the_committed_sweeps_are_complete():
    files = sorted((ROOT / "report" / "sweeps").glob("*/*.yaml"))
    assert files
    for path in files:
        sweep, rows = read_sweep(path), read_rows(path.with_suffix(".csv"))
        expected = len(sweep.trials) * len(sweep.folds) * len(sweep.seeds)
        assert set(rows.trial) == set(sweep.trials) and len(rows) == expected, path
        assert rows.data.nunique() == 1 and sweep.caption.endswith(f"Baseline: {sweep.baseline}.")


def test_committed_sweeps_are_shown_for_their_own_images_and_weights_alone(tiny, toy_data, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "SWEEPS", tmp_path)
    folder = tmp_path / "tiny"
    folder.mkdir()
    teacher = fake_teacher(toy_data)
    data = labelled_checksum(toy_data)
    for name, what, weights, seen in (
        ("of-it", "kd", teacher.checksum, data), ("of-other-weights", "kd", "other", data),
        ("of-other-images", "kd", teacher.checksum, "x+y"), ("not-run", "kd", None, data), ("alone", "scratch", "", data),
    ):  # fmt: skip
        sweep = GOOD | {"what": what, "folds": [0], "fixed": {}, "grids": [{}]}
        sweep |= {"teachers": "resnet18"} if what == "kd" else {}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(sweep))
        if weights is not None:
            row = {column: 0 for column in COLUMNS} | {"data": seen, "weights": weights}
            pd.DataFrame([row]).to_csv(folder / f"{name}.csv", index=False)

    def shown(*arguments):
        return [sweep.name for sweep, _ in committed_sweeps(tiny(), toy_data, *arguments)]

    assert shown(["kd"], [teacher]) == ["of-it"] and shown(["kd"]) == []
    assert shown(["scratch"]) == ["alone"] and shown(["kd", "scratch"], [teacher]) == ["alone", "of-it"]
    monkeypatch.setattr(sweeps, "SWEEPS", tmp_path / "absent")
    assert shown(["kd"], [teacher]) == []


# Students


TAUGHT = {"what": "kd", "teachers": ["resnet18"], "folds": None, "fixed": None}


@pytest.mark.parametrize("changes, fragments", [
    ({"teachers": None}, ["teachers: ''", "resnet18"]), ({"teachers": ["vgg"]}, ["teachers: 'vgg'"]),
    ({"teachers": ["resnet18", "resnet18"]}, ["teachers: 'resnet18+resnet18'"]), ({"rule": "mean"}, ["rule: 'mean'"]),
    ({"grids": [{}, {"teachers": ["resnet50", "resnet"]}]}, ["teachers: 'resnet'"]),
    ({"folds": [0, 1]}, ["folds", "fine-tuned on images", "[0]"]), ({"what": "scratch"}, ["teachers", "not taught"]),
    ({"what": "resnet18"}, ["needs 'folds'"]), ({"grids": [{}, {"rul": ["mean_prob"]}]}, ["no setting 'rul'"]),
])  # fmt: skip
def test_an_unfit_sweep_of_students_is_named(write, changes, fragments):
    message = message_of(read_sweep, write(**{**TAUGHT, "grids": [{}, {"alpha": [0.5]}], **changes}))
    assert message.startswith("sweep") and all(fragment in message for fragment in fragments), message


def test_teachers_and_their_rule_can_be_tried_like_settings(write):
    grids = [{}, {"teachers": ["resnet18+resnet50"], "rule": ["mean_prob", "mean_logit"]}]
    sweep = read_sweep(write(**{**TAUGHT, "grids": grids}))
    assert list(sweep.trials.values()) == [
        {"teachers": "resnet18"}, {"teachers": "resnet18+resnet50", "rule": "mean_prob"},
        {"teachers": "resnet18+resnet50", "rule": "mean_logit"},
    ]  # fmt: skip
    assert sweep.folds == [0] and sweep.baseline == "teachers = resnet18"


def test_a_grid_needs_no_file():
    sweep = grid_sweep("kd", ["temperature=1, 4", "alpha=0.5", "seeds=3,5"], [0])
    assert (sweep.what, sweep.folds, sweep.seeds) == ("kd", [0], [3, 5])
    assert sweep.trials == {
        "temperature = 1, alpha = 0.5": {"teachers": "resnet18", "temperature": "1", "alpha": "0.5"},
        "temperature = 4, alpha = 0.5": {"teachers": "resnet18", "temperature": "4", "alpha": "0.5"},
    }
    assert grid_sweep("scratch", ["epochs=1"], [0]).trials == {"epochs = 1": {"epochs": "1"}}
    assert set(grid_sweep("kd", ["teachers=resnet50,resnet18+resnet50"], [7]).trials) == {
        "teachers = resnet50", "teachers = resnet18+resnet50",
    }  # fmt: skip


@pytest.mark.parametrize("arguments, fragments", [
    ([], ["FILE or --grid"]), (["x.yaml", "--grid", "alpha=1"], ["FILE or --grid"]), (["x.yaml", "--what", "kd"], ["--what"]),
    (["--grid", "alpha"], ["--grid: 'alpha'"]), (["--grid", "alpha="], ["--grid: 'alpha='"]),
    (["--grid", "alpha=1", "--grid", "alpha=0"], ["--grid: 'alpha=0'", "once"]), (["--grid", "alfa=1"], ["'alpha'"]),
    (["--grid", "alpha=2"], ["alpha: '2'", "from 0 to 1"]), (["--grid", "alpha=1,,0"], ["alpha: ''"]),
    (["--grid", "seeds=a"], ["--grid seeds"]), (["--grid", "alpha=1", "--what", "vgg"], ["vgg", "scratch"]),
    (["--grid", "alpha=1", "--workers", "0"], ["--workers: '0'", "1 or more"]),
    (["--grid", "alpha=1", "--workers", "2", "--scheduler", "x"], ["--workers"]),
    (["--grid", "train_size=20"], ["same images"]), (["--grid", "profile=demo"], ["--profile"]),
])  # fmt: skip
def test_an_unfit_command_is_named_before_anything_is_trained(error_of, tiny_profile, tmp_path, arguments, fragments):
    message = error_of(["sweep", *arguments, "--profile", tiny_profile()])
    assert all(fragment in message for fragment in fragments), message
    assert not (tmp_path / "runs" / "tiny" / "teachers").exists()


def test_students_are_those_of_the_notebooks_and_never_see_test_images(tiny_profile, tmp_path, monkeypatch):
    monkeypatch.setattr(students, "predict", lambda *_, **__: pytest.fail("a student was given other images"))
    profile = tiny_profile(max_shift=0)
    grid = ["teachers=resnet18,resnet18+resnet50", "temperature=2.0,4.0", "alpha=0.9"]
    rows = run_sweep(grid_sweep("kd", grid, [0]), profile, {}, tmp_path / "x.csv")
    assert tuple(rows.columns) == COLUMNS and len(rows) == 4 and set(rows.fold) == {0} and set(rows.epochs) == {2}
    assert list(rows.what.unique()) == ["kd resnet18", "kd_mean_prob resnet50 resnet18"]
    assert set(rows.weights) == {"none", "none+none"} and set(rows.views) == {2}

    monkeypatch.undo()
    monkeypatch.setattr(students, "fit", lambda *_, **__: pytest.fail("a student was trained again"))
    settings = load_settings(profile, seeds=[0])
    dataset = load_data(settings)
    both = tuple(fine_tune(arch, dataset, settings) for arch in ("resnet50", "resnet18"))
    distil = partial(distillation_loss, temperature=4.0, alpha=0.9, label_smoothing=settings.kd_label_smoothing)
    train_students(Method("kd", distil, both[1:]), dataset, settings)
    combine = partial(combine_teachers, rule="mean_prob", temperature=4.0)
    (found,) = train_students(Method("kd_mean_prob", distil, both, combine), dataset, settings)
    row = rows[rows.trial == "teachers = resnet18+resnet50, temperature = 4.0, alpha = 0.9"]
    assert row.val_nll.item() == pytest.approx(found.history["val_loss"][-1], abs=1e-6)


def test_processes_find_what_is_shared_and_do_nothing_twice(tiny_profile, tmp_path, capsys):
    command = ["sweep", "--profile", tiny_profile(max_shift=0), "--grid", "alpha=0.9,0.90", "--grid", "temperature=2,4"]
    assert main([*command, "--workers", "2"]) == 0
    path = tmp_path / "runs" / "tiny" / "sweeps" / "kd-alpha-temperature.csv"
    text, rows = path.read_text(), read_rows(path)
    assert len(rows) == 8 and len(list((tmp_path / "runs" / "tiny" / "students").glob("kd-*"))) == 4
    assert list(rows.val_nll[:4]) == list(rows.val_nll[4:])  # both spellings of alpha name the same trials
    assert "alpha = 0.90, temperature = 4" in capsys.readouterr().out
    (tmp_path / "again").mkdir()
    assert main([*command, "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / path.name).read_text() == text
    assert "epoch" not in capsys.readouterr().out  # nothing was trained


def test_students_from_scratch_rotate_their_folds(write, tiny_profile, tmp_path):
    sweep = read_sweep(write(what="scratch", folds=[0, 2], fixed={"epochs": 1}, grids=[{}, {"learning_rate": [0.01]}]))
    rows = run_sweep(sweep, tiny_profile(), {}, tmp_path / "x.csv")
    assert len(rows) == 4 and set(rows.what) == {"scratch"} and set(rows.weights) == {""} and set(rows.epochs) == {1}
    assert len(set(rows.val_nll)) == 4


def test_a_trial_that_fails_is_named_and_the_others_are_kept(tiny_profile, tmp_path, capsys):
    command = ["sweep", "--profile", tiny_profile(optimizer="sgd"), "--what", "scratch", "--grid", "seeds=0"]
    assert main([*command, "--grid", "learning_rate=0.001,1e30"]) == 1
    out, err = capsys.readouterr()
    assert out.count("learning_rate = 1e30, fold 0, seed 0: failed") == 2
    assert "1 of 2 failed twice" in err and "lower the learning rate" in err
    assert len(list((tmp_path / "runs" / "tiny" / "students").glob("scratch-seed0-*.safetensors"))) == 1
    assert not (tmp_path / "runs" / "tiny" / "sweeps" / "scratch-learning_rate.csv").exists()


def test_a_notebooks_grid_is_the_sweep_of_its_own_settings(tiny, tmp_path):
    settings = tiny(max_shift=0, epochs=1)
    ((sweep, rows),) = try_grid("kd", ["temperature=1,2", "alpha=0.5"], settings)
    assert is_map(sweep) and list(rows.trial.unique()) == [f"temperature = {t}, alpha = 0.5" for t in (1, 2)]
    assert set(rows.seed) == set(settings.seeds) and set(rows.epochs) == {1} and set(rows.views) == {2}
    ((alone, _),) = try_grid("scratch", ["learning_rate=0.01"], settings)
    assert not is_map(alone)


@pytest.mark.parametrize("what, grid", [
    ("resnet18", ["resnet18_learning_rate=0.001,0.01"]), ("scratch", ["learning_rate=0.01,0.001"]),
    ("kd", ["alpha=0.5,1.0"]), ("kd", ["teachers=resnet18+resnet50"]),
])  # fmt: skip
def test_other_test_labels_change_nothing_of_what_is_chosen(profile, tmp_path, monkeypatch, what, grid):
    """Every trial, trained anew, does the same: no setting is chosen, and nothing trained, by a look at them."""
    tables = []
    for turn in (0, 3):

        def load(settings, turn=turn):
            found = load_data(settings)
            labels = found.test.labels.roll(turn)
            assert turn == 0 or not torch.equal(labels, found.test.labels)
            return found._replace(test=found.test._replace(labels=labels))

        monkeypatch.setattr(sweeps, "load_data", load)
        sweeps._images.cache_clear()
        rows = run_sweep(
            grid_sweep(what, grid, [0]), profile, {"runs_dir": str(tmp_path / f"runs{turn}")}, tmp_path / "x.csv"
        )
        tables.append(sweep_table(rows).to_dict())
    sweeps._images.cache_clear()
    assert tables[0] == tables[1]


# Rotated validation folds


def test_folds_hold_out_every_image_once(toy_data):
    everything = torch.cat([toy_data.train.images, toy_data.val.images])
    held_out = []
    for fold in range(5):
        rotated = rotate_validation(toy_data, fold)
        together = torch.cat([rotated.train.images, rotated.val.images])
        assert sorted(map(hash_of, together)) == sorted(map(hash_of, everything))
        assert (len(rotated.train.labels), len(rotated.val.labels)) == (40, 10)
        assert torch.equal(rotated.test.images, toy_data.test.images)
        of = {hash_of(image): int(label) for image, label in zip(everything, labels_of(toy_data), strict=True)}
        assert [of[hash_of(image)] for image in together] == labels_of(rotated).tolist()
        held_out += map(hash_of, rotated.val.images)
    assert len(set(held_out)) == 50
    assert rotate_validation(toy_data, 0) is toy_data
    assert len({rotate_validation(toy_data, fold).checksum for fold in range(5)}) == 5
    assert "folds 0 to 4" in message_of(rotate_validation, toy_data, 5)


def hash_of(image):
    return hash(image.numpy().tobytes())


def labels_of(dataset):
    return torch.cat([dataset.train.labels, dataset.val.labels])


# What is checked before anything is trained


def test_weights_are_checked_unless_the_teacher_is_made(tiny, profile, toy_data, tmp_path, monkeypatch):
    settings = tiny(weights=str(tmp_path / "weights"), max_shift=0, resnet18_trainable="last_layer")
    check_weights("resnet18", toy_data, settings)
    fine_tune("resnet18", toy_data, settings)
    (tmp_path / "weights" / "resnet50.safetensors").write_bytes(b"damaged")
    with monkeypatch.context() as patched:
        patched.setattr(teachers, "load_backbone", lambda *_: pytest.fail("loaded"))
        check_weights("resnet18", toy_data, settings)
    assert "cannot be read" in message_of(check_weights, "resnet50", toy_data, settings)


def test_the_settings_of_a_trial_become_columns():
    names = ["baseline", "temperature = 2.0, alpha = 0.5", "alpha = 1e-05", "weights = folder, alpha = 1"]
    frame = pd.DataFrame({"trial": names, "val_accuracy": 0.5})
    found = sweeps.settings_of_trials(frame)
    assert found[["temperature", "alpha"]].isna().values.tolist() == [
        [True, True],
        [False, False],
        [True, False],
        [True, False],
    ]
    assert found["alpha"].tolist()[1:] == [0.5, 1e-5, 1] and "weights" not in found
    assert found["trial"].tolist() == names

"""Sweeps: what is tried, on which images, and what the table says of it."""

import shutil
from functools import partial

import pandas as pd
import pytest
import torch
import yaml
from conftest import fake_teacher, message_of

from kdutils import students, teachers
from kdutils.__main__ import main
from kdutils.data.images import load_data, rotate_validation
from kdutils.lab import sweeps as running
from kdutils.lab.sweeps import grid_sweep, run_sweep
from kdutils.losses import combine_teachers, distillation_loss
from kdutils.results import sweeps as reading
from kdutils.results.sweeps import (
    committed_sweeps,
    is_map,
    labelled_checksum,
    read_rows,
    read_sweep,
    settings_of_trials,
    sweep_table,
)
from kdutils.settings import ROOT, load_settings
from kdutils.students import Method, train_students
from kdutils.teachers import check_weights, fine_tune

COLUMNS = "what data weights trial fold seed views epochs val_accuracy val_nll train_accuracy seconds".split()
GOOD = {
    "title": "A title", "what": "teacher", "teachers": "resnet18", "folds": [0, 2], "seeds": [0],
    "fixed": {"teacher_epochs": 2}, "grids": [{}, {"teacher_learning_rate": [0.001, 0.01], "teacher_views": [1]}],
}  # fmt: skip
TAUGHT = {"what": "kd", "teachers": ["resnet18"], "folds": None, "fixed": None, "grids": [{}, {"alpha": [0.5]}]}


@pytest.fixture
def write(tmp_path):
    """Writes the good sweep, changed as asked (None leaves a line out)."""

    def to_file(**changes):
        content = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
        (tmp_path / "try.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "try.yaml"

    return to_file


TWO = ["resnet18", {"name": "mobilenetv3_small_100", "label": "Mobile"}]


@pytest.fixture
def profile(tiny_profile, weights_folder):
    return tiny_profile(weights=weights_folder, max_shift=0, teachers=TWO)


# --- what is tried ---


def test_a_grid_is_all_combinations_on_top_of_what_is_fixed(write):
    sweep, fixed = read_sweep(write()), {"teachers": "resnet18", "teacher_epochs": 2}
    assert sweep.trials == {"baseline": fixed} | {
        f"teacher_learning_rate = {rate}, teacher_views = 1": fixed
        | {"teacher_learning_rate": rate, "teacher_views": 1}
        for rate in (0.001, 0.01)
    }
    assert sweep.name == "try" and sweep.baseline == "teachers = resnet18, teacher_epochs = 2"


def test_teachers_and_their_rule_can_be_tried_like_settings(write):
    grids = [{}, {"teachers": ["resnet18+Mobile"], "rule": ["mean_prob", "mean_logit"]}]
    sweep = read_sweep(write(**{**TAUGHT, "grids": grids}))
    both = {"teachers": "resnet18+Mobile"}
    assert list(sweep.trials.values()) == [
        {"teachers": "resnet18"}, both | {"rule": "mean_prob"}, both | {"rule": "mean_logit"},
    ]  # fmt: skip
    assert sweep.folds == [0] and sweep.baseline == "teachers = resnet18"


@pytest.mark.parametrize("changes, fragments", [
    ({"title": None}, ["title", "text"]), ({"grids": []}, ["grids", "list"]), ({"folds": 0}, ["folds", "list"]),
    ({"folds": [0, -1]}, ["folds", "whole numbers"]), ({"folds": [1, 1]}, ["folds", "different"]),
    ({"grids": [5]}, ["setting: values"]), ({"fixed": ["epochs"]}, ["setting: values"]),
    ({"grids": [{"alpha": 0.5}]}, ["baseline"]), ({"grids": [{}, {"alpha": []}]}, ["no value"]),
    ({"grids": [{}, {"profile": "demo"}]}, ["profile"]), ({"seeds": ["x"]}, ["seeds", "whole numbers"]),
    ({"what": "vgg"}, ["vgg", "teacher", "scratch"]), ({"extra": 1}, ["extra"]),
    ({"grids": [{}, {"teacher_learning": [1]}]}, ["teacher_learning", "did you mean 'teacher_learning_rate'"]),
    (TAUGHT | {"teachers": None}, ["teachers: None", "label"]), ({"teachers": None}, ["teachers: None"]),
    ({"teachers": "resnet18+Mobile"}, ["teachers: 'resnet18+Mobile'"]),
    (TAUGHT | {"teachers": ["resnet18", "resnet18"]}, ["teachers: 'resnet18+resnet18'"]),
    (TAUGHT | {"rule": "mean"}, ["rule: 'mean'"]), (TAUGHT | {"what": "scratch"}, ["teachers", "no teachers"]),
    (TAUGHT | {"grids": [{}, {"teachers": ["resnet50", "resnet18+"]}]}, ["teachers: 'resnet18+'"]),
    (TAUGHT | {"folds": [0, 1]}, ["folds", "fine-tuned on images", "[0]"]),
    (TAUGHT | {"what": "teacher"}, ["needs 'folds'"]),
    (TAUGHT | {"grids": [{}, {"rul": ["mean_prob"]}]}, ["no setting 'rul'"]),
])  # fmt: skip
def test_an_unfit_sweep_is_named(write, changes, fragments):
    message = message_of(read_sweep, write(**changes))
    assert message.startswith("sweep") and all(fragment in message for fragment in fragments), message


def test_a_sweep_that_is_not_there_is_named(tmp_path):
    assert "none.yaml" in message_of(read_sweep, tmp_path / "none.yaml")


def test_a_grid_needs_no_file():
    sweep = grid_sweep("kd", ["temperature=1, 4", "alpha=0.5", "seeds=3,5"], [0], "R18")
    assert (sweep.what, sweep.folds, sweep.seeds) == ("kd", [0], [3, 5]) and is_map(sweep)
    assert sweep.trials == {
        f"temperature = {t}, alpha = 0.5": {"teachers": "R18", "temperature": t, "alpha": "0.5"} for t in "14"
    }
    alone = grid_sweep("scratch", ["epochs=1"], [0], "R18")
    assert alone.trials == {"epochs = 1": {"epochs": "1"}} and not is_map(alone)
    taught_by = grid_sweep("kd", ["teachers=resnet50,resnet18+Mobile"], [7], "R18").trials
    assert set(taught_by) == {"teachers = resnet50", "teachers = resnet18+Mobile"}


@pytest.mark.parametrize("arguments, fragments", [
    ([], ["FILE or --grid"]), (["x.yaml", "--grid", "alpha=1"], ["FILE or --grid"]), (["x.yaml", "--what", "kd"], ["--what"]),
    (["--grid", "alpha"], ["--grid: 'alpha'"]), (["--grid", "alpha="], ["--grid: 'alpha='"]),
    (["--grid", "alpha=1", "--grid", "alpha=0"], ["--grid: 'alpha=0'", "once"]), (["--grid", "alfa=1"], ["'alpha'"]),
    (["--grid", "alpha=2"], ["alpha: '2'", "from 0 to 1"]), (["--grid", "alpha=1,,0"], ["alpha: ''"]),
    (["--grid", "teachers=vgg"], ["'vgg'", "resnet50, resnet18"]),
    (["--grid", "seeds=a"], ["--grid seeds"]), (["--grid", "alpha=1", "--what", "vgg"], ["vgg", "scratch"]),
    (["--grid", "alpha=1", "--workers", "0"], ["--workers: '0'", "1 or more"]),
    (["--grid", "alpha=1", "--workers", "2", "--scheduler", "x"], ["--workers"]),
    (["--grid", "train_size=20"], ["train_size", "same images"]), (["--grid", "data=cifar10"], ["same images"]),
    (["--grid", "split_seed=1"], ["same images"]), (["--grid", "profile=demo"], ["--profile"]),
])  # fmt: skip
def test_an_unfit_command_is_named_before_anything_is_trained(error_of, tiny_profile, tmp_path, arguments, fragments):
    message = error_of(["sweep", *arguments, "--profile", tiny_profile()])
    assert all(fragment in message for fragment in fragments), message
    assert not (tmp_path / "runs" / "tiny" / "teachers").exists()


def test_unfit_settings_stop_a_sweep_before_its_first_trial(write, profile, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "try_fine_tuning", lambda *_: pytest.fail("something was trained"))
    for name in ("teacher_learning_rate", "batch_size"):
        sweep = read_sweep(write(grids=[{}, {name: [-1]}]))
        assert message_of(run_sweep, sweep, profile, {}, tmp_path / "x.csv").startswith(f"{name}: ")
    sweep = read_sweep(write(teachers="vgg"))
    assert "use one of resnet18, Mobile" in message_of(run_sweep, sweep, profile, {}, tmp_path / "x.csv")


# --- what it finds ---


def test_a_sweep_is_every_trial_on_every_fold_and_nothing_twice(write, profile, tmp_path, capsys, monkeypatch):
    path, out = write(), tmp_path / "out" / "try.csv"
    command = ["sweep", str(path), "--profile", profile, "--out", str(out.parent)]
    assert main(command) == 0
    rows = pd.read_csv(out)
    assert list(rows.columns) == COLUMNS and len(rows) == 3 * 2 and set(rows.fold) == {0, 2}
    assert list(rows.trial.unique()) == list(read_sweep(path).trials) and set(rows.epochs) == {2}
    assert set(rows.views[rows.trial == "baseline"]) == {2} and set(rows.views[rows.trial != "baseline"]) == {1}
    assert rows.val_accuracy.between(0, 1).all() and (rows.val_nll > 0).all()
    text = out.read_text()
    assert "epoch" in capsys.readouterr().out
    monkeypatch.setattr(teachers, "fit", lambda *_, **__: pytest.fail("something was trained again"))
    assert main(command) == 0 and out.read_text() == text
    assert "baseline" in capsys.readouterr().out


def test_students_from_scratch_rotate_their_folds(write, tiny_profile, tmp_path):
    sweep = read_sweep(
        write(what="scratch", teachers=None, folds=[0, 2], fixed={"epochs": 1}, grids=[{}, {"learning_rate": [0.01]}])
    )
    rows = run_sweep(sweep, tiny_profile(), {}, tmp_path / "x.csv")
    assert len(rows) == 4 and set(rows.what) == {"scratch"} and set(rows.weights) == {""} and set(rows.epochs) == {1}
    assert len(set(rows.val_nll)) == 4


def test_distilled_students_are_those_of_the_notebooks(profile, tmp_path, monkeypatch):
    monkeypatch.setattr(students, "predict", lambda *_, **__: pytest.fail("a student was given other images"))
    grid = ["teachers=resnet18,resnet18+Mobile", "temperature=2.0,4.0", "alpha=0.9"]
    rows = run_sweep(grid_sweep("kd", grid, [0], "resnet18"), profile, {}, tmp_path / "x.csv")
    assert list(rows.columns) == COLUMNS and len(rows) == 4 and set(rows.fold) == {0} and set(rows.epochs) == {2}
    assert list(rows.what.unique()) == ["kd resnet18", "kd_mean_prob resnet18 Mobile"]
    assert [weights.count("+") for weights in rows.weights] == [0, 0, 1, 1] and set(rows.views) == {2}

    monkeypatch.undo()
    monkeypatch.setattr(students, "fit", lambda *_, **__: pytest.fail("a student was trained again"))
    settings = load_settings(profile, seeds=[0])
    dataset = load_data(settings)
    both = tuple(fine_tune(teacher, dataset, settings) for teacher in settings.teachers)
    distil = partial(distillation_loss, temperature=4.0, alpha=0.9, label_smoothing=settings.kd_label_smoothing)
    train_students(Method("kd", distil, both[:1]), dataset, settings)
    combine = partial(combine_teachers, rule="mean_prob", temperature=4.0)
    (found,) = train_students(Method("kd_mean_prob", distil, both, combine), dataset, settings)
    row = rows[rows.trial == "teachers = resnet18+Mobile, temperature = 4.0, alpha = 0.9"]
    assert row.val_nll.item() == pytest.approx(found.history["val_loss"][-1], abs=1e-6)


def test_processes_find_what_is_shared_and_do_nothing_twice(profile, tmp_path, capsys):
    command = ["sweep", "--profile", profile, "--grid", "alpha=0.9,0.90", "--grid", "temperature=2,4"]
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


def test_a_trial_that_fails_is_named_and_the_others_are_kept(tiny_profile, tmp_path, capsys):
    command = ["sweep", "--profile", tiny_profile(optimizer="sgd"), "--what", "scratch", "--grid", "seeds=0"]
    assert main([*command, "--grid", "learning_rate=0.001,1e30"]) == 1
    out, err = capsys.readouterr()
    assert out.count("learning_rate = 1e30, fold 0, seed 0: failed") == 2
    assert "1 of 2 failed twice" in err and "lower the learning rate" in err
    assert len(list((tmp_path / "runs" / "tiny" / "students").glob("scratch-seed0-*.safetensors"))) == 1
    assert not (tmp_path / "runs" / "tiny" / "sweeps" / "scratch-learning_rate.csv").exists()


@pytest.mark.parametrize("what, grid", [
    ("teacher", ["teacher_learning_rate=0.001,0.01"]), ("scratch", ["learning_rate=0.01,0.001"]),
    ("kd", ["alpha=0.5,1.0"]), ("kd", ["teachers=resnet18+Mobile"]),
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

        monkeypatch.setattr(running, "load_data", load)
        running._images.cache_clear()
        given = {"runs_dir": str(tmp_path / f"runs{turn}")}
        tables.append(
            sweep_table(
                run_sweep(grid_sweep(what, grid, [0], "resnet18"), profile, given, tmp_path / "x.csv")
            ).to_dict()
        )
    running._images.cache_clear()
    assert tables[0] == tables[1]


def test_a_sweep_of_fine_tunings_never_looks_at_test_images(write, profile, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "load_data", lambda settings: load_data(settings)._replace(test=None))
    running._images.cache_clear()
    run_sweep(read_sweep(write(grids=[{}])), profile, {}, tmp_path / "x.csv")
    running._images.cache_clear()


# --- what is said of it ---


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


def test_the_settings_of_a_trial_become_columns():
    names = ["baseline", "temperature = 2.0, alpha = 0.5", "alpha = 1e-05", "weights = folder, alpha = 1"]
    found = settings_of_trials(pd.DataFrame({"trial": names, "val_accuracy": 0.5}))
    assert list(found.temperature.isna()) == [True, False, True, True] and found.temperature[1] == 2
    assert list(found.alpha.fillna(-1)) == [-1, 0.5, 1e-5, 1] and "weights" not in found and list(found.trial) == names


def test_the_committed_sweeps_are_complete():
    sweeps = {path: read_sweep(path) for path in sorted((ROOT / "report" / "sweeps").glob("*/*.yaml"))}
    done = [path for path in sweeps if path.with_suffix(".csv").exists()]
    assert done
    for path in done:
        sweep, rows = sweeps[path], read_rows(path.with_suffix(".csv"))
        expected = len(sweep.trials) * len(sweep.folds) * len(sweep.seeds)
        assert set(rows.trial) == set(sweep.trials) and len(rows) == expected, path
        assert rows.data.nunique() == 1 and sweep.caption.endswith(f"Baseline: {sweep.baseline}.")


def test_committed_sweeps_are_shown_for_their_own_images_and_weights_alone(tiny, toy_data, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "SWEEPS", tmp_path)
    folder, teacher, data = tmp_path / "tiny", fake_teacher(toy_data), labelled_checksum(toy_data)
    folder.mkdir()
    for name, what, weights, seen in (
        ("of-it", "kd", teacher.checksum, data), ("of-other-weights", "kd", "other", data),
        ("of-other-images", "kd", teacher.checksum, "x+y"), ("not-run", "kd", None, data), ("alone", "scratch", "", data),
    ):  # fmt: skip
        sweep = GOOD | {"what": what, "folds": [0], "fixed": {}, "grids": [{}]}
        if what == "scratch":
            del sweep["teachers"]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(sweep))
        if weights is not None:
            row = {column: 0 for column in COLUMNS} | {"data": seen, "weights": weights}
            pd.DataFrame([row]).to_csv(folder / f"{name}.csv", index=False)

    def shown(*arguments):
        return [sweep.name for sweep, _ in committed_sweeps(tiny(), toy_data, *arguments)]

    assert shown(["kd"], [teacher]) == ["of-it"] and shown(["kd"]) == []
    assert shown(["scratch"]) == ["alone"] and shown(["kd", "scratch"], [teacher]) == ["alone", "of-it"]
    monkeypatch.setattr(reading, "SWEEPS", tmp_path / "absent")
    assert shown(["kd"], [teacher]) == []


# --- rotated validation folds ---


def test_folds_hold_out_every_image_once(toy_data):
    def labelled(dataset):
        """The labels of the training and validation images by their pixels."""
        pairs = (pair for part in (dataset.train, dataset.val) for pair in zip(*part))
        return sorted((image.numpy().tobytes(), int(label)) for image, label in pairs)

    folds = [rotate_validation(toy_data, fold) for fold in range(5)]
    for rotated in folds:
        assert labelled(rotated) == labelled(toy_data) and torch.equal(rotated.test.images, toy_data.test.images)
        assert (len(rotated.train.labels), len(rotated.val.labels)) == (40, 10)
    assert len({image.numpy().tobytes() for rotated in folds for image in rotated.val.images}) == 50
    assert folds[0] is toy_data and len({rotated.checksum for rotated in folds}) == 5
    assert "folds 0 to 4" in message_of(rotate_validation, toy_data, 5)


# --- what is checked before anything is trained ---


def test_weights_are_checked_unless_the_teacher_is_made(tiny, weights_folder, toy_data, tmp_path, monkeypatch):
    record = {"name": "resnet18", "weights": str(shutil.copytree(weights_folder, tmp_path / "weights"))}
    settings = tiny(max_shift=0, teachers=[record, record | {"label": "R34", "name": "resnet34"}])
    one, other = settings.teachers
    check_weights(one, toy_data, settings)
    teachers.soft_labels(fine_tune(one, toy_data, settings), toy_data.train.images, 2)
    (tmp_path / "weights" / "resnet34.safetensors").write_bytes(b"damaged")
    with monkeypatch.context() as patched:
        patched.setattr(teachers, "load_pretrained", lambda *_: pytest.fail("loaded"))
        check_weights(one, toy_data, settings)
    assert "cannot be read" in message_of(check_weights, other, toy_data, settings)

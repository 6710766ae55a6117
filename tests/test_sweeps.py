"""Sweeps: what is tried, on which images, and what the table says of it."""

import pandas as pd
import pytest
import torch
import yaml
from conftest import message_of
from safetensors.torch import save_file

from kdutils import sweeps, teachers
from kdutils.__main__ import main
from kdutils.compat import ensure_torchvision
from kdutils.data import rotate_validation
from kdutils.models import seeded
from kdutils.settings import ROOT
from kdutils.sweeps import COLUMNS, read_rows, read_sweep, run_sweep, selection_tables, sweep_table
from kdutils.teachers import check_weights, fine_tune

GOOD = {
    "title": "A title", "what": "resnet18", "folds": [0, 2], "seeds": [0], "fixed": {"resnet18_epochs": 2},
    "grids": [{}, {"resnet18_learning_rate": [0.001, 0.01], "teacher_views": [1]}],
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def to_file(**changes):
        path = tmp_path / "try.yaml"
        path.write_text(yaml.safe_dump({name: value for name, value in {**GOOD, **changes}.items() if value is not None}))
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


def test_the_committed_sweeps_are_complete():
    files = sorted((ROOT / "report" / "sweeps").glob("*/*.yaml"))
    assert files
    for path in files:
        sweep, rows = read_sweep(path), read_rows(path.with_suffix(".csv"))
        expected = len(sweep.trials) * len(sweep.folds) * len(sweep.seeds)
        assert set(rows.trial) == set(sweep.trials) and len(rows) == expected, path
        assert path.stem in [name for name, _, _ in selection_tables(path.parent.name, set(rows.weights))]
        assert path.stem not in [name for name, _, _ in selection_tables(path.parent.name, ["of others"])]
    assert selection_tables("demo", ["of others"]) == []


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
    assert found[["temperature", "alpha"]].isna().values.tolist() == [[True, True], [False, False], [True, False], [True, False]]
    assert found["alpha"].tolist()[1:] == [0.5, 1e-5, 1] and "weights" not in found
    assert found["trial"].tolist() == names

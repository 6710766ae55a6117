"""kdutils.lab.study: its groups and their methods, each trained."""

import dataclasses
import json

import pytest
import torch
import yaml
from conftest import TINY, message_of
from PIL import Image
from safetensors.torch import save_file
from torchvision import models as zoo

from kdutils.lab import study as study_module
from kdutils.lab.study import (
    GROUPS,
    OTHER_LOSSES,
    TUNED,
    Study,
    check_groups,
    entries_of,
    loss_constants,
    run_study,
    train_entry,
)
from kdutils.models import seeded
from kdutils.results.sweeps import read_rows, read_sweep, settings_of_trials
from kdutils.settings import ROOT, load_settings

ENTRIES = entries_of(list(GROUPS))


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
        "max_shift": 1, "test_size": 20,
    }  # fmt: skip
    (folder / "study.yaml").write_text(yaml.safe_dump(values))
    return load_settings(str(folder / "study.yaml"))


@pytest.fixture(scope="module")
def study(settings):
    return Study(settings)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(study_module, "LONG", 2)


def test_an_unknown_group_is_named(tiny):
    check_groups([])
    check_groups(list(GROUPS))
    for call, argument in ((check_groups, ["controls", "contrls"]), (Study, tiny(study=["contrls"]))):
        message = message_of(call, argument)
        assert message == "study: 'contrls' is not a group; use any of controls, losses, epochs"


def test_a_study_of_no_group_is_named(tiny_profile):
    message = message_of(run_study, tiny_profile(), {})
    assert message.startswith("study: no group is named; ") and all(group in message for group in GROUPS)


def test_entries_are_those_of_the_groups_in_the_studys_order():
    assert list(entries_of(["losses", "controls"])) == ["no_label_smoothing", "kd_class_mean", *GROUPS["losses"]]
    assert entries_of([]) == {}


def test_the_teacher_is_the_better_one_on_validation_images(study):
    def scored(teacher, accuracy):
        history = {"val_accuracy": [1 - accuracy, accuracy]}
        return dataclasses.replace(teacher, runs=[dataclasses.replace(run, history=history) for run in teacher.runs])

    for better in (0, 1):
        other = Study(study.settings)
        other.teachers = tuple(scored(teacher, 0.9 if i == better else 0.8) for i, teacher in enumerate(study.teachers))
        assert other.teacher is other.teachers[better] and other.other_teacher is other.teachers[1 - better]


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


def test_the_constants_of_the_losses_are_told(tiny):
    found = loss_constants(tiny())
    assert {f"kd_tuned/{arch}": values for arch, values in TUNED.items()}.items() <= found.items()
    assert found["dkd"] == OTHER_LOSSES["dkd"] | {"dkd_alpha": 1.0, "dkd_beta": 2.0}
    assert found.keys() == {"kd_tuned/resnet50", "kd_tuned/resnet18", *OTHER_LOSSES}


@pytest.mark.parametrize("name", ENTRIES)
def test_every_method_trains(study, short, name):
    entry = ENTRIES[name](study)
    (run,) = study.train(entry, [0])
    assert run.arm == entry.method.name and run.logits["test"].isfinite().all()
    assert entry.task in ("1", "3", "4") and entry.settings.seeds == study.settings.seeds
    rows = entry.rows([run], study.dataset, [study.teacher])
    assert {(row["task"], row["labels"], row["epochs"]) for row in rows} == {(entry.task, 40, 2)}
    assert len(run.history["train_loss"]) == 2


def test_a_job_trains_one_seed(settings, study, monkeypatch):
    train_entry(settings.profile, json.dumps({"runs_dir": settings.runs_dir}), "no_label_smoothing", 1)
    monkeypatch.setattr("kdutils.students.fit", None)  # would fail
    assert study.train(ENTRIES["no_label_smoothing"](study), [1])[0].seed == 1


def test_a_run_prepares_what_students_share_and_trains_them_all(settings, short, monkeypatch, tmp_path):
    given = {"study": ["controls", "epochs"], "seeds": [0], "runs_dir": str(tmp_path)}
    made = run_study(settings.profile, given)
    monkeypatch.setattr("kdutils.students.fit", None)  # would fail
    monkeypatch.setattr("kdutils.teachers.fit", None)
    again = Study(made)
    for make in entries_of(made.study).values():
        assert [run.seed for run in again.train(make(again))] == [0]

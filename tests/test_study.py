"""kdutils.lab.study: its groups and their methods, each trained."""

import dataclasses
import json

import pytest
import yaml
from conftest import TINY, message_of
from safetensors.torch import save_file
from torchvision import models as zoo

from kdutils.lab import study as study_module
from kdutils.lab.study import (
    GROUPS,
    Study,
    check_groups,
    entries_of,
    loss_constants,
    run_study,
    train_entry,
)
from kdutils.settings import load_settings
from kdutils.weights import seeded

NAMES = [name for entries in GROUPS.values() for name in entries] + ["kd other"]
OTHER = {"name": "resnet18", "label": "other", "trainable": "last_layer", "epochs": 1}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """All groups, with a third teacher; ResNets of random weights."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "weights").mkdir()
    for arch in ("resnet18", "resnet50"):
        save_file(seeded(0, getattr(zoo, arch)).state_dict(), folder / "weights" / f"{arch}.safetensors")
    values = TINY | {
        "weights": str(folder / "weights"), "runs_dir": str(folder / "runs"), "study": list(GROUPS),
        "backbones": [OTHER],
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
    check_groups(tiny())
    check_groups(tiny(study=list(GROUPS), backbones=[OTHER]))
    for call in (check_groups, Study):
        message = message_of(call, tiny(study=["controls", "contrls"]))
        assert message == "study: 'contrls' is not a group; use any of controls, losses, epochs, backbones"


def test_a_study_of_other_teachers_without_any_is_named(tiny):
    message = message_of(check_groups, tiny(study=["backbones"]))
    assert message.startswith("study: the group backbones needs teachers; name some in the setting backbones")


def test_a_study_of_no_group_is_named(tiny_profile):
    message = message_of(run_study, tiny_profile(), {})
    assert message.startswith("study: no group is named; ") and all(group in message for group in GROUPS)


def test_entries_are_those_of_the_groups_in_the_studys_order(tiny):
    found = list(entries_of(tiny(study=["losses", "controls"], backbones=[OTHER])))
    assert found == ["no_label_smoothing", "kd_class_mean", *GROUPS["losses"]]
    assert list(entries_of(tiny(study=list(GROUPS), backbones=[OTHER]))) == NAMES
    assert entries_of(tiny()) == {}


def test_the_teacher_is_the_better_one_on_validation_images(study):
    def scored(teacher, accuracy):
        history = {"val_accuracy": [1 - accuracy, accuracy]}
        return dataclasses.replace(teacher, runs=[dataclasses.replace(run, history=history) for run in teacher.runs])

    for better in (0, 1):
        other = Study(study.settings)
        other.teachers = tuple(scored(teacher, 0.9 if i == better else 0.8) for i, teacher in enumerate(study.teachers))
        assert other.teacher is other.teachers[better] and other.other_teacher is other.teachers[1 - better]


def test_the_constants_of_the_losses_are_told(tiny):
    found = loss_constants(tiny())
    usual = {"temperature": TINY["temperature"], "alpha": TINY["alpha"]}
    assert found.keys() == GROUPS["losses"].keys() and all(usual.items() <= one.items() for one in found.values())
    assert found["dkd"] == usual | {"dkd_alpha": 1.0, "dkd_beta": 2.0}


@pytest.mark.parametrize("name", NAMES)
def test_every_method_trains(study, short, name):
    entry = entries_of(study.settings)[name](study)
    (run,) = study.train(entry, [0])
    assert run.arm == entry.method.name and run.logits["test"].isfinite().all()
    assert entry.task in ("1", "3", "4") and entry.settings.seeds == study.settings.seeds
    rows = entry.rows([run], study.dataset, [study.teacher])
    assert {(row["task"], row["labels"], row["epochs"]) for row in rows} == {
        (entry.task, 40, len(run.history["val_loss"]))
    }


def test_other_teachers_are_fine_tuned_only_where_they_are_asked_for(study):
    assert [teacher.label for teacher in study.backbones] == ["other"]
    entry = entries_of(study.settings)["kd other"](study)
    assert entry.method.teachers == study.backbones and entry.words == "Distilled from other"
    assert Study(dataclasses.replace(study.settings, study=["controls"])).backbones == ()


def test_a_job_trains_one_seed(settings, study, monkeypatch):
    train_entry(settings.profile, json.dumps({"runs_dir": settings.runs_dir}), "no_label_smoothing", 1)
    monkeypatch.setattr("kdutils.students.fit", None)  # would fail
    assert study.train(entries_of(settings)["no_label_smoothing"](study), [1])[0].seed == 1


def test_a_run_prepares_what_students_share_and_trains_them_all(settings, short, monkeypatch, tmp_path):
    given = {"study": ["controls", "backbones"], "seeds": [0], "runs_dir": str(tmp_path)}
    made = run_study(settings.profile, given)
    monkeypatch.setattr("kdutils.students.fit", None)  # would fail
    monkeypatch.setattr("kdutils.teachers.fit", None)
    again = Study(made)
    for make in entries_of(made).values():
        assert [run.seed for run in again.train(make(again))] == [0]

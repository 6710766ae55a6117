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
    OTHER_LOSSES,
    TUNED,
    Study,
    check_groups,
    entries_of,
    loss_constants,
    run_study,
    train_entry,
)
from kdutils.results.sweeps import is_map, read_rows, read_sweep, settings_of_trials
from kdutils.settings import ROOT, load_settings
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


def is_best(path, chosen):
    """Whether a sweep of twelve pairs of temperature and weight, with three seeds each, found none better."""
    sweep, rows = read_sweep(path.with_suffix(".yaml")), settings_of_trials(read_rows(path))
    assert sweep.seeds == [0, 1, 2] and len(rows.dropna().groupby(["temperature", "alpha"])) == 12
    means = rows.groupby(["temperature", "alpha"]).val_accuracy.mean()
    return means[chosen["temperature"], chosen["alpha"]] == pytest.approx(means.max())


@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_the_other_losses_are_set_as_their_committed_sweeps_found_best(name):
    (path,) = (ROOT / "report" / "sweeps").glob(f"*/{name.replace('_', '-')}.csv")
    assert read_sweep(path.with_suffix(".yaml")).what == name and is_best(path, OTHER_LOSSES[name])


def test_the_loss_of_hinton_is_tuned_as_committed_sweeps_found_best(tiny):
    """Teachers without one keep the values of the profile that has them."""
    swept = {}
    for path in (ROOT / "report" / "sweeps" / "cifar10-lite").glob("*.csv"):
        sweep = read_sweep(path.with_suffix(".yaml"))
        if sweep.what == "kd" and is_map(sweep):
            swept[next(iter(sweep.trials.values()))["teachers"]] = path
    settings = load_settings("cifar10-lite")
    usual = {name: getattr(settings, name) for name in ("temperature", "alpha")}
    assert TUNED.keys() == {teacher.label for teacher in settings.teachers} and swept.keys() <= TUNED.keys()
    for label, chosen in TUNED.items():
        assert is_best(swept[label], chosen) if label in swept else chosen == usual


def test_the_constants_of_the_losses_are_told(tiny, monkeypatch):
    monkeypatch.setitem(TUNED, "resnet50", {"temperature": 2.0, "alpha": 0.25})
    found = loss_constants(tiny())
    assert found["kd_tuned/resnet50"] == TUNED["resnet50"]
    assert found["kd_tuned/resnet18"] == {"temperature": TINY["temperature"], "alpha": TINY["alpha"]}
    assert found["dkd"] == OTHER_LOSSES["dkd"] | {"dkd_alpha": 1.0, "dkd_beta": 2.0}
    assert found.keys() == {"kd_tuned/resnet50", "kd_tuned/resnet18", *OTHER_LOSSES}


def test_a_loss_is_tuned_for_its_teacher(study, monkeypatch):
    monkeypatch.setitem(TUNED, study.other_teacher.label, {"temperature": 2.0, "alpha": 0.25})
    for name, expected in (("kd_tuned", (4.0, 0.9)), ("kd_tuned_other", (2.0, 0.25))):
        entry = entries_of(study.settings)[name](study)
        bound = entry.method.loss.keywords
        assert (bound["temperature"], bound["alpha"]) == expected
        assert entry.words.endswith("T = {:g}, alpha = {:g}".format(*expected))


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

"""kdutils.results: rows of results.csv, tables of trained networks."""

import dataclasses
import json
import shlex
from functools import partial

import pandas as pd
import pytest
import torch
from conftest import fake_teacher

from kdutils.losses import combine_teachers, cross_entropy
from kdutils.models import SmallCNN
from kdutils.results import metrics
from kdutils.results.record import (
    ensemble_rows,
    finish,
    flip_column,
    read_provenance,
    read_results,
    rerun_command,
    student_rows,
    teacher_rows,
)
from kdutils.results.tables import (
    arms_table,
    comparison,
    difference_text,
    following,
    interval_text,
    is_right,
    of_the_tasks,
    outcome,
    warnings,
)
from kdutils.settings import load_settings
from kdutils.students import Method, StudentRun, train_students
from kdutils.teachers import TeacherRun, ensemble


def logits_for(labels, wrong=()):
    """Logits that name the right class of every image but those numbered, which get the next one."""
    named = labels.clone()
    named[list(wrong)] = (named[list(wrong)] + 1) % 10
    return 5 * torch.eye(10)[named]


def students(dataset, *wrong):
    """Students of the seeds 0, 1, ..., each wrong about the test images that are numbered."""
    parts = [dict.fromkeys(("train", "val", "test"), logits_for(dataset.test.labels, of_seed)) for of_seed in wrong]
    state = SmallCNN().state_dict()
    return [StudentRun("kd", ("resnet18",), seed, {}, logits, state, 0.0, "") for seed, logits in enumerate(parts)]


def a_teacher(label, dataset, *wrong):
    """A teacher with a run for each of the tuples of images that it is wrong about."""
    runs = [
        TeacherRun(label, "last_block", run.seed, {}, run.logits, 0.0, f"{label} {run.seed}")
        for run in students(dataset, *wrong)
    ]
    return dataclasses.replace(fake_teacher(dataset, label), trainable="last_block", runs=runs)


@pytest.fixture
def ten(toy_data):
    """A data set of ten images, the same in all parts."""
    return toy_data._replace(train=toy_data.test, val=toy_data.test)


# --- rows ---


def test_rows_tell_how_a_student_follows_its_teacher(tiny, ten):
    run, teacher = students(ten, [0, 1])[0], a_teacher("resnet18", ten, [1, 2, 3])
    found = {row["metric"]: float(row["value"]) for row in student_rows(3, [run], ten, tiny(), [teacher])}
    assert found["agreement_resnet18"] == 0.7
    assert found["agreement_resnet18_teacher_right"] == pytest.approx(6 / 7, abs=1e-6)
    assert found["agreement_resnet18_teacher_wrong"] == pytest.approx(1 / 3, abs=1e-6)
    divergence = metrics.fidelity(run.logits["test"], teacher.runs[0].logits["test"])
    assert found["kl_resnet18"] == pytest.approx(divergence, abs=1e-6)
    assert {"accuracy", "accuracy_flip"} <= found.keys()
    rows = student_rows(3, [run], ten, tiny(), [a_teacher("resnet18", ten, [])])
    assert not any(row["metric"].endswith("teacher_wrong") or row["value"] == "nan" for row in rows)


def test_rows_of_a_teacher_are_named_by_its_trained_part(tiny, ten):
    rows = teacher_rows(2, a_teacher("resnet18", ten, [0], []), ten, tiny())
    named = {(row["task"], row["arm"], row["teachers"], row["labels"], row["epochs"]) for row in rows}
    assert named == {("2", "last_block", "resnet18", 40, 1)}
    on_test = {row["seed"]: row["value"] for row in rows if (row["split"], row["metric"]) == ("test", "accuracy")}
    assert on_test == {0: "0.900000", 1: "1.000000"}


def test_a_method_of_two_numbers_of_epochs_is_recorded_by_two_notebooks(tiny, toy_data, capsys):
    """Neither notebook's rows are taken for those of other students of the same name."""
    settings = tiny(seeds=[0], epochs=1)
    for notebook, epochs in (("one", 1), ("two", 2)):
        longer = dataclasses.replace(settings, epochs=epochs)
        runs = train_students(Method("scratch", cross_entropy), toy_data, longer)
        rows = student_rows(1, runs, toy_data, longer)
        finish(settings, notebook, rows, toy_data, students=[runs], facts={notebook: epochs})
    assert set(read_results(settings.run_folder).epochs) == {1, 2} and "leaves out" not in capsys.readouterr().out
    stages = pd.read_csv(settings.run_folder / "timings.csv").stage.tolist()
    assert stages == ["student, scratch, seed 0", "student, scratch, 2 epochs, seed 0"]
    provenance = json.loads((settings.run_folder / "provenance.json").read_text())
    assert provenance["one"] == 1 and provenance["two"] == 2
    assert provenance["processor"]["name"] and provenance["processor"]["instruction_set"] and provenance["threads"]


def test_a_flipped_image_is_seen_by_the_very_network(tiny, toy_data):
    """Of images that are their own mirror images the flip changes nothing; of others it is the mean of both."""
    settings = tiny(seeds=[0], epochs=1)
    symmetric = toy_data.test.images + toy_data.test.images.flip(3)
    dataset = toy_data._replace(test=toy_data.test._replace(images=symmetric))
    [run] = train_students(Method("scratch", cross_entropy), dataset, settings)
    assert flip_column([run], dataset, settings) == [metrics.accuracy(run.logits["test"], dataset.test.labels)]
    certain = dataclasses.replace(run, logits={"test": 500 * logits_for(dataset.test.labels)})
    assert flip_column([certain], dataset, settings) == [1.0]


def test_provenance_names_both_teachers_and_the_better_one_on_validation_images(tiny, ten):
    settings = tiny()
    teachers = [a_teacher(teacher.label, ten, [0]) for teacher in settings.teachers]
    teachers = [dataclasses.replace(teacher, settings=own) for teacher, own in zip(teachers, settings.teachers)]
    other = dataclasses.replace(
        a_teacher("other", ten, [0]), settings=dataclasses.replace(settings.teachers[0], label="o")
    )
    for teacher, accuracy in zip((*teachers, other), (0.5, 0.6, 0.9)):
        teacher.runs[0].history["val_accuracy"] = [0.1, accuracy]
    finish(settings, "a", teacher_rows(2, teachers[0], ten, settings), ten, teachers[:1])
    assert "better_teacher" not in read_provenance(settings.run_folder)
    finish(settings, "b", teacher_rows(2, teachers[1], ten, settings), ten, [*teachers, other])
    finish(settings, "c", [], ten, [other])
    provenance = read_provenance(settings.run_folder)
    assert provenance["better_teacher"] == teachers[1].label
    assert set(provenance["weights"]) == {*(teacher.label for teacher in teachers), "o"}
    assert provenance["settings"]["teachers"] == [dataclasses.asdict(teacher) for teacher in settings.teachers]


@pytest.mark.parametrize("changed", [
    {}, {"teacher_size": 64, "seeds": [3]}, {"teachers": ["mobilenetv3_small_100", "resnet18"]},
    {"teachers": [{"name": "resnet18", "label": "A", "epochs": 3}, {"name": "resnet18", "label": "B"}], "threads": 1},
    {"backbones": ["resnet34"], "teacher_epochs": 7},
])  # fmt: skip
def test_the_command_in_the_provenance_gives_the_same_settings(changed):
    settings = load_settings("demo", **changed)
    words = shlex.split(rerun_command(settings))
    names, values = words[words.index("demo") + 2 :: 3], words[words.index("demo") + 3 :: 3]
    assert load_settings("demo", **dict(zip(names, values, strict=True))) == settings
    assert ("teachers" in names) == ("teachers" in changed)


# --- tables ---


def rows_of(arms, seeds=2):
    """Rows of results.csv: (task, arm, teachers, epochs) -> mean test and validation accuracy."""
    return pd.DataFrame([
        (*key, 100, seed, split, "accuracy", mean + 0.01 * seed - 0.005)
        for key, means in arms.items() for seed in range(seeds) for split, mean in zip(("test", "val"), means)
    ], columns="task arm teachers epochs labels seed split metric value".split())  # fmt: skip


PROVENANCE = {
    "settings": {
        "epochs": 20,
        "teachers": [{"label": name, "trainable": "last_layer", "weights": "x"} for name in "BA"],
    },
    "data": {"unlabelled": 4000},
}
ARMS = {
    ("1", "scratch", "", 20): (0.678, 0.67), ("3", "scratch_equal_steps", "", 30): (0.661, 0.66),
    ("2", "last_layer", "A", 10): (0.82, 0.8), ("2", "last_layer", "B", 10): (0.81, 0.8),
    ("2", "last_layer", "other", 10): (0.1, 0.1), ("4", "ensemble", "B+A", 0): (0.83, 0.8),
    ("4", "kd_mean_prob", "B+A", 20): (0.665, 0.66), ("4", "kd_mean_prob_unlabelled", "B+A", 30): (0.778, 0.77),
}  # fmt: skip


def test_what_came_out_in_words():
    assert outcome(rows_of(ARMS), PROVENANCE) == [
        "Test accuracy, mean over seeds. The teachers: B 81.0 %, A 82.0 %.",
        "From scratch 67.8 % (66.1 % in equal steps). Taught by both teachers: 66.5 %. "
        "Taught by both teachers, with 4,000 unlabelled images: 77.8 %.",
    ]
    equal_is_best = rows_of(ARMS | {("1", "scratch", "", 20): (0.678, 0.65)})
    assert "From scratch 66.1 %. Taught" in outcome(equal_is_best, PROVENANCE)[1]
    longer = rows_of(ARMS | {("1", "scratch", "", 100): (0.69, 0.68), ("4", "kd_mean_prob", "B+A", 100): (0.7, 0.7)})
    assert outcome(longer, PROVENANCE)[1].startswith("From scratch 69.0 % (66.1 % in equal steps). Taught by both ")
    assert "Taught by both teachers: 66.5 %" in outcome(longer, PROVENANCE)[1]
    only_task_1 = rows_of({("1", "scratch", "", 20): (0.678, 0.65)})
    assert outcome(only_task_1, PROVENANCE) == ["From scratch 67.8 %."]
    assert outcome(only_task_1[:0], PROVENANCE) == []


def test_a_teacher_that_is_worse_than_the_student_is_told_with_a_remedy():
    assert warnings(rows_of(ARMS), PROVENANCE) == []
    weak = rows_of(ARMS | {("2", "last_layer", "B", 10): (0.13, 0.12)})
    (warning,) = warnings(weak, PROVENANCE)
    assert "the teacher B (13.0 %) is worse than the student from scratch (67.8 %): it cannot teach it." in warning
    assert warning.startswith("Warning: ") and "Choose another teacher" in warning
    assert outcome(weak, PROVENANCE)[-1] == warning


def test_the_four_tasks_have_the_arms_with_unlabelled_images_at_their_own_epochs():
    study = {("1", "scratch", "", 100): (0.7, 0.7), ("3", "dkd", "A", 20): (0.7, 0.7)}
    found = of_the_tasks(rows_of(ARMS | study), 20)
    of_tasks = {key for key in ARMS if key[2] != "other"}
    assert set(found[["task", "arm", "teachers", "epochs"]].itertuples(index=False, name=None)) == of_tasks
    assert len(of_the_tasks(rows_of({key: ARMS[key] for key in ARMS if key[0] == "2"}), 20).teachers.unique()) == 3


def test_the_table_of_who_follows_whom(ten):
    teacher = a_teacher("resnet18", ten, [1, 2, 3], [9])
    taught = students(ten, [0, 1], [9])
    table = following({"taught": taught, "alike": taught[1:]}, {"ResNet-18": teacher}, ten)
    assert table[["Student", "Teacher"]].values.tolist() == [["taught", "ResNet-18"], ["alike", "ResNet-18"]]
    assert table["Same prediction (%)"].tolist() == ["85.00 ± 21.21", "100.00"]
    assert table["Teacher wrong (%)"].tolist() == ["66.67 ± 47.14", "100.00"] and table["KL (nats)"][1] == "0.000"
    never_wrong = a_teacher("resnet18", ten, [])
    assert following({"x": taught}, {"t": never_wrong}, ten)["Teacher wrong (%)"].tolist() == ["–"]


def test_teachers_as_one_classifier_are_what_is_made_of_their_logits(ten, tiny):
    teachers = [a_teacher("resnet50", ten, [0], [1]), a_teacher("resnet18", ten, [0], [2], [3])]
    found = ensemble(teachers, partial(combine_teachers, rule="mean_logit", temperature=1.0))
    assert [(run.label, run.seed) for run in found] == [("resnet50+resnet18", 0), ("resnet50+resnet18", 1)]
    rows = ensemble_rows(4, found, ten, tiny())
    named = {(row["task"], row["arm"], row["teachers"], row["epochs"], row["seed"]) for row in rows}
    assert named == {("4", "ensemble", "resnet50+resnet18", 0, seed) for seed in (0, 1)}
    for run, one, another in zip(found, teachers[0].runs, teachers[1].runs):
        for part in ("train", "val", "test"):
            assert torch.equal(run.logits[part], (one.logits[part] + another.logits[part]) / 2)
        assert run.fingerprint not in (one.fingerprint, another.fingerprint)


def test_a_comparison_gives_both_intervals_from_three_seeds_on(ten):
    scratch, kd = students(ten, [0, 1, 2], [0, 1, 3], [0, 2, 3]), students(ten, [0], [0, 1], [0])
    table = comparison(
        [("teacher", a_teacher("resnet18", ten, []).runs), ("scratch", scratch), ("kd", kd)], ten, scratch
    )
    assert table["Test (%)"].tolist() == ["100.00", "70.00 ± 0.00", "86.67 ± 5.77"]
    assert table["Difference"].tolist() == ["–", "–", "+16.67 [+2.32, +31.01]"]
    low, high = (float(part) for part in table["Over images"][2].strip("[]").replace("−", "-").split(","))
    assert 0 <= low < 16.67 < high and table["Over images"][:2].tolist() == ["–", "–"]
    assert is_right(table["Difference"]) and is_right(table["Over images"])
    assert difference_text(kd[:2], scratch[:2], ten) == "+15.00"
    assert interval_text(metrics.paired_difference([1], [0])) == "–"


def test_an_arm_is_held_against_the_students_from_scratch_of_the_same_seeds():
    found = {"scratch": {0: 0.5, 1: 0.6, 2: 0.7}, "kd": {2: 0.72, 1: 0.61, 3: 0.9}, "last_layer": {0: 0.8}}
    rows = pd.DataFrame(
        [
            {"arm": arm, "teachers": "", "seed": seed, "split": "test", "metric": "accuracy", "value": value}
            for arm, by_seed in found.items()
            for seed, value in by_seed.items()
        ]
    )
    table = arms_table(rows).set_index("Arm")
    assert table["Against scratch"].to_dict() == {"scratch": "–", "kd": "+1.50", "last_layer": "–"}
    assert table["Test (%)"]["scratch"] == "60.00 ± 10.00" and table["Test entropy"]["kd"] == "–"

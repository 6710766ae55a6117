"""kdutils.results: rows of results.csv, tables of trained networks."""

import dataclasses
import json
from functools import partial
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from kdutils.losses import combine_teachers, cross_entropy
from kdutils.models import SmallCNN
from kdutils.results import metrics
from kdutils.results.record import finish, flip_column, read_results, student_rows, teacher_rows
from kdutils.results.tables import arms_table, comparison, difference_text, following, interval_text, is_right
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


def a_teacher(arch, dataset, *wrong):
    """A teacher with a run for each of the tuples of images that it is wrong about."""
    runs = [
        TeacherRun(arch, "last_block", run.seed, {}, run.logits, 0.0, f"{arch} {run.seed}")
        for run in students(dataset, *wrong)
    ]
    return SimpleNamespace(arch=arch, trainable="last_block", runs=runs, run_for=lambda seed: runs[seed % len(runs)])


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


# --- tables ---


def test_the_table_of_who_follows_whom(ten):
    teacher = a_teacher("resnet18", ten, [1, 2, 3], [9])
    taught = students(ten, [0, 1], [9])
    table = following({"taught": taught, "alike": taught[1:]}, {"ResNet-18": teacher}, ten)
    assert table[["Student", "Teacher"]].values.tolist() == [["taught", "ResNet-18"], ["alike", "ResNet-18"]]
    assert table["Same prediction (%)"].tolist() == ["85.00 ± 21.21", "100.00"]
    assert table["Teacher wrong (%)"].tolist() == ["66.67 ± 47.14", "100.00"] and table["KL (nats)"][1] == "0.000"
    never_wrong = a_teacher("resnet18", ten, [])
    assert following({"x": taught}, {"t": never_wrong}, ten)["Teacher wrong (%)"].tolist() == ["–"]


def test_teachers_as_one_classifier_are_what_is_made_of_their_logits(ten):
    teachers = [a_teacher("resnet50", ten, [0], [1]), a_teacher("resnet18", ten, [0], [2], [3])]
    found = ensemble(teachers, partial(combine_teachers, rule="mean_logit", temperature=1.0))
    assert [(run.arch, run.seed) for run in found] == [("resnet50+resnet18", 0), ("resnet50+resnet18", 1)]
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

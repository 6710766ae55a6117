"""kdutils.results: what networks cost is measured once for each way to build them."""

import dataclasses
from functools import partial

import pandas as pd
import pytest
import torch

from kdutils.cache import describe_builder
from kdutils.losses import combine_teachers, cross_entropy
from kdutils.models import SmallCNN, architecture
from kdutils.results import metrics
from kdutils.results.tables import (
    comparison,
    finish,
    flip_column,
    following,
    gains,
    model_costs,
    read_results,
    student_rows,
)
from kdutils.students import Method, StudentRun, train_students
from kdutils.teachers import Teacher, TeacherRun, ensemble

built = []


class Counted(SmallCNN):
    """A student that tells when it is built."""

    def __init__(self, num_classes, wider=False):
        super().__init__(num_classes)
        built.append((num_classes, wider))


def test_what_networks_cost(tiny, toy_data):
    costs = model_costs({"Small CNN": SmallCNN, "for seven": partial(SmallCNN, 7)}, toy_data, tiny(), repeats=1)
    assert costs["label"].tolist() == ["Small CNN", "for seven"]
    assert costs["parameters"].tolist() == [268_650, 268_650 - 3 * 129]
    assert costs["megabytes"].tolist() == pytest.approx([1.0746, 1.073052])
    expected = [metrics.multiply_adds(SmallCNN(classes), (3, 32, 32)) for classes in (10, 7)]
    assert costs["multiply_adds"].tolist() == expected and expected[0] - expected[1] == 3 * 128
    assert (costs[["latency", "latency_batched"]] > 0).all(axis=None)


def test_costs_are_measured_once_and_no_network_is_built_again(tiny, toy_data):
    built.clear()
    entries = {"ten": partial(Counted, 10), "seven": partial(Counted, 7)}
    first = model_costs(entries, toy_data, tiny(), repeats=1)
    assert built == [(10, False), (7, False)]
    again = model_costs(entries, toy_data, tiny(), repeats=1)
    assert again[first.columns].equals(first) and len(built) == 2
    model_costs({"ten": partial(Counted, 11)}, toy_data, tiny(), repeats=1)
    model_costs({"ten": partial(Counted, 10, wider=True)}, toy_data, tiny(), repeats=1)
    assert built[2:] == [(11, False), (10, True)]


def other(num_classes):
    return SmallCNN(num_classes)


def test_a_builder_is_known_by_its_code_and_arguments():
    same = [partial(architecture, "resnet18", 32, 10), partial(partial(architecture, "resnet18", 32), 10)]
    different = [
        same[0], partial(architecture, "resnet50", 32, 10), partial(architecture, "resnet18", 64, 10), SmallCNN,
        partial(SmallCNN, 7), partial(SmallCNN, num_classes=7), partial(other, 7), Counted,
    ]  # fmt: skip
    assert describe_builder(same[0]) == describe_builder(same[1])
    found = [describe_builder(build) for build in different]
    assert all(one != another for i, one in enumerate(found) for another in found[:i])


def a_student(seed, logits, state=None):
    return StudentRun(
        "kd",
        ("resnet18",),
        seed,
        {},
        {part: logits for part in ("train", "val", "test")},
        state or SmallCNN().state_dict(),
        0.0,
        "",
    )


def logits_for(labels, wrong=()):
    """Logits that name the right class of every image but those numbered, which get the next one."""
    named = labels.clone()
    named[list(wrong)] = (named[list(wrong)] + 1) % 10
    return 5 * torch.eye(10)[named]


def test_rows_tell_how_a_student_follows_its_teacher(tiny, toy_data):
    labels = toy_data.test.labels
    small = toy_data._replace(train=toy_data.test)
    student, teacher = logits_for(labels, [0, 1]), logits_for(labels, [1, 2, 3])
    run = TeacherRun("resnet18", "last_block", 0, {}, {"test": teacher}, teacher, 0.0, "")
    resnet18 = Teacher("resnet18", "last_block", [run], "", False, "", 1, 1, 1, 0.0)
    rows = student_rows(3, [a_student(0, student)], small, tiny(), [resnet18])
    found = {row["metric"]: float(row["value"]) for row in rows if row["split"] == "test"}
    assert found["agreement_resnet18"] == 0.7 and found["agreement_resnet18_teacher_right"] == pytest.approx(
        6 / 7, abs=1e-6
    )
    assert found["agreement_resnet18_teacher_wrong"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["kl_resnet18"] == pytest.approx(metrics.fidelity(student, teacher), abs=1e-6)
    assert {"accuracy", "accuracy_flip"} <= found.keys()
    run.logits["test"] = logits_for(labels)
    rows = student_rows(3, [a_student(0, student)], small, tiny(), [resnet18])
    assert not any(row["metric"].endswith("teacher_wrong") or row["value"] == "nan" for row in rows)


def test_the_table_of_who_follows_whom(toy_data):
    labels = toy_data.test.labels
    runs = [
        TeacherRun("resnet18", "last_block", seed, {}, {"test": logits_for(labels, wrong)}, labels, 0.0, "")
        for seed, wrong in enumerate(([1, 2, 3], [9]))
    ]
    resnet18 = Teacher("resnet18", "last_block", runs, "", False, "", 1, 1, 1, 0.0)
    students = [a_student(seed, logits_for(labels, wrong)) for seed, wrong in enumerate(([0, 1], [9]))]
    table = following({"taught": students, "alike": students[1:]}, {"ResNet-18": resnet18}, toy_data)
    assert table[["Student", "Teacher"]].values.tolist() == [["taught", "ResNet-18"], ["alike", "ResNet-18"]]
    first, second = table.iloc[0], table.iloc[1]
    assert first["Same prediction (%)"] == "85.00 ± 21.21" and first["Teacher wrong (%)"] == "66.67 ± 47.14"
    assert second.tolist()[2:] == ["100.00", "100.00", "100.00", "0.000"]
    runs[1].logits["test"] = logits_for(labels)  # never wrong: there are no errors to follow
    assert following({"x": students}, {"t": resnet18}, toy_data)["Teacher wrong (%)"].tolist() == ["–"]


def test_teachers_as_one_classifier_are_what_is_made_of_their_logits(toy_data):
    labels = toy_data.test.labels
    parts = ("train", "val", "test")
    teachers = []
    for arch, seeds in (("resnet50", 2), ("resnet18", 3)):
        logits = [{part: seed + logits_for(labels, [seed]) for part in parts} for seed in range(seeds)]
        runs = [TeacherRun(arch, "all", seed, {}, logits[seed], labels, 0.0, arch) for seed in range(seeds)]
        teachers.append(Teacher(arch, "all", runs, "", False, "", 1, 1, 1, 0.0))
    found = ensemble(teachers, partial(combine_teachers, rule="mean_logit", temperature=1.0))
    assert [(run.arch, run.seed) for run in found] == [("resnet50+resnet18", 0), ("resnet50+resnet18", 1)]
    for run, one, other in zip(found, teachers[0].runs, teachers[1].runs):
        for part in parts:
            assert torch.equal(run.logits[part], (one.logits[part] + other.logits[part]) / 2)
        assert len(run.view_logits) == 0 and run.fingerprint not in (one.fingerprint, other.fingerprint)


def test_an_arm_of_two_budgets_is_recorded_by_two_notebooks(tiny, toy_data, capsys):
    """Neither notebook's rows are taken for those of other students of the same name."""
    settings = tiny(seeds=[0], epochs=1)
    for notebook, epochs in (("one", 1), ("two", 2)):
        budget = dataclasses.replace(settings, epochs=epochs)
        runs = train_students(Method("scratch", cross_entropy), toy_data, budget)
        finish(settings, notebook, student_rows(1, runs, toy_data, budget), toy_data, students=[runs])
    assert set(read_results(settings.run_folder).epochs) == {1, 2} and "leaves out" not in capsys.readouterr().out
    stages = pd.read_csv(settings.run_folder / "timings.csv").stage.tolist()
    assert stages == ["student, scratch, seed 0", "student, scratch, 2 epochs, seed 0"]


def test_a_flipped_image_is_seen_by_the_very_network(tiny, toy_data):
    """Of images that are their own mirror images the flip changes nothing; of others it is the mean of both."""
    settings = tiny(seeds=[0], epochs=1)
    symmetric = toy_data.test.images + toy_data.test.images.flip(3)
    dataset = toy_data._replace(test=toy_data.test._replace(images=symmetric))
    [run] = train_students(Method("scratch", cross_entropy), dataset, settings)
    assert flip_column([run], dataset, settings) == [metrics.accuracy(run.logits["test"], dataset.test.labels)]
    certain = a_student(0, logits_for(dataset.test.labels) * 100, run.state)
    assert flip_column([certain], dataset, settings) == [1.0]


def test_a_comparison_gives_both_intervals(toy_data):
    labels = toy_data.test.labels
    data = toy_data._replace(train=toy_data.test, val=toy_data.test)
    scratch = [
        a_student(seed, logits_for(labels, wrong)) for seed, wrong in enumerate(([0, 1, 2], [0, 1, 3], [0, 2, 3]))
    ]
    kd = [a_student(seed, logits_for(labels, wrong)) for seed, wrong in enumerate(([0], [0, 1], [0]))]
    table = comparison([("scratch", scratch), ("kd", kd)], data, baseline=scratch)
    assert table["Difference"].tolist() == ["–", "+16.67 [+2.32, +31.01]"]
    low, high = (float(part) for part in table["Over images"][1].strip("[]").replace("−", "-").split(","))
    assert 0 <= low < 16.67 < high
    assert table["Over images"][0] == "–"


def test_a_gain_is_paired_by_seed_and_stands_beside_what_the_teacher_knows(toy_data):
    labels = toy_data.test.labels
    scratch = [a_student(seed, logits_for(labels, wrong)) for seed, wrong in enumerate(([0, 1], [0], [0, 1, 2]))]
    kd = [a_student(seed, logits_for(labels, wrong)) for seed, wrong in enumerate(([0], [], [0, 1]))]
    row = gains({"ResNet-18": ([0.8, 0.9], kd)}, scratch, toy_data).iloc[0]
    assert row["label"] == "ResNet-18" and row["accuracy"] == pytest.approx(0.85)
    assert row["accuracy_low"] < 0.8 and row["accuracy_high"] > 0.9
    # ten points with every seed, though these differ among themselves
    assert [row["gain"], row["low"], row["high"]] == pytest.approx([10, 10, 10])

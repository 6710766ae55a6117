"""kdutils.report.claims: the results choose what the report says."""

import dataclasses
import re

import pandas as pd
import pytest
import torch
from conftest import fake_teacher, message_of

from kdutils.report.claims import CLAIMS, FEW_SEEDS, claim_values, primary_table
from kdutils.students import StudentRun

BOTH = "A+B"
TEACHERS = [{"label": "A", "trainable": "last_layer", "weights": "imagenet"},
            {"label": "B", "trainable": "last_block", "weights": "imagenet"}]  # fmt: skip
SETTINGS = {"epochs": 30, "label_smoothing": 0.1, "train_size": 9000, "teachers": TEACHERS}
CORE_ARMS = {
    ("1", "scratch", "", 30): 0.70, ("2", "last_layer", "A", 20): 0.80, ("2", "last_block", "B", 10): 0.82,
    ("3", "kd", "A", 30): 0.72, ("3", "kd", "B", 30): 0.73, ("4", "kd_mean_prob", BOTH, 30): 0.74,
}  # fmt: skip
ALL_ARMS = CORE_ARMS | {
    ("3", "scratch_equal_steps", "", 98): 0.69, ("3", "scratch_all_labels", "", 98): 0.80,
    ("3", "kd_unlabelled", "B", 98): 0.76, ("4", "kd_mean_prob_unlabelled", BOTH, 98): 0.77,
    ("1", "no_label_smoothing", "", 30): 0.69, ("3", "kd_class_mean", "B", 30): 0.71,
    ("3", "dkd", "B", 30): 0.75, ("3", "dist", "B", 30): 0.75, ("3", "kd_standardized", "B", 30): 0.75,
    ("1", "scratch", "", 100): 0.72, ("3", "kd", "B", 100): 0.76, ("3", "kd", "A", 100): 0.75,
}  # fmt: skip


def rows(arms=CORE_ARMS, seeds=5, noise=0.001):
    """Rows of results.csv: every arm at about the accuracy given; the noise depends on arm and seed."""
    lines = [
        (*key[:3], 9000, key[3], seed, split, "accuracy", value + noise * ((0, 1, -1, 2, -2)[(seed + number) % 5]))
        for number, (key, value) in enumerate(arms.items())
        for seed in range(seeds)
        for split in ("test", "val")
    ]
    return pd.DataFrame(lines, columns="task arm teachers labels epochs seed split metric value".split())


def values(frame, better="B", **changes):
    return claim_values(frame, {"settings": SETTINGS | changes, "better_teacher": better})


def moved(frame, arm, accuracies, split="test", **where):
    """The rows with other accuracies of an arm, one a seed."""
    frame = frame.copy()
    chosen = (frame.arm == arm) & (frame.split == split)
    for column, value in where.items():
        chosen &= frame[column] == value
    frame.loc[chosen, "value"] = frame.loc[chosen, "seed"].map(dict(enumerate(accuracies)))
    return frame


@pytest.mark.parametrize("two, said", [
    ([0.71, 0.72, 0.73, 0.72, 0.72], "raises the student's test accuracy by 2.00 points (95 % CI [+1.12, +2.88], n = 5, "),
    ([0.69, 0.68, 0.67, 0.68, 0.68], "lowers the student's test accuracy by 2.00 points (95 % CI [−2.88, −1.12], n = 5, "),
    ([0.70, 0.71, 0.69, 0.70, 0.70], "makes no clear difference to the student's test accuracy (+0.00 points, 95 % CI "),
])  # fmt: skip
def test_a_sentence_follows_the_numbers_and_gives_them(two, said):
    found = values(moved(moved(rows(), "scratch", [0.70] * 5), "kd", two, teachers="B"))
    assert found["claim/kd-second"].startswith(f"Distillation from B {said}")
    assert found["claim/kd-second"].endswith(").") and "Holm-adjusted p = " in found["claim/kd-second"]
    assert found["short/kd-second"] == found["claim/kd-second"].partition(" (")[0] + "."


@pytest.mark.parametrize("seeds", [1, 2])
def test_too_few_seeds_claim_nothing_and_the_report_says_so_once(seeds):
    found = values(rows(ALL_ARMS, seeds, noise=0))
    assert found["claim/two-teachers"] == (
        "Distillation from both teachers changes the student's test accuracy by +4.00 points."
    )
    assert not any(re.search("CI|n = |raises|lowers", text) for text in found.values())
    assert found["notice/seeds"] == FEW_SEEDS and values(rows(seeds=3))["notice/seeds"] == ""


def test_every_claim_is_made_where_its_arms_are_there():
    found = values(rows(ALL_ARMS))
    names = {claim.name for claims in CLAIMS.values() for claim in claims} - {"kd-*"} | {"kd-first", "kd-second"}
    assert {key.removeprefix("claim/") for key in found if key.startswith("claim/")} == names
    assert {f"group/{group}" for group in (*CLAIMS, "study", "smoothing")} <= found.keys()
    assert not any("{" in text or "*" in text for text in found.values())
    core = {key for key in values(rows()) if key.startswith("group/")}
    assert core == {"group/core", "group/smoothing"}


@pytest.mark.parametrize("key", sorted(set(ALL_ARMS) - set(CORE_ARMS)), ids=lambda key: "-".join(map(str, key)))
def test_without_an_arm_beyond_the_core_no_sentence_speaks_of_it(key):
    whole, found = (values(rows({k: v for k, v in ALL_ARMS.items() if k != left_out})) for left_out in (None, key))
    assert whole.items() - found.items() and found.keys() <= whole.keys()


@pytest.mark.parametrize("arm", ["scratch", "kd", "kd_mean_prob"])
def test_a_missing_arm_of_the_core_is_named(arm):
    message = message_of(values, rows()[lambda frame: frame.arm != arm])
    assert re.search(rf"no test accuracy of {arm}\b", message)


@pytest.mark.parametrize("frame, message", [
    (rows().assign(seed=lambda found: found.seed + 10 * (found.arm == "scratch")), "need numbers of the same seeds"),
    (moved(rows(), "kd_mean_prob", [float("nan")] * 5), "need numbers of the same seeds"),
    (pd.concat([rows(), rows()]), "results.csv: scratch/, seed 0, has two test accuracies; keep one row"),
])  # fmt: skip
def test_rows_that_cannot_be_compared_are_an_error(frame, message):
    assert message in message_of(values, frame)


def test_only_common_seeds_are_compared():
    frame = rows(ALL_ARMS)[lambda frame: (frame.epochs != 100) | (frame.seed < 3)]
    found = values(frame)
    assert "n = 3)" in found["claim/longer-better"] and "n = 5" in found["claim/two-better"]


def test_the_better_teacher_is_the_one_that_the_provenance_names():
    found = values(rows(), better="B")
    assert found["claim/better-teacher"].startswith("Learning from the more accurate teacher, B, raises")
    assert "from B alone" in found["claim/two-better"]
    found = values(rows(), better="A")
    assert found["claim/better-teacher"].startswith("Learning from the more accurate teacher, A, lowers")
    assert "from A alone" in found["claim/two-better"]


def test_other_networks_of_the_study_make_no_claims():
    more = rows({("2", "last_block", "R18", 10): 0.8, ("3", "kd", "R18", 30): 0.7})
    assert values(pd.concat([rows(), more])) == values(rows())


def test_the_primary_comparisons_are_corrected_for_their_number():
    frame = moved(moved(rows(), "scratch", [0.70] * 5), "kd", [0.71, 0.72, 0.73, 0.72, 0.72], teachers="B")
    # differences of mean 2, sd 0.707, so t = 6.32 with 4 degrees of freedom, p = 0.0032, the lesser of two
    assert "p = 0.006)" in values(frame)["claim/kd-second"] and "Holm" in values(frame)["claim/two-better"]
    assert "Holm" not in values(frame)["claim/kd-first"] and "Holm" not in values(frame)["claim/better-teacher"]
    assert "Holm" in values(frame, better="A")["claim/kd-first"]
    more = moved(moved(rows(ALL_ARMS), "scratch", [0.70] * 5), "kd", [0.71, 0.72, 0.73, 0.72, 0.72], teachers="B")
    assert "Holm" in values(more)["claim/unlabelled"] and "Holm" in values(more)["claim/all-labels"]
    assert "group/smoothing" not in values(frame, label_smoothing=0.0)


def a_run(arm, teachers, seed, dataset, right):
    """A student that classifies so many images of each part right."""
    labels = dataset.test.labels
    named = torch.where(torch.arange(len(labels)) < right, labels, (labels + 1) % 10)
    logits = torch.eye(10)[named]
    return StudentRun(arm, teachers, seed, {}, {"val": logits, "test": logits}, {}, 0.0, "")


def test_the_table_of_primary_comparisons(tiny, toy_data):
    settings = tiny(seeds=[0, 1, 2])
    teachers = [fake_teacher(toy_data, label) for label in ("first", "second")]
    names = [teacher.label for teacher in teachers]
    settings = dataclasses.replace(settings, teachers=[teacher.settings for teacher in teachers])
    right_of = {("scratch",): (5, 6, 5), ("kd", names[0]): (7, 8, 8), ("kd", names[1]): (8, 8, 9),
                ("kd_mean_prob", *names): (8, 8, 9), ("scratch_equal_steps",): (5, 5, 5),
                ("kd_unlabelled", names[1]): (9, 9, 9)}  # fmt: skip
    arms = [[a_run(arm, tuple(teachers), seed, toy_data, right) for seed, right in enumerate(rights)]
            for (arm, *teachers), rights in right_of.items()]  # fmt: skip
    for teacher, accuracy in zip(teachers, (0.5, 0.6)):
        teacher.runs[0].history["val_accuracy"] = [accuracy]
    table = primary_table(arms, toy_data, settings, teachers)
    assert table["Comparison"].tolist() == [
        "Second − scratch", "Both − second", "Second, unlabelled images too − scratch, equal steps",
    ]  # fmt: skip
    # differences 30, 20, 40 points: mean 30, sd 10, so t = 5.20 with 2 degrees of freedom
    first = table.iloc[0].to_dict()
    assert first.pop("Over images").startswith("[+")
    assert first == {"Comparison": "Second − scratch", "Difference": "+30.00", "Over seeds": "[+5.16, +54.84]",
                     "n": 3, "p": "0.035", "p (Holm)": "0.070"}  # fmt: skip
    assert table.iloc[1].tolist()[1:4] == ["+0.00", *["[+0.00, +0.00]"] * 2]
    single = primary_table([runs[:1] for runs in arms], toy_data, settings, teachers)
    assert set(single["p"]) == set(single["p (Holm)"]) == set(single["Over seeds"]) == {"–"}

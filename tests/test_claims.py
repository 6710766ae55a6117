"""kdutils.report.claims: the results choose what the report says."""

import re

import pandas as pd
import pytest
import torch
from conftest import message_of

from kdutils.report.claims import CLAIMS, FEW_SEEDS, PRIMARY, claim_values, primary_table
from kdutils.students import StudentRun

BOTH = "resnet50+resnet18"
SETTINGS = {"epochs": 30, "label_smoothing": 0.1, "train_size": 9000, "resnet50_trainable": "last_layer",
            "resnet18_trainable": "last_block"}  # fmt: skip
CORE_ARMS = {
    ("1", "scratch", "", 30): 0.70, ("2", "last_layer", "resnet50", 20): 0.80, ("2", "last_block", "resnet18", 10): 0.82,
    ("3", "kd", "resnet50", 30): 0.72, ("3", "kd", "resnet18", 30): 0.73, ("4", "kd_mean_prob", BOTH, 30): 0.74,
}  # fmt: skip
ALL_ARMS = CORE_ARMS | {
    ("1", "no_label_smoothing", "", 30): 0.69, ("3", "kd_class_mean", "resnet18", 30): 0.71,
    ("3", "dkd", "resnet18", 30): 0.75, ("3", "dist", "resnet18", 30): 0.75, ("3", "kd_standardized", "resnet18", 30): 0.75,
    ("3", "kd_tuned", "resnet50", 30): 0.73, ("3", "kd_tuned", "resnet18", 30): 0.74, ("1", "scratch", "", 100): 0.72,
    ("3", "kd", "resnet18", 100): 0.76, ("3", "kd", "resnet50", 100): 0.75, ("extra", "kd_unlabelled", "resnet18", 18): 0.76,
    ("extra", "scratch_all_labels", "", 18): 0.80, ("extra", "scratch", "", 100): 0.72, ("extra", "kd", "resnet18", 100): 0.74,
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


def values(frame, **changes):
    return claim_values(frame, {"settings": SETTINGS | changes})


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
    found = values(moved(moved(rows(), "scratch", [0.70] * 5), "kd_mean_prob", two))
    assert found["claim/two-teachers"].startswith(f"Distillation from both teachers {said}")
    assert found["claim/two-teachers"].endswith(").") and "Holm-adjusted p = " in found["claim/two-teachers"]
    assert found["short/two-teachers"] == found["claim/two-teachers"].partition(" (")[0] + "."


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
    names = {claim.name for claims in CLAIMS.values() for claim in claims} - {"kd-*"} | {"kd-resnet50", "kd-resnet18"}
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


def test_validation_images_choose_the_better_and_the_stronger_teacher():
    found = values(rows())
    assert found["better/words"] == "ResNet-18" and "teacher, ResNet-18, raises" in found["claim/stronger-teacher"]
    other = moved(moved(rows(), "kd", [0.9] * 5, "val", teachers="resnet50"), "last_layer", [0.9] * 5, "val")
    assert values(other)["better/words"] == "ResNet-50"
    assert "from ResNet-50 alone" in values(other)["claim/two-better"]
    assert "teacher, ResNet-50, lowers" in values(other)["claim/stronger-teacher"]
    upside_down = rows().assign(value=lambda frame: frame.value.where(frame.split == "val", 1 - frame.value))
    assert values(upside_down)["better/words"] == "ResNet-18"


def test_the_teachers_are_those_that_results_csv_names():
    names = {"resnet50": "tf_lite2", "resnet18": "tf_lite0", BOTH: "tf_lite2+tf_lite0"}
    found = values(rows(ALL_ARMS).assign(teachers=lambda frame: frame.teachers.replace(names)))
    assert {"claim/kd-tf_lite2", "claim/kd-tf_lite0"} <= found.keys() and found["better/words"] == "tf_lite0"
    assert found["claim/tuned"].startswith("Tuning temperature and weight for tf_lite2 raises")
    assert not any("ResNet" in text for text in found.values())


def test_the_primary_comparisons_are_corrected_for_their_number():
    frame = moved(moved(rows(), "scratch", [0.70] * 5), "kd_mean_prob", [0.71, 0.72, 0.73, 0.72, 0.72])
    frame = moved(frame, "kd", [0.71, 0.70, 0.69, 0.71, 0.70])
    # differences of mean 2, sd 0.707, so t = 6.32 with 4 degrees of freedom, p = 0.0032, the least of four
    assert "p = 0.013)" in values(frame)["claim/two-teachers"]
    assert "Holm" in values(frame)["claim/kd-resnet18"] and "Holm" not in values(frame)["claim/stronger-teacher"]
    # with ResNet-50 the better one, the fourth comparison is the first by another name: it counts once
    same = moved(frame, "kd", [0.9] * 5, "val", teachers="resnet50")
    assert "p = 0.010)" in values(same)["claim/two-teachers"] and "Holm" not in values(same)["claim/kd-resnet18"]
    # without label smoothing the fourth is none
    assert "p = 0.010)" in values(frame, label_smoothing=0.0)["claim/two-teachers"]
    assert "group/smoothing" not in values(frame, label_smoothing=0.0)


def a_run(arm, teachers, seed, dataset, right):
    """A student that classifies so many images of each part right."""
    labels = dataset.test.labels
    named = torch.where(torch.arange(len(labels)) < right, labels, (labels + 1) % 10)
    logits = torch.eye(10)[named]
    return StudentRun(arm, teachers, seed, {}, {"val": logits, "test": logits}, {}, 0.0, "")


def test_the_table_of_primary_comparisons(tiny, toy_data):
    right_of = {("scratch",): (5, 6, 5), ("kd", "resnet50"): (7, 8, 8), ("kd", "resnet18"): (8, 8, 9),
                ("kd_mean_prob", "resnet50", "resnet18"): (8, 8, 9)}  # fmt: skip
    arms = [[a_run(arm, tuple(teachers), seed, toy_data, right) for seed, right in enumerate(rights)]
            for (arm, *teachers), rights in right_of.items()]  # fmt: skip
    table = primary_table(arms, toy_data, tiny(seeds=[0, 1, 2]))
    assert table["Comparison"].tolist() == [
        "ResNet-50 − scratch", "Both − scratch", "Both − the better one, ResNet-18",
        "The better one, ResNet-18 − scratch (label smoothing)",
    ]  # fmt: skip
    # differences 20, 20, 30 points: mean 23.33, sd 5.77, so t = 7.00 with 2 degrees of freedom
    first = table.iloc[0].to_dict()
    assert first.pop("Over images").startswith("[+")
    assert first == {"Comparison": "ResNet-50 − scratch", "Difference": "+23.33", "Over seeds": "[+8.99, +37.68]",
                     "n": 3, "p": "0.020", "p (Holm)": "0.079"}  # fmt: skip
    assert table.iloc[2].tolist()[1:4] == ["+0.00", *["[+0.00, +0.00]"] * 2]
    assert len(table) == len(PRIMARY)
    assert "no test accuracy of kd_mean_prob" in message_of(primary_table, arms[:3], toy_data, tiny())
    single = primary_table([runs[:1] for runs in arms], toy_data, tiny(seeds=[0]))
    assert set(single["p"]) == set(single["p (Holm)"]) == set(single["Over seeds"]) == {"–"}

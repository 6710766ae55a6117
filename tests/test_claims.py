"""kdutils.claims: the results choose what the report says, whatever they are."""

import dataclasses
import re

import pandas as pd
import pytest
import torch
from conftest import message_of
from test_students import fake_teacher

from kdutils.report import claims
from kdutils.report.claims import CLAIMS, CORE, PRIMARY, claim_values, primary_table
from kdutils.results.metrics import OUTCOMES
from kdutils.students import StudentRun

BOTH = "resnet50+resnet18"
SETTINGS = {
    "epochs": 30,
    "label_smoothing": 0.1,
    "resnet50_trainable": "last_layer",
    "resnet18_trainable": "last_block",
}
CORE_ARMS = {
    ("1", "scratch", "", 30): 0.70, ("2", "last_layer", "resnet50", 20): 0.80, ("2", "last_block", "resnet18", 10): 0.82,
    ("3", "kd", "resnet50", 30): 0.72, ("3", "kd", "resnet18", 30): 0.73, ("4", "kd_mean_prob", BOTH, 30): 0.74,
    ("4", "kd_mean_logit", BOTH, 30): 0.74, ("4", "kd_confidence", BOTH, 30): 0.74,
}  # fmt: skip
STUDY_ARMS = {
    ("1", "no_label_smoothing", "", 30): 0.69, ("3", "kd_shuffled", "resnet18", 30): 0.71,
    ("3", "kd_shuffled", "resnet50", 30): 0.71, ("3", "kd_out_of_fold", "resnet18", 30): 0.73,
    ("3", "kd_out_of_fold", "resnet50", 30): 0.72, ("3", "kd_self", "student", 30): 0.71,
    ("3", "scratch_earlier_recipe", "", 30): 0.62, ("3", "earlier_recipe_longer", "", 60): 0.65,
    ("3", "kd_warm_start", "resnet50", 60): 0.66,
    ("3", "dkd", "resnet18", 30): 0.75, ("3", "dist", "resnet18", 30): 0.75, ("3", "kd_standardized", "resnet18", 30): 0.75,
    ("3", "kd_tuned", "resnet50", 30): 0.73, ("3", "kd_tuned", "resnet18", 30): 0.74,
    ("1", "scratch", "", 100): 0.72, ("3", "kd", "resnet18", 100): 0.76, ("3", "kd", "resnet50", 100): 0.75,
    ("4", "kd_mean_prob", BOTH, 100): 0.77,
    ("2", "freeze_last_block", "resnet50", 10): 0.83, ("2", "freeze_last_layer", "resnet50", 20): 0.80,
    ("2", "freeze_last_block", "resnet18", 10): 0.82, ("2", "freeze_last_layer", "resnet18", 20): 0.78,
    ("extra", "kd_unlabelled", "resnet18", 30): 0.76, ("extra", "scratch_all_labels", "", 30): 0.80,
    ("extra", "scratch", "", 100): 0.72, ("extra", "kd", "resnet18", 100): 0.74,
}  # fmt: skip
NOISE = (0.0, 0.001, -0.001, 0.002, -0.002)  # by seed; other by arm, so that differences have a spread


def rows(arms=CORE_ARMS, seeds=5):
    """Rows of results.csv: every arm at about the accuracy given."""
    lines = []
    for number, ((task, arm, teachers, epochs), accuracy) in enumerate(arms.items()):
        for seed in range(seeds):
            value = accuracy + NOISE[(seed + number) % 5]
            for split, metric, found in (
                ("test", "accuracy", value), ("val", "accuracy", value), ("test", "nll", 1.6 - value), ("test", "ece", 0.9 - value),
            ):  # fmt: skip
                lines.append((task, arm, teachers, 9000, epochs, seed, split, metric, found))
    return pd.DataFrame(lines, columns="task arm teachers labels epochs seed split metric value".split())


def values(frame, **changes):
    return claim_values(frame, {"settings": SETTINGS | changes})


def moved(frame, arm, accuracies, epochs=None, task=None):
    """The rows with other test accuracies of an arm, one a seed."""
    frame = frame.copy()
    chosen = (frame.arm == arm) & (frame.split == "test") & (frame.metric == "accuracy")
    chosen &= (frame.epochs == epochs) if epochs else True
    chosen &= (frame.task == task) if task else True
    frame.loc[chosen, "value"] = frame.loc[chosen, "seed"].map(dict(enumerate(accuracies)))
    return frame


def test_every_claim_has_a_name_of_its_own_and_a_wording_for_every_outcome():
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)
    for claim in CLAIMS:
        assert set(claim.say) == set(OUTCOMES), claim.name
        assert len(set(claim.say.values())) == len(OUTCOMES), claim.name
        assert all("{numbers}" in wording for wording in claim.say.values()), claim.name


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
@pytest.mark.parametrize("by, expected", [
    ((0.03, 0.031, 0.032, 0.03, 0.031), "helps"), ((-0.03, -0.031, -0.032, -0.03, -0.031), "hurts"),
    ((0.001, -0.001, 0.002, -0.002, 0.0), "equivalent"), ((0.05, -0.05, 0.03, -0.04, 0.02), "not separable"),
    ((0.03,), "too few seeds"),
])  # fmt: skip
def test_the_sentence_follows_its_difference(monkeypatch, claim, by, expected):
    """All arms alike but the one the claim is about, which differs from them by so much."""
    monkeypatch.setattr(claims, "CLAIMS", (claim,))
    flat = rows({key: 0.7 for key in CORE_ARMS | STUDY_ARMS}, seeds=len(by))
    flat["value"] = 0.7
    # the parts that arms play are fixed by validation accuracies, which are no part of what is claimed
    is_val = (flat.split == "val") & flat.teachers.eq("resnet18")
    flat.loc[is_val, "value"] = 0.8
    arm, teachers, at = re.fullmatch(r"(\w+)/?([\w+*]*)@?(\w*)(?: - .*)?", claim.a).groups()
    arm = "scratch" if arm == "smoothed" else arm
    teachers = {"better": "resnet18", "stronger": "resnet18", "lesser": "resnet50", "*": "resnet18"}.get(
        teachers, teachers
    )
    if teachers == "resnet18" and not ((flat.arm == arm) & (flat.teachers == teachers)).any():
        (teachers,) = flat[flat.arm == arm].teachers.unique()  # the arm of which only this teacher's was run
    epochs = {"long": 100, "extra": None}.get(at, None)
    chosen = (flat.arm == arm) & (flat.teachers == teachers) & (flat.split == "test") & (flat.metric == claim.metric)
    if arm in ("scratch", "kd", "kd_mean_prob"):
        chosen &= (flat.epochs == (epochs or 30)) & (flat.task != "extra")
    assert chosen.sum() == len(by)
    sign = -1 if claim.metric in ("nll", "ece") else 1
    flat.loc[chosen, "value"] += sign * pd.Series(by).repeat(1).to_numpy()
    if expected == "equivalent" and claim.metric == "nll":
        expected = "not separable"  # no difference of the NLL is called none
    said = values(flat)[f"claim/{claim.name}"]
    before = re.escape(claim.say[expected]).replace(r"\{", "{").replace(r"\}", "}")
    pattern = re.sub(r"{\w+}", ".*?", before)
    assert re.search(pattern, said, flags=re.IGNORECASE), said


def test_numbers_are_points_with_their_interval():
    frame = moved(moved(rows(), "scratch", [0.70] * 5), "kd_mean_prob", [0.71, 0.72, 0.73, 0.72, 0.72])
    assert values(frame)["claim/two-teachers"] == (
        "Distillation from both teachers, by the mean of their probabilities, raises the student's test accuracy "
        "(+2.00 points, 95 % CI [+1.12, +2.88], n = 5, Holm-adjusted p = 0.006)."
    )


def test_a_sure_but_small_difference_says_so():
    frame = moved(moved(rows(), "scratch", [0.70] * 5), "kd_mean_prob", [0.703, 0.704, 0.705, 0.704, 0.704])
    assert "raises the student's test accuracy, by less than a point (+0.40" in values(frame)["claim/two-teachers"]


def test_one_seed_makes_a_report_too():
    found = values(rows(CORE_ARMS | STUDY_ARMS, seeds=1))
    assert all("one seed" in text for name, text in found.items() if name.startswith("claim/"))
    assert found["claim/two-teachers"].endswith("(+4.00 points, one seed).")


def test_only_common_seeds_are_compared():
    frame = rows(CORE_ARMS | STUDY_ARMS)
    frame = frame[(frame.epochs != 100) | (frame.seed < 3)]
    assert "n = 3)" in values(frame)["claim/longer-scratch"] and "n = 5)" in values(frame)["claim/two-lesser"]
    apart = rows().assign(seed=lambda found: found.seed + 10 * (found.arm == "scratch"))
    assert "claim kd-resnet50" in message_of(values, apart)


def test_the_better_single_teacher_is_chosen_by_validation():
    frame = rows()
    is_val = (frame.split == "val") & (frame.arm == "kd")
    frame.loc[is_val & (frame.teachers == "resnet50"), "value"] = 0.9  # though its students are worse on test
    assert values(rows())["better/words"] == "ResNet-18" and values(frame)["better/words"] == "ResNet-50"
    assert "alone, ResNet-50 (+2.00" in values(frame)["claim/two-better"]
    assert "alone, ResNet-18, by less than a point (+1" not in values(frame)["claim/two-better"]


def test_test_accuracies_choose_no_arm():
    frame = rows(CORE_ARMS | STUDY_ARMS)
    is_test = frame.split == "test"
    permuted = frame.assign(value=frame.value.where(~is_test, 1 - frame.value))
    assert values(permuted)["better/words"] == values(frame)["better/words"]


@pytest.mark.parametrize("arm", sorted({arm for _, arm, _, _ in CORE_ARMS if not arm.startswith("last")}))
def test_a_missing_arm_of_the_core_is_named_with_its_claim(arm):
    message = message_of(values, rows()[lambda frame: frame.arm != arm])
    assert re.search(rf"claim [a-z0-9-]+: .*\b{arm}", message)


@pytest.mark.parametrize("key", STUDY_ARMS, ids=lambda key: "-".join(map(str, key)))
def test_a_study_is_never_told_by_half(key):
    arms = {other: value for other, value in (CORE_ARMS | STUDY_ARMS).items() if other != key}
    has_other = key[1] in ("kd_shuffled", "kd_out_of_fold") or key[1:3] == ("kd", "resnet50")
    if has_other and key[0] != "extra":
        assert values(rows(arms))  # the other teacher's is there, and the sentence is about that one
        return
    alone = {("1", "scratch", "", 100): "budget", ("3", "kd_self", "student", 30): "self"}
    if key in alone:
        assert f"group/{alone[key]}" not in values(rows(arms))  # without it there is nothing to speak of
        return
    assert re.search(rf"claim [a-z0-9-]+: .*\b{key[1]}", message_of(values, rows(arms)))


def test_without_the_study_its_groups_are_left_out():
    assert {key for key in values(rows()) if key.startswith("group/")} == {f"group/{CORE}", "group/smoothing"}
    everything = values(rows(CORE_ARMS | STUDY_ARMS))
    assert {f"group/{name}" for name in ("study", "controls", "budget", "freeze", "unlabelled")} <= everything.keys()
    assert {key for key, _ in values(rows()).items() - everything.items()} == {"words/exploratory"}
    assert {f"claim/{claim.name}" for claim in CLAIMS} <= everything.keys()


def test_a_claim_of_every_teacher_is_one_sentence_where_the_same_is_true_of_both():
    frame = rows()
    said = values(frame)["claim/nll"]
    assert re.fullmatch(
        r"Distillation from either ResNet lowers the student's test NLL \(ResNet-50: −\S+ nats, [^;]*, n = 5; "
        r"ResNet-18: −\S+ nats, [^;]*, n = 5\)\.", said,
    )  # fmt: skip
    worse = (frame.teachers == "resnet18") & (frame.metric == "nll")
    apart = values(frame.assign(value=frame.value + worse))["claim/nll"]
    assert re.findall(r"from (ResNet-\d+) (\w+) the", apart) == [("ResNet-50", "lowers"), ("ResNet-18", "raises")]


def test_a_short_claim_says_the_same_without_the_numbers():
    found = values(rows(CORE_ARMS | STUDY_ARMS))
    assert found["short/two-teachers"] == (
        "Distillation from both teachers, by the mean of their probabilities, raises the student's test accuracy."
    )
    for claim in CLAIMS:
        short, whole = found[f"short/{claim.name}"], found[f"claim/{claim.name}"]
        assert re.sub(r" \([^()]*(points|nats)[^()]*\)", "", whole) == short and "CI" not in short


def test_the_share_of_the_distance_that_distillation_covers():
    frame = rows(CORE_ARMS | STUDY_ARMS)
    for arm, accuracy in (("kd_unlabelled", 0.76), ("scratch_all_labels", 0.80)):
        frame = moved(frame, arm, [accuracy] * 5)
    frame = moved(frame, "scratch", [0.72, 0.72, 0.72, 0.719, 0.721], task="extra")
    assert "from ResNet-18 without them covers 50 % of that distance" in values(frame)["claim/all-labels"]


def test_two_teachers_that_cover_different_shares_have_a_sentence_each():
    arms = CORE_ARMS | STUDY_ARMS | {
        ("extra", "kd_unlabelled", "resnet50", 30): 0.74, ("extra", "kd", "resnet50", 100): 0.73,
    }  # fmt: skip
    said = values(rows(arms))["claim/all-labels"]
    assert len(set(re.findall(r"from (ResNet-\d+) without them covers (\d+) %", said))) == 2


def test_the_exploratory_comparisons_are_counted():
    found = values(rows())
    # of the core: 11 of accuracy, less four primary ones, of which one has two names; NLL and ECE of three students each
    assert found["words/exploratory"] == str(10 - 4 + 6)
    assert int(values(rows(CORE_ARMS | STUDY_ARMS))["words/exploratory"]) > 30


def test_numbers_that_fit_no_wording_fail_by_name():
    message = message_of(values, moved(rows(), "kd_confidence", [float("nan")] * 5))
    assert "claim two-confidence: no wording fits" in message
    twice = pd.concat([rows(), rows()[lambda frame: frame.arm == "scratch"]])
    assert "results.csv has two rows of scratch , seed 0" in message_of(values, twice)


def test_the_primary_comparisons_are_corrected_for_their_number():
    frame = moved(moved(rows(), "scratch", [0.70] * 5), "kd_mean_prob", [0.71, 0.72, 0.73, 0.72, 0.72])
    frame = moved(frame, "kd", [0.71, 0.70, 0.69, 0.71, 0.70])
    said = {name: values(frame)[f"claim/{name}"] for name in PRIMARY}
    # two-teachers - scratch: differences of mean 2, sd 0.707, so t = 6.32 with 4 degrees of freedom, p = 0.0032. The
    # first and the fourth compare different teachers' students, alike here: four comparisons
    assert "p = 0.013" in said["two-teachers"] and all("Holm-adjusted" in text for text in said.values())
    # the fourth again, by another name, and another measure of the first
    assert "Holm-adjusted" in values(frame)["claim/kd-resnet18"] and "Holm" not in values(frame)["claim/nll"]
    is_val = (frame.split == "val") & (frame.arm == "kd")
    same = frame.assign(value=frame.value.where(~is_val | (frame.teachers == "resnet18"), 0.9))
    # now ResNet-50 is the better one, and the fourth comparison is the first again: it counts once
    assert "p = 0.010" in values(same)["claim/two-teachers"]
    assert "Holm" not in values(same)["claim/kd-resnet18"]


def test_a_primary_comparison_needs_its_corrected_p_value_too():
    """Differences of mean 0.5 and sd 0.29 points: the interval excludes zero, p is 0.019, and three times that is not."""
    frame = moved(moved(rows(), "scratch", [0.70] * 5), "kd_mean_prob", [0.701, 0.705, 0.709, 0.704, 0.706])
    for number, arm in enumerate(("kd", "kd_mean_logit")):
        frame = moved(frame, arm, [0.70, 0.71, 0.69, 0.70 + number / 100, 0.70])
    said = values(frame)["claim/two-teachers"]
    assert "makes no difference larger than a point" in said and "[+0.14, +0.86]" in said and "Holm" not in said
    # the same numbers in an exploratory comparison are an effect
    frame = moved(frame, "kd_mean_logit", [0.701, 0.705, 0.709, 0.704, 0.706])
    assert "raises the student's test accuracy, by less than a point (+0.50" in values(frame)["claim/two-mean-logit"]


def test_label_smoothing_is_a_control_of_its_own_where_the_student_has_none():
    found = values(rows(), label_smoothing=0.0)
    assert "group/smoothing" not in found and "claim/beyond-smoothing" not in found
    assert (found["words/primary"], values(rows())["words/primary"]) == ("Three", "Four")
    shuffled = {key: value for key, value in STUDY_ARMS.items() if key[1] == "kd_shuffled"}
    found = values(rows(CORE_ARMS | shuffled | {("1", "label_smoothing", "", 30): 0.71}), label_smoothing=0.0)
    assert "more than label smoothing does (+2.0" in found["claim/beyond-smoothing"]
    assert found["claim/smoothing"].startswith("Label smoothing raises the student's test accuracy")


def test_the_table_of_primary_comparisons(tiny, toy_data):
    right_of = {
        ("scratch", ""): (5, 6, 5), ("kd", "resnet50"): (7, 8, 8), ("kd", "resnet18"): (8, 8, 9), ("kd_mean_prob", BOTH): (8, 8, 9),
    }  # fmt: skip
    arms = [
        [a_run(key, seed, toy_data, right) for seed, right in enumerate(rights)] for key, rights in right_of.items()
    ]
    teachers = [dataclasses.replace(fake_teacher(toy_data), runs=2 * fake_teacher(toy_data).runs)]
    table = primary_table(arms, toy_data, tiny(seeds=[0, 1, 2]), teachers)
    assert table["Comparison"].tolist() == [
        "ResNet-50 − scratch", "Both − scratch", "Both − the better one, ResNet-18",
        "The better one, ResNet-18 − scratch (label smoothing)",
    ]  # fmt: skip
    # differences 20, 20, 30 points: mean 23.33, sd 5.77, so t = 7.00 with 2 degrees of freedom
    first = table.iloc[0]
    assert (first["Difference"], first["Over seeds"], first["n"], first["p"]) == (
        "+23.33",
        "[+8.99, +37.68]",
        3,
        "0.020",
    )
    assert first["p (Holm)"] == "0.079"
    # seeds 0 and 2 learn from the same run, so that there are two values: 25 and 20
    assert first["Over teacher runs"] == "[−9.27, +54.27]"
    assert first["Over images"].startswith("[+")
    assert table.iloc[2].tolist()[1:5] == ["+0.00", *["[+0.00, +0.00]"] * 3]
    assert "claim two-teachers" in message_of(primary_table, arms[:3], toy_data, tiny(), teachers)
    single = primary_table([runs[:1] for runs in arms], toy_data, tiny(seeds=[0]), teachers)
    assert set(single["p"]) == set(single["Over seeds"]) == set(single["Over teacher runs"]) == {"–"}


def a_run(key, seed, dataset, right):
    """A student that gets so many images of each part right."""
    labels = dataset.test.labels
    named = torch.where(torch.arange(len(labels)) < right, labels, (labels + 1) % 10)
    logits = torch.eye(10)[named]
    return StudentRun(
        key[0], tuple(filter(None, key[1].split("+"))), seed, {}, {"val": logits, "test": logits}, {}, 0.0, ""
    )

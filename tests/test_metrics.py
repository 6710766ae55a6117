import math

import numpy as np
import pytest
import torch

from kdutils.models import SmallCNN
from kdutils.results import metrics
from kdutils.results.metrics import Difference


def logits_of(probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


@pytest.fixture
def four():
    """Predictions 0, 0, 1, 0 for images of the classes 0, 1, 1, 2; class 2 is never predicted."""
    logits = logits_of([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.6, 0.1, 0.3]])
    return logits, torch.tensor([0, 1, 1, 2])


# --- of logits ---


def test_accuracy_and_nll(four):
    expected = -sum(math.log(p) for p in (0.7, 0.3, 0.8, 0.3)) / 4
    assert metrics.accuracy(*four) == 0.5 and metrics.correct(*four).tolist() == [True, False, True, False]
    assert metrics.nll(*four) == pytest.approx(expected, abs=1e-12)
    assert metrics.evaluate(*four) == {"accuracy": 0.5, "nll": metrics.nll(*four), "ece": metrics.ece(*four)}
    half = torch.tensor([[2.0, 1.0]]).half(), torch.tensor([0])
    assert metrics.nll(*half) == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-12)


def test_ece_by_hand(four):
    # Confidences 0.7, 0.5, 0.8, 0.6; right, wrong, right, wrong. With ten bins each has its own.
    assert metrics.ece(*four, bins=10) == pytest.approx((0.3 + 0.5 + 0.2 + 0.6) / 4)
    assert metrics.ece(*four, bins=1) == pytest.approx(0.15)  # only the means count: |0.5 - 0.65|
    labels = torch.tensor([0, 0, 0, 1])
    assert metrics.ece(logits_of([[0.75, 0.25]] * 4), labels) == pytest.approx(0, abs=1e-12)
    assert metrics.ece(torch.tensor([[1000.0, 0.0]] * 4), labels) == pytest.approx(0.25)


def test_predictive_entropy():
    assert metrics.predictive_entropy(torch.zeros(3, 10)) == pytest.approx(math.log(10))
    assert metrics.predictive_entropy(torch.tensor([[1000.0, 0.0]])) == 0
    half = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1)) / 2
    assert metrics.predictive_entropy(logits_of([[0.9, 0.1], [1.0, 0.0]])) == pytest.approx(half)


def test_agreement_on_what_the_teacher_gets_right_and_wrong(four):
    student, labels = four
    assert metrics.agreement(student, 5 * student) == 1 and metrics.agreement(student, student[:, [1, 0, 2]]) == 0
    assert metrics.agreement(student, torch.tensor([[1.0, 0, 0]] * 4)) == 0.75
    teacher = torch.eye(3)[[0, 1, 1, 0]]  # right, right, right, wrong; the student says 0, 0, 1, 0
    assert metrics.agreement_by_teacher(student, teacher, labels) == {"teacher_right": 2 / 3, "teacher_wrong": 1}
    never_wrong = metrics.agreement_by_teacher(student, torch.eye(3)[labels], labels)
    assert never_wrong["teacher_right"] == 0.5 and math.isnan(never_wrong["teacher_wrong"])


def test_fidelity_is_the_divergence_from_the_teacher():
    teacher, student = logits_of([[0.5, 0.5], [1.0, 0.0]]), logits_of([[0.25, 0.75], [0.5, 0.5]])
    by_hand = (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75) + math.log(1 / 0.5)) / 2
    assert metrics.fidelity(student, teacher.clamp(min=-50)) == pytest.approx(by_hand, abs=1e-9)
    assert metrics.fidelity(student, student + 7) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="shapes differ"):
        metrics.fidelity(student, student[:1])


def test_mean_probabilities_are_a_mean_of_probabilities():
    mean = metrics.mean_probabilities([logits_of([[0.9, 0.1]]) + 3, logits_of([[0.2, 0.8]])])
    assert mean.softmax(dim=1)[0].tolist() == pytest.approx([0.55, 0.45])


def test_confusion_matrix_per_class_and_macro_scores(four):
    assert metrics.confusion_matrix(*four).tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 0]]  # rows: the true classes
    table = metrics.per_class_scores(*four, ["cat", "dog", "eel"])
    assert table.columns.tolist() == ["class", "precision", "recall", "f1", "support"]
    assert table["class"].tolist() == ["cat", "dog", "eel"] and table["support"].tolist() == [1, 2, 1]
    assert table["precision"].tolist() == pytest.approx([1 / 3, 1, 0])
    assert table["recall"].tolist() == pytest.approx([1, 1 / 2, 0])
    assert table["f1"].tolist() == pytest.approx([1 / 2, 2 / 3, 0])
    assert metrics.macro_scores(*four) == pytest.approx({"precision": 4 / 9, "recall": 1 / 2, "f1": 7 / 18})
    absent = metrics.per_class_scores(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([0]), "abc")
    assert absent["f1"].tolist() == [1, 0, 0]


@pytest.mark.parametrize("function", [metrics.accuracy, metrics.nll, metrics.ece, metrics.confusion_matrix])
@pytest.mark.parametrize(
    "logits, labels",
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)),
        (torch.zeros(3), torch.tensor([0, 1, 2])),
        (torch.zeros(2, 3), torch.tensor([0])),
        (torch.zeros(2, 3), torch.tensor([0, 3])),
        (torch.zeros(2, 3), torch.tensor([-1, 0])),
    ],
)
def test_shapes_that_do_not_fit(function, logits, labels):
    with pytest.raises(ValueError):
        function(logits, labels)


# --- of several seeds ---


def test_mean_sd():
    assert metrics.mean_sd([1, 2, 3, 4]) == pytest.approx((2.5, math.sqrt(5 / 3)))
    mean, sd = metrics.mean_sd([3.0])
    assert mean == 3 and math.isnan(sd)


def test_paired_difference_by_hand():
    result = metrics.paired_difference([0.70, 0.72, 0.74], [0.68, 0.71, 0.71])
    # Differences 0.02, 0.01, 0.03: mean 0.02, sd 0.01; t(0.975, 2) = 4.3026527.
    half = 4.3026527 * 0.01 / math.sqrt(3)
    assert result == pytest.approx(Difference(0.02, 0.02 - half, 0.02 + half, 3), abs=1e-8)
    narrower = metrics.paired_difference([0.70, 0.72, 0.74], [0.68, 0.71, 0.71], confidence=0.5)
    assert result.low < narrower.low < narrower.high < result.high


@pytest.mark.parametrize("n", [1, 2])
def test_fewer_than_three_seeds_give_no_interval_no_p_value_and_no_verdict(n):
    found = metrics.paired_difference([0.7] * n, [0.6] * n)
    assert found.mean == pytest.approx(0.1) and found.n == n
    assert math.isnan(found.low) and math.isnan(found.high)
    assert math.isnan(metrics.paired_p_value([0.7] * n, [0.6] * n)) and metrics.verdict(found) == ""


@pytest.mark.parametrize("a, b", [([], []), ([0.1, 0.2], [0.1])])
def test_a_difference_needs_the_values_of_the_same_seeds(a, b):
    for function in (metrics.paired_difference, metrics.paired_p_value):
        with pytest.raises(ValueError):
            function(a, b)


@pytest.mark.parametrize(
    "t, n, expected",
    [(2.7764451, 5, 0.05), (4.6040949, 5, 0.01), (2.2621572, 10, 0.05), (0.0, 3, 1.0), (-4.3026527, 3, 0.05)],
)
def test_p_values_against_tables(t, n, expected):
    """Differences of mean m and sd s with m / (s / sqrt(n)) = t."""
    spread = np.linspace(-1, 1, n)
    values = spread / spread.std(ddof=1) * math.sqrt(n) + t
    assert metrics.paired_p_value(values, np.zeros(n)) == pytest.approx(expected, abs=1e-7)


def test_p_values_without_a_spread():
    assert metrics.paired_p_value([1] * 3, [0] * 3) == 0 and metrics.paired_p_value([1] * 3, [1] * 3) == 1


def test_holm_by_hand():
    assert metrics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert metrics.holm([0.9, 0.8]) == [1, 1] and metrics.holm([]) == []
    assert metrics.holm([math.nan, 0.03, 0.02])[1:] == [0.04, 0.04]


def test_what_a_seed_does_to_both_methods_cancels():
    a, b = [0.1, 0.5, 0.9, 0.3], [0.09, 0.48, 0.89, 0.28]
    verdicts = [metrics.verdict(metrics.paired_difference(*pair)) for pair in ((a, b), (b, a), (a, sorted(b)))]
    assert verdicts == ["higher", "lower", "no clear difference"]


@pytest.mark.parametrize(
    "low, high, p, expected",
    [
        (0.1, 0.9, math.nan, "higher"),
        (0.1, 0.9, 0.049, "higher"),
        (0.1, 0.9, 0.05, "no clear difference"),
        (-0.9, -0.1, math.nan, "lower"),
        (-0.9, -0.1, 0.05, "no clear difference"),
        (0, 2, math.nan, "no clear difference"),
        (-0.1, 0.1, 0.04, "no clear difference"),
    ],
)
def test_a_verdict_follows_the_interval_and_the_adjusted_p_value(low, high, p, expected):
    assert metrics.verdict(Difference((low + high) / 2, low, high, 5), p) == expected


@pytest.mark.parametrize("mean, n", [(math.nan, 5), (math.nan, 1), (math.inf, 3)])
def test_what_is_not_a_number_has_no_verdict(mean, n):
    with pytest.raises(ValueError):
        metrics.verdict(Difference(mean, math.nan, math.nan, n))


def test_the_bootstrap_is_that_of_drawing_images():
    rng = np.random.default_rng(3)
    right_a, right_b = rng.random((5, 400)) < 0.7, rng.random((5, 400)) < 0.65
    drawn = rng.integers(400, size=(4000, 400))
    means = (right_a.mean(axis=0) - right_b.mean(axis=0))[drawn].mean(axis=1)
    found = metrics.bootstrap_difference(right_a, right_b, resamples=4000)
    assert found.mean == pytest.approx(right_a.mean() - right_b.mean()) and found.n == 400
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.004)
    assert metrics.bootstrap_difference(right_a, right_b, resamples=4000) == found
    other = metrics.bootstrap_difference(right_b, right_a, resamples=4000, seed=1)
    assert other[:3] == pytest.approx((-found.mean, -found.high, -found.low), abs=0.004)
    # seeds that agree on every image are no more images: the interval is that of one
    once = metrics.bootstrap_difference(right_a[:1], right_b[:1])
    assert metrics.bootstrap_difference(right_a[[0] * 5], right_b[[0] * 5])[1:3] == pytest.approx(once[1:3])


@pytest.mark.parametrize("shapes", [((2, 5), (3, 5)), ((5,), (5,)), ((0, 5), (0, 5))])
def test_the_bootstrap_needs_the_same_seeds_and_images(shapes):
    with pytest.raises(ValueError, match=r"\[S, N\]"):
        metrics.bootstrap_difference(*(np.zeros(shape, dtype=bool) for shape in shapes))


# --- of a network ---


def test_parameters():
    assert metrics.parameter_count(SmallCNN()) == 268_650

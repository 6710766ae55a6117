"""Measures: pure functions of logits and labels, of the numbers of several seeds, and of a network.

`logits` are float tensors [N, C] of any precision and on any device, `labels` int64 tensors [N] with values
in [0, C); N >= 1. Everything is computed in float64 on the CPU. Wrong shapes and labels raise ValueError.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional as F

MIN_SEEDS = 3  # fewer give no interval and no p-value


def _checked(logits: Tensor) -> Tensor:
    if logits.ndim != 2 or len(logits) == 0:
        raise ValueError(f"logits must be [N, C] with N >= 1, not {list(logits.shape)}")
    return logits.detach().cpu().double()


def _labelled(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits, labels = _checked(logits), labels.detach().cpu()
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels must be [{len(logits)}] like the logits, not {list(labels.shape)}")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels must lie in [0, {logits.shape[1]})")
    return logits, labels


def _pair(logits_a: Tensor, logits_b: Tensor) -> tuple[Tensor, Tensor]:
    if logits_a.shape != logits_b.shape:
        raise ValueError(f"shapes differ: {list(logits_a.shape)} and {list(logits_b.shape)}")
    return _checked(logits_a), _checked(logits_b)


# --- of one set of logits ---


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Which images are classified correctly: bool [N]."""
    logits, labels = _labelled(logits, labels)
    return logits.argmax(dim=1) == labels


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose greatest logit is that of their class, in [0, 1]."""
    return correct(logits, labels).double().mean().item()


def nll(logits: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood of the labels, in nats."""
    return F.cross_entropy(*_labelled(logits, labels)).item()


def ece(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error, in [0, 1]: the mean distance between confidence and accuracy over `bins`
    equally wide bins (low, high] of confidence, weighted by the number of images in each.

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    logits, labels = _labelled(logits, labels)
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = (predicted == labels).double() - confidence
    return torch.zeros(bins).double().index_add_(0, bin_of, gaps).abs().sum().item() / len(labels)


def evaluate(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """The three measures of every method: {"accuracy", "nll", "ece"}."""
    return {"accuracy": accuracy(logits, labels), "nll": nll(logits, labels), "ece": ece(logits, labels)}


def predictive_entropy(logits: Tensor) -> float:
    """Mean entropy of the predicted distributions, in nats: from 0 (certain) to log C (uniform)."""
    return torch.special.entr(_checked(logits).softmax(dim=1)).sum(dim=1).mean().item()


def mean_probabilities(logits: Sequence[Tensor]) -> Tensor:
    """Logits float64 [N, C] whose softmax is the mean of the softmaxes of several [N, C], such as one per view."""
    logs = torch.stack([_checked(of_view).log_softmax(dim=1) for of_view in logits])
    return logs.logsumexp(dim=0) - math.log(len(logs))


def agreement(logits_a: Tensor, logits_b: Tensor) -> float:
    """Share of images on which two models predict the same class, in [0, 1], whether correct or not.

    Top-1 agreement in Stanton et al., Does Knowledge Distillation Really Work?, NeurIPS 2021.
    """
    logits_a, logits_b = _pair(logits_a, logits_b)
    return (logits_a.argmax(dim=1) == logits_b.argmax(dim=1)).double().mean().item()


def agreement_by_teacher(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> dict[str, float]:
    """`agreement` of student and teacher on the images that the teacher classifies correctly, and on its errors:
    {"teacher_right", "teacher_wrong"}; nan where there are no such images."""
    student, teacher = _pair(student_logits, teacher_logits)
    same, is_right = student.argmax(dim=1) == teacher.argmax(dim=1), correct(teacher, labels)
    parts = {"teacher_right": is_right, "teacher_wrong": ~is_right}
    return {name: same[part].double().mean().item() for name, part in parts.items()}


def fidelity(student_logits: Tensor, teacher_logits: Tensor) -> float:
    """KL(softmax(teacher) || softmax(student)) in nats, mean over images: 0 for equal distributions.

    On held-out images, as in Stanton et al., Does Knowledge Distillation Really Work?, NeurIPS 2021.
    """
    student, teacher = (of.log_softmax(dim=1) for of in _pair(student_logits, teacher_logits))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True).item()


def confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts, int64 [C, C]: row = true class, column = predicted class."""
    logits, labels = _labelled(logits, labels)
    classes = logits.shape[1]
    cells = labels * classes + logits.argmax(dim=1)
    return torch.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def per_class_scores(logits: Tensor, labels: Tensor, classes: Sequence) -> pd.DataFrame:
    """A row per class: class, precision, recall, f1 (in [0, 1]) and support (its images).

    A score with a zero denominator is 0: the precision of a class that is never predicted, the recall of
    one without images, the F1 of one with neither.
    """
    matrix = confusion_matrix(logits, labels)
    if len(classes) != len(matrix):
        raise ValueError(f"{len(classes)} class names for {len(matrix)} classes")
    hits, predicted, support = matrix.diag(), matrix.sum(dim=0), matrix.sum(dim=1)
    scores = {
        "precision": hits / predicted.clamp(min=1),
        "recall": hits / support.clamp(min=1),
        "f1": 2 * hits / (predicted + support).clamp(min=1),
        "support": support,
    }
    return pd.DataFrame({"class": list(classes), **{name: column.tolist() for name, column in scores.items()}})


def macro_scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Unweighted means over all classes of `per_class_scores`: {"precision", "recall", "f1"}."""
    table = per_class_scores(logits, labels, range(logits.shape[1]))
    return {score: float(table[score].mean()) for score in ("precision", "recall", "f1")}


# --- of several seeds ---


class Difference(NamedTuple):
    """A mean over `n` seeds and its confidence interval; `low` and `high` are nan for fewer than `MIN_SEEDS`."""

    mean: float
    low: float
    high: float
    n: int


def mean_sd(values: Iterable[float]) -> tuple[float, float]:
    """(mean, sample standard deviation) of one or more numbers; the latter is nan for a single one."""
    values = [float(value) for value in values]
    if not values:
        raise ValueError("no values")
    return math.fsum(values) / len(values), statistics.stdev(values) if len(values) > 1 else math.nan


def mean_interval(values: Iterable[float], confidence: float = 0.95) -> Difference:
    """The mean of the values with its Student-t interval: for the mean over all possible seeds, of roughly normal
    values."""
    values = list(values)
    (mean, sd), n = mean_sd(values), len(values)
    half = math.nan
    if n >= MIN_SEEDS:
        from scipy.special import stdtrit  # slow to import

        half = float(stdtrit(n - 1, (1 + confidence) / 2)) * sd / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)


def paired_difference(a: Iterable[float], b: Iterable[float], confidence: float = 0.95) -> Difference:
    """`Difference` a - b of two methods' values, listed in the same order of seeds.

    The interval is that of the per-seed differences: what a seed does to both methods alike cancels.
    Raises ValueError for different lengths and for empty lists.
    """
    return mean_interval(_differences(a, b), confidence)


def paired_p_value(a: Iterable[float], b: Iterable[float]) -> float:
    """Two-sided p-value of Student's paired t-test, in [0, 1]; nan for fewer than `MIN_SEEDS` seeds. It is below 0.05
    when the 95 % interval of `paired_difference` excludes zero."""
    differences = _differences(a, b)
    (mean, sd), n = mean_sd(differences), len(differences)
    if n < MIN_SEEDS:
        return math.nan
    if sd == 0:
        return float(mean == 0)
    from scipy.special import stdtr  # slow to import

    return 2 * float(stdtr(n - 1, -abs(mean) / sd * math.sqrt(n)))


def _differences(a: Iterable[float], b: Iterable[float]) -> list[float]:
    a, b = list(a), list(b)
    if len(a) != len(b):
        raise ValueError(f"needs the values of the same seeds, not {len(a)} and {len(b)} values")
    return [x - y for x, y in zip(a, b)]


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, in the given order: each at least the given one and at most 1. nan, of a
    comparison without a test, stays nan and does not count.

    Where a difference counts as real below 0.05, the probability of any error in all comparisons is at most 0.05.
    Holm: A Simple Sequentially Rejective Multiple Test Procedure, Scandinavian Journal of Statistics 6, 1979.
    """
    adjusted, least = [math.nan] * len(p_values), 0.0
    tested = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    for rank, (p, place) in enumerate(tested):
        least = max(least, min(1.0, (len(tested) - rank) * p))
        adjusted[place] = least
    return adjusted


def verdict(difference: Difference, p_value: float = math.nan) -> str:
    """What a `Difference` shows: "higher" or "lower" if its interval excludes zero and its p-value (adjusted for
    several comparisons; nan: none) is below 0.05, else "no clear difference"; "" for fewer than `MIN_SEEDS` seeds.

    Raises ValueError for a mean that is nan or infinite.
    """
    mean, low, high, n = difference
    if not math.isfinite(mean):
        raise ValueError(f"the difference must be a number, not {mean}")
    if n < MIN_SEEDS:
        return ""
    if p_value >= 0.05 or not (low > 0 or high < 0):
        return "no clear difference"
    return "higher" if low > 0 else "lower"


def bootstrap_difference(
    right_a: ArrayLike, right_b: ArrayLike, resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> Difference:
    """`Difference` of the accuracies of two methods, a - b, in [-1, 1], over test images: the mean over all seeds and
    images, and the percentile interval of that mean over `resamples` draws of the images, with replacement.

    right_a, right_b: which images each run classifies correctly, bool [S, N], one row per seed; `n` is N.
    Every draw takes the same images for both methods and all seeds. So the interval covers other test images, and not
    other seeds: the complement of `paired_difference`.
    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.

    Raises ValueError for shapes that differ or are not [S, N].
    """
    a, b = (np.asarray(right, dtype=float) for right in (right_a, right_b))
    if a.shape != b.shape or a.ndim != 2 or a.size == 0:
        raise ValueError(f"needs the same seeds and images of both: [S, N], not {a.shape} and {b.shape}")
    # The sum of an image's differences over seeds takes 2 S + 1 values at most: to draw images is to draw how many
    # have each value. (scipy.stats.bootstrap draws every image: the same interval, in a hundred times the time.)
    values, counts = np.unique((a - b).sum(axis=0), return_counts=True)
    draws = np.random.default_rng(seed).multinomial(a.shape[1], counts / a.shape[1], size=resamples)
    low, high = np.quantile(draws @ values / a.size, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Difference(float(counts @ values / a.size), float(low), float(high), a.shape[1])


# --- of a network ---


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, trained or not. Buffers do not count."""
    return sum(parameter.numel() for parameter in model.parameters())

"""What is measured: pure functions of logits and labels, of the numbers of several seeds, and of a model.

`logits` are float tensors [N, C] of any precision and on any device, `labels` int64 tensors [N] with values
in [0, C); N >= 1. Everything is computed in float64 on the CPU. Shapes that do not fit raise ValueError.
"""

import contextlib
import math
import statistics
import time
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F


def _checked(logits, labels=None):
    if logits.ndim != 2 or len(logits) == 0:
        raise ValueError(f"logits must be [N, C] with N >= 1, not {list(logits.shape)}")
    logits = logits.detach().cpu().double()
    if labels is None:
        return logits
    labels = labels.detach().cpu()
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels must be [{len(logits)}] like the logits, not {list(labels.shape)}")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels must lie in [0, {logits.shape[1]})")
    return logits, labels


# --- of one set of logits ---


def accuracy(logits, labels):
    """Share of images whose greatest logit is that of their class, in [0, 1]."""
    logits, labels = _checked(logits, labels)
    return (logits.argmax(dim=1) == labels).double().mean().item()


def nll(logits, labels):
    """Mean negative log-likelihood of the labels, in nats."""
    logits, labels = _checked(logits, labels)
    return F.cross_entropy(logits, labels).item()


def ece(logits, labels, bins=15):
    """Expected calibration error, in [0, 1]: the mean distance between confidence and accuracy over `bins`
    equally wide bins (low, high] of confidence, weighted by how many images fall in each.

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    confidence, right, bin_of = _by_confidence(logits, labels, bins)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, right - confidence)
    return gaps.abs().sum().item() / len(labels)


def reliability(logits, labels, bins=15):
    """What a reliability diagram shows, a row for each bin of `ece`: low and high (its edges), confidence and
    accuracy (means of its images, in [0, 1]; nan without any) and images (their number)."""
    confidence, right, bin_of = _by_confidence(logits, labels, bins)
    images = torch.bincount(bin_of, minlength=bins)
    sums = [torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, of) for of in (confidence, right)]
    return pd.DataFrame(
        {
            "low": [i / bins for i in range(bins)],
            "high": [(i + 1) / bins for i in range(bins)],
            "confidence": (sums[0] / images).tolist(),
            "accuracy": (sums[1] / images).tolist(),
            "images": images.tolist(),
        }
    )


def _by_confidence(logits, labels, bins):
    """Confidence and 0 or 1 for right, float64 [N], and the number of the bin, int64 [N]."""
    logits, labels = _checked(logits, labels)
    if bins < 1:
        raise ValueError(f"bins must be >= 1, not {bins}")
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    return confidence, (predicted == labels).double(), (confidence * bins).ceil().long().clamp(1, bins) - 1


def evaluate(logits, labels):
    """The three numbers every arm reports: {"accuracy", "nll", "ece"}."""
    return {"accuracy": accuracy(logits, labels), "nll": nll(logits, labels), "ece": ece(logits, labels)}


def predictive_entropy(logits):
    """Mean entropy of the predicted distributions, in nats: from 0 (certain) to log C (uniform)."""
    return torch.special.entr(_checked(logits).softmax(dim=1)).sum(dim=1).mean().item()


def correct(logits, labels):
    """Which images are classified right: bool [N]."""
    logits, labels = _checked(logits, labels)
    return logits.argmax(dim=1) == labels


def mean_probabilities(logits):
    """Logits float64 [N, C] whose softmax is the mean of the softmaxes of `logits`, a list of [N, C]: one for each
    view of the images, say."""
    logs = torch.stack([_checked(of_view).log_softmax(dim=1) for of_view in logits])
    return logs.logsumexp(dim=0) - math.log(len(logs))


def agreement(logits_a, logits_b):
    """Share of images on which two models predict the same class, in [0, 1], right or wrong.

    Top-1 agreement in Stanton et al., Does Knowledge Distillation Really Work?, NeurIPS 2021.
    """
    logits_a, logits_b = _checked_pair(logits_a, logits_b)
    return (logits_a.argmax(dim=1) == logits_b.argmax(dim=1)).double().mean().item()


def agreement_by_teacher(student_logits, teacher_logits, labels):
    """`agreement` of student and teacher on the images that the teacher classifies right, and on the others:
    {"teacher_right", "teacher_wrong"}; nan where there are none. A student that learns only what the teacher
    knows agrees with its errors no more than one that never saw it."""
    student, teacher = _checked_pair(student_logits, teacher_logits)
    same, right = student.argmax(dim=1) == teacher.argmax(dim=1), correct(teacher, labels)
    return {"teacher_right": same[right].double().mean().item(), "teacher_wrong": same[~right].double().mean().item()}


def fidelity(student_logits, teacher_logits):
    """KL(softmax(teacher) || softmax(student)) in nats, mean over images: 0 if they say the same of every image.

    On held-out images, as in Stanton et al., Does Knowledge Distillation Really Work?, NeurIPS 2021.
    """
    student, teacher = (of.log_softmax(dim=1) for of in _checked_pair(student_logits, teacher_logits))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True).item()


def _checked_pair(logits_a, logits_b):
    logits_a, logits_b = _checked(logits_a), _checked(logits_b)
    if logits_a.shape != logits_b.shape:
        raise ValueError(f"shapes differ: {list(logits_a.shape)} and {list(logits_b.shape)}")
    return logits_a, logits_b


def confusion_matrix(logits, labels):
    """Counts, int64 [C, C]: row = true class, column = predicted class."""
    logits, labels = _checked(logits, labels)
    classes = logits.shape[1]
    cells = labels * classes + logits.argmax(dim=1)
    return torch.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def per_class_scores(logits, labels, classes):
    """Table of one row per class: class, precision, recall, f1 (in [0, 1]) and support (its images).

    A score whose denominator is zero is 0: the precision of a class that is never predicted, the recall of
    one without images, the F1 of one with neither.
    """
    matrix = confusion_matrix(logits, labels)
    if len(classes) != len(matrix):
        raise ValueError(f"{len(classes)} class names for {len(matrix)} classes")
    hits, predicted, support = matrix.diag(), matrix.sum(dim=0), matrix.sum(dim=1)
    return pd.DataFrame(
        {
            "class": list(classes),
            "precision": (hits / predicted.clamp(min=1)).tolist(),
            "recall": (hits / support.clamp(min=1)).tolist(),
            "f1": (2 * hits / (predicted + support).clamp(min=1)).tolist(),
            "support": support.tolist(),
        }
    )


def macro_scores(logits, labels):
    """Unweighted means over all classes of `per_class_scores`: {"precision", "recall", "f1"}."""
    table = per_class_scores(logits, labels, range(logits.shape[1]))
    return {score: float(table[score].mean()) for score in ("precision", "recall", "f1")}


# --- of several seeds ---


class Difference(NamedTuple):
    """A mean over seeds and its confidence interval; `low` and `high` are nan when `n` < 2."""

    mean: float
    low: float
    high: float
    n: int


def mean_sd(values):
    """(mean, sample standard deviation) of one or more numbers; the latter is nan for a single one."""
    values = [float(value) for value in values]
    if not values:
        raise ValueError("no values")
    mean = math.fsum(values) / len(values)
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan


def mean_interval(values, confidence=0.95):
    """`Difference` of the values from zero: their mean with its Student-t interval.

    It is the interval for the mean over all seeds there could be, and takes the values as roughly normal.
    """
    values = list(values)
    mean, sd = mean_sd(values)
    n = len(values)
    if n < 2:
        return Difference(mean, math.nan, math.nan, n)
    half = t_quantile((1 + confidence) / 2, n - 1) * sd / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)


def paired_difference(a, b, confidence=0.95):
    """`Difference` a - b of two arms' values, listed in the same order of seeds.

    The interval is that of the per-seed differences, so what a seed does to both arms alike cancels.
    Raises ValueError when the lengths differ or are zero.
    """
    a, b = list(a), list(b)
    if len(a) != len(b):
        raise ValueError(f"values of the same seeds are needed, not {len(a)} and {len(b)} values")
    return mean_interval([x - y for x, y in zip(a, b)], confidence)


def clustered_difference(a, b, clusters, confidence=0.95):
    """`paired_difference` of the means of clusters: values with the same entry in `clusters`, such as those of students
    that share a teacher's run, count as one. What its runs of a teacher have in common is then not taken for chance."""
    a, b, clusters = list(a), list(b), list(clusters)
    if not len(a) == len(b) == len(clusters):
        raise ValueError(f"a cluster for each pair of values is needed, not {len(a)}, {len(b)} and {len(clusters)}")
    members = [[i for i, other in enumerate(clusters) if other == cluster] for cluster in dict.fromkeys(clusters)]
    return mean_interval([math.fsum(a[i] - b[i] for i in of) / len(of) for of in members], confidence)


def paired_p_value(a, b):
    """Two-sided p-value of Student's paired t-test: how probable differences so far from zero would be if there
    were none, from 0 to 1; nan for a single seed. It is below 0.05 when the 95 % interval excludes zero."""
    mean, low, high, n = paired_difference(a, b)
    if n < 2:
        return math.nan
    half = (high - low) / 2
    if half == 0:
        return float(mean == 0)
    return 1 - _t_central(math.atan(abs(mean) / half * t_quantile(0.975, n - 1) / math.sqrt(n - 1)), n - 1)


def holm(p_values):
    """p-values adjusted for their number, in the given order: each is at least the given one and at most 1. nan,
    of a comparison that could not be made, stays nan and does not count.

    Calling a difference real where it is below 0.05 errs in any of the comparisons with probability 0.05 at most.
    Holm: A Simple Sequentially Rejective Multiple Test Procedure, Scandinavian Journal of Statistics 6, 1979.
    """
    adjusted, least = [math.nan] * len(p_values), 0.0
    made = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    for rank, (p, place) in enumerate(made):
        least = max(least, min(1.0, (len(made) - rank) * p))
        adjusted[place] = least
    return adjusted


def bootstrap_difference(right_a, right_b, resamples=2000, seed=0, confidence=0.95):
    """`Difference` of the accuracies of two arms, a - b, in [-1, 1], over test images: mean over all seeds and
    images, and the percentile interval of that mean over `resamples` draws of the images, with replacement.

    right_a, right_b: which images the runs of each arm classify right, bool [S, N], one row a seed; `n` is N.
    Every draw takes the same images for both arms and all seeds, so the interval tells what other test images
    would change, and nothing of other seeds: the complement of `paired_difference`.
    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.

    Raises ValueError for shapes that differ or are not [S, N].
    """
    right_a, right_b = (np.asarray(right, dtype=float) for right in (right_a, right_b))
    if right_a.shape != right_b.shape or right_a.ndim != 2 or right_a.size == 0:
        raise ValueError(f"needs the same seeds and images of both: [S, N], not {right_a.shape} and {right_b.shape}")
    seeds, images = right_a.shape
    # An image counts by the sum of its differences over seeds alone, which takes 2 S + 1 values at most: to draw
    # images is to draw how many have each value.
    values, counts = np.unique((right_a - right_b).sum(axis=0), return_counts=True)
    draws = np.random.default_rng(seed).multinomial(images, counts / images, size=resamples)
    means = draws @ values / (images * seeds)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Difference(float(counts @ values / (images * seeds)), float(low), float(high), images)


def per_class_difference(right_a, right_b, labels, classes):
    """Table of one row per class: class, mean, low, high: the difference of two arms' accuracies (a - b) on its
    images, with the paired t-interval over seeds (nan for one seed).

    right_a, right_b: bool [S, N], one row a seed; a class without images raises ValueError.
    """
    right_a, right_b, labels = (torch.as_tensor(part).cpu() for part in (right_a, right_b, labels))
    rows = []
    for number, name in enumerate(classes):
        of_class = labels == number
        if not of_class.any():
            raise ValueError(f"there are no images of the class {name}")
        found = paired_difference(*(right[:, of_class].double().mean(dim=1).tolist() for right in (right_a, right_b)))
        rows.append({"class": name, "mean": found.mean, "low": found.low, "high": found.high})
    return pd.DataFrame(rows)


OUTCOMES = ("helps", "hurts", "equivalent", "not separable", "too few seeds")


def outcome(difference, margin, p_value=math.nan):
    """What a `Difference` lets one say, one of `OUTCOMES`: "helps" or "hurts" when its interval excludes zero and its
    p-value, after correction for several comparisons, is below 0.05 (nan: there is none to heed); else "equivalent"
    when the interval lies within [-margin, margin], "not separable" when it does not; "too few seeds" without an
    interval. Raises ValueError for a difference that is not a number."""
    mean, low, high, n = difference
    if math.isnan(mean) or (n > 1 and not low <= high):
        raise ValueError(f"a difference of {mean} with the interval {low} to {high}")
    if n < 2:
        return "too few seeds"
    if (low > 0 or high < 0) and not p_value >= 0.05:
        return "helps" if low > 0 else "hurts"
    return "equivalent" if -margin <= low and high <= margin else "not separable"


def t_quantile(probability, df):
    """Quantile of Student's t distribution with an integer number `df` >= 1 of degrees of freedom.

    `probability` in [0.5, 1). For integer df the distribution function is a finite sum in the angle
    atan(t / sqrt(df)) (Abramowitz and Stegun, 26.7.3 and 26.7.4), here inverted by bisection.
    """
    if not 0.5 <= probability < 1 or df < 1 or df != int(df):
        raise ValueError(f"needs 0.5 <= probability < 1 and an integer df >= 1, not {probability} and {df}")
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_central(middle, df) < 2 * probability - 1 else (low, middle)
    return math.sqrt(df) * math.tan(low)


def _t_central(angle, df):
    """P(|T| < sqrt(df) tan(angle))."""
    odd = df % 2
    term = total = (math.cos(angle) if odd else 1.0) if df > 1 else 0.0
    for k in range(2 + odd, df - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


# --- of a model ---


def parameter_count(model, trainable_only=False):
    """Number of parameters; with `trainable_only`, of those that require a gradient. Buffers do not count."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def multiply_adds(model, input_shape):
    """Multiply-adds of one forward pass of one image of `input_shape` (C, H, W), counted exactly.

    Those of `Conv2d` and `Linear` modules as they are called; biases, norms, activations, pooling and
    functional calls are left out, as is usual.
    """
    count = 0

    def add(module, inputs, output):
        nonlocal count
        # Weights [out, ...]: each output value takes as many multiply-adds as it has weights.
        count += output.numel() * module.weight[0].numel()

    hooks = [
        module.register_forward_hook(add) for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    try:
        with _inference(model):
            like = next(model.parameters())
            model(torch.zeros(1, *input_shape, device=like.device, dtype=like.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return count


def latency(model, example, repeats=20):
    """Median time per image, in seconds, of a forward pass of the batch `example` [N, ...] on its device.

    Three passes go before as a warm-up, and the device is waited for, so that work only queued is not missed.
    """
    if repeats < 1 or len(example) == 0:
        raise ValueError("needs repeats >= 1 and at least one image")
    seconds = []
    with _inference(model):
        for number in range(3 + repeats):
            _wait(example.device)
            start = time.perf_counter()
            model(example)
            _wait(example.device)
            if number >= 3:
                seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) / len(example)


@contextlib.contextmanager
def _inference(model):
    """Eval mode without gradients, leaving every submodule in the mode it was found in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()

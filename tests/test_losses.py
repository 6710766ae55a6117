"""kdutils.losses: the formulas and their identities, in float64."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kdutils.losses import (
    class_mean,
    combine_teachers,
    cross_entropy,
    dist_distillation_loss,
    dist_loss,
    distillation_loss,
    dkd_distillation_loss,
    dkd_loss,
    kd_loss,
    standardise,
    standardised_distillation_loss,
)

RULES = ("mean_prob", "mean_logit", "confidence")


def logits(seed, batch=6, classes=5, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(batch, classes, generator=generator, dtype=torch.float64).to(dtype)


LABELS = torch.tensor([0, 4, 2, 2, 1, 3])
SOME_LABELS = torch.tensor([-1, 4, 2, -1, 1, 3])
NO_LABELS = torch.full((6,), -1)
same = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-13)


def softened(one, temperature):
    return (one / temperature).softmax(-1)


def gradient(loss, student):
    student = student.clone().requires_grad_()
    return torch.autograd.grad(loss(student), student)[0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_kd_loss_is_its_formula(temperature):
    """T^2 times the mean over rows of sum_c p_c (log p_c - log q_c), in plain Python."""
    total = 0.0
    for s, t in zip(logits(0).tolist(), logits(1).tolist()):
        q, p = ([math.exp(x / temperature) for x in row] for row in (s, t))
        q, p = [x / sum(q) for x in q], [x / sum(p) for x in p]
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q))
    found = kd_loss(logits(0), logits(1), temperature).item()
    assert found == pytest.approx(temperature**2 * total / 6, rel=1e-12) and found > 0


SOFT = {
    "kd": lambda s, t: kd_loss(s, t, 4.0),
    "dkd": lambda s, t: dkd_loss(s, t, LABELS, 4.0, 1.0, 8.0),
    "dist": lambda s, t: dist_loss(s, t, 4.0, 1.0, 2.0),
    "standardised": lambda s, t: kd_loss(standardise(s), standardise(t), 4.0),
}
MIXED = {
    "kd": distillation_loss,
    "dkd": partial(dkd_distillation_loss, dkd_alpha=1.0, dkd_beta=8.0),
    "dist": partial(dist_distillation_loss, dist_beta=1.0, dist_gamma=2.0),
    "standardised": standardised_distillation_loss,
}
MIXED = {name: partial(loss, labels=LABELS, temperature=4.0) for name, loss in MIXED.items()}
LOSSES = {
    "cross_entropy": lambda s, t: cross_entropy(s, LABELS, 0.1),
    "some labels": lambda s, t: distillation_loss(s, t, SOME_LABELS, 4.0, 0.7),
    **SOFT,
    **{f"mixed {name}": partial(loss, alpha=0.7, label_smoothing=0.1) for name, loss in MIXED.items()},
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_agree_with_differences_and_a_shift_of_an_images_logits_changes_nothing(name):
    loss, student, teacher = LOSSES[name], logits(0), logits(1)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student.clone().requires_grad_())
    same(loss(student + 123.0, teacher), loss(student, teacher))


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"standardised"}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stored_half_precision_teachers_are_taken_in_the_students_precision(name, dtype):
    student, teacher = logits(0, dtype=dtype), logits(1, dtype=torch.float16)
    found = LOSSES[name](student, teacher)
    assert found.dtype == dtype and torch.equal(found, LOSSES[name](student, teacher.to(dtype)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("labels", [LABELS, SOME_LABELS], ids=["labels", "some labels"])
def test_cross_entropy_by_hand(smoothing, labels):
    """A label's target is 1 - smoothing, and every class gets smoothing / C besides; a mean over labelled images."""
    rows = [
        (1 - smoothing) * row[label] + smoothing * row.mean()
        for row, label in zip(logits(0).log_softmax(1), labels)
        if label >= 0
    ]
    same(cross_entropy(logits(0), labels, smoothing), -torch.stack(rows).mean())


def test_cross_entropy_without_any_label_is_0_and_teaches_nothing():
    assert cross_entropy(logits(0), NO_LABELS).item() == 0
    assert gradient(lambda s: cross_entropy(s, NO_LABELS), logits(0)).abs().max() == 0


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_every_soft_term_is_weighed_against_the_labels_in_the_same_way(name, alpha, smoothing):
    student, teacher = logits(0), logits(1)
    expected = alpha * SOFT[name](student, teacher) + (1 - alpha) * cross_entropy(student, LABELS, smoothing)
    same(MIXED[name](student, teacher, alpha=alpha, label_smoothing=smoothing), expected)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("labels", [SOME_LABELS, NO_LABELS], ids=["some labels", "no labels"])
def test_an_image_without_a_label_counts_with_its_soft_term_alone(alpha, labels):
    rows = [(logits(0)[i : i + 1], logits(1)[i : i + 1], labels[i : i + 1]) for i in range(6)]
    each = [kd_loss(s, t, 4.0) if y < 0 else distillation_loss(s, t, y, 4.0, alpha, 0.1) for s, t, y in rows]
    same(distillation_loss(logits(0), logits(1), labels, 4.0, alpha, 0.1), torch.stack(each).mean())


# Teachers combined


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_mean_prob_is_the_mean_probability_and_has_the_gradient_of_the_mean_divergence(count, temperature):
    student, teachers = logits(9), [logits(seed) for seed in range(count)]
    combined = combine_teachers(teachers, "mean_prob", temperature)
    same(softened(combined, temperature), sum(softened(t, temperature) for t in teachers) / count)
    one = gradient(lambda s: kd_loss(s, combined, temperature), student)
    same(one, gradient(lambda s: sum(kd_loss(s, t, temperature) for t in teachers) / count, student))


def test_mean_logit_is_the_geometric_mean_of_probabilities():
    geometric = (softened(logits(0), 4.0) * softened(logits(1), 4.0)).sqrt()
    combined = combine_teachers([logits(0), logits(1)], "mean_logit", 4.0)
    same(softened(combined, 4.0), geometric / geometric.sum(1, keepdim=True))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_confidence_weighs_by_the_belief_in_the_true_label(temperature):
    """For two teachers w1 = p1[y] / (p1[y] + p2[y]), with p at T = 1 at any temperature of the target."""
    one, other = logits(0), logits(1)
    ce1, ce2 = (F.cross_entropy(t, LABELS, reduction="none") for t in (one, other))
    weight = (1 - ce1.exp() / (ce1.exp() + ce2.exp()))[:, None]  # CA-MKD, equation 3
    p1, p2 = (t.softmax(1)[torch.arange(6), LABELS] for t in (one, other))
    same(weight[:, 0], p1 / (p1 + p2))
    combined = combine_teachers([one, other], "confidence", temperature, LABELS)
    expected = weight * softened(one, temperature) + (1 - weight) * softened(other, temperature)
    same(softened(combined, temperature), expected)


def test_confidence_weighs_an_image_without_a_label_equally():
    teachers = [logits(0), logits(1)]
    equal, by_label = (combine_teachers(teachers, rule, 4.0, LABELS) for rule in ("mean_prob", "confidence"))
    found = combine_teachers(teachers, "confidence", 4.0, SOME_LABELS)
    same(found, torch.where((SOME_LABELS < 0)[:, None], equal, by_label))
    assert (equal - by_label).abs().max() > 0.1


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_teachers_does_not_matter_and_a_teacher_and_its_copy_are_that_teacher(rule):
    one, other = logits(0), logits(1)
    same(*(combine_teachers(pair, rule, 4.0, LABELS) for pair in ([one, other], [other, one])))
    same(softened(combine_teachers([one, one], rule, 4.0, LABELS), 4.0), softened(one, 4.0))


@pytest.mark.parametrize("rule", RULES)
def test_targets_of_every_view_at_once(rule):
    """Logits [N, V, C] with labels [N, V], as the students pass them."""
    one, other = (logits(seed, batch=12).reshape(6, 2, 5) for seed in (0, 1))
    found = combine_teachers([one, other], rule, 4.0, labels=SOME_LABELS[:, None].expand(6, 2))
    for view in range(2):
        same(found[:, view], combine_teachers([one[:, view], other[:, view]], rule, 4.0, SOME_LABELS))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_class_mean_is_the_mean_of_softened_probabilities_over_images_and_views_of_a_class(temperature):
    teacher, labels = logits(0, batch=12).reshape(6, 2, 5), LABELS[:, None].expand(6, 2)
    target = class_mean([teacher], labels, temperature)
    assert target.shape == teacher.shape and target.dtype == teacher.dtype
    for image, label in enumerate(LABELS):
        mean = softened(teacher, temperature)[label == LABELS].mean(dim=(0, 1))
        same(softened(target[image], temperature), mean.expand(2, 5))
    assert (target[0] - target[1]).abs().max() > 0.1


# What is not valid


@pytest.mark.parametrize("teachers, labels", [
    ([logits(0), logits(1)], LABELS), ([], LABELS), ([logits(0)], SOME_LABELS),
], ids=["two teachers", "no teacher", "an image without a label"])  # fmt: skip
def test_class_mean_needs_one_teacher_and_every_label(teachers, labels):
    with pytest.raises(ValueError, match="class_mean: give one teacher's logits, and the label of every image"):
        class_mean(teachers, labels, 4.0)


@pytest.mark.parametrize("temperature", [0, -1, -0.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("call", [
    lambda t: kd_loss(logits(0), logits(1), t), lambda t: distillation_loss(logits(0), logits(1), LABELS, t, 0.5),
    lambda t: combine_teachers([logits(0), logits(1)], "mean_logit", t), lambda t: class_mean([logits(0)], LABELS, t),
    lambda t: dkd_loss(logits(0), logits(1), LABELS, t, 1.0, 8.0), lambda t: dist_loss(logits(0), logits(1), t),
], ids=["kd_loss", "distillation_loss", "combine_teachers", "class_mean", "dkd_loss", "dist_loss"])  # fmt: skip
def test_a_temperature_must_be_finite_and_above_0(call, temperature):
    with pytest.raises(ValueError, match="temperature: .* is not valid; use a finite number above 0"):
        call(temperature)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan, math.inf])
def test_alpha_must_be_from_0_to_1(alpha):
    with pytest.raises(ValueError, match="alpha: .* is not valid; use a number from 0 to 1"):
        distillation_loss(logits(0), logits(1), LABELS, 4.0, alpha)


@pytest.mark.parametrize("teachers, rule, labels, message", [
    ([logits(0), logits(1)], "median", None, "no rule 'median'; use mean_prob, mean_logit or confidence"),
    ([logits(0)], "mean_prob", None, "two or more teachers"),
    ([], "mean_prob", None, "two or more teachers"),
    ([logits(0), logits(1, classes=6)], "mean_logit", None, "one shape"),
    ([logits(0), logits(1)], "confidence", None, "'confidence' needs labels; pass labels="),
])  # fmt: skip
def test_teachers_that_cannot_be_combined(teachers, rule, labels, message):
    with pytest.raises(ValueError, match=message):
        combine_teachers(teachers, rule, 4.0, labels)


# Other papers' losses


def test_dkd_weighs_the_two_terms_that_the_divergence_is_made_of():
    """KL = TCKD + (1 - p_teacher[label]) NCKD, image by image (Zhao et al. 2022, equation 7)."""

    def label_or_other(one, label):
        """Logits of two classes, the label and any other."""
        p = softened(one, 3.0)[:, label]
        return 3.0 * torch.cat([p, 1 - p], dim=1).log()

    for student, teacher, label in zip(logits(0)[:, None], logits(1)[:, None], LABELS[:, None]):
        tckd = kd_loss(label_or_other(student, label), label_or_other(teacher, label), 3.0)
        nckd = (kd_loss(student, teacher, 3.0) - tckd) / (1 - softened(teacher, 3.0)[0, label])
        same(dkd_loss(student, teacher, label, 3.0, 2.0, 5.0), (2.0 * tckd + 5.0 * nckd).squeeze())


def test_dist_is_one_minus_pearsons_correlation():
    s, t = (softened(x, 2.0).numpy() for x in (logits(0), logits(1)))
    inter = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(s, t)])
    intra = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(s.T, t.T)])
    found = dist_loss(logits(0), logits(1), 2.0, dist_beta=2.0, dist_gamma=3.0)
    assert found.item() == pytest.approx(2.0**2 * (2 * inter + 3 * intra), rel=1e-10)


def test_standardised_logits_ignore_their_size():
    student, teacher, loss = logits(0), logits(1), SOFT["standardised"]
    torch.testing.assert_close(loss(5 * student, teacher / 3 + 2), loss(student, teacher))
    spread = standardise(student)
    torch.testing.assert_close(spread.std(dim=1), torch.ones(6).double(), rtol=1e-6, atol=0)
    assert spread.mean(dim=1).abs().max() < 1e-12


@pytest.mark.parametrize("name", SOFT)
def test_nothing_is_left_to_learn_at_the_teacher(name):
    loss = SOFT[name]
    assert loss(logits(1), logits(1)).item() == pytest.approx(0, abs=1e-12)
    assert gradient(lambda s: loss(s, logits(1)), logits(1)).abs().max() < 1e-6
    assert loss(logits(0), logits(1)).item() > 0.01


# Any numbers

numbers = st.lists(st.sampled_from([-1e4, -50.0, 0.0, 1.0, 1e4]), min_size=5, max_size=5)
extreme = st.lists(numbers, min_size=6, max_size=6)


@settings(max_examples=60, deadline=None)
@given(extreme, extreme, st.sampled_from([0.5, 1.0, 4.0, 100.0]), st.sampled_from([torch.float32, torch.float64]))
def test_extreme_logits_stay_finite(student, teacher, temperature, dtype):
    student, teacher = (torch.tensor(x, dtype=dtype) for x in (student, teacher))

    def loss(s):
        both = [combine_teachers([teacher, student], rule, temperature, LABELS) for rule in RULES]
        hinton = sum(distillation_loss(s, t, LABELS, temperature, 0.5, 0.1) for t in [teacher, *both])
        return hinton + dkd_loss(s, teacher, LABELS, temperature, 1.0, 2.0) + dist_loss(s, teacher, temperature)

    value = loss(student)
    assert value.isfinite() and value >= 0 and gradient(loss, student).isfinite().all()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 7), st.integers(2, 9), st.floats(0.3, 20), st.floats(0, 1), st.floats(0, 0.9)
)
def test_any_batch_temperature_and_weights(seed, batch, classes, temperature, alpha, smoothing):
    """Not negative, blind to a shift of an image's logits and to the order of images and classes; true gradients."""
    student, teacher, other = (logits(seed + i, batch, classes) for i in range(3))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, classes, (batch,), generator=generator)
    target = combine_teachers([teacher, other], "mean_prob", temperature)

    def loss(s, t=target, y=labels):
        return distillation_loss(s, t, y, temperature, alpha, smoothing)

    value = loss(student)
    assert value > -1e-12 and torch.autograd.gradcheck(loss, student.clone().requires_grad_())
    shift = 10 * torch.randn(batch, 1, generator=generator, dtype=torch.float64)
    rows, columns = torch.randperm(batch, generator=generator), torch.randperm(classes, generator=generator)
    new_label = torch.where(labels < 0, labels, columns.argsort()[labels])
    for changed in (
        loss(student + shift),
        loss(student, target - shift),
        loss(student[rows], target[rows], labels[rows]),
        loss(student[:, columns], target[:, columns], new_label),
    ):
        torch.testing.assert_close(changed, value, rtol=1e-9, atol=1e-11)

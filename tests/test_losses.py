"""kdutils.losses: the formulas and their identities, in float64."""

import math

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


def test_the_gradient_is_that_of_softened_probabilities():
    student, teacher, temperature = logits(0), logits(1), 3.0
    difference = (student / temperature).softmax(1) - (teacher / temperature).softmax(1)
    found = gradient(lambda s: kd_loss(s, teacher, temperature), student)
    torch.testing.assert_close(found, temperature * difference / len(student), rtol=1e-10, atol=1e-14)


SOME_LABELS = torch.tensor([-1, 4, 2, -1, 1, 3])
LOSSES = {
    "kd_loss": lambda s: kd_loss(s, logits(1).to(s.dtype), 4.0),
    "cross_entropy": lambda s: cross_entropy(s, LABELS, 0.1),
    "distillation_loss": lambda s: distillation_loss(s, logits(1).to(s.dtype), LABELS, 4.0, 0.7, 0.1),
    "distillation_loss, some labels": lambda s: distillation_loss(
        s, logits(1).to(s.dtype), SOME_LABELS, 4.0, 0.7),
    **{rule: lambda s, rule=rule: combine_teachers([s, logits(1).to(s.dtype)], rule, 4.0, LABELS).square().mean()
       for rule in RULES},
    "dkd_loss": lambda s: dkd_loss(s, logits(1).to(s.dtype), LABELS, 4.0, 1.0, 8.0),
    "dist_loss": lambda s: dist_loss(s, logits(1).to(s.dtype), 2.0, 1.0, 3.0),
    "dkd_distillation_loss": lambda s: dkd_distillation_loss(s, logits(1).to(s.dtype), LABELS, 4.0, 0.7, 1.0, 8.0, 0.1),
    "dist_distillation_loss": lambda s: dist_distillation_loss(s, logits(1).to(s.dtype), LABELS, 2.0, 0.7, 1.0, 3.0),
    "standardised_distillation_loss": lambda s: standardised_distillation_loss(
        s, logits(1).to(s.dtype), LABELS, 2.0, 0.7, 0.1),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_agree_with_differences_and_precision_is_kept(name):
    assert torch.autograd.gradcheck(LOSSES[name], logits(0).requires_grad_())
    for dtype in (torch.float32, torch.float64):
        assert LOSSES[name](logits(0, dtype=dtype)).dtype == dtype


def test_stored_half_precision_teachers_are_taken_in_the_students_precision():
    student, teacher = logits(0), logits(1, dtype=torch.float16)
    torch.testing.assert_close(kd_loss(student, teacher, 4.0), kd_loss(student, teacher.double(), 4.0), rtol=0, atol=0)
    assert distillation_loss(student.float(), teacher, LABELS, 4.0, 0.5).dtype == torch.float32


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in RULES])
def test_a_shift_of_all_logits_changes_nothing(name):
    student = logits(0)
    torch.testing.assert_close(LOSSES[name](student + 123.0), LOSSES[name](student), rtol=1e-10, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_cross_entropy_by_hand(smoothing):
    """A label's target is 1 - smoothing, and every class gets smoothing / C besides."""
    log_probs = logits(0).log_softmax(1)
    rows = [(1 - smoothing) * row[label] + smoothing * row.mean() for row, label in zip(log_probs, LABELS)]
    found = cross_entropy(logits(0), LABELS, smoothing)
    torch.testing.assert_close(found, -torch.stack(rows).mean(), rtol=1e-12, atol=0)


def test_cross_entropy_is_a_mean_over_the_labelled_images():
    student, kept = logits(0), SOME_LABELS >= 0
    expected = cross_entropy(student[kept], SOME_LABELS[kept], 0.1)
    torch.testing.assert_close(cross_entropy(student, SOME_LABELS, 0.1), expected, rtol=1e-12, atol=0)
    assert cross_entropy(student, torch.full((6,), -1)).item() == 0
    assert gradient(lambda s: cross_entropy(s, torch.full((6,), -1)), student).abs().max() == 0


@pytest.mark.parametrize("mixed, soft, values", [
    (distillation_loss, lambda s, t: kd_loss(s, t, 4.0), {}),
    (dkd_distillation_loss, lambda s, t: dkd_loss(s, t, LABELS, 4.0, 1.0, 8.0), {"dkd_alpha": 1.0, "dkd_beta": 8.0}),
    (dist_distillation_loss, lambda s, t: dist_loss(s, t, 4.0, 1.0, 2.0), {"dist_beta": 1.0, "dist_gamma": 2.0}),
    (standardised_distillation_loss, lambda s, t: kd_loss(standardise(s), standardise(t), 4.0), {}),
])  # fmt: skip
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_every_soft_term_is_weighed_against_the_labels_in_the_same_way(mixed, soft, values, alpha, smoothing):
    student, teacher = logits(0), logits(1)
    expected = alpha * soft(student, teacher) + (1 - alpha) * cross_entropy(student, LABELS, smoothing)
    found = mixed(student, teacher, LABELS, temperature=4.0, alpha=alpha, label_smoothing=smoothing, **values)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("labels", [SOME_LABELS, torch.full((6,), -1)], ids=["some labels", "no labels"])
def test_an_image_without_a_label_counts_with_its_soft_term_alone(alpha, labels):
    rows = [(logits(0)[i : i + 1], logits(1)[i : i + 1], labels[i : i + 1]) for i in range(6)]
    each = [kd_loss(s, t, 4.0) if y < 0 else distillation_loss(s, t, y, 4.0, alpha, 0.1) for s, t, y in rows]
    found = distillation_loss(logits(0), logits(1), labels, 4.0, alpha, 0.1)
    torch.testing.assert_close(found, torch.stack(each).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("teachers", [2, 3])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_mean_prob_is_the_mean_of_softened_probabilities_and_has_the_gradient_of_the_mean_divergence(
    teachers, temperature
):
    student, each = logits(9), [logits(seed) for seed in range(teachers)]
    combined = combine_teachers(each, "mean_prob", temperature)
    expected = sum((t / temperature).softmax(1) for t in each) / teachers
    torch.testing.assert_close((combined / temperature).softmax(1), expected, rtol=1e-12, atol=1e-15)
    one = gradient(lambda s: kd_loss(s, combined, temperature), student)
    mean = gradient(lambda s: sum(kd_loss(s, t, temperature) for t in each) / teachers, student)
    torch.testing.assert_close(one, mean, rtol=1e-10, atol=1e-14)


def test_mean_logit_is_the_geometric_mean_of_probabilities():
    each = [logits(0), logits(1)]
    geometric = ((each[0] / 4).softmax(1) * (each[1] / 4).softmax(1)).sqrt()
    found = (combine_teachers(each, "mean_logit", 4.0) / 4).softmax(1)
    torch.testing.assert_close(found, geometric / geometric.sum(1, keepdim=True))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_confidence_weighs_by_the_belief_in_the_true_label(temperature):
    """For two teachers w1 = p1[y] / (p1[y] + p2[y]), with p at T = 1 at any temperature of the target."""
    one, other = logits(0), logits(1)
    p1, p2 = (t.softmax(1)[torch.arange(6), LABELS] for t in (one, other))
    weight = (p1 / (p1 + p2))[:, None]
    expected = weight * (one / temperature).softmax(1) + (1 - weight) * (other / temperature).softmax(1)
    found = combine_teachers([one, other], "confidence", temperature, LABELS)
    torch.testing.assert_close((found / temperature).softmax(1), expected, rtol=1e-10, atol=1e-14)
    ce1, ce2 = (F.cross_entropy(t, LABELS, reduction="none") for t in (one, other))  # CA-MKD, equation 3
    torch.testing.assert_close(weight[:, 0], 1 - ce1.exp() / (ce1.exp() + ce2.exp()))


def test_confidence_weighs_an_image_without_a_label_equally():
    each = [logits(0), logits(1)]
    found = combine_teachers(each, "confidence", 4.0, SOME_LABELS)
    equal, by_label = combine_teachers(each, "mean_prob", 4.0), combine_teachers(each, "confidence", 4.0, LABELS)
    expected = torch.where((SOME_LABELS < 0)[:, None], equal, by_label)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert (equal - by_label).abs().max() > 0.1


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_teachers_does_not_matter_and_a_teacher_and_its_copy_are_that_teacher(rule):
    one, other = logits(0), logits(1)
    there, back = (combine_teachers(pair, rule, 4.0, LABELS) for pair in ([one, other], [other, one]))
    torch.testing.assert_close(there, back, rtol=1e-12, atol=1e-14)
    found = combine_teachers([one, one], rule, 4.0, LABELS)
    torch.testing.assert_close((found / 4).softmax(1), (one / 4).softmax(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_targets_of_every_view_at_once(rule):
    """Logits [N, V, C] with labels [N, V], as the students pass them."""
    one, other = (logits(seed, batch=12).reshape(6, 2, 5) for seed in (0, 1))
    found = combine_teachers([one, other], rule, 4.0, labels=SOME_LABELS[:, None].expand(6, 2))
    for view in range(2):
        alone = combine_teachers([one[:, view], other[:, view]], rule, 4.0, SOME_LABELS)
        torch.testing.assert_close(found[:, view], alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_class_mean_is_the_mean_of_softened_probabilities_over_images_and_views_of_a_class(temperature):
    teacher, labels = logits(0, batch=12).reshape(6, 2, 5), LABELS[:, None].expand(6, 2)
    target = class_mean([teacher], labels, temperature)
    assert target.shape == teacher.shape and target.dtype == teacher.dtype
    probabilities = (teacher / temperature).softmax(-1)
    for image, label in enumerate(LABELS.tolist()):
        alike = [i for i in range(6) if LABELS[i] == label]
        expected = sum(probabilities[i, view] for i in alike for view in range(2)) / (2 * len(alike))
        for view in range(2):
            found = (target[image, view] / temperature).softmax(0)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert (target[0] - target[1]).abs().max() > 0.1


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


def test_the_divergence_is_decoupled():
    """KL = TCKD + (1 - p_teacher[label]) NCKD, image by image (Zhao et al. 2022, equation 7)."""
    student, teacher, temperature = logits(0), logits(1), 3.0
    for i, label in enumerate(LABELS.tolist()):
        row = (student[i : i + 1], teacher[i : i + 1], LABELS[i : i + 1], temperature)
        other = 1 - (teacher[i] / temperature).softmax(0)[label].item()
        expected = kd_loss(*row[:2], temperature)
        torch.testing.assert_close(dkd_loss(*row, 1.0, other), expected, rtol=1e-10, atol=0)


def test_dkd_by_hand():
    student, teacher = torch.tensor([[1.0, 2.0, 3.0]]).double(), torch.tensor([[2.0, 1.0, 0.5]]).double()
    s, t = student.softmax(1)[0].tolist(), teacher.softmax(1)[0].tolist()
    target = t[1] * math.log(t[1] / s[1]) + (1 - t[1]) * math.log((1 - t[1]) / (1 - s[1]))
    pairs = [(t[i] / (t[0] + t[2]), s[i] / (s[0] + s[2])) for i in (0, 2)]
    others = sum(a * math.log(a / b) for a, b in pairs)
    found = dkd_loss(student, teacher, torch.tensor([1]), 1.0, 2.0, 5.0)
    assert found.item() == pytest.approx(2 * target + 5 * others, rel=1e-10)


def test_dist_is_one_minus_pearsons_correlation():
    student, teacher, temperature = logits(0), logits(1), 2.0
    s, t = ((x / temperature).softmax(1).numpy() for x in (student, teacher))
    inter = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(s, t)])
    intra = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(s.T, t.T)])
    found = dist_loss(student, teacher, temperature, dist_beta=2.0, dist_gamma=3.0)
    assert found.item() == pytest.approx(temperature**2 * (2 * inter + 3 * intra), rel=1e-10)


@pytest.mark.parametrize("loss", [
    lambda s, t: kd_loss(s, t, 0.5), lambda s, t: kd_loss(s, t, 4.0),
    lambda s, t: dkd_loss(s, t, LABELS, 4.0, 1.0, 8.0), lambda s, t: dist_loss(s, t),
    lambda s, t: standardised_distillation_loss(s, t, LABELS, 2.0, 1.0),
])  # fmt: skip
def test_nothing_is_left_to_learn_at_the_teacher(loss):
    assert loss(logits(1), logits(1)).item() == pytest.approx(0, abs=1e-12)
    assert gradient(lambda s: loss(s, logits(1)), logits(1)).abs().max() < 1e-6
    assert loss(logits(0), logits(1)).item() > 0.01


def test_standardised_logits_ignore_their_size():
    student, teacher = logits(0), logits(1)
    plain = standardised_distillation_loss(student, teacher, LABELS, 2.0, 1.0)
    torch.testing.assert_close(standardised_distillation_loss(5 * student, teacher / 3 + 2, LABELS, 2.0, 1.0), plain)
    spread = standardise(student)
    torch.testing.assert_close(spread.std(dim=1), torch.ones(6).double(), rtol=1e-6, atol=0)
    assert spread.mean(dim=1).abs().max() < 1e-12


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
    for same in (
        loss(student + shift), loss(student, target - shift), loss(student[rows], target[rows], labels[rows]),
        loss(student[:, columns], target[:, columns], new_label),
    ):  # fmt: skip
        torch.testing.assert_close(same, value, rtol=1e-9, atol=1e-11)

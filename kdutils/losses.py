"""Losses: pure functions of the student's and the teacher's logits, computed in the precision of the student's.

Shapes: logits [B, C], labels int64 [B] (-1 means: no label). Every loss is a scalar; divergences are in nats.
To add one: a function here, with its paper; an entry in `students.LOSSES` if sweeps or the study need it by name. The
code of a loss (not its docstring) is part of the identity of the students trained with it: editing it trains them anew.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NO_LABEL = -1


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: {temperature} is not valid; use a finite number above 0")


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(t/T) || softmax(s/T)), averaged over the batch.

    The factor T^2 keeps the gradient about the same size at every temperature.
    Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015 (arXiv:1503.02531).

    Raises `ValueError` unless the temperature is finite and above 0.
    """
    _check_temperature(temperature)
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.to(student.dtype) / temperature, dim=1)
    # "batchmean", because "mean" would also divide by the number of classes
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def cross_entropy(student_logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with the hard labels, averaged over the labelled images; 0 if there is none.

    `label_smoothing` (0 to 1) mixes the one-hot target with the uniform one (Szegedy et al. 2016, arXiv:1512.00567).
    """
    total = F.cross_entropy(
        student_logits, labels, ignore_index=NO_LABEL, label_smoothing=label_smoothing, reduction="sum"
    )
    return total / (labels != NO_LABEL).sum().clamp(min=1)


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float,
    alpha: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """alpha T^2 KL(teacher || student) + (1 - alpha) CE(student, labels): Hinton et al. 2015, section 2.

    An image without a label (-1) contributes its soft term alone, with its full weight.
    With alpha = 1 it is `kd_loss`; with alpha = 0, and a label for every image, `cross_entropy`.

    Raises `ValueError` unless alpha is from 0 to 1 and the temperature finite and above 0.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: {alpha} is not valid; use a number from 0 to 1")
    _check_temperature(temperature)
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.to(student.dtype) / temperature, dim=1)
    soft = temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)
    hard = F.cross_entropy(
        student_logits, labels, ignore_index=NO_LABEL, label_smoothing=label_smoothing, reduction="none"
    )
    weight = torch.ones_like(soft).masked_fill(labels != NO_LABEL, alpha)
    return (weight * soft + (1 - alpha) * hard).mean()


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float,
    dkd_alpha: float,
    dkd_beta: float,
) -> Tensor:
    """T^2 (dkd_alpha TCKD + dkd_beta NCKD), averaged over the batch; every image needs its label.

    Both are KL divergences of softened probabilities. TCKD (target class) compares the distributions over two classes,
    "the label" and "any other"; NCKD (non-target classes) those over the other classes alone.
    KL = TCKD + (1 - p_teacher[label]) NCKD.
    Zhao et al.: Decoupled Knowledge Distillation, CVPR 2022 (arXiv:2203.08679).

    Raises `ValueError` unless the temperature is finite and above 0.
    """
    _check_temperature(temperature)
    is_label = F.one_hot(labels, student_logits.shape[1]).bool()

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities: [B, 2] of the label and of any other class; [B, C] of the other classes alone."""
        softened = logits / temperature
        # not -inf: the divergence would be inf - inf
        others = softened.masked_fill(is_label, torch.finfo(logits.dtype).min / 2)
        on_label = softened.gather(1, labels[:, None])
        two = torch.cat([on_label, others.logsumexp(dim=1, keepdim=True)], dim=1)
        return F.log_softmax(two, dim=1), F.log_softmax(others, dim=1)

    pairs = zip(parts(student_logits), parts(teacher_logits.to(student_logits.dtype)), strict=True)
    tckd, nckd = (F.kl_div(s, t, reduction="batchmean", log_target=True) for s, t in pairs)
    return temperature**2 * (dkd_alpha * tckd + dkd_beta * nckd)


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    dist_beta: float = 1.0,
    dist_gamma: float = 1.0,
) -> Tensor:
    """DIST (not short for distillation): T^2 (dist_beta inter + dist_gamma intra), two distances to the teacher.

    A distance is 1 - Pearson's correlation of their softened probabilities: over the classes of one image (inter), over
    the images of the batch for one class (intra); each is averaged.

    Huang et al.: Knowledge Distillation from A Stronger Teacher, NeurIPS 2022 (arXiv:2205.10536).

    Raises `ValueError` unless the temperature is finite and above 0.
    """
    _check_temperature(temperature)
    student, teacher = (
        F.softmax(logits / temperature, dim=1) for logits in (student_logits, teacher_logits.to(student_logits.dtype))
    )

    def distance(dim: int) -> Tensor:
        centred = (probs - probs.mean(dim=dim, keepdim=True) for probs in (student, teacher))
        return 1 - F.cosine_similarity(*centred, dim=dim).mean()

    return temperature**2 * (dist_beta * distance(1) + dist_gamma * distance(0))


def standardise(logits: Tensor) -> Tensor:
    """Logits [B, C] with mean 0 and standard deviation 1 in every row: only their shape is left to imitate.

    Sun et al.: Logit Standardization in Knowledge Distillation, CVPR 2024 (arXiv:2403.01427).
    """
    # at a variance of 0 the gradient of the root is infinite
    return (logits - logits.mean(dim=1, keepdim=True)) / (logits.var(dim=1, keepdim=True) + 1e-12).sqrt()


def dkd_distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, alpha: float,
    dkd_alpha: float, dkd_beta: float, label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """alpha `dkd_loss` + (1 - alpha) `cross_entropy`; every image needs its label."""
    soft = dkd_loss(student_logits, teacher_logits, labels, temperature, dkd_alpha, dkd_beta)
    return alpha * soft + (1 - alpha) * cross_entropy(student_logits, labels, label_smoothing)


def dist_distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, alpha: float,
    dist_beta: float, dist_gamma: float, label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """alpha `dist_loss` + (1 - alpha) `cross_entropy`. alpha also weighs the soft term of images without a label."""
    soft = dist_loss(student_logits, teacher_logits, temperature, dist_beta, dist_gamma)
    return alpha * soft + (1 - alpha) * cross_entropy(student_logits, labels, label_smoothing)


def standardised_distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, alpha: float,
    label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """alpha `kd_loss` of `standardise`d logits + (1 - alpha) `cross_entropy` of the student's own logits."""
    soft = kd_loss(standardise(student_logits), standardise(teacher_logits.to(student_logits.dtype)), temperature)
    return alpha * soft + (1 - alpha) * cross_entropy(student_logits, labels, label_smoothing)


def combine_teachers(
    teacher_logits: Sequence[Tensor],
    rule: str,
    temperature: float,
    labels: Tensor | None = None,
) -> Tensor:
    """Combine the logits [..., C] of several teachers into those of one target, for `distillation_loss`.

    Every rule gives one probability distribution per image, so the total weight of the soft term stays the same.

    - `mean_prob`: softmax(result/T) is the mean of the teachers' softened probabilities. The mean of the teachers'
      KL divergences has the same gradient (You et al. 2017, doi:10.1145/3097983.3098135).
    - `mean_logit`: the mean of the logits, a (normalised) geometric mean of the probabilities.
    - `confidence`: a mean of softened probabilities weighted, image by image, by the teachers' belief in the true
      label, p_k[y] / sum_j p_j[y] at T = 1. For two teachers these are the weights of Zhang et al. 2022 (CA-MKD,
      arXiv:2201.00007): (1 - exp(CE_k) / sum_j exp(CE_j)) / (K - 1). Needs `labels` [...]; an image without one (-1)
      weighs the teachers equally.

    Raises `ValueError` for an unknown rule, fewer than two teachers, different shapes, or `confidence` without labels.
    """
    _check_temperature(temperature)
    if len(teacher_logits) < 2 or len({logits.shape for logits in teacher_logits}) != 1:
        raise ValueError("combine_teachers: give the logits of two or more teachers, all of one shape")
    stacked = torch.stack(list(teacher_logits))
    if rule == "mean_logit":
        return stacked.mean(dim=0)
    log_probs = F.log_softmax(stacked / temperature, dim=-1)
    if rule == "mean_prob":
        log_weights = torch.full_like(log_probs[..., :1], -math.log(len(teacher_logits)))
    elif rule == "confidence":
        if labels is None:
            raise ValueError("combine_teachers: the rule 'confidence' needs labels; pass labels=")
        true = labels.clamp(min=0)[..., None].expand(stacked.shape[1:-1] + (1,))
        believed = F.log_softmax(stacked, dim=-1).gather(-1, true.expand((len(stacked),) + true.shape))
        believed = believed.masked_fill((labels == NO_LABEL)[..., None], 0.0)
        log_weights = F.log_softmax(believed, dim=0)
    else:
        raise ValueError(f"combine_teachers: there is no rule '{rule}'; use mean_prob, mean_logit or confidence")
    return temperature * torch.logsumexp(log_weights + log_probs, dim=0)


def class_mean(teacher_logits: Sequence[Tensor], labels: Tensor, temperature: float) -> Tensor:
    """A control: soft labels averaged over each class, which say how alike classes are and nothing about one image.

    teacher_logits: a list with one tensor [N, V, C], images and their views; labels: int64 [N, V]. The softened
    probabilities of the result, logits [N, V, C], are the mean over all images and views with the same label.

    Raises `ValueError` for several teachers, an image without a label, or an invalid temperature.
    """
    _check_temperature(temperature)
    if len(teacher_logits) != 1 or bool((labels < 0).any()):
        raise ValueError("class_mean: give one teacher's logits, and the label of every image")
    log_probs = F.log_softmax(teacher_logits[0] / temperature, dim=-1)
    target = torch.empty_like(log_probs)
    for label in labels.unique():
        of_class = log_probs[labels == label]
        target[labels == label] = of_class.logsumexp(dim=0) - math.log(len(of_class))
    return temperature * target

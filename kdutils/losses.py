"""Distillation losses: pure functions of logits, one per paper. Inputs keep their precision.

Shapes: logits [B, C], labels int64 [B] (-1 means: no label). Every loss is a mean over the batch, in nats.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NO_LABEL = -1


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: {temperature} will not do; it must be a finite number above 0")


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(t/T) || softmax(s/T)), averaged over the batch.

    The factor T^2 keeps the gradient's size about the same at every temperature.
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
    With alpha = 0 it is `cross_entropy`, with alpha = 1 `kd_loss`.

    Raises `ValueError` for an alpha outside [0, 1] or an impossible temperature.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: {alpha} will not do; it must be from 0 to 1")
    _check_temperature(temperature)
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.to(student.dtype) / temperature, dim=1)
    soft = temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)
    hard = F.cross_entropy(
        student_logits, labels, ignore_index=NO_LABEL, label_smoothing=label_smoothing, reduction="none"
    )
    weight = torch.ones_like(soft).masked_fill(labels != NO_LABEL, alpha)
    return (weight * soft + (1 - alpha) * hard).mean()


def combine_teachers(
    teacher_logits: Sequence[Tensor],
    rule: str,
    temperature: float,
    labels: Tensor | None = None,
) -> Tensor:
    """Logits [..., C] of one target made of several teachers' logits [..., C]; pass them to `distillation_loss`.

    Every rule gives one probability distribution per image, so the total weight of the soft term stays the same.

    - `mean_prob`: softmax(result/T) is the mean of the teachers' softened probabilities. The mean of the teachers'
      KL divergences has the same gradient (You et al. 2017, doi:10.1145/3097983.3098135).
    - `mean_logit`: the mean of the logits, a (normalised) geometric mean of the probabilities.
    - `confidence`: a mean of softened probabilities weighted, image by image, by the teachers' belief in the true
      label, p_k[y] / sum_j p_j[y] at T = 1. For two teachers these are the weights of Zhang et al. 2022 (CA-MKD,
      arXiv:2201.00007): (1 - exp(CE_k) / sum_j exp(CE_j)) / (K - 1). Needs `labels` [...].

    Raises `ValueError` for an unknown rule, fewer than two teachers, different shapes, or labels that are missing.
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
        if labels is None or bool((labels < 0).any()):
            raise ValueError("combine_teachers: the rule 'confidence' needs the label of every image")
        true = labels[..., None].expand(stacked.shape[1:-1] + (1,))
        believed = F.log_softmax(stacked, dim=-1).gather(-1, true.expand((len(stacked),) + true.shape))
        log_weights = F.log_softmax(believed, dim=0)
    else:
        raise ValueError(f"combine_teachers: there is no rule '{rule}'; use mean_prob, mean_logit or confidence")
    return temperature * torch.logsumexp(log_weights + log_probs, dim=0)

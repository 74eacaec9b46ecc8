"""Divergences between next-token distributions: per-token values in nats, the vocabulary in the last dimension.

Every function computes in at least float32 (float64 stays float64) and detaches the teacher. A logit of `-inf` means
probability zero. None of them reduces: `losses/reduction.py` does.
"""

import torch
import torch.nn.functional as F


def _log_probs(logits: torch.Tensor) -> torch.Tensor:
    """Log-softmax over the vocabulary in float32, or in float64 for float64 logits."""
    return F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def _check_same_shape(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> None:
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"`student_logits` has shape {tuple(student_logits.shape)} but `teacher_logits` has shape "
            f"{tuple(teacher_logits.shape)}. A divergence compares both models token by token over one vocabulary. "
            "Cut padded heads to the shared vocabulary."
        )


def _expected_log_ratio(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) from log-probabilities, where a token of probability zero under p adds nothing."""
    p = log_p.exp()
    # Filled on both sides: `0 * (-inf - x)` is NaN, in the value and in the gradient. By p and not by log p, since p
    # may underflow where log q is -inf
    absent = p == 0
    ratio = log_p.masked_fill(absent, 0.0) - log_q.masked_fill(absent, 0.0)
    return (p * ratio).sum(dim=-1)


def forward_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    r"""
    Per-token forward Kullback-Leibler divergence KL(teacher || student), in nats.

    For one token: sum_v p(v) (log p(v) - log q(v)), with p the teacher and q the student. Gradient flows to the
    student only.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised student scores, any float dtype; computed in float32, or in float64.
        teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised teacher scores over the same vocabulary. Detached.

    Returns:
        `torch.Tensor` of shape `(...)`: non-negative, zero where both distributions agree.

    Raises:
        ValueError: If the shapes differ.

    Examples:

    ```python
    >>> student = torch.tensor([[0.25, 0.75]]).log()
    >>> teacher = torch.tensor([[0.5, 0.5]]).log()
    >>> forward_kl(student, teacher)  # 0.5 * ln(4 / 3)
    tensor([0.1438])
    ```
    """
    _check_same_shape(student_logits, teacher_logits)
    return _expected_log_ratio(_log_probs(teacher_logits.detach()), _log_probs(student_logits))


def reverse_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    r"""
    Per-token reverse Kullback-Leibler divergence KL(student || teacher), in nats.

    For one token: sum_v q(v) (log q(v) - log p(v)), with q the student and p the teacher. Infinite where the student
    gives mass to a token that the teacher excludes. Gradient flows to the student only.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised student scores, any float dtype; computed in float32, or in float64.
        teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised teacher scores over the same vocabulary. Detached.

    Returns:
        `torch.Tensor` of shape `(...)`: non-negative, zero where both distributions agree.

    Raises:
        ValueError: If the shapes differ.

    Examples:

    ```python
    >>> student = torch.tensor([[0.5, 0.5]]).log()
    >>> teacher = torch.tensor([[0.25, 0.75]]).log()
    >>> reverse_kl(student, teacher)  # 0.5 * ln(4 / 3)
    tensor([0.1438])
    ```
    """
    _check_same_shape(student_logits, teacher_logits)
    return _expected_log_ratio(_log_probs(student_logits), _log_probs(teacher_logits.detach()))


def generalized_jsd(student_logits: torch.Tensor, teacher_logits: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    r"""
    Per-token generalized Jensen-Shannon divergence, in nats.

    With p the teacher, q the student and m = beta p + (1 - beta) q: beta KL(p || m) + (1 - beta) KL(q || m), as in
    [On-Policy Distillation of Language Models](https://huggingface.co/papers/2306.13649). Gradient flows to the
    student only.

    Note:
        The formula is zero at `beta` 0 and 1. As in TRL, these ends return its limits after division by `beta` or
        `1 - beta`: forward KL at 0, reverse KL at 1.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised student scores, any float dtype; computed in float32, or in float64.
        teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised teacher scores over the same vocabulary. Detached.
        beta (`float`, *optional*, defaults to `0.5`):
            Weight of the teacher in the mixture, in [0, 1].

    Returns:
        `torch.Tensor` of shape `(...)`: non-negative, zero where both distributions agree.

    Raises:
        ValueError: If the shapes differ, or `beta` lies outside of [0, 1].

    Examples:

    ```python
    >>> student = torch.tensor([[1.0, 0.0]]).log()
    >>> teacher = torch.tensor([[0.0, 1.0]]).log()
    >>> generalized_jsd(student, teacher)  # ln 2
    tensor([0.6931])
    ```
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"`beta` is {beta}, but it is the teacher's share in a mixture. Set it in [0, 1].")
    if beta == 0.0:
        return forward_kl(student_logits, teacher_logits)
    if beta == 1.0:
        return reverse_kl(student_logits, teacher_logits)
    _check_same_shape(student_logits, teacher_logits)
    log_q, log_p = _log_probs(student_logits), _log_probs(teacher_logits.detach())
    # Mixed as probabilities: the gradient of `logaddexp` is NaN where both arguments are -inf
    mixture = beta * log_p.exp() + (1.0 - beta) * log_q.exp()
    log_m = mixture.clamp_min(torch.finfo(mixture.dtype).tiny).log()
    return beta * _expected_log_ratio(log_p, log_m) + (1.0 - beta) * _expected_log_ratio(log_q, log_m)


def total_variation(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    r"""
    Per-token total variation distance, half of sum_v |p(v) - q(v)|.

    It is the share of tokens on which the best coupling of teacher and student must differ. Gradient flows to the
    student only.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised student scores, any float dtype; computed in float32, or in float64.
        teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised teacher scores over the same vocabulary. Detached.

    Returns:
        `torch.Tensor` of shape `(...)`: in [0, 1], zero where both distributions agree.

    Raises:
        ValueError: If the shapes differ.

    Examples:

    ```python
    >>> student = torch.tensor([[0.5, 0.5]]).log()
    >>> teacher = torch.tensor([[0.7, 0.3]]).log()
    >>> total_variation(student, teacher)
    tensor([0.2000])
    ```
    """
    _check_same_shape(student_logits, teacher_logits)
    difference = _log_probs(teacher_logits.detach()).exp() - _log_probs(student_logits).exp()
    return 0.5 * difference.abs().sum(dim=-1)


def cross_entropy(student_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    r"""
    Per-token negative log-likelihood of the labels, in nats.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised student scores, any float dtype; computed in float32, or in float64.
        labels (`torch.Tensor` of shape `(...)`):
            Token ids, already shifted: the label at a position is the token its logits predict. No `-100`: select the
            valid tokens first.

    Returns:
        `torch.Tensor` of shape `(...)`: non-negative.

    Raises:
        ValueError: If the shapes do not match.

    Examples:

    ```python
    >>> cross_entropy(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([0]))  # ln 4
    tensor([1.3863])
    ```
    """
    if student_logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"`student_logits` has shape {tuple(student_logits.shape)} but `labels` has shape {tuple(labels.shape)}. "
            "Each label needs one row of logits. Pass `labels` without the vocabulary dimension."
        )
    return -_log_probs(student_logits).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    r"""
    Per-token entropy of the softmax of `logits`, in nats.

    Args:
        logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised scores, any float dtype; computed in float32, or in float64.

    Returns:
        `torch.Tensor` of shape `(...)`: between 0 and log V.

    Examples:

    ```python
    >>> entropy(torch.zeros(1, 2))  # ln 2
    tensor([0.6931])
    ```
    """
    log_p = _log_probs(logits)
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(dim=-1)

"""Divergences between next-token distributions: per-token values in nats, the vocabulary in the last dimension.

Every function computes in at least float32 (float64 stays float64) and detaches the teacher. A logit of `-inf` means
probability zero. None of them reduces: `losses/reduction.py` does.
"""

import math

import torch
import torch.nn.functional as F


def _log_probs(logits: torch.Tensor, kd_temperature: float = 1.0) -> torch.Tensor:
    """Log-softmax over the vocabulary in float32, or in float64 for float64 logits."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if kd_temperature == 1.0:
        return F.log_softmax(logits, dim=-1)
    _check_kd_temperature(kd_temperature)
    return F.log_softmax(logits / kd_temperature, dim=-1)


def _check_kd_temperature(kd_temperature: float) -> None:
    """Refuse temperatures that no softmax has."""
    if not 0.0 < kd_temperature < math.inf:
        raise ValueError(
            f"`kd_temperature` is {kd_temperature}, but logits are divided by it. Set it above 0; 1 changes nothing."
        )


def _check_beta(beta: float) -> None:
    """Refuse what is no share."""
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"`beta` is {beta}, but it is the teacher's share in a mixture. Set it in [0, 1].")


def _check_skew(skew: float) -> None:
    """Refuse what is no share."""
    if not 0.0 <= skew < 1.0:
        raise ValueError(
            f"`skew` is {skew}, but it is the share of a distribution in the mixture that it is compared with; at 1, "
            "that is with itself. Set it in [0, 1)."
        )


def _check_same_shape(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> None:
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"`student_logits` has shape {tuple(student_logits.shape)} but `teacher_logits` has shape "
            f"{tuple(teacher_logits.shape)}. A divergence compares both models token by token over one vocabulary. "
            "Cut padded heads to the shared vocabulary."
        )


def _check_head(head: float) -> None:
    """Refuse what is no mass."""
    if not 0.0 <= head <= 1.0:
        raise ValueError(f"`head` is {head}, but it is a mass of the teacher's distribution. Set it in [0, 1].")


def _log_mixture(log_p: torch.Tensor, log_q: torch.Tensor, share: float) -> torch.Tensor:
    """log(share p + (1 - share) q), finite; mixed as probabilities, since `logaddexp` has a NaN gradient at -inf."""
    mixture = share * log_p.exp() + (1.0 - share) * log_q.exp()
    return mixture.clamp_min(torch.finfo(mixture.dtype).tiny).log()


def _expected_log_ratio(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) from log-probabilities, where a token of probability zero under p adds nothing."""
    p = log_p.exp()
    # Filled on both sides: `0 * (-inf - x)` is NaN, in the value and in the gradient. By p and not by log p, since p
    # may underflow where log q is -inf
    absent = p == 0
    ratio = log_p.masked_fill(absent, 0.0) - log_q.masked_fill(absent, 0.0)
    return (p * ratio).sum(dim=-1)


def forward_kl(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, kd_temperature: float = 1.0
) -> torch.Tensor:
    r"""
    Per-token forward Kullback-Leibler divergence KL(teacher || student), in nats.

    For one token: sum_v p(v) (log p(v) - log q(v)), with p the teacher and q the student. Gradient flows to the
    student only.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised student scores, any float dtype; computed in float32, or in float64.
        teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised teacher scores over the same vocabulary. Detached.
        kd_temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits of both models before the softmax. No factor restores the size of the gradient.

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
    return _expected_log_ratio(
        _log_probs(teacher_logits.detach(), kd_temperature), _log_probs(student_logits, kd_temperature)
    )


def reverse_kl(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, kd_temperature: float = 1.0
) -> torch.Tensor:
    r"""
    Per-token reverse Kullback-Leibler divergence KL(student || teacher), in nats.

    For one token: sum_v q(v) (log q(v) - log p(v)), with q the student and p the teacher. Infinite where the student
    gives mass to a token that the teacher excludes. Gradient flows to the student only.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised student scores, any float dtype; computed in float32, or in float64.
        teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised teacher scores over the same vocabulary. Detached.
        kd_temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits of both models before the softmax. No factor restores the size of the gradient.

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
    return _expected_log_ratio(
        _log_probs(student_logits, kd_temperature), _log_probs(teacher_logits.detach(), kd_temperature)
    )


def generalized_jsd(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, beta: float = 0.5, kd_temperature: float = 1.0
) -> torch.Tensor:
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
        kd_temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits of both models before the softmax. No factor restores the size of the gradient.

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
    _check_beta(beta)
    if beta == 0.0:
        return forward_kl(student_logits, teacher_logits, kd_temperature)
    if beta == 1.0:
        return reverse_kl(student_logits, teacher_logits, kd_temperature)
    _check_same_shape(student_logits, teacher_logits)
    log_q = _log_probs(student_logits, kd_temperature)
    log_p = _log_probs(teacher_logits.detach(), kd_temperature)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _expected_log_ratio(log_p, log_m) + (1.0 - beta) * _expected_log_ratio(log_q, log_m)


def skewed_forward_kl(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, skew: float = 0.1, kd_temperature: float = 1.0
) -> torch.Tensor:
    r"""
    Per-token skewed forward divergence KL(p || skew p + (1 - skew) q), in nats.

    With p the teacher and q the student. The mixture never excludes what the teacher allows, so the value stays below
    -log(skew). Gradient flows to the student only. Formula and default as in the code of
    [Dual-Space Knowledge Distillation for Large Language Models](https://huggingface.co/papers/2406.17328).

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised student scores, any float dtype; computed in float32, or in float64.
        teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised teacher scores over the same vocabulary. Detached.
        skew (`float`, *optional*, defaults to `0.1`):
            Share of the teacher in the mixture, in [0, 1); 0 is the forward KL.
        kd_temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits of both models before the softmax. No factor restores the size of the gradient.

    Returns:
        `torch.Tensor` of shape `(...)`: non-negative, zero where both distributions agree.

    Raises:
        ValueError: If the shapes differ, or `skew` lies outside of [0, 1).

    Examples:

    ```python
    >>> student = torch.tensor([[1.0, 0.0]]).log()
    >>> teacher = torch.tensor([[0.0, 1.0]]).log()
    >>> skewed_forward_kl(student, teacher, skew=0.5)  # ln 2
    tensor([0.6931])
    ```
    """
    _check_skew(skew)
    if skew == 0.0:
        return forward_kl(student_logits, teacher_logits, kd_temperature)
    _check_same_shape(student_logits, teacher_logits)
    log_q = _log_probs(student_logits, kd_temperature)
    log_p = _log_probs(teacher_logits.detach(), kd_temperature)
    return _expected_log_ratio(log_p, _log_mixture(log_p, log_q, skew))


def skewed_reverse_kl(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, skew: float = 0.1, kd_temperature: float = 1.0
) -> torch.Tensor:
    r"""
    Per-token skewed reverse divergence KL(q || skew q + (1 - skew) p), in nats.

    With p the teacher and q the student. The mixture never excludes what the student allows, so the value stays below
    -log(skew). Gradient flows to the student only, through both places of q. Formula and default as in the code of
    [Dual-Space Knowledge Distillation for Large Language Models](https://huggingface.co/papers/2406.17328).

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised student scores, any float dtype; computed in float32, or in float64.
        teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised teacher scores over the same vocabulary. Detached.
        skew (`float`, *optional*, defaults to `0.1`):
            Share of the student in the mixture, in [0, 1); 0 is the reverse KL.
        kd_temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits of both models before the softmax. No factor restores the size of the gradient.

    Returns:
        `torch.Tensor` of shape `(...)`: non-negative, zero where both distributions agree.

    Raises:
        ValueError: If the shapes differ, or `skew` lies outside of [0, 1).

    Examples:

    ```python
    >>> student = torch.tensor([[1.0, 0.0]]).log()
    >>> teacher = torch.tensor([[0.0, 1.0]]).log()
    >>> skewed_reverse_kl(student, teacher, skew=0.5)  # ln 2
    tensor([0.6931])
    ```
    """
    _check_skew(skew)
    if skew == 0.0:
        return reverse_kl(student_logits, teacher_logits, kd_temperature)
    _check_same_shape(student_logits, teacher_logits)
    log_q = _log_probs(student_logits, kd_temperature)
    log_p = _log_probs(teacher_logits.detach(), kd_temperature)
    return _expected_log_ratio(log_q, _log_mixture(log_q, log_p, skew))


def adaptive_kl(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, head: float = 0.5, kd_temperature: float = 1.0
) -> torch.Tensor:
    r"""
    Per-token mixture of forward and reverse KL by where the student is wrong, in nats.

    The teacher's most likely tokens form the head, the rest, which holds up to a mass of `1 - head`, the tail. With
    g_head and g_tail the sums of |p - q| over them: (g_head KL(p || q) + g_tail KL(q || p)) / (g_head + g_tail). The
    shares carry no gradient; it flows to the student only. From
    [Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language
    Models](https://huggingface.co/papers/2404.02657); formula and default as in the code of
    [Dual-Space Knowledge Distillation for Large Language Models](https://huggingface.co/papers/2406.17328).

    Note:
        That code gives NaN where both distributions are equal; this gives 0.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised student scores, any float dtype; computed in float32, or in float64.
        teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised teacher scores over the same vocabulary. Detached.
        head (`float`, *optional*, defaults to `0.5`):
            Smallest mass of the head, in [0, 1].
        kd_temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits of both models before the softmax. No factor restores the size of the gradient.

    Returns:
        `torch.Tensor` of shape `(...)`: non-negative, zero where both distributions agree.

    Raises:
        ValueError: If the shapes differ, or `head` lies outside of [0, 1].

    Examples:

    ```python
    >>> student = torch.tensor([[0.25, 0.75]]).log()
    >>> teacher = torch.tensor([[0.75, 0.25]]).log()
    >>> adaptive_kl(student, teacher)  # 0.5 * ln 3, whatever the shares
    tensor([0.5493])
    ```
    """
    _check_head(head)
    _check_same_shape(student_logits, teacher_logits)
    log_q = _log_probs(student_logits, kd_temperature)
    log_p = _log_probs(teacher_logits.detach(), kd_temperature)
    share = _head_share(log_p.exp(), log_q.detach().exp(), head)
    return share * _expected_log_ratio(log_p, log_q) + (1.0 - share) * _expected_log_ratio(log_q, log_p)


def _head_share(teacher_probs: torch.Tensor, student_probs: torch.Tensor, head: float) -> torch.Tensor:
    """Share of the head in the sum of |p - q|, `(...)`, in (0, 1); one half where nothing differs."""
    ascending, order = teacher_probs.sort(dim=-1)
    gap = (teacher_probs - student_probs).abs().gather(-1, order)
    # Rounding may lift the sum of all above 1
    in_tail = ascending.cumsum(dim=-1).clamp_max(1.0) <= 1.0 - head
    total = gap.sum(dim=-1)
    share = torch.where(total > 0, gap.masked_fill(in_tail, 0.0).sum(dim=-1) / total, 0.5)
    # Never 0 or 1: the other divergence may be infinite
    limits = torch.finfo(share.dtype)
    return share.clamp(limits.tiny, 1.0 - limits.eps)


def total_variation(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, kd_temperature: float = 1.0
) -> torch.Tensor:
    r"""
    Per-token total variation distance, half of sum_v |p(v) - q(v)|.

    It is the share of tokens on which the best coupling of teacher and student must differ. Gradient flows to the
    student only.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised student scores, any float dtype; computed in float32, or in float64.
        teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised teacher scores over the same vocabulary. Detached.
        kd_temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits of both models before the softmax. No factor restores the size of the gradient.

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
    p = _log_probs(teacher_logits.detach(), kd_temperature).exp()
    difference = p - _log_probs(student_logits, kd_temperature).exp()
    return 0.5 * difference.abs().sum(dim=-1)

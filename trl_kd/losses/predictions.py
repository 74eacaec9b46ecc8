"""What one model says of the next token: cross-entropy, entropy, and its first choice. Per token, in nats.

As in `losses/divergences.py`: at least float32, `-inf` means probability zero, and nothing is reduced.
"""

import torch

from trl_kd.losses.divergences import _check_same_shape, _log_probs


def _check_labels(student_logits: torch.Tensor, labels: torch.Tensor) -> None:
    if student_logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"`student_logits` has shape {tuple(student_logits.shape)} but `labels` has shape {tuple(labels.shape)}. "
            "Each label needs one row of logits. Pass `labels` without the vocabulary dimension."
        )


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
    _check_labels(student_logits, labels)
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


def top1_agreement(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    r"""
    Whether both models find the same token most likely: a metric, without gradient.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised student scores.
        teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised teacher scores over the same vocabulary.

    Returns:
        `torch.Tensor` of shape `(...)`: 1 where the student's first token is (one of) the teacher's most likely, else
        0; in float32, or in float64.

    Raises:
        ValueError: If the shapes differ.

    Examples:

    ```python
    >>> student = torch.tensor([[0.6, 0.4], [0.3, 0.7]]).log()
    >>> teacher = torch.tensor([[0.9, 0.1], [0.8, 0.2]]).log()
    >>> top1_agreement(student, teacher)
    tensor([1., 0.])
    ```
    """
    _check_same_shape(student_logits, teacher_logits)
    chosen = student_logits.argmax(dim=-1, keepdim=True)
    agrees = teacher_logits.gather(-1, chosen).squeeze(-1) == teacher_logits.amax(dim=-1)
    return agrees.to(torch.promote_types(student_logits.dtype, torch.float32)).detach()


def top1_accuracy(student_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    r"""
    Whether a model finds the label most likely: a metric, without gradient.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised scores.
        labels (`torch.Tensor` of shape `(...)`):
            Token ids.

    Returns:
        `torch.Tensor` of shape `(...)`: 1 where the label is (one of) the most likely, else 0; in float32, or in
        float64.

    Raises:
        ValueError: If the shapes do not match.

    Examples:

    ```python
    >>> top1_accuracy(torch.tensor([[0.6, 0.4], [0.3, 0.7]]).log(), torch.tensor([0, 0]))
    tensor([1., 0.])
    ```
    """
    _check_labels(student_logits, labels)
    chosen = student_logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    is_right = chosen == student_logits.amax(dim=-1)
    return is_right.to(torch.promote_types(student_logits.dtype, torch.float32)).detach()


def log_sum_exp(logits: torch.Tensor) -> torch.Tensor:
    r"""
    Log of the sum of the exponentials of all logits: the log normaliser of their softmax.

    Args:
        logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised scores, any float dtype; computed in float32, or in float64.

    Returns:
        `torch.Tensor` of shape `(...)`.

    Examples:

    ```python
    >>> log_sum_exp(torch.zeros(1, 4))  # ln 4
    tensor([1.3863])
    ```
    """
    return (logits if logits.dtype == torch.float64 else logits.float()).logsumexp(dim=-1)

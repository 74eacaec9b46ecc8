"""Divergences on the teacher's most likely tokens of each state, `ids` and `log_probs` of `losses/sparse.py`.

As in `losses/divergences.py`: at least float32, the teacher is detached, and nothing is reduced.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trl_kd.losses.divergences import _expected_log_ratio, _log_probs


def set_forward_kl(student_logits: torch.Tensor, ids: torch.Tensor, teacher_log_probs: torch.Tensor) -> torch.Tensor:
    r"""
    KL(p' || student), with p' the teacher cut to a set of tokens and renormalised, in nats.

    Note:
        Ours. It is the teacher-expectation form of the top-p objective of [Language Model Distillation: A Temporal
        Difference Imitation Learning Perspective](https://huggingface.co/papers/2505.20335) without its penalty and
        with a tail term of weight 1, up to the entropy of p'; the successor's value is not in it.

    Args:
        student_logits (`torch.Tensor` of shape `(N, V)`):
            Unnormalised student scores of the whole vocabulary.
        ids (`torch.Tensor` of shape `(N, K)`):
            The teacher's tokens.
        teacher_log_probs (`torch.Tensor` of shape `(N, K)`):
            Their log-probabilities; `-inf` for those outside of the set.

    Returns:
        `torch.Tensor` of shape `(N,)`: gradient flows to the student.

    Examples:

    ```python
    >>> student, teacher = torch.tensor([[0.25, 0.25, 0.5]]).log(), torch.tensor([[0.6, 0.3]]).log()
    >>> set_forward_kl(student, torch.tensor([[0, 1]]), teacher)  # 2/3 ln(8/3) + 1/3 ln(4/3)
    tensor([0.7498])
    ```
    """
    log_q = _log_probs(student_logits).gather(1, ids)
    return _expected_log_ratio(_log_probs(teacher_log_probs.detach()).to(log_q.dtype), log_q)


def tail_nll(student_logits: torch.Tensor, ids: torch.Tensor, teacher_log_probs: torch.Tensor) -> torch.Tensor:
    r"""
    -log of the student's mass on a set of tokens, in nats: what keeps it from leaving the set.

    Args:
        student_logits (`torch.Tensor` of shape `(N, V)`):
            Unnormalised student scores of the whole vocabulary.
        ids (`torch.Tensor` of shape `(N, K)`):
            The teacher's tokens.
        teacher_log_probs (`torch.Tensor` of shape `(N, K)`):
            `-inf` for those outside of the set.

    Returns:
        `torch.Tensor` of shape `(N,)`: gradient flows to the student.

    Examples:

    ```python
    >>> student, teacher = torch.tensor([[0.25, 0.25, 0.5]]).log(), torch.tensor([[0.6, 0.3]]).log()
    >>> tail_nll(student, torch.tensor([[0, 1]]), teacher)  # ln 2
    tensor([0.6931])
    ```
    """
    log_q = _log_probs(student_logits).gather(1, ids)
    return -log_q.masked_fill(teacher_log_probs == float("-inf"), float("-inf")).logsumexp(dim=1)


@dataclass(frozen=True)
class OnSet:
    r"""
    The sparse form of a divergence: each token of the set is one outcome, and everything else together is one more.

    It needs no more of the teacher than its tokens of the set, as a cache has them, and is never larger than the
    divergence of the whole distributions, since outcomes are only put together. A function of
    [`linear_loss`]'s terms, with the inputs student, ids and teacher.

    Args:
        function (`Callable`):
            Per-token function of student and teacher logits, such as `total_variation`.

    Examples:

    ```python
    >>> student, teacher = torch.tensor([[0.25, 0.25, 0.5]]).log(), torch.tensor([[0.6]]).log()
    >>> OnSet(total_variation)(student, torch.tensor([[0]]), teacher)  # of (.25, .75) and (.6, .4)
    tensor([0.3500])
    ```
    """

    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def __call__(
        self, student_logits: torch.Tensor, ids: torch.Tensor, teacher_log_probs: torch.Tensor
    ) -> torch.Tensor:
        """Per-token values `(N,)` of logits `(N, V)`, ids `(N, K)` and log-probabilities `(N, K)`."""
        return self.of_set(_log_probs(student_logits).gather(1, ids), teacher_log_probs)

    def of_set(self, student_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor) -> torch.Tensor:
        """The same of both models' log-probabilities of the set, `(N, K)`."""
        is_token = teacher_log_probs > float("-inf")
        student = _with_rest(student_log_probs, is_token)
        return self.function(student, _with_rest(teacher_log_probs.detach().to(student.dtype), is_token))


def _with_rest(log_probs: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the tokens of the set, and of everything else in one more column."""
    log_probs = log_probs.masked_fill(~is_token, float("-inf"))
    # What rounding leaves of nothing is no probability
    rest = (1.0 - log_probs.exp().sum(dim=1, keepdim=True)).clamp_min(torch.finfo(log_probs.dtype).eps)
    return torch.cat([log_probs, rest.log()], dim=1)  # (N, K + 1)

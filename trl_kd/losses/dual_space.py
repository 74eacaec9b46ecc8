"""Dual-space distillation: teacher and student compared in the student's space and in the teacher's, on shared heads.

h^s, h^t are last hidden states, W_s, W_t the output heads. A projector takes the teacher's states to the student's
space, where the student's head reads them (z^{t->s} = W_s P_{t->s} h^t), another the student's to the teacher's, where
the teacher's head does (z^{s->t} = W_t P_{s->t} h^s). The projectors are in `modules/projector.py`; that the heads are
detached there (W_s for z^{t->s}, W_t always) is up to who makes the logits.

Sources: [Dual-Space Knowledge Distillation for Large Language Models](https://huggingface.co/papers/2406.17328) (v1)
and its second version, [2504.11426](https://huggingface.co/papers/2504.11426) (v2). Formulas follow the criteria of
the authors' code, at the commits that `docs/dskd_trainer.md` names. Every function returns values per token.
"""

import math
from collections.abc import Callable
from functools import partial

import torch

from trl_kd.losses.divergences import forward_kl
from trl_kd.losses.linear import Term
from trl_kd.losses.predictions import cross_entropy, top1_accuracy


_Divergence = Callable[..., torch.Tensor]


def student_space(
    student_logits: torch.Tensor,
    projected_teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    projector_labels: torch.Tensor,
    *,
    divergence: _Divergence = forward_kl,
    kd_temperature: float = 2.0,
    teacher_temperature: float = 1.0,
) -> dict[str, torch.Tensor]:
    r"""
    The terms of dual-space distillation that are computed on the student's head, per token.

    With z^s the student's logits, z^{t->s} the projected teacher's, y the next token and D a divergence:

    - `student_ce`: CE(z^s, y). Trains the student.
    - `projector_ce`: CE(z^{t->s}, y'), at temperature 1. Trains the projector. y' is y in v1 and the teacher's own
      most likely token in v2.
    - `student_space_kd`: D(z^s, z^{t->s}; temperature). Trains the student: the projected teacher is detached.
    - `projector_agreement`, `student_agreement`: whether y' is the most likely token of either. Metrics; the first is
      also the gate of `student_space_kd`.

    Note:
        There is no factor of the squared temperature, as in the authors' code.

    Args:
        student_logits (`torch.Tensor` of shape `(N, V_s)`):
            Unnormalised scores of the student, any float dtype; computed in float32, or in float64.
        projected_teacher_logits (`torch.Tensor` of shape `(N, V_s)`):
            Those of the teacher's projected states on the student's (detached) head.
        labels (`torch.Tensor` of shape `(N,)`):
            Next tokens y.
        projector_labels (`torch.Tensor` of shape `(N,)`):
            What the projector learns to predict, y'.
        divergence (`Callable`, *optional*, defaults to [`forward_kl`]):
            Takes student and teacher logits and `kd_temperature`; one of this package's divergences, or a `partial`.
        kd_temperature (`float`, *optional*, defaults to `2.0`):
            Temperature of both distributions in the divergence.
        teacher_temperature (`float`, *optional*, defaults to `1.0`):
            Further divisor of the projected teacher's logits in the divergence.

    Returns:
        `dict[str, torch.Tensor]`: values of shape `(N,)` by the names above, in nats (the last two are 0 or 1).

    Raises:
        ValueError: If the shapes do not match, or a temperature is none.

    Examples:

    ```python
    >>> student = torch.tensor([[0.5, 0.5]]).log()
    >>> projected = torch.tensor([[0.25, 0.75]]).log()
    >>> y = torch.tensor([1])
    >>> terms = student_space(student, projected, y, y, kd_temperature=1.0)
    >>> terms["student_ce"], terms["projector_ce"], terms["student_space_kd"]  # ln 2, ln 4/3, KL
    (tensor([0.6931]), tensor([0.2877]), tensor([0.1308]))
    ```
    """
    options = {"divergence": divergence, "kd_temperature": kd_temperature}
    if not 0.0 < teacher_temperature < math.inf:
        raise ValueError(
            f"`teacher_temperature` is {teacher_temperature}, but logits are divided by it. Set it above 0; 1 changes "
            "nothing."
        )
    terms = student_space_terms(**options, is_tempered=teacher_temperature != 1.0)
    wide = torch.promote_types(projected_teacher_logits.dtype, torch.float32)
    given = {
        "student": student_logits,
        "projected_teacher": projected_teacher_logits,
        "tempered_teacher": projected_teacher_logits.to(wide) / teacher_temperature,
        "labels": labels,
        "projector_labels": projector_labels,
    }
    return {name: term.function(*(given[part] for part in term.inputs)) for name, term in terms.items()}


def student_space_terms(
    *,
    divergence: _Divergence = forward_kl,
    kd_temperature: float = 2.0,
    is_tempered: bool = False,
    ce_weights: torch.Tensor | None = None,
    projector_weights: torch.Tensor | None = None,
    kd_weights: torch.Tensor | None = None,
) -> dict[str, Term]:
    r"""
    [`student_space`] as terms of [`linear_loss`], on pairs `"student"` and `"projected_teacher"`.

    Args:
        divergence (`Callable`, *optional*, defaults to [`forward_kl`]):
            As above.
        kd_temperature (`float`, *optional*, defaults to `2.0`):
            As above.
        is_tempered (`bool`, *optional*, defaults to `False`):
            Whether the divergence takes a pair `"tempered_teacher"`, whose head divides by the teacher's temperature.
        ce_weights (`torch.Tensor` of shape `(N,)`, *optional*):
            Weights of `student_ce`.
        projector_weights (`torch.Tensor` of shape `(N,)`, *optional*):
            Weights of `projector_ce`.
        kd_weights (`torch.Tensor` of shape `(N,)`, *optional*):
            Weights of `student_space_kd`. A term without weights is a metric.

    Returns:
        `dict[str, Term]`: by name; labels are called `"labels"` and `"projector_labels"`.

    Examples:

    ```python
    >>> terms = student_space_terms(kd_weights=torch.ones(1))
    >>> [name for name, term in terms.items() if term.weights is not None]
    ['student_space_kd']
    ```
    """
    teacher = "tempered_teacher" if is_tempered else "projected_teacher"
    compare = partial(divergence, kd_temperature=kd_temperature)
    return {
        "student_ce": Term(cross_entropy, ("student", "labels"), ce_weights),
        "projector_ce": Term(cross_entropy, ("projected_teacher", "projector_labels"), projector_weights),
        "student_space_kd": Term(compare, ("student", teacher), kd_weights),
        "projector_agreement": Term(top1_accuracy, ("projected_teacher", "projector_labels")),
        "student_agreement": Term(top1_accuracy, ("student", "projector_labels")),
    }


def teacher_space(
    projected_student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    divergence: _Divergence = forward_kl,
    kd_temperature: float = 2.0,
) -> dict[str, torch.Tensor]:
    r"""
    The term of dual-space distillation that is computed on the teacher's head, per token.

    `teacher_space_kd`: D(z^{s->t}, z^t; temperature). Trains the student's body, and its projector if that is learned.
    D is the forward Kullback-Leibler divergence in v1, whatever the student's space takes, and the same in v2.

    Args:
        projected_student_logits (`torch.Tensor` of shape `(M, V_t)`):
            Scores of the student's projected states on the teacher's head, any float dtype; computed in float32, or in
            float64.
        teacher_logits (`torch.Tensor` of shape `(M, V_t)`):
            The teacher's own.
        divergence (`Callable`, *optional*, defaults to [`forward_kl`]):
            Takes student and teacher logits and `kd_temperature`.
        kd_temperature (`float`, *optional*, defaults to `2.0`):
            Temperature of both distributions.

    Returns:
        `dict[str, torch.Tensor]`: `teacher_space_kd` of shape `(M,)`, in nats.

    Raises:
        ValueError: If the shapes differ.

    Examples:

    ```python
    >>> projected, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> teacher_space(projected, teacher, kd_temperature=1.0)
    {'teacher_space_kd': tensor([0.1308])}
    ```
    """
    terms = teacher_space_terms(divergence=divergence, kd_temperature=kd_temperature)
    return {name: term.function(projected_student_logits, teacher_logits) for name, term in terms.items()}


def teacher_space_terms(
    *, divergence: _Divergence = forward_kl, kd_temperature: float = 2.0, kd_weights: torch.Tensor | None = None
) -> dict[str, Term]:
    r"""
    [`teacher_space`] as a term of [`linear_loss`], on pairs `"projected_student"` and `"teacher"`.

    Args:
        divergence (`Callable`, *optional*, defaults to [`forward_kl`]):
            As above.
        kd_temperature (`float`, *optional*, defaults to `2.0`):
            As above.
        kd_weights (`torch.Tensor` of shape `(M,)`, *optional*):
            Weights of the term.

    Returns:
        `dict[str, Term]`: by name.

    Examples:

    ```python
    >>> teacher_space_terms(kd_weights=torch.ones(1))["teacher_space_kd"].inputs
    ('projected_student', 'teacher')
    ```
    """
    compare = partial(divergence, kd_temperature=kd_temperature)
    return {"teacher_space_kd": Term(compare, ("projected_student", "teacher"), kd_weights)}


def universal_logit_distance(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    r"""
    Per-token L1 distance of sorted probabilities: what Universal Logit Distillation (ULD) compares.

    sum_k |q_(k) - p_(k)|, with q_(k) and p_(k) the k-th largest probability of student and teacher, whatever tokens
    they belong to; the smaller vocabulary is filled up with zeros. At temperature 1, as in the authors' code of DSKD,
    where ULD is a baseline. Gradient flows to the student only.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V_s)`):
            Unnormalised student scores, any float dtype; computed in float32, or in float64.
        teacher_logits (`torch.Tensor` of shape `(..., V_t)`):
            Unnormalised teacher scores over another vocabulary.

    Returns:
        `torch.Tensor` of shape `(...)`: between 0 and 2.

    Raises:
        ValueError: If the numbers of tokens differ.

    Examples:

    ```python
    >>> student = torch.tensor([[0.25, 0.75]]).log()
    >>> teacher = torch.tensor([[0.5, 0.2, 0.3]]).log()
    >>> universal_logit_distance(student, teacher)  # |.75 - .5| + |.25 - .3| + |0 - .2|
    tensor([0.5000])
    ```
    """
    if student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise ValueError(
            f"`student_logits` has shape {tuple(student_logits.shape)} but `teacher_logits` has shape "
            f"{tuple(teacher_logits.shape)}. Tokens are compared one by one, only the vocabularies may differ. Select "
            "the same number of tokens of both."
        )
    q, p = (
        (logits if logits.dtype == torch.float64 else logits.float()).softmax(dim=-1).sort(dim=-1, descending=True)[0]
        for logits in (student_logits, teacher_logits.detach())
    )
    shared = min(q.shape[-1], p.shape[-1])
    rest = q[..., shared:].sum(dim=-1) + p[..., shared:].sum(dim=-1)  # the other side has nothing there
    return (q[..., :shared] - p[..., :shared]).abs().sum(dim=-1) + rest

"""Per-token losses on logits. Pure functions of torch tensors; only `reduction` and `linear` reduce."""

from trl_kd.losses.divergences import (
    adaptive_kl,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    total_variation,
)
from trl_kd.losses.dual_space import (
    student_space,
    student_space_terms,
    teacher_space,
    teacher_space_terms,
    universal_logit_distance,
)
from trl_kd.losses.linear import LinearLoss, Term, linear_loss, top1
from trl_kd.losses.moments import (
    critic_objective,
    discount_weights,
    exact_critic,
    exact_moment,
    exact_penalised_moment,
    horizon,
    later_returns,
    moment,
    penalised_critic,
    saturation,
)
from trl_kd.losses.predictions import cross_entropy, entropy, top1_accuracy, top1_agreement
from trl_kd.losses.reduction import token_mean, weighted_sum


__all__ = [
    "LinearLoss",
    "Term",
    "adaptive_kl",
    "critic_objective",
    "cross_entropy",
    "discount_weights",
    "entropy",
    "exact_critic",
    "exact_moment",
    "exact_penalised_moment",
    "forward_kl",
    "generalized_jsd",
    "horizon",
    "later_returns",
    "linear_loss",
    "moment",
    "penalised_critic",
    "reverse_kl",
    "saturation",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "student_space",
    "student_space_terms",
    "teacher_space",
    "teacher_space_terms",
    "token_mean",
    "top1",
    "top1_accuracy",
    "top1_agreement",
    "total_variation",
    "universal_logit_distance",
    "weighted_sum",
]

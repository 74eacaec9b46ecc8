"""Per-token losses on logits. Pure functions of torch tensors; only `reduction` and `linear` reduce."""

from trl_kd.losses.divergences import (
    cross_entropy,
    entropy,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    total_variation,
)
from trl_kd.losses.linear import LinearLoss, Term, linear_loss
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
from trl_kd.losses.reduction import token_mean, weighted_sum


__all__ = [
    "LinearLoss",
    "Term",
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
    "token_mean",
    "total_variation",
    "weighted_sum",
]

r"""What a token does to the states after it: the part of the on-policy gradient that is left out by `"direct"`.

The on-policy moment is a mean over states that the student itself brings about. Its gradient has two parts: at fixed
states (direct), and through the probability of reaching them. The second is a policy gradient,

    later_weight * mean_t A_t grad log pi_S(y_t | s_t),    A_t = later costs of the rollout - what was to be expected,

which makes tokens less likely that lead to states where student and teacher differ. At weight 1, undiscounted, with
the moment as cost it is the whole gradient; that is not a safe objective (it is low in a few easy states), hence a
small weight, a discount, and the off-policy rows beside it.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from trl_kd.losses import Term, entropy, exact_moment, generalized_jsd, later_returns, linear_loss, reverse_kl
from trl_kd.modules import critic_features
from trl_kd.trainer.baselines import less_position_means, sum_over_ranks
from trl_kd.trainer.tokens import TokenBatch


# Per-token costs of a state, and factors on them. Twice the total variation and the scaled JSD lie in [0, 2], the
# reverse KL has no bound
COSTS: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], float]] = {
    "total_variation": (exact_moment, 1.0),
    "jsd": (generalized_jsd, 2.0 / math.log(2.0)),
    "reverse_kl": (reverse_kl, 1.0),
}

# Of generalised advantages with a value baseline
_LAMBDA = 0.9
# Of the value baseline's running sums, and its ridge relative to the mean square of its features: large enough that
# rounding does not show in the solution
_DECAY, _RIDGE = 0.9, 0.1


class StateValue(nn.Module):
    r"""
    Expected later costs of a state: ridge regression on its features in closed form, over older steps only.

    Args:
        num_features (`int`):
            Width of the features, D.
    """

    def __init__(self, num_features: int):
        super().__init__()
        self.register_buffer("gram", torch.zeros(num_features, num_features))
        self.register_buffer("target", torch.zeros(num_features))

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Values `(N,)` of features `(N, D)`, of several batches; zero before the first update."""
        size = self.gram.diagonal().mean().clamp_min(1e-12)
        ridge = torch.eye(len(self.gram), device=self.gram.device) * (_RIDGE * size)
        with torch.autocast(self.gram.device.type, enabled=False):
            weight = torch.linalg.solve(self.gram + ridge, self.target)
            return [part @ weight for part in features]

    def update(self, gram: torch.Tensor, target: torch.Tensor) -> None:
        """Forget a little, and add the sums x x' and x times return of one step, over all ranks."""
        self.gram.mul_(_DECAY).add_(gram)
        self.target.mul_(_DECAY).add_(target)


@torch.no_grad()
def later_advantages(
    tokens: list[TokenBatch], args: Any, accelerator: Any, state_value: StateValue | None = None
) -> list[torch.Tensor]:
    r"""
    Later costs of each token of a rollout, less a baseline that does not depend on the token.

    Args:
        tokens (`list[TokenBatch]`):
            All micro-batches of this rank's optimizer step.
        args ([`AMMConfig`]):
            Configuration with the `later_*` fields.
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's accelerator, to sum over ranks.
        state_value ([`StateValue`], *optional*):
            Baseline. By default the mean at the same position over the other rollouts of the step, on all ranks.

    Returns:
        `list[torch.Tensor]`: per micro-batch `(N,)`, in the units of the cost; zero for off-policy tokens, and where
        no other rollout is as long.
    """
    rollouts = [batch.of_source(on_policy=True) for batch in tokens]
    measured = [_measure(batch, args) for batch in rollouts]
    pairs = list(zip(rollouts, measured, strict=True))
    returns = [_along_rollouts(values["cost"], batch, args.later_gamma) for batch, values in pairs]
    if state_value is None:
        found = less_position_means(returns, [batch.positions for batch in rollouts], accelerator)
    else:
        features = [_state_features(*pair, args) for pair in pairs]
        found = [
            _generalised(values["cost"], expected, batch, args.later_gamma)
            for (batch, values), expected in zip(pairs, state_value(features), strict=True)
        ]
        x, g = torch.cat(features), torch.cat(returns).to(features[0].dtype)
        with torch.autocast(x.device.type, enabled=False):
            sums = x.T @ x, x.T @ g
        state_value.update(*(sum_over_ranks(part, accelerator) for part in sums))
    return [
        torch.zeros(len(batch.labels), dtype=part.dtype, device=part.device).masked_scatter(batch.is_on_policy, part)
        for batch, part in zip(tokens, found, strict=True)
    ]


def _measure(batch: TokenBatch, args: Any) -> dict[str, torch.Tensor]:
    cost, factor = COSTS[args.later_cost]
    terms = {"cost": Term(cost)}
    if args.later_baseline == "value":
        terms |= {"student": Term(entropy, ("student",)), "teacher": Term(entropy, ("teacher",))}
    values = linear_loss(batch.pairs, terms, chunk_size=args.loss_chunk_size).values
    return values | {"cost": factor * values["cost"]}


def _along_rollouts(values: torch.Tensor, batch: TokenBatch, gamma: float) -> torch.Tensor:
    """`later_returns` of flat per-token values, whose rollouts begin where the position is 0."""
    if not len(values):
        return values
    row = (batch.positions == 0).cumsum(0) - 1
    grid = torch.zeros(int(row[-1]) + 1, int(batch.positions.max()) + 1, dtype=values.dtype, device=values.device)
    mask = grid.bool()
    grid[row, batch.positions], mask[row, batch.positions] = values, True
    return later_returns(grid, mask, gamma)[row, batch.positions]


def _state_features(batch: TokenBatch, measured: dict[str, torch.Tensor], args: Any) -> torch.Tensor:
    """Known before the token is drawn: teacher and student states, position, cost and entropies of the state, 1."""
    states = critic_features(*(batch.pairs[name][0] for name in ("teacher", "student")))
    scalars = [batch.positions / args.max_completion_length, *measured.values(), torch.ones_like(measured["cost"])]
    return torch.cat([states, torch.stack(scalars, dim=1).to(states.dtype)], dim=1)


def _generalised(costs: torch.Tensor, values: torch.Tensor, batch: TokenBatch, gamma: float) -> torch.Tensor:
    """Generalised advantages of the later costs: sum_k (gamma lambda)^k delta_{t+k}."""
    values = values.to(costs.dtype)
    # gamma (c_{t+1} + V_{t+1}); nothing follows the last token
    follows = torch.zeros_like(costs)
    follows[:-1] = torch.where(batch.positions[1:] > 0, costs[1:] + values[1:], 0.0)
    deltas = gamma * follows - values
    return deltas + _along_rollouts(deltas, batch, gamma * _LAMBDA)

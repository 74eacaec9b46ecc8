"""Returns of rewards and values, on grids: a row is a completion, `mask (B, T)` is true for its tokens, from column 0.

Nothing is detached. All compute in at least float32.
"""

import torch

from trl_kd.losses.action_sets import wide


def next_values(values: torch.Tensor, mask: torch.Tensor, last_values: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    Value of the state after each token.

    Args:
        values (`torch.Tensor` of shape `(B, T)`):
            Value V(s_t) of the state before each token.
        mask (`torch.Tensor` of shape `(B, T)`):
            True for the tokens of a completion.
        last_values (`torch.Tensor` of shape `(B,)`, *optional*):
            Value after the last token of each completion. 0 by default: nothing follows an EOS.

    Returns:
        `torch.Tensor` of shape `(B, T)`: V(s_{t+1}); 0 where `mask` is false.

    Examples:

    ```python
    >>> next_values(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[True, True, False]]), torch.tensor([8.0]))
    tensor([[2., 8., 0.]])
    ```
    """
    last = torch.zeros_like(values[:, 0]) if last_values is None else last_values
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    after = torch.where(_is_last(mask), last.unsqueeze(1), after)
    return torch.where(mask, after, 0.0)


def _is_last(mask: torch.Tensor) -> torch.Tensor:
    """The last token of each row."""
    follows = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    return mask & ~follows


def one_step_returns(rewards: torch.Tensor, v_tp1: torch.Tensor, mask: torch.Tensor, gamma: float) -> torch.Tensor:
    r"""
    r_t + gamma V(s_{t+1}).

    Args:
        rewards (`torch.Tensor` of shape `(B, T)`):
            Reward of each token.
        v_tp1 (`torch.Tensor` of shape `(B, T)`):
            Value of the state after it, as [`next_values`] gives it.
        mask (`torch.Tensor` of shape `(B, T)`):
            True for the tokens of a completion.
        gamma (`float`):
            Discount in [0, 1].

    Returns:
        `torch.Tensor` of shape `(B, T)`: 0 where `mask` is false.

    Raises:
        ValueError: If `gamma` lies outside of [0, 1].

    Examples:

    ```python
    >>> one_step_returns(torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 0.0]]), torch.ones(1, 2).bool(), 0.5)
    tensor([[3., 2.]])
    ```
    """
    check_share("gamma", gamma, "discounts what follows")
    return torch.where(mask, wide(rewards) + gamma * wide(v_tp1), 0.0)


def check_share(name: str, value: float, meaning: str) -> None:
    """Refuse a number outside of [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"`{name}` is {value}, but it {meaning}. Set it in [0, 1].")


def n_step_returns(
    rewards: torch.Tensor, v_tp1: torch.Tensor, mask: torch.Tensor, gamma: float, n: int
) -> torch.Tensor:
    r"""
    Rewards of `n` tokens and the value after them: sum_{k<m} gamma^k r_{t+k} + gamma^m V(s_{t+m}).

    Args:
        rewards (`torch.Tensor` of shape `(B, T)`):
            Reward of each token.
        v_tp1 (`torch.Tensor` of shape `(B, T)`):
            Value of the state after it, as [`next_values`] gives it.
        mask (`torch.Tensor` of shape `(B, T)`):
            True for the tokens of a completion.
        gamma (`float`):
            Discount in [0, 1].
        n (`int`):
            Number of tokens; m is the number of those that are left, if there are fewer.

    Returns:
        `torch.Tensor` of shape `(B, T)`: 0 where `mask` is false.

    Raises:
        ValueError: If `gamma` lies outside of [0, 1], or `n` is less than 1.

    Examples:

    ```python
    >>> rewards, v_tp1 = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[8.0, 8.0, 8.0]])
    >>> n_step_returns(rewards, v_tp1, torch.ones(1, 3).bool(), 0.5, n=2)  # 1 + 1 + 2, 2 + 2 + 2, 4 + 4
    tensor([[4., 6., 8.]])
    ```
    """
    check_share("gamma", gamma, "discounts what follows")
    if n < 1:
        raise ValueError(f"`n` is {n}, but it is a number of tokens. Set it to 1 or more.")
    rewards, v_tp1 = wide(rewards), wide(v_tp1)
    step = torch.arange(mask.shape[1], device=mask.device)
    sums = _discounted(torch.where(mask, rewards, 0.0), gamma, horizon=n)
    last = (mask.sum(dim=1, keepdim=True) - 1).clamp_min(0)
    end = torch.minimum(step + n - 1, last).clamp_min(step.new_zeros(()))  # (B, T): the token before V(s_{t+m})
    taken = (end - step + 1).clamp_min(0)
    discount = torch.pow(torch.tensor(gamma, dtype=torch.float64, device=mask.device), taken).to(rewards.dtype)
    return torch.where(mask, sums + discount * v_tp1.gather(1, end), 0.0)


def lambda_returns(
    rewards: torch.Tensor, v_tp1: torch.Tensor, mask: torch.Tensor, gamma: float, lambda_: float
) -> torch.Tensor:
    r"""
    G_t = r_t + gamma ((1 - lambda) V(s_{t+1}) + lambda G_{t+1}), and r_t + gamma V(s_{t+1}) at the last token.

    Args:
        rewards (`torch.Tensor` of shape `(B, T)`):
            Reward of each token.
        v_tp1 (`torch.Tensor` of shape `(B, T)`):
            Value of the state after it, as [`next_values`] gives it.
        mask (`torch.Tensor` of shape `(B, T)`):
            True for the tokens of a completion.
        gamma (`float`):
            Discount in [0, 1].
        lambda_ (`float`):
            Share of what was seen, in [0, 1]: 0 is one step, 1 takes all rewards to the end (Monte Carlo).

    Returns:
        `torch.Tensor` of shape `(B, T)`: 0 where `mask` is false.

    Raises:
        ValueError: If `gamma` or `lambda_` lies outside of [0, 1].

    Examples:

    ```python
    >>> rewards, v_tp1 = torch.tensor([[1.0, 2.0]]), torch.tensor([[8.0, 4.0]])
    >>> lambda_returns(rewards, v_tp1, torch.ones(1, 2).bool(), 0.5, 0.5)  # 1 + 0.5 (4 + 2), 2 + 2
    tensor([[4., 4.]])
    ```
    """
    check_share("gamma", gamma, "discounts what follows")
    check_share("lambda_", lambda_, "is a share of what was seen")
    rewards, v_tp1 = wide(rewards), wide(v_tp1)
    share = 1.0 - lambda_ * (~_is_last(mask)).to(rewards.dtype)
    return torch.where(
        mask, _discounted(torch.where(mask, rewards + gamma * share * v_tp1, 0.0), gamma * lambda_), 0.0
    )


def monte_carlo_returns(rewards: torch.Tensor, v_tp1: torch.Tensor, mask: torch.Tensor, gamma: float) -> torch.Tensor:
    r"""
    Discounted rewards to the end of the completion, and the value after it.

    Args:
        rewards (`torch.Tensor` of shape `(B, T)`):
            Reward of each token.
        v_tp1 (`torch.Tensor` of shape `(B, T)`):
            Value of the state after it, as [`next_values`] gives it; only that after the last token counts.
        mask (`torch.Tensor` of shape `(B, T)`):
            True for the tokens of a completion.
        gamma (`float`):
            Discount in [0, 1].

    Returns:
        `torch.Tensor` of shape `(B, T)`: 0 where `mask` is false.

    Raises:
        ValueError: If `gamma` lies outside of [0, 1].

    Examples:

    ```python
    >>> rewards, v_tp1 = torch.tensor([[1.0, 2.0]]), torch.tensor([[8.0, 4.0]])
    >>> monte_carlo_returns(rewards, v_tp1, torch.ones(1, 2).bool(), 0.5)  # 1 + 0.5 * 4, 2 + 2
    tensor([[3., 4.]])
    ```
    """
    return lambda_returns(rewards, v_tp1, mask, gamma, 1.0)


def _discounted(values: torch.Tensor, factor: float, horizon: int | None = None) -> torch.Tensor:
    """sum_k factor^k x_{t+k} of each row, over `horizon` tokens or to the end; in steps that double."""
    length = values.shape[1]
    horizon = length if horizon is None else min(horizon, length)
    total, done, block, size = torch.zeros_like(values), 0, values, 1
    while done < horizon:
        # `total` has the first `done` terms, `block` those of the next `size` from any token on
        if horizon & size:
            total = total + factor**done * _ahead(block, done)
            done += size
        block = block + factor**size * _ahead(block, size)
        size *= 2
    return total


def _ahead(values: torch.Tensor, steps: int) -> torch.Tensor:
    """Each row's values so many tokens later; 0 after its end."""
    return torch.cat([values[:, steps:], torch.zeros_like(values[:, :steps])], dim=1)

r"""Temporal-difference imitation on the teacher's most likely tokens: action sets, gauges, backups, returns, losses.

After [Language Model Distillation: A Temporal Difference Imitation Learning
Perspective](https://huggingface.co/papers/2505.20335) ("the paper" below): the student's logits are soft Q-values
Q(s, a) of the next token a after the text s; only the actions of a small set A(s) of the teacher's are looked at; what
follows a token is the soft value V(s') of the text with it. Any temporal-difference method of imitation can be run on
such a set: mask Q, and renormalise the policy that backups use. Each function here is one such part; a method is a
choice of each.

The teacher's tokens of N states are `ids` and `log_probs`, both `(N, K)`, as `top_tokens` gives them: most likely
first, log-probabilities over the whole vocabulary, `-inf` where there is none. A set is a mask `(N, K)` over them.
Nothing reduces over tokens, and nothing is detached unless it says so. All compute in at least float32.
"""

import torch


def _wide(x: torch.Tensor) -> torch.Tensor:
    """In float32, or in float64."""
    return x if x.dtype == torch.float64 else x.float()


# Action sets


def full_set(log_probs: torch.Tensor) -> torch.Tensor:
    r"""
    All of the teacher's tokens that are there.

    Args:
        log_probs (`torch.Tensor` of shape `(N, K)`):
            The teacher's tokens, sorted.

    Returns:
        `torch.Tensor` of shape `(N, K)`: a mask.

    Examples:

    ```python
    >>> full_set(torch.tensor([[0.6, 0.3, 0.0]]).log())
    tensor([[ True,  True, False]])
    ```
    """
    return log_probs > float("-inf")


def top_p_set(log_probs: torch.Tensor, p: float) -> torch.Tensor:
    r"""
    The shortest prefix of the teacher's tokens that holds the mass `p`: A_p(s) of the paper.

    The nucleus of sampling with `top_p`. Where all K tokens together hold less, all of them.

    Args:
        log_probs (`torch.Tensor` of shape `(N, K)`):
            The teacher's tokens, sorted.
        p (`float`):
            Mass in (0, 1].

    Returns:
        `torch.Tensor` of shape `(N, K)`: a mask.

    Raises:
        ValueError: If `p` is no mass.

    Examples:

    ```python
    >>> top_p_set(torch.tensor([[0.6, 0.3, 0.1]]).log(), 0.8)
    tensor([[ True,  True, False]])
    ```
    """
    check_mass("p", p)
    if p == 1.0:  # a rounded sum may be there before the last token
        return full_set(log_probs)
    probs = _wide(log_probs).exp()
    before = probs.cumsum(dim=1) - probs
    return full_set(log_probs) & (before < p)


def check_mass(name: str, p: float) -> None:
    """Refuse what is no mass of probability."""
    if not 0.0 < p <= 1.0:
        raise ValueError(f"`{name}` is {p}, but it is a probability mass. Set it in (0, 1].")


def top_k_set(log_probs: torch.Tensor, k: int) -> torch.Tensor:
    r"""
    The teacher's `k` most likely tokens.

    Args:
        log_probs (`torch.Tensor` of shape `(N, K)`):
            The teacher's tokens, sorted.
        k (`int`):
            Number of tokens, at least 1.

    Returns:
        `torch.Tensor` of shape `(N, K)`: a mask.

    Raises:
        ValueError: If `k` is less than 1.

    Examples:

    ```python
    >>> top_k_set(torch.tensor([[0.6, 0.3, 0.1]]).log(), 1)
    tensor([[ True, False, False]])
    ```
    """
    if k < 1:
        raise ValueError(f"`k` is {k}, but it is a number of tokens. Set it to 1 or more.")
    return full_set(log_probs) & (torch.arange(log_probs.shape[1], device=log_probs.device) < k)


def min_p_set(log_probs: torch.Tensor, min_p: float) -> torch.Tensor:
    r"""
    The tokens that have at least the share `min_p` of the probability of the most likely one.

    Args:
        log_probs (`torch.Tensor` of shape `(N, K)`):
            The teacher's tokens, sorted.
        min_p (`float`):
            Share in (0, 1].

    Returns:
        `torch.Tensor` of shape `(N, K)`: a mask.

    Raises:
        ValueError: If `min_p` lies outside of (0, 1].

    Examples:

    ```python
    >>> min_p_set(torch.tensor([[0.6, 0.3, 0.1]]).log(), 0.4)
    tensor([[ True,  True, False]])
    ```
    """
    check_mass("min_p", min_p)
    return full_set(log_probs) & (log_probs.exp() >= min_p * log_probs[:, :1].exp())


def threshold_set(log_probs: torch.Tensor, threshold: float) -> torch.Tensor:
    r"""
    The tokens of at least the probability `threshold`, and the most likely one in any case.

    Args:
        log_probs (`torch.Tensor` of shape `(N, K)`):
            The teacher's tokens, sorted.
        threshold (`float`):
            Probability in (0, 1].

    Returns:
        `torch.Tensor` of shape `(N, K)`: a mask.

    Raises:
        ValueError: If `threshold` lies outside of (0, 1].

    Examples:

    ```python
    >>> threshold_set(torch.tensor([[0.6, 0.3, 0.1]]).log(), 0.25)
    tensor([[ True,  True, False]])
    ```
    """
    check_mass("threshold", threshold)
    is_first = torch.arange(log_probs.shape[1], device=log_probs.device) == 0
    return full_set(log_probs) & ((log_probs.exp() >= threshold) | is_first)


def contains(ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    r"""
    Whether the token of the data is in the set.

    Args:
        ids (`torch.Tensor` of shape `(N, K)`):
            The teacher's tokens.
        mask (`torch.Tensor` of shape `(N, K)`):
            The set.
        labels (`torch.Tensor` of shape `(N,)`):
            Tokens of the data.

    Returns:
        `torch.Tensor` of shape `(N,)`, bool.

    Examples:

    ```python
    >>> contains(torch.tensor([[5, 7], [5, 7]]), torch.tensor([[True, False]] * 2), torch.tensor([5, 7]))
    tensor([ True, False])
    ```
    """
    return ((ids == labels.unsqueeze(1)) & mask).any(dim=1)


def union_with_label(ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The set with the token of the data, in one column more, which is used where the set has not got it.

    Args:
        ids (`torch.Tensor` of shape `(N, K)`):
            The teacher's tokens.
        mask (`torch.Tensor` of shape `(N, K)`):
            The set.
        labels (`torch.Tensor` of shape `(N,)`):
            Tokens of the data.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]` of shapes `(N, K + 1)`: ids and mask.

    Examples:

    ```python
    >>> union_with_label(torch.tensor([[5, 7]]), torch.tensor([[True, False]]), torch.tensor([7]))
    (tensor([[5, 7, 7]]), tensor([[ True, False,  True]]))
    ```
    """
    is_missing = ~contains(ids, mask, labels)
    column = labels.unsqueeze(1)
    return torch.cat([ids, column], dim=1), torch.cat([mask, is_missing.unsqueeze(1)], dim=1)


# Gauges


def gauged(
    logits: torch.Tensor,
    gauge: str = "raw",
    maximum: torch.Tensor | None = None,
    log_normaliser: torch.Tensor | None = None,
    clip_min: float | None = None,
) -> torch.Tensor:
    r"""
    Q-values of logits. A policy says its Q-values up to a number per state; the gauge chooses that number.

    Note:
        The paper and the authors' code take `"max"` and clip at -10. A clipped value has no gradient.

    Args:
        logits (`torch.Tensor` of shape `(N, K)`):
            The student's logits of the tokens.
        gauge (`str`, *optional*, defaults to `"raw"`):
            `"raw"`: the logits. `"max"`: less the largest logit of the whole vocabulary. `"logsoftmax"`: less the log
            normaliser of the whole vocabulary, so that Q is the log-probability.
        maximum (`torch.Tensor` of shape `(N,)`, *optional*):
            Largest logit, for `"max"`.
        log_normaliser (`torch.Tensor` of shape `(N,)`, *optional*):
            Log-sum-exp of all logits, for `"logsoftmax"`.
        clip_min (`float`, *optional*):
            Smallest Q-value.

    Returns:
        `torch.Tensor` of shape `(N, K)`.

    Raises:
        ValueError: If the gauge is unknown, or what it subtracts is not given.

    Examples:

    ```python
    >>> gauged(torch.tensor([[3.0, -20.0]]), "max", maximum=torch.tensor([4.0]), clip_min=-10.0)
    tensor([[ -1., -10.]])
    ```
    """
    subtracted = {"raw": None, "max": maximum, "logsoftmax": log_normaliser}
    if gauge not in subtracted:
        raise ValueError(f"`gauge` is '{gauge}', which does not exist. Choose one of 'raw', 'max', 'logsoftmax'.")
    logits = _wide(logits)
    if gauge != "raw":
        offset = subtracted[gauge]
        if offset is None:
            name = "maximum" if gauge == "max" else "log_normaliser"
            raise ValueError(
                f"`gauge` is '{gauge}', but `{name}` is None. The set alone does not say it. Pass it, over the whole "
                "vocabulary."
            )
        logits = logits - offset.unsqueeze(1)
    return logits if clip_min is None else logits.clamp_min(clip_min)


# Backups


def log_policy(q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""
    Log of the projected policy: exp(Q), renormalised on the set. proj_p of the paper.

    Args:
        q (`torch.Tensor` of shape `(N, K)`):
            Q-values, or log-probabilities of any model.
        mask (`torch.Tensor` of shape `(N, K)`):
            The set.

    Returns:
        `torch.Tensor` of shape `(N, K)`: `-inf` outside of the set.

    Examples:

    ```python
    >>> log_policy(torch.tensor([[0.6, 0.2, 0.2]]).log(), torch.tensor([[True, True, False]])).exp()
    tensor([[0.7500, 0.2500, 0.0000]])
    ```
    """
    return _wide(q).masked_fill(~mask, float("-inf")).log_softmax(dim=1)


def soft_value(q: torch.Tensor, mask: torch.Tensor, entropy_weight: float = 1.0) -> torch.Tensor:
    r"""
    Soft value of a state: tau log sum_a exp(Q(s, a) / tau) over the set.

    With weight 1, the V of the paper: the expected Q of the projected policy, and its entropy.

    Args:
        q (`torch.Tensor` of shape `(N, K)`):
            Q-values.
        mask (`torch.Tensor` of shape `(N, K)`):
            The set.
        entropy_weight (`float`, *optional*, defaults to `1.0`):
            tau, above 0.

    Returns:
        `torch.Tensor` of shape `(N,)`.

    Raises:
        ValueError: If `entropy_weight` is not positive.

    Examples:

    ```python
    >>> soft_value(torch.tensor([[0.0, 0.0, 9.0]]), torch.tensor([[True, True, False]]))  # ln 2
    tensor([0.6931])
    ```
    """
    if not entropy_weight > 0.0:
        raise ValueError(
            f"`entropy_weight` is {entropy_weight}, but Q-values are divided by it. Set it above 0, or take "
            "`hard_value`."
        )
    return entropy_weight * (_wide(q).masked_fill(~mask, float("-inf")) / entropy_weight).logsumexp(dim=1)


def hard_value(q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""
    Value of a state without entropy: the largest Q of the set.

    Args:
        q (`torch.Tensor` of shape `(N, K)`):
            Q-values.
        mask (`torch.Tensor` of shape `(N, K)`):
            The set.

    Returns:
        `torch.Tensor` of shape `(N,)`.

    Examples:

    ```python
    >>> hard_value(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[True, True, False]]))
    tensor([2.])
    ```
    """
    return _wide(q).masked_fill(~mask, float("-inf")).amax(dim=1)


def expected_value(
    q: torch.Tensor, mask: torch.Tensor, policy: torch.Tensor, entropy_weight: float = 0.0
) -> torch.Tensor:
    r"""
    Value of a state under a policy: sum_a pi(a) (Q(s, a) - tau log pi(a)) over the set.

    Args:
        q (`torch.Tensor` of shape `(N, K)`):
            Q-values.
        mask (`torch.Tensor` of shape `(N, K)`):
            The set.
        policy (`torch.Tensor` of shape `(N, K)`):
            Log-probabilities or Q-values of the policy, such as the teacher's; renormalised on the set here.
        entropy_weight (`float`, *optional*, defaults to `0.0`):
            tau.

    Returns:
        `torch.Tensor` of shape `(N,)`.

    Examples:

    ```python
    >>> policy = torch.tensor([[0.6, 0.2, 0.2]]).log()
    >>> expected_value(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[True, True, False]]), policy)
    tensor([1.2500])
    ```
    """
    log_pi = log_policy(policy, mask)
    # Filled before anything is multiplied: 0 * inf is no number
    is_taken = log_pi > float("-inf")
    log_pi, q = log_pi.masked_fill(~is_taken, 0.0), _wide(q).masked_fill(~is_taken, 0.0)
    return torch.where(is_taken, log_pi.exp() * (q - entropy_weight * log_pi), 0.0).sum(dim=1)


# Returns, on grids: a row is a completion, `mask (B, T)` is true for its tokens, which begin at column 0


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
    return torch.where(mask, _wide(rewards) + gamma * _wide(v_tp1), 0.0)


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
    rewards, v_tp1 = _wide(rewards), _wide(v_tp1)
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
    rewards, v_tp1 = _wide(rewards), _wide(v_tp1)
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


# Losses


def implied_reward(q_t: torch.Tensor, v_tp1: torch.Tensor, gamma: float) -> torch.Tensor:
    r"""
    The reward under which Q is optimal: r(s, a) = Q(s, a) - gamma V(s'), the inverse soft Bellman operator.

    Of the teacher's logits, the reward that the teacher itself implies.

    Args:
        q_t (`torch.Tensor` of shape `(...)`):
            Q-value of each token of the data.
        v_tp1 (`torch.Tensor` of shape `(...)`):
            Value of the state after it, as [`next_values`] gives it.
        gamma (`float`):
            Discount in [0, 1].

    Returns:
        `torch.Tensor` of shape `(...)`.

    Raises:
        ValueError: If `gamma` lies outside of [0, 1].

    Examples:

    ```python
    >>> implied_reward(torch.tensor([3.0]), torch.tensor([2.0]), 0.5)
    tensor([2.])
    ```
    """
    check_share("gamma", gamma, "discounts what follows")
    return _wide(q_t) - gamma * _wide(v_tp1)


def chi2_penalty(implied: torch.Tensor, chi2_alpha: float, center: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    Chi-square regularisation of the implied reward: (r - c)^2 / (4 alpha).

    Note:
        The paper has c = 0. Around the teacher's own implied reward it does not pull to higher entropy (ours).

    Args:
        implied (`torch.Tensor` of shape `(...)`):
            Implied reward, or a return of it.
        chi2_alpha (`float`):
            alpha, above 0; 0.1 in the paper.
        center (`torch.Tensor` of shape `(...)`, *optional*):
            c; 0 by default.

    Returns:
        `torch.Tensor` of shape `(...)`.

    Raises:
        ValueError: If `chi2_alpha` is not positive.

    Examples:

    ```python
    >>> chi2_penalty(torch.tensor([2.0]), 0.5)
    tensor([2.])
    ```
    """
    if not chi2_alpha > 0.0:
        raise ValueError(
            f"`chi2_alpha` is {chi2_alpha}, but the penalty is divided by it. Set it above 0, or to None for none."
        )
    implied = _wide(implied)
    return (implied if center is None else implied - center).square() / (4.0 * chi2_alpha)


def inverse_soft_q(
    q_t: torch.Tensor,
    v_t: torch.Tensor,
    v_tp1: torch.Tensor,
    gamma: float,
    chi2_alpha: float | None = None,
    implied: torch.Tensor | None = None,
    center: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Inverse soft-Q learning on the teacher's text: minus phi(r) of the implied reward r, plus V(s) - gamma V(s').

    The objective of the paper, negated: phi(x) = x - x^2 / (4 alpha), or x without chi-square. Then the values of the
    next state cancel, and the loss is V(s) - Q(s, a), the negative log-likelihood of the token under the policy
    projected on the set, which holds no temporal difference.

    Args:
        q_t (`torch.Tensor` of shape `(...)`):
            Q-value of each token of the data.
        v_t (`torch.Tensor` of shape `(...)`):
            Soft value of the state before it.
        v_tp1 (`torch.Tensor` of shape `(...)`):
            Value of the state after it, as [`next_values`] gives it.
        gamma (`float`):
            Discount in [0, 1].
        chi2_alpha (`float`, *optional*):
            alpha of the chi-square regularisation; `None` for none.
        implied (`torch.Tensor` of shape `(...)`, *optional*):
            What the regularisation takes in place of r: an n-step or lambda return of implied rewards.
        center (`torch.Tensor` of shape `(...)`, *optional*):
            What it is centred on, such as the teacher's own.

    Returns:
        `torch.Tensor` of shape `(...)`.

    Raises:
        ValueError: If `gamma` lies outside of [0, 1], or `chi2_alpha` is not positive.

    Examples:

    ```python
    >>> q_t, v_t, v_tp1 = torch.tensor([1.0]), torch.tensor([1.5]), torch.tensor([2.0])
    >>> inverse_soft_q(q_t, v_t, v_tp1, 0.9)  # 1.5 - 1
    tensor([0.5000])
    >>> inverse_soft_q(q_t, v_t, v_tp1, 0.9, chi2_alpha=0.1)  # + (1 - 1.8)^2 / 0.4
    tensor([2.1000])
    ```
    """
    reward = implied_reward(q_t, v_tp1, gamma)
    loss = (_wide(v_t) - gamma * _wide(v_tp1)) - reward
    if chi2_alpha is None:
        return loss
    return loss + chi2_penalty(reward if implied is None else implied, chi2_alpha, center)


def expected_inverse_soft_q(
    q: torch.Tensor, mask: torch.Tensor, teacher_log_probs: torch.Tensor, v_t: torch.Tensor
) -> torch.Tensor:
    r"""
    [`inverse_soft_q`] with its first term in expectation over the teacher's set instead of at one token of it.

    V(s) - sum_a p'(a) Q(s, a), p' the teacher renormalised on the set: the cross-entropy of both projected policies.

    Note:
        Ours, possible since the teacher can be asked: the paper has the token of the data, whose expectation this is,
        without its noise. It holds no temporal difference.

    Args:
        q (`torch.Tensor` of shape `(N, K)`):
            Q-values.
        mask (`torch.Tensor` of shape `(N, K)`):
            The set.
        teacher_log_probs (`torch.Tensor` of shape `(N, K)`):
            The teacher's log-probabilities; renormalised here, and detached.
        v_t (`torch.Tensor` of shape `(N,)`):
            Soft value of the state.

    Returns:
        `torch.Tensor` of shape `(N,)`.

    Examples:

    ```python
    >>> q, mask = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[True, True, False]])
    >>> teacher = torch.tensor([[0.6, 0.2, 0.2]]).log()
    >>> expected_inverse_soft_q(q, mask, teacher, soft_value(q, mask))  # ln(e + e^2) - 1.25
    tensor([1.0633])
    ```
    """
    return v_t - expected_value(q, mask, teacher_log_probs.detach().to(_wide(q).dtype))


def soft_q_regression(q_t: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    r"""
    Squared temporal-difference error (Q(s, a) - G)^2 of a return G of given rewards.

    With [`sqil_reward`] it is soft-Q imitation learning (SQIL), with [`implied_reward`] of the teacher's own values
    the imitation of its reward.

    Args:
        q_t (`torch.Tensor` of shape `(...)`):
            Q-value of each token of the data.
        target (`torch.Tensor` of shape `(...)`):
            The return. Detach it for a semi-gradient; its gradient is used here.

    Returns:
        `torch.Tensor` of shape `(...)`.

    Examples:

    ```python
    >>> soft_q_regression(torch.tensor([3.0]), torch.tensor([1.0]))
    tensor([4.])
    ```
    """
    return (_wide(q_t) - _wide(target)).square()


def path_consistency(returns: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
    r"""
    Half the squared inconsistency of a path: (R_t - b_t)^2 / 2, R_t a return of log pi(y|s) - log pi*(y|s).

    Multi-step soft consistency of [Path Consistency Learning](https://huggingface.co/papers/1702.08892), with the
    teacher's log-probability as reward and the entropy weight 1: along any path, the discounted rewards less the
    student's log-probabilities are the value of its first state. The student that agrees with its teacher has R = 0.
    On the student's own text, to its end and without discount, the gradient is that of the Kullback-Leibler divergence
    of whole texts, later states included.

    Note:
        The paper learns the value; here it is what other texts got at the same place (ours).

    Args:
        returns (`torch.Tensor` of shape `(...)`):
            R_t, an n-step, lambda or Monte Carlo return of the log-ratios. Its gradient is used: it is not a target.
        center (`torch.Tensor` of shape `(...)`):
            b_t, what was to be expected; detached.

    Returns:
        `torch.Tensor` of shape `(...)`.

    Examples:

    ```python
    >>> path_consistency(torch.tensor([3.0]), torch.tensor([1.0]))
    tensor([2.])
    ```
    """
    return 0.5 * (returns - center.detach()).square()


def sqil_reward(is_on_policy: torch.Tensor) -> torch.Tensor:
    r"""
    Reward of soft-Q imitation learning ([SQIL](https://huggingface.co/papers/1905.11108)): 1 on the teacher's text, 0
    on the student's own.

    Args:
        is_on_policy (`torch.Tensor` of shape `(...)`):
            Whether the student wrote the token.

    Returns:
        `torch.Tensor` of shape `(...)`, float32.

    Examples:

    ```python
    >>> sqil_reward(torch.tensor([False, True]))
    tensor([1., 0.])
    ```
    """
    return (~is_on_policy).float()


def large_margin(
    q: torch.Tensor, mask: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor, margin: float
) -> torch.Tensor:
    r"""
    Large-margin imitation on the set: max_a [Q(s, a) + margin 1(a is not the data's)] - Q(s, the data's).

    The supervised term of deep Q-learning from demonstrations ([DQfD](https://huggingface.co/papers/1704.03732)), its
    maximum over the set.

    Args:
        q (`torch.Tensor` of shape `(N, K)`):
            Q-values.
        mask (`torch.Tensor` of shape `(N, K)`):
            The set.
        ids (`torch.Tensor` of shape `(N, K)`):
            Its tokens.
        labels (`torch.Tensor` of shape `(N,)`):
            Tokens of the data. Where one is not in the set, the loss is 0.
        margin (`float`):
            By how much the data's token has to be ahead, at least 0.

    Returns:
        `torch.Tensor` of shape `(N,)`: non-negative.

    Raises:
        ValueError: If `margin` is negative.

    Examples:

    ```python
    >>> q, mask, ids = torch.tensor([[1.0, 2.0]]), torch.ones(1, 2).bool(), torch.tensor([[5, 7]])
    >>> large_margin(q, mask, ids, torch.tensor([5]), margin=0.5)  # 2 + 0.5 - 1
    tensor([1.5000])
    ```
    """
    if not margin >= 0.0:
        raise ValueError(f"`margin` is {margin}, but it is a distance of Q-values. Set it to 0 or more.")
    q, is_label = _wide(q), (ids == labels.unsqueeze(1)) & mask
    best = hard_value(q + margin * (~is_label).to(q.dtype), mask)
    own = torch.where(is_label, q, 0.0).sum(dim=1)
    return torch.where(is_label.any(dim=1), best - own, 0.0)


def soft_actor_critic(
    q: torch.Tensor, mask: torch.Tensor, action_values: torch.Tensor, entropy_weight: float = 1.0
) -> torch.Tensor:
    r"""
    Policy improvement of soft actor-critic on the set: KL(projected policy || softmax(values / tau)).

    Policy step of [SAC](https://huggingface.co/papers/1801.01290), with the expectation over the actions of the set
    exact.

    Args:
        q (`torch.Tensor` of shape `(N, K)`):
            The student's Q-values, as logits of its policy.
        mask (`torch.Tensor` of shape `(N, K)`):
            The set.
        action_values (`torch.Tensor` of shape `(N, K)`):
            The critic's values of the actions; detached.
        entropy_weight (`float`, *optional*, defaults to `1.0`):
            tau, above 0.

    Returns:
        `torch.Tensor` of shape `(N,)`: non-negative.

    Raises:
        ValueError: If `entropy_weight` is not positive.

    Examples:

    ```python
    >>> q, values = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> soft_actor_critic(q, torch.ones(1, 2).bool(), values)  # 0.5 ln(4/3)
    tensor([0.1438])
    ```
    """
    if not entropy_weight > 0.0:
        raise ValueError(f"`entropy_weight` is {entropy_weight}, but values are divided by it. Set it above 0.")
    wanted = log_policy(_wide(action_values.detach()) / entropy_weight, mask).masked_fill(~mask, 0.0)
    own = log_policy(q, mask).masked_fill(~mask, 0.0)
    return torch.where(mask, own.exp() * (own - wanted), 0.0).sum(dim=1)


def set_tail(log_mass: torch.Tensor) -> torch.Tensor:
    r"""
    Tail term: -log of the student's mass on the set, in nats.

    Note:
        Ours. A loss whose normaliser is the set says nothing of the tokens outside of it, and their mass grows.

    Args:
        log_mass (`torch.Tensor` of shape `(...)`):
            log sum_{a in A(s)} pi(a | s), at most 0.

    Returns:
        `torch.Tensor` of shape `(...)`: non-negative.

    Examples:

    ```python
    >>> set_tail(torch.tensor([0.5]).log())
    tensor([0.6931])
    ```
    """
    return -_wide(log_mass)


def released(
    q: torch.Tensor,
    mask: torch.Tensor,
    v_t: torch.Tensor,
    v_tp1: torch.Tensor,
    gamma: float,
    vocab_size: int,
    chi2_alpha: float | None = 0.1,
) -> torch.Tensor:
    r"""
    What the authors' released code computes in place of the paper's objective.

    -mean_a r(s, a) + (V(s) - gamma V(s')) + mean_a r(s, a)^2 / (4 alpha), with r(s, a) = Q(s, a) - gamma V(s') on the
    set and -gamma V(s') outside.

    Note:
        The mean is over the whole vocabulary: the token of the data is not in it, and the part of Q is scaled by
        K / V. It does not recover the teacher; kept to reproduce. That code adds an epsilon to the projected policy
        and does not give its value; this is the limit at 0. Source: the authors' repository,
        TobyLeelsz/Bellman-Distillation.

    Args:
        q (`torch.Tensor` of shape `(N, K)`):
            Q-values, in their case in the gauge `"max"`, clipped at -10.
        mask (`torch.Tensor` of shape `(N, K)`):
            The set.
        v_t (`torch.Tensor` of shape `(N,)`):
            Soft value of the state.
        v_tp1 (`torch.Tensor` of shape `(N,)`):
            Value of the state after the data's token, as [`next_values`] gives it.
        gamma (`float`):
            Discount in [0, 1].
        vocab_size (`int`):
            V.
        chi2_alpha (`float`, *optional*, defaults to `0.1`):
            alpha; `None` for no square.

    Returns:
        `torch.Tensor` of shape `(N,)`.

    Raises:
        ValueError: If `gamma` lies outside of [0, 1], or `chi2_alpha` is not positive.

    Examples:

    ```python
    >>> q, mask = torch.tensor([[-1.0, -3.0]]), torch.tensor([[True, False]])
    >>> released(q, mask, torch.tensor([-1.0]), torch.tensor([0.0]), 0.9, vocab_size=4)  # 1/4 - 1 + 2.5 / 4
    tensor([-0.1250])
    ```
    """
    q, v_t, v_tp1 = _wide(q), _wide(v_t), _wide(v_tp1)
    follows = gamma * v_tp1
    rewards = implied_reward(torch.where(mask, q, 0.0), v_tp1.unsqueeze(1), gamma)
    outside = vocab_size - mask.sum(dim=1)  # tokens whose reward is -gamma V(s')
    mean = (torch.where(mask, rewards, 0.0).sum(dim=1) - outside * follows) / vocab_size
    loss = (v_t - follows) - mean
    if chi2_alpha is None:
        return loss
    penalties = torch.where(mask, chi2_penalty(rewards, chi2_alpha), 0.0).sum(dim=1)
    return loss + (penalties + outside * chi2_penalty(-follows, chi2_alpha)) / vocab_size

"""Q-values of logits, and values of states on a set of tokens: gauges and backups of `losses/temporal_difference.py`.

Nothing is detached. All compute in at least float32.
"""

import torch

from trl_kd.losses.action_sets import wide


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
    logits = wide(logits)
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
    return wide(q).masked_fill(~mask, float("-inf")).log_softmax(dim=1)


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
    return entropy_weight * (wide(q).masked_fill(~mask, float("-inf")) / entropy_weight).logsumexp(dim=1)


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
    return wide(q).masked_fill(~mask, float("-inf")).amax(dim=1)


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
    log_pi, q = log_pi.masked_fill(~is_taken, 0.0), wide(q).masked_fill(~is_taken, 0.0)
    return torch.where(is_taken, log_pi.exp() * (q - entropy_weight * log_pi), 0.0).sum(dim=1)

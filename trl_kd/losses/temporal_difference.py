r"""Temporal-difference imitation on the teacher's most likely tokens: the losses.

After [Language Model Distillation: A Temporal Difference Imitation Learning
Perspective](https://huggingface.co/papers/2505.20335) ("the paper" below): the student's logits are soft Q-values
Q(s, a) of the next token a after the text s; only the actions of a small set A(s) of the teacher's are looked at; what
follows a token is the soft value V(s') of the text with it. Any temporal-difference method of imitation can be run on
such a set: mask Q, and renormalise the policy that backups use. A method is a choice of parts: the set
(`losses/action_sets.py`), what Q and V are (`losses/values.py`), how far a return looks (`losses/returns.py`), and a
loss, each a function of its own.

Nothing reduces over tokens, and nothing is detached unless it says so. All compute in at least float32.
"""

import torch

from trl_kd.losses.action_sets import wide
from trl_kd.losses.returns import check_share
from trl_kd.losses.values import expected_value, hard_value, log_policy


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
    return wide(q_t) - gamma * wide(v_tp1)


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
    implied = wide(implied)
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
    loss = (wide(v_t) - gamma * wide(v_tp1)) - reward
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
    return v_t - expected_value(q, mask, teacher_log_probs.detach().to(wide(q).dtype))


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
    return (wide(q_t) - wide(target)).square()


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
    q, is_label = wide(q), (ids == labels.unsqueeze(1)) & mask
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
    wanted = log_policy(wide(action_values.detach()) / entropy_weight, mask).masked_fill(~mask, 0.0)
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
    return -wide(log_mass)


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
    q, v_t, v_tp1 = wide(q), wide(v_t), wide(v_tp1)
    follows = gamma * v_tp1
    rewards = implied_reward(torch.where(mask, q, 0.0), v_tp1.unsqueeze(1), gamma)
    outside = vocab_size - mask.sum(dim=1)  # tokens whose reward is -gamma V(s')
    mean = (torch.where(mask, rewards, 0.0).sum(dim=1) - outside * follows) / vocab_size
    loss = (v_t - follows) - mean
    if chi2_alpha is None:
        return loss
    penalties = torch.where(mask, chi2_penalty(rewards, chi2_alpha), 0.0).sum(dim=1)
    return loss + (penalties + outside * chi2_penalty(-follows, chi2_alpha)) / vocab_size

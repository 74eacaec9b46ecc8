r"""Action-value moments of adversarial moment matching, and the critics that need no parameters.

[Adversarial Moment-Matching Distillation of Large Language Models](https://huggingface.co/papers/2406.02959) sees text
generation as imitation: a state s_t is a prefix, an action y_t the next token, the teacher pi_T the expert and the
student pi_S the policy. Whatever reward r judges the tokens, how much worse the student does than the teacher (the
imitation gap) can be written through action values Q(s, y), what is earned from s on if y comes next. With gamma the
discount and Delta(y|s) = pi_T(y|s) - pi_S(y|s), the performance-difference lemma gives two exact forms:

    off-policy:  gap = E over teacher text  sum_t gamma^(t-1) sum_y Delta(y|s_t) Q_S(s_t, y)
    on-policy:   gap = E over student text  sum_t gamma^(t-1) sum_y Delta(y|s_t) Q_T(s_t, y)

The sum over y is the *moment* of Q at a state: by how much teacher and student differ in expected value there. The
true Q is unknown, since the reward is; so a critic f plays its worst case. If f may be any function in a class that
holds Q_S and Q_T, then the largest moment over the class bounds the gap, on teacher text and on student text alike,
hence every convex mixture of the two does. The student lowers the bound.

Two classes have their worst case in closed form (ours, as are the derivations here):

* all f with |f| <= 1: f = sign(Delta), and the moment is twice the total variation (`exact_critic`);
* the same with a penalty on (pi_T + pi_S) / 2 * f^2: f is proportional to Delta / (pi_T + pi_S), and the moment to the
  Le Cam (triangular) divergence (`penalised_critic`). It forgives small disagreements, where a sign does not.

A critic that cannot tell every state apart gives a smaller, weaker moment: mismatches of different states may cancel.
"""

import torch

from trl_kd.losses.divergences import _check_same_shape, _log_probs


def moment(student_logits: torch.Tensor, teacher_logits: torch.Tensor, critic_values: torch.Tensor) -> torch.Tensor:
    r"""
    Per-token action-value moment sum_y (pi_T(y) - pi_S(y)) f(y), exact over the vocabulary.

    The inner sum of both moments of [AMM](https://huggingface.co/papers/2406.02959). Gradient flows to the student
    only, with the critic held fixed: with respect to the student's logits it is -pi_S (f - E_S f). It is unchanged
    when a constant is added to f at a state.

    Note:
        The paper's form takes the critic at the token that was sampled; this is its expectation over the student's and
        the teacher's next-token distribution, which is known here and has less variance.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised student scores, any float dtype; computed in float32, or in float64.
        teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised teacher scores over the same vocabulary. Detached.
        critic_values (`torch.Tensor` of shape `(..., V)`):
            Value f(s, y) of each action. Detached.

    Returns:
        `torch.Tensor` of shape `(...)`: signed, in the units of the critic; zero where both distributions agree.

    Raises:
        ValueError: If the shapes differ.

    Examples:

    ```python
    >>> student = torch.tensor([[0.5, 0.5]]).log()
    >>> teacher = torch.tensor([[0.7, 0.3]]).log()
    >>> moment(student, teacher, torch.tensor([[0.5, -0.5]]))  # 0.2 * 0.5 + 0.2 * 0.5
    tensor([0.2000])
    ```
    """
    _check_values(student_logits, teacher_logits, critic_values)
    difference = _log_probs(teacher_logits.detach()).exp() - _log_probs(student_logits).exp()
    return (difference * critic_values.detach()).sum(dim=-1)


def exact_critic(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    r"""
    Worst critic among all functions bounded by 1: sign(pi_T - pi_S).

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised student scores. Detached.
        teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised teacher scores over the same vocabulary. Detached.

    Returns:
        `torch.Tensor` of shape `(..., V)`: -1, 0 or 1, without gradient.

    Raises:
        ValueError: If the shapes differ.

    Examples:

    ```python
    >>> student = torch.tensor([[0.5, 0.5]]).log()
    >>> teacher = torch.tensor([[0.7, 0.3]]).log()
    >>> exact_critic(student, teacher)
    tensor([[ 1., -1.]])
    ```
    """
    _check_same_shape(student_logits, teacher_logits)
    difference = _log_probs(teacher_logits.detach()).exp() - _log_probs(student_logits.detach()).exp()
    return difference.sign()


def penalised_critic(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    r"""
    Worst critic under a policy-weighted penalty: (pi_T - pi_S) / (pi_T + pi_S).

    It maximises sum_y [(pi_T - pi_S) f - (lambda / 2) (pi_T + pi_S) / 2 f^2] at lambda = 2, where it stays within
    [-1, 1] by itself; another lambda only scales it.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised student scores. Detached.
        teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised teacher scores over the same vocabulary. Detached.

    Returns:
        `torch.Tensor` of shape `(..., V)`: in [-1, 1], zero for actions that neither model takes, without gradient.

    Raises:
        ValueError: If the shapes differ.

    Examples:

    ```python
    >>> student = torch.tensor([[0.5, 0.5]]).log()
    >>> teacher = torch.tensor([[0.7, 0.3]]).log()
    >>> penalised_critic(student, teacher)  # 0.2 / 1.2 and -0.2 / 0.8
    tensor([[ 0.1667, -0.2500]])
    ```
    """
    _check_same_shape(student_logits, teacher_logits)
    p_t, p_s = _log_probs(teacher_logits.detach()).exp(), _log_probs(student_logits.detach()).exp()
    total = p_t + p_s
    return (p_t - p_s) / total.clamp_min(torch.finfo(total.dtype).tiny)


def exact_moment(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    r"""
    Per-token moment under the worst bounded critic: twice the total variation.

    Same value and gradient as `2 * total_variation(...)`, written as the game: the critic answers, then the student
    moves.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised student scores, any float dtype; computed in float32, or in float64.
        teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised teacher scores over the same vocabulary. Detached.

    Returns:
        `torch.Tensor` of shape `(...)`: in [0, 2].

    Raises:
        ValueError: If the shapes differ.

    Examples:

    ```python
    >>> student = torch.tensor([[0.5, 0.5]]).log()
    >>> teacher = torch.tensor([[0.7, 0.3]]).log()
    >>> exact_moment(student, teacher)  # twice the total variation of 0.2
    tensor([0.4000])
    ```
    """
    return moment(student_logits, teacher_logits, exact_critic(student_logits, teacher_logits))


def exact_penalised_moment(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    r"""
    Per-token moment under the worst penalised critic: the Le Cam divergence sum_y (pi_T - pi_S)^2 / (pi_T + pi_S).

    Note:
        The gradient is the game's, with the critic held fixed. It is not the derivative of the Le Cam divergence,
        which would also follow the critic's answer.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised student scores, any float dtype; computed in float32, or in float64.
        teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised teacher scores over the same vocabulary. Detached.

    Returns:
        `torch.Tensor` of shape `(...)`: in [0, 2], never above `exact_moment`.

    Raises:
        ValueError: If the shapes differ.

    Examples:

    ```python
    >>> student = torch.tensor([[0.5, 0.5]]).log()
    >>> teacher = torch.tensor([[0.7, 0.3]]).log()
    >>> exact_penalised_moment(student, teacher)  # 0.04 / 1.2 + 0.04 / 0.8
    tensor([0.0833])
    ```
    """
    return moment(student_logits, teacher_logits, penalised_critic(student_logits, teacher_logits))


def critic_objective(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, critic_values: torch.Tensor, penalty: float
) -> torch.Tensor:
    r"""
    Per-token objective that a learned critic ascends: its moment less a policy-weighted penalty.

    sum_y [(pi_T - pi_S) f - (penalty / 2) (pi_T + pi_S) / 2 f^2]. Gradient flows to the critic only.

    Note:
        The penalty is ours. Without it a bounded critic saturates, keeps its sign after the student has moved past the
        teacher, and both run in circles. Its weight, the mean of both policies, keeps it of the size of the moment
        whatever the vocabulary. Over all functions bounded by B the worst critic is (pi_T - pi_S) / (pi_T + pi_S),
        times 2 / penalty, clipped at B.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised student scores, any float dtype; computed in float32, or in float64. Detached.
        teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised teacher scores over the same vocabulary. Detached.
        critic_values (`torch.Tensor` of shape `(..., V)`):
            Value f(s, y) of each action.
        penalty (`float`):
            Weight of the penalty, at least 0.

    Returns:
        `torch.Tensor` of shape `(...)`: zero for a critic that is zero.

    Raises:
        ValueError: If the shapes differ.

    Examples:

    ```python
    >>> student = torch.tensor([[0.5, 0.5]]).log()
    >>> teacher = torch.tensor([[0.7, 0.3]]).log()
    >>> # the moment 0.2 less half of 0.6 * 0.25 + 0.4 * 0.25
    >>> critic_objective(student, teacher, torch.tensor([[0.5, -0.5]]), penalty=1.0)
    tensor([0.0750])
    ```
    """
    _check_values(student_logits, teacher_logits, critic_values)
    p_t, p_s = _log_probs(teacher_logits.detach()).exp(), _log_probs(student_logits.detach()).exp()
    values = critic_values.to(p_t.dtype)
    return ((p_t - p_s) * values - penalty / 4 * (p_t + p_s) * values.square()).sum(dim=-1)


def saturation(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, critic_values: torch.Tensor
) -> torch.Tensor:
    r"""
    Per-token mean size of a critic's values, over the actions that teacher and student take.

    sum_y (pi_T + pi_S) / 2 |f|. Divided by the critic's bound, 1 means that it has nothing left to give.

    Args:
        student_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised student scores. Detached.
        teacher_logits (`torch.Tensor` of shape `(..., V)`):
            Unnormalised teacher scores over the same vocabulary. Detached.
        critic_values (`torch.Tensor` of shape `(..., V)`):
            Value f(s, y) of each action. Detached.

    Returns:
        `torch.Tensor` of shape `(...)`: between 0 and the critic's bound, without gradient.

    Raises:
        ValueError: If the shapes differ.

    Examples:

    ```python
    >>> student = torch.tensor([[0.5, 0.5]]).log()
    >>> teacher = torch.tensor([[0.7, 0.3]]).log()
    >>> saturation(student, teacher, torch.tensor([[1.0, -0.5]]))  # 0.6 * 1 + 0.4 * 0.5
    tensor([0.8000])
    ```
    """
    _check_values(student_logits, teacher_logits, critic_values)
    p_t, p_s = _log_probs(teacher_logits.detach()).exp(), _log_probs(student_logits.detach()).exp()
    return ((p_t + p_s) / 2 * critic_values.detach().abs()).sum(dim=-1)


def _check_values(student_logits: torch.Tensor, teacher_logits: torch.Tensor, critic_values: torch.Tensor) -> None:
    _check_same_shape(student_logits, teacher_logits)
    if critic_values.shape != student_logits.shape:
        raise ValueError(
            f"`critic_values` has shape {tuple(critic_values.shape)} but the logits have shape "
            f"{tuple(student_logits.shape)}. The critic must value every action of every state. Return one value per "
            "token of the vocabulary."
        )


def discount_weights(positions: torch.Tensor, gamma: float) -> torch.Tensor:
    r"""
    Weight gamma^(t-1) of the t-th token of a completion in both moments.

    Args:
        positions (`torch.Tensor` of shape `(...)`):
            Number of completion tokens before each token: t - 1, starting at 0.
        gamma (`float`):
            Discount in (0, 1].

    Returns:
        `torch.Tensor` of shape `(...)`: float64 for exact powers of long completions.

    Raises:
        ValueError: If `gamma` lies outside of (0, 1].

    Examples:

    ```python
    >>> discount_weights(torch.tensor([0, 1, 2]), 0.5)
    tensor([1.0000, 0.5000, 0.2500], dtype=torch.float64)
    ```
    """
    if not 0.0 < gamma <= 1.0:
        raise ValueError(f"`gamma` is {gamma}, but it discounts later tokens. Set it in (0, 1].")
    return torch.pow(torch.tensor(gamma, dtype=torch.float64, device=positions.device), positions)


def horizon(remaining: torch.Tensor, gamma: float) -> torch.Tensor:
    r"""
    Largest return of a reward in [0, 1] over `remaining` tokens: 1 + gamma + ... + gamma^(remaining - 1).

    With it, the gap under any reward in [0, 1] is at most the sum of gamma^(t-1) * horizon * total variation.

    Args:
        remaining (`torch.Tensor` of shape `(...)`):
            Number of tokens from this one to the end of the text, this one included.
        gamma (`float`):
            Discount in (0, 1].

    Returns:
        `torch.Tensor` of shape `(...)`, float64.

    Examples:

    ```python
    >>> horizon(torch.tensor([1, 2, 3]), 0.5)  # 1, 1 + 0.5, 1 + 0.5 + 0.25
    tensor([1.0000, 1.5000, 1.7500], dtype=torch.float64)
    ```
    """
    remaining = remaining.double()
    return remaining if gamma == 1.0 else (1.0 - gamma**remaining) / (1.0 - gamma)


def later_returns(costs: torch.Tensor, mask: torch.Tensor, gamma: float) -> torch.Tensor:
    r"""
    Discounted sum of the costs of strictly later tokens, for the effect of a token on the states after it.

    For row b and token t: sum over t' > t of gamma^(t' - t) costs[b, t']. Multiplied by gamma^(t-1) and by
    grad log pi_S(y_t | s_t), and averaged over student text, it is what the full gradient of the on-policy moment has
    beyond the direct one. Earlier costs and the cost at t itself do not depend on y_t.

    Args:
        costs (`torch.Tensor` of shape `(B, K)`):
            Per-token costs, for example moments. Detached.
        mask (`torch.Tensor` of shape `(B, K)`):
            True for the tokens of the completion.
        gamma (`float`):
            Discount in (0, 1].

    Returns:
        `torch.Tensor` of shape `(B, K)`: zero at the last token of a completion and where `mask` is false.

    Examples:

    ```python
    >>> costs = torch.tensor([[1.0, 2.0, 4.0]])
    >>> later_returns(costs, torch.ones(1, 3), 0.5)  # 0.5 * 2 + 0.25 * 4, 0.5 * 4, nothing
    tensor([[2., 2., 0.]])
    ```
    """
    costs = costs.detach().masked_fill(~mask.bool(), 0.0)
    length = costs.shape[1]
    step = torch.arange(length, device=costs.device)
    lag = step[None, :] - step[:, None]  # (K, K): t' - t
    weights = torch.where(
        lag > 0, torch.tensor(gamma, dtype=torch.float64, device=costs.device) ** lag.clamp_min(0), 0
    )
    with torch.autocast(costs.device.type, enabled=False):
        returns = costs @ weights.to(costs.dtype).T
    return returns.masked_fill(~mask.bool(), 0.0)

"""Losses on transitions by name: which of them are meant for which tokens, and whether a next state is in them."""

import math
from collections.abc import Callable
from typing import Any

import torch

from trl_kd.losses import (
    chi2_penalty,
    expected_inverse_soft_q,
    implied_reward,
    inverse_soft_q,
    large_margin,
    released,
    soft_actor_critic,
    soft_q_regression,
    sqil_reward,
)
from trl_kd.trainer.transitions import Transitions


Values = tuple[torch.Tensor, torch.Tensor]


def _chi2(moves: Transitions, args: Any) -> torch.Tensor:
    """The penalty on returns of the implied reward, `(N,)`; 0 where there is none."""
    if math.isinf(args.chi2_alpha):
        return torch.zeros_like(moves.q_t)
    nothing, has_center = torch.zeros_like(moves.v_tp1), args.chi2_center == "teacher"
    known = moves.in_set if has_center or args.label_outside == "skip" else torch.ones_like(moves.in_set)

    def along(q_t: torch.Tensor, v_tp1: torch.Tensor) -> torch.Tensor:
        reward = implied_reward(q_t, v_tp1, args.gamma)
        return reward if args.returns == "one_step" else moves.returns(reward, nothing, known)

    center = along(moves.teacher_q_t, moves.teacher_v_tp1) if has_center else None
    penalty = chi2_penalty(along(moves.q_t, moves.v_tp1), args.chi2_alpha, center)
    return torch.where(moves.is_action & moves.has_next & ~moves.is_on_policy & known, penalty, 0.0)


def _inverse_soft_q(moves: Transitions, args: Any) -> Values:
    """On the teacher's text: what the student writes is no expert's."""
    loss = inverse_soft_q(moves.q_t, moves.v_t, moves.v_tp1, args.gamma) + _chi2(moves, args)
    kept = moves.is_action & ~moves.is_on_policy
    kept = kept & moves.in_set if args.label_outside == "skip" else kept
    return loss, kept if math.isinf(args.chi2_alpha) else kept & moves.has_next


def _expected(moves: Transitions, args: Any) -> Values:
    loss = expected_inverse_soft_q(moves.q, moves.actions.mask, moves.actions.teacher_log_probs, moves.v_t)
    return loss + _chi2(moves, args), moves.is_action


def _teacher_reward(moves: Transitions, args: Any) -> Values:
    """Returns of the reward that the teacher's own values imply."""
    reward = implied_reward(moves.teacher_q_t, moves.teacher_v_tp1, args.gamma)
    loss = soft_q_regression(moves.q_t, moves.returns(reward, moves.v_tp1, moves.in_set))
    return loss, moves.is_action & moves.has_next & moves.in_set


def _sqil(moves: Transitions, args: Any) -> Values:
    reward = sqil_reward(moves.is_on_policy).to(moves.q_t.dtype)
    kept = moves.is_action & moves.has_next
    kept = kept & moves.in_set if args.label_outside == "skip" else kept
    return soft_q_regression(moves.q_t, moves.returns(reward, moves.v_tp1)), kept


def _large_margin(moves: Transitions, args: Any) -> Values:
    loss = large_margin(moves.q, moves.actions.mask, moves.actions.ids, moves.labels, args.margin)
    return loss, moves.is_action & ~moves.is_on_policy


def _soft_actor_critic(moves: Transitions, args: Any) -> Values:
    """
    The critic (ours): the teacher's Q-values, that of the data's token as if the student went on after it, its return
    of the teacher's reward. Without that return, the reverse KL on the set.
    """
    reward = implied_reward(moves.teacher_q_t, moves.teacher_v_tp1, args.gamma)
    target = moves.returns(reward, moves.v_tp1, moves.in_set).detach()
    knows = moves.in_set & moves.has_next
    is_label = (moves.actions.ids == moves.labels.unsqueeze(1)) & moves.actions.mask & knows.unsqueeze(1)
    values = torch.where(is_label, target.unsqueeze(1), moves.teacher_q)
    # Of a token of the data that its set has not got, the teacher says nothing
    mask = moves.actions.mask & (moves.actions.teacher_log_probs > float("-inf"))
    return soft_actor_critic(moves.q, mask, values, args.entropy_weight), moves.is_action


def _released(moves: Transitions, args: Any) -> Values:
    alpha = None if math.isinf(args.chi2_alpha) else args.chi2_alpha
    sets = moves.q, moves.actions.mask
    loss = released(*sets, moves.v_t, moves.v_tp1, args.gamma, moves.vocab_size, alpha)
    return loss, moves.is_action & moves.has_next


OBJECTIVES: dict[str, Callable[[Transitions, Any], Values]] = {
    "expected_inverse_soft_q": _expected,
    "inverse_soft_q": _inverse_soft_q,
    "teacher_reward": _teacher_reward,
    "sqil": _sqil,
    "large_margin": _large_margin,
    "soft_actor_critic": _soft_actor_critic,
    "released": _released,
}


def has_temporal_difference(args: Any) -> bool:
    """Whether the value of a next state has any part in the losses that the configuration names."""
    if args.gamma == 0.0:
        return False
    names = {name for name, weight in args.objectives.items() if weight > 0}
    with_chi2 = {"expected_inverse_soft_q", "inverse_soft_q"} if not math.isinf(args.chi2_alpha) else set()
    is_one_step = (args.returns, args.n_steps) == ("n_step", 1) or (args.returns, args.td_lambda) == ("lambda", 0.0)
    with_paths = set() if args.returns == "one_step" or is_one_step else {"path_consistency"}
    others = {"teacher_reward", "sqil", "soft_actor_critic", "released"}
    return bool(names & (others | with_chi2 | with_paths))


def own_values(objective: Callable[[Transitions], torch.Tensor], moves: Transitions) -> torch.Tensor:
    """Values of a loss of the caller's; one clear error if they are not one per token."""
    values = objective(moves)
    if not isinstance(values, torch.Tensor) or values.shape != moves.q_t.shape:
        found = f"shape {tuple(values.shape)}" if isinstance(values, torch.Tensor) else type(values).__name__
        raise ValueError(
            f"`objective` returned {found} for {len(moves.q_t)} tokens, but each token has a weight of its own. "
            "Return one value per token, and reduce nothing."
        )
    return values

"""From tokens to transitions: which state follows which, where a text ends, and the values of both on the set."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from trl_kd.losses import (
    contains,
    expected_value,
    full_set,
    gauged,
    hard_value,
    lambda_returns,
    min_p_set,
    monte_carlo_returns,
    n_step_returns,
    one_step_returns,
    soft_value,
    threshold_set,
    top_k_set,
    top_p_set,
    union_with_label,
)
from trl_kd.trainer.tokens import SelectedTokens, TokenBatch, select_tokens


# Q-value of what the teacher's tokens do not hold: a square of it is still a number
_UNKNOWN = -1e4


@dataclass(frozen=True)
class ActionSet:
    r"""
    Actions of N states, in K columns.

    Args:
        ids (`torch.Tensor` of shape `(N, K)`):
            Tokens.
        mask (`torch.Tensor` of shape `(N, K)`):
            Those of the set.
        teacher_log_probs (`torch.Tensor` of shape `(N, K)`):
            The teacher's, over the whole vocabulary; `-inf` where they are not known.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    teacher_log_probs: torch.Tensor

    def first(self, count: int) -> "ActionSet":
        """Those of the first states."""
        return ActionSet(self.ids[:count], self.mask[:count], self.teacher_log_probs[:count])

    def columns(self, count: int) -> "ActionSet":
        """The first columns."""
        return ActionSet(self.ids[:, :count], self.mask[:, :count], self.teacher_log_probs[:, :count])

    def with_some(self, labels: torch.Tensor) -> torch.Tensor:
        """A token of each state: the data's, and of a state after a text any of its set."""
        return torch.cat([labels, self.ids[len(labels) :, 0]])

    @property
    def teacher_on_set(self) -> torch.Tensor:
        """The teacher's log-probabilities, `-inf` outside of the set, `(N, K)`."""
        return self.teacher_log_probs.masked_fill(~self.mask, float("-inf"))


def make_action_set(ids: torch.Tensor, log_probs: torch.Tensor, args: Any, is_cut: bool = False) -> ActionSet:
    """The set that the configuration asks for, of the teacher's most likely tokens; all, if these are cut to it."""
    mask = {
        "top_p": lambda: top_p_set(log_probs, args.action_top_p),
        "top_k": lambda: top_k_set(log_probs, args.action_top_k),
        "min_p": lambda: min_p_set(log_probs, args.action_min_p),
        "threshold": lambda: threshold_set(log_probs, args.action_threshold),
        "full": lambda: full_set(log_probs),
    }["full" if is_cut else args.action_set]()
    return ActionSet(ids, mask, log_probs)


@dataclass(frozen=True)
class Transitions:
    r"""
    What a temporal-difference loss sees of N tokens; a function of it returns one value per token.

    Args:
        actions ([`ActionSet`]):
            The set of each state, with the tokens of the data if `label_outside="union"`.
        q (`torch.Tensor` of shape `(N, K)`):
            The student's Q-values of the set's columns, gauged and clipped.
        q_t (`torch.Tensor` of shape `(N,)`):
            That of the token of the data.
        v_t (`torch.Tensor` of shape `(N,)`):
            Value of the state.
        v_tp1 (`torch.Tensor` of shape `(N,)`):
            Value of the next state, 0 after an end.
        teacher_q (`torch.Tensor` of shape `(N, K)`), teacher_q_t, teacher_v_t, teacher_v_tp1 (`(N,)`):
            The same of the teacher's log-probabilities as logits.
        labels (`torch.Tensor` of shape `(N,)`):
            Tokens of the data.
        in_set (`torch.Tensor` of shape `(N,)`):
            Whether they are in the set.
        is_on_policy (`torch.Tensor` of shape `(N,)`):
            Whether the student wrote them.
        is_action (`torch.Tensor` of shape `(N,)`):
            Whether the state has an action to be trained: all but an EOS with `train_eos=False`.
        has_next (`torch.Tensor` of shape `(N,)`):
            Whether the value of the next state is known: all but the last token of a text that was cut, with
            `truncation="drop"`.
        returns (`Callable`):
            `returns(rewards, v_tp1, known=None)`: the returns that the configuration asks for, `(N,)`. They end before
            a token whose reward is not `known` (all are, by default), with the value of the state before it.
        vocab_size (`int`):
            Number of all tokens.
    """

    actions: ActionSet
    q: torch.Tensor
    q_t: torch.Tensor
    v_t: torch.Tensor
    v_tp1: torch.Tensor
    teacher_q: torch.Tensor
    teacher_q_t: torch.Tensor
    teacher_v_t: torch.Tensor
    teacher_v_tp1: torch.Tensor
    labels: torch.Tensor
    in_set: torch.Tensor
    is_on_policy: torch.Tensor
    is_action: torch.Tensor
    has_next: torch.Tensor
    returns: Callable[..., torch.Tensor]
    vocab_size: int


def select_states(inputs: dict[str, torch.Tensor], eos_token_ids: torch.Tensor) -> SelectedTokens:
    """As `select_tokens`, with the state after each text that was cut, whose last token is no end."""
    selected = select_tokens(inputs)
    if not len(selected.labels):
        return replace(selected, ends=selected.rows)
    is_last = torch.ones_like(selected.is_on_policy)
    is_last[:-1] = selected.positions[1:] == 0
    ends = (is_last & ~torch.isin(selected.labels, eos_token_ids)).nonzero().squeeze(1)
    # The token itself, at the position after the one that predicts it, has that state
    return replace(selected, rows=torch.cat([selected.rows, selected.rows[ends] + 1]), ends=ends)


class Course:
    r"""
    Which of N tokens follow each other, and where their texts end.

    Args:
        labels (`torch.Tensor` of shape `(N,)`):
            Tokens, row by row.
        positions (`torch.Tensor` of shape `(N,)`):
            Number of trained tokens before each in its row.
        rows (`torch.Tensor` of shape `(N,)`):
            Place of the state that each is chosen in: where untrained tokens come between, a text ends.
        ends (`torch.Tensor`, *optional*):
            Tokens whose next state is among those after the N, in this order.
        eos_token_ids (`torch.Tensor`):
            Ids that end a text.
        args ([`SparseTDConfig`]):
            Configuration, resolved.
    """

    def __init__(
        self,
        labels: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        ends: torch.Tensor | None,
        eos_token_ids: torch.Tensor,
        args: Any,
    ):
        self.args, self.ends = args, ends
        is_end = torch.isin(labels, eos_token_ids)
        in_row = torch.zeros_like(is_end)
        in_row[:-1] = (positions[1:] > 0) & (rows[1:] == rows[:-1] + 1)
        self.follows = in_row & ~is_end  # the next of the N tokens is chosen in the next state
        self.is_action = torch.ones_like(is_end) if args.train_eos else ~is_end
        was_cut = ~in_row & ~is_end
        if args.truncation == "bootstrap" and ends is not None:
            was_cut = was_cut.index_fill(0, ends, False)  # of others, the state after is not read
        self.has_next = torch.ones_like(is_end) if args.truncation == "terminal" else ~was_cut

    def next_of(self, values: torch.Tensor) -> torch.Tensor:
        """Of values of N states, and of those after them, that of the state after each of the N tokens."""
        count = len(self.follows)
        own = torch.where(self.is_action, values[:count], 0.0)
        found = torch.zeros_like(own)
        found[:-1] = torch.where(self.follows[:-1], own[1:], 0.0)
        if self.args.truncation == "bootstrap" and self.ends is not None:
            found = found.index_put((self.ends,), values[count:])
        return found

    def returns(
        self,
        rewards: torch.Tensor,
        v_tp1: torch.Tensor,
        known: torch.Tensor | None = None,
        needs_next: bool = True,
    ) -> torch.Tensor:
        """
        Returns of rewards and next values, `(N,)`, as the configuration asks for. They look no further than to the
        value of a state whose token is no action, has no next state (if rewards need it), or no `known` reward.
        """
        args = self.args
        if args.returns == "one_step" or not len(rewards):
            return one_step_returns(rewards, v_tp1, torch.ones_like(self.follows), args.gamma)
        counted = self.is_action & self.has_next if needs_next else self.is_action
        row, column, mask = self._grid(counted if known is None else counted & known)
        found = []
        for part in (rewards, v_tp1):
            grid = torch.zeros(mask.shape, dtype=part.dtype, device=part.device)
            found.append(grid.index_put((row, column), part))
        if args.returns == "n_step":
            grid = n_step_returns(*found, mask, args.gamma, args.n_steps)
        elif args.returns == "lambda":
            grid = lambda_returns(*found, mask, args.gamma, args.td_lambda)
        else:
            grid = monte_carlo_returns(*found, mask, args.gamma)
        return grid[row, column]

    def _grid(self, counted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Row and column of each token where what is looked through is one row, and where there are tokens."""
        starts = torch.ones_like(self.follows)
        starts[1:] = ~(self.follows[:-1] & counted[1:])
        row = starts.cumsum(0) - 1
        index = torch.arange(len(starts), device=starts.device)
        column = index - torch.where(starts, index, 0).cummax(0).values
        # The length of the longest text is waited for: its square is what returns cost
        rows, columns = (torch.stack([row[-1], column.max()]) + 1).tolist()
        mask = torch.zeros(rows, columns, dtype=torch.bool, device=starts.device)
        mask[row, column] = True
        return row, column, mask


@dataclass(frozen=True)
class StateTokens(TokenBatch):
    """
    The tokens of a micro-batch, what follows what (`course`), and the tokens of the second text. Hidden states and
    the teacher's tokens may be of more states: those after texts that were cut.
    """

    course: Course | None = None
    second: TokenBatch | None = None


def state_values(q: torch.Tensor, actions: ActionSet, args: Any) -> torch.Tensor:
    """Values of states by the configuration's backup, `(N,)`."""
    if args.backup == "soft":
        return soft_value(q, actions.mask, args.entropy_weight)
    if args.backup == "hard":
        return hard_value(q, actions.mask)
    policy = q if args.backup == "student" else actions.teacher_log_probs.to(q.dtype)
    return expected_value(q, actions.mask, policy, args.entropy_weight)


def make_transitions(
    logits: torch.Tensor,
    next_logits: torch.Tensor,
    offsets: tuple[torch.Tensor | None, torch.Tensor | None],
    actions: ActionSet,
    labels: torch.Tensor,
    is_on_policy: torch.Tensor,
    course: Course,
    vocab_size: int,
    args: Any,
) -> Transitions:
    r"""
    Q-values and values of the tokens.

    Args:
        logits (`torch.Tensor` of shape `(N + M, K + 1)`):
            The student's logits of the set's columns, and of the token of the data in one more; of the N states and of
            those after them.
        next_logits (`torch.Tensor` of shape `(N + M, K + 1)`):
            The same of who values the next states.
        offsets (`tuple[torch.Tensor, torch.Tensor]`):
            What the gauge subtracts from both, `(N + M,)`; `None` for the raw gauge.
        actions ([`ActionSet`]):
            Sets of the N + M states, without the tokens of the data.
        labels (`torch.Tensor` of shape `(N,)`):
            Tokens of the data.
        is_on_policy (`torch.Tensor` of shape `(N,)`):
            Whether the student wrote them.
        course ([`Course`]):
            What follows what.
        vocab_size (`int`):
            Number of all tokens.
        args ([`SparseTDConfig`]):
            Configuration, resolved.

    Returns:
        [`Transitions`]
    """
    count = len(labels)
    in_set = contains(actions.ids[:count], actions.mask[:count], labels)
    if args.label_outside == "union":
        actions = with_labels(actions, labels)
    width = actions.ids.shape[1]
    q = _q_values(logits, offsets[0], args)
    v_t = v_next = state_values(q[:, :width], actions, args)
    if next_logits is not logits:
        v_next = state_values(_q_values(next_logits, offsets[1], args)[:, :width], actions, args)
    v_tp1 = course.next_of(v_next.detach() if args.detach_next else v_next)
    own = actions.first(count)
    q_t = q[:count, -1]
    if args.label_outside == "zero":
        q_t = torch.where(in_set, q_t, 0.0)
    teacher_q = _teacher_q(actions, args).to(q.dtype)
    teacher_v = state_values(teacher_q, actions, args)
    is_label = (own.ids == labels.unsqueeze(1)) & own.mask
    return Transitions(
        actions=own,
        q=q[:count, :width],
        q_t=q_t,
        v_t=v_t[:count],
        v_tp1=v_tp1,
        teacher_q=teacher_q[:count],
        teacher_q_t=torch.where(is_label, teacher_q[:count], 0.0).sum(dim=1),
        teacher_v_t=teacher_v[:count],
        teacher_v_tp1=course.next_of(teacher_v),
        labels=labels,
        in_set=in_set,
        is_on_policy=is_on_policy,
        is_action=course.is_action,
        has_next=course.has_next,
        returns=course.returns,
        vocab_size=vocab_size,
    )


def with_labels(actions: ActionSet, labels: torch.Tensor) -> ActionSet:
    """The sets with the tokens of the data, in one column more; the teacher's probability there is not known."""
    ids, mask = union_with_label(actions.ids, actions.mask, actions.with_some(labels))
    unknown = torch.full_like(actions.teacher_log_probs[:, :1], float("-inf"))
    return ActionSet(ids, mask, torch.cat([actions.teacher_log_probs, unknown], dim=1))


def _q_values(logits: torch.Tensor, offset: torch.Tensor | None, args: Any) -> torch.Tensor:
    clip = None if args.q_min == float("-inf") else args.q_min
    return gauged(logits, args.gauge, maximum=offset, log_normaliser=offset, clip_min=clip)


def _teacher_q(actions: ActionSet, args: Any) -> torch.Tensor:
    """Q-values of the teacher: its logits but for a number per state, which only a live teacher knows."""
    log_probs = actions.teacher_log_probs
    floor = max(args.q_min, _UNKNOWN)
    if args.gauge == "max":
        log_probs = log_probs - log_probs[:, :1]
    return log_probs.clamp_min(floor)

"""From a batch of rows to the tokens that a loss is computed on."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from trl_kd.losses import LinearLoss, OnSet, Term, linear_loss
from trl_kd.modules.lm_head import LMHead


@dataclass(frozen=True)
class TokenBatch:
    r"""
    The N trained tokens of a micro-batch, as a method's loss gets them.

    Args:
        pairs (`dict[str, tuple[torch.Tensor, LMHead]]`):
            `"student"` and `"teacher"`: last hidden states of shape `(N, H_s)` and `(N, H_t)` at the positions that
            predict the tokens, and the heads, cut to the shared vocabulary. Gradient flows to the student's only.
        labels (`torch.Tensor` of shape `(N,)`):
            The tokens.
        weights (`torch.Tensor` of shape `(N,)`):
            Share of each token in the loss of the optimizer step: sources are averaged, each over its own tokens, then
            mixed.
        source_weights (`torch.Tensor` of shape `(N,)`):
            Share of each token in the mean of its own source, before the sources are mixed.
        is_on_policy (`torch.Tensor` of shape `(N,)`):
            Whether the student wrote the token.
        positions (`torch.Tensor` of shape `(N,)`):
            Number of trained tokens before it in its row.
        step_values (`dict[str, torch.Tensor]`, *optional*):
            What the method's `prepare_step` found for these tokens, by name, of shape `(N,)`.
        top (`tuple[torch.Tensor, torch.Tensor]` of shapes `(N, K)`, *optional*):
            Ids and log-probabilities of the teacher's most likely tokens, from a cache; then there is no `"teacher"`
            in `pairs`.
    """

    pairs: dict[str, tuple[torch.Tensor, LMHead]]
    labels: torch.Tensor
    weights: torch.Tensor
    source_weights: torch.Tensor
    is_on_policy: torch.Tensor
    positions: torch.Tensor
    step_values: dict[str, torch.Tensor] = field(default_factory=dict)
    top: tuple[torch.Tensor, torch.Tensor] | None = None

    def linear_loss(
        self, terms: dict[str, Term], chunk_size: int | None, labels: dict[str, torch.Tensor] | None = None
    ) -> LinearLoss:
        """
        `linear_loss` of terms on `"student"`, `"teacher"`, `"labels"` and further labels; with a cache, terms on both
        models in their sparse form, and none on the teacher alone.
        """
        labels = {"labels": self.labels} | (labels or {})
        if self.top is not None:
            ids, log_probs = (part[: len(self.labels)] for part in self.top)
            labels |= {"top_ids": ids, "top_log_probs": log_probs}
            terms = {name: _sparse(term) for name, term in terms.items() if term.inputs != ("teacher",)}
        pairs = {name: (hidden[: len(self.labels)], head) for name, (hidden, head) in self.pairs.items()}
        return linear_loss(pairs, terms, labels, chunk_size)

    @property
    def reference_weights(self) -> torch.Tensor:
        """Weights for a loss on off-policy tokens alone, `(N,)`; zero for on-policy tokens."""
        return torch.where(self.is_on_policy, 0.0, self.source_weights)

    def detach(self) -> "TokenBatch":
        """The same tokens without gradient."""
        pairs = {name: (hidden.detach(), head.detach()) for name, (hidden, head) in self.pairs.items()}
        return replace(self, pairs=pairs)

    def of_source(self, on_policy: bool) -> "TokenBatch":
        """The tokens of one source."""
        chosen = self.is_on_policy if on_policy else ~self.is_on_policy
        return self.at(chosen.nonzero().squeeze(1))

    def at(self, rows: torch.Tensor | slice) -> "TokenBatch":
        """Some of the tokens."""
        return replace(
            self,
            pairs={name: (hidden[rows], head) for name, (hidden, head) in self.pairs.items()},
            labels=self.labels[rows],
            weights=self.weights[rows],
            source_weights=self.source_weights[rows],
            is_on_policy=self.is_on_policy[rows],
            positions=self.positions[rows],
            step_values={name: value[rows] for name, value in self.step_values.items()},
            top=None if self.top is None else tuple(part[rows] for part in self.top),
        )


def _sparse(term: Term) -> Term:
    """The sparse form of a term on both models, for `top_ids` and `top_log_probs`; others as they are."""
    if term.inputs != ("student", "teacher"):
        return term
    return Term(OnSet(term.function), ("student", "top_ids", "top_log_probs"), term.weights)


@dataclass(frozen=True)
class SelectedTokens:
    """
    The trained tokens of a batch: `rows`, their predicting positions in a flattened `(B, S)`, and what is known. There
    may be more rows than tokens: states after the tokens `ends`, the last ones of texts that were cut.
    """

    rows: torch.Tensor
    labels: torch.Tensor
    is_on_policy: torch.Tensor
    positions: torch.Tensor
    ends: torch.Tensor | None = None

    def of(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states `(B, S, H)` at the predicting positions, `(N, H)`."""
        return hidden_states.flatten(0, 1).index_select(0, self.rows)


def select_tokens(inputs: dict[str, torch.Tensor]) -> SelectedTokens:
    """Shift the labels (logits at position i predict token i + 1) and pick those that are trained."""
    labels = inputs["labels"][:, 1:]
    mask = labels != -100  # (B, S - 1)
    before = mask.long().cumsum(dim=1) - 1
    if "position_ids" in inputs:
        # Packed row: count from the start of each sequence, not of the row
        starts = inputs["position_ids"][:, 1:] == 0
        before = before - torch.where(starts, before + 1, 0).cummax(dim=1).values
    on_policy = inputs["is_on_policy"].unsqueeze(1).expand_as(mask)
    # Asked once where they are: each boolean index would wait for the device
    row, position = mask.nonzero(as_tuple=True)
    rows = row * inputs["labels"].shape[1] + position
    return SelectedTokens(rows, labels[row, position], on_policy[row, position], before[row, position])


def model_inputs(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a model's forward takes of a batch."""
    return {key: inputs[key] for key in ("input_ids", "attention_mask", "position_ids") if key in inputs}


def teachers(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The teacher's part of a batch, by the names that its own batch would have."""
    names = ("input_ids", "attention_mask", "labels")
    kept = {name: inputs[name] for name in ("is_on_policy", "teacher") if name in inputs}
    return {name: inputs[f"teacher_{name}"] for name in names} | kept


def count_tokens(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Numbers of trained tokens by source, of shape (2,): off-policy, on-policy."""
    per_row = (inputs["labels"][:, 1:] != -100).sum(dim=1)
    on_policy = inputs["is_on_policy"]
    return torch.stack([(per_row * ~on_policy).sum(), (per_row * on_policy).sum()])


def count_step(batches: list[dict[str, torch.Tensor]], accelerator: Any, device: torch.device) -> torch.Tensor:
    """The same over the micro-batches of an optimizer step and all ranks."""
    counts = torch.stack([count_tokens(batch) for batch in batches]).sum(dim=0).to(device)
    return accelerator.reduce(counts, reduction="sum") if accelerator.num_processes > 1 else counts


def token_weights(
    is_on_policy: torch.Tensor, counts: torch.Tensor, on_policy_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Weights that divide each source by its own number of tokens, and mix the sources.

    Args:
        is_on_policy (`torch.Tensor` of shape `(N,)`):
            Source of each token.
        counts (`torch.Tensor` of shape `(2,)`):
            Off- and on-policy tokens of the whole optimizer step, over all micro-batches and ranks.
        on_policy_weight (`float`):
            Share of the on-policy mean. A source that is absent from the step gives its share to the other.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]` of shapes `(N,)`: mixed weights, and weights of the mean of each source.
    """
    off, on = counts.float().unbind()
    share_on = torch.where((off > 0) & (on > 0), on_policy_weight, (on > 0).float())
    weight_off, weight_on = 1.0 / off.clamp_min(1), 1.0 / on.clamp_min(1)
    weights = torch.where(is_on_policy, share_on * weight_on, (1.0 - share_on) * weight_off)
    return weights, torch.where(is_on_policy, weight_on, weight_off)

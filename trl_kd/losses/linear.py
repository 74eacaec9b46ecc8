"""Losses from hidden states and output heads, without the (tokens x vocabulary) logits of the whole batch.

`linear_loss` takes pairs of hidden states and heads, and terms: plain per-token functions of logits with one weight
per row. Rows go through in chunks; the logits of a chunk live until its terms are computed, and are computed again in
the backward pass. The seam is narrow on purpose: row weights go in, their weighted sum and the detached per-row values
come out, so that an engine which makes its gradient in the forward pass can stand behind it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from trl_kd.losses.reduction import weighted_sum


# Bytes of one chunk's float32 logits of one model, and the bounds on its rows: small chunks lose matrix-product
# efficiency, large ones only memory.
_CHUNK_BYTES = 2**26
_MIN_ROWS, _MAX_ROWS = 32, 1024


@dataclass(frozen=True)
class Term:
    r"""
    One objective, or one metric, of `linear_loss`.

    Args:
        function (`Callable`):
            Plain per-token function of logits, such as `forward_kl`; takes what `inputs` names, returns `(n,)`.
        inputs (`tuple[str, ...]`, *optional*, defaults to `("student", "teacher")`):
            Names of the pairs whose logits the function takes, in order. `"labels"` stands for the labels.
        weights (`torch.Tensor` of shape `(N,)`, *optional*):
            Weight of each row in the loss. `None` for a metric: its values are returned, nothing is trained on it.
    """

    function: Callable[..., torch.Tensor]
    inputs: tuple[str, ...] = ("student", "teacher")
    weights: torch.Tensor | None = None

    def rows(self, chunk: slice) -> "Term":
        """The same term on some of its rows."""
        return self if self.weights is None else replace(self, weights=self.weights[chunk])


@dataclass(frozen=True)
class LinearLoss:
    r"""
    Result of `linear_loss`.

    Args:
        loss (`torch.Tensor` of shape `()`):
            Sum over terms and rows of weight times value, with gradient; in float32, or in float64 for float64 heads.
        values (`dict[str, torch.Tensor]`):
            Per-row values of each term, of shape `(N,)`, detached.
    """

    loss: torch.Tensor
    values: dict[str, torch.Tensor]


def linear_loss(
    pairs: dict[str, tuple[torch.Tensor, Any]],
    terms: dict[str, Term],
    labels: torch.Tensor | None = None,
    chunk_size: int | None = None,
) -> LinearLoss:
    r"""
    Weighted sum of per-token objectives on the logits of several heads, in chunks of rows.

    Args:
        pairs (`dict[str, tuple[torch.Tensor, LMHead]]`):
            Hidden states of shape `(N, H)` and the head that maps them to logits `(N, V)`, by name. All have the same
            N; H and the dtype may differ. Gradient flows to hidden states and heads that require it.
        terms (`dict[str, Term]`):
            Objectives and metrics by name.
        labels (`torch.Tensor` of shape `(N,)`, *optional*):
            Next tokens, for terms that take `"labels"`.
        chunk_size (`int`, *optional*):
            Rows per chunk. By default the logits of a chunk take 64 MiB per model.

    Returns:
        [`LinearLoss`]: the loss, and the detached per-row values.

    Raises:
        ValueError: If the numbers of rows differ.

    Examples:

    ```python
    >>> student = torch.eye(2), LMHead(torch.zeros(3, 2))  # two rows, three tokens
    >>> teacher = torch.ones(2, 4), LMHead(torch.zeros(3, 4))
    >>> terms = {"jsd": Term(generalized_jsd, weights=torch.full((2,), 0.5)), "entropy": Term(entropy, ("student",))}
    >>> result = linear_loss({"student": student, "teacher": teacher}, terms)
    >>> result.loss, result.values["entropy"]  # equal, and ln 3
    (tensor(0.), tensor([1.0986, 1.0986]))
    ```
    """
    rows = {name: hidden.shape[0] for name, (hidden, _) in pairs.items()}
    rows.update({name: term.weights.shape[0] for name, term in terms.items() if term.weights is not None})
    if labels is not None:
        rows["labels"] = labels.shape[0]
    if len(set(rows.values())) > 1:
        raise ValueError(
            f"The numbers of rows differ: {rows}. Hidden states, labels and weights describe the same tokens. Select "
            "the same positions for all of them."
        )
    num_rows = next(iter(rows.values()))
    size = chunk_size or _default_chunk_size(pairs)
    training = torch.is_grad_enabled() and any(term.weights is not None for term in terms.values())
    heads = {name: head for name, (_, head) in pairs.items()}
    # Asked once: each answer waits for the device
    all_count = {name: t.weights is None or bool((t.weights != 0).all()) for name, t in terms.items()}

    losses, values = [], {name: [] for name in terms}
    # An empty batch still makes one (empty) chunk: its zero loss is connected to every parameter, as DDP requires
    for start in range(0, max(num_rows, 1), size):
        chunk = slice(start, start + size)
        hidden = {name: states[chunk] for name, (states, _) in pairs.items()}
        chunk_terms = {name: term.rows(chunk) for name, term in terms.items()}
        arguments = (hidden, heads, chunk_terms, all_count, None if labels is None else labels[chunk])
        if training:
            loss, chunk_values = checkpoint(_chunk_loss, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            loss, chunk_values = _chunk_loss(*arguments)
        losses.append(loss)
        for name, value in chunk_values.items():
            values[name].append(value)
    return LinearLoss(torch.stack(losses).sum(), {name: torch.cat(parts) for name, parts in values.items()})


def _default_chunk_size(pairs: dict[str, tuple[torch.Tensor, Any]]) -> int:
    """Rows whose float32 logits fit the budget, for the widest head."""
    vocab_size = max(head.weight.shape[0] for _, head in pairs.values())
    return max(_MIN_ROWS, min(_MAX_ROWS, _CHUNK_BYTES // (4 * vocab_size)))


def _chunk_loss(
    hidden: dict[str, torch.Tensor],
    heads: dict[str, Any],
    terms: dict[str, Term],
    all_count: dict[str, bool],
    labels: torch.Tensor | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted sum of the terms on one chunk of rows, and the detached values."""
    device = next(iter(hidden.values())).device
    # The product in the autocast dtype, as the model's own head computes it; everything after it in float32
    inputs = {name: heads[name](states) for name, states in hidden.items()}
    if labels is not None:
        inputs["labels"] = labels
    loss = torch.zeros((), device=device)
    values = {}
    with torch.autocast(device.type, enabled=False):
        for name, term in terms.items():
            value = _term_values(term, all_count[name], [inputs[key] for key in term.inputs])
            if term.weights is not None:
                loss = loss + weighted_sum(value, term.weights)
            values[name] = value.detach()
    return loss, values


def _term_values(term: Term, all_count: bool, arguments: list[torch.Tensor]) -> torch.Tensor:
    """Per-row values, with gradient for the rows that carry weight."""
    if term.weights is not None and all_count:
        return term.function(*arguments)
    with torch.no_grad():
        values = term.function(*arguments)
    if term.weights is None:
        return values
    # Selected before the function: zero times the gradient of an infinite value would be NaN
    counted = term.weights != 0
    return values.masked_scatter(counted, term.function(*(argument[counted] for argument in arguments)))

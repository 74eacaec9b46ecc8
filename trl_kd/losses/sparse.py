"""A few tokens of each state: the teacher's most likely ones, and the student's logits at them.

The teacher's tokens of N states are `ids` and `log_probs`, both `(N, K)`: most likely first, log-probabilities over
the whole vocabulary, and `-inf` where a state has fewer than K (the id there is any).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch

from trl_kd.losses.linear import Term, default_chunk_size, linear_loss, product_dtype
from trl_kd.losses.predictions import log_sum_exp


# Rows of a head that one product takes at most
_UNION = {"cpu": 2**10, "cuda": 2**13}


@torch.no_grad()
def top_tokens(
    hidden: torch.Tensor, head: Any, k: int, chunk_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The most likely tokens of each state, in chunks of rows.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`):
            Hidden states.
        head ([`~modules.LMHead`]):
            Map from them to logits.
        k (`int`):
            Tokens per state, K; all, if the vocabulary is smaller.
        chunk_size (`int`, *optional*):
            Rows per chunk, as in [`linear_loss`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]` of shapes `(N, K)`: ids, and log-probabilities over the whole vocabulary in
        float32 (or float64), most likely first.

    Raises:
        ValueError: If `k` is less than 1.

    Examples:

    ```python
    >>> ids, log_probs = top_tokens(torch.ones(1, 1), LMHead(torch.tensor([[0.1], [0.7], [0.2]]).log()), k=2)
    >>> ids, log_probs.exp()
    (tensor([[1, 2]]), tensor([[0.7000, 0.2000]]))
    ```
    """
    if k < 1:
        raise ValueError(f"`k` is {k}, but it is a number of tokens. Set it to 1 or more.")
    k = min(k, len(head.weight))
    ids = torch.empty(len(hidden), k, dtype=torch.long, device=hidden.device)
    dtype = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
    log_probs = torch.empty(len(hidden), k, dtype=dtype, device=hidden.device)
    size = chunk_size or default_chunk_size({"head": (hidden, head)}, hidden.device)
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        logits = head(hidden[rows]).to(dtype)
        largest, ids[rows] = logits.topk(k, dim=1)
        log_probs[rows] = largest - logits.logsumexp(dim=1, keepdim=True)
    return ids, log_probs


def set_logits(hidden: torch.Tensor, head: Any, ids: torch.Tensor, chunk_size: int | None = None) -> torch.Tensor:
    r"""
    Logits of some tokens of each state, with gradient, without those of all others.

    The rows of the head that a few states need are put together once, and one product gives their logits; neither the
    logits of the whole vocabulary exist nor a copy of the head for each state.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`):
            Hidden states.
        head ([`~modules.LMHead`]):
            Map from them to logits.
        ids (`torch.Tensor` of shape `(N, K)`):
            Tokens of each state; the same one may come twice.
        chunk_size (`int`, *optional*):
            States of a product. By default as many as have 1,024 tokens together, on a GPU 8,192.

    Returns:
        `torch.Tensor` of shape `(N, K)`, in float32 (or float64). Gradient flows to hidden states and head.

    Examples:

    ```python
    >>> head = LMHead(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]))
    >>> set_logits(torch.tensor([[3.0, 4.0]]), head, torch.tensor([[2, 0]]))
    tensor([[14.,  3.]])
    ```
    """
    rows = chunk_size or max(16, _UNION["cpu" if hidden.device.type == "cpu" else "cuda"] // max(ids.shape[1], 1))
    dtype = product_dtype(hidden, head)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = _Gathered.apply(hidden, head.weight, ids, dtype, rows)
        if head.bias is not None:
            logits = logits + head.bias[ids].to(logits.dtype)
        logits = logits * head.scale
        return logits if head.soft_cap is None else head.soft_cap * torch.tanh(logits / head.soft_cap)


class _Gathered(torch.autograd.Function):
    """Products of each hidden state with its own rows of the weight."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype, rows: int
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, ids)
        ctx.dtype, ctx.rows = dtype, rows
        out = torch.empty(ids.shape, dtype=_wide(dtype), device=hidden.device)
        for chunk, union, columns in _chunks(ids, rows):
            products = hidden[chunk].to(dtype) @ weight.index_select(0, union).to(dtype).T
            out[chunk] = products.gather(1, columns)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, ids = ctx.saved_tensors
        boost, shrink = 1.0, 1.0
        if ctx.dtype == torch.float16 and len(ids) > 0:
            # It has nothing below 6e-8, where weights of one over the number of tokens are, and ends at 65,504
            boost = torch.exp2(-grad.abs().amax().clamp_min(2.0**-60).log2().floor())
            shrink = 2.0 ** -math.ceil(math.log2(min(ctx.rows, len(ids))))
        grad = grad * boost
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight, dtype=_wide(weight.dtype)) if ctx.needs_input_grad[1] else None
        for chunk, union, columns in _chunks(ids, ctx.rows):
            spread = grad.new_zeros(len(columns), len(union)).scatter_add_(1, columns, grad[chunk]).to(ctx.dtype)
            if of_hidden is not None:
                product = spread @ weight.index_select(0, union).to(ctx.dtype)
                of_hidden[chunk] = (product.to(grad.dtype) / boost).to(hidden.dtype)
            if of_weight is not None:
                states = hidden[chunk].to(ctx.dtype)
                product = torch.addmm(states.new_zeros(1), spread.T, states, beta=0.0, alpha=shrink)
                of_weight.index_add_(0, union, product.to(of_weight.dtype))
        if of_weight is not None:
            of_weight = of_weight.div_(boost * shrink).to(weight.dtype)
        return of_hidden, of_weight, None, None, None


def _chunks(ids: torch.Tensor, size: int) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Some states at a time: their slice, the tokens that they need, and where among these each state has its own."""
    for start in range(0, len(ids), size):
        chunk = slice(start, start + size)
        part = ids[chunk]
        if ids.device.type == "cpu":
            union, columns = torch.unique(part, return_inverse=True)
        else:  # how many different ones there are would have to be waited for
            union, columns = part.flatten(), torch.arange(part.numel(), device=ids.device).view(part.shape)
        yield chunk, union, columns


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def log_normaliser(hidden: torch.Tensor, head: Any, chunk_size: int | None = None) -> torch.Tensor:
    r"""
    Log-sum-exp of the logits of the whole vocabulary, with gradient; the logits exist some rows at a time, twice.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`):
            Hidden states.
        head ([`~modules.LMHead`]):
            Map from them to logits.
        chunk_size (`int`, *optional*):
            Rows per chunk, as in [`linear_loss`].

    Returns:
        `torch.Tensor` of shape `(N,)`, in float32 (or float64). Gradient flows to hidden states and head.

    Examples:

    ```python
    >>> log_normaliser(torch.zeros(1, 2), LMHead(torch.ones(4, 2)))  # ln 4
    tensor([1.3863])
    ```
    """
    return _LogNormaliser.apply(hidden, head.weight, head.bias, head, chunk_size)


class _LogNormaliser(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, head: Any, size: int | None
    ) -> torch.Tensor:
        # (The head itself would keep the graph of a weight that was gathered for it)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.head, ctx.size = head.detach(), size
        # The backward pass is outside of an autocast that the forward pass may be in
        ctx.autocast = torch.is_autocast_enabled(hidden.device.type), torch.get_autocast_dtype(hidden.device.type)
        pair = {"logits": (hidden, ctx.head)}
        return linear_loss(pair, {"value": Term(log_sum_exp, ("logits",))}, chunk_size=size).values["value"]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        leaves = [
            None if tensor is None else tensor.detach().requires_grad_(needed)
            for tensor, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        ]
        is_enabled, dtype = ctx.autocast
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        with torch.enable_grad(), torch.autocast(grad.device.type, dtype=dtype, enabled=is_enabled):
            head = type(ctx.head)(leaves[1], leaves[2], ctx.head.scale, ctx.head.soft_cap)
            terms = {"value": Term(log_sum_exp, ("logits",), weights=grad)}
            loss = linear_loss({"logits": (leaves[0], head)}, terms, chunk_size=ctx.size).loss
            found = iter(torch.autograd.grad(loss, wanted))
        return *(next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves), None, None

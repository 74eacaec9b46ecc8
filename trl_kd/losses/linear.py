"""Losses from hidden states and output heads: row by row, gradient in the forward pass, in constant memory.

Logits of a large vocabulary are the largest tensors of training, and an exact loss needs each of them once: a product
makes it, the objective turns it into its own gradient, and two more products take that to the hidden states and the
head. Nothing has to outlive its rows. So `linear_loss` goes through the tokens once:

    for each chunk of rows:          as many as matrix products like
        logits = head(hidden)        of every model, into buffers that all chunks share
        for each block of rows:      as many as the cache holds, the whole vocabulary of a row at once
            objectives               values out; the gradient overwrites the logits
        hidden.grad = logits' gradient @ weight;    weight.grad += logits' gradient' @ hidden

The backward pass only scales what is there. This is why row weights go in, and their weighted sum and detached per-row
values come out. The objectives are in `losses/fused.py`, what they see of a block in `losses/block.py`.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from trl_kd.losses.block import Block, Scratch
from trl_kd.losses.fused import fused_form, plain_form
from trl_kd.losses.on_set import OnSet
from trl_kd.losses.reduction import weighted_sum


# Bytes of one chunk's logits of one model, by device, and the bounds on its rows: small chunks lose matrix-product
# efficiency, large ones only memory
_CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**29}
_MIN_ROWS, _MAX_ROWS = 128, 1024
# Elements of a block: a handful of float32 buffers of this size stay in the cache of a CPU; elsewhere it bounds memory
_BLOCK_NUMEL = {"cpu": 2**17, "cuda": 2**27}
# Graphs of the compiled objectives in one process
_GRAPHS = 64
# Whether a product of bfloat16 can be added to a float32 sum in one kernel; 2.11 is where this was seen to be right
_ADDS_WIDE = torch.__version__ >= (2, 11)
# Rows of a half-precision head whose gradient is added at a time
_SLICE = 2**13


@dataclass(frozen=True)
class Term:
    r"""
    One objective, or one metric, of `linear_loss`.

    Args:
        function (`Callable`):
            Plain per-token function of logits, such as `forward_kl`; takes what `inputs` names, returns `(n,)`. The
            functions of this package, and a `functools.partial` that fixes their options by name, have a fused form.
            Any other is differentiated by autograd, one block of rows after the other, which is slower; its gradient
            may only flow to the logits, and it may be called twice on the same rows. Both forms get logits in float32
            (or float64).
        inputs (`tuple[str, ...]`, *optional*, defaults to `("student", "teacher")`):
            Names of the pairs whose logits the function takes, in order, and of labels (`"labels"`).
        weights (`torch.Tensor` of shape `(N,)`, *optional*):
            Constant weight of each row in the loss. `None` for a metric: its values are returned, it trains nothing.
    """

    function: Callable[..., torch.Tensor]
    inputs: tuple[str, ...] = ("student", "teacher")
    weights: torch.Tensor | None = None


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
    pairs: dict[str, tuple[torch.Tensor, Any | None]],
    terms: dict[str, Term],
    labels: torch.Tensor | dict[str, torch.Tensor] | None = None,
    chunk_size: int | None = None,
) -> LinearLoss:
    r"""
    Weighted sum of per-token objectives on the logits of several heads, in chunks of rows.

    Note:
        The gradient exists when this returns, so `backward` must run at most once, and has no derivative itself.

    Args:
        pairs (`dict[str, tuple[torch.Tensor, LMHead | None]]`):
            Hidden states of shape `(N, H)` and the head that maps them to logits `(N, V)`, by name. All have the same
            N; H and the dtype may differ. Gradient flows to hidden states and heads that require it. Without a head
            (`None`), the states are logits already.
        terms (`dict[str, Term]`):
            Objectives and metrics by name.
        labels (`torch.Tensor` of shape `(N,)` or `dict` of them, *optional*):
            Next tokens, for terms that take `"labels"`; several kinds of them by name, also of shape `(N, K)`.
        chunk_size (`int`, *optional*):
            Rows per chunk. By default 128, or as many (up to 1,024) as fit 32 MiB per model on a CPU, 512 MiB on a
            GPU.

    Returns:
        [`LinearLoss`]: the loss, and the detached per-row values.

    Raises:
        ValueError: If a term takes what is not there, the numbers of rows differ, or a function of the caller does not
            return one value per token or needs the gradient of something else.

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
    labels = labels if isinstance(labels, dict) else {} if labels is None else {"labels": labels}
    num_rows = _common_rows(pairs, terms, labels, chunk_size)
    used = {name for term in terms.values() for name in term.inputs} & set(pairs)
    weighted = {name for term in terms.values() if term.weights is not None for name in term.inputs}
    if not torch.is_grad_enabled():
        weighted = set()
    names = [name for name in pairs if name in used]
    run = _Run({name: pairs[name] for name in names}, terms, labels, num_rows, chunk_size)
    run.check_terms()
    tensors = []
    for name in names:
        hidden, head = pairs[name]
        leaves = (hidden, None, None) if head is None else (hidden, head.weight, head.bias)
        tensors += leaves if name in weighted else [None if leaf is None else leaf.detach() for leaf in leaves]
    with torch.autocast(run.device.type, enabled=False), run.compiling:
        loss = _GradientInForward.apply(run, *tensors)
    return LinearLoss(loss, run.values)


def _common_rows(
    pairs: dict[str, tuple[torch.Tensor, Any]], terms: dict[str, Term], labels: dict[str, torch.Tensor], size: Any
) -> int:
    """Number of rows; errors for calls that make no sense."""
    known = {*pairs, *labels}
    missing = sorted({name for term in terms.values() for name in term.inputs} - known)
    if missing or not terms:
        raise ValueError(
            f"The terms {sorted(terms)} take {missing or 'nothing'}, but there are {sorted(known)}. A term computes "
            "with what is there. Pass these pairs (and `labels`), or name others in `inputs`."
        )
    if size is not None and size < 1:
        raise ValueError(f"`chunk_size` is {size}, but it is a number of rows. Set it to 1 or more, or leave it out.")
    rows = {name: hidden.shape[0] for name, (hidden, _) in pairs.items()}
    rows.update({name: term.weights.shape[0] for name, term in terms.items() if term.weights is not None})
    rows.update({name: part.shape[0] for name, part in labels.items()})
    if len(set(rows.values())) > 1:
        raise ValueError(
            f"The numbers of rows differ: {rows}. Hidden states, labels and weights describe the same tokens. Select "
            "the same positions for all of them."
        )
    return next(iter(rows.values()))


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: "_Run", *tensors: torch.Tensor | None) -> torch.Tensor:
        loss, ctx.gradients, ctx.boost = run(ctx.needs_input_grad[1:])
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Taken, not kept: autograd can hand them on without a copy
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "`backward` of a `linear_loss` was called twice, but its gradient is made only once, in the forward "
                "pass, and handed over. Add up losses before `backward`, or compute the loss again."
            )
        factor = grad_output if ctx.boost is None else grad_output / ctx.boost
        is_one = factor.device.type == "cpu" and factor == 1.0
        found = []
        for index, dtype in enumerate(ctx.dtypes):
            gradient, gradients[index] = gradients[index], None
            if gradient is not None:
                # Scaled in the wider of both formats
                gradient = gradient.to(torch.promote_types(gradient.dtype, dtype))
                gradient = (gradient if is_one else gradient.mul_(factor)).to(dtype)
            found.append(gradient)
        return None, *found


class _Head:
    """One pair in one call: the operands of its products, the buffer of its logits, and its gradient so far."""

    def __init__(self, hidden: torch.Tensor, head: Any | None, rows: int):
        dtype = product_dtype(hidden, head)
        self.hidden, self.weight, self.bias = hidden.detach().to(dtype), None, None
        self.scale, self.soft_cap, self.vocab_size = 1.0, None, hidden.shape[1]
        if head is not None:
            self.weight = head.weight.detach().to(dtype)
            self.bias = None if head.bias is None else head.bias.detach().to(dtype)
            self.scale, self.soft_cap, self.vocab_size = float(head.scale), head.soft_cap, len(head.weight)
        self.gradients: list[torch.Tensor | None] = [None, None, None]
        self.rows, self._buffer, self.logits = rows, None, None

    def want(self, needs: tuple[bool, ...]) -> None:
        """Make room for the gradients of hidden states, weight and bias."""
        for index, tensor in enumerate((self.hidden, self.weight, self.bias)):
            if needs[index]:
                # Hidden states are done with their chunk; sums over chunks are float32 at least
                is_half_sum = index > 0 and tensor.dtype.itemsize < 4
                is_written_first = len(self.hidden) > 0 and index < 2 and not is_half_sum
                make = torch.empty_like if is_written_first else torch.zeros_like
                self.gradients[index] = make(tensor, dtype=torch.float32 if is_half_sum else tensor.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def is_trained(self) -> bool:
        return any(gradient is not None for gradient in self.gradients)

    def project(self, rows: slice) -> None:
        """Logits of some rows, but for the soft cap, which is part of the algebra on blocks."""
        states = self.hidden[rows]
        if self.weight is None and not self.is_trained:
            self.logits = states  # nobody will write to them
            return
        if self._buffer is None:
            self._buffer = states.new_empty(self.rows, self.vocab_size)
        out = self.logits = self._buffer[: len(states)]
        if self.weight is None:
            out.copy_(states)
            return
        bias, beta = (out, 0.0) if self.bias is None else (self.bias, self.scale)
        torch.addmm(bias, states, self.weight.T, beta=beta, alpha=self.scale, out=out)

    def pull_back(self, rows: slice) -> None:
        """Take the gradient at the logits, which is where these were, to what they were made of."""
        states, gradient = self.hidden[rows], self.logits
        of_hidden, of_weight, of_bias = self.gradients
        if self.weight is None:
            of_hidden[rows] = gradient
        elif of_hidden is not None:
            torch.addmm(of_hidden[rows], gradient, self.weight, beta=0.0, alpha=self.scale, out=of_hidden[rows])
        if of_weight is not None and of_weight.dtype == gradient.dtype:
            beta = 0.0 if rows.start == 0 else 1.0  # nothing is there yet
            torch.addmm(of_weight, gradient.T, states, beta=beta, alpha=self.scale, out=of_weight)
        elif of_weight is not None:
            self._add_half_products(of_weight, gradient, states)
        if of_bias is not None:
            of_bias.add_(gradient.sum(dim=0, dtype=of_bias.dtype), alpha=self.scale)

    def _add_half_products(self, total: torch.Tensor, gradient: torch.Tensor, states: torch.Tensor) -> None:
        """Add `gradient.T @ states` in half precision to a sum in float32, else some rows of the head at a time."""
        if _ADDS_WIDE and gradient.is_cuda and gradient.dtype == torch.bfloat16:
            torch.addmm(total, gradient.T, states, out_dtype=torch.float32, alpha=self.scale, out=total)
            return
        # A sum over rows may leave the range of float16, which ends at 65,504
        shrink = 2.0 ** -math.ceil(math.log2(self.rows)) if gradient.dtype == torch.float16 else 1.0
        for start in range(0, len(total), _SLICE):
            part = slice(start, start + _SLICE)
            out = states.new_empty(total[part].shape)
            torch.addmm(out, gradient[:, part].T, states, beta=0.0, alpha=shrink, out=out)
            total[part].add_(out, alpha=self.scale / shrink)


def product_dtype(hidden: torch.Tensor, head: Any | None) -> torch.dtype:
    """The dtype in which the model's own head would compute."""
    if head is None:
        return hidden.dtype
    device, weight = hidden.device.type, head.weight
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


class _Run:
    """One pass over the rows."""

    def __init__(
        self,
        pairs: dict[str, tuple[torch.Tensor, Any]],
        terms: dict[str, Term],
        labels: dict[str, torch.Tensor],
        num_rows: int,
        chunk_size: int | None,
    ):
        self.terms, self.labels, self.num_rows = terms, labels, num_rows
        self.device = next(iter(pairs.values()))[0].device
        self.size = min(chunk_size or default_chunk_size(pairs, self.device), max(num_rows, 1))
        self.heads = {name: _Head(hidden, head, self.size) for name, (hidden, head) in pairs.items()}
        is_double = any(head.dtype == torch.float64 for head in self.heads.values())
        self.dtype = torch.float64 if is_double else torch.float32
        self.fused = {name: fused_form(term.function) for name, term in terms.items()}
        forms = {name: form or plain_form(terms[name].function) for name, form in self.fused.items()}
        self.calls = {name: (form, terms[name].inputs) for name, form in forms.items()}
        self.caps = {name: head.soft_cap for name, head in self.heads.items()}
        self.wants_gradient = torch.is_grad_enabled()
        self.values: dict[str, torch.Tensor] = {}

        # What asks autograd inside is not compiled
        asks = any(form is None or isinstance(terms[name].function, OnSet) for name, form in self.fused.items())
        is_compiled = _can_compile(self.device) and not asks
        self.evaluate = _compiled_evaluate() if is_compiled else _evaluate
        # Each set of terms has a graph of its own, and beyond the usual 8 nothing would be compiled any more
        graphs = max(_GRAPHS, torch._dynamo.config.cache_size_limit) if is_compiled else 0
        self.compiling = torch._dynamo.config.patch(cache_size_limit=graphs) if is_compiled else nullcontext()
        vocab_size = max(head.vocab_size for head in self.heads.values())
        most = max(1, _for_device(_BLOCK_NUMEL, self.device) // vocab_size)
        self.block_rows = math.ceil(self.size / math.ceil(self.size / most))  # all about as large
        numel = 0 if is_compiled else min(self.block_rows, self.size) * vocab_size
        self.scratch = Scratch(numel, self.dtype, self.device)

    def check_terms(self) -> None:
        """Ask the plain functions whether they take these inputs and options, on no rows."""
        for name, term in self.terms.items():
            if self.fused[name] is not None:
                nothing = {name: torch.zeros(0, head.vocab_size) for name, head in self.heads.items()}
                for label, part in self.labels.items():
                    nothing[label] = torch.zeros((0, *part.shape[1:]), dtype=part.dtype)
                term.function(*(nothing[name] for name in term.inputs))

    def __call__(self, needs: tuple[bool, ...]) -> tuple[torch.Tensor, list[torch.Tensor | None], Any]:
        """The loss, the gradients of hidden states, weight and bias of each pair, and a factor on them."""
        for index, head in enumerate(self.heads.values()):
            head.want(needs[3 * index : 3 * index + 3])
        trained = [name for name, head in self.heads.items() if head.is_trained]
        weights, boost = self._weights(trained)
        self.values = {name: torch.empty(self.num_rows, dtype=self.dtype, device=self.device) for name in self.terms}
        for start in range(0, self.num_rows, self.size):
            chunk = slice(start, min(start + self.size, self.num_rows))
            for head in self.heads.values():
                head.project(chunk)
            self._run_objectives(chunk, weights, trained)
            for name in trained:
                self.heads[name].pull_back(chunk)
        loss = torch.zeros((), dtype=self.dtype, device=self.device)
        for name, term in self.terms.items():
            if term.weights is not None:
                loss += weighted_sum(self.values[name], term.weights)
        return loss, [gradient for head in self.heads.values() for gradient in head.gradients], boost

    def _weights(self, trained: list[str]) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Row weights of the terms whose gradient is wanted, and the power of two on them in float16."""
        weights = {}
        for name, term in self.terms.items():
            # The caller's functions are asked in any case, since they may hold parameters
            may_train = self.fused[name] is None or not set(trained).isdisjoint(term.inputs)
            if term.weights is not None and may_train and self.wants_gradient:
                weights[name] = term.weights.detach().to(self.dtype)
        if not weights or not self.num_rows or all(self.heads[n].dtype != torch.float16 for n in trained):
            return weights, None
        # A weight is about one over the number of tokens, and float16 has nothing below 6e-8
        largest = torch.stack([part.abs().max() for part in weights.values()]).max()
        boost = torch.exp2(-largest.clamp_min(2.0**-60).log2().floor())
        return {name: part * boost for name, part in weights.items()}, boost

    def _run_objectives(self, chunk: slice, weights: dict[str, torch.Tensor], trained: list[str]) -> None:
        """Values of all terms on a chunk; gradients in place of its logits."""
        for start in range(chunk.start, chunk.stop, self.block_rows):
            rows = slice(start, min(start + self.block_rows, chunk.stop))
            inside = slice(rows.start - chunk.start, rows.stop - chunk.start)
            logits = {name: head.logits[inside] for name, head in self.heads.items()}
            labels = {name: part[rows] for name, part in self.labels.items()}
            block_weights = {name: part[rows] for name, part in weights.items()}
            self.scratch.restart()
            values = self.evaluate(self.calls, logits, labels, block_weights, self.caps, trained, self.scratch)
            for name, value in values.items():
                self.values[name][rows] = value


def _evaluate(
    calls: dict[str, tuple[Callable, tuple[str, ...]]],
    logits: dict[str, torch.Tensor],
    labels: dict[str, torch.Tensor],
    weights: dict[str, torch.Tensor],
    caps: dict[str, float | None],
    trained: list[str],
    scratch: Scratch,
) -> dict[str, torch.Tensor]:
    """Values of all terms on one block; the gradient of the trained models' logits overwrites these."""
    found = {name: _capped(part, caps[name], scratch) for name, part in logits.items()}

    def run(is_careful: bool) -> tuple[Block, dict[str, torch.Tensor]]:
        block = Block(found, labels, set(trained), scratch, is_careful)
        return block, {name: form(block, weights.get(name), *names) for name, (form, names) in calls.items()}

    # Only a CPU can be asked without a wait how it went
    is_quick = scratch.device.type == "cpu" and scratch.numel > 0
    block, values = run(is_careful=not is_quick)
    if is_quick and not math.isfinite(sum(values.values()).sum().item()):
        block, values = run(is_careful=True)
    for name in trained:
        out, cap = logits[name], caps[name]
        is_final = cap is None and out.dtype == scratch.dtype
        gradient = block.gradient(name, out if is_final else scratch.like(out))
        if gradient is None:
            out.zero_()
            continue
        if cap is not None:  # d tanh(x) = 1 - tanh(x)^2
            x = found[name]
            gradient = gradient.mul_(torch.mul(x, x, out=scratch.like(x)).mul_(-1.0 / cap**2).add_(1.0))
        if gradient is not out:
            out.copy_(gradient)
    return values


def _capped(logits: torch.Tensor, cap: float | None, scratch: Scratch) -> torch.Tensor:
    """Logits in the dtype of the block, with the head's soft cap."""
    if logits.dtype != scratch.dtype:
        out = scratch.like(logits)
        logits = logits.to(scratch.dtype) if out is None else out.copy_(logits)
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


@functools.cache
def _compiled_evaluate() -> Callable:
    return partial(_evaluate_with_any_rows, torch.compile(_evaluate))


def _evaluate_with_any_rows(
    compiled: Callable, calls: Any, logits: Any, labels: Any, weights: Any, *others: Any
) -> Any:
    """One graph for blocks of all sizes, where the compiler would make a special one for the first."""
    for tensor in (*logits.values(), *weights.values(), *labels.values()):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    for tensor in labels.values():
        if tensor.dim() > 1:  # the teacher's tokens of each state, as many as the largest set has
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
    # A second vocabulary would make one graph for all of them, whose kernels are slower
    for tensor in logits.values():
        torch._dynamo.mark_static(tensor, 1)
    return compiled(calls, logits, labels, weights, *others)


def _can_compile(device: torch.device) -> bool:
    """Fused on a GPU; on a CPU, blocks in the cache do as well and need no compiler."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


@torch.no_grad()
def top1(hidden: torch.Tensor, head: Any, chunk_size: int | None = None) -> torch.Tensor:
    r"""
    The most likely token of each row, in chunks of rows.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`):
            Hidden states.
        head ([`~modules.LMHead`]):
            Map from them to logits.
        chunk_size (`int`, *optional*):
            Rows per chunk, as in [`linear_loss`].

    Returns:
        `torch.Tensor` of shape `(N,)`: token ids; the first of those that are equally likely.

    Examples:

    ```python
    >>> top1(torch.eye(2), LMHead(torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 3.0]])))
    tensor([1, 2])
    ```
    """
    size = chunk_size or default_chunk_size({"head": (hidden, head)}, hidden.device)
    return torch.cat([head(part).argmax(dim=1) for part in hidden.split(size)])


def default_chunk_size(pairs: dict[str, tuple[torch.Tensor, Any]], device: torch.device) -> int:
    """Rows of a chunk: what fits the budget, for the widest head."""
    size = max(
        (hidden.shape[1] if head is None else len(head.weight)) * product_dtype(hidden, head).itemsize
        for hidden, head in pairs.values()
    )
    return max(_MIN_ROWS, min(_MAX_ROWS, _for_device(_CHUNK_BYTES, device) // size))


def _for_device(table: dict[str, int], device: torch.device) -> int:
    """Entry of a kind of device; accelerators are alike."""
    return table["cpu" if device.type == "cpu" else "cuda"]

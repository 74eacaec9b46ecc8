"""What a forward, a backward and a generation keep in memory, found by running them on tensors without numbers.

Every operation of the real model runs, on PyTorch's fake tensors, which have shapes and lifetimes but nothing in them.
So gradient checkpointing, adapters, autocast and the kernel of the attention count as they are, and no formula has to
know the architecture. Layers are alike: two models with few layers tell what each one adds.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode  # torch has no public door to them
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from trl_kd.checks.weights import ModelPlan
from trl_kd.modules.lm_head import LMHead, last_hidden_states


# Bytes by what they are for
Bytes = dict[str, int]
# Bytes at the peak of each part of a step
Marks = dict[str, Bytes]


class LiveBytes(TorchDispatchMode):
    r"""
    Counts the bytes of all tensors that are alive, by what they are for, and keeps the largest count.
    """

    def __init__(self):
        super().__init__()
        self.live: Bytes = {}
        self.peak: Bytes = {}
        self._name = "activations"
        self._known: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # A model asks what a value is, mostly whether a mask hides anything: as it does in a padded batch
            return False if args[0].dtype == torch.bool else 0
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        if sum(self.live.values()) > sum(self.peak.values()):
            self.peak = dict(self.live)
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self._known:
            self._known[key] = self._name, storage.nbytes()
            self.live[self._name] = self.live.get(self._name, 0) + storage.nbytes()
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        name, size = self._known.pop(key)
        self.live[name] -= size

    def rename(self, tensor: torch.Tensor, name: str) -> None:
        """From now on, this tensor is there for something else."""
        key = id(tensor.untyped_storage())
        old, size = self._known[key]
        self._known[key] = name, size
        self.live[old] -= size
        self.live[name] = self.live.get(name, 0) + size

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        """What is made inside is there for this."""
        before, self._name = self._name, name
        try:
            yield
        finally:
            self._name = before

    def mark(self) -> Bytes:
        """The peak since the last mark, without the weights."""
        peak, self.peak = self.peak, dict(self.live)
        return {name: size for name, size in peak.items() if name != "weights"}


@dataclass(frozen=True)
class LossCall:
    r"""
    One call of `linear_loss`, as far as memory goes.

    Args:
        workspace (`int`):
            Bytes that it needs until it returns.
        dtype (`torch.dtype`):
            In which products are made.
        share (`float`, *optional*, defaults to `1.0`):
            Share of the trained tokens.
        trains_head (`bool`, *optional*, defaults to `True`):
            Whether the student's head gets a gradient here, if it is trained at all.
        width (`int`, *optional*):
            Width of the space that the student's states are projected into before.
    """

    workspace: int
    dtype: torch.dtype
    share: float = 1.0
    trains_head: bool = True
    width: int | None = None


@dataclass(frozen=True)
class StepShape:
    r"""
    What a training step reads, and how.

    Args:
        batch (`int`), length (`int`):
            Rows of a micro-batch and tokens of a row.
        tokens (`int`):
            Trained tokens of a micro-batch.
        calls (`tuple[LossCall, ...]`):
            The loss.
        before_loss (`int`, *optional*, defaults to `0`):
            Bytes that are needed for a while between the student's forward and the loss.
        vocab_size (`int`, *optional*):
            Rows that the head is cut to.
        autocast (`bool`, *optional*, defaults to `False`):
            Whether it runs in bfloat16 autocast.
        checkpointing (`dict[str, Any]`, *optional*):
            Options of gradient checkpointing; `None` for none.
        accumulates (`bool`, *optional*, defaults to `False`):
            Whether gradients of an earlier micro-batch are there.
    """

    batch: int
    length: int
    tokens: int
    calls: tuple[LossCall, ...]
    before_loss: int = 0
    vocab_size: int | None = None
    autocast: bool = False
    checkpointing: tuple[tuple[str, Any], ...] | None = None
    accumulates: bool = False


class _GradientInForward(torch.autograd.Function):
    """The memory of `linear_loss`: gradients are made beside the loss, and handed over in the backward pass."""

    @staticmethod
    def forward(ctx: Any, live: LiveBytes, call: LossCall, hidden: torch.Tensor, weight: Any) -> torch.Tensor:
        with live.named("loss workspace"):
            gradients = [torch.empty_like(hidden, dtype=call.dtype), None]
            if weight is not None and ctx.needs_input_grad[3]:
                # Sums over chunks of rows are float32 at least
                wide = torch.promote_types(call.dtype, torch.float32)
                gradients[1] = torch.empty(weight.shape, dtype=wide)
            torch.empty(call.workspace, dtype=torch.uint8)
        ctx.gradients, ctx.dtypes = gradients, [hidden.dtype, None if weight is None else weight.dtype]
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        found = []
        for index, dtype in enumerate(ctx.dtypes):
            part, gradients[index] = gradients[index], None
            found.append(None if part is None else part.to(dtype))
        return None, None, *found


def training_marks(plan: ModelPlan, shape: StepShape) -> Marks:
    r"""
    Bytes at the peaks of a micro-batch's forward, loss and both halves of its backward, beside the weights.

    Args:
        plan ([`ModelPlan`]):
            The student.
        shape ([`StepShape`]):
            The step.

    Returns:
        `dict[str, dict[str, int]]`: `"forward"`, `"loss"`, `"backward"`, `"end"`, each `"activations"`, `"gradients"`
        and `"loss workspace"`.
    """
    return _of_all_layers(plan, ("training", shape), lambda model, live: _train(model, live, shape))


def inference_marks(plan: ModelPlan, batch: int, length: int, autocast: bool) -> Marks:
    """Bytes at the peak of a forward without gradient, `"forward"`, beside the weights."""

    def run(model: nn.Module, live: LiveBytes) -> Marks:
        model.eval()
        with torch.no_grad(), _autocast(autocast):
            last_hidden_states(model, **_rows(batch, length))
        return {"forward": live.mark()}

    return _of_all_layers(plan, ("inference", batch, length, autocast), run)


def generation_marks(plan: ModelPlan, batch: int, prompt: int, length: int, autocast: bool) -> Marks:
    r"""
    Bytes at the peaks of a generation, beside the weights: of the first forward, and of the last step.

    Args:
        plan ([`ModelPlan`]):
            The model.
        batch (`int`):
            Prompts that are continued at a time.
        prompt (`int`):
            Tokens of the longest prompt.
        length (`int`):
            The same with its completion.
        autocast (`bool`):
            Whether it runs in bfloat16 autocast.

    Returns:
        `dict[str, dict[str, int]]`: `"prefill"` and `"decode"`, each `"activations"` and `"KV cache"`.
    """

    def run(model: nn.Module, live: LiveBytes) -> Marks:
        model.eval()
        marks = {}
        with torch.no_grad(), _autocast(autocast):
            cache = DynamicCache(config=model.config)
            _extend(model, batch, prompt, cache, prompt)
            marks["prefill"] = _with_cache(live.mark(), cache)
            cache = DynamicCache(config=model.config)
            _extend(model, batch, length - 1, cache, length - 1)
            live.mark()
            logits = _extend(model, batch, 1, cache, length)
            # `generate` takes logits to float32 and samples from their softmax
            probs = torch.softmax(logits.float(), dim=-1)
            torch.multinomial(probs, 1)
            marks["decode"] = _with_cache(live.mark(), cache)
        return marks

    return _of_all_layers(plan, ("generation", batch, prompt, length, autocast), run)


def _extend(model: nn.Module, batch: int, tokens: int, cache: DynamicCache, length: int) -> torch.Tensor:
    """Logits of the last of some new tokens, `(B, V)`."""
    inputs = _rows(batch, tokens) | {"attention_mask": torch.ones(batch, length, dtype=torch.long)}
    return model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]


def _with_cache(sizes: Bytes, cache: DynamicCache) -> Bytes:
    """The cache as a part of its own."""
    kept = [value for layer in cache.layers for value in vars(layer).values()]  # keys and values, or a linear state
    size = sum(value.untyped_storage().nbytes() for value in tree_leaves(kept) if isinstance(value, torch.Tensor))
    return {"activations": sizes["activations"] - size, "KV cache": size}


def _rows(batch: int, length: int) -> dict[str, torch.Tensor]:
    names = ("input_ids", "attention_mask")
    return {name: torch.ones(batch, length, dtype=torch.long) for name in names}


def _autocast(is_on: bool) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16) if is_on else nullcontext()


def _train(model: nn.Module, live: LiveBytes, shape: StepShape) -> Marks:
    model.train()
    if shape.checkpointing is not None:
        # What Transformers takes where nothing is given; and there is no random state to keep
        options = dict(shape.checkpointing) or {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options | {"preserve_rng_state": False})
    for parameter in model.parameters():
        if parameter.requires_grad:
            _watch_gradient(parameter, live, shape.accumulates)
    marks: Marks = {}
    _mark_in_the_middle(model, live, marks)
    live.mark()
    with _autocast(shape.autocast):
        hidden = last_hidden_states(model, **_rows(shape.batch, shape.length))
        hidden = hidden.flatten(0, 1).index_select(0, torch.zeros(shape.tokens, dtype=torch.long))
        marks["forward"] = live.mark()
        with live.named("loss workspace"):
            torch.empty(shape.before_loss, dtype=torch.uint8)
        loss = _loss(model, live, shape, hidden)
        del hidden
        marks["loss"] = live.mark()
    loss.backward()
    last = live.mark()
    return {"backward": last} | marks | {"end": last}


def _loss(model: nn.Module, live: LiveBytes, shape: StepShape, hidden: torch.Tensor) -> torch.Tensor:
    head = LMHead.of(model)
    weight = head.cut(shape.vocab_size or len(head.weight)).weight
    losses = []
    for call in shape.calls:
        states = hidden
        if call.share < 1.0:
            states = hidden.index_select(0, torch.zeros(round(call.share * len(hidden)), dtype=torch.long))
        if call.width is not None:
            with torch.autocast("cpu", enabled=False):
                states = nn.functional.linear(states.float(), torch.empty(call.width, states.shape[1]))
        losses.append(_GradientInForward.apply(live, call, states, weight if call.trains_head else None))
    return torch.stack(losses).sum()


def _watch_gradient(parameter: nn.Parameter, live: LiveBytes, is_there: bool) -> None:
    if is_there:
        with live.named("gradients"):
            parameter.grad = torch.empty_like(parameter)
    else:
        parameter.register_post_accumulate_grad_hook(lambda p: live.rename(p.grad, "gradients"))


def _mark_in_the_middle(model: nn.Module, live: LiveBytes, marks: Marks) -> None:
    """A mark when the backward pass is half done: what it needs is largest at its start or at its end."""
    layers = _layers(model)
    if layers is None:
        return

    def middle(gradient: torch.Tensor) -> None:
        marks.setdefault("backward", live.mark())

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        tensor = output if isinstance(output, torch.Tensor) else output[0]
        if tensor.requires_grad:
            tensor.register_hook(middle)

    layers[(len(layers) - 1) // 2].register_forward_hook(hook)


def _layers(model: nn.Module) -> nn.ModuleList | None:
    """The decoder's layers."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [part for part in model.get_decoder().children() if isinstance(part, nn.ModuleList)]
    return next((part for part in lists if len(part) == count), None)


# Kinds of layers that differ in what their cache keeps alone
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_KNOWN: dict[tuple, Marks] = {}


def _of_all_layers(plan: ModelPlan, what: tuple, run: Callable[[nn.Module, LiveBytes], Marks]) -> Marks:
    """Marks of the whole model, from those of two with few layers where that is enough."""
    key = (*plan.key(), *what)
    if key not in _KNOWN:
        count = plan.config.get_text_config().num_hidden_layers
        few, more = _few_layers(plan, has_cache=what[0] == "generation")
        if more >= count:
            _KNOWN[key] = _run(plan, None, run)
        else:
            steps = (count - few) / (more - few)
            _KNOWN[key] = _extended(_run(plan, few, run), _run(plan, more, run), steps)
    return _KNOWN[key]


def _few_layers(plan: ModelPlan, has_cache: bool) -> tuple[int, int]:
    """Two numbers of layers that have the kinds of all in their proportion; an adapter may be on some alone."""
    text = plan.config.get_text_config()
    kinds = text.to_dict().get("layer_types") or []
    if not has_cache and set(kinds) <= _ATTENTION:
        kinds = []
    period = next((p for p in range(1, len(kinds)) if all(k == kinds[i % p] for i, k in enumerate(kinds))), 1)
    only_some = plan.peft_config is not None and plan.peft_config.to_dict().get("layers_to_transform") is not None
    least = text.num_hidden_layers if only_some else max(2, period)
    return least, least + period


def _extended(few: Marks, more: Marks, steps: float) -> Marks:
    """Linear in the number of layers, each part of each mark."""
    return {
        mark: {
            name: max(0, round(few[mark].get(name, 0) + steps * (size - few[mark].get(name, 0))))
            for name, size in sizes.items()
        }
        for mark, sizes in more.items()
    }


def _run(plan: ModelPlan, num_layers: int | None, run: Callable[[nn.Module, LiveBytes], Marks]) -> Marks:
    model = plan.build(num_layers)
    live = LiveBytes()
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        with live.named("weights"):
            _materialise(model)
        return run(model, live)


def _materialise(model: nn.Module) -> None:
    """Fake tensors on a CPU in the place of the meta tensors: a device decides on autocast and on attention."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, tensor in list(module.named_parameters(recurse=False)):
            if id(tensor) not in made:  # tied weights stay tied
                new = torch.empty_like(tensor, device="cpu")
                made[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad)
            setattr(module, name, made[id(tensor)])
        for name, tensor in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty_like(tensor, device="cpu"))

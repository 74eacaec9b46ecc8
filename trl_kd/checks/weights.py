"""Models without numbers: what their weights take, what of them is trained, and what its optimizer keeps."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PretrainedConfig

from trl_kd._compat import is_peft_model


# bitsandbytes' own sizes: values that share a scale in 4 bit, and scales that share a second one
_BLOCK_4BIT, _BLOCK_OF_SCALES = 64, 256
# Its optimizers in 8 bit: values that share a scale, and the smallest tensor that is not kept in 32 bit
_BLOCK_8BIT, _SMALLEST_8BIT = 256, 4096
# The smallest tensor whose state is paged
_SMALLEST_PAGED = 100_000


@dataclass(frozen=True)
class ModelPlan:
    r"""
    A model as a run loads it, by its configuration alone.

    Args:
        config ([`~transformers.PretrainedConfig`]):
            Architecture.
        dtype (`torch.dtype`):
            Of the weights that are not quantised.
        bits (`int`, *optional*):
            4 or 8 for linear layers quantised by bitsandbytes.
        double_quant (`bool`, *optional*, defaults to `False`):
            Whether the scales of 4 bit are quantised too.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter on it.
        attention (`str`, *optional*):
            `attn_implementation`. Flash attention is planned as SDPA, which needs as much.
        is_trained (`bool`, *optional*, defaults to `True`):
            Whether it is a student. A teacher has no gradients.
    """

    config: PretrainedConfig
    dtype: torch.dtype
    bits: int | None = None
    double_quant: bool = False
    peft_config: Any = None
    attention: str | None = None
    is_trained: bool = True

    def key(self) -> tuple:
        """Equal for equal plans."""
        adapter = None if self.peft_config is None else repr(sorted(self.peft_config.to_dict().items(), key=str))
        others = (self.dtype, self.bits, self.double_quant, adapter, self.attention, self.is_trained)
        shape = {name: value for name, value in self.config.to_dict().items() if name != "_name_or_path"}
        return (type(self.config).__name__, repr(sorted(shape.items())), *others)

    def build(self, num_layers: int | None = None) -> nn.Module:
        """The model on the meta device; with its first layers only, if a number is given."""
        config = copy.deepcopy(self.config)
        if num_layers is not None:
            _keep_layers(config, num_layers)
        attention = {"attn_implementation": "eager"} if self.attention == "eager" else {}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype, **attention)
            if self.peft_config is not None:
                model = _with_adapter(model, self.peft_config)
        if self.bits is not None:
            _quantise(model, self.bits, self.double_quant)
            for name, parameter in model.named_parameters():
                # As SFTTrainer does with the adapter of a quantised student
                if parameter.requires_grad and self.peft_config is not None and "lora_magnitude_vector" not in name:
                    parameter.data = parameter.data.to(torch.bfloat16)
        if not self.is_trained:
            model.requires_grad_(False)
        return model


def _keep_layers(config: PretrainedConfig, num_layers: int) -> None:
    text = config.get_text_config()
    kinds = text.to_dict().get("layer_types")
    text.num_hidden_layers = num_layers
    if kinds is not None:
        text.layer_types = kinds[:num_layers]


def _with_adapter(model: nn.Module, peft_config: Any) -> nn.Module:
    from peft import get_peft_model

    peft_config = copy.deepcopy(peft_config)
    if "init_lora_weights" in peft_config.to_dict():
        peft_config.init_lora_weights = True  # others read the weights, of which there are none
    return get_peft_model(model, peft_config)


class QuantisedLinear(nn.Module):
    r"""
    A linear layer that takes the memory of bitsandbytes', with nothing in it.

    Args:
        linear ([`~torch.nn.Linear`]):
            The layer whose place it takes.
        bits (`int`):
            4 or 8.
        double_quant (`bool`):
            Whether the scales of 4 bit are quantised too.
    """

    def __init__(self, linear: nn.Linear, bits: int, double_quant: bool):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self.dtype = linear.bias, linear.weight.dtype
        numel = linear.weight.numel()
        scales = math.ceil(numel / _BLOCK_4BIT)
        sizes = {"packed": math.ceil(numel * bits / 8)}
        if bits == 8:
            sizes["scales"] = 4 * self.out_features
        elif double_quant:
            sizes |= {"scales": scales, "second_scales": 4 * math.ceil(scales / _BLOCK_OF_SCALES)}
        else:
            sizes["scales"] = 4 * scales
        for name, size in sizes.items():
            self.register_buffer(name, torch.empty(size, dtype=torch.uint8, device=linear.weight.device))

    @property
    def weight(self) -> torch.Tensor:
        """The weight as it is made anew for each product."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=self.packed.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the quantised layer: in the dtype of the weight, back in that of the input."""
        return _DequantisedProduct.apply(x.to(self.dtype), self, self.bias).to(x.dtype)


class _DequantisedProduct(torch.autograd.Function):
    """A product that keeps neither the weight nor the input for its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantisedLinear, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient @ ctx.layer.weight.to(gradient.dtype), None, None


def _quantise(model: nn.Module, bits: int, double_quant: bool) -> None:
    """All linear layers but the head and those of an adapter, as Transformers quantises by bitsandbytes."""
    head, has_adapter = model.get_output_embeddings(), is_peft_model(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            is_adapter = has_adapter and type(child) is nn.Linear and child.weight.requires_grad
            if type(child) is nn.Linear and child is not head and not is_adapter:
                setattr(module, name, QuantisedLinear(child, bits, double_quant))


@dataclass(frozen=True)
class Trained:
    """A trained tensor: its size, and whether it is an embedding, whose states bitsandbytes keeps in 32 bit."""

    numel: int
    itemsize: int
    is_embedding: bool


@dataclass(frozen=True)
class Weights:
    r"""
    What a model's weights take.

    Args:
        frozen (`int`):
            Bytes of what is not trained, buffers included.
        trained (`tuple[Trained, ...]`):
            Tensors that are trained.
        has_adapter (`bool`):
            Whether these are an adapter's.
        rows (`int`), width (`int`), head_dtype (`torch.dtype`):
            Of the output head.
        largest (`int`):
            Bytes of the module with most weights of its own.
    """

    frozen: int
    trained: tuple[Trained, ...]
    has_adapter: bool
    rows: int
    width: int
    head_dtype: torch.dtype
    largest: int

    @property
    def trained_bytes(self) -> int:
        """Bytes of the trained weights, and as many of their gradients."""
        return sum(part.numel * part.itemsize for part in self.trained)

    @property
    def bytes(self) -> int:
        """Bytes of all weights."""
        return self.frozen + self.trained_bytes

    @property
    def head(self) -> int:
        """Bytes of the output head."""
        return self.rows * self.width * self.head_dtype.itemsize


_KNOWN: dict[tuple, Weights] = {}


def weights_of(plan: ModelPlan) -> Weights:
    r"""
    What the weights of a model take, counted on the meta device.

    Args:
        plan ([`ModelPlan`]):
            The model.

    Returns:
        [`Weights`]
    """
    key = plan.key()
    if key not in _KNOWN:
        _KNOWN[key] = _count(plan)
    return _KNOWN[key]


def _count(plan: ModelPlan) -> Weights:
    model = plan.build()
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    parameters = list(model.parameters())  # tied ones once
    buffers = sum(buffer.numel() * buffer.itemsize for buffer in model.buffers())
    head = model.get_output_embeddings()
    own = [
        sum(t.numel() * t.itemsize for t in (*m.parameters(recurse=False), *m.buffers(recurse=False)))
        for m in model.modules()
    ]
    return Weights(
        frozen=buffers + sum(p.numel() * p.itemsize for p in parameters if not p.requires_grad),
        trained=tuple(Trained(p.numel(), p.itemsize, id(p) in embeddings) for p in parameters if p.requires_grad),
        has_adapter=is_peft_model(model),
        rows=head.out_features,
        width=head.in_features,
        head_dtype=head.weight.dtype,
        largest=max(own),
    )


@dataclass(frozen=True)
class OptimizerBytes:
    """States on the device, states that move to host memory when it is short, and temporaries of a step."""

    states: int
    pageable: int
    step: int


# Numbers per parameter in states of the parameter's own dtype
_OWN_DTYPE = {"sgd": 0, "rmsprop": 1, "adagrad": 1}
# The same of bitsandbytes' optimizers, in 32 or 8 bit
_BITSANDBYTES = {"adamw": 2, "ademamix": 3, "lion": 1, "rmsprop": 1}


def optimizer_bytes(name: str, trained: tuple[Trained, ...], device_type: str) -> OptimizerBytes:
    r"""
    What an optimizer of the Trainer keeps for these tensors.

    An optimizer that is not known here (GaLore, APOLLO and the like keep less) is planned as AdamW.

    Args:
        name (`str`):
            `optim` of the training arguments.
        trained (`tuple[Trained, ...]`):
            Trained tensors.
        device_type (`str`):
            `"cuda"` or `"cpu"`.

    Returns:
        [`OptimizerBytes`]
    """
    largest = max((part.numel * part.itemsize for part in trained), default=0)
    family = name.removeprefix("paged_").split("_")[0]
    is_bitsandbytes = name.startswith("paged_") or name == "lion_32bit" or "bnb" in name
    is_bitsandbytes |= name.endswith("_8bit") and "torch" not in name and family in _BITSANDBYTES
    if is_bitsandbytes or name == "ademamix":
        sizes = [(_bitsandbytes_state(family, "8bit" in name, part), part) for part in trained]
        paged = sum(size for size, part in sizes if name.startswith("paged_") and part.numel >= _SMALLEST_PAGED)
        return OptimizerBytes(sum(size for size, _ in sizes) - paged, paged, 0)
    total = sum(part.numel * part.itemsize for part in trained)
    if name == "adafactor":  # rows and columns of each matrix; a step squares a gradient in float32
        step = 3 * max((part.numel for part in trained), default=0) * 4
        return OptimizerBytes(total // 100, 0, step)
    if family in _OWN_DTYPE:
        return OptimizerBytes(total * _OWN_DTYPE[family], 0, largest)
    if name in ("adamw_torch_8bit", "adamw_torch_4bit"):
        bits = 8 if "8bit" in name else 4
        return OptimizerBytes(
            sum(math.ceil(part.numel * (2 * bits / 8 + 8 / 256)) for part in trained), 0, 2 * largest
        )
    # Fused, AdamW works in place; else a GPU takes roots of all second moments at a time, a CPU one after the other
    step = 0 if name == "adamw_torch_fused" else total if device_type == "cuda" else 2 * largest
    return OptimizerBytes(2 * total, 0, step)


def _bitsandbytes_state(family: str, in_8bit: bool, part: Trained) -> int:
    numbers = _BITSANDBYTES.get(family, 2)
    if not in_8bit or part.is_embedding or part.numel < _SMALLEST_8BIT:
        return 4 * numbers * part.numel
    return numbers * (part.numel + 4 * math.ceil(part.numel / _BLOCK_8BIT))

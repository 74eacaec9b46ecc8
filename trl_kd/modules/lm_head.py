"""The output head of a causal language model as one small object, and the hidden states that feed it.

A loss that projects hidden states itself, chunk by chunk, must compute what the model would have: `head(hidden)`
equals the model's own logits. `check_head` makes sure of that before anything is trained.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class LMHead:
    r"""
    Map from last hidden states to logits: `soft_cap * tanh(scale * (W h + b) / soft_cap)`.

    Args:
        weight (`torch.Tensor` of shape `(V, H)`):
            Output embeddings, plain and dense.
        bias (`torch.Tensor` of shape `(V,)`, *optional*):
            Bias of the logits.
        scale (`float`, *optional*, defaults to `1.0`):
            Factor on the logits (Cohere multiplies, Granite divides).
        soft_cap (`float`, *optional*):
            Bound on the size of the logits (Gemma).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        r"""
        Logits of hidden states.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., H)`):
                Last hidden states, after the final norm.

        Returns:
            `torch.Tensor` of shape `(..., V)`, in the head's dtype or in the autocast dtype.
        """
        if not torch.is_autocast_enabled(hidden_states.device.type):
            hidden_states = hidden_states.to(self.weight.dtype)
        logits = F.linear(hidden_states, self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits

    def cut(self, vocab_size: int) -> "LMHead":
        r"""
        The same head for the first `vocab_size` tokens, as views: gradients reach the whole weight.

        Args:
            vocab_size (`int`):
                Number of tokens to keep, at most V.

        Returns:
            [`LMHead`]
        """
        if vocab_size == self.weight.shape[0]:
            return self
        bias = None if self.bias is None else self.bias[:vocab_size]
        return replace(self, weight=self.weight[:vocab_size], bias=bias)

    def at(self, ids: torch.Tensor) -> "LMHead":
        """The same head for some tokens only, as a copy: gradients reach the whole weight."""
        bias = None if self.bias is None else self.bias[ids]
        return replace(self, weight=self.weight[ids], bias=bias)

    def tempered(self, temperature: float) -> "LMHead":
        """The head whose logits are those of this one, divided by a temperature."""
        soft_cap = None if self.soft_cap is None else self.soft_cap / temperature
        return replace(self, scale=self.scale / temperature, soft_cap=soft_cap)

    def detach(self) -> "LMHead":
        """The same head without gradient."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def meta(self) -> "LMHead":
        """The same head without its numbers, to plan with."""
        return replace(self, weight=self.weight.to("meta"), bias=None if self.bias is None else self.bias.to("meta"))

    @classmethod
    def of(cls, model: nn.Module) -> "LMHead":
        r"""
        Output head of a causal language model, PEFT-wrapped or not.

        Tied and `modules_to_save` heads keep their gradient; sharded weights are gathered, quantised ones dequantised.

        Args:
            model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                The model, unwrapped (no DDP).

        Returns:
            [`LMHead`]

        Raises:
            ValueError: If the model has no output embeddings.
        """
        from trl_kd._compat import plain_bias, plain_weight

        module = model.get_output_embeddings()
        if module is None:
            raise ValueError(
                f"{type(model).__name__} has no output embeddings, so there are no next-token logits to distil. Use a "
                "causal language model."
            )
        config = model.config.get_text_config().to_dict()
        # Names in transformers: Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`
        scale = float(config.get("logit_scale") or 1.0) / float(config.get("logits_scaling") or 1.0)
        return cls(plain_weight(module), plain_bias(module), scale, config.get("final_logit_softcapping"))


def last_hidden_states(model: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    r"""
    Last hidden states of the model's own forward, without the logits of every position.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, unwrapped (no DDP).
        inputs (`dict[str, torch.Tensor]`):
            What its forward takes: `input_ids` of shape `(B, S)`, `attention_mask`, `position_ids`.

    Returns:
        `torch.Tensor` of shape `(B, S, H)`
    """
    return _hidden_states_and_logits(model, logits_to_keep=1, **inputs)[0]


def _hidden_states_and_logits(model: nn.Module, **inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward of the whole model; a hook on the decoder keeps what goes into the head."""
    kept = []
    hook = model.get_decoder().register_forward_hook(lambda module, args, output: kept.append(output[0]))
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    return kept[-1], logits


@torch.no_grad()
def check_head(model: nn.Module, role: str) -> None:
    r"""
    Make sure that `LMHead.of(model)` computes the model's own logits; train nothing wrong.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, unwrapped and not sharded.
        role (`str`):
            `"student"` or `"teacher"`, for the message.

    Raises:
        NotImplementedError: If the logits differ, the model's forward cannot be used this way, or a PEFT adapter sits
            on the head.
    """
    from trl_kd._compat import brought_back, has_adapter, input_device, is_peft_model

    if is_peft_model(model) and has_adapter(model.get_output_embeddings()):
        # No comparison of logits finds it: a new adapter is zero
        raise NotImplementedError(
            f"The {role} {type(model).__name__} (`{model.config.model_type}`) has a PEFT adapter on its output head. "
            "The losses read the weight of the head, so the adapter would be ignored and never trained. Remove the "
            "head from `target_modules`, or train it in full through `modules_to_save`."
        )
    num_ids = model.get_input_embeddings().weight.shape[0]
    input_ids = torch.arange(1, 7, device=input_device(model)).unsqueeze(0) % num_ids
    reason = None
    try:
        hidden, logits = _hidden_states_and_logits(model, input_ids=input_ids)
        with brought_back(model.get_output_embeddings()):
            computed = LMHead.of(model)(hidden).float()
    except (AttributeError, TypeError, IndexError) as error:
        reason = str(error)
    else:
        error = (computed - logits.float()).abs().max() / logits.float().abs().max().clamp_min(1e-6)
        # Six positions in a half dtype differ by rounding only: 2^-8 of bfloat16, a few times over
        tolerance = 1e-4 if logits.dtype in (torch.float32, torch.float64) else 4e-2
        if torch.isfinite(logits).all() and error > tolerance:
            reason = f"its logits differ from head(hidden states) by {error.item():.1e} of their size"
        elif hidden.shape[1] != input_ids.shape[1]:  # PEFT's prompt learning adds virtual tokens
            reason = f"its last hidden states have {hidden.shape[1]} positions for {input_ids.shape[1]} tokens"
    if reason is not None:
        raise NotImplementedError(
            f"The {role} {type(model).__name__} (`{model.config.model_type}`) is not supported: {reason}. The losses "
            "compute logits from the last hidden states and the output embeddings, so training would use wrong "
            "numbers. Use a decoder-only model whose logits are a linear map of its last hidden states."
        )

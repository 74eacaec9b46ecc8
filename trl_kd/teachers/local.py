"""A teacher that runs here: a model object, or a path or Hub name to load."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn as nn
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging

from trl_kd import _compat
from trl_kd.generation.rollouts import Sampling, generate_completions
from trl_kd.modules.lm_head import LMHead, check_head, last_hidden_states


logger = logging.get_logger(__name__)


class LocalTeacher:
    r"""
    A causal language model as the teacher. Frozen, in eval mode, never written to.

    A teacher source gives `hidden_states` and `head` for rows of tokens, and `generate` for prompts. The loss asks for
    nothing else, so another source (a cache, a server, the student's base without its adapter) can take its place.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Model, path or Hub name.
        init_kwargs (`dict[str, Any]`, *optional*):
            Arguments of [`~transformers.AutoModelForCausalLM.from_pretrained`] for a path or name. `dtype` defaults to
            `"auto"`, the dtype of the checkpoint. `load_in_4bit` and `load_in_8bit` are shorthands for bitsandbytes.

    Raises:
        ValueError: If the model cannot be loaded.
        TypeError: If `model` is neither a string nor a model.
    """

    def __init__(self, model: Any, init_kwargs: dict[str, Any] | None = None):
        self._source_kwargs = _source(init_kwargs or {})
        if isinstance(model, str):
            self.name = model
            self.model = _load(model, dict(init_kwargs or {}))
        elif isinstance(model, nn.Module):
            if init_kwargs:
                logger.warning(
                    "`teacher_model_init_kwargs` is ignored: the teacher is a model already. Pass its path instead, "
                    "or drop the argument."
                )
            self.name = _compat.config_model_id(model)
            self.model = model
        else:
            raise TypeError(
                f"`teacher_model` is a {type(model).__name__}, but a teacher is a model or the path or Hub name of "
                "one."
            )
        self.model.requires_grad_(False)
        self.model.eval()
        _compat.keep_4bit_layout(self.model)
        self._vocab_size = None
        self._head = None
        self._autocast = nullcontext

    @property
    def revision(self) -> str | None:
        """Revision on the Hub that was asked for; `None` for the default one."""
        return self._source_kwargs.get("revision")

    @property
    def vocab_size(self) -> int:
        """Number of rows of the teacher's head, padding included."""
        return self.model.get_output_embeddings().out_features

    def tokenizer(self) -> Any | None:
        """The tokenizer saved beside the model, or `None` where there is none."""
        if not self.name:
            return None
        try:
            return AutoTokenizer.from_pretrained(self.name, **self._source_kwargs)
        except (OSError, ValueError):
            return None

    def prepare(self, accelerator: Any, vocab_size: int | None = None) -> None:
        r"""
        Place the teacher for this run.

        Args:
            accelerator ([`~accelerate.Accelerator`]):
                The trainer's accelerator. The DeepSpeed and FSDP branches follow TRL's helpers and have not been run.
            vocab_size (`int`, *optional*):
                Size that its head is cut to.

        Raises:
            NotImplementedError: If `head(hidden_states)` would not give the model's own logits.
        """
        self._vocab_size = vocab_size
        self._autocast = accelerator.autocast
        if accelerator.distributed_type == "DEEPSPEED":
            from trl.models import prepare_deepspeed

            self.model = prepare_deepspeed(self.model, accelerator)
            return
        if any(parameter.is_meta for parameter in self.model.parameters()):
            raise ValueError(
                f"The teacher `{self.name}` does not fit the device and is partly offloaded, which is not supported. "
                'Load it in 4 bit (`teacher_model_init_kwargs={"load_in_4bit": True}`), take a smaller one, or train '
                "on completions that it wrote before (`trl-kd generate`) with another method."
            )
        if not _compat.is_placed(self.model):
            self.model.to(accelerator.device)
        with accelerator.autocast():  # some attention kernels take half dtypes only
            check_head(self.model, "teacher")
        if accelerator.distributed_type == "FSDP":
            from trl.models import prepare_fsdp

            self.model = prepare_fsdp(self.model, accelerator)
            return
        # Frozen, so its head is gathered, dequantised and cut once, and lies where the loss is computed
        head = self._current_head()
        weight = head.weight.to(accelerator.device)
        bias = None if head.bias is None else head.bias.to(accelerator.device)
        self._head = LMHead(weight, bias, head.scale, head.soft_cap)

    def _current_head(self) -> LMHead:
        head = LMHead.of(self.model).detach()
        return head if self._vocab_size is None else head.cut(self._vocab_size)

    @property
    def head(self) -> LMHead:
        """Output head, detached, cut to the shared vocabulary."""
        return self._head or self._current_head()

    @torch.no_grad()
    def hidden_states(self, **inputs: torch.Tensor) -> torch.Tensor:
        r"""
        Last hidden states of the teacher.

        Args:
            inputs (`dict[str, torch.Tensor]`):
                `input_ids` of shape `(B, S)`, and `attention_mask` or `position_ids`.

        Returns:
            `torch.Tensor` of shape `(B, S, H_t)`, on the device of the inputs.
        """
        source = inputs["input_ids"].device
        device = self.model.get_input_embeddings().weight.device
        hidden = last_hidden_states(self.model, **{name: tensor.to(device) for name, tensor in inputs.items()})
        return hidden.to(source)

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, pad_token_id: int, eos_token_ids: list[int], seed: int
    ) -> list[list[int]]:
        """Completions that the teacher writes, as in [`~generation.generate_completions`]."""
        with self._autocast():
            special = (pad_token_id, eos_token_ids)
            return generate_completions(self.model, prompts, sampling, *special, seed, self._vocab_size)


def _source(init_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those arguments that say where a model is; its config and its tokenizer take them too."""
    return {key: value for key, value in init_kwargs.items() if key in ("revision", "token", "trust_remote_code")}


def _load(path: str, init_kwargs: dict[str, Any]) -> nn.Module:
    """Load a teacher; one clear error if there is none."""
    in_4bit, in_8bit = init_kwargs.pop("load_in_4bit", False), init_kwargs.pop("load_in_8bit", False)
    if in_4bit or in_8bit:
        init_kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=in_4bit,
            load_in_8bit=in_8bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    init_kwargs.setdefault("dtype", "auto")
    device = PartialState().device
    try:
        config = AutoConfig.from_pretrained(path, **_source(init_kwargs)).to_dict()
        if device.type != "cpu" and ("quantization_config" in config or "quantization_config" in init_kwargs):
            # Quantised weights stay where they are loaded, and not every method loads them onto the GPU by itself
            init_kwargs.setdefault("device_map", {"": device})
        return AutoModelForCausalLM.from_pretrained(path, **init_kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The teacher `{path}` could not be loaded: {error}. Give a folder with `config.json` and weights, or the "
            "name of a causal language model on the Hub that this machine can reach."
        ) from error

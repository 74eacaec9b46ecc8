"""A teacher that runs here: a model object, or a path or Hub name to load."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn as nn
from accelerate import PartialState, cpu_offload
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging

from trl_kd import _compat
from trl_kd.generation.rollouts import Sampling, eos_token_ids, generate_completions
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
        device (`str`, *optional*):
            Where it computes, such as `"cpu"` or `"cuda:1"`; or `"offload"`: its weights wait in CPU memory and come
            to the training device layer by layer. By default it is with the student.

    Raises:
        ValueError: If the model cannot be loaded, or not on this device.
        TypeError: If `model` is neither a string nor a model.
    """

    def __init__(self, model: Any, init_kwargs: dict[str, Any] | None = None, device: str | None = None):
        self._source_kwargs = _source(init_kwargs or {})
        self._device = device
        if isinstance(model, str):
            self.name = model
            self.model = _load(model, dict(init_kwargs or {}), device)
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
        if device is not None and _compat.is_placed(self.model) and not isinstance(model, str):
            raise ValueError(
                f"`teacher_device` is '{device}', but the teacher is a model that stays where it was loaded (by a "
                "device map, or quantised). Load it there, or pass its path."
            )
        self.model.requires_grad_(False)
        self.model.eval()
        _compat.keep_4bit_layout(self.model)
        _compat.mend_adapter(self.model)
        self._input_device = None
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

    @property
    def context(self) -> int | None:
        """Positions that it has, if its configuration says so."""
        return _compat.context_length(self.model.config)

    def ends(self, tokenizer: Any) -> list[int]:
        """Ids by which it ends a completion, with the EOS of a tokenizer."""
        return eos_token_ids(self.model, tokenizer)

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
        self._input_device = None
        self._vocab_size = vocab_size
        self._autocast = accelerator.autocast
        if self._device is not None and accelerator.distributed_type in ("DEEPSPEED", "FSDP"):
            raise NotImplementedError(
                f"`teacher_device` is '{self._device}', but DeepSpeed and FSDP place the teacher themselves. Leave it "
                "out, or use DDP."
            )
        if accelerator.distributed_type == "DEEPSPEED":
            from trl.models import prepare_deepspeed

            self.model = prepare_deepspeed(self.model, accelerator)
            return
        if any(parameter.is_meta for parameter in self.model.parameters()):
            if not _compat.is_offloaded(self.model):
                raise ValueError(
                    f"The teacher `{self.name}` has no weights (it is on the meta device), so it knows nothing. Load "
                    "it, or pass its path."
                )
        elif self._device == "offload":
            cpu_offload(self.model, accelerator.device)
        elif not _compat.is_placed(self.model):
            self.model.to(self._device or accelerator.device)
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
        with _compat.brought_back(self.model.get_output_embeddings()):
            head = LMHead.of(self.model).detach()
        return head if self._vocab_size is None else head.cut(self._vocab_size)

    @property
    def head(self) -> LMHead:
        """Output head, detached, cut to the shared vocabulary."""
        return self._head or self._current_head()

    @property
    def heads(self) -> list[LMHead]:
        """The same in a list."""
        return [self.head]

    def input_embeddings(self) -> torch.Tensor:
        """Weight of the input embeddings `(V, H)`, where the loss is computed."""
        embeddings = self.model.get_input_embeddings()
        with _compat.brought_back(embeddings):
            return _compat.plain_weight(embeddings).detach().to(self.head.weight.device)

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
        if self._input_device is None:
            self._input_device = _compat.input_device(self.model)
        own = {name: tensor.to(self._input_device) for name, tensor in inputs.items()}
        hidden = last_hidden_states(self.model, **own)
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


def _load(path: str, init_kwargs: dict[str, Any], device: str | None) -> nn.Module:
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
    try:
        config = AutoConfig.from_pretrained(path, **_source(init_kwargs)).to_dict()
        is_quantised = "quantization_config" in config or "quantization_config" in init_kwargs
        if is_quantised and device == "offload":
            raise ValueError(
                "`teacher_device` is 'offload', but quantised weights stay where they are loaded. Offload the teacher "
                "in its own dtype, or let a quantised one be on the device."
            )
        place = torch.device(device) if device not in (None, "offload") else PartialState().device
        if is_quantised and place.type != "cpu":
            # Quantised weights stay where they are loaded, and not every method loads them onto the GPU by itself
            init_kwargs.setdefault("device_map", {"": place})
        return AutoModelForCausalLM.from_pretrained(path, **init_kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The teacher `{path}` could not be loaded: {error}. Give a folder with `config.json` and weights, or the "
            "name of a causal language model on the Hub that this machine can reach."
        ) from error

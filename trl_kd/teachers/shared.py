"""A teacher that is the student's own base: its adapter switched off, or another adapter on the same weights."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn as nn

from trl_kd import _compat
from trl_kd.generation.rollouts import Sampling, generate_completions
from trl_kd.modules.lm_head import LMHead, check_head, last_hidden_states


# What the adapter is called in the student's model if it is loaded from files
_NAME = "teacher"

# Starts of LoRA that take out of the base's weights what they put into the adapter
_TAKING = ("pissa", "olora", "corda", "loftq", "lora_ga")


class SharedTeacher:
    r"""
    The base under the student's adapter as the teacher, so that one copy of the weights is in memory.

    The student is trained through its adapter, so its base stays what it was. What the student's forward does is the
    same before and after the teacher has been asked: active adapters, gradients, and training mode.

    Args:
        adapter (`str`):
            `"base"` for the base without an adapter; else the name of an adapter that the student holds, or a folder
            or Hub name of a saved one for the same base.
        context (`int`, *optional*):
            Positions that the student has, which is not there yet.
    """

    revision = None

    def __init__(self, adapter: str, context: int | None = None):
        self.adapter, self.context = adapter, context
        self.model: Any = None
        self._active = None if adapter == "base" else adapter
        self._vocab_size: int | None = None
        self._head: LMHead | None = None
        self._autocast: Any = nullcontext

    @property
    def name(self) -> str:
        """Path or Hub name: of the base, or of the adapter."""
        if self._active is not None:
            return self.adapter
        return "" if self.model is None else _compat.config_model_id(self.model)

    def tokenizer(self) -> None:
        """None: it reads the student's tokens."""
        return None

    def ends(self, tokenizer: Any) -> list[int]:
        """Ids that end its completions beside those of the student."""
        return []

    def attach(self, student: nn.Module) -> None:
        r"""
        Take the student's base for the teacher's, and load the adapter if there is one to load.

        Args:
            student ([`~peft.PeftModel`]):
                The student.

        Raises:
            ValueError: If the student has no adapter, its adapter changes the base, or the teacher's cannot be had.
        """
        if not _compat.is_peft_model(student):
            raise ValueError(
                f"`teacher_adapter` is '{self.adapter}', but the student has no adapter: it is trained as a whole, so "
                "there is no base that stays as it was. Pass a `peft_config`, or a teacher of its own by "
                "`teacher_model`."
            )
        self.model = student
        for config in student.peft_config.values():
            self._check_config(config)
        adapters = set(student.peft_config)
        for name, parameter in student.named_parameters():
            if parameter.requires_grad and not adapters & set(name.split(".")):
                self._refuse(f"`{name}` is trained")
        if self._active is None:
            return
        if self.adapter in student.peft_config:
            if self.adapter in student.base_model.active_adapters:
                raise ValueError(
                    f"`teacher_adapter` is '{self.adapter}', which is the adapter that is trained. Name another one, "
                    "or 'base' for the base without adapters."
                )
        else:
            self._active = _NAME
            self._load(student)
        for name, parameter in student.named_parameters():
            if self._active in name.split("."):
                parameter.requires_grad_(False)

    def _load(self, student: nn.Module) -> None:
        from peft import PeftConfig

        held, path = ", ".join(f"'{name}'" for name in student.peft_config), os.path.expanduser(self.adapter)
        if _NAME in student.peft_config:
            raise ValueError(
                f"`teacher_adapter` is '{self.adapter}', which would be loaded as '{_NAME}', but the student holds an "
                "adapter of that name already. Name that one, or delete it."
            )
        try:
            config = PeftConfig.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`teacher_adapter` is '{self.adapter}', which could not be loaded: {error} Give 'base', an adapter "
                f"that the student holds ({held}), or a folder or Hub name with an `adapter_config.json`."
            ) from error
        self._check_config(config)  # such an adapter changes the student's base when it is loaded
        # PEFT 0.18 freezes the active adapter too where the new one is not to be trained
        trained = [(parameter, parameter.requires_grad) for parameter in student.parameters()]
        try:
            student.load_adapter(path, adapter_name=_NAME, is_trainable=False)
        except KeyError as error:  # PEFT 0.21 looks for trained tokens in every adapter of a model that has some
            raise ValueError(
                f"`teacher_adapter` is '{self.adapter}', which has no {error}: the student trains single tokens "
                "(`trainable_token_indices`), and PEFT loads no adapter without them beside it. Train its embeddings "
                "by an adapter, or pass a teacher of its own by `teacher_model`."
            ) from error
        except (OSError, RuntimeError, ValueError) as error:  # sizes that do not match, targets that are not there
            raise ValueError(
                f"`teacher_adapter` is '{self.adapter}', but it does not fit the student's base: "
                f"{str(error).splitlines()[-1].strip()} An adapter belongs to the model that it was trained on. Take "
                "one of the same base, or a teacher of its own by `teacher_model`."
            ) from error
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        _compat.mend_adapter(student)

    def _check_config(self, config: Any) -> None:
        """Refuse an adapter that comes with changes of the base."""
        settings = config.to_dict()
        start, bias = settings.get("init_lora_weights"), settings.get("bias", "none")
        if str(start).lower().startswith(_TAKING):
            self._refuse(f"an adapter has `init_lora_weights` '{start}', which takes from the base's weights")
        if bias != "none":
            self._refuse(f"an adapter has `bias` '{bias}', so that the base's own are trained")

    def _refuse(self, found: str) -> None:
        raise ValueError(
            f"`teacher_adapter` is '{self.adapter}', but {found}: the base under the adapters is then not the model "
            "that it was. Train an adapter that leaves the base alone, or pass a teacher of its own by "
            "`teacher_model`."
        )

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """The model is the teacher inside of this, and the student as it was afterwards."""
        model, base = self.model, self.model.base_model
        modes = [module for module in model.modules() if module.training]
        # PEFT gives every parameter of an adapter the same flag when it is switched
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        active = list(base.active_adapters)
        model.eval()
        try:
            # Not by `disable_adapter`, which first looks at every layer in Python, as long again as all of this
            base.disable_adapter_layers() if self._active is None else base.set_adapter(self._active)
            yield
        finally:
            base.enable_adapter_layers() if self._active is None else base.set_adapter(active)
            for parameter, flag in trained:
                parameter.requires_grad_(flag)
            for module in modes:
                module.training = True

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """The student's files are the student's: an adapter that was loaded or named is not saved with it."""
        configs = self.model.peft_config
        kept = configs.pop(self._active) if self._active is not None else None
        try:
            yield
        finally:
            if kept is not None:
                configs[self._active] = kept

    @property
    def vocab_size(self) -> int:
        """Number of rows of its head, padding included."""
        return self.model.get_output_embeddings().out_features

    def prepare(self, accelerator: Any, vocab_size: int | None = None) -> None:
        r"""
        Look at the head once; the weights are where the student's are.

        Args:
            accelerator ([`~accelerate.Accelerator`]):
                The trainer's accelerator.
            vocab_size (`int`, *optional*):
                Size that its head is cut to.

        Raises:
            NotImplementedError: If weights may be sharded (FSDP, DeepSpeed), or the adapter sits on the head.
        """
        if accelerator.distributed_type in ("DEEPSPEED", "FSDP"):
            raise NotImplementedError(
                "`teacher_adapter` asks the student's own weights a second time in a step, which DeepSpeed and FSDP "
                "may have put away by then; this has not been run. Use DDP or one GPU, or a teacher of its own."
            )
        self._vocab_size, self._autocast = vocab_size, accelerator.autocast
        with self.speaking(), accelerator.autocast(), torch.no_grad():
            check_head(self.model, "teacher")
            head = LMHead.of(self.model).detach()
        self._head = head if vocab_size is None else head.cut(vocab_size)

    @property
    def head(self) -> LMHead:
        """Output head, detached, cut to the shared vocabulary: the base's own weight, not a copy."""
        return self._head

    @property
    def heads(self) -> list[LMHead]:
        """The same in a list."""
        return [self._head]

    def input_embeddings(self) -> torch.Tensor:
        """Weight of the input embeddings `(V, H)`, as the teacher reads them."""
        with self.speaking():
            return _compat.plain_weight(self.model.get_input_embeddings()).detach()

    @torch.no_grad()
    def hidden_states(self, **inputs: torch.Tensor) -> torch.Tensor:
        r"""
        Last hidden states of the base under the teacher's adapter, or under none.

        Args:
            inputs (`dict[str, torch.Tensor]`):
                As of [`LocalTeacher.hidden_states`].

        Returns:
            `torch.Tensor` of shape `(B, S, H_t)`
        """
        with self.speaking():
            return last_hidden_states(self.model, **inputs)

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, pad_token_id: int, eos_token_ids: list[int], seed: int
    ) -> list[list[int]]:
        """Completions that it writes, as in [`~generation.generate_completions`]."""
        with self.speaking(), self._autocast():
            special = (pad_token_id, eos_token_ids)
            return generate_completions(self.model, prompts, sampling, *special, seed, self._vocab_size)

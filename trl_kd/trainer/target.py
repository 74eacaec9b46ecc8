"""A slow copy of the student, which values the next states in its place."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from trl_kd.modules.lm_head import LMHead, last_hidden_states
from trl_kd.trainer.objectives import has_temporal_difference
from trl_kd.trainer.tokens import SelectedTokens, model_inputs


_FILE = "target.safetensors"


class TargetStudent(TrainerCallback):
    r"""
    Exponential average of the student's trained weights, in float32; an adapter's, if only that is trained.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student, not wrapped.
        decay (`float`):
            Share of the average that a step keeps: 0 is the student of the last step, 1 that of the start.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.average = {name: tensor.detach().float().clone() for name, tensor in self._trained().items()}

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: tensor for name, tensor in self.model.named_parameters() if tensor.requires_grad}

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        for name, tensor in self._trained().items():
            self.average[name] = self.average[name].to(tensor.device).lerp_(tensor.float(), 1.0 - self.decay)

    @torch.no_grad()
    def read(
        self, inputs: dict[str, torch.Tensor], selected: SelectedTokens, vocab_size: int
    ) -> tuple[torch.Tensor, LMHead]:
        """Its hidden states at the selected positions, and its head, without gradient."""
        was_training = self.model.training
        self.model.eval()  # dropout would move the random state
        try:
            with self._in_place():
                hidden = selected.of(last_hidden_states(self.model, **model_inputs(inputs)))
                return hidden, LMHead.of(self.model).cut(vocab_size).detach()
        finally:
            self.model.train(was_training)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The average in the place of the student's weights."""
        own = {name: tensor.data for name, tensor in self._trained().items()}
        try:
            for name, tensor in self._trained().items():
                tensor.data = self.average[name].to(tensor.device, tensor.dtype)
            yield
        finally:
            for name, tensor in self._trained().items():
                tensor.data = own[name]

    def save(self, folder: str) -> None:
        """Into a checkpoint."""
        save_file({name: tensor.contiguous() for name, tensor in self.average.items()}, os.path.join(folder, _FILE))

    def load(self, folder: str) -> None:
        """From a checkpoint."""
        path = os.path.join(folder, _FILE)
        if not os.path.isfile(path):
            raise ValueError(
                f"`target_ema` is set, but the checkpoint `{folder}` has no `{_FILE}`: it was saved by a run without "
                "a target network, and the average of its steps is lost. Resume with `target_ema=None`, or start anew."
            )
        found = load_file(path)
        self.average = {name: found[name].to(tensor.device) for name, tensor in self.average.items()}


def make_target(trainer: Any) -> TargetStudent | None:
    """The target network that the configuration asks for."""
    if trainer.args.target_ema is None:
        return None
    if trainer.objective is None and not has_temporal_difference(trainer.args):
        raise ValueError(
            f"`target_ema` is {trainer.args.target_ema}, but no loss of `objectives` {trainer.args.objectives} has "
            "the value of a next state in it, so a forward of the copy would be wasted. Leave it at None, or take an "
            "objective with a temporal difference."
        )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise NotImplementedError(
            "`target_ema` keeps a copy of the student's weights, which DeepSpeed and FSDP shard; this has not been "
            "run. Use DDP, or `target_ema=None`, with `detach_next=True` for values without gradient."
        )
    target = TargetStudent(trainer.accelerator.unwrap_model(trainer.model), trainer.args.target_ema)
    trainer.add_callback(target)
    return target

"""The loss of one micro-batch: what the teacher says of it, what the student says, and the method's view of both."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn

from trl_kd import _compat
from trl_kd.modules.lm_head import last_hidden_states
from trl_kd.trainer import sources
from trl_kd.trainer.lookahead import teacher_states
from trl_kd.trainer.tokens import SelectedTokens, model_inputs


@dataclass(frozen=True)
class _Part:
    """What one teacher has to do with a micro-batch."""

    weight: float
    inputs: dict[str, Any]
    selected: SelectedTokens
    said: torch.Tensor | sources.TopTokens


def micro_batch_loss(trainer: Any, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    r"""
    Loss of a micro-batch, summed over teachers if there are several. What the method reports goes into the sums.

    Args:
        trainer ([`_KDTrainer`]):
            The trainer.
        model (`torch.nn.Module`):
            The student in its wrapper.
        inputs (`dict[str, torch.Tensor]`):
            The batch.

    Returns:
        `torch.Tensor`: its share of the loss of the optimizer step.
    """
    student = trainer.accelerator.unwrap_model(model)
    parts = [_read(trainer, *part) for part in sources.parts_of(trainer.teacher, inputs)]

    def student_loss() -> torch.Tensor:
        return torch.stack([_loss(trainer, student, part) for part in parts]).sum()

    return _compat.run_inside_forward(model, student, student_loss)


def _read(trainer: Any, weight: float, rows: dict[str, Any], inputs: dict[str, Any]) -> _Part:
    selected = trainer.select(rows)
    said = teacher_states(trainer, rows, selected)
    return _Part(weight, inputs, selected if rows is inputs else trainer.select(inputs), said)


def _loss(trainer: Any, student: nn.Module, part: _Part) -> torch.Tensor:
    tokens = trainer.read_tokens(student, part.inputs, part.selected, part.said)
    if part.weight != 1.0:
        shares = part.weight * tokens.weights, part.weight * tokens.source_weights
        tokens = replace(tokens, weights=shares[0], source_weights=shares[1])
    # accelerate's autocast is part of the forward that is replaced here
    with trainer.accelerator.autocast():
        if "token_counts" in part.inputs and "step_values" not in part.inputs and trainer.looks_ahead():
            # The step has this micro-batch only
            tokens = replace(tokens, step_values=trainer.prepare_step([tokens.detach()])[0])
        result = trainer.token_loss(tokens)
    hidden = tokens.pairs["student"][0].detach()
    trainer.observe(result.loss.detach(), hidden, part.said, result.values, part.selected.is_on_policy)
    return result.loss


def student_states(student: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Last hidden states of the student `(B, S, H_s)`; those of a batch with several teachers are read once."""
    memory = inputs.get("student_hidden", {})
    if "states" not in memory:
        memory["states"] = last_hidden_states(student, **model_inputs(inputs))
    return memory["states"]

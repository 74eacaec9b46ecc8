"""All tokens of an optimizer step, before the first loss of it, for what must not depend on how the step is split."""

from dataclasses import replace
from typing import Any

import torch

from trl_kd import _compat
from trl_kd.trainer.tokens import SelectedTokens, TokenBatch


@torch.no_grad()
def look_ahead(trainer: Any, batches: list[dict[str, Any]]) -> None:
    r"""
    Read all micro-batches without gradient, ask `prepare_step`, and put its answers into the batches.

    The teacher's hidden states stay in the batches, so that its forward is not run again. The student's is.

    Args:
        trainer ([`_KDTrainer`]):
            The trainer.
        batches (`list[dict[str, Any]]`):
            Micro-batches of one optimizer step, counted; gain `"teacher_hidden"` and `"step_values"`.
    """
    student = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    was_training = student.training
    student.eval()  # dropout would move the random state, and by another amount for every split
    try:
        tokens = [_read(trainer, student, batch) for batch in batches]
    finally:
        student.train(was_training)
    # One copy of a head that had to be gathered or dequantised
    head = tokens[0].pairs["student"][1]
    tokens = [replace(t, pairs=t.pairs | {"student": (t.pairs["student"][0], head)}).detach() for t in tokens]
    with trainer.accelerator.autocast():
        answers = trainer.prepare_step(tokens)
    for batch, micro_batch, answer in zip(batches, tokens, answers, strict=True):
        batch["teacher_hidden"] = micro_batch.pairs["teacher"][0]
        batch["step_values"] = answer


def teacher_states(trainer: Any, batch: dict[str, Any], selected: SelectedTokens) -> torch.Tensor:
    """The teacher's hidden states at the trained tokens, `(N, H_t)`; those of a look ahead are used again."""
    if "teacher_hidden" in batch:
        return batch["teacher_hidden"]
    with trainer.accelerator.autocast():
        return trainer.read_teacher(batch, selected)


def _read(trainer: Any, student: torch.nn.Module, batch: dict[str, Any]) -> TokenBatch:
    selected = trainer.select(batch)
    arguments = (student, batch, selected, teacher_states(trainer, batch, selected))
    return _compat.run_inside_forward(trainer.model_wrapped, student, lambda: trainer.read_tokens(*arguments))

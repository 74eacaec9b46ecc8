"""Numbers that are not finite stop a run before they reach the student's weights."""

from typing import Any

import torch


class Health:
    r"""
    Watches loss and hidden states on the device; looks at the result once per optimizer step.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's accelerator.
    """

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self._bad = None  # (3,): micro-batches with a bad loss, student, teacher

    def watch(self, loss: torch.Tensor, student_hidden: torch.Tensor, teacher_said: Any) -> None:
        """Look at one micro-batch, without waiting for the device."""
        if isinstance(teacher_said, tuple):  # from a cache; `-inf` is no token
            teacher_said = teacher_said[1].exp()
        bad = torch.stack([~torch.isfinite(tensor).all() for tensor in (loss, student_hidden, teacher_said)]).long()
        self._bad = bad if self._bad is None else self._bad + bad

    def check(self, teacher: Any) -> None:
        r"""
        Raise if anything was not finite since the last check. All ranks must call it together.

        Args:
            teacher (`Teacher`):
                The teacher, to tell whose fault it is.

        Raises:
            FloatingPointError: If a number was not finite.
        """
        if self._bad is None:
            return
        bad, self._bad = self._bad, None
        if self.accelerator.num_processes > 1:
            bad = self.accelerator.reduce(bad, reduction="sum")
        bad_loss, bad_student, bad_teacher = bad.tolist()
        if not bad_loss:
            return
        if bad_teacher or any(not torch.isfinite(head.weight).all() for head in teacher.heads):
            who, cure = "teacher's logits are", "Load the teacher in bfloat16 or float32, or check its weights."
        elif bad_student:
            who, cure = "student's hidden states are", "Lower the learning rate, or check the student's weights."
        else:
            who, cure = "loss is", "Train in bfloat16 or float32, and check the learning rate."
        raise FloatingPointError(
            f"The {who} not finite (NaN or infinite) in {bad_loss} micro-batches of this step. A step with them would "
            f"destroy the student, so training stops before it; its weights are those of the last step. {cure}"
        )

"""What the teacher's side of an optimizer step says before the student is read: labels, gates, denominators."""

from dataclasses import replace
from typing import Any

import torch

from trl_kd.losses import top1
from trl_kd.modules import LMHead
from trl_kd.trainer.dual_selection import DualSelection, Look, count_by_source
from trl_kd.trainer.projection import Projection, scales_of


class Lookout:
    r"""
    Looks at the teacher's side of micro-batches: what the projected teacher is to predict, whether it does, and how
    many tokens of the step that concerns.

    The projectors change once per optimizer step, so all of this is known before the first loss of it, and nothing
    depends on how the step is split.

    Args:
        args ([`DSKDConfig`]):
            Configuration, resolved.
        projection ([`Projection`], *optional*):
            The projectors; `None` for an objective without.
        teacher ([`LocalTeacher`]):
            The teacher.
        to_student (`torch.Tensor` of shape `(V_t,)`, *optional*):
            The student's id for each of the teacher's, -1 for none. `None` for one vocabulary.
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's.
    """

    def __init__(
        self, args: Any, projection: Projection | None, teacher: Any, to_student: torch.Tensor | None, accelerator: Any
    ):
        self.args, self.projection, self.teacher = args, projection, teacher
        self.to_student, self.accelerator = to_student, accelerator
        self.teaches = projection is not None and args.student_space

    @torch.no_grad()
    def __call__(self, batches: list[dict[str, Any]], head: LMHead, is_step: bool) -> list[Look]:
        r"""
        Look at micro-batches, which have `"selected"` and `"teacher_hidden"`.

        Args:
            batches (`list[dict[str, Any]]`):
                Micro-batches.
            head ([`LMHead`]):
                The student's head, detached.
            is_step (`bool`):
                Whether these are all of this rank's in an optimizer step; else they count for themselves.

        Returns:
            `list[Look]`
        """
        looks = [self._labels(batch["selected"], batch["teacher_hidden"]) for batch in batches]
        if self.projection is not None and self.projection.attends:
            looks = self._with_scales(batches, looks, is_step)
        if self.teaches and self.args.gate == "agreement":
            looks = [
                replace(look, gate=self._gate(look, self._projected_top1(batch, look, head)))
                for batch, look in zip(batches, looks, strict=True)
            ]
        counts = [self._counts(batch["selected"], look) for batch, look in zip(batches, looks, strict=True)]
        totals = self._over_ranks(torch.stack(counts).sum(dim=0), is_step)
        ranks = self.accelerator.num_processes if is_step else 1
        return [replace(look, counts=dict(zip(_COUNTED, totals, strict=True)), ranks=ranks) for look in looks]

    def _over_ranks(self, sums: torch.Tensor, is_step: bool) -> torch.Tensor:
        if is_step and self.accelerator.num_processes > 1:
            return self.accelerator.reduce(sums, reduction="sum")
        return sums

    def _labels(self, selected: DualSelection, hidden: torch.Tensor) -> Look:
        """What the projected teacher is to predict at each of the student's tokens that meet the teacher's."""
        args, labels, teacher_top1 = self.args, selected.met(selected.labels), None
        everything = torch.ones_like(labels, dtype=torch.bool)
        uses_top1 = args.projector_label == "teacher_top1"
        # What the student has written is nothing to learn for the projector
        if not self.teaches or not (uses_top1 or args.lmbda > 0):
            return Look(labels, everything, everything, None, {})
        is_on_policy = selected.met(selected.is_on_policy)
        if args.eta_pairs == "context":  # the two models' tokens need not be the same there
            return Look(labels, ~is_on_policy, everything, None, {})
        if selected.attends and uses_top1:
            teacher_top1 = top1(hidden, self.teacher.head, args.loss_chunk_size)
            found = selected.partners(teacher_top1)
        else:
            found = top1(selected.partners(hidden), self.teacher.head, args.loss_chunk_size)
        found = found if self.to_student is None else self.to_student[found]
        if selected.attends:
            found = torch.full_like(labels, -1).index_copy(0, selected.pairs[0], found)
        labels = found if uses_top1 else torch.where(is_on_policy, found, labels)
        return Look(labels.clamp_min(0), labels >= 0, everything, teacher_top1, {})

    def _with_scales(self, batches: list[dict[str, Any]], looks: list[Look], is_step: bool) -> list[Look]:
        if self.args.cma_norm_scope == "padded":
            scales = [
                self.projection.padded_scales(batch, batch["selected"], look)
                for batch, look in zip(batches, looks, strict=True)
            ]
            return [replace(look, scales=scale) for look, scale in zip(looks, scales, strict=True)]
        sums = [
            self.projection.sums(batch["selected"], batch["teacher_hidden"], look)
            for batch, look in zip(batches, looks, strict=True)
        ]
        scales = scales_of(self._over_ranks(torch.stack(sums).sum(dim=0), is_step))
        return [replace(look, scales=scales) for look in looks]

    def _gate(self, look: Look, projected_top1: torch.Tensor) -> torch.Tensor:
        agrees = look.is_labelled & (projected_top1 == look.labels)
        # Partners by context have no label on rollouts, and none to be judged by
        return agrees | ~look.is_labelled if self.args.eta_pairs == "context" else agrees

    def _projected_top1(self, batch: dict[str, Any], look: Look, head: LMHead) -> torch.Tensor:
        projected = self.projection.teacher_in_student(batch["selected"], batch["teacher_hidden"], look)
        return top1(projected, head, self.args.loss_chunk_size)

    def _counts(self, selected: DualSelection, look: Look) -> torch.Tensor:
        """Numbers of tokens by what they are counted for and by source, `(3, 2)`."""
        is_on_policy = selected.met(selected.is_on_policy)
        every = count_by_source(is_on_policy)
        by_teacher = selected.attends and self.args.teacher_space_denominator == "teacher"
        return torch.stack(
            [
                count_by_source(is_on_policy, look.is_labelled),
                count_by_source(is_on_policy, look.gate) if self.args.gate_normalization == "gated" else every,
                count_by_source(selected.teacher_is_on_policy) if by_teacher else every,
            ]
        )


_COUNTED = ("labelled", "taught", "teacher")

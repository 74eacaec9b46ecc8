"""How the states of one model get into the other's space: token by token, or through cross-model attention."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from trl_kd import _compat
from trl_kd.modules import (
    CrossModelAttention,
    LMHead,
    RecomputedProjector,
    ResidualProjector,
    logit_invariant_map,
    make_projector,
)
from trl_kd.modules.cross_model_attention import scale_of_sums, token_scale
from trl_kd.trainer.dual_selection import DualSelection, Look


SharedIds = tuple[torch.Tensor, torch.Tensor] | None


class Projection:
    r"""
    Both projectors of a run, and the attention between the models if there is one.

    Args:
        args ([`DSKDConfig`]):
            Configuration, resolved.
        student ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student.
        teacher ([`LocalTeacher`]):
            The teacher, prepared.
        student_head ([`LMHead`]):
            The student's head as it is at the start.
        shared_ids (`tuple` of two `torch.Tensor`s, *optional*):
            Ids of the tokens that both vocabularies have, in the student's and in the teacher's. `None`: all, with the
            same ids.
    """

    def __init__(self, args: Any, student: nn.Module, teacher: Any, student_head: LMHead, shared_ids: SharedIds):
        self.args, self.attends = args, args.alignment == "cma"
        self.embedding = student.get_input_embeddings()
        self.teacher_embedding = teacher.input_embeddings() if self.attends else None  # (V_t, H_t)
        self.modules: dict[str, nn.Module] = {}
        self._recomputed, self._map = None, None
        start = _initial_ids(shared_ids, args.init_vocab_size, student_head, teacher.head)
        if args.student_space:
            self.modules["teacher_to_student"] = self._make(teacher.head, student_head, start[::-1], 0)
        if args.teacher_space and args.student_to_teacher == "recomputed":
            self._recomputed = RecomputedProjector(teacher.head, start[1], start[0])
        elif args.teacher_space:
            self.modules["student_to_teacher"] = self._make(student_head, teacher.head, start, 1)
        if self.attends:
            own, theirs = _compat.plain_weight(self.embedding).shape[1], self.teacher_embedding.shape[1]
            if theirs != (width := teacher.head.weight.shape[1]):
                raise NotImplementedError(
                    f"The teacher's input embeddings are {theirs} wide and its last hidden states {width}, but "
                    "cross-model attention adds them up. Use `alignment='eta'`, or a teacher with equal widths."
                )
            with torch.random.fork_rng(devices=[]):  # its own draw is replaced
                attention = CrossModelAttention(own, theirs, bias=args.projector_bias)
            attention.query = make_projector(2 * own, 2 * theirs, args.projector_bias, args.seed + 2)
            self.modules["attention"] = attention

    def _make(self, source: LMHead, target: LMHead, ids: tuple, number: int) -> nn.Module:
        sizes = source.weight.shape[1], target.weight.shape[1]
        projector = make_projector(*sizes, self.args.projector_bias, self.args.seed + number)
        if self.args.projector_init == "logit_invariant":
            weight, bias = logit_invariant_map(source, target, *ids)
            with torch.no_grad():
                projector.weight.copy_(weight)
                if projector.bias is not None:
                    projector.bias.zero_()
            if bias is not None:  # a head with a bias needs one, whatever the preset says
                projector.bias = nn.Parameter(bias.float().cpu())
        if self.args.projector_hidden_size:
            return ResidualProjector(projector, self.args.projector_hidden_size, self.args.seed + number)
        return projector

    def into_student(self, states: torch.Tensor) -> torch.Tensor:
        """The teacher's states `(n, H_t)` in the student's space, `(n, H_s)`."""
        return _project(self.modules["teacher_to_student"], states)

    def into_teacher(self, states: torch.Tensor, student_head: LMHead) -> torch.Tensor:
        """The student's states `(n, H_s)` in the teacher's space, `(n, H_t)`."""
        if self._recomputed is not None:
            if self._map is None:
                self._map = self._recomputed(student_head)
            with torch.autocast(states.device.type, enabled=False):
                return F.linear(states.to(self._map[0].dtype), *self._map)
        return _project(self.modules["student_to_teacher"], states)

    def teacher_in_student(self, selected: DualSelection, hidden: torch.Tensor, look: Look) -> torch.Tensor:
        """h^{t->s} at the student's tokens that meet the teacher's, without the student."""
        if not selected.attends:
            return self.into_student(selected.met_teacher(hidden))
        return self.attend(selected, hidden, hidden.new_zeros(len(selected.labels), 0), look)[0]

    def forget(self) -> None:
        """Find what the student's head implies anew, when it is next needed: the head may have changed."""
        self._map = None

    # Cross-model attention

    def described(
        self, selected: DualSelection, hidden: torch.Tensor, look: Look | None = None
    ) -> tuple[torch.Tensor, ...]:
        r"""
        What the attention knows of the tokens: `queries` of the student's, and of the teacher's `keys`, states and
        embeddings of what they predict, before these three are normalised.
        """
        own, theirs = _compat.plain_weight(self.embedding).detach(), self.teacher_embedding
        (read, _), (teacher_read, _) = selected.described
        predicted = selected.teacher.labels
        value_ids = predicted if look is None or look.teacher_top1 is None else look.teacher_top1
        queries = torch.cat([own[read], own[selected.labels]], dim=1).float()
        keys = torch.cat([theirs[teacher_read], theirs[predicted]], dim=1).float()
        return queries, keys, hidden.float(), theirs[value_ids].float()

    def attend(
        self, selected: DualSelection, hidden: torch.Tensor, student_values: torch.Tensor, look: Look
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's states at the student's tokens, `(N_s, H_s)`, and the student's values at the teacher's."""
        queries, keys, states, predicted = self.described(selected, hidden, look)
        scale = look.scales
        if "teacher_to_student" in self.modules:
            teacher_values = self.into_student(states / scale[1] + predicted / scale[2])
        else:
            teacher_values = states[:, :0]
        (_, segments), (_, teacher_segments) = selected.described
        return self.modules["attention"](
            queries, keys / scale[0], teacher_values, student_values, segments, teacher_segments, selected.sizes
        )

    def sums(self, selected: DualSelection, hidden: torch.Tensor, look: Look) -> torch.Tensor:
        """Count, sum and sum of squares of keys, states and embeddings, `(3, 3)`, from which their sizes follow."""
        _, *parts = self.described(selected, hidden, look)
        return torch.stack([_sums(part) for part in parts])

    def padded_scales(self, inputs: dict[str, Any], selected: DualSelection, look: Look) -> torch.Tensor:
        """The same sizes as the authors take them: over all positions, with token 0 where nothing is trained."""
        embeddings = self.teacher_embedding
        shape, places = inputs["teacher_labels"][:, 1:].numel(), len(selected.teacher.rows)
        _, keys, _, predicted = self.described(selected, selected.teacher.labels.new_zeros(places, 1), look)
        filler = embeddings[0].float().expand(shape - places, -1)
        keys = torch.cat([keys, torch.cat([filler, filler], dim=1)])
        return torch.stack([token_scale(keys), inputs["hidden_scale"], token_scale(torch.cat([predicted, filler]))])


def scales_of(sums: torch.Tensor) -> torch.Tensor:
    """Sizes `(3,)` from the added up sums `(3, 3)` of a step."""
    return torch.stack([scale_of_sums(part) for part in sums])


def _sums(values: torch.Tensor) -> torch.Tensor:
    dtype = torch.float32 if values.device.type == "mps" else torch.float64  # which has no float64
    count = torch.tensor(values.numel(), dtype=dtype, device=values.device)
    size = torch.linalg.vector_norm(values, dtype=dtype)
    return torch.stack([count, values.sum(dtype=dtype), size.square()])


def _project(projector: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """In the projector's own precision, which is float32."""
    with torch.autocast(states.device.type, enabled=False):
        return projector(states.float())


def _initial_ids(
    shared_ids: SharedIds, size: int | None, student: LMHead, teacher: LMHead
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Rows of the student's and the teacher's head from which maps are found."""
    if shared_ids is None:
        shared = min(len(student.weight), len(teacher.weight))
        if size is None:
            return None, None
        ids = torch.arange(min(size, shared))
        return ids.to(student.weight.device), ids.to(teacher.weight.device)
    own, theirs = (ids if size is None else ids[:size] for ids in shared_ids)
    return own.to(student.weight.device), theirs.to(teacher.weight.device)

"""From a batch in the tokens of two models to the tokens that meet."""

from dataclasses import dataclass, field, fields

import torch

from trl_kd.trainer.tokens import SelectedTokens, TokenBatch, select_tokens, teachers


@dataclass(frozen=True)
class DualSelection(SelectedTokens):
    r"""
    The student's trained tokens of a batch (N_s), the teacher's (N_t), and which of them are partners (n).

    Args:
        teacher ([`SelectedTokens`], *optional*):
            The teacher's trained tokens. `None` for one vocabulary: they are the student's, each its own partner.
        pairs (`torch.Tensor` of shape `(2, n)`, *optional*):
            Partners: numbers of the student's tokens, and of the teacher's.
        rest (`torch.Tensor` of shape `(N_s - n,)`, *optional*):
            The student's tokens that have no partner.
        attends (`bool`, *optional*, defaults to `False`):
            Whether all tokens meet, through attention, and not partners alone.
        described (`tuple` of two `tuple`s, *optional*):
            Of the student's tokens and of the teacher's: the ids that are read there, and the number of their row, of
            shape `(N_s,)` and `(N_t,)`.
        sizes (`tuple[int, int, int]`, *optional*):
            With `attends`: number of rows, and most trained tokens of one, the student's and the teacher's.
    """

    teacher: SelectedTokens | None = None
    pairs: torch.Tensor | None = None
    rest: torch.Tensor | None = None
    attends: bool = False
    described: tuple = ()
    sizes: tuple[int, int, int] | None = None

    def met(self, values: torch.Tensor) -> torch.Tensor:
        """Of values `(N_s, ...)` of the student's tokens those that meet the teacher's."""
        return values if self.pairs is None or self.attends else values.index_select(0, self.pairs[0])

    def met_teacher(self, values: torch.Tensor) -> torch.Tensor:
        """Of values `(N_t, ...)` of the teacher's tokens those that meet the student's."""
        return values if self.attends else self.partners(values)

    def partners(self, values: torch.Tensor) -> torch.Tensor:
        """Of values `(N_t, ...)` of the teacher's tokens those of partners `(n, ...)`, in the student's order."""
        return values if self.pairs is None else values.index_select(0, self.pairs[1])

    @property
    def teacher_is_on_policy(self) -> torch.Tensor:
        """Source of the teacher's tokens that meet the student's."""
        return self.met_teacher(self.is_on_policy if self.teacher is None else self.teacher.is_on_policy)


def select_dual(inputs: dict[str, torch.Tensor], attends: bool = False) -> DualSelection:
    """Trained tokens of a batch on both sides, and their partners."""
    student = select_tokens(inputs)
    own = {part.name: getattr(student, part.name) for part in fields(SelectedTokens)}
    if "partner" not in inputs:  # one vocabulary
        return DualSelection(**own)
    teacher_inputs = teachers(inputs)
    teacher = select_tokens(teacher_inputs)
    width, teacher_width = inputs["labels"].shape[1], teacher_inputs["labels"].shape[1]
    # A label stands one position behind the state that predicts it
    partner = inputs["partner"].flatten()[student.rows + 1]
    numbers = torch.full((teacher_inputs["labels"].numel(),), -1, device=partner.device)
    numbers[teacher.rows + 1] = torch.arange(len(teacher.rows), device=partner.device)
    # Those with a partner first; their number is all that has to be waited for
    order = torch.argsort((partner < 0).int(), stable=True)
    number = int((partner >= 0).sum())
    students, rest = order[:number], order[number:]
    row = student.rows // width
    pairs = torch.stack([students, numbers[row[students] * teacher_width + partner[students]]])
    return DualSelection(
        **own,
        teacher=teacher,
        pairs=pairs,
        rest=None if attends else rest,
        attends=attends,
        sizes=_sizes(student, teacher, len(inputs["labels"])) if attends else None,
        described=(
            (inputs["input_ids"].flatten()[student.rows], row),
            (teacher_inputs["input_ids"].flatten()[teacher.rows], teacher.rows // teacher_width),
        ),
    )


def _sizes(student: SelectedTokens, teacher: SelectedTokens, rows: int) -> tuple[int, int, int]:
    if not len(student.rows) or not len(teacher.rows):
        return rows, 0, 0
    longest = torch.stack([student.positions.max(), teacher.positions.max()]) + 1
    return rows, *longest.tolist()


@dataclass(frozen=True)
class Look:
    r"""
    What the teacher's side alone says of a micro-batch, and how many tokens of its optimizer step that concerns.

    Args:
        labels (`torch.Tensor` of shape `(n,)`):
            What the projected teacher is to predict, in the student's vocabulary; 0 where nothing is known.
        is_labelled (`torch.Tensor` of shape `(n,)`):
            Where something is known.
        gate (`torch.Tensor` of shape `(n,)`):
            Which tokens teach in the student's space.
        teacher_top1 (`torch.Tensor` of shape `(N_t,)`, *optional*):
            The teacher's own most likely tokens.
        counts (`dict[str, torch.Tensor]`):
            Numbers of tokens by source, of shape `(2,)`: `"labelled"`, `"taught"` in the student's space, `"teacher"`
            in the teacher's. Of the step, over ranks; or of this batch, in evaluation.
        scales (`torch.Tensor` of shape `(3,)`, *optional*):
            Sizes of keys, states and embeddings for cross-model attention.
        ranks (`int`):
            Factor on weights that divide by the step's counts: DDP averages gradients.
    """

    labels: torch.Tensor
    is_labelled: torch.Tensor
    gate: torch.Tensor
    teacher_top1: torch.Tensor | None
    counts: dict[str, torch.Tensor]
    scales: torch.Tensor | None = None
    ranks: int = 1


@dataclass(frozen=True)
class DualTokens(TokenBatch):
    r"""
    The trained tokens of a micro-batch on both sides: `pairs["student"]` has N_s rows, `pairs["teacher"]` N_t.

    Args:
        selected ([`DualSelection`]):
            Which tokens these are, and which are partners.
        look ([`Look`]):
            What is known of them beforehand.
    """

    selected: DualSelection = field(default=None)
    look: Look = field(default=None)


def count_by_source(is_on_policy: torch.Tensor, chosen: torch.Tensor | None = None) -> torch.Tensor:
    """Numbers of the (chosen) tokens by source, of shape (2,): off-policy, on-policy."""
    chosen = torch.ones_like(is_on_policy) if chosen is None else chosen
    return torch.stack([(chosen & ~is_on_policy).sum(), (chosen & is_on_policy).sum()])

"""A run as the checks of text look at it."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Subject:
    r"""
    What the checks of text look at.

    Args:
        method (`str`):
            `"amm"`, `"dskd"` or `"sparse-td"`.
        args ([`KDConfig`]):
            Configuration of the method.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The student's, as the trainer uses it: with a pad token.
        teacher_tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `None`):
            The teacher's. `None` if it is unknown, or the student's own.
        student_rows (`int`):
            Rows of the student's head.
        teacher_rows (`int` or `None`):
            Rows of the teacher's head; `None` if there is no head, as with a cache.
        eos_token_ids (`list[int]`):
            Ids that end the student's generation: those of its tokenizer and of its generation config.
        teacher_eos_token_ids (`list[int]` or `None`):
            The same for the teacher, if known.
        rows (`list[dict]`):
            A sample of the training data as it was passed to the trainer.
        batch (`dict`, *optional*):
            The sample as the run's collator makes it, to see what is really trained.
        teacher_context (`int`, *optional*):
            Positions that the teacher has.
        student_context (`int`, *optional*):
            Positions that the student has. By default what its tokenizer says, if it says so.
    """

    method: str
    args: Any
    tokenizer: Any
    teacher_tokenizer: Any | None
    student_rows: int
    teacher_rows: int | None
    eos_token_ids: list[int]
    teacher_eos_token_ids: list[int] | None
    rows: list[dict[str, Any]]
    batch: dict[str, Any] | None = None
    teacher_context: int | None = None
    student_context: int | None = None

    @cached_property
    def ends(self) -> set[int]:
        """Ids that end a completion of the student."""
        return ids_of(self.tokenizer, self.eos_token_ids)

    @cached_property
    def teacher_ends(self) -> set[int] | None:
        """Ids that end a completion of the teacher; `None` if they are not known."""
        if self.teacher_tokenizer is None:
            return None if self.teacher_eos_token_ids is None else set(self.teacher_eos_token_ids)
        return ids_of(self.teacher_tokenizer, self.teacher_eos_token_ids or [])

    @cached_property
    def same_tokens(self) -> bool:
        """Whether both tokenizers count the same tokens; taken for granted where the teacher's is unknown."""
        other = self.teacher_tokenizer
        return other is None or self.tokenizer.get_vocab() == other.get_vocab()

    @cached_property
    def reads_own_text(self) -> bool:
        """Whether the teacher reads its own tokens in its own template, as DSKD lets it, or the student's."""
        if self.method != "dskd" or self.args.alignment == "same":
            return False
        return self.args.alignment != "auto" or not self.same_tokens

    @cached_property
    def has_own_prompt(self) -> bool:
        """Whether the teacher has a prompt of its own."""
        return self.args.teacher_system_prompt is not None or "teacher_prompt" in (self.rows[0] if self.rows else {})

    @cached_property
    def has_completions(self) -> bool:
        """Whether the rows have completions (or text), judged by the first, as the trainer does."""
        first = self.rows[0] if self.rows else {}
        return not ("prompt" in first and "completion" not in first) or "messages" in first or "input_ids" in first

    @cached_property
    def trains_completions(self) -> bool:
        """Whether the dataset's own completions are trained in some rows of a step."""
        by_dataset = self.args.off_policy_source != "teacher" and self.has_completions
        return by_dataset and self.args.lmbda < 1

    @cached_property
    def writes(self) -> bool:
        """Whether completions are sampled during training."""
        return self.args.lmbda > 0 or not self.trains_completions


def ids_of(tokenizer: Any, listed: Iterable[int]) -> set[int]:
    """Ids that end a completion: those that are listed, and the tokenizer's EOS."""
    return {*listed, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}

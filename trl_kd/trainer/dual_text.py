"""What happens to tokenizers and datasets before two models with different vocabularies meet."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from transformers.utils import logging

from trl_kd._compat import context_length
from trl_kd.data import (
    DualCollator,
    Side,
    TeacherRows,
    is_conversational,
    map_rows,
    row_formatter,
    teacher_view,
    vocabulary_map,
)
from trl_kd.trainer import setup
from trl_kd.trainer.teacher_columns import check_own_prompt, has_own_prompt


logger = logging.get_logger(__name__)

# Rows on which the coverage of exact alignment is measured before training
_SAMPLE = 200


def is_one_vocabulary(args: Any, tokenizer: Any, teacher_tokenizer: Any | None) -> bool:
    r"""
    Whether teacher and student can be compared token by token as they are.

    Args:
        args ([`DSKDConfig`]):
            Configuration.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The student's tokenizer.
        teacher_tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The teacher's, if it is known.

    Returns:
        `bool`

    Raises:
        ValueError: If vocabularies are to be aligned, and the teacher's tokenizer is unknown or rows are packed.
    """
    if args.alignment == "same":
        return True
    if args.alignment == "auto":
        if teacher_tokenizer is None or tokenizer.get_vocab() == teacher_tokenizer.get_vocab():
            return True
    if teacher_tokenizer is None:
        raise ValueError(
            f"`alignment` is '{args.alignment}', but the teacher has no tokenizer beside it, so its tokens stand for "
            "nothing. Save the tokenizer in the teacher's folder, or pass it as `teacher_processing_class`."
        )
    if args.packing:
        raise ValueError(
            "`packing` is True, but student and teacher have different vocabularies, so their rows differ in length "
            "and cannot be packed alike. Set `packing=False`."
        )
    return False


def dual_text(
    args: Any,
    tokenizer: Any,
    teacher: Any,
    teacher_tokenizer: Any,
    student_ends: list[int],
    formatting_func: Callable | None,
    dataset: Any,
) -> tuple[Callable, DualCollator]:
    r"""
    What prepares datasets for two tokenizers, and what collates their rows.

    Args:
        args ([`DSKDConfig`]):
            Configuration.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The student's tokenizer.
        teacher ([`LocalTeacher`]):
            The teacher.
        teacher_tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The teacher's tokenizer.
        student_ends (`list[int]`):
            Ids that end a completion of the student.
        formatting_func (`Callable`, *optional*):
            Makes the text of a row.
        dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them):
            Training data, raw.

    Returns:
        `tuple`: a function as of [`setup.dataset_preparer`], and a [`DualCollator`].
    """
    teacher_ends = teacher.ends(teacher_tokenizer)
    longest = args.teacher_max_length or context_length(teacher.model.config)
    dataset = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
    first = next(iter(dataset or []), {})

    def formatters(row: dict[str, Any], name: str) -> list[Any]:
        options = {"text_field": args.dataset_text_field, "assistant_only_loss": args.assistant_only_loss}
        return [
            row_formatter(row, own, max_length=None, eos_token_ids=ends, name=name, owner=owner, **options)
            for own, ends, owner in (
                (tokenizer, student_ends, "tokenizer"),
                (teacher_tokenizer, teacher_ends, "teacher's tokenizer"),
            )
        ]

    if formatting_func is not None or not first:
        first = {args.dataset_text_field: ""}
    sides = [Side.of(formatter, is_conversational(first)) for formatter in formatters(first, "train")]

    def add_teacher(prepared: Any, came_as_ids: bool, name: str) -> Any:
        row = next(iter(prepared))
        if "teacher_input_ids" in row:
            return prepared
        own = ("input_ids", "labels", "prompt_length")
        raw = row if came_as_ids else {column: value for column, value in row.items() if column not in own}
        if own_prompt := has_own_prompt(raw, args):
            check_own_prompt(args, came_as_ids, name)
        view = teacher_view(raw, args.teacher_system_prompt) if own_prompt else raw
        prompts = (own_prompt, args.teacher_system_prompt)
        rows = TeacherRows(*sides, came_as_ids, longest, formatters(view, name)[1], *prompts)
        num_proc = None if isinstance(prepared, IterableDataset) else args.dataset_num_proc
        description = f"Tokenizing {name} dataset for the teacher"
        return map_rows(prepared, rows, longest, num_proc, name, description, "teacher_max_length")

    prepare = setup.dataset_preparer(args, tokenizer, student_ends, formatting_func, add_teacher)
    by = "index" if args.objective == "uld" else args.decided("eta_pairs")
    return prepare, DualCollator(tokenizer.pad_token_id, args.pad_to_multiple_of, *sides, by, longest)


def choose_alignment(args: Any, dataset: Any, collator: DualCollator) -> str:
    r"""
    `"eta"` or `"cma"`, by the share of the student's tokens that exact alignment reaches on some rows of the data.

    Args:
        args ([`DSKDConfig`]):
            Configuration.
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Training data, prepared.
        collator ([`DualCollator`]):
            Knows both sides.

    Returns:
        `str`

    Raises:
        ValueError: If exact alignment is asked for, and no token has a partner.
    """
    share = collator.coverage(islice(dataset, _SAMPLE))
    told = f"exact alignment reaches {share:.0%} of the student's tokens"
    if collator.by == "index":
        logger.info("The vocabularies differ; tokens are compared by their number in the completion.")
        return "eta"
    if args.alignment == "cma":
        logger.info(f"The vocabularies differ; {told}. Cross-model attention is used, as asked for.")
        return "cma"
    if share == 0.0 and (args.alignment == "eta" or args.objective != "dual_space"):
        raise ValueError(
            f"Of the student's tokens in the first {_SAMPLE} rows, none begins and ends where a token of the teacher "
            "does, so there is nothing to align. Check that both tokenizers are meant for this text, or take "
            "`alignment='cma'`."
        )
    chosen = (
        "eta" if args.alignment == "eta" or args.objective != "dual_space" or share >= args.min_coverage else "cma"
    )
    how = "at least" if share >= args.min_coverage else "less than"
    reason = "" if args.alignment == "eta" else f", {how} `min_coverage` ({args.min_coverage:.0%})"
    logger.warning(f"The vocabularies of student and teacher differ; {told}{reason}: `alignment='{chosen}'`.")
    return chosen


def shared_vocabulary(collator: DualCollator, sizes: tuple[int, int]) -> tuple[np.ndarray, tuple]:
    r"""
    Which tokens both vocabularies have.

    Args:
        collator ([`DualCollator`]):
            Knows both sides.
        sizes (`tuple[int, int]`):
            Rows of the student's and of the teacher's head.

    Returns:
        `tuple`: the student's id of each of the teacher's (-1 for none), of shape `(V_t,)`; and the ids of the shared
        tokens in the student's and in the teacher's vocabulary, by the student's.

    Raises:
        ValueError: If there are none.
    """
    student, teacher = collator.student.tokens, collator.teacher.tokens
    found = vocabulary_map(teacher, student)
    to_student = np.full(sizes[1], -1, dtype=np.int64)
    to_student[: min(len(found), sizes[1])] = found[: sizes[1]]
    to_student[to_student >= sizes[0]] = -1
    theirs = np.flatnonzero(to_student >= 0)
    # Several of the teacher's may stand for one of the student's; of its ends, the one that it writes goes first
    theirs = theirs[np.lexsort([theirs, theirs != collator.teacher.end, to_student[theirs]])]
    ours, first = np.unique(to_student[theirs], return_index=True)
    if len(ours) < 2:
        raise ValueError(
            f"Of the teacher's {sizes[1]} tokens and the student's {sizes[0]}, {len(ours)} stand for the same text, "
            "so their distributions have nothing in common. Take `alignment='cma'` with `preset='v1'`, which needs no "
            "shared tokens, or another teacher."
        )
    logger.info(f"{len(ours)} tokens are in both vocabularies ({sizes[0]} of the student, {sizes[1]} of the teacher).")
    return to_student, (torch.from_numpy(ours), torch.from_numpy(theirs[first]))

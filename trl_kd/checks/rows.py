"""What becomes of the rows: who writes what, what is lost to a length, and what fits."""

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from trl_kd.checks.finding import Finding
from trl_kd.checks.render import percent
from trl_kd.data import row_formatter, teacher_view
from trl_kd.data.rows import (
    CUT,
    DROPPED,
    EMPTY_COMPLETION,
    EMPTY_PROMPT,
    NO_ANSWER,
    NO_ROOM,
    NOT_TRAINED,
    RowFormatter,
)


if TYPE_CHECKING:
    from trl_kd.checks.subject import Subject


# Share of the rows from which a loss is worth a word, and from which a run should not start
CAREFUL_SHARE, STOP_SHARE = 0.01, 0.2
# Share of the rows that a proposed length keeps whole
KEPT_SHARE = 0.99
# What a row that cannot be written raises: the formatter's refusals, a template's, and columns of another shape
ROW_ERRORS = (ValueError, TypeError, KeyError, AttributeError, TemplateError)
# Tokenizers without a limit have one of 1e30
_MAX_CONTEXT = 10**9

_ADVICE = {
    EMPTY_COMPLETION: "remove the rows without a completion",
    NO_ANSWER: "end `messages` with the assistant's turn",
    EMPTY_PROMPT: "give the rows a `prompt`",
    NOT_TRAINED: "mark what is trained: in `labels`, or by `{% generation %}` in the chat template",
}


@dataclass(frozen=True)
class Sample:
    r"""
    The sampled rows as the trainer prepares them.

    Args:
        whole (`list[dict]`):
            Each row without a limit of its length, those that are dropped included.
        cut (`list[dict]`):
            Each row within `max_length`.
        error (`str`, *optional*):
            Why they could not be prepared.
    """

    whole: list[dict[str, Any]] = field(default_factory=list)
    cut: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""

    @property
    def kept(self) -> list[dict[str, Any]]:
        """Rows that are trained on or continued."""
        return [row for row in self.cut if not row[DROPPED]]


def formatter_of(subject: "Subject", row: dict[str, Any], of_teacher: bool = False) -> RowFormatter:
    """Writes rows like this one for the student or for the teacher, at any length."""
    args, owner = subject.args, "teacher's tokenizer" if of_teacher else "tokenizer"
    return row_formatter(
        row,
        subject.teacher_tokenizer if of_teacher else subject.tokenizer,
        max_length=None,
        eos_token_ids=(subject.teacher_eos_token_ids or []) if of_teacher else subject.eos_token_ids,
        text_field=args.dataset_text_field,
        assistant_only_loss=args.assistant_only_loss,
        owner=owner,
    )


def read_by_teacher(subject: "Subject", row: dict[str, Any]) -> dict[str, Any]:
    """A raw row with the teacher's own prompt, if it has one."""
    return teacher_view(row, subject.args.teacher_system_prompt) if subject.has_own_prompt else row


def prepare(subject: "Subject") -> Sample:
    """Prepare the sampled rows as the trainer does."""
    if not subject.rows:
        return Sample()
    args = subject.args
    splits = args.packing and args.packing_strategy in ("bfd_split", "wrapped")
    whole, cut = [], []
    try:
        formatter = formatter_of(subject, subject.rows[0])
        limited = replace(formatter, max_length=None if splits else args.max_length)
        for row in subject.rows:
            read_by_teacher(subject, row)
            whole.append(formatter(row))
            cut.append(limited(row))
    except ROW_ERRORS as error:
        told = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        if isinstance(error, TemplateError):
            told = f"the chat template refuses it ({error})"
        return Sample(error=f"Row {len(whole)} of the sample can't be written: {told}")
    return Sample(whole, cut)


def kind_of(row: dict[str, Any], text_field: str) -> str:
    """What a raw row is, in words."""
    if "input_ids" in row:
        return "rows of token ids"
    if "messages" in row:
        return "conversations, whose last answer is the completion"
    if "prompt" in row:
        shape = "messages" if isinstance(row["prompt"], list) else "text"
        return f"prompts and completions of {shape}" if "completion" in row else f"prompts of {shape} alone"
    return f"texts (`{text_field}`), in which every token is trained"


def data_finding(subject: "Subject", sample: Sample) -> Finding:
    """What the rows are, and who writes the completions."""
    name, args = "data", subject.args
    if not subject.rows:
        return Finding(
            name,
            "careful",
            "There are no rows to look at.",
            "Pass the training data by `--dataset_name`.",
            {"rows": 0},
        )
    if sample.error:
        text = sample.error if len(sample.error) <= 600 else f"{sample.error[:599]}…"
        fix = "Change the rows or the tokenizer as the message says; training would stop at the same row."
        return Finding(name, "stop", text, fix, {"rows": len(subject.rows)})
    kind = kind_of(subject.rows[0], args.dataset_text_field)
    student = args.lmbda
    writer = "the dataset" if subject.trains_completions or args.off_policy_source == "dataset" else "the teacher"
    values = {"rows": len(subject.rows), "kind": kind, "student": student, writer.removeprefix("the "): 1 - student}
    text = f"{len(subject.rows)} sampled rows: {kind}. Completions of a step: "
    text += f"{percent(student)} by the student, {percent(1 - student)} by {writer}."
    is_text = sample.kept and sample.kept[0]["prompt_length"] == 0
    highest = max((i for row in sample.kept for i in row["input_ids"]), default=0)
    if highest >= subject.student_rows:
        text += f" A row has the id {highest}, but the student's head has {subject.student_rows} rows."
        fix = "Tokenise the rows with the student's own tokenizer: pass them as text, without `input_ids`."
        return Finding(name, "stop", text, fix, values | {"highest_id": highest})
    if subject.has_own_prompt:
        text += " The teacher reads a prompt of its own."
        clashes = {"`packing=False`": args.packing, "`assistant_only_loss=False`": args.assistant_only_loss}
        if fixes := [fix for fix, is_so in clashes.items() if is_so]:
            text += " That needs one prompt before one completion in a row."
            return Finding(name, "stop", text, f"Set {' and '.join(fixes)}.", values)
    if not subject.has_completions and args.off_policy_source == "dataset" and student < 1:
        text += " But the rows have no completions."
        return Finding(name, "stop", text, "Set `off_policy_source='teacher'` or `lmbda=1`.", values)
    if subject.has_completions and is_text and (student > 0 or args.off_policy_source == "teacher"):
        text += " But a text without a prompt can't be continued."
        fix = "Split the rows into `prompt` and `completion`, or set `lmbda=0` with `off_policy_source='dataset'`."
        return Finding(name, "stop", text, fix, values)
    if not subject.has_completions and args.packing:
        text += " But `packing` needs completions that are there."
        return Finding(name, "stop", text, "Set `packing=False`, or write them first with `trl-kd generate`.", values)
    return Finding(name, "fine", text, values=values)


def verdict_of(share: float) -> str:
    """What a share of the rows that is lost means for a run."""
    return "stop" if share >= STOP_SHARE else "careful" if share >= CAREFUL_SHARE else "fine"


def keeping_length(lengths: list[int]) -> int:
    """Smallest limit that keeps 99% of the rows whole."""
    return sorted(lengths)[math.ceil(KEPT_SHARE * len(lengths)) - 1]


def truncation_finding(subject: "Subject", sample: Sample) -> Finding:
    """Rows and tokens that are lost to `max_length`; completions that nobody reads are not counted."""
    name, limit = "truncation", subject.args.max_length
    usable = [row for row in sample.whole if not row[DROPPED]]
    lengths = [len(row["input_ids"]) if _reads_end(subject, row) else row["prompt_length"] + 1 for row in usable]
    no_room = sum(row[DROPPED] == NO_ROOM for row in sample.cut)
    cut = [row[CUT] for row in sample.cut if row[CUT] and _reads_end(subject, row)]
    # A row that is dropped loses all of it
    gone = [
        len(row["input_ids"]) for row, left in zip(sample.whole, sample.cut, strict=True) if left[DROPPED] == NO_ROOM
    ]
    rows, tokens, total = len(cut) + no_room, sum(cut) + sum(gone), sum(len(row["input_ids"]) for row in usable)
    share = rows / max(len(sample.whole), 1)
    values = {
        "rows": len(sample.whole),
        "lost_rows": rows,
        "lost_share": share,
        "lost_tokens": tokens,
        "lost_token_share": tokens / max(total, 1),
        "no_room": no_room,
        "longest": max(lengths, default=0),
        "max_length": limit,
    }
    if not rows:
        end = "no limit" if limit is None else f"`max_length` is {limit}"
        return Finding(name, "fine", f"No row loses a token: the longest has {values['longest']}, {end}.", "", values)
    needed = values["needed_length"] = keeping_length(lengths)
    text = (
        f"{rows} of {len(sample.whole)} rows ({percent(share)}) are longer than `max_length` ({limit}): they lose "
        f"{tokens} of {total} tokens ({percent(values['lost_token_share'])}) and their EOS"
    )
    text += f"; {no_room} of them are dropped, since their prompt leaves no room for a completion." if no_room else "."
    fix = f"Set `max_length={needed}`, which keeps {KEPT_SHARE:.0%} of the sampled rows whole, or shorten the rows."
    if subject.student_context is not None and needed > subject.student_context:
        fix = (
            f"Split or shorten the rows: `max_length={needed}` would keep {KEPT_SHARE:.0%} of them whole, but the "
            f"student has {subject.student_context} positions."
        )
    return Finding(name, verdict_of(share), text, fix if share >= CAREFUL_SHARE else "", values)


def _reads_end(subject: "Subject", row: dict[str, Any]) -> bool:
    """Whether what follows a row's prompt is trained, or whether somebody else writes it."""
    return subject.trains_completions or row["prompt_length"] >= len(row["input_ids"])


def dropped_finding(subject: "Subject", sample: Sample) -> Finding:
    """Rows that cannot be used for another reason than their length."""
    reasons = Counter(row[DROPPED] for row in sample.whole if row[DROPPED])
    share = reasons.total() / max(len(sample.whole), 1)
    values = {"rows": len(sample.whole), "dropped": reasons.total(), "share": share, "reasons": dict(reasons)}
    if not reasons:
        return Finding("unusable rows", "fine", f"All {len(sample.whole)} rows can be used.", "", values)
    listed = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
    text = f"{reasons.total()} of {len(sample.whole)} rows ({percent(share)}) are dropped: {listed}."
    advice = "; ".join(_ADVICE.get(reason, "remove these rows") for reason, _ in reasons.most_common())
    return Finding("unusable rows", verdict_of(share), text, f"{advice[0].upper()}{advice[1:]}.", values)


def room_findings(subject: "Subject", sample: Sample) -> list[Finding]:
    """Whether prompts with their completions fit the positions that the models have, if they read the same tokens."""
    found, args = [], subject.args
    prompts = [row["prompt_length"] for row in sample.kept]
    longest_row = max((len(row["input_ids"]) for row in sample.kept), default=0)
    # Written during training: a completion may be as long as it may get
    longest = max([longest_row, *([max(prompts) + args.max_completion_length] if subject.writes and prompts else [])])
    own = subject.tokenizer.model_max_length
    context = subject.student_context or (own if own < _MAX_CONTEXT else None)
    limits = [limit for limit in (context, args.vllm_max_model_length if args.use_vllm else None) if limit is not None]
    values = {
        "longest": longest,
        "longest_prompt": max(prompts, default=0),
        "max_completion_length": args.max_completion_length if subject.writes else None,
    }
    if limits:
        found.append(_room("the student's context", longest, min(limits), values, args))
    if subject.teacher_context is None or subject.reads_own_text:
        return found
    if subject.has_own_prompt:
        prompts, rows = _own_prompts(subject, sample)
        longest = max([*rows, *([max(prompts) + args.max_completion_length] if subject.writes and prompts else [])])
        values |= {"longest_prompt": max(prompts, default=0), "longest": longest}
    theirs = _room("the teacher's context", longest, subject.teacher_context, values, args)
    if subject.has_own_prompt and theirs.fix:
        theirs = replace(
            theirs, fix="Shorten `teacher_prompt` or `teacher_system_prompt`, or lower the lengths of completions."
        )
    return [*found, theirs]


def _own_prompts(subject: "Subject", sample: Sample) -> tuple[list[int], list[int]]:
    """Lengths of the teacher's own prompts, and of the rows with these."""
    prompts, rows = [], []
    for raw, row in zip(subject.rows, sample.cut, strict=True):
        if not row[DROPPED]:
            view = read_by_teacher(subject, raw)
            alone = {name: value for name, value in view.items() if name != "completion"}
            prompts.append(len(formatter_of(subject, alone)(alone)["input_ids"]))
            rows.append(prompts[-1] + len(row["input_ids"]) - row["prompt_length"])
    return prompts, rows


def _room(name: str, longest: int, limit: int, values: dict[str, Any], args: Any) -> Finding:
    values = values | {"context": limit}
    if longest <= limit:
        return Finding(name, "fine", f"The longest row of {longest} tokens fits into {limit}.", "", values)
    room = limit - values["longest_prompt"]
    if values["max_completion_length"] and values["longest_prompt"] + values["max_completion_length"] > limit:
        text = (
            f"The longest prompt ({values['longest_prompt']} tokens) with a completion of `max_completion_length` "
            f"({values['max_completion_length']}) has {longest} tokens, {longest - limit} more than the {limit} "
            "positions that there are."
        )
        fix = (
            f"Set `max_completion_length={room}`." if room > 0 else f"Set `max_length={limit}`: prompts are too long."
        )
        return Finding(name, "careful", text, fix, values)
    text = f"The longest row has {longest} tokens, {longest - limit} more than the {limit} positions that there are."
    return Finding(name, "careful", text, f"Set `max_length={limit}` (now {args.max_length}).", values)

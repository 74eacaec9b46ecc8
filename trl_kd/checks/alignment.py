"""Two vocabularies under DSKD: the rows in the teacher's own tokens, and what exact alignment reaches."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trl_kd.checks.finding import Finding
from trl_kd.checks.render import percent
from trl_kd.checks.rows import CAREFUL_SHARE, ROW_ERRORS, Sample, formatter_of, read_by_teacher, verdict_of
from trl_kd.data import DualCollator, Side, TeacherRows, is_conversational
from trl_kd.data.rows import CUT, DROPPED


if TYPE_CHECKING:
    from trl_kd.checks.subject import Subject


_NAME = "alignment"


@dataclass(frozen=True)
class _Dual:
    """Rows of both sides, as DSKD makes them for two tokenizers."""

    rows: list[dict[str, Any]]
    collator: DualCollator


def _dual(subject: "Subject", sample: Sample, limit: int | None) -> _Dual:
    args = subject.args
    first = read_by_teacher(subject, subject.rows[0])
    formatters = [formatter_of(subject, first, of_teacher) for of_teacher in (False, True)]
    sides = [Side.of(formatter, is_conversational(first)) for formatter in formatters]
    rewrite = TeacherRows(
        *sides, "input_ids" in first, limit, formatters[1], subject.has_own_prompt, args.teacher_system_prompt
    )
    pairs = zip(subject.rows, sample.cut, strict=True)
    rows = [raw | row for raw, row in pairs if not row[DROPPED]]
    rows = [row | rewrite(row) for row in rows]
    by = "index" if args.objective == "uld" else args.decided("eta_pairs")
    return _Dual(rows, DualCollator(subject.tokenizer.pad_token_id, None, *sides, by, limit))


def alignment_findings(subject: "Subject", sample: Sample) -> list[Finding]:
    """
    What becomes of the rows in the teacher's own tokens: what its context cuts off, how many tokens exact alignment
    reaches, and which alignment DSKD takes.
    """
    if not subject.reads_own_text or subject.teacher_tokenizer is None:
        return []
    limit = subject.args.teacher_max_length or subject.teacher_context
    try:
        dual = _dual(subject, sample, limit)
        share = dual.collator.coverage(dual.rows)
    except ROW_ERRORS as error:
        fix = "Do as the message says: DSKD writes each row in the tokens of both models, and would end there."
        return [Finding(_NAME, "stop", f"The rows can't be written for both models: {error}", fix)]
    found = [] if limit is None else [_context_finding(subject, dual)]
    return [*found, _coverage_finding(subject, share, len(dual.rows))]


def _coverage_finding(subject: "Subject", share: float, rows: int) -> Finding:
    args = subject.args
    values = {"coverage": share, "rows": rows, "min_coverage": args.min_coverage}
    if args.objective == "uld":
        text = f"By number, {percent(share)} of the student's tokens in {rows} rows have a partner."
        return Finding(_NAME, "fine", text, "", values | {"chosen": "index"})
    is_dual_space = args.objective == "dual_space"
    reach = f"Exact alignment reaches {percent(share)} of the student's tokens in {rows} rows"
    if args.alignment == "cma":
        text = f"{reach}; `alignment='cma'` learns one for all of them."
        return Finding(_NAME, "fine", text, "", values | {"chosen": "cma"})
    is_exact = args.alignment == "eta" or not is_dual_space
    chosen = "eta" if is_exact or share >= args.min_coverage else "cma"
    values |= {"chosen": chosen}
    if share == 0 and is_exact:
        text = f"{reach}: there is nothing to align."
        fix = "Take `alignment='cma'`, or check that both tokenizers are meant for this text."
        return Finding(_NAME, "stop", text, fix, values)
    if share >= args.min_coverage:
        return Finding(_NAME, "fine", f"{reach}: `alignment='{args.alignment}'` uses it.", "", values)
    low = f"{reach}, less than `min_coverage` ({percent(args.min_coverage)})"
    if chosen == "cma":
        text = f"{low}: `alignment='auto'` takes cross-model attention, which has to be learned first."
        fix = "Take a teacher whose tokenizer is nearer, or `alignment='eta'` to learn from these tokens alone."
    else:
        text = f"{low}: the student learns from these tokens alone."
        fix = "Set `alignment='auto'`, which takes cross-model attention here."
        if not is_dual_space:
            fix = "Set `objective='dual_space'`, which has cross-model attention, or take a teacher of nearer tokens."
    return Finding(_NAME, "careful", text, fix, values)


def _context_finding(subject: "Subject", dual: _Dual) -> Finding:
    """What the teacher's own rows lose to its context, or to `teacher_max_length`."""
    name = "the teacher's context"
    limit = subject.args.teacher_max_length or subject.teacher_context
    rows = dual.rows
    lost = sum(1 for row in rows if row[CUT] or row[DROPPED])
    share = lost / max(len(rows), 1)
    values = {"context": limit, "rows": len(rows), "lost_rows": lost, "lost_share": share}
    text = f"{lost} of {len(rows)} rows ({percent(share)}) are longer than {limit} in the teacher's tokens."
    fix = "Lower `max_length`, by which the teacher's rows are cut too, or take a teacher with a longer context."
    if subject.args.teacher_max_length is not None:
        fix = f"Raise `teacher_max_length` (now {limit})."
    return Finding(name, verdict_of(share), text, fix if share >= CAREFUL_SHARE else "", values)

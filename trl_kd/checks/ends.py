"""Whether the student learns to stop: which tokens end a completion, whether rows train one, and what padding does."""

from collections import Counter
from typing import TYPE_CHECKING, Any

from trl_kd.checks.finding import VERDICTS, Finding
from trl_kd.checks.render import percent, quoted
from trl_kd.checks.rows import Sample, keeping_length
from trl_kd.checks.templates import answer_end, uses_template
from trl_kd.checks.vocabulary import token_names
from trl_kd.data.rows import CUT, DROPPED


if TYPE_CHECKING:
    from trl_kd.checks.subject import Subject


# Below this share of rows that train an end, stopping is learned too seldom to be sure of
_MOST = 0.5

# A verdict, what was found, what to do
Remark = tuple[str, str, str]


def end_finding(subject: "Subject", sample: Sample) -> Finding:
    """Which ids end a completion, whether the rows train one, and whether the templates agree with it."""
    told = f"A completion of the student ends by {token_names(subject.tokenizer, subject.ends)}"
    values: dict[str, Any] = {"ends": sorted(subject.ends)}
    if subject.teacher_ends is not None:
        values["teacher_ends"] = sorted(subject.teacher_ends)
        told += f", one of the teacher by {token_names(_teacher_tokenizer(subject), subject.teacher_ends)}"
    remarks = _of_templates(subject)
    if subject.trains_completions:
        rows = trained_rows(subject, sample)
        counts = {
            "rows": len(rows),
            "learn_end": sum(learns_end(labels, subject.ends) for _, labels in rows),
            "last_is_end": sum(labels[last_trained(labels)] in subject.ends for _, labels in rows),
        }
        values |= counts | {"share": counts["learn_end"] / max(len(rows), 1)}
        told += f"; {counts['learn_end']} of {len(rows)} rows ({percent(values['share'])}) train one"
        remarks += _of_rows(subject, sample, rows, values)
        if not remarks:
            remarks += _of_teacher(subject, rows)
    else:
        told += "; completions are written during training, so `trl-kd check` looks at the rollouts for it"
    if subject.method == "sparse-td" and not subject.args.decided("train_eos"):
        said = f"`train_eos` is False (`preset='{subject.args.preset}'`): the end of a text is no action to be learned"
        fix = "Set `train_eos=true`."
        if subject.args.decided("lm_weight") > 0:
            said += ", and only the language-model term shows it"
        remarks.append(("careful", f"{said}.", fix))
    remarks.sort(key=lambda remark: VERDICTS.index(remark[0]), reverse=True)
    verdict = remarks[0][0] if remarks else "fine"
    text = " ".join([*(said for _, said, _ in remarks), f"{told}."])
    return Finding("end of a completion", verdict, text, " ".join(dict.fromkeys(fix for *_, fix in remarks)), values)


def _teacher_tokenizer(subject: "Subject") -> Any:
    return subject.tokenizer if subject.teacher_tokenizer is None else subject.teacher_tokenizer


def trained_rows(subject: "Subject", sample: Sample) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of the rows that train something: those of the batch, if there is one."""
    if subject.batch is not None:
        rows = _rows_of_batch(subject.batch)
    else:
        rows = [(row["input_ids"], row["labels"]) for row in sample.kept]
    return [(ids, labels) for ids, labels in rows if any(label != -100 for label in labels[1:])]


def _rows_of_batch(batch: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Rows of any collator's batch, without what its mask hides; packed ones apart."""
    names = ("input_ids", "labels")
    lists = {name: part.tolist() for name, part in batch.items() if name in (*names, "attention_mask", "position_ids")}
    pairs = list(zip(lists["input_ids"], lists["labels"], strict=True))
    if "attention_mask" in lists:
        # A mask that was made by ids hides an EOS too; its label is what counts, and stays
        return [
            (_seen(ids, labels, mask, ids), _seen(ids, labels, mask, labels))
            for (ids, labels), mask in zip(pairs, lists["attention_mask"], strict=True)
        ]
    if "position_ids" not in lists:
        return pairs
    found = []
    for (ids, labels), positions in zip(pairs, lists["position_ids"], strict=True):
        bounds = [i for i, position in enumerate(positions) if position == 0] + [len(ids)]
        found += [(ids[i:j], labels[i:j]) for i, j in zip(bounds, bounds[1:], strict=False)]
    return found


def _seen(ids: list[int], labels: list[int], mask: list[int], part: list[int]) -> list[int]:
    return [part[i] for i in range(len(ids)) if mask[i] or labels[i] != -100]


def learns_end(labels: list[int], ends: set[int]) -> bool:
    """Whether a token that ends a completion is trained; the first position never is."""
    return any(label in ends for label in labels[1:])


def last_trained(labels: list[int]) -> int:
    """Position of the last label that is trained."""
    return max(i for i, label in enumerate(labels) if label != -100)


def _of_templates(subject: "Subject") -> list[Remark]:
    """Templates whose answers end by a token that doesn't end a generation."""
    if not uses_template(subject):
        return []
    found = []
    sides = [("student", subject.tokenizer, subject.ends, subject.teacher_tokenizer, subject.teacher_ends)]
    if subject.reads_own_text and subject.teacher_tokenizer is not None:
        sides.append(("teacher", subject.teacher_tokenizer, subject.teacher_ends, subject.tokenizer, subject.ends))
    for side, tokenizer, ends, other, other_ends in sides:
        end = answer_end(tokenizer)
        if end is None or ends & set(end.ids):
            continue
        marker, whole = quoted(end.marker), end.marker in tokenizer.get_vocab()
        said = f"The {side}'s chat template ends an answer with {marker}, which doesn't end the {side}'s generation"
        if not whole:
            pieces = len(tokenizer(end.marker, add_special_tokens=False)["input_ids"])
            said += f": its tokenizer splits it into {pieces} tokens"
        names = set((other or tokenizer).convert_ids_to_tokens(sorted(other_ends or [])))
        verdict = "careful"
        if end.marker in names:
            said += f", but is what ends the {'teacher' if side == 'student' else 'student'}'s"
            verdict = "stop"
        if not whole:
            fix = f"Give the {side} a chat template of its own tokens"
            fix += " (`chat_template_path`)." if side == "student" else " (in its tokenizer's folder)."
        elif side == "student":
            fix = f"Set `eos_token={end.marker!r}`."
        else:
            fix = f"Add {marker} to `eos_token_id` in the teacher's generation config, or make it its `eos_token`."
        found.append((verdict, f"{said}.", fix))
    return found


def _of_rows(subject: "Subject", sample: Sample, rows: list, values: dict[str, Any]) -> list[Remark]:
    """Rows that train no end, with the likely reason."""
    if not rows or values["share"] >= _MOST:
        return []
    told = "No row trains" if not values["learn_end"] else f"Only {percent(values['share'])} of the rows train"
    verdict = "careful" if values["learn_end"] else "stop"
    often = "hardly" if values["learn_end"] else "never"
    said = f"{told} a token that ends a completion, so the student {often} learns to stop"
    eos = subject.tokenizer.eos_token
    prepared = sum(learns_end(row["labels"], subject.ends) for row in sample.kept)
    if subject.batch is not None and prepared > values["learn_end"] * 2:
        reason = f"the rows have it ({prepared} of {len(sample.kept)}), but the collator masks it in `labels`"
        fix = "Leave out `data_collator`: the trainer's own masks padding by length, not by id."
        if subject.tokenizer.pad_token_id in subject.ends:
            fix += f" Or set a `pad_token` that isn't {quoted(eos)}."
    elif sum(bool(row[CUT]) for row in sample.kept) * 2 > len(sample.kept):
        needed = keeping_length([len(row["input_ids"]) for row in sample.whole if not row[DROPPED]])
        reason = f"`max_length` ({subject.args.max_length}) cuts it off"
        fix = f"Set `max_length={needed}`."
        if subject.student_context is not None and needed > subject.student_context:
            fix = f"Split or shorten the rows: they have up to {needed} tokens, the student {subject.student_context}."
    elif "input_ids" in subject.rows[0]:
        reason, fix = _of_tokenised(subject, rows)
    elif any(row.get("truncated") for row in subject.rows):
        reason = "their column `truncated` says that the writer was cut off"
        fix = "Write them again with a larger `--max_completion_length` of `trl-kd generate`, or add rows that end."
    else:
        reason, fix = "the labels leave it out", f"Train {quoted(eos)} at the end of each completion."
    return [(verdict, f"{said}: {reason}.", fix)]


def _of_tokenised(subject: "Subject", rows: list) -> tuple[str, str]:
    """Why rows that came as token ids train no end."""
    tokenizer = subject.tokenizer
    eos = f"{quoted(tokenizer.eos_token)} ({tokenizer.eos_token_id})"
    behind = [ids[last_trained(labels) + 1 :][:1] for ids, labels in rows]
    if sum(bool(ids) and ids[0] in subject.ends for ids in behind) * 2 > len(rows):
        return (
            "they came as token ids with the end masked in `labels`"
            + (
                ", as happens where padding is masked by its id and the pad token is the EOS"
                if _is_pad_end(subject)
                else ""
            ),
            f"Set the label of {eos} at the end of each completion to its id, not -100.",
        )
    [(last, count)] = Counter(labels[last_trained(labels)] for _, labels in rows).most_common(1)
    content = str(tokenizer.convert_ids_to_tokens(last))
    if count * 2 > len(rows) and last in tokenizer.added_tokens_decoder:
        return f"they came as token ids that end by {quoted(content)} ({last})", f"Set `eos_token={content!r}`."
    return (
        "they came as token ids without one",
        f"End each row of `input_ids` (and `labels`) with {eos}, or pass text, which the trainer ends itself.",
    )


def _is_pad_end(subject: "Subject") -> bool:
    return subject.tokenizer.pad_token_id in subject.ends


def _of_teacher(subject: "Subject", rows: list) -> list[Remark]:
    """A token that ends the student's text, and that the teacher, who reads the same tokens, never ends with."""
    theirs, tokenizer = subject.teacher_ends, subject.tokenizer
    if subject.reads_own_text or not subject.same_tokens or not theirs or not rows:
        return []
    last = Counter(labels[last_trained(labels)] for _, labels in rows if labels[last_trained(labels)] in subject.ends)
    [(closing, _)] = last.most_common(1)
    if closing in theirs:
        return []
    instead = tokenizer.convert_ids_to_tokens(min(theirs))
    said = (
        f"The rows end with {token_names(tokenizer, [closing])}, which doesn't end the teacher's text "
        f"({token_names(tokenizer, theirs)} does): it would teach the student not to write it."
    )
    return [("careful", said, f"Set `eos_token={instead!r}`.")]


def pad_finding(subject: "Subject", sample: Sample) -> Finding:
    """Whether padding is mistaken for the end of a text, or trained."""
    tokenizer, name = subject.tokenizer, "padding"
    pad, is_end = tokenizer.pad_token_id, _is_pad_end(subject)
    values: dict[str, Any] = {"pad": pad, "eos": tokenizer.eos_token_id, "pad_is_end": is_end}
    padding = f"{quoted(str(tokenizer.pad_token))} ({pad})"
    rows = trained_rows(subject, sample) if subject.trains_completions or subject.batch is not None else []
    runs = [_pads_at_end(labels, pad) for _, labels in rows]
    values["rows_with_trained_padding"] = sum(run > is_end for run in runs)
    if values["rows_with_trained_padding"]:
        return Finding(
            name,
            "stop",
            f"{values['rows_with_trained_padding']} of {len(rows)} rows train padding: their labels end with up to "
            f"{max(runs)} times {padding}. The student would learn to write it.",
            "Set these `labels` to -100, or leave the padding out of `input_ids`: the collator pads by itself, and "
            "masks by length.",
            values,
        )
    values["rows_with_masked_end"] = masked = _masked_ends(subject, sample, rows) if is_end else 0
    if masked:
        where = "`data_collator`" if subject.batch is not None and "input_ids" not in subject.rows[0] else "`labels`"
        return Finding(
            name,
            "stop",
            f"The pad token is {padding}, which also ends a text, and {masked} of {len(rows)} rows have their end "
            f"masked as if it were padding (by {where}). The student never learns to stop there.",
            f"Mask padding by length: leave out `data_collator`, or in `labels` keep the first {padding} of each "
            "completion. Or set a `pad_token` that ends nothing.",
            values,
        )
    if is_end:
        text = f"The pad token is {padding}, which also ends a text; harmless, since padding is masked by length."
        return Finding(name, "fine", text, "", values)
    return Finding(name, "fine", f"The pad token is {padding}, which ends nothing.", "", values)


def _pads_at_end(labels: list[int], pad: int) -> int:
    """Pad tokens that are trained at the end of a row."""
    trained = [label for label in labels if label != -100]
    while trained and trained[-1] == pad:
        trained.pop()
    return sum(label != -100 for label in labels) - len(trained)


def _masked_ends(subject: "Subject", sample: Sample, rows: list) -> int:
    """Rows whose end is there, but not trained."""
    pad, ends = subject.tokenizer.pad_token_id, subject.ends
    prepared = [row for row in sample.kept if any(label != -100 for label in row["labels"][1:])]
    if subject.batch is not None and len(rows) == len(prepared):
        pairs = zip(rows, prepared, strict=True)
        lost = sum(learns_end(row["labels"], ends) and not learns_end(labels, ends) for (_, labels), row in pairs)
        if lost:
            return lost
    if subject.batch is not None and prepared and not any(learns_end(labels, ends) for _, labels in rows):
        if any(learns_end(row["labels"], ends) for row in prepared):
            return len(rows)
    if "input_ids" not in subject.rows[0]:
        return 0
    behind = [row["input_ids"][last_trained(row["labels"]) + 1 :][:1] for row in prepared]
    is_open = [row["labels"][last_trained(row["labels"])] not in ends for row in prepared]
    return sum(after == [pad] and unended for after, unended in zip(behind, is_open, strict=True))

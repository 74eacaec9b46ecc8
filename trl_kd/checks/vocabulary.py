"""Whether two models count the same tokens, and whether every id has a row in their heads."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from trl_kd.checks.finding import Finding
from trl_kd.checks.render import quoted
from trl_kd.teachers.vocabulary import tokens_beyond


if TYPE_CHECKING:
    from trl_kd.checks.subject import Subject


NAME = "vocabularies"
_SPECIAL = ("bos", "eos", "pad", "unk")


def token_names(tokenizer: Any, ids: Iterable[int]) -> str:
    """Tokens with their ids, for a sentence."""
    return ", ".join(f"{quoted(str(tokenizer.convert_ids_to_tokens(i)))} ({i})" for i in sorted(ids)) or "none"


def vocabulary_finding(subject: "Subject") -> Finding:
    """Same, padded or different vocabularies, and what the method can do with them."""
    sizes = {"student_rows": subject.student_rows, "teacher_rows": subject.teacher_rows}
    if subject.teacher_tokenizer is None:
        return _unknown(subject, sizes)
    student, teacher = subject.tokenizer.get_vocab(), subject.teacher_tokenizer.get_vocab()
    values = sizes | {
        "student_tokens": len(student),
        "teacher_tokens": len(teacher),
        "same": len(student.items() & teacher.items()),
    }
    if student != teacher:
        return _different(subject, student, teacher, values)
    rows = [size for size in sizes.values() if size is not None]
    shared, highest = min(rows), max(student.values())
    is_padded = len(set(rows)) > 1
    values |= {"kind": "padded" if is_padded else "same", "shared_rows": shared, "highest_id": highest}
    lost, _ = tokens_beyond(subject.tokenizer, subject.student_rows, shared)
    if lost:
        smaller = "student" if subject.student_rows == shared else "teacher"
        return Finding(
            NAME,
            "stop",
            f"One tokenizer of {len(student)} tokens, with ids up to {highest}, but the {smaller}'s head has {shared} "
            "rows: tokens beyond them could never be learned.",
            f"Resize the {smaller}'s embeddings: `model.resize_token_embeddings({highest + 1})`, or take a tokenizer "
            "without the added tokens (`pad_token` may be one that it has).",
            values,
        )
    text = f"Same: {len(student)} tokens, the same ids on both sides."
    if is_padded:
        text = (
            f"Padded: one tokenizer of {len(student)} tokens, heads of {subject.student_rows} (student) and "
            f"{subject.teacher_rows} (teacher) rows. They are cut to the {shared} that they share, and no token is "
            "lost."
        )
    return Finding(NAME, "fine", text, values=values)


def _unknown(subject: "Subject", sizes: dict[str, Any]) -> Finding:
    args = subject.args
    values = sizes | {"kind": "unknown"}
    save = "Save the tokenizer in the teacher's folder, or pass it as `teacher_processing_class`."
    known = None
    if args.teacher_cache is not None:
        known = "The teacher is a cache, which is compared with the student's tokenizer when it is opened."
    elif args.teacher_adapter is not None:
        known = "The teacher is the student's own base: one tokenizer for both."
    if known:
        return Finding(NAME, "fine", known, values=values | {"kind": "same"})
    if subject.reads_own_text:
        return Finding(
            NAME,
            "stop",
            f"`alignment` is '{args.alignment}', but the teacher has no tokenizer beside it, so its tokens stand for "
            "nothing.",
            save,
            values,
        )
    if subject.teacher_rows not in (None, subject.student_rows):
        return Finding(
            NAME,
            "stop",
            f"The student's head has {subject.student_rows} rows, the teacher's {subject.teacher_rows}, and the "
            "teacher has no tokenizer beside it to show that both count the same tokens.",
            save,
            values,
        )
    text = "The teacher has no tokenizer beside it; that its tokens are the student's is taken for granted."
    return Finding(NAME, "careful", text, save, values)


def _different(subject: "Subject", student: dict, teacher: dict, values: dict[str, Any]) -> Finding:
    values = values | {"kind": "different"}
    only = {
        "student": sorted(student.keys() - teacher.keys(), key=student.get),
        "teacher": sorted(teacher.keys() - student.keys(), key=teacher.get),
    }
    values |= {f"only_{side}": len(tokens) for side, tokens in only.items()}
    text = (
        f"Different: the student's tokenizer has {len(student)} tokens, the teacher's {len(teacher)}, and "
        f"{values['same']} of them have the same id."
    )
    if len(student) == len(teacher):
        text = f"{text} They are of one size, but not the same."
    is_dual, fixes = subject.reads_own_text, []
    longer = "student" if only["student"] else "teacher"
    is_added = values["same"] == min(len(student), len(teacher)) and len(only[longer]) <= 16
    if is_added:
        names = ", ".join(map(quoted, only[longer][:3]))
        text += f" Only the {longer} has {names}: all others are the same."
        fixes.append(_pad_advice(subject, longer, only[longer]))
    if is_dual and subject.args.packing:
        text += " `packing` is on, but rows of two tokenizers differ in length and cannot be packed alike."
        return Finding(NAME, "stop", text, "Set `packing=False`.", values)
    if is_dual:
        text += f" DSKD lets each model read its own tokens and aligns them (`alignment='{subject.args.alignment}'`)."
        return Finding(NAME, "careful" if is_added else "fine", text, " ".join(fixes), values)
    if subject.method == "dskd":
        fixes.append("Set `alignment='auto'`, by which DSKD takes any tokenizer.")
    else:
        text += f" {'AMM' if subject.method == 'amm' else 'SparseTD'} compares the two models token by token."
        fixes.append(
            "Use DSKD, which takes any tokenizer (`trl-kd dskd`, `DSKDTrainer` with `alignment='auto'`), or a teacher "
            "with the student's tokenizer."
        )
    return Finding(NAME, "stop", text, " ".join(fixes), values)


def _pad_advice(subject: "Subject", side: str, added: list[str]) -> str:
    """How to be rid of a token that one side alone has."""
    tokenizer, other = subject.tokenizer, subject.teacher_tokenizer
    if side == "teacher":
        tokenizer, other = other, tokenizer
    if tokenizer.pad_token not in added:
        return f"Give both models one tokenizer, with or without {quoted(added[0])}."
    vocabulary = tokenizer.get_vocab()
    known = [token for token in (other.pad_token, tokenizer.eos_token) if token in vocabulary and token not in added]
    instead = known[0] if known else other.eos_token
    return (
        f"It is for padding, which needs no token of its own: load the {side}'s tokenizer without it and set "
        f"`pad_token={instead!r}`, which both have."
    )


def special_ids_finding(subject: "Subject") -> Finding:
    """BOS, EOS, pad and unknown token of both sides; ids without a row in a head."""
    name = "special ids"
    sides = {"student": (subject.tokenizer, subject.student_rows, subject.eos_token_ids)}
    if subject.teacher_tokenizer is not None:
        ends = subject.teacher_eos_token_ids or []
        sides["teacher"] = (subject.teacher_tokenizer, subject.teacher_rows, ends)
    values, told, beyond = {}, [], []
    for side, (tokenizer, rows, ends) in sides.items():
        ids = _special_ids(tokenizer)
        values[side] = ids | {"ends": sorted(ends)}
        words = [
            f"{kind} {quoted(str(tokenizer.convert_ids_to_tokens(i)))} ({i})" if i is not None else f"no {kind}"
            for kind, i in ids.items()
        ]
        told.append(f"{side.capitalize()}: {', '.join(words)}.")
        highest = max([*tokenizer.get_vocab().values(), *ends])
        if rows is not None and highest >= rows:
            over = [kind for kind, i in ids.items() if i is not None and i >= rows]
            over += ["an end of text"] if max(ends, default=0) >= rows else []
            beyond.append((side, rows, highest, over))
    if beyond:
        return _beyond(name, subject, beyond, values)
    if begins := _begins_differently(subject):
        return Finding(name, "careful", *begins, values)
    return Finding(name, "fine", " ".join(told), values=values)


def _beyond(name: str, subject: "Subject", beyond: list[tuple], values: dict[str, Any]) -> Finding:
    """Ids without a row, those first that a run is sure to meet."""
    side, rows, highest, over = max(beyond, key=lambda found: len(found[3]))
    used = ", ".join(over)
    return Finding(
        name,
        "stop" if over else "careful",
        f"The {side}'s ids go up to {highest}, but its head has {rows} rows: an id beyond has neither embedding nor "
        f"logit. {f'Among them: {used}.' if over else 'No special token is among them, but a text might have one.'}",
        f"Resize the {side}'s embeddings (`model.resize_token_embeddings({highest + 1})`), or take tokens that it has "
        f"(such as `pad_token={subject.tokenizer.eos_token!r}`).",
        values | {"beyond": {side: {"rows": rows, "highest_id": highest} for side, rows, highest, _ in beyond}},
    )


def _special_ids(tokenizer: Any) -> dict[str, int | None]:
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    return dict(zip(_SPECIAL, ids, strict=True))


def _begins_differently(subject: "Subject") -> tuple[str, str] | None:
    """What to say of a BOS that only one tokenizer puts before a text that both models read."""
    first = subject.rows[0] if subject.rows else {}
    is_text = not ("input_ids" in first or "messages" in first or isinstance(first.get("prompt"), list))
    if subject.teacher_tokenizer is None or subject.reads_own_text or not subject.same_tokens or not is_text:
        return None
    begins = [
        tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        for tokenizer in (subject.tokenizer, subject.teacher_tokenizer)
    ]
    if begins[0] == begins[1]:
        return None
    does, lacks = ("student", "teacher") if begins[0] else ("teacher", "student")
    bos = quoted((subject.tokenizer if begins[0] else subject.teacher_tokenizer).bos_token)
    return (
        f"The {does}'s tokenizer begins a text with {bos}, the {lacks}'s does not. The teacher reads the student's "
        f"tokens, {'with' if begins[0] else 'without'} it.",
        f"Make the student's tokenizer begin texts as the teacher's does: load it with `add_bos_token={begins[1]}`, "
        "or give the student the teacher's tokenizer.",
    )

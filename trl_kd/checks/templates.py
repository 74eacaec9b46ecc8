"""Chat templates of teacher and student: what both write for one row, and which of them thinks."""

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from trl_kd.checks.finding import Finding
from trl_kd.checks.render import quoted, section, trained, visible
from trl_kd.checks.rows import ROW_ERRORS, Sample, formatter_of, read_by_teacher
from trl_kd.data import is_conversational
from trl_kd.data.rows import DROPPED, answer_of


if TYPE_CHECKING:
    from trl_kd.checks.subject import Subject


# What templates write around a message: <|im_start|>, <start_of_turn>, [INST], <s>
_MARKER = re.compile(r"<\|[^|\s]{1,40}\|>|</?[^<>\s]{1,40}>|\[/?[A-Z_]{2,20}\]")
_QUESTION, _ANSWER = "Hello", "World"
_PROBE = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
# Names by which templates ask whether to think
_SWITCHES = ("enable_thinking", "thinking")
# Rows whose texts are compared, and characters of a stretch that a sample shows
_COMPARED, _SHOWN = 16, 600

_NAME = "chat templates"


def uses_template(subject: "Subject") -> bool:
    """Whether the rows hold messages, which a chat template writes."""
    return bool(subject.rows) and is_conversational(subject.rows[0])


def _write(tokenizer: Any, messages: list[dict], **options: Any) -> str:
    """Text of messages by the tokenizer's chat template; empty where there is none, or where it refuses them."""
    if tokenizer.chat_template is None:
        return ""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (TemplateError, ValueError):
        return ""


@dataclass(frozen=True)
class AnswerEnd:
    """What a template writes behind an answer: its first marker, and the ids of all."""

    marker: str
    ids: list[int]


def answer_end(tokenizer: Any) -> AnswerEnd | None:
    """How a chat template ends an answer; `None` where it writes no marker there."""
    text = _write(tokenizer, _PROBE)
    if _ANSWER not in text:
        return None
    tail = text.rpartition(_ANSWER)[2].strip()
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
    for i in ids[:1]:
        if i in tokenizer.added_tokens_decoder:
            return AnswerEnd(tokenizer.added_tokens_decoder[i].content, ids)
    match = _MARKER.match(tail)
    return AnswerEnd(match.group(), ids) if match else None


def foreign_markers(tokenizer: Any, other: Any) -> list[str]:
    """Markers of a tokenizer's chat template that it splits, and that the other tokenizer has as one token."""
    text = _write(tokenizer, _PROBE) + _write(tokenizer, _PROBE[:1], add_generation_prompt=True)
    own, others = tokenizer.get_vocab(), other.get_vocab()
    return [marker for marker in dict.fromkeys(_MARKER.findall(text)) if marker not in own and marker in others]


def template_finding(subject: "Subject", sample: Sample) -> Finding:
    """Both templates on rows of the data, with what is trained."""
    name, student, teacher = _NAME, subject.tokenizer, subject.teacher_tokenizer
    if not uses_template(subject):
        what = "came as token ids" if "input_ids" in subject.rows[0] else "hold text"
        return Finding(name, "fine", f"The rows {what}, so no chat template is used.", "", {"used": False})
    values: dict[str, Any] = {"used": True}
    if student.chat_template is None:
        fix = "Set `chat_template_path`, or pass `prompt` and `completion` as text."
        return Finding(name, "stop", "The rows hold messages, but the student has no chat template.", fix, values)
    shown = _shown(subject, sample)
    if (refusal := _refused(student, subject.rows)) is not None:
        text = f"The student's chat template refuses {refusal}."
        fix = "Change the rows as it says, or give another template by `chat_template_path`."
        return Finding(name, "stop", text, fix, values, shown)
    if teacher is None:
        text = "The teacher reads what the student's chat template writes."
        return Finding(name, "fine", text, "", values, shown)
    if teacher.chat_template is None:
        return _no_teacher_template(subject, values, shown)
    if (refusal := _refused(teacher, [read_by_teacher(subject, row) for row in subject.rows])) is not None:
        text = f"The teacher's chat template refuses {refusal}, so it was not trained on such rows."
        fix = "Change the rows as it says, or take a teacher whose template knows them."
        return Finding(name, "stop" if subject.reads_own_text else "careful", text, fix, values, shown)
    return swapped_finding(subject, values, shown) or _compared(subject, values, shown)


def _refused(tokenizer: Any, rows: list[dict[str, Any]]) -> str | None:
    """How many of the rows a template refuses, and what it says of the first; `None` if it writes them all."""
    rows, told = [row for row in rows[:_COMPARED] if is_conversational(row)], []
    for row in rows:
        try:
            tokenizer.apply_chat_template(_messages(row), tokenize=False, **_options(row))
        except (TemplateError, ValueError) as error:
            told.append(str(error))
    return f"{len(told)} of {len(rows)} rows ({visible(told[0])})" if told else None


def _no_teacher_template(subject: "Subject", values: dict[str, Any], shown: str) -> Finding:
    if subject.reads_own_text:
        fix = "Set the `chat_template` of the teacher's tokenizer, or pass `prompt` and `completion` as text."
        return Finding(_NAME, "stop", "The teacher has no chat template to write messages with.", fix, values, shown)
    text = (
        "The teacher has no chat template, so it may never have seen a conversation; it reads what the student's "
        "writes."
    )
    fix = "Take a teacher that was trained on conversations, or pass `prompt` and `completion` as text."
    return Finding(_NAME, "careful", text, fix, values, shown)


def swapped_finding(subject: "Subject", values: dict[str, Any], shown: str) -> Finding | None:
    """Templates that belong to the other model, if they do."""
    sides = {
        "student": (subject.tokenizer, subject.teacher_tokenizer, subject.ends, subject.teacher_ends),
        "teacher": (subject.teacher_tokenizer, subject.tokenizer, subject.teacher_ends, subject.ends),
    }
    foreign, astray, told = {}, {}, []
    for side, (tokenizer, other, ends, other_ends) in sides.items():
        foreign[side], end = foreign_markers(tokenizer, other), answer_end(tokenizer)
        names = set(other.convert_ids_to_tokens(sorted(other_ends)))
        is_own = end is None or bool(ends & set(end.ids))
        astray[side] = not is_own and end.marker in names
        if foreign[side]:
            marker = foreign[side][0]
            pieces = len(tokenizer(marker, add_special_tokens=False)["input_ids"])
            rest = f" (and {len(foreign[side]) - 1} more)" if len(foreign[side]) > 1 else ""
            told.append(
                f"The {side}'s template writes {quoted(marker)}{rest}, which the {side}'s tokenizer splits into "
                f"{pieces} tokens and the other's has as one."
            )
        if astray[side]:
            told.append(
                f"The {side}'s template ends an answer with {quoted(end.marker)}, which ends the other's text."
            )
    is_swapped = (all(foreign.values()) or all(astray.values())) or any(foreign[s] and astray[s] for s in sides)
    if not any(foreign.values()) and not is_swapped:
        return None
    wrong = [side for side in sides if foreign[side] or astray[side]]
    ways = {
        "student": "the student's own by `chat_template_path`",
        "teacher": "the teacher's own in its tokenizer's folder (`chat_template.jinja`)",
    }
    if is_swapped:
        told.insert(0, "The chat templates look swapped." if len(wrong) > 1 else f"The {wrong[0]}'s is the other's.")
    fix = f"Set {' and '.join(ways[side] for side in wrong)}."
    verdict = "stop" if is_swapped else "careful"
    values = values | {"foreign_markers": foreign, "ends_like_the_other": astray}
    return Finding(_NAME, verdict, " ".join(told), fix, values, shown)


def _compared(subject: "Subject", values: dict[str, Any], shown: str) -> Finding:
    """Whether both templates write the same."""
    rows = [row for row in subject.rows[:_COMPARED] if is_conversational(row)]
    pairs = [
        tuple(_texts(tokenizer, row) for tokenizer in (subject.tokenizer, subject.teacher_tokenizer)) for row in rows
    ]
    differing = [(ours, theirs) for ours, theirs in pairs if ours != theirs]
    values = values | {"rows": len(rows), "differing": len(differing)}
    if not differing:
        return Finding(_NAME, "fine", f"Both write the same for {len(rows)} rows.", "", values, shown)
    if subject.reads_own_text:
        text = "Each model reads the rows in its own template, which ends as its own text ends."
        return Finding(_NAME, "fine", text, "", values, shown)
    ours, theirs = next(((a, b) for a, b in zip(*differing[0], strict=True) if a != b), ("", ""))
    place = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    start = max(0, place - 12)
    text = (
        f"They differ in {len(differing)} of {len(rows)} rows, first in {quoted(ours[start : place + 28])} (student) "
        f"and {quoted(theirs[start : place + 28])} (teacher). The teacher reads what the student's template writes, "
        "which it was not trained on."
    )
    fix = (
        "Save the teacher's template as a file and give it to the student by `chat_template_path`, unless the teacher "
        "knows the student's."
    )
    return Finding(_NAME, "careful", text, fix, values, shown)


def _texts(tokenizer: Any, row: dict[str, Any]) -> tuple[str, str]:
    """What a template writes for a row: the prompt, and all of it."""
    messages, options = _messages(row), _options(row)
    prompt = _write(tokenizer, answer_of(messages)[0], add_generation_prompt=True, **options)
    return prompt, _write(tokenizer, messages, **options)


def _messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    return row["messages"] if "messages" in row else row["prompt"] + (row.get("completion") or [])


def _options(row: dict[str, Any]) -> dict[str, Any]:
    """What a row says about its own rendering, as the trainers read it."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools or None, **(row.get("chat_template_kwargs") or {})}


def _shown(subject: "Subject", sample: Sample) -> str:
    """One row as both models' tokenizers write it, with what is trained."""
    # Rather one that is trained than one that is dropped for its length
    prepared = [*enumerate(sample.cut), *enumerate(sample.whole)]
    number, ours = next(((i, row) for i, row in prepared if not row[DROPPED]), (None, None))
    if ours is None:
        return ""
    row = subject.rows[number]
    view = read_by_teacher(subject, row)
    parts = [section("student", _marked(subject.tokenizer, ours))]
    if subject.has_own_prompt and not subject.reads_own_text:
        written = _marked(subject.tokenizer, formatter_of(subject, view)(view))
        return parts[0] + section("teacher, with its own prompt", written)
    if subject.teacher_tokenizer is not None and subject.teacher_tokenizer.chat_template is not None:
        try:
            parts.append(
                section("teacher", _marked(subject.teacher_tokenizer, formatter_of(subject, view, True)(view)))
            )
        except ROW_ERRORS as error:
            parts.append(section("teacher", visible(f"The template can't write this row: {error}")))
    return "".join(parts)


def _marked(tokenizer: Any, row: dict[str, Any]) -> str:
    """A row as text, with marks around what is trained; long stretches lose their middle."""
    ids, flags = row["input_ids"], [label != -100 for label in row["labels"]]
    bounds = [0, *(i for i in range(1, len(ids)) if flags[i] != flags[i - 1]), len(ids)]
    parts = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        text = tokenizer.decode(ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if len(text) > _SHOWN:
            text = f"{text[: _SHOWN // 2]} [... {len(text) - _SHOWN} characters ...] {text[-_SHOWN // 2 :]}"
        parts.append(trained(text) if flags[start] else visible(text))
    return "".join(parts)


@dataclass(frozen=True)
class Thinking:
    """Whether a template can be told to think, and what it writes for it before an answer."""

    switch: str  # name of the option, or empty
    block: str  # "open", "empty" or "none": of <think> before the answer
    thinks: bool

    @property
    def is_known(self) -> bool:
        return bool(self.switch) or self.block != "none"


def thinking_of(tokenizer: Any, options: dict[str, Any]) -> Thinking:
    """How a tokenizer's chat template thinks, under the options that the rows give it."""

    def begin(**options: Any) -> str:
        return _write(tokenizer, _PROBE[:1], add_generation_prompt=True, **options)

    found, block = begin(**options), "none"
    behind = found.rpartition(_QUESTION)[2]
    if "<think>" in behind:
        block = "empty" if "</think>" in behind.rpartition("<think>")[2] else "open"
    switch = next((name for name in _SWITCHES if begin(**{name: True}) != begin(**{name: False})), "")
    thinks = found == begin(**{switch: True}) if switch else block == "open"
    return Thinking(switch, block, thinks)


def thinking_finding(subject: "Subject") -> Finding:
    """Whether one model is asked to think and the other is not."""
    name = "thinking mode"
    if not uses_template(subject):
        return Finding(name, "fine", "No chat template is used.", "", {"used": False})
    given = [
        {
            key: value
            for key, value in (row.get("chat_template_kwargs") or {}).items()
            if key in _SWITCHES and value is not None
        }
        for row in subject.rows
    ]
    teacher = subject.tokenizer if subject.teacher_tokenizer is None else subject.teacher_tokenizer
    sides = {
        side: thinking_of(tokenizer, given[0])
        for side, tokenizer in (("student", subject.tokenizer), ("teacher", teacher))
    }
    values = {side: {"switch": own.switch, "block": own.block, "thinks": own.thinks} for side, own in sides.items()}
    values["rows_that_set_it"] = sum(map(bool, given))
    ours, theirs = sides["student"], sides["teacher"]
    if not ours.is_known and not theirs.is_known:
        return Finding(name, "fine", "Neither template has one.", "", values)
    if ours.is_known and theirs.is_known:
        if (ours.block, ours.thinks) == (theirs.block, theirs.thinks):
            state = "on" if ours.thinks else "off"
            return Finding(name, "fine", f"Both templates have one, and it is {state} for both.", "", values)
        states = ", ".join(f"{'on' if own.thinks else 'off'} for the {side}" for side, own in sides.items())
        return Finding(name, "careful", f"Both templates have one, but it is {states}.", _fix(subject, sides), values)
    thinker = "student" if ours.is_known else "teacher"
    is_read = thinker == "student" or subject.reads_own_text
    if all(given) and is_read and not sides[thinker].thinks:
        text = f"The {thinker}'s template alone has one, which all rows switch off."
        return Finding(name, "fine", text, "", values)
    state = "on" if sides[thinker].thinks else "off"
    other = "teacher" if thinker == "student" else "student"
    text = (
        f"The {thinker}'s template alone has one, and it is {state}: the {thinker} may write `<think>` where the "
        f"{other} answers at once."
    )
    return Finding(name, "careful", text, _fix(subject, sides), values)


def _fix(subject: "Subject", sides: dict[str, Thinking]) -> str:
    """How to switch it off on both sides."""
    switches = [own.switch for own in sides.values() if own.switch]
    fixes = []
    if switches:
        setting = json.dumps({switches[0]: False})
        fixes.append(
            f"Give the rows the column `chat_template_kwargs` with `{setting}`, which the trainer passes to the chat "
            "templates."
        )
    if not subject.reads_own_text and sides["teacher"].is_known and not sides["student"].switch:
        fixes.append(
            "The teacher reads what the student's template writes: give the student the teacher's by "
            "`chat_template_path`."
        )
    if not switches or any(own.block == "open" and not own.switch for own in sides.values()):
        fixes.append("Take a template that doesn't open `<think>` by itself (`chat_template_path`).")
    return " ".join(fixes)

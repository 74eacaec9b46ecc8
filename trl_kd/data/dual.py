"""The same text in the tokens of two models: rows and batches that carry both."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trl_kd.data.alignment import TokenBytes, align_row, stretches
from trl_kd.data.collator import KDCollator, completed_row
from trl_kd.data.rows import CUT, DROPPED, RowFormatter
from trl_kd.data.teacher_prompt import teacher_view


TEACHER_NO_ROOM = "the prompt leaves no room for a completion within the teacher's `teacher_max_length`"

# As in `rows.py`: makes the code part of the hash by which `datasets` caches
_REVISION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


@dataclass(frozen=True)
class Side:
    r"""
    One model's way to write text as tokens.

    Args:
        formatter ([`RowFormatter`]):
            Tokenises rows with this model's tokenizer and chat template.
        tokens ([`TokenBytes`]):
            What each of its ids stands for.
        end (`int`):
            Token that ends a completion that did end.
        pad (`int`):
            Filler of batches.
    """

    formatter: RowFormatter
    tokens: TokenBytes
    end: int
    pad: int

    @classmethod
    def of(cls, formatter: RowFormatter, conversational: bool) -> "Side":
        """From a formatter; a conversation's turns end as the chat template ends them."""
        tokenizer, end = formatter.tokenizer, formatter.tokenizer.eos_token_id
        if conversational:
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            end = formatter({"messages": turns})["input_ids"][-1]
        pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return cls(formatter, TokenBytes(tokenizer, [end, *sorted(formatter.eos_token_ids)]), end, pad)

    def split_end(self, ids: list[int]) -> tuple[list[int], bool]:
        """Ids without the token that ends them, and whether there was one."""
        ended = bool(ids) and self.tokens.kinds[ids[-1]] == 1
        return (ids[:-1], True) if ended else (ids, False)

    def write(self, text: str, ended: bool) -> list[int]:
        """Ids of a completion."""
        return self.formatter.encode_continuation(text) + [self.end] * ended


@dataclass(frozen=True)
class TeacherRows:
    r"""
    Adds the teacher's tokens to a prepared row of the student. This is the function given to `map`.

    Adds `teacher_input_ids`, `teacher_labels` and `teacher_prompt_length`: the row as the teacher's own tokenizer and
    chat template write it. Rows that came as token ids are read as text, and written by the teacher's tokenizer. What
    the student's side has lost to its `max_length` is cut off on the teacher's side too.

    Args:
        student ([`Side`]):
            The student's tokens.
        teacher ([`Side`]):
            The teacher's.
        from_ids (`bool`):
            Whether the dataset came as token ids.
        max_length (`int`, *optional*):
            Longest row that the teacher reads, in its tokens; the completion loses its end beyond.
        formatter ([`RowFormatter`]):
            Writes rows of this dataset for the teacher.
        own_prompt (`bool`, *optional*, defaults to `False`):
            Whether the teacher has a prompt of its own, as of [`teacher_view`].
        system_prompt (`str`, *optional*):
            As there.
    """

    student: Side
    teacher: Side
    from_ids: bool
    max_length: int | None
    formatter: RowFormatter
    own_prompt: bool = False
    system_prompt: str | None = None
    revision: str = _REVISION

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        own = ("input_ids", "labels", "prompt_length")
        if self.from_ids:
            found = self._rewritten(row) | {DROPPED: ""}
        else:
            raw = {name: value for name, value in row.items() if name not in own}
            found = self.formatter(teacher_view(raw, self.system_prompt) if self.own_prompt else raw)
            if found[DROPPED]:
                found[DROPPED] = f"on the teacher's side, {found[DROPPED]}"
        _forget_turns(found, len(stretches(np.asarray(row["labels"]))))
        prompt_length, length = found["prompt_length"], len(found["input_ids"])
        if row["prompt_length"] < len(row["input_ids"]):  # not a prompt alone
            length = prompt_length + self._shared(row, found)
        whole = length
        if self.max_length is not None:
            length = min(length, self.max_length)
            if not found[DROPPED] and prompt_length >= self.max_length:
                found[DROPPED] = TEACHER_NO_ROOM
        return {
            "teacher_input_ids": found["input_ids"][:length],
            "teacher_labels": found["labels"][:length],
            "teacher_prompt_length": min(prompt_length, length),
            DROPPED: found[DROPPED],
            CUT: whole - length,  # what the student's side has lost was counted there
        }

    def _rewritten(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of ids, stretch by stretch: what is trained in it, and what is not, in turn."""
        ids, labels, before = row["input_ids"], row["labels"], row["prompt_length"]
        bounds = [i for i in range(1, len(ids)) if (labels[i] == -100) != (labels[i - 1] == -100) or i == before]
        teacher_ids, teacher_labels, prompt_length = [], [], 0
        for start, stop in zip([0, *bounds], [*bounds, len(ids)], strict=True):
            part, ended = self.student.split_end(ids[start:stop])
            text = self.student.tokens.decode(part)
            if start == 0:
                text = text.removeprefix(" ") if self.student.tokens.adds_space else text
                written = self.teacher.formatter.encode_prompt(text, is_rendered=False) if text else []
                written = written + [self.teacher.end] * ended
            else:
                written = self.teacher.write(text, ended)
            teacher_ids += written
            teacher_labels += written if labels[stop - 1] != -100 else [-100] * len(written)
            if stop == before:
                prompt_length = len(teacher_ids)
        return {"input_ids": teacher_ids, "labels": teacher_labels, "prompt_length": prompt_length}

    def _shared(self, row: dict[str, Any], found: dict[str, Any]) -> int:
        """Tokens of the teacher's completion that begin within the text that the student's has kept."""
        kept, ended = self.student.split_end(row["input_ids"][row["prompt_length"] :])
        theirs = found["input_ids"][found["prompt_length"] :]
        if ended:
            return len(theirs)
        starts = np.cumsum([0, *self.teacher.tokens.lengths[theirs]])[:-1]
        return int(np.searchsorted(starts, len(self.student.tokens.text(kept))))


@dataclass
class DualCollator(KDCollator):
    r"""
    Collates rows of two models: those of [`KDCollator`], and the same text in the teacher's tokens.

    The batch gains `teacher_input_ids`, `teacher_attention_mask` and `teacher_labels` of shape `(B, T)`,
    `teacher_prompt_length` of shape `(B,)`, and `partner` of shape `(B, S)`: for each of the student's labels the
    position of its partner among the teacher's, -1 where it has none.

    Args:
        pad_token_id (`int`):
            As in [`KDCollator`].
        pad_to_multiple_of (`int`, *optional*):
            As in [`KDCollator`].
        student ([`Side`]):
            The student's tokens.
        teacher ([`Side`]):
            The teacher's.
        by (`str`, *optional*, defaults to `"token"`):
            Who are partners: `"token"` and `"context"` as in [`align`]; `"index"`, as in ULD, for the k-th trained
            token and the k-th.
        teacher_max_length (`int`, *optional*):
            Longest row of the teacher: what was translated for it loses its end beyond.
    """

    student: Side = None
    teacher: Side = None
    by: str = "token"
    teacher_max_length: int | None = None

    def prompt(self, row: dict[str, Any], writer: str) -> list[int]:
        if writer == "student":
            return super().prompt(row, writer)
        return row["teacher_input_ids"][: row["teacher_prompt_length"]]

    def complete(self, row: dict[str, Any], completion: list[int], writer: str) -> dict[str, Any]:
        source, other = (self.student, self.teacher) if writer == "student" else (self.teacher, self.student)
        part, ended = source.split_end(completion)
        translated = other.write(source.tokens.decode(part), ended)
        completions = (completion, translated) if writer == "student" else (translated, completion)
        student = completed_row(self.prompt(row, "student"), completions[0])
        teacher = completed_row(self.prompt(row, "teacher"), completions[1])
        for name in ("input_ids", "labels"):
            teacher[name] = teacher[name][: self.teacher_max_length]
        return row | student | _of_teacher(teacher)

    def rows_of(self, batch: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        teacher = {name.removeprefix("teacher_"): part for name, part in batch.items() if name.startswith("teacher_")}
        theirs = super().rows_of(teacher | {"is_on_policy": batch["is_on_policy"]})
        own = {name: part for name, part in batch.items() if not name.startswith("teacher_")}
        return [row | _of_teacher(other) for row, other in zip(super().rows_of(own), theirs, strict=True)]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        theirs = KDCollator(self.teacher.pad, self.pad_to_multiple_of)(
            [{name: row[f"teacher_{name}"] for name in ("input_ids", "labels", "prompt_length")} for row in rows]
        )
        del theirs["is_on_policy"]
        batch = super().__call__(rows) | {f"teacher_{name}": part for name, part in theirs.items()}
        partner = np.full(batch["labels"].shape, -1, dtype=np.int64)  # (B, S)
        for place, row in zip(partner, rows, strict=True):
            place[: len(row["labels"])] = self.partners(row)
        return batch | {"partner": torch.from_numpy(partner)}

    def partners(self, row: dict[str, Any]) -> np.ndarray:
        """Position of each of the student's labels' partner in the teacher's labels, or -1."""
        if self.by != "index":
            return align_row(self.student.tokens, self.teacher.tokens, row["labels"], row["teacher_labels"], self.by)
        partner = np.full(len(row["labels"]), -1, dtype=np.int64)
        ours, theirs = (np.flatnonzero(np.array(row[name][1:]) != -100) + 1 for name in ("labels", "teacher_labels"))
        shared = min(len(ours), len(theirs))
        partner[ours[:shared]] = theirs[:shared]
        return partner

    def coverage(self, rows: Iterable[dict[str, Any]]) -> float:
        """Share of the student's trained tokens that have a partner; of the prompts', where these stand alone."""
        found = total = 0
        for row in rows:
            if all(label == -100 for label in row["labels"]):
                row = row | {"labels": row["input_ids"], "teacher_labels": row["teacher_input_ids"]}
            found += int((self.partners(row) >= 0).sum())
            total += sum(label != -100 for label in row["labels"][1:])
        return found / max(total, 1)


def _forget_turns(row: dict[str, Any], num_turns: int) -> None:
    """Cut off the trained stretches behind the first ones: those that the other side has lost to its length."""
    turns = stretches(np.asarray(row["labels"]))
    if 0 < num_turns < len(turns):
        start, end = turns[num_turns - 1].tolist()
        row |= {"input_ids": row["input_ids"][:end], "labels": row["labels"][:end], "prompt_length": start}


def _of_teacher(row: dict[str, Any]) -> dict[str, Any]:
    return {f"teacher_{name}": row[name] for name in ("input_ids", "labels", "prompt_length")}

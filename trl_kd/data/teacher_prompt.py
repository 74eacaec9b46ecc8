"""A prompt of the teacher's own: it may see more than the student, and is compared on the same completion."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_kd.data.rows import CUT, DROPPED, RowFormatter, answer_of


# As in `rows.py`: makes the code part of the hash by which `datasets` caches
_REVISION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

NO_ROOM = "the teacher's own prompt leaves no room for a completion in its context"


def teacher_view(row: dict[str, Any], system_prompt: str | None) -> dict[str, Any]:
    r"""
    A raw row as the teacher reads it.

    Args:
        row (`dict[str, Any]`):
            Raw row, with `prompt` or `messages`, and perhaps a `teacher_prompt` (text or messages as the prompt is),
            which takes the prompt's place. An empty one leaves it.
        system_prompt (`str`, *optional*):
            Put in front: as a system message, or before the one that is there.

    Returns:
        `dict[str, Any]`: a row with `prompt`, and with `completion` if there is one.

    Raises:
        ValueError: If the row has no prompt, or the two prompts are of different kinds.
    """
    if "messages" in row:
        prompt, answer = answer_of(row["messages"])
        view = {name: value for name, value in row.items() if name != "messages"} | {"completion": answer}
    elif "prompt" in row:
        prompt, view = row["prompt"], dict(row)
    else:
        columns = ", ".join(f"`{name}`" for name in row)
        raise ValueError(
            f"The teacher is to have a prompt of its own, but the rows have {columns}, in which no prompt can be told "
            "apart. Pass `prompt` and `completion`, or `messages`."
        )
    own = row.get("teacher_prompt") or prompt
    if isinstance(own, list) != isinstance(prompt, list):
        raise ValueError(
            f"A row's `teacher_prompt` is of type {type(own).__name__} and its prompt of type "
            f"{type(prompt).__name__}, but the completion after both is the same. Pass both as text, or both as "
            "messages."
        )
    return view | {"prompt": own if system_prompt is None else _with_system(own, system_prompt)}


def _with_system(prompt: Any, text: str) -> list[dict[str, Any]]:
    if not isinstance(prompt, list):
        raise ValueError(
            "`teacher_system_prompt` is set, but the prompts are text, which has no system message. Pass messages, or "
            "write the whole text into a column `teacher_prompt`."
        )
    if prompt and prompt[0]["role"] == "system":
        return [prompt[0] | {"content": f"{text}\n\n{prompt[0]['content']}"}, *prompt[1:]]
    return [{"role": "system", "content": text}, *prompt]


@dataclass(frozen=True)
class TeacherPrompt:
    r"""
    Adds `teacher_prompt_ids` to a prepared row, for [`KDCollator`]. This is the function given to `map`.

    Args:
        formatter ([`RowFormatter`]):
            Writes prompts; it cuts nothing.
        system_prompt (`str`, *optional*):
            As of [`teacher_view`].
        max_length (`int`, *optional*):
            Positions that the teacher has.
    """

    formatter: RowFormatter
    system_prompt: str | None
    max_length: int | None
    revision: str = _REVISION

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        own = ("input_ids", "labels", "prompt_length", "truncated")
        # With the completion, as the student's: what a template writes for an answer may begin otherwise than what it
        # asks for one by (`<think>`)
        found = self.formatter(teacher_view({k: v for k, v in row.items() if k not in own}, self.system_prompt))
        ids, dropped = found["input_ids"][: found["prompt_length"]], found[DROPPED]
        length = len(ids) + len(row["input_ids"]) - row["prompt_length"]
        if not dropped and self.max_length is not None and length > self.max_length:
            dropped = NO_ROOM
        return {"teacher_prompt_ids": ids, DROPPED: dropped, CUT: 0}

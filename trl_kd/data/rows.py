"""One row of a dataset to token ids: what is trained, where the prompt ends, and why a row can't be used."""

import hashlib
import json
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import apply_chat_template


NO_ROOM = "the prompt leaves no room for a completion within `max_length`"
EMPTY_COMPLETION = "the completion or text is empty"
NO_ANSWER = "the last of `messages` is not the assistant's, so there is no completion"
EMPTY_PROMPT = "the prompt is empty and the tokenizer has no BOS token to start from"
NOT_TRAINED = "no token is trained"

# Columns that carry what became of a row from `map` to the messages about it.
DROPPED, CUT = "_kd_dropped", "_kd_cut"

# `datasets` hashes a function of a module by its name, so its cache would serve the results of an older version of
# this file. The digest makes the code part of the hash.
_REVISION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


class _RowDroppedError(Exception):
    """Nothing can be trained on this row; the argument says why."""


@dataclass(frozen=True)
class RowFormatter:
    """
    Turns one row into `input_ids`, `labels` and `prompt_length` as [`prepare_dataset`] describes, with the reason if
    the row has to be dropped (else empty) and the number of tokens cut. This is the function given to `map`.
    """

    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: frozenset[int]
    max_length: int | None
    text_field: str
    assistant_only_loss: bool
    training_template: str | None
    num_appended: int  # special tokens that the tokenizer puts after a text
    revision: str = _REVISION

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            if "input_ids" in row:
                tokens = self._tokenized(row)
            elif "messages" in row:
                tokens = self._messages(row)
            elif "prompt" in row:
                tokens = self._prompt_completion(row)
                if row.get("completion") and row.get("truncated"):
                    # The writer was cut off there (`trl-kd generate`), so nobody should learn to stop there
                    tokens = (tokens[0][:-1], tokens[1][:-1], tokens[2])
            else:
                tokens = self._text(row[self.text_field])
            return self._fit(*tokens)
        except _RowDroppedError as reason:
            # Not empty lists: a block of nothing but these would be stored with another type.
            return {"input_ids": [0], "labels": [-100], "prompt_length": 0, DROPPED: str(reason), CUT: 0}

    def _fit(self, input_ids: list[int], labels: list[int], prompt_length: int | None) -> dict[str, Any]:
        """Cut to `max_length`; `prompt_length=None` stands for the start of the last trained stretch that is left."""
        cut = max(0, len(input_ids) - self.max_length) if self.max_length is not None else 0
        input_ids, labels = input_ids[: len(input_ids) - cut], labels[: len(labels) - cut]
        if prompt_length is None:
            prompt_length = _last_trained_stretch(labels)
        if self.max_length is not None and prompt_length >= self.max_length:
            raise _RowDroppedError(NO_ROOM)
        # The first token counts for nothing: no position predicts it.
        is_trained = any(label != -100 for label in labels[1:])
        if not is_trained and prompt_length < len(input_ids):
            raise _RowDroppedError(NOT_TRAINED)
        return {"input_ids": input_ids, "labels": labels, "prompt_length": prompt_length, DROPPED: "", CUT: cut}

    def _tokenized(self, row: dict[str, Any]) -> tuple[list[int], list[int], int | None]:
        input_ids = list(row["input_ids"])
        labels = list(row["labels"]) if "labels" in row else list(input_ids)
        for name in ("completion_mask", "assistant_masks"):
            if "labels" not in row and name in row:
                labels = [label if kept else -100 for label, kept in zip(labels, row[name], strict=True)]
        if len(labels) != len(input_ids):
            raise ValueError(
                f"A tokenized row has {len(input_ids)} `input_ids` and {len(labels)} `labels`, but there must be one "
                "label for each token. Use -100 for the tokens that are not trained."
            )
        return input_ids, labels, row.get("prompt_length")

    def _text(self, text: str | None) -> tuple[list[int], list[int], int]:
        if _is_empty(text):
            raise _RowDroppedError(EMPTY_COMPLETION)
        input_ids = self._close(self._encode(text))
        return input_ids, list(input_ids), 0

    def _messages(self, row: dict[str, Any]) -> tuple[list[int], list[int], int]:
        messages = row["messages"]
        prompt, turn = answer_of(messages)
        if not turn:
            raise _RowDroppedError(NO_ANSWER)
        if _is_empty(turn):
            raise _RowDroppedError(EMPTY_COMPLETION)
        if not self.assistant_only_loss:
            return self._conversation(row, prompt, turn)
        _check_prompt(prompt)
        roles = [message["role"] for message in messages]
        starts = [i for i in range(1, len(roles)) if roles[i] == "assistant" and roles[i - 1] in ("user", "tool")]
        return self._assistant_turns(row, messages, starts, trains_prompt=True)

    def _prompt_completion(self, row: dict[str, Any]) -> tuple[list[int], list[int], int]:
        prompt = "" if row["prompt"] is None else row["prompt"]
        completion = row.get("completion")
        is_conversation = isinstance(prompt, list)
        if "completion" not in row:
            text = self._render(row, {"prompt": prompt})["prompt"] if is_conversation else prompt
            prompt_ids = self.encode_prompt(text, is_conversation)
            return prompt_ids, [-100] * len(prompt_ids), len(prompt_ids)
        if _is_empty(completion):
            raise _RowDroppedError(EMPTY_COMPLETION)
        if is_conversation != isinstance(completion, list):
            raise ValueError(
                f"A row has a `prompt` of type {type(prompt).__name__} and a `completion` of type "
                f"{type(completion).__name__}, but text and messages can't be joined. Pass both as text, or both as "
                "lists of messages."
            )
        if not is_conversation:
            return self._join(prompt, completion, is_rendered=False)
        if self.assistant_only_loss:
            _check_prompt(prompt)
            return self._assistant_turns(row, prompt + completion, [len(prompt)], trains_prompt=False)
        return self._conversation(row, prompt, completion)

    def _conversation(self, row, prompt: list[dict], completion: list[dict]) -> tuple[list[int], list[int], int]:
        text = self._render(row, {"prompt": prompt, "completion": completion})
        return self._join(text["prompt"], text["completion"], is_rendered=True)

    def _assistant_turns(self, row, messages, starts: list[int], trains_prompt: bool) -> tuple:
        """Trains what the template marks; the completion is from the last of `starts` that `max_length` leaves."""
        options = {"chat_template": self.training_template, "return_dict": True, **_template_options(row)}
        encoded = self.tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, **options)
        input_ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        for start in reversed(starts):
            # Not the start of the marked tokens, among which some templates have the header of the turn.
            prompt = self.tokenizer.apply_chat_template(messages[:start], add_generation_prompt=True, **options)
            pairs = zip(prompt["input_ids"], input_ids, strict=False)
            prompt_length = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
            if self.max_length is None or prompt_length < self.max_length:
                break
        if not trains_prompt:
            mask = [0] * prompt_length + mask[prompt_length:]
        if not any(mask):
            raise _RowDroppedError(NOT_TRAINED)
        closed = self._close(input_ids)
        labels = [token if trained else -100 for token, trained in zip(input_ids, mask, strict=True)]
        # The closing EOS is trained also where the template's marks leave it out.
        return closed, labels[: len(closed) - 1] + closed[-1:], prompt_length

    def _render(self, row, example: dict[str, list[dict]]) -> dict[str, str]:
        """Texts of prompt and completion by the chat template, whose common prefix is the prompt."""
        _check_prompt(example["prompt"])
        options = _template_options(row)
        return apply_chat_template(example, self.tokenizer, tools=options.pop("tools"), **options)

    def _join(self, prompt: str, completion: str, is_rendered: bool) -> tuple[list[int], list[int], int]:
        prompt_ids = self.encode_prompt(prompt, is_rendered)
        completion_ids = self._close(self._encode_after(prompt, prompt_ids, completion, is_rendered))
        return prompt_ids + completion_ids, [-100] * len(prompt_ids) + completion_ids, len(prompt_ids)

    def encode_prompt(self, prompt: str, is_rendered: bool) -> list[int]:
        """Ids of a prompt as a rollout starts from it."""
        prompt_ids = self._encode(prompt, is_rendered)
        if not prompt_ids:
            raise _RowDroppedError(EMPTY_PROMPT)
        return prompt_ids

    def _encode_after(self, prompt: str, prompt_ids: list[int], completion: str, is_rendered: bool) -> list[int]:
        """Ids of a completion that continues exactly `prompt_ids`, as a rollout does."""
        joint = self._encode(prompt + completion, is_rendered)
        if joint[: len(prompt_ids)] == prompt_ids:
            return joint[len(prompt_ids) :]
        # The prompt's last token merges with the completion's first
        return self.encode_continuation(completion)

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that something precedes, tokenised apart from it."""
        # Behind a line break, because SentencePiece puts a space before a text that stands alone
        line_break, joint = self._encode("\n", is_rendered=True), self._encode("\n" + text, is_rendered=True)
        if joint[: len(line_break)] == line_break:
            return joint[len(line_break) :]
        return self._encode(text, is_rendered=True)

    def _encode(self, text: str, is_rendered: bool = False) -> list[int]:
        """Ids of `text`, after the tokenizer's own BOS unless a chat template has written the special tokens."""
        if is_rendered:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        input_ids = self.tokenizer(text)["input_ids"]
        return input_ids[: len(input_ids) - self.num_appended]

    def _close(self, input_ids: list[int]) -> list[int]:
        """End with an EOS: one that is there, without the white space a template writes after it, or a new one."""
        end = len(input_ids)
        while end > 0 and input_ids[end - 1] not in self.eos_token_ids:
            if self.tokenizer.decode([input_ids[end - 1]]).strip():
                return input_ids + [self.tokenizer.eos_token_id]
            end -= 1
        return input_ids[:end] if end > 0 else input_ids + [self.tokenizer.eos_token_id]


def answer_of(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A conversation split before the last turn of the assistant, which may be several messages in a row."""
    turn = list(takewhile(lambda message: message["role"] == "assistant", reversed(messages)))
    return messages[: len(messages) - len(turn)], turn[::-1]


def _check_prompt(messages: list[dict[str, Any]]) -> None:
    role = messages[-1]["role"] if messages else None
    if role not in ("user", "tool", "assistant"):
        last = f"a `{role}` message" if role else "nothing"
        raise ValueError(
            f"The prompt of a conversation ends with {last}, but a chat template asks for an answer only after a user "
            "or tool message. Add one, remove the row, or pass the conversation as text."
        )


def _template_options(row: dict[str, Any]) -> dict[str, Any]:
    """What a row says about its own rendering, in the columns that TRL reads."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools or None, **(row.get("chat_template_kwargs") or {})}


def _last_trained_stretch(labels: list[int]) -> int:
    end = len(labels)
    while end > 0 and labels[end - 1] == -100:
        end -= 1
    while end > 0 and labels[end - 1] != -100:
        end -= 1
    return end


def _is_empty(completion: str | list[dict[str, Any]] | None) -> bool:
    """No text but white space; in messages, nothing else either, such as tool calls."""
    if not isinstance(completion, list):
        return not (completion or "").strip()
    values = [value for message in completion for key, value in message.items() if key not in ("role", "name")]
    return not any(value.strip() if isinstance(value, str) else value for value in values)

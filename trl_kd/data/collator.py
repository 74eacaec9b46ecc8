"""Rows of token ids to right-padded batches, and back."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class KDCollator:
    r"""
    Collates prepared rows into one right-padded batch, or packed rows into one long row without padding.

    Which positions are padding is known from the lengths alone: the pad token may equal the EOS token, and both may
    occur inside a row. Columns other than the ones named here are ignored.

    A row may have `teacher_prompt_ids`, which the teacher reads in the place of the prompt: the batch then gains
    `teacher_input_ids`, `teacher_attention_mask` and `teacher_labels` of shape `(B, T)` and `teacher_prompt_length`,
    with the same completions. It may have a `teacher_index`, the number of its teacher among several.

    Packed rows (they have `seq_lengths`) are laid end to end as a single row whose `position_ids` restart at each
    sequence. There is then no `attention_mask`, from which Transformers knows to keep the sequences apart, but only
    with `use_cache=False`. The first token of each sequence is not trained, since nothing in its sequence predicts it.

    Args:
        pad_token_id (`int`):
            Token that fills `input_ids` at padding. Any id of the vocabulary will do.
        pad_to_multiple_of (`int`, *optional*):
            If set, the length of the batch is rounded up to a multiple of it. In a packed row, the padding is one more
            sequence, untrained.

    Examples:

    ```python
    >>> collator = KDCollator(pad_token_id=0)
    >>> batch = collator(
    ...     [
    ...         {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "prompt_length": 1},
    ...         {"input_ids": [8, 9], "labels": [-100, 9], "prompt_length": 1, "is_on_policy": True},
    ...     ]
    ... )
    >>> batch["input_ids"], batch["labels"]
    (tensor([[5, 6, 7],
            [8, 9, 0]]), tensor([[-100,    6,    7],
            [-100,    9, -100]]))
    >>> batch["attention_mask"]
    tensor([[1, 1, 1],
            [1, 1, 0]])
    >>> batch["prompt_length"], batch["is_on_policy"]
    (tensor([1, 1]), tensor([False,  True]))
    ```
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def prompt(self, row: dict[str, Any], writer: str) -> list[int]:
        """Token ids that `writer` (`"student"` or `"teacher"`) is to continue."""
        if writer == "teacher" and "teacher_prompt_ids" in row:
            return row["teacher_prompt_ids"]
        return row["input_ids"][: row["prompt_length"]]

    def complete(self, row: dict[str, Any], completion: list[int], writer: str) -> dict[str, Any]:
        """The row with another completion, in the tokens of its writer."""
        return row | completed_row(self.prompt(row, "student"), completion)

    def rows_of(self, batch: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        """Rows of a batch that this collator made, without their padding, as in [`rows_of`]."""
        return rows_of(batch)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "seq_lengths" in rows[0]:
            return self._collate_packed(rows)
        batch = self._collate(rows)
        if "teacher_index" in rows[0]:
            batch["teacher_index"] = torch.tensor([row["teacher_index"] for row in rows])  # (B,)
        if "teacher_prompt_ids" in rows[0]:
            theirs = self._collate([_after(row["teacher_prompt_ids"], row) for row in rows])
            batch |= {f"teacher_{name}": part for name, part in theirs.items() if name != "is_on_policy"}
        return batch

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        length = self._round_up(max(lengths))
        input_ids = [[*row["input_ids"], *[self.pad_token_id] * (length - len(row["input_ids"]))] for row in rows]
        labels = [[*row["labels"], *[-100] * (length - len(row["labels"]))] for row in rows]
        return {
            "input_ids": torch.tensor(input_ids),  # (B, S)
            "attention_mask": (torch.arange(length) < torch.tensor(lengths)[:, None]).long(),  # (B, S)
            "labels": torch.tensor(labels),  # (B, S)
            "prompt_length": torch.tensor([row.get("prompt_length", 0) for row in rows]),  # (B,)
            "is_on_policy": torch.tensor([bool(row.get("is_on_policy", False)) for row in rows]),  # (B,)
        }

    def _round_up(self, length: int) -> int:
        multiple = self.pad_to_multiple_of or 1
        return -(-length // multiple) * multiple

    def _collate_packed(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        input_ids = [token for row in rows for token in row["input_ids"]]
        labels = [label for row in rows for label in row["labels"]]
        lengths = [length for row in rows for length in row["seq_lengths"]]
        padding = self._round_up(len(input_ids)) - len(input_ids)
        positions = [position for length in [*lengths, padding] for position in range(length)]
        labels = [-100 if position == 0 else label for label, position in zip(labels, positions, strict=False)]
        return {
            "input_ids": torch.tensor([input_ids + [self.pad_token_id] * padding]),  # (1, S)
            "position_ids": torch.tensor([positions]),  # (1, S)
            "labels": torch.tensor([labels + [-100] * padding]),  # (1, S)
            "prompt_length": torch.tensor([0]),
            "is_on_policy": torch.tensor([False]),
        }


def completed_row(prompt: list[int], completion: list[int]) -> dict[str, Any]:
    """A row as [`prepare_dataset`] makes it, from prompt and completion ids."""
    return {
        "input_ids": [*prompt, *completion],
        "labels": [-100] * len(prompt) + list(completion),
        "prompt_length": len(prompt),
    }


def _after(prompt: list[int], row: dict[str, Any]) -> dict[str, Any]:
    """The row with another prompt, of which nothing is trained."""
    start = row["prompt_length"]
    return {
        "input_ids": [*prompt, *row["input_ids"][start:]],
        "labels": [-100] * len(prompt) + list(row["labels"][start:]),
        "prompt_length": len(prompt),
    }


def rows_of(batch: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    r"""
    Rows of a collated batch without their padding: the inverse of [`KDCollator`], for rows that are to be replaced and
    collated again.

    Args:
        batch (`dict[str, torch.Tensor]`):
            Batch of [`KDCollator`], on any device, not packed.

    Returns:
        `list[dict[str, Any]]`: one row for each, with `input_ids` and `labels` (`list[int]`), `prompt_length` (`int`)
        and `is_on_policy` (`bool`); with `teacher_index` and `teacher_prompt_ids` if the rows had them.

    Raises:
        ValueError: If the batch is packed.

    Examples:

    ```python
    >>> rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "prompt_length": 1, "is_on_policy": False}]
    >>> rows_of(KDCollator(pad_token_id=0, pad_to_multiple_of=8)(rows)) == rows
    True
    ```
    """
    if "attention_mask" not in batch:
        raise ValueError(
            "The batch has no `attention_mask`, so it is packed, and its sequences have lost their prompts. Set "
            "`packing=False` to replace rows by rollouts."
        )
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    columns = (batch[name].tolist() for name in ("input_ids", "labels", "prompt_length", "is_on_policy"))
    rows = [
        {
            "input_ids": input_ids[:length],
            "labels": labels[:length],
            "prompt_length": prompt_length,
            "is_on_policy": is_on_policy,
        }
        for length, input_ids, labels, prompt_length, is_on_policy in zip(lengths, *columns, strict=True)
    ]
    if "teacher_index" in batch:
        for row, index in zip(rows, batch["teacher_index"].tolist(), strict=True):
            row["teacher_index"] = index
    if "teacher_input_ids" in batch:
        theirs = (batch[f"teacher_{name}"].tolist() for name in ("input_ids", "prompt_length"))
        for row, input_ids, length in zip(rows, *theirs, strict=True):
            row["teacher_prompt_ids"] = input_ids[:length]
    return rows

"""Datasets of text to datasets of token ids, packed or not, with one word about every row that was cut or dropped."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import takewhile
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl import get_training_chat_template, pack_dataset

from trl_kd.data.rows import CUT, DROPPED, RowFormatter


logger = logging.getLogger(__name__)


def _check_columns(row: dict[str, Any], text_field: str, name: str) -> None:
    accepted = ("input_ids", "messages", "prompt", text_field)
    if not any(column in row for column in accepted):
        found = ", ".join(f"`{column}`" for column in row)
        raise ValueError(
            f"The {name} dataset has the columns {found}, none of which holds text to train on. Rename its columns to "
            f"`prompt` and `completion`, `messages`, `prompt` alone, `{text_field}` (set by `dataset_text_field`), or "
            "`input_ids`."
        )


def _training_template(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], assistant_only_loss: bool, name: str, owner: str
) -> str | None:
    """Template with generation markers if one is needed other than the tokenizer's own."""
    is_conversation = is_conversational(row)
    if assistant_only_loss and not is_conversation and "input_ids" not in row:
        raise ValueError(
            f"`assistant_only_loss` is True, but the {name} dataset holds text, in which no turns can be told apart. "
            "Set it to False, or pass `messages`."
        )
    if is_conversation and tokenizer.chat_template is None:
        raise ValueError(
            f"The {name} dataset holds messages, but the {owner} has no chat template to write them with. Set its "
            "`chat_template` (the student's also by `chat_template_path` in the config), or pass `prompt` and "
            "`completion` as text."
        )
    return get_training_chat_template(tokenizer) if assistant_only_loss and is_conversation else None


def is_conversational(row: dict[str, Any]) -> bool:
    """Whether a raw row holds messages, which a chat template has to write."""
    return "input_ids" not in row and ("messages" in row or isinstance(row.get("prompt"), list))


def row_formatter(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    eos_token_ids: Iterable[int],
    text_field: str = "text",
    assistant_only_loss: bool = False,
    name: str = "train",
    owner: str = "tokenizer",
) -> RowFormatter:
    """The function that tokenises rows like this one; arguments as in [`prepare_dataset`]. `owner` is for errors."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The {owner} has no EOS token, but a completion must end with one, or the student never learns to stop. "
            "Set its `eos_token` (the student's also by `eos_token` in the config)."
        )
    _check_columns(row, text_field, name)
    appended = takewhile(bool, reversed(tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]))
    return RowFormatter(
        tokenizer=tokenizer,
        eos_token_ids=frozenset(eos_token_ids) | {tokenizer.eos_token_id},
        max_length=max_length,
        text_field=text_field,
        assistant_only_loss=assistant_only_loss,
        training_template=_training_template(tokenizer, row, assistant_only_loss, name, owner),
        num_appended=len(list(appended)),
    )


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    eos_token_ids: Iterable[int],
    text_field: str = "text",
    assistant_only_loss: bool = False,
    num_proc: int | None = None,
    name: str = "train",
) -> Dataset | IterableDataset:
    r"""
    Tokenises a dataset and says which tokens are trained. Adds `input_ids`, `labels` and `prompt_length`; all other
    columns stay as they are, and the dataset that is passed is not changed.

    The first of these that the dataset has is used:

    - `input_ids`: tokenised already, taken as is. Trained are the tokens of `labels` that are not -100, else those of
      `completion_mask` and `assistant_masks`, else all. A prepared dataset passes through unchanged.
    - `messages`: the last assistant turn is the completion, what precedes it the prompt.
    - `prompt` and `completion`, as text or as messages: the completion is trained.
    - `prompt`: nothing is trained before somebody has written the completion.
    - `text_field`: every token is trained.

    The ids of the prompt are those of the prompt alone, which is what a rollout starts from. Every completion and text
    ends with an EOS, which is trained; nothing is decided by comparing ids with the pad token, so that this may be the
    EOS too. A row whose column `truncated` is true gets no EOS: its writer was cut off. The columns `tools` and
    `chat_template_kwargs` are given to the chat template, as in TRL.

    Rows that can't be trained on are dropped, and completions longer than `max_length` lose their end; one warning
    each says how many. A stream can't be counted beforehand: it warns at the first row of each kind.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset in one of the formats above.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the student, with an EOS token, and with a chat template if there are messages.
        max_length (`int` or `None`):
            Longest sequence of prompt and completion, in tokens. `None` cuts nothing.
        eos_token_ids (`Iterable[int]`):
            All tokens that end a generation of the student. The tokenizer's own EOS always counts as one.
        text_field (`str`, *optional*, defaults to `"text"`):
            Column of plain text.
        assistant_only_loss (`bool`, *optional*, defaults to `False`):
            Whether to train all assistant turns of `messages` instead of the last (of a conversational `completion`,
            its assistant turns alone). The chat template needs generation markers, or to be one that TRL knows.
        num_proc (`int`, *optional*):
            Number of processes; not used for a stream.
        name (`str`, *optional*, defaults to `"train"`):
            What to call the dataset in messages.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: the rows that are left, with `input_ids` (`list[int]`),
        `labels` (`list[int]`, -100 = not trained) and `prompt_length` (`int`: the tokens before the completion; all of
        them in a row that is only a prompt, 0 in a text). With `assistant_only_loss=True`, the completion of
        `messages` is the last assistant turn that is left.

    Raises:
        ValueError: If no column can be used, if the tokenizer has no EOS token or no chat template that is needed, if
            a conversation has no prompt or no answer, or if no row is left.

    Examples:

    ```python
    >>> dataset = Dataset.from_list([{"prompt": "The sky is", "completion": " blue."}])
    >>> row = prepare_dataset(dataset, tokenizer, max_length=64, eos_token_ids=[tokenizer.eos_token_id])[0]
    >>> tokenizer.decode(row["input_ids"][: row["prompt_length"]])
    'The sky is'
    >>> tokenizer.decode([label for label in row["labels"] if label != -100])
    ' blue.<|im_end|>'
    ```
    """
    dataset = dataset.with_format(None)
    first_row = next(iter(dataset), None)
    if first_row is None:
        raise ValueError(f"The {name} dataset has no rows, so there is nothing to train on. Pass one that has.")
    formatter = row_formatter(
        first_row,
        tokenizer,
        max_length=max_length,
        eos_token_ids=eos_token_ids,
        text_field=text_field,
        assistant_only_loss=assistant_only_loss,
        name=name,
    )
    return map_rows(dataset, formatter, max_length, num_proc, name, f"Tokenizing {name} dataset")


def map_rows(
    dataset: Dataset | IterableDataset,
    function: Callable[[dict[str, Any]], dict[str, Any]],
    max_length: int | None,
    num_proc: int | None,
    name: str,
    description: str,
    option: str = "max_length",
) -> Dataset | IterableDataset:
    """
    Apply a function that says of each row why it has to be dropped (if so) and what was cut; drop, and warn. `option`
    is the one that sets `max_length`.
    """
    if isinstance(dataset, IterableDataset):
        options = {"name": name, "max_length": max_length, "option": option, "seen": set()}
        dataset = dataset.map(function).filter(_keep_and_warn_once, fn_kwargs=options)
    else:
        dataset = dataset.map(function, num_proc=num_proc, desc=description)
        dataset = _drop_and_warn(dataset, name, max_length, option, num_proc)
    return dataset.remove_columns([DROPPED, CUT])


def _drop_and_warn(dataset: Dataset, name: str, max_length: int | None, option: str, num_proc: int | None) -> Dataset:
    reasons = Counter(reason for reason in dataset[DROPPED] if reason)
    cuts = [cut for cut in dataset[CUT] if cut]
    dropped = f"{reasons.total()} of {len(dataset)} rows of the {name} dataset"
    counts = "; ".join(f"{reason} ({count} rows)" for reason, count in sorted(reasons.items()))
    limit = "no limit" if max_length is None else f"{max_length} tokens"
    if reasons.total() == len(dataset):
        raise ValueError(
            f"{dropped} had to be dropped: {counts}. Nothing is left to train on. Raise `{option}` (now {limit}) "
            "or check what the columns hold."
        )
    if reasons:
        logger.warning(
            f"{dropped} are dropped: {counts}. Raise `{option}` (now {limit}) or remove these rows to be rid of "
            "this warning."
        )
        dataset = dataset.filter(
            lambda reason: not reason,
            input_columns=DROPPED,
            num_proc=num_proc,
            desc=f"Dropping rows of {name} dataset",
        )
    if cuts:
        logger.warning(
            f"{len(cuts)} of {len(dataset)} rows of the {name} dataset are longer than `{option}` ({max_length} "
            f"tokens) and lose their end with the EOS, {sum(cuts)} tokens in all. Raise `{option}` to train "
            "on whole completions."
        )
    return dataset


def _keep_and_warn_once(row: dict[str, Any], name: str, max_length: int | None, option: str, seen: set[str]) -> bool:
    reason = row[DROPPED]
    if reason and reason not in seen:
        seen.add(reason)
        logger.warning(
            f"A row of the {name} dataset is dropped: {reason}. More may follow without a message, since a stream "
            "can't be counted beforehand. Remove such rows to be rid of this warning."
        )
    if row[CUT] and CUT not in seen:
        seen.add(CUT)
        logger.warning(
            f"A row of the {name} dataset is longer than `{option}` ({max_length} tokens) and loses its last "
            f"{row[CUT]} tokens with the EOS. More may follow without a message, since a stream can't be "
            f"counted beforehand. Raise `{option}` to train on whole completions."
        )
    return not reason


def has_completions(dataset: Dataset | IterableDataset) -> bool:
    r"""
    Whether the rows of a prepared dataset hold completions (or text), judged by the first: `False` for prompts alone.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset of [`prepare_dataset`].

    Returns:
        `bool`: whether any token of the first row is trained.
    """
    return any(label != -100 for label in next(iter(dataset))["labels"])


def is_plain_text(dataset: Dataset | IterableDataset) -> bool:
    r"""
    Whether the rows of a prepared dataset are texts without a prompt, judged by the first. They can't be rolled out.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset of [`prepare_dataset`].

    Returns:
        `bool`: whether the first row has a prompt of no tokens.
    """
    return next(iter(dataset))["prompt_length"] == 0


def pack(
    dataset: Dataset | IterableDataset,
    max_length: int,
    strategy: str = "bfd",
    *,
    num_proc: int | None = None,
    name: str = "train",
) -> Dataset | IterableDataset:
    r"""
    Packs the rows of a prepared dataset into rows of up to `max_length` tokens, by [`~trl.pack_dataset`]. Only
    `input_ids` and `labels` are left, beside `seq_lengths`, by which [`KDCollator`] keeps the sequences apart.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset of [`prepare_dataset`]. For `"bfd_split"` and `"wrapped"`, prepare it with `max_length=None`, so
            that nothing is cut that would be packed.
        max_length (`int`):
            Length of a packed row, in tokens.
        strategy (`str`, *optional*, defaults to `"bfd"`):
            `"bfd"`, `"bfd_split"` or `"wrapped"`. The last joins sequences without telling them apart afterwards.
        num_proc (`int`, *optional*):
            Number of processes; not used for a stream.
        name (`str`, *optional*, defaults to `"train"`):
            What to call the dataset in the progress bar.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: the packed rows.

    Raises:
        ValueError: If `strategy` is unknown.
    """
    dataset = dataset.select_columns(["input_ids", "labels"])
    is_stream = isinstance(dataset, IterableDataset)
    options = {} if is_stream else {"num_proc": num_proc, "desc": f"Packing {name} dataset"}
    return pack_dataset(dataset, max_length, strategy, options)

"""The teacher's top tokens of a dataset, read from disk: a teacher that needs no memory and no model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from trl_kd.data.collator import KDCollator
from trl_kd.teachers.fingerprint import files_digest, model_digest, row_digests, tokenizer_digests
from trl_kd.teachers.packing import unpack_row


FORMAT, VERSION = "trl_kd teacher cache", 1
HEADER = "header.json"

# Number of tokens of each state `(T,)`; ids and log-probabilities `(N,)`, one state after the other
Row = tuple[np.ndarray, np.ndarray, np.ndarray]


class TeacherCache:
    r"""
    A finished cache of `trl-kd cache`, opened for reading.

    A row of the cache belongs to the row of the same number in the prepared dataset. Its states are the positions that
    predict the trained tokens, in order, and one more after the last of them if that is no EOS (the row was cut), so
    that a trainer can look at the state that follows. Each state has the teacher's likeliest tokens: the fewest
    with a mass of `top_p`, at most `max_tokens`.

    Files are memory-mapped when the first row is read, in each process anew, so a cache can be pickled to the workers
    of a data loader.

    Args:
        path (`str`):
            Folder that `trl-kd cache` has written.

    Raises:
        ValueError: If the folder holds no cache, an unfinished or empty one, or files that are not whole.

    Examples:

    ```python
    >>> cache = TeacherCache.open("cache")
    >>> counts, ids, log_probs = cache[0]  # of the first row: (T,), (N,), (N,)
    >>> len(ids) == counts.sum()
    True
    ```
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.header = _read_header(self.path)
        self._check_parts()
        self._starts = np.cumsum([0, *(part["rows"] for part in self.header["parts"])])
        self._parts: list[Any] | None = None

    @classmethod
    def open(cls, path: "str | Path | TeacherCache") -> "TeacherCache":
        """The cache in a folder; one that is open already is returned as it is."""
        return path if isinstance(path, cls) else cls(path)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_parts": None}

    def __len__(self) -> int:
        return self.header["counts"]["rows"]

    def __getitem__(self, index: int) -> Row:
        """
        Counts `(T,)`, ids `(N,)` and log-probabilities `(N,)` of a row; sorted by probability in each state.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(
                f"Row {index} is asked for, but the cache `{self.path}` has {len(self)} rows. Use the dataset that it "
                "was written for."
            )
        index %= len(self)
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        at = index - int(self._starts[number])
        part = self._tables()[number]
        states, data = part.column("states")[at].as_py(), part.column("data")[at].as_py()
        return unpack_row(data, states, self.vocab_size, self.settings["bits"])

    def __iter__(self) -> Iterator[Row]:
        """The rows in order, for streaming."""
        return (self[index] for index in range(len(self)))

    @property
    def settings(self) -> dict[str, Any]:
        """What it was written with: `top_p`, `max_tokens`, `bits`, `batch_size`, `rows_per_part`."""
        return self.header["settings"]

    @property
    def top_p(self) -> float:
        """Mass of the sets; those of a smaller mass are prefixes."""
        return self.settings["top_p"]

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the teacher's probabilities sum to 1 over."""
        return self.header["vocab_size"]

    @property
    def eos_token_ids(self) -> list[int]:
        """Tokens that end a completion: those that the dataset was prepared with."""
        return self.header["eos_token_ids"]

    def num_states(self) -> np.ndarray:
        """Number of states of each row, `(rows,)`."""
        return self._column("states")

    def check_rows(self, dataset: Dataset) -> None:
        r"""
        Make sure that a prepared dataset is the one that the cache was written for, row by row.

        Args:
            dataset ([`~datasets.Dataset`]):
                Dataset of [`prepare_dataset`], not packed, not shuffled.

        Raises:
            ValueError: If a row differs, or is missing, or the rows stand in another order.
        """
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"The dataset is a {type(dataset).__name__}, but a teacher cache belongs to rows that can be counted "
                "and compared before training. Load it without streaming."
            )
        if "seq_lengths" in dataset.column_names:
            raise ValueError(
                f"The dataset is packed, but the cache `{self.path}` has one row for each of its sequences. Set "
                "`packing=False`."
            )
        expected, found = self._column("row"), row_digests(dataset)
        shared = min(len(expected), len(found))
        differing = np.flatnonzero(expected[:shared] != found[:shared])
        if len(differing) == 0 and len(expected) == len(found):
            return
        if len(expected) != len(found):
            what = f"The dataset has {len(found)} rows, the cache `{self.path}` {len(expected)}"
        elif np.array_equal(np.sort(expected), np.sort(found)):
            what = f"The dataset has the rows of the cache `{self.path}` in another order"
        else:
            what = f"The dataset is not the one of the cache `{self.path}`: {len(differing)} of its rows differ"
        where = f"from row {differing[0]} on" if len(differing) else f"after row {shared - 1}"
        raise ValueError(
            f"{what} ({where}). The teacher's tokens would be those of other text. Use the dataset, the split and the "
            "options (`max_length`, `assistant_only_loss`, the chat template) that the cache was written with, or "
            "write a new one with `trl-kd cache`."
        )

    def with_rows(self, dataset: Dataset) -> Dataset:
        """The dataset with the column `cache_row` that [`CacheCollator`] needs, after [`check_rows`]."""
        self.check_rows(dataset)
        return dataset.add_column("cache_row", list(range(len(dataset))))

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        r"""
        Make sure that a tokenizer is the one that the dataset of the cache was prepared with.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                The student's tokenizer. Its pad token does not matter.

        Raises:
            ValueError: If vocabulary, BOS, EOS or chat template differ.
        """
        expected, found = self.header["tokenizer"], tokenizer_digests(tokenizer)
        what, why = None, "The ids in the cache would be other tokens"
        if expected["vocabulary"] != found["vocabulary"]:
            what = f"vocabulary ({found['size']} tokens, that of the cache {expected['size']})"
        elif expected["ends"] != found["ends"]:
            what, why = "BOS or EOS token", "Its rows would begin or end with other tokens"
        elif expected["chat_template"] != found["chat_template"]:
            what, why = "chat template", "The teacher has read other text around each message"
        if what is not None:
            raise ValueError(
                f"The tokenizer has another {what} than the one of the cache `{self.path}`. {why}. Use the tokenizer "
                "that the cache was written with, or write a new one with `trl-kd cache`."
            )

    def check_teacher(self, teacher: "str | nn.Module", revision: str | None = None) -> None:
        r"""
        Make sure that a model is the one that wrote the cache. Loads nothing.

        Args:
            teacher (`str` or [`~transformers.PreTrainedModel`]):
                Model, path or Hub name. Of a name whose files are not on this machine, name and revision alone are
                compared.
            revision (`str`, *optional*):
                Revision on the Hub.

        Raises:
            ValueError: If it is another model, or has other weights. A model's dtype has to be the same too; of a path
                or a name, the dtype in its files is all that is known.
        """
        own = self.header["teacher"]
        own_revision = own.get("revision") or "main"
        if isinstance(teacher, nn.Module):
            name, expected, found = type(teacher).__name__, own["weights"], model_digest(teacher)
            what = "its weights or their dtype differ"
        else:
            name, expected, found = teacher, own["files"], files_digest(teacher, revision)
            what = "its config or its weights differ"
            if expected is None or found is None:
                expected, found = (own["name"], own_revision), (teacher, revision or "main")
                what = (
                    f"its name or its revision (`{found[1]}`) differs, and nothing else could be compared, since the "
                    "files of one of the two are not known on this machine"
                )
        if expected != found:
            raise ValueError(
                f"The teacher `{name}` is not the one that wrote the cache `{self.path}` (`{own['name']}`, revision "
                f"`{own_revision}`, in {own['dtype']}): {what}. Training would follow another teacher than the one "
                "asked for. Leave the teacher out, or write a new cache with `trl-kd cache`."
            )

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate([part.column(name).to_numpy() for part in self._tables()])

    def _check_parts(self) -> None:
        """Refuse files that are missing or cut."""
        for part in self.header["parts"]:
            file = self.path / part["file"]
            size = file.stat().st_size if file.is_file() else None
            if size != part["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes instead of {part['bytes']}"
                raise ValueError(
                    f"The teacher cache `{self.path}` is not whole: `{part['file']}` {found}. Its rows cannot be "
                    "read. Copy the file again; or run `trl-kd cache` with the same options, which writes this file "
                    "again and no whole one."
                )

    def _tables(self) -> list[Any]:
        if self._parts is None:
            files = [str(self.path / part["file"]) for part in self.header["parts"]]
            self._parts = [Dataset.from_file(file).data for file in files]
        return self._parts


def read_header(path: Path) -> dict[str, Any] | None:
    """The header of a cache, finished or not; `None` if there is none."""
    file = path / HEADER
    if not file.is_file():
        return None
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"`{file}` cannot be read ({error}), and without it nothing is known about the files beside it. Restore "
            "it, or write the cache again into an empty folder."
        ) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(
            f"`{file}` is not the header of a teacher cache. Give the folder that `trl-kd cache` has written "
            "(`--output_dir`)."
        )
    if header["version"] != VERSION:
        raise ValueError(
            f"The teacher cache `{path}` has version {header['version']}, but this release of trl_kd reads version "
            f"{VERSION}. Write it again with `trl-kd cache`, or use the release that wrote it."
        )
    return header


def _read_header(path: Path) -> dict[str, Any]:
    """The header of a finished cache that holds something."""
    header = read_header(path)
    if header is None:
        raise ValueError(
            f"`{path}` holds no teacher cache: there is no `{HEADER}` in it. Give the folder that `trl-kd cache` has "
            "written (`--output_dir`)."
        )
    if not header["complete"]:
        done = sum(part["rows"] for part in header["parts"])
        raise ValueError(
            f"The teacher cache `{path}` is unfinished: {done} of {header['dataset']['rows']} rows are written. Run "
            "`trl-kd cache` again with the same options; it writes those that are missing."
        )
    if header["counts"]["states"] == 0:
        raise ValueError(
            f"The teacher cache `{path}` is empty: {header['counts']['rows']} rows, no state. There is nothing to "
            "learn from. Write it for a dataset with completions."
        )
    return header


class CachedTeacher:
    r"""
    A cache in the place of a teacher model. It knows the teacher's tokens on the dataset's own text, and nothing else:
    no hidden states, no head, and it writes no text. Loads no model.

    Args:
        cache (`str` or [`TeacherCache`]):
            Cache or its folder.

    Raises:
        ValueError: If the cache cannot be opened.
    """

    head, heads = None, ()

    def __init__(self, cache: "str | Path | TeacherCache"):
        self.cache = TeacherCache.open(cache)

    @property
    def name(self) -> str:
        """Path or Hub name of the teacher that wrote the cache."""
        return self.cache.header["teacher"]["name"]

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the teacher's probabilities sum to 1 over."""
        return self.cache.vocab_size

    def ends(self, tokenizer: Any) -> list[int]:
        """Ids by which the teacher ended a completion."""
        return self.cache.eos_token_ids

    def tokenizer(self) -> None:
        """None: the cache has digests of it, see [`TeacherCache.check_tokenizer`]."""
        return None

    def prepare(self, accelerator: Any, vocab_size: int | None = None) -> None:
        r"""
        Make sure that the student has every token of the cache. There is nothing to place on a device.

        Args:
            accelerator ([`~accelerate.Accelerator`]):
                Not used.
            vocab_size (`int`, *optional*):
                Size of the student's head.

        Raises:
            ValueError: If the cache holds tokens beyond it.
        """
        largest = self.cache.header["counts"]["largest_id"]
        if vocab_size is not None and largest >= vocab_size:
            raise ValueError(
                f"The teacher cache `{self.cache.path}` holds token {largest}, but the student's head has "
                f"{vocab_size} rows, so that token could never be learned. Write the cache with the student's "
                "vocabulary (`trl-kd cache --model_name_or_path`), or resize the student's embeddings."
            )

    def generate(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        """Refused: a cache cannot write."""
        raise ValueError(
            f"The teacher is the cache `{self.cache.path}`, which knows the dataset's text alone and cannot write "
            "completions. Use a dataset with completions, with `lmbda=0` and `off_policy_source='dataset'`, or train "
            "with the teacher itself."
        )


class CacheCollator(KDCollator):
    r"""
    Collates rows with the teacher's tokens from a cache.

    Rows have a column `cache_row`, their number in the cache ([`TeacherCache.with_rows`]). The batch gains
    `teacher_ids` (int64) and `teacher_log_probs` (float32), both of shape `(B, T, K)`: T states of the longest row
    (its trained tokens in order, and one state more if it was cut), and K tokens of the largest set, sorted by
    descending probability over the whole vocabulary. What is no token has the log-probability `-inf` and the id 0.

    Args:
        collator ([`KDCollator`]):
            What collates everything else.
        cache (`str` or [`TeacherCache`]):
            Cache or its folder.
        top_p (`float`, *optional*):
            Keep the fewest tokens with this mass. By default, and at the cache's own `top_p`, all that it has.
        max_actions (`int`, *optional*):
            Keep at most so many.
        eval_cache (`str` or [`TeacherCache`], *optional*):
            Cache of the evaluation dataset, whose rows have a true `in_eval_cache`.

    Raises:
        ValueError: If `top_p` is outside of (0, 1], or above that of the cache, or `max_actions` is below 1.
    """

    def __init__(
        self,
        collator: KDCollator,
        cache: "str | Path | TeacherCache",
        top_p: float | None = None,
        max_actions: int | None = None,
        eval_cache: "str | Path | TeacherCache | None" = None,
    ):
        super().__init__(collator.pad_token_id, collator.pad_to_multiple_of)
        self.cache = TeacherCache.open(cache)
        self.eval_cache = None if eval_cache is None else TeacherCache.open(eval_cache)
        for each in (self.cache, self.eval_cache):
            if each is not None:
                check_top_p(top_p, each)
        if max_actions is not None and max_actions < 1:
            raise ValueError(
                f"`max_actions` is {max_actions}, but a set has at least the teacher's likeliest token. Set it to 1 "
                "or more."
            )
        self.top_p = top_p
        self.max_actions = max_actions

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(rows)
        found = [self._cached(row) for row in rows]
        shape = (len(found), max(len(row[0]) for row in found), max(row[0].max(initial=1) for row in found))
        teacher_ids = np.zeros(shape, dtype=np.int64)  # (B, T, K)
        teacher_log_probs = np.full(shape, -np.inf, dtype=np.float32)
        for index, (counts, ids, log_probs) in enumerate(found):
            at = _states_and_ranks(counts)
            teacher_ids[index][at], teacher_log_probs[index][at] = ids, log_probs
        tensors = {"teacher_ids": teacher_ids, "teacher_log_probs": teacher_log_probs}
        return batch | {name: torch.from_numpy(array) for name, array in tensors.items()}

    def _cached(self, row: dict[str, Any]) -> Row:
        """The sets of this run, if the row is still the one that was cached."""
        if "cache_row" not in row:
            raise ValueError(
                "A row has no column `cache_row`, so its place in the teacher cache is not known. Add the column with "
                "`TeacherCache.with_rows`, and keep rollouts out (`lmbda=0`): the cache knows the dataset's text only."
            )
        cache = self.eval_cache if row.get("in_eval_cache") else self.cache
        found = cache[row["cache_row"]]
        trained = sum(label != -100 for label in row["labels"][1:])
        if len(found[0]) - trained not in (0, 1):
            raise ValueError(
                f"Row {row['cache_row']} of the teacher cache has {len(found[0])} states, but the row of the dataset "
                f"has {trained} trained tokens. It was changed after the cache was written. Write a new one with "
                "`trl-kd cache`."
            )
        if row.get("in_eval_cache"):
            return found  # what is measured is measured on all that there is
        # The teacher's own sets where the mass is that of the cache: rounding could end one a token earlier
        return top_sets(found, None if self.top_p == cache.top_p else self.top_p, self.max_actions)


def top_sets(row: Row, top_p: float | None = None, max_actions: int | None = None) -> Row:
    r"""
    The likeliest tokens of each state of a row of a cache.

    Args:
        row (`tuple[np.ndarray, np.ndarray, np.ndarray]`):
            Counts, ids and log-probabilities, as a [`TeacherCache`] gives them.
        top_p (`float`, *optional*):
            Keep the fewest with this mass; all, if they have less.
        max_actions (`int`, *optional*):
            Keep at most so many.

    Returns:
        `tuple[np.ndarray, np.ndarray, np.ndarray]`: the same of what is kept, at least one token of each state.

    Examples:

    ```python
    >>> row = np.array([3, 1]), np.array([7, 3, 9, 5]), np.log([0.5, 0.3, 0.1, 0.9])
    >>> top_sets(row, top_p=0.6)[:2]
    (array([2, 1]), array([7, 3, 5]))
    ```
    """
    counts, ids, log_probs = row
    states, ranks = _states_and_ranks(counts)
    keep = np.ones(len(states), dtype=bool)
    if max_actions is not None:
        keep &= ranks < max_actions
    if top_p is not None:
        masses = np.concatenate([[0.0], np.cumsum(np.exp(log_probs.astype(np.float64)))])
        before = masses[:-1] - masses[np.arange(len(states)) - ranks]
        keep &= before < top_p
    return np.bincount(states[keep], minlength=len(counts)), ids[keep], log_probs[keep]


def _states_and_ranks(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """State of each token of a row, and its place in it, both `(N,)`."""
    states = np.repeat(np.arange(len(counts)), counts)
    return states, np.arange(len(states)) - (np.cumsum(counts) - counts)[states]


def check_top_p(top_p: float | None, cache: TeacherCache, name: str = "top_p") -> None:
    """Refuse a mass that is none, or more than a cache holds; `name` is the option that sets it."""
    if top_p is None:
        return
    if not 0 < top_p <= 1:
        raise ValueError(f"`{name}` is {top_p}, but it is a probability mass. Set it in (0, 1].")
    if top_p > cache.top_p:
        raise ValueError(
            f"`{name}` is {top_p}, but the teacher cache `{cache.path}` was written with {cache.top_p} and holds no "
            f"tokens beyond. Set it to {cache.top_p} or less, or write a new cache with a larger `top_p`."
        )

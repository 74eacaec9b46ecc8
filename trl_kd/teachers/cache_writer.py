"""Writing a teacher cache: one forward of the teacher over a prepared dataset, in parts that survive a kill."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, Value
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from trl_kd.data.collator import KDCollator
from trl_kd.losses.sparse import top_tokens
from trl_kd.modules.lm_head import LMHead, check_head
from trl_kd.teachers.cache import FORMAT, HEADER, VERSION, TeacherCache, read_header
from trl_kd.teachers.fingerprint import files_digest, joint_digest, model_digest, row_digests, tokenizer_digests
from trl_kd.teachers.local import LocalTeacher
from trl_kd.teachers.packing import check_bits, pack_row


logger = logging.get_logger(__name__)

LOCK = "writing.lock"
_FEATURES = Features(
    {"row": Value("int64"), "states": Value("int32"), "tokens": Value("int32"), "data": Value("large_binary")}
)


@dataclass(frozen=True)
class CacheSettings:
    r"""
    What decides the content of a cache, beside teacher and dataset.

    Args:
        top_p (`float`, *optional*, defaults to `0.95`):
            Mass of the set of each state, so that a run may use any smaller one.
        max_tokens (`int`, *optional*, defaults to `256`):
            Most tokens of a set.
        bits (`int`, *optional*, defaults to `8`):
            Bits of a log-probability: 4 to 16, or 32 for no rounding.
        batch_size (`int`, *optional*, defaults to `8`):
            Rows that the teacher reads at once. Padding changes the last digits, so a run that goes on with another
            one warns of it.
        rows_per_part (`int`, *optional*, defaults to `1000`):
            Rows of a file. A run that was cut off loses at most so many.

    Raises:
        ValueError: If a value is out of range.
    """

    top_p: float = 0.95
    max_tokens: int = 256
    bits: int = 8
    batch_size: int = 8
    rows_per_part: int = 1000

    def __post_init__(self):
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` is {self.top_p}, but it is a probability mass. Set it in (0, 1].")
        check_bits(self.bits)
        for name in ("max_tokens", "batch_size", "rows_per_part"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}, but nothing can be written then. Set it to 1 or more."
                )
        if self.max_tokens > 1 << 16:
            raise ValueError(
                f"`max_tokens` is {self.max_tokens}, but a set has at most {1 << 16} tokens in the cache. Set it to "
                "that or less, or train with the teacher itself."
            )


def write_cache(
    dataset: Dataset,
    teacher: LocalTeacher,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    eos_token_ids: Iterable[int],
    settings: CacheSettings | None = None,
    vocab_size: int | None = None,
    show_progress: bool = False,
) -> TeacherCache:
    r"""
    Writes the teacher's likeliest tokens at every trained token of a dataset.

    Each part is written under another name and renamed, then entered into the header, whose last change declares the
    cache complete. Called again with the same arguments, it writes the parts that are missing or cut and no other,
    and the result is the same as without the interruption. Within a part, the longest rows are read first, so that
    memory that does not suffice is seen at once; `batch_size` may be made smaller then.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset of [`prepare_dataset`] with completions, not packed.
        teacher ([`LocalTeacher`]):
            The teacher, on its device.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            What the dataset was prepared with.
        folder (`str`):
            Folder of the cache: new, empty, or with what an earlier call has written.
        eos_token_ids (`Iterable[int]`):
            Tokens that end a completion, those that the dataset was prepared with. A row whose last trained token is
            none of them gets one state more.
        settings ([`CacheSettings`], *optional*):
            Sizes and bits.
        vocab_size (`int`, *optional*):
            Size that the teacher's head is cut to, as in training with a student whose head is smaller.
        show_progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        [`TeacherCache`]

    Raises:
        ValueError: If the dataset has nothing to cache, the teacher's probabilities are not finite, the folder holds a
            cache of something else, or another process is writing to it.
    """
    settings, folder = settings or CacheSettings(), Path(folder)
    _check_dataset(dataset)
    _check_teacher(teacher)
    head = teacher.head if vocab_size is None else teacher.head.cut(vocab_size)
    digests = row_digests(dataset)
    header = _new_header(teacher, tokenizer, len(head.weight), eos_token_ids, settings, digests)
    folder.mkdir(parents=True, exist_ok=True)
    with _only_writer(folder):
        header, parts = _resume(folder, header)
        done = sum(part["rows"] for part in parts.values())
        with tqdm(total=len(dataset), initial=done, desc="Caching", unit="row", disable=not show_progress) as progress:
            for number, start in enumerate(range(0, len(dataset), settings.rows_per_part)):
                name = f"part-{number:05d}.arrow"
                if name in parts:
                    continue
                rows = dataset.select(range(start, min(start + settings.rows_per_part, len(dataset))))
                part = _Part(digests[start : start + len(rows)])
                for index, states in _read_rows(rows, teacher, head, set(header["eos_token_ids"]), settings):
                    part.add(index, states, header["vocab_size"], settings.bits)
                    progress.update()
                parts[name] = part.write(folder, name)
                _write_header(folder, header, parts, complete=False)
        _write_header(folder, header, parts, complete=True)
    return TeacherCache.open(folder)


def written_rows(folder: str | Path) -> int:
    r"""
    Number of rows in the whole parts of a folder, finished or not.

    Args:
        folder (`str`):
            Folder that [`write_cache`] writes to. It need not exist.

    Returns:
        `int`

    Raises:
        ValueError: If the folder holds the header of something else.
    """
    header = read_header(Path(folder))
    return sum(part["rows"] for part in _whole_parts(Path(folder), header).values()) if header else 0


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder against other processes. The system ends the hold of a process that dies."""
    file = folder / LOCK
    lock = FileLock(str(file))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"Another process is writing the cache `{folder}` (it holds `{LOCK}`), and two would overwrite each "
            "other's files. Wait for it, or name another folder."
        ) from None
    try:
        yield
    finally:
        with suppress(PermissionError):  # Windows, where the release removes it
            file.unlink(missing_ok=True)
        lock.release()


def _check_dataset(dataset: Any) -> None:
    """Refuse what has no rows, no columns, or nothing to read."""
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"The dataset is a {type(dataset).__name__}, but the rows of a teacher cache are found by their number. "
            "Load it without streaming."
        )
    missing = {"input_ids", "labels"} - set(dataset.column_names)
    if missing or "seq_lengths" in dataset.column_names:
        what = "is packed" if not missing else f"has the columns {dataset.column_names}"
        raise ValueError(
            f"The dataset {what}, but a teacher reads rows of `input_ids` and `labels`, one sequence each. Pass what "
            "`prepare_dataset` returns."
        )
    if not any(label != -100 for labels in dataset.with_format(None)["labels"] for label in labels[1:]):
        raise ValueError(
            f"The dataset has {len(dataset)} rows and no trained token, so the cache would be empty. Pass rows with "
            "completions; `trl-kd generate` lets the teacher write them."
        )


def _check_teacher(teacher: LocalTeacher) -> None:
    """Refuse a teacher whose numbers would not be its own."""
    if any(parameter.is_meta for parameter in teacher.model.parameters()):
        raise ValueError(
            f"The teacher `{teacher.name}` does not fit the devices and is partly offloaded, which is not supported. "
            'Load it in 4 bit (`teacher_model_init_kwargs={"load_in_4bit": True}`), or write the cache on a larger '
            "machine: it can be copied."
        )
    check_head(teacher.model, "teacher")


def _new_header(
    teacher: LocalTeacher,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    eos_token_ids: Iterable[int],
    settings: CacheSettings,
    digests: np.ndarray,
) -> dict[str, Any]:
    """All that decides what is written."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "settings": asdict(settings),
        "teacher": {
            "name": teacher.name,
            "revision": teacher.revision,
            "dtype": str(teacher.head.weight.dtype).removeprefix("torch."),
            "weights": model_digest(teacher.model),
            "files": files_digest(teacher.name, teacher.revision) if teacher.name else None,
        },
        "tokenizer": tokenizer_digests(tokenizer),
        "vocab_size": vocab_size,
        "eos_token_ids": sorted(set(eos_token_ids)),
        "dataset": {"rows": len(digests), "digest": joint_digest(digests)},
    }


def _resume(folder: Path, header: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The header to write, and the whole parts that an earlier run has left; refuse those of something else."""
    found = read_header(folder)
    if found is None:
        if others := sorted(path.name for path in folder.iterdir() if path.name not in (f"{HEADER}.tmp", LOCK)):
            raise ValueError(
                f"`{folder}` holds other files ({', '.join(others[:3])}), which would be mixed with those of the "
                "cache. Name a new or an empty folder."
            )
        _write_header(folder, header, {}, complete=False)
        return header, {}
    _check_same(folder, found, header)
    parts = _whole_parts(folder, found)
    for part in found["parts"]:
        if part["file"] not in parts:
            logger.warning(f"`{folder / part['file']}` is missing or cut. It is written again; whole parts stay.")
    earlier, now = found["settings"]["batch_size"], header["settings"]["batch_size"]
    if parts and earlier != now:
        header = header | {"settings": found["settings"]}
        if sum(part["rows"] for part in parts.values()) < header["dataset"]["rows"]:
            logger.warning(
                f"`batch_size` is {now}, but the teacher has read {earlier} rows at once for the parts in `{folder}`. "
                f"Padding differs, so the last digits may too. Set it to {earlier} for the cache of one uninterrupted "
                "run."
            )
    return header, parts


def _whole_parts(folder: Path, header: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a header says of its files, for those that are there and not cut."""
    sizes = {file.name: file.stat().st_size for file in folder.glob("part-*.arrow")}
    return {part["file"]: part for part in header["parts"] if sizes.get(part["file"]) == part["bytes"]}


def _check_same(folder: Path, found: dict[str, Any], header: dict[str, Any]) -> None:
    """Refuse to go on with parts of something else. Only the batch size may be another."""
    names = {
        "teacher": "teacher",
        "tokenizer": "tokenizer",
        "vocab_size": "vocabulary size",
        "eos_token_ids": "EOS tokens",
        "dataset": "dataset",
    }
    differing = [
        f"{name} ({found['settings'].get(name)}, now {value})"
        for name, value in header["settings"].items()
        if found["settings"].get(name) != value and name != "batch_size"
    ] + [name for key, name in names.items() if found[key] != header[key]]
    if differing:
        raise ValueError(
            f"`{folder}` holds a cache with another {', another '.join(differing)}, so its parts do not belong to "
            "this one. Name another folder, run with what it was made with, or remove it."
        )


def _read_rows(
    rows: Dataset, teacher: LocalTeacher, head: LMHead, eos_token_ids: set[int], settings: CacheSettings
) -> Iterable[tuple[int, tuple[np.ndarray, ...]]]:
    """
    Number of each row, and counts, ids and log-probabilities of its states with the number of those whose set was
    capped. In batches of rows of like length, the longest first, so that memory fails before much is read.
    """
    columns = {name: rows.with_format(None)[name][:] for name in ("input_ids", "labels")}
    order = sorted(range(len(rows)), key=lambda index: -len(columns["input_ids"][index]))
    collate = KDCollator(pad_token_id=0)
    device = head.weight.device
    for start in range(0, len(order), settings.batch_size):
        indices = order[start : start + settings.batch_size]
        batch = collate([{name: column[index] for name, column in columns.items()} for index in indices])
        mask = state_mask(batch["labels"], eos_token_ids)  # (B, S)
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        hidden = teacher.hidden_states(**inputs)[mask.to(device)]
        counts, ids, log_probs, capped = _top_sets(hidden, head, settings)
        ends = np.cumsum(mask.sum(dim=1).numpy())
        tokens = np.concatenate([[0], np.cumsum(counts)])
        for index, end, length in zip(indices, ends, mask.sum(dim=1).tolist(), strict=True):
            states, at = slice(end - length, end), slice(tokens[end - length], tokens[end])
            yield index, (counts[states], ids[at], log_probs[at], capped[states])


def state_mask(labels: torch.Tensor, eos_token_ids: Iterable[int]) -> torch.Tensor:
    r"""
    Positions that a cache has states for: those that predict a trained token, and that of the last trained token of a
    row if it does not end the text.

    Args:
        labels (`torch.Tensor` of shape `(B, S)`):
            Tokens, -100 where they are not trained.
        eos_token_ids (`Iterable[int]`):
            Tokens that end a text.

    Returns:
        `torch.Tensor` of shape `(B, S)`, bool.

    Examples:

    ```python
    >>> state_mask(torch.tensor([[-100, 5, 6], [-100, 5, 2]]), eos_token_ids=[2])
    tensor([[ True,  True,  True],
            [ True,  True, False]])
    ```
    """
    trained = labels != -100
    trained[:, 0] = False  # no position predicts the first token
    mask = torch.zeros_like(trained)
    mask[:, :-1] = trained[:, 1:]
    last = labels.shape[1] - 1 - trained.flip(1).int().argmax(dim=1)  # (B,)
    ends = torch.isin(labels.gather(1, last[:, None]).squeeze(1), torch.tensor(sorted(eos_token_ids)))
    rows = (trained.any(dim=1) & ~ends).nonzero().squeeze(1)
    mask[rows, last[rows]] = True
    return mask


@torch.no_grad()
def _top_sets(hidden: torch.Tensor, head: LMHead, settings: CacheSettings) -> tuple[np.ndarray, ...]:
    """Sizes `(N,)` of the sets, their ids and log-probabilities (flat), and which of them were capped `(N,)`."""
    ids, log_probs = top_tokens(hidden, head, settings.max_tokens)  # (N, K)
    masses = log_probs.double().exp().cumsum(dim=1)
    before = masses - log_probs.double().exp()
    # Probability 0 is no token; NaN stays, and is refused when it is written
    # Rounding may give all a mass of 1 before the last of them
    keep = ((before < settings.top_p) | (settings.top_p == 1)) & (log_probs != -torch.inf)
    keep[:, 0] = True
    capped = (masses[:, -1] < settings.top_p) & keep[:, -1] & (ids.shape[1] < len(head.weight))
    return tuple(values.cpu().numpy() for values in (keep.sum(dim=1), ids[keep], log_probs[keep].float(), capped))


class _Part:
    """The rows of one file, in any order until they are written."""

    def __init__(self, digests: np.ndarray):
        self._digests = digests
        self._rows: list[tuple[int, int, bytes] | None] = [None] * len(digests)
        self._capped = 0
        self._largest_id = -1

    def add(self, index: int, states: tuple[np.ndarray, ...], vocab_size: int, bits: int) -> None:
        """Take the states of a row."""
        counts, ids, log_probs, capped = states
        self._rows[index] = (len(counts), len(ids), pack_row(counts, ids, log_probs, vocab_size, bits))
        self._capped += int(capped.sum())
        self._largest_id = max(self._largest_id, int(ids.max(initial=-1)))

    def write(self, folder: Path, name: str) -> dict[str, Any]:
        """Write the file under its name only when it is whole; what the header says of it."""
        states, tokens, data = zip(*self._rows, strict=True)
        columns = {"row": self._digests, "states": states, "tokens": tokens, "data": data}
        unfinished = folder / f"{name}.tmp"
        schema = _FEATURES.arrow_schema
        with ArrowWriter(features=_FEATURES, path=str(unfinished)) as writer:
            # Few rows at a time, so that reading one touches little
            arrays = [pa.array(columns[field.name], type=field.type) for field in schema]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            writer.finalize()
        _replace(unfinished, folder / name)
        return {
            "file": name,
            "rows": len(states),
            "states": sum(states),
            "tokens": sum(tokens),
            "capped_states": self._capped,
            "largest_id": self._largest_id,
            "data_bytes": sum(map(len, data)),
            "bytes": (folder / name).stat().st_size,
            "digest": joint_digest(self._digests),
        }


def _write_header(folder: Path, header: dict[str, Any], files: dict[str, dict[str, Any]], complete: bool) -> None:
    parts = [files[name] for name in sorted(files, key=lambda name: (len(name), name))]
    counts = {name: sum(part[name] for part in parts) for name in ("rows", "states", "tokens", "capped_states")}
    counts["data_bytes"] = sum(part["data_bytes"] for part in parts)
    counts["largest_id"] = max((part["largest_id"] for part in parts), default=-1)
    whole = header | {"complete": complete, "counts": counts, "parts": parts}
    unfinished = folder / f"{HEADER}.tmp"
    unfinished.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _replace(unfinished, folder / HEADER)


def _replace(unfinished: Path, file: Path) -> None:
    """Give a file its name when it is on the disk, so that a power cut leaves the old one or the new one."""
    with unfinished.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(unfinished, file)

"""Short digests by which a cache knows its teacher, its tokenizer and its dataset again."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
import torch.nn as nn
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file


_SAMPLE = 1 << 16  # bytes of a weight file, or elements of a parameter, that are read at a time
_STRIDE = 1 << 22  # bytes from one sample of a large weight file to the next
_WHOLE = 1 << 26  # bytes of a weight file that is read as a whole


def model_digest(model: nn.Module) -> str:
    r"""
    Digest of a model's parameters: names, shapes, dtypes, and up to 65,536 evenly spaced values of each.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model as it was loaded. Another dtype gives another digest.

    Returns:
        `str`
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, -(-flat.numel() // _SAMPLE))].contiguous().cpu()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def files_digest(path: str, revision: str | None = None) -> str | None:
    r"""
    Digest of a model's `config.json` and weight files. Loads no model.

    Files of up to 64 MiB are read as a whole; of larger ones 64 KiB of every 4 MiB, which is quick and sees every
    change of a tensor of that size.

    Args:
        path (`str`):
            Folder, or Hub name of a model that has been downloaded.
        revision (`str`, *optional*):
            Revision on the Hub.

    Returns:
        `str` or `None`: `None` if the files are not on this machine.
    """
    folder = Path(path)
    if not folder.is_dir():
        try:
            config = cached_file(path, "config.json", revision=revision, local_files_only=True)
        except OSError:  # not downloaded
            return None
        folder = Path(config).parent
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not weights or not (folder / "config.json").is_file():
        return None
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in weights:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for start in range(0, size, _SAMPLE if size <= _WHOLE else _STRIDE):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()


def tokenizer_digests(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """
    Digests of a tokenizer: `vocabulary`, `ends` (its BOS and EOS; a pad token changes no row) and `chat_template`,
    with the number of its tokens as `size`.
    """
    vocabulary = tokenizer.get_vocab()
    return {
        "size": len(vocabulary),
        "vocabulary": _digest(sorted(vocabulary.items())),
        "ends": _digest([tokenizer.bos_token, tokenizer.eos_token]),
        "chat_template": None if tokenizer.chat_template is None else _digest(tokenizer.chat_template),
    }


def row_digests(dataset: Dataset) -> np.ndarray:
    r"""
    Digest of `input_ids` and `labels` of each row.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset of [`prepare_dataset`].

    Returns:
        `np.ndarray` of shape `(rows,)`, int64.
    """
    digests = [
        hashlib.sha256(np.int64(len(ids)).tobytes() + ids.tobytes() + labels.tobytes()).digest()[:8]
        for ids, labels in _rows(dataset)
    ]
    return np.frombuffer(b"".join(digests), dtype="<i8")


def joint_digest(digests: np.ndarray) -> str:
    """Digest of a sequence of row digests."""
    return hashlib.sha256(digests.astype("<i8").tobytes()).hexdigest()


def _rows(dataset: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`input_ids` and `labels` of each row, as int64."""
    for table in dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(batch_size=1000):
        columns = []
        for name in ("input_ids", "labels"):
            column = table.column(name)
            ends = np.cumsum(pc.list_value_length(column).to_numpy())
            columns.append(np.split(pc.list_flatten(column).to_numpy().astype("<i8"), ends[:-1]))
        yield from zip(*columns, strict=True)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()

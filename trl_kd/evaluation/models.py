"""Models under evaluation: loaded from a folder, an adapter or the Hub, and known by a digest."""

import codecs
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trl_kd import _compat
from trl_kd.data.alignment import TokenBytes
from trl_kd.data.formatting import row_formatter
from trl_kd.data.rows import DROPPED
from trl_kd.evaluation.cost_worker import size_on_disk
from trl_kd.evaluation.store import ModelEntry
from trl_kd.evaluation.store_rows import ROLES
from trl_kd.evaluation.suite import EvalRow
from trl_kd.generation import completion_text, eos_token_ids
from trl_kd.teachers.fingerprint import files_digest, model_digest, tokenizer_digests


_ADAPTER = "adapter_config.json"
_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide what is measured."""
    versions = {}
    for name in ("trl_kd", "torch", "transformers", "peft", "evaluate", "rouge-score", "tokenizers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


@dataclass
class EvalModel:
    r"""
    A model to be evaluated.

    Args:
        name (`str`):
            What tables call it.
        model (`str` or [`~transformers.PreTrainedModel`]):
            Folder with a model or an adapter, name on the Hub, or a model object.
        role (`str`, *optional*, defaults to `"student"`):
            `"teacher"`, `"before"` (the student before distillation, which changes are measured against), `"student"`
            or `"other"`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Defaults to the one beside the model, or beside the base of an adapter.
        init_kwargs (`dict[str, Any]`, *optional*):
            Arguments of `from_pretrained`; `dtype` defaults to `"auto"`.

    Raises:
        ValueError: If `role` is unknown, or a model object has no tokenizer.
    """

    name: str
    model: Any
    role: str = "student"
    tokenizer: Any = None
    init_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(f"The role of '{self.name}' is '{self.role}', which is unknown. Use one of {ROLES}.")
        if self.tokenizer is None:
            if not isinstance(self.model, str):
                raise ValueError(
                    f"'{self.name}' is a model object without a tokenizer, so it cannot read prompts. Pass "
                    "`tokenizer`, or the folder of the model."
                )
            self.tokenizer = _load_tokenizer(self.name, self.model, self._source())

    @cached_property
    def folder(self) -> str:
        """
        Folder of a model that is given by its name: files that are not on this machine are fetched, so that the digest
        is that of the weights which are loaded. The name itself where they cannot be had.
        """
        if Path(self.model).is_dir():
            return self.model
        wanted = {key: value for key, value in self._source().items() if key != "trust_remote_code"}
        try:
            return snapshot_download(self.model, allow_patterns=_FILES, **wanted)
        except (OSError, ValueError):  # said once, when the model is loaded
            return self.model

    def _source(self) -> dict[str, Any]:
        names = ("revision", "token", "trust_remote_code", "cache_dir")
        return {key: value for key, value in self.init_kwargs.items() if key in names}

    def entry(self) -> ModelEntry:
        """What the store keeps of it. Loads no weights of a model that lies on disk."""
        if isinstance(self.model, str):
            source, weights = self.model, weights_digest(self.folder)
            size = weight_bytes(self.folder)
            parameters = _count_parameters(self.folder, self._source())
        else:
            weights, source, size = model_digest(self.model), _compat.config_model_id(self.model), None
            parameters = self.model.num_parameters()
        return ModelEntry(
            name=self.name,
            role=self.role,
            source=source,
            weights=weights,
            tokenizer=tokenizer_digests(self.tokenizer)["vocabulary"],
            parameters=parameters,
            size_on_disk=size,
        )

    def load(self) -> Any:
        """The model, in eval mode, on the accelerator if there is one."""
        if not isinstance(self.model, str):
            return self.model
        arguments = {"dtype": "auto"} | self.init_kwargs
        try:
            if (Path(self.folder) / _ADAPTER).is_file():
                from peft import AutoPeftModelForCausalLM

                model = AutoPeftModelForCausalLM.from_pretrained(self.folder, **arguments)
            else:
                model = AutoModelForCausalLM.from_pretrained(self.model, **arguments)
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise ValueError(_not_loaded(self.name, self.model, error)) from error
        _compat.keep_4bit_layout(model)
        if not _compat.is_placed(model):
            model.to(PartialState().device)
        return model.eval()


def _not_loaded(name: str, path: str, error: Exception) -> str:
    return (
        f"'{name}' could not be loaded from `{path}`: {error}. Give a folder with `config.json` (or "
        f"`{_ADAPTER}`), weights and a tokenizer, or the name of a causal language model on the Hub that this machine "
        "can reach."
    )


def _base_of(path: str) -> str | None:
    """The model under the adapter in this folder; `None` where there is no adapter."""
    file = Path(path) / _ADAPTER
    return json.loads(file.read_text())["base_model_name_or_path"] if file.is_file() else None


def _load_tokenizer(name: str, path: str, source: dict[str, Any]) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path, **source)
    except (OSError, ValueError) as error:
        if (base := _base_of(path)) is not None:
            return _load_tokenizer(name, base, source)
        raise ValueError(_not_loaded(name, path, error)) from error


def weights_digest(path: str, revision: str | None = None) -> str:
    r"""
    Digest of a model's weights and configuration; of an adapter's and of the model under it.

    Args:
        path (`str`):
            Folder, or Hub name of a model that has been downloaded.
        revision (`str`, *optional*):
            Revision on the Hub.

    Returns:
        `str`: `"unknown"` if the files are not on this machine.
    """
    base = _base_of(path)
    if base is None:
        return files_digest(path, revision) or "unknown"
    digest = hashlib.sha256((weights_digest(base) + (Path(path) / _ADAPTER).read_text()).encode())
    for file in sorted([*Path(path).glob("adapter_model*.safetensors"), *Path(path).glob("adapter_model*.bin")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def weight_bytes(path: str) -> int | None:
    """Bytes of a model's weight files, with those of the model under an adapter; `None` if they are not here."""
    base = _base_of(path)
    if base is None:
        return size_on_disk(path)
    sizes = [size_on_disk(base), size_on_disk(path, adapter=True)]
    return None if None in sizes else sum(sizes)


def _count_parameters(path: str, source: dict[str, Any]) -> int | None:
    """Parameters by the configuration alone; an adapter's are left out, as it can be merged."""
    try:
        config = AutoConfig.from_pretrained(_base_of(path) or path, **source)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config).num_parameters()
    except (OSError, ValueError):  # said once, when the model is loaded
        return None


class Reader:
    r"""
    Writes prompts and completions as token ids exactly as the trainers do, and reads them back.

    Args:
        model ([`~transformers.PreTrainedModel`], *optional*):
            The model, for the tokens that end its texts beside the tokenizer's EOS.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        chat (`bool`):
            Whether a prompt of text becomes the user's message.
    """

    def __init__(self, model: Any, tokenizer: Any, chat: bool):
        self.tokenizer, self.chat = tokenizer, chat
        self.eos_token_ids = [tokenizer.eos_token_id] if model is None else eos_token_ids(model, tokenizer)
        self.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._formatters: dict[bool, Any] = {}

    @cached_property
    def vocab_size(self) -> int:
        """Number of tokens that may be written: rows of a padded head beyond it stand for nothing that can be read."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def _format(self, row: EvalRow, values: Mapping[str, Any]) -> dict[str, Any]:
        """Ids of a prompt, and of what follows it."""
        prompt: Any = row.prompt
        if self.chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        is_conversation = isinstance(prompt, list)
        if is_conversation and "completion" in values:
            values = dict(values) | {"completion": [{"role": "assistant", "content": values["completion"]}]}
        example = {"prompt": prompt} | dict(values)
        if is_conversation not in self._formatters:
            self._formatters[is_conversation] = row_formatter(
                example, self.tokenizer, max_length=None, eos_token_ids=self.eos_token_ids, name="evaluation"
            )
        found = self._formatters[is_conversation](example)
        if found[DROPPED]:
            raise ValueError(f"Row {row.index} cannot be evaluated: {found[DROPPED]}. Mend the row, or leave it out.")
        return found

    def prompt(self, row: EvalRow) -> list[int]:
        """Ids of the prompt."""
        return self._format(row, {})["input_ids"]

    def answer(self, row: EvalRow, text: str, ended: bool = True) -> tuple[list[int], list[int]]:
        """Ids of the prompt and of a text that follows it, with an EOS if the text ended."""
        found = self._format(row, {"completion": text, "truncated": not ended})
        return found["input_ids"][: found["prompt_length"]], found["input_ids"][found["prompt_length"] :]

    def text(self, prompt_ids: list[int], completion_ids: list[int]) -> str:
        """Text of a completion."""
        return completion_text(self.tokenizer, prompt_ids, completion_ids)

    @cached_property
    def _bytes(self) -> list[bytes] | None:
        try:
            return TokenBytes(self.tokenizer, self.eos_token_ids).table
        except ValueError:  # not fast, or with a decoder of its own
            return None

    def pieces(self, completion_ids: Sequence[int]) -> list[str]:
        """What each token shows of the text; a character of several tokens counts for the last of them."""
        if self._bytes is None:
            return [self.tokenizer.decode([token]) for token in completion_ids]
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return [decoder.decode(self._bytes[token]) for token in completion_ids]

"""The files beside the weights, in a form that other programs and earlier releases of Transformers read too."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoTokenizer

from trl_kd.generation import eos_token_ids


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Vocabularies of SentencePiece, which some of llama.cpp's converters read in place of tokenizer.json
_SENTENCEPIECE = ("tokenizer.model", "spiece.model")
_SAMPLE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]


def plain_template(template: str) -> str:
    """
    A chat template without the marks of the trained text, `{% generation %}`: programs whose Jinja is not that of
    Transformers fail on them (llama-cpp-python, issue 2225). A condition that always holds trims spaces as they do.
    """
    template = re.sub(r"\{%([-+]?)\s*generation\s*([-+]?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}", r"{%\1 endif \2%}", template)


def write_model(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path, sources: list[Path]
) -> None:
    r"""
    Write a full model and all that goes with it.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, in the dtype to be written.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer. A chat template loses the marks of the trained text.
        folder (`Path`):
            Empty folder.
        sources (`list[Path]`):
            Folders that may have a vocabulary of SentencePiece and a model card, the first that has one is taken.
    """
    ids = eos_token_ids(model, tokenizer)
    model.generation_config.eos_token_id = ids[0] if len(ids) == 1 else ids
    model.save_pretrained(folder)
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = plain_template(tokenizer.chat_template)
    tokenizer.save_pretrained(folder)
    for name in _SENTENCEPIECE:
        found = next((source / name for source in sources if (source / name).is_file()), None)
        if found is not None and not (folder / name).exists():
            shutil.copyfile(found, folder / name)
    _write_card(folder, sources)
    rewrite(folder / "config.json", older_config, lambda: AutoConfig.from_pretrained(folder).to_dict())
    rewrite(folder / "tokenizer_config.json", older_tokenizer_config, lambda: _facts(folder))


def _write_card(folder: Path, sources: list[Path]) -> None:
    """The student's model card; it describes a full model now."""
    card = next((source / "README.md" for source in sources[:1] if (source / "README.md").is_file()), None)
    if card is not None:
        text = ModelCard.load(card, ignore_metadata_errors=True)
        text.data.library_name = "transformers"
        text.save(folder / "README.md")


def rewrite(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]], read: Callable[[], Any]) -> bool:
    """
    Change a JSON file, if it is still read as before; else leave it.

    Args:
        file (`Path`):
            The file.
        change (`Callable`):
            Gives the new content.
        read (`Callable`):
            What Transformers reads in it.

    Returns:
        `bool`: Whether the file has changed.
    """
    if not file.is_file():
        return False
    before, text = read(), file.read_text(encoding="utf-8")
    file.write_text(json.dumps(change(json.loads(text)), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        is_same = read() == before
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        is_same = False
    if not is_same:
        file.write_text(text, encoding="utf-8")
    return is_same


def older_config(config: dict[str, Any]) -> dict[str, Any]:
    """
    The configuration with the keys of Transformers 4 beside those of 5.

    Without `rope_theta` on the first level, Transformers 4 takes its default and says nothing: vLLM's pull request
    42624 shows a model that is served with 10000 in place of 500000.
    """
    config = dict(config)
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    rope = config.get("rope_parameters")
    # Several kinds of layers have parameters each, under other names in each family
    if rope and not any(isinstance(value, dict) for value in rope.values()):
        if "rope_theta" in rope:
            config.setdefault("rope_theta", rope["rope_theta"])
        if "partial_rotary_factor" in rope:
            config.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
        if rope.get("rope_type", "default") != "default":
            scaling = {key: rope[key] for key in rope if key not in ("rope_theta", "partial_rotary_factor")}
            config.setdefault("rope_scaling", scaling)
    return config


def older_tokenizer_config(config: dict[str, Any]) -> dict[str, Any]:
    """
    The tokenizer's configuration as Transformers 4 reads it too.

    It knows no class `TokenizersBackend`, and fails on a list of `extra_special_tokens` (mlx-lm, issue 661).
    """
    config = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("backend", "is_local", "local_files_only"):  # how it was read here
        config.pop(name, None)
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def _facts(folder: Path) -> tuple[Any, ...]:
    """What a tokenizer does."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(_SAMPLE, tokenize=False) if tokenizer.chat_template else None
    texts = [tokenizer(text)["input_ids"] for text in ("The fox, 3.14.", *tokenizer.all_special_tokens)]
    special = sorted(tokenizer.all_special_tokens), tokenizer.special_tokens_map
    return tokenizer.get_vocab(), special, tokenizer.model_max_length, tokenizer.padding_side, chat, texts

"""A student's weights as one full model: what is to be loaded, merged, and compared with what was trained."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from trl_kd import _compat


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trl_kd.scripts.export import ExportArguments


ADAPTER = "adapter_config.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja", "*.md")
_TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    'def add(a, b):\n    return a + b\n\nprint(add(2, 3))  # "5"',
    "Über die Brücke, 3,14 € und 東京: was kommt als Nächstes?",
)
# Rows of ids drawn over the whole vocabulary, and their length; a longer text is cut
_DRAWN, _DRAWN_LENGTH, _LONGEST = 4, 64, 128


@dataclass(frozen=True)
class Student:
    r"""
    Where a student's files are.

    Args:
        folder (`Path`):
            Folder of the adapter or of the full model.
        base (`Path`, *optional*):
            Folder of the model under the adapter; `None` for a full model.
    """

    folder: Path
    base: Path | None

    @property
    def model(self) -> Path:
        """Folder of the full weights."""
        return self.folder if self.base is None else self.base


def local_folder(name: str, option: str) -> Path:
    """The folder of a model that is given by its path or by its name on the Hub."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`{option}` is '{name}', which is no folder here, and as a name on the Hub it could not be had: {error}. "
            "Name an existing folder or repository, or fetch the files first with `hf download` where there is a "
            "network."
        ) from error


def find_student(args: "ExportArguments") -> Student:
    """The adapter and the model under it, or the full model."""
    folder = local_folder(args.model_name_or_path, "model_name_or_path")
    if (folder / ADAPTER).is_file():
        named = args.base_model_name_or_path or json.loads((folder / ADAPTER).read_text())["base_model_name_or_path"]
        if not named:
            raise ValueError(
                f"`{folder / ADAPTER}` names no model under the adapter, so there is nothing to merge it into. Pass "
                "`--base_model_name_or_path`."
            )
        base = local_folder(named, "base_model_name_or_path")
        if (base / ADAPTER).is_file() or not (base / "config.json").is_file():
            raise ValueError(
                f"The model under the adapter, `{base}`, is not a full model: it has "
                f"{'an adapter' if (base / ADAPTER).is_file() else 'no config.json'}. Export that one first, and pass "
                "the result by `--base_model_name_or_path`."
            )
        return Student(folder, base)
    if not (folder / "config.json").is_file():
        inside = sorted(path.name for path in folder.iterdir())[:8]
        raise ValueError(
            f"`model_name_or_path` is '{folder}', but it has neither `{ADAPTER}` nor `config.json`, so there is no "
            f"model in it. It has {', '.join(inside) or 'nothing'}. Name the folder that the training wrote, or a "
            "checkpoint in it."
        )
    if args.base_model_name_or_path is not None:
        raise ValueError(
            f"`base_model_name_or_path` is '{args.base_model_name_or_path}', but `{folder}` is a full model, not an "
            "adapter, so it has no other model under it. Leave the option out."
        )
    return Student(folder, None)


def quantisation(args: "ExportArguments", student: Student) -> BitsAndBytesConfig | None:
    """How the weights under the adapter were quantised while it was trained; `None` if they were not."""
    stored = AutoConfig.from_pretrained(student.model).to_dict().get("quantization_config")
    if stored is not None:
        if (method := stored.get("quant_method")) not in ("bitsandbytes", None):
            raise ValueError(
                f"The weights in `{student.model}` are stored in the format '{method}', which cannot be written back "
                "as plain weights here. Pass the unquantised model by `--base_model_name_or_path`."
            )
        return BitsAndBytesConfig.from_dict(stored)
    if args.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=args.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=args.use_bnb_nested_quant,
            bnb_4bit_compute_dtype=torch.float32,
        )
    if args.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    card = student.folder / "README.md"
    bits = re.search(r"load_in_(4|8)bit: True", card.read_text(encoding="utf-8")) if card.is_file() else None
    if bits is not None and student.base is not None and not args.merge_into_original:
        raise ValueError(
            f"The adapter in `{student.folder}` was trained on weights in {bits[1]} bits, as its README.md says. "
            f"Merged into the original weights of `{student.base}`, it makes another model than the one that was "
            f"trained. Pass `--load_in_{bits[1]}bit true` to merge into the weights that it was trained on, or "
            "`--merge_into_original true` if the original ones are meant."
        )
    return None


def load_plain(folder: Path, quantization: BitsAndBytesConfig | None = None) -> "PreTrainedModel":
    """A model in float32; quantised ones stay so."""
    device = PartialState().device
    options: dict[str, Any] = {} if quantization is None else {"quantization_config": quantization}
    if quantization is not None and device.type != "cpu":  # PEFT takes a map that names the CPU for an offloaded model
        options["device_map"] = {"": device}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ValueError(
            f"The model in `{folder}` could not be loaded: {error}. Give a folder with the `config.json` and the "
            "weights of a causal language model; for `--load_in_4bit` and `--load_in_8bit`, install the extra: "
            "`pip install trl_kd[quantization]`."
        ) from error
    _compat.keep_4bit_layout(model)
    _compat.keep_8bit_scales(model)
    return (model if quantization else model.to(device)).eval()


def with_adapter(base: "PreTrainedModel", folder: Path) -> Any:
    """The base under its adapter."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(base, folder).eval()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        told = " ".join(str(error).split())
        told = told if len(told) <= 400 else f"{told[:399]}…"  # it lists every matrix
        raise ValueError(
            f"The adapter in `{folder}` does not fit the model under it: {told}. Pass the model that it was trained "
            "on by `--base_model_name_or_path`."
        ) from error


def load_whole(folder: Path) -> "tuple[PreTrainedModel, dict[str, list[str]]]":
    """A model that was written, in float32, and the names that were missing, left over or of another shape."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model.to(PartialState().device).eval(), {
        name: sorted(map(str, keys)) for name, keys in info.items() if keys
    }


def load_student(student: Student, quantization: BitsAndBytesConfig | None, dequantise: bool = False) -> Any:
    """The student as it was trained; with `dequantise`, over plain weights of the same values."""
    model = load_plain(student.model, quantization)
    if dequantise and quantization is not None:
        model = _compat.dequantised(model)
    return model if student.base is None else with_adapter(model, student.folder)


def separate_tied_weights(model: torch.nn.Module) -> None:
    """
    Give every weight that is shared a copy of its own, so that what is merged into one of them stays there.

    An adapter on the embeddings alone changes what is read, not the head that is tied to them; merged in place, it
    would change both.
    """
    seen = set()
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) in seen:
            owner, _, attribute = name.rpartition(".")
            copy = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
            setattr(model.get_submodule(owner), attribute, copy)
        seen.add(id(parameter))


def merge(model: Any) -> "PreTrainedModel":
    """
    The full model; the student is used up.

    The head stays tied to the embeddings if both are still equal, and the configuration says so either way.
    """
    if not _compat.is_peft_model(model):
        return model
    was_tied = model.get_base_model().config.get_text_config().tie_word_embeddings
    separate_tied_weights(model)
    merged = model.merge_and_unload(safe_merge=True)
    if was_tied:
        head, embeddings = merged.get_output_embeddings().weight, merged.get_input_embeddings().weight
        is_tied = torch.equal(head, embeddings)
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = is_tied
        if is_tied:
            merged.tie_weights()
    return merged


def was_untied(student: Student, output: Path) -> bool:
    """Whether the written model has a head of its own where the original has that of the embeddings."""
    before, after = (AutoConfig.from_pretrained(path).get_text_config() for path in (student.model, output))
    return before.tie_word_embeddings and not after.tie_word_embeddings


def cast(model: "PreTrainedModel", dtype: str) -> None:
    """Give the weights another dtype. Buffers keep theirs: angles of positions are not saved, but would be rounded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])


def load_tokenizer(student: Student) -> "PreTrainedTokenizerBase":
    """The tokenizer beside the student, or beside the model under it."""
    for folder in dict.fromkeys((student.folder, student.model)):
        try:
            return AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = error
    places = " or ".join(f"`{folder}`" for folder in dict.fromkeys((student.folder, student.model)))
    raise ValueError(
        f"There is no tokenizer in {places}: {reason}. Without one, neither llama.cpp nor vLLM can serve the model. "
        "Save the tokenizer into the folder."
    )


def adapter_config(student: Student) -> dict[str, Any]:
    """What the adapter's file says; empty for a full model."""
    return {} if student.base is None else json.loads((student.folder / ADAPTER).read_text())


def trained_tokens(student: Student) -> list[int]:
    """Ids of the tokens that an adapter trains by name."""
    indices = adapter_config(student).get("trainable_token_indices") or []
    return sorted({i for part in (indices.values() if isinstance(indices, dict) else [indices]) for i in part})


def probes(student: Student, tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[torch.Tensor]:
    """
    What the models are compared on: texts, ids drawn over the whole vocabulary, special and trained tokens.

    Args:
        student ([`Student`]):
            Where the files are.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the student.
        texts (`Sequence[str]`):
            Texts beside those that are always read.

    Returns:
        `list[torch.Tensor]`: Ids of shape `(1, S)`.
    """
    rows = AutoConfig.from_pretrained(student.model).get_text_config().vocab_size
    written = [tokenizer(text)["input_ids"][:_LONGEST] for text in (*_TEXTS, *texts)]
    drawn = torch.randint(0, rows, (_DRAWN, _DRAWN_LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    special = [i for i in dict.fromkeys([*trained_tokens(student), *tokenizer.all_special_ids]) if i < rows][:_LONGEST]
    return [torch.tensor([ids]) for ids in (*written, *drawn, special) if ids]


@torch.no_grad()
def logits_of(model: Any, ids: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of each row, in float32 and in host memory."""
    device = model.get_input_embeddings().weight.device
    return [model(input_ids=row.to(device), use_cache=False).logits[0].float().cpu() for row in ids]


@dataclass(frozen=True)
class Difference:
    r"""
    How far two models' logits are apart.

    Args:
        largest (`float`):
            Largest difference of a logit.
        relative (`float`):
            The same as a share of the largest logit.
        same_top1 (`float`):
            Share of positions with the same likeliest token.
    """

    largest: float
    relative: float
    same_top1: float

    @classmethod
    def of(cls, expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> "Difference":
        """Distance of what was found from what was expected."""
        expected, found = torch.cat(list(expected)), torch.cat(list(found))
        largest = (expected - found).abs().max().item()
        same = (expected.argmax(dim=-1) == found.argmax(dim=-1)).float().mean().item()
        return cls(largest, largest / max(expected.abs().max().item(), 1e-12), same)


def reference(
    student: Student, quantization: BitsAndBytesConfig | None, ids: Sequence[torch.Tensor]
) -> tuple[Any, list[torch.Tensor], Difference | None]:
    """
    What is to be merged: the student over plain weights, the logits that it must keep, and how far those are from the
    logits in training where no full model has the same.

    Weights in 4 bits compute as the same weights written out do. In 8 bits, bitsandbytes rounds the activations too.
    """
    model = load_student(student, quantization)
    trained = logits_of(model, ids)
    if quantization is None:
        return model, trained, None
    model = load_student(student, quantization, dequantise=True)
    if quantization.load_in_4bit:
        return model, trained, None
    expected = logits_of(model, ids)
    return model, expected, Difference.of(trained, expected)

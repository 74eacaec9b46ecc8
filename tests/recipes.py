"""The files of `examples/configs/`: what they plan, and tiny models of the same architecture to run them with."""

import re
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from trl_kd.checks.architectures import config_of
from trl_kd.checks.memory import MemoryPlan, plan_memory
from trl_kd.scripts.check import planned_run
from trl_kd.scripts.training import make_parser


FOLDER = Path(__file__).parents[1] / "examples" / "configs"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
RECIPES = [name for name in FILES if re.search(r"_\d+gb$", name)]

# Layers that show every kind that a model has: a full attention among sliding ones, one without positions among others
_LAYERS = {"gemma3_text": 6, "smollm3": 4}
_LISTS = ("layer_types", "no_rope_layers")
_SHOWN = 0.05
_PLANNED = "# Planned by `trl-kd check`, not measured on a GPU: "


def method_of(name: str) -> str:
    return next(method for method in ("sparse-td", "dskd", "amm") if name.startswith(method.replace("-", "_")))


@cache
def options(name: str) -> tuple:
    """What the command's parser makes of a file: options of the script, the method, the models, the data."""
    return tuple(make_parser(method_of(name)).parse_args_and_config(["--config", str(FILES[name])]))


def card_of(name: str) -> int:
    """Bytes of the card in a recipe's name."""
    return int(re.search(r"_(\d+)gb$", name)[1]) * 2**30


@cache
def plan(name: str) -> MemoryPlan:
    script_args, training_args, model_args, _ = options(name)
    return plan_memory(planned_run(method_of(name), script_args, training_args, model_args))


def planned_lines(name: str) -> str:
    """What the head of a recipe says of its memory."""
    sizes = {component: size / 2**30 for component, size in plan(name).components.items()}
    shown = {component: size for component, size in sizes.items() if size >= _SHOWN}
    parts = [f"{component} {size:.1f}" for component, size in shown.items()]
    if (rest := sum(sizes.values()) - sum(shown.values())) >= _SHOWN:
        parts.append(f"other {rest:.1f}")
    text = f"{_PLANNED}{plan(name).peak / 2**30:.1f} GiB at the peak: {', '.join(parts)}."
    return textwrap.fill(text, 119, subsequent_indent="# ", break_on_hyphens=False)


def stated_peak(name: str) -> float:
    """GiB that the head of a recipe names."""
    return float(re.search(re.escape(_PLANNED) + r"([\d.]+) GiB", FILES[name].read_text())[1])


def shrunk(config: PreTrainedConfig, **changes: Any) -> PreTrainedConfig:
    """A configuration of the same kind that is small enough for a test, with every feature that the large one has."""
    text, whole = config.get_text_config(), config.to_dict()
    fields = text.to_dict()
    layers = _LAYERS.get(text.model_type, 2)
    groups = text.num_attention_heads // text.num_key_value_heads
    heads = 4 if groups > 1 else 2
    fields |= {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": {1: heads, heads: 1}.get(groups, 2),
        "max_position_embeddings": 512,
    }
    fields |= {name: fields[name][:layers] for name in _LISTS if fields.get(name)}
    if fields.get("head_dim"):
        # Apart from the hidden size, where it is so in the large one
        is_usual = text.head_dim * text.num_attention_heads == text.hidden_size
        fields["head_dim"] = 64 // heads * (1 if is_usual else 2)
    if fields.get("sliding_window"):
        fields["sliding_window"] = 8
    fields |= changes
    if config is text:
        return type(config).from_dict(fields)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole["vision_config"] |= vision | {"image_size": 28}
    special = {name: value for name, value in changes.items() if name.endswith("_token_id")}
    return type(config).from_dict(whole | {"text_config": fields, "mm_tokens_per_image": 4} | special)


def save_stand_in(name: str, folder: Path, tokenizer: Any, rows: int, seed: int) -> str:
    """A tiny model for one of this name, with random weights, in bfloat16 as the large one; returns its folder."""
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = shrunk(config_of(name), vocab_size=rows, dtype="bfloat16", **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_planned_lines() -> None:
    """Put what is planned now into the heads of the recipes: `python -m tests.recipes`."""
    for name in RECIPES:
        text = FILES[name].read_text()
        found = re.search(re.escape(_PLANNED) + r".*?\.(?=\n#\n)|# PLAN(?=\n)", text, flags=re.DOTALL)
        FILES[name].write_text(text[: found.start()] + planned_lines(name) + text[found.end() :])


if __name__ == "__main__":
    write_planned_lines()

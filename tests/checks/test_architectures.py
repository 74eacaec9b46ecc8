import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from trl_kd.checks.architectures import config_of, known_models, table


MODELS = table()["models"]
EXPECTED = [
    *(f"Qwen/Qwen3-{size}{kind}" for size in ("0.6B", "1.7B", "4B", "8B") for kind in ("", "-Base")),
    *(f"Qwen/Qwen2.5-{size}-Instruct" for size in ("0.5B", "1.5B", "7B")),
    *("meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
    *("HuggingFaceTB/SmolLM2-360M-Instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct", "HuggingFaceTB/SmolLM3-3B"),
    *(f"google/gemma-3-{size}-it" for size in ("270m", "1b", "4b", "12b")),
]


@pytest.mark.parametrize("name", EXPECTED)
def test_known_models_have_the_names_that_people_use(name):
    assert name in known_models()


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["names"][0])
def test_table_entry_names_its_sources(model):
    source, _, entry = model["read_from"].partition(", ")
    assert re.fullmatch(r"https://github\.com/\S+/blob/[0-9a-f]{40}/\S+", table()["sources"][source]) and entry
    assert model["counted_by"] in table()["sources"] or model["counted_by"] == "the name, rounded"


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["names"][0])
def test_table_entry_builds_a_model_with_as_many_parameters_as_published(model):
    """A wrong width, depth, head or tie shows here; nothing has weights on the meta device."""
    config = config_of(model["names"][0])
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    count = sum(parameter.numel() for parameter in built.parameters())
    assert count == pytest.approx(model["parameters"], rel=model.get("within", 0), abs=0)
    assert built.get_output_embeddings().out_features == config.get_text_config().vocab_size
    # A field that the class does not know would be kept, and ignored
    text = config.get_text_config()
    fields = model["config"].get("text_config", model["config"])
    assert fields.keys() - {"sliding_window_pattern"} <= type(text)().to_dict().keys()
    kept = {name: value for name, value in fields.items() if name not in ("sliding_window_pattern", "dtype")}
    assert kept.items() <= text.to_dict().items()


@pytest.mark.parametrize("name", ["google/gemma-3-270m", "google/gemma-3-12b-it"])
def test_config_of_gemma_has_one_full_layer_in_six(name):
    config = config_of(name).get_text_config()
    kinds = [kind == "full_attention" for kind in config.layer_types]
    assert kinds == [(layer + 1) % 6 == 0 for layer in range(config.num_hidden_layers)]
    assert config.sliding_window == {18: 512, 48: 1024}[config.num_hidden_layers]


def test_config_of_smollm3_has_one_layer_without_positions_in_four():
    assert config_of("HuggingFaceTB/SmolLM3-3B").no_rope_layers == [1, 1, 1, 0] * 9


def test_config_of_gives_every_caller_its_own():
    first = config_of("Qwen/Qwen3-0.6B")
    assert first.name_or_path == "Qwen/Qwen3-0.6B" and first.dtype == torch.bfloat16
    first.hidden_size = 1
    first.rope_parameters["rope_theta"] = 1.0
    second = config_of("Qwen/Qwen3-0.6B")
    assert (second.hidden_size, second.rope_parameters["rope_theta"]) == (1024, 1e6)


def test_config_of_folder_wins_over_the_table(tmp_path, monkeypatch):
    folder = tmp_path / "Qwen" / "Qwen3-0.6B"
    LlamaConfig(hidden_size=64).save_pretrained(folder)
    assert config_of(str(folder)).hidden_size == 64
    monkeypatch.chdir(tmp_path)
    assert config_of("Qwen/Qwen3-0.6B").hidden_size == 64


def test_config_of_unknown_name_says_what_is_known():
    with pytest.raises(ValueError) as error:
        config_of("somebody/else")
    message = str(error.value)
    assert "`somebody/else` cannot be loaded" in message and "nothing is known of the model" in message
    assert "Qwen/Qwen3-0.6B, " in message and "`config.json`" in message


@pytest.mark.parametrize("content", [None, json.dumps({"hidden_size": 3})])
def test_config_of_folder_without_configuration_is_refused(tmp_path, content):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(f"`{tmp_path}`")):
        config_of(str(tmp_path))

"""Every field is documented three times in agreement, and works on the command line and in YAML."""

import argparse
import dataclasses
import inspect
import itertools
import re

import pytest
import yaml
from trl import SFTConfig, TrlParser

from trl_kd import AMMConfig, DSKDConfig, KDConfig, SparseTDConfig
from trl_kd.scripts.check import CheckArguments
from trl_kd.scripts.eval import EvalArguments
from trl_kd.scripts.export import ExportArguments
from trl_kd.scripts.generate import GenerateArguments


CONFIGS = [
    KDConfig,
    AMMConfig,
    DSKDConfig,
    SparseTDConfig,
    GenerateArguments,
    EvalArguments,
    ExportArguments,
    CheckArguments,
]

# field -> (text on the command line, value that is meant). A new field needs a line here.
EXAMPLES = {
    "teacher_model_name_or_path": ("some/teacher", "some/teacher"),
    "teacher_model_init_kwargs": ('{"dtype": "bfloat16"}', {"dtype": "bfloat16"}),
    "teacher_device": ("offload", "offload"),
    "teacher_adapter": ("base", "base"),
    "teacher_models": ("one two", ["one", "two"]),
    "teacher_weights": ("1.0 3.0", [1.0, 3.0]),
    "teacher_column": ("source", "source"),
    "teacher_system_prompt": ("Answer in one word.", "Answer in one word."),
    "teacher_cache": ("teacher cache", "teacher cache"),
    "eval_teacher_cache": ("other cache", "other cache"),
    "lmbda": ("0.25", 0.25),
    "on_policy_weight": ("0.75", 0.75),
    "off_policy_source": ("teacher", "teacher"),
    "max_completion_length": ("7", 7),
    "temperature": ("0.9", 0.9),
    "top_p": ("0.95", 0.95),
    "top_k": ("5", 5),
    "min_p": ("0.01", 0.01),
    "repetition_penalty": ("1.1", 1.1),
    "rollout_batch_size": ("4", 4),
    "generation_kwargs": ('{"typical_p": 0.9}', {"typical_p": 0.9}),
    "use_vllm": ("true", True),
    "vllm_mode": ("server", "server"),
    "vllm_model_impl": ("transformers", "transformers"),
    "vllm_enable_sleep_mode": ("true", True),
    "vllm_server_base_url": ("http://localhost:8001", "http://localhost:8001"),
    "vllm_server_host": ("localhost", "localhost"),
    "vllm_server_port": ("8001", 8001),
    "vllm_server_timeout": ("60.0", 60.0),
    "vllm_group_port": ("51217", 51217),
    "vllm_gpu_memory_utilization": ("0.5", 0.5),
    "vllm_max_model_length": ("2048", 2048),
    "vllm_tensor_parallel_size": ("2", 2),
    "loss_chunk_size": ("64", 64),
    "aux_learning_rate": ("3e-4", 3e-4),
    "aux_adam_beta1": ("0.0", 0.0),
    "aux_adam_beta2": ("0.95", 0.95),
    "aux_weight_decay": ("0.01", 0.01),
    "aux_max_grad_norm": ("0.5", 0.5),
    "aux_lr_scheduler_type": ("linear", "linear"),
    "aux_warmup_steps": ("3", 3),
    "log_completions": ("true", True),
    "num_completions_to_print": ("2", 2),
    "critic": ("exact_penalised", "exact_penalised"),
    "gamma": ("0.9", 0.9),
    "critic_head": ("full", "full"),
    "critic_rank": ("16", 16),
    "critic_features": ("student", "student"),
    "critic_order": ("after", "after"),
    "critic_steps": ("3", 3),
    "critic_learning_rate": ("0.03", 0.03),
    "critic_betas": ("0.5 0.99", [0.5, 0.99]),
    "critic_bound": ("2.0", 2.0),
    "critic_penalty": ("0.0", 0.0),
    "on_policy_gradient": ("full", "full"),
    "later_weight": ("0.3", 0.3),
    "later_gamma": ("0.95", 0.95),
    "later_cost": ("jsd", "jsd"),
    "later_baseline": ("value", "value"),
    "later_warmup_steps": ("0", 0),
    "sft_loss_weight": ("0.1", 0.1),
    "kl_loss_weight": ("0.5", 0.5),
    "alignment": ("eta", "eta"),
    "eta_pairs": ("context", "context"),
    "min_coverage": ("0.2", 0.2),
    "teacher_max_length": ("512", 512),
    "objective": ("simple", "simple"),
    "preset": ("v1", "v1"),
    "kd_rate": ("0.7", 0.7),
    "divergence": ("reverse_kl", "reverse_kl"),
    "kd_temperature": ("1.0", 1.0),
    "teacher_temperature": ("2.0", 2.0),
    "skew": ("0.2", 0.2),
    "adaptive_head": ("0.7", 0.7),
    "student_space": ("false", False),
    "teacher_space": ("false", False),
    "teacher_space_divergence": ("jsd", "jsd"),
    "teacher_space_denominator": ("teacher", "teacher"),
    "projector_label": ("gold", "gold"),
    "gate": ("none", "none"),
    "gate_normalization": ("tokens", "tokens"),
    "projector_init": ("random", "random"),
    "projector_bias": ("true", True),
    "student_to_teacher": ("learned", "learned"),
    "init_vocab_size": ("20000", 20000),
    "cma_norm_scope": ("padded", "padded"),
    "projector_hidden_size": ("64", 64),
    "projector_pretraining_steps": ("10", 10),
    "objectives": ('{"inverse_soft_q": 0.5, "sqil": 1.0}', {"inverse_soft_q": 0.5, "sqil": 1.0}),
    "tail_weight": ("0.5", 0.5),
    "action_set": ("min_p", "min_p"),
    "action_top_p": ("0.9", 0.9),
    "action_top_k": ("20", 20),
    "action_min_p": ("0.2", 0.2),
    "action_threshold": ("0.05", 0.05),
    "max_actions": ("64", 64),
    "label_outside": ("union", "union"),
    "chi2_alpha": ("0.5", 0.5),
    "chi2_center": ("teacher", "teacher"),
    "gauge": ("logsoftmax", "logsoftmax"),
    "q_min": ("-20.0", -20.0),
    "backup": ("hard", "hard"),
    "entropy_weight": ("0.5", 0.5),
    "returns": ("lambda", "lambda"),
    "n_steps": ("8", 8),
    "td_lambda": ("0.5", 0.5),
    "detach_next": ("true", True),
    "target_ema": ("0.99", 0.99),
    "truncation": ("bootstrap", "bootstrap"),
    "train_eos": ("false", False),
    "lm_weight": ("0.5", 0.5),
    "kd_ratio": ("0.25", 0.25),
    "margin": ("0.8", 0.8),
    "dataset_name": ("prompts.jsonl", "prompts.jsonl"),
    "dataset_config": ("main", "main"),
    "dataset_split": ("test", "test"),
    "output_file": ("out.parquet", "out.parquet"),
    "batch_size": ("3", 3),
    "seed": ("7", 7),
    "num_completions": ("4", 4),
    "teacher": ("big=some/teacher", "big=some/teacher"),
    "before": ("some/student", "some/student"),
    "students": ("one two=2", ["one", "two=2"]),
    "template": ("story", "story"),
    "num_prompts": ("50", 50),
    "metrics": ("rouge_l nll", ["rouge_l", "nll"]),
    "seeds": ("10 20", [10, 20]),
    "chat": ("true", True),
    "model_init_kwargs": ('{"dtype": "bfloat16"}', {"dtype": "bfloat16"}),
    "run_name": ("first try", "first try"),
    "store": ("results/all.sqlite", "results/all.sqlite"),
    "cost": ("true", True),
    "price_per_hour": ("1.5", 1.5),
    "harness_tasks": ("arc_easy piqa", ["arc_easy", "piqa"]),
    "harness_limit": ("20", 20),
    "judge_url": ("http://localhost:8001/v1", "http://localhost:8001/v1"),
    "judge_model": ("judge", "judge"),
    "history": ("true", True),
    "against": ("3", "3"),
    "fail_if": ("template nll>0.02", ["template", "nll>0.02"]),
    "report": ("report.html", "report.html"),
    "model_card": ("true", True),
    "model_name_or_path": ("some/student", "some/student"),
    "output_dir": ("full model", "full model"),
    "base_model_name_or_path": ("some/base", "some/base"),
    "dtype": ("bfloat16", "bfloat16"),
    "load_in_4bit": ("true", True),
    "load_in_8bit": ("true", True),
    "bnb_4bit_quant_type": ("fp4", "fp4"),
    "use_bnb_nested_quant": ("true", True),
    "merge_into_original": ("true", True),
    "texts": ("one two", ["one", "two"]),
    "max_difference": ("0.01", 0.01),
    "push_to_hub": ("true", True),
    "hub_model_id": ("me/student", "me/student"),
    "hub_private_repo": ("true", True),
    "samples": ("16", 16),
    "plan_only": ("true", True),
    "device_memory": ("12.0", 12.0),
    "json": ("true", True),
    "markdown": ("true", True),
}

# Where two configurations have different fields of one name
OWN_EXAMPLES = {(SparseTDConfig, "preset"): ("paper", "paper")}

TYPE_NAMES = {"str", "int", "float", "bool", "dict", "list"}


def default_of(field: dataclasses.Field):
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def example_of(config: type, name: str) -> tuple[str, object]:
    """Text of a field on the command line, and the value that is meant."""
    return OWN_EXAMPLES.get((config, name), EXAMPLES[name])


def own_fields(config: type) -> list[dataclasses.Field]:
    """Fields that the class itself declares, new or with another default than its parent's."""
    declared = inspect.get_annotations(config)
    return [field for field in dataclasses.fields(config) if field.name in declared]


CASES = [
    pytest.param(config, field, id=f"{config.__name__}-{field.name}")
    for config in CONFIGS
    for field in own_fields(config)
]


def docstring_entry(config: type, name: str) -> tuple[str, str | None, str]:
    """Type, default (`None` where none is stated) and text of a field in the docstring of its class."""
    docstring = inspect.cleandoc(config.__doc__)
    lines = docstring.splitlines()
    pattern = re.compile(rf"( *){name} \(`([^`]+)`(?:, \*optional\*)?(?:, defaults to `([^`]+)`)?\):")
    for number, line in enumerate(lines):
        match = pattern.fullmatch(line)
        if match is None:
            continue
        indent = " " * (len(match[1]) + 4)
        text = itertools.takewhile(lambda follower, indent=indent: follower.startswith(indent), lines[number + 1 :])
        return match[2], match[3], " ".join(part.strip() for part in text)
    # As in TRL, a field that only gets another default is named in the note; its parent describes it.
    changed = re.search(rf"- `{name}`: Defaults to `([^`]+)`", docstring)
    if changed is not None:
        type_name, _, text = docstring_entry(config.__mro__[1], name)
        return type_name, changed[1], text
    raise AssertionError(f"The docstring of {config.__name__} has no entry of the form `{name} (`type`, ...):`")


def type_names(annotation: object) -> set[str]:
    """`dict[str, Any] | str | None` -> {"dict", "str"}"""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return set(re.findall(r"\w+", re.sub(r"\[[^]]*\]", "", text))) & TYPE_NAMES


def plain(text: str) -> str:
    """Words of a text, without the markup, links and quotes in which a docstring differs from a terminal."""
    text = re.sub(r"\[`~?([\w.]+)`\]", r"\1", text)
    text = re.sub(r"\b(?:transformers|datasets|trl|peft)\.(?=[A-Z])", "", text)
    return re.sub(r"[`'\"\s]+", " ", text).replace(" .", ".").replace(" ,", ",").strip().casefold()


@pytest.mark.parametrize(("config", "field"), CASES)
def test_config_field_docstring_names_type_and_default(config, field):
    type_name, default, _ = docstring_entry(config, field.name)
    # Not `field.type`, which the parser narrows to what argparse can read
    annotation = inspect.get_annotations(config)[field.name]
    assert type_names(type_name) and type_names(type_name) <= type_names(annotation)
    if default is None:
        assert default_of(field) is None
    else:
        value = default_of(field)
        assert yaml.safe_load(default.replace('"', "")) == value
        assert default == (f'"{value}"' if isinstance(value, str) else repr(value))


@pytest.mark.parametrize(("config", "field"), CASES)
def test_config_field_help_says_what_the_docstring_says(config, field):
    _, _, text = docstring_entry(config, field.name)
    shown = field.metadata["help"] % {}  # a lone % fails here, as it does in argparse
    assert plain(shown).rstrip(".") == plain(text).rstrip(".")


@pytest.mark.parametrize(("config", "field"), CASES)
def test_config_field_has_an_example_that_differs_from_the_default(config, field):
    assert example_of(config, field.name)[1] != default_of(field)


def parse(config: type, arguments: list[str]):
    return TrlParser(config).parse_args_and_config(arguments)[0]


def base_arguments(config: type, tmp_path) -> list[str]:
    return ["--output_dir", str(tmp_path)] if issubclass(config, SFTConfig) else []


@pytest.mark.parametrize(("config", "field"), CASES)
def test_config_field_is_read_from_the_command_line(config, field, tmp_path):
    text, value = example_of(config, field.name)
    parsed = parse(
        config,
        [*base_arguments(config, tmp_path), f"--{field.name}", *(text.split() if isinstance(value, list) else [text])],
    )
    assert getattr(parsed, field.name) == value
    assert type(getattr(parsed, field.name)) is type(value)


@pytest.mark.parametrize("config", CONFIGS)
def test_config_fields_are_read_from_yaml(config, tmp_path):
    values = {field.name: example_of(config, field.name)[1] for field in own_fields(config)}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    parsed = parse(config, [*base_arguments(config, tmp_path), "--config", str(file)])
    assert {name: getattr(parsed, name) for name in values} == values


@pytest.mark.parametrize("config", [config for config in CONFIGS if "temperature" in config.__dataclass_fields__])
def test_config_command_line_wins_over_yaml(config, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("temperature: 0.5\ntop_p: 0.3\n")
    parsed = parse(config, [*base_arguments(config, tmp_path), "--config", str(file), "--temperature", "0.7"])
    assert (parsed.temperature, parsed.top_p) == (0.7, 0.3)


@pytest.mark.parametrize("config", CONFIGS)
def test_config_defaults_survive_the_command_line(config, tmp_path):
    parsed = parse(config, base_arguments(config, tmp_path))
    for field in own_fields(config):
        assert getattr(parsed, field.name) == default_of(field), field.name


@pytest.mark.parametrize("config", CONFIGS)
def test_config_help_shows_every_field(config):
    parser = TrlParser(config)
    shown = parser.format_help()
    for field in own_fields(config):
        assert f"--{field.name}" in shown
    assert not any(action.help is argparse.SUPPRESS for action in parser._actions)


@pytest.mark.parametrize("config", [KDConfig, AMMConfig, DSKDConfig, SparseTDConfig])
def test_config_docstring_note_names_changed_defaults(config):
    """A field that the parent has too, with another default, is named in the note."""
    parent = config.__mro__[1]
    inherited = {field.name: field.default for field in dataclasses.fields(parent)}
    note = config.__doc__.partition("[!NOTE]")[2]
    for field in own_fields(config):
        if field.name in inherited and inherited[field.name] != field.default:
            assert f"`{field.name}`" in note


@pytest.mark.parametrize("config", [KDConfig, AMMConfig, DSKDConfig, SparseTDConfig])
def test_config_docstring_has_no_entry_without_a_field(config):
    names = re.findall(r"^ +(\w+) \(`", config.__doc__, flags=re.MULTILINE)
    assert names and set(names) <= {field.name for field in dataclasses.fields(config)}
    assert len(names) == len(set(names))

"""Each file of `examples/configs/` parses, its plan fits its card, and it runs on tiny models of its architectures."""

import json
import shlex

import pytest
import torch

import trl_kd
from tests.recipes import FILES, RECIPES, card_of, method_of, options, plan, save_stand_in, stated_peak
from tests.tiny import make_tokenizer
from trl_kd._compat import is_quantised
from trl_kd.checks.architectures import config_of
from trl_kd.cli import COMMANDS, main
from trl_kd.scripts.training import METHODS


OTHER_TEXT = "zebra quartz jumbo vexing pyjamas wok fjord glyph nymph " * 20


def commands_in(name: str) -> list[list[str]]:
    """The commands that the head of a file shows, word by word."""
    head = FILES[name].read_text().partition("\n# Models")[0]
    text = "\n".join(line.removeprefix("#").strip() for line in head.splitlines() if line.startswith("#     "))
    return [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()]


# Parsing


@pytest.mark.parametrize("name", FILES)
def test_recipe_shows_its_own_command(name):
    commands = commands_in(name)
    assert ["trl-kd", method_of(name), "--config", f"examples/configs/{name}.yaml"] in commands
    assert {words[0] for words in commands} == {"trl-kd"} and {words[1] for words in commands} <= {*COMMANDS, "check"}


@pytest.mark.parametrize("name", FILES)
def test_recipe_parses_and_trains_an_adapter_on_16_rows_to_a_step(name):
    _, training_args, model_args, _ = options(name)
    assert model_args.use_peft and model_args.lora_target_modules == "all-linear"
    assert training_args.gradient_checkpointing and training_args.learning_rate == 1e-4
    rows = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    assert rows == 16 and "16 rows to a step" in FILES[name].read_text()
    # AMM needs both sources; the other two are off-policy as published
    assert training_args.lmbda == (0.5 if method_of(name) == "amm" else 0.0)


def test_recipes_cover_cards_trainers_families_and_sources():
    assert {card_of(name) // 2**30 for name in RECIPES} == {8, 12, 16, 24}
    assert {method_of(name) for name in RECIPES} == set(METHODS)
    families = {config_of(options(name)[2].model_name_or_path).model_type for name in RECIPES}
    assert families >= {"qwen3", "llama", "smollm3", "gemma3_text"}
    settings = [vars(options(name)[1]) for name in RECIPES]
    assert [one["teacher_adapter"] for one in settings].count("base") == 1
    assert sum(one["teacher_cache"] is not None for one in settings) == 1
    assert sum(bool((one["teacher_model_init_kwargs"] or {}).get("load_in_4bit")) for one in settings) >= 3
    assert sum(options(name)[2].load_in_4bit for name in RECIPES) >= 3
    assert {str(one["optim"]) for one in settings} == {"OptimizerNames.PAGED_ADAMW_8BIT"}


# Fitting


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_plan_fits_its_card(name):
    assert plan(name).peak <= 0.9 * card_of(name)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_head_states_what_is_planned(name):
    """`python -m tests.recipes` writes it anew."""
    assert stated_peak(name) == pytest.approx(plan(name).peak / 2**30, rel=0.05, abs=0.06)


# Running


@pytest.fixture(scope="module")
def tokenizers():
    return make_tokenizer(), make_tokenizer(seed_text=OTHER_TEXT)


@pytest.fixture
def trainers(monkeypatch):
    """The trainers that commands make, to look at when they are done."""
    made = []
    for _, trainer_class, _ in METHODS.values():

        class Kept(getattr(trl_kd, trainer_class)):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                made.append(self)

        monkeypatch.setattr(trl_kd, trainer_class, Kept)
    return made


def stand_ins(name, folder, tokenizers):
    """Folders of tiny models for those that a file names: student, and teacher or `None`."""
    script_args, training_args, model_args, _ = options(name)
    student, teacher = model_args.model_name_or_path, training_args.teacher_model_name_or_path
    is_across = method_of(name) == "dskd"
    own, theirs = tokenizers[is_across], tokenizers[0]
    rows = len(own) + 4  # heads are padded
    if config_of(student).model_type == "gemma3_text":
        # Its tokenizer counts one token more than it has rows: huggingface/transformers#37011
        own = theirs = make_tokenizer()
        rows = len(own)
        own.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    folders = [save_stand_in(student, folder / "student", own, rows, seed=1)]
    if teacher is None:
        return *folders, None
    sizes = [config_of(model).get_text_config().vocab_size for model in (student, teacher)]
    rows = len(theirs) + 4 if is_across or sizes[0] == sizes[1] else rows + 8
    return *folders, save_stand_in(teacher, folder / "teacher", theirs, rows, seed=2)


def write_data(name, folder):
    """Rows of the kind that the dataset of a file has."""
    prompts = [f"What is the colour of the {thing}{'?' * (1 + i % 3)}" for i, thing in enumerate(["sky", "fox"] * 8)]
    rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts]
    if options(name)[0].dataset_name == "trl-lib/Capybara":
        answer = {"role": "assistant", "content": "The sky is blue. The fox is red."}
        rows = [{"messages": [*row["prompt"], answer]} for row in rows]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def overrides(name, folder, student, teacher, data):
    """What a tiny run on a CPU needs otherwise."""
    given = {
        **{"model_name_or_path": student, "dataset_name": data, "output_dir": folder / "out", "max_length": 96},
        **{"max_steps": 2, "use_cpu": True, "logging_steps": 1, "save_steps": 2, "warmup_steps": 0},
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "disable_tqdm": True},
        # bitsandbytes has these optimizers for GPUs alone
        "optim": "adamw_torch",
    }
    if teacher is not None:
        given["teacher_model_name_or_path"] = teacher
    method = method_of(name)
    if method == "amm":
        given |= {"max_completion_length": 6, "rollout_batch_size": 2, "log_completions": False}
    if method == "dskd":
        given |= {"projector_pretraining_steps": 2}
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def fill_cache(name, folder, tokenizers, student, data):
    """The head's own command, on a tiny teacher; returns the folder of the cache."""
    words = next(words for words in commands_in(name) if words[1] == "cache")[1:]
    large = words[words.index("--teacher_model_name_or_path") + 1]
    teacher = save_stand_in(large, folder / "teacher", tokenizers[0], len(tokenizers[0]) + 4, seed=2)
    cache = str(folder / "cache")
    tiny = {"teacher_model_name_or_path": teacher, "model_name_or_path": student, "dataset_name": data}
    tiny |= {"max_length": "96", "output_dir": cache}
    for key, value in tiny.items():
        words[words.index(f"--{key}") + 1] = value
    assert main(words) == 0
    return cache


@pytest.mark.parametrize("name", FILES)
def test_recipe_takes_two_steps_on_tiny_models_of_its_architectures(name, tmp_path, tokenizers, trainers):
    student, teacher = stand_ins(name, tmp_path, tokenizers)
    data = write_data(name, tmp_path)
    words = overrides(name, tmp_path, student, teacher, data)
    if options(name)[1].teacher_cache is not None:
        words += ["--teacher_cache", fill_cache(name, tmp_path, tokenizers, student, data)]
    assert main([method_of(name), "--config", str(FILES[name]), *words]) == 0

    (trainer,) = trainers
    assert trainer.state.global_step == 2
    check_models(name, trainer)
    check_log(name, [entry for entry in trainer.state.log_history if "loss" in entry])
    trained = [weight for key, weight in trainer.model.named_parameters() if "lora_B" in key]
    assert trained and all(weight.abs().max() > 0 for weight in trained)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def check_models(name, trainer):
    """Student and teacher are of the kinds that the file asks for, in as many bits."""
    _, training_args, model_args, _ = options(name)
    large = config_of(model_args.model_name_or_path)
    base = trainer.model.get_base_model()
    assert base.config.model_type == large.model_type
    assert base.config.tie_word_embeddings == large.tie_word_embeddings
    assert is_quantised(base) == model_args.load_in_4bit
    assert base.get_input_embeddings().weight.dtype == torch.bfloat16
    assert {config.r for config in trainer.model.peft_config.values()} == {32}
    adapter = {weight.dtype for key, weight in trainer.model.named_parameters() if "lora_" in key}
    assert adapter == {torch.bfloat16 if model_args.load_in_4bit else torch.float32}
    if training_args.teacher_model_name_or_path is not None:
        held = trainer.teacher.model
        assert held.config.model_type == config_of(training_args.teacher_model_name_or_path).model_type
        asked = training_args.teacher_model_init_kwargs or {}
        assert is_quantised(held) == bool(asked.get("load_in_4bit"))


def check_log(name, entries):
    """Both steps trained on tokens of the sources that the file asks for."""
    training_args = options(name)[1]
    assert len(entries) == 2
    for entry in entries:
        assert entry["kd/off_policy/tokens"] > 0 and entry["grad_norm"] > 0
        assert (entry.get("kd/on_policy/tokens", 0) > 0) == (training_args.lmbda > 0)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_heads_of_amm_and_sparse_td_are_of_one_vocabulary(name):
    """They differ by padding at most: by 64 rows for images in Gemma 3."""
    student, teacher = options(name)[2].model_name_or_path, options(name)[1].teacher_model_name_or_path
    if method_of(name) == "dskd" or teacher is None:
        return
    rows = [config_of(model).get_text_config().vocab_size for model in (student, teacher)]
    assert abs(rows[0] - rows[1]) in (0, 64)
    assert "one tokenizer" in FILES[name].read_text()

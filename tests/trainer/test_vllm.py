"""Rollouts by vLLM, with stand-ins: for TRL's engine where its use is tested, for vLLM itself where training is."""

import dataclasses
import os
from unittest import mock

import pytest
import torch
import trl.import_utils as import_utils
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import DistillationConfig
from trl.generation import vllm_generation

from tests.tiny import make_model
from tests.trainer.runs import config, logged, same, tiny_dataset, weights
from tests.vllm import install
from trl_kd import AMMTrainer, KDConfig
from trl_kd.data import rows_of
from trl_kd.trainer.writers import student_writer


NUMBERS = ("loss", "grad_norm", "kd/on_policy/tokens", "kd/on_policy/distinct_2", "kd/on_policy/moment")


class Engine:
    """Stands for TRL's `VLLMGeneration`: keeps what it was asked, and answers as it is told."""

    instances = []

    def __init__(self, **options):
        self.options, self.events, self.weights, self.draws = options, [], [], []
        self.answer = lambda prompt: [prompt[0], options["processing_class"].eos_token_id]
        Engine.instances.append(self)
        torch.manual_seed(0)  # as vLLM does

    def sync_weights(self):
        self.events.append("sync")
        self.weights.append(weights(self.options["model"]))

    def generate(self, prompts, images, num_generations):
        assert images is None and num_generations == 1
        self.events.append(prompts)
        self.draws.append(torch.rand(2).tolist())
        return prompts, [self.answer(prompt) for prompt in prompts], None, None


@pytest.fixture
def engine(monkeypatch):
    """Puts the stand-in in the engine's place; its instances."""
    monkeypatch.setattr(vllm_generation, "VLLMGeneration", Engine)
    monkeypatch.setattr(import_utils, "is_vllm_available", lambda: True)
    monkeypatch.setattr(Engine, "instances", [])
    return Engine.instances


@pytest.fixture
def vllm(monkeypatch, student_path):
    """Puts stand-ins behind TRL's engine, which writes into the environment."""
    install(monkeypatch.setattr, student_path)
    with mock.patch.dict(os.environ):
        yield


def build(student, teacher_path, tokenizer, folder, peft_config=None, data=None, **overrides):
    args = config(folder, **({"use_vllm": True} | overrides))
    data = data or tiny_dataset()
    return AMMTrainer(student, teacher_path, args, data, processing_class=tokenizer, peft_config=peft_config)


# What TRL's engine is given


def test_vllm_fields_have_the_names_and_defaults_of_trl():
    def vllm_fields(config):
        return {field.name: field.default for field in dataclasses.fields(config) if "vllm" in field.name}

    expected = vllm_fields(DistillationConfig)
    del expected["vllm_structured_outputs_regex"]
    assert vllm_fields(KDConfig) == expected


def test_vllm_engine_gets_every_option(student_path, teacher_path, tokenizer, tmp_path, engine):
    trainer = build(
        student_path,
        teacher_path,
        tokenizer,
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        trust_remote_code=True,
        vllm_mode="server",
        vllm_model_impl="transformers",
        vllm_enable_sleep_mode=True,
        vllm_server_base_url="http://there:1",
        vllm_server_host="there",
        vllm_server_port=2,
        vllm_server_timeout=3.0,
        vllm_group_port=4,
        vllm_gpu_memory_utilization=0.5,
        vllm_max_model_length=6,
        vllm_tensor_parallel_size=7,
        max_completion_length=8,
        temperature=0.9,
        top_p=0.95,
        top_k=10,
        min_p=0.11,
        repetition_penalty=1.2,
        generation_kwargs={"presence_penalty": 0.13, "ignore_eos": False},
    )
    (made,) = engine
    assert made.options == {
        "model": trainer.model,
        "accelerator": trainer.accelerator,
        "processing_class": trainer.processing_class,
        "mode": "server",
        "server_base_url": "http://there:1",
        "server_host": "there",
        "server_port": 2,
        "server_timeout": 3.0,
        "group_port": 4,
        "tensor_parallel_size": 7,
        "gpu_memory_utilization": 0.5,
        "max_model_length": 6,
        "max_num_seqs": 2 * 3 * 7,
        "enable_sleep_mode": True,
        "model_impl": "transformers",
        "trust_remote_code": True,
        "repetition_penalty": 1.2,
        "temperature": 0.9,
        "top_p": 0.95,
        "top_k": 10,
        "min_p": 0.11,
        "max_completion_length": 8,
        "logprobs": None,
        # The caller's win
        "generation_kwargs": {"stop_token_ids": trainer.eos_token_ids, "ignore_eos": False, "presence_penalty": 0.13},
    }


def test_vllm_default_samples_from_the_student_itself(student_path, teacher_path, tokenizer, tmp_path, engine):
    trainer = build(student_path, teacher_path, tokenizer, tmp_path)
    options = engine[0].options
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    assert [options[name] for name in names] == [1.0, 1.0, 0, None, 1.0]
    assert options["generation_kwargs"] == {"stop_token_ids": trainer.eos_token_ids, "ignore_eos": True}


def test_vllm_may_write_the_tokenizer_s_tokens_alone_if_the_student_s_head_is_larger(
    student_path, teacher_path, tokenizer, tmp_path, engine
):
    student = AutoModelForCausalLM.from_pretrained(student_path)
    student.resize_token_embeddings(len(tokenizer) + 64)
    build(student, teacher_path, tokenizer, tmp_path)
    assert engine[0].options["generation_kwargs"]["allowed_token_ids"] == list(range(len(tokenizer)))


# One call per optimizer step


def test_vllm_gets_weights_and_all_prompts_once_per_step(student_path, teacher_path, tokenizer, tmp_path, engine):
    trainer = build(student_path, teacher_path, tokenizer, tmp_path, gradient_accumulation_steps=2)
    trainer.train()
    (made,) = engine
    assert [type(event) for event in made.events] == [str, list, str, list]  # two steps
    assert [len(event) for event in made.events if event != "sync"] == [4, 4]
    first, second = made.weights
    start = AutoModelForCausalLM.from_pretrained(student_path).state_dict()
    assert same(first, start) and not any(torch.equal(second[name], start[name]) for name in start)


def test_vllm_gets_weights_again_in_a_second_run_of_one_step(student_path, teacher_path, tokenizer, tmp_path, engine):
    trainer = build(student_path, teacher_path, tokenizer, tmp_path, max_steps=1)
    trainer.train()
    after = weights(trainer.model)
    trainer.train()  # step 0 again
    assert same(engine[0].weights[1], after)


def test_vllm_completions_continue_their_own_prompts_in_order(student_path, teacher_path, tokenizer, tmp_path, engine):
    trainer = build(
        student_path, teacher_path, tokenizer, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    eos = tokenizer.eos_token_id
    engine[0].answer = lambda prompt: (sum(prompt) % 200 + 3, len(prompt), eos)  # a tuple, as vLLM's may be
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 4, trainer.args.device)
    rows = [row for batch in batches for row in rows_of(batch)]
    drawn = [row for row in rows if row["is_on_policy"]]
    assert len(rows) == 8 and len(drawn) == 4
    for row, before in zip(rows, trainer.train_dataset, strict=False):
        prompt = before["input_ids"][: before["prompt_length"]]
        if row["is_on_policy"]:
            assert row["input_ids"] == [*prompt, sum(prompt) % 200 + 3, len(prompt), eos]
        else:
            assert row["input_ids"] == before["input_ids"]
    prompts = [row["input_ids"][: row["prompt_length"]] for row in drawn]
    assert engine[0].events == ["sync", prompts] and trainer.rollouts.last_prompts == prompts
    assert trainer.rollouts.last_completions == [row["input_ids"][row["prompt_length"] :] for row in drawn]


def test_vllm_step_without_on_policy_rows_asks_for_nothing(student_path, teacher_path, tokenizer, tmp_path, engine):
    trainer = build(student_path, teacher_path, tokenizer, tmp_path, lmbda=1e-6)
    trainer.train()
    assert engine[0].events == [] and trainer.state.global_step == 2


def test_vllm_completions_end_with_the_first_of_several_eos(student_path, teacher_path, tokenizer, tmp_path, engine):
    student = AutoModelForCausalLM.from_pretrained(student_path)
    student.generation_config.eos_token_id = [tokenizer.eos_token_id, 31]
    trainer = build(student, teacher_path, tokenizer, tmp_path)
    assert engine[0].options["generation_kwargs"]["stop_token_ids"] == [tokenizer.eos_token_id, 31]
    answers = iter([[20, 31, 21], [tokenizer.eos_token_id, 31], [20, 21, 22]])
    engine[0].answer = lambda prompt: next(answers)
    expected = [[20, 31], [tokenizer.eos_token_id], [20, 21, 22]]
    assert trainer.write_with_student([[5, 6], [7], [8]], seed=0) == expected


def test_vllm_token_that_the_teacher_does_not_have_raises(student_path, teacher_path, tokenizer, tmp_path, engine):
    trainer = build(student_path, teacher_path, tokenizer, tmp_path)
    size = len(tokenizer)
    engine[0].answer = lambda prompt: [size - 1]
    assert trainer.write_with_student([[5], [6]], seed=0) == [[size - 1]] * 2
    engine[0].answer = lambda prompt: [size]
    with pytest.raises(ValueError, match=f"vLLM wrote token {size}, but student and teacher share {size} tokens only"):
        trainer.write_with_student([[5], [6]], seed=0)


def test_vllm_draws_depend_on_the_seed_alone_and_leave_the_run_s(
    student_path, teacher_path, tokenizer, tmp_path, engine
):
    torch.manual_seed(5)
    expected = build(student_path, teacher_path, tokenizer, tmp_path, use_vllm=False), torch.get_rng_state()
    torch.manual_seed(5)
    trainer = build(student_path, teacher_path, tokenizer, tmp_path)
    assert torch.equal(torch.get_rng_state(), expected[1])
    for seed in (1, 2, 1):
        trainer.write_with_student([[5, 6]], seed)
        torch.rand(1)
    first, second, third = engine[0].draws
    assert first == third != second
    state = torch.get_rng_state()
    trainer.write_with_student([[5, 6]], 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_vllm_seeds_differ_by_step(student_path, teacher_path, tokenizer, tmp_path, engine):
    build(student_path, teacher_path, tokenizer, tmp_path, max_steps=4).train()
    assert len({tuple(draw) for draw in engine[0].draws}) == 4


def test_vllm_leaves_the_teacher_s_completions_to_the_teacher(student_path, teacher_path, tokenizer, tmp_path, engine):
    trainer = build(
        student_path, teacher_path, tokenizer, tmp_path, off_policy_source="teacher", max_steps=1, temperature=0.0
    )
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    rows = rows_of(batches[0])
    on_policy = [row["input_ids"][: row["prompt_length"]] for row in rows if row["is_on_policy"]]
    assert len(on_policy) == 2 and engine[0].events == ["sync", on_policy]
    for row in rows:
        if not row["is_on_policy"]:
            prompt = row["input_ids"][: row["prompt_length"]]
            assert row["input_ids"] == prompt + trainer.write_with_teacher([prompt], seed=0)[0]


# Training, with TRL's own engine


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "mode", [{}, {"vllm_enable_sleep_mode": True}, {"vllm_mode": "server"}], ids=["colocate", "sleep", "server"]
)
def test_vllm_greedy_training_equals_that_with_generate(
    student_path, teacher_path, tokenizer, tmp_path, vllm, mode, lora
):
    """Weights that are stale, or come under other names, would write other completions from the second step on."""
    runs = []
    for use_vllm in (False, True):
        # The first step's weights are the file's
        options = {"max_steps": 3, "temperature": 0.0, "gradient_accumulation_steps": 2, "learning_rate": 5e-2}
        peft_config = LoraConfig(r=4, target_modules="all-linear") if lora else None
        arguments = (student_path, teacher_path, tokenizer, tmp_path, peft_config)
        runs.append(build(*arguments, per_device_train_batch_size=2, use_vllm=use_vllm, **options, **mode))
        runs[-1].train()
    generated, by_vllm = runs
    assert generated.rollouts.last_completions == by_vllm.rollouts.last_completions
    assert len({tuple(ids) for ids in by_vllm.rollouts.last_completions}) > 1
    for name in NUMBERS:
        assert len(logged(by_vllm, name)) == 3
        assert logged(by_vllm, name) == pytest.approx(logged(generated, name), rel=1e-5), name


def test_vllm_resume_gets_the_weights_of_the_checkpoint(student_path, teacher_path, tokenizer, tmp_path, vllm):
    def make():
        saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        return build(student_path, teacher_path, tokenizer, tmp_path, temperature=0.0, learning_rate=5e-2, **saving)

    whole = make()
    whole.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.rollouts.last_completions == whole.rollouts.last_completions
    assert logged(resumed, "loss")[-2:] == logged(whole, "loss")[-2:]
    assert same(weights(resumed.model), weights(whole.model))


def test_vllm_leaves_the_weights_under_an_adapter_as_they_were(student_path, teacher_path, tokenizer, tmp_path, vllm):
    """Merged and taken out again in place, an adapter moves them by rounding."""
    trainer = build(
        student_path,
        teacher_path,
        tokenizer,
        tmp_path,
        LoraConfig(r=4, target_modules="all-linear"),
        model_init_kwargs={"dtype": "bfloat16"},
        max_steps=3,
        learning_rate=5e-2,
    )
    before = {name: value for name, value in weights(trainer.model).items() if "lora_" not in name}
    trainer.train()
    after = {name: value for name, value in weights(trainer.model).items() if "lora_" not in name}
    assert any(name.endswith("base_layer.weight") for name in before) and same(before, after)
    moved = weights(trainer.model)
    trainer.write_with_student.generation.sync_weights()  # TRL's alone
    assert not same(moved, weights(trainer.model))


# Errors


def test_vllm_not_installed_raises_before_a_model_is_loaded(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(import_utils, "is_vllm_available", lambda: False)
    with pytest.raises(
        ImportError, match=r"`use_vllm` is True, but vLLM is not installed.*the extra `trl_kd\[vllm\]`"
    ):
        build("nowhere", "nowhere-either", tokenizer, tmp_path)


def test_vllm_without_on_policy_rows_raises(student_path, teacher_path, tokenizer, tmp_path, engine):
    with pytest.raises(ValueError, match="`use_vllm` is True with `lmbda` 0.*of which there are none"):
        build(student_path, teacher_path, tokenizer, tmp_path, lmbda=0.0)


def test_vllm_colocated_with_a_student_in_memory_raises(teacher_path, tokenizer, tmp_path, engine):
    def student():
        return make_model("llama", len(tokenizer), eos_token_id=tokenizer.eos_token_id)

    with pytest.raises(ValueError, match="a model built in memory, and vLLM loads it from files"):
        build(student(), teacher_path, tokenizer, tmp_path)
    build(student(), teacher_path, tokenizer, tmp_path, vllm_mode="server")  # a server has loaded it


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_vllm_with_a_quantised_student_raises(student_path, teacher_path, tokenizer, tmp_path, engine, mode):
    trainer = build(student_path, teacher_path, tokenizer, tmp_path, use_vllm=False)
    trainer.model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    trainer.args.use_vllm, trainer.args.vllm_mode = True, mode
    with pytest.raises(NotImplementedError, match="the student is quantised.*set `use_vllm=False`"):
        student_writer(trainer)
    assert engine == []


def test_vllm_settings_are_not_in_the_model_card(student_path, teacher_path, tokenizer, tmp_path, engine):
    trainer = build(student_path, teacher_path, tokenizer, tmp_path, max_steps=1)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "| `use_vllm` | `True` |" in card and "vllm_" not in card

"""What is trained, what is not, and what is saved: full, LoRA and QLoRA students of several families."""

import json
import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from tests.tiny import make_model
from tests.trainer.runs import ProjectingTrainer, config, logged, pair, same, tiny_dataset, weights
from trl_kd import AMMTrainer


LORA = {"r": 4, "target_modules": "all-linear"}


def fit(tokenizer, tmp_path, trainer_class=AMMTrainer, kind="llama", models=None, peft_config=None, **overrides):
    student, teacher = models or pair(tokenizer, kind)
    trainer = trainer_class(
        student,
        teacher,
        config(tmp_path, **overrides),
        tiny_dataset(),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    before = weights(trainer.model), weights(trainer.teacher.model)
    trainer.train()
    trainer.save_model()
    return trainer, *before


def generates(model, tokenizer):
    ids = tokenizer("What is", return_tensors="pt").input_ids
    output = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, min_new_tokens=4)
    return output.shape[1] == ids.shape[1] + 4


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2"])
def test_full_student_every_parameter_changes_and_reloads_clean(tokenizer, tmp_path, kind):
    trainer, student, teacher = fit(tokenizer, tmp_path, ProjectingTrainer, kind, lmbda=0.5)
    unchanged = [name for name, parameter in trainer.model.named_parameters() if torch.equal(parameter, student[name])]
    # The key bias of attention shifts all scores of a query alike, so its gradient is rounding noise
    assert [name for name in unchanged if not name.endswith("k_proj.bias")] == []
    assert same(weights(trainer.teacher.model), teacher)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert same(weights(loaded), weights(trainer.model))
    assert generates(loaded, AutoTokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_lora_student_only_adapter_changes_and_reloads(tokenizer, tmp_path, modules_to_save):
    peft_config = LoraConfig(**LORA, modules_to_save=modules_to_save)
    trainer, student, teacher = fit(tokenizer, tmp_path, peft_config=peft_config, max_steps=3)
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, student[name])}
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert changed == trained
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert same(weights(trainer.teacher.model), teacher)
    base, _ = pair(tokenizer)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    ids = torch.arange(3, 12).unsqueeze(0)
    trainer.model.eval()
    torch.testing.assert_close(loaded(ids).logits, trainer.model(ids).logits)
    assert generates(loaded, tokenizer)


@pytest.fixture(scope="module")
def wide_pair(tokenizer, tmp_path_factory):
    """Saved models whose widths are multiples of 64, the block of 4-bit weights."""
    pytest.importorskip("bitsandbytes", reason="the `quantization` extra is not installed")
    paths = []
    for seed in (1, 2):
        model = make_model(
            "llama",
            len(tokenizer),
            hidden_size=128,
            seed=seed,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        paths.append(str(tmp_path_factory.mktemp("wide")))
        model.save_pretrained(paths[-1])
        tokenizer.save_pretrained(paths[-1])
    return paths


def test_qlora_student_trains_on_cpu(tokenizer, tmp_path, wide_pair):
    student_path, teacher_path = wide_pair
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    trainer = AMMTrainer(
        student_path,
        teacher_path,
        config(tmp_path, max_steps=3),
        tiny_dataset(),
        quantization_config=quantization,
        peft_config=LoraConfig(**LORA),
    )
    assert trainer.model.base_model.model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    student, teacher = weights(trainer.model), weights(trainer.teacher.model)
    trainer.train()
    trainer.save_model()
    now = trainer.model.state_dict()
    changed = {name for name in now if not torch.equal(now[name], student[name])}
    assert changed == {name for name in now if "lora_" in name}
    assert same(weights(trainer.teacher.model), teacher)
    base = AutoModelForCausalLM.from_pretrained(student_path, quantization_config=quantization, dtype=torch.float32)
    assert generates(PeftModel.from_pretrained(base, tmp_path), tokenizer)
    trainer.create_model_card()  # `trl-kd export` reads there what the adapter has to be merged into
    assert ", quantised (`load_in_4bit: True, bnb_4bit_quant_type: nf4`)" in (tmp_path / "README.md").read_text()


def test_qlora_gradients_are_the_same_after_a_rollout(tokenizer, tmp_path, wide_pair):
    """bitsandbytes repacks weights in eval mode on some CPUs, and gradients stop there; see `_compat`."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(wide_pair[0], quantization_config=quantization, dtype=torch.float32)
    student = get_peft_model(base, LoraConfig(**LORA, init_lora_weights=False)).bfloat16()
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]

    def gradients():
        student.train()
        loss = student(torch.arange(3, 12).unsqueeze(0)).logits.float().square().mean()
        return torch.autograd.grad(loss, parameters)

    before = gradients()
    trainer = AMMTrainer(student, wide_pair[1], config(tmp_path), tiny_dataset(), processing_class=tokenizer)
    trainer.write_with_student([[5, 6, 7]], seed=0)
    for value, expected in zip(gradients(), before, strict=True):
        assert torch.equal(value, expected)


def test_quantised_teacher_stays_near_the_full_one(tokenizer, tmp_path, wide_pair):
    student_path, teacher_path = wide_pair
    losses = []
    for init_kwargs in (None, {"load_in_4bit": True}, {"load_in_8bit": True}):
        args = config(tmp_path, max_steps=1, lmbda=0.0, teacher_model_init_kwargs=init_kwargs)
        trainer = AMMTrainer(student_path, teacher_path, args, tiny_dataset())
        trainer.train()
        losses.append(logged(trainer, "loss")[0])
    # nf4 rounds weights to one of 16 values, int8 to one of 255: within a tenth and a hundredth of the full moment
    assert len(set(losses)) == 3
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert losses[2] == pytest.approx(losses[0], rel=0.01)


def test_student_learns_far_past_noise(tokenizer, tmp_path):
    """Total variation to the teacher falls, by half on data and by a fifth on the student's own text."""
    trainer, *_ = fit(
        tokenizer,
        tmp_path,
        max_steps=200,
        per_device_train_batch_size=8,
        max_grad_norm=1.0,
        learning_rate=2e-2,
        lr_scheduler_type="cosine",
    )
    for source, share in (("off_policy", 0.5), ("on_policy", 0.8)):
        values = logged(trainer, f"kd/{source}/total_variation")
        assert sum(values[-5:]) < share * sum(values[:5]), source


def test_same_seed_same_run(tokenizer, tmp_path):
    runs = [fit(tokenizer, tmp_path / str(seed), seed=seed, max_steps=3)[0] for seed in (7, 7, 8)]
    assert logged(runs[0], "loss") == logged(runs[1], "loss")
    assert same(weights(runs[0].model), weights(runs[1].model))
    assert logged(runs[0], "loss") != logged(runs[2], "loss")


def test_gradient_checkpointing_gives_the_same_gradients(tokenizer, tmp_path):
    runs = [fit(tokenizer, tmp_path, gradient_checkpointing=on, temperature=0.0)[0] for on in (False, True)]
    assert logged(runs[1], "grad_norm") == pytest.approx(logged(runs[0], "grad_norm"), rel=1e-5)


def test_model_card_tells_how_the_model_was_made(tokenizer, tmp_path, student_path, teacher_path):
    secret = {"token": "hf_secret", "dtype": "float32"}
    args = config(
        tmp_path, max_steps=1, gamma=0.9, save_strategy="steps", save_steps=1, teacher_model_init_kwargs=secret
    )
    trainer = AMMTrainer(student_path, teacher_path, args, tiny_dataset())
    trainer.train()
    card = (tmp_path / "README.md").read_text()
    for text in (
        "Adversarial Moment-Matching Distillation of Large Language Models",
        "2406.02959",
        f"- Teacher: `{os.path.basename(teacher_path)}` (a local folder)",
        "under the worst critic",
        "| `critic` | `exact` |",
        "| `gamma` | `0.9` |",
        "| `lmbda` | `0.5` |",
        "@inproceedings{jia2024adversarial",
    ):
        assert text in card
    assert str(tmp_path.parent) not in card
    assert "float32" in card and "hf_secret" not in card
    assert "aux_learning_rate" not in card


def test_caller_s_config_dataset_and_generation_config_are_not_changed(tokenizer, tmp_path):
    student, teacher = pair(tokenizer)
    student.generation_config.top_k = 3
    student.generation_config.repetition_penalty = 1.7
    generation, args, data = student.generation_config.to_dict(), config(tmp_path), tiny_dataset()
    before = json.dumps(args.to_dict(), default=str)
    columns = data.column_names
    trainer = AMMTrainer(student, teacher, args, data, processing_class=tokenizer)
    trainer.train()
    assert json.dumps(args.to_dict(), default=str) == before
    assert data.column_names == columns
    after = student.generation_config.to_dict()
    assert {name: after[name] for name in generation} == generation

"""Families of students and teachers in dual-space distillation, adapters, what is saved, and resuming."""

import copy
import os

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from tests.tiny import make_model
from tests.trainer.dual import (
    assert_agrees,
    dual_pair,
    make_other_tokenizer,
    make_trainer,
    recorded_run,
)
from tests.trainer.runs import logged, same, state_of, weights
from trl_kd.trainer import auxiliary, checkpoints


@pytest.fixture(scope="module")
def other():
    return make_other_tokenizer()


# Families

COMMON = {
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
OPT = {name: COMMON[name] for name in ("num_hidden_layers", "num_attention_heads", "bos_token_id", "eos_token_id")}
OPT |= {"init_std": 0.3, "ffn_dim": 64, "max_position_embeddings": 128, "pad_token_id": 0, "dropout": 0.0}


def family(kind, vocab_size):
    """A tiny model of a family whose logits are more than a product with a matrix, or whose head has another width."""
    models = {
        # Hidden states are 32 wide, embeddings and what the head reads 24
        "opt": (OPTForCausalLM, OPTConfig, {"hidden_size": 32, "word_embed_proj_dim": 24} | OPT),
        "cohere": (CohereForCausalLM, CohereConfig, {"hidden_size": 32, "logit_scale": 0.25} | COMMON),
        "granite": (GraniteForCausalLM, GraniteConfig, {"hidden_size": 32, "logits_scaling": 3.0} | COMMON),
        "gemma2": (
            Gemma2ForCausalLM,
            Gemma2Config,
            {"hidden_size": 32, "final_logit_softcapping": 4.0, "head_dim": 8} | COMMON,
        ),
        "phi": (PhiForCausalLM, PhiConfig, {"hidden_size": 32, "resid_pdrop": 0.0} | COMMON),
    }
    if kind not in models:
        return make_model(kind, vocab_size, hidden_size=32, seed=5)
    model_class, config_class, options = models[kind]
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = model_class(config_class(vocab_size=vocab_size, **options))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


# Student, teacher; tied heads (gpt2, opt, cohere, gemma2) and others
FAMILIES = {
    "opt": ("opt", "llama", {}),
    "opt teacher": ("llama", "opt", {}),
    "cohere": ("cohere", "granite", {}),
    "granite": ("granite", "gemma2", {}),
    "gemma2": ("gemma2", "cohere", {}),
    "gpt2": ("gpt2", "qwen3", {}),
    # A head with a bias has projectors with one
    "phi": ("phi", "qwen2", {"bias": True}),
    "phi teacher": ("gpt2", "phi", {"bias": True}),
}


@pytest.mark.parametrize(
    ("case", "alignment"),
    [*((case, "eta") for case in FAMILIES), ("gemma2", "same"), ("phi", "same")]
    + [(case, "cma") for case in ("opt", "opt teacher", "granite", "phi teacher")],
)
def test_family_agrees_with_loops(tokenizer, other, tmp_path, case, alignment):
    student_kind, teacher_kind, options = FAMILIES[case]
    tokenizers = (tokenizer, None if alignment == "same" else other)
    models = family(student_kind, len(tokenizer)), family(teacher_kind, len(tokenizers[1] or tokenizer))
    # The open gate, so that all tokens teach
    settings = {"alignment": alignment, "gate": "none", "max_steps": 1, "gradient_accumulation_steps": 1}
    trainer = recorded_run(copy.deepcopy(models), tokenizers, tmp_path, **settings)
    assert_agrees(trainer, models, tokenizers, alignment, "v2", steps=(0,), gate=False, **options)


def test_teacher_equal_to_the_student_leaves_nothing_to_learn_in_any_family(tokenizer, tmp_path):
    for kind in ("opt", "cohere", "granite", "gemma2", "phi", "gpt2"):
        student = family(kind, len(tokenizer))
        models = student, copy.deepcopy(student)
        trainer = recorded_run(models, (tokenizer, None), tmp_path, kd_rate=1.0, max_steps=1)
        for space in ("student", "teacher"):
            # As near as float32 and a pseudo-inverse get
            assert logged(trainer, f"kd/off_policy/{space}_space_kd")[0] < 1e-8, (kind, space)
        assert logged(trainer, "kd/off_policy/gate") == [1.0], kind


def test_token_without_a_label_does_not_teach_whatever_the_projector_says(tokenizer, other, tmp_path):
    """Its label is filled in with 0, which is all that this head ever finds most likely."""
    student, teacher = family("phi", len(tokenizer)), family("qwen2", len(other))
    with torch.no_grad():
        student.get_output_embeddings().bias[0] += 1e3
    trainer = recorded_run((student, teacher), (tokenizer, other), tmp_path, alignment="cma", max_steps=1)
    assert logged(trainer, "kd/off_policy/gate") == [0.0] and logged(trainer, "kd/aligned_share")[0] < 1


@pytest.mark.parametrize("alignment", ["same", "eta", "cma"])
def test_bfloat16_stays_near_float32(tokenizer, other, tmp_path, alignment):
    models, tokenizers, options = kind_of(alignment, tokenizer, other)
    runs = [
        recorded_run(copy.deepcopy(models), tokenizers, tmp_path, bf16=bf16, max_steps=1, gate="none", **options)
        for bf16 in (False, True)
    ]
    assert {parameter.dtype for parameter in runs[1].auxiliary.modules.parameters()} == {torch.float32}
    for name in ("loss", "kd/off_policy/student_space_kd", "kd/off_policy/teacher_space_kd", "kd/aux_grad_norm"):
        full, half = (logged(run, name)[0] for run in runs)
        # Eight bits of the models' states
        assert half != full and half == pytest.approx(full, rel=3e-2), name


@pytest.mark.parametrize("alignment", ["same", "eta", "cma"])
def test_teacher_in_bfloat16_teaches_a_student_in_float32(tokenizer, other, tmp_path, alignment):
    (student, teacher), tokenizers, options = kind_of(alignment, tokenizer, other)
    teacher = teacher.bfloat16()
    runs = [
        recorded_run((copy.deepcopy(student), model), tokenizers, tmp_path, max_steps=1, gate="none", **options)
        for model in (copy.deepcopy(teacher).float(), teacher)
    ]
    assert {parameter.dtype for parameter in runs[1].auxiliary.modules.parameters()} == {torch.float32}
    full, half = (logged(run, "loss")[0] for run in runs)
    assert half != full and half == pytest.approx(full, rel=1e-2)


# What is trained and saved

KINDS = {"same": {}, "eta": {}, "cma": {"preset": "v1"}}
MODULES = {
    "same": ["teacher_to_student.weight"],
    "eta": ["teacher_to_student.weight"],
    "cma": [
        f"{name}.{part}"
        for name in ("attention.query", "student_to_teacher", "teacher_to_student")
        for part in ("bias", "weight")
    ],
}
LORA = {"r": 4, "target_modules": "all-linear"}


def kind_of(alignment, tokenizer, other):
    tokenizers = (tokenizer, None if alignment == "same" else other)
    return dual_pair(*tokenizers), tokenizers, {"alignment": alignment} | KINDS[alignment]


@pytest.mark.parametrize("alignment", KINDS)
def test_saved_student_has_no_projector_and_loads_clean(tokenizer, other, tmp_path, alignment):
    models, tokenizers, options = kind_of(alignment, tokenizer, other)
    trainer = make_trainer(models, tokenizers, tmp_path, lmbda=0.5, **options)
    student, teacher = weights(trainer.model), weights(trainer.teacher.model)
    modules = weights(trainer.auxiliary.modules)
    trainer.train()
    # Embeddings of tokens that no row has get no gradient
    changed = [name for name, value in trainer.model.state_dict().items() if not torch.equal(value, student[name])]
    assert set(changed) == set(student)
    assert same(weights(trainer.teacher.model), teacher)
    assert sorted(modules) == MODULES[alignment]
    now = weights(trainer.auxiliary.modules)
    assert not any(torch.equal(now[name], modules[name]) for name in modules)
    trainer.save_model()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert same(weights(loaded), weights(trainer.model))
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert not any("aux" in name for name in os.listdir(tmp_path))
    trainer.save_auxiliary(str(tmp_path / "projectors"))
    assert same(load_file(tmp_path / "projectors" / "auxiliary.safetensors"), now)


@pytest.mark.parametrize("alignment", KINDS)
def test_lora_student_only_adapter_and_projectors_change(tokenizer, other, tmp_path, alignment):
    models, tokenizers, options = kind_of(alignment, tokenizer, other)
    base, full = copy.deepcopy(models[0]), recorded_run(copy.deepcopy(models), tokenizers, tmp_path, **options)
    trainer = make_trainer(
        models,
        tokenizers,
        tmp_path,
        options={"peft_config": LoraConfig(**LORA)},
        max_steps=3,
        **(options | {"loss_chunk_size": 3}),
    )
    before = weights(trainer.model)
    trainer.train()
    trainer.save_model()
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert changed and all("lora_" in name for name in changed)
    # Before the first step, the adapter changes nothing
    for name in ("loss", "kd/aux_grad_norm"):
        assert logged(trainer, name)[0] == pytest.approx(logged(full, name)[0], rel=1e-5)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    ids = torch.arange(3, 12).unsqueeze(0)
    trainer.model.eval()
    torch.testing.assert_close(loaded(ids).logits, trainer.model(ids).logits)
    assert not any("teacher" in name or "query" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_lora_student_with_a_trained_head_moves_the_recomputed_map(tokenizer, tmp_path):
    config = LoraConfig(**LORA, modules_to_save=["lm_head"])
    options = {"options": {"peft_config": config}, "max_steps": 2}
    trainer = make_trainer(dual_pair(tokenizer), (tokenizer, None), tmp_path, **options)
    before = map_of(trainer)
    trainer.train()
    assert not torch.equal(map_of(trainer), before)
    frozen = make_trainer(
        dual_pair(tokenizer), (tokenizer, None), tmp_path, options={"peft_config": LoraConfig(**LORA)}
    )
    frozen.train()
    assert torch.equal(map_of(frozen), before)


def map_of(trainer):
    """What the projection into the teacher's space does to each direction."""
    projection = trainer.projection
    size = trainer.model.get_output_embeddings().weight.shape[1]
    return projection.into_teacher(torch.eye(size), trainer.student_head()).detach().clone()


@pytest.fixture(scope="module")
def wide_paths(tokenizer, other, tmp_path_factory):
    """Saved models whose widths are multiples of 64, the block of 4-bit weights."""
    pytest.importorskip("bitsandbytes", reason="the `quantization` extra is not installed")
    paths = []
    for own, seed in ((tokenizer, 1), (tokenizer, 2), (other, 3)):
        model = make_model("llama", len(own) + 1, hidden_size=64, layers=1, seed=seed, eos_token_id=own.eos_token_id)
        paths.append(str(tmp_path_factory.mktemp("wide")))
        model.save_pretrained(paths[-1])
        own.save_pretrained(paths[-1])
    return paths


@pytest.mark.parametrize("alignment", ["same", "cma"])
def test_qlora_student_and_4_bit_teacher_train_on_cpu(tokenizer, tmp_path, wide_paths, alignment):
    student_path, teacher_path = wide_paths[0], wide_paths[1 if alignment == "same" else 2]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    settings = {"alignment": alignment, "lmbda": 0.5, "teacher_model_init_kwargs": {"load_in_4bit": True}}
    trainer = make_trainer(
        (student_path, teacher_path),
        (None, None),
        tmp_path,
        options={"quantization_config": quantization, "peft_config": LoraConfig(**LORA)},
        **settings,
    )
    layers = [model.get_decoder().layers[0].mlp.up_proj.weight for model in (trainer.model, trainer.teacher.model)]
    assert [layer.dtype for layer in layers] == [torch.uint8, torch.uint8]
    student, teacher = weights(trainer.model), weights(trainer.teacher.model)
    modules = weights(trainer.auxiliary.modules)
    trainer.train()
    now = trainer.model.state_dict()
    assert {name for name in now if not torch.equal(now[name], student[name])} == {n for n in now if "lora_" in n}
    assert same(weights(trainer.teacher.model), teacher)
    changed = [not torch.equal(value, modules[name]) for name, value in weights(trainer.auxiliary.modules).items()]
    assert changed and all(changed)


def test_4_bit_teacher_stays_near_the_full_one(tokenizer, tmp_path, wide_paths):
    losses = []
    for init_kwargs in (None, {"load_in_4bit": True}):
        paths = wide_paths[0], wide_paths[2]
        options = {"alignment": "eta", "max_steps": 1, "teacher_model_init_kwargs": init_kwargs}
        trainer = make_trainer(paths, (None, None), tmp_path, **options)
        trainer.train()
        losses.append(logged(trainer, "loss")[0])
    # nf4 rounds weights to one of 16 values
    assert 0 < abs(losses[1] - losses[0]) < 0.1 * losses[0]


def test_model_card_tells_how_the_model_was_made(tokenizer, other, tmp_path):
    options = {"alignment": "eta", "kd_rate": 0.7, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer = make_trainer(dual_pair(tokenizer, other), (tokenizer, other), tmp_path, **options)
    trainer.train()
    card = (tmp_path / "README.md").read_text()
    for text in (
        "Dual-Space Knowledge Distillation for Large Language Models",
        "2406.17328",
        "@inproceedings{zhang2024dual",
        "in the student's representation space",
        "| `alignment` | `eta` |",
        "| `kd_rate` | `0.7` |",
        "| `gate` | `agreement` |",
        "| `aux_learning_rate` | `0.01` |",
    ):
        assert text in card, text
    assert "cma_norm_scope" not in card and "teacher_space_denominator" not in card and "vllm_" not in card
    simple = {"alignment": "eta", "objective": "simple", "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make_trainer(dual_pair(tokenizer, other), (tokenizer, other), tmp_path / "simple", **simple).train()
    card = (tmp_path / "simple" / "README.md").read_text()
    assert "| `objective` | `simple` |" in card
    assert not any(f"| `{name}" in card for name in ("projector_", "gate", "preset", "student_to_teacher"))


# Resuming

SAVING = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    # All that draws: rollouts, the order of the data, dropout
    "lmbda": 0.5,
    "train_sampling_strategy": "random",
    "lr_scheduler_type": "cosine",
    "aux_lr_scheduler_type": "cosine",
}
NUMBERS = ("loss", "grad_norm", "kd/aux_grad_norm", "kd/aux_learning_rate", "kd/on_policy/distinct_2", "learning_rate")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("alignment", KINDS)
def test_resume_of_a_killed_run_equals_the_uninterrupted_one(tokenizer, other, tmp_path, alignment, lora):
    def make():
        models, tokenizers, options = kind_of(alignment, tokenizer, other)
        adapter = LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear") if lora else None
        return make_trainer(models, tokenizers, tmp_path, options={"peft_config": adapter}, **(options | SAVING))

    whole = make()
    whole.train()
    state, log = state_of(whole), {name: logged(whole, name) for name in NUMBERS}
    assert len(set(log["loss"])) == 4 and len(log["kd/on_policy/distinct_2"]) == 4
    # What a save leaves that was killed in its middle
    partial = tmp_path / "checkpoint-4"
    for name in (checkpoints.MARKER, auxiliary.AUXILIARY_FILE, "rng_state.pth"):
        (partial / name).unlink()
    resumed = make()
    resumed.train(resume_from_checkpoint=True)
    for name in NUMBERS:
        assert logged(resumed, name) == log[name], name
    for part, expected in zip(state_of(resumed), state, strict=True):
        assert same(part, expected)
    if alignment != "cma":
        assert torch.equal(map_of(resumed), map_of(whole))
        assert torch.equal(map_of(resumed), map_of(make())) == lora  # whose head is never trained


def test_resume_without_projectors_raises(tokenizer, other, tmp_path):
    models, tokenizers, options = kind_of("eta", tokenizer, other)
    make_trainer(copy.deepcopy(models), tokenizers, tmp_path, **(options | SAVING)).train()
    (tmp_path / "checkpoint-2" / auxiliary.AUXILIARY_FILE).unlink()
    trainer = make_trainer(models, tokenizers, tmp_path, **(options | SAVING))
    with pytest.raises(ValueError, match=r"auxiliary modules \['teacher_to_student'\] could not be restored"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

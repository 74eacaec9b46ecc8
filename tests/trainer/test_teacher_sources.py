"""Every source of the teacher gives the loss and the gradients that the same teacher gives as a model in memory."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import trl_kd
from tests.tiny import make_model
from tests.trainer.runs import config, logged, pair, same, tiny_dataset, weights
from trl_kd import AMMConfig, AMMTrainer, DSKDConfig, DSKDTrainer, SparseTDConfig, SparseTDTrainer
from trl_kd.scripts.stories import make_stories


TRAINERS = {"amm": (AMMTrainer, AMMConfig), "dskd": (DSKDTrainer, DSKDConfig), "td": (SparseTDTrainer, SparseTDConfig)}
METHODS = pytest.mark.parametrize("method", TRAINERS)


class Gradients(TrainerCallback):
    """Keeps the gradients of each optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.steps.append(found)


def make(method, folder, student, teacher=None, dataset=None, tokenizer=None, peft=None, more=None, **options):
    trainer_class, config_class = TRAINERS[method]
    settings = config(folder).to_dict()
    kept = ("output_dir", "max_steps", "per_device_train_batch_size", "learning_rate", "max_completion_length")
    kept += ("logging_steps", "save_strategy", "report_to", "use_cpu", "gradient_checkpointing", "disable_tqdm")
    kept += ("max_grad_norm", "train_sampling_strategy")
    args = config_class(**({name: settings[name] for name in kept} | {"max_steps": 1, "lmbda": 0.5} | options))
    dataset = dataset or tiny_dataset()
    return trainer_class(student, teacher, args, dataset, processing_class=tokenizer, peft_config=peft, **(more or {}))


def step(method, folder, student, teacher=None, dataset=None, tokenizer=None, **options):
    """Loss and gradients of the first steps, with the trainer."""
    trainer = make(method, folder, student, teacher, dataset, tokenizer, **options)
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return logged(trainer, "loss"), gradients.steps, trainer


def assert_same(found, expected, rel=1e-6):
    """Equal losses, and gradients to a share of the largest entry of each."""
    assert found[0] == pytest.approx(expected[0], rel=rel)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert ours.keys() == theirs.keys() and any(gradient.abs().max() > 0 for gradient in ours.values())
        for name, gradient in ours.items():
            assert (gradient - theirs[name]).abs().max() <= rel * theirs[name].abs().max().clamp_min(1e-8), name


def student_of(base, seed=3, **lora):
    """An adapter that is not zero, on a copy of a model."""
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "lora_dropout": 0.0} | lora
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(base), LoraConfig(**settings))
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def base(tokenizer):
    return pair(tokenizer)[0]


# Where a model is


@METHODS
@pytest.mark.parametrize("place", ["path", "cpu", "offload", "offloaded by the caller"])
def test_teacher_elsewhere_gives_the_same_loss_and_gradients(method, place, tokenizer, tmp_path, teacher_path):
    student, _ = pair(tokenizer)
    teacher, device = AutoModelForCausalLM.from_pretrained(teacher_path), None
    expected = step(method, tmp_path, copy.deepcopy(student), teacher, tokenizer=tokenizer)
    if place == "offloaded by the caller":
        from accelerate import cpu_offload

        given = cpu_offload(copy.deepcopy(teacher))
    else:
        given, device = teacher_path, None if place == "path" else place
    found = step(method, tmp_path, student, given, tokenizer=tokenizer, teacher_device=device)
    assert_same(found, expected)
    if "offload" in place:
        assert all(parameter.is_meta for parameter in found[2].teacher.model.parameters())


def test_offloaded_teacher_writes_the_same_completions(tokenizer, tmp_path, teacher_path):
    written = []
    for device in (None, "offload"):
        student, _ = pair(tokenizer)
        trainer = make("amm", tmp_path, student, teacher_path, tokenizer=tokenizer, teacher_device=device)
        written.append(trainer.write_with_teacher([[5, 6, 7], [8, 9]], seed=1))
    assert written[0] == written[1] and all(written[0])


@pytest.fixture(scope="module")
def trained_teacher():
    """The teacher that comes with the package, a student that is near it, and text that it knows."""
    folder = str(Path(trl_kd.__file__).parent / "scripts" / "demo_teacher")
    student = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.2 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return folder, student, AutoTokenizer.from_pretrained(folder), make_stories(16, 3)


@METHODS
@pytest.mark.parametrize(
    ("form", "rel", "cosine"), [("load_in_8bit", 0.01, 0.999), ("bfloat16", 0.02, 0.999), ("load_in_4bit", 0.6, 0.94)]
)
def test_rounded_teacher_stays_near_the_full_one(method, form, rel, cosine, trained_teacher, tmp_path):
    """
    The tolerances of the documentation, on a teacher of 128 units (wider ones round less): loss within 1 % and
    gradients within 2.6 degrees at 8 bit, 2 % in bfloat16. At 4 bit the gradient turns by up to 20 degrees.
    """
    pytest.importorskip("bitsandbytes", reason="the `quantization` extra is not installed")
    folder, student, tokenizer, stories = trained_teacher
    runs = []
    for init_kwargs in (None, {"dtype": "bfloat16"} if form == "bfloat16" else {form: True}):
        options = {"lmbda": 0.0, "teacher_model_init_kwargs": init_kwargs}
        runs.append(step(method, tmp_path, copy.deepcopy(student), folder, stories, tokenizer, **options))
    assert runs[1][0] != runs[0][0]
    assert runs[1][0] == pytest.approx(runs[0][0], rel=rel)
    flat = [torch.cat([gradient.flatten() for gradient in run[1][0].values()]) for run in runs]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > cosine


@METHODS
@pytest.mark.parametrize("form", ["load_in_8bit", "load_in_4bit"])
def test_quantised_teacher_equals_a_full_one_with_its_weights(method, form, trained_teacher, tmp_path):
    """What the rounding costs is the rounding of weights alone: the same weights in full give the same gradients."""
    pytest.importorskip("bitsandbytes", reason="the `quantization` extra is not installed")
    folder, student, tokenizer, stories = trained_teacher
    options = {"lmbda": 0.0, "teacher_model_init_kwargs": {form: True, "dtype": "float32"}}
    found = step(method, tmp_path, copy.deepcopy(student), folder, stories, tokenizer, **options)
    full = found[2].teacher.model.dequantize().float()
    expected = step(method, tmp_path, copy.deepcopy(student), full, stories, tokenizer, lmbda=0.0)
    # int8 rounds the activations too, and 4 bit computes in bfloat16
    assert found[0] == pytest.approx(expected[0], rel=0.02)
    flat = [torch.cat([gradient.flatten() for gradient in run[1][0].values()]) for run in (found, expected)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.998


# The student's own base


@METHODS
@pytest.mark.parametrize("lora", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True, "lora_dropout": 0.3}])
def test_base_as_teacher_equals_a_copy_of_it(method, lora, tokenizer, tmp_path, base):
    expected = step(method, tmp_path, student_of(base, **lora), copy.deepcopy(base), tokenizer=tokenizer, max_steps=2)
    options = {"teacher_adapter": "base", "max_steps": 2}
    found = step(method, tmp_path, student_of(base, **lora), tokenizer=tokenizer, **options)
    assert_same(found, expected)
    initial = student_of(base, **lora).get_base_model()
    assert same(
        {name: value for name, value in weights(found[2].model.get_base_model()).items() if "base_layer" in name},
        {name: value for name, value in weights(initial).items() if "base_layer" in name},
    )


@METHODS
@pytest.mark.parametrize("is_held", [False, True])
@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "embed_tokens"]])
def test_named_adapter_as_teacher_equals_a_copy_with_it(method, is_held, target, tokenizer, tmp_path, base):
    other = student_of(base, seed=8, r=2, target_modules=target, lora_dropout=0.5)
    other.save_pretrained(tmp_path / "adapter")
    teacher = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    expected = step(method, tmp_path / "1", student_of(base), teacher, tokenizer=tokenizer, max_steps=2)
    student, adapter = student_of(base), str(tmp_path / "adapter")
    if is_held:
        student.load_adapter(adapter, adapter_name="other", is_trainable=True)
        adapter = "other"
    options = {"teacher_adapter": adapter, "max_steps": 2}
    found = step(method, tmp_path / "2", student, tokenizer=tokenizer, **options)
    trained = {name: gradient for name, gradient in found[1][0].items() if ".default" in name}
    assert found[1][0].keys() == trained.keys(), "the teacher's adapter is not trained"
    assert_same(found, expected)


@METHODS
def test_base_as_teacher_writes_and_is_compared_on_rollouts(method, tokenizer, tmp_path, base):
    """Both write: the teacher's text is the base's, the student's its own."""
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in tiny_dataset()])
    runs = []
    for teacher, adapter in ((copy.deepcopy(base), None), (None, "base")):
        options = {"teacher_adapter": adapter, "max_steps": 2, "off_policy_source": "teacher"}
        options |= {"projector_pretraining_steps": 0} if method == "dskd" else {}
        runs.append(step(method, tmp_path, student_of(base), teacher, prompts, tokenizer, **options))
    assert_same(runs[1], runs[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_student_is_what_it_was_after_the_teacher_has_spoken(checkpointing, tokenizer, tmp_path, base):
    student = student_of(base, lora_dropout=0.5)
    frozen = next(parameter for name, parameter in student.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)  # by the caller
    options = {"teacher_adapter": "base", "gradient_checkpointing": checkpointing}
    trainer = make("amm", tmp_path, student, tokenizer=tokenizer, **options)
    model = trainer.model.train()
    model.get_base_model().lm_head.eval()
    before = (
        [parameter.requires_grad for parameter in model.parameters()],
        [module.training for module in model.modules()],
        model.active_adapters,
    )
    trainer.teacher.hidden_states(input_ids=torch.tensor([[5, 6, 7]]))
    after = (
        [parameter.requires_grad for parameter in model.parameters()],
        [module.training for module in model.modules()],
        model.active_adapters,
    )
    assert after == before and not frozen.requires_grad
    with pytest.raises(RuntimeError, match="stop"), trainer.teacher.speaking():
        raise RuntimeError("stop")
    assert [parameter.requires_grad for parameter in model.parameters()] == before[0]


def test_saved_student_holds_nothing_of_the_teacher_s_adapter_and_resumes(tokenizer, tmp_path, base):
    student_of(base, seed=8).save_pretrained(tmp_path / "adapter")
    options = {"teacher_adapter": str(tmp_path / "adapter"), "save_strategy": "steps", "save_steps": 2}
    whole = step("amm", tmp_path / "1", student_of(base), tokenizer=tokenizer, **options | {"max_steps": 4})
    assert sorted(whole[2].model.peft_config) == ["default", "teacher"]
    whole[2].save_model(tmp_path / "saved")
    for folder in (tmp_path / "saved", tmp_path / "1" / "checkpoint-2"):
        assert not (folder / "teacher").exists() and (folder / "adapter_model.safetensors").exists()
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "saved")
    own = {name: value for name, value in weights(whole[2].model).items() if ".teacher." not in name}
    assert same(weights(loaded), own)
    os.rename(tmp_path / "1" / "checkpoint-2", tmp_path / "checkpoint-2")
    again = make("amm", tmp_path / "2", student_of(base), tokenizer=tokenizer, **options | {"max_steps": 4})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(again, "loss")[-2:] == whole[0][-2:]
    assert same(weights(again.model), weights(whole[2].model))


def test_model_card_names_the_base_as_the_teacher(tokenizer, tmp_path, student_path):
    model = AutoModelForCausalLM.from_pretrained(student_path)
    student = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    trainer = make("amm", tmp_path, student, tokenizer=tokenizer, teacher_adapter="base")
    trainer.train()
    trainer.create_model_card()
    card, name = (tmp_path / "README.md").read_text(), os.path.basename(student_path)
    assert f"- Teacher: `{name}` (a local folder), the student's base without its adapter" in card
    assert str(student_path) not in card


def test_answer_after_both_prompts_begins_alike(tokenizer, tmp_path, conversational_dataset):
    """Also where a template asks for an answer by more (`<think>`) than it writes before one that is there."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template += "{%- if add_generation_prompt -%}{{- '<think>' -}}{%- endif -%}"
    rows, options = conversational_dataset.select(range(2)), {"teacher_system_prompt": "s", "lmbda": 0.0}
    trainer = make("amm", tmp_path, *pair(tokenizer), rows, tokenizer, **options)
    text = tokenizer.decode(next(iter(trainer.get_train_dataloader()))["teacher_input_ids"].flatten())
    assert "assistant\nThe fox is red." in text and "<think>" not in text


def test_collator_that_would_drop_the_teacher_s_prompt_raises(tokenizer, tmp_path):
    rows = tiny_dataset(4).add_column("teacher_prompt", ["a"] * 4)
    with pytest.raises(
        ValueError, match="`data_collator` is a function, but with `teacher_system_prompt` or a column"
    ):
        make("amm", tmp_path, *pair(tokenizer), rows, tokenizer, more={"data_collator": lambda rows: rows})


def test_model_card_s_table_survives_a_system_prompt(tokenizer, tmp_path, conversational_dataset):
    options = {"teacher_system_prompt": "Be `brief` | kind.\n\n# Rules", "lmbda": 0.0}
    trainer = make("amm", tmp_path, *pair(tokenizer), conversational_dataset, tokenizer, **options)
    trainer.train()
    trainer.create_model_card()
    assert "| `teacher_system_prompt` | `` Be `brief` \\| kind. # Rules `` |\n" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_adapter": "nowhere"}, "`teacher_adapter` is 'nowhere', which could not be loaded"),
        ({"teacher_adapter": "default"}, "'default', which is the adapter that is trained. Name another one"),
        ({"teacher_adapter": "base", "teacher_device": "cpu"}, "`teacher_adapter` is set with `teacher_device` 'cpu'"),
        ({"teacher_adapter": "base", "teacher_models": ["a", "b"]}, "`teacher_adapter` and `teacher_models` are set"),
        ({"teacher_adapter": "base", "teacher_cache": "c"}, "`teacher_cache` is set with `teacher_adapter`"),
        ({"teacher_column": "x", "teacher_adapter": "base"}, "`teacher_column` is 'x', but there are not several"),
        (
            {"teacher_adapter": "base", "teacher_model_init_kwargs": {"dtype": "auto"}},
            "with `teacher_model_init_kwargs`",
        ),
    ],
)
def test_teacher_adapter_that_cannot_work_raises(options, message, tokenizer, tmp_path, base):
    with pytest.raises(ValueError, match=message):
        make("amm", tmp_path, student_of(base), tokenizer=tokenizer, **options)


def test_arguments_that_the_command_line_hands_to_both_models_are_accepted(tokenizer, tmp_path, base):
    shared = {"trust_remote_code": False, "attn_implementation": "sdpa"}
    options = {"teacher_adapter": "base", "teacher_model_init_kwargs": shared}
    make("amm", tmp_path, student_of(base), tokenizer=tokenizer, **options)


@pytest.mark.parametrize("lora", [{"init_lora_weights": "pissa"}, {"bias": "all"}, {"target_modules": ["q_proj"]}])
def test_adapter_that_changes_the_base_raises(lora, tokenizer, tmp_path, base):
    """Without the adapter, its base would be another model than the teacher is meant to be, without a word."""
    student = student_of(base, **lora)
    if len(lora) == 1 and "target_modules" in lora:
        student.get_base_model().model.norm.weight.requires_grad_(True)
    message = next(
        (f"an adapter has `{name}` '{lora[name]}'" for name in lora if name != "target_modules"), "is trained"
    )
    with pytest.raises(ValueError, match=f"{message}.* the base under the adapters is then not the model"):
        make("amm", tmp_path, student, tokenizer=tokenizer, teacher_adapter="base")
    if message == "is trained":
        return
    student.save_pretrained(tmp_path / "adapter")
    other = student_of(base)
    before = weights(other)
    with pytest.raises(ValueError, match=message):
        make("amm", tmp_path, other, tokenizer=tokenizer, teacher_adapter=str(tmp_path / "adapter"))
    assert same(weights(other), before), "it is refused before it is loaded"


def test_teacher_s_trained_tokens_of_a_tied_head_are_its_own(tokenizer, tmp_path):
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    base = make_model("llama", len(tokenizer), tied=True, seed=1, **ids)
    student_of(base, seed=8, trainable_token_indices=[5, 6]).save_pretrained(tmp_path / "adapter")
    teacher = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    expected = step("amm", tmp_path / "1", student_of(base), teacher, tokenizer=tokenizer)
    options = {"teacher_adapter": str(tmp_path / "adapter")}
    assert_same(step("amm", tmp_path / "2", student_of(base), tokenizer=tokenizer, **options), expected)
    student = student_of(base, trainable_token_indices=[5])
    student_of(base).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="the student trains single tokens .* PEFT loads no adapter without them"):
        make("amm", tmp_path, student, tokenizer=tokenizer, teacher_adapter=str(tmp_path / "plain"))


def test_adapter_of_another_base_raises(tokenizer, tmp_path, base):
    _, wide = pair(tokenizer)
    student_of(wide).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="does not fit the student's base: size mismatch"):
        make("amm", tmp_path, student_of(base), tokenizer=tokenizer, teacher_adapter=str(tmp_path / "adapter"))


def test_base_as_teacher_of_a_student_without_adapter_raises(tokenizer, tmp_path, base):
    with pytest.raises(ValueError, match="the student has no adapter: it is trained as a whole"):
        make("amm", tmp_path, base, tokenizer=tokenizer, teacher_adapter="base")


def test_dskd_refuses_to_align_a_base_with_itself(tokenizer, tmp_path, base):
    with pytest.raises(ValueError, match="`alignment` is 'cma' with a `teacher_adapter`"):
        make("dskd", tmp_path, student_of(base), tokenizer=tokenizer, teacher_adapter="base", alignment="cma")


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc, which Linux has")
@METHODS
def test_base_as_teacher_takes_the_memory_of_one_model(method, tokenizer, tmp_path):
    """In a fresh process: well below two models; and, for one method, a whole model less than with a copy of it."""
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = make_model("llama", len(tokenizer), hidden_size=1024, layers=12, **ids)
    size = sum(parameter.nbytes for parameter in model.parameters()) / 2**20  # MiB
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    del model
    peaks = {}
    for source in ("base", "copy")[: 2 if method == "amm" else 1]:
        folders = [str(tmp_path / "model"), str(tmp_path / "out")]
        command = [sys.executable, "-m", "tests.trainer.peak_worker", method, source, *folders]
        environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        peaks[source] = float(result.stdout.split()[-1])
    assert size > 300
    assert peaks["base"] < 1.6 * size, peaks
    if "copy" in peaks:
        assert 0.9 * size < peaks["copy"] - peaks["base"] < 1.15 * size, peaks

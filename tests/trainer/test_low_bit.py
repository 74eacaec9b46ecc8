"""Students in few bits, on a CPU: QLoRA trains, resumes and is exported; adapters of every kind; small optimizers."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.tiny import make_model
from tests.trainer.dual import dual_config
from tests.trainer.runs import config, logged, same, state_of, tiny_dataset, weights
from tests.trainer.sparse import sparse_config
from trl_kd import AMMTrainer, DSKDTrainer, SparseTDTrainer
from trl_kd.modules.lm_head import LMHead, check_head, last_hidden_states
from trl_kd.scripts.export import ExportArguments, export


bitsandbytes = pytest.importorskip("bitsandbytes", reason="the `quantization` extra is not installed")

# Trainer, configuration, and what gives it parts of its own to train, save and restore
METHODS = {
    "amm": (AMMTrainer, config, {"critic": "value_head"}),
    "dskd": (DSKDTrainer, dual_config, {}),
    "sparse-td": (SparseTDTrainer, sparse_config, {"chi2_alpha": 0.5, "target_ema": 0.9}),
}
NUMBERS = ("loss", "grad_norm", "learning_rate", "kd/on_policy/distinct_2")
# The EOS, and two of the prompts'
TOKENS = [2, 281, 286]
IDS = torch.randint(0, 384, (3, 30), generator=torch.Generator().manual_seed(5))
# Merging sums in another order; two layers of large weights keep five of float32's seven digits
CLOSE = 1e-4


@pytest.fixture(scope="module")
def paths(tokenizer, tmp_path_factory):
    """A student, one with tied embeddings, and a teacher, as wide as blocks of 4-bit weights ask for."""
    found = {}
    for name, seed, tied in (("untied", 1, False), ("tied", 1, True), ("teacher", 2, False)):
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        model = make_model("llama", len(tokenizer), hidden_size=128, seed=seed, tied=tied, **ids)
        found[name] = str(tmp_path_factory.mktemp(name))
        for part in (model, tokenizer):
            part.save_pretrained(found[name])
    return found


def quantisation(bits):
    if bits is None:
        return None
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {}
    return BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, **options)


def make(method, paths, folder, bits=4, student="untied", adapter=None, **overrides):
    """A trainer of an adapter with dropout, on sampled rollouts and data: everything that draws."""
    trainer_class, settings, own = METHODS[method]
    adapter = {"r": 4, "lora_dropout": 0.2, "target_modules": "all-linear"} if adapter is None else adapter
    options = {"max_steps": 2, "lmbda": 0.5, "per_device_train_batch_size": 2} | own
    return trainer_class(
        paths[student],
        paths["teacher"],
        settings(folder, **(options | overrides)),
        tiny_dataset(),
        quantization_config=quantisation(bits),
        peft_config=LoraConfig(**adapter),
    )


def logits_of(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def distance(expected, found):
    """Largest difference as a share of the largest logit."""
    return ((expected - found).abs().max() / expected.abs().max()).item()


@contextmanager
def in_float32(model):
    """TRL trains QLoRA's adapters in bfloat16, and PEFT rounds to it what they read; the same numbers without that."""
    trained = {p: p.dtype for p in model.parameters() if p.requires_grad}
    for parameter in trained:
        parameter.data = parameter.data.float()
    yield
    for parameter, dtype in trained.items():
        parameter.data = parameter.data.to(dtype)


def trained_logits(trainer):
    with in_float32(trainer.model):
        return logits_of(trainer.model)


def exported(folder, output, **options):
    """Logits of the full model that `trl-kd export` makes of an adapter."""
    export(ExportArguments(str(folder), str(output), **options))
    return logits_of(AutoModelForCausalLM.from_pretrained(output))


@pytest.fixture(
    scope="module", params=[(name, bits) for name in METHODS for bits in (4, 8)], ids=lambda p: f"{p[0]}-{p[1]}"
)
def run(request, paths, tmp_path_factory):
    """A run of four steps with checkpoints; its trainer, and all weights before it."""
    method, bits = request.param
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "train_sampling_strategy": "random"}
    saving |= {"lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2}
    folder = tmp_path_factory.mktemp("run")

    def again():
        return make(method, paths, folder, bits, **saving)

    trainer = again()
    before = weights(trainer.model)
    trainer.train()
    trainer.save_model()
    return bits, trainer, before, state_of(trainer), again


def test_qlora_trains_the_adapter_and_leaves_the_base(run):
    bits, trainer, before, _, _ = run
    layer = trainer.model.get_decoder().layers[0].mlp.up_proj
    assert layer.weight.dtype == {4: torch.uint8, 8: torch.int8}[bits]
    now = trainer.model.state_dict()
    assert {name for name in now if not torch.equal(now[name], before[name])} == {n for n in now if "lora_" in n}
    assert len(set(logged(trainer, "loss"))) == 4
    assert all(norm > 0 for norm in logged(trainer, "grad_norm"))


def test_qlora_resumed_run_equals_the_uninterrupted_one(run):
    _, trainer, _, state, again = run
    resumed = again()
    resumed.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-2"))
    for name in NUMBERS:
        assert logged(resumed, name) == logged(trainer, name), name
    for part, expected in zip(state_of(resumed), state, strict=True):
        assert same(part, expected)


def test_qlora_export_has_the_logits_of_the_trained_model(run, paths, tmp_path):
    bits, trainer, _, _, _ = run
    trained = trained_logits(trainer)
    found = exported(trainer.args.output_dir, tmp_path / "out", **{f"load_in_{bits}bit": True})
    if bits == 4:
        assert distance(trained, found) < CLOSE
        return
    # In 8 bits the activations are rounded too, as no full model does: the same weights without that
    plain = AutoModelForCausalLM.from_pretrained(paths["untied"])
    for name, layer in trainer.model.get_base_model().named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            own = plain.get_submodule(name.removesuffix(".base_layer")).weight
            own.data = layer.weight.data.float() * layer.state.SCB[:, None] / 127
    expected = logits_of(PeftModel.from_pretrained(plain, trainer.args.output_dir))
    assert distance(expected, found) < CLOSE < distance(trained, found) < 0.5


# What is trained beside or in place of the linear layers: settings of the adapter, the student, its bits
ADAPTERS = {
    "dora": ({"target_modules": "all-linear", "use_dora": True}, "untied", 4),
    "dora in 8 bits": ({"target_modules": "all-linear", "use_dora": True}, "untied", 8),
    "head in full": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "untied", 4),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "untied", 4),
    "tied embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "tied", None),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": TOKENS}, "untied", None),
    "tied tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": TOKENS}, "tied", 4),
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("method", METHODS)
def test_adapter_trains_alone_and_is_exported(paths, tmp_path, method, name):
    adapter, student, bits = ADAPTERS[name]
    trainer = make(method, paths, tmp_path / "run", bits, student, adapter)
    before = weights(trainer.model)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    trainer.train()
    trainer.save_model()
    now = trainer.model.state_dict()
    # The tied head shows the tokens that the embeddings train under a name of its own
    changed = {name for name in now if not torch.equal(now[name], before[name])}
    assert trained <= changed and all("lora_" in n or "modules_to_save" in n or "token_adapter" in n for n in changed)
    found = exported(tmp_path / "run", tmp_path / "out", load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    # In 8 bits the activations are rounded to one of 255 values in each layer
    assert distance(trained_logits(trainer), found) < (0.3 if bits == 8 else CLOSE)


@pytest.mark.parametrize("indices", [TOKENS, {"lm_head": [2, 281]}])
@pytest.mark.parametrize("student", ["tied", "untied"])
def test_head_with_trained_tokens_computes_and_teaches_as_the_model_does(paths, student, indices):
    """PEFT's wrapper around such a head answers for its weight only, and a new adapter changes nothing yet."""
    model = AutoModelForCausalLM.from_pretrained(paths[student])
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=indices))
    generator = torch.Generator().manual_seed(1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    check_head(model, "student")
    ids = torch.tensor([[2, 5, 281, 7, 286]])
    expected = torch.autograd.grad(model(input_ids=ids).logits.square().mean(), trained)
    found = torch.autograd.grad(LMHead.of(model)(last_hidden_states(model, input_ids=ids)).square().mean(), trained)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("adapter", [{"target_modules": ["q_proj", "lm_head"]}, {"ensure_weight_tying": True}])
@pytest.mark.parametrize("method", METHODS)
def test_adapter_on_the_head_is_refused_with_the_reason(paths, tmp_path, method, adapter):
    settings = {"target_modules": ["q_proj", "embed_tokens"]} | adapter
    with pytest.raises((ValueError, NotImplementedError)) as error:
        make(method, paths, tmp_path, None, "tied", settings)
    for text in ("head", "adapter would", "never be trained", "target_modules"):
        assert text in str(error.value)


@pytest.mark.parametrize("method", METHODS)
def test_checkpointed_activations_give_the_same_gradients(paths, tmp_path, method):
    """With rollouts between the steps, which switch it off and on again; without dropout, which would draw anew."""
    runs = []
    for on in (False, True):
        adapter = {"r": 4, "target_modules": "all-linear"}
        trainer = make(method, paths, tmp_path, adapter=adapter, gradient_checkpointing=on, temperature=0.0, lmbda=1.0)
        trainer.train()
        assert trainer.model.is_gradient_checkpointing == on
        runs.append(trainer)
    assert logged(runs[1], "loss") == pytest.approx(logged(runs[0], "loss"), rel=1e-5)
    assert logged(runs[1], "grad_norm") == pytest.approx(logged(runs[0], "grad_norm"), rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_stays_near_float32(paths, tmp_path, method):
    norms, losses = [], []
    options = {"adapter": {"r": 4, "target_modules": "all-linear"}, "lmbda": 0.0}
    options |= {"preset": "v1"} if method == "dskd" else {}  # the others' labels and gates jump with a rounding
    for on in (False, True):
        trainer = make(method, paths, tmp_path, bf16=on, **options)
        trainer.train()
        assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.bfloat16}  # as TRL has it
        norms.append(logged(trainer, "grad_norm")[0])
        losses.append(logged(trainer, "loss")[0])
    # Eight bits of fraction, through two layers of large weights
    assert losses[1] != losses[0] and losses[1] == pytest.approx(losses[0], rel=0.03)
    assert norms[1] == pytest.approx(norms[0], rel=0.15)


@pytest.mark.parametrize(("name", "expected"), [("adamw_8bit", False), ("paged_adamw_8bit", True)])
@pytest.mark.parametrize("method", METHODS)
def test_optimizer_in_8_bits_is_the_one_that_was_asked_for_and_resumes(paths, tmp_path, method, name, expected):
    """bitsandbytes keeps 8 bits from 4096 elements on; pages need a GPU, and on a CPU are left out with a warning."""

    def again():
        adapter = {"r": 32, "target_modules": ["up_proj"]}
        saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "optim": name}
        return make(method, paths, tmp_path, adapter=adapter, **saving)

    trainer = again()
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer).__module__.startswith("bitsandbytes") and optimizer.is_paged == expected
    states = list(optimizer.state.values())
    assert states and all(state["state1"].dtype == state["state2"].dtype == torch.uint8 for state in states)
    resumed = again()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert logged(resumed, "loss") == logged(trainer, "loss")
    assert same(weights(resumed.model), weights(trainer.model))


def test_adapter_names_the_base_that_export_merges_it_into(run, paths):
    _, trainer, _, _, _ = run
    saved = json.loads((Path(trainer.args.output_dir) / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == paths["untied"]

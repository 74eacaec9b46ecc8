import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Gemma3TextConfig, LlamaConfig

from tests.checks.memory_worker import CASES, ENVIRONMENT, planned_run
from trl_kd import AMMConfig, DSKDConfig, SparseTDConfig
from trl_kd.checks import activations
from trl_kd.checks.activations import (
    LiveBytes,
    LossCall,
    StepShape,
    generation_marks,
    inference_marks,
    training_marks,
)
from trl_kd.checks.memory import FRAGMENTED_SHARE, RESERVE_BYTES, PlannedRun, plan_memory
from trl_kd.checks.methods import StepFacts, workspace
from trl_kd.checks.weights import ModelPlan, Trained, Weights, optimizer_bytes, weights_of
from trl_kd.losses import Term, entropy, exact_moment, linear_loss, top1_agreement, total_variation
from trl_kd.modules import LMHead


V, H, LAYERS, INNER, HEADS, KV_HEADS, HEAD_DIM = 96, 32, 6, 48, 4, 2, 8
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
CALL = LossCall(workspace=1000, dtype=torch.float32)


def llama(**options):
    return LlamaConfig(
        **{
            "vocab_size": V,
            "hidden_size": H,
            "intermediate_size": INNER,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
            **options,
        }
    )


def planned(tmp_path, config=AMMConfig, method="amm", **options):
    facts = {
        "student": llama(),
        "teacher": llama(hidden_size=64, num_hidden_layers=3),
        "student_dtype": torch.float32,
        "teacher_dtype": torch.float32,
        "device_type": "cpu",
    }
    names = PlannedRun.__dataclass_fields__
    facts |= {name: options.pop(name) for name in list(options) if name in names}
    defaults = {"per_device_train_batch_size": 4, "max_length": 64, "max_completion_length": 16, "use_cpu": True}
    args = config(output_dir=str(tmp_path), report_to=[], **(defaults | options))
    return PlannedRun(method=method, args=args, **facts)


def size_of(model):
    return sum(tensor.numel() * tensor.itemsize for tensor in (*model.parameters(), *model.buffers()))


# Weights


@pytest.mark.parametrize("tied", [False, True])
def test_weights_of_full_model_are_those_of_a_real_one(tied):
    config = llama(tie_word_embeddings=tied)
    weights = weights_of(ModelPlan(config, torch.bfloat16))
    real = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert weights.bytes == size_of(real)
    assert weights.trained_bytes == 2 * sum(p.numel() for p in real.parameters())
    assert (weights.rows, weights.width, weights.head) == (V, H, 2 * V * H)


def test_weights_of_teacher_are_frozen():
    weights = weights_of(ModelPlan(llama(), torch.float32, is_trained=False))
    assert weights.trained == () and weights.bytes == size_of(AutoModelForCausalLM.from_config(llama()))


def test_weights_of_lora_count_an_adapter_in_float32():
    weights = weights_of(ModelPlan(llama(), torch.bfloat16, peft_config=LORA))
    # r (in + out) of q, k, v, o, gate, up and down
    sizes = [(H, H), (H, 16), (H, 16), (H, H), (H, INNER), (H, INNER), (INNER, H)]
    assert weights.has_adapter
    assert weights.trained_bytes == LAYERS * 4 * 4 * sum(a + b for a, b in sizes)
    assert weights.frozen == size_of(AutoModelForCausalLM.from_config(llama(), dtype=torch.bfloat16))


@pytest.mark.parametrize("double_quant", [False, True])
def test_weights_of_qlora_in_4_bit_by_hand(double_quant):
    plan = ModelPlan(llama(), torch.bfloat16, 4, double_quant, LORA)
    weights, plain = weights_of(plan), weights_of(ModelPlan(llama(), torch.bfloat16, peft_config=LORA))
    numel = H * (H + 16 + 16 + H + 3 * INNER)
    linear = [H * H, H * 16, H * 16, H * H] + 3 * [H * INNER]
    scales = [size // 64 for size in linear]
    taken = sum(s + 4 * -(-s // 256) for s in scales) if double_quant else 4 * sum(scales)
    assert plain.frozen - weights.frozen == LAYERS * (2 * numel - numel // 2 - taken)
    assert weights.trained_bytes == plain.trained_bytes // 2  # SFTTrainer casts it to bfloat16


@pytest.mark.parametrize(("bits", "double_quant"), [(4, False), (4, True), (8, False)])
def test_weights_of_quantised_models_are_those_of_bitsandbytes(bits, double_quant, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = llama(hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    options = {"load_in_4bit": bits == 4, "load_in_8bit": bits == 8, "bnb_4bit_use_double_quant": double_quant}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32
    )
    real = size_of(model)
    for module in model.modules():
        if bits == 4 and "Linear4bit" in type(module).__name__:
            state = module.weight.quant_state
            real += state.absmax.numel() * state.absmax.itemsize
            real += state.state2.absmax.numel() * state.state2.absmax.itemsize if double_quant else 0
        elif bits == 8 and "Linear8bitLt" in type(module).__name__:
            real += module.weight.SCB.numel() * 4
    planned = weights_of(ModelPlan(config, torch.float32, bits, double_quant, is_trained=False))
    assert planned.bytes == real


# Optimizers


def test_optimizer_bytes_of_adamw_are_those_of_the_real_one():
    parameters = [torch.nn.Parameter(torch.ones(7, 5)), torch.nn.Parameter(torch.ones(11, dtype=torch.bfloat16))]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    trained = tuple(Trained(p.numel(), p.itemsize, False) for p in parameters)
    assert optimizer_bytes("adamw_torch_fused", trained, "cpu").states == sum(s.numel() * s.itemsize for s in states)


def test_optimizer_bytes_by_hand():
    trained = (Trained(2**20, 4, False), Trained(2**20, 4, True), Trained(100, 4, False))
    large, small = 2**20, 100

    def sizes(name, device="cuda"):
        found = optimizer_bytes(name, trained, device)
        return found.states, found.pageable, found.step

    in_8bit = 2 * (large + 4 * large // 256)  # two states, with a scale for 256 values
    in_32bit = 8 * large + 8 * small  # the embedding's, and of what has less than 4,096 values
    assert sizes("adamw_torch_fused") == (8 * (2 * large + small), 0, 0)
    assert sizes("adamw_torch") == (8 * (2 * large + small), 0, 4 * (2 * large + small))
    assert sizes("adamw_torch", "cpu")[2] == 2 * 4 * large
    assert sizes("adamw_8bit") == (in_8bit + in_32bit, 0, 0) == sizes("adamw_bnb_8bit")
    assert sizes("paged_adamw_8bit") == (8 * small, in_8bit + 8 * large, 0)
    assert sizes("paged_adamw_32bit") == (8 * small, 16 * large, 0)
    assert sizes("lion_8bit") == (large + 4 * large // 256 + 4 * large + 4 * small, 0, 0)
    assert sizes("sgd")[0] == 0 and sizes("rmsprop")[0] == 4 * (2 * large + small)
    assert sizes("ademamix_8bit")[0] == 3 * (large + 4 * large // 256) + 12 * large + 12 * small


# Activations


def test_live_bytes_forgets_what_is_freed_and_keeps_the_peak():
    live = LiveBytes()
    with live:
        first = torch.empty(1000)
        view = first[10:]
        with live.named("other"):
            second = torch.empty(3000)
        del first
        assert live.live == {"activations": 4000, "other": 12_000}  # the view holds the storage
        del view, second
        live.rename(kept := torch.empty(10), "other")
    assert live.mark() == {"activations": 4000, "other": 12_000}
    assert live.mark() == {"activations": 0, "other": 4 * kept.numel()}


def shape(**options):
    return StepShape(**{"batch": 2, "length": 32, "tokens": 62, "calls": (CALL,), **options})


CHECKPOINTED = {"checkpointing": ()}


@pytest.mark.parametrize(
    ("plan", "step"),
    [
        (ModelPlan(llama(), torch.float32), shape()),
        (ModelPlan(llama(), torch.float32), shape(**CHECKPOINTED, accumulates=True, autocast=True)),
        (ModelPlan(llama(), torch.bfloat16, peft_config=LORA), shape(**CHECKPOINTED, autocast=True)),
        (ModelPlan(llama(), torch.bfloat16, 4, True, LORA), shape(autocast=True, accumulates=True)),
    ],
    ids=["full", "checkpointed", "lora", "qlora"],
)
def test_marks_of_few_layers_give_those_of_all(plan, step, monkeypatch):
    extended = training_marks(plan, step)
    monkeypatch.setattr(activations, "_KNOWN", {})
    monkeypatch.setattr(activations, "_few_layers", lambda plan, has_cache: (99, 99))
    whole = training_marks(plan, step)
    peaks = [max(sum(sizes.values()) for sizes in marks.values()) for marks in (extended, whole)]
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01)
    assert extended["loss"]["activations"] == pytest.approx(whole["loss"]["activations"], rel=1e-3)


def test_training_marks_keep_what_autograd_saves():
    """The activations at the loss are the tensors that a real forward saves, weights aside, and the states."""
    config = llama()
    model = AutoModelForCausalLM.from_config(config).train()
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids, mask = torch.ones(2, 32, dtype=torch.long), torch.ones(2, 32, dtype=torch.long)
    mask[0, 0] = 0  # a padded batch, whose mask is kept
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1).logits.sum()
    marks = training_marks(ModelPlan(config, torch.float32), shape())
    assert marks["loss"]["activations"] == pytest.approx(sum(saved.values()), rel=0.05)


def test_training_marks_end_with_all_gradients():
    marks = training_marks(ModelPlan(llama(), torch.float32), shape(accumulates=True))
    gradients = weights_of(ModelPlan(llama(), torch.float32)).trained_bytes
    assert {sizes["gradients"] for sizes in marks.values()} == {gradients}
    # The head's own is made with the loss
    assert marks["loss"]["loss workspace"] == 1000 + 4 * V * H + 4 * 62 * H


def test_frozen_head_has_no_gradient_in_the_loss():
    marks = training_marks(ModelPlan(llama(), torch.float32, peft_config=LORA), shape())
    assert marks["loss"]["loss workspace"] == 1000 + 4 * 62 * H


def test_checkpointing_keeps_one_state_per_layer():
    plain = training_marks(ModelPlan(llama(), torch.float32), shape())["loss"]["activations"]
    kept = training_marks(ModelPlan(llama(), torch.float32), shape(**CHECKPOINTED))["loss"]["activations"]
    deeper = ModelPlan(llama(num_hidden_layers=LAYERS + 10), torch.float32)
    assert training_marks(deeper, shape(**CHECKPOINTED))["loss"]["activations"] - kept == 10 * 4 * 2 * 32 * H
    assert kept < plain / 4


def test_sdpa_materialises_no_square_of_scores_and_eager_does():
    def activations_at(length, attention):
        plan = ModelPlan(llama(), torch.float32, attention=attention)
        return training_marks(plan, shape(length=length, tokens=length))["loss"]["activations"]

    # Of an attention that is written out, scores and their softmax: 4 B heads S^2 bytes per layer, at least
    scores = LAYERS * 4 * 2 * HEADS * (128**2 - 64**2)
    grown = {name: activations_at(128, name) - activations_at(64, name) for name in ("sdpa", "eager")}
    assert grown["eager"] - grown["sdpa"] > 0.7 * scores


def test_autocast_keeps_bfloat16_copies_of_trained_float32_weights():
    plan = ModelPlan(llama(), torch.float32)
    marks = {on: training_marks(plan, shape(autocast=on, checkpointing=())) for on in (False, True)}
    numel = sum(part.numel for part in weights_of(plan).trained)
    grown = marks[True]["loss"]["activations"] - marks[False]["loss"]["activations"]
    assert grown == pytest.approx(2 * (numel - 2 * V * H), rel=0.1)  # neither the embedding's nor the head's


def test_generation_marks_have_the_whole_cache():
    marks = generation_marks(ModelPlan(llama(), torch.float32, is_trained=False), 3, 20, 30, False)
    per_token = 2 * LAYERS * KV_HEADS * HEAD_DIM * 4
    assert marks["prefill"]["KV cache"] == 3 * 20 * per_token
    assert marks["decode"]["KV cache"] == 3 * 30 * per_token


def test_generation_marks_of_sliding_layers_keep_their_window():
    config = Gemma3TextConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=INNER,
        num_hidden_layers=12,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        sliding_window=8,
    )
    assert config.layer_types.count("full_attention") == 2
    marks = generation_marks(ModelPlan(config, torch.float32, is_trained=False), 3, 20, 30, False)
    per_token = 2 * KV_HEADS * HEAD_DIM * 4
    # A step attends to the window; what is kept of it may lie in a tensor with one more
    assert marks["decode"]["KV cache"] == pytest.approx(3 * per_token * (2 * 30 + 10 * 8), rel=0.05)


def test_inference_keeps_a_few_states_only():
    marks = {n: inference_marks(ModelPlan(llama(num_hidden_layers=n), torch.float32), 2, 32, False) for n in (6, 60)}
    assert marks[60]["forward"] == marks[6]["forward"]
    assert 2 * 4 * 2 * 32 * H <= marks[6]["forward"]["activations"] <= 20 * 4 * 2 * 32 * H


# The loss


class RealBytes(LiveBytes):
    """The same count for tensors with numbers in them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize(("autocast", "loss_chunk_size"), [(False, None), (True, None), (False, 128)])
def test_workspace_is_that_of_the_real_loss(autocast, loss_chunk_size, tmp_path):
    rows, vocab_size, widths = 600, 4096, (64, 128)
    pairs, live = {}, RealBytes()
    with live, live.named("weights"):
        for name, width in zip(("student", "teacher"), widths, strict=True):
            weight = torch.randn(vocab_size, width, requires_grad=name == "student")
            pairs[name] = torch.randn(rows, width, requires_grad=name == "student"), LMHead(weight)
    terms = {
        "moment": Term(exact_moment, weights=torch.full((rows,), 1 / rows)),
        "total_variation": Term(total_variation),
        "top1_agreement": Term(top1_agreement),
        "student_entropy": Term(entropy, ("student",)),
        "teacher_entropy": Term(entropy, ("teacher",)),
    }
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), live:
        linear_loss(pairs, terms, chunk_size=loss_chunk_size)
    heads = [Weights(0, (), False, vocab_size, width, torch.float32, 0) for width in widths]
    args = planned(tmp_path, bf16=autocast, loss_chunk_size=loss_chunk_size).args
    facts = StepFacts(args, *heads, rows, 1, "cpu")
    dtype = torch.bfloat16 if autocast else torch.float32
    gradients = vocab_size * widths[0] * 4 + rows * widths[0] * dtype.itemsize
    measured = live.mark()["activations"] - gradients
    # The plan has 14 buffers of half a MiB for the blocks, of which these terms take 11, in bfloat16 all
    assert workspace(facts, heads, rows) == pytest.approx(measured, abs=3.5 * 2**19)


# Plans


def test_plan_of_full_fine_tuning_has_every_component(tmp_path):
    plan = plan_memory(planned(tmp_path, lmbda=0.0, gradient_checkpointing=False, gradient_accumulation_steps=2))
    student, teacher = (AutoModelForCausalLM.from_config(c) for c in (llama(), planned(tmp_path).teacher))
    trained = 4 * sum(p.numel() for p in student.parameters())
    assert plan.phase == "student" and plan.peak == sum(plan.components.values()) == plan.phases["student"]
    assert plan.components["weights"] == size_of(student) and plan.components["teacher"] == size_of(teacher)
    assert plan.components["gradients"] == trained and plan.components["optimizer"] == 2 * trained
    assert set(plan.phases) == {"loading", "rollout", "teacher", "student", "optimizer"}
    assert plan.phases["loading"] == size_of(student) + size_of(teacher)
    assert plan.phases["optimizer"] >= plan.phases["loading"] + 3 * trained


def test_plan_of_a_teacher_pass_has_the_gradients_of_earlier_micro_batches(tmp_path):
    phases = [plan_memory(planned(tmp_path, lmbda=0.0, gradient_accumulation_steps=n)).phases for n in (1, 2)]
    trained = 4 * sum(p.numel() for p in AutoModelForCausalLM.from_config(llama()).parameters())
    assert phases[1]["teacher"] - phases[0]["teacher"] == trained


@pytest.mark.parametrize(
    ("options", "teacher"),
    [
        ({"teacher_device": "cpu"}, 4 * V * 64),
        ({"teacher_device": "offload"}, 4 * V * 64),
        ({"teacher_adapter": "base", "teacher": None}, 0),
        ({"teacher_cache": "folder", "teacher": None, "lmbda": 0.0}, 0),
        ({"num_teachers": 2}, 2),
        ({}, 1),
    ],
    ids=["other device", "offloaded", "own base", "cache", "two", "one"],
)
def test_plan_counts_the_teacher_where_it_is(tmp_path, options, teacher):
    run = planned(tmp_path, **{"peft_config": LORA, "device_type": "cuda", "bf16": False, **options})
    plan = plan_memory(run)
    whole = size_of(AutoModelForCausalLM.from_config(planned(tmp_path).teacher))
    expected = teacher * whole if teacher in (1, 2) else teacher
    assert plan.components.get("teacher", 0) == expected
    assert plan.host == (whole if run.args.teacher_device else 0)


def test_plan_of_saved_teacher_adapter_counts_it(tmp_path):
    plan = plan_memory(planned(tmp_path, peft_config=LORA, teacher=None, teacher_adapter="folder"))
    assert plan.components["teacher"] == plan.components["adapter"] > 0


def test_plan_on_a_cpu_has_every_weight_and_no_reserve(tmp_path):
    here = plan_memory(planned(tmp_path, teacher_device="offload"))
    assert here.components["teacher"] > 4 * V * 64 and here.host == 0 and "reserve" not in here.components


def test_plan_on_a_gpu_has_a_reserve(tmp_path):
    plan = plan_memory(planned(tmp_path, device_type="cuda", bf16=False))
    resident = sum(plan.components[name] for name in ("weights", "optimizer", "teacher"))
    moving = plan.peak - resident - plan.components["reserve"]
    assert plan.components["reserve"] == RESERVE_BYTES + round(FRAGMENTED_SHARE * moving)


def test_plan_of_rollouts_follows_their_number(tmp_path):
    def rollout(**options):
        options = {"gradient_accumulation_steps": 4, "max_completion_length": 48} | options
        plan = plan_memory(planned(tmp_path, **options))
        return plan.phases["rollout"] - plan.phases["loading"]

    everything, a_quarter = rollout(lmbda=1.0), rollout(lmbda=1.0, rollout_batch_size=4)
    states = rollout(lmbda=0.0)
    assert everything - states == pytest.approx(4 * (a_quarter - states), rel=0.1)
    assert rollout(lmbda=0.5) - states == pytest.approx(2 * (a_quarter - states), rel=0.1)
    # A wider teacher that writes takes more than the student
    assert rollout(lmbda=0.5, teacher_writes=True) > rollout(lmbda=0.5)


def test_plan_of_rows_follows_completions(tmp_path):
    run = {"longest": 64, "longest_prompt": 50, "max_completion_length": 40}
    on, off = (plan_memory(planned(tmp_path, lmbda=lmbda, **run)).phases["teacher"] for lmbda in (0.5, 0.0))
    as_long = plan_memory(planned(tmp_path, lmbda=0.0, **(run | {"longest": 90}))).phases["teacher"]
    assert on == as_long > off


def test_plan_of_fewer_trained_tokens_has_smaller_logits(tmp_path):
    many, few = (plan_memory(planned(tmp_path, lmbda=0.0, trained_tokens=n)).phases["student"] for n in (None, 8))
    # 4 * 63 or 4 * 8 rows of logits of both models
    assert many - few >= 4 * (63 - 8) * 2 * V * 4


def test_plan_of_learned_critics_follows_their_head(tmp_path):
    def critic(**options):
        return plan_memory(planned(tmp_path, critic="value_head", **options)).components["critic"]

    assert critic(critic_head="full") == 2 * 16 * V * (64 + H)  # for two sources
    assert critic(critic_head="full", lmbda=0.0) == 16 * V * (64 + H)
    assert critic(critic_head="tied", lmbda=0.0) == 16 * 64 * (64 + H) + 4 * 64 * 64  # and the whitening


def test_plan_of_projectors_follows_the_preset(tmp_path):
    def projectors(**options):
        return plan_memory(planned(tmp_path, DSKDConfig, "dskd", **options)).components["projectors"]

    assert projectors(preset="v1") == 16 * (64 * H + H + H * 64 + 64)  # both ways, with biases
    assert projectors(preset="v2") == 16 * 64 * H + 8 * 64 * 64 + 4 * 64 * H  # and an inverse, and a map
    attention = 16 * (2 * H * 2 * 64 + 2 * 64)
    assert projectors(preset="v1", alignment="cma") == projectors(preset="v1") + attention


def test_plan_of_target_network_has_a_float32_copy(tmp_path):
    run = planned(tmp_path, SparseTDConfig, "sparse-td", target_ema=0.9, student_dtype=torch.bfloat16)
    numel = sum(p.numel() for p in AutoModelForCausalLM.from_config(llama()).parameters())
    assert plan_memory(run).components["target"] == 4 * numel + 2 * numel


def test_plan_of_paged_optimizer_leaves_its_states_out(tmp_path):
    config = llama(vocab_size=4096, hidden_size=64)
    run = planned(tmp_path, optim="paged_adamw_8bit", device_type="cuda", bf16=False, student=config, teacher=config)
    plan, plain = plan_memory(run), plan_memory(planned(tmp_path, student=config, teacher=config, device_type="cuda"))
    numel = 4096 * 64
    assert plan.pageable == 8 * numel + 2 * (numel + 4 * numel // 256)  # embedding in 32 bit, head in 8
    assert plan.components["optimizer"] < plain.components["optimizer"] / 4


def test_plan_of_a_large_teacher_takes_no_memory(tmp_path):
    large = llama(vocab_size=152_000, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28)
    large.num_attention_heads, large.num_key_value_heads, large.head_dim = 28, 4, 128
    before, start = psutil.Process().memory_info().rss, time.process_time()
    plan = plan_memory(planned(tmp_path, teacher=large, student=llama(vocab_size=152_000), device_type="cuda"))
    assert plan.components["teacher"] > 25e9
    assert psutil.Process().memory_info().rss - before < 5e8
    assert time.process_time() - start < 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": None}, "`max_length` is None and the longest row is not known"),
        ({"student_bits": 4}, "`student_bits` is 4 without a `peft_config`"),
        ({"teacher": None}, "`teacher` is None, and so are `teacher_adapter` and `teacher_cache`"),
        ({"method": "other"}, "`method` is 'other', which does not exist. Choose one of amm, dskd, sparse-td."),
    ],
)
def test_plan_says_what_is_missing(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        plan_memory(planned(tmp_path, **options))


# Measured


def is_measurable():
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return "VmHWM:" in Path("/proc/self/status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not is_measurable(), reason="peaks of a process are read from Linux's /proc")
@pytest.mark.parametrize("case", ["full", "lora", "critic"])
def test_plan_is_within_15_percent_of_the_measured_peak(case, tmp_path):
    worker = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.checks.memory_worker", case],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert worker.returncode == 0, worker.stderr[-2000:]
    measured = json.loads(worker.stdout.splitlines()[-1])["peak"]
    plan = plan_memory(planned_run(case, str(tmp_path)))
    assert case in CASES and measured > 150e6
    assert plan.peak == pytest.approx(measured, rel=0.15)

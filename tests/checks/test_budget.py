from dataclasses import replace

import psutil
import pytest
import torch
from peft import LoraConfig

from tests.checks.test_memory import LORA, llama, planned
from trl_kd import DSKDConfig
from trl_kd.checks import budget as subject
from trl_kd.checks.budget import GIB, device_memory, memory_finding, smallest_change
from trl_kd.checks.memory import MemoryPlan, plan_memory


# Large enough that a teacher, an optimizer and a batch are each a visible part of the plan
WIDE = llama(vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=4)
WIDER = llama(vocab_size=1024, hidden_size=256, intermediate_size=1024, num_hidden_layers=8)


@pytest.fixture
def run(tmp_path):
    def make(**options):
        defaults = {"student": WIDE, "teacher": WIDER, "lmbda": 0.0, "gradient_checkpointing": True, "bf16": False}
        return planned(tmp_path, **(defaults | options))

    return make


def enough_for(run, **changed):
    """A budget that this run with these options fits, with nothing to spare."""
    facts = {name: changed.pop(name) for name in list(changed) if name in run.__dataclass_fields__}
    return int(plan_memory(subject._with(run, facts, **changed)).peak / 0.9) + 2


def options(changes):
    return [change.split("`")[1] for change in changes]


def test_device_memory_of_a_cpu_is_what_is_available(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    name, size = device_memory()
    assert name == "CPU" and size == pytest.approx(psutil.virtual_memory().available, rel=0.2)


@pytest.mark.parametrize(("share", "verdict"), [(0.89, "fine"), (0.91, "careful"), (0.99, "careful"), (1.01, "stop")])
def test_memory_finding_verdict_follows_the_share(run, share, verdict):
    run = run()
    finding = memory_finding(run, round(plan_memory(run).peak / share), "a card")
    assert (finding.name, finding.verdict) == ("memory", verdict)
    assert bool(finding.fix) == (verdict != "fine")
    assert f"({share:.0%})" in finding.text and "a card" in finding.text


def test_memory_finding_shows_the_plan(run):
    run = run()
    plan, finding = plan_memory(run), memory_finding(run, 8 * GIB, "a card")
    assert finding.values["peak"] == plan.peak and finding.values["components"] == plan.components
    assert finding.values["phases"] == plan.phases and finding.values["budget"] == 8 * GIB
    lines = [line.split() for line in finding.sample.splitlines()]
    for name, size in (*plan.components.items(), *plan.phases.items()):
        assert [*name.split(), f"{size / GIB:.2f}", "GiB"] in lines


def test_smallest_change_of_a_run_that_fits_is_none(run):
    assert smallest_change(run(), enough_for(run())) == []
    assert smallest_change(run(), enough_for(run()) - 10) != []


def test_smallest_change_splits_the_batch_no_further_than_needed(run):
    run = run(per_device_train_batch_size=16, gradient_accumulation_steps=2, trained_tokens=60)
    limit = enough_for(run, per_device_train_batch_size=4, gradient_accumulation_steps=8)
    assert limit < enough_for(run, per_device_train_batch_size=8, gradient_accumulation_steps=4)
    assert options(smallest_change(run, limit))[0] == (
        "--per_device_train_batch_size 4 --gradient_accumulation_steps 8"
    )


def test_smallest_change_turns_checkpointing_on(run):
    run = run(gradient_checkpointing=False, per_device_train_batch_size=1)
    assert "--gradient_checkpointing true" in options(
        smallest_change(run, enough_for(run, gradient_checkpointing=True))
    )


def test_smallest_change_writes_fewer_rollouts_at_a_time(run):
    run = run(
        lmbda=1.0,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=64,
        max_completion_length=128,
        teacher=None,
        teacher_adapter="base",
        peft_config=LORA,
    )
    assert plan_memory(run).phase == "rollout"
    limit = enough_for(run, rollout_batch_size=16)
    assert options(smallest_change(run, limit))[0] == "--rollout_batch_size 16"


def test_smallest_change_takes_a_small_optimizer_on_a_gpu_alone(run):
    large = llama(vocab_size=32_768, hidden_size=512, intermediate_size=1024, num_hidden_layers=4)
    found = {}
    for device in ("cuda", "cpu"):
        small = run(student=large, teacher=large, device_type=device, optim="adamw_torch_fused")
        limit = enough_for(replace(small, device_type="cuda"), optim="paged_adamw_8bit")
        limit -= 0 if device == "cuda" else plan_memory(replace(small, device_type="cuda")).components["reserve"]
        found[device] = options(smallest_change(small, limit))
    assert "--optim paged_adamw_8bit" in found["cuda"]
    assert not any("8bit" in option and "optim" in option for option in found["cpu"])


def test_smallest_change_makes_the_teacher_smaller_or_puts_it_elsewhere(run):
    large = llama(vocab_size=4096, hidden_size=1024, intermediate_size=4096, num_hidden_layers=16)
    run = run(student=llama(vocab_size=4096), teacher=large, device_type="cuda", teacher_dtype=torch.bfloat16)
    in_8bit, in_4bit = (enough_for(run, teacher_bits=bits) for bits in (8, 4))
    assert in_4bit < in_8bit
    quantised = "--teacher_model_init_kwargs '{{\"load_in_{}bit\": true}}'"
    assert options(smallest_change(run, in_8bit)) == [
        quantised.format(8),
        "--teacher_device offload",
        "--teacher_cache FOLDER",
    ]
    assert options(smallest_change(run, in_4bit))[0] == quantised.format(4)


@pytest.mark.parametrize("why", ["rollouts", "learned critic", "method"])
def test_smallest_change_offers_no_cache_where_none_can_be(run, why):
    different = {
        "rollouts": {"lmbda": 0.5},
        "learned critic": {"critic": "value_head"},
        "method": {"config": DSKDConfig, "method": "dskd"},
    }[why]
    run = run(**different)
    changes = smallest_change(run, plan_memory(run).peak - plan_memory(run).components["teacher"])
    assert not any("teacher_cache" in change for change in changes)


def test_smallest_change_names_several_where_one_is_not_enough(run):
    run = run(gradient_checkpointing=False, per_device_train_batch_size=8)
    both = {"teacher": None, "teacher_cache": "x", "gradient_checkpointing": True}
    limit = enough_for(run, per_device_train_batch_size=1, gradient_accumulation_steps=8, **both)
    (change,) = smallest_change(run, limit)
    assert "--teacher_cache FOLDER" in change and change.count("`--") >= 2


def test_smallest_change_leaves_out_what_others_make_unneeded(run, monkeypatch):
    def plan(run):
        splits, cached = run.args.per_device_train_batch_size < 8, run.teacher is None
        saved = 5 * splits + 30 * run.args.gradient_checkpointing + (30 if cached else 10 * bool(run.teacher_bits))
        return MemoryPlan({}, {"student": 100 - saved})

    monkeypatch.setattr(subject, "plan_memory", plan)
    # On the way there, a batch in parts and a teacher in 8 bit: 60 of the 100 are enough without them
    (change,) = smallest_change(run(gradient_checkpointing=False, per_device_train_batch_size=8), round(45 / 0.9))
    assert options([change])[0] == "--gradient_checkpointing true"
    assert change.count("`--") == 2 and "--teacher_cache FOLDER" in change


def test_smallest_change_comes_near_the_limit_where_nothing_stays_below_it(run, monkeypatch):
    def plan(run):
        return MemoryPlan({}, {"student": 95 if run.args.per_device_train_batch_size < 8 else 120})

    monkeypatch.setattr(subject, "plan_memory", plan)
    (change,) = smallest_change(run(per_device_train_batch_size=8), 100)
    assert options([change])[0].startswith("--per_device_train_batch_size 4") and change.endswith("near the limit")
    # What is near it already has nothing to gain
    assert smallest_change(run(per_device_train_batch_size=4), 100) == []
    finding = memory_finding(run(per_device_train_batch_size=4), 100, "a card")
    assert finding.verdict == "careful" and "watch the first steps" in finding.fix


def test_smallest_change_knows_nothing_for_a_tiny_budget(run):
    run = run()
    assert smallest_change(run, 1000) == []
    finding = memory_finding(run, 1000, "a watch")
    assert finding.verdict == "stop" and "smaller student" in finding.fix


@pytest.mark.parametrize(("critic", "offered"), [("exact", True), ("value_head", False)])
def test_what_no_option_makes_fit_is_offered_a_cache_only_where_it_can_be(run, critic, offered):
    fix = memory_finding(run(lmbda=0.0, critic=critic), 2**10, "a card").fix
    assert "No option makes it fit" in fix and "a smaller teacher" in fix
    assert ("trl-kd cache" in fix) == offered


def test_frozen_weights_in_float32_are_offered_in_bfloat16(run):
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2)
    wide = replace(run(), device_type="cuda", peft_config=lora, student_dtype=torch.float32)
    (change,) = subject._half_weights(wide)
    assert "--dtype bfloat16" in change.options and change.run.student_dtype == torch.bfloat16
    narrow, full = (plan_memory(each).components["weights"] for each in (change.run, wide))
    assert full == pytest.approx(2 * narrow, rel=1e-3)
    assert list(subject._half_weights(replace(wide, peft_config=None))) == []


def test_smallest_change_leaves_the_run_alone(run):
    run = run()
    before = dict(vars(run.args))
    smallest_change(run, enough_for(run) // 2)
    assert vars(run.args) == before and run.teacher_bits is None


def test_vllm_in_this_process_takes_its_share(run):
    run = run(lmbda=0.5, use_vllm=True, vllm_gpu_memory_utilization=0.4)
    limit = plan_memory(run).peak * 2
    assert memory_finding(run, limit, "a card").values["budget"] == round(0.6 * limit)
    server = subject._with(run, vllm_mode="server")
    assert memory_finding(server, limit, "a card").values["budget"] == limit


def test_quantised_student_is_offered_with_an_adapter(run):
    large = llama(vocab_size=1024, hidden_size=1024, intermediate_size=4096, num_hidden_layers=16)
    run = run(student=large, teacher=None, teacher_adapter="base", device_type="cuda", peft_config=LORA)
    run = replace(run, student_dtype=torch.bfloat16)
    limit = enough_for(run, student_bits=4)
    assert options(smallest_change(run, limit))[-1] == "--load_in_4bit true"
    assert isinstance(run.peft_config, LoraConfig)

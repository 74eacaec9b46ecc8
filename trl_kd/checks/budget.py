"""A plan against the memory of a device: whether a run fits, and the smallest change that makes it fit."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from trl_kd.checks.finding import Finding
from trl_kd.checks.memory import MemoryPlan, PlannedRun, plan_memory


# Share of the budget above which a run that fits by its plan may not: the plan is good to 15 %, and much of that is in
# its reserve already
CAREFUL_SHARE = 0.9
# Bytes below which states that may leave are no news
_WORTH_A_WORD = 2**30 // 20
# Cards are sold by it: one of 24 GB has 24 GiB, less what the driver keeps
GIB = 2**30
# Optimizers that keep more than a byte per number
_WIDE_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "paged_adamw_32bit", "adamw_anyprecision")


def device_memory() -> tuple[str, int] | None:
    r"""
    The training device and its memory.

    Returns:
        `tuple[str, int]` or `None`: name and bytes: all that a GPU has, and what is free of the memory of a machine
        without one. `None` for a device that does not say.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    if device.type == "cpu":
        return "CPU", psutil.virtual_memory().available
    if device.type == "mps":
        return "MPS", torch.mps.recommended_max_memory()
    if device.type in ("cuda", "xpu"):
        properties = torch.get_device_module(device.type).get_device_properties(0)
        return properties.name, properties.total_memory
    return None


@dataclass(frozen=True)
class Change:
    r"""
    Something to set, and the run with it.

    Args:
        options (`str`):
            What to write on the command line, with what it means in brackets.
        run ([`PlannedRun`]):
            The run as it is then.
    """

    options: str
    run: PlannedRun


def smallest_change(run: PlannedRun, budget: int) -> list[str]:
    r"""
    The smallest changes that make a run fit, by its plan.

    From what changes nothing but time (a batch in smaller parts, checkpointing) over what is nearly as exact (8-bit
    optimizer, 8-bit teacher) to another way of training.

    Args:
        run ([`PlannedRun`]):
            The run.
        budget (`int`):
            Bytes that it may take.

    Returns:
        `list[str]`: options to set, each enough by itself, in that order; if none is, several options together in one
        string. Empty if the run fits as it is, and if nothing that is known here makes it fit.
    """
    left, peak = _left(run, budget), plan_memory(run).peak
    if peak <= CAREFUL_SHARE * left:
        return []
    if found := _enough(run, CAREFUL_SHARE * left):
        return found
    # Nearly full is better than not at all
    return [f"{options}, which comes near the limit" for options in _enough(run, left)] if peak > left else []


def _enough(run: PlannedRun, limit: float) -> list[str]:
    """Changes that are enough each by itself; else several together."""
    enough = []
    for make in _CHANGES:
        change = next((c for c in make(run) if plan_memory(c.run).peak <= limit), None)
        if change is not None:
            enough.append(change.options)
    return enough or _together(run, limit)


def _together(run: PlannedRun, limit: float) -> list[str]:
    """The shortest beginning of the list of all changes that is enough, without those that it does not need."""
    chosen: list[Any] = []
    changed = run
    for make in _CHANGES:
        steps = list(make(changed))
        peak = plan_memory(changed).peak
        helping = [step for step in steps if plan_memory(step.run).peak < peak]
        if not helping:
            continue
        # The first that is enough, else the furthest
        step = next((s for s in helping if plan_memory(s.run).peak <= limit), helping[-1])
        chosen.append(make)
        changed = step.run
        if plan_memory(changed).peak <= limit:
            return [", ".join(_needed(run, chosen, limit))]
    return []


def _needed(run: PlannedRun, makes: list[Any], limit: float) -> list[str]:
    """Options of these changes, but for those without which the others are enough."""
    for unneeded in makes[:-1]:
        others = [make for make in makes if make is not unneeded]
        if plan_memory(_all_of(run, others, limit)[1]).peak <= limit:
            makes = others
    return _all_of(run, makes, limit)[0]


def _all_of(run: PlannedRun, makes: list[Any], limit: float) -> tuple[list[str], PlannedRun]:
    options = []
    for make in makes:
        steps = list(make(run))
        if not steps:
            continue
        step = next((s for s in steps if plan_memory(s.run).peak <= limit), steps[-1])
        options.append(step.options)
        run = step.run
    return options, run


def memory_finding(run: PlannedRun, budget: int, device_name: str) -> Finding:
    r"""
    Whether a run fits a device.

    Args:
        run ([`PlannedRun`]):
            The run.
        budget (`int`):
            Bytes that the device has.
        device_name (`str`):
            Its name.

    Returns:
        [`Finding`]: fine up to 90 % of the budget, careful up to all of it, else stop. Bytes by component and phase
        are in `values`, a table of them in `sample`.
    """
    plan, left = plan_memory(run), _left(run, budget)
    verdict = "fine" if plan.peak <= CAREFUL_SHARE * left else "careful" if plan.peak <= left else "stop"
    taken = f", of which vLLM leaves {gib(left)}" if left < budget else ""
    text = (
        f"The run takes {gib(plan.peak)} of the {gib(budget)} of {device_name}{taken} ({plan.peak / left:.0%}), most "
        f"of it in the phase '{plan.phase}'."
    )
    if plan.pageable >= _WORTH_A_WORD:
        text += f" The optimizer's states, {gib(plan.pageable)}, go to host memory when they find no room."
    fix = ""
    if verdict != "fine":
        changes = smallest_change(run, budget)
        fix = "Set " + "; or ".join(changes) + "." if changes else _nothing_helps(run)
        if verdict == "careful" and not changes:
            fix = "Close what else uses the device, and watch the first steps."
    values = {
        "peak": plan.peak,
        "budget": left,
        "phase": plan.phase,
        "components": plan.components,
        "phases": plan.phases,
        "pageable": plan.pageable,
        "host": plan.host,
    }
    return Finding("memory", verdict, text, fix, values, _table(plan))


def _nothing_helps(run: PlannedRun) -> str:
    """What is left to do, of what the run can do."""
    smaller = ["a smaller student"]
    if run.teacher is not None:
        smaller.append("a smaller teacher")
        if next(_cached_teacher(run), None) is not None:
            smaller.append("a cache of what it says (`trl-kd cache`)")
    return f"No option makes it fit. Take {', '.join(smaller)} or shorter rows (`--max_length`)."


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.1f} GiB"


def _table(plan: MemoryPlan) -> str:
    """Components of the largest phase, and the peaks of all, as lines of text."""
    width = max(len(name) for name in (*plan.components, *plan.phases, "phase"))
    lines = [f"at the peak ({plan.phase}):"]
    ordered = sorted(plan.components.items(), key=lambda item: -item[1])
    lines += [f"  {name:<{width}}  {size / GIB:>7.2f} GiB" for name, size in ordered]
    lines += ["peak of each phase:"]
    lines += [f"  {name:<{width}}  {size / GIB:>7.2f} GiB" for name, size in plan.phases.items()]
    return "\n".join(lines)


def _left(run: PlannedRun, budget: int) -> int:
    """What a colocated vLLM leaves of the device."""
    args = run.args
    if not args.use_vllm or args.vllm_mode != "colocate" or args.vllm_enable_sleep_mode:
        return budget
    return round((1.0 - args.vllm_gpu_memory_utilization) * budget)


def _with(run: PlannedRun, _facts: dict[str, Any] | None = None, **options: Any) -> PlannedRun:
    """The run with other options, and other facts of the plan."""
    args = copy.copy(run.args)
    vars(args).update(options)
    return replace(run, args=args, **(_facts or {}))


def _split_batch(run: PlannedRun) -> Iterator[Change]:
    args = run.args
    size = args.per_device_train_batch_size
    parts = 2
    while size % parts == 0 and size // parts >= 1:
        new = {
            "per_device_train_batch_size": size // parts,
            "gradient_accumulation_steps": args.gradient_accumulation_steps * parts,
        }
        options = " ".join(f"--{name} {value}" for name, value in new.items())
        yield Change(f"`{options}` (the same step in smaller parts)", _with(run, **new))
        parts *= 2


def _checkpoint(run: PlannedRun) -> Iterator[Change]:
    if not run.args.gradient_checkpointing:
        options = "`--gradient_checkpointing true` (activations are computed twice)"
        yield Change(options, _with(run, gradient_checkpointing=True))


def _fewer_rollouts(run: PlannedRun) -> Iterator[Change]:
    args = run.args
    prompts = args.rollout_batch_size or args.per_device_train_batch_size * args.gradient_accumulation_steps
    while prompts > 1 and (args.lmbda > 0 or args.off_policy_source == "teacher"):
        prompts //= 2
        options = f"`--rollout_batch_size {prompts}` (rollouts take longer)"
        yield Change(options, _with(run, rollout_batch_size=prompts))


def _half_weights(run: PlannedRun) -> Iterator[Change]:
    # Under an adapter they are not trained; the command's default is float32
    if run.device_type == "cuda" and run.peft_config is not None and run.student_dtype == torch.float32:
        options = "`--dtype bfloat16` (the student's frozen weights)"
        yield Change(options, _with(run, {"student_dtype": torch.bfloat16}))


def _small_optimizer(run: PlannedRun) -> Iterator[Change]:
    if run.device_type == "cuda" and run.args.optim in _WIDE_OPTIMIZERS:
        yield Change("`--optim paged_adamw_8bit` (moments in 8 bit)", _with(run, optim="paged_adamw_8bit"))


def _small_teacher(run: PlannedRun) -> Iterator[Change]:
    if run.teacher is None or run.teacher_bits is not None or run.args.teacher_device is not None:
        return
    for bits in (8, 4):
        kwargs = (run.args.teacher_model_init_kwargs or {}) | {f"load_in_{bits}bit": True}
        options = f"`--teacher_model_init_kwargs '{{\"load_in_{bits}bit\": true}}'` (the teacher in {bits} bit)"
        yield Change(options, _with(run, {"teacher_bits": bits}, teacher_model_init_kwargs=kwargs))


def _teacher_elsewhere(run: PlannedRun) -> Iterator[Change]:
    if run.teacher is None or run.device_type == "cpu" or run.args.teacher_device is not None:
        return
    if run.teacher_bits is None:  # quantised weights stay where they are loaded
        options = "`--teacher_device offload` (the teacher waits in CPU memory; slower)"
        yield Change(options, _with(run, teacher_device="offload"))


def _cached_teacher(run: PlannedRun) -> Iterator[Change]:
    args = run.args
    needs_states = run.method == "dskd" or (
        run.method == "amm" and (args.critic == "value_head" or args.on_policy_gradient == "full")
    )
    writes = args.lmbda > 0 or args.off_policy_source == "teacher" or run.teacher_writes
    if run.teacher is None or needs_states or writes or args.packing or run.num_teachers > 1:
        return
    options = "`--teacher_cache FOLDER` (what the teacher says, written before by `trl-kd cache`)"
    yield Change(options, _with(run, {"teacher": None}, teacher_cache="FOLDER"))


def _adapter(run: PlannedRun) -> Iterator[Change]:
    if run.peft_config is None:
        from peft import LoraConfig

        lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=16)
        options = "--use_peft true --lora_target_modules all-linear"
        yield Change(f"`{options}` (LoRA)", _with(run, {"peft_config": lora}))
        if run.device_type == "cuda":
            facts = {"peft_config": lora, "student_bits": 4, "student_dtype": torch.bfloat16}
            yield Change(f"`{options} --load_in_4bit true` (QLoRA)", _with(run, facts))
    elif run.student_bits is None and not run.args.use_vllm:
        facts = {"student_bits": 4, "student_dtype": torch.bfloat16}
        yield Change("`--load_in_4bit true` (QLoRA)", _with(run, facts))


# From what changes least
_CHANGES = (
    _split_batch,
    _checkpoint,
    _fewer_rollouts,
    _half_weights,
    _small_optimizer,
    _small_teacher,
    _teacher_elsewhere,
    _cached_teacher,
    _adapter,
)

"""The memory plan of a run, from the configurations alone: no weights are loaded, and no device is asked."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from trl_kd.checks.activations import (
    Bytes,
    Marks,
    StepShape,
    generation_marks,
    inference_marks,
    training_marks,
)
from trl_kd.checks.methods import Needs, StepFacts, needs_of
from trl_kd.checks.weights import ModelPlan, optimizer_bytes, weights_of


# What a GPU holds besides tensors: the driver's context, libraries' workspaces, compiled kernels. A choice of ours,
# not measured; a card that also draws the screen needs more
RESERVE_BYTES = 3 * 2**28
# Share of what comes and goes that the allocator loses between blocks. Ours as well
FRAGMENTED_SHARE = 0.05


@dataclass(frozen=True)
class PlannedRun:
    r"""
    A run as the memory plan sees it.

    Args:
        method (`str`):
            `"amm"`, `"dskd"` or `"sparse-td"`.
        args ([`KDConfig`]):
            Configuration of the method.
        student ([`~transformers.PretrainedConfig`]):
            The student's architecture.
        teacher ([`~transformers.PretrainedConfig`], *optional*):
            The teacher's; `None` for a cache or a `teacher_adapter`.
        student_dtype (`torch.dtype`):
            Of the student's weights as they are loaded.
        student_bits (`int`, *optional*):
            4 or 8 for a student quantised by bitsandbytes.
        double_quant (`bool`, *optional*, defaults to `False`):
            Whether its scales are quantised too.
        peft_config ([`~peft.PeftConfig`], *optional*):
            The student's adapter; `None` for full fine-tuning.
        teacher_dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`):
            Of the teacher's weights.
        teacher_bits (`int`, *optional*):
            4 or 8 for a quantised teacher.
        longest (`int`, *optional*):
            Tokens of the longest row. By default `args.max_length`.
        device_type (`str`, *optional*, defaults to `"cuda"`):
            Kind of the training device.
        num_teachers (`int`, *optional*, defaults to `1`):
            Teachers of that architecture.
        longest_prompt (`int`, *optional*):
            Tokens of the longest prompt that is continued. By default what a completion of `max_completion_length`
            leaves of the longest row, but half of it at least.
        teacher_writes (`bool`, *optional*):
            Whether the teacher writes the off-policy completions, as it does for rows without one. By default if
            `off_policy_source` says so.
        trained_tokens (`int`, *optional*):
            Trained tokens of the row that has most. By default all but the first of the longest.
    """

    method: str
    args: Any
    student: PretrainedConfig
    teacher: PretrainedConfig | None
    student_dtype: torch.dtype
    student_bits: int | None = None
    double_quant: bool = False
    peft_config: Any = None
    teacher_dtype: torch.dtype = torch.bfloat16
    teacher_bits: int | None = None
    longest: int | None = None
    device_type: str = "cuda"
    num_teachers: int = 1
    longest_prompt: int | None = None
    teacher_writes: bool | None = None
    trained_tokens: int | None = None


@dataclass(frozen=True)
class MemoryPlan:
    r"""
    What a run takes of its device.

    Args:
        components (`dict[str, int]`):
            Bytes by what they are for, in the phase that takes most.
        phases (`dict[str, int]`):
            Bytes at the peak of each phase: `"loading"`, `"rollout"`, `"teacher"`, `"student"` (forward, loss and
            backward) and `"optimizer"`.
        pageable (`int`, *optional*, defaults to `0`):
            Bytes of a paged optimizer's states, which go to host memory when the device is short. Not in the others.
        host (`int`, *optional*, defaults to `0`):
            Bytes of weights that wait, or compute, elsewhere.
    """

    components: dict[str, int]
    phases: dict[str, int]
    pageable: int = 0
    host: int = 0

    @property
    def peak(self) -> int:
        """Bytes that the run takes."""
        return max(self.phases.values())

    @property
    def phase(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=self.phases.__getitem__)


def plan_memory(run: PlannedRun) -> MemoryPlan:
    r"""
    What a run takes of its device, from the configurations alone.

    Args:
        run ([`PlannedRun`]):
            The run.

    Returns:
        [`MemoryPlan`]

    Raises:
        ValueError: If the length of the rows is unknown, or the student is quantised without an adapter.
    """
    return _Plan(run).result()


class _Plan:
    """The phases of one run, each a table of bytes."""

    def __init__(self, run: PlannedRun):
        self.run, self.args = run, run.args
        _check(run)
        attention = (run.args.model_init_kwargs or {}).get("attn_implementation")
        self.student = ModelPlan(
            run.student, run.student_dtype, run.student_bits, run.double_quant, run.peft_config, attention
        )
        self.weights = weights_of(self.student)
        self.teacher, self.teacher_weights = None, None
        if run.args.teacher_adapter is not None:
            self.teacher, self.teacher_weights = self.student, self.weights
        elif run.teacher is not None:
            self.teacher = ModelPlan(run.teacher, run.teacher_dtype, run.teacher_bits, is_trained=False)
            self.teacher_weights = weights_of(self.teacher)
        self.micro_batches = self.args.gradient_accumulation_steps
        self.prompt, self.row = _lengths(run)
        batch = self.args.per_device_train_batch_size
        self.facts = StepFacts(
            self.args,
            self.weights,
            self.teacher_weights,
            batch * _trained_tokens(run, self.row),
            self.micro_batches,
            run.device_type,
            run.num_teachers,
        )
        self.needs: Needs = needs_of(run.method, self.facts)
        self.optimizer = optimizer_bytes(self.args.optim, self.weights.trained, run.device_type)

    def result(self) -> MemoryPlan:
        """The plan, with what a GPU needs besides tensors."""
        resident, host = self.resident()
        tables = {
            "loading": self.loading(),
            "rollout": resident | self.rollout(),
            "teacher": resident | self.teacher_pass(),
            "student": resident | self.student_step(),
            "optimizer": resident | self.optimizer_step(),
        }
        if self.run.device_type != "cpu":
            for table in tables.values():
                moving = sum(table.values()) - sum(resident.values())
                table["reserve"] = RESERVE_BYTES + max(0, round(FRAGMENTED_SHARE * moving))
        phases = {name: sum(table.values()) for name, table in tables.items()}
        largest = tables[max(phases, key=phases.__getitem__)]
        components = {name: size for name, size in largest.items() if size > 0}
        return MemoryPlan(components, phases, self.optimizer.pageable if self.run.device_type != "cpu" else 0, host)

    def resident(self) -> tuple[Bytes, int]:
        """What is there in every phase of a step, and what is elsewhere."""
        weights = self.weights
        trained = {"adapter": weights.trained_bytes} if weights.has_adapter else {}
        states = self.optimizer.states + (self.optimizer.pageable if self.run.device_type == "cpu" else 0)
        found = {"weights": weights.bytes - sum(trained.values()), **trained, "optimizer": states}
        teacher, host = self.teacher_bytes()
        return found | teacher | (self.needs.modules or {}), host

    def teacher_bytes(self) -> tuple[Bytes, int]:
        """The teacher's weights on the device, and elsewhere."""
        weights, args = self.teacher_weights, self.args
        if weights is None:
            return {}, 0
        if args.teacher_adapter is not None:
            own = 0 if args.teacher_adapter == "base" else self.weights.trained_bytes
            return {"teacher": own}, 0
        everything = self.run.num_teachers * weights.bytes
        if not self.is_elsewhere:
            return {"teacher": everything}, 0
        # The loss is computed here, with a copy of the head
        return {"teacher": self.run.num_teachers * weights.head}, everything

    @property
    def is_elsewhere(self) -> bool:
        """Whether the teacher's weights are on another device than the student's."""
        return self.args.teacher_device is not None and self.run.device_type != "cpu"

    def loading(self) -> Bytes:
        """Weights alone."""
        return {"weights": self.weights.bytes} | self.teacher_bytes()[0]

    def rollout(self) -> Bytes:
        """Prompts of an optimizer step, continued together or so many at a time; gradients are gone."""
        args, run = self.args, self.run
        prompts = args.per_device_train_batch_size * self.micro_batches
        tables: list[Bytes] = [{}]
        if args.lmbda > 0 and not args.use_vllm:
            tables.append(self.generated(self.student, math.ceil(args.lmbda * prompts)))
        if _teacher_writes(run) and self.teacher is not None and not self.computes_elsewhere:
            table = self.generated(self.teacher, math.ceil((1.0 - args.lmbda) * prompts))
            table["activations"] += self.brought()
            tables.append(table)
        return max(tables, key=lambda table: sum(table.values()))

    def generated(self, plan: ModelPlan, prompts: int) -> Bytes:
        """A generation of so many completions."""
        batch = min(prompts, self.args.rollout_batch_size or prompts)
        length = self.prompt + self.args.max_completion_length
        return _largest(generation_marks(plan, max(batch, 1), self.prompt, length, bool(self.args.bf16)))

    @property
    def computes_elsewhere(self) -> bool:
        """Whether the teacher's forward is on another device."""
        return self.is_elsewhere and self.args.teacher_device != "offload"

    def brought(self) -> int:
        """What an offloaded teacher has on the device at a time."""
        return self.teacher_weights.largest if self.is_elsewhere else 0

    def gradients(self) -> int:
        """Of earlier micro-batches."""
        return self.weights.trained_bytes if self.micro_batches > 1 else 0

    def teacher_pass(self) -> Bytes:
        """The teacher reads a micro-batch; learned critics look at all of them before the student's first."""
        found = {"activations": 0}
        if self.teacher is not None and not self.computes_elsewhere:
            batch = self.args.per_device_train_batch_size
            found = _largest(inference_marks(self.teacher, batch, self.row, bool(self.args.bf16)))
            found = {"teacher's pass": found["activations"] + self.brought()}
        before = {"critic's steps": self.needs.before_step}
        with_gradients = found | {"gradients": self.gradients(), "kept states": self.needs.kept}
        return max(before, with_gradients, key=lambda table: sum(table.values()))

    def student_step(self) -> Bytes:
        """Forward, loss and backward of the last micro-batch."""
        args = self.args
        checkpointing = args.gradient_checkpointing_kwargs or {} if args.gradient_checkpointing else None
        shape = StepShape(
            batch=args.per_device_train_batch_size,
            length=self.row,
            tokens=self.facts.tokens,
            calls=self.needs.calls,
            before_loss=self.needs.before_loss,
            vocab_size=self.weights.rows if self.run.method == "dskd" else self.facts.vocab_size,
            autocast=bool(args.bf16),
            checkpointing=None if checkpointing is None else tuple(sorted(checkpointing.items())),
            accumulates=self.micro_batches > 1,
        )
        found = _largest(training_marks(self.student, shape))
        # What the teacher has said of this micro-batch
        said = self.facts.states(self.teacher_weights) * self.run.num_teachers if self.teacher_weights else 0
        return found | {"kept states": max(self.needs.kept, said)}

    def optimizer_step(self) -> Bytes:
        """All gradients, and what a step needs for a moment; learned critics may step here."""
        temporary = max(self.optimizer.step, self.needs.after_step)
        return {"gradients": self.weights.trained_bytes, "kept states": self.needs.kept, "temporaries": temporary}


def _largest(marks: Marks) -> Bytes:
    """The part of a step that takes most."""
    return dict(max(marks.values(), key=lambda sizes: sum(sizes.values())))


def _check(run: PlannedRun) -> None:
    if run.longest is None and run.args.max_length is None:
        raise ValueError(
            "`max_length` is None and the longest row is not known, so there is no length to plan for. Set "
            "`max_length`, or pass the tokens of the longest row as `longest`."
        )
    if run.student_bits is not None and run.peft_config is None:
        raise ValueError(
            f"`student_bits` is {run.student_bits} without a `peft_config`, but quantised weights cannot be trained. "
            "Pass an adapter, or load the student in its own dtype."
        )
    if run.teacher is None and run.args.teacher_adapter is None and run.args.teacher_cache is None:
        raise ValueError(
            "`teacher` is None, and so are `teacher_adapter` and `teacher_cache` in the configuration, so nobody "
            "knows what the teacher takes. Pass its configuration as `teacher`."
        )


def _teacher_writes(run: PlannedRun) -> bool:
    if run.teacher_writes is not None:
        return run.teacher_writes and run.args.lmbda < 1
    return run.args.off_policy_source == "teacher" and run.args.lmbda < 1


def _lengths(run: PlannedRun) -> tuple[int, int]:
    """Tokens of the longest prompt, and of the longest row that is trained."""
    args = run.args
    longest = run.longest or args.max_length
    prompt = run.longest_prompt or max(1, longest - min(args.max_completion_length, longest // 2))
    writes = args.lmbda > 0 or _teacher_writes(run)
    return prompt, max(longest, prompt + args.max_completion_length) if writes else longest


def _trained_tokens(run: PlannedRun, row: int) -> int:
    """Of the row that has most: a rollout's are those that were written."""
    if run.trained_tokens is None:
        return row - 1
    writes = run.args.lmbda > 0 or _teacher_writes(run)
    return min(row - 1, max(run.trained_tokens, run.args.max_completion_length if writes else 0))

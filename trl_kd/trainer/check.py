"""Whether a run fits and starts right: all checks, on a trainer's own parts, without a step of training."""

import math
from collections.abc import Callable
from typing import Any

import psutil
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers.utils import logging

from trl_kd import _compat
from trl_kd.checks.budget import device_memory, memory_finding
from trl_kd.checks.finding import Finding
from trl_kd.checks.live import likelihood_finding, rollout_finding, time_finding
from trl_kd.checks.memory import PlannedRun
from trl_kd.checks.render import as_text
from trl_kd.checks.subject import Subject
from trl_kd.checks.text import text_findings
from trl_kd.generation import completion_text, eos_token_ids
from trl_kd.teachers import CachedTeacher, LocalTeacher, TeacherGroup
from trl_kd.trainer.probes import likelihoods, models_of, sample_rows, time_step, untouched, write
from trl_kd.trainer.setup import student_source


logger = logging.get_logger(__name__)

# Columns that preparation adds to a row
_PREPARED = ("input_ids", "labels", "prompt_length")


def run_check(
    trainer: Any,
    *,
    samples: int = 64,
    rollouts: int = 16,
    device_memory_gb: float | None = None,
    quiet: bool = False,
) -> list[Finding]:
    r"""
    Look at a run before it starts, without training: memory, tokenizers, templates and rows, and then the models on
    some rows.

    Nothing stays: a run that follows is bit for bit the run without the check.

    Args:
        trainer ([`_KDTrainer`]):
            The trainer, before its first step or between two.
        samples (`int`, *optional*, defaults to `64`):
            Rows of the training data to look at.
        rollouts (`int`, *optional*, defaults to `16`):
            Completions that student and teacher each write.
        device_memory_gb (`float`, *optional*):
            Memory of a card to plan for, in GiB. By default that of the training device.
        quiet (`bool`, *optional*, defaults to `False`):
            Whether to print nothing.

    Returns:
        `list[Finding]`
    """
    rows = sample_rows(trainer.train_dataset, samples)
    with untouched(trainer):
        device, loaded = trainer.accelerator.device, _bytes_of(trainer)
        findings = [memory_of(planned_run_of(trainer, rows), device_memory_gb, device, loaded)]
        findings += text_findings(subject_of(trainer, rows))
        if rows and "seq_lengths" in rows[0]:
            text = "The rows are packed, and their columns are gone: chat templates could not be looked at."
            fix = "`trl-kd check` looks at the rows before they are packed."
            findings.append(Finding("packed rows", "careful", text, fix))
        findings += live_findings(trainer, rows, rollouts=rollouts, num_steps=steps_of(trainer))
    if not quiet:
        trainer.accelerator.print(as_text(findings, f"{type(trainer).__name__} on {trainer.accelerator.device}"))
    return findings


def memory_of(run: PlannedRun, device_memory_gb: float | None, device: torch.device, loaded: int = 0) -> Finding:
    r"""
    The plan against a card, or against the device of this machine.

    Args:
        run ([`PlannedRun`]):
            The run.
        device_memory_gb (`float`, *optional*):
            Memory of the card, in GiB; `None` for the device.
        device (`torch.device`):
            The training device.
        loaded (`int`, *optional*, defaults to `0`):
            Bytes that the run has taken already.

    Returns:
        [`Finding`]
    """
    if device_memory_gb is not None:
        name, budget = f"a card of {device_memory_gb:g} GB", int(device_memory_gb * 2**30)
    elif device.type == "cpu":  # of which this process has a part already, and which may not be the machine's best
        name, budget = "the CPU", psutil.virtual_memory().available + loaded
    elif (found := device_memory()) is not None:
        name, budget = found
    else:
        text = "How much memory the training device has could not be found out, so whether the run fits is not known."
        return Finding("memory", "careful", text, "Give it in GB: `device_memory`.")
    try:
        return memory_finding(run, budget, name)
    except ValueError as error:
        if run.student_bits is not None and run.peft_config is None:
            text = (
                f"The student is quantised to {run.student_bits} bits without an adapter, so nothing can be trained."
            )
            return Finding("memory", "stop", text, "Set `--use_peft true --lora_target_modules all-linear`.")
        return Finding("memory", "careful", f"There is no plan: {error}")


def _bytes_of(trainer: Any) -> int:
    """What the models take that are there."""
    models = [trainer.model, trainer.auxiliary.modules, *(teacher.model for teacher in models_of(trainer.teacher))]
    found = {id(parameter): parameter.nbytes for model in models for parameter in model.parameters()}
    return sum(found.values())


# What the trainer is made of, as the checks want it


def method_of(trainer: Any) -> str:
    """Name of the method's command."""
    return trainer._tag_names[-1]


def quantisation_of(config: Any) -> tuple[int | None, bool]:
    """Bits that a model's weights are quantised to, and whether their scales are quantised too."""
    found = config.to_dict().get("quantization_config") or {}
    found = found if isinstance(found, dict) else found.to_dict()
    if not found:
        return None, False
    if found.get("load_in_4bit") or found.get("bits") == 4:
        return 4, bool(found.get("bnb_4bit_use_double_quant"))
    return (4 if found.get("quant_method") == "mxfp4" else 8), False


def planned_run_of(trainer: Any, rows: list[dict[str, Any]]) -> PlannedRun:
    """The run as the memory plan sees it."""
    model, teachers = trainer.model, models_of(trainer.teacher)
    bits, double_quant = quantisation_of(model.config)
    peft_config = model.peft_config[model.active_adapter] if _compat.is_peft_model(model) else None
    teacher: dict[str, Any] = {"teacher": None}
    if teachers and isinstance(teachers[0], LocalTeacher):
        configs = [teacher.model.config for teacher in teachers]
        teacher = {
            "teacher": configs[0],
            "teacher_dtype": teachers[0].head.weight.dtype,
            "teacher_bits": quantisation_of(configs[0])[0],
            "num_teachers": len(configs),
        }
    return PlannedRun(
        method=method_of(trainer),
        args=trainer.args,
        student=model.config,
        student_dtype=model.get_input_embeddings().weight.dtype,
        student_bits=bits,
        double_quant=double_quant,
        peft_config=peft_config,
        device_type=trainer.accelerator.device.type,
        teacher_writes=trainer.rollouts is not None and (trainer.rollouts.rewrite_off_policy or not _has_text(rows)),
        **_longest(trainer, rows),
        **teacher,
    )


def _has_text(rows: list[dict[str, Any]]) -> bool:
    """Whether prepared rows have something that is trained, judged by the first."""
    return bool(rows) and any(label != -100 for label in rows[0]["labels"])


def _longest(trainer: Any, rows: list[dict[str, Any]]) -> dict[str, int]:
    """Tokens of the longest row and of the longest prompt; of a stream, what its limit allows."""
    dataset = trainer.train_dataset
    if isinstance(dataset, Dataset):
        lengths = pc.list_value_length(dataset.data.column("input_ids"))
        longest = {"longest": pc.max(lengths).as_py()}
        if "prompt_length" in dataset.column_names:
            longest["longest_prompt"] = pc.max(dataset.data.column("prompt_length")).as_py()
        return longest
    if trainer.args.max_length is not None:
        return {"longest": trainer.args.max_length}
    return {"longest": max(len(row["input_ids"]) for row in rows)}


def subject_of(trainer: Any, rows: list[dict[str, Any]]) -> Subject:
    """The run as the checks of text see it."""
    args, tokenizer, teacher = trainer.args, trainer.processing_class, trainer.teacher
    if isinstance(teacher, TeacherGroup):  # all of one tokenizer, which the trainer has seen to
        teacher = teacher.teachers[0]
    raw = [raw_row(row, args.dataset_text_field) for row in rows]
    batch = trainer.data_collator(rows) if rows else None
    theirs = vars(trainer).get("teacher_processing_class") or teacher.tokenizer()
    context = None
    if isinstance(teacher, LocalTeacher):
        context = _compat.context_length(teacher.model.config)
    return Subject(
        method=method_of(trainer),
        args=args,
        tokenizer=tokenizer,
        teacher_tokenizer=theirs,
        student_rows=trainer.model.get_output_embeddings().out_features,
        teacher_rows=None if isinstance(teacher, CachedTeacher) else max(_rows_of(trainer), default=None),
        eos_token_ids=eos_token_ids(trainer.model, tokenizer, **student_source(args)),
        teacher_eos_token_ids=teacher.ends(theirs or tokenizer),
        rows=raw,
        batch=batch,
        teacher_context=context,
        student_context=_compat.context_length(trainer.model.config),
    )


def _rows_of(trainer: Any) -> list[int]:
    return [teacher.model.get_output_embeddings().out_features for teacher in models_of(trainer.teacher)]


def raw_row(row: dict[str, Any], text_field: str = "text") -> dict[str, Any]:
    """A prepared row without what preparation has added; as it is, if it came as token ids or is packed."""
    text = {
        name: value
        for name, value in row.items()
        if name not in (*_PREPARED, *(f"teacher_{own}" for own in _PREPARED), "cache_row", "in_eval_cache")
    }
    return text if {"messages", "prompt", text_field} & set(text) else row


# The models at work


def live_findings(
    trainer: Any, rows: list[dict[str, Any]], *, rollouts: int = 16, num_steps: int | None = None
) -> list[Finding]:
    r"""
    Likelihoods, rollouts and time, by the models on some prepared rows.

    Args:
        trainer ([`_KDTrainer`]):
            The trainer, within [`untouched`].
        rows (`list[dict[str, Any]]`):
            Prepared rows.
        rollouts (`int`, *optional*, defaults to `16`):
            Completions that student and teacher each write.
        num_steps (`int`, *optional*):
            Optimizer steps of the run; `None` if that is not known.

    Returns:
        `list[Finding]`
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        text = (
            "Likelihoods, rollouts and time were not looked at: DeepSpeed and FSDP put the models together when "
            "training starts."
        )
        return [
            Finding("models", "careful", text, "Run the check on one process, without an accelerate configuration.")
        ]
    return [
        *_guarded("likelihood", lambda: likelihood_findings(trainer, rows)),
        *_guarded("rollouts", lambda: [_rollouts(trainer, rows, rollouts)]),
        *_guarded("time", lambda: [_time(trainer, rows, num_steps)]),
    ]


def _guarded(name: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    """What would end the run is a finding, not a traceback."""
    try:
        return look()
    except torch.OutOfMemoryError as error:
        fix = "See the smallest change under memory, or lower `per_device_train_batch_size` and `rollout_batch_size`."
        return [Finding(name, "stop", f"The device has run out of memory: {error}", fix)]
    except (ValueError, RuntimeError, NotImplementedError, FloatingPointError, OSError) as error:
        logger.debug("A check failed", exc_info=error)
        return [Finding(name, "stop", f"{type(error).__name__}: {error}", "The run would end in the same way.")]


def likelihood_findings(trainer: Any, rows: list[dict[str, Any]]) -> list[Finding]:
    """Who knows the completions better, for each teacher."""
    trained = [row for row in rows if any(label != -100 for label in row["labels"])]
    written = not trained
    if written:
        prompts, teacher = [row for row in rows if row["prompt_length"] > 0], trainer.teacher
        if not _writes(teacher):
            text = (
                "Not looked at: the rows are prompts alone, and there is not one teacher to write their completions."
            )
            return [Finding("likelihood", "careful", text, "Write completions first with `trl-kd generate`.")]
        completions = write(trainer, prompts, "teacher").completions
        trained = [
            trainer.row_format.complete(row, ids, "teacher") for row, ids in zip(prompts, completions, strict=True)
        ]
    found = likelihoods(trainer, trained)
    if not found:
        text = "Not measured: none of the rows' tokens are in the sets of the cache."
        return [Finding("likelihood", "careful", text, "See that the cache was written for this dataset.")]
    return [likelihood_finding(**arguments, written_by_teacher=written) for arguments in found]


def _writes(teacher: Any) -> bool:
    """Whether a teacher can be asked for completions."""
    return not isinstance(teacher, CachedTeacher | TeacherGroup)


def _rollouts(trainer: Any, rows: list[dict[str, Any]], number: int) -> Finding:
    """What student and teacher write, those of them that do so in this run, and the teacher to compare with."""
    args = trainer.args
    limits = {"max_completion_length": args.max_completion_length, "lmbda": args.lmbda}
    prompts = [row for row in rows if 0 < row.get("prompt_length", 0)][:number]
    if trainer.rollouts is None or not prompts:
        return rollout_finding(None, None, **limits)
    student = write(trainer, prompts, "student") if args.lmbda > 0 else None
    teacher = write(trainer, prompts, "teacher") if _writes(trainer.teacher) else None
    sample = ""
    if student is not None:
        tokenizer, ids = trainer.processing_class, trainer.row_format.prompt(prompts[0], "student")
        sample = completion_text(tokenizer, ids, student.completions[0])
    return rollout_finding(student, teacher, **limits, sample=sample)


def _time(trainer: Any, rows: list[dict[str, Any]], num_steps: int | None) -> Finding:
    args, device = trainer.args, trainer.accelerator.device
    seconds, measured = time_step(trainer, rows, num_steps or 1)
    name = "the CPU" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
    return time_finding(seconds, num_steps, measured=measured, of=args.gradient_accumulation_steps, device=name)


def steps_of(trainer: Any, num_rows: int | None = None) -> int | None:
    """Optimizer steps of the run; `None` if it goes by epochs of a length that is not known."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    if num_rows is None:
        try:
            num_rows = len(trainer.train_dataset)
        except TypeError:
            return None
    batches = math.ceil(num_rows / (args.per_device_train_batch_size * trainer.accelerator.num_processes))
    return math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))

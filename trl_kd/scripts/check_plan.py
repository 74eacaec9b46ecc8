"""The run of a command as the memory plan sees it."""

import copy
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from trl import ModelConfig, ScriptArguments

    from trl_kd import KDConfig
    from trl_kd.checks.memory import PlannedRun


def planned_run(
    method: str,
    script_args: "ScriptArguments",
    training_args: "KDConfig",
    model_args: "ModelConfig",
    longest: int | None = None,
    student: "PreTrainedConfig | None" = None,
    teacher: "PreTrainedConfig | None" = None,
    device_type: str = "cuda",
) -> "PlannedRun":
    r"""
    The run of a command as the memory plan sees it, from configurations alone.

    Args:
        method (`str`):
            `"amm"`, `"dskd"` or `"sparse-td"`.
        script_args (`ScriptArguments`):
            Options of the script. Nothing of the data is read.
        training_args ([`KDConfig`]):
            Options of the method.
        model_args (`ModelConfig`):
            Options of the student.
        longest (`int`, *optional*):
            Tokens of the longest row. By default `max_length`.
        student (`PreTrainedConfig`, *optional*):
            The student's configuration, if it is not to be looked up by its name.
        teacher (`PreTrainedConfig`, *optional*):
            The teacher's.
        device_type (`str`, *optional*, defaults to `"cuda"`):
            Kind of the training device. Away from a GPU, where `bf16` is off by default, the plan for one has it on.

    Returns:
        [`PlannedRun`]

    Raises:
        ValueError: If a model has no configuration that can be read.
    """
    from trl import get_peft_config

    from trl_kd.checks.architectures import config_of
    from trl_kd.checks.memory import PlannedRun
    from trl_kd.trainer.check import quantisation_of
    from trl_kd.trainer.setup import student_source

    student = student or config_of(model_args.model_name_or_path, **student_source(training_args))
    bits, double_quant = quantisation_of(student)
    if model_args.load_in_4bit or model_args.load_in_8bit:
        bits, double_quant = 4 if model_args.load_in_4bit else 8, model_args.use_bnb_nested_quant
    names = teacher_names(training_args)
    kwargs = training_args.teacher_model_init_kwargs or {}
    theirs: dict[str, Any] = {"teacher": None}
    if teacher is not None or names:
        teacher = teacher or config_of(names[0], **teacher_source(kwargs, training_args))
        theirs = {
            "teacher": teacher,
            "teacher_dtype": _dtype(kwargs.get("dtype", "auto"), teacher),
            "teacher_bits": 4 if kwargs.get("load_in_4bit") else 8 if kwargs.get("load_in_8bit") else None,
            "num_teachers": max(len(names), 1),
        }
        theirs["teacher_bits"] = theirs["teacher_bits"] or quantisation_of(teacher)[0]
    given = (training_args.model_init_kwargs or {}).get("dtype", model_args.dtype)
    return PlannedRun(
        method=method,
        args=_args_on(training_args, device_type),
        student=student,
        student_dtype=_dtype(given, student),
        student_bits=bits,
        double_quant=double_quant,
        peft_config=get_peft_config(model_args),
        longest=longest,
        device_type=device_type,
        **theirs,
    )


def teacher_names(training_args: "KDConfig") -> list[str]:
    """Names of the teachers that are loaded as models of their own."""
    if training_args.teacher_cache is not None or training_args.teacher_adapter is not None:
        return []
    return training_args.teacher_models or [training_args.teacher_model_name_or_path]


def teacher_source(kwargs: dict[str, Any], training_args: "KDConfig") -> dict[str, Any]:
    """Arguments that say where a teacher is."""
    given = {"trust_remote_code": training_args.trust_remote_code} | kwargs
    return {name: given[name] for name in ("revision", "token", "trust_remote_code") if name in given}


def _dtype(given: Any, config: "PreTrainedConfig") -> Any:
    """The dtype that weights are loaded in; that of the checkpoint for `"auto"`."""
    import torch

    given = config.dtype if given in (None, "auto") else given
    found = vars(torch).get(given) if isinstance(given, str) else given or torch.float32
    if not isinstance(found, torch.dtype):
        raise ValueError(f"`dtype` is {given!r}, which is none of PyTorch. Take one such as 'bfloat16', or 'auto'.")
    return found


def _args_on(training_args: "KDConfig", device_type: str) -> "KDConfig":
    """The configuration as it would be on such a device: without a GPU here, `bf16` has been switched off."""
    import torch

    if device_type == "cpu" or training_args.bf16 or (torch.accelerator.is_available() and not training_args.use_cpu):
        return training_args
    own = copy.copy(training_args)
    own.bf16, own.use_cpu = True, False
    return own

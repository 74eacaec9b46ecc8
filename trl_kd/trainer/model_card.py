"""The part of a model card that tells how the student was distilled."""

import os
from dataclasses import fields
from importlib.metadata import version
from typing import Any

from huggingface_hub import ModelCard
from trl import SFTConfig

from trl_kd import _compat
from trl_kd.teachers import SharedTeacher, TeacherGroup


_MARK = "### Framework versions"


def settings_of(args: Any, with_auxiliary: bool) -> dict[str, Any]:
    r"""
    What a reader must know to repeat the run, without what only concerns its logs.

    Args:
        args ([`KDConfig`]):
            Configuration of the run.
        with_auxiliary (`bool`):
            Whether there were auxiliary modules, so that their settings matter.

    Returns:
        `dict[str, Any]`: settings by name.
    """
    known = {field.name for field in fields(SFTConfig)}
    # Teachers have a line of their own
    known |= {"teacher_model_name_or_path", "teacher_models", "teacher_adapter"}
    known |= {"log_completions", "num_completions_to_print"}
    names = [field.name for field in fields(args) if field.name not in known]
    # Where rollouts are computed concerns nobody later
    unread = (*args.unread(), "vllm_", *(() if with_auxiliary else ("aux_",)))
    names = [name for name in names if not name.startswith(unread)]
    names += ["learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "seed"]
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in {"teacher_cache", "eval_teacher_cache"} & settings.keys():
        # Where it lies says nothing elsewhere
        settings[name] = os.path.basename(os.path.normpath(settings[name]))
    if "teacher_model_init_kwargs" in settings:
        # A card is public
        kept = {key: value for key, value in args.teacher_model_init_kwargs.items() if "token" not in key}
        settings["teacher_model_init_kwargs"] = kept
    return settings


def add_distillation_section(trainer: Any) -> None:
    r"""
    Write method, teacher and settings into the card that TRL made.

    Args:
        trainer ([`_KDTrainer`]):
            The trainer, whose output folder has a `README.md`.
    """
    if not trainer.is_world_process_zero():
        return
    path = os.path.join(trainer.args.output_dir, "README.md")
    student = _compat.config_model_id(trainer.model)
    settings = settings_of(trainer.args, with_auxiliary=bool(trainer.auxiliary.joint_parameters()))
    rows = "\n".join(f"| `{key}` | {_cell(value)} |" for key, value in settings.items())
    section = (
        f"### Distillation\n\n"
        f"- Method: {trainer._name}, with trl_kd {version('trl_kd')}\n"
        f"- Teacher: {_teacher(trainer)}\n"
        f"- Student before distillation: {_named(student)}{_bits(trainer.model)}\n"
        f"- Objective: {trainer._objective}\n\n"
        f"| setting | value |\n| --- | --- |\n{rows}\n\n"
    )
    card = ModelCard.load(path)
    card.text = card.text.replace(_MARK, section + _MARK, 1)
    card.save(path)


def _cell(value: Any) -> str:
    """A value as code in a table, which a system prompt with lines, pipes and backticks would break."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _bits(model: Any) -> str:
    """How the weights under an adapter were rounded: `trl-kd export` has to merge it into the same ones."""
    if not _compat.is_quantised(model):
        return ""
    given = model.config.to_dict()["quantization_config"]
    names = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
    kept = [f"{name}: {given[name]}" for name in names if given.get(name)]
    return f", quantised (`{', '.join(kept) or given.get('quant_method')}`)"


def _teacher(trainer: Any) -> str:
    """The teacher, or all of them."""
    teacher = trainer.teacher
    if isinstance(teacher, TeacherGroup):
        return ", ".join(_named(each.name) for each in teacher.teachers)
    if not isinstance(teacher, SharedTeacher):
        return _named(teacher.name)
    base = _named(_compat.config_model_id(trainer.model))
    if teacher.adapter == "base":
        return f"{base}, the student's base without its adapter"
    return f"{base}, the student's base, with the adapter {_named(teacher.adapter)}"


def _named(model: str) -> str:
    """A link for a Hub name; the last part of a local path, which says nothing elsewhere."""
    if not model:
        return "a model built in memory"
    if os.path.isdir(model):
        return f"`{os.path.basename(os.path.normpath(model))}` (a local folder)"
    return f"[{model}](https://huggingface.co/{model})"

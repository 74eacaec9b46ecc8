"""What a trainer asks of its teacher, whether that is a model or a cache on disk."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import AutoConfig

from trl_kd._compat import context_length
from trl_kd.data import KDCollator
from trl_kd.teachers import (
    CacheCollator,
    CachedTeacher,
    LocalTeacher,
    SharedTeacher,
    TeacherGroup,
    shared_vocab_size,
)
from trl_kd.teachers.cache import check_top_p
from trl_kd.trainer.setup import student_source
from trl_kd.trainer.tokens import SelectedTokens, model_inputs


# Ids and log-probabilities of the teacher's most likely tokens, both `(N, K)`
TopTokens = tuple[torch.Tensor, torch.Tensor]

_OF_BOTH = ("trust_remote_code", "attn_implementation")

# Every source of the teacher's distributions
Teacher = LocalTeacher | SharedTeacher | TeacherGroup | CachedTeacher


def own_teacher(teacher_model: Any, args: Any, student: Any) -> Teacher:
    """The teacher from the trainer's argument or the configuration; never the student itself."""
    _check_one_teacher(teacher_model, args)
    if teacher_model is None:
        teacher_model = args.teacher_models or args.teacher_model_name_or_path
    if args.teacher_cache is not None:
        return _cached_teacher(teacher_model, args)
    if args.teacher_adapter is not None:
        is_path = isinstance(student, str)
        config = AutoConfig.from_pretrained(student, **student_source(args)) if is_path else student.config
        return SharedTeacher(args.teacher_adapter, context_length(config))
    if teacher_model is None:
        raise ValueError(
            "There is no teacher: `teacher_model` is None, and so are `teacher_model_name_or_path`, "
            "`teacher_adapter` and `teacher_cache` in the configuration. Pass a model, a path or a Hub name, or a "
            "cache."
        )
    if isinstance(teacher_model, list | tuple):
        teachers = [_model_teacher(model, args, student) for model in teacher_model]
        return TeacherGroup(teachers, args.teacher_weights, args.teacher_column)
    return _model_teacher(teacher_model, args, student)


def _check_one_teacher(teacher_model: Any, args: Any) -> None:
    """Refuse options that speak of different teachers."""
    names = ("teacher_model_name_or_path", "teacher_adapter", "teacher_models")
    given = [f"`{name}`" for name in names if getattr(args, name) is not None]
    if teacher_model is not None and (teacher_model != args.teacher_model_name_or_path or len(given) > 1):
        given = ["`teacher_model`", *[name for name in given if name != "`teacher_model_name_or_path`"]]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are set, but the teacher is one of them. Leave the others out.")
    for name in ("teacher_weights", "teacher_column"):
        are_several = isinstance(teacher_model or args.teacher_models, list | tuple)
        if not are_several and (value := getattr(args, name)) is not None:
            raise ValueError(
                f"`{name}` is {value!r}, but there are not several teachers. Pass a list of them as `teacher_model`, "
                "or as `teacher_models` in the configuration; or leave it out."
            )
    if args.teacher_cache is None and args.eval_teacher_cache is not None:
        raise ValueError(
            "`eval_teacher_cache` is set without a `teacher_cache`, but a run asks either a teacher or its caches. "
            "Set both, or neither."
        )
    names = [name for name in ("teacher_adapter", "teacher_device", "teacher_models") if getattr(args, name)]
    names += ["teacher_model"] if isinstance(teacher_model, list | tuple) else []
    if args.teacher_cache is not None and names:
        raise ValueError(
            f"`teacher_cache` is set with `{names[0]}`, but a cache takes the place of a teacher that is asked. Leave "
            "one of them out."
        )
    # Of both models' arguments, which the command line hands on to both, the student's are what counts
    own = {key: value for key, value in (args.teacher_model_init_kwargs or {}).items() if key not in _OF_BOTH}
    for name, value in {"teacher_device": args.teacher_device, "teacher_model_init_kwargs": own}.items():
        if args.teacher_adapter is not None and value:
            raise ValueError(
                f"`teacher_adapter` is set with `{name}` {value!r}, but the teacher is then the student's own base, "
                "as it is and where it is. Leave one of them out."
            )


def _model_teacher(teacher_model: Any, args: Any, student: Any) -> LocalTeacher:
    if not isinstance(student, str) and isinstance(teacher_model, torch.nn.Module):
        own = {id(module) for module in student.modules()}
        if any(id(module) in own for module in teacher_model.modules()):
            raise ValueError(
                "Student and teacher share modules, so training one would change the other. Pass a second copy as the "
                "teacher: its path, or `copy.deepcopy(model)`. If the student is an adapter on the teacher, set "
                "`teacher_adapter='base'`."
            )
    return LocalTeacher(teacher_model, args.teacher_model_init_kwargs, args.teacher_device)


def _cached_teacher(teacher_model: Any, args: Any) -> CachedTeacher:
    """The cache; a teacher that is given too has to be the one that wrote it, and is not loaded."""
    if args.lmbda > 0 or args.off_policy_source == "teacher":
        raise ValueError(
            f"`teacher_cache` is set with `lmbda` {args.lmbda} and `off_policy_source` '{args.off_policy_source}', "
            "but a cache knows the text of the dataset alone, and what is written during training is not in it. Set "
            "`lmbda=0` and `off_policy_source='dataset'`, or train with the teacher itself."
        )
    if args.packing or args.eval_packing:
        raise ValueError(
            "`packing` is True with a `teacher_cache`, whose rows are those of the dataset. Set `packing=False`."
        )
    teacher = CachedTeacher(args.teacher_cache)
    if teacher_model is not None:
        revision = (args.teacher_model_init_kwargs or {}).get("revision")
        teacher.cache.check_teacher(teacher_model, revision)
    return teacher


def with_cache(collator: KDCollator, teacher: Teacher, args: Any) -> KDCollator:
    """The collator that brings the teacher's tokens from the cache; as it is for a model."""
    if not isinstance(teacher, CachedTeacher):
        return collator
    args.check_cache(teacher.cache)
    top_p, max_actions = args.cached_sets()
    check_top_p(top_p, teacher.cache, name="action_top_p")
    return CacheCollator(collator, teacher.cache, top_p, max_actions, eval_cache=args.eval_teacher_cache)


def own_collator(data_collator: Any, collator: KDCollator, teacher: Teacher, args: Any, dataset: Any) -> Any:
    """The caller's collator, if there is one that knows all that is needed; else the trainer's."""
    if data_collator is None:
        return collator
    has_own_prompt = args.teacher_system_prompt is not None or "teacher_prompt" in next(iter(dataset or []), {})
    if isinstance(collator, CacheCollator):
        needed = "with a `teacher_cache` a batch has the teacher's tokens too"
    elif isinstance(teacher, TeacherGroup) and teacher.column is not None:
        needed = "with a `teacher_column` a batch says whose each row is"
    elif has_own_prompt and not isinstance(data_collator, KDCollator):
        needed = "with `teacher_system_prompt` or a column `teacher_prompt` a batch has the teacher's rows too"
    else:
        return data_collator
    raise ValueError(
        f"`data_collator` is a {type(data_collator).__name__}, but {needed}, which only the trainer's own collator "
        "adds. Leave it out."
    )


def attach(teacher: Teacher, student: torch.nn.Module) -> None:
    """Give a teacher that is a part of the student what it is a part of."""
    if isinstance(teacher, SharedTeacher):
        teacher.attach(student)


def student_alone(teacher: Teacher) -> AbstractContextManager:
    """What is saved inside of this is the student, without what belongs to the teacher."""
    return teacher.left_out() if isinstance(teacher, SharedTeacher) else nullcontext()


def vocab_size(teacher: Teacher, student_size: int, tokenizer: Any) -> int:
    """Number of tokens that student and teacher share."""
    if isinstance(teacher, SharedTeacher):
        return student_size
    if isinstance(teacher, CachedTeacher):  # which has checked the tokenizer itself
        return min(student_size, teacher.vocab_size)
    if isinstance(teacher, TeacherGroup):
        return min(vocab_size(each, student_size, tokenizer) for each in teacher.teachers)
    return shared_vocab_size(student_size, teacher.vocab_size, tokenizer, teacher.tokenizer())


def parts_of(teacher: Teacher, inputs: dict[str, Any]) -> Iterator[tuple[float, dict[str, Any], dict[str, Any]]]:
    """
    Of each teacher that is asked about a batch: its weight, the rows that it reads, and the batch with the labels of
    these rows alone. One that is alone has all.
    """
    if not isinstance(teacher, TeacherGroup):
        yield 1.0, inputs, inputs
        return
    memory = {"student_hidden": {}, "whole": inputs}  # the student reads once
    for number, (each, weight, rows, labelled) in enumerate(teacher.parts(inputs)):
        own = labelled | memory | {"teacher": each}
        if number > 0:
            own.pop("second", None)  # a text that none of them is asked about counts once
        yield weight, own if rows is labelled else rows | {"teacher": each}, own


def read(teacher: Teacher, inputs: dict[str, torch.Tensor], selected: SelectedTokens) -> torch.Tensor | TopTokens:
    """The teacher's hidden states at the trained tokens, `(N, H_t)`; of a cache, its most likely tokens."""
    if not isinstance(teacher, CachedTeacher):
        return selected.of(inputs.get("teacher", teacher).hidden_states(**model_inputs(inputs)))
    row, state = selected.rows // inputs["labels"].shape[1], selected.positions
    if selected.ends is not None:
        state = torch.cat([state, state[selected.ends] + 1])
    return inputs["teacher_ids"][row, state], inputs["teacher_log_probs"][row, state]


def pair_of(teacher: Teacher, said: torch.Tensor | TopTokens) -> dict[str, tuple]:
    """Hidden states and head of a teacher that is a model."""
    return {} if isinstance(said, tuple) else {"teacher": (said, teacher.head)}


def top_of(said: torch.Tensor | TopTokens) -> TopTokens | None:
    """The most likely tokens of a teacher that is a cache."""
    return said if isinstance(said, tuple) else None

"""What a trainer asks of its teacher, whether that is a model or a cache on disk."""

from collections.abc import Callable
from typing import Any

import torch
from datasets import IterableDataset

from trl_kd.data import KDCollator
from trl_kd.generation import eos_token_ids
from trl_kd.teachers import CacheCollator, CachedTeacher, LocalTeacher, TeacherCache, shared_vocab_size
from trl_kd.teachers.cache import check_top_p
from trl_kd.trainer.tokens import SelectedTokens, model_inputs


# Ids and log-probabilities of the teacher's most likely tokens, both `(N, K)`
TopTokens = tuple[torch.Tensor, torch.Tensor]


def own_teacher(teacher_model: Any, args: Any, student: Any) -> LocalTeacher | CachedTeacher:
    """The teacher from the trainer's argument or the configuration; never the student itself."""
    teacher_model = args.teacher_model_name_or_path if teacher_model is None else teacher_model
    if args.teacher_cache is not None:
        return _cached_teacher(teacher_model, args)
    if args.eval_teacher_cache is not None:
        raise ValueError(
            "`eval_teacher_cache` is set without a `teacher_cache`, but a run asks either a teacher or its caches. "
            "Set both, or neither."
        )
    if teacher_model is None:
        raise ValueError(
            "There is no teacher: `teacher_model` is None, and so are `teacher_model_name_or_path` and "
            "`teacher_cache` in the configuration. Pass a model, a path or a Hub name, or a cache."
        )
    if not isinstance(student, str) and not isinstance(teacher_model, str):
        own = {id(module) for module in student.modules()}
        if any(id(module) in own for module in teacher_model.modules()):
            raise ValueError(
                "Student and teacher share modules, so training one would change the other. Pass a second copy as the "
                "teacher: its path, or `copy.deepcopy(model)`."
            )
    return LocalTeacher(teacher_model, args.teacher_model_init_kwargs)


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


def ends_of(teacher: LocalTeacher | CachedTeacher, tokenizer: Any) -> list[int]:
    """Ids by which the teacher ends a completion."""
    if isinstance(teacher, CachedTeacher):
        return teacher.eos_token_ids
    return eos_token_ids(teacher.model, tokenizer)


def cache_columns(teacher: LocalTeacher | CachedTeacher, args: Any, tokenizer: Any) -> Callable | None:
    """What gives a prepared dataset its rows of the cache; `None` for a model."""
    if not isinstance(teacher, CachedTeacher):
        return None
    caches = {True: teacher.cache, False: None}
    if args.eval_teacher_cache is not None:
        caches[False] = TeacherCache.open(args.eval_teacher_cache)
    for cache in caches.values():
        if cache is not None:
            cache.check_tokenizer(tokenizer)

    def add_columns(dataset: Any, came_as_ids: bool, name: str) -> Any:
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                f"The {name} dataset is a stream, but a teacher cache belongs to the rows of a dataset by their "
                "number. Load it without streaming."
            )
        if "cache_row" in dataset.column_names:
            return dataset  # `evaluate` prepares again what the constructor has prepared
        cache = caches[name == "train"]
        if cache is None:
            raise ValueError(
                f"There is a `teacher_cache` for training, but none for the {name} dataset, and no teacher to ask. "
                "Write one with `trl-kd cache` and pass it as `eval_teacher_cache`, or leave out the evaluation."
            )
        return cache.with_rows(dataset).add_column("in_eval_cache", [name != "train"] * len(dataset))

    return add_columns


def with_cache(collator: KDCollator, teacher: LocalTeacher | CachedTeacher, args: Any) -> KDCollator:
    """The collator that brings the teacher's tokens from the cache; as it is for a model."""
    if not isinstance(teacher, CachedTeacher):
        return collator
    args.check_cache(teacher.cache)
    top_p, max_actions = args.cached_sets()
    check_top_p(top_p, teacher.cache, name="action_top_p")
    return CacheCollator(collator, teacher.cache, top_p, max_actions, eval_cache=args.eval_teacher_cache)


def own_collator(data_collator: Any, collator: KDCollator) -> Any:
    """The caller's collator, if there is one that knows all that is needed; else the trainer's."""
    if data_collator is not None and isinstance(collator, CacheCollator):
        raise ValueError(
            f"`data_collator` is a {type(data_collator).__name__}, but with a `teacher_cache` a batch has the "
            "teacher's tokens too, which only the trainer's own collator adds. Leave it out."
        )
    return data_collator or collator


def vocab_size(teacher: LocalTeacher | CachedTeacher, student_size: int, tokenizer: Any) -> int:
    """Number of tokens that student and teacher share."""
    if isinstance(teacher, CachedTeacher):  # which has checked the tokenizer itself
        return min(student_size, teacher.vocab_size)
    return shared_vocab_size(student_size, teacher.vocab_size, tokenizer, teacher.tokenizer())


def read(
    teacher: LocalTeacher | CachedTeacher, inputs: dict[str, torch.Tensor], selected: SelectedTokens
) -> torch.Tensor | TopTokens:
    """The teacher's hidden states at the trained tokens, `(N, H_t)`; of a cache, its most likely tokens."""
    if not isinstance(teacher, CachedTeacher):
        return selected.of(teacher.hidden_states(**model_inputs(inputs)))
    row, state = selected.rows // inputs["labels"].shape[1], selected.positions
    if selected.ends is not None:
        state = torch.cat([state, state[selected.ends] + 1])
    return inputs["teacher_ids"][row, state], inputs["teacher_log_probs"][row, state]


def pair_of(teacher: LocalTeacher | CachedTeacher, said: torch.Tensor | TopTokens) -> dict[str, tuple]:
    """Hidden states and head of a teacher that is a model."""
    return {} if isinstance(said, tuple) else {"teacher": (said, teacher.head)}


def top_of(said: torch.Tensor | TopTokens) -> TopTokens | None:
    """The most likely tokens of a teacher that is a cache."""
    return said if isinstance(said, tuple) else None

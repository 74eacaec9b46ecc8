"""What a dataset needs because of its teacher: rows of a cache, prompts of the teacher's own, whose each row is."""

from collections.abc import Callable
from typing import Any

from datasets import IterableDataset

from trl_kd.data import TeacherPrompt, map_rows, row_formatter
from trl_kd.teachers import CachedTeacher, TeacherCache, TeacherGroup
from trl_kd.teachers.group import teacher_index
from trl_kd.trainer.sources import Teacher


def teacher_columns(teacher: Teacher, args: Any, tokenizer: Any, eos_ids: list[int]) -> Callable:
    """What gives a prepared dataset the columns that the teacher needs: takes it, whether it came as ids, its name."""
    if isinstance(teacher, CachedTeacher):
        return _cache_columns(teacher, args, tokenizer)

    def add_columns(dataset: Any, came_as_ids: bool, name: str) -> Any:
        dataset = add_prompts(dataset, came_as_ids, name)
        if not isinstance(teacher, TeacherGroup) or teacher.column is None:
            return dataset
        if teacher.column not in next(iter(dataset)):
            raise ValueError(
                f"`teacher_column` is '{teacher.column}', but the {name} dataset has no such column. Add it, with the "
                "number or the name of each row's teacher."
            )
        if args.packing or args.eval_packing:
            raise ValueError(
                f"`teacher_column` is '{teacher.column}' and `packing` is True, but a packed row holds texts of "
                "several teachers. Set `packing=False`, or let all teachers have every row (`teacher_weights`)."
            )
        return dataset.map(teacher_index, fn_kwargs={"column": teacher.column, "names": teacher.names})

    def add_prompts(dataset: Any, came_as_ids: bool, name: str) -> Any:
        row = next(iter(dataset))
        if "teacher_prompt_ids" in row or not has_own_prompt(row, args):
            return dataset
        check_own_prompt(args, came_as_ids, name)
        raw = {key: value for key, value in row.items() if key not in ("input_ids", "labels", "prompt_length")}
        options = {"text_field": args.dataset_text_field, "eos_token_ids": eos_ids, "name": name}
        formatter = row_formatter(raw, tokenizer, max_length=None, **options)
        function = TeacherPrompt(formatter, args.teacher_system_prompt, teacher.context)
        num_proc = None if isinstance(dataset, IterableDataset) else args.dataset_num_proc
        description = f"Writing the teacher's prompts of {name} dataset"
        return map_rows(dataset, function, teacher.context, num_proc, name, description, "max_position_embeddings")

    return add_columns


def has_own_prompt(row: dict[str, Any], args: Any) -> bool:
    """Whether the teacher has a prompt of its own."""
    return args.teacher_system_prompt is not None or "teacher_prompt" in row


def check_own_prompt(args: Any, came_as_ids: bool, name: str) -> None:
    """Refuse what cannot go with a prompt of the teacher's own."""
    clashes = {
        f"the {name} dataset comes as token ids": came_as_ids,
        "`packing` is True": args.packing or bool(args.eval_packing),
        "`assistant_only_loss` is True": args.assistant_only_loss,
    }
    if found := [clash for clash, is_so in clashes.items() if is_so]:
        raise ValueError(
            f"The teacher is to have a prompt of its own (`teacher_system_prompt`, or a column `teacher_prompt`), but "
            f"{found[0]}, where one prompt before one completion cannot be told apart. Pass rows of text or messages, "
            "unpacked, and train the last turn alone."
        )


def _cache_columns(teacher: CachedTeacher, args: Any, tokenizer: Any) -> Callable:
    """What gives a prepared dataset its rows of the cache."""
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
        if has_own_prompt(next(iter(dataset)), args):
            raise ValueError(
                "The teacher is to have a prompt of its own, but a `teacher_cache` was written for the prompts of the "
                "dataset. Leave out `teacher_system_prompt` and the column `teacher_prompt`, or ask the teacher "
                "itself."
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

"""Several teachers: each row has one of them, or all of them with their weights."""

from collections.abc import Iterator
from typing import Any

from trl_kd.modules.lm_head import LMHead
from trl_kd.teachers.local import LocalTeacher


# What a batch has for each of its rows and a teacher may read
_ROW_PARTS = (
    *("input_ids", "attention_mask", "labels", "is_on_policy", "prompt_length"),
    *("teacher_input_ids", "teacher_attention_mask", "teacher_labels", "teacher_prompt_length"),
)


class TeacherGroup:
    r"""
    Several models as the teacher. Each has the student's tokens.

    With a column, a row's loss is that against the teacher that the column names. Without, it is the weighted mean of
    the losses against each. (For the forward KL, whose gradient is linear in the teacher's probabilities, that is the
    KL to their weighted mean.)

    Args:
        teachers (`list` of [`LocalTeacher`]):
            The teachers.
        weights (`list[float]`, *optional*):
            Their weights; they are divided by their sum. Equal by default.
        column (`str`, *optional*):
            Column of the dataset with a teacher's number, from 0, or its name.

    Raises:
        ValueError: If numbers do not match, weights are not positive, or both weights and a column are given.
    """

    revision = None

    def __init__(self, teachers: list[LocalTeacher], weights: list[float] | None = None, column: str | None = None):
        if len(teachers) < 2:
            raise ValueError(
                f"There are {len(teachers)} teachers in the list, but a list is for several. Pass the one teacher as "
                "`teacher_model`."
            )
        if weights is not None and column is not None:
            raise ValueError(
                f"Both `teacher_weights` and `teacher_column` ('{column}') are set, but a row has either all teachers "
                "or one. Leave one of them out."
            )
        if weights is not None and (len(weights) != len(teachers) or min(weights) <= 0):
            raise ValueError(
                f"`teacher_weights` is {weights} for {len(teachers)} teachers, but each has a weight above 0. Give as "
                "many, or leave them out for equal ones."
            )
        weights = weights or [1.0] * len(teachers)
        self.teachers, self.column = teachers, column
        self.weights = [weight / sum(weights) for weight in weights]

    @property
    def name(self) -> str:
        """Names of all."""
        return ", ".join(self.names)

    @property
    def context(self) -> int | None:
        """The fewest positions of any of them."""
        return min((each.context for each in self.teachers if each.context is not None), default=None)

    def ends(self, tokenizer: Any) -> list[int]:
        """Ids by which any of them ends a completion."""
        return sorted({token for teacher in self.teachers for token in teacher.ends(tokenizer)})

    @property
    def names(self) -> list[str]:
        """The name of each."""
        return [teacher.name for teacher in self.teachers]

    def parts(self, inputs: dict[str, Any]) -> Iterator[tuple[LocalTeacher, float, dict[str, Any], dict[str, Any]]]:
        r"""
        What each teacher is asked.

        Args:
            inputs (`dict[str, torch.Tensor]`):
                A batch; with a column, it has `teacher_index` of shape `(B,)`.

        Yields:
            `tuple`: a teacher, its weight, the rows that it reads, and the whole batch with the labels of the other
            rows taken out. A teacher without rows is left out.
        """
        if self.column is None:
            for teacher, weight in zip(self.teachers, self.weights, strict=True):
                yield teacher, weight, inputs, inputs
            return
        index = inputs["teacher_index"]
        found = index.tolist()
        for number, teacher in enumerate(self.teachers):
            rows = [row for row, other in enumerate(found) if other == number]
            if rows:
                own = {name: inputs[name][rows] for name in _ROW_PARTS if name in inputs}
                labels = inputs["labels"].masked_fill((index != number).unsqueeze(1), -100)
                yield teacher, 1.0, own, inputs | {"labels": labels}

    def prepare(self, accelerator: Any, vocab_size: int | None = None) -> None:
        """Place each, as [`LocalTeacher.prepare`]."""
        for teacher in self.teachers:
            teacher.prepare(accelerator, vocab_size)

    @property
    def heads(self) -> list[LMHead]:
        """Output heads of all."""
        return [teacher.head for teacher in self.teachers]

    def generate(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        """Refused: which of them should write is not known."""
        raise ValueError(
            f"Completions are to be written by the teacher, but there are {len(self.teachers)}. Let each write its "
            "part beforehand with `trl-kd generate`, or set `lmbda=1`, so that the student writes all of them."
        )


def teacher_index(row: dict[str, Any], column: str, names: list[str]) -> dict[str, int]:
    r"""
    Number of the teacher that a row names. This is the function given to `map`: apart from the group, since `datasets`
    hashes all that a function holds, and that would be the teachers' weights.

    Args:
        row (`dict[str, Any]`):
            Row of a dataset.
        column (`str`):
            Column with a teacher's number or name.
        names (`list[str]`):
            Names of the teachers.

    Returns:
        `dict[str, int]`: the new column `teacher_index`.

    Raises:
        ValueError: If there is no such teacher.
    """
    value = row[column]
    if value != "" and names.count(value) == 1:  # models in memory have no name, or all the name of one base
        return {"teacher_index": names.index(value)}
    if isinstance(value, int) and 0 <= value < len(names):
        return {"teacher_index": value}
    raise ValueError(
        f"The column `{column}` of a row is {value!r}, but the teachers are {', '.join(map(repr, names))}. Put in a "
        f"name that one of them alone has, or a number from 0 to {len(names) - 1}."
    )

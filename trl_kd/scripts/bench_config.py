"""What a bench compares, and by which rules: the YAML file of `trl-kd bench`, checked."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from trl_kd.scripts.bench_methods import METHODS


DEFAULT_CONFIG = Path(__file__).with_name("bench.yaml")
DEMO_TEACHER = Path(__file__).with_name("demo_teacher")
DEMO, STORIES = "demo", "stories"
TEACHER, BEFORE = "teacher", "before"


@dataclass(frozen=True)
class Cell:
    """A model to be judged: a method's of a seed, the teacher, or the student before."""

    name: str
    seed: int | None = None

    @property
    def key(self) -> str:
        """Name of its file."""
        return self.name if self.seed is None else f"{self.name}-{self.seed}"

    def file(self, folder: Path) -> Path:
        """Where its result is."""
        return folder / "cells" / f"{self.key}.json"


@dataclass(frozen=True)
class BenchConfig:
    r"""
    A bench: models, data, methods, and the budget that all methods are given.

    Args:
        methods (`tuple[str, ...]`):
            Names of [`METHODS`].
        seeds (`tuple[int, ...]`):
            Seeds of training.
        baseline (`str`):
            Method that the others are compared with.
        teacher (`str`):
            Folder or Hub name; `"demo"` is the teacher that ships with the package.
        student (`str`):
            Folder or Hub name; `"demo"` is a new Llama of `student_size` with the teacher's tokenizer.
        student_size (`dict[str, int]`):
            Fields of [`~transformers.LlamaConfig`] for that new model.
        warm_start (`dict[str, Any]`):
            Supervised fine-tuning that makes the student which all methods start from: `steps` (0 leaves the student
            as it is), and fields of [`~trl.SFTConfig`].
        data (`str`):
            `"stories"`, which are made on the spot; or a file, folder or Hub name, as the training commands take.
        data_config (`str`, *optional*):
            Configuration of a dataset on the Hub.
        template (`str`, *optional*):
            Suite that says how rows become prompts and references, as `trl-kd eval --template` takes it.
        train_split (`str`), test_split (`str`):
            Splits of the dataset.
        train_rows (`int`, *optional*), test_rows (`int`, *optional*):
            How many of the first rows are taken. Defaults to all.
        max_prompt_length (`int`, *optional*):
            Rows with longer prompts are left out, in tokens.
        max_completion_length (`int`):
            Longest completion, of the data and of rollouts, in tokens.
        steps (`int`):
            Optimizer steps of each method.
        batch_size (`int`):
            Rows of each step.
        lmbda (`float`):
            Share of rows that the student writes, for methods that have such a share.
        training (`dict[str, Any]`):
            Fields of [`~transformers.TrainingArguments`] that all methods are given, such as `learning_rate`.
        method_options (`dict[str, dict[str, Any]]`):
            Fields of a method's own configuration, which win over those of all, by its name.
        evaluation (`dict[str, Any]`):
            Fields of [`~trl_kd.evaluation.Suite`], such as `metrics`, and `batch_size`.
        device (`str`, *optional*):
            `"cpu"`, or unset for the accelerator if there is one.
        threads (`int`, *optional*):
            Threads of each process. Defaults to what torch takes.

    Raises:
        ValueError: If a value cannot be used.
    """

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    batch_size: int
    max_completion_length: int
    teacher: str = DEMO
    student: str = DEMO
    baseline: str = "sft"
    student_size: dict[str, int] = field(default_factory=dict)
    warm_start: dict[str, Any] = field(default_factory=lambda: {"steps": 0})
    data: str = STORIES
    data_config: str | None = None
    template: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    train_rows: int | None = None
    test_rows: int | None = None
    max_prompt_length: int | None = None
    lmbda: float = 0.5
    training: dict[str, Any] = field(default_factory=dict)
    method_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    device: str | None = None
    threads: int | None = None

    def __post_init__(self):
        for name in ("methods", "seeds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_methods("methods", self.methods)
        check_methods("method_options", self.method_options)
        check_methods("baseline", [self.baseline])
        for name in ("methods", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(
                    f"`{name}` is {list(values)}, but each run needs one of its own. Give one or more, each once."
                )
        for name in ("steps", "batch_size", "max_completion_length"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"`{name}` is {value}, so nothing would be trained. Set it to 1 or more.")
        if self.data == STORIES and None in (self.train_rows, self.test_rows):
            raise ValueError(
                f"`data` is '{STORIES}', of which there is no end, but `train_rows` is {self.train_rows} and "
                f"`test_rows` {self.test_rows}. Set both."
            )
        if "steps" not in self.warm_start:
            raise ValueError(
                f"`warm_start` is {self.warm_start} and does not say for how long. Set its `steps`; 0 leaves the "
                "student as it is."
            )

    @property
    def teacher_path(self) -> str:
        """Folder or Hub name of the teacher."""
        return str(DEMO_TEACHER) if self.teacher == DEMO else self.teacher

    def settings_of(self, name: str) -> dict[str, Any]:
        """
        All settings that decide the result of a cell.

        Args:
            name (`str`):
                Method; `"teacher"` or `"before"` for the models that none has trained.

        Returns:
            `dict[str, Any]`: what other methods are given is not among it.
        """
        settings = asdict(self)
        for of_the_table in ("methods", "seeds", "baseline", "method_options"):
            del settings[of_the_table]
        if name in METHODS:
            settings["options"] = self.method_options.get(name, {})
        else:
            for of_training in ("steps", "batch_size", "lmbda", "training"):
                del settings[of_training]
        return settings


def check_methods(option: str, names: Sequence[str] | Mapping[str, Any]) -> None:
    """Refuse a method that does not exist."""
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(
            f"`{option}` names {', '.join(map(repr, unknown))}, but no such method exists. Choose among "
            f"{', '.join(METHODS)}."
        )


def load_config(path: str | Path, **changes: Any) -> BenchConfig:
    r"""
    Read the file of a bench.

    Args:
        path (`str` or `Path`):
            YAML with the fields of [`BenchConfig`].
        **changes (`Any`):
            Fields that replace those of the file; `None` leaves a field as it is.

    Returns:
        [`BenchConfig`]

    Raises:
        ValueError: If the file is no YAML, or a field or a value cannot be used.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"The bench {path} cannot be read: {error}. Name a YAML file.") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"The bench {path} holds a {type(values).__name__}, but its fields are named. Begin with {DEFAULT_CONFIG}."
        )
    known = {each.name: each for each in fields(BenchConfig)}
    if unknown := sorted(values.keys() - known.keys()):
        raise ValueError(f"The bench {path} has the fields {unknown}, which do not exist. It may have {list(known)}.")
    values |= {name: value for name, value in changes.items() if value is not None}
    needed = ("methods", "seeds", "steps", "batch_size", "max_completion_length")
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"The bench {path} lacks {missing}, which have no default. Add them, as in {DEFAULT_CONFIG}.")
    return BenchConfig(**values)

"""Test suites: how a dataset becomes prompts, how completions are drawn, what is measured, what is a regression."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trl_kd.evaluation.measures import MEASURES
from trl_kd.evaluation.regression import parse_condition


if TYPE_CHECKING:
    from datasets import Dataset


SUITES = Path(__file__).with_name("suites")
# Columns that hold a prompt, and its answer, without a template
_PROMPTS, _ANSWERS = ("messages", "prompt"), ("references", "reference", "completion")


@dataclass(frozen=True)
class Suite:
    r"""
    A test suite. Those that ship with the package are YAML files with these fields, and so is one of your own.

    Args:
        name (`str`):
            Name of the suite: that of its file.
        description (`str`, *optional*):
            What it is for.
        columns (`tuple[str, ...]`, *optional*):
            Columns that the templates need; `a|b` stands for one of both. A dataset without them is taken as it is, if
            it has a column `prompt` or `messages`.
        prompt (`str`, *optional*):
            Jinja template of the prompt, with the columns of a row as variables.
        references (`tuple[str, ...]`, *optional*):
            Jinja templates of the references. A column `references` (a list) wins.
        variables (`dict[str, Any]`, *optional*):
            Further variables of the templates.
        chat (`bool`, *optional*, defaults to `False`):
            Whether a prompt of text becomes the user's message in the chat template of each model.
        max_prompt_length (`int`, *optional*):
            Prompts that are longer for any of the models, in tokens, are left out for all.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Length at which completions are cut, in tokens.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature. 0 is greedy.
        top_p (`float`, *optional*, defaults to `1.0`):
            Probability mass of the tokens that are drawn from.
        top_k (`int`, *optional*, defaults to `0`):
            Number of tokens that are drawn from; 0 for all.
        seeds (`tuple[int, ...]`, *optional*, defaults to `(0,)`):
            Seeds of the generation, each of which writes a completion for every prompt.
        metrics (`tuple[str, ...]`, *optional*):
            What is measured: names of [`MEASURES`], or modules of `evaluate`, by path or name.
        main_metric (`str`, *optional*):
            What summaries and plots show first. Defaults to the first metric.
        answer_pattern (`str`, *optional*):
            Regular expression of the answer within a text, for `exact_match`. Defaults to that of GSM8K.
        fail_if (`tuple[str, ...]`, *optional*):
            Changes against the baseline that count as regressions, such as `"rouge_l < -0.5%"`.

    Raises:
        ValueError: If a value cannot be used.
    """

    name: str
    description: str = ""
    columns: tuple[str, ...] = ()
    prompt: str | None = None
    references: tuple[str, ...] = ()
    variables: dict[str, Any] = field(default_factory=dict)
    chat: bool = False
    max_prompt_length: int | None = None
    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seeds: tuple[int, ...] = (0,)
    metrics: tuple[str, ...] = tuple(name for name in MEASURES if name not in ("exact_match", "chrf"))
    main_metric: str | None = None
    answer_pattern: str | None = None
    fail_if: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("columns", "references", "seeds", "metrics", "fail_if"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Iterable):
                raise ValueError(
                    f"`{name}` of the suite '{self.name}' is {value!r}, but several of them can be given. Make it a "
                    "list."
                )
            object.__setattr__(self, name, tuple(value))
        if not self.seeds or not self.metrics:
            raise ValueError(
                f"The suite '{self.name}' has {len(self.seeds)} seeds and {len(self.metrics)} metrics, so nothing "
                "would be written or measured. Give at least one of each."
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"`seeds` of the suite '{self.name}' is {list(self.seeds)}, where one seed would be counted twice. "
                "Give different ones."
            )
        self._check_numbers()
        for condition in self.fail_if:
            parse_condition(condition)
        if self.temperature == 0.0 and len(self.seeds) > 1:
            raise ValueError(
                f"The suite '{self.name}' decodes greedily (`temperature` 0) with {len(self.seeds)} seeds, which "
                "would all write the same. Give one seed, or a temperature."
            )

    def _check_numbers(self) -> None:
        """Refuse what `generate` would stumble over after the references have been read."""
        whole = {"max_completion_length": 1, "top_k": 0, "max_prompt_length": 1}
        bad = [name for name, least in whole.items() if not _is_at_least(getattr(self, name), least, int)]
        bad += [name for name in ("temperature",) if not _is_at_least(getattr(self, name), 0, (int, float))]
        if not _is_at_least(self.top_p, 0, (int, float)) or not 0 < self.top_p <= 1:
            bad.append("top_p")
        bad += ["seeds"] * any(not _is_at_least(seed, 0, int) for seed in self.seeds)
        if bad:
            found = ", ".join(f"`{name}` {getattr(self, name)!r}" for name in bad)
            raise ValueError(
                f"The suite '{self.name}' has {found}, with which nothing can be written. Lengths are whole numbers "
                "from 1, `top_p` is a share above 0, `temperature`, `top_k` and seeds are not negative."
            )

    def settings(self) -> dict[str, Any]:
        """All that decides what is measured, for JSON."""
        settings = asdict(self)
        del settings["fail_if"], settings["description"]
        return json.loads(json.dumps(settings))


def _is_at_least(value: Any, least: float, kind: Any) -> bool:
    """Whether a value is a number of this kind that can be used; `None` stands for no limit."""
    return value is None or (isinstance(value, kind) and not isinstance(value, bool) and value >= least)


def load_suite(name: str, changes: Mapping[str, Any] | None = None) -> Suite:
    r"""
    A suite that ships with the package, or one of your own.

    Args:
        name (`str`):
            `"instruction"`, `"summarisation"`, `"translation"`, `"arithmetic"`, `"story"`, or the path of a YAML file.
        changes (`Mapping[str, Any]`, *optional*):
            Fields of [`Suite`] that replace those of the file; `None` leaves a field as it is.

    Returns:
        [`Suite`]

    Raises:
        ValueError: If there is no such suite, if the file is not one, or if a field does not exist.
    """
    shipped = sorted(file.stem for file in SUITES.glob("*.yaml"))
    file = SUITES / f"{name}.yaml" if name in shipped else Path(name)
    if not file.is_file():
        raise ValueError(
            f"There is no suite '{name}': the package has {', '.join(shipped)}, and there is no such file. Name one "
            "of these, or the YAML file of your own."
        )
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The suite {file} is no YAML: {error}. Mend that line.") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"The suite {file} holds a {type(values).__name__}, but its fields are named. Write `metrics: [...]` and "
            f"so on, as in {SUITES / 'instruction.yaml'}."
        )
    known = {each.name for each in fields(Suite)} - {"name"}
    if unknown := sorted(values.keys() - known):
        raise ValueError(
            f"The suite {file} has the fields {unknown}, which do not exist. It may have {sorted(known)}."
        )
    changes = {key: value for key, value in (changes or {}).items() if value is not None}
    if "variables" in changes:
        changes["variables"] = values.get("variables", {}) | changes["variables"]
    return Suite(**({"name": file.stem} | values | changes))


def plain_suite(changes: Mapping[str, Any] | None = None) -> Suite:
    """Suite for datasets that hold their prompts already, in a column `prompt` or `messages`."""
    return Suite(**({"name": "plain"} | {key: value for key, value in (changes or {}).items() if value is not None}))


@dataclass(frozen=True)
class EvalRow:
    r"""
    One prompt and what may follow it.

    Args:
        index (`int`):
            Number of the row in the dataset.
        prompt (`str` or `list[dict[str, str]]`):
            Text, or messages.
        references (`tuple[str, ...]`):
            Good answers; the first is the one whose likelihood is measured. Empty if the dataset has none.
    """

    index: int
    prompt: str | list[dict[str, str]]
    references: tuple[str, ...]

    @property
    def text(self) -> str:
        """The prompt as one text, for people."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in self.prompt)


def digest_of(rows: Iterable[EvalRow]) -> str:
    """Digest of prompts and references."""
    return hashlib.sha256(json.dumps([asdict(row) for row in rows], ensure_ascii=False).encode()).hexdigest()


def read_rows(dataset: "Dataset", suite: Suite, num_prompts: int | None = None) -> list[EvalRow]:
    r"""
    Prompts and references of a dataset, as a suite wants them.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with the columns of the suite, or with `prompt` or `messages`, and with `references` (a list),
            `reference` or `completion` or without.
        suite ([`Suite`]):
            The suite.
        num_prompts (`int`, *optional*):
            How many of the first rows to take. Defaults to all.

    Returns:
        `list[EvalRow]`

    Raises:
        ValueError: If there are no prompts, or a prompt or a reference is empty.
    """
    columns = set(dataset.column_names)
    missing = [needed for needed in suite.columns if not columns & set(needed.split("|"))]
    is_plain = suite.prompt is None or bool(missing)
    if is_plain and not columns & set(_PROMPTS):
        wanted = ", ".join(f"`{needed.replace('|', '` or `')}`" for needed in suite.columns)
        raise ValueError(
            f"The dataset has the columns {sorted(columns)}, none of which holds prompts: the suite '{suite.name}' "
            f"looks for {wanted + ', else for ' if wanted else ''}`prompt` or `messages`. Rename a column, or give a "
            "suite whose `prompt` template uses those that there are."
        )
    if num_prompts is not None and num_prompts < 1:
        raise ValueError(f"`num_prompts` is {num_prompts}, so nothing would be asked. Set it to 1 or more.")
    count = len(dataset) if num_prompts is None else min(num_prompts, len(dataset))
    if not count:
        raise ValueError("The dataset has no rows, so there is no prompt to answer. Pass one that has.")
    reader = _plain_row if is_plain else _Templates(suite)
    rows = [EvalRow(index, *reader(row)) for index, row in enumerate(dataset.select(range(count)))]
    _check_rows(rows)
    return rows


def _check_rows(rows: list[EvalRow]) -> None:
    empty = [row.index for row in rows if not row.text.strip()]
    if empty:
        raise ValueError(
            f"{_some(empty)} an empty prompt, which gives a model nothing to answer. Remove these rows, or check the "
            "names of the columns."
        )
    # Either none has references, or all have, or the models would be judged on different rows by different measures
    with_references = [row for row in rows if row.references]
    bare = [row.index for row in rows if not row.references or not all(map(str.strip, row.references))]
    if with_references and bare:
        raise ValueError(
            f"{_some(bare)} no reference or an empty one, with which no completion can be compared. Remove these "
            "rows, or the column of references to measure without."
        )


def _some(indices: list[int]) -> str:
    """The first of the rows that something is wrong with, as the start of a sentence."""
    listed = ", ".join(map(str, indices[:5])) + (", ..." if len(indices) > 5 else "")
    return f"{len(indices)} rows ({listed}) have" if len(indices) > 1 else f"Row {listed} has"


def _plain_row(row: dict[str, Any]) -> tuple[Any, tuple[str, ...]]:
    """Prompt and references of a row that has them."""
    if "messages" in row:
        messages = row["messages"] or []
        is_answered = bool(messages) and messages[-1]["role"] == "assistant"
        prompt, answers = (messages[:-1], [messages[-1]["content"]]) if is_answered else (messages, [])
    else:
        prompt, answers = row["prompt"] or "", []
    for name in _ANSWERS:
        if row.get(name) is not None:
            return prompt, _texts(row[name])
    return prompt, tuple(answers)


def _texts(value: Any) -> tuple[str, ...]:
    """References from a text, texts, or the messages of a completion."""
    if isinstance(value, str):
        return (value,)
    if value and isinstance(value[0], Mapping):
        return ("".join(message["content"] for message in value),)
    return tuple("" if text is None else text for text in value)


class _Templates:
    """Renders the templates of a suite for a row."""

    def __init__(self, suite: Suite):
        # Suites are files that people pass on: a template must not reach into Python
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            finalize=lambda value: "" if value is None else value,
        )
        self.suite = suite
        try:
            self.prompt = environment.from_string(suite.prompt)
            self.references = [environment.from_string(reference) for reference in suite.references]
        except TemplateError as error:
            raise ValueError(
                f"A template of the suite '{suite.name}' cannot be read: {error}. Mend it; Jinja's documentation says "
                "how templates are written."
            ) from error
        trees = [environment.parse(reference) for reference in suite.references]
        self.answers = set().union(*map(meta.find_undeclared_variables, trees)) - suite.variables.keys()

    def __call__(self, row: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
        variables = self.suite.variables | row
        try:
            prompt = self.prompt.render(variables)
            if row.get("references") is not None:
                return prompt, _texts(row["references"])
            if not self.answers & row.keys():  # a dataset of prompts alone
                return prompt, ()
            return prompt, tuple(reference.render(variables) for reference in self.references)
        except (TemplateError, TypeError, AttributeError) as error:
            raise ValueError(
                f"A template of the suite '{self.suite.name}' fails on a row with the columns {sorted(row)}: {error}. "
                "Rename the columns, or change the template."
            ) from error

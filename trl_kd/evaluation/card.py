"""The part of a model card that tells how good a model is: a table for people, and `model-index` for the Hub."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from trl_kd.evaluation.figures import direction
from trl_kd.evaluation.formats import DASH, count, is_number, size, with_error
from trl_kd.evaluation.measures import measure_of
from trl_kd.evaluation.report import replace_file


if TYPE_CHECKING:
    from trl_kd.evaluation.comparison import Change, ComparedModel, Comparison


START = "<!-- trl_kd evaluation: begin -->"
"""Line before the section in a model card."""

END = "<!-- trl_kd evaluation: end -->"
"""Line after the section."""

_TASK = ("text-generation", "Text Generation")
_SETTINGS = ("temperature", "top_p", "top_k", "max_completion_length")
# What TRL writes last
_BEFORE = "### Framework versions"


def evaluation_section(comparison: "Comparison", model: str) -> str:
    r"""
    What an evaluation found about one model, in Markdown.

    Args:
        comparison ([`Comparison`]):
            The evaluation.
        model (`str`):
            Name of the model there.

    Returns:
        `str`: a heading, a table of the metrics of this model beside those of the teacher and the baseline, with error
        bars and verdicts, and how it was measured.

    Raises:
        ValueError: If the comparison has no such model.
    """
    own = _find(comparison, model)
    others = [other for other in comparison.models if other is not own and _is_shown(other, own)]
    columns = [*others, own]
    against = next((change.against for change in own.changes.values()), None)
    heads = ["metric", *(_cell(other.name) for other in columns)]
    heads += [f"change from {_cell(against)}", "verdict"] if against is not None else []
    lines = [heads, ["---", *["---:"] * len(columns), *(["---:", "---"] if against is not None else [])]]
    for name in comparison.metrics:
        if name in own.estimates:
            lines.append([_title(name), *(_estimate(other, name) for other in columns)])
            lines[-1] += _change(own.changes.get(name), name) if against is not None else []
    for title, write in (("parameters", count), ("size on disk", size)):
        values = [other.parameters if title == "parameters" else other.size_on_disk for other in columns]
        if any(values):
            lines.append([title, *map(write, values), *(["", ""] if against is not None else [])])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    trl_kd = comparison.versions.get("trl_kd")
    return (
        f"### Evaluation\n\n"
        f"{_conditions(comparison)}\n\n"
        f"{table}\n\n"
        f"↑ higher is better, ↓ lower is better; ± is half of the 95 % interval, over prompts and seeds."
        f"{f' Measured with trl_kd {_cell(trl_kd)}.' if trl_kd else ''}\n"
    )


def _conditions(comparison: "Comparison") -> str:
    """What the models were asked, and how they answered."""
    prompts, seeds = comparison.num_prompts, len(comparison.seeds)
    parts = [
        f"Dataset: {_cell(comparison.dataset)}",
        f"{prompts} prompt{'s' * (prompts != 1)}",
        f"{seeds} seed{'s' * (seeds != 1)} of generation",
    ]
    settings = comparison.settings
    parts += [f"`{key}` {_cell(str(settings[key]))}" for key in _SETTINGS if settings.get(key) is not None]
    return ", ".join(parts) + "."


def update_model_card(folder: str | os.PathLike, comparison: "Comparison", model: str) -> None:
    r"""
    Put an evaluation into a model's card: the section of [`evaluation_section`], and `model-index` metadata.

    A section of an earlier evaluation is replaced, and so are results of the same metrics on the same dataset. All
    else stays. The card is replaced as a whole, or left as it was.

    Args:
        folder (`str` or `os.PathLike`):
            The model's folder, with or without a `README.md`.
        comparison ([`Comparison`]):
            The evaluation.
        model (`str`):
            Name of the model there.

    Raises:
        ValueError: If the comparison has no such model, or the card's marks are broken.

    Examples:

    ```python
    >>> update_model_card("distilled", compare_run(ResultStore("results.sqlite")), "distilled")
    >>> ModelCard.load("distilled/README.md").data.eval_results[0].metric_name
    'Rouge-L'
    ```
    """
    own = _find(comparison, model)
    path = Path(folder) / "README.md"
    if path.exists():
        card = ModelCard.load(path)
    else:
        data = ModelCardData(model_name=own.name, library_name="transformers", pipeline_tag=_TASK[0])
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {_cell(own.name)}\n")
    card.text = _placed(card.text, f"{START}\n{evaluation_section(comparison, model)}{END}\n", path)
    results = eval_results(comparison, model)
    if results:
        replaced = {(one.unique_identifier, one.metric_type) for one in results}
        kept = [
            one for one in card.data.eval_results or [] if (one.unique_identifier, one.metric_type) not in replaced
        ]
        card.data.eval_results = kept + results
        card.data.model_name = card.data.model_name or own.name
    replace_file(path, str(card))


def eval_results(comparison: "Comparison", model: str) -> list[EvalResult]:
    r"""
    The metrics of one model as the Hub wants them.

    Args:
        comparison ([`Comparison`]):
            The evaluation.
        model (`str`):
            Name of the model there.

    Returns:
        `list[EvalResult]`: one for each metric with a finite value.

    Raises:
        ValueError: If the comparison has no such model.
    """
    estimates = _find(comparison, model).estimates
    return [
        EvalResult(
            task_type=_TASK[0],
            task_name=_TASK[1],
            dataset_type=_identifier(comparison.dataset),
            dataset_name=comparison.dataset,
            metric_type=name,
            metric_name=measure_of(name).title,
            metric_value=float(estimates[name].value),
        )
        for name in comparison.metrics
        if name in estimates and is_number(estimates[name].value)
    ]


def _find(comparison: "Comparison", name: str) -> "ComparedModel":
    for model in comparison.models:
        if model.name == name:
            return model
    names = ", ".join(f"`{model.name}`" for model in comparison.models)
    raise ValueError(f"The model is `{name}`, but the evaluation has no results of it. Name one of: {names}.")


def _is_shown(other: "ComparedModel", own: "ComparedModel") -> bool:
    """A card is about one model: others are there to compare it with."""
    return other.role == "teacher" or any(change.against == other.name for change in own.changes.values())


def _title(name: str) -> str:
    measure = measure_of(name)
    arrow = {"": "", "h": " ↑", "l": " ↓"}[direction(name)[:1]]
    return _cell(measure.title + (f" ({measure.unit})" if measure.unit else "")) + arrow


def _estimate(model: "ComparedModel", name: str) -> str:
    found = model.estimates.get(name)
    return DASH if found is None else with_error(found, measure_of(name).digits)


def _change(change: "Change | None", name: str) -> list[str]:
    if change is None:
        return [DASH, DASH]
    return [with_error(change.estimate, measure_of(name).digits, sign=True), change.verdict]


def _cell(text: str) -> str:
    """Text that stays text in a table of Markdown: no markup, no columns of its own, one line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text)


def _identifier(dataset: str) -> str:
    """A dataset's name as the Hub writes identifiers; of a path its last part."""
    name = dataset if re.fullmatch(r"[\w.-]+/[\w.-]+", dataset) else os.path.basename(dataset.rstrip("/\\"))
    return re.sub(r"[^\w./-]+", "-", name, flags=re.ASCII).strip("-./") or "dataset"


def _placed(text: str, section: str, path: Path) -> str:
    """The card's text with the section in place of an earlier one, or before the versions, or at the end."""
    starts, ends = text.count(START), text.count(END)
    if (starts, ends) == (1, 1) and text.index(START) < text.index(END):
        head, _, rest = text.partition(START)
        _, _, tail = rest.partition(END)
        return head + section + tail.removeprefix("\n")
    if starts or ends:
        raise ValueError(
            f"`{path}` has {starts} of the lines `{START}` and {ends} of `{END}`, so where an earlier evaluation ends "
            "cannot be told. Remove these lines, and what is left of that evaluation."
        )
    if _BEFORE in text:
        head, _, tail = text.partition(_BEFORE)
        return f"{head.rstrip()}\n\n{section}\n{_BEFORE}{tail}"
    return f"{text.rstrip()}\n\n{section}" if text.strip() else section

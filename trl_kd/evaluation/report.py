"""
The report: one HTML page that holds all it shows and loads nothing.

Models write whatever they like, script tags too, so no text of theirs is ever markup: the template escapes, texts of
responses travel as JSON and are put in place by `textContent`, and the page's Content-Security-Policy allows only its
own script and style, by their digests.
"""

import base64
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from trl_kd.evaluation import charts
from trl_kd.evaluation.figures import GROUPS, figures, model_styles
from trl_kd.evaluation.formats import is_number
from trl_kd.evaluation.measures import LIKELIHOOD_MEASURES, TEACHER_MEASURES, measure_of
from trl_kd.evaluation.report_tables import (
    baseline,
    cost_table,
    harness_table,
    judge_table,
    metric_table,
    teacher_table,
)


if TYPE_CHECKING:
    from trl_kd.evaluation.comparison import ComparedModel, Comparison
    from trl_kd.evaluation.store import Sample


_FOLDER = Path(__file__).parent
_ROLES = {"teacher": "teacher", "before": "before", "student": "after", "other": ""}
# About the references, not about what was written
_OF_REFERENCES = {*LIKELIHOOD_MEASURES, *(name for name in TEACHER_MEASURES if not name.startswith("own_"))}


def write_report(
    comparison: "Comparison",
    samples: Mapping[str, Sequence["Sample"]],
    path: str | os.PathLike,
    *,
    max_prompts: int = 100,
    command: str | None = None,
) -> None:
    r"""
    Write the report of a comparison: a single HTML file, readable without a network, on a phone, in light and dark.

    Args:
        comparison ([`Comparison`]):
            What it reports.
        samples (`Mapping[str, Sequence[Sample]]`):
            Responses by the name of the model, of one seed. May be empty.
        path (`str` or `os.PathLike`):
            The file. It is replaced as a whole, or left as it was.
        max_prompts (`int`, *optional*, defaults to `100`):
            How many prompts are shown side by side. Of more, that many are taken at equal distances; tables and
            charts are of all.
        command (`str`, *optional*):
            The command that made it, to be shown at its end.

    Raises:
        ValueError: If `max_prompts` is negative.

    Examples:

    ```python
    >>> store = ResultStore("results.sqlite")
    >>> comparison = compare_run(store, "latest")
    >>> samples = {model.name: store.samples(comparison.run_id, model.name, 0) for model in comparison.models}
    >>> write_report(comparison, samples, "report.html")
    ```
    """
    if max_prompts < 0:
        raise ValueError(f"`max_prompts` is {max_prompts}, which is no number of prompts. Give 0 for none, or more.")
    replace_file(path, render(comparison, samples, max_prompts, command))


def render(
    comparison: "Comparison", samples: Mapping[str, Sequence["Sample"]], max_prompts: int, command: str | None
) -> str:
    """The page's HTML."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (_FOLDER.joinpath(name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    drawn = figures(comparison)
    data = response_data(comparison, samples, max_prompts)
    return environment.get_template("report.html.jinja").render(
        comparison=comparison,
        date=_date(comparison.created),
        sentences=comparison.sentences(),
        models=_model_heads(comparison.models),
        table=metric_table(comparison),
        against=baseline(comparison.models),
        against_teacher=teacher_table(comparison),
        charts=_drawn(drawn["comparison"], charts.interval_chart),
        training=_grouped(_drawn(drawn["training"], charts.line_chart)),
        positions=_drawn(drawn["positions"], charts.line_chart),
        scatters=_drawn(drawn["cost"], charts.scatter_chart),
        cost=cost_table(comparison.models),
        judge=judge_table(comparison.models),
        harness=harness_table(comparison.models),
        data=data,
        payload=Markup(json_in_html(data)),
        facts=facts(comparison, command),
        style=Markup(style),
        script=Markup(script),
        policy=_policy(style, script),
    )


def response_data(
    comparison: "Comparison", samples: Mapping[str, Sequence["Sample"]], max_prompts: int
) -> dict[str, Any]:
    r"""
    What the side-by-side view shows, ready for JSON.

    Args:
        comparison ([`Comparison`]):
            Gives order and roles of the models.
        samples (`Mapping[str, Sequence[Sample]]`):
            Responses by model.
        max_prompts (`int`):
            How many prompts are kept, at equal distances.

    Returns:
        `dict`: `models`, `metrics`, `total` (number of prompts that there are) and `prompts`, each with its place in
        the dataset, texts, `divergence` (mean over the tokens of all models but the teacher, `None` without) and
        `responses`, one per model (`None` where a model has none).
    """
    models = [model for model in comparison.models if samples.get(model.name)]
    by_index = {model.name: {sample.index: sample for sample in samples[model.name]} for model in models}
    indices = sorted(set().union(*by_index.values()))
    kept = _at_equal_distances(indices, max_prompts)
    styles = model_styles(comparison.models)
    prompts = []
    for index in kept:
        found = [by_index[model.name].get(index) for model in models]
        first = next(sample for sample in found if sample is not None)
        prompts.append(
            {
                "index": index,
                "prompt": first.prompt,
                "references": list(first.references),
                "divergence": _mean_divergence(models, found),
                "responses": [
                    _response(sample, model.role, comparison.metrics)
                    for sample, model in zip(found, models, strict=True)
                ],
            }
        )
    return {
        "models": [
            {"name": model.name, "role": _ROLES.get(model.role, ""), "style": styles[model.name]} for model in models
        ],
        "total": len(indices),
        "prompts": prompts,
    }


def _response(sample: "Sample | None", role: str, metrics: Sequence[str]) -> dict[str, Any] | None:
    if sample is None:
        return None
    # A teacher differs from itself by rounding alone
    divergence = None if role == "teacher" else sample.divergence
    if divergence is not None and len(divergence) != len(sample.tokens):
        raise ValueError(
            f"A response to prompt {sample.index} has {len(sample.tokens)} tokens and {len(divergence)} divergences, "
            "so that tokens would be coloured wrongly. Pass one divergence per token, or none at all."
        )
    response = {"text": sample.completion, "ended": sample.ended, "metrics": _response_metrics(sample, metrics)}
    if divergence is not None:
        response["tokens"] = list(sample.tokens)
        response["divergence"] = [round(value, 3) if is_number(value) else None for value in divergence]
    return response


def _response_metrics(sample: "Sample", metrics: Sequence[str]) -> list[list[str]]:
    """Titles and values of the metrics that say something about a single response."""
    found = []
    for name in metrics:
        value, weight = sample.values.get(name, (0.0, 0.0))
        # Of one response, distinct-n is an influence value, and its end is told in words
        if name in _OF_REFERENCES or name == "eos_share" or name.startswith("distinct_"):
            continue
        if weight > 0 and is_number(value):
            measure = measure_of(name)
            unit = f" {measure.unit}" if measure.unit in ("tokens", "%") else ""
            digits = 0 if name == "length" else measure.digits
            found.append([measure.title, f"{value:.{digits}f}{unit}"])
    return found


def _mean_divergence(models: Sequence["ComparedModel"], samples: Sequence["Sample | None"]) -> float | None:
    values = [
        value
        for model, sample in zip(models, samples, strict=True)
        if model.role != "teacher" and sample is not None
        for value in sample.divergence or ()
        if is_number(value)
    ]
    return round(sum(values) / len(values), 5) if values else None


def _at_equal_distances(indices: Sequence[int], most: int) -> list[int]:
    if len(indices) <= most:
        return list(indices)
    return [indices[place * len(indices) // most] for place in range(most)]


def facts(comparison: "Comparison", command: str | None) -> list[dict[str, Any]]:
    """How the figures were made: groups of names and values."""
    run = {
        "Run": str(comparison.run_id or ""),
        "Dataset": comparison.dataset,
        "Prompts": str(comparison.num_prompts or ""),
        "Seeds of generation": ", ".join(map(str, comparison.seeds)),
        "Date": _date(comparison.created),
        "Command": command or "",
    }
    run = {name: value for name, value in run.items() if value}
    weights = {model.name: f"{model.weights} ({_source(model.source)})".strip() for model in comparison.models}
    groups = {
        "Run": run,
        "Settings": comparison.settings,
        "Weights (digest and source)": weights,
        "Versions": comparison.versions,
    }
    return [
        {"title": title, "items": [(name, _plain(value)) for name, value in values.items()]}
        for title, values in groups.items()
        if values
    ]


def _source(source: str) -> str:
    """Hub name or folder; of a full path its last part, since the rest is this machine's alone."""
    return Path(source).name if os.path.isabs(source) else source


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def json_in_html(data: Any) -> str:
    r"""
    JSON that can stand inside a `<script>` element.

    All that HTML could take for markup is written as an escape, and so is every character beyond ASCII, among them
    the line separators that end a line of JavaScript.

    Args:
        data (`Any`):
            What JSON can hold, with finite numbers.

    Returns:
        `str`
    """
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def replace_file(path: str | os.PathLike, text: str) -> None:
    r"""
    Put a text in place of a file, whole or not at all.

    Args:
        path (`str` or `os.PathLike`):
            The file. Its folder is made if it is missing.
        text (`str`):
            Its content. What UTF-8 cannot hold, halves of surrogate pairs, becomes a question mark.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "x", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(text)
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _policy(style: str, script: str) -> str:
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    rules = f"default-src 'none'; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'; "
    return rules + "img-src data:; base-uri 'none'; form-action 'none'"


def _model_heads(models: Sequence["ComparedModel"]) -> list[dict[str, Any]]:
    styles = model_styles(models)
    return [
        {"name": model.name, "role": _ROLES.get(model.role, ""), "swatch": Markup(charts.swatch(styles[model.name]))}
        for model in models
    ]


def _drawn(drawings: Sequence[dict[str, Any]], draw) -> list[dict[str, Any]]:
    """Charts with their SVG and, for curves, a legend."""
    found = []
    for chart in drawings:
        legend = [
            {"label": series["label"], "swatch": Markup(charts.swatch(series["style"], series["variety"]))}
            for series in chart.get("series", ())
            if series["label"]
        ]
        found.append(chart | {"svg": Markup(draw(chart)), "legend": legend})
    return found


def _grouped(drawings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    groups = [{"title": title, "charts": [one for one in drawings if one["group"] == title]} for title in GROUPS]
    return [group | {"is_open": group["title"] != GROUPS[-1]} for group in groups if group["charts"]]


def _date(text: str) -> str:
    """A date that people read; the text itself if it is none."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text
    zone = " UTC" if moment.utcoffset() is not None and not moment.utcoffset() else ""
    return f"{moment.day} {moment:%B %Y, %H:%M}{zone}"

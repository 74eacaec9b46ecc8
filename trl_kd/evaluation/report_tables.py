"""The tables of the report: metrics with verdicts, cost to serve with ratios to the teacher, a judge, benchmarks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from trl_kd.evaluation.figures import batch_sizes, direction
from trl_kd.evaluation.formats import DASH, amount, count, duration, is_number, number, signed, size, with_error
from trl_kd.evaluation.measures import LIKELIHOOD_MEASURES, TEACHER_MEASURES, TEXT_MEASURES, measure_of


if TYPE_CHECKING:
    from trl_kd.evaluation.bootstrap import Estimate
    from trl_kd.evaluation.comparison import Change, ComparedModel, Comparison


_SECTIONS = (
    ("What the models write", TEXT_MEASURES),
    ("How likely they find the references", LIKELIHOOD_MEASURES),
    ("How near they are to the teacher", TEACHER_MEASURES),
)
# Key of the cost, title, and how it is written
_SIZES: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("parameters", "Parameters", count),
    ("bytes_on_disk", "Size on disk", size),
    ("load_seconds", "Time to load", duration),
    ("peak_memory_bytes", "Peak memory", size),
)
_SPEEDS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("tokens_per_second", "Tokens per second", amount),
    ("p50_seconds", "Whole generation, median", duration),
    ("p95_seconds", "Whole generation, 95th percentile", duration),
)


class _Row(NamedTuple):
    """One kind of cost, of each model."""

    title: str
    note: str
    values: list[float | None]
    ratios: list[float | None]
    write: Callable[[float | None], str]


def metric_table(comparison: "Comparison") -> list[dict[str, Any]]:
    r"""
    The main table, metrics down and models across.

    Args:
        comparison ([`Comparison`]):
            What it shows.

    Returns:
        `list[dict]`: sections with `title` and `rows`; a row has the metric's `title`, `unit`, `direction`,
        `description` and `cells`, one per model: `value`, `change` and `relative` (empty without a baseline),
        `verdict`, and `kind`, which is the verdict as a style.
    """
    return _sections(comparison, lambda model, name, digits: _cell(model.estimates, model.changes, name, digits))


def teacher_table(comparison: "Comparison") -> list[dict[str, Any]]:
    """Changes against the teacher, in the same form; empty without a teacher."""
    if not any(model.to_teacher for model in comparison.models):
        return []
    return _sections(comparison, lambda model, name, digits: _change_cell(model.to_teacher.get(name), digits))


def _sections(comparison: "Comparison", cell_of) -> list[dict[str, Any]]:
    left = list(comparison.metrics)
    sections = []
    for title, measures in (*_SECTIONS, ("Metrics of your own", None)):
        names = [name for name in left if measures is None or name in measures]
        left = [name for name in left if name not in names]
        rows = []
        for name in names:
            measure = measure_of(name)
            cells = [cell_of(model, name, measure.digits) for model in comparison.models]
            row = {"name": name, "title": measure.title, "unit": measure.unit, "direction": direction(name)}
            rows.append(row | {"description": measure.description, "cells": cells})
        if rows:
            sections.append({"title": title, "rows": rows})
    return sections


def _cell(
    estimates: Mapping[str, "Estimate"], changes: Mapping[str, "Change"], name: str, digits: int
) -> dict[str, str]:
    estimate = estimates.get(name)
    cell = {"value": DASH if estimate is None else with_error(estimate, digits)}
    return _change_cell(changes.get(name), digits) | cell


def _change_cell(change: "Change | None", digits: int) -> dict[str, str]:
    if change is None:
        return {"value": "", "change": "", "relative": "", "verdict": "", "kind": "none"}
    relative = f"({signed(change.relative * 100, 1)} %)" if is_number(change.relative) else ""
    return {
        "value": "",
        "change": with_error(change.estimate, digits, sign=True),
        "relative": relative,
        "verdict": change.verdict,
        "kind": verdict_kind(change.verdict),
    }


def baseline(models: Sequence["ComparedModel"]) -> str:
    """Whom changes are measured against; empty if there are none."""
    return next((change.against for model in models for change in model.changes.values()), "")


def verdict_kind(verdict: str) -> str:
    """The first word of a verdict as a name of a style: better, worse, higher, lower, or same."""
    word = verdict.split()[0] if verdict else ""
    return word if word in ("better", "worse", "higher", "lower") else "same"


def judge_table(models: Sequence["ComparedModel"]) -> dict[str, Any] | None:
    r"""
    What a judge preferred, a row per model that was judged.

    Args:
        models (`Sequence[ComparedModel]`):
            Models, some with a summary of preferences.

    Returns:
        `dict` or `None`: `heads`, `rows` of texts, and a `note`; `None` without a judge.
    """
    judged = [model for model in models if model.judge]
    if not judged:
        return None
    heads = ["Model", "Against", "Preferred", "Wins", "Ties", "Losses", "Same verdict in both orders", "Unreadable"]
    rows = []
    for model in judged:
        found = model.judge
        share = f"{_percent(found['win_rate'])} %"
        if is_number(found.get("low")) and is_number(found.get("high")):
            share += f" ({_percent(found['low'])} to {_percent(found['high'])})"
        counts = [str(found[name]) for name in ("wins", "ties", "losses")]
        trust = [f"{_percent(found['consistency'])} %", str(found["failed_answers"])]
        rows.append([model.name, found.get("against", ""), share, *counts, *trust])
    name = (judged[0].judge.get("settings") or {}).get("model", "")
    note = "Each pair was shown in both orders; a preference counts where both verdicts agree, a tie as one half."
    return {"heads": heads, "rows": rows, "note": f"Judge: {name}. {note}" if name else note}


def harness_table(models: Sequence["ComparedModel"]) -> dict[str, Any] | None:
    r"""
    Results of lm-evaluation-harness, a row per task and metric.

    Args:
        models (`Sequence[ComparedModel]`):
            Models, some with results of [`run_harness`].

    Returns:
        `dict` or `None`: `heads`, `rows` of texts, and a `note`; `None` without results.
    """
    ran = [model for model in models if model.harness]
    if not ran:
        return None
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for model in ran:
        for task, result in model.harness.items():
            for metric, entry in result["metrics"].items():
                found.setdefault((task, metric), {})[model.name] = entry
    rows = []
    for (task, metric), entries in found.items():
        higher = next((one["higher_is_better"] for one in entries.values()), None)
        way = {True: " ↑", False: " ↓", None: ""}[higher]
        rows.append([f"{task}, {metric}{way}", *(_harness_cell(entries.get(model.name)) for model in ran)])
    note = "↑ higher is better, ↓ lower is better. ± is 1.96 standard errors, over the rows of a task."
    return {"heads": ["Task", *(model.name for model in ran)], "rows": rows, "note": note}


def _harness_cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None or entry["value"] is None:
        return DASH
    error = entry["standard_error"]
    return number(entry["value"], 3) + ("" if error is None else f" ± {number(1.96 * error, 3)}")


def _percent(share: float | None) -> str:
    return number(None if share is None else 100 * share, 1)


def cost_table(models: Sequence["ComparedModel"]) -> dict[str, Any] | None:
    r"""
    What each model costs to serve.

    Args:
        models (`Sequence[ComparedModel]`):
            Models, some with results of [`measure_cost`].

    Returns:
        `dict` or `None`: `rows`, each with `title`, `note` and `cells` (`value` and `ratio`, as a text) in the order
        of the models; `conditions`, in words; `warning`, if ratios have no meaning. `None` if nothing was measured.
    """
    if not any(model.cost for model in models):
        return None
    teacher = next((model for model in models if model.role == "teacher" and model.cost), None)
    shares, warning = _shares(models, teacher)
    rows = []
    for row in [*_size_rows(models, shares), *_batch_rows(models, shares)]:
        if any(is_number(value) for value in row.values):
            cells = [
                {"value": row.write(value), "ratio": f"{amount(ratio)}×" if is_number(ratio) else ""}
                for value, ratio in zip(row.values, row.ratios, strict=True)
            ]
            rows.append({"title": row.title, "note": row.note, "cells": cells})
    return {"rows": rows, "conditions": _conditions(models), "warning": warning, "teacher": teacher is not None}


def _shares(
    models: Sequence["ComparedModel"], teacher: "ComparedModel | None"
) -> tuple[list[dict[str, Any] | None], str]:
    """Ratios to the teacher, and why some cannot be had."""
    if teacher is None:
        return [None] * len(models), ""
    from trl_kd.evaluation.cost import ratios  # with PyTorch and Transformers, which a page does without

    shares, warning = [], ""
    for model in models:
        try:
            shares.append(ratios(model.cost, teacher.cost) if model.cost and model is not teacher else None)
        except ValueError as error:
            shares.append(None)
            warning = f"{model.name}: {error}"
    return shares, warning


def _size_rows(models: Sequence["ComparedModel"], shares: Sequence[dict | None]) -> Iterator[_Row]:
    for key, title, write in _SIZES:
        values = [_at(model.cost, key) for model in models]
        yield _Row(title, "", values, [_at(share, key) for share in shares], write)
    for quantile, title in (("p50", "First token, median"), ("p95", "First token, 95th percentile")):
        values = [_at(model.cost, "first_token_seconds", quantile) for model in models]
        found = [_at(share, "first_token_seconds") if quantile == "p50" else None for share in shares]
        yield _Row(title, "one prompt", values, found, duration)


def _batch_rows(models: Sequence["ComparedModel"], shares: Sequence[dict | None]) -> Iterator[_Row]:
    for batch in sorted({batch for model in models for batch in batch_sizes(model.cost)}, key=int):
        note = f"batch of {batch}"
        for key, title, write in _SPEEDS:
            values = [_at(model.cost, "batches", batch, key) for model in models]
            yield _Row(title, note, values, [_at(share, "batches", batch, key) for share in shares], write)
        prices = [_at(model.cost, "price_per_million_tokens", batch) for model in models]
        yield _Row("Price of a million tokens", note, prices, [None] * len(models), amount)


def _at(data: Mapping[str, Any] | None, *keys: str) -> Any:
    """What lies under the keys, or `None`."""
    for key in keys:
        if not isinstance(data, Mapping):
            return None
        data = data.get(key)
    return data


def _conditions(models: Sequence["ComparedModel"]) -> str:
    """Where and how it was measured, from the first model that was."""
    cost = next(model.cost for model in models if model.cost)
    words = [cost.get("device_name") or cost.get("device") or ""]
    if cost.get("threads"):
        words.append(f"{cost['threads']} thread{'s' * (cost['threads'] > 1)}")
    if cost.get("dtype"):
        words.append(str(cost["dtype"]).removeprefix("torch."))
    if cost.get("prompt_length") and cost.get("new_tokens"):
        words.append(f"prompts of {cost['prompt_length']} tokens, {cost['new_tokens']} new ones")
    return ", ".join(filter(None, words))

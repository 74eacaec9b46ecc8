"""
What the figures of a comparison show, as plain dicts and lists.

The report draws them as SVG, `trl_kd.plots` as PNG: both show the same numbers.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from trl_kd.evaluation.formats import is_number
from trl_kd.evaluation.measures import measure_of


if TYPE_CHECKING:
    from trl_kd.evaluation.comparison import ComparedModel, Comparison


_MAX_POINTS = 240
_MIN_TOKENS = 5
_STYLES = "abcdefg"

_LOSS, _MOMENTS, _CRITIC = "Losses", "Moments", "Health of the critic"
_AGREEMENT, _SETS, _OTHER = "Agreement with the teacher", "Action sets", "Other"
GROUPS = (_LOSS, _MOMENTS, _CRITIC, _AGREEMENT, _SETS, _OTHER)
"""Groups of training curves, in the order of the report."""

_NATS, _SHARE = "nats/token", "share of tokens"
# Name in the logs -> group, title, unit, and the part of the chart where two names share one
_CURVES: dict[str, tuple[str, str, str, str]] = {
    "loss": (_LOSS, "Loss", "", ""),
    "eval_loss": (_LOSS, "Loss in evaluation", "", ""),
    "nll": (_LOSS, "NLL of the text", _NATS, ""),
    "forward_kl": (_LOSS, "Forward KL", _NATS, ""),
    "reverse_kl": (_LOSS, "Reverse KL", _NATS, ""),
    "jsd": (_LOSS, "Jensen-Shannon divergence", _NATS, ""),
    "student_ce": (_LOSS, "Cross-entropy of the student", _NATS, ""),
    "projector_ce": (_LOSS, "Cross-entropy of the projected teacher", _NATS, ""),
    "student_space_kd": (_LOSS, "Divergence in the student's space", _NATS, ""),
    "teacher_space_kd": (_LOSS, "Divergence in the teacher's space", _NATS, ""),
    "distance": (_LOSS, "Distance over shared tokens", "", ""),
    "set_forward_kl": (_LOSS, "Forward KL on the set", _NATS, ""),
    "inverse_soft_q": (_LOSS, "Inverse soft Q", "", ""),
    "objective": (_LOSS, "Objective", "", ""),
    "tail": (_LOSS, "Tail: −log of the mass on the set", _NATS, ""),
    "second_nll": (_LOSS, "NLL of the second data", _NATS, ""),
    "second_forward_kl": (_LOSS, "Forward KL on the second data", _NATS, ""),
    "moment": (_MOMENTS, "Moment", "", ""),
    "unseen_moment": (_MOMENTS, "Moment on tokens new to the critic", "", ""),
    "tightness": (_CRITIC, "Tightness", "share of the largest moment", ""),
    "unseen_tightness": (_CRITIC, "Tightness on new tokens", "share of the largest moment", ""),
    "saturation": (_CRITIC, "Saturation", "mean size of its values", ""),
    "critic_objective": (_CRITIC, "Objective of the critic", "", ""),
    "critic_grad_norm": (_CRITIC, "Gradient norm of the critic", "", ""),
    "critic_learning_rate": (_CRITIC, "Learning rate of the critic", "", ""),
    "advantage_size": (_CRITIC, "Size of the advantage", "", ""),
    "total_variation": (_AGREEMENT, "Total variation", _SHARE, ""),
    "top1_agreement": (_AGREEMENT, "Same likeliest token", _SHARE, ""),
    "student_entropy": (_AGREEMENT, "Entropy", _NATS, "student"),
    "teacher_entropy": (_AGREEMENT, "Entropy", _NATS, "teacher"),
    "student_agreement": (_AGREEMENT, "Student finds the label", _SHARE, ""),
    "projector_agreement": (_AGREEMENT, "Projected teacher finds the label", _SHARE, ""),
    "gate": (_AGREEMENT, "Open gate", _SHARE, ""),
    "aligned_share": (_AGREEMENT, "Aligned tokens", _SHARE, ""),
    "set_size": (_SETS, "Mean size of a set", "tokens", ""),
    "set_size_max": (_SETS, "Largest set", "tokens", ""),
    "student_mass": (_SETS, "Mass on the set", "probability", "student"),
    "teacher_mass": (_SETS, "Mass on the set", "probability", "teacher"),
    "label_in_set": (_SETS, "Labels in the set", _SHARE, ""),
    "completion_length": (_OTHER, "Length of rollouts", "tokens", ""),
    "eos_rate": (_OTHER, "Rollouts that end", "share", ""),
    "distinct_2": (_OTHER, "distinct-2 of rollouts", "share of bigrams", ""),
    "tokens": (_OTHER, "Trained tokens of a step", "tokens", ""),
    "grad_norm": (_OTHER, "Gradient norm", "", ""),
    "learning_rate": (_OTHER, "Learning rate", "", ""),
}
# Of a run, not of a step
_NO_CURVES = re.compile(r"^(step|epoch|total_flos|train_.*|eval_(runtime|.*_per_second))$")
_KEY = re.compile(r"^(?P<evaluation>eval_)?kd/(?:(?P<source>off_policy|on_policy)/)?(?P<name>.+)$")

_POSITIONS = {
    "total_variation": ("Total variation to the teacher by position", "share of tokens"),
    "set_size": ("Size of the teacher's action set by position", "tokens"),
}


def figures(comparison: "Comparison") -> dict[str, list[dict[str, Any]]]:
    r"""
    The data of all figures.

    Args:
        comparison ([`Comparison`]):
            What the figures show.

    Returns:
        `dict[str, list[dict]]`: charts by kind: `"comparison"` (a dot and an interval per model), `"training"`,
        `"positions"` (lines) and `"cost"` (points). A kind without data is an empty list.
    """
    return {
        "comparison": comparison_charts(comparison),
        "training": training_charts(comparison.models),
        "positions": position_charts(comparison.models),
        "cost": cost_charts(comparison),
    }


def model_styles(models: Sequence["ComparedModel"]) -> dict[str, str]:
    """A style per model, which stands for a colour and a marker: teacher, before, and a letter for each other."""
    styles: dict[str, str] = {}
    letters = 0
    for model in models:
        if model.role in ("teacher", "before") and model.role not in styles.values():
            styles[model.name] = model.role
        else:
            styles[model.name] = _STYLES[letters % len(_STYLES)]
            letters += 1
    return styles


def main_metrics(comparison: "Comparison", limit: int = 6) -> list[str]:
    """The main metric, and after it those that tell better from worse."""
    judged = [name for name in comparison.metrics[1:] if measure_of(name).higher_is_better is not None]
    return (comparison.metrics[:1] + judged)[:limit]


def direction(name: str) -> str:
    """Which way is better, in words."""
    higher = measure_of(name).higher_is_better
    return "" if higher is None else "higher is better" if higher else "lower is better"


def comparison_charts(comparison: "Comparison") -> list[dict[str, Any]]:
    """A dot and an interval per model, for each metric that at least one model has."""
    styles = model_styles(comparison.models)
    charts, main = [], main_metrics(comparison)
    for name in main + [name for name in comparison.metrics if name not in main]:
        measure = measure_of(name)
        rows = []
        for model in comparison.models:
            estimate = model.estimates.get(name)
            if estimate is not None and is_number(estimate.value):
                rows.append(
                    {"label": model.name, "style": styles[model.name], "value": estimate.value}
                    | {"low": _or_none(estimate.low), "high": _or_none(estimate.high)}
                )
        if rows:
            chart = {"metric": name, "title": measure.title, "unit": measure.unit, "direction": direction(name)}
            charts.append(chart | {"digits": measure.digits, "is_main": name in main, "rows": rows})
    return charts


def training_charts(models: Sequence["ComparedModel"]) -> list[dict[str, Any]]:
    """Curves of all models' log histories, a chart per quantity, with the group that it belongs to."""
    styles = model_styles(models)
    trained = [model for model in models if model.training]
    charts: dict[tuple[str, str], dict[str, Any]] = {}
    for model in trained:
        for key, (steps, values) in sorted(_series(model.training).items()):
            group, title, unit, part, variety = _describe(key)
            chart = charts.setdefault((group, title), {"group": group, "title": title, "unit": unit, "series": []})
            words = [model.name if len(trained) > 1 else "", part, variety]
            style = "teacher" if part == "teacher" else styles[model.name]
            x, y = _thin(steps, values)
            chart["series"].append(
                {"label": ", ".join(filter(None, words)), "style": style, "variety": variety, "x": x, "y": y}
            )
    order = {title: index for index, (_, title, _, _) in enumerate(_CURVES.values())}
    for chart in charts.values():
        chart["x_label"] = "step"
    return sorted(charts.values(), key=lambda chart: (GROUPS.index(chart["group"]), order.get(chart["title"], 1000)))


def position_charts(models: Sequence["ComparedModel"]) -> list[dict[str, Any]]:
    """What is known by position in the sequence, for the positions that enough completions reach."""
    styles = model_styles(models)
    charts = []
    for key, (title, unit) in _POSITIONS.items():
        series = []
        for model in models:
            values = (model.by_position or {}).get(key)
            # A teacher does not differ from itself
            if not values or (key == "total_variation" and model.role == "teacher"):
                continue
            counts = model.by_position.get("count") or [_MIN_TOKENS] * len(values)
            enough = min(_MIN_TOKENS, max(counts))
            kept = [index for index, many in enumerate(counts[: len(values)]) if many and many >= enough]
            x, y = _thin([index + 1 for index in kept], [_or_none(values[index]) for index in kept])
            series.append({"label": model.name, "style": styles[model.name], "variety": "", "x": x, "y": y})
        if any(one["x"] for one in series):
            chart = {"key": key, "title": title, "unit": unit, "x_label": "token of the completion"}
            charts.append(chart | {"series": series, "min_count": _MIN_TOKENS})
    return charts


def cost_charts(comparison: "Comparison") -> list[dict[str, Any]]:
    """Cost against the main metric, a point per model: for speed and for size."""
    names = main_metrics(comparison, limit=1)
    if not names:
        return []
    measure, styles = measure_of(names[0]), model_styles(comparison.models)
    charts = []
    for title, unit, better, cost in (
        ("Speed against quality", "tokens per second", "faster to the right", _speed),
        ("Size against quality", "bytes on disk", "smaller to the left", _size),
    ):
        points = []
        for model in comparison.models:
            x, estimate = cost(model), model.estimates.get(names[0])
            if is_number(x) and x > 0 and estimate is not None and is_number(estimate.value):
                points.append(
                    {"label": model.name, "style": styles[model.name], "x": x, "y": estimate.value}
                    | {"low": _or_none(estimate.low), "high": _or_none(estimate.high)}
                )
        if len(points) > 1:
            chart = {"title": title, "x_label": unit, "note": better, "points": points, "metric": names[0]}
            chart |= {"y_label": measure.title, "y_unit": measure.unit, "direction": direction(names[0])}
            charts.append(chart)
    return charts


def batch_sizes(cost: dict | None) -> list[str]:
    """The batch sizes at which a model's speed was measured, smallest first."""
    return sorted(((cost or {}).get("batches") or {}), key=int)


def _speed(model: "ComparedModel") -> float | None:
    sizes = batch_sizes(model.cost)
    return model.cost["batches"][sizes[-1]].get("tokens_per_second") if sizes else None


def _size(model: "ComparedModel") -> float | None:
    return (model.cost or {}).get("bytes_on_disk") or model.size_on_disk


def _or_none(value: float | None) -> float | None:
    return float(value) if is_number(value) else None


def _series(history: Sequence[dict]) -> dict[str, tuple[list[float], list[float | None]]]:
    """Steps and values by key; of one step's several entries the last."""
    found: dict[str, dict[float, float | None]] = {}
    for entry in history:
        for key, value in _values(entry):
            found.setdefault(key, {})[entry["step"]] = value
    ordered = {key: sorted(points.items()) for key, points in found.items()}
    return {key: ([step for step, _ in points], [value for _, value in points]) for key, points in ordered.items()}


def _values(entry: dict) -> Iterator[tuple[str, float | None]]:
    """The numbers of one log entry; what isn't finite is a gap."""
    if "step" not in entry:
        return
    for key, value in entry.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and not _NO_CURVES.match(key):
            yield key, _or_none(value)


def _describe(key: str) -> tuple[str, str, str, str, str]:
    """Group, title, unit, part and variety of a key of the logs."""
    match = _KEY.match(key)
    name, words = key, []
    if match:
        name = match["name"]
        words = [(match["source"] or "").replace("_", "-"), "evaluation" if match["evaluation"] else ""]
    group, title, unit, part = _CURVES.get(name, (_OTHER, name.replace("_", " "), "", ""))
    return group, title, unit, part, ", ".join(filter(None, words))


def _thin(x: list[float], y: list[float | None]) -> tuple[list[float], list[float | None]]:
    """At most `_MAX_POINTS` points: means of equal stretches, so that a long run stays a small page."""
    if len(x) <= _MAX_POINTS:
        return list(x), list(y)
    stretch = math.ceil(len(x) / _MAX_POINTS)
    xs, ys = [], []
    for start in range(0, len(x), stretch):
        known = [value for value in y[start : start + stretch] if value is not None]
        steps = x[start : start + stretch]
        xs.append(sum(steps) / len(steps))
        ys.append(sum(known) / len(known) if known else None)
    return xs, ys

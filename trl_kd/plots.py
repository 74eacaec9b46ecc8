"""
The figures of a report as PNG files, for a paper or a README.

They take plain lists of dicts, those that [`~trl_kd.evaluation.figures.figures`] makes of a comparison, and show the
same numbers as the report. matplotlib comes with the extra `plots`, and is loaded when something is drawn.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Style -> colour, which those who see fewer colours can tell apart by brightness, and marker
_STYLES = {
    "teacher": ("#26282c", "s"),
    "before": ("#767b84", "o"),
    "a": ("#0063b1", "o"),
    "b": ("#c24e00", "^"),
    "c": ("#007a5a", "D"),
    "d": ("#a23e8c", "v"),
    "e": ("#8a6200", "P"),
    "f": ("#00788f", "X"),
    "g": ("#6a4bc9", "o"),
}
_DASHES = {
    "on-policy": "--",
    "evaluation": ":",
    "off-policy, evaluation": "-.",
    "on-policy, evaluation": (0, (4, 2, 1, 2, 1, 2)),
}
_COLUMNS = 3
_PANEL = (4.0, 2.8)
_DPI = 150


def plot_comparison(charts: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    r"""
    A dot and an interval per model, in a panel for each metric.

    Args:
        charts (`Sequence[Mapping[str, Any]]`):
            Each with `title`, `unit`, `direction` and `rows`: mappings of `label`, `style`, `value`, `low` and `high`
            (`None` where there is no interval).
        path (`str` or `os.PathLike`):
            The PNG file.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there are no charts.

    Examples:

    ```python
    >>> row = {"label": "student", "style": "a", "value": 28.1, "low": 26.8, "high": 29.4}
    >>> chart = {"title": "Rouge-L", "unit": "of 100", "direction": "higher is better", "rows": [row]}
    >>> plot_comparison([chart], "comparison.png")
    ```
    """
    rows = max((len(chart["rows"]) for chart in charts), default=0)
    _draw(charts, path, _draw_intervals, height=0.9 + 0.32 * rows)


def plot_training(charts: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    r"""
    Curves over the steps of training, in a panel for each quantity.

    Args:
        charts (`Sequence[Mapping[str, Any]]`):
            Each with `title`, `unit`, `x_label` and `series`: mappings of `label`, `style`, `variety`
            (`"off-policy"`, `"on-policy"`, `"evaluation"` or empty), `x` and `y` (`None` for a gap).
        path (`str` or `os.PathLike`):
            The PNG file.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there are no charts.
    """
    _draw(charts, path, _draw_lines)


def plot_positions(charts: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    r"""
    Curves over the position in the sequence, in the form of [`plot_training`].

    Args:
        charts (`Sequence[Mapping[str, Any]]`):
            As for [`plot_training`].
        path (`str` or `os.PathLike`):
            The PNG file.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there are no charts.
    """
    _draw(charts, path, _draw_lines)


def plot_cost(charts: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    r"""
    Cost against quality, a point for each model.

    Args:
        charts (`Sequence[Mapping[str, Any]]`):
            Each with `title`, `x_label`, `y_label`, `y_unit` and `points`: mappings of `label`, `style`, `x`, `y`,
            `low` and `high`.
        path (`str` or `os.PathLike`):
            The PNG file.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there are no charts.
    """
    _draw(charts, path, _draw_points, height=3.2)


def write_figures(figures: Mapping[str, Sequence[Mapping[str, Any]]], folder: str | os.PathLike) -> list[str]:
    r"""
    All figures for which there are data, each as a PNG file of its name.

    Args:
        figures (`Mapping[str, Sequence[Mapping[str, Any]]]`):
            Charts by kind: `"comparison"`, `"training"`, `"positions"` and `"cost"`, as
            [`~trl_kd.evaluation.figures.figures`] returns them.
        folder (`str` or `os.PathLike`):
            Where the files go; it is made if it is missing.

    Returns:
        `list[str]`: paths of the files.

    Raises:
        ImportError: If matplotlib is missing.

    Examples:

    ```python
    >>> write_figures(figures(comparison), "figures")
    ['figures/comparison.png', 'figures/training.png', 'figures/positions.png', 'figures/cost.png']
    ```
    """
    drawings = {
        "comparison": plot_comparison,
        "training": plot_training,
        "positions": plot_positions,
        "cost": plot_cost,
    }
    _import_figure()
    os.makedirs(folder, exist_ok=True)
    paths = []
    for kind, plot in drawings.items():
        if figures.get(kind):
            paths.append(os.path.join(folder, f"{kind}.png"))
            plot(figures[kind], paths[-1])
    return paths


def _import_figure() -> type["Figure"]:
    """matplotlib's figure, without pyplot: no window, no state that figures share."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"matplotlib cannot be imported ({error}), so no figure can be drawn. Install it with "
            "`pip install trl_kd[plots]`."
        ) from error
    return Figure


def _draw(
    charts: Sequence[Mapping[str, Any]],
    path: str | os.PathLike,
    draw: Callable[["Axes", Mapping[str, Any]], None],
    height: float = _PANEL[1],
) -> None:
    """A panel for each chart, in rows of at most `_COLUMNS`."""
    figure_class = _import_figure()
    from matplotlib import rc_context

    if not charts:
        raise ValueError("`charts` is empty, so there is nothing to draw. Pass at least one chart.")
    columns = min(_COLUMNS, len(charts))
    rows = math.ceil(len(charts) / columns)
    # A dollar sign in the name of a model is no formula
    with rc_context({"text.parse_math": False}):
        figure = figure_class(figsize=(_PANEL[0] * columns, height * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, chart in zip(panels, charts, strict=False):
            draw(axes, chart)
            axes.tick_params(labelsize=8)
            axes.grid(color="#dedbd3", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        for axes in panels[len(charts) :]:
            axes.set_visible(False)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=_DPI, format="png")


def _draw_intervals(axes: "Axes", chart: Mapping[str, Any]) -> None:
    rows = chart["rows"]
    for place, row in enumerate(rows):
        colour, _ = _STYLES[row["style"]]
        if row["low"] is not None and row["high"] is not None:
            axes.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=1.4)
        axes.plot(row["value"], place, **_marker(row["style"]))
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    unit = ", ".join(filter(None, (chart["unit"], chart.get("direction", ""))))
    axes.set_title(chart["title"], loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel(unit, fontsize=8)


def _draw_lines(axes: "Axes", chart: Mapping[str, Any]) -> None:
    handles, labels = [], []
    for series in chart["series"]:
        colour, _ = _STYLES[series["style"]]
        values = [math.nan if value is None else value for value in series["y"]]
        # A single value makes no line
        marker = "o" if len(values) == 1 else None
        dashes = _DASHES.get(series["variety"], "-")
        (line,) = axes.plot(series["x"], values, color=colour, linestyle=dashes, marker=marker, linewidth=1.3)
        if series["label"]:
            handles.append(line)
            # matplotlib hides what begins with an underscore
            labels.append(series["label"] if series["label"][0] != "_" else f"\u200b{series['label']}")
    if len(labels) > 1:
        axes.legend(handles, labels, fontsize=7, frameon=False)
    axes.set_title(chart["title"], loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel(chart["x_label"], fontsize=8)
    axes.set_ylabel(chart["unit"], fontsize=8)


def _draw_points(axes: "Axes", chart: Mapping[str, Any]) -> None:
    from matplotlib.ticker import EngFormatter

    points = chart["points"]
    for point in points:
        colour, _ = _STYLES[point["style"]]
        if point["low"] is not None and point["high"] is not None:
            axes.plot([point["x"], point["x"]], [point["low"], point["high"]], color=colour, linewidth=1.2)
        axes.plot(point["x"], point["y"], **_marker(point["style"]))
        axes.annotate(point["label"], (point["x"], point["y"]), xytext=(6, 4), textcoords="offset points", fontsize=8)
    costs = [point["x"] for point in points]
    if max(costs) > 8 * min(costs):
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    # Room for the names
    axes.margins(x=0.25, y=0.1)
    axes.set_title(chart["title"], loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel(chart["x_label"], fontsize=8)
    axes.set_ylabel(", ".join(filter(None, (chart["y_label"], chart["y_unit"]))), fontsize=8)


def _marker(style: str) -> dict[str, Any]:
    colour, marker = _STYLES[style]
    face = "white" if style == "before" else colour
    return {"color": colour, "marker": marker, "markerfacecolor": face, "markersize": 6, "linestyle": "none"}

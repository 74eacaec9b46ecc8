"""
Charts as SVG text, for a page that loads nothing.

Colours come from the page's style sheet, by class: `k-<style>` sets the colour of a model, the other classes say what
is drawn with it. Models differ in the shape of their markers too, and kinds of curves in their dashes, so that no one
depends on colour. All charts are `WIDTH` units wide, about as many as a phone has pixels: labels stay readable.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from xml.sax.saxutils import escape

from trl_kd.evaluation.formats import amount, number


WIDTH = 360
"""Width of every chart in its own units."""

_ROW = 30
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 8, 38
_CHARACTER = 6.8
# Candidate places of a point's label, the best first: (x, y, anchor)
_PLACES = (
    *((9, 4, "start"), (-9, 4, "end"), (0, -11, "middle"), (0, 19, "middle")),
    *((side, y, anchor) for y in (-10, 18, -24, 32, -38) for side, anchor in ((9, "start"), (-9, "end"))),
)
_DASHES = {
    "on-policy": "dash",
    "evaluation": "dot",
    "off-policy, evaluation": "long",
    "on-policy, evaluation": "short",
}
_TRIANGLE, _DIAMOND = ((0, -5.4), (4.9, 3.6), (-4.9, 3.6)), ((0, -5.4), (5.4, 0), (0, 5.4), (-5.4, 0))
_SHAPES = {
    "c": _DIAMOND,
    "b": _TRIANGLE,
    "d": tuple((x, -y) for x, y in _TRIANGLE),
    "e": ((-2, -5), (2, -5), (2, -2), (5, -2), (5, 2), (2, 2), (2, 5), (-2, 5), (-2, 2), (-5, 2), (-5, -2), (-2, -2)),
    "f": ((-5, -3), (5, -3), (5, 3), (-5, 3)),
    "teacher": ((-4.4, -4.4), (4.4, -4.4), (4.4, 4.4), (-4.4, 4.4)),
}


def interval_chart(chart: dict[str, Any]) -> str:
    r"""
    A dot per model, with the interval as a line through it and the value in figures.

    Args:
        chart (`dict[str, Any]`):
            `title`, `unit`, `digits` and `rows`: dicts of `label`, `style`, `value`, `low` and `high` (`None` where
            there is no interval).

    Returns:
        `str`: an `<svg>` element.
    """
    rows, digits = chart["rows"], chart["digits"]
    figures = [number(row["value"], digits) for row in rows]
    left = min(118.0, max(_text_width(row["label"]) for row in rows)) + 14
    right = WIDTH - max(_text_width(text) for text in figures) - 14
    ends = [value for row in rows for value in (row["value"], row["low"], row["high"]) if value is not None]
    low, high = _padded(min(ends), max(ends))
    height = _ROW * len(rows) + 26

    def x_of(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    parts = list(_vertical_axis_lines(ticks(low, high, 4), x_of, 4, height - 22))
    for index, (row, text) in enumerate(zip(rows, figures, strict=True)):
        y = 4 + _ROW * (index + 0.5)
        kept = _shortened(row["label"], 118)
        parts.append(f'<text class="label" x="0" y="{y + 4:.1f}">{_escape(kept)}</text>')
        parts.append(f'<text class="figure" x="{WIDTH}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        inside = f"<title>{_escape(_row_words(row, digits))}</title>"
        if row["low"] is not None and row["high"] is not None:
            inside += _whisker(x_of(row["low"]), x_of(row["high"]), y)
        inside += marker(row["style"], x_of(row["value"]), y)
        parts.append(f'<g class="k-{row["style"]}">{inside}</g>')
    words = "; ".join(_row_words(row, digits) for row in rows)
    return _svg(height, chart["title"], words, parts)


def line_chart(chart: dict[str, Any]) -> str:
    r"""
    Curves over a common axis; a gap where a value is `None`.

    Args:
        chart (`dict[str, Any]`):
            `title`, `unit`, `x_label` and `series`: dicts of `label`, `style`, `variety` (`"off-policy"`,
            `"on-policy"`, `"evaluation"` or empty, which decides the dashes), `x` and `y`.

    Returns:
        `str`: an `<svg>` element; one that says so if nothing can be drawn.
    """
    points = [(x, y) for series in chart["series"] for x, y in zip(series["x"], series["y"], strict=True)]
    points = [(x, y) for x, y in points if y is not None]
    if not points:
        return _svg(
            40, chart["title"], "no finite values", ['<text class="label" x="0" y="24">No finite values</text>']
        )
    height = 200
    low, high = _padded(min(y for _, y in points), max(y for _, y in points), keep_sign=True)
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    last = last if last > first else first + 1

    def x_of(value: float) -> float:
        return _LEFT + (value - first) / (last - first) * (WIDTH - _LEFT - _RIGHT)

    def y_of(value: float) -> float:
        return height - _BOTTOM - (value - low) / (high - low) * (height - _BOTTOM - _TOP)

    parts = list(_horizontal_axis_lines(ticks(low, high, 5), y_of))
    marks = [tick for tick in ticks(first, last, 4) if tick == int(tick)]
    parts += _bottom_axis(marks, x_of, height, chart["x_label"])
    for series in chart["series"]:
        inside = "".join(_curve(series, x_of, y_of))
        parts.append(f'<g class="k-{series["style"]} {_dash(series["variety"])}">{inside}</g>')
    words = "; ".join(_series_words(series) for series in chart["series"])
    return _svg(height, chart["title"], words, parts)


def scatter_chart(chart: dict[str, Any]) -> str:
    r"""
    Points with their names, over an axis of cost that is logarithmic where costs differ much.

    Args:
        chart (`dict[str, Any]`):
            `title`, `x_label`, `y_label`, and `points`: dicts of `label`, `style`, `x`, `y`, `low` and `high`.

    Returns:
        `str`: an `<svg>` element.
    """
    points, height = chart["points"], 240
    xs = [point["x"] for point in points]
    is_log = max(xs) / min(xs) > 8
    scale = math.log10 if is_log else float
    ends = [value for point in points for value in (point["y"], point["low"], point["high"]) if value is not None]
    (first, last), (low, high) = _padded(*_range(map(scale, xs)), share=0.12), _padded(min(ends), max(ends))

    def x_of(value: float) -> float:
        return _LEFT + (scale(value) - first) / (last - first) * (WIDTH - _LEFT - _RIGHT)

    def y_of(value: float) -> float:
        return height - _BOTTOM - (value - low) / (high - low) * (height - _BOTTOM - _TOP)

    parts = list(_horizontal_axis_lines(ticks(low, high, 5), y_of))
    marks = _log_ticks(first, last) if is_log else [tick for tick in ticks(first, last, 3) if tick > 0]
    parts += _bottom_axis(marks, x_of, height, chart["x_label"] + (" (log scale)" if is_log else ""))
    places = [(x_of(point["x"]), y_of(point["y"])) for point in points]
    labels = _place_labels([_shortened(point["label"], 130) for point in points], places, height)
    for point, (x, y), label in zip(points, places, labels, strict=True):
        inside = f"<title>{_escape(_point_words(point))}</title>"
        if point["low"] is not None and point["high"] is not None:
            inside += f'<path class="whisker" d="M{x:.1f} {y_of(point["low"]):.1f}V{y_of(point["high"]):.1f}"/>'
        inside += marker(point["style"], x, y)
        parts.append(f'<g class="k-{point["style"]}">{inside}</g>{label}')
    return _svg(height, chart["title"], "; ".join(map(_point_words, points)), parts)


def marker(style: str, x: float, y: float) -> str:
    """The marker of a model: a shape of its own for each style."""
    if style in _SHAPES:
        corners = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in _SHAPES[style])
        return f'<polygon class="mark" points="{corners}"/>'
    kind = "mark hollow" if style == "before" else "mark"
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4.6"/>'


def swatch(style: str, variety: str | None = None) -> str:
    r"""
    The sign of a model or of a curve, for legends and tables.

    Args:
        style (`str`):
            Style of the model.
        variety (`str`, *optional*):
            Kind of curve; a marker is shown without.

    Returns:
        `str`: a small `<svg>` element that screen readers skip.
    """
    if variety is None:
        return f'<svg class="swatch k-{style}" viewBox="0 0 14 14" aria-hidden="true">{marker(style, 7, 7)}</svg>'
    line = '<path class="curve" d="M1 7H25"/>'
    return f'<svg class="swatch wide k-{style} {_dash(variety)}" viewBox="0 0 26 14" aria-hidden="true">{line}</svg>'


def ticks(low: float, high: float, most: int) -> list[float]:
    r"""
    Round numbers within a range, at distances of 1, 2, 2.5 or 5 times a power of ten.

    Args:
        low (`float`), high (`float`):
            The range, `low < high`.
        most (`int`):
            About how many there should be at most.

    Returns:
        `list[float]`
    """
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    start = math.ceil(low / step - 1e-9)
    return [index * step for index in range(start, math.floor(high / step + 1e-9) + 1)]


def tick_labels(marks: Sequence[float]) -> list[str]:
    """Labels of ticks, all with the decimals that their distance needs."""
    if len(marks) < 2:
        return [amount(mark) for mark in marks]
    step = min(right - left for left, right in zip(marks, marks[1:], strict=False))
    largest = max(map(abs, marks))
    if largest >= 1e4 or step < 1e-4:
        return [_short(mark) for mark in marks]
    digits = next(digits for digits in range(7) if abs(round(step, digits) - step) < step * 1e-6)
    return [number(mark, digits) for mark in marks]


def _short(value: float) -> str:
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{unit}".replace("-", "−")
    return f"{value:.3g}".replace("e-0", "e-").replace("-", "−")


def _log_ticks(first: float, last: float) -> list[float]:
    """1, 2 and 5 times powers of ten, or the powers alone where these are many."""
    powers = range(math.floor(first), math.ceil(last) + 1)
    found = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    found = [mark for mark in found if first <= math.log10(mark) <= last]
    return found if len(found) <= 5 else [mark for mark in found if math.log10(mark) == round(math.log10(mark))]


def _range(values: Iterable[float]) -> tuple[float, float]:
    values = list(values)
    return min(values), max(values)


def _padded(low: float, high: float, share: float = 0.06, keep_sign: bool = False) -> tuple[float, float]:
    """A little room around a range; with `keep_sign` not beyond zero, where values end."""
    if high <= low:
        room = abs(low) * 0.1 or 1.0
        return (0.0 if keep_sign and low >= 0 and low - room < 0 else low - room), high + room
    room = (high - low) * share
    bottom = low - room
    return (0.0 if keep_sign and low >= 0 and bottom < 0 else bottom), high + room


def _svg(height: float, title: str, description: str, parts: Sequence[str]) -> str:
    head = f"<title>{_escape(title)}</title><desc>{_escape(description)}</desc>"
    body = "".join(parts)
    return f'<svg class="plot" role="img" viewBox="0 0 {WIDTH} {height:g}">{head}{body}</svg>'


def _vertical_axis_lines(marks: Sequence[float], x_of, top: float, bottom: float) -> Iterator[str]:
    for mark, text in zip(marks, tick_labels(marks), strict=True):
        x = x_of(mark)
        yield f'<path class="grid" d="M{x:.1f} {top:.1f}V{bottom:.1f}"/>'
        yield f'<text class="tick" x="{x:.1f}" y="{bottom + 15:.1f}" text-anchor="middle">{text}</text>'


def _horizontal_axis_lines(marks: Sequence[float], y_of) -> Iterator[str]:
    for mark, text in zip(marks, tick_labels(marks), strict=True):
        y = y_of(mark)
        yield f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>'
        yield f'<text class="tick" x="{_LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>'


def _bottom_axis(marks: Sequence[float], x_of, height: float, title: str) -> Iterator[str]:
    y = height - _BOTTOM
    yield f'<path class="axis" d="M{_LEFT} {y}H{WIDTH - _RIGHT}"/>'
    for mark, text in zip(marks, tick_labels(marks), strict=True):
        x = x_of(mark)
        yield f'<path class="axis" d="M{x:.1f} {y}v4"/>'
        yield f'<text class="tick" x="{x:.1f}" y="{y + 16}" text-anchor="middle">{text}</text>'
    x = (_LEFT + WIDTH - _RIGHT) / 2
    yield f'<text class="tick" x="{x:.1f}" y="{height - 5}" text-anchor="middle">{_escape(title)}</text>'


def _whisker(low: float, high: float, y: float) -> str:
    return (
        f'<path class="whisker" d="M{low:.1f} {y:.1f}H{high:.1f}M{low:.1f} {y - 4:.1f}v8M{high:.1f} {y - 4:.1f}v8"/>'
    )


def _curve(series: dict[str, Any], x_of, y_of) -> Iterator[str]:
    """Paths between gaps; a dot where a value stands alone."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(series["x"], series["y"], strict=True):
        if y is None:
            stretches.append([])
        else:
            stretches[-1].append((x_of(x), y_of(y)))
    for stretch in filter(None, stretches):
        if len(stretch) == 1:
            yield f'<circle class="point" cx="{stretch[0][0]:.1f}" cy="{stretch[0][1]:.1f}" r="2.5"/>'
        else:
            yield f'<path class="curve" d="M{" ".join(f"{x:.1f} {y:.1f}" for x, y in stretch)}"/>'


def _dash(variety: str) -> str:
    return f"dash-{_DASHES.get(variety, 'solid')}"


def _place_labels(labels: Sequence[str], points: Sequence[tuple[float, float]], height: float) -> Iterator[str]:
    """Each label beside its point, where it meets no other label or point, if there is such a place."""
    boxes = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    for label, (x, y) in zip(labels, points, strict=True):
        candidates = []
        for dx, dy, anchor in _PLACES:
            width = _text_width(label)
            left = x + dx - {"start": 0, "middle": width / 2, "end": width}[anchor]
            box = (left, y + dy - 10, left + width, y + dy + 3)
            outside = max(0, 2 - left) + max(0, left + width - WIDTH) + max(0, box[3] - (height - _BOTTOM))
            crossed = sum(_overlap(box, other) for other in boxes)
            candidates.append((outside * 20 + crossed, len(candidates), box, (x + dx, y + dy, anchor)))
        _, _, box, (left, base, anchor) = min(candidates)
        boxes.append(box)
        yield f'<text class="label" x="{left:.1f}" y="{base:.1f}" text-anchor="{anchor}">{_escape(label)}</text>'


def _overlap(one: tuple, other: tuple) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0


def _text_width(text: str) -> float:
    return len(text) * _CHARACTER


def _shortened(text: str, width: float) -> str:
    """A text that fits: names differ at their ends as often as at their beginnings, so that its middle goes."""
    most = int(width / _CHARACTER)
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[-(most - 1 - head) :]}"


def _row_words(row: dict[str, Any], digits: int) -> str:
    words = f"{row['label']}: {number(row['value'], digits)}"
    if row["low"] is not None and row["high"] is not None:
        words += f" ({number(row['low'], digits)} to {number(row['high'], digits)})"
    return words


def _point_words(point: dict[str, Any]) -> str:
    return f"{point['label']}: {amount(point['x'])}, {amount(point['y'])}"


def _series_words(series: dict[str, Any]) -> str:
    known = [(x, y) for x, y in zip(series["x"], series["y"], strict=True) if y is not None]
    if not known:
        return f"{series['label']}: no finite values"
    (first, start), (last, end) = known[0], known[-1]
    return f"{series['label']} from {amount(start)} at {first:g} to {amount(end)} at {last:g}".strip()


def _escape(text: str) -> str:
    return escape(text, {'"': "&quot;"})

import re
import xml.etree.ElementTree as ET

import pytest

from tests.evaluation.report_cases import HOSTILE
from trl_kd.evaluation.charts import (
    WIDTH,
    interval_chart,
    line_chart,
    marker,
    scatter_chart,
    swatch,
    tick_labels,
    ticks,
)


STYLES = ["teacher", "before", *"abcdefg"]


def row(label, style, value, low=None, high=None):
    return {"label": label, "style": style, "value": value, "low": low, "high": high}


def intervals(*rows):
    return {"title": "Rouge-L", "unit": "of 100", "digits": 1, "rows": list(rows)}


def lines(*series, title="Loss"):
    return {"title": title, "unit": "", "x_label": "step", "series": list(series)}


def series(x, y, label="", style="a", variety=""):
    return {"label": label, "style": style, "variety": variety, "x": x, "y": y}


def scatter(*points):
    return {"title": "Speed", "x_label": "tokens per second", "y_label": "Rouge-L", "points": list(points)}


def point(label, x, y, style="a", low=None, high=None):
    return {"label": label, "style": style, "x": x, "y": y, "low": low, "high": high}


def path_points(svg):
    (path,) = [path for path in svg.iter("path") if path.get("class") == "curve"]
    return [tuple(map(float, pair.split())) for pair in re.findall(r"[\d.]+ [\d.]+", path.get("d"))]


def test_interval_chart_dots_and_ends_lie_where_the_values_are():
    svg = ET.fromstring(interval_chart(intervals(row("x", "a", 10.0, 8.0, 14.0), row("y", "b", 20.0, 20.0, 20.0))))
    x_of = {}
    for text in svg.iter("text"):
        if text.get("class") == "tick":
            x_of[float(text.text)] = float(text.get("x"))
    (first, left), (second, right) = sorted(x_of.items())[:2]
    per_unit = (right - left) / (second - first)
    group = next(group for group in svg.iter("g") if group.get("class") == "k-a")
    dot = float(group.find("circle").get("cx"))
    assert dot == pytest.approx(left + (10.0 - first) * per_unit, abs=0.2)
    low, high = map(float, re.match(r"M([\d.]+) [\d.]+H([\d.]+)", group.find("path").get("d")).groups())
    assert (low, high) == pytest.approx((dot - 2 * per_unit, dot + 4 * per_unit), abs=0.3)
    assert [text.text for text in svg.iter("text") if text.get("class") == "figure"] == ["10.0", "20.0"]
    assert svg.find("desc").text == "x: 10.0 (8.0 to 14.0); y: 20.0 (20.0 to 20.0)"


def test_interval_chart_value_without_interval_has_a_dot_alone():
    svg = ET.fromstring(interval_chart(intervals(row("x", "a", 3.0))))
    assert len(list(svg.iter("circle"))) == 1
    assert [path for path in svg.iter("path") if path.get("class") == "whisker"] == []


def test_line_chart_curve_follows_its_values_and_breaks_at_gaps():
    curve = path_points(ET.fromstring(line_chart(lines(series([0, 1, 2, 4], [0.0, 1.0, 2.0, 0.0])))))
    (x0, y0), (x1, y1), (x2, y2), (x4, y4) = curve
    assert (x1 - x0, x2 - x0, x4 - x0) == pytest.approx(((x4 - x0) / 4, (x4 - x0) / 2, x4 - x0), abs=0.2)
    # Up is less in SVG
    assert y2 < y1 < y0 == y4 and y0 - y2 == pytest.approx(2 * (y0 - y1), abs=0.2)
    gap = ET.fromstring(line_chart(lines(series([0, 1, 2, 3], [1.0, 2.0, None, 3.0]))))
    assert len([path for path in gap.iter("path") if path.get("class") == "curve"]) == 1
    assert len([dot for dot in gap.iter("circle") if dot.get("class") == "point"]) == 1


def test_line_chart_varieties_have_dashes_of_their_own():
    varieties = ["off-policy", "on-policy", "evaluation", "off-policy, evaluation", "on-policy, evaluation"]
    svg = ET.fromstring(line_chart(lines(*(series([0, 1], [0.0, 1.0], variety=variety) for variety in varieties))))
    classes = [group.get("class") for group in svg.iter("g")]
    assert len(set(classes)) == len(varieties)


@pytest.mark.parametrize("values", [[], [None, None]])
def test_line_chart_without_values_says_so(values):
    svg = ET.fromstring(line_chart(lines(series(list(range(len(values))), values))))
    assert "No finite values" in "".join(svg.itertext())


@pytest.mark.parametrize("distance", [0.0, 0.2])
def test_scatter_chart_labels_meet_neither_each_other_nor_the_edge(distance):
    """Four models at one place, or near it, and one at the right edge."""
    points = [point(f"model-{index}", 100.0 + 5 * distance * index, 10.0 + distance * index) for index in range(4)]
    points.append(point("a-rather-long-name", 160.0, 10.5))
    svg = ET.fromstring(scatter_chart(scatter(*points)))
    boxes = []
    for text in svg.iter("text"):
        if text.get("class") == "label":
            width = 6.0 * len(text.text)
            left = float(text.get("x")) - {"start": 0, "middle": width / 2, "end": width}[text.get("text-anchor")]
            boxes.append((left, float(text.get("y")), left + width))
    assert len(boxes) == 5
    assert min(box[0] for box in boxes) >= 0 and max(box[2] for box in boxes) <= WIDTH
    for index, one in enumerate(boxes):
        for other in boxes[:index]:
            assert one[2] <= other[0] or other[2] <= one[0] or abs(one[1] - other[1]) >= 8


def test_scatter_chart_costs_far_apart_have_a_logarithmic_axis():
    svg = ET.fromstring(scatter_chart(scatter(point("x", 10.0, 1.0), point("y", 100.0, 2.0), point("z", 1000.0, 3.0))))
    dots = [float(dot.get("cx")) for dot in svg.iter("circle")]
    assert dots[1] - dots[0] == pytest.approx(dots[2] - dots[1], abs=0.2)
    assert "log scale" in "".join(svg.itertext())


@pytest.mark.parametrize("text", HOSTILE)
def test_charts_hostile_names_stay_text(text):
    for svg in (
        interval_chart(intervals(row(text, "a", 1.0, 0.0, 2.0)) | {"title": text}),
        line_chart(lines(series([0, 1], [0.0, 1.0], label=text), title=text)),
        scatter_chart(scatter(point(text, 1.0, 1.0), point("b", 2.0, 2.0)) | {"x_label": text}),
    ):
        root = ET.fromstring(svg)
        assert {element.tag for element in root.iter()} <= {
            *("svg", "title", "desc", "text", "path", "g", "circle", "polygon")
        }
        assert not any(name.startswith("on") for element in root.iter() for name in element.keys())
        assert text in "".join(root.find("title").itertext()) + "".join(root.find("desc").itertext())


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),
    [
        (0.0, 1.0, 5, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-3.0, 11.0, 4, [0.0, 5.0, 10.0]),
        (0.0013, 0.0029, 4, [0.0015, 0.002, 0.0025]),
        (12345.0, 98765.0, 4, [25000.0, 50000.0, 75000.0]),
    ],
)
def test_ticks_are_round_numbers_within_the_range(low, high, most, expected):
    assert ticks(low, high, most) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ([0.0, 0.5, 1.0], ["0.0", "0.5", "1.0"]),
        ([-0.25, 0.0], ["−0.25", "0.00"]),
        ([5e3, 1e4], ["5k", "10k"]),
        ([2.5e6, 5e6], ["2.5M", "5M"]),
        ([1e-5, 2e-5], ["1e−5", "2e−5"]),
        ([7.0], ["7.00"]),
    ],
)
def test_tick_labels_have_the_decimals_of_their_distance(marks, expected):
    assert tick_labels(marks) == expected


def test_marker_each_style_has_a_shape_of_its_own_or_is_far_in_the_list():
    # Seven models beside teacher and before are more than a chart should hold: the last repeats the first's circle
    shapes = [marker(style, 10, 10) for style in STYLES]
    assert len(set(shapes)) == len(STYLES) - 1


def test_swatch_is_hidden_from_screen_readers():
    for variety in (None, "on-policy"):
        assert ET.fromstring(swatch("a", variety)).get("aria-hidden") == "true"

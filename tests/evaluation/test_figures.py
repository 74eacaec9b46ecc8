import math

import pytest

from tests.evaluation import report_cases
from trl_kd.evaluation.bootstrap import Estimate
from trl_kd.evaluation.figures import comparison_charts, cost_charts, figures, model_styles, position_charts
from trl_kd.evaluation.figures import training_charts as charts_of


def model(name="amm", **changes):
    empty = dict(training=None, by_position=None, cost=None, size_on_disk=None)
    return report_cases.model(name, "student", 2, **(empty | changes))


def chart(charts, title):
    (found,) = [one for one in charts if one["title"] == title]
    return found


def test_training_charts_keys_go_to_their_groups():
    log = [
        {"step": step, "epoch": 0.1, "loss": 1.0, "eval_runtime": 3.0, "train_loss": 2.0}
        | {f"kd/{source}/{name}": 0.5 for source in ("off_policy", "on_policy") for name in ("moment", "tightness")}
        | {"kd/on_policy/total_variation": 0.2, "kd/set_size_max": 9, "kd/off_policy/novel_thing": 1.0}
        for step in (1, 2)
    ]
    charts = charts_of([model(training=log)])
    assert [(one["group"], one["title"]) for one in charts] == [
        ("Losses", "Loss"),
        ("Moments", "Moment"),
        ("Health of the critic", "Tightness"),
        ("Agreement with the teacher", "Total variation"),
        ("Action sets", "Largest set"),
        ("Other", "novel thing"),
    ]
    moment = chart(charts, "Moment")
    assert [(one["label"], one["variety"]) for one in moment["series"]] == [
        ("off-policy", "off-policy"),
        ("on-policy", "on-policy"),
    ]
    assert moment["series"][0]["x"] == [1, 2] and moment["series"][0]["y"] == [0.5, 0.5]


def test_training_charts_evaluation_and_teacher_are_series_of_one_chart():
    log = [{"step": 1, "kd/off_policy/student_entropy": 2.0, "kd/off_policy/teacher_entropy": 1.0}]
    log.append({"step": 1, "eval_kd/off_policy/student_entropy": 3.0})
    series = chart(charts_of([model(training=log)]), "Entropy")["series"]
    assert {one["label"]: (one["style"], one["y"]) for one in series} == {
        "student, off-policy": ("a", [2.0]),
        "teacher, off-policy": ("teacher", [1.0]),
        "student, off-policy, evaluation": ("a", [3.0]),
    }


def test_training_charts_several_models_are_named_and_several_entries_of_a_step_are_one():
    log = [{"step": 2, "loss": 1.0}, {"step": 1, "loss": math.nan}, {"step": 2, "loss": 3.0}]
    series = chart(charts_of([model("x", training=log), model("y", training=log)]), "Loss")["series"]
    assert [(one["label"], one["style"]) for one in series] == [("x", "a"), ("y", "b")]
    assert series[0]["x"] == [1, 2] and series[0]["y"] == [None, 3.0]


def test_training_charts_long_log_is_thinned_to_means():
    log = [{"step": step, "loss": float(step)} for step in range(1, 1001)]
    (series,) = chart(charts_of([model(training=log)]), "Loss")["series"]
    assert len(series["x"]) == 200
    # Means of five consecutive steps
    assert series["x"][:2] == [3.0, 8.0] and series["y"] == series["x"]


def test_position_charts_positions_that_few_reach_are_left_out():
    by_position = {"total_variation": [0.1, 0.2, 0.3, 0.4], "count": [10, 6, 5, 4]}
    (found,) = position_charts([model(by_position=by_position)])
    assert (found["series"][0]["x"], found["series"][0]["y"]) == ([1, 2, 3], [0.1, 0.2, 0.3])
    few = {"total_variation": [0.1, 0.2, 0.3], "count": [2, 2, 1]}
    assert position_charts([model(by_position=few)])[0]["series"][0]["x"] == [1, 2]


def test_position_charts_leave_out_the_teachers_distance_to_itself():
    by_position = {"total_variation": [0.0, 0.0], "set_size": [2.0, 3.0], "count": [9, 9]}
    teacher = report_cases.model("teacher", "teacher", 0, by_position=by_position)
    total_variation, set_size = position_charts([teacher, model(by_position=by_position)])
    assert [[one["label"] for one in chart["series"]] for chart in (total_variation, set_size)] == [
        ["amm"],
        ["teacher", "amm"],
    ]


def test_position_charts_set_sizes_have_a_chart_of_their_own():
    found = position_charts([model(by_position={"total_variation": [0.1], "set_size": [7.0], "count": [9]})])
    assert [one["key"] for one in found] == ["total_variation", "set_size"]
    assert found[1]["series"][0]["y"] == [7.0]


def test_comparison_charts_main_metric_is_first_and_missing_values_are_left_out():
    comparison = report_cases.usual()
    comparison.metrics = ["length", "rouge_l"]
    comparison.models[0].estimates = {"length": Estimate(3.0, math.nan, math.nan, math.nan)}
    length, rouge = comparison_charts(comparison)
    assert [(one["metric"], one["is_main"]) for one in (length, rouge)] == [("length", True), ("rouge_l", True)]
    assert length["rows"][0] == {"label": "teacher", "style": "teacher", "value": 3.0, "low": None, "high": None}
    assert [row["label"] for row in rouge["rows"]] == ["before", "amm"]


def test_cost_charts_take_the_largest_batch_and_the_files_where_nothing_was_measured():
    comparison = report_cases.usual()
    comparison.models[1].cost = None
    speed, size = cost_charts(comparison)
    assert [(point["label"], point["x"]) for point in speed["points"]] == [
        ("teacher", pytest.approx(810.0 * 5.2)),
        ("amm", pytest.approx(2950.0 * 5.2)),
    ]
    assert [point["x"] for point in size["points"]] == [7_443_000, comparison.models[1].size_on_disk, 1_683_000]
    assert [point["y"] for point in size["points"]] == [31.42, 22.87, 28.14]


def test_figures_with_nothing_to_show_are_empty_lists():
    comparison = report_cases.usual()
    comparison.models, comparison.metrics = [model()], []
    assert figures(comparison) == {"comparison": [], "training": [], "positions": [], "cost": []}


def test_model_styles_a_second_teacher_is_told_from_the_first():
    roles = ["teacher", "teacher", "before", "before", "before"]
    models = [report_cases.model(f"model {index}", role, 1) for index, role in enumerate(roles)]
    assert list(model_styles(models).values()) == ["teacher", "a", "before", "b", "c"]

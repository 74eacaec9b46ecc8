import builtins

import pytest

from tests.evaluation import report_cases
from trl_kd import plots
from trl_kd.evaluation.figures import figures


matplotlib = pytest.importorskip("matplotlib")

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they are when they are saved."""
    from matplotlib.figure import Figure

    saved, original = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (saved.append(self), original(self, *args, **kw)))
    return saved


def panels(figure):
    return [axes for axes in figure.axes if axes.get_visible()]


def test_write_figures_writes_a_png_for_each_kind_that_has_data(tmp_path):
    data = figures(report_cases.usual())
    paths = plots.write_figures(data, tmp_path / "new")
    names = ["comparison.png", "training.png", "positions.png", "cost.png"]
    assert paths == [str(tmp_path / "new" / name) for name in names]
    for path in paths:
        with open(path, "rb") as file:
            content = file.read()
        assert content.startswith(PNG)
        assert min(int.from_bytes(content[start : start + 4], "big") for start in (16, 20)) > 200
    assert plots.write_figures(data | {"training": [], "cost": []}, tmp_path / "few") == [
        str(tmp_path / "few" / name) for name in ("comparison.png", "positions.png")
    ]


def test_plot_comparison_dots_and_intervals_are_the_values(tmp_path, drawn):
    rows = [
        {"label": "teacher", "style": "teacher", "value": 3.0, "low": None, "high": None},
        {"label": "after", "style": "a", "value": 2.0, "low": 1.5, "high": 2.5},
    ]
    chart = {"title": "Rouge-L", "unit": "of 100", "direction": "higher is better", "rows": rows}
    plots.plot_comparison([chart], tmp_path / "x.png")
    (axes,) = panels(drawn[0])
    assert [list(line.get_xdata()) for line in axes.get_lines()] == [[3.0], [1.5, 2.5], [2.0]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["teacher", "after"]
    assert (axes.get_title(loc="left"), axes.get_xlabel()) == ("Rouge-L", "of 100, higher is better")
    # The first model is at the top
    bottom, top = axes.get_ylim()
    assert bottom > top


def test_plot_training_curves_have_their_dashes_gaps_and_legend(tmp_path, drawn):
    varieties = ["off-policy", "on-policy", "evaluation", "off-policy, evaluation", "on-policy, evaluation"]
    series = [
        {"label": f"_{variety}", "style": "b", "variety": variety, "x": [1, 2, 3], "y": [1.0, None, 3.0]}
        for variety in varieties
    ]
    plots.plot_training(
        [{"title": "Loss", "unit": "nats", "x_label": "step", "series": series}] * 4, tmp_path / "x.png"
    )
    assert len(panels(drawn[0])) == 4 and len(drawn[0].axes) == 6
    axes = panels(drawn[0])[0]
    lines = axes.get_lines()
    assert len({str(line._unscaled_dash_pattern) for line in lines}) == len(varieties)
    first, gap, last = lines[0].get_ydata()
    assert (first, last) == (1.0, 3.0) and gap != gap
    assert [text.get_text().strip("\u200b") for text in axes.get_legend().get_texts()] == [f"_{v}" for v in varieties]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "nats")


def test_plot_cost_points_are_the_models_and_names_are_no_formulas(tmp_path, drawn):
    points = [
        {"label": "$\\frac{1$", "style": "a", "x": 10.0, "y": 1.0, "low": 0.5, "high": 1.5},
        {"label": "b", "style": "before", "x": 1000.0, "y": 2.0, "low": None, "high": None},
    ]
    chart = {"title": "Speed", "x_label": "tokens per second", "y_label": "Rouge-L", "y_unit": "", "points": points}
    plots.plot_cost([chart], tmp_path / "x.png")
    (axes,) = panels(drawn[0])
    assert [text.get_text() for text in axes.texts] == ["$\\frac{1$", "b"]
    assert axes.get_xscale() == "log"
    assert [list(line.get_xdata()) for line in axes.get_lines()] == [[10.0, 10.0], [10.0], [1000.0]]


def test_plot_positions_draws_each_model(tmp_path, drawn):
    data = figures(report_cases.usual())["positions"]
    plots.plot_positions(data, tmp_path / "x.png")
    lines = panels(drawn[0])[0].get_lines()
    assert [list(line.get_ydata()) for line in lines] == [one["y"] for one in data[0]["series"]]


@pytest.mark.parametrize("plot", [plots.plot_comparison, plots.plot_training, plots.plot_positions, plots.plot_cost])
def test_plot_without_charts_is_refused(plot, tmp_path):
    with pytest.raises(ValueError, match="`charts` is empty, so there is nothing to draw"):
        plot([], tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_plots_without_matplotlib_name_the_extra(tmp_path, monkeypatch):
    original = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(ImportError, match=r"no figure can be drawn. Install it with `pip install trl_kd\[plots\]`"):
        plots.write_figures(figures(report_cases.usual()), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_plots_know_all_styles_of_figures():
    from trl_kd.evaluation.figures import _STYLES

    assert set(plots._STYLES) == {"teacher", "before", *_STYLES}

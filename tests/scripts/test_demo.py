"""The demonstration, in small: everything that it shows is made, and agrees."""

import json
import re

import pytest
from transformers import AutoModelForCausalLM

from trl_kd.evaluation import ResultStore
from trl_kd.scripts import demo


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A demonstration of a few steps: its folder, its comparison and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    sizes = {
        "HIDDEN_SIZE": 16,
        "LAYERS": 1,
        "WARM_UP_STEPS": 3,
        "STEPS": 2,
        "BATCH_SIZE": 8,
        "TRAIN_STORIES": 96,
        "TEST_STORIES": 6,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sizes.items():
            patch.setattr(demo, name, value)
        printed = []
        patch.setattr("rich.console.Console.print", lambda self, *values, **options: printed.extend(values))
        comparison = demo.main(folder, seed=0)
    return folder, comparison, printed


def test_demo_compares_the_students_with_the_teacher(shown):
    _, comparison, _ = shown
    roles = {model.name: model.role for model in comparison.models}
    assert roles == {"teacher": "teacher", "before": "before", "fine-tuned": "student", "distilled": "student"}
    assert comparison.models[0].estimates["own_total_variation"].value == pytest.approx(0.0, abs=1e-6)
    assert all(0 < model.estimates["own_total_variation"].value < 1 for model in comparison.models[1:])
    assert set(comparison.models[3].changes) == set(demo.METRICS)


def test_demo_saves_students_that_differ(shown):
    folder, _, _ = shown
    heads = [
        AutoModelForCausalLM.from_pretrained(folder / name).lm_head.weight
        for name in ("before", "fine-tuned", "distilled")
    ]
    assert all((one != other).any() for one, other in zip(heads, heads[1:] + heads[:1], strict=True))


def test_demo_report_has_the_figures_of_the_store(shown):
    folder, comparison, printed = shown
    page = (folder / "report.html").read_text()
    store = ResultStore(folder / "results.sqlite", create=False)
    (info,) = store.runs()
    values, weights = store.values(info.id, "distilled", "nll")
    value = (values * weights).sum() / weights.sum()
    assert comparison.models[3].estimates["nll"].value == pytest.approx(value) and f"{value:.3f}" in page
    assert any(str(folder / "report.html") in str(text) for text in printed)


def test_demo_measures_what_models_cost(shown):
    _, comparison, _ = shown
    costs = {model.name: model.cost for model in comparison.models}
    assert costs["teacher"]["parameters"] == comparison.models[0].parameters
    assert costs["teacher"]["parameters"] > 4 * costs["distilled"]["parameters"]


def test_demo_keeps_the_log_and_writes_the_card(shown):
    folder, comparison, _ = shown
    log = json.loads((folder / "distilled" / "trainer_state.json").read_text())["log_history"]
    assert comparison.models[3].training == log and any("kd/on_policy/total_variation" in entry for entry in log)
    card = (folder / "distilled" / "README.md").read_text()
    assert re.search(r"\| .*TV, own text", card) and "model-index" in card

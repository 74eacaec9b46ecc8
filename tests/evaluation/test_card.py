import math

import pytest
from huggingface_hub import EvalResult, ModelCard

from tests.evaluation import report_cases
from trl_kd.evaluation.bootstrap import Estimate
from trl_kd.evaluation.card import END, START, evaluation_section, update_model_card


CARD = """\
---
base_model: org/student
library_name: transformers
license: apache-2.0
tags:
- generated_from_trainer
- trl
own_key:
  nested: 1
---

# A student

Some words.

### Framework versions

- TRL: 1.16.0
"""


@pytest.fixture
def comparison():
    return report_cases.usual()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    return tmp_path


def text_of(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def rows_of(section):
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_section_has_values_with_error_bars_and_verdicts(comparison):
    comparison.models.append(report_cases.model("another", "student", 2))
    head, _, rouge, *rest = rows_of(evaluation_section(comparison, "amm"))
    # Another student is none of this card's business
    assert head == ["metric", "teacher", "before", "amm", "change from before", "verdict"]
    assert rouge == ["Rouge-L (of 100) ↑", *("31.42 ± 1.30", "22.87 ± 1.30", "28.14 ± 1.30"), "+5.27 ± 1.30", "better"]
    assert [row[0] for row in rest] == [
        *("bits per byte (bits) ↓", "TV, own text ↓", "imitation gap (nats/token) ↓", "length (tokens)", "ends (%)"),
        *("parameters", "size on disk"),
    ]
    assert rest[3][-2:] == ["−5.5 ± 1.4", "lower"] and rest[5][1:4] == ["1.86M", "420,000", "420,000"]
    section = evaluation_section(comparison, "amm")
    assert "Dataset: stories, 12 prompts, 3 seeds of generation, `temperature` 1.0, `top_p` 1.0." in section
    assert "Measured with trl_kd 0.1.0." in section


def test_section_without_baseline_has_no_changes(comparison):
    head, ruler, *rows = rows_of(evaluation_section(comparison, "teacher"))
    assert head == ["metric", "teacher"] and {len(row) for row in [ruler, *rows]} == {2}


def test_section_missing_values_are_dashes(comparison):
    own = comparison.models[2]
    del comparison.models[0].estimates["rouge_l"], own.changes["rouge_l"]
    own.estimates["rouge_l"] = Estimate(28.14, math.nan, math.nan, math.nan)
    rouge = rows_of(evaluation_section(comparison, "amm"))[2]
    assert rouge == ["Rouge-L (of 100) ↑", "–", "22.87 ± 1.30", "28.14 ± –", "–", "–"]


def test_section_names_stay_text_in_one_cell():
    comparison, _ = report_cases.hostile()
    comparison.models[1].name = "a|b\n# c <b> `d` " + END
    for change in comparison.models[2].changes.values():
        object.__setattr__(change, "against", comparison.models[1].name)
    section = evaluation_section(comparison, comparison.models[2].name)
    assert "<" not in section and ">" not in section and "\n# c" not in section
    assert "a\\|b # c &lt;b&gt; \\`d\\`" in section
    assert {line.replace("\\|", "").count("|") for line in section.splitlines() if line.startswith("|")} == {7}


def test_section_of_an_unknown_model_is_refused(comparison, folder):
    with pytest.raises(ValueError, match="The model is `dskd`, but the evaluation has no results of it. Name one of"):
        update_model_card(folder, comparison, "dskd")
    assert text_of(folder) == CARD


def test_update_keeps_the_card_and_adds_section_and_results(comparison, folder):
    update_model_card(folder, comparison, "amm")
    text = text_of(folder)
    before, after = CARD.split("---\n")[2].split("### Framework versions")
    section = evaluation_section(comparison, "amm")
    assert text.split("---\n", 2)[2] == f"{before}{START}\n{section}{END}\n\n### Framework versions{after}"
    card = ModelCard.load(folder / "README.md")
    metadata = card.data.to_dict()
    assert metadata.pop("model-index")[0]["name"] == "amm"
    assert metadata == ModelCard(CARD).data.to_dict()
    found = {one.metric_type: one for one in card.data.eval_results}
    assert {name: one.metric_value for name, one in found.items()} == {
        name: estimate.value for name, estimate in comparison.models[2].estimates.items()
    }
    rouge = found["rouge_l"]
    assert (rouge.task_type, rouge.dataset_name, rouge.dataset_type) == ("text-generation", "stories", "stories")
    assert rouge.metric_name == "Rouge-L"


def test_update_twice_replaces_the_section_and_the_results(comparison, folder):
    other = EvalResult("text-generation", "gsm8k", "GSM8K", "exact_match", 12.0)
    mine = EvalResult("text-generation", "stories", "stories", "accuracy", 0.5)
    card = ModelCard(CARD)
    card.data.eval_results, card.data.model_name = [other, mine], "my model"
    card.save(folder / "README.md")
    update_model_card(folder, comparison, "amm")
    once = text_of(folder)
    update_model_card(folder, comparison, "amm")
    assert text_of(folder) == once
    comparison.models[2].estimates["rouge_l"] = report_cases.estimate(29.99, 1.0)
    update_model_card(folder, comparison, "amm")
    text = text_of(folder)
    assert text.count(START) == text.count(END) == 1 and "29.99 ± 1.00" in text and "28.14" not in text
    card = ModelCard.load(folder / "README.md")
    assert card.data.model_name == "my model"
    values = {(one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert len(card.data.eval_results) == len(values) == 8
    assert values["GSM8K", "exact_match"] == 12.0 and values["stories", "accuracy"] == 0.5
    assert values["stories", "rouge_l"] == 29.99


def test_update_without_a_card_makes_one(comparison, tmp_path):
    update_model_card(tmp_path, comparison, "amm")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.model_name == "amm" and len(card.data.eval_results) == 6
    assert card.text.startswith("\n# amm\n") and evaluation_section(comparison, "amm") in card.text
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize("line", [START, END, f"{END}\n{START}", f"{START}\n{START}\n{END}"])
def test_update_of_a_card_with_broken_marks_is_refused(comparison, folder, line):
    broken = CARD + line + "\nwords\n"
    (folder / "README.md").write_text(broken)
    with pytest.raises(ValueError, match="where an earlier evaluation ends cannot be told. Remove these lines"):
        update_model_card(folder, comparison, "amm")
    assert text_of(folder) == broken


def test_update_that_fails_leaves_the_card_as_it_was(comparison, folder, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space left"):
        update_model_card(folder, comparison, "amm")
    assert text_of(folder) == CARD and [path.name for path in folder.iterdir()] == ["README.md"]


def test_results_without_a_finite_value_are_left_out(comparison, folder):
    comparison.models[2].estimates["rouge_l"] = Estimate(math.nan, math.nan, math.nan, math.nan)
    update_model_card(folder, comparison, "amm")
    names = [one.metric_type for one in ModelCard.load(folder / "README.md").data.eval_results]
    assert "rouge_l" not in names and len(names) == 5


@pytest.mark.parametrize(
    ("dataset", "identifier"),
    [
        ("databricks/databricks-dolly-15k", "databricks/databricks-dolly-15k"),
        ("../shared/data/stories.jsonl", "stories.jsonl"),
        ("My data (test)", "My-data-test"),
        ("???", "dataset"),
    ],
)
def test_results_dataset_type_is_an_identifier(comparison, folder, dataset, identifier):
    comparison.dataset = dataset
    update_model_card(folder, comparison, "amm")
    one = ModelCard.load(folder / "README.md").data.eval_results[0]
    assert (one.dataset_type, one.dataset_name) == (identifier, dataset)

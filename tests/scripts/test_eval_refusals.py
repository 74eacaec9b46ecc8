"""What `trl-kd eval` refuses before any work, what is another evaluation, and what status an accident has."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.evaluation.runs import ROWS, evaluate, save, student_of, task
from tests.scripts.test_eval import command, fails_with, write_rows
from trl_kd import cli
from trl_kd.evaluation import Estimate, EvalModel, ResultStore, measure_of, runner, verdict
from trl_kd.evaluation.suite import plain_suite


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


@pytest.fixture
def never_loaded(monkeypatch):
    def refuse(self):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(EvalModel, "load", refuse)


def test_eval_status_of_an_accident_is_not_that_of_a_regression(
    tmp_path, rows_file, student_path, monkeypatch, capsys
):
    def fail(self, run):
        raise KeyError("a bug")

    monkeypatch.setattr(runner.Evaluation, "run", fail)
    assert cli.main(command(rows_file, tmp_path / "r.sqlite", students=student_path)) == 2
    assert "KeyError: 'a bug'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fail_if": "template"}, "the template has no conditions, so nothing could ever fail"),
        ({"batch_size": 0}, "`batch_size` is 0, so no batch holds a prompt"),
        ({"num_prompts": 0}, "`num_prompts` is 0, so nothing would be asked"),
        ({"num_prompts": -1}, "`num_prompts` is -1"),
        ({"temperature": -1.0}, "`temperature` -1.0, with which nothing can be written"),
        ({"top_p": 0.0}, "`top_p` 0.0, with which nothing can be written"),
        ({"max_completion_length": 0}, "`max_completion_length` 0, with which nothing can be written"),
        ({"price_per_hour": -1.0}, "`price_per_hour` is -1.0"),
        ({"metrics": "imitation_gap"}, "None of the metrics imitation_gap can be measured"),
        ({"metrics": "exact_match"}, "no number"),
    ],
)
def test_eval_refuses_before_a_model_is_loaded(
    options, said, tmp_path, rows_file, student_path, worse_student, never_loaded, capsys
):
    arguments = command(
        rows_file, tmp_path / "r.sqlite", **({"before": student_path, "students": worse_student} | options)
    )
    assert said in fails_with(capsys, arguments)


@pytest.fixture(scope="module")
def worse_student(student_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "other"
    return save(
        folder, AutoModelForCausalLM.from_pretrained(student_path), AutoTokenizer.from_pretrained(student_path)
    )


def test_eval_conditions_without_students_are_refused(tmp_path, rows_file, student_path, never_loaded, capsys):
    arguments = command(rows_file, tmp_path / "r.sqlite", "--fail_if", "nll > 1%", before=student_path)
    assert "there is no student to judge" in fails_with(capsys, arguments)


def test_run_loaded_otherwise_is_another_run(tmp_path, student_path):
    store = ResultStore(tmp_path / "r.sqlite")
    ids = []
    for dtype in ("float32", "bfloat16", "float32"):
        # None is finished, so that each goes on with one that is the same
        with task([student_of(student_path, init_kwargs={"dtype": dtype})]).begin(store) as run:
            ids.append((run.id, run.resumed))
    assert ids == [(1, False), (2, False), (1, True)]


def test_run_never_writes_rows_of_a_padded_head(tmp_path, student_path, tokenizer):
    """A head with rows beyond the tokenizer, all of them likelier than any token."""
    model = AutoModelForCausalLM.from_pretrained(student_path)
    model.resize_token_embeddings(len(tokenizer) + 8)
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) :] = 50 * model.lm_head.weight[: len(tokenizer)].mean(dim=0)
    path = save(tmp_path / "padded", model, tokenizer)
    store, number = evaluate(tmp_path / "r.sqlite", [student_of(path)])
    ids = [token for sample in store.samples(number, "student", 3) for token in sample.token_ids]
    assert ids and max(ids) < len(tokenizer)


def test_metric_of_ones_own_has_no_better_side():
    """An error rate and an accuracy look the same from outside."""
    change = Estimate(value=0.3, low=0.1, high=0.5, standard_error=0.1)
    assert verdict(change, measure_of("wer").higher_is_better) == "higher"
    assert verdict(change, measure_of("rouge_l").higher_is_better) == "better"


def test_read_rows_numbers_are_checked_in_the_suite():
    with pytest.raises(ValueError, match="`seeds`"):
        plain_suite({"seeds": ["0"]})
    with pytest.raises(ValueError, match="`max_prompt_length` 0"):
        plain_suite({"max_prompt_length": 0})

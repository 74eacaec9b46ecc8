"""`trl-kd eval`, from the command line to its exit status, the store and the report."""

import io
import json
import os
import re
import runpy
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, redirect_stdout
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from tests.evaluation import test_judge
from tests.evaluation.runs import (
    ROWS,
    bare,
    changed_copy,
    contents,
    evaluate,
    other_vocabulary,
    small_suite,
    student_of,
)
from trl_kd import cli
from trl_kd.evaluation import EvalModel, ResultStore, runner
from trl_kd.scripts import eval as script


ROOT = Path(__file__).parents[2]
endpoint = test_judge.endpoint


def worse(model):
    """Three times as sure of what it says, right or wrong."""
    model.lm_head.weight *= 3


@pytest.fixture(scope="module")
def worse_path(student_path, tmp_path_factory):
    return changed_copy(student_path, tmp_path_factory.mktemp("models") / "worse", worse)


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(file, ROWS)
    return file


def write_rows(file: Path, rows) -> Path:
    lines = [{"prompt": row.prompt} | ({"references": list(row.references)} if row.references else {}) for row in rows]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def command(rows_file, store, *more, **options) -> list[str]:
    """The shortest evaluation of texts and likelihoods."""
    options = {"metrics": "nll length", "seeds": 3, "max_completion_length": 2, "batch_size": 8} | options
    parts = [part for name, value in options.items() for part in (f"--{name}", *str(value).split())]
    return ["eval", "--dataset_name", str(rows_file), "--store", str(store), *parts, *map(str, more)]


def fails_with(capsys, arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.count("error:") == 1 and "Traceback" not in message
    return message


@pytest.fixture
def refuse_models(monkeypatch):
    """Whoever loads a model fails."""

    def refuse(self):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(EvalModel, "load", refuse)


# A whole evaluation


@pytest.fixture(scope="module")
def whole(tmp_path_factory, teacher_path, student_path, worse_path, rows_file):
    """Folder with the store and the report of one evaluation, its status, and what was shown."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = [
        *("eval", "--teacher", f"big={teacher_path}", "--before", f"small={student_path}", "--students", worse_path),
        *("--dataset_name", str(rows_file), "--store", str(folder / "r.sqlite"), "--report", str(folder / "r.html")),
        *("--metrics", *small_suite().metrics, "--seeds", "3", "8", "--max_completion_length", "8"),
        *("--batch_size", "3", "--run_name", "first try", "--temperature", "0.8", "--top_p", "0.9"),
    ]
    shown = io.StringIO()
    with redirect_stdout(shown):
        status = cli.main(arguments)
    return folder, status, shown.getvalue()


def test_eval_finds_what_an_evaluation_by_hand_finds(whole, tmp_path, teacher_path, student_path, worse_path):
    folder, status, _ = whole
    assert status == 0
    models = [
        student_of(teacher_path, "big", "teacher"),
        student_of(student_path, "small", "before"),
        student_of(worse_path, "worse"),
    ]
    by_hand = evaluate(tmp_path / "r.sqlite", models, temperature=0.8, top_p=0.9)
    store = ResultStore(folder / "r.sqlite", create=False)
    assert contents(store, 1) == contents(*by_hand)
    info = store.run("first try")
    assert [(model.name, model.role) for model in info.models] == [
        ("big", "teacher"),
        ("small", "before"),
        ("worse", "student"),
    ]
    assert info.dataset == "rows.jsonl" and info.settings["main_metric"] == "rouge_l" and info.finished


def test_eval_shows_table_summary_run_and_report(whole):
    folder, _, shown = whole
    for text in ("first try: rows.jsonl", "5 prompts, 2 seeds", "Rouge-L (of 100) ↑", "change from small"):
        assert text in shown
    assert "worse against small. " in shown and "Run 1 in " in shown
    assert f"Report: {folder / 'r.html'}" in shown
    assert "Regression" not in shown


def test_eval_report_has_the_figures_of_the_run(whole):
    folder, _, shown = whole
    page = (folder / "r.html").read_text()
    assert page.startswith("<!doctype html>") or page.lower().startswith("<!doctype html>")
    line = next(line for line in shown.splitlines() if "bits per byte" in line)
    figures = re.findall(r"\d+\.\d+ ± \d+\.\d+", line)
    assert len(figures) >= 3
    for figure in figures:
        assert figure in page or figure.split(" ± ")[0] in page
    store = ResultStore(folder / "r.sqlite")
    assert "What is the colour of the sky?" in page
    for name in ("big", "small", "worse"):
        assert name in page and store.samples(1, name, 3)


def test_eval_history_lists_runs_models_and_the_main_metric(whole, capsys):
    folder, *_ = whole
    assert cli.main(["eval", "--history", "true", "--store", str(folder / "r.sqlite")]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    store = ResultStore(folder / "r.sqlite")
    assert [row[:5:2] + row[4:7] for row in rows] == [
        ["1", "first try", model.name, model.name, model.weights[:10], "Rouge-L"] for model in store.run(1).models
    ]
    assert all(re.fullmatch(r"\d+\.\d\d ± <?\d+\.\d\d", row[-1]) for row in rows)


def test_eval_history_says_what_is_not_finished(tmp_path, rows_file, student_path, capsys, monkeypatch):
    def fail(*args):
        raise ValueError("stop")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_measure_texts", fail)
        fails_with(capsys, command(rows_file, tmp_path / "r.sqlite", students=student_path))
    assert cli.main(["eval", "--history", "true", "--store", str(tmp_path / "r.sqlite")]) == 0
    assert "(not finished)" in capsys.readouterr().out


def test_eval_history_of_a_store_that_is_not_there_makes_none(tmp_path, capsys):
    message = fails_with(capsys, ["eval", "--history", "true", "--store", str(tmp_path / "none.sqlite")])
    assert "none.sqlite" in message
    assert list(tmp_path.iterdir()) == []


# Exit status


@pytest.mark.parametrize("option", ["--fail_if", "--fail-if"])
def test_eval_regression_is_status_1_and_says_so(option, tmp_path, rows_file, student_path, worse_path, capsys):
    models = {"before": student_path, "students": worse_path}
    arguments = command(rows_file, tmp_path / "r.sqlite", option, "nll > 0.1%", "length < -90%", **models)
    assert cli.main(arguments) == 1
    shown = " ".join(capsys.readouterr().out.split())
    name = Path(student_path).name
    assert re.search(rf"Regression: worse against {name}: nll \+\d+\.\d+ ± \d+\.\d+ \(nll > 0.1%\)", shown)
    assert shown.count("Regression:") == 1
    assert ResultStore(tmp_path / "r.sqlite").run(1).finished


def test_eval_regression_leaves_the_program_with_status_1(tmp_path, rows_file, student_path, worse_path, monkeypatch):
    models = {"before": student_path, "students": worse_path}
    arguments = command(rows_file, tmp_path / "r.sqlite", "--fail_if", "nll > 0.1", **models)
    monkeypatch.setattr(sys, "argv", ["trl-kd", *arguments])
    # `runpy` warns of a module that is there already
    monkeypatch.delitem(sys.modules, "trl_kd.cli")
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("trl_kd.cli", run_name="__main__")
    assert caught.value.code == 1


@pytest.mark.parametrize("case", ["better", "same", "beyond what is lost"])
def test_eval_without_a_regression_is_status_0(case, tmp_path, rows_file, student_path, worse_path, capsys):
    before, student = (worse_path, student_path) if case == "better" else (student_path, worse_path)
    if case == "same":
        student = str(shutil.copytree(student_path, tmp_path / "copy"))
    condition = "nll > 900%" if case == "beyond what is lost" else "nll > 0.1%"
    arguments = command(rows_file, tmp_path / "r.sqlite", "--fail_if", condition, before=before, students=student)
    assert cli.main(arguments) == 0
    assert "Regression" not in capsys.readouterr().out


def test_eval_change_that_is_noise_is_status_0(tmp_path, rows_file, student_path, capsys):
    """A little noise on the weights changes the likelihood a little, to and fro."""

    def shake(model):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model.lm_head.weight += 0.01 * torch.randn_like(model.lm_head.weight)

    path = changed_copy(student_path, tmp_path / "shaken", shake)
    models = {"before": student_path, "students": path}
    conditions = ["nll > 0", "nll < 0"]
    assert cli.main(command(rows_file, tmp_path / "r.sqlite", "--fail_if", *conditions, **models)) == 0
    assert "±" in capsys.readouterr().out
    (before, _), (after, _) = (
        ResultStore(tmp_path / "r.sqlite").values(1, name, "nll") for name in (Path(student_path).name, "shaken")
    )
    assert abs(after - before).max() > 1e-4


@pytest.fixture
def template(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(
        "prompt: 'Say: {{ prompt }}'\ncolumns: [prompt]\nmetrics: [nll]\nseeds: [3]\nmax_completion_length: 2\n"
        "fail_if: ['nll > 0.1%']\n"
    )
    return file


@pytest.mark.parametrize("fail_if", [True, False])
def test_eval_conditions_of_the_template_count_if_they_are_asked_for(
    fail_if, template, tmp_path, rows_file, student_path, worse_path
):
    arguments = ["eval", "--dataset_name", str(rows_file), "--store", str(tmp_path / "r.sqlite")]
    arguments += ["--before", student_path, "--students", worse_path, "--template", str(template)]
    assert cli.main([*arguments, *(["--fail_if", "template"] if fail_if else [])]) == int(fail_if)
    store = ResultStore(tmp_path / "r.sqlite")
    assert store.run("own").settings["prompt"] == "Say: {{ prompt }}"
    assert store.samples(1, "worse", 3)[0].prompt == f"Say: {ROWS[0].prompt}"


def test_eval_condition_that_cannot_be_checked_is_no_success(tmp_path, student_path, worse_path, capsys):
    """Without references there is no likelihood: a build must not pass on what nobody measured."""
    rows = write_rows(tmp_path / "prompts.jsonl", bare())
    models = {"before": student_path, "students": worse_path}
    message = fails_with(capsys, command(rows, tmp_path / "r.sqlite", "--fail_if", "nll > 1%", **models))
    assert "`fail_if` has 'nll > 1%', but `nll` cannot be measured here" in message
    assert ResultStore(tmp_path / "r.sqlite").runs() == []  # before any work


def test_eval_condition_across_tokenizers_is_checked_per_byte_only(tmp_path, rows_file, student_path, capsys):
    options = {
        "before": student_path,
        "students": other_vocabulary(tmp_path / "other"),
        "metrics": "nll bits_per_byte",
    }
    store = tmp_path / "r.sqlite"
    assert cli.main(command(rows_file, store, "--fail_if", "bits_per_byte > 900%", **options)) == 0
    capsys.readouterr()
    message = fails_with(capsys, command(rows_file, store, "--fail_if", "nll > 900%", **options))
    assert "there is no change in `nll` of other" in message


# Against an earlier run


def test_eval_against_an_earlier_run_tells_versions_apart(tmp_path, rows_file, student_path, worse_path, capsys):
    store = tmp_path / "r.sqlite"
    assert cli.main(command(rows_file, store, students=f"mine={student_path}", run_name="v1")) == 0
    condition = ("--fail_if", "nll > 0.1%")
    assert cli.main(command(rows_file, store, *condition, students=f"mine={worse_path}", against="v1")) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "Regression: mine against mine in run 1: nll +" in shown
    assert cli.main(command(rows_file, store, *condition, students=f"mine={student_path}", against="2")) == 0
    assert len(ResultStore(store).runs()) == 3


def test_eval_against_a_run_with_other_settings_or_data_is_refused_before_any_work(
    tmp_path, rows_file, student_path, capsys, request
):
    store = tmp_path / "r.sqlite"
    cli.main(command(rows_file, store, students=student_path))
    request.getfixturevalue("refuse_models")
    arguments = command(rows_file, store, students=student_path, against=1, max_completion_length=3)
    assert "different settings (max_completion_length)" in fails_with(capsys, arguments)
    other = write_rows(tmp_path / "other.jsonl", ROWS[:3])
    arguments = command(other, store, students=student_path, against=1)
    assert "different prompts or references" in fails_with(capsys, arguments)
    arguments = command(rows_file, store, students=student_path, against="v9")
    assert "The run is `v9`, but the store" in fails_with(capsys, arguments)


# Errors


PLAIN = ["eval", "--dataset_name", "rows.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval"], "`dataset_name` is not set, so there are no prompts."),
        (PLAIN, "There is no model to evaluate."),
        ([*PLAIN, "--students", "a", "--judge_url", "http://x/v1"], "Pass both `--judge_url` and `--judge_model`."),
        (
            [*PLAIN, "--students", "a", "--fail_if", "nll > 1"],
            "there is nothing that changes could be measured against",
        ),
        ([*PLAIN, "--students", "a", "--report", "no/such/r.html"], "`report` is 'no/such/r.html', whose folder does"),
        ([*PLAIN, "--students", "a", "--model_init_kwargs", "{dtype"], "Expecting property name"),
        ([*PLAIN, "--students", "a", "--temprature", "1"], "unknown option in the command line: --temprature 1."),
        ([*PLAIN, "--students", "a", "--template", "poetry"], "There is no suite 'poetry'"),
        ([*PLAIN, "--students", "a"], "`dataset_name` is 'rows.jsonl', but there is no such file"),
    ],
)
def test_eval_wrong_option_is_one_clear_line(arguments, message, capsys, tmp_path, monkeypatch, refuse_models):
    monkeypatch.chdir(tmp_path)
    assert message in fails_with(capsys, arguments)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--fail_if", "rouge_l < -1"],
            "`fail_if` has 'rouge_l < -1', but `rouge_l` is not measured: the metrics are nll",
        ),
        (["--fail_if", "nll worse"], "`--fail-if` has 'nll worse', which is no condition on a change"),
        (["--fail_if", "nll > -1"], "which even a model without any change would meet"),
        (["--metrics", "nll", "blue"], "There is no metric 'blue'"),
        (["--seeds", "1", "1"], "where one seed would be counted twice"),
        (["--temperature", "0", "--seeds", "1", "2"], "decodes greedily"),
        (["--students", "nobody/no-such-model"], "'no-such-model' could not be loaded from `nobody/no-such-model`"),
        (["--dataset_split", "dev"], "`dataset_split` is 'dev', but the dataset has only ['train']"),
    ],
)
def test_eval_mistake_is_found_before_a_model_is_loaded(
    more, message, capsys, tmp_path, rows_file, student_path, worse_path, refuse_models
):
    models = {"before": student_path, "students": worse_path}
    assert message in fails_with(capsys, command(rows_file, tmp_path / "r.sqlite", *more, **models))


def test_eval_models_of_one_name_are_refused(capsys, tmp_path, rows_file, student_path, refuse_models):
    arguments = command(rows_file, tmp_path / "r.sqlite", before=student_path, students=student_path)
    assert "each needs a name of its own" in fails_with(capsys, arguments)


def test_eval_store_that_cannot_be_written_is_found_first(capsys, tmp_path, rows_file, student_path, refuse_models):
    (tmp_path / "file").write_text("no folder")
    message = fails_with(capsys, command(rows_file, tmp_path / "file" / "r.sqlite", students=student_path))
    assert "r.sqlite" in message
    assert (tmp_path / "file").read_text() == "no folder"
    message = fails_with(capsys, command(rows_file, tmp_path / "file", students=student_path))
    assert str(tmp_path / "file") in message
    assert (tmp_path / "file").read_text() == "no folder"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "Who?", "answer": "I"}], "none of which holds prompts: the suite 'plain' looks for `prompt`"),
        ([{"prompt": "Who?"}, {"prompt": " "}], "Row 1 has an empty prompt"),
        (
            [{"prompt": "Who?", "completion": "I"}, {"prompt": "You?", "completion": ""}],
            "Row 1 has no reference or an",
        ),
    ],
)
def test_eval_rows_that_cannot_be_used_are_found_first(rows, message, capsys, tmp_path, student_path, refuse_models):
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    assert message in fails_with(
        capsys, command(tmp_path / "rows.jsonl", tmp_path / "r.sqlite", students=student_path)
    )


def test_eval_nan_is_status_2_and_keeps_what_was_finished(tmp_path, rows_file, student_path, capsys):
    def put_nan(model):
        model.lm_head.weight[5, 3] = float("nan")

    path = changed_copy(student_path, tmp_path / "nan", put_nan)
    message = fails_with(
        capsys, command(rows_file, tmp_path / "r.sqlite", before=f"base={student_path}", students=path)
    )
    assert "The logits of 'nan' are not finite at row 0" in message
    store = ResultStore(tmp_path / "r.sqlite")
    assert len(store.samples(1, "base", 3)) == len(ROWS) and store.run(1).finished is None


def test_eval_runs_on_the_test_split_of_a_folder(tmp_path, student_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    write_rows(folder / "train.jsonl", ROWS[:2])
    write_rows(folder / "test.jsonl", ROWS[2:])
    assert cli.main(command(folder, tmp_path / "r.sqlite", students=student_path, num_prompts=2)) == 0
    store = ResultStore(tmp_path / "r.sqlite")
    samples = store.samples(1, Path(student_path).name, 3)
    assert [sample.prompt for sample in samples] == [row.prompt for row in ROWS[2:4]]
    assert store.run(1).dataset == "rows"


# Beside the measures


@pytest.mark.parametrize("num_prompts", [5, 1])
def test_eval_judge_prefers_between_student_and_baseline(
    num_prompts, endpoint, tmp_path, rows_file, student_path, teacher_path
):
    endpoint.reply = test_judge.longer
    options = {"before": f"old={student_path}", "students": f"new={teacher_path}", "max_completion_length": 6}
    options |= {"judge_url": endpoint.url, "judge_model": "judge", "num_prompts": num_prompts}
    assert cli.main(command(rows_file, tmp_path / "r.sqlite", **options)) == 0
    store = ResultStore(tmp_path / "r.sqlite")
    texts = [[sample.completion for sample in store.samples(1, name, 3)] for name in ("new", "old")]
    # As the judge sees them, a text is without the spaces at its ends or with them: longer is longer
    wins = [(len(a) > len(b)) + (len(a) == len(b)) / 2 for a, b in zip(*texts, strict=True)]
    found = store.details(1, "new", "judge")
    assert found["win_rate"] == pytest.approx(sum(wins) / len(wins))
    assert (found["pairs"], found["against"]) == (num_prompts, "old")
    assert found["settings"]["model"] == "judge"
    assert len(endpoint.requests) == 2 * num_prompts
    assert any(ROWS[0].prompt in question for question in endpoint.questions)
    assert store.details(1, "old", "judge") is None


def test_eval_judge_out_of_reach_keeps_the_rest_and_goes_on_later(
    endpoint, tmp_path, rows_file, student_path, worse_path, capsys, monkeypatch
):
    options = {"before": f"old={student_path}", "students": f"new={worse_path}", "judge_model": "judge"}
    arguments = command(rows_file, tmp_path / "r.sqlite", **options)
    endpoint.reply = lambda question: test_judge.status(401)
    message = fails_with(capsys, [*arguments, "--judge_url", endpoint.url])
    assert "denies access" in message
    generated, original = [], runner.generate_completions
    monkeypatch.setattr(
        runner, "generate_completions", lambda *args, **kwargs: generated.append(1) or original(*args, **kwargs)
    )
    endpoint.reply = test_judge.longer
    assert cli.main([*arguments, "--judge_url", endpoint.url]) == 0
    store = ResultStore(tmp_path / "r.sqlite")
    assert generated == [] and len(store.runs()) == 1
    assert store.details(1, "new", "judge")["pairs"] == 5


def test_eval_model_card_of_a_student_has_the_table(tmp_path, rows_file, student_path):
    copy = shutil.copytree(student_path, tmp_path / "mine")
    before = sorted(file.name for file in Path(student_path).iterdir())
    options = {"before": f"old={student_path}", "students": copy, "model_card": "true"}
    assert cli.main(command(rows_file, tmp_path / "r.sqlite", **options)) == 0
    card = (copy / "README.md").read_text()
    assert "NLL (nats/token) ↓" in card and "model-index:" in card and "rows.jsonl" in card
    assert sorted(file.name for file in Path(student_path).iterdir()) == before


# Killed


def num_samples(store: Path) -> int:
    try:
        with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as connection:
            return connection.execute("SELECT count(*) FROM samples").fetchone()[0]
    except sqlite3.OperationalError:  # not made yet
        return 0


def test_eval_killed_in_its_second_seed_goes_on_and_ends_as_if_it_had_not_been(tmp_path, student_path, monkeypatch):
    rows = write_rows(tmp_path / "rows.jsonl", ROWS * 3)
    options = {"students": student_path, "batch_size": 1, "max_completion_length": 24, "seeds": "3 8"}
    arguments = command(rows, tmp_path / "r.sqlite", **options)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "trl_kd.cli", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while num_samples(tmp_path / "r.sqlite") < 18 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = num_samples(tmp_path / "r.sqlite")
    assert 18 <= kept < 30

    generated, original = [], runner.generate_completions
    monkeypatch.setattr(
        runner, "generate_completions", lambda *args, **kwargs: generated.append(1) or original(*args, **kwargs)
    )
    assert cli.main(arguments) == 0
    assert len(generated) == 30 - kept
    arguments[arguments.index("--store") + 1] = str(tmp_path / "whole.sqlite")
    assert cli.main(arguments) == 0
    found, expected = (contents(ResultStore(tmp_path / name), 1) for name in ("r.sqlite", "whole.sqlite"))
    assert found == expected
    assert len(ResultStore(tmp_path / "r.sqlite").runs()) == 1


# Parts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name=path/to", ("name", "path/to")),
        ("path/to/", ("to", "path/to/")),
        ("org/model", ("model", "org/model")),
        ("a/b=c", ("b=c", "a/b=c")),
        ("n=a=b", ("n", "a=b")),
        ("model", ("model", "model")),
    ],
)
def test_named_tells_name_and_path_apart(text, expected):
    assert script.named(text) == expected


def test_find_suite_puts_the_command_line_over_the_template():
    arguments = {"template": "instruction", "metrics": ["length", "nll"], "temperature": 0.0, "top_p": 0.5}
    suite = script.find_suite(script.EvalArguments(**arguments, max_completion_length=9, chat=True))
    assert (suite.metrics, suite.main_metric, suite.temperature) == (("length", "nll"), "length", 0.0)
    # Greedy decoding needs one seed
    assert (suite.seeds, suite.top_p, suite.max_completion_length, suite.chat) == ((0,), 0.5, 9, True)
    assert script.find_suite(script.EvalArguments(template="instruction")).seeds == (10, 20, 30, 40, 50)
    assert script.find_suite(script.EvalArguments()).name == "plain"

"""`trl-kd report`: which evaluation is meant by a number, a name or a folder, and what is written."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from tests.evaluation.test_comparison import BEFORE, HARD, SETTINGS, STUDENT, TEACHER, put, shifted
from trl_kd import cli
from trl_kd.evaluation import ModelEntry, ResultStore
from trl_kd.evaluation.models import weights_digest


LOG = [{"step": step, "loss": 4.0 / step, "kd/on_policy/moment": 1.0 / step} for step in range(1, 6)]


@pytest.fixture
def store(tmp_path):
    return ResultStore(tmp_path / "r.sqlite")


@pytest.fixture
def trained(student_path, tmp_path):
    """A folder that a training has written."""
    folder = Path(shutil.copytree(student_path, tmp_path / "trained"))
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "trainer_state.json").write_text(json.dumps({"log_history": LOG}))
    return folder


def entry_of(folder, name="mine", role="student") -> ModelEntry:
    return ModelEntry(name, role, str(folder), weights_digest(str(folder)), "tt", 250, 900)


def values(by: float) -> dict:
    return {"rouge_l": shifted(by), "nll": shifted(-by)}


MODELS = {TEACHER: values(3.0), BEFORE: values(0.0), STUDENT: values(0.25)}
MEAN = sum(map(sum, HARD)) / 12  # 31.833


def command(tmp_path, *runs, **options) -> list[str]:
    options = {"store": tmp_path / "r.sqlite", "output": tmp_path / "page.html"} | options
    return [
        "report",
        *map(str, runs),
        *(part for name, value in options.items() for part in (f"--{name}", str(value))),
    ]


def page(tmp_path, *runs, **options) -> str:
    assert cli.main(command(tmp_path, *runs, **options)) == 0
    return (tmp_path / "page.html").read_text()


def fails_with(capsys, tmp_path, *runs, **options) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(command(tmp_path, *runs, **options))
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.count("error:") == 1 and "Traceback" not in message
    assert not (tmp_path / "page.html").exists()
    return message


# Which evaluation


def test_report_of_a_run_by_its_number_has_its_figures_and_answers(store, tmp_path, capsys):
    put(store, MODELS, name="alpha")
    put(store, {STUDENT: values(9.0)}, name="beta")
    found = page(tmp_path, 1)
    assert f"Report: {tmp_path / 'page.html'}" in capsys.readouterr().out
    assert "alpha" in found and "beta" not in found
    for name, by in (("teacher", 3.0), ("before", 0.0), ("amm", 0.25)):
        assert name in found and f"{MEAN + by:.2f}" in found
        assert f"{name} says 00" in found and f"{name} says 05" in found
        assert f"{name} says 10" not in found  # of the second seed
    assert "better" in found


@pytest.mark.parametrize("which", ["alpha", "latest"])
def test_report_of_a_run_by_its_name(which, store, tmp_path):
    put(store, {STUDENT: values(9.0)}, name="alpha")
    put(store, MODELS, name="alpha" if which == "alpha" else "gamma")
    put(store, {BEFORE: values(5.0)}, name="unfinished", finish=False)
    assert f"{MEAN + 3:.2f}" in page(tmp_path, which)


def test_report_of_a_folder_is_that_of_its_latest_evaluation(store, tmp_path, trained):
    other = ModelEntry("other", "student", str(trained), "another digest", "tt")
    put(store, {entry_of(trained): values(1.0)}, name="run-old")
    put(store, {entry_of(trained): values(2.0)}, name="run-new")
    put(store, {other: values(3.0)}, name="run-other")
    put(store, {entry_of(trained): values(4.0)}, name="run-open", finish=False)
    found = page(tmp_path, trained)
    assert "run-new" in found and f"{MEAN + 2:.2f}" in found
    assert not any(name in found for name in ("run-old", "run-other", "run-open"))
    # The curves of its training come with it
    assert "Moment" in found


def test_report_of_a_folder_that_moved_finds_its_evaluation(store, tmp_path, trained):
    put(store, {entry_of(trained): values(1.0)}, name="alpha")
    moved = trained.rename(tmp_path / "moved")
    assert f"{MEAN + 1:.2f}" in page(tmp_path, moved)


def test_report_of_a_folder_whose_weights_are_not_there_takes_no_other_models_evaluation(store, tmp_path, trained):
    (trained / "model.safetensors").unlink()
    unknown = ModelEntry("hub", "student", "somebody/model", weights_digest(str(trained)), "tt")
    assert unknown.weights == "unknown"
    put(store, {unknown: values(1.0)}, name="alpha")
    found = page(tmp_path, trained)
    assert "not evaluated yet" in found and "alpha" not in found


@pytest.mark.parametrize("with_store", [True, False])
def test_report_of_a_training_alone_shows_its_curves(with_store, tmp_path, trained):
    if with_store:
        ResultStore(tmp_path / "r.sqlite")
    found = page(tmp_path, trained)
    assert "not evaluated yet" in found and "trained" in found and "Loss" in found and "Moment" in found
    assert (tmp_path / "r.sqlite").exists() == with_store


# Several runs


def test_report_of_several_runs_joins_their_students(store, tmp_path):
    second = ModelEntry("dskd", "student", "out", "dd", "tt")
    twin = ModelEntry("amm", "student", "out", "ee", "tt")
    put(store, MODELS, name="alpha")
    put(store, {TEACHER: values(3.0), second: values(0.5), STUDENT: values(0.25)}, name="beta")
    put(store, {BEFORE: values(0.0), twin: values(0.75)}, name="gamma")
    found = page(tmp_path, "alpha", 2, "gamma", "1")
    for by in (3.0, 0.0, 0.25, 0.5, 0.75):
        assert f"{MEAN + by:.2f}" in found
    assert "dskd says 00" in found and "amm (run 3)" in found
    # The same weights are one model
    assert "amm (run 2)" not in found and "before (run" not in found and "teacher (run" not in found


def test_report_of_runs_that_asked_other_questions_is_refused(store, tmp_path, capsys):
    put(store, MODELS)
    put(store, MODELS, SETTINGS | {"top_p": 0.5}, name="beta")
    put(store, MODELS, name="gamma", data="other")
    assert "Run 2 and run 1 have different settings (top_p)" in fails_with(capsys, tmp_path, 1, 2)
    assert "Run 3 and run 1 have different prompts or references" in fails_with(capsys, tmp_path, 1, 3)


@pytest.mark.parametrize("with_store", [True, False])
def test_report_of_trainings_without_evaluations_takes_one_at_a_time(with_store, tmp_path, trained, capsys):
    if with_store:
        ResultStore(tmp_path / "r.sqlite")
    other = shutil.copytree(trained, tmp_path / "other")
    assert "were not evaluated, so they cannot be compared" in fails_with(capsys, tmp_path, trained, other)


def test_report_of_a_run_and_a_training_without_one_is_refused(store, tmp_path, trained, capsys):
    put(store, MODELS)
    message = fails_with(capsys, tmp_path, 1, trained)
    assert f"['{trained}'] were not evaluated" in message


# Options and errors


def test_report_baseline_is_another_model(store, tmp_path, capsys):
    put(store, MODELS)
    assert "Changes are against <bdi>before</bdi>" in page(tmp_path, 1)
    assert "Changes are against <bdi>amm</bdi>" in page(tmp_path, 1, baseline="amm")
    (tmp_path / "page.html").unlink()
    assert "There is no model 'sft' in run 1" in fails_with(capsys, tmp_path, 1, baseline="sft")


def test_report_shows_as_many_prompts_as_are_asked_for(store, tmp_path):
    put(store, MODELS)
    found = page(tmp_path, 1, max_prompts=1)
    assert sum(f"amm says 0{index}" in found for index in range(6)) == 1


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs the extra `plots`")
def test_report_figures_are_pngs_in_the_folder(store, tmp_path, trained, capsys):
    put(store, MODELS | {entry_of(trained): values(0.5)})
    page(tmp_path, 1, figures=tmp_path / "figures")
    files = sorted((tmp_path / "figures").iterdir())
    assert files and all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    shown = capsys.readouterr().out
    assert all(f"Figure: {file}" in shown for file in files)


def test_report_model_card_is_put_beside_the_student(store, tmp_path, trained):
    gone = ModelEntry("gone", "student", str(tmp_path / "nowhere"), "ff", "tt")
    put(store, {BEFORE: values(0.0), entry_of(trained): values(0.25), gone: values(0.5)})
    assert cli.main([*command(tmp_path, 1), "--model_card"]) == 0
    card = (trained / "README.md").read_text()
    assert "Rouge-L" in card and f"{MEAN + 0.25:.2f}" in card
    assert not (tmp_path / "nowhere").exists()


def test_report_without_a_store_says_so(tmp_path, capsys):
    message = fails_with(capsys, tmp_path, "latest")
    assert f"There is no store `{tmp_path / 'r.sqlite'}`" in message
    assert list(tmp_path.iterdir()) == []


def test_report_unknown_run_lists_those_there_are(store, tmp_path, capsys):
    put(store, MODELS, name="alpha")
    assert "Name one of: 1 `alpha`" in fails_with(capsys, tmp_path, "omega")


@pytest.mark.parametrize("kind", ["eval", "bench"])
def test_report_of_what_is_no_finished_evaluation_is_refused(kind, store, tmp_path, capsys):
    with store.begin(kind, "alpha", SETTINGS, "d", "rows", [STUDENT], {}) as run:
        if kind == "bench":
            run.finish()
    message = fails_with(capsys, tmp_path, "alpha")
    assert ("Run 1 is not finished" if kind == "eval" else "Run 1 is a bench") in message


def test_report_of_a_folder_that_no_training_wrote_says_so(store, tmp_path, student_path, capsys):
    message = fails_with(capsys, tmp_path, student_path)
    assert f"`{student_path}` holds no `trainer_state.json`, and no evaluation of the model in it" in message


def test_report_that_cannot_be_written_is_one_error(store, tmp_path, capsys):
    put(store, MODELS)
    (tmp_path / "file").write_text("no folder")
    assert str(tmp_path / "file") in fails_with(capsys, tmp_path, 1, output=tmp_path / "file" / "page.html")


def test_report_of_a_file_that_is_no_store_says_so(tmp_path, capsys):
    (tmp_path / "r.sqlite").write_text("no store" * 100)
    assert "r.sqlite" in fails_with(capsys, tmp_path, 1)

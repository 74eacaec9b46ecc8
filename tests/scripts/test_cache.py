"""`trl-kd cache`, from the command line to the folder that a run takes."""

import json
import re
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import make_model, make_tokenizer
from trl_kd import AMMConfig, cli
from trl_kd.generation import eos_token_ids
from trl_kd.scripts import cache as script
from trl_kd.scripts.arguments import load_splits
from trl_kd.teachers import TeacherCache
from trl_kd.trainer.setup import dataset_preparer, own_tokenizer


PAGE = Path(__file__).parents[2] / "docs" / "teacher_cache.md"


def cache_arguments(teacher, dataset, output_dir, **changes) -> list[str]:
    options = {
        "teacher_model_name_or_path": teacher,
        "dataset_name": dataset,
        "output_dir": output_dir,
        "rows_per_part": 8,
        "batch_size": 4,
        **changes,
    }
    return ["cache", *(part for name, value in options.items() for part in (f"--{name}", str(value)))]


def fails_with(capsys, arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def rows_file(prompt_completion_dataset, tmp_path):
    prompt_completion_dataset.select(range(20)).to_json(tmp_path / "rows.jsonl")
    return tmp_path / "rows.jsonl"


def rows_of_a_run(student, teacher, dataset, folder, **options):
    """What a trainer prepares: its own functions, with its own configuration."""
    args = AMMConfig(str(folder), use_cpu=True, report_to="none", teacher_model_name_or_path=teacher, **options)
    tokenizer = own_tokenizer(None, student, args, {})
    ends = {
        *eos_token_ids(student, tokenizer),
        *eos_token_ids(AutoModelForCausalLM.from_pretrained(teacher), tokenizer),
    }
    return dataset_preparer(args, tokenizer, sorted(ends), None)(dataset, "train", is_training=True), tokenizer


def test_cache_writes_the_rows_that_a_run_trains_on(student_path, teacher_path, rows_file, tmp_path, capsys):
    out = tmp_path / "cache"
    cli.main(cache_arguments(teacher_path, rows_file, out, model_name_or_path=student_path, max_length=14))
    cache = TeacherCache.open(out)
    rows, tokenizer = rows_of_a_run(
        student_path, teacher_path, load_splits(str(rows_file))["train"], tmp_path, max_length=14
    )
    cache.check_rows(rows)
    cache.check_tokenizer(tokenizer)
    cache.check_teacher(teacher_path)
    counts = cache.header["counts"]
    shown = capsys.readouterr().out
    assert (
        f"20 rows and {counts['states']} states in {out}, {counts['tokens'] / counts['states']:.1f} tokens each"
        in shown
    )
    assert (
        f"{counts['data_bytes'] / counts['states']:.1f} bytes per state" in shown
        and "are 768 bytes per state" in shown
    )


def test_cache_of_messages_takes_template_and_options_of_the_run(
    student_path, teacher_path, conversational_dataset, tmp_path
):
    template = tmp_path / "template.jinja"
    template.write_text(AutoTokenizer.from_pretrained(student_path).chat_template.replace("assistant", "helper"))
    template.write_text(template.read_text().replace("== 'helper'", "== 'assistant'"))
    conversational_dataset.select(range(6)).to_json(tmp_path / "rows.jsonl")
    options = {"assistant_only_loss": True, "chat_template_path": str(template), "max_length": 60}
    out = tmp_path / "cache"
    cli.main(cache_arguments(teacher_path, tmp_path / "rows.jsonl", out, model_name_or_path=student_path, **options))
    cache = TeacherCache.open(out)
    dataset = load_splits(str(tmp_path / "rows.jsonl"))["train"]
    rows, tokenizer = rows_of_a_run(student_path, teacher_path, dataset, tmp_path, **options)
    cache.check_rows(rows)
    cache.check_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="another chat template"):
        cache.check_tokenizer(AutoTokenizer.from_pretrained(student_path))
    last_turn, _ = rows_of_a_run(
        student_path, teacher_path, dataset, tmp_path, **(options | {"assistant_only_loss": False})
    )
    with pytest.raises(ValueError, match="of its rows differ|in another order"):
        cache.check_rows(last_turn)


def test_cache_ends_are_those_of_student_and_teacher(student_path, tokenizer, rows_file, tmp_path):
    """A run takes the teacher's ends too, and a row that ends with one of them is not cut."""
    teacher = make_model("llama", len(tokenizer), seed=4, eos_token_id=[0, 9])
    for part in (teacher, tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    out = tmp_path / "cache"
    cli.main(cache_arguments(tmp_path / "teacher", rows_file, out, model_name_or_path=student_path))
    assert TeacherCache.open(out).eos_token_ids == sorted({0, 9, tokenizer.eos_token_id})


def test_cache_head_of_the_student_cuts_the_vocabulary(student_path, tokenizer, rows_file, tmp_path):
    teacher = make_model("llama", len(tokenizer) + 16, seed=4, eos_token_id=tokenizer.eos_token_id)
    for part in (teacher, tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    cli.main(cache_arguments(tmp_path / "teacher", rows_file, tmp_path / "own"))
    cli.main(cache_arguments(tmp_path / "teacher", rows_file, tmp_path / "cut", model_name_or_path=student_path))
    sizes = [TeacherCache.open(tmp_path / name).vocab_size for name in ("own", "cut")]
    assert sizes == [len(tokenizer) + 16, len(tokenizer)]


def test_cache_student_of_another_vocabulary_is_refused(teacher_path, rows_file, tmp_path):
    tokenizer = make_tokenizer("Where does the red bird sleep? On a tree near the water. " * 3, vocab_size=330)
    student = make_model("llama", len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    for part in (student, tokenizer):
        part.save_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match="The vocabularies differ: the student's tokenizer has"):
        cli.main(cache_arguments(teacher_path, rows_file, tmp_path / "cache", model_name_or_path=tmp_path / "student"))
    assert not (tmp_path / "cache").exists()


def test_cache_interrupted_is_one_line_and_goes_on_where_it_was(
    teacher_path, rows_file, tmp_path, monkeypatch, capsys
):
    from trl_kd.teachers import LocalTeacher

    cli.main(cache_arguments(teacher_path, rows_file, tmp_path / "whole"))
    original, calls = LocalTeacher.hidden_states, []

    def forward(self, **inputs):
        calls.append(1)
        if len(calls) == 4:  # in the second part
            raise KeyboardInterrupt
        return original(self, **inputs)

    monkeypatch.setattr(LocalTeacher, "hidden_states", forward)
    with pytest.raises(SystemExit) as caught:
        cli.main(cache_arguments(teacher_path, rows_file, tmp_path / "resumed"))
    assert caught.value.code == 130 and caught.value.__suppress_context__
    line = f"Interrupted: 8 rows are written in {tmp_path / 'resumed'}. The same command goes on from there."
    assert capsys.readouterr().err.splitlines()[-1] == line
    cli.main(cache_arguments(teacher_path, rows_file, tmp_path / "resumed"))
    assert len(calls) == 4 + 3  # of five batches, the two of the first part were not read again
    whole, resumed = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "resumed")
    )
    assert whole == resumed and len(whole) == 4


def test_cache_interrupted_before_the_first_row_is_one_line(rows_file, tmp_path, monkeypatch, capsys):
    def load_teacher(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("trl_kd.scripts.generate.load_teacher", load_teacher)
    with pytest.raises(SystemExit, match="130"):
        cli.main(cache_arguments("someone/teacher", rows_file, tmp_path / "cache"))
    assert "Interrupted: 0 rows are written" in capsys.readouterr().err


def test_cache_python_block_of_the_page_writes_what_the_command_writes(
    student_path, teacher_path, rows_file, tmp_path, monkeypatch
):
    """The block as it stands, but for the names of models."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
    for name, path in (("Qwen/Qwen2.5-0.5B-Instruct", student_path), ("Qwen/Qwen2.5-7B-Instruct", teacher_path)):
        assert block.count(f'"{name}"') == 1
        block = block.replace(f'"{name}"', repr(path))
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(block, namespace)
    assert len(namespace["counts"]) == len(namespace["cache"][0][0]) > 0
    options = {"model_name_or_path": student_path, "rows_per_part": 1000, "batch_size": 8}
    cli.main(cache_arguments(teacher_path, rows_file, tmp_path / "command", **options))
    block, command = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("teacher_cache", "command")
    )
    assert block == command and len(block) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "`teacher_model_name_or_path` is not set, but `trl-kd cache` needs it to write a cache."),
        (["--teacher_model_name_or_path", "x", "--dataset_name", "y"], "`output_dir` is not set"),
        (["--inspect", "x", "--output_dir", "y"], "a cache is either looked at or written"),
        (["--inspect", "missing"], "`missing` holds no teacher cache"),
        (["--top_q", "1"], "unknown option in the command line: --top_q 1."),
    ],
)
def test_cache_wrong_option_is_one_clear_line(arguments, message, capsys):
    assert message in fails_with(capsys, ["cache", *arguments])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("top_p", 1.2, "`top_p` is 1.2, but it is a probability mass. Set it in (0, 1]."),
        ("bits", 20, "`bits` is 20, but a log-probability takes 4 to 16 bits"),
        ("max_tokens", 0, "`max_tokens` is 0, but nothing can be written then."),
    ],
)
def test_cache_wrong_setting_is_refused_before_a_model_is_loaded(option, value, message, capsys):
    assert message in fails_with(capsys, cache_arguments("no-teacher", "no.jsonl", "no-folder", **{option: value}))


def test_cache_prompts_alone_are_refused(teacher_path, tmp_path):
    Dataset.from_list([{"prompt": "What is the sky?"}] * 3).to_json(tmp_path / "prompts.jsonl")
    with pytest.raises(
        ValueError, match="3 rows and no trained token.* `trl-kd generate` lets the teacher write them"
    ):
        cli.main(cache_arguments(teacher_path, tmp_path / "prompts.jsonl", tmp_path / "cache"))


@pytest.fixture
def cache_folder(teacher_path, rows_file, tmp_path):
    cli.main(cache_arguments(teacher_path, rows_file, tmp_path / "cache", max_tokens=40))
    return tmp_path / "cache"


def test_inspect_shows_header_sets_and_tokens(cache_folder, teacher_path, capsys):
    pytest.importorskip("matplotlib")
    capsys.readouterr()
    cli.main(["cache", "--inspect", str(cache_folder)])
    shown = capsys.readouterr().out
    cache = TeacherCache.open(cache_folder)
    sizes = sorted(int(count) for row in cache for count in row[0])
    assert (
        "[bold]" not in shown
        and "top_p 0.95, max_tokens 40, bits 8" in shown
        and "20 rows" in shown
        and "384 tokens" in shown
    )
    line = next(line for line in shown.splitlines() if "tokens of a set" in line)
    numbers = [float(number) for number in re.findall(r"[\d.]+", line)]
    assert numbers[0] == pytest.approx(sum(sizes) / len(sizes), rel=1e-3)
    assert numbers[1] == sizes[0] and numbers[4] == sizes[-1]
    assert "of the sets end at 40 tokens with less mass than 0.95" in shown
    tokenizer = AutoTokenizer.from_pretrained(teacher_path)
    assert repr(tokenizer.decode([int(cache[0][1][0])])) in shown
    assert (cache_folder / "sets.png").read_bytes().startswith(b"\x89PNG")
    # The plot lies in the folder of the cache and does not stand in its way
    TeacherCache.open(cache_folder)


def test_inspect_entropy_is_a_lower_bound(teacher_path, rows_file, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    cli.main(cache_arguments(teacher_path, rows_file, whole, top_p=1.0, max_tokens=384, bits=32))
    cli.main(cache_arguments(teacher_path, rows_file, part, top_p=0.7, bits=32))
    name = "entropy, at least (nats)"
    exact, bound = (script.measure(TeacherCache.open(folder))[name] for folder in (whole, part))
    assert (bound <= exact + 1e-5).all()
    assert (bound > 0.75 * exact).all()  # and no idle one


def test_inspect_without_matplotlib_draws_with_text(cache_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    cli.main(["cache", "--inspect", str(cache_folder), "--plot_file", str(tmp_path / "plot.png")])
    shown = capsys.readouterr().out
    assert "matplotlib, of the extra `trl_kd[plots]`" in shown and not (tmp_path / "plot.png").exists()
    assert re.search(r"32-63 #+ +\d+\.\d%", shown)


def test_histogram_counts_by_powers_of_two():
    import numpy as np

    lines = script.histogram(np.array([1.0, 1.0, 2.0, 3.0, 3.0, 3.0, 8.0, 15.0])).splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2-3", "4-7", "8-15"]
    assert [line.split()[-1] for line in lines] == ["25.0%", "50.0%", "0.0%", "25.0%"]
    assert [line.count("#") for line in lines] == [20, 40, 0, 20]


def test_inspect_without_a_tokenizer_shows_ids(cache_folder, capsys):
    header = json.loads((cache_folder / "header.json").read_text())
    header["teacher"]["name"] = "/no/such/folder"
    (cache_folder / "header.json").write_text(json.dumps(header))
    cli.main(["cache", "--inspect", str(cache_folder)])
    first = TeacherCache.open(cache_folder)[0]
    assert f"{first[1][0]} {float(2.718281828459045 ** first[2][0]):.3f}" in capsys.readouterr().out

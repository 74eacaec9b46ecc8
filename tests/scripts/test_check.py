"""`trl-kd check`: the faults that ruin runs, one by one through the command; the good set-up; output and status."""

import copy
from types import SimpleNamespace

import pytest
import torch

from tests.scripts.check_runs import checked, conversations, learned, options, save, write_rows
from tests.tiny import CHATML_TEMPLATE, SEED_TEXT, make_model, make_tokenizer
from tests.trainer.dual import INSTRUCT_TEMPLATE
from trl_kd import cli
from trl_kd.checks import budget
from trl_kd.scripts import check


THINKING_TEMPLATE = CHATML_TEMPLATE.replace(
    "{{- '<|im_start|>assistant\n' -}}",
    "{{- '<|im_start|>assistant\n' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}",
)


@pytest.fixture(scope="module")
def good(tmp_path_factory, tokenizer):
    """A student that has learned a little, a teacher that has learned more, and their data."""
    folder = tmp_path_factory.mktemp("good")
    student, teacher = learned(tokenizer, 32, 1, 40), learned(tokenizer, 48, 2, 60)
    return {
        "student": save(folder / "student", student, tokenizer),
        "teacher": save(folder / "teacher", teacher, tokenizer),
        "rows": write_rows(folder / "rows.jsonl", conversations()),
        "models": (student, teacher),
    }


@pytest.mark.parametrize("method", ["amm", "dskd", "sparse-td"])
def test_check_good_run_says_fine_on_every_line(method, good, capsys, tmp_path):
    lmbda = {"lmbda": 0.5}
    arguments = options(good["student"], good["teacher"], good["rows"], tmp_path, **lmbda)
    status, found, verdict = checked(capsys, method, arguments)
    assert {name: finding["text"] for name, finding in found.items() if finding["verdict"] != "fine"} == {}
    assert (status, verdict) == (0, "fine")
    assert {"memory", "data", "vocabularies", "chat templates", "likelihood", "rollouts", "time"} <= set(found)
    values = found["likelihood"]["values"]
    assert values["rows"] == 32 and values["student_nats"] > values["teacher_nats"] > 0
    assert found["rollouts"]["values"]["student"]["eos_rate"] > 0.9
    assert found["time"]["values"]["steps"] == 20
    assert not (tmp_path / "out").exists()


def fault(good, capsys, tmp_path, method="amm", student=None, teacher=None, rows=None, **changes):
    """Findings of the good set-up with something else in a place of it."""
    rows = good["rows"] if rows is None else write_rows(tmp_path / "rows.jsonl", rows)
    arguments = options(student or good["student"], teacher or good["teacher"], rows, tmp_path, **changes)
    status, found, verdict = checked(capsys, method, arguments)
    assert status == (verdict == "stop")
    return found


def with_tokenizer(good, which, tokenizer, folder):
    """A model of the good set-up with another tokenizer beside it."""
    return save(folder / which, good["models"][which == "teacher"], tokenizer)


def test_check_end_that_is_never_learned_stops(good, capsys, tmp_path):
    rows = [
        {"prompt": row["messages"][:1], "completion": row["messages"][1:], "truncated": True}
        for row in conversations()
    ]
    finding = fault(good, capsys, tmp_path, rows=rows)["end of a completion"]
    assert finding["verdict"] == "stop" and "No row trains a token that ends a completion" in finding["text"]
    assert "add rows that end" in finding["fix"]


def test_check_swapped_chat_templates_are_found(good, tokenizer, capsys, tmp_path):
    other = copy.deepcopy(tokenizer)
    other.chat_template = INSTRUCT_TEMPLATE
    found = fault(good, capsys, tmp_path, student=with_tokenizer(good, "student", other, tmp_path))
    finding = found["chat templates"]
    assert finding["verdict"] == "careful" and "`chat_template_path`" in finding["fix"]
    assert "<answer>" in finding["sample"] and "<|im_start|>assistant" in finding["sample"]


def test_check_pad_equal_to_eos_without_a_mask_stops(good, tokenizer, capsys, tmp_path):
    """Rows that somebody has tokenised, with padding taken out of the labels by its id."""
    own = copy.deepcopy(tokenizer)
    own.pad_token = own.eos_token
    rows = []
    for row in conversations():
        ids = own.apply_chat_template(row["messages"], return_dict=False)[:-1] + [own.eos_token_id] * 3
        rows.append({"input_ids": ids, "labels": [-100 if token == own.pad_token_id else token for token in ids]})
    student, teacher = (with_tokenizer(good, which, own, tmp_path) for which in ("student", "teacher"))
    found = fault(good, capsys, tmp_path, student=student, teacher=teacher, rows=rows, lmbda=0.0)
    finding = found["end of a completion"]
    assert finding["verdict"] == "stop" and "masked by its id and the pad token is the EOS" in finding["text"]
    assert "to its id, not -100" in finding["fix"]


def test_check_teacher_with_another_tokenizer_of_the_same_size_stops(good, tokenizer, capsys, tmp_path):
    other = make_tokenizer(SEED_TEXT.translate(str.maketrans("abcdefghijklm", "nopqrstuvwxyz")))
    assert len(other) == len(tokenizer)
    teacher = make_model("llama", len(tokenizer), hidden_size=48, seed=2, eos_token_id=other.eos_token_id)
    found = fault(good, capsys, tmp_path, teacher=save(tmp_path / "teacher", teacher, other))
    finding = found["vocabularies"]
    assert finding["verdict"] == "stop" and "trl-kd dskd" in finding["fix"]
    assert "the student's tokenizer has 384 tokens, the teacher's 384" in finding["text"]
    assert found["models"]["verdict"] == "careful" and "something above says stop" in found["models"]["text"]


def test_check_thinking_template_on_one_side_is_found(good, tokenizer, capsys, tmp_path):
    other = copy.deepcopy(tokenizer)
    other.chat_template = THINKING_TEMPLATE
    found = fault(good, capsys, tmp_path, teacher=with_tokenizer(good, "teacher", other, tmp_path))
    finding = found["thinking mode"]
    assert finding["verdict"] == "careful" and "enable_thinking" in finding["fix"]


def test_check_truncated_rows_are_counted(good, capsys, tmp_path):
    rows = conversations(20)
    for row in rows[:8]:
        row["messages"][1]["content"] *= 12
    finding = fault(good, capsys, tmp_path, rows=rows)["truncation"]
    assert finding["verdict"] == "stop" and "40%" in finding["text"] and "`max_length=" in finding["fix"]


def test_check_teacher_worse_than_its_student_stops(good, capsys, tmp_path):
    found = fault(good, capsys, tmp_path, student=good["teacher"], teacher=good["student"])
    finding = found["likelihood"]
    assert finding["verdict"] == "stop" and "the teacher is worse" in finding["text"]
    assert "`teacher_model_name_or_path`" in finding["fix"]
    values = finding["values"]
    assert values["teacher_nats"] - values["student_nats"] > 2 * values["standard_error"] > 0


def test_check_plan_that_does_not_fit_stops_and_says_what_would(good, capsys, tmp_path, monkeypatch):
    # The first of the changes is enough, and looking at all of them takes seconds
    monkeypatch.setattr("trl_kd.checks.budget._CHANGES", budget._CHANGES[:1])
    found = fault(good, capsys, tmp_path, device_memory=0.9, per_device_train_batch_size=1024)
    memory = found["memory"]
    assert memory["verdict"] == "stop" and "a card of 0.9 GB" in memory["text"]
    assert "--per_device_train_batch_size" in memory["fix"] and "--gradient_accumulation_steps" in memory["fix"]
    assert memory["values"]["peak"] > memory["values"]["budget"] == int(0.9 * 2**30)


# What cannot be looked at


def test_check_without_a_connection_is_careful_and_no_traceback(good, capsys, tmp_path):
    arguments = options("someone/a-student", "someone/a-teacher", good["rows"], tmp_path)
    status, found, verdict = checked(capsys, "amm", arguments)
    assert (status, verdict) == (0, "careful")
    assert "could not be read" in found["memory"]["text"] and "someone/a-student" in found["memory"]["text"]
    assert "reaches the Hub" in found["tokenizers"]["fix"]
    assert "likelihoods, rollouts and time were not looked at" in found["models"]["text"]


def test_check_dataset_that_cannot_be_reached_is_careful(good, capsys, tmp_path):
    arguments = options(good["student"], good["teacher"], "someone/a-dataset", tmp_path)
    status, found, _ = checked(capsys, "amm", arguments)
    assert status == 0 and found["data"]["verdict"] == "careful"
    assert "The dataset could not be read" in found["data"]["text"]
    assert "likelihood" not in found and "The dataset could not be read" in found["models"]["text"]


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("teacher_model_name_or_path", "./no-teacher", "memory"),
        ("dataset_name", "no.jsonl", "data"),
        ("model_name_or_path", "./no-student", "memory"),
        ("teacher_model_name_or_path", "/no/teacher", "memory"),
    ],
)
def test_check_wrong_path_stops(name, value, line, good, capsys, tmp_path):
    places = {"model_name_or_path": good["student"], "teacher_model_name_or_path": good["teacher"]}
    places |= {"dataset_name": good["rows"], name: value}
    status, found, _ = checked(capsys, "amm", options(*places.values(), tmp_path))
    assert status == 1 and found[line]["verdict"] == "stop" and found[line]["fix"] == "Correct the path."


def test_check_split_that_is_not_there_stops_and_names_those_that_are(good, capsys, tmp_path):
    arguments = options(good["student"], good["teacher"], good["rows"], tmp_path, dataset_train_split="training")
    status, found, _ = checked(capsys, "amm", arguments)
    assert status == 1 and "has only ['train']" in found["data"]["text"]
    assert found["data"]["fix"] == "Set `--dataset_train_split` to one that is there."


def test_check_evaluation_without_its_split_stops(good, capsys, tmp_path):
    arguments = options(good["student"], good["teacher"], good["rows"], tmp_path, eval_strategy="steps", eval_steps=5)
    status, found, _ = checked(capsys, "amm", arguments)
    assert status == 1 and "`dataset_test_split` is 'test'" in found["evaluation data"]["text"]
    assert "--eval_strategy no" in found["evaluation data"]["fix"]


@pytest.mark.parametrize(
    ("content", "said"), [("", "no rows"), ("hello\n", "could not be read: JSON"), ('{"a": "b"\n', "JSON")]
)
def test_check_file_without_a_row_that_can_be_read_stops(content, said, good, capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text(content)
    arguments = options(good["student"], good["teacher"], tmp_path / "rows.jsonl", tmp_path)
    status, found, _ = checked(capsys, "amm", arguments)
    assert status == 1 and found["data"]["verdict"] == "stop" and said in found["data"]["text"]
    assert "one JSON object a line" in found["data"]["fix"]


def test_check_folder_without_a_tokenizer_stops_and_says_to_save_one(good, capsys, tmp_path):
    student = save(tmp_path / "student", good["models"][0])
    status, found, _ = checked(capsys, "amm", options(student, good["teacher"], good["rows"], tmp_path))
    assert status == 1 and found["tokenizers"]["verdict"] == "stop"
    assert (
        "there is nothing that can be read" in found["tokenizers"]["text"] and student in found["tokenizers"]["text"]
    )
    assert "`tokenizer.save_pretrained(...)`" in found["tokenizers"]["fix"]


def test_check_of_a_student_out_of_reach_is_no_wrong_path_of_the_teacher(good, capsys, tmp_path):
    arguments = options("someone/a-student", good["teacher"], good["rows"], tmp_path)
    status, found, _ = checked(capsys, "amm", arguments)
    assert status == 0 and found["memory"]["verdict"] == "careful"
    assert "The student's configuration (`someone/a-student`)" in found["memory"]["text"]


def test_check_of_a_teacher_out_of_reach_does_not_say_that_it_has_no_tokenizer(good, capsys, tmp_path):
    # Its configuration is in the table
    arguments = options(good["student"], "Qwen/Qwen3-0.6B", good["rows"], tmp_path)
    status, found, _ = checked(capsys, "amm", arguments)
    assert status == 0 and "The teacher's tokenizer (`Qwen/Qwen3-0.6B`)" in found["tokenizers"]["text"]
    assert "vocabularies" not in found


def test_check_keeps_warnings_of_libraries_to_itself(good, capsys, tmp_path, recwarn):
    arguments = options(good["student"], good["teacher"], good["rows"], tmp_path, gradient_checkpointing="true")
    capsys.readouterr()
    cli.main(["check", "amm", *arguments])
    told = capsys.readouterr().err
    assert "it/s" not in told and "examples/s" not in told and "Warning" not in told
    assert [str(warning.message) for warning in recwarn if warning.category is FutureWarning] == []


def test_check_trainer_that_cannot_be_made_stops_with_its_message(good, capsys, tmp_path):
    teacher = with_tokenizer(good, "teacher", make_tokenizer(), tmp_path)
    (tmp_path / "teacher" / "model.safetensors").unlink()
    status, found, _ = checked(capsys, "amm", options(good["student"], teacher, good["rows"], tmp_path))
    assert status == 1 and found["start"]["verdict"] == "stop" and found["start"]["fix"]
    assert "The trainer cannot be made. ValueError: The teacher" in found["start"]["text"]
    assert found["chat templates"]["verdict"] == "fine"


def test_check_that_fails_itself_says_so_and_goes_on(good, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_kd.checks.text.text_findings", lambda subject: 1 / 0)
    arguments = options(good["student"], good["teacher"], good["rows"], tmp_path)
    status, found, _ = checked(capsys, "amm", arguments)
    assert status == 0 and found["memory"]["verdict"] == "fine"
    assert found["tokenizers"]["verdict"] == "careful" and "ZeroDivisionError" in found["tokenizers"]["text"]
    assert "the check of tokenizers has failed" in found["models"]["text"]


def test_check_dtype_that_does_not_exist_stops(good, capsys, tmp_path):
    kwargs = {"teacher_model_init_kwargs": '{"dtype": "float3"}'}
    status, found, _ = checked(
        capsys, "amm", options(good["student"], good["teacher"], good["rows"], tmp_path, **kwargs)
    )
    assert status == 1 and "`dtype` is 'float3'" in found["memory"]["text"]


def test_check_7b_teacher_has_a_plan_where_it_could_not_be_loaded(good, capsys, tmp_path, monkeypatch):
    """Its configuration is in the package's table; the student's too."""
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *args, **kwargs: 1 / 0)
    monkeypatch.setattr("trl_kd.checks.budget.smallest_change", lambda run, budget: ["`--another`"])  # seconds long
    names = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct")
    arguments = options(
        *names, good["rows"], tmp_path, use_cpu=None, plan_only="true", device_memory=12, dtype="bfloat16"
    )
    status, found, _ = checked(capsys, "amm", arguments)
    assert list(found) == ["memory"] and status == 1
    assert found["memory"]["verdict"] == "stop" and "a card of 12 GB" in found["memory"]["text"]
    _, found, _ = checked(
        capsys, "amm", [*arguments, "--teacher_model_init_kwargs", '{"load_in_4bit": true}', "--use_peft"]
    )
    assert found["memory"]["verdict"] != "stop"


def test_check_larger_than_this_machine_is_not_loaded(good, capsys, tmp_path, monkeypatch):
    """The card of the run has room, this machine has not."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**20))
    monkeypatch.setattr("trl_kd.AMMTrainer.__init__", lambda *args, **kwargs: 1 / 0)
    arguments = options(good["student"], good["teacher"], good["rows"], tmp_path, device_memory=24)
    status, found, _ = checked(capsys, "amm", arguments)
    assert status == 0 and found["memory"]["verdict"] == "fine"
    assert "they do not fit this machine" in found["models"]["text"]
    assert found["truncation"]["verdict"] == "fine"


# Options and output


def test_check_plan_only_reads_configurations_alone(good, capsys, tmp_path, monkeypatch):
    for name in ("transformers.AutoTokenizer.from_pretrained", "trl_kd.scripts.arguments.load_splits"):
        monkeypatch.setattr(name, lambda *args, **kwargs: 1 / 0)
    arguments = options(good["student"], good["teacher"], good["rows"], tmp_path, dataset_name=None, plan_only="true")
    status, found, verdict = checked(capsys, "amm", arguments)
    assert (status, list(found), verdict) == (0, ["memory"], "fine")


def test_check_markdown_is_a_table(good, capsys, tmp_path):
    arguments = options(good["student"], good["teacher"], good["rows"], tmp_path, markdown="true")
    assert cli.main(["check", "amm", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| verdict |") and set(lines[1]) == {"|", "-"}
    assert len([line for line in lines if line.startswith("| fine |")]) >= 10
    assert "<details><summary>chat templates</summary>" in lines


def test_check_prints_lines_with_the_student_for_a_title(good, capsys, tmp_path):
    arguments = options(good["student"], good["teacher"], good["rows"], tmp_path)
    assert cli.main(["check", "amm", *arguments]) == 0
    out = capsys.readouterr().out
    assert out.startswith("trl-kd amm: ") and "0 stop, 0 careful" in out.splitlines()[-1]


def test_check_help_says_what_a_check_is_of(capsys):
    assert cli.main(["check", "--help"]) == 0 and cli.main(["check"]) == 0
    out = capsys.readouterr().out
    assert "amm, dskd, sparse-td" in out and "exit\nstatus is 1" in out


@pytest.mark.parametrize("method", ["amm", "dskd", "sparse-td"])
def test_check_help_of_a_method_has_its_options_and_the_checks(method, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["check", method, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for name in ("samples", "plan_only", "device_memory", "json", "markdown", "lmbda", "model_name_or_path", "config"):
        assert f"--{name}" in out
    assert f"`trl-kd {method}`" in out


def test_check_of_an_unknown_method_is_one_clear_line(capsys):
    assert cli.main(["check", "sft", "--config", "run.yaml"]) == 2
    message = capsys.readouterr().err
    assert "the first argument is 'sft'" in message and "amm, dskd, sparse-td" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", "1"], "unknown option in the command line: --learning_rat 1."),
        (["--samples", "0"], "`samples` is 0, but there must be a row to look at."),
        (["--device_memory", "-1"], "`device_memory` is -1.0, but nothing fits there."),
        (["--json", "true", "--markdown", "true"], "`json` and `markdown` are both True"),
        (["--dataset_name", "x.jsonl", "--model_name_or_path", "a"], "`teacher_model_name_or_path` is not set"),
        (["--model_name_or_path", "a", "--teacher_model_name_or_path", "b"], "neither is set"),
    ],
)
def test_check_wrong_option_is_one_clear_line(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        cli.main(["check", "amm", "--output_dir", str(tmp_path), *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_check_takes_the_file_of_the_run(good, capsys, tmp_path):
    pairs = options(good["student"], good["teacher"], good["rows"], tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text("".join(f"{name[2:]}: {value}\n" for name, value in zip(pairs[::2], pairs[1::2], strict=True)))
    status, found, verdict = checked(capsys, "amm", ["--config", str(file), "--samples", "8"])
    assert (status, verdict) == (0, "fine")
    assert found["likelihood"]["values"]["rows"] == 8


@pytest.mark.parametrize("changes", [{}, {"hub": True}])
def test_check_leaves_nothing_behind(changes, good, capsys, tmp_path):
    more = {
        "push_to_hub": "true",
        "eval_strategy": "steps",
        "dataset_test_split": "train",
        "eval_steps": 5,
        "load_best_model_at_end": "true",
        "save_steps": 5,
    }
    arguments = options(good["student"], good["teacher"], good["rows"], tmp_path, **(more if changes else {}))
    before = sorted(tmp_path.rglob("*"))
    status, found, _ = checked(capsys, "amm", arguments)
    assert status == 0 and "time" in found
    assert sorted(tmp_path.rglob("*")) == before


def test_check_counts_the_steps_of_all_rows(good, capsys, tmp_path):
    """By epochs, and with a sample that is smaller than the data."""
    arguments = options(good["student"], good["teacher"], good["rows"], tmp_path, max_steps=None, samples=8)
    arguments += ["--num_train_epochs", "3", "--gradient_accumulation_steps", "3"]
    _, found, _ = checked(capsys, "amm", arguments)
    # 32 rows in batches of 4, three of which make a step: 3 steps an epoch
    assert found["time"]["values"]["steps"] == 9


# The plan of a command


def parsed(tmp_path, *arguments, method="amm"):
    base = [
        "--model_name_or_path",
        "student",
        "--teacher_model_name_or_path",
        "teacher",
        "--output_dir",
        str(tmp_path),
    ]
    return check.make_parser(method).parse_args_and_config([*base, "--use_cpu", "true", *arguments])[:3]


def test_planned_run_has_what_the_models_are_loaded_as(good, tmp_path):
    configs = dict(zip(("student", "teacher"), (model.config for model in good["models"]), strict=True))
    kwargs = '{"load_in_4bit": true, "dtype": "float16"}'
    arguments = ["--load_in_8bit", "true", "--use_peft", "--lora_r", "7", "--dtype", "bfloat16"]
    run = check.planned_run(
        "amm", *parsed(tmp_path, *arguments, "--teacher_model_init_kwargs", kwargs), longest=77, **configs
    )
    assert (run.method, run.student, run.teacher) == ("amm", configs["student"], configs["teacher"])
    assert (run.student_dtype, run.student_bits, run.double_quant) == (torch.bfloat16, 8, False)
    assert (run.teacher_dtype, run.teacher_bits, run.num_teachers) == (torch.float16, 4, 1)
    assert run.peft_config.r == 7 and run.longest == 77 and run.device_type == "cuda"
    # A card has bf16, if nobody says otherwise
    assert run.args.bf16 and not run.args.use_cpu
    run = check.planned_run(
        "amm", *parsed(tmp_path, "--load_in_4bit", "true", "--use_bnb_nested_quant"), **configs, device_type="cpu"
    )
    assert (run.student_dtype, run.student_bits, run.double_quant) == (torch.float32, 4, True)
    assert (run.teacher_dtype, run.teacher_bits, run.peft_config) == (torch.float32, None, None)
    assert not run.args.bf16 and run.args.use_cpu


@pytest.mark.parametrize(("option", "value"), [("--teacher_cache", "a cache"), ("--teacher_adapter", "base")])
def test_planned_run_without_a_teacher_of_its_own_has_none(option, value, good, tmp_path):
    base = ["--model_name_or_path", "student", "--output_dir", str(tmp_path), option, value]
    options = check.make_parser("sparse-td").parse_args_and_config(base)[:3]
    run = check.planned_run("sparse-td", *options, student=good["models"][0].config)
    assert run.teacher is None


def test_planned_run_counts_several_teachers(good, tmp_path):
    base = ["--model_name_or_path", good["student"], "--output_dir", str(tmp_path)]
    base += ["--teacher_models", good["teacher"], good["student"]]
    run = check.planned_run("amm", *check.make_parser("amm").parse_args_and_config(base)[:3])
    assert run.num_teachers == 2 and run.teacher.hidden_size == good["models"][1].config.hidden_size
    assert run.student.hidden_size == good["models"][0].config.hidden_size

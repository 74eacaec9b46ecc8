"""The commands, from the command line to the files they write."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import make_model, make_tokenizer
from trl_kd import AMMConfig, DSKDConfig, SparseTDConfig, cli, generation
from trl_kd.scripts import generate, launch


ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "configs" / "amm_qwen.yaml"


def fails_with(capsys, arguments: list[str]) -> str:
    """Message of a command that leaves with status 2."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_help_lists_every_command_with_one_line(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    for name, text in cli.COMMANDS.items():
        assert f"  {name}" in shown and text in shown
        assert (ROOT / f"{launch.script_module(name).replace('.', '/')}.py").is_file()


def test_unknown_command_names_the_known_ones(capsys):
    message = fails_with(capsys, ["sft"])
    assert "invalid choice: 'sft'" in message and "amm" in message


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("trl_kd 0.")


# amm


def test_amm_help_is_complete(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["amm", "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    names = [field.name for field in dataclasses.fields(AMMConfig) if field.init]
    names += ["config", "model_name_or_path", "dataset_name", "use_peft", "load_in_4bit", *launch.LAUNCH_ARGUMENTS]
    assert [name for name in names if f"--{name}" not in shown] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", "1"], "unknown option in the command line: --learning_rat 1."),
        (["--gamma", "high"], "argument --gamma: invalid float value: 'high'"),
        (["--critic", "learned"], "invalid choice: 'learned'"),
        (["--gamma", "2"], "`gamma` is 2.0, but it discounts later tokens. Set it in (0, 1]."),
        (["--config", "missing.yaml"], "No such file or directory: 'missing.yaml'"),
        (["--dataset_name", "x.jsonl", "--model_name_or_path", "a"], "`teacher_model_name_or_path` is not set"),
        (["--dataset_name", "x.jsonl"], "`model_name_or_path` is not set"),
        (["--model_name_or_path", "a", "--teacher_model_name_or_path", "b"], "neither is set"),
    ],
)
def test_amm_wrong_option_is_one_clear_line(arguments, message, capsys, tmp_path):
    lines = fails_with(capsys, ["amm", "--output_dir", str(tmp_path), *arguments]).splitlines()
    errors = [line for line in lines if "error:" in line]
    assert len(errors) == 1 and message in errors[0]
    # At most a line of usage besides: the several hundred options are for --help
    assert len([line for line in lines if line.startswith("usage:") or line.startswith(" ")]) <= 1


def test_amm_unknown_option_in_yaml_is_one_clear_line(capsys, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("learning_rat: 1\n")
    message = fails_with(capsys, ["amm", "--config", str(file)])
    assert "unknown option in the file given by --config: --learning_rat 1." in message


def write_rows(folder: Path, dataset: Dataset) -> Path:
    """The dataset as a folder with a training and a test split."""
    folder.mkdir()
    dataset.to_json(folder / "train.jsonl")
    dataset.select(range(4)).to_json(folder / "test.jsonl")
    return folder


def test_amm_missing_dataset_file_says_so(student_path, teacher_path, tmp_path):
    with pytest.raises(FileNotFoundError, match="`dataset_name` is 'no.jsonl', but there is no such file."):
        cli.main(amm_arguments(student_path, teacher_path, "no.jsonl", tmp_path / "out"))


def test_amm_missing_split_names_those_there_are(student_path, teacher_path, prompt_completion_dataset, tmp_path):
    prompt_completion_dataset.to_json(tmp_path / "rows.jsonl")
    arguments = amm_arguments(student_path, teacher_path, tmp_path / "rows.jsonl", tmp_path / "out")
    with pytest.raises(ValueError, match=r"`dataset_test_split` is 'test', but the dataset has only \['train'\]."):
        cli.main([*arguments, "--eval_strategy", "steps", "--eval_steps", "1"])


def amm_arguments(student: str, teacher: str, dataset: Path | str, output_dir: Path) -> list[str]:
    settings = {
        "model_name_or_path": student,
        "teacher_model_name_or_path": teacher,
        "dataset_name": dataset,
        "output_dir": output_dir,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": "true",
        "gradient_checkpointing": "false",
    }
    return ["amm", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]


def changed(model_folder: str, output_dir: Path) -> bool:
    """Whether a saved model differs from the one that it started from."""
    before, after = load_file(Path(model_folder) / "model.safetensors"), load_file(output_dir / "model.safetensors")
    assert before.keys() == after.keys()
    return any(not before[name].equal(after[name]) for name in before)


def test_amm_trains_evaluates_and_saves_a_clean_student(
    student_path, teacher_path, prompt_completion_dataset, tmp_path
):
    rows = write_rows(tmp_path / "rows", prompt_completion_dataset)
    out = tmp_path / "out"
    arguments = amm_arguments(student_path, teacher_path, rows, out)
    assert cli.main([*arguments, "--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "2"]) == 0
    assert changed(student_path, out)
    assert AutoTokenizer.from_pretrained(out).eos_token == "<|im_end|>"
    history = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_loss" in entry for entry in history)


def test_amm_resumes_from_a_checkpoint(student_path, teacher_path, prompt_completion_dataset, tokenizer, tmp_path):
    rows = write_rows(tmp_path / "rows", prompt_completion_dataset)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    steps = ["--max_steps", "4", "--lr_scheduler_type", "constant", "--save_steps", "2"]
    cli.main([*amm_arguments(student_path, teacher_path, rows, whole), *steps])
    cli.main([*amm_arguments(student_path, teacher_path, rows, halves), *steps, "--max_steps", "2"])
    assert changed(whole, halves)

    # Starts from other weights, so that a run from scratch cannot arrive at the same ones
    other = str(tmp_path / "other")
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    make_model("llama", len(tokenizer), seed=9, **ids).save_pretrained(other)
    tokenizer.save_pretrained(other)
    assert changed(student_path, Path(other))
    resumed = ["--resume_from_checkpoint", str(halves / "checkpoint-2")]
    cli.main([*amm_arguments(other, teacher_path, rows, halves), *steps, *resumed])
    assert not changed(whole, halves)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_amm_reads_a_local_file(suffix, student_path, teacher_path, prompt_completion_dataset, tmp_path):
    file = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        prompt_completion_dataset.to_parquet(file)
    else:
        prompt_completion_dataset.to_json(file, compression="gzip" if suffix.endswith(".gz") else None)
    cli.main([*amm_arguments(student_path, teacher_path, file, tmp_path / "out"), "--max_steps", "1"])
    assert changed(student_path, tmp_path / "out")


def test_amm_streams_a_local_file(student_path, teacher_path, prompt_completion_dataset, tmp_path):
    prompt_completion_dataset.to_json(tmp_path / "rows.jsonl")
    arguments = amm_arguments(student_path, teacher_path, tmp_path / "rows.jsonl", tmp_path / "out")
    cli.main([*arguments, "--dataset_streaming", "--max_steps", "1"])
    assert changed(student_path, tmp_path / "out")


def test_amm_example_file_runs_on_tiny_models(student_path, teacher_path, prompt_completion_dataset, tmp_path):
    prompts = prompt_completion_dataset.map(
        lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]}, remove_columns=["prompt", "completion"]
    )
    prompts.to_json(tmp_path / "prompts.jsonl")
    # Larger than a tiny model needs, smaller than the file's, so that a CPU writes them quickly
    local = amm_arguments(student_path, teacher_path, tmp_path / "prompts.jsonl", tmp_path / "out")
    cli.main([*local, "--config", str(EXAMPLE), "--gradient_accumulation_steps", "2"])
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_amm_example_file_has_known_options_only():
    from trl_kd.scripts.amm import make_parser

    known = {action.dest for action in make_parser()._actions}
    assert set(yaml.safe_load(EXAMPLE.read_text())) <= known


# dskd


DSKD_EXAMPLE = ROOT / "examples" / "configs" / "dskd_qwen_to_smollm.yaml"


def test_dskd_example_file_has_known_options_only():
    from trl_kd.scripts.dskd import make_parser

    known = {action.dest for action in make_parser()._actions}
    assert set(yaml.safe_load(DSKD_EXAMPLE.read_text())) <= known


def test_dskd_help_is_complete(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["dskd", "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert [field.name for field in dataclasses.fields(DSKDConfig) if f"--{field.name}" not in shown] == []
    assert "trl_kd.scripts.dskd" in shown


def test_dskd_trains_the_example_file_across_tokenizers(student_path, tmp_path):
    """The YAML with small values on top: messages, LoRA, another tokenizer and template on the teacher's side."""
    tokenizer = make_tokenizer("Where does the red bird sleep? On a tree near the water. " * 3, vocab_size=330)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<turn>")
    teacher = make_model("qwen2", len(tokenizer), hidden_size=48, seed=3, eos_token_id=tokenizer.eos_token_id)
    for part in (teacher, tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    turns = [
        {
            "messages": [
                {"role": "user", "content": f"Say {i}"},
                {"role": "assistant", "content": "The fox. " * (i + 1)},
            ]
        }
        for i in range(8)
    ]
    Dataset.from_list(turns).to_json(tmp_path / "turns.jsonl")
    local = amm_arguments(student_path, tmp_path / "teacher", tmp_path / "turns.jsonl", tmp_path / "out")
    few = ["--gradient_accumulation_steps", "2", "--projector_pretraining_steps", "2"]
    cli.main(["dskd", "--config", str(DSKD_EXAMPLE), *local[1:], *few])
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name)
    assert not any("projector" in name or "teacher" in name for name in adapter)
    assert "dual-space distillation" in (tmp_path / "out" / "README.md").read_text()


# sparse-td


SPARSE_TD_EXAMPLE = ROOT / "examples" / "configs" / "sparse_td_qwen.yaml"


def test_sparse_td_example_file_has_known_options_only():
    from trl_kd.scripts.sparse_td import make_parser

    known = {action.dest for action in make_parser()._actions}
    assert set(yaml.safe_load(SPARSE_TD_EXAMPLE.read_text())) <= known


def test_sparse_td_help_is_complete(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["sparse-td", "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert [field.name for field in dataclasses.fields(SparseTDConfig) if f"--{field.name}" not in shown] == []
    assert "-m trl_kd.scripts.sparse_td" in shown


def test_sparse_td_without_teacher_and_cache_is_one_clear_line(capsys, tmp_path):
    arguments = ["--model_name_or_path", "a", "--dataset_name", "x.jsonl", "--output_dir", str(tmp_path)]
    message = fails_with(capsys, ["sparse-td", *arguments])
    assert "`teacher_model_name_or_path` is not set, and neither are `teacher_adapter`, `teacher_models`" in message


def cache_arguments(student: str, teacher: str, dataset: Path | str, folder: Path, **changes: object) -> list[str]:
    settings = {
        "model_name_or_path": student,
        "teacher_model_name_or_path": teacher,
        "dataset_name": dataset,
        "output_dir": folder,
        **changes,
    }
    return ["cache", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]


def without_teacher(arguments: list[str]) -> list[str]:
    place = arguments.index("--teacher_model_name_or_path")
    return arguments[:place] + arguments[place + 2 :]


def refuse_models(monkeypatch) -> None:
    """From here on, whoever loads a teacher fails."""

    def refuse(self, *args, **kwargs):
        raise AssertionError("a teacher was loaded")

    monkeypatch.setattr("trl_kd.teachers.local.LocalTeacher.__init__", refuse)


def history(checkpoint: Path, name: str) -> list[float]:
    """Values of one logged number."""
    entries = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in entries if name in entry]


def test_sparse_td_from_a_cache_loads_no_teacher_and_has_the_losses_of_the_teacher(
    student_path, teacher_path, prompt_completion_dataset, tmp_path, monkeypatch
):
    """Rows, batches and sets are the same; what is left, without rounding to few bits, is that of float32."""
    rows = write_rows(tmp_path / "rows", prompt_completion_dataset)
    logs = ["--logging_steps", "1", "--save_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2"]
    live = amm_arguments(student_path, teacher_path, rows, tmp_path / "live")
    assert cli.main(["sparse-td", *live[1:], *logs]) == 0
    splits = {"cache": {}, "eval cache": {"dataset_train_split": "test"}}
    for name, split in splits.items():
        cli.main(cache_arguments(student_path, teacher_path, rows, tmp_path / name, bits=32, **split))

    refuse_models(monkeypatch)
    cached = amm_arguments(student_path, teacher_path, rows, tmp_path / "cached")
    caches = ["--teacher_cache", str(tmp_path / "cache"), "--eval_teacher_cache", str(tmp_path / "eval cache")]
    assert cli.main(["sparse-td", *without_teacher(cached[1:]), *caches, *logs]) == 0
    checkpoints = tmp_path / "live" / "checkpoint-2", tmp_path / "cached" / "checkpoint-2"
    for name in ("loss", "eval_loss", "kd/off_policy/tail"):
        expected, found = (history(checkpoint, name) for checkpoint in checkpoints)
        assert expected and found == pytest.approx(expected, rel=1e-4), name
    assert changed(student_path, tmp_path / "cached")


def test_amm_from_a_cache_loads_no_teacher(
    student_path, teacher_path, prompt_completion_dataset, tmp_path, monkeypatch
):
    prompt_completion_dataset.to_json(tmp_path / "rows.jsonl")
    cli.main(cache_arguments(student_path, teacher_path, tmp_path / "rows.jsonl", tmp_path / "cache"))
    refuse_models(monkeypatch)
    arguments = amm_arguments(student_path, teacher_path, tmp_path / "rows.jsonl", tmp_path / "out")
    source = ["--teacher_cache", str(tmp_path / "cache"), "--lmbda", "0"]
    assert cli.main([*without_teacher(arguments), *source]) == 0
    assert changed(student_path, tmp_path / "out")


def test_sparse_td_example_file_runs_with_the_teacher_and_from_a_cache(
    student_path, teacher_path, conversational_dataset, tmp_path
):
    """With small values on top, and the teacher as a whole; a cache wins over the teacher that the file names too."""
    conversational_dataset.to_json(tmp_path / "turns.jsonl")
    cache = cache_arguments(student_path, teacher_path, tmp_path / "turns.jsonl", tmp_path / "cache", max_length=1024)
    cli.main(cache)
    for name, source in (("live", []), ("cached", ["--teacher_cache", str(tmp_path / "cache")])):
        local = amm_arguments(student_path, teacher_path, tmp_path / "turns.jsonl", tmp_path / name)
        few = ["--teacher_model_init_kwargs", "{}", "--gradient_accumulation_steps", "2", *source]
        cli.main(["sparse-td", "--config", str(SPARSE_TD_EXAMPLE), *local[1:], *few])
        adapter = load_file(tmp_path / name / "adapter_model.safetensors")
        assert any(tensor.abs().max() > 0 for key, tensor in adapter.items() if "lora_B" in key)
        assert "SparseTD" in (tmp_path / name / "README.md").read_text()


# Launching


def test_launch_arguments_are_split_from_the_others():
    arguments = ["--lmbda", "0.5", "--num_processes=2", "--gpu-ids", "0,1", "--use_peft", "--config", "a.yaml"]
    launch_arguments, rest = launch.split_launch_arguments(arguments, "trl-kd amm")
    assert launch_arguments == ["--num_processes", "2", "--gpu_ids", "0,1"]
    assert rest == ["--lmbda", "0.5", "--use_peft", "--config", "a.yaml"]


def test_launch_config_by_name_is_the_one_that_trl_ships():
    launch_arguments, rest = launch.split_launch_arguments(["--accelerate_config", "zero2"], "trl-kd amm")
    assert rest == [] and launch_arguments[0] == "--config_file"
    assert yaml.safe_load(Path(launch_arguments[1]).read_text())["deepspeed_config"]["zero_stage"] == 2


def test_launch_config_by_path_is_taken_as_it_is(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("num_processes: 1\n")
    assert launch.split_launch_arguments(["--accelerate_config", str(file)], "") == (["--config_file", str(file)], [])


def test_launch_unknown_config_names_the_known_ones():
    with pytest.raises(SystemExit, match="`accelerate_config` is 'zero9', but there is no such file.*zero2"):
        launch.split_launch_arguments(["--accelerate_config", "zero9"], "trl-kd amm")


def test_launch_runs_the_script_in_its_own_process(student_path, teacher_path, prompt_completion_dataset, tmp_path):
    prompt_completion_dataset.to_json(tmp_path / "rows.jsonl")
    arguments = amm_arguments(student_path, teacher_path, tmp_path / "rows.jsonl", tmp_path / "out")
    command = [sys.executable, "-m", "trl_kd.cli", *arguments, "--max_steps", "1", "--num_processes", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    assert changed(student_path, tmp_path / "out")


# generate


def generate_arguments(teacher: str, dataset: Path | str, output_file: Path | str, **changes: object) -> list[str]:
    settings = {
        "teacher_model_name_or_path": teacher,
        "dataset_name": dataset,
        "output_file": output_file,
        "max_completion_length": 6,
        "batch_size": 3,
        **changes,
    }
    return ["generate", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]


@pytest.fixture
def prompts_file(prompt_completion_dataset, tmp_path):
    rows = prompt_completion_dataset.select(range(7)).add_column("source", [f"row {i}" for i in range(7)])
    rows.to_json(tmp_path / "prompts.jsonl")
    return tmp_path / "prompts.jsonl"


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_generate_replaces_completions_and_keeps_other_columns(teacher_path, prompts_file, tmp_path):
    out = tmp_path / "out.jsonl"
    cli.main(generate_arguments(teacher_path, prompts_file, out))
    rows, sources = read(out), read(prompts_file)
    assert [set(row) for row in rows] == [{"prompt", "completion", "source", "truncated"}] * 7
    assert [(row["prompt"], row["source"]) for row in rows] == [(row["prompt"], row["source"]) for row in sources]
    assert all(row["completion"] != source["completion"] for row, source in zip(rows, sources, strict=True))
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_generate_greedy_completion_is_the_teachers_own(teacher_path, prompts_file, tmp_path):
    out = tmp_path / "out.jsonl"
    cli.main(generate_arguments(teacher_path, prompts_file, out, temperature=0.0))
    tokenizer = AutoTokenizer.from_pretrained(teacher_path)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_path)
    for row in read(out):
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
        written = teacher.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert row["completion"] == tokenizer.decode(written, skip_special_tokens=True)
        assert row["truncated"] == (tokenizer.eos_token_id not in written.tolist())


def test_generate_truncated_marks_completions_without_eos(teacher_path, prompts_file, tmp_path, monkeypatch):
    eos_token_id = AutoTokenizer.from_pretrained(teacher_path).eos_token_id

    def write(self, prompts, *args, **kwargs):
        return [[5, eos_token_id] if number % 2 else [5, 6] for number in range(len(prompts))]

    monkeypatch.setattr("trl_kd.teachers.LocalTeacher.generate", write)
    cli.main(generate_arguments(teacher_path, prompts_file, tmp_path / "out.jsonl", batch_size=7))
    assert [row["truncated"] for row in read(tmp_path / "out.jsonl")] == [True, False] * 3 + [True]


def test_generate_messages_become_prompt_and_completion(teacher_path, conversational_dataset, tmp_path):
    conversational_dataset.select(range(2)).to_json(tmp_path / "messages.jsonl")
    cli.main(generate_arguments(teacher_path, tmp_path / "messages.jsonl", tmp_path / "out.jsonl"))
    for row, source in zip(read(tmp_path / "out.jsonl"), conversational_dataset, strict=False):
        assert row["prompt"] == source["messages"][:-1]
        assert [message["role"] for message in row["completion"]] == ["assistant"]
        assert "messages" not in row


def test_generate_several_completions_are_rows_of_their_own(teacher_path, prompts_file, tmp_path):
    out = tmp_path / "out.parquet"
    cli.main(generate_arguments(teacher_path, prompts_file, out, num_completions=2, max_completion_length=12))
    rows = list(Dataset.from_parquet(str(out)))
    assert [row["source"] for row in rows] == [f"row {i // 2}" for i in range(14)]
    assert any(rows[i]["completion"] != rows[i + 1]["completion"] for i in range(0, 14, 2))


def test_generate_same_prompts_in_two_blocks_are_answered_differently(teacher_path, tmp_path):
    """Each block has a seed of its own, so a prompt that occurs twice is not answered twice with the same text."""
    prompts = [{"prompt": f"What is the colour of the {thing}?"} for thing in ("sky", "grass", "fish")]
    Dataset.from_list(prompts * 2).to_json(tmp_path / "prompts.jsonl")
    cli.main(generate_arguments(teacher_path, tmp_path / "prompts.jsonl", tmp_path / "out.jsonl", batch_size=3))
    completions = [row["completion"] for row in read(tmp_path / "out.jsonl")]
    assert completions[:3] != completions[3:]


def interrupted_run(monkeypatch, arguments: list[str], blocks: int) -> None:
    """Run until so many blocks are written, then stop as Ctrl+C does."""
    from trl_kd.teachers import LocalTeacher

    original, calls = LocalTeacher.generate, []

    def write(self, *args, **kwargs):
        if len(calls) == blocks:
            raise KeyboardInterrupt
        calls.append(1)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LocalTeacher, "generate", write)
        with pytest.raises(KeyboardInterrupt):
            cli.main(arguments)


@pytest.mark.parametrize("leftover", [b"", b'[{"completion": "half a blo'])
def test_generate_resumed_run_equals_the_uninterrupted_one(
    leftover, teacher_path, prompts_file, tmp_path, monkeypatch
):
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    cli.main(generate_arguments(teacher_path, prompts_file, whole))

    arguments = generate_arguments(teacher_path, prompts_file, resumed)
    interrupted_run(monkeypatch, arguments, blocks=2)
    assert not resumed.exists()
    partial = tmp_path / "resumed.jsonl.partial"
    with partial.open("ab") as file:
        file.write(leftover)
    assert len(generate.read_finished_blocks(partial, json.loads(partial.read_bytes().splitlines()[0]))) == 2
    # The half block is gone, or the next one would be written behind it on the same line
    assert [json.loads(line) is not None for line in partial.read_text().splitlines()] == [True] * 3

    blocks = []
    original = generation.completion_text
    monkeypatch.setattr(generation, "completion_text", lambda *args: blocks.append(1) or original(*args))
    cli.main(arguments)
    assert len(blocks) == 1  # one block of one prompt was left to write
    assert resumed.read_text() == whole.read_text()


def test_generate_other_settings_do_not_continue_a_partial_file(teacher_path, prompts_file, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    interrupted_run(monkeypatch, generate_arguments(teacher_path, prompts_file, out), blocks=1)
    with pytest.raises(ValueError, match=r"comes from a run with other settings \(seed\)"):
        cli.main(generate_arguments(teacher_path, prompts_file, out, seed=1))
    rows = prompts_file.read_text().splitlines(keepends=True)
    prompts_file.write_text("".join(rows[1:]))
    with pytest.raises(ValueError, match="comes from a run with other prompts"):
        cli.main(generate_arguments(teacher_path, prompts_file, out))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("output_file", "out.txt", "`output_file` is 'out.txt', but its ending decides the format."),
        ("output_file", "old.jsonl", "`output_file` is 'old.jsonl', which exists and would be lost."),
        ("batch_size", "0", "`batch_size` is 0, but nothing can be written then."),
        ("num_completions", "0", "`num_completions` is 0, but nothing can be written then."),
        ("dataset_split_", "train", "unknown option in the command line: --dataset_split_ train."),
    ],
)
def test_generate_wrong_option_is_one_clear_line(name, value, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old.jsonl").write_text("{}")
    arguments = generate_arguments("no-teacher", "no.jsonl", "out.jsonl")
    assert message in fails_with(capsys, [*arguments, f"--{name}", value])


@pytest.mark.parametrize("name", ["teacher_model_name_or_path", "dataset_name", "output_file"])
def test_generate_missing_option_is_one_clear_line(name, capsys):
    arguments = generate_arguments("teacher", "rows.jsonl", "out.jsonl")
    position = arguments.index(f"--{name}")
    message = fails_with(capsys, arguments[:position] + arguments[position + 2 :])
    assert f"`{name}` is not set, but `trl-kd generate` needs it." in message


def test_generate_text_rows_are_refused(teacher_path, tmp_path):
    Dataset.from_list([{"text": "a story"}]).to_json(tmp_path / "texts.jsonl")
    with pytest.raises(ValueError, match=r"The dataset has the columns \['text'\], but a teacher needs something"):
        cli.main(generate_arguments(teacher_path, tmp_path / "texts.jsonl", tmp_path / "out.jsonl"))


def test_completion_text_keeps_the_space_of_a_sentencepiece_tokenizer():
    class Tokenizer:
        """Joins words by spaces and drops the first, as SentencePiece does."""

        def decode(self, ids, skip_special_tokens):
            return " ".join(f"w{i}" for i in ids)

    assert generation.completion_text(Tokenizer(), [1, 2], [3]) == " w3"

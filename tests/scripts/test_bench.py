"""`trl-kd bench`: equal budgets, cells that are kept, and tables that say what the cells do."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from datasets import Dataset
from filelock import FileLock

from tests.tiny import make_model, make_tokenizer
from trl_kd.evaluation.bootstrap import difference
from trl_kd.evaluation.store import ResultStore
from trl_kd.scripts import bench_methods
from trl_kd.scripts.bench import run
from trl_kd.scripts.bench_cells import Bench, check_unchanged, counted_tokens, write_whole
from trl_kd.scripts.bench_config import DEFAULT_CONFIG, BenchConfig, load_config
from trl_kd.scripts.bench_methods import METHODS, Method
from trl_kd.scripts.bench_table import spread


TINY = {
    "methods": ["sft", "jsd"],
    "seeds": [0],
    "student_size": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
    },
    "warm_start": {"steps": 2, "per_device_train_batch_size": 4},
    "train_rows": 8,
    "test_rows": 6,
    "max_completion_length": 12,
    "steps": 2,
    "batch_size": 4,
    "training": {"learning_rate": 1e-3},
    "evaluation": {
        "seeds": [0],
        "batch_size": 6,
        "metrics": ["exact_match", "nll", "total_variation", "own_total_variation", "imitation_gap", "own_entropy"],
    },
    "device": "cpu",
    "threads": 1,
}


@pytest.fixture
def write_config(tmp_path):
    def write(**changes):
        file = tmp_path / "bench.yaml"
        file.write_text(yaml.safe_dump(TINY | changes))
        return str(file)

    return write


def bench(config, folder, *arguments):
    run(["--config", config, "--output_dir", str(folder), "--workers", "1", *arguments], prog="trl-kd bench")


def cell(folder, key):
    return json.loads((folder / "cells" / f"{key}.json").read_text())


def rows_of(folder):
    """The tables without what the clock says: names to cells."""
    lines = [line.split(" | ") for line in (folder / "results.md").read_text().splitlines() if line.startswith("| ")]
    place = next(number for number, name in enumerate(lines[0]) if name == "seconds")
    return [line[:place] + line[place + 1 :] for line in lines]


def refused(capsys, *arguments, **changes):
    with pytest.raises(SystemExit) as left:
        bench(*arguments, **changes)
    assert left.value.code == 2
    return capsys.readouterr().err


def killed_after_first_cell(config, folder):
    """Start a bench on two workers, kill the main process when a first method is done; the workers' processes."""
    command = [sys.executable, "-m", "trl_kd.scripts.bench", "--config", config, "--output_dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 300
        while not list((folder / "cells").glob("*-*.json")):
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
    return workers


def test_bench_killed_run_goes_on_to_the_same_table(write_config, tmp_path):
    config = write_config(methods=["sft", "jsd", "reverse_kl"])
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    workers = killed_after_first_cell(config, killed)
    assert len(workers) >= 2
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive

    finished = {file.name: file.stat().st_mtime_ns for file in (killed / "cells").glob("*.json")}
    assert {"teacher.json"} < set(finished) and len(finished) < 5
    assert not (killed / "results.md").exists()
    student = (killed / "student" / "model.safetensors").stat().st_mtime_ns
    (killed / "cells" / "jsd-0.1.partial").write_text('{"name": "j')  # a kill in the middle of a write
    bench(config, killed)
    bench(config, whole)
    assert {name: (killed / "cells" / name).stat().st_mtime_ns for name in finished} == finished
    assert (killed / "student" / "model.safetensors").stat().st_mtime_ns == student
    assert len(list((killed / "cells").iterdir())) == 5  # and nothing half-written
    assert rows_of(killed) == rows_of(whole)
    assert len(rows_of(whole)) == (1 + 1 + 5) + (1 + 1 + 2)


def test_bench_table_and_store_say_what_the_cells_hold(write_config, tmp_path):
    folder, store = tmp_path / "out", tmp_path / "store.sqlite"
    config = write_config(seeds=[3, 5])
    bench(config, folder, "--store", str(store))
    assert f"```bash\ntrl-kd bench --config {config} " in (folder / "results.md").read_text()
    names = {"teacher", "before", *(f"{method}-{seed}" for method in ("sft", "jsd") for seed in (3, 5))}
    assert {file.stem for file in (folder / "cells").iterdir()} == names

    def by_hand(key, metric):
        pairs = [sample["values"][metric] for sample in cell(folder, key)["samples"]]
        return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)

    nll = [by_hand(f"jsd-{seed}", "nll") for seed in (3, 5)]
    header, _, teacher, before, _, jsd, *rest = rows_of(folder)
    assert jsd[0] == "| JSD"
    column = header.index("NLL")
    assert jsd[column] == f"{np.mean(nll):.3f} ± {np.std(nll, ddof=1):.3f}"
    assert before[column] == f"{by_hand('before', 'nll'):.3f}"
    assert (teacher[header.index("TV, own text")], teacher[header.index("imitation gap")]) == ("0.000", "0.000")
    gap = [by_hand(f"jsd-{seed}", "own_teacher_nll") - by_hand("teacher", "own_teacher_nll") for seed in (3, 5)]
    assert jsd[header.index("imitation gap")] == spread(gap, 3)

    kept = ResultStore(store, create=False)
    info = kept.run("latest")
    assert (info.kind, info.seeds, [model.name for model in info.models]) == (
        "bench", [3, 5], ["teacher", "student before", "SFT", "JSD"]
    )  # fmt: skip
    arrays = {name: kept.values(info.id, name, "nll") for name in ("SFT", "JSD")}
    assert arrays["JSD"][0].shape == (2, 6)
    change = difference(arrays["JSD"], arrays["SFT"])
    less = rest[-1]
    assert less[0] == "| JSD" and f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]" in less[3]
    assert kept.details(info.id, "JSD", "training") == cell(folder, "jsd-3")["training"]["log"]


def test_bench_changed_setting_is_refused_and_nothing_lost(write_config, tmp_path, capsys):
    folder = tmp_path / "out"
    bench(write_config(methods=["sft"]), folder)
    before = (folder / "results.md").read_text()
    message = refused(capsys, write_config(methods=["sft"], steps=3), folder)
    assert "`steps` was 2 and is now 3" in message and "--output_dir" in message
    message = refused(capsys, write_config(methods=["sft"], warm_start={"steps": 3}), folder)
    assert "student" in message and "`warm_start` was" in message
    message = refused(capsys, write_config(methods=["sft"], method_options={"sft": {"learning_rate": 0.5}}), folder)
    assert "`options` was {} and is now {'learning_rate': 0.5}" in message
    assert (folder / "results.md").read_text() == before
    # What another method is given is none of its business, and neither is a second seed
    changed = write_config(methods=["sft"], seeds=[0, 1], method_options={"jsd": {"learning_rate": 0.5}})
    stamp = (folder / "cells" / "sft-0.json").stat().st_mtime_ns
    bench(changed, folder)
    assert (folder / "cells" / "sft-0.json").stat().st_mtime_ns == stamp
    assert (folder / "cells" / "sft-1.json").exists()


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"methods": ["sft", "klf"]}, (), "'klf', but no such method exists. Choose among sft, forward_kl"),
        ({}, ("--methods", "magic"), "'magic', but no such method exists"),
        ({"method_options": {"magic": {}}}, (), "`method_options` names 'magic'"),
        ({"baseline": "magic"}, (), "`baseline` names 'magic'"),
        ({"steps": 0}, (), "`steps` is 0"),
        ({"seeds": [1, 1]}, (), "`seeds` is [1, 1]"),
        ({"train_rows": None}, (), "of which there is no end"),
        ({"warm_start": {}}, (), "`warm_start` is {}"),
        ({"leraning_rate": 1.0}, (), "the fields ['leraning_rate'], which do not exist"),
        ({}, ("--workers", "0"), "`--workers` is 0"),
        ({}, ("--config", "nowhere.yaml"), "nowhere.yaml cannot be read"),
        ({}, ("--store", "/nowhere/results.sqlite"), "/nowhere"),
        ({"training": {"lerning_rate": 1.0}}, (), "['lerning_rate'] are no fields of SFTConfig"),
        ({"method_options": {"jsd": {"beta": 0.5}}}, (), "['beta'] are no fields of KDConfig"),
        ({"evaluation": {"seeds": [0, 1]}}, (), "`seeds` of the evaluation is [0, 1]"),
    ],
)
def test_bench_bad_input_is_one_clear_error(changes, arguments, message, write_config, tmp_path, capsys):
    assert message in refused(capsys, write_config(**changes), tmp_path / "out", *arguments)
    assert not (tmp_path / "out" / "cells").exists()


def test_bench_refuses_ranks_and_a_second_process(write_config, tmp_path, capsys, monkeypatch):
    with FileLock(tmp_path / "bench.lock"):
        assert "Another process makes cells in" in refused(capsys, write_config(), tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "started on 2 ranks" in refused(capsys, write_config(), tmp_path)


def test_bench_method_that_cannot_be_imported_is_listed_with_the_reason(write_config, tmp_path, monkeypatch):
    def missing():
        raise ImportError("No module named 'trl.experimental.gkd'")

    monkeypatch.setitem(METHODS, "gkd", replace(METHODS["gkd"], classes=missing))
    bench(write_config(methods=["sft", "gkd"]), tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "- TRL GKD: it cannot be imported (No module named 'trl.experimental.gkd')." in text
    assert "| TRL GKD |" not in text
    assert not (tmp_path / "cells" / "gkd-0.json").exists()


def make_bench(folder, **changes):
    """The cells' view of a tiny bench whose student is there."""
    made = Bench(BenchConfig(**(TINY | changes)), folder)
    made.make_student()
    return made


def test_counted_tokens_every_method_reads_each_row_once(tmp_path):
    # Two steps of four rows: all eight, in any order
    made = make_bench(tmp_path, lmbda=0.0, method_options={"trl_distillation": {"beta": 0.0}})
    whole = sum(map(len, made.train_rows["rows"]["input_ids"]))
    for method in ("sft", "forward_kl", "total_variation", "gkd", "gold", "amm", "dskd", "sparse_td"):
        assert made.train(method, 0)[1]["student_tokens"] == whole, method


def test_counted_tokens_rollouts_count_once_they_are_trained_on(tmp_path):
    made = make_bench(tmp_path, lmbda=1.0, train_rows=8)
    _, training = made.train("jsd", 0)
    rows = made.train_rows["marked"]
    prompts = sum(len(mask) - sum(mask) for mask in rows["completion_mask"])
    # Each step is logged; what the student has written to be trained on
    rollouts = sum(entry["kd/on_policy/tokens"] for entry in training["log"] if "kd/on_policy/tokens" in entry)
    assert rollouts > 0
    assert training["student_tokens"] == prompts + rollouts
    assert training["steps"] == 2
    # GKD's rollouts are its own, of the same cap
    _, gkd = made.train("gkd", 0)
    assert prompts < gkd["student_tokens"] <= prompts + 8 * 12
    _, distillation = made.train("trl_distillation", 0)
    assert prompts < distillation["student_tokens"] <= prompts + 8 * 12


def test_counted_tokens_padding_and_generation_are_left_out(student_path):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(student_path)
    ids, mask = torch.ones(2, 5, dtype=torch.long), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with counted_tokens(model) as counts:
        model.train()
        model(input_ids=ids, attention_mask=mask)
        assert counts == {"tokens": 8, "forwards": 1}
        model(ids)  # no mask: all of them
        assert counts == {"tokens": 18, "forwards": 2}
        with torch.no_grad():
            model(ids)
        model.eval()
        model(ids)
    model.train()
    model(ids)
    assert counts == {"tokens": 18, "forwards": 2}


def test_methods_train_what_they_are_called(tmp_path):
    # One step of a divergence by hand against the trainer of that name
    import torch
    from transformers import AutoModelForCausalLM

    from trl_kd import losses

    made = make_bench(tmp_path, lmbda=0.0, steps=1, train_rows=4, batch_size=4)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path) for path in (made.student_path, made.config.teacher_path)
    )
    for method, name in {"forward_kl": "forward_kl", "reverse_kl": "reverse_kl", "jsd": "generalized_jsd"}.items():
        values = []
        for row in made.train_rows["rows"]:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
            with torch.no_grad():
                logits = [model(ids).logits[0, :-1][labels[1:] != -100] for model in (student, teacher)]
            values.append(getattr(losses, name)(*logits))
        assert made.train(method, 0)[1]["loss"] == pytest.approx(torch.cat(values).mean().item(), rel=1e-3), method


def test_methods_same_seed_same_student_other_seed_another(tmp_path):
    made = make_bench(tmp_path)
    first, again, other = (made.train("jsd", seed)[0].state_dict() for seed in (0, 0, 1))
    assert all(first[name].equal(again[name]) for name in first)
    assert any(not first[name].equal(other[name]) for name in first)


def test_bench_on_files_with_a_template_and_two_tokenizers(write_config, tmp_path, student_path):
    tokenizer = make_tokenizer("Where does the red bird sleep? On a tree near the water. " * 3, vocab_size=330)
    teacher = make_model("llama", len(tokenizer), seed=3, eos_token_id=tokenizer.eos_token_id)
    for part in (teacher, tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 8), ("test", 4)):
        rows = [
            {"instruction": f"Count to {number}.", "input": "", "output": f"One, two, {number}."}
            for number in range(count)
        ]
        Dataset.from_list(rows).to_json(data / f"{split}.jsonl")
    config = write_config(
        teacher=str(tmp_path / "teacher"), student=student_path, data=str(data), template="instruction",
        methods=["sft", "jsd", "gkd", "gold", "dskd"], train_rows=None, test_rows=None, max_prompt_length=200,
        warm_start={"steps": 0}, steps=1, evaluation={"seeds": [0], "batch_size": 4, "metrics": ["rouge_l", "nll"]},
    )  # fmt: skip
    folder = tmp_path / "out"
    bench(config, folder)
    assert {file.stem for file in (folder / "cells").iterdir()} == {"teacher", "before", "sft-0", "gold-0", "dskd-0"}
    text = (folder / "results.md").read_text()
    assert "- JSD: it compares distributions over one vocabulary" in text and "- TRL GKD: it compares" in text
    header = rows_of(folder)[0]
    assert header[1:3] == ["Rouge-L", "NLL"]
    assert not (folder / "student").exists()
    assert "### Instruction:\nCount to 3." in cell(folder, "sft-0")["samples"][3]["prompt"]
    assert cell(folder, "sft-0")["samples"][3]["references"] == ["One, two, 3."]


def test_write_whole_failure_leaves_what_was_there(tmp_path):
    file = tmp_path / "cells" / "sft-0.json"
    write_whole(file, {"loss": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_whole(file, {"loss": float("nan")})
    assert json.loads(file.read_text()) == {"loss": 1.0}
    assert os.listdir(file.parent) == ["sft-0.json"]


def test_check_unchanged_names_each_change_and_no_more():
    check_unchanged(Path("x"), {"a": 1}, {"a": 1})
    with pytest.raises(ValueError, match=r"x was made with other settings: `b` was None and is now 2, `c` was 3"):
        check_unchanged(Path("x"), {"a": 1, "c": 3}, {"a": 1, "b": 2})


def test_default_config_has_all_methods_and_three_seeds():
    config = load_config(DEFAULT_CONFIG)
    assert set(config.methods) == set(METHODS)
    assert len(config.seeds) == 3
    assert (config.teacher, config.student, config.data, config.device) == ("demo", "demo", "stories", "cpu")
    assert all(isinstance(method, Method) for method in bench_methods.METHODS.values())

"""
Cost to serve: sizes against the files, memory against a second reader, times against a clock that the test holds.

That times agree with a plain loop is shown by `examples/benchmarks/serving_cost.py`: here they would depend on what
else the machine does.
"""

import json
import os
import struct
import subprocess
import sys
import threading
import time
import traceback
from types import SimpleNamespace

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from tests.tiny import make_model
from trl_kd.evaluation import cost_worker
from trl_kd.evaluation.cost import QUICK, measure_cost, price_per_million_tokens, ratios


SMALL = {"batch_sizes": (1, 2), "prompt_length": 5, "new_tokens": 4, "repeats": 2}


@pytest.fixture(scope="module")
def adapter_path(student_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(student_path)
    config = LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder)
    return str(folder)


def numbers_in(file):
    with safe_open(file, framework="pt") as tensors:
        return sum(tensors.get_tensor(name).numel() for name in tensors.keys())


class Watch(threading.Thread):
    """Reads the memory of the worker, from outside, until it is stopped."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.stopped = 0, threading.Event()

    def run(self):
        while not self.stopped.wait(0.05):
            for child in psutil.Process().children():
                try:
                    # For a moment a new process still is its parent, with its parent's memory
                    if any("cost_worker" in part for part in child.cmdline()):
                        self.peak = max(self.peak, child.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue


TRAP = "raise RuntimeError('this should not be imported')"


@pytest.fixture(scope="module")
def measured(student_path, tmp_path_factory):
    """
    One real measurement, started by a process that holds much memory, in a folder that hides libraries which the
    worker needs, and with a path on which those that serving does not need cannot be imported.
    """
    here, path = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("path")
    for folder, names in ((here, ("torch", "evaluate", "json")), (path, ("trl", "datasets", "pyarrow", "peft"))):
        for name in names:
            (folder / f"{name}.py").write_text(TRAP)
    # Python runs this one when it starts, if it finds it
    (path / "sitecustomize.py").write_text(f"open({str(path / 'found')!r}, 'w').close()")
    ballast, watch = torch.ones(150_000_000), Watch()  # 600 MB
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setattr(sys, "path", [str(path), *sys.path])
        watch.start()
        start = time.perf_counter()
        try:
            cost = measure_cost(student_path, threads=2, price_per_hour=2.0, batch_sizes=(8, 1), **QUICK)
        finally:
            watch.stopped.set()
            watch.join()
        seconds = time.perf_counter() - start
    found = (path / "found").exists()
    return SimpleNamespace(cost=cost, seconds=seconds, watched=watch.peak, ballast=ballast.nbytes, found_path=found)


@pytest.fixture
def in_this_process(monkeypatch):
    """The worker called rather than started: the same files, without seconds of imports."""

    def call(command, **kwargs):
        try:
            cost_worker.main(*command[-2:])
        except Exception:
            kwargs["stderr"].write(traceback.format_exc())
            return subprocess.CompletedProcess(command, 1)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", call)
    yield
    logging.enable_progress_bar()


def save(model, folder):
    model.save_pretrained(folder)
    return str(folder)


# What a measurement holds


def test_cost_parameters_and_bytes_are_those_of_the_file(measured, student_path):
    file = f"{student_path}/model.safetensors"
    assert measured.cost["parameters"] == numbers_in(file)
    assert measured.cost["bytes_on_disk"] == os.stat(file).st_size
    assert measured.cost["adapter_parameters"] is measured.cost["adapter_bytes_on_disk"] is None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak starts from that of the caller")
def test_cost_peak_memory_is_what_another_process_sees_and_not_the_callers(measured):
    cost = measured.cost
    # The watcher may miss a moment, as when a file's buffers come and go, and sees the end of the process too
    assert measured.watched == pytest.approx(cost["peak_memory_bytes"], rel=0.05)
    assert cost["peak_memory_bytes"] < measured.ballast
    assert cost["memory_before_load_bytes"] < cost["memory_after_load_bytes"] <= cost["peak_memory_bytes"]
    assert cost["host_peak_memory_bytes"] == cost["peak_memory_bytes"]
    assert cost["reserved_memory_bytes"] is None


def test_cost_process_finds_the_packages_that_its_caller_finds(measured):
    assert measured.found_path


def test_cost_states_what_it_holds_for(measured):
    cost = measured.cost
    assert json.loads(json.dumps(cost)) == cost
    stated = ("device", "dtype", "threads", "prompt_length", "new_tokens", "repeats")
    assert [cost[name] for name in stated] == ["cpu", "float32", 2, *QUICK.values()]
    assert cost["device_name"].strip()
    assert list(cost["batches"]) == ["1", "8"]


def test_cost_times_fit_into_the_time_that_the_measurement_took(measured):
    cost, half = measured.cost, QUICK["repeats"] // 2 + 1  # as many repeats take at least the median
    medians = [cost["first_token_seconds"]["p50"], *(batch["p50_seconds"] for batch in cost["batches"].values())]
    assert 0 < cost["load_seconds"] + half * sum(medians) < measured.seconds
    # 32 tokens take more than one; and no machine makes 20,000 steps of Transformers' loop in a second
    assert medians[0] < min(medians[1:])
    assert min(medians[1:]) > 32 / 20_000


def test_cost_price_is_stated_with_the_figures(measured):
    cost = measured.cost
    assert cost["price_per_hour"] == 2.0
    for size, price in cost["price_per_million_tokens"].items():
        seconds_of_a_million = 1e6 / cost["batches"][size]["tokens_per_second"]
        assert price == pytest.approx(2.0 * seconds_of_a_million / 3600)


def test_cost_adapter_counts_with_its_base(in_this_process, adapter_path, student_path):
    cost = measure_cost(adapter_path, **SMALL)
    base, added = f"{student_path}/model.safetensors", f"{adapter_path}/adapter_model.safetensors"
    assert cost["adapter_parameters"] == numbers_in(added) == 2 * 3 * (32 + 32)  # two layers of 32 x 32, rank 3
    assert cost["parameters"] == numbers_in(base) + numbers_in(added)
    assert cost["adapter_bytes_on_disk"] == os.stat(added).st_size
    assert cost["bytes_on_disk"] == os.stat(base).st_size + os.stat(added).st_size


def test_cost_adapter_is_measured_on_the_base_that_is_given(in_this_process, adapter_path, tokenizer, tmp_path):
    base = save(make_model("llama", len(tokenizer) + 7, seed=5), tmp_path)
    with_own, with_given = measure_cost(adapter_path, **SMALL), measure_cost(adapter_path, base=base, **SMALL)
    assert with_given["parameters"] - with_own["parameters"] == 2 * 7 * 32  # embeddings and head
    assert with_given["adapter_parameters"] == with_own["adapter_parameters"]


def test_cost_adapter_changes_what_is_generated(adapter_path, student_path):
    model, _, own_parameters = cost_worker._load(cost_worker._Parts.of(adapter_path, None, {}), torch.device("cpu"))
    plain = AutoModelForCausalLM.from_pretrained(student_path)
    assert own_parameters == plain.num_parameters()
    ids = torch.arange(5)[None]
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-3)


def test_cost_dtype_is_the_one_that_is_asked_for(in_this_process, student_path):
    assert measure_cost(student_path, dtype="bfloat16", **SMALL)["dtype"] == "bfloat16"
    assert measure_cost(student_path, model_init_kwargs={"dtype": "float16"}, **SMALL)["dtype"] == "float16"


def test_cost_tied_weights_count_once(in_this_process, tmp_path):
    path = save(make_model("qwen2", 300, tied=True), tmp_path)
    assert measure_cost(path, **SMALL)["parameters"] == numbers_in(f"{path}/model.safetensors")


# Arithmetic


def figures(scale=1.0, **changes):
    cost = {"parameters": 40, "bytes_on_disk": 160, "load_seconds": 4.0, "peak_memory_bytes": 1000}
    cost = {name: value * scale for name, value in cost.items()}
    cost |= {"first_token_seconds": {"p50": 0.5 * scale, "p95": 9.0}}
    cost["batches"] = {
        size: {"tokens_per_second": speed / scale, "p50_seconds": scale, "p95_seconds": 9.0}
        for size, speed in (("1", 100.0), ("8", 500.0))
    }
    conditions = {"device": "cpu", "device_name": "A", "threads": 2, "prompt_length": 64, "new_tokens": 64}
    return cost | conditions | changes


def test_price_hand_values():
    # 500 tokens a second are 1.8 million an hour; 100 are 0.36 million
    assert price_per_million_tokens(figures(), 0.9) == pytest.approx(0.5)
    assert price_per_million_tokens(figures(), 0.9, batch_size=1) == pytest.approx(2.5)
    assert price_per_million_tokens(figures(), 0) == 0


@pytest.mark.parametrize("price", [-1, float("nan"), float("inf")])
def test_price_that_is_none_raises(price):
    with pytest.raises(ValueError, match="`price_per_hour` is .*, which is no price. Give"):
        price_per_million_tokens(figures(), price)


def test_price_batch_size_that_was_not_measured_raises():
    with pytest.raises(ValueError, match="`batch_size` is 4, but speed was measured at 1, 8 only"):
        price_per_million_tokens(figures(), 1.0, batch_size=4)


def test_ratios_hand_values():
    found = ratios(figures(0.25), figures())
    assert found == {
        **{"parameters": 0.25, "bytes_on_disk": 0.25, "load_seconds": 0.25, "peak_memory_bytes": 0.25},
        "first_token_seconds": 0.25,
        "batches": {size: {"tokens_per_second": 4.0, "p50_seconds": 0.25} for size in ("1", "8")},
    }
    assert ratios(figures(dtype="bfloat16"), figures(dtype="float32"))["parameters"] == 1


def test_ratios_missing_figures_are_none_and_other_batch_sizes_left_out():
    student, teacher = figures(bytes_on_disk=None), figures(load_seconds=0.0)
    del teacher["batches"]["8"]
    found = ratios(student, teacher)
    assert found["bytes_on_disk"] is found["load_seconds"] is None
    assert list(found["batches"]) == ["1"]


@pytest.mark.parametrize("name", ["device", "device_name", "threads", "prompt_length", "new_tokens"])
def test_ratios_other_conditions_raise(name):
    with pytest.raises(ValueError, match=f"`{name}` is 7 for the model and .* Measure both in the same way"):
        ratios(figures(**{name: 7}), figures())


# Errors


@pytest.mark.parametrize("path", ["no/such/folder", "nobody/nothing", "{empty}"])
def test_cost_path_without_a_model_raises(path, in_this_process, tmp_path):
    path = path.format(empty=tmp_path)
    with pytest.raises(ValueError, match=r"(?s)The model `.*` could not be loaded: .*Give a folder with"):
        measure_cost(path, **SMALL)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_cost_too_few_positions_raises(kind, in_this_process, tmp_path):
    path = save(make_model(kind, 40), tmp_path)
    settings = SMALL | {"prompt_length": 500}
    assert measure_cost(path, **settings | {"new_tokens": 12})["new_tokens"] == 12
    with pytest.raises(ValueError, match="make 513 tokens, but `.*` has 512 positions"):
        measure_cost(path, **settings | {"new_tokens": 13})


def test_cost_broken_weights_raise_with_the_last_words_of_the_process(student_path, tmp_path):
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes(open(f"{student_path}/{name}", "rb").read())
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(RuntimeError, match=r"(?s)ended with status 1, so there are no figures\..*SafetensorError"):
        measure_cost(tmp_path, **SMALL)


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("kill -9 $$", r"was killed by signal 9, .* memory ran out: .*\nline 4\n.*line 15$"),
        ("exit 3", r"ended with status 3, so there are no figures\. Mend .*\nline 4\n.*line 15$"),
        ("exit 0", "ended with status 0, so there are no figures"),  # and left no answer
    ],
)
def test_cost_process_that_dies_raises_with_its_last_lines(ending, message, student_path, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nfor i in $(seq 15); do echo line $i >&2; done\n{ending}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        measure_cost(student_path, **SMALL)


def test_cost_adapter_without_a_base_raises(in_this_process, adapter_path, student_path, tmp_path):
    saved = json.loads(open(f"{adapter_path}/adapter_config.json").read()) | {"base_model_name_or_path": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="does not say which model it belongs to.*Give that model as `base`"):
        measure_cost(tmp_path, **SMALL)
    with pytest.raises(ValueError, match="is no adapter: it has no `adapter_config.json`. Leave `base` out"):
        measure_cost(student_path, base=student_path, **SMALL)


def test_cost_arguments_that_json_cannot_hold_raise(student_path):
    with pytest.raises(ValueError, match="cannot be sent to another process as JSON: .* Write types as strings"):
        measure_cost(student_path, model_init_kwargs={"dtype": torch.bfloat16})


OUT_OF_RANGE = [("batch_sizes", ()), ("batch_sizes", (1, 0)), ("prompt_length", 0), ("new_tokens", 0), ("repeats", 0)]


@pytest.mark.parametrize(("name", "value"), [*OUT_OF_RANGE, ("threads", 0)])
def test_cost_settings_out_of_range_raise(name, value, student_path):
    with pytest.raises(ValueError, match=f"`{name}` is .* Give 1 or more"):
        measure_cost(student_path, **{name: value})

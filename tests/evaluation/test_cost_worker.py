"""The process that measures: what it times, by a clock that the test holds, and which files it counts."""

import json

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.tiny import make_model
from trl_kd.evaluation import cost_worker
from trl_kd.evaluation.cost import size_on_disk


# What is timed


class Clocked:
    """A model that takes the seconds it is told to, on a clock of its own."""

    def __init__(self, seconds, written=None):
        self.seconds, self.written = list(seconds), written
        self.now, self.calls = 0.0, []
        self.generation_config = GenerationConfig(eos_token_id=[1, 2])
        self.embeddings = torch.nn.Embedding(50, 2)

    def get_input_embeddings(self):
        return self.embeddings

    def generate(self, input_ids, attention_mask, generation_config):
        assert attention_mask.shape == input_ids.shape and attention_mask.all()
        self.now += self.seconds.pop(0)
        self.calls.append((tuple(input_ids.shape), generation_config))
        written = self.written or generation_config.max_new_tokens
        return torch.cat([input_ids, input_ids.new_zeros(len(input_ids), written)], 1)


def test_time_generations_known_times_give_hand_values():
    # Rounds of: first token, batch 1, batch 8. The first round warms up
    model = Clocked([90, 90, 90, 1, 10, 16, 3, 30, 20, 2, 20, 100])
    request = {"batch_sizes": [1, 8], "prompt_length": 6, "new_tokens": 5, "repeats": 3}
    found = cost_worker._time_generations(model, request, lambda: None, clock=lambda: model.now)
    assert found["first_token_seconds"] == pytest.approx({"p50": 2.0, "p95": 2.9})
    assert found["batches"]["1"] == pytest.approx({"tokens_per_second": 5 / 20, "p50_seconds": 20, "p95_seconds": 29})
    assert found["batches"]["8"] == pytest.approx({"tokens_per_second": 40 / 20, "p50_seconds": 20, "p95_seconds": 92})
    assert [shape for shape, _ in model.calls] == [(1, 6), (1, 6), (8, 6)] * 4
    lengths = [(config.min_new_tokens, config.max_new_tokens) for _, config in model.calls]
    assert lengths == [(1, 1), (5, 5), (5, 5)] * 4
    assert all(config.eos_token_id == [1, 2] and not config.do_sample for _, config in model.calls)


def test_time_generations_waits_for_the_device_before_each_reading_of_the_clock():
    model, order = Clocked([1] * 6), []
    plain = model.generate

    def generate(**inputs):
        order.append("generate")
        return plain(**inputs)

    def clock():
        order.append("clock")
        return 0.0 if order.count("clock") % 2 else 1.0

    model.generate = generate
    request = {"batch_sizes": [1, 2], "prompt_length": 3, "new_tokens": 2, "repeats": 1}
    cost_worker._time_generations(model, request, lambda: order.append("wait"), clock)
    assert order == ["wait", "clock", "generate", "wait", "clock"] * 6


@pytest.fixture
def headstrong_path(tmp_path):
    """A model that likes its EOS best, and whose own generation config searches, bans tokens and stops early."""
    model = make_model("llama", 40, seed=4, eos_token_id=7)
    with torch.no_grad():
        model.lm_head.weight[7] = 5 * model.model.norm.weight  # its logit rises with what the norm lets through
    model.generation_config = GenerationConfig(
        eos_token_id=7, max_length=8, repetition_penalty=9.0, suppress_tokens=list(range(8, 40)), num_beams=2
    )
    model.save_pretrained(tmp_path)
    return str(tmp_path)


def test_generation_is_greedy_without_eos_and_of_the_asked_length(headstrong_path):
    model, _, _ = cost_worker._load(cost_worker._Parts.of(headstrong_path, None, {}), torch.device("cpu"))
    prompts = torch.randint(40, (3, 5), generator=torch.Generator().manual_seed(1))
    written = cost_worker._generate(model, prompts, cost_worker._generation_config(model, 12))

    plain, ids, chose_eos = AutoModelForCausalLM.from_pretrained(headstrong_path), prompts, 0
    for _ in range(12):
        with torch.no_grad():
            logits = plain(ids).logits[:, -1]
        chose_eos += (logits.argmax(-1) == 7).sum()
        logits[:, 7] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert chose_eos > 0  # there was something to suppress
    assert written.tolist() == ids[:, 5:].tolist()


def test_time_generations_model_that_stops_early_is_refused():
    request = {"batch_sizes": [1], "prompt_length": 3, "new_tokens": 4, "repeats": 1}
    with pytest.raises(ValueError, match="wrote 3 tokens where 1 were asked for"):
        cost_worker._time_generations(Clocked([1] * 9, written=3), request, lambda: None)


def test_measure_on_cuda_reads_the_memory_of_the_device(student_path, monkeypatch):
    """The wiring alone: there is no GPU here."""
    seen = {}

    def load(parts, device):
        seen["load"] = device
        return make_model("llama", 40), 1.5, 0

    monkeypatch.setattr(cost_worker, "_load", load)
    monkeypatch.setattr(cost_worker, "_time_generations", lambda *_: {})
    for name, value in (("memory_allocated", 11), ("max_memory_allocated", 22), ("max_memory_reserved", 33)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    request = {"path": student_path, "base": None, "device": "cuda:0", "threads": None, "model_init_kwargs": {}}
    found = cost_worker._measure(request | {"prompt_length": 4, "new_tokens": 4, "repeats": 1})
    assert seen["load"] == torch.device("cuda:0")
    names = ("memory_after_load_bytes", "peak_memory_bytes", "reserved_memory_bytes", "device", "device_name")
    assert [found[name] for name in names] == [11, 22, 33, "cuda:0", "A card"]
    assert found["host_peak_memory_bytes"] > 10_000_000


def test_host_peak_stays_when_memory_is_given_back():
    process, before = psutil.Process(), cost_worker._host_peak()
    ballast = torch.ones((before - process.memory_info().rss + 200_000_000) // 4)
    held, peak = process.memory_info().rss, cost_worker._host_peak()
    assert held > before + 100_000_000
    assert peak == pytest.approx(held, rel=0.005)  # the kernel counts in lots of pages
    del ballast
    assert process.memory_info().rss < peak - 100_000_000
    assert cost_worker._host_peak() == pytest.approx(peak, rel=0.005)


# Bytes on disk


def test_size_on_disk_parts_of_a_model_are_added_and_other_files_left_out(tmp_path):
    model = make_model("llama", 300, hidden_size=64)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    parts = list(tmp_path.glob("model-*.safetensors"))
    assert len(parts) > 1
    for name in ("optimizer.bin", "pytorch_model.bin", "other.safetensors", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(bytes(1000))
    assert size_on_disk(tmp_path) == sum(part.stat().st_size for part in parts)
    # Each number once, and the headers of the files
    assert 0 < size_on_disk(tmp_path) - 4 * model.num_parameters() < 1000 * len(parts)


@pytest.mark.parametrize(
    ("names", "adapter", "expected"),
    [
        ({"model.safetensors": 10, "pytorch_model.bin": 500}, False, 10),
        ({"pytorch_model.bin": 500, "training_args.bin": 7}, False, 500),
        ({"model.safetensors": 10, "adapter_model.bin": 3}, True, 3),
        ({"training_args.bin": 7}, False, None),
    ],
)
def test_size_on_disk_counts_the_files_that_are_loaded(names, adapter, expected, tmp_path):
    for name, size in names.items():
        (tmp_path / name).write_bytes(bytes(size))
    assert size_on_disk(tmp_path, adapter=adapter) == expected


def test_size_on_disk_variant_is_another_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(10))
    (tmp_path / "model.fp16.safetensors").write_bytes(bytes(6))
    index = {"weight_map": {"a": "model-00001-of-00001.bf16.safetensors"}}
    (tmp_path / "model.safetensors.index.bf16.json").write_text(json.dumps(index))
    (tmp_path / "model-00001-of-00001.bf16.safetensors").write_bytes(bytes(4))
    assert [size_on_disk(tmp_path, variant=variant) for variant in (None, "fp16", "bf16")] == [10, 6, 4]


def test_size_on_disk_hub_name_is_read_from_the_local_cache(tmp_path):
    repository = tmp_path / "models--someone--something"
    snapshot, blobs = repository / "snapshots" / ("a" * 40), repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (blobs / "b").write_bytes(bytes(123))
    (snapshot / "model.safetensors").symlink_to(blobs / "b")
    assert size_on_disk("someone/something", cache_dir=str(tmp_path)) == 123
    assert size_on_disk("someone/else", cache_dir=str(tmp_path)) is None

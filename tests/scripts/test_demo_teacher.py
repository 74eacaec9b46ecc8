"""The committed teacher: small, real, and what the script makes."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl_kd
from trl_kd.evaluation.per_token import likelihood_rows
from trl_kd.generation import Sampling, generate_completions
from trl_kd.scripts.bench_config import DEMO_TEACHER
from trl_kd.scripts.stories import make_story, sum_is_right, train_tokenizer


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def teacher():
    return AutoModelForCausalLM.from_pretrained(DEMO_TEACHER), AutoTokenizer.from_pretrained(DEMO_TEACHER)


def fresh_stories(count):
    rng = random.Random(2026)
    return [make_story(rng) for _ in range(count)]


def written(teacher, stories, temperature):
    model, tokenizer = teacher
    prompts = [tokenizer(story["prompt"])["input_ids"] for story in stories]
    sampling = Sampling(max_completion_length=48, temperature=temperature)
    ids = generate_completions(model, prompts, sampling, tokenizer.pad_token_id, [tokenizer.eos_token_id], seed=1)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def test_demo_teacher_is_small_and_shipped():
    assert DEMO_TEACHER.is_relative_to(Path(trl_kd.__file__).parent)
    files = {file.name: file.stat().st_size for file in DEMO_TEACHER.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)
    assert sum(files.values()) <= 2_000_000


def test_demo_teacher_loads_in_float32_with_finite_weights(teacher):
    model, tokenizer = teacher
    assert model.dtype == torch.float32
    assert model.num_parameters() <= 900_000
    assert len(tokenizer) == model.config.vocab_size
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    # Whoever loads it without a word on dtype gets no half precision on a CPU
    assert json.loads((DEMO_TEACHER / "config.json").read_text())["dtype"] == "float32"


def test_demo_teacher_likelihood_of_fresh_stories_is_near_their_entropy(teacher):
    model, tokenizer = teacher
    stories = fresh_stories(200)
    prompts = [tokenizer(story["prompt"])["input_ids"] for story in stories]
    completions = [tokenizer(story["completion"])["input_ids"] + [tokenizer.eos_token_id] for story in stories]
    values = torch.cat(list(likelihood_rows(model, prompts, completions, batch_size=100)))
    # The free sentences of the grammar have 0.14 nats per token; a teacher that knows no sums is above 0.3
    assert 0.10 < values.mean() < 0.18


def test_demo_teacher_gets_its_sums_right(teacher):
    stories = fresh_stories(200)
    for temperature, least in ((0.0, 0.95), (1.0, 0.9)):
        texts = written(teacher, stories, temperature)
        right = [sum_is_right(story["prompt"], text) for story, text in zip(stories, texts, strict=True)]
        assert sum(right) / len(right) >= least, temperature


def test_demo_teacher_tokenizer_is_the_one_that_the_script_makes(tmp_path):
    train_tokenizer().save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (DEMO_TEACHER / "tokenizer.json").read_bytes()


def test_demo_teacher_script_writes_the_same_layout(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "demo_teacher.py"), "--output_dir", str(tmp_path)]
    command += ["--steps", "2", "--batch_size", "4", "--judge_stories", "5"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    # Two steps teach nothing: nearly uniform over a vocabulary of some 600
    assert 5.5 < figures["nll"] < 7.0
    assert figures["sums_right_greedy"] == 0.0
    assert figures["bytes"] <= 2_000_000
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in DEMO_TEACHER.iterdir()} - {"README.md"}
    for name in ("config.json", "generation_config.json"):
        made, committed = (json.loads((folder / name).read_text()) for folder in (tmp_path, DEMO_TEACHER))
        # Other releases write other versions, and fields of their own
        shared = (made.keys() & committed.keys()) - {"transformers_version"}
        assert len(shared) >= 3
        assert {key: made[key] for key in shared} == {key: committed[key] for key in shared}, name

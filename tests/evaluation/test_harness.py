"""Tasks of lm-evaluation-harness, made here, on tiny models: nothing is downloaded."""

import copy
import importlib.util
import json
import math
import random
import sys

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.tiny import make_model
from trl_kd.evaluation.harness import run_harness


needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-evaluation-harness: pip install trl_kd[harness]"
)

# Three tokens each, of different lengths in characters
CHOICES = ["blue", "soft", "hungry", "kitchen"]
NOUNS = ["fox", "bird", "river", "sky", "grass", "apple", "forest", "fish", "water", "table", "kitchen", "morning"]


def write_task(folder, name, rows, **settings):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "metadata": {"version": 1.5},
        **settings,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


@pytest.fixture
def rows():
    return [
        {"question": f"{first} is the colour of the {noun}", "choices": CHOICES, "answer": (7 * index) % 4}
        for index, (noun, first) in enumerate((noun, first) for noun in NOUNS for first in ("What", "There"))
    ]


@pytest.fixture
def folder(tmp_path, rows, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    settings = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
    }
    metrics = [{"metric": name} for name in ("acc", "acc_norm", "brier_score")]
    write_task(tmp_path / "tasks", "kd_colours", rows, **settings, metric_list=metrics)
    return tmp_path / "tasks"


@pytest.fixture
def model(tokenizer):
    model = make_model("llama", len(tokenizer), seed=5, eos_token_id=tokenizer.eos_token_id)
    with torch.no_grad():
        # Nearer to uniform, so that no choice wins everywhere
        model.lm_head.weight.mul_(0.3)
    return model


@torch.no_grad()
def log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    """Sum over the tokens of the continuation, one forward pass without a batch."""
    prompt, text = tokenizer(context)["input_ids"], tokenizer(context + continuation)["input_ids"]
    assert text[: len(prompt)] == prompt
    total = 0.0
    for position in range(len(prompt), len(text)):
        logits = model(torch.tensor([text[:position]])).logits[0, -1].double()
        total += (logits[text[position]] - logits.logsumexp(-1)).item()
    return total


def expected_metrics(model, tokenizer, rows, shots=""):
    """Accuracy by likelihood and by likelihood per character, with their standard errors, and the Brier score."""
    plain, normalised, brier = [], [], []
    for row in rows:
        scores = [log_likelihood(model, tokenizer, shots + row["question"], f" {text}") for text in row["choices"]]
        per_character = [score / len(text) for score, text in zip(scores, row["choices"], strict=True)]
        plain.append(float(scores.index(max(scores)) == row["answer"]))
        normalised.append(float(per_character.index(max(per_character)) == row["answer"]))
        total = sum(math.exp(score - max(scores)) for score in scores)
        shares = [math.exp(score - max(scores)) / total for score in scores]
        brier.append(sum((share - (index == row["answer"])) ** 2 for index, share in enumerate(shares)))
    error = len(rows) ** -0.5
    return {
        "acc": (np.mean(plain), np.std(plain, ddof=1) * error, True),
        "acc_norm": (np.mean(normalised), np.std(normalised, ddof=1) * error, True),
        # The harness has no standard error for it
        "brier_score": (np.mean(brier), None, False),
    }


def check(metrics, expected):
    assert set(metrics) == set(expected)
    for name, (value, error, higher_is_better) in expected.items():
        # Batches of float32 logits against single rows
        assert metrics[name]["value"] == pytest.approx(value, abs=1e-5)
        assert metrics[name]["standard_error"] == (None if error is None else pytest.approx(error, abs=1e-9))
        assert metrics[name]["higher_is_better"] is higher_is_better


def harness(model, tokenizer, folder, tasks=("kd_colours",), **kwargs):
    # The index of the harness's own tasks takes many seconds
    return run_harness(model, tokenizer, list(tasks), include_path=folder, include_defaults=False, **kwargs)


@needs_harness
@pytest.mark.parametrize("batch_size", [1, 8])
def test_run_harness_multiple_choice_equals_plain_loop(folder, model, tokenizer, rows, batch_size):
    result = harness(model, tokenizer, folder, batch_size=batch_size)
    expected = expected_metrics(model, tokenizer, rows)
    assert 0 < expected["acc"][0] < 1 and expected["acc"][0] != expected["acc_norm"][0]
    assert list(result) == ["kd_colours"]
    task = result["kd_colours"]
    assert (task["version"], task["num_fewshot"], task["samples"]) == ("1.5", 0, 24)
    check(task["metrics"], expected)
    assert json.loads(json.dumps(result)) == result


@needs_harness
def test_run_harness_limit_takes_the_first_rows(folder, model, tokenizer, rows):
    task = harness(model, tokenizer, folder, limit=7)["kd_colours"]
    assert task["samples"] == 7
    check(task["metrics"], expected_metrics(model, tokenizer, rows[:7]))


@needs_harness
def test_run_harness_few_shot_examples_are_asked_with(folder, model, tokenizer, rows, tmp_path):
    """One possible example, so that the context is known whatever is drawn."""
    example = rows[0]
    settings = yaml.safe_load((folder / "kd_colours.yaml").read_text())
    (folder / "train.jsonl").write_text(json.dumps(example) + "\n")
    settings["dataset_kwargs"]["data_files"]["train"] = str(folder / "train.jsonl")
    settings.update(task="kd_shots", fewshot_split="train", training_split="train")
    (folder / "kd_shots.yaml").write_text(yaml.safe_dump(settings))
    task = harness(model, tokenizer, folder, ["kd_shots"], num_fewshot=1)["kd_shots"]
    shots = f"{example['question']} {CHOICES[example['answer']]}\n\n"
    expected = expected_metrics(model, tokenizer, rows, shots)
    assert abs(expected["brier_score"][0] - expected_metrics(model, tokenizer, rows)["brier_score"][0]) > 1e-3
    assert task["num_fewshot"] == 1
    check(task["metrics"], expected)


@needs_harness
def test_run_harness_generation_equals_greedy_loop(folder, model, tokenizer, rows):
    answers = []
    with torch.no_grad():
        for row in rows[:6]:
            ids = tokenizer(row["question"])["input_ids"]
            start = len(ids)
            while len(ids) < start + 5 and tokenizer.eos_token_id not in ids:
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
            answers.append(tokenizer.decode(ids[start:], skip_special_tokens=True))
    targets = [answer if index % 3 else answer + "!" for index, answer in enumerate(answers)]
    data = [{"question": row["question"], "target": target} for row, target in zip(rows, targets, strict=False)]
    write_task(
        folder,
        "kd_greedy",
        data,
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{target}}",
        generation_kwargs={"until": ["<never>"], "max_gen_toks": 5, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        filter_list=[{"name": "whole", "filter": [{"function": "take_first"}]}],
    )
    metrics = harness(model, tokenizer, folder, ["kd_greedy"])["kd_greedy"]["metrics"]
    assert metrics["exact_match,whole"]["value"] == pytest.approx(4 / 6)


@needs_harness
def test_run_harness_group_and_pattern(folder, model, tokenizer, rows):
    settings = yaml.safe_load((folder / "kd_colours.yaml").read_text())
    write_task(folder, "kd_half", rows[:12], **{k: v for k, v in settings.items() if k.startswith(("doc", "output"))})
    group = {
        "group": "kd_all",
        "task": ["kd_colours", "kd_half"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 2},
    }
    (folder / "kd_all.yaml").write_text(yaml.safe_dump(group))
    result = harness(model, tokenizer, folder, ["kd_all"])
    assert set(result) == {"kd_all", "kd_colours", "kd_half"}
    whole, half = (result[name]["metrics"]["acc"]["value"] for name in ("kd_colours", "kd_half"))
    assert result["kd_all"]["metrics"]["acc"]["value"] == pytest.approx((24 * whole + 12 * half) / 36)
    assert result["kd_all"]["version"] == "2"
    assert set(harness(model, tokenizer, folder, ["kd_h*", "kd_half"])) == {"kd_half"}
    # A group and its members are run once
    assert harness(model, tokenizer, folder, ["kd_*"]) == result


@needs_harness
def test_run_harness_path_equals_object_and_leaves_everything_as_it_was(folder, tokenizer, student_path):
    model = AutoModelForCausalLM.from_pretrained(student_path).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    result = harness(model, tokenizer, folder)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not model._forward_hooks
    assert harness(student_path, None, folder) == result


@needs_harness
def test_run_harness_tokenizer_without_padding_stays_without(folder, model, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    assert harness(model, bare, folder) == harness(model, tokenizer, folder)
    assert bare.pad_token is None


@needs_harness
def test_run_harness_same_seed_same_result(folder, model, tokenizer, rows):
    """The few-shot examples are drawn with the seed."""
    fewshot = {"num_fewshot": 3, "limit": 10}
    first, again, other = (harness(model, tokenizer, folder, seed=seed, **fewshot) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@needs_harness
def test_run_harness_nan_logits_are_an_error(folder, model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match=r"logits are not numbers \(NaN\).*Check its weights"):
        harness(model, tokenizer, folder)
    assert not model._forward_hooks


@needs_harness
def test_run_harness_unknown_task_names_near_ones(folder, model, tokenizer):
    with pytest.raises(ValueError, match=r"'kd_colors'.* Did you mean `kd_colours`\? "):
        harness(model, tokenizer, folder, ["kd_colors"])
    with pytest.raises(ValueError, match=r"'colours'.* Did you mean `kd_colours`\? "):
        harness(model, tokenizer, folder, ["colours"])
    with pytest.raises(ValueError, match=r"'zzzz', .*among 1 tasks. `lm-eval"):
        harness(model, tokenizer, folder, ["zzzz"])


@needs_harness
@pytest.mark.parametrize("path", ["somebody/some-dataset", "json"])
def test_run_harness_missing_data_is_one_clear_error(folder, tmp_path, path):
    settings = yaml.safe_load((folder / "kd_colours.yaml").read_text())
    settings.update(task="kd_gone", dataset_path=path)
    if path == "json":
        settings["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "gone.jsonl")
    else:
        del settings["dataset_kwargs"]
    (folder / "kd_gone.yaml").write_text(yaml.safe_dump(settings))
    # Before the model is loaded: there is none
    with pytest.raises(ValueError, match="data of the task 'kd_gone' are not on this machine .*HF_HUB_OFFLINE"):
        harness(str(tmp_path / "no-model"), None, folder, ["kd_gone"])


@needs_harness
def test_run_harness_task_that_needs_a_package_names_it(folder, model, tokenizer):
    (folder / "kd_code.py").write_text("import no_such_package\n\n\ndef rows(dataset):\n    return dataset\n")
    settings = (folder / "kd_colours.yaml").read_text().replace("kd_colours", "kd_code", 1)
    settings = settings.replace("task: kd_colours", "task: kd_code") + "process_docs: !function kd_code.rows\n"
    (folder / "kd_code.yaml").write_text(settings)
    with pytest.raises(ImportError, match="'kd_code' needs a package that is not installed: .*no_such_package"):
        harness(model, tokenizer, folder, ["kd_code"])


@needs_harness
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"tasks": []}, "names no tasks"),
        ({"tasks": "kd_colours"}, "names no tasks"),
        ({"limit": 0}, "`limit` is 0"),
        ({"include_path": "no/folder"}, "is no folder"),
    ],
)
def test_run_harness_bad_argument_is_an_error(folder, model, tokenizer, argument, message):
    arguments = {"tasks": ["kd_colours"], "include_path": folder, "include_defaults": False, **argument}
    with pytest.raises(ValueError, match=message):
        run_harness(model, tokenizer, **arguments)


def test_run_harness_without_the_package_names_the_extra(monkeypatch, model, tokenizer):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"cannot be imported .*pip install trl_kd\[harness\]"):
        run_harness(model, tokenizer, ["arc_easy"])

"""Small evaluations for the tests, and plain loops over what they must find."""

import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import make_model, make_tokenizer
from trl_kd.evaluation import EvalModel, EvalRow, Evaluation, ResultStore, plain_suite


ROWS = [
    EvalRow(0, "What is the colour of the sky?", (" The sky is blue.", " Blue.")),
    EvalRow(1, "Once upon a time", (" a naïve fox met a bird — né.",)),
    EvalRow(2, "The bird said,", (' "Hello, fox!"',)),
    EvalRow(3, "How many apples are there in the kitchen?", (" Three.",)),
    EvalRow(4, "Fish", (" live in the river",)),
]
METRICS = [
    *("rouge_l", "distinct_2", "length", "eos_share", "nll", "bits_per_byte"),
    *("forward_kl", "reverse_kl", "total_variation"),
    *("own_forward_kl", "own_reverse_kl", "own_total_variation", "own_entropy", "imitation_gap"),
]
DOUBLE = {"dtype": torch.float64}
OTHER_TEXT = "Where does the red bird sleep? On a tree near the water, over the river. " * 3


def bare(rows=ROWS) -> list[EvalRow]:
    """The same prompts without references."""
    return [EvalRow(row.index, row.prompt, ()) for row in rows]


def small_suite(**changes):
    return plain_suite(
        {"seeds": [3, 8], "max_completion_length": 8, "metrics": METRICS, "main_metric": "nll"} | changes
    )


def task(models, rows=ROWS, batch_size=3, **changes) -> Evaluation:
    return Evaluation(models, rows, small_suite(**changes), "rows", batch_size=batch_size, progress=False)


def evaluate(path, models, *args, **kwargs) -> tuple[ResultStore, int]:
    """A whole evaluation; the store, and the run's number."""
    store, work = ResultStore(path), task(models, *args, **kwargs)
    with work.begin(store) as run:
        work.run(run)
        run.finish()
    return store, run.id


def contents(store: ResultStore, number: int) -> dict:
    """All that a run has found."""
    info, found = store.run(number), {}
    for model in info.models:
        for seed in info.seeds:
            found[model.name, seed] = store.samples(number, model.name, seed)
        found[model.name, "by_position"] = store.details(number, model.name, "by_position")
    keys = ("model", "metric", "seed", "value")
    found["results"] = [tuple(row[key] for key in keys) for row in store.history() if row["run_id"] == number]
    return found


def save(folder: Path, model, tokenizer) -> str:
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return str(folder)


def changed_copy(path: str, folder: Path, change) -> str:
    """The model of a folder, saved anew after `change(model)`."""
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        change(model)
    return save(folder, model, AutoTokenizer.from_pretrained(path))


def eager(model):
    """Make EOS likely now and then, so that some texts end before they are cut."""
    model.lm_head.weight[model.config.eos_token_id] *= 4


def other_vocabulary(folder: Path) -> str:
    """A model that cuts texts into other tokens."""
    tokenizer = make_tokenizer(OTHER_TEXT, vocab_size=330)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = make_model("llama", len(tokenizer), seed=7, **ids)
    with torch.no_grad():
        eager(model)
    return save(folder, model, tokenizer)


def says_eos(folder: Path, tokenizer, logit: float) -> str:
    """A model that ends with the same odds everywhere: one vector for all states, and a row for it at EOS alone."""
    model = make_model("gpt2", len(tokenizer), tied=False, seed=4, eos_token_id=tokenizer.eos_token_id)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.eos_token_id] = logit / model.config.n_embd
    return save(folder, model, tokenizer)


def student_of(path: str, name: str = "student", role: str = "student", **kwargs) -> EvalModel:
    return EvalModel(name, path, role=role, **kwargs)


@torch.no_grad()
def next_log_probs(model, prompt: list[int], completion: list[int]) -> list[list[float]]:
    """Log-probabilities of the vocabulary at each state of a completion: one text, one state at a time."""
    states = [prompt + completion[:place] for place in range(len(completion))]
    return [model(input_ids=torch.tensor([state])).logits[0, -1].log_softmax(-1).tolist() for state in states]


def mean_nll(model, prompt: list[int], completion: list[int]) -> float:
    rows = next_log_probs(model, prompt, completion)
    return -math.fsum(row[token] for row, token in zip(rows, completion, strict=True)) / len(completion)


def mean_divergences(student, teacher, prompt: list[int], completion: list[int]) -> dict[str, float]:
    """Token means of the divergences between two models, and the student's entropy."""
    sums = dict.fromkeys(("forward_kl", "reverse_kl", "total_variation", "entropy"), 0.0)
    states = (next_log_probs(model, prompt, completion) for model in (student, teacher))
    for log_q, log_p in zip(*states, strict=True):
        for a, b in zip(log_q, log_p, strict=True):
            q, p = math.exp(a), math.exp(b)
            sums["forward_kl"] += p * (b - a)
            sums["reverse_kl"] += q * (a - b)
            sums["total_variation"] += abs(q - p) / 2
            sums["entropy"] -= q * a
    return {name: total / len(completion) for name, total in sums.items()}


def read_answer(tokenizer, prompt: str, text: str, ended: bool = True) -> tuple[list[int], list[int]]:
    """Ids of a prompt and of the text behind it."""
    prompt_ids, joint = tokenizer(prompt).input_ids, tokenizer(prompt + text).input_ids
    ids = joint[len(prompt_ids) :] if joint[: len(prompt_ids)] == prompt_ids else tokenizer(text).input_ids
    return prompt_ids, ids + [tokenizer.eos_token_id] * ended

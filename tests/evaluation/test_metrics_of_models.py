"""The metrics that read texts by a model, against plain loops over tokens."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import make_model, make_tokenizer
from trl_kd.evaluation import sample_completions
from trl_kd.evaluation.metrics import load_metric


PROMPTS = ["What is the colour of the sky?", "Once", "A little fox met"]
TEXTS = [" The sky is blue and the naïve fox said: né.", " upon a time", " x"]


@pytest.fixture(scope="module")
def models(tokenizer):
    """A student and its teacher, with positions that count, in float64 so that the order of sums hardly does."""
    return [
        make_model("gpt2", len(tokenizer), seed=seed, eos_token_id=tokenizer.eos_token_id).double() for seed in (1, 2)
    ]


@pytest.fixture(scope="module")
def ids(tokenizer):
    """Token ids of prompts and of texts with their EOS."""
    return (
        [tokenizer(text).input_ids for text in PROMPTS],
        [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in TEXTS],
    )


@torch.no_grad()
def next_log_probs(model, prompt, completion):
    """Log-probabilities of the whole vocabulary at each state of a completion, one state and one row at a time."""
    states = [prompt + completion[:k] for k in range(len(completion))]
    return [model(input_ids=torch.tensor([state])).logits[0, -1].log_softmax(-1).tolist() for state in states]


def plain_nll(model, prompt, completion):
    rows = next_log_probs(model, prompt, completion)
    return [-row[token] for row, token in zip(rows, completion, strict=True)]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_likelihood_is_that_of_a_plain_loop(models, tokenizer, ids, batch_size):
    nlls = [plain_nll(models[0], *row) for row in zip(*ids, strict=True)]
    tokens, sizes = list(map(len, nlls)), [len(text.encode("utf-8")) for text in TEXTS]
    assert sizes[0] == len(TEXTS[0]) + 2  # two letters of two bytes

    arguments = {"model": models[0], "tokenizer": tokenizer, "batch_size": batch_size}
    result = load_metric("likelihood").compute(predictions=TEXTS, prompts=PROMPTS, **arguments)
    # float64, sums of at most 50 terms
    assert result["nll"] == pytest.approx(sum(map(sum, nlls)) / sum(tokens), rel=1e-10)
    assert result["bits_per_byte"] == pytest.approx(sum(map(sum, nlls)) / math.log(2) / sum(sizes), rel=1e-10)
    assert result["weights"] == {"nll": tokens, "bits_per_byte": sizes}
    assert result["values"]["nll"] == pytest.approx([sum(nll) / len(nll) for nll in nlls], rel=1e-10)
    bits = [sum(nll) / math.log(2) / size for nll, size in zip(nlls, sizes, strict=True)]
    assert result["values"]["bits_per_byte"] == pytest.approx(bits, rel=1e-10)
    assert load_metric("likelihood").compute(predictions=ids[1], prompts=ids[0], **arguments) == result


def test_likelihood_of_a_text_that_goes_on_leaves_its_end_out(models, tokenizer, ids):
    nlls = [plain_nll(models[0], *row)[:-1] for row in zip(*ids, strict=True)]
    result = load_metric("likelihood").compute(
        predictions=TEXTS, prompts=PROMPTS, model=models[0], tokenizer=tokenizer, ended=False
    )
    assert result["weights"]["nll"] == list(map(len, nlls))
    assert result["nll"] == pytest.approx(sum(map(sum, nlls)) / sum(map(len, nlls)), rel=1e-10)


def test_likelihood_of_nothing_but_the_end_has_no_bytes(models, tokenizer, ids):
    prompts, end = ids[0][:1], [[tokenizer.eos_token_id]]
    result = load_metric("likelihood").compute(predictions=end, prompts=prompts, model=models[0], tokenizer=tokenizer)
    assert result["nll"] == pytest.approx(plain_nll(models[0], prompts[0], end[0])[0], rel=1e-10)
    assert (result["bits_per_byte"], result["weights"]["bits_per_byte"]) == (0.0, [0.0])


def test_metrics_of_models_take_paths(student_path, teacher_path, tokenizer):
    loaded = [AutoModelForCausalLM.from_pretrained(path) for path in (student_path, teacher_path)]
    texts = {"predictions": TEXTS, "prompts": PROMPTS}
    by_path = load_metric("divergence").compute(**texts, model=student_path, teacher=teacher_path)
    by_object = load_metric("divergence").compute(**texts, model=loaded[0], teacher=loaded[1], tokenizer=tokenizer)
    assert by_path == by_object
    by_path = load_metric("likelihood").compute(**texts, model=student_path)
    assert by_path == load_metric("likelihood").compute(**texts, model=loaded[0], tokenizer=tokenizer)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_divergence_is_that_of_a_plain_loop(models, tokenizer, ids, batch_size):
    expected = {"forward_kl": [], "reverse_kl": [], "total_variation": []}
    for row in zip(*ids, strict=True):
        sums = dict.fromkeys(expected, 0.0)
        for log_q, log_p in zip(*(next_log_probs(model, *row) for model in models), strict=True):
            for a, b in zip(log_q, log_p, strict=True):
                sums["forward_kl"] += math.exp(b) * (b - a)
                sums["reverse_kl"] += math.exp(a) * (a - b)
                sums["total_variation"] += abs(math.exp(a) - math.exp(b)) / 2
        for name, total in sums.items():
            expected[name].append(total)
    tokens = list(map(len, ids[1]))
    result = load_metric("divergence").compute(
        predictions=TEXTS,
        prompts=PROMPTS,
        model=models[0],
        teacher=models[1],
        tokenizer=tokenizer,
        batch_size=batch_size,
    )
    for name, totals in expected.items():
        # float64, sums of a few hundred terms
        means = [total / count for total, count in zip(totals, tokens, strict=True)]
        assert result["values"][name] == pytest.approx(means, rel=1e-9)
        assert result["weights"][name] == tokens
        assert result[name] == pytest.approx(sum(totals) / sum(tokens), rel=1e-9)


def test_divergence_of_the_teacher_from_itself_is_zero(models, tokenizer):
    texts = {"predictions": TEXTS, "prompts": PROMPTS, "model": models[1], "teacher": models[1]}
    result = load_metric("divergence").compute(**texts, tokenizer=tokenizer)
    assert [result[name] for name in ("forward_kl", "reverse_kl", "total_variation")] == [0.0, 0.0, 0.0]


def test_divergence_of_nuclei_is_smaller_in_mass(models, tokenizer, ids):
    """With a nucleus of one token, both write their likeliest: total variation is 0 or 1."""
    arguments = {"predictions": TEXTS, "prompts": PROMPTS, "model": models[0], "teacher": models[1]}
    result = load_metric("divergence").compute(**arguments, tokenizer=tokenizer, top_p=1e-6)
    differ = [
        sum(
            a.index(max(a)) != b.index(max(b)) for a, b in zip(*(next_log_probs(m, *row) for m in models), strict=True)
        )
        for row in zip(*ids, strict=True)
    ]
    expected = [count / len(completion) for count, completion in zip(differ, ids[1], strict=True)]
    assert result["values"]["total_variation"] == pytest.approx(expected, abs=1e-6)


def test_divergence_other_vocabulary_raises(models, tokenizer, tmp_path):
    other = make_tokenizer("xyz", vocab_size=300)
    make_model("llama", len(other), seed=3).save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=rf"^`model` and `teacher` have different vocabularies, of {len(tokenizer)} and {len(other)} tokens, .* "
        "Take `likelihood` or `imitation_gap`",
    ):
        load_metric("divergence").compute(
            predictions=TEXTS, prompts=PROMPTS, model=models[0], teacher=str(tmp_path), tokenizer=tokenizer
        )


def gap_by_hand(teacher, prompts, written, own, counts):
    """Imitation gap of a data set that holds row i `counts[i]` times."""
    means = []
    for texts in (written, own):
        nlls = [plain_nll(teacher, *row) for row in zip(prompts, texts, strict=True)]
        total = sum(count * sum(nll) for count, nll in zip(counts, nlls, strict=True))
        means.append(total / sum(count * len(nll) for count, nll in zip(counts, nlls, strict=True)))
    return means[0] - means[1]


def test_imitation_gap_and_its_values_are_those_of_a_plain_loop(models, tokenizer, ids):
    prompts, own = ids
    written = [own[2], own[0][:5], own[1] * 2]
    result = load_metric("imitation_gap").compute(
        predictions=written, references=own, prompts=prompts, teacher=models[1], tokenizer=tokenizer, batch_size=2
    )
    gap = gap_by_hand(models[1], prompts, written, own, [1, 1, 1])
    assert result["imitation_gap"] == pytest.approx(gap, rel=1e-9)
    assert sum(result["values"]) / 3 == pytest.approx(gap, rel=1e-9)
    # The influence of a row is what more of it does, at the rate of one row in P
    for i, value in enumerate(result["values"]):
        step = [1.0, 1.0, 1.0]
        step[i] += 1e-6
        slope = (gap_by_hand(models[1], prompts, written, own, step) - gap) / 1e-6
        # A difference quotient in float64: its error is of the order of the step
        assert value - gap == pytest.approx(3 * slope, abs=1e-4)


def test_imitation_gap_of_the_teacher_is_zero(models, tokenizer, ids):
    prompts = ids[0] * 40
    first, second = (
        sample_completions(models[1], prompts, max_new_tokens=6, seed=seed, progress=False) for seed in (1, 2)
    )
    assert first != second
    arguments = {"prompts": prompts, "teacher": models[1], "tokenizer": tokenizer}
    same = load_metric("imitation_gap").compute(predictions=first, references=first, **arguments)
    assert same["imitation_gap"] == 0.0
    assert set(same["values"]) == {0.0}
    other = load_metric("imitation_gap").compute(predictions=second, references=first, **arguments)
    error = torch.tensor(other["values"]).std().item() / math.sqrt(len(prompts))
    assert 0.0 < abs(other["imitation_gap"]) < 2 * error
    # A student that knows nothing writes what the teacher would not
    torch.manual_seed(0)
    noise = [torch.randint(len(tokenizer), (6,)).tolist() for _ in prompts]
    far = load_metric("imitation_gap").compute(predictions=noise, references=first, **arguments)
    assert far["imitation_gap"] > 10 * error


def test_metrics_of_models_nan_logits_raise(tokenizer):
    model = make_model("llama", len(tokenizer), seed=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer(PROMPTS[1]).input_ids[0]] = float("nan")
    arguments = {"prompts": PROMPTS[1:2] * 2, "tokenizer": tokenizer}
    with pytest.raises(ValueError, match="^The likelihood is not finite for prediction 0: the logits of a model hold"):
        load_metric("likelihood").compute(predictions=TEXTS[:2], model=model, **arguments)
    with pytest.raises(ValueError, match="^forward_kl is not finite for prediction 0: "):
        load_metric("divergence").compute(predictions=TEXTS[:2], model=model, teacher=model, **arguments)
    with pytest.raises(ValueError, match="^The teacher's likelihood of `predictions` is not finite for prediction 0"):
        load_metric("imitation_gap").compute(predictions=TEXTS[:2], references=TEXTS[:2], teacher=model, **arguments)


def test_metrics_of_models_empty_rows_raise(models, tokenizer, ids):
    arguments = {"model": models[0], "tokenizer": tokenizer}
    with pytest.raises(ValueError, match=r"^Row 1 has 0 tokens in `prompts` and 2 in `predictions`, .* BOS token"):
        load_metric("likelihood").compute(predictions=[[1, 2], [3, 4]], prompts=[[1], []], **arguments)
    with pytest.raises(ValueError, match=r"^Row 0 has 1 tokens in `prompts` and 0 in `references`"):
        load_metric("imitation_gap").compute(
            predictions=[[1]], references=[[]], prompts=[[1]], teacher=models[0], tokenizer=tokenizer
        )
    with pytest.raises(ValueError, match="^Row 1 cannot be evaluated: the completion or text is empty"):
        load_metric("likelihood").compute(predictions=[" a", ""], prompts=["a", "b"], **arguments)

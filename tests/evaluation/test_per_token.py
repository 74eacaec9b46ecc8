"""What models say of single tokens, against a loop over one state at a time."""

import math

import pytest
import torch

from tests.tiny import make_model
from trl_kd.evaluation import compare_rows, likelihood_rows, per_token


VOCAB, PADDED = 23, 29
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [5, 5]]
COMPLETIONS = [[3, 4], [2, 14, 15, 16, 17, 1], [7], [0, 22, 21]]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def models(request):
    """Student and teacher; gpt2's positions show a shifted row, and float64 hides the order of sums."""
    return [make_model(request.param, VOCAB, hidden_size=16, seed=seed).double() for seed in (1, 2)]


@torch.no_grad()
def distributions(model, prompt, completion, size=None):
    """Log-probabilities at each state, renormalised over the first `size` tokens; one forward for each state."""
    found = []
    for place in range(len(completion)):
        logits = model(input_ids=torch.tensor([prompt + completion[:place]])).logits[0, -1].tolist()[:size]
        total = math.log(math.fsum(math.exp(logit) for logit in logits))
        found.append([logit - total for logit in logits])
    return found


def entropy(log_p):
    return -math.fsum(math.exp(a) * a for a in log_p)


def kl(log_p, log_q):
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))


def plain_comparison(student, teacher, prompt, completion, size):
    """All that can be said of two models at each token."""
    whole = [distributions(model, prompt, completion) for model in (student, teacher)]
    pairs = zip(*(distributions(model, prompt, completion, size) for model in (student, teacher)), strict=True)
    values = {
        "nll": [-row[token] for row, token in zip(whole[0], completion, strict=True)],
        "teacher_nll": [-row[token] for row, token in zip(whole[1], completion, strict=True)],
    }
    for q, p in pairs:
        row = {
            "total_variation": math.fsum(abs(math.exp(a) - math.exp(b)) for a, b in zip(q, p, strict=True)) / 2,
            "forward_kl": kl(p, q),
            "reverse_kl": kl(q, p),
            "student_entropy": entropy(q),
            "teacher_entropy": entropy(p),
        }
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    return values


def check(rows, student, teacher, size):
    for found, prompt, completion in zip(rows, PROMPTS, COMPLETIONS, strict=True):
        expected = plain_comparison(student, teacher, prompt, completion, size)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert found[name].dtype == torch.float64 and found[name].shape == (len(completion),)
            # float64, sums of 23 terms
            assert found[name].tolist() == pytest.approx(values, rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_compare_rows_equals_a_loop_over_states(models, batch_size):
    rows = list(compare_rows(*models, PROMPTS, COMPLETIONS, batch_size=batch_size))
    check(rows, *models, VOCAB)
    # The two are far apart, or an exchange of them would hardly show
    assert abs(rows[1]["forward_kl"] - rows[1]["reverse_kl"]).max() > 0.01


@pytest.mark.parametrize("order", [1, -1])
def test_compare_rows_padded_head_is_cut_for_divergences_alone(order):
    sizes = [VOCAB, PADDED][::order]
    pair = [make_model("gpt2", size, hidden_size=16, seed=seed).double() for seed, size in enumerate(sizes)]
    check(list(compare_rows(*pair, PROMPTS, COMPLETIONS, batch_size=2)), *pair, VOCAB)


def test_compare_rows_chunks_change_nothing(models, monkeypatch):
    whole = list(compare_rows(*models, PROMPTS, COMPLETIONS))
    likelihood = [row.tolist() for row in likelihood_rows(models[0], PROMPTS, COMPLETIONS)]
    monkeypatch.setattr(per_token, "_CHUNK_SIZE", 5)
    for left, right in zip(compare_rows(*models, PROMPTS, COMPLETIONS), whole, strict=True):
        for name, value in right.items():
            assert left[name].tolist() == pytest.approx(value.tolist(), rel=1e-12), name
    for left, right in zip(likelihood_rows(models[0], PROMPTS, COMPLETIONS), likelihood, strict=True):
        assert left.tolist() == pytest.approx(right, rel=1e-12)


def test_compare_rows_top_p_cuts_both_nuclei(models):
    student, teacher = models
    rows = compare_rows(student, teacher, PROMPTS, COMPLETIONS, top_p=0.7)
    for found, prompt, completion in zip(rows, PROMPTS, COMPLETIONS, strict=True):
        states = [distributions(model, prompt, completion) for model in (student, teacher)]
        for place, (q, p) in enumerate(zip(*states, strict=True)):
            q, p = [math.exp(a) for a in q], [math.exp(a) for a in p]
            q_cut, p_cut = nucleus(q, 0.7), nucleus(p, 0.7)
            expected = {
                "total_variation": sum(abs(a - b) for a, b in zip(q_cut, p_cut, strict=True)) / 2,
                "forward_kl": plain_kl(p_cut, q),
                "reverse_kl": plain_kl(q_cut, p),
                "student_entropy": -plain_kl(q_cut, [1.0] * VOCAB),
                "teacher_entropy": -plain_kl(p_cut, [1.0] * VOCAB),
                "outside": sum(a for a, b in zip(q_cut, p_cut, strict=True) if b == 0),
                "teacher_cut": plain_kl(p_cut, p),
                "nll": -math.log(q[completion[place]]),
                "teacher_nll": -math.log(p[completion[place]]),
            }
            # The nuclei are taken in float32
            assert {name: value[place].item() for name, value in found.items()} == pytest.approx(expected, abs=1e-5)


def nucleus(probabilities, top_p):
    """The likeliest tokens until their mass is reached, renormalised."""
    kept, mass = [0.0] * len(probabilities), 0.0
    for token in sorted(range(len(probabilities)), key=lambda token: -probabilities[token]):
        if mass < top_p:
            kept[token] = probabilities[token]
            mass += probabilities[token]
    return [value / mass for value in kept]


def plain_kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def test_compare_rows_teacher_that_is_the_student_is_read_once_and_agrees(models, monkeypatch):
    calls = []
    original = per_token._completion_logits
    monkeypatch.setattr(per_token, "_completion_logits", lambda *args: calls.append(args[0]) or original(*args))
    rows = list(compare_rows(models[0], models[0], PROMPTS, COMPLETIONS, batch_size=2))
    assert calls == [models[0]] * 2
    for row in rows:
        assert row["total_variation"].tolist() == [0.0] * len(row["nll"])
        assert row["forward_kl"].abs().max() < 1e-12 and row["reverse_kl"].abs().max() < 1e-12
        assert row["teacher_nll"].tolist() == row["nll"].tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_likelihood_rows_equals_a_loop_over_states(models, batch_size):
    rows = list(likelihood_rows(models[0], PROMPTS, COMPLETIONS, batch_size=batch_size))
    assert len(rows) == len(PROMPTS)
    for found, prompt, completion in zip(rows, PROMPTS, COMPLETIONS, strict=True):
        states = distributions(models[0], prompt, completion)
        assert found.dtype == torch.float64 and found.shape == (len(completion),)
        expected = [-row[token] for row, token in zip(states, completion, strict=True)]
        assert found.tolist() == pytest.approx(expected, rel=1e-9)


@torch.no_grad()
def test_rows_of_a_bfloat16_model_are_computed_in_float32(models):
    student, teacher = [make_model("llama", VOCAB, seed=seed).bfloat16() for seed in (1, 2)]
    found = next(iter(compare_rows(student, teacher, PROMPTS[:1], COMPLETIONS[:1])))
    (nll,) = likelihood_rows(student, PROMPTS[:1], COMPLETIONS[:1])
    ids = torch.tensor([PROMPTS[0] + COMPLETIONS[0][:-1]])
    log_q, log_p = (
        model(ids).logits[0, len(PROMPTS[0]) - 1 :].double().log_softmax(-1) for model in (student, teacher)
    )
    labels = torch.tensor(COMPLETIONS[0])
    # The logits are rounded to bfloat16, what is made of them only to float32
    assert nll.tolist() == pytest.approx((-log_q[range(2), labels]).tolist(), rel=1e-5)
    assert found["nll"].tolist() == nll.tolist()
    expected = (log_q.exp() - log_p.exp()).abs().sum(-1) / 2
    assert found["total_variation"].tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_rows_are_read_in_eval_mode_and_modes_come_back():
    model = make_model("gpt2", VOCAB, hidden_size=16, seed=1)
    (expected,) = likelihood_rows(model, PROMPTS[:1], COMPLETIONS[:1])
    model.transformer.drop.p = 0.5
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    (found,) = likelihood_rows(model, PROMPTS[:1], COMPLETIONS[:1])
    compared = next(iter(compare_rows(model, model, PROMPTS[:1], COMPLETIONS[:1])))
    assert found.tolist() == compared["nll"].tolist() == expected.tolist()
    rows = compare_rows(model, model, PROMPTS, COMPLETIONS, batch_size=1)
    next(rows)
    rows.close()
    assert [module.training for module in model.modules()] == modes
    assert not found.requires_grad and all(parameter.grad is None for parameter in model.parameters())


def test_rows_of_unequal_numbers_are_refused(models):
    with pytest.raises(ValueError, match="shorter"):
        list(compare_rows(*models, PROMPTS, COMPLETIONS[:-1]))
    with pytest.raises(ValueError, match="shorter"):
        list(likelihood_rows(models[0], PROMPTS, COMPLETIONS[:-1]))


@pytest.mark.parametrize("progress", [False, True])
def test_rows_progress_can_be_shown(models, progress, capsys):
    list(compare_rows(*models, PROMPTS, COMPLETIONS, progress=progress, description="Judging"))
    list(likelihood_rows(models[0], PROMPTS, COMPLETIONS, progress=progress, description="Weighing"))
    shown = capsys.readouterr().err
    assert ("Judging" in shown) == ("Weighing" in shown) == progress

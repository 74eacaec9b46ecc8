import math
from collections import defaultdict

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from trl_kd.evaluation import evaluate_fidelity, fidelity_table, format_metric, sample_completions


EOS, A, B = 1, 2, 3
LN2, LN3 = math.log(2.0), math.log(3.0)


def bigram_model(transitions: dict[int, list[float]]) -> LlamaForCausalLM:
    """A Llama whose next-token distribution is a given row for each last token, over (unused, EOS, A, B)."""
    size = 4
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size,
            hidden_size=size,
            intermediate_size=size,
            num_hidden_layers=1,
            num_attention_heads=1,
            rms_norm_eps=1e-12,
            tie_word_embeddings=False,
            bos_token_id=EOS,
            eos_token_id=EOS,
        )
    )
    rows = torch.zeros(size, size)
    for token, probabilities in transitions.items():
        rows[token] = torch.tensor(probabilities).clamp_min(1e-30).log()
    with torch.no_grad():
        # The layer adds nothing, and the norm turns a one-hot vector into sqrt(size) times itself
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(rows.T / math.sqrt(size))
    return model.eval()


def stateless_model(probabilities: list[float]) -> LlamaForCausalLM:
    """A bigram model that forgets its last token, so that all states are alike."""
    return bigram_model(dict.fromkeys((EOS, A, B), probabilities))


def random_model(seed: int, training: bool = False) -> LlamaForCausalLM:
    """A small Llama whose next-token distributions are far from uniform."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=13,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=False,
            initializer_range=0.5,
            bos_token_id=EOS,
            eos_token_id=EOS,
        )
    )
    return model.train(training)


def nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """The most likely tokens until their mass is reached, renormalised."""
    kept, mass = torch.zeros_like(probabilities), 0.0
    for token in sorted(range(len(probabilities)), key=lambda token: -probabilities[token]):
        if mass < top_p:
            kept[token] = probabilities[token]
            mass += probabilities[token].item()
    return kept / kept.sum()


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    """KL(p || q), token by token."""
    return sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True) if a > 0)


def evaluate(student, teacher, prompts, references=None, **kwargs):
    return evaluate_fidelity(
        student, teacher, prompts, references, **({"max_new_tokens": 8, "batch_size": 4, "progress": False} | kwargs)
    )


def test_evaluate_fidelity_stateless_models_match_hand_worked_values():
    teacher, student = stateless_model([0, 1 / 2, 1 / 4, 1 / 4]), stateless_model([0, 1 / 8, 1 / 8, 3 / 4])
    metrics = evaluate(student, teacher, [[A], [B, A, B], [A, B]] * 4, [[A, B, EOS], [B], [A, A]] * 4)
    expected = {
        "total_variation": 1 / 2,  # half of 3/8 + 1/8 + 1/2
        "forward_kl": 1.25 * LN2 - 0.25 * LN3,  # ln(4) / 2 + ln(2) / 4 + ln(1 / 3) / 4
        "reverse_kl": 0.75 * LN3 - 0.375 * LN2,  # ln(1 / 4) / 8 + ln(1 / 2) / 8 + 3 ln(3) / 4
        "student_entropy": 2.25 * LN2 - 0.75 * LN3,
        "teacher_entropy": 1.5 * LN2,
    }
    for source in ("student_states", "teacher_states", "reference_states"):
        for name, value in expected.items():
            assert metrics[f"{source}/{name}"] == pytest.approx(value, abs=1e-5), (source, name)
    # E_{y ~ student} -log p(y) = ln(2) / 8 + ln(4) / 8 + 3 ln(4) / 4, less the teacher's entropy
    assert metrics["imitation_gap"] == pytest.approx((1.875 - 1.5) * LN2, abs=1e-5)
    # Of the 6 reference tokens 3 are A, 2 are B and 1 is EOS; each counts once, whatever the length of its row
    assert metrics["reference_states/nll"] == pytest.approx((4 * 3 * LN2 + 2 * (2 * LN2 - LN3)) / 6, abs=1e-5)
    assert metrics["reference_states/teacher_nll"] == pytest.approx((5 * 2 * LN2 + LN2) / 6, abs=1e-5)


def test_evaluate_fidelity_models_that_part_are_compared_on_their_own_states():
    rare = math.exp(-10)
    teacher = bigram_model({A: [0, 0, 1 - rare, rare], B: [0, 0, 0.5, 0.5]})  # stays at A
    student = bigram_model({A: [0, 0, 0, 1], B: [0, 0, 0, 1]})  # leaves A for B, and stays there
    metrics = evaluate(student, teacher, [[A]] * 3, max_new_tokens=4)
    # The student visits A once and B three times, the teacher A four times; exp(-10) is the tolerance
    assert metrics["student_states/total_variation"] == pytest.approx((1 + 3 * 0.5) / 4, abs=1e-3)
    assert metrics["student_states/reverse_kl"] == pytest.approx((10 + 3 * LN2) / 4, abs=1e-3)
    assert metrics["student_states/student_entropy"] == pytest.approx(0, abs=1e-3)
    assert metrics["student_states/teacher_entropy"] == pytest.approx(3 * LN2 / 4, abs=1e-3)
    assert metrics["teacher_states/total_variation"] == pytest.approx(1, abs=1e-3)
    assert metrics["teacher_states/teacher_entropy"] == pytest.approx(0, abs=1e-3)
    assert metrics["imitation_gap"] == pytest.approx((10 + 3 * LN2) / 4, abs=1e-3)
    assert metrics["student_states/distinct_2"] == pytest.approx(1 / 9)  # BBBB, three times
    assert metrics["student_states/completion_length"] == 4
    assert metrics["student_states/eos_rate"] == 0


def test_evaluate_fidelity_sharper_student_has_negative_gap():
    teacher = stateless_model([0, 0, 3 / 4, 1 / 4])
    metrics = evaluate(stateless_model([0, 0, 1, 0]), teacher, [[A]])
    # Always A: ln(4 / 3) against the teacher's entropy, ln(4) - 3 ln(3) / 4
    assert metrics["imitation_gap"] == pytest.approx(2 * LN2 - LN3 - (2 * LN2 - 0.75 * LN3), abs=1e-5)


def test_evaluate_fidelity_state_that_predicts_eos_is_the_last_one():
    teacher = bigram_model({A: [0, 0.5, 0.5, 0], EOS: [0, 0, 0, 1], B: [0, 0, 0, 1]})
    student = bigram_model({A: [0, 1, 0, 0], EOS: [0, 0, 1, 0], B: [0, 0, 1, 0]})
    metrics = evaluate(student, teacher, [[A]] * 2)
    assert metrics["student_states/completion_length"] == 1
    assert metrics["student_states/eos_rate"] == 1
    assert metrics["student_states/total_variation"] == pytest.approx(0.5, abs=1e-5)


def test_evaluate_fidelity_teacher_against_itself_is_zero():
    teacher = random_model(0)
    metrics = evaluate(teacher, teacher, [[EOS, 5, 6], [EOS, 7]] * 3, [[3, 4], [8, 2, EOS]] * 3)
    for name, value in metrics.items():
        if name.endswith(("total_variation", "forward_kl", "reverse_kl")) or name == "imitation_gap":
            assert value == pytest.approx(0, abs=1e-6), name
    copy = random_model(0)
    # Other noise for the teacher: what is left of the gap is sampling error, which 400 rollouts make small
    prompts = [[EOS, 5, 6]] * 400
    completions = sample_completions(teacher, prompts, max_new_tokens=8, batch_size=400, seed=1, progress=False)
    gap = evaluate(copy, teacher, prompts, batch_size=400, teacher_completions=completions)["imitation_gap"]
    assert gap != 0
    assert abs(gap) < 0.05


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_evaluate_fidelity_padded_batches_equal_a_loop_over_tokens(batch_size, top_p):
    student, teacher = random_model(0), random_model(1)
    prompts = [[EOS, 5, 6, 7], [EOS, 8], [EOS, 9, 10, 11, 12]]
    references = [[3, 4, 5, 6, EOS], [2, 2, 7], [6]]
    metrics = evaluate(
        student, teacher, prompts, references, batch_size=batch_size, top_p=top_p, teacher_completions=references[::-1]
    )
    for source, completions in {"reference_states": references, "teacher_states": references[::-1]}.items():
        values = defaultdict(list)
        for prompt, completion in zip(prompts, completions, strict=True):
            for i, token in enumerate(completion):
                state = torch.tensor([prompt + completion[:i]])
                with torch.no_grad():
                    q = student(state).logits[0, -1].double().softmax(-1)
                    p = teacher(state).logits[0, -1].double().softmax(-1)
                q_cut, p_cut = nucleus(q, top_p), nucleus(p, top_p)
                values["total_variation"].append(sum(abs(p_cut - q_cut).tolist()) / 2)
                values["forward_kl"].append(kl(p_cut, q))
                values["reverse_kl"].append(kl(q_cut, p))
                values["nll"].append(-math.log(q[token]))
                values["teacher_entropy"].append(-kl(p_cut, torch.ones_like(p)))
                if top_p < 1:
                    values["outside"].append(q_cut[p_cut == 0].sum().item())
                    values["teacher_cut"].append(kl(p_cut, p))
        for name, numbers in values.items():
            assert metrics[f"{source}/{name}"] == pytest.approx(sum(numbers) / len(numbers), rel=1e-5), (source, name)


def test_evaluate_fidelity_nucleus_matches_hand_worked_values():
    teacher, student = stateless_model([0, 0.5, 0.3, 0.2]), stateless_model([0, 0.1, 0.3, 0.6])
    metrics = evaluate(student, teacher, [[A], [B, A]] * 4, [[A, EOS], [B]] * 4, top_p=0.7)
    # The nuclei are EOS and A with 5/8 and 3/8, and A and B with 1/3 and 2/3
    ln = math.log
    expected = {
        "total_variation": (5 / 8 + (3 / 8 - 1 / 3) + 2 / 3) / 2,
        "forward_kl": 5 / 8 * ln(5 / 8 / 0.1) + 3 / 8 * ln(3 / 8 / 0.3),
        "reverse_kl": 1 / 3 * ln(1 / 3 / 0.3) + 2 / 3 * ln(2 / 3 / 0.2),
        "student_entropy": 1 / 3 * ln(3) + 2 / 3 * ln(3 / 2),
        "teacher_entropy": 5 / 8 * ln(8 / 5) + 3 / 8 * ln(8 / 3),
        "outside": 2 / 3,
        "teacher_cut": -ln(0.8),
    }
    for source in ("student_states", "teacher_states", "reference_states"):
        for name, value in expected.items():
            assert metrics[f"{source}/{name}"] == pytest.approx(value, abs=1e-5), (source, name)
    teacher_log_likelihood = 5 / 8 * ln(0.5) + 3 / 8 * ln(0.3)
    gap = teacher_log_likelihood - (1 / 3 * ln(0.3) + 2 / 3 * ln(0.2))
    assert metrics["imitation_gap"] == pytest.approx(gap, abs=1e-5)
    # Texts are as likely as the whole models have it
    assert metrics["reference_states/nll"] == pytest.approx(-ln(0.3 * 0.1 * 0.6) / 3, abs=1e-5)
    assert metrics["student_states/eos_rate"] == 0  # EOS is not in the student's nucleus


def test_evaluate_fidelity_nucleus_of_teacher_against_itself_is_zero():
    metrics = evaluate(random_model(0), random_model(0), [[EOS, 5, 6], [EOS, 7]] * 3, top_p=0.8)
    for name in ("student_states/total_variation", "student_states/outside", "imitation_gap"):
        assert metrics[name] == pytest.approx(0, abs=1e-6), name
    assert metrics["student_states/reverse_kl"] == pytest.approx(metrics["teacher_states/teacher_cut"], abs=1e-6)


def test_evaluate_fidelity_given_student_completions_are_those_it_would_draw():
    student, teacher, prompts = random_model(0), random_model(1), [[EOS, 5, 6], [EOS, 7], [EOS, 8, 9]]
    drawn = {"batch_size": 2, "seed": 3, "top_p": 0.8}
    completions = sample_completions(student, prompts, max_new_tokens=8, eos_token_ids=[EOS], **drawn, progress=False)
    given = evaluate(student, teacher, prompts, **drawn, student_completions=completions)
    assert given == evaluate(student, teacher, prompts, **drawn)
    assert given != evaluate(student, teacher, prompts, **drawn, student_completions=[ids[:1] for ids in completions])


def test_evaluate_fidelity_given_teacher_completions_are_those_it_would_draw():
    student, teacher, prompts = random_model(0), random_model(1), [[EOS, 5, 6], [EOS, 7], [EOS, 8, 9]]
    completions = sample_completions(teacher, prompts, max_new_tokens=8, batch_size=2, seed=3, progress=False)
    given = evaluate(student, teacher, prompts, batch_size=2, seed=3, teacher_completions=completions)
    assert given == evaluate(student, teacher, prompts, batch_size=2, seed=3)
    assert given != evaluate(student, teacher, prompts, batch_size=2, seed=4)


def test_evaluate_fidelity_padded_head_is_cut_to_the_shared_vocabulary():
    student, teacher, wide = random_model(0), random_model(1), random_model(1)
    wide.resize_token_embeddings(16, mean_resizing=False)
    prompts, completions = [[EOS, 5, 6]], [[3, 4, EOS]]
    narrow = evaluate(student, teacher, prompts, completions, teacher_completions=completions)
    padded = evaluate(student, wide, prompts, completions, teacher_completions=completions)
    assert padded["reference_states/forward_kl"] == pytest.approx(narrow["reference_states/forward_kl"], rel=1e-5)


def test_evaluate_fidelity_leaves_models_and_random_state_as_they_were():
    student, teacher = random_model(0, training=True), random_model(1)
    student.model.layers[1].eval()
    student.generation_config.top_k = 3
    modes = [module.training for module in student.modules()]
    state = torch.get_rng_state()
    evaluate(student, teacher, [[EOS, 5]], [[6]])
    assert [module.training for module in student.modules()] == modes
    assert not teacher.training
    assert torch.equal(torch.get_rng_state(), state)
    assert student.generation_config.top_k == 3


def test_sample_completions_draws_from_the_model_itself():
    model = stateless_model([0, 0.1, 0.2, 0.7])
    # What a model ships with must not bend the samples
    model.generation_config.update(temperature=0.1, top_k=1, repetition_penalty=2.0, max_length=3)
    completions = sample_completions(model, [[A], [A, B]] * 500, max_new_tokens=5, batch_size=250, progress=False)
    tokens = torch.tensor(sum(completions, []))
    for token, probability in {EOS: 0.1, A: 0.2, B: 0.7}.items():
        share = (tokens == token).float().mean().item()
        # Four standard errors of a binomial share
        assert abs(share - probability) < 4 * math.sqrt(probability * (1 - probability) / len(tokens))
    assert all(EOS not in ids[:-1] for ids in completions)
    assert all(len(ids) == 5 or ids[-1] == EOS for ids in completions)


def test_sample_completions_top_p_draws_from_the_nucleus():
    model = stateless_model([0, 0.1, 0.3, 0.6])
    completions = sample_completions(
        model, [[A], [A, B]] * 500, max_new_tokens=5, batch_size=250, top_p=0.7, progress=False
    )
    tokens = torch.tensor(sum(completions, []))
    share = (tokens == A).float().mean().item()
    assert set(tokens.tolist()) == {A, B}
    # Four standard errors of a binomial share
    assert abs(share - 1 / 3) < 4 * math.sqrt(2 / 9 / len(tokens))


def test_sample_completions_same_seed_same_texts():
    model, prompts = random_model(0), [[EOS, 5, 6], [EOS, 7]] * 3
    first, again, other = (
        sample_completions(model, prompts, max_new_tokens=8, batch_size=2, seed=seed, progress=False)
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    # Equal prompts of different batches are drawn apart
    assert len({tuple(ids) for ids in first[::2]}) > 1


def test_sample_completions_given_eos_replaces_the_models_own():
    model = bigram_model({A: [0, 0, 0, 1], B: [0, 1, 0, 0], EOS: [0, 0, 1, 0]})
    sample = {"max_new_tokens": 5, "progress": False}
    assert sample_completions(model, [[A]], **sample) == [[B, EOS]]
    assert sample_completions(model, [[A]], eos_token_ids=[B], **sample) == [[B]]


def test_sample_completions_without_eos_runs_to_the_limit():
    model = bigram_model({A: [0, 0, 0, 1], B: [0, 1, 0, 0], EOS: [0, 0, 1, 0]})
    model.generation_config.eos_token_id = None
    assert sample_completions(model, [[A]], max_new_tokens=5, progress=False) == [[B, EOS, A, B, EOS]]


@pytest.mark.parametrize(
    ("prompts", "references", "message"),
    [
        ([], None, "`prompts` has 0 prompts"),
        ([[A], []], None, "of which 1 are empty"),
        ([[A], [B]], [[A]], "`references` has 1 rows but `prompts` has 2"),
        ([[A], [B]], [[A], []], "`references` has 1 empty rows"),
    ],
)
def test_evaluate_fidelity_bad_input_is_refused(prompts, references, message):
    model = stateless_model([0, 0.2, 0.4, 0.4])
    with pytest.raises(ValueError, match=message):
        evaluate(model, model, prompts, references)


@pytest.mark.parametrize("top_p", [0.0, 1.1])
def test_evaluate_fidelity_top_p_that_is_no_mass_is_refused(top_p):
    model = stateless_model([0, 0.2, 0.4, 0.4])
    with pytest.raises(ValueError, match=f"`top_p` is {top_p}"):
        evaluate(model, model, [[A]], top_p=top_p)
    with pytest.raises(ValueError, match=f"`top_p` is {top_p}"):
        sample_completions(model, [[A]], max_new_tokens=1, top_p=top_p)


@pytest.mark.parametrize("progress", [False, True])
def test_evaluate_fidelity_progress_can_be_switched_off(progress, capsys):
    model = stateless_model([0, 0.2, 0.4, 0.4])
    evaluate(model, model, [[A]] * 3, progress=progress)
    assert ("Student rollouts" in capsys.readouterr().err) == progress


def test_fidelity_table_shows_known_metrics_of_all_models():
    models = {
        "before": {"student_states/total_variation": 0.40512, "imitation_gap": 1.67, "something_else": 7.0},
        "after": {"student_states/total_variation": (0.334, 0.003)},
    }
    console = Console(width=80, record=True)
    console.print(fidelity_table(models))
    lines = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in console.export_text().splitlines()]
    rows = {cells[0]: cells[1:] for cells in lines if len(cells) == 3}
    assert rows == {"TV, student states": ["0.405", "0.334 ± 0.003"], "imitation gap": ["1.670", ""]}


@pytest.mark.parametrize(("value", "text"), [(0.33449, "0.334"), ((1.0, 0.02), "1.000 ± 0.020"), (None, "")])
def test_format_metric_values_and_pairs(value, text):
    assert format_metric(value) == text

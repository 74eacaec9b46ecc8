"""The loss of temporal-difference distillation in training: against loops in float64, and its identities."""

import logging
import math

import pytest
import torch
from datasets import Dataset

from tests.trainer.runs import logged, same, weights
from tests.trainer.sparse import (
    assert_agrees,
    assert_same_gradients,
    entries_of,
    make_trainer,
    meaning,
    plain_step,
    recorded_run,
    sparse_config,
    sparse_pair,
    sparse_rows,
    teacher_set,
)
from trl_kd import SparseTDConfig, SparseTDTrainer


# The whole step, against loops


def only(name, **others):
    return {"objectives": {name: 1.0}} | others


MIXED = {"lmbda": 0.5, "on_policy_weight": 0.3}
NO_TAIL = {"tail_weight": 0.0, "lm_weight": 0.0}
CHI2 = {"chi2_alpha": 0.3, "action_top_p": 0.6}
MASKED_NLL = only("inverse_soft_q", chi2_alpha=math.inf, **NO_TAIL)
# Closed forms first: their loss is a divergence
CLOSED = {
    "expected": {},
    "expected_with_more_tail": {"tail_weight": 1.7, "action_top_p": 0.5},
    "expected_with_little_weight": {"objectives": {"expected_inverse_soft_q": 0.4}, "gauge": "max"},
    "expected_with_lm": {"lm_weight": 0.6, "kd_ratio": 0.3, "tail_weight": 0.2} | MIXED,
    "expected_zero": {"label_outside": "zero", "truncation": "bootstrap", "gauge": "logsoftmax"},
    "top_k": {"action_set": "top_k", "action_top_k": 3},
    "min_p": {"action_set": "min_p", "action_min_p": 0.3},
    "threshold": {"action_set": "threshold", "action_threshold": 0.1},
    "full": {"action_set": "full", "max_actions": 20},
    "max_actions": {"max_actions": 4, "action_top_p": 0.95},
}
OPEN = {
    "expected_without_tail": {"tail_weight": 0.0},
    "expected_union": {"label_outside": "union", "tail_weight": 0.5, "action_top_p": 0.6},
    "expected_hard": {"backup": "hard", "tail_weight": 0.5},
    "expected_tau": {"entropy_weight": 0.5, "tail_weight": 1.5},
    "expected_without_the_end": {"train_eos": False},
    "expected_clipped": {"gauge": "max", "q_min": -3.0, "action_top_p": 0.95},
    "expected_chi2": CHI2 | {"gauge": "logsoftmax", "truncation": "terminal"},
    "expected_chi2_union": CHI2 | {"label_outside": "union", "truncation": "bootstrap"},
    "expected_chi2_teacher": CHI2 | {"chi2_center": "teacher", "gauge": "max", "label_outside": "union"} | MIXED,
    "expected_without_eos": {"train_eos": False, "backup": "student"} | CHI2,
    "paper": {"preset": "paper"},
    "paper_sampled": {"preset": "paper", "label_outside": "union", "truncation": "bootstrap"} | MIXED,
    "paper_zero": {"preset": "paper", "label_outside": "zero", "lm_weight": 0.0, "action_top_p": 0.5},
    "paper_clipped": {"preset": "paper", "q_min": -2.0, "truncation": "terminal", "gamma": 0.7},
    "paper_clipped_to_the_teacher": {"preset": "paper", "q_min": -2.0, "chi2_center": "teacher"},
    "masked_nll": MASKED_NLL,
    "masked_nll_union": MASKED_NLL | {"label_outside": "union", "action_top_p": 0.5, "backup": "hard"},
    "released": {"preset": "released"},
    "released_sampled": {"preset": "released", "chi2_alpha": math.inf, "truncation": "bootstrap"} | MIXED,
    "released_with_eos": {"preset": "released", "train_eos": True, "label_outside": "zero", "lm_weight": 0.0},
    "teacher_reward": only("teacher_reward", truncation="bootstrap", gauge="logsoftmax"),
    "teacher_reward_n_step": only("teacher_reward", returns="n_step", n_steps=2, action_top_p=0.6),
    "teacher_reward_3_steps": only(
        "teacher_reward", returns="n_step", n_steps=3, truncation="bootstrap", gauge="max", label_outside="union"
    ),
    "teacher_reward_lambda": only("teacher_reward", returns="lambda", td_lambda=0.6, truncation="terminal"),
    "teacher_reward_monte_carlo": only("teacher_reward", returns="monte_carlo", gauge="logsoftmax", gamma=0.9),
    "teacher_reward_hard": only("teacher_reward", backup="hard", truncation="bootstrap"),
    "teacher_reward_student": only("teacher_reward", backup="student", entropy_weight=0.6, gauge="max") | MIXED,
    "teacher_reward_teacher": only("teacher_reward", backup="teacher", label_outside="union", action_top_p=0.5),
    "teacher_reward_tau": only("teacher_reward", entropy_weight=0.5, detach_next=True, truncation="bootstrap"),
    "teacher_reward_without_eos": only("teacher_reward", returns="n_step", n_steps=3, train_eos=False),
    "sqil": only("sqil", truncation="bootstrap", gauge="logsoftmax") | MIXED,
    "sqil_monte_carlo": only("sqil", returns="monte_carlo", label_outside="zero", action_top_p=0.5),
    "sqil_lambda_union": only("sqil", returns="lambda", label_outside="union", train_eos=False, gauge="max") | MIXED,
    "sqil_target": only("sqil", target_ema=0.5, truncation="bootstrap", gauge="max", q_min=-3.0, learning_rate=1e-2),
    "sqil_target_n_step": only("sqil", target_ema=0.0, returns="n_step", learning_rate=1e-2, backup="student"),
    "large_margin": only("large_margin", action_top_p=0.6, label_outside="skip") | MIXED,
    "large_margin_union": only("large_margin", label_outside="union", margin=2.0, train_eos=False, gauge="max"),
    "soft_actor_critic": only("soft_actor_critic", truncation="bootstrap") | MIXED,
    "soft_actor_critic_tau": only("soft_actor_critic", entropy_weight=0.7, returns="n_step", action_top_p=0.6),
    "soft_actor_critic_union": only("soft_actor_critic", label_outside="union", action_top_p=0.5, returns="lambda"),
    "chi2_n_step": CHI2 | {"returns": "n_step", "n_steps": 3, "preset": "paper"},
    "chi2_lambda_teacher": CHI2 | {"returns": "lambda", "chi2_center": "teacher", "truncation": "bootstrap"},
    "chi2_monte_carlo_union": CHI2 | {"returns": "monte_carlo", "label_outside": "union", "detach_next": True},
    "several": {
        "objectives": {"expected_inverse_soft_q": 0.7, "sqil": 0.2, "large_margin": 0.4, "teacher_reward": 0.1},
        "lm_weight": 0.5,
        "kd_ratio": 0.0,
    }
    | MIXED,
}


def names_of(how, is_closed):
    """What is logged of a step."""
    names = ["set_size", "teacher_mass", "label_in_set"]
    if is_closed:
        names += ["set_forward_kl"]
    else:
        names += ["value", "implied_reward", *how.objectives]
        names += ["clipped"] if how.q_min > -math.inf else []
    if how.tail_weight > 0:
        names += ["tail", "student_mass"]
    if how.lm_weight > 0:
        names += ["nll", "forward_kl"] if how.kd_ratio > 0 else ["nll"]
    return names


def assert_not_trivial(step, how):
    """Ends, cut texts, sets of several sizes, labels outside of them where they matter, Q-values that are clipped."""
    states = step.states
    assert any(state.is_end for state in states) and any(state.is_cut for state in states)
    if how.max_actions == 256 and how.action_set != "top_k":
        assert len({len(state.known) for state in states}) > 3
    inside = [state.in_set for state in states]
    assert sum(inside) >= len(inside) / 4
    if how.lmbda == 0 and how.action_set == "top_p":
        assert not all(inside)
    if how.q_min > -4.0:
        assert 0 < sum(state.clipped for state in states) < 0.9 * len(states)
    if how.lmbda > 0:
        assert {state.on_policy for state in states} == {False, True}


@pytest.mark.parametrize("case", [*CLOSED, *OPEN])
def test_step_agrees_with_loops(tokenizer, tmp_path, case):
    overrides, is_closed = (CLOSED | OPEN)[case], case in CLOSED
    trainer, (_, teacher), how = recorded_run(tokenizer, tmp_path, **overrides), sparse_pair(), meaning(**overrides)
    step = assert_agrees(trainer, 1, teacher, names_of(how, is_closed), **(overrides | {"is_kl": is_closed}))
    assert_not_trivial(step, how)
    # Nothing else is trained
    assert same(weights(trainer.teacher.model), weights(teacher))


# Options, and whether the rest of the loss is a divergence
PATHS = {
    "alone": (only("path_consistency", lmbda=0.75, tail_weight=0.0), False),
    "n_step_with_tail": (
        only("path_consistency", lmbda=1.0, returns="n_step", n_steps=3, truncation="bootstrap"),
        False,
    ),
    "monte_carlo_beside_expected": (
        {
            "objectives": {"path_consistency": 0.2, "expected_inverse_soft_q": 1.0},
            "returns": "monte_carlo",
            "gamma": 1.0,
        }
        | {"lmbda": 0.75, "on_policy_weight": 0.4, "lm_weight": 0.5},
        True,
    ),
    "lambda_beside_rewards": (
        {"objectives": {"path_consistency": 0.5, "teacher_reward": 1.0}, "returns": "lambda", "lmbda": 0.75},
        False,
    ),
}


@pytest.mark.parametrize("case", PATHS)
def test_step_with_paths_agrees_with_loops(tokenizer, tmp_path, case):
    overrides, is_kl = PATHS[case]
    trainer = recorded_run(tokenizer, tmp_path, **overrides)
    names = ("set_size", *meaning(**overrides).objectives.keys() - {"expected_inverse_soft_q"})
    step = assert_agrees(trainer, 1, sparse_pair()[1], names, **(overrides | {"is_kl": is_kl}))
    values = step.values["path_consistency"]["on_policy"]
    assert sum(value > 0.01 for value in values) > len(values) / 2
    assert any(state.is_cut for state in step.states if state.on_policy)


def test_returns_of_the_cases_look_further_than_a_token(tokenizer, tmp_path):
    """Each return of the cases above is another number than that of one step."""
    trainer = recorded_run(tokenizer, tmp_path, **only("teacher_reward"))
    teacher, losses = sparse_pair()[1], set()
    for options in ({}, {"returns": "n_step", "n_steps": 2}, {"returns": "n_step", "n_steps": 3}, {"td_lambda": 0.6}):
        options = {"returns": "lambda"} | options if "td_lambda" in options else options
        losses.add(round(plain_step(trainer, 1, teacher, **only("teacher_reward", **options)).loss, 4))
    losses.add(round(plain_step(trainer, 1, teacher, **only("teacher_reward", returns="monte_carlo")).loss, 4))
    assert len(losses) == 5


# The second text


def lm_rows(num_rows=6):
    texts = ["The fox is red.", "A green bird said hello", "apples", "The sky is blue. The grass is green."]
    return Dataset.from_list([{"text": texts[i % 4] + "!" * (i // 4)} for i in range(num_rows)])


@pytest.mark.parametrize(
    "overrides",
    [
        {"preset": "paper"},
        {"preset": "paper", "kd_ratio": 0.0, "lmbda": 1.0},
        {"lm_weight": 0.3, "kd_ratio": 1.0} | MIXED,
        {"preset": "released", "chi2_alpha": math.inf},
        MASKED_NLL | {"lm_weight": 2.0},
    ],
    ids=str,
)
def test_step_with_second_text_agrees_with_loops(tokenizer, tmp_path, overrides):
    trainer = recorded_run(tokenizer, tmp_path, options={"lm_dataset": lm_rows()}, **overrides)
    assert [len(step.second) for step in trainer.record] == [4, 4]
    is_closed = overrides.get("preset", "expected") == "expected" and "objectives" not in overrides
    names = [name for name in names_of(meaning(**overrides), is_closed) if name not in ("nll", "forward_kl")]
    names += ["second_nll"] + (["second_forward_kl"] if overrides.get("kd_ratio", 0.5) > 0 else [])
    for number in (0, 1):
        step = assert_agrees(trainer, number, sparse_pair()[1], names, **(overrides | {"is_kl": is_closed}))
    assert "kd/off_policy/nll" not in entries_of(trainer)[0] and step.values["second_nll"]["off_policy"]


def test_second_text_is_dealt_out_once_per_pass(tokenizer, tmp_path):
    orders = []
    for seed in (1, 1, 2):
        trainer = recorded_run(
            tokenizer, tmp_path, max_steps=3, seed=seed, preset="paper", options={"lm_dataset": lm_rows()}
        )
        orders.append([tokenizer.decode(ids) for step in trainer.record for ids, _, _ in step.second])
    assert orders[0] == orders[1] != orders[2]
    expected = sorted(row["text"] + tokenizer.eos_token for row in lm_rows())
    # A row that is too long is cut
    expected = sorted(tokenizer.decode(tokenizer(text)["input_ids"][:12]) for text in expected)
    assert len(set(expected)) == 6
    assert sorted(orders[0][:6]) == expected == sorted(orders[0][6:]) and orders[0][:6] != orders[0][6:]


# Identities


def gradients_of(tokenizer, folder, **overrides):
    trainer = recorded_run(tokenizer, folder, **({"max_steps": 1} | overrides))
    return {name: value.double() for name, value in trainer.record[0].gradients.items()}, trainer


def expectation(moves):
    """V - E[Q] under the teacher's renormalised set."""
    p = moves.actions.teacher_on_set.softmax(dim=1)
    assert torch.equal(moves.actions.mask, p > 0)
    return moves.v_t - torch.where(moves.actions.mask, p * moves.q, 0.0).sum(dim=1)


@pytest.mark.parametrize("gauge", ["raw", "max", "logsoftmax"])
def test_closed_form_has_the_gradient_of_the_general_one(tokenizer, tmp_path, gauge):
    closed, trainer = gradients_of(tokenizer, tmp_path, **MIXED)
    general, other = gradients_of(tokenizer, tmp_path, gauge=gauge, options={"objective": expectation}, **MIXED)
    assert_same_gradients(general, closed)
    names = ("kd/off_policy/tail", "kd/on_policy/tail", "kd/off_policy/student_mass")
    for name in names:
        assert logged(other, name) == pytest.approx(logged(trainer, name), rel=1e-6)
    assert "kd/off_policy/set_forward_kl" not in entries_of(other)[0]
    assert "kd/off_policy/objective" in entries_of(other)[0]


def sft_gradients(trainer):
    """Of the mean negative log-likelihood of the trained tokens, by the model's own forward."""
    student = sparse_pair()[0]
    total, count = 0.0, 0
    for ids, labels, _ in trainer.record[0].rows:
        log_s = student(ids[None]).logits[0].log_softmax(-1)
        for i in range(len(labels) - 1):
            if labels[i + 1] != -100:
                total, count = total - log_s[i, labels[i + 1]], count + 1
    (total / count).backward()
    return (total / count).item(), {name: p.grad.double() for name, p in student.named_parameters()}


def test_inverse_soft_q_on_the_full_set_is_sft(tokenizer, tmp_path):
    overrides = MASKED_NLL | {"action_set": "full", "max_actions": 10**6}
    found, trainer = gradients_of(tokenizer, tmp_path, **overrides)
    loss, expected = sft_gradients(trainer)
    assert_same_gradients(found, expected)
    entry = entries_of(trainer)[0]
    assert entry["loss"] == pytest.approx(loss, rel=1e-5)
    assert entry["kd/off_policy/label_in_set"] == 1.0 and entry["kd/off_policy/set_size"] == len(tokenizer)


def test_expected_form_on_the_full_set_is_forward_kl(tokenizer, tmp_path):
    found, trainer = gradients_of(tokenizer, tmp_path, action_set="full", max_actions=10**6)
    student, teacher = sparse_pair()
    total, count = 0.0, 0
    for ids, labels, _ in trainer.record[0].rows:
        log_s = student(ids[None]).logits[0].log_softmax(-1)
        log_t = teacher(ids[None]).logits[0].log_softmax(-1).detach()
        for i in range(len(labels) - 1):
            if labels[i + 1] != -100:
                total, count = total + (log_t[i].exp() * (log_t[i] - log_s[i])).sum(), count + 1
    (total / count).backward()
    assert_same_gradients(found, {name: p.grad.double() for name, p in student.named_parameters()})
    assert entries_of(trainer)[0]["loss"] == pytest.approx((total / count).item(), rel=1e-5)


@pytest.mark.parametrize("overrides", [{"preset": "paper"}, only("sqil", returns="lambda")], ids=str)
def test_without_discount_nothing_of_the_next_state_is_left(tokenizer, tmp_path, overrides):
    """gamma = 0: the value of the next state, and so all that decides it, has no part."""
    base, _ = gradients_of(tokenizer, tmp_path, gamma=0.0, truncation="terminal", **overrides)
    for others in ({"truncation": "bootstrap"}, {"truncation": "terminal", "detach_next": True}):
        assert_same_gradients(gradients_of(tokenizer, tmp_path, gamma=0.0, **others, **overrides)[0], base)


def test_objective_of_the_callers_is_the_loss_and_sees_what_is_said(tokenizer, tmp_path):
    seen = []

    def objective(moves):
        seen.append(moves)
        return (moves.q_t - moves.returns(moves.q_t.detach(), moves.v_tp1)).abs()

    options = {"options": {"objective": objective}, "tail_weight": 0.0, "truncation": "terminal"}
    trainer = recorded_run(tokenizer, tmp_path, max_steps=1, **options, **MIXED)
    assert len(seen) == 2
    total = {False: [], True: []}
    for moves in seen:
        # One step: Q - (Q + gamma V') is gamma V'
        for value, on_policy in zip(0.99 * moves.v_tp1.abs(), moves.is_on_policy.tolist(), strict=True):
            total[on_policy].append(value.item())
        assert moves.vocab_size == len(tokenizer)
    expected = sum(weight * sum(total[on]) / len(total[on]) for on, weight in ((False, 0.7), (True, 0.3)))
    assert entries_of(trainer)[0]["loss"] == pytest.approx(expected, rel=1e-5)


# Evaluation


@pytest.mark.parametrize(
    "overrides",
    [{}, {"preset": "paper", "target_ema": 0.5}, {"preset": "released", "label_outside": "union"}],
    ids=str,
)
def test_evaluation_is_the_divergence_to_the_nucleus_for_any_batch_size(tokenizer, tmp_path, overrides):
    student, teacher = (model.double() for model in sparse_pair())
    results = []
    for size in (1, 3):
        trainer = make_trainer(
            tokenizer,
            tmp_path,
            eval_rows=sparse_rows(5),
            per_device_eval_batch_size=size,
            **overrides,
        )
        results.append(trainer.evaluate())
    assert results[0]["eval_loss"] == pytest.approx(results[1]["eval_loss"], rel=1e-6)
    found = {name: [] for name in ("set_forward_kl", "total_variation", "student_entropy", "nll", "tail", "set_size")}
    how = meaning(**overrides)
    for row in trainer.eval_dataset:
        ids, labels = torch.tensor([row["input_ids"]]), row["labels"]
        with torch.no_grad():
            log_s, log_t = (model(ids).logits[0].log_softmax(-1) for model in (student, teacher))
        for i in range(len(labels) - 1):
            if labels[i + 1] == -100:
                continue
            known = teacher_set(log_t[i], how)
            p = log_t[i][known].softmax(0)
            found["set_forward_kl"].append((p * (p.log() - log_s[i][known])).sum())
            found["total_variation"].append((log_s[i].exp() - log_t[i].exp()).abs().sum() / 2)
            found["student_entropy"].append(-(log_s[i].exp() * log_s[i]).sum())
            found["nll"].append(-log_s[i, labels[i + 1]])
            found["set_size"].append(torch.tensor(float(len(known))))
            members = {*known, labels[i + 1]} if how.label_outside == "union" else known
            found["tail"].append(-log_s[i][list(members)].logsumexp(0))
    for name, values in found.items():
        expected = torch.stack(values).mean().item()
        assert results[1][f"eval_kd/off_policy/{name}"] == pytest.approx(expected, rel=1e-5), name
    assert results[1]["eval_loss"] == results[1]["eval_kd/off_policy/set_forward_kl"]


# What the log says


def said(caplog, tokenizer, folder, options=None, **overrides):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="trl_kd"):
        make_trainer(tokenizer, folder, options=options, **overrides)
    return [r.message for r in caplog.records if r.name == "trl_kd.trainer.sparse_td_warnings"]


def test_run_without_temporal_difference_says_so(tokenizer, tmp_path, caplog):
    (message,) = said(caplog, tokenizer, tmp_path)
    assert message == (
        "`objectives` {'expected_inverse_soft_q': 1.0} with `chi2_alpha` inf and `gamma` 0.99 hold no temporal "
        "difference: the value of the next state cancels, and what is left is the forward KL to the teacher's "
        "renormalised set."
    )
    (message,) = said(caplog, tokenizer, tmp_path, **only("large_margin"))
    assert message.endswith("what is left is imitation state by state.")
    (message, _) = said(caplog, tokenizer, tmp_path, gamma=0.0, preset="paper", chi2_center="teacher")
    assert "`gamma` 0 hold no temporal difference" in message


@pytest.mark.parametrize("name", ["teacher_reward", "sqil", "soft_actor_critic"])
def test_run_with_temporal_difference_and_tail_is_silent(tokenizer, tmp_path, caplog, name):
    assert said(caplog, tokenizer, tmp_path, gauge="logsoftmax", lmbda=0.5, **only(name)) == []
    assert said(caplog, tokenizer, tmp_path, gauge="max", chi2_alpha=0.5, chi2_center="teacher") == []
    assert said(caplog, tokenizer, tmp_path, options={"objective": expectation}, gamma=0.0) == []


def test_runs_that_are_likely_mistakes_are_warned_of(tokenizer, tmp_path, caplog):
    tail, entropy = said(caplog, tokenizer, tmp_path, preset="paper")
    assert tail.startswith("`tail_weight` is 0: the language-model term alone holds the student back from tokens")
    assert entropy.startswith("`chi2_alpha` is 0.1: the square draws implied rewards to zero")
    assert entropy.endswith('`chi2_center="teacher"` draws them to the teacher\'s own.')
    (tail,) = said(caplog, tokenizer, tmp_path, preset="paper", lm_weight=0.0, chi2_center="teacher")
    assert tail.startswith("`tail_weight` and `lm_weight` are 0, so nothing keeps the student from tokens outside")
    for overrides in (
        only("teacher_reward"),
        only("soft_actor_critic"),
        {"chi2_alpha": 0.5, "chi2_center": "teacher"},
    ):
        (gauge,) = said(caplog, tokenizer, tmp_path, **overrides)
        assert gauge.startswith('`gauge` is "raw", but Q-values of student and teacher are compared')
    (rewards,) = said(caplog, tokenizer, tmp_path, **only("sqil"))
    assert rewards.startswith(
        "`sqil` rewards the teacher's text with 1 and the student's own with 0, but `lmbda` is 0"
    )
    assert len(said(caplog, tokenizer, tmp_path, lmbda=1.0)) == 1  # of the temporal difference alone
    _, sampled = said(caplog, tokenizer, tmp_path, lmbda=1.0, **only("large_margin"))
    assert sampled.startswith("`lmbda` is 1, so every row is the student's, but large_margin learns from the tokens")


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"preset": "best"},
            "`preset` is 'best', which does not exist. Choose one of 'expected', 'paper', 'released'",
        ),
        ({"action_set": "nucleus"}, "`action_set` is 'nucleus', which does not exist. Choose one of 'top_p', 'top_k'"),
        ({"label_outside": "drop"}, "`label_outside` is 'drop', which does not exist. Choose one of 'skip', 'union'"),
        ({"chi2_center": "one"}, "`chi2_center` is 'one', which does not exist"),
        ({"gauge": "min"}, "`gauge` is 'min', which does not exist. Choose one of 'raw', 'max', 'logsoftmax'"),
        ({"backup": "mellow"}, "`backup` is 'mellow', which does not exist"),
        ({"returns": "gae"}, "`returns` is 'gae', which does not exist. Choose one of 'one_step', 'n_step'"),
        ({"truncation": "skip"}, "`truncation` is 'skip', which does not exist"),
        *(
            ({name: value}, rf"`{name}` is {value}, but it is a probability mass. Set it in \(0, 1\]")
            for name in ("action_top_p", "action_min_p", "action_threshold")
            for value in (0.0, 1.1, -0.5, math.nan)
        ),
        ({"action_top_k": 0}, "`action_top_k` is 0, but it is a number of tokens"),
        ({"max_actions": 0}, "`max_actions` is 0, but it is a number of tokens"),
        ({"n_steps": 0}, "`n_steps` is 0, but it is a number of tokens"),
        ({"gamma": 1.1}, r"`gamma` is 1.1, but it discounts what follows. Set it in \[0, 1\]"),
        ({"gamma": -0.1}, "`gamma` is -0.1"),
        ({"td_lambda": 2.0}, "`td_lambda` is 2.0, but it is a share of what was seen"),
        ({"kd_ratio": 1.5}, "`kd_ratio` is 1.5, but it is a share of the language-model term"),
        ({"tail_weight": -1.0}, "`tail_weight` is -1.0, but it is a weight. Set it non-negative"),
        ({"lm_weight": -1.0}, "`lm_weight` is -1.0, but it is a weight"),
        ({"margin": -1.0}, "`margin` is -1.0, but it is"),
        ({"chi2_alpha": 0.0}, "`chi2_alpha` is 0.0, but values are divided by it. Set it above 0"),
        ({"entropy_weight": 0.0}, "`entropy_weight` is 0.0, but values are divided by it"),
        ({"entropy_weight": -1.0}, "`entropy_weight` is -1.0"),
        ({"target_ema": 1.5}, r"`target_ema` is 1.5, but it is the share of the copy that a step keeps. Set it in \["),
        (
            {"objectives": {"iql": 1.0}},
            "`objectives` names 'iql', which do not exist. Choose among 'expected_inverse_",
        ),
        ({"objectives": {"sqil": -1.0}}, r"`objectives\['sqil'\]` is -1.0, but it is a weight"),
        ({"packing": True, "lmbda": 0.5}, "`packing` is True with `lmbda` 0.5"),
    ],
)
def test_config_bad_value_raises(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        SparseTDConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_config_of_a_command_line(tmp_path):
    args = sparse_config(tmp_path, objectives='{"sqil": 0.5, "large_margin": 1.0}')
    assert args.objectives == {"sqil": 0.5, "large_margin": 1.0}


def test_field_that_is_given_wins_over_the_preset(tokenizer, tmp_path):
    given = sparse_config(tmp_path, preset="paper", q_min=-5.0, lm_weight=0.0)
    trainer = SparseTDTrainer(*sparse_pair(), given, sparse_rows(), processing_class=tokenizer)
    found = {
        name: getattr(trainer.args, name) for name in vars(meaning(preset="paper")) if hasattr(trainer.args, name)
    }
    assert found == {
        name: value
        for name, value in vars(meaning(preset="paper", q_min=-5.0, lm_weight=0.0)).items()
        if name in found
    }
    # The caller's own stays as it was
    assert given.gauge is None and given.objectives is None and given.tail_weight is None


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            lambda moves: moves.q,
            r"`objective` returned shape \(\d+, \d+\) for \d+ tokens, but each token has a weight",
        ),
        (lambda moves: moves.q_t.mean(), r"`objective` returned shape \(\) for \d+ tokens.*reduce nothing"),
        (lambda moves: 1.0, r"`objective` returned float for \d+ tokens"),
    ],
)
def test_objective_of_another_shape_raises(tokenizer, tmp_path, objective, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tokenizer, tmp_path, options={"objective": objective}).train()


def test_bad_second_text_raises(tokenizer, tmp_path):
    def build(lm_dataset, **overrides):
        make_trainer(tokenizer, tmp_path, options={"lm_dataset": lm_dataset}, **overrides)

    with pytest.raises(ValueError, match="`lm_dataset` is set, but `lm_weight` is 0, so nothing would be learned"):
        build(lm_rows())
    with pytest.raises(TypeError, match="`lm_dataset` is a IterableDataset, but its rows are drawn by their number"):
        build(lm_rows().to_iterable_dataset(), preset="paper")
    with pytest.raises(TypeError, match="`lm_dataset` is a list"):
        build(list(lm_rows()), preset="paper")
    with pytest.raises(ValueError, match="The lm dataset has no rows"):
        build(Dataset.from_dict({"text": []}), preset="paper")
    with pytest.raises(ValueError, match="`lm_dataset` has prompts alone, but the language-model term learns from"):
        build(lm_rows().rename_column("text", "prompt"), preset="paper")
    with pytest.raises(ValueError, match="The lm dataset has the columns `story`, none of which holds text"):
        build(lm_rows().rename_column("text", "story"), preset="paper")


@pytest.mark.parametrize("overrides", [{}, only("large_margin"), only("sqil", gamma=0.0)], ids=str)
def test_slow_copy_that_values_nothing_raises(tokenizer, tmp_path, overrides):
    with pytest.raises(
        ValueError, match="`target_ema` is 0.5, but no loss of `objectives` .* has the value of a next"
    ):
        make_trainer(tokenizer, tmp_path, target_ema=0.5, **overrides)
    # What the caller's own loss looks at is not known
    assert make_trainer(tokenizer, tmp_path, target_ema=0.5, options={"objective": expectation}, **overrides).target


def test_sets_of_a_single_token_have_no_loss_on_the_set(tokenizer, tmp_path):
    """A teacher that is sure of one token: the masked likelihood of it is 1 whatever the student says."""
    student, teacher = sparse_pair()
    with torch.no_grad():
        teacher.get_output_embeddings().weight.mul_(1e3)
    options = {"models": (student, teacher), "max_steps": 1}
    trainer = recorded_run(tokenizer, tmp_path, **MASKED_NLL, **options)
    entry = entries_of(trainer)[0]
    assert entry["kd/set_size_max"] == 1 and entry["loss"] == 0
    assert all(torch.isfinite(value).all() and not value.any() for value in trainer.record[0].gradients.values())
    for overrides in ({}, {"preset": "paper"}, only("soft_actor_critic"), only("teacher_reward", backup="student")):
        student, teacher = sparse_pair()
        with torch.no_grad():
            teacher.get_output_embeddings().weight.mul_(1e3)
        trainer = recorded_run(tokenizer, tmp_path, models=(student, teacher), max_steps=1, **overrides)
        assert math.isfinite(entries_of(trainer)[0]["loss"])
        assert all(torch.isfinite(value).all() for value in trainer.record[0].gradients.values())


MASKED_ROWS = [{"input_ids": [5, 6, 7, 2], "labels": [-100, -100, -100, -100], "prompt_length": 1}]
TRAINED_ROWS = [{"input_ids": [5, 6, 7, 2], "labels": [-100, 6, 7, 2], "prompt_length": 1}]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"preset": "paper", "truncation": "bootstrap"},
        {"preset": "released", "label_outside": "union"},
        only("teacher_reward", returns="lambda", gauge="logsoftmax", target_ema=0.5),
    ],
    ids=str,
)
def test_batch_without_a_trained_token_has_a_zero_gradient(tokenizer, tmp_path, overrides):
    trainer = make_trainer(tokenizer, tmp_path, rows=TRAINED_ROWS * 4, **overrides)
    batch = trainer.data_collator(MASKED_ROWS * 2)
    batch["token_counts"] = torch.zeros(2)
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad.any() for p in trainer.model.parameters() if p.grad is not None)


def test_dataset_of_prompts_alone_asks_the_teacher_for_text(tokenizer, tmp_path):
    rows = [{"prompt": row["prompt"]} for row in sparse_rows(8)]
    trainer = recorded_run(tokenizer, tmp_path, rows, preset="paper", temperature=0.0)
    for number in (0, 1):
        step = assert_agrees(trainer, number, sparse_pair()[1], preset="paper")
        assert not any(state.on_policy for state in step.states)

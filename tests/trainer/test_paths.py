"""Path consistency of rollouts against plain loops over texts."""

import copy

import pytest
import torch

from tests.trainer.sparse import (
    assert_same_gradients,
    entries_of,
    make_trainer,
    plain_step,
    recorded_run,
    sparse_config,
    sparse_pair,
)


WEIGHT = 0.3
OBJECTIVES = {"expected_inverse_soft_q": 1.0, "path_consistency": WEIGHT}
SAMPLED = {"lmbda": 0.5, "per_device_train_batch_size": 4, "on_policy_weight": 0.4}


def log_ratios(student, teacher, row):
    """log pi - log pi* of the trained tokens of a row."""
    ids, labels, _ = row
    with torch.no_grad():
        log_t = teacher(ids[None]).logits[0].log_softmax(-1)
    log_s = student(ids[None]).logits[0].log_softmax(-1)
    return [(log_s[i] - log_t[i])[labels[i + 1]] for i in range(len(labels) - 1) if labels[i + 1] != -100]


def path_returns(ratios, returns, gamma, options):
    """The return of each token, by its definition."""
    if returns == "lambda":
        found = [ratios[-1]]
        for ratio in ratios[-2::-1]:
            found.insert(0, ratio + gamma * options["td_lambda"] * found[0])
        return found
    length = {"one_step": 1, "n_step": options.get("n_steps"), "monte_carlo": len(ratios)}[returns]
    return [sum(gamma**k * ratio for k, ratio in enumerate(ratios[t : t + length])) for t in range(len(ratios))]


def plain_paths(record, teacher, returns, gamma, options):
    """Mean over the on-policy tokens of (R - b)^2 / 2, and all returns by position."""
    student = copy.deepcopy(sparse_pair()[0]).double()
    student.load_state_dict(record.student)
    teacher = copy.deepcopy(teacher).double().requires_grad_(False)
    rows = [log_ratios(student, teacher, row) for row in record.rows if row[2]]
    found = [path_returns(row, returns, gamma, options) for row in rows]
    values = []
    for i, row in enumerate(found):
        for t, value in enumerate(row):
            others = [other[t].detach() for j, other in enumerate(found) if j != i and len(other) > t]
            center = sum(others) / len(others) if others else value.detach()
            values.append(0.5 * (value - center) ** 2)
    return student, sum(values) / len(values), found


@pytest.mark.parametrize(
    ("returns", "gamma", "options"),
    [
        ("monte_carlo", 1.0, {}),
        ("monte_carlo", 0.9, {"truncation": "bootstrap"}),
        ("n_step", 0.9, {"n_steps": 2}),
        ("lambda", 0.95, {"td_lambda": 0.5}),
        ("one_step", 1.0, {}),
    ],
)
def test_path_consistency_agrees_with_loops(tokenizer, tmp_path, returns, gamma, options):
    settings = SAMPLED | options | {"returns": returns, "gamma": gamma}
    trainer = recorded_run(tokenizer, tmp_path, objectives=OBJECTIVES, **settings)
    teacher = sparse_pair()[1]
    for number, entry in enumerate(entries_of(trainer)):
        record = trainer.record[number]
        base = plain_step(trainer, number, teacher, **settings)
        student, value, found = plain_paths(record, teacher, returns, gamma, options)
        assert len(found) > 2 and len({len(row) for row in found}) > 1  # texts of several lengths
        share = WEIGHT * trainer.args.on_policy_weight
        (share * value).backward()
        own = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        expected = {name: base.gradients[name] + own[name] for name in base.gradients}
        assert max(part.norm() for part in own.values()) > 1e-3
        assert_same_gradients(record.gradients, expected)
        assert entry["kd/on_policy/path_consistency"] == pytest.approx(value.item(), rel=1e-5)
        assert entry["loss"] == pytest.approx(without_entropy(base) + share * value.item(), rel=1e-4)


def without_entropy(step):
    """The loss of the closed form, which leaves out the entropy of the teacher's nucleus."""
    sums = {True: [], False: []}
    for state in step.states:
        sums[state.on_policy].append(-sum(float(p * p.log()) for p in state.p.values()))
    means = {source: sum(part) / len(part) for source, part in sums.items()}
    return step.loss - 0.6 * means[False] - 0.4 * means[True]


def test_path_consistency_does_not_depend_on_the_split(tokenizer, tmp_path):
    gradients = []
    for size, accumulation in ((8, 1), (2, 4)):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        options = SAMPLED | split | {"temperature": 0.0, "objectives": OBJECTIVES, "returns": "monte_carlo"}
        trainer = recorded_run(tokenizer, tmp_path, **options)
        gradients.append(trainer.record[0].gradients)
    assert_same_gradients(*[{n: g.double() for n, g in part.items()} for part in gradients], rel=1e-4)


def test_path_consistency_alone_trains_without_a_set(tokenizer, tmp_path):
    settings = SAMPLED | {"objectives": {"path_consistency": 1.0}, "returns": "monte_carlo", "tail_weight": 0.0}
    trainer = recorded_run(tokenizer, tmp_path, **settings)
    student, value, _ = plain_paths(trainer.record[0], sparse_pair()[1], "monte_carlo", 0.99, {})
    (0.4 * value).backward()
    expected = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert_same_gradients(trainer.record[0].gradients, expected)


def test_path_consistency_of_equal_models_is_zero(tokenizer, tmp_path):
    teacher = sparse_pair()[1]
    settings = SAMPLED | {"objectives": OBJECTIVES, "returns": "monte_carlo", "max_steps": 1}
    trainer = make_trainer(tokenizer, tmp_path, models=(copy.deepcopy(teacher), teacher), **settings)
    trainer.train()
    assert entries_of(trainer)[0]["kd/on_policy/path_consistency"] == pytest.approx(0.0, abs=1e-9)


def test_path_consistency_without_rollouts_raises(tmp_path):
    with pytest.raises(
        ValueError, match="'path_consistency' with `lmbda` 0, but it learns from the student's own text"
    ):
        sparse_config(tmp_path, objectives=OBJECTIVES)

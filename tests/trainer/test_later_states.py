"""What a token does to later states: advantages against loops, the gradient against the enumeration of a game."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.losses.test_tabular_game import LARGER, TABLE
from tests.references import game as reference
from tests.trainer import plain
from tests.trainer.plain import SOURCES, Recorder
from tests.trainer.runs import config, logged, pair, same, tiny_dataset, weights
from trl_kd import AMMConfig, AMMTrainer
from trl_kd.losses import Term, cross_entropy, discount_weights, exact_moment, linear_loss
from trl_kd.modules import LMHead
from trl_kd.trainer.later_states import COSTS, StateValue, later_advantages
from trl_kd.trainer.tokens import TokenBatch


ONE_RANK = SimpleNamespace(num_processes=1, gather=lambda tensor: tensor)
COST = pytest.mark.parametrize("cost", ["total_variation", "jsd", "reverse_kl"])
# Lengths of the rows of three micro-batches, and who wrote them; one rollout is longer than all others
STEP = [[(3, True), (2, False), (1, True)], [(4, True), (3, False)], [(2, False), (6, True), (4, True)]]


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def args_of(**overrides):
    settings = {
        "later_gamma": 0.9,
        "later_cost": "total_variation",
        "later_baseline": "position",
        "max_completion_length": 6,
        "generation_kwargs": None,
        "loss_chunk_size": None,
    }
    return SimpleNamespace(**(settings | overrides))


def batch_of(rows, seed, dtype=torch.float64):
    """A micro-batch with random states of students and teachers under random heads."""
    lengths = [length for length, _ in rows]
    total = sum(lengths)
    heads = [LMHead(normal(5, width, seed=90 + width).to(dtype)) for width in (3, 4)]
    pairs = {
        name: (normal(total, head.weight.shape[1], seed=seed + i).to(dtype), head)
        for i, (name, head) in enumerate(zip(("student", "teacher"), heads, strict=True))
    }
    return TokenBatch(
        pairs=pairs,
        labels=torch.zeros(total, dtype=torch.long),
        weights=torch.ones(total),
        source_weights=torch.ones(total),
        is_on_policy=torch.tensor([on_policy for length, on_policy in rows for _ in range(length)], dtype=torch.bool),
        positions=torch.tensor([t for length in lengths for t in range(length)], dtype=torch.long),
    )


def step_of(rows=STEP, dtype=torch.float64):
    return [batch_of(each, seed=10 * i, dtype=dtype) for i, each in enumerate(rows)]


def plain_cost(log_s, log_t, cost):
    """Of lists of log-probabilities."""
    q, p = [math.exp(number) for number in log_s], [math.exp(number) for number in log_t]
    if cost == "total_variation":
        return sum(abs(p[v] - q[v]) for v in range(len(q)))
    if cost == "reverse_kl":
        return sum(q[v] * (log_s[v] - log_t[v]) for v in range(len(q)))
    m = [(p[v] + q[v]) / 2 for v in range(len(q))]
    jsd = sum(p[v] * math.log(p[v] / m[v]) + q[v] * math.log(q[v] / m[v]) for v in range(len(q))) / 2
    return jsd * 2 / math.log(2)


def plain_costs(tokens, cost):
    """Cost of each token of each row, as lists of rows by micro-batch."""
    found = []
    for batch in tokens:
        rows = []
        log_s, log_t = (head(hidden).log_softmax(-1).tolist() for hidden, head in batch.pairs.values())
        for i, position in enumerate(batch.positions.tolist()):
            if position == 0:
                rows.append([])
            rows[-1].append(plain_cost(log_s[i], log_t[i], cost))
        found.append(rows)
    return found


def plain_returns(costs, gamma):
    return [sum(gamma ** (k - t) * costs[k] for k in range(t + 1, len(costs))) for t in range(len(costs))]


def plain_advantages(tokens, step, args):
    """Returns less the mean of what the other rollouts got at the same position."""
    costs = plain_costs(tokens, args.later_cost)
    returns = [[plain_returns(row, args.later_gamma) for row in rows] for rows in costs]
    rollouts = [(i, j) for i, rows in enumerate(step) for j, (_, on_policy) in enumerate(rows) if on_policy]
    found = []
    for i, rows in enumerate(step):
        found.append([])
        for j, (length, on_policy) in enumerate(rows):
            for t in range(length):
                others = [returns[a][b][t] for a, b in rollouts if (a, b) != (i, j) and len(returns[a][b]) > t]
                signal = on_policy and others
                found[-1].append(returns[i][j][t] - sum(others) / len(others) if signal else 0.0)
    return found


# Advantages


@COST
@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_later_advantages_by_position_equal_the_double_loop(cost, gamma):
    tokens, args = step_of(), args_of(later_cost=cost, later_gamma=gamma)
    found = later_advantages(tokens, args, ONE_RANK)
    expected = plain_advantages(tokens, STEP, args)
    assert max(map(max, expected)) > 0.1
    for part, numbers in zip(found, expected, strict=True):
        assert part.dtype == torch.float64 and part.tolist() == pytest.approx(numbers, abs=1e-12)


def test_later_advantages_literal_costs_have_the_values_by_hand():
    # Two tokens; the teacher is even, the student sure to degrees: costs 2 |q - 1/2| of 0.2, 0.6 and 0.8, 0.4
    head = LMHead(torch.eye(2, dtype=torch.float64))
    likely = torch.tensor([0.6, 0.8, 0.9, 0.7], dtype=torch.float64)
    student = torch.stack([likely, 1 - likely], dim=1).log()
    pairs = {"student": (student, head), "teacher": (torch.zeros(4, 2, dtype=torch.float64), head)}
    rows = batch_of([(2, True), (2, True)], seed=0)
    batch = TokenBatch(pairs, rows.labels, rows.weights, rows.source_weights, rows.is_on_policy, rows.positions)
    (found,) = later_advantages([batch], args_of(later_gamma=0.5), ONE_RANK)
    # Returns 0.5 * 0.6 and 0.5 * 0.4, nothing after the last token; each less the other
    assert found.tolist() == pytest.approx([0.1, 0.0, -0.1, 0.0], abs=1e-12)


def test_later_advantages_of_off_policy_and_lonely_tokens_are_zero():
    found = later_advantages(step_of(), args_of(), ONE_RANK)
    for part, rows in zip(found, STEP, strict=True):
        off_policy = torch.tensor([not on_policy for length, on_policy in rows for _ in range(length)])
        assert torch.equal(part[off_policy], torch.zeros(int(off_policy.sum()), dtype=torch.float64))
    # The rollout of six tokens is alone from its fifth on
    longest = found[2][2:8]
    assert (longest[:4].abs() > 1e-3).all() and longest[4:].tolist() == [0.0, 0.0]


def test_later_advantages_of_all_rollouts_at_a_position_sum_to_zero():
    tokens = step_of([[(4, True), (4, True)], [(4, True)]])
    total = sum(part.view(-1, 4).sum(0) for part in later_advantages(tokens, args_of(), ONE_RANK))
    torch.testing.assert_close(total, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("baseline", ["position", "value"])
def test_later_advantages_without_rollouts_are_zero(baseline):
    tokens = step_of([[(3, False)], [(2, False), (1, False)]])
    value = StateValue(3 + 4 + 5).double()
    found = later_advantages(
        tokens, args_of(later_baseline=baseline), ONE_RANK, value if baseline == "value" else None
    )
    assert [part.tolist() for part in found] == [[0.0] * 3, [0.0] * 3]
    assert not value.gram.any()


def test_later_advantages_rollouts_may_be_as_long_as_generation_kwargs_say():
    tokens = step_of([[(9, True), (9, True)]])
    args = args_of(generation_kwargs={"max_new_tokens": 9})
    (found,) = later_advantages(tokens, args, ONE_RANK)
    expected = plain_advantages(tokens, [[(9, True), (9, True)]], args)[0]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


@COST
def test_costs_equal_their_plain_functions(cost):
    student, teacher = 2 * normal(6, 7, seed=0), 2 * normal(6, 7, seed=1)
    rows = zip(student.log_softmax(-1).tolist(), teacher.log_softmax(-1).tolist(), strict=True)
    expected = [plain_cost(log_s, log_t, cost) for log_s, log_t in rows]
    function, factor = COSTS[cost]
    assert (factor * function(student, teacher)).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("cost", ["total_variation", "jsd"])
def test_costs_of_policies_that_share_no_token_are_two(cost):
    student, teacher = torch.tensor([[1e4, 0.0, 0.0]]), torch.tensor([[0.0, 1e4, 0.0]])
    function, factor = COSTS[cost]
    assert factor * function(student, teacher).item() == pytest.approx(2.0, rel=1e-6)


# With a value baseline


def plain_features(batch, args):
    """Of the rollouts of a micro-batch: both states, position, cost, entropies of student and teacher, 1."""
    (student, student_head), (teacher, teacher_head) = batch.pairs.values()
    rows = []
    for i in batch.is_on_policy.nonzero()[:, 0].tolist():
        log_s, log_t = (h(x[i]).log_softmax(-1) for x, h in ((student, student_head), (teacher, teacher_head)))
        states = [x[i] / x[i].square().mean().sqrt() for x in (teacher, student)]
        cost = plain_cost(log_s.tolist(), log_t.tolist(), args.later_cost)
        entropies = [-sum(math.exp(number) * number for number in each.tolist()) for each in (log_s, log_t)]
        position = batch.positions[i].item() / args.max_completion_length
        rows.append([*states[0].tolist(), *states[1].tolist(), position, cost, *entropies, 1.0])
    return np.array(rows)


def ridge(steps, shrink=0.9, strength=0.1):
    """Least squares over all steps so far: older ones count less, and a row of zeros for each weight."""
    rows, targets = [], []
    for age, (x, g) in enumerate(reversed(steps)):
        rows.append(math.sqrt(shrink**age) * x)
        targets.append(math.sqrt(shrink**age) * g)
    size = sum((row**2).sum() for row in rows) / rows[0].shape[1]
    rows.append(math.sqrt(strength * size) * np.eye(rows[0].shape[1]))
    targets.append(np.zeros(rows[0].shape[1]))
    return np.linalg.lstsq(np.concatenate(rows), np.concatenate(targets), rcond=None)[0]


def test_state_value_equals_least_squares_with_numpy():
    value = StateValue(4).double()
    steps = []
    for seed in range(3):
        x, g = normal(7 + seed, 4, seed=seed), normal(7 + seed, seed=10 + seed)
        value.update(x.T @ x, x.T @ g)
        steps.append((x.numpy(), g.numpy()))
        asked = normal(5, 4, seed=20 + seed)
        (found,) = value([asked])
        assert found.tolist() == pytest.approx((asked.numpy() @ ridge(steps)).tolist(), rel=1e-6)  # it is rounded


def test_state_value_before_the_first_update_is_zero():
    assert [part.tolist() for part in StateValue(3)([torch.ones(2, 3), torch.ones(0, 3)])] == [[0.0, 0.0], []]


def test_state_value_has_buffers_alone():
    value = StateValue(3)
    assert list(value.parameters()) == [] and sorted(value.state_dict()) == ["gram", "target"]


@COST
def test_later_advantages_with_a_value_baseline_equal_the_loop(cost):
    args, value, steps = args_of(later_cost=cost, later_baseline="value", later_gamma=0.8), StateValue(12).double(), []
    for number in range(3):
        tokens = [batch_of(rows, seed=100 * number + 10 * i) for i, rows in enumerate(STEP)]
        found = later_advantages(tokens, args, ONE_RANK, value)
        costs = plain_costs(tokens, cost)
        features, returns = [], []
        for i, (batch, rows) in enumerate(zip(tokens, STEP, strict=True)):
            features.append(plain_features(batch, args))
            # Of older steps only
            values = iter(features[-1] @ ridge(steps) if steps else np.zeros(len(features[-1])))
            expected = []
            for j, (length, on_policy) in enumerate(rows):
                if not on_policy:
                    expected += [0.0] * length
                    continue
                v, c = [next(values) for _ in range(length)], costs[i][j]
                returns += plain_returns(c, 0.8)
                deltas = [0.8 * (c[t + 1] + v[t + 1]) - v[t] for t in range(length - 1)] + [-v[-1]]
                expected += [sum((0.8 * 0.9) ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)]
            assert found[i].tolist() == pytest.approx(expected, abs=1e-6)  # the ridge is rounded to float32
        steps.append((np.concatenate(features), np.array(returns)))


def test_state_value_sums_under_autocast_are_those_without():
    sums = []
    for enabled in (False, True):
        value = StateValue(12)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            later_advantages(step_of(dtype=torch.float32), args_of(later_baseline="value"), ONE_RANK, value)
        sums.append(value.gram[:7, :7])  # of the states; cost and entropies come from products in bfloat16
    assert sums[0].abs().mean() > 1.0
    assert torch.equal(*sums)


# The gradient


def texts_as_tokens(game, texts, student, teacher):
    """Rollouts of a game as the trainer would select them; hidden states are one-hot."""
    index = {state: i for i, state in enumerate(game.states)}
    at = torch.tensor([index[text[:t]] for text in texts for t in range(game.length)])
    hidden = torch.eye(len(game.states), dtype=torch.float64)[at]
    ones = torch.ones(len(at), dtype=torch.float64)
    return TokenBatch(
        pairs={"student": (hidden, LMHead(student.T)), "teacher": (hidden, LMHead(teacher.T))},
        labels=torch.tensor([token for text in texts for token in text]),
        weights=ones / len(texts),
        source_weights=ones / len(texts),
        is_on_policy=ones.bool(),
        positions=torch.arange(game.length).repeat(len(texts)),
    )


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize(
    ("game", "num_rollouts"), [(TABLE, 2), (TABLE, 3), (LARGER, 2)], ids=["pair", "triple", "larger"]
)
def test_direct_and_later_gradient_is_on_average_the_full_gradient(game, num_rollouts, gamma):
    """At weight 1, over all samples of a few rollouts: the baseline of the others does not bend it."""
    table = {
        name: torch.tensor([policy[s] for s in game.states], dtype=torch.float64).log()
        for name, policy in (("student", game.student), ("teacher", game.teacher))
    }
    student = table["student"].requires_grad_()
    args = args_of(later_gamma=gamma, max_completion_length=game.length)
    total, mass = 0.0, 0.0
    for texts in itertools.combinations_with_replacement(game.texts, num_rollouts):
        tokens = texts_as_tokens(game, texts, student, table["teacher"])
        (advantages,) = later_advantages([tokens.detach()], args, ONE_RANK)
        orders = len(set(itertools.permutations(texts)))
        chance = orders * math.prod(reference.probability(game.student, text) for text in texts)
        row_weights = chance * tokens.weights * discount_weights(tokens.positions, gamma)
        terms = {
            "moment": Term(exact_moment, weights=row_weights),
            "later": Term(cross_entropy, ("student", "labels"), -row_weights * advantages),
        }
        total = total + linear_loss(tokens.pairs, terms, tokens.labels).loss
        mass += chance
    assert mass == pytest.approx(1.0, abs=1e-12)
    (gradient,) = torch.autograd.grad(total, student)
    worst = {
        state: [1.0 if p > q else -1.0 for p, q in zip(game.teacher[state], game.student[state], strict=True)]
        for state in game.states
    }
    expected, direct = (
        torch.tensor([numbers[state] for state in game.states], dtype=torch.float64)
        for numbers in (
            reference.student_gradient(game, game.student, worst, gamma, follow_states=follow)
            for follow in (True, False)
        )
    )
    assert (expected - direct).abs().max() > 0.01
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


SPLITS = [(4, 1), (2, 2), (1, 4)]
FULL = {"on_policy_gradient": "full", "temperature": 0.0}
GAMES = {
    "position": {"later_weight": 2.0, "later_warmup_steps": 4, "later_gamma": 0.8, "gamma": 0.9},
    "value": {
        "later_baseline": "value",
        "later_cost": "jsd",
        "later_weight": 1.5,
        "later_warmup_steps": 0,
        "on_policy_weight": 0.3,
        "critic": "value_head",
    },
}


@pytest.fixture(scope="module", params=GAMES)
def games(request, tokenizer, tmp_path_factory):
    """One game under each split; a small rate, see `test_critics.py`."""
    folder, runs = tmp_path_factory.mktemp(request.param), []
    for size, accumulation in SPLITS:
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        args = config(folder / str(size), learning_rate=1e-4, **sizes, **FULL, **GAMES[request.param])
        student, teacher = pair(tokenizer)
        runs.append(Recorder(student, teacher, args, tiny_dataset(), tiny_dataset(4), tokenizer))
        runs[-1].train()
    return runs


def test_full_gradient_any_split_logs_the_same_numbers(games):
    whole, *others = games
    names = [name for name in whole.state.log_history[0] if name.startswith("kd/")] + ["loss", "grad_norm"]
    assert min(logged(whole, "kd/on_policy/advantage_size")) > 0.02
    assert "kd/on_policy/later_states" not in names
    for other in others:
        for name in names:
            expected = logged(whole, name)
            # The loss holds advantages times log-likelihoods of size 10, which nearly cancel
            rounding = 3e-5 if name == "loss" else 1e-7
            assert len(expected) == 2 and logged(other, name) == pytest.approx(expected, rel=1e-5, abs=rounding), name


def advantages_of(tokens, args, steps):
    """Of one optimizer step, from the rollouts in plain tensors; `steps` are older ones, and gets this one."""
    log_s, log_t = tokens.log_s.detach(), tokens.log_t
    costs = [plain_cost(*pair, args.later_cost) for pair in zip(log_s.tolist(), log_t.tolist(), strict=True)]
    rows = [torch.nonzero(tokens.row == row)[:, 0].tolist() for row in tokens.row.unique().tolist()]
    returns = [0.0] * len(costs)
    for row in rows:
        for i, number in zip(row, plain_returns([costs[i] for i in row], args.later_gamma), strict=True):
            returns[i] = number
    found = [0.0] * len(costs)
    if args.later_baseline == "position":
        for row in rows:
            for t, i in enumerate(row):
                others = [returns[other[t]] for other in rows if other is not row and len(other) > t]
                found[i] = returns[i] - sum(others) / len(others) if others else 0.0
        return torch.tensor(found, dtype=torch.float64)
    entropies = [-(each.exp() * each).sum(-1, keepdim=True) for each in (log_s, log_t)]
    scalars = [tokens.positions[:, None] / args.max_completion_length, torch.tensor(costs)[:, None], *entropies]
    x = torch.cat([tokens.x_t, tokens.x_s, *scalars, torch.ones(len(costs), 1)], dim=1).double().numpy()
    values = x @ ridge(steps) if steps else np.zeros(len(costs))
    for row in rows:
        v, c = [values[i] for i in row], [costs[i] for i in row]
        deltas = [args.later_gamma * (c[t + 1] + v[t + 1]) - v[t] for t in range(len(row) - 1)] + [-v[-1]]
        for t, i in enumerate(row):
            found[i] = sum((args.later_gamma * 0.9) ** (k - t) * deltas[k] for k in range(t, len(row)))
    steps.append((x, np.array(returns)))
    return torch.tensor(np.array(found), dtype=torch.float64)


def test_full_gradient_equals_plain_logits_with_ramp_in(games, tokenizer):
    trainer, steps = games[1], []
    args, embeddings = trainer.args, plain.embeddings_of(tokenizer)
    for step, log in enumerate(trainer.state.log_history[:2]):
        student, tokens = plain.read(trainer, tokenizer, step)
        loss = 0.0
        for source, share in zip(SOURCES, (1 - args.on_policy_weight, args.on_policy_weight), strict=True):
            these = tokens[source]
            values = (these.log_t - these.log_s.detach()).sign()
            if args.critic == "value_head":
                values = plain.critic_values(trainer.critics_after(step), source, these.features, embeddings, args)
            loss = loss + share * (these.discount * plain.moments(these, values)).mean()
        these = tokens["on_policy"]
        advantages = advantages_of(these, args, steps)
        assert log["kd/on_policy/advantage_size"] == pytest.approx(advantages.abs().mean().item(), rel=1e-4)
        log_probs = these.log_s.gather(-1, these.labels[:, None])[:, 0]
        # 1/4, 2/4, ... of the weight over four steps
        weight = args.later_weight * (min(1.0, (step + 1) / 4) if args.later_warmup_steps else 1.0)
        direct = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True, retain_graph=True)
        surrogate = weight * args.on_policy_weight * (these.discount * advantages * log_probs).mean()
        gradients = torch.autograd.grad(loss + surrogate, list(student.parameters()), allow_unused=True)
        pairs = zip(gradients, direct, strict=True)
        assert plain.norm([full - part for full, part in pairs if full is not None]) > 0.1 * plain.norm(direct)
        assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)  # the moments alone
        # Of the advantages in float32, through a regression
        assert log["grad_norm"] == pytest.approx(plain.norm(gradients), rel=1e-4)


def test_full_gradient_evaluation_is_that_of_the_direct_one(games):
    trainer = games[0]
    before = weights(trainer.auxiliary.modules)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == metrics["eval_kd/off_policy/total_variation"] > 0.1
    assert not any("later" in name or "advantage" in name for name in metrics)
    assert same(weights(trainer.auxiliary.modules), before)


@pytest.mark.parametrize(("size", "accumulation"), [(4, 1), (2, 2)])
def test_full_gradient_with_critics_that_rise_after_meets_them_a_step_later(tokenizer, tmp_path, size, accumulation):
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    args = config(tmp_path, critic="value_head", critic_order="after", **sizes, **FULL)
    student, teacher = pair(tokenizer)
    trainer = Recorder(student, teacher, args, tiny_dataset(), processing_class=tokenizer)
    trainer.train()
    for source in SOURCES:
        met, unseen = logged(trainer, f"kd/{source}/moment"), logged(trainer, f"kd/{source}/unseen_moment")
        assert met[0] == 0.0 and met[1] > 0.1
        assert met == pytest.approx(unseen, rel=1e-5)


# Configuration


@pytest.mark.parametrize(
    "options", [{"lmbda": 0.0}, {"lmbda": 1.0}, {"on_policy_weight": 0.0}, {"on_policy_weight": 1.0}]
)
def test_config_full_gradient_without_both_sources_raises(tmp_path, options):
    settings = {"lmbda": 0.5, "on_policy_weight": 0.5} | options
    message = (
        f"`on_policy_gradient` is 'full' with `lmbda` {settings['lmbda']} and `on_policy_weight` "
        f"{settings['on_policy_weight']}. The effect on later states is one of rollouts, and without off-policy rows "
        "to hold it the student collapses into a few easy states. Set both strictly between 0 and 1."
    )
    with pytest.raises(ValueError) as error:
        AMMConfig(output_dir=str(tmp_path), use_cpu=True, on_policy_gradient="full", **options)
    assert str(error.value) == message
    assert AMMConfig(output_dir=str(tmp_path), use_cpu=True, **options).on_policy_gradient == "direct"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"on_policy_gradient": "half"},
            "`on_policy_gradient` is 'half', which does not exist. Choose one of 'direct', ",
        ),
        ({"later_cost": "tv"}, "`later_cost` is 'tv', which does not exist. Choose one of 'total_variation', 'jsd', "),
        ({"later_baseline": "mean"}, "`later_baseline` is 'mean', which does not exist. Choose one of 'position', "),
        ({"later_gamma": 0.0}, r"`later_gamma` is 0.0, but it discounts later tokens. Set it in \(0, 1\]"),
        ({"later_gamma": 1.1}, "`later_gamma` is 1.1, but it discounts later tokens"),
        ({"later_weight": -0.3}, "`later_weight` is -0.3, but it is the weight of a loss. Set it non-negative"),
        ({"later_warmup_steps": -1}, "`later_warmup_steps` is -1, but it is a number of steps. Set it non-negative"),
    ],
)
def test_config_of_later_states_bad_value_raises(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        AMMConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_rollouts_longer_than_the_limit_of_the_configuration_have_a_baseline(tokenizer, tmp_path):
    student, teacher = pair(tokenizer)
    lengths = {"max_completion_length": 2, "generation_kwargs": {"max_length": 40, "max_new_tokens": None}}
    args = config(tmp_path, on_policy_gradient="full", max_steps=1, **lengths)
    trainer = AMMTrainer(student, teacher, args, tiny_dataset(), processing_class=tokenizer)
    trainer.train()
    assert logged(trainer, "kd/on_policy/completion_length")[0] > 6
    assert logged(trainer, "kd/on_policy/advantage_size")[0] > 0.01

import math
from dataclasses import dataclass

import pytest
import torch

import trl_kd.losses as td
from tests.references import temporal_difference as references


INF = math.inf
DTYPES = {torch.float64: 1e-9, torch.float32: 1e-4}
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def log_probs_of(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def bools(*rows):
    return torch.tensor(rows).bool()


# An even and an odd shape, (B, T, V), with the tokens of each row
EVEN, ODD = ((2, 4, 8), (4, 2)), ((3, 3, 7), (1, 3, 2))
GRIDS = pytest.mark.parametrize("shape", [EVEN, ODD], ids=["even", "odd"])


class Grid:
    """
    Rows of tokens with the logits of a student and the log-probabilities of a teacher at each state.

    A row has one state more than tokens, for the value after a cut. Of the teacher, the tensors hold sorted columns
    with a padding that differs between states; the loops have its probabilities over the vocabulary, and how many
    tokens of it are known.
    """

    def __init__(self, shape, seed=0, max_known=None):
        (rows, tokens, vocab_size), self.lengths = shape
        self.shape, self.vocab_size = (rows, tokens), vocab_size
        self.num_states = rows * (tokens + 1)
        generator = torch.Generator().manual_seed(seed)
        self.logits = 2.0 * torch.randn(rows, tokens + 1, vocab_size, generator=generator, dtype=torch.float64)
        teacher = 2.0 * torch.randn(rows, tokens + 1, vocab_size, generator=generator, dtype=torch.float64)
        self.teacher_logits = teacher
        self.probabilities = teacher.softmax(-1).tolist()
        self.mask = torch.arange(tokens) < torch.tensor(self.lengths).unsqueeze(1)
        self.weights = torch.rand(rows, tokens, generator=generator, dtype=torch.float64) + 0.1
        most = max_known or vocab_size
        known = [most - (state % 3 if max_known is None else 0) for state in range(self.num_states)]
        self.known = torch.tensor(known).view(rows, tokens + 1).tolist()
        log_probs, ids = teacher.log_softmax(-1).view(-1, vocab_size).sort(dim=-1, descending=True)
        is_padded = torch.arange(vocab_size) >= torch.tensor(known).unsqueeze(1)
        self.ids, self.log_probs = ids.masked_fill(is_padded, 0), log_probs.masked_fill(is_padded, -INF)
        # Written by the teacher, but for every third token, which is any
        drawn = torch.multinomial(teacher[:, :-1].flatten(0, 1).softmax(-1), 1, generator=generator).view(self.shape)
        is_any = torch.arange(rows * tokens).view(self.shape) % 3 == 1
        self.labels = torch.where(is_any, torch.randint(vocab_size, self.shape, generator=generator), drawn)

    @property
    def flat_labels(self):
        """A label for the state after the last column too, which has none: its most likely token."""
        return torch.cat([self.labels, self.ids.view(*self.logits.shape)[:, -1:, 0]], dim=1).flatten()

    def cells(self):
        return [(b, t) for b, length in enumerate(self.lengths) for t in range(length)]

    def numbers(self):
        """The student's logits for the loops."""
        return [[[references.Number(z) for z in state] for state in row] for row in self.logits.tolist()]


# What the tensors and the loops use of the teacher's tokens
SETS = {
    "top_p": (lambda grid: td.top_p_set(grid.log_probs, 0.8), lambda p, known: references.top_p_set(p, known, 0.8)),
    "top_k": (lambda grid: td.top_k_set(grid.log_probs, 2), lambda p, known: references.top_k_set(p, known, 2)),
    "min_p": (lambda grid: td.min_p_set(grid.log_probs, 0.3), lambda p, known: references.min_p_set(p, known, 0.3)),
    "threshold": (
        lambda grid: td.threshold_set(grid.log_probs, 0.15),
        lambda p, known: references.threshold_set(p, known, 0.15),
    ),
    "full": (lambda grid: td.full_set(grid.log_probs), references.full_set),
}


@dataclass
class Settings:
    gauge: str = "raw"
    clip_min: float | None = None
    action_set: str = "top_p"
    with_label: bool = False
    is_bootstrapped: bool = False
    is_detached: bool = False


class Tensors:
    """Q, sets and values of the student at all states, by the functions under test."""

    def __init__(self, grid, settings, dtype=torch.float64):
        self.grid, self.settings = grid, settings
        self.logits = grid.logits.detach().clone().to(dtype).requires_grad_()
        flat = self.logits.flatten(0, 1)
        self.gauge = {
            "gauge": settings.gauge,
            "maximum": flat.amax(-1),
            "log_normaliser": flat.logsumexp(-1),
            "clip_min": settings.clip_min,
        }
        self.ids, self.mask = grid.ids, SETS[settings.action_set][0](grid)
        if settings.with_label:
            self.ids, self.mask = td.union_with_label(self.ids, self.mask, grid.flat_labels)
        self.q = td.gauged(flat.gather(1, self.ids), **self.gauge)
        at_label = td.gauged(flat.gather(1, grid.flat_labels.unsqueeze(1)), **self.gauge)
        self.q_t = at_label.view(*self.logits.shape[:2])[:, :-1]
        self.is_in_set = td.contains(self.ids, self.mask, grid.flat_labels)

    def on_grid(self, values):
        """Values of the states before each token, and those after the last token of each row."""
        values = values.view(self.logits.shape[:2])
        after = values.gather(1, torch.tensor(self.grid.lengths).unsqueeze(1)).squeeze(1)
        return values[:, :-1], after

    def following(self, values, after):
        found = td.next_values(values, self.grid.mask, after if self.settings.is_bootstrapped else None)
        return found.detach() if self.settings.is_detached else found

    def gradient(self, values, is_kept):
        """Of a weighted sum over the tokens that are kept."""
        (self.grid.weights.to(values) * values)[is_kept].sum().backward()
        return self.logits.grad


class Loops:
    """The same over the vocabulary."""

    def __init__(self, grid, settings):
        self.grid, self.settings = grid, settings
        self.logits = grid.numbers()
        self.q, self.allowed = [], []
        for b, row in enumerate(self.logits):
            self.q.append([references.gauged(state, settings.gauge, settings.clip_min) for state in row])
            self.allowed.append([])
            for t in range(len(row)):
                chosen = SETS[settings.action_set][1](grid.probabilities[b][t], grid.known[b][t])
                if settings.with_label and t < grid.shape[1]:
                    chosen = references.with_label(chosen, grid.labels[b, t].item())
                self.allowed[b].append(chosen)

    def label(self, b, t):
        return self.grid.labels[b, t].item()

    def q_t(self, b, t):
        return self.q[b][t][self.label(b, t)]

    def is_in_set(self, b, t):
        return self.allowed[b][t][self.label(b, t)]

    def values(self, backup=references.soft_value):
        return [
            [backup(q, allowed) for q, allowed in zip(*row, strict=True)]
            for row in zip(self.q, self.allowed, strict=True)
        ]

    def following(self, values):
        rows = []
        for row, length in zip(values, self.grid.lengths, strict=True):
            after = row[length] if self.settings.is_bootstrapped else 0.0
            found = references.next_values(row, length, after)
            rows.append([references.detach(v) for v in found] if self.settings.is_detached else found)
        return rows

    def gradient(self, values):
        """Of the sum of values of some tokens, each with its weight."""
        result = references.total(self.grid.weights[cell].item() * value for cell, value in values.items())
        leaves = [z for row in self.logits for state in row for z in state]
        return torch.tensor(references.gradients(result, leaves), dtype=torch.float64).view_as(self.grid.logits)


def assert_equal(loops, function, expected):
    """Values of the tokens that the loops have, and the gradient at every logit, in both dtypes."""
    grid, gradient = loops.grid, loops.gradient(expected)
    is_kept = torch.zeros(grid.shape, dtype=torch.bool)
    is_kept[tuple(torch.tensor(list(expected)).T)] = True
    numbers = double(*[value.value for value in expected.values()])
    for dtype, tolerance in DTYPES.items():
        tensors = Tensors(grid, loops.settings, dtype)
        actual = function(tensors)
        assert actual.shape == grid.shape and actual.dtype == dtype
        close = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(actual[is_kept].double(), numbers, **close)
        torch.testing.assert_close(tensors.gradient(actual, is_kept).double(), gradient, **close)


def check_states(loops, function, reference):
    """A loss of single states: of Q over columns, and of Q over the vocabulary."""
    expected = {(b, t): reference(b, t, loops.q[b][t], loops.allowed[b][t]) for b, t in loops.grid.cells()}
    assert_equal(loops, lambda x: x.on_grid(function(x))[0], expected)


def test_reference_gradients_are_central_differences():
    """The loops' own derivatives, of everything they are made of."""
    grid = Grid(ODD)
    settings = Settings("logsoftmax", clip_min=-4.0, with_label=True, is_bootstrapped=True)

    def loss(logits):
        grid.logits = logits
        loops = Loops(grid, settings)
        values, total = loops.values(), references.Number(0.0)
        following = loops.following(values)
        for b, t in grid.cells():
            q, allowed = loops.q[b][t], loops.allowed[b][t]
            total = total + references.inverse_soft_q(loops.q_t(b, t), values[b][t], following[b][t], 0.9, 0.1)
            total = total + references.soft_actor_critic(q, allowed, grid.probabilities[b][t], 0.5)
            total = total + references.expected_value(q, allowed, references.policy(q, allowed), 0.3)
            total = total + references.hard_value(q, allowed) * references.absolute(loops.q_t(b, t))
        return total, [z for row in loops.logits for state in row for z in state]

    start = grid.logits
    found = references.gradients(*loss(start))
    for index in range(0, start.numel(), 5):
        step = torch.zeros(start.numel(), dtype=torch.float64)
        step[index] = 1e-5
        step = step.view_as(start)
        slope = (loss(start + step)[0].value - loss(start - step)[0].value) / 2e-5
        # Curvature 1e-10 of values of about 100, and their rounding over the step
        assert found[index] == pytest.approx(slope, rel=1e-6, abs=1e-7)


# Action sets

# Of the probabilities 1/2, 1/4, 1/8, 1/16 and a padding
HALVES = [0.5, 0.25, 0.125, 0.0625, 0.0]


@EVERY_DTYPE
@pytest.mark.parametrize(
    ("p", "size"), [(1e-6, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.87, 3), (0.88, 4), (0.93, 4), (1.0, 4)]
)
def test_top_p_set_literal_mass_has_the_smallest_prefix(p, size, dtype):
    found = td.top_p_set(log_probs_of(HALVES).to(dtype), p)
    assert found.dtype == torch.bool and found.tolist() == [[i < size for i in range(5)]]


def test_top_p_set_mass_that_is_reached_exactly_needs_no_more():
    # Powers of two have no rounding
    assert td.top_p_set(log_probs_of(HALVES), 0.5).sum().item() == 1


def test_top_p_set_bfloat16_log_probs_are_added_in_float32():
    # In 8 bits, a sum of 256 of them is the last that grows
    log_probs = torch.full((1, 1000), -6.90625).bfloat16()
    assert td.top_p_set(log_probs, 0.9).sum().item() == math.ceil(0.9 / math.exp(-6.90625))


@EVERY_DTYPE
def test_top_p_set_of_one_is_every_token(dtype):
    # The prefix of a float32 sum reaches one long before the last of these
    log_probs = torch.cat([double(0.0), torch.full((200,), -18.0, dtype=torch.float64)]).log_softmax(-1).to(dtype)
    assert td.top_p_set(log_probs.unsqueeze(0), 1.0).all()


def test_top_p_set_single_token_is_that_token():
    log_probs = torch.tensor([[0.0, -INF, -INF]])
    for p in (1e-3, 0.8, 1.0):
        assert td.top_p_set(log_probs, p).tolist() == [[True, False, False]]


@pytest.mark.parametrize("p", [0.05, 0.5, 0.8, 0.95, 0.999])
def test_top_p_set_random_rows_equal_the_loop(p):
    grid = Grid(((40, 4, 9), (4,) * 40))
    found = td.top_p_set(grid.log_probs, p)
    assert_same_sets(grid, found, lambda probs, known: references.top_p_set(probs, known, p))


@pytest.mark.parametrize("name", SETS)
def test_action_set_random_rows_equal_the_loop(name):
    grid = Grid(((40, 4, 9), (4,) * 40), seed=1)
    assert_same_sets(grid, SETS[name][0](grid), SETS[name][1])


def assert_same_sets(grid, found, reference):
    probabilities = [state for row in grid.probabilities for state in row]
    known = [count for row in grid.known for count in row]
    sizes = set()
    for i in range(grid.num_states):
        allowed = reference(probabilities[i], known[i])
        chosen = grid.ids[i][found[i]].tolist()
        assert sorted(chosen) == [v for v in range(grid.vocab_size) if allowed[v]]
        sizes.add(len(chosen))
    assert sizes  # every row was looked at


@pytest.mark.parametrize(("k", "size"), [(1, 1), (2, 2), (4, 4), (5, 4), (1000, 4)])
def test_top_k_set_literal_k_is_a_prefix_of_what_is_there(k, size):
    assert td.top_k_set(log_probs_of(HALVES), k).tolist() == [[i < size for i in range(5)]]


@pytest.mark.parametrize(("min_p", "size"), [(1.0, 1), (0.6, 1), (0.4, 2), (0.2, 3), (0.1, 4)])
def test_min_p_set_literal_share_is_of_the_largest(min_p, size):
    # 1/4 is half of the largest, 1/8 a quarter of it
    assert td.min_p_set(log_probs_of(HALVES), min_p).tolist() == [[i < size for i in range(5)]]


@pytest.mark.parametrize(("threshold", "size"), [(0.9, 1), (0.6, 1), (0.3, 1), (0.2, 2), (0.1, 3), (0.05, 4)])
def test_threshold_set_literal_probability_keeps_at_least_one(threshold, size):
    assert td.threshold_set(log_probs_of(HALVES), threshold).tolist() == [[i < size for i in range(5)]]


def test_full_set_is_all_but_the_padding():
    log_probs = log_probs_of(HALVES, [1.0, 0.0, 0.0, 0.0, 0.0])
    assert td.full_set(log_probs).tolist() == [[True] * 4 + [False], [True] + [False] * 4]


@pytest.mark.parametrize("name", SETS)
def test_action_set_of_no_rows_is_empty(name):
    grid = Grid(ODD)
    grid.log_probs = grid.log_probs[:0]
    assert SETS[name][0](grid).shape == (0, 7)


@pytest.mark.parametrize("name", SETS)
def test_action_set_inputs_are_left_alone(name):
    grid, untouched = Grid(ODD), Grid(ODD)
    SETS[name][0](grid)
    assert torch.equal(grid.log_probs, untouched.log_probs)


def test_union_with_label_literal_rows_add_what_is_missing():
    # In the set; in a column that is outside of it; in no column; 0, where the padding has that id too
    ids = torch.tensor([[4, 7, 2], [4, 7, 2], [4, 7, 2], [4, 0, 0]])
    mask = bools([1, 1, 0], [1, 1, 0], [1, 1, 0], [1, 0, 0])
    labels = torch.tensor([7, 2, 5, 0])
    found_ids, found = td.union_with_label(ids, mask, labels)
    assert torch.equal(found_ids[:, :3], ids) and torch.equal(found[:, :3], mask)
    assert found[:, 3].tolist() == [False, True, True, True]
    assert found_ids[1:, 3].tolist() == [2, 5, 0]
    assert td.contains(found_ids, found, labels).all()


def test_contains_literal_rows_need_a_column_of_the_set():
    ids = torch.tensor([[4, 7, 2], [4, 7, 2], [4, 7, 2], [4, 0, 0]])
    mask = bools([1, 1, 0], [1, 1, 0], [1, 1, 0], [1, 0, 0])
    assert td.contains(ids, mask, torch.tensor([7, 2, 5, 0])).tolist() == [True, False, False, False]


# Gauges

LOGITS = double([2.0, -1.0, 0.5])


def test_gauged_literal_logits_have_the_values_by_hand():
    logits = LOGITS.repeat(2, 1)
    others = {"maximum": double(2.0, 5.0), "log_normaliser": double(3.0, -1.0)}
    assert td.gauged(logits, "raw", **others).tolist() == [[2.0, -1.0, 0.5]] * 2
    assert td.gauged(logits, "max", **others).tolist() == [[0.0, -3.0, -1.5], [-3.0, -6.0, -4.5]]
    assert td.gauged(logits, "logsoftmax", **others).tolist() == [[-1.0, -4.0, -2.5], [3.0, 0.0, 1.5]]
    assert td.gauged(logits).tolist() == td.gauged(logits, "raw").tolist()


def test_gauged_literal_clip_is_after_the_shift():
    assert td.gauged(LOGITS, "max", maximum=double(2.0), clip_min=-2.0).tolist() == [[0.0, -2.0, -1.5]]
    assert td.gauged(LOGITS, "raw", clip_min=0.0).tolist() == [[2.0, 0.0, 0.5]]


def test_gauged_clipped_entries_carry_no_gradient_and_the_gauge_is_not_detached():
    logits, maximum = LOGITS.clone().requires_grad_(), double(2.0).requires_grad_()
    td.gauged(logits, "max", maximum=maximum, clip_min=-2.0).sum().backward()
    assert logits.grad.tolist() == [[1.0, 0.0, 1.0]]
    assert maximum.grad.tolist() == [-2.0]


def test_gauged_log_normaliser_carries_gradient():
    logits, log_normaliser = LOGITS.clone().requires_grad_(), double(3.0).requires_grad_()
    td.gauged(logits, "logsoftmax", log_normaliser=log_normaliser, clip_min=-2.7).sum().backward()
    assert logits.grad.tolist() == [[1.0, 0.0, 1.0]]
    assert log_normaliser.grad.tolist() == [-2.0]


# Backups

LOG_3 = math.log(3.0)
# exp is 1, 3 and what is outside of the set
Q, IN = double([0.0, LOG_3, 50.0]), bools([1, 1, 0])


def test_soft_value_literal_q_is_log_of_the_sum():
    assert td.soft_value(Q, IN).item() == pytest.approx(math.log(4.0), abs=1e-14)
    # exp(q / tau) is 1 and 9, and 1 and the square root of 3
    assert td.soft_value(Q, IN, entropy_weight=0.5).item() == pytest.approx(0.5 * math.log(10.0), abs=1e-14)
    assert td.soft_value(Q, IN, 2.0).item() == pytest.approx(2.0 * math.log(1.0 + math.sqrt(3.0)), abs=1e-14)


def test_hard_value_literal_q_is_the_largest_of_the_set():
    assert td.hard_value(Q, IN).tolist() == [LOG_3]


def test_log_policy_literal_q_is_renormalised_on_the_set():
    found = td.log_policy(Q, IN)
    torch.testing.assert_close(found[:, :2], double([-math.log(4.0), math.log(0.75)]), rtol=0, atol=1e-14)
    assert found[0, 2].item() == -INF


def test_expected_value_literal_policy_is_renormalised_on_the_set():
    log_weights = log_probs_of([0.1, 0.3, 0.6])
    assert td.expected_value(Q, IN, log_weights).item() == pytest.approx(0.75 * LOG_3, abs=1e-14)
    entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    value = td.expected_value(Q, IN, log_weights, entropy_weight=0.5).item()
    assert value == pytest.approx(0.75 * LOG_3 + 0.5 * entropy, abs=1e-14)


BACKUPS = {
    "soft": (lambda x: td.soft_value(x.q, x.mask), lambda q, a, p: references.soft_value(q, a)),
    "soft_0.3": (lambda x: td.soft_value(x.q, x.mask, 0.3), lambda q, a, p: references.soft_value(q, a, 0.3)),
    "soft_4": (lambda x: td.soft_value(x.q, x.mask, 4.0), lambda q, a, p: references.soft_value(q, a, 4.0)),
    "hard": (lambda x: td.hard_value(x.q, x.mask), lambda q, a, p: references.hard_value(q, a)),
    "teacher": (
        lambda x: td.expected_value(x.q, x.mask, x.grid.log_probs.to(x.q)),
        lambda q, a, p: references.expected_value(q, a, p),
    ),
    "teacher_0.7": (
        lambda x: td.expected_value(x.q, x.mask, x.grid.log_probs.to(x.q), 0.7),
        lambda q, a, p: references.expected_value(q, a, p, 0.7),
    ),
    "student": (
        lambda x: td.expected_value(x.q, x.mask, td.log_policy(x.q, x.mask)),
        lambda q, a, p: references.expected_value(q, a, references.policy(q, a)),
    ),
    "student_0.7": (
        lambda x: td.expected_value(x.q, x.mask, td.log_policy(x.q, x.mask), 0.7),
        lambda q, a, p: references.expected_value(q, a, references.policy(q, a), 0.7),
    ),
}


@GRIDS
@pytest.mark.parametrize("action_set", SETS)
@pytest.mark.parametrize("backup", BACKUPS)
def test_backup_random_q_equals_the_loop_in_value_and_gradient(backup, action_set, shape):
    grid, (function, reference) = Grid(shape, seed=2), BACKUPS[backup]
    check_states(
        Loops(grid, Settings("logsoftmax", -5.0, action_set)),
        function,
        lambda b, t, q, allowed: reference(q, allowed, grid.probabilities[b][t]),
    )


# Returns: rewards 1, 2, 3 and values 10, 20, 30 after them; a row of two tokens and what is behind it

REWARDS = double([1.0, 2.0, 3.0], [1.0, 2.0, INF])
FOLLOWING = double([10.0, 20.0, 30.0], [10.0, 20.0, math.nan])
ROWS = bools([1, 1, 1], [1, 1, 0])


def check_rows(found, first, second):
    assert found[0].tolist() == pytest.approx(first, abs=1e-12)
    assert found[1].tolist() == pytest.approx([*second, 0.0], abs=1e-12)


def test_next_values_literal_rows_end_with_the_last_value():
    values = double([1.0, 2.0, 3.0], [4.0, 5.0, math.nan])
    assert td.next_values(values, ROWS).tolist() == [[2.0, 3.0, 0.0], [5.0, 0.0, 0.0]]
    assert td.next_values(values, ROWS, double(7.0, 8.0)).tolist() == [[2.0, 3.0, 7.0], [5.0, 8.0, 0.0]]
    # A row without tokens has no last one
    empty = bools([0, 0, 0], [1, 0, 0])
    assert td.next_values(values, empty, double(7.0, 8.0)).tolist() == [[0.0] * 3, [8.0, 0.0, 0.0]]


def test_next_values_gradient_goes_to_the_next_token_and_the_last_value():
    values, last = double([1.0, 2.0, 3.0], [4.0, 5.0, math.nan]).requires_grad_(), double(7.0, 8.0).requires_grad_()
    (td.next_values(values, ROWS, last) * double([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])).sum().backward()
    assert values.grad.tolist() == [[0.0, 1.0, 2.0], [0.0, 4.0, 0.0]]
    assert last.grad.tolist() == [3.0, 5.0]


def test_one_step_returns_literal_rows_have_the_values_by_hand():
    check_rows(td.one_step_returns(REWARDS, FOLLOWING, ROWS, 0.5), [6.0, 12.0, 18.0], [6.0, 12.0])
    check_rows(td.one_step_returns(REWARDS, FOLLOWING, ROWS, 0.0), [1.0, 2.0, 3.0], [1.0, 2.0])


def test_n_step_returns_literal_rows_have_the_values_by_hand():
    # 1 + 2/2 + 20/4; 2 + 3/2 + 30/4; then one token is left
    check_rows(td.n_step_returns(REWARDS, FOLLOWING, ROWS, 0.5, 2), [7.0, 11.0, 18.0], [7.0, 12.0])
    # 1 + 2/2 + 3/4 + 30/8
    check_rows(td.n_step_returns(REWARDS, FOLLOWING, ROWS, 0.5, 3), [6.5, 11.0, 18.0], [7.0, 12.0])
    check_rows(td.n_step_returns(REWARDS, FOLLOWING, ROWS, 0.5, 1), [6.0, 12.0, 18.0], [6.0, 12.0])
    check_rows(td.n_step_returns(REWARDS, FOLLOWING, ROWS, 0.0, 3), [1.0, 2.0, 3.0], [1.0, 2.0])


def test_lambda_returns_literal_rows_have_the_values_by_hand():
    # 3 + 30/2 = 18; 2 + (3/4 20 + 1/4 18)/2 = 11.75; 1 + (3/4 10 + 1/4 11.75)/2; and 2 + 20/2 = 12, 1 + (7.5 + 3)/2
    check_rows(td.lambda_returns(REWARDS, FOLLOWING, ROWS, 0.5, 0.25), [6.21875, 11.75, 18.0], [6.25, 12.0])


def test_monte_carlo_returns_literal_rows_have_the_values_by_hand():
    check_rows(td.monte_carlo_returns(REWARDS, FOLLOWING, ROWS, 0.5), [6.5, 11.0, 18.0], [7.0, 12.0])
    check_rows(td.monte_carlo_returns(REWARDS, FOLLOWING, ROWS, 1.0), [36.0, 35.0, 33.0], [23.0, 22.0])


RETURNS = {
    "one_step": (td.one_step_returns, lambda r, v, t, gamma: r[t] + gamma * v[t]),
    "2_step": (lambda *a: td.n_step_returns(*a, 2), lambda *a: references.n_step_return(*a, 2)),
    "3_step": (lambda *a: td.n_step_returns(*a, 3), lambda *a: references.n_step_return(*a, 3)),
    "9_step": (lambda *a: td.n_step_returns(*a, 9), lambda *a: references.n_step_return(*a, 9)),
    "lambda_0": (lambda *a: td.lambda_returns(*a, 0.0), lambda *a: references.lambda_return(*a, 0.0)),
    "lambda_0.3": (lambda *a: td.lambda_returns(*a, 0.3), lambda *a: references.lambda_return(*a, 0.3)),
    "lambda_0.95": (lambda *a: td.lambda_returns(*a, 0.95), lambda *a: references.lambda_return(*a, 0.95)),
    "lambda_1": (lambda *a: td.lambda_returns(*a, 1.0), lambda *a: references.lambda_return(*a, 1.0)),
    "monte_carlo": (td.monte_carlo_returns, references.monte_carlo_return),
}
EVERY_RETURN = pytest.mark.parametrize("kind", RETURNS)
GAMMAS = pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])


@EVERY_RETURN
@GAMMAS
@EVERY_DTYPE
def test_returns_random_rows_equal_the_recursion_in_value_and_gradient(kind, gamma, dtype):
    function, reference = RETURNS[kind]
    lengths = [7, 4, 1, 0, 6]
    mask = torch.arange(7) < torch.tensor(lengths).unsqueeze(1)
    generator = torch.Generator().manual_seed(3)
    rewards, following, weights = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    # What is behind a row must not matter, in value or gradient
    leaves = [x.masked_fill(~mask, math.nan).to(dtype).requires_grad_() for x in (rewards, following)]
    found = function(*leaves, mask, gamma)
    assert found.dtype == dtype and not found[~mask].any()
    (found * weights.to(dtype)).sum().backward()
    for b, length in enumerate(lengths):
        r = [references.Number(x) for x in rewards[b, :length].tolist()]
        v = [references.Number(x) for x in following[b, :length].tolist()]
        expected = [reference(r, v, t, gamma) for t in range(length)]
        close = {"rel": DTYPES[dtype], "abs": DTYPES[dtype]}
        assert found[b, :length].tolist() == pytest.approx([x.value for x in expected], **close)
        result = references.total(weights[b, t].item() * x for t, x in enumerate(expected))
        for leaf, numbers in zip(leaves, (r, v), strict=True):
            slopes = references.gradients(result, numbers)
            assert leaf.grad[b].tolist() == pytest.approx([*slopes, *[0.0] * (7 - length)], **close)


@EVERY_RETURN
@pytest.mark.parametrize("gamma", [0.0, 1e-3, 0.5, 0.99, 1.0])
def test_returns_long_rows_equal_the_recursion(kind, gamma):
    # Powers of gamma of 300 tokens leave the range of float64, and of float32 much earlier
    function, reference = RETURNS[kind]
    generator = torch.Generator().manual_seed(4)
    rewards, following = torch.randn(2, 1, 300, generator=generator, dtype=torch.float64)
    r, v = rewards[0].tolist(), following[0].tolist()
    expected = [references.number(reference(r, v, t, gamma)).value for t in range(0, 300, 13)]
    mask = torch.ones(1, 300, dtype=torch.bool)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        found = function(rewards.to(dtype), following.to(dtype), mask, gamma)[0, ::13]
        assert found.tolist() == pytest.approx(expected, rel=tolerance, abs=tolerance)


@GAMMAS
def test_returns_limits_of_lambda_and_n_are_equal(gamma):
    generator = torch.Generator().manual_seed(5)
    rewards, following = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([[6], [4], [1]])
    arguments = rewards, following, mask, gamma
    one_step, monte_carlo = td.one_step_returns(*arguments), td.monte_carlo_returns(*arguments)
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(td.lambda_returns(*arguments, 0.0), one_step, **close)
    torch.testing.assert_close(td.n_step_returns(*arguments, 1), one_step, **close)
    torch.testing.assert_close(td.lambda_returns(*arguments, 1.0), monte_carlo, **close)
    for n in (6, 7, 1000):
        torch.testing.assert_close(td.n_step_returns(*arguments, n), monte_carlo, **close)
    if gamma > 0:
        assert (one_step - monte_carlo).abs().max() > 0.1


def test_lambda_returns_are_the_mixture_of_n_step_returns():
    # (1 - lambda) sum_n lambda^(n-1) of the n-step returns, the rest on the last
    generator = torch.Generator().manual_seed(6)
    rewards, following = torch.randn(2, 1, 5, generator=generator, dtype=torch.float64)
    arguments = rewards, following, torch.ones(1, 5, dtype=torch.bool), 0.9
    expected = sum(0.7 * 0.3 ** (n - 1) * td.n_step_returns(*arguments, n) for n in range(1, 60))
    torch.testing.assert_close(td.lambda_returns(*arguments, 0.3), expected, rtol=0, atol=1e-12)


# Losses


def test_implied_reward_literal_values_are_the_difference():
    assert td.implied_reward(double(3.0, 3.0), double(2.0, 0.0), 0.5).tolist() == [2.0, 3.0]


def test_chi2_penalty_literal_reward_has_the_values_by_hand():
    assert td.chi2_penalty(double(3.0, -1.0), 0.5).tolist() == [4.5, 0.5]
    assert td.chi2_penalty(double(3.0, -1.0), 0.5, center=double(1.0, -1.0)).tolist() == [2.0, 0.0]
    assert td.chi2_penalty(double(3.0), 0.5, center=1.0).tolist() == [2.0]


def test_inverse_soft_q_literal_values_by_hand():
    q_t, v_t, v_tp1 = double(3.0), double(4.0), double(2.0)
    # r = 3 - 1; -r + 4 - 1; with alpha 1/2, r^2 / 2 more; that of 6, of 6 - 2, and of r - 2
    assert td.inverse_soft_q(q_t, v_t, v_tp1, 0.5).tolist() == [1.0]
    assert td.inverse_soft_q(q_t, v_t, v_tp1, 0.5, chi2_alpha=0.5).tolist() == [3.0]
    assert td.inverse_soft_q(q_t, v_t, v_tp1, 0.5, 0.5, implied=double(6.0)).tolist() == [19.0]
    assert td.inverse_soft_q(q_t, v_t, v_tp1, 0.5, 0.5, implied=double(6.0), center=double(2.0)).tolist() == [9.0]
    assert td.inverse_soft_q(q_t, v_t, v_tp1, 0.5, 0.5, center=2.0).tolist() == [1.0]


def test_expected_inverse_soft_q_literal_teacher_is_renormalised_on_the_set():
    # The teacher's 1/10 and 3/10 are 1/4 and 3/4
    value = td.expected_inverse_soft_q(Q, IN, log_probs_of([0.1, 0.3, 0.6]), double(2.0))
    assert value.tolist() == pytest.approx([2.0 - 0.75 * LOG_3], abs=1e-14)


def test_sqil_reward_literal_is_one_for_the_teachers_data():
    assert td.sqil_reward(bools(0, 1, 1, 0)).tolist() == [1.0, 0.0, 0.0, 1.0]


def test_soft_q_regression_literal_is_the_squared_difference():
    q_t, target = double(3.0, -1.0).requires_grad_(), double(1.0, 1.0).requires_grad_()
    values = td.soft_q_regression(q_t, target)
    assert values.tolist() == [4.0, 4.0]
    values.sum().backward()
    assert q_t.grad.tolist() == [4.0, -4.0] and target.grad.tolist() == [-4.0, 4.0]


def test_large_margin_literal_rows_have_the_values_by_hand():
    # Another token is ahead; it is ahead with the margin; the label leads by more; the label is outside
    q = double([1.0, 2.0, 9.0], [2.0, 1.5, 9.0], [3.0, 1.5, 9.0], [2.0, 1.5, 9.0]).requires_grad_()
    mask, ids = IN.expand(4, 3), torch.tensor([[4, 7, 2]]).expand(4, 3)
    values = td.large_margin(q, mask, ids, torch.tensor([4, 4, 4, 2]), 1.0)
    assert values.tolist() == [2.0, 0.5, 0.0, 0.0]
    values.sum().backward()
    assert q.grad.tolist() == [[-1.0, 1.0, 0.0], [-1.0, 1.0, 0.0], [0.0] * 3, [0.0] * 3]


def test_large_margin_label_zero_is_not_the_padding():
    q, ids = double([1.0, 5.0, 5.0]), torch.tensor([[4, 0, 0]])
    assert td.large_margin(q, bools([1, 0, 0]), ids, torch.tensor([0]), 1.0).tolist() == [0.0]
    assert td.large_margin(q, bools([1, 1, 0]), ids, torch.tensor([0]), 1.0).tolist() == [0.0]
    assert td.large_margin(q, bools([1, 1, 0]), ids, torch.tensor([4]), 1.0).tolist() == [5.0]


def test_soft_actor_critic_literal_policies_have_the_divergence_by_hand():
    # The student has 1/4 and 3/4 on the set; action values of 1 : 1, then of 1 : 9 as exp(2 / 2 ln 9)
    value = td.soft_actor_critic(Q, IN, double([5.0, 5.0, 99.0])).item()
    assert value == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-14)
    value = td.soft_actor_critic(Q, IN, double([1.0, 1.0 + 4.0 * LOG_3, 99.0]), entropy_weight=2.0).item()
    assert value == pytest.approx(0.25 * math.log(0.25 / 0.1) + 0.75 * math.log(0.75 / 0.9), abs=1e-14)


def test_soft_actor_critic_action_values_carry_no_gradient():
    q, action_values = Q.clone().requires_grad_(), double([1.0, 2.0, 3.0]).requires_grad_()
    td.soft_actor_critic(q, IN, action_values).sum().backward()
    assert action_values.grad is None or not action_values.grad.any()
    assert q.grad[0, 0].item() == pytest.approx(-q.grad[0, 1].item(), abs=1e-14) and q.grad[0, 2].item() == 0.0
    assert q.grad.abs().max() > 0.01


def test_set_tail_literal_mass_is_minus_its_log():
    assert td.set_tail(double(math.log(0.25), 0.0)).tolist() == pytest.approx([math.log(4.0), 0.0], abs=1e-14)


def test_released_literal_state_has_the_value_by_hand():
    # The set {0, ln 3} of 4 tokens, gamma 1/2, and a value of 1 after it. Rewards: -1/2, ln 3 - 1/2, -1/2, -1/2, with
    # the mean ln(3)/4 - 1/2 and the mean square (3/4 + (ln 3 - 1/2)^2) / 4
    v_t, v_tp1 = double(math.log(4.0)), double(1.0)
    plain = -(LOG_3 / 4 - 0.5) + math.log(4.0) - 0.5
    squares = (0.75 + (LOG_3 - 0.5) ** 2) / 4
    found = td.released(Q, IN, v_t, v_tp1, 0.5, vocab_size=4)
    assert found.tolist() == pytest.approx([plain + 2.5 * squares], abs=1e-14)
    found = td.released(Q, IN, v_t, v_tp1, 0.5, vocab_size=4, chi2_alpha=0.5)
    assert found.tolist() == pytest.approx([plain + squares / 2], abs=1e-14)
    found = td.released(Q, IN, v_t, v_tp1, 0.5, vocab_size=4, chi2_alpha=None)
    assert found.tolist() == pytest.approx([plain], abs=1e-14)


# Losses on grids against the loops

GAUGES = pytest.mark.parametrize("gauge", ["raw", "max", "logsoftmax"])
CHI2 = pytest.mark.parametrize("chi2_alpha", [None, 0.1])
CLIPS = pytest.mark.parametrize("clip_min", [None, -2.5])
ACTIONS = pytest.mark.parametrize(
    "actions", [("top_p", False), ("top_p", True), ("full", False)], ids=["top_p", "union", "full"]
)


@GRIDS
@GAUGES
@CHI2
@CLIPS
@ACTIONS
def test_inverse_soft_q_on_grids_equals_the_loop(gauge, chi2_alpha, clip_min, actions, shape):
    grid = Grid(shape, seed=7)
    for is_bootstrapped, is_detached in ((False, False), (True, False), (True, True)):
        for gamma in (0.0, 0.9, 1.0):
            settings = Settings(gauge, clip_min, *actions, is_bootstrapped, is_detached)
            loops = Loops(grid, settings)
            values = loops.values()
            following = loops.following(values)
            # Of a token that is not in the set, only the value counts, for the token before
            kept = [(b, t) for b, t in grid.cells() if loops.is_in_set(b, t)]
            expected = {
                (b, t): references.inverse_soft_q(loops.q_t(b, t), values[b][t], following[b][t], gamma, chi2_alpha)
                for b, t in kept
            }
            assert len(kept) == len(grid.cells()) if actions[1] else kept

            def loss(x, kept=kept, gamma=gamma):
                is_kept = x.is_in_set.view(x.logits.shape[:2])[:, :-1] & grid.mask
                assert is_kept.nonzero().tolist() == [list(cell) for cell in kept]
                v_t, after = x.on_grid(td.soft_value(x.q, x.mask))
                return td.inverse_soft_q(x.q_t, v_t, x.following(v_t, after), gamma, chi2_alpha)

            assert_equal(loops, loss, expected)


LATER = {
    "2_step": (lambda *a: td.n_step_returns(*a, 2), lambda *a: references.n_step_return(*a, 2)),
    "lambda": (lambda *a: td.lambda_returns(*a, 0.6), lambda *a: references.lambda_return(*a, 0.6)),
    "monte_carlo": (td.monte_carlo_returns, references.monte_carlo_return),
}


@GRIDS
@pytest.mark.parametrize("center", [None, 0.7])
@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_inverse_soft_q_with_returns_of_implied_rewards_equals_the_loop(later, center, gamma, shape):
    grid, (function, reference) = Grid(shape, seed=8), LATER[later]
    loops = Loops(grid, Settings("max", -3.0, with_label=True))

    def loss(x):
        v_t, after = x.on_grid(td.soft_value(x.q, x.mask))
        v_tp1 = x.following(v_t, after)
        rewards = td.implied_reward(x.q_t, v_tp1, gamma)
        implied = function(rewards, torch.zeros_like(v_tp1), grid.mask, gamma)
        return td.inverse_soft_q(x.q_t, v_t, v_tp1, gamma, 0.4, implied=implied, center=center)

    values, expected = loops.values(), {}
    following = loops.following(values)
    for b, length in enumerate(grid.lengths):
        rewards = [loops.q_t(b, t) - gamma * following[b][t] for t in range(length)]
        zeros = [references.Number(0.0)] * length
        for t in range(length):
            expected[b, t] = references.inverse_soft_q(
                loops.q_t(b, t),
                values[b][t],
                following[b][t],
                gamma,
                0.4,
                implied=reference(rewards, zeros, t, gamma),
                center=center or 0.0,
            )
    assert_equal(loops, loss, expected)


@GRIDS
@GAUGES
@CHI2
@pytest.mark.parametrize("action_set", ["top_p", "full"])
def test_expected_inverse_soft_q_on_grids_equals_the_loop(action_set, chi2_alpha, gauge, shape):
    """With the penalty of the teacher's expectation of the implied reward."""
    grid, gamma = Grid(shape, seed=9), 0.9
    loops = Loops(grid, Settings(gauge, -4.0, action_set, is_bootstrapped=True))

    def loss(x):
        log_probs, values = grid.log_probs.to(x.q.dtype), td.soft_value(x.q, x.mask)
        found, _ = x.on_grid(td.expected_inverse_soft_q(x.q, x.mask, log_probs, values))
        if chi2_alpha is None:
            return found
        expected_q, _ = x.on_grid(td.expected_value(x.q, x.mask, log_probs))
        implied = td.implied_reward(expected_q, x.following(*x.on_grid(values)), gamma)
        return found + td.chi2_penalty(implied, chi2_alpha)

    values = loops.values()
    following, expected = loops.following(values), {}
    for b, t in grid.cells():
        q, allowed, probabilities = loops.q[b][t], loops.allowed[b][t], grid.probabilities[b][t]
        expected[b, t] = references.expected_inverse_soft_q(q, allowed, probabilities, values[b][t])
        if chi2_alpha is not None:
            implied = references.expected_value(q, allowed, probabilities) - gamma * following[b][t]
            expected[b, t] += implied * implied / (4.0 * chi2_alpha)
    assert_equal(loops, loss, expected)


@GRIDS
@pytest.mark.parametrize("is_detached", [False, True])
@pytest.mark.parametrize("is_teacher", [True, False])
def test_sqil_on_grids_equals_the_loop(is_teacher, is_detached, shape):
    grid, gamma = Grid(shape, seed=10), 0.9
    loops = Loops(grid, Settings("raw", with_label=True, is_detached=is_detached))

    def loss(x):
        v_t, after = x.on_grid(td.soft_value(x.q, x.mask))
        rewards = td.sqil_reward(torch.full(grid.shape, not is_teacher)).to(v_t.dtype)
        target = td.one_step_returns(rewards, x.following(v_t, after), grid.mask, gamma)
        return td.soft_q_regression(x.q_t, target)

    following, expected = loops.following(loops.values()), {}
    for b, t in grid.cells():
        difference = loops.q_t(b, t) - (float(is_teacher) + gamma * following[b][t])
        expected[b, t] = difference * difference
    assert_equal(loops, loss, expected)


@GRIDS
@GAUGES
@pytest.mark.parametrize("later", LATER)
def test_teacher_reward_on_grids_equals_the_loop(later, gauge, shape):
    """Regression of the student's Q to returns of the reward that the teacher's logits imply."""
    grid, gamma, (function, reference) = Grid(shape, seed=11), 0.9, LATER[later]
    expert = Grid(shape, seed=11)
    expert.logits = grid.teacher_logits
    settings = Settings(gauge, -6.0, with_label=True, is_bootstrapped=True)
    loops, expert_loops = Loops(grid, settings), Loops(expert, settings)

    def loss(x):
        teacher = Tensors(expert, settings, x.logits.dtype)
        v_t, after = teacher.on_grid(td.soft_value(teacher.q, teacher.mask))
        rewards = td.implied_reward(teacher.q_t, teacher.following(v_t, after), gamma).detach()
        v_t, after = x.on_grid(td.soft_value(x.q, x.mask))
        return td.soft_q_regression(x.q_t, function(rewards, x.following(v_t, after), grid.mask, gamma))

    student, teacher = loops.following(loops.values()), expert_loops.following(expert_loops.values())
    expected = {}
    for b, length in enumerate(grid.lengths):
        row = [references.detach(expert_loops.q_t(b, t) - gamma * teacher[b][t]) for t in range(length)]
        for t in range(length):
            difference = loops.q_t(b, t) - reference(row, student[b], t, gamma)
            expected[b, t] = difference * difference
    assert_equal(loops, loss, expected)


@GRIDS
@GAUGES
@ACTIONS
def test_large_margin_on_grids_equals_the_loop(actions, gauge, shape):
    grid = Grid(shape, seed=12)
    loops = Loops(grid, Settings(gauge, -6.0, *actions))
    check_states(
        loops,
        lambda x: td.large_margin(x.q, x.mask, x.ids, grid.flat_labels, 0.8),
        lambda b, t, q, allowed: references.large_margin(q, allowed, loops.label(b, t), 0.8),
    )


@GRIDS
@GAUGES
@pytest.mark.parametrize("entropy_weight", [0.5, 1.0, 3.0])
def test_soft_actor_critic_on_grids_equals_the_loop(entropy_weight, gauge, shape):
    grid = Grid(shape, seed=13)
    action_values, teacher = grid.teacher_logits.flatten(0, 1).gather(1, grid.ids), grid.teacher_logits.tolist()
    check_states(
        Loops(grid, Settings(gauge, -6.0)),
        lambda x: td.soft_actor_critic(x.q, x.mask, action_values.to(x.q.dtype), entropy_weight),
        lambda b, t, q, allowed: references.soft_actor_critic(q, allowed, teacher[b][t], entropy_weight),
    )


def student_log_mass(x):
    """Of the set under the whole vocabulary."""
    log_probs = x.logits.flatten(0, 1).log_softmax(-1).gather(1, x.ids)
    return log_probs.masked_fill(~x.mask, -INF).logsumexp(-1)


@GRIDS
def test_set_tail_on_grids_equals_the_loop(shape):
    grid = Grid(shape, seed=14)

    def reference(b, t, q, allowed):
        return -references.log(
            references.total(p for p, is_in in zip(references.softmax(q), allowed, strict=True) if is_in)
        )

    check_states(Loops(grid, Settings()), lambda x: td.set_tail(student_log_mass(x)), reference)


# Tokens of each row that train
TRAINED = {"all": ([1, 1, 1, 1], [1, 1, 1, 1]), "prefixes": ([1, 1, 1, 0], [1, 0, 0, 0])}


@GAUGES
@pytest.mark.parametrize("chi2_alpha", [None, 0.1, 0.7])
@pytest.mark.parametrize("gamma", [0.0, 0.99, 1.0])
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("vocab_size", [8, 7])
def test_released_equals_the_loop_in_value_and_gradient(trained, gamma, chi2_alpha, gauge, vocab_size):
    # All four states of a row are tokens here, the last of which has no successor in the grid and does not train
    grid, settings = Grid(((2, 3, vocab_size), (3, 3)), seed=15), Settings(gauge, -4.0)
    loops, is_trained = Loops(grid, settings), bools(*TRAINED[trained])
    expected = references.released(loops.q, loops.allowed, TRAINED[trained], gamma, 0.8, 0.0, chi2_alpha)
    leaves = [z for row in loops.logits for state in row for z in state]
    gradient = references.gradients(expected, leaves)
    for dtype, tolerance in DTYPES.items():
        x = Tensors(grid, settings, dtype)
        v_t = td.soft_value(x.q, x.mask)
        v_tp1 = td.next_values(v_t.view(2, 4), is_trained).flatten()
        per_token = td.released(x.q, x.mask, v_t, v_tp1, gamma, vocab_size, chi2_alpha)
        assert per_token.shape == (8,) and per_token.dtype == dtype
        loss = per_token.view(2, 4)[:, :-1][is_trained[:, :-1]].mean()
        loss.backward()
        assert loss.item() == pytest.approx(expected.value, rel=tolerance, abs=tolerance)
        assert x.logits.grad.flatten().tolist() == pytest.approx(gradient, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("p", [0.5, 0.8])
def test_released_is_the_limit_of_a_small_epsilon(p):
    """The projection of the released code adds it everywhere, and divides by p before it renormalises."""
    grid, settings = Grid(((2, 3, 7), (3, 3)), seed=15), Settings("max", -4.0)
    loops, x, is_trained = Loops(grid, settings), Tensors(grid, settings), bools(*TRAINED["prefixes"])
    v_t = td.soft_value(x.q, x.mask)
    v_tp1 = td.next_values(v_t.view(2, 4), is_trained).flatten()
    per_token = td.released(x.q, x.mask, v_t, v_tp1, 0.99, 7).view(2, 4)
    loss = per_token[:, :-1][is_trained[:, :-1]].mean().item()
    gaps = []
    for epsilon in (1e-3, 1e-8, 1e-14):
        expected = references.released(loops.q, loops.allowed, TRAINED["prefixes"], 0.99, p, epsilon)
        gaps.append(abs(loss - expected.value))
    assert gaps[0] > 1e-3 and gaps[1] < 1e-5 and gaps[2] < 1e-10


# Identities


class OneState:
    """A wide batch of single tokens: sets, Q and labels inside of the sets."""

    def __init__(self, rows=30, vocab_size=11, gauge="raw", action_set="top_p", seed=16):
        self.grid = Grid(((rows, 1, vocab_size), (1,) * rows), seed, max_known=vocab_size)
        self.tensors = Tensors(self.grid, Settings(gauge, action_set=action_set))
        self.q, self.mask, self.ids = self.tensors.q, self.tensors.mask, self.tensors.ids
        self.log_probs = self.grid.log_probs
        generator = torch.Generator().manual_seed(seed)
        columns = torch.multinomial(self.mask.double(), 1, generator=generator)
        self.q_t, self.labels = self.q.gather(1, columns).squeeze(1), self.ids.gather(1, columns).squeeze(1)
        self.v_tp1 = torch.randn(len(self.q), generator=generator, dtype=torch.float64)
        self.flat = self.tensors.logits.flatten(0, 1)


def same(actual, expected):
    """To the rounding of float64."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


def same_gradient(actual, expected, logits):
    same(*(torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (actual, expected)))


@GAUGES
@pytest.mark.parametrize("gamma", [0.0, 0.7, 1.0])
def test_inverse_soft_q_is_nll_on_the_set_and_a_penalty(gauge, gamma):
    """Identity (I1) of the specification, in value and gradient."""
    x = OneState(gauge=gauge)
    v_t, alpha = td.soft_value(x.q, x.mask), 0.1
    loss = td.inverse_soft_q(x.q_t, v_t, x.v_tp1, gamma, alpha)
    # The student's softmax, renormalised on the set
    inside = x.flat.gather(1, x.ids).masked_fill(~x.mask, -INF).logsumexp(-1)
    nll = inside - x.flat.gather(1, x.labels.unsqueeze(1)).squeeze(1)
    expected = nll + (x.q_t - gamma * x.v_tp1).square() / (4 * alpha)
    same(loss, expected)
    same_gradient(loss, expected, x.tensors.logits)


def test_inverse_soft_q_is_a_regression_of_the_implied_reward():
    """Identity (I2) of the specification: -phi(r) = (r - 2 alpha)^2 / (4 alpha) - alpha."""
    x = OneState()
    v_t, alpha, gamma = td.soft_value(x.q, x.mask), 0.1, 0.9
    loss = td.inverse_soft_q(x.q_t, v_t, x.v_tp1, gamma, alpha)
    minus_phi = loss - (v_t - gamma * x.v_tp1)
    implied = td.implied_reward(x.q_t, x.v_tp1, gamma)
    expected = (implied - 2 * alpha).square() / (4 * alpha) - alpha
    same(minus_phi, expected)
    same(minus_phi, td.chi2_penalty(implied, alpha, center=torch.full_like(implied, 2 * alpha)) - alpha)


@GAUGES
@pytest.mark.parametrize("gamma", [0.0, 0.7, 1.0])
def test_inverse_soft_q_full_set_without_chi2_is_token_nll(gauge, gamma):
    x = OneState(gauge=gauge, action_set="full")
    loss = td.inverse_soft_q(x.q_t, td.soft_value(x.q, x.mask), x.v_tp1, gamma)
    nll = torch.nn.functional.cross_entropy(x.flat, x.labels, reduction="none")
    same(loss, nll)
    same_gradient(loss, nll, x.tensors.logits)


@GAUGES
def test_inverse_soft_q_set_without_chi2_is_masked_nll(gauge):
    x = OneState(gauge=gauge)
    loss = td.inverse_soft_q(x.q_t, td.soft_value(x.q, x.mask), x.v_tp1, 0.9)
    outside = torch.ones_like(x.flat, dtype=torch.bool).scatter(1, x.ids, ~x.mask)
    nll = torch.nn.functional.cross_entropy(x.flat.masked_fill(outside, -INF), x.labels, reduction="none")
    same(loss, nll)
    same_gradient(loss, nll, x.tensors.logits)


@GAUGES
@pytest.mark.parametrize("action_set", ["top_p", "full"])
def test_expected_inverse_soft_q_is_kl_on_the_set_and_a_constant(gauge, action_set):
    x = OneState(gauge=gauge, action_set=action_set)
    loss = td.expected_inverse_soft_q(x.q, x.mask, x.log_probs, td.soft_value(x.q, x.mask))
    teacher = x.log_probs.masked_fill(~x.mask, -INF).softmax(-1)
    entropy = torch.special.entr(teacher).sum(-1)
    student = x.flat.gather(1, x.ids).masked_fill(~x.mask, -INF).log_softmax(-1).masked_fill(~x.mask, 0.0)
    kl = (torch.special.xlogy(teacher, teacher) - teacher * student).sum(-1)
    assert (kl > 0.05).any() and (kl > -1e-12).all()
    same(loss, kl + entropy)
    same_gradient(loss, kl, x.tensors.logits)


@GAUGES
def test_expected_inverse_soft_q_with_the_tail_is_kl_of_the_whole_student(gauge):
    x = OneState(gauge=gauge)
    loss = td.expected_inverse_soft_q(x.q, x.mask, x.log_probs, td.soft_value(x.q, x.mask))
    loss = loss + td.set_tail(student_log_mass(x.tensors))
    teacher = x.log_probs.masked_fill(~x.mask, -INF).softmax(-1)
    found = loss - torch.special.entr(teacher).sum(-1)
    allowed = x.tensors.grid.probabilities
    leaves, expected = [], []
    for i, row in enumerate(x.flat.tolist()):
        numbers = [references.Number(z) for z in row]
        probabilities = allowed[i // 2][i % 2]
        chosen = references.top_p_set(probabilities, len(row), 0.8)
        expected.append(references.set_forward_kl(numbers, chosen, probabilities))
        leaves += numbers
    same(found, double(*[value.value for value in expected]))
    gradient = torch.autograd.grad(found.sum(), x.tensors.logits)[0]
    same(gradient.flatten(), double(*references.gradients(references.total(expected), leaves)))


@GAUGES
def test_gauges_change_nothing_but_chi2(gauge):
    x, raw = OneState(gauge=gauge), OneState()
    assert (x.q - raw.q).abs().max() > 0.5 or gauge == "raw"
    for settings in ((0.9, None), (0.9, 0.3)):
        values = [td.soft_value(each.q, each.mask) for each in (x, raw)]
        losses = [td.inverse_soft_q(each.q_t, v, x.v_tp1, *settings) for each, v in zip((x, raw), values, strict=True)]
        if settings[1] is None:
            same(*losses)
        elif gauge != "raw":
            assert (losses[0] - losses[1]).abs().max() > 0.5


@pytest.mark.parametrize("entropy_weight", [0.25, 1.0, 3.0])
def test_soft_value_is_the_expected_value_of_its_own_policy(entropy_weight):
    x = OneState()
    soft = td.soft_value(x.q, x.mask, entropy_weight)
    own = td.log_policy(x.q / entropy_weight, x.mask)
    expected = td.expected_value(x.q, x.mask, own, entropy_weight)
    same(soft, expected)
    # The policy is the best one, so that its own gradient adds nothing
    same_gradient(soft, expected, x.tensors.logits)
    # And no other policy does better
    assert (td.expected_value(x.q, x.mask, x.log_probs, entropy_weight) <= soft + 1e-12).all()


def test_soft_value_without_entropy_tends_to_the_hard_value():
    x = OneState()
    hard = td.hard_value(x.q, x.mask)
    # The largest is up to log K of the weight above
    for entropy_weight in (1e-2, 1e-4, 1e-8):
        gap = td.soft_value(x.q, x.mask, entropy_weight) - hard
        assert (gap >= -1e-12).all() and (gap <= entropy_weight * math.log(11.0) + 1e-12).all()


@pytest.mark.parametrize("entropy_weight", [0.5, 1.0, 2.0])
def test_backups_shift_with_q(entropy_weight):
    x = OneState()
    shift = torch.linspace(-3.0, 3.0, len(x.q), dtype=torch.float64)
    moved = x.q + shift.unsqueeze(1)
    same(td.soft_value(moved, x.mask, entropy_weight), td.soft_value(x.q, x.mask, entropy_weight) + shift)
    same(td.hard_value(moved, x.mask), td.hard_value(x.q, x.mask) + shift)
    arguments = x.mask, x.log_probs, entropy_weight
    same(td.expected_value(moved, *arguments), td.expected_value(x.q, *arguments) + shift)
    same(td.expected_value(x.q, x.mask, x.log_probs - 2.0), td.expected_value(x.q, x.mask, x.log_probs))
    inside = x.mask.nonzero(as_tuple=True)
    same(td.log_policy(moved, x.mask)[inside], td.log_policy(x.q, x.mask)[inside])


def test_losses_do_not_depend_on_the_shift_of_a_state():
    x = OneState()
    shift = torch.linspace(-3.0, 3.0, len(x.q), dtype=torch.float64)
    moved, v, v_moved = x.q + shift.unsqueeze(1), td.soft_value(x.q, x.mask), td.soft_value(x.q, x.mask) + shift
    same(td.inverse_soft_q(x.q_t + shift, v_moved, x.v_tp1, 0.9), td.inverse_soft_q(x.q_t, v, x.v_tp1, 0.9))
    same(
        td.expected_inverse_soft_q(moved, x.mask, x.log_probs, v_moved),
        td.expected_inverse_soft_q(x.q, x.mask, x.log_probs, v),
    )
    same(td.large_margin(moved, x.mask, x.ids, x.labels, 0.5), td.large_margin(x.q, x.mask, x.ids, x.labels, 0.5))
    same(td.soft_actor_critic(moved, x.mask, x.log_probs + 7.0), td.soft_actor_critic(x.q, x.mask, x.log_probs))
    # The penalty does depend on it
    losses = [td.inverse_soft_q(q, v, x.v_tp1, 0.9, 0.1) for q in (x.q_t, x.q_t + shift)]
    assert (losses[0] - losses[1]).abs().max() > 1.0


def test_soft_actor_critic_of_the_same_values_is_zero_with_zero_gradient():
    x = OneState()
    values = td.soft_actor_critic(x.q, x.mask, x.q.detach() + 3.0)
    same(values, torch.zeros_like(values))
    same_gradient(values, 0.0 * x.q.sum(), x.tensors.logits)
    hot = td.soft_actor_critic(x.q, x.mask, 2.0 * x.q.detach(), entropy_weight=2.0)
    same(hot, torch.zeros_like(hot))
    assert (td.soft_actor_critic(x.q, x.mask, x.log_probs) >= -1e-12).all()


def test_large_margin_is_zero_where_the_label_leads_by_the_margin_and_never_negative():
    x = OneState()
    values = td.large_margin(x.q, x.mask, x.ids, x.labels, 0.5)
    others = x.q.masked_fill(~x.mask | (x.ids == x.labels.unsqueeze(1)), -INF).amax(-1)
    leads = x.q_t >= others + 0.5
    assert (values >= 0).all() and torch.equal(values == 0, leads) and leads.any() and not leads.all()


def test_chi2_penalty_of_a_large_alpha_vanishes():
    x = OneState()
    v = td.soft_value(x.q, x.mask)
    plain = td.inverse_soft_q(x.q_t, v, x.v_tp1, 0.9)
    torch.testing.assert_close(td.inverse_soft_q(x.q_t, v, x.v_tp1, 0.9, 1e9), plain, rtol=0, atol=1e-6)


# Masks, padding, extremes

# What is written in columns outside of the set
GARBAGE = pytest.mark.parametrize("garbage", [1e30, INF, -INF, math.nan], ids=str)


def per_state(q, mask, log_probs, ids, labels):
    """All functions of a state that read columns."""
    # Of other values, with whatever there is outside of the set
    other = torch.where(mask, log_probs.to(q.dtype), q.detach())
    return {
        "soft_value": td.soft_value(q, mask),
        "soft_value_0.1": td.soft_value(q, mask, 0.1),
        "hard_value": td.hard_value(q, mask),
        "expected_value": td.expected_value(q, mask, log_probs),
        "expected_value_entropy": td.expected_value(q, mask, log_probs, 0.5),
        "expected_value_own": td.expected_value(q, mask, td.log_policy(q, mask), 1.0),
        "expected_inverse_soft_q": td.expected_inverse_soft_q(q, mask, log_probs, td.soft_value(q, mask)),
        "large_margin": td.large_margin(q, mask, ids, labels, 0.5),
        "soft_actor_critic": td.soft_actor_critic(q, mask, other),
        "released": td.released(q, mask, log_probs[:, 0], log_probs[:, 0].flip(0), 0.9, q.shape[1]),
    }


@GARBAGE
def test_columns_outside_of_the_set_do_not_count(garbage):
    x = OneState()
    clean = x.q.detach().requires_grad_()
    dirty = x.q.detach().masked_fill(~x.mask, garbage).requires_grad_()
    arguments = x.mask, x.log_probs, x.ids, x.labels
    found, expected = per_state(dirty, *arguments), per_state(clean, *arguments)
    for name in found:
        same(found[name], expected[name])
        (of_dirty,) = torch.autograd.grad(found[name].sum(), dirty, retain_graph=True)
        (of_clean,) = torch.autograd.grad(expected[name].sum(), clean, retain_graph=True)
        assert torch.isfinite(of_dirty).all() and not of_dirty[~x.mask].any(), name
        same(of_dirty, of_clean)
    found = td.log_policy(dirty, x.mask)
    assert (found[~x.mask] == -INF).all() and torch.isfinite(found[x.mask]).all()
    (gradient,) = torch.autograd.grad(found[x.mask].square().sum(), dirty)
    assert torch.isfinite(gradient).all() and not gradient[~x.mask].any() and gradient.any()


def test_columns_of_padding_do_not_count():
    x = OneState()
    arguments = x.q.detach(), x.mask, x.log_probs, x.ids
    fills = (5.0, False, -INF, 0)
    padded = [
        torch.cat([part, torch.full_like(part[:, :3], fill)], 1) for part, fill in zip(arguments, fills, strict=True)
    ]
    narrow, wide = per_state(*arguments, x.labels), per_state(*padded, x.labels)
    for name in narrow:
        if name != "released":  # whose vocabulary is given here by the columns
            same(wide[name], narrow[name])
    for name, (function, _) in SETS.items():
        grid = Grid(ODD)
        before = function(grid)
        grid.log_probs = torch.cat([grid.log_probs, torch.full_like(grid.log_probs[:, :2], -INF)], 1)
        assert torch.equal(function(grid)[:, :7], before), name
        assert not function(grid)[:, 7:].any()


def test_set_of_a_single_token_is_certain():
    q = double([1.5, -2.0, 0.3]).requires_grad_()
    mask, ids = bools([1, 0, 0]), torch.tensor([[4, 7, 0]])
    log_probs = torch.tensor([[math.log(0.9), -INF, -INF]]).double()
    v = td.soft_value(q, mask)
    assert v.tolist() == td.hard_value(q, mask).tolist() == [1.5]
    assert td.expected_value(q, mask, log_probs, 1.0).item() == pytest.approx(1.5, abs=1e-15)
    assert td.log_policy(q, mask).tolist() == [[0.0, -INF, -INF]]
    zero = {
        "nll": td.inverse_soft_q(q[:, 0], v, double(0.7), 0.9),
        "expected": td.expected_inverse_soft_q(q, mask, log_probs, v),
        "margin": td.large_margin(q, mask, ids, torch.tensor([4]), 2.0),
        "actor": td.soft_actor_critic(q, mask, double([9.0, 0.0, 0.0])),
    }
    for name, value in zero.items():
        assert value.tolist() == [0.0], name
        (gradient,) = torch.autograd.grad(value.sum(), q, retain_graph=True)
        assert gradient.tolist() == [[0.0, 0.0, 0.0]], name


@pytest.mark.parametrize("scale", [1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_q_gives_finite_values_and_gradients(scale, dtype):
    x = OneState()
    q = (scale * x.q.detach()).to(dtype).requires_grad_()
    values = per_state(q, x.mask, x.log_probs.to(dtype), x.ids, x.labels)
    for name, value in values.items():
        (gradient,) = torch.autograd.grad(value.sum(), q, retain_graph=True)
        # A square leaves the range of float32, which ends at 3e38
        is_square = name == "released" and dtype == torch.float32
        assert is_square or torch.isfinite(value).all() and torch.isfinite(gradient).all(), name
    torch.testing.assert_close(values["soft_value"], td.hard_value(q, x.mask), rtol=1e-6, atol=1e-2)
    gauged = td.gauged(q, "max", maximum=q.amax(-1), clip_min=-10.0)
    assert gauged.min().item() == -10.0 and gauged.max().item() == 0.0
    v = td.soft_value(gauged, x.mask)
    loss = td.inverse_soft_q(gauged[:, 0], v, torch.zeros_like(v), 0.9, 0.1).sum()
    (gradient,) = torch.autograd.grad(loss, q)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()


def test_expected_value_of_a_policy_that_excludes_a_token_of_the_set_is_finite():
    # 0 (q - log 0) is 0, in the value and in the gradient of q and of the policy
    q, scores = double([1.0, 2.0, 3.0]).requires_grad_(), double([0.0, -1e4, 0.0]).requires_grad_()
    mask = bools([1, 1, 1])
    for log_weights in (scores, td.log_policy(scores, mask), scores.masked_fill(scores < -1.0, -INF)):
        value = td.expected_value(q, mask, log_weights, 1.0)
        assert value.item() == pytest.approx(2.0 + math.log(2.0), abs=1e-12)
        for gradient in torch.autograd.grad(value.sum(), (q, scores), retain_graph=True):
            assert torch.isfinite(gradient).all()


def test_expected_inverse_soft_q_teacher_that_excludes_a_token_of_the_set_is_finite():
    q = double([1.0, 2.0, -1e6]).requires_grad_()
    mask, log_probs = bools([1, 1, 1]), torch.tensor([[0.0, -INF, -INF]]).double()
    value = td.expected_inverse_soft_q(q, mask, log_probs, td.soft_value(q, mask))
    value.sum().backward()
    assert value.item() == pytest.approx(math.log(1 + math.e), abs=1e-12) and torch.isfinite(q.grad).all()


def test_teacher_arguments_carry_no_gradient_in_the_expected_form():
    x = OneState()
    log_probs = x.log_probs.clone().requires_grad_()
    td.expected_inverse_soft_q(x.q, x.mask, log_probs, td.soft_value(x.q, x.mask)).sum().backward()
    assert log_probs.grad is None or not log_probs.grad.any()


def test_rows_without_a_set_leave_gradients_finite():
    """Rows of another length have no tokens; what is computed of them must not reach the others."""
    x = OneState()
    q = x.q.detach().requires_grad_()
    mask = x.mask.clone()
    mask[::3] = False
    for name, value in per_state(q, mask, x.log_probs, x.ids, x.labels).items():
        (gradient,) = torch.autograd.grad(value[mask.any(-1)].sum(), q, retain_graph=True)
        assert torch.isfinite(gradient).all() and not gradient[::3].any(), name


def test_all_masked_batch_gives_zero_with_zero_gradients():
    grid = Grid(ODD)
    grid.lengths, grid.mask = (0, 0, 0), torch.zeros_like(grid.mask)
    tensors = Tensors(grid, Settings("max", -10.0))
    v_t, after = tensors.on_grid(td.soft_value(tensors.q, tensors.mask))
    v_tp1 = td.next_values(v_t, grid.mask, after)
    assert not v_tp1.any()
    for kind, (function, _) in RETURNS.items():
        assert not function(td.implied_reward(tensors.q_t, v_tp1, 0.9), v_tp1, grid.mask, 0.9).any(), kind
    values = td.released(tensors.q, tensors.mask, v_t.new_zeros(len(tensors.q)), v_t.new_zeros(len(tensors.q)), 0.9, 7)
    nothing = torch.zeros(len(values), dtype=torch.bool)
    loss = values[nothing].sum() + td.inverse_soft_q(tensors.q_t, v_t, v_tp1, 0.9, 0.1)[grid.mask].sum()
    loss.backward()
    assert loss.item() == 0.0 and not tensors.logits.grad.any()


@pytest.mark.parametrize("kind", [*RETURNS, "next_values"])
def test_returns_of_no_rows_or_no_columns_are_empty(kind):
    for size in ((0, 4), (3, 0)):
        zeros, mask = torch.zeros(size), torch.zeros(size, dtype=torch.bool)
        if kind == "next_values":
            assert td.next_values(zeros, mask, torch.zeros(size[0])).shape == size
        else:
            assert RETURNS[kind][0](zeros, zeros, mask, 0.9).shape == size


def test_functions_of_no_rows_are_empty():
    x = OneState()
    empty = (part[:0] for part in (x.q, x.mask, x.log_probs, x.ids, x.labels))
    for name, value in per_state(*empty).items():
        assert value.shape == (0,), name


def test_bfloat16_inputs_are_computed_in_float32():
    """Exactly what the same numbers give in float32, in float32."""
    x = OneState()
    half = x.q.detach().bfloat16()
    log_probs = x.log_probs.bfloat16()
    arguments = x.ids, x.labels
    found = per_state(half, x.mask, log_probs, *arguments)
    expected = per_state(half.float(), x.mask, log_probs.float(), *arguments)
    for name, value in found.items():
        assert value.dtype == torch.float32, name
        assert torch.equal(value, expected[name]), name
    assert td.log_policy(half, x.mask).dtype == torch.float32
    q_t, v = half[:, 0], half[:, 1]
    loss = td.inverse_soft_q(q_t, v, v.flip(0), 0.9, 0.1)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, td.inverse_soft_q(q_t.float(), v.float(), v.flip(0).float(), 0.9, 0.1))
    assert td.soft_q_regression(q_t, v).dtype == td.set_tail(q_t).dtype == torch.float32
    assert td.gauged(half, "max", maximum=half.amax(-1)).dtype == torch.float32
    for name, (function, _) in RETURNS.items():
        rewards = half[:, :4]
        found = function(rewards, rewards.flip(0), torch.ones(rewards.shape, dtype=torch.bool), 0.9)
        assert found.dtype == torch.float32, name


def test_bfloat16_gradients_are_near_those_of_float32():
    x = OneState()
    half, full = x.q.detach().bfloat16().requires_grad_(), x.q.detach().bfloat16().float().requires_grad_()
    found = per_state(half, x.mask, x.log_probs.float(), x.ids, x.labels)
    expected = per_state(full, x.mask, x.log_probs.float(), x.ids, x.labels)
    for name in found:
        (a,), (b,) = torch.autograd.grad(found[name].sum(), half), torch.autograd.grad(expected[name].sum(), full)
        # Each gradient is rounded to 8 bits
        torch.testing.assert_close(a.float(), b, rtol=2**-7, atol=2**-7, msg=name)


# Errors

NOTHING = torch.zeros(1, 3)


@pytest.mark.parametrize("mass", [0.0, -0.1, 1.0001, math.nan])
@pytest.mark.parametrize("name", ["p", "min_p", "threshold"])
def test_action_set_mass_outside_of_zero_to_one_raises(name, mass):
    function = {"p": td.top_p_set, "min_p": td.min_p_set, "threshold": td.threshold_set}[name]
    expected = rf"`{name}` is {mass}, but it is a probability mass\. Set it in \(0, 1\]\."
    with pytest.raises(ValueError, match=expected):
        function(NOTHING, mass)


@pytest.mark.parametrize("k", [0, -3])
def test_top_k_set_k_below_one_raises(k):
    with pytest.raises(ValueError, match=rf"`k` is {k}, .* Set it to 1 or more\."):
        td.top_k_set(NOTHING, k)


def test_gauged_unknown_gauge_raises():
    with pytest.raises(ValueError, match=r"`gauge` is 'min', .*'raw', 'max'.*'logsoftmax'"):
        td.gauged(NOTHING, "min", maximum=NOTHING[:, 0], log_normaliser=NOTHING[:, 0])


@pytest.mark.parametrize(("gauge", "missing"), [("max", "maximum"), ("logsoftmax", "log_normaliser")])
def test_gauged_without_the_number_it_needs_raises(gauge, missing):
    others = {"maximum": NOTHING[:, 0], "log_normaliser": NOTHING[:, 0]}
    del others[missing]
    with pytest.raises(ValueError, match=rf"`gauge` is '{gauge}', .*`{missing}`"):
        td.gauged(NOTHING, gauge, **others)


@pytest.mark.parametrize("chi2_alpha", [0.0, -0.1, math.nan])
def test_chi2_alpha_not_above_zero_raises(chi2_alpha):
    expected = rf"`chi2_alpha` is {chi2_alpha}, .* Set it above 0"
    with pytest.raises(ValueError, match=expected):
        td.chi2_penalty(NOTHING, chi2_alpha)
    with pytest.raises(ValueError, match=expected):
        td.inverse_soft_q(NOTHING, NOTHING, NOTHING, 0.9, chi2_alpha)


@pytest.mark.parametrize("entropy_weight", [0.0, -1.0, math.nan])
def test_entropy_weight_not_above_zero_raises(entropy_weight):
    expected = rf"`entropy_weight` is {entropy_weight}, but .*values are divided by it\. Set it above 0"
    with pytest.raises(ValueError, match=expected):
        td.soft_value(NOTHING, NOTHING == 0, entropy_weight)
    with pytest.raises(ValueError, match=expected):
        td.soft_actor_critic(NOTHING, NOTHING == 0, NOTHING, entropy_weight)


@pytest.mark.parametrize("margin", [-0.5, math.nan])
def test_large_margin_negative_margin_raises(margin):
    with pytest.raises(ValueError, match=rf"`margin` is {margin}, but it is a distance .* Set it to 0 or more\."):
        td.large_margin(NOTHING, NOTHING == 0, NOTHING.long(), NOTHING[:, 0].long(), margin)


GRID_OF_ONE = NOTHING, NOTHING, torch.ones(1, 3, dtype=torch.bool)


@pytest.mark.parametrize("n", [0, -1])
def test_n_step_returns_of_no_step_raises(n):
    with pytest.raises(ValueError, match=rf"`n` is {n}, .* Set it to 1 or more\."):
        td.n_step_returns(*GRID_OF_ONE, 0.9, n)


@pytest.mark.parametrize("lambda_", [-0.1, 1.1, math.nan])
def test_lambda_returns_lambda_outside_of_zero_to_one_raises(lambda_):
    with pytest.raises(ValueError, match=rf"`lambda_` is {lambda_}, .* Set it in \[0, 1\]\."):
        td.lambda_returns(*GRID_OF_ONE, 0.9, lambda_)


@EVERY_RETURN
@pytest.mark.parametrize("gamma", [-0.1, 1.1, math.nan])
def test_returns_gamma_outside_of_zero_to_one_raises(kind, gamma):
    with pytest.raises(ValueError, match=rf"`gamma` is {gamma}, .* Set it in \[0, 1\]\."):
        RETURNS[kind][0](*GRID_OF_ONE, gamma)


@pytest.mark.parametrize("gamma", [-0.1, 1.1, math.nan])
def test_losses_gamma_outside_of_zero_to_one_raises(gamma):
    expected = rf"`gamma` is {gamma}, .* Set it in \[0, 1\]\."
    with pytest.raises(ValueError, match=expected):
        td.implied_reward(NOTHING, NOTHING, gamma)
    with pytest.raises(ValueError, match=expected):
        td.inverse_soft_q(NOTHING, NOTHING, NOTHING, gamma)
    with pytest.raises(ValueError, match=expected):
        td.released(NOTHING, GRID_OF_ONE[2], NOTHING[:, 0], NOTHING[:, 0], gamma, 3)

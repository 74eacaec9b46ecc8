"""The moments on a game small enough to enumerate.

Figures of the table are literals, worked out by hand for gamma = 1. For other discounts, and for a larger game, they
come from `tests/references/game.py`, which knows nothing of tensors.
"""

from dataclasses import replace

import pytest
import torch

from tests.references import game as reference
from trl_kd.losses import (
    cross_entropy,
    discount_weights,
    exact_moment,
    horizon,
    later_returns,
    moment,
    total_variation,
    weighted_sum,
)


TOLERANCE = 1e-9
TABLE = reference.game_of_the_table()
LARGER = reference.random_game(vocab_size=3, length=3, seed=0)
# One state of the table can't be told from the others; two numbers for each state tell some apart
ONE_FEATURE = {(): [1.0], (0,): [1.0], (1,): [1.0]}
TWO_FEATURES = {(): [1.0, 0.0], (0,): [1.0, 1.0], (1,): [1.0, -1.0]}
GAMES = pytest.mark.parametrize("game", [TABLE, LARGER], ids=["table", "larger"])
GAMMAS = pytest.mark.parametrize("gamma", [1.0, 0.9])
SIDES = pytest.mark.parametrize("side", ["off", "on"])


def writer_of(game, side):
    return game.teacher if side == "off" else game.student


class Tensors:
    """The same game as tensors: one row for each possible text, weighted by its probability."""

    def __init__(self, game, padding=0):
        self.game = game
        self.labels = torch.tensor(game.texts)  # (B, K)
        index = {state: i for i, state in enumerate(game.states)}
        self.at = torch.tensor([[index[text[:t]] for t in range(game.length)] for text in game.texts])  # (B, K)
        self.mask = torch.ones_like(self.labels, dtype=torch.bool)
        if padding:
            filler = torch.zeros(len(game.texts), padding, dtype=torch.long)
            self.labels, self.at = torch.cat([self.labels, filler], 1), torch.cat([self.at, filler], 1)
            self.mask = torch.cat([self.mask, filler.bool()], 1)
        self.positions = torch.arange(self.at.shape[1]).expand_as(self.at)
        self.teacher = self.table(game.teacher).log()
        self.student = self.table(game.student).log().requires_grad_()  # (states, V)
        self.reward, self.critic = self.table(game.reward), self.table(game.critic)

    def table(self, numbers):
        return torch.tensor([numbers[state] for state in self.game.states], dtype=torch.float64)

    def text_weights(self, side):
        policy = writer_of(self.game, side)
        weights = [reference.probability(policy, text) for text in self.game.texts]
        return torch.tensor(weights, dtype=torch.float64).unsqueeze(1)  # (B, 1)

    def token_weights(self, side, gamma):
        return self.text_weights(side) * discount_weights(self.positions, gamma) * self.mask

    def moments(self, critic):
        return moment(self.student[self.at], self.teacher[self.at], critic[self.at])  # (B, K)

    def moment(self, side, critic, gamma):
        return weighted_sum(self.moments(critic), self.token_weights(side, gamma))

    def expected_return(self, side, gamma):
        rewards = self.reward[self.at].gather(-1, self.labels.unsqueeze(-1)).squeeze(-1)
        return weighted_sum(rewards, self.token_weights(side, gamma)).item()

    def action_values(self, side, gamma):
        """Q as average over the texts that go through a state and an action, of reward and later rewards."""
        rewards = self.reward[self.at].gather(-1, self.labels.unsqueeze(-1)).squeeze(-1)
        returns = rewards + later_returns(rewards, self.mask, gamma)
        weights = self.text_weights(side).expand_as(returns)
        result = torch.zeros_like(self.reward)
        for state in range(len(self.game.states)):
            for action in range(self.game.vocab_size):
                here = self.mask & (self.at == state) & (self.labels == action)
                result[state, action] = weighted_sum(returns, weights * here) / (weights * here).sum()
        return result

    def linear_moments(self, side, gamma, features):
        """Derivative of the moment of the critic f(s, y) = W_y . h(s): the moment of each unit of W alone."""
        features = self.table(features)  # (states, H)
        rows = []
        for y in range(self.game.vocab_size):
            units = [torch.zeros_like(self.critic) for _ in range(features.shape[1])]
            for k, unit in enumerate(units):
                unit[:, y] = features[:, k]
            rows.append([self.moment(side, unit, gamma).item() for unit in units])
        return torch.tensor(rows, dtype=torch.float64)  # (V, H)

    def gradient(self, loss):
        self.student.grad = None
        loss.backward()
        return self.student.grad

    def direct(self, side, critic, gamma):
        return self.gradient(self.moment(side, critic, gamma))

    def full(self, critic, gamma):
        """On-policy, with the effect of each token on the states after it."""
        values, weights = self.moments(critic), self.token_weights("on", gamma)
        log_probs = -cross_entropy(self.student[self.at], self.labels)
        later = later_returns(values, self.mask, gamma)
        return self.gradient(weighted_sum(values, weights) + weighted_sum(later * log_probs, weights))

    def sampled_values(self, critic):
        """The critic at the text's own token in place of its expectation under the student."""
        expected = (self.teacher.exp() * critic).sum(-1)[self.at]
        return expected - critic[self.at].gather(-1, self.labels.unsqueeze(-1)).squeeze(-1)

    def full_from_sampled_values(self, critic, gamma):
        """REINFORCE alone: all of what comes, this token included."""
        values = self.sampled_values(critic)
        log_probs = -cross_entropy(self.student[self.at], self.labels)
        to_come = values + later_returns(values, self.mask, gamma)
        return self.gradient(weighted_sum(to_come * log_probs, self.token_weights("on", gamma)))

    def mean_and_variance(self, values, gamma):
        totals = (values * discount_weights(self.positions, gamma)).sum(1)
        weights = self.text_weights("on").squeeze(1)
        mean = weighted_sum(totals, weights)
        return mean.item(), weighted_sum((totals - mean) ** 2, weights).item()


def close(value, expected):
    value = value.item() if isinstance(value, torch.Tensor) else value
    assert value == pytest.approx(expected, abs=TOLERANCE)


def all_close(values, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=0, atol=TOLERANCE)


# Every figure of the table, gamma = 1


@pytest.fixture
def table():
    return Tensors(TABLE)


def test_table_returns_and_gap_have_the_values_by_hand(table):
    teacher, student = table.expected_return("off", 1.0), table.expected_return("on", 1.0)
    close(teacher, 1.272)
    close(student, 1.055)
    close(teacher - student, 0.217)


def test_table_action_values_at_the_root_have_the_values_by_hand(table):
    all_close(table.action_values("on", 1.0)[0], [1.17, 0.94])
    all_close(table.action_values("off", 1.0)[0], [1.38, 1.02])


def test_table_moments_of_the_true_action_values_are_the_gap(table):
    close(table.moment("off", table.action_values("on", 1.0), 1.0), 0.217)
    close(table.moment("on", table.action_values("off", 1.0), 1.0), 0.217)


@pytest.mark.parametrize(("side", "expected"), [("off", 0.94), ("on", 0.90)])
def test_table_worst_bounded_critic_has_the_moment_by_hand(table, side, expected):
    values = exact_moment(table.student[table.at], table.teacher[table.at])
    close(weighted_sum(values, table.token_weights(side, 1.0)), expected)
    distances = total_variation(table.student[table.at], table.teacher[table.at])
    all_close(distances[[0, 2]].detach(), [[0.2, 0.3], [0.2, 0.2]])
    close(2 * weighted_sum(distances, table.token_weights(side, 1.0)), expected)


@pytest.mark.parametrize(("side", "expected"), [("off", 0.47), ("on", 0.45)])
def test_table_worst_critic_between_zero_and_one_has_half_the_moment(table, side, expected):
    distances = total_variation(table.student[table.at], table.teacher[table.at])
    close(weighted_sum(distances, table.token_weights(side, 1.0)), expected)


@pytest.mark.parametrize(("side", "expected"), [("off", 0.67), ("on", 0.65)])
def test_table_horizon_bound_has_the_value_by_hand(table, side, expected):
    distances = total_variation(table.student[table.at], table.teacher[table.at])
    remaining = horizon(TABLE.length - table.positions, 1.0)
    close(weighted_sum(remaining * distances, table.token_weights(side, 1.0)), expected)


def test_table_moments_of_the_fixed_critic_and_their_mixture_have_the_values_by_hand(table):
    off, on = table.moment("off", table.critic, 1.0), table.moment("on", table.critic, 1.0)
    close(off, 0.56)
    close(on, 0.50)
    close((1 - 0.5) * off + 0.5 * on, 0.53)


@pytest.mark.parametrize(("side", "expected"), [("off", 0.14), ("on", 0.10)])
def test_table_worst_critic_blind_to_the_state_has_the_moment_by_hand(table, side, expected):
    # |W| <= 1, and the moment is linear in W: its largest value is the sum of the sizes of its derivatives
    close(table.linear_moments(side, 1.0, ONE_FEATURE).abs().sum(), expected)


@pytest.mark.parametrize(("side", "row", "expected"), [("off", [-0.07, -0.15], 0.44), ("on", [-0.05, -0.05], 0.20)])
def test_table_linear_critic_has_the_gradient_and_supremum_by_hand(table, side, row, expected):
    gradient = table.linear_moments(side, 1.0, TWO_FEATURES)
    all_close(gradient, [row, [-number for number in row]])
    close(gradient.abs().sum(), expected)


def columns(column):
    return [[number, -number] for number in column]


def test_table_student_gradients_have_the_values_by_hand(table):
    all_close(table.direct("off", table.critic, 1.0), columns([-0.25, 0.0945, 0.054]))
    all_close(table.direct("on", table.critic, 1.0), columns([-0.25, 0.0675, 0.09]))
    all_close(table.full(table.critic, 1.0), columns([-0.175, 0.0675, 0.09]))
    all_close(table.full_from_sampled_values(table.critic, 1.0), columns([-0.175, 0.0675, 0.09]))


def test_table_estimators_have_the_values_mean_and_variances_by_hand(table):
    exact, sampled = table.moments(table.critic), table.sampled_values(table.critic)
    # Texts 00, 01, 10, 11
    all_close(table.text_weights("on").squeeze(1), [0.45, 0.05, 0.20, 0.30])
    all_close(table.text_weights("off").squeeze(1), [0.42, 0.28, 0.06, 0.24])
    all_close(exact.sum(1).detach(), [0.65, 0.65, 0.35, 0.35])
    all_close(sampled.sum(1), [0.3, -1.2, 1.3, 0.55])
    for values, variance in ((exact, 0.0225), (sampled, 0.29125)):
        mean, spread = table.mean_and_variance(values.detach(), 1.0)
        close(mean, 0.50)
        close(spread, variance)


# The same quantities against the enumeration


@GAMMAS
@GAMES
def test_game_returns_and_action_values_equal_the_enumeration(game, gamma):
    tensors = Tensors(game)
    for side in ("off", "on"):
        policy = writer_of(game, side)
        close(tensors.expected_return(side, gamma), reference.expected_return(game, policy, gamma))
        all_close(tensors.action_values(side, gamma), tensors.table(reference.action_values(game, policy, gamma)))


@GAMMAS
@GAMES
def test_game_moments_of_the_true_action_values_are_the_gap(game, gamma):
    tensors = Tensors(game)
    gap = reference.gap(game, gamma)
    close(tensors.moment("off", tensors.action_values("on", gamma), gamma), gap)
    close(tensors.moment("on", tensors.action_values("off", gamma), gamma), gap)


@SIDES
@GAMMAS
@GAMES
def test_game_moment_of_the_fixed_critic_equals_the_enumeration(game, gamma, side):
    tensors = Tensors(game)
    expected = reference.moment(game, writer_of(game, side), game.critic, gamma)
    close(tensors.moment(side, tensors.critic, gamma), expected)


@SIDES
@GAMMAS
def test_game_suprema_equal_the_enumeration_of_sign_patterns(gamma, side):
    tensors, writer = Tensors(TABLE), writer_of(TABLE, side)
    weights = tensors.token_weights(side, gamma)
    student, teacher = tensors.student[tensors.at], tensors.teacher[tensors.at]
    close(weighted_sum(exact_moment(student, teacher), weights), reference.supremum(TABLE, writer, gamma))
    half = reference.supremum(TABLE, writer, gamma, low=0.0)
    close(weighted_sum(total_variation(student, teacher), weights), half)


@SIDES
@GAMMAS
@pytest.mark.parametrize("features", [ONE_FEATURE, TWO_FEATURES], ids=["one_feature", "two_features"])
def test_game_linear_critic_equals_the_enumeration(features, gamma, side):
    gradient = Tensors(TABLE).linear_moments(side, gamma, features)
    writer = writer_of(TABLE, side)
    all_close(gradient, reference.critic_gradient(TABLE, writer, gamma, features))
    close(gradient.abs().sum(), reference.linear_supremum(TABLE, writer, gamma, features))


@SIDES
@GAMMAS
@GAMES
def test_game_gap_lies_between_zero_and_every_bound(game, gamma, side):
    tensors, gap = Tensors(game), reference.gap(game, gamma)
    weights = tensors.token_weights(side, gamma)
    student, teacher = tensors.student[tensors.at], tensors.teacher[tensors.at]
    remaining = horizon(game.length - tensors.positions, gamma)
    bound = weighted_sum(remaining * total_variation(student, teacher), weights).item()
    close(bound, reference.horizon_bound(game, writer_of(game, side), gamma))
    assert abs(gap) <= bound  # rewards lie in [0, 1]


@GAMMAS
@GAMES
def test_game_student_gradients_equal_the_enumeration(game, gamma):
    tensors = Tensors(game)
    for side in ("off", "on"):
        expected = reference.student_gradient(game, writer_of(game, side), game.critic, gamma, follow_states=False)
        all_close(tensors.direct(side, tensors.critic, gamma), tensors.table(expected))
    expected = reference.student_gradient(game, game.student, game.critic, gamma, follow_states=True)
    all_close(tensors.full(tensors.critic, gamma), tensors.table(expected))
    all_close(tensors.full_from_sampled_values(tensors.critic, gamma), tensors.table(expected))


@GAMMAS
@GAMES
def test_game_full_gradient_is_the_slope_of_the_on_policy_moment(game, gamma):
    # What the enumeration of gradients is checked by: the moment itself, with one logit moved
    gradient = Tensors(game).full(Tensors(game).critic, gamma)
    small = 1e-5  # errors of order small^2
    for i, state in enumerate(game.states[:4]):
        values = []
        for step in (small, -small):
            logits = torch.tensor(game.student[state], dtype=torch.float64).log()
            logits[0] += step
            moved = replace(game, student=game.student | {state: logits.softmax(-1).tolist()})
            values.append(reference.moment(moved, moved.student, game.critic, gamma))
        assert gradient[i, 0].item() == pytest.approx((values[0] - values[1]) / (2 * small), abs=1e-8)


@GAMMAS
@GAMES
def test_game_estimators_equal_the_enumeration(game, gamma):
    tensors = Tensors(game)
    for sampled in (False, True):
        values = tensors.sampled_values(tensors.critic) if sampled else tensors.moments(tensors.critic).detach()
        expected = reference.per_text(game, game.critic, gamma, sampled)
        expected = reference.mean_and_variance(game, game.student, expected)
        assert tensors.mean_and_variance(values, gamma) == pytest.approx(expected, abs=TOLERANCE)
        close(expected[0], reference.moment(game, game.student, game.critic, gamma))


@GAMMAS
@GAMES
def test_game_student_equal_to_teacher_has_no_moment_and_no_gradient(game, gamma):
    tensors = Tensors(replace(game, student=game.teacher))
    zero = torch.zeros_like(tensors.teacher)
    weights = tensors.token_weights("on", gamma)
    for side in ("off", "on"):
        close(tensors.moment(side, tensors.critic, gamma), 0.0)
    close(weighted_sum(exact_moment(tensors.student[tensors.at], tensors.teacher[tensors.at]), weights), 0.0)
    worst = exact_moment(tensors.student[tensors.at], tensors.teacher[tensors.at])
    all_close(tensors.gradient(weighted_sum(worst, weights)), zero)


@GAMMAS
@GAMES
def test_game_critic_plus_a_constant_of_the_state_changes_nothing(game, gamma):
    tensors = Tensors(game)
    offset = torch.arange(len(game.states), dtype=torch.float64).unsqueeze(1) - 1.5
    for side in ("off", "on"):
        expected = tensors.moment(side, tensors.critic, gamma).item()
        close(tensors.moment(side, tensors.critic + offset, gamma), expected)
        expected = tensors.direct(side, tensors.critic, gamma)
        all_close(tensors.direct(side, tensors.critic + offset, gamma), expected)
    all_close(tensors.full(tensors.critic + offset, gamma), tensors.full(tensors.critic, gamma))


@GAMMAS
@GAMES
def test_game_masked_padding_changes_nothing(game, gamma):
    plain, padded = Tensors(game), Tensors(game, padding=2)
    for side in ("off", "on"):
        close(padded.moment(side, padded.critic, gamma), plain.moment(side, plain.critic, gamma).item())
        all_close(padded.direct(side, padded.critic, gamma), plain.direct(side, plain.critic, gamma))
    all_close(padded.full(padded.critic, gamma), plain.full(plain.critic, gamma))

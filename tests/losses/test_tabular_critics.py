"""Learned critics on the game that is small enough to enumerate: their gradient, what they reach, and the game itself.

A student and a teacher are heads on one-hot states, so that all goes through `linear_loss` as in training. A critic's
features are given, not those of `critic_features`: the figures are for them.
"""

import pytest
import torch

from tests.losses.test_tabular_game import LARGER, ONE_FEATURE, TABLE, TWO_FEATURES, Tensors, all_close, writer_of
from tests.references import game as reference
from trl_kd.losses import Term, critic_objective, linear_loss, moment, total_variation
from trl_kd.modules import LMHead, ValueHead


INPUTS = ("student", "teacher", "critic")
SIDES = pytest.mark.parametrize("side", ["off", "on"])
FEATURES = pytest.mark.parametrize("features", [ONE_FEATURE, TWO_FEATURES], ids=["one_feature", "two_features"])


def one_hot(game):
    return {state: [float(other == state) for other in game.states] for state in game.states}


class Game:
    """Every token of every text as a row, weighted by the probability that `side` writes the text."""

    def __init__(self, game, side, features, gamma=1.0, bound=1.0):
        self.tensors = Tensors(game)
        rows = self.tensors.at.flatten()  # (N,)
        states = torch.eye(len(game.states), dtype=torch.float64)[rows]
        self.student = LMHead(self.tensors.student.detach().T.clone().requires_grad_())
        self.teacher = LMHead(self.tensors.teacher.T)
        self.weights = self.tensors.token_weights(side, gamma).flatten()
        self.features = self.tensors.table(features)[rows]
        self.embeddings = LMHead(torch.zeros(game.vocab_size, 1, dtype=torch.float64))
        self.critic = ValueHead("full", self.features.shape[1], self.embeddings, bound=bound).double()
        self.pairs = {"student": (states, self.student), "teacher": (states, self.teacher)}

    def all_pairs(self):
        return self.pairs | {"critic": self.critic.pair(self.features, self.embeddings)}

    def objective(self, penalty=0.0):
        def function(*logits):
            return critic_objective(*logits, penalty)

        return linear_loss(self.all_pairs(), {"objective": Term(function, INPUTS, self.weights)}, chunk_size=5).loss

    def moment(self):
        return linear_loss(self.all_pairs(), {"moment": Term(moment, INPUTS, self.weights)}, chunk_size=5).loss

    def gradient_at_zero(self, penalty=0.0):
        self.objective(penalty).backward()
        return self.critic.weight.grad / self.critic.scale

    def linear_supremum(self):
        """Largest moment over |W| <= 1, by ascent; the bound is so large that the tanh is a straight line."""
        box = 1.0 / (self.critic.bound * self.critic.scale)
        for _ in range(5):
            self.critic.weight.grad = None
            self.objective().backward()
            with torch.no_grad():
                self.critic.weight.add_(0.5 * box * self.critic.weight.grad.sign()).clamp_(-box, box)
        return self.moment().item()


# The rows of the table


@pytest.mark.parametrize(
    ("side", "features", "expected"),
    [
        ("off", ONE_FEATURE, [-0.07]),
        ("on", ONE_FEATURE, [-0.05]),
        ("off", TWO_FEATURES, [-0.07, -0.15]),
        ("on", TWO_FEATURES, [-0.05, -0.05]),
    ],
)
def test_table_critic_gradient_at_zero_has_the_values_by_hand(side, features, expected):
    # h = 1 off-policy: 0.2 - 0.7 * 0.3 - 0.3 * 0.2 for the first action, and the opposite for the second
    for penalty in (0.0, 0.7):  # flat where the critic is zero
        gradient = Game(TABLE, side, features).gradient_at_zero(penalty)
        all_close(gradient, [expected, [-number for number in expected]])


@pytest.mark.parametrize(
    ("side", "features", "expected"),
    [("off", ONE_FEATURE, 0.14), ("on", ONE_FEATURE, 0.10), ("off", TWO_FEATURES, 0.44), ("on", TWO_FEATURES, 0.20)],
)
def test_table_linear_supremum_is_reached_by_ascent(side, features, expected):
    # Of tanh(x) with x = 2e-4, a relative error of x^2 / 3
    assert Game(TABLE, side, features, bound=1e4).linear_supremum() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(("side", "expected"), [("off", 0.94), ("on", 0.90)])
def test_table_critic_that_tells_states_apart_reaches_the_supremum_of_all(side, expected):
    game = Game(TABLE, side, one_hot(TABLE))
    assert game.moment().item() == 0.0
    for _ in range(3):
        game.critic.weight.grad = None
        game.objective().backward()
        with torch.no_grad():
            game.critic.weight.add_(2.0 * game.critic.weight.grad.sign())
    # 16 goes into the tanh: 2 e^-32 away from 1
    assert game.moment().item() == pytest.approx(expected, abs=1e-12)


# The same against the enumeration


@SIDES
@pytest.mark.parametrize("gamma", [1.0, 0.9])
@FEATURES
def test_game_critic_gradient_at_zero_equals_the_enumeration(features, gamma, side):
    expected = reference.critic_gradient(TABLE, writer_of(TABLE, side), gamma, features)
    all_close(Game(TABLE, side, features, gamma).gradient_at_zero(), expected)


@SIDES
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_game_larger_critic_gradient_at_zero_equals_the_enumeration(gamma, side):
    features = one_hot(LARGER)
    expected = reference.critic_gradient(LARGER, writer_of(LARGER, side), gamma, features)
    all_close(Game(LARGER, side, features, gamma).gradient_at_zero(), expected)


@SIDES
@FEATURES
def test_game_linear_supremum_by_ascent_equals_the_enumeration(features, side):
    expected = reference.linear_supremum(TABLE, writer_of(TABLE, side), 0.9, features)
    found = Game(TABLE, side, features, gamma=0.9, bound=1e4).linear_supremum()
    assert found == pytest.approx(expected, rel=1e-7)


# Who gets a gradient


def test_game_student_s_loss_gives_the_critic_no_gradient():
    game = Game(TABLE, "on", TWO_FEATURES)
    with torch.no_grad():
        game.critic.weight.copy_(torch.tensor([[0.3, 0.1], [-0.2, 0.4]]))
    game.features.requires_grad_()
    game.moment().backward()
    assert game.critic.weight.grad is None or not game.critic.weight.grad.any()
    assert game.features.grad is None or not game.features.grad.any()
    assert game.student.weight.grad.abs().max() > 1e-3


def test_game_critic_s_objective_gives_the_student_no_gradient():
    game = Game(TABLE, "on", TWO_FEATURES)
    game.objective(0.5).backward()
    assert game.student.weight.grad is None or not game.student.weight.grad.any()
    assert game.critic.weight.grad.abs().max() > 1e-3


# The game


def distances_of_a_game(penalty, num_steps):
    """
    Mean of both distances (twice the total variation of a text) after each of the student's steps.

    Gradient descent of 0.1 on the student's logits; five steps of ascent before each, of 5 in the numbers that go into
    the tanh: 5 / scale^2 for the weights that `ValueHead` scales.
    """
    game = reference.game_of_the_table()
    teacher = torch.tensor([game.teacher[state] for state in game.states]).log()
    student = torch.tensor([game.student[state] for state in game.states]).log().requires_grad_()
    states, embeddings = torch.eye(3), LMHead(torch.zeros(2, 1))
    critics = torch.nn.ModuleList([ValueHead("full", 3, embeddings) for _ in ("off", "on")])
    ascent = torch.optim.SGD(critics.parameters(), lr=5.0 / critics[0].scale ** 2)
    descent = torch.optim.SGD([student], lr=0.1)
    both_teachers = teacher.repeat(2, 1)
    distances = []
    for _ in range(num_steps):
        both_students = student.repeat(2, 1)
        with torch.no_grad():
            weights = torch.cat(
                [part for policy in (teacher, student) for part in (torch.ones(1), policy[0].softmax(0))]
            )
        for _ in range(5):
            values = torch.cat([critic(states) for critic in critics])
            ascent.zero_grad()
            (-weights * critic_objective(both_students, both_teachers, values, penalty)).sum().backward()
            ascent.step()
        with torch.no_grad():
            values = torch.cat([critic(states) for critic in critics])
        descent.zero_grad()
        (0.5 * weights * moment(both_students, both_teachers, values)).sum().backward()
        descent.step()
        with torch.no_grad():
            distances.append((weights * total_variation(student.repeat(2, 1), both_teachers)).sum().item())
    return distances


def test_game_with_the_penalty_ends_at_the_teacher():
    distances = distances_of_a_game(penalty=0.1, num_steps=350)
    assert distances[0] > 0.8
    assert max(distances[-50:]) < 1e-3


def test_game_without_the_penalty_runs_in_circles():
    distances = distances_of_a_game(penalty=0.0, num_steps=350)
    # Far from the teacher for good: no lull in between, and no trend
    assert min(distances[-100:]) > 0.1 and sum(distances[-100:]) / 100 > 0.5

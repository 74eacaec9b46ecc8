"""A tabular text game solved by enumeration, in plain Python and for any discount.

A state is the tuple of tokens so far; a policy gives next-token probabilities, a reward or critic one number for each
action, both as a dictionary from states to lists. Every text has the same length. All expectations are sums over all
texts, all suprema are over all patterns of signs.
"""

import itertools
import random
from dataclasses import dataclass


def states_of(vocab_size, length):
    return [state for n in range(length) for state in itertools.product(range(vocab_size), repeat=n)]


@dataclass(frozen=True)
class Game:
    teacher: dict
    student: dict
    reward: dict
    critic: dict
    vocab_size: int
    length: int

    @property
    def states(self):
        return states_of(self.vocab_size, self.length)

    @property
    def texts(self):
        return list(itertools.product(range(self.vocab_size), repeat=self.length))


def game_of_the_table():
    """The game that the figures of the paper's theory are worked out on: two tokens, two steps."""
    table = {
        "teacher": [[0.7, 0.3], [0.6, 0.4], [0.2, 0.8]],
        "student": [[0.5, 0.5], [0.9, 0.1], [0.4, 0.6]],
        "reward": [[1.0, 0.2], [0.1, 0.8], [0.5, 0.9]],
        "critic": [[0.5, -0.5], [-1.0, 0.5], [0.25, 1.0]],
    }
    states = [(), (0,), (1,)]
    return Game(**{name: dict(zip(states, rows, strict=True)) for name, rows in table.items()}, vocab_size=2, length=2)


def random_game(vocab_size, length, seed):
    """Three steps or more are needed to see a discount over two."""
    draw = random.Random(seed)

    def policy():
        odds = [draw.uniform(0.1, 1.0) for _ in range(vocab_size)]
        return [odd / sum(odds) for odd in odds]

    states = states_of(vocab_size, length)
    return Game(
        teacher={state: policy() for state in states},
        student={state: policy() for state in states},
        reward={state: [draw.random() for _ in range(vocab_size)] for state in states},
        critic={state: [draw.uniform(-1, 1) for _ in range(vocab_size)] for state in states},
        vocab_size=vocab_size,
        length=length,
    )


def probability(policy, text):
    product = 1.0
    for t in range(len(text)):
        product *= policy[text[:t]][text[t]]
    return product


def expected_return(game, policy, gamma):
    """J(policy)."""
    total = 0.0
    for text in game.texts:
        for t in range(game.length):
            total += probability(policy, text) * gamma**t * game.reward[text[:t]][text[t]]
    return total


def gap(game, gamma):
    return expected_return(game, game.teacher, gamma) - expected_return(game, game.student, gamma)


def value(game, policy, state, gamma):
    """V(s): expected discounted reward from `state` on, discounted from there."""
    start = len(state)
    total = 0.0
    for text in game.texts:
        if text[:start] == state:
            reached = probability(policy, text) / probability(policy, state)
            for t in range(start, game.length):
                total += reached * gamma ** (t - start) * game.reward[text[:t]][text[t]]
    return total


def action_values(game, policy, gamma):
    """Q(s, y)."""
    result = {}
    for state in game.states:
        result[state] = []
        for action in range(game.vocab_size):
            after = (*state, action)
            later = value(game, policy, after, gamma) if len(after) < game.length else 0.0
            result[state].append(game.reward[state][action] + gamma * later)
    return result


def state_moment(game, state, critic):
    """sum_y (teacher - student) f at one state."""
    return sum((game.teacher[state][y] - game.student[state][y]) * critic[state][y] for y in range(game.vocab_size))


def moment(game, writer, critic, gamma):
    """The moment on texts that `writer` (a policy) writes."""
    total = 0.0
    for text in game.texts:
        for t in range(game.length):
            total += probability(writer, text) * gamma**t * state_moment(game, text[:t], critic)
    return total


def supremum(game, writer, gamma, low=-1.0, high=1.0):
    """Largest moment over all critics with values in [low, high]: a linear function is largest at a corner."""
    best = -float("inf")
    size = len(game.states) * game.vocab_size
    for corner in itertools.product((low, high), repeat=size):
        numbers = iter(corner)
        critic = {state: [next(numbers) for _ in range(game.vocab_size)] for state in game.states}
        best = max(best, moment(game, writer, critic, gamma))
    return best


def linear_supremum(game, writer, gamma, features):
    """Largest moment over f(s, y) = W_y . h(s) with every entry of W in [-1, 1]; `features` holds h(s)."""
    width = len(features[()])
    best = -float("inf")
    for corner in itertools.product((-1.0, 1.0), repeat=width * game.vocab_size):
        critic = {}
        for state in game.states:
            critic[state] = [
                sum(corner[y * width + k] * features[state][k] for k in range(width)) for y in range(game.vocab_size)
            ]
        best = max(best, moment(game, writer, critic, gamma))
    return best


def critic_gradient(game, writer, gamma, features):
    """Derivative of the moment with respect to W_yk, by enumeration."""
    width = len(features[()])
    result = []
    for y in range(game.vocab_size):
        result.append([0.0] * width)
        for text in game.texts:
            for t in range(game.length):
                state = text[:t]
                difference = game.teacher[state][y] - game.student[state][y]
                for k in range(width):
                    result[y][k] += probability(writer, text) * gamma**t * difference * features[state][k]
    return result


def horizon_bound(game, writer, gamma):
    """Expected sum of gamma^(t-1) H_t TV_t, an upper bound on the gap for rewards in [0, 1]."""
    total = 0.0
    for text in game.texts:
        for t in range(game.length):
            state = text[:t]
            distance = sum(abs(game.teacher[state][y] - game.student[state][y]) for y in range(game.vocab_size)) / 2
            longest = sum(gamma**k for k in range(game.length - t))
            total += probability(writer, text) * gamma**t * longest * distance
    return total


def student_gradient(game, writer, critic, gamma, follow_states):
    """
    Derivative of the moment with respect to the student's logits at each state. With `follow_states`, the texts are
    the student's and their probabilities move too.
    """
    result = {state: [0.0] * game.vocab_size for state in game.states}
    for text in game.texts:
        weight = probability(writer, text)
        total = sum(gamma**t * state_moment(game, text[:t], critic) for t in range(game.length))
        for t in range(game.length):
            state = text[:t]
            for a in range(game.vocab_size):
                for y in range(game.vocab_size):
                    moved = game.student[state][y] * ((y == a) - game.student[state][a])
                    result[state][a] -= weight * gamma**t * moved * critic[state][y]
                if follow_states:
                    result[state][a] += weight * ((text[t] == a) - game.student[state][a]) * total
    return result


def per_text(game, critic, gamma, sampled):
    """The two estimators of the on-policy moment on each text: exact inner sum, or the critic at the text's token."""
    result = []
    for text in game.texts:
        total = 0.0
        for t in range(game.length):
            state = text[:t]
            if sampled:
                expected = sum(game.teacher[state][y] * critic[state][y] for y in range(game.vocab_size))
                total += gamma**t * (expected - critic[state][text[t]])
            else:
                total += gamma**t * state_moment(game, state, critic)
        result.append(total)
    return result


def mean_and_variance(game, policy, values):
    weights = [probability(policy, text) for text in game.texts]
    mean = sum(w * v for w, v in zip(weights, values, strict=True))
    return mean, sum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True))

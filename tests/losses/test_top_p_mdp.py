"""
Soft values of restricted actions on random finite decision processes: what the paper proves, found by our backups.

The teacher is any policy pi*, and the rewards are those under which it is soft-optimal: with Q* its logits (shifted by
a number for each state), r = Q* - gamma E V*. Then the same rewards are solved again on the teacher's top-p actions.
"""

import itertools
import math

import pytest
import torch

from trl_kd.losses import (
    expected_value,
    full_set,
    implied_reward,
    lambda_returns,
    log_policy,
    monte_carlo_returns,
    n_step_returns,
    next_values,
    one_step_returns,
    soft_value,
    top_p_set,
)


STATES, ACTIONS = 6, 7
# 5 masses of 200 draws each
MASSES = pytest.mark.parametrize("p", [0.3, 0.5, 0.8, 0.9, 0.99])
DRAWS = 200


def normal(generator, *size):
    return torch.randn(*size, generator=generator, dtype=torch.float64)


class Processes:
    """Draws of a discounted process that goes on for ever, in (draws, states, actions); actions sorted by pi*."""

    def __init__(self, draws=DRAWS, seed=0, is_deterministic=False):
        generator = torch.Generator().manual_seed(seed)
        # From nearly uniform teachers to nearly certain ones
        spread = 3.0 * torch.rand(draws, STATES, 1, generator=generator, dtype=torch.float64)
        logits = (spread * normal(generator, draws, STATES, ACTIONS)).sort(dim=-1, descending=True).values
        self.q_star = logits + 4.0 * normal(generator, draws, STATES, 1)
        self.gamma = 0.3 + 0.65 * torch.rand(draws, 1, 1, generator=generator, dtype=torch.float64)
        transitions = 4.0 * normal(generator, draws, STATES, ACTIONS, STATES)
        if is_deterministic:
            transitions = transitions.masked_fill(transitions < transitions.amax(-1, keepdim=True), -math.inf)
        self.transitions = transitions.softmax(-1)
        self.teacher = logits.log_softmax(-1)
        self.everything = self.on_states(full_set, self.teacher)
        self.rewards = self.q_star - self.gamma * self.expect(self.soft_value(self.q_star, self.everything))

    def on_states(self, function, *tensors):
        """A function of `(N, K)` tensors."""
        return function(*(each.flatten(0, 1) for each in tensors)).unflatten(0, tensors[0].shape[:2])

    def soft_value(self, q, mask):
        return self.on_states(soft_value, q, mask)

    def top_p(self, p):
        return self.on_states(lambda teacher: top_p_set(teacher, p), self.teacher)

    def expect(self, values):
        """Mean of the values of the next states."""
        return torch.einsum("dsan,dn->dsa", self.transitions, values)

    def optimality(self, q, mask):
        """B_p: the Bellman operator of the best policy on the set."""
        return self.rewards + self.gamma * self.expect(self.soft_value(q, mask))

    def evaluation(self, q, mask, policy):
        """B_p^pi: that of one policy, projected on the set."""
        values = self.on_states(lambda *each: expected_value(*each, entropy_weight=1.0), q, mask, policy)
        return self.rewards + self.gamma * self.expect(values)

    def solve(self, operator):
        # 0.95^700 is 2e-16
        q = torch.zeros_like(self.rewards)
        for _ in range(700):
            q, before = operator(q), q
        assert (q - before).abs().max() < 1e-12
        return q

    def least_mass(self, mask):
        """Of a set under the teacher, over states: min_s m(s)."""
        return self.teacher.exp().where(mask, 0.0).sum(-1).amin(-1)


def norm(q, mask):
    """Largest size over states and actions of the set, of each draw."""
    return q.abs().where(mask, 0.0).amax((1, 2))


def test_full_set_recovers_the_teacher():
    """The rewards make it soft-optimal."""
    x = Processes(draws=50)
    q = x.solve(lambda q: x.optimality(q, x.everything))
    torch.testing.assert_close(q, x.q_star, rtol=0, atol=1e-9)
    policy = x.on_states(log_policy, q, x.everything)
    torch.testing.assert_close(policy, x.teacher, rtol=0, atol=1e-9)
    q = x.solve(lambda q: x.evaluation(q, x.everything, x.teacher))
    torch.testing.assert_close(q, x.q_star, rtol=0, atol=1e-9)


@MASSES
def test_top_p_optimum_satisfies_the_sandwich_and_the_bound(p):
    x = Processes(seed=int(1000 * p))
    mask, gamma = x.top_p(p), x.gamma.flatten()
    best = x.solve(lambda q: x.optimality(q, mask))
    projected = x.solve(lambda q: x.evaluation(q, mask, x.teacher))
    # Values of some tens, solved to 1e-12
    assert (projected <= best + 1e-10).all() and (best <= x.q_star + 1e-10).all()
    gap, least_mass = norm(x.q_star - best, mask), x.least_mass(mask)
    assert (least_mass >= p).all()
    sharp = -gamma / (1 - gamma) * least_mass.log()
    assert (norm(x.q_star - projected, mask) <= sharp + 1e-10).all()
    assert (gap <= sharp + 1e-10).all() and (sharp <= -gamma / (1 - gamma) * math.log(p) + 1e-10).all()
    # The restriction costs something, which the best policy on the set partly makes good
    is_restricted = ~mask.all(-1).all(-1)
    assert is_restricted.sum() > DRAWS / 2
    assert (gap[is_restricted] > 1e-6).all() and (best - projected).max() > 1e-4
    # What is lost is never less than in one state that loses everywhere
    most = -gamma / (1 - gamma) * x.teacher.exp().where(mask, 0.0).sum(-1).amax(-1).log()
    assert (norm(x.q_star - projected, mask) >= most - 1e-10).all()


def test_top_p_optimum_grows_with_the_mass():
    x = Processes(draws=50, seed=1)
    masks = [x.top_p(p) for p in (0.3, 0.5, 0.8, 0.95, 1.0)]
    found = [x.solve(lambda q, mask=mask: x.optimality(q, mask)) for mask in masks]
    for smaller, larger in itertools.pairwise(found):
        assert (smaller <= larger + 1e-10).all() and (larger - smaller).max() > 1e-3
    torch.testing.assert_close(found[-1], x.q_star, rtol=0, atol=1e-9)


def test_bound_of_equal_masses_is_tight_for_the_projected_teacher():
    """Where each set has the same mass, every step loses the same."""
    x = Processes()
    x.teacher = x.teacher[:, :1].expand_as(x.teacher).contiguous()
    x.q_star = x.teacher + x.q_star.amax(-1, keepdim=True)
    x.rewards = x.q_star - x.gamma * x.expect(x.soft_value(x.q_star, x.everything))
    mask = x.top_p(0.6)
    projected = x.solve(lambda q: x.evaluation(q, mask, x.teacher))
    loss = -x.gamma / (1 - x.gamma) * x.least_mass(mask).log().view(-1, 1, 1)
    torch.testing.assert_close(x.q_star - projected, loss.expand_as(x.q_star), rtol=0, atol=1e-9)


@MASSES
def test_operators_contract_by_gamma(p):
    x = Processes(seed=int(1000 * p) + 1)
    mask, gamma = x.top_p(p), x.gamma.flatten()
    generator = torch.Generator().manual_seed(2)
    policy = normal(generator, *x.q_star.shape)
    first, second = 5.0 * normal(generator, *x.q_star.shape), 5.0 * normal(generator, *x.q_star.shape)
    # Outside of the set, Q may be anything
    second = torch.where(mask, second, 1e6)
    distance = norm(first - second, mask)
    for operator in (lambda q: x.optimality(q, mask), lambda q: x.evaluation(q, mask, policy)):
        assert (norm(operator(first) - operator(second), mask) <= gamma * distance + 1e-12).all()
        # By no less: a shift of everything
        moved = operator(first + 3.0) - operator(first)
        torch.testing.assert_close(moved, (3.0 * x.gamma).expand_as(moved), rtol=0, atol=1e-11)
        # And no larger Q has a smaller backup
        assert (operator(first + (second - first).where(mask, 0.0).clamp_min(0.0)) >= operator(first) - 1e-12).all()


def test_no_policy_on_the_set_is_better_than_the_optimum():
    x = Processes(draws=50, seed=3)
    mask = x.top_p(0.8)
    best = x.solve(lambda q: x.optimality(q, mask))
    own = x.solve(lambda q: x.evaluation(q, mask, best))
    torch.testing.assert_close(own, best, rtol=0, atol=1e-9)
    generator = torch.Generator().manual_seed(4)
    for spread in (0.3, 3.0):
        policy = best + spread * normal(generator, *best.shape)
        other = x.solve(lambda q, policy=policy: x.evaluation(q, mask, policy))
        assert (other <= best + 1e-10).all() and (best - other).max() > 1e-3


class Layers:
    """Draws of a process that ends after `HORIZON` actions: (draws, layers, states, actions), deterministic."""

    HORIZON, STATES, ACTIONS = 5, 4, 6

    def __init__(self, draws, seed, gamma):
        generator = torch.Generator().manual_seed(seed)
        size = draws, self.HORIZON, self.STATES, self.ACTIONS
        spread = 3.0 * torch.rand(*size[:3], 1, generator=generator, dtype=torch.float64)
        logits = (spread * normal(generator, *size)).sort(dim=-1, descending=True).values
        self.gamma, self.teacher = gamma, logits.log_softmax(-1)
        self.q_star = logits + 4.0 * normal(generator, *size[:3], 1)
        self.following = torch.randint(self.STATES, size, generator=generator)
        values = self.values(self.q_star, torch.ones(size, dtype=torch.bool))
        self.rewards = self.q_star - gamma * self.after(values)

    def values(self, q, mask, policy=None):
        """Of all states; with a policy, those of its projection."""
        if policy is None:
            return soft_value(q.flatten(0, -2), mask.flatten(0, -2)).view(q.shape[:-1])
        return expected_value(*(each.flatten(0, -2) for each in (q, mask, policy)), 1.0).view(q.shape[:-1])

    def after(self, values):
        """Of the state that each action leads to: nothing follows the last layer."""
        later = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
        return later.gather(2, self.following.flatten(2)).view(self.following.shape)

    def solve(self, mask, policy=None):
        q = torch.zeros_like(self.rewards)
        for _ in range(self.HORIZON):
            q = self.rewards + self.gamma * self.after(self.values(q, mask, policy))
        return q


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 0.99, 1.0])
def test_top_p_optimum_of_a_finite_horizon_satisfies_the_sharper_bound(gamma):
    x = Layers(200, int(100 * gamma), gamma)
    everything = torch.ones_like(x.rewards, dtype=torch.bool)
    torch.testing.assert_close(x.solve(everything), x.q_star, rtol=0, atol=1e-10)
    for p in (0.5, 0.8):
        mask = top_p_set(x.teacher.flatten(0, 2), p).view_as(everything)
        best, projected = x.solve(mask), x.solve(mask, x.teacher)
        assert (projected <= best + 1e-11).all() and (best <= x.q_star + 1e-11).all()
        masses = x.teacher.exp().where(mask, 0.0).sum(-1)
        for layer in range(x.HORIZON):
            # Only what later layers lose counts
            steps = sum(gamma**k for k in range(1, x.HORIZON - layer))
            gap = (x.q_star - projected)[:, layer].amax((1, 2))
            least = masses[:, layer + 1 :].amin((1, 2)) if steps > 0 else torch.ones(200)
            assert (gap <= -steps * least.log() + 1e-10).all() and (gap <= -steps * math.log(p) + 1e-10).all()
            assert (gap > 1e-4).any() == (gamma > 0 and layer < x.HORIZON - 1)


def test_top_p_optimum_without_discount_is_the_sum_over_all_texts():
    """V(s) = log sum exp(rewards) over every continuation in the sets, one by one."""
    x = Layers(5, seed=6, gamma=1.0)
    mask = top_p_set(x.teacher.flatten(0, 2), 0.8).view_as(x.rewards)
    found = x.values(x.solve(mask), mask)
    rewards, following, is_in = x.rewards.tolist(), x.following.tolist(), mask.tolist()
    for draw, state in itertools.product(range(5), range(x.STATES)):
        total = 0.0
        for actions in itertools.product(range(x.ACTIONS), repeat=x.HORIZON):
            here, reward = state, 0.0
            for layer, action in enumerate(actions):
                if not is_in[draw][layer][here][action]:
                    break
                reward += rewards[draw][layer][here][action]
                here = following[draw][layer][here][action]
            else:
                total += math.exp(reward)
        assert found[draw, 0, state].item() == pytest.approx(math.log(total), abs=1e-10)


@pytest.mark.parametrize("p", [0.8, 1.0])
@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_texts_of_the_process_have_consistent_returns(p, gamma):
    """
    Along any text of the set: the rewards that the optimal Q implies are those of the process, and since
    V(s) = Q(s, a) - log pi(a | s), returns of r - log pi are V, whatever n and lambda, also of texts that are cut.
    """
    x = Layers(1, seed=7, gamma=gamma)
    rows, generator = 40, torch.Generator().manual_seed(8)
    mask = top_p_set(x.teacher.flatten(0, 2), p).view_as(x.rewards)
    q = x.solve(mask)
    values = x.values(q, mask)[0]
    policy = log_policy(q.flatten(0, 2), mask.flatten(0, 2)).view_as(q)[0]
    lengths = torch.randint(1, x.HORIZON + 1, (rows, 1), generator=generator)
    is_token = torch.arange(x.HORIZON) < lengths
    states = [torch.randint(x.STATES, (rows,), generator=generator)]
    actions = []
    for layer in range(x.HORIZON):
        weights = mask[0, layer, states[-1]].double()
        actions.append(torch.multinomial(weights, 1, generator=generator).squeeze(1))
        states.append(x.following[0, layer, states[-1], actions[-1]])
    index = torch.arange(x.HORIZON).expand(rows, -1), torch.stack(states[:-1], 1), torch.stack(actions, 1)
    # After the last layer nothing follows; a shorter text is cut, and has a value after its end
    all_values = torch.cat([values, torch.zeros(1, x.STATES, dtype=torch.float64)])
    after = all_values[lengths.squeeze(1), torch.stack(states, 1).gather(1, lengths).squeeze(1)]
    v_t = all_values[index[0], index[1]]
    v_tp1 = next_values(v_t, is_token, after)
    implied = implied_reward(q[0][index], v_tp1, gamma)
    close = {"rtol": 0, "atol": 1e-10}
    torch.testing.assert_close(implied[is_token], x.rewards[0][index][is_token], **close)
    rewards = implied - policy[index]
    expected = v_t.where(is_token, 0.0)
    for found in (
        one_step_returns(rewards, v_tp1, is_token, gamma),
        *(n_step_returns(rewards, v_tp1, is_token, gamma, n) for n in (2, 3, 9)),
        *(lambda_returns(rewards, v_tp1, is_token, gamma, share) for share in (0.0, 0.4, 0.9)),
        monte_carlo_returns(rewards, v_tp1, is_token, gamma),
    ):
        torch.testing.assert_close(found, expected, **close)

"""Temporal-difference losses on sets of tokens, as plain loops over the whole vocabulary of one state at a time.

Written from the formulas. A set is a list of booleans over the vocabulary, in the order of the vocabulary: nothing is
gathered or sorted into columns. The loops compute with `Number`, which remembers how it was made, so that
`gradients` has the exact derivative of whatever a loop returns.
"""

import math


class Number:
    """A float64 and the slopes at what it was made of."""

    __slots__ = ("parents", "value")

    def __init__(self, value, parents=()):
        self.value, self.parents = float(value), parents

    def __add__(self, other):
        other = number(other)
        return Number(self.value + other.value, ((self, 1.0), (other, 1.0)))

    def __mul__(self, other):
        other = number(other)
        return Number(self.value * other.value, ((self, other.value), (other, self.value)))

    def __truediv__(self, other):
        other = number(other)
        ratio = self.value / other.value
        return Number(ratio, ((self, 1.0 / other.value), (other, -ratio / other.value)))

    def __neg__(self):
        return Number(-self.value, ((self, -1.0),))

    def __sub__(self, other):
        return self + -number(other)

    def __rsub__(self, other):
        return -self + other

    __radd__, __rmul__ = __add__, __mul__

    def __lt__(self, other):
        return self.value < number(other).value

    def __gt__(self, other):
        return self.value > number(other).value


def number(x):
    return x if isinstance(x, Number) else Number(x)


def detach(x):
    return Number(number(x).value)


def exp(x):
    power = math.exp(number(x).value)
    return Number(power, ((number(x), power),))


def log(x):
    x = number(x)
    return Number(math.log(x.value), ((x, 1.0 / x.value),))


def absolute(x):
    x = number(x)
    return x if x.value > 0 else -x


def total(numbers):
    result = Number(0.0)
    for x in numbers:
        result = result + x
    return result


def gradients(result, leaves):
    """Derivative of a number with respect to each of the leaves."""
    order, seen, stack = [], set(), [(result, False)]
    while stack:
        node, is_done = stack.pop()
        if is_done:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((parent, False) for parent, _ in node.parents)
    slopes = {id(node): 0.0 for node in order}
    slopes[id(result)] = 1.0
    for node in reversed(order):
        for parent, slope in node.parents:
            slopes[id(parent)] += slope * slopes[id(node)]
    return [slopes.get(id(leaf), 0.0) for leaf in leaves]


# Sets. The teacher's probabilities are floats over the whole vocabulary; of the tokens, only `known` can be chosen


def by_probability(probabilities, known):
    """Ids of the `known` most likely tokens, the most likely first."""
    return sorted(range(len(probabilities)), key=lambda v: -probabilities[v])[:known]


def as_set(tokens, vocab_size):
    return [v in tokens for v in range(vocab_size)]


def top_p_set(probabilities, known, p):
    chosen, mass = [], 0.0
    for v in by_probability(probabilities, known):
        chosen.append(v)
        mass += probabilities[v]
        if mass >= p:
            break
    return as_set(chosen, len(probabilities))


def top_k_set(probabilities, known, k):
    return as_set(by_probability(probabilities, known)[:k], len(probabilities))


def min_p_set(probabilities, known, min_p):
    tokens = by_probability(probabilities, known)
    return as_set([v for v in tokens if probabilities[v] >= min_p * probabilities[tokens[0]]], len(probabilities))


def threshold_set(probabilities, known, threshold):
    tokens = by_probability(probabilities, known)
    chosen = [v for v in tokens if probabilities[v] >= threshold]
    return as_set(chosen or tokens[:1], len(probabilities))


def full_set(probabilities, known):
    return as_set(by_probability(probabilities, known), len(probabilities))


def with_label(allowed, label):
    return [is_in or v == label for v, is_in in enumerate(allowed)]


# Gauges


def log_sum_exp(numbers):
    largest = max(number(x).value for x in numbers)
    return log(total(exp(x - largest) for x in numbers)) + largest


def gauged(logits, gauge, clip_min=None):
    """Q of each token of the vocabulary."""
    if gauge == "max":
        shift = max(logits)
    elif gauge == "logsoftmax":
        shift = log_sum_exp(logits)
    else:
        shift = Number(0.0)
    shifted = [z - shift for z in logits]
    if clip_min is None:
        return shifted
    return [x if x.value > clip_min else Number(clip_min) for x in shifted]


# Backups


def soft_value(q, allowed, entropy_weight=1.0):
    return entropy_weight * log_sum_exp([q[v] / entropy_weight for v in range(len(q)) if allowed[v]])


def hard_value(q, allowed):
    return max(q[v] for v in range(len(q)) if allowed[v])


def policy(q, allowed):
    """Probabilities over the vocabulary; the number 0.0 outside of the set."""
    powers = [exp(q[v]) if allowed[v] else None for v in range(len(q))]
    mass = total(power for power in powers if power is not None)
    return [0.0 if power is None else power / mass for power in powers]


def expected_value(q, allowed, weights, entropy_weight=0.0):
    """Under weights of any sum, renormalised on the set."""
    mass = total(weights[v] for v in range(len(q)) if allowed[v])
    value = Number(0.0)
    for v in range(len(q)):
        if allowed[v]:
            share = number(weights[v]) / mass
            value = value + share * (q[v] - entropy_weight * log(share))
    return value


# Returns of one row of `length` tokens


def next_values(values, length, last_value=0.0):
    return [values[t + 1] if t + 1 < length else number(last_value) for t in range(length)]


def n_step_return(rewards, following, t, gamma, n):
    if n == 1 or t == len(rewards) - 1:
        return rewards[t] + gamma * following[t]
    return rewards[t] + gamma * n_step_return(rewards, following, t + 1, gamma, n - 1)


def lambda_return(rewards, following, t, gamma, lambda_):
    if t == len(rewards) - 1:
        return rewards[t] + gamma * following[t]
    later = lambda_return(rewards, following, t + 1, gamma, lambda_)
    return rewards[t] + gamma * ((1.0 - lambda_) * following[t] + lambda_ * later)


def monte_carlo_return(rewards, following, t, gamma):
    """Every reward with its own power of gamma, and the last value."""
    length = len(rewards)
    value = total(gamma ** (s - t) * rewards[s] for s in range(t, length))
    return value + gamma ** (length - t) * following[length - 1]


# Losses


def inverse_soft_q(q_t, v_t, v_tp1, gamma, chi2_alpha=None, implied=None, center=0.0):
    """-phi(r) + (V - gamma V'), with phi(x) = x - x^2 / (4 alpha)."""
    reward = q_t - gamma * v_tp1
    value = -reward + (v_t - gamma * v_tp1)
    if chi2_alpha is not None:
        difference = (reward if implied is None else implied) - center
        value = value + difference * difference / (4.0 * chi2_alpha)
    return value


def expected_inverse_soft_q(q, allowed, probabilities, v_t, chi2=0.0):
    mass = sum(probabilities[v] for v in range(len(q)) if allowed[v])
    first = total(probabilities[v] / mass * q[v] for v in range(len(q)) if allowed[v])
    return v_t - first + chi2


def large_margin(q, allowed, label, margin):
    if not allowed[label]:
        return Number(0.0)
    return max(q[v] + (0.0 if v == label else margin) for v in range(len(q)) if allowed[v]) - q[label]


def soft_actor_critic(q, allowed, action_values, entropy_weight=1.0):
    """KL of the student's projected policy from the Boltzmann distribution of fixed action values."""
    student = policy(q, allowed)
    target = policy([number(x) / entropy_weight for x in action_values], allowed)
    return total(student[v] * (log(student[v]) - log(target[v])) for v in range(len(q)) if allowed[v])


def released(q, allowed, trained, gamma, p, epsilon, chi2_alpha=0.1):
    """Loss of a batch, in the steps of section 2.3: q[b][t][v] of the vocabulary, allowed[b][t][v], trained[b][t]."""
    values = []
    for row, row_allowed in zip(q, allowed, strict=True):
        values.append([])
        for state, is_in in zip(row, row_allowed, strict=True):
            powers = [exp(x) for x in state]
            mass = total(powers)
            weights = [powers[v] / mass * float(is_in[v]) / p + epsilon for v in range(len(state))]
            projected = [weight / total(weights) for weight in weights]
            # 0 log 0 is 0
            kept = [v for v in range(len(state)) if projected[v].value > 0.0]
            values[-1].append(total(projected[v] * (state[v] - log(projected[v])) for v in kept))
    rewards, squares, differences, count = Number(0.0), Number(0.0), Number(0.0), 0
    for b in range(len(q)):
        for t in range(len(q[b]) - 1):
            m, m_next = float(trained[b][t]), float(trained[b][t + 1])
            count += m
            differences = differences + m * values[b][t] - gamma * m_next * values[b][t + 1]
            vocab_size = len(q[b][t])
            for v in range(vocab_size):
                reward = float(allowed[b][t][v]) * q[b][t][v] * m - gamma * m_next * values[b][t + 1]
                rewards = rewards + reward / vocab_size
                squares = squares + reward * reward / vocab_size
    penalty = 0.0 if chi2_alpha is None else squares / (4.0 * chi2_alpha)
    return (-rewards + differences + penalty) / count


def set_forward_kl(logits, allowed, probabilities):
    """KL(teacher renormalised on the set || student over the whole vocabulary)."""
    mass = sum(probabilities[v] for v in range(len(logits)) if allowed[v])
    normaliser = log_sum_exp(logits)
    value = Number(0.0)
    for v in range(len(logits)):
        if allowed[v]:
            share = probabilities[v] / mass
            value = value + share * (math.log(share) - (logits[v] - normaliser))
    return value


# Divergences of distributions, given as lists of probabilities


def buckets(probabilities, tokens):
    """The tokens of the set in their order, and the sum of all others."""
    rest = total(probabilities[v] for v in range(len(probabilities)) if v not in tokens)
    return [*(number(probabilities[v]) for v in tokens), rest]


def softmax(logits):
    normaliser = log_sum_exp(logits)
    return [exp(z - normaliser) for z in logits]


def heated(distribution, kd_temperature):
    """Of the logits divided by a temperature."""
    return softmax([log(x) / kd_temperature for x in distribution])


def kl(first, second):
    return total(a * (log(a) - log(b)) for a, b in zip(first, second, strict=True) if a.value > 0.0)


def forward_kl(student, teacher):
    return kl(teacher, student)


def reverse_kl(student, teacher):
    return kl(student, teacher)


def mixture(first, second, share):
    return [share * a + (1.0 - share) * b for a, b in zip(first, second, strict=True)]


def generalized_jsd(student, teacher, beta):
    middle = mixture(teacher, student, beta)
    return beta * kl(teacher, middle) + (1.0 - beta) * kl(student, middle)


def skewed_forward_kl(student, teacher, skew):
    return kl(teacher, mixture(teacher, student, skew))


def skewed_reverse_kl(student, teacher, skew):
    return kl(student, mixture(student, teacher, skew))


def total_variation(student, teacher):
    return 0.5 * total(absolute(a - b) for a, b in zip(student, teacher, strict=True))


def adaptive_kl(student, teacher, head):
    """The share of the head is held fixed."""
    in_head, in_tail, mass = 0.0, 0.0, 0.0
    for v in sorted(range(len(teacher)), key=lambda v: teacher[v].value):
        mass += teacher[v].value
        gap = abs(teacher[v].value - student[v].value)
        if mass <= 1.0 - head:
            in_tail += gap
        else:
            in_head += gap
    share = in_head / (in_head + in_tail)
    return share * kl(teacher, student) + (1.0 - share) * kl(student, teacher)

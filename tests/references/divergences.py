"""Divergences, moments and their gradients for one token, as plain loops over the vocabulary in float64.

Written from the formulas. A gradient is that of the value with respect to the student's logits,
unless the function says otherwise.
"""

import math


def softmax(logits):
    largest = max(logits)
    powers = [math.exp(logit - largest) for logit in logits]
    return [power / sum(powers) for power in powers]


def through_softmax(q, slopes):
    """Gradient at the logits from the derivative with respect to each probability."""
    mean = sum(q[v] * slopes[v] for v in range(len(q)))
    return [q[v] * (slopes[v] - mean) for v in range(len(q))]


def at_temperature(reference, student_logits, teacher_logits, kd_temperature, *arguments):
    """Value and gradient of a divergence of the logits divided by the temperature: one more factor in the chain."""
    student_logits, teacher_logits = (
        [z / kd_temperature for z in logits] for logits in (student_logits, teacher_logits)
    )
    value, gradient = reference(student_logits, teacher_logits, *arguments)
    return value, [slope / kd_temperature for slope in gradient]


def forward_kl(student_logits, teacher_logits):
    q, p = softmax(student_logits), softmax(teacher_logits)
    value = sum(p[v] * math.log(p[v] / q[v]) for v in range(len(q)))
    return value, [q[v] - p[v] for v in range(len(q))]


def reverse_kl(student_logits, teacher_logits):
    q, p = softmax(student_logits), softmax(teacher_logits)
    value = sum(q[v] * math.log(q[v] / p[v]) for v in range(len(q)))
    return value, [q[v] * (math.log(q[v] / p[v]) - value) for v in range(len(q))]


def generalized_jsd(student_logits, teacher_logits, beta):
    q, p = softmax(student_logits), softmax(teacher_logits)
    m = [beta * p[v] + (1 - beta) * q[v] for v in range(len(q))]
    value = 0.0
    for v in range(len(q)):
        value += beta * p[v] * math.log(p[v] / m[v]) + (1 - beta) * q[v] * math.log(q[v] / m[v])
    # The terms from the derivative of m cancel but for a constant, which the softmax removes
    return value, through_softmax(q, [(1 - beta) * math.log(q[v] / m[v]) for v in range(len(q))])


def skewed_forward_kl(student_logits, teacher_logits, skew):
    q, p = softmax(student_logits), softmax(teacher_logits)
    m = [skew * p[v] + (1 - skew) * q[v] for v in range(len(q))]
    value = sum(p[v] * math.log(p[v] / m[v]) for v in range(len(q)))
    return value, through_softmax(q, [-(1 - skew) * p[v] / m[v] for v in range(len(q))])


def skewed_reverse_kl(student_logits, teacher_logits, skew):
    q, p = softmax(student_logits), softmax(teacher_logits)
    m = [skew * q[v] + (1 - skew) * p[v] for v in range(len(q))]
    value = sum(q[v] * math.log(q[v] / m[v]) for v in range(len(q)))
    return value, through_softmax(q, [math.log(q[v] / m[v]) + 1 - skew * q[v] / m[v] for v in range(len(q))])


def adaptive_kl(student_logits, teacher_logits, head):
    """The share of the head is held fixed."""
    q, p = softmax(student_logits), softmax(teacher_logits)
    in_head, in_tail, mass = 0.0, 0.0, 0.0
    for v in sorted(range(len(q)), key=lambda v: p[v]):
        mass += p[v]
        if mass <= 1 - head:
            in_tail += abs(p[v] - q[v])
        else:
            in_head += abs(p[v] - q[v])
    share = in_head / (in_head + in_tail)
    forward, forward_gradient = forward_kl(student_logits, teacher_logits)
    reverse, reverse_gradient = reverse_kl(student_logits, teacher_logits)
    gradient = [share * forward_gradient[v] + (1 - share) * reverse_gradient[v] for v in range(len(q))]
    return share * forward + (1 - share) * reverse, gradient


def total_variation(student_logits, teacher_logits):
    q, p = softmax(student_logits), softmax(teacher_logits)
    value = sum(abs(p[v] - q[v]) for v in range(len(q))) / 2
    return value, through_softmax(q, [0.5 if q[v] > p[v] else -0.5 for v in range(len(q))])


def cross_entropy(student_logits, label):
    q = softmax(student_logits)
    return -math.log(q[label]), [q[v] - (v == label) for v in range(len(q))]


def entropy(logits):
    q = softmax(logits)
    value = -sum(q[v] * math.log(q[v]) for v in range(len(q)))
    return value, [-q[v] * (math.log(q[v]) + value) for v in range(len(q))]


def moment(student_logits, teacher_logits, critic):
    """The critic is held fixed, whatever it was computed from."""
    q, p = softmax(student_logits), softmax(teacher_logits)
    value = sum((p[v] - q[v]) * critic[v] for v in range(len(q)))
    return value, through_softmax(q, [-critic[v] for v in range(len(q))])


def exact_moment(student_logits, teacher_logits):
    q, p = softmax(student_logits), softmax(teacher_logits)
    return moment(student_logits, teacher_logits, [1.0 if p[v] > q[v] else -1.0 for v in range(len(q))])


def exact_penalised_moment(student_logits, teacher_logits):
    q, p = softmax(student_logits), softmax(teacher_logits)
    critic = [(p[v] - q[v]) / (p[v] + q[v]) for v in range(len(q))]
    return moment(student_logits, teacher_logits, critic)


def critic_objective(critic, student_logits, teacher_logits, penalty):
    """Value, and gradient with respect to the critic's values."""
    q, p = softmax(student_logits), softmax(teacher_logits)
    value, gradient = 0.0, []
    for v in range(len(q)):
        weight = (p[v] + q[v]) / 2
        value += p[v] * critic[v] - q[v] * critic[v] - penalty / 2 * weight * critic[v] ** 2
        gradient.append(p[v] - q[v] - penalty * weight * critic[v])
    return value, gradient


def saturation(student_logits, teacher_logits, critic):
    q, p = softmax(student_logits), softmax(teacher_logits)
    return sum((p[v] + q[v]) / 2 * abs(critic[v]) for v in range(len(q)))

"""The authors' criteria of dual-space distillation, one token after the other, in float64 and under autograd.

Written from the formulas of DSKD (v1) and DSKD-v2 as published, with their denominators. Batches are padded, labels
shifted already and -100 where nothing is trained. A projector is a pair of weight `(out, in)` and bias or None.
"""

import math
from dataclasses import dataclass

import torch


@dataclass
class Side:
    """One model on a padded batch; the inputs and their embeddings are for attention across models alone."""

    hidden: torch.Tensor  # (B, S, H)
    weight: torch.Tensor  # (V, H)
    labels: torch.Tensor  # (B, S)
    input_ids: torch.Tensor | None = None  # (B, S)
    embeddings: torch.Tensor | None = None  # (V, H)

    def is_trained(self, row, position):
        return self.labels[row, position].item() != -100

    @property
    def trained(self):
        """Row and position of each token that counts."""
        rows, positions = self.labels.shape
        return [(b, i) for b in range(rows) for i in range(positions) if self.is_trained(b, i)]


def softmax(logits):
    powers = (logits - logits.detach().max()).exp()
    return powers / powers.sum()


def project(projector, vector):
    weight, bias = projector
    return weight @ vector if bias is None else weight @ vector + bias


def cross_entropy(logits, label):
    return -softmax(logits)[label].log()


# Divergences of two rows of probabilities: q of the student, p of the teacher


def forward_kl(q, p):
    return sum(p[v] * (p[v].log() - q[v].log()) for v in range(len(p)))


def reverse_kl(q, p):
    return sum(q[v] * (q[v].log() - p[v].log()) for v in range(len(p)))


def jsd(q, p, epsilon=1e-9):
    value = 0.0
    for v in range(len(p)):
        log_mean = ((p[v] + q[v]) / 2 + epsilon).log()
        value = value + p[v] * ((p[v] + epsilon).log() - log_mean) + q[v] * ((q[v] + epsilon).log() - log_mean)
    return value / 2


def skewed_forward_kl(q, p, skew=0.1):
    return sum(p[v] * (p[v].log() - (skew * p[v] + (1 - skew) * q[v]).log()) for v in range(len(p)))


def skewed_reverse_kl(q, p, skew=0.1):
    return sum(q[v] * (q[v].log() - ((1 - skew) * p[v] + skew * q[v]).log()) for v in range(len(p)))


def adaptive_kl(q, p, alpha=0.5):
    head, tail, mass = 0.0, 0.0, 0.0
    for v in sorted(range(len(p)), key=lambda v: p[v].item()):
        mass += p[v].item()
        if mass <= alpha:
            tail += abs(p[v].item() - q[v].item())
        else:
            head += abs(p[v].item() - q[v].item())
    return head / (head + tail) * forward_kl(q, p) + tail / (head + tail) * reverse_kl(q, p)


def total_variation(q, p):
    """Not one of the authors'."""
    return sum((p[v] - q[v]).abs() for v in range(len(p))) / 2


DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skewed_forward_kl": skewed_forward_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "adaptive_kl": adaptive_kl,
    "total_variation": total_variation,
}


def divergence_of(name, student_logits, teacher_logits, kd_temperature, teacher_temperature=1.0):
    """At a temperature; no factor of its square. The teacher is held fixed."""
    q = softmax(student_logits / kd_temperature)
    p = softmax(teacher_logits.detach() / kd_temperature / teacher_temperature)
    return DIVERGENCES[name](q, p)


def total_of(found, kd_rate):
    kd = found["student_space_kd"] + found["projector_ce"] + found["teacher_space_kd"]
    return found | {"total": (1 - kd_rate) * found["student_ce"] + kd_rate * kd}


def student_ce(student, denominator):
    values = [cross_entropy(student.weight @ student.hidden[b, i], student.labels[b, i]) for b, i in student.trained]
    return sum(values) / denominator


# Same vocabulary


def same_vocabulary_v1(
    student,
    teacher,
    to_student,
    to_teacher,
    divergence="forward_kl",
    kd_rate=0.5,
    kd_temperature=2.0,
    denominator=None,
):
    """Both spaces without gate: gold labels, and always forward KL in the teacher space."""
    denominator = denominator or len(student.trained)
    projector_ce, student_kd, teacher_kd = 0.0, 0.0, 0.0
    for b, i in student.trained:
        projected = student.weight.detach() @ project(to_student, teacher.hidden[b, i].detach())
        logits = student.weight @ student.hidden[b, i]
        projector_ce = projector_ce + cross_entropy(projected, student.labels[b, i])
        student_kd = student_kd + divergence_of(divergence, logits, projected, kd_temperature)
    for b, i in teacher.trained:
        projected = teacher.weight.detach() @ project(to_teacher, student.hidden[b, i])
        logits = teacher.weight.detach() @ teacher.hidden[b, i].detach()
        teacher_kd = teacher_kd + divergence_of("forward_kl", projected, logits, kd_temperature)
    found = {
        "student_ce": student_ce(student, denominator),
        "projector_ce": projector_ce / denominator,
        "student_space_kd": student_kd / denominator,
        "teacher_space_kd": teacher_kd / denominator,
    }
    return total_of(found, kd_rate)


def same_vocabulary_v2(
    student,
    teacher,
    to_student,
    to_teacher,
    divergence="forward_kl",
    kd_rate=0.5,
    kd_temperature=2.0,
    gate_up_to=1.0,
    denominator=None,
):
    """
    Labels of the projector are the teacher's most likely tokens; one divergence in both spaces. The gate is on while
    the share of agreeing tokens is at most `gate_up_to`, and the term then a mean over these.
    """
    denominator = denominator or len(student.trained)
    projector_ce, gated, ungated, agreeing, teacher_kd = 0.0, 0.0, 0.0, 0, 0.0
    for b, i in student.trained:
        label = (teacher.weight.detach() @ teacher.hidden[b, i].detach()).argmax()
        projected = student.weight.detach() @ project(to_student, teacher.hidden[b, i].detach())
        logits = student.weight @ student.hidden[b, i]
        projector_ce = projector_ce + cross_entropy(projected, label)
        value = divergence_of(divergence, logits, projected, kd_temperature)
        ungated = ungated + value
        if projected.argmax() == label:
            gated, agreeing = gated + value, agreeing + 1
    for b, i in teacher.trained:
        projected = teacher.weight.detach() @ project(to_teacher, student.hidden[b, i])
        logits = teacher.weight.detach() @ teacher.hidden[b, i].detach()
        teacher_kd = teacher_kd + divergence_of(divergence, projected, logits, kd_temperature)
    is_gated = agreeing / denominator <= gate_up_to
    found = {
        "student_ce": student_ce(student, denominator),
        "projector_ce": projector_ce / denominator,
        "student_space_kd": gated / max(1e-3, agreeing) if is_gated else ungated / denominator,
        "teacher_space_kd": teacher_kd / denominator,
    }
    return total_of(found, kd_rate) | {"agreeing": agreeing}


# Different vocabularies


def cross_model_attention(query, queries, keys, teacher_values, student_values):
    """
    One sequence: teacher values at the student's tokens `(N_s, d)`, student values at the teacher's `(N_t, D)`. The
    same scores, once a softmax over the teacher's tokens and once over the student's; zeros where there are none.
    """
    num_student, num_teacher = len(queries), len(keys)
    scores = [[None] * num_teacher for _ in range(num_student)]
    for i in range(num_student):
        projected = project(query, queries[i])
        for j in range(num_teacher):
            scores[i][j] = (projected * keys[j]).sum() / math.sqrt(len(keys[j]))
    at_student = teacher_values.new_zeros(num_student, teacher_values.shape[1])
    at_teacher = student_values.new_zeros(num_teacher, student_values.shape[1])
    if num_student and num_teacher:
        rows = []
        for i in range(num_student):
            shares = softmax(torch.stack(scores[i]))
            rows.append(sum(shares[j] * teacher_values[j] for j in range(num_teacher)))
        at_student = torch.stack(rows)
        rows = []
        for j in range(num_teacher):
            shares = softmax(torch.stack([scores[i][j] for i in range(num_student)]))
            rows.append(sum(shares[i] * student_values[i] for i in range(num_student)))
        at_teacher = torch.stack(rows)
    return at_student, at_teacher


def standard_deviation(numbers):
    """Of all numbers as one sample, with n - 1."""
    numbers = numbers.detach().flatten().tolist()
    mean = math.fsum(numbers) / len(numbers)
    return math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1))


def attention_inputs(student, teacher, norm_scope):
    """
    Queries, keys and teacher states before their projectors, `(B, S, 2d)`, `(B, T, 2D)`, `(B, T, D)`. Tokens that do
    not count have id 0; each tensor is divided by one number, its deviation over the padded batch or what counts.
    """

    def embedded(side):
        # Copied: the labels of the caller stay
        input_ids, labels = side.input_ids.clone(), side.labels.clone()
        input_ids[side.labels == -100], labels[side.labels == -100] = 0, 0
        embeddings = side.embeddings.detach()
        return embeddings[input_ids], embeddings[labels]

    def normalised(values):
        counted = values if norm_scope == "padded" else values[teacher.labels != -100]
        return values / max(standard_deviation(counted), 1e-6)

    student_in, student_out = embedded(student)
    teacher_in, teacher_out = embedded(teacher)
    queries = torch.cat([student_in, student_out], dim=-1)
    keys = normalised(torch.cat([teacher_in, teacher_out], dim=-1))
    return queries, keys, normalised(teacher.hidden.detach()) + normalised(teacher_out)


def attention_v1(
    student,
    teacher,
    query,
    to_student,
    to_teacher,
    divergence="forward_kl",
    kd_rate=0.5,
    kd_temperature=2.0,
    teacher_temperature=1.0,
    norm_scope="padded",
    gate_normalization="tokens",
    teacher_denominator="student",
    denominator=None,
):
    """
    The student learns where the projected teacher finds the gold label; what remains is still divided by all tokens,
    and the teacher space by the tokens of the student. `norm_scope="valid"`, `gate_normalization="gated"` and
    `teacher_denominator="teacher"` are not the authors'.
    """
    denominator = denominator or len(student.trained)
    queries, keys, states = attention_inputs(student, teacher, norm_scope)
    projector_ce, student_kd, teacher_kd, right = 0.0, 0.0, 0.0, 0
    for b in range(len(student.labels)):
        own, partners = ([i for row, i in side.trained if row == b] for side in (student, teacher))
        teacher_values = torch.stack([project(to_student, state) for state in states[b]])
        student_values = torch.stack([project(to_teacher, state) for state in student.hidden[b]])
        at_student, at_teacher = cross_model_attention(
            query, queries[b, own], keys[b, partners], teacher_values[partners], student_values[own]
        )
        for state, i in zip(at_student, own, strict=True):
            projected, label = student.weight.detach() @ state, student.labels[b, i]
            logits = student.weight @ student.hidden[b, i]
            projector_ce = projector_ce + cross_entropy(projected, label)
            if projected.argmax() == label:
                right += 1
                value = divergence_of(divergence, logits, projected, kd_temperature, teacher_temperature)
                student_kd = student_kd + value
        for state, j in zip(at_teacher, partners, strict=True):
            logits = teacher.weight.detach() @ teacher.hidden[b, j].detach()
            projected = teacher.weight.detach() @ state
            teacher_kd = teacher_kd + divergence_of("forward_kl", projected, logits, kd_temperature)
    found = {
        "student_ce": student_ce(student, denominator),
        "projector_ce": projector_ce / denominator,
        "student_space_kd": student_kd / (denominator if gate_normalization == "tokens" else max(right, 1)),
        "teacher_space_kd": teacher_kd
        / (denominator if teacher_denominator == "student" else max(len(teacher.trained), 1)),
    }
    return total_of(found, kd_rate) | {"agreeing": right}


def aligned_v2(
    student,
    teacher,
    to_student,
    to_teacher,
    pairs,
    vocabulary,
    divergence="forward_kl",
    kd_rate=0.5,
    kd_temperature=2.0,
    gate_up_to=1.0,
    keep_unmapped=False,
    denominator=None,
):
    """
    On pairs of positions (row, student's, teacher's). `vocabulary` has the student's id of each of the teacher's, -1
    if none. A pair whose most likely teacher token has none is dropped; with `keep_unmapped` (not the authors') from
    the student space alone, each space being a mean over its own pairs. The student's cross-entropy is over all of
    its tokens.
    """
    projector_ce, gated, ungated, teacher_kd = 0.0, 0.0, 0.0, 0.0
    agreeing, num_mapped, num_pairs = 0, 0, 0
    for b, i, j in pairs:
        teacher_logits = teacher.weight.detach() @ teacher.hidden[b, j].detach()
        label = vocabulary[teacher_logits.argmax().item()]
        if label >= 0:
            projected = student.weight.detach() @ project(to_student, teacher.hidden[b, j].detach())
            logits = student.weight @ student.hidden[b, i]
            projector_ce = projector_ce + cross_entropy(projected, label)
            value = divergence_of(divergence, logits, projected, kd_temperature)
            ungated, num_mapped = ungated + value, num_mapped + 1
            if projected.argmax() == label:
                gated, agreeing = gated + value, agreeing + 1
        elif not keep_unmapped:
            continue
        num_pairs += 1
        projected = teacher.weight.detach() @ project(to_teacher, student.hidden[b, i])
        teacher_kd = teacher_kd + divergence_of(divergence, projected, teacher_logits, kd_temperature)
    num_mapped = max(1e-3, num_mapped)
    is_gated = agreeing / num_mapped <= gate_up_to
    found = {
        "student_ce": student_ce(student, denominator or len(student.trained)),
        "projector_ce": projector_ce / num_mapped,
        "student_space_kd": gated / max(1e-3, agreeing) if is_gated else ungated / num_mapped,
        "teacher_space_kd": teacher_kd / max(1e-3, num_pairs),
    }
    return total_of(found, kd_rate) | {"agreeing": agreeing}


def sorted_distance(student_logits, teacher_logits):
    """Of one pair of tokens: L1 between probabilities in descending order, zeros for what one of both has not."""
    q, p = softmax(student_logits), softmax(teacher_logits.detach())
    q = [q[v] for v in sorted(range(len(q)), key=lambda v: -q[v].item())]
    p = [p[v] for v in sorted(range(len(p)), key=lambda v: -p[v].item())]
    length = max(len(q), len(p))
    q, p = (row + [0.0] * (length - len(row)) for row in (q, p))
    return sum(abs(q[k] - p[k]) for k in range(length))


def universal_logit_distillation(student, teacher, kd_rate=0.5, denominator=None):
    """Sequences are turned so that the first token that counts comes first, and compared place by place."""
    denominator = denominator or len(student.trained)
    distance = 0.0
    for b in range(len(student.labels)):
        first, first_of_teacher = (next((i for row, i in side.trained if row == b), 0) for side in (student, teacher))
        num_student, num_teacher = student.labels.shape[1], teacher.labels.shape[1]
        for k in range(min(num_student, num_teacher)):
            i, j = (first + k) % num_student, (first_of_teacher + k) % num_teacher
            if student.is_trained(b, i) and teacher.is_trained(b, j):
                logits = student.weight @ student.hidden[b, i]
                teacher_logits = teacher.weight.detach() @ teacher.hidden[b, j].detach()
                distance = distance + sorted_distance(logits, teacher_logits)
    found = {"student_ce": student_ce(student, denominator), "distance": distance / denominator}
    return found | {"total": (1 - kd_rate) * found["student_ce"] + kd_rate * found["distance"]}


# Projectors at the start of v2, as weights of linear layers: the pseudo-inverse of a head, times the other head


def initial_to_student(student_weight, teacher_weight):
    """`(d, D)`: the student's head on projected states gives the teacher's logits, as nearly as it can."""
    return (teacher_weight.T @ torch.linalg.pinv(student_weight.T)).T


def initial_to_teacher(student_weight, teacher_weight):
    """`(D, d)`"""
    return (student_weight.T @ torch.linalg.pinv(teacher_weight.T)).T

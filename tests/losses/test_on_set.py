import math
from functools import partial

import pytest
import torch

from tests.references import temporal_difference as references
from trl_kd.losses import (
    OnSet,
    Term,
    adaptive_kl,
    cross_entropy,
    forward_kl,
    generalized_jsd,
    linear_loss,
    reverse_kl,
    set_forward_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    tail_nll,
    total_variation,
)
from trl_kd.modules import LMHead


INF = math.inf
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
EVERY_DTYPE = pytest.mark.parametrize("dtype", TOLERANCES)
# (N, V, K)
SHAPES = pytest.mark.parametrize("shape", [(6, 8, 4), (5, 7, 3)], ids=["even", "odd"])
DIVERGENCES = {
    "forward_kl": (forward_kl, references.forward_kl),
    "reverse_kl": (reverse_kl, references.reverse_kl),
    "jsd": (generalized_jsd, lambda q, p: references.generalized_jsd(q, p, 0.5)),
    "jsd_0.1": (partial(generalized_jsd, beta=0.1), lambda q, p: references.generalized_jsd(q, p, 0.1)),
    "skewed_forward_kl": (skewed_forward_kl, lambda q, p: references.skewed_forward_kl(q, p, 0.1)),
    "skewed_reverse_kl": (skewed_reverse_kl, lambda q, p: references.skewed_reverse_kl(q, p, 0.1)),
    "adaptive_kl": (adaptive_kl, lambda q, p: references.adaptive_kl(q, p, 0.5)),
    "total_variation": (total_variation, references.total_variation),
}
EVERY = pytest.mark.parametrize("name", DIVERGENCES)
INPUTS = "student", "ids", "teacher"


class Rows:
    """Logits of a student, and the most likely tokens of a teacher, with a padding that differs between rows."""

    def __init__(self, shape, dtype=torch.float64, seed=0, is_padded=True):
        rows, self.vocab_size, k = shape
        generator = torch.Generator().manual_seed(seed)
        self.student = 2.0 * torch.randn(rows, self.vocab_size, generator=generator, dtype=torch.float64)
        self.teacher_logits = 2.0 * torch.randn(rows, self.vocab_size, generator=generator, dtype=torch.float64)
        log_probs = self.teacher_logits.log_softmax(-1)
        self.probabilities = log_probs.exp().tolist()
        self.sizes = [k - (i % 3 if is_padded else 0) for i in range(rows)]
        self.log_probs, self.ids = log_probs.topk(k, dim=-1)
        is_none = torch.arange(k) >= torch.tensor(self.sizes).unsqueeze(1)
        self.log_probs, self.ids = (
            self.log_probs.masked_fill(is_none, -INF).to(dtype),
            self.ids.masked_fill(is_none, 0),
        )
        self.leaf = self.student.to(dtype, copy=True).requires_grad_()
        self.weights = torch.randn(rows, generator=generator, dtype=torch.float64).to(dtype)
        self.weights[1] = 0.0

    @property
    def labels(self):
        return {"ids": self.ids, "teacher": self.log_probs}

    def in_columns(self, function):
        return function(self.leaf, self.ids, self.log_probs)

    def tokens(self, i):
        return references.by_probability(self.probabilities[i], self.sizes[i])

    def check(self, function, reference, dtype):
        """Values and gradients of the plain form, and of the one in `linear_loss`."""
        values, slopes = [], []
        for i, row in enumerate(self.student.tolist()):
            logits = [references.Number(z) for z in row]
            value = reference(i, logits)
            values.append(value.value)
            slopes.append([self.weights[i].item() * slope for slope in references.gradients(value, logits)])
        close = {"rtol": TOLERANCES[dtype], "atol": TOLERANCES[dtype]}
        values, slopes = torch.tensor(values, dtype=torch.float64), torch.tensor(slopes, dtype=torch.float64)
        plain = self.in_columns(function)
        assert plain.dtype == dtype
        torch.testing.assert_close(plain.double(), values, **close)
        (gradient,) = torch.autograd.grad((self.weights * plain).sum(), self.leaf)
        torch.testing.assert_close(gradient.double(), slopes, **close)
        for chunk_size in (1, 4, None):
            terms = {"value": Term(function, INPUTS, self.weights), "metric": Term(function, INPUTS)}
            result = linear_loss({"student": (self.leaf, None)}, terms, self.labels, chunk_size)
            for name in terms:
                torch.testing.assert_close(result.values[name].double(), values, **close)
            torch.testing.assert_close(result.loss.double(), (self.weights.double() * values).sum(), **close)
            (gradient,) = torch.autograd.grad(result.loss, self.leaf)
            torch.testing.assert_close(gradient.double(), slopes, **close)


def test_on_set_literal_buckets_have_the_value_by_hand():
    # Of a set of one token: (1/4, 3/4) and (3/5, 2/5); of two, the last is 1/2 and 1/10
    student, ids = torch.tensor([[0.25, 0.25, 0.5]]).double().log(), torch.tensor([[0, 1]])
    for teacher, function, expected in (
        ([0.6, 0.0], total_variation, 0.35),
        ([0.6, 0.3], total_variation, 0.4),
        ([0.6, 0.0], forward_kl, 0.6 * math.log(0.6 / 0.25) + 0.4 * math.log(0.4 / 0.75)),
        ([0.6, 0.3], forward_kl, 0.6 * math.log(2.4) + 0.3 * math.log(1.2) + 0.1 * math.log(0.2)),
        ([0.6, 0.0], reverse_kl, 0.25 * math.log(0.25 / 0.6) + 0.75 * math.log(0.75 / 0.4)),
    ):
        found = OnSet(function)(student, ids, torch.tensor([teacher], dtype=torch.float64).log())
        assert found.tolist() == pytest.approx([expected], abs=1e-12)


@SHAPES
@EVERY_DTYPE
@EVERY
def test_on_set_equals_the_loop_over_buckets_in_value_and_gradient(name, dtype, shape):
    function, reference = DIVERGENCES[name]
    rows = Rows(shape, dtype)

    def loop(i, logits):
        student = references.buckets(references.softmax(logits), rows.tokens(i))
        return reference(student, references.buckets(rows.probabilities[i], rows.tokens(i)))

    rows.check(OnSet(function), loop, dtype)


@SHAPES
@EVERY_DTYPE
@pytest.mark.parametrize("kd_temperature", [0.5, 4.0])
@EVERY
def test_on_set_at_a_temperature_heats_the_buckets(name, kd_temperature, dtype, shape):
    function, reference = DIVERGENCES[name]
    rows = Rows(shape, dtype)

    def loop(i, logits):
        student = references.buckets(references.softmax(logits), rows.tokens(i))
        teacher = references.buckets(rows.probabilities[i], rows.tokens(i))
        return reference(*(references.heated(each, kd_temperature) for each in (student, teacher)))

    rows.check(OnSet(partial(function, kd_temperature=kd_temperature)), loop, dtype)


@SHAPES
@EVERY_DTYPE
def test_set_forward_kl_equals_the_loop_in_value_and_gradient(dtype, shape):
    rows = Rows(shape, dtype)

    def loop(i, logits):
        allowed = references.as_set(rows.tokens(i), rows.vocab_size)
        return references.set_forward_kl(logits, allowed, rows.probabilities[i])

    rows.check(set_forward_kl, loop, dtype)


@SHAPES
@EVERY_DTYPE
def test_tail_nll_equals_the_loop_in_value_and_gradient(dtype, shape):
    rows = Rows(shape, dtype)

    def loop(i, logits):
        student = references.softmax(logits)
        return -references.log(references.total(student[v] for v in rows.tokens(i)))

    rows.check(tail_nll, loop, dtype)


def test_set_forward_kl_and_tail_nll_literal_set_have_the_values_by_hand():
    student, ids = torch.tensor([[0.25, 0.25, 0.5]]).double().log(), torch.tensor([[2, 0]])
    teacher = torch.tensor([[0.6, 0.3]], dtype=torch.float64).log()
    expected = 2 / 3 * math.log(2 / 3 / 0.5) + 1 / 3 * math.log(1 / 3 / 0.25)
    assert set_forward_kl(student, ids, teacher).item() == pytest.approx(expected, abs=1e-14)
    assert tail_nll(student, ids, teacher).item() == pytest.approx(math.log(4 / 3), abs=1e-14)
    alone = torch.tensor([[0.6, 0.0]], dtype=torch.float64).log()
    assert set_forward_kl(student, ids, alone).item() == pytest.approx(math.log(2.0), abs=1e-14)
    assert tail_nll(student, ids, alone).item() == pytest.approx(math.log(2.0), abs=1e-14)


@EVERY_DTYPE
@EVERY
def test_on_set_of_the_whole_vocabulary_is_the_dense_divergence(name, dtype):
    function = DIVERGENCES[name][0]
    rows = Rows((6, 8, 8), dtype, is_padded=False)
    found, expected = rows.in_columns(OnSet(function)), function(rows.leaf, rows.teacher_logits.to(dtype))
    # What is left of the mass is nothing but rounding
    close = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 1e-5}
    torch.testing.assert_close(found, expected, **close)
    gradients = [torch.autograd.grad((rows.weights * each).sum(), rows.leaf)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients, **close)


# The shares of the adaptive one depend on the outcomes
@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "adaptive_kl"])
def test_on_set_never_exceeds_the_dense_divergence_and_grows_with_the_set(name):
    """Data-processing: putting outcomes together loses what tells them apart."""
    function, before = DIVERGENCES[name][0], torch.zeros(200).double()
    for k in (1, 2, 5, 8, 11):
        rows = Rows((200, 12, k), is_padded=False)
        found = rows.in_columns(OnSet(function)).detach()
        assert (found >= before - 1e-12).all() and (found - before).max() > 1e-4
        before = found
    dense = function(rows.student, rows.teacher_logits)
    # One token more is the rest alone
    torch.testing.assert_close(before, dense, rtol=0, atol=1e-10)


def test_on_set_of_the_same_model_is_zero_with_zero_gradient():
    for name, (function, _) in DIVERGENCES.items():
        rows = Rows((5, 7, 3))
        rows.leaf = rows.teacher_logits.clone().requires_grad_()
        values = rows.in_columns(OnSet(function))
        assert values.abs().max() < 1e-12, name
        if name != "total_variation":  # which has a corner there
            assert torch.autograd.grad(values.sum(), rows.leaf)[0].abs().max() < 1e-12, name


@EVERY_DTYPE
@pytest.mark.parametrize("name", [*DIVERGENCES, "set_forward_kl", "tail_nll"])
def test_sparse_divergence_extreme_logits_are_finite(name, dtype):
    function = {"set_forward_kl": set_forward_kl, "tail_nll": tail_nll}.get(name) or OnSet(DIVERGENCES[name][0])
    # Certain of a token inside, of one outside, of nothing; of a teacher that is certain, nearly so, or knows two
    student = torch.tensor([[1e3, 0.0, 0.0, 0.0], [0.0, 0.0, 1e3, 0.0], [0.0] * 4]).repeat(3, 1).to(dtype)
    teacher = torch.tensor([[0.0, -INF]] * 3 + [[-1e-9, -20.7]] * 3 + [[math.log(0.6), math.log(0.3)]] * 3).to(dtype)
    ids, weights = torch.tensor([[0, 1]]).repeat(9, 1), torch.ones(9, dtype=dtype)
    student.requires_grad_()
    values = function(student, ids, teacher)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert torch.isfinite(values).all() and torch.isfinite(gradient).all()
    # Agreement on one token
    assert abs(values[0].item()) < 1e-4
    result = linear_loss(
        {"student": (student, None)}, {"x": Term(function, INPUTS, weights)}, {"ids": ids, "teacher": teacher}
    )
    torch.testing.assert_close(result.values["x"], values.detach())
    (fused,) = torch.autograd.grad(result.loss, student)
    torch.testing.assert_close(fused, gradient, rtol=1e-4, atol=1e-5)


@EVERY
def test_on_set_of_no_tokens_is_zero(name):
    """Everything is in one bucket."""
    student = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    teacher = torch.full((3, 2), -INF).double()
    values = OnSet(DIVERGENCES[name][0])(student, torch.zeros(3, 2, dtype=torch.long), teacher)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert values.abs().max() < 1e-12 and gradient.abs().max() < 1e-12


@EVERY
def test_on_set_of_a_head_equals_the_plain_form(name):
    """Beside other terms on the same logits; with a soft cap, and gradients at hidden states, weight and bias."""
    function = OnSet(DIVERGENCES[name][0])
    rows, generator = Rows((13, 17, 4)), torch.Generator().manual_seed(1)
    leaves = [
        torch.randn(n, generator=generator, dtype=torch.float64).requires_grad_() for n in ((13, 5), (17, 5), 17)
    ]
    hidden, weight, bias = leaves
    head = LMHead(weight, bias, scale=0.5, soft_cap=4.0)
    labels = rows.labels | {"labels": rows.ids[:, 0]}
    terms = {
        "value": Term(function, INPUTS, rows.weights),
        "set": Term(set_forward_kl, INPUTS, 0.3 * rows.weights),
        "tail": Term(tail_nll, INPUTS, 0.5 * rows.weights),
        "nll": Term(cross_entropy, ("student", "labels"), 0.7 * rows.weights),
    }
    logits = 4.0 * (0.5 * (hidden @ weight.T + bias) / 4.0).tanh()
    arguments = logits, rows.ids, rows.log_probs
    plain = function(*arguments) + 0.3 * set_forward_kl(*arguments) + 0.5 * tail_nll(*arguments)
    expected = (rows.weights * (plain + 0.7 * cross_entropy(logits, labels["labels"]))).sum()
    expected_gradients = torch.autograd.grad(expected, leaves)
    for chunk_size in (1, 5, None):
        result = linear_loss({"student": (hidden, head)}, terms, labels, chunk_size)
        assert result.loss.item() == pytest.approx(expected.item(), abs=1e-10)
        for found, gradient in zip(torch.autograd.grad(result.loss, leaves), expected_gradients, strict=True):
            torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-10)


@EVERY
def test_on_set_bfloat16_logits_are_computed_in_float32(name):
    rows, function = Rows((6, 8, 4), torch.float32), OnSet(DIVERGENCES[name][0])
    half = rows.student.bfloat16()
    found = function(half, rows.ids, rows.log_probs)
    assert found.dtype == torch.float32
    assert torch.equal(found, function(half.float(), rows.ids, rows.log_probs))
    for other in (set_forward_kl, tail_nll):
        assert torch.equal(other(half, rows.ids, rows.log_probs), other(half.float(), rows.ids, rows.log_probs))


def squared(student, teacher):
    """A function of a user's, which does not detach anything."""
    return (student.exp() - teacher.exp()).square().sum(-1)


@pytest.mark.parametrize("function", [OnSet(forward_kl), OnSet(squared), set_forward_kl, tail_nll])
def test_sparse_divergence_teacher_carries_no_gradient(function):
    rows = Rows((6, 8, 4))
    log_probs = rows.log_probs.clone().requires_grad_()
    function(rows.leaf, rows.ids, log_probs).sum().backward()
    assert log_probs.grad is None or not log_probs.grad.any()


@pytest.mark.parametrize("function", [OnSet(forward_kl), OnSet(adaptive_kl), set_forward_kl, tail_nll])
def test_sparse_divergence_of_no_rows_or_no_weight_is_zero(function):
    for count in (0, 6):
        rows = Rows((count or 6, 8, 4))
        logits, labels = rows.leaf[:count], {name: part[:count] for name, part in rows.labels.items()}
        term = Term(function, INPUTS, torch.zeros(count, dtype=torch.float64))
        result = linear_loss({"student": (logits, None)}, {"x": term}, labels)
        result.loss.backward()
        assert result.loss.item() == 0.0 and not rows.leaf.grad.any() and result.values["x"].shape == (count,)

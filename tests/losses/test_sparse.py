import gc
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.losses.test_linear import Alive, LargestTensor
from trl_kd.losses import (
    Term,
    cross_entropy,
    entropy,
    linear_loss,
    log_normaliser,
    log_sum_exp,
    set_logits,
    top_tokens,
)
from trl_kd.modules import LMHead


INF = math.inf
# (N, V, H, K): an even and an odd shape
EVEN, ODD = (12, 16, 8, 4), (13, 17, 5, 3)
SHAPES = pytest.mark.parametrize("shape", [EVEN, ODD], ids=["even", "odd"])
CHUNK_SIZES = pytest.mark.parametrize("chunk_size", [1, 4, 5, 12, 13, 100, None])
HEADS = {
    "plain": (False, {}),
    "bias": (True, {}),
    "scale": (True, {"scale": 0.25}),
    "soft_cap": (True, {"soft_cap": 3.0}),
    "scale_and_soft_cap": (False, {"scale": 2.0, "soft_cap": 5.0}),
}
EVERY_HEAD = pytest.mark.parametrize("head", HEADS)
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
EVERY_DTYPE = pytest.mark.parametrize("dtype", TOLERANCES)


class Model:
    """Hidden states, a head and tokens of each state; the same numbers for the same seed."""

    def __init__(self, shape, head="plain", dtype=torch.float64, head_dtype=None, seed=0):
        rows, vocab_size, width, k = shape
        generator = torch.Generator().manual_seed(seed)

        def leaf(*size, to=dtype):
            return torch.randn(size, generator=generator, dtype=torch.float64).to(to).requires_grad_()

        has_bias, self.options = HEADS[head]
        self.hidden = leaf(rows, width)
        self.weight = leaf(vocab_size, width, to=head_dtype or dtype)
        self.bias = leaf(vocab_size, to=head_dtype or dtype) if has_bias else None
        # The same token more than once in a state, and padding with 0
        self.ids = torch.randint(vocab_size, (rows, k), generator=generator)
        self.ids[1::3, 1] = self.ids[1::3, 0]
        self.ids[2::3, 1:] = 0
        self.weights = torch.randn(rows, generator=generator, dtype=torch.float64).to(dtype)

    @property
    def head(self):
        return LMHead(self.weight, self.bias, **self.options)

    @property
    def leaves(self):
        return [each for each in (self.hidden, self.weight, self.bias) if each is not None]

    def dense(self):
        """All logits, in the steps of the definition."""
        logits = self.hidden @ self.weight.T
        logits = logits if self.bias is None else logits + self.bias
        logits = self.options.get("scale", 1.0) * logits
        cap = self.options.get("soft_cap")
        return logits if cap is None else cap * (logits / cap).tanh()

    def gradients(self, loss):
        return torch.autograd.grad(loss, self.leaves)


def assert_all_close(actual, expected, tolerance):
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# top_tokens


def test_top_tokens_literal_head_has_the_tokens_by_hand():
    # Logits are twice and three times those of the head
    head = LMHead(torch.tensor([[0.1], [0.5], [0.25], [0.15]]).double().log())
    ids, log_probs = top_tokens(torch.tensor([[1.0], [2.0]]).double(), head, k=3)
    assert ids.tolist() == [[1, 2, 3]] * 2
    squares = [0.25, 0.0625, 0.0225]
    expected = [[0.5, 0.25, 0.15], [each / (sum(squares) + 0.01) for each in squares]]
    torch.testing.assert_close(log_probs.exp(), torch.tensor(expected).double(), rtol=0, atol=1e-7)


@SHAPES
@EVERY_HEAD
@EVERY_DTYPE
@CHUNK_SIZES
def test_top_tokens_equal_the_sorted_dense_log_probs(chunk_size, dtype, head, shape):
    model = Model(shape, head, dtype)
    ids, log_probs = top_tokens(model.hidden, model.head, shape[3], chunk_size)
    expected = model.dense().log_softmax(-1).sort(dim=-1, descending=True)
    assert ids.dtype == torch.long and log_probs.dtype == dtype and not log_probs.requires_grad
    assert torch.equal(ids, expected.indices[:, : shape[3]])
    torch.testing.assert_close(log_probs, expected.values[:, : shape[3]].detach(), rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("k", [17, 18, 1000])
def test_top_tokens_of_a_smaller_vocabulary_are_all_of_it(k):
    model = Model(ODD)
    ids, log_probs = top_tokens(model.hidden, model.head, k)
    assert ids.shape == log_probs.shape == (13, 17)
    assert torch.equal(ids.sort().values, torch.arange(17).expand(13, 17))
    torch.testing.assert_close(log_probs.logsumexp(-1), torch.zeros(13).double(), rtol=0, atol=1e-12)


def test_top_tokens_of_a_half_precision_head_are_float32():
    """The product is rounded to 8 bits, what follows is not: the probabilities of all tokens sum to 1."""
    model = Model(EVEN, "bias", torch.float32, head_dtype=torch.bfloat16)
    ids, log_probs = top_tokens(model.hidden, model.head, 16)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.logsumexp(-1), torch.zeros(12), rtol=0, atol=1e-5)
    logits = model.head(model.hidden).float()
    torch.testing.assert_close(log_probs, logits.log_softmax(-1).gather(1, ids).detach(), rtol=0, atol=1e-5)


def test_top_tokens_of_no_states_are_empty():
    model = Model((0, 17, 5, 3))
    ids, log_probs = top_tokens(model.hidden, model.head, 3)
    assert ids.shape == log_probs.shape == (0, 3)


@pytest.mark.parametrize("k", [0, -2])
def test_top_tokens_k_below_one_raises(k):
    model = Model(ODD)
    with pytest.raises(ValueError, match=rf"`k` is {k}, but it is a number of tokens\. Set it to 1 or more\."):
        top_tokens(model.hidden, model.head, k)


def test_top_tokens_make_logits_of_a_chunk_alone():
    model = Model((256, 499, 6, 4), dtype=torch.float32)
    with LargestTensor() as largest:
        top_tokens(model.hidden, model.head, 4, chunk_size=8)
    assert largest.size == 8 * 499


# set_logits


def test_set_logits_literal_head_has_the_values_by_hand():
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    hidden, ids = torch.tensor([[3.0, 4.0], [1.0, -1.0]]), torch.tensor([[2, 0], [1, 1]])
    assert set_logits(hidden, LMHead(weight), ids).tolist() == [[14.0, 3.0], [-1.0, -1.0]]
    bias = torch.tensor([10.0, 20.0, 30.0])
    assert set_logits(hidden, LMHead(weight, bias), ids).tolist() == [[44.0, 13.0], [19.0, 19.0]]
    assert set_logits(hidden, LMHead(weight, bias, scale=0.5), ids).tolist() == [[22.0, 6.5], [9.5, 9.5]]
    capped = set_logits(hidden, LMHead(weight, bias, 0.5, soft_cap=2.0), ids).flatten().tolist()
    assert capped == pytest.approx([2.0 * math.tanh(z / 2.0) for z in (22.0, 6.5, 9.5, 9.5)], abs=1e-6)


@SHAPES
@EVERY_HEAD
@EVERY_DTYPE
@CHUNK_SIZES
def test_set_logits_equal_the_gathered_dense_ones_in_value_and_gradient(chunk_size, dtype, head, shape):
    model = Model(shape, head, dtype)
    logits = set_logits(model.hidden, model.head, model.ids, chunk_size)
    expected = model.dense().gather(1, model.ids)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    # Another weight of each column: a state's repeated token gets the sum of both
    weights = model.weights.unsqueeze(1) * torch.arange(1, shape[3] + 1)
    assert_all_close(
        model.gradients((weights * logits).sum()), model.gradients((weights * expected).sum()), TOLERANCES[dtype]
    )


def test_set_logits_tokens_of_no_state_carry_no_gradient():
    model = Model(ODD, "bias")
    model.ids = torch.full((13, 3), 4)
    set_logits(model.hidden, model.head, model.ids, 5).square().sum().backward()
    others = [v for v in range(17) if v != 4]
    assert not model.weight.grad[others].any() and not model.bias.grad[others].any()
    assert model.weight.grad[4].any() and model.bias.grad[4] != 0


@pytest.mark.parametrize("frozen", ["head", "hidden", "both"])
def test_set_logits_and_normaliser_of_frozen_parts_have_the_other_gradient(frozen):
    model, full = Model(ODD, "bias"), Model(ODD, "bias")
    names = {"head": ("weight", "bias"), "hidden": ("hidden",), "both": ("weight", "bias", "hidden")}[frozen]
    for name in names:
        getattr(model, name).requires_grad_(False)
    loss = set_logits(model.hidden, model.head, model.ids, 5).square().sum()
    loss = loss + (model.weights * log_normaliser(model.hidden, model.head, 5)).sum()
    assert loss.requires_grad == (frozen != "both")
    if frozen == "both":
        return
    loss.backward()
    expected = full.dense()
    (expected.gather(1, full.ids).square().sum() + (full.weights * expected.logsumexp(-1)).sum()).backward()
    for name in ("hidden", "weight", "bias"):
        if name in names:
            assert getattr(model, name).grad is None
        else:
            torch.testing.assert_close(getattr(model, name).grad, getattr(full, name).grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk_size", [1, 5, None])
def test_sparse_functions_of_no_states_are_empty_with_zero_gradient(chunk_size):
    model = Model((0, 17, 5, 3), "bias")
    logits = set_logits(model.hidden, model.head, model.ids, chunk_size)
    normaliser = log_normaliser(model.hidden, model.head, chunk_size)
    assert logits.shape == (0, 3) and normaliser.shape == (0,)
    (logits.sum() + normaliser.sum()).backward()
    for leaf in model.leaves:
        assert leaf.grad.shape == leaf.shape and not leaf.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY_HEAD
def test_set_logits_of_a_half_precision_head_are_near_the_exact_ones(head, dtype):
    """Products and gradients are rounded to 8 bits, and come in the dtypes of what they belong to."""
    model = Model(EVEN, head, dtype, head_dtype=torch.bfloat16)
    exact = Model(EVEN, head, torch.float64)
    for name in ("hidden", "weight", "bias"):
        if getattr(model, name) is not None:
            setattr(exact, name, getattr(model, name).detach().double().requires_grad_())
    logits, expected = set_logits(model.hidden, model.head, model.ids, 5), exact.dense().gather(1, exact.ids)
    assert logits.dtype == torch.float32
    # Sizes of up to 10
    torch.testing.assert_close(logits.double(), expected, rtol=2**-7, atol=0.06)
    weights = model.weights.unsqueeze(1).double()
    gradients = model.gradients((weights * logits).sum()), exact.gradients((weights * expected).sum())
    for leaf, gradient, other in zip(model.leaves, *gradients, strict=True):
        assert gradient.dtype == leaf.dtype
        torch.testing.assert_close(gradient.double(), other, rtol=2**-5, atol=0.15)


def test_set_logits_autocast_is_for_the_product_alone():
    model = Model(EVEN, "bias", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = set_logits(model.hidden, model.head, model.ids)
        expected = model.head(model.hidden).gather(1, model.ids)
        normaliser = log_normaliser(model.hidden, model.head)
        dense = model.head(model.hidden).float().logsumexp(-1)
    assert logits.dtype == normaliser.dtype == torch.float32 and expected.dtype == torch.bfloat16
    # The product was rounded, if before the bias or after it
    torch.testing.assert_close(logits, expected.float(), rtol=2**-7, atol=2**-6)
    assert (logits - model.dense().gather(1, model.ids)).abs().max() > 1e-4
    torch.testing.assert_close(normaliser, dense, rtol=0, atol=1e-5)
    found = model.gradients((model.weights * normaliser).sum() + logits.sum())
    exact = model.dense()
    expected = model.gradients((model.weights * exact.logsumexp(-1)).sum() + exact.gather(1, model.ids).sum())
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=2**-5, atol=0.1)


def test_set_logits_float16_gradients_stay_in_range():
    """Weights of one over the number of tokens are below what float16 holds, and sums of many rows above."""
    rows = 2048
    hidden = torch.full((rows, 2), 50.0, requires_grad=True)
    weight = torch.full((3, 2), 0.5, dtype=torch.float16, requires_grad=True)
    ids = torch.zeros(rows, 1, dtype=torch.long)
    for factor in (1e-8, 0.3):
        weights = torch.full((rows, 1), factor)
        weights[1::2] *= -0.75
        logits = set_logits(hidden, LMHead(weight), ids, rows)
        of_hidden, of_weight = torch.autograd.grad((weights * logits).sum(), (hidden, weight))
        torch.testing.assert_close(of_hidden, (0.5 * weights).expand(rows, 2), rtol=2e-3, atol=0)
        torch.testing.assert_close(of_weight[0].float(), 50.0 * weights.sum().expand(2), rtol=2e-3, atol=6e-8)
        assert not of_weight[1:].any()
    # The rows of each half sum to 200 * 1,024, and those of both to a tenth of it
    hidden = torch.full((rows, 2), 100.0)
    logits = set_logits(hidden, LMHead(weight), ids, rows // 2)
    signs = torch.ones(rows, 1)
    signs[rows // 2 :] = -0.9
    (of_weight,) = torch.autograd.grad((2.0 * signs * logits).sum(), weight)
    torch.testing.assert_close(of_weight[0].float(), torch.full((2,), 20480.0), rtol=4e-3, atol=0)


def test_set_logits_bfloat16_gradients_of_many_chunks_are_added_in_float32():
    # In 8 bits, a sum of ones ends at 256
    weight = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    set_logits(torch.ones(1000, 2), LMHead(weight), torch.ones(1000, 1, dtype=torch.long), 1).sum().backward()
    assert weight.grad.tolist() == [[0.0, 0.0], [1000.0, 1000.0], [0.0, 0.0]]


class Sizes(TorchDispatchMode):
    """Sizes of all floating tensors that operations make, by what is stored."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.seen.add(tensor.untyped_storage().nbytes() // tensor.element_size())
        return output


@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("vocab_size", [499, 4999])
def test_set_logits_make_nothing_larger_than_chunk_times_union(vocab_size, is_frozen):
    rows, width, k, chunk_size = 256, 6, 4, 8
    model = Model((rows, vocab_size, width, k), "bias", torch.float32)
    for each in (model.weight, model.bias):
        each.requires_grad_(not is_frozen)
    known = {rows * k, rows * width} | (set() if is_frozen else {vocab_size * width, vocab_size})
    with Sizes() as sizes:
        set_logits(model.hidden, model.head, model.ids, chunk_size).sum().backward()
    # A chunk has at most 8 * 4 different tokens
    assert max(sizes.seen - known) <= chunk_size * chunk_size * k
    # The instrument sees a larger chunk
    with Sizes() as sizes:
        set_logits(model.hidden, model.head, model.ids, rows).sum().backward()
    assert max(sizes.seen - known) > rows * 200


@pytest.mark.parametrize(("k", "rows"), [(1, 1024), (32, 32), (500, 16)])
def test_set_logits_default_chunk_has_1024_tokens_or_16_states(k, rows):
    states = 2 * rows
    model = Model((states, 7, 1, 2), dtype=torch.float32)
    model.ids = torch.arange(states * k).view(states, k) % 7
    seen = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.mm.default:
                seen.append(len(args[0]))
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Products():
        set_logits(model.hidden, model.head, model.ids)
    assert seen == [rows, rows]


# log_normaliser


def test_log_normaliser_literal_head_has_the_values_by_hand():
    head = LMHead(torch.tensor([[0.0], [math.log(3.0)]]), torch.tensor([0.0, math.log(2.0)]))
    found = log_normaliser(torch.tensor([[0.0], [1.0], [2.0]]), head)
    assert found.tolist() == pytest.approx([math.log(3.0), math.log(7.0), math.log(19.0)], abs=1e-6)


@SHAPES
@EVERY_HEAD
@EVERY_DTYPE
@CHUNK_SIZES
def test_log_normaliser_equals_the_dense_one_in_value_and_gradient(chunk_size, dtype, head, shape):
    model = Model(shape, head, dtype)
    found, expected = log_normaliser(model.hidden, model.head, chunk_size), model.dense().logsumexp(-1)
    assert found.dtype == dtype and found.shape == (shape[0],)
    torch.testing.assert_close(found, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    # Weights of both signs, and a function of the value
    losses = ((model.weights * each.square()).sum() for each in (found, expected))
    assert_all_close(*(model.gradients(loss) for loss in losses), TOLERANCES[dtype])


def test_log_normaliser_extreme_logits_are_finite():
    hidden, weight = (
        torch.tensor([[1.0], [-1.0]]).requires_grad_(),
        torch.tensor([[1e4], [0.0], [-1e4]]).requires_grad_(),
    )
    found = log_normaliser(hidden, LMHead(weight))
    assert found.tolist() == [1e4, 1e4]
    found.sum().backward()
    assert hidden.grad.tolist() == [[1e4], [-1e4]] and weight.grad.tolist() == [[1.0], [0.0], [-1.0]]


def test_log_normaliser_rows_without_gradient_add_none():
    model = Model(ODD, "bias")
    found = log_normaliser(model.hidden, model.head, 4)
    found[[2, 5]].sum().backward()
    rows = [i for i in range(13) if i not in (2, 5)]
    assert not model.hidden.grad[rows].any() and model.hidden.grad[[2, 5]].any(1).all()
    expected = torch.autograd.grad(model.dense().logsumexp(-1)[[2, 5]].sum(), model.weight)[0]
    torch.testing.assert_close(model.weight.grad, expected, rtol=1e-10, atol=1e-12)


def test_log_normaliser_without_gradient_is_the_same_number():
    model = Model(ODD, "soft_cap")
    with torch.no_grad():
        found = log_normaliser(model.hidden, model.head, 4)
    assert not found.requires_grad
    assert torch.equal(found, log_normaliser(model.hidden, model.head, 4).detach())


def test_log_normaliser_holds_one_number_for_each_state_until_backward():
    model = Model((256, 499, 6, 4), "bias", torch.float32)
    is_collecting = gc.isenabled()
    gc.disable()  # what only the collector frees would count
    try:
        with Alive(*model.leaves) as alive:
            found = log_normaliser(model.hidden, model.head, chunk_size=8)
        assert alive.bytes == 256 * 4
        with LargestTensor() as largest:
            found.sum().backward()
        assert largest.size == 8 * 499
    finally:
        if is_collecting:
            gc.enable()
    with LargestTensor() as largest:
        log_normaliser(model.hidden, model.head, chunk_size=8)
    assert largest.size == 8 * 499


def test_log_normaliser_backward_recomputes_the_logits_of_the_forward_pass():
    """Under autocast these are rounded, and so the probabilities that the gradient is made of."""
    model = Model(EVEN, "bias", torch.float32)
    dtypes = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten.addmm.out, torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
                dtypes.update(each.dtype for each in args if isinstance(each, torch.Tensor))
            return function(*args, **(kwargs or {}))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = log_normaliser(model.hidden, model.head)
    with Products():
        model.gradients(found.sum())
    assert dtypes == {torch.bfloat16}


def test_gauge_and_tail_from_the_parts_equal_those_of_dense_logits():
    """log pi_S of the tokens, and the mass of a set, with the gradient of both parts at once."""
    model = Model(ODD, "scale_and_soft_cap")
    model.ids = torch.randperm(17, generator=torch.Generator().manual_seed(1))[:3].repeat(13, 1)
    normaliser = log_normaliser(model.hidden, model.head, 5)
    log_probs = set_logits(model.hidden, model.head, model.ids, 4) - normaliser.unsqueeze(1)
    expected = model.dense().log_softmax(-1).gather(1, model.ids)
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-12)
    losses = ((model.weights * each.logsumexp(-1)).sum() for each in (log_probs, expected))
    assert_all_close(*(model.gradients(loss) for loss in losses), 1e-10)


def test_log_sum_exp_beside_other_terms_leaves_them_alone():
    """All terms share one softmax; here the gradient of the sum of three."""
    model = Model(ODD, "bias")
    labels = model.ids[:, 0]
    others = {"nll": (cross_entropy, ("student", "labels")), "entropy": (entropy, ("student",))}
    logits = model.dense()
    expected = (model.weights * logits.logsumexp(-1)).sum() + (0.5 * cross_entropy(logits, labels)).sum()
    expected = expected + (0.5 * entropy(logits)).sum()
    expected_gradients = model.gradients(expected)
    value = {"value": Term(log_sum_exp, ("student",), model.weights)}
    halves = torch.full((13,), 0.5, dtype=torch.float64)
    rest = {name: Term(function, inputs, halves) for name, (function, inputs) in others.items()}
    for terms in (value | rest, rest | value):
        result = linear_loss({"student": (model.hidden, model.head)}, terms, labels, 5)
        assert result.loss.item() == pytest.approx(expected.item(), abs=1e-10)
        torch.testing.assert_close(result.values["value"], logits.logsumexp(-1).detach(), rtol=0, atol=1e-12)
        assert_all_close(model.gradients(result.loss), expected_gradients, 1e-10)

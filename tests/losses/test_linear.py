import gc
import math

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from trl_kd.losses import (
    Term,
    cross_entropy,
    entropy,
    exact_moment,
    forward_kl,
    generalized_jsd,
    linear_loss,
    reverse_kl,
    total_variation,
)
from trl_kd.modules import LMHead


# (N, V, H_s, H_t): an even and an odd shape
SHAPES = pytest.mark.parametrize("shape", [(12, 16, 8, 4), (13, 17, 5, 9)])
CHUNK_SIZES = pytest.mark.parametrize("chunk_size", [1, 4, 5, 12, 13, 100, None])
FUNCTIONS = pytest.mark.parametrize(
    "function", [forward_kl, reverse_kl, generalized_jsd, total_variation, exact_moment]
)


class Models:
    """Hidden states and heads of a student and a teacher, the same numbers for the same seed."""

    def __init__(self, shape, dtype=torch.float32, bias=True, seed=0):
        rows, vocab_size, student_size, teacher_size = shape
        generator = torch.Generator().manual_seed(seed)

        def tensor(*size):
            return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden = tensor(rows, student_size).requires_grad_()
        self.weight = tensor(vocab_size, student_size).requires_grad_()
        self.bias = tensor(vocab_size).requires_grad_() if bias else None
        self.teacher_hidden = tensor(rows, teacher_size)
        self.teacher_head = LMHead(tensor(vocab_size, teacher_size), tensor(vocab_size))
        self.labels = torch.randint(vocab_size, (rows,), generator=generator)
        self.weights = torch.rand(rows, generator=generator) + 0.1
        self.weights[1::3] = 0.0

    @property
    def pairs(self):
        return {
            "student": (self.hidden, LMHead(self.weight, self.bias)),
            "teacher": (self.teacher_hidden, self.teacher_head),
        }

    @property
    def gradients(self):
        return [p.grad for p in (self.hidden, self.weight, self.bias) if p is not None]


def plain_loss(pairs, terms, labels=None):
    """The same without chunks: all logits at once, and a sum over the rows that carry weight."""
    inputs = {name: head(hidden) for name, (hidden, head) in pairs.items()} | {"labels": labels}
    loss, values = 0.0, {}
    for name, term in terms.items():
        value = term.function(*(inputs[key] for key in term.inputs))
        values[name] = value.detach()
        if term.weights is not None:
            loss = loss + sum(value[i] * term.weights[i] for i in range(len(value)) if term.weights[i] != 0)
    return loss, values


def repeatable(function):
    """The same function with a gradient that may be asked for again and again, as `gradcheck` does."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            with torch.enable_grad():
                leaves = [each.detach().requires_grad_() for each in inputs]
                value = function(*leaves)
            ctx.save_for_backward(*torch.autograd.grad(value, leaves))
            return value.detach()

        @staticmethod
        def backward(ctx, grad_output):
            return tuple(grad_output * each for each in ctx.saved_tensors)

    return Once.apply


def assert_relative(actual, expected, tolerance):
    """Largest error relative to the largest entry: sums of another order round differently, entry by entry."""
    actual, expected = actual.detach().double(), torch.as_tensor(expected).detach().double()
    assert actual.shape == expected.shape
    assert ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item() <= tolerance


def compare(shape, make_terms, chunk_size, tolerance=1e-5, dtype=torch.float32, bias=True):
    chunked, plain = Models(shape, dtype, bias), Models(shape, dtype, bias)
    result = linear_loss(chunked.pairs, make_terms(chunked), chunked.labels, chunk_size)
    result.loss.backward()
    loss, values = plain_loss(plain.pairs, make_terms(plain), plain.labels)
    loss.backward()
    assert_relative(result.loss, loss, tolerance)
    assert list(result.values) == list(values)
    for name, value in result.values.items():
        assert not value.requires_grad
        assert_relative(value, values[name], tolerance)
    for actual, expected in zip(chunked.gradients, plain.gradients, strict=True):
        assert actual.dtype == dtype
        assert_relative(actual, expected, tolerance)
    return chunked


def test_linear_loss_literal_rows_has_the_value_and_gradient_by_hand():
    # Identity head: the hidden states are the logits. Student [.5, .5] and [.25, .75], teacher [.7, .3] and [.25, .75]
    hidden = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]], requires_grad=True)
    teacher = torch.tensor([[0.7, 0.3], [0.25, 0.75]]).log()
    eye = LMHead(torch.eye(2))
    terms = {
        "tv": Term(total_variation, weights=torch.tensor([2.0, 1.0])),
        "nll": Term(cross_entropy, ("student", "labels"), torch.tensor([0.0, 3.0])),
        "teacher_entropy": Term(entropy, ("teacher",)),
    }
    pairs = {"student": (hidden, eye), "teacher": (teacher, eye)}
    result = linear_loss(pairs, terms, torch.tensor([1, 0]))
    assert result.loss.item() == pytest.approx(2 * 0.2 + 3 * math.log(4), rel=1e-6)
    assert result.loss.dtype == torch.float32 and result.loss.shape == ()
    expected = {
        "tv": [0.2, 0.0],
        "nll": [math.log(2), math.log(4)],
        "teacher_entropy": [
            -0.7 * math.log(0.7) - 0.3 * math.log(0.3),
            -0.25 * math.log(0.25) - 0.75 * math.log(0.75),
        ],
    }
    for name, values in expected.items():
        assert result.values[name].tolist() == pytest.approx(values, abs=1e-6)
    linear_loss(pairs, {"nll": terms["nll"]}, torch.tensor([1, 0])).loss.backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.0, 0.0], [-3 * 0.75, 3 * 0.75]]))


@SHAPES
@CHUNK_SIZES
def test_linear_loss_chunks_equal_the_plain_form_in_value_and_gradients(shape, chunk_size):
    # All kinds of terms at once; 1e-5 is the promise of the package for float32
    def terms(models):
        return {
            "moment": Term(exact_moment, weights=models.weights),
            "nll": Term(cross_entropy, ("student", "labels"), models.weights.flip(0)),
            "kl": Term(forward_kl, weights=torch.full_like(models.weights, 0.1)),
            "total_variation": Term(total_variation),
            "teacher_entropy": Term(entropy, ("teacher",)),
        }

    models = compare(shape, terms, chunk_size)
    assert all(gradient.abs().max() > 0.05 for gradient in models.gradients)


@SHAPES
@FUNCTIONS
@pytest.mark.parametrize("bias", [True, False])
def test_linear_loss_each_divergence_equals_the_plain_form(shape, function, bias):
    compare(shape, lambda models: {"loss": Term(function, weights=models.weights)}, 5, bias=bias)


@SHAPES
def test_linear_loss_float64_is_computed_in_float64(shape):
    # Plain and chunked sums differ by float64 rounding only
    compare(shape, lambda models: {"loss": Term(reverse_kl, weights=models.weights)}, 5, 1e-13, torch.float64)


@pytest.mark.parametrize("cap", [{"scale": 0.25}, {"soft_cap": 3.0}, {"scale": 2.0, "soft_cap": 1.5}])
def test_linear_loss_scaled_and_capped_heads_equal_the_plain_form(cap):
    results = []
    for function in (linear_loss, plain_loss):
        models = Models((13, 17, 5, 9))
        pairs = models.pairs | {"student": (models.hidden, LMHead(models.weight, models.bias, **cap))}
        terms = {"loss": Term(forward_kl, weights=models.weights)}
        result = function(pairs, terms, models.labels)
        loss = result.loss if function is linear_loss else result[0]
        loss.backward()
        results.append([loss, *models.gradients])
    for actual, expected in zip(*results, strict=True):
        assert_relative(actual, expected, 1e-5)


@pytest.mark.parametrize("chunk_size", [3, 100])
def test_linear_loss_pairs_that_share_states_and_head_add_their_gradients(chunk_size):
    results = []
    for function in (linear_loss, plain_loss):
        models = Models((13, 17, 5, 9))
        head = LMHead(models.weight, models.bias)
        pairs = {
            "student": (models.hidden, head),
            "again": (models.hidden * 2, head),
            "teacher": models.pairs["teacher"],
        }
        terms = {
            "kl": Term(forward_kl, ("student", "teacher"), models.weights),
            "entropy": Term(entropy, ("again",), models.weights),
        }
        result = function(pairs, terms) if function is plain_loss else function(pairs, terms, chunk_size=chunk_size)
        loss = result.loss if function is linear_loss else result[0]
        loss.backward()
        results.append([loss, *models.gradients])
    for actual, expected in zip(*results, strict=True):
        assert_relative(actual, expected, 1e-5)


def test_linear_loss_weight_tied_to_the_embeddings_adds_both_gradients():
    results = []
    for function in (linear_loss, plain_loss):
        models = Models((13, 17, 5, 9))
        hidden = torch.nn.functional.embedding(models.labels, models.weight) * models.hidden.detach()
        pairs = models.pairs | {"student": (hidden, LMHead(models.weight))}
        terms = {"kl": Term(forward_kl, weights=models.weights)}
        result = function(pairs, terms)
        (result.loss if function is linear_loss else result[0]).backward()
        results.append(models.weight.grad)
    assert_relative(*results, 1e-5)


def test_linear_loss_gradient_reaches_no_frozen_pair():
    models = Models((13, 17, 5, 9))
    weight = models.teacher_head.weight
    linear_loss(models.pairs, {"kl": Term(forward_kl, weights=models.weights)}).loss.backward()
    assert not weight.requires_grad and weight.grad is None and models.teacher_hidden.grad is None
    assert models.hidden.grad[1::3].abs().max() == 0  # no weight
    assert models.hidden.grad[::3].abs().min(dim=1).values.min() > 0


def test_linear_loss_metrics_alone_have_values_and_no_gradient():
    models = Models((13, 17, 5, 9))
    terms = {"kl": Term(forward_kl), "nll": Term(cross_entropy, ("student", "labels"))}
    result = linear_loss(models.pairs, terms, models.labels, chunk_size=4)
    assert result.loss.item() == 0.0 and not result.loss.requires_grad
    _, expected = plain_loss(models.pairs, terms, models.labels)
    for name, values in expected.items():
        assert_relative(result.values[name], values, 1e-5)


def test_linear_loss_metric_has_no_influence_on_loss_and_gradients():
    def infinite(student, teacher):
        return forward_kl(student, teacher) * math.inf

    results = []
    for metrics in ({}, {"infinite": Term(infinite), "entropy": Term(entropy, ("student",))}):
        models = Models((13, 17, 5, 9))
        result = linear_loss(models.pairs, metrics | {"kl": Term(forward_kl, weights=models.weights)}, chunk_size=4)
        result.loss.backward()
        results.append([result.loss.detach(), *models.gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_linear_loss_without_grad_mode_has_the_same_values():
    models = Models((13, 17, 5, 9))
    terms = {"kl": Term(forward_kl, weights=models.weights)}
    with torch.no_grad():
        quiet = linear_loss(models.pairs, terms, chunk_size=4)
    loud = linear_loss(models.pairs, terms, chunk_size=4)
    assert not quiet.loss.requires_grad and loud.loss.requires_grad
    assert torch.equal(quiet.loss, loud.loss) and torch.equal(quiet.values["kl"], loud.values["kl"])


@pytest.mark.parametrize("chunk_size", [4, None])
@pytest.mark.parametrize("rows", [0, 13])
def test_linear_loss_nothing_to_train_on_is_zero_with_zero_gradients_for_all_parameters(rows, chunk_size):
    models = Models((rows, 17, 5, 9))
    terms = {
        "kl": Term(forward_kl, weights=torch.zeros(rows)),
        "nll": Term(cross_entropy, ("student", "labels"), torch.zeros(rows)),
        "entropy": Term(entropy, ("teacher",)),
    }
    result = linear_loss(models.pairs, terms, models.labels, chunk_size)
    result.loss.backward()
    assert result.loss.item() == 0.0
    for gradient, parameter in zip(models.gradients, (models.hidden, models.weight, models.bias), strict=True):
        assert torch.equal(gradient, torch.zeros_like(parameter))
    assert all(value.shape == (rows,) for value in result.values.values())


@pytest.mark.parametrize("weights", [[0.0, 0.0], [0.0, 1.0]])
def test_linear_loss_infinite_row_without_weight_leaves_gradients_finite(weights):
    # The teacher of row 0 excludes token 0, so the reverse KL of that row is infinite
    hidden, weight = torch.ones(2, 2, requires_grad=True), torch.eye(2).requires_grad_()
    pairs = {
        "student": (hidden, LMHead(weight)),
        # -3e38 * 10 is below the least float
        "teacher": (torch.tensor([[-3e38], [0.2]]), LMHead(torch.tensor([[10.0], [0.0]]))),
    }
    result = linear_loss(pairs, {"kl": Term(reverse_kl, weights=torch.tensor(weights))})
    result.loss.backward()
    assert result.values["kl"][0] == math.inf
    assert torch.isfinite(result.loss) and torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()
    assert hidden.grad[0].tolist() == [0.0, 0.0]
    assert (hidden.grad[1].abs().max() > 0.1) == (weights[1] > 0)


@pytest.mark.parametrize("chunk_size", [5, 100])
def test_linear_loss_bfloat16_inputs_are_near_the_float32_form(chunk_size):
    # Logits are rounded to 8 bits: sizes of 5 move by up to 2^-8 * 5 = 0.02, and gradients are rounded once a chunk
    models = Models((13, 17, 5, 9), torch.bfloat16)
    result = linear_loss(models.pairs, {"kl": Term(forward_kl, weights=models.weights)}, chunk_size=chunk_size)
    result.loss.backward()
    exact = Models((13, 17, 5, 9), torch.bfloat16)
    for name in ("hidden", "weight", "bias"):
        setattr(exact, name, getattr(exact, name).detach().float().requires_grad_())
    exact.teacher_hidden = exact.teacher_hidden.float()
    exact.teacher_head = LMHead(exact.teacher_head.weight.float(), exact.teacher_head.bias.float())
    expected = linear_loss(exact.pairs, {"kl": Term(forward_kl, weights=exact.weights)})
    expected.loss.backward()
    assert result.loss.dtype == result.values["kl"].dtype == torch.float32
    assert_relative(result.values["kl"], expected.values["kl"], 0.03)
    for actual, gradient in zip(models.gradients, exact.gradients, strict=True):
        assert actual.dtype == torch.bfloat16
        assert_relative(actual, gradient, 0.03)


def test_linear_loss_autocast_is_for_the_product_alone():
    # Logits in bfloat16, as the model's own head has them under autocast; all that follows in float32
    models = Models((13, 17, 5, 9))
    terms = {"kl": Term(forward_kl, weights=models.weights)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = linear_loss(models.pairs, terms, chunk_size=4)
        logits = [head(hidden) for hidden, head in models.pairs.values()]
    result.loss.backward()
    assert logits[0].dtype == torch.bfloat16
    assert_relative(result.values["kl"], forward_kl(*(each.float() for each in logits)), 1e-5)
    assert result.loss.dtype == models.weight.grad.dtype == torch.float32
    models.weight.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = plain_loss(models.pairs, terms)
    loss.backward()
    assert_relative(result.loss, loss, 1e-5)


def test_linear_loss_functions_run_outside_of_autocast():
    def with_product(student, teacher):  # such as a critic's
        product = student.float() @ torch.ones(17, 1)
        assert product.dtype == student.dtype == torch.float32
        return product.squeeze(1)

    models = Models((13, 17, 5, 9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_loss(models.pairs, {"critic": Term(with_product, weights=models.weights)}, chunk_size=4).loss
        loss.backward()
    assert models.weight.grad.any()


def test_linear_loss_float64_passes_gradcheck():
    models = Models((7, 6, 3, 4), torch.float64)

    def linear(hidden, weight, bias):
        pairs = {"student": (hidden, LMHead(weight, bias)), "teacher": models.pairs["teacher"]}
        terms = {
            "kl": Term(reverse_kl, weights=models.weights),
            "nll": Term(cross_entropy, ("student", "labels"), models.weights),
        }
        return linear_loss(pairs, terms, models.labels, chunk_size=3).loss

    assert torch.autograd.gradcheck(repeatable(linear), (models.hidden, models.weight, models.bias))


def test_linear_loss_function_sees_each_chunk_and_its_labels():
    seen = []

    def spy(student, labels):
        seen.append(labels.tolist())
        assert student.shape == (len(labels), 17)
        return cross_entropy(student, labels)

    models = Models((13, 17, 5, 9))
    linear_loss(models.pairs, {"nll": Term(spy, ("student", "labels"))}, models.labels, chunk_size=5)
    labels = models.labels.tolist()
    assert seen == [labels[:5], labels[5:10], labels[10:]]


@pytest.mark.parametrize("wrong", ["teacher", "weights", "labels"])
def test_linear_loss_numbers_of_rows_that_differ_raise(wrong):
    models = Models((13, 17, 5, 9))
    pairs, weights, labels = models.pairs, models.weights, models.labels
    if wrong == "teacher":
        pairs["teacher"] = (models.teacher_hidden[:-1], models.teacher_head)
    elif wrong == "weights":
        weights = weights[:-1]
    else:
        labels = labels[:-1]
    expected = r"The numbers of rows differ: \{'student': 13, .*12.*\}\. .* describe the same tokens\. Select the same"
    with pytest.raises(ValueError, match=expected):
        linear_loss(pairs, {"kl": Term(forward_kl, weights=weights)}, labels)


@pytest.mark.parametrize("size", [0, -1])
def test_linear_loss_chunk_size_below_one_raises(size):
    models = Models((13, 17, 5, 9))
    with pytest.raises(ValueError, match=rf"`chunk_size` is {size}, but it is a number of rows\. Set it to 1"):
        linear_loss(models.pairs, {"kl": Term(forward_kl)}, chunk_size=size)


@pytest.mark.parametrize(
    "terms", [{}, {"nll": Term(cross_entropy, ("student", "labels"))}, {"a": Term(entropy, ("x",))}]
)
def test_linear_loss_terms_that_take_what_is_not_there_raise(terms):
    models = Models((13, 17, 5, 9))
    with pytest.raises(ValueError, match=r"but there are \['student', 'teacher'\]\. .* Pass these pairs"):
        linear_loss(models.pairs, terms)


@pytest.mark.parametrize("weighted", [True, False])
def test_linear_loss_function_that_reduces_raises(weighted):
    models = Models((13, 17, 5, 9))

    def mean_kl(student, teacher):
        return forward_kl(student, teacher).mean()

    with pytest.raises(ValueError, match=r"`mean_kl` returned shape \(\) for 5 tokens, .* one value per token"):
        linear_loss(models.pairs, {"kl": Term(mean_kl, weights=models.weights if weighted else None)}, chunk_size=5)


def test_linear_loss_gradient_of_the_gradient_raises():
    models = Models((13, 17, 5, 9))
    loss = linear_loss(models.pairs, {"kl": Term(forward_kl, weights=models.weights)}).loss
    factor = torch.ones((), requires_grad=True)
    (gradient,) = torch.autograd.grad(loss * factor, models.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_linear_loss_float16_sum_over_many_rows_stays_in_range():
    # One large channel of the states, and one label everywhere: a column of the gradient sums to about 1,024 * 100
    rows = 1024
    hidden = torch.ones(rows, 4)
    hidden[:, 0] = 100.0
    weight = torch.zeros(8, 4, dtype=torch.float16, requires_grad=True)
    term = Term(cross_entropy, ("student", "labels"), torch.full((rows,), 1.0 / rows))
    labels = torch.zeros(rows, dtype=torch.long)
    linear_loss({"student": (hidden.half(), LMHead(weight))}, {"nll": term}, labels, rows).loss.backward()
    expected = torch.full((8, 4), 0.125) - torch.nn.functional.one_hot(torch.tensor(0), 8).unsqueeze(1)
    expected[:, 0] *= 100.0
    torch.testing.assert_close(weight.grad.float(), expected, rtol=2e-3, atol=1e-3)


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation makes, forward and backward."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return output


def largest_tensor(models, chunk_size):
    terms = {
        "moment": Term(exact_moment, weights=models.weights),
        "kl": Term(forward_kl, weights=models.weights),
        "nll": Term(cross_entropy, ("student", "labels"), models.weights),
        "entropy": Term(entropy, ("teacher",)),
    }
    with LargestTensor() as largest:
        linear_loss(models.pairs, terms, models.labels, chunk_size).loss.backward()
    return largest.size


@pytest.mark.parametrize("weighted", ["all", "some"])
def test_linear_loss_no_tensor_has_a_row_of_logits_for_every_token(weighted):
    rows, vocab_size = 256, 501
    models = Models((rows, vocab_size, 6, 7))
    if weighted == "all":
        models.weights = torch.ones(rows)
    assert largest_tensor(models, chunk_size=8) == 8 * vocab_size
    # The instrument sees them where they are
    assert largest_tensor(models, chunk_size=rows) == rows * vocab_size


class Alive(TorchDispatchMode):
    """Bytes of all that operations have made beside their inputs and that somebody still holds."""

    def __init__(self, *inputs):
        super().__init__()
        self.inputs = {each.untyped_storage()._cdata for each in inputs}
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.inputs:
                    reference = StorageWeakRef(storage)
                    self.storages[reference.cdata] = reference, storage.nbytes()
        return output

    @property
    def bytes(self):
        return sum(size for reference, size in self.storages.values() if not reference.expired())


@pytest.mark.parametrize("function", [forward_kl, lambda student, teacher: (student - teacher).square().mean(-1)])
def test_linear_loss_holds_gradients_and_values_alone_until_backward(function):
    models = Models((256, 501, 6, 7))
    terms = {"loss": Term(function, weights=torch.ones(256)), "entropy": Term(entropy, ("teacher",))}
    collecting = gc.isenabled()
    gc.disable()  # what only the collector frees would count
    try:
        pairs = models.pairs
        inputs = [each for hidden, head in pairs.values() for each in (hidden, head.weight, head.bias)]
        with Alive(*inputs, terms["loss"].weights) as alive:
            result = linear_loss(pairs, terms, chunk_size=8)
        # Gradients of hidden states, head and bias, two values a row, the loss; a chunk of logits has 16,032 bytes
        gradients = sum(4 * each.numel() for each in (models.hidden, models.weight, models.bias))
        assert alive.bytes == gradients + 2 * 256 * 4 + 4
        with alive:
            result.loss.backward()
        del result
        assert alive.bytes == gradients  # handed over, not copied
    finally:
        if collecting:
            gc.enable()


@pytest.mark.parametrize(("vocab_size", "expected"), [(150_000, 128), (40_000, 209), (5_000, 1024)])
def test_linear_loss_default_chunk_is_128_rows_or_32_mib(vocab_size, expected):
    # 2^25 bytes / (4 bytes * 40,000) = 209 rows
    hidden, head = torch.zeros(1100, 1), LMHead(torch.zeros(vocab_size, 1))
    with LargestTensor() as largest:
        linear_loss(
            {"student": (hidden, head)},
            {"label": Term(cross_entropy, ("student", "labels"))},
            torch.zeros(1100, dtype=torch.long),
        )
    assert largest.size == expected * vocab_size

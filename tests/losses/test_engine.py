"""The engine behind `linear_loss`: each objective against its plain function on all logits at once, under autograd.

Inputs are multiples of 1/32 of a few bits, so that their products have no rounding: both sides see the same logits,
and what is compared is what the engine does with them.
"""

import copy
import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trl_kd.losses import (
    Term,
    adaptive_kl,
    critic_objective,
    cross_entropy,
    entropy,
    exact_moment,
    exact_penalised_moment,
    forward_kl,
    generalized_jsd,
    linear,
    linear_loss,
    moment,
    reverse_kl,
    saturation,
    skewed_forward_kl,
    skewed_reverse_kl,
    top1_agreement,
    total_variation,
)
from trl_kd.modules import LMHead


TWO, THREE = ("student", "teacher"), ("student", "teacher", "critic")
WITH_TEMPERATURE = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "generalized_jsd": generalized_jsd,
    "skewed_forward_kl": skewed_forward_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "adaptive_kl": adaptive_kl,
    "total_variation": total_variation,
}
# Function and inputs of all that can be trained
OBJECTIVES = (
    {name: (function, TWO) for name, function in WITH_TEMPERATURE.items()}
    | {
        f"{name}_at_{kd_temperature}": (partial(function, kd_temperature=kd_temperature), TWO)
        for name, function in WITH_TEMPERATURE.items()
        for kd_temperature in (0.1, 10.0)
    }
    | {
        "jsd_beta_0": (partial(generalized_jsd, beta=0.0), TWO),
        "jsd_beta_0.2": (partial(generalized_jsd, beta=0.2), TWO),
        "jsd_beta_1": (partial(generalized_jsd, beta=1.0), TWO),
        "jsd_beta_0_at_2": (partial(generalized_jsd, beta=0.0, kd_temperature=2.0), TWO),
        "jsd_beta_1_at_2": (partial(generalized_jsd, beta=1.0, kd_temperature=2.0), TWO),
        "jsd_beta_0.9_at_2": (partial(generalized_jsd, beta=0.9, kd_temperature=2.0), TWO),
        "skewed_forward_kl_0": (partial(skewed_forward_kl, skew=0.0), TWO),
        "skewed_forward_kl_0_at_2": (partial(skewed_forward_kl, skew=0.0, kd_temperature=2.0), TWO),
        "skewed_forward_kl_0.6": (partial(skewed_forward_kl, skew=0.6), TWO),
        "skewed_reverse_kl_0": (partial(skewed_reverse_kl, skew=0.0), TWO),
        "skewed_reverse_kl_0_at_2": (partial(skewed_reverse_kl, skew=0.0, kd_temperature=2.0), TWO),
        "skewed_reverse_kl_0.6_at_2": (partial(skewed_reverse_kl, skew=0.6, kd_temperature=2.0), TWO),
        "adaptive_kl_0.9": (partial(adaptive_kl, head=0.9), TWO),
        "cross_entropy": (cross_entropy, ("student", "labels")),
        "entropy": (entropy, ("student",)),
        "exact_moment": (exact_moment, TWO),
        "exact_penalised_moment": (exact_penalised_moment, TWO),
        "moment": (moment, THREE),
        "critic_objective": (partial(critic_objective, penalty=0.6), THREE),
        "critic_objective_free": (partial(critic_objective, penalty=0.0), THREE),
    }
)
METRICS = {"top1_agreement": (top1_agreement, TWO), "saturation": (saturation, THREE)}
# Infinite where the teacher excludes a token
UNBOUNDED = [
    name
    for name in OBJECTIVES
    if name.startswith(("reverse_kl", "adaptive_kl", "jsd_beta_1"))
    or name in ("skewed_reverse_kl_0", "skewed_reverse_kl_0_at_2")
]
EVERY = pytest.mark.parametrize("name", OBJECTIVES)
CHUNK_SIZES = pytest.mark.parametrize("chunk_size", [1, 5, None])
ODD, BLOCKS = (13, 17), (150, 1001)


class World:
    """Hidden states and heads of student, teacher and critic, all with gradient; the same numbers for one seed."""

    def __init__(self, shape=ODD, dtype=torch.float32, spread=1.0, shift=0.0, frozen=(), dtypes=None, head=None):
        rows, vocab_size = shape
        generator = torch.Generator().manual_seed(0)
        self.leaves = {}

        def leaf(name, *size, bits=5, factor=1.0):
            whole = torch.randint(-(2**bits), 2**bits + 1, size, generator=generator).double()
            tensor = (whole / 32 * factor).to((dtypes or {}).get(name, dtype))
            self.leaves[name] = tensor.requires_grad_(name not in frozen)

        for model, width in (("student", 5), ("teacher", 9), ("critic", 6)):
            leaf(f"{model}.hidden", rows, width)
            leaf(f"{model}.weight", vocab_size, width, bits=6, factor=1.0 if model == "critic" else spread)
            leaf(f"{model}.bias", vocab_size)
        with torch.no_grad():
            for model in ("student", "teacher"):
                self.leaves[f"{model}.bias"].add_(shift)
        self.labels = torch.randint(vocab_size, (rows,), generator=generator)
        # Rows without weight, and rows that rise
        self.weights = torch.rand(rows, generator=generator) + 0.1
        self.weights[1::3] = 0.0
        self.weights[2::4] *= -1.0
        self.options = {"student": head or {}, "teacher": {}, "critic": {"scale": 0.75, "soft_cap": 0.75}}

    def head(self, model):
        return LMHead(self.leaves[f"{model}.weight"], self.leaves[f"{model}.bias"], **self.options[model])

    @property
    def pairs(self):
        return {model: (self.leaves[f"{model}.hidden"], self.head(model)) for model in self.options}

    def double(self):
        """The same numbers in float64."""
        self.leaves = {
            name: leaf.detach().double().requires_grad_(leaf.requires_grad) for name, leaf in self.leaves.items()
        }
        return self

    @property
    def gradients(self):
        """By name; zero where there is none."""
        return {
            name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            for name, leaf in self.leaves.items()
            if leaf.requires_grad
        }


def one(name):
    """The terms of one objective."""
    function, inputs = (OBJECTIVES | METRICS)[name]
    return lambda world: {name: Term(function, inputs, world.weights)}


def plain_loss(pairs, terms, labels=None, round_to=None):
    """All logits at once. Rows that carry no weight are left out before the function."""
    inputs = {"labels": labels}
    for name, (hidden, head) in pairs.items():
        logits = inputs[name] = hidden if head is None else head(hidden)
        if round_to is not None:  # the values of that dtype, and the gradient of the exact product
            inputs[name] = logits + (logits.detach().to(round_to).to(logits.dtype) - logits.detach())
    loss, values = 0.0, {}
    for name, term in terms.items():
        arguments = [inputs[key] for key in term.inputs]
        with torch.no_grad():
            values[name] = term.function(*arguments)
        if term.weights is not None:
            counted = term.weights != 0
            value = term.function(*(argument[counted] for argument in arguments))
            loss = loss + (value * term.weights[counted].to(value.dtype)).sum()
    return loss, values


def run(world, make_terms, chunk_size=None, make_pairs=None, is_plain=False):
    """Loss, values and gradients of the world's leaves, with a factor on the loss."""
    pairs, terms = make_pairs(world) if make_pairs else world.pairs, make_terms(world)
    if is_plain:
        loss, values = plain_loss(pairs, terms, world.labels)
    else:
        result = linear_loss(pairs, terms, world.labels, chunk_size)
        loss, values = result.loss, result.values
    if torch.is_tensor(loss) and loss.requires_grad:
        (1.75 * loss).backward()
    return torch.as_tensor(loss).detach(), values, world.gradients


def error(actual, expected, scale=1e-30):
    """Largest error relative to the largest entry: sums of another order round differently, entry by entry."""
    actual, expected = actual.double(), expected.double()
    assert actual.shape == expected.shape
    if not expected.numel():
        return 0.0
    same = actual == expected  # also where both are infinite
    difference = torch.where(same, 0.0, actual - expected).abs().max()
    return (difference / torch.where(expected.isfinite(), expected, 0.0).abs().max().clamp_min(scale)).item()


def check(make_terms, make_world=World, chunk_size=None, tolerance=1e-5, make_pairs=None, moves=True):
    """
    The engine against the plain functions. 1e-5 is the promise of the package for float32; where numbers cancel so
    that the plain function itself is less exact, the engine is at most twice as far from float64.
    """
    world, terms = make_world(), make_terms(make_world())
    loss, values, gradients = run(world, make_terms, chunk_size, make_pairs)
    expected_loss, expected_values, expected = run(make_world(), make_terms, make_pairs=make_pairs, is_plain=True)
    exact = {}

    def agree(found, plain, which, name, scale):
        if (distance := error(found, plain, scale)) > tolerance:
            if not exact:
                run_exactly = run(make_world().double(), make_terms, make_pairs=make_pairs, is_plain=True)
                exact.update(values=run_exactly[1], gradients=run_exactly[2])
            truth = exact[which][name]
            distance = error(found, truth, scale) - 2 * error(plain, truth, scale)
        assert distance <= tolerance, name

    assert list(values) == list(expected_values)
    size = 0.0
    for name, value in values.items():
        assert not value.requires_grad and value.dtype == expected_values[name].dtype
        # In nats: log-probabilities of size 1 are rounded, however small their difference
        agree(value, expected_values[name], "values", name, 0.1)
        if (weights := terms[name].weights) is not None:
            counted = weights != 0
            size += (weights[counted] * expected_values[name][counted].clamp_min(0.1)).abs().sum()
    assert abs(loss - expected_loss) <= tolerance * size
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == world.leaves[name].dtype
        agree(gradient, expected[name], "gradients", name, 1e-6)
    assert not moves or max(gradient.abs().max() for gradient in expected.values()) > 1e-3
    return world


# Every objective


@EVERY
@CHUNK_SIZES
def test_engine_objective_equals_the_plain_function(name, chunk_size):
    world = check(one(name), chunk_size=chunk_size)
    trained = "critic" if name.startswith("critic") else "student"
    for leaf, gradient in world.gradients.items():
        # Gradient where the plain function's flows, and nowhere else
        assert gradient.any() == leaf.startswith(trained)
    assert not world.gradients[f"{trained}.hidden"][1::3].any()  # no weight


@EVERY
def test_engine_objective_on_many_rows_and_words_equals_the_plain_function(name):
    # The first chunk is more than a block, and the second less. Cold distributions over as many words would be one-hot
    check(one(name), lambda: World(BLOCKS, spread=0.25 if name.endswith("at_0.1") else 1.0), 140)


@EVERY
def test_engine_objective_float64_equals_the_plain_function_to_its_rounding(name):
    world = check(one(name), lambda: World(dtype=torch.float64), 5, tolerance=1e-12)
    result = linear_loss(world.pairs, one(name)(world), world.labels)
    assert result.loss.dtype == result.values[name].dtype == torch.float64


@EVERY
def test_engine_objective_one_row_equals_the_plain_function(name):
    check(one(name), lambda: World((1, 17)))


@EVERY
@pytest.mark.parametrize("rows", [0, 13])
def test_engine_objective_without_weight_is_zero_with_zero_gradients(name, rows):
    world = World((rows, 17))
    world.weights = torch.zeros(rows)
    result = linear_loss(world.pairs, one(name)(world), world.labels, 5)
    result.loss.backward()
    assert result.loss.item() == 0.0 and result.values[name].shape == (rows,)
    for leaf in world.leaves.values():
        assert leaf.grad is None or (leaf.grad.shape == leaf.shape and not leaf.grad.any())
    # DDP waits for each of them
    trained = "critic" if name.startswith("critic") else "student"
    assert all(world.leaves[f"{trained}.{part}"].grad is not None for part in ("hidden", "weight", "bias"))


@pytest.mark.parametrize("name", OBJECTIVES | METRICS)
def test_engine_metric_has_the_values_of_the_plain_function(name):
    function, inputs = (OBJECTIVES | METRICS)[name]
    world = check(lambda world: {name: Term(function, inputs)}, chunk_size=5, moves=False)
    assert not linear_loss(world.pairs, {name: Term(function, inputs)}, world.labels).loss.requires_grad
    with torch.no_grad():
        result = linear_loss(world.pairs, one(name)(world), world.labels, 5)
    assert not result.loss.requires_grad
    assert error(result.values[name], plain_loss(world.pairs, one(name)(world), world.labels)[1][name], 0.1) <= 1e-5


@pytest.mark.parametrize("name", METRICS)
def test_engine_metric_with_weights_adds_its_value_and_no_gradient(name):
    check(lambda world: one(name)(world) | {"kl": Term(forward_kl, weights=world.weights)}, chunk_size=5)


@EVERY
def test_engine_objective_beside_metrics_has_the_same_gradient(name):
    results = []
    for metrics in ({}, OBJECTIVES | METRICS):
        world = World()
        before = {f"{key} before": Term(*metrics[key]) for key in metrics}
        after = {f"{key} after": Term(*metrics[key]) for key in metrics}
        results.append(run(world, lambda world, a=before, b=after: a | one(name)(world) | b, 5))  # noqa: B023
    (loss, values, gradients), (other_loss, other_values, other_gradients) = results
    assert loss == other_loss and torch.equal(values[name], other_values[name])
    assert all(torch.equal(gradients[leaf], other_gradients[leaf]) for leaf in gradients)


# Extreme logits


def exclude(world, *models):
    """Two tokens that a model gives no probability."""
    for model in models:
        with torch.no_grad():
            world.leaves[f"{model}.bias"][3:5] = -math.inf
    world.labels = torch.where((world.labels == 3) | (world.labels == 4), 0, world.labels)
    return world


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in UNBOUNDED])
def test_engine_objective_tokens_that_the_teacher_excludes_equals_the_plain_function(name):
    check(one(name), lambda: exclude(World(), "teacher"), 5)


@EVERY
def test_engine_objective_tokens_that_both_exclude_equals_the_plain_function(name):
    world = check(one(name), lambda: exclude(World(), "student", "teacher"), 5)
    assert all(torch.isfinite(gradient).all() for gradient in world.gradients.values())


def infinite_rows():
    """Rows without weight have an infinite reverse KL; elsewhere the student's excluded tokens underflow to zero."""
    world = exclude(World(), "teacher")
    with torch.no_grad():
        world.leaves["student.weight"][3:5, 0] = -32768.0
        world.leaves["student.hidden"][:, 0] = 1.0
        world.leaves["student.hidden"][1::3, 0] = 0.0
    return world


@pytest.mark.parametrize("name", UNBOUNDED)
@pytest.mark.parametrize("others", [(), ("total_variation", "cross_entropy", "entropy", "moment")])
@CHUNK_SIZES
def test_engine_infinite_rows_are_returned_and_leave_the_others_alone(name, others, chunk_size):
    def terms(world):
        before, after = ({f"{key} {where}": one(key)(world)[key] for key in others} for where in ("before", "after"))
        return before | one(name)(world) | after

    world = check(terms, infinite_rows, chunk_size)
    values = linear_loss(world.pairs, one(name)(world), world.labels, chunk_size).values[name]
    assert (values[1::3] == math.inf).all() and torch.isfinite(values[::3]).all()
    assert all(torch.isfinite(gradient).all() for gradient in world.gradients.values())


def test_engine_infinite_label_without_weight_leaves_gradients_finite():
    def make_world():
        world = exclude(World(), "student")
        world.labels[1::3] = 3
        return world

    world = check(one("cross_entropy"), make_world, 5)
    values = linear_loss(world.pairs, one("cross_entropy")(world), world.labels).values["cross_entropy"]
    assert values[1] == math.inf and all(torch.isfinite(gradient).all() for gradient in world.gradients.values())


@EVERY
@pytest.mark.parametrize("size", [{"spread": 4096.0}, {"shift": 1e4}, {"shift": -1e4}], ids=str)
def test_engine_objective_logits_of_ten_thousand_is_as_exact_as_the_plain_function(name, size):
    # Where logits differ by 1e4, float32 has 1e-3 between two neighbours, and probabilities have that error, in the
    # plain form as well. A common shift is exact, and lost by the softmax. The exact numbers are those of float64
    found, plain = (run(World(**size), one(name), 5, is_plain=flag) for flag in (False, True))
    exact = run(World(dtype=torch.float64, **size), one(name), is_plain=True)
    world = World(**size)
    assert world.head("student")(world.leaves["student.hidden"]).abs().max() > 9e3
    assert error(found[1][name], exact[1][name], 1e-3) <= 1e-5 + 2 * error(plain[1][name], exact[1][name], 1e-3)
    scale, least = size.get("spread", 1.0), 1e-3 if "spread" in size else 1e-5
    for leaf, gradient in found[2].items():
        assert torch.isfinite(gradient).all()
        assert error(gradient, exact[2][leaf], scale) <= least + 2 * error(plain[2][leaf], exact[2][leaf], scale), leaf


@pytest.mark.parametrize("name", [name for name, (_, inputs) in OBJECTIVES.items() if inputs == TWO])
def test_engine_equal_models_have_no_gradient(name):
    def same(world):
        student = world.pairs["student"]
        return world.pairs | {"teacher": (student[0].detach(), student[1].detach())}

    # Rounding, over a temperature of 0.1 at the most
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-13)):
        loss, values, gradients = run(World(dtype=dtype, spread=0.5), one(name), 5, same)
        assert abs(loss) < tolerance and values[name].abs().max() < tolerance
        assert max(gradient.abs().max() for gradient in gradients.values()) < tolerance


# Heads


@EVERY
@pytest.mark.parametrize(
    "head", [{"scale": 0.25}, {"soft_cap": 3.0}, {"scale": 2.0, "soft_cap": 1.5}, {"scale": -0.5}], ids=str
)
def test_engine_objective_scaled_and_capped_heads_equal_the_plain_function(name, head):
    def make_world():
        world = World(head=head)
        world.options["teacher"] = {"scale": 0.5, "soft_cap": 2.5}
        return world

    check(one(name), make_world, 5)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl_at_10.0", "cross_entropy", "moment", "critic_objective"])
def test_engine_heads_without_bias_equal_the_plain_function(name):
    def pairs(world):
        return {
            model: (hidden, LMHead(head.weight, scale=head.scale, soft_cap=head.soft_cap))
            for model, (hidden, head) in world.pairs.items()
        }

    check(one(name), chunk_size=5, make_pairs=pairs)


@pytest.mark.parametrize("name", ["forward_kl", "total_variation", "cross_entropy", "critic_objective"])
@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("weight", "bias"), ("hidden", "bias"), ()])
@pytest.mark.parametrize("chunk_size", [5, None])
def test_engine_gradient_reaches_what_requires_it_and_nothing_else(name, trained, chunk_size):
    model = "critic" if name == "critic_objective" else "student"
    frozen = [f"{model}.{part}" for part in ("hidden", "weight", "bias") if part not in trained]
    world = check(one(name), lambda: World(frozen=frozen), chunk_size, moves=bool(trained))
    for part in ("hidden", "weight", "bias"):
        assert (world.leaves[f"{model}.{part}"].grad is not None) == (part in trained)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "cross_entropy", "exact_moment"])
def test_engine_tied_weight_adds_the_gradients_of_both_ends(name):
    def pairs(world):
        head = world.head("student")
        embedded = torch.nn.functional.embedding(world.labels, head.weight)
        return world.pairs | {"student": (embedded * world.leaves["student.hidden"], head)}

    check(one(name), chunk_size=5, make_pairs=pairs)


def test_engine_heads_cut_to_a_shared_vocabulary_leave_the_rest_without_gradient():
    def make_world():
        world = World()
        world.labels = world.labels.clamp_max(13)
        return world

    def pairs(world):
        return {model: (hidden, head.cut(14)) for model, (hidden, head) in world.pairs.items()}

    world = check(one("forward_kl"), make_world, 5, make_pairs=pairs)
    assert world.leaves["student.weight"].grad.shape == (17, 5) and not world.leaves["student.weight"].grad[14:].any()
    check(one("critic_objective"), make_world, 5, make_pairs=pairs)


def test_engine_tensors_with_other_strides_equal_the_plain_function():
    def pairs(world):
        def strided(tensor):
            return tensor.T.contiguous().T

        return {
            model: (strided(hidden), LMHead(strided(head.weight), head.bias, head.scale, head.soft_cap))
            for model, (hidden, head) in world.pairs.items()
        }

    def terms(world):
        return {
            "kl": Term(forward_kl, weights=torch.stack([world.weights, world.weights], dim=1)[:, 0]),
            "mean": Term(reverse_kl, weights=torch.tensor(0.25).expand(13)),
            "critic": Term(partial(critic_objective, penalty=0.6), THREE, world.weights.flip(0)),
        }

    check(terms, chunk_size=5, make_pairs=pairs)


class Logits(World):
    """Logits in place of hidden states and heads, for some models."""

    def __init__(self, *models, shape=ODD, **options):
        super().__init__(shape, **options)
        self.models = models
        generator = torch.Generator().manual_seed(1)
        for model in models:
            whole = torch.randint(-96, 97, shape, generator=generator) / 32
            for part in ("weight", "bias"):
                del self.leaves[f"{model}.{part}"]
            hidden = self.leaves[f"{model}.hidden"]
            self.leaves[f"{model}.hidden"] = whole.to(hidden.dtype).requires_grad_(hidden.requires_grad)

    @property
    def pairs(self):
        return {
            model: (self.leaves[f"{model}.hidden"], None if model in self.models else self.head(model))
            for model in self.options
        }


@EVERY
@pytest.mark.parametrize("models", [("teacher",), ("student",), ("student", "teacher", "critic")], ids="+".join)
def test_engine_pairs_without_head_are_logits(name, models):
    check(one(name), lambda: Logits(*models), 5)


@CHUNK_SIZES
@pytest.mark.parametrize("frozen", [(), ("teacher.hidden",), ("student.hidden", "critic.hidden")], ids=str)
def test_engine_pairs_without_head_are_left_as_they_were(chunk_size, frozen):
    models = ("student", "teacher", "critic")
    world = check(all_objectives, lambda: Logits(*models, frozen=frozen), chunk_size, moves=len(frozen) < 2)
    before = Logits(*models)
    assert all(torch.equal(leaf, before.leaves[name]) for name, leaf in world.leaves.items())
    check(all_objectives, lambda: Logits(*models, dtype=torch.float64), chunk_size, 1e-12)


@pytest.mark.parametrize("name", ["forward_kl", "total_variation", "cross_entropy", "entropy"])
@pytest.mark.parametrize("is_autocast", [False, True])
def test_engine_bfloat16_logits_without_head_are_computed_in_float32(name, is_autocast):
    world, exact = Logits("student", "teacher", dtype=torch.bfloat16), Logits("student", "teacher")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        result = linear_loss(world.pairs, one(name)(world), world.labels, 5)
    result.loss.backward()
    expected = linear_loss(exact.pairs, one(name)(exact), exact.labels)
    expected.loss.backward()
    assert error(result.values[name], expected.values[name]) <= 1e-5
    gradient = world.gradients["student.hidden"]
    assert gradient.dtype == torch.bfloat16
    # Rounded once, to 8 bits
    assert error(gradient, exact.gradients["student.hidden"]) <= 2.0**-8


def test_engine_logits_of_minus_infinity_without_head_equal_the_plain_function():
    def make_world():
        world = Logits("student", "teacher")
        with torch.no_grad():
            world.leaves["teacher.hidden"][:, 3] = -math.inf
            world.leaves["teacher.hidden"][2, :10] = -math.inf
        return world

    def terms(world):
        return {name: Term(*OBJECTIVES[name], world.weights) for name in OBJECTIVES if name not in UNBOUNDED}

    check(terms, make_world, 5)

    def infinite(world):
        return {name: Term(*OBJECTIVES[name]) for name in UNBOUNDED} | {
            "nll": one("cross_entropy")(world)["cross_entropy"]
        }

    check(infinite, make_world, 5)


# Several terms


def all_objectives(world):
    functions = OBJECTIVES.items()
    # Weights that differ, so that a term that takes another's shows
    return {name: Term(*entry, world.weights.roll(i) / (1 + i % 5)) for i, (name, entry) in enumerate(functions)}


@CHUNK_SIZES
@pytest.mark.parametrize("backwards", [False, True])
def test_engine_all_objectives_at_once_equal_the_plain_functions(chunk_size, backwards):
    def terms(world):
        found = all_objectives(world) | {name: Term(*entry) for name, entry in METRICS.items()}
        return dict(reversed(found.items())) if backwards else found

    world = check(terms, chunk_size=chunk_size)
    assert world.gradients["student.weight"].any() and world.gradients["critic.weight"].any()
    check(terms, lambda: World(dtype=torch.float64), chunk_size, tolerance=1e-12)


def test_engine_all_objectives_on_many_rows_and_words_equal_the_plain_functions():
    check(all_objectives, lambda: World(BLOCKS), 64)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "generalized_jsd", "adaptive_kl", "total_variation"])
@CHUNK_SIZES
def test_engine_temperatures_of_one_pair_do_not_mix(name, chunk_size):
    def terms(world):
        function = WITH_TEMPERATURE[name]
        return {
            "cold": Term(partial(function, kd_temperature=0.5), weights=world.weights),
            "plain": Term(function, weights=world.weights.flip(0)),
            "hot": Term(partial(function, kd_temperature=4.0), weights=0.5 * world.weights),
            "nll": Term(cross_entropy, ("student", "labels"), world.weights.roll(1)),
        }

    check(terms, chunk_size=chunk_size)


@pytest.mark.parametrize("name", [name for name, (_, inputs) in OBJECTIVES.items() if inputs == TWO])
def test_engine_first_input_is_trained_whatever_its_name(name):
    def terms(world):
        return {
            "swapped": Term(OBJECTIVES[name][0], ("teacher", "student"), world.weights),
            "twice": Term(entropy, ("teacher",), world.weights.flip(0)),
        }

    world = check(terms, chunk_size=5)
    assert world.gradients["teacher.hidden"].any() and not world.gradients["student.hidden"].any()


@CHUNK_SIZES
def test_engine_three_models_compared_in_pairs_do_not_mix(chunk_size):
    def terms(world):
        return {
            f"{name} of {' and '.join(inputs)}": Term(OBJECTIVES[name][0], inputs, world.weights.roll(i + j))
            for i, name in enumerate(name for name, (_, inputs) in OBJECTIVES.items() if inputs == TWO)
            for j, inputs in enumerate([("student", "teacher"), ("student", "critic"), ("critic", "teacher")])
        }

    check(terms, chunk_size=chunk_size)


@CHUNK_SIZES
def test_engine_both_directions_at_once_train_both_models(chunk_size):
    def terms(world):
        return {
            "kl": Term(forward_kl, ("student", "teacher"), world.weights),
            "back": Term(partial(reverse_kl, kd_temperature=2.0), ("teacher", "student"), world.weights.flip(0)),
            "nll": Term(cross_entropy, ("teacher", "labels"), world.weights.roll(2)),
            "moment": Term(exact_penalised_moment, ("teacher", "student"), world.weights.roll(1)),
            "tv": Term(total_variation, ("student", "teacher"), world.weights.roll(3)),
        }

    check(terms, chunk_size=chunk_size)


@CHUNK_SIZES
@pytest.mark.parametrize("is_head_shared", [True, False])
def test_engine_projected_states_are_teacher_in_one_term_and_student_in_another(chunk_size, is_head_shared):
    """The pattern of dual-space distillation: projectors learn from labels, the student from their distribution."""

    def make_world():
        world = World()
        numbers = torch.Generator().manual_seed(7)
        for name, size in (("to_student", (9, 5)), ("to_teacher", (5, 9))):
            values = torch.randint(-4, 5, size, generator=numbers) / 8
            world.leaves[name] = values.requires_grad_()
        return world

    def pairs(world):
        (hidden, head), (teacher_hidden, teacher_head) = world.pairs["student"], world.pairs["teacher"]
        teacher = teacher_hidden.detach(), teacher_head.detach()
        return {
            "student": (hidden, head),
            "teacher": teacher,
            "teacher_in_student": (teacher[0] @ world.leaves["to_student"], head if is_head_shared else head.detach()),
            "student_in_teacher": (hidden @ world.leaves["to_teacher"], teacher[1]),
        }

    labels = {
        "teacher_nll": lambda world: Term(cross_entropy, ("teacher_in_student", "labels"), world.weights.roll(1)),
    }
    losses = labels | {
        "kd": lambda world: Term(
            partial(forward_kl, kd_temperature=2.0), ("student", "teacher_in_student"), world.weights
        ),
        "kd_in_teacher": lambda world: Term(reverse_kl, ("student_in_teacher", "teacher"), world.weights.flip(0)),
        "nll": lambda world: Term(cross_entropy, ("student", "labels"), world.weights.roll(2)),
        "agreement": lambda world: Term(top1_agreement, ("teacher_in_student", "teacher")),
    }

    def terms_of(chosen):
        return lambda world: {name: make(world) for name, make in chosen.items()}

    world = check(terms_of(losses), make_world, chunk_size, make_pairs=pairs)
    alone = make_world()
    run(alone, terms_of(labels), chunk_size, pairs)
    assert error(world.gradients["to_student"], alone.gradients["to_student"]) <= 1e-6
    assert world.gradients["student.hidden"].any() and world.gradients["to_teacher"].any()


@CHUNK_SIZES
@pytest.mark.parametrize("is_fixed", [True, False])
def test_engine_student_and_critic_play_in_one_call(chunk_size, is_fixed):
    def pairs(world):
        states, head = world.pairs["critic"]
        return world.pairs | {"critic_fixed": (states.detach(), head.detach())}

    def terms(world):
        critic = "critic_fixed" if is_fixed else "critic"
        return {
            "moment": Term(moment, ("student", "teacher", critic), world.weights),
            "objective": Term(partial(critic_objective, penalty=0.6), THREE, -world.weights.flip(0)),
            "saturation": Term(saturation, ("student", "teacher", critic)),
            "tv": Term(total_variation),
            "nll": Term(cross_entropy, ("student", "labels"), world.weights),
        }

    world = check(terms, chunk_size=chunk_size, make_pairs=pairs)
    assert world.gradients["critic.weight"].any() and world.gradients["student.weight"].any()


def test_engine_pair_that_no_term_takes_changes_nothing():
    def without(world):
        return {name: pair for name, pair in world.pairs.items() if name != "critic"}

    results = [run(World(), one("forward_kl"), 5, make_pairs) for make_pairs in (None, without)]
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][2][name], results[1][2][name]) for name in results[0][2])


@pytest.mark.parametrize("inputs", [("student", "student"), ("labels", "student"), ("student", "labels", "teacher")])
@pytest.mark.parametrize("is_metric", [True, False])
def test_engine_inputs_in_any_order_and_repeated_reach_the_function(inputs, is_metric):
    def function(*arguments):
        parts = [argument.sin().square().mean(-1) if argument.dim() > 1 else 0.01 * argument for argument in arguments]
        return sum((i + 1) * part for i, part in enumerate(parts))

    def terms(world):
        return {"f": Term(function, inputs, None if is_metric else world.weights)}

    check(terms, chunk_size=5, moves=not is_metric)


# Blocks, and fresh tensors in place of buffers as on a GPU


@pytest.fixture(params=["blocks", "fresh"])
def way(request, monkeypatch):
    if request.param == "blocks":  # of three rows, or two at the end of a chunk
        monkeypatch.setitem(linear._BLOCK_NUMEL, "cpu", 3 * 17)
    else:
        monkeypatch.setattr(linear, "_can_compile", lambda device: True)
        monkeypatch.setattr(linear, "_compiled_evaluate", lambda: linear._evaluate)


@EVERY
@pytest.mark.usefixtures("way")
def test_engine_objective_equals_the_plain_function_either_way(name):
    check(one(name), chunk_size=5)
    if name not in UNBOUNDED:
        check(one(name), lambda: exclude(World(), "teacher"), 5)
    check(one(name), infinite_rows, 5)


@pytest.mark.usefixtures("way")
def test_engine_all_objectives_at_once_equal_the_plain_functions_either_way():
    check(all_objectives, lambda: World(head={"scale": 0.5, "soft_cap": 2.0}), 5)

    def terms(world):
        return {name: Term(*entry, world.weights) for name, entry in OBJECTIVES.items()}

    world = check(terms, infinite_rows, 5)
    assert all(torch.isfinite(gradient).all() for gradient in world.gradients.values())


# Functions of the caller


def squared(student_logits, teacher_logits):
    """Its gradient reaches both."""
    return (student_logits.log_softmax(-1) - teacher_logits.softmax(-1)).square().mean(-1)


OTHERS = {
    "both_trained": Term(squared),
    "detached": Term(lambda s, t: (s.log_softmax(-1) - t.detach().log_softmax(-1)).square().mean(-1)),
    "labels": Term(lambda s, labels: s.logsumexp(-1) - s.gather(-1, labels[:, None])[:, 0], ("student", "labels")),
    "positional_partial": Term(partial(lambda scale, s, t: scale * forward_kl(s, t), 0.5)),
    "around_a_fused_one": Term(lambda s, t: reverse_kl(t, s) * 2.0 + generalized_jsd(s, t, 0.3).square()),
    "three": Term(lambda s, t, f: (s * t * f).mean(-1), THREE),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("chunk_size", [1, 5, None])
def test_engine_function_of_the_caller_equals_itself_on_all_logits(name, chunk_size):
    entry = OTHERS[name]

    def terms(world):
        return {"other": Term(entry.function, entry.inputs, world.weights)}

    check(terms, chunk_size=chunk_size)
    check(terms, lambda: World(dtype=torch.float64), chunk_size, tolerance=1e-12)
    check(terms, lambda: World(BLOCKS, head={"scale": 0.5, "soft_cap": 2.0}), chunk_size and 64)


@CHUNK_SIZES
def test_engine_functions_of_the_caller_and_fused_ones_add_up(chunk_size):
    def terms(world):
        found = {}
        for i, (name, entry) in enumerate(OTHERS.items()):
            found[name] = Term(entry.function, entry.inputs, world.weights.roll(i))
            found[f"{name} metric"] = Term(entry.function, entry.inputs)
        fused = all_objectives(world)
        names = ("forward_kl_at_10.0", "cross_entropy", "moment", "critic_objective", "total_variation")
        return found | {name: fused[name] for name in names}

    check(terms, chunk_size=chunk_size)


def test_engine_function_of_the_caller_infinite_without_weight_leaves_gradients_finite():
    world = check(
        lambda world: {"kl": Term(lambda s, t: 2.0 * reverse_kl(s, t), weights=world.weights)}, infinite_rows, 5
    )
    assert all(torch.isfinite(gradient).all() for gradient in world.gradients.values())


def test_engine_function_of_the_caller_without_derivative_without_weight_leaves_gradients_finite():
    # The distance of equal logits: its value is 0, its gradient 0 / 0
    def distance(student, teacher):
        return (student - teacher).square().sum(-1).sqrt()

    def pairs(world):
        student, teacher = world.pairs["student"][0], world.pairs["student"][1].detach()
        moved = student.detach() + (world.weights != 0).to(student.dtype).unsqueeze(1)
        return world.pairs | {"teacher": (moved, teacher)}

    world = check(lambda world: {"distance": Term(distance, weights=world.weights)}, chunk_size=5, make_pairs=pairs)
    assert all(torch.isfinite(gradient).all() for gradient in world.gradients.values())


def test_engine_partial_with_a_positional_argument_is_a_function_of_the_caller():
    def terms(world):
        fixed = world.head("teacher")(world.leaves["teacher.hidden"]).detach()
        return {"kl": Term(partial(forward_kl, fixed), ("student",))}

    check(terms, moves=False)


def test_engine_function_that_hides_a_parameter_raises():
    scale = torch.ones(3, requires_grad=True)
    world = World()
    with pytest.raises((ValueError, RuntimeError), match="gradient"):
        terms = {"kl": Term(lambda s, t: scale.sum() * forward_kl(s, t), weights=world.weights)}
        linear_loss(world.pairs, terms, world.labels).loss.backward()
    assert scale.grad is None


def test_engine_function_that_hides_a_parameter_of_frozen_models_raises():
    # The backward pass of another term would lose it silently
    scale = torch.ones(3, requires_grad=True)
    world = World(frozen=[f"student.{part}" for part in ("hidden", "weight", "bias")])
    with pytest.raises((ValueError, RuntimeError), match="gradient"):
        terms = {
            "kl": Term(lambda s: scale.sum() * entropy(s), ("student",), world.weights),
            "nll": Term(cross_entropy, ("teacher", "labels"), world.weights),
        }
        linear_loss(world.pairs, terms, world.labels).loss.backward()


def test_engine_function_that_hides_a_parameter_without_need_of_its_gradient_is_computed():
    scale = torch.tensor(2.0, requires_grad=True)
    world = World()
    with torch.no_grad():
        term = Term(lambda s, t: scale * forward_kl(s, t), weights=world.weights)
        loss = linear_loss(world.pairs, {"kl": term}).loss
    check(lambda world: {"kl": Term(lambda s, t: scale.detach() * forward_kl(s, t), weights=world.weights)})
    metric = linear_loss(world.pairs, {"kl": Term(term.function)}).values["kl"]
    expected = forward_kl(*(head(hidden) for hidden, head in list(world.pairs.values())[:2])).detach()
    assert error(metric, 2 * expected) <= 1e-5
    assert loss.item() == pytest.approx((2 * expected * world.weights).sum().item(), rel=1e-4)


# Backward


def test_engine_second_backward_raises():
    world = World()
    result = linear_loss(world.pairs, one("forward_kl")(world), world.labels)
    result.loss.backward(retain_graph=True)
    before = {name: gradient.clone() for name, gradient in world.gradients.items()}
    with pytest.raises(RuntimeError, match=r"once.*\. .*[Cc]ompute"):
        result.loss.backward()
    assert all(torch.equal(before[name], gradient) for name, gradient in world.gradients.items())


@pytest.mark.parametrize("factor", [0.0, -3.0, 1.0, 2.0**-20])
def test_engine_backward_scales_the_gradient(factor):
    results = []
    for upstream in (1.0, factor):
        world = World()
        loss = linear_loss(world.pairs, all_objectives(world), world.labels, 5).loss
        loss.backward(torch.tensor(upstream))
        results.append(world.gradients)
    for name, gradient in results[0].items():
        assert error(results[1][name], factor * gradient) <= 1e-6


def test_engine_gradients_of_several_calls_accumulate():
    # Each call hands its own tensors over; what it keeps would be changed by the next
    world, expected = World(), {}
    for index, name in enumerate(("forward_kl", "cross_entropy", "forward_kl")):
        linear_loss(world.pairs, one(name)(world), world.labels, 5).loss.backward()
        other = World()
        linear_loss(other.pairs, one(name)(other), other.labels, 5).loss.backward()
        expected = {leaf: expected.get(leaf, 0.0) + gradient for leaf, gradient in other.gradients.items()}
        for leaf, gradient in world.gradients.items():
            assert error(gradient, expected[leaf]) <= 1e-6, index


def test_engine_losses_of_several_calls_add_up_before_backward():
    world = World()
    parts = [linear_loss(world.pairs, one(name)(world), world.labels, 5) for name in ("reverse_kl", "entropy")]
    (2.0 * parts[0].loss - parts[1].loss).backward()
    expected = World()
    loss, _ = plain_loss(
        expected.pairs,
        {
            "reverse_kl": Term(reverse_kl, weights=2.0 * expected.weights),
            "entropy": Term(entropy, ("student",), -expected.weights),
        },
    )
    loss.backward()
    for name, gradient in world.gradients.items():
        assert error(gradient, expected.gradients[name]) <= 1e-5


def test_engine_gradient_of_some_leaves_is_theirs_alone():
    world, expected = World(), World()
    loss = linear_loss(world.pairs, one("forward_kl")(world), world.labels, 5).loss
    (found,) = torch.autograd.grad(loss, [world.leaves["student.weight"]])
    plain_loss(expected.pairs, one("forward_kl")(expected))[0].backward()
    assert error(found, expected.gradients["student.weight"]) <= 1e-5
    assert all(leaf.grad is None for leaf in world.leaves.values())


def test_engine_inputs_and_weights_are_left_as_they_were():
    world = World()
    world.weights.requires_grad_()
    before = copy.deepcopy([leaf.detach() for leaf in [*world.leaves.values(), world.weights, world.labels]])
    linear_loss(world.pairs, all_objectives(world), world.labels, 5).loss.backward()
    assert world.weights.grad is None
    for old, new in zip(before, [*world.leaves.values(), world.weights, world.labels], strict=True):
        assert torch.equal(old, new.detach())


class Once(torch.autograd.Function):
    """`function` with its gradient taken in the forward pass, so that gradcheck may ask for it again and again."""

    @staticmethod
    def forward(ctx, function, *tensors):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        with torch.enable_grad():
            loss = function(*leaves)
        ctx.save_for_backward(*torch.autograd.grad(loss, leaves))
        return loss.detach()

    @staticmethod
    def backward(ctx, grad_output):
        return None, *(grad_output * gradient for gradient in ctx.saved_tensors)


# The gradient is the derivative of the value: no shares or critics that answer the student
@pytest.mark.parametrize(
    "name", [name for name in OBJECTIVES if not name.startswith(("adaptive_kl", "exact_penalised"))]
)
def test_engine_objective_passes_gradcheck(name):
    world = World((3, 4), torch.float64, head={"scale": 0.5, "soft_cap": 2.0})
    model = "critic" if name.startswith("critic") else "student"

    def loss(hidden, weight, bias):
        pairs = world.pairs | {model: (hidden, LMHead(weight, bias, **world.options[model]))}
        return linear_loss(pairs, one(name)(world), world.labels, 2).loss

    leaves = [world.leaves[f"{model}.{part}"] for part in ("hidden", "weight", "bias")]
    assert torch.autograd.gradcheck(lambda *tensors: Once.apply(loss, *tensors), leaves)


class Allocations(TorchDispatchMode):
    """How many tensors of this size or more are asked for without content."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if "empty" in str(function) and output.numel() >= self.numel:
            self.count += 1
        return output


def test_engine_chunks_share_their_buffers():
    counts = []
    for rows in (10, 50):
        world = World((rows, 101))
        with Allocations(5 * 101) as allocations:
            linear_loss(world.pairs, all_objectives(world), world.labels, 5)
        counts.append(allocations.count)
    assert counts[0] == counts[1] > 0


# Precision


# Of products in bfloat16: gradients at logits are rounded to 8 bits (2^-9 of each), and so is each sum that comes out;
# terms of a sum that cancel lose up to twice as much
HALF = 2.0**-7
SOME = pytest.mark.parametrize(
    "name",
    [
        "forward_kl",
        "reverse_kl_at_10.0",
        "generalized_jsd",
        "skewed_reverse_kl",
        "adaptive_kl",
        "cross_entropy",
        "exact_moment",
        "moment",
        "critic_objective",
    ],
)


def spread_error(actual, expected):
    """Error in the L2 norm, for what is rounded entry by entry."""
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-6)).item()


def check_half(name, world, context, make_pairs=None, chunk_size=5):
    """Values of rounded logits to float32's precision; gradients to that of products in bfloat16."""
    with context:
        pairs = make_pairs(world) if make_pairs else world.pairs
        result = linear_loss(pairs, one(name)(world), world.labels, chunk_size)
    result.loss.backward()
    exact = World((len(world.labels), 17), torch.float64)
    loss, values = plain_loss(exact.pairs, one(name)(exact), exact.labels, round_to=torch.bfloat16)
    loss.backward()
    assert result.loss.dtype == result.values[name].dtype == torch.float32
    if name != "moment" and name != "critic_objective":  # their tanh is rounded to bfloat16 by the plain form
        assert error(result.values[name], values[name]) <= 1e-5
    assert error(result.values[name], values[name]) <= HALF
    for leaf, gradient in world.gradients.items():
        assert gradient.dtype == world.leaves[leaf].dtype
        assert spread_error(gradient, exact.gradients[leaf]) <= HALF, leaf


@SOME
@pytest.mark.parametrize("chunk_size", [1, 5, None])
def test_engine_bfloat16_is_rounded_in_products_alone(name, chunk_size):
    check_half(name, World(dtype=torch.bfloat16), torch.enable_grad(), chunk_size=chunk_size)


@SOME
@pytest.mark.parametrize("part", ["hidden", "weight"])
def test_engine_autocast_computes_products_in_its_dtype_and_keeps_the_parameters(name, part):
    # Hidden states come in bfloat16 from a forward under autocast
    dtypes = {} if part == "weight" else {f"{model}.hidden": torch.bfloat16 for model in ("student", "teacher")}
    check_half(name, World(dtypes=dtypes), torch.autocast("cpu", dtype=torch.bfloat16))


@pytest.mark.parametrize("name", ["forward_kl", "cross_entropy", "critic_objective"])
@pytest.mark.parametrize("parts", [("weight", "bias"), ("hidden",)], ids="+".join)
def test_engine_float16_keeps_gradients_that_the_format_has_no_numbers_for(name, parts):
    # One over a million tokens; float16 ends at 6e-8. Products round to 11 bits
    world = World()
    world.weights *= 2.0**-20
    with torch.autocast("cpu", dtype=torch.float16):
        loss = linear_loss(world.pairs, one(name)(world), world.labels, 5).loss
    loss.backward()
    exact = World(dtype=torch.float64)
    exact.weights *= 2.0**-20
    plain_loss(exact.pairs, one(name)(exact), exact.labels, round_to=torch.float16)[0].backward()
    for leaf, gradient in world.gradients.items():
        if leaf.endswith(parts):
            expected = exact.gradients[leaf]
            assert gradient.dtype == torch.float32
            assert (gradient - expected).norm() <= 2.0**-9 * expected.norm(), leaf


def test_engine_autocast_around_backward_changes_nothing():
    results = []
    for is_around in (True, False):
        world = World()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = linear_loss(world.pairs, all_objectives(world), world.labels, 5).loss
            if is_around:
                loss.backward()
        if not is_around:
            loss.backward()
        results.append(world.gradients)
    assert all(torch.equal(gradient, results[1][name]) for name, gradient in results[0].items())


@pytest.mark.parametrize("name", ["forward_kl", "cross_entropy"])
def test_engine_hidden_states_take_the_dtype_of_the_head(name):
    # Without autocast: float32 heads on bfloat16 states compute in float32
    dtypes = {f"{model}.hidden": torch.bfloat16 for model in ("student", "teacher")}
    world = World(dtypes=dtypes)
    loss, values, gradients = run(world, one(name), 5)
    exact = run(World(), one(name), is_plain=True)
    assert error(values[name], exact[1][name]) <= 1e-5
    for leaf, gradient in gradients.items():
        assert gradient.dtype == world.leaves[leaf].dtype
        assert spread_error(gradient, exact[2][leaf]) <= (2.0**-8 if leaf.endswith("hidden") else 1e-5)


def test_engine_bfloat16_gradient_of_a_weight_is_summed_in_float32():
    # One row again and again: a sum in 8 bits stands still at 256 times the row
    rows = 1000
    single = World((1, 17), torch.bfloat16)
    single.weights = torch.ones(1)
    many = World((1, 17), torch.bfloat16)
    many.weights, many.labels = torch.ones(rows), many.labels.expand(rows)
    pairs = {model: (hidden.expand(rows, -1), head) for model, (hidden, head) in many.pairs.items()}
    linear_loss(pairs, one("cross_entropy")(many), many.labels, 1).loss.backward()
    linear_loss(single.pairs, one("cross_entropy")(single), single.labels).loss.backward()
    for part in ("weight", "bias"):
        found, expected = (world.leaves[f"student.{part}"].grad for world in (many, single))
        assert spread_error(found, rows * expected.double()) <= HALF


def test_engine_student_in_float32_against_a_teacher_in_bfloat16():
    def make_world():
        return World(dtypes={f"teacher.{part}": torch.bfloat16 for part in ("hidden", "weight", "bias")})

    world = make_world()
    loss, values, gradients = run(world, one("forward_kl"), 5)
    expected = run(make_world(), one("forward_kl"), is_plain=True)
    assert error(values["forward_kl"], expected[1]["forward_kl"]) <= 1e-5
    for leaf in ("student.hidden", "student.weight", "student.bias"):
        assert error(gradients[leaf], expected[2][leaf]) <= 1e-5


# Errors


@pytest.mark.parametrize("name", [name for name in OBJECTIVES | METRICS if name not in ("cross_entropy", "entropy")])
@pytest.mark.parametrize("is_metric", [True, False])
def test_engine_vocabularies_that_differ_raise_as_in_the_plain_function(name, is_metric):
    world = World()
    function, inputs = (OBJECTIVES | METRICS)[name]
    last = inputs[-1]
    pairs = world.pairs | {last: (world.pairs[last][0], world.pairs[last][1].cut(16))}
    expected = rf"`{'critic_values' if last == 'critic' else 'teacher_logits'}` has shape \(\d+, 16\)"
    if last == "teacher":
        expected = rf"`student_logits` has shape \(\d+, 17\) but {expected}"
    with pytest.raises(ValueError, match=expected):
        linear_loss(pairs, {name: Term(function, inputs, None if is_metric else world.weights)}, world.labels)


@pytest.mark.parametrize("function", WITH_TEMPERATURE.values(), ids=WITH_TEMPERATURE)
@pytest.mark.parametrize("kd_temperature", [0.0, -1.0, math.inf])
def test_engine_temperature_that_no_softmax_has_raises(function, kd_temperature):
    world = World()
    with pytest.raises(ValueError, match=f"`kd_temperature` is {kd_temperature}, but logits are divided by it"):
        term = Term(partial(function, kd_temperature=kd_temperature), weights=world.weights)
        linear_loss(world.pairs, {"loss": term})


@pytest.mark.parametrize(
    ("function", "option", "expected"),
    [
        (generalized_jsd, {"beta": 1.5}, "`beta` is 1.5, but it is the teacher's share in a mixture"),
        (skewed_forward_kl, {"skew": 1.0}, "`skew` is 1.0, but it is the share of a distribution"),
        (skewed_reverse_kl, {"skew": -0.1}, "`skew` is -0.1, but it is the share of a distribution"),
        (adaptive_kl, {"head": 1.1}, "`head` is 1.1, but it is a mass of the teacher's distribution"),
    ],
)
def test_engine_options_out_of_range_raise(function, option, expected):
    world = World()
    with pytest.raises(ValueError, match=expected):
        linear_loss(world.pairs, {"loss": Term(partial(function, **option), weights=world.weights)})

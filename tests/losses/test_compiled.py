"""The form of the engine that a GPU runs: compiled, without buffers, and careful with infinities throughout.

Here the compiler traces it and runs the graph operation by operation (`aot_eager`), since tests have no GPU;
`examples/benchmarks/gpu_check.py` compares on one.
"""

import functools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

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
    log_sum_exp,
    moment,
    reverse_kl,
    saturation,
    set_forward_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    tail_nll,
    top1_agreement,
    total_variation,
)
from trl_kd.modules import LMHead


GAME = ("student", "teacher", "critic")
TERMS = {
    "forward_kl": Term(forward_kl),
    "reverse_kl": Term(reverse_kl),
    "jsd": Term(partial(generalized_jsd, beta=0.3, kd_temperature=2.0)),
    "skewed_forward_kl": Term(skewed_forward_kl),
    "skewed_reverse_kl": Term(skewed_reverse_kl),
    "adaptive_kl": Term(adaptive_kl),
    "total_variation": Term(total_variation),
    "nll": Term(cross_entropy, ("student", "labels")),
    "entropy": Term(entropy, ("student",)),
    "exact_moment": Term(exact_moment),
    "exact_penalised_moment": Term(exact_penalised_moment),
    "moment": Term(moment, GAME),
    "objective": Term(partial(critic_objective, penalty=0.5), GAME),
    "saturation": Term(saturation, GAME),
    "top1": Term(top1_agreement),
    "set_forward_kl": Term(set_forward_kl, ("student", "ids", "top")),
    "tail_nll": Term(tail_nll, ("student", "ids", "top")),
    "log_sum_exp": Term(log_sum_exp, ("student",)),
}
METRICS = ("saturation", "top1")


@pytest.fixture
def compiled(monkeypatch):
    """`linear_loss` as on a GPU; counts the graphs that were compiled."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(linear, "_can_compile", lambda device: True)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    monkeypatch.setattr(linear, "_compiled_evaluate", functools.cache(linear._compiled_evaluate.__wrapped__))
    yield graphs
    torch._dynamo.reset()


def run(rows, names, chunk_size=None, excluded=False, zero_weights=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    leaves = [normal(rows, 8), normal(101, 8), normal(rows, 5), normal(101, 5)]
    student, head, critic, critic_head = (leaf.requires_grad_() for leaf in leaves)
    bias = torch.zeros(101, dtype=dtype)
    if excluded:
        bias[::7] = -math.inf
    pairs = {
        "student": (student, LMHead(head)),
        "teacher": (normal(rows, 6), LMHead(normal(101, 6), bias)),
        "critic": (critic, LMHead(critic_head, scale=0.5, soft_cap=0.5)),
    }
    labels = torch.randint(101, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator)
    if zero_weights:
        weights[::2] = 0.0
    terms = {n: TERMS[n] if n in METRICS else replace(TERMS[n], weights=weights) for n in names}
    ids = torch.rand(rows, 101, generator=generator).argsort(dim=1)[:, :4]
    top = torch.randn(rows, 4, generator=generator).log_softmax(dim=1) - 0.1
    top[::3, 2:] = -math.inf
    result = linear_loss(pairs, terms, {"labels": labels, "ids": ids, "top": top}, chunk_size)
    result.loss.backward()
    gradients = [leaf.grad for leaf in (student, head, critic, critic_head) if leaf.grad is not None]
    return [result.loss.detach(), *result.values.values(), *gradients]


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        (["forward_kl"], torch.float32),
        (["reverse_kl", "jsd"], torch.float32),
        (["exact_moment", "total_variation", "entropy", "top1"], torch.float32),
        (["moment", "objective", "saturation"], torch.bfloat16),
        (list(TERMS), torch.float32),
    ],
)
def test_compiled_engine_gives_the_numbers_of_the_eager_one(names, dtype, compiled, monkeypatch):
    numbers = run(13, names, chunk_size=5, dtype=dtype)
    assert compiled  # or this compares nothing
    monkeypatch.undo()
    # The same operations in the same order
    for actual, expected in zip(numbers, run(13, names, chunk_size=5, dtype=dtype), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def test_compiled_engine_goes_on_compiling_beyond_the_usual_number_of_graphs(compiled):
    for name in TERMS:
        run(13, [name] if name not in METRICS else [name, "forward_kl"], chunk_size=13)
    # One for each, where the compiler would stop at 8 (and raise here, since it may not break a graph)
    assert len(compiled) >= len(TERMS)


def test_compiled_engine_row_of_infinite_value_without_weight_leaves_gradients_finite(compiled, monkeypatch):
    numbers = run(12, ["reverse_kl", "nll"], excluded=True, zero_weights=True)
    value = numbers[1]
    assert compiled and value.isinf().all()
    finite = run(12, ["forward_kl", "jsd", "nll", "exact_moment"], excluded=True, zero_weights=True)
    assert all(number.isfinite().all() for number in finite)
    monkeypatch.undo()
    expected = run(12, ["forward_kl", "jsd", "nll", "exact_moment"], excluded=True, zero_weights=True)
    for actual, number in zip(finite, expected, strict=True):
        torch.testing.assert_close(actual, number, rtol=1e-6, atol=1e-7)


def test_compiled_engine_other_numbers_of_rows_do_not_compile_again_and_again(compiled):
    for rows in range(5, 15):  # with chunks of 4 rows and what is left of them
        run(rows, ["jsd", "entropy", "moment"], chunk_size=4)
    assert len(compiled) <= 2  # a single row is a case of its own


def test_compiled_engine_is_not_asked_for_a_function_without_a_fused_form(compiled):
    hidden = torch.ones(3, 2, requires_grad=True)
    term = Term(lambda logits: logits.sum(dim=1), ("student",), torch.ones(3))
    linear_loss({"student": (hidden, LMHead(torch.eye(2)))}, {"sum": term}).loss.backward()
    assert not compiled and hidden.grad.tolist() == [[1.0, 1.0]] * 3


def test_compiled_engine_is_for_gpus_with_triton():
    assert not linear._can_compile(torch.device("cpu"))
    assert linear._can_compile(torch.device("cuda")) == (linear.importlib.util.find_spec("triton") is not None)

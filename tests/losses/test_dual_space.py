import math
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from tests.losses.checks import SHAPES, check_against_loops
from tests.references import divergences as token_loops
from tests.references import dual_space as loops
from trl_kd.losses import (
    Term,
    adaptive_kl,
    cross_entropy,
    forward_kl,
    generalized_jsd,
    linear_loss,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    top1_accuracy,
    total_variation,
)
from trl_kd.losses.dual_space import (
    student_space,
    student_space_terms,
    teacher_space,
    teacher_space_terms,
    universal_logit_distance,
)
from trl_kd.losses.linear import top1
from trl_kd.modules import LMHead
from trl_kd.modules.cross_model_attention import CrossModelAttention, token_scale


DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": generalized_jsd,
    "skewed_forward_kl": partial(skewed_forward_kl, skew=0.1),
    "skewed_reverse_kl": partial(skewed_reverse_kl, skew=0.1),
    "adaptive_kl": partial(adaptive_kl, head=0.5),
    "total_variation": total_variation,
}
EVERY_DIVERGENCE = pytest.mark.parametrize("divergence", DIVERGENCES)
TERMS = ["student_ce", "projector_ce", "student_space_kd", "projector_agreement", "student_agreement"]
CHUNK_SIZES = pytest.mark.parametrize("chunk_size", [1, 3, None])


def normal(*shape, seed, dtype=torch.float64):
    return 2.0 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def integers(high, *shape, seed):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def log(*rows, dtype=torch.float64):
    return torch.tensor(rows, dtype=dtype).log()


def error(actual, expected):
    """Largest error, relative to the largest entry; absolute where all entries are below 1e-2."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-2)).item() if actual.numel() else 0.0


# By hand


def test_student_space_literal_inputs_have_the_values_by_hand():
    values = student_space(
        log([0.25, 0.75]), log([0.5, 0.5]), torch.tensor([0]), torch.tensor([1]), kd_temperature=1.0
    )
    assert list(values) == TERMS and all(value.shape == (1,) for value in values.values())
    assert values["student_ce"].item() == pytest.approx(math.log(4), abs=1e-14)
    assert values["projector_ce"].item() == pytest.approx(math.log(2), abs=1e-14)
    assert values["student_space_kd"].item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-14)
    # One of two equally likely tokens counts
    assert values["projector_agreement"].item() == 1.0 and values["student_agreement"].item() == 1.0


def test_student_space_agreements_are_with_the_labels_of_the_projector():
    student, projected = log([0.2, 0.8], [0.8, 0.2], [0.8, 0.2]), log([0.7, 0.3], [0.7, 0.3], [0.3, 0.7])
    values = student_space(student, projected, torch.tensor([1, 1, 1]), torch.tensor([0, 0, 0]))
    assert values["student_agreement"].tolist() == [0.0, 1.0, 1.0]
    assert values["projector_agreement"].tolist() == [1.0, 1.0, 0.0]


def test_student_space_temperature_is_two_by_default_and_leaves_the_cross_entropies():
    # At temperature 2, odds of 9 become odds of 3
    student, projected = torch.tensor([[0.0, math.log(9)]]), torch.tensor([[0.0, 0.0]])
    values = student_space(student, projected, torch.tensor([0]), torch.tensor([0]))
    assert values["student_space_kd"].item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-6)
    assert values["student_ce"].item() == pytest.approx(math.log(10), abs=1e-6)
    values = student_space(projected, student, torch.tensor([0]), torch.tensor([1]))
    assert values["projector_ce"].item() == pytest.approx(math.log(10 / 9), abs=1e-6)


def test_student_space_temperature_of_the_teacher_divides_its_logits_once_more_in_the_divergence_alone():
    # 81 = 9^2: at temperature 2 and 2 once more, odds of 3, as the student's at 2
    student, projected = torch.tensor([[0.0, math.log(9)]]).double(), torch.tensor([[0.0, math.log(81)]]).double()
    values = student_space(student, projected, torch.tensor([0]), torch.tensor([0]), teacher_temperature=2.0)
    assert values["student_space_kd"].item() == pytest.approx(0.0, abs=1e-7)  # the logarithms are rounded
    assert values["projector_ce"].item() == pytest.approx(math.log(82), abs=1e-6)
    assert values["student_ce"].item() == pytest.approx(math.log(10), abs=1e-6)


def test_teacher_space_literal_inputs_have_the_values_by_hand():
    projected, teacher = log([0.25, 0.75]), log([0.5, 0.5])
    values = teacher_space(projected, teacher, kd_temperature=1.0)
    assert list(values) == ["teacher_space_kd"] and values["teacher_space_kd"].shape == (1,)
    assert values["teacher_space_kd"].item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-14)
    values = teacher_space(projected, teacher, divergence=reverse_kl, kd_temperature=1.0)
    assert values["teacher_space_kd"].item() == pytest.approx(0.25 * math.log(1 / 2) + 0.75 * math.log(1.5), abs=1e-14)
    # Odds of 9 at the default temperature of 2
    values = teacher_space(torch.tensor([[0.0, math.log(9)]]), torch.zeros(1, 2))
    assert values["teacher_space_kd"].item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-6)


def test_universal_logit_distance_literal_inputs_have_the_values_by_hand():
    student, teacher = log([0.5, 0.5], [0.1, 0.9]), log([0.2, 0.1, 0.7], [0.05, 0.9, 0.05])
    # |0.7 - 0.5| + |0.2 - 0.5| + 0.1, and 0 + |0.05 - 0.1| + 0.05
    expected = torch.tensor([0.6, 0.1], dtype=torch.float64)
    torch.testing.assert_close(universal_logit_distance(student, teacher), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(universal_logit_distance(teacher, student), expected, rtol=0, atol=1e-14)


# Each term against loops


def by_rows(function):
    """For inputs `(B, K, V)` and `(B, K)`."""

    def on_rows(logits, *others):
        return function(logits.flatten(0, 1), *(other.flatten(0, 1) for other in others)).view(logits.shape[:2])

    return on_rows


def in_student_space(name, **options):
    """One term as a function of the logits that it trains, then of the others."""

    @by_rows
    def trained_first(logits, *others):
        if name == "projector_ce":
            return student_space(torch.zeros_like(logits), logits, others[0] * 0, others[0], **options)[name]
        if name == "student_ce":
            return student_space(logits, torch.zeros_like(logits), others[0], others[0] * 0, **options)[name]
        labels = torch.zeros(len(logits), dtype=torch.long)
        return student_space(logits, others[0], labels, labels, **options)[name]

    return trained_first


def reference_of(divergence, kd_temperature, teacher_temperature=1.0):
    """Value and gradient of one token."""
    name, options = {
        "jsd": ("generalized_jsd", (0.5,)),
        "skewed_forward_kl": ("skewed_forward_kl", (0.1,)),
        "skewed_reverse_kl": ("skewed_reverse_kl", (0.1,)),
        "adaptive_kl": ("adaptive_kl", (0.5,)),
    }.get(divergence, (divergence, ()))

    def value_and_gradient(student_logits, teacher_logits):
        teacher_logits = [logit / teacher_temperature for logit in teacher_logits]
        return token_loops.at_temperature(
            getattr(token_loops, name), student_logits, teacher_logits, kd_temperature, *options
        )

    return value_and_gradient


@SHAPES
@EVERY_DIVERGENCE
@pytest.mark.parametrize("temperatures", [(2.0, 1.0), (1.0, 1.0), (0.7, 1.5)])
def test_student_space_kd_equals_the_loop(shape, divergence, temperatures):
    options = {"kd_temperature": temperatures[0], "teacher_temperature": temperatures[1]}
    function = in_student_space("student_space_kd", divergence=DIVERGENCES[divergence], **options)
    check_against_loops(
        function, reference_of(divergence, *temperatures), normal(*shape, seed=0), normal(*shape, seed=1)
    )


@SHAPES
@EVERY_DIVERGENCE
@pytest.mark.parametrize("kd_temperature", [2.0, 0.7])
def test_teacher_space_kd_equals_the_loop(shape, divergence, kd_temperature):
    @by_rows
    def function(projected, teacher):
        options = {"divergence": DIVERGENCES[divergence], "kd_temperature": kd_temperature}
        return teacher_space(projected, teacher, **options)["teacher_space_kd"]

    check_against_loops(
        function, reference_of(divergence, kd_temperature), normal(*shape, seed=0), normal(*shape, seed=1)
    )


@SHAPES
@pytest.mark.parametrize("name", ["student_ce", "projector_ce"])
def test_student_space_cross_entropies_equal_the_loop_at_temperature_one(shape, name):
    function = in_student_space(name, kd_temperature=3.0, teacher_temperature=1.5)
    labels = integers(shape[2], *shape[:2], seed=1)
    check_against_loops(function, token_loops.cross_entropy, normal(*shape, seed=0), labels)


@SHAPES
def test_student_space_agreements_equal_the_loop(shape):
    shape = (shape[0] * shape[1], shape[2])
    student, projected = normal(*shape, seed=0).round(), normal(*shape, seed=1).round()  # some are equally likely
    labels, projector_labels = integers(shape[1], shape[0], seed=2), projected.argmin(dim=1)
    projector_labels[::2] = projected.argmax(dim=1)[::2]
    values, chosen = student_space(student, projected, labels, projector_labels), projector_labels.tolist()
    for name, logits in (("student_agreement", student), ("projector_agreement", projected)):
        expected = [float(row[label] == max(row)) for row, label in zip(logits.tolist(), chosen, strict=True)]
        assert values[name].tolist() == expected
    assert 0.0 < values["projector_agreement"].mean() < 1.0


@pytest.mark.parametrize("vocabularies", [(6, 6), (5, 8), (7, 4)])
def test_universal_logit_distance_equals_the_loop(vocabularies):
    student, teacher = (normal(3, size, seed=seed) for seed, size in enumerate(vocabularies))
    student.requires_grad_()
    values = universal_logit_distance(student, teacher)
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weights * values).sum(), student)
    expected = torch.stack([loops.sorted_distance(*row) for row in zip(student, teacher, strict=True)])
    (expected_gradient,) = torch.autograd.grad((weights * expected).sum(), student)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-13)
    assert gradient.abs().max() > 1e-2


# The authors' criteria, made of these functions

# First and last trained position of each row of the student and of the teacher, and the padded lengths
LAYOUTS = {
    "even": ([(1, 5), (2, 6)], [(0, 6), (3, 8)], 6, 8),
    "odd": ([(0, 3), (2, 5), (1, 2)], [(1, 2), (0, 5), (3, 7)], 5, 7),
}
CRITERIA = {
    "v1": (loops.same_vocabulary_v1, {}),
    "v2": (loops.same_vocabulary_v2, {}),
    "v2 ungated": (loops.same_vocabulary_v2, {"gate_up_to": -1.0}),
    "cma": (loops.attention_v1, {"norm_scope": "padded"}),
    "cma valid": (loops.attention_v1, {"norm_scope": "valid", "teacher_temperature": 1.5}),
    "cma gated": (loops.attention_v1, {"gate_normalization": "gated", "teacher_denominator": "teacher"}),
    "eta": (loops.aligned_v2, {}),
    "eta kept": (loops.aligned_v2, {"keep_unmapped": True}),
    "eta ungated": (loops.aligned_v2, {"gate_up_to": -1.0}),
}


class Batch:
    """Padded rows of two models and the projectors between them, all with gradient; the same numbers in each dtype."""

    def __init__(self, criterion, layout, dtype=torch.float64):
        self.kind, self.dtype = criterion.split()[0], dtype
        student_spans, teacher_spans, num_student, num_teacher = LAYOUTS[layout]
        is_same = self.kind in ("v1", "v2")
        if is_same:
            teacher_spans, num_teacher = student_spans, num_student
        generator = torch.Generator().manual_seed(10)  # some tokens agree and some do not, for each criterion
        self.leaves = {}

        def leaf(name, *size, factor=1.0, plus=0.0):
            numbers = (factor * torch.randn(size, generator=generator) + plus).to(dtype)
            self.leaves[name] = numbers.requires_grad_()

        width, teacher_width, vocab_size, teacher_vocab_size = 4, 6, 5, 5 if is_same else 7
        rows = len(student_spans)
        leaf("student.hidden", rows, num_student, width)
        leaf("student.weight", vocab_size, width)
        leaf("teacher.hidden", rows, num_teacher, teacher_width)
        leaf("teacher.weight", teacher_vocab_size, teacher_width)
        leaf("student.embeddings", vocab_size, width)
        leaf("teacher.embeddings", teacher_vocab_size, teacher_width, plus=0.5)
        leaf("to_student.weight", width, teacher_width, factor=0.5)
        leaf("to_teacher.weight", teacher_width, width, factor=0.5)
        if self.kind == "cma":
            leaf("query.weight", 2 * teacher_width, 2 * width, factor=0.5)
            leaf("query.bias", 2 * teacher_width, factor=0.5)
        if self.kind in ("v1", "cma"):
            leaf("to_student.bias", width, factor=0.5)
            leaf("to_teacher.bias", teacher_width, factor=0.5)

        def tokens(spans, length, size):
            ids = torch.randint(size, (rows, length + 1), generator=generator)
            labels = ids[:, 1:].clone()
            for row, (first, last) in enumerate(spans):
                labels[row, :first], labels[row, last:] = -100, -100
            return ids[:, :-1], labels

        self.ids, self.labels = tokens(student_spans, num_student, vocab_size)
        self.teacher_ids, self.teacher_labels = tokens(teacher_spans, num_teacher, teacher_vocab_size)
        if is_same:
            self.teacher_ids, self.teacher_labels = self.ids, self.labels
        self.pairs = [
            (row, first + k, teacher_first + k)
            for row, (first, last) in enumerate(student_spans)
            for teacher_first, teacher_last in [teacher_spans[row]]
            for k in range(min(last - first, teacher_last - teacher_first))
            if (row + k) % 4 != 1
        ]
        self.vocabulary = [3, -1, 0, 2, -1, 1, 4]

    def projector(self, name):
        return self.leaves[f"{name}.weight"], self.leaves.get(f"{name}.bias")

    def side(self, name):
        ids, labels = (self.ids, self.labels) if name == "student" else (self.teacher_ids, self.teacher_labels)
        hidden, weight, embeddings = (self.leaves[f"{name}.{part}"] for part in ("hidden", "weight", "embeddings"))
        return loops.Side(hidden, weight, labels, ids, embeddings)

    def loop(self, criterion, **options):
        """The criterion as the authors have it."""
        function, settings = CRITERIA[criterion]
        arguments = [self.side("student"), self.side("teacher")]
        arguments += [self.projector("query")] if self.kind == "cma" else []
        arguments += [self.projector("to_student"), self.projector("to_teacher")]
        arguments += [self.pairs, self.vocabulary] if self.kind == "eta" else []
        return function(*arguments, **(settings | options))

    @property
    def gradients(self):
        return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in self.leaves.items()}


@dataclass
class Spaces:
    """What a trainer would hand over: rows of both spaces and their weights."""

    student: torch.Tensor
    projected_teacher: torch.Tensor
    labels: torch.Tensor
    projector_labels: torch.Tensor
    is_paired: torch.Tensor
    projected_student: torch.Tensor
    teacher: torch.Tensor


def same_vocabulary_spaces(batch):
    counted = batch.labels != -100
    student, teacher = batch.leaves["student.hidden"][counted], batch.leaves["teacher.hidden"][counted].detach()
    labels = batch.labels[counted]
    is_gold = batch.kind == "v1"
    return Spaces(
        student,
        F.linear(teacher, *batch.projector("to_student")),
        labels,
        labels if is_gold else top1(teacher, LMHead(batch.leaves["teacher.weight"]), chunk_size=2),
        torch.ones(len(labels), dtype=torch.bool),
        F.linear(student, *batch.projector("to_teacher")),
        teacher,
    )


def attention_spaces(batch, norm_scope):
    counted, teacher_counted = batch.labels != -100, batch.teacher_labels != -100
    student, teacher = batch.leaves["student.hidden"][counted], batch.leaves["teacher.hidden"].detach()

    def embedded(ids, labels, embeddings):
        is_trained = labels != -100
        return embeddings.detach()[ids * is_trained], embeddings.detach()[labels * is_trained]

    queries = torch.cat(embedded(batch.ids, batch.labels, batch.leaves["student.embeddings"]), dim=-1)
    inputs, outputs = embedded(batch.teacher_ids, batch.teacher_labels, batch.leaves["teacher.embeddings"])

    def normalised(values):
        return values / token_scale(values if norm_scope == "padded" else values[teacher_counted])

    keys, states = normalised(torch.cat([inputs, outputs], dim=-1)), normalised(teacher) + normalised(outputs)
    attention = CrossModelAttention(student.shape[1], teacher.shape[-1])
    weight, bias = batch.projector("query")
    at_student, at_teacher = functional_call(
        attention,
        {"query.weight": weight, "query.bias": bias},
        (
            queries[counted],
            keys[teacher_counted],
            F.linear(states[teacher_counted], *batch.projector("to_student")),
            F.linear(student, *batch.projector("to_teacher")),
            counted.nonzero()[:, 0],
            teacher_counted.nonzero()[:, 0],
        ),
    )
    labels, everything = batch.labels[counted], torch.ones(int(counted.sum()), dtype=torch.bool)
    return Spaces(student, at_student, labels, labels, everything, at_teacher, teacher[teacher_counted])


def aligned_spaces(batch, keep_unmapped):
    counted = batch.labels != -100
    student, labels = batch.leaves["student.hidden"][counted], batch.labels[counted]
    place = {position: k for k, position in enumerate(map(tuple, counted.nonzero().tolist()))}
    rows = torch.tensor([place[row, i] for row, i, _ in batch.pairs])
    teacher = torch.stack([batch.leaves["teacher.hidden"][row, j].detach() for row, _, j in batch.pairs])
    found = torch.tensor(batch.vocabulary)[top1(teacher, LMHead(batch.leaves["teacher.weight"]), chunk_size=2)]
    is_mapped = found >= 0
    at_student = student.new_zeros(len(student), student.shape[1])
    at_student = at_student.index_copy(0, rows, F.linear(teacher, *batch.projector("to_student")))
    projector_labels = torch.zeros_like(labels).index_copy(0, rows, found.clamp_min(0))
    is_paired = torch.zeros(len(labels), dtype=torch.bool).index_copy(0, rows, is_mapped)
    kept = torch.ones_like(is_mapped) if keep_unmapped else is_mapped
    at_teacher = F.linear(student[rows], *batch.projector("to_teacher"))[kept]
    return Spaces(student, at_student, labels, projector_labels, is_paired, at_teacher, teacher[kept])


def assemble(batch, criterion, divergence, route, kd_rate=0.5, kd_temperature=2.0):
    """The criterion from the functions of the package: terms, total."""
    settings = CRITERIA[criterion][1]
    make = {
        "cma": partial(attention_spaces, norm_scope=settings.get("norm_scope", "padded")),
        "eta": partial(aligned_spaces, keep_unmapped=settings.get("keep_unmapped", False)),
    }.get(batch.kind, same_vocabulary_spaces)
    spaces = make(batch)
    head, teacher_head = LMHead(batch.leaves["student.weight"]), LMHead(batch.leaves["teacher.weight"]).detach()
    number, paired = len(spaces.labels), spaces.is_paired.to(batch.dtype)
    is_gated = batch.kind != "v1" and settings.get("gate_up_to", 1.0) > 0
    agrees = (top1(spaces.projected_teacher, head, chunk_size=3) == spaces.projector_labels) & spaces.is_paired
    gate = agrees.to(batch.dtype) if is_gated else paired
    by_tokens = batch.kind == "cma" and settings.get("gate_normalization") is None
    num_teacher = number if batch.kind == "cma" and by_tokens else len(spaces.teacher)
    weights = {
        "student_ce": torch.full((number,), (1 - kd_rate) / number, dtype=batch.dtype),
        "projector_ce": kd_rate * paired / paired.sum(),
        "student_space_kd": kd_rate * gate / (number if by_tokens else gate.sum()),
        "teacher_space_kd": torch.full((len(spaces.teacher),), kd_rate / num_teacher, dtype=batch.dtype),
    }
    options = {"divergence": DIVERGENCES[divergence], "kd_temperature": kd_temperature}
    teacher_options = options if batch.kind in ("v2", "eta") else {"kd_temperature": kd_temperature}
    pairs = {
        "student": (spaces.student, head),
        "projected_teacher": (spaces.projected_teacher, head.detach()),
        "projected_student": (spaces.projected_student, teacher_head),
        "teacher": (spaces.teacher, teacher_head),
    }
    teacher_temperature = settings.get("teacher_temperature", 1.0)
    values, total = (plain_values if route == "plain" else engine_values)(
        pairs, spaces, weights, options, teacher_options, teacher_temperature, route
    )
    rates = {"student_ce": 1 - kd_rate}
    terms = {name: (weights[name] * values[name]).sum() / rates.get(name, kd_rate) for name in weights}
    assert torch.equal(values["projector_agreement"].bool() & spaces.is_paired, agrees)
    return terms | {"total": total}, agrees


def plain_values(pairs, spaces, weights, options, teacher_options, teacher_temperature, route):
    logits = {name: head(hidden) for name, (hidden, head) in pairs.items()}
    values = student_space(
        logits["student"],
        logits["projected_teacher"],
        spaces.labels,
        spaces.projector_labels,
        teacher_temperature=teacher_temperature,
        **options,
    )
    values |= teacher_space(logits["projected_student"], logits["teacher"], **teacher_options)
    return values, sum((weights[name] * values[name]).sum() for name in weights)


def tempered(head, temperature):
    """A head whose logits are divided once more."""
    soft_cap = None if head.soft_cap is None else head.soft_cap / temperature
    return replace(head, scale=head.scale / temperature, soft_cap=soft_cap)


def engine_values(pairs, spaces, weights, options, teacher_options, teacher_temperature, route):
    chunk_size = None if route == "terms" else int(route.split()[1])
    is_tempered = teacher_temperature != 1.0
    student_pairs = {name: pairs[name] for name in ("student", "projected_teacher")}
    if is_tempered:
        states, head = pairs["projected_teacher"]
        student_pairs["tempered_teacher"] = (states.detach(), tempered(head, teacher_temperature))
    terms = student_space_terms(
        is_tempered=is_tempered,
        ce_weights=weights["student_ce"],
        projector_weights=weights["projector_ce"],
        kd_weights=weights["student_space_kd"],
        **options,
    )
    labels = {"labels": spaces.labels, "projector_labels": spaces.projector_labels}
    result = linear_loss(student_pairs, terms, labels, chunk_size)
    teacher_pairs = {name: pairs[name] for name in ("projected_student", "teacher")}
    terms = teacher_space_terms(kd_weights=weights["teacher_space_kd"], **teacher_options)
    other = linear_loss(teacher_pairs, terms, chunk_size=chunk_size)
    return result.values | other.values, result.loss + other.loss


def check_criterion(criterion, layout, divergence, route, dtype, **options):
    exact = Batch(criterion, layout)
    expected = exact.loop(criterion, divergence=divergence, **options)
    expected["total"].backward()
    batch = Batch(criterion, layout, dtype)
    found, agrees = assemble(batch, criterion, divergence, route, **options)
    found["total"].backward()
    # The package's promise for float32; the authors add 1e-9 to probabilities in the Jensen-Shannon divergence
    tolerance = 1e-5 if dtype == torch.float32 else 1e-6 if divergence == "jsd" else 1e-11
    assert set(found) == set(expected) - {"agreeing"}
    for name, value in found.items():
        assert error(value, expected[name]) <= tolerance, name
        assert expected[name] > 1e-3, name
    for name, gradient in batch.gradients.items():
        assert error(gradient, exact.gradients[name]) <= tolerance, name
    trained = {"student.hidden", "student.weight", "to_student.weight", "to_teacher.weight"}
    trained |= {"query.weight"} if batch.kind == "cma" else set()
    trained |= {name for name in batch.leaves if name.endswith("bias")}
    assert {name for name, gradient in exact.gradients.items() if gradient.abs().max() > 1e-3} == trained
    if "agreeing" in expected:
        assert int(agrees.sum()) == expected["agreeing"] > 0 and not agrees.all()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("route", ["plain", "terms", "chunks 1", "chunks 3"])
def test_dual_space_criterion_equals_the_loop(criterion, layout, route):
    check_criterion(criterion, layout, "forward_kl", route, torch.float64)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("route", ["plain", "terms"])
def test_dual_space_criterion_in_float32_equals_the_loop(criterion, route):
    check_criterion(criterion, "odd", "forward_kl", route, torch.float32)


@pytest.mark.parametrize("criterion", ["v1", "v2", "cma valid", "eta kept"])
@EVERY_DIVERGENCE
def test_dual_space_criterion_with_every_divergence_equals_the_loop(criterion, divergence):
    for route in ("plain", "chunks 3"):
        check_criterion(criterion, "even", divergence, route, torch.float64)


@pytest.mark.parametrize("criterion", ["v1", "v2", "cma", "eta"])
@pytest.mark.parametrize("options", [{"kd_temperature": 1.0}, {"kd_rate": 0.9, "kd_temperature": 3.0}], ids=str)
def test_dual_space_criterion_at_other_rates_and_temperatures_equals_the_loop(criterion, options):
    for route in ("plain", "terms"):
        check_criterion(criterion, "even", "reverse_kl", route, torch.float64, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_universal_logit_distance_summed_over_matched_places_equals_the_authors_criterion(layout):
    exact, batch = Batch("cma", layout), Batch("cma", layout)
    expected = loops.universal_logit_distillation(exact.side("student"), exact.side("teacher"))
    expected["total"].backward()
    student, teacher = batch.side("student"), batch.side("teacher")
    student_places, teacher_places = [], []
    for b in range(len(student.labels)):
        own, others = ([place for place in side.trained if place[0] == b] for side in (student, teacher))
        number = min(len(own), len(others))
        student_places += own[:number]
        teacher_places += others[:number]
    (rows, positions), (teacher_rows, teacher_positions) = (
        torch.tensor(places).T for places in (student_places, teacher_places)
    )
    distance = universal_logit_distance(
        LMHead(student.weight)(student.hidden[rows, positions]),
        LMHead(teacher.weight)(teacher.hidden[teacher_rows, teacher_positions]),
    )
    counted = student.labels != -100
    nll = cross_entropy(LMHead(student.weight)(student.hidden[counted]), student.labels[counted])
    total = 0.5 * nll.mean() + 0.5 * distance.sum() / counted.sum()
    total.backward()
    assert error(total, expected["total"]) <= 1e-12
    assert error(distance.sum() / counted.sum(), expected["distance"]) <= 1e-12
    for name in ("student.hidden", "student.weight"):
        assert error(batch.leaves[name].grad, exact.leaves[name].grad) <= 1e-12
        assert exact.leaves[name].grad.abs().max() > 1e-2
    assert batch.leaves["teacher.hidden"].grad is None or not batch.leaves["teacher.hidden"].grad.any()


@CHUNK_SIZES
@pytest.mark.parametrize("vocabularies", [(6, 9), (9, 6)])
def test_universal_logit_distance_in_the_engine_equals_the_plain_function(chunk_size, vocabularies):
    leaves = {
        name: normal(*size, seed=seed).requires_grad_()
        for seed, (name, size) in enumerate(
            {"hidden": (7, 4), "weight": (vocabularies[0], 4), "teacher": (7, 5), "head": (vocabularies[1], 5)}.items()
        )
    }
    pairs = {
        "student": (leaves["hidden"], LMHead(leaves["weight"])),
        "teacher": (leaves["teacher"].detach(), LMHead(leaves["head"]).detach()),
    }
    weights = normal(7, seed=8)
    expected = universal_logit_distance(*(head(hidden) for hidden, head in pairs.values()))
    trained = leaves["hidden"], leaves["weight"]
    expected_gradients = torch.autograd.grad((weights * expected).sum(), trained)
    result = linear_loss(pairs, {"uld": Term(universal_logit_distance, weights=weights)}, chunk_size=chunk_size)
    result.loss.backward()
    assert error(result.values["uld"], expected) <= 1e-13
    for leaf, gradient in zip(trained, expected_gradients, strict=True):
        assert error(leaf.grad, gradient) <= 1e-12


# Where gradient flows

TRAINED = {
    "student_ce": {"student.hidden", "student.weight"},
    "projector_ce": {"to_student.weight", "to_student.bias"},
    "student_space_kd": {"student.hidden", "student.weight"},
    "teacher_space_kd": {"student.hidden", "to_teacher.weight", "to_teacher.bias"},
    "projector_agreement": set(),
    "student_agreement": set(),
}


def moved_by(name, route):
    """Leaves that one term gives gradient to, through a student's head that the teacher's path has detached."""
    batch = Batch("v1", "even")
    spaces = same_vocabulary_spaces(batch)
    head, teacher_head = LMHead(batch.leaves["student.weight"]), LMHead(batch.leaves["teacher.weight"])
    labels = {"labels": spaces.labels, "projector_labels": spaces.projector_labels}
    weights = torch.linspace(0.5, 1.5, len(spaces.labels), dtype=torch.float64)
    pairs = {
        "student": (spaces.student, head),
        "projected_teacher": (spaces.projected_teacher, head.detach()),
        "projected_student": (spaces.projected_student, teacher_head.detach()),
        # With gradient, which must not be used
        "teacher": (batch.leaves["teacher.hidden"][batch.labels != -100], teacher_head),
    }
    if route == "plain":
        logits = {name: head(hidden) for name, (hidden, head) in pairs.items()}
        values = student_space(logits["student"], logits["projected_teacher"], *labels.values())
        values |= teacher_space(logits["projected_student"], logits["teacher"])
        assert values[name].requires_grad == bool(TRAINED[name])
        loss = (weights * values[name]).sum()
    else:
        terms = student_space_terms() | teacher_space_terms()
        terms = {key: replace(term, weights=weights if key == name else None) for key, term in terms.items()}
        loss = linear_loss(pairs, terms, labels, 3).loss
    if loss.requires_grad:
        loss.backward()
    return {leaf for leaf, gradient in batch.gradients.items() if gradient.any()}


@pytest.mark.parametrize("route", ["plain", "terms"])
@pytest.mark.parametrize("name", TRAINED)
def test_dual_space_term_trains_these_and_nothing_else(name, route):
    assert moved_by(name, route) == TRAINED[name]


def test_student_space_without_detached_heads_gives_the_projected_teacher_its_cross_entropy_alone():
    student, projected = (normal(4, 6, seed=seed).requires_grad_() for seed in (0, 1))
    labels, projector_labels = integers(6, 4, seed=2), integers(6, 4, seed=3)
    values = student_space(student, projected, labels, projector_labels, teacher_temperature=1.5)
    sum(value.sum() for value in values.values() if value.requires_grad).backward()
    expected = projected.detach().softmax(-1) - F.one_hot(projector_labels, 6)
    torch.testing.assert_close(projected.grad, expected, rtol=0, atol=1e-14)


def test_universal_logit_distance_gives_the_teacher_no_gradient():
    student, teacher = normal(4, 6, seed=0).requires_grad_(), normal(4, 6, seed=1).requires_grad_()
    universal_logit_distance(student, teacher).sum().backward()
    assert student.grad.abs().max() > 1e-2 and (teacher.grad is None or not teacher.grad.any())


# As terms of `linear_loss`


class World:
    """Rows and heads of both models, with biases, a scale and a cap."""

    def __init__(self, dtype=torch.float64, num_rows=7):
        self.leaves = {}
        for seed, (name, size) in enumerate(
            {
                "student.hidden": (num_rows, 4),
                "projected_teacher.hidden": (num_rows, 4),
                "projected_student.hidden": (num_rows, 6),
                "teacher.hidden": (num_rows, 6),
                "head.weight": (9, 4),
                "head.bias": (9,),
                "teacher_head.weight": (11, 6),
                "teacher_head.bias": (11,),
            }.items()
        ):
            self.leaves[name] = normal(*size, seed=seed).to(dtype).requires_grad_()
        head = LMHead(self.leaves["head.weight"], self.leaves["head.bias"], 0.75, 4.0)
        teacher_head = LMHead(self.leaves["teacher_head.weight"], self.leaves["teacher_head.bias"], 0.5)
        self.pairs = {
            "student": (self.leaves["student.hidden"], head),
            "projected_teacher": (self.leaves["projected_teacher.hidden"], head.detach()),
            "projected_student": (self.leaves["projected_student.hidden"], teacher_head.detach()),
            "teacher": (self.leaves["teacher.hidden"].detach(), teacher_head.detach()),
        }
        self.labels = {
            name: integers(9, num_rows, seed=seed) for name, seed in (("labels", 20), ("projector_labels", 21))
        }
        self.labels["projector_labels"][::2] = top1(*self.pairs["projected_teacher"])[::2]
        self.weights = {name: normal(num_rows, seed=30 + k).to(dtype) for k, name in enumerate(TRAINED)}
        for weight in self.weights.values():
            weight[1::4] = 0.0

    @property
    def gradients(self):
        return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in self.leaves.items()}


def check_terms(chunk_size, dtype, tolerance, divergence="forward_kl", kd_temperature=2.0, teacher_temperature=1.0):
    options = {"divergence": DIVERGENCES[divergence], "kd_temperature": kd_temperature}
    world, exact = World(dtype), World(dtype)
    pairs = dict(world.pairs)
    if teacher_temperature != 1.0:
        states, head = pairs["projected_teacher"]
        pairs["tempered_teacher"] = (states.detach(), tempered(head, teacher_temperature))
    terms = student_space_terms(
        is_tempered=teacher_temperature != 1.0,
        ce_weights=world.weights["student_ce"],
        projector_weights=world.weights["projector_ce"],
        kd_weights=world.weights["student_space_kd"],
        **options,
    )
    assert list(terms) == TERMS
    terms |= teacher_space_terms(kd_weights=world.weights["teacher_space_kd"], **options)
    result = linear_loss(pairs, terms, world.labels, chunk_size)
    result.loss.backward()
    logits = {name: head(hidden) for name, (hidden, head) in exact.pairs.items()}
    expected = student_space(
        logits["student"],
        logits["projected_teacher"],
        *exact.labels.values(),
        teacher_temperature=teacher_temperature,
        **options,
    ) | teacher_space(logits["projected_student"], logits["teacher"], **options)
    trained = [name for name in expected if "agreement" not in name]
    loss = sum((exact.weights[name] * expected[name]).sum() for name in trained)
    loss.backward()
    assert list(result.values) == list(expected)
    for name, value in expected.items():
        assert result.values[name].dtype == value.dtype and error(result.values[name], value) <= tolerance, name
    assert error(result.loss, loss) <= tolerance
    for name, gradient in world.gradients.items():
        assert error(gradient, exact.gradients[name]) <= tolerance, name
    still = {name for name, gradient in exact.gradients.items() if not gradient.any()}
    assert still == {"teacher.hidden", "teacher_head.weight", "teacher_head.bias"}
    assert 0 < expected["projector_agreement"].mean() < 1


@CHUNK_SIZES
@EVERY_DIVERGENCE
def test_dual_space_terms_equal_the_plain_functions(chunk_size, divergence):
    check_terms(chunk_size, torch.float64, 1e-12, divergence)


@CHUNK_SIZES
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (3.0, 1.0), (2.0, 1.5), (1.0, 0.5)])
def test_dual_space_terms_at_other_temperatures_equal_the_plain_functions(chunk_size, temperatures):
    options = dict(zip(("kd_temperature", "teacher_temperature"), temperatures, strict=True))
    check_terms(chunk_size, torch.float64, 1e-12, "adaptive_kl", **options)


@CHUNK_SIZES
def test_dual_space_terms_in_float32_equal_the_plain_functions(chunk_size):
    check_terms(chunk_size, torch.float32, 1e-5, "skewed_reverse_kl", teacher_temperature=1.5)


def test_dual_space_terms_without_weights_are_metrics_with_the_defaults_of_the_plain_functions():
    world = World()
    result = linear_loss(world.pairs, student_space_terms() | teacher_space_terms(), world.labels)
    assert not result.loss.requires_grad and result.loss.item() == 0.0
    logits = {name: head(hidden) for name, (hidden, head) in world.pairs.items()}
    expected = student_space(logits["student"], logits["projected_teacher"], *world.labels.values())
    expected |= teacher_space(logits["projected_student"], logits["teacher"])
    for name, value in expected.items():
        assert error(result.values[name], value) <= 1e-12, name


def test_dual_space_terms_no_rows_have_no_loss_and_zero_gradients():
    world = World(num_rows=0)
    empty = torch.zeros(0, dtype=torch.float64)
    terms = student_space_terms(ce_weights=empty, projector_weights=empty, kd_weights=empty)
    result = linear_loss(world.pairs, terms | teacher_space_terms(kd_weights=empty), world.labels)
    result.loss.backward()
    assert result.loss.item() == 0.0 and all(value.shape == (0,) for value in result.values.values())
    for name in ("head.weight", "student.hidden", "projected_teacher.hidden", "projected_student.hidden"):
        assert world.leaves[name].grad is not None and not world.leaves[name].grad.any()


# Identities


@EVERY_DIVERGENCE
def test_dual_space_equal_logits_have_no_divergence_and_no_gradient(divergence):
    logits, labels = normal(5, 8, seed=0).requires_grad_(), integers(8, 5, seed=1)
    shifted = logits.detach() + 3.0  # logits are known up to a constant
    values = student_space(logits, shifted, labels, labels, divergence=DIVERGENCES[divergence])
    kd = (
        values["student_space_kd"],
        teacher_space(logits, shifted, divergence=DIVERGENCES[divergence])["teacher_space_kd"],
    )
    for value in kd:
        assert value.abs().max() < 1e-13
        (gradient,) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
        assert gradient.abs().max() < 1e-13 or divergence == "total_variation"  # it has a kink at zero
    assert torch.equal(values["student_agreement"], values["projector_agreement"])
    torch.testing.assert_close(values["student_ce"], values["projector_ce"])


def test_student_space_hot_teacher_is_uniform():
    logits, labels = normal(5, 8, seed=0), integers(8, 5, seed=1)
    values = student_space(logits, normal(5, 8, seed=2), labels, labels, kd_temperature=1.0, teacher_temperature=1e9)
    expected = -math.log(8) - logits.log_softmax(-1).mean(-1)
    torch.testing.assert_close(values["student_space_kd"], expected, rtol=0, atol=1e-7)


def test_student_space_both_temperatures_act_on_the_teacher_as_their_product():
    student, projected, labels = normal(5, 8, seed=0), normal(5, 8, seed=1), integers(8, 5, seed=2)
    arguments = (labels, labels)
    values = student_space(student, projected, *arguments, kd_temperature=2.0, teacher_temperature=1.5)
    same = student_space(student / 2.0, projected / 3.0, *arguments, kd_temperature=1.0)
    torch.testing.assert_close(values["student_space_kd"], same["student_space_kd"], rtol=0, atol=1e-14)


def test_universal_logit_distance_knows_no_tokens_no_constants_and_no_impossible_words():
    logits = normal(5, 8, seed=0)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    longer = F.pad(logits[:, order] + 2.0, (1, 2), value=-math.inf)
    assert universal_logit_distance(logits, longer).abs().max() < 1e-14
    assert universal_logit_distance(longer, logits).abs().max() < 1e-14
    other = normal(5, 11, seed=2)
    torch.testing.assert_close(universal_logit_distance(logits, other), universal_logit_distance(longer, other))


def test_universal_logit_distance_of_one_word_from_all_words_approaches_two():
    distance = universal_logit_distance(torch.tensor([[200.0, 0.0]]), torch.zeros(1, 1000))
    assert distance.item() == pytest.approx(2 * (1 - 1e-3), rel=1e-5)


# Dtypes, extremes, no rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_autocast", [False, True])
def test_dual_space_half_precision_is_computed_in_float32(dtype, is_autocast):
    student, teacher = (normal(5, 8, seed=seed).to(dtype) for seed in (0, 1))
    labels = integers(8, 5, seed=2)

    def values_of(student, teacher):
        values = student_space(student, teacher, labels, labels.flip(0), teacher_temperature=1.5)
        return values | teacher_space(student, teacher) | {"uld": universal_logit_distance(student, teacher[:, :6])}

    leaf = student.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        found = values_of(leaf, teacher)
    for name, value in values_of(student.float(), teacher.float()).items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], value), name
    found["student_space_kd"].sum().backward()
    assert leaf.grad.dtype == dtype and leaf.grad.abs().max() > 1e-3


def test_dual_space_float64_stays():
    logits, labels = normal(5, 8, seed=0), integers(8, 5, seed=1)
    values = student_space(logits, logits.flip(0), labels, labels) | teacher_space(logits, logits.flip(0))
    assert {value.dtype for value in values.values()} == {torch.float64}
    assert universal_logit_distance(logits, logits).dtype == torch.float64


def test_dual_space_logits_of_ten_thousand_have_the_values_by_hand_and_finite_gradients():
    student = torch.tensor([[1e4, -1e4, 0.0]]).requires_grad_()
    teacher = torch.tensor([[-1e4, 1e4, 0.0]]).requires_grad_()
    labels = torch.tensor([1]), torch.tensor([0])
    values = student_space(student, teacher, *labels) | teacher_space(student, teacher)
    assert values["student_ce"].item() == values["projector_ce"].item() == 2e4
    # Half of that at temperature 2, where the teacher has all its mass
    assert values["student_space_kd"].item() == values["teacher_space_kd"].item() == 1e4
    distance = universal_logit_distance(student, teacher)
    assert distance.item() == 0.0
    (sum(value.sum() for value in values.values()) + distance.sum()).backward()
    assert torch.isfinite(student.grad).all() and torch.isfinite(teacher.grad).all()


def test_dual_space_words_that_both_exclude_leave_values_and_gradients_finite():
    student, teacher = (normal(4, 6, seed=seed) for seed in (0, 1))
    short = student[:, 1:].clone(), teacher[:, 1:].clone()
    student[:, 0], teacher[:, 0] = -math.inf, -math.inf
    student.requires_grad_(), teacher.requires_grad_()
    labels = integers(5, 4, seed=2)
    values = student_space(student, teacher, labels + 1, labels + 1) | teacher_space(student, teacher)
    expected = student_space(*short, labels, labels) | teacher_space(*short)
    for name, value in values.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-13)
    distance = universal_logit_distance(student, teacher)
    torch.testing.assert_close(distance, universal_logit_distance(*short), rtol=0, atol=1e-13)
    (sum(value.sum() for value in values.values()) + distance.sum()).backward()
    assert torch.isfinite(student.grad).all() and torch.isfinite(teacher.grad).all()


def test_dual_space_no_rows_have_no_values_and_finite_gradients():
    logits, labels = torch.zeros(0, 5, requires_grad=True), torch.zeros(0, dtype=torch.long)
    values = student_space(logits, torch.zeros(0, 5), labels, labels, teacher_temperature=2.0)
    values |= teacher_space(logits, torch.zeros(0, 5)) | {"uld": universal_logit_distance(logits, torch.zeros(0, 7))}
    assert all(value.shape == (0,) and value.dtype == torch.float32 for value in values.values())
    sum(value.sum() for value in values.values()).backward()
    assert logits.grad.shape == (0, 5)


# Errors


def test_student_space_other_vocabulary_of_the_projected_teacher_raises():
    labels = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\(2, 5\).*\(2, 6\)"):
        student_space(torch.zeros(2, 5), torch.zeros(2, 6), labels, labels)


@pytest.mark.parametrize("which", ["labels", "projector_labels"])
def test_student_space_labels_of_another_length_raise(which):
    labels = {"labels": torch.zeros(2, dtype=torch.long), "projector_labels": torch.zeros(2, dtype=torch.long)}
    labels[which] = torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\(2, 5\).*\(3,\)\. Each label needs one row of logits\. Pass"):
        student_space(torch.zeros(2, 5), torch.zeros(2, 5), *labels.values())


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_dual_space_temperatures_that_no_softmax_has_raise(temperature):
    logits, labels = torch.zeros(2, 5), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=rf"`kd_temperature` is {temperature}, but logits are divided by it\. Set it"):
        student_space(logits, logits, labels, labels, kd_temperature=temperature)
    with pytest.raises(ValueError, match=rf"`kd_temperature` is {temperature}, but logits are divided by it\. Set it"):
        teacher_space(logits, logits, kd_temperature=temperature)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_student_space_temperatures_of_the_teacher_that_no_softmax_has_raise(temperature):
    logits, labels = torch.zeros(2, 5), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=rf"`teacher_temperature` is {temperature}, but .*\. Set it above 0"):
        student_space(logits, logits, labels, labels, teacher_temperature=temperature)


def test_teacher_space_other_vocabulary_raises():
    with pytest.raises(ValueError, match=r"\(2, 5\).*\(2, 6\)"):
        teacher_space(torch.zeros(2, 5), torch.zeros(2, 6))


def test_universal_logit_distance_other_number_of_rows_raises():
    with pytest.raises(ValueError, match=r"\(2, 5\).*\(1, 6\)"):  # which would broadcast
        universal_logit_distance(torch.zeros(2, 5), torch.zeros(1, 6))


# Labels of several kinds in the engine, and the most likely token


@CHUNK_SIZES
def test_linear_loss_labels_by_name_equal_separate_calls(chunk_size):
    found, expected = World(), World()

    def terms(world, *names):
        return {
            f"{function.__name__} of {pair} on {name}": Term(
                function, (pair, name), world.weights[pair_term] if function is cross_entropy else None
            )
            for name in names
            for pair, pair_term in (("student", "student_ce"), ("projected_teacher", "projector_ce"))
            for function in (cross_entropy, top1_accuracy)
        }

    result = linear_loss(found.pairs, terms(found, "labels", "projector_labels"), found.labels, chunk_size)
    result.loss.backward()
    values, losses = {}, []
    for name in ("projector_labels", "labels"):
        for key, term in terms(expected, name).items():
            alone = linear_loss(
                expected.pairs, {key: replace(term, inputs=(term.inputs[0], "labels"))}, expected.labels[name]
            )
            values |= alone.values
            losses.append(alone.loss)
    sum(losses).backward()
    assert set(values) == set(result.values) and len(values) == 8
    for key, value in values.items():
        assert error(result.values[key], value) <= 1e-13, key
        pair, name = key.split(" of ")[1].split(" on ")
        logits = found.pairs[pair][1](found.pairs[pair][0]).detach()
        function = cross_entropy if key.startswith("cross_entropy") else top1_accuracy
        assert error(value, function(logits, found.labels[name])) <= 1e-13, key
    for name, gradient in found.gradients.items():
        assert error(gradient, expected.gradients[name]) <= 1e-12, name


def test_linear_loss_one_kind_of_labels_is_the_same_with_and_without_its_name():
    results = []
    for wrap in (lambda labels: labels, lambda labels: {"labels": labels}):
        world = World()
        terms = {"nll": Term(cross_entropy, ("student", "labels"), world.weights["student_ce"])}
        result = linear_loss(world.pairs, terms, wrap(world.labels["labels"]), 3)
        result.loss.backward()
        results.append((result.loss, result.values["nll"], world.leaves["head.weight"].grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@CHUNK_SIZES
def test_linear_loss_function_of_the_caller_takes_labels_by_name(chunk_size):
    def margin(logits, first, second):
        return (logits.gather(1, first[:, None]) - 2.0 * logits.gather(1, second[:, None])).squeeze(1)

    world, exact = World(), World()
    inputs = ("student", "projector_labels", "labels")
    terms = {"margin": Term(margin, inputs, world.weights["student_ce"]), "again": Term(margin, inputs)}
    result = linear_loss(world.pairs, terms, world.labels, chunk_size)
    result.loss.backward()
    hidden, head = exact.pairs["student"]
    expected = margin(head(hidden), exact.labels["projector_labels"], exact.labels["labels"])
    (exact.weights["student_ce"] * expected).sum().backward()
    assert error(result.values["margin"], expected) <= 1e-13 and error(result.values["again"], expected) <= 1e-13
    for name in ("student.hidden", "head.weight", "head.bias"):
        assert error(world.leaves[name].grad, exact.leaves[name].grad) <= 1e-12


def test_linear_loss_unknown_name_of_labels_raises():
    world = World()
    terms = {"nll": Term(cross_entropy, ("student", "labels"))}
    with pytest.raises(ValueError, match=r"take \['labels'\], but there are .*'projector_labels'.*Pass these pairs"):
        linear_loss(world.pairs, terms, {"projector_labels": world.labels["projector_labels"]})


@pytest.mark.parametrize("which", ["labels", "projector_labels"])
def test_linear_loss_labels_of_another_length_raise(which):
    world = World()
    world.labels[which] = torch.zeros(8, dtype=torch.long)
    with pytest.raises(ValueError, match=rf"numbers of rows differ: .*'{which}': 8.* Select the same positions"):
        linear_loss(world.pairs, student_space_terms(), world.labels)


HEADS = pytest.mark.parametrize("options", [{}, {"scale": -0.5}, {"soft_cap": 2.0}, {"scale": 3.0, "soft_cap": 30.0}])


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 100, None])
@HEADS
def test_top1_is_the_largest_logit_of_each_row(chunk_size, options):
    hidden, weight, bias = normal(11, 4, seed=0), normal(9, 4, seed=1), normal(9, seed=2)
    found = top1(hidden.requires_grad_(), LMHead(weight, bias, **options), chunk_size)
    assert found.dtype == torch.long and found.shape == (11,)
    for row, index in zip(hidden.tolist(), found.tolist(), strict=True):
        scores = [sum(w * x for w, x in zip(numbers, row, strict=True)) for numbers in weight.tolist()]
        scores = [score + b for score, b in zip(scores, bias.tolist(), strict=True)]
        scores = [options.get("scale", 1.0) * score for score in scores]
        cap = options.get("soft_cap")
        scores = scores if cap is None else [cap * math.tanh(score / cap) for score in scores]
        # A cap may make the largest equal
        assert scores[index] == pytest.approx(max(scores), abs=1e-12)
    assert len(set(found.tolist())) > 2


def test_top1_computes_no_more_rows_at_a_time_than_asked():
    class Recorder(LMHead):
        def __call__(self, hidden_states):
            sizes.append(len(hidden_states))
            return super().__call__(hidden_states)

    sizes = []
    top1(normal(11, 4, seed=0), Recorder(normal(9, 4, seed=1)), chunk_size=4)
    assert sizes == [4, 4, 3]


def test_top1_no_rows_are_no_tokens():
    found = top1(torch.zeros(0, 4), LMHead(torch.zeros(9, 4)))
    assert found.shape == (0,) and found.dtype == torch.long


def test_top1_bfloat16_head_chooses_as_its_own_logits_do():
    hidden, head = normal(11, 4, seed=0).bfloat16(), LMHead(normal(9, 4, seed=1).bfloat16())
    chosen = head(hidden).gather(1, top1(hidden, head, 3)[:, None]).squeeze(1)
    assert torch.equal(chosen, head(hidden).amax(dim=1))


def test_top1_accuracy_literal_inputs_count_every_largest_token():
    logits = torch.tensor([[1.0, 3.0, 3.0]]).repeat(3, 1).requires_grad_()
    accuracy = top1_accuracy(logits, torch.tensor([0, 1, 2]))
    assert accuracy.tolist() == [0.0, 1.0, 1.0] and accuracy.dtype == torch.float32 and not accuracy.requires_grad
    assert top1_accuracy(logits.detach().double(), torch.tensor([0, 1, 2])).dtype == torch.float64
    assert top1_accuracy(logits.detach().bfloat16().unsqueeze(0), torch.tensor([[0, 1, 2]])).shape == (1, 3)


def test_top1_accuracy_labels_of_another_shape_raise():
    with pytest.raises(ValueError, match=r"\(2, 5\) but `labels` has shape \(2, 1\)\. .* Pass `labels` without"):
        top1_accuracy(torch.zeros(2, 5), torch.zeros(2, 1, dtype=torch.long))


def test_top1_accuracy_with_weight_in_the_engine_adds_its_value_and_no_gradient():
    world = World()
    weights = world.weights["student_ce"]
    term = Term(top1_accuracy, ("projected_teacher", "projector_labels"), weights)
    nll = Term(cross_entropy, ("student", "labels"), weights)
    result = linear_loss(world.pairs, {"accuracy": term, "nll": nll}, world.labels, 3)
    result.loss.backward()
    assert error(result.loss, (weights * (result.values["accuracy"] + result.values["nll"])).sum()) <= 1e-13
    assert not world.gradients["projected_teacher.hidden"].any() and world.gradients["student.hidden"].any()
    assert 0 < result.values["accuracy"].mean() < 1

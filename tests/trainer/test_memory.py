"""No trainer makes logits of more tokens than a chunk, anywhere in a whole step of training."""

from functools import partial

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.tiny import make_tokenizer
from tests.trainer.dual import dual_pair, make_other_tokenizer, make_trainer, same_tokens
from tests.trainer.runs import config, logged, pair
from trl_kd import AMMTrainer, DSKDTrainer
from trl_kd.losses import LinearLoss, Term, adaptive_kl, cross_entropy, forward_kl, linear_loss, top1_agreement
from trl_kd.trainer.kd_trainer import _KDTrainer


# A prime: what it divides is the size of something with a vocabulary dimension, whatever its shape
VOCAB_SIZE = 389
# Rows of a batch, and trained tokens of each
ROWS, LENGTH = 4, 24
CHUNK = 6
# Of the heads of student, teacher and critics, which are (V, width)
WIDTHS = {"student": 32, "teacher": 48, "both": 80, "rank": 5}


class LargestLogits(TorchDispatchMode):
    """Most rows of a vocabulary's numbers in any floating tensor that an operation makes, heads aside."""

    def __init__(self, *sizes):
        super().__init__()
        self.rows, self.sizes = 0, sizes or (VOCAB_SIZE,)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                # What is stored: an expanded head has many rows in name only
                stored = tensor.untyped_storage().nbytes() // tensor.element_size()
                for size in self.sizes:
                    if stored and stored % size == 0 and stored // size not in WIDTHS.values():
                        self.rows = max(self.rows, stored // size)
        return output


class DivergenceTrainer(_KDTrainer):
    """The simplest method: divergences and the labels."""

    _name = "toy"
    _eval_value = "kl"

    def token_loss(self, tokens):
        terms = {
            "kl": Term(partial(forward_kl, kd_temperature=2.0), weights=tokens.weights),
            "adaptive": Term(adaptive_kl, weights=0.5 * tokens.weights),
            "nll": Term(cross_entropy, ("student", "labels"), tokens.reference_weights),
            "agreement": Term(top1_agreement),
        }
        return linear_loss(tokens.pairs, terms, tokens.labels, self.args.loss_chunk_size)


class CallersFunctionTrainer(_KDTrainer):
    """A divergence that the package does not know."""

    _name = "toy"

    def token_loss(self, tokens):
        def squared(student, teacher):
            return (student.log_softmax(-1) - teacher.log_softmax(-1)).square().mean(-1)

        terms = {"squared": Term(squared, weights=tokens.weights)}
        return linear_loss(tokens.pairs, terms, tokens.labels, self.args.loss_chunk_size)


class MaterialisingTrainer(_KDTrainer):
    """All logits of a micro-batch at once."""

    _name = "toy"

    def token_loss(self, tokens):
        student, teacher = (head(hidden) for hidden, head in tokens.pairs.values())
        values = forward_kl(student, teacher)
        return LinearLoss((tokens.weights * values).sum(), {"kl": values.detach()})


class MaterialisingBeside(DivergenceTrainer):
    """Without gradient, of a step that has a good loss."""

    def token_loss(self, tokens):
        hidden, head = tokens.pairs["student"]
        head.detach()(hidden.detach())
        return super().token_loss(tokens)


def long_rows():
    words = ["fox", "bird", "river", "sky", "grass", "apple", "forest", "fish"]
    return Dataset.from_list(
        [{"prompt": f"What is the {words[i % 8]}", "completion": " The sky is blue" * 12} for i in range(16)]
    )


def options_of_a_step():
    return {
        "max_steps": 1,
        "per_device_train_batch_size": ROWS,
        "loss_chunk_size": CHUNK,
        "rollout_batch_size": ROWS,
        "max_length": 2 * LENGTH,
        # Rollouts as long as that, whatever the student says
        "max_completion_length": LENGTH,
        "generation_kwargs": {"min_new_tokens": LENGTH},
    }


def train(trainer_class, tokenizer, folder, **overrides):
    """One optimizer step; the most rows of logits in any tensor, and the numbers of trained tokens."""
    student, teacher = pair(tokenizer)
    for model in (student, teacher):
        model.resize_token_embeddings(VOCAB_SIZE)
    args = config(folder, **(options_of_a_step() | overrides))
    trainer = trainer_class(student, teacher, args, long_rows(), processing_class=tokenizer)
    counts, token_loss = [], trainer.token_loss
    trainer.token_loss = lambda tokens: (counts.append(len(tokens.labels)), token_loss(tokens))[1]
    with LargestLogits() as largest:
        trainer.train()
    assert len(logged(trainer, "loss")) == 1 and len(counts) == args.gradient_accumulation_steps
    # A micro-batch is many chunks, and no head is as wide as it has tokens
    assert min(counts) >= 10 * CHUNK and min(counts) > max(WIDTHS.values())
    return largest.rows, counts


def no_more_than(chunks, rows):
    # One row of logits for each text is what a model's own forward makes for its last token
    return ROWS <= rows <= chunks * CHUNK


POLICIES = pytest.mark.parametrize("lmbda", [0.0, 1.0], ids=["off_policy", "on_policy"])
ACCUMULATION = pytest.mark.parametrize("steps", [1, 2])


@POLICIES
@ACCUMULATION
@pytest.mark.parametrize("trainer_class", [DivergenceTrainer, CallersFunctionTrainer])
def test_training_by_divergences_makes_no_logits_of_all_tokens(tokenizer, tmp_path, trainer_class, lmbda, steps):
    rows, _ = train(trainer_class, tokenizer, tmp_path, lmbda=lmbda, gradient_accumulation_steps=steps)
    assert no_more_than(1, rows)


def value_head(head, order, features):
    return {
        "critic": "value_head",
        "critic_head": head,
        "critic_order": order,
        "critic_rank": WIDTHS["rank"],
        "critic_features": features,
        "critic_steps": 3,
    }


# Options, and the steps of gradient accumulation
GAMES = {
    "exact": ({"sft_loss_weight": 0.1, "kl_loss_weight": 0.1}, 1),
    "exact_accumulated": ({"sft_loss_weight": 0.1, "kl_loss_weight": 0.1}, 2),
    "exact_penalised": ({"critic": "exact_penalised", "gamma": 0.9}, 1),
    "tied_before": (value_head("tied", "before", "both"), 1),
    "tied_before_accumulated": (value_head("tied", "before", "both"), 2),
    "tied_after": (value_head("tied", "after", "teacher"), 1),
    "tied_after_accumulated": (value_head("tied", "after", "both"), 2),
    "full_before": (value_head("full", "before", "both"), 1),
    "full_after": (value_head("full", "after", "both"), 1),
    "low_rank_before": (value_head("low_rank", "before", "student"), 1),
    "low_rank_after": (value_head("low_rank", "after", "both"), 1),
    "later_states": ({"on_policy_gradient": "full"}, 1),
    "later_states_accumulated": (
        {"on_policy_gradient": "full", "later_baseline": "value", "later_cost": "jsd", "sft_loss_weight": 0.1},
        2,
    ),
    "later_states_and_critic": (
        value_head("tied", "before", "both") | {"on_policy_gradient": "full", "later_cost": "total_variation"},
        1,
    ),
}


def chunks_of(options):
    # The models' logits are kept for several steps of a critic, as many as four chunks of them
    return 4 if options.get("critic") == "value_head" else 1


@pytest.mark.parametrize("game", GAMES)
def test_training_by_moments_makes_no_logits_of_all_tokens(tokenizer, tmp_path, game):
    options, steps = GAMES[game]
    rows, _ = train(AMMTrainer, tokenizer, tmp_path, lmbda=0.5, gradient_accumulation_steps=steps, **options)
    assert no_more_than(chunks_of(options), rows)


@POLICIES
@pytest.mark.parametrize("game", ["exact", "tied_before"])
def test_training_by_moments_of_one_source_makes_no_logits_of_all_tokens(tokenizer, tmp_path, game, lmbda):
    rows, _ = train(AMMTrainer, tokenizer, tmp_path, lmbda=lmbda, **GAMES[game][0])
    assert no_more_than(chunks_of(GAMES[game][0]), rows)


@POLICIES
@pytest.mark.parametrize(
    ("trainer_class", "steps"), [(MaterialisingTrainer, 1), (MaterialisingTrainer, 2), (MaterialisingBeside, 1)]
)
def test_training_that_makes_all_logits_is_seen(tokenizer, tmp_path, trainer_class, steps, lmbda):
    rows, counts = train(trainer_class, tokenizer, tmp_path, lmbda=lmbda, gradient_accumulation_steps=steps)
    assert rows == max(counts)


@pytest.mark.parametrize("game", ["exact", "tied_before"])
def test_training_in_one_chunk_is_seen(tokenizer, tmp_path, game):
    rows, counts = train(AMMTrainer, tokenizer, tmp_path, lmbda=0.0, loss_chunk_size=1000, **GAMES[game][0])
    assert rows == max(counts)


# Two vocabularies and what they share, each of a size that is a prime
TWO_SIZES, SHARED_SIZE = (VOCAB_SIZE, 281), 271
CMA = {"alignment": "cma", "preset": "v1"}
# Vocabularies, options, and the steps of gradient accumulation
DUAL = {
    "same_v1": (1, {"preset": "v1"}, 2),
    "same_v2": (1, {"teacher_temperature": 2.0}, 1),
    "same_v2_accumulated": (1, {"lmbda": 0.0}, 2),
    "same_simple": (1, {"objective": "simple"}, 1),
    "eta_v1": (2, {"alignment": "eta", "preset": "v1"}, 1),
    "eta_v2": (2, {"alignment": "eta"}, 1),
    "eta_v2_accumulated": (2, {"alignment": "eta"}, 2),
    "eta_simple": (2, {"alignment": "eta", "objective": "simple"}, 1),
    "eta_uld": (2, {"alignment": "eta", "objective": "uld"}, 1),
    "cma_v1": (2, CMA, 1),
    "cma_v1_padded_accumulated": (2, CMA | {"cma_norm_scope": "padded"}, 2),
    "cma_v2": (2, {"alignment": "cma"}, 1),
}


@pytest.fixture(scope="module")
def two_tokenizers():
    tokenizers = make_tokenizer(vocab_size=TWO_SIZES[0]), make_other_tokenizer(TWO_SIZES[1])
    assert tuple(map(len, tokenizers)) == TWO_SIZES and len(same_tokens(*tokenizers)) == SHARED_SIZE
    return tokenizers


class MaterialisingTeacher(DSKDTrainer):
    """All of the teacher's logits of a micro-batch, without gradient, beside a good loss."""

    def token_loss(self, tokens):
        hidden, head = tokens.pairs["teacher"]
        head(hidden)
        return super().token_loss(tokens)


def train_dual(two_tokenizers, folder, case, trainer_class=DSKDTrainer, **overrides):
    """As `train`; the numbers are of the teacher's trained tokens."""
    vocabularies, options, steps = DUAL[case]
    tokenizers = two_tokenizers if vocabularies == 2 else (two_tokenizers[0], two_tokenizers[0])
    settings = options_of_a_step() | {"lmbda": 0.5, "gradient_accumulation_steps": steps} | options
    trainer = make_trainer(
        dual_pair(*tokenizers), tokenizers, folder, long_rows(), trainer_class=trainer_class, **(settings | overrides)
    )
    counts, token_loss = [], trainer.token_loss
    trainer.token_loss = lambda tokens: (counts.append(len(tokens.pairs["teacher"][0])), token_loss(tokens))[1]
    with LargestLogits(*TWO_SIZES, SHARED_SIZE) as largest:
        trainer.train()
    assert len(logged(trainer, "loss")) == 1 and len(counts) == steps
    assert min(counts) >= 10 * CHUNK and min(counts) > max(WIDTHS.values())
    return largest.rows, counts


@pytest.mark.parametrize("case", DUAL)
def test_training_in_two_spaces_makes_no_logits_of_all_tokens(two_tokenizers, tmp_path, case):
    rows, _ = train_dual(two_tokenizers, tmp_path, case)
    assert no_more_than(1, rows)


@pytest.mark.parametrize("case", ["same_v2", "eta_v2", "cma_v1"])
def test_training_in_two_spaces_that_makes_all_logits_is_seen(two_tokenizers, tmp_path, case):
    rows, counts = train_dual(two_tokenizers, tmp_path, case, MaterialisingTeacher)
    assert rows == max(counts)


@pytest.mark.parametrize("case", ["eta_v2", "eta_simple", "cma_v1"])
def test_training_in_two_spaces_in_one_chunk_is_seen(two_tokenizers, tmp_path, case):
    rows, counts = train_dual(two_tokenizers, tmp_path, case, loss_chunk_size=1000)
    assert rows > 5 * CHUNK

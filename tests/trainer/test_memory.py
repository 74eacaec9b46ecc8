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
from tests.trainer.sparse import make_trainer as make_sparse_trainer
from trl_kd import AMMTrainer, DSKDTrainer, SparseTDTrainer
from trl_kd.losses import LinearLoss, Term, adaptive_kl, cross_entropy, forward_kl, linear_loss, top1_agreement
from trl_kd.teachers import LocalTeacher
from trl_kd.teachers.cache_writer import CacheSettings, write_cache
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


class LargestTensor(LargestLogits):
    """As above, and the most numbers in any floating tensor."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = super().__torch_dispatch__(function, types, args, kwargs)
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return output


# Sets small enough that a product with the tokens of some rows is not one with all tokens
SMALL_SETS = {"action_top_p": 0.2, "max_actions": 5}
TD = {"objectives": {"teacher_reward": 1.0}, "truncation": "bootstrap", "returns": "lambda"}
# Options, and the steps of gradient accumulation
SPARSE = {
    "expected": ({}, 1),
    "expected_accumulated": ({"lm_weight": 0.5}, 2),
    "paper": ({"preset": "paper"}, 1),
    "paper_second_text": ({"preset": "paper", "second": True}, 2),
    "released": ({"preset": "released", "lm_weight": 0.0}, 1),
    "normalised_target": (TD | {"gauge": "logsoftmax", "target_ema": 0.9}, 1),
    "without_normaliser": (TD | {"tail_weight": 0.0}, 2),
}


def train_sparse(tokenizer, folder, cache=None, trainer_class=SparseTDTrainer, second=False, **overrides):
    """As `train`; what the largest tensors were."""
    student, teacher = pair(tokenizer)
    for model in (student, teacher):
        model.resize_token_embeddings(VOCAB_SIZE)
    settings = options_of_a_step() | SMALL_SETS | ({} if cache is None else {"teacher_cache": cache})
    trainer = make_sparse_trainer(
        tokenizer,
        folder,
        long_rows(),
        trainer_class=trainer_class,
        models=(student, teacher if cache is None else None),
        options={"lm_dataset": long_rows()} if second else None,
        **(settings | overrides),
    )
    counts, token_loss = [], trainer.token_loss
    trainer.token_loss = lambda tokens: (counts.append(len(tokens.labels)), token_loss(tokens))[1]
    with LargestTensor() as largest:
        trainer.train()
    assert len(logged(trainer, "loss")) == 1 and min(counts) >= 10 * CHUNK and min(counts) > max(WIDTHS.values())
    return largest, counts, logged(trainer, "kd/set_size_max")[0]


@POLICIES
@pytest.mark.parametrize("form", SPARSE)
def test_training_on_sets_makes_no_logits_of_all_tokens(tokenizer, tmp_path, form, lmbda):
    options, steps = SPARSE[form]
    largest, *_ = train_sparse(tokenizer, tmp_path, lmbda=lmbda, gradient_accumulation_steps=steps, **options)
    assert no_more_than(1, largest.rows)


@pytest.mark.parametrize("form", SPARSE)
def test_training_on_sets_copies_no_head_for_each_token(tokenizer, tmp_path, form):
    options, _ = SPARSE[form]
    sets = {"action_set": "full", "max_actions": 64}
    largest, counts, size = train_sparse(tokenizer, tmp_path, **(options | sets))
    assert size == 64 and largest.numel < min(counts) * size * 32 / 4


class GatheringTrainer(SparseTDTrainer):
    """The rows of the head for each token, beside a good loss."""

    def token_loss(self, tokens):
        ids = torch.arange(64).expand(len(tokens.labels), 64)
        torch.einsum("nh,nkh->nk", tokens.pairs["student"][0], tokens.pairs["student"][1].weight[ids])
        return super().token_loss(tokens)


def test_training_that_copies_the_head_for_each_token_is_seen(tokenizer, tmp_path):
    largest, counts, _ = train_sparse(tokenizer, tmp_path, trainer_class=GatheringTrainer)
    assert largest.numel >= min(counts) * 64 * 32


@pytest.fixture(scope="module")
def long_cache(tokenizer, tmp_path_factory):
    teacher = pair(tokenizer)[1]
    teacher.resize_token_embeddings(VOCAB_SIZE)
    folder = tmp_path_factory.mktemp("cache")
    trainer = make_sparse_trainer(tokenizer, folder, long_rows(), max_length=2 * LENGTH)
    read = (trainer.train_dataset, LocalTeacher(teacher), tokenizer)
    write_cache(*read, folder / "cache", trainer.eos_token_ids, CacheSettings())
    return str(folder / "cache")


FROM_CACHE = {"preset": "paper", "gauge": "raw", "tail_weight": 0.0, "lm_weight": 0.0}


@pytest.mark.parametrize("options", [FROM_CACHE, FROM_CACHE | TD], ids=["paper", "teacher_reward"])
def test_training_from_a_cache_makes_no_logits_of_the_vocabulary(tokenizer, tmp_path, long_cache, options):
    largest, *_ = train_sparse(tokenizer, tmp_path, long_cache, **options)
    # One row of logits for each text is what a model's own forward makes for its last token
    assert largest.rows == ROWS


@pytest.mark.parametrize(
    "options", [{"gauge": "max"}, {"gauge": "logsoftmax"}, {"tail_weight": 0.1}, {"lm_weight": 0.1}], ids=str
)
def test_training_from_a_cache_that_needs_the_vocabulary_makes_a_chunk(tokenizer, tmp_path, long_cache, options):
    largest, *_ = train_sparse(tokenizer, tmp_path, long_cache, **(FROM_CACHE | options))
    assert largest.rows == CHUNK

"""What AMMTrainer's options do to the loss, against plain sums over the logits of the whole batch."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainer.runs import config, logged, pair, tiny_dataset
from trl_kd import AMMTrainer


def per_token(trainer, student):
    """Float64 lists over the trained tokens of the first four rows: both distributions, labels, positions."""
    rows = []
    for row in (trainer.train_dataset[i] for i in range(4)):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            log_s, log_t = (m(ids).logits[0].double().log_softmax(-1) for m in (student, trainer.teacher.model))
        trained = [i for i in range(len(labels) - 1) if labels[i + 1] != -100]
        rows += [(log_s[i], log_t[i], int(labels[i + 1]), n) for n, i in enumerate(trained)]
    return rows


def moment(log_s, log_t, critic):
    p_s, p_t = log_s.exp(), log_t.exp()
    if critic == "exact":
        return (p_t - p_s).abs().sum()
    return ((p_t - p_s) ** 2 / (p_t + p_s)).sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"critic": "exact_penalised"},
        {"gamma": 0.8},
        {"sft_loss_weight": 0.7},
        {"kl_loss_weight": 0.4},
        {"critic": "exact_penalised", "gamma": 0.9, "sft_loss_weight": 0.3, "kl_loss_weight": 0.2},
    ],
    ids=str,
)
def test_loss_is_the_weighted_sum_that_the_options_say(tokenizer, tmp_path, options):
    student, teacher = pair(tokenizer)
    trainer = AMMTrainer(
        student, teacher, config(tmp_path, max_steps=1, lmbda=0.0, **options), tiny_dataset(), None, tokenizer
    )
    tokens = per_token(trainer, student)
    trainer.train()
    expected = 0.0
    for log_s, log_t, label, position in tokens:
        expected += options.get("gamma", 1.0) ** position * moment(log_s, log_t, options.get("critic", "exact"))
        expected -= options.get("sft_loss_weight", 0.0) * log_s[label]
        expected += options.get("kl_loss_weight", 0.0) * (log_t.exp() * (log_t - log_s)).sum()
    assert logged(trainer, "loss")[0] == pytest.approx((expected / len(tokens)).item(), rel=1e-5)


def test_sft_loss_leaves_on_policy_rows_out(tokenizer, tmp_path):
    losses = {}
    for weight in (0.0, 0.5):
        student, teacher = pair(tokenizer)
        args = config(tmp_path, max_steps=1, temperature=0.0, sft_loss_weight=weight)
        trainer = AMMTrainer(student, teacher, args, tiny_dataset(), processing_class=tokenizer)
        trainer.train()
        losses[weight] = trainer.state.log_history[0]
    added = losses[0.5]["loss"] - losses[0.0]["loss"]
    assert losses[0.5]["kd/on_policy/tokens"] > 0
    # The mean over off-policy tokens, at its full weight
    assert added == pytest.approx(0.5 * losses[0.5]["kd/off_policy/nll"], rel=1e-4)
    assert losses[0.5]["kd/on_policy/nll"] != pytest.approx(losses[0.5]["kd/off_policy/nll"], rel=1e-3)


def test_logged_values_describe_both_sources(tokenizer, tmp_path):
    student, teacher = pair(tokenizer)
    args = config(tmp_path, max_steps=1, lmbda=0.0)
    trainer = AMMTrainer(student, teacher, args, tiny_dataset(), processing_class=tokenizer)
    tokens = per_token(trainer, student)
    trainer.train()
    log = trainer.state.log_history[0]
    entropies = [[-(row[which].exp() * row[which]).sum() for row in tokens] for which in (0, 1)]
    assert log["kd/off_policy/student_entropy"] == pytest.approx(torch.stack(entropies[0]).mean().item(), rel=1e-5)
    assert log["kd/off_policy/teacher_entropy"] == pytest.approx(torch.stack(entropies[1]).mean().item(), rel=1e-5)
    assert log["kd/off_policy/moment"] == pytest.approx(2 * log["kd/off_policy/total_variation"], rel=1e-5)
    assert not any(name.startswith("kd/on_policy/") and name != "kd/on_policy/tokens" for name in log)


class LargestLogits(TorchDispatchMode):
    """Most rows of any logits over forward and backward; heads (transposed, or their gradients) aside."""

    def __init__(self, vocab_size, widths):
        super().__init__()
        self.vocab_size, self.widths, self.rows = vocab_size, widths, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == self.vocab_size:
                # What is stored: an expanded head has many rows in name only
                stored = tensor.untyped_storage().nbytes() // tensor.element_size() // self.vocab_size
                if stored not in self.widths:
                    self.rows = max(self.rows, stored)
        return output


@pytest.mark.parametrize("chunk_size", [4, 1000])
def test_training_holds_no_more_logits_than_a_chunk(tokenizer, tmp_path, chunk_size):
    student, teacher = pair(tokenizer)
    for model in (student, teacher):
        model.resize_token_embeddings(389)  # a prime: no other dimension is like it
    options = {"sft_loss_weight": 0.1, "kl_loss_weight": 0.1, "loss_chunk_size": chunk_size, "lmbda": 0.0}
    trainer = AMMTrainer(student, teacher, config(tmp_path, **options), tiny_dataset(), processing_class=tokenizer)
    batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    with LargestLogits(389, widths=(32, 48)) as largest:
        trainer.compute_loss(trainer.model.train(), batches[0]).backward()
    # One row of logits for each of the 4 texts is what `logits_to_keep=1` makes
    assert largest.rows == max(4, min(chunk_size, int(count)))

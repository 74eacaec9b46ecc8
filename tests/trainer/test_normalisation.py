"""Decision: a loss is divided by the tokens of the whole optimizer step, however the step is split."""

import pytest
import torch

from tests.trainer.runs import ProjectingTrainer, config, logged, pair, tiny_dataset
from trl_kd import AMMTrainer


# The same rows in every split; greedy, so that rollouts are the same too
SPLITS = [(4, 1), (2, 2), (1, 4)]


def run(tokenizer, tmp_path, batch_size, accumulation, trainer_class=AMMTrainer, **overrides):
    student, teacher = pair(tokenizer)
    args = config(
        tmp_path / f"{batch_size}x{accumulation}",
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        temperature=0.0,
        **overrides,
    )
    trainer = trainer_class(student, teacher, args, tiny_dataset(), processing_class=tokenizer)
    trainer.train()
    return trainer


@pytest.mark.parametrize("overrides", [{}, {"sft_loss_weight": 0.3, "kl_loss_weight": 0.2, "gamma": 0.9}])
def test_gradient_norm_any_split_of_the_batch_is_equal(tokenizer, tmp_path, overrides):
    runs = [run(tokenizer, tmp_path, *split, **overrides) for split in SPLITS]
    assert logged(runs[0], "kd/on_policy/tokens")[0] > 0
    assert logged(runs[0], "kd/off_policy/tokens")[0] > 0
    for name in ("grad_norm", "loss"):
        expected = logged(runs[0], name)
        assert len(expected) == 2
        for other in runs[1:]:
            assert logged(other, name) == pytest.approx(expected, rel=1e-5)


def test_gradient_norm_auxiliary_modules_any_split_is_equal(tokenizer, tmp_path):
    runs = [run(tokenizer, tmp_path, *split, trainer_class=ProjectingTrainer) for split in SPLITS]
    expected = logged(runs[0], "kd/aux_grad_norm")
    assert min(expected) > 1e-4
    for other in runs[1:]:
        assert logged(other, "kd/aux_grad_norm") == pytest.approx(expected, rel=1e-5)


def test_loss_is_mixed_mean_of_each_source_over_its_own_tokens(tokenizer, tmp_path):
    trainer = run(tokenizer, tmp_path, 2, 2, on_policy_weight=0.25)
    log = trainer.state.log_history[0]
    off, on = log["kd/off_policy/moment"], log["kd/on_policy/moment"]
    assert abs(off - on) > 1e-3
    assert log["loss"] == pytest.approx(0.75 * off + 0.25 * on, rel=1e-5)


def test_loss_one_source_absent_takes_the_other(tokenizer, tmp_path):
    for lmbda, source in ((0.0, "off_policy"), (1.0, "on_policy")):
        log = run(tokenizer, tmp_path, 2, 2, lmbda=lmbda).state.log_history[0]
        assert log["loss"] == pytest.approx(log[f"kd/{source}/moment"], rel=1e-5)
        assert log["kd/off_policy/tokens"] == 0 or log["kd/on_policy/tokens"] == 0


def test_gradient_equals_plain_total_variation_of_the_whole_batch(tokenizer, tmp_path):
    """Independent of trainer, selection and chunks: one padded batch, full logits, autograd."""
    student, teacher = pair(tokenizer)
    trainer = run(tokenizer, tmp_path, 2, 2, lmbda=0.0, max_steps=1, loss_chunk_size=5)
    rows = [trainer.train_dataset[i] for i in range(4)]
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        p_s, p_t = student(ids).logits[0].softmax(-1), teacher(ids).logits[0].softmax(-1).detach()
        for position in range(len(labels) - 1):
            if labels[position + 1] != -100:
                total = total + (p_t[position] - p_s[position]).abs().sum()
                count += 1
    (total / count).backward()
    norm = torch.stack([p.grad.norm() for p in student.parameters() if p.grad is not None]).norm()
    assert logged(trainer, "grad_norm")[0] == pytest.approx(norm.item(), rel=1e-5)
    assert logged(trainer, "loss")[0] == pytest.approx((total / count).item(), rel=1e-5)


def test_stream_whose_end_leaves_half_a_step_trains_on_whole_steps(tokenizer, tmp_path):
    """The Trainer would keep the gradient of the leftover micro-batch for the next epoch's first step."""
    student, teacher = pair(tokenizer)
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 3}
    args = config(tmp_path, lmbda=0.0, learning_rate=1e-9, **sizes)
    stream = tiny_dataset(12).to_iterable_dataset()
    trainer = AMMTrainer(student, teacher, args, stream, processing_class=tokenizer)
    trainer.train()
    first, *others = logged(trainer, "loss")
    assert others == pytest.approx([first] * 2, rel=1e-5)
    assert logged(trainer, "grad_norm") == pytest.approx([logged(trainer, "grad_norm")[0]] * 3, rel=1e-5)

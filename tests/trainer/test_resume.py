"""A run that is interrupted goes on to the same numbers, bit for bit."""

import math
import os

import pytest
import torch
from peft import LoraConfig

from tests.trainer.runs import ProjectingTrainer, config, logged, pair, same, state_of, tiny_dataset, weights
from trl_kd.trainer import auxiliary, checkpoints


def make_trainer(tokenizer, folder, lora, eval_dataset=None, **overrides):
    student, teacher = pair(tokenizer)
    # Sampled rollouts, dropout in the adapter, random data order: everything that draws
    args = config(
        folder,
        max_steps=6,
        save_strategy="steps",
        save_steps=3,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        train_sampling_strategy="random",
        lr_scheduler_type="cosine",
        aux_lr_scheduler_type="cosine",
        **overrides,
    )
    peft_config = LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear") if lora else None
    return ProjectingTrainer(student, teacher, args, tiny_dataset(), eval_dataset, tokenizer, peft_config=peft_config)


@pytest.fixture(scope="module", params=[False, True], ids=["full", "lora"])
def uninterrupted(request, tokenizer, tmp_path_factory):
    trainer = make_trainer(tokenizer, tmp_path_factory.mktemp("whole"), request.param)
    trainer.train()
    return request.param, trainer, state_of(trainer)


def assert_same_run(resumed, uninterrupted_trainer, uninterrupted_state):
    for name in ("loss", "grad_norm", "kd/aux_grad_norm", "kd/on_policy/distinct_2", "learning_rate"):
        assert logged(resumed, name)[-3:] == logged(uninterrupted_trainer, name)[-3:], name
    for resumed_part, expected in zip(state_of(resumed), uninterrupted_state, strict=True):
        assert same(resumed_part, expected)


def test_auxiliary_schedule_spans_the_run(uninterrupted):
    _, whole, _ = uninterrupted
    expected = [whole.args.aux_learning_rate * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert logged(whole, "kd/aux_learning_rate") == pytest.approx(expected, rel=1e-6)


def test_resume_after_half_equals_uninterrupted(tokenizer, uninterrupted):
    lora, whole, state = uninterrupted
    assert len(set(logged(whole, "loss"))) == 6
    resumed = make_trainer(tokenizer, whole.args.output_dir, lora)
    resumed.train(resume_from_checkpoint=os.path.join(whole.args.output_dir, "checkpoint-3"))
    assert_same_run(resumed, whole, state)


@pytest.mark.parametrize("killed_at", ["auxiliary", "marker"])
def test_resume_after_kill_in_the_middle_of_a_save_equals_uninterrupted(
    tokenizer, uninterrupted, tmp_path, monkeypatch, killed_at
):
    lora, whole, state = uninterrupted
    # Half of the files are there, or all of them but the marker
    owner, name = {"auxiliary": (auxiliary.AuxiliaryModules, "save"), "marker": (checkpoints, "mark")}[killed_at]
    save = getattr(owner, name)

    def killed(*args):
        if any(str(arg).endswith("checkpoint-6") for arg in args):
            raise KeyboardInterrupt
        return save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(KeyboardInterrupt):
            make_trainer(tokenizer, tmp_path, lora, save_total_limit=1).train()
    # The old checkpoint is still there, though only one is to be kept: the new one never became complete
    assert sorted(name for name in os.listdir(tmp_path) if name.startswith("checkpoint")) == [
        "checkpoint-3",
        "checkpoint-6",
    ]
    resumed = make_trainer(tokenizer, tmp_path, lora, save_total_limit=1)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, whole, state)
    assert [name for name in os.listdir(tmp_path) if name.startswith("checkpoint")] == ["checkpoint-6"]


def test_resume_partial_checkpoint_by_name_raises(tokenizer, uninterrupted, tmp_path):
    partial = tmp_path / "checkpoint-3"
    partial.mkdir()
    trainer = make_trainer(tokenizer, tmp_path, lora=False)
    with pytest.raises(
        ValueError, match="checkpoint-3` is partial: it has no `trl_kd_complete.json`.*newest complete"
    ):
        trainer.train(resume_from_checkpoint=str(partial))
    with pytest.raises(ValueError, match=r"no complete checkpoint to resume from \(partial ones: 1\)"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="is not a folder"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


def test_resume_truncated_auxiliary_file_raises(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, lora=False, save_total_limit=2)
    trainer.train()
    path = tmp_path / "checkpoint-3" / auxiliary.AUXILIARY_FILE
    path.write_bytes(path.read_bytes()[:100])
    resumed = make_trainer(tokenizer, tmp_path, lora=False)
    with pytest.raises(ValueError, match=r"auxiliary modules \['projector'\] could not be restored"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_checkpoint_saved_again_is_unmarked_first(tmp_path):
    checkpoints.mark(str(tmp_path), 3)
    assert checkpoints.is_complete(str(tmp_path))
    checkpoints.unmark(str(tmp_path))
    assert not checkpoints.is_complete(str(tmp_path))


def test_save_auxiliary_is_explicit(tokenizer, uninterrupted, tmp_path):
    from safetensors.torch import load_file

    _, whole, _ = uninterrupted
    whole.save_model(str(tmp_path / "student"))
    assert not any("aux" in name for name in os.listdir(tmp_path / "student"))
    whole.save_auxiliary(str(tmp_path / "critic"))
    assert same(load_file(tmp_path / "critic" / "auxiliary.safetensors"), weights(whole.auxiliary.modules))


def test_best_model_at_end_restores_auxiliary_too(tokenizer, tmp_path):
    # The first checkpoint is the best by construction: the metric is to be greater, and it falls
    trainer = make_trainer(
        tokenizer,
        tmp_path,
        lora=False,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        eval_dataset=tiny_dataset(4),
    )
    trainer.train()
    assert logged(trainer, "eval_loss")[0] > logged(trainer, "eval_loss")[1]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    saved = torch.load(tmp_path / "checkpoint-3" / auxiliary.AUXILIARY_FILE, weights_only=True)
    assert same(weights(trainer.auxiliary.modules), saved["modules"])

"""A run with learned critics, or with a baseline of returns, that is interrupted goes on to the same numbers."""

import os

import pytest
import torch
from peft import LoraConfig

from tests.trainer.runs import config, logged, pair, same, state_of, tiny_dataset
from trl_kd import AMMTrainer
from trl_kd.trainer.auxiliary import AUXILIARY_FILE


CRITIC = {"critic": "value_head"}
VALUE = {"on_policy_gradient": "full", "later_baseline": "value", "later_warmup_steps": 4}
# By what is trained; both orders, both layers of state, both kinds of training
GAMES = {
    "critic_before-full": CRITIC,
    "critic_after_of_both-lora": CRITIC | {"critic_features": "both", "critic_order": "after"},
    "value-full": VALUE,
    "critic_and_value-lora": CRITIC | VALUE | {"critic_head": "low_rank", "critic_rank": 4},
}


def make_trainer(tokenizer, folder, name):
    """Sampled rollouts, dropout in the adapter, random data order: everything that draws."""
    args = config(
        folder,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        train_sampling_strategy="random",
        **GAMES[name],
    )
    lora = LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear") if name.endswith("lora") else None
    student, teacher = pair(tokenizer)
    return AMMTrainer(student, teacher, args, tiny_dataset(), processing_class=tokenizer, peft_config=lora)


@pytest.mark.parametrize("name", GAMES)
def test_resume_after_half_equals_uninterrupted(tokenizer, tmp_path, name):
    whole = make_trainer(tokenizer, tmp_path, name)
    whole.train()
    resumed = make_trainer(tokenizer, tmp_path, name)
    resumed.train(resume_from_checkpoint=os.path.join(tmp_path, "checkpoint-2"))
    names = [key for key in whole.state.log_history[-2] if key.startswith("kd/")] + ["loss", "grad_norm"]
    assert ("kd/off_policy/unseen_moment" in names) == ("critic" in name)
    assert ("kd/on_policy/advantage_size" in names) == ("value" in name)
    for key in names:
        assert len(logged(whole, key)) == 4 and logged(resumed, key)[-2:] == logged(whole, key)[-2:], key
    # A restart with fresh critics, or a fresh baseline, would show
    saved = torch.load(tmp_path / "checkpoint-2" / AUXILIARY_FILE, weights_only=True)["modules"]
    learned = [key for key in saved if key.rsplit(".", 1)[1] in ("weight", "gram", "target")]
    assert len(learned) == 2 * ("critic" in name) + 2 * ("value" in name)
    assert all(saved[key].abs().max() > 1e-3 for key in learned)
    for part, expected in zip(state_of(resumed), state_of(whole), strict=True):
        assert same(part, expected)


def test_resume_with_another_critic_raises(tokenizer, tmp_path):
    make_trainer(tokenizer, tmp_path, "critic_before-full").train()
    student, teacher = pair(tokenizer)
    args = config(tmp_path, critic="value_head", critic_head="full", max_steps=4)
    other = AMMTrainer(student, teacher, args, tiny_dataset(), processing_class=tokenizer)
    message = r"auxiliary modules \['off_policy', 'on_policy'\] could not be restored from .*checkpoint-2"
    with pytest.raises(ValueError, match=message):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

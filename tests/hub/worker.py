"""
What the processes of `test_hub.py` do: `python -m tests.hub.worker train|resume FOLDER`. They know the Hub by
`HF_ENDPOINT` and `HF_TOKEN` alone. Each leaves what it found in `FOLDER/<name>.json`.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from huggingface_hub import upload_file
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback

from tests.evaluation import report_cases
from tests.tiny import make_model, make_tokenizer
from tests.trainer.runs import config, logged, tiny_dataset
from trl_kd import AMMTrainer
from trl_kd.evaluation.card import update_model_card


STUDENT, TEACHER, FULL, LORA = "somebody/base", "somebody/teacher", "somebody/distilled", "somebody/adapter"
STEPS, CUT = 4, 2


class CutOff(TrainerCallback):
    """Ends a run as if its machine had gone, once a step has been saved."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == CUT:
            control.should_training_stop = True


def digest(model: torch.nn.Module) -> str:
    """One string for all weights, bit for bit."""
    total = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        total.update(name.encode() + weight.contiguous().numpy().tobytes())
    return total.hexdigest()


def trainer_of(folder: Path, peft_config: LoraConfig | None = None, **overrides) -> AMMTrainer:
    settings = {"max_steps": STEPS, "critic": "value_head", "lmbda": 0.5, "critic_steps": 2, **overrides}
    args = config(folder, teacher_model_name_or_path=TEACHER, **settings)
    return AMMTrainer(model=STUDENT, args=args, train_dataset=tiny_dataset(), peft_config=peft_config)


def pushing() -> dict:
    return {
        **{"push_to_hub": True, "hub_model_id": FULL, "hub_private_repo": True, "hub_strategy": "checkpoint"},
        # Given here too, where it would be written beside the student
        **{"hub_token": os.environ["HF_TOKEN"], "teacher_model_init_kwargs": {"token": os.environ["HF_TOKEN"]}},
        **{"save_strategy": "steps", "save_steps": CUT, "hub_always_push": True},
    }


def found_by(trainer: AMMTrainer) -> dict:
    return {"losses": logged(trainer, "loss"), "weights": digest(trainer.accelerator.unwrap_model(trainer.model))}


def put_models() -> None:
    tokenizer = make_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for name, size, seed in ((STUDENT, 32, 1), (TEACHER, 48, 2)):
        make_model("llama", len(tokenizer), hidden_size=size, seed=seed, **ids).push_to_hub(name)
        tokenizer.push_to_hub(name)


def train(folder: Path) -> dict:
    """An uninterrupted run, the same cut off after it has pushed a checkpoint, and one with an adapter."""
    put_models()
    whole = trainer_of(folder / "whole")
    whole.train()

    cut = trainer_of(folder / "cut", **pushing())
    cut.add_callback(CutOff())
    cut.train()
    shutil.rmtree(folder / "cut")

    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    lora = trainer_of(folder / "lora", adapter, max_steps=1, hub_model_id=LORA, critic="exact")
    lora.train()
    lora.push_to_hub()
    tokens = torch.tensor([AutoTokenizer.from_pretrained(STUDENT)("The sky is")["input_ids"]])
    with torch.no_grad():
        logits = lora.model.eval()(tokens).logits
    return {"whole": found_by(whole), "cut": found_by(cut), "tokens": tokens.tolist(), "logits": logits.tolist()}


def resume(folder: Path) -> dict:
    """Another machine goes on with the checkpoint on the Hub, and pushes the end with its evaluation."""
    trainer = trainer_of(folder / "resumed", **pushing())
    trainer.train(resume_from_checkpoint=FULL)
    trainer.push_to_hub(dataset_name="stories")
    update_model_card(folder / "resumed", report_cases.usual(), "amm")
    upload_file(path_or_fileobj=folder / "resumed" / "README.md", path_in_repo="README.md", repo_id=FULL)
    return found_by(trainer)


if __name__ == "__main__":
    torch.set_num_threads(1)
    action, where = sys.argv[1], Path(sys.argv[2])
    result = {"train": train, "resume": resume}[action](where)
    (where / f"{action}.json").write_text(json.dumps(result))

"""One rank of a two-process run on CPUs (gloo); started by `torch.distributed.run`, writes what happened as JSON."""

import hashlib
import json
import sys
from pathlib import Path

from peft import LoraConfig

from tests import conftest  # noqa: F401  (environment and threads)
from tests.tiny import make_tokenizer
from tests.trainer.runs import ProjectingTrainer, config, logged, pair, state_of, tiny_dataset


NUMBERS = ["loss", "grad_norm", "kd/aux_grad_norm", "kd/on_policy/completion_length"]
NUMBERS += [
    f"kd/{source}/{name}" for source in ("off_policy", "on_policy") for name in ("tokens", "moment", "distance")
]
SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "train_sampling_strategy": "random"}


class KilledTrainer(ProjectingTrainer):
    """Dies in its last save: weights and optimizer are written, auxiliary modules and random states are not."""

    def save_state_to(self, folder: str) -> None:
        if folder.endswith("checkpoint-6"):
            raise KeyboardInterrupt
        super().save_state_to(folder)


def run(folder: Path, lora: bool = False, resume: str | bool = False, killed: bool = False, **overrides) -> dict:
    """Train on this rank; what it logged and ended with."""
    tokenizer = make_tokenizer()
    student, teacher = pair(tokenizer)
    peft_config = LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear") if lora else None
    args = config(folder, per_device_train_batch_size=2, **overrides)
    trainer = (KilledTrainer if killed else ProjectingTrainer)(
        student, teacher, args, tiny_dataset(), processing_class=tokenizer, peft_config=peft_config
    )
    if killed:
        try:
            trainer.train()
        except KeyboardInterrupt:
            return {}
        raise AssertionError("the run was not killed")
    trainer.train(resume_from_checkpoint=resume)
    digest = hashlib.sha256()
    for part in state_of(trainer):
        for _, value in sorted(part.items()):
            digest.update(value.contiguous().numpy().tobytes())
    report = {name: logged(trainer, name) for name in NUMBERS}
    rank, written = trainer.accelerator.process_index, trainer.rollouts.last_completions
    return report | {"rank": rank, "rollouts": len(written), "weights": digest.hexdigest()}


def main(scenario: str, folder: Path) -> None:
    if scenario == "norm":
        reports = [run(folder, max_steps=2, temperature=0.0, learning_rate=1e-3)]
    else:
        reports = []
        for name, lora in (("full", False), ("lora", True)):
            reports.append(run(folder / name, lora, **SAVING))
            reports.append(run(folder / name, lora, str(folder / name / "checkpoint-3"), **SAVING))
        run(folder / "killed", killed=True, **SAVING)
        reports.append(run(folder / "killed", resume=True, **SAVING))
    (folder / f"{scenario}-{reports[0]['rank']}.json").write_text(json.dumps(reports))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

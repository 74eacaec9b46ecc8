"""Peak memory of one training step, in MiB, with the teacher from one source; to be run as a process of its own."""

import sys
from pathlib import Path

import torch
from peft import LoraConfig

from tests.tiny import make_tokenizer
from tests.trainer.runs import tiny_dataset
from tests.trainer.test_teacher_sources import TRAINERS


def status(name: str) -> float:
    """A line of this process's status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def main(method: str, source: str, path: str, out: str) -> None:
    torch.set_num_threads(1)
    trainer_class, config_class = TRAINERS[method]
    args = config_class(
        output_dir=out,
        max_steps=1,
        per_device_train_batch_size=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        lmbda=0.0,
        loss_chunk_size=16,
        teacher_adapter="base" if source == "base" else None,
    )
    before = status("VmRSS")
    trainer = trainer_class(
        path,
        path if source == "copy" else None,
        args,
        tiny_dataset(2),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )
    trainer.train()
    sys.stdout.write(f"{status('VmHWM') - before}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

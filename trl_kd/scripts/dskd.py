"""
Distil a teacher into a student by dual-space distillation, also across tokenizers.

# Full training
```bash
trl-kd dskd \
    --model_name_or_path HuggingFaceTB/SmolLM2-360M-Instruct \
    --teacher_model_name_or_path Qwen/Qwen2.5-1.5B-Instruct \
    --dataset_name data.jsonl \
    --learning_rate 2.0e-5 \
    --num_train_epochs 1 \
    --output_dir SmolLM2-360M-DSKD
```

# LoRA
```bash
trl-kd dskd \
    --model_name_or_path HuggingFaceTB/SmolLM2-360M-Instruct \
    --teacher_model_name_or_path Qwen/Qwen2.5-1.5B-Instruct \
    --dataset_name data.jsonl \
    --learning_rate 2.0e-4 \
    --num_train_epochs 1 \
    --use_peft \
    --lora_r 32 \
    --lora_alpha 16 \
    --output_dir SmolLM2-360M-DSKD
```
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from trl import TrlParser


def make_parser(prog: str | None = None) -> "TrlParser":
    """Parser of every option of the script, the trainer, the models and the data."""
    from trl_kd import DSKDConfig
    from trl_kd.scripts import training

    description = "Distil a teacher into a student by dual-space distillation (DSKD), also across tokenizers."
    return training.make_parser(DSKDConfig, "trl_kd.scripts.dskd", description, prog)


def run(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse the command line and train."""
    from trl_kd.scripts import training

    parsed = training.parse(make_parser(prog), arguments)
    from trl_kd import DSKDTrainer

    training.train(DSKDTrainer, *parsed)


if __name__ == "__main__":
    run()

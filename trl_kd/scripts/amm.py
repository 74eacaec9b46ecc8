"""
Distil a teacher into a student by adversarial moment matching.

# Full training
```bash
trl-kd amm \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --teacher_model_name_or_path Qwen/Qwen2.5-1.5B-Instruct \
    --dataset_name data.jsonl \
    --learning_rate 2.0e-5 \
    --num_train_epochs 1 \
    --output_dir Qwen2.5-0.5B-AMM
```

# LoRA
```bash
trl-kd amm \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --teacher_model_name_or_path Qwen/Qwen2.5-1.5B-Instruct \
    --dataset_name data.jsonl \
    --learning_rate 2.0e-4 \
    --num_train_epochs 1 \
    --use_peft \
    --lora_r 32 \
    --lora_alpha 16 \
    --output_dir Qwen2.5-0.5B-AMM
```
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from trl import TrlParser


def make_parser(prog: str | None = None) -> "TrlParser":
    """Parser of every option of the script, the trainer, the models and the data."""
    from trl_kd import AMMConfig
    from trl_kd.scripts import training

    description = "Distil a teacher into a student by adversarial moment matching (AMM)."
    return training.make_parser(AMMConfig, "trl_kd.scripts.amm", description, prog)


def run(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse the command line and train."""
    from trl_kd.scripts import training

    parsed = training.parse(make_parser(prog), arguments)
    from trl_kd import AMMTrainer

    training.train(AMMTrainer, *parsed)


if __name__ == "__main__":
    run()

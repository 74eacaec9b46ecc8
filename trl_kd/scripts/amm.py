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

from functools import partial

from trl_kd.scripts import training


make_parser = partial(training.make_parser, "amm")
run = partial(training.run, "amm")


if __name__ == "__main__":
    run()

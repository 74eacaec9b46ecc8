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

from functools import partial

from trl_kd.scripts import training


make_parser = partial(training.make_parser, "dskd")
run = partial(training.run, "dskd")


if __name__ == "__main__":
    run()

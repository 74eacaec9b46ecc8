"""
Distil a teacher into a student on the teacher's likeliest tokens, also from a cache of them.

# Full training
```bash
trl-kd sparse-td \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --teacher_model_name_or_path Qwen/Qwen2.5-1.5B-Instruct \
    --dataset_name data.jsonl \
    --learning_rate 2.0e-5 \
    --num_train_epochs 1 \
    --output_dir Qwen2.5-0.5B-SparseTD
```

# LoRA, from a cache: the teacher is read once, and is not loaded for training
```bash
trl-kd cache \
    --teacher_model_name_or_path Qwen/Qwen2.5-7B-Instruct \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --dataset_name data.jsonl \
    --output_dir teacher_cache
trl-kd sparse-td \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --teacher_cache teacher_cache \
    --dataset_name data.jsonl \
    --learning_rate 2.0e-4 \
    --num_train_epochs 1 \
    --use_peft \
    --lora_r 32 \
    --lora_alpha 16 \
    --output_dir Qwen2.5-0.5B-SparseTD
```
"""

from functools import partial

from trl_kd.scripts import training


make_parser = partial(training.make_parser, "sparse-td")
run = partial(training.run, "sparse-td")


if __name__ == "__main__":
    run()

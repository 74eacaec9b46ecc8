"""
Distil a teacher into a student with another tokenizer, with DSKD and LoRA.

    python examples/dskd.py

The dataset has `messages`: each model reads a conversation by its own chat template, and the two are compared wherever
both have read the same part of the answer.
"""

from datasets import load_dataset
from peft import LoraConfig

from trl_kd import DSKDConfig, DSKDTrainer


dataset = load_dataset("trl-lib/Capybara", split="train")

trainer = DSKDTrainer(
    model="HuggingFaceTB/SmolLM2-360M-Instruct",
    teacher_model="Qwen/Qwen2.5-1.5B-Instruct",
    args=DSKDConfig(
        output_dir="SmolLM2-360M-DSKD",
        preset="context",
        # Frozen weights in bfloat16; the adapter is float32
        model_init_kwargs={"dtype": "bfloat16"},
        learning_rate=1e-4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        max_length=1024,
        max_steps=500,
    ),
    train_dataset=dataset,
    peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear"),
)
trainer.train()
trainer.save_model()

"""
Distil an instruction-tuned teacher into a smaller student with AMM and LoRA.

    python examples/amm.py

The dataset has a column of prompts only: half of the completions in each step are written by the student, the other
half by the teacher. With a column `completion`, the dataset's own take the teacher's place.
"""

from datasets import load_dataset
from peft import LoraConfig

from trl_kd import AMMConfig, AMMTrainer


dataset = load_dataset("trl-lib/ultrafeedback-prompt", split="train")

trainer = AMMTrainer(
    model="Qwen/Qwen2.5-0.5B-Instruct",
    teacher_model="Qwen/Qwen2.5-1.5B-Instruct",
    args=AMMConfig(
        output_dir="Qwen2.5-0.5B-AMM",
        # Frozen weights in bfloat16; the adapter is float32
        model_init_kwargs={"dtype": "bfloat16"},
        learning_rate=1e-4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        max_completion_length=256,
        max_steps=500,
        log_completions=True,
        num_completions_to_print=2,
    ),
    train_dataset=dataset,
    peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear"),
)
trainer.train()
trainer.save_model()

"""
Distil a teacher into a student on the teacher's likeliest tokens, with SparseTD and LoRA: once with the teacher in
memory, and once from a cache of its tokens.

    python examples/sparse_td.py

The dataset has `messages`; the last turn of the assistant is trained. The second run needs no teacher: it may be on
another machine, and any number of runs may follow it. With the same seed it sees the same batches as the first.
"""

from datasets import load_dataset
from peft import LoraConfig

from trl_kd import SparseTDConfig, SparseTDTrainer, cli


STUDENT, TEACHER, DATASET = "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", "trl-lib/Capybara"


def distil(**options):
    """A run with the teacher, or with a cache of it."""
    trainer = SparseTDTrainer(
        model=STUDENT,
        args=SparseTDConfig(
            # Frozen weights in bfloat16; the adapter is float32
            model_init_kwargs={"dtype": "bfloat16"},
            learning_rate=1e-4,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            max_length=1024,
            max_steps=500,
            **options,
        ),
        train_dataset=load_dataset(DATASET, split="train"),
        peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()


# The teacher in memory, asked about each batch
distil(output_dir="Qwen2.5-0.5B-SparseTD", teacher_model_name_or_path=TEACHER)

# The teacher asked once about all rows, as `trl-kd cache` does, which goes on where it was cut off; then not again
models = ["--model_name_or_path", STUDENT, "--teacher_model_name_or_path", TEACHER]
cli.main(["cache", *models, "--dataset_name", DATASET, "--max_length", "1024", "--output_dir", "teacher_cache"])
distil(output_dir="Qwen2.5-0.5B-SparseTD-cached", teacher_cache="teacher_cache")

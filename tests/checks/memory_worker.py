"""
Peak memory of a few training steps, in bytes, above what the process had before its models; to be run as a process of
its own.

A run of the same kind with tiny models comes first: what libraries load and keep on their first use is no part of a
plan. Memory is the process's resident set at its highest, so tensors must go back to the system when they are freed:
see `ENVIRONMENT`.
"""

import ctypes
import gc
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from tests.tiny import make_tokenizer
from trl_kd import AMMConfig, AMMTrainer, DSKDConfig, DSKDTrainer, SparseTDConfig, SparseTDTrainer
from trl_kd.checks.memory import PlannedRun


# One heap, and every block of 64 KiB or more mapped by itself and given back when it is freed: the resident set is
# then what is alive, and not what the allocator keeps for later
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
TRAINERS = {
    "amm": (AMMTrainer, AMMConfig),
    "dskd": (DSKDTrainer, DSKDConfig),
    "sparse-td": (SparseTDTrainer, SparseTDConfig),
}
# method, options, LoRA or not, bits: large enough that weights and activations are far above the noise
CASES: dict[str, tuple[str, dict[str, Any], bool, int | None]] = {
    "full": ("amm", {"lmbda": 0.0, "gradient_checkpointing": False, "gradient_accumulation_steps": 2}, False, None),
    "lora": ("amm", {"lmbda": 0.5, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}, True, None),
    "critic": ("amm", {"lmbda": 0.0, "gradient_checkpointing": True, "critic": "value_head"}, False, None),
    "dskd": ("dskd", {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}, False, None),
    "sparse-td": ("sparse-td", {"lmbda": 0.0, "gradient_checkpointing": False}, False, None),
    "qlora": ("amm", {"lmbda": 0.0, "gradient_checkpointing": False}, True, 4),
}
ROW, PROMPT, COMPLETION = 128, 96, 32


def planned_run(case: str, out: str, scale: int = 1) -> PlannedRun:
    """The run of a case; a larger `scale` makes it smaller."""
    method, options, has_adapter, bits = CASES[case]
    is_tiny = scale > 1
    args = TRAINERS[method][1](
        output_dir=out,
        max_steps=2,
        per_device_train_batch_size=4,
        max_length=None,
        max_completion_length=COMPLETION // scale,
        generation_kwargs={"min_new_tokens": COMPLETION // scale},
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    adapter = None
    if has_adapter:
        from peft import LoraConfig

        adapter = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return PlannedRun(
        method=method,
        args=args,
        student=llama(384, 8, 16_384, is_tiny),
        teacher=llama(512, 4, 16_384, is_tiny),
        student_dtype=torch.float32,
        student_bits=bits,
        peft_config=adapter,
        teacher_dtype=torch.float32,
        longest=ROW // scale,
        longest_prompt=PROMPT // scale,
        trained_tokens=(ROW - PROMPT if options.get("lmbda", 0) > 0 else ROW) // scale,
        device_type="cpu",
    )


def llama(width: int, layers: int, vocab_size: int, is_tiny: bool) -> LlamaConfig:
    """A Llama of this size, with a quarter of the heads for keys and values."""
    if is_tiny:
        width, layers, vocab_size = 64, 2, 512
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )


def train(run: PlannedRun) -> None:
    """Two steps of this run on rows that are all as long as its longest."""
    tokenizer = make_tokenizer()
    row = [5 + i % 300 for i in range(run.longest)]
    prompt = run.longest_prompt
    labels = [-100] * (run.longest - run.trained_tokens) + row[run.longest - run.trained_tokens :]
    count = 2 * run.args.per_device_train_batch_size * run.args.gradient_accumulation_steps
    dataset = Dataset.from_list([{"input_ids": row, "labels": labels, "prompt_length": prompt}] * count)
    run = replace(run, args=replace(run.args, max_length=run.longest))
    trainer = TRAINERS[run.method][0](
        model=student_of(run),
        teacher_model=AutoModelForCausalLM.from_config(run.teacher, dtype=run.teacher_dtype),
        args=run.args,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=run.peft_config,
    )
    trainer.train()


def student_of(run: PlannedRun) -> Any:
    """The student, loaded in 4 bit from a folder if it is quantised."""
    model = AutoModelForCausalLM.from_config(run.student, dtype=run.student_dtype)
    if run.student_bits is None:
        return model
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=run.student_dtype
        )
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantisation, dtype=run.student_dtype)


def resident(name: str) -> int:
    """A line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def main(case: str) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as out:
        train(planned_run(case, out, scale=4))
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        before, start = resident("VmRSS"), time.time()
        train(planned_run(case, out))
    sys.stdout.write(json.dumps({"peak": resident("VmHWM") - before, "seconds": time.time() - start}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])

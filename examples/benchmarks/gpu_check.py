"""
Checks and times what needs a GPU, in one call.

    python examples/benchmarks/gpu_check.py --tokenizer <folder> --teacher_tokenizer <folder> --output_file gpu.json

1. The gradients of every loss on a real vocabulary (151,936 tokens) against the plain form in float64.
2. Time and peak memory in bfloat16 beside bare matrix products and TRL's losses, as `loss_bench.py` measures them.
3. A few steps of AMMTrainer with rollouts on random models of that vocabulary, with LoRA and without, with each kind
   of critic, the full on-policy gradient and other places for the teacher, and of DSKDTrainer, with one vocabulary and
   with two: time, and peak memory beside what `trl-kd check` plans.

Stops where a gradient is wrong or a loss not finite.

Runs on a CPU too, with `--small`, to see that the script itself works.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from floors import Shape, synchronize
from loss_bench import OURS, SIGNED, Setting, gradient_errors, measure
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from trl_kd import AMMConfig, AMMTrainer, DSKDConfig, DSKDTrainer, SparseTDConfig, SparseTDTrainer
from trl_kd.checks.memory import plan_memory
from trl_kd.trainer.check import planned_run_of


def check_losses(device: str, shape: Shape) -> dict[str, Any]:
    """Errors of every loss against float64 on few rows; time and memory beside floors and peers on all of them."""
    chunk_size = 1024 if device == "cuda" else 32
    few = Setting((64, *shape[1:]), 1.0, False, chunk_size, "float32", device)
    args = Namespace(measures=["time", "memory"], rounds=5, threads=1, clock="wall", device=device)
    all_rows = replace(few, shape=shape, dtype="bfloat16")
    errors = gradient_errors([*OURS, *(f"plain_{name}" for name in SIGNED)], few)
    # Rounding decides a sign wherever both probabilities are nearly equal, in the plain form too
    limits = {name: 1.1 * errors[f"plain_{name}"] if name in SIGNED else 1e-5 for name in OURS}
    wrong = {name: errors[name] for name in OURS if not errors[name] <= limits[name]}
    if wrong:
        raise RuntimeError(f"Gradients differ from float64 by {wrong}.")
    return {
        "errors": errors,
        "errors_bfloat16": gradient_errors(OURS, replace(few, dtype="bfloat16")),
        "figures": measure([*OURS, "trl_forward_kl", "trl_jsd"], all_rows, args),
    }


GAMES = {
    "exact": {},
    "exact, full fine-tuning": {"lora": False},
    "learned": {"critic": "value_head"},
    "learned, after": {"critic": "value_head", "critic_order": "after"},
    "learned, low rank": {"critic": "value_head", "critic_head": "low_rank"},
    "full gradient": {"on_policy_gradient": "full"},
}
DUAL = {
    "DSKD v1": {"preset": "v1"},
    "DSKD v2": {"preset": "v2"},
    "DSKD v2, full fine-tuning": {"preset": "v2", "lora": False},
    "DSKD v2, two vocabularies": {"alignment": "eta"},
    "DSKD v1, attention": {"alignment": "cma", "preset": "v1"},
    "DSKD, context": {"alignment": "eta", "preset": "context", "projector_pretraining_steps": 20},
    "simple": {"alignment": "eta", "objective": "simple"},
}

SPARSE = {
    "SparseTD": {},
    "SparseTD, full fine-tuning": {"lora": False},
    "SparseTD, paper": {"preset": "paper"},
    "SparseTD, returns": {
        "objectives": {"expected_inverse_soft_q": 1.0, "teacher_reward": 0.01},
        "returns": "lambda",
        "gauge": "logsoftmax",
        "target_ema": 0.99,
    },
}


SOURCES = {
    "the student's own base": {"teacher_adapter": "base"},
    "offloaded teacher": {"teacher_device": "offload"},
    "teacher on the CPU": {"teacher_device": "cpu"},
}


class StepClock(TrainerCallback):
    """Seconds of each step; the first one compiles."""

    def __init__(self, device: str):
        self.device, self.times = device, []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if not self.times:
            self.on_step_end()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize(self.device)
        self.times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def check_training(
    device: str, width: int, layers: int, paths: list[str], method: str = "amm", lora: bool = True, **options
) -> dict[str, float]:
    """Five steps on random models, in two micro-batches each. `paths`: tokenizers of student and teacher."""
    from transformers import AutoTokenizer

    config_class, trainer_class = {
        "amm": (AMMConfig, AMMTrainer),
        "dskd": (DSKDConfig, DSKDTrainer),
        "sparse_td": (SparseTDConfig, SparseTDTrainer),
    }[method]
    tokenizer, teacher_tokenizer = (AutoTokenizer.from_pretrained(path) for path in paths)
    models = []
    for factor, own in ((1, tokenizer), (2, teacher_tokenizer)):
        config = LlamaConfig(
            vocab_size=len(own),
            hidden_size=factor * width,
            intermediate_size=3 * factor * width,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            eos_token_id=own.eos_token_id,
        )
        with torch.device(device):
            models.append(LlamaForCausalLM(config).to(torch.bfloat16))
    rows = [{"prompt": "Tell a story. " * 8, "completion": " Once upon a time." * 8}] * 64
    with tempfile.TemporaryDirectory() as folder:
        args = config_class(
            folder,
            max_steps=5,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            lmbda=0.5,
            max_completion_length=64,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=device == "cpu",
            **options,
        )
        peft_config = LoraConfig(r=8, target_modules="all-linear") if lora else None
        own = {"teacher_processing_class": teacher_tokenizer} if method == "dskd" else {}
        student, teacher = models
        teacher = None if args.teacher_adapter else teacher
        del models
        trainer = trainer_class(
            student, teacher, args, Dataset.from_list(rows), processing_class=tokenizer, peft_config=peft_config, **own
        )
        plan = plan_memory(planned_run_of(trainer, list(trainer.train_dataset)))
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        clock = StepClock(device)
        trainer.add_callback(clock)
        trainer.train()
        first, *seconds = clock.seconds()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if len(losses) != 5 or not all(map(math.isfinite, losses)):
        raise RuntimeError(f"Training with {options} has the losses {losses}.")
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0
    return {
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "seconds_of_first_step": first,
        "seconds_per_step": statistics.median(seconds),
        "peak_mib": peak,
        # Of tensors: the reserve of the plan is for what PyTorch does not count
        "planned_mib": (plan.peak - plan.components.get("reserve", 0)) / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="Folder of a tokenizer, for the training check.")
    parser.add_argument("--teacher_tokenizer", help="Another one, for DSKD with two vocabularies. Default: left out.")
    parser.add_argument("--output_file", help="JSON file for the figures.")
    parser.add_argument("--small", action="store_true", help="Tiny sizes, for a CPU.")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape, layers = ((96, 64, 64, 2000), 2) if args.small else ((8192, 2048, 2048, 151936), 8)
    width, own, other = 64 if args.small else 1024, args.tokenizer, args.teacher_tokenizer
    runs = {name: ([own, own], {"method": "amm"} | options) for name, options in GAMES.items()}
    runs |= {name: ([own, own], {"method": "sparse_td"} | options) for name, options in SPARSE.items()}
    runs |= {name: ([own, own], {"method": "amm"} | options) for name, options in SOURCES.items()}
    for name, options in DUAL.items():
        if other or "alignment" not in options:
            runs[name] = ([own, other if "alignment" in options else own], {"method": "dskd"} | options)
    report = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "losses": check_losses(device, shape),
        "training": {
            name: check_training(device, width, layers, paths, **options) for name, (paths, options) in runs.items()
        },
    }
    text = json.dumps(report, indent=2)
    print(text)
    if args.output_file:
        Path(args.output_file).write_text(text)


if __name__ == "__main__":
    main()

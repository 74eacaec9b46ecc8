"""
Checks and times what needs a GPU, in one call.

    python examples/benchmarks/gpu_check.py --output_file gpu.json

1. The chunked AMM loss in bfloat16 on a real vocabulary (151,936 tokens) against the plain form in float32.
2. Its time and peak memory beside the bare matrix products of the same chunks, which nothing can beat.
3. A few steps of AMMTrainer with LoRA and rollouts on random models of that vocabulary, with each kind of critic and
   the full on-policy gradient: time, memory, finite numbers.

Runs on a CPU too, with `--small`, to see that the script itself works.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from trl_kd import AMMConfig, AMMTrainer
from trl_kd.losses import Term, exact_moment, linear_loss
from trl_kd.modules import LMHead


def timed(function, device: str, rounds: int = 5) -> tuple[float, float]:
    """Median seconds of a call, and the peak of memory above what was there before (MiB; 0 on a CPU)."""
    cuda = device == "cuda"
    seconds = []
    for _ in range(rounds + 1):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        function()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else 0.0
    return sorted(seconds[1:])[rounds // 2], peak


def check_loss(device: str, rows: int, width: int, vocab_size: int) -> dict[str, float]:
    """Error of loss and gradients against float32 on few rows; time and memory on all rows."""
    torch.manual_seed(0)
    states = [(torch.randn(rows, width, device=device)).bfloat16() for _ in range(2)]
    heads = [(0.05 * torch.randn(vocab_size, width, device=device)).bfloat16() for _ in range(2)]
    student, weight = states[0].requires_grad_(), heads[0].requires_grad_()
    weights = torch.full((rows,), 1.0 / rows, device=device)

    def loss(n: int, dtype: torch.dtype) -> torch.Tensor:
        pairs = {
            "student": (student[:n].to(dtype), LMHead(weight.to(dtype))),
            "teacher": (states[1][:n].to(dtype), LMHead(heads[1].to(dtype))),
        }
        return linear_loss(pairs, {"moment": Term(exact_moment, weights=weights[:n])}).loss

    gradients = [torch.autograd.grad(loss(64, dtype), (student, weight)) for dtype in (torch.bfloat16, torch.float32)]
    errors = [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(*gradients, strict=True)]

    def products() -> None:
        """Student logits, both gradients and teacher logits, in the loss's chunks."""
        for start in range(0, rows, 441):
            chunk = slice(start, start + 441)
            with torch.no_grad():
                logits = student[chunk] @ weight.T
                states[1][chunk] @ heads[1].T
                logits @ weight
                logits.T @ student[chunk]

    seconds, peak = timed(lambda: loss(rows, torch.bfloat16).backward(), device)
    floor, _ = timed(products, device)
    return {
        "gradient_error_hidden": errors[0],
        "gradient_error_head": errors[1],
        "loss_seconds": seconds,
        "loss_over_products": seconds / floor,
        "loss_peak_mib": peak,
        "logits_mib": rows * vocab_size * 2 / 2**20,
    }


GAMES = {
    "exact": {},
    "learned": {"critic": "value_head"},
    "learned, after": {"critic": "value_head", "critic_order": "after"},
    "learned, low rank": {"critic": "value_head", "critic_head": "low_rank"},
    "full gradient": {"on_policy_gradient": "full"},
}


def check_training(device: str, width: int, layers: int, tokenizer_path: str, **options) -> dict[str, float]:
    """Five AMM steps with LoRA on random models, in two micro-batches each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    models = []
    for factor in (1, 2):
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=factor * width,
            intermediate_size=3 * factor * width,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            eos_token_id=tokenizer.eos_token_id,
        )
        models.append(LlamaForCausalLM(config).to(device, torch.bfloat16))
    rows = [{"prompt": "Tell a story. " * 8, "completion": " Once upon a time." * 8}] * 64
    with tempfile.TemporaryDirectory() as folder:
        args = AMMConfig(
            folder,
            max_steps=5,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_completion_length=64,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=device == "cpu",
            **options,
        )
        peft_config = LoraConfig(r=8, target_modules="all-linear")
        trainer = AMMTrainer(
            *models, args, Dataset.from_list(rows), processing_class=tokenizer, peft_config=peft_config
        )
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0
    return {"first_loss": losses[0], "last_loss": losses[-1], "seconds_per_step": seconds / 5, "peak_mib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="Folder of a tokenizer, for the training check.")
    parser.add_argument("--output_file", help="JSON file for the figures.")
    parser.add_argument("--small", action="store_true", help="Tiny sizes, for a CPU.")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, width, vocab_size, layers = (96, 64, 2000, 2) if args.small else (8192, 2048, 151936, 8)
    report = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "loss": check_loss(device, rows, width, vocab_size),
        "training": {
            name: check_training(device, 64 if args.small else 1024, layers, args.tokenizer, **options)
            for name, options in GAMES.items()
        },
    }
    text = json.dumps(report, indent=2)
    print(text)
    if args.output_file:
        Path(args.output_file).write_text(text)


if __name__ == "__main__":
    main()

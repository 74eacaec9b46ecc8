"""
What learned critics of AMM take: planned for a large teacher, and planned against measured for a small one.

    python examples/benchmarks/critic_memory.py

The plan is made on the meta device; nothing of that size is allocated. The measurement trains a small random pair for
three steps on a CPU, once for each critic in a process of its own, and compares peaks of resident memory with that of
`critic="exact"`.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_kd import AMMConfig, AMMTrainer
from trl_kd.modules import LMHead, planned_bytes


# Tokens, width of the teacher's states, of the student's: of a 7B and a 0.5B model of one family; and a small pair
LARGE = (151_936, 3_584, 896)
SMALL = (32_000, 512, 256)
RANK = AMMConfig.critic_rank


def plan(head: str, features: str, vocab_size: int, teacher_width: int, student_width: int) -> int:
    """Bytes of the two critics of one run."""
    widths = {"teacher": teacher_width, "both": teacher_width + student_width}
    embeddings = LMHead(torch.empty(vocab_size, teacher_width, device="meta"))
    return 2 * planned_bytes(head=head, num_features=widths[features], embeddings=embeddings, rank=RANK)


def model(vocab_size: int, width: int) -> LlamaForCausalLM:
    """A random model that is all vocabulary."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def train(critic: str, head: str, features: str) -> int:
    """Three steps; the peak of resident memory in bytes."""
    vocab_size, teacher_width, student_width = SMALL
    words = {f"w{i}": i for i in range(vocab_size)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w2")))
    tokenizer.pad_token, tokenizer.eos_token = "w0", "w1"
    rows = Dataset.from_list([{"input_ids": list(range(3, 15)), "labels": [-100] * 4 + list(range(7, 15))}] * 6)
    with tempfile.TemporaryDirectory() as folder:
        args = AMMConfig(
            folder,
            critic=critic,
            critic_head=head,
            critic_features=features,
            max_steps=3,
            per_device_train_batch_size=2,
            max_completion_length=8,
            loss_chunk_size=8,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        pair = model(vocab_size, student_width), model(vocab_size, teacher_width)
        AMMTrainer(*pair, args, train_dataset=rows, processing_class=tokenizer).train()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(critic: str, head: str = "full", features: str = "both") -> int:
    """`train` in a process of its own."""
    call = [sys.executable, __file__, "--train", critic, head, features]
    output = subprocess.run(call, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs=3, metavar=("CRITIC", "HEAD", "FEATURES"), help="Only one measurement.")
    args = parser.parse_args()
    if args.train:
        print(json.dumps(train(*args.train)))
        return
    sizes = ["{:,} tokens, {:,} and {:,} wide".format(*size) for size in (LARGE, SMALL)]
    table = Table("critic", f"planned: {sizes[0]}", f"planned: {sizes[1]}", "measured there", title="Two critics, GB")
    base = measure("exact")
    for features in ("both", "teacher"):
        for head in ("tied", "low_rank", "full"):
            planned = [plan(head, features, *size) / 1e9 for size in (LARGE, SMALL)]
            more = (measure("value_head", head, features) - base) / 1e9
            table.add_row(f"{head}, {features}", f"{planned[0]:.2f}", f"{planned[1]:.3f}", f"{more:.3f}")
    Console(width=119).print(table)


if __name__ == "__main__":
    main()

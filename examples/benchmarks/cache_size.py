"""
What a token of a teacher cache costs on disk, and what rounding does to it, beside DistillKit's compressed format.

    python examples/benchmarks/cache_size.py

Teachers: the 260K-parameter story teller on held-out stories (its 512 tokens are given ids of a vocabulary of 151,936,
drawn at random, so that ids cost what they cost there), and a synthetic one: Zipf-like, with an exponent of each state
of its own. DistillKit's format is written anew here from its definition (arcee-ai/DistillKit, `compression/config.py`
and `monotonic_logprobs.py`): ids of ceil(log2 V) bits in order of probability, the first log-probabilities exact, the
others as a least-squares sum of powers of their rank. Its two configurations are those that its README recommends.

Columns: bytes per token; KL(teacher || decoded) of the renormalised set in nats per token, its mean and its 99th
percentile; largest error of a log-probability; time to read a token of the text.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_kd.teachers.packing import pack_row, unpack_row


DATA = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
VOCAB_SIZE = 151_936
STATES_PER_ROW = 100

# DistillKit's README: "recommended configuration" and "budget pick": exact values in bfloat16, powers of the rank
DISTILLKIT = {128: (16, [0, 1, 2, 3, 4, 0.5]), 50: (1, [0, 1, 0.5])}


def story_log_probs(num_states: int, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Log-probabilities `(T, 512)` of the story teller on held-out stories."""
    path = DATA / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(path)
    found = []
    with open(DATA / "tinystories" / "test.jsonl", encoding="utf-8") as file, torch.no_grad():
        for line in file:
            ids = tokenizer(json.loads(line)["text"], truncation=True, max_length=256, return_tensors="pt").input_ids
            found.append(model(ids).logits[0].double().log_softmax(dim=-1))
            if sum(map(len, found)) >= num_states:
                break
    return torch.cat(found)[:num_states].numpy()


def zipf_log_probs(num_states: int, rng: np.random.Generator) -> np.ndarray:
    """Log-probabilities `(T, V)`: rank to a power of 1 to 3, times noise."""
    powers = rng.uniform(1.0, 3.0, (num_states, 1))
    logits = -powers * np.log(np.arange(1, VOCAB_SIZE + 1)) + 0.3 * rng.standard_normal((num_states, VOCAB_SIZE))
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def top_sets(log_probs: np.ndarray, size: int, top_p: float, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Counts, ids in the large vocabulary, and log-probabilities of each state's likeliest tokens."""
    size = min(size, log_probs.shape[1])
    largest = -np.sort(-log_probs, axis=1)[:, :size]
    before = np.cumsum(np.exp(largest), axis=1) - np.exp(largest)
    keep = before < top_p
    # Random ids: the worst case, since those of real tokens lie closer together
    ids = np.stack([rng.choice(VOCAB_SIZE, size, replace=False) for _ in largest])
    return keep.sum(axis=1), ids[keep], largest[keep]


def ours(counts: np.ndarray, ids: np.ndarray, log_probs: np.ndarray, bits: int) -> tuple[float, np.ndarray, float]:
    """Bytes per state, decoded log-probabilities in the order that they came in, and seconds per state."""
    ends = np.cumsum(counts)
    decoded, size, seconds = [], 0, 0.0
    for start in range(0, len(counts), STATES_PER_ROW):
        part = counts[start : start + STATES_PER_ROW]
        at = slice(ends[start] - counts[start], ends[start + len(part) - 1])
        data = pack_row(part, ids[at], log_probs[at], VOCAB_SIZE, bits)
        begin = time.perf_counter()
        _, found, values = unpack_row(data, len(part), VOCAB_SIZE, bits)
        seconds += time.perf_counter() - begin
        states = np.repeat(np.arange(len(part)), part)
        back = np.empty(len(values))
        back[np.lexsort((ids[at], states))] = values[np.lexsort((found, states))]
        decoded.append(back)
        size += len(data)
    return size / len(counts), np.concatenate(decoded), seconds / len(counts)


def distillkit(counts: np.ndarray, log_probs: np.ndarray) -> tuple[float, np.ndarray, float]:
    """The same of DistillKit's format, which has the same number of tokens in each state."""
    k = int(counts[0])
    exact, powers = DISTILLKIT[k]
    values = torch.from_numpy(log_probs.reshape(-1, k))
    ranks = torch.arange(k - exact, dtype=torch.float64)
    basis = torch.stack([ranks**power for power in powers], dim=-1)
    coefficients = (torch.linalg.pinv(basis) @ values[:, exact:].T).T.float()
    begin = time.perf_counter()
    rest = (basis.float() * coefficients[:, None]).sum(dim=-1).double()
    seconds = time.perf_counter() - begin
    decoded = torch.cat([values[:, :exact].bfloat16().double(), rest], dim=1)
    size = math.ceil(k * math.ceil(math.log2(VOCAB_SIZE)) / 8) + 2 * exact + 4 * len(powers)
    return size, decoded.flatten().numpy(), seconds / len(values)


def errors(counts: np.ndarray, log_probs: np.ndarray, decoded: np.ndarray) -> tuple[np.ndarray, float]:
    """KL of the renormalised sets `(T,)`, and the largest error of a log-probability."""
    starts = np.cumsum(counts) - counts

    def renormalised(values: np.ndarray) -> np.ndarray:
        return values - np.repeat(np.log(np.add.reduceat(np.exp(values), starts)), counts)

    p, q = renormalised(log_probs), renormalised(decoded)
    return np.add.reduceat(np.exp(p) * (p - q), starts), float(np.abs(log_probs - decoded).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_states", type=int, default=2000, help="States of the story teller; a tenth of Zipf's.")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    table = Table("teacher", "set", "tokens", "format", "bytes", "KL", "KL 99%", "max error", "us to read")

    def add(teacher: str, name: str, sets: tuple, kind: str, run: Callable[[], tuple]) -> None:
        size, decoded, seconds = run()
        divergence, largest = errors(sets[0], sets[2], decoded)
        numbers = [f"{divergence.mean():.1e}", f"{np.quantile(divergence, 0.99):.1e}", f"{largest:.3f}"]
        table.add_row(teacher, name, f"{sets[0].mean():.1f}", kind, f"{size:.1f}", *numbers, f"{seconds * 1e6:.1f}")

    teachers = {"stories260K": story_log_probs(args.num_states), "Zipf": zipf_log_probs(args.num_states // 10, rng)}
    for teacher, log_probs in teachers.items():
        for name, size, top_p in (("128", 128, 2.0), ("50", 50, 2.0), ("0.95", 256, 0.95), ("0.99", 256, 0.99)):
            sets = top_sets(log_probs, size, top_p, rng)
            for bits in (6, 8, 10, 32):
                add(teacher, name, sets, f"{bits} bits", lambda sets=sets, bits=bits: ours(*sets, bits))
            if top_p > 1:
                add(teacher, name, sets, "DistillKit", lambda sets=sets: distillkit(sets[0], sets[2]))
    Console(width=119).print(table)
    exact, half = teachers["stories260K"], story_log_probs(args.num_states, torch.bfloat16)
    divergence = (np.exp(exact) * (exact - half)).sum(axis=1).mean()
    print(f"The story teller in bfloat16: KL(float32 || bfloat16) is {divergence:.1e} over the whole vocabulary.")


if __name__ == "__main__":
    main()

"""
Makes the teacher of the demonstration and of the bench: tokenizer and model, from nothing, on one thread of a CPU.

    python examples/demo_teacher.py

Each step sees new stories of the grammar in `trl_kd/scripts/stories.py`. The loss is on the completions. At the end
the model is judged on stories that it has not seen, and written in float16, which halves the file; its config says
float32, so that every `from_pretrained` widens it.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from trl_kd.generation import Sampling, generate_completions
from trl_kd.scripts.stories import make_story, sum_is_right, train_tokenizer


FOLDER = Path(__file__).resolve().parents[1] / "trl_kd" / "scripts" / "demo_teacher"
MAX_COMPLETION_LENGTH = 48


def make_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Llama with random weights, 0.9M parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def make_batch(tokenizer: PreTrainedTokenizerBase, rng: random.Random, size: int) -> dict[str, torch.Tensor]:
    """New stories as right-padded token ids, with their completions as labels."""
    rows = []
    for _ in range(size):
        story = make_story(rng)
        prompt, completion = (tokenizer(story[part])["input_ids"] for part in ("prompt", "completion"))
        rows.append((prompt, completion + [tokenizer.eos_token_id]))
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    batch = {name: [] for name in ("input_ids", "labels", "attention_mask")}
    for prompt, completion in rows:
        fill = length - len(prompt) - len(completion)
        batch["input_ids"].append(prompt + completion + [tokenizer.pad_token_id] * fill)
        batch["labels"].append([-100] * len(prompt) + completion + [-100] * fill)
        batch["attention_mask"].append([1] * (length - fill) + [0] * fill)
    return {name: torch.tensor(values) for name, values in batch.items()}


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, steps: int, batch_size: int, learning_rate: float
) -> None:
    """AdamW, with a short warm-up and a cosine down to a hundredth."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = min(100, steps // 10 + 1)

    def schedule(step: int) -> float:
        share = min(1.0, max(0, step - warmup) / max(1, steps - warmup))
        return min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * share)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    rng, start = random.Random(1), time.monotonic()
    model.train()
    for step in range(1, steps + 1):
        loss = model(**make_batch(tokenizer, rng, batch_size)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            print(f"{time.monotonic() - start:5.0f} s  step {step:5d}  loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def judge(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, count: int) -> dict[str, float]:
    """Nats per token on stories that were not seen in training, and shares of right sums, greedily and sampled."""
    model.eval()
    rng = random.Random(2)
    nats = tokens = 0.0
    for _ in range(math.ceil(count / 100)):
        batch = make_batch(tokenizer, rng, 100)
        num_tokens = (batch["labels"] != -100).sum().item()
        nats, tokens = nats + model(**batch).loss.item() * num_tokens, tokens + num_tokens
    figures = {"nll": nats / tokens}
    prompts = [make_story(rng)["prompt"] for _ in range(count)]
    ids = tokenizer(prompts)["input_ids"]
    for name, temperature in {"sums_right_greedy": 0.0, "sums_right": 1.0}.items():
        sampling = Sampling(MAX_COMPLETION_LENGTH, temperature=temperature, rollout_batch_size=250)
        written = generate_completions(model, ids, sampling, tokenizer.pad_token_id, [tokenizer.eos_token_id], seed=0)
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        figures[name] = sum(map(sum_is_right, prompts, texts)) / count
    return figures


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """In Transformers' layout, weights in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.config.architectures = [type(model).__name__]
    # Else `from_pretrained` would take the dtype of the file, in which a CPU is slow and rounds
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    # The tied head is the embedding
    state = {name: tensor.half() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=FOLDER, help="Folder of the teacher.")
    parser.add_argument("--steps", type=int, default=1200, help="Optimizer steps.")
    parser.add_argument("--batch_size", type=int, default=64, help="Stories in a step.")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="Peak learning rate.")
    parser.add_argument("--judge_stories", type=int, default=1000, help="Stories that the teacher is judged by.")
    args = parser.parse_args()

    # One order of summation, and so one result, whatever the number of cores
    torch.set_num_threads(1)
    tokenizer = train_tokenizer()
    torch.manual_seed(0)
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, vocabulary of {len(tokenizer)}")
    start = time.monotonic()
    train(model, tokenizer, args.steps, args.batch_size, args.learning_rate)
    seconds = time.monotonic() - start
    save(model, tokenizer, args.output_dir)
    # What is judged is what was written
    figures = judge(LlamaForCausalLM.from_pretrained(args.output_dir), tokenizer, args.judge_stories)
    size = sum(file.stat().st_size for file in args.output_dir.iterdir())
    print(json.dumps(figures | {"seconds": round(seconds), "bytes": size}))


if __name__ == "__main__":
    main()

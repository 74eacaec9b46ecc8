"""
Figures of `trl_kd.evaluation.cost` beside those of `/usr/bin/time` and of a plain `generate` loop.

    HF_HUB_OFFLINE=1 python examples/benchmarks/serving_cost.py
    HF_HUB_OFFLINE=1 python examples/benchmarks/serving_cost.py --model FOLDER --model OTHER_FOLDER

Each model, by default a random Llama of 23M parameters (92 MB), is measured in rounds by both sides in turn: by
`measure_cost`, and by a process that does what one would write without this package, under `/usr/bin/time -v`. A
figure agrees if its ratio within a round, the median over the rounds, is 1 to within 10 %. The last figure needs no
clock in the process: how much longer it runs, by `/usr/bin/time`, if it generates more often.

The last column says how quiet the machine was: what one side differs from itself within a round. Ends with status 1 if
a figure disagrees. Wants a machine that does little else.
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


# Nothing else is imported here: the plain process is this file too, and its memory is a figure
BAR = 0.1
MORE_SECONDS = 12  # that the longer of two plain processes generates; a start takes 5, give or take a second


def plain(path: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Load a model and let it generate."""
    import torch
    import transformers

    torch.set_num_threads(settings["threads"])
    config = transformers.AutoConfig.from_pretrained(path)
    getattr(transformers, config.architectures[0])  # imports its code
    start = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    found = {"load": time.perf_counter() - start, "parameters": sum(p.numel() for p in model.parameters())}
    for name, size, new_tokens, repeats in settings["loops"]:
        ids = torch.randint(config.vocab_size, (size, settings["prompt"]))
        seconds = []
        for _ in range(1 + repeats):
            start = time.perf_counter()
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
            )
            seconds.append(time.perf_counter() - start)
            assert output.shape == (size, settings["prompt"] + new_tokens)
        found[name] = statistics.median(seconds[1:])
    return found


def plain_under_time(path: str, args: argparse.Namespace, loops: list[tuple[str, int, int, int]]) -> dict[str, Any]:
    """`plain` in a process of its own, with what `/usr/bin/time -v` says of it."""
    settings = json.dumps({"threads": args.threads, "prompt": args.prompt, "loops": loops})
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "time")
        call = ["/usr/bin/time", "-v", "-o", str(report), sys.executable, __file__, "--plain", path, settings]
        output = subprocess.run(call, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
        said = report.read_text()
    found = json.loads(output.splitlines()[-1])
    found["peak"] = 1024 * int(re.search(r"Maximum resident set size \(kbytes\): (\d+)", said).group(1))
    elapsed = re.search(r"Elapsed \(wall clock\) time.*: ([\d:.]+)", said).group(1)
    found["elapsed"] = sum(float(part) * 60**i for i, part in enumerate(reversed(elapsed.split(":"))))
    return found


def compare(path: str, args: argparse.Namespace) -> dict[str, list[tuple[float, float, float]]]:
    """Ours, the plain one's, and how the plain one differs from itself in the same minutes: by figure and round."""
    from trl_kd.evaluation.cost import measure_cost

    loops = [("first", 1, 1, args.repeats), ("1", 1, args.new, args.repeats), ("8", 8, args.new, args.repeats)]
    lengths = {"prompt_length": args.prompt, "new_tokens": args.new, "repeats": args.repeats}
    rounds: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(args.rounds):
        # Each side before and after the other, so that a machine that gets busier meets both
        first = plain_figures(plain_under_time(path, args, loops), path, args)
        costs = [measure_cost(path, threads=args.threads, device="cpu", **lengths)]
        one = costs[0]["batches"]["1"]["p50_seconds"]
        more = 1 + math.ceil(MORE_SECONDS / one)
        longer, shorter = (plain_under_time(path, args, [("1", 1, args.new, n)])["elapsed"] for n in (more, 1))
        costs.append(measure_cost(path, threads=args.threads, device="cpu", **lengths))
        last = plain_figures(plain_under_time(path, args, loops), path, args)
        ours = [our_figures(cost) for cost in costs]
        for name in first:
            mean = statistics.mean([first[name], last[name]])
            rounds.setdefault(name, []).append(
                (statistics.mean(cost[name] for cost in ours), mean, last[name] / first[name])
            )
        name = "generation at batch 1, s"
        by_time = (longer - shorter) / (more - 1)
        pair = statistics.mean(cost[name] for cost in ours), by_time
        rounds.setdefault(f"{name} (time -v)", []).append((*pair, ours[1][name] / ours[0][name]))
    return rounds


def our_figures(cost: dict[str, Any]) -> dict[str, float]:
    """What `measure_cost` says."""
    found = {
        "parameters, M": cost["parameters"] / 1e6,
        "on disk, MB": cost["bytes_on_disk"] / 1e6,
        "load, s": cost["load_seconds"],
        "peak memory, MB (time -v)": cost["peak_memory_bytes"] / 1e6,
        "first token, s": cost["first_token_seconds"]["p50"],
    }
    for size, batch in cost["batches"].items():
        found[f"generation at batch {size}, s"] = batch["p50_seconds"]
        found[f"tokens per second at batch {size}"] = batch["tokens_per_second"]
    return found


def plain_figures(plain: dict[str, Any], path: str, args: argparse.Namespace) -> dict[str, float]:
    """The same of the plain process."""
    found = {
        "parameters, M": plain["parameters"] / 1e6,
        "on disk, MB": Path(path, "model.safetensors").stat().st_size / 1e6,
        "load, s": plain["load"],
        "peak memory, MB (time -v)": plain["peak"] / 1e6,
        "first token, s": plain["first"],
    }
    for size in ("1", "8"):
        found[f"generation at batch {size}, s"] = plain[size]
        found[f"tokens per second at batch {size}"] = int(size) * args.new / plain[size]
    return found


def random_llama(folder: str) -> str:
    """A model of a size at which weights, rather than Python, take the time and the memory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="Folder of a model in one file; may be repeated.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--markdown", action="store_true", help="Tables to paste.")
    parser.add_argument("--plain", nargs=2, metavar=("MODEL", "SETTINGS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain:
        print(json.dumps(plain(args.plain[0], json.loads(args.plain[1]))))
        return
    from floors import Verdict, judge, machine, median_ratio, show

    print(machine("cpu", args.threads, "wall"))
    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        for path in args.model or [random_llama(folder)]:
            name = Path(path).name if args.model else "random Llama"
            rows = []
            for figure, rounds in compare(path, args).items():
                ours, theirs, noise = zip(*rounds, strict=True)
                ratio = median_ratio(ours, theirs)
                medians = [f"{statistics.median(side):,.4g}" for side in (ours, theirs)]
                ranges = [[a / b for a, b in zip(ours, theirs, strict=True)], noise]
                rows.append([figure, *medians, f"{ratio:.3f}", *(f"{min(r):.3f} to {max(r):.3f}" for r in ranges)])
                verdicts.append(Verdict(f"{name}: {figure}, distance of the ratio from 1", abs(ratio - 1), BAR))
            title = f"{name}: prompts of {args.prompt} tokens, {args.new} new ones, {args.rounds} rounds"
            columns = ["figure", "measure_cost", "plain", "ratio", "of the rounds", "later / earlier, the same side"]
            show(title, columns, rows, args.markdown)
    judge(verdicts, args.markdown)


if __name__ == "__main__":
    main()

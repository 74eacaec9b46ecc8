"""
Time, memory and exactness of losses from hidden states and heads, beside bare matrix products and other packages.

    python examples/benchmarks/loss_bench.py
    python examples/benchmarks/loss_bench.py --shape 512,512,512,50257 --entries forward_kl jsd trl_jsd --markdown
    python examples/benchmarks/loss_bench.py --judge
    python examples/benchmarks/loss_bench.py --device cuda --dtype bfloat16 --judge

Every entry goes forward and backward, to the gradients of the student's hidden states and of its head.

* Time is a ratio to the entry's floor (`floors.py`) in the same round: CPU time of one thread on a CPU, which other
  processes disturb least; wall time on a GPU.
* Peak memory is what a call adds to its inputs, on a CPU in a fresh process; the workspace is the peak without the
  gradients.
* The gradient error is relative (L2), of the tensor that is worst, against the plain functions in float64.

`--judge` measures what the bars need and ends with status 1 if one is missed. Liger's entries need `liger-kernel`.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from floors import (
    CLOCKS,
    FLOORS,
    GAME,
    Batch,
    Shape,
    Verdict,
    interleave,
    judge,
    machine,
    median_ratio,
    plain_loss,
    show,
    synchronize,
)

from trl_kd import AMMConfig
from trl_kd.losses import (
    OnSet,
    Term,
    critic_objective,
    cross_entropy,
    entropy,
    exact_moment,
    expected_inverse_soft_q,
    forward_kl,
    full_set,
    generalized_jsd,
    inverse_soft_q,
    moment,
    next_values,
    reverse_kl,
    set_forward_kl,
    set_logits,
    soft_value,
    tail_nll,
    top1_agreement,
    total_variation,
    weighted_sum,
)


def divergence(function: Callable[..., torch.Tensor], batch: Batch) -> torch.Tensor:
    """Mean divergence between student and teacher."""
    return batch.loss(batch.pairs("student", "teacher"), {"divergence": batch.term(function)})


def amm_exact(batch: Batch) -> torch.Tensor:
    """The moment under the exact critic, with what `AMMTrainer` logs."""
    terms = {
        "moment": batch.term(exact_moment),
        "total_variation": Term(total_variation),
        "top1_agreement": Term(top1_agreement),
        "student_entropy": Term(entropy, ("student",)),
        "teacher_entropy": Term(entropy, ("teacher",)),
    }
    return batch.loss(batch.pairs("student", "teacher"), terms)


def amm_learned_once(batch: Batch) -> torch.Tensor:
    """One ascent of a learned critic and the student's descent, in one pass."""
    terms = {
        "moment": batch.term(moment, *GAME),
        "objective": batch.term(partial(critic_objective, penalty=AMMConfig.critic_penalty), *GAME, sign=-1.0),
    }
    return batch.loss(batch.pairs(*GAME), terms)


def amm_learned(steps: int, batch: Batch) -> torch.Tensor:
    """Ascents of a learned critic, and then the student's descent, as `AMMTrainer` does it with its defaults."""
    pairs = batch.pairs(*GAME)
    fixed = {name: (states.detach(), head.detach()) for name, (states, head) in pairs.items()}
    rising = {"critic": (fixed["critic"][0], pairs["critic"][1])}
    # The trainer keeps the logits of as many rows as fit a budget; here all of them do
    known = {name: (fixed[name][1](fixed[name][0]), None) for name in ("student", "teacher")}
    objective = partial(critic_objective, penalty=AMMConfig.critic_penalty)
    for _ in range(steps):
        # A step of Adam would take each gradient
        loss = batch.loss(known | rising, {"objective": batch.term(objective, *GAME, sign=-1.0)})
        torch.autograd.grad(loss, pairs["critic"][1].weight)
    return batch.loss(pairs | {"critic": fixed["critic"]}, {"moment": batch.term(moment, *GAME)})


def dskd(batch: Batch) -> torch.Tensor:
    """Dual-space distillation: a divergence in each model's space, and two cross-entropies."""
    pairs = batch.pairs("student", "teacher", "teacher_in_student", "student_in_teacher")
    terms = {
        "nll": batch.term(cross_entropy, "student", "labels"),
        "student_space": batch.term(forward_kl, "student", "teacher_in_student"),
        "projected_nll": batch.term(cross_entropy, "teacher_in_student", "labels"),
        "teacher_space": batch.term(forward_kl, "student_in_teacher", "teacher"),
    }
    return batch.loss(pairs, terms)


def sparse_set(batch: Batch) -> torch.Tensor:
    """The expected form on a cached set whose tokens are all that is normalised over."""
    (states, head), (ids, log_probs) = batch.pairs("student")["student"], batch.cached()
    q, mask = set_logits(states, head, ids), full_set(log_probs)
    values = expected_inverse_soft_q(q, mask, log_probs, soft_value(q, mask))
    return weighted_sum(values, batch.weights[batch.mask])


def sparse_td(batch: Batch) -> torch.Tensor:
    """Inverse soft-Q with chi-square on a cached set: the rows are one text, its tokens the teacher's most likely."""
    (states, head), (ids, log_probs) = batch.pairs("student")["student"], batch.cached()
    q, mask = set_logits(states, head, ids), full_set(log_probs)
    v_t = soft_value(q, mask)
    v_tp1 = next_values(v_t[None], torch.ones_like(v_t[None], dtype=torch.bool))[0]
    return weighted_sum(inverse_soft_q(q[:, 0], v_t, v_tp1, 0.99, chi2_alpha=0.1), batch.weights[batch.mask])


def sparse_expected(batch: Batch) -> torch.Tensor:
    """What `SparseTDTrainer` does by default from a cache, with what it logs."""
    on_set = ("student", "ids", "top")
    terms = {"set_forward_kl": batch.term(set_forward_kl, *on_set), "tail": Term(tail_nll, on_set)}
    return batch.loss(batch.pairs("student"), terms)


def sparse_total_variation(batch: Batch) -> torch.Tensor:
    """Total variation from a cache, with one bucket for all other tokens."""
    return batch.loss(batch.pairs("student"), {"tv": batch.term(OnSet(total_variation), "student", "ids", "top")})


def plain(loss: Callable[[Batch], torch.Tensor], batch: Batch) -> torch.Tensor:
    """The same loss on the logits of all rows, by autograd."""
    return loss(replace(batch, engine=plain_loss))


def trl_tiled(beta: float, batch: Batch) -> torch.Tensor:
    """TRL's `DistillationTrainer`."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    states = [batch.states[name][None] for name in ("student", "teacher")]
    weights = [batch.heads[name].weight for name in ("student", "teacher")]
    return _chunked_divergence_loss(*states, *weights, batch.mask[None].long(), beta)[0]


def trl_gkd(beta: float, batch: Batch) -> torch.Tensor:
    """TRL's `GKDTrainer`: all logits of all positions."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    logits = [batch.heads[name](batch.states[name])[None] for name in ("student", "teacher")]
    labels = batch.labels.masked_fill(~batch.mask, -100)[None]
    return GKDTrainer.generalized_jsd_loss(*logits, labels=labels, beta=beta)


def liger(beta: float, batch: Batch) -> torch.Tensor:
    """Liger's chunked loss, not compiled."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False, chunk_size=batch.chunk_size
    )
    inputs = [(batch.states[name], batch.heads[name].weight) for name in ("student", "teacher")]
    return loss(*inputs[0], *inputs[1], batch.labels.masked_fill(~batch.mask, -100))


@dataclass(frozen=True)
class Entry:
    """A loss of a batch, the floor that it stands on, and the entry of ours that computes the same."""

    function: Callable[[Batch], torch.Tensor]
    floor: str = "gemm4"
    same_as: str | None = None
    is_sum: bool = True  # over rows, of which none needs another


jsd = partial(generalized_jsd, beta=0.5)

ENTRIES = {
    "forward_kl": Entry(partial(divergence, forward_kl)),
    "reverse_kl": Entry(partial(divergence, reverse_kl)),
    "jsd": Entry(partial(divergence, jsd)),
    "total_variation": Entry(partial(divergence, total_variation)),
    "amm_exact": Entry(amm_exact),
    "amm_learned_1": Entry(amm_learned_once, "gemm7"),
    "amm_learned_5": Entry(partial(amm_learned, 5), "gemm15"),
    "dskd": Entry(dskd, "gemm8"),
    "sparse_set": Entry(sparse_set),
    "sparse_td": Entry(sparse_td, is_sum=False),
    "sparse_expected": Entry(sparse_expected),
    "sparse_total_variation": Entry(sparse_total_variation),
    "plain_forward_kl": Entry(partial(plain, partial(divergence, forward_kl)), same_as="forward_kl"),
    "plain_jsd": Entry(partial(plain, partial(divergence, jsd)), same_as="jsd"),
    "plain_total_variation": Entry(partial(plain, partial(divergence, total_variation)), same_as="total_variation"),
    "plain_amm_exact": Entry(partial(plain, amm_exact), same_as="amm_exact"),
    "plain_sparse_total_variation": Entry(partial(plain, sparse_total_variation), same_as="sparse_total_variation"),
    "trl_forward_kl": Entry(partial(trl_tiled, 0.0), same_as="forward_kl"),
    "trl_jsd": Entry(partial(trl_tiled, 0.5), same_as="jsd"),
    "trl_gkd_jsd": Entry(partial(trl_gkd, 0.5), same_as="jsd"),
    "liger_forward_kl": Entry(partial(liger, 0.0), same_as="forward_kl"),
    "liger_jsd": Entry(partial(liger, 0.5), same_as="jsd"),
}


# Measuring


@dataclass(frozen=True)
class Setting:
    """What a figure depends on beside its entry."""

    shape: Shape
    valid: float
    frozen_head: bool
    chunk_size: int
    dtype: str
    device: str

    def batch(self) -> Batch:
        """The inputs."""
        dtype = getattr(torch, self.dtype)
        return Batch.random(self.shape, self.valid, self.frozen_head, self.chunk_size, dtype, self.device)


def call(name: str, batch: Batch) -> None:
    """Forward and backward of an entry, or a floor."""
    if name in FLOORS:
        FLOORS[name](batch)
    else:
        ENTRIES[name].function(batch).backward()


def fits(name: str, batch: Batch) -> bool:
    """Call an entry that may need more memory than the GPU has."""
    try:
        call(name, batch)
    except torch.OutOfMemoryError:
        print(f"{name} is left out: out of memory", file=sys.stderr)
        return False
    return True


def times(names: list[str], settings: dict[str, Setting], args: argparse.Namespace) -> dict[str, dict]:
    """Seconds in each round, by setting and entry; whatever failed in the warm-up is left out."""
    batches = {key: setting.batch() for key, setting in settings.items()}
    jobs = {}
    for key, batch in batches.items():
        for name in names:
            if fits(name, batch):
                jobs[key, name] = partial(call, name, batch)
            batch.clear()

    def clear() -> None:
        for batch in batches.values():
            batch.clear()

    seconds = interleave(jobs, clear, args.rounds, CLOCKS[args.clock], args.device)
    return {key: {name: s for (k, name), s in seconds.items() if k == key} for key in settings}


def peak(name: str, setting: Setting) -> dict[str, float]:
    """MiB that one call adds to its inputs, and MiB of the gradients that it hands back."""
    # Loads code; what is compiled for one vocabulary should meet no other
    vocab_size = setting.shape[3] if setting.device == "cuda" else 512
    call(name, replace(setting, shape=(16, *setting.shape[1:3], vocab_size), valid=1.0).batch())
    batch = setting.batch()
    if setting.device == "cuda":
        synchronize("cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        before = resident("VmRSS")
    call(name, batch)
    synchronize(setting.device)
    after = torch.cuda.max_memory_allocated() if setting.device == "cuda" else resident("VmHWM")
    gradients = sum(gradient.nbytes for gradient in batch.gradients().values())
    return {"peak": (after - before) / 2**20, "gradients": gradients / 2**20}


def resident(key: str) -> int:
    """A figure of this process's memory in bytes, as Linux tells it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def peak_apart(name: str, setting: Setting, threads: int) -> dict[str, float] | None:
    """`peak` in a process of its own; `None` if that did not end well."""
    if setting.device == "cuda":  # counts what is allocated, whoever was there before
        try:
            return peak(name, setting)
        except torch.OutOfMemoryError:
            print(f"no peak of {name}: out of memory", file=sys.stderr)
            return None
    child = [sys.executable, __file__, "--child", json.dumps([name, vars(setting)]), "--threads", str(threads)]
    # Freed memory goes back at once: glibc would keep blocks below a limit that grows, and the call use them unseen
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
    done = subprocess.run(child, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        print(f"no peak of {name}: {reason}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def gradient_errors(names: list[str], setting: Setting) -> dict[str, float]:
    """Relative L2 error of the gradients against the plain functions in float64, by entry."""
    batch, errors = setting.batch(), {}
    exact = replace(batch.double(), engine=plain_loss)
    groups = {}
    for name in names:
        if name not in FLOORS:
            groups.setdefault(ENTRIES[name].same_as or name, []).append(name)
    for reference, members in groups.items():
        exact.clear()
        # Sums over rows, so that pieces of the batch add up
        for index in batch.mask.nonzero().squeeze(1).split(64 if ENTRIES[reference].is_sum else len(batch.mask)):
            ENTRIES[reference].function(exact.rows(index)).backward()
        expected = exact.gradients()
        for name in members:
            batch.clear()
            if not fits(name, batch):
                continue
            gradients = batch.gradients()
            if gradients.keys() != expected.keys():
                raise RuntimeError(f"{name} has gradients of {sorted(gradients)}, not of {sorted(expected)}.")
            errors[name] = max(((gradients[k] - e).norm() / e.norm()).item() for k, e in expected.items())
    return errors


# Tables


def with_floors(names: list[str]) -> list[str]:
    """Entries after the floors that they need."""
    floors = {ENTRIES[name].floor for name in names if name in ENTRIES} | {name for name in names if name in FLOORS}
    return [name for name in FLOORS if name in floors] + [name for name in names if name in ENTRIES]


def measure(names: list[str], setting: Setting, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All figures of some entries at one setting."""
    names = with_floors(names)
    seconds = times(names, {"": setting}, args)[""] if "time" in args.measures else {}
    peaks = {n: peak_apart(n, setting, args.threads) for n in names} if "memory" in args.measures else {}
    errors = gradient_errors(names, setting) if "gradient" in args.measures else {}
    figures = {}
    for name in names:
        floor = name if name in FLOORS else ENTRIES[name].floor
        row = {"floor": floor, "seconds": seconds.get(name), "gradient_error": errors.get(name)}
        if name in seconds:
            row["time_ratio"] = median_ratio(seconds[name], seconds[floor])
        if peaks.get(name):
            row |= peaks[name] | {"workspace": peaks[name]["peak"] - peaks[name]["gradients"]}
            if peaks.get(floor):
                row["peak_ratio"] = row["peak"] / peaks[floor]["peak"]
        figures[name] = row
    return figures


def tabulate(figures: dict[str, dict[str, Any]], setting: Setting, markdown: bool) -> None:
    """The figures of one setting."""
    columns = ["entry", "floor", "seconds", "time / floor", "peak, MiB", "peak / floor", "workspace, MiB", "error"]
    rows = []
    for name, row in figures.items():
        seconds = sorted(row["seconds"] or []) or [None]
        cells = [
            (seconds[len(seconds) // 2], ".3f"),
            (row.get("time_ratio"), ".2f"),
            (row.get("peak"), ".0f"),
            (row.get("peak_ratio"), ".2f"),
            (row.get("workspace"), ".0f"),
            (row["gradient_error"], ".1e"),
        ]
        texts = ["-" if value is None else format(value, spec) for value, spec in cells]
        rows.append([name, "" if name in FLOORS else row["floor"], *texts])
    show(describe(setting), columns, rows, markdown)


def describe(setting: Setting) -> str:
    """A setting in words."""
    n, student_width, teacher_width, vocab_size = setting.shape
    head = ", frozen head" if setting.frozen_head else ""
    return (
        f"N = {n}, H_s = {student_width}, H_t = {teacher_width}, V = {vocab_size}; {setting.dtype}, "
        f"{setting.chunk_size} rows a chunk, {setting.valid:.0%} of the rows count{head}"
    )


# Bars

WIDE, NARROW = (512, 512, 512, 50257), (512, 256, 256, 32000)
SHORT, LONG = (512, 128, 128, 32000), (2048, 128, 128, 32000)
GPU = (8192, 2048, 2048, 151936)
# Gradients with signs of differences: rounding flips those of nearly equal probabilities in any float32 form, so that
# these are compared with the plain one's error
SIGNED = ("total_variation", "amm_exact", "sparse_total_variation")
OURS = [name for name, entry in ENTRIES.items() if entry.same_as is None]


CACHED_SHAPE, CACHED_NARROW = (256, 512, 512, 50257), (256, 512, 512, 12564)


def judge_cached(setting: Setting, args: argparse.Namespace) -> tuple[list[Verdict], dict[str, Any]]:
    """The bars of losses from a cache, which need no teacher."""
    everything = argparse.Namespace(**vars(args) | {"measures": ["time", "memory", "gradient"]})
    names = ["sparse_set", "sparse_td", "sparse_expected", "sparse_total_variation"]
    settings = {shape: replace(setting, shape=shape) for shape in (CACHED_SHAPE, CACHED_NARROW)}
    figures = {shape: measure(names, each, everything) for shape, each in settings.items()}
    verdicts = []
    for name, limit in (("sparse_set", 0.12), ("sparse_td", 0.12), ("sparse_expected", 0.90)):
        row = figures[CACHED_SHAPE][name]
        verdicts.append(Verdict(f"time of {name} / gemm4 at {CACHED_SHAPE}", row.get("time_ratio"), limit))
        verdicts.append(Verdict(f"gradient error of {name} at {CACHED_SHAPE}", row["gradient_error"], 1e-5))
    for name in ("sparse_set", "sparse_td"):
        spaces = [figures[shape][name].get("workspace") for shape in (CACHED_SHAPE, CACHED_NARROW)]
        growth = None if None in spaces else spaces[0] / spaces[1]
        verdicts.append(Verdict(f"workspace of {name} at four times the vocabulary", growth, 1.1))
    chunk = min(setting.chunk_size, CACHED_SHAPE[0]) * CACHED_SHAPE[3] * 4 / 2**20
    space = figures[CACHED_SHAPE]["sparse_expected"].get("workspace")
    verdicts.append(Verdict(f"workspace of sparse_expected / a chunk's logits ({chunk:.0f} MiB)", space / chunk, 2.0))
    for shape, rows in figures.items():
        tabulate(rows, settings[shape], args.markdown)
    return verdicts, {f"cached {shape}": rows for shape, rows in figures.items()}


def judge_cpu(setting: Setting, args: argparse.Namespace) -> tuple[list[Verdict], dict[str, Any]]:
    """The bars that hold without a GPU."""
    names = ["forward_kl", "jsd"]
    peers = {"forward_kl": ("trl_forward_kl", 0.75), "jsd": ("trl_jsd", 0.55)}
    games = [name for name in OURS if name.startswith("amm") or name == "dskd"]
    settings = {shape: replace(setting, shape=shape) for shape in (WIDE, NARROW, SHORT, LONG)}
    everything = argparse.Namespace(**vars(args) | {"measures": ["time", "memory"]})
    figures = {WIDE: measure([*names, *games, *(peer for peer, _ in peers.values())], settings[WIDE], everything)}
    figures[NARROW] = measure(names, settings[NARROW], everything)
    everything.measures = ["memory"]
    figures |= {shape: measure(names, settings[shape], everything) for shape in (SHORT, LONG)}
    masked = times(names, {"none": settings[NARROW], "half": replace(settings[NARROW], valid=0.5)}, args)
    errors = gradient_errors([*OURS, *(f"plain_{name}" for name in SIGNED)], settings[NARROW])

    verdicts = []
    for shape, limit in ((WIDE, 1.15), (NARROW, 1.25)):
        for name in names:
            row = figures[shape][name]
            verdicts.append(Verdict(f"time of {name} / gemm4 at {shape}", row.get("time_ratio"), limit))
            verdicts.append(Verdict(f"peak of {name} / gemm4 at {shape}", row.get("peak_ratio"), 1.10))
    for name in games:
        row = figures[WIDE][name]
        verdicts.append(Verdict(f"time of {name} / {row['floor']} at {WIDE}", row.get("time_ratio"), 1.25))
    verdicts += against_peers(figures[WIDE], peers, WIDE)
    for name in names:
        spaces = [figures[shape][name].get("workspace") for shape in (LONG, SHORT)]
        growth = None if None in spaces else spaces[0] / spaces[1]
        verdicts.append(Verdict(f"workspace of {name}, {LONG} / {SHORT}", growth, 1.1))
        ratio = median_ratio(masked["half"][name], masked["none"][name])
        verdicts.append(Verdict(f"time of {name}, half / none of the rows masked, at {NARROW}", ratio, 0.6))
    for name in OURS:
        if name in SIGNED:
            ratio = errors[name] / errors[f"plain_{name}"]
            verdicts.append(Verdict(f"gradient error of {name} / that of its plain form at {NARROW}", ratio, 1.0))
        else:
            verdicts.append(Verdict(f"gradient error of {name} at {NARROW}", errors[name], 1e-5))
    for shape, rows in figures.items():
        tabulate(rows, settings[shape], args.markdown)
    return verdicts, {str(shape): rows for shape, rows in figures.items()} | {"errors": errors, "masked": masked}


def judge_gpu(setting: Setting, args: argparse.Namespace) -> tuple[list[Verdict], dict[str, Any]]:
    """The bars of a GPU: bfloat16 and a large vocabulary."""
    peers = {"forward_kl": ("trl_forward_kl", 0.9), "jsd": ("trl_jsd", 0.75)}
    setting = replace(setting, shape=GPU)
    everything = argparse.Namespace(**vars(args) | {"measures": ["time", "memory"]})
    figures = measure([*OURS, *(peer for peer, _ in peers.values())], setting, everything)
    verdicts = [Verdict(f"time of {name} / gemm4 at {GPU}", figures[name].get("time_ratio"), 1.4) for name in peers]
    verdicts += against_peers(figures, peers, GPU)
    tabulate(figures, setting, args.markdown)
    return verdicts, {str(GPU): figures}


def against_peers(figures: dict, peers: dict[str, tuple[str, float]], shape: Shape) -> list[Verdict]:
    """Times of ours over those of peers in the same rounds."""
    verdicts = []
    for name, (peer, limit) in peers.items():
        pair = figures[name]["seconds"], figures[peer]["seconds"]
        ratio = median_ratio(*pair) if all(pair) else None
        verdicts.append(Verdict(f"time of {name} / {peer} at {shape}", ratio, limit))
    return verdicts


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", help="N,H_s,H_t,V; several are measured one after the other.")
    parser.add_argument("--entries", nargs="+", choices=[*FLOORS, *ENTRIES], help="Default: all.")
    parser.add_argument("--measures", nargs="+", default=["time", "memory", "gradient"], help="What to measure.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--valid", type=float, default=1.0, help="Share of the rows that count.")
    parser.add_argument("--frozen_head", "--frozen-head", action="store_true", help="The student's head is fixed.")
    parser.add_argument("--chunk_size", "--chunk-size", type=int, help="Rows. Default: 128, on a GPU 1024.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, help='Default: "cpu", on a GPU "wall".')
    parser.add_argument("--judge", action="store_true", help="Compare with the bars, at their own shapes.")
    parser.add_argument("--markdown", action="store_true", help="Tables to paste.")
    parser.add_argument("--json", help="File for all figures.")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # one peak, as `peak_apart` asks for it
    args = parser.parse_args()
    args.clock = args.clock or ("wall" if args.device == "cuda" else "cpu")
    args.chunk_size = args.chunk_size or (1024 if args.device == "cuda" else 128)
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.child:
        name, fields = json.loads(args.child)
        print(json.dumps(peak(name, Setting(**fields))))
        return
    setting = Setting(NARROW, args.valid, args.frozen_head, args.chunk_size, args.dtype, args.device)
    about = machine(args.device, args.threads, args.clock)
    print(about)
    verdicts, report = None, {}
    if args.judge:
        verdicts, report = (judge_gpu if args.device == "cuda" else judge_cpu)(setting, args)
        if args.device == "cpu":
            more, figures = judge_cached(setting, args)
            verdicts, report = verdicts + more, report | figures
    else:
        names = args.entries or list(ENTRIES)
        if find_spec("liger_kernel") is None and any(name.startswith("liger") for name in names):
            print("Liger's entries are left out: `pip install liger-kernel`.", file=sys.stderr)
            names = [name for name in names if not name.startswith("liger")]
        for text in args.shape or [",".join(map(str, GPU if args.device == "cuda" else NARROW))]:
            setting = replace(setting, shape=tuple(int(size) for size in text.split(",")))
            report[text] = measure(names, setting, args)
            tabulate(report[text], setting, args.markdown)
    if args.json:
        report = {"machine": about, "setting": vars(setting), **report}
        if verdicts:
            report["verdicts"] = [verdict.cells() for verdict in verdicts]
        Path(args.json).write_text(json.dumps(report, indent=2))
    if verdicts:
        judge(verdicts, args.markdown)


if __name__ == "__main__":
    main()

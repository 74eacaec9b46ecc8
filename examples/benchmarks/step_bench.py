"""
Whole on-policy steps of our trainers beside those of TRL's `DistillationTrainer`, on the same work.

    HF_HUB_OFFLINE=1 python examples/benchmarks/step_bench.py
    HF_HUB_OFFLINE=1 python examples/benchmarks/step_bench.py --rounds 1 --small
    HF_HUB_OFFLINE=1 python examples/benchmarks/step_bench.py --device cuda --batch_size 8 --rounds 3

A random student of 15M parameters and a random teacher of 42M share 32,000 tokens. All trainers see the same prompts
in the same order and write completions of the same length, since EOS is suppressed; but for the one that trains from
a cache, which reads completions of that length. Nothing is downloaded.

Each trainer runs its own `train()` in a thread of its own, and they take turns, one optimizer step at a time: a step
is everything between the ends of two steps. The order alternates; the first step of each is not counted. Divergences
with beta 0.5 and 1 are judged, and dual-space distillation within one vocabulary; ends with status 1 if a bar is
missed.
"""

import argparse
import copy
import json
import statistics
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import trl.trainer.distillation_trainer as trl_distillation
from datasets import Dataset
from floors import CLOCKS, Verdict, judge, machine, median_ratio, show, synchronize
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

import trl_kd.trainer.kd_trainer as kd_trainer
from trl_kd import AMMConfig, AMMTrainer, DSKDConfig, DSKDTrainer, KDConfig, SparseTDConfig, SparseTDTrainer
from trl_kd.data import prepare_dataset
from trl_kd.losses import LinearLoss, Term, generalized_jsd, reverse_kl
from trl_kd.teachers import LocalTeacher
from trl_kd.teachers.cache_writer import write_cache
from trl_kd.trainer.tokens import TokenBatch


# Vocabulary; width, layers, heads and inner width of student and teacher
SIZES = {
    "small": (512, (32, 2, 2, 64), (48, 2, 2, 96)),
    "cpu": (32_000, (288, 6, 6, 768), (512, 8, 8, 1376)),
    "cuda": (151_936, (896, 24, 14, 4864), (1536, 28, 12, 8960)),  # about Qwen2.5 0.5B and 1.5B
}
# Step time of ours / TRL's, by beta
BARS = {0.5: 0.65, 1.0: 0.70}
DSKD_BAR = 1.3
# From a cache, nothing is written: TRL's step without its generation is what it is compared with
CACHED, CACHED_BAR = "SparseTD, cache", 0.5
EOS = 1
# Timed in place, and put back
LOSS = "_chunked_divergence_loss", trl_distillation._chunked_divergence_loss


class JSDTrainer(kd_trainer._KDTrainer):
    """A method is one loss on the tokens of a micro-batch."""

    divergence = staticmethod(partial(generalized_jsd, beta=0.5))

    def token_loss(self, tokens: TokenBatch) -> LinearLoss:
        """The divergence on all tokens, each with its weight."""
        term = Term(self.divergence, weights=tokens.weights)
        return tokens.linear_loss({"divergence": term}, self.args.loss_chunk_size)


class ReverseKLTrainer(JSDTrainer):
    """The same with the reverse KL divergence, which is beta 1."""

    divergence = staticmethod(reverse_kl)


# The work


def model(vocab_size: int, width: int, layers: int, heads: int, inner: int) -> LlamaForCausalLM:
    """A random model."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def tokenizer_of(vocab_size: int) -> PreTrainedTokenizerFast:
    """A token for each word w0, w1, ...; the first ones are special."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w2"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w2")


def prompts_of(num_rows: int, longest: int, vocab_size: int) -> Dataset:
    """Prompts of different lengths: padding is a part of the work."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(longest // 2, longest + 1, (num_rows,), generator=generator)
    rows = [torch.randint(3, vocab_size, (length,), generator=generator) for length in lengths.tolist()]
    return Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in row.tolist()) for row in rows]})


def completed(rows: Dataset, length: int, vocab_size: int) -> Dataset:
    """The same prompts with completions of this length, the EOS that is added included."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, vocab_size, (len(rows), length - 1), generator=generator).tolist()
    return rows.add_column("completion", [" " + " ".join(f"w{i}" for i in row) for row in words])


def cached_trainer(student: Any, teacher: Any, rows: Dataset, options: dict[str, Any], folder: str) -> Any:
    """Ours without a teacher: the cache of what it says of these rows is written first, and not timed."""
    length, vocab_size = options["max_completion_length"], student.config.vocab_size
    rows, tokenizer = completed(rows, length, vocab_size), tokenizer_of(vocab_size)
    prepared = prepare_dataset(rows, tokenizer, max_length=None, eos_token_ids=[EOS])
    write_cache(prepared, LocalTeacher(copy.deepcopy(teacher)), tokenizer, f"{folder}/cache", [EOS])
    config = SparseTDConfig(**options, teacher_cache=f"{folder}/cache", max_length=None)
    return SparseTDTrainer(copy.deepcopy(student), None, config, rows, processing_class=tokenizer)


def trainers_of(beta: float, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """TRL's trainer, ours, AMM's and DSKD's, each with models of its own."""
    torch.manual_seed(0)
    on_gpu = args.device == "cuda"
    vocab_size, *widths = SIZES["small" if args.small else args.device]
    with torch.device(args.device):
        student, teacher = (model(vocab_size, *width) for width in widths)
    if on_gpu:
        student, teacher = student.bfloat16(), teacher.bfloat16()
    sizes = [sum(p.numel() for p in each.parameters()) / 1e6 for each in (student, teacher)]
    print("Student {:.1f}M, teacher {:.1f}M parameters".format(*sizes))
    # The warm-up and one more, so that no loader ends
    rows = prompts_of((args.rounds + 2) * args.batch_size * args.accumulation, args.prompt, vocab_size)
    options = dict(
        output_dir=folder,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation,
        max_completion_length=args.completion,
        max_steps=args.rounds + 1,
        gradient_checkpointing=args.gradient_checkpointing,
        generation_kwargs={"suppress_tokens": [EOS]},
        bf16=on_gpu,
        use_cpu=not on_gpu,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    ours = options | dict(lmbda=1.0, train_sampling_strategy="sequential")
    divergence = {0.5: JSDTrainer, 1.0: ReverseKLTrainer}[beta]
    kinds = {
        "TRL": (DistillationTrainer, DistillationConfig(**options, beta=beta, shuffle_dataset=False)),
        "ours": (divergence, KDConfig(**ours)),
        "AMM": (AMMTrainer, AMMConfig(**ours)),
        "AMM learned": (AMMTrainer, AMMConfig(**ours, critic="value_head")),
        "AMM learned, after": (AMMTrainer, AMMConfig(**ours, critic="value_head", critic_order="after")),
        "DSKD v1": (DSKDTrainer, DSKDConfig(**ours, kd_rate=1.0, preset="v1")),
        "DSKD v2": (DSKDTrainer, DSKDConfig(**ours, kd_rate=1.0, preset="v2")),
    }
    made, tokenizer = {}, tokenizer_of(vocab_size)
    for name, (kind, config) in kinds.items():
        if args.trainers and name not in args.trainers:
            continue
        made[name] = kind(
            model=copy.deepcopy(student),
            teacher_model=teacher if on_gpu else copy.deepcopy(teacher),
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
        )
    off_policy = options | {"train_sampling_strategy": "sequential"}
    made[CACHED] = cached_trainer(student, teacher, rows, off_policy, folder)
    for trainer in made.values():
        trainer.remove_callback(PrinterCallback)
    return made


# Turns and clocks


class Stopwatch:
    """Seconds by trainer and phase, of whichever trainer has its turn."""

    def __init__(self, clock: Callable[[], float], device: str):
        self.clock, self.device = lambda: (synchronize(device), clock())[1], device
        self.turn = ""
        self.seconds: dict[str, dict[str, list[float]]] = {}
        self.lengths: dict[str, list[int]] = {}  # of the completions

    def add(self, phase: str, seconds: float) -> None:
        """Note a phase of the trainer whose turn it is."""
        self.seconds.setdefault(self.turn, {}).setdefault(phase, []).append(seconds)

    def watch(self, owner: Any, name: str, phase: str) -> None:
        """Time a function; the watched ones do not call each other."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.clock()
            result = function(*args, **kwargs)
            self.add(phase, self.clock() - start)
            if phase == "generation":
                self.lengths.setdefault(self.turn, []).extend(len(ids) for ids in result)
            return result

        setattr(owner, name, timed)


class Turns(TrainerCallback):
    """Runs a trainer in a thread, one step whenever it is asked to."""

    def __init__(self, name: str, trainer: Any, stopwatch: Stopwatch):
        self.name, self.trainer, self.stopwatch = name, trainer, stopwatch
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.start, self.before_optimizer, self.error = 0.0, 0.0, None
        trainer.add_callback(self)
        self.thread = threading.Thread(target=self._train, daemon=True)
        self.thread.start()
        self._wait()

    def step(self) -> None:
        """One optimizer step."""
        self.stopwatch.turn = self.name
        if self.stopwatch.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        self.go.release()
        self._wait()
        if self.stopwatch.device == "cuda":  # beyond what the trainer held before the step
            self.stopwatch.add("peak_mib", (torch.cuda.max_memory_allocated() - before) / 2**20)

    def finish(self) -> None:
        """What `train()` does after its last step."""
        self.go.release()
        self._wait()

    def _wait(self) -> None:
        self.done.acquire()
        if self.error is not None:
            raise self.error

    def _train(self) -> None:
        try:
            self.trainer.train()
        except Exception as error:  # for the main thread, which raises it
            self.error = error
        self.done.release()

    def _hand_over(self) -> None:
        self.done.release()
        self.go.acquire()
        self.start = self.stopwatch.clock()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._hand_over()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.before_optimizer = self.stopwatch.clock()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.stopwatch.add("optimizer", self.stopwatch.clock() - self.before_optimizer)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.stopwatch.add("step", self.stopwatch.clock() - self.start)
        self._hand_over()


def watch_phases(trainers: dict[str, Any], stopwatch: Stopwatch) -> None:
    """Time what a step consists of. The backward includes that of the loss."""
    for name, trainer in trainers.items():
        stopwatch.watch(trainer.accelerator, "backward", "backward")
        if name == "TRL":
            stopwatch.watch(trainer, "_generate_single_turn", "generation")
            watch_trl_forwards(trainer, stopwatch)
            stopwatch.watch(trl_distillation, LOSS[0], "loss")
        else:
            stopwatch.watch(trainer, "write_with_student", "generation")
            if name != CACHED:
                stopwatch.watch(trainer.teacher, "hidden_states", "teacher forward")
            stopwatch.watch(trainer, "read_tokens", "student forward")
            stopwatch.watch(trainer, "token_loss", "loss")


def watch_trl_forwards(trainer: DistillationTrainer, stopwatch: Stopwatch) -> None:
    """TRL has one method for both models."""
    forwards = argparse.Namespace(student=trainer._get_last_hidden_state, teacher=trainer._get_last_hidden_state)
    for role in ("student", "teacher"):
        stopwatch.watch(forwards, role, f"{role} forward")
    teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)

    def hidden_states(model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return (forwards.teacher if model is teacher else forwards.student)(model, *args, **kwargs)

    trainer._get_last_hidden_state = hidden_states


def measure(beta: float, args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Seconds of each phase in each step, by trainer."""
    stopwatch = Stopwatch(CLOCKS[args.clock], args.device)
    with tempfile.TemporaryDirectory() as folder, patch.object(trl_distillation, *LOSS):
        trainers = trainers_of(beta, args, folder)
        watch_phases(trainers, stopwatch)
        turns = [Turns(name, trainer, stopwatch) for name, trainer in trainers.items()]
        for turn in turns:
            turn.step()
        stopwatch.seconds.clear()
        for index in range(args.rounds):
            for turn in turns[:: 1 if index % 2 == 0 else -1]:
                turn.step()
        for turn in turns:
            turn.finish()
    expected = [args.completion] * (args.rounds + 1) * args.batch_size * args.accumulation
    for name, lengths in stopwatch.lengths.items():
        if lengths != expected:
            raise RuntimeError(f"{name} wrote {len(lengths)} completions of {sum(lengths)} tokens: not the same work.")
    return stopwatch.seconds


def by_step(parts: dict[str, list[float]], args: argparse.Namespace) -> list[float]:
    """Seconds of generation in each step, which may write more than once."""
    calls = len(parts["generation"]) // args.rounds
    return [sum(parts["generation"][i * calls : (i + 1) * calls]) for i in range(args.rounds)]


def tabulate(beta: float, seconds: dict[str, dict[str, list[float]]], args: argparse.Namespace) -> None:
    """Step times, and where they go."""
    phases = ["generation", "teacher forward", "student forward", "loss", "backward", "optimizer"]
    rows = []
    for name, parts in seconds.items():
        total = sum(parts["step"])
        shares = [sum(parts.get(phase, [])) / total for phase in phases]
        ratio = median_ratio(parts["step"], seconds["TRL"]["step"])
        cells = [f"{statistics.median(parts['step']):.2f}", f"{ratio:.2f}"]
        peak = f"{max(parts.get('peak_mib', [0])):.0f}"
        rows.append([name, *cells, *(f"{share:.0%}" for share in [*shares, 1 - sum(shares)]), peak])
    title = (
        f"beta {beta}: {args.batch_size} x {args.accumulation} prompts of up to {args.prompt} tokens, completions of "
        f"{args.completion}, gradient checkpointing {'on' if args.gradient_checkpointing else 'off'}"
    )
    show(title, ["trainer", "seconds", "/ TRL", *phases, "rest", "peak, MiB"], rows, args.markdown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--betas", type=float, nargs="+", choices=list(BARS), default=list(BARS))
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=64, help="Longest prompt, in tokens.")
    parser.add_argument("--completion", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--trainers", nargs="+", help="Names of those to run, TRL and ours among them. Default: all.")
    parser.add_argument("--clock", choices=CLOCKS, help='Default: "cpu", on a GPU "wall".')
    parser.add_argument("--gradient_checkpointing", action="store_true", help="On in all trainers.")
    parser.add_argument("--small", action="store_true", help="Tiny models, to see that the script itself works.")
    parser.add_argument("--markdown", action="store_true", help="Tables to paste.")
    parser.add_argument("--json", help="File for all figures.")
    args = parser.parse_args()
    args.clock = args.clock or ("wall" if args.device == "cuda" else "cpu")
    torch.set_num_threads(args.threads)
    about = machine(args.device, args.threads, args.clock)
    print(about)
    report, verdicts = {}, []
    for beta in args.betas:
        seconds = report[beta] = measure(beta, args)
        tabulate(beta, seconds, args)
        ratio = median_ratio(seconds["ours"]["step"], seconds["TRL"]["step"])
        verdicts.append(Verdict(f"step of ours / TRL's, beta {beta}", ratio, BARS[beta]))
        for preset in {"DSKD v1", "DSKD v2"} & seconds.keys():
            ratio = median_ratio(seconds[preset]["step"], seconds["TRL"]["step"])
            verdicts.append(Verdict(f"step of {preset} / TRL's, beta {beta}", ratio, DSKD_BAR))
        parts = seconds["TRL"]
        alone = [step - written for step, written in zip(parts["step"], by_step(parts, args), strict=True)]
        ratio = median_ratio(seconds[CACHED]["step"], alone)
        verdicts.append(Verdict(f"step of {CACHED} / TRL's without its generation, beta {beta}", ratio, CACHED_BAR))
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": about, "seconds": report}, indent=2))
    judge(verdicts, args.markdown)


if __name__ == "__main__":
    main()

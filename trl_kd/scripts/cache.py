"""
Write the teacher's likeliest tokens for a dataset to disk, once, and train without the teacher afterwards.

```bash
trl-kd cache \
    --teacher_model_name_or_path Qwen/Qwen2.5-7B-Instruct \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --dataset_name rows.jsonl \
    --max_length 1024 \
    --output_dir teacher_cache

trl-kd cache --inspect teacher_cache
```
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase
    from trl import TrlParser

    from trl_kd.teachers import LocalTeacher, TeacherCache
    from trl_kd.teachers.cache_writer import CacheSettings


DESCRIPTION = """\
Write the teacher's likeliest tokens for a dataset to disk, or look at what was written (--inspect).

At every trained token of the dataset, the fewest tokens with the mass --top_p are kept, at most --max_tokens. A run
with `teacher_cache` set to the folder then needs no teacher. Give the student (--model_name_or_path) and the options
of the dataset as the run will have them: the run refuses a cache of other rows.

The rows are written in parts. Started again with the same options, a command that was cut off writes the parts that
are missing, and its result equals that of an uninterrupted one. If memory does not suffice, --batch_size may be made
smaller.
"""

# Rows that --inspect reads, evenly spaced
INSPECTED_ROWS = 2000
_BARS = 40


@dataclass
class CacheArguments:
    r"""
    Arguments of `trl-kd cache`.

    Args:
        teacher_model_name_or_path (`str`, *optional*):
            Model whose tokens are written: a local path or a Hub name. Required to write.
        teacher_model_init_kwargs (`dict[str, Any]`, *optional*):
            Arguments of `from_pretrained` for the teacher, as JSON: dtype, device map, 4/8-bit quantisation.
        model_name_or_path (`str`, *optional*):
            Student that will train: its tokenizer prepares the rows, its head bounds the vocabulary. By default, those
            of the teacher.
        model_revision (`str`, *optional*):
            Revision of the student on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the student's tokenizer.
        dataset_name (`str`, *optional*):
            Hub name, local file or folder. Required to write.
        dataset_config (`str`, *optional*):
            Configuration of a dataset on the Hub.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to use. A single local file is the split `train`.
        dataset_text_field (`str`, *optional*, defaults to `"text"`):
            Column of plain text.
        dataset_num_proc (`int`, *optional*):
            Number of processes that tokenise.
        assistant_only_loss (`bool`, *optional*, defaults to `False`):
            Whether all assistant turns are trained, as in the run to come.
        max_length (`int`, *optional*, defaults to `1024`):
            Longest row, in tokens, as in the run to come.
        eos_token (`str`, *optional*):
            EOS token, as in the run to come.
        pad_token (`str`, *optional*):
            Pad token, as in the run to come.
        chat_template_path (`str`, *optional*):
            Jinja file with the chat template, as in the run to come.
        output_dir (`str`, *optional*):
            Folder of the cache. Required to write.
        top_p (`float`, *optional*, defaults to `0.95`):
            Mass of the set that is kept in each state. Runs may use any smaller one.
        max_tokens (`int`, *optional*, defaults to `256`):
            Most tokens of a set.
        bits (`int`, *optional*, defaults to `8`):
            Bits of a log-probability: 4 to 16, or 32 for no rounding.
        batch_size (`int`, *optional*, defaults to `8`):
            Rows that the teacher reads at once. It changes the last digits: a command that goes on with another warns.
        rows_per_part (`int`, *optional*, defaults to `1000`):
            Rows of a file. A command that was cut off loses at most so many.
        inspect (`str`, *optional*):
            Folder of a cache to look at; nothing is written but a plot.
        plot_file (`str`, *optional*):
            Where `--inspect` saves its plot. By default, `sets.png` in the folder of the cache.
    """

    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Model whose tokens are written: a local path or a Hub name. Required to write."},
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of `from_pretrained` for the teacher, as JSON: dtype, device map, 4/8-bit quantisation."
        },
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Student that will train: its tokenizer prepares the rows, its head bounds the vocabulary. By "
            "default, those of the teacher."
        },
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the student on the Hub."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether to run code that comes with the student's tokenizer."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub name, local file or folder. Required to write."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    dataset_train_split: str = field(
        default="train", metadata={"help": "Split to use. A single local file is the split `train`."}
    )
    dataset_text_field: str = field(default="text", metadata={"help": "Column of plain text."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Number of processes that tokenise."})
    assistant_only_loss: bool = field(
        default=False, metadata={"help": "Whether all assistant turns are trained, as in the run to come."}
    )
    max_length: int | None = field(default=1024, metadata={"help": "Longest row, in tokens, as in the run to come."})
    eos_token: str | None = field(default=None, metadata={"help": "EOS token, as in the run to come."})
    pad_token: str | None = field(default=None, metadata={"help": "Pad token, as in the run to come."})
    chat_template_path: str | None = field(
        default=None, metadata={"help": "Jinja file with the chat template, as in the run to come."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder of the cache. Required to write."})
    top_p: float = field(
        default=0.95, metadata={"help": "Mass of the set that is kept in each state. Runs may use any smaller one."}
    )
    max_tokens: int = field(default=256, metadata={"help": "Most tokens of a set."})
    bits: int = field(default=8, metadata={"help": "Bits of a log-probability: 4 to 16, or 32 for no rounding."})
    batch_size: int = field(
        default=8,
        metadata={
            "help": "Rows that the teacher reads at once. It changes the last digits: a command that goes on with "
            "another warns."
        },
    )
    rows_per_part: int = field(
        default=1000, metadata={"help": "Rows of a file. A command that was cut off loses at most so many."}
    )
    inspect: str | None = field(
        default=None, metadata={"help": "Folder of a cache to look at; nothing is written but a plot."}
    )
    plot_file: str | None = field(
        default=None,
        metadata={"help": "Where `--inspect` saves its plot. By default, `sets.png` in the folder of the cache."},
    )

    def __post_init__(self):
        if isinstance(self.teacher_model_init_kwargs, str):
            self.teacher_model_init_kwargs = json.loads(self.teacher_model_init_kwargs)

    def settings(self) -> "CacheSettings":
        """What decides the content, beside teacher and dataset."""
        from trl_kd.teachers.cache_writer import CacheSettings

        names = ("top_p", "max_tokens", "bits", "batch_size", "rows_per_part")
        return CacheSettings(**{name: getattr(self, name) for name in names})


def check_arguments(args: CacheArguments) -> None:
    """Refuse what cannot work before a model is loaded."""
    if args.inspect is not None:
        if args.output_dir is not None:
            raise ValueError(
                f"`inspect` is '{args.inspect}' and `output_dir` is '{args.output_dir}', but a cache is either looked "
                "at or written. Leave out one of the two."
            )
        from trl_kd.teachers import TeacherCache

        TeacherCache.open(args.inspect)
        return
    for name in ("teacher_model_name_or_path", "dataset_name", "output_dir"):
        if getattr(args, name) is None:
            raise ValueError(
                f"`{name}` is not set, but `trl-kd cache` needs it to write a cache. Pass `--{name}`, or `--inspect "
                "FOLDER` to look at one."
            )
    args.settings()


def student_source(args: CacheArguments) -> tuple[str, dict[str, Any]]:
    """Path of the model whose tokenizer is used, and what says where it is."""
    if args.model_name_or_path is None:
        given = args.teacher_model_init_kwargs or {}
        path = args.teacher_model_name_or_path
    else:
        given = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
        path = args.model_name_or_path
    names = ("revision", "token", "trust_remote_code")
    return path, {name: given[name] for name in names if given.get(name) is not None}


def prepare(
    args: CacheArguments, dataset: "Dataset", teacher: "LocalTeacher"
) -> tuple["Dataset", "PreTrainedTokenizerBase", list[int]]:
    """The rows that a run with the same options trains on, its tokenizer, and the ends of its completions."""
    from trl_kd.data import prepare_dataset
    from trl_kd.generation import eos_token_ids
    from trl_kd.trainer.setup import own_tokenizer

    student, source = student_source(args)
    tokenizer = own_tokenizer(None, student, args, source)
    eos_ids = sorted({*eos_token_ids(student, tokenizer, **source), *eos_token_ids(teacher.model, tokenizer)})
    rows = prepare_dataset(
        dataset,
        tokenizer,
        max_length=args.max_length,
        eos_token_ids=eos_ids,
        text_field=args.dataset_text_field,
        assistant_only_loss=args.assistant_only_loss,
        num_proc=args.dataset_num_proc,
        name="train",
    )
    return rows, tokenizer, eos_ids


def vocab_size(args: CacheArguments, teacher: "LocalTeacher", tokenizer: "PreTrainedTokenizerBase") -> int:
    """Number of tokens that student and teacher share: a run with this student cuts the teacher's head to it."""
    from transformers import AutoConfig

    from trl_kd.teachers import shared_vocab_size

    if args.model_name_or_path is None:
        return teacher.vocab_size
    student, source = student_source(args)
    size = AutoConfig.from_pretrained(student, **source).get_text_config().vocab_size
    return shared_vocab_size(size, teacher.vocab_size, tokenizer, teacher.tokenizer())


def write(args: CacheArguments) -> None:
    """Write one cache, and say what it costs. Ctrl-C leaves with status 130 and says how much is written."""
    try:
        cache = write_rows(args)
    except KeyboardInterrupt:
        from trl_kd.teachers.cache_writer import written_rows

        rows = written_rows(args.output_dir)
        print(
            f"Interrupted: {rows:,} rows are written in {args.output_dir}. The same command goes on from there.",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    print(summary(cache))


def write_rows(args: CacheArguments) -> "TeacherCache":
    """The cache that the arguments describe, written."""
    from trl_kd.scripts.arguments import load_splits, select_split
    from trl_kd.scripts.generate import load_teacher
    from trl_kd.teachers.cache_writer import write_cache

    splits = load_splits(args.dataset_name, config=args.dataset_config)
    dataset = select_split(splits, args.dataset_train_split, "dataset_train_split")
    teacher = load_teacher(args)
    rows, tokenizer, eos_ids = prepare(args, dataset, teacher)
    size = vocab_size(args, teacher, tokenizer)
    return write_cache(rows, teacher, tokenizer, args.output_dir, eos_ids, args.settings(), size, show_progress=True)


def summary(cache: "TeacherCache") -> str:
    """What is in a cache and what it costs, in a few lines."""
    counts = cache.header["counts"]
    states, size = counts["states"], sum(part["bytes"] for part in cache.header["parts"])
    whole = 2 * cache.vocab_size * states
    lines = [
        f"{counts['rows']:,} rows and {states:,} states in {cache.path}, {counts['tokens'] / states:.1f} tokens each",
        f"{counts['data_bytes'] / states:.1f} bytes per state, {_size(size)} on disk; the logits of the whole "
        f"vocabulary in 16 bits are {2 * cache.vocab_size:,} bytes per state, {_size(whole)}",
    ]
    if counts["capped_states"]:
        lines.append(
            f"{counts['capped_states'] / states:.2%} of the sets end at {cache.settings['max_tokens']} tokens with "
            f"less mass than {cache.top_p}"
        )
    return "\n".join(lines)


def _size(number: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:,.0f} {unit}" if unit == "bytes" else f"{number:,.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"


def inspect(args: CacheArguments) -> None:
    """Show header, sets, and a few decoded states of a cache; save a plot."""
    from rich.console import Console

    from trl_kd.teachers import TeacherCache

    cache, console = TeacherCache.open(args.inspect), Console(width=119)
    values = measure(cache)
    show_header(console, cache)
    show_table(console, values)
    show_states(console, cache, tokenizer_of(args, cache))
    file = Path(args.plot_file or cache.path / "sets.png")
    if plot(values, file):
        console.print(f"The plot of set sizes and entropies is in {file}.", highlight=False, markup=False)
    else:
        text = "Set sizes (matplotlib, of the extra `trl_kd[plots]`, would draw them):\n"
        console.print(text + histogram(values["tokens of a set"]), highlight=False, markup=False)


def measure(cache: "TeacherCache") -> dict[str, "np.ndarray"]:
    """Values of each state of up to 2,000 rows, evenly spaced."""
    import numpy as np

    indices = np.unique(np.linspace(0, len(cache) - 1, INSPECTED_ROWS).round().astype(int))
    sizes, masses, entropies = [], [], []
    for index in indices:
        counts, _, log_probs = cache[int(index)]
        if len(counts) == 0:
            continue
        starts, probabilities = np.cumsum(counts) - counts, np.exp(log_probs.astype(np.float64))
        sizes.append(counts)
        masses.append(np.add.reduceat(probabilities, starts))
        # No token outside of the set is likelier than its last one, nor than all of them together
        outside = np.maximum(1 - masses[-1], 1e-12)
        rest = -outside * np.minimum(log_probs[starts + counts - 1], np.log(outside))
        entropies.append(np.add.reduceat(-probabilities * log_probs, starts) + rest)
    arrays = {"tokens of a set": sizes, "teacher's mass": masses, "entropy, at least (nats)": entropies}
    return {name: np.concatenate(parts).astype(float) for name, parts in arrays.items()}


def show_header(console: "Console", cache: "TeacherCache") -> None:
    """Where a cache comes from."""
    from rich.markup import escape

    header = cache.header
    tokenizer, teacher = header["tokenizer"], header["teacher"]
    template = "no chat template" if tokenizer["chat_template"] is None else "with a chat template"
    name = teacher["name"] or "without a path"
    if teacher.get("revision"):
        name += f" ({teacher['revision']})"
    lines = {
        "teacher": f"{name} in {teacher['dtype']}, weights {teacher['weights'][:12]}",
        "tokenizer": f"{tokenizer['size']:,} tokens, {template}, vocabulary {tokenizer['vocabulary'][:12]}",
        "vocabulary": f"{cache.vocab_size:,} tokens, ends {cache.eos_token_ids}",
        "dataset": f"{header['dataset']['rows']:,} rows, digest {header['dataset']['digest'][:12]}",
        "settings": ", ".join(f"{name} {value}" for name, value in cache.settings.items()),
        "files": f"{len(header['parts'])} parts, version {header['version']}",
    }
    for name, value in lines.items():
        console.print(f"[bold]{name:<11}[/bold]{escape(value)}", highlight=False)
    console.print(summary(cache), highlight=False, markup=False)


def show_table(console: "Console", values: dict[str, "np.ndarray"]) -> None:
    """Quantiles of what was measured."""
    import numpy as np
    from rich.table import Table

    states = len(next(iter(values.values())))
    table = Table(title=f"{states:,} states", title_justify="left")
    table.add_column("")
    for title in ("mean", "least", "median", "99%", "most"):
        table.add_column(title, justify="right")
    for name, array in values.items():
        numbers = [array.mean(), array.min(), np.median(array), np.quantile(array, 0.99), array.max()]
        table.add_row(name, *(f"{number:.4g}" for number in numbers))
    console.print(table)


def tokenizer_of(args: CacheArguments, cache: "TeacherCache") -> "PreTrainedTokenizerBase | None":
    """The tokenizer of a cache, if it lies beside the student or the teacher on this machine."""
    from transformers import AutoTokenizer

    from trl_kd.teachers.fingerprint import tokenizer_digests

    teacher = cache.header["teacher"]
    sources = (args.model_name_or_path, args.model_revision), (teacher["name"], teacher.get("revision"))
    for path, revision in sources:
        if not path:
            continue
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, local_files_only=True)
        except (OSError, ValueError):
            continue
        if tokenizer_digests(tokenizer)["vocabulary"] == cache.header["tokenizer"]["vocabulary"]:
            return tokenizer
    return None


def show_states(
    console: "Console",
    cache: "TeacherCache",
    tokenizer: "PreTrainedTokenizerBase | None",
    rows: int = 3,
    states: int = 5,
) -> None:
    """The likeliest tokens of the first states of a few rows."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("row", "state", "tokens", "likeliest", title="First states of a few rows", title_justify="left")
    for index in sorted({0, len(cache) // 2, len(cache) - 1})[:rows]:
        counts, ids, log_probs = cache[index]
        start = 0
        for state, count in enumerate(counts[:states]):
            shown = []
            for token, log_prob in zip(ids[start : start + min(count, 6)], log_probs[start:], strict=False):
                text = str(token) if tokenizer is None else repr(tokenizer.decode([int(token)]))
                shown.append(f"{text} {math.exp(log_prob):.3f}")
            table.add_row(str(index), str(state), str(count), escape("  ".join(shown)))
            start += count
    console.print(table)


def plot(values: dict[str, "np.ndarray"], file: Path) -> bool:
    """Save the distributions of set sizes and entropies; `False` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    import numpy as np

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots(1, 2)
    sizes, entropies = values["tokens of a set"], values["entropy, at least (nats)"]
    axes[0].hist(sizes, bins=np.unique(np.geomspace(1, sizes.max() + 1, _BARS).round()))
    axes[0].set(xscale="log", xlabel="tokens of a set", ylabel="states")
    axes[1].hist(entropies, bins=_BARS)
    axes[1].set(xlabel="entropy of the teacher, at least (nats)")
    figure.savefig(file, dpi=120)
    return True


def histogram(sizes: "np.ndarray") -> str:
    """Numbers of states by set size, in powers of two, as bars of text."""
    import numpy as np

    octaves = np.bincount(np.log2(sizes).astype(int))
    lines = []
    for octave, count in enumerate(octaves):
        label = "1" if octave == 0 else f"{2**octave}-{2 ** (octave + 1) - 1}"
        lines.append(f"{label:>13} {'#' * round(_BARS * count / octaves.max()):<{_BARS}} {count / len(sizes):6.1%}")
    return "\n".join(lines)


def main(args: CacheArguments) -> None:
    """Write a cache, or look at one."""
    if args.inspect is not None:
        inspect(args)
    else:
        write(args)


def make_parser(prog: str | None = None) -> "TrlParser":
    """Parser of the options of `trl-kd cache`."""
    from trl_kd.scripts.arguments import option_parser

    return option_parser(CacheArguments, DESCRIPTION, prog)


def run(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse the command line and write or show a cache."""
    from trl_kd.scripts.arguments import parse_options

    main(*parse_options(make_parser(prog), arguments, check=check_arguments))


if __name__ == "__main__":
    run()

"""
Let a teacher write the completions for the prompts of a dataset.

```bash
trl-kd generate \
    --teacher_model_name_or_path Qwen/Qwen2.5-1.5B-Instruct \
    --dataset_name prompts.jsonl \
    --output_file teacher.jsonl \
    --max_completion_length 256
```

Each block of prompts is sampled under its own seed, so a run that was cut off can go on and write the same.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase
    from trl import TrlParser

    from trl_kd.teachers import LocalTeacher


# These columns of a dataset hold what the teacher writes anew.
REPLACED_COLUMNS = ("messages", "completion", "truncated", "input_ids", "labels")

DESCRIPTION = """\
Let a teacher write the completions for the prompts of a dataset.

The rows keep the prompt and the dataset's other columns; `completion` is added or replaced (a list with one message
where the prompt is a list of messages). Rows of `messages` become `prompt` and `completion`. The column `truncated` is
true where a completion reached --max_completion_length without ending: the text goes on where it stops, so nothing
should be trained to end there.

The output file appears whole or not at all. Finished blocks are kept in <output_file>.partial: started again with the
same options, a run that was cut off goes on from there, and its result equals that of an uninterrupted run.
"""


@dataclass
class GenerateArguments:
    r"""
    Arguments of `trl-kd generate`.

    Args:
        teacher_model_name_or_path (`str`, *optional*):
            Model that writes the completions: a local path or a Hub name. Required.
        teacher_model_init_kwargs (`dict[str, Any]`, *optional*):
            Arguments of `from_pretrained` for the teacher, as JSON: dtype, device map, 4/8-bit quantisation.
        dataset_name (`str`, *optional*):
            Hub name, local file or folder with the prompts. Required.
        dataset_config (`str`, *optional*):
            Configuration of a dataset on the Hub.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split to use. A single local file is the split `train`.
        output_file (`str`, *optional*):
            File to write, `.jsonl` or `.parquet`. It must not exist. Required.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Maximum number of tokens of a completion.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature. 0 is greedy.
        top_p (`float`, *optional*, defaults to `1.0`):
            Probability mass of the tokens sampled from.
        top_k (`int`, *optional*, defaults to `0`):
            Number of tokens sampled from. 0 means all.
        min_p (`float`, *optional*):
            Minimum probability of a token sampled from, relative to the likeliest.
        repetition_penalty (`float`, *optional*, defaults to `1.0`):
            Penalty of tokens that have occurred. 1.0 is none.
        batch_size (`int`, *optional*, defaults to `8`):
            Completions written at once. It decides which completions share a seed, so a run goes on only with the
            same.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the sampling.
        num_completions (`int`, *optional*, defaults to `1`):
            Completions per prompt. Each becomes a row of its own.
    """

    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Model that writes the completions: a local path or a Hub name. Required."},
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of `from_pretrained` for the teacher, as JSON: dtype, device map, 4/8-bit quantisation."
        },
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub name, local file or folder with the prompts. Required."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    dataset_split: str = field(
        default="train", metadata={"help": "Split to use. A single local file is the split `train`."}
    )
    output_file: str | None = field(
        default=None, metadata={"help": "File to write, `.jsonl` or `.parquet`. It must not exist. Required."}
    )
    max_completion_length: int = field(default=256, metadata={"help": "Maximum number of tokens of a completion."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature. 0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Probability mass of the tokens sampled from."})
    top_k: int = field(default=0, metadata={"help": "Number of tokens sampled from. 0 means all."})
    min_p: float | None = field(
        default=None, metadata={"help": "Minimum probability of a token sampled from, relative to the likeliest."}
    )
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "Penalty of tokens that have occurred. 1.0 is none."}
    )
    batch_size: int = field(
        default=8,
        metadata={
            "help": "Completions written at once. It decides which completions share a seed, so a run goes on only "
            "with the same."
        },
    )
    seed: int = field(default=42, metadata={"help": "Seed of the sampling."})
    num_completions: int = field(
        default=1, metadata={"help": "Completions per prompt. Each becomes a row of its own."}
    )

    def __post_init__(self):
        if isinstance(self.teacher_model_init_kwargs, str):
            self.teacher_model_init_kwargs = json.loads(self.teacher_model_init_kwargs)


def check_arguments(args: GenerateArguments) -> None:
    """Refuse what cannot work before a model is loaded."""
    for name in ("teacher_model_name_or_path", "dataset_name", "output_file"):
        if getattr(args, name) is None:
            raise ValueError(f"`{name}` is not set, but `trl-kd generate` needs it. Pass `--{name}`.")
    if Path(args.output_file).suffix not in (".jsonl", ".parquet"):
        raise ValueError(
            f"`output_file` is '{args.output_file}', but its ending decides the format. End it in .jsonl or .parquet."
        )
    if Path(args.output_file).exists():
        raise ValueError(
            f"`output_file` is '{args.output_file}', which exists and would be lost. Remove it or name another file."
        )
    for name in ("batch_size", "num_completions", "max_completion_length"):
        if getattr(args, name) < 1:
            raise ValueError(
                f"`{name}` is {getattr(args, name)}, but nothing can be written then. Set it to 1 or more."
            )


def prompt_row(row: dict[str, Any], index: int) -> dict[str, Any]:
    """The prompt of a row, in the `prompt` column, with the row's number."""
    if "messages" not in row:
        return {"prompt": row["prompt"], "row_index": index}
    messages = row["messages"]
    return {"prompt": messages[:-1] if messages[-1]["role"] == "assistant" else messages, "row_index": index}


def prepare_prompts(dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase", eos_token_ids: list[int]) -> "Dataset":
    """Tokenise the prompts exactly as a trainer does, into `input_ids`; the other columns stay."""
    from trl_kd.data import prepare_dataset

    if not {"messages", "prompt"} & set(dataset.column_names):
        raise ValueError(
            f"The dataset has the columns {dataset.column_names}, but a teacher needs something to answer. Give it a "
            "column `prompt` (text or messages) or `messages`."
        )
    replaced = [name for name in dataset.column_names if name in REPLACED_COLUMNS]
    prompts = dataset.map(prompt_row, with_indices=True, remove_columns=replaced, desc="Taking the prompts")
    return prepare_dataset(prompts, tokenizer, max_length=None, eos_token_ids=eos_token_ids, name="prompt")


def header_of(args: GenerateArguments, prompts: list[list[int]]) -> dict[str, Any]:
    """All that decides what is written, so that a run goes on only where it would have come itself."""
    settings = {name: value for name, value in asdict(args).items() if name not in ("output_file",)}
    return {"settings": settings, "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()}


def read_finished_blocks(partial: Path, header: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """
    Blocks that an earlier run has finished; a block that it was cut off in is removed from the file.

    The file has one line for the header and one for each block.
    """
    if not partial.exists():
        partial.write_text(json.dumps(header) + "\n", encoding="utf-8")
        return []
    content = partial.read_bytes()
    content = content[: content.rfind(b"\n") + 1]
    lines = content.decode("utf-8").splitlines()
    # A run that ended before its first line was whole has nothing to go on from
    found = json.loads(lines[0]) if lines else header
    # What JSON makes of the header, such as lists for tuples
    expected = json.loads(json.dumps(header))
    if found != expected:
        changed = [name for name, value in expected["settings"].items() if found["settings"].get(name) != value]
        difference = f"settings ({', '.join(changed)})" if changed else "prompts"
        raise ValueError(
            f"`{partial}` comes from a run with other {difference}, so its completions do not belong to this one. "
            "Remove the file, or run with what it was made with."
        )
    if not lines:
        content = (json.dumps(header) + "\n").encode("utf-8")
        partial.write_bytes(content)
    os.truncate(partial, len(content))
    return [json.loads(line) for line in lines[1:]]


def write_blocks(
    args: GenerateArguments,
    teacher: "LocalTeacher",
    tokenizer: "PreTrainedTokenizerBase",
    eos_token_ids: list[int],
    prompts: list[list[int]],
) -> list[dict[str, Any]]:
    """
    Write the completions of all prompts, block by block, into the partial file.

    Returns:
        `list[dict[str, Any]]`: `completion` and `truncated`, for each prompt and each of its completions.
    """
    from tqdm.auto import tqdm

    from trl_kd.generation import Sampling, completion_text, rollout_seed

    sampling = Sampling.of(args)
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    sequences = [prompt for prompt in prompts for _ in range(args.num_completions)]
    partial = partial_file(args)
    blocks = read_finished_blocks(partial, header_of(args, prompts))
    starts = range(0, len(sequences), args.batch_size)
    with partial.open("a", encoding="utf-8") as file:
        for index in tqdm(range(len(blocks), len(starts)), total=len(starts), initial=len(blocks), desc="Generating"):
            batch = sequences[starts[index] : starts[index] + args.batch_size]
            completions = teacher.generate(
                batch, sampling, pad_token_id, eos_token_ids, seed=rollout_seed(args.seed, index)
            )
            blocks.append(
                [
                    {
                        "completion": completion_text(tokenizer, prompt_ids, completion_ids),
                        "truncated": completion_ids[-1] not in eos_token_ids,
                    }
                    for prompt_ids, completion_ids in zip(batch, completions, strict=True)
                ]
            )
            file.write(json.dumps(blocks[-1], ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    return [row for block in blocks for row in block]


def partial_file(args: GenerateArguments) -> Path:
    """Where finished blocks wait for the others."""
    return Path(f"{args.output_file}.partial")


def write_output(args: GenerateArguments, prompts: "Dataset", rows: list[dict[str, Any]]) -> None:
    """Write the finished dataset under its own name only when it is whole, then drop the partial file."""
    added = [name for name in ("input_ids", "labels", "prompt_length", "row_index") if name in prompts.column_names]
    dataset = prompts.select([index // args.num_completions for index in range(len(rows))]).remove_columns(added)
    completions: list[Any] = [row["completion"] for row in rows]
    if isinstance(dataset[0]["prompt"], list):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    dataset = dataset.add_column("completion", completions)
    dataset = dataset.add_column("truncated", [row["truncated"] for row in rows])

    unfinished = Path(f"{args.output_file}.unfinished")
    if args.output_file.endswith(".parquet"):
        dataset.to_parquet(unfinished)
    else:
        dataset.to_json(unfinished, force_ascii=False)
    os.replace(unfinished, args.output_file)
    partial_file(args).unlink()


def load_teacher(args: GenerateArguments) -> "LocalTeacher":
    """The teacher, on the accelerator if there is one and nothing else is asked for."""
    from accelerate import PartialState

    from trl_kd.teachers import LocalTeacher

    init_kwargs = dict(args.teacher_model_init_kwargs or {})
    if PartialState().device.type not in ("cpu", "mps"):
        init_kwargs.setdefault("device_map", "auto")
    return LocalTeacher(args.teacher_model_name_or_path, init_kwargs)


def main(args: GenerateArguments) -> None:
    """Write one file with a completion for each prompt."""
    from trl_kd.generation import eos_token_ids
    from trl_kd.scripts.arguments import load_splits, select_split

    splits = load_splits(args.dataset_name, config=args.dataset_config)
    dataset = select_split(splits, args.dataset_split, "dataset_split")
    teacher = load_teacher(args)
    tokenizer = teacher.tokenizer()
    if tokenizer is None:
        raise ValueError(
            f"No tokenizer lies beside the teacher `{args.teacher_model_name_or_path}`, without which it cannot read "
            "prompts. Save the tokenizer in the same folder."
        )
    eos_ids = eos_token_ids(teacher.model, tokenizer)
    prompts = prepare_prompts(dataset, tokenizer, eos_ids)
    rows = write_blocks(args, teacher, tokenizer, eos_ids, prompts["input_ids"][:])
    write_output(args, prompts, rows)
    truncated = sum(row["truncated"] for row in rows)
    print(f"{len(rows)} completions written to {args.output_file}, {truncated} of them cut at the limit.")


def make_parser(prog: str | None = None) -> "TrlParser":
    """Parser of the options of `trl-kd generate`."""
    from trl_kd.scripts.arguments import option_parser

    return option_parser(GenerateArguments, DESCRIPTION, prog)


def run(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse the command line and write the completions."""
    from trl_kd.scripts.arguments import parse_options

    main(*parse_options(make_parser(prog), arguments, check=check_arguments))


if __name__ == "__main__":
    run()

"""
Make one full model of a student's adapter, checked, with the files that llama.cpp and vLLM read.

```bash
trl-kd export --model_name_or_path Qwen2.5-0.5B-AMM --output_dir Qwen2.5-0.5B-AMM-full --load_in_4bit true
```
"""

import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from torch import Tensor
    from trl import TrlParser

    from trl_kd.scripts.export_merge import Difference, Student


DESCRIPTION = """\
Merge a student's adapter into a full model that loads in plain Transformers, vLLM and llama.cpp's converter; or write
a fully trained student in another dtype.

What was written is loaded again and compared with the adapter over its base: if the logits differ by more than
--max_difference, nothing is left. An adapter that was trained by QLoRA belongs to the quantised weights: say so by
--load_in_4bit or --load_in_8bit, with the options that the training had.
"""
# Largest difference of a logit, as a share of the largest logit. Both models compute in float32, so that beyond the
# first of these it is the rounding of the written weights that shows; their fractions have 23, 10 and 7 bits
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
REPORT = "Please report this with the model's `config.json` and the adapter's `adapter_config.json`."


@dataclass
class ExportArguments:
    r"""
    Arguments of `trl-kd export`.

    Args:
        model_name_or_path (`str`, *optional*):
            The student: folder or Hub name of an adapter, a checkpoint or a full model.
        output_dir (`str`, *optional*):
            Folder to write, which must not exist yet.
        base_model_name_or_path (`str`, *optional*):
            The model under the adapter, in place of the one that the adapter names.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type of the written weights: float32, float16 or bfloat16; auto for the one of the original weights.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Whether the adapter was trained on weights in 4 bits, which it is then merged into.
        load_in_8bit (`bool`, *optional*, defaults to `False`):
            Whether the adapter was trained on weights in 8 bits, which it is then merged into.
        bnb_4bit_quant_type (`str`, *optional*, defaults to `"nf4"`):
            Kind of the 4 bits in training: nf4 or fp4.
        use_bnb_nested_quant (`bool`, *optional*, defaults to `False`):
            Whether the scales of the 4 bits were quantised too in training.
        merge_into_original (`bool`, *optional*, defaults to `False`):
            Whether to merge an adapter into the original weights though it was trained on quantised ones.
        texts (`list[str]`, *optional*, defaults to `[]`):
            Texts to compare the logits on, beside those that always are.
        max_difference (`float`, *optional*):
            Largest difference of a logit that is let pass, as a share of the largest logit. Defaults to 1e-4 for
            float32, 0.02 for float16, 0.1 for bfloat16.
        push_to_hub (`bool`, *optional*, defaults to `False`):
            Whether to upload what was written.
        hub_model_id (`str`, *optional*):
            Repository to upload to. Defaults to the name of the output folder.
        hub_private_repo (`bool`, *optional*):
            Whether the repository is private, if it is made.
    """

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The student: folder or Hub name of an adapter, a checkpoint or a full model."},
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder to write, which must not exist yet."})
    base_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The model under the adapter, in place of the one that the adapter names."},
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Data type of the written weights: float32, float16 or bfloat16; auto for the one of the original "
            "weights."
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Whether the adapter was trained on weights in 4 bits, which it is then merged into."},
    )
    load_in_8bit: bool = field(
        default=False,
        metadata={"help": "Whether the adapter was trained on weights in 8 bits, which it is then merged into."},
    )
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "Kind of the 4 bits in training: nf4 or fp4."})
    use_bnb_nested_quant: bool = field(
        default=False, metadata={"help": "Whether the scales of the 4 bits were quantised too in training."}
    )
    merge_into_original: bool = field(
        default=False,
        metadata={
            "help": "Whether to merge an adapter into the original weights though it was trained on quantised ones."
        },
    )
    texts: list[str] = field(
        default_factory=list,
        metadata={"help": "Texts to compare the logits on, beside those that always are."},
    )
    max_difference: float | None = field(
        default=None,
        metadata={
            "help": "Largest difference of a logit that is let pass, as a share of the largest logit. Defaults to "
            "1e-4 for float32, 0.02 for float16, 0.1 for bfloat16."
        },
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Whether to upload what was written."})
    hub_model_id: str | None = field(
        default=None,
        metadata={"help": "Repository to upload to. Defaults to the name of the output folder."},
    )
    hub_private_repo: bool | None = field(
        default=None, metadata={"help": "Whether the repository is private, if it is made."}
    )


def check_arguments(args: ExportArguments) -> None:
    """Refuse what cannot work before anything is loaded."""
    if args.model_name_or_path is None or args.output_dir is None:
        raise ValueError(
            "An export reads one folder and writes another. Pass both `--model_name_or_path` and `--output_dir`."
        )
    output = Path(args.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(
            f"`output_dir` is '{output}', which exists and is not empty. What is in it would be lost: name a new "
            "folder, or remove this one."
        )
    if args.dtype not in ("auto", *TOLERANCES):
        raise ValueError(
            f"`dtype` is '{args.dtype}', which is not written here. Use one of auto, {', '.join(TOLERANCES)}."
        )
    if args.bnb_4bit_quant_type not in ("nf4", "fp4"):
        raise ValueError(
            f"`bnb_4bit_quant_type` is '{args.bnb_4bit_quant_type}', which bitsandbytes lacks. Use nf4 or fp4."
        )
    if args.load_in_4bit + args.load_in_8bit + args.merge_into_original > 1:
        raise ValueError(
            "The weights under the adapter were in 4 bits, or in 8, or the original ones are meant. Pass only one of "
            "`--load_in_4bit`, `--load_in_8bit` and `--merge_into_original`."
        )
    if args.max_difference is not None and args.max_difference < 0:
        raise ValueError(
            f"`max_difference` is {args.max_difference}, but no distance is negative. Set it to 0 or more."
        )


def written_dtype(args: ExportArguments, student: "Student") -> str:
    """Name of the dtype to be written."""
    from transformers import AutoConfig

    if args.dtype != "auto":
        return args.dtype
    name = str(AutoConfig.from_pretrained(student.model).dtype).removeprefix("torch.")
    return name if name in TOLERANCES else "float32"


def require(found: "Difference", limit: float, what: str, remedy: str) -> "Difference":
    """Refuse a model that is not the student."""
    if not found.relative <= limit:  # a NaN too
        raise RuntimeError(
            f"The logits {what} differ from the student's by {found.largest:.2e}, {found.relative:.2e} of the largest "
            f"logit, where {limit:g} is allowed; {found.same_top1:.1%} of the likeliest tokens are the same. "
            f"That is not the student that was trained, so nothing was kept. {remedy}"
        )
    return found


def read_again(folder: Path, ids: "list[Tensor]") -> "list[Tensor]":
    """Logits of what was written, loaded as anyone would."""
    from trl_kd.scripts.export_merge import load_whole, logits_of

    model, wrong = load_whole(folder)
    if wrong:
        raise RuntimeError(
            f"The written model does not load as it should: {wrong}. It would compute something else than the student "
            "does, so nothing was kept. Please report this with the model's `config.json`."
        )
    return logits_of(model, ids)


def export(args: ExportArguments) -> dict[str, str]:
    r"""
    Write the full model, whole or not at all.

    Args:
        args ([`ExportArguments`]):
            What to read and to write.

    Returns:
        `dict[str, str]`: What was measured, by its name in the table.

    Raises:
        ValueError: If there is no student, no base, or they do not fit.
        RuntimeError: If what was written is not the student.
    """
    from trl_kd.evaluation.cost_worker import size_on_disk
    from trl_kd.scripts import export_merge as merging
    from trl_kd.scripts.export_files import write_model

    student = merging.find_student(args)
    quantization = merging.quantisation(args, student)
    tokenizer = merging.load_tokenizer(student)
    dtype = written_dtype(args, student)
    ids = merging.probes(student, tokenizer, args.texts)
    model, expected, rounding = merging.reference(student, quantization, ids)
    limit = TOLERANCES[dtype] if args.max_difference is None else args.max_difference
    exact = max(TOLERANCES["float32"], args.max_difference or 0.0)
    merged = merging.merge(model)
    merged_logits = merging.logits_of(merged, ids)
    require(merging.Difference.of(expected, merged_logits), exact, "after merging", REPORT)

    output = Path(args.output_dir)
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f".{output.name}.part-{os.getpid()}")
    try:
        merging.cast(merged, dtype)
        write_model(merged, tokenizer, part, list(dict.fromkeys((student.folder, student.model))))
        merging.cast(merged, "float32")
        rounded_logits = merging.logits_of(merged, ids)
        parameters = merged.num_parameters()
        del merged, model
        written_logits = read_again(part, ids)
        require(merging.Difference.of(rounded_logits, written_logits), exact, "after writing and loading", REPORT)
        found = merging.Difference.of(expected, written_logits)
        require(found, limit, f"in {dtype}", "Write it in float32 by `--dtype`, or allow more by `--max_difference`.")
        os.replace(part, output)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    facts = {"parameters": f"{parameters:,}", "weights on disk": f"{size_on_disk(output) / 1e6:,.1f} MB, {dtype}"}
    if merging.was_untied(student, output):
        facts["head"] = "no longer tied: the adapter changed it, or the embeddings, alone"
    facts |= in_words("written model against the student", found)
    return facts | ({} if rounding is None else in_words("8 bits of the activations in training", rounding))


def in_words(name: str, found: "Difference") -> dict[str, str]:
    """Rows of the table for one comparison."""
    return {
        f"{name}: largest difference of a logit": f"{found.largest:.2e} ({found.relative:.2e} of the largest logit)",
        f"{name}: same likeliest token": f"{found.same_top1:.1%}",
    }


def next_commands(args: ExportArguments, dtype: str) -> list[str]:
    """What to do with the model."""
    output = shlex.quote(str(args.output_dir).rstrip("/"))
    outtype = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
    return [
        f"python llama.cpp/convert_hf_to_gguf.py {output} --outtype {outtype} --outfile {output}-{outtype}.gguf",
        f"llama.cpp/build/bin/llama-quantize {output}-{outtype}.gguf {output}-Q4_K_M.gguf Q4_K_M",
        f"vllm serve {output}",
    ]


def upload(args: ExportArguments) -> str:
    """Put the folder into a repository on the Hub."""
    from huggingface_hub import HfApi

    api = HfApi()
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    repository = api.create_repo(name, private=args.hub_private_repo, exist_ok=True)
    api.upload_folder(repo_id=repository.repo_id, folder_path=args.output_dir, commit_message="Full model, by trl-kd")
    return str(repository)


def main(args: ExportArguments) -> None:
    """Export, and say what came out."""
    from rich.console import Console
    from rich.table import Table

    facts = export(args)
    table = Table(title=f"Exported to {args.output_dir}", title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(name, value)
    console = Console(width=None if Console().is_terminal else 140)
    console.print(table)
    for command in next_commands(args, facts["weights on disk"].rpartition(" ")[2]):
        console.print(command, highlight=False, markup=False, soft_wrap=True)
    if args.push_to_hub:
        console.print(f"Uploaded: {upload(args)}", highlight=False, markup=False, soft_wrap=True)


def make_parser(prog: str | None = None) -> "TrlParser":
    """Parser of the options of `trl-kd export`."""
    from trl_kd.scripts.arguments import option_parser

    return option_parser(ExportArguments, DESCRIPTION, prog)


def run(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse the command line and export."""
    from trl_kd.scripts.arguments import parse_options, quiet_libraries

    parser = make_parser(prog)
    (args,) = parse_options(parser, arguments, check=check_arguments)
    try:
        with quiet_libraries():
            main(args)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    run()

"""What the commands share: parsing their options, finding their dataset."""

import logging
import warnings
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import DatasetDict, IterableDatasetDict
    from trl import TrlParser


# File name endings, and the builder of `datasets` that reads them
BUILDERS = {".json": "json", ".jsonl": "json", ".json.gz": "json", ".jsonl.gz": "json", ".parquet": "parquet"}


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows the default of each option, and leaves the lines of the description as they are."""


def option_parser(arguments: type, description: str, prog: str | None = None) -> "TrlParser":
    """
    Parser of a command whose options are the fields of one dataclass.

    Args:
        arguments (`type`):
            The dataclass.
        description (`str`):
            What the command does.
        prog (`str`, *optional*):
            Name of the command, for its messages.

    Returns:
        `TrlParser`
    """
    from trl import TrlParser

    return TrlParser(
        arguments,
        prog=prog,
        allow_abbrev=False,
        usage="%(prog)s [--config FILE.yaml] [options]",
        description=description,
        formatter_class=HelpFormatter,
    )


def parse_options(
    parser: "TrlParser", arguments: Sequence[str] | None, check: Callable[..., None] | None = None
) -> tuple[Any, ...]:
    """
    Parse options and the YAML file of `--config`; leave with one line and status 2 if they are wrong.

    Args:
        parser (`TrlParser`):
            Parser of the command.
        arguments (`Sequence[str]`, *optional*):
            Command line after the command's name. Defaults to that of the process.
        check (`Callable`, *optional*):
            Called with the parsed objects; a `ValueError` it raises is reported in the same way.

    Returns:
        `tuple`: One object for each dataclass of the parser.
    """
    try:
        *parsed, unknown_in_file, unknown = parser.parse_args_and_config(
            arguments, return_remaining_strings=True, separate_remaining_strings=True
        )
    except (ValueError, OSError) as error:
        # The dataclasses check their values, the parser its file: the message is for whoever typed them.
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    for found, place in ((unknown_in_file, "the file given by --config"), (unknown, "the command line")):
        if found:
            parser.exit(
                2,
                f"{parser.prog}: error: unknown option in {place}: {' '.join(found)}. "
                f"`{parser.prog} --help` lists those that exist.\n",
            )
    if check is not None:
        try:
            check(*parsed)
        except ValueError as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")
    return tuple(parsed)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without progress bars, and without warnings of libraries about their own code, which nobody here can mend."""
    import datasets
    from transformers.utils import logging as transformers_logging

    bars = datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()
    kernels = logging.getLogger("bitsandbytes")  # says at its import that a faster kernel for CPUs is not installed
    level = kernels.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message=".*use_reentrant")
        # PEFT looks at addresses, which a quantised base never shares; the export counts the weights it has written
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()
        kernels.setLevel(logging.ERROR)
        try:
            yield
        finally:
            kernels.setLevel(level)
            if not bars[0]:
                datasets.enable_progress_bars()
            if bars[1]:
                transformers_logging.enable_progress_bar()


def load_splits(name: str, config: str | None = None, streaming: bool = False) -> "DatasetDict | IterableDatasetDict":
    """
    Load a dataset by its Hub name, or from a local file or folder.

    Args:
        name (`str`):
            Name on the Hub; or a `.json`, `.jsonl`, `.jsonl.gz` or `.parquet` file, which becomes the split `train`;
            or a folder of such files, named after their splits (`train.jsonl`, `test.jsonl`).
        config (`str`, *optional*):
            Configuration of a dataset on the Hub.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read the rows as they are needed.

    Returns:
        `DatasetDict` or `IterableDatasetDict`: Dataset by split.
    """
    from datasets import load_dataset

    builder = next((BUILDERS[ending] for ending in BUILDERS if name.endswith(ending)), None)
    if builder is None:
        return load_dataset(name, name=config, streaming=streaming)
    if not Path(name).is_file():
        raise FileNotFoundError(
            f"`dataset_name` is '{name}', but there is no such file. Give an existing file or folder, or the name of "
            "a dataset on the Hub."
        )
    return load_dataset(builder, data_files={"train": name}, streaming=streaming)


def select_split(splits: "DatasetDict | IterableDatasetDict", split: str, option: str) -> Any:
    """One split of a dataset; `option` is the option that named it."""
    if split not in splits:
        raise ValueError(
            f"`{option}` is '{split}', but the dataset has only {sorted(splits)}. Name one of these; a local folder "
            f"with a file {split}.jsonl has that split too."
        )
    return splits[split]

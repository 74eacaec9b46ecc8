"""`trl-kd <command>`: picks the command, and imports what it needs only then."""

import importlib
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence

from trl_kd.scripts.launch import launch, script_module, split_launch_arguments


# Command -> what it does, in one line. Its module is `script_module(command)`.
COMMANDS = {
    "amm": "distil a teacher into a student by adversarial moment matching",
    "dskd": "distil a teacher into a student by dual-space distillation, also across tokenizers",
    "sparse-td": "distil a teacher into a student on the teacher's likeliest tokens, also from a cache of them",
    "check": "say whether a run fits and starts right, before it starts, and what to change if not",
    "generate": "let a teacher write the completions for the prompts of a dataset",
    "cache": "write a teacher's likeliest tokens for a dataset to disk, to train without the teacher",
    "export": "merge an adapter into a full model, checked, for llama.cpp, vLLM and plain Transformers",
    "eval": "compare teacher, student before and students after, with error bars, and keep what was found",
    "report": "one page of what training and evaluation found, to look at in a browser",
    "bench": "compare methods over seeds at equal budgets of student tokens, from one configuration",
    "demo": "see all of it on a CPU, offline: a small teacher, a student, and the report on both",
}
# These go through `accelerate launch` when a launch argument is given.
TRAINING_COMMANDS = ("amm", "dskd", "sparse-td")


def make_parser() -> ArgumentParser:
    """Parser of the command's name alone."""
    width = max(map(len, COMMANDS))
    parser = ArgumentParser(
        prog="trl-kd",
        usage="trl-kd <command> [options]",
        description="Knowledge distillation for language models, on TRL.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
        + "\n\n`trl-kd <command> --help` lists the options of a command.",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="<command>", help="one of those below")
    parser.add_argument("--version", action="version", version=version())
    return parser


def version() -> str:
    """Version of this package, read without importing it anew."""
    from trl_kd import __version__

    return f"trl_kd {__version__}"


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments after the program's name. Defaults to those of the process.

    Returns:
        `int`: Exit status. Bad arguments leave by `SystemExit` with status 2, as in argparse.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    if not argv:
        parser.print_help()
        return 0
    # What follows the command belongs to the command: its `--help` too.
    command = parser.parse_args(argv[:1]).command
    arguments = argv[1:]

    if command in TRAINING_COMMANDS and not {"-h", "--help"} & set(arguments):
        launch_arguments, arguments = split_launch_arguments(arguments, prog=f"trl-kd {command}")
        if launch_arguments:
            launch(script_module(command), launch_arguments, arguments)
            return 0

    # What `eval` and `check` have found is in their status
    return importlib.import_module(script_module(command)).run(arguments, prog=f"trl-kd {command}") or 0


if __name__ == "__main__":
    raise SystemExit(main())

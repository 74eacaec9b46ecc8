"""Starting a training command on several processes, through `accelerate launch`."""

from argparse import ArgumentParser
from collections.abc import Sequence
from importlib import resources
from pathlib import Path


# The launch arguments that a command takes: what else `accelerate` offers goes into a file for `--accelerate_config`.
LAUNCH_ARGUMENTS = {
    "accelerate_config": "a file, or one of the configurations that TRL ships: multi_gpu, fsdp2, zero2, zero3, ...",
    "num_processes": "number of processes over all machines, usually one per GPU",
    "num_machines": "number of machines",
    "machine_rank": "rank of this machine",
    "main_process_ip": "address of the machine of rank 0",
    "main_process_port": "port on the machine of rank 0",
    "gpu_ids": "GPUs of this machine to use, separated by commas",
}


def script_module(command: str) -> str:
    """The module of a command: `sparse-td` is `trl_kd.scripts.sparse_td`."""
    return f"trl_kd.scripts.{command.replace('-', '_')}"


def launch_help(module: str) -> str:
    """What a training command's `--help` says about several processes; `module` is the command's."""
    return (
        "Several processes: with one of the following on the command line (not in the YAML file), the command goes\n"
        "through `accelerate launch`.\n"
        + "\n".join(f"  --{name}: {text}" for name, text in LAUNCH_ARGUMENTS.items())
        + "\nWithout a GPU, `accelerate launch` starts one process whatever is asked; `torchrun --nproc_per_node 2 -m "
        f"{module}` starts two."
    )


def split_launch_arguments(arguments: Sequence[str], prog: str) -> tuple[list[str], list[str]]:
    """
    Separate the arguments for `accelerate launch` from those of the training script.

    Args:
        arguments (`Sequence[str]`):
            Command line after the command's name.
        prog (`str`):
            Program's name in error messages.

    Returns:
        `tuple[list[str], list[str]]`: Arguments for `accelerate launch` (empty: run in this process), and the rest.
    """
    parser = ArgumentParser(prog=prog, usage=f"{prog} [options]", add_help=False, allow_abbrev=False)
    for name in LAUNCH_ARGUMENTS:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    found, rest = parser.parse_known_args(arguments)
    launch_arguments = []
    for name, value in vars(found).items():
        if value is None:
            continue
        if name == "accelerate_config":
            name, value = "config_file", accelerate_config_file(value)
        launch_arguments += [f"--{name}", value]
    return launch_arguments, rest


def accelerate_config_file(name: str) -> str:
    """Path of an accelerate configuration, given as a path or by the name of one that TRL ships."""
    if Path(name).is_file():
        return name
    folder = resources.files("trl") / "accelerate_configs"
    shipped = folder / f"{name}.yaml"
    if not shipped.is_file():
        names = sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))
        raise SystemExit(
            f"`accelerate_config` is '{name}', but there is no such file, and TRL ships no configuration of that "
            f"name. Give the path of a file, or one of {', '.join(names)}."
        )
    return str(shipped)


def launch(module: str, launch_arguments: Sequence[str], arguments: Sequence[str]) -> None:
    """Run `accelerate launch <launch_arguments> --module <module> <arguments>`."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    launch_command(launch_command_parser().parse_args([*launch_arguments, "--module", module, *arguments]))

"""
Say whether a run fits and starts right, before it starts.

```bash
trl-kd check amm --config run.yaml
trl-kd check amm --config run.yaml --plan_only true --device_memory 12
```
"""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trl_kd.scripts.check_plan import planned_run
from trl_kd.scripts.check_steps import Check


if TYPE_CHECKING:
    from trl import TrlParser

    from trl_kd.checks.finding import Finding


__all__ = ["CheckArguments", "make_parser", "planned_run", "run"]


USAGE = """\
usage: trl-kd check <method> [--config FILE.yaml] [options]

Say whether a run fits and starts right, without training: a verdict for each line (fine, careful, stop), and the fix.

methods: {methods}
The options are those of the method's command, and a few of the check: `trl-kd check amm --help` lists them. The exit
status is 1 if anything says stop, and 0 otherwise.
"""

DESCRIPTION = """\
Say whether a run of `trl-kd {method}` fits and starts right, without training: memory by its plan, tokenizers, chat
templates and rows, and then, if nothing says stop and the models fit this machine, likelihoods, rollouts and time.

Takes the options of `trl-kd {method}` and those of the check. Exit status: 1 if anything says stop, else 0.
"""


@dataclass
class CheckArguments:
    r"""
    Arguments of `trl-kd check`, beside those of the method.

    Args:
        samples (`int`, *optional*, defaults to `64`):
            Rows of the training data to look at.
        plan_only (`bool`, *optional*, defaults to `False`):
            Whether to look at the memory plan alone, for which nothing but the models' configurations is read.
        device_memory (`float`, *optional*):
            Memory of the card to plan for, in GB, if it is not in this machine.
        json (`bool`, *optional*, defaults to `False`):
            Whether to print the findings as JSON, for programs.
        markdown (`bool`, *optional*, defaults to `False`):
            Whether to print the findings as a table in Markdown, for an issue.
    """

    samples: int = field(default=64, metadata={"help": "Rows of the training data to look at."})
    plan_only: bool = field(
        default=False,
        metadata={
            "help": "Whether to look at the memory plan alone, for which nothing but the models' configurations is "
            "read."
        },
    )
    device_memory: float | None = field(
        default=None, metadata={"help": "Memory of the card to plan for, in GB, if it is not in this machine."}
    )
    json: bool = field(default=False, metadata={"help": "Whether to print the findings as JSON, for programs."})
    markdown: bool = field(
        default=False, metadata={"help": "Whether to print the findings as a table in Markdown, for an issue."}
    )

    def __post_init__(self):
        if self.samples < 1:
            raise ValueError(f"`samples` is {self.samples}, but there must be a row to look at. Set it to 1 or more.")
        if self.device_memory is not None and not self.device_memory > 0:
            raise ValueError(
                f"`device_memory` is {self.device_memory}, but nothing fits there. Give the memory of the card in GB."
            )


def make_parser(method: str, prog: str | None = None) -> "TrlParser":
    """Parser of every option of the method's command, and of the check's."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    import trl_kd
    from trl_kd.scripts.arguments import HelpFormatter
    from trl_kd.scripts.training import METHODS

    return TrlParser(
        (ScriptArguments, getattr(trl_kd, METHODS[method][0]), ModelConfig, DatasetMixtureConfig, CheckArguments),
        prog=prog,
        allow_abbrev=False,
        usage="%(prog)s [--config FILE.yaml] [options]",
        description=DESCRIPTION.format(method=method),
        formatter_class=HelpFormatter,
    )


def _check_options(script_args, training_args, model_args, dataset_args, args: CheckArguments) -> None:
    from trl_kd.scripts.training import check_data, check_models

    if args.json and args.markdown:
        raise ValueError("`json` and `markdown` are both True, but there is one output. Leave one of them out.")
    check_models(training_args, model_args)
    if not args.plan_only:
        check_data(script_args, dataset_args)


def parse(method: str, arguments: Sequence[str], prog: str) -> tuple[Any, ...]:
    """The options. A plan for a card that is not here may use what only a card can do, such as `bf16`."""
    import torch

    from trl_kd.scripts.arguments import parse_options

    away = "--device_memory" in arguments or any(part.startswith("--device_memory=") for part in arguments)
    if away and not torch.accelerator.is_available():
        arguments = [*arguments, "--use_cpu", "true"]
    return parse_options(make_parser(method, prog), arguments, check=_check_options)


def shown(findings: "list[Finding]", args: CheckArguments, title: str) -> str:
    """The findings in the form that was asked for."""
    from trl_kd.checks.render import as_json, as_markdown, as_text

    if args.json:
        return as_json(findings)
    return as_markdown(findings) if args.markdown else as_text(findings, title)


def run(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Parse the command line, look, and print; the exit status says whether anything says stop."""
    from trl_kd.checks.finding import worst
    from trl_kd.scripts.arguments import quiet_libraries
    from trl_kd.scripts.training import METHODS

    prog = prog or "trl-kd check"
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(methods=", ".join(METHODS)))
        return 0
    method, *options = arguments
    if method not in METHODS:
        print(
            f"{prog}: error: the first argument is '{method}', but a check is of one method. Begin with one of "
            f"{', '.join(METHODS)}, as in `trl-kd check amm --config run.yaml`.",
            file=sys.stderr,
        )
        return 2
    with quiet_libraries():
        parsed = parse(method, options, f"{prog} {method}")
        with redirect_stdout(sys.stderr):  # a program reads what is printed
            findings = Check(method, *parsed).run()
    args = parsed[-1]
    title = f"trl-kd {method}: {parsed[2].model_name_or_path}"
    print(shown(findings, args, title))
    return 1 if worst(findings) == "stop" else 0


if __name__ == "__main__":
    raise SystemExit(run())

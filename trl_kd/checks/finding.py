"""One line of `trl-kd check`: what was looked at, whether it is fine, and what to do if not."""

from dataclasses import dataclass, field
from typing import Any


# From good to bad: `stop` would ruin the run, `careful` may be meant
VERDICTS = ("fine", "careful", "stop")


@dataclass(frozen=True)
class Finding:
    r"""
    What one check found.

    Args:
        name (`str`):
            What was looked at, in a few words.
        verdict (`str`):
            `"fine"`, `"careful"` or `"stop"`.
        text (`str`):
            What was found, in one or two sentences, with the figures.
        fix (`str`, *optional*):
            What to do, with the option to set. Empty where nothing has to be done.
        values (`dict[str, Any]`, *optional*):
            The figures, for programs: numbers, strings, and lists and dicts of these.
        sample (`str`, *optional*):
            Something to look at beside it, such as a rendered conversation; lines of text.
    """

    name: str
    verdict: str
    text: str
    fix: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    sample: str = ""

    def __post_init__(self):
        if self.verdict not in VERDICTS:
            raise ValueError(
                f"`verdict` is '{self.verdict}', which does not exist. Choose one of {', '.join(VERDICTS)}."
            )


def worst(findings: list[Finding]) -> str:
    """The worst verdict of all; `"fine"` of none."""
    return max((finding.verdict for finding in findings), key=VERDICTS.index, default="fine")

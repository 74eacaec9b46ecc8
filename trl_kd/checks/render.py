"""Findings for a terminal, for an issue on GitHub, and for programs. What they quote is nobody's to obey."""

import json
import math
import re
import unicodedata
from collections import Counter
from typing import TYPE_CHECKING, Any

from trl_kd.checks.finding import VERDICTS, Finding, worst


if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


COLOURS = {"fine": "green", "careful": "yellow", "stop": "bold red"}

# Control characters, since `visible` leaves none in a text: nothing that is quoted can pass for them
_TRAINED_START, _TRAINED_END, _SECTION = "\x02", "\x03", "\x1d"
_TRAINED = re.compile(f"{_TRAINED_START}([^{_TRAINED_START}{_TRAINED_END}]*){_TRAINED_END}")
_MARKS = re.compile(f"[{_TRAINED_START}{_TRAINED_END}{_SECTION}]")
_TRAINED_STYLE = "black on green"
# Two columns of a conversation need that much
_TWO_COLUMNS = 100

# Joiners that words of Persian and Hindi, and emoji, are written with; other format characters reorder or hide text
_JOINERS = "\u200c\u200d"
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")

_CODE = re.compile("`([^`\n]+)`")
# What code between single backticks can hold without ending it, or a cell of the table
_PLAIN_CODE = re.compile(r"[^`|\\\n]+")
_MARKDOWN = re.compile(r"[&<>|\\`*_\[\]!#~$@]|:(?=//)")


def visible(text: str, kept: str = "\n") -> str:
    r"""
    A text without characters that a terminal obeys or that nobody sees.

    Args:
        text (`str`):
            Any text, such as a row of a dataset.
        kept (`str`, *optional*, defaults to `"\n"`):
            Such characters that stay.

    Returns:
        `str`: control characters, format characters such as those that reverse the direction, and halves of surrogate
        pairs are written as escapes; tabs are four spaces.

    Examples:

    ```python
    >>> visible("\x1b[31mred")
    '\\x1b[31mred'
    ```
    """
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    return "".join(
        character
        if character in kept or character in _JOINERS or unicodedata.category(character) not in _UNSEEN
        else character.encode("unicode_escape").decode()
        for character in text
    )


def quoted(text: str, limit: int = 60) -> str:
    """A text of somebody else's as code in a sentence: in one line, shortened, between backticks."""
    text = visible(text.replace("\n", "\\n")).replace("`", "'")
    text = text if len(text) <= limit else f"{text[: limit - 1]}…"
    return f"`{text or ' '}`"


def percent(share: float) -> str:
    """A share in per cent, with a decimal where it is small."""
    return f"{share:.1%}" if 0 < share < 0.095 else f"{share:.0%}"


def trained(text: str) -> str:
    """A part of a sample that is trained: shown in colour, or between `[[` and `]]`."""
    return f"{_TRAINED_START}{visible(text)}{_TRAINED_END}"


def section(title: str, body: str) -> str:
    """One of several parts of a sample, shown side by side where there is room. `body` is of [`visible`] text."""
    return f"{_SECTION}{visible(title, kept='')}\n{body.rstrip()}\n"


def plain_sample(sample: str) -> str:
    """A sample without colour: what is trained between `[[` and `]]`, its parts below each other."""
    parts = []
    for title, body in _sections(sample):
        heading = f"{title}:\n" if title else ""
        parts.append(heading + visible(_MARKS.sub("", _TRAINED.sub(r"[[\1]]", body))))
    return "\n\n".join(parts)


def _sections(sample: str) -> list[tuple[str, str]]:
    """Title and body of each part; a sample without parts is one without a title."""
    before, *parts = sample.split(_SECTION)
    found = [("", before)] if before.strip() or not parts else []
    for part in parts:
        title, _, body = part.partition("\n")
        found.append((_MARKS.sub("", title), body.rstrip("\n")))
    return found


def as_text(
    findings: list[Finding], title: str = "trl-kd check", *, width: int | None = None, colour: bool | None = None
) -> str:
    r"""
    Findings for a terminal: a line each, the fixes, and the samples below.

    Args:
        findings (`list[Finding]`):
            What was found.
        title (`str`, *optional*, defaults to `"trl-kd check"`):
            What was checked.
        width (`int`, *optional*):
            Columns to write in. By default those of the terminal.
        colour (`bool`, *optional*):
            Whether to write in colour. By default where the standard output is a terminal that has it.

    Returns:
        `str`: lines to print, in characters that the standard output can encode.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(
        width=width,
        force_terminal=colour,
        no_color=None if colour is None else not colour,
        color_system="auto" if colour is None else ("standard" if colour else None),
        highlight=False,
    )
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", max_width=max(8, console.width // 4))
    table.add_column(overflow="fold")
    for finding in findings:
        said = Text(visible(finding.text))
        if finding.fix:
            said.append("\n-> " + visible(finding.fix), style="bold")
        table.add_row(Text(finding.verdict, COLOURS[finding.verdict]), Text(visible(finding.name)), said)
    with console.capture() as captured:
        console.print(Text(visible(title, kept=""), "bold"), overflow="fold")
        console.print(table)
        for finding in findings:
            if finding.sample:
                _print_sample(console, finding)
        console.print(Text(summary(findings), COLOURS[worst(findings)]), overflow="fold")
    lines = [line.rstrip() for line in captured.get().splitlines()]
    return "\n".join(lines).encode(console.encoding, "backslashreplace").decode(console.encoding)


def _print_sample(console: "Console", finding: Finding) -> None:
    from rich.table import Table
    from rich.text import Text

    parts = _sections(finding.sample)
    is_coloured = console.is_terminal and console.color_system is not None
    legend = "trained in green" if is_coloured else "trained in [[ ]]"
    legend = f" ({legend})" if _TRAINED_START in finding.sample else ""
    console.print()
    console.print(Text(visible(finding.name, kept="") + legend, "bold"), overflow="fold")
    bodies = [_coloured(body) if is_coloured else Text(plain_sample(body)) for _, body in parts]
    if len(parts) > 1 and console.width >= _TWO_COLUMNS:
        table = Table(expand=True, show_lines=False)
        for part_title, _ in parts:
            table.add_column(Text(part_title), ratio=1, overflow="fold")
        table.add_row(*bodies)
        console.print(table)
    else:
        for (part_title, _), body in zip(parts, bodies, strict=True):
            if part_title:
                console.print(Text(f"{part_title}:", "bold"), overflow="fold")
            console.print(body, overflow="fold")
    console.print()


def _coloured(body: str) -> "Text":
    """What is trained in colour, by styles alone: rich reads no markup in a `Text`."""
    from rich.text import Text

    text, end = Text(), 0
    for match in _TRAINED.finditer(body):
        text.append(visible(_MARKS.sub("", body[end : match.start()])))
        text.append(visible(match.group(1)), style=_TRAINED_STYLE)
        end = match.end()
    text.append(visible(_MARKS.sub("", body[end:])))
    return text


def summary(findings: list[Finding]) -> str:
    """The worst verdict and how many there are of each."""
    counts = Counter(finding.verdict for finding in findings)
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in reversed(VERDICTS))
    return f"{worst(findings)}: {told}"


def as_markdown(findings: list[Finding]) -> str:
    r"""
    Findings as a table that can be pasted into an issue on GitHub, with the samples folded below.

    Args:
        findings (`list[Finding]`):
            What was found.

    Returns:
        `str`: Markdown in which only code between backticks of the findings' own sentences is not literal text.
    """
    lines = ["| verdict | what | found | what to do |", "|---|---|---|---|"]
    for finding in findings:
        verdict = finding.verdict if finding.verdict == "fine" else f"**{finding.verdict}**"
        cells = (verdict, *map(_cell, (finding.name, finding.text, finding.fix)))
        lines.append(f"| {' | '.join(cells)} |")
    for finding in findings:
        if not finding.sample:
            continue
        sample = plain_sample(finding.sample)
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", sample)), default=0))
        heading = "<details><summary>" + _literal(visible(finding.name, kept="")) + "</summary>"
        lines += ["", heading, "", f"{fence}text", sample, fence, "", "</details>"]
    return "\n".join([*lines, "", summary(findings), ""])


def _cell(text: str) -> str:
    """A sentence as one cell: its code stays code, all else is literal."""
    text, cell, end = visible(text), "", 0
    for match in _CODE.finditer(text):
        code = match.group(1)
        is_plain = _PLAIN_CODE.fullmatch(code) and code.strip()
        cell += _literal(text[end : match.start()])
        cell += f"`{code}`" if is_plain else f"<code>{_literal(code)}</code>"
        end = match.end()
    return (cell + _literal(text[end:])).replace("\n", "<br>")


def _literal(text: str) -> str:
    """Text that neither Markdown nor HTML reads as anything else; a mention gets a space of no width."""
    return _MARKDOWN.sub(lambda match: f"&#{ord(match.group())};" + "\u200b" * (match.group() == "@"), text)


def as_json(findings: list[Finding]) -> str:
    r"""
    Findings for programs.

    Args:
        findings (`list[Finding]`):
            What was found.

    Returns:
        `str`: strict JSON, with `verdict`, the worst of all, and `findings`, each with the fields of [`Finding`].
        Numbers that aren't finite are `null`.
    """
    told = [
        {
            "name": finding.name,
            "verdict": finding.verdict,
            "text": finding.text,
            "fix": finding.fix,
            "values": _strict(finding.values),
            "sample": plain_sample(finding.sample),
        }
        for finding in findings
    ]
    return json.dumps({"verdict": worst(findings), "findings": told}, indent=2, allow_nan=False)


def _strict(value: Any) -> Any:
    """Numbers, strings, lists and dicts as JSON has them."""
    if isinstance(value, dict):
        return {str(key): _strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value

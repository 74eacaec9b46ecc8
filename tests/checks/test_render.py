"""Findings are shown as they are, whatever text they quote."""

import io
import json
import re
import sys

import pytest
from markdown_it import MarkdownIt

from tests.checks.subjects import conversations, findings_of
from trl_kd.checks.finding import Finding
from trl_kd.checks.render import (
    as_json,
    as_markdown,
    as_text,
    percent,
    plain_sample,
    quoted,
    section,
    summary,
    trained,
    visible,
)


HOSTILE = [
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b31m \x08\x08 \r overwritten",
    "[red]markup[/red] [link=http://evil.example]x[/link] \\[",
    "| stop | fake | row |\n| stop | fake | row |\n\n# Heading",
    "```\n</details>\n\n# Heading\n<script>alert(1)</script>\n````\n~~~",
    "<img src=x onerror=alert(1)> &lt;b&gt; <!-- -->",
    "[link](http://evil.example) ![image](http://evil.example/x.png) http://evil.example *b* __b__ ~~s~~ $x$",
    "@someone #12 `code` ``more | code`` ` odd \\` \\| \\\\|",
    "`a\\` | `b | c` `<b>` ` `",
    "\u202egnihtemos \u2066hidden\u2069 \u200b \ufeff \u2028line",
    "\x02green\x03 \x1dpart\n",
    "\ud800 lone",
]
ALLOWED_TAGS = {"<br>", "<code>", "</code>", "<details>", "</details>", "<summary>", "</summary>"}


def finding(text="Found.", verdict="careful", **fields):
    return Finding(fields.pop("name", "data"), verdict, text, **fields)


def hostile(text):
    return finding(text, name=f"name {text}", fix=text, values={"text": text}, sample=section(text, trained(text)))


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("colour", [True, False])
def test_as_text_hostile_text_controls_nothing(text, colour):
    shown = as_text([hostile(text)], text, width=90, colour=colour)
    if colour:
        shown = re.sub(r"\x1b\[[0-9;]*m", "", shown)  # the only ones of its own
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]", shown)
    shown.encode()
    # Nothing is swallowed as markup
    for word in ("[red]", "[/red]", "[link=http://evil.example]"):
        if word in text:
            assert word in shown


@pytest.mark.parametrize("text", ["\x1b[31mred", "\x9b31m", "\x07"])
def test_as_text_in_colour_has_no_escapes_but_its_own(text):
    for shown in (as_text([hostile(text)], width=90, colour=True),):
        assert text not in shown and "\x1b[31m" not in shown.replace("\x1b[1;31m", "")


def markdown_of(text):
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)


def walk(tokens):
    for token in tokens:
        yield token
        yield from walk(token.children or [])


@pytest.mark.parametrize("text", HOSTILE)
def test_as_markdown_hostile_text_stays_in_its_place(text):
    tokens = markdown_of(as_markdown([hostile(text), finding("After.", verdict="fine", name="last")]))
    kinds = {token.type for token in walk(tokens)}
    assert not kinds & {"link_open", "image", "heading_open", "em_open", "s_open", "hr", "list_item_open"}
    # `strong` is for verdicts alone
    assert sum(token.type == "strong_open" for token in walk(tokens)) == 1
    rows = [token for token in tokens if token.type == "tr_open"]
    cells = [token for token in tokens if token.type in ("td_open", "th_open")]
    assert (len(rows), len(cells)) == (3, 12)
    html = [token.content for token in walk(tokens) if token.type in ("html_inline", "html_block")]
    tags = set(re.findall(r"<[^>]*>", " ".join(html)))
    assert tags <= ALLOWED_TAGS
    fences = [token for token in tokens if token.type == "fence"]
    assert len(fences) == 1 and fences[0].content.rstrip("\n") == plain_sample(hostile(text).sample)


@pytest.mark.parametrize("text", [text for text in HOSTILE if "@" in text])
def test_as_markdown_mentions_nobody(text):
    tokens = markdown_of(as_markdown([hostile(text)]))
    told = "".join(token.content for token in walk(tokens) if token.type == "text")
    assert "@\u200bsomeone" in told and "@someone" not in told


def test_as_markdown_reads_as_the_text_that_it_shows():
    text = "The template writes `<|im_start|>` & <b>, 40% of 10 | 4 rows: `max_length=204` and `a_b`."
    [cell] = [
        token
        for token in markdown_of(as_markdown([finding(text)]))
        if token.type == "inline" and "40" in token.content
    ]
    told = "".join(child.content for child in cell.children if child.type in ("text", "code_inline", "text_special"))
    assert told == text.replace("`", "")
    assert "`max_length=204`" in cell.content and "<code>" in cell.content


def test_as_markdown_is_this_table():
    shown = as_markdown(
        [finding("Low.", fix="Set `lmbda=0`.", sample="a\n```\nb"), finding("Good.", "fine", name="x")]
    )
    assert shown == (
        "| verdict | what | found | what to do |\n"
        "|---|---|---|---|\n"
        "| **careful** | data | Low. | Set `lmbda=0`. |\n"
        "| fine | x | Good. |  |\n"
        "\n<details><summary>data</summary>\n\n"
        "````text\na\n```\nb\n````\n\n"
        "</details>\n\n"
        "careful: 0 stop, 1 careful, 1 fine\n"
    )


def no_constant(name):
    raise AssertionError(f"{name} is no JSON")


@pytest.mark.parametrize("text", HOSTILE)
def test_as_json_hostile_text_is_kept_as_it_is(text):
    shown = as_json([hostile(text)])
    assert shown.isascii() and not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", shown)
    [found] = json.loads(shown, parse_constant=no_constant)["findings"]
    assert (found["text"], found["values"]["text"]) == (text, text)


def test_as_json_has_all_fields_and_null_for_what_is_not_finite():
    values = {"a": float("nan"), "b": [float("inf"), 1.5, (-float("inf"), 2)], 3: {"c": None, "d": True}}
    shown = as_json([finding("Bad.", "stop", values=values, sample=trained("x") + "y"), finding(verdict="fine")])
    assert json.loads(shown, parse_constant=no_constant) == {
        "verdict": "stop",
        "findings": [
            {
                "name": "data",
                "verdict": "stop",
                "text": "Bad.",
                "fix": "",
                "values": {"a": None, "b": [None, 1.5, [None, 2]], "3": {"c": None, "d": True}},
                "sample": "[[x]]y",
            },
            {"name": "data", "verdict": "fine", "text": "Found.", "fix": "", "values": {}, "sample": ""},
        ],
    }


def test_as_text_has_a_line_for_each_verdict_and_the_fix():
    findings = [
        finding("Good.", "fine", name="a"),
        finding("Bad.", "stop", name="c", fix="Set `lmbda=0`."),
    ]
    lines = as_text(findings, "trl-kd amm: student", width=60).splitlines()
    assert lines[0] == "trl-kd amm: student"
    assert lines[1].split() == ["fine", "a", "Good."]
    assert lines[2].split() == ["stop", "c", "Bad."]
    assert lines[3].split() == ["->", "Set", "`lmbda=0`."]
    assert lines[-1] == "stop: 1 stop, 0 careful, 1 fine"


def test_as_text_shows_what_is_trained_in_colour_or_in_brackets():
    sample = section("student", "user: " + trained("Blue.")) + section("teacher", "bot: " + trained("Red."))
    plain = as_text([finding(sample=sample)], width=80, colour=False)
    assert "user: [[Blue.]]" in plain and "bot: [[Red.]]" in plain and "\x1b" not in plain
    assert "trained in [[ ]]" in plain
    coloured = as_text([finding(sample=sample)], width=80, colour=True)
    assert "\x1b[30;42mBlue.\x1b[0m" in coloured and "[[" not in coloured and "trained in green" in coloured


def test_as_text_verdicts_have_their_colours():
    shown = as_text([finding(verdict=verdict) for verdict in ("fine", "careful", "stop")], width=80, colour=True)
    for code, verdict in (("32", "fine"), ("33", "careful"), ("1;31", "stop")):
        assert f"\x1b[{code}m{verdict}" in shown


@pytest.mark.parametrize("width", [30, 60, 100, 160])
@pytest.mark.parametrize("colour", [True, False])
def test_as_text_keeps_to_the_width_and_loses_nothing(width, colour):
    word = "x" * 250
    sample = section("student", "start " + trained("y" * 250)) + section("teacher", "z" * 250)
    shown = as_text([finding(f"Long {word}", fix=word, name="n" * 80, sample=sample)], width=width, colour=colour)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert max(map(len, shown.splitlines())) <= width
    assert shown.count("x") == 500 and shown.count("y") == 250 and shown.count("z") == 250


def test_as_text_puts_both_sides_beside_each_other_where_there_is_room():
    sample = section("student", "ours") + section("teacher", "theirs")
    wide = as_text([finding(sample=sample)], width=120).splitlines()
    assert any("ours" in line and "theirs" in line for line in wide)
    narrow = as_text([finding(sample=sample)], width=80).splitlines()
    assert not any("ours" in line and "theirs" in line for line in narrow)
    assert "ours" in narrow and "theirs" in narrow


def test_as_text_is_plain_where_the_output_is_no_terminal_and_encodable(monkeypatch):
    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True

    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    findings = [finding("Grün – 絵", sample=section("student", trained("ä")))]
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    shown = as_text(findings)
    assert shown.isascii() and "\x1b" not in shown and "Gr\\xfcn" in shown
    monkeypatch.setattr(sys, "stdout", Terminal(io.BytesIO(), encoding="utf-8"))
    assert "\x1b[33mcareful" in as_text(findings) and "Grün – 絵" in as_text(findings)


def test_as_text_of_findings_of_a_hostile_row_is_safe():
    rows = conversations(2)
    rows[0]["messages"][0]["content"] = "".join(HOSTILE).replace("\ud800", "")
    findings = list(findings_of(rows=rows, options={"max_length": 2000}).values())
    shown = as_text(findings, width=100, colour=False)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", shown)
    tokens = markdown_of(as_markdown(findings))
    assert not {token.type for token in walk(tokens)} & {"link_open", "image", "heading_open"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\tb\r\nc\rd", "a    b\nc\\rd"),
        ("\u202eabc", "\\u202eabc"),
        ("\u2028", "\\u2028"),
        ("\ud800", "\\ud800"),
        ("می\u200cخواهم 👩\u200d🚀 é", "می\u200cخواهم 👩\u200d🚀 é"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_visible_shows_what_nobody_would_see(text, expected):
    assert visible(text) == expected


def test_quoted_is_one_short_line_of_code():
    assert quoted("a`b\nc") == "`a'b\\nc`"
    assert quoted("x" * 100, 10) == f"`{'x' * 9}…`"
    assert quoted("") == "` `"


@pytest.mark.parametrize(
    ("share", "expected"), [(0, "0%"), (0.004, "0.4%"), (0.0949, "9.5%"), (0.4, "40%"), (1 / 3, "33%"), (1, "100%")]
)
def test_percent_has_a_decimal_where_it_is_small(share, expected):
    assert percent(share) == expected


def test_summary_counts_all_verdicts_from_bad_to_good():
    assert summary([]) == "fine: 0 stop, 0 careful, 0 fine"
    found = [finding(verdict="fine"), finding(verdict="stop"), finding(verdict="fine")]
    assert summary(found) == "stop: 1 stop, 0 careful, 2 fine"

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import pytest

from tests.evaluation import report_cases
from trl_kd.evaluation.bootstrap import Estimate
from trl_kd.evaluation.comparison import Comparison
from trl_kd.evaluation.report import json_in_html, replace_file, write_report
from trl_kd.evaluation.report_tables import cost_table, harness_table, judge_table, metric_table, verdict_kind


VOID = {"meta", "input", "br", "link", "img"}


class Page(HTMLParser):
    """The page as a browser would cut it up: tags, text by element, and whether all elements are closed."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.cells, self.raw = [], [], {}, {}
        self._row, self._cell, self._data = None, None, None
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self._row = attrs.get("data-metric")
        if tag == "td" and self._row is not None:
            self._cell = (self._row, attrs["data-model"])
            self.cells[self._cell] = ""
        if tag in ("script", "style"):
            self._data = attrs.get("type", tag)
            self.raw[self._data] = ""

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()
        if tag == "td":
            self._cell = None
        self._data = None

    def handle_data(self, data):
        if self._data is not None:
            self.raw[self._data] += data
            return
        self.text += data
        if self._cell is not None:
            self.cells[self._cell] += data

    @property
    def payload(self):
        return json.loads(self.raw["application/json"])


def page(tmp_path, comparison, samples, **settings):
    write_report(comparison, samples, tmp_path / "report.html", **settings)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def usual(tmp_path):
    comparison = report_cases.usual()
    return page(tmp_path, comparison, report_cases.usual_samples(comparison), command="trl-kd report 3")


def words(text):
    return " ".join(text.split())


def test_report_figures_are_those_of_the_comparison(usual):
    comparison = report_cases.usual()
    assert len(usual.cells) == len(comparison.metrics) * 3
    assert words(usual.cells["rouge_l", "teacher"]) == "31.42 ± 1.30"
    assert words(usual.cells["rouge_l", "amm"]) == "28.14 ± 1.30 +5.27 ± 1.30 (+23.0 %) better"
    assert words(usual.cells["bits_per_byte", "amm"]) == "0.934 ± 0.021 −0.213 ± 0.021 (−18.6 %) better"
    assert words(usual.cells["length", "amm"]) == "32.4 ± 1.4 −5.5 ± 1.4 (−14.5 %) lower"
    assert words(usual.cells["eos_share", "before"]) == "87.5 ± 2.1"


def test_report_summary_is_the_first_thing_after_the_title(usual):
    text = words(usual.text)
    places = [text.index(words(sentence)) for sentence in report_cases.usual().sentences()]
    assert places == sorted(places)
    assert text.index("AMM on stories") < places[0] and places[-1] < text.index("higher is better")
    assert "23 November 2026, 07:26 UTC" in text and "12 prompts, 3 seeds" in text


def test_report_elements_are_closed_and_nothing_is_loaded(usual):
    assert usual.open == []
    tags = [tag for tag, _ in usual.tags]
    assert tags.count("h1") == 1 and not {"link", "img", "iframe", "object", "base", "form"} & set(tags)
    for _, attrs in usual.tags:
        assert not {"src", "srcset", "action", "style"} & attrs.keys()
        assert not any(name.startswith("on") for name in attrs)
        assert attrs.get("href", "#").startswith("#")
    anchors = {attrs["href"][1:] for tag, attrs in usual.tags if tag == "a"}
    assert anchors <= {attrs["id"] for _, attrs in usual.tags if "id" in attrs}
    assert "@import" not in usual.raw["style"] and "url(" not in usual.raw["style"]


def test_report_policy_allows_its_own_script_and_style_alone(usual):
    (policy,) = [attrs["content"] for tag, attrs in usual.tags if attrs.get("http-equiv")]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    for name in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(usual.raw[name].encode()).digest()).decode()
        assert rules[f"{name}-src"] == f"'sha256-{digest}'"


def test_report_payload_is_the_samples(usual):
    samples = report_cases.usual_samples(report_cases.usual())
    data = usual.payload
    assert [model["name"] for model in data["models"]] == ["teacher", "before", "amm"]
    assert (data["total"], len(data["prompts"])) == (12, 12)
    for index, prompt in enumerate(data["prompts"]):
        own = samples["amm"][index]
        shown = prompt["responses"][2]
        assert (prompt["prompt"], prompt["references"]) == (own.prompt, own.references)
        assert (shown["text"], shown["tokens"]) == (own.completion, own.tokens)
        assert shown["divergence"] == pytest.approx(own.divergence, abs=6e-4)
        both = samples["before"][index].divergence + own.divergence
        assert prompt["divergence"] == pytest.approx(sum(both) / len(both), abs=1e-5)
        # The teacher isn't compared with itself
        assert "divergence" not in prompt["responses"][0]
    # Influence values, shares of one: nothing about a single response
    assert data["prompts"][0]["responses"][1]["metrics"][0] == ["Rouge-L", "15.00"]
    assert [title for title, _ in data["prompts"][0]["responses"][1]["metrics"]] == ["Rouge-L", "length"]


@pytest.mark.parametrize(("most", "expected"), [(5, [0, 2, 4, 7, 9]), (12, list(range(12))), (0, [])])
def test_report_max_prompts_keeps_prompts_at_equal_distances(tmp_path, most, expected):
    comparison = report_cases.usual()
    found = page(tmp_path, comparison, report_cases.usual_samples(comparison), max_prompts=most)
    assert [prompt["index"] for prompt in found.payload["prompts"]] == expected
    assert ("5 of 12 prompts are here" in words(found.text)) == (most == 5)
    assert ("All 12 prompts are here" in words(found.text)) == (most == 12)


def test_report_hostile_texts_stay_text(tmp_path):
    comparison, samples = report_cases.hostile()
    found = page(tmp_path, comparison, samples)
    tags = [tag for tag, _ in found.tags]
    assert found.open == [] and tags.count("script") == 2 and "img" not in tags
    assert not any(name.startswith("on") for _, attrs in found.tags for name in attrs)
    for model, each in zip(found.payload["models"], comparison.models, strict=True):
        assert model["name"] == each.name
    for prompt, sample in zip(found.payload["prompts"], samples[comparison.models[2].name], strict=True):
        assert prompt["prompt"] == sample.prompt and prompt["references"] == sample.references
        assert prompt["responses"][2]["text"] == sample.completion
    for text in [*report_cases.HOSTILE, *(model.name for model in comparison.models)]:
        assert words(text) in words(found.text)
    # A second rendering of text that looks like a template would be 49
    assert "49" not in found.text.replace("49.", "")


def test_json_in_html_holds_no_markup_and_comes_back():
    data = {"<script>": ["</script>", "&lt;", "\u2028\u2029", "\x00\ud800", 1.5, None]}
    text = json_in_html(data)
    assert not set("<>&\u2028\u2029") & set(text) and text.isascii()
    assert json.loads(text) == data
    with pytest.raises(ValueError):
        json_in_html([math.nan])


def test_report_values_that_are_missing_are_dashes(tmp_path):
    comparison = report_cases.usual()
    comparison.models[0].estimates["rouge_l"] = Estimate(31.42, math.nan, math.nan, math.nan)
    del comparison.models[1].estimates["rouge_l"]
    found = page(tmp_path, comparison, {})
    assert words(found.cells["rouge_l", "teacher"]) == "31.42 ± –"
    assert words(found.cells["rouge_l", "before"]) == "–"
    assert "nan" not in found.text.lower().split()


def bare(name, role):
    return report_cases.model(
        name, role, 2, changes={}, to_teacher={}, cost=None, by_position=None, training=None, size_on_disk=None
    )


@pytest.mark.parametrize(
    "models", [[bare("x", "student")], [bare("x", "other"), bare("y", "other")], [bare("x", "teacher")]]
)
def test_report_with_little_to_show_has_those_parts_alone(tmp_path, models):
    comparison = report_cases.usual(1)
    comparison.models, comparison.settings = models, {}
    samples = report_cases.usual_samples(comparison, 1)
    for sample in (sample for rows in samples.values() for sample in rows):
        sample.divergence, sample.references, sample.tokens, sample.completion = None, [], [], ""
    found = page(tmp_path, comparison, samples)
    ids = {attrs["id"] for tag, attrs in found.tags if tag == "section" and "id" in attrs}
    assert ids == {"summary", "metrics", "charts", "responses", "made"}
    assert found.payload["prompts"][0]["divergence"] is None
    assert found.open == []


def test_report_of_a_training_alone_has_its_curves(tmp_path):
    student = bare("amm", "student")
    student.training, student.estimates, student.weights = report_cases.training_log(), {}, ""
    comparison = Comparison(0, "amm", "not evaluated yet", "", {}, {}, [], [student], 0, [])
    found = page(tmp_path, comparison, {})
    ids = {attrs["id"] for tag, attrs in found.tags if tag == "section" and "id" in attrs}
    assert ids == {"summary", "training", "made"} and found.open == []
    assert "0 prompts" not in found.text


def test_report_models_with_other_prompts_have_no_response_there(tmp_path):
    comparison = report_cases.usual()
    samples = report_cases.usual_samples(comparison, 3)
    del samples["before"][1]
    responses = [prompt["responses"] for prompt in page(tmp_path, comparison, samples).payload["prompts"]]
    assert [one[1] is None for one in responses] == [False, True, False]


def test_report_tokens_without_their_divergences_are_refused(tmp_path):
    comparison = report_cases.usual()
    samples = report_cases.usual_samples(comparison, 1)
    samples["amm"][0].divergence.pop()
    with pytest.raises(ValueError, match="tokens would be coloured wrongly"):
        write_report(comparison, samples, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_report_negative_max_prompts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`max_prompts` is -1, which is no number of prompts"):
        write_report(report_cases.usual(), {}, tmp_path / "report.html", max_prompts=-1)


def test_report_500_prompts_of_5_models_are_a_page_of_few_megabytes(tmp_path):
    comparison = report_cases.usual(500)
    comparison.models += [report_cases.model(name, "student", 2) for name in ("dskd", "sparse")]
    found = page(tmp_path, comparison, report_cases.usual_samples(comparison, 500))
    assert len(found.payload["prompts"]) == 100
    assert (tmp_path / "report.html").stat().st_size < 2e6


def test_replace_file_failure_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "new" / "report.html"
    replace_file(path, "old \ud800")
    assert path.read_text() == "old ?"

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space left"):
        replace_file(path, "new")
    assert path.read_text() == "old ?" and list(path.parent.iterdir()) == [path]


def test_report_how_it_was_made_names_settings_versions_digests_and_command(usual):
    text = words(usual.text)
    made = text[text.rindex("How it was made") :]
    for part in ("trl-kd report 3", "temperature 1.0", "trl 1.16.0", "amm 9f2c41d0a7b3 (models/amm)", "0, 1, 2"):
        assert part in made


def test_report_folders_of_this_machine_are_named_by_their_last_part(tmp_path):
    comparison = report_cases.usual()
    comparison.models[2].source = "/home/somebody/models/amm/"
    text = words(page(tmp_path, comparison, {}).text)
    assert "9f2c41d0a7b3 (amm)" in text and "somebody" not in text


def test_metric_table_metrics_of_ones_own_come_last():
    comparison = report_cases.usual()
    comparison.metrics = ["my_score", "imitation_gap", "rouge_l"]
    sections = metric_table(comparison)
    assert [[row["name"] for row in section["rows"]] for section in sections] == [
        ["rouge_l"],
        ["imitation_gap"],
        ["my_score"],
    ]


@pytest.mark.parametrize(
    ("verdict", "kind"),
    [("better", "better"), ("worse", "worse"), ("lower", "lower"), ("not distinguishable at 95 %", "same")],
)
def test_verdict_kind_is_its_first_word(verdict, kind):
    assert verdict_kind(verdict) == kind


def rows_of(table):
    return {(row["title"], row["note"]): [words(" ".join(c.values())) for c in row["cells"]] for row in table["rows"]}


def test_cost_table_has_ratios_to_the_teacher():
    table = cost_table(report_cases.usual().models)
    rows = rows_of(table)
    assert rows["Parameters", ""] == ["1.86M", "420,000 0.226×", "420,000 0.226×"]
    assert rows["Tokens per second", "batch of 8"] == ["4,212", "15,080 3.58×", "15,340 3.64×"]
    assert rows["First token, median", "one prompt"][2] == "1.36 ms 0.275×"
    assert rows["Price of a million tokens", "batch of 1"][0] == "0.123"
    assert table["conditions"] == "a processor, 2 threads, float32, prompts of 64 tokens, 64 new ones"


def test_cost_table_without_teacher_or_with_another_machine_has_no_ratios():
    models = report_cases.usual().models
    models[0].cost["threads"] = 8
    table = cost_table(models)
    assert rows_of(table)["Parameters", ""] == ["1.86M", "420,000", "420,000"]
    assert table["warning"].startswith("amm: ") and "`threads`" in table["warning"]
    assert rows_of(cost_table(models[1:]))["Size on disk", ""] == ["1.68 MB", "1.68 MB"]
    assert cost_table([bare("x", "student")]) is None


def test_judge_and_harness_have_tables_on_the_page(tmp_path):
    comparison = report_cases.usual()
    judge = {"against": "before", "win_rate": 0.71, "low": 0.62, "high": 0.8, "wins": 60, "ties": 16, "losses": 20}
    judge |= {"consistency": None, "failed_answers": 1, "settings": {"model": "a judge"}}
    comparison.models[2].judge = judge
    metrics = {
        "acc": {"value": 0.61, "standard_error": 0.05, "higher_is_better": True},
        "ppl": {"value": 3.2, "standard_error": None, "higher_is_better": False},
    }
    comparison.models[0].harness = {"arc": {"metrics": metrics}}
    comparison.models[2].harness = {"arc": {"metrics": {"acc": metrics["acc"] | {"value": None}}}}
    found = judge_table(comparison.models)
    assert found["rows"] == [["amm", "before", "71.0 % (62.0 to 80.0)", "60", "16", "20", "– %", "1"]]
    assert found["note"].startswith("Judge: a judge. ")
    table = harness_table(comparison.models)
    assert table["heads"] == ["Task", "teacher", "amm"]
    assert table["rows"] == [["arc, acc ↑", "0.610 ± 0.098", "–"], ["arc, ppl ↓", "3.200", "–"]]
    text = words(page(tmp_path, comparison, {}).text)
    assert "71.0 % (62.0 to 80.0)" in text and "0.610 ± 0.098" in text


def test_report_template_uses_no_unescaped_text():
    template = (report_cases.FOLDER / "report.html.jinja").read_text()
    assert "safe" not in re.findall(r"\|\s*(\w+)", template)
    script = (report_cases.FOLDER / "report.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", script)

"""Test suites: what they make of rows, and what they refuse."""

import json
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, Features, Value

from trl_kd.evaluation import MEASURES, EvalRow, Suite, load_suite, parse_condition, plain_suite, read_rows
from trl_kd.evaluation.suite import SUITES, digest_of


NAMES = ("arithmetic", "instruction", "story", "summarisation", "translation")
DATA = Path(__file__).parents[3] / "shared" / "data"

# The two forms that MiniLLM trains and evaluates with
MINILLM_BARE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
MINILLM_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def read(rows: list[dict], suite: Suite | str | None = None, **kwargs) -> list[EvalRow]:
    suite = plain_suite() if suite is None else load_suite(suite) if isinstance(suite, str) else suite
    return read_rows(Dataset.from_list(rows), suite, **kwargs)


def one(row: dict, suite: Suite | str | None = None) -> EvalRow:
    (found,) = read([row], suite)
    return found


def write(folder: Path, text: str, name: str = "own.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


# Suites that ship with the package


def test_suites_that_ship_are_the_five():
    assert sorted(file.stem for file in SUITES.glob("*.yaml")) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_suite_measures_exist_and_its_conditions_are_about_them(name):
    suite = load_suite(name)
    assert suite.name == name and suite.description
    assert set(suite.metrics) <= MEASURES.keys()
    assert len(set(suite.metrics)) == len(suite.metrics)
    assert suite.main_metric in suite.metrics
    for text in suite.fail_if:
        condition = parse_condition(text)
        assert condition.metric in suite.metrics
        # A change for the worse is what fails
        assert (condition.sign == "<") == MEASURES[condition.metric].higher_is_better


def test_suite_instruction_draws_as_the_literature_does():
    suite = load_suite("instruction")
    assert (suite.temperature, suite.top_p, suite.top_k, suite.max_completion_length) == (1.0, 1.0, 0, 256)
    assert suite.max_prompt_length == 256
    assert suite.seeds == (10, 20, 30, 40, 50) and suite.main_metric == "rouge_l"


TEXT = "One day a fox went to the river and met a red bird who was very hungry and cold, so they looked for fish."

PROMPTS = {
    "arithmetic": (
        {"question": "What is 2 + 3?", "answer": "2 + 3 = 5\n#### 5"},
        "Question: What is 2 + 3?\nAnswer:",
        (" 2 + 3 = 5\n#### 5",),
    ),
    "instruction": (
        {"instruction": "Add {them}.\n", "input": "", "output": "5\n"},
        MINILLM_BARE.replace("{instruction}", "Add {them}.\n"),
        ("5\n",),
    ),
    "instruction with input": (
        {"instruction": " Add <them> & all.", "input": "2\n\n3 ", "output": "5"},
        MINILLM_INPUT.replace("{instruction}", " Add <them> & all.").replace("{input}", "2\n\n3 "),
        ("5",),
    ),
    "instruction without the column input": (
        {"instruction": "Sing.", "output": "La"},
        MINILLM_BARE.replace("{instruction}", "Sing."),
        ("La",),
    ),
    "instruction with an input of None": (
        {"instruction": "Sing.", "input": None, "output": "La"},
        MINILLM_BARE.replace("{instruction}", "Sing."),
        ("La",),
    ),
    "instruction with references": (
        {"instruction": "Sing.", "input": "", "output": "La", "references": ["La la", "Lu"]},
        MINILLM_BARE.replace("{instruction}", "Sing."),
        ("La la", "Lu"),
    ),
    "story": (
        {"text": TEXT},
        "One day a fox went to the river and met a red bird who was very hungry and cold, so",
        (" they looked for fish.",),
    ),
    "story with line breaks": (
        {"text": "a " * 18 + "b\nc d  e\nf"},
        "a " * 18 + "b\nc d",
        ("  e\nf",),
    ),
    "story with prompts": ({"prompt": "Once", "completion": " upon"}, "Once", (" upon",)),
    "story with text beside": ({"prompt": "Once", "completion": " upon", "text": TEXT}, "Once", (" upon",)),
    "summarisation": (
        {"article": "Foxes ate.", "highlights": "Food."},
        "Summarise the following text.\n\nFoxes ate.\n\nSummary:",
        (" Food.",),
    ),
    "summarisation of a dialogue": (
        {"dialogue": "A: Hi", "summary": "Greeting"},
        "Summarise the following text.\n\nA: Hi\n\nSummary:",
        (" Greeting",),
    ),
    "translation": (
        {"source": "Fox", "target": "Fuchs"},
        "Translate from en to de.\n\nFox\n\nTranslation:",
        (" Fuchs",),
    ),
    "translation as in WMT": (
        {"translation": {"de": "Fuchs", "en": "Fox"}},
        "Translate from en to de.\n\nFox\n\nTranslation:",
        (" Fuchs",),
    ),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_suite_prompt_and_references_of_a_row_are_these(case):
    row, prompt, references = PROMPTS[case]
    assert one(row, case.split()[0]) == EvalRow(0, prompt, references)


def test_suite_translation_variables_choose_the_languages():
    suite = load_suite("translation", {"variables": {"target_language": "fr"}})
    row = {"translation": {"de": "Fuchs", "en": "Fox", "fr": "Renard"}}
    assert one(row, suite) == EvalRow(0, "Translate from en to fr.\n\nFox\n\nTranslation:", (" Renard",))
    assert load_suite("translation").variables["target_language"] == "de"


def test_suite_instruction_equals_the_forms_printed_beside_the_data():
    readme = DATA / "instruct" / "README.md"
    if not readme.is_file():
        pytest.skip("the data beside the repository is not here")
    forms = [line[4:] for line in readme.read_text().splitlines() if line.startswith("    Below is an instruction")]
    assert [form.replace("\\n", "\n") for form in forms] == [MINILLM_BARE, MINILLM_INPUT]


def shared_row(file: str, number: int = 0) -> dict:
    if not (DATA / file).is_file():
        pytest.skip("the data beside the repository is not here")
    with (DATA / file).open() as lines:
        return json.loads(next(line for index, line in enumerate(lines) if index == number))


@pytest.mark.parametrize("number", range(4))
def test_suite_reads_dolly(number):
    row = shared_row("instruct/dolly/test.jsonl", number)
    form = MINILLM_INPUT if row["input"] else MINILLM_BARE
    found = one(row, "instruction")
    assert found.prompt == form.replace("{input}", row["input"]).replace("{instruction}", row["instruction"])
    assert found.references == (row["output"],)


def test_suite_reads_natural_instructions_with_all_references():
    row = shared_row("instruct/s-ni/test.jsonl")
    found = one(row, "instruction")
    assert found.prompt.endswith(f"\n\n### Input:\n{row['input']}\n\n### Response:\n")
    assert list(found.references) == row["references"] and len(found.references) == 3


def test_suite_reads_gsm8k():
    row = shared_row("gsm8k/test.jsonl")
    found = one(row, "arithmetic")
    assert found.prompt.startswith("Question: Janet’s ducks lay 16 eggs") and found.prompt.endswith("?\nAnswer:")
    assert found.references[0].startswith(" Janet sells 16 - 3") and found.references[0].endswith("\n#### 18")


def test_suite_reads_tinystories():
    row = shared_row("tinystories/test.jsonl")
    found = one(row, "story")
    assert found.prompt.startswith("Once upon a time, there was") and len(found.prompt.split(" ")) == 20
    assert found.prompt + found.references[0] == row["text"]


# Suites of one's own


def test_suite_of_ones_own_is_read_and_changed_by_options(tmp_path):
    text = """\
columns: [topic]
prompt: "{{ greeting }}, write on {{ topic }}{% if style %} in {{ style }}{% endif %}:"
references: [" {{ good }}", " {{ better }}"]
variables: {greeting: Hello}
seeds: [3, 4]
metrics: [rouge_l, length]
fail_if: ["rouge_l < -3"]
"""
    suite = load_suite(write(tmp_path, text), {"top_p": 0.9, "seeds": [5], "temperature": None})
    assert (suite.name, suite.top_p, suite.temperature, suite.seeds) == ("own", 0.9, 1.0, (5,))
    assert suite.main_metric is None and suite.fail_if == ("rouge_l < -3",)
    row = {"topic": "foxes", "style": "verse", "good": "x", "better": "y"}
    assert one(row, suite) == EvalRow(0, "Hello, write on foxes in verse:", (" x", " y"))


def test_suite_row_wins_over_a_variable(tmp_path):
    suite = load_suite(write(tmp_path, "prompt: '{{ word }}'\nvariables: {word: given}\n"))
    assert one({"word": "own"}, suite).prompt == "own"
    assert one({"other": "own"}, suite).prompt == "given"


def test_suite_settings_are_json_of_all_that_decides_what_is_measured():
    suite = load_suite("instruction")
    settings = suite.settings()
    assert json.loads(json.dumps(settings)) == settings
    assert settings["seeds"] == [10, 20, 30, 40, 50] and settings["prompt"] == suite.prompt
    assert "fail_if" not in settings and "description" not in settings
    changed = load_suite("instruction", {"top_p": 0.5, "fail_if": ["rouge_l < 0"]}).settings()
    assert {key for key in settings if settings[key] != changed[key]} == {"top_p"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "promt: x\nmetric: [nll]\n",
            r"has the fields \['metric', 'promt'\], which do not exist. It may have \['answer",
        ),
        ("- rouge_l\n", "holds a list, but its fields are named"),
        ("", "holds a NoneType, but its fields are named"),
        ("metrics: [nll\n", "is no YAML: (.|\\n)*line 2"),
        ("metrics: nll\n", "`metrics` of the suite 'own' is 'nll', but several of them can be given. Make it a list"),
        ("seeds: 3\n", "`seeds` of the suite 'own' is 3, but several"),
        ("seeds: [1, 2, 1]\n", r"`seeds` of the suite 'own' is \[1, 2, 1\], where one seed would be counted twice"),
        ("temperature: 0\nseeds: [1, 2]\n", "decodes greedily .* with 2 seeds, which would all write the same"),
        ("seeds: []\n", "has 0 seeds and"),
        ("metrics: []\n", "1 seeds and 0 metrics"),
        ("fail_if: ['rouge_l below 3']\n", "`--fail-if` has 'rouge_l below 3', which is no condition"),
    ],
)
def test_suite_that_cannot_be_used_says_why(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_suite(write(tmp_path, text))


def test_suite_greedy_with_one_seed_is_fine(tmp_path):
    assert load_suite(write(tmp_path, "temperature: 0\nseeds: [7]\n")).seeds == (7,)


def test_suite_unknown_name_lists_those_there_are(tmp_path):
    with pytest.raises(ValueError, match=f"There is no suite 'poetry': the package has {', '.join(NAMES)}, and"):
        load_suite("poetry")
    with pytest.raises(ValueError, match="there is no such file"):
        load_suite(str(tmp_path))


def test_suite_file_that_is_no_text_says_so(tmp_path):
    (tmp_path / "own.yaml").write_bytes(b"metrics: [\xff\xfe]\n")
    with pytest.raises(ValueError, match="is no YAML"):
        load_suite(str(tmp_path / "own.yaml"))


# Templates


@pytest.mark.parametrize("field", ["prompt", "references"])
def test_template_that_cannot_be_read_says_so(field, tmp_path):
    values = {"prompt": "x", "references": ["y"]} | {field: "{% if %}" if field == "prompt" else ["{{ a"]}
    suite = load_suite(write(tmp_path, yaml.safe_dump(values)))
    with pytest.raises(ValueError, match="A template of the suite 'own' cannot be read: .*Mend it"):
        read([{"a": "b"}], suite)


@pytest.mark.parametrize("template", ["{{ a + 1 }}", "{{ a.b.c }}", "{{ a | nonsense }}", "{{ missing() }}"])
def test_template_that_fails_on_a_row_says_so(template, tmp_path):
    suite = load_suite(write(tmp_path, yaml.safe_dump({"prompt": template})))
    with pytest.raises(
        ValueError, match=r"A template of the suite 'own' (fails on a row .*\['a', 'z'\]|cannot be read)"
    ):
        read([{"a": "b", "z": "c"}], suite)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ a['__class__'].__mro__ }}",
        "{{ (a | attr('__class__')).__mro__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ joiner.__init__.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format(a) }}",
        "{% set _ = rows.append(1) %}",
    ],
)
@pytest.mark.parametrize("field", ["prompt", "references"])
def test_template_cannot_reach_into_python(template, field, tmp_path):
    values = {"prompt": "x", "references": ["{{ a }}"]} | {
        field: template if field == "prompt" else [template + "{{ a }}"]
    }
    suite = load_suite(write(tmp_path, yaml.safe_dump(values)))
    with pytest.raises(
        ValueError, match="fails on a row .*unsafe|fails on a row .*not permitted|fails on a row .*undef"
    ):
        read([{"a": "b", "rows": ["c"]}], suite)


def test_template_keeps_markup_and_line_breaks(tmp_path):
    suite = load_suite(write(tmp_path, 'prompt: "<b>{{ a }}</b>\\n"\nreferences: ["{{ c }}\\n"]\n'))
    assert one({"a": "1 < 2 & 'x'\n", "c": "{{ a }}"}, suite) == EvalRow(0, "<b>1 < 2 & 'x'\n</b>\n", ("{{ a }}\n",))


# Datasets


def test_dataset_of_prompts_is_taken_as_it_is_whatever_the_suite():
    row = {"prompt": "{{ x }} Once", "reference": " upon"}
    for suite in (None, "instruction", "arithmetic"):
        assert one(row, suite) == EvalRow(0, "{{ x }} Once", (" upon",))


def test_dataset_column_references_wins():
    row = {"prompt": "p", "completion": "c", "reference": "r", "references": ["a", "b"]}
    assert one(row).references == ("a", "b")
    del row["references"]
    assert one(row).references == ("r",)
    del row["reference"]
    assert one(row).references == ("c",)
    assert one({"prompt": "p", "references": "single"}).references == ("single",)


def test_dataset_of_messages_ends_before_the_last_answer():
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "A fox"},
    ]
    found = one({"messages": turns})
    assert found.prompt == turns[:3] and found.references == ("A fox",)
    assert found.text == "user: Hi\n\nassistant: Hello\n\nuser: Who?"
    unanswered = one({"messages": turns[:3]})
    assert unanswered.prompt == turns[:3] and unanswered.references == ()
    assert one({"messages": turns, "references": ["Fox", "A fox!"]}).references == ("Fox", "A fox!")


def test_dataset_of_prompts_in_messages_has_a_completion_in_messages():
    row = {
        "prompt": [{"role": "user", "content": "Who?"}],
        "completion": [{"role": "assistant", "content": "A "}, {"role": "assistant", "content": "fox"}],
    }
    assert one(row) == EvalRow(0, row["prompt"], ("A fox",))


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        (
            None,
            r"columns \['answer', 'query'\], none of which holds prompts: the suite 'plain' looks for `prompt`",
        ),
        (
            "summarisation",
            "looks for `article` or `document` or `dialogue` or `text`, else for `prompt` or `messages`",
        ),
        ("arithmetic", "looks for `question`, else for `prompt` or `messages`. Rename a column"),
    ],
)
def test_dataset_without_prompts_says_what_is_wanted(suite, message):
    with pytest.raises(ValueError, match=message):
        read([{"query": "x", "answer": "y"}], suite)


@pytest.mark.parametrize("suite", ["plain", "instruction"])
def test_dataset_without_rows_says_so(suite):
    suite = plain_suite() if suite == "plain" else load_suite(suite)
    empty = Dataset.from_dict({"prompt": [], "instruction": []})
    with pytest.raises(ValueError, match="The dataset has no rows"):
        read_rows(empty, suite)


def test_dataset_num_prompts_takes_the_first():
    rows = [{"prompt": f"p{i}"} for i in range(5)]
    assert [row.prompt for row in read(rows, num_prompts=2)] == ["p0", "p1"]
    assert [row.index for row in read(rows, num_prompts=9)] == list(range(5))


@pytest.mark.parametrize("empty", ["", " \n", None])
@pytest.mark.parametrize("suite", [None, "story"])
def test_dataset_with_an_empty_prompt_names_the_row(empty, suite):
    rows = [{"prompt": "p", "completion": "c"}] * 2 + [{"prompt": empty, "completion": "c"}]
    if suite:
        rows = [row | {"text": None} for row in rows[:2]] + [rows[2] | {"text": " "}]
    with pytest.raises(ValueError, match="^Row 2 has an empty prompt, which gives a model nothing to answer."):
        read(rows, suite)


@pytest.mark.parametrize("messages", [None, [], [{"role": "assistant", "content": "Hello"}]])
def test_dataset_with_messages_that_ask_nothing_names_the_row(messages):
    good = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    features = Features({"messages": [{"role": Value("string"), "content": Value("string")}]})
    dataset = Dataset.from_list([{"messages": good}, {"messages": messages}], features=features)
    with pytest.raises(ValueError, match="^Row 1 has an empty prompt"):
        read_rows(dataset, plain_suite())


@pytest.mark.parametrize("empty", ["", "\n", None])
@pytest.mark.parametrize(
    ("suite", "column", "row"),
    [
        (None, "completion", {"prompt": "p", "completion": "c"}),
        (None, "reference", {"prompt": "p", "reference": "c"}),
        ("instruction", "output", {"instruction": "p", "input": "", "output": "c"}),
        ("arithmetic", "answer", {"question": "p", "answer": "c"}),
    ],
)
def test_dataset_with_an_empty_reference_names_the_rows(empty, suite, column, row):
    rows = [row, row | {column: empty}, row, row | {column: empty}]
    with pytest.raises(
        ValueError, match=r"^2 rows \(1, 3\) have no reference or an empty one, with which no completion"
    ):
        read(rows, suite)


def test_dataset_with_one_of_several_references_empty_names_the_row():
    rows = [{"prompt": "p", "references": ["a", "b"]}, {"prompt": "p", "references": ["a", " "]}]
    with pytest.raises(ValueError, match="^Row 1 has no reference or an empty one"):
        read(rows)


@pytest.mark.parametrize("references", [[], None, [None], ["a", None]])
def test_dataset_with_references_of_none_names_the_row(references):
    features = Features({"prompt": Value("string"), "references": [Value("string")]})
    rows = [{"prompt": "p", "references": ["a"]}, {"prompt": "p", "references": references}]
    with pytest.raises(ValueError, match="^Row 1 has no reference or an empty one"):
        read_rows(Dataset.from_list(rows, features=features), plain_suite())


def test_dataset_many_bad_rows_are_listed_up_to_five():
    with pytest.raises(ValueError, match=r"^7 rows \(0, 1, 2, 3, 4, ...\) have an empty prompt"):
        read([{"prompt": ""}] * 7)


@pytest.mark.parametrize(
    ("suite", "row"),
    [
        (None, {"prompt": "p"}),
        ("instruction", {"instruction": "p", "input": ""}),
        ("arithmetic", {"question": "p"}),
        ("story", {"prompt": "p"}),
        ("summarisation", {"article": "p"}),
        ("translation", {"source": "p"}),
    ],
)
def test_dataset_of_prompts_alone_has_no_references(suite, row):
    assert one(row, suite).references == ()


def test_digest_tells_prompts_and_references_apart():
    rows = [EvalRow(0, "a", ("b", "c")), EvalRow(1, "d", ())]
    others = [
        rows[:1],
        rows[::-1],
        [EvalRow(0, "a", ("bc",)), rows[1]],
        [EvalRow(0, "a", ("b",)), EvalRow(1, "d", ("c",))],
        [EvalRow(2, "a", ("b", "c")), rows[1]],
        [EvalRow(0, "ab", ("c",)), rows[1]],
    ]
    assert digest_of(rows) == digest_of(list(rows))
    assert len({digest_of(each) for each in [rows, *others]}) == len(others) + 1


def test_plain_suite_measures_what_needs_no_task():
    assert {"exact_match", "chrf"}.isdisjoint(plain_suite().metrics)
    assert set(plain_suite().metrics) <= MEASURES.keys()

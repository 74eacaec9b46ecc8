import pytest

from tests.checks.subjects import (
    LLAMA_TEMPLATE,
    OPEN_TEMPLATE,
    QUIET_TEMPLATE,
    THINKING_TEMPLATE,
    conversations,
    llama_tokenizer,
    pairs,
    subject_of,
    with_template,
)
from tests.tiny import CHATML_TEMPLATE, make_tokenizer
from trl_kd.checks.render import plain_sample
from trl_kd.checks.rows import prepare
from trl_kd.checks.templates import (
    AnswerEnd,
    Thinking,
    answer_end,
    foreign_markers,
    template_finding,
    thinking_finding,
    thinking_of,
)


OFF = {"chat_template_kwargs": {"enable_thinking": False}}


REFUSING = "{{ raise_exception('no such role') }}"


def found(*args, **kwargs):
    subject = subject_of(*args, **kwargs)
    return template_finding(subject, prepare(subject))


def of_llama(template=CHATML_TEMPLATE):
    tokenizer = llama_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_template_both_the_same_is_fine_and_shows_what_is_trained():
    finding = found()
    assert (finding.verdict, finding.values) == ("fine", {"used": True, "rows": 10, "differing": 0})
    turn = "<|im_start|>user\nSky 0?<|im_end|>\n<|im_start|>assistant\n[[The sky is blue.<|im_end|>]]"
    assert plain_sample(finding.sample) == f"student:\n{turn}\n\nteacher:\n{turn}"


def test_template_sample_shows_each_tokenizers_own_template():
    sample = plain_sample(found("dskd", teacher_tokenizer=llama_tokenizer()).sample)
    assert "<|end_header_id|>\n\n[[The sky is blue.<|eot_id|>]]" in sample.partition("teacher:")[2]
    assert "[[The sky is blue.<|im_end|>]]" in sample.partition("teacher:")[0]


def test_template_sample_shows_all_turns_that_are_trained():
    rows = [{"messages": conversations(1)[0]["messages"] * 2}]
    finding = found(rows=rows, options={"assistant_only_loss": True})
    student = plain_sample(finding.sample).partition("teacher:")[0]
    assert student.count("[[The sky is blue.<|im_end|>]]") == 2


def test_template_sample_shows_control_characters_and_shortens_long_text():
    turns = [{"role": "user", "content": "\x1b[31m\x02" + "!" * 1000}, {"role": "assistant", "content": "Hi"}]
    sample = found(rows=[{"messages": turns}]).sample
    assert "\x1b" not in sample and "\\x1b[31m\\x02" in sample
    assert "characters ...]" in sample and 1000 < sample.count("!") < 1200  # of 2,000 on both sides


def test_template_sample_is_of_a_row_that_is_not_dropped():
    turns = [{"role": "user", "content": "!" * 1000}, {"role": "assistant", "content": "Hi"}]
    sample = found(rows=[{"messages": turns}, *conversations(2)]).sample
    assert "Sky 0?" in sample and "!" not in sample
    assert found(rows=[{"messages": []}]).sample == ""


@pytest.mark.parametrize("rows", [pairs(), [{"input_ids": [5, 6, 2], "labels": [-100, 6, 2]}]])
def test_template_rows_without_messages_use_none(rows):
    finding = found(rows=rows, teacher_tokenizer=with_template(LLAMA_TEMPLATE))
    assert (finding.verdict, finding.values, finding.sample) == ("fine", {"used": False}, "")


def test_template_of_the_student_alone_is_fine():
    finding = found(teacher_tokenizer=None)
    assert finding.verdict == "fine" and "[[The sky is blue.<|im_end|>]]" in plain_sample(finding.sample)


def test_template_missing_at_the_student_stops():
    finding = found(tokenizer=with_template(None))
    assert finding.verdict == "stop" and "`chat_template_path`" in finding.fix


@pytest.mark.parametrize(("method", "verdict"), [("amm", "careful"), ("dskd", "stop")])
def test_template_missing_at_the_teacher(method, verdict):
    finding = found(method, teacher_tokenizer=of_llama(None) if method == "dskd" else with_template(None))
    assert finding.verdict == verdict and "no chat template" in finding.text
    assert "`prompt` and `completion` as text" in finding.fix


@pytest.mark.parametrize("method", ["amm", "sparse-td"])
def test_template_that_differs_is_careful_where_the_teacher_reads_the_students(method):
    other = CHATML_TEMPLATE.replace("message['role'] + '\n'", "message['role'] + ': '")
    assert other != CHATML_TEMPLATE
    finding = found(method, teacher_tokenizer=with_template(other))
    assert (finding.verdict, finding.values["differing"]) == ("careful", 10)
    assert "`chat_template_path`" in finding.fix
    assert "user\\nSky 0?" in finding.text and "user: Sky 0?" in finding.text


def test_template_that_differs_is_fine_where_each_reads_its_own():
    assert found("dskd", teacher_tokenizer=llama_tokenizer()).verdict == "fine"


def test_template_difference_in_few_rows_is_counted():
    other = CHATML_TEMPLATE.replace(
        "message['content'] + '<|im_end|>'", "message['content'] | replace('7', '8') + '<|im_end|>'"
    )
    assert found(teacher_tokenizer=with_template(other)).values["differing"] == 1  # "Sky 7?"


def test_template_reads_options_of_the_rows():
    rows = conversations(2, **OFF)
    quiet = {"tokenizer": with_template(THINKING_TEMPLATE), "teacher_tokenizer": with_template(QUIET_TEMPLATE)}
    assert found(rows=rows, **quiet).verdict == "fine"
    assert found(rows=conversations(2), **quiet).verdict == "careful"


def test_template_swapped_stops_and_names_both_sides():
    finding = found("dskd", with_template(LLAMA_TEMPLATE), of_llama())
    assert finding.verdict == "stop" and "look swapped" in finding.text
    assert finding.values["foreign_markers"]["student"] == [
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ]
    assert finding.values["foreign_markers"]["teacher"] == ["<|im_start|>", "<|im_end|>"]
    pieces = len(make_tokenizer()("<|begin_of_text|>")["input_ids"])
    assert (
        pieces > 1
        and f"`<|begin_of_text|>` (and 3 more), which the student's tokenizer splits into {pieces}" in finding.text
    )
    assert "the student's own by `chat_template_path`" in finding.fix
    assert "the teacher's own in its tokenizer's folder" in finding.fix


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_template_of_the_other_at_one_side_stops_and_names_it(side):
    tokenizers = (
        (with_template(LLAMA_TEMPLATE), llama_tokenizer()) if side == "student" else (make_tokenizer(), of_llama())
    )
    finding = found("dskd", *tokenizers)
    assert finding.verdict == "stop" and f"The {side}'s is the other's." in finding.text
    assert ("chat_template_path" in finding.fix) is (side == "student")


def test_template_with_split_markers_but_its_own_end_is_careful():
    # As in Zephyr: roles in plain text, the end by a token of its own
    zephyr = CHATML_TEMPLATE.replace("'<|im_start|>' + message['role']", "'<|start_header_id|>' + message['role']")
    finding = found("dskd", with_template(zephyr), llama_tokenizer())
    assert finding.verdict == "careful"
    assert finding.values["foreign_markers"] == {"student": ["<|start_header_id|>"], "teacher": []}


def test_template_swapped_within_one_vocabulary_stops():
    base, chat = with_template(CHATML_TEMPLATE), with_template(CHATML_TEMPLATE.replace("<|im_end|>", "<|endoftext|>"))
    base.eos_token, chat.eos_token = "<|endoftext|>", "<|im_end|>"
    finding = found(tokenizer=base, teacher_tokenizer=chat)
    assert finding.verdict == "stop" and "look swapped" in finding.text
    assert finding.values["ends_like_the_other"] == {"student": True, "teacher": True}
    # The same models with their own templates
    base.chat_template, chat.chat_template = chat.chat_template, base.chat_template
    assert found(tokenizer=base, teacher_tokenizer=chat).verdict == "careful"


def test_template_that_refuses_a_row_on_the_teachers_side_is_shown():
    refusing = (
        CHATML_TEMPLATE + "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('no system') }}{%- endif -%}"
    )
    turns = [{"role": "system", "content": "Be brief."}, *conversations(1)[0]["messages"]]
    finding = found(rows=[{"messages": turns}], teacher_tokenizer=with_template(refusing))
    assert finding.verdict == "careful" and "can't write this row: no system" in finding.sample
    assert "The teacher's chat template refuses 1 of 1 rows (no system)" in finding.text


@pytest.mark.parametrize(("side", "verdict"), [("student", "stop"), ("teacher", "careful")])
def test_template_that_raises_is_named_with_what_it_says(side, verdict):
    refusing = {"tokenizer" if side == "student" else "teacher_tokenizer": with_template(REFUSING)}
    finding = found(**refusing)
    assert finding.verdict == verdict
    assert f"The {side}'s chat template refuses 10 of 10 rows (no such role)" in finding.text


def test_template_that_raises_stops_where_the_teacher_reads_its_own():
    teacher = of_llama(REFUSING)
    assert found("dskd", teacher_tokenizer=teacher).verdict == "stop"


def test_answer_end_is_the_first_marker_behind_an_answer():
    assert answer_end(make_tokenizer()) == AnswerEnd("<|im_end|>", [2])
    assert answer_end(llama_tokenizer()) == AnswerEnd("<|eot_id|>", [4])
    split = answer_end(with_template(LLAMA_TEMPLATE))
    assert split.marker == "<|eot_id|>" and len(split.ids) > 1
    plain = "{%- for message in messages -%}{{- message['role'] + ': ' + message['content'] + '\n\n' -}}{%- endfor -%}"
    assert answer_end(with_template(plain)) is None
    assert answer_end(with_template(None)) is None


def test_foreign_markers_are_split_here_and_whole_there():
    assert foreign_markers(make_tokenizer(), llama_tokenizer()) == []
    assert foreign_markers(of_llama(), make_tokenizer()) == ["<|im_start|>", "<|im_end|>"]
    # Split on both sides: nobody's
    assert foreign_markers(of_llama(), llama_tokenizer()) == []


@pytest.mark.parametrize(
    ("template", "options", "expected"),
    [
        (CHATML_TEMPLATE, {}, Thinking("", "none", False)),
        (THINKING_TEMPLATE, {}, Thinking("enable_thinking", "none", True)),
        (THINKING_TEMPLATE, {"enable_thinking": False}, Thinking("enable_thinking", "empty", False)),
        (QUIET_TEMPLATE, {}, Thinking("enable_thinking", "empty", False)),
        (OPEN_TEMPLATE, {}, Thinking("", "open", True)),
        (None, {}, Thinking("", "none", False)),
    ],
)
def test_thinking_of_a_template(template, options, expected):
    assert thinking_of(with_template(template), options) == expected


@pytest.mark.parametrize("template", [CHATML_TEMPLATE, THINKING_TEMPLATE, QUIET_TEMPLATE, OPEN_TEMPLATE])
def test_thinking_the_same_on_both_sides_is_fine(template):
    subject = subject_of(tokenizer=with_template(template), teacher_tokenizer=with_template(template))
    finding = thinking_finding(subject)
    assert (finding.verdict, finding.fix) == ("fine", "")


@pytest.mark.parametrize("template", [THINKING_TEMPLATE, QUIET_TEMPLATE])
@pytest.mark.parametrize("method", ["amm", "sparse-td"])
def test_thinking_of_the_teacher_alone_is_careful_and_names_column_and_template(method, template):
    rows = conversations(4)
    finding = thinking_finding(subject_of(method, teacher_tokenizer=with_template(template), rows=rows))
    assert finding.verdict == "careful"
    assert '`chat_template_kwargs` with `{"enable_thinking": false}`' in finding.fix
    assert "by `chat_template_path`" in finding.fix
    assert finding.values["teacher"]["switch"] == "enable_thinking" and finding.values["student"]["switch"] == ""
    assert finding.values["rows_that_set_it"] == 0
    # The column alone changes nothing for a template that doesn't read it
    rows = conversations(4, **OFF)
    finding = thinking_finding(subject_of(method, teacher_tokenizer=with_template(template), rows=rows))
    assert (finding.verdict, finding.values["rows_that_set_it"]) == ("careful", 4)


def test_thinking_of_one_side_that_all_rows_switch_off_is_fine():
    student = with_template(THINKING_TEMPLATE)
    assert thinking_finding(subject_of(tokenizer=student)).verdict == "careful"
    assert thinking_finding(subject_of(tokenizer=student, rows=conversations(4, **OFF))).verdict == "fine"
    mixed = [*conversations(3, **OFF), *conversations(1, chat_template_kwargs=None)]
    assert thinking_finding(subject_of(tokenizer=student, rows=mixed)).verdict == "careful"
    # Each reads its own: the teacher's template gets the column too
    run = {"method": "dskd", "teacher_tokenizer": of_llama(THINKING_TEMPLATE), "rows": conversations(4, **OFF)}
    assert thinking_finding(subject_of(**run)).verdict == "fine"
    finding = thinking_finding(subject_of(**run | {"rows": conversations(4)}))
    assert finding.verdict == "careful" and "chat_template_path" not in finding.fix


def test_thinking_with_other_defaults_is_careful_until_the_rows_set_it():
    run = {"tokenizer": with_template(QUIET_TEMPLATE), "teacher_tokenizer": with_template(THINKING_TEMPLATE)}
    finding = thinking_finding(subject_of(**run))
    assert finding.verdict == "careful" and "off for the student, on for the teacher" in finding.text
    assert "chat_template_kwargs" in finding.fix
    assert thinking_finding(subject_of(**run, rows=conversations(4, **OFF))).verdict == "fine"


def test_thinking_that_cannot_be_switched_off_asks_for_another_template():
    finding = thinking_finding(subject_of(teacher_tokenizer=with_template(OPEN_TEMPLATE)))
    assert finding.verdict == "careful" and finding.values["teacher"]["block"] == "open"
    assert "doesn't open `<think>`" in finding.fix and "chat_template_kwargs" not in finding.fix


def test_thinking_rows_without_messages_are_fine():
    finding = thinking_finding(subject_of(teacher_tokenizer=with_template(OPEN_TEMPLATE), rows=pairs()))
    assert (finding.verdict, finding.values) == ("fine", {"used": False})


@pytest.mark.parametrize("method", ["amm", "dskd"])
def test_template_sample_shows_the_teachers_own_prompt(method):
    teacher = {"teacher_tokenizer": llama_tokenizer()} if method == "dskd" else {}
    finding = found(method, options={"teacher_system_prompt": "Be brief."}, **teacher)
    student, _, theirs = plain_sample(finding.sample).partition("teacher")
    assert "Be brief." in theirs and "Be brief." not in student
    header = "<|start_header_id|>system" if method == "dskd" else "<|im_start|>system"
    assert header in theirs

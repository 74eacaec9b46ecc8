import pytest
from datasets import Dataset

from tests.checks.subjects import conversations, pairs, subject_of
from tests.tiny import make_tokenizer
from trl_kd.checks.rows import (
    data_finding,
    dropped_finding,
    keeping_length,
    prepare,
    room_findings,
    truncation_finding,
)
from trl_kd.data import prepare_dataset


def sized(*lengths, prompt=2):
    """Rows of these many tokens, the EOS included."""
    return [{"prompt": "!?" * (prompt // 2), "completion": "!?" * ((length - prompt - 1) // 2)} for length in lengths]


def check(function, *args, **kwargs):
    subject = subject_of(*args, **kwargs)
    return function(subject, prepare(subject))


def named(name, *args, **kwargs):
    return {finding.name: finding for finding in check(room_findings, *args, **kwargs)}[name]


def test_prepare_makes_the_rows_that_the_trainer_makes():
    data = [*sized(5, 25, 45), {"prompt": "!?" * 10, "completion": "!?"}, {"prompt": "Why?", "completion": " "}]
    subject = subject_of(rows=data, options={"max_length": 20})
    options = {"max_length": 20, "eos_token_ids": subject.eos_token_ids}
    expected = prepare_dataset(Dataset.from_list(data), subject.tokenizer, **options)
    names = ("input_ids", "labels", "prompt_length")
    sample = prepare(subject)
    assert [[row[name] for name in names] for row in sample.kept] == [
        [row[name] for name in names] for row in expected
    ]
    assert len(sample.kept) == 3 and len(sample.whole) == 5
    assert [len(row["input_ids"]) for row in sample.whole[:4]] == [5, 25, 45, 23]


def test_truncation_without_a_loss_is_fine():
    finding = check(truncation_finding, rows=sized(11, 21), options={"max_length": 21})
    assert (finding.verdict, finding.fix, finding.values["lost_rows"]) == ("fine", "", 0)
    assert "the longest has 21, `max_length` is 21" in finding.text


def test_truncation_of_4_rows_in_10_is_40_percent_and_stops():
    # 4 rows of 61 tokens lose 21 each, of 4 * 61 + 6 * 21 in all
    finding = check(truncation_finding, rows=sized(*[61] * 4, *[21] * 6), options={"max_length": 40})
    assert finding.verdict == "stop"
    assert finding.values == {
        "rows": 10,
        "lost_rows": 4,
        "lost_share": 0.4,
        "lost_tokens": 84,
        "lost_token_share": 84 / 370,
        "no_room": 0,
        "longest": 61,
        "max_length": 40,
        "needed_length": 61,
    }
    assert finding.text.startswith("4 of 10 rows (40%) are longer than `max_length` (40): they lose 84 of 370 tokens")
    assert "`max_length=61`" in finding.fix


def test_truncation_proposes_no_length_that_the_student_does_not_have():
    kwargs = {"rows": sized(*[61] * 10), "options": {"max_length": 40}}
    assert "Set `max_length=61`" in check(truncation_finding, **kwargs, student_context=61).fix
    finding = check(truncation_finding, **kwargs, student_context=60)
    assert finding.fix.startswith("Split or shorten") and "60 positions" in finding.fix


@pytest.mark.parametrize(
    ("lost", "verdict"), [(0, "fine"), (1, "fine"), (2, "careful"), (39, "careful"), (40, "stop")]
)
def test_truncation_verdict_by_share_of_200_rows(lost, verdict):
    data = sized(*[61] * lost, *[21] * (200 - lost))
    finding = check(truncation_finding, rows=data, options={"max_length": 40})
    assert (finding.verdict, finding.values["lost_share"]) == (verdict, lost / 200)
    # 198 of 200 rows are 99%
    assert ("max_length=21" if lost == 2 else "max_length=61" if lost > 2 else "") in finding.fix
    assert bool(finding.fix) is (verdict != "fine")


def test_truncation_counts_prompts_without_room_with_all_their_tokens():
    data = [*sized(21, 21), *sized(51, 51, prompt=42)]
    finding = check(truncation_finding, rows=data, options={"max_length": 40})
    assert finding.values["no_room"] == 2 and finding.values["lost_rows"] == 2
    assert finding.values["lost_tokens"] == 102 and finding.values["lost_token_share"] == 102 / 144
    assert "2 of them are dropped" in finding.text


def test_truncation_counts_no_completions_that_nobody_reads():
    data = [*sized(61, 61), *sized(51, prompt=42)]
    options = {"max_length": 40, "lmbda": 1.0}
    finding = check(truncation_finding, rows=data, options=options)
    assert (finding.values["lost_rows"], finding.values["no_room"]) == (1, 1)
    assert finding.values["needed_length"] == 43


def test_truncation_of_rows_that_packing_splits_is_none():
    options = {"max_length": 40, "lmbda": 0.0, "packing": True}
    assert check(truncation_finding, rows=sized(61, 61), options=options).verdict == "stop"
    options["packing_strategy"] = "bfd_split"
    assert check(truncation_finding, rows=sized(61, 61), options=options).verdict == "fine"


def test_truncation_without_a_limit_is_fine():
    finding = check(truncation_finding, rows=sized(61), options={"max_length": None})
    assert finding.verdict == "fine" and "no limit" in finding.text


@pytest.mark.parametrize(("lengths", "expected"), [([5], 5), ([1] * 99 + [9], 1), ([1] * 98 + [8, 9], 8)])
def test_keeping_length_keeps_99_percent(lengths, expected):
    assert keeping_length(lengths) == expected


def test_dropped_rows_are_counted_by_reason():
    data = [*pairs(7), {"prompt": "Why?", "completion": ""}, {"prompt": "Why?", "completion": " "}]
    data.append({"prompt": "", "completion": "a"})
    finding = check(dropped_finding, rows=data)
    assert finding.verdict == "stop" and finding.values["share"] == 0.3
    assert finding.values["reasons"] == {
        "the completion or text is empty": 2,
        "the prompt is empty and the tokenizer has no BOS token to start from": 1,
    }
    assert finding.fix == "Remove the rows without a completion; give the rows a `prompt`."
    assert check(dropped_finding, rows=[*pairs(99), data[-1]]).verdict == "careful"
    assert check(dropped_finding, rows=pairs(3)).verdict == "fine"


def test_dropped_conversation_without_an_answer_names_messages():
    data = [*conversations(2), {"messages": [{"role": "user", "content": "Hi"}]}]
    finding = check(dropped_finding, rows=data)
    assert (
        finding.values["dropped"] == 1 and "end `messages` with the assistant's turn".capitalize()[1:] in finding.fix
    )


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (pairs(), "prompts and completions of text"),
        (conversations(), "conversations, whose last answer is the completion"),
        ([{"prompt": "Why?"}], "prompts of text alone"),
        ([{"prompt": [{"role": "user", "content": "Why?"}]}], "prompts of messages alone"),
        ([{"input_ids": [5, 2], "labels": [-100, 2], "prompt_length": 1}], "rows of token ids"),
    ],
)
def test_data_says_what_rows_are(data, kind):
    finding = check(data_finding, rows=data)
    assert (finding.verdict, finding.values["kind"]) == ("fine", kind)
    assert f"{len(data)} sampled rows: {kind}." in finding.text


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({"lmbda": 0.0}, {"student": 0.0, "dataset": 1.0}),
        ({"lmbda": 0.25}, {"student": 0.25, "dataset": 0.75}),
        ({"lmbda": 0.25, "off_policy_source": "teacher"}, {"student": 0.25, "teacher": 0.75}),
    ],
)
def test_data_says_who_writes_what(options, shares):
    finding = check(data_finding, rows=pairs(), options=options)
    assert {name: finding.values[name] for name in shares} == shares
    other = "teacher" if "teacher" in shares else "dataset"
    assert f"{shares['student']:.0%} by the student, {shares[other]:.0%} by the {other}." in finding.text


def test_data_prompts_alone_are_continued_by_the_teacher():
    finding = check(data_finding, rows=[{"prompt": "Why?"}], options={"lmbda": 0.5})
    assert finding.values["teacher"] == 0.5


@pytest.mark.parametrize(
    ("data", "options", "fix"),
    [
        ([{"prompt": "Why?"}], {"off_policy_source": "dataset", "lmbda": 0.5}, "`off_policy_source='teacher'`"),
        ([{"text": "Why?"}], {"lmbda": 0.5}, "`lmbda=0`"),
        ([{"prompt": "Why?"}], {"lmbda": 0.0, "packing": True}, "`packing=False`"),
        ([{"input_ids": [5, 400], "labels": [-100, 400]}], {}, "without `input_ids`"),
        ([{"title": "Why?"}], {}, "as the message says"),
    ],
)
def test_data_that_the_trainer_refuses_stops(data, options, fix):
    finding = check(data_finding, rows=data, options=options)
    assert finding.verdict == "stop" and fix in finding.fix


def test_room_for_rollouts_beyond_the_context_is_careful_and_says_what_fits():
    run = {"rows": sized(13, 23, prompt=10), "options": {"lmbda": 0.5, "max_completion_length": 50}}
    finding = named("the student's context", **run, student_context=59)
    assert finding.verdict == "careful"
    assert finding.fix == "Set `max_completion_length=49`."
    assert finding.values == {"longest": 60, "longest_prompt": 10, "max_completion_length": 50, "context": 59}
    assert "60 tokens, 1 more than the 59" in finding.text
    assert named("the student's context", **run, student_context=60).verdict == "fine"
    # Off-policy rows need only their own length
    run["options"]["lmbda"] = 0.0
    assert named("the student's context", **run, student_context=23).verdict == "fine"
    finding = named("the student's context", **run, student_context=22)
    assert (finding.verdict, finding.fix) == ("careful", "Set `max_length=22` (now 128).")


def test_room_is_not_judged_without_a_known_context():
    names = [finding.name for finding in check(room_findings, student_context=None, teacher_context=None)]
    assert names == []
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 20
    assert named("the student's context", tokenizer=tokenizer, student_context=None).values["context"] == 20


def test_room_of_the_teacher_who_reads_the_same_tokens():
    run = {"rows": sized(41), "options": {"lmbda": 0.0}}
    assert named("the teacher's context", **run, teacher_context=41).verdict == "fine"
    finding = named("the teacher's context", **run, teacher_context=40)
    assert (finding.verdict, finding.fix) == ("careful", "Set `max_length=40` (now 128).")


def test_own_prompt_of_the_teacher_counts_in_its_context():
    data = [row | {"teacher_prompt": "!?" * 20} for row in sized(13, 13, prompt=2)]
    run = {"rows": data, "options": {"lmbda": 0.0}}
    finding = named("the teacher's context", **run, teacher_context=51)
    assert finding.verdict == "fine" and finding.values["longest"] == 51
    finding = named("the teacher's context", **run, teacher_context=50)
    assert (finding.verdict, finding.values["longest_prompt"]) == ("careful", 40)
    assert finding.fix.startswith("Shorten `teacher_prompt`")
    run["options"]["lmbda"] = 0.5  # 40 and 32 that the student may write
    assert named("the teacher's context", **run, teacher_context=51).values["longest"] == 72
    assert named("the student's context", **run).values["longest"] == 34
    assert "prompt of its own" in check(data_finding, **run).text


@pytest.mark.parametrize("option", ["packing", "assistant_only_loss"])
def test_own_prompt_of_the_teacher_with_what_cannot_go_with_it_stops(option):
    options = {"teacher_system_prompt": "Be brief.", option: True, "lmbda": 0.0}
    finding = check(data_finding, rows=conversations(), options=options)
    assert (finding.verdict, finding.fix) == ("stop", f"Set `{option}=False`.")


def test_own_prompt_that_is_of_another_kind_stops():
    finding = check(data_finding, rows=pairs(), options={"teacher_system_prompt": "Be brief."})
    assert finding.verdict == "stop" and "prompts are text, which has no system message" in finding.text

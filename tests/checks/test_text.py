"""All checks of text together: a good run has nothing to say, and each planted fault is named with its fix."""

import pytest

from tests.checks.subjects import (
    LLAMA_TEMPLATE,
    THINKING_TEMPLATE,
    bad,
    conversations,
    findings_of,
    llama_tokenizer,
    pairs,
    subject_of,
    with_template,
)
from tests.tiny import CHATML_TEMPLATE, make_tokenizer
from trl_kd.checks.rows import prepare
from trl_kd.data import KDCollator
from trl_kd.trainer.dual_text import is_one_vocabulary


# Another text of the same size: 300 tokens, of which the 259 of the alphabet and the special ones are the same
OTHER_TEXT = (
    "A ship sails north; whales jump, gulls cry. Nobody knows whether zinc or quartz is cheaper in Xi'an. " * 20
)


def good_runs():
    tokens = conversations(4, chat_template_kwargs={"enable_thinking": False})
    ids = [{"input_ids": [10, 11, 12, 2], "labels": [-100, 11, 12, 2]} for _ in range(4)]
    return {
        "conversations": {},
        "pairs of text": {"rows": pairs()},
        "prompts alone": {"rows": [{"prompt": "Why?"}, {"prompt": "How?"}], "options": {"lmbda": 1.0}},
        "plain texts": {"rows": [{"text": "The fox."}, {"text": "A bird."}], "options": {"lmbda": 0.0}},
        "token ids": {"rows": ids},
        "the teacher's own tokens": {"teacher_tokenizer": llama_tokenizer(), "method": "dskd"},
        "padded heads": {"teacher_rows": 416},
        "thinking off in both": {
            "tokenizer": with_template(THINKING_TEMPLATE),
            "teacher_tokenizer": with_template(THINKING_TEMPLATE),
            "rows": tokens,
        },
        "sparse": {"method": "sparse-td"},
        "packed": {"options": {"packing": True, "lmbda": 0.0}},
    }


@pytest.mark.parametrize("name", good_runs())
def test_text_findings_good_run_has_only_fine(name):
    findings = findings_of(**good_runs()[name])
    assert bad(findings) == {}
    assert {"data", "vocabularies", "special ids", "truncation"} <= findings.keys()
    assert not any(finding.fix for finding in findings.values())


def masking_by_id(subject):
    """A batch as a collator makes it that takes every pad token for padding."""
    tokenizer = subject.tokenizer
    batch = KDCollator(tokenizer.pad_token_id)(prepare(subject).cut)
    batch["labels"][batch["input_ids"] == tokenizer.pad_token_id] = -100
    return batch


def padded_with_eos():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def planted_faults():
    """Arguments of the run; the findings that are not fine, with a word that each fix must have."""
    pad_is_end = padded_with_eos()
    masked = masking_by_id(subject_of(tokenizer=pad_is_end))
    without_end = [{"input_ids": [10, 11, 12], "labels": [-100, 11, 12]} for _ in range(4)]
    long_rows = [{"prompt": "Why?", "completion": "!?" * (100 if i < 4 else 5)} for i in range(10)]
    swapped = make_tokenizer(), llama_tokenizer()
    swapped[0].chat_template, swapped[1].chat_template = LLAMA_TEMPLATE, CHATML_TEMPLATE
    same_size = {"tokenizer": make_tokenizer(vocab_size=300), "teacher_tokenizer": make_tokenizer(OTHER_TEXT, 300)}
    thinking = with_template(THINKING_TEMPLATE)
    return {
        "rows without an end": ({"rows": without_end}, {"end of a completion": ("stop", "input_ids")}),
        "swapped templates": (
            {"method": "dskd", "tokenizer": swapped[0], "teacher_tokenizer": swapped[1]},
            {"chat templates": ("stop", "chat_template_path"), "end of a completion": ("stop", "chat_template_path")},
        ),
        "pad is eos, masked by id": (
            {"tokenizer": pad_is_end, "teacher_tokenizer": padded_with_eos(), "batch": masked},
            {"padding": ("stop", "data_collator"), "end of a completion": ("stop", "data_collator")},
        ),
        "another tokenizer of one size": (same_size, {"vocabularies": ("stop", "trl-kd dskd")}),
        "thinking on one side": (
            {"teacher_tokenizer": thinking},
            {"thinking mode": ("careful", "chat_template_kwargs")},
        ),
        "40% truncated": ({"rows": long_rows}, {"truncation": ("stop", "max_length=204")}),
    }


@pytest.mark.parametrize("name", planted_faults())
def test_text_findings_planted_fault_is_named_with_its_fix(name):
    run, expected = planted_faults()[name]
    findings = findings_of(**run)
    assert bad(findings) == {name: verdict for name, (verdict, _) in expected.items()}
    for found, (_, word) in expected.items():
        assert word in findings[found].fix


def test_text_findings_no_rows_looks_at_the_tokenizers():
    findings = findings_of(rows=[])
    assert list(findings) == ["data", "vocabularies", "special ids"]
    assert bad(findings) == {"data": "careful"}
    assert "--dataset_name" in findings["data"].fix


def test_text_findings_rows_that_cannot_be_written_stop_and_say_why():
    rows = [*conversations(2), {"messages": [{"role": "assistant", "content": "Hi"}]}]
    findings = findings_of(rows=rows)
    assert bad(findings) == {"data": "stop"}
    assert "Row 2 of the sample" in findings["data"].text
    assert "ends with nothing" in findings["data"].text
    assert "truncation" not in findings


def test_subject_ends_have_the_tokenizers_eos_and_those_listed():
    subject = subject_of(eos_token_ids=[0], teacher_eos_token_ids=None)
    assert subject.ends == {0, 2}
    assert subject.teacher_ends == {2}
    assert subject_of(teacher_tokenizer=None).teacher_ends is None


@pytest.mark.parametrize(
    ("method", "other", "alignment", "expected"),
    [
        ("amm", True, None, False),
        ("sparse-td", True, None, False),
        ("dskd", True, "auto", True),
        ("dskd", False, "auto", False),
        ("dskd", True, "same", False),
        ("dskd", False, "eta", True),
        ("dskd", False, "cma", True),
    ],
)
def test_subject_reads_own_text_as_the_trainer_decides(method, other, alignment, expected):
    options = {} if alignment is None else {"alignment": alignment}
    subject = subject_of(method, teacher_tokenizer=llama_tokenizer() if other else make_tokenizer(), options=options)
    assert subject.reads_own_text is expected
    if method == "dskd":
        assert is_one_vocabulary(subject.args, subject.tokenizer, subject.teacher_tokenizer) is not expected


@pytest.mark.parametrize(
    ("rows", "options", "trains", "writes"),
    [
        (pairs(), {"lmbda": 0.0}, True, False),
        (pairs(), {"lmbda": 0.5}, True, True),
        (pairs(), {"lmbda": 1.0}, False, True),
        (pairs(), {"lmbda": 0.0, "off_policy_source": "teacher"}, False, True),
        ([{"prompt": "Why?"}], {"lmbda": 0.0}, False, True),
        ([{"text": "Why?"}], {"lmbda": 0.0}, True, False),
    ],
)
def test_subject_knows_who_writes_completions(rows, options, trains, writes):
    subject = subject_of(rows=rows, options=options)
    assert (subject.trains_completions, subject.writes) == (trains, writes)

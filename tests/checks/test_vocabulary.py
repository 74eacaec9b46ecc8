import pytest
from tokenizers import processors

from tests.checks.subjects import llama_tokenizer, pairs, subject_of
from tests.checks.test_text import OTHER_TEXT
from tests.tiny import IM_END, make_tokenizer
from trl_kd.checks.vocabulary import special_ids_finding, token_names, vocabulary_finding
from trl_kd.teachers import shared_vocab_size


def with_added(token, as_pad=True):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": token} if as_pad else {"additional_special_tokens": [token]})
    return tokenizer


def refused(subject):
    """Whether the trainer refuses these vocabularies."""
    try:
        shared_vocab_size(subject.student_rows, subject.teacher_rows, subject.tokenizer, subject.teacher_tokenizer)
    except ValueError:
        return True
    return False


def test_vocabulary_same_tokens_and_rows_is_fine():
    finding = vocabulary_finding(subject_of())
    assert (finding.verdict, finding.fix) == ("fine", "")
    assert finding.values == {
        "kind": "same",
        "student_rows": 384,
        "teacher_rows": 384,
        "student_tokens": 384,
        "teacher_tokens": 384,
        "same": 384,
        "shared_rows": 384,
        "highest_id": 383,
    }


@pytest.mark.parametrize("rows", [(384, 416), (416, 384)])
def test_vocabulary_padded_heads_are_cut_to_the_shared_rows(rows):
    subject = subject_of(student_rows=rows[0], teacher_rows=rows[1])
    finding = vocabulary_finding(subject)
    assert (finding.verdict, finding.values["kind"], finding.values["shared_rows"]) == ("fine", "padded", 384)
    assert "cut to the 384" in finding.text and "no token is lost" in finding.text
    assert shared_vocab_size(*rows, subject.tokenizer, subject.teacher_tokenizer) == 384


@pytest.mark.parametrize(("student", "teacher", "side"), [(384, 383, "teacher"), (351, 384, "student")])
def test_vocabulary_head_that_would_lose_an_id_stops(student, teacher, side):
    subject = subject_of(student_rows=student, teacher_rows=teacher)
    finding = vocabulary_finding(subject)
    assert finding.verdict == "stop" and refused(subject)
    assert f"the {side}'s head has {min(student, teacher)} rows" in finding.text
    assert "model.resize_token_embeddings(384)" in finding.fix


@pytest.mark.parametrize("method", ["amm", "sparse-td"])
def test_vocabulary_other_tokens_of_one_size_stop_and_name_dskd(method):
    ours, theirs = make_tokenizer(vocab_size=300), make_tokenizer(OTHER_TEXT, 300)
    same = sum(theirs.get_vocab().get(token) == i for token, i in ours.get_vocab().items())
    assert len(ours) == len(theirs) and same < 300
    subject = subject_of(method, ours, theirs)
    finding = vocabulary_finding(subject)
    assert finding.verdict == "stop" and refused(subject)
    assert "one size, but not the same" in finding.text
    assert finding.values["same"] == same and f"{same} of them have the same id" in finding.text
    assert "trl-kd dskd" in finding.fix and "alignment='auto'" in finding.fix


def test_vocabulary_other_tokens_under_dskd_are_aligned():
    finding = vocabulary_finding(subject_of("dskd", teacher_tokenizer=llama_tokenizer()))
    assert (finding.verdict, finding.fix, finding.values["kind"]) == ("fine", "", "different")
    assert "alignment='auto'" in finding.text
    assert "one size" in finding.text


def test_vocabulary_other_tokens_under_dskd_forced_to_be_the_same_stop():
    finding = vocabulary_finding(
        subject_of("dskd", teacher_tokenizer=llama_tokenizer(), options={"alignment": "same"})
    )
    assert (finding.verdict, finding.fix) == ("stop", "Set `alignment='auto'`, by which DSKD takes any tokenizer.")


def test_vocabulary_other_tokens_with_packing_stop():
    options = {"packing": True}
    finding = vocabulary_finding(subject_of("dskd", teacher_tokenizer=llama_tokenizer(), options=options))
    assert (finding.verdict, finding.fix) == ("stop", "Set `packing=False`.")


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_vocabulary_pad_token_of_one_side_is_named_with_one_that_both_have(side):
    added = with_added("[PAD]")
    tokenizers = (added, make_tokenizer()) if side == "student" else (make_tokenizer(), added)
    finding = vocabulary_finding(subject_of("amm", *tokenizers))
    assert finding.verdict == "stop"
    assert f"Only the {side} has `[PAD]`" in finding.text
    assert f"load the {side}'s tokenizer without it and set `pad_token='<|endoftext|>'`" in finding.fix
    assert (finding.values["only_student"], finding.values["only_teacher"]) == (
        (1, 0) if side == "student" else (0, 1)
    )
    careful = vocabulary_finding(subject_of("dskd", *tokenizers))
    assert careful.verdict == "careful" and "pad_token=" in careful.fix


def test_vocabulary_added_token_that_is_no_padding_asks_for_one_tokenizer():
    finding = vocabulary_finding(subject_of("amm", with_added("<|tool|>", as_pad=False)))
    assert "Give both models one tokenizer, with or without `<|tool|>`." in finding.fix


@pytest.mark.parametrize(
    ("method", "options", "teacher_rows", "verdict", "word"),
    [
        ("amm", {}, 384, "careful", "taken for granted"),
        ("amm", {}, 416, "stop", "416"),
        ("amm", {}, None, "careful", "taken for granted"),
        ("dskd", {"alignment": "eta"}, 384, "stop", "`alignment` is 'eta'"),
        ("sparse-td", {"teacher_cache": "somewhere"}, None, "fine", "cache"),
    ],
)
def test_vocabulary_without_the_teachers_tokenizer(method, options, teacher_rows, verdict, word):
    subject = subject_of(method, teacher_tokenizer=None, options=options, teacher_rows=teacher_rows)
    finding = vocabulary_finding(subject)
    assert finding.verdict == verdict and word in finding.text
    assert ("Save the tokenizer in the teacher's folder" in finding.fix) is (verdict != "fine")


def test_special_ids_lists_those_of_both_sides():
    finding = special_ids_finding(subject_of("dskd", teacher_tokenizer=llama_tokenizer()))
    assert finding.verdict == "fine"
    assert finding.values == {
        "student": {"bos": None, "eos": 2, "pad": 0, "unk": None, "ends": [2]},
        "teacher": {"bos": 1, "eos": 4, "pad": 0, "unk": None, "ends": [4]},
    }
    assert "eos `<|im_end|>` (2)" in finding.text and "bos `<|begin_of_text|>` (1)" in finding.text


def test_special_ids_pad_beyond_the_head_stops():
    added = with_added("[PAD]")
    finding = special_ids_finding(subject_of("amm", added, student_rows=384))
    assert finding.verdict == "stop"
    assert "ids go up to 384, but its head has 384 rows" in finding.text and "Among them: pad" in finding.text
    assert "model.resize_token_embeddings(385)" in finding.fix and f"pad_token='{IM_END}'" in finding.fix
    assert finding.values["beyond"] == {"student": {"rows": 384, "highest_id": 384}}


def test_special_ids_unused_token_beyond_the_head_is_careful():
    added = with_added("<|image|>", as_pad=False)
    assert special_ids_finding(subject_of("dskd", added, student_rows=384)).verdict == "careful"
    assert special_ids_finding(subject_of("dskd", added, student_rows=385)).verdict == "fine"


def test_special_ids_end_of_the_generation_config_beyond_the_head_stops():
    finding = special_ids_finding(subject_of(teacher_eos_token_ids=[2, 390]))
    assert finding.verdict == "stop" and "The teacher's ids go up to 390" in finding.text
    assert "an end of text" in finding.text


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_special_ids_bos_that_one_tokenizer_puts_before_texts_is_careful(side):
    with_bos, without = make_tokenizer(), make_tokenizer()
    for tokenizer in (with_bos, without):
        tokenizer.bos_token = "<|im_start|>"
    template = processors.TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", 1)])
    with_bos.backend_tokenizer.post_processor = template
    tokenizers = (with_bos, without) if side == "student" else (without, with_bos)
    finding = special_ids_finding(subject_of("amm", *tokenizers, rows=pairs()))
    assert finding.verdict == "careful"
    assert f"The {side}'s tokenizer begins a text with `<|im_start|>`" in finding.text
    assert f"add_bos_token={side == 'teacher'}" in finding.fix
    # In conversations the chat template writes it
    assert special_ids_finding(subject_of("amm", *tokenizers)).verdict == "fine"


def test_token_names_are_sorted_and_quoted():
    assert token_names(make_tokenizer(), [2, 0]) == "`<|endoftext|>` (0), `<|im_end|>` (2)"
    assert token_names(make_tokenizer(), []) == "none"

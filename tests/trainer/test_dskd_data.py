"""What two tokenizers make of each kind of data, and one clear word about each bad input."""

import copy
import json
import logging
from itertools import accumulate
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, decoders, models
from transformers import ByT5Tokenizer, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from tests.tiny import make_tokenizer
from tests.trainer.dual import (
    OTHER_TEXT,
    dual_config,
    dual_pair,
    make_other_tokenizer,
    make_spaced_tokenizer,
    make_trainer,
    short_rows,
)
from tests.trainer.runs import logged
from trl_kd import DSKDConfig, DSKDTrainer
from trl_kd.data import KDCollator
from trl_kd.trainer.dskd_warnings import AgreementWatch
from trl_kd.trainer.dual_text import shared_vocabulary


END, OTHER_END = "<|im_end|>", "</s>"


@pytest.fixture(scope="module")
def other():
    return make_other_tokenizer()


@pytest.fixture(scope="module")
def spaced():
    return make_spaced_tokenizer()


@pytest.fixture(scope="module")
def build(tokenizer, other, tmp_path_factory):
    """A trainer on rows, of the same untrained models each time."""
    pairs = {}

    def make(rows=None, eval_rows=None, teacher_tokenizer=other, options=None, **overrides):
        size = len(teacher_tokenizer)
        if size not in pairs:
            pairs[size] = dual_pair(tokenizer, teacher_tokenizer)
        folder = tmp_path_factory.mktemp("run")
        return make_trainer(
            copy.deepcopy(pairs[size]),
            (tokenizer, teacher_tokenizer),
            folder,
            rows,
            eval_rows,
            options=options,
            **overrides,
        )

    return make


def chat(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def chatml(*texts):
    turns = [f"<|im_start|>{('user', 'assistant')[i % 2]}\n{text}{END}\n" for i, text in enumerate(texts)]
    return "".join(turns) + ("<|im_start|>assistant\n" if len(texts) % 2 else "")


def instruct(*texts):
    turns = [f"<answer>{text}{OTHER_END}" if i % 2 else f"<ask>user: {text}" for i, text in enumerate(texts)]
    return "<s>" + "".join(turns) + ("<answer>" if len(texts) % 2 else "")


def sides(row, tokenizer, teacher_tokenizer):
    """Of a prepared row for either model: the prompt, and the trained stretches, as text."""
    found = []
    for prefix, own in (("", tokenizer), ("teacher_", teacher_tokenizer)):
        ids, labels, length = (row[prefix + name] for name in ("input_ids", "labels", "prompt_length"))
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
        stretches = [[]]
        for label in labels:
            stretches[-1].append(label)
            if label == -100:
                stretches.append([])
        stretches = [[label for label in part if label != -100] for part in stretches]
        found.append([own.decode(ids[:length]), *(own.decode(part) for part in stretches if part)])
    return found


def assert_partners(trainer, row, tokenizer, teacher_tokenizer):
    """Partners stand for the same text, at the same place of it; their share."""
    batch = trainer.data_collator([row, row])
    partner = batch["partner"][1]
    pairs = [(i, j) for i, j in enumerate(partner.tolist()) if j >= 0]
    for i, j in pairs:
        assert batch["labels"][1, i] != -100 and batch["teacher_labels"][1, j] != -100
        # What precedes both is the same text as well; markers are each tokenizer's own
        own, theirs = (
            "".join(trainer_side.tokens.decode([label for label in labels[:end].tolist() if label != -100]))
            for trainer_side, labels, end in (
                (trainer.row_format.student, batch["labels"][1], i + 1),
                (trainer.row_format.teacher, batch["teacher_labels"][1], j + 1),
            )
        )
        assert own == theirs
    return len(pairs)


PROMPT, ANSWER = "What is the fox?", " The sky is blue"
EARLIER = ("Hello", "It is a bird", PROMPT, "The sky is blue")
# Rows, options, and for student and teacher: prompt, trained text
DATA = {
    "text pairs": (
        {"prompt": PROMPT, "completion": ANSWER},
        {},
        [PROMPT, ANSWER + END],
        ["<s>" + PROMPT, ANSWER + OTHER_END],
    ),
    "truncated": (
        {"prompt": PROMPT, "completion": ANSWER, "truncated": True},
        {},
        [PROMPT, ANSWER],
        ["<s>" + PROMPT, ANSWER],
    ),
    "messages": (
        {"messages": chat(*EARLIER)},
        {},
        [chatml(*EARLIER[:3]), EARLIER[3] + END],
        [instruct(*EARLIER[:3]), EARLIER[3] + OTHER_END],
    ),
    "prompt and completion messages": (
        {"prompt": chat(*EARLIER)[:3], "completion": chat(*EARLIER)[3:]},
        {},
        [chatml(*EARLIER[:3]), EARLIER[3] + END],
        [instruct(*EARLIER[:3]), EARLIER[3] + OTHER_END],
    ),
    "all turns": (
        {"messages": chat(*EARLIER)},
        {"assistant_only_loss": True},
        [chatml(*EARLIER[:3]), EARLIER[1] + END, EARLIER[3] + END],
        [instruct(*EARLIER[:3]), EARLIER[1] + OTHER_END, EARLIER[3] + OTHER_END],
    ),
    "prompts": (
        {"prompt": chat(PROMPT)},
        {"off_policy_source": "teacher"},
        [chatml(PROMPT)],
        [instruct(PROMPT)],
    ),
    "text": (
        {"text": PROMPT + ANSWER},
        {},
        ["", PROMPT + ANSWER + END],
        ["", "<s>" + PROMPT + ANSWER + OTHER_END],
    ),
}


@pytest.mark.parametrize("kind", DATA)
def test_both_sides_have_the_text_of_the_row(tokenizer, other, build, kind):
    row, options, own, theirs = DATA[kind]
    trainer = build([row] * 4, alignment="eta", max_steps=1, **options)
    assert sides(trainer.train_dataset[0], tokenizer, other) == [own, theirs]
    if kind != "prompts":
        assert assert_partners(trainer, trainer.train_dataset[0], tokenizer, other) >= len(own) - 1
    trainer.train()
    trained = [len(tokenizer(text)["input_ids"]) for text in own[1:]]
    if kind != "prompts":
        # The first token of a row is predicted by nothing
        assert logged(trainer, "kd/off_policy/tokens") == [4 * (sum(trained) - (own[0] == ""))]


def test_token_ids_are_written_again_by_the_teachers_tokenizer(tokenizer, other, build):
    parts = [("Hello ", False), ("It is", True), (" three apples ", False), ("The sky is blue" + END, True)]
    ids = [(token, trained) for text, trained in parts for token in tokenizer(text)["input_ids"]]
    row = {"input_ids": [token for token, _ in ids], "labels": [token if kept else -100 for token, kept in ids]}
    masked = {"input_ids": row["input_ids"], "completion_mask": [int(kept) for _, kept in ids]}
    for given in (row, masked):
        trainer = build([given] * 4, alignment="eta", max_steps=1)
        found = trainer.train_dataset[0]
        prompt = "Hello It is three apples "
        assert sides(found, tokenizer, other) == [
            [prompt, "It is", "The sky is blue" + END],
            ["<s>" + prompt, "It is", "The sky is blue" + OTHER_END],
        ]
        # Each stretch for itself, as the student's is
        assert found["teacher_labels"][-1] == other.eos_token_id
        assert assert_partners(trainer, found, tokenizer, other) > 3
        trainer.train()


@pytest.mark.parametrize("ends", [("", ""), (END, OTHER_END)])
def test_token_ids_that_begin_with_trained_text(tokenizer, other, build, ends):
    row = {"input_ids": tokenizer(PROMPT + ANSWER + ends[0])["input_ids"]}
    trainer = build([row] * 4, alignment="eta")
    assert sides(trainer.train_dataset[0], tokenizer, other) == [
        ["", PROMPT + ANSWER + ends[0]],
        ["", "<s>" + PROMPT + ANSWER + ends[1]],
    ]


def test_prepared_rows_pass_through(tokenizer, other, build):
    trainer = build(alignment="eta")
    again = build(trainer.train_dataset, alignment="eta")
    assert again.train_dataset[3] == trainer.train_dataset[3]


@pytest.mark.parametrize("is_prompt_text", [True, False])
def test_teacher_that_puts_a_space_before_a_text(tokenizer, spaced, build, is_prompt_text):
    row = {"prompt": PROMPT, "completion": ANSWER} if is_prompt_text else {"text": PROMPT + ANSWER}
    trainer = build(
        [row] * 4, alignment="eta", teacher_tokenizer=spaced, max_steps=1, max_length=24, teacher_max_length=64
    )
    found = trainer.train_dataset[0]
    ids = found["teacher_input_ids"]
    # One space, before the whole text; none before the completion but its own
    assert spaced.decode(ids) == "<s> " + PROMPT + ANSWER + "</s>"
    assert spaced.convert_ids_to_tokens(ids[found["teacher_prompt_length"]])[:2] != "\u2581\u2581"
    batch = trainer.data_collator([found])
    pairs = [(i, j) for i, j in enumerate(batch["partner"][0].tolist()) if j >= 0]
    table = trainer.row_format.student.tokens, trainer.row_format.teacher.tokens
    texts = [(table[0].table[batch["labels"][0, i]], table[1].table[batch["teacher_labels"][0, j]]) for i, j in pairs]
    assert len(pairs) > 2 and all(own == theirs for own, theirs in texts)
    trainer.train()


def test_space_before_a_text_of_token_ids_is_not_the_texts_own(spaced, tokenizer, tmp_path):
    """Such a student, and a teacher without: the space that a row of ids begins with is taken off."""
    pair = dual_pair(spaced, tokenizer)
    ids = spaced("The sky is")["input_ids"][1:] + spaced(" blue", add_special_tokens=False)["input_ids"]
    rows = [{"input_ids": ids, "labels": [-100] * 4 + ids[4:]}] * 4
    trainer = make_trainer(pair, (spaced, tokenizer), tmp_path, rows, alignment="eta")
    row = trainer.train_dataset[0]
    assert tokenizer.decode(row["teacher_input_ids"])[:4] == "The "


def test_formatting_function_makes_the_text_of_both(tokenizer, other, build):
    rows = [{"question": PROMPT, "answer": ANSWER}] * 4
    trainer = build(rows, alignment="eta", options={"formatting_func": lambda row: row["question"] + row["answer"]})
    assert sides(trainer.train_dataset[0], tokenizer, other) == [
        ["", PROMPT + ANSWER + END],
        ["", "<s>" + PROMPT + ANSWER + OTHER_END],
    ]


def test_stream_trains_like_the_dataset_it_streams(build):
    rows = list(short_rows())
    whole = build(rows, alignment="auto", lmbda=0.5, temperature=0.0)
    stream = build(IterableDataset.from_generator(lambda: iter(rows)), alignment="auto", lmbda=0.5, temperature=0.0)
    for trainer in (whole, stream):
        trainer.train()
    assert whole.args.alignment == stream.args.alignment == "eta"
    for name in ("loss", "grad_norm", "kd/aux_grad_norm"):
        assert len(logged(whole, name)) == 2 and logged(stream, name) == pytest.approx(logged(whole, name), rel=1e-6)


def test_columns_of_the_caller_survive_and_its_data_is_not_changed(build):
    data = Dataset.from_list([row | {"origin": f"book {i}"} for i, row in enumerate(short_rows())])
    columns = list(data.column_names)
    trainer = build(data, data, alignment="eta")
    for prepared in (trainer.train_dataset, trainer.eval_dataset):
        assert prepared["origin"][:2] == ["book 0", "book 1"]
        assert {"teacher_input_ids", "teacher_labels", "teacher_prompt_length"} <= set(prepared.column_names)
        assert not any(name.startswith("_kd") for name in prepared.column_names)
    assert data.column_names == columns


def test_evaluation_sets_by_name_each_have_a_loss(tokenizer, build):
    sets = {
        "text": Dataset.from_list([{"prompt": PROMPT, "completion": ANSWER}] * 2),
        "chat": Dataset.from_list([{"messages": chat(*EARLIER)}] * 3),
    }
    trainer = build([{"messages": chat(*EARLIER)}] * 4, sets, alignment="eta")
    found = trainer.evaluate()
    assert found["eval_text_loss"] != found["eval_chat_loss"]
    alone = trainer.evaluate(sets["chat"])
    assert alone["eval_loss"] == pytest.approx(found["eval_chat_loss"], rel=1e-6)


@pytest.fixture(scope="module")
def turning():
    """A tokenizer whose template ends a turn by another token than its EOS, as those of Llama 3 and Phi do."""
    tokenizer = make_other_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("</s>", "<ask>")
    return tokenizer


def test_turns_end_as_the_template_ends_them_and_texts_as_the_tokenizer_does(tokenizer, turning, tmp_path):
    """Both ends of the teacher's stand for the student's one, and a rollout gets that of its kind of data."""
    student, teacher = dual_pair(tokenizer, turning)
    turn, end = (turning.convert_tokens_to_ids(token) for token in ("<ask>", "</s>"))
    teacher.generation_config.eos_token_id = [turn, end]
    for is_chat in (True, False):
        row = {"messages": chat(*EARLIER)} if is_chat else {"prompt": PROMPT, "completion": ANSWER}
        trainer = make_trainer(
            copy.deepcopy((student, teacher)), (tokenizer, turning), tmp_path, [row] * 4, alignment="eta", lmbda=0.5
        )
        found, expected = trainer.train_dataset[0], turn if is_chat else end
        assert found["teacher_labels"][-1] == expected and found["labels"][-1] == tokenizer.eos_token_id
        assert trainer.row_format.partners(found)[-1] == len(found["teacher_labels"]) - 1
        written = trainer.row_format.complete(found, tokenizer("No" + END)["input_ids"], "student")
        assert written["teacher_labels"][-1] == expected
        for ending in (turn, end):
            ids = turning(" No", add_special_tokens=False)["input_ids"]
            written = trainer.row_format.complete(found, [*ids, ending], "teacher")
            assert tokenizer.decode([label for label in written["labels"] if label != -100]) == " No" + END
            assert trainer.to_student[ending] == tokenizer.eos_token_id
            assert ending in trainer.row_format.teacher.formatter.eos_token_ids
        # One token of the student's has one row of the map
        own, theirs = (ids.tolist() for ids in trainer.shared_ids)
        assert own == sorted(set(own)) and len(set(theirs)) == len(theirs)
        spelled = zip(tokenizer.convert_ids_to_tokens(own), turning.convert_ids_to_tokens(theirs), strict=True)
        assert all(left == right or (left, right) == (END, "<ask>" if is_chat else "</s>") for left, right in spelled)


def test_shared_tokens_are_those_that_both_heads_have(build):
    trainer = build(alignment="eta")
    to_student, (own, theirs) = shared_vocabulary(trainer.row_format, (300, 280))
    assert len(to_student) == 280 and to_student.max() < 300 and own.max() < 300 and theirs.max() < 280
    whole, _ = shared_vocabulary(trainer.row_format, (384, 314))
    assert (to_student == np.where(whole[:280] < 300, whole[:280], -1)).all() and (whole >= 300).any()
    assert to_student[theirs].tolist() == own.tolist()


def test_both_sides_are_padded_as_asked(build):
    trainer = build(alignment="eta", pad_to_multiple_of=16)
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[2]])
    assert [batch[name].shape[1] % 16 for name in ("input_ids", "partner", "teacher_input_ids")] == [0, 0, 0]


# What is cut


@pytest.mark.parametrize("assistant_only_loss", [False, True])
def test_teacher_side_is_cut_where_the_student_side_is(tokenizer, other, build, assistant_only_loss):
    answer = "The sky is blue and the grass is green and soft"
    row = {"messages": chat(*EARLIER[:3], answer)}
    options = {"alignment": "eta", "assistant_only_loss": assistant_only_loss}
    whole = build([row] * 4, **options).train_dataset[0]
    for kept in (len(whole["input_ids"]) - 1, len(whole["input_ids"]) - 4, whole["prompt_length"] + 2):
        trainer = build([row] * 4, max_length=kept, **options)
        found = trainer.train_dataset[0]
        assert len(found["input_ids"]) == kept
        (own_prompt, *own), (prompt, *theirs) = sides(found, tokenizer, other)
        assert own_prompt == chatml(*EARLIER[:3]) and prompt == instruct(*EARLIER[:3])
        assert OTHER_END not in theirs[-1] and answer.startswith(own[-1])
        # Up to the token in which the student's text ends
        assert theirs[-1].startswith(own[-1]) and answer.startswith(theirs[-1])
        last = other.decode(found["teacher_input_ids"][-1:])
        assert len(theirs[-1]) - len(last) < len(own[-1])


@pytest.mark.parametrize("max_length", [40, 26])
def test_turn_that_is_cut_off_is_gone_on_both_sides(tokenizer, other, build, max_length):
    """Whatever is left is the completion: prompts and texts of both sides are of the same turn."""
    texts = ("Hello", "It is a bird and the fox is red", "What is it?", "The sky is blue and the grass is green")
    rows = [{"messages": chat(*texts)}] * 4
    trainer = build(rows, alignment="eta", assistant_only_loss=True, max_length=max_length)
    (own_prompt, *own), (prompt, *theirs) = sides(trainer.train_dataset[0], tokenizer, other)
    assert own_prompt == chatml(texts[0]) and len(own) == 1
    assert prompt == instruct(texts[0]) and len(theirs) == 1
    assert theirs[0].removesuffix(OTHER_END).startswith(own[0].removesuffix(END))


def test_text_row_is_cut_on_both_sides(tokenizer, other, build):
    trainer = build([{"text": "The sky is blue and the grass is green"}] * 4, alignment="cma", max_length=6)
    (_, own), (_, theirs) = sides(trainer.train_dataset[0], tokenizer, other)
    theirs = theirs.removeprefix("<s>")
    assert theirs.startswith(own) and len(theirs) - len(own) < 4


def test_teacher_max_length_leaves_the_rest_of_the_student_without_partner(tokenizer, other, build):
    answer = " three apples and the sky is blue"
    rows = [{"prompt": PROMPT, "completion": answer}] * 4
    whole = build(rows, alignment="eta").train_dataset[0]
    length = whole["teacher_prompt_length"] + 5
    trainer = build(rows, alignment="eta", teacher_max_length=length, max_steps=1)
    found = trainer.train_dataset[0]
    assert found["input_ids"] == whole["input_ids"]
    assert found["teacher_input_ids"] == whole["teacher_input_ids"][:length]
    partner = trainer.data_collator([found])["partner"][0]
    assert partner.max() < length and partner[-1] == -1 and (partner >= 0).any()
    trainer.train()


def test_teachers_side_that_is_cut_is_told(build, caplog):
    rows = [{"prompt": PROMPT, "completion": ANSWER}] * 2 + [{"prompt": PROMPT, "completion": ANSWER * 4}] * 2
    with caplog.at_level(logging.WARNING, logger="trl_kd"):
        build(rows, alignment="eta", teacher_max_length=24)
    assert "2 of 4 rows of the train dataset are longer than `teacher_max_length` (24 tokens)" in caplog.text


def test_teacher_max_length_is_its_longest_context_by_default(tokenizer, other, tmp_path):
    student, teacher = dual_pair(tokenizer, other)
    teacher.config.max_position_embeddings = 32
    rows = [{"prompt": PROMPT, "completion": " the sky is blue" * 8}] * 4
    trainer = make_trainer((student, teacher), (tokenizer, other), tmp_path, rows, alignment="eta")
    assert len(trainer.train_dataset[0]["teacher_input_ids"]) == 32 < len(trainer.train_dataset[0]["input_ids"])


@pytest.mark.parametrize("room", [0, 1])
def test_prompt_that_is_too_long_for_the_teacher_is_dropped_with_its_number(other, build, caplog, room):
    rows = list(short_rows(4)) + [{"prompt": PROMPT * 6, "completion": ANSWER}]
    length = len(other(PROMPT * 6)["input_ids"]) + room
    with caplog.at_level(logging.WARNING, logger="trl_kd"):
        trainer = build(rows, alignment="eta", teacher_max_length=length)
    assert len(trainer.train_dataset) == 4 + room
    reason = "no room for a completion within the teacher's `teacher_max_length` (1 rows)"
    assert (reason in caplog.text) == (room == 0)


def test_row_that_only_the_teacher_cannot_read_is_dropped_with_its_number(tokenizer, other, tmp_path, caplog):
    """The student has a BOS to start from, the teacher has none."""
    rows = list(short_rows(4)) + [{"prompt": "", "completion": ANSWER}]
    with caplog.at_level(logging.WARNING, logger="trl_kd"):
        trainer = make_trainer(dual_pair(other, tokenizer), (other, tokenizer), tmp_path, rows, alignment="eta")
    assert len(trainer.train_dataset) == 4
    assert "on the teacher's side, the prompt is empty and the tokenizer has no BOS token" in caplog.text


# Bad input


def test_nothing_to_align_raises(build):
    # Both words are one token of the teacher and several of the student, and no end of text is left
    rows = [{"prompt": PROMPT, "completion": completion, "truncated": True} for completion in (" cat mat", " mat")] * 2
    message = "Of the student's tokens in the first 200 rows, none begins and ends where a token of the teacher does"
    for options in ({"alignment": "eta"}, {"objective": "simple"}):
        with pytest.raises(ValueError, match=message + ".*take `alignment='cma'`"):
            build(rows, **options)
    assert build(rows, preset="v1").args.alignment == "cma"


@pytest.mark.parametrize(("min_coverage", "alignment", "how"), [(0.3, "eta", "at least"), (0.9, "cma", "less than")])
def test_alignment_is_chosen_by_its_coverage_and_said(build, caplog, min_coverage, alignment, how):
    with caplog.at_level(logging.WARNING):
        trainer = build(min_coverage=min_coverage)
    assert trainer.args.alignment == alignment
    share = "exact alignment reaches 48% of the student's tokens"
    assert f"{share}, {how} `min_coverage` ({min_coverage:.0%}): `alignment='{alignment}'`" in caplog.text
    # A baseline has no attention to fall back to
    assert build(min_coverage=min_coverage, objective="simple").args.alignment == "eta"


def test_coverage_of_prompts_alone_is_that_of_the_prompts(tokenizer, other, build, caplog):
    with caplog.at_level(logging.WARNING):
        build([{"prompt": PROMPT}] * 4)
    spans = [
        set(zip(starts := [0, *accumulate(lengths)], starts[1:], strict=False))
        for lengths in (
            [len(own.decode([token])) for token in own(PROMPT, add_special_tokens=False)["input_ids"]]
            for own in (tokenizer, other)
        )
    ]
    # Nothing predicts the first token of a row
    own = {span for span in spans[0] if span[0] > 0}
    assert f"exact alignment reaches {len(own & spans[1]) / len(own):.0%}" in caplog.text


@pytest.fixture(scope="module")
def strange():
    """A tokenizer that has no token in common with any other but its end."""
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "qqq": 1, "zzz": 2}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def test_no_shared_vocabulary_raises(build, strange):
    message = "Of the teacher's 4 tokens and the student's 384, 1 stand for the same text.*`alignment='cma'` with"
    with pytest.raises(ValueError, match=message):
        build(alignment="cma", preset="v2", teacher_tokenizer=strange)


def test_no_shared_vocabulary_is_no_matter_where_nothing_needs_it(build, strange):
    trainer = build(alignment="cma", preset="v1", teacher_tokenizer=strange, max_steps=1)
    trainer.train()
    assert trainer.shared_ids is None and len(logged(trainer, "loss")) == 1


def test_slow_tokenizer_raises(build):
    with pytest.raises(ValueError, match="The tokenizer is a `ByT5Tokenizer`, which isn't fast.*Load it with"):
        build(teacher_tokenizer=ByT5Tokenizer())


@pytest.mark.parametrize("alignment", ["eta", "cma"])
def test_teacher_without_tokenizer_raises(tokenizer, tmp_path, alignment):
    message = f"`alignment` is '{alignment}', but the teacher has no tokenizer beside it.*`teacher_processing_class`"
    with pytest.raises(ValueError, match=message):
        make_trainer(dual_pair(tokenizer), (tokenizer, None), tmp_path, alignment=alignment)


def test_teachers_tokenizer_is_loaded_from_beside_it(tokenizer, other, tmp_path, teacher_path):
    student, teacher = dual_pair(tokenizer, other)
    teacher.save_pretrained(tmp_path / "teacher")
    other.save_pretrained(tmp_path / "teacher")
    for model, alignment in ((str(tmp_path / "teacher"), "eta"), (teacher_path, "same")):
        trainer = make_trainer((copy.deepcopy(student), model), (tokenizer, None), tmp_path)
        assert trainer.args.alignment == alignment
        assert trainer.is_dual == (alignment == "eta")
        assert trainer.teacher_processing_class.eos_token == (other if trainer.is_dual else tokenizer).eos_token


def test_one_vocabulary_asked_for_where_there_are_two_raises(tokenizer, other, tmp_path):
    student, teacher = dual_pair(tokenizer, other)
    teacher.save_pretrained(tmp_path / "teacher")
    other.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="vocabularies differ: the student's tokenizer has 384 tokens, the teacher's"):
        make_trainer((student, str(tmp_path / "teacher")), (tokenizer, None), tmp_path, alignment="same")


def test_one_vocabulary_is_judged_by_the_tokenizer_that_is_passed(tokenizer, tmp_path):
    # Nothing is saved beside these teachers, whose heads have as many rows as the student's, or more
    other = make_other_tokenizer(len(tokenizer))
    student, teacher = dual_pair(tokenizer, other)
    teacher.resize_token_embeddings(len(tokenizer))
    with pytest.raises(ValueError, match="vocabularies differ"):
        make_trainer((student, teacher), (tokenizer, other), tmp_path, alignment="same")
    student, padded = dual_pair(tokenizer)
    padded.resize_token_embeddings(len(tokenizer) + 24)
    trainer = make_trainer((student, padded), (tokenizer, copy.deepcopy(tokenizer)), tmp_path)
    assert trainer.args.alignment == "same" and trainer.vocab_size == len(tokenizer)


def test_two_vocabularies_of_one_size_are_two(tmp_path):
    tokenizers = make_tokenizer(vocab_size=300), make_tokenizer(OTHER_TEXT, vocab_size=300)
    assert len(tokenizers[0]) == len(tokenizers[1])
    assert make_trainer(dual_pair(*tokenizers), tokenizers, tmp_path).args.alignment == "eta"


def test_chat_template_missing_on_the_teachers_side_raises(build, other):
    plain = copy.deepcopy(other)
    plain.chat_template = None
    message = "train dataset holds messages, but the teacher's tokenizer has no chat template.*Set its `chat_template`"
    with pytest.raises(ValueError, match=message):
        build([{"messages": chat(*EARLIER)}] * 4, teacher_tokenizer=plain)


def test_end_of_text_missing_on_the_teachers_side_raises(build, other):
    endless = copy.deepcopy(other)
    endless.eos_token = None
    with pytest.raises(ValueError, match="The teacher's tokenizer has no EOS token.*Set its `eos_token`"):
        build(teacher_tokenizer=endless)


def test_teachers_template_without_marks_raises_if_turns_are_to_be_told_apart(build, other):
    unmarked = copy.deepcopy(other)
    unmarked.chat_template = other.chat_template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    with pytest.raises(ValueError, match="chat template"):
        build([{"messages": chat(*EARLIER)}] * 4, teacher_tokenizer=unmarked, assistant_only_loss=True)


def test_teachers_template_without_marks_is_replaced_where_trl_knows_it(tokenizer, other, build, monkeypatch):
    unmarked = copy.deepcopy(other)
    unmarked.chat_template = other.chat_template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    known = {tokenizer.chat_template: None, unmarked.chat_template: other.chat_template}
    monkeypatch.setattr("trl_kd.data.formatting.get_training_chat_template", lambda own: known[own.chat_template])
    rows = [{"messages": chat(*EARLIER)}] * 4
    trainer = build(rows, alignment="eta", teacher_tokenizer=unmarked, assistant_only_loss=True)
    _, theirs = sides(trainer.train_dataset[0], tokenizer, other)
    assert theirs[1:] == [EARLIER[1] + OTHER_END, EARLIER[3] + OTHER_END]


def test_packing_two_vocabularies_raises(build):
    with pytest.raises(ValueError, match="`packing` is True, but student and teacher have different vocabularies"):
        build(packing=True, max_length=64)


@pytest.mark.parametrize("alignment", ["auto", "eta", "cma"])
def test_collator_of_the_callers_with_two_vocabularies_raises(build, alignment):
    with pytest.raises(ValueError, match="data_collator"):
        build(alignment=alignment, options={"data_collator": KDCollator(0)})


def test_attention_to_a_teacher_of_two_widths_raises(tokenizer, other, tmp_path):
    """Embeddings of one width, last hidden states of another; OPT has such models, up to its last projection."""
    ids = {"eos_token_id": other.eos_token_id, "pad_token_id": 0, "bos_token_id": None}
    config = OPTConfig(
        vocab_size=len(other),
        hidden_size=48,
        word_embed_proj_dim=24,
        ffn_dim=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        **ids,
    )
    teacher = OPTForCausalLM(config)
    teacher.model.decoder.project_out = None
    teacher.lm_head = nn.Linear(48, len(other), bias=False)
    student, _ = dual_pair(tokenizer, other)
    message = "input embeddings are 24 wide and its last hidden states 48.*Use `alignment='eta'`"
    with pytest.raises(NotImplementedError, match=message):
        make_trainer((student, teacher), (tokenizer, other), tmp_path, alignment="cma")
    make_trainer((student, teacher), (tokenizer, other), tmp_path, alignment="eta", max_steps=1).train()


@pytest.mark.parametrize("name", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_sharded_heads_raise(name):
    trainer = SimpleNamespace(**({"is_deepspeed_enabled": False, "is_fsdp_enabled": False} | {name: True}))
    with pytest.raises(NotImplementedError, match="where DeepSpeed and FSDP may have put their weights away.*Use DDP"):
        DSKDTrainer.match_heads(trainer)


def test_padded_heads_never_write_padding(tokenizer, other, tmp_path):
    """Rows beyond the tokenizers stand for nothing that could be translated."""
    for source in ("student", "teacher"):
        student, teacher = dual_pair(tokenizer, other)
        model = {"student": student, "teacher": teacher}[source]
        size = model.get_output_embeddings().out_features
        model.resize_token_embeddings(size + 64)
        with torch.no_grad():
            model.get_output_embeddings().weight[size:] *= 50.0
        options = {"lmbda": 1.0, "kd_rate": 1.0} if source == "student" else {"off_policy_source": "teacher"}
        trainer = make_trainer(
            (student, teacher), (tokenizer, other), tmp_path, alignment="eta", max_steps=1, **options
        )
        write = {"student": trainer.write_with_student, "teacher": trainer.write_with_teacher}[source]
        assert max(token for ids in write([[5, 6, 7]] * 8, seed=0) for token in ids) < size
        trainer.train()


BAD_VALUES = [
    (
        {"alignment": "fuzzy"},
        "`alignment` is 'fuzzy', which does not exist. Choose one of 'auto', 'same', 'eta', 'cma'",
    ),
    ({"objective": "mse"}, "`objective` is 'mse', which does not exist. Choose one of 'dual_space', 'simple', 'uld'"),
    ({"preset": "v3"}, "`preset` is 'v3', which does not exist. Choose one of 'v1', 'v2'"),
    ({"divergence": "l2"}, "`divergence` is 'l2', which does not exist. Choose one of 'adaptive_kl', 'forward_kl'"),
    ({"teacher_space_divergence": "l2"}, "`teacher_space_divergence` is 'l2', which does not exist"),
    ({"teacher_space_denominator": "all"}, "`teacher_space_denominator` is 'all'.*'student', 'teacher'"),
    ({"projector_label": "student"}, "`projector_label` is 'student'.*'gold', 'teacher_top1'"),
    ({"gate": "open"}, "`gate` is 'open'.*'none', 'agreement'"),
    ({"gate_normalization": "rows"}, "`gate_normalization` is 'rows'.*'tokens', 'gated'"),
    ({"projector_init": "zero"}, "`projector_init` is 'zero'.*'random', 'logit_invariant'"),
    ({"student_to_teacher": "frozen"}, "`student_to_teacher` is 'frozen'.*'learned', 'recomputed'"),
    ({"cma_norm_scope": "row"}, "`cma_norm_scope` is 'row'.*'valid', 'padded'"),
    ({"min_coverage": 1.2}, r"`min_coverage` is 1.2, but it is a share of tokens. Set it in \[0, 1\]"),
    ({"kd_rate": -0.1}, r"`kd_rate` is -0.1, but it is a share of the loss. Set it in \[0, 1\]"),
    ({"adaptive_head": 1.5}, "`adaptive_head` is 1.5, but it is a mass of the teacher's distribution"),
    ({"kd_temperature": 0.0}, "`kd_temperature` is 0.0, but logits are divided by it. Set it above 0"),
    ({"teacher_temperature": float("inf")}, "`teacher_temperature` is inf, but logits are divided by it"),
    ({"skew": 1.0}, r"`skew` is 1.0, but it is a share of a mixture. Set it in \[0, 1\)"),
    ({"init_vocab_size": 0}, "`init_vocab_size` is 0, but it counts tokens. Set it to 1 or more, or None"),
    ({"teacher_max_length": 0}, "`teacher_max_length` is 0, but it counts tokens"),
    (
        {"student_space": False, "teacher_space": False},
        "`student_space` and `teacher_space` are both False.*SFTTrainer",
    ),
    ({"objective": "uld", "alignment": "cma"}, "`objective` is 'uld' with `alignment` 'cma', but attention works on"),
    ({"objective": "simple", "alignment": "cma"}, "`objective` is 'simple' with `alignment` 'cma'.*to 'auto'"),
    ({"packing": True, "alignment": "eta"}, "`packing` is True with `alignment` 'eta', but rows of two tokenizers"),
    ({"packing": True, "alignment": "cma"}, "`packing` is True with `alignment` 'cma'.*Set `packing=False`"),
    ({"lmbda": 1.5}, "`lmbda` is 1.5, but it is a share of rows"),
]


@pytest.mark.parametrize(("options", "message"), BAD_VALUES)
def test_config_bad_value_raises(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DSKDConfig(output_dir=str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize("name", ["min_coverage", "kd_rate", "adaptive_head"])
def test_config_ends_of_a_range_are_accepted(tmp_path, name):
    for value in (0.0, 1.0):
        assert vars(dual_config(tmp_path, **{name: value}))[name] == value


RESOLVED = {
    ("v1", "same"): ("gold", "none", "tokens", "random", True, "learned", "forward_kl"),
    ("v1", "eta"): ("gold", "none", "tokens", "random", True, "learned", "forward_kl"),
    ("v1", "cma"): ("gold", "agreement", "tokens", "random", True, "learned", "forward_kl"),
    ("v2", "same"): ("teacher_top1", "agreement", "gated", "logit_invariant", False, "recomputed", "reverse_kl"),
    ("v2", "cma"): ("teacher_top1", "agreement", "gated", "logit_invariant", False, "recomputed", "reverse_kl"),
    ("context", "eta"): ("gold", "none", "tokens", "logit_invariant", False, "recomputed", "reverse_kl"),
}
DECIDED = (
    *("projector_label", "gate", "gate_normalization", "projector_init", "projector_bias", "student_to_teacher"),
    "teacher_space_divergence",
)


@pytest.mark.parametrize(("preset", "alignment"), RESOLVED)
def test_config_preset_decides_what_is_not_given(tmp_path, preset, alignment):
    config = dual_config(tmp_path, preset=preset, divergence="reverse_kl", learning_rate=2e-5)
    assert all(vars(config)[name] is None for name in DECIDED)
    config.resolve(alignment)
    assert config.alignment == alignment
    assert tuple(vars(config)[name] for name in DECIDED) == RESOLVED[preset, alignment]
    assert config.aux_learning_rate == pytest.approx(2e-4)


PUBLISHED = ("forward_kl", 2.0, True, 0, 0, "constant")
OTHERS = {"v1": PUBLISHED, "v2": PUBLISHED, "context": ("reverse_kl", 1.0, False, 256, 1000, "cosine")}


@pytest.mark.parametrize("preset", OTHERS)
def test_config_preset_decides_the_loss_and_the_projectors_steps_too(tmp_path, preset):
    names = (
        *("divergence", "kd_temperature", "teacher_space", "projector_hidden_size", "projector_pretraining_steps"),
        "aux_lr_scheduler_type",
    )
    for alignment in ("same", "eta", "cma"):
        config = dual_config(tmp_path, preset=preset)
        config.resolve(alignment)
        assert tuple(vars(config)[name] for name in names) == OTHERS[preset]
        assert config.teacher_space_divergence == OTHERS[preset][0]
        assert config.eta_pairs == ("context" if (preset, alignment) == ("context", "eta") else "token")


def test_config_what_is_given_wins_over_the_preset(tmp_path):
    given = {
        "projector_label": "gold",
        "gate": "none",
        "gate_normalization": "tokens",
        "projector_init": "random",
        "projector_bias": True,
        "student_to_teacher": "learned",
        "teacher_space_divergence": "jsd",
    }
    config = dual_config(tmp_path, preset="v2", aux_learning_rate=0.5, **given)
    config.resolve("cma")
    assert {name: vars(config)[name] for name in given} == given and config.aux_learning_rate == 0.5


def test_config_of_the_caller_is_not_changed(tokenizer, tmp_path):
    args = dual_config(tmp_path, preset="v1", max_steps=1)
    before = json.dumps(args.to_dict(), default=str)
    trainer = DSKDTrainer(*dual_pair(tokenizer), args, short_rows(), processing_class=tokenizer)
    trainer.train()
    assert json.dumps(args.to_dict(), default=str) == before
    assert trainer.args.alignment == "same" and args.alignment == "auto"


def test_settings_that_are_likely_a_mistake_are_told(build, caplog):
    with caplog.at_level(logging.WARNING):
        build(alignment="eta")
    assert "aux_learning_rate" not in caplog.text and "lmbda" not in caplog.text
    with caplog.at_level(logging.WARNING):
        build(alignment="eta", lmbda=1.0, aux_learning_rate=4e-3)
    assert "`lmbda` is 1, so every row is a rollout" in caplog.text and "set `kd_rate=1.0`" in caplog.text
    assert "`aux_learning_rate` is 0.004 with a `learning_rate` of 0.001" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        build(alignment="eta", lmbda=1.0, kd_rate=1.0, aux_learning_rate=5e-3)
        build(alignment="eta", objective="simple", aux_learning_rate=1e-3)
    assert "`lmbda`" not in caplog.text and "`aux_learning_rate`" not in caplog.text


NAMES = ("kd/off_policy/projector_agreement", "kd/off_policy/student_agreement")


def test_projector_that_is_behind_is_told_once_and_that_it_leads(caplog):
    watch, state = AgreementWatch(), SimpleNamespace(log_history=[], global_step=0)

    def log(projector=None, student=None):
        entry = {} if projector is None else dict(zip(NAMES, (projector, student), strict=True))
        state.global_step += 10
        state.log_history.append(entry | {"loss": 1.0})
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="trl_kd.trainer.dskd_warnings"):
            watch.on_log(None, state, None, logs=entry)
        return caplog.text

    # Twice may be chance
    assert log(0.1, 0.3) == log() == log(0.1, 0.3) == ""
    text = log(0.1, 0.3)
    assert "After 40 steps the projected teacher finds 10% of its labels, the student 30%" in text
    assert "Raise `aux_learning_rate`" in text
    assert log(0.1, 0.3) == log() == ""
    assert "After 70 steps the projected teacher (40%) leads the student" in log(0.4, 0.3)
    assert log(0.5, 0.3) == ""
    assert "the student 60%" in log(0.5, 0.6)


def test_projectors_are_watched_where_they_teach_the_student(build, caplog):
    def watched(**options):
        trainer = build(alignment="eta", **options)
        return any(isinstance(callback, AgreementWatch) for callback in trainer.callback_handler.callbacks)

    assert watched() and not watched(student_space=False) and not watched(objective="simple")
    # From projectors that learn nothing, on a student that does
    options = {"preset": "v1", "aux_learning_rate": 1e-9, "learning_rate": 1e-2, "max_steps": 8}
    with caplog.at_level(logging.WARNING):
        build(alignment="eta", **options).train()
    assert "steps the projected teacher finds 0% of its labels" in caplog.text

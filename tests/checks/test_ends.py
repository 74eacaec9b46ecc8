import pytest
import torch

from tests.checks.subjects import (
    LLAMA_TEMPLATE,
    bad,
    conversations,
    findings_of,
    llama_tokenizer,
    pairs,
    subject_of,
    with_template,
)
from tests.tiny import END_OF_TEXT, make_tokenizer
from trl_kd.checks.ends import end_finding, learns_end, pad_finding
from trl_kd.checks.rows import prepare
from trl_kd.data import KDCollator, pack


END, PAD = 2, 0


def check(function, *args, **kwargs):
    subject = subject_of(*args, **kwargs)
    return function(subject, prepare(subject))


def with_eos(eos=None, pad=None):
    tokenizer = make_tokenizer()
    tokenizer.eos_token, tokenizer.pad_token = eos or tokenizer.eos_token, pad or tokenizer.pad_token
    return tokenizer


def ids_of(*rows):
    """Rows of token ids, of which all but the first two are trained."""
    return [{"input_ids": list(row), "labels": [-100, -100, *row[2:]]} for row in rows]


def batch_of(subject, mask=None):
    """The trainer's batch; with `mask`, its labels without these ids."""
    batch = KDCollator(subject.tokenizer.pad_token_id)(prepare(subject).kept)
    if mask is not None:
        batch["labels"][batch["input_ids"] == mask] = -100
    return batch


def test_end_of_rows_that_train_it_is_fine():
    finding = check(end_finding, rows=pairs(4))
    assert (finding.verdict, finding.fix) == ("fine", "")
    assert finding.values == {
        "ends": [END],
        "teacher_ends": [END],
        "rows": 4,
        "learn_end": 4,
        "last_is_end": 4,
        "share": 1.0,
    }
    assert "4 of 4 rows (100%) train one" in finding.text


def test_end_of_the_batch_is_what_counts():
    subject = subject_of(rows=pairs(4))
    batch = batch_of(subject, mask=END)
    finding = check(end_finding, rows=pairs(4), batch=batch)
    assert (finding.verdict, finding.values["learn_end"]) == ("stop", 0)
    assert "the rows have it (4 of 4), but the collator masks it" in finding.text
    assert finding.fix == "Leave out `data_collator`: the trainer's own masks padding by length, not by id."
    assert check(end_finding, rows=pairs(4), batch=batch_of(subject)).verdict == "fine"


def test_end_of_a_packed_batch_is_seen_in_each_of_its_sequences():
    from datasets import Dataset

    subject = subject_of(rows=pairs(4))
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in prepare(subject).kept]
    batch = KDCollator(PAD)(list(pack(Dataset.from_list(rows), 128)))
    assert "attention_mask" not in batch
    finding = check(end_finding, rows=pairs(4), batch=batch)
    assert (finding.verdict, finding.values["rows"], finding.values["learn_end"]) == ("fine", 4, 4)


def test_end_that_no_row_of_ids_has_stops():
    finding = check(end_finding, rows=ids_of([5, 6, 7], [5, 6, 7, 8]))
    assert (finding.verdict, finding.values["share"]) == ("stop", 0.0)
    assert "No row trains" in finding.text and "never learns to stop" in finding.text
    assert "End each row of `input_ids` (and `labels`) with `<|im_end|>` (2)" in finding.fix


def test_end_that_few_rows_have_is_careful():
    finding = check(end_finding, rows=ids_of([5, 6, 7, END], [5, 6, 7], [5, 6, 8]))
    assert (finding.verdict, finding.values["share"]) == ("careful", 1 / 3)
    assert "Only 33% of the rows" in finding.text
    assert check(end_finding, rows=ids_of([5, 6, 7, END], [5, 6, 7])).verdict == "fine"


def test_end_by_another_token_names_eos_token():
    rows = ids_of([5, 6, 7, 0], [5, 6, 0])
    finding = check(end_finding, rows=rows)
    assert finding.verdict == "stop" and finding.fix == "Set `eos_token='<|endoftext|>'`."
    assert check(end_finding, tokenizer=with_eos(END_OF_TEXT), rows=rows, teacher_eos_token_ids=[0]).verdict == "fine"


def test_end_masked_in_the_labels_of_ids_asks_for_its_label():
    rows = [{"input_ids": [5, 6, 7, END], "labels": [-100, 6, 7, -100]} for _ in range(3)]
    finding = check(end_finding, rows=rows)
    assert finding.verdict == "stop"
    assert finding.fix == "Set the label of `<|im_end|>` (2) at the end of each completion to its id, not -100."
    assert "masked by its id" not in finding.text
    padded = with_eos(pad="<|im_end|>")
    assert "masked by its id" in check(end_finding, tokenizer=padded, rows=rows).text


def test_end_is_not_taken_for_the_padding_of_a_batch():
    tokenizer = with_eos(pad="<|im_end|>")
    rows = ids_of([5, 6, 7], [5, 6, 7, 8], [5, 6, 7, 8, 9], [5, 6, 7])
    subject = subject_of(tokenizer=tokenizer, rows=rows)
    finding = check(end_finding, tokenizer=tokenizer, rows=rows, batch=batch_of(subject))
    assert finding.verdict == "stop" and "came as token ids without one" in finding.text


def test_end_that_max_length_cuts_off_names_the_length():
    rows = [{"prompt": "!?", "completion": "!?" * 20} for _ in range(4)]
    finding = check(end_finding, rows=rows, options={"max_length": 20})
    assert finding.verdict == "stop" and finding.fix == "Set `max_length=43`."
    assert "`max_length` (20) cuts it off" in finding.text


def test_end_of_rows_whose_writer_was_cut_off_asks_for_longer_ones():
    rows = [row | {"truncated": True} for row in pairs()]
    finding = check(end_finding, rows=rows)
    assert finding.verdict == "stop" and "--max_completion_length" in finding.fix and "`truncated`" in finding.text


def test_end_of_completions_that_are_written_later_is_not_judged():
    finding = check(end_finding, rows=ids_of([5, 6, 7]), options={"lmbda": 1.0})
    assert (finding.verdict, "share" in finding.values) == ("fine", False)
    assert "written during training" in finding.text


def test_end_is_no_action_of_sparse_td_without_train_eos():
    for options, verdict in (({"preset": "released"}, "careful"), ({"train_eos": False}, "careful"), ({}, "fine")):
        finding = check(end_finding, "sparse-td", options=options)
        assert (finding.verdict, finding.fix) == (verdict, "" if verdict == "fine" else "Set `train_eos=true`.")


def test_end_of_a_template_that_ends_the_teacher_alone_stops_and_names_eos_token():
    base = with_eos(END_OF_TEXT)
    findings = findings_of(tokenizer=base)
    assert bad(findings) == {"end of a completion": "stop"}
    finding = findings["end of a completion"]
    assert finding.fix == "Set `eos_token='<|im_end|>'`."
    assert "ends an answer with `<|im_end|>`, which doesn't end the student's generation" in finding.text
    assert "is what ends the teacher's" in finding.text
    # The generation config of the student may know it
    assert bad(findings_of(tokenizer=base, eos_token_ids=[0, 2])) == {}


def test_end_of_a_template_that_ends_nobody_is_careful():
    base = with_eos(END_OF_TEXT)
    finding = check(end_finding, tokenizer=base, teacher_tokenizer=with_eos(END_OF_TEXT))
    assert (finding.verdict, finding.fix) == ("careful", "Set `eos_token='<|im_end|>'`.")


def test_end_of_a_template_in_split_markers_asks_for_another_template():
    finding = check(end_finding, tokenizer=with_template(LLAMA_TEMPLATE), teacher_tokenizer=None)
    pieces = len(make_tokenizer()("<|eot_id|>")["input_ids"])
    assert finding.verdict == "careful" and f"splits it into {pieces} tokens" in finding.text
    assert "`chat_template_path`" in finding.fix


def test_end_of_the_teachers_own_template_names_its_generation_config():
    teacher = llama_tokenizer()
    teacher.eos_token = "<|end_of_text|>"
    finding = check(end_finding, "dskd", teacher_tokenizer=teacher)
    assert (
        finding.verdict == "careful" and "The teacher's chat template ends an answer with `<|eot_id|>`" in finding.text
    )
    assert "`eos_token_id` in the teacher's generation config" in finding.fix
    assert check(end_finding, "dskd", teacher_tokenizer=teacher, teacher_eos_token_ids=[4]).verdict == "fine"


@pytest.mark.parametrize(("method", "verdict"), [("amm", "careful"), ("sparse-td", "careful"), ("dskd", "careful")])
def test_end_that_the_teacher_never_writes_is_careful(method, verdict):
    teacher = with_eos(END_OF_TEXT)
    finding = check(end_finding, method, rows=pairs(), teacher_tokenizer=teacher)
    assert (finding.verdict, finding.fix) == (verdict, "Set `eos_token='<|endoftext|>'`.")
    # It may have several
    run = {"rows": pairs(), "teacher_tokenizer": teacher, "teacher_eos_token_ids": [2]}
    assert check(end_finding, method, **run).verdict == "fine"


def test_learns_end_counts_no_first_position():
    assert not learns_end([END, 5, 6], {END})
    assert learns_end([5, END, 6], {END})
    assert not learns_end([5, -100], {END})


@pytest.mark.parametrize("pad", ["<|im_end|>", "<|endoftext|>"])
def test_pad_with_the_trainers_own_mask_is_fine(pad):
    tokenizer = with_eos(pad=pad)
    subject = subject_of(tokenizer=tokenizer)
    finding = check(pad_finding, tokenizer=tokenizer, batch=batch_of(subject))
    assert (finding.verdict, finding.fix) == ("fine", "")
    assert finding.values["pad_is_end"] is (pad == "<|im_end|>")
    assert finding.values["rows_with_masked_end"] == 0


def mixed_conversations():
    """Rows of different lengths, so that a batch has padding."""
    rows = conversations(4)
    rows[0]["messages"][-1]["content"] = "Blue."
    return rows


@pytest.mark.parametrize("by_attention", [False, True])
def test_pad_that_a_collator_masks_by_id_stops_where_it_is_the_end(by_attention):
    tokenizer = with_eos(pad="<|im_end|>")
    subject = subject_of(tokenizer=tokenizer, rows=mixed_conversations())
    batch = batch_of(subject, mask=END)
    if by_attention:
        batch["attention_mask"] = (batch["input_ids"] != END).long()
    finding = check(pad_finding, tokenizer=tokenizer, rows=subject.rows, batch=batch)
    assert (finding.verdict, finding.values["rows_with_masked_end"]) == ("stop", 4)
    assert "leave out `data_collator`" in finding.fix and "set a `pad_token` that ends nothing" in finding.fix


def test_pad_that_a_collator_masks_by_id_in_a_batch_of_other_size_stops():
    tokenizer = with_eos(pad="<|im_end|>")
    batch = batch_of(subject_of(tokenizer=tokenizer, rows=conversations(3)), mask=END)
    finding = check(pad_finding, tokenizer=tokenizer, batch=batch)
    assert (finding.verdict, finding.values["rows_with_masked_end"]) == ("stop", 3)


def test_pad_of_rows_that_lose_their_end_to_the_length_is_fine():
    tokenizer = with_eos(pad="<|im_end|>")
    rows = [{"prompt": "!?", "completion": "!?" * size} for size in (4, 20, 30)]
    subject = subject_of(tokenizer=tokenizer, rows=rows, options={"max_length": 20})
    batch = batch_of(subject)
    assert torch.equal(batch["attention_mask"].sum(dim=1), torch.tensor([11, 20, 20]))
    finding = check(pad_finding, tokenizer=tokenizer, rows=rows, options={"max_length": 20}, batch=batch)
    assert finding.verdict == "fine"


def test_pad_that_rows_of_ids_mask_as_the_end_stops_and_names_labels():
    tokenizer = with_eos(pad="<|im_end|>")
    rows = [{"input_ids": [5, 6, 7, END, END], "labels": [-100, 6, 7, -100, -100]} for _ in range(3)]
    finding = check(pad_finding, tokenizer=tokenizer, rows=rows)
    assert (finding.verdict, finding.values["rows_with_masked_end"]) == ("stop", 3)
    rows = [{"input_ids": [5, 6, 7, END, END], "labels": [-100, 6, 7, END, -100]} for _ in range(3)]
    assert check(pad_finding, tokenizer=tokenizer, rows=rows).verdict == "fine"
    assert "in `labels` keep the first `<|im_end|>` (2)" in finding.fix


@pytest.mark.parametrize(
    ("pad", "rows", "count"),
    [
        ("<|im_end|>", [[5, 6, 7, END, END], [5, 6, 7, END]], 1),
        ("<|im_end|>", [[5, 6, 7, END], [5, 6, END]], 0),
        ("<|endoftext|>", [[5, 6, 7, END, PAD], [5, 6, END, PAD, PAD]], 2),
        ("<|endoftext|>", [[5, 6, 7, END], [5, PAD, END]], 0),
    ],
)
def test_pad_that_is_trained_at_the_end_of_rows_stops(pad, rows, count):
    finding = check(pad_finding, tokenizer=with_eos(pad=pad), rows=ids_of(*rows))
    assert (finding.verdict, finding.values["rows_with_trained_padding"]) == ("stop" if count else "fine", count)
    assert ("Set these `labels` to -100" in finding.fix) is bool(count)

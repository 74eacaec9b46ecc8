import pytest
from datasets import Dataset
from tokenizers import decoders

from tests.checks.subjects import conversations, llama_tokenizer, pairs, subject_of
from tests.checks.test_rows import sized
from tests.checks.test_text import OTHER_TEXT
from tests.tiny import make_model, make_tokenizer
from trl_kd.checks.alignment import alignment_findings
from trl_kd.checks.rows import prepare
from trl_kd.data import DualCollator
from trl_kd.teachers import LocalTeacher
from trl_kd.trainer.dskd_config import DSKDConfig
from trl_kd.trainer.dual_text import choose_alignment, dual_text


def named(name, *args, **kwargs):
    subject = subject_of(*args, **kwargs)
    return {finding.name: finding for finding in alignment_findings(subject, prepare(subject))}[name]


def of_trainer(subject):
    """Coverage and alignment as the trainer finds them."""
    args, data = subject.args, Dataset.from_list(subject.rows)
    size, eos = subject.teacher_rows, subject.teacher_tokenizer.eos_token_id
    teacher = LocalTeacher(make_model("llama", size, eos_token_id=eos))
    sides = (subject.tokenizer, teacher, subject.teacher_tokenizer, subject.eos_token_ids)
    prepare_rows, collator = dual_text(args, *sides, None, data)
    dataset = prepare_rows(data, "train")
    return collator.coverage(dataset), choose_alignment(args, dataset, collator)


@pytest.mark.parametrize("data", ["pairs", "conversations", "prompts", "ids"])
def test_alignment_coverage_is_the_trainers(data):
    texts = [f"The {word} said hello to the quartz ships number {n}" for n, word in enumerate(("fox", "bird", "sky"))]
    rows = {
        "pairs": [{"prompt": "Why?", "completion": text} for text in texts],
        "conversations": conversations(3),
        "prompts": [{"prompt": text} for text in texts],
        "ids": [{"input_ids": ids, "labels": ids} for ids in (make_tokenizer()(text)["input_ids"] for text in texts)],
    }[data]
    subject = subject_of("dskd", teacher_tokenizer=make_tokenizer(OTHER_TEXT, 330), rows=rows)
    share, chosen = of_trainer(subject)
    [_, finding] = alignment_findings(subject, prepare(subject))
    assert finding.values["coverage"] == share and 0.3 < share < 1
    assert (finding.values["chosen"], finding.verdict, finding.values["min_coverage"]) == (chosen, "fine", 0.3)


def test_alignment_low_coverage_is_careful_and_says_what_is_chosen():
    run = {"teacher_tokenizer": make_tokenizer(OTHER_TEXT, 330), "rows": pairs()}
    subject = subject_of("dskd", **run, options={"min_coverage": 0.99})
    [_, finding] = alignment_findings(subject, prepare(subject))
    assert (finding.verdict, finding.values["chosen"]) == ("careful", "cma")
    assert of_trainer(subject)[1] == "cma" and "`alignment='eta'`" in finding.fix
    subject = subject_of("dskd", **run, options={"min_coverage": 0.99, "alignment": "eta"})
    [_, finding] = alignment_findings(subject, prepare(subject))
    assert (finding.verdict, finding.values["chosen"]) == ("careful", "eta")
    assert of_trainer(subject)[1] == "eta" and finding.fix.startswith("Set `alignment='auto'`")


def test_alignment_that_was_asked_for_is_fine():
    run = {"teacher_tokenizer": make_tokenizer(OTHER_TEXT, 330), "rows": pairs()}
    for options, chosen in (({"alignment": "cma", "min_coverage": 0.99}, "cma"), ({"objective": "uld"}, "index")):
        finding = named("alignment", "dskd", **run, options=options)
        assert (finding.verdict, finding.values["chosen"]) == ("fine", chosen)


def test_alignment_without_a_partner_stops_where_it_is_needed(monkeypatch):
    monkeypatch.setattr(DualCollator, "coverage", lambda self, rows: 0.0)
    run = {"teacher_tokenizer": llama_tokenizer(), "rows": pairs()}
    finding = named("alignment", "dskd", **run, options={"alignment": "eta"})
    assert finding.verdict == "stop" and "`alignment='cma'`" in finding.fix
    finding = named("alignment", "dskd", **run)
    assert (finding.verdict, finding.values["chosen"]) == ("careful", "cma")


@pytest.mark.parametrize("method", ["amm", "sparse-td", "dskd"])
def test_alignment_is_no_matter_for_one_vocabulary(method):
    subject = subject_of(method)
    assert alignment_findings(subject, prepare(subject)) == []


def test_min_coverage_of_the_page_is_the_configs():
    assert DSKDConfig("unused").min_coverage == 0.3


def test_room_of_the_teacher_who_reads_its_own_tokens_counts_those():
    run = {"method": "dskd", "teacher_tokenizer": llama_tokenizer(), "rows": sized(*[41] * 3, *[21] * 7)}
    finding = named("the teacher's context", **run, teacher_context=30)
    assert finding.verdict == "stop"
    assert (finding.values["lost_rows"], finding.values["lost_share"]) == (3, 0.3)
    assert "Lower `max_length`" in finding.fix
    finding = named("the teacher's context", **run, teacher_context=100, options={"teacher_max_length": 30})
    assert finding.values["lost_rows"] == 3 and finding.fix == "Raise `teacher_max_length` (now 30)."
    assert named("the teacher's context", **run, teacher_context=50).verdict == "fine"


def test_own_prompt_of_the_teacher_in_its_own_tokens_counts_too():
    data = [row | {"teacher_prompt": "!?" * 20} for row in sized(13, 13, prompt=2)]
    run = {"method": "dskd", "rows": data, "teacher_tokenizer": llama_tokenizer()}
    assert named("the teacher's context", **run, teacher_context=60).verdict == "fine"
    assert named("the teacher's context", **run, teacher_context=45).values["lost_rows"] == 2


def test_alignment_with_a_tokenizer_that_has_no_known_bytes_stops():
    teacher = llama_tokenizer()
    teacher.backend_tokenizer.decoder = decoders.CTC()
    finding = named("alignment", "dskd", teacher_tokenizer=teacher, rows=pairs())
    assert finding.verdict == "stop" and "decoder" in finding.text
    assert finding.fix.startswith("Do as the message says")


def test_alignment_counts_no_rows_that_are_dropped():
    rows = [*pairs(3), {"prompt": "Why?", "completion": " "}]
    subject = subject_of("dskd", teacher_tokenizer=make_tokenizer(OTHER_TEXT, 330), rows=rows)
    [_, finding] = alignment_findings(subject, prepare(subject))
    assert (finding.values["coverage"], finding.values["rows"]) == (of_trainer(subject)[0], 3)

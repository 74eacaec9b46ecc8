"""Heads padded to different sizes over one tokenizer are cut to what they share; other tokenizers are refused."""

import copy
import logging

import pytest
import torch
from transformers.utils import logging as transformers_logging

from tests.tiny import make_model, make_tokenizer
from tests.trainer.runs import logged, tiny_dataset
from tests.trainer.test_teacher_sources import METHODS, assert_same, make, step


SMALL, LARGE = 351, 384


@pytest.fixture(scope="module")
def small_tokenizer():
    tokenizer = make_tokenizer(vocab_size=SMALL)
    assert len(tokenizer) == SMALL and max(tokenizer.get_vocab().values()) == SMALL - 1
    return tokenizer


def models(tokenizer, student_rows, teacher_rows, folder):
    """A student and a saved teacher, whose padding rows are as loud as any other."""
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "tied": False}
    student = make_model("llama", student_rows, hidden_size=32, seed=1, **ids)
    teacher = make_model("llama", teacher_rows, hidden_size=48, seed=2, **ids)
    return student, save(teacher, tokenizer, folder)


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def cut(model, rows):
    """The model with a head of fewer rows, made by hand."""
    model = copy.deepcopy(model)
    head = torch.nn.Linear(model.config.hidden_size, rows, bias=False)
    head.weight.data.copy_(model.lm_head.weight[:rows])
    model.lm_head, model.config.vocab_size, model.vocab_size = head, rows, rows
    model.model.embed_tokens = torch.nn.Embedding.from_pretrained(model.model.embed_tokens.weight[:rows], freeze=False)
    return model


@METHODS
def test_padded_teacher_gives_the_loss_of_a_cut_one(method, small_tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    student, path = models(small_tokenizer, SMALL, LARGE, tmp_path / "teacher")
    found = step(method, tmp_path, copy.deepcopy(student), path, tokenizer=small_tokenizer, max_steps=2)
    teacher = cut(AutoModelForCausalLM.from_pretrained(path), SMALL)
    expected = step(method, tmp_path, student, teacher, tokenizer=small_tokenizer, max_steps=2)
    assert_same(found, expected)
    assert found[2].vocab_size == SMALL and found[2].teacher.vocab_size == LARGE


@METHODS
def test_padded_student_gives_the_loss_of_a_cut_one_and_keeps_its_padding(method, small_tokenizer, tmp_path):
    student, path = models(small_tokenizer, LARGE, SMALL, tmp_path / "teacher")
    before = student.lm_head.weight.detach().clone()
    expected = step(method, tmp_path, cut(student, SMALL), path, tokenizer=small_tokenizer, lmbda=0.0)
    found = step(method, tmp_path, student, path, tokenizer=small_tokenizer, lmbda=0.0)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    gradient, theirs = (run[1][0]["lm_head.weight"] for run in (found, expected))
    assert not gradient[SMALL:].any()
    torch.testing.assert_close(gradient[:SMALL], theirs)
    after = found[2].model.lm_head.weight
    assert torch.equal(after[SMALL:], before[SMALL:]) and not torch.equal(after[:SMALL], before[:SMALL])


def test_no_token_beyond_the_shared_rows_is_ever_written(small_tokenizer, tmp_path):
    """Both models want nothing but their padding rows; neither may."""
    student, path = models(small_tokenizer, LARGE, LARGE + 1, tmp_path / "teacher")
    with torch.no_grad():
        student.lm_head.weight[SMALL:] *= 50
    options = {"off_policy_source": "teacher", "lmbda": 0.5, "max_completion_length": 12}
    trainer = make("amm", tmp_path, student, path, tokenizer=small_tokenizer, **options)
    assert trainer.vocab_size == LARGE
    prompts = [[5, 6, 7], [8, 9]] * 8
    assert max(max(ids) for ids in trainer.write_with_teacher(prompts, 0)) < LARGE


def test_cut_is_said_in_one_line(small_tokenizer, tmp_path, caplog):
    student, path = models(small_tokenizer, SMALL, LARGE, tmp_path / "teacher")
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_info()
    try:
        with caplog.at_level(logging.INFO):
            make("amm", tmp_path, student, path, tokenizer=small_tokenizer)
    finally:
        transformers_logging.set_verbosity(verbosity)
    lines = [record.getMessage() for record in caplog.records if "are cut to" in record.getMessage()]
    assert lines == ["Heads of 351 (student) and 384 (teacher) rows are cut to the 351 that they share."]


def test_tokens_that_would_be_lost_are_refused(tmp_path):
    tokenizer = make_tokenizer(vocab_size=LARGE)
    student, path = models(tokenizer, LARGE, SMALL, tmp_path / "teacher")
    with pytest.raises(ValueError, match="The tokenizer has ids up to 383, but the smaller head has 351 rows"):
        make("amm", tmp_path, student, path, tokenizer=tokenizer)


@pytest.mark.parametrize("method", ["amm", "td"])
def test_other_tokenizer_is_refused_and_dskd_is_named(method, small_tokenizer, tmp_path):
    other = make_tokenizer("Die Sonne scheint auf den Wald und der Hund ruht am warmen Haus. " * 3, vocab_size=SMALL)
    student, path = models(small_tokenizer, len(small_tokenizer), len(other), tmp_path / "teacher")
    save(make_model("llama", len(other), hidden_size=48, seed=2, eos_token_id=2, pad_token_id=0), other, path)
    with pytest.raises(ValueError, match="The vocabularies differ: .* or DSKDTrainer with `alignment='auto'`"):
        make(method, tmp_path, student, path, tokenizer=small_tokenizer)
    trainer = make("dskd", tmp_path, student, path, tiny_dataset(), small_tokenizer)
    trainer.train()
    assert trainer.is_dual and logged(trainer, "kd/off_policy/tokens")[0] > 0


def test_token_that_no_model_has_a_row_for_is_no_reason_to_refuse(tmp_path, caplog):
    """Gemma 3's text models have no row for the image token of their tokenizer, the last of its ids."""
    tokenizer = make_tokenizer(vocab_size=SMALL)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tokenizer.get_vocab()["<image>"] == SMALL
    student, path = models(tokenizer, SMALL, SMALL, tmp_path / "teacher")
    trainer = make("amm", tmp_path, student, path, tokenizer=tokenizer)
    assert trainer.vocab_size == SMALL
    assert "The student has no row for '<image>', which its tokenizer adds" in caplog.text
    # A student that has the row would lose it to such a teacher
    student, _ = models(tokenizer, LARGE, SMALL, tmp_path / "other")
    with pytest.raises(ValueError, match="but the smaller head has 351 rows, so '<image>' could never be learned"):
        make("amm", tmp_path, student, path, tokenizer=tokenizer)


def test_word_that_the_student_has_no_row_for_is_refused(small_tokenizer, tmp_path):
    student, path = models(small_tokenizer, SMALL - 1, LARGE, tmp_path / "teacher")
    with pytest.raises(ValueError, match="The tokenizer has ids up to 350, but the smaller head has 350 rows"):
        make("amm", tmp_path, student, path, tokenizer=small_tokenizer)

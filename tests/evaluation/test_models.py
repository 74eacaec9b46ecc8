"""Models as an evaluation opens them, the digests that know them again, and how they read texts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.evaluation.runs import changed_copy, other_vocabulary, save
from tests.tiny import IM_END, make_model
from trl_kd.evaluation import EvalModel, EvalRow
from trl_kd.evaluation.models import Reader, weight_bytes, weights_digest


def nudge(model):
    model.lm_head.weight[7, 3] += 1e-3


def add_adapter(base: str, folder, value: float = 0.5) -> str:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
            elif "lora_B" in name:
                parameter.fill_(value)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, student_path):
    return add_adapter(student_path, tmp_path_factory.mktemp("adapter"))


def entry(path, **kwargs):
    return EvalModel("m", path, **kwargs).entry()


# Entries and digests


def test_entry_of_a_folder_says_what_lies_there(student_path, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(student_path)
    found = entry(student_path, role="before")
    assert (found.name, found.role, found.source) == ("m", "before", student_path)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    # float32, and a header of a few kB
    assert 0 < found.size_on_disk - 4 * found.parameters < 10_000
    assert found.weights == weights_digest(student_path) and len(found.weights) == 64


def test_entry_loads_no_weights(student_path, adapter, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    for path in (student_path, adapter):
        assert entry(path).parameters > 0


def test_entry_of_another_tokenizer_has_another_digest(student_path, teacher_path, tmp_path):
    other = entry(other_vocabulary(tmp_path / "other"))
    assert entry(student_path).tokenizer == entry(teacher_path).tokenizer != other.tokenizer


def test_digest_changes_with_weights_and_configuration_and_not_with_the_place(student_path, tmp_path):
    digest = weights_digest(student_path)
    assert weights_digest(changed_copy(student_path, tmp_path / "nudged", nudge)) != digest
    shutil.copytree(student_path, tmp_path / "moved")
    assert weights_digest(str(tmp_path / "moved")) == digest
    (tmp_path / "moved" / "README.md").write_text("A model.")
    (tmp_path / "moved" / "trainer_state.json").write_text("{}")
    assert weights_digest(str(tmp_path / "moved")) == digest
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    (tmp_path / "moved" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert weights_digest(str(tmp_path / "moved")) != digest


def test_digest_of_a_model_that_is_not_here_is_unknown():
    assert weights_digest("nobody/no-such-model") == "unknown"
    assert weight_bytes("nobody/no-such-model") is None


def test_digest_of_an_adapter_changes_with_its_weights_its_settings_and_its_base(student_path, adapter, tmp_path):
    digest = weights_digest(adapter)
    assert digest != weights_digest(student_path)
    assert weights_digest(add_adapter(student_path, tmp_path / "again")) == digest
    assert weights_digest(add_adapter(student_path, tmp_path / "other", value=0.25)) != digest

    copy = tmp_path / "copy"
    shutil.copytree(adapter, copy)
    settings = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 1}))
    assert weights_digest(str(copy)) != digest

    base = changed_copy(student_path, tmp_path / "base", nudge)
    on_other = add_adapter(base, tmp_path / "on_other")
    before = weights_digest(on_other)
    changed_copy(base, tmp_path / "base2", nudge)
    shutil.copy(tmp_path / "base2" / "model.safetensors", tmp_path / "base" / "model.safetensors")
    assert weights_digest(on_other) != before


def test_entry_of_an_adapter_counts_its_base(student_path, adapter):
    base, found = entry(student_path), entry(adapter)
    assert found.parameters == base.parameters and found.tokenizer == base.tokenizer
    own = sum(file.stat().st_size for file in Path(adapter).glob("*.safetensors"))
    assert own > 0
    assert found.size_on_disk == base.size_on_disk + own


# Loading


@torch.no_grad()
def logits(model, ids=(5, 6, 7)):
    return model(torch.tensor([ids])).logits


def test_load_is_in_eval_mode_and_in_the_dtype_that_is_asked_for(student_path):
    model = EvalModel("m", student_path).load()
    assert not model.training and model.dtype == torch.float32
    assert EvalModel("m", student_path, init_kwargs={"dtype": torch.float64}).load().dtype == torch.float64


def test_load_default_dtype_is_that_of_the_files(student_path, tmp_path, tokenizer):
    save(tmp_path, AutoModelForCausalLM.from_pretrained(student_path, dtype=torch.bfloat16), tokenizer)
    assert EvalModel("m", str(tmp_path)).load().dtype == torch.bfloat16


def test_load_adapter_adds_it_to_its_base(student_path, adapter):
    base = AutoModelForCausalLM.from_pretrained(student_path)
    expected = logits(PeftModel.from_pretrained(base, adapter).merge_and_unload().eval())
    found = logits(EvalModel("m", adapter).load())
    # float32, merged or beside
    assert torch.allclose(found, expected, atol=1e-4)
    assert (found - logits(EvalModel("m", student_path).load())).abs().max() > 0.1


def test_adapter_without_a_tokenizer_reads_by_that_of_its_base(adapter, tokenizer):
    assert not any("token" in file.name for file in Path(adapter).iterdir())
    assert EvalModel("m", adapter).tokenizer.get_vocab() == tokenizer.get_vocab()


def test_model_object_is_used_as_it_is(tokenizer):
    model = make_model("llama", len(tokenizer), seed=1)
    one = EvalModel("m", model, tokenizer=tokenizer)
    found = one.entry()
    assert one.load() is model and found.size_on_disk is None
    assert found.parameters == model.num_parameters()
    with torch.no_grad():
        nudge(model)
    changed = one.entry()
    assert changed.weights != found.weights and changed.tokenizer == found.tokenizer


def test_model_object_without_a_tokenizer_is_refused(tokenizer):
    with pytest.raises(ValueError, match="'m' is a model object without a tokenizer, so it cannot read prompts. Pass"):
        EvalModel("m", make_model("llama", len(tokenizer)))


def test_model_unknown_role_is_refused(student_path):
    with pytest.raises(ValueError, match="The role of 'm' is 'pupil', which is unknown. Use one of"):
        EvalModel("m", student_path, role="pupil")


@pytest.mark.parametrize("path", ["nobody/no-such-model", "/no/such/folder"])
def test_model_that_is_not_there_is_one_clear_error(path):
    with pytest.raises(ValueError, match=rf"'m' could not be loaded from `{path}`: (.|\n)*Give a folder with `config"):
        EvalModel("m", path)


def test_model_folder_without_weights_is_one_clear_error(student_path, tmp_path):
    shutil.copytree(student_path, tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    model = EvalModel("m", str(tmp_path / "bare"))
    with pytest.raises(ValueError, match="'m' could not be loaded from"):
        model.load()


# Reading and writing


@pytest.fixture(scope="module")
def reader(tokenizer):
    return Reader(None, tokenizer, chat=False)


def test_reader_prompt_of_text_is_tokenised_as_it_is(reader, tokenizer):
    assert reader.prompt(EvalRow(0, "The fox", ("x",))) == tokenizer("The fox").input_ids


def test_reader_prompt_as_messages_ends_where_the_answer_begins(tokenizer):
    turns = [{"role": "system", "content": "Help."}, {"role": "user", "content": "Who?"}]
    text = "<|im_start|>system\nHelp.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    expected = tokenizer(text).input_ids
    assert Reader(None, tokenizer, chat=False).prompt(EvalRow(0, turns, ())) == expected
    assert Reader(None, tokenizer, chat=True).prompt(EvalRow(0, turns, ())) == expected
    alone = tokenizer(text[text.index("<|im_start|>user") :]).input_ids
    assert Reader(None, tokenizer, chat=True).prompt(EvalRow(0, "Who?", ())) == alone


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("chat", [True, False])
def test_reader_answer_follows_the_prompt_and_has_an_end_if_it_ended(chat, ended, tokenizer):
    reader = Reader(None, tokenizer, chat=chat)
    row = EvalRow(0, "Who?", ())
    prompt, answer = reader.answer(row, " A fox.", ended)
    assert prompt == reader.prompt(row)
    assert answer == tokenizer(" A fox." if not ended else f" A fox.{IM_END}").input_ids


def test_reader_answer_that_is_empty_names_the_row(reader):
    with pytest.raises(ValueError, match="Row 7 cannot be evaluated: the completion or text is empty"):
        reader.answer(EvalRow(7, "Who?", ()), " ")


def test_reader_takes_text_and_messages_in_turn(tokenizer):
    reader = Reader(None, tokenizer, chat=False)
    turns = EvalRow(0, [{"role": "user", "content": "Who?"}], ())
    assert reader.prompt(turns) != reader.prompt(EvalRow(1, "Who?", ())) == tokenizer("Who?").input_ids
    assert reader.prompt(turns) == Reader(None, tokenizer, chat=True).prompt(EvalRow(1, "Who?", ()))


def test_reader_ends_are_those_of_model_and_tokenizer(tokenizer):
    assert Reader(None, tokenizer, chat=False).eos_token_ids == [tokenizer.eos_token_id]
    model = make_model("llama", len(tokenizer), eos_token_id=[9, tokenizer.eos_token_id, 5])
    assert Reader(model, tokenizer, chat=False).eos_token_ids == [tokenizer.eos_token_id, 5, 9]


def test_reader_without_a_pad_token_fills_with_eos(student_path):
    tokenizer = AutoTokenizer.from_pretrained(student_path)
    assert Reader(None, tokenizer, chat=False).pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    tokenizer.pad_token = None
    assert Reader(None, tokenizer, chat=False).pad_token_id == tokenizer.eos_token_id


def test_reader_tokenizer_without_an_end_is_refused(student_path):
    tokenizer = AutoTokenizer.from_pretrained(student_path)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="The tokenizer has no EOS token"):
        Reader(None, tokenizer, chat=False).prompt(EvalRow(0, "Who?", ()))


def test_reader_text_leaves_the_end_out(reader, tokenizer):
    prompt = tokenizer("The fox").input_ids
    ids = tokenizer(f" and the bird{IM_END}").input_ids
    assert ids[-1] == tokenizer.eos_token_id
    assert reader.text(prompt, ids) == " and the bird"


def test_reader_pieces_are_the_texts_of_the_tokens(reader, tokenizer):
    text = "The fox said: né — ok"
    ids = tokenizer(text + IM_END).input_ids
    pieces = reader.pieces(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text
    assert pieces[-1] == ""
    # é and the dash are of two and three tokens here, and are shown by the last of each
    place = pieces.index("é")
    assert pieces[place - 1] == ""
    assert pieces[pieces.index("—") - 2 : pieces.index("—")] == ["", ""]
    assert reader.pieces([]) == []


def test_reader_pieces_of_bytes_that_are_no_text_are_replaced(reader, tokenizer):
    first, *_, last = tokenizer("é").input_ids
    assert reader.pieces([last, first]) == ["\ufffd", ""]
    assert reader.pieces([first, *tokenizer("a").input_ids]) == ["", "\ufffda"]


def test_reader_pieces_of_a_slow_tokenizer_are_decoded_one_by_one():
    class Slow:
        is_fast, eos_token_id, pad_token_id = False, 2, 0

        def decode(self, ids):
            (token,) = ids
            return f"<{token}>"

    assert Reader(None, Slow(), chat=False).pieces([4, 2]) == ["<4>", "<2>"]

"""Each bad input gets one clear error, or a stated default, before any work is lost."""

import copy
import logging

import pytest
import torch
from datasets import Dataset

from tests.tiny import make_model, make_tokenizer
from tests.trainer.runs import config, logged, pair, same, tiny_dataset, weights
from trl_kd import AMMConfig, AMMTrainer


def build(tokenizer, tmp_path, data=None, models=None, **overrides):
    student, teacher = models or pair(tokenizer)
    return AMMTrainer(
        student, teacher, config(tmp_path, **overrides), data or tiny_dataset(), processing_class=tokenizer
    )


def test_different_vocabularies_name_dskd(tokenizer, tmp_path, student_path):
    other = make_tokenizer("Quite another text, from which other merges are learned: zebra, quartz, jigsaw.")
    teacher = make_model("llama", len(other), hidden_size=48)
    teacher.save_pretrained(tmp_path / "teacher")
    other.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="vocabularies differ: the student's tokenizer has") as error:
        AMMTrainer(student_path, str(tmp_path / "teacher"), config(tmp_path), tiny_dataset())
    assert "DSKDTrainer" in str(error.value)


def test_padded_teacher_head_is_cut_and_loss_unchanged(tokenizer, tmp_path):
    student, teacher = pair(tokenizer)
    plain = build(tokenizer, tmp_path, models=(copy.deepcopy(student), teacher), lmbda=0.0)
    plain.train()
    padded = copy.deepcopy(teacher)
    padded.resize_token_embeddings(len(tokenizer) + 24)
    with torch.no_grad():
        padded.get_output_embeddings().weight[len(tokenizer) :] = 50.0
    padded.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    cut = build(tokenizer, tmp_path, models=(student, str(tmp_path / "padded")), lmbda=0.0)
    assert cut.teacher.vocab_size == len(tokenizer) + 24 and cut.vocab_size == len(tokenizer)
    cut.train()
    assert logged(cut, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-6)
    # Padding rows are likelier than any token here; a teacher that wrote them would write unknown ids
    written = cut.write_with_teacher([[5, 6]] * 4, seed=0)
    assert max(token for ids in written for token in ids) < len(tokenizer)


def test_padded_student_head_never_writes_padding(tokenizer, tmp_path, teacher_path):
    student, _ = pair(tokenizer)
    student.resize_token_embeddings(len(tokenizer) + 64)
    with torch.no_grad():
        student.get_output_embeddings().weight[len(tokenizer) :] *= 50.0
    trainer = build(tokenizer, tmp_path, models=(student, teacher_path), lmbda=1.0)
    written = trainer.write_with_student([[5, 6, 7]] * 8, seed=0)
    assert max(token for ids in written for token in ids) < len(tokenizer)
    trainer.train()  # the teacher embeds what was written


def test_student_as_its_own_teacher_raises(tokenizer, tmp_path):
    student, _ = pair(tokenizer)
    with pytest.raises(ValueError, match="Student and teacher share modules.*copy.deepcopy"):
        build(tokenizer, tmp_path, models=(student, student))


def test_teacher_without_weights_raises(tokenizer, tmp_path):
    student, teacher = pair(tokenizer)
    with pytest.raises(ValueError, match=r"has no weights \(it is on the meta device\), so it knows nothing. Load"):
        build(tokenizer, tmp_path, models=(student, teacher.to("meta")))


def test_split_student_raises(tokenizer, tmp_path):
    student, teacher = pair(tokenizer)
    student.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(NotImplementedError, match="split over the devices 0, 1 by its device map"):
        build(tokenizer, tmp_path, models=(student, teacher))


def test_added_pad_token_is_named_as_the_cause(tokenizer, tmp_path, teacher_path):
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"pad_token": "[PAD]"})
    student, _ = pair(tokenizer)
    student.resize_token_embeddings(len(other))
    with pytest.raises(ValueError, match=r"Only the student has '\[PAD\]'.*set `pad_token` to one that both have"):
        build(other, tmp_path, models=(student, teacher_path))


def test_padded_student_head_is_cut_and_loss_unchanged(tokenizer, tmp_path, teacher_path):
    losses = []
    for padding in (0, 24):
        student, _ = pair(tokenizer)
        if padding:
            student.resize_token_embeddings(len(tokenizer) + padding)
            with torch.no_grad():
                student.get_output_embeddings().weight[len(tokenizer) :] = 50.0
        trainer = build(tokenizer, tmp_path, models=(student, teacher_path), lmbda=0.0, max_steps=1)
        trainer.train()
        losses.append(logged(trainer, "loss") + logged(trainer, "grad_norm"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_padded_teacher_without_a_tokenizer_raises(tokenizer, tmp_path):
    student, teacher = pair(tokenizer)
    teacher.resize_token_embeddings(len(tokenizer) + 24)
    with pytest.raises(ValueError, match="no tokenizer beside it"):
        build(tokenizer, tmp_path, models=(student, teacher))


def test_unreachable_teacher_raises_before_anything_else(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="teacher `.*nowhere` could not be loaded.*Give a folder"):
        AMMTrainer("also-nowhere", str(tmp_path / "nowhere"), config(tmp_path), tiny_dataset())


def test_no_teacher_raises(tokenizer, tmp_path, student_path):
    with pytest.raises(ValueError, match="no teacher: `teacher_model` is None"):
        AMMTrainer(student_path, args=config(tmp_path), train_dataset=tiny_dataset())


def test_teacher_of_wrong_type_raises(tokenizer, tmp_path, student_path):
    with pytest.raises(TypeError, match="`teacher_model` is a dict"):
        AMMTrainer(student_path, {"a": 1}, config(tmp_path), tiny_dataset())


def test_nan_in_teacher_logits_stops_before_the_step(tokenizer, tmp_path):
    for where in ("head", "backbone"):
        student, teacher = pair(tokenizer)
        module = teacher.get_output_embeddings() if where == "head" else teacher.model.layers[0].mlp.up_proj
        with torch.no_grad():
            module.weight[3, 3] = float("nan")
        trainer = build(tokenizer, tmp_path, models=(student, teacher), lmbda=0.0)
        before = weights(trainer.model)
        with pytest.raises(FloatingPointError, match="teacher's logits are not finite.*bfloat16 or float32"):
            trainer.train()
        assert same(weights(trainer.model), before)


def test_nan_in_student_stops_and_says_so(tokenizer, tmp_path):
    student, teacher = pair(tokenizer)
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(FloatingPointError, match="student's hidden states are not finite"):
        build(tokenizer, tmp_path, models=(student, teacher), lmbda=0.0).train()


def test_empty_completions_are_dropped_with_their_number(tokenizer, tmp_path, caplog):
    rows = list(tiny_dataset(8)) + [{"prompt": "What?", "completion": ""}, {"prompt": "Who?", "completion": "  "}]
    with caplog.at_level(logging.WARNING, logger="trl_kd"):
        trainer = build(tokenizer, tmp_path, Dataset.from_list(rows))
    assert len(trainer.train_dataset) == 8
    assert "2 of 10 rows of the train dataset are dropped: the completion or text is empty (2 rows)" in caplog.text


def test_prompt_longer_than_the_limit_is_dropped_with_its_number(tokenizer, tmp_path, caplog):
    rows = list(tiny_dataset(8)) + [{"prompt": "What is the fox? " * 40, "completion": " The sky"}]
    with caplog.at_level(logging.WARNING, logger="trl_kd"):
        trainer = build(tokenizer, tmp_path, Dataset.from_list(rows), max_length=64)
    assert len(trainer.train_dataset) == 8
    assert "leaves no room for a completion within `max_length` (1 rows)" in caplog.text


def test_all_rows_masked_raises(tokenizer, tmp_path):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, -100, -100], "prompt_length": 1}] * 4
    with pytest.raises(ValueError, match="4 of 4 rows of the train dataset had to be dropped: no token is trained"):
        build(tokenizer, tmp_path, Dataset.from_list(rows), lmbda=0.0)


def test_missing_pad_token_falls_back_to_eos(tokenizer, tmp_path):
    other = copy.deepcopy(tokenizer)
    other.pad_token = None
    trainer = build(other, tmp_path)
    assert trainer.processing_class.pad_token == other.eos_token
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    lengths = [len(trainer.train_dataset[i]["input_ids"]) for i in range(2)]
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths


def test_tokenizer_without_eos_raises(tokenizer, tmp_path):
    other = copy.deepcopy(tokenizer)
    other.eos_token = None
    with pytest.raises(ValueError, match="no EOS token.*Set `eos_token`"):
        build(other, tmp_path)


def test_model_in_memory_without_tokenizer_raises(tokenizer, tmp_path):
    student, teacher = pair(tokenizer)
    with pytest.raises(ValueError, match="`processing_class` is None.*Pass the tokenizer"):
        AMMTrainer(student, teacher, config(tmp_path), tiny_dataset())


def test_plain_text_with_rollouts_raises(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="plain text without prompts, but `lmbda` is 0.5.*nothing to continue"):
        build(tokenizer, tmp_path, Dataset.from_list([{"text": "The fox"}] * 4))


def test_prompts_alone_from_the_dataset_raises(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="prompts alone, but `off_policy_source` is 'dataset'.*50% of the rows"):
        build(tokenizer, tmp_path, Dataset.from_list([{"prompt": "The"}] * 4), off_policy_source="dataset")


def test_packing_prompts_alone_raises(tokenizer, tmp_path):
    data = Dataset.from_list([{"prompt": "The"}] * 4)
    with pytest.raises(ValueError, match="`packing` is True, but the train dataset has prompts alone"):
        build(tokenizer, tmp_path, data, packing=True, lmbda=0.0)


def test_compute_loss_func_raises(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="`compute_loss_func` is set, but the loss is the method's"):
        AMMTrainer(
            *pair(tokenizer), config(tmp_path), tiny_dataset(), processing_class=tokenizer, compute_loss_func=len
        )


def test_adapter_on_lm_head_raises(tokenizer, tmp_path):
    from peft import LoraConfig

    with pytest.raises(ValueError, match="lm_head"):
        AMMTrainer(
            *pair(tokenizer),
            config(tmp_path),
            tiny_dataset(),
            processing_class=tokenizer,
            peft_config=LoraConfig(target_modules=["lm_head", "q_proj"]),
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"critic": "perfect"},
            "`critic` is 'perfect', which does not exist. Choose one of 'exact', 'exact_penalised'",
        ),
        ({"gamma": 0.0}, r"`gamma` is 0.0, but it discounts later tokens. Set it in \(0, 1\]"),
        ({"gamma": 1.5}, "`gamma` is 1.5"),
        ({"lmbda": 1.5}, r"`lmbda` is 1.5, but it is a share of rows. Set it in \[0, 1\]"),
        ({"on_policy_weight": -0.1}, "`on_policy_weight` is -0.1"),
        ({"off_policy_source": "web"}, "`off_policy_source` is 'web', which does not exist"),
        ({"vllm_mode": "cloud"}, "`vllm_mode` is 'cloud', which does not exist. Choose one of 'colocate', 'server'"),
        ({"top_p": 0.0}, r"`top_p` is 0.0, but it is a probability mass. Set it in \(0, 1\]"),
        ({"temperature": -1.0}, "`temperature` is -1.0, but it is a sampling temperature. Set it non-negative"),
        ({"max_completion_length": 0}, "`max_completion_length` is 0"),
        ({"sft_loss_weight": -1.0}, "`sft_loss_weight` is -1.0"),
        ({"kl_loss_weight": -1.0}, "`kl_loss_weight` is -1.0"),
        ({"packing": True}, "`packing` is True with `lmbda` 0.5.*cannot be continued by a rollout"),
        ({"loss_chunk_size": 0}, "`loss_chunk_size` is 0, but it is a number of tokens"),
        ({"padding_free": True}, "`padding_free` is True, but this trainer does not use it. Use `packing`"),
        ({"loss_type": "dft"}, "`loss_type` is 'dft', but this trainer does not use it"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` is 0.1, but this trainer does not use it"),
        ({"router_aux_loss_coef": 0.1}, "`router_aux_loss_coef` is 0.1, but"),
        ({"completion_only_loss": False}, "`completion_only_loss` is False, but a prompt"),
        ({"fp16": True, "bf16": False}, "`fp16` is True, but a loss scaler.*Set `bf16=True`"),
    ],
)
def test_config_bad_value_raises(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        AMMConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_config_unknown_option_raises(tmp_path):
    with pytest.raises(TypeError, match="critics"):
        AMMConfig(output_dir=str(tmp_path), critics="exact")


def test_args_none_and_training_arguments_work(tokenizer, tmp_path, monkeypatch, student_path, teacher_path):
    from transformers import TrainingArguments

    monkeypatch.chdir(tmp_path)
    trainer = AMMTrainer(student_path, teacher_path, train_dataset=tiny_dataset())
    assert isinstance(trainer.args, AMMConfig) and trainer.args.output_dir.endswith("-AMM")
    plain = TrainingArguments(output_dir=str(tmp_path), max_steps=7, report_to=[], use_cpu=True)
    assert AMMTrainer(student_path, teacher_path, plain, tiny_dataset()).args.max_steps == 7

"""Every kind of data that the trainer takes, rollouts on each, and evaluation."""

import copy
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset

from tests.trainer.runs import config, logged, pair, tiny_dataset
from trl_kd import AMMTrainer


PROMPTS = [{"prompt": f"What is the {word}?"} for word in ("fox", "bird", "river", "sky")] * 4
MESSAGES = [
    {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": "The sky."}]}
    for row in PROMPTS
]


def build(tokenizer, tmp_path, rows, eval_dataset=None, **overrides):
    student, teacher = pair(tokenizer)
    data = Dataset.from_list(rows) if isinstance(rows, list) else rows
    return AMMTrainer(student, teacher, config(tmp_path, **overrides), data, eval_dataset, tokenizer)


def one_step(trainer, step=0):
    """The micro-batches of the first optimizer step, rollouts in place."""
    iterator = iter(trainer.get_train_dataloader())
    batches, count = trainer.get_batch_samples(iterator, 1, trainer.args.device)
    return batches[0], count


@pytest.mark.parametrize("rows", [PROMPTS, MESSAGES], ids=["prompt", "messages"])
def test_rollout_rows_continue_their_own_prompt(tokenizer, tmp_path, rows):
    trainer = build(tokenizer, tmp_path, rows, lmbda=0.5)
    batch, count = one_step(trainer)
    assert batch["is_on_policy"].sum() == 2
    for i in range(4):
        prompt_length = int(batch["prompt_length"][i])
        prompt = trainer.train_dataset[i]["input_ids"][: trainer.train_dataset[i]["prompt_length"]]
        assert batch["input_ids"][i, :prompt_length].tolist() == prompt
        trained = batch["labels"][i] != -100
        assert not trained[:prompt_length].any() and trained[prompt_length]
        assert torch.equal(batch["labels"][i][trained], batch["input_ids"][i][trained])
    assert count == (batch["labels"][:, 1:] != -100).sum() == batch["token_counts"].sum()


def test_prompts_alone_teacher_writes_what_the_student_does_not(tokenizer, tmp_path):
    trainer = build(tokenizer, tmp_path, PROMPTS, lmbda=0.5, temperature=0.0)
    batch, _ = one_step(trainer)
    for i in range(4):
        prompt = batch["input_ids"][i, : batch["prompt_length"][i]].tolist()
        write = trainer.write_with_student if batch["is_on_policy"][i] else trainer.write_with_teacher
        completion = batch["labels"][i][batch["labels"][i] != -100].tolist()
        assert completion == write([prompt], seed=0)[0]
    assert trainer.write_with_student([prompt], 0) != trainer.write_with_teacher([prompt], 0)


def test_teacher_as_source_replaces_dataset_completions(tokenizer, tmp_path):
    trainer = build(tokenizer, tmp_path, tiny_dataset(), lmbda=0.0, off_policy_source="teacher", temperature=0.0)
    batch, _ = one_step(trainer)
    prompt = batch["input_ids"][0, : batch["prompt_length"][0]].tolist()
    completion = batch["labels"][0][batch["labels"][0] != -100].tolist()
    assert completion == trainer.write_with_teacher([prompt], seed=0)[0]
    assert completion != [x for x in trainer.train_dataset[0]["labels"] if x != -100]


def test_stream_trains_like_the_dataset_it_streams(tokenizer, tmp_path):
    rows = list(tiny_dataset())
    whole = build(tokenizer, tmp_path, rows)
    student, teacher = pair(tokenizer)
    args = config(tmp_path)
    stream = AMMTrainer(
        student, teacher, args, IterableDataset.from_generator(lambda: iter(rows)), processing_class=tokenizer
    )
    for trainer in (whole, stream):
        trainer.train()
    # SFTTrainer changes this for a stream; the caller's own stays as it was
    assert stream.args.accelerator_config.dispatch_batches is False
    assert args.accelerator_config.dispatch_batches is None
    assert logged(stream, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-6)


def test_plain_text_trains_every_token_off_policy(tokenizer, tmp_path):
    rows = [{"text": "The fox is red."}, {"text": "The sky"}] * 4
    trainer = build(tokenizer, tmp_path, rows, lmbda=0.0)
    trainer.train()
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    assert lengths[0] != lengths[1]
    # All but the first of each row
    assert logged(trainer, "kd/off_policy/tokens")[0] == sum(lengths[:4]) - 4


def test_all_assistant_turns_are_trained_on_request(tokenizer, tmp_path):
    turns = [("user", "Hello"), ("assistant", "The fox"), ("user", "What?"), ("assistant", "The sky is blue.")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}] * 4
    counts = []
    for everything in (False, True):
        trainer = build(tokenizer, tmp_path, rows, lmbda=0.0, assistant_only_loss=everything)
        trainer.train()
        counts.append(logged(trainer, "kd/off_policy/tokens")[0])
    first_turn = len(tokenizer("The fox<|im_end|>")["input_ids"])
    assert counts[1] - counts[0] == 4 * first_turn


def test_packed_rows_give_the_gradient_of_unpacked_rows(tokenizer, tmp_path):
    rows = [{"prompt": f"{word}:", "completion": " is blue" * (1 + i % 3)} for i, word in enumerate("abcdefgh")]
    options = {"lmbda": 0.0, "max_steps": 1, "gamma": 0.9}
    flat = build(tokenizer, tmp_path, rows, per_device_train_batch_size=8, **options)
    packed = build(tokenizer, tmp_path, rows, per_device_train_batch_size=1, packing=True, max_length=256, **options)
    assert len(packed.train_dataset) == 1
    for trainer in (flat, packed):
        trainer.train()
    for name in ("loss", "grad_norm", "kd/off_policy/tokens"):
        assert logged(packed, name) == pytest.approx(logged(flat, name), rel=1e-5), name


def test_pad_equal_to_eos_gives_the_same_loss(tokenizer, tmp_path):
    import copy

    losses = []
    for pad_token in (tokenizer.pad_token, tokenizer.eos_token, None):
        other = copy.deepcopy(tokenizer)
        other.pad_token = pad_token
        student, teacher = pair(tokenizer)
        args = config(tmp_path, temperature=0.0)
        trainer = AMMTrainer(student, teacher, args, tiny_dataset(), processing_class=other)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    for loss in losses[1:]:
        assert loss == pytest.approx(losses[0], rel=1e-6)


def test_evaluation_is_total_variation_over_tokens_for_any_batch_size(tokenizer, tmp_path):
    held_out = tiny_dataset(10)
    results = []
    for batch_size in (1, 3, 10):
        trainer = build(
            tokenizer, tmp_path, tiny_dataset(), held_out, per_device_eval_batch_size=batch_size, eval_strategy="no"
        )
        results.append(trainer.evaluate()["eval_loss"])
        assert results[-1] == trainer.evaluate()["eval_loss"]
    assert results == pytest.approx([results[0]] * 3, rel=1e-6)
    total, count = 0.0, 0
    for row in trainer.eval_dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            p_s, p_t = (model(ids).logits[0].softmax(-1) for model in (trainer.model, trainer.teacher.model))
        for position in range(len(labels) - 1):
            if labels[position + 1] != -100:
                total, count = total + 0.5 * (p_t[position] - p_s[position]).abs().sum().item(), count + 1
    assert results[0] == pytest.approx(total / count, rel=1e-5)


def test_evaluation_of_fresh_and_several_datasets_has_their_prefix(tokenizer, tmp_path):
    sets = {"a": tiny_dataset(4), "b": tiny_dataset(6)}
    trainer = build(tokenizer, tmp_path, tiny_dataset(), sets)
    metrics = trainer.evaluate()
    assert metrics["eval_a_loss"] == metrics["eval_a_kd/off_policy/total_variation"]
    assert metrics["eval_a_loss"] != metrics["eval_b_loss"]
    fresh = trainer.evaluate(tiny_dataset(4), metric_key_prefix="test")
    assert fresh["test_loss"] == pytest.approx(metrics["eval_a_loss"], rel=1e-6)


def test_evaluation_of_prompts_alone_uses_the_teacher_s_completions_once(tokenizer, tmp_path):
    trainer = build(tokenizer, tmp_path, tiny_dataset(), Dataset.from_list(PROMPTS[:5]))
    assert all(any(label != -100 for label in row["labels"]) for row in trainer.eval_dataset)
    assert trainer.eval_dataset["prompt"] == [row["prompt"] for row in PROMPTS[:5]]
    first = trainer.evaluate()["eval_loss"]
    again = build(tokenizer, tmp_path, tiny_dataset(), Dataset.from_list(PROMPTS[:5]))
    assert again.evaluate()["eval_loss"] == first == trainer.evaluate()["eval_loss"]


def test_completions_are_logged_as_parquet_and_table(tokenizer, tmp_path, capsys):
    trainer = build(
        tokenizer,
        tmp_path,
        tiny_dataset(),
        log_completions=True,
        num_completions_to_print=1,
        generation_kwargs={"min_new_tokens": 6},
    )
    trainer.train()
    table = pd.read_parquet(tmp_path / "_completions" / "completions_00002.parquet")
    assert list(table.columns) == ["step", "prompt", "completion"]
    assert len(table) == 2 and (table["step"] == 2).all()
    assert table["prompt"].str.startswith("What is the").all()
    assert tokenizer(table["completion"][0])["input_ids"]
    assert "What is the" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_completions_go_to_the_tracker(tokenizer, tmp_path, monkeypatch, name):
    sent = []
    tracker = SimpleNamespace(Table=lambda dataframe: dataframe, log=sent.append)
    monkeypatch.setitem(sys.modules, name, tracker)
    trainer = build(tokenizer, tmp_path, tiny_dataset(), log_completions=True, max_steps=1)
    trainer.args.report_to = [name]  # afterwards: the Trainer's own callback wants the real one
    trainer.train()
    (table,) = (entry["completions"] for entry in sent)
    assert table.equals(pd.read_parquet(tmp_path / "_completions" / "completions_00001.parquet"))


def test_logged_values_are_token_means_of_the_logging_interval(tokenizer, tmp_path):
    every, whole = (
        build(tokenizer, tmp_path, tiny_dataset(), logging_steps=steps, per_device_train_batch_size=3, lmbda=0.0)
        for steps in (1, 2)
    )
    for trainer in (every, whole):
        trainer.train()
    tokens, moments = logged(every, "kd/off_policy/tokens"), logged(every, "kd/off_policy/moment")
    assert len(moments) == 2 and tokens[0] != tokens[1]
    mean = sum(count * value for count, value in zip(tokens, moments, strict=True)) / sum(tokens)
    assert logged(whole, "kd/off_policy/moment") == pytest.approx([mean], rel=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rollouts_use_the_cache_whatever_training_does(tokenizer, tmp_path, checkpointing):
    trainer = build(tokenizer, tmp_path, tiny_dataset(), gradient_checkpointing=checkpointing, lmbda=1.0, max_steps=1)
    lengths = []
    trainer.model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append((trainer.model.training, args[0].shape[1])), with_kwargs=True
    )
    trainer.train()
    written = [length for training, length in lengths if not training]
    # The prompts once, then one token at a time
    assert written[0] > 1 and len(written) > 2 and set(written[1:]) == {1}


def test_logged_distinct_2_and_length_describe_the_rollouts(tokenizer, tmp_path):
    trainer = build(tokenizer, tmp_path, tiny_dataset(), max_steps=1, generation_kwargs={"min_new_tokens": 6})
    trainer.train()
    written = trainer.rollouts.last_completions
    pairs = [tuple(ids[i : i + 2]) for ids in written for i in range(len(ids) - 1)]
    log = trainer.state.log_history[0]
    assert log["kd/on_policy/distinct_2"] == len(set(pairs)) / len(pairs)
    assert log["kd/on_policy/completion_length"] == 6 and log["kd/on_policy/tokens"] == 12


def test_compute_metrics_gets_the_student_s_logits(tokenizer, tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append((prediction.predictions, prediction.label_ids))
        return {"rows": len(prediction.label_ids)}

    student, teacher = pair(tokenizer)
    trainer = AMMTrainer(
        student,
        teacher,
        config(tmp_path, per_device_eval_batch_size=4),
        tiny_dataset(),
        tiny_dataset(4),
        tokenizer,
        compute_metrics=compute_metrics,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] == 4 and metrics["eval_loss"] > 0
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(4)])
    with torch.no_grad():
        logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(torch.from_numpy(seen[0][0]), logits)
    assert (seen[0][1] == batch["labels"].numpy()).all()


def test_teacher_ends_its_completions_its_own_way(tokenizer, tmp_path):
    """A base student and an instruct teacher over one tokenizer end texts with different tokens."""
    student, teacher = pair(tokenizer)
    student.generation_config.eos_token_id = tokenizer.pad_token_id
    teacher.generation_config.eos_token_id = [7, 8]
    other = copy.deepcopy(tokenizer)
    trainer = AMMTrainer(student, teacher, config(tmp_path), tiny_dataset(), processing_class=other)
    assert trainer.eos_token_ids == sorted({tokenizer.eos_token_id, tokenizer.pad_token_id, 7, 8})


def test_packed_evaluation_is_the_same_however_it_is_asked_for(tokenizer, tmp_path):
    held_out = {"train": tiny_dataset(6), "other": tiny_dataset(4)}
    options = {"lmbda": 0.0, "packing": True, "max_length": 128}
    trainer = build(tokenizer, tmp_path, tiny_dataset(), held_out, **options)
    first = trainer.evaluate()["eval_train_loss"]
    flat = build(tokenizer, tmp_path, tiny_dataset(), lmbda=0.0).evaluate(tiny_dataset(6))["eval_loss"]
    assert trainer.evaluate({"train": tiny_dataset(6)})["eval_train_loss"] == first
    assert trainer.evaluate(trainer.eval_dataset["train"])["eval_loss"] == first
    assert first == pytest.approx(flat, rel=1e-5)


def test_evaluation_set_named_train_is_for_evaluation(tokenizer, tmp_path):
    text = Dataset.from_list([{"text": "The fox is red."}] * 2)  # no rollouts could be made of it
    trainer = build(tokenizer, tmp_path, tiny_dataset(), {"train": text}, lmbda=0.5)
    assert trainer.evaluate()["eval_train_loss"] > 0


def test_predict_takes_raw_rows(tokenizer, tmp_path):
    trainer = build(tokenizer, tmp_path, tiny_dataset())
    expected = trainer.evaluate(tiny_dataset(4))["eval_loss"]
    metrics = trainer.predict(tiny_dataset(4)).metrics
    assert metrics["test_kd/off_policy/total_variation"] == pytest.approx(expected, rel=1e-6)
    assert metrics["test_loss"] == pytest.approx(expected, rel=1e-6)


def test_log_of_completions_without_any_writes_nothing(tokenizer, tmp_path):
    build(tokenizer, tmp_path, tiny_dataset(), lmbda=0.0, off_policy_source="teacher", log_completions=True).train()
    assert not (tmp_path / "_completions").exists()


@pytest.mark.parametrize("bf16", [False, True])
def test_bf16_multiplies_in_bfloat16_and_sums_in_float32(tokenizer, tmp_path, bf16):
    seen = {}

    class Watching(AMMTrainer):
        def token_loss(self, tokens):
            for name, (hidden, head) in tokens.pairs.items():
                seen[name] = head(hidden).dtype
            result = super().token_loss(tokens)
            seen["loss"] = result.loss.dtype
            return result

    student, teacher = pair(tokenizer)
    args = config(tmp_path, bf16=bf16, lmbda=0.0)
    trainer = Watching(student, teacher, args, tiny_dataset(), processing_class=tokenizer)
    attention = trainer.teacher.model.model.layers[0].self_attn.q_proj
    attention.register_forward_hook(lambda module, inputs, output: seen.update(inside_teacher=output.dtype))
    trainer.train()
    product = torch.bfloat16 if bf16 else torch.float32
    assert seen == {"student": product, "teacher": product, "inside_teacher": product, "loss": torch.float32}


@pytest.mark.parametrize("critic", ["exact", "value_head"])
def test_packed_row_that_is_prompt_alone_trains_without_rollouts(tokenizer, tmp_path, critic):
    student, teacher = pair(tokenizer)
    prompt = "What is the fox and the bird and the river and the sky and the grass"
    rows = Dataset.from_list([{"prompt": prompt, "completion": " The sky is blue"}] * 8)
    packing = {"packing": True, "packing_strategy": "wrapped", "max_length": 12, "per_device_train_batch_size": 1}
    args = config(tmp_path, lmbda=0.0, critic=critic, max_steps=3, **packing)
    trainer = AMMTrainer(student, teacher, args, rows, processing_class=tokenizer)
    trained = [any(label != -100 for label in row["labels"]) for row in trainer.train_dataset]
    assert trained[:2] == [False, True]  # the first step has no trained token
    assert trainer.rollouts is None
    trainer.train()
    assert [value > 0 for value in logged(trainer, "loss")] == trained[:3]

"""Runs of temporal-difference distillation: splits of a step, packed rows, resuming, and students of several kinds."""

import copy
import os

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from tests.trainer.runs import logged, pair, same, state_of, weights
from tests.trainer.sparse import (
    Recorder,
    assert_agrees,
    assert_same_gradients,
    entries_of,
    make_trainer,
    plain_step,
    recorded_run,
    sparse_config,
    sparse_pair,
    sparse_rows,
    target_before,
)
from trl_kd import SparseTDTrainer
from trl_kd.trainer.transitions import ActionSet


LM_ROWS = Dataset.from_list(
    [{"text": text} for text in ("The fox is red.", "A green bird", "apples", "blue sky", "a")]
)
SECOND = {"options": {"lm_dataset": LM_ROWS}}
# All that looks at other tokens, or keeps something: values of a slow copy, returns, cut texts, a second text
SQIL = {
    "objectives": {"sqil": 1.0, "expected_inverse_soft_q": 0.5},
    "returns": "n_step",
    "truncation": "bootstrap",
    "label_outside": "union",
    "gauge": "max",
    "q_min": -3.0,
    "target_ema": 0.5,
    "lm_weight": 0.3,
}
FORMS = {
    "expected": {},
    "paper": {"preset": "paper"},
    "paper_second": {"preset": "paper"} | SECOND,
    "released": {"preset": "released"},
    "sqil_second": SQIL | SECOND,
    "teacher_reward": {"objectives": {"teacher_reward": 1.0}, "returns": "lambda", "gauge": "logsoftmax"},
    "paths": {"objectives": {"path_consistency": 0.5}, "returns": "monte_carlo", "lm_weight": 0.4} | SECOND,
}


def assert_same_steps(run, expected, rel=1e-5):
    """Gradients, and what was logged, of all steps."""
    assert len(run.record) == len(expected.record) > 0
    for step, other in zip(run.record, expected.record, strict=True):
        gradients = {name: value.double() for name, value in other.gradients.items()}
        assert_same_gradients(step.gradients, gradients, rel)
    for entry, other in zip(entries_of(run), entries_of(expected), strict=True):
        assert entry.keys() == other.keys()
        for name in entry:
            if name.startswith("kd/") or name in ("loss", "grad_norm"):
                # Differences of Q-values of size 10
                assert entry[name] == pytest.approx(other[name], rel=rel, abs=1e-5), name


@pytest.mark.parametrize("form", FORMS)
def test_any_split_of_a_step_gives_the_same_gradients(tokenizer, tmp_path, form):
    runs = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        # Greedy, so that rollouts are the same; of one alone no path says anything
        options = {"lmbda": 0.75 if form == "paths" else 0.5, "temperature": 0.0} | sizes
        runs.append(recorded_run(tokenizer, tmp_path, **(options | FORMS[form])))
    assert form != "paths" or min(logged(runs[0], "kd/on_policy/path_consistency")) > 0.01
    assert min(logged(runs[0], "kd/on_policy/tokens") + logged(runs[0], "kd/off_policy/tokens")) > 0
    for run in runs[1:]:
        # Rounding is another, and grows from step to step
        assert_same_steps(run, runs[0], rel=5e-5)


@pytest.mark.parametrize("form", ["paper", "sqil_second", "teacher_reward"])
def test_padding_order_and_chunks_of_a_batch_do_not_matter(tokenizer, tmp_path, form):
    whole = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 1}

    def run(order=(0, 1, 2, 3), **overrides):
        rows = sparse_rows(4).select(list(order))
        return recorded_run(tokenizer, tmp_path, rows, **(whole | FORMS[form] | overrides))

    expected = run(loss_chunk_size=None)
    for other in (run(loss_chunk_size=1), run(loss_chunk_size=1000), run(pad_to_multiple_of=16), run((2, 0, 3, 1))):
        assert_same_steps(other, expected)


WIDE = {
    "sqil": SQIL,
    "chi2": {"chi2_alpha": 0.5, "chi2_center": "teacher", "label_outside": "union", "backup": "student"},
    "released": {"preset": "released"},
    "actor_critic": {"objectives": {"soft_actor_critic": 1.0}, "backup": "teacher", "truncation": "bootstrap"},
    "margin": {"objectives": {"large_margin": 1.0, "teacher_reward": 1.0}, "backup": "hard", "gauge": "max"},
}


@pytest.mark.parametrize("form", WIDE)
def test_columns_that_no_set_uses_change_nothing(tokenizer, tmp_path, monkeypatch, form):
    """On a GPU nobody waits to see how large the largest set is, and all columns stay."""
    narrow = recorded_run(tokenizer, tmp_path, max_steps=1, **WIDE[form])
    widths = []
    monkeypatch.setattr(ActionSet, "columns", lambda self, count: widths.append((count, self.ids.shape[1])) or self)
    wide = recorded_run(tokenizer, tmp_path, max_steps=1, **WIDE[form])
    assert len(widths) == 2 and all(count < 100 < width for count, width in widths)
    assert_same_steps(wide, narrow)


def test_evaluation_between_steps_changes_nothing(tokenizer, tmp_path):
    runs = []
    for overrides in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        options = {"options": {"lm_dataset": LM_ROWS}, "lmbda": 0.5, "max_steps": 3, "eval_rows": sparse_rows(3)}
        runs.append(make_trainer(tokenizer, tmp_path, trainer_class=Recorder, **(SQIL | options | overrides)))
        runs[-1].train()
    evaluated = logged(runs[1], "eval_loss")
    assert len(set(evaluated)) == 3
    assert_same_steps(runs[1], runs[0], rel=1e-7)


@pytest.mark.parametrize("form", ["expected", "paper", "sqil", "teacher_reward"])
def test_packed_rows_train_like_unpacked(tokenizer, tmp_path, form):
    # Rows that are cut already: packing takes longer ones
    prepared = make_trainer(tokenizer, tmp_path).train_dataset.select(range(8))
    rows = Dataset.from_list(
        [{name: row[name] for name in ("input_ids", "labels", "prompt_length")} for row in prepared]
    )
    runs = []
    for packing, size in ((True, 2), (False, 8)):
        overrides = {"packing": packing, "max_length": 52, "max_steps": 1, "per_device_train_batch_size": size}
        trainer = make_trainer(tokenizer, tmp_path, rows, **(overrides | FORMS.get(form, SQIL)))
        trainer.train()
        runs.append(trainer)
    assert len(runs[0].train_dataset) == 2
    (found, expected) = (entries_of(trainer)[0] for trainer in runs)
    assert found["kd/off_policy/tokens"] == expected["kd/off_policy/tokens"] > 30
    for name in expected.keys() - {"epoch"}:
        assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name


def test_turns_of_a_conversation_are_texts_of_their_own(tokenizer, tmp_path):
    def turns(question, *answers):
        asked = [{"role": "user", "content": question}, {"role": "assistant", "content": answers[0]}]
        return asked + (turns("Why?", *answers[1:]) if answers[1:] else [])

    rows = [{"messages": turns("What is the sky?", "The sky is blue", "green")}]
    rows += [{"messages": turns("Hello", "three", "The sky is green", "apples and pears")}]
    for overrides in (
        {"objectives": {"sqil": 1.0}, "returns": "monte_carlo", "truncation": "bootstrap", "action_top_p": 0.9},
        {"preset": "released", "label_outside": "union"},
    ):
        options = {"assistant_only_loss": True, "max_length": 60, "max_steps": 1} | overrides
        trainer = recorded_run(tokenizer, tmp_path, rows * 2, **options)
        step = assert_agrees(trainer, 0, sparse_pair()[1], **overrides)
        assert [state.is_end for state in step.states].count(True) == 2 * 2 + 2 * 2
        assert any(state.is_cut for state in step.states)


# Resuming


def resumable(tokenizer, folder, lora, rows=LM_ROWS, **overrides):
    """Sampled rollouts, dropout in the adapter, random order of both texts, a slow copy: everything that goes on."""
    settings = SQIL | {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "train_sampling_strategy": "random",
        "lmbda": 0.5,
        "lr_scheduler_type": "cosine",
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    options = {"lm_dataset": rows}
    if lora:
        options["peft_config"] = LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear")
    return make_trainer(tokenizer, folder, trainer_class=Recorder, options=options, **(settings | overrides))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_resume_after_half_equals_uninterrupted(tokenizer, tmp_path, lora):
    whole = resumable(tokenizer, tmp_path, lora)
    whole.train()
    resumed = resumable(tokenizer, tmp_path, lora)
    resumed.train(resume_from_checkpoint=os.path.join(tmp_path, "checkpoint-2"))
    names = [name for name in entries_of(whole)[-1] if name.startswith("kd/") or name in ("loss", "grad_norm")]
    assert {"kd/on_policy/sqil", "kd/off_policy/second_nll", "kd/on_policy/distinct_2"} <= set(names)
    for name in names:
        assert len(logged(whole, name)) == 4 and logged(resumed, name)[-2:] == logged(whole, name)[-2:], name
    for part, expected in zip(state_of(resumed), state_of(whole), strict=True):
        assert same(part, expected)
    assert same(resumed.target.average, whole.target.average)
    # A copy that starts anew, or stays, would show
    trained = {name: value for name, value in whole.model.named_parameters() if value.requires_grad}
    assert trained.keys() == whole.target.average.keys() and all(("lora_" in name) == lora for name in trained)
    start = resumable(tokenizer, tmp_path, lora).target.average
    for other in (start, trained):
        assert any((other[name] - value).abs().max() > 1e-3 for name, value in whole.target.average.items())
    # The rows of the second text go on too
    texts = [[ids.tolist() for ids, _, _ in step.second] for step in whole.record]
    assert [[ids.tolist() for ids, _, _ in step.second] for step in resumed.record] == texts[2:]


def test_resume_without_the_slow_copy_raises(tokenizer, tmp_path):
    resumable(tokenizer, tmp_path, False, max_steps=2, target_ema=None).train()
    other = resumable(tokenizer, tmp_path, False)
    with pytest.raises(
        ValueError, match="`target_ema` is set, but the checkpoint `.*checkpoint-2` has no `target.safe"
    ):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_slow_copy_is_the_average_of_the_steps(tokenizer, tmp_path):
    for decay in (0.0, 0.7, 1.0):
        trainer = recorded_run(tokenizer, tmp_path, max_steps=3, learning_rate=1e-2, **(SQIL | {"target_ema": decay}))
        record = [*trainer.record, trainer.record[0].__class__(student=weights(trainer.model))]
        how = trainer.record[0].__class__(target_ema=decay)
        for name, value in target_before(record, 3, how).items():
            if name in trainer.target.average:
                torch.testing.assert_close(trainer.target.average[name].double(), value, rtol=1e-5, atol=1e-6)


def test_slow_copy_drops_nothing_out_and_draws_nothing(tokenizer, tmp_path):
    lora = LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False)
    overrides = SQIL | {"label_outside": "skip", "lm_weight": 0.0}
    trainer = make_trainer(tokenizer, tmp_path, options={"peft_config": lora}, **overrides)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    model, selected = trainer.model.train(), trainer.select(batch)
    before, state = weights(model), torch.get_rng_state()
    first, second = (trainer.target.read(batch, selected, trainer.vocab_size)[0] for _ in range(2))
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), state)
    assert model.training and same(weights(model), before)
    # At the start it is the student, whose own forward has dropout
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        hidden = [model.train(on)(**inputs, output_hidden_states=True).hidden_states[-1] for on in (False, True)]
    torch.testing.assert_close(first, selected.of(hidden[0]))
    assert not torch.allclose(first, selected.of(hidden[1]), atol=0.1)


# Students and teachers


def test_same_seed_same_run(tokenizer, tmp_path):
    runs = [
        resumable(tokenizer, tmp_path / str(seed), False, seed=seed, max_steps=2, save_strategy="no")
        for seed in (7, 7, 8)
    ]
    for run in runs:
        run.train()
    assert logged(runs[0], "loss") == logged(runs[1], "loss")
    assert same(weights(runs[0].model), weights(runs[1].model))
    assert logged(runs[0], "loss") != logged(runs[2], "loss")


@pytest.mark.parametrize(
    ("overrides", "name", "share"),
    [
        ({"lmbda": 0.5, "temperature": 1.0}, "kd/off_policy/set_forward_kl", 0.3),
        ({"preset": "paper", "chi2_alpha": 10.0}, "kd/off_policy/forward_kl", 0.5),
        ({"objectives": {"soft_actor_critic": 1.0}, "tail_weight": 1.0}, "kd/off_policy/soft_actor_critic", 0.3),
        ({"objectives": {"teacher_reward": 1.0}, "gauge": "logsoftmax"}, "kd/off_policy/teacher_reward", 0.3),
    ],
    ids=["expected", "paper", "soft_actor_critic", "teacher_reward"],
)
def test_student_learns_far_past_noise(tokenizer, tmp_path, overrides, name, share):
    student, _ = pair(tokenizer)
    settings = {"max_steps": 60, "per_device_train_batch_size": 8, "max_grad_norm": 1.0, "learning_rate": 1e-2}
    models = {"models": (student, sparse_pair()[1])}
    trainer = make_trainer(tokenizer, tmp_path, **(settings | models | overrides))
    teacher = weights(trainer.teacher.model)
    trainer.train()
    values = logged(trainer, name)
    assert len(values) == 60 and sum(values[-5:]) < share * sum(values[:5])
    assert same(weights(trainer.teacher.model), teacher)


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
@pytest.mark.parametrize("form", ["expected", "sqil_second"])
def test_lora_student_has_the_loss_of_the_merged_one_and_changes_alone(tokenizer, tmp_path, form, modules_to_save):
    torch.manual_seed(5)
    student, teacher = sparse_pair()
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, modules_to_save=modules_to_save)
    adapted = get_peft_model(student, lora)
    if modules_to_save:
        head = adapted.get_output_embeddings()
        with torch.no_grad():
            head.weight.mul_(1.3)
    merged = copy.deepcopy(adapted).merge_and_unload().requires_grad_(True)
    overrides = {"max_steps": 3, "learning_rate": 1e-2} | FORMS[form]
    trainer = make_trainer(tokenizer, tmp_path, models=(adapted, teacher), **overrides)
    before = weights(trainer.model)
    trainer.train()
    plain = make_trainer(tokenizer, tmp_path, models=(merged, sparse_pair()[1]), **overrides)
    plain.train()
    for name in ("loss", "kd/off_policy/student_mass"):
        assert logged(trainer, name)[0] == pytest.approx(logged(plain, name)[0], rel=1e-5)
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in changed)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
@pytest.mark.parametrize("form", ["paper", "sqil_second"])
def test_students_of_other_families_agree_with_loops(tokenizer, tmp_path, kind, form):
    models = pair(tokenizer, kind)
    overrides = {key: value for key, value in FORMS[form].items() if key != "options"}
    overrides |= {"label_outside": "union", "q_min": -8.0}
    trainer = recorded_run(
        tokenizer, tmp_path, models=copy.deepcopy(models), options=FORMS[form].get("options"), **overrides
    )
    step = plain_step(trainer, 1, models[1], models[0], **overrides)
    assert entries_of(trainer)[1]["loss"] == pytest.approx(step.loss, rel=1e-5)
    assert_same_gradients(trainer.record[1].gradients, step.gradients)


@pytest.mark.parametrize(
    "overrides", [{}, {"preset": "released"}, SQIL, {"gauge": "logsoftmax", "chi2_alpha": 0.5}], ids=str
)
def test_padding_of_heads_is_cut_and_changes_nothing(tokenizer, tmp_path, overrides):
    runs = []
    for padded in ((), (0,), (1,)):
        models = sparse_pair()
        for i in padded:
            models[i].resize_token_embeddings(len(tokenizer) + 24)
            with torch.no_grad():
                models[i].get_output_embeddings().weight[len(tokenizer) :] = 50.0
        folder = str(tmp_path / f"teacher-{len(runs)}")
        models[1].save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        runs.append(recorded_run(tokenizer, tmp_path, models=(models[0], folder), max_steps=1, **overrides))
    plain, *others = runs
    for other in others:
        for name in ("loss", "grad_norm", "kd/off_policy/teacher_mass", "kd/set_size_max"):
            assert logged(other, name) == pytest.approx(logged(plain, name), rel=1e-5)
    assert not others[0].record[0].gradients["lm_head.weight"][len(tokenizer) :].any()


def test_gradient_checkpointing_gives_the_same_gradients(tokenizer, tmp_path):
    runs = [recorded_run(tokenizer, tmp_path, gradient_checkpointing=on, **(SQIL | SECOND)) for on in (False, True)]
    assert_same_steps(runs[1], runs[0])


@pytest.mark.parametrize("form", [form for form in FORMS if form != "paths"])  # the texts would be others
def test_bf16_stays_near_float32(tokenizer, tmp_path, form):
    runs = [recorded_run(tokenizer, tmp_path, bf16=on, max_steps=1, **FORMS[form]) for on in (False, True)]
    # 8 bits of a product are rounded to one part in 256; of the loss these are means and squares
    assert logged(runs[1], "loss") != logged(runs[0], "loss")
    assert logged(runs[1], "loss") == pytest.approx(logged(runs[0], "loss"), rel=0.03)
    found, expected = (
        torch.cat([run.record[0].gradients[name].flatten() for name in sorted(run.record[0].gradients)])
        for run in runs
    )
    assert torch.cosine_similarity(found, expected, dim=0) > 0.98


def test_caller_s_config_and_datasets_are_not_changed(tokenizer, tmp_path):
    args, rows, second = sparse_config(tmp_path, preset="paper"), sparse_rows(), LM_ROWS
    before, columns = str(args.to_dict()), (rows.column_names, second.column_names)
    trainer = SparseTDTrainer(*sparse_pair(), args, rows, processing_class=tokenizer, lm_dataset=second)
    trainer.train()
    assert str(args.to_dict()) == before and (rows.column_names, second.column_names) == columns


def test_model_card_tells_how_the_model_was_made(tokenizer, tmp_path):
    trainer = recorded_run(tokenizer, tmp_path, preset="paper", save_strategy="steps", save_steps=2)
    card = (tmp_path / "README.md").read_text()
    for text in ("2505.20335", "| `preset` | `paper` |", "| `gauge` | `max` |", "yu2026language", "soft Q-values"):
        assert text in card
    assert not any(f"`{name}`" in card for name in ("n_steps", "action_top_k", "td_lambda", "vllm_mode"))
    assert trainer.state.global_step == 2

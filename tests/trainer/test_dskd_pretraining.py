"""Projectors that learn before the student moves, and partners by context."""

import json

import pytest
import torch
import torch.nn.functional as F

from tests.trainer.dual import dual_pair, make_other_tokenizer, make_trainer, recorded_run, short_rows
from tests.trainer.runs import logged, same, state_of, weights
from trl_kd.modules import ResidualProjector, make_projector
from trl_kd.trainer.projector_pretraining import pretrain_projector


@pytest.fixture(scope="module")
def other():
    return make_other_tokenizer()


CONTEXT = {"preset": "context", "projector_hidden_size": 16, "aux_learning_rate": 1e-2}


def started(models, tokenizers, folder, **overrides):
    """A trainer whose projectors have their optimizer, before the first step."""
    trainer = make_trainer(models, tokenizers, folder, **(CONTEXT | overrides))
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    return trainer


def projector_of(trainer):
    return trainer.auxiliary.modules["teacher_to_student"]


def cross_entropy_on_data(trainer):
    """Of the projected teacher, on all rows, by the models' own logits."""
    head, nats = trainer.student_head(), []
    for batch in trainer.get_train_dataloader():
        selected = trainer.select(batch)
        states = trainer.read_teacher(batch, selected)[selected.pairs[1]]
        logits = projector_of(trainer)(states) @ head.weight.T
        nats.append(F.cross_entropy(logits, selected.labels[selected.pairs[0]], reduction="none"))
    return torch.cat(nats).mean().item()


def test_pretraining_moves_the_projector_alone_towards_the_text(tokenizer, other, tmp_path):
    trainer = started(dual_pair(tokenizer, other), (tokenizer, other), tmp_path, projector_pretraining_steps=60)
    student, teacher, before = weights(trainer.model), weights(trainer.teacher.model), weights(projector_of(trainer))
    nats, random_state = cross_entropy_on_data(trainer), torch.get_rng_state()
    pretrain_projector(trainer, 60)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert same(weights(trainer.model), student) and same(weights(trainer.teacher.model), teacher)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    after = weights(projector_of(trainer))
    assert not any(torch.equal(after[name], before[name]) for name in before)
    assert cross_entropy_on_data(trainer) < 0.5 * nats
    assert trainer.state.global_step == 0 and not trainer._sums["train"].pop()


def test_pretraining_step_is_adam_on_the_mean_cross_entropy(tokenizer, other, tmp_path):
    options = {"projector_hidden_size": 0, "aux_max_grad_norm": 0.0, "per_device_train_batch_size": 16}
    trainer = started(dual_pair(tokenizer, other), (tokenizer, other), tmp_path, **options)
    weight = projector_of(trainer).weight.detach().clone().requires_grad_()
    (batch,) = trainer.get_train_dataloader()  # one batch of all rows, in whatever order
    student, teacher = trainer.model.eval(), trainer.teacher.model
    nats = []
    for row in range(16):
        labels, partner = batch["labels"][row], batch["partner"][row]
        hidden = teacher.get_decoder()(
            input_ids=batch["teacher_input_ids"][row : row + 1],
            attention_mask=batch["teacher_attention_mask"][row : row + 1],
        ).last_hidden_state[0]
        for place in (partner >= 0).nonzero().flatten().tolist():
            logits = student.get_output_embeddings().weight @ (weight @ hidden[partner[place] - 1])
            nats.append(F.cross_entropy(logits[None], labels[place : place + 1]))
    torch.stack(nats).mean().backward()
    expected = torch.optim.AdamW([weight], lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0)
    expected.step()
    pretrain_projector(trainer, 1)
    torch.testing.assert_close(projector_of(trainer).weight.detach(), weight.detach(), rtol=0, atol=1e-5)


def test_schedule_of_the_projectors_spans_pretraining_and_training(tokenizer, other, tmp_path):
    options = CONTEXT | {"max_steps": 2, "projector_pretraining_steps": 6}
    trainer = make_trainer(dual_pair(tokenizer, other), (tokenizer, other), tmp_path, **options)
    trainer.train()
    # A cosine over 8 steps, of which 6 are over
    assert logged(trainer, "kd/aux_learning_rate") == pytest.approx([1e-2 * 0.146447, 1e-2 * 0.038060], rel=1e-4)
    assert trainer.auxiliary.optimizer.state_dict()["state"][0]["step"] == 8


@pytest.mark.parametrize("lmbda", [0.0, 0.5])
def test_pretraining_is_not_repeated_after_a_resume(tokenizer, other, tmp_path, lmbda):
    options = CONTEXT | {
        "max_steps": 4,
        "projector_pretraining_steps": 5,
        "lmbda": lmbda,
        "aux_lr_scheduler_type": None,
    }
    options |= {"save_strategy": "steps", "save_steps": 2}

    def make():
        return make_trainer(dual_pair(tokenizer, other), (tokenizer, other), tmp_path, **options)

    whole = make()
    whole.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(resumed, "loss") == logged(whole, "loss")
    for part, expected in zip(state_of(resumed), state_of(whole), strict=True):
        assert same(part, expected)


def test_run_without_pretraining_steps_starts_with_the_student(tokenizer, other, tmp_path):
    options = CONTEXT | {"max_steps": 1, "projector_pretraining_steps": 0}
    trainer = make_trainer(dual_pair(tokenizer, other), (tokenizer, other), tmp_path, **options)
    trainer.train()
    assert trainer.auxiliary.optimizer.state_dict()["state"][0]["step"] == 1


def test_pretraining_on_prompts_alone_raises(tokenizer, other, tmp_path):
    prompts = [{"prompt": "What is the fox"}] * 4
    with pytest.raises(ValueError, match="`projector_pretraining_steps` is 1000, but the dataset has prompts alone"):
        make_trainer(dual_pair(tokenizer, other), (tokenizer, other), tmp_path, prompts, preset="context")


def test_context_preset_compares_at_every_place_that_both_reach(tokenizer, other, tmp_path):
    """The student's space by loops in float64: tokens before which both have read the same text."""
    options = CONTEXT | {"projector_hidden_size": 0, "projector_pretraining_steps": 0, "kd_rate": 0.7}
    models = dual_pair(tokenizer, other)
    trainer = recorded_run(models, (tokenizer, other), tmp_path, **options)
    record, losses = trainer.record[0], []
    student, teacher = (model.double() for model in dual_pair(tokenizer, other))
    weight = record.modules["teacher_to_student.weight"].double()
    ce, reverse_kl, projector_ce = [], [], []
    for batch in record.batches:
        for row in range(len(batch["input_ids"])):
            sides = []
            for prefix, model, vocabulary in (("", student, tokenizer), ("teacher_", teacher, other)):
                length = int(batch[f"{prefix}attention_mask"][row].sum())
                ids, labels = (batch[f"{prefix}{name}"][row, :length] for name in ("input_ids", "labels"))
                places = [i for i in range(1, length) if labels[i] != -100]
                texts = [vocabulary.decode(ids[places[0] : place], skip_special_tokens=True) for place in places]
                hidden = model.get_decoder()(input_ids=ids[None]).last_hidden_state[0]
                sides.append((ids, places, texts, hidden))
            (ids, places, texts, hidden), (teacher_ids, teacher_places, teacher_texts, teacher_hidden) = sides
            head = student.get_output_embeddings().weight
            for place, text in zip(places, texts, strict=True):
                log_q = (head @ hidden[place - 1]).log_softmax(-1)
                ce.append(-log_q[ids[place]])
                if text not in teacher_texts:
                    continue
                partner = teacher_places[teacher_texts.index(text)]
                is_end = ids[place] == tokenizer.eos_token_id
                assert is_end == (teacher_ids[partner] == other.eos_token_id)
                log_p = (head @ (weight @ teacher_hidden[partner - 1])).log_softmax(-1)
                reverse_kl.append((log_q.exp() * (log_q - log_p)).sum())
                projector_ce.append(-log_p[ids[place]])
    assert len(reverse_kl) > 0.5 * len(ce)
    distilled = torch.stack(reverse_kl).mean() + torch.stack(projector_ce).mean()
    losses.append((0.3 * torch.stack(ce).mean() + 0.7 * distilled).item())
    assert logged(trainer, "loss")[:1] == pytest.approx(losses, rel=1e-5)


def test_labels_of_the_teacher_with_partners_by_context_raise(tokenizer, other, tmp_path):
    expected = "`eta_pairs` is 'context' with `projector_label` 'teacher_top1'"
    with pytest.raises(ValueError, match=expected):
        make_trainer(dual_pair(tokenizer, other), (tokenizer, other), tmp_path, eta_pairs="context", alignment="eta")


def test_residual_projector_starts_as_its_linear_map_and_adds_a_network():
    linear = make_projector(6, 4, True, seed=0)
    random_state = torch.get_rng_state()
    projector, states = (
        ResidualProjector(linear, 8, seed=1),
        torch.randn(5, 6, generator=torch.Generator().manual_seed(2)),
    )
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(projector(states), linear(states))
    with torch.no_grad():
        projector.outer.weight.copy_(torch.arange(32.0).reshape(4, 8) / 32)
    inner, outer = projector.inner, projector.outer
    for row, found in zip(states, projector(states), strict=True):
        normed = row / row.square().mean().add(torch.finfo(torch.float32).eps).sqrt()
        x = inner.weight @ normed + inner.bias
        bent = x * 0.5 * (1 + torch.erf(x / 2**0.5))
        torch.testing.assert_close(found, linear(row) + outer.weight @ bent, rtol=1e-5, atol=1e-5)
    assert outer.bias is None and not torch.equal(ResidualProjector(linear, 8, seed=2).inner.weight, inner.weight)


def test_card_names_what_the_preset_decided(tokenizer, other, tmp_path):
    options = CONTEXT | {"max_steps": 1, "projector_pretraining_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(dual_pair(tokenizer, other), (tokenizer, other), tmp_path, **options).train()
    card = (tmp_path / "README.md").read_text()
    for text in (
        "| `eta_pairs` | `context` |",
        "| `divergence` | `reverse_kl` |",
        "| `projector_pretraining_steps` | `2` |",
    ):
        assert text in card
    assert json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())["global_step"] == 1


@pytest.mark.parametrize("alignment", ["same", "cma"])
def test_partners_by_context_have_a_meaning_under_exact_alignment_only(tokenizer, other, tmp_path, alignment):
    teacher_tokenizer = tokenizer if alignment == "same" else other
    options = {"alignment": alignment, "eta_pairs": "context", "max_steps": 1}
    trainer = make_trainer(
        dual_pair(tokenizer, teacher_tokenizer), (tokenizer, teacher_tokenizer), tmp_path, **options
    )
    before = weights(projector_of(trainer))
    trainer.train()
    assert trainer.args.eta_pairs == "token"
    assert not same(weights(projector_of(trainer)), before)  # its labels are those of the teacher still


def test_teacher_of_few_positions_reads_no_further(tokenizer, other, tmp_path):
    """GPT-2's config has another name for them. Data and rollouts are cut on the teacher's side alone."""
    student, teacher = dual_pair(tokenizer, other, kinds=("llama", "gpt2"))
    long = [{"prompt": "What is the fox", "completion": " The sky is blue" * 300}] * 4
    options = {"max_length": None, "max_steps": 1, "lmbda": 0.5, "max_completion_length": 600}
    trainer = make_trainer((student, teacher), (tokenizer, other), tmp_path, long, alignment="eta", **options)
    row = trainer.train_dataset[0]
    assert len(row["teacher_input_ids"]) == 512 and len(row["input_ids"]) > 512
    completion = tokenizer(" The sky is blue" * 300)["input_ids"]
    completed = trainer.row_format.complete(row, completion, "student")
    assert len(completed["teacher_input_ids"]) == len(completed["teacher_labels"]) == 512
    assert completed["input_ids"][row["prompt_length"] :] == completion


def test_evaluation_maps_by_the_head_that_training_left(tokenizer, tmp_path):
    trainer = make_trainer(
        dual_pair(tokenizer), (tokenizer, tokenizer), tmp_path, eval_rows=short_rows(4), max_steps=1
    )
    before, _ = trainer.projection._recomputed(trainer.student_head())
    trainer.train()
    trainer.evaluate()
    expected, _ = trainer.projection._recomputed(trainer.student_head())
    assert not torch.equal(expected, before)
    assert torch.equal(trainer.projection._map[0], expected)


def test_teacher_ends_and_fills_its_texts_with_its_own_tokens(tokenizer, other, tmp_path):
    trainer = make_trainer(dual_pair(tokenizer, other), (tokenizer, other), tmp_path, alignment="eta")
    asked = []
    trainer.teacher.generate = lambda *arguments: asked.append(arguments)
    trainer.write_with_teacher([[5, 6]], 7)
    # Which has no pad token
    assert asked == [([[5, 6]], trainer.sampling, other.eos_token_id, [other.eos_token_id], 7)]
    assert other.eos_token_id != tokenizer.eos_token_id


def test_teachers_prompt_that_fills_its_length_is_dropped(tokenizer, other, tmp_path):
    rows = [{"prompt": "What is the fox", "completion": " green"}] * 4
    length = len(other("What is the fox")["input_ids"])
    with pytest.raises(ValueError, match="the prompt leaves no room for a completion within the teacher's"):
        make_trainer(dual_pair(tokenizer, other), (tokenizer, other), tmp_path, rows, teacher_max_length=length)
    options = {"alignment": "eta", "teacher_max_length": length + 1}
    trainer = make_trainer(dual_pair(tokenizer, other), (tokenizer, other), tmp_path, rows, **options)
    assert {len(row["teacher_input_ids"]) for row in trainer.train_dataset} == {length + 1}


def test_projectors_take_states_of_half_precision(tokenizer, tmp_path):
    trainer = make_trainer(dual_pair(tokenizer), (tokenizer, tokenizer), tmp_path)
    states = torch.randn(3, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    projected = trainer.projection.into_student(states)
    assert projected.dtype == torch.float32
    assert torch.equal(projected, trainer.projection.into_student(states.float()))


def test_projectors_and_attention_leave_the_random_state_alone(tokenizer, other, tmp_path):
    trainer = make_trainer(dual_pair(tokenizer, other), (tokenizer, other), tmp_path, alignment="cma", preset="v1")
    before = torch.get_rng_state()
    trainer.auxiliary_modules()
    assert torch.equal(torch.get_rng_state(), before)

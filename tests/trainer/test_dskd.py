"""The loss of dual-space distillation in training: against loops in float64, its identities, and that it teaches."""

import copy

import pytest
import torch
from datasets import Dataset

from tests.trainer.dual import (
    SOURCES,
    Recorder,
    assert_agrees,
    dual_pair,
    literal_partners,
    make_other_tokenizer,
    make_trainer,
    map_that_keeps_logits,
    read,
    recorded_run,
    relative_error,
    same_tokens,
    shared_tokens,
    short_rows,
    words_only,
)
from tests.trainer.runs import logged
from trl_kd.data import TokenBytes


@pytest.fixture(scope="module")
def other():
    return make_other_tokenizer()


# The whole step, against loops


# Options of the run, and what they mean where the version alone does not say it
SAMPLED = {"lmbda": 0.5, "on_policy_weight": 0.3, "kd_rate": 0.7}
DIVERGENCES = {
    name: ("v2", {"divergence": name, "skew": 0.3, "adaptive_head": 0.7, "kd_temperature": 1.5}, {})
    for name in ("skewed_forward_kl", "skewed_reverse_kl", "adaptive_kl", "total_variation")
}
ONE_VOCABULARY = DIVERGENCES | {
    "v2": ("v2", {}, {}),
    "v1": ("v1", {"divergence": "reverse_kl"}, {}),
    "v2_sampled": ("v2", SAMPLED, {}),
    "v1_sampled": ("v1", SAMPLED, {}),
    "v2_written": ("v2", {"lmbda": 1.0, "kd_rate": 1.0}, {}),
    "mean_over_all": ("v2", {"gate_normalization": "tokens", "teacher_temperature": 2.0}, {"gated_mean": False}),
    "gold": (
        "v2",
        {"projector_label": "gold", "teacher_space_divergence": "jsd", "max_steps": 5, "aux_learning_rate": 0.1},
        {"label": "gold", "teacher_space_divergence": "jsd"},
    ),
    "learned": ("v2", {"student_to_teacher": "learned", "projector_bias": True}, {"recomputed": False, "bias": True}),
    "student_space": ("v1", {"teacher_space": False}, {}),
    "teacher_space": ("v2", {"student_space": False}, {}),
    "few_tokens": ("v2", {"init_vocab_size": 200}, {}),
    "simple": ("v2", {"objective": "simple", "divergence": "jsd"} | SAMPLED, {}),
    "uld": ("v2", {"objective": "uld"}, {}),
}


@pytest.mark.parametrize("case", ONE_VOCABULARY)
def test_step_with_one_vocabulary_agrees_with_loops(tokenizer, tmp_path, case):
    version, overrides, options = ONE_VOCABULARY[case]
    models, tokenizers = dual_pair(tokenizer), (tokenizer, None)
    trainer = recorded_run(copy.deepcopy(models), tokenizers, tmp_path, preset=version, **overrides)
    # Projectors that have learned, or (slow loops) one step that the first one has changed
    steps = (trainer.args.max_steps - 1,) if "max_steps" in overrides or "uld" in case else (0, 1)
    values = assert_agrees(trainer, models, tokenizers, "same", version, steps, **options)
    assert_not_trivial(values, trainer.args)


def assert_not_trivial(values, args):
    sources = [source for source, share in zip(SOURCES, (1 - args.lmbda, args.lmbda), strict=True) if share > 0]
    assert all(values["student_ce"][source] for source in sources)
    if args.objective == "dual_space" and args.student_space and args.gate == "agreement":
        gates = sum((values["gate"][source] for source in sources), [])
        assert 0 < sum(gates) < len(gates)


# Without the steps that the projectors take alone
CONTEXT = {"projector_pretraining_steps": 0, "projector_hidden_size": 8} | SAMPLED
# Until the projectors find some labels
CMA = {"max_steps": 5, "aux_learning_rate": 0.1}
TWO_VOCABULARIES = {
    "eta_v2": ("eta", "v2", {}, {}),
    "eta_v1": ("eta", "v1", {}, {}),
    "eta_sampled": ("eta", "v2", SAMPLED, {}),
    "eta_v1_sampled": ("eta", "v1", SAMPLED, {}),
    "eta_few_tokens": ("eta", "v2", {"init_vocab_size": 200}, {}),
    "eta_context": ("eta", "context", CONTEXT, {}),
    "eta_context_gated": (
        "eta",
        "context",
        CONTEXT
        | {"teacher_space": True, "gate": "agreement", "gate_normalization": "gated"}
        | {"max_steps": 3, "aux_learning_rate": 0.03},
        {"gate": True, "gated_mean": True},
    ),
    "cma_v1": ("cma", "v1", CMA, {}),
    "cma_v2": ("cma", "v2", CMA, {}),
    "cma_sampled": ("cma", "v1", CMA | SAMPLED, {}),
    "cma_v2_sampled": ("cma", "v2", CMA | SAMPLED, {}),
    "cma_open": ("cma", "v1", {"gate": "none"}, {"gate": False}),
    "cma_gated_mean": ("cma", "v1", CMA | {"gate_normalization": "gated"}, {"gated_mean": True}),
    "cma_padded": ("cma", "v1", CMA | {"cma_norm_scope": "padded", "teacher_temperature": 2.0}, {}),
    "cma_v2_padded": ("cma", "v2", CMA | {"cma_norm_scope": "padded"}, {}),
    "cma_by_teacher": (
        "cma",
        "v1",
        {"teacher_space_denominator": "teacher", "gate": "none"} | SAMPLED,
        {"gate": False},
    ),
    "cma_student_space": ("cma", "v1", {"teacher_space": False} | CMA, {}),
    "cma_teacher_space": ("cma", "v2", {"student_space": False}, {}),
    "simple": ("eta", "v2", {"objective": "simple"} | SAMPLED, {}),
    "uld": ("uld", "v2", {"objective": "uld"}, {}),
}


@pytest.mark.parametrize("case", TWO_VOCABULARIES)
def test_step_with_two_vocabularies_agrees_with_loops(tokenizer, other, tmp_path, case):
    alignment, version, overrides, options = TWO_VOCABULARIES[case]
    models, tokenizers = dual_pair(tokenizer, other), (tokenizer, other)
    settings = {"alignment": "eta" if alignment == "uld" else alignment, "preset": version}
    settings |= {"generation_kwargs": words_only(tokenizer)}
    trainer = recorded_run(copy.deepcopy(models), tokenizers, tmp_path, **(settings | overrides))
    # Projectors that have learned, or (slow loops) one step that the first one has changed
    steps = (trainer.args.max_steps - 1,) if "max_steps" in overrides or "uld" in case else (0, 1)
    values = assert_agrees(trainer, models, tokenizers, alignment, version, steps, **options)
    assert_not_trivial(values, trainer.args)


def test_projectors_start_from_the_map_that_keeps_the_logits(tokenizer, other, tmp_path):
    for teacher_tokenizer in (None, other):
        models = dual_pair(tokenizer, teacher_tokenizer)
        trainer = recorded_run(copy.deepcopy(models), (tokenizer, teacher_tokenizer), tmp_path, max_steps=1)
        own, theirs = shared_tokens(trainer.args, (tokenizer, teacher_tokenizer))
        expected, _ = map_that_keeps_logits(*models[::-1], theirs, own)
        assert relative_error(trainer.record[0].modules["teacher_to_student.weight"], expected) < 1e-6


def test_projectors_that_keep_the_logits_start_without_an_offset(tokenizer, tmp_path):
    options = {"projector_bias": True, "student_to_teacher": "learned"}
    modules = make_trainer(dual_pair(tokenizer), (tokenizer, None), tmp_path, **options).auxiliary.modules
    assert [modules[name].bias.any().item() for name in ("teacher_to_student", "student_to_teacher")] == [False] * 2


# Identities


def steps_of(trainer):
    """What the log says of each step, and all gradients of it."""
    entries = [
        {name: value for name, value in entry.items() if name.startswith("kd/") or name in ("loss", "grad_norm")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return list(zip(entries, (step.gradients for step in trainer.record), strict=True))


def assert_same_steps(trainer, expected, without=(), rel=1e-5):
    for (entry, gradients), (other_entry, other_gradients) in zip(steps_of(trainer), steps_of(expected), strict=True):
        assert entry.keys() - set(without) == other_entry.keys() - set(without)
        for name in entry.keys() - set(without):
            assert entry[name] == pytest.approx(other_entry[name], rel=rel, abs=1e-7), name
        assert gradients.keys() == other_gradients.keys()
        largest = max(gradient.norm() for gradient in other_gradients.values())
        for name, gradient in gradients.items():
            assert (gradient - other_gradients[name]).norm() <= rel * max(
                other_gradients[name].norm(), largest / 10
            ), name


@pytest.mark.parametrize("alignment", ["same", "eta"])
def test_teacher_equal_to_the_student_leaves_nothing_to_learn(tokenizer, tmp_path, alignment):
    student, _ = dual_pair(tokenizer)
    models, tokenizers = (student, copy.deepcopy(student)), (tokenizer, copy.deepcopy(tokenizer))
    trainer = recorded_run(models, tokenizers, tmp_path, alignment=alignment, kd_rate=1.0, max_steps=1)
    (entry,) = [entry for entry, _ in steps_of(trainer)]
    assert entry["kd/off_policy/student_space_kd"] < 1e-10 and entry["kd/off_policy/teacher_space_kd"] < 1e-10
    assert entry["kd/off_policy/gate"] == entry["kd/off_policy/projector_agreement"] == 1.0
    # A step of cross-entropy has a gradient of 5
    assert entry["grad_norm"] < 1e-5 and entry["kd/aux_grad_norm"] > 1e-3


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_exact_alignment_of_equal_tokenizers_is_one_vocabulary(tokenizer, tmp_path, version):
    models = dual_pair(tokenizer)
    runs = [
        recorded_run(
            copy.deepcopy(models), (tokenizer, copy.deepcopy(tokenizer)), tmp_path, alignment=alignment, preset=version
        )
        for alignment in ("same", "eta")
    ]
    assert logged(runs[1], "kd/aligned_share") == [1.0, 1.0]
    assert_same_steps(*runs, without=["kd/aligned_share"])


def left_padded(batch):
    """The same rows with their padding in front."""
    batch, shifts = dict(batch), {}
    for prefix in ("", "teacher_"):
        if f"{prefix}attention_mask" not in batch:
            continue
        mask = batch[f"{prefix}attention_mask"]
        shifts[prefix] = [mask.shape[1] - length for length in mask.sum(1).tolist()]
        for name in ("input_ids", "attention_mask", "labels"):
            rows = zip(batch[prefix + name], shifts[prefix], strict=True)
            batch[prefix + name] = torch.stack([row.roll(shift) for row, shift in rows])
    if "partner" in batch:
        rows = zip(batch["partner"], shifts[""], shifts["teacher_"], strict=True)
        batch["partner"] = torch.stack(
            [torch.where(row < 0, row, row + theirs).roll(shift) for row, shift, theirs in rows]
        )
    return batch


KINDS = {"same": {}, "eta": {}, "cma": {"preset": "v1", "gate": "none"}}


@pytest.mark.parametrize("alignment", KINDS)
def test_padding_order_and_chunks_of_a_batch_do_not_matter(tokenizer, other, tmp_path, alignment):
    tokenizers = (tokenizer, None if alignment == "same" else other)
    models, whole = dual_pair(*tokenizers), {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}

    def run(rows=None, collate=None, **overrides):
        options = whole | KINDS[alignment] | {"alignment": alignment, "max_steps": 1, "loss_chunk_size": None}
        trainer = make_trainer(
            copy.deepcopy(models), tokenizers, tmp_path, rows or short_rows(4), None, Recorder, **(options | overrides)
        )
        if collate is not None:
            right = trainer.data_collator
            trainer.data_collator = lambda rows: collate(right(rows))
        trainer.train()
        return trainer

    expected = run()
    others = [
        run(collate=left_padded),
        run(pad_to_multiple_of=16),
        run(rows=short_rows(4).select([2, 0, 3, 1])),
        run(loss_chunk_size=2),
        run(loss_chunk_size=1000),
    ]
    for trainer in others:
        assert_same_steps(trainer, expected)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_packed_rows_train_like_unpacked(tokenizer, tmp_path, version):
    models, runs = dual_pair(tokenizer), []
    for packing, size in ((True, 1), (False, 4)):
        options = {"packing": packing, "max_length": 96, "max_steps": 1, "preset": version}
        options |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": 1}
        runs.append(recorded_run(copy.deepcopy(models), (tokenizer, None), tmp_path, short_rows(4), **options))
    assert len(runs[0].train_dataset) == 1
    assert_same_steps(*runs)


# One optimizer step, however it is split

SPLIT_RUNS = {
    "same": {},
    "same_v1": {"preset": "v1"},
    "eta": {"alignment": "eta"},
    "cma": {"alignment": "cma", "preset": "v1", "aux_learning_rate": 0.1, "gate_normalization": "gated"},
    "cma_v2": {"alignment": "cma", "preset": "v2", "aux_learning_rate": 0.1},
    "simple": {"alignment": "eta", "objective": "simple"},
    "uld": {"alignment": "eta", "objective": "uld"},
}


@pytest.mark.parametrize("case", SPLIT_RUNS)
def test_any_split_of_a_step_gives_the_same_gradients(tokenizer, other, tmp_path, case):
    tokenizers = (tokenizer, None if case.startswith("same") else other)
    models = dual_pair(*tokenizers)
    runs = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        # Greedy, so that rollouts are the same
        options = {"lmbda": 0.5, "temperature": 0.0, "max_steps": 5 if "cma" in case else 2} | sizes
        runs.append(recorded_run(copy.deepcopy(models), tokenizers, tmp_path, **(options | SPLIT_RUNS[case])))
    assert min(logged(runs[0], "kd/on_policy/tokens") + logged(runs[0], "kd/off_policy/tokens")) > 0
    for run in runs[1:]:
        # Rounding is another, and grows from step to step
        assert_same_steps(run, runs[0], rel=1e-4)


# Rollouts


def chat(prompt, answer=None):
    return [{"role": "user", "content": prompt}] + ([{"role": "assistant", "content": answer}] if answer else [])


QUESTIONS = ["What is the fox?", "Hello", "What is the colour of the sky?", "How many apples are there?"]


def chat_trainer(tokenizer, other, folder, rows, **overrides):
    return make_trainer(dual_pair(tokenizer, other), (tokenizer, other), folder, rows, alignment="eta", **overrides)


def first_batch(trainer):
    iterator = iter(trainer.get_train_dataloader())
    (batch,), _ = trainer.get_batch_samples(iterator, 1, trainer.args.device)
    return batch


def texts(batch, row, tokenizer, prefix=""):
    """Prompt, and what is trained, as text; nothing of the prompt is trained, and all that follows it."""
    length = batch[f"{prefix}prompt_length"][row]
    ids, labels = (batch[prefix + name][row] for name in ("input_ids", "labels"))
    trained = labels != -100
    end = batch[f"{prefix}attention_mask"][row].sum()
    assert not trained[:length].any() and trained[length:end].all() and not trained[end:].any()
    assert torch.equal(ids[trained], labels[trained])
    return tokenizer.decode(ids[:length]), tokenizer.decode(labels[trained])


def test_rollout_has_the_same_text_behind_each_models_own_prompt(tokenizer, other, tmp_path):
    rows = [{"messages": chat(question, "No.")} for question in QUESTIONS]
    trainer = chat_trainer(tokenizer, other, tmp_path, rows, lmbda=1.0, kd_rate=1.0)
    answers = ["The sky.<|im_end|>", " It is\n\ngreen", "caf\u00e9 \u4f60\u597d<|im_end|>", "<|im_end|>"]
    asked = []

    def write(prompts, seed):
        asked.extend(prompts)
        return [tokenizer(answer)["input_ids"] for answer in answers]

    trainer.write_with_student = write
    batch = first_batch(trainer)
    assert batch["is_on_policy"].all()
    for row, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True)):
        own, written = texts(batch, row, tokenizer)
        assert own == tokenizer.apply_chat_template(chat(question), add_generation_prompt=True, tokenize=False)
        assert own == tokenizer.decode(asked[row]) and written == answer
        theirs, translated = texts(batch, row, other, "teacher_")
        assert theirs == other.apply_chat_template(chat(question), add_generation_prompt=True, tokenize=False)
        # A completion that did not end has no end on the other side either
        assert translated == answer.replace("<|im_end|>", "</s>")
        partner = batch["partner"][row].tolist()
        pairs = [(i, j) for i, j in enumerate(partner) if j >= 0]
        assert [other.decode(batch["teacher_labels"][row, j]) for _, j in pairs] == [
            tokenizer.decode(batch["labels"][row, i]).replace("<|im_end|>", "</s>") for i, _ in pairs
        ]
        assert pairs or row == 1


def test_rollout_cut_within_a_character_is_translated_up_to_it(tokenizer, other, tmp_path):
    rows = [{"prompt": "What is", "completion": " it"}] * 4
    trainer = chat_trainer(tokenizer, other, tmp_path, rows, lmbda=1.0, kd_rate=1.0)
    ids = tokenizer(" green \u00e9")["input_ids"][:-1]
    trainer.write_with_student = lambda prompts, seed: [ids] * 4
    batch = first_batch(trainer)
    own, theirs = (batch[name][0][batch[name][0] != -100] for name in ("labels", "teacher_labels"))
    assert own.tolist() == ids
    assert other.decode(theirs) == " green \ufffd"
    *_, space, cut = batch["partner"][0].tolist()
    assert space >= 0 and cut == -1
    trainer.train()


def test_student_writes_from_its_own_prompt_and_teacher_from_its_own(tokenizer, other, tmp_path):
    rows = [{"prompt": chat(question)} for question in QUESTIONS]
    trainer = chat_trainer(tokenizer, other, tmp_path, rows, lmbda=0.5, temperature=0.0)
    batch = first_batch(trainer)
    assert batch["is_on_policy"].sum() == 2
    for row, question in enumerate(QUESTIONS):
        on_policy = bool(batch["is_on_policy"][row])
        writer, name, model = (
            (tokenizer, "", trainer.model) if on_policy else (other, "teacher_", trainer.teacher.model)
        )
        prompt = writer.apply_chat_template(chat(question), add_generation_prompt=True)["input_ids"]
        ends = [writer.eos_token_id]
        inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.long)}
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=ends, pad_token_id=0)
        written = output[0, len(prompt) :].tolist()
        labels = batch[f"{name}labels"][row]
        assert labels[labels != -100].tolist() == written
        # And the other side has its text
        other_name, reader = ("teacher_", other) if on_policy else ("", tokenizer)
        labels = batch[f"{other_name}labels"][row]
        text = b"".join(TokenBytes(writer).table[token] for token in written).decode(errors="replace")
        assert reader.decode(labels[labels != -100], skip_special_tokens=True) == text
        assert (reader.eos_token_id in labels) == (written[-1] in ends)


def test_teacher_as_source_reaches_both_sides(tokenizer, other, tmp_path):
    rows = [{"messages": chat(question, "No.")} for question in QUESTIONS]
    trainer = chat_trainer(tokenizer, other, tmp_path, rows, off_policy_source="teacher")
    answers, asked = ["The sky is blue.</s>", " green", "</s>", "red and</s>"], []

    def write(prompts, seed):
        asked.extend(prompts)
        return [other(answer, add_special_tokens=False)["input_ids"] for answer in answers]

    trainer.write_with_teacher = write
    batch = first_batch(trainer)
    assert not batch["is_on_policy"].any()
    for row, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True)):
        theirs, written = texts(batch, row, other, "teacher_")
        assert theirs == other.decode(asked[row]) and written == answer
        own, translated = texts(batch, row, tokenizer)
        assert own == tokenizer.apply_chat_template(chat(question), add_generation_prompt=True, tokenize=False)
        assert translated == answer.replace("</s>", "<|im_end|>")


@pytest.mark.parametrize("alignment", ["same", "eta", "cma"])
def test_cross_entropy_is_of_reference_text_alone(tokenizer, other, tmp_path, alignment):
    tokenizers = (tokenizer, None if alignment == "same" else other)
    options = {"alignment": alignment, "kd_rate": 0.0, "max_steps": 1}
    written = recorded_run(dual_pair(*tokenizers), tokenizers, tmp_path, lmbda=1.0, **options)
    assert logged(written, "loss") == [0.0] and logged(written, "grad_norm") == [0.0]
    mixed = recorded_run(dual_pair(*tokenizers), tokenizers, tmp_path, lmbda=0.5, **options)
    assert logged(mixed, "loss") == pytest.approx(logged(mixed, "kd/off_policy/student_ce"), rel=1e-6)


@pytest.mark.parametrize("kind", ["completions", "prompts"])
def test_evaluation_loss_is_the_students_cross_entropy(tokenizer, other, tmp_path, kind):
    rows = [{"messages": chat(question, "The sky is blue.")} for question in QUESTIONS[:3]]
    trainer = chat_trainer(tokenizer, other, tmp_path, rows, temperature=0.0, per_device_eval_batch_size=2)
    answers = ["The sky is blue."] * 3
    data = Dataset.from_list(rows)
    if kind == "prompts":
        answers = [" green and", "the fox.", "No"]
        data = Dataset.from_list([{"prompt": chat(question)} for question in QUESTIONS[:3]])
        left = list(answers)
        trainer.write_with_teacher = lambda prompts, seed: [
            other(left.pop(0) + "</s>", add_special_tokens=False)["input_ids"] for _ in prompts
        ]
    student, values = copy.deepcopy(trainer.model), []
    found = trainer.evaluate(data)
    for question, answer in zip(QUESTIONS, answers, strict=False):
        prompt = tokenizer.apply_chat_template(chat(question), add_generation_prompt=True)["input_ids"]
        completion = tokenizer(answer + "<|im_end|>")["input_ids"]
        logits = student(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        values += (-logits.gather(1, torch.tensor(completion)[:, None])).flatten().tolist()
    assert found["eval_loss"] == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert 0 < found["eval_kd/aligned_share"] < 1


# It teaches


@pytest.fixture(scope="module")
def fitted(tokenizer, other):
    """Teachers that know the text of `short_rows`, by whose tokenizer they have, and students that know none."""
    found = {}
    for name, own in (("same", tokenizer), ("other", other)):
        _, teacher = dual_pair(tokenizer, own)
        optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-2)
        rows = [own(row["prompt"] + row["completion"], return_tensors="pt").input_ids for row in short_rows(8)]
        for step in range(80):
            loss = teacher(rows[step % 8], labels=rows[step % 8]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found[name] = teacher
    return found


def distance_to(student, teacher, tokenizers):
    """Mean KL from the teacher, over the tokens that both have, at aligned tokens of `short_rows`; in nats."""
    found = same_tokens(*tokenizers)
    theirs, own = (list(ids) for ids in zip(*found.items(), strict=True))
    values = []
    for row in short_rows(8):
        sides = []
        for model, tokenizer in zip((student, teacher), tokenizers, strict=True):
            ids = tokenizer(row["prompt"])["input_ids"]
            labels = [-100] * len(ids) + tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
            ids = torch.tensor(ids + labels[len(ids) :])
            with torch.no_grad():
                sides.append(read(model, ids, labels))
        for i, j in literal_partners(*sides, tokenizers):
            log_q, log_p = sides[0].logits[i][own].log_softmax(-1), sides[1].logits[j][theirs].log_softmax(-1)
            values.append((log_p.exp() * (log_p - log_q)).sum().item())
    return sum(values) / len(values)


TAUGHT = {
    "same": {},
    "eta": {"alignment": "eta"},
    "cma": {"alignment": "cma", "preset": "v1"},
}


@pytest.mark.parametrize("case", TAUGHT)
def test_student_comes_near_the_teacher_by_distillation_alone(tokenizer, other, tmp_path, fitted, case):
    own = tokenizer if case.startswith("same") else other
    student, _ = dual_pair(tokenizer, own)
    teacher = copy.deepcopy(fitted["same" if case.startswith("same") else "other"])
    before = distance_to(student, teacher, (tokenizer, own))
    # No cross-entropy: what it learns is the teacher's
    options = {"kd_rate": 1.0, "learning_rate": 1e-2, "max_steps": 40, "lr_scheduler_type": "constant"}
    options |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "loss_chunk_size": None}
    trainer = recorded_run((student, teacher), (tokenizer, own), tmp_path, **(options | TAUGHT[case]))
    after = distance_to(trainer.model, teacher, (tokenizer, own))
    assert after < before / 3

"""Several teachers, by weights or by a column; and a teacher that reads a prompt of its own."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tests.tiny import make_model
from tests.trainer.dual import make_other_tokenizer
from tests.trainer.runs import logged, pair, tiny_dataset
from tests.trainer.test_teacher_sources import assert_same, make, step
from trl_kd.data import KDCollator, rows_of, teacher_view


METHODS = pytest.mark.parametrize("method", ["amm", "td"])


@pytest.fixture
def teachers(tokenizer):
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return [make_model("llama", len(tokenizer), hidden_size=size, seed=size, **ids) for size in (48, 64)]


def save(teachers, tokenizer, folder):
    paths = [str(folder / f"teacher{number}") for number in range(len(teachers))]
    for model, path in zip(teachers, paths, strict=True):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return paths


def added(runs, shares):
    """Loss and gradients of a sum of runs."""
    losses = [sum(share * run[0][0] for share, run in zip(shares, runs, strict=True))]
    names = runs[0][1][0]
    gradients = {name: sum(share * run[1][0][name] for share, run in zip(shares, runs, strict=True)) for name in names}
    return losses, [gradients]


# Weights


@METHODS
def test_weighted_teachers_give_the_weighted_mean_of_losses_and_gradients(method, tokenizer, tmp_path, teachers):
    student, _ = pair(tokenizer)
    # With a loss on the text, whose weights are others
    also = {"sft_loss_weight": 0.5} if method == "amm" else {"lm_weight": 0.5}
    runs = [step(method, tmp_path, copy.deepcopy(student), each, tokenizer=tokenizer, **also) for each in teachers]
    group = [copy.deepcopy(teacher) for teacher in teachers]
    found = step(method, tmp_path, student, group, tokenizer=tokenizer, teacher_weights=[1.0, 3.0], **also)
    assert runs[0][0] != pytest.approx(runs[1][0], rel=1e-3)
    assert_same(found, added(runs, (0.25, 0.75)), rel=1e-5)


def test_weighted_teachers_read_the_student_once(tokenizer, tmp_path, teachers, monkeypatch):
    student, _ = pair(tokenizer)
    trainer = make("amm", tmp_path, student, teachers, tokenizer=tokenizer, lmbda=0.0)
    calls = []
    trainer.model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert len(calls) == 1


def test_equal_teachers_equal_one(tokenizer, tmp_path):
    student, teacher = pair(tokenizer)
    expected = step("amm", tmp_path, copy.deepcopy(student), copy.deepcopy(teacher), tokenizer=tokenizer)
    found = step("amm", tmp_path, student, [teacher, copy.deepcopy(teacher)], tokenizer=tokenizer)
    assert_same(found, expected, rel=1e-5)


# A column


@METHODS
@pytest.mark.parametrize("by", ["number", "name"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_routed_rows_are_compared_with_their_own_teacher(method, by, accumulation, tokenizer, tmp_path, teachers):
    """The sum over all rows of what each teacher's rows give alone, divided by all tokens."""
    paths = save(teachers, tokenizer, tmp_path)
    rows = [row | {"source": [1, 0, 1, 1][index]} for index, row in enumerate(tiny_dataset(4))]
    runs, counts = [], []
    for number, path in enumerate(paths):
        own = Dataset.from_list([row for row in rows if row["source"] == number])
        run = step(method, tmp_path, pair(tokenizer)[0], path, own, tokenizer, lmbda=0.0)
        runs.append(run)
        counts.append(logged(run[2], "kd/off_policy/tokens")[0])
    data = Dataset.from_list(
        [row | {"source": paths[row["source"]] if by == "name" else row["source"]} for row in rows]
    )
    options = {"teacher_models": paths, "teacher_column": "source", "lmbda": 0.0}
    options |= {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    found = step(method, tmp_path, pair(tokenizer)[0], None, data, tokenizer, **options)
    shares = [count / sum(counts) for count in counts]
    assert_same(found, added(runs, shares), rel=1e-5)


@pytest.mark.parametrize("column", [None, "source"])
def test_text_of_the_language_model_term_counts_once(column, tokenizer, tmp_path, teachers):
    rows = Dataset.from_list([row | {"source": index % 2} for index, row in enumerate(tiny_dataset(4))])
    options = {"lm_weight": 1.0, "kd_ratio": 0.0, "lmbda": 0.0, "more": {"lm_dataset": tiny_dataset(8)}}
    expected = step("td", tmp_path, pair(tokenizer)[0], copy.deepcopy(teachers[0]), rows, tokenizer, **options)
    group = [copy.deepcopy(teachers[0]) for _ in range(2)]
    found = step("td", tmp_path, pair(tokenizer)[0], group, rows, tokenizer, teacher_column=column, **options)
    assert_same(found, expected, rel=1e-5)


def test_datasets_hashes_no_weights_of_the_teachers(tokenizer, tmp_path, teachers, monkeypatch):
    pickled, rows = [], Dataset.from_list([row | {"source": 0} for row in tiny_dataset(4)])
    monkeypatch.setattr(type(teachers[0]), "__getstate__", lambda self: pickled.append(self) or vars(self))
    make("amm", tmp_path, pair(tokenizer)[0], teachers, rows, tokenizer, teacher_column="source")
    assert not pickled


def test_routed_rollouts_keep_their_teacher(tokenizer, tmp_path, teachers):
    rows = [row | {"source": index % 2} for index, row in enumerate(tiny_dataset(4))]
    options = {"teacher_column": "source", "lmbda": 1.0, "on_policy_weight": 1.0}
    trainer = make("amm", tmp_path, pair(tokenizer)[0], teachers, Dataset.from_list(rows), tokenizer, **options)
    seen, read = [], trainer.read_teacher

    def spy(inputs, selected):
        seen.append((trainer.teacher.teachers.index(inputs["teacher"]), inputs["prompt_length"].tolist()))
        return read(inputs, selected)

    trainer.read_teacher = spy
    trainer.train()
    lengths = [len(tokenizer(row["prompt"]).input_ids) for row in rows]
    assert seen == [(0, lengths[::2]), (1, lengths[1::2])]
    assert logged(trainer, "kd/on_policy/tokens")[0] > 0 and not logged(trainer, "kd/off_policy/total_variation")


def test_evaluation_with_several_teachers_averages_over_tokens(tokenizer, tmp_path, teachers):
    rows = Dataset.from_list([row | {"source": index % 2} for index, row in enumerate(tiny_dataset(4))])
    trainer = make("amm", tmp_path, pair(tokenizer)[0], teachers, rows, tokenizer, teacher_column="source", lmbda=0.0)
    values, counts, losses = [], [], []
    for number, teacher in enumerate(teachers):
        own = rows.filter(lambda row, number=number: row["source"] == number)
        alone = make("amm", tmp_path, pair(tokenizer)[0], copy.deepcopy(teacher), own, tokenizer, lmbda=0.0)
        values.append(alone.evaluate(own)["eval_loss"])
        batch = next(iter(alone.get_eval_dataloader(alone.prepare_data(own, "eval"))))
        losses.append(alone.compute_loss(alone.model, batch))
        counts.append(sum(label != -100 for row in alone.train_dataset for label in row["labels"][1:]))
    expected = sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    batch = next(iter(trainer.get_eval_dataloader(trainer.prepare_data(rows, "eval"))))
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "source", "error", "message"),
    [
        ({"teacher_column": "source"}, 2, ValueError, "The column `source` of a row is 2, but the teachers are"),
        ({"teacher_column": "source"}, "", ValueError, "Put in a name that one of them alone has, or a number"),
        ({"teacher_column": "else"}, 0, ValueError, "`teacher_column` is 'else', but the train dataset has no such"),
        ({"teacher_weights": [1.0]}, 0, ValueError, r"`teacher_weights` is \[1.0\] for 2 teachers"),
        ({"teacher_weights": [1.0, -1.0]}, 0, ValueError, "each has a weight above 0"),
        ({"teacher_weights": [1.0, 1.0], "teacher_column": "source"}, 0, ValueError, "either all teachers or one"),
        ({"critic": "value_head"}, 0, NotImplementedError, "compares the student with one teacher over the whole"),
        ({"on_policy_gradient": "full"}, 0, NotImplementedError, "compares the student with one teacher over the"),
        ({"teacher_cache": "c"}, 0, ValueError, "`teacher_cache` is set with `teacher_model`"),
        ({"teacher_column": "source", "packing": True, "lmbda": 0.0}, 0, ValueError, "a packed row holds texts of"),
    ],
)
def test_several_teachers_that_cannot_work_raise(options, source, error, message, tokenizer, tmp_path, teachers):
    rows = Dataset.from_list([row | {"source": source} for row in tiny_dataset(4)])
    with pytest.raises(error, match=message):
        make("amm", tmp_path, pair(tokenizer)[0], teachers, rows, tokenizer, **options)


def test_list_of_one_teacher_raises(tokenizer, tmp_path, teachers):
    with pytest.raises(ValueError, match="There are 1 teachers in the list"):
        make("amm", tmp_path, pair(tokenizer)[0], teachers[:1], tokenizer=tokenizer)


def test_several_teachers_do_not_write(tokenizer, tmp_path, teachers):
    trainer = make("amm", tmp_path, pair(tokenizer)[0], teachers, tokenizer=tokenizer, off_policy_source="teacher")
    with pytest.raises(ValueError, match="Let each write its part beforehand with `trl-kd generate`"):
        trainer.train()


def test_methods_that_need_one_teacher_refuse_several(tokenizer, tmp_path, teachers):
    student, _ = pair(tokenizer)
    with pytest.raises(NotImplementedError, match="projectors lead into the space of one"):
        make("dskd", tmp_path, student, teachers, tokenizer=tokenizer)
    with pytest.raises(NotImplementedError, match="`path_consistency` compares whole rollouts with one"):
        make("td", tmp_path, student, teachers, tokenizer=tokenizer, objectives={"path_consistency": 1.0})


# A prompt of the teacher's own


def with_hints(dataset):
    return Dataset.from_list([row | {"teacher_prompt": f"The sky is blue. {row['prompt']}"} for row in dataset])


def log_probs(model, prompt, completion):
    """Of each token of a completion, `(K, V)`, one state after the other."""
    found = []
    for end in range(len(completion)):
        ids = torch.tensor([prompt + completion[:end]])
        found.append(model(ids).logits[0, -1].float().log_softmax(-1))
    return torch.stack(found)


def loop(student, teacher, tokenizer, rows):
    """Total variation and forward KL per token, by a loop over rows and states."""
    values = {"total_variation": [], "kl": []}
    for row in rows:
        ids = [tokenizer(row[name]).input_ids for name in ("prompt", "teacher_prompt")]
        joint = tokenizer(row["prompt"] + row["completion"]).input_ids
        completion = joint[len(ids[0]) :] + [tokenizer.eos_token_id]
        q, p = log_probs(student, ids[0], completion), log_probs(teacher, ids[1], completion)
        values["total_variation"] += (0.5 * (p.exp() - q.exp()).abs().sum(-1)).tolist()
        values["kl"] += (p.exp() * (p - q)).sum(-1).tolist()
    return {name: sum(found) / len(found) for name, found in values.items()}


@torch.no_grad()
def test_teacher_reads_its_own_prompt_before_the_same_completion(tokenizer, tmp_path):
    student, teacher = pair(tokenizer)
    rows = with_hints(tiny_dataset(4))
    expected = loop(student, teacher, tokenizer, rows)
    plain = loop(student, teacher, tokenizer, [row | {"teacher_prompt": row["prompt"]} for row in rows])
    assert abs(expected["total_variation"] - plain["total_variation"]) > 0.005
    with torch.enable_grad():
        trainer = step("amm", tmp_path, copy.deepcopy(student), teacher, rows, tokenizer, lmbda=0.0)[2]
        sets = {"action_set": "full", "max_actions": len(tokenizer), "lmbda": 0.0}
        sparse = step("td", tmp_path, student, copy.deepcopy(teacher), rows, tokenizer, **sets)
    assert logged(trainer, "kd/off_policy/total_variation")[0] == pytest.approx(expected["total_variation"], rel=1e-5)
    assert sparse[0][0] == pytest.approx(expected["kl"], rel=1e-5)


@pytest.mark.parametrize("method", ["amm", "dskd", "td"])
def test_teacher_prompt_that_is_the_prompt_changes_nothing(method, tokenizer, tmp_path):
    runs = []
    for own in (False, True):
        rows = [row | ({"teacher_prompt": row["prompt"]} if own else {}) for row in tiny_dataset(8)]
        student, teacher = pair(tokenizer)
        runs.append(step(method, tmp_path, student, teacher, Dataset.from_list(rows), tokenizer, max_steps=2))
    assert_same(runs[1], runs[0])


def test_dskd_reads_the_teacher_s_states_after_its_own_prompt(tokenizer, tmp_path):
    student, teacher = pair(tokenizer)
    rows = with_hints(tiny_dataset(4))
    trainer = make("dskd", tmp_path, student, teacher, rows, tokenizer, lmbda=0.0)
    batch = next(iter(trainer.get_train_dataloader()))
    said = trainer.read_teacher(batch, trainer.select(batch))
    expected = []
    for row, ours in zip(rows, rows_of(batch), strict=True):
        prompt, completion = tokenizer(row["teacher_prompt"]).input_ids, ours["input_ids"][ours["prompt_length"] :]
        hidden = teacher(torch.tensor([prompt + completion]), output_hidden_states=True).hidden_states[-1][0]
        expected.append(hidden[len(prompt) - 1 : -1])
    torch.testing.assert_close(said, torch.cat(expected))


def test_rollouts_are_the_student_s_after_its_prompt_and_the_teacher_s_after_its_own(tokenizer, tmp_path):
    rows = with_hints(tiny_dataset(4))
    student, teacher = pair(tokenizer)
    options = {"lmbda": 0.5, "off_policy_source": "teacher"}
    trainer = make("amm", tmp_path, student, teacher, rows, tokenizer, **options)
    asked, write = {"student": [], "teacher": []}, {}
    for name in asked:
        write[name] = trainer.write_with_student if name == "student" else trainer.write_with_teacher

        def spy(prompts, seed, name=name):
            asked[name] += prompts
            return write[name](prompts, seed)

        setattr(trainer, f"write_with_{name}", spy)
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    prompts = [[tokenizer(row[name]).input_ids for row in rows] for name in ("prompt", "teacher_prompt")]
    assert len(asked["student"]) == len(asked["teacher"]) == 2
    assert all(prompt in prompts[0] for prompt in asked["student"])
    assert all(prompt in prompts[1] for prompt in asked["teacher"])
    batch = batches[0]
    for index, row in enumerate(rows_of(batch)):
        assert row["input_ids"][: row["prompt_length"]] == prompts[0][index]
        assert row["teacher_prompt_ids"] == prompts[1][index]
        completion = row["input_ids"][row["prompt_length"] :]
        length = len(prompts[1][index]) + len(completion)
        assert batch["teacher_input_ids"][index, :length].tolist() == prompts[1][index] + completion
        assert [label for label in batch["teacher_labels"][index].tolist() if label != -100] == completion


def test_system_prompt_is_the_teacher_s_alone(tokenizer, tmp_path, conversational_dataset):
    student, teacher = pair(tokenizer)
    options = {"teacher_system_prompt": "Answer in colours.", "lmbda": 0.0}
    trainer = make("amm", tmp_path, student, teacher, conversational_dataset.select(range(4)), tokenizer, **options)
    batch = next(iter(trainer.get_train_dataloader()))
    for index in range(4):
        texts = [tokenizer.decode(batch[name][index]) for name in ("input_ids", "teacher_input_ids")]
        assert "Answer in colours." not in texts[0]
        system = "Answer in colours." + ("\n\nHelp the fox." if index % 2 else "")
        assert texts[1].startswith(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n")
        ends = [text.replace("<|endoftext|>", "").rpartition("<|im_start|>assistant")[2] for text in texts]
        assert ends[0] == ends[1] and ends[0].endswith("<|im_end|>")


def test_teacher_of_another_vocabulary_reads_its_own_prompt(tokenizer, tmp_path):
    other = make_other_tokenizer()
    ids = {"eos_token_id": other.eos_token_id, "pad_token_id": other.pad_token_id}
    teacher = make_model("llama", len(other), hidden_size=48, seed=2, **ids)
    teacher.save_pretrained(tmp_path / "teacher")
    other.save_pretrained(tmp_path / "teacher")
    rows = with_hints(tiny_dataset(4))
    trainer = make("dskd", tmp_path, pair(tokenizer)[0], str(tmp_path / "teacher"), rows, tokenizer, lmbda=0.5)
    for index, row in enumerate(trainer.train_dataset):
        prompt = row["teacher_input_ids"][: row["teacher_prompt_length"]]
        assert other.decode(prompt, skip_special_tokens=True) == rows[index]["teacher_prompt"]
        assert tokenizer.decode(row["input_ids"][: row["prompt_length"]]) == rows[index]["prompt"]
        completion = other.decode(row["teacher_input_ids"][row["teacher_prompt_length"] :], skip_special_tokens=True)
        assert completion == rows[index]["completion"]
    trainer.train()
    assert logged(trainer, "kd/on_policy/tokens")[0] > 0


def test_teacher_view_puts_prompt_and_system_message_in_their_places():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    system = {"role": "system", "content": "s"}
    assert teacher_view({"messages": turns}, "s") == {"prompt": [system, turns[0]], "completion": turns[1:]}
    row = {"prompt": "a", "completion": "b", "teacher_prompt": ""}
    assert teacher_view(row, None) == row
    assert teacher_view(row | {"teacher_prompt": "c"}, None)["prompt"] == "c"
    own = {"messages": turns, "teacher_prompt": [{"role": "user", "content": "c"}]}
    assert teacher_view(own, None)["prompt"] == own["teacher_prompt"]


def test_collated_rows_with_teacher_prompts_come_back():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "prompt_length": 1, "is_on_policy": False},
        {"input_ids": [8, 9], "labels": [-100, 9], "prompt_length": 1, "is_on_policy": True},
    ]
    own = [rows[0] | {"teacher_prompt_ids": [1, 2, 5]}, rows[1] | {"teacher_prompt_ids": [3]}]
    own = [row | {"teacher_index": 1 - index} for index, row in enumerate(own)]
    batch = KDCollator(0)(own)
    assert batch["teacher_input_ids"].tolist() == [[1, 2, 5, 6, 7], [3, 9, 0, 0, 0]]
    assert batch["teacher_labels"].tolist() == [[-100, -100, -100, 6, 7], [-100, 9, -100, -100, -100]]
    assert batch["teacher_attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["teacher_index"].tolist() == [1, 0]
    assert rows_of(batch) == own


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            {"teacher_prompt": [{"role": "user", "content": "a"}]},
            {},
            "`teacher_prompt` is of type list and its prompt",
        ),
        ({}, {"teacher_system_prompt": "s"}, "the prompts are text, which has no system message"),
        ({"teacher_prompt": "c"}, {"packing": True, "lmbda": 0.0}, "`packing` is True, where one prompt before one"),
        ({"input_ids": [5, 6], "teacher_prompt": "c"}, {}, "the train dataset comes as token ids"),
    ],
)
def test_teacher_prompt_that_cannot_work_raises(change, options, message, tokenizer, tmp_path):
    rows = Dataset.from_list([row | change for row in tiny_dataset(4)])
    with pytest.raises(ValueError, match=message):
        make("amm", tmp_path, *pair(tokenizer), rows, tokenizer, **options)


def test_teacher_prompt_beyond_the_teacher_s_context_drops_the_row(tokenizer, tmp_path, caplog):
    hints = ["sky " * 600, "sky"]
    rows = Dataset.from_list(
        [row | {"teacher_prompt": hint} for row, hint in zip(tiny_dataset(2), hints, strict=True)]
    )
    trainer = make("amm", tmp_path, *pair(tokenizer), rows, tokenizer)
    assert len(trainer.train_dataset) == 1
    assert "the teacher's own prompt leaves no room for a completion in its context (1 rows)" in caplog.text
    assert "Raise `max_position_embeddings` (now 512 tokens)" in caplog.text


@pytest.mark.parametrize("is_path", [False, True])
def test_teacher_prompt_beyond_the_base_s_context_drops_the_row(is_path, tokenizer, tmp_path):
    """Positions of GPT-2 are learned, so there is none beyond."""
    hints = ["sky " * 600, "sky"]
    rows = Dataset.from_list(
        [row | {"teacher_prompt": hint} for row, hint in zip(tiny_dataset(2), hints, strict=True)]
    )
    student, _ = pair(tokenizer, "gpt2")
    if is_path:
        student.save_pretrained(tmp_path / "student")
        student = str(tmp_path / "student")
    lora = LoraConfig(r=2, target_modules=["c_attn"])
    trainer = make("amm", tmp_path, student, None, rows, tokenizer, teacher_adapter="base", peft=lora)
    assert len(trainer.train_dataset) == 1
    trainer.train()


def test_lora_student_with_its_base_as_teacher_and_a_hint_learns_to_do_without(tokenizer, tmp_path):
    """What such a teacher is for (context distillation): the distance to the teacher that sees the hint falls."""
    student, _ = pair(tokenizer)
    trainer = make(
        "amm",
        tmp_path,
        student,
        None,
        with_hints(tiny_dataset(8)),
        tokenizer,
        teacher_adapter="base",
        max_steps=60,
        lmbda=0.0,
        peft=LoraConfig(r=8, target_modules="all-linear"),
    )
    trainer.train()
    values = logged(trainer, "kd/off_policy/total_variation")
    assert sum(values[-5:]) < 0.6 * sum(values[:5])

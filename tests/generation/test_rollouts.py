import copy
import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from tests.tiny import make_model
from trl_kd.data import KDCollator, completed_row, rows_of
from trl_kd.generation import (
    RolloutWriter,
    Sampling,
    distinct_n,
    draw_on_policy,
    generate_completions,
    rollout_seed,
)


VOCAB_SIZE = 50
PAD, EOS = 0, 1
PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]


class Scripted(nn.Module):
    """Stands for a model: returns chosen tokens, and keeps what it was asked."""

    def __init__(self, completions, error=None):
        super().__init__()
        self.embeddings = nn.Embedding(VOCAB_SIZE, 2)
        self.generation_config = GenerationConfig(top_k=1, repetition_penalty=3.0)
        self.completions, self.error = completions, error
        self.calls = []

    def get_input_embeddings(self):
        return self.embeddings

    def generate(self, input_ids, attention_mask, generation_config):
        self.calls.append((input_ids.tolist(), attention_mask.tolist(), generation_config, self.training))
        torch.rand(3)  # as sampling does
        if self.error is not None:
            raise self.error
        return torch.cat([input_ids, torch.tensor(self.completions)], dim=1)


def tiny(seed=0, **options):
    return make_model("llama", VOCAB_SIZE, seed=seed, eos_token_id=EOS, pad_token_id=PAD, **options)


def write(model, prompts=PROMPTS, seed=3, eos_token_ids=(EOS,), pad_token_id=PAD, **sampling):
    return generate_completions(model, prompts, Sampling(**sampling), pad_token_id, list(eos_token_ids), seed)


# generate_completions: what comes back


def test_generate_completions_ends_at_the_first_eos_and_keeps_it():
    model = Scripted([[20, EOS, PAD, PAD], [EOS, PAD, PAD, PAD], [20, 21, 22, EOS]])
    assert write(model) == [[20, EOS], [EOS], [20, 21, 22, EOS]]


def test_generate_completions_without_eos_are_cut_off_with_all_their_tokens():
    # A pad id that the model chose itself is a token like others
    assert write(Scripted([[20, PAD, 21], [20, 21, PAD], [20, EOS, 22]])) == [[20, PAD, 21], [20, 21, PAD], [20, EOS]]


def test_generate_completions_pad_equal_to_eos_keeps_one_eos():
    model = Scripted([[20, EOS, EOS, EOS], [EOS, EOS, EOS, EOS], [20, 21, 22, 23]])
    assert write(model, pad_token_id=EOS) == [[20, EOS], [EOS], [20, 21, 22, 23]]


def test_generate_completions_any_of_several_eos_ids_ends_them():
    model = Scripted([[20, 31, PAD], [20, EOS, 31], [32, 20, 21]])
    assert write(model, eos_token_ids=[EOS, 31]) == [[20, 31], [20, EOS], [32, 20, 21]]


def test_generate_completions_no_prompts_is_empty():
    model = Scripted([[1]])
    assert write(model, prompts=[]) == [] and model.calls == []


def test_generate_completions_prompts_are_padded_on_the_left_and_masked_by_length():
    model = Scripted([[EOS], [EOS], [EOS]])
    # The pad id within a prompt is no padding
    assert write(model, prompts=[[5, PAD, 7, 8], [PAD, 11], [12]]) == [[EOS]] * 3
    input_ids, mask, _, training = model.calls[0]
    assert input_ids == [[5, PAD, 7, 8], [PAD, PAD, PAD, 11], [PAD, PAD, PAD, 12]]
    assert mask == [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]
    assert not training


@pytest.mark.parametrize(("size", "sizes"), [(None, [5]), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_generate_completions_in_batches_are_those_of_one(size, sizes):
    prompts, model = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [15]], tiny()
    sampling = Sampling(6, temperature=0.0, rollout_batch_size=size)
    calls, generate = [], model.generate
    model.generate = lambda **inputs: calls.append(inputs["input_ids"].shape) or generate(**inputs)
    found = generate_completions(model, prompts, sampling, PAD, [EOS], seed=0)
    assert found == [generate_completions(tiny(), [prompt], sampling, PAD, [EOS], 0)[0] for prompt in prompts]
    assert [shape[0] for shape in calls] == sizes
    if size == 2:
        assert [shape[1] for shape in calls] == [3, 4, 1]  # each is padded to its own longest prompt


def test_generate_completions_in_batches_draw_apart():
    sampling = Sampling(6, temperature=1.0, rollout_batch_size=1)
    first, second = generate_completions(tiny(), [[5, 6]] * 2, sampling, PAD, [EOS], seed=0)
    assert first != second
    assert generate_completions(tiny(), [[5, 6]] * 2, sampling, PAD, [EOS], seed=0) == [first, second]


def test_generate_completions_leaves_the_prompts_alone():
    prompts = copy.deepcopy(PROMPTS)
    write(Scripted([[EOS]] * 3), prompts=prompts)
    assert prompts == PROMPTS


# Sampling


def test_sampling_fields_reach_the_generation_config():
    sampling = Sampling(17, 0.7, 0.9, 5, 0.05, 1.2, {"no_repeat_ngram_size": 3})
    config = sampling.to_generation_config(PAD, [EOS, 31])
    expected = {
        "max_new_tokens": 17,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.05,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "pad_token_id": PAD,
        "eos_token_id": [EOS, 31],
        "use_cache": True,
    }
    assert {name: getattr(config, name) for name in expected} == expected


def test_sampling_generation_kwargs_win_over_the_fields():
    config = Sampling(top_k=5, generation_kwargs={"top_k": 9, "max_new_tokens": 2}).to_generation_config(PAD, [EOS])
    assert config.top_k == 9 and config.max_new_tokens == 2


def test_sampling_temperature_zero_is_greedy_and_says_nothing_about_sampling():
    config = Sampling(temperature=0.0, top_p=0.5, top_k=3, min_p=0.1).to_generation_config(PAD, [EOS])
    assert config.do_sample is False and config.top_k is None and config.min_p is None


@torch.no_grad()
def greedy_by_hand(model, prompt, length):
    ids = list(prompt)
    for _ in range(length):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
def test_generate_completions_greedy_in_a_batch_equal_each_prompt_alone_by_hand(family):
    model = make_model(family, VOCAB_SIZE, eos_token_id=EOS, pad_token_id=PAD)
    together = write(model, temperature=0.0, max_completion_length=8)
    assert together == [greedy_by_hand(model, prompt, 8) for prompt in PROMPTS]
    for prompt, completion in zip(PROMPTS, together, strict=True):
        assert write(model, prompts=[prompt], temperature=0.0, max_completion_length=8) == [completion]


def test_generate_completions_greedy_does_not_depend_on_the_seed():
    model = tiny()
    assert write(model, seed=1, temperature=0.0, max_completion_length=8) == write(
        model, seed=2, temperature=0.0, max_completion_length=8
    )


def test_generate_completions_first_tokens_follow_the_model_s_distribution():
    model, rows = tiny(), 4000
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    completions = write(model, prompts=[PROMPTS[0]] * rows, max_completion_length=1)
    observed = torch.bincount(torch.tensor(completions).squeeze(1), minlength=VOCAB_SIZE) / rows
    # A z-score above 5 among 50 tokens has a chance of 3e-5, and the seed is fixed
    deviation = (observed - expected).abs() / (expected * (1 - expected) / rows).sqrt()
    assert deviation[expected > 1e-3].max() < 5 and (expected > 1e-3).sum() > 10
    assert observed[expected < 1e-5].sum() == 0


@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "peft"])
def test_generate_completions_the_model_s_own_generation_config_is_not_applied(wrap):
    def build():
        model = tiny()
        return get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if wrap else model

    shipped = build()
    owner = shipped.get_base_model() if wrap else shipped
    options = {"top_k": 1, "repetition_penalty": 5.0, "temperature": 0.1, "min_new_tokens": 6, "suppress_tokens": [20]}
    owner.generation_config = GenerationConfig(do_sample=True, eos_token_id=2, pad_token_id=PAD, **options)
    prompts = PROMPTS * 4
    expected = write(build(), prompts=prompts, max_completion_length=8)
    assert write(shipped, prompts=prompts, max_completion_length=8) == expected
    assert len({tuple(ids) for ids in expected}) > 6


@pytest.mark.parametrize("limits", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}])
def test_generate_completions_narrow_sampling_is_greedy(limits):
    model = tiny()
    assert write(model, max_completion_length=8, **limits) == write(model, temperature=0.0, max_completion_length=8)


def test_generate_completions_same_seed_same_tokens_and_another_seed_others():
    model, prompts = tiny(), PROMPTS * 4
    first = write(model, prompts=prompts, seed=5, max_completion_length=8)
    torch.rand(7)
    assert write(model, prompts=prompts, seed=5, max_completion_length=8) == first
    assert write(model, prompts=prompts, seed=6, max_completion_length=8) != first


# generate_completions: what it leaves as it was


def state_of(model):
    return model.training, copy.deepcopy(model.generation_config), torch.get_rng_state(), random.getstate()


def assert_same_state(model, state, config):
    training, generation_config, rng, python_rng = state
    assert model.training is training and model.generation_config is config
    assert model.generation_config.to_dict() == generation_config.to_dict()
    assert torch.equal(torch.get_rng_state(), rng) and random.getstate() == python_rng


@pytest.mark.parametrize("training", [True, False])
def test_generate_completions_leaves_mode_config_and_global_rng(training):
    model = tiny().train(training)
    model.generation_config.top_k = 3
    state, config = state_of(model), model.generation_config
    write(model, max_completion_length=8)
    assert_same_state(model, state, config)


@pytest.mark.parametrize("training", [True, False])
def test_generate_completions_leaves_mode_config_and_global_rng_after_an_exception(training):
    model = Scripted([[EOS]] * 3, error=RuntimeError("out of memory")).train(training)
    state, config = state_of(model), model.generation_config
    with pytest.raises(RuntimeError, match="out of memory"):
        write(model)
    assert model.calls[0][2] is not config and model.calls[0][3] is False
    assert_same_state(model, state, config)


def test_generate_completions_leaves_parameters_without_gradient_and_unchanged():
    model = tiny().train()
    before = [parameter.clone() for parameter in model.parameters()]
    write(model, max_completion_length=4)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))


# rollout_seed, distinct_n, completed_row


def test_rollout_seed_is_a_function_of_all_numbers_and_their_order():
    seeds = [rollout_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)]
    assert len(set(seeds)) == 125 and all(0 <= seed < 2**63 for seed in seeds)
    # Fixed for good, or a resumed run would draw otherwise: the first 63 bits of `printf '(42, 0)' | sha256sum`
    assert rollout_seed(42, 0) == 6900430188448126093


@pytest.mark.parametrize(
    ("completions", "n", "expected"),
    [
        ([[1, 2, 3], [1, 2]], 2, 2 / 3),
        ([[1, 2, 1, 2, 1]], 2, 0.5),
        ([[1, 1], [1]], 1, 1 / 3),
        ([[1], []], 2, 0.0),
        ([], 2, 0.0),
    ],
)
def test_distinct_n_literal_completions_have_the_share_by_hand(completions, n, expected):
    assert distinct_n(completions, n) == pytest.approx(expected)


def test_completed_row_trains_the_completion_alone():
    assert completed_row([5, 6], [7, EOS]) == {
        "input_ids": [5, 6, 7, EOS],
        "labels": [-100, -100, 7, EOS],
        "prompt_length": 2,
    }


# draw_on_policy


@pytest.mark.parametrize(
    ("rows", "lmbda"),
    [
        (8, 0.5),
        (8, 0.25),
        (10, 0.3),
        (10, 0.1),
        (7, 1 / 7),
        (3, 1 / 3),
        (100, 0.07),
        (1000, 0.999),
        (5, 0.0),
        (5, 1.0),
    ],
)
def test_draw_on_policy_whole_share_is_exact_at_every_step(rows, lmbda):
    for step in range(200):
        drawn = draw_on_policy(rows, lmbda, seed=0, step=step)
        assert len(drawn) == rows and sum(drawn) == round(rows * lmbda)


@pytest.mark.parametrize(("offset", "lmbda"), [(0.0, 0.29), (1 - 2**-53, 0.07)])
def test_draw_on_policy_whole_share_is_exact_where_floats_are_not(monkeypatch, offset, lmbda):
    # 100 * 0.29 is below 29 and 100 * 0.07 above 7
    monkeypatch.setattr(random.Random, "random", lambda self: offset)
    assert sum(draw_on_policy(100, lmbda, seed=0, step=0)) == round(100 * lmbda)


@pytest.mark.parametrize(("rows", "lmbda"), [(7, 0.5), (3, 0.25), (10, 0.33), (1, 0.4)])
def test_draw_on_policy_broken_share_is_rounded_up_or_down(rows, lmbda):
    counts = {sum(draw_on_policy(rows, lmbda, seed=0, step=step)) for step in range(200)}
    assert counts == {math.floor(rows * lmbda), math.ceil(rows * lmbda)}


@pytest.mark.parametrize(("rows", "lmbda"), [(8, 0.5), (7, 0.5), (5, 0.3), (1, 0.4)])
def test_draw_on_policy_each_row_is_drawn_with_its_share_over_steps(rows, lmbda):
    steps = 4000
    drawn = torch.tensor([draw_on_policy(rows, lmbda, seed=1, step=step) for step in range(steps)]).double()
    # Five standard errors of a share; the seed is fixed
    assert (drawn.mean(0) - lmbda).abs().max() < 5 * math.sqrt(lmbda * (1 - lmbda) / steps)


def test_draw_on_policy_is_a_function_of_seed_and_step():
    draws = {(seed, step): tuple(draw_on_policy(9, 0.4, seed, step)) for seed in range(8) for step in range(8)}
    state = random.getstate()
    random.seed(0)
    assert draws == {(a, b): tuple(draw_on_policy(9, 0.4, a, b)) for a, b in draws}
    random.setstate(state)
    assert len({draws[0, step] for step in range(8)}) > 1 and len({draws[seed, 0] for seed in range(8)}) > 1


def test_draw_on_policy_rows_spread_over_micro_batches():
    # Each four neighbours hold two, so no micro-batch and no rank waits for another
    for step in range(100):
        drawn = draw_on_policy(16, 0.5, seed=0, step=step)
        assert [sum(drawn[i : i + 4]) for i in range(0, 16, 4)] == [2, 2, 2, 2]


# RolloutWriter

COLLATOR = KDCollator(pad_token_id=PAD)


def data_rows(count, with_completion=lambda index: True):
    rows = []
    for index in range(count):
        prompt = [10 + index] * (1 + index % 3)
        completion = [30 + index, PAD, EOS] if with_completion(index) else []
        rows.append(completed_row(prompt, completion) | {"is_on_policy": False})
    return rows


def batches_of(rows, size):
    return [COLLATOR(rows[i : i + size]) for i in range(0, len(rows), size)]


class Writer:
    """Answers each prompt with its first token, a mark, and the seed's last digit; keeps the calls."""

    def __init__(self, mark):
        self.mark, self.prompts, self.seeds = mark, [], []

    def __call__(self, prompts, seed):
        self.prompts += prompts
        self.seeds.append(seed)
        return [[prompt[0], self.mark, EOS] for prompt in prompts]


def replaced_rows(batches):
    return [row for batch in batches for row in rows_of(batch)]


def rollout_writer(lmbda=0.5, rewrite_off_policy=False, **options):
    return RolloutWriter(COLLATOR, lmbda, rewrite_off_policy, seed=0, **options)


@pytest.mark.parametrize("step", range(4))
def test_rollout_writer_replaces_the_drawn_rows_and_no_other(step):
    rows, student, teacher = data_rows(8), Writer(48), Writer(49)
    batches = batches_of(rows, 4)
    writer = rollout_writer()
    result = replaced_rows(writer.replace(batches, step, student, teacher))
    drawn = draw_on_policy(8, 0.5, seed=0, step=step)
    for row, before, on_policy in zip(result, rows, drawn, strict=True):
        prompt = before["input_ids"][: before["prompt_length"]]
        if on_policy:
            assert row == completed_row(prompt, [prompt[0], 48, EOS]) | {"is_on_policy": True}
        else:
            assert row == before
    prompts = [before["input_ids"][: before["prompt_length"]] for before, d in zip(rows, drawn, strict=True) if d]
    assert student.prompts == writer.last_prompts == prompts and teacher.prompts == []
    assert writer.last_completions == [[prompt[0], 48, EOS] for prompt in prompts]


def test_rollout_writer_share_of_zero_hands_the_same_batches_back():
    batches = batches_of(data_rows(8), 4)
    before = copy.deepcopy(batches)
    result = rollout_writer(lmbda=0.0).replace(batches, 0, Writer(48), Writer(49))
    assert all(a is b for a, b in zip(result, batches, strict=True))
    for batch, copied in zip(batches, before, strict=True):
        assert all(torch.equal(batch[name], copied[name]) for name in copied)


def test_rollout_writer_leaves_the_given_batches_unchanged():
    batches = batches_of(data_rows(8), 4)
    before = copy.deepcopy(batches)
    rollout_writer(lmbda=1.0).replace(batches, 0, Writer(48), Writer(49))
    for batch, copied in zip(batches, before, strict=True):
        assert all(torch.equal(batch[name], copied[name]) for name in copied)


def test_rollout_writer_share_of_one_replaces_all():
    result = replaced_rows(rollout_writer(lmbda=1.0).replace(batches_of(data_rows(8), 4), 0, Writer(48), Writer(49)))
    assert all(row["is_on_policy"] and 48 in row["labels"] for row in result)


def test_rollout_writer_teacher_writes_only_rows_without_a_completion():
    rows = data_rows(8, with_completion=lambda index: index % 3 == 0)
    student, teacher = Writer(48), Writer(49)
    result = replaced_rows(rollout_writer().replace(batches_of(rows, 4), 1, student, teacher))
    drawn = draw_on_policy(8, 0.5, seed=0, step=1)
    for index, (row, before) in enumerate(zip(result, rows, strict=True)):
        prompt = before["input_ids"][: before["prompt_length"]]
        if drawn[index]:
            assert row["is_on_policy"] and row["labels"][-2] == 48
        elif index % 3 == 0:
            assert row == before
        else:
            assert row == completed_row(prompt, [prompt[0], 49, EOS]) | {"is_on_policy": False}
    assert len(student.prompts) == 4 and len(teacher.prompts) == sum(
        not drawn[index] and index % 3 != 0 for index in range(8)
    )


def test_rollout_writer_rewriting_teacher_writes_every_row_that_is_not_drawn():
    rows, student, teacher = data_rows(8), Writer(48), Writer(49)
    result = replaced_rows(rollout_writer(rewrite_off_policy=True).replace(batches_of(rows, 4), 1, student, teacher))
    drawn = draw_on_policy(8, 0.5, seed=0, step=1)
    assert [row["labels"][-2] for row in result] == [48 if d else 49 for d in drawn]
    assert [row["is_on_policy"] for row in result] == drawn
    assert all(row["prompt_length"] == before["prompt_length"] for row, before in zip(result, rows, strict=True))


def test_rollout_writer_one_writer_for_both_marks_the_student_s_rows_alone():
    both = Writer(48)
    result = replaced_rows(rollout_writer(rewrite_off_policy=True).replace(batches_of(data_rows(8), 4), 1, both, both))
    assert [row["is_on_policy"] for row in result] == draw_on_policy(8, 0.5, seed=0, step=1)


def test_rollout_writer_seeds_differ_by_writer_step_and_rank():
    seeds = []
    for step in (0, 1):
        for rank in (0, 1):
            student, teacher = Writer(48), Writer(49)
            writer = rollout_writer(rewrite_off_policy=True, rank=rank, world_size=2)
            writer.replace(batches_of(data_rows(8), 4), step, student, teacher)
            seeds += student.seeds + teacher.seeds
    assert len(seeds) == len(set(seeds)) == 2 * 2 * 2
    again = Writer(48)
    rollout_writer(rewrite_off_policy=True, rank=1, world_size=2).replace(
        batches_of(data_rows(8), 4), 1, again, Writer(49)
    )
    assert again.seeds == student.seeds


@pytest.mark.parametrize("size", [1, 2, 4])
def test_rollout_writer_asks_each_model_once_for_all_micro_batches(size):
    rows, student, teacher = data_rows(8, with_completion=lambda index: index % 3 == 0), Writer(48), Writer(49)
    result = replaced_rows(rollout_writer().replace(batches_of(rows, size), 3, student, teacher))
    assert len(student.seeds) == len(teacher.seeds) == 1
    one, other = Writer(48), Writer(49)
    assert result == replaced_rows(rollout_writer().replace(batches_of(rows, 8), 3, one, other))
    assert (student.seeds, student.prompts, teacher.seeds) == (one.seeds, one.prompts, other.seeds)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("lmbda", [0.5, 0.3])
def test_rollout_writer_drawn_rows_do_not_depend_on_micro_batches_and_ranks(size, world_size, lmbda):
    rows = data_rows(16)
    # The loader deals micro-batches out to the ranks in turn
    dealt = batches_of(rows, size)
    result = {}
    for rank in range(world_size):
        indices = range(rank, len(dealt), world_size)
        writer = rollout_writer(lmbda=lmbda, rank=rank, world_size=world_size)
        replaced = writer.replace([dealt[i] for i in indices], 5, Writer(48), Writer(49))
        result.update(zip(indices, replaced, strict=True))
    on_policy = [row["is_on_policy"] for row in replaced_rows(result[i] for i in range(len(dealt)))]
    assert on_policy == draw_on_policy(16, lmbda, seed=0, step=5)


def test_rollout_writer_last_micro_batch_may_be_smaller():
    rows = data_rows(7)
    result = replaced_rows(rollout_writer().replace(batches_of(rows, 4), 5, Writer(48), Writer(49)))
    assert [row["is_on_policy"] for row in result] == draw_on_policy(7, 0.5, seed=0, step=5)


def test_rollout_writer_asks_the_student_without_prompts_too():
    # Another rank may have some
    batches, calls = batches_of(data_rows(2), 2), []
    writer = rollout_writer(lmbda=1e-6)
    (batch,) = writer.replace(batches, 0, lambda prompts, seed: calls.append(prompts) or [], Writer(49))
    assert calls == [[]] and batch is batches[0]


def test_rollout_writer_last_lists_are_of_the_last_step():
    writer = rollout_writer(lmbda=1.0)
    writer.replace(batches_of(data_rows(8), 4), 0, Writer(48), Writer(49))
    writer.replace(batches_of(data_rows(2), 2), 1, Writer(47), Writer(49))
    assert writer.last_completions == [[10, 47, EOS], [11, 47, EOS]]


def test_rollout_writer_real_student_trains_what_it_wrote():
    model, writer = tiny(), rollout_writer(lmbda=1.0)

    def student(prompts, seed):
        return write(model, prompts=prompts, seed=seed, max_completion_length=6)

    (batch,) = writer.replace([COLLATOR(data_rows(4))], 0, student, Writer(49))
    for row, prompt, completion in zip(rows_of(batch), writer.last_prompts, writer.last_completions, strict=True):
        assert row["input_ids"] == prompt + completion and row["labels"] == [-100] * len(prompt) + completion
        assert 1 <= len(completion) <= 6 and EOS not in completion[:-1]
    assert (batch["labels"] != -100).sum().item() == sum(map(len, writer.last_completions))


def test_sampling_of_config_takes_its_fields_and_keeps_defaults_for_what_is_unset():
    config = SimpleNamespace(
        max_completion_length=7, temperature=0.0, top_p=0.8, top_k=5, min_p=0.1, repetition_penalty=1.2, other=1
    )
    expected = Sampling(7, 0.0, 0.8, 5, 0.1, 1.2)
    assert Sampling.of(config) == expected
    config.generation_kwargs, config.min_p = {"length_penalty": 2.0}, None
    assert Sampling.of(config) == Sampling(7, 0.0, 0.8, 5, None, 1.2, {"length_penalty": 2.0})

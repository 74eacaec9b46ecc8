"""Evaluations from models to the store, against plain loops, cut off, and with models that cannot be evaluated."""

import logging
import math
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rouge_score import rouge_scorer
from transformers import AutoModelForCausalLM

from tests.evaluation.runs import (
    DOUBLE,
    METRICS,
    OTHER_TEXT,
    ROWS,
    bare,
    changed_copy,
    contents,
    eager,
    evaluate,
    mean_divergences,
    mean_nll,
    next_log_probs,
    other_vocabulary,
    read_answer,
    save,
    says_eos,
    student_of,
    task,
)
from tests.tiny import make_model, make_tokenizer
from trl_kd.evaluation import EvalModel, EvalRow, ResultStore, compare_run, runner
from trl_kd.generation import rollout_seed


SEEDS = (3, 8)
NAMES = ("teacher", "student")
SAMPLING = {"temperature": 0.8, "top_p": 0.9, "top_k": 40}


def pair(teacher: str, student: str, **kwargs) -> list[EvalModel]:
    return [student_of(student, **kwargs), student_of(teacher, "teacher", "teacher", **kwargs)]


@pytest.fixture(scope="module")
def student_path(student_path, tmp_path_factory):
    return changed_copy(student_path, tmp_path_factory.mktemp("eager_student"), eager)


@pytest.fixture(scope="module")
def teacher_path(teacher_path, tmp_path_factory):
    return changed_copy(teacher_path, tmp_path_factory.mktemp("eager_teacher"), eager)


@pytest.fixture(scope="module")
def run(tmp_path_factory, teacher_path, student_path):
    """A teacher and a student on five prompts with two seeds, in float64."""
    models = pair(teacher_path, student_path, init_kwargs=DOUBLE)
    return evaluate(tmp_path_factory.mktemp("run") / "r.sqlite", models, **SAMPLING)


@pytest.fixture(scope="module")
def models(teacher_path, student_path):
    paths = {"teacher": teacher_path, "student": student_path}
    return {name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for name, path in paths.items()}


@pytest.fixture
def calls(monkeypatch):
    """Counts the batches that are generated; `calls.limit` is how many may be before the power fails."""

    class Calls(list):
        limit = None

    found, original = Calls(), runner.generate_completions

    def counted(model, prompts, *args, **kwargs):
        if len(found) == found.limit:
            raise KeyboardInterrupt
        found.append(len(prompts))
        return original(model, prompts, *args, **kwargs)

    monkeypatch.setattr(runner, "generate_completions", counted)
    return found


# What is measured


@torch.no_grad()
def generated(model, tokenizer, prompts: list[str], seed: int) -> list[list[int]]:
    """What `generate` writes for one batch, padded on the left, up to and with the first EOS."""
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    width = max(map(len, ids))
    padded = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in ids])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        output = model.generate(
            padded,
            attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]),
            **SAMPLING,
            do_sample=True,
            max_new_tokens=8,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    written = []
    for row in output[:, width:].tolist():
        end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
        written.append(row[:end])
    return written


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", NAMES)
def test_run_completions_are_what_generate_writes_under_the_seed_of_each_batch(run, models, tokenizer, name, seed):
    store, number = run
    samples = store.samples(number, name, seed)
    prompts, expected = [row.prompt for row in ROWS], []
    for batch, start in enumerate((0, 3)):
        expected += generated(models[name], tokenizer, prompts[start : start + 3], rollout_seed(seed, batch))
    assert [sample.token_ids for sample in samples] == expected
    assert [sample.completion for sample in samples] == [
        tokenizer.decode(ids, skip_special_tokens=True) for ids in expected
    ]
    assert [sample.ended for sample in samples] == [ids[-1] == tokenizer.eos_token_id for ids in expected]
    assert [(sample.index, sample.prompt, tuple(sample.references)) for sample in samples] == [
        (row.index, row.prompt, row.references) for row in ROWS
    ]


def test_run_pieces_are_kept_once_and_make_up_the_completion(run):
    store, number = run
    for sample in store.samples(number, "student", SEEDS[0]):
        assert len(sample.tokens) == len(sample.token_ids)
        text = "".join(sample.tokens)
        # Half a character at the end is no piece
        assert sample.completion.startswith(text) and set(sample.completion[len(text) :]) <= {"\ufffd"}
    assert all(sample.tokens == [] for sample in store.samples(number, "student", SEEDS[1]))


@pytest.mark.parametrize("name", NAMES)
def test_run_likelihood_of_the_references_equals_a_loop(run, models, tokenizer, name):
    store, number = run
    for seed in SEEDS:
        for row, sample in zip(ROWS, store.samples(number, name, seed), strict=True):
            prompt, answer = read_answer(tokenizer, row.prompt, row.references[0])
            nll, size = mean_nll(models[name], prompt, answer), len(row.references[0].encode("utf-8"))
            assert sample.values["nll"] == pytest.approx((nll, len(answer)), rel=1e-9)
            bits = nll * len(answer) / math.log(2) / size
            assert sample.values["bits_per_byte"] == pytest.approx((bits, size), rel=1e-9)
    assert len(ROWS[1].references[0].encode()) == len(ROWS[1].references[0]) + 4  # ï, é, and a dash of three bytes


@pytest.mark.parametrize("name", NAMES)
def test_run_divergences_equal_a_loop_over_references_and_own_completions(run, models, tokenizer, name):
    store, number = run
    student, teacher = models[name], models["teacher"]
    for row, sample in zip(ROWS, store.samples(number, name, SEEDS[1]), strict=True):
        prompt, answer = read_answer(tokenizer, row.prompt, row.references[0])
        on_data = mean_divergences(student, teacher, prompt, answer)
        own = mean_divergences(student, teacher, prompt, sample.token_ids)
        expected = {key: (on_data[key], len(answer)) for key in ("forward_kl", "reverse_kl", "total_variation")}
        expected |= {f"own_{key}": (value, len(sample.token_ids)) for key, value in own.items()}
        expected["own_teacher_nll"] = (mean_nll(teacher, prompt, sample.token_ids), len(sample.token_ids))
        for key, value in expected.items():
            # float64, sums of a few thousand terms
            assert sample.values[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key
        if name == "student":
            assert own["reverse_kl"] > 0.1 and abs(own["reverse_kl"] - own["forward_kl"]) > 0.01


def test_run_divergence_of_each_token_is_the_total_variation_there(run, models, tokenizer):
    store, number = run
    by_position = {}
    for seed in SEEDS:
        for row, sample in zip(ROWS, store.samples(number, "student", seed), strict=True):
            prompt = tokenizer(row.prompt).input_ids
            states = [next_log_probs(models[name], prompt, sample.token_ids) for name in NAMES]
            expected = [
                sum(abs(math.exp(a) - math.exp(b)) for a, b in zip(p, q, strict=True)) / 2
                for p, q in zip(*states, strict=True)
            ]
            # Rounded for the page that shows them
            assert sample.divergence == pytest.approx(expected, abs=5.1e-5)
            for position, value in enumerate(sample.divergence):
                by_position.setdefault(position, []).append(value)
    found = store.details(number, "student", "by_position")
    assert found["count"] == [len(by_position[position]) for position in range(8)]
    assert found["count"][0] == 10 > found["count"][-1]
    assert found["total_variation"] == pytest.approx([sum(v) / len(v) for v in by_position.values()])
    assert store.details(number, "teacher", "by_position")["total_variation"] == [0.0] * 8


def test_run_text_measures_are_those_of_each_completion(run):
    store, number = run
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    for sample in store.samples(number, "student", SEEDS[0]):
        best = max(scorer.score(text, sample.completion)["rougeL"].fmeasure for text in sample.references)
        assert sample.values["rouge_l"] == pytest.approx((100 * best, 1.0))
        assert sample.values["length"] == (len(sample.token_ids), 1.0)
        assert sample.values["eos_share"] == (100.0 * sample.ended, 1.0)


def test_run_results_are_weighted_means_per_seed(run):
    store, number = run
    found = {(name, metric, seed): value for name, metric, seed, value in contents(store, number)["results"]}
    means = {}
    for name in NAMES:
        for seed in SEEDS:
            samples = store.samples(number, name, seed)
            for metric in samples[0].values:
                pairs = [sample.values[metric] for sample in samples]
                means[name, metric, seed] = sum(v * w for v, w in pairs) / sum(w for _, w in pairs)
            words = [sample.completion.split() for sample in samples]
            bigrams = [pair for text in words for pair in zip(text, text[1:], strict=False)]
            assert bigrams or name == "student"
            if bigrams:
                assert means[name, "distinct_2", seed] == pytest.approx(len(set(bigrams)) / len(bigrams))
    for seed in SEEDS:
        for name in NAMES:
            gap = means[name, "own_teacher_nll", seed] - means["teacher", "own_teacher_nll", seed]
            means[name, "imitation_gap", seed] = gap
    assert found == pytest.approx(means)
    assert found["teacher", "imitation_gap", 3] == 0.0 and abs(found["student", "imitation_gap", 3]) > 0.1
    assert {metric for name, metric, _ in found if name == "student"} == {*METRICS, "own_teacher_nll"}


def test_run_says_what_it_was_made_from(run, teacher_path, student_path):
    store, number = run
    info = store.run(number)
    assert [(model.name, model.role, model.source) for model in info.models] == [
        ("teacher", "teacher", teacher_path),
        ("student", "student", student_path),
    ]
    assert info.kind == "eval" and info.name == "plain" and info.dataset == "rows" and info.seeds == list(SEEDS)
    assert info.settings["batch_size"] == 3 and info.settings["temperature"] == 0.8
    assert info.versions.keys() >= {"trl_kd", "torch", "transformers"}
    assert info.finished is not None


def test_run_leaves_the_random_state_alone(tmp_path, student_path):
    state = torch.get_rng_state()
    evaluate(tmp_path / "r.sqlite", [student_of(student_path)], bare(), seeds=[1])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("progress", [False, True])
def test_run_progress_can_be_shown_and_reaches_its_end(progress, tmp_path, teacher_path, student_path, capsys):
    work = task(pair(teacher_path, student_path), ROWS[:2], batch_size=1, seeds=[1, 2])
    work.progress = progress
    with work.begin(ResultStore(tmp_path / "r.sqlite")) as run:
        work.run(run)
    shown = capsys.readouterr().err
    # Two models, two batches, once for the references and once for each seed
    assert ("Evaluating" in shown) == ("12/12" in shown) == progress


# Seeds and resuming


def test_run_same_seeds_give_identical_values(run, tmp_path, teacher_path, student_path):
    again = evaluate(tmp_path / "r.sqlite", pair(teacher_path, student_path, init_kwargs=DOUBLE), **SAMPLING)
    assert contents(*again) == contents(*run)


def test_run_other_seeds_give_other_completions(run, tmp_path, teacher_path, student_path):
    store, number = run
    seeds = [3, 9]
    models = pair(teacher_path, student_path, init_kwargs=DOUBLE)
    again, second = evaluate(tmp_path / "r.sqlite", models, seeds=seeds, **SAMPLING)
    texts = {seed: [s.token_ids for s in store.samples(number, "student", seed)] for seed in SEEDS}
    assert texts[3] != texts[8]
    assert [s.token_ids for s in again.samples(second, "student", 3)] == texts[3]
    assert [s.token_ids for s in again.samples(second, "student", 9)] not in texts.values()


@pytest.mark.parametrize("limit", [0, 3, 5, 7])
def test_run_cut_off_goes_on_and_ends_as_if_it_had_not_been(limit, calls, run, tmp_path, teacher_path, student_path):
    """Two models, two seeds, five prompts in batches of three: eight batches."""
    models = pair(teacher_path, student_path, init_kwargs=DOUBLE)
    store, work = ResultStore(tmp_path / "r.sqlite"), task(models, **SAMPLING)
    calls.limit = limit
    with pytest.raises(KeyboardInterrupt), work.begin(store) as first:
        work.run(first)
    kept = {name: [len(store.samples(first.id, name, seed)) for seed in SEEDS] for name in NAMES}
    assert sum(map(sum, kept.values())) == sum(calls) == sum(([3, 2] * 4)[:limit])
    calls.clear()
    calls.limit = None
    with work.begin(store) as again:
        assert again.resumed and again.id == first.id
        work.run(again)
        again.finish()
    assert calls == ([3, 2] * 4)[limit:]
    assert contents(store, again.id) == contents(*run)


def test_run_cut_off_after_the_texts_and_before_their_measures_measures_them(
    calls, tmp_path, student_path, monkeypatch
):
    whole = evaluate(tmp_path / "whole.sqlite", [student_of(student_path)])
    store, work = ResultStore(tmp_path / "r.sqlite"), task([student_of(student_path)])

    def fail(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_measure_texts", fail)
        with pytest.raises(KeyboardInterrupt), work.begin(store) as run:
            work.run(run)
    calls.clear()
    with work.begin(store) as again:
        work.run(again)
        again.finish()
    assert again.id == run.id and calls == [3, 2]
    assert contents(store, run.id) == contents(*whole)


@pytest.mark.parametrize("change", ["prompt", "reference", "setting", "batch_size", "weights", "role"])
def test_run_cut_off_does_not_go_on_with_another_question(change, calls, tmp_path, student_path, teacher_path):
    store = ResultStore(tmp_path / "r.sqlite")
    calls.limit = 1
    with pytest.raises(KeyboardInterrupt), (work := task([student_of(student_path)])).begin(store) as run:
        work.run(run)
    rows, kwargs, model = list(ROWS), {}, student_of(student_path)
    if change == "prompt":
        rows[4] = EvalRow(4, "Fish.", rows[4].references)
    elif change == "reference":
        rows[4] = EvalRow(4, "Fish", (" swim",))
    elif change == "setting":
        kwargs["top_p"] = 0.5
    elif change == "batch_size":
        kwargs["batch_size"] = 2
    elif change == "weights":
        model = student_of(teacher_path)
    else:
        model = student_of(student_path, role="other")
    with task([model], rows, **kwargs).begin(store) as other:
        assert not other.resumed and other.id != run.id


# Kinds of models


@pytest.fixture(scope="module")
def across(tmp_path_factory, teacher_path, student_path):
    """A teacher, a student that cuts texts into other tokens, and one that doesn't."""
    path = other_vocabulary(tmp_path_factory.mktemp("other"))
    models = [*pair(teacher_path, path, init_kwargs=DOUBLE), student_of(student_path, "near", init_kwargs=DOUBLE)]
    return *evaluate(tmp_path_factory.mktemp("across") / "r.sqlite", models), models[0]


def test_run_across_vocabularies_leaves_divergences_out_and_keeps_the_rest(across):
    store, number, _ = across
    same = {"forward_kl", "reverse_kl", "total_variation"}
    same |= {"own_forward_kl", "own_reverse_kl", "own_total_variation", "own_entropy"}
    assert same <= set(store.metrics(number, "near"))
    assert set(store.metrics(number, "student")) == set(store.metrics(number, "near")) - same
    assert store.details(number, "student", "by_position") is None
    for seed in SEEDS:
        assert all(sample.divergence is None for sample in store.samples(number, "student", seed))


def test_run_across_vocabularies_each_reads_in_its_own_tokens(across, models, tokenizer):
    store, number, other = across
    model = other.load()
    seen = Counter()
    for seed in SEEDS:
        for row, sample in zip(ROWS, store.samples(number, "student", seed), strict=True):
            prompt, answer = read_answer(other.tokenizer, row.prompt, row.references[0])
            nll, size = mean_nll(model, prompt, answer), len(row.references[0].encode())
            assert sample.values["nll"] == pytest.approx((nll, len(answer)), rel=1e-9)
            bits = nll * len(answer) / math.log(2) / size
            assert sample.values["bits_per_byte"] == pytest.approx((bits, size), rel=1e-9)
            # The teacher judges the text, with an end only if the student ended it
            prompt, text = read_answer(tokenizer, row.prompt, sample.completion, sample.ended)
            assert sample.completion.strip() or text == [tokenizer.eos_token_id] * sample.ended
            expected = (mean_nll(models["teacher"], prompt, text), len(text)) if text else (0, 0)
            assert sample.values["own_teacher_nll"] == pytest.approx(expected, rel=1e-9)
            seen[sample.ended] += 1
    assert min(seen[True], seen[False]) > 0


def test_run_across_vocabularies_compares_bits_and_gap_but_not_nats_per_token(across):
    store, number, _ = across
    teacher, student, near = compare_run(store, number).models
    assert {"bits_per_byte", "imitation_gap", "rouge_l"} <= student.to_teacher.keys()
    assert "nll" in student.estimates and "nll" not in student.to_teacher
    assert "nll" in near.to_teacher and "own_reverse_kl" in near.estimates
    assert "own_reverse_kl" not in student.estimates and student.estimates["imitation_gap"].value != 0


def test_run_across_vocabularies_empty_completions_count_by_their_end(tmp_path, teacher_path):
    tokenizer = make_tokenizer(OTHER_TEXT, vocab_size=330)
    # As likely as all other tokens together: of 24 texts, some end at once and some don't
    path = says_eos(tmp_path / "short", tokenizer, math.log(len(tokenizer)))
    rows = [EvalRow(index, "Fish", ()) for index in range(24)]
    settings = {"seeds": [0], "metrics": ["length"], "max_completion_length": 1}
    store, number = evaluate(tmp_path / "r.sqlite", pair(teacher_path, path), rows, batch_size=24, **settings)
    empty = {True: [], False: []}
    for sample in store.samples(number, "student", 0):
        assert sample.ended == (sample.token_ids == [tokenizer.eos_token_id])
        empty[not sample.completion.strip()].append(sample.values["own_teacher_nll"])
    # Of a text without a word the teacher reads the end, one token; it is the same for each
    assert len(set(empty[True])) == 1 and empty[True][0][0] > 0 and empty[True][0][1] == 1
    assert empty[False] and min(weight for _, weight in empty[False]) > 0


def test_run_copy_of_the_teacher_is_not_distinguishable_from_it(tmp_path, teacher_path):
    copy = changed_copy(teacher_path, tmp_path / "copy", lambda model: None)
    store, number = evaluate(tmp_path / "r.sqlite", pair(teacher_path, copy))
    for seed in SEEDS:
        texts = [[sample.completion for sample in store.samples(number, name, seed)] for name in NAMES]
        assert texts[0] == texts[1]
    comparison = compare_run(store, number)
    teacher, student = comparison.models
    for metric in ("imitation_gap", "total_variation", "own_total_variation", "own_reverse_kl", "forward_kl"):
        assert student.estimates[metric].value == pytest.approx(0.0, abs=1e-9), metric
    assert student.to_teacher.keys() == set(METRICS)
    assert {change.verdict for change in student.to_teacher.values()} == {"not distinguishable at 95 %"}
    assert (
        "student is not distinguishable from the teacher at 95 % by any of these measures." in comparison.sentences()
    )


def test_run_adapter_is_read_over_its_base(tmp_path, student_path, tokenizer):
    """An adapter that adds nothing writes what its base writes; one that adds something does not."""
    adapters = {}
    for name in ("zero", "full"):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(student_path), LoraConfig(r=2))
        if name == "full":
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if "lora_B" in key:
                        parameter.fill_(0.5)
        model.save_pretrained(tmp_path / name)
        adapters[name] = student_of(str(tmp_path / name), name)
    models = [student_of(student_path, "base", "before"), *adapters.values()]
    store, number = evaluate(tmp_path / "r.sqlite", models, seeds=[3])
    texts = {model.name: [s.token_ids for s in store.samples(number, model.name, 3)] for model in models}
    assert texts["zero"] == texts["base"] != texts["full"]
    changes = {model.name: model.changes for model in compare_run(store, number).models}
    assert changes["zero"]["nll"].estimate.value == pytest.approx(0.0, abs=1e-6)
    assert abs(changes["full"]["nll"].estimate.value) > 0.01


def test_run_model_objects_find_what_their_folders_find(tmp_path, teacher_path, student_path, tokenizer):
    loaded = {
        name: AutoModelForCausalLM.from_pretrained(path)
        for name, path in zip(NAMES, (teacher_path, student_path), strict=True)
    }
    loaded["student"].train()
    objects = [
        EvalModel(name, model, "teacher" if name == "teacher" else "student", tokenizer)
        for name, model in loaded.items()
    ]
    by_object = evaluate(tmp_path / "objects.sqlite", objects, seeds=[3])
    by_path = evaluate(tmp_path / "paths.sqlite", pair(teacher_path, student_path), seeds=[3])
    assert contents(*by_object) == contents(*by_path)
    assert loaded["student"].training


def test_run_chat_writes_prompts_in_the_template(tmp_path, student_path, tokenizer, models):
    path, rows = tmp_path / "r.sqlite", ROWS[:2]
    as_text = evaluate(path, [student_of(student_path, init_kwargs=DOUBLE)], rows, seeds=[3], chat=True)
    turns = [EvalRow(row.index, [{"role": "user", "content": row.prompt}], row.references) for row in rows]
    as_turns = evaluate(path, [student_of(student_path, init_kwargs=DOUBLE)], turns, seeds=[3], chat=False)
    ids = [
        [sample.token_ids for sample in store.samples(number, "student", 3)] for store, number in (as_text, as_turns)
    ]
    assert ids[0] == ids[1]
    store, number = as_text
    for row, sample in zip(rows, store.samples(number, "student", 3), strict=True):
        prompt = tokenizer(f"<|im_start|>user\n{row.prompt}<|im_end|>\n<|im_start|>assistant\n").input_ids
        answer = tokenizer(row.references[0]).input_ids + [tokenizer.eos_token_id]
        expected = (mean_nll(models["student"], prompt, answer), len(answer))
        assert sample.values["nll"] == pytest.approx(expected, rel=1e-9)
    store, number = as_turns
    assert store.samples(number, "student", 3)[0].prompt == f"user: {rows[0].prompt}"


# Lengths


def test_run_prompts_too_long_for_some_model_are_left_out_for_all(tmp_path, student_path, tokenizer, caplog):
    other = student_of(other_vocabulary(tmp_path / "other"), "other")
    lengths = [[len(tok(row.prompt).input_ids) for row in ROWS] for tok in (tokenizer, other.tokenizer)]
    limit = sorted(max(pair) for pair in zip(*lengths, strict=True))[2]
    kept = [row.index for row, *pair in zip(ROWS, *lengths, strict=True) if max(pair) <= limit]
    # One of the prompts left out is short enough for one of the models
    assert len(kept) == 3 and any(min(pair) <= limit < max(pair) for pair in zip(*lengths, strict=True))
    with caplog.at_level(logging.WARNING):
        store, number = evaluate(
            tmp_path / "r.sqlite", [student_of(student_path), other], bare(), seeds=[3], max_prompt_length=limit
        )
    assert f"2 of 5 prompts are longer than `max_prompt_length` ({limit} tokens) for some model" in caplog.text
    for name in ("student", "other"):
        assert [sample.index for sample in store.samples(number, name, 3)] == kept
    swapped = task([other, student_of(student_path)], bare(), max_prompt_length=limit)
    assert [row.index for row in swapped.rows] == kept


def test_run_without_a_prompt_that_is_short_enough_says_so(student_path):
    with pytest.raises(ValueError, match=r"All 5 prompts are longer than `max_prompt_length` \(1 tokens\)"):
        task([student_of(student_path)], max_prompt_length=1)


@pytest.fixture(scope="module")
def positioned(tmp_path_factory, tokenizer):
    """A gpt2, which has 512 positions and not one more."""
    model = make_model("gpt2", len(tokenizer), seed=5, eos_token_id=tokenizer.eos_token_id)
    return save(tmp_path_factory.mktemp("gpt2"), model, tokenizer)


@pytest.mark.parametrize("with_references", [True, False])
@pytest.mark.parametrize("repeats", [80, 120])
def test_run_prompt_too_long_for_the_positions_names_row_and_model(
    repeats, with_references, tmp_path, positioned, tokenizer
):
    """First with room for the prompt but not for what is to be written, then with none for the prompt."""
    rows = [ROWS[0], EvalRow(7, "The fox and the bird. " * repeats, (" Fish.",))]
    size = len(tokenizer(rows[1].prompt).input_ids)
    room = 512 - size + 1 if size < 512 else 8
    assert (size < 512) == (repeats == 80)
    with pytest.raises(
        ValueError, match=rf"prompt of row 7 has {size} tokens, .* than the 512 positions of 'student'"
    ):
        evaluate(
            tmp_path / "r.sqlite",
            [student_of(positioned)],
            rows if with_references else bare(rows),
            max_completion_length=room,
        )


def test_run_reference_longer_than_the_positions_is_cut_and_its_bytes_counted(tmp_path, positioned, tokenizer):
    rows = [ROWS[0], EvalRow(1, "Tell a story.", (" The fox and the bird." * 150,))]
    store, number = evaluate(
        tmp_path / "r.sqlite", [student_of(positioned, init_kwargs=DOUBLE)], rows, seeds=[3], max_completion_length=2
    )
    prompt, answer = read_answer(tokenizer, rows[1].prompt, rows[1].references[0])
    cut = answer[: 512 - len(prompt)]
    assert len(answer) > 512
    model = AutoModelForCausalLM.from_pretrained(positioned, dtype=torch.float64)
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([prompt + cut[:-1]])).logits[0, len(prompt) - 1 :].log_softmax(-1)
    total = -sum(row[token].item() for row, token in zip(log_probs, cut, strict=True))
    size = len(tokenizer.decode(cut).encode())
    assert size < len(rows[1].references[0]) / 1.5
    values = store.samples(number, "student", 3)[1].values
    assert values["nll"] == pytest.approx((total / len(cut), len(cut)), rel=1e-9)
    assert values["bits_per_byte"] == pytest.approx((total / math.log(2) / size, size), rel=1e-9)


# What cannot be evaluated


def test_run_prompts_alone_leave_out_what_compares_with_references(tmp_path, teacher_path, student_path, caplog):
    with caplog.at_level(logging.WARNING):
        store, number = evaluate(tmp_path / "r.sqlite", pair(teacher_path, student_path), bare(), seeds=[3])
    assert "The dataset has no references, so rouge_l cannot be measured." in caplog.text
    left_out = {"rouge_l", "nll", "bits_per_byte", "forward_kl", "reverse_kl", "total_variation", "imitation_gap"}
    assert set(store.metrics(number, "student")) == set(METRICS) - left_out | {"own_teacher_nll"}


def test_run_without_a_teacher_measures_texts_and_likelihood(tmp_path, student_path):
    store, number = evaluate(tmp_path / "r.sqlite", [student_of(student_path)], seeds=[3])
    assert set(store.metrics(number, "student")) == set(METRICS[:6])


def test_evaluation_missing_metric_is_found_before_a_model_is_loaded(student_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(EvalModel, "load", lambda self: loaded.append(self.name))
    monkeypatch.setattr(EvalModel, "entry", lambda self: loaded.append(self.name))
    with pytest.raises(ValueError, match="There is no metric 'blue'"):
        task([student_of(student_path)], metrics=["rouge_l", "blue"])
    assert loaded == []


def test_evaluation_of_models_without_a_name_of_their_own_is_refused(student_path):
    with pytest.raises(ValueError, match=r"The models are called \['student', 'student'\]"):
        task([student_of(student_path), student_of(student_path)])
    with pytest.raises(ValueError, match=r"The models are called \[\], but there must be at least one"):
        task([])


def test_evaluation_with_two_teachers_is_refused(student_path):
    models = [student_of(student_path, name, "teacher") for name in ("a", "b")]
    with pytest.raises(ValueError, match=r"\['a', 'b'\] are all teachers"):
        task(models)


def put_nan(model):
    model.lm_head.weight[5, 3] = math.nan


@pytest.mark.parametrize("rows", [ROWS, bare()], ids=["references", "prompts"])
def test_run_nan_names_the_model_and_keeps_what_was_finished(rows, tmp_path, teacher_path, student_path):
    path = changed_copy(student_path, tmp_path / "nan", put_nan)
    store, work = ResultStore(tmp_path / "r.sqlite"), task(pair(teacher_path, path), rows)
    message = "The logits of 'student' are not finite at row 0: .*NaN.*What was finished before is kept."
    with pytest.raises(ValueError, match=message), work.begin(store) as run:
        work.run(run)
    assert [len(store.samples(run.id, "teacher", seed)) for seed in SEEDS] == [5, 5]
    assert "length" in store.metrics(run.id, "teacher")
    assert [row["model"] for row in store.history() if row["metric"] == "length"] == ["teacher"] * 2
    assert store.run(run.id).finished is None and store.samples(run.id, "student", 3) == []


def test_run_nan_of_the_teacher_names_the_teacher(tmp_path, teacher_path, student_path):
    path = changed_copy(teacher_path, tmp_path / "nan", put_nan)
    with pytest.raises(ValueError, match="The logits of 'teacher' are not finite"):
        evaluate(tmp_path / "r.sqlite", pair(path, student_path))


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("with_teacher", [True, False])
def test_run_nan_that_only_some_texts_lead_to_is_found(
    with_teacher, temperature, tmp_path, teacher_path, student_path, tokenizer
):
    known = {token for row in ROWS for token in tokenizer(row.prompt).input_ids}

    def change(model):
        for token in set(range(3, len(tokenizer))) - known:
            model.model.embed_tokens.weight[token] = math.nan

    path = changed_copy(student_path, tmp_path / "nan", change)
    models = pair(teacher_path, path) if with_teacher else [student_of(path)]
    with pytest.raises(ValueError, match="The logits of 'student' are not finite"):
        evaluate(tmp_path / "r.sqlite", models, bare(), seeds=[3], temperature=temperature)


@pytest.mark.parametrize("metrics", [METRICS, ["nll", "bits_per_byte"]], ids=["texts", "likelihood"])
def test_run_model_that_emits_only_eos_is_an_error_each_time(metrics, tmp_path, teacher_path, tokenizer):
    models = pair(teacher_path, says_eos(tmp_path / "silent", tokenizer, 300.0))
    store = ResultStore(tmp_path / "r.sqlite")
    for _ in range(2):
        work = task(models, metrics=metrics, seeds=[3])
        with pytest.raises(ValueError, match="Every completion of 'student' ends at its first token"):
            with work.begin(store) as run:
                work.run(run)
        assert len(store.samples(run.id, "teacher", 3)) == 5
    assert len(store.runs()) == 1


def test_run_answer_pattern_reaches_exact_match(tmp_path, student_path):
    settings = {"metrics": ["exact_match"], "seeds": [3], "temperature": 0.0}
    store, number = evaluate(
        tmp_path / "r.sqlite", [student_of(student_path)], bare(), **settings | {"metrics": ["length"]}
    )
    texts = [sample.completion for sample in store.samples(number, "student", 3)]
    assert any(texts)
    # The first character as an answer, of which every second reference has another
    rows = [
        EvalRow(row.index, row.prompt, (f"{text.strip()[:1] or 'none'} 7" if row.index % 2 else "\u2603 7",))
        for row, text in zip(ROWS, texts, strict=True)
    ]
    store, number = evaluate(
        tmp_path / "r.sqlite", [student_of(student_path)], rows, answer_pattern=r"\A\s*(\S)", **settings
    )
    found = [sample.values["exact_match"][0] for sample in store.samples(number, "student", 3)]
    assert found == [100.0 * bool(row.index % 2 and text.strip()) for row, text in zip(ROWS, texts, strict=True)]
    assert 100.0 in found

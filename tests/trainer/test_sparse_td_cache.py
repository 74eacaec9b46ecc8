"""Training from a teacher cache: the same steps as with the teacher, none of which is loaded, and what is refused."""

import copy
import logging
import math
import os

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from tests.tiny import make_tokenizer
from tests.trainer.runs import logged, same, state_of
from tests.trainer.sparse import (
    MAX_LENGTH,
    Recorder,
    assert_agrees,
    assert_same_gradients,
    entries_of,
    make_trainer,
    meaning,
    plain_step,
    recorded_run,
    sparse_config,
    sparse_pair,
    sparse_rows,
)
from trl_kd import AMMConfig, AMMTrainer, DSKDConfig, DSKDTrainer
from trl_kd.data import KDCollator, prepare_dataset
from trl_kd.teachers import LocalTeacher, TeacherCache
from trl_kd.teachers.cache_writer import CacheSettings, write_cache


# None where the training data has it
EVAL_ROWS = sparse_rows().select([11, 2, 5, 8, 3])


@pytest.fixture(scope="module")
def teacher_folder(tokenizer, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("sparse_teacher"))
    sparse_pair()[1].save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def cache_of(tokenizer, teacher_folder, folder, rows=None, **settings):
    """A cache of the rows, by the teacher in a folder; log-probabilities are not rounded."""
    ends = [tokenizer.eos_token_id]
    rows = sparse_rows() if rows is None else rows
    dataset = prepare_dataset(rows, tokenizer, max_length=MAX_LENGTH, eos_token_ids=ends)
    settings = CacheSettings(**({"bits": 32, "batch_size": 4} | settings))
    write_cache(dataset, LocalTeacher(teacher_folder), tokenizer, str(folder), ends, settings)
    return str(folder)


@pytest.fixture(scope="module")
def caches(tokenizer, teacher_folder, tmp_path_factory):
    """Folders by name: with all digits, as it is by default, and of the evaluation rows."""
    kinds = {"exact": {}, "rounded": {"bits": 8}, "eval": {"rows": EVAL_ROWS}}
    return {
        name: cache_of(tokenizer, teacher_folder, tmp_path_factory.mktemp(name), **settings)
        for name, settings in kinds.items()
    }


def from_cache(tokenizer, folder, cache, trainer_class=Recorder, **overrides):
    """A recorded run without a teacher."""
    return recorded_run(tokenizer, folder, models=(sparse_pair()[0], None), teacher_cache=cache, **overrides)


FORMS = {
    "expected": {},
    "smaller_mass": {"action_top_p": 0.3, "tail_weight": 0.5},
    "all_of_the_cache": {"action_top_p": 0.95},
    "few_actions": {"max_actions": 3, "action_top_p": 0.9},
    "threshold": {"action_set": "threshold", "action_threshold": 0.1},
    "min_p": {"action_set": "min_p", "action_min_p": 0.3},
    "masked_nll": {
        "objectives": {"inverse_soft_q": 1.0},
        "tail_weight": 0.0,
        "label_outside": "union",
    },
    "chi2": {"preset": "paper", "lm_weight": 0.0, "chi2_center": "teacher", "q_min": -4.0},
    "released": {"preset": "released", "lm_weight": 0.0},
    "teacher_reward": {
        "objectives": {"teacher_reward": 1.0},
        "returns": "lambda",
        "truncation": "bootstrap",
        "gauge": "logsoftmax",
    },
    "actor_critic": {"objectives": {"soft_actor_critic": 1.0}, "truncation": "bootstrap", "backup": "student"},
    "sqil_target": {
        "objectives": {"sqil": 1.0},
        "truncation": "bootstrap",
        "backup": "teacher",
        "target_ema": 0.5,
        "learning_rate": 1e-2,
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_step_from_a_cache_agrees_with_loops_over_the_teacher(tokenizer, tmp_path, caches, form):
    overrides = FORMS[form]
    trainer = from_cache(tokenizer, tmp_path, caches["exact"], **overrides)
    assert trainer.teacher.head is None
    how = meaning(**overrides)
    is_kl = how.objectives == meaning().objectives
    names = ("set_size", "teacher_mass", "label_in_set", *([] if is_kl else ["value", *how.objectives]))
    step = assert_agrees(trainer, 1, sparse_pair()[1], names, **(overrides | {"is_kl": is_kl}))
    assert any(state.is_cut for state in step.states) and any(state.is_end for state in step.states)


@pytest.mark.parametrize("form", ["expected", "teacher_reward"])
def test_rounded_cache_stays_near_the_teacher(tokenizer, tmp_path, caches, form):
    """Of 8 bits; each log-probability is off by half a step of its range over 255."""
    live = recorded_run(tokenizer, tmp_path, **FORMS[form])
    cached = from_cache(tokenizer, tmp_path, caches["rounded"], **FORMS[form])
    assert logged(cached, "loss") != logged(live, "loss")
    assert logged(cached, "loss") == pytest.approx(logged(live, "loss"), rel=0.01)
    gradients = {name: value.double() for name, value in live.record[0].gradients.items()}
    assert_same_gradients(cached.record[0].gradients, gradients, rel=0.03)


def test_divergence_from_a_cache_has_one_bucket_for_all_else(tokenizer, tmp_path, caches):
    """The language-model term takes all that the cache has, whatever the set of the objective is."""
    overrides = {"lm_weight": 0.7, "kd_ratio": 0.6, "action_top_p": 0.5, "tail_weight": 0.4}
    overrides |= {"truncation": "bootstrap"}  # states after texts are not in it
    trainer = from_cache(tokenizer, tmp_path, caches["exact"], **overrides)
    dense = plain_step(trainer, 1, sparse_pair()[1], **(overrides | {"is_kl": True, "lm_weight": 0.0}))
    total, values = 0.0, []
    for state in dense.states:
        kept = prefix(state.log_t, 0.95)
        p, q = (with_rest(log_p.exp(), kept) for log_p in (state.log_t, state.log_s))
        kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert kl < (state.log_t.exp() * (state.log_t - state.log_s)).sum()
        values.append(kl)
        total += 0.7 * (0.6 * kl - 0.4 * state.log_s[state.label].item()) / len(dense.states)
    entry = entries_of(trainer)[1]
    assert entry["loss"] == pytest.approx(dense.loss + total, rel=1e-5)
    assert entry["kd/off_policy/forward_kl"] == pytest.approx(sum(values) / len(values), rel=1e-5)


def prefix(log_t, mass):
    order, kept, so_far = log_t.argsort(descending=True).tolist(), [], 0.0
    for token in order:
        if so_far >= mass:
            break
        kept.append(token)
        so_far += log_t[token].exp().item()
    return kept


def with_rest(probabilities, kept):
    values = [probabilities[token].item() for token in kept]
    return [*values, 1.0 - sum(values)]


# AMM


def amm_trainer(tokenizer, folder, caches, teacher=None, eval_rows=None, **overrides):
    given = sparse_config(folder)
    names = ("max_steps", "per_device_train_batch_size", "logging_steps", "save_strategy", "report_to", "use_cpu")
    names += ("max_length", "disable_tqdm", "max_grad_norm", "train_sampling_strategy", "learning_rate")
    settings = {name: getattr(given, name) for name in names} | {"lmbda": 0.0, "gradient_checkpointing": False}
    if teacher is None:
        settings |= {"teacher_cache": caches["exact"]}
    args = AMMConfig(output_dir=str(folder), **(settings | overrides))
    return AMMTrainer(sparse_pair()[0], teacher, args, sparse_rows(), eval_rows, processing_class=tokenizer)


@pytest.mark.parametrize(
    "overrides", [{}, {"critic": "exact_penalised"}, {"gamma": 0.8}, {"kl_loss_weight": 0.3}], ids=str
)
def test_moments_from_a_cache_agree_with_loops_over_buckets(tokenizer, tmp_path, caches, overrides):
    trainer = amm_trainer(tokenizer, tmp_path, caches, max_steps=1, sft_loss_weight=0.2, **overrides)
    student, teacher = (model.double() for model in sparse_pair())
    total, count, variation = 0.0, 0, 0.0
    for row in trainer.train_dataset.select(range(4)):
        ids, labels = torch.tensor([row["input_ids"]]), row["labels"]
        log_s, log_t = student(ids).logits[0].log_softmax(-1), teacher(ids).logits[0].log_softmax(-1).detach()
        places = [i for i in range(len(labels) - 1) if labels[i + 1] != -100]
        for t, i in enumerate(places):
            kept = prefix(log_t[i], 0.95)
            buckets = [(log_t[i][token].exp(), log_s[i][token].exp()) for token in kept]
            buckets.append((1 - sum(p for p, _ in buckets), 1 - sum(q for _, q in buckets)))
            if "critic" in overrides:
                moment = sum((p - q) * ((p - q) / (p + q)).detach() for p, q in buckets)  # the critic has answered
            else:
                moment = sum((p - q).abs() for p, q in buckets)
            kl = sum(p * (p / q).log() for p, q in buckets)
            variation += sum((p - q).abs() for p, q in buckets).item() / 2
            total = total + overrides.get("gamma", 1.0) ** t * moment - 0.2 * log_s[i, labels[i + 1]]
            total, count = total + overrides.get("kl_loss_weight", 0.0) * kl, count + 1
    (total / count).backward()
    trainer.train()
    entry = entries_of(trainer)[0]
    assert entry["loss"] == pytest.approx((total / count).item(), rel=1e-5)
    norm = torch.stack([p.grad.norm() for p in student.parameters()]).norm().item()
    assert entry["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert entry["kd/off_policy/total_variation"] == pytest.approx(variation / count, rel=1e-5)
    # Nothing that would need the teacher's own distribution, or all of it
    assert "kd/off_policy/teacher_entropy" not in entry


# What a run from a cache does not do


@pytest.fixture
def no_teacher(monkeypatch, teacher_folder):
    """Loading the teacher fails."""
    load = AutoModelForCausalLM.from_pretrained.__func__

    def refuse(cls, path, *args, **kwargs):
        assert str(path) != teacher_folder, "the teacher was loaded"
        return load(cls, path, *args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", classmethod(refuse))


@pytest.mark.parametrize("by", ["argument", "configuration", "nothing"])
def test_run_from_a_cache_loads_no_teacher(tokenizer, tmp_path, caches, teacher_folder, no_teacher, by):
    overrides = {"teacher_model_name_or_path": teacher_folder} if by == "configuration" else {}
    models = (sparse_pair()[0], teacher_folder if by == "argument" else None)
    trainer = make_trainer(
        tokenizer,
        tmp_path,
        models=models,
        eval_rows=EVAL_ROWS,
        teacher_cache=caches["exact"],
        eval_teacher_cache=caches["eval"],
        **overrides,
    )
    trainer.train()
    assert len(logged(trainer, "loss")) == 2 and trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(AssertionError, match="the teacher was loaded"):
        make_trainer(tokenizer, tmp_path, models=(sparse_pair()[0], teacher_folder))


def test_teacher_that_did_not_write_the_cache_raises(tokenizer, tmp_path, caches):
    student, teacher = sparse_pair()
    make_trainer(tokenizer, tmp_path, models=(student, teacher), teacher_cache=caches["exact"])
    with torch.no_grad():
        teacher.get_output_embeddings().weight.mul_(1.01)
    with pytest.raises(ValueError, match="The teacher `LlamaForCausalLM` is not the one that wrote the cache"):
        make_trainer(tokenizer, tmp_path, models=(sparse_pair()[0], teacher), teacher_cache=caches["exact"])


def test_evaluation_from_a_cache_is_that_of_the_teacher(tokenizer, tmp_path, caches):
    live = make_trainer(tokenizer, tmp_path, eval_rows=EVAL_ROWS, per_device_eval_batch_size=2)
    cached = make_trainer(
        tokenizer,
        tmp_path,
        models=(sparse_pair()[0], None),
        eval_rows=EVAL_ROWS,
        per_device_eval_batch_size=3,
        teacher_cache=caches["exact"],
        eval_teacher_cache=caches["eval"],
    )
    found, expected = cached.evaluate(), live.evaluate()
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    for name in ("tail", "nll", "student_entropy", "set_size", "teacher_mass", "label_in_set"):
        name = f"eval_kd/off_policy/{name}"
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    # One bucket for the rest never makes it larger
    name = "eval_kd/off_policy/total_variation"
    assert 0 < found[name] < expected[name]


def test_resume_from_a_cache_equals_uninterrupted(tokenizer, tmp_path, caches):
    def build():
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "train_sampling_strategy": "random"}
        return make_trainer(
            tokenizer,
            tmp_path,
            models=(sparse_pair()[0], None),
            teacher_cache=caches["exact"],
            **(FORMS["sqil_target"] | settings),
        )

    whole, resumed = build(), build()
    whole.train()
    resumed.train(resume_from_checkpoint=os.path.join(tmp_path, "checkpoint-2"))
    for name in ("loss", "grad_norm", "kd/off_policy/set_size"):
        assert len(logged(whole, name)) == 4 and logged(resumed, name)[-2:] == logged(whole, name)[-2:], name
    for part, expected in zip(state_of(resumed), state_of(whole), strict=True):
        assert same(part, expected)
    # Rows come in random order, each with its own of the cache
    live = make_trainer(
        tokenizer, tmp_path / "live", max_steps=4, train_sampling_strategy="random", **FORMS["sqil_target"]
    )
    live.train()
    assert logged(live, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-4)


def test_any_split_of_a_step_from_a_cache_gives_the_same_gradients(tokenizer, tmp_path, caches):
    runs = [
        from_cache(
            tokenizer,
            tmp_path,
            caches["exact"],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            **FORMS["teacher_reward"],
        )
        for size, steps in ((4, 1), (1, 4))
    ]
    for step, other in zip(*(run.record for run in runs), strict=True):
        assert_same_gradients(other.gradients, {name: g.double() for name, g in step.gradients.items()}, rel=5e-5)


def test_second_text_beside_a_cache_has_no_divergence(tokenizer, tmp_path, caches):
    second = {"options": {"lm_dataset": Dataset.from_list([{"text": "The fox is red."}, {"text": "apples"}])}}
    overrides = {"lm_weight": 0.5, "kd_ratio": 0.0}
    trainer = from_cache(tokenizer, tmp_path, caches["exact"], **second, **overrides)
    assert_agrees(trainer, 1, sparse_pair()[1], ("second_nll",), **(overrides | {"is_kl": True}))
    with pytest.raises(
        ValueError, match="`lm_dataset` is set with a `teacher_cache` and `kd_ratio` 0.5, but the cache"
    ):
        from_cache(tokenizer, tmp_path, caches["exact"], **second, preset="paper")


# What is refused


def build(tokenizer, folder, cache, rows=None, eval_rows=None, **overrides):
    models = (sparse_pair()[0], None)
    return make_trainer(tokenizer, folder, rows, eval_rows, models=models, teacher_cache=cache, **overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lmbda": 0.5}, "`teacher_cache` is set with `lmbda` 0.5 and `off_policy_source` 'auto', but a cache knows"),
        (
            {"off_policy_source": "teacher"},
            "`teacher_cache` is set with `lmbda` 0.0 and `off_policy_source` 'teacher'",
        ),
        ({"packing": True}, "`packing` is True with a `teacher_cache`, whose rows are those of the dataset"),
        ({"eval_packing": True}, "`packing` is True with a `teacher_cache`"),
        ({"action_top_p": 0.96}, "top_p` is 0.96, but the teacher cache `.*` was written with 0.95 and holds no"),
        ({"max_length": 11}, "is not the one of the cache `.*`: 1?[0-9] of its rows differ"),
        ({"eval_rows": EVAL_ROWS}, "There is a `teacher_cache` for training, but none for the eval dataset"),
    ],
)
def test_setting_that_a_cache_cannot_serve_raises(tokenizer, tmp_path, caches, overrides, message):
    with pytest.raises(ValueError, match=message):
        build(tokenizer, tmp_path, caches["exact"], **overrides)


def test_dataset_that_is_not_the_cached_one_raises(tokenizer, tmp_path, caches):
    rows = sparse_rows()
    changed = [row | ({"completion": " blue"} if i == 3 else {}) for i, row in enumerate(rows)]
    for data, message in (
        (rows.shuffle(seed=1), "The dataset has the rows of the cache `.*` in another order"),
        (rows.select(range(15)), r"The dataset has 15 rows, the cache `.*` 16 \(after row 14\)"),
        (Dataset.from_list(changed), r"is not the one of the cache `.*`: 1 of its rows differ \(from row 3 on\)"),
        (rows.to_iterable_dataset(), "The train dataset is a stream, but a teacher cache belongs to the rows"),
    ):
        with pytest.raises(ValueError, match=message):
            build(tokenizer, tmp_path, caches["exact"], data)
    with pytest.raises(ValueError, match="The dataset has 4 rows, the cache `.*` 5"):
        build(tokenizer, tmp_path, caches["exact"], eval_rows=sparse_rows(4), eval_teacher_cache=caches["eval"])
    trainer = build(tokenizer, tmp_path, caches["exact"])
    with pytest.raises(ValueError, match="There is a `teacher_cache` for training, but none for the eval dataset"):
        trainer.evaluate(EVAL_ROWS)


def test_other_tokenizer_raises(tokenizer, tmp_path, caches):
    other = copy.deepcopy(tokenizer)
    other.chat_template = other.chat_template.replace("user", "asker") + " "
    with pytest.raises(ValueError, match="The tokenizer has another chat template than the one of the cache"):
        build(other, tmp_path, caches["exact"])
    other = make_tokenizer("Quite another text, from which other merges are learned: zebra, quartz, jigsaw.")
    with pytest.raises(ValueError, match="The tokenizer has another vocabulary"):
        build(other, tmp_path, caches["exact"])


def test_cache_of_another_kind_of_run_raises(tokenizer, tmp_path, caches):
    student, _ = sparse_pair()
    args = DSKDConfig(output_dir=str(tmp_path), teacher_cache=caches["exact"], use_cpu=True, report_to=[], lmbda=0.0)
    with pytest.raises(
        ValueError, match="`teacher_cache` is set, but the teacher's representation space is in its hid"
    ):
        DSKDTrainer(student, None, args, sparse_rows(), processing_class=tokenizer)
    with pytest.raises(ValueError, match="`teacher_cache` is set with `critic=.*but these need the teacher's states"):
        amm_trainer(tokenizer, tmp_path, caches, critic="value_head")


def test_small_student_of_a_large_cache_raises(tokenizer, tmp_path, caches):
    student, _ = sparse_pair()
    largest = TeacherCache.open(caches["exact"]).header["counts"]["largest_id"]
    student.resize_token_embeddings(largest)
    with pytest.raises(ValueError, match=rf"holds token {largest}, but the student's head has {largest} rows"):
        make_trainer(tokenizer, tmp_path, models=(student, None), teacher_cache=caches["exact"])


def test_no_teacher_and_no_cache_raises(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="There is no teacher: `teacher_model` is None, and so are"):
        make_trainer(tokenizer, tmp_path, models=(sparse_pair()[0], None))
    with pytest.raises(ValueError, match="holds no teacher cache"):
        build(tokenizer, tmp_path, str(tmp_path))


SHORT_OF = {
    "top_k": {"action_set": "top_k", "action_top_k": 2},
    "full": {"action_set": "full"},
    "threshold": {"action_set": "threshold", "action_threshold": 0.01},
}


@pytest.mark.parametrize("name", SHORT_OF)
def test_set_that_a_cache_does_not_hold_raises(tokenizer, tmp_path, caches, name):
    message = f"`action_set` is '{name}', but the cache .* holds a mass of 0.95 and 256 tokens at most"
    with pytest.raises(ValueError, match=message):
        from_cache(tokenizer, tmp_path, caches["exact"], **SHORT_OF[name])


def test_top_k_from_a_cache_of_all_mass_agrees_with_loops(tokenizer, tmp_path, teacher_folder):
    cache = cache_of(tokenizer, teacher_folder, tmp_path / "whole", top_p=1.0, max_tokens=4)
    overrides = {"action_set": "top_k", "action_top_k": 2, "max_actions": 4}
    trainer = from_cache(tokenizer, tmp_path, cache, **overrides)
    assert_agrees(trainer, 1, sparse_pair()[1], ("set_size",), **(overrides | {"is_kl": True}))
    with pytest.raises(ValueError, match="`action_set` is 'top_k', but the cache .* holds a mass of 1 and 4 tokens"):
        from_cache(tokenizer, tmp_path, cache, action_set="top_k", action_top_k=5)


def test_set_that_a_cache_may_not_hold_warns(tokenizer, tmp_path, caches, caplog):
    with caplog.at_level(logging.WARNING, logger="trl_kd"):
        from_cache(tokenizer, tmp_path, caches["exact"], action_set="min_p", max_steps=1)
    assert "some sets may be smaller than the teacher's own" in caplog.text


def cached_trainer(tokenizer, folder, caches, **options):
    settings = {"teacher_cache": caches["exact"], "eval_teacher_cache": caches["eval"], "max_steps": 1}
    return make_trainer(
        tokenizer, folder, eval_rows=EVAL_ROWS, models=(sparse_pair()[0], None), **(settings | options)
    )


def test_evaluation_of_what_is_prepared_and_of_several_sets(tokenizer, tmp_path, caches):
    trainer = cached_trainer(tokenizer, tmp_path, caches)
    first = trainer.evaluate()
    again = trainer.evaluate(trainer.eval_dataset)
    assert again["eval_loss"] == first["eval_loss"]
    # Its name is not that of the training data
    named = trainer.evaluate({"train": EVAL_ROWS})
    assert named["eval_train_loss"] == first["eval_loss"]
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == first["eval_loss"]
    seen = trainer.evaluate(trainer.train_dataset, metric_key_prefix="seen")
    assert seen["seen_loss"] != pytest.approx(first["eval_loss"], rel=1e-3)


def test_total_variation_of_an_evaluation_does_not_depend_on_the_sets_of_the_run(tokenizer, tmp_path, caches):
    found = []
    for mass in (0.3, 0.8):
        trainer = cached_trainer(tokenizer, tmp_path, caches, action_top_p=mass, max_actions=2 if mass < 0.5 else 256)
        metrics = trainer.evaluate()
        found.append((metrics["eval_kd/off_policy/total_variation"], metrics["eval_kd/off_policy/set_size"]))
    assert found[0][0] == found[1][0]
    assert found[0][1] < found[1][1]


def test_collator_of_the_caller_beside_a_cache_raises(tokenizer, tmp_path, caches):
    with pytest.raises(ValueError, match="`data_collator` is a KDCollator, but with a `teacher_cache`"):
        cached_trainer(tokenizer, tmp_path, caches, options={"data_collator": KDCollator(0)})


def test_evaluation_cache_without_a_training_cache_raises(tokenizer, tmp_path, caches):
    with pytest.raises(ValueError, match="`eval_teacher_cache` is set without a `teacher_cache`"):
        make_trainer(tokenizer, tmp_path, eval_teacher_cache=caches["eval"])

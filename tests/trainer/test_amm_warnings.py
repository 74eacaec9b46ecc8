"""Warnings of AMM: settings at odds, a critic that is blind, a student that drifts; each once, and else silence."""

import logging
from types import SimpleNamespace

import pytest

from tests.trainer.plain import SOURCES
from tests.trainer.runs import config, pair, tiny_dataset
from trl_kd import AMMTrainer
from trl_kd.trainer.amm_warnings import DriftWatch, warn_of_settings


def warnings_of(caplog):
    return [r.message for r in caplog.records if r.levelname == "WARNING" and r.name == "trl_kd.trainer.amm_warnings"]


def warned(caplog, args):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="trl_kd"):
        warn_of_settings(args)
    return warnings_of(caplog)


def test_settings_of_a_critic_that_is_not_learned_warn(tmp_path, caplog):
    args = config(tmp_path, critic_steps=3, critic_betas=[0.5, 0.9], critic_learning_rate=0.1)
    assert warned(caplog, args) == [
        '`critic_steps`, `critic_betas`: set, but nothing reads them with `critic="exact"` and '
        '`on_policy_gradient="direct"`. `critic_*` concern `critic="value_head"` (`critic_rank` the head "low_rank"), '
        '`later_*` `on_policy_gradient="full"`, `vllm_*` `use_vllm=True`.'
    ]


def test_features_of_a_critic_that_is_not_learned_warn_of_that_alone(tmp_path, caplog):
    (message,) = warned(caplog, config(tmp_path, critic="exact_penalised", critic_features="student"))
    assert message.startswith("`critic_features`: set, but nothing reads")


def test_later_settings_of_a_direct_gradient_warn(tmp_path, caplog):
    (message,) = warned(caplog, config(tmp_path, later_cost="jsd"))
    assert message.startswith("`later_cost`: set, but nothing reads")


def test_rank_of_a_head_that_has_none_warns(tmp_path, caplog):
    (message,) = warned(caplog, config(tmp_path, critic="value_head", critic_rank=7))
    assert message.startswith("`critic_rank`: set, but nothing reads")
    assert warned(caplog, config(tmp_path, critic="value_head", critic_rank=7, critic_head="low_rank")) == []


def test_full_gradient_with_one_rollout_per_step_warns(tmp_path, caplog):
    one = {"on_policy_gradient": "full", "per_device_train_batch_size": 2}
    (message,) = warned(caplog, config(tmp_path, **one))
    assert message.startswith("An optimizer step has 1 rollouts, but later costs are compared between rollouts")
    assert warned(caplog, config(tmp_path, **one, later_baseline="value")) == []
    assert warned(caplog, config(tmp_path, **one, gradient_accumulation_steps=2)) == []


def test_greedy_rollouts_of_a_full_gradient_warn(tmp_path, caplog):
    args = config(tmp_path, on_policy_gradient="full", generation_kwargs={"do_sample": False, "max_new_tokens": 5})
    (message,) = warned(caplog, args)
    assert message.startswith("Rollouts are drawn with `do_sample=False`, so")


def test_betas_as_a_tuple_of_the_defaults_do_not_warn(tmp_path, caplog):
    assert warned(caplog, config(tmp_path, critic_betas=(0.0, 0.9))) == []


def test_altered_generation_kwargs_of_a_full_gradient_warn(tmp_path, caplog):
    args = config(tmp_path, on_policy_gradient="full", generation_kwargs={"top_k": 5})
    (message,) = warned(caplog, args)
    assert message.startswith("Rollouts are drawn with `top_k=5`, so they are not samples")


def test_critic_on_the_student_s_features_warns(tmp_path, caplog):
    (message,) = warned(caplog, config(tmp_path, critic="value_head", critic_features="student"))
    assert message.startswith('`critic_features` is "student". For a linear critic on the student\'s own states the')
    assert message.endswith('Take "both" or "teacher".')


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": 0.7}, "`temperature=0.7`"),
        ({"top_p": 0.9}, "`top_p=0.9`"),
        ({"top_k": 5, "min_p": 0.1}, "`top_k=5`, `min_p=0.1`"),
        ({"repetition_penalty": 1.2}, "`repetition_penalty=1.2`"),
    ],
)
def test_full_gradient_with_altered_sampling_warns(tmp_path, caplog, options, text):
    assert warned(caplog, config(tmp_path, on_policy_gradient="full", **options)) == [
        f"Rollouts are drawn with {text}, so they are not samples of the student itself, and the policy gradient of "
        "the later states is biased. Leave the sampling options at their defaults."
    ]
    assert warned(caplog, config(tmp_path, **options)) == []


def test_settings_that_agree_are_silent(tmp_path, caplog):
    assert warned(caplog, config(tmp_path)) == []
    assert warned(caplog, config(tmp_path, critic="value_head", critic_head="full", critic_penalty=0.2)) == []
    assert warned(caplog, config(tmp_path, on_policy_gradient="full")) == []


def watch(caplog, tmp_path, entries, options, history=()):
    """Messages of a watch over the logs of a run, one entry after the other."""
    watcher = DriftWatch(config(tmp_path, **options))
    state = SimpleNamespace(log_history=list(history))
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="trl_kd"):
        for entry in entries:
            state.log_history.append(entry)
            watcher.on_log(None, state, None, logs=entry)
    return warnings_of(caplog)


def tightness(*values, source="off_policy"):
    return [{"loss": 1.0, f"kd/{source}/tightness": value} for value in values]


@pytest.mark.parametrize("source", SOURCES)
def test_watch_critic_that_stays_blind_warns_once(tmp_path, caplog, source):
    entries = tightness(0.1, 0.2, 0.49, 0.3, 0.257, 0.1, 0.1, source=source)
    assert watch(caplog, tmp_path, entries[:4], {"critic": "value_head"}) == []
    assert watch(caplog, tmp_path, entries, {"critic": "value_head"}) == [
        f"`kd/{source}/tightness` has stayed under 0.5: the critic sees 26% of the difference between teacher and "
        "student, and the student is pushed by what is left. Raise `critic_learning_rate` or `critic_steps`, or take "
        '`critic="exact"`, which sees all of it.'
    ]
    assert watch(caplog, tmp_path, entries, {}) == []


def test_watch_critic_that_sees_now_and_then_is_silent(tmp_path, caplog):
    entries = tightness(0.1, 0.1, 0.1, 0.1, 0.6, 0.1, 0.1, 0.1, 0.1, 0.7)
    assert watch(caplog, tmp_path, entries, {"critic": "value_head"}) == []


def test_watch_resumed_run_goes_on_with_the_log_of_the_whole(tmp_path, caplog):
    before, after = tightness(0.1, 0.1, 0.1, 0.1), tightness(0.1)
    assert len(watch(caplog, tmp_path, after, {"critic": "value_head"}, history=before)) == 1
    # What was logged by evaluation, or at the end, is no step
    ends = [{"eval_loss": 1.0, "kd/off_policy/tightness": 0.1}, {"train_loss": 1.0}]
    assert watch(caplog, tmp_path, ends, {"critic": "value_head"}, history=before + after) == []


@pytest.mark.parametrize(
    ("name", "values", "warns"),
    [
        ("kd/on_policy/student_entropy", (4.0, 2.01, 1.99), True),
        ("kd/on_policy/student_entropy", (4.0, 2.01, 9.0), False),
        ("kd/on_policy/distinct_2", (0.9, 0.64, 0.62), True),
        ("kd/on_policy/distinct_2", (0.9, 0.64, 1.0), False),
        ("kd/on_policy/completion_length", (10.0, 7.1, 6.9), True),
        ("kd/on_policy/completion_length", (10.0, 7.1, 30.0), False),
        ("kd/off_policy/total_variation", (0.5, 0.54, 0.56), True),
        ("kd/off_policy/total_variation", (0.5, 0.54, 0.01), False),
    ],
)
def test_watch_full_gradient_warns_of_drift_once(tmp_path, caplog, name, values, warns):
    entries = [{"loss": 1.0, name: value} for value in (*values, values[-1])]
    options = {"on_policy_gradient": "full"}
    expected = (
        f"`{name}` went from {values[0]:.3g} to {values[-1]:.3g}. The full on-policy gradient favours few easy "
        "states and short texts, and this is how it shows. Lower `later_weight` or `later_gamma`, raise the share of "
        'off-policy rows, or take `on_policy_gradient="direct"`.'
    )
    assert watch(caplog, tmp_path, entries, options) == ([expected] if warns else [])
    assert watch(caplog, tmp_path, entries, {}) == []
    # After a resume it is still the first value of the run that counts
    resumed = watch(caplog, tmp_path, entries[2:], options, history=entries[:2])
    assert resumed == ([expected] if warns else [])


def test_trainer_warns_of_its_settings_and_watches_its_critics(tokenizer, tmp_path, caplog):
    student, teacher = pair(tokenizer)
    options = {"critic": "value_head", "critic_learning_rate": 1e-6, "critic_features": "student"}
    args = config(tmp_path, max_steps=6, per_device_train_batch_size=2, **options)
    with caplog.at_level(logging.WARNING, logger="trl_kd"):
        AMMTrainer(student, teacher, args, tiny_dataset(), processing_class=tokenizer).train()
    starts = ['`critic_features` is "student"', *(f"`kd/{source}/tightness` has stayed under" for source in SOURCES)]
    assert [message[: len(start)] for message, start in zip(warnings_of(caplog), starts, strict=True)] == starts

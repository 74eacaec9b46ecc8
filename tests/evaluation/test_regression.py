"""Conditions of `--fail-if`: how they are read, and what violates them."""

import doctest
import math
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest

from trl_kd.evaluation import regression
from trl_kd.evaluation.bootstrap import Estimate, difference
from trl_kd.evaluation.regression import Condition, parse_condition


def change(value: float, half_width: float) -> Estimate:
    return Estimate(value, value - half_width, value + half_width, half_width / 2.0)


@pytest.mark.parametrize(
    ("text", "expected", "written"),
    [
        ("rouge_l < -0.5%", Condition("rouge_l", "<", -0.5, True), "rouge_l < -0.5%"),
        ("nll > 0.02", Condition("nll", ">", 0.02, False), "nll > 0.02"),
        ("  exact_match<-2 %  ", Condition("exact_match", "<", -2.0, True), "exact_match < -2%"),
        ("distinct_2 < 0", Condition("distinct_2", "<", 0.0, False), "distinct_2 < 0"),
        ("own_forward_kl>+1e-3", Condition("own_forward_kl", ">", 1e-3, False), "own_forward_kl > 0.001"),
        ("hellaswag/acc_norm < -.5", Condition("hellaswag/acc_norm", "<", -0.5, False), "hellaswag/acc_norm < -0.5"),
        ("nll > 1234567.5", Condition("nll", ">", 1234567.5, False), "nll > 1234567.5"),
    ],
)
def test_parse_condition_reads_and_writes(text, expected, written):
    condition = parse_condition(text)
    assert condition == expected
    assert str(condition) == written
    assert parse_condition(str(condition)) == condition


@pytest.mark.parametrize(
    "text",
    ["", "rouge_l", "rouge_l <", "< -0.5%", "rouge_l = 0", "rouge_l <= -0.5%", "rouge_l < five", "rouge_l < -0.5%%"]
    + [
        "rouge_l < -0.5 points",
        "-0.5% > rouge_l",
        "rouge l < -1",
        "rouge_l < nan",
        "rouge_l < -1 and nll > 1",
        "a < --1",
    ],
)
def test_parse_condition_unknown_syntax_is_refused(text):
    with pytest.raises(
        ValueError, match="`--fail-if` has .* which is no condition on a change. Write <metric> <"
    ) as error:
        parse_condition(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(("text", "side"), [("rouge_l < 0.5%", "below"), ("nll > -0.02", "above")])
def test_parse_condition_that_no_change_would_meet_is_refused(text, side):
    """A forgotten minus sign would fail a build whose model has improved a little."""
    with pytest.raises(ValueError, match=f"'{text}', which even a model without any change.*Write a number {side} 0"):
        parse_condition(text)


def test_condition_bad_fields_are_refused():
    with pytest.raises(ValueError, match="`sign` is '<='.*Set it to '<' or '>'"):
        Condition("nll", "<=", -1.0, False)
    with pytest.raises(ValueError, match="has the number inf for nll.*Write a finite number"):
        parse_condition("nll > 1e999")


@pytest.mark.parametrize(
    ("text", "baseline", "value", "half_width", "expected"),
    [
        # Relative: 0.5 % of 20 is 0.1
        ("rouge_l < -0.5%", 20.0, -0.11, 0.05, True),
        ("rouge_l < -0.5%", 20.0, -0.09, 0.05, False),
        ("rouge_l < -0.5%", 20.0, -0.11, 0.12, False),  # noise
        ("rouge_l < -0.5%", 20.0, 1.0, 0.1, False),
        ("nll > 1%", 2.0, 0.03, 0.01, True),
        ("nll > 1%", 2.0, -0.03, 0.01, False),
        # Absolute: the baseline has no part in it
        ("rouge_l < -0.5", 20.0, -0.6, 0.1, True),
        ("rouge_l < -0.5", 20.0, -0.4, 0.1, False),
        ("rouge_l < -0.5", 0.0, -0.6, 0.1, True),
        ("nll > 0.02", 2.0, 0.03, 0.02, True),
        ("nll > 0.02", 2.0, 0.02, 0.01, False),  # on the number
        # Any loss
        ("rouge_l < 0", 20.0, -1e-3, 5e-4, True),
        ("rouge_l < 0", 20.0, 0.0, 0.0, False),
        ("rouge_l < 0%", 0.0, 0.0, 0.0, False),
        # A share of a negative baseline is one of its size: lower is still less
        ("imitation_gap < -5%", -2.0, -0.2, 0.1, True),
        ("imitation_gap < -5%", -2.0, 0.2, 0.1, False),
        # From 0, any change is infinite
        ("exact_match > 50%", 0.0, 1.0, 0.5, True),
        ("exact_match < -50%", 0.0, 1.0, 0.5, False),
    ],
)
def test_violated_needs_the_number_crossed_and_a_distinguishable_change(text, baseline, value, half_width, expected):
    assert parse_condition(text).violated(baseline, change(value, half_width)) is expected


def test_violated_without_an_interval_is_false():
    assert not parse_condition("nll > 0").violated(2.0, Estimate(1.0, math.nan, math.nan, math.nan))


@pytest.mark.parametrize(("baseline", "value"), [(math.nan, 0.1), (2.0, math.nan), (math.inf, 0.1)])
def test_violated_nan_is_refused(baseline, value):
    """In a comparison NaN is False, so a broken model would pass."""
    with pytest.raises(
        ValueError, match="'nll > 1%' cannot be checked: the baseline is .*Look for NaN in the values of nll"
    ):
        parse_condition("nll > 1%").violated(baseline, change(value, 0.05))


def test_violated_with_bootstrap_estimates_tells_a_loss_from_noise():
    rng = np.random.default_rng(0)
    weights, before = np.ones((3, 100)), 30.0 + 5.0 * rng.normal(size=(1, 100)) + rng.normal(size=(3, 100))
    condition = parse_condition("rouge_l < -0.5%")
    # The noise of a second run and a loss of 1 %, which is beyond the number; the standard error is 1 % as well
    noise = 5.0 * rng.normal(size=(3, 100))
    again = before + noise - noise.mean() - 0.3
    assert condition.violated(before.mean(), difference((before - 1.0, weights), (before, weights)))
    assert not condition.violated(before.mean(), difference((before, weights), (before, weights)))
    assert not condition.violated(before.mean(), difference((again, weights), (before, weights)))


def test_examples_run():
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(verbose=False)
    blocks = re.findall(r"```python\n(.*?)```", Path(regression.__file__).read_text(), flags=re.S)
    for block in blocks:
        runner.run(parser.get_doctest(textwrap.dedent(block), vars(regression).copy(), "regression", None, None))
    assert len(blocks) == 2 and runner.failures == 0

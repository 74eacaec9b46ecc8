"""Error bars: values by hand, what they must not depend on, and how often they cover a known truth."""

import doctest
import math
import re
import textwrap
import time
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from trl_kd.evaluation import bootstrap
from trl_kd.evaluation.bootstrap import Estimate, difference, estimate, t_quantile, verdict


NOT_DISTINGUISHABLE = "not distinguishable at 95 %"
# Enough resamples for a standard error within 1 % of its limit: its own error is about 1 / sqrt(2 * 100_000)
MANY = 100_000


def ones(values) -> tuple[np.ndarray, np.ndarray]:
    """A metric whose values all count the same."""
    values = np.asarray(values, dtype=float)
    return values, np.ones_like(values)


def random_metric(seed: int, num_seeds: int = 3, num_prompts: int = 57) -> tuple[np.ndarray, np.ndarray]:
    """Values per token of completions of 1 to 40 tokens."""
    rng = np.random.default_rng(seed)
    return rng.normal(2.0, 1.0, (num_seeds, num_prompts)), rng.integers(1, 41, (num_seeds, num_prompts)).astype(float)


def mean(values: np.ndarray, weights: np.ndarray) -> float:
    return sum(v * w for v, w in zip(values.flat, weights.flat, strict=True)) / sum(weights.flat)


def as_tuple(result: Estimate) -> tuple[float, float, float, float]:
    return result.value, result.low, result.high, result.standard_error


# Values by hand


def test_estimate_one_seed_is_the_t_interval_of_the_mean():
    # Mean 2.5, sample variance 5 / 3, of which a quarter; the 97.5 % quantile of t with 3 degrees of freedom is 3.182
    result = estimate(*ones([[1, 2, 3, 4]]), resamples=MANY)
    assert result.value == 2.5
    assert result.standard_error == pytest.approx(math.sqrt(5 / 12), rel=0.01)
    assert result.high - 2.5 == pytest.approx(3.182 * math.sqrt(5 / 12), rel=0.01)
    assert 2.5 - result.low == pytest.approx(result.high - 2.5)


def test_estimate_two_seeds_without_noise_adds_both_variances():
    # Prompts differ by 2 and seeds by 2, and nothing else: each has a sample variance of 2 and gives 2 / 2 to the mean
    result = estimate(*ones([[0, 2], [2, 4]]), resamples=MANY)
    assert result.value == 2.0
    assert result.standard_error == pytest.approx(math.sqrt(2), rel=0.01)
    assert result.high - 2.0 == pytest.approx(12.706 * math.sqrt(2), rel=0.01)


def test_estimate_noise_of_cells_is_counted_once():
    # Means of prompts 0 and 2, of seeds 0 and 2, residuals of 1 everywhere: the residual mean square is 4, of which a
    # quarter, 1, is the noise of cells; the seeds' share, 2 / 2, is no more than that
    result = estimate(*ones([[0, 0], [0, 4]]), resamples=MANY)
    assert result.value == 1.0
    assert result.standard_error == pytest.approx(1.0, rel=0.01)


def test_estimate_seeds_that_agree_by_chance_take_nothing_from_the_prompts():
    # Means of prompts 2 and 4, of both seeds 3, residuals of 2 everywhere: the noise of cells is 16 / 4, the seeds' 0
    result = estimate(*ones([[0, 6], [4, 2]]), resamples=MANY)
    assert result.standard_error == pytest.approx(1.0, rel=0.01)


def test_seed_effect_false_leaves_the_variance_of_the_prompts():
    # As above, where prompts and seeds give 1 each; and a model that is 1 above the other on the second prompt only
    low = np.array([[0.0, 2.0], [2.0, 4.0]])
    result = estimate(*ones(low), resamples=MANY, seed_effect=False)
    assert result.standard_error == pytest.approx(1.0, rel=0.01)
    assert result.high - 2.0 == pytest.approx(12.706, rel=0.01)
    # Differences 0 and 1 under one seed, 4 and 5 under the other: prompts give 0.5 / 2 and seeds 8 / 2
    sides = ones(low + [[0, 1], [4, 5]]), ones(low)
    assert difference(*sides, resamples=MANY).standard_error == pytest.approx(math.sqrt(4.25), rel=0.01)
    assert difference(*sides, resamples=MANY, seed_effect=False).standard_error == pytest.approx(0.5, rel=0.01)


def test_estimate_each_part_has_its_own_quantile():
    # Prompts 0, 6, 12 with a variance of 36 / 3 and 2 degrees of freedom, seeds 0 and 2 with 2 / 2 and 1
    result = estimate(*ones([[0, 6, 12], [2, 8, 14]]), resamples=MANY)
    assert result.standard_error == pytest.approx(math.sqrt(13), rel=0.01)
    assert result.high - result.value == pytest.approx(math.sqrt(4.303**2 * 12 + 12.706**2), rel=0.01)


def test_estimate_one_prompt_carries_the_variance_has_fewer_degrees_of_freedom():
    # One right of ten, times 10: squared deviations nine times 1 and once 81, mean 9, variance 576. So the kurtosis
    # is 1 + 576 / 81, and there are 20 / (576 / 81) = 2.8125 degrees of freedom, not 9. The variance is 10 / 10
    result = estimate(*ones([[10] + [0] * 9]), resamples=MANY)
    assert result.standard_error == pytest.approx(1.0, rel=0.01)
    assert result.high - 1.0 == pytest.approx(t_quantile(0.95, 2.8125), rel=0.01)
    assert t_quantile(0.95, 2.8125) > 3.2


def test_estimate_weights_make_a_ratio_of_sums():
    # 30 tokens of 1 nat and 10 tokens of 3 nats
    values, weights = np.array([[1.0, 3.0, 1.0]]), np.array([[20.0, 10.0, 10.0]])
    assert estimate(values, weights).value == 1.5


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_estimate_ratio_has_the_standard_error_of_its_linear_form(num_seeds):
    values, weights = random_metric(5, num_seeds, 400)
    values = values + 0.05 * weights  # long texts have high values
    theta = mean(values, weights)
    errors = [
        sum(w * (v - theta) for v, w in zip(values[:, p], weights[:, p], strict=True)) / weights.sum()
        for p in range(400)
    ]
    by_seed = [
        sum(w * (v - theta) for v, w in zip(values[s], weights[s], strict=True)) / weights.sum()
        for s in range(num_seeds)
    ]
    variance = sum(e**2 for e in errors) * 400 / 399
    if num_seeds > 1:
        cells = sum(
            (
                weights[s, p] * (values[s, p] - theta) / weights.sum()
                - errors[p] / num_seeds
                - by_seed[s] / 400
            )
            ** 2
            for s in range(num_seeds)
            for p in range(400)
        ) * (num_seeds * 400) / ((num_seeds - 1) * 399)  # fmt: skip
        variance += max(0.0, sum(e**2 for e in by_seed) * num_seeds / (num_seeds - 1) - cells)
    # The ratio is not linear, which with 400 prompts is worth less than 2 %, and 20000 resamples are good to 0.5 %
    result = estimate(values, weights, resamples=20_000)
    assert result.standard_error == pytest.approx(math.sqrt(variance), rel=0.025)


def test_difference_by_hand_is_the_paired_t_interval():
    # Differences 1, 1, 1, 5: mean 2, sample variance 4, standard error 1, and 3 degrees of freedom
    # (kurtosis 7 / 3: 8 / (4 / 3) = 6, but at most 3). Unpaired, the standard error would be above 20
    right = np.array([[0.0, 10.0, 50.0, 100.0]])
    result = difference(ones(right + [1, 1, 1, 5]), ones(right), resamples=MANY)
    assert result.value == pytest.approx(2.0)
    assert result.standard_error == pytest.approx(1.0, rel=0.01)
    assert result.high - 2.0 == pytest.approx(3.182, rel=0.01)


def test_difference_one_prompt_carries_the_variance_has_fewer_degrees_of_freedom():
    # As for one model above: only what is left of both sides counts
    right = 7.0 * np.arange(10.0)[None]
    left = right + [[10] + [0] * 9]
    result = difference(ones(left), ones(right), resamples=MANY)
    assert result.standard_error == pytest.approx(1.0, rel=0.01)
    assert result.high - 1.0 == pytest.approx(t_quantile(0.95, 2.8125), rel=0.01)


@pytest.mark.parametrize(
    ("confidence", "df", "expected"),
    # A printed table of Student's distribution
    [(0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 4, 2.776), (0.95, 30, 2.042), (0.90, 120, 1.658), (0.99, 3, 5.841)]
    + [(0.999, 1, 636.619), (0.999, 2, 31.599), (0.50, 5, 0.727), (0.80, 10, 1.372)],
)
def test_t_quantile_is_that_of_the_table(confidence, df, expected):
    assert t_quantile(confidence, df) == pytest.approx(expected, abs=6e-4)


def test_t_quantile_closed_forms_and_limit():
    for p in (0.2, 0.95, 0.9999):
        assert t_quantile(p, 1.0) == pytest.approx(math.tan(math.pi * p / 2), rel=1e-9)
        assert t_quantile(p, 2.0) == pytest.approx(p * math.sqrt(2 / (1 - p**2)), rel=1e-9)
        assert t_quantile(p, 1e7) == pytest.approx(NormalDist().inv_cdf((1 + p) / 2), rel=1e-6)
    assert t_quantile(0.95, 2.0) > t_quantile(0.95, 2.5) > t_quantile(0.95, 3.0)


# Identities and invariances


def test_difference_identical_models_is_exactly_zero():
    values, weights = random_metric(0)
    result = difference((values, weights), (values.copy(), weights.copy()))
    assert result == Estimate(0.0, 0.0, 0.0, 0.0)
    assert verdict(result, True) == verdict(result, None) == NOT_DISTINGUISHABLE


def test_difference_equal_metrics_from_scaled_weights_is_exactly_zero():
    """A share of rounding is no finding."""
    values, weights = random_metric(0)
    assert difference((values, 0.1 * weights), (values, weights)) == Estimate(0.0, 0.0, 0.0, 0.0)


def test_estimate_equal_values_has_no_width():
    result = estimate(np.full((2, 7), 0.1), np.arange(14.0).reshape(2, 7))
    assert result.value == pytest.approx(0.1) and result.low == result.value == result.high
    assert result.standard_error == 0.0


def test_difference_constant_added_to_both_changes_nothing():
    (left, left_weights), (right, right_weights) = random_metric(0), random_metric(1)
    plain = difference((left, left_weights), (right, right_weights))
    moved = difference((left + 100.0, left_weights), (right + 100.0, right_weights))
    assert as_tuple(moved) == pytest.approx(as_tuple(plain), abs=1e-11)


def test_difference_constant_added_to_one_moves_the_interval():
    left, right = random_metric(0), random_metric(1)
    plain, moved = difference(left, right), difference((left[0] + 3.0, left[1]), right)
    assert (moved.low, moved.high) == pytest.approx((plain.low + 3.0, plain.high + 3.0), abs=1e-11)


def test_difference_sides_exchanged_is_the_negative():
    left, right = random_metric(0), random_metric(1)
    forth, back = difference(left, right), difference(right, left)
    assert (back.value, back.low, back.high) == (-forth.value, -forth.high, -forth.low)
    assert back.standard_error == forth.standard_error


def test_difference_is_that_of_the_estimates_and_narrower_than_each():
    rng = np.random.default_rng(2)
    hard, weights = 3.0 * rng.normal(size=(1, 100)), rng.integers(1, 9, (3, 100)).astype(float)
    left, right = (hard + 0.3 * rng.normal(size=(3, 100)), weights), (hard + 0.3 * rng.normal(size=(3, 100)), weights)
    change = difference(left, right)
    assert change.value == pytest.approx(estimate(*left).value - estimate(*right).value, abs=1e-12)
    # The prompts' part is gone: what is left is the noise, 0.3 * sqrt(2 / 300) = 0.024, against 0.3 for either model
    assert change.standard_error < 0.05 < 0.25 < min(estimate(*left).standard_error, estimate(*right).standard_error)


def test_difference_to_a_constant_model_is_the_estimate():
    values, weights = random_metric(0)
    change, alone = difference((values, weights), (np.zeros_like(values), weights)), estimate(values, weights)
    assert as_tuple(change) == pytest.approx(as_tuple(alone), rel=1e-9)


def test_estimate_scaled_values_and_weights_scale_the_interval():
    values, weights = random_metric(0)
    plain, scaled = estimate(values, weights), estimate(-100.0 * values, 7.0 * weights)
    expected = (-100 * plain.value, -100 * plain.high, -100 * plain.low, 100 * plain.standard_error)
    assert as_tuple(scaled) == pytest.approx(expected, rel=1e-9)


def test_estimate_prompts_and_seeds_without_weight_change_nothing():
    values, weights = random_metric(0, 3, 40)
    wide = np.zeros((5, 60)), np.zeros((5, 60))
    rows, columns = np.ix_([0, 2, 3], np.arange(60)[10:50])
    wide[0][rows, columns], wide[1][rows, columns] = values, weights
    assert estimate(*wide) == estimate(values, weights)


def test_estimate_more_prompts_is_narrower():
    small, large = (estimate(*random_metric(0, 1, size)).standard_error for size in (100, 1600))
    assert 3.0 < small / large < 5.5  # the square root of 16 is 4


def test_estimate_higher_confidence_is_wider():
    metric = random_metric(0, 1, 200)
    narrow, wide = estimate(*metric, confidence=0.8), estimate(*metric, confidence=0.99)
    # Quantiles of t with 199 degrees of freedom or a few less: 1.286 and 2.601
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(2.601 / 1.286, rel=0.01)
    assert wide.standard_error == narrow.standard_error


# Determinism, memory, time


def test_estimate_same_seed_is_equal_and_the_global_state_is_left_alone():
    metric = random_metric(0)
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    first, second, other = estimate(*metric), estimate(*metric), estimate(*metric, seed=1)
    assert first == second
    assert np.array_equal(np.random.get_state()[1], before)
    # Another draw of 2000 resamples: a relative error of 1.6 % in each standard error
    assert other != first and other.standard_error == pytest.approx(first.standard_error, rel=0.08)


def test_estimate_in_chunks_is_the_same(monkeypatch):
    metric = random_metric(0)
    whole = estimate(*metric)
    monkeypatch.setattr(bootstrap, "_CHUNK_SIZE", 7 * 57 + 3)
    assert as_tuple(estimate(*metric)) == pytest.approx(as_tuple(whole), rel=1e-9)


def test_estimate_leaves_its_input_alone():
    values, weights = random_metric(0)
    copies = values.copy(), weights.copy()
    difference((values, weights), random_metric(1))
    assert np.array_equal(values, copies[0]) and np.array_equal(weights, copies[1])


def test_estimate_of_a_large_evaluation_is_quick():
    """Ten times what it takes on one core; a table has a hundred of them."""
    metric, times = random_metric(0, 5, 500), []
    for _ in range(5):
        start = time.process_time()
        estimate(*metric)
        times.append(time.process_time() - start)
    assert min(times) < 0.2


# Where nothing can be said


@pytest.mark.parametrize("weights", [[[3.0]], [[0.0, 2.0, 0.0]], [[0.0, 2.0], [0.0, 1.0]]])
def test_estimate_one_prompt_has_no_interval(weights):
    result = estimate(np.ones_like(weights), weights)
    assert result.value == 1.0
    assert all(map(math.isnan, (result.low, result.high, result.standard_error)))
    assert verdict(result, True) == NOT_DISTINGUISHABLE


def test_difference_one_prompt_on_one_side_has_no_interval():
    values, weights = random_metric(0, 1, 30)
    few = np.where(np.arange(30) == 4, weights, 0.0)
    for sides in (((values, few), (values, weights)), ((values, weights), (values, few))):
        result = difference(*sides)
        assert result.value == pytest.approx(mean(*sides[0]) - mean(*sides[1]))
        assert math.isnan(result.low) and not result.excludes_zero


def test_difference_values_missing_on_one_side_is_that_of_the_metrics():
    values, weights = random_metric(0, 3, 30)
    few = weights * (np.arange(30) < 4)
    result = difference((values, few), (values, weights))
    assert result.value == pytest.approx(mean(values, few) - mean(values, weights))
    assert 0.0 < result.standard_error < 3.0 * estimate(values, few).standard_error


# Verdicts


@pytest.mark.parametrize(
    ("low", "high", "higher_is_better", "expected"),
    [
        (0.1, 0.3, True, "better"),
        (0.1, 0.3, False, "worse"),
        (0.1, 0.3, None, "higher"),
        (-0.3, -0.1, True, "worse"),
        (-0.3, -0.1, False, "better"),
        (-0.3, -0.1, None, "lower"),
        (-0.1, 0.3, True, NOT_DISTINGUISHABLE),
        (0.0, 0.3, False, NOT_DISTINGUISHABLE),
        (-0.3, 0.0, None, NOT_DISTINGUISHABLE),
        (math.nan, math.nan, True, NOT_DISTINGUISHABLE),
    ],
)
def test_verdict_is_about_the_interval(low, high, higher_is_better, expected):
    assert verdict(Estimate(0.1, low, high, 0.1), higher_is_better) == expected


def test_verdict_names_the_confidence():
    zero = Estimate(0.0, 0.0, 0.0, 0.0)
    assert verdict(zero, True, 0.9) == "not distinguishable at 90 %"
    assert verdict(zero, True, 0.999) == "not distinguishable at 99.9 %"


# Errors


@pytest.mark.parametrize(
    ("values", "weights", "message"),
    [
        (np.ones((2, 3)), np.ones((3, 2)), r"`values` has values of shape \(2, 3\) and weights of shape \(3, 2\)"),
        (np.ones(3), np.ones(3), r"shape \(3,\).*Pass two arrays of one shape \(seeds, prompts\)"),
        (
            [[1.0, math.nan, math.nan]],
            np.ones((1, 3)),
            "has 2 NaN or infinite values of 3.*the value 0 and the weight 0",
        ),
        ([[1.0, math.inf]], np.ones((1, 2)), "has 1 NaN or infinite values of 2"),
        (np.ones((1, 2)), [[1.0, math.nan]], "has 1 NaN or infinite weights of 2"),
        (np.ones((1, 2)), [[1.0, -2.0]], r"has 1 negative weights, the least -2\.0"),
        (np.ones((2, 2)), np.zeros((2, 2)), "has 4 weights, all 0.*Leave the metric out"),
        (np.ones((1, 0)), np.ones((1, 0)), "has 0 weights, all 0"),
    ],
)
def test_estimate_bad_arrays_are_refused(values, weights, message):
    with pytest.raises(ValueError, match=message):
        estimate(values, weights)


def test_difference_bad_arrays_are_refused_by_side():
    good = random_metric(0, 1, 4)
    with pytest.raises(
        ValueError, match=r"`left` has shape \(1, 4\) and `right` \(1, 5\).*the same prompts and seeds"
    ):
        difference(good, random_metric(0, 1, 5))
    with pytest.raises(ValueError, match="`right` has 4 weights, all 0"):
        difference(good, (good[0], 0.0 * good[1]))
    with pytest.raises(ValueError, match="`left` has 4 NaN"):
        difference((math.nan * good[0], good[1]), good)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"confidence": 95}, r"`confidence` is 95.*Set it in \(0, 1\)"),
        ({"confidence": 0.0}, "`confidence` is 0.0"),
        ({"resamples": 1}, "`resamples` is 1.*Set it to 1000"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    metric = random_metric(0)
    with pytest.raises(ValueError, match=message):
        estimate(*metric, **settings)
    with pytest.raises(ValueError, match=message):
        difference(metric, metric, **settings)


# Coverage: how often the interval holds a known truth


def normal(rng, seeds, prompts, seed_sd=0.0, prompt_sd=1.0, cell_sd=1.0):
    """Effects of seeds, of prompts and of cells around a mean of 0."""
    effects = seed_sd * rng.normal(size=(seeds, 1)) + prompt_sd * rng.normal(size=(1, prompts))
    return [ones(effects + cell_sd * rng.normal(size=(seeds, prompts)))]


def skewed(rng, seeds, prompts):
    """Prompts of skewness 1.75 around a mean of exp(1 / 8)."""
    return [ones(np.exp(0.5 * rng.normal(size=(1, prompts))) + 0.3 * rng.normal(size=(seeds, prompts)))]


def tokens(rng, seeds, prompts, seed_sd=0.0):
    """
    Lengths that spread over a factor of ten, and values that rise with them. For a lognormal weight, the weighted
    mean of its exponent's normal deviate g is the deviation's factor, 0.5: the truth is 2 + 0.5 * 0.5.
    """
    g = 0.8 * rng.normal(size=(1, prompts)) + 0.6 * rng.normal(size=(seeds, prompts))
    noise = rng.normal(size=(seeds, prompts)) + seed_sd * rng.normal(size=(seeds, 1))
    return [(2.0 + 0.5 * g + noise, 40.0 * np.exp(0.5 * g))]


def right_or_wrong(rng, seeds, prompts, rate, spread=1.0):
    """Answers that are right with a probability that differs from prompt to prompt; the mean is the rate."""
    chance = rng.beta(rate * spread, (1.0 - rate) * spread, size=(1, prompts))
    return [ones(rng.random((seeds, prompts)) < chance)]


def paired(rng, seeds, prompts, seed_sd=0.0):
    """Two models on prompts that are hard or easy for both, the left 0.1 better; the seeds are their own."""
    hard = 2.0 * rng.normal(size=(1, prompts))
    (left, _), (right, _) = (normal(rng, seeds, prompts, seed_sd, 0.5, 0.5)[0] for _ in range(2))
    return [ones(0.1 + hard + left), ones(hard + right)]


def paired_right_or_wrong(rng, seeds, prompts):
    """The left model turns one in twenty of the wrong answers, 70 %, into right ones."""
    chance = rng.beta(0.3, 0.7, size=(1, prompts))
    return [ones(rng.random((seeds, prompts)) < c) for c in (chance + 0.05 * (1.0 - chance), chance)]


def paired_tokens(rng, seeds, prompts):
    """Two models that write texts of other lengths; the truth is 0."""
    hard = 0.8 * rng.normal(size=(1, prompts))
    sides = []
    for _ in range(2):
        g = hard + 0.6 * rng.normal(size=(seeds, prompts))
        sides.append((2.0 + 0.5 * g + 0.5 * rng.normal(size=(seeds, prompts)), 40.0 * np.exp(0.5 * g)))
    return sides


@pytest.mark.parametrize(
    ("draw", "truth", "settings", "seeds", "prompts"),
    [
        *[(normal, 0.0, {}, s, p) for s, p in ((1, 30), (3, 100), (5, 200))],
        *[(normal, 0.0, {"seed_sd": 1.0}, s, p) for s, p in ((3, 30), (3, 200), (5, 100))],
        *[(normal, 0.0, {"prompt_sd": 2.0, "cell_sd": 0.5}, s, p) for s, p in ((1, 100), (3, 30), (5, 50))],
        *[(normal, 0.0, {"prompt_sd": 0.3}, s, p) for s, p in ((1, 50), (3, 100), (5, 30))],
        *[(skewed, math.exp(0.125), {}, s, p) for s, p in ((1, 50), (3, 100))],
        *[(tokens, 2.25, {}, s, p) for s, p in ((1, 50), (3, 30), (5, 100))],
        *[(tokens, 2.25, {"seed_sd": 0.5}, s, p) for s, p in ((3, 50), (5, 100))],
        *[(right_or_wrong, 0.1, {"rate": 0.1}, s, p) for s, p in ((1, 80), (3, 50), (5, 100))],
        *[(right_or_wrong, 0.5, {"rate": 0.5}, s, p) for s, p in ((1, 100), (3, 30))],
        *[(paired, 0.1, {}, s, p) for s, p in ((1, 30), (3, 100))],
        *[(paired, 0.1, {"seed_sd": 0.5}, s, p) for s, p in ((3, 100), (5, 50))],
        *[(paired_right_or_wrong, 0.035, {}, s, p) for s, p in ((1, 100), (3, 50))],
        *[(paired_tokens, 0.0, {}, s, p) for s, p in ((1, 50), (5, 100))],
    ],
)
def test_interval_covers_the_truth_at_its_rate(draw, truth, settings, seeds, prompts):
    rng, trials, covered, resamples = np.random.default_rng(17), 400, 0, 400
    for trial in range(trials):
        sides = draw(rng, seeds, prompts, **settings)
        if len(sides) == 1:
            result = estimate(*sides[0], resamples=resamples, seed=trial)
        else:
            result = difference(*sides, resamples=resamples, seed=trial)
        covered += result.low <= truth <= result.high
    # The rate itself is 93 to 97 % (larger simulations), to which 2.5 standard deviations of 400 trials are added
    deviation = math.sqrt(0.95 * 0.05 / trials)
    assert 0.93 - 2.5 * deviation <= covered / trials <= 0.97 + 2.5 * deviation


def test_interval_without_a_seed_effect_covers_the_truth_and_is_narrower():
    rng, trials, covered, widths = np.random.default_rng(29), 400, 0, []
    for trial in range(trials):
        ((values, weights),) = normal(rng, 3, 60, prompt_sd=0.3)
        results = [
            estimate(values, weights, resamples=400, seed=trial, seed_effect=effect) for effect in (False, True)
        ]
        covered += results[0].low <= 0.0 <= results[0].high
        widths.append([result.high - result.low for result in results])
    assert abs(covered / trials - 0.95) <= 3.0 * math.sqrt(0.95 * 0.05 / trials)
    known, sought = np.mean(widths, axis=0)
    # The ideal one is 2 * 2.0 * sqrt((0.3^2 + 1 / 3) / 60)
    assert known == pytest.approx(4.0 * math.sqrt((0.09 + 1 / 3) / 60), rel=0.03)
    assert 1.2 < sought / known < 1.6


def test_verdict_of_equal_models_is_wrong_no_more_often_than_stated():
    """And that of models which differ by four standard errors is right."""
    rng, trials, wrong, right = np.random.default_rng(23), 400, 0, 0
    for trial in range(trials):
        left = rng.normal(size=(1, 60))
        other = left + rng.normal(size=(1, 60))
        equal = difference(ones(left), ones(other), resamples=400, seed=trial)
        higher = difference(ones(left + 4.0 / math.sqrt(60)), ones(other), resamples=400, seed=trial)
        wrong += verdict(equal, True) != NOT_DISTINGUISHABLE
        right += verdict(higher, True) == "better"
    assert wrong / trials <= 0.05 + 3.0 * math.sqrt(0.95 * 0.05 / trials)
    # Four less two standard errors from the end of the interval: 97.5 %
    assert right / trials >= 0.95


def test_examples_run():
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(verbose=False)
    blocks = re.findall(r"```python\n(.*?)```", Path(bootstrap.__file__).read_text(), flags=re.S)
    for block in blocks:
        runner.run(parser.get_doctest(textwrap.dedent(block), vars(bootstrap).copy(), "bootstrap", None, None))
    assert len(blocks) == 4 and runner.failures == 0

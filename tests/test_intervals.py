"""Intervals against closed forms, published numbers and coverage on simulated data."""

import math

import numpy as np
import pytest

from srpo_core.intervals import bootstrap_ci, bootstrap_runs_ci, paired_effect_size, wilson, win_rate


def test_wilson_equals_published_numbers():
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
    for successes, count, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        interval = wilson(successes, count)
        assert interval.estimate == successes / count
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


def test_wilson_refuses_impossible_counts():
    for successes, count in ((1, 0), (-1, 4), (5, 4)):
        with pytest.raises(ValueError, match="successes"):
            wilson(successes, count)


def test_win_rate_counts_ties_as_half():
    assert win_rate([1.0, 2.0, 0.0, -1.0]).estimate == 2.5 / 4


def test_effect_size_is_mean_over_standard_deviation():
    assert paired_effect_size(np.array([1.0, 2.0, 3.0])) == pytest.approx(2.0)  # mean 2, standard deviation 1
    assert paired_effect_size(np.zeros(5)) == 0
    assert paired_effect_size(np.full(5, 0.1)) == math.inf
    assert math.isnan(paired_effect_size(np.array([1.0])))
    both = paired_effect_size(np.array([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]]))
    assert both.tolist() == pytest.approx([2.0, -2.0])


def test_bootstrap_of_a_mean_is_close_to_the_normal_interval():
    values = np.random.default_rng(1).normal(0.3, 2.0, 400)
    half = 1.96 * values.std() / math.sqrt(len(values))
    interval = bootstrap_ci(values)
    assert interval.estimate == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.02)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.02)


def test_bootstrap_is_seeded():
    values = np.random.default_rng(2).normal(size=30)
    assert bootstrap_ci(values, seed=3) == bootstrap_ci(values, seed=3)
    assert bootstrap_ci(values, seed=3) != bootstrap_ci(values, seed=4)


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(5)
    hits = 0
    for trial in range(400):
        interval = bootstrap_ci(rng.exponential(1.0, 64), draws=500, seed=trial)
        hits += interval.low <= 1.0 <= interval.high
    assert 0.89 <= hits / 400 <= 0.98  # 95 % nominal; skewed data cost a little


def test_pooled_intervals_cover_the_truth_with_run_and_prompt_effects():
    rng = np.random.default_rng(6)
    hits = narrow = 0
    for trial in range(200):
        runs = 0.2 * rng.normal(size=(6, 1)) + rng.normal(size=(1, 40)) + 0.5 * rng.normal(size=(6, 40))
        crossed = bootstrap_runs_ci(list(runs), True, draws=500, seed=trial)
        naive = bootstrap_ci(runs.reshape(-1), draws=500, seed=trial)
        hits += crossed.low <= 0 <= crossed.high
        narrow += naive.low <= 0 <= naive.high
    assert hits / 200 >= 0.89
    assert narrow / 200 < 0.75  # what pooling as if all values were independent would claim


def test_runs_without_shared_prompts_are_resampled_one_by_one():
    runs = [np.random.default_rng(seed).normal(size=50) for seed in range(4)]
    apart, shared = bootstrap_runs_ci(runs, False), bootstrap_runs_ci(runs, True)
    assert apart.estimate == shared.estimate
    assert apart.low < apart.estimate < apart.high
    assert (apart.low, apart.high) != (shared.low, shared.high)


def test_degenerate_data():
    assert bootstrap_ci([0.5] * 9).low == pytest.approx(0.5)
    single = bootstrap_ci([0.25])
    assert single.estimate == 0.25
    assert math.isnan(single.low)
    assert not single.excludes_zero
    for values in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="an interval needs"):
            bootstrap_ci(values)
    with pytest.raises(ValueError, match="equally many"):
        bootstrap_runs_ci([[1.0, 2.0], [1.0]], True)
    infinite = bootstrap_ci([0.5] * 9, paired_effect_size)
    assert infinite.low == math.inf

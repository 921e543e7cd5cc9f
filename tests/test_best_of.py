"""Best of n: the highest scores in order, with the seeds that draw them again."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srpo_core.best_of import best_note, best_of, best_rows, kept_shape, seeds_of
from srpo_core.config import ConfigError


@settings(deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30), st.integers(1, 40))
def test_what_is_kept_is_the_highest_and_in_order(scores, keep):
    order = best_of(scores, keep)
    kept = [scores[i] for i in order]
    assert len(set(order)) == len(order) == min(keep, len(scores))
    assert kept == sorted(scores, reverse=True)[:keep]


def test_of_equal_scores_the_earlier_comes_first():
    assert best_of([1.0, 2.0, 1.0, 2.0], 3) == [1, 3, 0]


@pytest.mark.parametrize(
    "scores, keep, told",
    [
        ([], 1, "there are none"),
        ([1.0, math.nan], 1, "picture 2 is nan"),
        ([math.inf], 1, "picture 1"),
        ([1.0], 0, "keep=0"),
    ],
)
def test_what_can_t_be_ranked_is_refused(scores, keep, told):
    with pytest.raises(ConfigError, match=told):
        best_of(scores, keep)


def test_seeds_count_on_from_the_first_of_all_or_of_each_batch():
    assert seeds_of([7], [2, 3]) == [7, 8, 9, 10, 11]
    assert seeds_of([7, 100], [2, 3]) == [7, 8, 100, 101, 102]
    assert seeds_of([2**64 - 1], [2]) == [2**64 - 1, 0]
    with pytest.raises(ConfigError, match="2 first seeds for 3 batches"):
        seeds_of([1, 2], [1, 1, 1])


def test_kept_pictures_have_one_size():
    kept_shape([(8, 16, 3), (8, 16, 3)])
    with pytest.raises(ConfigError, match=r"best 2 have different sizes \(16 x 8, 8 x 8\)"):
        kept_shape([(8, 16, 3), (8, 8, 3)])


def test_the_table_and_its_note_say_what_was_chosen():
    columns, rows = best_rows([2, 0], [0.3, 0.1], [12, 10])
    assert [dict(zip(columns, row, strict=True)) for row in rows] == [
        {"rank": 1, "picture": 3, "score": 0.3, "seed": 12},
        {"rank": 2, "picture": 1, "score": 0.1, "seed": 10},
    ]
    assert best_note([1.0, 2.0, 3.0], 2) == "2 of 3 kept. Highest 3, mean 2, 1.0 standard deviations above the mean."
    assert best_note([1.0], 4) == "1 of 1 kept (4 asked for). Highest 1, mean 1."
    assert best_note([1.0, 1.0], 1) == "1 of 2 kept. Highest 1, mean 1."

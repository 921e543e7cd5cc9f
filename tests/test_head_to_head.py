"""Who wins: rates and intervals against numbers worked out elsewhere, and words that claim no more than they show."""

import math

import pytest
import torch

from srpo_core.head_to_head import (
    MIN_PAIRS,
    Comparison,
    HeadToHead,
    change,
    contests,
    names_of,
)

LABELS = ("base", "LoRA")


GREY, WHITE = torch.full((2, 3, 4, 4), 0.5), torch.ones(2, 3, 4, 4)


def contest(differences):
    return HeadToHead("reward", [1.0] * len(differences), [1.0 + d for d in differences])


def comparison(found, a=GREY, b=WHITE):
    return Comparison(LABELS, [7, 8], (a, b), found)


def test_win_rate_counts_equal_scores_half_with_wilson_s_interval():
    found = contest([0.5, 0.25, -0.5, 0.0])
    assert found.rate.estimate == pytest.approx(2.5 / 4)
    assert found.winners(LABELS) == ["LoRA", "LoRA", "base", "equal"]
    eight_of_ten = contest([1.0] * 8 + [-1.0] * 2).rate
    assert (eight_of_ten.low, eight_of_ten.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Wilson 1927, 8 of 10


def test_turning_the_sides_around_turns_the_result_around():
    one = HeadToHead("reward", [0.1, 0.5, 0.3], [0.4, 0.2, 0.35])
    other = HeadToHead("reward", one.b, one.a)
    assert other.rate.estimate == pytest.approx(1 - one.rate.estimate)
    assert other.rate.low == pytest.approx(1 - one.rate.high)
    assert other.mean_difference.estimate == pytest.approx(-one.mean_difference.estimate)


def test_few_pairs_have_no_interval_of_their_mean():
    few, enough = contest([0.5] * (MIN_PAIRS - 1)), contest([0.5, 0.25] * (MIN_PAIRS // 2))
    assert math.isnan(few.mean_difference.low) and few.mean_difference.estimate == pytest.approx(0.5)
    assert 0.25 <= enough.mean_difference.low <= enough.mean_difference.high <= 0.5
    columns, (first, second) = comparison([few, HeadToHead("reward:hpsv2", enough.a, enough.b)]).summary_rows()
    row = dict(zip(columns, first, strict=True))
    assert (row["base"], row["LoRA"], row["difference"]) == pytest.approx((1.0, 1.5, 0.5))
    assert row["LoRA wins"] == 1.0 and row["by"] == "score" and row["its 95%"] == "from 8 on"
    low, high = enough.mean_difference.low, enough.mean_difference.high
    assert second[0] == "hpsv2" and second[2] == "68% to 100%" and second[6] == f"{low:+.2g} to {high:+.2g}"


@pytest.mark.parametrize(
    "differences, told, clear",
    [
        ([1.0], "Score: LoRA is higher in 1 of 1 picture: 100%", False),
        ([1.0, -1.0, 0.0], "Score: LoRA is higher in 1 of 3 pictures, 1 equal: 50%", False),
        ([1.0] * 10, "Score: LoRA is higher in 10 of 10 pictures: 100%", True),
        ([-1.0] * 10, "Score: LoRA is higher in 0 of 10 pictures: 0%", True),
    ],
)
def test_the_verdict_claims_a_winner_only_where_the_interval_does(differences, told, clear):
    verdict = contest(differences).verdict(LABELS)
    assert verdict.startswith(told)
    assert ("not clear yet" in verdict) != clear


def test_every_score_that_both_have_is_a_contest():
    a = {"reward": [1.0], "reward:hpsv2": [0.5], "word:Oil": [0.1], "only a": [0.0]}
    found = contests(a, {"reward": [2.0], "reward:hpsv2": [0.25], "word:Oil": [0.2]})
    assert [(one.name, one.differences) for one in found] == [("reward", [1.0]), ("reward:hpsv2", [-0.25])]


@pytest.mark.parametrize("a, b", [([], []), ([1.0], [1.0, 2.0])])
def test_scores_must_pair(a, b):
    with pytest.raises(ValueError, match="equally many"):
        HeadToHead("reward", a, b)


def test_labels_can_always_be_told_apart():
    assert names_of(" base ", "LoRA") == ("base", "LoRA")
    assert names_of("", " ") == ("A", "B")
    assert names_of("x", "x") == ("x 1", "x 2")
    assert names_of("FLUX.1-dev\nloaded as bfloat16", "x\n") == ("FLUX.1-dev loaded as bfloat16", "x")


def test_the_table_has_a_row_per_pair():
    b = torch.stack([GREY[0], torch.full((3, 4, 4), 0.75)])
    assert change(GREY, b) == pytest.approx([0.0, 25.0])
    columns, rows = comparison([HeadToHead("reward", [1.0, 2.0], [1.0, 2.5])], b=b).picture_rows()
    assert columns == ["picture", "seed", "base", "LoRA", "difference", "wins", "change %"]
    assert rows == [[1, 7, 1.0, 1.0, 0.0, "equal", 0.0], [2, 8, 2.0, 2.5, 0.5, "LoRA", 25.0]]
    columns, rows = comparison([], b=b).picture_rows()
    assert columns == ["picture", "seed", "change %"] and rows == [[1, 7, 0.0], [2, 8, 25.0]]


def test_pairs_carry_the_scores_of_the_first_contest():
    won, lost = contest([1.0, 1.0]), contest([-1.0, -1.0])
    assert torch.equal(comparison([won, lost]).pairs(), comparison([won]).pairs())
    assert not torch.equal(comparison([won]).pairs(), comparison([lost]).pairs())
    assert not torch.equal(comparison([won]).pairs(), comparison([]).pairs())


def test_the_note_says_that_nothing_changed_before_anything_else():
    assert "same pictures" in comparison([contest([0.0, 0.0])], b=GREY).note
    assert "No reward" in comparison([]).note
    lost, won = contest([-1.0, -1.0]), HeadToHead("relative", [0.0, 0.0], [1.0, 1.0])
    note = comparison([lost, HeadToHead("reward:hpsv2", lost.a, lost.b), won]).note
    assert (
        note == f"{lost.verdict(LABELS)} {won.verdict(LABELS)}" and "Relative score: LoRA is higher in 2 of 2" in note
    )

"""Sizes of photos, and the order of their batches: laws that hold for every seed, step and share."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srpo_core.buckets import WIDEST, batch_order, bucket_sizes, nearest_size, photo_turn


def test_step_zero_is_the_one_size():
    assert bucket_sizes(720, 1280, 0) == [(720, 1280)]


def test_the_sizes_around_a_megapixel_in_steps_of_64_are_the_familiar_ones():
    sizes = bucket_sizes(1024, 1024, 64)
    assert {(1024, 1024), (832, 1216), (1216, 832), (768, 1344), (896, 1152), (704, 1472)} <= set(sizes)


@pytest.mark.parametrize(("height", "width", "step"), [(720, 720, 48), (720, 720, 64), (480, 1280, 16), (64, 64, 16)])
def test_sizes_are_multiples_of_about_the_area_and_shaped_within_the_range(height, width, step):
    sizes = bucket_sizes(height, width, step)
    assert sizes == sorted(sizes, key=lambda size: (size[1] / size[0], size)) and len(set(sizes)) == len(sizes)
    for h, w in sizes:
        assert h % step == w % step == 0 and 1 / WIDEST <= w / h <= WIDEST
        assert h * w <= height * width < (h + step) * (w + step)
    assert {(w, h) for h, w in sizes} == set(sizes)  # portrait as landscape


def test_the_configured_size_is_a_bucket_where_it_is_a_multiple():
    assert (720, 720) in bucket_sizes(720, 720, 48)
    assert (16, 32) in bucket_sizes(16, 32, 16)


def test_no_size_fits_a_step_that_is_too_large():
    assert bucket_sizes(64, 64, 128) == []


@given(st.integers(1, 5000), st.integers(1, 5000))
@settings(max_examples=200, deadline=None)
def test_no_other_size_is_nearer_in_shape(height, width):
    sizes = bucket_sizes(720, 720, 64)
    h, w = nearest_size(height, width, sizes)

    def off(h: int, w: int) -> float:
        ratio = (width / height) / (w / h)
        return max(ratio, 1 / ratio)

    assert off(h, w) <= min(off(*size) for size in sizes) * (1 + 1e-12)


A, B, C = (32, 32), (16, 64), (64, 16)


@given(st.lists(st.sampled_from([A, B, C]), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 99), st.data())
@settings(max_examples=150, deadline=None)
def test_batches_hold_one_size_and_all_photos_come_equally_often(sizes, batch_size, seed, data):
    count = data.draw(st.integers(1, 30))
    batches = batch_order(sizes, batch_size, seed, count)
    assert len(batches) == count
    for size, row in batches:
        assert len(row) == batch_size and {sizes[i] for i in row} == {size}
    for size in set(sizes):  # a size's batches, joined, are whole shuffles of its photos one after the other
        mine = [i for own, row in batches if own == size for i in row]
        photos = [i for i, own in enumerate(sizes) if own == size]
        for start in range(0, len(mine) - len(photos) + 1, len(photos)):
            assert sorted(mine[start : start + len(photos)]) == photos


def test_after_an_epoch_all_were_seen_but_for_what_fills_no_batch():
    sizes = [A] * 7 + [B] * 4 + [C]
    batches = batch_order(sizes, 2, 0, 5)  # 3 of A, 2 of B; one A and the C wait
    assert Counter(size for size, _ in batches) == {A: 3, B: 2}
    seen = Counter(i for _, row in batches for i in row)
    assert max(seen.values()) == 1 and len(seen) == 10
    after_two = batch_order(sizes, 2, 0, 12)
    assert Counter(i for _, row in after_two for i in row) == dict.fromkeys(range(12), 2)


def test_the_order_is_a_function_of_the_seed_and_longer_runs_go_on_from_it():
    sizes = [A, B, A, C, B, A, A]
    assert batch_order(sizes, 2, 5, 40)[:13] == batch_order(sizes, 2, 5, 13)
    assert batch_order(sizes, 2, 5, 40) != batch_order(sizes, 2, 6, 40)
    # the sizes are mixed within an epoch, not one after the other
    many = [size for size, _ in batch_order([A] * 20 + [B] * 20, 1, 0, 40)]
    assert many != sorted(many) and many != sorted(many, reverse=True)


@given(st.integers(0, 50), st.integers(1, 100), st.integers(1, 200))
@settings(max_examples=150, deadline=None)
def test_the_share_of_photos_never_drifts(seed, hundredths, count):
    share = hundredths / 100
    turns = [photo_turn(seed, share, micro) for micro in range(count)]
    photos = 0
    for micro, (on_photos, before) in enumerate(turns):
        assert before == (photos if on_photos else micro - photos)
        photos += on_photos
        assert abs(photos - Fraction(hundredths, 100) * (micro + 1)) < 1
    if count % 100 == 0:
        assert photos == hundredths * count // 100


def test_turns_are_drawn_anew_in_every_stretch():
    """Or one control word out of four would always meet the photos of a run with a share of a quarter."""
    places = [micro % 4 for micro in range(400) if photo_turn(0, 0.25, micro)[0]]
    assert len(places) == 100 and min(Counter(places).values()) > 10 and len(Counter(places)) == 4


def test_all_photos_is_all_photos():
    assert [photo_turn(3, 1.0, micro) for micro in range(3)] == [(True, 0), (True, 1), (True, 2)]

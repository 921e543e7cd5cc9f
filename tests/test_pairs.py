"""Pairs of pictures: left and right keep their pixels, labels and winners are told apart."""

import pytest
import torch

from srpo_core.lettering import DARK, MARKED
from srpo_core.pairs import LEAST_SIDE, side_by_side

GENERATOR = torch.Generator().manual_seed(0)


def pictures(count, height, width):
    return torch.rand(count, 3, height, width, generator=GENERATOR)


def holds(pair, image):
    """Columns at which an image stands in a picture, unchanged; [3, H, W] each."""
    height, width = image.shape[-2:]
    corner = (pair == image[:, :1, :1]).all(0)
    return [
        left
        for top, left in torch.nonzero(corner).tolist()
        if torch.equal(pair[:, top : top + height, left : left + width], image)
    ]


def test_pictures_keep_every_pixel_a_left_b_right():
    a, b = pictures(2, 64, 256), pictures(2, 64, 256)
    pairs = side_by_side(a, b)
    for i in range(2):
        (left,), (right,) = holds(pairs[i], a[i]), holds(pairs[i], b[i])
        assert left + 256 < right and right + 256 <= pairs.shape[-1]


def test_small_pictures_are_enlarged_by_a_whole_factor():
    a, b = pictures(1, 48, 64), pictures(1, 48, 64)
    pair = side_by_side(a, b)[0]
    large = a[0].repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert large.shape[-1] == LEAST_SIDE and len(holds(pair, large)) == 1


def corners(pair):
    """The colours at the upper left of A's bar and at the upper right of B's."""
    return [tuple((pair[:, 0, column] * 255).round().int().tolist()) for column in (0, -1)]


def test_the_higher_score_is_marked_and_equal_ones_are_not():
    a, b = pictures(3, 64, 64), pictures(3, 64, 64)
    pairs = side_by_side(a, b, ("base", "LoRA"), ([0.1, 0.3, 0.2], [0.2, 0.1, 0.2]))
    assert [corners(pair) for pair in pairs] == [[DARK, MARKED], [MARKED, DARK], [DARK, DARK]]
    assert corners(side_by_side(a, b)[0]) == [DARK, DARK]


def test_labels_scores_and_notes_are_on_the_picture():
    a, b = pictures(1, 64, 64), pictures(1, 64, 64)
    plain = side_by_side(a, b, ("base", "LoRA"))
    assert not torch.equal(plain, side_by_side(a, b, ("base", "other")))
    assert not torch.equal(plain, side_by_side(a, b, ("base", "LoRA"), ([0.1], [0.1])))
    noted = side_by_side(a, b, ("base", "LoRA"), notes=["seed 7"])
    assert noted.shape[-2] > plain.shape[-2] and torch.equal(noted[..., : plain.shape[-2], :], plain)


def test_two_sizes_are_no_pair():
    with pytest.raises(ValueError, match="one size"):
        side_by_side(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 16))

"""Text on pictures: readable on any picture at any size, and nothing else is touched."""

import pytest
import torch

from srpo_core.lettering import (
    DARK,
    INK,
    MARKED,
    fitted,
    font,
    in_figures,
    plate,
    strip,
    text_width,
    with_badges,
    with_scores,
)

SIZES = [(64, 64), (64, 1024), (1024, 64), (128, 128), (720, 1280), (2160, 4096)]


def luminance(colour):
    """Relative luminance of sRGB in [0, 1], by WCAG 2."""
    linear = torch.where(colour <= 0.03928, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    return (linear * torch.tensor([0.2126, 0.7152, 0.0722])).sum(-1)


def contrast(one, other):
    low, high = sorted((luminance(one).item(), luminance(other).item()))
    return (high + 0.05) / (low + 0.05)


def changed(before, after):
    """Rows and columns of the box that holds every changed pixel, [3, H, W] each."""
    different = (before != after).any(0)
    return [torch.nonzero(different.any(dim)).flatten() for dim in (1, 0)]


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize(
    "colour", [(1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 1.0, 0.0), (0.0, 1.0, 1.0), (0.5, 0.5, 0.5)]
)
def test_letters_stand_out_on_any_colour(colour, marked):
    """By WCAG 2's rule for small text, 4.5 to 1."""
    image = torch.tensor(colour, dtype=torch.float32).view(3, 1, 1).expand(1, 3, 256, 256)
    pixels = with_badges(image, ["0.2873"], {0} if marked else ())[0]
    rows, columns = changed(image[0], pixels)
    inside = pixels[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].flatten(1).T
    values, counts = inside.unique(dim=0, return_counts=True)
    background = values[counts.argmax()]
    assert counts.max() > len(inside) / 4 and torch.ones(3).tolist() in values.tolist()  # the plate, white letters
    assert contrast(torch.ones(3), background) >= 4.5


@pytest.mark.parametrize("height, width", SIZES)
def test_a_score_is_whole_and_in_its_corner_at_every_size(height, width):
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    rows, columns = changed(image[0], with_badges(image, ["-0.5120"])[0])
    assert rows[0] >= height / 2 and columns[0] < width / 8  # lower left
    assert 10 <= rows[-1] - rows[0] + 1 <= height / 4  # letters of at least 10 pixels, and they cover little
    assert fitted("-0.5120", width - 2 * 3 - 2 * 2, 10)[0] == "-0.5120"


def test_only_the_plate_changes():
    images = torch.rand(3, 3, 100, 140, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    drawn = with_badges(images, ["1", "2.5", "a longer text"])
    assert torch.equal(images, before)
    for image, result in zip(images, drawn, strict=True):
        rows, columns = changed(image, result)
        assert torch.equal(image[:, : rows[0]], result[:, : rows[0]])
        assert torch.equal(image[:, :, columns[-1] + 1 :], result[:, :, columns[-1] + 1 :])
    widths = [len(changed(*pair)[1]) for pair in zip(images, drawn, strict=True)]
    assert widths == sorted(widths) and drawn.min() >= 0 and drawn.max() <= 1


def test_the_highest_score_is_marked_where_scores_differ():
    images = torch.zeros(3, 3, 64, 64)
    drawn = with_scores(images, [0.1, 0.3, 0.2])
    assert torch.equal(drawn[1], with_badges(images[:1], ["0.3000"], {0})[0])
    assert torch.equal(drawn[2], with_badges(images[:1], ["0.2000"])[0])
    alike = with_scores(images[:2], [0.2, 0.2])
    assert torch.equal(alike[0], drawn[2]) and torch.equal(alike[1], drawn[2])
    signed = with_scores(images[:2], [0.25, -1.5], ends=["  a", "  b"], sign=True)
    assert torch.equal(signed, with_badges(images[:2], ["+0.250  a", "-1.500  b"], {0}))


@pytest.mark.parametrize("width", [0, 3, 20, 60, 200])
def test_lines_fit_their_width(width):
    line, size = fitted("a name that is too long for a small bar", width, 24)
    assert size >= 16 and (text_width(line, size) <= width or line == "")
    assert line == "" or line.endswith(("...", "bar"))
    assert plate("0.25", 20, max(1, width)).width <= max(1, width)


def test_of_a_long_text_as_much_stays_as_fits():
    """A description of thousands of letters, which may come by a link, too."""
    text = "a description of a model with all of its settings and where it comes from " * 200
    line, size = fitted(text, 300, 14, least=14)
    kept = line.removesuffix("...")
    assert size == 14 and text.startswith(kept)
    assert text_width(line, size) <= 300 < text_width(f"{text[: len(kept) + 1]}...", size)


def test_a_bar_never_cuts_its_right_text():
    long, short = (strip(200, 24, text, "wins  0.3021") for text in ("a name that goes on and on and on", "A"))
    assert torch.equal(long[:, :, 110:], short[:, :, 110:])
    assert not torch.equal(strip(200, 24, "A", "wins  0.3021")[:, :, 110:], strip(200, 24, "A")[:, :, 110:])
    assert torch.equal(strip(20, 10, "", colour=MARKED)[:, 0, 0], torch.tensor(MARKED) / 255)
    assert strip(20, 10, "A").max() <= max(INK) / 255 and strip(20, 10, "A").min() >= min(DARK) / 255


def test_letters_that_the_own_font_lacks_come_from_the_system():
    assert font(20, "LoRA 0.8").getname() == font(20).getname()
    own = bytes(font(20).getmask("Ж"))
    other = font(20, "Ж")
    if other.getname() == font(20).getname():
        pytest.skip("no font of this system has the letter")
    assert bytes(other.getmask("Ж")) not in (own, bytes(other.getmask("\U0010ffff")))


@pytest.mark.parametrize(
    "values, texts",
    [
        ([0.28734, -0.5], ["0.2873", "-0.5000"]),
        ([21.428, 9.5], ["21.43", "9.50"]),
        ([-1.25, 0.3], ["-1.250", "0.300"]),
        ([12345.6], ["12346"]),
        ([9.9999], ["10.00"]),
        ([0.0], ["0.0000"]),
        ([], []),
    ],
)
def test_numbers_have_four_figures_and_line_up(values, texts):
    assert in_figures(values) == texts

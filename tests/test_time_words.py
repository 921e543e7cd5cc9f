import pytest

from srpo_core.time_words import duration_text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3.31, "3.3 s"),
        (42, "42 s"),
        (300, "5 min"),
        (3600, "1 h 0 min"),
        (13_200, "3 h 40 min"),
        (190_800, "2 days 5 h"),
    ],
)
def test_durations_in_words(seconds, text):
    assert duration_text(seconds) == text

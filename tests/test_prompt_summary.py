"""What is told of prompts and photos that a user gave."""

import pytest
from PIL import Image

from srpo_core.config import ConfigError
from srpo_core.prompt_summary import summary_of_file, summary_of_photos, summary_of_text


@pytest.mark.parametrize(
    ("text", "told"),
    [("one", "1 prompt"), ("one\n\n  two  \n", "2 prompts"), ("one\ntwo\n one\n", "3 prompts (2 different ones)")],
)
def test_lines_are_counted_as_they_are_read(text, told, tmp_path):
    """Of a text, and of a file that holds it."""
    assert summary_of_text(text, "text") == told
    (tmp_path / "prompts.txt").write_text(text)
    assert summary_of_file(str(tmp_path / "prompts.txt"), "path") == told


def test_an_empty_text_names_its_widget():
    with pytest.raises(ConfigError, match="text is empty"):
        summary_of_text(" \n\t\n", "text")


def test_photos_are_counted_and_measured(tmp_path):
    for name, size in (("a", (40, 30)), ("b", (64, 48)), ("c", (20, 90))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a red ball")
    assert summary_of_photos(str(tmp_path), "path") == "3 photos with captions, 40 x 30 to 64 x 48 pixels"
    for name in "bc":
        (tmp_path / f"{name}.png").unlink()
    assert summary_of_photos(str(tmp_path), "path") == "1 photo with captions, 40 x 30 pixels"
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ConfigError, match=r"path=.*no caption"):
        summary_of_photos(str(tmp_path), "path")

"""A CONDITIONING of several prompts: every picture of a batch keeps its own, however many are drawn at once."""

import pytest
from comfyui_side import needs_comfyui, relative_error, start
from safetensors.torch import load_file

pytestmark = needs_comfyui
SAME = 2e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    start("prompts_in_comfyui.py", folder)
    return folder


@pytest.mark.parametrize("how", ["together", "parted"])
def test_pictures_keep_their_prompts_in_every_part_of_a_batch(folder, how):
    """Five pictures of three prompts: the first prompt follows the last."""
    drawn = load_file(folder / "drawn.safetensors")
    assert relative_error(drawn[how], drawn["alone"]) < SAME


def test_the_preview_asks_for_each_picture_by_its_own_prompt(folder):
    """The last picture is the first one of the second part, and has the second prompt."""
    shown = load_file(folder / "shown.safetensors")
    assert (shown["batch"] - shown["alone"]).abs().max() < 1e-3

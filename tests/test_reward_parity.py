"""PickScore is what its model card's snippet computes; with SRPO_FULL_SIZE=1 at full size (986 M parameters, 12 GB)."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import reward_parity as parity

from srpo_core.rewards import pickscore
from srpo_core.rewards.clip_files import load_clip

FULL = os.environ.get("SRPO_FULL_SIZE") == "1"


def test_pickscore_is_what_its_model_card_computes(tmp_path, monkeypatch):
    monkeypatch.setattr(pickscore, "IMAGE_WIDTH", pickscore.IMAGE_WIDTH)  # put back what the narrow model's is set to
    found = parity.compare_pickscore(tmp_path, parity.VIT_H_14 if FULL else parity.NARROW)
    rows = found["pictures"]
    largest = max(abs(score) for row in rows.values() for score in row["scores"])
    assert largest > 0.5
    assert rows["224x224"]["largest_difference"] < 1e-5 * max(1, largest)
    assert found["file_alone"] < 1e-5 * max(1, largest)
    assert max(row["largest_difference"] for row in rows.values()) < 0.1  # its processor rounds what it resizes
    assert found["parameters"] == 986_109_441 or not FULL


@pytest.mark.parametrize("positions", [77, 20])
def test_a_long_prompt_is_cut_where_the_models_positions_end(tmp_path, positions):
    """By the tokenizer in the folder as by open_clip's, which a file that lies alone is read with."""
    text = parity.NARROW["text_config"] | {"max_position_embeddings": positions}
    parity.write_pickscore(tmp_path, parity.NARROW | {"text_config": text})
    (tmp_path / "alone").mkdir()
    for name in ("model.safetensors", "config.json"):
        shutil.copy(tmp_path / name, tmp_path / "alone" / name)
    words = ["red", "cat"] * 60
    inside = words[: positions - 2]  # the first and the last token take two
    for folder in (tmp_path, tmp_path / "alone"):
        clip = load_clip(folder, "reward.path", "cpu")
        whole, cut, shorter = (clip.text_features([" ".join(text)]) for text in (words, inside, inside[:-1]))
        assert torch.allclose(whole, cut, atol=1e-6) and not torch.allclose(whole, shorter, atol=1e-4)

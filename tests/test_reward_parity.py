"""PickScore is what its model card's snippet computes; with SRPO_FULL_SIZE=1 at full size (986 M parameters, 12 GB)."""

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import reward_parity as parity

from srpo_core.rewards import pickscore

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

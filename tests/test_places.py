"""Where models lie: folders that a running ComfyUI names itself come before those that are guessed."""

import pytest

from srpo_core import places
from srpo_core.config import ConfigError, RewardConfig
from srpo_core.rewards import check_reward

HPS = "HPS_v2.1_compressed.pt"


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """This machine's own ComfyUI and Hugging Face cache play no part."""
    monkeypatch.setattr(places, "comfyui_root", lambda: None)
    monkeypatch.setattr(places, "cache_root", lambda: tmp_path / "cache")


def file_in(folder):
    folder.mkdir(parents=True)
    (folder / HPS).write_bytes(b"x")
    return folder / HPS


def test_a_running_comfyui_says_where_its_folders_are(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    file = file_in(second)
    asked = []

    def lookup(kind):
        asked.append(kind)
        return [str(first), str(second)]

    assert places.find("hpsv2") is None
    with places.folders_from(lookup):
        assert places.find("hpsv2") == file
        assert places.comfyui_folders("vae") == [first, second]
        with places.folders_from(lambda kind: []):
            assert places.find("hpsv2") is None
        assert places.find("hpsv2") == file
    assert places.find("hpsv2") is None
    assert set(asked) == {"srpo_rewards", "vae"}


def test_its_folders_come_before_those_of_another_comfyui(tmp_path, monkeypatch):
    guessed = file_in(tmp_path / "guessed" / "models" / "srpo_rewards")
    monkeypatch.setattr(places, "comfyui_root", lambda: tmp_path / "guessed")
    assert places.find("hpsv2") == guessed
    with places.folders_from(lambda kind: [tmp_path / "none"]):
        assert places.find("hpsv2") is None


def test_a_missing_reward_is_told_with_every_folder_looked_in(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    with places.folders_from(lambda kind: folders), pytest.raises(ConfigError) as error:
        check_reward(RewardConfig(name="hpsv2"))
    assert f"{folders[0]} or {folders[1]} or the Hugging Face cache (xswu/HPSv2)" in str(error.value)
    with pytest.raises(ConfigError, match=r"COMFYUI_PATH may name its folder\); srpo download hpsv2 gets it"):
        check_reward(RewardConfig(name="hpsv2"))

"""What ComfyUI relies on: all of a reward's weights are in its module, and it leaves memory when it is let go."""

import gc
import json
import weakref

import pytest
import test_rewards_aesthetic as small_aesthetic
import test_rewards_imagereward as small_imagereward
import tiny_clip
import torch
from test_rewards_aesthetic import HEAD, head_weights, in_transformers_format

from scripts.by_rule import weight_by_rule
from srpo_core.config import RewardConfig
from srpo_core.rewards import hpsv2, load_rewards, pickscore
from srpo_core.rewards.mixture import MixedReward

PROMPTS = ["a red cat", "two dogs", "Detail. a red cat", "Detail. two dogs"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small files of every reward; the narrow CLIP known as that of HPS and PickScore."""
    folder = tmp_path_factory.mktemp("rewards")
    state = tiny_clip.weights()
    hps = tiny_clip.save_checkpoint(folder / "hps.pt", state)
    in_transformers_format(folder / "pickscore", state, "gelu")
    in_transformers_format(folder / small_aesthetic.aesthetic.CLIP_FOLDER, state)
    torch.save(head_weights(), folder / HEAD)
    own = folder / "ImageReward"
    small_imagereward.write_vocabulary(own / "bert-base-uncased")
    shapes = small_imagereward.TINY["shapes"].items()
    torch.save({name: weight_by_rule(name, shape) for name, shape in shapes if "position_ids" not in name},
               own / "ImageReward.pt")  # fmt: skip
    (folder / "open_clip").mkdir()
    open_clip = tiny_clip.save_checkpoint(folder / "open_clip" / "open_clip_model.safetensors", state)
    open_clip.with_name("open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": False}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hpsv2, "ARCHITECTURE", tiny_clip.register(folder))
        patch.setattr(pickscore, "IMAGE_WIDTH", tiny_clip.VISION)
        yield {
            "hpsv2": hps, "pickscore": folder / "pickscore", "clip": open_clip.parent, "aesthetic": folder / HEAD,
            "imagereward": own, "miniature": None,
        }  # fmt: skip


NAMES = ["hpsv2", "pickscore", "clip", "aesthetic", "imagereward", "miniature"]


def load(files, name):
    path = files[name]
    return load_rewards(RewardConfig(name=name, path=str(path) if path else None), "cpu")[0]


def images(count=2):
    return torch.rand(count, 3, tiny_clip.SIZE, tiny_clip.SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_the_module_is_all_that_has_to_move(files, name):
    """On the meta device an operation that meets a tensor left behind on the CPU raises, or ends on the CPU."""
    reward = load(files, name).reward
    reward.module.to("meta")
    tensors = [*reward.module.parameters(), *reward.module.buffers()]
    assert tensors and all(tensor.is_meta for tensor in tensors)
    if name != "imagereward":  # transformers' BERT asks for a value of its mask, and there is none
        values = reward(images().to("meta"), PROMPTS)
        assert values.is_meta and values.shape == (4,)


@pytest.mark.parametrize("name", NAMES)
def test_a_module_that_was_moved_gives_the_same_scores(files, name):
    reward = load(files, name).reward
    before = reward(images(), PROMPTS)
    reward.module.to(torch.float64)
    values = reward(images().double(), PROMPTS)
    assert values.dtype == torch.float64 and torch.allclose(values.float(), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_memory_is_free_as_soon_as_nothing_holds_the_reward(files, name):
    """Without the garbage collector, which may come minutes later: no object of it refers to itself in a circle."""
    reward = load(files, name).reward
    with torch.inference_mode():
        reward(images(), PROMPTS)
    gc.collect()
    weights = [weakref.ref(parameter) for parameter in reward.module.parameters()]
    gc.disable()
    try:
        del reward
        assert not any(weight() is not None for weight in weights)
    finally:
        gc.enable()


def test_a_mixtures_module_holds_those_of_its_parts(files):
    parts = [load(files, "hpsv2"), load(files, "miniature")]
    mixed = MixedReward(parts)
    assert list(mixed.module) == [part.reward.module for part in parts]
    assert not list(MixedReward([type(parts[0])("own", lambda images, prompts: images)]).module)

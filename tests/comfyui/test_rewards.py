"""SRPO Load Reward and SRPO Mix Rewards in a real server: the engine's scores, ComfyUI's folders, errors, caching."""

from __future__ import annotations

import os
import shutil
import time

import pytest
import test_rewards_aesthetic as small_aesthetic
import test_rewards_imagereward as small_imagereward
import tiny_clip
import torch
from comfyui_shown import REWARD, node, texts
from comfyui_side import needs_comfyui
from miniature_pictures import drawn

from scripts.by_rule import weight_by_rule
from srpo_core.config import RewardConfig
from srpo_core.miniature.captions import random_scenes
from srpo_core.preview import to_pil
from srpo_core.rewards import load_reward
from srpo_core.rewards.mixture import USUAL
from srpo_core.score_files import load_image

pytestmark = needs_comfyui
PROMPT = random_scenes(1, seed=5)[0].caption()


@pytest.fixture(scope="module")
def image(server):
    """A wide picture in the server's input folder, [1, 3, 96, 128] as it reads it."""
    path = server.base / "input" / "rewarded.png"
    path.parent.mkdir(exist_ok=True)
    to_pil(drawn(random_scenes(1, seed=5), ["Detail"], seed=1)[0, :, 16:112]).save(path)
    return load_image(path)[None]


@pytest.fixture(scope="module")
def files(server):
    """Small files of rewards in the server's folders, where downloads put them; they are gone afterwards."""
    folder, encoders = (server.base / "models" / name for name in ("srpo_rewards", "text_encoders"))
    state = tiny_clip.weights()
    small_aesthetic.in_transformers_format(folder / "narrow", state, "gelu")
    small_aesthetic.in_transformers_format(folder / small_aesthetic.aesthetic.CLIP_FOLDER, state)
    small_aesthetic.in_transformers_format(encoders / "narrow", state, "gelu")
    torch.save(small_aesthetic.head_weights(), folder / small_aesthetic.HEAD)
    own = folder / "ImageReward"
    small_imagereward.write_vocabulary(own / "bert-base-uncased")
    shapes = small_imagereward.TINY["shapes"].items()
    weights = {name: weight_by_rule(name, shape) for name, shape in shapes if "position_ids" not in name}
    torch.save(weights, own / "ImageReward.pt")
    yield folder
    for path in (*folder.iterdir(), encoders / "narrow"):  # ComfyUI misses folders themselves, which it has listed
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def loader(reward, file="auto", **more):
    return node("SRPOLoadReward", **REWARD["inputs"] | {"reward": reward, "file": file} | more)


def graph(reward, prompt=PROMPT, **more):
    """A graph that scores the picture by the node "reward"."""
    given = {"reward": ["reward", 0], "images": ["image", 0], "prompt": prompt, "one_prompt_per_line": False}
    return {
        "image": node("LoadImage", image="rewarded.png"),
        "reward": reward,
        **more,
        "score": node("SRPOScoreImages", **given),
        "number": node("PreviewAny", source=["score", 0]),
    }


def scored(server, *given, **more):
    result = server.run(graph(*given, **more))
    assert result.status == "success", result.error
    return float(texts(result, "number")[0])


def engine(image, prompt=PROMPT, **settings):
    with torch.no_grad():
        return load_reward(RewardConfig(**settings), "cpu")(image, [prompt]).item()


CASES = [
    ("miniature", "auto", None),
    ("clip", "narrow/model.safetensors", "narrow"),
    ("clip", "text_encoders/narrow/model.safetensors", "narrow"),
    ("aesthetic", "auto", small_aesthetic.HEAD),
    ("imagereward", "auto", "ImageReward"),
]


@pytest.mark.parametrize(("reward", "file", "path"), CASES, ids=[f"{reward} {file}" for reward, file, _ in CASES])
def test_scores_are_the_engine_s(server, image, files, reward, file, path):
    found = {"path": str(files / path)} if path else {}
    score = scored(server, loader(reward, file.replace("/", os.sep) if not file.startswith("text") else file))
    assert score == pytest.approx(engine(image, name=reward, **found), abs=1e-5)


def test_a_picture_fits_as_it_is_asked(server, image):
    """Officially the miniature's pictures are cropped; only HPS is padded."""
    scores = {fit: scored(server, loader("miniature", fit=fit)) for fit in ("official", "crop", "pad")}
    expected = {fit: engine(image, name="miniature", fit=fit) for fit in ("crop", "pad")}
    assert scores == pytest.approx(expected | {"official": expected["crop"]}, abs=1e-5)
    assert abs(expected["crop"] - expected["pad"]) > 1e-3


@pytest.mark.parametrize("values", ["comparable", "raw"])
def test_a_mixture_is_the_weighted_mean(server, image, files, values):
    """Of the miniature and the narrow CLIP; then of that mixture and the aesthetic predictor."""
    mix = node(
        "SRPOMixRewards", reward_1=["one", 0], weight_1=1.0, reward_2=["two", 0], weight_2=3.0, values=values,
        reward_3=["three", 0], weight_3=0.0,
    )  # fmt: skip
    parts = {"one": loader("miniature"), "two": loader("clip", f"narrow{os.sep}model.safetensors")}
    parts |= {"three": loader("aesthetic")}
    outer = node(
        "SRPOMixRewards", reward_1=["inner", 0], weight_1=0.5, reward_2=["three", 0], weight_2=1.5, values=values
    )
    raw = {
        "miniature": engine(image, name="miniature"),
        "clip": engine(image, name="clip", path=str(files / "narrow")),
        "aesthetic": engine(image, name="aesthetic", path=str(files / small_aesthetic.HEAD)),
    }
    spans = {name: USUAL[name] if values == "comparable" else (0, 1) for name in raw}
    own = {name: (value - spans[name][0]) / (spans[name][1] - spans[name][0]) for name, value in raw.items()}
    inner = (own["miniature"] + 3 * own["clip"]) / 4
    assert scored(server, mix, **parts) == pytest.approx(inner, abs=1e-4)
    nested = scored(server, outer, inner=mix, **parts)
    assert nested == pytest.approx((0.5 * inner + 1.5 * own["aesthetic"]) / 2, abs=1e-4)


def refusal(server, **nodes):
    """The messages with which ComfyUI refuses a graph."""
    status, answer = server.post(graph(**nodes))
    assert status == 400
    return [error["details"] for problem in answer["node_errors"].values() for error in problem["errors"]]


def test_a_missing_file_is_told_before_anything_runs(server, image):
    """With the folders looked in, what to put where, and a command that gets it."""
    for message in refusal(server, reward=loader("hpsv2")):
        assert f"{server.base / 'models' / 'srpo_rewards'} nor in the Hugging Face cache" in message
        assert f"cache ({server.base / 'hub'})" in message
        assert "HPS_v2.1_compressed.pt of https://huggingface.co/xswu/HPSv2 into models/srpo_rewards" in message
        assert f'__main__.py" download hpsv2 --to comfyui "{server.base}"' in message
    (message, *_) = refusal(server, reward=loader("hpsv2", "gone.pt"))
    assert "file='gone.pt': there is no such file; looked in" in message and "srpo_rewards" in message
    (message, *_) = refusal(server, reward=loader("miniature", "gone.pt"))
    assert "has its weights built in; set file to 'auto'" in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reward": "hps"}, "did you mean 'hpsv2'?"),
        ({"device": "gpu"}, "device: 'gpu' not in"),
        ({"fit": "stretch"}, "fit: 'stretch' not in"),
        ({"offload": "never"}, "offload: 'never' not in"),
    ],
)
def test_bad_values_are_told(server, image, changes, said):
    changed = {"reward": "miniature"} | changes
    assert any(said in message for message in refusal(server, reward=loader(**changed)))


def test_weights_of_a_mixture(server, image):
    def mix(first, second):
        return node("SRPOMixRewards", reward_1=["one", 0], weight_1=first, reward_2=["one", 0], weight_2=second)

    assert any("weight_2" in message for message in refusal(server, reward=mix(1.0, -1.0), one=REWARD))
    result = server.run(graph(mix(0.0, 0.0), one=REWARD))
    assert result.status == "error" and "all weights of the mixture are 0" in result.error
    assert "above 0" in result.error


def test_another_rewards_file_is_refused_by_name(server, image, files):
    result = server.run(graph(loader("imagereward", f"narrow{os.sep}model.safetensors")))
    assert result.status == "error"
    assert f"file='{files / 'narrow' / 'model.safetensors'}'" in result.error
    assert "CLIP" in result.error and "reward.path" not in result.error and "srpo download" not in result.error


def loads(server):
    """How often ComfyUI has moved a reward to its device, by its log."""
    return server.log().count("Requested to load RewardWeights")


def test_a_second_run_is_cached_and_another_file_is_not(server, image, files):
    def run():
        return server.run(graph(loader("clip", f"narrow{os.sep}model.safetensors"), prompt="caching"))

    first, again = run(), run()
    assert {"reward", "score"} <= set(again.cached)
    path = files / "narrow" / "model.safetensors"
    (files / "narrow" / "new").mkdir()
    state = {name: tensor + 0.01 for name, tensor in tiny_clip.weights().items()}
    small_aesthetic.in_transformers_format(files / "narrow" / "new", state, "gelu")
    os.replace(files / "narrow" / "new" / "model.safetensors", path)
    shutil.rmtree(files / "narrow" / "new")
    changed = run()
    assert "reward" not in changed.cached and texts(first, "number") != texts(changed, "number")


def free(server, **flags):
    """POST /free; ComfyUI's worker sees to it when it wakes, perhaps after a graph that comes at once."""
    assert server.send("/free", flags)[0] == 200
    time.sleep(1)


def test_comfyui_unloads_and_forgets_it(server, image):
    """POST /free takes it off its device; the next score brings it back. With free_memory its file is read again."""
    one = server.run(graph(REWARD, "one prompt"))
    before = loads(server)
    assert server.run(graph(REWARD, "another prompt")).status == "success"
    assert loads(server) == before  # it was still there
    free(server, unload_models=True)
    again = server.run(graph(REWARD, "a third prompt"))
    assert "reward" in again.cached and loads(server) == before + 1
    free(server, unload_models=True, free_memory=True)
    anew = server.run(graph(REWARD, "one prompt"))
    assert not anew.cached and loads(server) == before + 2
    assert texts(anew, "number") == texts(one, "number")


def test_after_use_it_is_unloaded_each_time(server, image):
    before = loads(server)
    for prompt in ("first", "second"):
        assert server.run(graph(loader("miniature", offload="after use"), prompt)).status == "success"
    assert loads(server) == before + 2


def test_the_loader_says_what_it_loaded(server, image, files):
    result = server.run(graph(loader("clip", f"narrow{os.sep}model.safetensors"), "told"))
    (text,) = result.outputs["reward"]["text"]
    assert text.startswith("clip: ") and "scores on cpu" in text and str(files / "narrow") in text

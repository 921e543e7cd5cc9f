"""SRPO Direct-Align Preview in a real server: the engine's own pictures and numbers."""

import pytest
import torch
from comfyui_miniature import EMPTY, MODEL, POSITIVE, PROMPT, VAE, miniature, ran, sampler
from comfyui_shown import REWARD, assert_alike, assert_same_numbers, node, shown
from comfyui_side import needs_comfyui
from safetensors.torch import save_file

from srpo_core.align_grid import align_grid
from srpo_core.align_view import align_view, both_ways, finding, step_below, table
from srpo_core.config import RewardConfig
from srpo_core.flow import shifted_sigmas
from srpo_core.interfaces import PromptBatch
from srpo_core.miniature.models import load_reward
from srpo_core.preview import from_pil
from srpo_core.rollout import Rollout, rollout

pytestmark = needs_comfyui
LEVELS, SEED, STEP, GUIDANCE = [0.96, 0.75], 21, 0.0215, 3.5
SETTINGS = {"seed": SEED, "levels": "0.75, 0.96", "step": STEP, "branch": "denoise", "guidance": GUIDANCE}


def preview(inputs, **settings):
    return node("SRPOAlignPreview", model=MODEL, positive=POSITIVE, vae=VAE, **{**SETTINGS, **settings}, **inputs)


def graph_of(inputs, count=1, **settings):
    """The miniature, a preview of `inputs`, and its pictures shown."""
    graph = {**miniature(count), "view": preview(inputs, **settings)}
    for output, name in enumerate(("grid", "recovered", "one_step")):
        graph[name] = node("PreviewImage", images=["view", output])
    return graph


def engines_rollout(engine, count, latents=None):
    """What a preview starts from: the rollout of training (25 steps, guidance 1), or given latents."""
    seeds = range(SEED, SEED + count)
    noise = torch.cat([torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(one)) for one in seeds])
    prompts = engine.text_encoder([PROMPT] * count)
    if latents is not None:
        return Rollout(prompts, noise, latents)
    return rollout(engine.flow, prompts, noise, shifted_sigmas(25, 3.0), 1.0)


def engines_view(engine, start, branch="denoise", reward=None, text=""):
    """What the engine makes of the same question."""
    steps = [step_below(level, STEP, branch) for level in LEVELS]
    latents = both_ways(engine.flow, start, steps, GUIDANCE)
    told = Rollout(PromptBatch((text,) * len(start.clean)), start.noise, start.clean)
    return align_view(engine.autoencoder, told, LEVELS, steps, latents, reward)


def assert_same_table(found, view):
    assert_same_numbers(found, *table(view))
    assert found["note"] == finding(view)


@pytest.mark.parametrize("branch", ["denoise", "inversion"])
def test_an_empty_latent_is_rolled_out_and_both_ways_are_the_engines(server, engine, branch):
    result = ran(server, graph_of({"latent": EMPTY}, count=2, branch=branch))
    view = engines_view(engine, engines_rollout(engine, 2), branch)
    assert_same_table(result.outputs["view"]["srpo_table"][0], view)
    for way in ("recovered", "one_step"):
        assert_alike(shown(server, result, way), view.images(way))


def test_the_reward_stands_in_the_table_and_the_grid_is_shown(server, engine):
    graph = graph_of({"latent": EMPTY, "reward": ["judge", 0], "prompt": PROMPT})
    result = ran(server, {**graph, "judge": REWARD})
    reward = load_reward(RewardConfig(name="miniature"), "cpu")
    view = engines_view(engine, engines_rollout(engine, 1), reward=reward, text=PROMPT)
    assert_same_table(result.outputs["view"]["srpo_table"][0], view)
    (grid,) = shown(server, result, "view")
    (output,) = shown(server, result, "grid")
    assert (grid == output).all()
    wanted = (from_pil(align_grid(view)).permute(1, 2, 0) * 255).numpy()
    assert grid.shape == wanted.shape
    assert abs(grid - wanted).mean() < 0.05


def test_pictures_of_the_sampler_keep_their_own_noise_by_their_seed(server, engine):
    """Drawn by SRPO Sampler as training draws: then the preview is that of the rollout itself."""
    drawn = {"draw": sampler(SEED, steps=25, guidance=1.0)}
    result = ran(server, {**graph_of({"latent": ["draw", 0]}), **drawn})
    assert_same_table(result.outputs["view"]["srpo_table"][0], engines_view(engine, engines_rollout(engine, 1)))


def test_an_image_is_encoded(server, engine):
    drawn = {"draw": sampler(SEED, steps=4), "photo": node("VAEDecode", samples=["draw", 0], vae=VAE)}
    graph = {**graph_of({"image": ["photo", 0]}), **drawn, "clean": node("PreviewImage", images=["photo", 0])}
    result = ran(server, graph)
    (picture,) = shown(server, result, "clean")
    with torch.no_grad():
        latents = engine.autoencoder.encode(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255)
    view = engines_view(engine, engines_rollout(engine, 1, latents))
    found = result.outputs["view"]["srpo_table"][0]
    decibels = found["columns"].index("recovered dB")
    wanted = table(view)[1]
    assert [row[decibels] for row in found["rows"]] == pytest.approx([row[decibels] for row in wanted], abs=0.3)


def test_progress_counts_rollout_levels_pictures_and_scores(server):
    graph = graph_of({"latent": EMPTY, "reward": ["judge", 0], "prompt": PROMPT}, seed=77)
    result = ran(server, {**graph, "judge": REWARD})
    events = [event for event in result.of("progress") if event["node"] == "view"]
    assert {event["max"] for event in events} == {25 + 2 * len(LEVELS) + 1 + 2 * len(LEVELS)}
    values = [event["value"] for event in events]
    assert values == sorted(values)
    assert values[-1] == events[-1]["max"]
    assert not [event for event in result.events if event["type"] == "preview"], (
        "the page would keep a live preview in place of the grid"
    )


def test_an_interrupt_stops_within_a_second(server):
    levels = " ".join(f"{0.05 * i:g}" for i in range(1, 20))
    assert server.seconds_to_stop(graph_of({"latent": EMPTY}, seed=78, levels=levels), "view", 27) < 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("levels", "0.9, much", "levels: 'much' is no level"),
        ("levels", "", "levels is empty"),
        ("step", 0.0, "step"),
        ("branch", "both", "branch"),
        ("guidance", -1.0, "guidance"),
    ],
)
def test_a_bad_widget_value_is_refused_before_anything_runs(server, name, value, message):
    status, answer = server.post(graph_of({"latent": EMPTY}, **{name: value}))
    assert status == 400
    told = answer["node_errors"]["view"]["errors"][0]
    assert message in told["details"]
    assert told["extra_info"]["input_name"] == name


@pytest.mark.parametrize(
    ("inputs", "settings", "message"),
    [
        ({}, {}, "image and latent: connect one of them"),
        ({"latent": EMPTY, "image": ["white", 0]}, {}, "image and latent: connect one of them"),
        ({"latent": EMPTY}, {"levels": "0.9, 0.01"}, "a step of 0.0215 doesn't fit below level 0.01"),
        ({"latent": EMPTY}, {"levels": "1", "branch": "inversion"}, "an inversion step can't end at level 1"),
        ({"latent": EMPTY, "reward": ["judge", 0]}, {}, "prompt"),
        ({"latent": ["many", 0]}, {}, "latent: 9 pictures are too many for one grid; 8 at most"),
    ],
)
def test_a_question_without_an_answer_is_refused_in_words(server, inputs, settings, message):
    more = {
        "judge": REWARD,
        "white": node("EmptyImage", width=128, height=128, batch_size=1, color=0xFFFFFF),
        "many": node("EmptySD3LatentImage", width=128, height=128, batch_size=9),
    }
    result = server.run({**graph_of(inputs, **settings), **more})
    assert result.status == "error"
    assert message in result.error


def test_a_latent_of_another_model_is_refused(server):
    (server.base / "input").mkdir(exist_ok=True)
    tensors = {"latent_tensor": torch.ones(1, 4, 16, 16), "latent_format_version_0": torch.tensor([])}
    save_file(tensors, server.base / "input" / "four.latent")
    result = server.run({**graph_of({"latent": ["file", 0]}), "file": node("LoadLatent", latent="four.latent")})
    assert "latent: it has 4 channels, this model's have 16" in result.error

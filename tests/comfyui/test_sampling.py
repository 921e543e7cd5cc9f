"""SRPO Sigmas and SRPO Sampler in a real server: pictures of the engine and of ComfyUI's own samplers."""

import itertools
from io import BytesIO

import numpy as np
import pytest
import torch
from comfyui_miniature import EMPTY, MODEL, POSITIVE, PROMPT, VAE, latents_of, miniature, ran, sampler, saved
from comfyui_shown import node, shown
from comfyui_side import needs_comfyui, relative_error
from PIL import Image

from srpo_core.description import load_run
from srpo_core.flow import shifted_sigmas
from srpo_core.randomness import fixed_noise
from srpo_core.rollout import rollout
from srpo_core.sampling import SampleSettings, sample

pytestmark = needs_comfyui
SEED, STEPS, SHIFT, GUIDANCE = 11, 6, 3.0, 3.5
SAME = 5e-6
"""Relative, of latents: rounding of float32 over all steps. Measured: 8e-7."""
NUMBERS = itertools.count()
"""No graph of a test is cached for another."""


def drawn(server, seed=SEED, count=1, latent=EMPTY, more=None, **settings):
    """Latents [B, C, h, w] of SRPO Sampler, and the result."""
    graph = {**miniature(count), **(more or {}), "draw": sampler(seed, latent, steps=STEPS, **settings)}
    graph["kept"] = saved(["draw", 0], f"kept{next(NUMBERS)}")
    result = ran(server, graph)
    return latents_of(server, result, "kept"), result


def comfyui_noise(seed, shape):
    """Noise of ComfyUI's samplers for one picture."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def likeness(preview, latents):
    """How much of a preview's colours is a linear function of latents [C, h, w]: 1 if it shows them, near 0 if not."""
    size = latents.shape[2], latents.shape[1]
    small = preview.convert("RGB").resize(size, Image.Resampling.BOX)
    colours = torch.from_numpy(np.array(small, np.float32)).view(-1, 3)
    channels = torch.cat([latents, torch.ones_like(latents[:1])]).flatten(1).T
    left = colours - channels @ torch.linalg.lstsq(channels, colours).solution
    return 1 - (left.square().sum() / (colours - colours.mean(0)).square().sum()).item()


@pytest.mark.parametrize("kind", ["engine", "ComfyUI"])
def test_pictures_are_the_engines_rollout_of_the_same_noise(server, engine, kind):
    found, _ = drawn(server, count=2, noise=kind)
    shape = engine.flow.latent_shape(128, 128)
    make = comfyui_noise if kind == "ComfyUI" else lambda seed, shape: fixed_noise(seed, 1, shape, "sample")
    noise = torch.cat([make(SEED + i, shape) for i in range(2)])
    wanted = rollout(engine.flow, engine.text_encoder([PROMPT] * 2), noise, shifted_sigmas(STEPS, SHIFT), GUIDANCE)
    assert relative_error(found, wanted.clean) < SAME


def test_pictures_are_those_of_srpo_sample(server, tmp_path):
    """Whole pictures of the command line: one step of 255 apart at most, as ComfyUI rounds down where it rounds."""
    graph = {**miniature(), "draw": sampler(SEED, steps=STEPS, noise="engine")}
    graph |= {
        "decode": node("VAEDecode", samples=["draw", 0], vae=VAE),
        "show": node("PreviewImage", images=["decode", 0]),
    }
    (found,) = shown(server, ran(server, graph), "show")
    config = load_run("miniature", ["parallel.device=cpu"])
    settings = SampleSettings.of(config, steps=STEPS, guidance=GUIDANCE)
    (file,) = sample(config, None, settings, tmp_path, prompts=[PROMPT], seeds=[SEED]).files
    assert np.abs(found - np.array(Image.open(file)).astype(int)).max() <= 1


def test_pictures_are_those_of_comfyuis_own_euler_on_srpos_sigmas(server):
    """SamplerCustomAdvanced with RandomNoise, BasicGuider, FluxGuidance: another way through ComfyUI."""
    graph = {
        **miniature(),
        "sigmas": node("SRPOSigmas", shift=SHIFT, steps=STEPS),
        "guidance": node("FluxGuidance", conditioning=POSITIVE, guidance=GUIDANCE),
        "guider": node("BasicGuider", model=MODEL, conditioning=["guidance", 0]),
        "noise": node("RandomNoise", noise_seed=SEED),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "core": node(
            "SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["euler", 0],
            sigmas=["sigmas", 0], latent_image=EMPTY,
        ),
        "theirs": saved(["core", 0], "theirs"),
        "draw": sampler(SEED, steps=STEPS),
        "ours": saved(["draw", 0], "ours"),
    }  # fmt: skip
    result = ran(server, graph)
    assert relative_error(latents_of(server, result, "ours"), latents_of(server, result, "theirs")) < SAME


def test_the_widget_replaces_guidance_of_the_conditioning(server):
    guided = {"guided": node("FluxGuidance", conditioning=POSITIVE, guidance=1.0)}
    graph = {**miniature(), **guided, "draw": sampler(SEED, steps=STEPS), "other": sampler(SEED, steps=STEPS)}
    graph["other"]["inputs"]["positive"] = ["guided", 0]
    graph |= {"one": saved(["draw", 0]), "two": saved(["other", 0])}
    result = ran(server, graph)
    assert torch.equal(latents_of(server, result, "one"), latents_of(server, result, "two"))


@pytest.mark.parametrize("kind", ["engine", "ComfyUI"])
def test_each_picture_of_a_batch_can_be_drawn_alone(server, kind):
    batch, _ = drawn(server, count=3, noise=kind, at_once=2)
    assert len(batch) == 3
    for i in range(3):
        alone, _ = drawn(server, seed=SEED + i, noise=kind)
        assert relative_error(batch[i : i + 1], alone) < SAME
    together, _ = drawn(server, count=3, noise=kind, at_once=3)
    assert relative_error(batch, together) < SAME


def test_a_picture_taken_out_of_a_batch_keeps_its_noise(server):
    batch, _ = drawn(server, count=3)
    taken = {"one": node("LatentFromBatch", samples=EMPTY, batch_index=2, length=1)}
    alone, _ = drawn(server, count=3, latent=["one", 0], more=taken)
    assert len(alone) == 1
    assert relative_error(batch[2:], alone) < SAME


def test_what_is_in_the_latent_does_not_matter(server):
    first, _ = drawn(server, seed=1)
    more = {"before": sampler(5, steps=2)}
    again, _ = drawn(server, seed=1, latent=["before", 0], more=more)
    assert torch.equal(first, again)


def test_an_empty_latent_of_another_size_asks_for_as_many_pixels_as_in_ksampler(server):
    """Its values stand for 16 x 16 pixels, the miniature's for 8 x 8; ComfyUI 0.9 takes them for the same."""
    settings = {"seed": 1, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    graph = {
        **miniature(),
        "coarse": node("EmptyHunyuanImageLatent", width=256, height=128, batch_size=1),
        "core": node(
            "KSampler", model=MODEL, positive=POSITIVE, negative=POSITIVE, latent_image=["coarse", 0], **settings
        ),
        "theirs": saved(["core", 0], "theirs"),
        "draw": sampler(1, ["coarse", 0], steps=1),
        "ours": saved(["draw", 0], "ours"),
    }
    result = ran(server, graph)
    assert latents_of(server, result, "ours").shape == latents_of(server, result, "theirs").shape


def test_previews_and_progress_come_with_every_step(server):
    """Each group of pictures that is drawn together shows its first one as it becomes."""
    seed = 1000 + next(NUMBERS)
    latents, result = drawn(server, seed=seed, count=3, at_once=2)
    values = [event["value"] for event in result.of("progress") if event["node"] == "draw"]
    assert values == list(range(1, 2 * STEPS + 1))
    assert {event["max"] for event in result.of("progress") if event["node"] == "draw"} == {2 * STEPS}
    pictures = [event["data"] for event in result.events if event["type"] == "preview"]
    assert len(pictures) == 2 * STEPS
    previews = [Image.open(BytesIO(data[data.index(b"\xff\xd8") :])) for data in pictures]
    assert {(one.format, one.width == one.height) for one in previews} == {("JPEG", True)}
    for group, picture in ((previews[:STEPS], latents[0]), (previews[STEPS : 2 * STEPS], latents[2])):
        likenesses = [likeness(one, picture) for one in group]
        print("likeness of previews to the finished picture", [round(one, 3) for one in likenesses])
        assert likenesses[0] < 0.9 and likenesses[-1] > 0.94


def test_a_second_run_is_cached(server):
    graph = {**miniature(), "draw": sampler(2000 + next(NUMBERS), steps=2)}
    graph["kept"] = saved(["draw", 0])
    assert "draw" not in ran(server, graph).cached
    assert {"mini", "text", "empty", "draw"} <= set(ran(server, graph).cached)


def test_an_interrupt_stops_within_a_second(server):
    graph = {**miniature(), "draw": sampler(3000 + next(NUMBERS), steps=1000)}
    graph["kept"] = saved(["draw", 0])
    assert server.seconds_to_stop(graph, "draw", 2) < 1
    drawn(server, seed=1)


def test_the_seed_comes_out_as_it_went_in(server):
    seed = 2**64 - 2
    graph = {**miniature(count=3), "draw": sampler(seed, steps=1), "kept": saved(["draw", 0])}
    graph["again"] = node("SRPOSampler", **{**sampler(0, steps=1)["inputs"], "seed": ["draw", 1]})
    graph["same"] = saved(["again", 0])
    result = ran(server, graph)
    assert torch.equal(latents_of(server, result, "kept"), latents_of(server, result, "same"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 1001),
        ("guidance", -0.1),
        ("shift", 0.0),
        ("noise", "mine"),
        ("at_once", 0),
        ("seed", -1),
    ],
)
def test_a_value_out_of_bounds_is_refused_before_anything_runs(server, name, value):
    graph = {**miniature(), "draw": sampler(1), "kept": saved(["draw", 0])}
    graph["draw"]["inputs"][name] = value
    status, answer = server.post(graph)
    assert status == 400
    told = answer["node_errors"]["draw"]["errors"][0]
    assert told["extra_info"]["input_name"] == name
    assert name in told["details"]


def test_a_masked_latent_is_refused_with_a_way_out(server):
    mask = {
        "mask": node("SolidMask", value=1.0, width=128, height=128),
        "masked": node("SetLatentNoiseMask", samples=EMPTY, mask=["mask", 0]),
    }
    result = server.run({**miniature(), **mask, "draw": sampler(1, ["masked", 0]), "kept": saved(["draw", 0])})
    assert result.status == "error"
    assert "noise mask" in result.error
    assert "KSampler" in result.error


def test_the_latent_of_a_video_is_refused_with_a_way_out(server):
    video = {"video": node("EmptyHunyuanLatentVideo", width=128, height=128, length=5, batch_size=1)}
    result = server.run({**miniature(), **video, "draw": sampler(1, ["video", 0]), "kept": saved(["draw", 0])})
    assert result.status == "error"
    assert "video" in result.error
    assert "EmptySD3LatentImage" in result.error

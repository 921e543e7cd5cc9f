"""Every miniature graph of workflows/ in a real server: its pictures and numbers are the engine's own."""

import json
import sys
from functools import cache

import pytest
import torch
from comfyui_server import PACK
from comfyui_shown import assert_alike, assert_same_numbers, shown
from comfyui_side import needs_comfyui

from srpo_core.align_view import align_view, both_ways, read_levels, step_below, table
from srpo_core.best_of import best_of
from srpo_core.config import ModelConfig
from srpo_core.flow import shifted_sigmas
from srpo_core.image_scores import by_word, control_words, score_batch
from srpo_core.interfaces import PromptBatch
from srpo_core.lora import merge_lora
from srpo_core.miniature import WEIGHTS
from srpo_core.miniature.models import load
from srpo_core.rollout import Rollout, rollout
from srpo_core.weights.lora_names import read_lora

sys.path.append(str(PACK / "scripts"))

from graphs import schemas
from graphs.prompt import prompt_of

pytestmark = needs_comfyui
KNOWN = schemas.load()
TWINS = sorted(file.stem for file in (PACK / "workflows").glob("*-miniature.json"))
SCORE = 1e-4
"""Largest difference of a score: pictures are drawn by two programs, and the reward reads them after both.
Measured: below 2e-5."""


def prompt_named(name):
    workflow = json.loads((PACK / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    return prompt_of(workflow, KNOWN)


def ids(prompt, kind):
    return [id for id, node in prompt.items() if node["class_type"] == kind]


@pytest.fixture(scope="module")
def twice(server):
    """Each graph's (prompt, result, result of the very next run), run when it is first asked for."""

    @cache
    def run(name):
        prompt = prompt_named(f"{name}-miniature")
        result, again = server.run(prompt), server.run(prompt)
        assert result.status == "success", f"{result.error}\n{server.log()[-3000:]}"
        return prompt, result, again

    return run


@pytest.fixture(scope="module")
def ran(twice):
    """Each graph's (prompt, result)."""
    return lambda name: twice(name)[:2]


class Engine:
    """The engine's own miniature, plain or with its LoRA, drawing as SRPO Sampler does."""

    def __init__(self, lora=False):
        self.parts = load(ModelConfig(family="miniature", dtype="float32", recompute=False), "cpu")
        if lora:
            merge_lora(self.parts.flow.module, read_lora(WEIGHTS / "lora.safetensors", "lora"))

    def rollout(self, text, seeds, steps, guidance=3.5):
        noise = [torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        prompts = self.parts.text_encoder([text] * len(noise))
        return rollout(self.parts.flow, prompts, torch.cat(noise), shifted_sigmas(steps, 3.0), guidance)

    @torch.no_grad()
    def images(self, text, seeds, steps):
        return self.parts.autoencoder.decode(self.rollout(text, seeds, steps).clean)


@pytest.fixture(scope="module")
def plain():
    return Engine()


@pytest.fixture(scope="module")
def tuned():
    return Engine(lora=True)


def tables(result, id):
    return result.outputs[id]["srpo_table"]


def column(shown_table, name):
    place = shown_table["columns"].index(name)
    return [row[place] for row in shown_table["rows"]]


def text_of(prompt):
    (box,) = ids(prompt, "PrimitiveStringMultiline")
    return prompt[box]["inputs"]["value"]


def test_srpo_workflow_draws_the_engines_picture_both_ways(server, ran, tuned):
    prompt, result = ran("SRPO-workflow")
    (encode,), (saved,), (preview,) = (ids(prompt, one) for one in ("CLIPTextEncode", "SaveImage", "PreviewImage"))
    expected = tuned.images(prompt[encode]["inputs"]["text"], [42], 50)
    one, other = (shown(server, result, id) for id in (saved, preview))
    assert_alike(one, expected)
    assert_alike(other, expected)


def test_score_images_gives_the_engines_scores(ran, plain, reward):
    prompt, result = ran("score_images")
    text = text_of(prompt)
    images = torch.cat([plain.images(one, [7, 8], 25) for one in (text, f"Real. {text}")])
    (relative,) = ids(prompt, "SRPORelativeScore")
    inputs = prompt[relative]["inputs"]
    words = control_words(*([word.strip() for word in inputs[side].split(",")] for side in ("liked", "disliked")))
    expected = score_batch(reward, images, [text] * 4, words)
    for id in ids(prompt, "SRPOScoreImages"):
        if prompt[id]["inputs"]["reward"][0] in ids(prompt, "SRPOLoadReward"):
            assert column(tables(result, id)[0], "score") == pytest.approx(expected["reward"], abs=SCORE)
        else:
            assert column(tables(result, id)[0], "miniature") == pytest.approx(expected["reward"], abs=SCORE)
    (found,) = tables(result, relative)
    assert column(found, "relative") == pytest.approx(expected["relative"], abs=SCORE)
    for word, values in by_word(expected, words).items():
        assert column(found, word) == pytest.approx(values, abs=SCORE)
    assert max(expected["relative"][:2]) < 0 < min(expected["relative"][2:]), "the look that was asked for shows"


def test_best_of_n_keeps_the_engines_best_and_draws_them_again(server, ran, plain, reward):
    prompt, result = ran("best_of_n")
    text, seeds = text_of(prompt), list(range(1, 9))
    scores = score_batch(reward, plain.images(text, seeds, 25), [text] * 8)["reward"]
    (best,), (saved,) = ids(prompt, "SRPOBestOfN"), ids(prompt, "SaveImage")
    (found,) = tables(result, best)
    expected = [seeds[i] for i in best_of(scores, 2)]
    assert column(found, "seed") == expected
    assert column(found, "score") == pytest.approx([scores[seed - 1] for seed in expected], abs=SCORE)
    assert_alike(shown(server, result, saved), plain.images(text, expected, 50))


def test_align_preview_gives_the_engines_numbers(ran, plain, reward):
    prompt, result = ran("align_preview")
    text = text_of(prompt)
    drawn = plain.rollout(text, [5], 25, guidance=1.0)
    views = ids(prompt, "SRPOAlignPreview")
    assert {prompt[id]["inputs"]["branch"] for id in views} == {"denoise", "inversion"}
    for id in views:
        inputs = prompt[id]["inputs"]
        levels = read_levels(inputs["levels"])
        steps = [step_below(level, inputs["step"], inputs["branch"]) for level in levels]
        latents = both_ways(plain.parts.flow, drawn, steps, inputs["guidance"])
        told = Rollout(PromptBatch((text,)), drawn.noise, drawn.clean)
        (found,) = tables(result, id)
        assert_same_numbers(found, *table(align_view(plain.parts.autoencoder, told, levels, steps, latents, reward)))


def test_compare_lora_gives_the_engines_scores_of_both(ran, plain, tuned, reward):
    prompt, result = ran("compare_lora")
    text, seeds = text_of(prompt), list(range(3, 11))
    (compare,) = ids(prompt, "SRPOCompare")
    pictures = next(one for one in tables(result, compare) if "seed" in one["columns"])
    assert column(pictures, "seed") == seeds
    words = control_words(*(KNOWN_WORDS[side].split(", ") for side in ("liked", "disliked")))
    relative = {}
    for engine, label, output in ((plain, "without", 1), (tuned, "with LoRA", 2)):
        expected = score_batch(reward, engine.images(text, seeds, 25), [text] * len(seeds), words)
        assert column(pictures, label) == pytest.approx(expected["reward"], abs=SCORE)
        (id,) = (id for id in ids(prompt, "SRPORelativeScore") if prompt[id]["inputs"]["images"] == [compare, output])
        relative[label] = column(tables(result, id)[0], "relative")
        assert relative[label] == pytest.approx(expected["relative"], abs=SCORE)
    assert max(relative["without"]) < min(relative["with LoRA"]), "what SRPO trained shows in every picture"


KNOWN_WORDS = {
    entry.name: entry.default for entry in KNOWN["SRPORelativeScore"].widgets if entry.name in ("liked", "disliked")
}


@pytest.mark.parametrize("name", TWINS)
def test_progress_comes_from_every_node_that_draws(ran, name):
    prompt, result = ran(name.removesuffix("-miniature"))
    kinds = ("SRPOSampler", "SamplerCustomAdvanced", "SRPOCompare", "SRPOAlignPreview")
    for id in (id for kind in kinds for id in ids(prompt, kind)):
        values = [event["value"] for event in result.of("progress") if event["node"] == id]
        assert len(values) >= 5 and max(values) == values[-1]
        ends = {event["max"] for event in result.of("progress") if event["node"] == id}
        assert ends == {values[-1]}


@pytest.mark.parametrize("name", TWINS)
def test_a_second_run_is_cached(twice, name):
    """The very next one: ComfyUI keeps what the last graph needed. The pictures and tables are there all the same."""
    prompt, first, again = twice(name.removesuffix("-miniature"))
    assert again.status == "success"
    assert set(again.cached) == set(prompt)
    ends = [id for id in prompt if KNOWN[prompt[id]["class_type"]].output_node]
    assert ends and all(again.outputs[id] == first.outputs[id] for id in ends)


@pytest.mark.parametrize("name", TWINS)
def test_an_interrupt_stops_a_graph_within_a_second(server, name):
    """As soon as the first picture is begun."""
    prompt = prompt_named(name)
    for id in prompt:
        for seed in {"seed", "noise_seed"} & set(prompt[id]["inputs"]):
            if not isinstance(prompt[id]["inputs"][seed], list):
                prompt[id]["inputs"][seed] += 1000
    assert server.seconds_to_stop(prompt) < 1


WRONG = [
    ("SRPO-workflow", "SRPOSigmas", "steps", 0, "smaller than min"),
    ("score_images", "SRPOSampler", "guidance", "much", "could not convert"),
    ("SRPO-workflow", "SRPOLoadLoRA", "lora", "none.safetensors", "none.safetensors"),
    ("SRPO-workflow", "SRPOLoadLoRA", "strength", 50.0, "bigger than max"),
    ("score_images", "SRPOLoadReward", "reward", "hps", "did you mean 'hpsv2'?"),
    ("score_images", "SRPOLoadReward", "fit", "stretch", "not in"),
    ("best_of_n", "SRPOSampler", "at_once", 0, "smaller than min"),
    ("align_preview", "SRPOAlignPreview", "branch", "both", "not in"),
    ("align_preview", "SRPOAlignPreview", "step", 2.0, "bigger than max"),
    ("compare_lora", "SRPOCompare", "steps", "many", "invalid literal"),
    ("compare_lora", "SRPOCompare", "shift", -1.0, "smaller than min"),
]


def without_others(prompt, kind):
    """A graph without those of its ends that need no node of a kind: ComfyUI would run them all the same."""

    def needs(id):
        links = [value[0] for value in prompt[id]["inputs"].values() if isinstance(value, list)]
        return prompt[id]["class_type"] == kind or any(map(needs, links))

    used = {value[0] for node in prompt.values() for value in node["inputs"].values() if isinstance(value, list)}
    return {id: node for id, node in prompt.items() if id in used or needs(id)}


@pytest.mark.parametrize(("name", "kind", "widget", "value", "words"), WRONG)
def test_a_bad_value_is_refused_with_a_message(server, name, kind, widget, value, words):
    prompt = without_others(prompt_named(f"{name}-miniature"), kind)
    for id in ids(prompt, kind):
        prompt[id]["inputs"][widget] = value
    status, answer = server.post(prompt)
    assert status == 400
    errors = [error for id in ids(prompt, kind) for error in answer["node_errors"][id]["errors"]]
    assert errors
    for error in errors:
        told = f"{error['message']} {error['details']}"
        assert widget in told and words in told, told


@pytest.mark.parametrize("name", [name.removesuffix("-miniature") for name in TWINS])
def test_the_graph_for_flux_asks_only_for_files(server, name):
    """On a machine without its files it is refused with nothing but their names: all else of it is right."""
    prompt = prompt_named(name)
    status, answer = server.post(prompt)
    assert status == 400
    assert answer["error"]["type"] == "prompt_outputs_failed_validation" and answer["node_errors"]
    files = {"unet_name", "clip_name1", "clip_name2", "vae_name", "checkpoint", "lora", "image", "reward"}
    names = {str(prompt[id]["inputs"][one]) for id in prompt for one in files & set(prompt[id]["inputs"])}
    for id, entry in answer["node_errors"].items():
        kind = prompt[id]["class_type"]
        assert kind in ("UNETLoader", "DualCLIPLoader", "VAELoader", "LoadImage") or kind.startswith("SRPOLoad")
        for error in entry["errors"]:
            told = f"{error['message']} {error['details']}"
            assert any(name in told for name in names), told


def test_the_snapshot_of_nodes_is_this_servers(server):
    """Ours to the last default; of ComfyUI's own, the sockets and widgets that graphs are saved with."""
    for kind, known in KNOWN.items():
        there = schemas.fetch(server.url, kind)
        if kind.startswith("SRPO"):
            assert there == known
        else:
            saved = [(entry.name, entry.type, entry.widget, entry.extra) for entry in known.inputs]
            inputs = [(entry.name, entry.type, entry.widget, entry.extra) for entry in there.inputs]
            outputs = [output.type for output in there.outputs]
            assert inputs == saved[: len(inputs)]  # newer ComfyUIs appended some, of outputs too
            assert outputs == [output.type for output in known.outputs][: len(outputs)]

"""Graphs that look at pictures and models: score_images, align_preview and compare_lora."""

from __future__ import annotations

from .drawing import OFF, STEPS
from .layout import ALWAYS, NEVER, Graph, Wire
from .world import (
    BLUE,
    BUILT_IN,
    FLUX,
    GREEN,
    LORA_FILE,
    ORANGE,
    VIOLET,
    World,
    decode,
    encode,
    prompt_box,
    save,
    start_here,
)

ROLLOUT_STEPS, ROLLOUT_GUIDANCE = 25, 1.0
"""How training draws the pictures that it aligns on."""


def score_images(graph: Graph, world: World) -> None:
    """Pictures scored against their prompt: plainly, by liked and disliked words, and by two rewards mixed."""
    start_here(graph, height=360 if world.miniature else 520)
    images, prompt = _drawn_pictures(graph, world) if world.miniature else _own_pictures(graph)
    graph.group("2  How good they are", ORANGE)
    reward = world.load_reward(graph)
    graph.column()
    shared = {"images": images, "prompt": prompt}
    graph.add("SRPOScoreImages", {**shared, "reward": reward}, width=460, height=720)
    graph.group("3  Which words they lean to", VIOLET)
    graph.add("SRPORelativeScore", {**shared, "reward": reward}, width=480, height=650)
    graph.row()
    graph.group("4  Two rewards as one" + ("" if world.miniature else OFF), BLUE, ALWAYS if world.miniature else NEVER)
    other = world.load_reward(graph, "miniature" if world.miniature else "pickscore")
    graph.column()
    mixed = graph.add("SRPOMixRewards", {"reward_1": reward, "reward_2": other}, width=320).out()
    graph.column()
    graph.add("SRPOScoreImages", {**shared, "reward": mixed}, width=460, height=620)


def _own_pictures(graph: Graph) -> tuple[Wire, Wire]:
    """Two files of ComfyUI's input folder; the one that every ComfyUI has until others are chosen."""
    graph.group("1  Your pictures and their prompt", GREEN)
    prompt = prompt_box(graph, "A girl with blonde hair and a pink dress on a green hill under a blue sky")
    files = [graph.add("LoadImage", {"image": "example.png"}, width=340, height=340).out("IMAGE") for _ in range(2)]
    graph.column()
    batch = graph.add("BatchImagesNode", {f"images.image{i}": image for i, image in enumerate(files)}, width=240)
    return batch.out(), prompt


def _drawn_pictures(graph: Graph, world: World) -> tuple[Wire, Wire]:
    """Two pictures as the miniature draws them, two in a look that is asked for; one prompt to score them for."""
    graph.group("1  Pictures to score", GREEN)
    text = "a red ball on the left in a meadow"
    model, clip, vae = world.models(graph)
    prompt = prompt_box(graph, text)
    prompts = [encode(graph, clip, prompt), encode(graph, clip, f"Real. {text}")]
    latents = world.size(graph, batch=2)
    batches = {}
    for i, positive in enumerate(prompts):
        graph.column()
        given = {"model": model, "positive": positive, "latent": latents, "seed": 7, "steps": 25}
        sampler = graph.add("SRPOSampler", given)
        batches[f"images.image{i}"] = decode(graph, sampler.out("LATENT"), vae)
    return graph.add("BatchImagesNode", batches, width=240).out(), prompt


def align_preview(graph: Graph, world: World) -> None:
    """What one step of training sees at each noise level, of a picture drawn as training draws it."""
    start_here(graph, height=420 if world.miniature else 560)
    graph.group("1  Models", GREEN)
    model, clip, vae = world.models(graph, file=FLUX)
    world.beside_loaders(graph)
    reward = world.load_reward(graph)
    graph.group("2  A picture as training draws it", BLUE)
    text = world.prompt("A red fox sleeps in fallen leaves, morning light, photograph",
                        "three purple stars at night")  # fmt: skip
    prompt = prompt_box(graph, text)
    positive = encode(graph, clip, prompt)
    latent = world.size(graph, square=True)
    graph.column()
    given = {"model": model, "positive": positive, "latent": latent, "seed": 5, "steps": ROLLOUT_STEPS,
             "guidance": ROLLOUT_GUIDANCE}  # fmt: skip
    rollout = graph.add("SRPOSampler", given, title="Rollout (SRPO Sampler)")
    shared = {"model": model, "positive": positive, "vae": vae, "reward": reward, "prompt": prompt}
    shared |= {"latent": rollout.out("LATENT"), "seed": rollout.out("seed")}
    graph.row()
    graph.group("3  Denoise branch, towards liked words", ORANGE)
    graph.add("SRPOAlignPreview", {**shared, "branch": "denoise"}, width=1000, height=1040)
    graph.group("4  Inversion branch, away from disliked words", VIOLET)
    graph.add("SRPOAlignPreview", {**shared, "branch": "inversion"}, width=1000, height=1040)


def compare_lora(graph: Graph, world: World) -> None:
    """A model without and with a LoRA, from the same noise, with scores; and half the LoRA's strength."""
    count = 8 if world.miniature else 4
    start_here(graph, height=360 if world.miniature else 520)
    graph.group("1  Models", GREEN)
    model, clip, vae = world.models(graph, file=FLUX)
    world.beside_loaders(graph)
    lora = BUILT_IN if world.miniature else LORA_FILE
    with_lora = graph.add("SRPOLoadLoRA", {"model": model, "lora": lora, "strength": 1.0}, width=360).out()
    reward = world.load_reward(graph)
    graph.group("2  Prompt, size, number of pictures", BLUE)
    text = world.prompt("A street market after rain, an old woman sells oranges, overcast light, photograph",
                        "a blue heart on the left and a yellow moon on the right in the snow")  # fmt: skip
    prompt = prompt_box(graph, text)
    positive = encode(graph, clip, prompt)
    latent = world.size(graph, batch=count)
    graph.group("3  Same noise, both models", ORANGE)
    given = {"model_a": model, "model_b": with_lora, "positive": positive, "vae": vae, "latent": latent, "seed": 3,
             "steps": 25 if world.miniature else STEPS, "label_a": "without", "label_b": "with LoRA", "reward": reward,
             "prompt": prompt}  # fmt: skip
    pairs = graph.add("SRPOCompare", given, width=620, height=1060)
    graph.row()
    graph.group("4  Which words each leans to", VIOLET)
    for side, title in (("images_a", "Without the LoRA"), ("images_b", "With the LoRA")):
        graph.column()
        given = {"reward": reward, "images": pairs.out(side), "prompt": prompt}
        graph.add("SRPORelativeScore", given, title=f"{title} (SRPO Relative Score)", width=480, height=770)
    graph.group("5  Keep the pairs", GREEN)
    save(graph, pairs.out("side_by_side"), world, "compare", width=520, height=560)

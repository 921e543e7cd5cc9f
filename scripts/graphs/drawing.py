"""Graphs that draw: SRPO-workflow and best_of_n."""

from __future__ import annotations

from .layout import ALWAYS, NEVER, Graph
from .world import BLUE, BUILT_IN, GREEN, ORANGE, VIOLET, World, decode, encode, prompt_box, save, start_here

STEPS, DRAFT_STEPS = 50, 25
"""Euler steps of finished pictures and of drafts."""
OFF = "  (off; to switch on: right-click the frame, Set Group Nodes to Always)"


def srpo_workflow(graph: Graph, world: World) -> None:
    """The published settings with ComfyUI's own nodes and SRPO Sigmas; below, the same in one node."""
    start_here(graph, height=300 if world.miniature else 540)
    graph.group("1  Models", GREEN)
    model, clip, vae = world.models(graph, core=True)
    if world.miniature:
        model = graph.add("SRPOLoadLoRA", {"model": model, "lora": BUILT_IN, "strength": 1.0}).out()
    graph.group("2  Prompt, guidance, size", BLUE)
    text = world.prompt(
        "A woman reads at the window of a small café on a rainy evening, warm lamp light on her face, reflections of"
        " the street in the wet glass, photograph",
        "a pink ring above a white box in the desert",
    )
    positive = encode(graph, clip, text, height=180)
    guided = graph.add("FluxGuidance", {"conditioning": positive, "guidance": 3.5}, width=340).out()
    latent = world.size(graph)
    graph.group("3  Euler, 50 steps, shift 3", VIOLET)
    noise = graph.add("RandomNoise", {"noise_seed": 42}).out()
    guider = graph.add("BasicGuider", {"model": model, "conditioning": guided}).out()
    sampler = graph.add("KSamplerSelect", {"sampler_name": "euler"}).out()
    sigmas = graph.add("SRPOSigmas", {"shift": 3.0, "steps": STEPS}).out()
    graph.column()
    given = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas, "latent_image": latent}
    drawn = graph.add("SamplerCustomAdvanced", given).out("output")
    images = decode(graph, drawn, vae)
    graph.group("4  Picture", ORANGE)
    save(graph, images, world, "picture", width=520, height=420)
    graph.row()
    graph.group("The same picture from one node" + ("" if world.miniature else OFF), VIOLET,
                ALWAYS if world.miniature else NEVER)  # fmt: skip
    given = {"model": model, "positive": positive, "latent": latent, "seed": 42, "steps": STEPS}
    sampler = graph.add("SRPOSampler", given, width=340)
    graph.column()
    images = decode(graph, sampler.out("LATENT"), vae)
    graph.column()
    graph.add("PreviewImage", {"images": images}, width=520, height=420)


def best_of_n(graph: Graph, world: World) -> None:
    """Drafts of one prompt, the best found by a reward, then drawn again with all steps."""
    drafts, keep = 8, 2
    start_here(graph, height=320 if world.miniature else 500)
    graph.group("1  Models", GREEN)
    model, clip, vae = world.models(graph)
    world.beside_loaders(graph)
    reward = world.load_reward(graph)
    graph.group("2  Prompt, size, number of drafts", BLUE)
    text = world.prompt(
        "An old fisherman mends a net on a harbour wall at dawn, weathered hands, soft low light, photograph",
        "two blue stars in the snow",
    )
    prompt = prompt_box(graph, text)
    positive = encode(graph, clip, prompt)
    latents = world.size(graph, batch=drafts)
    graph.group(f"3  {drafts} drafts of {DRAFT_STEPS} steps", VIOLET)
    shared = {"model": model, "positive": positive, "at_once": 4 if world.miniature else 1}
    sampler = graph.add("SRPOSampler", {**shared, "latent": latents, "seed": 1, "steps": DRAFT_STEPS})
    images = decode(graph, sampler.out("LATENT"), vae)
    graph.group(f"4  Score them, keep the best {keep}", ORANGE)
    scores = graph.add("SRPOScoreImages", {"reward": reward, "images": images, "prompt": prompt}, width=460, height=720)
    graph.column()
    given = {"images": images, "scores": scores.out("scores"), "keep": keep, "seed": sampler.out("seed")}
    best = graph.add("SRPOBestOfN", given, width=460, height=560)
    graph.row()
    graph.group(f"5  Draw the best again, {STEPS} steps", VIOLET)
    latent = world.size(graph)
    graph.column()
    given = {**shared, "latent": latent, "seed": best.out("seeds"), "steps": STEPS}
    finished = graph.add("SRPOSampler", given, width=340)
    graph.column()
    images = decode(graph, finished.out("LATENT"), vae)
    graph.column()
    save(graph, images, world, "best", width=520, height=420)

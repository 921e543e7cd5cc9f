"""Graphs that train: train_lora, train_full, train_photos and train_miniature."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .drawing import OFF, STEPS
from .layout import NEVER, Graph, Node, Wire
from .schemas import Json
from .world import (
    BLUE,
    BUILT_IN,
    CLIP,
    FLUX,
    GREEN,
    ORANGE,
    T5,
    VAE,
    VIOLET,
    World,
    encode,
    prompt_box,
    save,
    start_here,
)

PROMPTS = (Path(__file__).parent / "prompts.txt").read_text(encoding="utf-8").strip()
"""To train on until the user has others: one a line."""
PHOTOS = "my_photos"
"""A folder in ComfyUI's input folder."""
SETTINGS = {"rollout": "SRPORollout", "align": "SRPOAlign", "optimizer": "SRPOOptimizer", "lora": "SRPOLoRA"}
"""SRPO Train's sockets for settings, and the nodes that give them."""
FOR_A_LORA = {"rollout": {}, "align": {}, "optimizer": {}, "lora": {"rank": 16, "targets": "attention"}}
"""Values that also fit a card of 24 GB."""


def train_lora(graph: Graph, world: World) -> None:
    """A LoRA of FLUX.1-dev from prompts, then pictures without and with it."""
    start_here(graph, height=760)
    given = _to_learn(graph, world, {"source": "text", "text": PROMPTS})
    given |= _finer_settings(graph)
    trained = _train(graph, world, given | {"name": "my-look", "steps": 40})
    _use(graph, world, trained, given)


def train_photos(graph: Graph, world: World) -> None:
    """The same from photos with captions."""
    start_here(graph, height=760)
    given = _to_learn(graph, world, {"source": "photos", "path": PHOTOS})
    given |= _finer_settings(graph)
    trained = _train(graph, world, given | {"name": "my-photos", "steps": 40})
    _use(graph, world, trained, given)


def train_full(graph: Graph, world: World) -> None:
    """All weights of FLUX.1-dev; its pictures before and after, and the result against the base once it is there."""
    start_here(graph, height=760)
    given = _to_learn(graph, world, {"source": "text", "text": PROMPTS})
    given |= _finer_settings(graph, {"rollout": {}, "align": {}, "optimizer": {"lr": 5e-6}})
    trained = _train(graph, world, given | {"name": "my-model", "recipe": "flux-dev", "steps": 20})
    graph.row()
    graph.group("4  Keep the previews before and after", BLUE)
    for side in ("before", "after"):
        save(graph, trained.out(side), world, f"{graph.name}/{side}", width=360, height=340)
        graph.column()
    graph.group("5  Use the result" + OFF, VIOLET, NEVER)
    base, clip, vae = world.models(graph, file=FLUX)
    own = graph.add("SRPOLoadCheckpoint", {"checkpoint": "my-model.safetensors"}, width=360).out()
    graph.column()
    models = {"model_a": base, "model_b": own, "label_b": "my-model", **_judges(given)}
    _compare(graph, world, models, clip, vae)


def train_miniature(graph: Graph, world: World) -> None:
    """The built-in miniature: trained in a few minutes, then drawn without and with what it learned."""
    start_here(graph, height=560)
    given = _to_learn(graph, world, {"source": "built in"})
    graph.group("2  Settings", BLUE)
    side = world.training_side
    rollout = {"width": side, "height": side, "num_steps": 12, "batch_size": 4}
    given["rollout"] = graph.add("SRPORollout", rollout).out()
    optimizer = {"lr": 6e-4, "warmup_steps": 2, "accumulation": 1, "max_grad_norm": 1.0, "ema_decay": 0.9}
    given["optimizer"] = graph.add("SRPOOptimizer", optimizer).out()
    quick = "output.preview_steps=12\noutput.evaluate_prompts=16"
    given |= {"preview_every": 4, "checkpoint_every": 5, "more_settings": quick}
    trained = _train(graph, world, given | {"name": "my-miniature", "steps": 20})
    _use(graph, world, trained, given)


def _to_learn(graph: Graph, world: World, prompts: Json) -> Json:
    """What is drawn, which way it shall go, and who judges: SRPO Train's inputs."""
    graph.group("1  What to learn", GREEN)
    height = 330 if world.miniature else 620
    found = {"prompts": graph.add("SRPOPrompts", prompts, width=400, height=height).out()}
    if not world.miniature:
        graph.column()
    found["words"] = graph.add(
        "SRPOControlWords", title="SRPO Control Words: liked, disliked", width=340, height=240
    ).out()
    return found | {"reward": world.load_reward(graph)}


def _finer_settings(graph: Graph, values: Mapping[str, Json] = FOR_A_LORA) -> Json:
    """Nodes for SRPO Train's other sockets; while they are off, the recipe's own values stand."""
    graph.group("2  Finer settings  (off; right-click the frame to switch on)", BLUE, NEVER)
    found = {}
    for i, (socket, given) in enumerate(values.items()):
        found[socket] = graph.add(SETTINGS[socket], given).out()
        if i % 2:
            graph.column()
    return found


def _train(graph: Graph, world: World, given: Json) -> Node:
    """SRPO Train, with the files of the base."""
    graph.group("3  Train", ORANGE)
    files = {} if world.miniature else {"base": FLUX, "clip_l": CLIP, "t5xxl": T5, "vae": VAE}
    named = {"base": BUILT_IN} if world.miniature else {name: file["name"] for name, file in files.items()}
    return graph.add("SRPOTrain", {**named, **given}, width=460, height=1210, models=list(files.values()))


def _judges(given: Json) -> Json:
    """What SRPO Compare judges by: the training's own reward and words."""
    return {name: given[name] for name in ("reward", "words")}


def _use(graph: Graph, world: World, trained: Node, learned: Json) -> None:
    """The base without and with the LoRA as it came out of the training, drawn and judged in the same queue."""
    graph.row()
    graph.group("4  The new LoRA on the base", GREEN)
    model, clip, vae = world.models(graph, file=FLUX)
    world.beside_loaders(graph)
    given = {"model": model, "lora": trained.out("lora"), "strength_model": 1.0}
    tuned = graph.add("LoraModelLoader", given, width=340).out()
    models = {"model_a": model, "model_b": tuned, "label_b": "with LoRA", **_judges(learned)}
    _compare(graph, world, models, clip, vae)


def _compare(graph: Graph, world: World, judged: Json, clip: Wire, vae: Wire) -> None:
    """One prompt drawn by two models from the same noise; `judged`: SRPO Compare's models, names, reward and words."""
    text = world.prompt("An old man sells umbrellas under a railway bridge on a rainy morning",
                        "three blue stars at night")  # fmt: skip
    prompt = prompt_box(graph, text)
    positive = encode(graph, clip, prompt)
    latent = world.size(graph, batch=8 if world.miniature else 4)
    graph.column()
    given = {**judged, "positive": positive, "vae": vae, "latent": latent, "seed": 3,
             "steps": 25 if world.miniature else STEPS, "label_a": "base", "prompt": prompt}  # fmt: skip
    pairs = graph.add("SRPOCompare", given, width=620, height=1120)
    graph.column()
    save(graph, pairs.out("side_by_side"), world, graph.name, width=460, height=520)

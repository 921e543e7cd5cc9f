"""Run folders with made-up but plausible contents, for tests of what reads them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from srpo_core.description import make_config

PROMPTS = [
    "a red ball on the left in a meadow",
    "three blue stars at night",
    "a pink ring above a white box in the desert",
]


WORDS = {
    **dict.fromkeys(("Natural-lighting", "Detail", "Detailed", "Real"), 1),
    **dict.fromkeys(("Concept art", "Painting", "Anime", "Flat", "Oil"), -1),
}
"""Control words, and which way their rewards go."""


def make_run(
    folder, steps=40, of=None, prompts=12, seed=0, evaluation=True, previews=True, size=32, words=False, mixed=(),
    **overrides,
):  # fmt: skip
    """Write a run of `steps` steps out of `of` (default: finished) into `folder`; returns it as a Path.

    With rewards by control word if `words`, and those of the rewards `mixed`.
    """
    folder, rng = Path(folder), np.random.default_rng(seed)
    folder.mkdir(parents=True)
    config = make_config(
        {
            "data": {"height": size, "width": size, "batch_size": 8},
            "optim": {"steps": of or steps, "lr": 1e-4},
            "model": {"family": "miniature"},
            "reward": {"name": "miniature"},
            "output": {"dir": str(folder), "preview_prompts": 4},
            "seed": seed,
            **overrides,
        }
    )
    made_with = {"versions": {"torch": "2.13.0", "diffusers": "0.42.1"}, "device": "cpu", "python": "3.11.7"}
    (folder / "run.json").write_text(json.dumps({**config.model_dump(mode="json"), "made_with": made_with}))
    lines = [
        _line(step, steps, rng, previews and (step % 10 == 0 or step == steps), words, mixed)
        for step in range(steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines if line))
    if previews:
        for step in range(0, steps + 1, 10):
            _preview(folder / "previews", step, step / steps, rng, size)
    if evaluation:
        _evaluation(folder / "evaluation", prompts, rng, size, words, mixed)
    return folder


def _line(step, steps, rng, preview, words, mixed):
    grown = step / steps
    line = {"step": step}
    if step:
        seconds = {"rollout": 1.1, "gradient": 2.2, "optimizer": 0.15, "drift": 0.1, "preview": 0.0, "checkpoint": 0.0}
        seconds = {name: value * rng.uniform(0.9, 1.1) for name, value in seconds.items()}
        if preview:
            seconds |= {"preview": 1.4, "checkpoint": 0.5}
        line |= {
            "loss": 0.6 + rng.normal() * 0.02,
            "score": {"denoise": 0.05 + 0.08 * grown + rng.normal() * 0.02, "inversion": 0.04 + rng.normal() * 0.02},
            "reward": {"denoise": 0.25 + 0.05 * grown + rng.normal() * 0.01, "inversion": 0.24 + rng.normal() * 0.01},
            "liked": "Detail", "disliked": "Oil",
            "grad_norm": float(np.exp(rng.normal() * 0.4)) * 0.2, "lr": 1e-4 * min(1, step / 5), "sigma": 0.85,
            "velocity_drift": 0.08 * grown**0.6, "peak_memory_gib": 1.2 + 0.1 * grown,
            "seconds": {**seconds, "total": sum(seconds.values()) + 0.1},
        }  # fmt: skip
    if preview:
        line["preview"] = {
            "reward": 0.25 + 0.01 * grown,
            "relative": -0.02 + 0.09 * grown,
            "look": 0.3 + 0.4 * grown,
            "content": 0.96,
        }
        if words:
            line["preview"] |= {"sgp": 0.01 + 0.03 * grown}
            line["preview"] |= {f"word:{word}": 0.25 + sign * 0.02 * grown for word, sign in WORDS.items()}
    if step and mixed:
        line["scores"] = {name: {"denoise": 0.1 * grown, "inversion": 0.05} for name in mixed}
        line["rewards"] = {name: {"denoise": 20 + grown, "inversion": 19.5} for name in mixed}
    return line


def picture(path, rng, size, texture):
    path.parent.mkdir(parents=True, exist_ok=True)
    base = np.ones((size, size, 3)) * rng.uniform(0.3, 0.8, 3)
    base[size // 4 : size // 2, size // 4 : size // 2] = rng.uniform(0, 1, 3)
    noisy = base + texture * 0.12 * rng.normal(size=(size, size, 1))
    Image.fromarray((noisy.clip(0, 1) * 255).astype(np.uint8)).save(path)


def _preview(folder, step, grown, rng, size):
    picture(folder / f"step-{step:06d}.png", rng, size * 2, grown)
    scores = {"reward": 0.25, "relative": -0.02 + 0.09 * grown, "look": 0.3 + 0.4 * grown, "content": 0.96}
    data = {"prompts": PROMPTS, **{k: [v + 0.01 * rng.normal() for _ in PROMPTS] for k, v in scores.items()}}
    (folder / f"step-{step:06d}.json").write_text(json.dumps(data))


def _evaluation(folder, count, rng, size, words, mixed):
    level = rng.normal(size=count)
    before = {
        "reward": 0.25 + 0.01 * level, "relative": -0.02 + 0.02 * rng.normal(size=count),
        "relative/Detail": 0.01 * level,
        "look": 0.31 + 0.06 * level, "texture": 0.2 + 0.05 * level, "content": (rng.random(count) < 0.95) * 1.0,
    }  # fmt: skip
    rise = {"reward": 0.001, "relative": 0.07, "relative/Detail": 0.05, "look": 0.36, "texture": 0.4, "content": 0.0}
    if words:
        before |= {"sgp": 0.02 * level} | {f"word:{word}": 0.25 + 0.01 * level for word in WORDS}
        rise |= {"sgp": 0.03} | {f"word:{word}": 0.03 * sign for word, sign in WORDS.items()}
    before |= {f"reward:{name}": 20 + level for name in mixed}
    rise |= {f"reward:{name}": 0.5 for name in mixed}
    after = {k: v + rise[k] + (0 if k == "content" else 0.02 * rng.normal(size=count)) for k, v in before.items()}
    for index in range(count):
        for side, texture in (("before", 0.1), ("after", 1.0)):
            picture(folder / side / f"{index:03d}.png", np.random.default_rng(index), size, texture)
    prompts = [f"{PROMPTS[i % 3]}, {i}" for i in range(count)]
    sides = {"before": before, "after": after}
    data = {"prompts": prompts, **{side: {k: v.tolist() for k, v in scores.items()} for side, scores in sides.items()}}
    (folder / "evaluation.json").write_text(json.dumps(data))

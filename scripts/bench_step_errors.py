"""How far a benchmark's steps are from the exact path's, and how often the host waits in one."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from srpo_core.attention import Attention
from srpo_core.config import RunConfig
from srpo_core.finite import FiniteChecks
from srpo_core.flow import shifted_sigmas
from srpo_core.interfaces import Reward, TrainableFlow
from srpo_core.learner import Learner, Parts
from srpo_core.metrics import Clock
from srpo_core.rewards.mixture import WeightedReward
from srpo_core.rollout import rollout
from srpo_core.tally import Tally


@contextlib.contextmanager
def uncompiled(flow: TrainableFlow) -> Iterator[None]:
    """Inside the context the flow's blocks run as they are written."""
    compiled = {module: vars(module).pop("forward") for module in flow.module.modules() if "forward" in vars(module)}
    try:
        yield
    finally:
        for module, call in compiled.items():
            module.forward = call


def waits(step: Callable[[], object]) -> dict[str, int]:
    """How often the host waits for the GPU in a step, by the place in the code."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    told = [one for one in caught if "synchronizing" in str(one.message)]
    return dict(Counter(f"{Path(one.filename).name}:{one.lineno}" for one in told))


def rollout_error(config: RunConfig, parts: Parts, learner: Learner) -> dict[str, float]:
    """How far the row's rollouts are from the exact ones (every call, model.dtype, nothing compiled), as latents."""
    ours = learner._rollout(1, 0)
    sigmas = shifted_sigmas(config.rollout.num_steps, config.rollout.shift)
    with uncompiled(parts.flow):
        exact = rollout(parts.flow, ours.prompts, ours.noise, sigmas, config.rollout.guidance)
    moved = (exact.clean - exact.noise).norm()
    difference = (ours.clean - exact.clean).norm()
    return {
        "relative_latents": float(f"{float(difference / exact.clean.norm()):.3g}"),
        "relative_to_the_way": float(f"{float(difference / moved):.3g}"),
    }


def gradient_error(
    config: RunConfig, parts: Parts, learner: Learner, reward: Reward, number: int
) -> dict[str, dict[str, float]]:
    """A step's gradient beside the exact path's, and beside itself computed once more. The parts are spent after it.

    `reward` is the exact path's.
    """
    ours, loss = gradients(learner, number)
    ours = {name: gradient.cpu() for name, gradient in ours.items()}  # beside a second one there may be no room
    row = {"gradient_repeated": beside(ours, gradients(learner, number)[0])}
    if learner.world.device.type == "cuda":
        torch.cuda.empty_cache()
    parts.flow.module.enable_gradient_checkpointing()  # uncompiled activations and a second gradient don't fit
    settings = config.model_dump()
    settings["rollout"] |= {"calls": 0, "precision": "model", "at_once": 1}
    settings["align"] |= {"at_once": 1}
    settings["model"] |= {"compile": False, "attention": "native"}
    parts.flow.attention = Attention()
    plain = copy.copy(learner)  # a new one would have moments of its own
    plain.config, plain.attention = RunConfig(**settings), Attention()
    plain.rewards = [WeightedReward("hpsv2", reward, margin=config.reward.margin)]
    plain._copy = plain._compiler = plain._keeping = plain._replay = None
    with uncompiled(parts.flow):
        exact, exact_loss = gradients(plain, number)
    row["gradient_error"] = beside(ours, exact) | {"loss": round(loss, 6), "exact_loss": round(exact_loss, 6)}
    return row


def gradients(learner: Learner, number: int) -> tuple[dict[str, Tensor], float]:
    """A step's gradient by parameter, and its loss; nothing is trained."""
    if learner._keeping is not None:
        learner._keeping.begin(learner.is_compiled())
    tally = Tally(learner.rewards)
    with learner.world.in_step():
        learner._add_all(number, learner.words.pair(number), tally, FiniteChecks(), Clock(lambda: None))
    found = {name: parameter.grad for name, parameter in learner.trained.items()}
    for parameter in learner.trained.values():
        parameter.grad = None
    return found, tally.summary()["loss"]


def beside(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Two gradients over all parameters: the second's norm, the first's and their difference's share of it, cosine."""
    sums = torch.zeros(4, dtype=torch.float64)
    for name in ours:
        other = exact[name].float()
        one = ours[name].to(other)
        products = (one * one).sum(), (other * other).sum(), (one - other).square().sum(), (one * other).sum()
        sums += torch.stack(products).double().cpu()
    one, other, difference, product = sums.tolist()
    found = {"norm": other**0.5, "norm_share": (one / other) ** 0.5, "difference": (difference / other) ** 0.5}
    found["cosine"] = product / (one * other) ** 0.5
    return {name: float(f"{value:.5g}") for name, value in found.items()}

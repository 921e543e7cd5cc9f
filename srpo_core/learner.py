"""SRPO's optimizer step: roll out without gradient, align every branch with gradient, clip, step, average."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from srpo_core.align import AlignStep, direct_align, sample_align_steps
from srpo_core.checkpoint import copy_tensors, read_tensors
from srpo_core.config import RunConfig
from srpo_core.errors import NotFiniteError
from srpo_core.flow import shifted_sigmas
from srpo_core.interfaces import Autoencoder, Reward, TrainableFlow
from srpo_core.metrics import Clock, StepMetrics
from srpo_core.optim import Average, learning_rate, load_optimizer_tensors, make_optimizer, optimizer_tensors
from srpo_core.parallel import World
from srpo_core.photos import load_photos
from srpo_core.preference import ControlWords, hinge_loss, preferred_and_other, relative_score, two_wordings
from srpo_core.prompts import PromptSequence
from srpo_core.randomness import generator_for
from srpo_core.rollout import Rollout, rollout, rollout_from_images


class Learner:
    """The parameters of flow.module that require a gradient, their optimizer and running average, and how they learn.

    A step is a function of its number and of what the learner holds: no random state goes from one step to the next.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        flow: TrainableFlow,
        autoencoder: Autoencoder,
        reward: Reward,
        words: ControlWords,
        prompts: PromptSequence,
    ) -> None:
        self.config, self.world = config, world
        self.flow, self.autoencoder, self.reward = flow, autoencoder, reward
        self.words, self.prompts = words, prompts
        self.latent_shape = flow.latent_shape(config.data.height, config.data.width)
        self.trained = {name: p for name, p in flow.module.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(self.trained, config.optim)
        self.average = Average(self.trained, config.optim.ema_decay) if config.optim.ema_decay else None

    def step(self, number: int, clock: Clock) -> StepMetrics:
        """Optimizer step 1, 2, ... NotFiniteError leaves the weights as they were before the step."""
        optim, align = self.config.optim, self.config.align
        liked, disliked = self.words.pair(number)
        tally = _Tally()
        for micro in range(optim.accumulation):
            with clock.phase("rollout"):
                clean = self._rollout(number, micro)
                _require_finite(clean.clean, number, "the rollout")
            with clock.phase("gradient"):
                for draw in range(align.draws_per_rollout):
                    for branch, align_step in self._align_steps(number, micro, draw):
                        preferred, other = preferred_and_other(liked, disliked, align_step.denoises)
                        images = self.autoencoder.decode(direct_align(self.flow, clean, align_step, align.guidance))
                        rewards = two_wordings(self.reward, images, clean.prompts.prompts, preferred, other)
                        score = relative_score(*rewards, align_step.k) * self.config.reward.scale
                        loss = hinge_loss(score, self.config.reward.margin, len(align.branches))
                        loss = loss / (optim.accumulation * align.draws_per_rollout)
                        _require_finite(loss, number, f"the loss of the {branch} branch")
                        loss.backward()
                        tally.add(branch, loss, score, rewards[0], align_step)
        with clock.phase("optimizer"):
            grad_norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), optim.max_grad_norm)
            _require_finite(grad_norm, number, "the gradient")
            lr = learning_rate(optim, number)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.average is not None:
                self.average.update(number)
        return StepMetrics(number, liked=liked, disliked=disliked, grad_norm=float(grad_norm), lr=lr, **tally.summary())

    def _rollout(self, number: int, micro: int) -> Rollout:
        """Clean latents of the micro-batch's prompts: sampled from noise, or encoded from their photos."""
        config, world = self.config, self.world
        size = config.data.batch_size
        batch = ((number - 1) * config.optim.accumulation + micro) * world.size + world.rank
        prompts, photos = self.prompts.at(batch * size, size)
        prompts = prompts.to(world.device)
        noise_rank = 0 if config.rollout.same_noise and not photos else world.rank
        generator = generator_for(config.seed, number, noise_rank, f"noise {micro}")
        noise = torch.randn(size, *self.latent_shape, generator=generator).to(world.device)
        if photos:
            images = load_photos(photos, config.data.height, config.data.width).to(world.device)
            return rollout_from_images(self.autoencoder, images, prompts, noise)
        sigmas = shifted_sigmas(config.rollout.num_steps, config.rollout.shift)
        return rollout(self.flow, prompts, noise, sigmas, config.rollout.guidance)

    def _align_steps(self, number: int, micro: int, draw: int) -> list[tuple[str, AlignStep]]:
        """Each branch and its gradient step, at levels drawn for this draw."""
        config = self.config
        generator = generator_for(config.seed, number, self.world.rank, f"levels {micro} {draw}")
        steps = sample_align_steps(config.align, config.rollout.shift, config.data.batch_size, generator)
        return list(zip(config.align.branches, steps, strict=True))

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Inside the context the model holds the averaged weights, if the run keeps an average."""
        return self.average.applied() if self.average is not None else contextlib.nullcontext()

    def checkpoint_bytes(self) -> int:
        """Size of a checkpoint: weights, two moments, and the average if there is one."""
        copies = 4 if self.average is not None else 3
        return copies * sum(p.numel() * p.element_size() for p in self.trained.values())

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that a checkpoint needs, by file."""
        average = {"ema": self.average.tensors} if self.average is not None else {}
        optimizer = optimizer_tensors(self.optimizer, self.trained)
        return {"weights": {name: p.detach() for name, p in self.trained.items()}, "optimizer": optimizer, **average}

    def restore(self, folder: Path) -> None:
        """Inverse of `tensors`, from a checkpoint's folder. TrainingError if it is damaged or of another model."""
        copy_tensors(folder, "weights", self.trained, exactly=True)
        if self.average is not None:
            copy_tensors(folder, "ema", self.average.tensors, exactly=True)
        load_optimizer_tensors(self.optimizer, self.trained, read_tensors(folder, "optimizer"))


def _require_finite(value: Tensor, number: int, what: str) -> None:
    if not bool(torch.isfinite(value).all()):
        raise NotFiniteError(
            f"step {number}: {what} is not finite (NaN or infinite), so the run stops before the weights take it in;"
            " try a lower optim.lr, optim.warmup_steps, or model.dtype=float32"
        )


class _Tally:
    """Sums up a step's branches."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.score: dict[str, list[Tensor]] = defaultdict(list)
        self.reward: dict[str, list[Tensor]] = defaultdict(list)
        self.sigma: list[Tensor] = []

    def add(self, branch: str, loss: Tensor, score: Tensor, preferred_reward: Tensor, align_step: AlignStep) -> None:
        self.loss += float(loss.detach())
        self.score[branch].append(score.detach())
        self.reward[branch].append(preferred_reward.detach())
        self.sigma.append(torch.as_tensor(align_step.sigma))

    def summary(self) -> dict[str, float | dict[str, float]]:
        def mean(values: list[Tensor]) -> float:
            return float(torch.stack(values).float().mean())

        return {
            "loss": self.loss,
            "score": {branch: mean(values) for branch, values in self.score.items()},
            "reward": {branch: mean(values) for branch, values in self.reward.items()},
            "sigma": mean(self.sigma),
        }

"""SRPO's optimizer step: roll out without gradient, align every branch with gradient, clip, step, average."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srpo_core.align import AlignStep, direct_align, sample_align_steps
from srpo_core.checkpoint import copy_tensors, read_shapes
from srpo_core.config import RunConfig
from srpo_core.errors import NotFiniteError, blamed_on
from srpo_core.flow import shifted_sigmas
from srpo_core.interfaces import Autoencoder, Measure, PromptBatch, TrainableFlow
from srpo_core.metrics import Clock, StepMetrics, over_processes
from srpo_core.optim import Average, learning_rate, load_optimizer_tensors, make_optimizer, optimizer_tensors
from srpo_core.parallel import World, attention_with_gradient
from srpo_core.photos import load_photos
from srpo_core.preference import ControlWords, preferred_and_other, two_wordings
from srpo_core.randomness import generator_for
from srpo_core.rewards.mixture import WeightedReward, weighted_mean
from srpo_core.rollout import Rollout, rollout, rollout_from_images
from srpo_core.sharding import gathered, hand_over_gradients, is_part, like, part_of, parts_of, settle, total_norm
from srpo_core.training_data import TrainingData


@dataclass
class Parts:
    """What a run is made of, as live objects: nothing here knows a family or a reward by name."""

    flow: TrainableFlow
    """What requires a gradient in its module is trained."""
    autoencoder: Autoencoder
    rewards: Sequence[WeightedReward]
    words: ControlWords
    data: TrainingData
    held_out: PromptBatch
    """The prompts of previews, evaluation and drift, encoded."""
    measures: Mapping[str, Measure] = field(default_factory=dict)
    lora: Mapping[str, Any] | None = None
    """What state.json tells of a LoRA: {"rank", "alpha", "targets"}."""
    notes: Sequence[str] = ()
    """What the user should know before training starts."""
    trained_on: str = ""
    """A digest of the prompts and photos: a resumed run says so if they are others."""
    less_memory: Callable[[], str] = lambda: "try a smaller data.batch_size or data.height and data.width"
    """What to try where memory runs out."""


class Learner:
    """The parameters of flow.module that require a gradient, their optimizer and running average, and how they learn.

    A step is a function of its number and of what the learner holds: no random state goes from one step to the next.
    `check` is called often during one, and may raise to end it.
    """

    def __init__(self, config: RunConfig, world: World, parts: Parts, check: Callable[[], None] = lambda: None) -> None:
        self.config, self.world, self._check = config, world, world.agreed(check)
        self.flow, self.autoencoder, self.rewards = parts.flow, parts.autoencoder, parts.rewards
        self.words, self.data = parts.words, parts.data
        self.trained = {name: p for name, p in self.flow.module.named_parameters() if p.requires_grad}
        self.parts = parts_of(self.trained)
        """What this process holds of `trained`, as the optimizer and the average know it."""
        self.optimizer = make_optimizer(self.parts, config.optim)
        self.is_sharded = self.parts is not self.trained
        """Whether what is trained is spread over processes; a LoRA beside a sharded model isn't."""
        decay = config.optim.ema_decay
        self.average = Average(self.parts, decay, self.is_sharded) if decay else None

    def step(self, number: int, clock: Clock) -> StepMetrics:
        """Optimizer step 1, 2, ... What ends it, be it NotFiniteError, leaves the weights as they were before."""
        words = self.words.pair(number)
        tally = _Tally(self.rewards)
        try:
            with self.world.together(), gathered(self.flow.module, self.config.parallel.gathered == "step"):
                for micro in range(self.config.optim.accumulation):
                    with self.world.in_step():
                        self._add_gradients(number, micro, words, tally, clock)
                self._check()
            with self.world.together(), clock.phase("optimizer"):
                self.world.average([p.grad for p in self.trained.values() if p.grad is not None and not is_part(p)])
                grad_norm, lr = self._update(number)
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            for parameter in self.trained.values():
                parameter.grad = None
        liked, disliked = words
        summary = over_processes(self.world.exchange(tally.summary())[:: self.world.context])
        return StepMetrics(number, liked=liked, disliked=disliked, grad_norm=float(grad_norm), lr=lr, **summary)

    def _add_gradients(self, number: int, micro: int, words: tuple[str, str], tally: _Tally, clock: Clock) -> None:
        """Add a micro-batch's share of the step's gradient to the trained parameters'."""
        with clock.phase("rollout"):
            self._check()
            clean = self._rollout(number, micro)
            on_photos = self.data.on_photos(self._micro(number, micro))
            tally.source["photos" if on_photos else "rollouts"] += len(clean.noise)
            self._require_finite(clean.clean, "the rollout")
        with clock.phase("gradient"), attention_with_gradient():
            for draw in range(self.config.align.draws_per_rollout):
                for branch, align_step in self._align_steps(number, micro, draw):
                    self._check()
                    loss = self._branch_loss(clean, branch, align_step, words, tally)
                    self._require_finite(loss, f"the loss of the {branch} branch")
                    self._check()
                    (loss * self.world.context).backward()  # each of a group has a part of the gradient, not all

    def _branch_loss(
        self, clean: Rollout, branch: str, align_step: AlignStep, words: tuple[str, str], tally: _Tally
    ) -> Tensor:
        """A branch's part of the step's loss, with gradient."""
        optim, align = self.config.optim, self.config.align
        preferred, other = preferred_and_other(*words, align_step.denoises)
        recovered = direct_align(self.flow, clean, align_step, align.guidance)
        with blamed_on("the autoencoder (model.autoencoder)"):
            images = self.autoencoder.decode(recovered)
        scores, preferred_values, loss = {}, {}, torch.zeros((), device=images.device)
        for part in self.rewards:
            with blamed_on(f"the reward (reward.name={part.name!r})"):
                pair = two_wordings(part.reward, images, clean.prompts.prompts, preferred, other)
            preferred_values[part.name] = pair[0].detach()
            score = part.score(*pair, align_step.k)
            scores[part.name] = score.detach()
            loss = loss + part.loss(score, len(align.branches))
        loss = loss / (optim.accumulation * align.draws_per_rollout)
        tally.add(branch, loss, scores, preferred_values, align_step)
        return loss

    def _update(self, number: int) -> tuple[Tensor, float]:
        """Clip, step and average; the gradient's norm before clipping, and the learning rate."""
        optim = self.config.optim
        with self.world.in_step():
            settle(self.flow.module)
            hand_over_gradients(self.trained, self.parts)
            parameters = list(self.parts.values())
            norm = total_norm(list(self.trained.values()), [p.grad for p in parameters if p.grad is not None])
            grad_norm = self.world.as_main(norm)  # sums of unlike GPUs may differ in the last digit
        _require_finite(grad_norm, "the gradient")
        torch.nn.utils.clip_grads_with_norm_(parameters, optim.max_grad_norm, grad_norm)
        lr = learning_rate(optim, number)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        if self.average is not None:
            self.average.update(number)
        return grad_norm, lr

    def _micro(self, number: int, micro: int) -> int:
        """The run's micro-batch 0, 1, ... of a step's."""
        return (number - 1) * self.config.optim.accumulation + micro

    def _part(self, micro: int) -> int:
        """Which of the step's micro-batches this is, among those of all processes.

        So two processes draw what one with twice the accumulation does, but for same_noise.
        """
        return micro * self.world.parts + self.world.part

    def _rollout(self, number: int, micro: int) -> Rollout:
        """Clean latents of the micro-batch's prompts: sampled from noise, or encoded from their photos."""
        config, world = self.config, self.world
        batch = self.data.at(self._micro(number, micro), world.part, world.parts)
        prompts = batch.prompts.to(world.device)
        part = micro if config.rollout.same_noise and not batch.photos else self._part(micro)
        generator = generator_for(config.seed, number, 0, f"noise {part}")
        shape = self.flow.latent_shape(batch.height, batch.width)
        noise = torch.randn(len(prompts), *shape, generator=generator).to(world.device)
        if batch.photos:
            images = load_photos(batch.photos, batch.height, batch.width).to(world.device)
            with blamed_on("the autoencoder (model.autoencoder)"):
                return rollout_from_images(self.autoencoder, images, prompts, noise)
        sigmas = shifted_sigmas(config.rollout.num_steps, config.rollout.shift)
        check = None if world.keeps_step else lambda *_: self._check()  # such a check is no small thing
        with gathered(self.flow.module, config.parallel.gathered == "rollout"):
            return rollout(self.flow, prompts, noise, sigmas, config.rollout.guidance, check)

    def _align_steps(self, number: int, micro: int, draw: int) -> list[tuple[str, AlignStep]]:
        """Each branch and its gradient step, at levels drawn for this draw."""
        config = self.config
        generator = generator_for(config.seed, number, 0, f"levels {self._part(micro)} {draw}")
        steps = sample_align_steps(config.align, config.rollout.shift, config.data.batch_size, generator)
        return list(zip(config.align.branches, steps, strict=True))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the context the model holds the averaged weights, if the run keeps an average."""
        with self.average.applied() if self.average is not None else contextlib.nullcontext():
            settle(self.flow.module)
            try:
                with gathered(self.flow.module, self.config.parallel.gathered != "layer"):
                    yield
            finally:
                settle(self.flow.module)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that a checkpoint needs, by file; of a sharded model this process's parts."""
        settle(self.flow.module)
        average = {"ema": self._spread(self.average.tensors)} if self.average is not None else {}
        optimizer = self._spread(optimizer_tensors(self.optimizer, self.parts))
        return {"weights": {name: p.detach() for name, p in self.trained.items()}, "optimizer": optimizer, **average}

    def _spread(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parts `<parameter>` or `<parameter>/<state>` as the parameters are spread."""
        return {name: like(tensor, self.trained[name.partition("/")[0]]) for name, tensor in tensors.items()}

    def restore(self, folder: Path) -> None:
        """Inverse of `tensors`, from a checkpoint's folder. TrainingError if it is damaged or of another model."""
        copy_tensors(folder, "weights", self.trained, exactly=True)
        if self.average is not None:
            copy_tensors(folder, "ema", self._spread(self.average.tensors), exactly=True)
        states = {name: self._room(name, *each) for name, each in read_shapes(folder, "optimizer").items()}
        copy_tensors(folder, "optimizer", states)
        load_optimizer_tensors(self.optimizer, self.parts, {name: part_of(state) for name, state in states.items()})

    def _room(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Room for a state `<parameter>/<state>` of the optimizer; of a parameter in parts, for this process's part."""
        parameter = self.trained.get(name.partition("/")[0])
        if parameter is None or not is_part(parameter) or not shape:
            return torch.empty(shape, dtype=dtype)
        return like(torch.empty_like(part_of(parameter), dtype=dtype), parameter)

    def _require_finite(self, value: Tensor, what: str) -> None:
        """As _require_finite; where processes keep step, of all of them."""
        self.world.agreed(lambda: _require_finite(value, what))()


def _require_finite(value: Tensor, what: str) -> None:
    if not bool(torch.isfinite(value).all()):
        raise NotFiniteError(
            f"{what} is not finite (NaN or infinite), so the run stops before the weights take it in;"
            " try a lower optim.lr, optim.warmup_steps, or model.dtype=float32"
        )


class _Tally:
    """Sums up a step's branches."""

    def __init__(self, rewards: Sequence[WeightedReward]) -> None:
        self.parts = rewards
        self.loss: list[Tensor] = []
        self.score: dict[str, list[Tensor]] = defaultdict(list)
        self.reward: dict[str, list[Tensor]] = defaultdict(list)
        self.scores: dict[str, dict[str, list[Tensor]]] = {part.name: defaultdict(list) for part in rewards}
        self.rewards: dict[str, dict[str, list[Tensor]]] = {part.name: defaultdict(list) for part in rewards}
        self.sigma: list[Tensor] = []
        self.source: dict[str, int] = defaultdict(int)

    def add(
        self, branch: str, loss: Tensor, scores: dict[str, Tensor], preferred: dict[str, Tensor], align_step: AlignStep
    ) -> None:
        """A branch's loss, and by reward its scores and the preferred wording's values, each [B], no gradient."""
        self.loss.append(loss.detach())
        if len(self.parts) == 1:
            (score,), (value,) = scores.values(), preferred.values()
        else:
            score = weighted_mean(scores, self.parts)
            value = weighted_mean({part.name: part.normalised(preferred[part.name]) for part in self.parts}, self.parts)
        self.score[branch].append(score)
        self.reward[branch].append(value)
        for part in self.parts:
            self.scores[part.name][branch].append(scores[part.name])
            self.rewards[part.name][branch].append(preferred[part.name])
        self.sigma.append(torch.as_tensor(align_step.sigma))

    def summary(self) -> dict[str, Any]:
        def mean(values: list[Tensor]) -> float:
            return float(torch.stack(values).float().mean())

        def by_branch(values: dict[str, list[Tensor]]) -> dict[str, float]:
            return {branch: mean(each) for branch, each in values.items()}

        by_reward = {"scores": self.scores, "rewards": self.rewards} if len(self.parts) > 1 else {}
        return {
            "loss": float(torch.stack(self.loss).sum()),
            "score": by_branch(self.score),
            "reward": by_branch(self.reward),
            **{key: {name: by_branch(each) for name, each in of.items()} for key, of in by_reward.items()},
            "sigma": mean(self.sigma),
            "source": dict(self.source),
        }

"""SRPO's optimizer step: roll out without gradient, align every branch with gradient, clip, step, average."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from srpo_core.align import AlignStep, direct_align, sample_align_steps, side_by_side
from srpo_core.attention import Attention
from srpo_core.checkpoint import copy_tensors, read_shapes, stream_tensors
from srpo_core.compact_adamw import CODES, decoded
from srpo_core.compiling import Compiler, reason_of
from srpo_core.config import RunConfig
from srpo_core.errors import TrainingError, blamed_on
from srpo_core.finite import FiniteChecks
from srpo_core.flow import shifted_sigmas
from srpo_core.interfaces import Autoencoder, Measure, PromptBatch, TrainableFlow
from srpo_core.keeping import Keeping, keep_what_fits, memory_of
from srpo_core.metrics import Clock, StepMetrics, over_processes
from srpo_core.optim import (
    Average,
    clip_and_step,
    gradient_norm,
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
)
from srpo_core.parallel import World
from srpo_core.photos import load_photos
from srpo_core.preference import ControlWords, preferred_and_other, two_wordings
from srpo_core.randomness import generator_for
from srpo_core.replay import Replay
from srpo_core.rewards.mixture import WeightedReward
from srpo_core.rollout import Rollout, Start, each_of, rollout, rollout_from_images
from srpo_core.rollout_copy import RolloutCopy
from srpo_core.sharding import (
    gathered,
    hand_over_gradients,
    is_part,
    like,
    part_of,
    parts_of,
    put_whole,
    settle,
    shares_memory,
    sum_over_machines,
    whole_norm,
)
from srpo_core.tally import Tally
from srpo_core.training_data import TrainingData
from srpo_core.transfer import sent


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
    attention: Attention = field(default_factory=Attention)
    """The kernels that its calls use."""
    rollout_copy: RolloutCopy | None = None
    """What is rolled out in the flow's place."""
    replay: Replay | None = None
    """What records the rollouts' calls."""
    compiler: Compiler | None = None
    """What compiled the flow's blocks."""
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
        self.attention, self._copy, self._compiler = parts.attention, parts.rollout_copy, parts.compiler
        self._replay = parts.replay
        self._ahead: tuple[tuple[int, ...], list[Start]] | None = None
        self._keeping: Keeping | None = None
        self._has_gradients = self._applies = False
        memory = memory_of(world.device) if config.model.recompute == "auto" else None
        if memory is not None:
            flow, decoder = self.flow, getattr(self.autoencoder, "module", None)
            self._keeping = keep_what_fits(flow.module, flow.block_types, decoder, memory, self._common, self._aside)
        settle(self.flow.module)  # what a call before this one left gathered are no parameters to be trained
        self.trained = {name: p for name, p in self.flow.module.named_parameters() if p.requires_grad}
        self.parts = parts_of(self.trained)
        """What this process holds of `trained`, as the optimizer and the average know it."""
        self.optimizer = make_optimizer(self.parts, config.optim, config.seed)
        self.is_sharded = self.parts is not self.trained
        """Whether what is trained is spread over processes; a LoRA beside a sharded model isn't."""
        decay = config.optim.ema_decay
        self.average = Average(self.parts, decay, self.is_sharded) if decay else None

    def step(self, number: int, clock: Clock) -> StepMetrics:
        """Optimizer step 1, 2, ... What ends it, be it NotFiniteError, leaves the weights as they were before."""
        compiled = self.is_compiled()
        try:
            return self._step(number, clock)
        except RuntimeError as error:
            if compiled and self.world.size > 1 and self._compiler.failed(error):  # others may have gone on
                raise TrainingError(
                    f"model.compile=true can't be done here ({reason_of(error)}), set it to false"
                ) from error
            if self.world.size > 1 or not ((compiled and self._compilers(error)) or self._makes_room(error)):
                raise
        return self._step(number, clock)

    def _makes_room(self, error: RuntimeError) -> bool:
        """Whether a step that ran out of memory can be tried with what recorded rollouts took."""
        begun = self._applies or not isinstance(error, torch.OutOfMemoryError)
        return not begun and self._replay is not None and self._replay.stop()

    def _common(self, first: int) -> int:
        """The first block that each process can keep, where some share a picture; see Keeping."""
        return max(self.world.exchange(first)) if self.world.context > 1 else first

    def _aside(self) -> int:
        """Bytes that a backward pass finds taken, or takes and gives none back of; see Keeping."""
        return self._gradients_to_come() + self.recorded_bytes()

    def recorded_bytes(self) -> int:
        """What recorded rollouts hold of the device's memory, beside what is in use by tensors."""
        return 0 if self._replay is None else self._replay.taken

    def _gradients_to_come(self) -> int:
        """Bytes of a step's gradients before its first backward pass, of parts whose memory is FSDP's own.

        They find memory of earlier steps there, or take it from what is free; activations can't have it either way.
        """
        if self._has_gradients or not self.is_sharded or shares_memory(self.config):
            return 0
        parts = [self.parts[name] for name, parameter in self.trained.items() if is_part(parameter)]
        return sum(part.nbytes for part in parts if part.device == self.world.device)

    def is_compiled(self) -> bool:
        """Whether its flow's blocks are, by now."""
        return self._compiler is not None and not self._compiler.stopped

    def _compilers(self, error: RuntimeError) -> bool:
        """Whether an error is the compiler's, which has given up by now.

        If it does in a forward pass, blocks that ran compiled are recomputed without, which saves other tensors.
        """
        return self._compiler.gives_up(error) or (self._compiler.stopped and isinstance(error, CheckpointError))

    def _step(self, number: int, clock: Clock) -> StepMetrics:
        if self._keeping is not None:
            self._keeping.begin(self.is_compiled())
        self._applies = False
        words = self.words.pair(number)
        tally, finite = Tally(self.rewards), FiniteChecks(early=not self.world.keeps_step)
        try:
            with self.world.together(), gathered(self.flow.module, self.config.parallel.gathered == "step"):
                with self.world.in_step():
                    self._add_all(number, words, tally, finite, clock)
                self._check()
                if self.world.size > 1:
                    finite.require()  # before the others' gradients take it in
            with self.world.together(), clock.phase("optimizer"):
                self.world.average([p.grad for p in self.trained.values() if p.grad is not None and not is_part(p)])
                grad_norm, lr = self._update(number, finite)
        finally:
            self._has_gradients = False
            self.optimizer.zero_grad(set_to_none=True)
            for parameter in self.trained.values():
                parameter.grad = None
        if self._replay is not None:
            self._replay.ready = True
        liked, disliked = words
        summary = over_processes(self.world.exchange(tally.summary())[:: self.world.context])
        return StepMetrics(number, liked=liked, disliked=disliked, grad_norm=float(grad_norm), lr=lr, **summary)

    def _add_all(self, number: int, words: tuple[str, str], tally: Tally, finite: FiniteChecks, clock: Clock) -> None:
        """Roll out all of the step's micro-batches, then add up their gradients."""
        with clock.phase("rollout"):
            rollouts = self._rollouts(number, range(self.config.optim.accumulation))
        with clock.phase("gradient"), self.attention.with_gradient():
            for micro, clean in enumerate(rollouts):
                self._add_gradients(number, micro, clean, words, tally, finite)
            self._look_ahead(number)

    def _add_gradients(
        self, number: int, micro: int, clean: Rollout, words: tuple[str, str], tally: Tally, finite: FiniteChecks
    ) -> None:
        """Add a micro-batch's share of the step's gradient to the trained parameters'."""
        on_photos = self.data.on_photos(self._micro(number, micro))
        tally.source["photos" if on_photos else "rollouts"] += len(clean.noise)
        finite.add(clean.clean, "the rollout")
        optim, draws = self.config.optim, self.config.align.draws_per_rollout
        steps = [each for draw in range(draws) for each in self._align_steps(number, micro, draw)]
        for first in range(0, len(steps), at_once := self.config.align.at_once):
            self._check()
            chosen = steps[first : first + at_once]
            losses = self._losses(clean, chosen, words, tally)
            for loss, (branch, _) in zip(losses, chosen, strict=True):
                finite.add(loss, f"the loss of the {branch} branch")
            self._check()
            sum_over_machines(self.flow.module, micro == optim.accumulation - 1 and first + at_once >= len(steps))
            (sum(losses) * self.world.context).backward()  # each of a group has a part of the gradient, not all
            self._has_gradients = True

    def _losses(
        self, clean: Rollout, steps: Sequence[tuple[str, AlignStep]], words: tuple[str, str], tally: Tally
    ) -> list[Tensor]:
        """What some branches' steps are to the loss of the optimizer step, with gradient: by one model call."""
        recovered = direct_align(
            self.flow, *side_by_side(clean, [step for _, step in steps]), self.config.align.guidance
        )
        with blamed_on("the autoencoder (model.autoencoder)"):
            images = self.autoencoder.decode(recovered).chunk(len(steps))
        prompts = clean.prompts.prompts
        return [self._branch_loss(of, prompts, *each, words, tally) for of, each in zip(images, steps, strict=True)]

    def _branch_loss(
        self,
        images: Tensor,
        prompts: Sequence[str],
        branch: str,
        align_step: AlignStep,
        words: tuple[str, str],
        tally: Tally,
    ) -> Tensor:
        """A branch's part of the step's loss, by its images, with gradient."""
        optim, align = self.config.optim, self.config.align
        preferred, other = preferred_and_other(*words, align_step.denoises)
        scores, preferred_values, loss = {}, {}, torch.zeros((), device=images.device)
        for part in self.rewards:
            with blamed_on(f"the reward (reward.name={part.name!r})"):
                pair = two_wordings(part.reward, images, prompts, preferred, other)
            preferred_values[part.name] = pair[0].detach()
            score = part.score(*pair, align_step.k)
            scores[part.name] = score.detach()
            loss = loss + part.loss(score, len(align.branches))
        loss = loss / (optim.accumulation * align.draws_per_rollout)
        tally.add(branch, loss, scores, preferred_values, align_step)
        return loss

    def _update(self, number: int, finite: FiniteChecks) -> tuple[Tensor, float]:
        """Clip, step and average; the gradient's norm before clipping, and the learning rate."""
        optim = self.config.optim
        with self.world.in_step():
            settle(self.flow.module)
            hand_over_gradients(self.trained, self.parts)
            norm = gradient_norm([p.grad for p in self.parts.values() if p.grad is not None])
            grad_norm = self.world.as_main(whole_norm(norm, self.trained.values()))  # unlike GPUs' may differ a little
        finite.add(grad_norm, "the gradient")
        finite.require()
        lr = learning_rate(optim, number)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._applies = True  # what fails from here on leaves some weights changed
        clip_and_step(self.optimizer, self.parts, optim.max_grad_norm, grad_norm)
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
        """Clean latents of one micro-batch."""
        return self._rollouts(number, [micro])[0]

    def _rollouts(self, number: int, micros: Sequence[int]) -> list[Rollout]:
        """Clean latents of micro-batches: sampled from noise, some together, or encoded from their photos.

        All of a step's come before its first gradient: those take as much memory as a copy for rollouts.
        """
        config, starts, done = self.config.rollout, self._starts(number, micros), []
        sigmas = shifted_sigmas(config.num_steps, config.shift)
        check = None if self.world.keeps_step else lambda *_: self._check()  # such a check is no small thing
        copied = self._copy is not None and any(start.images is None for start in starts)
        copy = self._copy.filled() if copied else contextlib.nullcontext(self.flow)
        with gathered(self.flow.module, self.config.parallel.gathered == "rollout"), copy as flow:
            model = flow if self._replay is None else self._replay.of(flow)

            def sample(prompts: PromptBatch, noise: Tensor) -> Rollout:
                self._check()
                return rollout(model, prompts, noise, sigmas, config.guidance, check, config.calls)

            for first in range(0, len(starts), config.at_once):
                group = starts[first : first + config.at_once]
                sampled = iter(each_of(sample, [(one.prompts, one.noise) for one in group if one.images is None]))
                done += [next(sampled) if one.images is None else self._encoded(one) for one in group]
        return done

    def _encoded(self, start: Start) -> Rollout:
        self._check()
        images = sent(start.images, self.world.device)
        with blamed_on("the autoencoder (model.autoencoder)"):
            return rollout_from_images(self.autoencoder, images, start.prompts, start.noise)

    def _starts(self, number: int, micros: Sequence[int]) -> list[Start]:
        """What the micro-batches' rollouts start from, which may be there already."""
        ahead, self._ahead = self._ahead, None
        return ahead[1] if ahead is not None and ahead[0] == (number, *micros) else self._made(number, micros)

    def _look_ahead(self, number: int) -> None:
        """Make ready what the next step's rollouts start from, while the device is still at work."""
        micros = range(self.config.optim.accumulation)
        if number < self.config.optim.steps:
            with contextlib.suppress(Exception):  # what is wrong with it is told when its turn has come
                self._ahead = (number + 1, *micros), self._made(number + 1, micros)

    def _made(self, number: int, micros: Sequence[int]) -> list[Start]:
        config, world, starts = self.config, self.world, []
        for micro in micros:
            batch = self.data.at(self._micro(number, micro), world.part, world.parts)
            part = micro if config.rollout.same_noise and not batch.photos else self._part(micro)
            generator = generator_for(config.seed, number, 0, f"noise {part}")
            shape = self.flow.latent_shape(batch.height, batch.width)
            noise = torch.randn(len(batch.prompts), *shape, generator=generator)
            images = load_photos(batch.photos, batch.height, batch.width) if batch.photos else None
            starts.append(Start(batch.prompts, noise, images).to(world.device))
        return starts

    def _align_steps(self, number: int, micro: int, draw: int) -> list[tuple[str, AlignStep]]:
        """Each branch and its gradient step, at levels drawn for this draw."""
        config = self.config
        generator = generator_for(config.seed, number, 0, f"levels {self._part(micro)} {draw}")
        steps = sample_align_steps(config.align, config.rollout.shift, config.data.batch_size, generator)
        return list(zip(config.align.branches, steps, strict=True))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the context the model holds the averaged weights, if the run keeps an average."""
        with contextlib.ExitStack() as applied:
            if self.average is not None:
                with self.world.together():  # one that has no room for it ends what all are about
                    applied.enter_context(self.average.applied())
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
        settle(self.flow.module)
        copy_tensors(folder, "weights", self.trained, exactly=True)
        if self.average is not None:
            copy_tensors(folder, "ema", self._spread(self.average.tensors), exactly=True)
        load_optimizer_tensors(self.optimizer, self.parts, self._states(folder))

    def _states(self, folder: Path) -> dict[str, Tensor]:
        """A checkpoint's states `<parameter>/<state>` of the optimizer; of parameters in parts, this process's part."""
        shapes = read_shapes(folder, "optimizer")
        coded = [name for name in self.trained if is_part(self.trained[name]) and f"{name}/{CODES[0]}" in shapes]
        left_out = dict.fromkeys(f"{name}/{key}" for name in coded for key in CODES)
        states = {name: self._room(name, *each) for name, each in shapes.items() if name not in left_out}
        copy_tensors(folder, "optimizer", states, left_out=left_out)
        whole = stream_tensors(folder, "optimizer", left_out)
        for name in coded:  # their blocks are not cut where parts are
            held = {key: next(whole).to(self.world.device) for key in CODES}
            for key, moment in decoded(held, self.trained[name].shape).items():
                states[f"{name}/{key}"] = self._room(f"{name}/{key}", moment.shape, moment.dtype)
                put_whole(states[f"{name}/{key}"], moment)
        return {name: part_of(state) for name, state in states.items()}

    def _room(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Room for a state `<parameter>/<state>` of the optimizer; of a parameter in parts, for this process's part."""
        parameter = self.trained.get(name.partition("/")[0])
        if parameter is None or not is_part(parameter) or not shape:
            return torch.empty(shape, dtype=dtype)
        return like(torch.empty_like(part_of(parameter), dtype=dtype), parameter)

"""A run: the learner's steps, and the previews, checkpoints, evaluation and record around them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srpo_core.align import training_levels
from srpo_core.checkpoint import describe_latest, latest, prune, read_state, save
from srpo_core.columns import means
from srpo_core.config import ModelConfig, RunConfig
from srpo_core.drift import VelocityProbe
from srpo_core.errors import TrainingError, enough_memory
from srpo_core.evaluate import Evaluation, When
from srpo_core.flow import shifted_sigmas
from srpo_core.learner import Learner, Parts
from srpo_core.metrics import Clock, MetricsLog, StepMetrics, peak_memory_gib
from srpo_core.parallel import World
from srpo_core.preview import Gallery, save_preview
from srpo_core.progress import Display
from srpo_core.randomness import fixed_noise
from srpo_core.rewards.mixture import combined
from srpo_core.rollout import rollout
from srpo_core.run_folder import check_start, held, write_record
from srpo_core.run_state import stop_asked, told, write_state
from srpo_core.stopping import StopRequested, StopSignals

STOPPED_EXIT_CODE = 3
"""Exit code of a process whose run a signal stopped, with a checkpoint saved."""
STOPPING = "stopping: the step is finished and saved first; once more aborts at once"
PROBE_PROMPTS = 2
LESS_MEMORY = (
    "try model.recompute=true, a smaller data.batch_size or data.height and data.width, or a LoRA (lora.rank=16)"
)
EVALUATION_SETTINGS: dict[str, Any] = {
    "model": set(ModelConfig.model_fields) - {"recompute"},
    "data": {"height", "width"},
    "rollout": {"shift"},
    "reward": True,
    "output": {"preview_steps", "preview_guidance"},
    "seed": True,
}
"""What the base model's evaluation depends on, beside the prompts."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: after which step, and whether that was its last."""

    step: int
    finished: bool
    run_dir: Path


class Trainer:
    """Trains the parameters of flow.module that require a gradient, once; knows no family and no reward by name."""

    def __init__(self, config: RunConfig, world: World, parts: Parts) -> None:
        self.config, self.world, self.flow, self.lora = config, world, parts.flow, parts.lora
        self.autoencoder, self.reward, self.words = parts.autoencoder, combined(parts.rewards), parts.words
        self.measures, self.held_out = parts.measures, parts.held_out
        self.notes, self.trained_on = parts.notes, parts.trained_on
        self.learner = Learner(config, world, parts)
        self.latent_shape = self.flow.latent_shape(config.data.height, config.data.width)
        self.run_dir = Path(config.output.dir)
        self.previews = self._gallery(config.output.preview_prompts)
        self.display = Display(quiet=not world.is_main)
        self.metrics = StepMetrics(0)
        self.saved_step = 0
        self.best: dict[str, Any] | None = None

    def train(self, resume: bool = False) -> Outcome:
        """Train to optim.steps in output.dir; with `resume`, from its newest checkpoint or else the start.

        SIGINT or SIGTERM finishes the step, saves and returns; a second one raises KeyboardInterrupt. ConfigError if
        the run can't start there or resume with these settings, or if another process trains there; TrainingError if
        it fails.
        """
        check_start(self.config, resume)
        with held(self.run_dir):
            with told(self.run_dir, self.config.optim.steps):
                outcome = self._run(resume)
            write_state(self.run_dir, "finished" if outcome.finished else "stopped", self.config.optim.steps)
            return outcome

    def _run(self, resume: bool) -> Outcome:
        write_record(self.config, self.world.device)
        asked = functools.partial(stop_asked, self.run_dir)
        with self.display, StopSignals(lambda: self.display.say(STOPPING), asked) as stop:
            for note in self.notes:
                self.display.say(note)
            if resume and latest(self.run_dir) is None:
                self.display.say(f"no checkpoint in {self.run_dir} to go on from: starting from the base model")
            try:
                self._train(stop)
            except StopRequested:
                return self._stopped()
        self.display.say(f"finished after step {self.metrics.step}: {self.run_dir}")
        return Outcome(self.metrics.step, True, self.run_dir)

    def _train(self, stop: StopSignals) -> None:
        with enough_memory("the first rollout, before training", LESS_MEMORY):
            probe = self._probe()  # of the base weights, as is the evaluation before training
        evaluation = self._evaluation()
        self._evaluate(evaluation, "before", stop)
        with self._resumed_log() as log:
            if self.metrics.step == 0:
                self._record_base(log)
            self.display.phase("training", self.config.optim.steps, self.metrics.step)
            while self.metrics.step < self.config.optim.steps:
                stop.check()
                self._train_step(probe, log)
        self._evaluate(evaluation, "after", stop)

    def _train_step(self, probe: VelocityProbe, log: MetricsLog) -> None:
        """A step and all that is due after it; its line is written last."""
        output, clock = self.config.output, Clock(self.world.synchronize)
        self.metrics = metrics = self._learn(self.metrics.step + 1, clock)
        metrics.seconds = clock.seconds
        last, is_best = metrics.step == self.config.optim.steps, False
        with clock.phase("drift"):
            metrics.velocity_drift = probe.drift(self.flow)
        if output.preview_every and (metrics.step % output.preview_every == 0 or last):
            with clock.phase("preview"):
                self._preview(metrics, log)
                is_best = self._is_best(metrics)
        metrics.peak_memory_gib = peak_memory_gib(self.world.device)
        if metrics.step % output.checkpoint_every == 0 or last or is_best:
            with clock.phase("checkpoint"):
                self._save()
        clock.seconds["total"] = clock.total()
        log.write(metrics)
        self.display.step(metrics)

    def _learn(self, step: int, clock: Clock) -> StepMetrics:
        with enough_memory(f"step {step}", f"{LESS_MEMORY}; {describe_latest(self.run_dir)}"):
            try:
                return self.learner.step(step, clock)
            except TrainingError as error:
                raise TrainingError(f"step {step}: {error}; {describe_latest(self.run_dir)}") from error

    def _record_base(self, log: MetricsLog) -> None:
        """Step 0: a preview of the untrained model."""
        if self.config.output.preview_every:
            clock = Clock(self.world.synchronize)
            with clock.phase("preview"):
                self._preview(self.metrics, log)
            self.metrics.seconds = clock.seconds | {"total": clock.total()}
            log.write(self.metrics)

    def _gallery(self, count: int) -> Gallery:
        """The first `count` held-out prompts with their noise; fewer if there are no more."""
        config = self.config
        prompts = self.held_out.select(range(min(count, len(self.held_out))))
        return Gallery(
            prompts, fixed_noise(config.seed, len(prompts), self.latent_shape, "held-out"),
            self.autoencoder, self.reward, self.words, config.reward.contrast, self.measures,
            config.output.preview_steps, config.rollout.shift, config.output.preview_guidance,
            config.data.batch_size, self.world.device,
        )  # fmt: skip

    def _preview(self, metrics: StepMetrics, log: MetricsLog) -> None:
        """Draw the preview prompts and put their mean scores into the step's metrics. What goes wrong is a warning."""
        try:
            with self.learner.averaged():
                images, scores = self.previews.draw(self.flow)
            sheet = save_preview(self.run_dir, metrics.step, self.previews.prompts.prompts, images, scores)
            metrics.preview = means(scores)
            log.picture(metrics.step, sheet)
            self.display.scores(f"preview at step {metrics.step}", metrics.preview)
        except Exception as error:  # a family, a reward, a measure or the disk: none is worth the run
            self.display.warn(
                f"the preview of step {metrics.step} failed, training goes on: {type(error).__name__}: {error}"
            )

    def _is_best(self, metrics: StepMetrics) -> bool:
        """Whether the step's preview beats those before it; remembers it if so."""
        by = self.config.output.best_by
        score = metrics.preview.get(by, math.nan)
        if not math.isfinite(score) or (self.best is not None and score <= self.best["score"]):
            return False
        self.best = {"step": metrics.step, "score": score, "by": by}
        return True

    def _evaluation(self) -> Evaluation | None:
        count = self.config.output.evaluate_prompts
        settings = self.config.model_dump(mode="json", include=EVALUATION_SETTINGS)
        return Evaluation(self.run_dir, self._gallery(count), settings) if count else None

    def _evaluate(self, evaluation: Evaluation | None, when: When, stop: StopSignals) -> None:
        """Evaluate the model as it is, unless that is done or not wanted; a stop is heeded between batches."""
        step = self.metrics.step
        if evaluation is None or not evaluation.missing(when, step):
            return
        self.display.phase(f"evaluation {when} training", len(evaluation.gallery.prompts))

        def on_batch(done: int) -> None:
            self.display.advance(done)
            stop.check()

        advice = "try a smaller data.batch_size or data.height and data.width, or output.evaluate_prompts=0"
        with self.learner.averaged(), enough_memory(f"evaluation {when} training", advice):
            self.display.scores(f"evaluation {when} training", evaluation.make(when, step, self.flow, on_batch))

    def _probe(self) -> VelocityProbe:
        """The velocity of the base weights on rollouts of held-out prompts, at the middle of the training range."""
        config, gallery = self.config, self._gallery(PROBE_PROMPTS)
        sigmas = shifted_sigmas(config.rollout.num_steps, config.rollout.shift)
        prompts, noise = gallery.prompts.to(self.world.device), gallery.noise.to(self.world.device)
        clean = rollout(self.flow, prompts, noise, sigmas, config.rollout.guidance)
        align = config.align
        levels = training_levels(align.range_start, align.range_end, align.schedule_steps, config.rollout.shift, 3)
        return VelocityProbe(self.flow, clean, float(levels[1]), align.guidance)

    def _save(self) -> None:
        state = {"best": self.best, "lora": self.lora, "metrics": self.metrics.line(), "trained_on": self.trained_on}
        save(self.run_dir, self.metrics.step, self.learner.tensors(), state)
        prune(self.run_dir, self.config.output.keep_checkpoints, self.best["step"] if self.best else None)
        self.saved_step = self.metrics.step

    def _resumed_log(self) -> MetricsLog:
        """Take up the newest checkpoint, if there is one; the metrics log, with what came after it dropped."""
        newest, tensorboard = latest(self.run_dir), self.config.output.tensorboard
        if newest is None:
            return MetricsLog(self.run_dir, tensorboard=tensorboard)
        state = read_state(newest)
        self.learner.restore(newest)
        self.metrics, self.saved_step = StepMetrics(**state["metrics"]), state["step"]
        if state["best"] and state["best"]["by"] == self.config.output.best_by:
            self.best = state["best"]
        if state.get("trained_on", self.trained_on) != self.trained_on:
            self.display.warn(
                "the prompts or photos are others than when this run was saved: it goes on with those of now, in"
                " another order"
            )
        self.display.say(f"going on from {newest}")
        return MetricsLog(self.run_dir, after=state["step"], last=state["metrics"], tensorboard=tensorboard)

    def _stopped(self) -> Outcome:
        """Save what a stopped run has not saved yet, and say so."""
        step = self.metrics.step
        if step > self.saved_step:
            self._save()
        saved = f"stopped after step {step}, which is saved in {self.run_dir}: --resume goes on from there"
        self.display.say(saved if step else "stopped before the first step: --resume starts from the base model")
        return Outcome(step, False, self.run_dir)

"""A run: the learner's steps, and the previews, checkpoints, evaluation and record around them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from srpo_core.align import training_levels
from srpo_core.checkpoint import checkpoint_step, describe_latest, latest, prune, read_state, save, save_parts
from srpo_core.columns import means
from srpo_core.compact_adamw import CompactAdamW
from srpo_core.config import ConfigError, ModelConfig
from srpo_core.drift import VelocityProbe
from srpo_core.errors import TrainingError, enough_memory
from srpo_core.evaluate import Evaluation, When
from srpo_core.flow import shifted_sigmas
from srpo_core.learner import Learner, Parts
from srpo_core.metrics import Clock, MetricsLog, NoLog, StepMetrics, peak_memory_gib
from srpo_core.parallel import OthersError, ends_all
from srpo_core.preview import Gallery, save_preview
from srpo_core.randomness import fixed_noise
from srpo_core.rewards.mixture import combined
from srpo_core.rollout import rollout
from srpo_core.session import Outcome, Session
from srpo_core.stopping import StopRequested
from srpo_core.time_words import duration_text

PROBE_PROMPTS = 2
EVALUATION_SETTINGS: dict[str, Any] = {
    "model": set(ModelConfig.model_fields) - {"recompute", "trained_memory", "compile", "attention"},
    "data": {"height", "width"},
    "rollout": {"shift"},
    "reward": True,
    "output": {"preview_steps", "preview_guidance"},
    "seed": True,
}
"""What the base model's evaluation depends on, beside the prompts."""


class Trainer:
    """Trains the parameters of flow.module that require a gradient, once; knows no family and no reward by name."""

    def __init__(self, session: Session, parts: Parts) -> None:
        self.session, self.config, self.world = session, session.config, session.world
        self.display, self.stop, self.run_dir = session.display, session.stop, session.run_dir
        self.flow, self.lora = parts.flow, parts.lora
        self.autoencoder, self.reward, self.words = parts.autoencoder, combined(parts.rewards), parts.words
        self.measures, self.held_out = parts.measures, parts.held_out
        self.notes, self.trained_on, self.less_memory = parts.notes, parts.trained_on, parts.less_memory
        self.learner = Learner(self.config, self.world, parts, self.stop.check)
        if isinstance(self.learner.optimizer, CompactAdamW):
            self.learner.optimizer.report = self.display.warn
        self.latent_shape = self.flow.latent_shape(self.config.data.height, self.config.data.width)
        self.previews = self._gallery(self.config.output.preview_prompts)
        self.metrics = StepMetrics(0)
        self.saved_step = 0
        self._warm = False
        self.best: dict[str, Any] | None = None

    def train(self, resume: bool = False) -> Outcome:
        """Train to optim.steps in output.dir; with `resume`, from its newest checkpoint or else the start.

        A request to stop drops the step under way, saves and returns: see Session.run. TrainingError if the run fails.
        """
        return self.session.run(resume, lambda: self.work(resume))

    def work(self, resume: bool = False) -> Outcome:
        """`train` inside a session that runs already."""
        self.session.loaded()
        for note in self.notes:
            self.display.say(note)
        if resume and latest(self.run_dir) is None:
            self.display.say(f"no checkpoint in {self.run_dir} to go on from: starting from the base model")
        try:
            with self.world.together():
                self._train()
        except StopRequested:
            return self._stopped()
        except TrainingError as error:
            raise TrainingError(f"{error}; {describe_latest(self.run_dir)}") from error
        self.display.say(f"finished after step {self.metrics.step}: {self.run_dir}")
        return Outcome(self.metrics.step, True, self.run_dir)

    def _train(self) -> None:
        with enough_memory("the first rollout, before training", self.less_memory):
            probe = self._probe()  # of the base weights, as is the first evaluation
        evaluation = self._evaluation()
        self._evaluate(evaluation, "before")
        with self._resumed_log() as log:
            self._check_same("the weights that training starts from")
            try:
                self._steps(probe, log)
            except StopRequested:
                log.write_missing(self.metrics)
                raise
        self._evaluate(evaluation, "after")

    def _steps(self, probe: VelocityProbe | None, log: MetricsLog) -> None:
        """The steps from where the run stands to its last."""
        if self.metrics.step == 0:
            self._record_base(log)
        self.display.phase("training", self.config.optim.steps, self.metrics.step)
        if self.metrics.step and not self.metrics.preview and self._preview_is_due():
            self._after_step(log)  # a stop came during its preview
        first = 0.0
        while self.metrics.step < self.config.optim.steps:
            clock = self._clock()
            self.metrics = self._learn(self.metrics.step + 1, clock)
            if probe is not None:
                with clock.phase("drift"), self.world.in_step():
                    self.metrics.velocity_drift = probe.drift(self.flow)
            now = clock.total()
            self.metrics.seconds = clock.seconds | {"total": now}
            first = first or now
            self._say_warm_up(first, now)
            self._after_step(log)

    def _say_warm_up(self, first: float, now: float) -> None:
        """What compiling cost, as soon as a step is there that went without."""
        if self.learner.is_compiled() and not self._warm and now < first:
            self._warm = True
            self.display.say(f"compiled: the first step took {duration_text(first)}, this one {duration_text(now)}")

    def _clock(self) -> Clock:
        return Clock(self.world.synchronize, self.world.device)

    def _preview_is_due(self) -> bool:
        every, step = self.config.output.preview_every, self.metrics.step
        return bool(every) and (step % every == 0 or step == self.config.optim.steps)

    def _after_step(self, log: MetricsLog) -> None:
        """All that is due after a step; its line is written last."""
        metrics, clock, is_best = self.metrics, self._clock(), False
        last = metrics.step == self.config.optim.steps
        if self._preview_is_due():
            with clock.phase("preview"):
                self._preview(metrics, log)
                is_best = self._is_best(metrics)
        peaks = self.world.exchange(peak_memory_gib(self.world.device))
        metrics.peak_memory_gib = max((peak for peak in peaks if peak is not None), default=None)
        if metrics.step % self.config.output.checkpoint_every == 0 or last or is_best:
            with clock.phase("checkpoint"):
                self._save()
        metrics.seconds |= clock.seconds | {"total": metrics.seconds["total"] + clock.total()}
        log.write(metrics)
        self.display.step(metrics)

    def _learn(self, step: int, clock: Clock) -> StepMetrics:
        with enough_memory(f"step {step}", self.less_memory):
            try:
                return self.learner.step(step, clock)
            except TrainingError as error:
                elsewhere = isinstance(error, OthersError) and "out of memory" in str(error)
                advice = f"; {self.less_memory()}" if elsewhere else ""
                raise TrainingError(f"step {step}: {error}{advice}") from error

    def _record_base(self, log: MetricsLog) -> None:
        """Step 0: a preview of the untrained model."""
        if self.config.output.preview_every:
            clock = self._clock()
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
            with self.display.during("preview", len(self.previews.prompts)) as done, self.learner.averaged():
                images, scores = self.previews.draw(self.flow, self.world, done, self.stop.check)
            metrics.preview = means(scores)
            if self.world.is_main:
                sheet = save_preview(self.run_dir, metrics.step, self.previews.prompts.prompts, images, scores)
                log.picture(metrics.step, sheet)
                self.display.scores(f"preview at step {metrics.step}", metrics.preview)
        except Exception as error:  # a family, a reward, a measure or the disk: none is worth the run
            if ends_all(error):
                raise
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

    def _evaluate(self, evaluation: Evaluation | None, when: When) -> None:
        """Evaluate the model as it is, unless that is done or not wanted."""
        step, is_main = self.metrics.step, self.world.is_main
        missing = evaluation is not None and is_main and evaluation.missing(when, step)
        if evaluation is None or not self.world.exchange(missing)[0]:
            return
        gallery = evaluation.gallery
        self.display.phase(f"evaluation {when} training", len(gallery.prompts))
        advice = "try a smaller data.batch_size or data.height and data.width, or output.evaluate_prompts=0"
        with self.learner.averaged(), enough_memory(f"evaluation {when} training", advice):
            images, scores = gallery.draw(self.flow, self.world, self.display.advance, self.stop.check)
            if is_main:
                evaluation.keep(when, step, images, scores)
        self.display.scores(f"evaluation {when} training", means(scores))

    def _probe(self) -> VelocityProbe | None:
        """The velocity of the base weights on rollouts of held-out prompts, at the middle of the training range.

        None on processes that the main one doesn't need for that.
        """
        if not self.world.is_main and not self.world.keeps_step:
            return None
        with self.world.in_step():
            return self._probed()

    def _probed(self) -> VelocityProbe:
        config, gallery = self.config, self._gallery(PROBE_PROMPTS)
        sigmas = shifted_sigmas(config.rollout.num_steps, config.rollout.shift)
        prompts, noise = gallery.prompts.to(self.world.device), gallery.noise.to(self.world.device)
        check = None if self.world.keeps_step else lambda *_: self.stop.check()
        clean = rollout(self.flow, prompts, noise, sigmas, config.rollout.guidance, check)
        align = config.align
        levels = training_levels(align.range_start, align.range_end, align.schedule_steps, config.rollout.shift, 3)
        return VelocityProbe(self.flow, clean, float(levels[1]), align.guidance)

    def _save(self) -> None:
        """Write a checkpoint: the main process does, and the others make sure that it speaks for them."""
        self._check_same(f"the weights after step {self.metrics.step}")
        state = {"best": self.best, "lora": self.lora, "metrics": self.metrics.line(), "trained_on": self.trained_on}
        state["processes"] = self.world.parts
        step, tensors = self.metrics.step, self.learner.tensors()
        with self.world.together(), self.display.during("saving"):
            removed = self.world.exchange(self.session.removed)[0]
            if self.learner.is_sharded and not removed:
                save_parts(self.world, self.run_dir, step, tensors, state)
            elif self.world.is_main and not removed:
                save(self.run_dir, step, tensors, state)
            if self.world.is_main and not removed:
                prune(self.run_dir, self.config.output.keep_checkpoints, self.best["step"] if self.best else None)
        self.saved_step = self.metrics.step

    def _check_same(self, what: str) -> None:
        """TrainingError if processes hold other weights, where each holds them whole."""
        if not self.learner.is_sharded:
            self.world.check_same(self.learner.trained, what)

    def _resumed_log(self) -> MetricsLog:
        """Take up the newest checkpoint, if there is one; the metrics log, with what came after it dropped."""
        newest = self._newest()
        if newest is None:
            return self._log()
        with self.world.together():
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
        if state.get("processes", self.world.parts) != self.world.parts:
            self.display.warn(
                f"{self.world.parts} instead of {state['processes']} processes train from here on: a step averages"
                " other numbers of pictures than before, and prompts come in another order"
            )
        self.display.say(f"going on from {newest}")
        return self._log(after=state["step"], last=state["metrics"])

    def _newest(self) -> Path | None:
        """The newest checkpoint, which all processes have to see."""
        newest = latest(self.run_dir)
        seen = self.world.exchange(checkpoint_step(newest) if newest is not None else 0)
        if len(set(seen)) > 1:
            raise ConfigError(
                f"output.dir={self.config.output.dir!r}: the run's processes see other checkpoints there (steps"
                f" {', '.join(map(str, seen))}, by rank); all machines need the same folder, such as a network's"
            )
        return newest

    def _log(self, **after: Any) -> MetricsLog:
        """The run's log; one that is silent on all processes but the main one."""
        if not self.world.is_main:
            return NoLog()
        return MetricsLog(self.run_dir, tensorboard=self.config.output.tensorboard, **after)

    def _stopped(self) -> Outcome:
        """Save what a stopped run has not saved yet, and say so."""
        step = self.metrics.step
        if not step:
            return self.session.stopped_early()
        if step > self.saved_step:
            self._save()
        saved = f"which is saved in {self.run_dir}: --resume goes on from there"
        where = "but its folder was removed" if self.session.removed else saved
        self.display.say(f"stopped after step {step}, {where}")
        return Outcome(step, False, self.run_dir)

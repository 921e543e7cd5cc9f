"""A run at work: its folder is held, its state is told, and someone may ask it to stop, from loading to the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from srpo_core import result
from srpo_core.at_work import at_work, work_folder
from srpo_core.checkpoint import checkpoint_step, latest
from srpo_core.config import RunConfig
from srpo_core.deterministic import deterministic
from srpo_core.parallel import World
from srpo_core.progress import Display
from srpo_core.run_folder import write_record
from srpo_core.run_state import stop_asked
from srpo_core.stopping import StopSignals

STOPPED_EXIT_CODE = 3
"""Exit code of a process whose run was stopped, with a checkpoint saved."""
STOPPING = "stopping: the step under way is dropped, the one before it is saved; once more aborts at once"


@dataclass(frozen=True)
class Outcome:
    """How a run ended: after which step, and whether that was its last."""

    step: int
    finished: bool
    run_dir: Path


class Session:
    """What a run has while it works, beside its models: a voice, and an ear for requests to stop."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self.config, self.world, self.run_dir = config, world, Path(config.output.dir)
        self.display = Display(quiet=not world.is_main)
        self.stop = StopSignals(lambda: self.display.say(STOPPING), self._stop_asked)
        self.loaded: Callable[[], None] = lambda: None
        """Says that everything is loaded and training begins."""
        self._recorded = False

    def run(self, resume: bool, work: Callable[[], Outcome]) -> Outcome:
        """Do the run's work in output.dir, which no other process then takes.

        SIGINT, SIGTERM and a request in the folder stop it where nothing is lost; a second signal raises
        KeyboardInterrupt. ConfigError if the run can't start there or resume with these settings, or if another process
        trains there.
        """
        with contextlib.ExitStack() as stack:
            with self.world.together():
                stack.enter_context(self.stop)  # first: torchrun ends those who still tell how it ended by a signal
                telling = stack.enter_context(at_work(self.config, self.world, resume))
                stack.enter_context(self.display)
                if telling is not None:
                    self.display.on_phase, self.loaded = telling.phase, telling.training
                if self.world.is_main:
                    write_record(self.config, self.world.device)
                    self._recorded = True
            with self.world.together(), deterministic(self.config.parallel.deterministic):
                outcome = work()
                if outcome.finished and self.world.is_main:
                    result.write(self.config, outcome.step, self.display)
                if telling is not None:
                    telling.outcome = "finished" if outcome.finished else "stopped"
            return outcome

    @property
    def removed(self) -> bool:
        """Whether someone has removed the run's folder while it was at work. Nobody could ask such a run to stop."""
        return self._recorded and not (self.run_dir / "run.json").is_file()

    def _stop_asked(self) -> bool:
        return self.removed or stop_asked(work_folder(self.config))

    def stopped_early(self) -> Outcome:
        """The outcome of a run that was stopped before this part of it trained a step, and a word about it."""
        newest = latest(self.run_dir)
        where = f"goes on from {newest}" if newest else "starts from the base model"
        self.display.say(f"stopped before a step was trained: --resume {where}")
        return Outcome(checkpoint_step(newest) if newest else 0, False, self.run_dir)

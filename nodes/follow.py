"""A training that a node waits for: its progress, Cancel, and what is said when it goes wrong."""

from __future__ import annotations

import time
from pathlib import Path

import comfy.model_management as management
from comfy.utils import ProgressBar

from srpo_core import launch
from srpo_core.checkpoint import describe_latest
from srpo_core.errors import TrainingError
from srpo_core.run_state import LOG_FILE, RunState, ask_to_stop, is_alive, log_tail, read_state, stop_asked

LOOK_EVERY = 0.1
PATIENCE = 600.0
"""Seconds that a run which was cancelled may take to save; a second Cancel doesn't wait for it."""
SOON = 30.0
"""Seconds that one may take which is still loading, and has nothing to save."""
UNREADABLE = 5.0
"""Seconds for which a run's state may be unreadable: network disks fail for a moment, and Windows gives no file that
is just being replaced."""
LOG_LINES = 12


def follow(run_dir: Path, steps: int) -> RunState:
    """Wait until a run is finished, with a progress bar of its steps; its state then.

    Cancel has it save and end before the interrupt is raised, and so is Stop in the page an interrupt. TrainingError
    says why the run failed, what it said last and what to try.
    """
    bar = ProgressBar(steps)
    try:
        state = _finished(run_dir, bar, steps)
    except management.InterruptProcessingException:
        end(run_dir)
        raise
    if state is None:
        raise TrainingError(f"{run_dir} has lost its state: has someone removed it? Queue the graph to train it again")
    _wait_until_gone(state)
    if state.status == "stopped":
        raise management.InterruptProcessingException
    if state.status != "finished":
        raise TrainingError(_what_went_wrong(run_dir, state))
    bar.update_absolute(steps, steps)
    return state


def _finished(run_dir: Path, bar: ProgressBar, steps: int) -> RunState | None:
    """The state of a run that is no longer at work; None where it can't be read for a while."""
    shown, read = -1, time.monotonic()
    while (state := read_state(run_dir)) is None or state.active:
        management.throw_exception_if_processing_interrupted()
        if state is not None:
            read = time.monotonic()
        elif time.monotonic() > read + UNREADABLE:
            return None
        if state is not None and state.step > shown:
            shown = state.step
            bar.update_absolute(min(shown, steps), steps)  # this may raise the interrupt too
        time.sleep(LOOK_EVERY)
    return state


def wait_for_stopping(run_dir: Path) -> None:
    """Wait for a run that someone has asked to stop until it has; no wait for others. Cancel ends the wait."""
    state = read_state(run_dir)
    if state is not None and state.active and stop_asked(run_dir):
        end(run_dir)
        management.throw_exception_if_processing_interrupted()


def end(run_dir: Path) -> None:
    """Have a run save and end; one that takes too long, or that is cancelled once more, ends without."""
    ask_to_stop(run_dir)
    asked = time.monotonic()
    while (state := read_state(run_dir)) is not None and state.active:
        patience = SOON if state.status == "starting" else PATIENCE
        if management.processing_interrupted() or time.monotonic() > asked + patience:
            launch.kill(state)
            return
        time.sleep(LOOK_EVERY)
    if state is not None:
        _wait_until_gone(state)


def _wait_until_gone(state: RunState) -> None:
    """Wait for the processes of a run that has ended: they hold the card's memory until they are gone."""
    end = time.monotonic() + launch.ENDING
    while is_alive(state) and time.monotonic() < end:
        time.sleep(LOOK_EVERY)
    launch.kill(state)


def _what_went_wrong(run_dir: Path, state: RunState) -> str:
    if state.status == "killed":
        reason = "its process was killed: by someone, or by the system because the computer's memory was full"
    else:
        reason = state.error or "it gave no reason"
    said = [line for line in log_tail(run_dir, LOG_LINES) if line.strip() and line not in reason]
    lines = [
        f"{run_dir.name} {state.status} at step {state.step} of {state.steps}: {reason}",
        *(f"    {line}" for line in said),
        f"Once the cause is gone, queue the graph again to go on; {describe_latest(run_dir)}.",
        f"All that it said is in {run_dir / LOG_FILE}",
    ]
    return "\n".join(lines)

"""The run's record, its clock, and the helpers that a step is recorded with: learning rate, average, random numbers."""

from __future__ import annotations

import io
import json
import time

import pytest
import torch
from rich.console import Console
from tiny import tiny_flow, weights_hash
from torch import nn

from srpo_core.config import OptimConfig
from srpo_core.errors import NotFiniteError
from srpo_core.finite import FiniteChecks
from srpo_core.metrics import Clock, MetricsLog, StepMetrics, peak_memory_gib, read_metrics
from srpo_core.optim import Average, learning_rate, load_optimizer_tensors, make_optimizer, optimizer_tensors
from srpo_core.progress import Display
from srpo_core.randomness import fixed_noise, generator_for


def test_a_line_leaves_out_what_is_unset_and_tells_no_false_numbers(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(StepMetrics(1, loss=0.0, score={"denoise": float("nan")}))
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.0, "score": {"denoise": null}}\n'


def test_lines_are_there_at_once(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(StepMetrics(1, loss=1.0))
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]
    log.close()


def test_a_torn_last_line_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1}]
    assert read_metrics(tmp_path / "nowhere") == []


def test_a_resumed_log_drops_what_came_after_the_checkpoint(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(6)) + '{"st')
    with MetricsLog(tmp_path, after=3, last={"step": 3}) as log:
        log.write(StepMetrics(4))
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
    with MetricsLog(tmp_path):
        pass
    assert read_metrics(tmp_path) == []


def test_tensorboard_gets_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((1, 3), (3, 4)):  # the second writer starts over at step 3
        with MetricsLog(tmp_path, after=first - 1, tensorboard=True) as log:
            for step in range(first, last + 1):
                log.write(StepMetrics(step, loss=step + first / 10, score={"denoise": 2.0 * step}, liked="Real"))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "score/denoise"]
    losses = [(event.step, round(event.value, 3)) for event in events.Scalars("loss")]
    assert losses == [(1, 1.1), (2, 2.1), (3, 3.3), (4, 4.3)]


def test_the_clock_adds_up_phases():
    waits = []
    clock = Clock(lambda: waits.append(1))
    for _ in range(2):
        with clock.phase("rollout"):
            time.sleep(0.01)
    assert 0.02 <= clock.seconds["rollout"] <= clock.total() and len(waits) == 2


def test_peak_memory_is_this_process(tmp_path):
    assert 0.05 < peak_memory_gib(torch.device("cpu")) < 100


def test_learning_rate_rises_then_falls():
    config = OptimConfig(steps=12, lr=0.1, warmup_steps=2)
    assert [learning_rate(config, step) for step in (1, 2, 3, 12)] == pytest.approx([0.05, 0.1, 0.1, 0.1])
    config.schedule = "linear"
    assert [learning_rate(config, step) for step in (1, 2, 3, 8, 12)] == pytest.approx([0.05, 0.1, 0.1, 0.05, 0.01])
    config.schedule = "cosine"
    assert [learning_rate(config, step) for step in (2, 3, 8)] == pytest.approx([0.1, 0.1, 0.05])
    assert 0 < learning_rate(config, 12) < 0.01


def test_the_average_is_the_recursion_on_paper():
    parameters = {"w": nn.Parameter(torch.tensor([1.0]))}
    average = Average(parameters, decay=0.3)
    expected = 1.0
    for step, value in enumerate((2.0, 3.0, -1.0, 5.0), start=1):
        parameters["w"].data.fill_(value)
        average.update(step)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert average.tensors["w"].item() == pytest.approx(expected)
    with average.applied():
        assert parameters["w"].item() == pytest.approx(expected)
    assert parameters["w"].item() == 5.0 and average.tensors["w"].item() == pytest.approx(expected)


def test_an_error_inside_applied_puts_the_weights_back():
    module = tiny_flow().module
    before = weights_hash(module)
    average = Average(dict(module.named_parameters()), 0.9)
    for tensor in average.tensors.values():
        tensor.zero_()
    with pytest.raises(RuntimeError), average.applied():
        raise RuntimeError
    assert weights_hash(module) == before


@pytest.mark.parametrize("shared", [False, True])
def test_an_average_that_finds_no_room_half_way_puts_the_weights_back(monkeypatch, shared):
    module = tiny_flow().module
    before = weights_hash(module)
    average = Average(dict(module.named_parameters()), 0.9, shared)
    for tensor in average.tensors.values():
        tensor.zero_()
    swap, swapped = average._swap, []

    def full_at_the_third(name):
        if len(swapped) == 2 and name not in swapped:
            raise torch.OutOfMemoryError("no room")
        swap(name)
        swapped.append(name)

    monkeypatch.setattr(average, "_swap", full_at_the_third)
    with pytest.raises(torch.OutOfMemoryError), average.applied():
        raise AssertionError("not reached")
    assert len(swapped) == 4 and weights_hash(module) == before
    assert all(not tensor.any() for tensor in average.tensors.values())


def test_optimizer_state_goes_through_flat_tensors():
    def trained():
        parameters = {"a": nn.Parameter(torch.ones(3)), "b.c": nn.Parameter(torch.ones(2, 2))}
        return parameters, make_optimizer(parameters, OptimConfig(lr=0.1))

    def learn(parameters, optimizer):
        for parameter in parameters.values():
            parameter.grad = torch.sin(parameter.detach()) + 0.1
        optimizer.step()

    (ours, optimizer), (theirs, other) = trained(), trained()
    learn(ours, optimizer)
    tensors = optimizer_tensors(optimizer, ours)
    assert set(tensors) == {f"{name}/{key}" for name in ours for key in ("step", "exp_avg", "exp_avg_sq")}
    for name, parameter in theirs.items():
        parameter.data.copy_(ours[name].detach())
    load_optimizer_tensors(other, theirs, {key: tensor.clone() for key, tensor in tensors.items()})
    learn(ours, optimizer)
    learn(theirs, other)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_random_numbers_depend_on_every_argument():
    def draw(*arguments):
        return torch.randn(4, generator=generator_for(*arguments)).tolist()

    draws = [
        draw(*arguments)
        for arguments in ((0, 1, 2, "x"), (1, 1, 2, "x"), (0, 2, 2, "x"), (0, 1, 0, "x"), (0, 1, 2, "y"))
    ]
    assert len({tuple(numbers) for numbers in draws}) == 5
    assert draw(0, 1, 2, "x") == draws[0]
    assert generator_for(0, 1, 0, "noise").initial_seed() == 786454863502060731  # stable between versions


def test_fixed_noise_does_not_depend_on_how_much_is_drawn():
    assert torch.equal(fixed_noise(3, 5, (2, 4), "held-out")[:2], fixed_noise(3, 2, (2, 4), "held-out"))


def test_a_terminal_gets_a_bar_with_the_time_left():
    console = Console(file=io.StringIO(), force_terminal=True, width=140, highlight=False)
    with Display(console=console) as display:
        display.phase("training", 3)
        display.step(StepMetrics(1, score={"denoise": 0.25}, velocity_drift=0.01))
    out = console.file.getvalue()
    assert "training" in out and "1/3" in out and "left" in out and "denoise +0.250" in out


def test_without_a_terminal_there_is_a_line_every_ten_steps():
    console = Console(file=io.StringIO(), force_terminal=False, width=80, soft_wrap=True)
    with Display(console=console) as display:
        display.phase("training", 25)
        for step in range(1, 26):
            display.step(StepMetrics(step, score={"denoise": 0.0}))
        display.warn("[careful] with brackets")
    lines = console.file.getvalue().rstrip().splitlines()  # older versions of rich end with an empty line
    assert [line.split("/")[0] for line in lines[1:-1]] == ["1", "10", "20", "25"]
    assert lines[-1] == "warning: [careful] with brackets"


def test_lines_survive_json(tmp_path):
    line = StepMetrics(2, loss=0.5, liked="Concept art", seconds={"total": 1.5}, preview={"reward": 0.1}).line()
    assert json.loads(json.dumps(line)) == line == StepMetrics(**line).line()


def test_phases_nest_and_repeat():
    clock = Clock(lambda: None)
    with clock.phase("whole"):
        for _ in range(2):
            with clock.phase("part"):
                time.sleep(0.01)
    seconds = clock.seconds
    assert 0.02 <= seconds["part"] <= seconds["whole"] <= clock.total()


def test_on_a_gpu_phases_are_read_off_its_own_clock_and_only_reading_waits(monkeypatch):
    """The device's time runs by itself: an event is when the work before it is done."""
    now, waits = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.at = now[0]

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    clock = Clock(lambda: waits.append(1), torch.device("cuda"))
    for spent in (2000.0, 500.0):
        with clock.phase("rollout"):
            now[0] += spent
    assert not waits
    assert clock.seconds == {"rollout": 2.5} and waits == [1]


def test_what_is_not_finite_is_named_by_what_came_first():
    checks = FiniteChecks()
    checks.require()
    checks.add(torch.ones(3), "the rollout")
    with pytest.raises(NotFiniteError, match="the loss of the denoise branch is not finite"):
        checks.add(torch.tensor([1.0, torch.inf]), "the loss of the denoise branch")
    with pytest.raises(NotFiniteError, match="the loss of the denoise branch"):
        checks.add(torch.tensor(torch.nan), "the gradient")

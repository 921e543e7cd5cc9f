"""What a step sends and holds with parts of a model on each process: laws, counted by scripts/scale_counted.py."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from tiny import ColourReward

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from scale_counted import MACHINE, WHOLE, count, playing  # noqa: E402

CALLS, BRANCHES, BLOCKS = 3, 2, 2
GROUPS = BLOCKS + 1
"""What is gathered at once: each block, and what is outside of them."""
SMALL = f"rollout.num_steps={CALLS} reward.liked=[Real] reward.disliked=[Flat]"
WHOLE_MODEL = 4 * 5_092_928
"""Bytes in float32."""


@functools.cache
def counted(size: int, settings: str) -> dict:
    with mock.patch("bench_step.random_reward", return_value=ColourReward()):
        return count(f"{SMALL} {settings}", size, tiny=True)


def shard(size: int, settings: str = "") -> dict:
    return counted(size, f"{WHOLE} parallel.strategy=shard {settings}")


@pytest.mark.parametrize(
    ("gathered", "gatherings"),
    [("layer", CALLS + 2 * BRANCHES), ("rollout", 1 + 2 * BRANCHES), ("step", 1)],
)
def test_a_block_is_gathered_as_often_as_is_said(gathered, gatherings):
    """With each call and each backward pass, or once for them; what is outside of blocks with each branch."""
    messages = shard(8, f"parallel.gathered={gathered}")["messages"]
    assert messages["all-gather, a machine"] == BLOCKS * gatherings + BRANCHES + (gathered == "rollout")
    assert messages["reduce-scatter, a machine"] == GROUPS * BRANCHES


def test_gradients_are_handed_over_once_for_each_branch_of_each_micro_batch():
    messages = shard(8, "parallel.gathered=step optim.accumulation=2")["messages"]
    assert messages["reduce-scatter, a machine"] == 2 * GROUPS * BRANCHES
    assert messages["all-gather, a machine"] == BLOCKS + 2 * BRANCHES  # of blocks no more than without


def test_a_process_gets_what_others_hold():
    """Of the model (S - 1) / S, in bfloat16 with a gathering and in float32 of a gradient, which it keeps a part of."""
    two, eight = (shard(size)["received"] for size in (2, 8))
    assert two.keys() == eight.keys()
    for kind in ("all-gather, a machine", "reduce-scatter, a machine"):
        assert eight[kind] / two[kind] == pytest.approx((7 / 8) / (1 / 2))
    assert eight["reduce-scatter, a machine"] == BRANCHES * WHOLE_MODEL * 7 // 8
    once = shard(8, "parallel.gathered=step")["received"]["all-gather, a machine"]
    assert WHOLE_MODEL / 2 * 7 // 8 < once < eight["all-gather, a machine"]


def test_machines_hear_of_each_other_once_a_step():
    """Of the sum of all branches and micro-batches, each process of its part."""
    row = counted(4 * MACHINE, f"{WHOLE} parallel.strategy=hybrid parallel.gathered=step optim.accumulation=2")
    assert row["messages"]["all-reduce, machines"] == GROUPS
    assert row["received"]["all-reduce, machines"] == WHOLE_MODEL // MACHINE * 2 * 3 // 4
    inside = shard(MACHINE, "parallel.gathered=step optim.accumulation=2")["messages"]
    assert all(row["messages"][kind] == inside[kind] for kind in ("all-gather, a machine", "reduce-scatter, a machine"))


def test_a_process_holds_its_part():
    two, eight = (shard(size) for size in (2, 8))
    less = WHOLE_MODEL // 2 - WHOLE_MODEL // 8
    held = two["held_before_the_first_step"] - eight["held_before_the_first_step"]
    assert held == pytest.approx(less, abs=100)  # few rows don't divide
    for phase, copies in (("rollout", 3), ("gradient step", 4)):  # weights and two moments; and gradients
        assert two["peak"][phase] - eight["peak"][phase] == pytest.approx(copies * less, rel=0.05)


def test_a_lora_sends_its_own_gradient_alone():
    """Beside a model in parts too, of which only weights are sent."""
    row = counted(8, "lora.rank=8 parallel.strategy=shard")
    assert row["messages"]["all-reduce, a machine"] == 1
    assert row["received"]["all-reduce, a machine"] < WHOLE_MODEL // 10
    assert row["messages"].keys() == {"all-gather, a machine", "all-reduce, a machine", "broadcast, a machine"}


def test_what_is_counted_is_let_go():
    with playing(1) as held:
        kept = torch.zeros(1000)
        assert held.live == 4000
        for _ in range(3):
            kept + 1
        assert (held.live, held.peak) == (4000, 8000)
        kept.untyped_storage().resize_(0)
        assert held.live == 0

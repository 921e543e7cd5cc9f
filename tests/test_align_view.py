"""What the align preview computes, on flows whose error is known, and the grid that shows it."""

import math

import pytest
import torch
from toy import LIKED, DotReward, ExactFlow, LinearAutoencoder, toy_batch

from srpo_core import align_view as views
from srpo_core.align import direct_align, one_step_prediction
from srpo_core.align_grid import COLOURS, GAP, HEAD, LEAST_WIDTH, LONGEST, PAPER, SIDE, align_grid
from srpo_core.config import AlignConfig, ConfigError
from srpo_core.errors import NotFiniteError
from srpo_core.flow import shifted_sigmas
from srpo_core.interfaces import PromptBatch
from srpo_core.rollout import Rollout

LEVELS = [0.96, 0.9, 0.75, 0.3]
BRANCHES = ["denoise", "inversion"]
LENGTH = 0.0215


def toy_rollout(count=2, prompt=None):
    prompts, noise = toy_batch(count, dtype=torch.float64)
    if prompt is not None:
        prompts = PromptBatch((prompt,) * count, prompts.embeds)
    return Rollout(prompts, noise, prompts.embeds["clean"])


def flow_off_by(push):
    """A flow whose velocity is wrong by `push` everywhere."""
    flow = ExactFlow()
    flow.module.double().push.data.fill_(push)
    return flow


def view_of(flow, rollout, levels=LEVELS, branch="denoise", reward=None, length=LENGTH):
    steps = [views.step_below(level, length, branch) for level in levels]
    return views.align_view(
        LinearAutoencoder(), rollout, levels, steps, views.both_ways(flow, rollout, steps, 3.5), reward
    )


def rgb(colour):
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


@pytest.mark.parametrize("branch", BRANCHES)
def test_both_ways_are_the_engines_own_from_one_model_call_each(branch):
    rollout, flow, seen = toy_rollout(), flow_off_by(0.3), []
    steps = [views.step_below(level, LENGTH, branch) for level in LEVELS]
    found = views.both_ways(flow, rollout, steps, 3.5, seen.append)
    assert found.shape == (len(LEVELS), 2, *rollout.clean.shape)
    assert seen == [1, 2, 3, 4]
    assert [(sigma.tolist(), guidance) for sigma, guidance in flow.calls] == [([s.sigma] * 2, 3.5) for s in steps]
    for step, (recovered, one_step) in zip(steps, found, strict=True):
        assert torch.equal(recovered, direct_align(flow, rollout, step, 3.5))
        assert torch.equal(one_step, one_step_prediction(flow, rollout, step.sigma, 3.5))


@pytest.mark.parametrize("branch", BRANCHES)
def test_an_exact_flow_gives_the_clean_picture_either_way(branch):
    view = view_of(ExactFlow(), toy_rollout(), branch=branch)
    for level in view.levels:
        for way in (level.recovered, level.one_step):
            assert min(way.psnr) > 90
            assert way.detail == pytest.approx([1, 1], abs=1e-4)
    assert view.branch == branch


@pytest.mark.parametrize("branch", BRANCHES)
def test_the_share_is_the_part_of_the_models_error_that_training_sees(branch):
    """A velocity off by p puts one-step prediction off by sigma * p, and the recovered latents by share as much."""
    rollout, push = toy_rollout(), 0.01
    view = view_of(flow_off_by(push), rollout, branch=branch)
    found = views.both_ways(flow_off_by(push), rollout, [level.step for level in view.levels], 3.5)
    for level, (recovered, one_step) in zip(view.levels, found, strict=True):
        sign = -1 if branch == "denoise" else 1
        torch.testing.assert_close(one_step - rollout.clean, torch.full_like(one_step, -level.step.sigma * push))
        wanted = torch.full_like(recovered, sign * level.share * level.step.sigma * push)
        torch.testing.assert_close(recovered - rollout.clean, wanted)
    shares = [level.share for level in view.levels[:3]]
    assert shares == sorted(shares, reverse=True)


def test_a_level_means_the_same_stretch_in_both_branches():
    denoise, inversion = (views.step_below(0.9, 0.02, branch) for branch in BRANCHES)
    assert (denoise.sigma, denoise.sigma_next) == (inversion.sigma_next, inversion.sigma) == (0.9, 0.88)
    assert denoise.denoises
    assert not inversion.denoises


def test_levels_are_read_from_high_to_low_once_each():
    assert views.read_levels(" 0.5,0.9; 0.96\n.5 1 ") == [1.0, 0.96, 0.9, 0.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.9, high", "levels: 'high' is no level"),
        ("0.9, 0", "levels: '0' is no level"),
        ("1.1", "levels: '1.1' is no level"),
        ("nan", "levels: 'nan' is no level"),
        (" , ", "levels is empty"),
        (" ".join(str(i / 100) for i in range(1, 60)), "59 are too many for one view; 24 at most"),
    ],
)
def test_texts_that_are_no_levels_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        views.read_levels(text)


def test_steps_that_lead_nowhere_are_refused():
    for level, length in ((0.02, 0.0215), (0.9, 0.0), (0.5, 0.5)):
        with pytest.raises(ConfigError, match=f"doesn't fit below level {level:g}"):
            views.step_below(level, length, "denoise")
    with pytest.raises(ConfigError, match="can't end at level 1"):
        views.step_below(1.0, LENGTH, "inversion")
    assert views.step_below(1.0, LENGTH, "denoise").sigma == 1.0


def test_entries_are_those_of_the_training_range():
    sigmas = shifted_sigmas(50, 3.0)
    assert [views.nearest_entry(float(sigmas[i])).index for i in range(50)] == list(range(50))
    assert [views.nearest_entry(level).index for level in (0.96, 0.75, 0.01)] == [6, 25, 49]
    start, end = views.default_range()
    assert (start.index, start.sigma) == (5, pytest.approx(27 / 28))
    assert (end.index, end.sigma) == (25, 0.75)
    assert [views.in_default_range(level) for level in (0.97, 0.96, 0.75, 0.74)] == [False, True, True, False]


def test_likeness_and_detail_on_paper():
    generator = torch.Generator().manual_seed(0)
    target, other = (torch.rand(1, 3, 64, 64, generator=generator) for _ in range(2))
    assert views.psnr(target + 0.1, target).item() == pytest.approx(20, abs=1e-3)
    assert views.psnr(target, target).item() == 100
    assert views.detail_kept(target, target).item() == pytest.approx(1)
    assert views.detail_kept(0.5 * target + 0.2, target).item() == pytest.approx(0.5)
    assert views.detail_kept(other, target).item() == pytest.approx(0, abs=0.05)
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1
    ramp = edge.clone()
    ramp[..., 3], ramp[..., 4] = 1 / 3, 2 / 3
    assert views.detail_kept(ramp, edge).item() == pytest.approx(1 / 3)
    assert views.detail_kept(target, torch.zeros_like(target)).item() == 0
    assert [views.verdict(value) for value in (45, 30, 29.9, 20, 19.9)] == ["clean", "clean", "soft", "soft", "lost"]


def test_the_reward_reads_every_picture_once_and_each_score_stands_at_its_picture():
    reward, rollout = DotReward(), toy_rollout(prompt=LIKED)
    view = view_of(flow_off_by(2.0), rollout, LEVELS, reward=reward)
    assert len(reward.calls) == 1
    for level in view.levels:
        for way in (level.recovered, level.one_step, view.clean):
            assert way.reward == pytest.approx(reward(way.images, rollout.prompts.prompts).tolist(), rel=1e-5)
    columns, rows = views.table(view)
    assert columns[-2:] == ["recovered reward", "one step reward"]
    assert [row[:2] for row in rows] == [[i, level] for level in LEVELS for i in (1, 2)]
    last = dict(zip(columns, rows[-1], strict=True))
    assert last["one step reward"] == pytest.approx(view.levels[-1].one_step.reward[1], abs=1e-6)
    assert (last["from"], last["to"]) == (0.3, 0.2785)
    assert f"mean reward is {sum(view.clean.reward) / 2:.4g}." in views.finding(view)


def test_a_reward_that_is_no_number_is_told():
    with pytest.raises(NotFiniteError, match="picture 1: its reward is no finite number"):
        view_of(ExactFlow(), toy_rollout(), reward=lambda images, prompts: torch.full((len(prompts),), math.nan))


def test_pictures_come_level_by_level():
    view = view_of(flow_off_by(2.0), toy_rollout())
    pictures = view.images("one_step")
    assert pictures.shape == (8, 3, 6, 6)
    assert torch.equal(pictures[3], view.levels[1].one_step.images[1])


def test_the_finding_names_settings_that_a_run_takes():
    view = view_of(flow_off_by(0.6), toy_rollout())
    decibels = [sum(level.recovered.psnr) / 2 for level in view.levels]
    clean = [level for level, one in zip(LEVELS, decibels, strict=True) if one >= views.CLEAN]
    assert len(clean) > 1
    words = views.finding(view)
    assert "at " + ", ".join(f"{level:g}" for level in clean) in words
    settings = dict(word.strip(".").split("=") for word in words.split() if word.startswith("align."))
    chosen = AlignConfig(**{name.removeprefix("align."): int(value) for name, value in settings.items()})
    assert chosen.range_start == views.nearest_entry(max(clean)).index
    assert chosen.range_end == views.nearest_entry(min(clean)).index
    assert "from 5 (level 0.9643) to 25 (0.75)" in words


def test_without_a_clean_level_no_range_is_named():
    words = views.finding(view_of(flow_off_by(50.0), toy_rollout(), branch="inversion"))
    assert "at none of these levels" in words
    assert "align." not in words


def coloured_view(height, width, count=1, reward=True):
    """A view whose pictures are of one colour each: recovered green, one-step blue, clean red."""

    def way(colour, decibels):
        images = torch.tensor(colour).view(1, 3, 1, 1).expand(count, 3, height, width)
        return views.Way(images, [decibels] * count, [0.5] * count, [0.25] * count if reward else None)

    levels = [
        views.LevelView(level, views.step_below(level, LENGTH, "denoise"), way((0.0, 1.0, 0.0), 35.0),
                        way((0.0, 0.0, 1.0), 12.0))
        for level in LEVELS
    ]  # fmt: skip
    return views.AlignView(way((1.0, 0.0, 0.0), 100.0), levels, "denoise", ("a text",) * count)


@pytest.mark.parametrize(("height", "width"), [(128, 128), (720, 1280), (1280, 720), (16, 16), (30, 500)])
def test_the_grid_holds_every_picture_whole_in_its_place(height, width):
    count = 2
    grid = align_grid(coloured_view(height, width, count))
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    there = {colour: amount for amount, colour in grid.getcolors(grid.width * grid.height) if colour in colours}
    pictures = dict(zip(colours, (count, count * len(LEVELS), count * len(LEVELS)), strict=True))
    areas = {there[colour] / number for colour, number in pictures.items()}
    assert len(areas) == 1
    area = areas.pop()
    assert area == pytest.approx((area * width / height) ** 0.5 * (area * height / width) ** 0.5)
    cell = (grid.width - SIDE - GAP) // (1 + len(LEVELS)) - GAP
    assert LEAST_WIDTH <= cell <= LONGEST
    for column in range(1 + len(LEVELS)):
        middle = SIDE + column * (cell + GAP) + cell // 2
        column_colours = {grid.getpixel((middle, y)) for y in range(HEAD, grid.height)}
        assert column_colours & set(colours) == ({colours[0]} if column == 0 else set(colours[1:]))


def test_the_grid_says_in_colour_what_is_clean_and_what_is_lost():
    grid = align_grid(coloured_view(64, 64))
    colours = {colour for _, colour in grid.getcolors(grid.width * grid.height)}
    assert {rgb(COLOURS["clean"]), rgb(COLOURS["lost"]), rgb(PAPER)} <= colours
    assert grid.getpixel((0, 0)) == rgb(PAPER)


def test_a_prompt_of_any_length_and_lines_leaves_the_grid_as_it_is():
    view = coloured_view(32, 32, count=2)
    long = views.AlignView(view.clean, view.levels, "denoise", ("word\n" * 500, ""))
    assert align_grid(long).size == align_grid(view).size


def test_a_grid_without_reward_or_prompt_is_drawn():
    view = coloured_view(32, 32, reward=False)
    plain = align_grid(views.AlignView(view.clean, view.levels, "inversion", ("",)))
    assert plain.height < align_grid(view).height

"""Memory by phase, what would make a run fit, and the time it takes: laws, and numbers that runs showed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import load, tiny_config
from torch import nn

from srpo_core import fitting
from srpo_core.checks import WHOLE, Footprint, check_sharing, footprint_of
from srpo_core.config import ModelConfig, RunConfig
from srpo_core.description import load_run, with_changes
from srpo_core.duration import (
    Pace,
    Work,
    count_work,
    expected_pace,
    expected_phases,
    matmul_rate,
    own_pace,
    run_seconds,
)
from srpo_core.estimate import CONTEXT, WORKSPACE, Shapes, estimate, shapes_of
from srpo_core.fitting import LARGER, less_memory, memory_advice, smaller_settings, what_would_fit
from srpo_core.interfaces import Components
from srpo_core.models.flux import FluxFlow, ImageAutoencoder
from srpo_core.weights.loading import empty_parameters

RESULTS = Path(__file__).parent.parent / "scripts" / "results"
GIB = 2**30


class FullSize(Components):
    """FLUX.1-dev's shapes on meta, with all of its blocks or fewer."""

    def __init__(self, double: int = 19, single: int = 38) -> None:
        from diffusers import AutoencoderKL, FluxTransformer2DModel
        from transformers import T5Config, T5EncoderModel

        self.prompts = {}
        with empty_parameters():
            self.transformer = FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True)
            self.vae = AutoencoderKL(
                block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, use_quant_conv=False,
                use_post_quant_conv=False, down_block_types=["DownEncoderBlock2D"] * 4,
                up_block_types=["UpDecoderBlock2D"] * 4,
            )  # fmt: skip
            self.t5 = T5EncoderModel(
                T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                         feed_forward_proj="gated-gelu")
            )  # fmt: skip
        self.t5.set_input_embeddings(self.t5.shared)

    def outline(self) -> FluxFlow:
        return FluxFlow(self.transformer, 8, torch.bfloat16)

    def autoencoder_outline(self) -> ImageAutoencoder:
        return ImageAutoencoder(self.vae, recompute=False)

    def text_outline(self) -> tuple[nn.Module, ...]:
        return (self.t5,)

    def embeds_outline(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)}


@pytest.fixture(scope="module")
def full_size() -> FullSize:
    return FullSize()


@pytest.fixture(scope="module")
def shapes(full_size) -> Shapes:
    return shapes_of(RunConfig(reward={"name": "hpsv2"}), full_size)


def measured(name: str, monkeypatch) -> dict:
    """A record of runs; predictions are then for decoders as they were recomputed at its time."""
    record = json.loads((RESULTS / name).read_text())
    monkeypatch.setattr("srpo_core.estimate.DECODE_RECOMPUTED", record["machine"]["decoder_bytes_a_pixel"])
    return record


def preset(name: str, *overrides: str) -> RunConfig:
    return load_run(name, overrides)


def test_what_runs_measured_is_what_is_predicted(shapes, monkeypatch):
    runs = measured("full_size.json", monkeypatch)["runs"]
    peaks = {run["what"]: run["device_peak_gib"] for run in runs}
    for name in ("flux-dev-lora", "flux-dev-lora-24gb"):
        config = preset(name, "optim.accumulation=1")
        assert estimate(config, shapes).peak / GIB == pytest.approx(peaks[f"srpo train {name}, 720 x 720"], rel=0.03)
    encoding = estimate(preset("flux-dev-lora"), shapes).phases["encoding prompts"]
    assert encoding / GIB == pytest.approx(peaks["srpo encode, T5 in bfloat16"], rel=0.03)


def test_rows_of_the_bench_are_predicted(shapes, monkeypatch):
    """Two steps of many kinds of runs on an H100: within 2 % in all phases, 4 % with what the allocator keeps."""
    rows = measured("memory.json", monkeypatch)["rows"]
    short = shapes_of(RunConfig(reward={"name": "hpsv2"}), FullSize(3, 4))
    names = {"rollout": "rollout", "gradient": "gradient step", "previews": "previews"}
    assert len(rows) >= 12
    for name, row in rows.items():
        overrides = [word for word in row["settings"] if not word.startswith("model.family=")]
        config = preset("flux-dev-lora", "optim.accumulation=1", *overrides)
        guess = estimate(config, short if "3 + 4 blocks" in name else shapes)
        if config.model.recompute == "auto":  # what is free is filled with activations
            assert row["measured_peak_gib"] > 0.98 * guess.peak / GIB and "error" not in row
            continue
        for phase, ours in names.items():
            assert guess.phases[ours] / GIB == pytest.approx(row["measured_gib"][phase], rel=0.02), (name, phase)
        assert guess.peak / GIB == pytest.approx(row["measured_peak_gib"], rel=0.02), name
        told = pytest.approx(guess.peak / GIB, abs=0.05)  # the files are older than what counts some MB
        assert row["predicted_peak_gib"] == told, f"{name}: the file tells of other predictions"
        assert guess.on_card / GIB == pytest.approx(row["reserved_gib"] + row["outside_the_allocator_gib"], rel=0.04)


def test_presets_held_to_smaller_cards_are_predicted(shapes, monkeypatch):
    """On an H200, in processes that couldn't take more than cards of 16, 24 or 80 GB have: within 3 %."""
    rows = measured("memory_caps.json", monkeypatch)["rows"]
    presets = {"24 GB preset, 720": "flux-dev-lora-24gb", "16 GB preset, 720": "flux-dev-lora-16gb"}
    assert rows.keys() > presets.keys()
    for name, row in rows.items():
        assert "error" not in row and (not row["cap_gib"] or row["reserved_gib"] <= row["cap_gib"])
        config = preset("flux-dev-lora", "optim.accumulation=1", *row["settings"])
        guess = estimate(config, shapes).peak / GIB
        if config.model.recompute == "auto":  # what is free is filled with activations
            assert row["measured_peak_gib"] > 0.98 * guess
            continue
        assert guess == pytest.approx(row["measured_peak_gib"], rel=0.03), name
    for name, of in presets.items():
        config = preset(of, "data.height=720", "data.width=720", "optim.accumulation=1")
        assert estimate(config, shapes).peak / GIB == pytest.approx(rows[name]["measured_peak_gib"], rel=0.01), of
    assert rows["24 GB preset, 1024"]["measured_peak_gib"] < 22


def test_steps_on_one_and_two_h200s_are_predicted(shapes):
    """All weights and LoRAs, compiled or not, in parts or whole: within 2 %, and 5 % with eight pictures at once."""
    rows = json.loads((RESULTS / "bench_step.json").read_text())["rows"]
    whole = {name: [row, row["peak_gib"]] for name, row in rows.items() if "peak_gib" in row}
    scale = json.loads((RESULTS / "scale.json").read_text())
    whole |= {(size, name): [row, max(row["peak_gib"])] for size in "12" for name, row in scale[size].items()}
    assert len(whole) >= 25
    for name, (row, peak) in whole.items():
        settings = [word for word in row["settings"].split() if not word.startswith("model.attention")]
        config = preset("flux-dev-exact", "optim.accumulation=1", *settings)
        least = estimate(config, shapes).peak / GIB
        if config.model.recompute != "auto":
            assert least == pytest.approx(peak, rel=0.05 if "batch 8" in name else 0.02), name
            continue
        most = estimate(with_changes(config, {"model.recompute": False}), shapes).peak / GIB
        assert 0.98 * least < peak < 1.02 * most, name
        if name[:1] == ("1",):  # alone, all fits, and all is kept
            assert most == pytest.approx(peak, rel=0.02), name


UNLIKE = {"all weights of 3 + 4 blocks, 512": 0.5, "flux-dev-lora, 720 x 720": 0.25, "LoRA for 24 GB": 0.3}
"""Steps that are further from what is predicted than others: the host's time is most of the first, the second took a
third longer than the same at other times, and the last unpacks its matrices with the H200's faster memory."""
UNLIKE_PHASES = {
    ("compiled, fp8 rollout", "rollout"): 0.2,
    ("LoRA, compiled, recomputed, fp8 rollout, batch 8", "gradient"): 0.2,
    ("compiled, recomputed, fp8 rollout, batch 4", "gradient"): 0.2,
    ("12 calls, both branches in one pass", "rollout"): 0.2,
}
"""Likewise phases of H200 rows: the first rollout took a sixth longer than the same one elsewhere, the other recorded
its calls anew, and four or eight pictures are decoded in less than so many times the time of one."""


def timed_steps() -> Iterator[tuple[str, RunConfig, float, dict[str, float]]]:
    """(name, settings, operations a second of a matrix product, seconds by phase) of all steps that records tell of."""

    def read(name: str, key: str) -> dict | list:
        return json.loads((RESULTS / name).read_text())[key]

    def described(base: str, settings: Iterable[str] = ()) -> RunConfig:
        ours = [word for word in settings if not word.startswith(("model.family=", "model.attention="))]
        return preset(base, "optim.accumulation=1", *ours)

    rates = []
    for name, row in read("memory.json", "rows").items():
        rates.append(row["matmul_tflops"])
        yield name, described("flux-dev-lora", ["rollout.num_steps=6", *row["settings"]]), rates[-1], row["seconds"]
    for run in read("full_size.json", "runs"):  # on the same card
        if "seconds_of_last_step" in run:
            name = run["what"].removeprefix("srpo train ")
            yield name, described(name.split(",")[0]), statistics.median(rates), run["seconds_of_last_step"]
    rows = read("bench_step.json", "rows")
    ceilings = [row["ceilings_tflop_per_second"]["bf16"] for row in rows.values() if "floor_seconds" in row]
    for name, row in rows.items():
        if "seconds" in row:
            config = described("flux-dev-exact", row["settings"].split())
            yield name, config, statistics.median(ceilings), row["seconds"]


def test_the_seconds_of_measured_steps_are_predicted(shapes, full_size):
    """On an H100 and an H200, eager and compiled, all weights and LoRAs: whole steps within 15 %, on the H200, where
    they are medians of four or more, their phases too."""
    short, works, names = FullSize(3, 4), {}, []
    for name, config, tflops, measured in timed_steps():
        model, of = (short, shapes_of(config, short)) if "3 + 4" in name else (full_size, shapes)
        key = (model is short, config.data.height)
        works[key] = works.get(key) or count_work(config, model)
        told = expected_phases(config, footprint_of(config, of.flow), works[key], tflops * 1e12, "cuda")
        names.append(name)
        ours = sum(told[phase] for phase in ("rollout", "gradient step", "optimizer"))
        theirs = sum(measured[phase] for phase in ("rollout", "gradient", "optimizer"))
        assert ours == pytest.approx(theirs, rel=UNLIKE.get(name, 0.15)), name
        phased = "step" in measured and name not in UNLIKE
        for phase, of in (("rollout", "rollout"), ("gradient step", "gradient")) if phased else ():
            assert told[phase] == pytest.approx(measured[of], rel=UNLIKE_PHASES.get((name, of), 0.15)), (name, phase)
    assert len(names) == 31 and UNLIKE.keys() | {name for name, _ in UNLIKE_PHASES} < set(names)


def test_a_pass_takes_as_long_as_its_start_or_its_work(full_size):
    """On a GPU of twice the rate large pictures take half as long, and small ones as long as before."""

    def rollout(side: int, rate: float) -> float:
        config = preset("flux-dev-exact", f"data.height={side}", f"data.width={side}", "optim.accumulation=1")
        work = count_work(config, full_size)
        return expected_phases(config, Footprint(0, 0, 0), work, rate, "cuda")["rollout"]

    assert rollout(1024, 1e14) / rollout(1024, 2e14) == pytest.approx(2)
    assert rollout(256, 8e14) == rollout(256, 16e14) > 0


def test_only_what_is_compiled_is_faster_for_it(shapes, full_size):
    """Blocks that share a picture's tokens are not."""

    def seconds(*settings: str) -> float:
        config = preset("flux-dev-lora", *settings)
        work = count_work(config, full_size)
        return expected_pace(config, footprint_of(config, shapes.flow), work, 6e14, "cuda").step

    assert seconds("model.compile=true") < seconds("model.compile=false")
    shared = "parallel.context=2"
    assert seconds("model.compile=true", shared) == seconds("model.compile=false", shared)


def test_weights_are_counted_by_hand(shapes):
    """All but activations, which are small for the smallest picture, copies in bfloat16 and workspace."""
    config = preset("flux-dev-lora", "optim.accumulation=1", "data.height=16", "data.width=16")
    by_hand = 2 * 11_901_408_320 + 12 * 130_744_320 + 2 * 83_819_683 + 4 * 986_109_441
    assert 0 < estimate(config, shapes).phases["rollout"] - by_hand < 0.5 * GIB
    eight_bit = with_changes(config, {"model.frozen_memory": "8bit"})
    saved = estimate(config, shapes).phases["previews"] - estimate(eight_bit, shapes).phases["previews"]
    assert saved == pytest.approx(11.8e9, rel=0.06)  # a byte for each number of a matrix, less one that is expanded


def test_a_steps_micro_batches_wait_on_the_card(shapes):
    """By hand: of each the prompt's embeddings in bfloat16, noise and clean latents in float32."""
    sizes = ["data.height=720", "data.width=720", "data.batch_size=2"]
    one, many = (estimate(preset("flux-dev-lora", f"optim.accumulation={n}", *sizes), shapes) for n in (1, 101))
    each = 2 * (2 * (512 * 4096 + 768) + 2 * 4 * 16 * 90 * 90)
    for phase in ("rollout", "gradient step", "previews"):
        assert many.phases[phase] - one.phases[phase] == 100 * each
    more, most = (estimate(preset("flux-dev-lora", f"optim.accumulation={n}", *sizes), shapes) for n in (4000, 4001))
    assert most.phases["rollout"] - more.phases["rollout"] == each
    assert most.phases["gradient step"] - more.phases["gradient step"] == 2 * each  # and the next step's, at its end


def test_a_lora_beside_a_model_in_parts_is_whole_on_every_card(shapes):
    """Parts on the host are the frozen model's alone."""

    def counted(*settings: str) -> tuple[int, int]:
        config = preset("flux-dev-lora", *settings)
        return estimate(config, shapes).phases["gradient step"], footprint_of(config, shapes.flow).least_bytes(config)

    lora, frozen = 130_744_320, 2 * 11_901_408_320
    alone, least = counted("parallel.processes=2")
    assert least == frozen + 16 * lora
    two = ["parallel.processes=2", "parallel.strategy=shard"]
    shared, fewer = counted(*two)
    assert least - fewer == frozen // 2
    host, fewest = counted(*two, "parallel.offload=true")
    assert fewer - fewest == shared - host == frozen // 2
    more, _ = counted("parallel.processes=8", "parallel.strategy=shard")
    assert shared - more == pytest.approx(frozen * (1 / 2 - 1 / 8), abs=1) and shared < alone


def test_what_stays_gathered_for_rollouts_is_let_go_for_the_gradient_step(shapes):
    def phases(gathered: str) -> dict[str, int]:
        sharded = ["parallel.strategy=shard", "parallel.processes=8", f"parallel.gathered={gathered}"]
        return dict(estimate(preset("flux-dev-exact", *sharded), shapes).phases)

    layer, rollout, step = map(phases, ("layer", "rollout", "step"))
    assert rollout["gradient step"] == layer["gradient step"]
    for phase in ("rollout", "previews"):
        assert 22e9 < rollout[phase] - layer[phase] < 23.8e9 and step[phase] == rollout[phase]
    assert 22e9 < step["gradient step"] - layer["gradient step"] < 23.8e9


def test_steps_that_were_counted_in_parts_are_predicted(shapes):
    """scripts/scale_counted.py, without what libraries of matrix products keep: within 3 %."""
    rows = json.loads((RESULTS / "scale_counted.json").read_text())["rows"]
    assert {"shard, layer", "shard, step", "hybrid, step", "LoRA, shard, layer"} < rows.keys()
    for name, sizes in rows.items():
        for size, row in sizes.items():
            local = min(8, int(size))
            parallel = [f"parallel.processes={local}", f"parallel.nodes={int(size) // local}"]
            config = preset("flux-dev-exact", "optim.accumulation=1", *parallel, *row["settings"].split())
            guess = estimate(config, shapes).phases
            for phase, counted in row["peak_gb"].items():
                told = (guess[phase] - WORKSPACE) / 1e9
                assert told == pytest.approx(counted, rel=0.03), (name, size, phase)
                assert told == pytest.approx(row["predicted_gb"][phase], abs=0.01), f"{name}: other predictions"


def test_processes_that_share_a_picture_have_their_part_of_its_tokens(shapes):
    """By hand: half of a forward pass's 60 bytes for each token and unit of width."""
    two = ["parallel.processes=2", "data.height=704", "data.width=704", "optim.accumulation=1"]
    whole, half = (
        estimate(preset("flux-dev-lora", *two, f"parallel.context={n}"), shapes).phases["rollout"] for n in (1, 2)
    )
    assert whole - half == 60 * (44 * 44 + 512) // 2 * 3072


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ("data.height=1024", "data.height=720"),
        ("data.batch_size=2", "data.batch_size=1"),
        ("model.recompute=false", "model.recompute=true"),
        ("model.frozen_memory=full", "model.frozen_memory=8bit"),
        ("model.dtype=float32", "model.dtype=bfloat16"),
        ("lora.rank=64", "lora.rank=16"),
        ("lora.rank=0", "lora.rank=32"),
        ("lora.targets=all", "lora.targets=attention"),
        ("optim.ema_decay=0.9", "optim.ema_decay=0"),
        ("parallel.processes=2", "parallel.processes=1"),
        ("model.frozen_memory=8bit", "model.frozen_memory=4bit"),
        ("model.trained_memory=float32", "model.trained_memory=bfloat16"),
        ("optim.states=float32", "optim.states=8bit"),
        ("reward.dtype=float32", "reward.dtype=bfloat16"),
    ],
)
def test_more_takes_more(shapes, more, less):
    for base in ("flux-dev-lora", "flux-dev-lora-24gb"):
        if base.endswith("24gb") and "lora.rank=0" in more:
            continue  # 8 bits are for frozen weights
        assert estimate(preset(base, more), shapes).on_card > estimate(preset(base, less), shapes).on_card


def test_t5_is_what_a_run_of_little_else_takes(shapes):
    small = {"model.frozen_memory": "8bit", "lora.targets": "attention"}
    for t5_memory, gib in (("full", 9.4), ("8bit", 5.0), ("offload", 3.7)):  # measured on an H100
        config = with_changes(preset("flux-dev-lora"), {**small, "model.t5_memory": t5_memory})
        assert estimate(config, shapes).phases["encoding prompts"] / GIB == pytest.approx(gib, rel=0.12)


def test_what_is_said_to_fit_fits(shapes):
    config = preset("flux-dev-lora")
    for card in (80e9, 48e9, 32e9, 24e9):
        free = round(0.97 * card)
        for line in what_would_fit(config, shapes, free):
            words, _, size = line.rpartition(": ")
            changed = load_run("flux-dev-lora", words.split())
            there = estimate(changed, shapes).on_card
            assert there <= free and size == f"{there / GIB:.1f} GiB"
    assert what_would_fit(config, shapes, round(24e9))[0].startswith("model.frozen_memory=8bit")
    (nothing,) = what_would_fit(config, shapes, round(8e9))
    assert nothing.startswith("even ") and "model.frozen_memory=4bit" in nothing and nothing.endswith(LARGER)


def test_a_model_in_parts_is_not_told_to_be_held_in_fewer_bits(shapes):
    for name in ("flux-dev-lora", "flux-dev-exact"):
        config = preset(name, "parallel.strategy=shard", "parallel.processes=4", "reward.dtype=float32")
        told = [setting for change in smaller_settings(config, shapes) for setting in change]
        assert "reward.dtype" in told and not WHOLE.keys() & set(told)


EIGHT = "parallel.processes=8"


@pytest.mark.parametrize(
    ("name", "wasteful", "told"),
    [
        ("flux-dev-lora", "rollout.at_once=32", "rollout.at_once=1: "),
        ("flux-dev-lora", "align.at_once=2", "align.at_once=1: "),
        ("flux-dev-lora", "rollout.precision=fp8 lora.targets=attention", "rollout.precision=model: "),
        ("flux-dev-exact", f"{EIGHT} parallel.strategy=shard parallel.gathered=rollout", "parallel.gathered=layer: "),
        ("flux-dev-exact", f"{EIGHT} parallel.strategy=hybrid parallel.gathered=step", "parallel.gathered=layer: "),
        ("flux-dev-exact", f"{EIGHT} parallel.strategy=shard", "parallel.offload=true: "),
        ("flux-dev-lora", f"{EIGHT} parallel.strategy=shard", "parallel.offload=true: "),
        ("flux-dev-exact", EIGHT, "parallel.strategy=shard: "),
        ("flux-dev", EIGHT, "parallel.strategy=shard model.trained_memory=float32 optim.states=float32: "),
    ],
)
def test_the_setting_that_takes_the_memory_is_told(shapes, name, wasteful, told):
    """And what is told can be done."""
    config = preset(name, *wasteful.split())
    lines = what_would_fit(config, shapes, estimate(config, shapes).on_card - 1)
    assert any(line.startswith(told) for line in lines), lines
    for line in lines:
        changed = preset(name, *wasteful.split(), *line.rpartition(": ")[0].split())
        check_sharing(changed, shapes.flow, [(720, 720)])
        assert estimate(changed, shapes).on_card < estimate(config, shapes).on_card


def test_settings_that_do_not_go_together_are_not_told_together(shapes):
    """Parts of a model and numbers in fewer bits."""
    config = preset("flux-dev-exact", "parallel.processes=2")
    (line,) = what_would_fit(config, shapes, 8 * GIB)
    together = line.removeprefix("even ").rpartition(": ")[0].split()
    assert "parallel.strategy=shard" in together and "reward.dtype=bfloat16" in together
    check_sharing(preset("flux-dev-exact", "parallel.processes=2", *together), shapes.flow, [(720, 720)])


def test_a_lora_may_have_its_model_in_parts_which_is_told_after_fewer_bits(shapes):
    config = preset("flux-dev-lora", EIGHT)
    order = [next(iter(change)) for change in smaller_settings(config, shapes)]
    assert order.index("model.frozen_memory") < order.index("parallel.strategy") < order.index("data.height")
    (line,) = [one for one in what_would_fit(config, shapes, 20 * GIB) if one.startswith("parallel.strategy=shard: ")]
    changed = with_changes(config, {"parallel.strategy": "shard"})
    assert estimate(changed, shapes).on_card < 20 * GIB < estimate(config, shapes).on_card and "GiB" in line
    assert "parallel.strategy" not in [next(iter(change)) for change in smaller_settings(changed, shapes)]


def test_what_costs_only_time_is_told_before_what_changes_the_training(shapes):
    config = preset("flux-dev-lora", "rollout.at_once=4", "model.recompute=false", "rollout.precision=fp8")
    order = [next(iter(change)) for change in smaller_settings(config, shapes)]
    wanted = ["rollout.at_once", "rollout.precision", "model.recompute", "model.frozen_memory", "data.height"]
    assert [one for one in order if one in wanted][:5] == [*wanted[:4], "model.frozen_memory"]
    sharded = preset("flux-dev-exact", EIGHT, "parallel.strategy=shard", "parallel.gathered=step")
    order = [next(iter(change)) for change in smaller_settings(sharded, shapes)]
    assert order.index("parallel.gathered") < order.index("parallel.offload") < order.index("lora.rank")


def test_a_run_that_ran_out_is_told_what_its_card_has_room_for(shapes, full_size, monkeypatch):
    config = preset("flux-dev-lora", "data.height=1024", "data.width=1024")
    anywhere, here = less_memory(config, shapes), less_memory(config, shapes, 25 * GIB)
    assert anywhere.startswith("try reward.dtype=bfloat16: ")
    assert here.startswith("try model.frozen_memory=8bit: ") and "reward.dtype=bfloat16: 3" not in here
    assert here.partition(" were expected")[2] == anywhere.partition(" were expected")[2]
    nowhere = less_memory(config, shapes, 4 * GIB)
    assert nowhere.startswith("even ") and f"; {LARGER}; about " in nowhere
    assert less_memory(config, shapes, 1000 * GIB) == anywhere
    monkeypatch.setattr(fitting, "CudaMemory", lambda device: SimpleNamespace(reach=lambda: 25 * GIB - CONTEXT))
    assert memory_advice(config, full_size, torch.device("cuda", 0)) == here
    assert memory_advice(config, full_size, torch.device("cpu")) == anywhere


def test_the_change_that_costs_least_is_told_first(shapes):
    wasteful = preset("flux-dev-lora", "model.recompute=false", "data.batch_size=4", "data.height=1024")
    order = [next(iter(change)) for change in smaller_settings(wasteful, shapes)]
    assert order[:3] == ["model.t5_memory", "model.recompute", "data.batch_size"]
    assert order[-1] == "data.height"
    batch = next(change for change in smaller_settings(wasteful, shapes) if "data.batch_size" in change)
    assert batch["optim.accumulation"] == 4 * wasteful.optim.accumulation  # as many pictures a step
    told = less_memory(wasteful, shapes)
    assert 0 < told.index("model.recompute=auto: ") < told.index("data.batch_size=1 optim.accumulation=128: ")
    guess = estimate(wasteful, shapes)
    assert f"; about {guess.on_card / GIB:.1f} GiB were expected (encoding prompts " in told
    assert told.endswith(f"gradient step {guess.phases['gradient step'] / GIB:.1f} GiB, previews "
                         f"{guess.phases['previews'] / GIB:.1f} GiB)")  # fmt: skip


def test_a_picture_keeps_its_shape_when_it_gets_smaller(shapes):
    config = preset("flux-dev-lora", "data.height=768", "data.width=1152")
    sizes = [change for change in smaller_settings(config, shapes) if "data.height" in change]
    assert [(size["data.height"], size["data.width"]) for size in sizes] == [(432, 640), (336, 512), (256, 384)]
    for size in sizes:
        shapes.flow.latent_shape(size["data.height"], size["data.width"])


def test_the_miniature_is_estimated_on_a_cpu_too():
    from srpo_core.models import load_model

    config = preset("miniature")
    shapes = shapes_of(config, load_model(config.model, "cpu"))
    assert len(shapes.blocks) == 6 and shapes.width == 256 and shapes.text == 0
    assert 0.5 < estimate(config, shapes).on_card / GIB < 2  # 1.1 GiB of the process were measured


def test_operations_are_counted_by_hand(full_size):
    """A forward pass of FLUX.1-dev at 720 x 720, as its matrices and its attention have it."""
    work = count_work(RunConfig(), full_size)
    width, tokens, texts = 3072, 2025, 512
    double = 2 * 12 * width**2 * (tokens + texts) + 2 * 2 * 6 * width**2
    single = 2 * 12 * width**2 * (tokens + texts) + 2 * 3 * width**2
    attention = 57 * 4 * (tokens + texts) ** 2 * width
    ends = 2 * width * (tokens * 128 + texts * 4096)
    assert work.forward == pytest.approx(19 * double + 38 * single + attention + ends, rel=1e-4)
    with torch.inference_mode():  # as ComfyUI's nodes run
        assert count_work(RunConfig(), full_size) == work


def test_counting_leaves_a_loaded_model_as_it_is():
    components = load(ModelConfig(dtype="float32"), "cpu")
    before = {name: tensor.clone() for name, tensor in components.flow.module.state_dict().items()}
    work = count_work(tiny_config("unused"), components)
    assert work.forward > 0 and work.decode > 0
    after = components.flow.module.state_dict()
    assert all(torch.equal(before[name], after[name]) and after[name].device.type == "cpu" for name in before)


def test_a_step_is_the_sum_of_its_passes(tmp_path):
    config = tiny_config(tmp_path, lora__rank=2, optim__accumulation=3, align__branches=["denoise"])
    footprint = replace(footprint_of(config, load(config.model, "cpu").flow), layers=0)
    work, rate = Work(forward=1000.0, decode=0.0, blocks=7), 1000.0
    pace = expected_pace(config, footprint, work, rate, "cpu")
    one = expected_pace(with_changes(config, {"optim.accumulation": 1}), footprint, work, rate, "cpu")
    forwards = (config.rollout.num_steps + 2) * config.data.batch_size  # the gradient's pass counts twice
    drift = 2
    assert pace.step / one.step == pytest.approx((3 * forwards + drift) / (forwards + drift))
    full = expected_pace(with_changes(config, {"lora.rank": 0, "optim.accumulation": 1}), footprint, work, rate, "cpu")
    assert full.step / one.step == pytest.approx((forwards + config.data.batch_size + drift) / (forwards + drift))


def test_the_rest_of_a_run_is_steps_previews_and_evaluation(tmp_path):
    config = tiny_config(tmp_path, optim__steps=10, output__preview_every=4, output__preview_prompts=2)
    pace = Pace(step=3.0, picture=0.5)
    assert run_seconds(config, pace) == 10 * 3 + 4 * 2 * 0.5  # before training, after 4, 8 and 10
    assert run_seconds(config, pace, done=5) == 5 * 3 + 2 * 2 * 0.5
    assert run_seconds(config, pace, done=10) == 0
    evaluated = with_changes(config, {"output.evaluate_prompts": 8, "output.preview_every": 0})
    assert run_seconds(evaluated, pace) == 10 * 3 + 2 * 8 * 0.5
    assert run_seconds(evaluated, pace, done=9) == 3 + 8 * 0.5


def test_a_run_that_has_steps_goes_by_them(tmp_path):
    assert own_pace(tmp_path, 2) is None
    lines = [{"step": 0, "seconds": {"preview": 9.0, "total": 9.0}}]
    lines += [{"step": n, "seconds": {"total": 2.0}} for n in (1, 2, 3)]
    lines.append({"step": 4, "seconds": {"total": 8.0, "preview": 6.0}})
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert own_pace(tmp_path, 2) == Pace(step=2.0, picture=3.0)


def test_a_device_is_tried_in_no_time():
    assert 1e8 < matmul_rate(torch.device("cpu"), torch.float32) < 1e14


def test_all_weights_fit_one_card_where_they_are_held_in_fewer_bits(shapes):
    """By hand: 2 bytes for a weight, 2 for its gradient, 2 for its moments, and two scales for 256 of them."""
    narrow = with_changes(preset("flux-dev-exact"), {"model.trained_memory": "bfloat16", "optim.states": "8bit"})
    guess = estimate(narrow, shapes).phases["gradient step"] - (6 + 8 / 256) * 11_901_408_320
    assert 4 * 986_109_441 < guess < 9 * GIB  # the reward, the autoencoder and activations
    lines = what_would_fit(preset("flux-dev-exact"), shapes, round(79.1 * GIB))
    assert any(line.startswith("optim.states=8bit model.trained_memory=bfloat16: ") for line in lines)

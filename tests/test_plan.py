"""`srpo train SOURCE --check`: what it finds before anything is loaded, on the headers of full-size files."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from flux_weights import DEV, header_only, original_shapes, original_vae_shapes
from PIL import Image
from tiny import tiny_config, tiny_flow
from tiny_flux import save_tiny_flux
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from srpo_core import checks, plan, run_folder
from srpo_core.assemble import assemble
from srpo_core.card_plan import Cards, plan_cards
from srpo_core.checks import Footprint, footprint_of
from srpo_core.cli import main
from srpo_core.config import ConfigError, RunConfig
from srpo_core.description import load_run
from srpo_core.plan import Plan, plan_run
from srpo_core.rewards.clip_files import new_open_clip
from srpo_core.run_folder import check_space


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    """FLUX.1-dev in ComfyUI's files and HPS v2.1, all of full size with holes for content; settings that name them."""
    from open_clip import get_model_config

    folder = tmp_path_factory.mktemp("models")
    with torch.device("meta"):
        clip = CLIPTextModel(CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072,
                                            num_attention_heads=12, num_hidden_layers=12))  # fmt: skip
        t5 = T5EncoderModel(T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                                     feed_forward_proj="gated-gelu"))  # fmt: skip
    parts = {
        "transformer": header_only(folder / "flux1-dev.safetensors", original_shapes(**DEV)),
        "autoencoder": header_only(folder / "ae.safetensors", original_vae_shapes(), "F32"),
        "clip": header_only(folder / "clip_l.safetensors", shapes_of(clip), "F16"),
        "t5": header_only(folder / "t5xxl_fp16.safetensors", shapes_of(t5), "F16"),
        "tokenizers": save_tiny_flux(folder / "tokens"),
    }
    hps = new_open_clip(get_model_config("ViT-H-14"), quick_gelu=False)
    reward = header_only(folder / "HPS_v2.1.safetensors", shapes_of(hps), "F32")
    (folder / "prompts.txt").write_text("a cat\na dog\na fox asleep in tall grass\n")  # the last is held out
    return [
        *(f"model.{name}={path}" for name, path in parts.items()),
        f"reward.path={reward}", f"data.prompts={folder / 'prompts.txt'}", "parallel.device=cpu",
    ]  # fmt: skip


def test_a_run_is_checked_and_told_without_loading_it(files, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert main(["train", "flux-dev-lora", *files, f"output.dir={run_dir}", "--check"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "trains a LoRA of rank 32 on 418 layers (all): 130.7 million parameters beside 11.90 billion frozen" in told
    assert "model flux, bfloat16 on cpu" in told and "flux1-dev.safetensors" in told
    assert "reward hpsv2: " in told and "steps 40, each of 32 pictures" in told
    assert "prompts 2 to train on, 1,280 pictures of 720 x 720 rolled out" in told
    assert "previews 4 of 32 held-out prompts" in told
    assert "24.1 GiB of it for weights, gradients and optimizer" in told  # 2 * 11,901,408,320 + 16 * 130,744,320 bytes
    assert "checkpoints 1.5 GiB each" in told
    assert not run_dir.exists()


def test_the_disk_is_asked_before_anything_is_loaded(files, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 300 * 10**9))
    assert main(["train", "flux-dev-exact", *files, f"output.dir={tmp_path / 'run'}", "--check"]) == 2
    assert "checkpoints need about 399.0 GiB more (133.0 GiB each, 3 at once)" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"399.0 GiB more"):
        assemble(load_run("flux-dev-exact", [*files, f"output.dir={tmp_path / 'run'}"]))


def test_the_results_disk_is_asked_too(tmp_path, monkeypatch):
    """It may be another one than the run's; on the same, the file comes on top of the checkpoints."""
    usage, GiB = namedtuple("usage", "total used free"), 2**30
    run, models = tmp_path / "run", tmp_path / "models"
    for folder in (run, models):
        folder.mkdir()
    free = {run: 40 * GiB, models: 5 * GiB}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free[Path(path)]))
    config = tiny_config(run, optim__steps=1, output__result=str(models / "later" / "model.safetensors"))
    check_space(config, 35 * GiB, 5 * GiB)
    with pytest.raises(ConfigError, match=r"36.0 GiB each, 1 at once\), 40.0 GiB are free") as error:
        check_space(config, 36 * GiB, 6 * GiB)
    assert "checkpoints and its result need about 42.0 GiB more" in str(error.value)
    monkeypatch.setattr(run_folder, "disk_of", lambda path: path == run)
    check_space(config, 36 * GiB, 5 * GiB)
    with pytest.raises(ConfigError, match=r"output.result=.*6.0 GiB, 5.0 GiB are free there"):
        check_space(config, 36 * GiB, 6 * GiB)


def test_a_device_that_cannot_hold_the_weights_is_refused_before_they_are_read(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checks, "device_memory", lambda device: 80 * 10**9)
    assert main(["train", "flux-dev-exact", *files, f"output.dir={tmp_path / 'run'}", "--check"]) == 2
    told = capsys.readouterr().err
    assert "(model.trained_memory=bfloat16 optim.states=8bit: 66.9 GiB)" in told
    assert "weights, gradients and optimizer alone take 177.3 GiB, cpu has 74.5 GiB; hold them in fewer bits" in told


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("model.dtype=float32", "hold them in fewer bits (optim.states=8bit: 111.2 GiB), or train a LoRA"),
        ("parallel.strategy=shard", "GiB; train a LoRA (lora.rank=16)"),
        ("parallel.processes=2", "66.9 GiB), or share them out (parallel.strategy=shard: 88.7 GiB), or train a LoRA"),
        (
            "parallel.processes=2 model.dtype=float32 optim.states=8bit optim.ema_decay=0.9",
            "GiB; share them out (parallel.strategy=shard optim.states=float32: 110.8 GiB), or train a LoRA",
        ),
        (
            "parallel.processes=2 model.dtype=float32 lora.rank=1024 optim.ema_decay=0.9",
            "GiB; share them out (parallel.strategy=shard: 100.1 GiB)\n",
        ),
        ("model.dtype=float32 lora.rank=1024 optim.ema_decay=0.9", "GiB; a larger device is needed"),
    ],
)
def test_what_is_advised_goes_with_the_other_settings(files, tmp_path, monkeypatch, capsys, setting, told):
    monkeypatch.setattr(checks, "device_memory", lambda device: 120 * 2**30)
    assert main(["train", "flux-dev-exact", *files, f"output.dir={tmp_path / 'run'}", *setting.split(), "--check"]) == 2
    assert told in capsys.readouterr().err


def test_memory_is_counted_by_hand():
    full, lora = Footprint(1000, 0, 0), Footprint(10, 1000, 3)
    assert full.least_bytes(RunConfig()) == 16_000 and full.checkpoint_bytes(RunConfig()) == 12_000
    averaged = RunConfig(optim={"ema_decay": 0.9}, model={"dtype": "float32"})
    assert lora.least_bytes(RunConfig()) == 160 + 2000 and lora.least_bytes(averaged) == 200 + 4000
    assert lora.checkpoint_bytes(averaged) == 160
    assert lora.result_bytes(RunConfig(lora={"rank": 2})) == 40
    assert (full.result_bytes(RunConfig()), full.result_bytes(averaged)) == (2000, 4000)


@pytest.mark.parametrize("settings", [{}, {"lora__rank": 2}, {"lora__rank": 3, "lora__targets": "attention"}])
def test_what_is_counted_is_what_is_trained(tmp_path, settings):
    config = tiny_config(tmp_path, **settings)
    footprint = footprint_of(config, tiny_flow())
    trainer = assemble(config)
    assert footprint.trained == sum(parameter.numel() for parameter in trainer.learner.trained.values())
    assert 2 * footprint.layers == (len(trainer.learner.trained) if settings else 0)
    trained = {name: p for name, p in trainer.flow.module.named_parameters() if p.requires_grad}
    rest = sum(p.numel() for name, p in trainer.flow.module.named_parameters() if name not in trained)
    assert footprint.frozen == rest


def photo_folder(folder: Path) -> Path:
    folder.mkdir()
    for i in range(3):
        Image.effect_noise((40, 60), 80).convert("RGB").save(folder / f"{i}.jpg")
        (folder / f"{i}.txt").write_text(f"noise {i}")
    return folder


def test_photos_are_read_to_their_end(tmp_path):
    folder = photo_folder(tmp_path / "photos")
    config = tiny_config(tmp_path / "run", data__photos=str(folder), data__bucket_step=4)
    told = dict(plan_run(config).rows)
    assert told["photos"].startswith("3 photos in 1 size")
    whole = (folder / "1.jpg").read_bytes()
    (folder / "1.jpg").write_bytes(whole[: len(whole) // 2])
    for start in (plan_run, assemble):
        with pytest.raises(ConfigError, match=r"1 can't be used:\n  the photo .*1.jpg can't be read: .*truncated"):
            start(config)


def test_prompts_that_are_not_rolled_out_are_not_asked_for(tmp_path):
    settings = {"data__photos": str(photo_folder(tmp_path / "photos")), "data__prompts": "nowhere.txt"}
    assert "prompts" not in dict(plan_run(tiny_config(tmp_path / "run", **settings)).rows)
    with pytest.raises(ConfigError, match=r"data.prompts='nowhere.txt': no such file"):
        plan_run(tiny_config(tmp_path / "run", **settings, data__photo_share=0.5))


def test_everything_that_is_wrong_is_told_at_once(tmp_path):
    wrong = {"data__prompts": "nowhere.txt", "data__photos": "gone", "data__photo_share": 0.5, "reward__name": "clap"}
    config = tiny_config(tmp_path, **wrong)
    with pytest.raises(ConfigError) as caught:
        plan_run(config)
    first, *others = str(caught.value).splitlines()
    assert first == "3 things to put right:" and len(others) == 3
    assert "nowhere.txt" in others[0] and "'gone'" in others[1] and "clap" in others[2]


def test_a_folder_with_a_run_is_told(tmp_path):
    assemble(tiny_config(tmp_path, optim__steps=1)).train()
    with pytest.raises(ConfigError, match="already holds a run"):
        plan_run(tiny_config(tmp_path, optim__steps=2))
    assert dict(plan_run(tiny_config(tmp_path, optim__steps=2), resume=True).rows)["steps"] == "2, each of 2 pictures"


def test_a_card_that_is_too_small_is_told_with_what_would_fit(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "_card", lambda config, device: (24 * 10**9, 23 * 10**9))
    words = [*files, f"output.dir={tmp_path / 'run'}"]
    wide = plan_run(load_run("flux-dev-lora", words))
    assert not wide.fits and wide.advice[0].startswith("model.frozen_memory=8bit")
    reason, *ways_out = wide.refusal.splitlines()
    assert "of the card's memory, and 21.4 GiB are free" in reason
    assert [line.strip() for line in ways_out] == list(wide.advice)
    narrow = plan_run(load_run("flux-dev-lora-24gb", words))
    assert narrow.fits and narrow.refusal is None and narrow.advice == ()
    assert main(["train", "flux-dev-lora", *words, "--check"]) == 0  # a warning: the estimate may be wrong
    told = capsys.readouterr().out
    assert "warning: that is more than there is: 21.4 GiB of the card's 22.4 GiB are free" in told
    assert wide.advice[0] in told


def test_a_run_is_refused_only_where_it_is_hopeless():
    def of(free: int | None) -> Plan:
        return Plan((), peak_bytes=1100, seconds=None, total_bytes=free, free_bytes=free, advice=("less",))

    assert of(1100).fits and of(1100).refusal is None
    assert not of(1001).fits and of(1001).refusal is None
    assert of(999).refusal.endswith("\n  less")
    assert of(None).fits and of(None).refusal is None


def test_time_is_told_and_a_resumed_run_goes_by_its_own_steps(tmp_path):
    config = tiny_config(tmp_path, optim__steps=2)
    fresh = plan_run(config)
    assert 0 < fresh.seconds < 60 and "2 steps of" in dict(fresh.rows)["time"]
    assemble(config).train()
    metrics = tmp_path / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in lines:
        line["seconds"] = {"total": 100.0} if line["step"] == 1 else {"total": 110.0, "preview": 10.0}
    metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    more = plan_run(tiny_config(tmp_path, optim__steps=5), resume=True)
    assert more.seconds == 3 * 100 + 2 * 10  # previews after steps 4 and 5
    assert dict(more.rows)["time"].startswith("about 5 min: 3 steps of 2 min (2 are done)")


def test_processes_are_counted(tmp_path):
    config = tiny_config(tmp_path, parallel={"device": "cpu", "processes": 2, "nodes": 2}, optim__accumulation=3)
    told = dict(plan_run(config).rows)
    assert told["steps"] == "4, each of 24 pictures on 4 processes"  # 3 micro-batches of 2 on each
    assert "96 pictures of 16 x 16 rolled out" in told["prompts"]


# ---- cards that need not be there


def planned(capsys, *words: str) -> tuple[int, str]:
    code = main(["plan", *words])
    return code, capsys.readouterr().out


def test_a_preset_is_planned_without_its_files(capsys):
    """The published shapes stand in for files that are not named yet."""
    code, told = planned(capsys, "flux-dev-lora-24gb", "--card-gb", "24", "--tflops", "165")
    assert code == 0 and "gradient step: 18.8 GiB" in told and "it fits" in told
    assert "rollout:" in told.partition("time")[2] and "a step" in told
    code, told = planned(capsys, "flux-dev-exact", "--card-gb", "80")
    assert code == 2 and "it does not fit" in told and "--tflops says" in told
    assert "optim.states=8bit model.trained_memory=bfloat16: " in told


@pytest.mark.parametrize(
    ("preset", "card", "fits"),
    [("flux-dev", 80, True), ("flux-dev", 48, False), ("flux-dev-lora-24gb", 24, True), ("flux-dev-lora", 48, True),
     ("flux-dev-lora", 24, False), ("flux-dev-lora-16gb", 16, True), ("flux-dev-lora-16gb", 12, False)],
)  # fmt: skip
def test_presets_fit_the_cards_that_they_are_for(preset, card, fits):
    plan = plan_cards(load_run(preset, ["parallel.device=cpu"]), Cards(gib=card))
    assert plan.fits == fits and bool(plan.advice) != fits


def test_larger_pictures_fit_a_card_of_24_gb_too():
    config = load_run("flux-dev-lora-24gb", ["parallel.device=cpu", "data.height=1024", "data.width=1024"])
    assert plan_cards(config, Cards(gib=24)).needed.peak < 22 * 2**30


def test_the_quickest_step_of_all_weights_fits_a_card_of_80_gb():
    """As the README types it: all rollouts of a step come before its first gradient, so its copy in fp8 has room."""
    settings = ["rollout.precision=fp8", "rollout.calls=12", "reward.dtype=bfloat16", "parallel.device=cpu"]
    plan = plan_cards(load_run("flux-dev", settings), Cards(gib=80))
    assert plan.fits and not plan.advice
    one = plan_cards(load_run("flux-dev", [*settings, "optim.accumulation=1"]), Cards(gib=80))
    assert plan.needed.phases["rollout"] - one.needed.phases["rollout"] < 2**29


def test_rollouts_in_fp8_cost_a_base_in_fp8_nothing_but_its_lora():
    def peak(*settings):
        config = load_run("flux-dev-lora-24gb", ["parallel.device=cpu", "model.frozen_memory=fp8", *settings])
        return plan_cards(config, Cards(gib=24)).needed

    plain, ours = peak(), peak("rollout.precision=fp8")
    assert ours.peak == plain.peak < 19 * 2**30
    assert 0 < ours.phases["rollout"] - plain.phases["rollout"] < 2**28
    assert peak("rollout.precision=fp8", "model.frozen_memory=8bit").phases["rollout"] > 23 * 2**30


def test_several_cards_take_what_one_takes_and_their_connections():
    config = load_run("flux-dev", ["parallel.device=cpu"])
    one, two = (plan_cards(config, Cards(gib=80, count=count)).needed for count in (1, 2))
    assert two.peak == one.peak and two.on_card > one.on_card


@pytest.mark.parametrize(
    ("strategy", "count", "said"), [("shard", 8, True), ("shard", 1, False), ("replicate", 8, False)]
)
def test_traffic_that_no_forecast_counts_is_said(strategy, count, said):
    config = load_run("flux-dev-exact", ["parallel.device=cpu", f"parallel.strategy={strategy}"])
    rows = [text for _, text in plan_cards(config, Cards(gib=80, count=count, tflops=800)).rows()]
    assert any("traffic between GPUs" in text for text in rows) == said


def test_a_run_with_files_is_planned_by_their_headers(files, capsys, tmp_path):
    by_files, published = (
        planned(capsys, "flux-dev-lora", *words, "parallel.device=cpu", "--card-gb", "48") for words in (files, [])
    )
    assert by_files == published and by_files[0] == 0


def test_settings_that_do_not_go_together_are_refused_before_they_are_planned(capsys):
    words = ("--gpus", "2", "--card-gb", "80", "parallel.device=cpu")
    assert main(["plan", "flux-dev", "parallel.strategy=shard", *words]) == 2
    assert "model.trained_memory='bfloat16' with parallel.strategy='shard'" in capsys.readouterr().err
    assert main(["plan", "flux-dev-exact", "parallel.context=5", *words]) == 2
    assert "parallel.context=5: the model's 24 attention heads" in capsys.readouterr().err


def test_a_card_that_is_none_is_refused(capsys):
    assert main(["plan", "flux-dev", "--card-gb", "0"]) == 2
    assert "--card-gb 0" in capsys.readouterr().err

"""The presets of FLUX.1-dev: their numbers are the published ones, and their runs fit together at full size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from full_size import DOUBLE, PARAMETERS, POOLED, SINGLE, TEXT, WIDTH, autoencoder, pretend, transformer
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from srpo_core import compact_adamw
from srpo_core.align import training_levels
from srpo_core.assemble import _cast, _prepare, assemble
from srpo_core.checks import Inputs, check_fit
from srpo_core.config import ConfigError, RunConfig
from srpo_core.description import load_run, preset_names
from srpo_core.finite import FiniteChecks
from srpo_core.interfaces import PromptBatch
from srpo_core.learner import Learner, Parts
from srpo_core.models.flux import FluxFlow, ImageAutoencoder
from srpo_core.parallel import World
from srpo_core.photos import find_photos
from srpo_core.preference import ControlWords
from srpo_core.prompts import PromptSequence
from srpo_core.rewards.clip import ClipReward, OpenClip, TransformersClip
from srpo_core.rewards.clip_files import new_open_clip
from srpo_core.rewards.mixture import WeightedReward
from srpo_core.tally import Tally
from srpo_core.training_data import TrainingData, photo_batches, photo_sizes

FULL = ("flux-dev", "flux-dev-exact", "flux-dev-pickscore")
LORA = ("flux-dev-lora", "flux-dev-lora-24gb", "flux-dev-lora-16gb", "flux-dev-photos")
NARROW = ("flux-dev", "flux-dev-pickscore")
"""Those that hold trained weights and moments in fewer bits."""
SMALL = {"flux-dev-lora-24gb": "8bit", "flux-dev-lora-16gb": "4bit"}
"""Those for smaller cards: how the frozen matrices are held."""


def test_the_presets_are_all_here():
    assert {*FULL, *LORA, "miniature"} == set(preset_names())


# ---- the published numbers


@pytest.mark.parametrize("preset", [*FULL, *LORA])
def test_levels_are_those_of_the_recipe(preset):
    config = load_run(preset)
    align = config.align
    last = 30 if preset == "flux-dev-pickscore" else 25

    def shifted(entry: int) -> float:
        t = 1 - entry / 50
        return 3 * t / (1 + 2 * t)

    levels = training_levels(
        align.range_start, align.range_end, align.schedule_steps, config.rollout.shift, align.levels
    )
    assert len(levels) == 1000
    assert float(levels[0]) == pytest.approx(0.9643, abs=5e-5) and float(levels[0]) == pytest.approx(shifted(5))
    assert float(levels[-1]) == pytest.approx(shifted(last))
    assert last == 30 or float(levels[-1]) == pytest.approx(0.75)


@pytest.mark.parametrize("preset", [*FULL, *LORA])
def test_words_ramps_and_optimizer_are_those_of_the_recipe(preset):
    config = load_run(preset)
    align, optim = config.align, config.optim
    pickscore = preset == "flux-dev-pickscore"
    assert align.branches == ["denoise", "inversion"] and align.guidance == 3.5 and align.step_fraction == 0.1
    assert (align.k_denoise, align.k_inversion) == (
        ((0.1, 0.5), (0.6, 0.01)) if pickscore else ((0.1, 0.25), (0.3, 0.01))
    )
    assert (config.rollout.guidance, config.rollout.num_steps) == (2.0 if pickscore else 1.0, 25)
    assert (config.reward.name, config.reward.scale) == (("pickscore", 1 / 20) if pickscore else ("hpsv2", 1.0))
    assert (config.reward.margin, config.reward.fit, config.reward.offset) == (0.7, "crop", 0.0)
    assert config.reward.liked == ["Natural-lighting", "Detail", "Detailed", "Real"]
    assert config.reward.disliked == ["Concept art", "Painting", "Anime", "Flat", "Oil"]
    assert (optim.betas, optim.weight_decay, optim.max_grad_norm) == ((0.9, 0.999), 1e-4, 0.1)
    assert optim.accumulation * config.data.batch_size == 32
    assert optim.lr == (5e-6 if preset in FULL else 5e-5) and optim.schedule == "constant"
    assert (config.model.family, config.model.dtype) == ("flux", "bfloat16")
    t5_memory = "8bit" if preset in SMALL else "full"
    assert (config.model.t5_memory, config.model.frozen_memory) == (t5_memory, SMALL.get(preset, "full"))
    held = config.model.recompute, config.model.trained_memory, config.optim.states
    assert held == (("auto", "bfloat16", "8bit") if preset in NARROW else (True, "float32", "float32"))
    assert config.reward.dtype == ("bfloat16" if preset.endswith("16gb") else "float32")
    assert (config.data.bucket_step, config.data.photo_share) == (48 if preset.endswith("photos") else 0, 1.0)
    assert (config.data.height, config.data.width) == (720, 720)


@pytest.mark.parametrize("preset", [*FULL, *LORA])
def test_a_preset_without_the_users_paths_says_what_is_missing(preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        assemble(load_run(preset, ["parallel.device=cpu", f"output.dir={tmp_path / 'run'}"]))
    message = str(caught.value)
    assert "model.path" in message and "model.transformer" in message and "srpo download" in message
    assert "reward.path" in message
    assert ("data.photos='photos': no such folder" if preset == "flux-dev-photos" else "data.prompts") in message


# ---- the whole run at full size


def built(
    preset: str, folder: Path, double: int = DOUBLE, single: int = SINGLE
) -> tuple[RunConfig, FluxFlow, dict | None]:
    """The preset's run with FLUX.1-dev's transformer, prepared for training."""
    config = load_run(preset, ["rollout.num_steps=1", "optim.accumulation=1"])
    module = transformer(folder, config.model, double, single)
    module.enable_gradient_checkpointing()
    flow = FluxFlow(module, dtype=getattr(torch, config.model.dtype))
    footprint = check_fit(config, flow, Inputs([], None), torch.device("cpu"))
    lora = _prepare(config, flow, None)
    assert footprint.trained == sum(p.numel() for p in module.parameters() if p.requires_grad)
    each = 2 + 2 + 2 * 4 / 256 if preset in NARROW else 3 * 4
    assert footprint.checkpoint_bytes(config) == round(each * footprint.trained)
    assert footprint.frozen == sum(p.numel() for p in module.parameters() if not p.requires_grad)
    return config, flow, lora


@pytest.mark.parametrize("preset", FULL)
def test_all_weights_are_trained(preset, tmp_path):
    _, flow, lora = built(preset, tmp_path)
    trained = [parameter for parameter in flow.module.parameters() if parameter.requires_grad]
    assert lora is None and len(trained) == len(list(flow.module.parameters()))
    assert sum(parameter.numel() for parameter in trained) == PARAMETERS
    assert {parameter.dtype for parameter in trained} == {torch.bfloat16 if preset in NARROW else torch.float32}


def test_all_but_how_it_is_held_and_run_is_the_exact_recipe():
    fitted, exact = (load_run(name).model_dump() for name in ("flux-dev", "flux-dev-exact"))
    differ = {f"{section}.{name}" for section in fitted if isinstance(fitted[section], dict)
              for name, value in fitted[section].items() if value != exact[section][name]}  # fmt: skip
    assert differ == {"model.trained_memory", "model.recompute", "model.compile", "optim.states", "output.dir"}


def lora_size(rank: int, mlp: bool) -> int:
    """By hand: rank * (in + out) of every linear layer of a block, times the blocks."""
    square, wide = 2 * WIDTH, 5 * WIDTH
    double = 8 * square + (4 * wide if mlp else 0)  # q, k, v, out of both streams; two layers of both feed-forwards
    single = 3 * square + (wide + 6 * WIDTH if mlp else 0)  # q, k, v; in to the MLP, out of MLP and attention
    return rank * (DOUBLE * double + SINGLE * single)


def matrices_of_blocks() -> int:
    """By hand: the sizes of all matrices of the blocks, their modulations' too."""
    square = WIDTH * WIDTH
    double = 2 * (4 * square + 2 * 4 * square + 6 * square)  # q, k, v, out; feed-forward; modulation; for both streams
    single = 3 * square + 4 * square + 5 * square + 3 * square  # q, k, v; in to the MLP; out of both; modulation
    return DOUBLE * double + SINGLE * single


@pytest.mark.parametrize("preset", LORA)
def test_a_lora_is_trained_beside_frozen_weights(preset, tmp_path):
    config, flow, lora = built(preset, tmp_path)
    attention_only = preset in SMALL
    named = dict(flow.module.named_parameters())
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    layers = DOUBLE * (8 if attention_only else 12) + SINGLE * (3 if attention_only else 5)
    assert len(trained) == 2 * layers and all(".lora_" in name for name in trained)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    frozen = [parameter for parameter in named.values() if not parameter.requires_grad]
    codes, each = {"8bit": (torch.int8, 1), "4bit": (torch.uint8, 2)}.get(SMALL.get(preset), (None, 1))
    compressed = each * sum(parameter.numel() for parameter in frozen if parameter.dtype == codes)
    plain = sum(parameter.numel() for parameter in frozen if parameter.dtype == torch.bfloat16)
    assert compressed + plain == PARAMETERS
    assert compressed == (matrices_of_blocks() if preset in SMALL else 0)
    size = sum(parameter.numel() for parameter in trained.values())
    assert size == lora_size(config.lora.rank, not attention_only)
    assert size == (26_148_864 if preset in SMALL else 130_744_320)
    assert lora == {"rank": config.lora.rank, "alpha": config.lora.rank, "targets": lora["targets"]}


def reward_of(config: RunConfig) -> WeightedReward:
    """The preset's reward at full size: HPS's ViT-H-14 of open_clip, or PickScore's of transformers."""
    if config.reward.name == "hpsv2":
        from open_clip import get_model_config

        with torch.device("meta"):
            module = new_open_clip(get_model_config("ViT-H-14"), quick_gelu=False)
        assert sum(parameter.numel() for parameter in module.parameters()) == 986_109_441
        clip = OpenClip(pretend(module))
    else:
        text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
        with torch.device("meta"):
            module = CLIPModel(
                CLIPConfig(
                    text_config=text | {"projection_dim": 1024, "hidden_act": "gelu"},
                    vision_config=vision | {"projection_dim": 1024, "hidden_act": "gelu", "patch_size": 14},
                    projection_dim=1024,
                )
            )
        assert sum(parameter.numel() for parameter in module.parameters()) == 986_109_441

        def tokenize(texts):
            return {"input_ids": torch.full((len(texts), 77), 49407)}

        clip = TransformersClip(pretend(module), tokenize, less_memory=True)
    reward = config.reward
    return WeightedReward(
        reward.name, ClipReward(clip, reward.fit), reward.weight, reward.margin, reward.scale, reward.offset
    )


def data_of(config: RunConfig, folder: Path) -> TrainingData:
    """Two prompts with embeddings of FLUX's shapes, or three photos of several shapes."""

    def encoded(texts):
        embeds = {
            "prompt_embeds": torch.zeros(len(texts), 512, TEXT),
            "pooled_prompt_embeds": torch.zeros(len(texts), POOLED),
        }
        return PromptBatch(tuple(texts), embeds)

    size = config.data.height, config.data.width
    if config.data.photos is None:
        return TrainingData(0, size, 1, PromptSequence(encoded(["a cat", "a dog"]), [0, 1]))
    for name, shape in (("wide", (1200, 800)), ("tall", (900, 1600)), ("square", (800, 800))):
        Image.new("RGB", shape, "olive").save(folder / f"{name}.jpg")
        (folder / f"{name}.txt").write_text(name)
    photos = find_photos(str(folder))
    sizes = photo_sizes(config.data, photos)
    assert sorted(sizes) == [(576, 864), (720, 720), (960, 528)]  # by name: square, tall, wide
    batches = photo_batches(photos, sizes, 1, 0, 3, lambda texts, order: PromptSequence(encoded(texts), order))
    return TrainingData(0, size, 1, photos=batches)


@pytest.mark.filterwarnings("ignore:.*AutoencoderKL.*")
@pytest.mark.parametrize(
    ("preset", "double", "single"),
    [("flux-dev-exact", DOUBLE, SINGLE), *((name, 1, 1) for name in (*NARROW, *LORA))],
)
def test_a_step_goes_through_at_full_width(preset, double, single, tmp_path, monkeypatch):
    """Rollout or photos, both branches, decoding, reward, backward pass and optimizer; one of them at full depth."""
    models, photos = tmp_path / "models", tmp_path / "photos"
    models.mkdir(), photos.mkdir()
    config, flow, lora = built(preset, models, double, single)
    vae = autoencoder()
    _cast(vae, torch.bfloat16)
    pretend(flow.module)
    words = ControlWords(config.reward.liked, config.reward.disliked)
    data = data_of(config, photos)
    parts = Parts(flow, ImageAutoencoder(pretend(vae)), [reward_of(config)], words, data, PromptBatch(()), lora=lora)
    monkeypatch.setattr(compact_adamw, "PIECE", 2**40)  # of shapes, a whole parameter takes no memory
    monkeypatch.setattr(compact_adamw, "random_bits", lambda _, __, like: torch.empty_like(like, dtype=torch.int32))
    monkeypatch.setattr(FiniteChecks, "require", lambda _: None)  # a shape has no value
    learner = Learner(config, World(0, 1, torch.device("cpu")), parts)
    expected = data.at(0, 0, 1)
    clean, tally = learner._rollout(1, 0), Tally(parts.rewards)
    assert clean.clean.shape == (1, 16, expected.height // 8, expected.width // 8)
    assert clean.clean.dtype == clean.noise.dtype == torch.float32
    for branch, align_step in learner._align_steps(1, 0, 0):
        (loss,) = learner._losses(clean, [(branch, align_step)], words.pair(1), tally)
        assert loss.shape == () and loss.dtype == torch.float32
        loss.backward()
    for name, parameter in flow.module.named_parameters():
        gradient = parameter.grad
        assert (gradient is not None) == (name in learner.trained), name
        assert gradient is None or (gradient.shape == parameter.shape and gradient.dtype == parameter.dtype)
    grad_norm, lr = learner._update(1, FiniteChecks())
    assert grad_norm.shape == () and lr == config.optim.lr
    state = learner.optimizer.state
    assert len(state) == len(learner.trained)
    for parameter in learner.trained.values():
        first = state[parameter].get("exp_avg_codes", state[parameter].get("exp_avg"))
        second = state[parameter].get("exp_avg_sq_codes", state[parameter].get("exp_avg_sq"))
        assert first.numel() == second.numel() == parameter.numel()


def test_every_size_of_the_photos_preset_suits_the_model(tmp_path):
    from srpo_core.buckets import bucket_sizes

    config = load_run("flux-dev-photos")
    flow = FluxFlow(transformer(tmp_path, config.model, 1, 1))
    sizes = bucket_sizes(config.data.height, config.data.width, config.data.bucket_step)
    assert (720, 720) in sizes and len(sizes) > 8
    assert {flow.latent_shape(*size) for size in sizes} == {(16, h // 8, w // 8) for h, w in sizes}

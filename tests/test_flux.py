"""The FLUX family against diffusers' own pipeline, autoencoders and text encoding."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, FluxPipeline
from tiny_flux import (
    random_latents,
    random_prompts,
    randomise,
    save_tiny_flux,
    tiny_pipeline,
    tiny_taesd,
    tiny_transformer,
    tiny_vae,
)

from srpo_core.config import ConfigError, ModelConfig
from srpo_core.flow import shifted_sigmas
from srpo_core.models import load_model
from srpo_core.models.flux import FluxFlow, ImageAutoencoder, pack, position_ids, unpack
from srpo_core.rollout import rollout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_flux(tmp_path_factory.mktemp("flux") / "model")


def load(folder, **settings):
    return load_model(ModelConfig(family="flux", path=str(folder), **{"dtype": "float32"} | settings), "cpu")


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


# ---- packing


def test_packing_and_ids_are_diffusers_own():
    latents = random_latents(2, 8, 12)
    tokens = FluxPipeline._pack_latents(latents, 2, latents.shape[1], 8, 12)
    assert torch.equal(pack(latents), tokens)
    assert torch.equal(unpack(tokens, 8, 12), latents)
    ids = FluxPipeline._prepare_latent_image_ids(2, 4, 6, torch.device("cpu"), torch.float32)
    assert torch.equal(position_ids(8, 12, torch.device("cpu")), ids)


def test_latent_shape_and_the_nearest_size():
    flow = FluxFlow(tiny_transformer())
    assert flow.latent_shape(720, 1280) == (4, 90, 160)
    with pytest.raises(
        ConfigError, match=r"data\.height=700, data\.width=720: .* multiples of 16; the nearest are 704 and 720"
    ):
        flow.latent_shape(700, 720)
    with pytest.raises(ConfigError, match=r"data\.width=0: .* the nearest are 720 and 16"):
        flow.latent_shape(720, 0)


# ---- the flow


@pytest.mark.parametrize("guidance_embeds", [True, False])
def test_rollout_and_decode_equal_the_pipeline(guidance_embeds):
    transformer, vae = tiny_transformer(guidance_embeds=guidance_embeds), tiny_vae()
    prompts, noise, num_steps = random_prompts(2), random_latents(2, 8, 12), 6
    pipeline = tiny_pipeline(transformer=transformer, vae=vae)
    settings = {
        **prompts.embeds,
        "height": 16,
        "width": 24,
        "num_inference_steps": num_steps,
        "sigmas": np.linspace(1, 1 / num_steps, num_steps),
        "guidance_scale": 2.5,
        "latents": pack(noise),
    }
    theirs = unpack(pipeline(**settings, output_type="latent").images, 8, 12)
    result = rollout(FluxFlow(transformer, downscale=2), prompts, noise, shifted_sigmas(num_steps, 3.0), guidance=2.5)
    assert relative_error(result.clean, theirs) < 1e-5
    assert (
        relative_error(ImageAutoencoder(vae).decode(result.clean), pipeline(**settings, output_type="pt").images) < 1e-5
    )


def test_prompts_of_a_batch_keep_apart():
    flow, prompts, latents = FluxFlow(tiny_transformer()), random_prompts(3), random_latents(3)
    sigma = torch.tensor([0.9, 0.6, 0.3])
    together = flow.velocity(latents, sigma, prompts, 3.5)
    assert together.dtype == torch.float32
    for i in range(3):
        one = slice(i, i + 1)
        alone = flow.velocity(latents[one], sigma[one], prompts.select([i]), 3.5)
        torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guidance_embeds", [True, False])
def test_levels_reach_the_model_unrounded_in_bfloat16(guidance_embeds):
    transformer = tiny_transformer(guidance_embeds=guidance_embeds)
    flow, seen = FluxFlow(transformer, dtype=torch.bfloat16), []
    transformer.time_text_embed.time_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    sigma = torch.tensor([0.9643, 0.9427])
    velocity = flow.velocity(random_latents(2), sigma, random_prompts(2), 3.5)
    assert torch.equal(seen[0], sigma * 1000)
    assert all(torch.equal(value, torch.full((2,), 3500.0)) for value in seen[1:])
    assert len(seen) == 1 + guidance_embeds
    assert velocity.dtype == torch.float32
    assert not transformer.time_text_embed._forward_pre_hooks


def test_bfloat16_is_near_float32_and_the_weights_keep_their_gradient_in_float32():
    transformer, prompts, latents, sigma = (
        tiny_transformer(),
        random_prompts(2),
        random_latents(2),
        torch.full((2,), 0.9),
    )
    exact = FluxFlow(transformer).velocity(latents, sigma, prompts, 3.5)
    rounded = FluxFlow(transformer, dtype=torch.bfloat16).velocity(latents, sigma, prompts, 3.5)
    assert relative_error(rounded, exact) < 0.05
    rounded.square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in transformer.parameters())


def test_lora_targets_name_every_linear_layer_of_the_blocks():
    transformer = tiny_transformer()
    targets = FluxFlow.lora_targets
    for group in ("attention", "mlp"):
        assert set(targets[group]) < set(targets["all"])
    names = [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and "transformer_blocks." in name and ".norm" not in name
    ]
    assert names
    for name in names:
        assert any(name.endswith(f".{target}") for target in targets["all"]), name
    for target in targets["all"]:
        assert any(name.endswith(f".{target}") for name in names), target


# ---- autoencoders


@pytest.mark.parametrize("build", [tiny_vae, tiny_taesd])
def test_latents_are_scaled_as_in_the_pipelines(build):
    module, images = build(), torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    autoencoder, config = ImageAutoencoder(module), module.config
    with torch.no_grad():  # with gradient, diffusers' recomputed AutoencoderTiny encoder leaves out its scaling
        raw = module.encode(images * 2 - 1)
    raw = raw.latents if isinstance(module, AutoencoderTiny) else raw.latent_dist.mode()
    latents = autoencoder.encode(images)
    torch.testing.assert_close(latents, (raw - config.shift_factor) * config.scaling_factor)
    decoded = module.decode(latents / config.scaling_factor + config.shift_factor).sample
    torch.testing.assert_close(autoencoder.decode(latents), (decoded / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("build", [tiny_vae, tiny_taesd])
def test_recomputed_decode_gives_the_same_image_and_gradient_and_keeps_less(build):
    def decode(recompute):
        autoencoder, latents, kept = ImageAutoencoder(build(), recompute), random_latents().requires_grad_(), []

        def remember(tensor):
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            images = autoencoder.decode(latents)
        total = sum(kept)
        (images * torch.linspace(0, 1, images.shape[-1])).sum().backward()
        assert not any(parameter.requires_grad for parameter in autoencoder.module.parameters())
        return images, latents.grad, total

    images, gradient, kept = decode(recompute=True)
    plain_images, plain_gradient, plain_kept = decode(recompute=False)
    assert torch.equal(images, plain_images)
    torch.testing.assert_close(gradient, plain_gradient)
    assert gradient.abs().sum() > 0
    assert kept < plain_kept / 2


@pytest.mark.parametrize("build", [tiny_vae, tiny_taesd])
def test_blocks_are_recomputed_one_at_a_time(build):
    """The backward pass asks for the last piece first, so whole-decoder recomputation would show as forward order."""
    autoencoder, order = ImageAutoencoder(build()), []
    images = autoencoder.decode(random_latents().requires_grad_())
    decoder = autoencoder.module.decoder
    blocks = decoder.layers if hasattr(decoder, "layers") else [decoder.mid_block]
    for up in getattr(decoder, "up_blocks", ()):
        blocks += [*up.resnets, *(up.upsamplers or ())]
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, i=i: order.append(i))
    images.sum().backward()
    assert order == sorted(set(order), reverse=True)
    assert len(order) >= len(blocks) - 1  # an upsampling alone keeps nothing to recompute


@pytest.mark.parametrize("build", [tiny_vae, tiny_taesd])
def test_images_stay_in_range_and_decode_without_gradient(build):
    autoencoder = ImageAutoencoder(randomise(build(), 3, 5.0))
    with torch.no_grad():
        images = autoencoder.decode(random_latents() * 10)
    assert images.dtype == torch.float32
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1


# ---- a whole folder


def test_embeddings_equal_the_pipelines(folder):
    from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

    pipeline = tiny_pipeline(
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(folder / "text_encoder_2"),
        tokenizer_2=AutoTokenizer.from_pretrained(folder / "tokenizer_2"),
    )
    texts = ["a red cat, asleep", "dog", "", "long " * 200]
    with torch.no_grad():
        embeds, pooled, _ = pipeline.encode_prompt(texts, texts)
    ours = load(folder).text_encoder(texts)
    assert ours.prompts == tuple(texts)
    assert ours.embeds["prompt_embeds"].shape == (4, 512, 24)
    assert torch.equal(ours.embeds["prompt_embeds"], embeds)
    assert torch.equal(ours.embeds["pooled_prompt_embeds"], pooled)
    assert relative_error(pooled[0], pooled[1]) > 0.1


def test_a_folder_becomes_working_parts(folder):
    parts = load(folder)
    assert parts.flow.latent_shape(16, 24) == (4, 8, 12)
    assert parts.flow.module.gradient_checkpointing
    assert not load(folder, recompute=False).flow.module.gradient_checkpointing
    prompts = parts.text_encoder(["a cat"])
    result = rollout(parts.flow, prompts, random_latents(1, 8, 12), shifted_sigmas(2, 3.0), 1.0)
    assert parts.autoencoder.decode(result.clean).shape == (1, 3, 16, 24)


def test_weights_are_in_the_runs_precision_and_trained_ones_in_float32(folder):
    for full_precision, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        parts = load(folder, dtype="bfloat16")
        parts.full_precision = full_precision
        assert {p.dtype for p in parts.flow.module.parameters()} == {dtype}
        assert {p.dtype for p in parts.autoencoder.module.parameters()} == {torch.bfloat16}
        prompts = parts.text_encoder(["a cat"])
        velocity = parts.flow.velocity(random_latents(1), torch.tensor([0.9]), prompts, 3.5)
        assert velocity.dtype == torch.float32
        assert velocity.isfinite().all()
        assert parts.autoencoder.decode(random_latents(1)).dtype == torch.float32


def test_transformer_and_autoencoder_can_be_replaced(folder, tmp_path):
    tiny_transformer(seed=7).save_pretrained(tmp_path / "trained")
    tiny_taesd().save_pretrained(tmp_path / "taesd")
    parts = load(folder, transformer=str(tmp_path / "trained"), autoencoder=str(tmp_path / "taesd"))
    expected = tiny_transformer(seed=7).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in parts.flow.module.state_dict().items())
    assert isinstance(parts.autoencoder.module, AutoencoderTiny)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.path=.*nowhere.*no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"model\.path is not set"):
        load_model(ModelConfig(family="flux"), "cpu")


def test_a_missing_transformer_is_named(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.transformer=.*gone"):
        load(folder, transformer=str(tmp_path / "gone"))


def test_a_corrupt_file_is_named(tmp_path):
    folder = save_tiny_flux(tmp_path / "model")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"model\.path=.*diffusion_pytorch_model\.safetensors.*cut short"):
        load(folder)

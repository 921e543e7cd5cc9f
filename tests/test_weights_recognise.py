"""What a file is, told from its names and shapes: our parts, other families by diffusers' own classes, and nonsense."""

import diffusers
import pytest
import torch
from flux_weights import DEV, TOY, header_only, original_shapes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from srpo_core.config import ConfigError
from srpo_core.models.flux_files import autoencoder_at, transformer_at
from srpo_core.weights.recognise import describe, describe_file, recognise, require
from srpo_core.weights.tensors import TensorFile, TensorInfo, WeightsError, open_tensors

SMALL = {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "num_mmdit_layers": 1,
         "num_single_dit_layers": 1, "n_layers": 1, "n_refiner_layers": 1}  # fmt: skip
OTHERS = {
    "SD3Transformer2DModel": "Stable Diffusion 3",
    "WanTransformer3DModel": "Wan",
    "QwenImageTransformer2DModel": "Qwen-Image",
    "HunyuanVideoTransformer3DModel": "HunyuanVideo",
    "ChromaTransformer2DModel": "Chroma",
    "Flux2Transformer2DModel": "FLUX.2",
    "AuraFlowTransformer2DModel": "AuraFlow",
    "PixArtTransformer2DModel": "PixArt",
    "LTXVideoTransformer3DModel": "LTX-Video",
    "Lumina2Transformer2DModel": "Lumina 2",
    "ZImageTransformer2DModel": "Z-Image",
    "MochiTransformer3DModel": "Mochi",
    "CogVideoXTransformer3DModel": "CogVideoX",
    "CogView4Transformer2DModel": "CogView 4",
    "SanaTransformer2DModel": "Sana",
    "OvisImageTransformer2DModel": "Ovis-Image",
    "FluxControlNetModel": "a FLUX ControlNet",
    "AutoencoderKLFlux2": "the autoencoder of FLUX.2",
    "AutoencoderKLWan": "the autoencoder of a video model",
    "AutoencoderKLHunyuanVideo": "the autoencoder of a video model",
}
ORIGINALS = {  # names by which ComfyUI 0.33 tells these models apart (comfy/model_detection.py)
    "Stable Diffusion XL": {
        "input_blocks.0.0.weight": (320, 4, 3, 3), "label_emb.0.0.weight": (1280, 2816), "out.2.weight": (4, 320, 3, 3),
    },
    "Stable Diffusion 1 or 2": {
        "input_blocks.0.0.weight": (320, 4, 3, 3), "middle_block.0.in_layers.0.weight": (1280,),
    },
    "Stable Diffusion 3": {"joint_blocks.0.context_block.attn.qkv.weight": (4608, 1536)},
    "HunyuanVideo": {"txt_in.individual_token_refiner.blocks.0.norm1.weight": (3072,)},
    "Wan": {"head.modulation": (1, 2, 5120), "blocks.0.ffn.0.weight": (13824, 5120)},
    "Z-Image": {"cap_embedder.1.weight": (3840, 2560), "noise_refiner.0.attention.k_norm.weight": (128,)},
    "Lumina 2": {"cap_embedder.1.weight": (2304, 2304), "noise_refiner.0.attention.k_norm.weight": (96,)},
    "Chroma": original_shapes(**TOY) | {"distilled_guidance_layer.norms.0.scale": (5120,)},
    "FLUX.2": original_shapes(**TOY) | {"double_stream_modulation_img.lin.weight": (96, 16)},
    "FLUX.1-Fill, which takes a masked image as well": original_shapes(**DEV | {"channels": 384}),
    "FLUX.1-Canny or -Depth, which take a control image as well": original_shapes(**DEV | {"channels": 128}),
}  # fmt: skip


def held(shapes, dtype="BF16"):
    """A file that exists only by its header's content."""
    info = {name: TensorInfo(tuple(shape), dtype) for name, shape in shapes.items()}
    return TensorFile("x.safetensors", "model.transformer", {}, info, dict.fromkeys(info))


# ---- other families


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_by_diffusers_own_classes(name):
    import inspect

    cls = getattr(diffusers, name, None)
    if cls is None:
        pytest.skip(f"this version of diffusers has no {name}")
    options = {key: value for key, value in SMALL.items() if key in inspect.signature(cls.__init__).parameters}
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in cls(**options).state_dict().items()}
    contents = recognise(held(shapes))
    assert (contents.part, contents.detail) == ("unknown", OTHERS[name])
    with pytest.raises(WeightsError, match=f"is not a FLUX transformer: it looks like {OTHERS[name]}"):
        require(held(shapes), "transformer", "model.transformer")


def test_unets_by_diffusers_own_class():
    base = {"block_out_channels": (32, 64), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 64}  # fmt: skip
    xl = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256,
          "projection_class_embeddings_input_dim": 2816}  # fmt: skip
    for options, expected in ((base, "Stable Diffusion 1 or 2"), (base | xl, "Stable Diffusion XL")):
        with torch.device("meta"):
            model = diffusers.UNet2DConditionModel(**options)
        assert recognise(held({n: t.shape for n, t in model.state_dict().items()})).detail == expected


@pytest.mark.parametrize("name", ORIGINALS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_other_families_by_their_original_names(name, prefix):
    contents = recognise(held({prefix + key: shape for key, shape in ORIGINALS[name].items()}))
    assert (contents.part, contents.detail) == ("unknown", name)


# ---- ours


def test_a_checkpoint_is_known_with_its_parts(tmp_path):
    shapes = {f"model.diffusion_model.{n}": s for n, s in original_shapes(**TOY).items()}
    shapes |= {"vae.decoder.conv_in.weight": (512, 16, 3, 3), "vae.decoder.mid.block_1.conv1.weight": (512, 512, 3, 3)}
    clip = "text_encoders.clip_l.transformer.text_model"
    shapes |= {f"{clip}.embeddings.token_embedding.weight": (49408, 768)}
    shapes |= {f"{clip}.encoder.layers.0.self_attn.q_proj.weight": (768, 768)}
    shapes |= {"text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096)}
    contents = recognise(open_tensors(header_only(tmp_path / "x.safetensors", shapes), "model.path"))
    assert contents.part == "checkpoint"
    assert sorted(contents.parts) == ["autoencoder", "clip", "t5", "transformer"]
    assert contents.parts["transformer"].prefix == "model.diffusion_model."
    text = describe(contents)
    for words in ("all in one file", "FLUX of width 256 transformer", "16 latent channels", "CLIP", "T5"):
        assert words in text
    assert require(held(shapes), "autoencoder", "model.path") == contents.parts["autoencoder"]
    lacking = {name: shape for name, shape in shapes.items() if not name.startswith("vae.")}
    with pytest.raises(WeightsError, match=r"but not an autoencoder; name one in model\.autoencoder"):
        require(held(lacking), "autoencoder", "model.path")


def test_text_towers_as_transformers_saves_them():
    """Version 5 of transformers saves a CLIP without `text_model.`; whole T5s have a decoder beside."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5Model

    with torch.device("meta"):
        clip = CLIPTextModel(CLIPTextConfig(hidden_size=64, num_attention_heads=1, num_hidden_layers=1))
        t5 = T5Model(T5Config(d_model=32, num_layers=1))
    contents = recognise(held({name: tensor.shape for name, tensor in clip.state_dict().items()}))
    assert (contents.part, contents.detail) == ("clip", "CLIP text encoder of width 64")
    contents = recognise(held({name: tensor.shape for name, tensor in t5.state_dict().items()}))
    assert (contents.part, contents.detail) == ("t5", "T5 text encoder of width 32 with its decoder")


def test_files_in_the_wrong_setting_are_sent_to_the_right_one(tmp_path):
    transformer = original_shapes(**TOY)
    lora = {"transformer.x_embedder.lora_A.weight": (4, 64), "transformer.x_embedder.lora_B.weight": (3072, 4)}
    clip = {"text_model.embeddings.token_embedding.weight": (49408, 768),
            "text_model.encoder.layers.0.self_attn.q_proj.weight": (768, 768)}  # fmt: skip
    for shapes, part, setting in (
        (transformer, "autoencoder", "model.transformer"), (lora, "transformer", "model.lora"),
        (clip, "transformer", "model.clip"),
    ):  # fmt: skip
        with pytest.raises(WeightsError, match=f"it belongs into {setting}"):
            require(held(shapes), part, "model.path")
    with pytest.raises(WeightsError, match=r"something that is not known here \(it has ghost, \.\.\.\)"):
        require(held({"ghost": (1,)}), "transformer", "model.path")
    path = header_only(tmp_path / "x.safetensors", {"ghost": (1,)})
    assert describe_file(path) == "weights of a kind that is not known here, bf16, 1 parameters"


# ---- fuzzing

NAMES = [
    *sorted(original_shapes(**TOY | {"double": 1, "single": 1})),
    "double_blocks.99999.img_mod.lin.weight", "x_embedder.weight", "single_transformer_blocks.0.proj_mlp.weight",
    "time_text_embed.text_embedder.linear_1.weight", "transformer_blocks.0.attn.norm_q.weight", "proj_out.weight",
    "context_embedder.weight", "decoder.conv_in.weight", "decoder.mid.block_1.conv1.weight", "decoder.layers.0.weight",
    "decoder.mid_block.resnets.0.conv1.weight", "decoder.layers.2.conv.0.weight", "taesd_decoder.1.weight",
    "taesd_decoder.3.conv.0.weight", "encoder.conv_in.weight", "decoder.conv_out.weight", "vae_scale", "vae_shift",
    "encoder.down.0.block.0.conv1.weight", "encoder.down_blocks.0.resnets.0.conv1.weight", "scaled_fp8",
    "double_blocks.0.img_mod.lin.scale_weight", "double_blocks.0.img_mod.lin.weight_scale", "vae.x", "text_encoders.x",
]  # fmt: skip
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 16, 64, 128, 256, 4096]), max_size=3).map(tuple)
PREFIXES = st.sampled_from(["", "", "model.diffusion_model.", "vae."])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_mixture_of_names_and_shapes_is_a_part_or_an_error(tmp_path, data):
    """Some names of a real file get other shapes, some go, some come: never anything but a ConfigError."""
    shapes = dict(original_shapes(**TOY | {"double": 1, "single": 1})) if data.draw(st.booleans()) else {}
    for name in data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=12, unique=True)):
        if data.draw(st.booleans()):
            shapes[data.draw(PREFIXES) + name] = data.draw(SHAPES)
        else:
            shapes.pop(name, None)
    path = header_only(tmp_path / "x.safetensors", shapes, data.draw(st.sampled_from(["F32", "F8_E4M3"])))
    for look in (describe_file, transformer_at, autoencoder_at):
        try:
            look(path) if look is describe_file else look(path, "model.path")
        except ConfigError as error:
            assert "x.safetensors" in str(error)

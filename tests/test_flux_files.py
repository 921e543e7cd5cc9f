"""The FLUX family from every arrangement of files: one model in several forms gives the same numbers."""

import gc
import json
import shutil

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from flux_weights import TOY, bytes_alive, header_only, original_shapes, original_vae_shapes, random_tensors
from safetensors.torch import load_file, save_file
from tiny_flux import _clip_tokenizer, _t5_tokenizer, randomise

from srpo_core.assemble import assemble
from srpo_core.config import ConfigError, ModelConfig
from srpo_core.description import make_config
from srpo_core.models import flux_files, load_model
from srpo_core.models.flux import load_flow
from srpo_core.models.flux_files import autoencoder_at, transformer_at

CLIP_WIDTH, T5_WIDTH = 64, 24
SIZES = TOY | {"text": T5_WIDTH, "pooled": CLIP_WIDTH}
WIDTHS = (32, 32, 64)
BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}


def text_towers():
    """CLIP-L's and T5's classes at toy size, as FLUX's files have them."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = CLIPTextConfig(
        vocab_size=514, hidden_size=CLIP_WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=1,
        bos_token_id=512, eos_token_id=513, pad_token_id=513, projection_dim=CLIP_WIDTH,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=32, d_model=T5_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return randomise(CLIPTextModel(clip), 1, 0.5), randomise(T5EncoderModel(t5), 2, 0.5)


def under(prefix, tensors):
    return {prefix + name: tensor.contiguous().clone() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One model as single files, as an all-in-one checkpoint, and as a folder in diffusers format."""
    root = tmp_path_factory.mktemp("files")
    transformer, vae = random_tensors(original_shapes(**SIZES)), random_tensors(original_vae_shapes(WIDTHS), 1)
    clip, t5 = text_towers()
    clip_tensors = {f"text_model.{n.removeprefix('text_model.')}": t for n, t in clip.state_dict().items()}
    t5_tensors = {n: t for n, t in t5.state_dict().items() if n != "encoder.embed_tokens.weight"}
    save_file(transformer, root / "flux.safetensors")
    save_file(vae, root / "ae.safetensors")
    save_file(under("", clip_tensors), root / "clip_l.safetensors")
    save_file(under("", t5_tensors), root / "t5xxl.safetensors")
    whole = under("model.diffusion_model.", transformer) | under("vae.", vae)
    whole |= under("text_encoders.clip_l.transformer.", clip_tensors)
    whole |= under("text_encoders.t5xxl.transformer.", t5_tensors)
    save_file(whole, root / "checkpoint.safetensors")
    tokenizers, folder = root / "tokenizers", root / "folder"
    for place in (tokenizers, folder):
        _clip_tokenizer(place / "tokenizer")
        _t5_tokenizer(place / "tokenizer_2")
    transformer_at(root / "flux.safetensors", "").load(torch.float32, "cpu").save_pretrained(folder / "transformer")
    autoencoder_at(root / "ae.safetensors", "").load(torch.float32, "cpu").save_pretrained(folder / "vae")
    clip.save_pretrained(folder / "text_encoder")
    t5.save_pretrained(folder / "text_encoder_2")
    return root


def single_files(root, **others):
    names = {"transformer": "flux", "autoencoder": "ae", "clip": "clip_l", "t5": "t5xxl"}
    paths = {setting: str(root / f"{name}.safetensors") for setting, name in names.items()}
    return ModelConfig(**paths | {"dtype": "float32", "tokenizers": str(root / "tokenizers")} | others)


def arrangements(root):
    tokenizers = str(root / "tokenizers")
    return {
        "folder": ModelConfig(path=str(root / "folder"), dtype="float32"),
        "single files": single_files(root),
        "checkpoint": ModelConfig(path=str(root / "checkpoint.safetensors"), dtype="float32", tokenizers=tokenizers),
        "checkpoint's parts by their settings": single_files(
            root, transformer=str(root / "checkpoint.safetensors"), autoencoder=str(root / "checkpoint.safetensors")
        ),
        "whole folder in one part's setting": single_files(
            root, transformer=str(root / "folder"), autoencoder=str(root / "folder")
        ),
    }


def picture(parts):
    """A velocity and a decoded picture: every part has a say."""
    prompts = parts.text_encoder(["a red cat"])
    latents = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        velocity = parts.flow.velocity(latents, torch.tensor([0.7]), prompts, 3.5)
        return parts.autoencoder.decode(latents - 0.7 * velocity)


def test_every_arrangement_gives_the_same_picture(files):
    pictures = {name: picture(load_model(config, "cpu")) for name, config in arrangements(files).items()}
    reference = pictures.pop("folder")
    assert reference.shape == (1, 3, 16, 24)
    assert reference.std() > 0.01
    for name, other in pictures.items():
        torch.testing.assert_close(other, reference, rtol=1e-5, atol=1e-6, msg=name)


def test_the_fixtures_autoencoder_is_diffusers_own_reading(files):
    """The pictures above agree with each other; this ties them to another implementation's reading of the file."""
    loaded = autoencoder_at(files / "ae.safetensors", "").load(torch.float32, "cpu").state_dict()
    for name, tensor in convert_ldm_vae_checkpoint(load_file(files / "ae.safetensors"), BLOCKS).items():
        assert torch.equal(loaded[name], tensor), name


def test_construction_reads_headers_and_parts_load_when_first_read(files):
    parts = load_model(single_files(files), "cpu")
    assert not {"flow", "autoencoder", "text_encoder"} & set(parts.__dict__)
    assert all(parameter.is_meta for parameter in parts.outline().module.parameters())
    assert parts.outline().latent_shape(64, 80) == (16, 16, 20)
    assert not any(parameter.is_meta for parameter in parts.flow.module.parameters())
    assert parts.flow is parts.flow
    parts.release("flow")
    assert "flow" not in parts.__dict__


def test_single_files_need_no_network(files, monkeypatch):
    import socket

    refuse = lambda *_, **__: pytest.fail("the network was used")  # noqa: E731
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert picture(load_model(single_files(files), "cpu")).shape == (1, 3, 16, 24)


def test_a_part_is_loaded_a_tensor_at_a_time(files, monkeypatch):
    """Of what is read of a file in bfloat16, no more than its two largest tensors live beside the float32 module."""
    tensors = load_file(files / "flux.safetensors")
    save_file({name: t.bfloat16() for name, t in tensors.items()}, files / "bf16.safetensors")
    peak = bytes_alive(monkeypatch)
    module = transformer_at(files / "bf16.safetensors", "").load(torch.float32, "cpu")
    assert sum(p.numel() for p in module.parameters()) == sum(t.numel() for t in tensors.values())
    assert 0 < peak[0] <= 2 * max(2 * t.numel() for t in tensors.values())


def test_text_encoders_are_gone_before_the_transformer_comes(files, tmp_path, monkeypatch):
    from transformers import T5EncoderModel

    alive = []
    load = flux_files.Part.load

    def watched(part, dtype, device):
        gc.collect()
        encoders = sum(type(thing) is T5EncoderModel for thing in gc.get_objects())
        alive.append((part.kind, dtype, encoders))
        return load(part, dtype, device)

    monkeypatch.setattr(flux_files.Part, "load", watched)
    train, held_out = tmp_path / "train.txt", tmp_path / "held_out.txt"
    train.write_text("a red cat\na dog\n", encoding="utf-8")
    held_out.write_text("a house\n", encoding="utf-8")
    for rank, dtype in ((0, torch.float32), (2, torch.bfloat16)):
        config = make_config(
            {
                "model": single_files(files, dtype="bfloat16").model_dump(),
                "data": {"height": 16, "width": 16, "prompts": str(train), "eval_prompts": str(held_out)},
                "reward": {"name": "tiny:load_reward"},
                "optim": {"steps": 1},
                "lora": {"rank": rank},
                "output": {"dir": str(tmp_path / f"run{rank}"), "preview_every": 0, "tensorboard": False},
                "parallel": {"device": "cpu"},
            }
        )  # fmt: skip
        alive.clear()
        trainer = assemble(config)
        assert ("FluxTransformer2DModel", dtype, 0) in alive
        assert list((tmp_path / f"run{rank}").rglob("*.safetensors"))  # embeddings: the encoders were there
        frozen = {p.dtype for p in trainer.flow.module.parameters() if not p.requires_grad}
        trained = {p.dtype for p in trainer.flow.module.parameters() if p.requires_grad}
        assert trained == {torch.float32}
        assert frozen == (set() if rank == 0 else {torch.bfloat16})


def test_the_transformer_alone_needs_nothing_else(files):
    flow = load_flow(ModelConfig(transformer=str(files / "flux.safetensors")), "cpu")
    assert {p.dtype for p in flow.module.parameters()} == {torch.bfloat16}
    flow = load_flow(ModelConfig(path=str(files / "checkpoint.safetensors")), "cpu", full_precision=True)
    assert {p.dtype for p in flow.module.parameters()} == {torch.float32}


# ---- what doesn't fit is told from headers, in the words of its setting


def refuses(config, *patterns):
    with pytest.raises(ConfigError) as error:
        load_model(config, "cpu")
    for pattern in patterns:
        assert pattern in str(error.value), str(error.value)


def test_parts_of_different_models_are_told(files, tmp_path):
    vae = header_only(tmp_path / "sd.safetensors", original_vae_shapes(WIDTHS, latents=4), "F32")
    refuses(single_files(files, autoencoder=str(vae)), "model.autoencoder=", "has 4 latent channels, the transformer")
    other = header_only(tmp_path / "wide.safetensors", original_shapes(**SIZES | {"text": 40}))
    refuses(single_files(files, transformer=str(other)), "model.t5=", "is a T5 of width 24", "takes 40")
    other = header_only(tmp_path / "pooled.safetensors", original_shapes(**SIZES | {"pooled": 40}))
    refuses(single_files(files, transformer=str(other)), "model.clip=", "is a CLIP of width 64", "takes 40")


def test_a_broken_part_of_a_folder_is_blamed_on_the_folder(files, tmp_path):
    folder = shutil.copytree(files / "folder", tmp_path / "folder")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refuses(ModelConfig(path=str(folder)), f"model.path={str(weights)!r}: it is cut short")
    shutil.rmtree(folder / "vae")
    refuses(ModelConfig(path=str(folder)), "has no folder vae; model.autoencoder names one elsewhere")


def test_files_in_the_wrong_place_are_sent_to_the_right_one(files):
    transformer = str(files / "flux.safetensors")
    refuses(ModelConfig(path=transformer), "model.path=", "not an autoencoder; it belongs into model.transformer")
    refuses(single_files(files, autoencoder=transformer), "model.autoencoder=", "it belongs into model.transformer")
    refuses(single_files(files, transformer=str(files / "t5xxl.safetensors")), "T5 text encoder of width 24")
    refuses(ModelConfig(), "model.path is not set", "model.transformer", "srpo download")
    refuses(ModelConfig(path=str(files / "gone")), "model.path=", "no such folder or file")


def test_a_folder_of_another_pipeline_is_told(files, tmp_path):
    folder = shutil.copytree(files / "folder", tmp_path / "folder")
    config = folder / "transformer" / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) | {"_class_name": "SD3Transformer2DModel"}
    config.write_text(json.dumps(settings), encoding="utf-8")
    refuses(ModelConfig(path=str(folder)), "model.path=", "describes a SD3Transformer2DModel")

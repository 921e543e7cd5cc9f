"""Models and LoRAs from files, and the built-in miniature."""

from __future__ import annotations

import comfy.model_management
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from srpo_core.config import ModelConfig

CATEGORY = "SRPO/loaders"


class MiniatureClip(comfy.sd.CLIP):
    """The miniature's text encoder as a CLIP that ComfyUI's own encode nodes take."""

    def __init__(self, encoder: object, module: torch.nn.Module) -> None:
        super().__init__(no_init=True)
        self.encoder = encoder
        self.patcher = ModelPatcher(
            torch.nn.ModuleList([module]),  # ComfyUI sets attributes that a transformers model forbids
            load_device=comfy.model_management.text_encoder_device(),
            offload_device=comfy.model_management.text_encoder_offload_device(),
        )
        self.cond_stage_model, self.tokenizer, self.layer_idx = module, None, None
        self.tokenizer_options, self.use_clip_schedule, self.apply_hooks_to_conds = {}, False, None

    def clone(self, disable_dynamic: bool = False) -> MiniatureClip:
        return MiniatureClip(self.encoder, self.cond_stage_model)

    def tokenize(self, text: str, return_word_ids: bool = False, **kwargs: object) -> str:
        return text

    def encode_from_tokens(self, tokens: str, return_pooled: bool = False, return_dict: bool = False) -> object:
        comfy.model_management.load_models_gpu([self.patcher])
        embeds = self.encoder([tokens]).embeds
        cond, pooled = embeds["prompt_embeds"], embeds["pooled_prompt_embeds"]
        if return_dict:
            return {"cond": cond, "pooled_output": pooled}
        return (cond, pooled) if return_pooled else cond


class Miniature(io.ComfyNode):
    """The built-in small world."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SRPOMiniature",
            display_name="SRPO Miniature",
            category=CATEGORY,
            description="A small FLUX model with its text encoder and VAE, built in: try any graph with no download.",
            search_aliases=["demo", "tiny", "test model"],
            inputs=[],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from srpo_core.export.vae import vae_comfyui_tensors
        from srpo_core.miniature.models import WEIGHTS, MiniatureTextEncoder, load, load_clip

        parts = load(ModelConfig(family="miniature"), "cpu")
        path = WEIGHTS / "transformer" / "diffusion_pytorch_model.safetensors"
        model = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})
        vae = comfy.sd.VAE(sd=vae_comfyui_tensors(parts.autoencoder))
        module = load_clip()
        return io.NodeOutput(model, MiniatureClip(MiniatureTextEncoder(module), module), vae)

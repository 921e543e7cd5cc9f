"""Tensors by which other model families are known, to tell a user what a wrong file is.

Each entry: what it is, then groups of names; a file with all names of a group is taken for it. `name[axis]=size` asks
for the size of a tensor's axis too. The first match counts. Original names are those by which ComfyUI tells models
apart, others come from the diffusers classes of the same name; tests build those classes and compare.
"""

from __future__ import annotations

FAMILIES = (
    (
        "FLUX.2",
        ("double_stream_modulation_img.lin.weight",),
        ("double_stream_modulation_img.linear.weight",),
    ),
    ("the autoencoder of FLUX.2", ("bn.running_mean", "decoder.conv_in.weight")),
    (
        "Chroma",
        ("distilled_guidance_layer.norms.0.scale",),
        ("distilled_guidance_layer.norms.0.weight",),
    ),
    ("a FLUX ControlNet", ("controlnet_blocks.0.weight",), ("controlnet_blocks.0.weight", "x_embedder.weight")),
    (
        "FLUX.1-Fill, which takes a masked image as well",
        ("double_blocks.0.img_attn.qkv.weight", "img_in.weight[1]=384"),
        ("single_transformer_blocks.0.proj_mlp.weight", "x_embedder.weight[1]=384"),
    ),
    (
        "FLUX.1-Canny or -Depth, which take a control image as well",
        ("double_blocks.0.img_attn.qkv.weight", "img_in.weight[1]=128"),
        ("single_transformer_blocks.0.proj_mlp.weight", "x_embedder.weight[1]=128"),
    ),
    (
        "HunyuanVideo",
        ("txt_in.individual_token_refiner.blocks.0.norm1.weight",),
        ("context_embedder.token_refiner.refiner_blocks.0.norm1.weight",),
    ),
    (
        "Ovis-Image",
        ("double_blocks.0.img_mlp.gate_proj.weight",),
        ("context_embedder_norm.weight", "x_embedder.weight"),
    ),
    ("Qwen-Image", ("txt_norm.weight", "transformer_blocks.0.img_mod.1.weight")),
    ("Stable Diffusion 3", ("joint_blocks.0.context_block.attn.qkv.weight",)),
    ("Stable Diffusion 3", ("pos_embed.proj.weight", "transformer_blocks.0.attn.add_q_proj.weight")),
    (
        "Stable Diffusion XL",
        ("input_blocks.0.0.weight", "label_emb.0.0.weight[1]=2816"),
        ("conv_in.weight", "mid_block.resnets.0.conv1.weight", "add_embedding.linear_1.weight[1]=2816"),
    ),
    (
        "Stable Diffusion 1 or 2",
        ("input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight"),
        ("conv_in.weight", "mid_block.resnets.0.conv1.weight", "time_embedding.linear_1.weight"),
    ),
    (
        "Wan",
        ("head.modulation", "blocks.0.ffn.0.weight"),
        ("condition_embedder.time_embedder.linear_1.weight", "blocks.0.attn1.norm_q.weight"),
    ),
    (
        "Z-Image",
        ("cap_embedder.1.weight[0]=3840", "noise_refiner.0.attention.k_norm.weight"),
        ("cap_embedder.1.weight", "noise_refiner.0.attention.norm_k.weight"),
    ),
    (
        "Lumina 2",
        ("cap_embedder.1.weight", "noise_refiner.0.attention.k_norm.weight"),
        ("time_caption_embed.timestep_embedder.linear_1.weight", "noise_refiner.0.attn.norm_q.weight"),
    ),
    ("PixArt", ("t_block.1.weight",), ("adaln_single.emb.timestep_embedder.linear_1.bias", "pos_embed.proj.bias")),
    (
        "LTX-Video",
        ("adaln_single.emb.timestep_embedder.linear_1.bias", "transformer_blocks.0.attn2.to_k.weight"),
        ("time_embed.emb.timestep_embedder.linear_1.weight", "proj_in.weight", "caption_projection.linear_1.weight"),
    ),
    ("AuraFlow", ("double_layers.0.attn.w1q.weight",), ("joint_transformer_blocks.0.attn.add_k_proj.weight",)),
    ("Mochi", ("t5_yproj.weight",), ("time_embed.pooler.to_kv.weight",)),
    (
        "CogVideoX",
        ("blocks.0.norm1.linear.weight",),
        ("patch_embed.text_proj.weight", "time_embedding.linear_1.weight"),
    ),
    ("CogView 4", ("patch_embed.text_proj.weight", "time_condition_embed.timestep_embedder.linear_1.weight")),
    ("Sana", ("caption_norm.weight", "patch_embed.proj.weight")),
    ("Hunyuan-DiT", ("mlp_t5.0.weight",)),
    ("Cosmos", ("blocks.block0.blocks.0.block.attn.to_q.0.weight",)),
    ("Kandinsky 5", ("visual_transformer_blocks.0.cross_attention.key_norm.weight",)),
    ("Krea 2", ("txtfusion.projector.weight",)),
    ("Stable Cascade", ("clf.1.weight",)),
    ("Stable Audio", ("transformer.rotary_pos_emb.inv_freq",)),
    (
        "the autoencoder of a video model",
        ("decoder.middle.0.residual.0.gamma",),
        ("decoder.mid_block.resnets.0.norm1.gamma",),
    ),
    ("the autoencoder of a video model", ("decoder.conv_in.conv.weight",)),
    (
        "a CLIP under open_clip's names, such as the reward HPS v2.1",
        ("visual.transformer.resblocks.0.attn.in_proj_weight",),
    ),
    ("ImageReward, a reward", ("blip.visual_encoder.cls_token",)),
    ("a language model", ("model.layers.0.self_attn.q_proj.weight",)),
)

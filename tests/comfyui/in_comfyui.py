"""What ComfyUI's own loaders make of our files: see worker.py.

FOLDER/job.json names the files ("transformer" and perhaps "lora", or "vae"; "saved": where ComfyUI shall save what it
loaded), FOLDER/inputs.safetensors holds the tensors that both sides get.
"""

import inspect

import torch
from safetensors.torch import load_file
from worker import serve


def velocity(job, inputs):
    """latents [B, C, h, w], sigma [B], guidance, embeddings -> velocity, as ComfyUI's sampler asks for it."""
    import comfy.model_management
    import comfy.sd
    import comfy.utils

    patcher = comfy.sd.load_diffusion_model(job["transformer"], model_options={"dtype": torch.float32})
    patches = 0
    if "lora" in job:
        lora, metadata = comfy.utils.load_torch_file(job["lora"], safe_load=True, return_metadata=True)
        apply = comfy.sd.load_lora_for_models
        told = {"lora_metadata": metadata} if "lora_metadata" in inspect.signature(apply).parameters else {}
        patcher, _ = apply(patcher, None, lora, 1.0, 0.0, **told)  # as ComfyUI's own node of that version does
        patches = sum(len(changes) for changes in patcher.patches.values())
    comfy.model_management.load_models_gpu([patcher])
    if "saved" in job:
        comfy.sd.save_checkpoint(job["saved"], patcher)
    latents, sigma = inputs["latents"], inputs["sigma"]
    conditions = patcher.model.extra_conds(
        noise=latents, device=latents.device, guidance=float(inputs["guidance"]),
        cross_attn=inputs["prompt_embeds"], pooled_output=inputs["pooled_prompt_embeds"],
    )  # fmt: skip
    values = {name: value.process_cond(batch_size=len(latents)).cond for name, value in conditions.items()}
    denoised = patcher.model.apply_model(latents, sigma, **values)
    latent_format = type(patcher.model.latent_format).__name__
    outputs = {"velocity": (latents - denoised) / sigma.view(-1, 1, 1, 1)}
    return outputs, {"patches": patches, "latent_format": latent_format}


def pictures(job, inputs):
    """latents of our models [B, C, h, w] and images [B, 3, H, W] in [0, 1] -> decoded and encoded, shaped alike."""
    import comfy.latent_formats
    import comfy.sd
    import comfy.utils

    weights, metadata = comfy.utils.load_torch_file(job["vae"], return_metadata=True)
    vae = comfy.sd.VAE(sd=weights, metadata=metadata)
    vae.throw_exception_if_invalid()
    flux = comfy.latent_formats.Flux()
    decoded = vae.decode(flux.process_out(inputs["latents"])).movedim(-1, 1)
    encoded = flux.process_in(vae.encode(inputs["images"].movedim(1, -1)))
    return {"decoded": decoded, "encoded": encoded}, {"dtype": str(vae.vae_dtype), "channels": vae.latent_channels}


def work(job, folder):
    return (pictures if "vae" in job else velocity)(job, load_file(folder / "inputs.safetensors"))


if __name__ == "__main__":
    serve(work)

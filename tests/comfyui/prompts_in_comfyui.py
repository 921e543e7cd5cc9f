"""A CONDITIONING of three prompts in SRPO's nodes: a program that imports ComfyUI and this pack.

    python prompts_in_comfyui.py CHECKOUT FOLDER

No node of ComfyUI makes one, nodes of other packs do. FOLDER/drawn.safetensors then holds the latents of five pictures
by SRPO Sampler: all at once, two at once, and each alone; FOLDER/shown.safetensors the last of them as SRPO
Direct-Align Preview predicts it in one step: in the batch, of which it asks four and one, and alone.
"""

import sys
from pathlib import Path

import torch
from memory_in_comfyui import load_pack
from safetensors.torch import save_file

PROMPTS = ["two red stars at night", "a blue ring in the snow", "three green balls in a meadow"]
COUNT, SEED = 5, 6


class Hidden:
    """What a server tells a node beside its inputs: nothing."""

    prompt = extra_pnginfo = None


def main():
    checkout, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    sys.path.insert(0, checkout)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    nodes = {node.GET_SCHEMA().node_id: node for node in load_pack()}
    nodes["SRPOAlignPreview"].hidden = Hidden()

    with torch.inference_mode():
        model, clip, vae = nodes["SRPOMiniature"].execute().args
        single = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in PROMPTS]
        (conds, told), pooled = zip(*(one[0] for one in single), strict=True), "pooled_output"
        several = [[torch.cat(conds), {**told[0], pooled: torch.cat([one[pooled] for one in told])}]]

        def draw(positive, seed, count, at_once):
            latent = {"samples": torch.zeros(count, 16, 16, 16)}
            output = nodes["SRPOSampler"].execute(model, positive, latent, seed, 3, 3.5, 3.0, "ComfyUI", at_once)
            return output.args[0]["samples"]

        def predicted(positive, seed, latents):
            given = {"latent": {"samples": latents}}
            output = nodes["SRPOAlignPreview"].execute(model, positive, vae, seed, "0.75", 0.2, "denoise", 3.5, **given)
            return output.args[2][-1].contiguous()

        alone = [draw(single[i % 3], SEED + i, 1, 1) for i in range(COUNT)]
        drawn = {"together": draw(several, SEED, COUNT, COUNT), "parted": draw(several, SEED, COUNT, 2)}
        save_file({**drawn, "alone": torch.cat(alone)}, folder / "drawn.safetensors")
        last = SEED + COUNT - 1
        shown = {"batch": predicted(several, SEED, torch.cat(alone)), "alone": predicted(single[1], last, alone[-1])}
        save_file(shown, folder / "shown.safetensors")


if __name__ == "__main__":
    main()

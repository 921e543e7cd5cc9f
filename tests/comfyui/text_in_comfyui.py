"""What ComfyUI makes of texts with our text encoders' files: a program that imports ComfyUI and nothing of ours.

    python text_in_comfyui.py CHECKOUT FOLDER

FOLDER/job.json names the files ("clip", "t5"), their configurations ("clip_config", "t5_config") and the texts. Written
there: ids.json (each text's ids of both tokenizers), outputs.safetensors (pooled [B, P], tokens [B, 512, D]) and
report.json with what ComfyUI logged.
"""

import json
import logging
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

logged = []


class Collector(logging.Handler):
    """Keeps what is logged."""

    def emit(self, record):
        logged.append([record.levelno, record.getMessage()])


def encode(job):
    """({tokenizer: ids of each text}, {pooled, tokens}) by ComfyUI's own loaders, tokenizers and modules."""
    import comfy.sd

    options = {
        "dtype": torch.float32, "model_config": job["clip_config"], "t5xxl_model_config": job["t5_config"],
    }  # fmt: skip
    clip = comfy.sd.load_clip([job["clip"], job["t5"]], clip_type=comfy.sd.CLIPType.FLUX, model_options=options)
    clip.set_tokenizer_option("t5xxl_min_length", 512)  # FLUX's training length; ComfyUI's own default is 256
    ids, pooled, tokens = {"l": [], "t5xxl": []}, [], []
    for text in job["texts"]:
        found = clip.tokenize(text)
        for name, sections in found.items():
            ids[name].append([[int(token) for token, _ in section] for section in sections])
        if len(found["t5xxl"][0]) == 512:
            states, summary = clip.encode_from_tokens(found, return_pooled=True)
            tokens.append(states)
            pooled.append(summary)
    return ids, {"pooled": torch.cat(pooled), "tokens": torch.cat(tokens)}


def main():
    checkout, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    sys.path.insert(0, checkout)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True  # before ComfyUI looks for devices
    import comfy.sd

    logging.getLogger().addHandler(Collector())
    logging.getLogger().setLevel(logging.DEBUG)
    with torch.inference_mode():
        ids, outputs = encode(json.loads((folder / "job.json").read_text(encoding="utf-8")))
    (folder / "ids.json").write_text(json.dumps(ids), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, folder / "outputs.safetensors")
    (folder / "report.json").write_text(json.dumps({"logged": logged}), encoding="utf-8")


if __name__ == "__main__":
    main()

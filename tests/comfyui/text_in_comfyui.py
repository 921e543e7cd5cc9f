"""What ComfyUI makes of texts with our text encoders' files: see worker.py.

FOLDER/job.json names the files ("clip", "t5"), their configurations ("clip_config", "t5_config") and the texts. Written
there: ids.json (each text's ids of both tokenizers), and the tensors pooled [B, P] and tokens [B, 512, D].
"""

import json

import torch
from worker import serve


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


def work(job, folder):
    ids, outputs = encode(job)
    (folder / "ids.json").write_text(json.dumps(ids), encoding="utf-8")
    return outputs, {}


if __name__ == "__main__":
    serve(work)

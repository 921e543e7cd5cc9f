"""The miniature's text encoder, built of ComfyUI's own CLIP: any node that encodes prompts takes it."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace
from typing import Any

import comfy.clip_model
import comfy.sd
import comfy.utils
import torch
from comfy.sd1_clip import SDClipModel, escape_important, token_weights, unescape_important

from srpo_core.miniature import WEIGHTS
from srpo_core.miniature.captions import MAX_TOKENS, VOCABULARY, tokenize, unknown_words

START, END, PAD = (VOCABULARY.index(word) for word in ("<start>", "<end>", "<pad>"))
Tokens = dict[str, list[list[tuple[Any, ...]]]]


class _Tower(comfy.clip_model.CLIPTextModel):
    """ComfyUI's CLIP text tower with the miniature's vocabulary in the place of OpenAI's."""

    def __init__(self, config_dict: dict[str, Any], dtype: torch.dtype, device: Any, operations: Any) -> None:
        super().__init__(config_dict, dtype, device, operations)
        width = config_dict["hidden_size"]
        self.set_input_embeddings(operations.Embedding(len(VOCABULARY), width, dtype=dtype, device=device))


class _TextModel(torch.nn.Module):
    """What a CLIP of ComfyUI holds: prompt -> token states [1, MAX_TOKENS, 192] and a projected summary [1, 192].

    In float32 always: it is small, and pictures are the engine's own then.
    """

    def __init__(self, device: Any = "cpu", dtype: torch.dtype | None = None, model_options: Any = None) -> None:
        super().__init__()
        config = json.loads((WEIGHTS / "clip" / "config.json").read_text(encoding="utf-8"))["text_config"]
        self.clip_l = SDClipModel(
            device=device, dtype=torch.float32, max_length=MAX_TOKENS, textmodel_json_config=config, model_class=_Tower,
            special_tokens={"start": START, "end": END, "pad": PAD},
        )  # fmt: skip
        self.dtypes = {torch.float32}

    def set_clip_options(self, options: dict[str, Any]) -> None:
        self.clip_l.set_clip_options(options)

    def reset_clip_options(self) -> None:
        self.clip_l.reset_clip_options()

    def encode_token_weights(self, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """States of the text for T5 and the summary of the text for CLIP-L, as FLUX has them; one text, usually."""
        states, summary = self.clip_l.encode_token_weights(tokens["t5xxl"])
        if tokens["l"] != tokens["t5xxl"]:
            _, summary = self.clip_l.encode_token_weights(tokens["l"])
        return states, summary

    def load_sd(self, weights: dict[str, torch.Tensor]) -> Any:
        return self.clip_l.load_sd(weights)


class _Tokenizer:
    """The small world's words, with weights such as (red:1.2) as ComfyUI writes them."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: Any) -> Tokens:
        words: list[tuple[int, float]] = []
        for part, weight in token_weights(escape_important(text), 1.0):
            part = unescape_important(part)
            if unknown := unknown_words(part):
                logging.warning("SRPO Miniature: its small world has no %s: not drawn", ", ".join(unknown))
            ids = tokenize(part)
            words += [(word, weight) for word in ids[1 : ids.index(END)]]
        pairs = [(START, 1.0), *words[: MAX_TOKENS - 2], (END, 1.0)]
        pairs += [(PAD, 1.0)] * (MAX_TOKENS - len(pairs))
        numbered = [(*pair, i if 0 < i <= len(words) else 0) for i, pair in enumerate(pairs)]
        batch = [numbered if return_word_ids else pairs]
        return {"l": batch, "t5xxl": batch}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        special = (START, END, PAD) if skip_special_tokens else ()
        return " ".join(VOCABULARY[i] for i in ids if i not in special)


def miniature_clip() -> comfy.sd.CLIP:
    """The shipped text encoder as a CLIP, under ComfyUI's memory management."""
    weights = comfy.utils.load_torch_file(str(WEIGHTS / "clip" / "model.safetensors"))
    tower = {
        name: tensor.float() for name, tensor in weights.items() if name.startswith(("text_model.", "text_projection."))
    }
    return comfy.sd.CLIP(SimpleNamespace(params={}, clip=_TextModel, tokenizer=_Tokenizer), state_dict=[tower])

"""BERT's uncased tokenizer, from `tokenizer.json` or from `vocab.txt` alone: the text side of BLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer
from tokenizers.models import WordPiece as WordPieceModel
from torch import Tensor

from srpo_core.weights.tensors import WeightsError

FILES = ("tokenizer.json", "vocab.txt")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ADDED = ("[DEC]", "[ENC]")
"""Tokens that BLIP adds after BERT's own; ImageReward was trained without them, but they have their rows."""


class WordPiece:
    """Texts to tokens: [CLS] words [SEP], cut after `length` tokens and padded to it."""

    def __init__(self, folder: Path, setting: str, rows: int, length: int) -> None:
        """`rows` is the size of the embedding that the ids index. WeightsError if the files are not BERT's, uncased."""
        tokenizer = _read(folder, setting)
        lost = [token for token in SPECIAL if tokenizer.token_to_id(token) is None]
        if lost:
            raise WeightsError(setting, folder, f"its tokenizer has no {', '.join(lost)}: it is not BERT's", _WAY_OUT)
        if tokenizer.encode("A", add_special_tokens=False).ids != tokenizer.encode("a", add_special_tokens=False).ids:
            raise WeightsError(setting, folder, "its tokenizer tells A from a: it is not the uncased one", _WAY_OUT)
        tokenizer.add_special_tokens(list(ADDED))
        if tokenizer.get_vocab_size() != rows:
            count = tokenizer.get_vocab_size()
            raise WeightsError(
                setting, folder, f"its tokenizer has {count} tokens, the weights have {rows}: it is another", _WAY_OUT
            )
        pad = tokenizer.token_to_id("[PAD]")
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length, pad_id=pad, pad_token="[PAD]")
        self.tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> Mapping[str, Tensor]:
        """N texts -> input_ids and attention_mask, [N, length] each."""
        encoded = self.tokenizer.encode_batch(list(texts))
        return {
            "input_ids": torch.tensor([text.ids for text in encoded]),
            "attention_mask": torch.tensor([text.attention_mask for text in encoded]),
        }


_WAY_OUT = "srpo download imagereward gets the right one"


def _read(folder: Path, setting: str) -> Tokenizer | BertWordPieceTokenizer:
    for name in FILES:
        path = folder / name
        if path.is_file():
            try:
                if path.suffix == ".json":
                    return Tokenizer.from_file(str(path))
                return BertWordPieceTokenizer(WordPieceModel.read_file(str(path)), lowercase=True)
            except Exception as error:  # the library raises plain Exception
                raise WeightsError(setting, path, f"can't be read as a tokenizer: {error}", _WAY_OUT) from error
    raise WeightsError(setting, folder, f"holds neither {' nor '.join(FILES)}", _WAY_OUT)

"""A reward of many pictures, some at a time: what stays in memory is one batch, however many are scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from srpo_core.errors import ran_out_of_memory
from srpo_core.interfaces import Reward


def in_batches(
    reward: Reward,
    images: Tensor,
    prompts: Sequence[str],
    size: int,
    device: torch.device | str,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """The values of `reward` as of one call, [n * B] where the images are: images [B, 3, H, W] and n * B prompts.

    At most `size` pictures with all of their wordings are on `device` at a time; `on_batch` then gets how many they
    were. Where they need more memory than there is, fewer are. ValueError if the prompts don't divide among the images.
    """
    count = len(images)
    if not count or len(prompts) % count:
        raise ValueError(f"{len(prompts)} prompts don't divide among {count} images")
    values: list[Tensor] = []
    done = 0
    while done < count:
        batch = slice(done, min(done + size, count))
        texts = [text for first in range(0, len(prompts), count) for text in prompts[first : first + count][batch]]
        try:
            scores = reward(images[batch].to(device), texts).to(images.device)
        except Exception as error:
            if size == 1 or not ran_out_of_memory(error):
                raise
            size = (size + 1) // 2
            continue
        values.append(scores.view(len(prompts) // count, -1))
        if on_batch is not None:
            on_batch(batch.stop - done)
        done = batch.stop
    return torch.cat(values, dim=1).flatten()

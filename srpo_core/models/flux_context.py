"""A picture's tokens shared among processes: FLUX by diffusers' own context parallelism (Ulysses).

Each process holds its part of the tokens; for attention they trade tokens for heads, so that each has all tokens of
some heads (arXiv 2309.14509). What the parts say of a weight's gradient adds up to the whole.
"""

from __future__ import annotations

import math

import torch
from diffusers import FluxTransformer2DModel, __version__
from torch.distributed.device_mesh import init_device_mesh

from srpo_core.config import ConfigError
from srpo_core.parallel import World

SINCE = (0, 42)
"""The diffusers whose gradients were checked; some before it give wrong ones, or have no such thing."""


def check_context(module: FluxTransformer2DModel, context: int) -> None:
    """ConfigError unless `context` processes can share this model's tokens, as far as the model alone tells."""
    if tuple(int(part) for part in __version__.split(".")[:2]) < SINCE:
        raise ConfigError(f"parallel.context={context} needs diffusers 0.42 or newer, not {__version__}")
    heads = module.config.num_attention_heads
    if heads % context:
        fitting = [count for count in range(1, heads + 1) if heads % count == 0]
        raise ConfigError(
            f"parallel.context={context}: the model's {heads} attention heads are shared out among the processes"
            f" (choices: {', '.join(map(str, fitting))})"
        )


def check_tokens(count: int, what: str, context: int, way_out: str = "") -> None:
    """ConfigError, with a way out, unless a sequence can be cut in equal parts."""
    if count % context:
        raise ConfigError(f"parallel.context={context}: {what} make {count} tokens, no multiple of {context}{way_out}")


def nearest_size(rows: int, columns: int, context: int) -> tuple[int, int]:
    """The size nearest to one in tokens that can be cut in equal parts; of those as near, the one most of its shape."""
    around = range(1 - context, context)
    sizes = [(rows + i, columns + j) for i in around for j in around]

    def distance(size: tuple[int, int]) -> tuple[float, ...]:
        away = [abs(size[0] - rows), abs(size[1] - columns)]
        return max(away), abs(math.log(size[0] * columns / (size[1] * rows))), sum(away), size[0] * size[1]

    return min((one for one in sizes if min(one) > 0 and one[0] * one[1] % context == 0), key=distance)


def share_tokens(module: FluxTransformer2DModel, world: World) -> None:
    """Have each group of world.context processes, neighbours in rank, share the tokens of its pictures.

    ConfigError without GPUs, which diffusers asks for.
    """
    from diffusers import ContextParallelConfig

    if torch.accelerator.device_count() == 0:
        raise ConfigError(f"parallel.context={world.context} needs GPUs; parallel.context=1 trains on {world.device}")
    shape, names = (world.parts, 1, world.context), ("data", "ring", "ulysses")
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    module.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world.context, mesh=mesh))

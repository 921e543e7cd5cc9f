"""How much of a GPU's memory a run takes at its peak, from shapes alone.

Weights, gradients and optimizer are counted; activations are so many bytes for each token or pixel. Those numbers were
fitted to runs with FLUX.1-dev's shapes on an H100 (scripts/bench_memory.py; scripts/results/memory.json has predicted
beside measured). A model of another kind is taken for a FLUX of its width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from srpo_core.checks import FROZEN_BYTES, Footprint, footprint_of
from srpo_core.compiling import compiles
from srpo_core.config import LoraConfig, MoreReward, RewardConfig, RunConfig
from srpo_core.interfaces import Components, TrainableFlow
from srpo_core.lora import linear_shapes, target_shapes
from srpo_core.sharding import is_sharded, shards

CONTEXT = 600 * 2**20
"""Bytes that CUDA itself and its libraries take in a process."""
SEVERAL = 2**30
"""Bytes beside for the connections and the sums of a run of several processes."""
FRAGMENTS = 0.04
"""What the allocator holds beyond what is in use, as a share of it."""
NARROW = 2
"""Bytes of a number in bfloat16, for which the numbers below stand; in float32 activations are twice that."""
BLOCK, FORWARD = 120, 60
"""Bytes for each token and unit of width: of the block whose backward pass runs, and of a forward pass without
gradient."""
KEPT, KEPT_INPUT, KEPT_WHOLE = 25.4, 1.64, 54
"""The same of every block where nothing is recomputed: beside a LoRA, more for each of its layers in a block by the
width of the layer's input; and where all weights are trained."""
KEPT_COMPILED, KEPT_WHOLE_COMPILED = 17.0, 37.5
"""Likewise of compiled blocks, which keep less between their operations (H200, scripts/results/bench_step.json)."""
EXPANDED = 0.73
"""Share of the matrices in 8 bits that stay expanded where nothing is recomputed: no gradient passes those of
modulations."""
DECODE_KEPT, DECODE_RECOMPUTED, DECODE = 11_700, 4_700, 2_460
"""Bytes for each pixel of a decoder of 128 channels: with gradient, with gradient and recomputed, without gradient."""
DECODER_WIDTH = 128
PLAIN_DECODER = 0.25
"""Share of these of a decoder without norms, such as TAESD."""
ENCODING = 256 * 2**20
"""Bytes for a batch of prompts in text encoders that are large."""
WORKSPACE = 140 * 2**20
"""Bytes that libraries of matrix products keep."""
REWARD_PARAMETERS = {
    "hpsv2": 986_109_441,
    "pickscore": 986_109_441,
    "imagereward": 447_000_000,
    "aesthetic": 428_500_000,
    "miniature": 4_600_000,
}
"""Of rewards that come in one size."""
Size = tuple[int, int]


@dataclass(frozen=True)
class Shapes:
    """What a run's memory depends on beside its settings; counts of parameters where nothing else is said."""

    flow: TrainableFlow
    """The model, or its outline on meta."""
    matrices: int
    """Those that model.frozen_memory holds in few bits."""
    largest_matrix: int
    blocks: tuple[int, ...]
    """Those of each block, as they follow one another."""
    width: int
    """Numbers of a token between blocks."""
    text_tokens: int
    embeds: int
    """Numbers of a prompt's embeddings."""
    autoencoder: int
    decoder: float
    """What its decoder's activations take, as a share of FLUX's own."""
    text: int
    text_matrices: int
    rewards: tuple[int, ...]
    """Of config.reward and of each in config.reward.more."""

    def tokens(self, height: int, width: int) -> int:
        """Tokens of a picture and its prompt: a token is a patch of 2 x 2 latents."""
        _, rows, columns = self.flow.latent_shape(height, width)
        return max(1, rows * columns // 4) + self.text_tokens


def shapes_of(config: RunConfig, components: Components) -> Shapes:
    """The shapes of a run's models; of a large family only headers are read."""
    flow, vae = components.outline(), getattr(components.autoencoder_outline(), "module", nn.Module())
    blocks = [module for module in flow.module.modules() if isinstance(module, flow.block_types)]
    matrices = [shape for block in blocks for shape in linear_shapes(block).values()]
    widths = Counter(columns for _, columns in matrices)
    texts = components.text_outline()
    embeds = components.embeds_outline()
    return Shapes(
        flow=flow,
        matrices=sum(rows * columns for rows, columns in matrices),
        largest_matrix=max((rows * columns for rows, columns in matrices), default=0),
        blocks=tuple(map(_count, blocks)),
        width=widths.most_common(1)[0][0] if widths else 0,
        text_tokens=max((shape[0] for shape in embeds.values() if len(shape) == 2), default=0),
        embeds=sum(math.prod(shape) for shape in embeds.values()),
        autoencoder=_count(vae),
        decoder=_decoder_share(vae),
        text=sum(map(_count, texts)),
        text_matrices=sum(rows * columns for text in texts for rows, columns in linear_shapes(text).values()),
        rewards=tuple(_reward_parameters(one) for one in (config.reward, *config.reward.more)),
    )


def _bytes(dtype: str) -> int:
    """Of a number in float32 or bfloat16."""
    return NARROW if dtype == "bfloat16" else 4


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _decoder_share(module: nn.Module) -> float:
    """By the channels of the last convolution, at the picture's full size; without norms there is far less to keep."""
    last = [layer.in_channels for layer in module.modules() if isinstance(layer, nn.Conv2d) and layer.out_channels == 3]
    plain = not any(isinstance(layer, nn.GroupNorm) for layer in module.modules())
    return (last[-1] if last else DECODER_WIDTH) / DECODER_WIDTH * (PLAIN_DECODER if plain else 1.0)


def _reward_parameters(reward: RewardConfig | MoreReward) -> int:
    """0 for a reward of the user's own, which nothing is known about."""
    if reward.name != "clip":
        return REWARD_PARAMETERS.get(reward.name, 0)
    from srpo_core.rewards.clip_files import examine_clip
    from srpo_core.rewards.paths import reward_path

    total = 0
    for shape in examine_clip(*reward_path(reward, "clip")).shapes.values():
        count = 1
        for side in shape:
            count *= side
        total += count
    return total


@dataclass(frozen=True)
class Estimate:
    """Bytes of the device's memory by phase of a run, as the process sees them: without what CUDA itself takes."""

    phases: Mapping[str, int]
    beside: int = CONTEXT
    """Bytes that CUDA and its libraries take in the run's process."""

    @property
    def peak(self) -> int:
        """The most that is in use at once."""
        return max(self.phases.values())

    @property
    def phase(self) -> str:
        """When that is."""
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def on_card(self) -> int:
        """What the card must have free for the run."""
        return round(self.peak * (1 + FRAGMENTS)) + self.beside


def estimate(config: RunConfig, shapes: Shapes) -> Estimate:
    """A run's memory by phase. ConfigError if lora.targets or the size can't be used."""
    model, data, footprint = config.model, config.data, footprint_of(config, shapes.flow)
    number, parts = _bytes(model.dtype), shards(config.parallel)
    still = WORKSPACE + number * shapes.autoencoder + _reward_bytes(config, shapes)
    still += 0 if config.parallel.offload else _frozen_bytes(config, footprint, shapes) // parts  # or on the host
    here = footprint.trained_here(config)
    trained, gradients = round(here * footprint.held(config)), round(here * footprint.held_while_training(config))
    size, copied = (data.height, data.width), _copy(config, footprint, shapes)
    together = min(config.rollout.at_once, config.optim.accumulation)
    drawing = max(_calling(config, footprint, shapes, size), _decoding(config, shapes, size, False))
    micros, stays = _micro_batches(config, shapes, size), config.parallel.gathered
    without = still + trained + micros + _gathered(config, shapes, stays != "layer")
    with_gradient = still + trained + micros + _gathered(config, shapes, stays == "step")
    phases = {
        "encoding prompts": _text_bytes(config, shapes),
        "rollout": without + copied + _calling(config, footprint, shapes, size, together),
        # the next step's micro-batches are made when the last backward pass is done
        "gradient step": with_gradient + max(_backward(config, footprint, shapes, size, gradients), gradients + micros),
        "previews": without + drawing,
    }
    if data.photos is not None:
        phases["reading photos"] = without + _decoding(config, shapes, size, False)
    return Estimate(phases, beside(config))


def beside(config: RunConfig) -> int:
    """Bytes that CUDA and its libraries take in each of the run's processes."""
    return CONTEXT + (SEVERAL if config.parallel.processes * config.parallel.nodes > 1 else 0)


def _micro_batches(config: RunConfig, shapes: Shapes, size: Size) -> int:
    """A step's prompts as they are encoded, in model.dtype, with noise and clean latents in float32."""
    number = _bytes(config.model.dtype)
    each = number * shapes.embeds + 2 * 4 * math.prod(shapes.flow.latent_shape(*size))
    return config.optim.accumulation * config.data.batch_size * each


def _gathered(config: RunConfig, shapes: Shapes, whole: bool) -> int:
    """What a process holds of the others' parts all the time: the whole model, or what is outside of its blocks."""
    if not is_sharded(config.parallel):
        return 0
    number = _bytes(config.model.dtype)
    return number * (_count(shapes.flow.module) - (0 if whole else sum(shapes.blocks)))


def _reward_bytes(config: RunConfig, shapes: Shapes) -> int:
    rewards = zip((config.reward, *config.reward.more), shapes.rewards, strict=True)
    return sum(count * _bytes(one.dtype) for one, count in rewards)


def _frozen_bytes(config: RunConfig, footprint: Footprint, shapes: Shapes) -> int:
    number = _bytes(config.model.dtype)
    if config.model.frozen_memory != "full" and footprint.frozen:
        held = FROZEN_BYTES[config.model.frozen_memory]
        return round(held * shapes.matrices) + number * (footprint.frozen - shapes.matrices)
    return number * footprint.frozen


def _text_bytes(config: RunConfig, shapes: Shapes) -> int:
    """Text encoders at work; with `offload` the largest thing on the device at a time is their table of words."""
    number = _bytes(config.model.dtype)
    beside = ENCODING if shapes.text else 0
    if config.model.t5_memory == "8bit":
        return shapes.text_matrices + number * (shapes.text - shapes.text_matrices) + beside
    held = shapes.text if config.model.t5_memory == "full" else 3 * shapes.text // 8
    return number * held + beside


def _narrow_copies(config: RunConfig, footprint: Footprint) -> int:
    """Trained weights in bfloat16 beside those in float32, as long as a forward pass lasts."""
    whole = bool(config.lora.rank) or shards(config.parallel) == 1
    cast = whole and config.model.dtype == "bfloat16" and config.model.trained_memory == "float32"
    return NARROW * footprint.trained if cast else 0


def _copy(config: RunConfig, footprint: Footprint, shapes: Shapes) -> int:
    """The copy in fp8 that is rolled out: a byte for each number of the layers that a LoRA of all would go beside.

    Matrices that are held in fp8 anyway need none, but their LoRA is there in model.dtype.
    """
    if config.rollout.precision != "fp8":
        return 0
    if config.lora.rank and config.model.frozen_memory == "fp8":
        return _bytes(config.model.dtype) * footprint.trained
    layers = target_shapes(shapes.flow, LoraConfig(targets="all"))
    return sum(rows * columns for rows, columns in layers.values())


def _forward(config: RunConfig, footprint: Footprint, shapes: Shapes, size: Size, together: int = 1) -> int:
    """Activations of a forward pass without gradient, of so many micro-batches together."""
    wide = 1 if config.model.dtype == "bfloat16" else 2
    expanded = 3 * shapes.largest_matrix if config.model.frozen_memory != "full" else 0
    return wide * FORWARD * together * _units(config, shapes, size) + _narrow_copies(config, footprint) + expanded


def _calling(config: RunConfig, footprint: Footprint, shapes: Shapes, size: Size, together: int = 1) -> int:
    """A forward pass without gradient, of a model in parts with the blocks that it gathers.

    FSDP holds a block as it came until the next one has come, which takes as much again as it is copied.
    """
    activations = _forward(config, footprint, shapes, size, together)
    if not is_sharded(config.parallel) or config.parallel.gathered != "layer":
        return activations
    block = _bytes(config.model.dtype) * max(shapes.blocks, default=0)
    return max(activations + 2 * block, 3 * block)


def _units(config: RunConfig, shapes: Shapes, size: Size) -> int:
    """Numbers of a micro-batch's tokens between blocks, as far as this process works on them."""
    return config.data.batch_size * shapes.tokens(*size) * shapes.width // config.parallel.context


def _together(config: RunConfig) -> int:
    """Branches of a micro-batch in one pass, with all draws."""
    return min(config.align.at_once, config.aligned())


def _backward(config: RunConfig, footprint: Footprint, shapes: Shapes, size: Size, gradients: int) -> int:
    """What the gradient step holds at its peak: the decoder's backward pass, or that of a block of the model.

    In the first of several passes no `gradients` are there but those of blocks that are done with; then all are.
    """
    model, units = config.model, _together(config) * _units(config, shapes, size)
    number, wide = (NARROW, 1) if model.dtype == "bfloat16" else (4, 2)
    block = wide * BLOCK * units
    if model.recompute:
        kept = number * units * len(shapes.blocks)
        if model.frozen_memory != "full":
            block += number * max(shapes.blocks, default=0) + 8 * shapes.largest_matrix
    else:
        kept = round(wide * _kept(config, shapes) * units) + _narrow_copies(config, footprint)
        if model.frozen_memory != "full":
            kept += round(number * EXPANDED * shapes.matrices)
    later = gradients if config.backward_passes() > 1 else 0
    decoding = max(_narrow_copies(config, footprint), _decoding(config, shapes, size, True))
    return max(later + kept + decoding, _block_backward(config, shapes, kept, block, gradients))


def _block_backward(config: RunConfig, shapes: Shapes, kept: int, block: int, held: int) -> int:
    """A block's backward pass, which takes `block` for activations; those before it are `kept` for theirs.

    In a model in parts the block and the next one are gathered (parallel.gathered=step has counted them), its own
    gradients come to be as activations go, and those of the one before are on their way. All gradients together are
    `held`; in the only pass of a step, those of the blocks that are done with.
    """
    count, total = len(shapes.blocks), max(1, sum(shapes.blocks))
    number = _bytes(config.model.dtype)
    fetched = gradients = sent = 0
    if is_sharded(config.parallel):
        fetched = 0 if config.parallel.gathered == "step" else 2 * number
        gradients, sent = (0, 0) if config.lora.rank else (number, _bytes(config.parallel.gradients))
    once, left, most = config.backward_passes() == 1, total, held + block
    for place, size in reversed(list(enumerate(shapes.blocks, 1))):  # the last block's comes first
        there = round(held * (1 - left / total)) if once else held
        remaining = kept * place // count if is_sharded(config.parallel) or once else kept
        most = max(most, there + remaining + max(block, gradients * size) + (fetched + sent) * size)
        left -= size
    return most


def _kept(config: RunConfig, shapes: Shapes) -> float:
    """Bytes for each token and unit of width of all blocks, where nothing is recomputed."""
    compiled = compiles(config)
    if not config.lora.rank:
        return (KEPT_WHOLE_COMPILED if compiled else KEPT_WHOLE) * len(shapes.blocks)
    inputs = sum(columns for _, columns in target_shapes(shapes.flow, config.lora).values())
    return (KEPT_COMPILED if compiled else KEPT) * len(shapes.blocks) + KEPT_INPUT * inputs / max(1, shapes.width)


def _decoding(config: RunConfig, shapes: Shapes, size: Size, gradient: bool) -> int:
    """Activations of the decoder, the reward's own aside."""
    each = (DECODE_RECOMPUTED if config.model.recompute else DECODE_KEPT) if gradient else DECODE
    wide = 1 if config.model.dtype == "bfloat16" else 2
    pixels = (_together(config) if gradient else 1) * config.data.batch_size * size[0] * size[1]
    return round(wide * each * pixels * shapes.decoder)

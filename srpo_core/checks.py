"""What can be said about a run before its models are loaded: files, sizes, memory. Everything wrong is told at once."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from srpo_core.attention import NATIVE, PACKAGES
from srpo_core.config import ConfigError, RunConfig
from srpo_core.description import with_changes
from srpo_core.errors import enough_memory
from srpo_core.interfaces import Components, TrainableFlow
from srpo_core.lora import check_start, read_start, target_shapes
from srpo_core.models import MODELS, load_model
from srpo_core.parallel import World
from srpo_core.photos import Photo, check_whole, find_photos
from srpo_core.prompts import read_prompts, without_held_out
from srpo_core.rewards import check_reward
from srpo_core.run_folder import check_space
from srpo_core.sharding import is_sharded, shards
from srpo_core.training_data import needs_prompts, photo_sizes, sources
from srpo_core.weights.fp8_linear import check_fp8
from srpo_core.weights.lora_names import Lora

WHOLE = {
    "model.frozen_memory": "full",
    "model.trained_memory": "float32",
    "optim.states": "float32",
    "rollout.precision": "model",
}
"""What a model in parts needs of settings that hold numbers in fewer bits: its parts are small as they are."""


@dataclass(frozen=True)
class Inputs:
    """What the user's files hold, beside the models."""

    photos: Sequence[Photo]
    start: Lora | None
    """The LoRA that training starts from."""


@dataclass(frozen=True)
class Ready:
    """A run that every check without weights has passed."""

    inputs: Inputs
    components: Components
    footprint: Footprint
    prompts: Sequence[str]
    """To train on; none where the run trains on photos alone."""
    held_out: Sequence[str]


TRAINED_BYTES = {"float32": 4, "bfloat16": 2}
"""Of a trained weight or its gradient, by model.trained_memory."""
MOMENTS_BYTES = {"float32": 8, "8bit": 2 + 8 / 256}
"""Of a trained weight's two moments, by optim.states."""
FROZEN_BYTES = {"8bit": 1.0, "fp8": 1.0, "4bit": 0.5 + 1 / 64}
"""Of a frozen matrix's number, by model.frozen_memory, where that is less than model.dtype."""


@dataclass(frozen=True)
class Footprint:
    """How many parameters a run trains and how many it leaves as they are."""

    trained: int
    frozen: int
    layers: int
    """Layers that get a LoRA; 0 where all parameters are trained."""

    def least_bytes(self, config: RunConfig) -> int:
        """Memory of a GPU for weights, gradients and optimizer: more is needed, less can't be."""
        number = 2 if config.model.dtype == "bfloat16" else 4
        each = FROZEN_BYTES.get(config.model.frozen_memory, number)  # nearly all of them are matrices
        frozen = 0 if config.parallel.offload else self.frozen * each / shards(config.parallel)
        return round(self.trained_here(config) * (self.held(config) + self.held_while_training(config)) + frozen)

    def trained_here(self, config: RunConfig) -> float:
        """Trained parameters on a process's device: its part of them, or all of a LoRA beside a model in parts."""
        if config.lora.rank:
            return self.trained
        return 0 if config.parallel.offload else self.trained / shards(config.parallel)

    def held(self, config: RunConfig) -> float:
        """Bytes on the device for each trained number, all the time: the weight, its moments, its average."""
        narrow = config.model.trained_memory == "bfloat16"  # its average is on the host
        average = 4 if config.optim.ema_decay and not narrow else 0
        return TRAINED_BYTES[config.model.trained_memory] + MOMENTS_BYTES[config.optim.states] + average

    def held_while_training(self, config: RunConfig) -> float:
        """Bytes for each trained number's gradient."""
        return TRAINED_BYTES[config.model.trained_memory]

    def checkpoint_bytes(self, config: RunConfig) -> int:
        """Size of a checkpoint: weights, two moments, and the average if there is one."""
        weight, moments = TRAINED_BYTES[config.model.trained_memory], MOMENTS_BYTES[config.optim.states]
        return round(self.trained * (weight + moments + (4 if config.optim.ema_decay else 0)))

    def result_bytes(self, config: RunConfig) -> int:
        """Size of the result's file: a LoRA in float32, or all weights in model.dtype."""
        return self.trained * (4 if config.lora.rank or config.model.dtype == "float32" else 2)


def check_files(config: RunConfig) -> Inputs:
    """Read the user's prompts, captions, photos' headers, LoRA and the reward's header, before models are loaded.

    ConfigError with everything that is wrong, a line each; then the model's files are looked at too.
    """
    complaints: list[str] = []
    photos: list[Photo] = []
    if config.model.frozen_memory != "full" and not config.lora.rank:
        complaints.append(
            f"model.frozen_memory={config.model.frozen_memory!r} freezes the matrices, and lora.rank=0 trains them; set"
            " lora.rank=16, say, or model.frozen_memory=full"
        )
    if config.model.trained_memory == "bfloat16" and config.model.dtype != "bfloat16":
        complaints.append(
            f"model.trained_memory='bfloat16' with model.dtype={config.model.dtype!r}: weights held in bfloat16 are"
            " computed with in bfloat16; set model.dtype=bfloat16, or model.trained_memory=float32"
        )
    start = None
    for setting in ("prompts", "eval_prompts") if needs_prompts(config.data) else ("eval_prompts",):
        value = getattr(config.data, setting)
        if value != "builtin":
            with _noted(complaints):
                read_prompts(value, f"data.{setting}", column=config.data.prompt_column)
    with _noted(complaints):
        if config.data.photos is not None:
            photos = find_photos(config.data.photos, column=config.data.prompt_column)
            photo_sizes(config.data, photos)
    with _noted(complaints):
        check_reward(config.reward)
    with _noted(complaints):
        start = read_start(config.lora)
    if complaints:
        with _noted(complaints):
            _check_model(config)
        many = f"{len(complaints)} things to put right:\n  " if len(complaints) > 1 else ""
        raise ConfigError(many + "\n  ".join(complaints))
    return Inputs(photos, start)


def check_run(config: RunConfig, world: World) -> Ready:
    """Every check that needs no weights, for the start of a run and for `--check`. ConfigError with the reason."""
    inputs = check_files(config)
    with enough_memory("loading the model", "a LoRA (lora.rank=16) or model.dtype=bfloat16 needs less"):
        components = load_model(config.model, world.device)
    footprint = check_fit(config, components.outline(), inputs, world.device)
    prompts, held_out = run_texts(config, components.prompts)
    check_space(config, footprint.checkpoint_bytes(config), footprint.result_bytes(config))
    check_whole(inputs.photos, f"data.photos={config.data.photos!r}")
    return Ready(inputs, components, footprint, prompts, held_out)


@contextlib.contextmanager
def _noted(complaints: list[str]) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        complaints.append(str(error))


def _check_model(config: RunConfig) -> None:
    """The family's own `check`, if it is one of ours and has one."""
    if config.model.family in MODELS:
        module = importlib.import_module(MODELS[config.model.family].partition(":")[0])
        if hasattr(module, "check"):
            module.check(config.model)


def check_fit(config: RunConfig, flow: TrainableFlow, inputs: Inputs, device: torch.device) -> Footprint:
    """ConfigError if the model, as far as its outline tells, can't take the sizes, the LoRA or the device's memory."""
    _check_sizes(config, flow, inputs.photos)
    size = (config.data.height, config.data.width)
    check_sharing(config, flow, sorted({size, *photo_sizes(config.data, inputs.photos)}))
    if inputs.start is not None:
        check_start(inputs.start, config.lora, flow)
    if config.model.attention not in ("auto", "native") and not hasattr(flow, "attention"):
        raise ConfigError(
            f"model.attention={config.model.attention!r}: model.family={config.model.family!r} has kernels of its own"
            " (choices: auto, native)"
        )
    if config.rollout.precision == "fp8":
        check_fp8(device, "rollout.precision='fp8'")
    footprint = footprint_of(config, flow)
    total, least = device_memory(device), footprint.least_bytes(config)
    if total is not None and least > total:
        way_out = _way_out(config, footprint, total)
        raise ConfigError(
            f"lora.rank={config.lora.rank}: weights, gradients and optimizer alone take {least / 2**30:.1f} GiB,"
            f" {device} has {total / 2**30:.1f} GiB; {way_out}"
        )
    return footprint


def _way_out(config: RunConfig, footprint: Footprint, total: int) -> str:
    """What to do about weights, gradients and optimizer that take more than there is."""
    ways = []
    for what, change in (("hold them in fewer bits", _fewer_bits(config)), ("share them out", in_parts(config))):
        least = footprint.least_bytes(with_changes(config, change))
        if change and least < total:
            settings = " ".join(f"{name}={value}" for name, value in change.items())
            ways.append(f"{what} ({settings}: {least / 2**30:.1f} GiB)")
    if not config.lora.rank:
        ways.append("train a LoRA (lora.rank=16)")
    return ", or ".join(ways) or "a larger device is needed"


def _fewer_bits(config: RunConfig) -> dict[str, object]:
    """Settings that hold all trained weights in the fewest bits; none for a LoRA or a model in parts."""
    if config.lora.rank or config.parallel.strategy != "replicate":
        return {}
    weights = {"model.trained_memory": "bfloat16"} if config.model.dtype == "bfloat16" else {}
    return weights | {"optim.states": "8bit"}


def in_parts(config: RunConfig) -> dict[str, object]:
    """Settings with which several processes hold a part of the model each; none where one alone has it, or they do."""
    if config.parallel.strategy != "replicate" or config.parallel.processes * config.parallel.nodes == 1:
        return {}
    return {"parallel.strategy": "shard", **{name: WHOLE[name] for name in _narrowed(config)}}


def misplaced(config: RunConfig) -> dict[str, object]:
    """Settings, by their names with sections, that a model in parts can't have and this one in parts has."""
    return _narrowed(config) if config.parallel.strategy != "replicate" else {}


def _narrowed(config: RunConfig) -> dict[str, object]:
    """Settings that have other values than WHOLE says."""
    values = {name: getattr(getattr(config, name.partition(".")[0]), name.partition(".")[2]) for name in WHOLE}
    return {name: value for name, value in values.items() if value != WHOLE[name]}


def check_sharing(config: RunConfig, flow: TrainableFlow, sizes: Sequence[tuple[int, int]]) -> None:
    """ConfigError if settings of several processes don't go together, or with the model and the sizes of pictures."""
    parallel = config.parallel
    for name, value in misplaced(config).items():
        raise ConfigError(
            f"{name}={value!r} with parallel.strategy={parallel.strategy!r}: of a model in parts that can't be; set"
            f" {name}={WHOLE[name]} or parallel.strategy=replicate"
        )
    lonely, replicated = not is_sharded(parallel), parallel.strategy == "replicate"
    stays = parallel.gathered != "layer" and replicated  # one process alone has gathered all
    narrow = parallel.gradients != "float32"
    if narrow and config.lora.rank:
        raise ConfigError(
            f"parallel.gradients={parallel.gradients!r} with lora.rank={config.lora.rank}: a LoRA is whole on every"
            " process; leave parallel.gradients out, or set lora.rank=0"
        )
    of_parts = {"offload": lonely and parallel.offload, "gathered": stays, "gradients": narrow and replicated}
    for name, useless in of_parts.items():
        if useless:
            raise ConfigError(
                f"parallel.{name}={getattr(parallel, name)!r} is for a model in parts: set parallel.strategy=shard and"
                f" parallel.processes above 1, or leave parallel.{name} out"
            )
    if parallel.context > 1:
        check = getattr(flow, "check_context", None)
        if check is None:
            raise ConfigError(
                f"parallel.context={parallel.context}: model.family={config.model.family!r} can't share a picture among"
                " processes (choices: 1)"
            )
        check(parallel.context, sizes)
        if config.model.attention in PACKAGES:
            raise ConfigError(
                f"model.attention={config.model.attention!r} with parallel.context={parallel.context}: that kernel sees"
                f" each process's own tokens alone (choices: auto, native, {', '.join(NATIVE)})"
            )


def check_size(flow: TrainableFlow, height: int, width: int) -> None:
    """ConfigError, with the settings' names, if the flow can't make pictures of data.height x data.width."""
    try:
        flow.latent_shape(height, width)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"data.height={height}, data.width={width}: {error}") from error


def _check_sizes(config: RunConfig, flow: TrainableFlow, photos: Sequence[Photo]) -> None:
    data = config.data
    check_size(flow, data.height, data.width)
    for height, width in sorted(set(photo_sizes(data, photos))) if data.bucket_step else ():
        try:
            flow.latent_shape(height, width)
        except ValueError as error:
            raise ConfigError(
                f"data.bucket_step={data.bucket_step} gives photos {width} x {height} pixels, which this model doesn't"
                f" take; a multiple of its own step is needed, such as 64 ({error})"
            ) from error


def size_notes(config: RunConfig, components: Components) -> list[str]:
    """A line for the user if the model was made for pictures of another size; none otherwise."""
    height, width, side = config.data.height, config.data.width, components.side
    if side is None or height == width == side:
        return []
    return [
        f"warning: {config.model.family} was trained on pictures of {side} x {side}; at {width} x {height} (data.width,"
        " data.height) it draws worse ones"
    ]


def footprint_of(config: RunConfig, flow: TrainableFlow) -> Footprint:
    """The run's parameters by the flow's shapes. ConfigError if lora.targets names no layers."""
    count = sum(parameter.numel() for parameter in flow.module.parameters())
    if not config.lora.rank:
        return Footprint(count, 0, 0)
    shapes = target_shapes(flow, config.lora)
    return Footprint(config.lora.rank * sum(sum(shape) for shape in shapes.values()), count, len(shapes))


def device_memory(device: torch.device) -> int | None:
    """Bytes of a CUDA device; None for others, whose memory is the host's and may be swapped."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def run_texts(config: RunConfig, builtin: Mapping[str, Sequence[str]]) -> tuple[list[str], list[str]]:
    """(training prompts less the held-out ones, none where the run trains on photos alone; held-out prompts).

    `builtin` are the family's own. ConfigError if there are none.
    """
    data = config.data
    held_out = read_prompts(data.eval_prompts, "data.eval_prompts", builtin.get("eval", ()), data.prompt_column)
    _, on_prompts = sources(data, config.seed, config.optim.steps * config.optim.accumulation)
    if not on_prompts:
        return [], held_out
    prompts = read_prompts(data.prompts, "data.prompts", builtin.get("train", ()), data.prompt_column)
    return without_held_out(prompts, held_out), held_out

"""A run, described once: every setting's name, type, default, help and limits stand here and nowhere else.

`load_run("miniature", ["optim.lr=1e-5", "lora.rank=16"])` reads a preset (or a .yaml/.json file, such as a run's own
run.json), applies overrides and validates. Presets, the command line, run.json and ComfyUI's widgets are all made of
these fields.
"""

from __future__ import annotations

import difflib
import json
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator


class ConfigError(ValueError):
    """A setting is unknown or its value can't be used; the message names the setting, the value and the choices."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)


Fraction = Annotated[float, Field(ge=0, le=1)]
PathText = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path as text; ~ is the user's home."""


class ModelConfig(Section):
    family: str = Field(
        "flux", description="model family: a name in srpo_core.models.MODELS, or module:function for your own"
    )
    path: PathText | None = Field(
        None,
        description="folder in diffusers format with transformer, vae, text encoders and tokenizers; the miniature"
        " family brings its own",
    )
    transformer: PathText | None = Field(
        None, description="folder in diffusers format whose transformer replaces that of `path` (a trained one, say)"
    )
    autoencoder: PathText | None = Field(
        None, description="folder in diffusers format whose autoencoder replaces that of `path`"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16",
        description="precision of the forward and backward passes; trained weights are always kept in float32, those"
        " that a LoRA leaves frozen in this precision",
    )
    recompute: bool = Field(
        True,
        description="recompute transformer and decoder blocks in the backward pass: less memory, about a third more"
        " time",
    )


class DataConfig(Section):
    prompts: PathText = Field(
        "builtin", description="training prompts: a text file with one per line, or `builtin` for the family's own"
    )
    photos: PathText | None = Field(
        None,
        description="folder of images with captions (same name, .txt) to train on instead of rollouts of `prompts`;"
        " each is scaled until it just covers width x height and cropped around its centre",
    )
    eval_prompts: PathText = Field(
        "builtin",
        description="held-out prompts of previews and evaluation: a text file or `builtin`; left out of `prompts` where"
        " they occur there",
    )
    height: int = Field(720, ge=16, le=8192, description="image height in pixels")
    width: int = Field(720, ge=16, le=8192, description="image width in pixels")
    batch_size: int = Field(1, ge=1, le=4096, description="prompts per micro-batch on each device")


class RolloutConfig(Section):
    num_steps: int = Field(25, ge=1, le=1000, description="Euler steps of the rollout without gradient")
    guidance: float = Field(1.0, ge=0, le=100, description="distilled guidance during the rollout")
    shift: float = Field(
        3.0, gt=0, le=100, description="schedule shift s in s*t / (1 + (s-1)*t): of rollouts, levels and previews"
    )
    same_noise: bool = Field(
        True,
        description="draw the same rollout noise on every rank (as published); the levels differ by rank in any case",
    )


class AlignConfig(Section):
    branches: list[Literal["denoise", "inversion"]] = Field(
        ["denoise", "inversion"],
        min_length=1,
        description="branches of a step, in order; without inversion there is no regulariser",
    )
    range_start: int = Field(
        5, ge=0, le=1000, description="entry of the schedule where the training range starts (high noise)"
    )
    range_end: int = Field(
        25, ge=1, le=1000, description="entry of the schedule where the training range ends (lower noise)"
    )
    schedule_steps: int = Field(
        50, ge=2, le=1000, description="length of the schedule that the range's entries refer to"
    )
    levels: int = Field(1000, ge=20, le=100_000, description="L: the training range is cut into this many levels")
    step_fraction: float = Field(
        0.1, gt=0, lt=0.5, description="length of the gradient step as a part of the training range"
    )
    draws_per_rollout: int = Field(1, ge=1, le=64, description="levels trained on from one rollout")
    guidance: float = Field(3.5, ge=0, le=100, description="distilled guidance of the gradient step")
    k_denoise: tuple[float, float] = Field(
        (0.1, 0.25),
        description="share of absolute reward in the denoise branch, at the low-noise and at the high-noise end of the"
        " range; a first number slightly above k_inversion's second keeps structure",
    )
    k_inversion: tuple[float, float] = Field(
        (0.3, 0.01),
        description="the same for the inversion branch; a first number slightly above k_denoise's first cures"
        " over-saturation",
    )

    @model_validator(mode="after")
    def _range(self) -> AlignConfig:
        if not self.range_start < self.range_end < self.schedule_steps:
            entries = f"{self.range_start}, {self.range_end}, {self.schedule_steps}"
            raise ValueError(f"range_start < range_end < schedule_steps must hold, got {entries}")
        if len(set(self.branches)) != len(self.branches):
            raise ValueError(f"branches names a branch twice: {self.branches}")
        return self


class RewardConfig(Section):
    name: str = Field(
        "clip", description="reward to train on: a name in srpo_core.rewards.REWARDS, or module:function for your own"
    )
    path: PathText | None = Field(None, description="its weights, where it needs some: a file or a folder")
    liked: list[str] = Field(
        ["Natural-lighting", "Detail", "Detailed", "Real"],
        min_length=1,
        description="control words to move toward; one a step, in turn",
    )
    disliked: list[str] = Field(
        ["Concept art", "Painting", "Anime", "Flat", "Oil"],
        min_length=1,
        description="control words to move away from; one a step, in turn",
    )
    margin: float = Field(0.7, description="the loss is relu(margin - score): above it an image is good enough")
    scale: float = Field(1.0, gt=0, description="scores are multiplied by this before the margin")


class OptimConfig(Section):
    steps: int = Field(100, ge=1, le=1_000_000, description="optimizer steps of the whole run")
    lr: float = Field(5e-6, gt=0, le=1, description="AdamW learning rate after warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps over which lr rises linearly to its full height")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="course of lr after warm-up: constant, or falling toward 0 at the last step"
    )
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="AdamW betas")
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW weight decay")
    max_grad_norm: float = Field(0.1, gt=0, description="a longer gradient is scaled down to this norm")
    accumulation: int = Field(1, ge=1, le=4096, description="micro-batches per optimizer step")
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of the running average of the trained weights, less in early steps: (1 + step) / (10 +"
        " step); previews and exports use the average; 0 keeps none",
    )


class LoraConfig(Section):
    rank: int = Field(0, ge=0, le=1024, description="LoRA rank; 0 trains all parameters")
    alpha: float | None = Field(
        None, gt=0, description="LoRA alpha: its effect is scaled by alpha / rank; unset means alpha = rank"
    )
    targets: str = Field("all", description="group of layers that get a LoRA: attention, mlp or all")


class ParallelConfig(Section):
    device: str = Field(
        "auto", description="cpu, cuda, cuda:1, mps, ...; auto takes the first of cuda, mps and cpu that is there"
    )


class OutputConfig(Section):
    dir: PathText = Field(
        "runs/srpo", description="folder of the run: run.json, metrics.jsonl, checkpoints, previews, exports"
    )
    checkpoint_every: int = Field(
        10, ge=1, description="steps between checkpoints; the best preview and the last step have theirs in any case"
    )
    keep_checkpoints: int = Field(1, ge=1, description="newest checkpoints kept, beside the best")
    preview_every: int = Field(10, ge=0, description="steps between previews; 0 draws none")
    preview_prompts: int = Field(
        4, ge=1, le=256, description="held-out prompts drawn as previews, always with the same noise"
    )
    preview_steps: int = Field(25, ge=1, le=1000, description="Euler steps of previews and evaluation")
    preview_guidance: float = Field(3.5, ge=0, le=100, description="distilled guidance of previews and evaluation")
    best_by: Literal["relative", "reward"] = Field(
        "relative",
        description="preview score that names the best checkpoint: liked minus disliked wordings, or the plain prompt's"
        " reward",
    )
    evaluate_prompts: int = Field(
        0,
        ge=0,
        description="held-out prompts drawn and scored before and after training, with the same noise; 0 skips it",
    )
    tensorboard: bool = Field(True, description="write TensorBoard event files beside metrics.jsonl")


class RunConfig(Section):
    """Everything that tells one run from another."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    align: AlignConfig = Field(default_factory=AlignConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    output: OutputConfig = Field(default_factory=OutputConfig)
    seed: int = Field(0, ge=0, le=2**63 - 1, description="seed of every random number of the run")


def _section_type(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def describe_fields(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, str, Any, str]]:
    """(dotted name, type, default, description) of every setting."""
    for name, info in model.model_fields.items():
        section = _section_type(info.annotation)
        if section is not None:
            yield from describe_fields(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _type_name(info.annotation), info.get_default(), info.description or ""


def flat(data: Mapping[str, Any], separator: str = ".", prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name with its sections, value) of every entry of a nested dict."""
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from flat(value, separator, f"{prefix}{name}{separator}")
        else:
            yield prefix + name, value


def _type_name(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return " | ".join(str(choice) for choice in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return " | ".join("unset" if part is type(None) else _type_name(part) for part in typing.get_args(annotation))
    if origin is Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if origin in (list, tuple):
        inner = ", ".join(dict.fromkeys(_type_name(part) for part in typing.get_args(annotation)))
        return f"{origin.__name__} of {inner}"
    return getattr(annotation, "__name__", str(annotation))


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    folder = resources.files("srpo_core") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def nearest(name: str, choices: Sequence[str]) -> str:
    """ "; did you mean 'x'?" for the closest choice, then the choices themselves when they are few."""
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return hint + (f" (choices: {', '.join(choices)})" if len(choices) <= 20 else "")


def _read_description(source: str) -> dict[str, Any]:
    path = Path(source)
    if path.suffix in {".yaml", ".yml", ".json"}:
        if not path.is_file():
            raise ConfigError(f"no such run description: {path}")
        content = path.read_bytes()
    elif source in preset_names():
        content = (resources.files("srpo_core") / "presets" / f"{source}.yaml").read_bytes()
    else:
        raise ConfigError(f"unknown preset {source!r}{nearest(source, preset_names())}")
    try:
        text = content.decode("utf-8-sig")
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (UnicodeDecodeError, yaml.YAMLError, json.JSONDecodeError) as error:
        raise ConfigError(f"{source} can't be read: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{source} holds no settings")
    data.pop("made_with", None)
    return data


def _parse_override(override: str) -> tuple[list[str], Any]:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"{override!r} is no setting; write section.name=value, for example optim.lr=1e-5")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}={text!r} can't be read: {error}") from error
    if isinstance(value, str):  # YAML 1.1 reads 1e-5 as a string
        try:
            value = float(value)
        except ValueError:
            value = text
    return key.strip().split("."), value


def _place(data: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise ConfigError(f"unknown setting {'.'.join(keys)!r}: {key!r} is a setting, not a section")
    data[keys[-1]] = value


def _explain(error: ValidationError) -> str:
    names = [name for name, *_ in describe_fields()]
    lines = []
    for problem in error.errors():
        location = [str(part) for part in problem["loc"]]
        name = ".".join(location)
        if problem["type"] == "extra_forbidden":
            siblings = [n for n in names if location[1:] and n.split(".")[:-1] == location[:-1]] or list(
                RunConfig.model_fields
            )
            everywhere = [n for n in names if n.split(".")[-1] == location[-1]]
            hint = f"; did you mean {everywhere[0]!r}?" if everywhere else nearest(name, siblings)
            lines.append(f"unknown setting {name!r}{hint}")
        else:
            lines.append(f"{name}={problem['input']!r}: {problem['msg'].removeprefix('Value error, ')}")
    return "\n".join(lines)


def make_config(data: dict[str, Any]) -> RunConfig:
    """Validate a nested dict of settings. ConfigError names each bad setting and, for unknown ones, the nearest one."""
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def load_run(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """A preset's name or a .yaml/.json file, with overrides such as "optim.lr=1e-5"."""
    data = _read_description(source)
    for override in overrides:
        keys, value = _parse_override(override)
        _place(data, keys, value)
    return make_config(data)

"""A run's description as text: presets, files, settings on the command line, and what each setting is.

`load_run("miniature", ["optim.lr=1e-5", "lora.rank=16"])` reads a preset (or a .yaml/.json file, such as a run's own
run.json), applies overrides and validates.
"""

from __future__ import annotations

import hashlib
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ValidationError

from srpo_core.config import ConfigError, MoreReward, RunConfig, nearest

DIGEST = "SRPO_RUN_SHA256"
"""Holds, in the environment of a process that was started to train, the digest of the description that was checked."""
ELSEWHERE = {
    "learning_rate": "optim.lr",
    "max_train_steps": "optim.steps",
    "max_steps": "optim.steps",
    "gradient_accumulation_steps": "optim.accumulation",
    "lr_scheduler": "optim.schedule",
    "lr_warmup_steps": "optim.warmup_steps",
    "adam_weight_decay": "optim.weight_decay",
    "gradient_clipping": "optim.max_grad_norm",
    "train_batch_size": "data.batch_size",
    "resolution": "data.height",
    "image_folder": "data.photos",
    "gradient_checkpointing": "model.recompute",
    "mixed_precision": "model.dtype",
    "pretrained_model_name_or_path": "model.path",
    "lora_rank": "lora.rank",
    "network_dim": "lora.rank",
    "lora_alpha": "lora.alpha",
    "network_alpha": "lora.alpha",
    "reward_model": "reward.name",
    "output_dir": "output.dir",
    "checkpointing_steps": "output.checkpoint_every",
}
"""What other programs call our settings."""


def _section_type(annotation: Any) -> type[BaseModel] | None:
    plain = typing.get_origin(annotation) is None  # Python 3.10 takes list[str] for a class
    return annotation if plain and isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def describe_fields(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, str, Any, str]]:
    """(dotted name, type, default, description) of every setting."""
    for name, info in model.model_fields.items():
        section = _section_type(info.annotation)
        if section is not None:
            yield from describe_fields(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _type_name(info.annotation), info.get_default(), info.description or ""


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


def _read_description(source: str, sha256: str | None = None) -> dict[str, Any]:
    path = Path(source)
    if path.suffix in {".yaml", ".yml", ".json"}:
        if not path.is_file():
            raise ConfigError(f"no such run description: {path}")
        content = path.read_bytes()
    elif source in preset_names():
        content = (resources.files("srpo_core") / "presets" / f"{source}.yaml").read_bytes()
    else:
        raise ConfigError(f"unknown preset {source!r}{nearest(source, preset_names())}")
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise ConfigError(f"{source} has changed since the run was started; start it again")
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
    except (yaml.YAMLError, ValueError) as error:  # 2020-13-45 looks like a date and is none
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
            wanted = ELSEWHERE.get(location[-1].lower(), location[-1])
            everywhere = [n for n in names if wanted in (n, n.split(".")[-1])]
            hint = f"; did you mean {everywhere[0]!r}?" if everywhere else nearest(name, siblings)
            if location[:2] == ["reward", "more"]:
                hint = nearest(location[-1], list(MoreReward.model_fields))
            lines.append(f"unknown setting {name!r}{hint}")
        else:
            value = "" if isinstance(problem["input"], dict) else f"={problem['input']!r}"  # of a section: too much
            lines.append(f"{name}{value}: {reason_of(problem)}")
    return "\n".join(lines)


def reason_of(problem: Mapping[str, Any]) -> str:
    """What pydantic has against a value, in words for a user."""
    if problem["type"] == "too_short":
        return f"at least {problem['ctx']['min_length']} is needed"
    return problem["msg"].removeprefix("Value error, ")


def make_config(data: dict[str, Any]) -> RunConfig:
    """Validate a nested dict of settings. ConfigError names each bad setting and, for unknown ones, the nearest one."""
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def with_changes(config: RunConfig, changes: Mapping[str, object]) -> RunConfig:
    """The run with some settings changed, given by their names with sections."""
    data = config.model_dump()
    for name, value in changes.items():
        section, _, key = name.partition(".")
        data[section][key] = value
    return make_config(data)


def load_run(source: str, overrides: Sequence[str] = (), sha256: str | None = None) -> RunConfig:
    """A preset's name or a .yaml/.json file, with overrides such as "optim.lr=1e-5".

    ConfigError if the content isn't that of the digest `sha256`, where one is given.
    """
    data = _read_description(source, sha256)
    for override in overrides:
        place_override(data, override)
    return make_config(data)


def place_override(data: dict[str, Any], override: str) -> None:
    """Put a setting such as "optim.lr=1e-5" into a nested dict of settings. ConfigError if it is none."""
    keys, value = _parse_override(override)
    _place(data, keys, value)

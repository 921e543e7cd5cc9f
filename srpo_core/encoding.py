"""`srpo encode`: the embeddings of a run's prompts, made before it starts, by one process or by several."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from srpo_core.config import ConfigError, RunConfig
from srpo_core.devices import divided_world
from srpo_core.embeddings import EmbeddingCache, embedding_cache, encode
from srpo_core.interfaces import Components
from srpo_core.models import load_model
from srpo_core.parallel import World
from srpo_core.photos import find_photos
from srpo_core.progress import Display
from srpo_core.prompts import read_prompts
from srpo_core.training_data import needs_prompts


@dataclass(frozen=True)
class Encoded:
    """What a process did: the prompts of its share, how many of them it encoded, and their files' bytes."""

    folder: Path
    prompts: int
    made: int
    bytes: int
    world: World

    def __str__(self) -> str:
        whose = "" if self.world.size == 1 else f"rank {self.world.rank} of {self.world.size}: "
        there = self.prompts - self.made
        return (
            f"{whose}{self.made} {'prompt' if self.made == 1 else 'prompts'} encoded, {there} there already:"
            f" {self.bytes / 1e6:.1f} MB in {self.folder}"
        )


def all_prompts(config: RunConfig, components: Components) -> list[str]:
    """Held-out prompts, training prompts and captions of a run, each once."""
    data, builtin = config.data, components.prompts
    found = read_prompts(data.eval_prompts, "data.eval_prompts", builtin.get("eval", ()), data.prompt_column)
    if data.photos is not None:
        found += [photo.caption for photo in find_photos(data.photos, column=data.prompt_column)]
    if needs_prompts(data):
        found += read_prompts(data.prompts, "data.prompts", builtin.get("train", ()), data.prompt_column)
    return list(dict.fromkeys(found))


def encode_run(config: RunConfig, prompts_file: str | None = None) -> Encoded:
    """Encode this process's share of a run's prompts, or of a file's, into the run's cache; what is there stays.

    ConfigError, before anything is loaded, if the files are wrong or the family's embeddings can't be kept.
    """
    world = divided_world(config.parallel)
    own = read_prompts(prompts_file, "--prompts", column=config.data.prompt_column) if prompts_file else None
    components = load_model(config.model, world.device)
    prompts = world.share(all_prompts(config, components) if own is None else list(dict.fromkeys(own)))
    cache = embedding_cache(components.text_encoder, config)
    if cache is None:
        raise ConfigError(
            f"model.family={config.model.family}: its text encoder has no `fingerprint`, so its embeddings can't be"
            " kept on disk; training encodes them each time"
        )
    return _encode_share(cache, components, prompts, world)


def _encode_share(cache: EmbeddingCache, components: Components, prompts: list[str], world: World) -> Encoded:
    missing = cache.missing(prompts)
    with Display(quiet=not world.is_main) as display:
        encode(components.text_encoder, missing, cache=cache, display=display)
    components.release("text_encoder")
    return Encoded(cache.folder, len(prompts), len(missing), cache.size(prompts), world)

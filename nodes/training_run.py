"""A training as SRPO Train's widgets and sockets describe it, and what there is of it already."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from srpo_core.at_work import work_folder
from srpo_core.catalogue import CATALOGUE
from srpo_core.checkpoint import checkpoint_step, latest
from srpo_core.config import ConfigError, RunConfig
from srpo_core.description import load_run, make_config, preset_names
from srpo_core.files import write_atomic
from srpo_core.rewards.mixture import USUAL, WeightedReward
from srpo_core.run_folder import changed_settings, holds_run, load_folder
from srpo_core.run_state import is_alive, read_state

from . import more_settings
from .inputs import Setting, run_values
from .io_types import RunSettings
from .memory import LoadedReward
from .reward_files import AUTO as FILE_AUTO
from .reward_files import NoReward, reward_path
from .run_names import RunPlace
from .run_safety import check
from .training_models import MINIATURE, Complaints, Missing, model_settings, recipe_of

RUN = tuple(
    Setting(name)
    for name in ("optim.steps", "output.preview_every", "output.checkpoint_every", "parallel.processes",
                 "parallel.gpus", "parallel.share_gpu", "parallel.nodes", "parallel.node_rank", "parallel.rendezvous")
)  # fmt: skip
"""SRPO Train's own widgets that are settings as they stand."""
RECORD = "run.json"
There = Literal["nothing", "a part", "at work", "finished"]
SPAN = USUAL["hpsv2"][1] - USUAL["hpsv2"][0]
"""A reward whose scale no recipe gives is brought to the span of the published one."""
TEXTS = ("data.prompts", "data.eval_prompts")
"""Settings whose value is a file of prompts; text from a graph becomes one in the run's folder."""


@dataclass(frozen=True)
class Described:
    """A run as a graph describes it, and the files of prompts that it needs: their texts, not written yet."""

    config: RunConfig
    texts: Mapping[Path, str]


def describe(
    place: RunPlace, given: Mapping[str, Any], settings: Sequence[RunSettings], reward: LoadedReward | None
) -> Described:
    """The run of SRPO Train's widgets (`given`) and sockets.

    The recipe's values give way to the widgets', those to the sockets', and all to more_settings. ConfigError names
    the widget of what can't be, and everything that is missing at once.
    """
    recipe = recipe_of(given["recipe"], given["base"])
    data = load_run(recipe).model_dump()
    data["data"] |= {"prompts": "builtin", "photos": None}
    values = run_values(RUN, given) | {name: value for one in settings for name, value in one.values.items()}
    texts: dict[Path, str] = {}
    for one in settings:
        for name, text in one.texts.items():
            path = _text_file(place.folder, name, text)
            texts[path], values[name] = text, str(path)
    if reward is not None:
        data["reward"] |= _reward(reward, data["reward"])
    for name, value in values.items():
        section, _, field = name.partition(".")
        data[section][field] = value
    for more in data["reward"]["more"] if "reward.margin" in values else ():
        more["margin"] = values["reward.margin"]
    data["seed"] = given["seed"]
    with Complaints() as complaints:
        data["model"] |= model_settings(given, complaints)
        with complaints.noted(), more_settings.blamed(given["more_settings"]):
            config = _finished(data, place, given["more_settings"])
            _check_prompts(config, recipe, complaints)
            _find_rewards(config, complaints)
    return Described(config, texts)


def _finished(data: dict[str, Any], place: RunPlace, lines: str) -> RunConfig:
    """The run of some settings, those of more_settings' lines on top. ConfigError for what can't be or must not be."""
    more_settings.place(data, lines)
    data["output"] |= {"dir": str(place.folder)}
    config = make_config(data)
    config.output.result = str(place.result(full=not config.lora.rank))
    check(config, place.folder)
    return config


def _text_file(folder: Path, name: str, text: str) -> Path:
    """The file of some prompts, by their content: other prompts never take the place of those of a run before."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return folder / f"{name.partition('.')[2]}-{digest}.txt"


@contextlib.contextmanager
def texts_there(texts: Mapping[Path, str]) -> Iterator[Callable[[], None]]:
    """Inside the context files of prompts are there; those that it made are gone after it, unless what it gives is
    called: a run needs them."""
    new = [path for path in texts if not path.is_file()]
    folders = [folder for path in new for folder in path.parents if not folder.exists()]
    try:
        for path in new:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, texts[path])
        yield lambda: (new.clear(), folders.clear())
    finally:
        for path in new:
            path.unlink(missing_ok=True)
        for folder in dict.fromkeys(folders):
            with contextlib.suppress(OSError):  # something else is in it by now
                folder.rmdir()


def _check_prompts(config: RunConfig, recipe: str, complaints: Complaints) -> None:
    """Complain where there is nothing to train on."""
    if config.data.photos is None and config.data.prompts == "builtin" and config.model.family != MINIATURE:
        of_photos = load_run(recipe).data.photos is not None
        what = "source photos" if of_photos else "prompts"
        with complaints.noted():
            raise ConfigError(
                f"prompts: connect SRPO Prompts with {what}; only the miniature brings prompts of its own"
            )


def _find_rewards(config: RunConfig, complaints: Complaints) -> None:
    """Name the files of rewards that have none yet, as this ComfyUI finds them; complain with the way to get them."""
    for one in (config.reward, *config.reward.more):
        if one.path is None:
            with complaints.noted():
                try:
                    path = reward_path(one.name, FILE_AUTO)
                except NoReward as error:
                    raise Missing(f"reward: {CATALOGUE[one.name].what}, is not there", one.name) from error
                one.path = None if path is None else str(path)


def _reward(reward: LoadedReward, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What a run says of a reward or a mixture, beside its words."""
    first, *more = [_part(part, len(reward.parts) > 1, recipe) for part in reward.parts]
    return {**first, "more": more}


def _part(part: WeightedReward, mixed: bool, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """One reward of a run: its file, its scale, its weight.

    Alone it has the scale of the recipe for it; mixed, the one that it has in the mixture, which pulls as HPS does.
    """
    settings = part.reward.settings
    known = recipe if settings["name"] == recipe["name"] else _published(settings["name"])
    found = {"name": settings["name"], "path": settings["path"], "margin": recipe["margin"], "weight": part.weight}
    found["fit"] = settings["fit"] or (known["fit"] if known else "crop")
    if mixed:
        comparable = part.scale != 1 or part.offset
        return found | {"scale": part.scale * (SPAN if comparable else 1), "offset": part.offset}
    if known:
        return found | {"scale": known["scale"], "offset": known["offset"]}
    low, high = USUAL.get(settings["name"], (0.0, SPAN))
    return found | {"scale": SPAN / (high - low), "offset": 0.0}


def _published(name: str) -> dict[str, Any] | None:
    """The reward of the preset that trains on it."""
    for preset in preset_names():
        reward = load_run(preset).reward
        if reward.name == name:
            return reward.model_dump()
    return None


def there_already(config: RunConfig) -> There:
    """What there is of a run. ConfigError if its settings are others, or if it has been trained further.

    Where there is no checkpoint there is nothing to lose, and it may begin with any settings.
    """
    folder, work = Path(config.output.dir), work_folder(config)
    state = read_state(work)
    at_work = state is not None and state.active and is_alive(state)
    if not (work / RECORD).is_file() or not (at_work or holds_run(folder)):
        return "nothing"
    newest = latest(folder)
    if newest is None and not at_work:
        return "a part"
    old = load_folder(folder) if work == folder else load_run(str(work / RECORD))
    changes = {name: (before, now) for name, before, now in changed_settings(old, config)}
    trained = checkpoint_step(newest) if newest is not None else 0
    if at_work and old.optim.steps != config.optim.steps:
        changes["optim.steps"] = (old.optim.steps, config.optim.steps)
    elif trained > config.optim.steps:
        changes["optim.steps"] = (trained, config.optim.steps)
    if changes:
        raise ConfigError(_other_settings(config, changes, "is at work" if at_work else "is there"))
    if at_work:
        return "at work"
    finished = state is not None and state.status == "finished"
    return "finished" if finished and trained == config.optim.steps else "a part"


def _other_settings(config: RunConfig, changes: Mapping[str, tuple[Any, Any]], where: str) -> str:
    folder = Path(config.output.dir)
    lines = "".join(f"\n  {_change(folder, name, *values)}" for name, values in changes.items())
    return (
        f"name={folder.name!r}: a training of this name {where} with other settings; give another name, choose"
        f" if_there='new run', or set them back:{lines}{_why(changes, config)}"
    )


def _change(folder: Path, name: str, before: Any, now: Any) -> str:
    """A setting's two values; of prompts that are text the new file isn't there."""
    if name in TEXTS and Path(now).parent == folder:
        return f"{name}: {before!r} there, other prompts here"
    return f"{name}: {before!r} there, {now!r} here"


def _why(changes: Mapping[str, Any], config: RunConfig) -> str:
    if "optim.steps" in changes and config.optim.schedule != "constant":
        return (
            f"\n(its learning rate falls until its last step, schedule={config.optim.schedule} in SRPO Optimizer, so"
            " the number of steps belongs to it; only with the schedule `constant` can a run be continued. SRPO LoRA's"
            " `start` begins a new one from its result)"
        )
    return ""

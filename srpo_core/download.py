"""`srpo download`: models of the catalogue into ComfyUI's folders or the Hugging Face cache.

First everything is asked and shown: files, sizes, licences, where they go, free disk space. Then each file arrives
beside its place, is checked against the hub's checksum (and the catalogue's) and renamed. What is there stays as it is.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from srpo_core import hub, places
from srpo_core.catalogue import CATALOGUE, Entry, File
from srpo_core.config import ConfigError, nearest
from srpo_core.files import free_bytes, nearest_existing

_SLOW_CHECK = 10**9
"""A checksum of a larger file takes seconds: say so."""


@dataclass(frozen=True)
class Item:
    """A file of the plan. `target` is where its bytes end up, `link` (cache only) the name that points to them."""

    entry: Entry
    repository: hub.Repository
    file: hub.RemoteFile
    target: Path
    link: Path | None = None

    @property
    def part(self) -> Path:
        """Where its bytes arrive: beside the target, another name for other bytes."""
        return self.target.with_name(f".{self.target.name}.{self.file.digest[:12]}.part")

    @property
    def name(self) -> Path:
        """Where others look for it."""
        return self.link or self.target

    @property
    def present(self) -> bool:
        return self.name.exists()

    @property
    def missing(self) -> int:
        """Bytes still to come."""
        if self.present or self.target.exists():
            return 0
        return max(0, self.file.size - (self.part.stat().st_size if self.part.exists() else 0))


def run(names: Sequence[str], to: Sequence[str], yes: bool) -> int:
    """The whole command: ask, show, confirm, fetch, say what to do with it. Its exit code."""
    entries, comfyui = choose(names), destination(to)
    items = plan(entries, comfyui)
    print(show(items, comfyui))
    check_space(items)
    if not confirm(items, yes):
        print("Nothing was downloaded.")
        return 0
    fetch(items)
    lines = "".join(f"  {line}\n" for line in settings(entries, comfyui))
    print(f"\nAll of it is there. As settings of a run:\n{lines}", end="")
    return 0


def choose(names: Sequence[str]) -> list[Entry]:
    """The catalogue's entries by these names, and those that they need. ConfigError for an unknown name."""
    for name in names:
        if name not in CATALOGUE:
            raise ConfigError(f"nothing to download is called {name!r}{nearest(name, list(CATALOGUE))}")
    needed = [need for name in names for need in (name, *CATALOGUE[name].needs)]
    return [CATALOGUE[name] for name in dict.fromkeys(needed)]


def destination(words: Sequence[str]) -> Path | None:
    """What --to says: None for the cache, else ComfyUI's folder. ConfigError if there is none."""
    kind, *rest = words
    if kind == "cache" and not rest:
        return None
    if kind != "comfyui" or len(rest) > 1:
        raise ConfigError(f"--to {' '.join(words)}: write --to cache, --to comfyui or --to comfyui FOLDER")
    root = Path(rest[0]).expanduser() if rest else places.comfyui_root()
    if root is None:
        raise ConfigError("--to comfyui: where is ComfyUI? write --to comfyui FOLDER, or set COMFYUI_PATH")
    if not (root / "models").is_dir():
        name = " (names of models stand before --to)" if rest and rest[0] in CATALOGUE else ""
        raise ConfigError(f"--to comfyui: {root} holds no folder `models`; name ComfyUI's own folder{name}")
    return root


def plan(entries: Sequence[Entry], comfyui: Path | None) -> list[Item]:
    """What has to come and where it goes; asks the hub once for each repository, and whether gated ones let us in.

    DownloadError if the hub lacks a file, refuses it or offers another one than the catalogue knows; ConfigError if
    another file is in the way.
    """
    items: dict[Path, Item] = {}
    repositories: dict[str, hub.Repository] = {}
    for entry in entries:
        for wanted in entry.files:
            if (wanted.place is None) if comfyui else (not wanted.cached):
                continue
            if wanted.repository not in repositories:
                repositories[wanted.repository] = hub.repository(wanted.repository)
            repository = repositories[wanted.repository]
            for file in _matching(repository, wanted):
                item = _placed(entry, repository, file, wanted, comfyui)
                items.setdefault(item.name, item)
    for item in items.values():
        if item.link is None and item.present:
            _check_same(item)
    for repository in repositories.values():
        coming = [item for item in items.values() if item.repository is repository and not item.present]
        if repository.gated and coming:
            hub.check_access(repository, coming[0].file)
    return list(items.values())


def _matching(repository: hub.Repository, wanted: File) -> list[hub.RemoteFile]:
    found = [file for file in repository.files if wanted.matches(file.path)]
    if not found and "*" not in wanted.path:
        raise hub.DownloadError(f"{repository.name} holds no {wanted.path} any more: see {hub.page(repository.name)}")
    for file in found:
        if wanted.sha256 is not None and file.digest != wanted.sha256:
            raise hub.DownloadError(
                f"{repository.name} offers another {file.path} than the one known here (checksum {file.digest}, not"
                f" {wanted.sha256}); see {hub.page(repository.name)} and fetch it yourself if you trust it"
            )
    return found


def _placed(entry: Entry, repository: hub.Repository, file: hub.RemoteFile, wanted: File, comfyui: Path | None) -> Item:
    if comfyui is None:
        folder = places.cache_folder(repository.name)
        link = folder / "snapshots" / repository.commit / file.path
        return Item(entry, repository, file, folder / "blobs" / file.digest, link)
    place = str(wanted.place)
    target = comfyui / "models" / (place + file.path.split("/")[-1] if place.endswith("/") else place)
    kind, below = target.relative_to(comfyui / "models").as_posix().split("/", 1)
    others = [folder / below for folder in places.model_folders(comfyui, kind) if (folder / below).is_file()]
    return Item(entry, repository, file, others[0] if others else target)


def _check_same(item: Item) -> None:
    """ConfigError if what is at the target already is another file than the one to come."""
    path, file = item.target, item.file
    if path.is_file() and path.stat().st_size == file.size:
        _announce_check(path, file)
        if hub.digest(path, file) == file.digest:
            return
    raise ConfigError(
        f"{path} is there already and is not {item.repository.name}'s {file.path}; nothing is overwritten: move it away"
        " or leave it"
    )


def _announce_check(path: Path, file: hub.RemoteFile) -> None:
    if file.size > _SLOW_CHECK:
        print(f"checking {path} ...", flush=True)


def show(items: Sequence[Item], comfyui: Path | None) -> str:
    """The plan as text: what comes from where under which licence, what is there already, whether the disk has room."""
    lines: list[str] = []
    for entry in dict.fromkeys(item.entry for item in items):
        own = [item for item in items if item.entry is entry]
        repository = own[0].repository
        gate = "; gated" if repository.gated else ""
        said = repository.licence if repository.licence and repository.licence != "other" else None
        on_page = f", on its page: {said}" if said and said.lower() != entry.licence.lower() else ""
        lines += [f"{entry.name}: {entry.what}", f"  from {hub.page(repository.name)}"]
        lines += [f"  licence: {entry.licence}{on_page}{gate}"]
        for item in own:
            state = "already there" if item.present else "rest of it" if 0 < item.missing < item.file.size else ""
            where = f" -> {item.target}" if comfyui else ""
            lines.append(f"  {size_text(item.file.size):>9}  {item.file.path}{where}{f'  ({state})' if state else ''}")
    root = comfyui / "models" if comfyui else places.cache_root()
    missing, free = sum(item.missing for item in items), free_bytes(root)
    lines.append(f"To download: {size_text(missing)} into {root}, where {size_text(free)} are free.")
    return "\n".join(lines)


def check_space(items: Sequence[Item]) -> None:
    """DownloadError if a disk has no room for its part of the rest: folders of models may be links to other disks."""
    disks: dict[int, list[Item]] = {}
    for item in items:
        disks.setdefault(nearest_existing(item.target.parent).stat().st_dev, []).append(item)
    for there in disks.values():
        folder, missing = there[0].target.parent, sum(item.missing for item in there)
        free = free_bytes(folder)
        if missing > free:
            raise hub.DownloadError(
                f"no room: {size_text(missing)} are to come and {size_text(free)} are free on the disk of {folder};"
                " make room, or choose another place (--to comfyui FOLDER; HF_HOME for the cache)"
            )


def fetch(items: Sequence[Item], say: Callable[[str], object] = print) -> None:
    """Bring everything that is missing. DownloadError leaves what has arrived, for the next time."""
    for item in items:
        if not item.present:
            item.target.parent.mkdir(parents=True, exist_ok=True)
            with _alone(item):
                if not item.target.exists():
                    _copy_from_cache(item)
                    hub.fetch(item.repository, item.file, item.part)
                    _announce_check(item.part, item.file)
                    hub.verify(item.part, item.file)
                    os.replace(item.part, item.target)
                if item.link is not None:
                    _link(item.target, item.link)
            say(f"{item.file.path}: done")
    for item in items:
        if item.link is not None:
            _write_ref(item.repository)


def _copy_from_cache(item: Item) -> None:
    """Take a file's bytes from the Hugging Face cache, where they are there, instead of fetching them again."""
    blob = places.cache_folder(item.repository.name) / "blobs" / item.file.digest
    if item.link is None and blob.is_file():
        shutil.copyfile(blob, item.part)


@contextlib.contextmanager
def _alone(item: Item) -> Iterator[None]:
    """Inside the context no other process fetches the same file."""
    lock = FileLock(item.part.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise hub.DownloadError(f"{item.target} is being downloaded by another process; wait for it") from None
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):
            item.part.with_suffix(".lock").unlink()


def _link(blob: Path, link: Path) -> None:
    """The cache's name for a blob: a relative link, or the file itself where links can't be made."""
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink():  # to a blob that was gone
        link.unlink()
    try:
        link.symlink_to(os.path.relpath(blob, link.parent))
    except OSError:
        os.replace(blob, link)


def _write_ref(repository: hub.Repository) -> None:
    """Notes the commit that the cache's `main` stands for."""
    ref = places.cache_folder(repository.name) / "refs" / "main"
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(repository.commit, encoding="utf-8")


def size_text(count: int) -> str:
    """Bytes as people read them, in powers of 1000 as the hub shows them: "23.80 GB"."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{count / 10**power:.{2 if unit == 'GB' else 1 if unit == 'MB' else 0}f} {unit}"
    return f"{count} B"


def listing() -> str:
    """All that can be downloaded, with what is here already; asks nobody."""
    lines = ["srpo download NAME...\n"]
    for entry in CATALOGUE.values():
        gate = ", gated" if entry.gated else ""
        sizes = [size_text(entry.size), *([f"{size_text(entry.comfyui_size)} into ComfyUI"] * entry.differs)]
        about = {
            entry.name: f"{entry.what}; about {', '.join(sizes)}",
            "": f"{entry.repository}; licence: {entry.licence}{gate}",
        }
        for name, text in about.items():
            start = f"  {name:<13}  "
            lines += textwrap.wrap(
                text, 80, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False
            )
        found = places.find(entry.name)
        if found is not None:
            lines.append(f"{'':<17}here: {places.as_setting(entry, found)}")
    return "\n".join(lines)


def confirm(items: Sequence[Item], yes: bool) -> bool:
    """Whether to go ahead. ConfigError where nobody can answer."""
    if yes or not any(item.missing for item in items):
        return True
    if not sys.stdin.isatty():
        raise ConfigError("nothing was downloaded: there is no terminal to ask; add --yes to go ahead")
    return input("Go ahead? [y/N] ").strip().lower() in {"y", "yes"}


def settings(entries: Sequence[Entry], comfyui: Path | None) -> list[str]:
    """The settings that take what has been downloaded, "model.t5=/…"."""
    lines = []
    for entry in entries:
        path = places.in_comfyui(entry, comfyui) if comfyui else places.in_cache(entry)
        if path is not None:
            lines.append(places.as_setting(entry, path))
    return lines

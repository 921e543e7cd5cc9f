"""The Hugging Face hub, as far as downloads need it: what a repository holds, whether it may be read, its bytes.

Which hub is asked, and with which token, is huggingface_hub's business (HF_ENDPOINT, HF_TOKEN, `hf auth login`). Files
are fetched here rather than by `hf_hub_download`: that forgets what has arrived when a transfer ends early.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

_NETWORK = ("requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2")
"""Packages whose errors mean that the connection failed; which of them is used depends on huggingface_hub's version."""
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_ATTEMPTS = 5
_PAUSE = 1.0
_BLOCK = 2**22


class DownloadError(OSError):
    """A download that can't start or go on; the message says why and what to do."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its bytes and their digest: SHA-256, or git's SHA-1 of a blob for small text files."""

    path: str
    size: int
    digest: str

    @property
    def large(self) -> bool:
        """Whether the digest is a SHA-256."""
        return len(self.digest) == 64


@dataclass(frozen=True)
class Repository:
    """A model repository at one commit."""

    name: str
    commit: str
    licence: str | None
    gated: bool
    files: tuple[RemoteFile, ...]


def page(repository: str) -> str:
    """The repository's page in a browser."""
    return f"{constants.ENDPOINT}/{repository}"


def repository(name: str) -> Repository:
    """What the hub says of a repository's main branch. DownloadError if it can't be asked, or says what makes no sense.

    Commits, digests and paths become names of local files: none leads out of its folder.
    """
    with _readable(name):
        info = HfApi().model_info(name, files_metadata=True)
        files = []
        for entry in info.siblings or ():
            digest = entry.lfs.sha256 if entry.lfs is not None else entry.blob_id
            if not _DIGEST.fullmatch(digest) or not _is_below(entry.rfilename):
                raise ValueError(f"{entry.rfilename}: {digest}")
            files.append(RemoteFile(entry.rfilename, int(entry.size), digest))
        if not _DIGEST.fullmatch(info.sha):
            raise ValueError(info.sha)
    card = info.card_data.to_dict() if info.card_data is not None else {}
    licence = card.get("license_name") or card.get("license")
    return Repository(name, info.sha, licence, bool(info.gated), tuple(files))


def _is_below(path: str) -> bool:
    """Whether a repository's path stays below the folder that it is appended to, on any system."""
    return not re.search(r"[\\:\0]", path) and not {"", ".", ".."} & set(path.split("/"))


def check_access(repository: Repository, file: RemoteFile) -> None:
    """DownloadError, with the way in, if a gated repository's files may not be read."""
    with _readable(repository.name):
        get_hf_file_metadata(_url(repository, file))


def fetch(repository: Repository, file: RemoteFile, part: Path) -> None:
    """Bring a file's bytes to `part`, going on behind those that are there already; `verify` is still to come.

    DownloadError after several broken connections without a byte in between; what has arrived stays.
    """
    failures, present = 0, _size(part)
    while present != file.size or not part.exists():
        if present > file.size:
            part.unlink()
            present = 0
        try:
            with _readable(repository.name), part.open("ab") as stream:
                http_get(
                    _url(repository, file),
                    stream,
                    resume_size=present,
                    headers=build_hf_headers(),
                    expected_size=file.size,
                    displayed_filename=file.path.split("/")[-1],
                )
        except _ConnectionBroke as error:
            failures = 0 if _size(part) > present else failures + 1
            if failures == _ATTEMPTS:
                raise DownloadError(
                    f"{file.path}: {error}; the {_size(part)} bytes that have arrived stay: run the same command again"
                ) from error
            time.sleep(_PAUSE)
        present = _size(part)


def verify(path: Path, file: RemoteFile) -> None:
    """DownloadError if a file's bytes are not the hub's; they are deleted, since going on from them would not help."""
    found = digest(path, file)
    if found != file.digest:
        path.unlink()
        raise DownloadError(
            f"{file.path} arrived damaged: its checksum is {found}, not {file.digest}; it was deleted: run the same"
            " command again"
        )


def digest(path: Path, file: RemoteFile) -> str:
    """A local file's digest, of the kind that the hub gives for `file`."""
    sums = hashlib.sha256() if file.large else hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            sums.update(block)
    return sums.hexdigest()


def _url(repository: Repository, file: RemoteFile) -> str:
    return f"{page(repository.name)}/resolve/{repository.commit}/{quote(file.path)}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class _ConnectionBroke(DownloadError):
    """Worth another attempt."""


@contextlib.contextmanager
def _readable(repository: str) -> Iterator[None]:
    """Turns what goes wrong with the hub into a DownloadError of one or two lines."""
    try:
        yield
    except GatedRepoError as error:
        raise DownloadError(_how_to_get_in(repository)) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(
            f"there is no repository {repository} at {constants.ENDPOINT}, or it is private"
            + ("" if get_token() else " and needs a login (hf auth login)")
        ) from error
    except EntryNotFoundError as error:
        raise DownloadError(f"{constants.ENDPOINT} has no such file in {repository}: is HF_ENDPOINT right?") from error
    except OfflineModeIsEnabled as error:
        raise DownloadError("HF_HUB_OFFLINE is set: nothing can be downloaded; unset it") from error
    except HfHubHTTPError as error:
        raise _from_status(error) from error
    except Exception as error:
        package = type(error).__module__.split(".")[0]
        if package in _NETWORK and not isinstance(error, ValueError):
            raise _ConnectionBroke(f"no connection to {constants.ENDPOINT} ({_first_line(error)})") from error
        if isinstance(error, OSError) and "Consistency check failed" in str(error):
            raise _ConnectionBroke("the connection ended early") from error
        if isinstance(error, ValueError | TypeError | KeyError | AttributeError):
            raise DownloadError(f"{constants.ENDPOINT} doesn't answer like a hub: is HF_ENDPOINT right?") from error
        raise


def _from_status(error: HfHubHTTPError) -> DownloadError:
    status = error.response.status_code if error.response is not None else 0
    if status == 401:
        return DownloadError("the hub refuses the token; log in again (hf auth login), or renew HF_TOKEN")
    if status == 403:
        return DownloadError("the hub refuses access; the token may lack the right to read gated repositories")
    if status >= 500 or status == 429:
        return _ConnectionBroke(f"{constants.ENDPOINT} answers {status}: too busy or broken just now")
    return DownloadError(f"{constants.ENDPOINT} answers {status}: is HF_ENDPOINT right?")


def _how_to_get_in(repository: str) -> str:
    steps = [f"accept its licence on {page(repository)}"]
    if not get_token():
        steps.append(f"make a token with the right to read on {constants.ENDPOINT}/settings/tokens")
        steps.append("hf auth login (or set HF_TOKEN)")
    else:
        steps.append("check that you did so with the account that the token here belongs to (hf auth whoami)")
    lines = "".join(f"\n  {number}. {step}" for number, step in enumerate((*steps, "run the same command again"), 1))
    return f"{repository} is gated: its files are for accounts that have accepted its licence{lines}"


def _first_line(error: Exception) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"\?\S+", "?...", line)[:200]  # storage addresses carry signatures behind the ?

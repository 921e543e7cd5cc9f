"""What ends a process while others wait for it inside the model, left where they look: torchrun's store.

Their waiting can't be answered there: a call of a sharded model has no place for messages. A process that ends closes
its connections, which gloo notices at once; NCCL doesn't, so that its waiting is broken off. Of one that was killed
without a word, another one on its machine sees that it is gone; those of other machines miss its signs of life.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from srpo_core.processes import birth, is_running

KEY, DONE = "srpo/ended", "srpo/done"
LOOK_EVERY = 1.0
GRACE = 5.0
"""Seconds that a process has to notice by itself that another one has ended."""
PROCESS, LEFT = "srpo/process", "srpo/left"
ALIVE = "srpo/alive"
BEAT_EVERY = 10.0
SILENCE = 180.0
"""Seconds without a sign of life after which a process counts as gone: one that works always gives some."""


def tell_last(words: str) -> None:
    """Leave the reason why this process ends. It ends all the same where the store is gone."""
    with contextlib.suppress(Exception):
        dist.distributed_c10d._get_default_store().set(KEY, words)


def leave_together(rank: int, size: int, patience: timedelta) -> None:
    """Wait until all processes are done with each other: one that goes takes its connections with it."""
    with contextlib.suppress(Exception):  # they are done all the same where the store is gone
        store = dist.distributed_c10d._get_default_store()
        store.set(f"{DONE}/{rank}", "")
        store.wait([f"{DONE}/{other}" for other in range(size)], patience)


_heard: list[str] = []
"""Last words that made this process break off its waiting, after which the store can't be asked."""


def told_last(store: dist.Store | None = None) -> str | None:
    """What has ended another process; None if it said nothing, or if the store is gone."""
    if _heard:
        return _heard[-1]
    with contextlib.suppress(Exception):
        store = dist.distributed_c10d._get_default_store() if store is None else store
        if store.check([KEY]):
            return store.get(KEY).decode()
    return None


def waits_no_more() -> bool:
    """Whether this process has broken off its waiting for another one."""
    return bool(_heard)


def is_lost(error: BaseException) -> bool:
    """Whether the error is one of a connection to another process."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _second_store() -> dist.Store:
    """The store by a connection of its own: the other one may be kept waiting."""
    store = dist.distributed_c10d._get_default_store()
    return store.clone() if hasattr(store, "clone") else store


class _Neighbour:
    """The next one of torchrun's processes on this machine, as the system knows it."""

    def __init__(self, store: dist.Store, rank: int, size: int, local: int, count: int) -> None:
        self._store, self._size = store, size
        self._other, self._process = rank - local + (local + 1) % count, ""
        with contextlib.suppress(Exception):
            store.set(f"{PROCESS}/{rank}", f"{os.getpid()} {birth()}")

    def look(self) -> None:
        """Leave words for all if it is gone and hasn't left by itself."""
        with contextlib.suppress(Exception):  # the store may be gone
            if not self._process and self._store.check([key := f"{PROCESS}/{self._other}"]):
                self._process = self._store.get(key).decode()
            pid, _, born = self._process.partition(" ")
            if pid and not is_running(int(pid), born) and not _left(self._store, self._other):
                which = f"rank {self._other} of {self._size}"
                _tell_first(self._store, f"{which} was killed without a word (kill -9, or out of the host's memory)")


def _tell_first(store: dist.Store, words: str) -> None:
    """Leave words about another process, where nobody has left any."""
    store.compare_set(KEY, "", words)


def _left(store: dist.Store, rank: int) -> bool:
    """Whether a process has left by itself, so that others hear of it."""
    return store.check([f"{LEFT}/{rank}"])


class _Pulse:
    """A process's signs of life, and those of the next one in rank."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._count, self._beat = 0, -BEAT_EVERY
        self._seen, self._since = b"", time.monotonic()

    def look(self) -> None:
        """Give a sign if one is due, and look for the other's; leaves words for all if that one is gone."""
        now, other = time.monotonic(), (self._rank + 1) % self._size
        if now - self._beat < BEAT_EVERY:
            return
        self._beat, self._count = now, self._count + 1
        with contextlib.suppress(Exception):  # where the store is gone, so is machine 0
            self._store.set(f"{ALIVE}/{self._rank}", str(self._count))
            seen = self._store.get(key) if self._store.check([key := f"{ALIVE}/{other}"]) else b""
            if seen != self._seen:
                self._seen, self._since = seen, now
        if now - self._since > SILENCE:
            with contextlib.suppress(Exception):
                if _left(self._store, other):
                    return
                words = f"has given no sign of life for {SILENCE / 60:.0f} minutes: killed, or its machine is gone"
                _tell_first(self._store, f"rank {other} of {self._size} {words}")


@contextlib.contextmanager
def watched(rank: int = 0, size: int = 1) -> Iterator[None]:
    """Inside the context this process, one of torchrun's, doesn't wait in NCCL for one that has left its last words.

    Each sees whether the next one on its machine is there; on several machines it gives signs of life, too, and a
    silent one counts as gone.
    """
    done = threading.Event()
    _heard.clear()
    store, watches = _second_store(), []
    local, count = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if count > 1:
        watches.append(_Neighbour(store, rank, size, local, count))
    if count < size:
        watches.append(_Pulse(store, rank, size))

    def look() -> None:
        while not done.wait(LOOK_EVERY):
            for watch in watches:
                watch.look()
            told = told_last(store)
            if told is not None and not done.wait(GRACE):
                _heard.append(told)
                print(f"srpo: {told}; this process no longer waits for it", file=sys.stderr, flush=True)
                with contextlib.suppress(Exception):  # where nothing can be broken off, torchrun ends this process
                    dist.distributed_c10d._abort_process_group()
                return

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    ended = True
    try:
        yield
    except BaseException as error:
        ended = isinstance(error, Exception)  # others hear of no other kind
        raise
    finally:
        done.set()
        if ended:
            with contextlib.suppress(Exception):
                store.set(f"{LEFT}/{rank}", "")

"""What ends a process while others wait for it inside the model, left where they look: torchrun's store.

Their waiting can't be answered there: a call of a sharded model has no place for messages. A process that ends closes
its connections, which gloo notices at once; NCCL doesn't, so that its waiting is broken off.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

KEY, DONE = "srpo/ended", "srpo/done"
LOOK_EVERY = 1.0
GRACE = 5.0
"""Seconds that a process has to notice by itself that another one has ended."""


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


def told_last() -> str | None:
    """What has ended another process; None if it said nothing, or if the store is gone."""
    if _heard:
        return _heard[-1]
    with contextlib.suppress(Exception):
        store = dist.distributed_c10d._get_default_store()
        if store.check([KEY]):
            return store.get(KEY).decode()
    return None


def is_lost(error: BaseException) -> bool:
    """Whether the error is one of a connection to another process."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Inside the context this process doesn't wait in NCCL for one that has left its last words."""
    done = threading.Event()
    _heard.clear()

    def look() -> None:
        while not done.wait(LOOK_EVERY):
            told = told_last()
            if told is not None and not done.wait(GRACE):
                _heard.append(told)
                print(f"srpo: {told}; this process no longer waits for it", file=sys.stderr, flush=True)
                with contextlib.suppress(Exception):  # where nothing can be broken off, torchrun ends this process
                    dist.distributed_c10d._abort_process_group()
                return

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()

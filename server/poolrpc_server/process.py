"""A server process as a whole: its limit on descriptors, its private folder, how it is stopped, and its forced end."""

from __future__ import annotations

import faulthandler
import fcntl
import os
import resource
import shutil
import tempfile
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from poolrpc import __version__
from poolrpc_server.signals import SignalEvent
from poolrpc_server.telemetry.logs import log, log_serving, log_stacks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from prometheus_client import CollectorRegistry

FAILED = 70
"""Exit status of a process that cannot continue and should be started again."""

FAILED_SECONDS = 5.0
"""Seconds after which such a process is ended in any case, since something in it may hang."""

FOLDER_PREFIX = "poolrpc-process-"

FURTHER_FOLDERS = ("/tmp", "/dev/shm")  # noqa: S108 - folders are made there by mkdtemp
"""Where a private folder is made if TMPDIR is full, or its path too long."""

MAX_PARENT_LENGTH = 70
"""Maximum bytes of the path in which it is made, so that the path of a unix socket in it has less than Linux's 108."""


class ProcessControl:
    """How a server process is stopped, and where it reports what it does: by default, in its log.

    Attributes:
        stopping: Stops the server as a first signal does.
        abandoned: Cuts the drain short, because another server needs its addresses at once.

    """

    def __init__(self) -> None:
        self.stopping = SignalEvent()
        self.abandoned = threading.Event()

    def serving(self, facts: dict[str, Any], collect: Callable[[], CollectorRegistry]) -> None:  # noqa: ARG002 - a worker's
        """Receive the facts of the start line and what returns the metrics, once the server serves."""
        log_serving(facts)

    def answered(self) -> None:
        """Record that the server has answered its watchdog."""

    def draining(self) -> None:
        """Record that the server stops: it reports NOT_SERVING, and its watchdog is to end."""


def log_starting(addresses: Sequence[str], workers: int) -> None:
    """Log that a server starts, once its addresses are known to be free: importing torch takes seconds."""
    log.info("starting", version=__version__, pid=os.getpid(), addresses=addresses, workers=workers)


def raise_descriptor_limit() -> None:
    """Raise the soft limit on this process's file descriptors to the hard limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # the hard limit may be above the kernel's own, which a user can't reach
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def exit_later(seconds: float, reason: str = "") -> threading.Timer:
    """End the process with FAILED after so many seconds, unless the timer that this returns is cancelled.

    Args:
        seconds: Seconds from now.
        reason: Why, for an operator. Empty: it is logged already.

    """
    timer = threading.Timer(seconds, exit_now, [reason]) if reason else threading.Timer(seconds, os._exit, [FAILED])
    timer.daemon = True
    timer.start()
    return timer


def exit_now(reason: str) -> NoReturn:
    """Log why the process cannot continue, with the stacks of its threads, and end it with FAILED though threads hang.

    Args:
        reason: Why, for an operator.

    """
    exit_later(FAILED_SECONDS)  # a thread that hangs may hold the log's lock, and its pipe may be full
    log.critical("failed", reason=reason)
    with open(os.memfd_create("stacks"), "w+") as stacks:  # noqa: PTH123 - a descriptor
        # To memory first: faulthandler holds the interpreter while it writes.
        faulthandler.dump_traceback(stacks)
        stacks.seek(0)
        log_stacks(stacks.read())
    os._exit(FAILED)


@contextmanager
def private_folder() -> Iterator[Path]:
    """Make a temporary folder that only this user can enter, and remove it at the end of the block.

    Folders that killed processes left behind are removed first: the lock of a living process's folder is taken.

    Raises:
        OSError: There is no place for it.

    """
    parents = [Path(each) for each in FURTHER_FOLDERS]
    with suppress(FileNotFoundError):  # there is no usable one
        parents.insert(0, Path(tempfile.gettempdir()))
    for parent in parents:
        _remove_stale_folders(parent)
    folder, lock = _make_folder([each for each in parents if len(os.fsencode(each)) <= MAX_PARENT_LENGTH])
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _make_folder(parents: list[Path]) -> tuple[Path, int]:
    failure = OSError("expected a folder with a short path")
    for parent in parents:
        try:
            while True:
                folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=parent))
                # Another process that starts may have taken the new folder for a stale one, and removed it.
                with suppress(FileNotFoundError):
                    lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    if folder.exists():
                        return folder, lock
                    os.close(lock)
        except OSError as error:
            failure = error
    raise failure


def _remove_stale_folders(parent: Path) -> None:
    for folder in parent.glob(f"{FOLDER_PREFIX}*"):
        with suppress(OSError):  # the lock is taken, or the folder is another user's
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if os.fstat(lock).st_uid == os.geteuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
            finally:
                os.close(lock)

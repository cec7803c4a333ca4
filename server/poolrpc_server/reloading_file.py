"""What files say, read again when they change; a change that can't be used leaves what there was."""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Generic, TypeVar

from poolrpc_server.telemetry.logs import log

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")


class ReloadingFile(Generic[T]):
    """Files that are looked at whenever somebody asks what they say: no thread, and no wait for a change to count.

    Args:
        what: What they are, for the log.
        paths: The files.
        load: Reads all of them.

    Raises:
        ValueError: They can't be used, and why.

    """

    def __init__(self, what: str, paths: Sequence[str], load: Callable[[], T]) -> None:
        self._what = what
        self._paths = tuple(paths)
        self._load = load
        self._lock = Lock()
        # Taken before the files are read: one that changes meanwhile is read again the next time.
        self._seen = self._state()
        self._value = self._read()

    def get(self) -> T:
        """Give what the files say now, or said when they could last be used; each bad state is logged once."""
        with self._lock:
            state = self._state()
            if state != self._seen:
                self._seen = state
                try:
                    self._value = self._read()
                except ValueError as error:
                    log.error(f"{self._what} changed and can't be used; what was read before stays", error=str(error))
                else:
                    log.info(f"{self._what} changed", files=" ".join(self._paths))
            return self._value

    def _read(self) -> T:
        try:
            return self._load()
        except OSError as error:
            # The name is missing where OpenSSL is at fault, the reason where it is Python.
            raise ValueError(f"{error.filename or ', '.join(self._paths)}: {error.strerror or error}") from None

    def _state(self) -> tuple[object, ...]:
        return tuple(map(_state, self._paths))


def _state(path: str) -> object:
    # Replacing a file changes its number, rewriting it in place the rest.
    try:
        now = Path(path).stat()
    except OSError as error:
        return error.errno
    return now.st_dev, now.st_ino, now.st_mtime_ns, now.st_ctime_ns, now.st_size

"""Values read from files, and read again after the files change."""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Generic, TypeVar

from poolrpc_server.telemetry.logs import log

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")


class ReloadingFile(Generic[T]):
    """A value loaded from files, whose state is checked on each access.

    There is no thread and no delay before a change takes effect. If the changed files are invalid, the last valid
    value stays in use.

    Args:
        description: What the files are, for the log.
        paths: The files.
        load: Reads all of them and returns the value.

    Raises:
        ValueError: The files cannot be read or are invalid.

    """

    def __init__(self, description: str, paths: Sequence[str], load: Callable[[], T]) -> None:
        self._description = description
        self._paths = tuple(paths)
        self._load = load
        self._lock = Lock()
        # The state is taken before the files are read: a change in between causes another read at the next access.
        self._state = self._file_states()
        self._failed: tuple[object, ...] = ()
        self._value = self._read()

    def get(self) -> T:
        """Return the current value, or the last valid one. Each invalid state of the files is logged once."""
        with self._lock:
            state = self._file_states()
            if state != self._state:
                try:
                    self._value = self._read()
                except ValueError as error:
                    if state != self._failed:
                        message = "changed, but could not be loaded; the last valid version stays in use"
                        log.error(f"{self._description} {message}", error=str(error))
                    self._failed = state
                    if not isinstance(error, _UnreadableError):  # that may be for now only: no descriptor was free
                        self._state = state
                else:
                    self._state = state
                    log.info(f"{self._description} changed", files=list(self._paths))
            return self._value

    def _read(self) -> T:
        try:
            return self._load()
        except OSError as error:
            # OpenSSL's errors lack the file's name; Python's may lack the reason.
            reason = f"{error.filename or ', '.join(self._paths)}: {error.strerror or error}"
            raise _UnreadableError(reason) from None

    def _file_states(self) -> tuple[object, ...]:
        return tuple(map(_file_state, self._paths))


class _UnreadableError(ValueError):
    """A file cannot be read, whatever is in it."""


def _file_state(path: str) -> object:
    # Replacing a file changes its inode number; rewriting it in place changes the times or the size.
    try:
        status = Path(path).stat()
    except OSError as error:
        return error.errno
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size

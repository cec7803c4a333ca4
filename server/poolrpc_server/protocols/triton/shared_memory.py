"""Clients' shared memory: regions of files in /dev/shm, which calls read and write, and nobody maps.

A client may cut its file short at any moment. Of memory that is mapped, the next access would end the process (SIGBUS);
of a file, a read ends early. And what was read is the server's own: what is checked is what is used.
"""

from __future__ import annotations

import os
import re
import stat
import threading
import weakref
from dataclasses import dataclass

from poolrpc._shapes.rules import clip
from poolrpc.errors import (
    InvalidArgumentError,
    LimitExceededError,
    NotFoundError,
    PermissionDeniedError,
    UnsupportedError,
)

FOLDER = "/dev/shm"  # noqa: S108 - where shm_open has its files
KEY = re.compile(r"/?(?!\.\.?\Z)([A-Za-z0-9_.-]{1,255})", re.ASCII)
MAX_NAME = 256

MAX_REGIONS = 256
"""Each has a file open."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a region a tensor is.

    Attributes:
        region: The region's name.
        offset: From the region's begin.
        nbytes: The tensor's.

    """

    region: str
    offset: int
    nbytes: int


class Region:
    """A part of an open file, which is closed when nobody uses it any more.

    Attributes:
        key: The file's name, as it was given.
        offset: Where in the file it begins.
        nbytes: Its length.

    """

    def __init__(self, key: str, offset: int, nbytes: int) -> None:
        """Open the file.

        Raises:
            InvalidArgumentError: The name is none of /dev/shm's, or the region isn't in the file.
            NotFoundError: There is no such file.
            PermissionDeniedError: It is another user's.

        """
        match = KEY.fullmatch(key)
        if match is None:
            msg = f"expected the name of a file in {FOLDER}, of letters, digits, '_', '.' and '-', got {clip(key)}"
            raise InvalidArgumentError(msg, field="key")
        self.key, self.offset, self.nbytes = key, offset, nbytes
        try:
            # Not by a link, and not waiting for whoever else should open a pipe.
            flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            self._file = os.open(f"{FOLDER}/{match[1]}", flags)
        except FileNotFoundError:
            raise NotFoundError(f"key: expected a file in {FOLDER}, got {clip(key)}", reason="REGION") from None
        except PermissionError:
            raise _denied(key) from None
        except OSError as error:
            raise InvalidArgumentError(
                f"expected a file that can be opened, got {error.strerror}", field="key"
            ) from None
        weakref.finalize(self, os.close, self._file)
        found = os.fstat(self._file)
        # Whoever calls by TCP has no user that the server could know, so it is the server's own.
        if found.st_uid != os.geteuid():
            raise _denied(key)
        if not stat.S_ISREG(found.st_mode):
            raise InvalidArgumentError(f"expected a file of shared memory, got another kind: {clip(key)}", field="key")
        if not nbytes:
            raise InvalidArgumentError("expected at least 1 byte, got 0", field="byte_size")
        if offset + nbytes > found.st_size:
            msg = f"expected a region within the file's {found.st_size} bytes, got {nbytes} from {offset} on"
            raise InvalidArgumentError(msg, field="byte_size")

    def read(self, place: Place, into: memoryview, field: str) -> None:
        """Read a tensor into memory of its size.

        Raises:
            InvalidArgumentError: It isn't in the region, or the file was cut short.

        """
        start, done = self._start(place, field), 0
        while done < place.nbytes:
            count = os.preadv(self._file, [into[done:]], start + done)
            if not count:
                raise self._short(place, field)
            done += count

    def write(self, place: Place, data: memoryview, field: str) -> None:
        """Write a tensor where it is to be; the rest is as in read."""
        start, done = self._start(place, field), 0
        if start + len(data) > os.fstat(self._file).st_size:  # writing would make it longer
            raise self._short(place, field)
        while done < len(data):
            try:
                done += os.pwritev(self._file, [data[done:]], start + done)
            except OSError as error:  # no room: memory is taken when it is first written
                raise InvalidArgumentError(f"expected memory to write to, got {error.strerror}", field=field) from None

    def _start(self, place: Place, field: str) -> int:
        if place.offset + place.nbytes > self.nbytes:
            msg = f"expected a range within the region's {self.nbytes} bytes, got {place.nbytes} from {place.offset} on"
            raise InvalidArgumentError(msg, field=field)
        return self.offset + place.offset

    def _short(self, place: Place, field: str) -> InvalidArgumentError:
        size = os.fstat(self._file).st_size
        msg = f"expected {place.nbytes} bytes at {self.offset + place.offset} of {self.key}, got a file of {size} bytes"
        return InvalidArgumentError(msg, field=field)


class SharedMemoryRegistry:
    """The regions that clients have registered, by name; any client may use any."""

    def __init__(self, *, allowed: bool) -> None:
        """Know none yet; where they aren't `allowed`, for good."""
        self.allowed = allowed
        self._regions: dict[str, Region] = {}
        self._lock = threading.Lock()

    def register(self, name: str, key: str, offset: int, nbytes: int) -> None:
        """Make a region known.

        Raises:
            UnsupportedError: The server doesn't allow any.
            PoolError: Of the class that says what is wrong with it.

        """
        if not self.allowed:
            msg = "expected tensors in messages: this server reads no shared memory of its clients (--allow-client-shm)"
            raise UnsupportedError(msg, reason="CLIENT_SHM")
        if not 1 <= len(name) <= MAX_NAME:
            raise InvalidArgumentError(f"expected 1 to {MAX_NAME} characters, got {len(name)}", field="name")
        with self._lock:
            self._check_free(name)
        region = Region(key, offset, nbytes)
        with self._lock:
            self._check_free(name)
            self._regions[name] = region

    def unregister(self, name: str) -> None:
        """Forget a region, if there is one; all, if the name is empty. Calls that use it are finished."""
        with self._lock:
            if name:
                self._regions.pop(name, None)
            else:
                self._regions.clear()

    def known(self, name: str) -> dict[str, Region]:
        """Give a region, or all if the name is empty.

        Raises:
            NotFoundError: There is none of that name.

        """
        with self._lock:
            regions = dict(self._regions)
        if not name:
            return regions
        if name not in regions:
            raise NotFoundError(f"expected a region that is registered, got {clip(name)}", reason="REGION")
        return {name: regions[name]}

    def find(self, name: str) -> Region:
        """Give a region; the rest is as in known."""
        return self.known(name)[name] if name else self._none()

    def _none(self) -> Region:
        raise NotFoundError("expected the name of a region, got none", reason="REGION")

    def _check_free(self, name: str) -> None:
        if name in self._regions:
            msg = f"expected a name that isn't registered, got {clip(name)}: unregister it first"
            raise InvalidArgumentError(msg, field="name")
        if len(self._regions) >= MAX_REGIONS:
            limits = {"limit": str(MAX_REGIONS), "actual": str(MAX_REGIONS + 1)}
            msg = f"expected at most {MAX_REGIONS} regions, got another"
            raise LimitExceededError(msg, reason="REGIONS", metadata=limits)


def _denied(key: str) -> PermissionDeniedError:
    msg = f"expected a file of the user that the server runs as, got {clip(key)}"
    return PermissionDeniedError(msg, reason="REGION")

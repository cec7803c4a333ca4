"""Shared memory that clients create: registered regions of files in /dev/shm.

The files are read and written, never mapped, because a client may truncate its file at any moment. An access to mapped
memory beyond the new end would kill the process with SIGBUS, whereas a read only ends early. Reading also gives the
server its own copy, which the client cannot change after validation.
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

FOLDER = "/dev/shm"  # noqa: S108 - where shm_open creates files
KEY = re.compile(r"/?(?!\.\.?\Z)([A-Za-z0-9_.-]{1,255})", re.ASCII)
MAX_NAME = 256

MAX_REGIONS = 256
"""Maximum number of registered regions; each keeps a file open."""

REGION = "shared_memory_region"
BYTE_SIZE = "shared_memory_byte_size"
OFFSET = "shared_memory_offset"
PARAMETERS = (REGION, BYTE_SIZE, OFFSET)
"""The parameters of an input or output that is in shared memory."""


@dataclass(frozen=True, slots=True)
class SharedMemoryRange:
    """The part of a region that holds a tensor.

    Attributes:
        region: Name of the region.
        offset: Offset of the tensor in the region, in bytes.
        nbytes: Size of the range, in bytes.

    """

    region: str
    offset: int
    nbytes: int


class SharedMemoryRegion:
    """A part of an open file, which is closed when this object is no longer referenced.

    Attributes:
        key: Name of the file in /dev/shm.
        offset: Offset of the region in the file, in bytes.
        nbytes: Size of the region, in bytes.

    """

    def __init__(self, key: str, offset: int, nbytes: int) -> None:
        """Open the file.

        Raises:
            InvalidArgumentError: The name is not that of a file in /dev/shm, or the region is not within the file.
            NotFoundError: There is no such file.
            PermissionDeniedError: The file belongs to another user.

        """
        match = KEY.fullmatch(key)
        if match is None:
            msg = f"expected the name of a file in {FOLDER}, of letters, digits, '_', '.' and '-', got {clip(key)}"
            raise InvalidArgumentError(msg, field="key")
        self.key, self.offset, self.nbytes = key, offset, nbytes
        try:
            # A symbolic link is not followed, and opening a named pipe does not wait for its other end.
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
        status = os.fstat(self._file)
        # The user of a client on TCP is unknown, so only files of the server's own user are allowed.
        if status.st_uid != os.geteuid():
            raise _denied(key)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidArgumentError(f"expected a file of shared memory, got another kind: {clip(key)}", field="key")
        if not nbytes:
            raise InvalidArgumentError("expected at least 1 byte, got 0", field="byte_size")
        if offset + nbytes > status.st_size:
            msg = f"expected a region within the file's {status.st_size} bytes, got {nbytes} from {offset} on"
            raise InvalidArgumentError(msg, field="byte_size")

    def read(self, source: SharedMemoryRange, buffer: memoryview, field: str) -> None:
        """Read a tensor into a buffer of its size.

        Args:
            source: The tensor's range.
            buffer: The buffer.
            field: The path of the request's field, for the error.

        Raises:
            InvalidArgumentError: The range is not within the region, or the file was truncated.

        """
        start, done = self._file_offset(source, field), 0
        while done < source.nbytes:
            count = os.preadv(self._file, [buffer[done:]], start + done)
            if not count:
                raise self._truncated(source, field)
            done += count

    def write(self, target: SharedMemoryRange, data: memoryview, field: str) -> None:
        """Write a tensor to a range.

        Args:
            target: The range, which is at least as large as the tensor.
            data: The tensor.
            field: The path of the request's field, for the error.

        Raises:
            InvalidArgumentError: The range is not within the region, the file was truncated, or there is no memory.

        """
        start, done = self._file_offset(target, field), 0
        if start + len(data) > os.fstat(self._file).st_size:  # writing would extend the file
            raise self._truncated(target, field)
        while done < len(data):
            try:
                done += os.pwritev(self._file, [data[done:]], start + done)
            except OSError as error:  # no memory: it is allocated when it is first written
                raise InvalidArgumentError(f"expected memory to write to, got {error.strerror}", field=field) from None

    def _file_offset(self, part: SharedMemoryRange, field: str) -> int:
        if part.offset + part.nbytes > self.nbytes:
            msg = f"expected a range within the region's {self.nbytes} bytes, got {part.nbytes} from {part.offset} on"
            raise InvalidArgumentError(msg, field=field)
        return self.offset + part.offset

    def _truncated(self, part: SharedMemoryRange, field: str) -> InvalidArgumentError:
        size = os.fstat(self._file).st_size
        msg = f"expected {part.nbytes} bytes at {self.offset + part.offset} of {self.key}, got a file of {size} bytes"
        return InvalidArgumentError(msg, field=field)


class SharedMemoryRegistry:
    """The regions that clients have registered, by name. Any client may use any region.

    Args:
        allowed: Whether clients may register regions.
        max_regions: Maximum number of regions.

    Attributes:
        allowed: As above.

    """

    def __init__(self, *, allowed: bool, max_regions: int = MAX_REGIONS) -> None:
        self.allowed = allowed
        self._max_regions = max_regions
        self._regions: dict[str, SharedMemoryRegion] = {}
        self._lock = threading.Lock()

    def register(self, name: str, key: str, offset: int, nbytes: int) -> None:
        """Register a region.

        Args:
            name: Name of the region.
            key: Name of the file in /dev/shm.
            offset: Offset of the region in the file, in bytes.
            nbytes: Size of the region, in bytes.

        Raises:
            UnsupportedError: The server does not allow shared memory of clients.
            InvalidArgumentError: The name is taken or has an invalid length, or the region is invalid.
            LimitExceededError: There are too many regions.
            NotFoundError: There is no such file.
            PermissionDeniedError: The file belongs to another user.

        """
        if not self.allowed:
            msg = "expected tensors in messages: this server reads no shared memory of its clients (--allow-client-shm)"
            raise UnsupportedError(msg, reason="CLIENT_SHM")
        if not 1 <= len(name) <= MAX_NAME:
            raise InvalidArgumentError(f"expected 1 to {MAX_NAME} characters, got {len(name)}", field="name")
        with self._lock:
            self._check_free(name)
        region = SharedMemoryRegion(key, offset, nbytes)
        with self._lock:
            self._check_free(name)
            self._regions[name] = region

    def unregister(self, name: str) -> None:
        """Unregister a region, or all if the name is empty. Calls in flight still use it."""
        with self._lock:
            if name:
                self._regions.pop(name, None)
            else:
                self._regions.clear()

    def regions(self, name: str = "") -> dict[str, SharedMemoryRegion]:
        """Return a region by its name, or all if the name is empty.

        Raises:
            NotFoundError: No region has this name.

        """
        with self._lock:
            regions = dict(self._regions)
        if not name:
            return regions
        if name not in regions:
            raise NotFoundError(f"expected a region that is registered, got {clip(name)}", reason="REGION")
        return {name: regions[name]}

    def find(self, name: str) -> SharedMemoryRegion:
        """Return a region.

        Raises:
            NotFoundError: No region has this name.

        """
        if not name:
            raise NotFoundError("expected the name of a region, got none", reason="REGION")
        return self.regions(name)[name]

    def _check_free(self, name: str) -> None:
        if name in self._regions:
            msg = f"expected a name that isn't registered, got {clip(name)}: unregister it first"
            raise InvalidArgumentError(msg, field="name")
        if len(self._regions) >= self._max_regions:
            limits = {"limit": str(self._max_regions), "actual": str(self._max_regions + 1)}
            msg = f"expected at most {self._max_regions} regions, got another"
            raise LimitExceededError(msg, reason="REGIONS", metadata=limits)


def _denied(key: str) -> PermissionDeniedError:
    msg = f"expected a file of the user that the server runs as, got {clip(key)}"
    return PermissionDeniedError(msg, reason="REGION")

"""Locations: parts of a client's shared memory that its calls use again and again.

A client that repeats a call finds the same memory free each time, so its tensors are in the same location. From the
second call on, a workspace of that location reads and writes them there, and nothing is copied.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from poolrpc_server.compute.workspace import Workspace, WorkspaceCache

MAX_LOCATIONS = 64
"""Maximum number of locations of one client's memory that are remembered; the oldest is dropped first."""


class Location:
    """Where the tensors of one request are.

    Args:
        cache: The cache of its workspaces.
        inputs: The bytes of each input tensor.
        outputs: Memory for each output tensor.

    Attributes:
        inputs: The bytes of each input tensor.
        outputs: Memory for each output tensor.
        workspaces: The idle workspaces.
        ended: Whether it keeps no workspace any more.

    """

    __slots__ = ("_cache", "ended", "inputs", "outputs", "workspaces")

    def __init__(self, cache: WorkspaceCache, inputs: Sequence[memoryview], outputs: Sequence[memoryview]) -> None:
        self._cache = cache
        self.inputs, self.outputs = inputs, outputs
        self.workspaces: list[Workspace] = []
        self.ended = False

    def end(self) -> None:
        """Drop the idle workspaces, and keep no other: they would keep the memory mapped."""
        self.ended = True
        self._cache.drop_idle_of(self)


class Locations:
    """The locations of one client's memory, by request and position."""

    def __init__(self) -> None:
        self._locations: dict[Hashable, Location] = {}
        self._ended = False
        self._lock = threading.Lock()

    def find(self, key: Hashable) -> Location | None:
        """Return a location that is remembered, or None."""
        return self._locations.get(key)

    def add(self, key: Hashable, location: Location) -> None:
        """Remember a location, unless the client is gone."""
        with self._lock:
            if self._ended:
                return
            dropped = (
                self._locations.pop(next(iter(self._locations))) if len(self._locations) >= MAX_LOCATIONS else None
            )
            self._locations[key] = location
        if dropped is not None:
            dropped.end()

    def end(self) -> None:
        """Forget all locations, because the client is gone."""
        with self._lock:
            self._ended = True
            locations, self._locations = self._locations, {}
        for location in locations.values():
            location.end()

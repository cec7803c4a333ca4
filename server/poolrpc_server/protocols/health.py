"""grpc.health.v1.Health/Check: whether the server takes calls, for probes of every transport."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

from poolrpc.errors import NotFoundError
from poolrpc.v1 import standard_pb2
from poolrpc_server.calls.method import Method
from poolrpc_server.protocols.messages import parse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from poolrpc_server.calls.call import CallContext

HEALTH_SERVICE = "grpc.health.v1.Health"

_Status = standard_pb2.HealthCheckResponse


class Health:
    """The health of the server and of each of its services, which is the same for all of them.

    Attributes:
        services: Full names of the services that may be checked; the empty name stands for the server.
        public: Whether a check needs no token.
        serving: Whether the server takes calls.

    """

    def __init__(self, services: Iterable[str], *, public: bool = True) -> None:
        """Make the health of a server that does not serve yet.

        Args:
            services: Full names of the services, in addition to the server itself.
            public: Whether a check needs no token.

        """
        self.services = ("", *services)
        self.serving = False
        self.public = public
        self._observers: list[Callable[[bool], object]] = []
        self._lock = Lock()

    def methods(self) -> tuple[Method, ...]:
        """Return the methods of the service."""
        return (Method(f"/{HEALTH_SERVICE}/Check", unary=self.check, probe=True, public=self.public),)

    def check(self, message: bytes, _: CallContext) -> bytes:
        """Answer a HealthCheckRequest.

        Raises:
            NotFoundError: There is no such service.

        """
        request = parse(standard_pb2.HealthCheckRequest, message)
        if request.service not in self.services:
            raise NotFoundError("expected a service of this server, got an unknown one", reason="SERVICE")
        status = _Status.SERVING_STATUS_SERVING if self.serving else _Status.SERVING_STATUS_NOT_SERVING
        return _Status(status=status).SerializeToString()

    def add_observer(self, observer: Callable[[bool], object]) -> None:
        """Call `observer` with the new state after each change."""
        with self._lock:
            self._observers.append(observer)

    def set_serving(self, serving: bool) -> None:  # noqa: FBT001 - the one thing that it sets
        """Set whether the server takes calls; for any thread."""
        with self._lock:
            self.serving = serving
            observers = tuple(self._observers)
        for observer in observers:
            observer(serving)

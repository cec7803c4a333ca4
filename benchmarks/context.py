"""The context of a call that this process makes itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from poolrpc_server.calls.call import CallContext

if TYPE_CHECKING:
    from collections.abc import Callable


class DirectCall(CallContext):
    """A call without a deadline that is not cancelled."""

    def __init__(self) -> None:
        super().__init__("/benchmarks/Call")

    def time_remaining(self) -> None:
        """Return None: there is no deadline."""

    def is_active(self) -> bool:
        """Return True."""
        return True

    def add_done_callback(self, _: Callable[[], None]) -> bool:
        """Return True: the call does not end before its answer."""
        return True

    def cancel(self) -> None:
        """Do nothing."""

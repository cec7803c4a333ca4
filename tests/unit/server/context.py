"""The context of a call without a transport."""

from poolrpc._wire.status import DETAILS_KEY, decode_error
from poolrpc_server.calls.admission import AdmissionControl, Ticket
from poolrpc_server.calls.call import CallContext


class Context(CallContext):
    """A call whose end and deadline the test decides; without a pipeline, `admission` counts what it holds."""

    def __init__(self, method="/poolrpc.v1.PoolService/Pool", metadata=(), remaining=None, admission=None):
        super().__init__(method, metadata)
        self.ticket = Ticket(admission or AdmissionControl(10**12), lambda _: self.cancel())
        self.remaining, self.ended, self.callbacks = remaining, False, []

    def time_remaining(self):
        """Return what the test set."""
        return self.remaining

    def is_active(self):
        """Return whether the test has not ended the call."""
        return not self.ended

    def add_done_callback(self, callback):
        """Keep the callback for `cancel`."""
        if not self.ended:
            self.callbacks.append(callback)
        return not self.ended

    def cancel(self):
        """End the call, and release its ticket, as a transport does."""
        self.ended = True
        self.ticket.release()
        for callback in self.callbacks:
            callback()


def error_of(status):
    """Return the error that a client makes of a StatusError."""
    return decode_error(status.code, status.message, dict(status.trailing).get(DETAILS_KEY))

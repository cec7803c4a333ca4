"""The watchdog: what counts as an answer."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import grpc
import pytest

from poolrpc._wire.status import DETAILS_KEY
from poolrpc_server.transports.grpc.watchdog import Watchdog


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAUTHENTICATED])
def test_a_rejection_is_an_answer(tmp_path, code):
    """A server that rejects the watchdog's call, because it is busy for example, serves."""

    def reject(_, context):
        context.set_trailing_metadata([(DETAILS_KEY, b"details")])
        context.abort(code, "rejected")

    address = f"unix:{tmp_path / 's'}"
    server = grpc.server(ThreadPoolExecutor(1))
    handlers = {"Check": grpc.unary_unary_rpc_method_handler(reject)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("x.Watchdog", handlers)])
    server.add_insecure_port(address)
    server.start()
    answered = Event()
    watchdog = Watchdog(address, "/x.Watchdog/Check", 300, answered.set, pytest.fail)
    try:
        assert answered.wait(60)
    finally:
        watchdog.close()
        server.stop(0).wait()

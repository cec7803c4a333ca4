"""The packets of local calls: what one side writes is what the other side reads."""

from __future__ import annotations

import tracemalloc

import pytest

from poolrpc import InternalError, UnavailableError
from poolrpc._wire.local_packets import (
    MAX_PACKET_BYTES,
    ReceivedCall,
    decode_answer,
    decode_call,
    encode_answer,
    encode_call,
    encode_failure,
)
from poolrpc._wire.status import encode_error

METADATA = (("authorization", "Bearer secret"), ("trace-bin", b"\x00\xff"), ("authorization", "Bearer second"))


@pytest.mark.parametrize("timeout", [None, 0.0, 0.25, 1e9])
@pytest.mark.parametrize("metadata", [(), METADATA], ids=["none", "some"])
def test_a_call(timeout: float | None, metadata: tuple[tuple[str, str | bytes], ...]) -> None:
    """The method, the deadline, the metadata in order, and the parts of the message arrive."""
    packet = b"".join(encode_call("package.Service/Method", timeout, metadata, (b"head", memoryview(b"payload"))) or ())
    assert decode_call(memoryview(packet)) == ReceivedCall("/package.Service/Method", timeout, metadata, b"headpayload")


def test_a_deadline_that_has_passed_is_now() -> None:
    """A deadline in the past does not become one in the far future."""
    packet = b"".join(encode_call("a/b", -1.0, (), (b"",)) or ())
    assert decode_call(memoryview(packet)).timeout == 0


def test_the_largest_packet() -> None:
    """A packet may be as large as the limit, and no larger, and its header may not exceed its length field."""
    size = len(b"".join(encode_call("a/b", None, (), ()) or ()))
    assert encode_call("a/b", None, (), (bytes(MAX_PACKET_BYTES - size),)) is not None
    assert encode_call("a/b", None, (), (bytes(MAX_PACKET_BYTES - size + 1),)) is None
    assert encode_call("a/b", None, (("key", "v" * 2**16),), ()) is None
    assert encode_answer(bytes(MAX_PACKET_BYTES - 1)) is not None
    assert encode_answer(bytes(MAX_PACKET_BYTES)) is None


def test_large_headers_are_not_kept() -> None:
    """A server remembers small headers only: a client cannot fill its memory with large ones."""
    packets = [
        memoryview(b"".join(encode_call("a/b", None, (("key", f"{number:060000}"),), ()) or ())) for number in range(64)
    ]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for packet in packets:
            assert len(decode_call(packet).metadata[0][1]) == 60000
        kept = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert kept < len(packets) * 2048


def test_answers() -> None:
    """A response arrives as it is, an error with its class and details, and anything else is an internal error."""
    assert decode_answer(b"".join(encode_answer(b"response") or ())) == b"response"
    details = encode_error(UnavailableError("full", reason="QUEUE", retry_delay=0.25))[1]
    with pytest.raises(UnavailableError, match="full") as caught:
        decode_answer(b"".join(encode_failure(details)))
    assert (caught.value.reason, caught.value.retry_delay) == ("QUEUE", 0.25)
    for packet in (b"", b"\1", b"\2abc", b"\1\xff"):
        with pytest.raises(InternalError, match="expected an answer"):
            decode_answer(packet)

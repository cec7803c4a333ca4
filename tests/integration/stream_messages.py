"""Messages of PoolStream, written by hand for tests of what no client of ours sends, and a tensor for a stream."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Self

import grpc
import numpy as np
import pytest

from poolrpc import MaxPool2d
from poolrpc._wire import codec
from poolrpc._wire.status import translate_rpc_error
from poolrpc.chains import as_chain
from poolrpc.tensors import TensorSpec
from poolrpc.v1 import pool_pb2

if TYPE_CHECKING:
    import poolrpc
    from poolrpc.chains import Chain

MIB = 2**20
LARGE = np.random.default_rng(7).standard_normal((64, 4, 128, 128), np.float32)
"""16 MiB, in planes of 64 KiB: more than a connection takes while nothing is read from it."""

METHOD = "/poolrpc.v1.PoolService/PoolStream"
NO_RETRIES = {"grpc.enable_retries": 0}


def header(shape: tuple[int, ...] = (2, 3, 4, 4), *chain: poolrpc.Layer, dtype: str = "float32") -> bytes:
    """Return a stream's first message; the chain is MaxPool2d(2) by default."""
    branches: tuple[Chain, ...] = (as_chain(chain or [MaxPool2d(2)]),)
    request = codec.encode_request(codec.Request(TensorSpec(dtype, shape), branches))
    return pool_pb2.PoolStreamRequest(request=request).SerializeToString()


def block(nbytes: int, *, unfinished: bool = False) -> bytes:
    """Return a message of a block of zeros, or of a part of one."""
    return pool_pb2.PoolStreamRequest(payload=bytes(nbytes), unfinished=unfinished).SerializeToString()


class OpenStream:
    """The messages of a stream that stays open until `end` is called."""

    def __init__(self, *messages: bytes) -> None:
        self._queue: SimpleQueue[bytes | None] = SimpleQueue()
        for message in messages:
            self._queue.put(message)

    def put(self, message: bytes) -> None:
        """Send a message."""
        self._queue.put(message)

    def end(self) -> None:
        """End the stream."""
        self._queue.put(None)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        message = self._queue.get()
        if message is None:
            raise StopIteration
        return message


def error_of(responses: Any) -> poolrpc.PoolError:
    """Read responses to their end, which must be an error, and return it."""
    with pytest.raises(grpc.RpcError) as caught:
        list(responses)
    return translate_rpc_error(caught.value)


def reader_threads() -> list[threading.Thread]:
    """Return the threads that read streams ahead in servers of this process."""
    return [thread for thread in threading.enumerate() if thread.name == "poolrpc-reader"]


def assert_no_reader_stays() -> None:
    """Check that every thread that reads ahead ends by itself."""
    for thread in reader_threads():
        thread.join(60)
    assert not reader_threads()

"""Requests of PoolService for peers that write their own HTTP/2 frames."""

from __future__ import annotations

from fuzz.attacks.raw_peer import framed
from poolrpc.v1 import pool_pb2

SERVICE = "/poolrpc.v1.PoolService/"


def pool_request(*shape: int) -> pool_pb2.PoolRequest:
    """Return a request for MaxPool2d(2) of zeros."""
    return pool_pb2.PoolRequest(
        input=pool_pb2.TensorSpec(dtype=pool_pb2.DATA_TYPE_FLOAT32, shape=shape),
        branches=[pool_pb2.Branch(layers=[pool_pb2.Layer(max_pool={"spatial_dims": 2, "kernel_size": [2]})])],
    )


def stream_header(*shape: int) -> bytes:
    """Return the first message of a stream, with gRPC's prefix."""
    return framed(pool_pb2.PoolStreamRequest(request=pool_request(*shape)).SerializeToString())

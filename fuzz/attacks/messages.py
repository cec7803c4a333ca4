"""Methods of every service, and the messages that the attacks send to them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import poolrpc
from poolrpc._wire import codec
from poolrpc.chains import as_chain
from poolrpc.tensors import TensorSpec
from poolrpc.v1 import pool_pb2
from poolrpc_server.protocols.triton.generated import open_inference_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable

NATIVE, INFERENCE = "/poolrpc.v1.PoolService/", "/inference.GRPCInferenceService/"
POOL, POOL_STREAM = f"{NATIVE}Pool", f"{NATIVE}PoolStream"
INFER_SHAPE, SERVER_INFO = f"{NATIVE}InferShape", f"{NATIVE}GetServerInfo"
MODEL_INFER, MODEL_STREAM = f"{INFERENCE}ModelInfer", f"{INFERENCE}ModelStreamInfer"
SERVER_READY, MODEL_CONFIG = f"{INFERENCE}ServerReady", f"{INFERENCE}ModelConfig"
CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
REFLECT = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"

COMPUTING = (POOL, POOL_STREAM, MODEL_INFER, MODEL_STREAM)
CONTROL = (CHECK, WATCH, INFER_SHAPE, SERVER_INFO, SERVER_READY, MODEL_CONFIG, REFLECT)
METHODS = (*COMPUTING, *CONTROL)
"""At least one method of each service and of each kind."""

ANNOUNCED = "poolrpc-message-bytes"


def pool(
    shape: tuple[int, ...], *branches: Iterable[poolrpc.Layer], dtype: str = "float32", payload: bytes | None = None
) -> pool_pb2.PoolRequest:
    """Return a PoolRequest; its payload is zeros unless it is given."""
    spec = TensorSpec(dtype, shape)
    message = codec.encode_request(codec.Request(spec, tuple(as_chain(branch) for branch in branches)))
    message.payload = bytes(spec.nbytes) if payload is None else payload
    return message


def stream_header(shape: tuple[int, ...], *branches: Iterable[poolrpc.Layer]) -> bytes:
    """Return the first message of a PoolStream."""
    return pool_pb2.PoolStreamRequest(request=pool(shape, *branches, payload=b"")).SerializeToString()


def stream_block(nbytes: int) -> bytes:
    """Return a message of PoolStream with a block of zeros."""
    return pool_pb2.PoolStreamRequest(payload=bytes(nbytes)).SerializeToString()


def infer(layer: str, shape: tuple[int, ...], datatype: str, payload: bytes) -> bytes:
    """Return a ModelInferRequest for the model `pool`."""
    message = pb.ModelInferRequest(model_name="pool", raw_input_contents=[payload])
    message.parameters["layer"].string_param = layer
    message.inputs.add(name="input", datatype=datatype, shape=shape)
    return message.SerializeToString()


@cache
def growing() -> bytes:
    """Return a PoolRequest of about 30 bytes, whose answer has 4 MiB: the growth that no limit forbids."""
    return pool((1, 1, 1, 1), [poolrpc.AdaptiveMaxPool2d(1024)]).SerializeToString()


@cache
def growing_infer() -> bytes:
    """Return a ModelInferRequest whose answer has 4 MiB."""
    return infer("AdaptiveMaxPool2d(1024)", (1, 1, 1, 1), "FP32", bytes(4))

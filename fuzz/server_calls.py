"""Calls of a running server with raw messages, each of which must end with a valid response or a reasoned status."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import grpc
import numpy as np
from google.protobuf.message import DecodeError

import poolrpc
from fuzz import http_requests, local_packets
from fuzz.findings import FoundError
from fuzz.seeds import ARENA_BYTES, ARENA_ID, REGION, REGION_BYTES, REGION_KEY
from poolrpc._transport.arena_memory import Arenas
from poolrpc._wire import codec
from poolrpc._wire.status import DETAILS_KEY, translate_rpc_error
from poolrpc.errors import BY_CODE, DOMAIN, InternalError, UnavailableError
from poolrpc.v1 import pool_pb2, standard_pb2
from poolrpc_server.protocols.messages import NO_MESSAGE
from poolrpc_server.protocols.triton.generated import open_inference_pb2 as pb
from poolrpc_server.protocols.triton.servicer import CONTROL_METHODS

if TYPE_CHECKING:
    from collections.abc import Callable

    from fuzz.mutate import Case

NATIVE, INFERENCE = "/poolrpc.v1.PoolService/", "/inference.GRPCInferenceService/"
DEADLINE = 30.0
"""Seconds after which a call counts as hung."""

REPEAT_EVERY = 8
"""One response in so many is compared with the response to the same message as protobuf encodes it."""

FOLDER = Path("/dev/shm")  # noqa: S108 - the folder of shm_open


class Peer:
    """A caller of one server, with an arena and a shared-memory region for the cases that name them."""

    def __init__(self, address: str, path: str, explorer: str, *, crowded: bool = False) -> None:
        """Connect.

        Args:
            address: The server's address, for calls.
            path: The server's unix socket, for arenas.
            explorer: The address of its explorer.
            crowded: Whether there are other callers, so that calls may be rejected.

        """
        self._channel = grpc.insecure_channel(address)
        self._crowded = crowded
        self._path = path
        self._explorer = explorer
        self._arenas = Arenas(path, arena_bytes=ARENA_BYTES)
        span = self._arenas.allocate(ARENA_BYTES)
        if span is None:
            raise RuntimeError(f"expected an arena, got none: {self._arenas.rejection}")
        self._span = span
        self._file = FOLDER / f"{REGION_KEY[:-8]}{os.getpid():08d}"
        self._file.write_bytes(bytes(REGION_BYTES))
        self._placeholders = ((ARENA_ID, span.arena_id), (REGION_KEY.encode(), self._file.name.encode()))
        unary, stream = self._channel.unary_unary, self._channel.stream_stream
        self._calls: dict[str, Callable[..., Any]] = {
            "Pool": unary(f"{NATIVE}Pool"),
            "PoolStream": stream(f"{NATIVE}PoolStream"),
            "InferShape": unary(f"{NATIVE}InferShape"),
            "ModelInfer": unary(f"{INFERENCE}ModelInfer"),
            "ModelStreamInfer": stream(f"{INFERENCE}ModelStreamInfer"),
        }
        self._as_streams = {
            each: self._channel.stream_unary(f"{INFERENCE if each == 'ModelInfer' else NATIVE}{each}")
            for each in ("Pool", "InferShape", "ModelInfer")
        }
        self._quick = [(unary(f"{NATIVE}GetServerInfo"), pool_pb2.GetServerInfoRequest, pool_pb2.GetServerInfoResponse)]
        for name in CONTROL_METHODS:
            kinds = (getattr(pb, f"{name}{end}") for end in ("Request", "Response"))
            self._quick.append((unary(INFERENCE + name), *kinds))
        self._register = threading.Lock()
        self._client = poolrpc.PoolClient(f"unix:{path}")

    def close(self) -> None:
        """Release everything."""
        self._client.close()
        self._channel.close()
        self._arenas.close()
        self._file.unlink()

    def judge(self, target: str, case: Case) -> str:
        """Run a case, and return how it ended.

        Raises:
            FoundError: It ended in a way that is a bug.

        """
        if target == "http":
            return http_requests.converse(self._explorer, case)
        messages = [self._with_ours(each) for each in case]
        if target == "quick":
            call, request, response = self._quick[((messages or [b""])[0] or b"\0")[0] % len(self._quick)]
            data = b"".join(messages[1:])
            return self._ended(lambda: response.FromString(call(data, timeout=DEADLINE)), _parses(request, data))
        call = self._calls[target]
        if len(messages) != 1 and "Stream" not in target:
            # The method receives the first of several messages, and rejects a call without any.
            call = self._as_streams[target]
            return self._ended(lambda: call(iter(messages), timeout=DEADLINE), parses=None)
        if "Stream" in target:
            return self._ended(lambda: _drained(call(iter(messages), timeout=DEADLINE), target), parses=None)
        kind = {"Pool": pool_pb2.PoolRequest, "InferShape": pool_pb2.InferShapeRequest}.get(
            target, pb.ModelInferRequest
        )
        judged = {"Pool": self._judge_pool, "InferShape": _judge_shapes, "ModelInfer": _judge_infer}[target]
        data = messages[0]
        return self._ended(lambda: judged(data, call(data, timeout=DEADLINE)), _parses(kind, data))

    def converse(self, case: Case) -> str:
        """Send the local calls of a case, and return how they ended.

        Raises:
            FoundError: They ended in a way that is a bug.

        """
        return local_packets.converse(self._path, case, self._with_ours)

    def check_calls(self) -> None:
        """Check that valid calls have the right results, bit for bit, through every transport and protocol.

        Raises:
            AssertionError: One has not.

        """
        x = np.random.default_rng(1).standard_normal((2, 3, 8, 8), np.float32)
        expected = x.reshape(2, 3, 4, 2, 4, 2).max((3, 5))
        for transport in ("unary", "stream", "arena", "local"):
            output = self._client.pool(x, poolrpc.MaxPool2d(2), transport=transport, timeout=DEADLINE).output
            np.testing.assert_array_equal(output, expected)
        http_requests.check(self._explorer, x, expected)
        message = pb.ModelInferRequest(model_name="pool", raw_input_contents=[x.tobytes()])
        message.parameters["layer"].string_param = "MaxPool2d(2)"
        message.inputs.add(name="input", datatype="FP32", shape=x.shape)
        data = self._calls["ModelInfer"](message.SerializeToString(), timeout=DEADLINE)
        (raw,) = pb.ModelInferResponse.FromString(data).raw_output_contents
        np.testing.assert_array_equal(np.frombuffer(raw, np.float32).reshape(expected.shape), expected)

    def register(self) -> None:
        """Register the region again, which a case may have unregistered."""
        register = pb.SystemSharedMemoryRegisterRequest(name=REGION, key=self._file.name, byte_size=REGION_BYTES)
        forget = pb.SystemSharedMemoryUnregisterRequest()
        with self._register, suppress(grpc.RpcError):
            for name, message in (("Unregister", forget), ("Register", register)):
                method = f"SystemSharedMemory{name}"
                self._quick[1 + CONTROL_METHODS.index(method)][0](message.SerializeToString(), timeout=DEADLINE)

    def _with_ours(self, data: bytes) -> bytes:
        for placeholder, ours in self._placeholders:
            data = data.replace(placeholder, ours)
        return data

    def _ended(self, call: Callable[[], object], parses: bool | None) -> str:  # noqa: FBT001 - not an option
        try:
            ending = call()
        except grpc.RpcError as error:
            return self._status(error, parses=parses)
        except DecodeError:
            raise FoundError("a response that does not parse") from None
        if parses is False:
            raise FoundError("a response to bytes that are not a message")
        return ending if isinstance(ending, str) else "OK"

    def _status(self, failure: Any, *, parses: bool | None) -> str:  # noqa: ANN401 - both a grpc.RpcError and a grpc.Call
        error = translate_rpc_error(failure)
        typed = _reason_of(failure.trailing_metadata())
        ending = f"{error.code}/{error.reason}" if typed else f"{failure.code().name}/gRPC"
        unparsed = isinstance(error, InternalError) and typed == NO_MESSAGE
        if unparsed and parses:
            raise FoundError(f"{ending} for a valid message: {error.message}")
        if parses is False and not unparsed:
            raise FoundError(f"{ending} for bytes that are not a message: {error.message}")
        if unparsed:
            return ending
        if not typed and error.code == "UNIMPLEMENTED" and "exactly one request message" in error.message:
            return ending  # gRPC's own status for a call without a message
        if not typed or error.code not in BY_CODE or isinstance(error, InternalError) or error.code == "CANCELLED":
            raise FoundError(f"{ending}: {error.message}")
        if isinstance(error, UnavailableError) and not self._crowded:
            raise FoundError(f"{ending} for the only caller: {error.message}")
        return ending

    def _judge_pool(self, data: bytes, response: bytes) -> None:
        message = pool_pb2.PoolRequest.FromString(data)
        got = pool_pb2.PoolResponse.FromString(response)
        request = codec.decode_request(message)
        expected = request.results()
        if tuple(codec.decode_results(got.results)) != expected:
            raise FoundError("results that do not match the request")
        nbytes = sum(spec.nbytes for spec in codec.payload_specs(expected))
        if len(got.payload) != (0 if message.HasField("arena") else nbytes):
            raise FoundError(f"expected a payload of {nbytes} bytes, got {len(got.payload)}")
        if crc32(data) % REPEAT_EVERY == 0 and not message.HasField("arena"):
            again = self._calls["Pool"](message.SerializeToString(), timeout=DEADLINE)
            if again != response:
                raise FoundError("another response to the same message as protobuf encodes it")


def _judge_shapes(data: bytes, response: bytes) -> None:
    shape, branches, layout, _, operand_shape = codec.decode_shape_request(pool_pb2.InferShapeRequest.FromString(data))
    got = codec.decode_shape_response(pool_pb2.InferShapeResponse.FromString(response))
    if got != poolrpc.chains.branch_shapes(shape, branches, layout, (), operand_shape):
        raise FoundError("shapes that do not match the request")


def _judge_infer(data: bytes, response: bytes) -> None:
    request, got = pb.ModelInferRequest.FromString(data), pb.ModelInferResponse.FromString(response)
    if got.id != request.id:
        raise FoundError("another id")
    if len(got.outputs) != len(got.raw_output_contents):
        raise FoundError(f"{len(got.outputs)} outputs with {len(got.raw_output_contents)} tensors")


def _drained(responses: Any, target: str) -> str:  # noqa: ANN401 - gRPC's call
    """Return how the calls in a stream ended, if each has its own ending."""
    if target == "PoolStream":
        for each in responses:
            pool_pb2.PoolStreamResponse.FromString(each)
        return "OK"
    failures = [pb.ModelStreamInferResponse.FromString(each).error_message for each in responses]
    for failure in failures:
        code = failure.partition(":")[0]
        if failure and (
            code not in BY_CODE or (code == "INTERNAL" and not failure.endswith("got bytes that are not one"))
        ):
            raise FoundError(failure)
    return "OK" + "".join(f"+{code}" for code in sorted({each.partition(":")[0] for each in failures if each}))


def _parses(kind: Any, data: bytes) -> bool:  # noqa: ANN401 - any message's class
    try:
        kind.FromString(data)
    except DecodeError:
        return False
    return True


def _reason_of(metadata: Any) -> str:  # noqa: ANN401 - gRPC's metadata
    details = dict(metadata or ()).get(DETAILS_KEY)
    if details is None:
        return ""
    info = standard_pb2.ErrorInfo.FromString(standard_pb2.Status.FromString(details).details[0].value)
    return info.reason if info.domain == DOMAIN else ""

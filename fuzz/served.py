"""Calls of a running server by raw messages, each judged: an answer that is one, or a status that says why."""

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
from fuzz.findings import FoundError
from fuzz.seeds import ARENA_BYTES, ARENA_ID, REGION, REGION_BYTES, REGION_KEY
from poolrpc._transport.arena_memory import Arenas
from poolrpc._wire import codec
from poolrpc._wire.status import DETAILS_KEY, translate_rpc_error
from poolrpc.errors import BY_CODE, DOMAIN, InternalError, UnavailableError
from poolrpc.v1 import pool_pb2, standard_pb2
from poolrpc_server.protocols.triton.generated import open_inference_pb2 as pb
from poolrpc_server.protocols.triton.servicer import QUICK
from poolrpc_server.transports.grpc.interceptor import NO_MESSAGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from fuzz.mutate import Case

NATIVE, INFERENCE = "/poolrpc.v1.PoolService/", "/inference.GRPCInferenceService/"
DEADLINE = 30.0
"""Seconds after which a call counts as hung."""

ASKED_AGAIN = 8
"""One answer of so many is held against that to the same message as protobuf writes it."""

FOLDER = Path("/dev/shm")  # noqa: S108 - where shm_open has its files


class Peer:
    """A caller of one server, with an arena and a region of shared memory for the cases that name them."""

    def __init__(self, address: str, path: str, *, crowded: bool = False) -> None:
        """Connect.

        Args:
            address: The server's, for calls.
            path: Its unix socket, for arenas.
            crowded: Whether there are other callers, for whom calls may be refused.

        """
        self._channel = grpc.insecure_channel(address)
        self._crowded = crowded
        self._arenas = Arenas(path, arena_bytes=ARENA_BYTES)
        span = self._arenas.allocate(ARENA_BYTES)
        if span is None:
            raise RuntimeError(f"expected an arena, got none: {self._arenas.rejection}")
        self._span = span
        self._file = FOLDER / f"{REGION_KEY[:-8]}{os.getpid():08d}"
        self._file.write_bytes(bytes(REGION_BYTES))
        self._stand_ins = ((ARENA_ID, span.arena_id), (REGION_KEY.encode(), self._file.name.encode()))
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
        for name in QUICK:
            kinds = (getattr(pb, f"{name}{end}") for end in ("Request", "Response"))
            self._quick.append((unary(INFERENCE + name), *kinds))
        self._register = threading.Lock()
        self._client = poolrpc.PoolClient(f"unix:{path}")

    def close(self) -> None:
        """Leave nothing."""
        self._client.close()
        self._channel.close()
        self._arenas.close()
        self._file.unlink()

    def judge(self, target: str, case: Case) -> str:
        """Run a case and say how it ended.

        Raises:
            FoundError: As none should.

        """
        messages = [self._with_ours(each) for each in case]
        if target == "quick":
            call, asked, answered = self._quick[((messages or [b""])[0] or b"\0")[0] % len(self._quick)]
            data = b"".join(messages[1:])
            return self._ended(lambda: answered.FromString(call(data, timeout=DEADLINE)), _parses(asked, data))
        call = self._calls[target]
        if len(messages) != 1 and "Stream" not in target:
            # The method takes one message, and gets the first of several, or refuses to have none.
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

    def check_well(self) -> None:
        """See that a good caller is answered, bit for bit right, by every way and door.

        Raises:
            AssertionError: It isn't.

        """
        x = np.random.default_rng(1).standard_normal((2, 3, 8, 8), np.float32)
        right = x.reshape(2, 3, 4, 2, 4, 2).max((3, 5))
        for transport in ("unary", "stream", "arena"):
            output = self._client.pool(x, poolrpc.MaxPool2d(2), transport=transport, timeout=DEADLINE).output
            np.testing.assert_array_equal(output, right)
        message = pb.ModelInferRequest(model_name="pool", raw_input_contents=[x.tobytes()])
        message.parameters["layer"].string_param = "MaxPool2d(2)"
        message.inputs.add(name="input", datatype="FP32", shape=x.shape)
        data = self._calls["ModelInfer"](message.SerializeToString(), timeout=DEADLINE)
        (raw,) = pb.ModelInferResponse.FromString(data).raw_output_contents
        np.testing.assert_array_equal(np.frombuffer(raw, np.float32).reshape(right.shape), right)

    def register(self) -> None:
        """Have the server know the region, which a case may have made it forget."""
        register = pb.SystemSharedMemoryRegisterRequest(name=REGION, key=self._file.name, byte_size=REGION_BYTES)
        forget = pb.SystemSharedMemoryUnregisterRequest()
        with self._register, suppress(grpc.RpcError):
            for name, message in (("Unregister", forget), ("Register", register)):
                method = f"SystemSharedMemory{name}"
                self._quick[1 + QUICK.index(method)][0](message.SerializeToString(), timeout=DEADLINE)

    def _with_ours(self, data: bytes) -> bytes:
        for stand_in, ours in self._stand_ins:
            data = data.replace(stand_in, ours)
        return data

    def _ended(self, call: Callable[[], object], parses: bool | None) -> str:  # noqa: FBT001 - a fact
        try:
            ending = call()
        except grpc.RpcError as error:
            return self._status(error, parses=parses)
        except DecodeError:
            raise FoundError("an answer that is none") from None
        if parses is False:
            raise FoundError("an answer to what is no message")
        return ending if isinstance(ending, str) else "OK"

    def _status(self, failure: Any, *, parses: bool | None) -> str:  # noqa: ANN401 - grpc.RpcError and grpc.Call in one
        error = translate_rpc_error(failure)
        typed = _reason_of(failure.trailing_metadata())
        ending = f"{error.code}/{error.reason}" if typed else f"{failure.code().name}/gRPC"
        unparsed = isinstance(error, InternalError) and typed == NO_MESSAGE
        if unparsed and parses:
            raise FoundError(f"{ending} to what is a message: {error.message}")
        if parses is False and not unparsed:
            raise FoundError(f"{ending} to what is no message: {error.message}")
        if unparsed:
            return ending
        if not typed and error.code == "UNIMPLEMENTED" and "exactly one request message" in error.message:
            return ending  # gRPC's own, for a call without a message
        if not typed or error.code not in BY_CODE or isinstance(error, InternalError) or error.code == "CANCELLED":
            raise FoundError(f"{ending}: {error.message}")
        if isinstance(error, UnavailableError) and not self._crowded:
            raise FoundError(f"{ending} to one caller alone: {error.message}")
        return ending

    def _judge_pool(self, data: bytes, answer: bytes) -> None:
        message = pool_pb2.PoolRequest.FromString(data)
        got = pool_pb2.PoolResponse.FromString(answer)
        request = codec.decode_request(message)
        expected = request.results()
        if tuple(codec.decode_results(got.results)) != expected:
            raise FoundError("other results than were asked for")
        nbytes = sum(spec.nbytes for spec in codec.payload_specs(expected))
        if len(got.payload) != (0 if message.HasField("arena") else nbytes):
            raise FoundError(f"expected a payload of {nbytes} bytes, got {len(got.payload)}")
        if crc32(data) % ASKED_AGAIN == 0 and not message.HasField("arena"):
            again = self._calls["Pool"](message.SerializeToString(), timeout=DEADLINE)
            if again != answer:
                raise FoundError("another answer to the same message as protobuf writes it")


def _judge_shapes(data: bytes, answer: bytes) -> None:
    shape, branches, layout = codec.decode_shape_request(pool_pb2.InferShapeRequest.FromString(data))
    got = codec.decode_shape_response(pool_pb2.InferShapeResponse.FromString(answer))
    if got != poolrpc.chains.branch_shapes(shape, branches, layout):
        raise FoundError("other shapes than were asked for")


def _judge_infer(data: bytes, answer: bytes) -> None:
    asked, got = pb.ModelInferRequest.FromString(data), pb.ModelInferResponse.FromString(answer)
    if got.id != asked.id:
        raise FoundError("another id")
    if len(got.outputs) != len(got.raw_output_contents):
        raise FoundError(f"{len(got.outputs)} outputs with {len(got.raw_output_contents)} tensors")


def _drained(answers: Any, target: str) -> str:  # noqa: ANN401 - gRPC's call
    """Give how the calls in a stream ended, where they end each by itself."""
    if target == "PoolStream":
        for each in answers:
            pool_pb2.PoolStreamResponse.FromString(each)
        return "OK"
    failures = [pb.ModelStreamInferResponse.FromString(each).error_message for each in answers]
    for failure in failures:
        code = failure.partition(":")[0]
        if failure and (
            code not in BY_CODE or (code == "INTERNAL" and not failure.endswith("got bytes that are none"))
        ):
            raise FoundError(failure)
    return "OK" + "".join(f"+{code}" for code in sorted({each.partition(":")[0] for each in failures if each}))


def _parses(kind: Any, data: bytes) -> bool:  # noqa: ANN401 - any message's class
    try:
        kind.FromString(data)
    except DecodeError:
        return False
    return True


def _reason_of(metadata: Any) -> str:  # noqa: ANN401 - gRPC's pairs
    details = dict(metadata or ()).get(DETAILS_KEY)
    if details is None:
        return ""
    info = standard_pb2.ErrorInfo.FromString(standard_pb2.Status.FromString(details).details[0].value)
    return info.reason if info.domain == DOMAIN else ""

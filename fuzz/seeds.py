"""The seeds of mutation: valid calls of every kind, with many layers, dtypes, shapes and transports."""

from __future__ import annotations

import base64
import json
import struct
from dataclasses import fields, is_dataclass
from math import prod
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from poolrpc._shapes.rules import check_shape
from poolrpc._wire import codec, framing
from poolrpc._wire.arena_packets import encode_attach_error, encode_attach_request, encode_attach_response
from poolrpc._wire.status import encode_error
from poolrpc.chains import Planes, operand_name, spatial_dims
from poolrpc.errors import InvalidArgumentError, LimitExceededError, UnavailableError
from poolrpc.expression import parse_branches
from poolrpc.tensors import ITEM_BYTES, TensorSpec
from poolrpc.v1 import pool_pb2
from poolrpc_server.protocols.triton.datatypes import CONTENTS_FIELDS, DATATYPE_OF
from poolrpc_server.protocols.triton.generated import open_inference_pb2 as pb
from poolrpc_server.protocols.triton.servicer import CONTROL_METHODS
from poolrpc_server.protocols.triton.shared_memory import PARAMETERS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fuzz.mutate import Case
    from poolrpc.chains import Chain

EXPRESSIONS = (
    "MaxPool1d(2)",
    "MaxPool2d(3, stride=2, padding=1)",
    "MaxPool2d((2, 3), dilation=(2, 1), ceil_mode=True, return_indices=True)",
    "MaxPool3d(2, stride=1)",
    "AvgPool1d(3, stride=2, padding=1, count_include_pad=False)",
    "AvgPool2d(2, divisor_override=3)",
    "AvgPool2d(3, padding=1, ceil_mode=True)",
    "AvgPool3d((1, 2, 2))",
    "LPPool1d(2, 3, stride=2)",
    "LPPool2d(1.5, 2)",
    "LPPool3d(3, 2)",
    "FractionalMaxPool2d(2, output_size=(2, 3), seed=7)",
    "FractionalMaxPool2d(2, output_ratio=0.5, return_indices=True)",
    "FractionalMaxPool3d(2, output_size=2)",
    "AdaptiveMaxPool1d(3)",
    "AdaptiveMaxPool2d((2, None), return_indices=True)",
    "AdaptiveMaxPool3d(2)",
    "AdaptiveAvgPool1d(4)",
    "AdaptiveAvgPool2d((None, 3))",
    "AdaptiveAvgPool3d(1)",
    "MaxUnpool1d(2)",
    "MaxUnpool2d(2, stride=2)",
    "MaxUnpool3d(2)",
    "GlobalPool1d('max')",
    "GlobalPool2d('mean')",
    "GlobalPool3d('max')",
    "GlobalPool2d(LogSumExp(10))",
    "BlurPool2d(stride=1)",
    "BlurPool2d(4)",
    "MaxPool2d(3, stride=2, padding='same', return_indices=True)",
    "AvgPool2d(3, padding=((0, 2), (1, 0)))",
    "Pool1d('median', 3, stride=1, padding='same_lower')",
    "Pool2d('mean', 2, dilation=2, padding=1, count_include_pad=True)",
    "Pool2d(Norm(3), 2, ceil_mode=True)",
    "Pool3d(PowerMean(3, eps=0.001), 2)",
    "Pool2d(Softmax(-1), 3, padding=((0, 1), (2, 0)))",
    "SegmentPool('mean')",
    "[[SegmentPool('max'), MaxPool1d(1)], [GlobalPool1d('mean')]]",
    "RoIPool((2, 3), 0.5)",
    "[RoIAlign(2, aligned=True), MaxPool2d(2)]",
    "RoIAlign((1, 2), 0.5, sampling_ratio=2)",
    "[MaxPool2d(2), AvgPool2d(2, stride=1), GlobalPool2d('max')]",
    "[[AdaptiveAvgPool2d(1)], [MaxPool2d(2), AdaptiveAvgPool2d(2)]]",
    "[ToDtype('float32', scale=True), Normalize(0.5, 0.25), AvgPool2d(2)]",
    "[[ToDtype('float64'), AvgPool1d(2), Round(), ToDtype('uint8')], [MaxPool1d(2)]]",
    "[[MaxPool1d(2, return_indices=True)], [AvgPool1d(2)], [GlobalPool1d('mean')]]",
)
LIMITS = {
    "max_message_bytes": 2**23,
    "max_output_bytes": 2**20,
    "max_output_growth": 64,
    "max_work": 2_000_000,
    "max_inflight_bytes": 2**26,
    "max_arena_bytes": 2**27,
}
"""Limits with which a case takes a millisecond or two."""

MODELS = ("stem=MaxPool2d(3, stride=2, padding=1)", "twice=[MaxPool2d(2), AvgPool2d(2)]")

ARENA_ID = b"the arena's id.."
"""A placeholder for the id of the fuzzer's arena."""

ARENA_BYTES = 2**16
REGION_KEY = "poolrpc-fuzz-00000000"
"""A placeholder for the name of the fuzzer's file in /dev/shm."""

REGION = "region"
REGION_BYTES = 2**16


def requests(rng: Random, rounds: int = 2) -> Iterator[tuple[str, codec.Request, bytes]]:
    """Yield expressions, a request for each, and the bytes of its tensors."""
    for text in EXPRESSIONS * rounds:
        branches = parse_branches(text)
        dims = spatial_dims(branches)
        dtypes = [each for each in ITEM_BYTES if all(_takes(chain, each) for chain in branches)]
        shape = (rng.randrange(1, 3), rng.randrange(1, 4), *(rng.randrange(4, 8) for _ in range(dims)))
        spec = TensorSpec(rng.choice(dtypes), shape[rng.randrange(2) :], rng.choice(("NCHW", "NCHW", "NHWC")))
        operand, contents = _operand(rng, branches, spec, dims)
        steps = [sorted(rng.sample(range(len(chain)), rng.randint(1, len(chain)))) for chain in branches]
        outputs = tuple(map(tuple, steps)) if rng.randrange(2) else ()
        request = codec.Request(spec, branches, operand, outputs)
        try:
            request.results()
        except InvalidArgumentError:
            continue  # the layer does not fit the shape
        yield text, request, rng.randbytes(spec.nbytes) + contents


def _operand(rng: Random, branches: tuple[Chain, ...], spec: TensorSpec, dims: int) -> tuple[TensorSpec | None, bytes]:
    """Return the operand that branches take, or may take, and its bytes, mostly with valid values."""
    name = operand_name(branches, given=bool(rng.randrange(2)))
    batched, last = len(spec.shape) == dims + 2, spec.layout == "NHWC"
    plane = spec.shape[-dims - 1 : -1] if last else spec.shape[-dims:]
    if name == "indices":
        return TensorSpec("int64", spec.shape, spec.layout), bytes(8 * spec.numel)
    if name == "weights":
        shape = (*spec.shape[:batched], *plane)
        return TensorSpec("float32", shape), struct.pack(
            f"<{prod(shape)}f", *(rng.randrange(3) for _ in range(prod(shape)))
        )
    if name == "offsets":
        offsets = sorted(rng.randrange(plane[0] + 1) for _ in range(rng.randrange(2, 5)))
        return TensorSpec("int64", (len(offsets),)), struct.pack(f"<{len(offsets)}q", *offsets)
    if name == "boxes":
        count, images = rng.randrange(4), spec.shape[0] if batched else 1
        numbers = [n for _ in range(count) for n in (rng.randrange(images), *(rng.uniform(-2, 9) for _ in range(4)))]
        return TensorSpec("float32", (count, 5)), struct.pack(f"<{len(numbers)}f", *numbers)
    return None, b""


def _takes(chain: Chain, dtype: str) -> bool:
    given = codec.Request(TensorSpec(dtype, ()), (chain,)).dtypes(chain)
    return all(each in layer.dtypes for layer, each in zip(chain, given, strict=False))


def pool(rng: Random) -> Iterator[Case]:
    """Yield calls of Pool: plain, padded, and in an arena."""
    for _, request, payload in requests(rng):
        header = codec.encode_request(request).SerializeToString()
        yield (framing.join(header, [payload]),)
        yield (framing.join(framing.pad(header, len(payload)), [payload]),)
        ranges = codec.ArenaRanges(ARENA_ID, (0, ARENA_BYTES // 2), (ARENA_BYTES // 2, ARENA_BYTES // 2))
        yield (header + codec.encode_ranges(ranges),)


def pool_stream(rng: Random) -> Iterator[Case]:
    """Yield calls of PoolStream, of one block or several, in one message or several."""
    for _, request, payload in requests(rng):
        first = pool_pb2.PoolStreamRequest(request=codec.encode_request(request)).SerializeToString()
        if request.operand_name not in {"", "indices"}:  # it is sent before the blocks
            split = request.input.nbytes
            first, payload = framing.join(first, [payload[split:]]), payload[:split]  # noqa: PLW2901 - of the stream
        planes = Planes(request.input, check_shape(request.input.shape, spatial_dims(request.branches)))
        yield first, *framing.chunks([payload], padded=True)
        if request.operand is None:
            step = planes.plane_bytes * rng.randrange(1, 3)
            yield first, *(framing.join(b"", [payload[i : i + step]]) for i in range(0, len(payload), step))
            yield first, framing.join(framing.UNFINISHED, [payload[:7]]), framing.join(b"", [payload[7:]])


def infer_shape(rng: Random) -> Iterator[Case]:
    """Yield calls of InferShape."""
    for _, request, _ in requests(rng):
        spec = request.input
        operand = None if request.operand is None else request.operand.shape
        yield (codec.encode_shape_request(spec.shape, request.branches, spec.layout, operand).SerializeToString(),)


def infers(rng: Random) -> Iterator[bytes]:
    """Yield calls of ModelInfer: raw, typed and shared-memory tensors, of `pool` and of presets."""
    for text, request, payload in requests(rng):
        if request.input.layout == "NCHW":
            for way in ("raw", "typed", "region"):
                yield _infer(text, request, payload, way, rng).SerializeToString()
    for name in ("stem", "twice"):
        message = pb.ModelInferRequest(model_name=name, model_version="1")
        message.inputs.add(name="input", datatype="FP32", shape=(1, 2, 8, 8))
        message.raw_input_contents.append(rng.randbytes(4 * 128))
        yield message.SerializeToString()


def _infer(text: str, request: codec.Request, payload: bytes, way: str, rng: Random) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="pool", id="7")
    message.parameters["layer"].string_param = text
    end = 0
    for name, spec in zip(("input", request.operand_name), request.specs, strict=False):
        start, end = end, end + spec.nbytes
        tensor = message.inputs.add(name=name, datatype=DATATYPE_OF[spec.dtype], shape=spec.shape)
        if way == "typed" and spec.dtype in CONTENTS_FIELDS:
            getattr(tensor.contents, CONTENTS_FIELDS[spec.dtype]).extend([rng.randrange(2)] * spec.numel)
        elif way == "region":
            _place(tensor, start, spec.nbytes)
        else:
            message.raw_input_contents.append(payload[start:end])
    if rng.randrange(2):
        wanted = message.outputs.add(name="output")
        if way == "region":
            _place(wanted, REGION_BYTES // 2, REGION_BYTES // 2)
    if rng.randrange(3) == 0:
        message.parameters["priority"].uint64_param = rng.randrange(4)
        message.parameters["timeout"].int64_param = 10**7
    return message


def _place(
    tensor: pb.ModelInferRequest.InferInputTensor | pb.ModelInferRequest.InferRequestedOutputTensor,
    offset: int,
    nbytes: int,
) -> None:
    tensor.parameters[PARAMETERS[0]].string_param = REGION
    tensor.parameters[PARAMETERS[1]].int64_param = nbytes
    tensor.parameters[PARAMETERS[2]].int64_param = offset


def model_infer(rng: Random) -> Iterator[Case]:
    """Yield calls of ModelInfer."""
    for each in infers(rng):
        yield (each,)


def model_stream_infer(rng: Random) -> Iterator[Case]:
    """Yield calls of ModelStreamInfer."""
    messages = [*infers(rng)]
    for at in range(0, len(messages), 2):
        yield tuple(messages[at : at + rng.randrange(1, 4)])


def quick(_: Random) -> Iterator[Case]:
    """Yield calls of every method that computes nothing; the first message is the method's number."""
    named = ("ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics")
    for number, method in enumerate(("GetServerInfo", *CONTROL_METHODS)):
        lead = bytes((number,))
        yield lead, b""
        for model in ("pool", "stem", "unknown"):
            if method in named:
                yield lead, getattr(pb, f"{method}Request")(name=model, version="1").SerializeToString()
        if method == "RepositoryIndex":
            yield lead, pb.RepositoryIndexRequest(ready=True).SerializeToString()
        if method.startswith("SystemSharedMemory"):
            values = {"name": REGION, "key": f"/{REGION_KEY}", "offset": 0, "byte_size": REGION_BYTES}
            kind = getattr(pb, f"{method}Request")
            yield (
                lead,
                kind(**{k: v for k, v in values.items() if k in kind.DESCRIPTOR.fields_by_name}).SerializeToString(),
            )


QUESTIONS = tuple(request for _, request, _ in requests(Random(7), 1))
"""The requests of a client to which the fuzzer responds."""

FDS, NEW, READ, CLOSE, SHUT, WRONG, CUT = 3, 4, 8, 16, 32, 64, 128
"""Bits of the first byte of a step: descriptors to send, a new connection before it, what to do after it, and what
is wrong with a local call: the length of its header, or its end.
"""


def attach(rng: Random) -> Iterator[Case]:
    """Yield conversations with the arena's socket: each step is a byte of flags, and a packet."""
    for size in (1, 4096, 65536, 2**40, 0):
        packet = encode_attach_request(size)
        for flags in (NEW | READ, NEW | READ | 1, NEW | CLOSE | 3, NEW | SHUT | READ, NEW):
            yield (bytes((flags,)) + packet,)
            yield bytes((NEW | READ,)) + packet, bytes((flags & ~NEW | rng.randrange(4),)) + packet
            yield bytes((NEW,)) + packet, bytes((NEW | READ,)) + packet, bytes((flags,)) + packet


def local(rng: Random) -> Iterator[Case]:
    """Yield local calls: of each, a byte of flags, its header and its request."""
    methods = [("Pool", pool, True), ("InferShape", infer_shape, False), ("GetServerInfo", _empty, False)]
    for method, cases, computes in methods:
        for (request,) in cases(rng):
            call = pool_pb2.LocalCall(method=f"/poolrpc.v1.PoolService/{method}")
            if computes and rng.randrange(2):
                call.metadata.extend((b"priority", str(rng.randrange(4)).encode(), b"x-bin", rng.randbytes(4)))
            header, flags = call.SerializeToString(), rng.choice((READ, READ, READ, NEW | READ, 0, CLOSE))
            yield bytes((flags,)), header, request
            yield bytes((flags, 0, 0)) + rng.choice((0, 10**6, 10**8)).to_bytes(8, "little"), header, request
            other = rng.choice((1, SHUT, WRONG, CUT, NEW, 0))
            yield bytes((other | READ, len(header), 0)), header, request, bytes((READ,)), header, request


def http(rng: Random) -> Iterator[Case]:
    """Yield requests of HTTP: of each, a byte of flags, its line and headers, and its body."""
    for text, request, payload in requests(rng, 1):
        spec = request.input
        if len(request.branches) > 1 or request.operand is not None or request.outputs:
            continue
        tensor = {"data": base64.b64encode(payload).decode(), "shape": spec.shape, "dtype": spec.dtype}
        layers = [
            {"name": each.name, **{f.name: getattr(each, f.name) for f in fields(each)}} for each in request.branches[0]
        ]  # type: ignore[arg-type]  # every layer is a dataclass
        parameters = {"layout": spec.layout, "encoding": rng.choice(("list", "base64")), "steps": rng.random() < 0.5}
        yield _request("pool", {"layer": text, "input": tensor, **parameters}, rng)
        if any(is_dataclass(value) for layer in layers for value in layer.values()):
            continue  # a reduction with parameters has only an expression
        yield _request("pool", {"layer": layers, "input": tensor, **parameters}, rng)
        numbers = np.zeros(spec.shape, int).tolist()
        yield _request("pool", {"layer": layers, "input": numbers, "dtype": spec.dtype, "layout": spec.layout}, rng)
        yield _request("shape", {"layer": layers, "shape": spec.shape, "layout": spec.layout}, rng)
        yield _request("explain", {"layer": layers[-1], "shape": spec.shape[-spatial_dims(request.branches) :]}, rng)
    plane = {"input": [[1, 2], [3, 4]], "steps": rng.random() < 0.5, "encoding": rng.choice(("list", "base64"))}
    branches = ["MaxPool2d(2)", ["Round()", {"name": "AvgPool2d", "kernel_size": 2}]]
    weights, boxes = [[1, 0], [1, 1]], [[0, 0, 0, 1, 1.5]]
    yield _request("pool", {"layer": "GlobalPool2d('mean')", "branches": branches, "weights": weights, **plane}, rng)
    yield _request("pool", {"layer": "RoIAlign(2)", "branches": branches, "boxes": boxes, **plane}, rng)
    yield _request("pool", {"layer": "SegmentPool('max')", "input": [1, 2, 3], "offsets": [0, 1, 3]}, rng)
    unpool = {"layer": "MaxUnpool2d(2)", "input": [[1, 2], [3, 4]], "indices": [[0, 2], [8, 10]]}
    yield _request("pool", unpool, rng)
    yield _request("explain", {"layer": "AvgPool2d(2)", "input": [[1, 2, 3], [4, 5, 6]]}, rng)
    for path in ("/", "/explorer.js", "/v1/info", "/v1/load", "/nothing"):
        yield bytes((READ,)), f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(), b""


def _request(method: str, body: dict[str, object], rng: Random) -> Case:
    lines = [f"POST /v1/{method} HTTP/1.1", "Host: localhost"]
    lines += rng.choice(([], [], ["Priority: 1"], ["Timeout: 10"], ["Timeout: 0.001"], ["Expect: 100-continue"]))
    return bytes((READ | rng.choice((0, 0, 0, SHUT, NEW)),)), "\r\n".join(lines).encode(), json.dumps(body).encode()


def _empty(_: Random) -> Iterator[Case]:
    yield (b"",)


def answers(rng: Random) -> Iterator[Case]:
    """Yield a server's messages: the first one selects the kind and the request, the others are the response."""
    for number, request in enumerate(QUESTIONS):
        question = bytes((number,))
        results = request.results()
        payload = rng.randbytes(sum(spec.nbytes for spec in codec.payload_specs(results)))
        messages = codec.encode_results(results)
        yield b"\0" + question, framing.join(pool_pb2.PoolResponse(results=messages).SerializeToString(), [payload])
        head = pool_pb2.PoolStreamResponse(results=messages).SerializeToString()
        yield b"\1" + question, head, *framing.chunks([payload])
        yield b"\1" + question, head, framing.join(framing.UNFINISHED, [payload[:5]]), framing.join(b"", [payload[5:]])
    for error, number in (
        (InvalidArgumentError("expected 1, got 2", field="input.shape"), 3),
        (LimitExceededError("expected 1, got 2", reason="X", metadata={"limit": "1"}), 8),
        (UnavailableError("full", reason="QUEUE", retry_delay=0.25), 14),
    ):
        text, details = encode_error(error)
        yield bytes((2, number)) + text.encode(), details
    shapes = pool_pb2.InferShapeResponse(branches=[{"shapes": [{"dims": [1, 2]}]}])
    yield b"\3", shapes.SerializeToString()
    info = pool_pb2.GetServerInfoResponse(version="1", layers=[{"name": "MaxPool2d", "dtypes": [1]}])
    yield b"\4", info.SerializeToString()
    yield b"\5", b"\0", info.SerializeToString()
    yield b"\5", b"\1", encode_error(UnavailableError("full", reason="QUEUE", retry_delay=0.25))[1]


GIVEN_BYTES = 2**20
"""The size of the arena that the fuzzer gives to a client: the smallest for which a client asks."""

UNSEALED, SHORT = 4, 8
"""Bits of the first byte of what an arena's server sends, besides the number of descriptors."""


def attached(_: Random) -> Iterator[Case]:
    """Yield what an arena's server sends to a client: each step is a byte of flags, and a packet."""
    good = encode_attach_response(bytes(range(16)), GIVEN_BYTES)
    for flags in (1, 0, 2, 3, 1 | UNSEALED, 1 | SHORT):
        yield (bytes((flags,)) + good,)
    yield (b"\1" + encode_attach_response(bytes(16), 1),)
    yield (b"\1" + encode_attach_response(bytes(16), GIVEN_BYTES, "another.sock"),)
    yield (b"\0" + encode_attach_error(LimitExceededError("expected 1, got 2", reason="ARENA_QUOTA")),)
    yield b"\0" + good[:9], b"\1" + good


SEEDS = {
    "Pool": pool,
    "PoolStream": pool_stream,
    "InferShape": infer_shape,
    "ModelInfer": model_infer,
    "ModelStreamInfer": model_stream_infer,
    "quick": quick,
    "attach": attach,
    "local": local,
    "http": http,
    "answers": answers,
    "attached": attached,
}


SHARES = {
    "Pool": 20,
    "PoolStream": 6,
    "InferShape": 14,
    "ModelInfer": 20,
    "ModelStreamInfer": 4,
    "quick": 8,
    "attach": 6,
    "local": 8,
    "http": 6,
    "answers": 6,
    "attached": 2,
}
"""Shares in percent: slow targets have few cases, and the unary methods that compute have the most."""


def seeds(target: str, seed: int = 0) -> list[Case]:
    """Return the seeds of a target."""
    return list(SEEDS[target](Random(seed)))

"""Messages of the Open Inference Protocol to and from values; raw tensors stay where they lie."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from google.protobuf.message import DecodeError

from poolrpc._shapes.limits import MAX_BRANCHES, MAX_RANK
from poolrpc._shapes.rules import clip
from poolrpc._wire import framing
from poolrpc.errors import InternalError, InvalidArgumentError, LimitExceededError, UnsupportedError
from poolrpc.tensors import TensorSpec, array_bytes
from poolrpc_server.protocols.triton.generated import open_inference_pb2 as pb
from poolrpc_server.protocols.triton.shared_memory import Place

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from poolrpc.tensors import Bytes
    from poolrpc_server.presets import Preset
    from poolrpc_server.protocols.triton.shared_memory import Region
    from poolrpc_server.protocols.triton.statistics import ModelStatistics

VERSION = "1"
PLATFORM = "poolrpc"

DATATYPES = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "BF16": "bfloat16",
    "FP32": "float32",
    "FP64": "float64",
}
DATATYPE_OF = {dtype: name for name, dtype in DATATYPES.items()}
UNTAKEN = ("UINT16", "UINT32", "UINT64", "BYTES")
"""Datatypes of the protocol that no layer takes."""

CONTENTS = {
    "bool": "bool_contents",
    "uint8": "uint_contents",
    "int8": "int_contents",
    "int16": "int_contents",
    "int32": "int_contents",
    "int64": "int64_contents",
    "float32": "fp32_contents",
    "float64": "fp64_contents",
}
"""Where a tensor's numbers are that isn't raw."""

INPUTS = ("input", "indices")
RAW_INPUTS, RAW_OUTPUTS = 7, 6
"""The fields with tensors' bytes."""

MAX_HEADER_BYTES = 16 * 2**20
"""Of a message without raw tensors: protobuf makes of numbers in `contents` up to eight times the message."""

MAX_OUTPUTS = 2 * MAX_BRANCHES
URGENT, LEAST_URGENT = 1, 3
"""Priorities, as Triton counts them: 1 is the first, and what a server has no level for has its last."""

RESERVED = ("sequence_id", "sequence_start", "sequence_end", "headers", "binary_data_output")
"""Parameters that mean nothing to pooling: each request stands alone, and every tensor is raw."""

PLACE = ("shared_memory_region", "shared_memory_byte_size", "shared_memory_offset")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a ModelInferRequest asks for, apart from tensors' bytes; callers repeat themselves.

    Attributes:
        model: The model.
        layer: The parameter `layer`.
        inputs: The input, and its indices where there are any.
        outputs: The outputs that are wanted, by name. Empty: all.

    """

    model: str
    layer: str | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Infer:
    """A ModelInferRequest.

    Attributes:
        asked: What it asks for.
        sources: The bytes of each input, or where they are.
        targets: Where outputs go that don't go into the answer, by name.
        priority: A level of the batcher's; None where it says nothing.
        timeout: Seconds to wait for an answer; None where it says nothing.

    """

    asked: Asked
    sources: tuple[Bytes | Place, ...]
    targets: dict[str, Place]
    priority: int | None
    timeout: float | None


def open_infer(data: bytes) -> tuple[pb.ModelInferRequest, list[memoryview]]:
    """Give a ModelInferRequest without its raw tensors, and these.

    Raises:
        InternalError: These bytes are none.
        LimitExceededError: It is too large without raw tensors.

    """
    cut = framing.split_payloads(data, RAW_INPUTS)
    header, raws = (data, []) if cut is None else cut
    if len(header) > MAX_HEADER_BYTES:
        msg = f"expected at most {MAX_HEADER_BYTES} bytes beside raw_input_contents, got {len(header)}"
        limits = {"limit": str(MAX_HEADER_BYTES), "actual": str(len(header))}
        raise LimitExceededError(msg, reason="HEADER_TOO_LARGE", metadata=limits)
    try:
        message = pb.ModelInferRequest.FromString(header)
    except DecodeError:
        # The status that gRPC itself has for what it can't parse.
        msg = f"expected a {pb.ModelInferRequest.DESCRIPTOR.full_name}, got bytes that are none"
        raise InternalError(msg, reason="NO_MESSAGE") from None
    return message, raws or [memoryview(each) for each in message.raw_input_contents]


def decode_infer(message: pb.ModelInferRequest, raws: Sequence[memoryview]) -> Infer:
    """Give what a message says.

    Raises:
        InvalidArgumentError: A field is wrong.
        UnsupportedError: No layer takes an input's datatype.

    """
    layer, priority, timeout = _parameters(message.parameters)
    names, specs, sources = _inputs(message, raws)
    if names and names[0] != INPUTS[0]:
        names, specs, sources = names[::-1], specs[::-1], sources[::-1]
    if tuple(names) != INPUTS[: len(names)] or not names:
        raise InvalidArgumentError(f"expected input, and indices with a MaxUnpool, got {names}", field="inputs")
    if len(message.outputs) > MAX_OUTPUTS:
        raise InvalidArgumentError(f"expected at most {MAX_OUTPUTS}, got {len(message.outputs)}", field="outputs")
    outputs = tuple(each.name for each in message.outputs)
    targets = {}
    for i, each in enumerate(message.outputs):
        place = _place(each.parameters, f"outputs[{i}].parameters")
        if place is not None:
            targets[each.name] = place
    return Infer(Asked(message.model_name, layer, tuple(specs), outputs), tuple(sources), targets, priority, timeout)


def _inputs(
    message: pb.ModelInferRequest, raws: Sequence[memoryview]
) -> tuple[list[str], list[TensorSpec], list[Bytes | Place]]:
    # Counted before they are looked at: a message has room for millions.
    if len(message.inputs) > len(INPUTS):
        raise InvalidArgumentError(f"expected at most {len(INPUTS)}, got {len(message.inputs)}", field="inputs")
    names: list[str] = []
    specs: list[TensorSpec] = []
    sources: list[Bytes | Place] = []
    left = deque(raws)
    for i, each in enumerate(message.inputs):
        path = f"inputs[{i}]"
        if each.name not in INPUTS or each.name in names:
            msg = f"expected one of {', '.join(INPUTS)}, each once, got {clip(each.name)}"
            raise InvalidArgumentError(msg, field=f"{path}.name")
        names.append(each.name)
        specs.append(_spec(each, path))
        sources.append(_source(each, specs[-1], path, left, raws))
    if left:
        msg = f"expected one for each input that isn't in shared memory, got {len(left)} more"
        raise InvalidArgumentError(msg, field="raw_input_contents")
    return names, specs, sources


def _source(
    message: pb.ModelInferRequest.InferInputTensor,
    spec: TensorSpec,
    path: str,
    left: deque[memoryview],
    raws: Sequence[memoryview],
) -> Bytes | Place:
    """Give the bytes of an input, or where they are; raw ones are taken from what is `left` of them."""
    typed = message.HasField("contents")
    place = _place(message.parameters, f"{path}.parameters")
    if typed and (raws or place is not None):
        other = "raw_input_contents" if raws else "shared memory"
        raise InvalidArgumentError(f"expected none beside {other}, got some", field=f"{path}.contents")
    if place is not None:
        _check_length(spec, place.nbytes, f"{path}.parameters.{PLACE[1]}")
        return place
    if left:
        field = f"raw_input_contents[{len(raws) - len(left)}]"
        _check_length(spec, len(left[0]), field)
        return left.popleft()
    if raws or (spec.numel and not typed):
        msg = f"expected the bytes of {message.name} in raw_input_contents, or its contents, got neither"
        raise InvalidArgumentError(msg, field=path)
    return _numbers(message.contents, spec, f"{path}.contents")


def _spec(message: pb.ModelInferRequest.InferInputTensor, path: str) -> TensorSpec:
    dtype = DATATYPES.get(message.datatype)
    if dtype is None:
        msg = f"expected one of {', '.join(DATATYPES)}, got {clip(message.datatype)}"
        if message.datatype in UNTAKEN:
            msg = f"{path}.datatype: {msg}"
            raise UnsupportedError(msg, reason="DTYPE", metadata={"dtypes": ", ".join(DATATYPES)})
        raise InvalidArgumentError(msg, field=f"{path}.datatype")
    if len(message.shape) > MAX_RANK:
        msg = f"expected at most {MAX_RANK} dims, got {len(message.shape)}"
        raise InvalidArgumentError(msg, field=f"{path}.shape")
    if min(message.shape, default=0) < 0:
        raise InvalidArgumentError(f"expected no axis below 0, got {clip(message.shape)}", field=f"{path}.shape")
    return TensorSpec(dtype, tuple(message.shape))


def _check_length(spec: TensorSpec, got: int, field: str) -> None:
    if got != spec.nbytes:
        msg = f"expected {spec.nbytes} bytes for {DATATYPE_OF[spec.dtype]} {clip(spec.shape)}, got {got}"
        raise InvalidArgumentError(msg, field=field)


def _numbers(contents: pb.InferTensorContents, spec: TensorSpec, path: str) -> memoryview:
    """Give the bytes of a tensor whose elements are numbers."""
    name = CONTENTS.get(spec.dtype)
    if name is None:
        msg = f"expected {DATATYPE_OF[spec.dtype]} in raw_input_contents: contents have no field for it"
        raise InvalidArgumentError(msg, field=path)
    for descriptor, _ in contents.ListFields():
        if descriptor.name != name:
            msg = f"expected {DATATYPE_OF[spec.dtype]} in {name}, got {descriptor.name}"
            raise InvalidArgumentError(msg, field=path)
    numbers = getattr(contents, name)
    if len(numbers) != spec.numel:
        msg = f"expected {spec.numel} numbers for {clip(spec.shape)}, got {len(numbers)}"
        raise InvalidArgumentError(msg, field=f"{path}.{name}")
    # Small integers share a field with larger ones.
    dtype = np.dtype(spec.dtype)
    values = np.fromiter(numbers, np.int64 if dtype.kind in "iu" else dtype, len(numbers))
    if dtype.kind in "iu" and values.size:
        range_ = np.iinfo(dtype)
        low, high = int(values.min()), int(values.max())
        if low < range_.min or high > range_.max:
            msg = f"expected numbers in {range_.min}..{range_.max}, got {low}..{high}"
            raise InvalidArgumentError(msg, field=f"{path}.{name}")
    return array_bytes(values.astype(dtype.newbyteorder("<"), copy=False))


def _parameters(parameters: Mapping[str, pb.InferParameter]) -> tuple[str | None, int | None, float | None]:
    layer: str | None = None
    priority: int | None = None
    timeout: float | None = None
    for key, value in parameters.items():
        path = f"parameters.{key}"
        if key == "layer":
            if value.WhichOneof("parameter_choice") != "string_param":
                raise InvalidArgumentError("expected a text", field=path)
            layer = value.string_param
        elif key == "priority":
            # 0 is what those have that say nothing.
            given = _integer(value, path)
            priority = min(given, LEAST_URGENT) - URGENT if given else None
        elif key == "timeout":
            timeout = _integer(value, path) / 1e6 or None
        elif key not in RESERVED and not key.startswith("triton_"):
            msg = f"expected one of layer, priority, timeout, got {clip(key)}"
            raise InvalidArgumentError(msg, field="parameters")
    return layer, priority, timeout


def _integer(value: pb.InferParameter, path: str) -> int:
    kind = value.WhichOneof("parameter_choice")
    if kind not in ("int64_param", "uint64_param"):
        raise InvalidArgumentError(f"expected an integer, got {kind}", field=path)
    number: int = getattr(value, kind)
    if number < 0:
        raise InvalidArgumentError(f"expected at least 0, got {number}", field=path)
    return number


def _place(parameters: Mapping[str, pb.InferParameter], path: str) -> Place | None:
    unknown = [key for key in parameters if key not in PLACE]
    if unknown:
        raise InvalidArgumentError(f"expected one of {', '.join(PLACE)}, got {clip(unknown[0])}", field=path)
    if not parameters:
        return None
    region, nbytes, offset = PLACE
    if region not in parameters or nbytes not in parameters:
        raise InvalidArgumentError(f"expected {region} and {nbytes}, got {sorted(parameters)}", field=path)
    name = parameters[region]
    if name.WhichOneof("parameter_choice") != "string_param":
        raise InvalidArgumentError("expected a text", field=f"{path}.{region}")
    return Place(
        name.string_param,
        _integer(parameters[offset], f"{path}.{offset}") if offset in parameters else 0,
        _integer(parameters[nbytes], f"{path}.{nbytes}"),
    )


def encode_answer(model: str, outputs: Iterable[tuple[str, TensorSpec]], places: Mapping[str, Place]) -> bytes:
    """Give the start of a ModelInferResponse, encoded: all but its id and the tensors' bytes."""
    message = pb.ModelInferResponse(model_name=model, model_version=VERSION)
    for name, spec in outputs:
        output = message.outputs.add(name=name, datatype=DATATYPE_OF[spec.dtype], shape=spec.shape)
        if name in places:
            region, nbytes, offset = PLACE
            output.parameters[region].string_param = places[name].region
            output.parameters[nbytes].int64_param = spec.nbytes
            output.parameters[offset].int64_param = places[name].offset
    return message.SerializeToString()


def finish_answer(head: bytes, request_id: str, tensors: Iterable[Bytes], *, streamed: bool) -> bytes:
    """Give the whole answer: a ModelInferResponse, or where it is `streamed` a ModelStreamInferResponse with one."""
    rest = pb.ModelInferResponse(id=request_id)
    if streamed:
        rest.parameters["triton_final_response"].bool_param = True
    parts: list[Bytes] = [head, rest.SerializeToString()]
    for tensor in tensors:
        parts += (framing.field_prefix(RAW_OUTPUTS, len(tensor)), tensor)
    if streamed:
        parts.insert(0, framing.field_prefix(2, sum(map(len, parts))))
    return b"".join(parts)


def encode_failure(code: str, text: str, request_id: str) -> bytes:
    """Give the answer to a request of a stream that failed."""
    answer = pb.ModelInferResponse(id=request_id)
    return pb.ModelStreamInferResponse(error_message=f"{code}: {text}", infer_response=answer).SerializeToString()


def encode_metadata(model: Preset) -> pb.ModelMetadataResponse:
    """Give what a model takes and gives."""

    def described(tensors: Mapping[str, str]) -> list[pb.ModelMetadataResponse.TensorMetadata]:
        kind = pb.ModelMetadataResponse.TensorMetadata
        return [kind(name=name, datatype=DATATYPE_OF[of], shape=[-1] * model.rank) for name, of in tensors.items()]

    return pb.ModelMetadataResponse(
        name=model.name,
        versions=[VERSION],
        platform=PLATFORM,
        inputs=described(model.inputs),
        outputs=described(model.outputs),
    )


def encode_config(model: Preset, device: str, count: int) -> pb.ModelConfigResponse:
    """Give a model's configuration, as Triton would have it."""
    any_size = [-1] * model.rank
    kind = pb.ModelInstanceGroup.KIND_CPU if device == "cpu" else pb.ModelInstanceGroup.KIND_GPU
    config = pb.ModelConfig(
        name=model.name,
        platform=PLATFORM,
        backend=PLATFORM,
        version_policy=pb.ModelVersionPolicy(latest=pb.ModelVersionPolicy.Latest(num_versions=1)),
        input=[
            pb.ModelInput(name=name, data_type=_triton_type(dtype), dims=any_size)
            for name, dtype in model.inputs.items()
        ],
        output=[
            pb.ModelOutput(name=name, data_type=_triton_type(dtype), dims=any_size)
            for name, dtype in model.outputs.items()
        ],
        instance_group=[pb.ModelInstanceGroup(name=model.name, count=count, kind=kind)],
        model_transaction_policy=pb.ModelTransactionPolicy(decoupled=False),
    )
    if model.layer:
        config.parameters["layer"].string_value = model.layer
    return pb.ModelConfigResponse(config=config)


def _triton_type(dtype: str) -> pb.DataType.ValueType:
    return pb.DataType.Value(f"TYPE_{DATATYPE_OF[dtype]}")


def encode_statistics(tallies: Iterable[tuple[str, ModelStatistics]]) -> pb.ModelStatisticsResponse:
    """Give what was counted of models, by name."""
    response = pb.ModelStatisticsResponse()
    for name, tally in tallies:
        counted = tally.counted()
        each = response.model_stats.add(
            name=name,
            version=VERSION,
            last_inference=counted.last_ms,
            inference_count=counted.durations["success"][0],
            execution_count=counted.durations["success"][0],
        )
        for stage, (count, ns) in counted.durations.items():
            duration = getattr(each.inference_stats, stage)
            duration.count, duration.ns = count, ns
    return response


def encode_index(names: Iterable[str], *, ready: bool) -> pb.RepositoryIndexResponse:
    """Give the list of models."""
    state = {"state": "READY"} if ready else {"state": "UNAVAILABLE", "reason": "the server is draining"}
    index = pb.RepositoryIndexResponse.ModelIndex
    return pb.RepositoryIndexResponse(models=[index(name=name, version=VERSION, **state) for name in names])


def encode_regions(regions: Mapping[str, Region]) -> pb.SystemSharedMemoryStatusResponse:
    """Give the regions that are registered."""
    response = pb.SystemSharedMemoryStatusResponse()
    for name, region in regions.items():
        status = response.regions[name]
        status.name, status.key, status.offset, status.byte_size = name, region.key, region.offset, region.nbytes
    return response

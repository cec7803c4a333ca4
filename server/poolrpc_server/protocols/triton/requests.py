"""Decoding of ModelInferRequest. Raw tensors are views of the message, without a copy."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from google.protobuf.message import DecodeError

from poolrpc._shapes.limits import MAX_BRANCHES, MAX_RANK
from poolrpc._shapes.operands import OPERAND_DTYPES
from poolrpc._shapes.rules import clip
from poolrpc._wire import framing
from poolrpc.errors import InvalidArgumentError, UnsupportedError
from poolrpc.tensors import TensorSpec, array_bytes
from poolrpc_server.protocols.messages import header_too_large, not_a_message, parse
from poolrpc_server.protocols.triton.datatypes import (
    CONTENTS_FIELDS,
    DATATYPE_OF,
    DATATYPES,
    UNSUPPORTED_DATATYPES,
)
from poolrpc_server.protocols.triton.generated import open_inference_pb2 as pb
from poolrpc_server.protocols.triton.shared_memory import BYTE_SIZE, OFFSET, PARAMETERS, REGION, SharedMemoryRange

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from poolrpc.tensors import Bytes

INPUT = "input"
INPUTS = (INPUT, *OPERAND_DTYPES)
"""The names of inputs: that of the input itself, and those of operands, of which a request has at most one."""

MAX_INPUTS = 2
RAW_INPUT_FIELD = 7
"""Number of ModelInferRequest's field with raw tensors."""

MAX_HEADER_BYTES = 4 * 2**20
"""Maximum size of a message without raw tensors, in bytes. Parsed numbers take up to eight times the message's size."""

MAX_OUTPUTS = 2 * MAX_BRANCHES

FIRST_PRIORITY, LAST_PRIORITY = 1, 3
"""Triton's numbers for our priorities 0 and 2. Larger numbers have the last priority, as in Triton."""

IGNORED_PARAMETERS = ("sequence_id", "sequence_start", "sequence_end", "headers", "binary_data_output")
"""Parameters without meaning for pooling: requests are independent of each other, and outputs are always raw."""


@dataclass(frozen=True, slots=True)
class InferSignature:
    """A request without its data. Clients usually send many requests with the same signature.

    Attributes:
        model: Name of the model.
        layer: The parameter `layer`, if it is given.
        inputs: Specs of the input and, if there is one, of the operand.
        outputs: Names of the requested outputs. Empty: all outputs.
        operand: Name of the operand. Empty: there is none.

    """

    model: str
    layer: str | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    operand: str = ""


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A decoded ModelInferRequest.

    Attributes:
        signature: The request without its data.
        sources: The bytes of each input, or their range in shared memory.
        targets: The ranges of outputs that go to shared memory, by name.
        priority: The priority, 0 to 2. None: the request has none.
        timeout: Seconds until the client's deadline. None: the request has none.

    """

    signature: InferSignature
    sources: tuple[Bytes | SharedMemoryRange, ...]
    targets: dict[str, SharedMemoryRange]
    priority: int | None
    timeout: float | None


def parse_infer(data: bytes) -> tuple[pb.ModelInferRequest, list[memoryview]]:
    """Return a ModelInferRequest without its raw tensors, and the raw tensors as views of `data`.

    Raises:
        InternalError: The bytes are not a ModelInferRequest.
        LimitExceededError: The message without raw tensors is too large.

    """
    try:
        parts = framing.split_payloads(data, RAW_INPUT_FIELD, MAX_HEADER_BYTES)
    except framing.HeaderError as error:
        raise header_too_large(str(error)) from None
    except DecodeError:
        raise not_a_message(pb.ModelInferRequest) from None
    header, tensors = (data, []) if parts is None else parts
    message = parse(pb.ModelInferRequest, header)
    return message, tensors or [memoryview(tensor) for tensor in message.raw_input_contents]


def decode_infer(message: pb.ModelInferRequest, raw_tensors: Sequence[memoryview]) -> InferRequest:
    """Return the decoded form of what `parse_infer` returns.

    Raises:
        InvalidArgumentError: A field is invalid.
        UnsupportedError: No layer supports the datatype of an input.

    """
    layer, priority, timeout = _decode_parameters(message.parameters)
    names, specs, sources = _decode_inputs(message, raw_tensors)
    if names and names[0] != INPUT:
        names, specs, sources = names[::-1], specs[::-1], sources[::-1]
    if not names or names[0] != INPUT:
        raise InvalidArgumentError(f"expected input, and at most one operand, got {names}", field="inputs")
    if len(message.outputs) > MAX_OUTPUTS:
        raise InvalidArgumentError(f"expected at most {MAX_OUTPUTS}, got {len(message.outputs)}", field="outputs")
    targets = {}
    for i, output in enumerate(message.outputs):
        target = _decode_range(output.parameters, f"outputs[{i}].parameters")
        if target is not None:
            targets[output.name] = target
    outputs = tuple(output.name for output in message.outputs)
    operand = names[1] if len(names) > 1 else ""
    signature = InferSignature(message.model_name, layer, tuple(specs), outputs, operand)
    return InferRequest(signature, tuple(sources), targets, priority, timeout)


def _decode_inputs(
    message: pb.ModelInferRequest, raw_tensors: Sequence[memoryview]
) -> tuple[list[str], list[TensorSpec], list[Bytes | SharedMemoryRange]]:
    # The number is checked first, because a message can contain millions of inputs.
    if len(message.inputs) > MAX_INPUTS:
        raise InvalidArgumentError(f"expected at most {MAX_INPUTS}, got {len(message.inputs)}", field="inputs")
    names: list[str] = []
    specs: list[TensorSpec] = []
    sources: list[Bytes | SharedMemoryRange] = []
    unused = deque(raw_tensors)
    for i, tensor in enumerate(message.inputs):
        path = f"inputs[{i}]"
        if tensor.name not in INPUTS or tensor.name in names:
            msg = f"expected one of {', '.join(INPUTS)}, each once, got {clip(tensor.name)}"
            raise InvalidArgumentError(msg, field=f"{path}.name")
        names.append(tensor.name)
        specs.append(_decode_spec(tensor, path))
        sources.append(_decode_source(tensor, specs[-1], path, unused, raw_tensors))
    if unused:
        msg = f"expected one for each input that isn't in shared memory, got {len(unused)} more"
        raise InvalidArgumentError(msg, field="raw_input_contents")
    return names, specs, sources


def _decode_source(
    message: pb.ModelInferRequest.InferInputTensor,
    spec: TensorSpec,
    path: str,
    unused: deque[memoryview],
    raw_tensors: Sequence[memoryview],
) -> Bytes | SharedMemoryRange:
    """Return the bytes of an input, or their range in shared memory; a raw tensor is removed from `unused`."""
    has_contents = message.HasField("contents")
    source = _decode_range(message.parameters, f"{path}.parameters")
    if has_contents and (raw_tensors or source is not None):
        other = "raw_input_contents" if raw_tensors else "shared memory"
        raise InvalidArgumentError(f"expected none together with {other}, got some", field=f"{path}.contents")
    if source is not None:
        _check_length(spec, source.nbytes, f"{path}.parameters.{BYTE_SIZE}")
        return source
    if unused:
        field = f"raw_input_contents[{len(raw_tensors) - len(unused)}]"
        _check_length(spec, len(unused[0]), field)
        return unused.popleft()
    if raw_tensors or (spec.numel and not has_contents):
        msg = f"expected the bytes of {message.name} in raw_input_contents, or its contents, got neither"
        raise InvalidArgumentError(msg, field=path)
    return _decode_contents(message.contents, spec, f"{path}.contents")


def _decode_spec(message: pb.ModelInferRequest.InferInputTensor, path: str) -> TensorSpec:
    dtype = DATATYPES.get(message.datatype)
    if dtype is None:
        msg = f"expected one of {', '.join(DATATYPES)}, got {clip(message.datatype)}"
        if message.datatype in UNSUPPORTED_DATATYPES:
            msg = f"{path}.datatype: {msg}"
            raise UnsupportedError(msg, reason="DTYPE", metadata={"dtypes": ", ".join(DATATYPES)})
        raise InvalidArgumentError(msg, field=f"{path}.datatype")
    if len(message.shape) > MAX_RANK:
        msg = f"expected at most {MAX_RANK} dims, got {len(message.shape)}"
        raise InvalidArgumentError(msg, field=f"{path}.shape")
    if min(message.shape, default=0) < 0:
        raise InvalidArgumentError(f"expected no axis below 0, got {clip(message.shape)}", field=f"{path}.shape")
    return TensorSpec(dtype, tuple(message.shape))


def _check_length(spec: TensorSpec, actual: int, field: str) -> None:
    if actual != spec.nbytes:
        msg = f"expected {spec.nbytes} bytes for {DATATYPE_OF[spec.dtype]} {clip(spec.shape)}, got {actual}"
        raise InvalidArgumentError(msg, field=field)


def _decode_contents(contents: pb.InferTensorContents, spec: TensorSpec, path: str) -> memoryview:
    """Return the bytes of a tensor whose elements are numbers of the message."""
    name = CONTENTS_FIELDS.get(spec.dtype)
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
    # Small integers share a field with larger ones, so their range is checked.
    dtype = np.dtype(spec.dtype)
    values = np.fromiter(numbers, np.int64 if dtype.kind in "iu" else dtype, len(numbers))
    if dtype.kind in "iu" and values.size:
        limits = np.iinfo(dtype)
        low, high = int(values.min()), int(values.max())
        if low < limits.min or high > limits.max:
            msg = f"expected numbers in {limits.min}..{limits.max}, got {low}..{high}"
            raise InvalidArgumentError(msg, field=f"{path}.{name}")
    return array_bytes(values.astype(dtype.newbyteorder("<"), copy=False))


def _decode_parameters(parameters: Mapping[str, pb.InferParameter]) -> tuple[str | None, int | None, float | None]:
    layer: str | None = None
    priority: int | None = None
    timeout: float | None = None
    for key, value in parameters.items():
        path = f"parameters.{key}"
        if key == "layer":
            if value.WhichOneof("parameter_choice") != "string_param":
                raise InvalidArgumentError("expected a string", field=path)
            layer = value.string_param
        elif key == "priority":
            # 0 means the default priority.
            number = _decode_integer(value, path)
            priority = min(number, LAST_PRIORITY) - FIRST_PRIORITY if number else None
        elif key == "timeout":
            timeout = _decode_integer(value, path) / 1e6 or None
        elif key not in IGNORED_PARAMETERS and not key.startswith("triton_"):
            msg = f"expected one of layer, priority, timeout, got {clip(key)}"
            raise InvalidArgumentError(msg, field="parameters")
    return layer, priority, timeout


def _decode_integer(value: pb.InferParameter, path: str) -> int:
    kind = value.WhichOneof("parameter_choice")
    if kind not in ("int64_param", "uint64_param"):
        raise InvalidArgumentError(f"expected an integer, got {kind}", field=path)
    number: int = getattr(value, kind)
    if number < 0:
        raise InvalidArgumentError(f"expected at least 0, got {number}", field=path)
    return number


def _decode_range(parameters: Mapping[str, pb.InferParameter], path: str) -> SharedMemoryRange | None:
    unknown = [key for key in parameters if key not in PARAMETERS]
    if unknown:
        raise InvalidArgumentError(f"expected one of {', '.join(PARAMETERS)}, got {clip(unknown[0])}", field=path)
    if not parameters:
        return None
    if REGION not in parameters or BYTE_SIZE not in parameters:
        raise InvalidArgumentError(f"expected {REGION} and {BYTE_SIZE}, got {sorted(parameters)}", field=path)
    name = parameters[REGION]
    if name.WhichOneof("parameter_choice") != "string_param":
        raise InvalidArgumentError("expected a string", field=f"{path}.{REGION}")
    return SharedMemoryRange(
        name.string_param,
        _decode_integer(parameters[OFFSET], f"{path}.{OFFSET}") if OFFSET in parameters else 0,
        _decode_integer(parameters[BYTE_SIZE], f"{path}.{BYTE_SIZE}"),
    )

"""Requests of the Open Inference Protocol: parameters, tensors in each form, and invalid requests."""

from math import prod

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from poolrpc._wire.framing import field_prefix
from poolrpc.errors import InternalError, InvalidArgumentError, LimitExceededError, UnsupportedError
from poolrpc.tensors import ITEM_BYTES, TensorSpec, array_bytes
from poolrpc_server.protocols.triton.datatypes import CONTENTS_FIELDS, DATATYPE_OF, DATATYPES
from poolrpc_server.protocols.triton.generated import open_inference_pb2 as pb
from poolrpc_server.protocols.triton.requests import MAX_HEADER_BYTES, decode_infer, parse_infer
from poolrpc_server.protocols.triton.shared_memory import SharedMemoryRange

DTYPES = st.sampled_from(sorted(CONTENTS_FIELDS))
SHAPES = st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple)
BYTES = st.binary(max_size=40)


def request(*names, dtype="FP32", shape=(1, 1, 2, 2), **fields):
    """Return a request with inputs of these names and the same dtype and shape."""
    tensor = pb.ModelInferRequest.InferInputTensor
    inputs = [tensor(name=name, datatype=dtype, shape=shape) for name in names]
    return pb.ModelInferRequest(model_name="pool", inputs=inputs, **fields)


def decoded(message):
    """Return the request that the encoded message contains."""
    return decode_infer(*parse_infer(message.SerializeToString()))


@st.composite
def arrays(draw, dtype):
    """Draw an array of any values, including NaN."""
    shape = draw(SHAPES)
    item = np.dtype(dtype)
    size = prod(shape) * item.itemsize
    if dtype == "bool":
        return np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype).reshape(shape)
    return np.frombuffer(draw(st.binary(min_size=size, max_size=size)), item).reshape(shape)


@given(st.data())
def test_contents_are_equal_to_raw_bytes(data):
    """A tensor in the contents field of its dtype is decoded to the same bytes as a raw tensor."""
    dtype = data.draw(DTYPES)
    array = data.draw(arrays(dtype))
    message = request("input", dtype=DATATYPE_OF[dtype], shape=array.shape)
    getattr(message.inputs[0].contents, CONTENTS_FIELDS[dtype]).extend(array.reshape(-1).tolist())
    infer = decoded(message)
    assert infer.signature.inputs == (TensorSpec(dtype, array.shape),)
    actual = np.frombuffer(infer.sources[0], dtype).reshape(array.shape)
    # Python's floats do not preserve every NaN's payload.
    np.testing.assert_array_equal(actual, array)


@given(st.data(), st.sampled_from(sorted(ITEM_BYTES)))
def test_raw_tensors_are_views_of_the_message(data, dtype):
    """Raw tensors of any dtype are not copied, and are assigned to the inputs in their order."""
    shape = data.draw(SHAPES)
    size = prod(shape) * ITEM_BYTES[dtype]
    tensors = [data.draw(st.binary(min_size=size, max_size=size)) for _ in range(2)]
    names = data.draw(st.permutations(["input", "indices"]))
    sent = request(*names, dtype=DATATYPE_OF[dtype], shape=shape, raw_input_contents=tensors).SerializeToString()
    message, raws = parse_infer(sent)
    assert not message.raw_input_contents
    assert all(view.obj is sent for view in raws)
    infer = decode_infer(message, raws)
    assert dict(zip(["input", "indices"], map(bytes, infer.sources), strict=True)) == dict(
        zip(names, tensors, strict=True)
    )


@given(st.binary(max_size=60), st.lists(BYTES, max_size=3), st.booleans())
def test_parsing_agrees_with_protobuf(prefix, raws, first):
    """Any bytes are parsed as protobuf parses them, or rejected if protobuf rejects them."""
    tail = pb.ModelInferRequest(model_name="pool", raw_input_contents=raws).SerializeToString()
    data = prefix + tail if first else tail + prefix
    try:
        expected = pb.ModelInferRequest.FromString(data)
    except DecodeError:
        with pytest.raises(InternalError, match=r"expected a inference\.ModelInferRequest"):
            parse_infer(data)
        return
    message, found = parse_infer(data)
    assert list(map(bytes, found)) == list(expected.raw_input_contents)
    message.ClearField("raw_input_contents")
    expected.ClearField("raw_input_contents")
    assert message == expected


def parameter(value):
    """Return a parameter of the type of a Python value."""
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    return pb.InferParameter(**{kinds[type(value)]: value})


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, (None, None, None)),
        ({"layer": "MaxPool2d(2)"}, ("MaxPool2d(2)", None, None)),
        ({"priority": 0, "timeout": 0}, (None, None, None)),
        ({"priority": 1}, (None, 0, None)),
        ({"priority": 2}, (None, 1, None)),
        ({"priority": 3}, (None, 2, None)),
        ({"priority": 2**40}, (None, 2, None)),
        ({"timeout": 1_500_000}, (None, None, 1.5)),
        ({"sequence_id": 3, "sequence_start": True, "sequence_end": True}, (None, None, None)),
        ({"headers": "x", "binary_data_output": True, "triton_anything": 1.5}, (None, None, None)),
    ],
)
def test_parameters_are_decoded(parameters, expected):
    """The layer, the priority and the timeout in microseconds are decoded; reserved parameters are ignored."""
    message = request("input", raw_input_contents=[bytes(16)])
    for name, value in parameters.items():
        message.parameters[name].CopyFrom(parameter(value))
    infer = decoded(message)
    assert (infer.signature.layer, infer.priority, infer.timeout) == expected


def test_unsigned_priority_is_decoded():
    """A priority may be an unsigned integer, as tritonclient sends it."""
    message = request("input", raw_input_contents=[bytes(16)])
    message.parameters["priority"].uint64_param = 2**64 - 1
    assert decoded(message).priority == 2


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("layers", "MaxPool2d(2)", "parameters: expected one of layer, priority, timeout, got 'layers'"),
        ("layer", 3, "parameters.layer: expected a string"),
        ("priority", "high", "parameters.priority: expected an integer, got string_param"),
        ("priority", True, "expected an integer, got bool_param"),
        ("priority", -1, "expected at least 0, got -1"),
        ("timeout", 1.5, "expected an integer, got double_param"),
        ("timeout", -5, "expected at least 0, got -5"),
    ],
)
def test_invalid_parameter_is_rejected(name, value, words):
    """An unknown parameter, or one of another type, is rejected with its name."""
    message = request("input", raw_input_contents=[bytes(16)])
    message.parameters[name].CopyFrom(parameter(value))
    with pytest.raises(InvalidArgumentError) as raised:
        decoded(message)
    assert words in str(raised.value)


def with_contents(**contents):
    """Return a function that adds contents to a request's first input."""

    def change(message):
        for name, values in contents.items():
            getattr(message.inputs[0].contents, name).extend(values)

    return change


def shared(**parameters):
    """Return a function that adds shared memory parameters to a request's first input."""

    def change(message):
        for short, value in parameters.items():
            name = short if short == "other" else f"shared_memory_{short}"
            message.inputs[0].parameters[name].CopyFrom(parameter(value))

    return change


INVALID = {
    "no inputs": (request(), [], "inputs: expected input, and at most one operand, got []"),
    "indices alone": (request("indices"), [bytes(16)], "inputs: expected input, and at most one operand"),
    "unknown name": (request("x"), [bytes(16)], "inputs[0].name: expected one of input, indices, weights, offsets,"),
    "repeated name": (request("input", "input"), [bytes(16)] * 2, "inputs[1].name: expected one of"),
    "too many inputs": (request(*["input"] * 3), [], "inputs: expected at most 2, got 3"),
    "too few bytes": (
        request("input"), [bytes(15)],
        "raw_input_contents[0]: expected 16 bytes for FP32 (1, 1, 2, 2), got 15",
    ),
    "too few raw": (request("input", "indices"), [bytes(16)], "inputs[1]: expected the bytes of indices"),
    "too many raw": (request("input"), [bytes(16)] * 2, "raw_input_contents: expected one for each input"),
    "no data": (request("input"), [], "inputs[0]: expected the bytes of input in raw_input_contents, or its contents"),
    "raw and contents": (
        request("input"), [bytes(16)],
        "inputs[0].contents: expected none together with raw_input_contents", with_contents(fp32_contents=[0] * 4),
    ),
    "another field": (
        request("input"), [], "inputs[0].contents: expected FP32 in fp32_contents, got fp64_contents",
        with_contents(fp64_contents=[0] * 4),
    ),
    "two fields": (
        request("input"), [], "expected FP32 in fp32_contents, got int_contents",
        with_contents(fp32_contents=[0] * 4, int_contents=[1]),
    ),
    "too few numbers": (
        request("input"), [], "inputs[0].contents.fp32_contents: expected 4 numbers for (1, 1, 2, 2), got 3",
        with_contents(fp32_contents=[0] * 3),
    ),
    "half precision": (
        request("input", dtype="FP16"), [], "inputs[0].contents: expected FP16 in raw_input_contents",
        with_contents(fp32_contents=[0] * 4),
    ),
    "bfloat16": (
        request("input", dtype="BF16"), [], "expected BF16 in raw_input_contents", with_contents(uint_contents=[0] * 4),
    ),
    "number too large": (
        request("input", dtype="INT8"), [],
        "inputs[0].contents.int_contents: expected numbers in -128..127, got 0..128",
        with_contents(int_contents=[0, 1, 127, 128]),
    ),
    "number too small": (
        request("input", dtype="INT16"), [], "expected numbers in -32768..32767, got -32769..0",
        with_contents(int_contents=[0, -32769, 0, 0]),
    ),
    "unknown datatype": (
        request("input", dtype="fp32"), [bytes(16)], "inputs[0].datatype: expected one of BOOL, UINT8",
    ),
    "too many axes": (request("input", shape=[1] * 6), [bytes(4)], "inputs[0].shape: expected at most 5 dims, got 6"),
    "negative axis": (
        request("input", shape=[1, 1, -2, -2]), [bytes(16)], "inputs[0].shape: expected no axis below 0",
    ),
    "raw and shared": (
        request("input"), [bytes(16)], "raw_input_contents: expected one for each input that isn't in shared memory",
        shared(region="it", byte_size=16),
    ),
    "contents and shared": (
        request("input"), [], "inputs[0].contents: expected none together with shared memory",
        lambda message: (shared(region="it", byte_size=16)(message), with_contents(fp32_contents=[0])(message)),
    ),
    "shared with another size": (
        request("input"), [], "expected 16 bytes for FP32 (1, 1, 2, 2), got 17", shared(region="it", byte_size=17),
    ),
    "shared without a size": (
        request("input"), [], "expected shared_memory_region and shared_memory_byte_size, got", shared(region="it"),
    ),
    "shared without a region": (request("input"), [], "expected shared_memory_region and", shared(byte_size=16)),
    "region is not a string": (
        request("input"), [], "shared_memory_region: expected a string", shared(region=1, byte_size=16),
    ),
    "negative offset": (
        request("input"), [], "shared_memory_offset: expected at least 0, got -1",
        shared(region="it", byte_size=16, offset=-1),
    ),
    "unknown parameter": (
        request("input"), [bytes(16)], "inputs[0].parameters: expected one of shared_memory_region",
        shared(other=1),
    ),
    "too many outputs": (
        request("input", outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="output")] * 129), [bytes(16)],
        "outputs: expected at most 128, got 129",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", INVALID)
def test_invalid_request_is_rejected(case):
    """An invalid request is rejected with the field's path, and what was expected and received."""
    message, raw_tensors, words, *changes = INVALID[case]
    copy = pb.ModelInferRequest()
    copy.CopyFrom(message)
    copy.raw_input_contents.extend(raw_tensors)
    for change in changes:
        change(copy)
    with pytest.raises(InvalidArgumentError) as raised:
        decoded(copy)
    assert words in str(raised.value)


@pytest.mark.parametrize("datatype", ["BYTES", "UINT32", "UINT64"])
def test_datatypes_without_a_layer_are_unsupported(datatype):
    """A datatype of the protocol that no layer supports is UNIMPLEMENTED, unlike an unknown datatype."""
    message = request("input", dtype=datatype)
    message.inputs[0].contents.bytes_contents.append(b"x")
    with pytest.raises(UnsupportedError, match=f"got '{datatype}'") as raised:
        decoded(message)
    assert raised.value.metadata == {"dtypes": ", ".join(DATATYPES)}


def test_size_of_a_message_without_raw_tensors_is_limited():
    """Contents are limited, because parsed numbers take up to eight times the message's size; raw tensors are not."""
    contents = pb.InferTensorContents(bool_contents=bytes(MAX_HEADER_BYTES))
    message = request("input", dtype="BOOL", shape=[MAX_HEADER_BYTES])
    message.inputs[0].contents.CopyFrom(contents)
    with pytest.raises(LimitExceededError, match=f"at most {MAX_HEADER_BYTES} bytes without the payload") as raised:
        parse_infer(message.SerializeToString())
    assert raised.value.reason == "HEADER_TOO_LARGE"
    message = request("input", shape=[1, 1, 1, 2 * MAX_HEADER_BYTES], dtype="UINT8")
    message.raw_input_contents.append(array_bytes(np.zeros(2 * MAX_HEADER_BYTES, np.uint8)).tobytes())
    assert len(decoded(message).sources[0]) == 2 * MAX_HEADER_BYTES


@pytest.mark.parametrize("tail", [b"", b"\x0a\x00"])
@pytest.mark.parametrize("field", ["raw_input_contents", "inputs", "parameters"])
def test_number_of_fields_of_a_message_is_limited(field, tail):
    """A message of very many small fields is rejected before protobuf makes an object of each."""
    number = pb.ModelInferRequest.DESCRIPTOR.fields_by_name[field].number
    with pytest.raises(LimitExceededError, match=r"expected at most \d+ fields, got more") as raised:
        parse_infer(bytes([number << 3 | 2, 0]) * 2**17 + tail)
    assert raised.value.reason == "HEADER_TOO_LARGE"


def test_number_of_nested_fields_is_limited():
    """The fields of the messages in a message count, too."""
    inputs = pb.ModelInferRequest.DESCRIPTOR.fields_by_name["inputs"]
    parameters = inputs.message_type.fields_by_name["parameters"]
    nested = bytes([parameters.number << 3 | 2, 0]) * 2**17
    with pytest.raises(LimitExceededError, match=r"expected at most \d+ fields, got more"):
        parse_infer(field_prefix(inputs.number, len(nested)) + nested)


def test_empty_tensor_needs_no_contents():
    """A tensor without elements may have no contents at all, or be raw and empty."""
    for raw_tensors in ([], [b""]):
        infer = decoded(request("input", shape=[0, 1, 2, 2], raw_input_contents=raw_tensors))
        assert bytes(infer.sources[0]) == b""


def test_shared_memory_and_raw_tensors_can_be_mixed():
    """Inputs and outputs in shared memory have ranges; the raw tensors belong to the other inputs."""
    message = request("input", "indices", raw_input_contents=[bytes(16)])
    shared(region="it", byte_size=16, offset=3)(message)
    message.outputs.add(name="output").parameters["shared_memory_region"].string_param = "out"
    message.outputs[0].parameters["shared_memory_byte_size"].int64_param = 99
    message.outputs.add(name="indices")
    infer = decoded(message)
    assert infer.sources == (SharedMemoryRange("it", 3, 16), bytes(16))
    assert (infer.signature.outputs, infer.targets) == (
        ("output", "indices"),
        {"output": SharedMemoryRange("out", 0, 99)},
    )

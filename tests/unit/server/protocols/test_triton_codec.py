"""Messages of the Open Inference Protocol: what is taken, how tensors lie in them, and what is refused."""

from math import prod

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from poolrpc.errors import InternalError, InvalidArgumentError, LimitExceededError, UnsupportedError
from poolrpc.tensors import ITEM_BYTES, TensorSpec, array_bytes
from poolrpc_server.protocols.triton.codec import (
    CONTENTS,
    DATATYPE_OF,
    DATATYPES,
    MAX_HEADER_BYTES,
    decode_infer,
    encode_answer,
    encode_failure,
    finish_answer,
    open_infer,
)
from poolrpc_server.protocols.triton.generated import open_inference_pb2 as pb
from poolrpc_server.protocols.triton.shared_memory import Place

DTYPES = st.sampled_from(sorted(CONTENTS))
SHAPES = st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple)
BYTES = st.binary(max_size=40)


def request(*names, dtype="FP32", shape=(1, 1, 2, 2), **fields):
    """Give a request with inputs of these names, all alike."""
    kind = pb.ModelInferRequest.InferInputTensor
    inputs = [kind(name=name, datatype=dtype, shape=shape) for name in names]
    return pb.ModelInferRequest(model_name="pool", inputs=inputs, **fields)


def decoded(message):
    """Give what a message says, having gone over the wire."""
    return decode_infer(*open_infer(message.SerializeToString()))


@st.composite
def arrays(draw, dtype):
    """Draw an array of any values, NaN and all."""
    shape = draw(SHAPES)
    item = np.dtype(dtype)
    size = prod(shape) * item.itemsize
    if dtype == "bool":
        return np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype).reshape(shape)
    return np.frombuffer(draw(st.binary(min_size=size, max_size=size)), item).reshape(shape)


@given(st.data())
def test_numbers_are_the_tensors_bytes(data):
    """A tensor of numbers in the field of its type is the same as its bytes raw, in every dtype that has a field."""
    dtype = data.draw(DTYPES)
    array = data.draw(arrays(dtype))
    message = request("input", dtype=DATATYPE_OF[dtype], shape=array.shape)
    getattr(message.inputs[0].contents, CONTENTS[dtype]).extend(array.reshape(-1).tolist())
    infer = decoded(message)
    assert infer.asked.inputs == (TensorSpec(dtype, array.shape),)
    got = np.frombuffer(infer.sources[0], dtype).reshape(array.shape)
    # Python's floats don't keep every NaN's payload.
    np.testing.assert_array_equal(got, array)


@given(st.data(), st.sampled_from(sorted(ITEM_BYTES)))
def test_raw_tensors_stay_where_they_lie(data, dtype):
    """Raw tensors of any dtype are views of the message, in the order of the inputs that they are of."""
    shape = data.draw(SHAPES)
    size = prod(shape) * ITEM_BYTES[dtype]
    tensors = [data.draw(st.binary(min_size=size, max_size=size)) for _ in range(2)]
    names = data.draw(st.permutations(["input", "indices"]))
    sent = request(*names, dtype=DATATYPE_OF[dtype], shape=shape, raw_input_contents=tensors).SerializeToString()
    message, raws = open_infer(sent)
    assert not message.raw_input_contents
    assert all(view.obj is sent for view in raws)
    infer = decode_infer(message, raws)
    assert dict(zip(["input", "indices"], map(bytes, infer.sources), strict=True)) == dict(
        zip(names, tensors, strict=True)
    )


@given(st.binary(max_size=60), st.lists(BYTES, max_size=3), st.booleans())
def test_any_bytes_are_a_message_or_none(prefix, raws, first):
    """Whatever comes, it is opened as protobuf has it, or refused as no message."""
    tail = pb.ModelInferRequest(model_name="pool", raw_input_contents=raws).SerializeToString()
    data = prefix + tail if first else tail + prefix
    try:
        expected = pb.ModelInferRequest.FromString(data)
    except DecodeError:
        with pytest.raises(InternalError, match=r"expected a inference\.ModelInferRequest"):
            open_infer(data)
        return
    message, found = open_infer(data)
    assert [bytes(each) for each in found] == list(expected.raw_input_contents)
    message.ClearField("raw_input_contents")
    expected.ClearField("raw_input_contents")
    assert message == expected


@given(st.text(max_size=20), st.lists(BYTES, max_size=4), st.booleans())
def test_an_answer_is_the_message_that_protobuf_would_write(request_id, tensors, streamed):
    """What is framed by hand parses as the answer, with the id and every tensor, empty ones too."""
    outputs = [(f"output_{i}", TensorSpec("uint8", (len(each),))) for i, each in enumerate(tensors)]
    data = finish_answer(encode_answer("pool", outputs, {}), request_id, tensors, streamed=streamed)
    answer = pb.ModelStreamInferResponse.FromString(data).infer_response if streamed else None
    answer = answer or pb.ModelInferResponse.FromString(data)
    assert (answer.model_name, answer.model_version, answer.id) == ("pool", "1", request_id)
    assert list(answer.raw_output_contents) == tensors
    assert [(each.name, each.datatype, list(each.shape)) for each in answer.outputs] == [
        (name, "UINT8", list(spec.shape)) for name, spec in outputs
    ]
    assert list(answer.parameters) == ["triton_final_response"] * streamed


def test_an_output_in_shared_memory_says_where():
    """The answer has the region, the offset, and the bytes that were written."""
    spec = TensorSpec("float32", (2, 2))
    head = encode_answer("pool", [("output", spec), ("indices", spec)], {"output": Place("it", 8, 100)})
    answer = pb.ModelInferResponse.FromString(finish_answer(head, "", [b"", bytes(16)], streamed=False))
    where = answer.outputs[0].parameters
    assert where["shared_memory_region"].string_param == "it"
    assert (where["shared_memory_byte_size"].int64_param, where["shared_memory_offset"].int64_param) == (16, 8)
    assert not answer.outputs[1].parameters
    assert list(answer.raw_output_contents) == [b"", bytes(16)]


def test_a_failure_in_a_stream_has_its_code_and_id():
    """The status's name stands before its message, for there is no other place for it."""
    answer = pb.ModelStreamInferResponse.FromString(encode_failure("NOT_FOUND", "no such model", "7"))
    assert (answer.error_message, answer.infer_response.id) == ("NOT_FOUND: no such model", "7")


def parameter(value):
    """Give a parameter of the kind that a Python value is."""
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
def test_parameters_are_read(parameters, expected):
    """The layer, Triton's priority as a level (0: the caller's own), and its microseconds; reserved ones pass."""
    message = request("input", raw_input_contents=[bytes(16)])
    for name, value in parameters.items():
        message.parameters[name].CopyFrom(parameter(value))
    infer = decoded(message)
    assert (infer.asked.layer, infer.priority, infer.timeout) == expected


def test_an_unsigned_priority_is_read():
    """A priority may be an unsigned number, as tritonclient sends it."""
    message = request("input", raw_input_contents=[bytes(16)])
    message.parameters["priority"].uint64_param = 2**64 - 1
    assert decoded(message).priority == 2


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("layers", "MaxPool2d(2)", "parameters: expected one of layer, priority, timeout, got 'layers'"),
        ("layer", 3, "parameters.layer: expected a text"),
        ("priority", "high", "parameters.priority: expected an integer, got string_param"),
        ("priority", True, "expected an integer, got bool_param"),
        ("priority", -1, "expected at least 0, got -1"),
        ("timeout", 1.5, "expected an integer, got double_param"),
        ("timeout", -5, "expected at least 0, got -5"),
    ],
)
def test_a_wrong_parameter_is_refused(name, value, words):
    """One that nobody knows, or of another kind, is refused by its name."""
    message = request("input", raw_input_contents=[bytes(16)])
    message.parameters[name].CopyFrom(parameter(value))
    with pytest.raises(InvalidArgumentError) as raised:
        decoded(message)
    assert words in str(raised.value)


def numbers(**contents):
    """Give a change of a request's first input to these contents."""

    def change(message):
        for name, values in contents.items():
            getattr(message.inputs[0].contents, name).extend(values)

    return change


def place(**parameters):
    """Give a change of a request's first input to these parameters of shared memory."""

    def change(message):
        for short, value in parameters.items():
            name = short if short == "other" else f"shared_memory_{short}"
            message.inputs[0].parameters[name].CopyFrom(parameter(value))

    return change


WRONG = {
    "no inputs": (request(), [], "inputs: expected input, and indices with a MaxUnpool, got []"),
    "indices alone": (request("indices"), [bytes(16)], "inputs: expected input, and indices with a MaxUnpool"),
    "an unknown name": (request("x"), [bytes(16)], "inputs[0].name: expected one of input, indices, each once, got"),
    "a name twice": (request("input", "input"), [bytes(16)] * 2, "inputs[1].name: expected one of"),
    "too many": (request(*["input"] * 3), [], "inputs: expected at most 2, got 3"),
    "too few bytes": (
        request("input"), [bytes(15)],
        "raw_input_contents[0]: expected 16 bytes for FP32 (1, 1, 2, 2), got 15",
    ),
    "too few raw": (request("input", "indices"), [bytes(16)], "inputs[1]: expected the bytes of indices"),
    "too many raw": (request("input"), [bytes(16)] * 2, "raw_input_contents: expected one for each input"),
    "nothing": (request("input"), [], "inputs[0]: expected the bytes of input in raw_input_contents, or its contents"),
    "both": (
        request("input"), [bytes(16)],
        "inputs[0].contents: expected none beside raw_input_contents", numbers(fp32_contents=[0] * 4),
    ),
    "a wrong field": (
        request("input"), [], "inputs[0].contents: expected FP32 in fp32_contents, got fp64_contents",
        numbers(fp64_contents=[0] * 4),
    ),
    "two fields": (
        request("input"), [], "expected FP32 in fp32_contents, got int_contents",
        numbers(fp32_contents=[0] * 4, int_contents=[1]),
    ),
    "too few numbers": (
        request("input"), [], "inputs[0].contents.fp32_contents: expected 4 numbers for (1, 1, 2, 2), got 3",
        numbers(fp32_contents=[0] * 3),
    ),
    "half precision": (
        request("input", dtype="FP16"), [], "inputs[0].contents: expected FP16 in raw_input_contents",
        numbers(fp32_contents=[0] * 4),
    ),
    "bfloat16": (
        request("input", dtype="BF16"), [], "expected BF16 in raw_input_contents", numbers(uint_contents=[0] * 4),
    ),
    "a number too large": (
        request("input", dtype="INT8"), [],
        "inputs[0].contents.int_contents: expected numbers in -128..127, got 0..128",
        numbers(int_contents=[0, 1, 127, 128]),
    ),
    "a number too small": (
        request("input", dtype="INT16"), [], "expected numbers in -32768..32767, got -32769..0",
        numbers(int_contents=[0, -32769, 0, 0]),
    ),
    "an unknown type": (
        request("input", dtype="fp32"), [bytes(16)], "inputs[0].datatype: expected one of BOOL, UINT8",
    ),
    "a long shape": (request("input", shape=[1] * 6), [bytes(4)], "inputs[0].shape: expected at most 5 dims, got 6"),
    "a negative axis": (
        request("input", shape=[1, 1, -2, -2]), [bytes(16)], "inputs[0].shape: expected no axis below 0",
    ),
    "raw and shared": (
        request("input"), [bytes(16)], "raw_input_contents: expected one for each input that isn't in shared memory",
        place(region="it", byte_size=16),
    ),
    "numbers and shared": (
        request("input"), [], "inputs[0].contents: expected none beside shared memory",
        lambda message: (place(region="it", byte_size=16)(message), numbers(fp32_contents=[0])(message)),
    ),
    "shared of another size": (
        request("input"), [], "expected 16 bytes for FP32 (1, 1, 2, 2), got 17", place(region="it", byte_size=17),
    ),
    "shared without a size": (
        request("input"), [], "expected shared_memory_region and shared_memory_byte_size, got", place(region="it"),
    ),
    "shared without a region": (request("input"), [], "expected shared_memory_region and", place(byte_size=16)),
    "a region's number": (
        request("input"), [], "shared_memory_region: expected a text", place(region=1, byte_size=16),
    ),
    "a negative offset": (
        request("input"), [], "shared_memory_offset: expected at least 0, got -1",
        place(region="it", byte_size=16, offset=-1),
    ),
    "another parameter": (
        request("input"), [bytes(16)], "inputs[0].parameters: expected one of shared_memory_region", place(other=1),
    ),
    "too many outputs": (
        request("input", outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="output")] * 129), [bytes(16)],
        "outputs: expected at most 128, got 129",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_refused(case):
    """What doesn't fit together is refused with its path, what was expected and what was received."""
    message, raws, words, *changes = WRONG[case]
    copy = pb.ModelInferRequest()
    copy.CopyFrom(message)
    copy.raw_input_contents.extend(raws)
    for change in changes:
        change(copy)
    with pytest.raises(InvalidArgumentError) as raised:
        decoded(copy)
    assert words in str(raised.value)


@pytest.mark.parametrize("datatype", ["BYTES", "UINT16", "UINT32", "UINT64"])
def test_types_that_no_layer_takes_are_unsupported(datatype):
    """A type of the protocol's own that no layer takes is told from one that nobody knows."""
    message = request("input", dtype=datatype)
    message.inputs[0].contents.bytes_contents.append(b"x")
    with pytest.raises(UnsupportedError, match=f"got '{datatype}'") as raised:
        decoded(message)
    assert raised.value.metadata == {"dtypes": ", ".join(DATATYPES)}


def test_a_message_has_a_most_of_other_things_than_raw_tensors():
    """Numbers take up to eight times as much room in memory as in a message, so there may be so many."""
    numbers_ = pb.InferTensorContents(bool_contents=bytes(MAX_HEADER_BYTES))
    message = request("input", dtype="BOOL", shape=[MAX_HEADER_BYTES])
    message.inputs[0].contents.CopyFrom(numbers_)
    with pytest.raises(LimitExceededError, match=f"at most {MAX_HEADER_BYTES} bytes beside raw_input_contents"):
        open_infer(message.SerializeToString())
    message = request("input", shape=[1, 1, 1, 2 * MAX_HEADER_BYTES], dtype="UINT8")
    message.raw_input_contents.append(array_bytes(np.zeros(2 * MAX_HEADER_BYTES, np.uint8)).tobytes())
    assert len(decoded(message).sources[0]) == 2 * MAX_HEADER_BYTES


def test_an_empty_tensor_needs_no_contents():
    """A tensor without elements may come with an empty field, which encoders leave out, or raw and empty."""
    for raws in ([], [b""]):
        infer = decoded(request("input", shape=[0, 1, 2, 2], raw_input_contents=raws))
        assert bytes(infer.sources[0]) == b""


def test_shared_memory_is_told_from_bytes():
    """An input or an output in shared memory has its place; the raw contents are those of the other inputs."""
    message = request("input", "indices", raw_input_contents=[bytes(16)])
    place(region="it", byte_size=16, offset=3)(message)
    message.outputs.add(name="output").parameters["shared_memory_region"].string_param = "out"
    message.outputs[0].parameters["shared_memory_byte_size"].int64_param = 99
    message.outputs.add(name="indices")
    infer = decoded(message)
    assert infer.sources == (Place("it", 3, 16), bytes(16))
    assert (infer.asked.outputs, infer.targets) == (("output", "indices"), {"output": Place("out", 0, 99)})

"""Responses of the Open Inference Protocol."""

from hypothesis import given
from hypothesis import strategies as st

from poolrpc.tensors import TensorSpec
from poolrpc_server.protocols.triton.generated import open_inference_pb2 as pb
from poolrpc_server.protocols.triton.responses import encode_infer, encode_infer_head, encode_stream_error
from poolrpc_server.protocols.triton.shared_memory import SharedMemoryRange


@given(st.text(max_size=20), st.lists(st.binary(max_size=40), max_size=4), st.booleans())
def test_infer_response_parses_as_protobuf(request_id, tensors, streamed):
    """The response, whose tensors are framed without protobuf, parses with its id and every tensor, empty ones too."""
    outputs = [(f"output_{i}", TensorSpec("uint8", (len(tensor),))) for i, tensor in enumerate(tensors)]
    data = encode_infer(encode_infer_head("pool", outputs, {}), request_id, tensors, streamed=streamed)
    if streamed:
        response = pb.ModelStreamInferResponse.FromString(data).infer_response
    else:
        response = pb.ModelInferResponse.FromString(data)
    assert (response.model_name, response.model_version, response.id) == ("pool", "1", request_id)
    assert list(response.raw_output_contents) == tensors
    assert [(output.name, output.datatype, list(output.shape)) for output in response.outputs] == [
        (name, "UINT8", list(spec.shape)) for name, spec in outputs
    ]
    assert list(response.parameters) == ["triton_final_response"] * streamed


def test_output_in_shared_memory_has_its_range():
    """The response has the region, the offset and the number of bytes that were written."""
    spec = TensorSpec("float32", (2, 2))
    head = encode_infer_head("pool", [("output", spec), ("indices", spec)], {"output": SharedMemoryRange("it", 8, 100)})
    response = pb.ModelInferResponse.FromString(encode_infer(head, "", [b"", bytes(16)], streamed=False))
    parameters = response.outputs[0].parameters
    assert parameters["shared_memory_region"].string_param == "it"
    assert (parameters["shared_memory_byte_size"].int64_param, parameters["shared_memory_offset"].int64_param) == (
        16,
        8,
    )
    assert not response.outputs[1].parameters
    assert list(response.raw_output_contents) == [b"", bytes(16)]


def test_stream_error_has_its_code_and_request_id():
    """The error message starts with the name of the status code, for which there is no field."""
    response = pb.ModelStreamInferResponse.FromString(encode_stream_error("NOT_FOUND", "no such model", "7"))
    assert (response.error_message, response.infer_response.id) == ("NOT_FOUND: no such model", "7")

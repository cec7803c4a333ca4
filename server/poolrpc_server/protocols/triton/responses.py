"""Encoding of the Open Inference Protocol's responses. Tensors are copied only once, into the encoded message."""

from __future__ import annotations

from typing import TYPE_CHECKING

from poolrpc._wire import framing
from poolrpc_server.protocols.triton.datatypes import DATATYPE_OF
from poolrpc_server.protocols.triton.generated import open_inference_pb2 as pb
from poolrpc_server.protocols.triton.shared_memory import BYTE_SIZE, OFFSET, REGION

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from poolrpc.tensors import Bytes, TensorSpec
    from poolrpc_server.presets import Preset
    from poolrpc_server.protocols.triton.shared_memory import SharedMemoryRange, SharedMemoryRegion
    from poolrpc_server.protocols.triton.statistics import ModelStatistics

VERSION = "1"
PLATFORM = "poolrpc"

RAW_OUTPUT_FIELD = 6
"""Number of ModelInferResponse's field with raw tensors."""

INFER_RESPONSE_FIELD = 2
"""Number of ModelStreamInferResponse's field with the ModelInferResponse."""


def encode_infer_head(
    model: str, outputs: Iterable[tuple[str, TensorSpec]], targets: Mapping[str, SharedMemoryRange]
) -> bytes:
    """Return the start of an encoded ModelInferResponse: all but its id and the tensors.

    Args:
        model: Name of the model.
        outputs: Name and spec of each output.
        targets: The ranges of outputs that go to shared memory, by name.

    """
    message = pb.ModelInferResponse(model_name=model, model_version=VERSION)
    for name, spec in outputs:
        output = message.outputs.add(name=name, datatype=DATATYPE_OF[spec.dtype], shape=spec.shape)
        if name in targets:
            output.parameters[REGION].string_param = targets[name].region
            output.parameters[BYTE_SIZE].int64_param = spec.nbytes
            output.parameters[OFFSET].int64_param = targets[name].offset
    return message.SerializeToString()


def encode_infer(head: bytes, request_id: str, tensors: Iterable[Bytes], *, streamed: bool) -> bytes:
    """Return an encoded ModelInferResponse, or, if `streamed`, a ModelStreamInferResponse that contains it.

    Args:
        head: What `encode_infer_head` returned.
        request_id: Id of the request.
        tensors: The bytes of each output; empty for outputs in shared memory.
        streamed: Whether the response is one of a stream.

    """
    rest = pb.ModelInferResponse(id=request_id)
    if streamed:
        rest.parameters["triton_final_response"].bool_param = True
    parts: list[Bytes] = [head, rest.SerializeToString()]
    for tensor in tensors:
        parts += (framing.field_prefix(RAW_OUTPUT_FIELD, len(tensor)), tensor)
    if streamed:
        parts.insert(0, framing.field_prefix(INFER_RESPONSE_FIELD, sum(map(len, parts))))
    return b"".join(parts)


def encode_stream_error(code: str, message: str, request_id: str) -> bytes:
    """Return the encoded ModelStreamInferResponse for a request of a stream that failed."""
    response = pb.ModelInferResponse(id=request_id)
    return pb.ModelStreamInferResponse(error_message=f"{code}: {message}", infer_response=response).SerializeToString()


def encode_metadata(model: Preset) -> pb.ModelMetadataResponse:
    """Return the metadata of a model: its inputs and outputs."""
    sizes = {name: [-1] * model.axes(name) for name in (*model.inputs, *model.outputs)}
    tensor = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name=model.name,
        versions=[VERSION],
        platform=PLATFORM,
        inputs=[
            tensor(name=name, datatype=DATATYPE_OF[dtype], shape=sizes[name]) for name, dtype in model.inputs.items()
        ],
        outputs=[
            tensor(name=name, datatype=DATATYPE_OF[dtype], shape=sizes[name]) for name, dtype in model.outputs.items()
        ],
    )


def encode_config(model: Preset, device: str, count: int) -> pb.ModelConfigResponse:
    """Return the configuration of a model in Triton's form.

    Args:
        model: The model.
        device: The server's device.
        count: Number of requests that the server computes at a time.

    """
    sizes = {name: [-1] * model.axes(name) for name in (*model.inputs, *model.outputs)}
    kind = pb.ModelInstanceGroup.KIND_CPU if device == "cpu" else pb.ModelInstanceGroup.KIND_GPU
    config = pb.ModelConfig(
        name=model.name,
        platform=PLATFORM,
        backend=PLATFORM,
        version_policy=pb.ModelVersionPolicy(latest=pb.ModelVersionPolicy.Latest(num_versions=1)),
        input=[
            pb.ModelInput(name=name, data_type=_triton_type(dtype), dims=sizes[name])
            for name, dtype in model.inputs.items()
        ],
        output=[
            pb.ModelOutput(name=name, data_type=_triton_type(dtype), dims=sizes[name])
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


def encode_statistics(models: Iterable[tuple[str, ModelStatistics]]) -> pb.ModelStatisticsResponse:
    """Return the statistics of models, given by name."""
    response = pb.ModelStatisticsResponse()
    for name, statistics in models:
        counted = statistics.totals()
        model = response.model_stats.add(
            name=name,
            version=VERSION,
            last_inference=counted.last_ms,
            inference_count=counted.durations["success"][0],
            execution_count=counted.durations["success"][0],
        )
        for stage, (count, ns) in counted.durations.items():
            duration = getattr(model.inference_stats, stage)
            duration.count, duration.ns = count, ns
    return response


def encode_index(names: Iterable[str], *, ready: bool) -> pb.RepositoryIndexResponse:
    """Return the list of models."""
    state = {"state": "READY"} if ready else {"state": "UNAVAILABLE", "reason": "the server is draining"}
    index = pb.RepositoryIndexResponse.ModelIndex
    return pb.RepositoryIndexResponse(models=[index(name=name, version=VERSION, **state) for name in names])


def encode_regions(regions: Mapping[str, SharedMemoryRegion]) -> pb.SystemSharedMemoryStatusResponse:
    """Return the list of registered regions of shared memory."""
    response = pb.SystemSharedMemoryStatusResponse()
    for name, region in regions.items():
        status = response.regions[name]
        status.name, status.key, status.offset, status.byte_size = name, region.key, region.offset, region.nbytes
    return response

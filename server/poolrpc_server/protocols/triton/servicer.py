"""inference.GRPCInferenceService: the Open Inference Protocol v2, as Triton's clients and others speak it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import grpc

from poolrpc._shapes.rules import clip
from poolrpc._wire.codec import Request
from poolrpc.errors import CancelledError, InvalidArgumentError, NotFoundError, PoolError
from poolrpc.expression import parse_branches
from poolrpc_server.calls import facts
from poolrpc_server.calls.dispatch import Caller
from poolrpc_server.compute.buffers import aligned
from poolrpc_server.presets import POOL, output_names
from poolrpc_server.protocols.triton import requests, responses
from poolrpc_server.protocols.triton.generated import open_inference_pb2 as pb
from poolrpc_server.protocols.triton.shared_memory import BYTE_SIZE, SharedMemoryRange
from poolrpc_server.protocols.triton.statistics import ModelStatistics, Timing
from poolrpc_server.transports.grpc.interceptor import note, priority, timeline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from poolrpc.chains import Chain
    from poolrpc.tensors import Bytes, TensorSpec
    from poolrpc_server.calls.dispatch import Dispatcher
    from poolrpc_server.calls.streams import Streams
    from poolrpc_server.calls.validate import CheckedRequest
    from poolrpc_server.presets import Preset
    from poolrpc_server.protocols.triton.shared_memory import SharedMemoryRegistry

_DESCRIPTOR = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
SERVICE = _DESCRIPTOR.full_name
COMPUTE = ("ModelInfer", "ModelStreamInfer")
"""The methods that take a place under way."""

QUICK = tuple(method.name for method in _DESCRIPTOR.methods if method.name not in COMPUTE)

KNOWN = 4096
"""How many requests are remembered, without their tensors, with what was found of them."""

REQUESTS_AHEAD = 1
"""Requests of a stream that are read while one is computed."""

FRAME_BYTES = 64
"""Of an answer beside its head, its id and its tensors, and of each of these: more than there are."""

ERROR_CHARS = 600
"""Of an error in a stream: as many as a status has."""

EXTENSIONS = ("model_configuration", "model_repository_index", "parameters", "schedule_policy", "statistics")
SHM_EXTENSION = "system_shared_memory"


@dataclass(frozen=True, slots=True)
class _Known:
    """What was found of a request; the rest of it makes no difference.

    Attributes:
        checked: The request.
        outputs: The outputs that are wanted: the place of each among all outputs, its name, and what it is.
        facts: What the log says of it.
        head: The start of an answer without shared memory.

    """

    checked: CheckedRequest
    outputs: tuple[tuple[int, str, TensorSpec], ...]
    facts: dict[str, str]
    head: bytes


class InferenceDoor:
    """The servicer of GRPCInferenceService; messages with tensors come and go as bytes, others as protobuf has them."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        models: Mapping[str, Preset],
        regions: SharedMemoryRegistry,
        streams: Streams,
        ready: Callable[[], bool],
    ) -> None:
        """Make a door to a dispatcher.

        Args:
            dispatcher: Runs requests.
            models: What there is, by name.
            regions: Clients' shared memory.
            streams: Lets streams in.
            ready: Tells whether the server takes requests.

        """
        self._dispatcher = dispatcher
        self._models = dict(models)
        self._tallies = {name: ModelStatistics() for name in models}
        self._regions = regions
        self._streams = streams
        self._ready = ready
        self._remembered = lru_cache(KNOWN)(self._find)

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """Give gRPC's handlers of the service's methods."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "ModelInfer": grpc.unary_unary_rpc_method_handler(self.ModelInfer),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self.ModelStreamInfer),
        }
        for name in QUICK:
            method = _DESCRIPTOR.methods_by_name[name]
            handlers[name] = grpc.unary_unary_rpc_method_handler(
                getattr(self, name),
                getattr(pb, method.input_type.name).FromString,
                getattr(pb, method.output_type.name).SerializeToString,
            )
        return handlers

    def ModelInfer(self, data: bytes, context: grpc.ServicerContext) -> bytes:
        """Run a model."""
        timing = Timing()
        message, raws = requests.parse_infer(data)
        return self._infer(message, raws, context, timing, streamed=False)

    def ModelStreamInfer(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Run a model for each request of a stream; what is wrong with one is in its answer."""
        count = failed = 0
        with self._streams.opened(messages, REQUESTS_AHEAD, context.cancel) as (ahead, watch):
            for data in ahead:
                watch.moved()
                count += 1
                timing, request_id = Timing(), ""
                try:
                    message, raws = requests.parse_infer(data)
                    request_id = message.id
                    answer = self._infer(message, raws, context, timing, streamed=True)
                except CancelledError:
                    raise
                except PoolError as error:
                    failed += 1
                    answer = responses.encode_stream_error(error.code, error.message[:ERROR_CHARS], request_id)
                note({"requests": str(count), "failed": str(failed)})
                yield answer
                watch.moved()

    def ServerLive(self, _: pb.ServerLiveRequest, __: grpc.ServicerContext) -> pb.ServerLiveResponse:
        """Tell that the server answers."""
        return pb.ServerLiveResponse(live=True)

    def ServerReady(self, _: pb.ServerReadyRequest, __: grpc.ServicerContext) -> pb.ServerReadyResponse:
        """Tell whether the server takes requests."""
        return pb.ServerReadyResponse(ready=self._ready())

    def ModelReady(self, request: pb.ModelReadyRequest, _: grpc.ServicerContext) -> pb.ModelReadyResponse:
        """Tell whether there is such a model, and the server takes requests."""
        there = request.name in self._models and request.version in ("", responses.VERSION)
        return pb.ModelReadyResponse(ready=there and self._ready())

    def ServerMetadata(self, _: pb.ServerMetadataRequest, __: grpc.ServicerContext) -> pb.ServerMetadataResponse:
        """Tell what the server is."""
        extensions = (*EXTENSIONS, SHM_EXTENSION) if self._regions.allowed else EXTENSIONS
        version = self._dispatcher.info.version
        return pb.ServerMetadataResponse(name=responses.PLATFORM, version=version, extensions=extensions)

    def ModelMetadata(self, request: pb.ModelMetadataRequest, _: grpc.ServicerContext) -> pb.ModelMetadataResponse:
        """Tell what a model takes and gives."""
        return responses.encode_metadata(self._model(request.name, request.version))

    def ModelConfig(self, request: pb.ModelConfigRequest, _: grpc.ServicerContext) -> pb.ModelConfigResponse:
        """Tell a model's configuration."""
        info = self._dispatcher.info
        return responses.encode_config(self._model(request.name, request.version), info.device, info.threads)

    def ModelStatistics(
        self, request: pb.ModelStatisticsRequest, _: grpc.ServicerContext
    ) -> pb.ModelStatisticsResponse:
        """Tell how many requests a model had, or each of them, and where their time went."""
        if not request.name:
            return responses.encode_statistics(self._tallies.items())
        model = self._model(request.name, request.version)
        return responses.encode_statistics([(model.name, self._tallies[model.name])])

    def RepositoryIndex(
        self, request: pb.RepositoryIndexRequest, _: grpc.ServicerContext
    ) -> pb.RepositoryIndexResponse:
        """List the models."""
        ready = self._ready()
        return responses.encode_index(self._models if ready or not request.ready else (), ready=ready)

    def SystemSharedMemoryStatus(
        self, request: pb.SystemSharedMemoryStatusRequest, _: grpc.ServicerContext
    ) -> pb.SystemSharedMemoryStatusResponse:
        """List the regions of shared memory."""
        return responses.encode_regions(self._regions.regions(request.name))

    def SystemSharedMemoryRegister(
        self, request: pb.SystemSharedMemoryRegisterRequest, _: grpc.ServicerContext
    ) -> pb.SystemSharedMemoryRegisterResponse:
        """Make a region known."""
        self._regions.register(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    def SystemSharedMemoryUnregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, _: grpc.ServicerContext
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        """Forget a region, or all."""
        self._regions.unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    def _infer(
        self,
        message: pb.ModelInferRequest,
        raws: Sequence[memoryview],
        context: grpc.ServicerContext,
        timing: Timing,
        *,
        streamed: bool,
    ) -> bytes:
        model = self._model(message.model_name, message.model_version)
        note({"model": model.name})
        tally = self._tallies[model.name]
        try:
            answer = self._run(requests.decode_infer(message, raws), message.id, context, timing, streamed=streamed)
        except BaseException:
            tally.failed(timing)
            raise
        tally.succeeded(timing)
        return answer

    def _run(
        self,
        infer: requests.InferRequest,
        request_id: str,
        context: grpc.ServicerContext,
        timing: Timing,
        *,
        streamed: bool,
    ) -> bytes:
        known = self._remembered(infer.signature)
        note(known.facts)
        head = known.head
        if infer.targets:
            self._check_targets(known, infer.targets)
            named = [(name, spec) for _, name, spec in known.outputs]
            head = responses.encode_infer_head(infer.signature.model, named, infer.targets)
        here = [spec.nbytes for _, name, spec in known.outputs if name not in infer.targets]
        self._dispatcher.check_answer(len(head) + len(request_id) + FRAME_BYTES * (1 + len(here)) + sum(here))

        def finish(outputs: Sequence[memoryview]) -> bytes:
            timing.computed = time.perf_counter_ns()
            tensors: list[Bytes] = []
            for number, name, _ in known.outputs:
                place = infer.targets.get(name)
                if place is not None:
                    self._regions.find(place.region).write(place, outputs[number], f"outputs.{name}")
                tensors.append(outputs[number] if place is None else b"")
            return responses.encode_infer(head, request_id, tensors, streamed=streamed)

        caller = _caller(context, infer, timing)
        if len(infer.sources) == 1 and not isinstance(infer.sources[0], SharedMemoryRange):
            timing.read = time.perf_counter_ns()
            return self._dispatcher.pool(known.checked, infer.sources[0], caller, finish)
        return self._dispatcher.pool_from(known.checked, lambda: self._gathered(infer, timing), caller, finish)

    def _gathered(self, infer: requests.InferRequest, timing: Timing) -> memoryview:
        """Give the inputs' bytes in one piece of the server's own memory."""
        whole = aligned(sum(spec.nbytes for spec in infer.signature.inputs))
        end = 0
        for name, spec, source in zip(requests.INPUTS, infer.signature.inputs, infer.sources, strict=False):
            start, end = end, end + spec.nbytes
            if isinstance(source, SharedMemoryRange):
                self._regions.find(source.region).read(source, whole[start:end], f"inputs.{name}")
            else:
                whole[start:end] = source
        timing.read = time.perf_counter_ns()
        return whole

    def _check_targets(self, known: _Known, targets: Mapping[str, SharedMemoryRange]) -> None:
        for _, name, spec in known.outputs:
            place = targets.get(name)
            if place is not None and place.nbytes < spec.nbytes:
                msg = f"expected at least {spec.nbytes} bytes for {clip(spec.shape)}, got {place.nbytes}"
                raise InvalidArgumentError(msg, field=f"outputs.{name}.{BYTE_SIZE}")

    def _model(self, name: str, version: str) -> Preset:
        model = self._models.get(name)
        if model is None:
            known = ", ".join(self._models)[: facts.FACT_CHARS]
            raise NotFoundError(f"expected one of {known}, got {clip(name)}", reason="MODEL")
        if version not in ("", responses.VERSION):
            raise NotFoundError(f"expected version {responses.VERSION} of {name}, got {clip(version)}", reason="MODEL")
        return model

    def _find(self, asked: requests.InferSignature) -> _Known:
        request = Request(asked.inputs[0], self._branches(asked), *asked.inputs[1:])
        noted = facts.asked(request)
        note(noted)  # before the checks: the log tells what was refused
        checked = self._dispatcher.check(request)
        found = {
            name: (number, name, spec)
            for number, (name, spec) in enumerate(zip(output_names(request.branches), checked.outputs, strict=True))
        }
        for i, name in enumerate(asked.outputs):
            if name not in found or name in asked.outputs[:i]:
                msg = f"expected one of {', '.join(found)}, each once, got {clip(name)}"
                raise InvalidArgumentError(msg, field=f"outputs[{i}].name")
        outputs = tuple(found[name] for name in asked.outputs or found)
        head = responses.encode_infer_head(asked.model, [(name, spec) for _, name, spec in outputs], {})
        return _Known(checked, outputs, noted | facts.answered(checked.results), head)

    def _branches(self, asked: requests.InferSignature) -> tuple[Chain, ...]:
        model = self._models[asked.model]
        if asked.model != POOL:
            if asked.layer is not None:
                msg = f"expected none: {model.name} is {clip(model.layer)}, and {POOL} takes any layer"
                raise InvalidArgumentError(msg, field="parameters.layer")
            return model.branches
        if asked.layer is None:
            raise InvalidArgumentError(
                "expected an expression such as MaxPool2d(2), got none", field="parameters.layer"
            )
        try:
            return parse_branches(asked.layer)
        except InvalidArgumentError as error:
            raise error.with_prefix("parameters.layer") from None


def _caller(context: grpc.ServicerContext, infer: requests.InferRequest, timing: Timing) -> Caller:
    until = None if infer.timeout is None else timing.came / 1e9 + infer.timeout

    def remaining() -> float | None:
        left = context.time_remaining()
        if until is None:
            return left
        own = until - time.perf_counter()
        return own if left is None else min(own, left)

    def active() -> bool:
        # The batcher asks last thing before it computes.
        timing.begun = time.perf_counter_ns()
        return context.is_active()

    level = priority() if infer.priority is None else infer.priority
    return Caller(remaining, active, context.add_callback, level, timeline())

"""inference.GRPCInferenceService: the Open Inference Protocol v2, which Triton's clients and others use."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic_ns
from typing import TYPE_CHECKING

from poolrpc._shapes.rules import clip
from poolrpc._wire.codec import Request
from poolrpc.errors import CancelledError, InvalidArgumentError, NotFoundError, PoolError, UnavailableError
from poolrpc.expression import parse_branches
from poolrpc_server.calls.call import MAX_FACT_CHARS, DerivedContext, request_facts, result_facts
from poolrpc_server.calls.method import Method
from poolrpc_server.compute.buffers import aligned
from poolrpc_server.presets import POOL_PRESET, output_names
from poolrpc_server.protocols.messages import parse
from poolrpc_server.protocols.triton import requests, responses
from poolrpc_server.protocols.triton.generated import open_inference_pb2 as pb
from poolrpc_server.protocols.triton.outputs import output_numbers, requested_steps
from poolrpc_server.protocols.triton.shared_memory import BYTE_SIZE, SharedMemoryRange
from poolrpc_server.protocols.triton.statistics import ModelStatistics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from google.protobuf.message import Message

    from poolrpc.chains import Chain
    from poolrpc.tensors import Bytes, TensorSpec
    from poolrpc_server.calls.call import CallContext
    from poolrpc_server.calls.dispatch import Dispatcher
    from poolrpc_server.calls.streams import OpenStreams
    from poolrpc_server.calls.validate import CheckedRequest
    from poolrpc_server.presets import Preset
    from poolrpc_server.protocols.triton.shared_memory import SharedMemoryRegistry

_DESCRIPTOR = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
TRITON_SERVICE = _DESCRIPTOR.full_name

CONTROL_METHODS = tuple(name for name in _DESCRIPTOR.methods_by_name if name not in ("ModelInfer", "ModelStreamInfer"))
"""The methods that compute nothing."""

PROBES = ("ServerLive", "ServerReady", "ModelReady")

REMEMBERED_REQUESTS = 1024
"""Maximum number of requests whose decoded and validated form, without tensors, is cached."""

REQUESTS_AHEAD = 1
"""Requests of a stream that are read while one is computed."""

MESSAGES_HELD = 4
"""Messages of a stream in memory at a time: one that arrives (in gRPC's two copies), one that waits, one that is
computed."""

FRAME_BYTES = 64
"""Upper bound of the bytes that frame an answer, and of those that frame each tensor in it."""

MAX_STREAM_ERROR_CHARS = 600
"""Length at which the error of a request in a stream is cut, in characters: that of a status."""

EXTENSIONS = ("model_configuration", "model_repository_index", "parameters", "schedule_policy", "statistics")
SHM_EXTENSION = "system_shared_memory"


@dataclass(frozen=True, slots=True)
class _PreparedInfer:
    """A decoded and validated request without its tensors, cached because clients repeat requests.

    Attributes:
        checked: The request.
        outputs: The requested outputs: for each its position among all outputs, its name, and its spec.
        facts: Its fields of the log line.
        head: The start of an answer without shared memory.

    """

    checked: CheckedRequest
    outputs: tuple[tuple[int, str, TensorSpec], ...]
    facts: dict[str, object]
    head: bytes


class TritonServicer:
    """The methods of GRPCInferenceService. Messages with tensors are framed without protobuf, all others with it."""

    def __init__(  # noqa: PLR0913, PLR0917 - the parts of a service
        self,
        dispatcher: Dispatcher,
        models: Mapping[str, Preset],
        regions: SharedMemoryRegistry,
        streams: OpenStreams,
        is_ready: Callable[[], bool],
        rejected: Callable[[str], object],
    ) -> None:
        """Make a servicer.

        Args:
            dispatcher: Runs requests.
            models: The models, by name.
            regions: Clients' shared memory.
            streams: Opens streams.
            is_ready: Returns whether the server takes requests.
            rejected: Counts a request of a stream that was rejected temporarily, by the reason.

        """
        self._dispatcher = dispatcher
        self._models = dict(models)
        self._statistics = {name: ModelStatistics() for name in models}
        self._regions = regions
        self._streams = streams
        self._is_ready = is_ready
        self._rejected = rejected
        self._prepared: dict[requests.InferSignature, _PreparedInfer] = {}

    def methods(self) -> tuple[Method, ...]:
        """Return the methods of the service."""
        handlers: dict[str, Callable[..., Message]] = {
            "ServerLive": lambda _: pb.ServerLiveResponse(live=True),
            "ServerReady": lambda _: pb.ServerReadyResponse(ready=self._is_ready()),
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": lambda request: responses.encode_metadata(self._model(request.name, request.version)),
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
            "RepositoryIndex": self._repository_index,
            "SystemSharedMemoryStatus": lambda request: responses.encode_regions(self._regions.regions(request.name)),
            "SystemSharedMemoryRegister": self._register,
            "SystemSharedMemoryUnregister": self._unregister,
        }
        return (
            Method(f"/{TRITON_SERVICE}/ModelInfer", unary=self.model_infer, computes=True),
            Method(f"/{TRITON_SERVICE}/ModelStreamInfer", stream=self.model_stream_infer, computes=True),
            *(
                Method(f"/{TRITON_SERVICE}/{name}", unary=_with_messages(name, handler), probe=name in PROBES)
                for name, handler in handlers.items()
            ),
        )

    def model_infer(self, message: bytes, call: CallContext) -> bytes:
        """Run a model."""
        received = monotonic_ns()
        return self._infer(*requests.parse_infer(message), call, received, streamed=False)

    def model_stream_infer(self, messages: Iterator[bytes], call: CallContext) -> Iterator[bytes]:
        """Run a model for each request of a stream; the error of a request is in its answer."""
        count = failed = largest = 0
        with self._streams.open(messages, REQUESTS_AHEAD, call) as (reader, context):
            for data in reader:
                count += 1
                received, request_id = monotonic_ns(), ""
                with call.ticket.scope():
                    try:
                        message, raws = requests.parse_infer(data)
                        request_id = message.id
                        answer = self._infer(message, raws, context, received, streamed=True)
                    except CancelledError:
                        raise
                    except PoolError as error:
                        failed += 1
                        call.record.note({"reason": error.reason})
                        if isinstance(error, UnavailableError):
                            self._rejected(error.reason)
                        answer = responses.encode_stream_error(
                            error.code, error.message[:MAX_STREAM_ERROR_CHARS], request_id
                        )
                    call.record.note({"requests": count, "failed": failed})
                    context.sends()
                    yield answer
                    context.progressed()
                # The messages of a stream usually have one size: this is for those that arrive meanwhile, too.
                if len(data) > largest:
                    call.ticket.reserve(MESSAGES_HELD * (len(data) - largest))
                    largest = len(data)

    def _model_ready(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        exists = request.name in self._models and request.version in ("", responses.VERSION)
        return pb.ModelReadyResponse(ready=exists and self._is_ready())

    def _server_metadata(self, _: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        extensions = (*EXTENSIONS, SHM_EXTENSION) if self._regions.allowed else EXTENSIONS
        version = self._dispatcher.info.version
        return pb.ServerMetadataResponse(name=responses.PLATFORM, version=version, extensions=extensions)

    def _model_config(self, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        info = self._dispatcher.info
        return responses.encode_config(self._model(request.name, request.version), info.device, info.threads)

    def _model_statistics(self, request: pb.ModelStatisticsRequest) -> pb.ModelStatisticsResponse:
        if not request.name:
            return responses.encode_statistics(self._statistics.items())
        model = self._model(request.name, request.version)
        return responses.encode_statistics([(model.name, self._statistics[model.name])])

    def _repository_index(self, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        ready = self._is_ready()
        return responses.encode_index(self._models if ready or not request.ready else (), ready=ready)

    def _register(self, request: pb.SystemSharedMemoryRegisterRequest) -> pb.SystemSharedMemoryRegisterResponse:
        self._regions.register(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    def _unregister(self, request: pb.SystemSharedMemoryUnregisterRequest) -> pb.SystemSharedMemoryUnregisterResponse:
        self._regions.unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    def _infer(
        self,
        message: pb.ModelInferRequest,
        raws: Sequence[memoryview],
        call: CallContext,
        received: int,
        *,
        streamed: bool,
    ) -> bytes:
        model = self._model(message.model_name, message.model_version)
        call.record.note({"model": model.name})
        statistics = self._statistics[model.name]
        try:
            answer = self._run(requests.decode_infer(message, raws), message.id, call, received, streamed=streamed)
        except BaseException:
            statistics.failed(received)
            raise
        assert call.record.latest is not None  # noqa: S101 - it has just been answered
        statistics.succeeded(received, call.record.latest)
        return answer

    def _run(
        self, infer: requests.InferRequest, request_id: str, call: CallContext, received: int, *, streamed: bool
    ) -> bytes:
        prepared = self._prepared.get(infer.signature) or self._prepare(infer.signature, call)
        call.record.note(prepared.facts)
        head = prepared.head
        if infer.targets:
            self._check_targets(prepared, infer.targets)
            named = [(name, spec) for _, name, spec in prepared.outputs]
            head = responses.encode_infer_head(infer.signature.model, named, infer.targets)
        inline = [spec.nbytes for _, name, spec in prepared.outputs if name not in infer.targets]
        self._dispatcher.check_answer(len(head) + len(request_id) + FRAME_BYTES * (1 + len(inline)) + sum(inline))

        def finish(outputs: Sequence[memoryview]) -> bytes:
            tensors: list[Bytes] = []
            for number, name, _ in prepared.outputs:
                target = infer.targets.get(name)
                if target is not None:
                    self._regions.find(target.region).write(target, outputs[number], f"outputs.{name}")
                tensors.append(outputs[number] if target is None else b"")
            return responses.encode_infer(head, request_id, tensors, streamed=streamed)

        # The timeout counts from the arrival of the request.
        timeout = None if infer.timeout is None else infer.timeout - (monotonic_ns() - received) / 1e9
        context = DerivedContext(call, priority=infer.priority, timeout=timeout)
        if len(infer.sources) == 1 and not isinstance(infer.sources[0], SharedMemoryRange):
            return self._dispatcher.pool(prepared.checked, infer.sources[0], context, finish)
        return self._dispatcher.pool_from(prepared.checked, lambda: self._gather(infer), context, finish)

    def _gather(self, infer: requests.InferRequest) -> memoryview:
        """Return the inputs' bytes in one piece of the server's own memory."""
        whole = aligned(sum(spec.nbytes for spec in infer.signature.inputs))
        end = 0
        names = (requests.INPUT, infer.signature.operand)
        for name, spec, source in zip(names, infer.signature.inputs, infer.sources, strict=False):
            start, end = end, end + spec.nbytes
            if isinstance(source, SharedMemoryRange):
                self._regions.find(source.region).read(source, whole[start:end], f"inputs.{name}")
            else:
                whole[start:end] = source
        return whole

    def _check_targets(self, prepared: _PreparedInfer, targets: Mapping[str, SharedMemoryRange]) -> None:
        for _, name, spec in prepared.outputs:
            target = targets.get(name)
            if target is not None and target.nbytes < spec.nbytes:
                msg = f"expected at least {spec.nbytes} bytes for {clip(spec.shape)}, got {target.nbytes}"
                raise InvalidArgumentError(msg, field=f"outputs.{name}.{BYTE_SIZE}")

    def _model(self, name: str, version: str) -> Preset:
        model = self._models.get(name)
        if model is None:
            names = ", ".join(self._models)[:MAX_FACT_CHARS]
            raise NotFoundError(f"expected one of {names}, got {clip(name)}", reason="MODEL")
        if version not in ("", responses.VERSION):
            raise NotFoundError(f"expected version {responses.VERSION} of {name}, got {clip(version)}", reason="MODEL")
        return model

    def _prepare(self, signature: requests.InferSignature, call: CallContext) -> _PreparedInfer:
        tensor, *others = signature.inputs
        branches = self._branches(signature)
        steps = requested_steps(branches, signature.outputs)
        request = Request(tensor, branches, others[0] if others else None, steps)
        facts = request_facts(request)
        call.record.note(facts)  # before the checks, so that the log shows what was rejected
        if signature.operand and signature.operand != request.operand_name:
            msg = f"expected {request.operand_name or 'no operand'} for these layers, got {signature.operand}"
            raise InvalidArgumentError(msg, field="inputs")
        checked = self._dispatcher.check(request)
        numbers, names = output_numbers(request), output_names(branches)
        for i, name in enumerate(signature.outputs):
            if name not in numbers or name in signature.outputs[:i]:
                expected = f"one of {', '.join(names)}, or a layer's such as {names[0]}.0, each once"
                msg = f"expected {expected}, got {clip(name)}"
                raise InvalidArgumentError(msg, field=f"outputs[{i}].name")
        outputs = tuple((numbers[name], name, checked.outputs[numbers[name]]) for name in signature.outputs or names)
        head = responses.encode_infer_head(signature.model, [(name, spec) for _, name, spec in outputs], {})
        prepared = _PreparedInfer(checked, outputs, facts | result_facts(checked.results), head)
        if len(self._prepared) >= REMEMBERED_REQUESTS:
            self._prepared.clear()
        self._prepared[signature] = prepared
        return prepared

    def _branches(self, signature: requests.InferSignature) -> tuple[Chain, ...]:
        model = self._models[signature.model]
        if signature.model != POOL_PRESET:
            if signature.layer is not None:
                msg = f"expected none: {model.name} is {clip(model.layer)}, and {POOL_PRESET} takes any layer"
                raise InvalidArgumentError(msg, field="parameters.layer")
            return model.branches
        if signature.layer is None:
            raise InvalidArgumentError(
                "expected an expression such as MaxPool2d(2), got none", field="parameters.layer"
            )
        try:
            return parse_branches(signature.layer)
        except InvalidArgumentError as error:
            raise error.with_prefix("parameters.layer") from None


def _with_messages(name: str, handler: Callable[..., Message]) -> Callable[[bytes, CallContext], bytes]:
    """Return a method's handler of bytes for one of protobuf messages."""
    cls: type[Message] = getattr(pb, _DESCRIPTOR.methods_by_name[name].input_type.name)
    return lambda message, _: handler(parse(cls, message)).SerializeToString()

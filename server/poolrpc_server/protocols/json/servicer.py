"""poolrpc.v1.JsonService: requests and answers as JSON, for curl and for the explorer's page."""

from __future__ import annotations

import json
from itertools import islice
from operator import mul
from typing import TYPE_CHECKING, Any

import numpy as np

from poolrpc._shapes.rules import clip
from poolrpc.command.explain import WINDOW_VALUES, explain, find_windows
from poolrpc.errors import LimitExceededError
from poolrpc_server.calls.call import MAX_FACT_CHARS, request_facts, result_facts, shape_fact
from poolrpc_server.calls.method import Method
from poolrpc_server.protocols.json.description import describe_layers
from poolrpc_server.protocols.json.requests import parse_object, read_explain, read_pool, read_shapes
from poolrpc_server.protocols.json.tensors import check_listed, write_tensor, written_bytes
from poolrpc_server.protocols.messages import decoding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from poolrpc._wire.codec import BranchResult, ServerInfo
    from poolrpc.chains import Chain, Shape
    from poolrpc.layers import Layer
    from poolrpc_server.calls.call import CallContext
    from poolrpc_server.calls.dispatch import Dispatcher
    from poolrpc_server.protocols.json.requests import PoolQuery
    from poolrpc_server.protocols.json.tensors import JsonTensor
    from poolrpc_server.telemetry.metrics import Load

JSON_SERVICE = "poolrpc.v1.JsonService"

ROUTES = {
    "/v1/pool": ("POST", f"/{JSON_SERVICE}/Pool"),
    "/v1/shape": ("POST", f"/{JSON_SERVICE}/Shape"),
    "/v1/explain": ("POST", f"/{JSON_SERVICE}/Explain"),
    "/v1/info": ("GET", f"/{JSON_SERVICE}/Info"),
    "/v1/load": ("GET", f"/{JSON_SERVICE}/Load"),
}
"""The HTTP method and the method of the service of each path."""

MAX_ANSWER_BYTES = 16 * 2**20
"""Maximum size of the outputs of a call, in bytes, without the third that base64 adds."""

MAX_POSITIONS = 2**15
"""Maximum number of windows' positions of an explanation, over the axes."""

MAX_EXPLAINED = 2**12
"""Maximum number of cells of all windows together whose values are explained: some milliseconds of Python."""


class JsonServicer:
    """The methods of the JSON protocol."""

    def __init__(
        self, dispatcher: Dispatcher, load: Callable[[], Load], addresses: Callable[[], Sequence[str]] = tuple
    ) -> None:
        """Make a servicer.

        Args:
            dispatcher: Answers its requests.
            load: Returns the load at this moment.
            addresses: Returns the addresses for clients of gRPC, for the description of the server.

        """
        self._dispatcher = dispatcher
        self._load = load
        self._addresses = addresses
        self._layers = describe_layers()

    def methods(self) -> tuple[Method, ...]:
        """Return the methods of the service."""
        return (
            Method(f"/{JSON_SERVICE}/Pool", unary=self.pool, computes=True),
            Method(f"/{JSON_SERVICE}/Shape", unary=self.shape),
            Method(f"/{JSON_SERVICE}/Explain", unary=self.explain),
            Method(f"/{JSON_SERVICE}/Info", unary=self.info),
            Method(f"/{JSON_SERVICE}/Load", unary=self.load, probe=True),
        )

    def pool(self, message: bytes, call: CallContext) -> bytes:
        """Run a chain, or several, on a tensor."""
        with decoding(message, call):
            query = read_pool(message)
            call.record.note(request_facts(query.request))
        checked = self._dispatcher.check(query.request)
        specs = list(checked.outputs)
        if checked.output_bytes > MAX_ANSWER_BYTES:
            msg = f"expected outputs of at most {MAX_ANSWER_BYTES} bytes in JSON, got {checked.output_bytes}"
            limits = {"limit": str(MAX_ANSWER_BYTES), "actual": str(checked.output_bytes)}
            raise LimitExceededError(msg, reason="JSON_BYTES", metadata=limits)
        if query.encoding == "list":
            check_listed(specs)
        call.record.note(result_facts(checked.results))
        call.ticket.reserve(written_bytes(specs, query.encoding))
        # Copied while the engine has them, and written as text by this thread alone.
        outputs = self._dispatcher.pool(checked, query.payload, call, lambda tensors: [bytes(each) for each in tensors])
        return _encoded(_pool_answer(query, checked.results, outputs))

    def shape(self, message: bytes, call: CallContext) -> bytes:
        """Return the shape after each layer of a chain."""
        with decoding(message, call):
            chain, shape, layout = read_shapes(message)
            call.record.note({"layers": clip(list(chain), MAX_FACT_CHARS), "shape": shape_fact(shape)})
            (shapes,) = self._dispatcher.shapes(shape, (chain,), layout)
        return _encoded({"layer": _expression(chain), "shapes": shapes})

    def explain(self, message: bytes, call: CallContext) -> bytes:
        """Return the windows of a layer on a plane, the shape rule with its numbers and, of few cells, each value."""
        with decoding(message, call):
            layer, shape, plane = read_explain(message)
            call.record.note({"layers": clip(layer, MAX_FACT_CHARS), "shape": shape_fact(shape)})
            return _encoded(_explanation(layer, shape, plane))

    def info(self, message: bytes, _: CallContext) -> bytes:
        """Return the description of the server and of its layers."""
        parse_object(message or b"{}", ())
        info: ServerInfo = self._dispatcher.info
        return _encoded(
            {
                "version": info.version,
                "torch": info.torch_version,
                "device": info.device,
                "threads": info.threads,
                "addresses": list(self._addresses()),
                "features": info.features,
                "limits": {name: {"value": limit.value, "unit": limit.unit} for name, limit in info.limits.items()},
                "layers": self._layers,
            }
        )

    def load(self, message: bytes, _: CallContext) -> bytes:
        """Return what the server does at this moment."""
        parse_object(message or b"{}", ())
        load = self._load()
        return _encoded(
            {
                "calls": load.calls,
                "queue": load.queue_lengths,
                "queue_oldest_seconds": load.queue_oldest_seconds,
                "inflight_bytes": load.inflight_bytes,
                "memory_bytes": load.memory_bytes,
                "streams": load.streams,
                "arenas": load.arenas,
            }
        )


def _encoded(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _expression(chain: Sequence[Layer]) -> str:
    """Return the expression of a chain, that of its layer if there is only one."""
    return repr(chain[0]) if len(chain) == 1 else repr(list(chain))


def _pool_answer(query: PoolQuery, results: Iterable[BranchResult], outputs: Iterable[bytes]) -> dict[str, Any]:
    """Return the answer: that of the first chain, with those of the other ones."""
    found, remaining = iter(results), iter(outputs)
    first, *others = [
        _chain_answer(query, chain, [*islice(found, len(chain) if query.steps else 1)], remaining)
        for chain in query.request.branches
    ]
    return {**first, "branches": others} if others else first


def _chain_answer(
    query: PoolQuery, chain: Chain, results: Sequence[BranchResult], remaining: Iterator[bytes]
) -> dict[str, Any]:
    """Return the last output of a chain and, if they are requested, those of all steps."""
    shapes = [_own_shape(query, shape) for shape in results[-1].shapes]
    steps = [_step(query, each, remaining) for each in results]
    answer = {"layer": _expression(chain), "shapes": shapes, **steps[-1]}
    if query.steps:
        answer["steps"] = [{"layer": repr(layer), **step} for layer, step in zip(chain, steps, strict=True)]
    return answer


def _own_shape(query: PoolQuery, shape: Shape) -> Shape:
    """Return the shape of an output, without the channel if the input is a plane: regions have the boxes before it."""
    channel = len(shape) - len(query.request.input.shape)
    return (*shape[:channel], *shape[channel + 1 :]) if query.is_plane else shape


def _step(query: PoolQuery, result: BranchResult, outputs: Iterator[bytes]) -> dict[str, Any]:
    shape = _own_shape(query, result.output.shape)
    step: dict[str, Any] = {
        "shape": shape,
        "dtype": result.output.dtype,
        "output": write_tensor(next(outputs), result.output.dtype, shape, query.encoding),
    }
    if result.indices is not None:
        step["indices"] = write_tensor(next(outputs), "int64", shape, query.encoding)
    return step


def _explanation(layer: Layer, shape: tuple[int, ...], plane: JsonTensor | None) -> dict[str, Any]:
    if layer.spatial_dims == len(shape) and layer.family in WINDOW_VALUES:  # else find_windows raises
        layer.output_shape((1, 1, *shape))
        positions = sum(map(mul, layer.output_plane(shape), layer.window(shape)))
        _check_explained(positions, MAX_POSITIONS, "positions of windows, over the axes")
    windows = find_windows(layer, shape)
    answer: dict[str, Any] = {
        "layer": repr(layer),
        "shape": layer.output_plane(shape),
        "formulas": windows.formulas,
        "windows": [[each.positions for each in axis] for axis in windows.axes],
        "unvisited": [*windows.unvisited.values()],
    }
    if plane is not None:
        _check_explained(layer.work(shape), MAX_EXPLAINED, "cells of all windows together, with an input")
        values = np.frombuffer(plane.data, np.float64).reshape(shape)
        answer["values"] = [each.how for each in explain(layer, values).windows]
    return answer


def _check_explained(actual: int, limit: int, what: str) -> None:
    if actual > limit:
        msg = f"expected at most {limit} {what}, got {actual}"
        raise LimitExceededError(msg, reason="JSON_WINDOWS", metadata={"limit": str(limit), "actual": str(actual)})

"""PoolClient: the I/O between the pure steps of poolrpc._base_client and poolrpc._transport.transfer."""

from __future__ import annotations

from collections import deque
from concurrent import futures
from contextvars import copy_context
from typing import TYPE_CHECKING, Self

import grpc

from poolrpc._base_client import HEALTH_CHECK, IN_FLIGHT, MAX_IN_FLIGHT, METHODS, SERVICE, BaseClient, Out
from poolrpc._shapes.parameters import integer
from poolrpc._transport.stream import CallOptions, StreamCall
from poolrpc._transport.transfer import (
    ArenaCall,
    PoolResult,
    Progress,
    Transfer,
    announcement,
    by_size,
)
from poolrpc._wire import codec
from poolrpc._wire.status import translated
from poolrpc.chains import Shape, as_chain
from poolrpc.errors import NotFoundError, PoolError, UnavailableError
from poolrpc.tracing import traced
from poolrpc.v1 import pool_pb2, standard_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from concurrent.futures import Future

    from poolrpc._transport.coalesce import Group, Outcome
    from poolrpc.layers import Layer


class PoolClient(BaseClient):
    """A connection to a pool server. Any number of threads may use one; it doesn't survive a fork.

    Every method raises a poolrpc.PoolError where the server, or the way to it, does: see poolrpc.errors for the tree.
    A call that finds the server full, draining or gone (UNAVAILABLE) is tried again a few times, within its timeout.
    """

    def _connect(self) -> None:
        self._channel = self._channel_to(self.address)
        self._pool_stream = self._streams_of(self._channel)
        self._bind(self._channel)

    def _channel_to(self, address: str) -> grpc.Channel:
        return self._blocking_channel(address)

    def pool(  # noqa: PLR0913 - options, all by keyword
        self,
        x: object,
        layers: Layer | Iterable[Layer],
        *,
        indices: object = None,
        layout: str = "NCHW",
        out: Out | None = None,
        timeout: float | None = None,
        transport: str | None = None,
        copy: bool = True,
        progress: Progress | None = None,
    ) -> PoolResult:
        """Run a layer, or a chain of layers, on a tensor.

        Args:
            x: An array of (N, C, spatial...) or (C, spatial...); anything with `__array__` or DLPack, a torch tensor
                too. bfloat16 as ml_dtypes has it. A C-contiguous np.memmap is read block by block.
            layers: One layer, or several, each of which takes the output of the one before.
            indices: For MaxUnpool: int64, of x's shape.
            layout: "NCHW", or "NHWC" for channels last; of any number of spatial axes; the output has it too.
            out: An array for the output, an np.memmap perhaps, C-contiguous and of its shape and dtype; or a pair of
                arrays, for the output and the indices. None: a new one.
            timeout: Seconds, math.inf for no limit. None: the client's.
            transport: "unary", "stream" or "arena". None: what is fastest for the size and the address.
            copy: Whether results that come by the arena are copied out of it. Where not, they stay there, and its
                memory is taken for as long as they, or views of them, live.
            progress: Called with the number of planes that are done and that of all, whenever some are.

        Raises:
            PoolError: Of the class that says what went wrong; InvalidArgumentError has the paths of fields at fault.

        """
        transfer = self._transfer(x, (layers,), indices, layout, None if out is None else (out,))
        return self._run(transfer, transport, timeout, progress, copy=copy)[0]

    def pool_each(  # noqa: PLR0913 - options, all by keyword
        self,
        x: object,
        branches: Iterable[Layer | Iterable[Layer]],
        *,
        indices: object = None,
        layout: str = "NCHW",
        out: Sequence[Out | None] | None = None,
        timeout: float | None = None,
        transport: str | None = None,
        copy: bool = True,
        progress: Progress | None = None,
    ) -> list[PoolResult]:
        """Run each of several layers or chains on the same tensor, which is sent once.

        `out` has an entry for each; the rest is as in pool.
        """
        return self._run(self._transfer(x, branches, indices, layout, out), transport, timeout, progress, copy=copy)

    def _run(
        self,
        transfer: Transfer,
        transport: str | None,
        timeout: float | None,
        progress: Progress | None = None,
        *,
        copy: bool = True,
    ) -> list[PoolResult]:
        call, path = self._call(timeout), self._path(transfer, transport)
        with traced(METHODS[path], self.address, call, transfer.outline.request) as span:
            results = self._send(transfer, call, path, progress, copy=copy, required=transport is not None)
            if span is not None:
                span.set_attribute("poolrpc.transport", results[0].transport)
            return results

    def _send(  # noqa: PLR0913 - what _run was told, and what it chose
        self, transfer: Transfer, call: CallOptions, path: str, progress: Progress | None, *, copy: bool, required: bool
    ) -> list[PoolResult]:
        if path == "arena":
            results = self._cross(transfer, call, progress, copy=copy, required=required)
            if results is not None:
                return results
            path = by_size(transfer, self.max_message_bytes)
        try:
            if path == "stream":
                return self._stream(transfer, call, progress)
            message = transfer.message(self.max_message_bytes)
            call.carry(announcement(message))
            try:
                response = self._pool(message, **call.now())
            except grpc.RpcError as error:
                if not self._broke_off(error):
                    raise
                response = self._pool(message, **call.now())
        except grpc.RpcError as error:
            raise translated(error) from error
        return transfer.results(response, progress)

    def _cross(
        self, transfer: Transfer, call: CallOptions, progress: Progress | None, *, copy: bool, required: bool
    ) -> list[PoolResult] | None:
        crossing = None if self._arenas is None else ArenaCall.begin(transfer, self._arenas)
        if crossing is None:
            if required and transfer.outline.nbytes:
                raise self._no_arena()
            return None
        try:
            with crossing.kept():
                response = self._pool_at(crossing.socket)(crossing.message, **call.now())
        except (NotFoundError, UnavailableError) as error:
            if required or not crossing.lost(error):
                raise
            return None
        return crossing.results(response, copy=copy, progress=progress)

    def _stream(self, transfer: Transfer, call: CallOptions, progress: Progress | None) -> list[PoolResult]:
        return StreamCall(self._pool_stream, transfer, call, lambda: self._closed).run(progress)

    def map(  # noqa: PLR0913 - options, all by keyword
        self,
        tensors: Iterable[object],
        layers: Layer | Iterable[Layer],
        *,
        layout: str = "NCHW",
        in_flight: int = IN_FLIGHT,
        progress: bool = False,
        return_exceptions: bool = False,
        timeout: float | None = None,
    ) -> Iterator[PoolResult]:
        """Run a layer, or a chain of layers, on each of many tensors, and give the results in order as they come.

        Tensors that follow each other with one dtype and plane size travel together, and several requests are under
        way at a time; of both, tensors and results, only so many are in memory.

        Args:
            tensors: As pool takes them, of any sizes; a generator is read as far ahead as is under
                way, so an array of its must stay as it is until its result is given.
            layers: As in pool.
            layout: As in pool.
            in_flight: Requests under way at a time, at least 1.
            progress: Whether to show a bar, where tqdm is installed.
            return_exceptions: Whether a tensor that fails gives its error, as the result in its place; else that is
                raised when its turn comes, its `tensor` being the number of the tensor, counted from 0.
            timeout: As in pool, for each request.

        Raises:
            PoolError: A tensor failed, of the class that says how.

        """
        from poolrpc._transport.coalesce import Grouping, Order, bar  # noqa: PLC0415 - import poolrpc is to be quick

        chain = as_chain(layers)
        integer("in_flight", in_flight, 1, MAX_IN_FLIGHT)

        def outcomes(group: Group) -> list[Outcome]:
            try:
                return group.outcomes(self._run(group.transfer(), None, timeout)[0])
            except PoolError as error:
                if group.blames(error):
                    return [outcome for each in group.apart() for outcome in outcomes(each)]
                return group.failed(error)

        with bar(tensors, shown=progress) as advance, futures.ThreadPoolExecutor(in_flight, "poolrpc-map") as executor:
            under_way: deque[Future[list[Outcome]]] = deque()
            order, grouping = Order(return_exceptions), Grouping(chain, layout)
            try:
                for group in grouping.over(tensors):
                    # With what is current where the results are read: a span, perhaps.
                    under_way.append(executor.submit(copy_context().run, outcomes, group))
                    if len(under_way) > in_flight:
                        yield from order.give(under_way.popleft().result(), advance)
                while under_way:
                    yield from order.give(under_way.popleft().result(), advance)
            finally:
                executor.shutdown(wait=False, cancel_futures=True)

    def output_shape(
        self,
        shape: Iterable[int],
        layers: Layer | Iterable[Layer],
        *,
        layout: str = "NCHW",
        timeout: float | None = None,
    ) -> Shape:
        """Ask the server for the shape that pool would give; layer.output_shape(shape) is the same, offline."""
        call = self._call(timeout)
        request = self._shape_request(shape, layers, layout)
        with traced(f"{SERVICE}/InferShape", self.address, call):
            try:
                response = self._infer_shape(request, **call.now())
            except grpc.RpcError as error:
                raise translated(error) from error
        return codec.decode_shape_response(response)[0][-1]

    def server_info(self, *, timeout: float | None = None) -> codec.ServerInfo:
        """Ask the server for its versions, device, layers with their dtypes, and limits."""
        call = self._call(timeout)
        with traced(f"{SERVICE}/GetServerInfo", self.address, call):
            try:
                response = self._get_server_info(pool_pb2.GetServerInfoRequest(), **call.now())
            except grpc.RpcError as error:
                raise translated(error) from error
        return codec.decode_info(response)

    def health(self, service: str = "", *, timeout: float | None = None) -> str:
        """Ask for the health of a service by grpc.health.v1: "SERVING" or "NOT_SERVING". Empty: the server's."""
        call = self._call(timeout)
        with traced(HEALTH_CHECK.removeprefix("/"), self.address, call):
            try:
                response = self._health(standard_pb2.HealthCheckRequest(service=service), **call.now())
            except grpc.RpcError as error:
                raise translated(error) from error
        return codec.decode_health(response)

    def close(self) -> None:
        """End the connection and whatever calls are under way."""
        self._closed = True
        if self._arenas is not None:
            self._arenas.close()
        self._channel.close()
        for channel, _ in self._others.values():
            channel.close()

    def __enter__(self) -> Self:
        """Give the client, to be closed at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the client."""
        self.close()

"""AsyncPoolClient: PoolClient for asyncio. The two differ in nothing but how they wait."""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent import futures
from typing import TYPE_CHECKING, Self

import grpc
from grpc import aio

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
from poolrpc.errors import DeadlineExceededError, NotFoundError, PoolError, UnavailableError
from poolrpc.tracing import traced
from poolrpc.v1 import pool_pb2, standard_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence

    from poolrpc._transport.coalesce import Group, Outcome
    from poolrpc.layers import Layer

MAX_STREAMS = 16
"""Streams at a time; more wait for these."""


class AsyncPoolClient(BaseClient):
    """PoolClient for asyncio: the same methods, awaited. Make it and use it in one event loop."""

    def _connect(self) -> None:
        self._channel = self._channel_to(self.address)
        self._streams: futures.ThreadPoolExecutor | None = None
        self._bind(self._channel)

    def _channel_to(self, address: str) -> aio.Channel:
        if self._credentials is None:
            return aio.insecure_channel(address, self._options)
        return aio.secure_channel(address, self._credentials, self._options)

    async def pool(  # noqa: PLR0913 - options, all by keyword
        self,
        x: object,
        layers: Layer | Iterable[Layer],
        *,
        indices: object = None,
        layout: str = "NCHW",
        out: Out | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - gRPC's deadline, which the server sees too
        transport: str | None = None,
        copy: bool = True,
        progress: Progress | None = None,
    ) -> PoolResult:
        """Run a layer, or a chain of layers, on a tensor: PoolClient.pool."""
        transfer = self._transfer(x, (layers,), indices, layout, None if out is None else (out,))
        return (await self._run(transfer, transport, timeout, progress, copy=copy))[0]

    async def pool_each(  # noqa: PLR0913 - options, all by keyword
        self,
        x: object,
        branches: Iterable[Layer | Iterable[Layer]],
        *,
        indices: object = None,
        layout: str = "NCHW",
        out: Sequence[Out | None] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - gRPC's deadline, which the server sees too
        transport: str | None = None,
        copy: bool = True,
        progress: Progress | None = None,
    ) -> list[PoolResult]:
        """Run each of several layers or chains on the same tensor: PoolClient.pool_each."""
        return await self._run(
            self._transfer(x, branches, indices, layout, out), transport, timeout, progress, copy=copy
        )

    async def _run(
        self,
        transfer: Transfer,
        transport: str | None,
        timeout: float | None,  # noqa: ASYNC109 - as above
        progress: Progress | None = None,
        *,
        copy: bool = True,
    ) -> list[PoolResult]:
        call, path = self._call(timeout), self._path(transfer, transport)
        with traced(METHODS[path], self.address, call, transfer.outline.request) as span:
            results = await self._send(transfer, call, path, progress, copy=copy, required=transport is not None)
            if span is not None:
                span.set_attribute("poolrpc.transport", results[0].transport)
            return results

    async def _send(  # noqa: PLR0913 - what _run was told, and what it chose
        self, transfer: Transfer, call: CallOptions, path: str, progress: Progress | None, *, copy: bool, required: bool
    ) -> list[PoolResult]:
        if path == "arena":
            results = await self._cross(transfer, call, progress, copy=copy, required=required)
            if results is not None:
                return results
            path = by_size(transfer, self.max_message_bytes)
        try:
            if path == "stream":
                return await self._stream(transfer, call, progress)
            message = transfer.message(self.max_message_bytes)
            call.carry(announcement(message))
            try:
                response = await self._pool(message, **call.now())
            except grpc.RpcError as error:
                if not self._broke_off(error):
                    raise
                response = await self._pool(message, **call.now())
        except grpc.RpcError as error:
            raise translated(error) from error
        return transfer.results(response, progress)

    async def _cross(
        self, transfer: Transfer, call: CallOptions, progress: Progress | None, *, copy: bool, required: bool
    ) -> list[PoolResult] | None:
        crossing = None
        if self._arenas is not None:
            crossing = ArenaCall.begin(transfer, self._arenas, attach=False)
            # The server is asked for a further arena in a thread, where it may take its time.
            crossing = crossing or await asyncio.to_thread(ArenaCall.begin, transfer, self._arenas)
        if crossing is None:
            if required and transfer.outline.nbytes:
                raise self._no_arena()
            return None
        try:
            with crossing.kept():
                response = await self._pool_at(crossing.socket)(crossing.message, **call.now())
        except (NotFoundError, UnavailableError) as error:
            if required or not crossing.lost(error):
                raise
            return None
        return crossing.results(response, copy=copy, progress=progress)

    async def _stream(self, transfer: Transfer, call: CallOptions, progress: Progress | None) -> list[PoolResult]:
        # By a blocking channel, in a thread: where a stream ends while it is being written to, grpc.aio reports an
        # internal error in place of the status that the server ended it with (seen in 1.85: set_internal_error).
        if self._streams is None:
            self._blocking = self._blocking_channel(self.address)
            self._streams = futures.ThreadPoolExecutor(MAX_STREAMS, "poolrpc-stream")
        loop = asyncio.get_running_loop()

        def in_loop(done: int, count: int) -> None:
            asyncio.run_coroutine_threadsafe(_called(progress, done, count), loop).result()

        stream = StreamCall(self._streams_of(self._blocking), transfer, call, lambda: self._closed)
        running = loop.run_in_executor(self._streams, stream.run, None if progress is None else in_loop)
        try:
            # It may wait for a thread until its time is up; once it has one, gRPC sees to its end.
            return await asyncio.wait_for(running, call.left())
        except TimeoutError:
            raise DeadlineExceededError("the deadline passed before the stream's end") from None
        finally:
            stream.cancel()  # the caller may have left

    async def map(  # noqa: PLR0913 - options, all by keyword
        self,
        tensors: Iterable[object] | AsyncIterable[object],
        layers: Layer | Iterable[Layer],
        *,
        layout: str = "NCHW",
        in_flight: int = IN_FLIGHT,
        progress: bool = False,
        return_exceptions: bool = False,
        timeout: float | None = None,  # noqa: ASYNC109 - gRPC's deadline, which the server sees too
    ) -> AsyncIterator[PoolResult]:
        """Run a layer, or a chain of layers, on each of many tensors: PoolClient.map, to be read by `async for`."""
        from poolrpc._transport.coalesce import Grouping, Order, bar  # noqa: PLC0415 - import poolrpc is to be quick

        chain = as_chain(layers)
        integer("in_flight", in_flight, 1, MAX_IN_FLIGHT)

        async def outcomes(group: Group) -> list[Outcome]:
            try:
                return group.outcomes((await self._run(group.transfer(), None, timeout))[0])
            except PoolError as error:
                if group.blames(error):
                    return [outcome for each in group.apart() for outcome in await outcomes(each)]
                return group.failed(error)

        with bar(tensors, shown=progress) as advance:
            under_way: deque[asyncio.Task[list[Outcome]]] = deque()
            order, grouping = Order(return_exceptions), Grouping(chain, layout)
            try:
                async for group in grouping.over_async(tensors):
                    under_way.append(asyncio.create_task(outcomes(group)))
                    if len(under_way) > in_flight:
                        for result in order.give(await under_way.popleft(), advance):
                            yield result
                while under_way:
                    for result in order.give(await under_way.popleft(), advance):
                        yield result
            finally:
                for task in under_way:
                    task.cancel()

    async def output_shape(
        self,
        shape: Iterable[int],
        layers: Layer | Iterable[Layer],
        *,
        layout: str = "NCHW",
        timeout: float | None = None,  # noqa: ASYNC109 - gRPC's deadline, which the server sees too
    ) -> Shape:
        """Ask the server for the shape that pool would give: PoolClient.output_shape."""
        call = self._call(timeout)
        request = self._shape_request(shape, layers, layout)
        with traced(f"{SERVICE}/InferShape", self.address, call):
            try:
                response = await self._infer_shape(request, **call.now())
            except grpc.RpcError as error:
                raise translated(error) from error
        return codec.decode_shape_response(response)[0][-1]

    async def server_info(self, *, timeout: float | None = None) -> codec.ServerInfo:  # noqa: ASYNC109 - gRPC's deadline
        """Ask the server what it is: PoolClient.server_info."""
        call = self._call(timeout)
        with traced(f"{SERVICE}/GetServerInfo", self.address, call):
            try:
                response = await self._get_server_info(pool_pb2.GetServerInfoRequest(), **call.now())
            except grpc.RpcError as error:
                raise translated(error) from error
        return codec.decode_info(response)

    async def health(self, service: str = "", *, timeout: float | None = None) -> str:  # noqa: ASYNC109 - gRPC's deadline
        """Ask for the health of a service: PoolClient.health."""
        call = self._call(timeout)
        with traced(HEALTH_CHECK.removeprefix("/"), self.address, call):
            try:
                response = await self._health(standard_pb2.HealthCheckRequest(service=service), **call.now())
            except grpc.RpcError as error:
                raise translated(error) from error
        return codec.decode_health(response)

    async def close(self) -> None:
        """End the connection and whatever calls are under way."""
        self._closed = True
        if self._arenas is not None:
            self._arenas.close()
        if self._streams is not None:
            self._blocking.close()
            self._streams.shutdown(wait=False)
        await self._channel.close()
        for channel, _ in self._others.values():
            await channel.close()

    async def __aenter__(self) -> Self:
        """Give the client, to be closed at the end."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the client."""
        await self.close()


async def _called(progress: Progress | None, done: int, count: int) -> None:
    if progress is not None:
        progress(done, count)

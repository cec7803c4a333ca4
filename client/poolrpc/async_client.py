"""The client for asyncio."""

from __future__ import annotations

import asyncio
from concurrent import futures
from contextlib import aclosing, closing
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack, overload

from grpc import aio

from poolrpc._base_client import IN_FLIGHT, BaseClient, Out
from poolrpc._transport.channel import stream_method
from poolrpc._transport.options import UNSET
from poolrpc._transport.steps import (
    Deliver,
    NextGroup,
    Pause,
    RunBlocking,
    Send,
    SendLocal,
    SendStream,
    Start,
    Wait,
    log_retries,
)
from poolrpc._transport.stream import StreamCall
from poolrpc.addresses import grpc_target
from poolrpc.chains import as_steps
from poolrpc.errors import DeadlineExceededError, PoolError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Sequence

    import grpc

    from poolrpc._transport.coalesce import Group
    from poolrpc._transport.join import Join
    from poolrpc._transport.options import CallOptions, Pairs, Timeout, Transport
    from poolrpc._transport.result import PoolResult, Progress
    from poolrpc._transport.steps import MapSteps, Steps
    from poolrpc._wire.codec import ServerInfo
    from poolrpc.chains import ChainLike, LayerLike, Shape
    from poolrpc.operands import Operand
    from poolrpc.tensors import Layout

T = TypeVar("T")

MAX_STREAMS = 16
"""Maximum number of concurrent streams; further streams wait until one of these ends."""


class AsyncPoolClient(BaseClient):
    """A connection to a pool server, for asyncio: it has the methods of PoolClient as coroutines.

    A client belongs to the event loop of its first call; in another one, and in the child of a fork, its calls raise a
    PoolError.

    Examples:
        >>> import asyncio
        >>> import numpy as np
        >>> from poolrpc import AsyncPoolClient, MaxPool2d
        >>> async def main():
        ...     async with AsyncPoolClient("127.0.0.1:50051") as client:
        ...         return (await client.pool(np.zeros((1, 64, 56, 56), np.float32), MaxPool2d(2))).shape
        >>> asyncio.run(main())
        (1, 64, 28, 28)

    """

    _forked = False
    _loop: object = None

    async def pool(  # noqa: PLR0913 - options, all by keyword
        self,
        x: object,
        layers: ChainLike,
        *,
        layout: Layout = "NCHW",
        out: Out | None = None,
        timeout: Timeout = UNSET,  # noqa: ASYNC109 - gRPC's deadline, which the server sees too
        priority: int | None = None,
        metadata: Pairs = (),
        transport: Transport | None = None,
        copy: bool = True,
        progress: Progress | None = None,
        **operand: Unpack[Operand],
    ) -> PoolResult:
        """Run a layer, or a chain of layers, on a tensor: see PoolClient.pool for the arguments."""
        transfer = self._transfer(x, (layers,), operand, layout, None if out is None else (out,))
        options = self._call_options(timeout, priority, metadata)
        return (await self._run(self._call_steps(transfer, options, transport, progress, copy=copy)))[0]

    @overload
    async def pool_each(
        self,
        x: object,
        branches: LayerLike | Iterable[ChainLike],
        *,
        join: None = None,
        layout: Layout = "NCHW",
        out: Sequence[Out | None] | None = None,
        timeout: Timeout = UNSET,  # noqa: ASYNC109 - as below
        priority: int | None = None,
        metadata: Pairs = (),
        transport: Transport | None = None,
        copy: bool = True,
        progress: Progress | None = None,
        **operand: Unpack[Operand],
    ) -> list[PoolResult]: ...

    @overload
    async def pool_each(
        self,
        x: object,
        branches: LayerLike | Iterable[ChainLike],
        *,
        join: Join,
        layout: Layout = "NCHW",
        out: Sequence[Out | None] | None = None,
        timeout: Timeout = UNSET,  # noqa: ASYNC109 - as below
        priority: int | None = None,
        metadata: Pairs = (),
        transport: Transport | None = None,
        copy: bool = True,
        progress: Progress | None = None,
        **operand: Unpack[Operand],
    ) -> PoolResult: ...

    async def pool_each(  # noqa: PLR0913 - options, all by keyword
        self,
        x: object,
        branches: LayerLike | Iterable[ChainLike],
        *,
        join: Join | None = None,
        layout: Layout = "NCHW",
        out: Sequence[Out | None] | None = None,
        timeout: Timeout = UNSET,  # noqa: ASYNC109 - gRPC's deadline, which the server sees too
        priority: int | None = None,
        metadata: Pairs = (),
        transport: Transport | None = None,
        copy: bool = True,
        progress: Progress | None = None,
        **operand: Unpack[Operand],
    ) -> list[PoolResult] | PoolResult:
        """Run each of several layers or chains on the same tensor, which is sent once: see PoolClient.pool_each."""
        transfer = self._transfer(x, branches, operand, layout, out)
        joined = None if join is None else self._joined(join, transfer)
        options = self._call_options(timeout, priority, metadata)
        results = await self._run(self._call_steps(transfer, options, transport, progress, copy=copy))
        return results if joined is None else joined(results)

    async def pool_steps(  # noqa: PLR0913 - options, all but the first three by keyword
        self,
        x: object,
        layers: ChainLike,
        steps: Iterable[int] | None = None,
        *,
        layout: Layout = "NCHW",
        out: Sequence[Out | None] | None = None,
        timeout: Timeout = UNSET,  # noqa: ASYNC109 - gRPC's deadline, which the server sees too
        priority: int | None = None,
        metadata: Pairs = (),
        transport: Transport | None = None,
        copy: bool = True,
        progress: Progress | None = None,
        **operand: Unpack[Operand],
    ) -> list[PoolResult]:
        """Run a chain of layers on a tensor, and return the outputs of several steps: see PoolClient.pool_steps."""
        chain, outputs = as_steps(layers, steps)
        transfer = self._transfer(x, (chain,), operand, layout, out, (outputs,))
        options = self._call_options(timeout, priority, metadata)
        return await self._run(self._call_steps(transfer, options, transport, progress, copy=copy))

    @overload
    def map(
        self,
        tensors: Iterable[object] | AsyncIterable[object],
        layers: ChainLike,
        *,
        layout: Layout = "NCHW",
        in_flight: int = IN_FLIGHT,
        progress: bool = False,
        return_exceptions: Literal[False] = False,
        timeout: Timeout = UNSET,
        priority: int | None = None,
        metadata: Pairs = (),
        **operand: Unpack[Operand],
    ) -> AsyncIterator[PoolResult]: ...

    @overload
    def map(
        self,
        tensors: Iterable[object] | AsyncIterable[object],
        layers: ChainLike,
        *,
        layout: Layout = "NCHW",
        in_flight: int = IN_FLIGHT,
        progress: bool = False,
        return_exceptions: bool,
        timeout: Timeout = UNSET,
        priority: int | None = None,
        metadata: Pairs = (),
        **operand: Unpack[Operand],
    ) -> AsyncIterator[PoolResult | PoolError]: ...

    def map(  # noqa: PLR0913 - options, all by keyword
        self,
        tensors: Iterable[object] | AsyncIterable[object],
        layers: ChainLike,
        *,
        layout: Layout = "NCHW",
        in_flight: int = IN_FLIGHT,
        progress: bool = False,
        return_exceptions: bool = False,
        timeout: Timeout = UNSET,
        priority: int | None = None,
        metadata: Pairs = (),
        **operand: Unpack[Operand],
    ) -> AsyncIterator[PoolResult | PoolError]:
        """Run a layer, or a chain of layers, on each of many tensors, and yield the results in order.

        The results are an async iterator, and `tensors` may be an async iterable; see PoolClient.map for the arguments.
        """
        groups = self._grouping(layers, layout, operand)
        steps = self._map_steps(
            tensors,
            in_flight=in_flight,
            progress=progress,
            return_exceptions=return_exceptions,
            options=self._map_options(timeout, priority, metadata),
        )
        return self._run_map(steps, groups.over_async(tensors))

    async def _run_map(self, steps: MapSteps, found: AsyncGenerator[Group, None]) -> AsyncGenerator[Any, None]:
        async with aclosing(found) as groups:
            with closing(steps):
                result: Any = None
                while True:
                    try:
                        step = steps.send(result)
                    except StopIteration:
                        return
                    match step:
                        case NextGroup():
                            result = await anext(groups, None)
                        case Start():
                            result = asyncio.create_task(self._run(step.steps))
                        case Wait():
                            result = await step.future
                        case Deliver():
                            for each in step.results:
                                yield each
                            result = None

    async def output_shape(  # noqa: PLR0913 - options, all by keyword
        self,
        shape: Iterable[int],
        layers: ChainLike,
        *,
        layout: Layout = "NCHW",
        operand_shape: Iterable[int] | None = None,
        timeout: Timeout = UNSET,  # noqa: ASYNC109 - gRPC's deadline, which the server sees too
        metadata: Pairs = (),
    ) -> Shape:
        """Return the output shape that the server computes: see PoolClient.output_shape."""
        options = self._call_options(timeout, None, metadata)
        return await self._run(self._output_shape_steps(shape, layers, layout, operand_shape, options))

    async def server_info(self, *, timeout: Timeout = UNSET, metadata: Pairs = ()) -> ServerInfo:  # noqa: ASYNC109 - gRPC's deadline
        """Return what PoolClient.server_info returns."""
        return await self._run(self._server_info_steps(self._call_options(timeout, None, metadata)))

    async def health(self, service: str = "", *, timeout: Timeout = UNSET, metadata: Pairs = ()) -> str:  # noqa: ASYNC109 - gRPC's deadline
        """Return the health of a service, by grpc.health.v1: see PoolClient.health."""
        return await self._run(self._health_steps(service, self._call_options(timeout, None, metadata)))

    async def wait_until_ready(self, timeout: Timeout = UNSET) -> None:  # noqa: ASYNC109 - for all of its calls
        """Wait until the server takes calls: see PoolClient.wait_until_ready."""
        await self._run(self._ready_steps(self._call_options(timeout)))

    async def close(self) -> None:
        """Close the connection and cancel the calls in flight, which raise a CancelledError with the reason CLOSED."""
        self._close_arenas()
        if "_stream_resources" in vars(self):
            channel, threads = self._stream_resources
            channel.close()
            threads.shutdown(wait=False)
        if self._channel is not None:
            await self._channel.close()
        for process_channel, _ in list(self._processes.values()):
            await process_channel.close()

    async def __aenter__(self) -> Self:
        """Return the client, which is closed at the end of the block."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the client."""
        await self.close()

    def _after_fork(self) -> None:
        super()._after_fork()
        self._forked = True

    def _call_options(self, timeout: Timeout, priority: int | None = None, metadata: Pairs = ()) -> CallOptions:
        if self._forked:  # its event loop, and grpc.aio's threads, are the parent's
            msg = f"expected a client that was created in this process, got {self!r} of its parent"
            raise PoolError(msg, reason="FORKED")
        options, loop = super()._call_options(timeout, priority, metadata), asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            super()._connect()
        if self._loop is not loop:
            msg = f"expected the event loop of the first call of {self!r}, got another one; make a client in each loop"
            raise PoolError(msg, reason="EVENT_LOOP")
        return options

    def _connect(self) -> None:
        """Leave the channel to the first call: it belongs to the event loop in which it is opened."""

    def _open_channel(self, address: str) -> aio.Channel:
        if self._credentials is None:
            return aio.insecure_channel(grpc_target(address), self._channel_arguments)
        return aio.secure_channel(grpc_target(address), self._credentials, self._channel_arguments)

    async def _run(self, steps: Steps[T]) -> T:
        step: Any = None
        result: Any = None
        try:
            step = next(steps)
            while True:
                try:
                    result = await self._perform(step)
                except BaseException as error:  # noqa: BLE001 - the steps raise it, or handle it
                    step = steps.throw(self._translate(error))
                else:
                    step = steps.send(result)
        except StopIteration as stop:
            value: T = stop.value
            return value
        finally:
            step = result = None  # each breaks the cycle of an error that it refers to, its traceback and this frame

    async def _perform(self, step: Send | SendLocal | SendStream | RunBlocking | Pause) -> Any:  # noqa: ANN401 - each step has its own result
        match step:
            case Send():
                return await self._send(step)
            case SendLocal():
                return await self._send_local(step)
            case SendStream():
                return await self._stream(step)
            case RunBlocking():
                return await asyncio.to_thread(step.function)
            case Pause():
                return await asyncio.sleep(step.seconds)

    async def _send(self, step: Send) -> Any:  # noqa: ANN401 - the method's response
        try:
            call = self._method(step)(step.message, **step.options.arguments())
            response = await call
            log_retries(await call.trailing_metadata())
        except aio.UsageError:  # grpc.aio's error for a channel that is closed
            if self._closed:
                raise self._closed_during_call() from None
            raise
        except asyncio.CancelledError:
            # Closing a channel cancels its calls as if their tasks were cancelled.
            task = asyncio.current_task()
            if self._closed and not (task and task.cancelling()):
                raise self._closed_during_call() from None
            raise
        return response

    @cached_property
    def _stream_resources(self) -> tuple[grpc.Channel, futures.ThreadPoolExecutor]:
        # Streams run on a blocking channel, in threads: if a stream ends while it is written to, grpc.aio reports an
        # internal error instead of the status that the server ended it with (seen in 1.85: set_internal_error).
        return self._open_blocking_channel(self.address), futures.ThreadPoolExecutor(MAX_STREAMS, "poolrpc-stream")

    async def _send_local(self, step: SendLocal) -> bytes:
        local, loop = self._local, asyncio.get_running_loop()
        assert local is not None  # noqa: S101 - the steps asked
        while (connection := local.take(step.process)) is None:
            await asyncio.to_thread(local.connect, step.process)
        try:
            async with asyncio.timeout(step.timeout):
                # A packet is sent as a whole or not at all.
                await loop.sock_sendall(connection.socket, b"".join(step.packet))
                response = connection.answer(await loop.sock_recv_into(connection.socket, connection.buffer))
        except BaseException as error:  # noqa: BLE001 - raised, or another in its place
            raise local.failed(connection, error) from error.__cause__
        local.put_back(connection)
        return response

    async def _stream(self, step: SendStream) -> list[PoolResult]:
        if self._closed:
            raise self._closed_during_call()
        channel, threads = self._stream_resources
        loop = asyncio.get_running_loop()
        report: futures.Future[None] = futures.Future()

        def progress_in_loop(done: int, count: int) -> None:
            nonlocal report
            report = futures.Future()
            if not call.cancelled:
                loop.call_soon_threadsafe(_report, report, step.progress, done, count)
                report.result()

        call = StreamCall(stream_method(channel), step.transfer, step.options, self._is_closed)
        run = loop.run_in_executor(threads, call.run, None if step.progress is None else progress_in_loop)
        try:
            # The call may wait for a thread until its deadline; once it has one, gRPC enforces the deadline.
            async with asyncio.timeout(step.options.time_remaining()):
                return await run
        except TimeoutError:
            raise DeadlineExceededError("the deadline passed before the end of the stream") from None
        finally:
            call.cancel()  # the caller may have been cancelled
            report.cancel()  # the loop may end before it runs what the call's thread waits for
            del run  # breaks the cycle of its error, the error's traceback and this frame


def _report(report: futures.Future[None], progress: Progress | None, done: int, count: int) -> None:
    if report.set_running_or_notify_cancel():
        try:
            if progress is not None:
                progress(done, count)
            report.set_result(None)
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            report.set_exception(error)

"""The blocking client."""

from __future__ import annotations

import threading
from concurrent import futures
from contextlib import closing
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack, overload

from poolrpc._base_client import IN_FLIGHT, BaseClient, Out, callers
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
from poolrpc.chains import as_steps

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import grpc

    from poolrpc._transport.coalesce import Group
    from poolrpc._transport.join import Join
    from poolrpc._transport.options import Pairs, Timeout, Transport
    from poolrpc._transport.result import PoolResult, Progress
    from poolrpc._transport.steps import MapSteps, Steps
    from poolrpc._wire.codec import ServerInfo
    from poolrpc.chains import ChainLike, LayerLike, Shape
    from poolrpc.errors import PoolError
    from poolrpc.operands import Operand
    from poolrpc.tensors import Layout

T = TypeVar("T")


class PoolClient(BaseClient):
    """A connection to a pool server.

    Any number of threads may use one client. The child of a fork gets a connection and shared memory of its own on its
    next call; arrays of `empty` and of `copy=False` are the parent's, which may reuse their memory. Every method raises
    a poolrpc.PoolError if the server rejects the call or cannot be reached: poolrpc.errors has the tree of errors. A
    call that finds the server full, draining or gone (UNAVAILABLE) is retried a few times, within its timeout.

    Examples:
        >>> import numpy as np
        >>> from poolrpc import MaxPool2d, PoolClient
        >>> with PoolClient("127.0.0.1:50051") as client:
        ...     client.pool(np.zeros((1, 64, 56, 56), np.float32), MaxPool2d(2)).shape
        (1, 64, 28, 28)

    """

    def pool(  # noqa: PLR0913 - options, all by keyword
        self,
        x: object,
        layers: ChainLike,
        *,
        layout: Layout = "NCHW",
        out: Out | None = None,
        timeout: Timeout = UNSET,
        priority: int | None = None,
        metadata: Pairs = (),
        transport: Transport | None = None,
        copy: bool = True,
        progress: Progress | None = None,
        **operand: Unpack[Operand],
    ) -> PoolResult:
        """Run a layer, or a chain of layers, on a tensor.

        Args:
            x: An array of (N, C, spatial...) or (C, spatial...); or anything with `__array__`, `__array_interface__` or
                DLPack, such as a torch tensor; or, with layout="NHWC", an image of Pillow or a list of images. bfloat16
                is that of ml_dtypes. A C-contiguous np.memmap is read block by block.
            layers: One layer, or several, each of which takes the output of the one before. A layer may also be an
                expression, such as "MaxPool2d(2)", or a pooling module of torch.nn; a Sequential is a chain of them.
            layout: The layout of x and of the output: "NCHW" for channels first or "NHWC" for channels last, with any
                number of spatial axes.
            out: A C-contiguous array for the output, such as an np.memmap, of its shape and dtype; or a pair of arrays
                for the output and the indices. None: a new array.
            timeout: The timeout in seconds; None or math.inf for no limit. Unset: the client's.
            priority: 0 for a call that goes before others, 1, or 2 for one that goes after others. If the server has
                tokens, 0 needs one that allows it. None: the client's, or else 1.
            metadata: A dict or pairs, sent with this call in addition to the client's, and in place of those of the
                client that have the same keys.
            transport: "unary", "stream", "arena" or "local". None: the fastest one for the size and the address.
            copy: Whether results that arrive in an arena are copied out of it. If not, they stay there, and its memory
                is reserved while they, or views of them, exist.
            progress: Called with the number of planes that are done and the number of all planes, whenever some are
                done.
            **operand: The second tensor of a layer that takes one: `indices` for MaxUnpool, int64, of x's shape;
                `weights` for GlobalPool, such as a mask, of x's shape without its channels; `offsets`, `lengths` or
                `ids` for SegmentPool; `boxes` for RoIPool and RoIAlign. The layers have the details.

        Returns:
            The output, the shape after every layer, and the indices if the last layer returns them.

        Raises:
            PoolError: The call failed; the class says how. An InvalidArgumentError has the paths of the fields at
                fault.

        """
        transfer = self._transfer(x, (layers,), operand, layout, None if out is None else (out,))
        options = self._call_options(timeout, priority, metadata)
        return self._run(self._call_steps(transfer, options, transport, progress, copy=copy))[0]

    @overload
    def pool_each(
        self,
        x: object,
        branches: LayerLike | Iterable[ChainLike],
        *,
        join: None = None,
        layout: Layout = "NCHW",
        out: Sequence[Out | None] | None = None,
        timeout: Timeout = UNSET,
        priority: int | None = None,
        metadata: Pairs = (),
        transport: Transport | None = None,
        copy: bool = True,
        progress: Progress | None = None,
        **operand: Unpack[Operand],
    ) -> list[PoolResult]: ...

    @overload
    def pool_each(
        self,
        x: object,
        branches: LayerLike | Iterable[ChainLike],
        *,
        join: Join,
        layout: Layout = "NCHW",
        out: Sequence[Out | None] | None = None,
        timeout: Timeout = UNSET,
        priority: int | None = None,
        metadata: Pairs = (),
        transport: Transport | None = None,
        copy: bool = True,
        progress: Progress | None = None,
        **operand: Unpack[Operand],
    ) -> PoolResult: ...

    def pool_each(  # noqa: PLR0913 - options, all by keyword
        self,
        x: object,
        branches: LayerLike | Iterable[ChainLike],
        *,
        join: Join | None = None,
        layout: Layout = "NCHW",
        out: Sequence[Out | None] | None = None,
        timeout: Timeout = UNSET,
        priority: int | None = None,
        metadata: Pairs = (),
        transport: Transport | None = None,
        copy: bool = True,
        progress: Progress | None = None,
        **operand: Unpack[Operand],
    ) -> list[PoolResult] | PoolResult:
        """Run each of several layers or chains on the same tensor, which is sent once.

        Args:
            x: As in pool.
            branches: The layers or chains, each as in pool; or one expression of all of them, such as
                "[[MaxPool2d(2)], [MaxPool2d(2), AvgPool2d(2)]]".
            join: How to join the outputs of the branches, all of one dtype and without indices, to one: "cat" along the
                channels; "flatten" each output of an image, of any size, and concatenate them; or the "mean" or the
                "sum", cell by cell. None: the outputs stay apart.
            layout: As in pool.
            out: For each branch, an `out` as in pool. None: new arrays for all branches.
            timeout: As in pool.
            priority: As in pool.
            metadata: As in pool.
            transport: As in pool.
            copy: As in pool.
            progress: As in pool.
            **operand: As in pool; every branch whose first layer takes it gets it.

        Returns:
            The result of each branch, in order; with `join`, the one result of all of them.

        Raises:
            PoolError: As in pool. With `join`, an InvalidArgumentError too if the outputs don't fit each other.

        Examples:
            >>> import numpy as np
            >>> from poolrpc import GlobalPool2d, PoolClient
            >>> with PoolClient("127.0.0.1:50051") as client:
            ...     layers = [GlobalPool2d("mean"), GlobalPool2d("max")]
            ...     result = client.pool_each(np.zeros((8, 64, 7, 7), np.float32), layers, join="cat")
            >>> result.shape
            (8, 128, 1, 1)

        """
        transfer = self._transfer(x, branches, operand, layout, out)
        joined = None if join is None else self._joined(join, transfer)
        options = self._call_options(timeout, priority, metadata)
        results = self._run(self._call_steps(transfer, options, transport, progress, copy=copy))
        return results if joined is None else joined(results)

    def pool_steps(  # noqa: PLR0913 - options, all but the first three by keyword
        self,
        x: object,
        layers: ChainLike,
        steps: Iterable[int] | None = None,
        *,
        layout: Layout = "NCHW",
        out: Sequence[Out | None] | None = None,
        timeout: Timeout = UNSET,
        priority: int | None = None,
        metadata: Pairs = (),
        transport: Transport | None = None,
        copy: bool = True,
        progress: Progress | None = None,
        **operand: Unpack[Operand],
    ) -> list[PoolResult]:
        """Run a chain of layers on a tensor, and return the outputs of several steps, such as the levels of a pyramid.

        All of them are computed in one pass: a layer reads what the one before has written while that is in the cache.

        Args:
            x: As in pool.
            layers: As in pool.
            steps: The numbers of the layers whose outputs are returned, counted from 0 and in ascending order. Layers
                after the last of them are not computed. None: all layers.
            layout: As in pool.
            out: For each of these steps, an `out` as in pool. None: new arrays for all of them.
            timeout: As in pool.
            priority: As in pool.
            metadata: As in pool.
            transport: As in pool.
            copy: As in pool.
            progress: As in pool.
            **operand: As in pool; every branch whose first layer takes it gets it.

        Returns:
            The result of each of these steps, in order, with the indices if its layer returns them.

        Raises:
            PoolError: As in pool.

        Examples:
            >>> import numpy as np
            >>> from poolrpc import AvgPool2d, PoolClient
            >>> with PoolClient("127.0.0.1:50051") as client:
            ...     levels = client.pool_steps(np.zeros((1, 64, 512, 512), np.float32), [AvgPool2d(2)] * 3)
            >>> [level.shape for level in levels]
            [(1, 64, 256, 256), (1, 64, 128, 128), (1, 64, 64, 64)]

        """
        chain, outputs = as_steps(layers, steps)
        transfer = self._transfer(x, (chain,), operand, layout, out, (outputs,))
        options = self._call_options(timeout, priority, metadata)
        return self._run(self._call_steps(transfer, options, transport, progress, copy=copy))

    @overload
    def map(
        self,
        tensors: Iterable[object],
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
    ) -> Iterator[PoolResult]: ...

    @overload
    def map(
        self,
        tensors: Iterable[object],
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
    ) -> Iterator[PoolResult | PoolError]: ...

    def map(  # noqa: PLR0913 - options, all by keyword
        self,
        tensors: Iterable[object],
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
    ) -> Iterator[PoolResult | PoolError]:
        """Run a layer, or a chain of layers, on each of many tensors, and yield the results in order.

        Consecutive tensors of one dtype and plane size are sent as one request, and several requests are in flight at a
        time. Only as many tensors and results are in memory as these requests need.

        Args:
            tensors: Tensors as pool takes them, of any sizes. A generator is read only as far ahead as requests are in
                flight; an array that it yields must not change until its result has been yielded.
            layers: As in pool.
            layout: As in pool.
            in_flight: The number of requests in flight, 1 to 64.
            progress: Whether to show a progress bar, if tqdm is installed.
            return_exceptions: Whether the error of a tensor that fails is yielded in place of its result. If not, it is
                raised after the results before it, and its `tensor` is the number of the tensor, counted from 0.
            timeout: As in pool, for each request.
            priority: As in pool.
            metadata: As in pool.
            **operand: As in pool, but an iterable with one operand for each tensor; itertools.repeat(offsets) is the
                same one for all.

        Returns:
            An iterator over the result of each tensor, in order; or its error, if return_exceptions is set.

        Raises:
            PoolError: An argument is not valid; or, from the iterator, a tensor failed. The class says how.

        """
        groups = self._grouping(layers, layout, operand)
        steps = self._map_steps(
            tensors,
            in_flight=in_flight,
            progress=progress,
            return_exceptions=return_exceptions,
            options=self._map_options(timeout, priority, metadata),
        )
        return self._run_map(steps, groups.over(tensors), in_flight)

    def output_shape(  # noqa: PLR0913 - options, all by keyword
        self,
        shape: Iterable[int],
        layers: ChainLike,
        *,
        layout: Layout = "NCHW",
        operand_shape: Iterable[int] | None = None,
        timeout: Timeout = UNSET,
        metadata: Pairs = (),
    ) -> Shape:
        """Return the output shape that the server computes; layer.output_shape(shape) is the same without a server.

        Args:
            shape: The shape of the input: (N, C, spatial...) or (C, spatial...).
            layers: As in pool.
            layout: As in pool.
            operand_shape: The shape of the operand, if the first layer takes one on which its output depends.
            timeout: As in pool.
            metadata: As in pool.

        Raises:
            PoolError: As in pool.

        """
        options = self._call_options(timeout, None, metadata)
        return self._run(self._output_shape_steps(shape, layers, layout, operand_shape, options))

    def server_info(self, *, timeout: Timeout = UNSET, metadata: Pairs = ()) -> ServerInfo:
        """Return the server's versions, its device, its layers with their dtypes, and its limits.

        Args:
            timeout: As in pool.
            metadata: As in pool.

        Raises:
            PoolError: As in pool.

        """
        return self._run(self._server_info_steps(self._call_options(timeout, None, metadata)))

    def health(self, service: str = "", *, timeout: Timeout = UNSET, metadata: Pairs = ()) -> str:
        """Return the health of a service, by grpc.health.v1: "SERVING" or "NOT_SERVING".

        Args:
            service: The full name of the service. Empty: the health of the server.
            timeout: As in pool.
            metadata: As in pool.

        Raises:
            PoolError: As in pool.

        """
        return self._run(self._health_steps(service, self._call_options(timeout, None, metadata)))

    def wait_until_ready(self, timeout: Timeout = UNSET) -> None:
        """Wait until the server takes calls, such as one that has just been started.

        Args:
            timeout: As in pool, for the whole wait.

        Raises:
            UnavailableError: The server is not ready within the timeout; the message says what was found.
            FailedPreconditionError: There is a server that the client's settings do not fit, as with TLS on one side
                only; this is raised at once.
            PoolError: As in pool.

        """
        self._run(self._ready_steps(self._call_options(timeout)))

    def close(self) -> None:
        """Close the connection and cancel the calls in flight, which raise a CancelledError with the reason CLOSED."""
        self._close_arenas()
        self._channel.close()
        with self._processes_lock:
            processes = list(self._processes.values())
        for channel, _ in processes:
            channel.close()

    def __enter__(self) -> Self:
        """Return the client, which is closed at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the client."""
        self.close()

    def _open_channel(self, address: str) -> grpc.Channel:
        return self._open_blocking_channel(address)

    def _run(self, steps: Steps[T]) -> T:
        thread = threading.get_ident()
        callers.add(thread)
        step: Any = None
        result: Any = None
        try:
            step = next(steps)
            while True:
                try:
                    result = self._perform(step)
                except BaseException as error:  # noqa: BLE001 - the steps raise it, or handle it
                    step = steps.throw(self._translate(error))
                else:
                    step = steps.send(result)
        except StopIteration as stop:
            value: T = stop.value
            return value
        finally:
            step = result = None  # each breaks the cycle of an error that it refers to, its traceback and this frame
            callers.discard(thread)

    def _perform(self, step: Send | SendLocal | SendStream | RunBlocking | Pause) -> Any:  # noqa: ANN401 - each step has its own result
        match step:
            case Send():
                try:
                    response, call = self._method(step).with_call(step.message, **step.options.arguments())
                except ValueError:  # gRPC's error for a channel that is closed
                    if self._closed:
                        raise self._closed_during_call() from None
                    raise
                log_retries(call.trailing_metadata())
                return response
            case SendLocal():
                assert self._local is not None  # noqa: S101 - the steps asked
                return self._local.call(step.process, step.packet, step.timeout)
            case SendStream():
                call = StreamCall(stream_method(self._channel), step.transfer, step.options, self._is_closed)
                return call.run(step.progress)
            case RunBlocking():
                return step.function()
            case Pause():
                return self._closing.wait(step.seconds)

    def _run_map(self, steps: MapSteps, groups: Iterator[Group], in_flight: int) -> Iterator[Any]:
        with futures.ThreadPoolExecutor(in_flight, "poolrpc-map") as executor, closing(steps):
            result: Any = None
            while True:
                try:
                    step = steps.send(result)
                except StopIteration:
                    return
                match step:
                    case NextGroup():
                        result = next(groups, None)
                    case Start():
                        # In the context of the caller, which may have a span, at this point of the map.
                        result = executor.submit(copy_context().run, self._run, step.steps)
                    case Wait():
                        result = step.future.result()
                    case Deliver():
                        yield from step.results
                        result = None

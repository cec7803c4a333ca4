"""Coalescing: consecutive tensors of one dtype and plane size are sent as one request, their planes concatenated."""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterable, Iterable
from contextlib import contextmanager
from copy import copy
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

from poolrpc._shapes.rules import check_shape
from poolrpc._transport.grouped_operands import (
    Operands,
    along_axis,
    follow_along_axis,
    is_of_images,
    joined_operand,
    parts_along_axis,
    parts_of_boxes,
)
from poolrpc._transport.request import Transfer, prepare
from poolrpc._transport.result import PoolResult
from poolrpc._wire import codec
from poolrpc.chains import check_layout, period, spatial_dims
from poolrpc.errors import InternalError, InvalidArgumentError, LimitExceededError, PoolError
from poolrpc.tensors import TensorSpec, as_array, spec_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

    from poolrpc.chains import Chain, Shape
    from poolrpc.tensors import Array, Layout

GROUP_BYTES = 2**20
"""The size, in bytes, up to which tensors are grouped. Larger groups gain nothing and arrive later."""

Outcome: TypeAlias = PoolResult | PoolError
"""The result of a tensor, or its error."""


class Group:
    """Consecutive tensors that are sent as one request.

    Args:
        tensors: The tensors.
        chain: The layers.
        layout: The layout of the tensors.
        operands: The operand of each tensor; empty if the layers take none.
        failure: Why the only tensor of the group cannot be sent; None if it can.

    Attributes:
        tensors: The tensors.

    """

    def __init__(
        self,
        tensors: Sequence[Array],
        chain: Chain,
        layout: Layout,
        operands: Sequence[Array] = (),
        failure: PoolError | None = None,
    ) -> None:
        self.tensors = tensors
        self._operands = operands
        self._chain, self._layout, self._failure = chain, layout, failure
        self._along_axis = len(tensors) > 1 and follow_along_axis(tensors, operands, chain)

    def transfer(self) -> Transfer:
        """Return the request with its tensors.

        Raises:
            PoolError: The tensor of the group cannot be sent.

        """
        if self._failure is not None:
            raise self._failure
        if self._along_axis:
            return along_axis(self.tensors, self._operands, self._chain, self._layout)
        spec = spec_of(self.tensors[0], self._layout)
        if len(self.tensors) > 1:
            tail = _plane_axes(spec, self._chain)
            planes = sum(prod(each.shape[:-tail]) for each in self.tensors)
            lead: Shape = (planes,)
            if self._layout == "NCHW":
                one_image = period((self._chain,)) == 1 and not (self._operands and is_of_images(self._chain))
                channels = planes if one_image else spec.shape[-tail - 1]
                lead = (planes // channels, channels)
            spec = TensorSpec(spec.dtype, (*lead, *spec.shape[-tail:]), self._layout)
        if not self._operands:
            return Transfer(prepare(codec.Request(spec, (self._chain,))), self.tensors)
        operand = joined_operand(self.tensors, self._operands, self._chain, spec)
        request = codec.Request(spec, (self._chain,), spec_of(operand, self._layout))
        return Transfer(prepare(request), self.tensors, (), operand)

    def split(self) -> list[Group]:
        """Return a group for each tensor."""
        operands = [[each] for each in self._operands] or [[] for _ in self.tensors]
        return [
            Group([each], self._chain, self._layout, operand)
            for each, operand in zip(self.tensors, operands, strict=True)
        ]

    def failed(self, error: PoolError) -> list[Outcome]:
        """Return a copy of the error for each tensor."""
        return [copy(error) for _ in self.tensors] or [error]

    def may_be_one_tensors_fault(self, error: PoolError) -> bool:
        """Return whether one tensor may be the cause of an error, so that the others are worth another attempt."""
        return len(self.tensors) > 1 and isinstance(error, InvalidArgumentError | LimitExceededError | InternalError)

    def outcomes(self, result: PoolResult) -> list[Outcome]:
        """Return the part of the group's result that belongs to each tensor."""
        if len(self.tensors) == 1:
            return [result]
        if self._along_axis:
            return [*parts_along_axis(result, self._operands, self._layout)]
        if self._operands and self._chain[0].operand == "boxes":
            return [*parts_of_boxes(result, self._operands)]
        tail = _plane_axes(spec_of(self.tensors[0], self._layout), self._chain)
        shapes: dict[Shape, tuple[Shape, ...]] = {}
        flat = [
            None if array is None else array.reshape(-1, *array.shape[-tail:])
            for array in (result.output, result.indices)
        ]
        stop = 0
        outcomes: list[Outcome] = []
        for tensor in self.tensors:
            lead = tensor.shape[:-tail]
            if lead not in shapes:
                shapes[lead] = tuple((*lead, *each[-tail:]) for each in result.shapes)
            steps, start = shapes[lead], stop
            stop += prod(lead)
            output, indices = (None if part is None else part[start:stop].reshape(steps[-1]) for part in flat)
            outcomes.append(PoolResult(output, steps, indices, result.transport))  # type: ignore[arg-type]  # it has an output
        return outcomes


class Grouping:
    """A division of tensors, in order, into groups. A tensor that cannot be sent is a group of its own.

    Args:
        chain: The layers.
        layout: The layout of the tensors.
        operands: The name of the operand, and an iterable with that of each tensor. None: the layers take none.
        group_bytes: The size of a group, in bytes, at most, unless it is one tensor.

    Raises:
        InvalidArgumentError: The layout is unknown, or the operands are not iterable.

    """

    def __init__(
        self,
        chain: Chain,
        layout: Layout,
        operands: tuple[str, Any] | None = None,
        *,
        group_bytes: int = GROUP_BYTES,
    ) -> None:
        check_layout(layout)
        self._chain, self._layout = chain, layout
        self._given = None if operands is None else Operands(*operands, chain)
        self._operands: list[Array] = []
        # A layer whose result depends on the number of any plane needs the planes of each tensor counted from 0. Images
        # with boxes are not divided, but other images with their boxes may follow.
        groups = period((chain,)) and all(layer.splittable or layer.operand == "boxes" for layer in chain)
        self._group_bytes = group_bytes if groups else 0
        self._waiting: list[Array] = []
        self._size = 0
        self._key: object = None
        self._last: object = None

    def add(self, tensor: object) -> Sequence[Group]:
        """Add the next tensor and return the groups that are complete."""
        try:
            operand = None if self._given is None else self._given.take()
            array = as_array(tensor, self._layout)
            key, last = self._key, (array.dtype, array.shape, id(operand))
            if self._last != last:  # the id is of the latest operand, which is in memory
                key, self._last = self._key_of(spec_of(array, self._layout), operand), last
        except PoolError as error:
            return [*self.finish(), Group([], self._chain, self._layout, (), error)]
        complete: Sequence[Group] = ()
        if self._waiting and (key is None or key != self._key or self._size + array.nbytes > self._group_bytes):
            complete = self.finish()
        self._key = key
        self._waiting.append(array)
        if operand is not None:
            self._operands.append(operand)
        self._size += array.nbytes
        return complete

    def over(self, tensors: Iterable[object]) -> Iterator[Group]:
        """Yield the groups of all tensors."""
        for tensor in tensors:
            yield from self.add(tensor)
        yield from self.finish()

    async def over_async(self, tensors: Iterable[object] | AsyncIterable[object]) -> AsyncGenerator[Group, None]:
        """Yield the groups of all tensors of an iterable or an async iterable."""
        if not isinstance(tensors, AsyncIterable):
            for group in self.over(tensors):
                yield group
            return
        async for tensor in tensors:
            for group in self.add(tensor):
                yield group
        for group in self.finish():
            yield group

    def finish(self) -> Sequence[Group]:
        """Return the group that is not complete, if there is one."""
        waiting, self._waiting, self._size = self._waiting, [], 0
        operands, self._operands = self._operands, []
        return [Group(waiting, self._chain, self._layout, operands)] if waiting else ()

    def _key_of(self, spec: TensorSpec, operand: Array | None = None) -> object:
        # A tensor without elements is sent alone, and so is one of a wrong shape, whose request raises the error.
        try:
            axes = _plane_axes(spec, self._chain)
        except InvalidArgumentError:
            return None
        if not spec.numel:
            return None
        # A layer that treats channels differently needs the same ones in all tensors, and so do weights and boxes.
        same_channels = period((self._chain,)) > 1 or (operand is not None and is_of_images(self._chain))
        channels = spec.shape[-axes - 1] if spec.layout == "NCHW" and same_channels else None
        if operand is None or self._given is None:
            return spec.dtype, channels, spec.shape[-axes:]
        return self._given.key_of(spec, operand, (channels, spec.shape[-axes:]))


def _plane_axes(spec: TensorSpec, chain: Chain) -> int:
    """Return how many of the last axes make up a plane; with channels last, the planes of an image are one."""
    dims = check_shape(spec.shape, spatial_dims((chain,)))
    return dims if spec.layout == "NCHW" else dims + 1


class Order:
    """The order of a map's outcomes: it delivers them in the order of the tensors, and numbers the tensors.

    Args:
        return_exceptions: Whether an error is delivered in place of the result, rather than raised.

    """

    def __init__(self, *, return_exceptions: bool) -> None:
        self._return_exceptions = return_exceptions
        self._delivered = 0

    def deliver(self, outcomes: Sequence[Outcome], advance: Callable[[int], Any]) -> Iterator[Any]:
        """Yield the outcomes of the next tensors.

        Args:
            outcomes: The outcomes.
            advance: Called with the number of tensors, after the last of them.

        Raises:
            PoolError: The error of a tensor, with the tensor's number, unless errors are delivered.

        """
        for outcome in outcomes:
            if isinstance(outcome, PoolError):
                outcome.tensor = self._delivered
                if not self._return_exceptions:
                    outcome.add_note(f"tensor {self._delivered} of the map")
                    raise outcome
            self._delivered += 1
            yield outcome
        advance(len(outcomes))


@contextmanager
def progress_bar(tensors: object, *, shown: bool) -> Iterator[Callable[[int], Any]]:
    """Show a progress bar over tensors, if tqdm is installed, and return the function that advances it."""
    if not shown:
        yield lambda _: None
        return
    try:
        from tqdm import tqdm  # noqa: PLC0415 - optional
    except ImportError:
        warnings.warn("progress=True shows nothing without tqdm: pip install 'poolrpc[progress]'", stacklevel=2)
        yield lambda _: None
        return
    with tqdm(total=len(tensors) if hasattr(tensors, "__len__") else None, unit="tensor") as bar:
        yield bar.update

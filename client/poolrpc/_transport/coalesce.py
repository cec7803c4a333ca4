"""Coalescing: consecutive tensors of one dtype and plane size are sent as one request, their planes concatenated."""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterable, Iterable
from contextlib import contextmanager
from copy import copy
from itertools import repeat
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from poolrpc._shapes.rules import check_shape, clip
from poolrpc._transport.request import Transfer, prepare
from poolrpc._transport.result import PoolResult
from poolrpc._wire import codec
from poolrpc.chains import check_layout, period, spatial_dims
from poolrpc.errors import InternalError, InvalidArgumentError, LimitExceededError, PoolError
from poolrpc.operands import check_operand_name, operand_of
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

    def transfer(self) -> Transfer:
        """Return the request with its tensors.

        Raises:
            PoolError: The tensor of the group cannot be sent.

        """
        if self._failure is not None:
            raise self._failure
        spec = spec_of(self.tensors[0], self._layout)
        if len(self.tensors) > 1:
            tail = _plane_axes(spec, self._chain)
            planes = sum(prod(each.shape[:-tail]) for each in self.tensors)
            lead: Shape = (planes,)
            if self._layout == "NCHW":
                one_image = period((self._chain,)) == 1 and not (
                    self._operands and _has_rows(self._chain, self._operands[0])
                )
                channels = planes if one_image else spec.shape[-tail - 1]
                lead = (planes // channels, channels)
            spec = TensorSpec(spec.dtype, (*lead, *spec.shape[-tail:]), self._layout)
        if not self._operands:
            return Transfer(prepare(codec.Request(spec, (self._chain,))), self.tensors)
        operand = self._joined(spec)
        request = codec.Request(spec, (self._chain,), spec_of(operand, self._layout))
        return Transfer(prepare(request), self.tensors, (), operand)

    def _joined(self, spec: TensorSpec) -> Array:
        """Return the operand of the group, whose input has this spec."""
        first = self._operands[0]
        # The offsets of all tensors of a group are the same.
        if len(self._operands) == 1 or self._chain[0].operand == "offsets":
            return first
        joined = np.concatenate([each.reshape(-1) for each in self._operands])
        if self._chain[0].operand == "indices":
            return joined.reshape(spec.shape)
        return joined.reshape(spec.shape[0], *first.shape[-spatial_dims((self._chain,)) :])

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
        self._given = None if operands is None else _Operands(*operands, chain)
        self._operands: list[Array] = []
        # A layer whose result depends on the number of any plane needs the planes of each tensor counted from 0.
        groups = period((chain,)) and all(layer.splittable for layer in chain)
        self._group_bytes = group_bytes if groups else 0
        self._waiting: list[Array] = []
        self._size = 0
        self._key: object = None
        self._last: object = None

    def add(self, tensor: object) -> Sequence[Group]:
        """Add the next tensor and return the groups that are complete."""
        try:
            array = as_array(tensor, self._layout)
            key = self._key
            if self._given is not None:
                operand = self._given.take()
                key = self._key_of(spec_of(array, self._layout), operand)
            elif self._last != (array.dtype, array.shape):
                key = self._key_of(spec_of(array, self._layout))
                self._last = array.dtype, array.shape
        except PoolError as error:
            return [*self.finish(), Group([], self._chain, self._layout, (), error)]
        complete: Sequence[Group] = ()
        if self._waiting and (key is None or key != self._key or self._size + array.nbytes > self._group_bytes):
            complete = self.finish()
        self._key = key
        self._waiting.append(array)
        if self._given is not None:
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
        # A layer that treats channels differently needs the same ones in all tensors, and so does one with weights.
        same_channels = period((self._chain,)) > 1 or _has_rows(self._chain, operand)
        channels = spec.shape[-axes - 1] if spec.layout == "NCHW" and same_channels else None
        if operand is None:
            return spec.dtype, channels, spec.shape[-axes:]
        try:
            prepare(codec.Request(spec, (self._chain,), spec_of(operand, self._layout)))
        except PoolError:
            return None
        assert self._given is not None  # noqa: S101 - it gave the operand
        return spec.dtype, channels, spec.shape[-axes:], operand.dtype, self._given.offsets


class _Operands:
    """The operands of a map's tensors, in order.

    Args:
        name: The name of their keyword argument.
        values: An iterable with that of each tensor.
        chain: The layers.

    Attributes:
        offsets: The number of different offsets so far.

    Raises:
        InvalidArgumentError: The values are not iterable, or the layers take no such operand.

    """

    def __init__(self, name: str, values: Any, chain: Chain) -> None:  # noqa: ANN401 - checked here
        check_operand_name(name, (chain,))
        if not isinstance(values, Iterable):
            msg = f"expected an iterable with the {name} of each tensor, got {clip(values)}"
            raise InvalidArgumentError(msg, field=name)
        self._name, self._chain = name, chain
        self._values = iter(values)
        self._same = isinstance(values, repeat)
        self._last: Array | None = None
        self.offsets = 0

    def take(self) -> Array:
        """Return the operand of the next tensor.

        Raises:
            InvalidArgumentError: There is none, or it is not an array of its kind.

        """
        try:
            value = next(self._values)
        except StopIteration:
            raise InvalidArgumentError("expected one for each tensor, got fewer", field=self._name) from None
        if self._same and self._last is not None:
            return self._last
        operand = operand_of({self._name: value}, (self._chain,))
        if operand is None:
            raise InvalidArgumentError("expected one for each tensor, got None", field=self._name)
        if self._chain[0].operand == "offsets" and not (self._last is not None and np.array_equal(operand, self._last)):
            self.offsets += 1
        self._last = operand
        return operand


def _has_rows(chain: Chain, operand: Array | None) -> bool:
    """Return whether the operand has a row for each image, so that its number of channels must be known."""
    return operand is not None and chain[0].operand == "weights"


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

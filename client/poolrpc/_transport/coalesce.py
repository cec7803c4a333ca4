"""Many tensors as few requests: those of one dtype and plane size travel together, their planes end to end."""

from __future__ import annotations

from collections.abc import AsyncIterable
from contextlib import contextmanager
from copy import copy
from math import prod
from typing import TYPE_CHECKING, Any

from poolrpc._shapes.rules import check_shape
from poolrpc._transport.transfer import PoolResult, Transfer, outline
from poolrpc._wire import codec
from poolrpc.chains import check_layout, spatial_dims
from poolrpc.errors import InternalError, InvalidArgumentError, LimitExceededError, PoolError
from poolrpc.tensors import TensorSpec, as_array, spec_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence

    from poolrpc.chains import Chain, Shape
    from poolrpc.tensors import Array

GROUP_BYTES = 2**20
"""Tensors travel together up to about this: larger groups gain nothing and arrive later."""

Outcome = PoolResult | PoolError
"""What becomes of a tensor."""


class Group:
    """Tensors that follow each other and travel as one request.

    Attributes:
        tensors: The tensors.
        failure: Why the one tensor of the group can't be sent, where it can't.

    """

    def __init__(self, tensors: Sequence[Array], chain: Chain, layout: str, failure: PoolError | None = None) -> None:
        self.tensors = tensors
        self.failure = failure
        self._chain, self._layout = chain, layout

    def transfer(self) -> Transfer:
        """Give the request.

        Raises:
            PoolError: The group's failure.

        """
        if self.failure is not None:
            raise self.failure
        spec = spec_of(self.tensors[0], self._layout)
        if len(self.tensors) > 1:
            tail = _tail(spec, self._chain)
            planes = sum(prod(each.shape[:-tail]) for each in self.tensors)
            lead = (1, planes) if self._layout == "NCHW" else (planes,)
            spec = TensorSpec(spec.dtype, (*lead, *spec.shape[-tail:]), self._layout)
        return Transfer(outline(codec.Request(spec, (self._chain,))), self.tensors)

    def apart(self) -> list[Group]:
        """Give each tensor as a group of its own."""
        return [Group([each], self._chain, self._layout) for each in self.tensors]

    def failed(self, error: PoolError) -> list[Outcome]:
        """Give each tensor an error of its own."""
        return [copy(error) for _ in self.tensors] or [error]

    def blames(self, error: PoolError) -> bool:
        """Tell whether the error may be one tensor's: the others are then worth another try."""
        return len(self.tensors) > 1 and isinstance(error, InvalidArgumentError | LimitExceededError | InternalError)

    def outcomes(self, result: PoolResult) -> list[Outcome]:
        """Give each tensor its part of the group's result."""
        if len(self.tensors) == 1:
            return [result]
        tail = _tail(spec_of(self.tensors[0], self._layout), self._chain)
        shapes: dict[Shape, tuple[Shape, ...]] = {}
        flat = [
            None if array is None else array.reshape(-1, *array.shape[-tail:])
            for array in (result.output, result.indices)
        ]
        done = 0
        given: list[Outcome] = []
        for tensor in self.tensors:
            lead = tensor.shape[:-tail]
            if lead not in shapes:
                shapes[lead] = tuple((*lead, *each[-tail:]) for each in result.shapes)
            steps, start = shapes[lead], done
            done += prod(lead)
            output, indices = (None if part is None else part[start:done].reshape(steps[-1]) for part in flat)
            given.append(PoolResult(output, steps, indices, result.transport))  # type: ignore[arg-type]  # there is an output
        return given


class Grouping:
    """Tensors become groups as they are added, in order; one that can't be sent is a group of its own."""

    def __init__(self, chain: Chain, layout: str) -> None:
        """Begin a grouping of tensors of that layout, for that chain."""
        check_layout(layout)
        self._chain, self._layout = chain, layout
        # A layer that tells planes apart by their number needs each tensor's to begin at 0.
        alike = all(layer.at_plane(1) is layer and layer.splittable for layer in chain)
        self._most = GROUP_BYTES if alike else 0
        self._waiting: list[Array] = []
        self._size = 0
        self._key: object = None
        self._like: object = None

    def add(self, tensor: object) -> Sequence[Group]:
        """Add the next tensor; give the groups that are then complete."""
        try:
            array = as_array(tensor)
            key = self._key
            if self._like != (array.dtype, array.shape):
                key = self._key_of(spec_of(array, self._layout))
                self._like = array.dtype, array.shape
        except PoolError as error:
            return [*self.finish(), Group([], self._chain, self._layout, error)]
        done: Sequence[Group] = ()
        if self._waiting and (key is None or key != self._key or self._size + array.nbytes > self._most):
            done = self.finish()
        self._key = key
        self._waiting.append(array)
        self._size += array.nbytes
        return done

    def over(self, tensors: Iterable[object]) -> Iterator[Group]:
        """Give the groups of tensors, to the last."""
        for tensor in tensors:
            yield from self.add(tensor)
        yield from self.finish()

    async def over_async(self, tensors: Iterable[object] | AsyncIterable[object]) -> AsyncIterator[Group]:
        """Give the groups of tensors of either kind, to the last."""
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
        """Give the group that waits for more tensors, where there is one."""
        waiting, self._waiting, self._size = self._waiting, [], 0
        return [Group(waiting, self._chain, self._layout)] if waiting else ()

    def _key_of(self, spec: TensorSpec) -> object:
        # What has no elements travels alone.
        return (spec.dtype, spec.shape[-_tail(spec, self._chain) :]) if spec.numel else None


def _tail(spec: TensorSpec, chain: Chain) -> int:
    """How many of the last axes make up a plane, which with channels last is a whole image."""
    dims = check_shape(spec.shape, spatial_dims((chain,)))
    return dims if spec.layout == "NCHW" else dims + 1


class Order:
    """What becomes of tensors, given to the caller in order."""

    def __init__(self, return_exceptions: bool) -> None:  # noqa: FBT001 - asyncio.gather's word
        """Begin; errors are given in place of results, or raised."""
        self._return = return_exceptions
        self._given = 0

    def give(self, outcomes: Sequence[Outcome], advance: Callable[[int], Any]) -> Iterator[Any]:
        """Give the next tensors' results.

        Raises:
            PoolError: A tensor's, unless errors are returned; it says which tensor's.

        """
        for outcome in outcomes:
            if isinstance(outcome, PoolError):
                outcome.tensor = self._given
                if not self._return:
                    outcome.add_note(f"tensor {self._given} of the map")
                    raise outcome
            self._given += 1
            yield outcome
        advance(len(outcomes))


@contextmanager
def bar(tensors: object, *, shown: bool) -> Iterator[Callable[[int], Any]]:
    """Show a progress bar over tensors, where tqdm is installed; give what moves it on."""
    try:
        if not shown:
            raise ImportError  # noqa: TRY301 - as where there is none
        from tqdm import tqdm  # noqa: PLC0415 - optional
    except ImportError:
        yield lambda _: None
        return
    with tqdm(total=len(tensors) if hasattr(tensors, "__len__") else None, unit="tensor") as made:
        yield made.update

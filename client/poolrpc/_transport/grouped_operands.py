"""The operands of tensors that are sent as one request: which of them fit together, and how they are joined."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate, pairwise, repeat
from typing import TYPE_CHECKING, Any

import numpy as np

from poolrpc._shapes.rules import clip
from poolrpc._transport.request import Transfer, prepare
from poolrpc._transport.result import PoolResult
from poolrpc._wire import codec
from poolrpc.chains import spatial_dims, to_channels_first
from poolrpc.errors import InvalidArgumentError, PoolError
from poolrpc.operands import check_operand_name, operand_of
from poolrpc.tensors import spec_of

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from poolrpc.chains import Chain
    from poolrpc.tensors import Array, Layout, TensorSpec


class Operands:
    """The operands of a map's tensors, in order.

    Args:
        name: The name of their keyword argument.
        values: An iterable with that of each tensor.
        chain: The layers.

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
        self._offsets = 0

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
            self._offsets += 1
        self._last = operand
        return operand

    def key_of(self, spec: TensorSpec, operand: Array, key: Hashable) -> object:
        """Return the key of the tensors that may be sent as one request with a tensor; None if it is sent alone.

        Args:
            spec: The tensor.
            operand: Its operand, the latest that was taken.
            key: The key of the tensors that may be sent with it if their operands fit.

        """
        chain, name = self._chain, self._chain[0].operand
        try:
            prepare(codec.Request(spec, (chain,), spec_of(operand, spec.layout)))
        except PoolError:
            return None
        if name == "boxes" and not _names_images(operand, images_of(spec, chain)):
            return None
        if name == "offsets" and len(chain) == 1:
            *lead, cells = to_channels_first(spec.shape, 1, spec.layout)
            return (spec.dtype, *lead) if _is_ascending(operand, cells) else None
        return spec.dtype, key, operand.dtype, self._offsets


def is_of_images(chain: Chain) -> bool:
    """Return whether the operand is that of images, whose number of channels must be known, not of planes."""
    return chain[0].operand in {"weights", "boxes"}


def images_of(spec: TensorSpec, chain: Chain) -> int:
    """Return the number of images of a tensor."""
    return spec.shape[0] if len(spec.shape) == spatial_dims((chain,)) + 2 else 1


def _names_images(boxes: Array, images: int) -> bool:
    """Return whether boxes are of a tensor's own images: others would be those of the tensors after it."""
    numbers = boxes[:, 0]
    return bool(((numbers >= 0) & (numbers < images)).all())


def _is_ascending(offsets: Array, cells: int) -> bool:
    """Return whether offsets are those of a tensor's own cells."""
    return bool(offsets[0] >= 0 and offsets[-1] <= cells and (offsets[1:] >= offsets[:-1]).all())


def joined_operand(tensors: Sequence[Array], operands: Sequence[Array], chain: Chain, spec: TensorSpec) -> Array:
    """Return the operand of tensors whose planes follow each other.

    Args:
        tensors: The tensors.
        operands: The operand of each.
        chain: The layers.
        spec: The tensor that has the planes of all of them.

    """
    first, name = operands[0], chain[0].operand
    if len(operands) == 1 or name == "offsets":  # the same for all of them
        return first
    if name == "boxes":
        images = (images_of(spec_of(each, spec.layout), chain) for each in tensors)
        moved = [each.copy() for each in operands]
        for each, start in zip(moved, accumulate(images, initial=0), strict=False):
            each[:, 0] += start
        return np.concatenate(moved)
    joined = np.concatenate([each.reshape(-1) for each in operands])
    if name == "indices":
        return joined.reshape(spec.shape)
    return joined.reshape(spec.shape[0], *first.shape[-spatial_dims((chain,)) :])


def parts_of_boxes(result: PoolResult, operands: Sequence[Array]) -> list[PoolResult]:
    """Return the part of a result that belongs to each tensor: a row for each of its boxes."""
    return [_part(result, 0, *each) for each in pairwise(accumulate(map(len, operands), initial=0))]


def follow_along_axis(tensors: Sequence[Array], operands: Sequence[Array], chain: Chain) -> bool:
    """Return whether tensors follow each other along their axis, rather than by planes that have the same offsets."""
    if chain[0].operand != "offsets":
        return False
    shape, first = tensors[0].shape, operands[0]
    same = all(each is first or np.array_equal(each, first) for each in operands)
    return not (same and all(each.shape == shape for each in tensors))


def along_axis(tensors: Sequence[Array], operands: Sequence[Array], chain: Chain, layout: Layout) -> Transfer:
    """Return the request for tensors that follow each other along their axis, with the offsets of all of them.

    The segment from the last offset of a tensor to the first one of the next tensor belongs to neither.
    """
    axis = _axis(layout)
    joined = np.concatenate(tensors, axis)
    starts = accumulate((each.shape[axis] for each in tensors), initial=0)
    operand = np.concatenate([each + start for each, start in zip(operands, starts, strict=False)])
    request = codec.Request(spec_of(joined, layout), (chain,), spec_of(operand, layout))
    return Transfer(prepare(request), [joined], (), operand)


def parts_along_axis(result: PoolResult, operands: Sequence[Array], layout: Layout) -> list[PoolResult]:
    """Return the part of the result of `along_axis` that belongs to each tensor."""
    ends = accumulate(map(len, operands), initial=0)
    return [_part(result, _axis(layout), start, end - 1) for start, end in pairwise(ends)]


def _axis(layout: Layout) -> int:
    return -1 if layout == "NCHW" else -2


def _part(result: PoolResult, axis: int, start: int, stop: int) -> PoolResult:
    """Return the part of a result from one position along an axis to another."""
    where = [slice(None)] * result.output.ndim
    where[axis] = slice(start, stop)
    output = np.ascontiguousarray(result.output[tuple(where)])
    indices = None if result.indices is None else np.ascontiguousarray(result.indices[tuple(where)])
    axis %= result.output.ndim
    shapes = tuple((*shape[:axis], stop - start, *shape[axis + 1 :]) for shape in result.shapes)
    return PoolResult(output, shapes, indices, result.transport)

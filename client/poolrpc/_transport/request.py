"""The request of a call and its tensors, before a transport is chosen."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from poolrpc._shapes.rules import check_shape, clip
from poolrpc._wire import codec, framing
from poolrpc.chains import Chain, Outputs, Planes, Shape, spatial_dims
from poolrpc.errors import InternalError, InvalidArgumentError
from poolrpc.tensors import ALIGNMENT, Array, Layout, TensorRange, TensorSpec, numpy_dtype, tensor_ranges
from poolrpc.v1 import pool_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from google.protobuf.message import Message

    from poolrpc._transport.result import Progress


class PreparedRequest:
    """A checked request and the values that depend only on it, not on the contents of its tensors.

    It is cached, because clients repeat calls with the same layers and shapes.

    Args:
        request: The request.

    Attributes:
        request: The request.
        nbytes: The size of the inputs, in bytes.
        header: The encoded PoolRequest, without its payload.
        head: The message of a unary call, up to its payload.
        results: The shapes and specs of the results.

    Raises:
        InvalidArgumentError: The layers do not fit the input or each other, or the operand does not fit the input.
        UnsupportedError: A layer does not take the dtype of the input.
        LimitExceededError: There are too many branches or layers.

    """

    def __init__(self, request: codec.Request) -> None:
        self.request = request
        self.nbytes = sum(spec.nbytes for spec in request.specs)
        self.header = codec.encode_request(request).SerializeToString()
        self.results = request.check()
        self.head = framing.message_prefix(framing.pad(self.header, self.nbytes), self.nbytes)

    @cached_property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The specs of the output tensors of all branches, in order."""
        return codec.payload_specs(self.results)

    @cached_property
    def response_header(self) -> bytes:
        """The response of a poolrpc server without its payload, which is in an arena."""
        return pool_pb2.PoolResponse(results=codec.encode_results(self.results)).SerializeToString()

    @cached_property
    def response_prefix(self) -> bytes:
        """The bytes before the payload in the response of a poolrpc server."""
        return framing.message_prefix(self.response_header, self.output_nbytes)

    @cached_property
    def output_nbytes(self) -> int:
        """The size of the outputs, in bytes."""
        return sum(spec.nbytes for spec in self.outputs)

    @cached_property
    def payload_ranges(self) -> tuple[TensorRange, ...]:
        """The ranges of the output tensors in a response's payload."""
        return tensor_ranges(self.outputs)

    @cached_property
    def arena_inputs(self) -> tuple[TensorRange, ...]:
        """The ranges of the input tensors in their part of an arena."""
        return tensor_ranges(self.request.specs, ALIGNMENT)

    @cached_property
    def arena_outputs(self) -> tuple[TensorRange, ...]:
        """The ranges of the output tensors in theirs."""
        return tensor_ranges(self.outputs, ALIGNMENT)

    @cached_property
    def spatial_dims(self) -> int:
        """The number of spatial axes of the tensors."""
        return check_shape(self.request.input.shape, spatial_dims(self.request.branches))

    @property
    def planes(self) -> Planes:
        """The planes of the input."""
        return Planes(self.request.input, self.spatial_dims)

    def check_results(self, messages: Iterable[pool_pb2.BranchResult]) -> None:
        """Check that the results a server describes are those of this request.

        Raises:
            InternalError: The results differ.

        """
        try:
            received = tuple(codec.decode_results(messages))
            if received == self.results:
                return
            description = clip([each.shapes for each in received])
        except InvalidArgumentError as error:
            description = error.message
        raise InternalError(f"expected an answer to {clip(self.request.branches)}, got {description}", reason="ANSWER")


prepare = lru_cache(4096)(PreparedRequest)


@lru_cache(4096)
def prepare_single(
    dtype: str, shape: Shape, layout: Layout, branches: tuple[Chain, ...], outputs: tuple[Outputs, ...] = ()
) -> PreparedRequest:
    """Return the prepared request of a call on one tensor."""
    return prepare(codec.Request(TensorSpec(dtype, shape, layout), branches, None, outputs))


class Transfer:
    """The tensors of one call: its input and operand, and the arrays for its outputs.

    Args:
        prepared: The request.
        arrays: The input, as as_array returns it; or several arrays whose concatenated bytes are the input.
        out: For each output tensor, in order, the array to write it to, or None; empty: all None.
        operand: The operand. None: there is none.

    Raises:
        InvalidArgumentError: An array of `out` does not fit its output tensor, or shares memory or a part of a file
            with the input, the operand or another array of `out`: some of it would be overwritten before it is read.

    """

    def __init__(
        self,
        prepared: PreparedRequest,
        arrays: Sequence[Array],
        out: Sequence[Array | None] = (),
        operand: Array | None = None,
    ) -> None:
        self.prepared = prepared
        self.arrays = arrays
        self.operand = operand
        self.out = out
        if out:
            _check_out(prepared.outputs, out)
            _check_apart(self.every, out)

    @property
    def every(self) -> Sequence[Array]:
        """The arrays whose bytes are those of the payload, in order."""
        return self.arrays if self.operand is None else [*self.arrays, self.operand]

    def report_done(self, progress: Progress | None) -> None:
        """Report that all planes are done."""
        if progress is not None:
            count = self.prepared.planes.count
            progress(count, count)


def not_an_answer(cls: type[Message]) -> InternalError:
    """Return the error for bytes that cannot be parsed as a message of that class."""
    return InternalError(f"expected a {cls.DESCRIPTOR.name}, got bytes that cannot be parsed", reason="ANSWER")


def _check_out(specs: Sequence[TensorSpec], out: Sequence[object]) -> None:
    if len(out) != len(specs):
        msg = f"expected {len(specs)} arrays, for each result an output or (output, indices), got {len(out)}"
        raise InvalidArgumentError(msg, field="out")
    for spec, array in zip(specs, out, strict=True):
        if array is None:
            continue
        if not isinstance(array, np.ndarray):
            received = clip(type(array).__name__)
        else:
            fits = array.shape == spec.shape and array.dtype == numpy_dtype(spec.dtype)
            if fits and array.flags.c_contiguous and array.flags.writeable:
                continue
            received = f"{array.dtype} {clip(array.shape)}{'' if array.flags.c_contiguous else ', strided'}"
            received += "" if array.flags.writeable else ", read-only"
        msg = f"expected a writable, C-contiguous array of {spec.dtype} {spec.shape}, got {received}"
        raise InvalidArgumentError(msg, field="out")


def _check_apart(arrays: Sequence[Array], out: Sequence[Array | None]) -> None:
    written = [array for array in out if array is not None]
    for number, array in enumerate(written):
        for kind, others in (("the input", arrays), ("the other arrays of out", written[:number])):
            # All of them are C-contiguous, so that their bounds decide.
            if any(np.may_share_memory(array, other) or _share_file(array, other) for other in others):
                msg = f"expected memory apart from {kind}, got {array.dtype} {clip(array.shape)} that shares some"
                raise InvalidArgumentError(msg, field="out")


def _share_file(a: Array, b: Array) -> bool:
    """Return whether two arrays are in separate mappings of one file, and share a part of it."""
    (file, start, end), (other, other_start, other_end) = _file_range(a), _file_range(b)
    if not file or not other or start >= other_end or other_start >= end:
        return False
    from pathlib import Path  # noqa: PLC0415 - keeps `import poolrpc` fast

    try:
        return Path(file).samefile(other)
    except OSError:  # it has been removed meanwhile
        return file == other


def _file_range(array: Array) -> tuple[str, int, int]:
    """Return the path of the file that an array, or what it is a view of, maps, and its range; "" for memory."""
    root = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    if not isinstance(root, np.memmap) or root.filename is None:
        return "", 0, 0
    start = root.offset + array.__array_interface__["data"][0] - root.__array_interface__["data"][0]
    return str(root.filename), start, start + array.nbytes

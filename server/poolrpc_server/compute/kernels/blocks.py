"""Programs: a kernel's torch calls, on blocks of planes so small that intermediate results stay in the cache."""

import sys
from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from poolrpc.tensors import ALIGNMENT, Array
from poolrpc_server.compute.kernels.windows import Windows

VIEW_BYTES = 640
"""The memory of a view of a tensor: measured, with torch 2.13."""

KEPT_BYTES = 1 << 24
"""The most memory of a chain's program that layers don't share, since its padding is filled once for all blocks."""

TARGET_BYTES = 1 << 21
"""The size of a block's input: its intermediate results fit the CPU's cache, and threads rarely wait for the GIL."""

Index = tuple[slice, ...]
Call = Callable[[int], object]
"""One torch call, on the block of a number."""

# (wide, narrow) integers by item size and stride: on a little-endian machine, converting wide to narrow keeps the first
# of each `stride` cells. torch vectorises the conversion, whereas it copies strided cells one by one.
_NARROWING: dict[tuple[int, int], tuple[torch.dtype, torch.dtype]] = {
    (1, 2): (torch.int16, torch.uint8),
    (1, 4): (torch.int32, torch.uint8),
    (1, 8): (torch.int64, torch.uint8),
    (2, 2): (torch.int32, torch.int16),
    (2, 4): (torch.int64, torch.int16),
    (4, 2): (torch.int64, torch.int32),
}


class Program:
    """The torch calls that compute the output of a layer or of a chain, the same for every block.

    Attributes:
        step: The number of planes of a full block.
        full: The number of full blocks.
        tail: The number of planes of the last block, if it is not full; else 0.
        first: The number of the first plane in the whole tensor.
        calls: The calls of the layer that is being appended, in order. Their operands are lists with one view for each
            block.

    """

    def __init__(self, planes: int, bytes_per_plane: int, shared_bytes: int = 0, first: int = 0) -> None:
        """Divide planes into blocks.

        Args:
            planes: The number of planes.
            bytes_per_plane: The size of a plane, which determines how many are in a block.
            shared_bytes: The scratch memory that the layers of a chain share. 0: a single layer has memory of its own.
            first: The number of the first plane in the whole tensor.

        """
        most = max(1, min(planes, TARGET_BYTES // max(1, bytes_per_plane)))
        # Blocks of about the same size: a last block of a few planes would cost almost as much as a full one.
        self.step = -(-planes // -(-planes // most))
        self.full, self.tail = divmod(planes, self.step)
        self.first = first
        self.calls: list[Call] = []
        self._layers = [self.calls]
        self._shared = torch.empty(shared_bytes, dtype=torch.uint8) if shared_bytes else None
        self._shared_bytes = shared_bytes
        self._begin = self._used = self._kept = 0

    @property
    def nbytes(self) -> int:
        """The scratch memory that the program keeps, in bytes, with an estimate of its views' own."""
        # A call has about two operands that no other call has.
        views = 2 * (self.full + (self.tail > 0)) * sum(map(len, self._layers))
        return self._shared_bytes + self._kept + VIEW_BYTES * views

    def begin_layers(self) -> None:
        """Keep the memory that has been allocated so far for all layers."""
        self._begin = self._used

    def begin_layer(self) -> None:
        """Append the calls that follow to a further layer."""
        self.calls = []
        self._layers.append(self.calls)

    def end_layer(self) -> None:
        """Let the next layer use the scratch memory of this one."""
        self._used = self._begin

    def allocate(self, cells: int, dtype: torch.dtype, fill: float | None = None) -> Tensor:
        """Return scratch memory, for the layer whose calls are being appended.

        Args:
            cells: The number of cells.
            dtype: Their dtype.
            fill: The value that each cell has before the layer's first call. None: any.

        """
        nbytes = cells * dtype.itemsize
        start = -(-self._used // ALIGNMENT) * ALIGNMENT
        fits = self._shared is not None and start + nbytes <= len(self._shared)
        if self._shared is None or not fits or (fill is not None and self._kept + nbytes <= KEPT_BYTES):
            self._kept += nbytes
            made = torch.empty(cells, dtype=dtype)
            return made if fill is None else made.fill_(fill)
        self._used = start + nbytes
        made = self._shared[start : self._used].view(dtype)
        if fill is not None:
            self.calls.append(lambda _: made.fill_(fill))
        return made

    def keep(self, tensor: Tensor) -> Tensor:
        """Count an operand that belongs to the program as memory that it keeps, and return it."""
        self._kept += tensor.nbytes
        return tensor

    def run(self, check: Callable[[], None] | None = None) -> None:
        """Make every call on every block; it may be run any number of times.

        Args:
            check: Called between layers and blocks; what it raises ends the run. None: nothing is called.

        """
        first, *layers = self._layers
        begun = False
        for number in range(self.full + (self.tail > 0)):
            for call in first:
                call(number)
            for calls in layers:
                if begun and check is not None:
                    check()
                begun = True
                for call in calls:
                    call(number)


class Cells:
    """The cells of a program's planes: a whole tensor, or scratch memory of one block that every block reuses."""

    def __init__(self, program: Program, tensor: Tensor, *, reused: bool = False, memory: Tensor | None = None) -> None:
        self.program, self.tensor, self.reused, self.memory = program, tensor, reused, memory
        self.shape: Sequence[int] = tensor.shape[1:]

    def at(self, index: Index = ()) -> list[Tensor]:
        """Return each block of the cells at an index of the planes' axes."""
        program = self.program
        view = self.tensor[(slice(None), *index)] if index else self.tensor
        if not self.reused:
            return list(view.unsafe_split(program.step)) if program.full + program.tail > 1 else [view]
        views = [view] * program.full
        return [*views, view[: program.tail]] if program.tail else views

    def arrays(self, dtype: torch.dtype) -> list[Array]:
        """Return each block as an array of NumPy, of another dtype; a view costs less than one of torch.

        Args:
            dtype: A dtype in which the last axis has a whole number of cells.

        """
        program = self.program
        view = self.tensor.numpy().view(np.dtype(str(dtype).removeprefix("torch.")))
        step, starts = program.step, range(program.full + (program.tail > 0))
        if not self.reused:
            return [view[step * i : step * (i + 1)] for i in starts]
        return [*[view] * program.full, *[view[: program.tail]] * (program.tail > 0)]

    def runs(self, start: int, extra: int) -> list[Tensor]:
        """Return each block as one run of memory, from its cell `start` to `extra` cells (or fewer than 0) after it."""
        program = self.program
        cells = prod(self.shape)
        flat = self.tensor.view(-1) if self.memory is None else self.memory
        if not self.reused:
            parts = flat.unsafe_split(program.step * cells)
            return [part[start : part.shape[0] + extra] for part in parts]
        views = [flat[start : program.step * cells + extra]] * program.full
        return [*views, flat[start : program.tail * cells + extra]] if program.tail else views

    def windows(self, offset: int, sizes: Sequence[int], steps: Sequence[int]) -> list[Tensor]:
        """Return each block of a strided view of each plane, which may extend into the planes after it."""
        program = self.program
        base = self.tensor if self.memory is None else self.memory
        count = program.step if self.reused else self.tensor.shape[0]
        view = base.as_strided((count, *sizes), (prod(self.shape), *steps), base.storage_offset() + offset)
        return Cells(program, view, reused=self.reused).at()


def scratch(program: Program, shape: Sequence[int], dtype: torch.dtype, fill: float | None = None) -> Cells:
    """Return memory for one block, with room for runs that end up to one plane after it; filled, or uninitialised."""
    cells = prod(shape)
    memory = program.allocate((program.step + 1) * cells, dtype, fill)
    return Cells(program, memory[: program.step * cells].view(program.step, *shape), reused=True, memory=memory)


class DoubleBuffer:
    """Scratch memory for two blocks: one is read while the other is written."""

    def __init__(self, program: Program, dtype: torch.dtype, cells: int) -> None:
        self.program = program
        self.memories = [program.allocate(cells, dtype) for _ in range(2)]

    def swap(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> Cells:
        """Return the block that was not returned last, as cells of a shape, and of another dtype if one is given."""
        self.memories.reverse()
        memory = self.memories[0] if dtype is None else self.memories[0].view(dtype)
        tensor = memory[: self.program.step * prod(shape)].view(self.program.step, *shape)
        return Cells(self.program, tensor, reused=True, memory=memory)


def padded(source: Cells, padding: Sequence[int], shape: Sequence[int], value: float, dtype: torch.dtype) -> Cells:
    """Return a copy of the source, padded with a value before each axis; the padding of the next cells follows them."""
    program = source.program
    copied = scratch(program, shape, dtype, None if list(source.shape) == list(shape) else value)
    inside = tuple(slice(p, p + size) for p, size in zip(padding, source.shape, strict=True))
    program.calls.append(copy(source.at(), copied.at(inside)))
    return copied


def padded_shape(
    spatial: Sequence[int],
    padding: Sequence[int],
    span: Sequence[int],
) -> list[int]:
    """Return the shortest axes for which windows that extend past the end read only padding; they span `span` cells."""
    return [size + max(pad, cells - pad - size) for size, pad, cells in zip(spatial, padding, span, strict=True)]


def padded_axes(plane: Sequence[int], windows: Windows, result: Sequence[int]) -> list[int]:
    """Return an upper bound of the axes of a plane's padded copy, made for windows that start in whole strides."""
    span = windows.span(tuple(result))
    axes = zip(plane, windows.padding, span, windows.stride, strict=True)
    return [max(size + pad, cells) + min(stride - 1, 8) for size, pad, cells, stride in axes]


def narrowing(item_size: int, stride: int) -> tuple[torch.dtype, torch.dtype] | None:
    """Return the (wide, narrow) dtypes whose conversion keeps the first of each `stride` cells, or None."""
    return _NARROWING.get((item_size, stride)) if sys.byteorder == "little" else None


def strided_copy(cells: Cells, out: Cells, stride: int) -> Call:
    """Return the call that copies every `stride`-th cell of the last axis, whose memory holds whole strides, to out."""
    count = out.shape[-1]
    pair = narrowing(cells.tensor.element_size(), stride)
    if pair and cells.tensor.stride(-2) % stride == 0 and cells.tensor.storage_offset() % stride == 0:
        wide, narrow = pair
        keep = (slice(None),) * (len(out.shape) - 1) + (slice(count),)
        read = Cells(cells.program, cells.tensor.view(wide), reused=cells.reused).at(keep)
        write = Cells(out.program, out.tensor.view(narrow), reused=out.reused).at()
    else:
        keep = (slice(None),) * (len(out.shape) - 1) + (slice(0, (count - 1) * stride + 1, stride),)
        read, write = cells.at(keep), out.at()
    return copy(read, write)


def copy(source: list[Tensor], out: list[Tensor]) -> Call:
    """Return the call that copies blocks."""
    return lambda i: out[i].copy_(source[i])


def maximum(one: list[Tensor], two: list[Tensor], out: list[Tensor]) -> Call:
    """Return the call that computes the maximum of two blocks, cell by cell."""
    return lambda i: torch.maximum(one[i], two[i], out=out[i])

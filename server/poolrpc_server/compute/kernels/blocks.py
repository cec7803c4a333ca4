"""Work in blocks of planes, small enough that a kernel's intermediates stay in the cache."""

import sys
from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

TARGET_BYTES = 1 << 21
"""Of a block's input: its intermediates stay in the cache, and threads meet at the interpreter's lock seldom."""

Index = tuple[slice, ...]
Call = Callable[[int], object]

# (wide, narrow) integers by item size and stride: converting wide to narrow keeps the first of each `stride` cells on a
# little-endian machine, and torch vectorises the conversion while it copies strided cells one by one.
_NARROWING: dict[tuple[int, int], tuple[torch.dtype, torch.dtype]] = {
    (1, 2): (torch.int16, torch.uint8),
    (1, 4): (torch.int32, torch.uint8),
    (1, 8): (torch.int64, torch.uint8),
    (2, 2): (torch.int32, torch.int16),
    (2, 4): (torch.int64, torch.int16),
    (4, 2): (torch.int64, torch.int32),
}


class Program:
    """The torch calls of one kernel call, the same for every block; operands are lists with one view for each block."""

    def __init__(self, planes: int, bytes_per_plane: int) -> None:
        self.step = max(1, min(planes, TARGET_BYTES // max(1, bytes_per_plane)))
        self.full, self.tail = divmod(planes, self.step)
        self.calls: list[Call] = []

    def run(self) -> None:
        """Make every call on every block."""
        calls = self.calls
        for number in range(self.full + (self.tail > 0)):
            for call in calls:
                call(number)


class Cells:
    """Planes of cells in blocks: the caller's tensor, or one block of scratch memory that every block reuses."""

    def __init__(self, program: Program, tensor: Tensor, *, reused: bool, memory: Tensor | None = None) -> None:
        self.program, self.tensor, self.reused, self.memory = program, tensor, reused, memory
        self.shape: Sequence[int] = tensor.shape[1:]

    def at(self, index: Index = ()) -> list[Tensor]:
        """The blocks of the cells at an index of the planes' own axes."""
        program = self.program
        view = self.tensor[(slice(None), *index)] if index else self.tensor
        if not self.reused:
            return list(view.unsafe_split(program.step)) if program.full + program.tail > 1 else [view]
        views = [view] * program.full
        return [*views, view[: program.tail]] if program.tail else views

    def runs(self, start: int, extra: int) -> list[Tensor]:
        """Each block as one run of memory from its cell `start` to `extra` cells (perhaps below 0) after its end."""
        program = self.program
        cells = prod(self.shape)
        flat = self.tensor.view(-1) if self.memory is None else self.memory
        if not self.reused:
            parts = flat.unsafe_split(program.step * cells)
            return [part[start : part.shape[0] + extra] for part in parts]
        views = [flat[start : program.step * cells + extra]] * program.full
        return [*views, flat[start : program.tail * cells + extra]] if program.tail else views

    def windows(self, offset: int, sizes: Sequence[int], steps: Sequence[int]) -> list[Tensor]:
        """The blocks of a strided view of each plane, which may read on into the planes after it."""
        program = self.program
        base = self.tensor if self.memory is None else self.memory
        count = program.step if self.reused else self.tensor.shape[0]
        view = base.as_strided((count, *sizes), (prod(self.shape), *steps), base.storage_offset() + offset)
        return Cells(program, view, reused=self.reused).at()


def scratch(program: Program, like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Cells:
    """Uninitialised memory for one block, with room for runs that end up to one plane after it."""
    cells = prod(shape)
    memory = like.new_empty((program.step + 1) * cells, dtype=dtype)
    return Cells(program, memory[: program.step * cells].view(program.step, *shape), reused=True, memory=memory)


class Turns:
    """Two blocks of scratch memory that take turns: what is read, and what is written from it."""

    def __init__(self, like: Cells, cells: int) -> None:
        self.program = like.program
        self.spare = [like.tensor.new_empty(cells) for _ in range(2)]

    def take(self, shape: Sequence[int]) -> Cells:
        """Give the other block, as cells of that shape."""
        self.spare.reverse()
        memory = self.spare[0]
        tensor = memory[: self.program.step * prod(shape)].view(self.program.step, *shape)
        return Cells(self.program, tensor, reused=True, memory=memory)


def padded(source: Cells, padding: Sequence[int], shape: Sequence[int], value: float, dtype: torch.dtype) -> Cells:
    """A copy of the source with a value before each axis's cells; what follows them is the next cells' padding."""
    program = source.program
    copy = scratch(program, source.tensor, shape, dtype)
    if list(source.shape) != list(shape) and copy.memory is not None:
        copy.memory.fill_(value)
    read = source.at()
    write = copy.at(tuple(slice(p, p + size) for p, size in zip(padding, source.shape, strict=True)))
    program.calls.append(lambda i: write[i].copy_(read[i]))
    return copy


def padded_shape(
    spatial: Sequence[int],
    padding: Sequence[int],
    needs: Sequence[int],
) -> list[int]:
    """The least axes on which windows that reach past the end find only padding, `needs` being the cells they span."""
    return [size + max(pad, need - pad - size) for size, pad, need in zip(spatial, padding, needs, strict=True)]


def narrowing(item_size: int, stride: int) -> tuple[torch.dtype, torch.dtype] | None:
    """The conversion that keeps the first of each `stride` cells, if there is one."""
    return _NARROWING.get((item_size, stride)) if sys.byteorder == "little" else None


def every(cells: Cells, out: Cells, stride: int) -> Call:
    """Give the call that copies every `stride`-th cell of the last axis, whose memory holds whole strides, to out."""
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
    return lambda i: write[i].copy_(read[i])

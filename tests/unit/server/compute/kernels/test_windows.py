"""The windows of a layer."""

from itertools import product
from math import prod

import torch

from poolrpc import MaxPool2d
from poolrpc_server.compute.kernels.cost import Case
from poolrpc_server.compute.kernels.windows import Windows, reading_windows


def test_channels_that_are_last_are_windows_of_their_own():
    """With channels last, the windows have one more axis, of which each cell is a window."""
    windows = Windows.of(MaxPool2d(3, 2, 1, 2).geometry()).with_channels()
    assert windows == Windows((3, 3, 1), (2, 2, 1), (1, 1, 0), (2, 2, 1))
    assert Case(torch.float32, 2, (4, 4, 3), (2, 2, 3), windows).cells == prod((2, 4, 4, 3))


def test_the_windows_that_read_a_cell_inside_of_an_axis():
    """The range has exactly the windows whose cell at the offset is inside of the axis."""
    for offset, stride, size, count in product(range(-4, 5), range(1, 4), range(1, 6), range(1, 6)):
        inside = [i for i in range(count) if 0 <= i * stride + offset < size]
        first, last = reading_windows(offset, stride, size, count)
        assert list(range(first, last)) == inside


def test_the_windows_of_an_adaptive_layer():
    """They have one size if each axis is a multiple of its windows, and are None otherwise."""
    assert Windows.dividing((6, 4), (3, 2)) == Windows.tiling((2, 2))
    assert Windows.dividing((6, 5), (3, 2)) is None


def test_the_span_of_windows():
    """Two windows of three cells, two apart, with a stride of two, span seven cells."""
    assert Windows((3,), (2,), (0,), (2,)).span((2,)) == (7,)

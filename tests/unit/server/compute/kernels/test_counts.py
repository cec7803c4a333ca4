"""The numbers of cells of windows, by which sums are divided."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from poolrpc_server.compute.kernels.counts import CACHED_CELLS, AxisCounts, divisor
from poolrpc_server.compute.kernels.windows import Windows


@given(
    size=st.integers(1, 30),
    kernel=st.integers(1, 6),
    stride=st.integers(1, 4),
    before=st.integers(0, 5),
    after=st.integers(0, 5),
    dilation=st.integers(1, 3),
    length=st.integers(1, 20),
    include_pad=st.booleans(),
)
def test_the_cells_of_each_window_are_counted(**axis):
    """Each number is that of the positions that the window sees within the input, or within its padding too."""
    counts = AxisCounts(**axis)
    low, high = (-axis["before"], axis["size"] + axis["after"]) if axis["include_pad"] else (0, axis["size"])
    expected = []
    for window in range(axis["length"]):
        start = window * axis["stride"] - axis["before"]
        seen = [start + cell * axis["dilation"] for cell in range(axis["kernel"])]
        expected.append(sum(low <= position < high for position in seen))
    assert counts.all().tolist() == expected
    assert counts.first() == expected[0]
    if axis["dilation"] > 1:
        assert counts.uniform() == (len(set(expected)) == 1)


def test_only_small_divisors_are_kept():
    """A divisor of as many cells as a large plane is made for each request, since nothing would count its memory."""
    windows = Windows((3,), (1,), (1,), (1,))
    for cells, kept in ((CACHED_CELLS, True), (CACHED_CELLS + 1, False)):
        made = [divisor((cells,), windows, (cells,), include_pad=False) for _ in range(2)]
        assert torch.equal(*made)
        assert (made[0] is made[1]) == kept

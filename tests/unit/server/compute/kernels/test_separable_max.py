"""The passes of the separable max."""

from poolrpc_server.compute.kernels.separable_max import axis_passes, run_shifts


def test_passes_grow_with_the_logarithm_of_the_kernel():
    """A window of 63 cells is joined from others in six passes, with any stride."""
    assert run_shifts(63, 1) == (1, 2, 4, 8, 16, 31)
    assert sum(len(each.offsets) - 1 for each in axis_passes(63, 1, 31, 1, 256)) == 6
    assert len(axis_passes(3, 2, 1, 1, 56)) == 1

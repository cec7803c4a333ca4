"""Programs divide planes into blocks."""

from poolrpc_server.compute.kernels.blocks import TARGET_BYTES, Program


def test_blocks_cover_the_planes():
    """The blocks of a program cover all planes, and none is empty."""
    for planes in (1, 7, 100):
        for size in (0, 1, TARGET_BYTES // 3, TARGET_BYTES * 5):
            program = Program(planes, size)
            assert program.step * program.full + program.tail == planes
            assert program.step >= 1
            assert program.tail < program.step

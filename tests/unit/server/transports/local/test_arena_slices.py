"""Parts of an arena: those inside are returned, and all others are rejected with their field."""

import mmap

import pytest

from poolrpc.errors import InvalidArgumentError
from poolrpc_server.transports.local.arenas import Arena

SIZE = 8192
INSIDE = [(0, SIZE), (0, 0), (64, SIZE - 64), (SIZE - 64, 64), (SIZE, 0)]
OUTSIDE = {
    "one byte beyond the end": ((64, SIZE - 63), "length"),
    "one byte too long": ((0, SIZE + 1), "length"),
    "one byte at the end": ((SIZE, 1), "length"),
    "starts after the end": ((SIZE + 64, 0), "offset"),
    "sum overflows 64 bits": ((2**64 - 64, 64), "offset"),
    "sum overflows to the inside": ((64, 2**64 - 64), "length"),
    "misaligned and sum overflows": ((2**64 - 32, 32), "offset"),
    "misaligned": ((1, 1), "offset"),
    "aligned to 32 bytes only": ((32, 64), "offset"),
    "negative offset": ((-64, 64), "offset"),
    "negative length": ((64, -1), "length"),
}


@pytest.mark.parametrize("part", INSIDE)
def test_part_inside_the_arena_is_returned(part):
    """Every aligned part up to the end of the arena is returned, empty ones too."""
    assert len(Arena(mmap.mmap(-1, SIZE)).slice(part, "arena.input")) == part[1]


@pytest.mark.parametrize(("part", "field"), OUTSIDE.values(), ids=OUTSIDE)
def test_part_outside_the_arena_is_rejected(part, field):
    """A part that is misaligned or not within the arena is rejected with the path of its field."""
    with pytest.raises(InvalidArgumentError, match=r"expected .*, got -?\d+$") as caught:
        Arena(mmap.mmap(-1, SIZE)).slice(part, "arena.input")
    assert [violation.field for violation in caught.value.violations] == [f"arena.input.{field}"]

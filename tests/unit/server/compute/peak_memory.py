"""The peak memory of executions, for test_scratch.py: cases on stdin, (peak, bound) of each on stdout, all as JSON.

It is a program of its own, so that memory that others have freed doesn't hide what an execution takes.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from poolrpc._wire.codec import Request
from poolrpc.chains import spatial_dims
from poolrpc.expression import parse_branches
from poolrpc.tensors import TensorSpec
from poolrpc_server.compute.engine import Engine
from tests.operand_bytes import operand_for


def memory(name: str) -> int:
    """Return an amount of memory of this process in bytes, by its name in /proc."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class Slots:
    """Slots that are always free."""

    def borrow(self, count: int) -> int:
        """Return as many as are wanted."""
        return count

    def release(self, slots: int) -> None:
        """Take them back."""


def measure(  # noqa: PLR0913 - a case
    engine: Engine,
    layers: str,
    dtype: str,
    shape: list[int],
    layout: Any,
    *,
    every_step: bool = False,
    weights: bool = False,
) -> tuple[int, int]:
    """Return what an execution takes in addition to inputs and outputs, and what its schedule says that it takes."""
    branches = parse_branches(layers)
    spec = TensorSpec(dtype, tuple(shape), layout)
    operand, contents = operand_for(branches, spec.shape, layout, optional=weights)
    outputs = tuple(tuple(range(len(chain))) for chain in branches) if every_step else ()
    request = Request(spec, branches, operand, outputs)
    results = request.results()
    schedule = engine.schedule(request, spatial_dims(branches), results)
    # Neither NaN nor equal cells, and not aligned.
    cells = np.tile(np.frombuffer(np.arange(1, 101, dtype=np.float16), np.uint8), -(-spec.nbytes // 200))
    payload = memoryview(b"".join((b"-", cells[: spec.nbytes].tobytes(), contents)))[1:]
    del cells
    engine.drop_idle()
    ctypes.CDLL(None).malloc_trim(0)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts again from here
    engine.execute([engine.run(schedule, payload, lambda _: None)])
    return memory("VmHWM") - before - sum(output.nbytes for output in schedule.outputs), schedule.scratch_bytes


def main() -> None:
    """Measure every case."""
    engine = Engine("cpu", 2)
    engine.slots = Slots()
    measure(engine, "[MaxPool2d(2), LPPool2d(3.5, 2)]", "float32", [64, 64, 64, 64], "NCHW")  # what is made only once
    print(  # noqa: T201 - its result
        json.dumps(
            [
                measure(engine, *case[:4], every_step="steps" in case[4:], weights="weights" in case[4:])
                for case in json.load(sys.stdin)
            ]
        )
    )
    engine.close()


if __name__ == "__main__":
    main()

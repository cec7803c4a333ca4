"""Scratch memory: an execution takes at most what its schedule says, for every layer, dtype and layout."""

import json
import os
import subprocess
import sys
from itertools import product

import pytest

from poolrpc.expression import parse_chain

SLACK = 8 * 2**20
"""Bytes of views of tensors, of Python's objects, and of what the C library rounds up."""

SMALL_PLANES = {1: (1024, 3000), 2: (1024, 61, 50), 3: (1024, 8, 17, 23)}
LARGE_PLANES = {1: (2, 2**20), 2: (2, 1025, 1030), 3: (2, 50, 140, 150)}
LAYERS = {
    "MaxPool": (
        "2",
        "3, stride=1, padding=1",
        "3, stride=2, padding=1, return_indices=True",
        "2, dilation=3",
        "4, 3, 3",
    ),
    "AvgPool": ("2", "3, stride=1, padding=1", "5, stride=2, count_include_pad=False, padding=2", "4, 1, 'same'"),
    "LPPool": ("1.7, 2", "2.0, 3, stride=1", "float('inf'), 2, stride=1", "3.5, 3, stride=1"),
    "AdaptiveMaxPool": ("7", "40", "1, return_indices=True", "13, return_indices=True"),
    "AdaptiveAvgPool": ("7", "1", "40"),
    "FractionalMaxPool": ("2, output_ratio=0.7", "2, output_size=3, return_indices=True"),
    "MaxUnpool": ("1",),
    "GlobalPool": ("'median'", "'std'", "Norm(3)", "Softmax()"),
    "Pool": (
        "'median', 3, stride=1",
        "'var', 2",
        "PowerMean(3), 3, stride=1, padding='same'",
        "Softmax(), 5, stride=2",
    ),
}
CHAINS = (
    "[MaxPool2d(3, stride=1, padding=1), AvgPool2d(3, stride=1, padding=1), LPPool2d(1.7, 2, stride=1)]",
    "[LPPool2d(2.0, 2, stride=1), MaxPool2d(2, stride=1), MaxPool2d(5, stride=1, padding=2, return_indices=True)]",
    "[[AvgPool2d(2)], [MaxPool2d(2), AdaptiveMaxPool2d(5)], [FractionalMaxPool2d(2, output_ratio=0.9)]]",
    "[ToDtype('int64'), MaxPool2d(3, stride=1, padding=1), ToDtype('uint16', scale=True), MaxPool2d(2, stride=1)]",
    "[Round(), Normalize(0.5, 0.25), ToDtype('uint16'), MaxPool2d(3, stride=1, padding=1, return_indices=True)]",
    "[Pool2d(Softmax(), 3, padding='same'), MaxPool2d(4, 1, 'same', return_indices=True)]",
    "[[Pool2d('median', 3, stride=2)], [GlobalPool2d(LogSumExp())]]",
    repr(list(parse_chain("[MaxPool2d(3, stride=1, padding=1), AvgPool2d(3, stride=1, padding=1)]") * 12)),
)
OPERANDS = (
    ("SegmentPool('max')", (1, 512, 3001), ""),
    ("SegmentPool('mean')", (1, 1, 2**21), ""),
    ("GlobalPool2d('max')", (4, 128, 61, 50), "weights"),
    ("GlobalPool1d('mean')", (2, 1, 2**21), "weights"),
    ("[GlobalPool1d('mean')]", (64, 16, 3001), "weights"),
    ("RoIAlign(7)", (2, 256, 61, 50), ""),
    ("RoIPool(7)", (2, 256, 61, 50), ""),
    ("[RoIAlign(14, aligned=True), MaxPool2d(2)]", (1, 64, 200, 304), ""),
)
STEPS = "[MaxPool2d(3, stride=1, padding=1, return_indices=True), AvgPool2d(5, stride=1), AvgPool2d(5, stride=1)]"
HUGE = (
    ("FractionalMaxPool2d(1, output_size=1)", "float16", (1, 2**22, 1, 2), "NCHW"),
    ("LPPool2d(1.7, 2)", "float64", (1, 2**20, 2, 2), "NCHW"),
    ("MaxPool2d(1, stride=1)", "uint8", (1, 1, 4096, 4096), "NCHW"),
    ("MaxPool2d(3, stride=1, padding=1)", "uint8", (1, 4096, 4096, 3), "NHWC"),
    ("MaxPool2d(3, stride=1, return_indices=True)", "uint8", (1, 2, 4096, 2048), "NCHW"),
    ("[ToDtype('float64', scale=True), MaxPool2d(1)]", "uint8", (1, 1, 4096, 4096), "NCHW"),
    ("[ToDtype('int64'), MaxPool2d(1)]", "float32", (1, 1, 2048, 2048), "NCHW"),
    ("[ToDtype('float32'), AvgPool2d(2), Round(), ToDtype('uint16')]", "uint16", (1, 2, 2048, 2048), "NCHW"),
    ("MaxPool2d(3, stride=1, padding=1)", "uint16", (1, 2048, 2048, 3), "NHWC"),
    ("MaxUnpool2d(1)", "uint8", (1, 1, 4096, 4096), "NCHW"),
    ("AdaptiveMaxPool2d((4096, 1))", "float32", (1, 1, 1, 2**20), "NCHW"),
    ("MaxPool2d((1, 65535), stride=1, padding=(0, 32767))", "float32", (1, 1, 2**16, 1), "NCHW"),
    ("Pool2d('median', 5, stride=1)", "float64", (1, 1, 1024, 1024), "NCHW"),
    ("Pool2d(Softmax(), 2)", "float16", (1, 1, 4096, 4096), "NCHW"),
    ("Pool2d('std', 1000, stride=1000)", "float16", (1, 1, 4096, 4096), "NCHW"),
    ("BlurPool2d()", "float16", (1, 1, 4096, 4096), "NCHW"),
    ("BlurPool2d(5, 1)", "float32", (1, 2048, 2048, 2), "NHWC"),
    ("GlobalPool2d(PowerMean(3))", "float16", (1, 1, 4096, 4096), "NCHW"),
    ("AvgPool2d(2, padding='same')", "float16", (1, 1, 4097, 4096), "NCHW"),
    ("MaxPool2d(3, 2, 'same', return_indices=True)", "float64", (1, 1, 4096, 4096), "NCHW"),
    ("AvgPool2d((1001, 1), stride=1, padding=(500, 0))", "float32", (1, 1, 1, 2**14), "NCHW"),
)


def grid(planes, dtypes):
    """Return the case of every layer with planes of a size, each of some dtypes, and in both layouts."""
    cases = []
    for (family, parameters), (dims, shape) in product(LAYERS.items(), planes.items()):
        if family == "FractionalMaxPool" and dims == 1:
            continue
        for text in parameters:
            layer = f"{family}{dims}d({text})".replace("float('inf')", "inf")
            for dtype in dtypes if "Pool" in family else ():
                if dtype not in parse_chain(layer)[0].dtypes:
                    continue
                cases += [
                    (layer, dtype, (1, *shape), "NCHW"),
                    (layer, dtype, (shape[0] // 16 or 1, *shape[1:], min(16, shape[0])), "NHWC"),
                ]
    return cases


def assert_bounded(cases):
    """Measure cases in another process, and compare their peaks with their schedules' bounds."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.server.compute.peak_memory"],
        input=json.dumps(cases),
        env={**os.environ, "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"},  # freed memory is returned at once
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert len(measured) == len(cases)
    assert not [
        (case, peak, bound) for case, (peak, bound) in zip(cases, measured, strict=True) if peak > bound + SLACK
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are measured by /proc")
def test_large_planes_take_what_their_schedules_say():
    """Operators that need far more than their input, on planes that can't be cut and on very many of two cells."""
    assert_bounded(HUGE)


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are measured by /proc")
def test_chains_and_branches_take_what_their_schedules_say():
    """The layers of a chain share scratch memory; branches are computed one after the other."""
    shapes = [((1, 512, 61, 50), "NCHW"), ((1, 1, 1025, 1030), "NCHW"), ((32, 61, 50, 16), "NHWC")]
    cases = [(chain, dtype, *shape) for chain in CHAINS for dtype in ("float16", "float64") for shape in shapes]
    # Outputs of steps need no buffers, but those that torch's operators allocate for a whole tensor stay there.
    cases += [(chain, "float64", *shape, "steps") for chain in (CHAINS[0], STEPS) for shape in shapes]
    assert_bounded(cases)


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are measured by /proc")
def test_layers_with_operands_take_what_their_schedules_say():
    """Segments, weights and boxes, for floats of two sizes, in both layouts."""
    cases = [
        (
            layer,
            dtype,
            shape if layout == "NCHW" else (shape[0], *shape[2:], shape[1]),
            layout,
            *([given] * bool(given)),
        )
        for layer, shape, given in OPERANDS
        for dtype in ("bfloat16", "float64")
        for layout in ("NCHW", "NHWC")
    ]
    assert_bounded(cases)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are measured by /proc")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "uint8", "int16", "int32", "int64"])
@pytest.mark.parametrize("planes", [SMALL_PLANES, LARGE_PLANES], ids=["small planes", "large planes"])
def test_every_layer_takes_what_its_schedule_says(planes, dtype):
    """Each layer, dtype, rank and layout, on many planes and on a few large ones."""
    assert_bounded(grid(planes, [dtype]))

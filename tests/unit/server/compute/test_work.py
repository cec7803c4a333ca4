"""The work of a request: an estimate of the time that it takes, which no request exceeds fourfold.

Times are CPU times of this thread, compared with those of a max pooling that is computed alternately, so that neither
the machine's speed nor what else it does counts. What counts is the processor: with other vector instructions, some
layers are faster compared with that max pooling, so an estimate may be further above the time than below it.
"""

import time

import numpy as np
import pytest
import torch

from poolrpc._wire.codec import Request
from poolrpc.expression import parse_chain
from poolrpc.tensors import TensorSpec
from poolrpc_server.calls.validate import Limits, check_request
from poolrpc_server.compute.engine import Engine
from tests.operand_bytes import operand_for

LIMITS = Limits(2**30, 2**30, 2**10, 2**40)
UNDER, OVER = 4, 8
"""How many times too small and too large an estimate may be: what is admitted takes no longer than it may, and what is
rejected is not by far within the limit."""

ROUNDS = 6
REFERENCE = ("MaxPool2d(3, stride=2, padding=1)", "float32", (1, 64, 112, 112), "NCHW")
SHAPES = {1: [(1, 128, 3000)], 2: [(1, 128, 56, 56), (1, 6000, 7, 7)], 3: [(1, 64, 8, 28, 28)]}
LAYERS = {
    "MaxPool": ("2", "3, stride=1, padding=1", "2, return_indices=True", "5, stride=1, return_indices=True"),
    "AvgPool": ("2", "3, stride=1, padding=1", "3, stride=2, padding=1, count_include_pad=False"),
    "LPPool": ("1.7, 2", "1.7, 3, stride=1", "2.0, 3, stride=2", "inf, 2", "0.5, 2, stride=1"),
    "AdaptiveMaxPool": ("7", "3", "5, return_indices=True"),
    "AdaptiveAvgPool": ("7", "1", "5"),
    "FractionalMaxPool": ("2, output_ratio=0.5", "2, output_size=2, return_indices=True"),
    "MaxUnpool": ("2",),
    "GlobalPool": ("'max'", "'mean'", "'std'", "Norm(3)", "'median'", "Softmax()"),
    "Pool": (
        "'std', 3, stride=2, padding='same'",
        "Norm(3), 2",
        "'median', 3, stride=1",
        "Softmax(), 2",
        "'min', 3, 2",
    ),
}


@pytest.fixture(scope="module")
def engine():
    """An engine of one thread."""
    made = Engine("cpu", 1)
    yield made
    made.close()


def a_run(engine, layer, dtype, shape, layout, *, weights=False):  # noqa: PLR0913 - a case
    """Return a run of a layer on random cells, and its estimated seconds."""
    plane_cells = np.prod(shape[2:])
    if layout == "NHWC":
        shape = (4, *shape[2:], shape[1] // 4)
    spec = TensorSpec(dtype, shape, layout)
    chain = parse_chain(layer)
    operand, contents = operand_for([chain], shape, layout, optional=weights)
    schedule = check_request(Request(spec, (chain,), operand), LIMITS, engine.schedule).schedule
    cells = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 40).abs().to(getattr(torch, dtype))
    payload = cells.view(torch.uint8).numpy().tobytes()
    if chain[0].operand == "indices":
        contents = np.random.default_rng(0).integers(0, plane_cells, shape).tobytes()
    payload += contents
    return engine.run(schedule, payload, len), schedule.seconds


def seconds(engine, run):
    """Return the CPU time of an execution."""
    started = time.thread_time()
    engine.execute([run])
    return time.thread_time() - started


def factor(engine, *case):
    """Return how many times too large the estimate for a case is, compared with that for the reference."""
    (reference, expected), (run, estimated) = a_run(engine, *REFERENCE), a_run(engine, *case[:4], weights=len(case) > 4)
    times = [(seconds(engine, reference), seconds(engine, run)) for _ in range(ROUNDS)]
    one, other = (min(each) for each in zip(*times, strict=True))
    return estimated / expected * one / other


def grid(dtypes, layouts, parameters=slice(None)):
    """Yield a case for every layer, rank, shape, dtype and layout."""
    for dims, shapes in SHAPES.items():
        for layer in (f"{family}{dims}d({each})" for family in LAYERS for each in LAYERS[family][parameters]):
            if layer.startswith("FractionalMaxPool1d"):
                continue
            supported = parse_chain(layer)[0].dtypes
            for dtype in dtypes:
                yield from (
                    (layer, dtype, shape, layout) for shape in shapes for layout in layouts if dtype in supported
                )


def assert_close(engine, cases):
    """Compare the estimates of cases with measurements; one that is disturbed is measured again."""
    wrong = []
    for case in cases:
        found = [factor(engine, *case)]
        while len(found) < 3 and not 1 / UNDER <= found[-1] <= OVER:
            found.append(factor(engine, *case))
        if not 1 / UNDER <= found[-1] <= OVER:
            wrong.append((case, [round(each, 2) for each in found]))
    assert not wrong


def test_every_family_is_estimated_closely(engine):
    """Every family and rank, by kernels and by torch's operators, with float32 cells in both layouts."""
    assert_close(engine, grid(["float32"], ["NCHW", "NHWC"], slice(2)))


def test_layers_with_operands_are_estimated_closely(engine):
    """Segments, and planes with weights, of floats of two sizes, in both layouts."""
    layers = [
        ("SegmentPool('max')",),
        ("SegmentPool('mean')",),
        ("GlobalPool1d('max')", "w"),
        ("GlobalPool1d('mean')", "w"),
    ]
    assert_close(
        engine,
        [
            (layer, dtype, (4, 256, 3000), layout, *weights)
            for layer, *weights in layers
            for dtype in ("float32", "bfloat16")
            for layout in ("NCHW", "NHWC")
        ],
    )


def test_steps_are_estimated_closely(engine):
    """Every element-wise step, maxima of uint16, means and unpooling of integers, in both layouts."""
    numbers = "(0.485, 0.456, 0.406, 0.5), (0.229, 0.224, 0.225, 0.5)"
    chains = [
        ("[ToDtype('float32'), MaxPool2d(1)]", "uint8"),
        ("[ToDtype('float32', scale=True), MaxPool2d(1)]", "uint16"),
        ("[ToDtype('uint8'), MaxPool2d(1)]", "float32"),
        ("[ToDtype('int64'), MaxPool2d(1)]", "float32"),
        ("[ToDtype('int32', scale=True), MaxPool2d(1)]", "uint16"),
        ("[Normalize(0.5, 0.25), MaxPool2d(1)]", "float32"),
        (f"[ToDtype('float32', scale=True), Normalize({numbers}), AvgPool2d(2), Round()]", "uint8"),
        *(
            (f"[ToDtype('float32'), AvgPool2d(2), Round(), ToDtype('{dtype}')]", dtype)
            for dtype in ("uint8", "uint16", "int16")
        ),
        ("MaxPool2d(3, stride=1, padding=1)", "uint16"),
        ("MaxPool2d(2, return_indices=True)", "uint16"),
        ("GlobalPool2d('max')", "uint16"),
        ("AvgPool2d(2)", "int64"),
        ("MaxUnpool2d(2)", "uint8"),
    ]
    shapes = {"NCHW": (1, 128, 56, 56), "NHWC": (1, 128, 56, 56)}
    of_four_channels = {"NCHW": (32, 4, 56, 56), "NHWC": (1, 16, 56, 56)}
    cases = [
        (text, dtype, shape, layout)
        for text, dtype in chains
        for layout, shape in (of_four_channels if numbers in text else shapes).items()
    ]
    assert_close(engine, cases)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64"]
)
def test_every_dtype_is_estimated_closely(engine, dtype, layout):
    """The same for every dtype and more parameters."""
    assert_close(engine, grid([dtype], [layout]))


def test_the_worst_chains_are_over_the_default_budget(engine):
    """General norms in long chains and many branches, which would take 100 s, are more work than the budget allows."""
    chain = parse_chain("LPPool2d(1.7, 2, stride=1)") * 64
    request = Request(TensorSpec("float32", (1, 8, 512, 512)), (chain,) * 64)
    schedule = check_request(request, LIMITS, engine.schedule).schedule
    assert schedule.work > 10 * 4_000_000_000

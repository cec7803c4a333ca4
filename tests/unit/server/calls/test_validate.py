"""Validation: torch can run every request that passes, and each limit is exact to one byte or one cell."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poolrpc import (
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveMaxPool2d,
    AvgPool2d,
    AvgPool3d,
    FractionalMaxPool2d,
    GlobalPool2d,
    GlobalPool3d,
    InvalidArgumentError,
    LimitExceededError,
    LPPool2d,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
    MaxUnpool2d,
    UnsupportedError,
)
from poolrpc._shapes.limits import MAX_NUMEL
from poolrpc._wire.codec import Request
from poolrpc.chains import from_channels_first
from poolrpc.tensors import ITEM_BYTES, TensorSpec
from poolrpc_server.calls.validate import FREE_OUTPUT_BYTES, Limits, check_request, check_shapes, check_stream
from poolrpc_server.compute.engine import Engine
from tests.unit.server.calls.eager_schedule import EagerSchedule
from tests.unit.strategies import CLASSES, classes, layers, parameters, shapes

LIMITS = Limits(input_bytes=2**20, output_bytes=2**20, output_growth=64, work=10**6)
WIDE = Limits(input_bytes=2**60, output_bytes=2**60, output_growth=2**60, work=2**60)


@pytest.fixture(scope="module")
def engine():
    """Return an engine with one thread on the CPU."""
    made = Engine("cpu", 1)
    yield made
    made.close()


def run(engine, checked, payload):
    """Run a request and return copies of its outputs' bytes."""
    return engine.execute([engine.run(checked.schedule, payload, lambda outputs: [bytes(each) for each in outputs])])[0]


@st.composite
def any_layers(draw, dims):
    """Draw a layer that usually fits a small plane, or None if its parameters are invalid."""
    cls = draw(st.sampled_from(classes(dims)))
    if draw(st.integers(0, 9)):
        return draw(layers([cls], most=2, most_output=6))
    try:
        return cls(**draw(parameters(cls)))
    except InvalidArgumentError:
        return None


@st.composite
def requests(draw):
    """Draw a request and its payload, usually a valid one, of any layer, dtype and layout."""
    dims, layout = draw(st.integers(1, 3)), draw(st.sampled_from(["NCHW", "NHWC"]))
    chain = st.lists(any_layers(dims).filter(bool), min_size=1, max_size=draw(st.integers(1, 3))).map(tuple)
    branches = tuple(draw(st.lists(chain, min_size=1, max_size=2)))
    shape = draw(shapes(dims, most=9, zeros=draw(st.integers(0, 9)) == 0))
    common = [dtype for dtype in ITEM_BYTES if all(dtype in layer.dtypes for chain in branches for layer in chain)]
    dtype = draw(st.sampled_from(common) if draw(st.integers(0, 9)) else st.sampled_from(list(ITEM_BYTES)))
    spec = TensorSpec(dtype, from_channels_first(shape, dims, layout) if len(shape) > dims else shape, layout)
    payload = np.random.default_rng(draw(st.integers(0, 2**32))).bytes(spec.nbytes)
    operand = None
    names = {chain[0].operand for chain in branches if not chain[0].operand_optional or draw(st.booleans())} - {""}
    if bool(names) ^ (draw(st.integers(0, 19)) == 0):
        array = draw(operands(draw(st.sampled_from(sorted(names) or ["indices"])), spec, dims))
        operand = TensorSpec(draw(st.sampled_from([array.dtype.name] * 9 + ["int32"])), array.shape, layout)
        with np.errstate(invalid="ignore"):  # NaN as int32
            payload += array.astype(operand.dtype).tobytes()
    cut = draw(st.sampled_from([0] * 19 + [1]))
    return Request(spec, branches, operand), payload[: len(payload) - cut]


@st.composite
def operands(draw, name, spec, dims):
    """Draw an operand for an input, mostly with valid values and of the right shape."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    plane = spec.shape[-dims - 1 : -1] if spec.layout == "NHWC" else spec.shape[-dims:]
    lead = spec.shape[: len(spec.shape) - dims - 1]
    if name == "weights":
        return random.choice([0, 1, 0.5, draw(st.sampled_from([2, 2, 2, -1, np.nan]))], (*lead, *plane)).astype(
            np.float32
        )
    if name == "offsets":
        offsets = random.integers(0, plane[0] + draw(st.sampled_from([1, 1, 1, 3])), draw(st.integers(0, 5)))
        return offsets if draw(st.integers(0, 4)) == 0 else np.sort(offsets)
    if name == "boxes":
        images = lead[0] if lead else 1
        boxes = random.uniform(-2, 9, (draw(st.integers(0, 4)), draw(st.sampled_from([5] * 9 + [4]))))
        boxes[:, 0] = random.integers(0, images + draw(st.sampled_from([0, 0, 0, 1])) or 1, len(boxes))
        return boxes.astype(np.float32)
    return random.integers(0, draw(st.sampled_from([1, 1, 4, 30])), spec.shape)


def test_torch_runs_every_request_that_passes(engine):
    """A request that passes yields outputs of the predicted sizes; any other raises one of our errors."""
    counts = {"passed": 0, "rejected": 0}
    families = set()

    @given(requests())
    @settings(max_examples=4 * settings.default.max_examples)
    def holds(case):
        request, payload = case
        try:
            checked = check_request(request, LIMITS, engine.schedule)
        except (InvalidArgumentError, UnsupportedError, LimitExceededError):
            counts["rejected"] += 1
            return
        try:
            pieces = run(engine, checked, payload)
        except InvalidArgumentError as error:
            # The payload is checked when the request runs.
            length = sum(spec.nbytes for spec in request.specs)
            field = request.operand_name if len(payload) == length else "payload"
            assert [violation.field for violation in error.violations] == [field]  # noqa: PT017
            counts["rejected"] += 1
            return
        counts["passed"] += 1
        expected = []
        for chain, result in zip(request.branches, checked.results, strict=True):
            families.update(type(layer) for layer in chain)
            expected.append(math.prod(result.shapes[-1]) * ITEM_BYTES[request.input.dtype])
            if chain[-1].returns_indices:
                expected.append(math.prod(result.shapes[-1]) * 8)
        assert [len(piece) for piece in pieces] == [spec.nbytes for spec in checked.outputs] == expected
        assert sum(expected) == checked.output_bytes

    holds()
    # The property says something only if many requests of many layers pass.
    assert counts["passed"] > counts["rejected"] / 4
    assert len(families) > len(CLASSES) / 2


HUGE = (0, MAX_NUMEL, MAX_NUMEL, MAX_NUMEL, MAX_NUMEL)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (MaxPool3d(2), HUGE),
        (AvgPool3d(2), HUGE),
        (GlobalPool3d("max"), HUGE),
        (GlobalPool3d("mean"), HUGE),
        (MaxPool2d(2), HUGE[:4]),
        (LPPool2d(2, 2), HUGE[:4]),
        (AdaptiveMaxPool2d(1), HUGE[:4]),
        (MaxUnpool2d(2), HUGE[:4]),
        (FractionalMaxPool2d(2, 2), (0, MAX_NUMEL, 2**22, 2**22)),
        (MaxPool1d(2), HUGE[:3]),
        (AdaptiveAvgPool1d(1), HUGE[:3]),
    ],
    ids=lambda value: repr(value) if not isinstance(value, tuple) else "",
)
def test_empty_batch_of_planes_of_any_size(engine, layer, shape):
    """An empty batch of planes that are too large for any tensor is rejected or computed, never an error of torch."""
    indices = TensorSpec("int64", shape) if layer.operand == "indices" else None
    try:
        checked = check_request(Request(TensorSpec("float32", shape), ((layer,),), indices), LIMITS, engine.schedule)
    except (InvalidArgumentError, LimitExceededError):
        return
    assert run(engine, checked, b"") == [b""]


@pytest.mark.parametrize("norm", [65504, 65505, 1e-4, 1e-5, 1e38, 1e39, 1e-38, 1e-39, 1e300, 1e-300, 5e-324])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_norm_of_any_magnitude(engine, norm, dtype):
    """A norm that the dtype cannot represent, or whose inverse it cannot, is rejected or computed."""
    spec = TensorSpec(dtype, (1, 1, 2, 2))
    try:
        checked = check_request(Request(spec, ((LPPool2d(norm, 2),),)), LIMITS, engine.schedule)
    except InvalidArgumentError as error:
        assert "norm_type" in str(error)  # noqa: PT017 - either outcome is valid
        return
    assert [len(piece) for piece in run(engine, checked, bytes(spec.nbytes))] == [ITEM_BYTES[dtype]]


def ask(shape, *branches, dtype="float32", layout="NCHW", limits=WIDE, check=check_request):
    """Check a request without indices, where each branch is a layer or a chain."""
    chains = tuple(chain if isinstance(chain, tuple) else (chain,) for chain in branches)
    return check(Request(TensorSpec(dtype, shape, layout), chains), limits, EagerSchedule)


IMAGE = (1, 1, 8, 8)
INDICES = MaxPool2d(2, return_indices=True)


@pytest.mark.parametrize(
    ("branches", "nbytes"),
    [
        ([AdaptiveAvgPool2d(4)], 64),
        ([AdaptiveAvgPool2d(4), AdaptiveMaxPool2d(2)], 80),
        ([INDICES], 16 * (4 + 8)),
        ([(AdaptiveAvgPool2d(9), GlobalPool2d("mean"))], 81 * 4),
    ],
    ids=["one", "two branches", "indices", "the middle of a chain"],
)
def test_limit_on_output_bytes(branches, nbytes):
    """The limit covers the outputs and indices of all branches, and each step of a chain, exact to the byte."""
    ask(IMAGE, *branches, limits=replace(WIDE, output_bytes=nbytes))
    with pytest.raises(LimitExceededError) as raised:
        ask(IMAGE, *branches, limits=replace(WIDE, output_bytes=nbytes - 1))
    assert raised.value.reason == "OUTPUT_TOO_LARGE"
    assert raised.value.metadata == {"limit": str(nbytes - 1), "actual": str(nbytes)}


@pytest.mark.parametrize(
    ("shape", "growth", "cells", "rejected"),
    [
        ((1, 1, 1, 1), 1, 1024, False),
        ((1, 1, 1, 1), 1, 1025, True),
        ((1, 1, 1024, 1024), 2, 1448, False),
        ((1, 1, 1024, 1024), 2, 1449, True),
    ],
    ids=["exempt", "over the exemption", "twofold", "over twofold"],
)
def test_limit_on_output_growth(shape, growth, cells, rejected):
    """Outputs larger than 4 MiB are limited to a multiple of the input's size."""
    assert FREE_OUTPUT_BYTES == 1024 * 1024 * 4
    limits = replace(WIDE, output_growth=growth)
    if not rejected:
        assert ask(shape, AdaptiveAvgPool2d(cells), limits=limits).output_bytes == 4 * cells**2
        return
    with pytest.raises(LimitExceededError) as raised:
        ask(shape, AdaptiveAvgPool2d(cells), limits=limits)
    assert raised.value.reason == "AMPLIFICATION"
    limit = max(FREE_OUTPUT_BYTES, growth * 4 * math.prod(shape))
    assert raised.value.metadata == {"limit": str(limit), "actual": str(4 * cells**2)}


@pytest.mark.parametrize(
    ("shape", "branches", "work"),
    [
        ((2, 3, 8, 8), [MaxPool2d((2, 3), stride=1)], 6 * 7 * 6 * 6),
        ((3, 8, 8), [MaxPool2d((2, 3), stride=1)], 3 * 7 * 6 * 6),
        ((2, 3, 8, 8), [GlobalPool2d("mean")], 6 * 64),
        ((2, 3, 8, 8), [MaxPool2d(2), AvgPool2d(4)], 6 * (16 * 4 + 4 * 16)),
        ((2, 3, 8, 8), [(MaxPool2d(2), GlobalPool2d("max"))], 6 * (16 * 4 + 16)),
        ((2, 3, 8, 8), [AdaptiveAvgPool2d(3)], 6 * 9 * 16),
    ],
    ids=["window", "unbatched", "global", "branches", "chain", "adaptive"],
)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_limit_on_work(shape, branches, work, layout):
    """Work is planes x output cells x window cells over all layers, and its limit is exact to the cell."""
    shape = from_channels_first(shape, 2, layout)
    ask(shape, *branches, layout=layout, limits=replace(WIDE, work=work))
    with pytest.raises(LimitExceededError) as raised:
        ask(shape, *branches, layout=layout, limits=replace(WIDE, work=work - 1))
    assert raised.value.reason == "WORK_BUDGET"
    assert raised.value.metadata == {"limit": str(work - 1), "actual": str(work)}


def test_default_work_budget_rejects_huge_windows():
    """A 255 x 255 window at every cell of 64 planes is valid for torch, but would take it half a minute."""
    limits = Limits(512 * 2**20, 512 * 2**20, 64, 4_000_000_000)
    with pytest.raises(LimitExceededError, match=r"got 272734617600") as raised:
        ask((1, 64, 256, 256), MaxPool2d(255, stride=1, padding=127), limits=limits)
    assert raised.value.reason == "WORK_BUDGET"


@pytest.mark.parametrize("shape", [(1, 1, 2**16, 2**15), (2**31 - 1, 1, 1, 2), (2, 1, 2**30, 1)])
def test_input_of_2_to_the_31_elements_is_too_large(shape):
    """The number of input elements is limited independently of the bytes."""
    with pytest.raises(LimitExceededError) as raised:
        ask(shape, GlobalPool2d("mean"))
    assert raised.value.reason == "TENSOR_TOO_LARGE"
    assert raised.value.metadata == {"limit": str(MAX_NUMEL), "actual": str(math.prod(shape))}


def test_output_of_2_to_the_31_elements_is_too_large():
    """The number of elements of each step's output is limited independently of the bytes."""
    with pytest.raises(LimitExceededError) as raised:
        ask((1, 1, 1, 1), (AdaptiveAvgPool2d(50_000), GlobalPool2d("mean")))
    assert raised.value.reason == "TENSOR_TOO_LARGE"


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [(AvgPool2d(2), "int32"), (MaxPool2d(2), "bool"), (AvgPool3d(2), "float16"), (GlobalPool2d("mean"), "uint8")],
    ids=repr,
)
@pytest.mark.parametrize("check", [check_request, check_stream])
def test_unsupported_dtype_names_the_layer_and_its_dtypes(layer, dtype, check):
    """The error for an unsupported dtype has the layer's path and the dtypes that it supports."""
    first = MaxPool3d(1) if layer.spatial_dims == 3 else MaxPool2d(1)
    shape, chain = (1, 1, 4, 4, 4)[: layer.spatial_dims + 2], (first, layer) if dtype != "bool" else layer
    with pytest.raises(UnsupportedError, match=re.escape(f"{layer.name} takes")) as raised:
        ask(shape, chain, dtype=dtype, check=check)
    assert raised.value.reason == "DTYPE"
    assert raised.value.metadata == {"layer": layer.name, "dtypes": ", ".join(layer.dtypes)}


def test_dtype_is_checked_before_the_shape():
    """If both dtype and shape are invalid, the dtype is reported."""
    with pytest.raises(UnsupportedError):
        ask((0, 0), AvgPool2d(2), dtype="int8")


@pytest.mark.parametrize("check", [check_request, check_stream])
@pytest.mark.parametrize(
    ("shape", "layer", "field"),
    [
        ((4, 4), MaxPool2d(2), "input.shape"),
        ((1, 0, 4, 4), MaxPool2d(2), "input.shape"),
        ((1, 1, 4, 4), MaxPool2d(5), "branches[0].layers[0].max_pool.kernel_size"),
        ((3, 4), GlobalPool2d("mean"), "input.shape"),
        ((-1, -4, -4, -4), MaxPool2d(2), "input.shape"),
    ],
    ids=repr,
)
def test_invalid_shape_names_the_field(shape, layer, field, check):
    """A shape error names the input, or the layer that does not fit it, also for a stream."""
    with pytest.raises(InvalidArgumentError) as raised:
        ask(shape, layer, check=check)
    assert [violation.field for violation in raised.value.violations] == [field]


@pytest.mark.parametrize("check", [check_request, check_stream])
@pytest.mark.parametrize(
    ("indices", "field"),
    [
        (None, "indices"),
        (TensorSpec("int32", (1, 1, 2, 2)), "indices.dtype"),
        (TensorSpec("uint8", (1, 1, 2, 2)), "indices.dtype"),
        (TensorSpec("int64", (1, 1, 2, 3)), "indices.shape"),
        (TensorSpec("int64", (1, 2, 2)), "indices.shape"),
        (TensorSpec("int64", (1, 1, 2, 2), "NHWC"), "indices.shape"),
    ],
    ids=repr,
)
def test_indices_must_be_int64_with_the_shape_of_the_input(indices, field, check):
    """Missing indices, and indices of another dtype, shape or layout, are rejected with their field."""
    request = Request(TensorSpec("float32", (1, 1, 2, 2)), ((MaxUnpool2d(2),),), indices)
    with pytest.raises(InvalidArgumentError, match=r": expected ") as raised:
        check(request, WIDE, EagerSchedule)
    assert [violation.field for violation in raised.value.violations] == [field]


@pytest.mark.parametrize("check", [check_request, check_stream])
def test_indices_without_max_unpool_are_rejected(check):
    """An operand for layers that take none is rejected."""
    shape = (1, 1, 2, 2)
    request = Request(TensorSpec("float32", shape), ((MaxPool2d(2),),), TensorSpec("int64", shape))
    with pytest.raises(InvalidArgumentError, match=r"^operand: expected none, since no layer that is the first"):
        check(request, WIDE, EagerSchedule)


def unpool(engine, indices, *layers, shape=(1, 1, 2, 2), layout="NCHW"):
    """Unpool ones with the given indices."""
    spec = TensorSpec("float32", shape, layout)
    payload = np.ones(shape, np.float32).tobytes() + np.array(indices, np.int64).tobytes()
    request = Request(spec, tuple((layer,) for layer in layers), TensorSpec("int64", shape, layout))
    return run(engine, check_request(request, LIMITS, engine.schedule), payload)


@pytest.mark.parametrize("bad", [-1, 16, 2**32 + 3, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("position", [0, 3])
def test_index_outside_of_the_output_plane_is_rejected(engine, bad, position):
    """An index below 0 or beyond the output plane is rejected with its value, at any position."""
    indices = [0, 5, 10, 15]
    assert np.frombuffer(unpool(engine, indices, MaxUnpool2d(2))[0], np.float32).sum() == 4
    indices[position] = bad
    with pytest.raises(InvalidArgumentError, match=r"^indices: expected indices in 0\.\.15, .*got") as raised:
        unpool(engine, indices, MaxUnpool2d(2))
    assert str(bad) in str(raised.value)


def test_index_must_fit_the_output_plane_of_every_branch(engine):
    """If branches unpool to planes of different sizes, the smallest one limits the indices."""
    larger = MaxUnpool2d(2, output_size=(5, 5))
    assert len(unpool(engine, [0, 1, 2, 24], larger)) == 1
    with pytest.raises(InvalidArgumentError, match=r"expected indices in 0\.\.15"):
        unpool(engine, [0, 1, 2, 24], larger, MaxUnpool2d(2))


def test_indices_count_cells_of_a_plane_in_both_layouts(engine):
    """With channels last, indices are limited by the size of the plane."""
    shape = (1, 2, 2, 3)
    assert len(unpool(engine, [15] * 12, MaxUnpool2d(2), shape=shape, layout="NHWC")) == 1
    with pytest.raises(InvalidArgumentError, match=r"expected indices in 0\.\.15"):
        unpool(engine, [16] * 12, MaxUnpool2d(2), shape=shape, layout="NHWC")


def test_check_shapes_applies_the_rules_of_a_request():
    """check_shapes returns a request's shapes and checks the shape and size of the tensor."""
    assert check_shapes((1, 8, 8, 3), [(MaxPool2d(2),)], "NHWC") == [((1, 4, 4, 3),)]
    with pytest.raises(LimitExceededError):
        check_shapes((1, 1, 2**16, 2**15), [(MaxPool2d(2),)], "NCHW")
    with pytest.raises(InvalidArgumentError, match=r"^shape: "):
        check_shapes((8, 8), [(MaxPool2d(2),)], "NCHW")

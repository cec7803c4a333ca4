"""The validator: whatever it passes, torch runs; and each limit and rule, one byte or one cell on either side."""

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
    GlobalAvgPool,
    GlobalMaxPool,
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
from tests.unit.strategies import CLASSES, classes, layers, parameters, shapes

LIMITS = Limits(input_bytes=2**20, output_bytes=2**20, output_growth=64, work=10**6)
WIDE = Limits(input_bytes=2**60, output_bytes=2**60, output_growth=2**60, work=2**60)


@pytest.fixture(scope="module")
def engine():
    """An engine of one thread on the CPU."""
    made = Engine("cpu", 1)
    yield made
    made.close()


def run(engine, checked, payload):
    """Run a request, and give copies of its outputs' bytes."""
    return engine.execute([engine.run(checked.schedule, payload, lambda outputs: [bytes(each) for each in outputs])])[0]


@st.composite
def any_layers(draw, dims):
    """Draw a layer that mostly fits a small plane, or None where its parameters were refused."""
    cls = draw(st.sampled_from(classes(dims)))
    if draw(st.integers(0, 9)):
        return draw(layers([cls], most=2, most_output=6))
    try:
        return cls(**draw(parameters(cls)))
    except InvalidArgumentError:
        return None


@st.composite
def requests(draw):
    """Draw a request with its payload: mostly one that is right, of any family, dtype and layout."""
    dims, layout = draw(st.integers(1, 3)), draw(st.sampled_from(["NCHW", "NHWC"]))
    chain = st.lists(any_layers(dims).filter(bool), min_size=1, max_size=draw(st.integers(1, 3))).map(tuple)
    branches = tuple(draw(st.lists(chain, min_size=1, max_size=2)))
    shape = draw(shapes(dims, most=9, zeros=draw(st.integers(0, 9)) == 0))
    has = [dtype for dtype in ITEM_BYTES if all(dtype in layer.dtypes for chain in branches for layer in chain)]
    dtype = draw(st.sampled_from(has) if draw(st.integers(0, 9)) else st.sampled_from(list(ITEM_BYTES)))
    spec = TensorSpec(dtype, from_channels_first(shape, dims, layout) if len(shape) > dims else shape, layout)
    payload = np.random.default_rng(draw(st.integers(0, 2**32))).bytes(spec.nbytes)
    indices = None
    takes = [chain[0] for chain in branches if chain[0].takes_indices]
    if bool(takes) ^ (draw(st.integers(0, 19)) == 0):
        indices = TensorSpec(draw(st.sampled_from(["int64"] * 9 + ["int32"])), spec.shape, layout)
        high = draw(st.sampled_from([1, 1, 4, 30]))
        payload += np.random.default_rng(0).integers(0, high, spec.numel).tobytes()
    cut = draw(st.sampled_from([0] * 19 + [1]))
    return Request(spec, branches, indices), payload[: len(payload) - cut]


def test_whatever_passes_the_validator_torch_runs(engine):
    """A request that passes is computed, to as many bytes as were counted; any other is refused by an error of ours."""
    seen = {"passed": 0, "refused": 0}
    families = set()

    @given(requests())
    @settings(max_examples=4 * settings.default.max_examples)
    def holds(case):
        request, payload = case
        try:
            checked = check_request(request, LIMITS, engine.schedule)
        except (InvalidArgumentError, UnsupportedError, LimitExceededError):
            seen["refused"] += 1
            return
        try:
            pieces = run(engine, checked, payload)
        except InvalidArgumentError as error:
            # The payload is looked at only when there is one.
            length = sum(spec.nbytes for spec in request.specs)
            field = "indices" if len(payload) == length else "payload"
            assert [each.field for each in error.violations] == [field]  # noqa: PT017
            seen["refused"] += 1
            return
        seen["passed"] += 1
        expected = []
        for chain, result in zip(request.branches, checked.results, strict=True):
            families.update(type(layer) for layer in chain)
            expected.append(math.prod(result.shapes[-1]) * ITEM_BYTES[request.input.dtype])
            if chain[-1].returns_indices:
                expected.append(math.prod(result.shapes[-1]) * 8)
        assert [len(piece) for piece in pieces] == [spec.nbytes for spec in checked.outputs] == expected
        assert sum(expected) == checked.output_bytes

    holds()
    # The property is worth something only where much passes, of nearly every layer.
    assert seen["passed"] > seen["refused"] / 4
    assert len(families) > len(CLASSES) / 2


HUGE = (0, MAX_NUMEL, MAX_NUMEL, MAX_NUMEL, MAX_NUMEL)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (MaxPool3d(2), HUGE),
        (AvgPool3d(2), HUGE),
        (GlobalMaxPool(), HUGE),
        (GlobalAvgPool(), HUGE),
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
def test_no_planes_of_any_size_are_computed_or_refused(engine, layer, shape):
    """A batch of none, whose axes no tensor could have, doesn't escape the validator, be it refused or computed."""
    indices = TensorSpec("int64", shape) if layer.takes_indices else None
    try:
        checked = check_request(Request(TensorSpec("float32", shape), ((layer,),), indices), LIMITS, engine.schedule)
    except (InvalidArgumentError, LimitExceededError):
        return
    assert run(engine, checked, b"") == [b""]


@pytest.mark.parametrize("norm", [65504, 65505, 1e-4, 1e-5, 1e38, 1e39, 1e-38, 1e-39, 1e300, 1e-300, 5e-324])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_norm_of_any_size_is_computed_or_refused(engine, norm, dtype):
    """A norm that the tensor's dtype can't hold, or whose inverse it can't, doesn't escape the validator."""
    spec = TensorSpec(dtype, (1, 1, 2, 2))
    try:
        checked = check_request(Request(spec, ((LPPool2d(norm, 2),),)), LIMITS, engine.schedule)
    except InvalidArgumentError as error:
        assert "norm_type" in str(error)  # noqa: PT017 - which of the two happens is the validator's business
        return
    assert [len(piece) for piece in run(engine, checked, bytes(spec.nbytes))] == [ITEM_BYTES[dtype]]


def ask(shape, *branches, dtype="float32", layout="NCHW", limits=WIDE, check=check_request):
    """Check a request without indices."""
    chains = tuple(chain if isinstance(chain, tuple) else (chain,) for chain in branches)
    return check(Request(TensorSpec(dtype, shape, layout), chains), limits)


IMAGE = (1, 1, 8, 8)
INDICES = MaxPool2d(2, return_indices=True)


@pytest.mark.parametrize(
    ("branches", "nbytes"),
    [
        ([AdaptiveAvgPool2d(4)], 64),
        ([AdaptiveAvgPool2d(4), AdaptiveMaxPool2d(2)], 80),
        ([INDICES], 16 * (4 + 8)),
        ([(AdaptiveAvgPool2d(9), GlobalAvgPool())], 81 * 4),
    ],
    ids=["one", "two branches", "indices", "the middle of a chain"],
)
def test_output_bytes_are_held_to_their_limit(branches, nbytes):
    """Outputs, indices, all branches, and each step of a chain count: the limit itself passes, a byte less doesn't."""
    ask(IMAGE, *branches, limits=replace(WIDE, output_bytes=nbytes))
    with pytest.raises(LimitExceededError) as raised:
        ask(IMAGE, *branches, limits=replace(WIDE, output_bytes=nbytes - 1))
    assert raised.value.reason == "OUTPUT_TOO_LARGE"
    assert raised.value.metadata == {"limit": str(nbytes - 1), "actual": str(nbytes)}


@pytest.mark.parametrize(
    ("shape", "growth", "cells", "refused"),
    [
        ((1, 1, 1, 1), 1, 1024, False),
        ((1, 1, 1, 1), 1, 1025, True),
        ((1, 1, 1024, 1024), 2, 1448, False),
        ((1, 1, 1024, 1024), 2, 1449, True),
    ],
    ids=["free", "over free", "twice", "over twice"],
)
def test_outputs_may_grow_so_far(shape, growth, cells, refused):
    """Outputs of up to 4 MiB are free; above that they are held to a multiple of the input's bytes."""
    assert FREE_OUTPUT_BYTES == 1024 * 1024 * 4
    limits = replace(WIDE, output_growth=growth)
    if not refused:
        assert ask(shape, AdaptiveAvgPool2d(cells), limits=limits).output_bytes == 4 * cells**2
        return
    with pytest.raises(LimitExceededError) as raised:
        ask(shape, AdaptiveAvgPool2d(cells), limits=limits)
    assert raised.value.reason == "AMPLIFICATION"
    most = max(FREE_OUTPUT_BYTES, growth * 4 * math.prod(shape))
    assert raised.value.metadata == {"limit": str(most), "actual": str(4 * cells**2)}


@pytest.mark.parametrize(
    ("shape", "branches", "work"),
    [
        ((2, 3, 8, 8), [MaxPool2d((2, 3), stride=1)], 6 * 7 * 6 * 6),
        ((3, 8, 8), [MaxPool2d((2, 3), stride=1)], 3 * 7 * 6 * 6),
        ((2, 3, 8, 8), [GlobalAvgPool()], 6 * 64),
        ((2, 3, 8, 8), [MaxPool2d(2), AvgPool2d(4)], 6 * (16 * 4 + 4 * 16)),
        ((2, 3, 8, 8), [(MaxPool2d(2), GlobalMaxPool())], 6 * (16 * 4 + 16)),
        ((2, 3, 8, 8), [AdaptiveAvgPool2d(3)], 6 * 9 * 16),
    ],
    ids=["window", "unbatched", "global", "branches", "chain", "adaptive"],
)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_work_is_held_to_its_limit(shape, branches, work, layout):
    """Planes x output cells x window cells, over all layers: the limit itself passes, a cell less doesn't."""
    given_ = from_channels_first(shape, 2, layout)
    ask(given_, *branches, layout=layout, limits=replace(WIDE, work=work))
    with pytest.raises(LimitExceededError) as raised:
        ask(given_, *branches, layout=layout, limits=replace(WIDE, work=work - 1))
    assert raised.value.reason == "WORK_BUDGET"
    assert raised.value.metadata == {"limit": str(work - 1), "actual": str(work)}


def test_what_takes_torch_half_a_minute_is_over_the_default_budget():
    """A window of 255 x 255 at every cell of 64 images passes every check of torch's, and costs 273 billion cells."""
    limits = Limits(512 * 2**20, 512 * 2**20, 64, 4_000_000_000)
    with pytest.raises(LimitExceededError, match=r"got 272734617600") as raised:
        ask((1, 64, 256, 256), MaxPool2d(255, stride=1, padding=127), limits=limits)
    assert raised.value.reason == "WORK_BUDGET"


@pytest.mark.parametrize("shape", [(1, 1, 2**16, 2**15), (2**31 - 1, 1, 1, 2), (2, 1, 2**30, 1)])
def test_a_tensor_of_2_to_the_31_elements_is_too_large(shape):
    """The input's elements are counted, whatever the limit on bytes."""
    with pytest.raises(LimitExceededError) as raised:
        ask(shape, MaxPool2d(1))
    assert raised.value.reason == "TENSOR_TOO_LARGE"
    assert raised.value.metadata == {"limit": str(MAX_NUMEL), "actual": str(math.prod(shape))}


def test_an_output_of_2_to_the_31_elements_is_too_large():
    """So are a step's, whatever the limit on bytes."""
    with pytest.raises(LimitExceededError) as raised:
        ask((1, 1, 1, 1), (AdaptiveAvgPool2d(50_000), GlobalAvgPool()))
    assert raised.value.reason == "TENSOR_TOO_LARGE"


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [(AvgPool2d(2), "int64"), (MaxPool2d(2), "bool"), (AvgPool3d(2), "float16"), (LPPool2d(2, 2), "uint8")],
    ids=repr,
)
@pytest.mark.parametrize("check", [check_request, check_stream])
def test_a_dtype_that_a_layer_lacks_is_refused_with_those_it_has(layer, dtype, check):
    """The error names the layer by its path, and the dtypes that it takes."""
    first = MaxPool3d(1) if layer.spatial_dims == 3 else MaxPool2d(1)
    shape, chain = (1, 1, 4, 4, 4)[: layer.spatial_dims + 2], (first, layer) if dtype != "bool" else layer
    with pytest.raises(UnsupportedError, match=re.escape(f"{layer.name} takes")) as raised:
        ask(shape, chain, dtype=dtype, check=check)
    assert raised.value.reason == "DTYPE"
    assert raised.value.metadata == {"layer": layer.name, "dtypes": ", ".join(layer.dtypes)}


def test_the_dtype_is_checked_before_the_shape():
    """A wrong dtype is said first: what else is wrong might not be with another."""
    with pytest.raises(UnsupportedError):
        ask((0, 0), AvgPool2d(2), dtype="int8")


@pytest.mark.parametrize("check", [check_request, check_stream])
@pytest.mark.parametrize(
    ("shape", "layer", "field"),
    [
        ((4, 4), MaxPool2d(2), "input.shape"),
        ((1, 0, 4, 4), MaxPool2d(2), "input.shape"),
        ((1, 1, 4, 4), MaxPool2d(5), "branches[0].layers[0].max_pool.kernel_size"),
        ((3, 4), GlobalAvgPool(), "input.shape"),
        ((-1, -4, -4, -4), MaxPool2d(2), "input.shape"),
    ],
    ids=repr,
)
def test_a_shape_at_fault_is_named(shape, layer, field, check):
    """A shape that can't be pooled is the input's fault, or the layer's where that doesn't fit; in a stream too."""
    with pytest.raises(InvalidArgumentError) as raised:
        ask(shape, layer, check=check)
    assert [each.field for each in raised.value.violations] == [field]


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
def test_indices_have_the_inputs_shape_and_int64(indices, field, check):
    """Indices that are absent, of another dtype, shape or layout than the input's are refused by their field."""
    request = Request(TensorSpec("float32", (1, 1, 2, 2)), ((MaxUnpool2d(2),),), indices)
    with pytest.raises(InvalidArgumentError, match=r": expected ") as raised:
        check(request, WIDE)
    assert [each.field for each in raised.value.violations] == [field]


@pytest.mark.parametrize("check", [check_request, check_stream])
def test_indices_without_a_layer_that_takes_them_are_refused(check):
    """Indices beside layers that take none are a mistake, and said to be."""
    shape = (1, 1, 2, 2)
    request = Request(TensorSpec("float32", shape), ((MaxPool2d(2),),), TensorSpec("int64", shape))
    with pytest.raises(InvalidArgumentError, match=r"^indices: expected no indices without a MaxUnpool"):
        check(request, WIDE)


def unpool(engine, indices, *layers, shape=(1, 1, 2, 2), layout="NCHW"):
    """Unpool ones with the given indices."""
    spec = TensorSpec("float32", shape, layout)
    payload = np.ones(shape, np.float32).tobytes() + np.array(indices, np.int64).tobytes()
    request = Request(spec, tuple((layer,) for layer in layers), TensorSpec("int64", shape, layout))
    return run(engine, check_request(request, LIMITS, engine.schedule), payload)


@pytest.mark.parametrize("bad", [-1, 16, 2**32 + 3, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("place", [0, 3])
def test_an_index_outside_of_its_plane_is_refused(engine, bad, place):
    """An index below 0, or of a cell that the output plane lacks, is the indices' fault, wherever it stands."""
    indices = [0, 5, 10, 15]
    assert np.frombuffer(unpool(engine, indices, MaxUnpool2d(2))[0], np.float32).sum() == 4
    indices[place] = bad
    with pytest.raises(InvalidArgumentError, match=r"^indices: expected indices in 0\.\.15, .*got") as raised:
        unpool(engine, indices, MaxUnpool2d(2))
    assert str(bad) in str(raised.value)


def test_an_index_must_fit_the_plane_of_every_branch(engine):
    """Where branches unpool to planes of different sizes, the smallest bounds the indices."""
    larger = MaxUnpool2d(2, output_size=(5, 5))
    assert len(unpool(engine, [0, 1, 2, 24], larger)) == 1
    with pytest.raises(InvalidArgumentError, match=r"expected indices in 0\.\.15"):
        unpool(engine, [0, 1, 2, 24], larger, MaxUnpool2d(2))


def test_indices_count_cells_of_a_plane_in_either_layout(engine):
    """A channels-last input's indices are bounded by its plane, not by an axis that stands in the plane's place."""
    shape = (1, 2, 2, 3)
    assert len(unpool(engine, [15] * 12, MaxUnpool2d(2), shape=shape, layout="NHWC")) == 1
    with pytest.raises(InvalidArgumentError, match=r"expected indices in 0\.\.15"):
        unpool(engine, [16] * 12, MaxUnpool2d(2), shape=shape, layout="NHWC")


def test_check_shapes_gives_what_a_request_would_have():
    """A question about shapes is answered by the rules of a request, the size of the tensor included."""
    assert check_shapes((1, 8, 8, 3), [(MaxPool2d(2),)], "NHWC") == [((1, 4, 4, 3),)]
    with pytest.raises(LimitExceededError):
        check_shapes((1, 1, 2**16, 2**15), [(MaxPool2d(2),)], "NCHW")
    with pytest.raises(InvalidArgumentError, match=r"^shape: "):
        check_shapes((8, 8), [(MaxPool2d(2),)], "NCHW")

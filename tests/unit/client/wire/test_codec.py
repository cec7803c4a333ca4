"""Messages to values and back: layers, requests, responses, and invalid messages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolrpc import (
    LAYERS,
    STEPS,
    AdaptiveAvgPool2d,
    AvgPool1d,
    AvgPool2d,
    GlobalPool2d,
    GlobalPool3d,
    InvalidArgumentError,
    LimitExceededError,
    MaxPool2d,
    MaxUnpool2d,
)
from poolrpc._shapes.limits import MAX_BRANCHES, MAX_CHAIN, MAX_RANK
from poolrpc._wire.codec import (
    DTYPE_TO_WIRE,
    ArenaRanges,
    BranchResult,
    Limit,
    Request,
    ServerInfo,
    decode_info,
    decode_ranges,
    decode_request,
    decode_results,
    decode_shape_request,
    decode_shape_response,
    decode_spec,
    encode_info,
    encode_ranges,
    encode_request,
    encode_results,
    encode_shape_request,
    encode_shape_response,
    encode_spec,
)
from poolrpc._wire.layer_codec import decode_branches, decode_layer, encode_branches, encode_layer
from poolrpc.tensors import ITEM_BYTES, TensorSpec
from poolrpc.v1 import pool_pb2
from tests.unit.strategies import layers, steps

DIMS = st.integers(-(2**63), 2**63 - 1)
SHAPES = st.lists(DIMS, max_size=MAX_RANK).map(tuple)
LAYOUTS = st.sampled_from(["NCHW", "NHWC"])
SPECS = st.builds(TensorSpec, st.sampled_from(list(ITEM_BYTES)), SHAPES, LAYOUTS)
BRANCHES = st.lists(st.lists(layers(), min_size=1, max_size=3).map(tuple), min_size=1, max_size=3).map(tuple)


def round_trip(message):
    """Return a message as the other side parses it."""
    return type(message).FromString(message.SerializeToString())


@given(layers())
def test_a_layer_round_trips(layer):
    """Any layer decodes to the same class and parameters."""
    assert decode_layer(round_trip(encode_layer(layer)), "layer") == layer


@given(steps())
def test_a_step_round_trips(step):
    """Any element-wise step decodes to the same class and parameters, and its message has no spatial_dims."""
    message = round_trip(encode_layer(step))
    assert decode_layer(message, "layer") == step
    assert "spatial_dims" not in getattr(message, step.family).DESCRIPTOR.fields_by_name


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pool_pb2.Layer(to_dtype=pool_pb2.ToDtype()), "layer.to_dtype.dtype"),
        (pool_pb2.Layer(to_dtype=pool_pb2.ToDtype(dtype=pool_pb2.DATA_TYPE_BOOL)), "layer.to_dtype.dtype"),
        (pool_pb2.Layer(to_dtype=pool_pb2.ToDtype(dtype=77)), "layer.to_dtype.dtype"),
        (pool_pb2.Layer(normalize=pool_pb2.Normalize(std=[1])), "layer.normalize.mean"),
        (pool_pb2.Layer(normalize=pool_pb2.Normalize(mean=[1])), "layer.normalize.std"),
        (pool_pb2.Layer(normalize=pool_pb2.Normalize(mean=[1], std=[0])), "layer.normalize.std"),
        (pool_pb2.Layer(normalize=pool_pb2.Normalize(mean=[1, 2], std=[1, 2, 3])), "layer.normalize.std"),
        (pool_pb2.Layer(normalize=pool_pb2.Normalize(mean=[1] * 65, std=[1])), "layer.normalize.mean"),
        (pool_pb2.Layer(normalize=pool_pb2.Normalize(mean=[float("nan")], std=[1])), "layer.normalize.mean"),
    ],
)
def test_an_invalid_step_is_rejected_with_its_field(message, field):
    """A message without a dtype, with one that no output has, or with wrong numbers is rejected by name."""
    with pytest.raises(InvalidArgumentError) as raised:
        decode_layer(message, "layer")
    assert [each.field for each in raised.value.violations] == [field]


@pytest.mark.parametrize("cls", LAYERS.values())
def test_a_layers_message_has_its_family_and_rank(cls):
    """A layer's family is a field of the oneof, with spatial_dims."""
    for message in pool_pb2.Layer.DESCRIPTOR.oneofs_by_name["layer"].fields:
        if message.name == cls.family:
            assert "spatial_dims" in message.message_type.fields_by_name
            break
    else:
        pytest.fail(f"the proto has no {cls.family}")


def windows(message, **fields):
    """Return the message of a layer with windows of 3 x 3."""
    name = {pool_pb2.MaxPool: "max_pool", pool_pb2.AvgPool: "avg_pool", pool_pb2.Pool: "pool"}[message]
    return pool_pb2.Layer(**{name: message(spatial_dims=2, kernel_size=[3], **fields)})


MAX = pool_pb2.Reduce(named=pool_pb2.REDUCTION_MAX)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (windows(pool_pb2.MaxPool, auto_pad=1, padding=[1]), "max_pool.padding"),
        (windows(pool_pb2.AvgPool, auto_pad=2, padding_end=[1]), "avg_pool.padding_end"),
        (windows(pool_pb2.MaxPool, auto_pad=7), "max_pool.auto_pad"),
        (windows(pool_pb2.MaxPool, auto_pad=1, ceil_mode=True), "max_pool.ceil_mode"),
        (windows(pool_pb2.MaxPool, padding=[1, 1], padding_end=[1, 1, 1]), "max_pool.padding_end"),
        (windows(pool_pb2.MaxPool, padding=[1, 1, 1], padding_end=[1]), "max_pool.padding"),
        (windows(pool_pb2.MaxPool, padding_end=[3]), "max_pool.padding"),
        (windows(pool_pb2.MaxPool, padding_end=[1] * 9), "max_pool.padding_end"),
        (windows(pool_pb2.Pool), "pool.reduce"),
        (windows(pool_pb2.Pool, reduce=pool_pb2.Reduce(named=99)), "pool.reduce"),
        (windows(pool_pb2.Pool, reduce=pool_pb2.Reduce(norm=pool_pb2.Norm())), "pool.reduce.norm.p"),
        (
            windows(pool_pb2.Pool, reduce=pool_pb2.Reduce(power_mean=pool_pb2.PowerMean(p=3, eps=0))),
            "pool.reduce.power_mean.eps",
        ),
        (
            windows(pool_pb2.Pool, reduce=pool_pb2.Reduce(softmax=pool_pb2.Softmax(t=float("nan")))),
            "pool.reduce.softmax.t",
        ),
        (windows(pool_pb2.Pool, reduce=MAX, count_include_pad=True), "pool.count_include_pad"),
        (pool_pb2.Layer(blur_pool=pool_pb2.BlurPool(spatial_dims=2, kernel_size=128)), "blur_pool.kernel_size"),
        (pool_pb2.Layer(blur_pool=pool_pb2.BlurPool(spatial_dims=1)), "blur_pool.spatial_dims"),
    ],
)
def test_an_invalid_window_is_rejected_with_its_field(message, field):
    """A message whose paddings, reduction or filter are invalid, or don't fit each other, is rejected by name."""
    with pytest.raises(InvalidArgumentError) as raised:
        decode_layer(message, "layer")
    assert [each.field for each in raised.value.violations] == [f"layer.{field}"]


@pytest.mark.parametrize(
    ("before", "after", "padding"),
    [([], [], 0), ([1], [], 1), ([1], [1], 1), ([], [1], ((0, 1), (0, 1))), ([2], [0, 1], ((2, 0), (2, 1)))],
)
def test_a_missing_padding_end_is_the_padding(before, after, padding):
    """The padding after each axis is that before it unless the message has one, and one value is for all axes."""
    message = windows(pool_pb2.MaxPool, padding=before, padding_end=after)
    assert decode_layer(message, "layer") == LAYERS["MaxPool2d"](3, padding=padding)


def test_a_family_without_a_layer_is_rejected():
    """Every field of the oneof is the family of a layer, or is rejected as a layer that this version lacks."""
    families = {cls.family for cls in (*LAYERS.values(), *STEPS.values())}
    for field in pool_pb2.Layer.DESCRIPTOR.oneofs_by_name["layer"].fields:
        if field.name in families:
            continue
        message = pool_pb2.Layer()
        getattr(message, field.name).SetInParent()
        with pytest.raises(InvalidArgumentError, match="expected a layer, got none that this version has") as raised:
            decode_layer(message, "layer")
        assert [each.field for each in raised.value.violations] == ["layer"]


UINT64 = st.integers(0, 2**64 - 1)
RANGES = st.builds(ArenaRanges, st.binary(max_size=20), st.tuples(UINT64, UINT64), st.tuples(UINT64, UINT64))


NUMBERS = st.lists(st.integers(0, 2**32 - 1), max_size=64).map(tuple)


@given(SPECS, st.none() | SPECS, BRANCHES, st.none() | RANGES, st.data())
def test_a_request_round_trips(spec, indices, branches, ranges, data):
    """Any request decodes to the same request, with or without the ranges of an arena, whatever outputs it returns."""
    drawn = data.draw(st.tuples(*[NUMBERS] * len(branches)))
    request = Request(spec, branches, indices, drawn if any(drawn) else ())
    data = encode_request(request).SerializeToString() + (b"" if ranges is None else encode_ranges(ranges))
    message = pool_pb2.PoolRequest.FromString(data)
    assert decode_request(message) == request
    assert decode_ranges(message) == ranges


@given(st.lists(st.builds(BranchResult, st.lists(SHAPES).map(tuple), SPECS, st.none() | SPECS)))
def test_results_round_trip(results):
    """Any results decode to the same results, in a unary response and in a stream's first message."""
    for message in (pool_pb2.PoolResponse, pool_pb2.PoolStreamResponse):
        assert decode_results(round_trip(message(results=encode_results(results))).results) == results


@given(SHAPES, BRANCHES, LAYOUTS, st.none() | SHAPES, st.lists(st.lists(SHAPES).map(tuple)))
def test_shapes_round_trip(shape, branches, layout, operand, answer):
    """A request for shapes and its response decode to the same values, with and without the shape of an operand."""
    message = round_trip(encode_shape_request(shape, branches, layout, operand))
    assert decode_shape_request(message) == (shape, branches, layout, (), operand)
    assert decode_shape_response(round_trip(encode_shape_response(answer))) == answer


INFOS = st.builds(
    ServerInfo,
    version=st.text(),
    torch_version=st.text(),
    device=st.text(),
    threads=st.integers(0, 2**32 - 1),
    layers=st.dictionaries(st.text(), st.lists(st.sampled_from(list(ITEM_BYTES))).map(tuple)),
    limits=st.dictionaries(st.text(), st.builds(Limit, st.integers(0, 2**64 - 1), st.text())),
    features=st.dictionaries(st.text(), st.text()),
)


@given(INFOS)
def test_a_server_info_round_trips(info):
    """A server's description decodes to the same description."""
    assert decode_info(round_trip(encode_info(info))) == info
    decode_info(encode_info(info)).layers.clear()  # a caller's changes are the caller's alone
    assert decode_info(encode_info(info)) == info


def test_an_unknown_dtype_is_left_out_of_a_server_info():
    """A client skips the dtypes that it doesn't know, and keeps the layer."""
    message = pool_pb2.GetServerInfoResponse(layers=[pool_pb2.LayerInfo(name="MaxPool9d", dtypes=[3, 99])])
    assert decode_info(round_trip(message)).layers == {"MaxPool9d": ("float32",)}


def test_the_text_of_a_limit():
    """A limit's text is its value and its unit."""
    assert str(Limit(4, "bytes")) == "4 bytes"


def test_the_wire_has_the_dtypes_of_tensors():
    """The dtypes of the proto are those of a TensorSpec."""
    assert set(DTYPE_TO_WIRE) == set(ITEM_BYTES)


@pytest.mark.parametrize(
    ("message", "layer"),
    [
        (pool_pb2.Layer(max_pool={"spatial_dims": 2, "kernel_size": [2]}), MaxPool2d(2)),
        (pool_pb2.Layer(max_pool={"spatial_dims": 2, "kernel_size": [2, 2], "stride": [2]}), MaxPool2d(2, stride=2)),
        (pool_pb2.Layer(avg_pool={"spatial_dims": 1, "kernel_size": [2]}), AvgPool1d(2)),
        (
            pool_pb2.Layer(avg_pool={"spatial_dims": 2, "kernel_size": [2], "count_include_pad": False}),
            AvgPool2d(2, count_include_pad=False),
        ),
        (pool_pb2.Layer(max_unpool={"spatial_dims": 2, "kernel_size": [2]}), MaxUnpool2d(2)),
        (
            pool_pb2.Layer(adaptive_avg_pool={"spatial_dims": 2, "output_size": [{}, {"cells": 3}]}),
            AdaptiveAvgPool2d((None, 3)),
        ),
        (
            pool_pb2.Layer(adaptive_avg_pool={"spatial_dims": 2, "output_size": [{}]}),
            AdaptiveAvgPool2d((None, None)),
        ),
        (
            pool_pb2.Layer(global_pool={"spatial_dims": 2, "reduce": {"named": pool_pb2.REDUCTION_MAX}}),
            GlobalPool2d("max"),
        ),
        (
            pool_pb2.Layer(global_pool={"spatial_dims": 3, "reduce": {"named": pool_pb2.REDUCTION_MEAN}}),
            GlobalPool3d("mean"),
        ),
    ],
    ids=repr,
)
def test_unset_fields_have_torchs_defaults(message, layer):
    """A message with only the required fields decodes to a layer with its defaults."""
    assert decode_layer(round_trip(message), "layer") == layer


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pool_pb2.Layer(), "at"),
        (pool_pb2.Layer.FromString(b"\xf2\x07\x00"), "at"),
        (pool_pb2.Layer(max_pool={"kernel_size": [2]}), "at.max_pool.spatial_dims"),
        (pool_pb2.Layer(max_pool={"spatial_dims": 4, "kernel_size": [2]}), "at.max_pool.spatial_dims"),
        (pool_pb2.Layer(max_pool={"spatial_dims": 2**32 - 1, "kernel_size": [2]}), "at.max_pool.spatial_dims"),
        (
            pool_pb2.Layer(fractional_max_pool={"spatial_dims": 1, "kernel_size": [2], "output_size": {"cells": [1]}}),
            "at.fractional_max_pool.spatial_dims",
        ),
        (pool_pb2.Layer(max_pool={"spatial_dims": 2}), "at.max_pool.kernel_size"),
        (pool_pb2.Layer(max_pool={"spatial_dims": 2, "kernel_size": [0]}), "at.max_pool.kernel_size"),
        (pool_pb2.Layer(max_pool={"spatial_dims": 2, "kernel_size": [2] * 1000}), "at.max_pool.kernel_size"),
        (pool_pb2.Layer(max_pool={"spatial_dims": 2, "kernel_size": [2**32 - 1]}), "at.max_pool.kernel_size"),
        (pool_pb2.Layer(max_pool={"spatial_dims": 2, "kernel_size": [2], "stride": [1, 0]}), "at.max_pool.stride"),
        (pool_pb2.Layer(max_pool={"spatial_dims": 2, "kernel_size": [2], "padding": [2]}), "at.max_pool.padding"),
        (
            pool_pb2.Layer(avg_pool={"spatial_dims": 1, "kernel_size": [2], "divisor_override": 3}),
            "at.avg_pool.divisor_override",
        ),
        (
            pool_pb2.Layer(avg_pool={"spatial_dims": 2, "kernel_size": [2], "divisor_override": 0}),
            "at.avg_pool.divisor_override",
        ),
        (pool_pb2.Layer(lp_pool={"spatial_dims": 2, "kernel_size": [2]}), "at.lp_pool.norm_type"),
        (
            pool_pb2.Layer(lp_pool={"spatial_dims": 2, "kernel_size": [2], "norm_type": float("nan")}),
            "at.lp_pool.norm_type",
        ),
        (pool_pb2.Layer(adaptive_avg_pool={"spatial_dims": 2}), "at.adaptive_avg_pool.output_size"),
        (
            pool_pb2.Layer(adaptive_max_pool={"spatial_dims": 2, "output_size": [{"cells": 0}]}),
            "at.adaptive_max_pool.output_size",
        ),
        (
            pool_pb2.Layer(fractional_max_pool={"spatial_dims": 2, "kernel_size": [2]}),
            "at.fractional_max_pool.output_size",
        ),
        (
            pool_pb2.Layer(fractional_max_pool={"spatial_dims": 2, "kernel_size": [2], "output_size": {}}),
            "at.fractional_max_pool.output_size",
        ),
        (
            pool_pb2.Layer(fractional_max_pool={"spatial_dims": 2, "kernel_size": [2], "output_ratio": {}}),
            "at.fractional_max_pool.output_ratio",
        ),
        (
            pool_pb2.Layer(max_unpool={"spatial_dims": 2, "kernel_size": [2], "output_size": [1, 2, 3]}),
            "at.max_unpool.output_size",
        ),
        (pool_pb2.Layer(global_pool={"spatial_dims": 2}), "at.global_pool.reduce"),
        (pool_pb2.Layer(global_pool={"spatial_dims": 2, "reduce": {}}), "at.global_pool.reduce"),
        (pool_pb2.Layer(global_pool={"spatial_dims": 2, "reduce": {"named": 0}}), "at.global_pool.reduce"),
        (pool_pb2.Layer(global_pool={"spatial_dims": 2, "reduce": {"named": 77}}), "at.global_pool.reduce"),
        (pool_pb2.Layer(global_pool={"reduce": {"named": 1}}), "at.global_pool.spatial_dims"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_invalid_layer_names_its_field(message, field):
    """A missing, unknown or invalid value, and a parameter that the class lacks, are rejected with their path."""
    with pytest.raises(InvalidArgumentError, match=r": expected ") as raised:
        decode_layer(round_trip(message), "at")
    assert [each.field for each in raised.value.violations] == [field]


@given(st.binary(max_size=60))
def test_any_message_decodes_or_is_rejected(data):
    """Whatever message arrives, it decodes to a layer or raises InvalidArgumentError with a path."""
    message = pool_pb2.Layer()
    try:
        message.ParseFromString(data)
    except Exception:  # noqa: BLE001 - gRPC rejects bytes that are not a message
        return
    try:
        decoded = decode_layer(message, "at")
    except InvalidArgumentError as error:
        assert all(each.field.startswith("at") for each in error.violations)  # noqa: PT017
    else:
        assert decode_layer(encode_layer(decoded), "at") == decoded


@pytest.mark.parametrize("spec", [{"dtype": 0}, {"dtype": 99}, {"dtype": -1}, {}])
def test_an_unknown_dtype_is_rejected(spec):
    """A dtype that is unset or unknown is an error of its field, which lists the known ones."""
    with pytest.raises(InvalidArgumentError, match=r"^input\.dtype: expected one of DATA_TYPE_FLOAT16, ") as raised:
        decode_spec(round_trip(pool_pb2.TensorSpec(**spec)), "input")
    assert [each.field for each in raised.value.violations] == ["input.dtype"]


def test_an_unknown_layout_is_rejected_and_an_unset_one_is_channels_first():
    """An unknown layout is an error of its field; the default is channels first."""
    with pytest.raises(InvalidArgumentError, match=r"^indices\.layout: expected one of LAYOUT_CHANNELS_FIRST, "):
        decode_spec(pool_pb2.TensorSpec(dtype=3, layout=99), "indices")
    assert decode_spec(pool_pb2.TensorSpec(dtype=3), "input") == TensorSpec("float32", (), "NCHW")


def test_a_request_for_shapes_names_its_layout():
    """An unknown layout in a request for shapes is an error of the field `layout`."""
    message = pool_pb2.InferShapeRequest(layout=99, branches=encode_branches([(MaxPool2d(2),)]))
    with pytest.raises(InvalidArgumentError) as raised:
        decode_shape_request(message)
    assert [each.field for each in raised.value.violations] == ["layout"]


@pytest.mark.parametrize(("branches", "field"), [([], "branches"), ([pool_pb2.Branch()], "branches[0].layers")])
def test_a_request_needs_a_branch_and_a_branch_needs_a_layer(branches, field):
    """A request without branches, and a branch without layers, are rejected."""
    with pytest.raises(InvalidArgumentError, match=r"expected at least one, got none") as raised:
        decode_branches(branches)
    assert [each.field for each in raised.value.violations] == [field]


@pytest.mark.parametrize(
    ("counts", "limit", "actual"),
    [
        ([1] * (MAX_BRANCHES + 1), MAX_BRANCHES, MAX_BRANCHES + 1),
        ([1, MAX_CHAIN + 1], MAX_CHAIN, MAX_CHAIN + 1),
    ],
    ids=["branches", "layers"],
)
def test_too_many_layers_exceed_a_limit(counts, limit, actual):
    """One branch or one layer above the limit raises LimitExceededError with the limit and the actual number."""
    layer = encode_layer(MaxPool2d(1))
    with pytest.raises(LimitExceededError) as raised:
        decode_branches([pool_pb2.Branch(layers=[layer] * count) for count in counts])
    assert raised.value.reason == "TOO_MANY_LAYERS"
    assert raised.value.metadata == {"limit": str(limit), "actual": str(actual)}


def test_as_many_layers_as_the_limit_are_accepted():
    """The largest number of branches, each with the largest number of layers, decodes."""
    branch = pool_pb2.Branch(layers=[encode_layer(MaxPool2d(1))] * MAX_CHAIN)
    assert decode_branches([branch] * MAX_BRANCHES) == ((MaxPool2d(1),) * MAX_CHAIN,) * MAX_BRANCHES


def test_the_path_of_an_invalid_layer_has_its_branch_and_step():
    """An invalid parameter of a request has the path of its branch, layer and family."""
    branches = encode_branches([(MaxPool2d(1),), (MaxPool2d(1), AvgPool2d(1))])
    branches[1].layers[1].avg_pool.kernel_size[0] = 0
    request = pool_pb2.PoolRequest(branches=branches, input=encode_spec(TensorSpec("float32", (1, 1, 1, 1))))
    with pytest.raises(InvalidArgumentError) as raised:
        decode_request(round_trip(request))
    assert [each.field for each in raised.value.violations] == ["branches[1].layers[1].avg_pool.kernel_size"]


PAYLOADS = [
    pool_pb2.PoolRequest,
    pool_pb2.PoolResponse,
    pool_pb2.PoolStreamRequest,
    pool_pb2.PoolStreamResponse,
]


@pytest.mark.parametrize("message", PAYLOADS)
def test_the_payload_is_the_last_field(message):
    """A message's payload has its highest field number, as framing without a copy requires."""
    numbers = {field.name: field.number for field in message.DESCRIPTOR.fields}
    assert max(numbers, key=numbers.get) == "payload"


def test_results_have_the_specs_of_the_response():
    """A request knows the shapes, the output and the indices of each branch."""
    branches = ((MaxPool2d(2, return_indices=True),), (AvgPool2d(2), AvgPool2d(2)))
    request = Request(TensorSpec("float32", (1, 8, 8, 3), "NHWC"), branches)
    halved, quartered = (1, 4, 4, 3), (1, 2, 2, 3)
    assert request.results() == (
        BranchResult((halved,), TensorSpec("float32", halved, "NHWC"), TensorSpec("int64", halved, "NHWC")),
        BranchResult((halved, quartered), TensorSpec("float32", quartered, "NHWC")),
    )
    assert [len(each.specs) for each in request.results()] == [2, 1]


@pytest.mark.parametrize(
    ("shape", "layer", "field"),
    [
        ((8, 8), MaxPool2d(2), "input.shape"),
        ((1, 1, 4, 4), MaxPool2d(5), "branches[0].layers[0].max_pool.kernel_size"),
    ],
    ids=["shape", "layer"],
)
def test_an_invalid_request_names_its_field(shape, layer, field):
    """A tensor that can't be pooled is an error of the input's shape or of the layer, by its path in the request."""
    with pytest.raises(InvalidArgumentError) as raised:
        Request(TensorSpec("float32", shape), ((layer,),)).results()
    assert [each.field for each in raised.value.violations] == [field]


def test_a_tensor_with_too_many_axes_is_rejected():
    """A spec of six axes is rejected with the number of axes, before they are copied."""
    message = pool_pb2.TensorSpec(dtype=pool_pb2.DATA_TYPE_FLOAT32, shape=[1] * 6)
    with pytest.raises(InvalidArgumentError, match=r"^input\.shape: expected at most 5 dims, got 6$"):
        decode_spec(message, "input")

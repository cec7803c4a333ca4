"""Random layers, parameters and shapes for property tests."""

from dataclasses import MISSING, fields
from functools import cache

from hypothesis import strategies as st

from poolrpc import LAYERS, STEPS
from poolrpc._shapes.limits import MAX_BINS, MAX_NORMALIZED_CHANNELS, MAX_NUMEL, MAX_PARAMETER, MAX_SAMPLES
from poolrpc._shapes.parameters import per_axis
from poolrpc.layers import FLOATS, INTEGERS
from tests.reduces import REDUCES

CLASSES = tuple(LAYERS.values())


def classes(dims):
    """Return the layers for `dims` spatial axes."""
    return tuple(cls for cls in CLASSES if cls.spatial_dims == dims)


def one_or_per_axis(values, dims):
    """Draw one value, or a tuple of one value per axis."""
    return st.one_of(values, st.tuples(*[values] * dims))


@st.composite
def layers(draw, among=CLASSES, *, most=MAX_PARAMETER, most_output=MAX_NUMEL, indices=True):
    """Draw a layer with parameters within their bounds; `most` limits its windows, `most_output` its output size."""
    cls = draw(st.sampled_from(among))
    dims, sizes = cls.spatial_dims, st.integers(1, most)
    arguments = {}

    def padding():
        limits = [kernel - 1 for kernel in per_axis(arguments["kernel_size"], dims)]
        each = st.tuples(*(st.integers(0, limit) for limit in limits))
        if cls.family == "max_unpool":
            return st.one_of(st.integers(0, min(limits)), each)
        pairs = st.tuples(*(st.tuples(*[st.integers(0, limit)] * 2) for limit in limits))
        return st.one_of(st.integers(0, min(limits)), each, pairs, st.sampled_from(("same", "same_lower", "valid")))

    def output_size():
        cells = st.integers(1, most_output)
        if cls.operand == "boxes":
            return one_or_per_axis(st.integers(1, min(most_output, MAX_BINS)), dims)
        if cls.family.startswith("adaptive"):
            return st.one_of(cells, st.tuples(*[st.none() | cells] * dims))
        return st.none() | one_or_per_axis(cells, dims)

    makers = {
        "kernel_size": lambda: one_or_per_axis(sizes, dims),
        "stride": lambda: st.none() | one_or_per_axis(sizes, dims) | st.integers(1, MAX_PARAMETER),
        "padding": padding,
        "dilation": lambda: one_or_per_axis(sizes, dims),
        "ceil_mode": lambda: st.just(False) if isinstance(arguments.get("padding"), str) else st.booleans(),
        "count_include_pad": st.booleans,
        "return_indices": st.booleans if indices else lambda: st.just(False),
        "divisor_override": lambda: st.none() | st.integers(-(2**63), 2**63 - 1).filter(bool),
        "norm_type": lambda: st.floats(0.01, 1000) | st.just(float("inf")),
        "output_size": output_size,
        "output_ratio": lambda: one_or_per_axis(st.floats(0, 1, exclude_min=True, exclude_max=True), dims),
        "seed": lambda: st.integers(0, 2**64 - 1),
        "reduce": lambda: st.sampled_from(REDUCES),
        "spatial_scale": lambda: st.floats(0.001, 1000),
        "sampling_ratio": lambda: st.integers(0, MAX_SAMPLES),
        "aligned": st.booleans,
    }
    if cls.family == "blur_pool":
        makers["kernel_size"] = makers["stride"] = lambda: st.integers(1, min(most, 100))
    if cls.family == "pool":
        makers["count_include_pad"] = lambda: st.booleans() if arguments["reduce"] == "mean" else st.just(False)
    for parameter in fields(cls):
        name = parameter.name
        # A fractional layer takes either output_size or output_ratio.
        if name == "output_ratio" and arguments["output_size"] is not None:
            continue
        arguments[name] = draw(makers[name]())
    return cls(**arguments)


NUMBERS = st.floats(-(10**6), 10**6, width=32)


@st.composite
def steps(draw):
    """Draw an element-wise step."""
    name = draw(st.sampled_from(sorted(STEPS)))
    if name == "ToDtype":
        return STEPS[name](draw(st.sampled_from(FLOATS + INTEGERS)), draw(st.booleans()))
    if name == "Round":
        return STEPS[name]()
    channels = draw(st.integers(1, MAX_NORMALIZED_CHANNELS))
    mean, std = (draw(each | st.tuples(*[each] * channels)) for each in (NUMBERS, NUMBERS.filter(bool)))
    return STEPS[name](mean, std)


def nearly(low, most):
    """Draw an integer in low..most, or sometimes just below."""
    return st.sampled_from([*range(low, most + 1)] * 4 + [low - 1, low - 2])


@cache
def parameters(cls, most=6):
    """Draw small arguments for a layer, of the right types, in or out of their bounds."""
    dims = cls.spatial_dims
    sizes, flags = nearly(1, most), st.booleans()
    strategies = {
        "kernel_size": one_or_per_axis(sizes, dims),
        "stride": one_or_per_axis(sizes, dims),
        "padding": one_or_per_axis(nearly(0, most // 2), dims),
        "dilation": one_or_per_axis(sizes, dims),
        "ceil_mode": flags,
        "count_include_pad": flags,
        "return_indices": flags,
        "divisor_override": sizes,
        "norm_type": st.sampled_from([1, 2, 1.5, 3.0, 2.0, 2.5, float("inf"), -1.0]),
        "output_size": sizes | st.tuples(*[st.none() | sizes] * dims),
        "output_ratio": one_or_per_axis(st.floats(0.01, 0.99), dims),
        "seed": st.integers(0, 3),
        "reduce": st.sampled_from(REDUCES),
        "spatial_scale": st.floats(0.1, 2),
        "sampling_ratio": nearly(0, 3),
        "aligned": flags,
    }
    if cls.family == "blur_pool":
        strategies["kernel_size"] = strategies["stride"] = sizes
    if cls.family == "pool":  # with which count_include_pad is valid
        strategies["reduce"] = st.just("mean")
    if cls.family == "max_unpool":
        strategies["output_size"] = st.tuples(*[st.integers(0, 4 * most)] * dims)
    names = {each.name: each.default is MISSING for each in fields(cls)}
    if cls.family != "fractional_max_pool":
        return _dictionaries(strategies, names)
    # A fractional layer requires either output_size or output_ratio.
    strategies["output_size"] = one_or_per_axis(sizes, dims)
    size, ratio = names | {"output_size": True}, names | {"output_ratio": True}
    del size["output_ratio"], ratio["output_size"]
    return _dictionaries(strategies, size) | _dictionaries(strategies, ratio)


def _dictionaries(strategies, names):
    required = {name: strategies[name] for name, needed in names.items() if needed}
    return st.fixed_dictionaries(required, optional={name: strategies[name] for name in names if name not in required})


def shapes(dims, most=7, *, zeros=False):
    """Draw a channels-first shape, batched or not; N may be 0, and with `zeros` sometimes another axis too."""
    size = st.sampled_from([*range(1, most + 1)] * 6 + [0] * zeros)
    tail = [size] * (dims + 1)
    return st.tuples(st.integers(0, 3), *tail) | st.tuples(*tail)

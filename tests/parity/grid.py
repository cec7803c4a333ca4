"""The grid of layers, shapes and dtypes for which results are compared with torch's. A new layer adds a row to GRID."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from functools import cache
from itertools import combinations, product
from random import Random
from typing import TYPE_CHECKING, Any

import poolrpc as p
from tests.operand_bytes import operand_for
from tests.reduces import REDUCES

if TYPE_CHECKING:
    from collections.abc import Iterator

Case = tuple[p.Layer, tuple[int, ...], str]
"""A layer, the shape of its input, and a dtype."""

FEW_LAYERS = 15
"""A row of fewer layers is combined with every lead and dtype; one of more with one lead and two dtypes in turn."""

DRAWS, COVERAGE = 600, 2
"""The least number of cases to draw a sample from, and how many cases of the sample have each pair of features."""

SIZES = {
    1: [(1,), (2,), (7,), (32,), (101,)],
    2: [(1, 1), (2, 5), (8, 8), (13, 7), (33, 20)],
    3: [(1, 2, 3), (4, 4, 4), (5, 9, 6)],
}
LEADS = [(2, 3), (1, 1), (3,)]


def windows(cls: type[p.Layer], **more: list[Any]) -> list[p.Layer]:
    """Return a layer for every combination of kernel, stride and other parameters that the class accepts."""
    axes = {"kernel_size": [1, 2, 3, 5], "stride": [None, 1, 2, 3], **more}
    made = []
    for each in product(*axes.values()):
        try:
            made.append(cls(**dict(zip(axes, each, strict=True))))
        except p.InvalidArgumentError:
            continue
    return made


PADDED = {
    dims: [{"padding": "same"}, {"padding": "same_lower"}, {"padding": ((2, 1),) * dims}, {"padding": ((0, 2),) * dims}]
    for dims in SIZES
}


def padded(cls: type[p.Layer], **more: list[Any]) -> list[p.Layer]:
    """Return layers whose padding torch.nn lacks, for every combination of other parameters."""
    return [
        cls(kernel, stride, **padding, **dict(zip(more, each, strict=True)))
        for kernel, stride, padding in product([3, 4], [1, 2], PADDED[cls.spatial_dims])
        for each in product(*more.values())
    ]


BOTH = [False, True]
PADDINGS: list[dict[str, Any]] = [{}, {"padding": "same"}, {"padding": 2, "ceil_mode": True}]
MAXES = {"padding": [0, 1], "dilation": [1, 2], "ceil_mode": BOTH, "return_indices": BOTH}
MEANS = {"padding": [0, 1], "ceil_mode": BOTH, "count_include_pad": BOTH}
POWERS = {"norm_type": [1.0, 2.0, 3.5, float("inf")], "ceil_mode": BOTH}
SEEDS = [0, 1, 2**64 - 1]
PERMUTED = {2: [{"kernel_size": (3, 2), "stride": (1, 2)}], 3: [{"kernel_size": (2, 3, 1), "stride": (1, 2, 3)}]}

GRID: dict[str, list[p.Layer]] = {
    "MaxPool1d": [*windows(p.MaxPool1d, **MAXES), *padded(p.MaxPool1d, return_indices=BOTH, dilation=[1, 2])],
    "MaxPool2d": [
        *windows(p.MaxPool2d, **MAXES),
        *padded(p.MaxPool2d, return_indices=BOTH, dilation=[1, 2]),
        p.MaxPool2d((2, 4), stride=(1, 3), padding=((1, 0), (3, 1)), return_indices=True, ceil_mode=True),
        p.MaxPool2d((3, 2), stride=(1, 2), padding=(1, 0), dilation=(1, 2)),
        p.MaxPool2d((1, 5), stride=(2, 1), padding=(0, 2), return_indices=True, ceil_mode=True),
    ],
    "MaxPool3d": [
        *windows(p.MaxPool3d, **MAXES),
        *padded(p.MaxPool3d, return_indices=BOTH),
        p.MaxPool3d((2, 3, 1), stride=(1, 2, 3), padding=(1, 1, 0)),
    ],
    "AvgPool1d": [*windows(p.AvgPool1d, **MEANS), *padded(p.AvgPool1d, count_include_pad=BOTH)],
    "AvgPool2d": [
        *windows(p.AvgPool2d, **MEANS, divisor_override=[None, 3, -2]),
        *padded(p.AvgPool2d, count_include_pad=BOTH, divisor_override=[None, 3, -1]),
        p.AvgPool2d((2, 4), stride=(1, 3), padding=((1, 0), (3, 1)), ceil_mode=True),
        p.AvgPool2d((3, 2), stride=(1, 2), padding=(1, 0), count_include_pad=False),
    ],
    "AvgPool3d": [
        *windows(p.AvgPool3d, **MEANS, divisor_override=[None, -3]),
        *padded(p.AvgPool3d, count_include_pad=BOTH),
        p.AvgPool3d((2, 3, 1), padding=(1, 0, 0)),
    ],
    "LPPool1d": windows(p.LPPool1d, **POWERS),
    "LPPool2d": [*windows(p.LPPool2d, **POWERS), p.LPPool2d(2, (3, 2), stride=(1, 2))],
    "LPPool3d": [*windows(p.LPPool3d, **POWERS), p.LPPool3d(2, (2, 3, 1), stride=(1, 2, 3))],
    "FractionalMaxPool2d": [
        p.FractionalMaxPool2d(k, return_indices=r, seed=s, **out)
        for k, r, s, out in product(
            [1, 2, (3, 2)], BOTH, SEEDS, [{"output_size": 1}, {"output_size": (3, 2)}, {"output_ratio": (0.5, 0.71)}]
        )
    ],
    "FractionalMaxPool3d": [
        p.FractionalMaxPool3d(k, return_indices=r, seed=s, **out)
        for k, r, s, out in product([1, 2], BOTH, SEEDS, [{"output_size": (1, 2, 3)}, {"output_ratio": 0.6}])
    ],
    "AdaptiveMaxPool1d": [p.AdaptiveMaxPool1d(o, r) for o, r in product([1, 2, 3, 7, 40, (None,)], BOTH)],
    "AdaptiveMaxPool2d": [p.AdaptiveMaxPool2d(o, r) for o, r in product([1, 2, (3, 5), (None, 4), (7, 1), 40], BOTH)],
    "AdaptiveMaxPool3d": [p.AdaptiveMaxPool3d(o, r) for o, r in product([1, 2, (3, 5, 2), (None, 4, None)], BOTH)],
    "AdaptiveAvgPool1d": [p.AdaptiveAvgPool1d(o) for o in (1, 2, 3, 7, 40, (None,))],
    "AdaptiveAvgPool2d": [p.AdaptiveAvgPool2d(o) for o in (1, 2, (3, 5), (None, 4), (7, 1), 40)],
    "AdaptiveAvgPool3d": [p.AdaptiveAvgPool3d(o) for o in (1, 2, (3, 5, 2), (None, 4, None))],
    "MaxUnpool1d": [p.MaxUnpool1d(k, s, d) for k, s, d in product([2, 3], [None, 2, 3], [0, 1])],
    "MaxUnpool2d": [
        *(p.MaxUnpool2d(k, s, d) for k, s, d in product([2, 3], [None, 2, 3], [0, 1])),
        p.MaxUnpool2d((3, 2), stride=(3, 2), padding=(1, 0)),
    ],
    "MaxUnpool3d": [p.MaxUnpool3d(k, s, d) for k, s, d in product([2, 3], [None, 2], [0, 1])],
    **{f"GlobalPool{dims}d": [p.LAYERS[f"GlobalPool{dims}d"](r) for r in REDUCES] for dims in SIZES},
    **{
        f"Pool{dims}d": [
            p.LAYERS[f"Pool{dims}d"](r, k, s, **padding, dilation=d)
            for r, (k, s), padding, d in product(REDUCES, [(2, None), (3, 1), (4, 3)], PADDINGS, [1, 2])
            if k > 2 or not padding
        ]
        for dims in SIZES
    },
    "BlurPool2d": [p.BlurPool2d(*each) for each in ((), (1, 1), (2, 2), (3, 1), (4, 3), (5, 2))],
    "SegmentPool": [p.SegmentPool(r) for r in REDUCES],
    "RoIPool": [p.RoIPool(o, s) for o, s in product([1, 3, (2, 5)], [1.0, 0.5])],
    "RoIAlign": [p.RoIAlign(o, s, r, aligned) for o, s, r, aligned in product([1, (2, 3)], [1.0, 0.5], [0, 2], BOTH)],
}


def cases(name: str) -> Iterator[Case]:
    """Yield the full grid of a layer: each of its layers with each shape that it accepts, and dtypes in turn."""
    turn = 0
    layers = GRID[name]
    few = len(layers) < FEW_LAYERS
    for layer in layers:
        for size in SIZES[layer.spatial_dims]:
            turn += 1
            for lead in LEADS if few else [LEADS[turn % 3]]:
                if not accepts(layer, (*lead, *size)):
                    continue
                dtypes = layer.dtypes if few else [layer.dtypes[(2 * turn + i) % len(layer.dtypes)] for i in (0, 1)]
                for dtype in dtypes:
                    yield layer, (*lead, *size), dtype


@cache
def sampled(name: str) -> tuple[Case, ...]:
    """Return a sample of a layer's grid, always the same one, that has every pair of features of the cases drawn.

    A feature is the value of a parameter, the dtype, the plane's size, or the leading axes.
    """
    random = Random(name)  # noqa: S311 - a sample that is always the same
    seen: Counter[object] = Counter()
    chosen = []
    drawn = [(layer, dtype) for layer in GRID[name] for dtype in layer.dtypes]
    drawn *= max(COVERAGE, DRAWS // len(drawn))
    random.shuffle(drawn)
    for layer, dtype in drawn:
        shapes = [(*lead, *size) for lead, size in product(LEADS, SIZES[layer.spatial_dims])]
        fitting = [shape for shape in shapes if accepts(layer, shape)]
        if not fitting:
            continue
        case = layer, random.choice(fitting), dtype
        pairs = list(combinations(features(case), 2))
        if any(seen[pair] < COVERAGE for pair in pairs):
            seen.update(pairs)
            chosen.append(case)
    return tuple(chosen)


def features(case: Case) -> list[tuple[str, object]]:
    """Return a case's features, each with its name."""
    layer, shape, dtype = case
    dims = layer.spatial_dims
    parameters = [(each.name, getattr(layer, each.name)) for each in fields(layer)]
    return [*parameters, ("dtype", dtype), ("size", shape[-dims:]), ("lead", shape[:-dims])]


def accepts(layer: p.Layer, shape: tuple[int, ...]) -> bool:
    """Return whether a layer can pool a tensor of that shape."""
    try:
        operand, _ = operand_for([(layer,)], shape)
        layer.output_shape(shape, None if operand is None else operand.shape)
    except p.InvalidArgumentError:
        return False
    return True

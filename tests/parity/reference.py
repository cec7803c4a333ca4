"""torch.nn's results, and the comparison with them."""

from __future__ import annotations

import math
from dataclasses import fields
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch

from tests.parity.definitions import blurred, defined, reduced

if TYPE_CHECKING:
    import poolrpc as p


def values(shape: tuple[int, ...], dtype: str, seed: int) -> torch.Tensor:
    """Return random values: integers of the full range, or floats with ties, both zeros, infinities and NaN.

    Half of the seeds give floats without infinities and NaN, so that their sums stay finite; one in four has many.
    """
    generator = torch.Generator().manual_seed(seed)
    kind: torch.dtype = getattr(torch, dtype)
    if not kind.is_floating_point:
        # torch draws no uint16, and bool has no range.
        info = torch.iinfo(kind) if dtype != "bool" else SimpleNamespace(min=0, max=2)
        wide = torch.int32 if dtype in {"uint16", "bool"} else kind
        return torch.randint(info.min, info.max, shape, generator=generator, dtype=wide).to(kind)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = torch.where(torch.rand(shape, generator=generator) < 0.2, x.round(), x).to(kind)
    special = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0], dtype=kind)
    picks = torch.randint(0, len(special), shape, generator=generator)
    share = (0.0, 0.04, 0.0, 0.4)[seed % 4]
    return torch.where(torch.rand(shape, generator=generator) < share, special[picks], x)


def samples(seed: int, planes: int, axes: int) -> list[list[float]]:
    """Return SplitMix64's samples, plane by plane: an independent implementation of what the docs describe."""
    mask = 2**64 - 1
    drawn = []
    for counter in range(1, planes * axes + 1):
        z = (seed + counter * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        drawn.append(((z ^ (z >> 31)) >> 40) / 2**24)
    return [drawn[i : i + axes] for i in range(0, len(drawn), axes)]


def reference(  # noqa: C901, PLR0911, PLR0912 - a case for each family
    layer: p.Layer, x: torch.Tensor, indices: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return torch.nn's output, and its indices if the layer returns them; that of a step is of (N, C, spatial...)."""
    dims = layer.spatial_dims
    if not dims:
        return step(layer, x), None
    if layer.family == "blur_pool":
        return blurred(layer, x).to(x.dtype), None
    if layer.family == "max_unpool" and not x.is_floating_point():
        return unpooled(layer, x, indices), None
    if x.dtype == torch.uint16:  # of which torch has no maximum
        output, chosen = reference(layer, x.to(torch.int32))
        return output.to(torch.uint16), chosen
    if layer.family in {"max_pool", "avg_pool"} and not torch_accepts(layer):
        return defined(layer, x)
    parameters = {each.name: getattr(layer, each.name) for each in fields(layer)}
    if layer.family == "pool" or (layer.family == "global_pool" and layer.reduce not in {"max", "mean"}):
        return reduced(layer, x).to(x.dtype), None
    if layer.family == "global_pool":
        if not x.is_floating_point():
            return reduced(layer, x).to(x.dtype), None
        name = "AdaptiveMaxPool" if layer.reduce == "max" else "AdaptiveAvgPool"
        return getattr(torch.nn, f"{name}{dims}d")(1)(x), None
    if layer.family == "max_unpool":
        size = parameters.pop("output_size")
        return getattr(torch.nn, layer.name)(**parameters)(x, indices, output_size=size), None
    if layer.family == "fractional_max_pool":
        lead = x.shape[:-dims] if x.ndim == dims + 2 else (1, *x.shape[:-dims])
        # Half precision is computed in float32: torch's own arithmetic there puts windows outside of the plane.
        wide = x.float() if x.dtype.itemsize == 2 else x
        plain = samples(parameters.pop("seed"), lead[0] * lead[1], dims)
        drawn = torch.tensor(plain, dtype=wide.dtype, device=x.device)
        parameters["return_indices"] = True
        output, chosen = getattr(torch.nn, layer.name)(**parameters, _random_samples=drawn.reshape(*lead, dims))(wide)
        return output.to(x.dtype), chosen if layer.returns_indices else None
    if layer.name == "MaxPool1d" and not x.is_floating_point():
        output, chosen = torch.nn.MaxPool1d(**{**parameters, "return_indices": True})(x)
        return output, chosen if layer.returns_indices else None
    if "output_size" in parameters and None in np.atleast_1d(parameters["output_size"]):
        sizes = x.shape[-dims:]
        parameters["output_size"] = tuple(
            s if o is None else o for s, o in zip(sizes, parameters["output_size"], strict=True)
        )
    name = layer.name
    if layer.family == "lp_pool" and parameters["norm_type"] == np.inf:  # which torch's LPPool3d has from 2.12 on
        name, x = f"MaxPool{dims}d", x.abs()
        del parameters["norm_type"]
    answer = getattr(torch.nn, name)(**parameters)(x)
    return answer if isinstance(answer, tuple) else (answer, None)


def torch_accepts(layer: p.Layer) -> bool:
    """Return whether torch.nn has a layer's padding: at most half of the kernel."""
    if isinstance(layer.padding, str) or np.ndim(layer.padding) > 1:
        return False
    padding, kernel = (np.broadcast_to(each, layer.spatial_dims) for each in (layer.padding, layer.kernel_size))
    return bool((padding <= kernel // 2).all())


def unpooled(layer: p.Layer, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the result of MaxUnpool for integers, which torch lacks: each value at its index, zeros elsewhere."""
    shape = layer.output_shape(tuple(x.shape))
    planes = int(np.prod(x.shape[: -layer.spatial_dims]))
    output = np.zeros((planes, int(np.prod(shape[-layer.spatial_dims :]))), dtype=x.numpy().dtype)
    for plane, cells, places in zip(output, x.reshape(planes, -1), indices.reshape(planes, -1), strict=True):
        plane[places.numpy()] = cells.numpy()
    return torch.from_numpy(output.reshape(shape))


def step(layer: p.Layer, x: torch.Tensor) -> torch.Tensor:  # noqa: PLR0911 - a case for each rule
    """Return what torchvision.transforms.v2 (0.29) and torch.round compute, with channels first."""
    if layer.name == "Round":
        return torch.round(x)
    if layer.name == "Normalize":
        numbers = (torch.as_tensor(np.atleast_1d(each), dtype=torch.float64) for each in (layer.mean, layer.std))
        mean, std = (each.to(x.device, x.dtype).view(-1, *(1,) * (x.ndim - 2)) for each in numbers)
        return x.sub(mean).div_(std)
    dtype: torch.dtype = getattr(torch, layer.dtype)
    floats = x.is_floating_point(), dtype.is_floating_point
    if x.dtype == dtype:
        return x
    if floats == (True, False):
        return truncated(x.mul(torch.iinfo(dtype).max + 1.0 - 1e-3) if layer.scale else x, dtype)
    if not layer.scale or floats == (True, True):
        return x.to(dtype)
    if dtype.is_floating_point:
        return x.to(dtype).mul_(1.0 / (1 if x.dtype == torch.bool else torch.iinfo(x.dtype).max))
    bits = {"uint8": 8, "int8": 7, "int16": 15, "uint16": 16, "int32": 31, "int64": 63}
    by = bits[layer.dtype] - bits[str(x.dtype).removeprefix("torch.")]
    if by < 0:
        return (x / 2**-by).to(dtype) if x.dtype == torch.uint16 else x.bitwise_right_shift(-by).to(dtype)
    return x.to(dtype) * 2**by if dtype == torch.uint16 else x.to(dtype).bitwise_left_shift_(by)


def truncated(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return floats as integers by the definition of ToDtype: truncated, cut to the range, and 0 for NaN."""
    limits = torch.iinfo(dtype)

    def integer(cell: float) -> int:
        if math.isnan(cell):
            return 0
        if math.isinf(cell):
            return limits.max if cell > 0 else limits.min
        return min(max(int(cell), limits.min), limits.max)

    cells = [integer(cell) for cell in x.double().reshape(-1).tolist()]
    return torch.from_numpy(np.array(cells, str(dtype).removeprefix("torch."))).reshape(x.shape).to(x.device)


def as_torch(array: np.ndarray) -> torch.Tensor:
    """Return a client's array as a tensor; it may be bfloat16."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def assert_same(got: np.ndarray | torch.Tensor, expected: torch.Tensor, what: object) -> None:
    """Compare an output with torch's: dtype, shape, every value, and the positions of NaN."""
    tensor = got if isinstance(got, torch.Tensor) else as_torch(got)
    assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape), what
    same = tensor == expected
    if expected.is_floating_point():
        same |= tensor.isnan() & expected.isnan()
    assert bool(same.all()), what


NEAR = {torch.float64: 1e-12, torch.float32: 2**-22, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""The relative error of what is computed in float64 and rounded once; of float64, that of powers and exponentials."""

SUM_ERROR = 2e-4
"""The error of a sum of these values in float32."""


def assert_result(got: np.ndarray | torch.Tensor, expected: torch.Tensor, layer: p.Layer, what: object) -> None:
    """Compare an output with torch's bit for bit, or with a definition that is computed in float64 within a bound."""
    reduce = "mean" if layer.family == "blur_pool" else getattr(layer, "reduce", "max")
    in_torch = layer.family == "global_pool" and reduce == "mean"
    if reduce in {"max", "min", "median"} or in_torch or not expected.is_floating_point():
        assert_same(got, expected, what)
        return
    tensor = got if isinstance(got, torch.Tensor) else as_torch(got)
    assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape), what
    near = NEAR[expected.dtype]
    sums = SUM_ERROR if reduce in {"sum", "mean"} and expected.dtype != torch.float64 else 1e-12
    torch.testing.assert_close(tensor.double(), expected.double(), rtol=near, atol=sums, equal_nan=True, msg=str(what))

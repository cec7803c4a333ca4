"""The arithmetic of the element-wise steps on tensors, on any device."""

from __future__ import annotations

from math import inf, nextafter

import torch

SCALE_MARGIN = 1e-3
"""What torchvision leaves of the range between two integers, so that each has an equal share of 0 to 1."""

INT64_LIMIT = 2.0**63
"""The smallest float64 above the range of int64."""

BELOW_INT64_LIMIT = nextafter(INT64_LIMIT, -inf)


def convert(x: torch.Tensor, out: torch.Tensor, *, scale: bool) -> None:
    """Write each cell of x to `out`, as ToDtype converts it to the dtype of `out`.

    This is torchvision.transforms.v2.functional.to_dtype_image (torchvision 0.29), except for floats that are out of
    the range of an integer dtype.
    """
    floats = x.is_floating_point(), out.is_floating_point()
    if x.dtype == out.dtype or floats == (True, True):
        out.copy_(x)
    elif floats == (True, False):
        _truncate(x.mul(torch.iinfo(out.dtype).max + 1.0 - SCALE_MARGIN) if scale else x, out)
    elif not scale:
        out.copy_(x)
    elif floats == (False, True):
        out.copy_(x).mul_(1.0 / _largest(x.dtype))
    else:
        _shift(x, out)


def _truncate(x: torch.Tensor, out: torch.Tensor) -> None:
    """Truncate floats; values out of range become the nearest value, and NaN becomes 0."""
    limits = torch.iinfo(out.dtype)
    # In a dtype that represents the limits exactly.
    narrow = out.dtype.itemsize <= torch.int16.itemsize and x.dtype.itemsize <= torch.float32.itemsize
    wide = torch.nan_to_num(x.to(torch.float32 if narrow else torch.float64), 0.0, inf, -inf)
    if out.dtype != torch.int64:
        out.copy_(wide.clamp_(limits.min, limits.max))
        return
    above = wide >= INT64_LIMIT
    out.copy_(wide.clamp_(-INT64_LIMIT, BELOW_INT64_LIMIT)).masked_fill_(above, limits.max)


def _shift(x: torch.Tensor, out: torch.Tensor) -> None:
    """Scale integers to the range of another integer dtype by a shift of their bits."""
    by = _largest(x.dtype).bit_length() - _largest(out.dtype).bit_length()
    if x.dtype == torch.uint16:  # which torch does not shift
        x = x.to(torch.int32)
    if by > 0:
        out.copy_(x >> by)
    elif out.dtype == torch.uint16:
        out.copy_(x.to(torch.int32) << -by)
    else:
        out.copy_(x).bitwise_left_shift_(-by)


def _largest(dtype: torch.dtype) -> int:
    return 1 if dtype == torch.bool else torch.iinfo(dtype).max


def flip(x: torch.Tensor) -> torch.Tensor:
    """Return uint16 cells as int16 cells of the same order, or int16 cells as the uint16 cells that they stand for."""
    unsigned = x.dtype == torch.uint16
    flipped = (x.view(torch.int16) if unsigned else x) ^ torch.iinfo(torch.int16).min
    return flipped if unsigned else flipped.view(torch.uint16)


def channel_numbers(numbers: float | tuple[float, ...], count: int, like: torch.Tensor) -> torch.Tensor:
    """Return the numbers of a Normalize for so many planes, from the first channel on, in the dtype of a tensor."""
    values = upload(torch.tensor(numbers if isinstance(numbers, tuple) else (numbers,), dtype=like.dtype), like)
    return values[torch.arange(count, device=like.device) % len(values)]


def upload(numbers: torch.Tensor, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return numbers that are in the host's memory on the device of another tensor, in a dtype.

    CUDA copies from pageable memory only when all that was queued on the stream is done, and the next block of planes
    could not be queued before. torch keeps a page-locked copy until the device has read it.
    """
    numbers = numbers.to(dtype or numbers.dtype)
    if like.device.type != "cuda":
        return numbers.to(like.device)
    return numbers.contiguous().pin_memory().to(like.device, non_blocking=True)

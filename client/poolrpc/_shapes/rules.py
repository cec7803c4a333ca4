"""torch's rules for the size of a pooled axis, in Python ints: exact for any size, and free of torch."""

from __future__ import annotations

from poolrpc._shapes.limits import MAX_NUMEL
from poolrpc.errors import InvalidArgumentError


def pooled(  # noqa: PLR0913 - one argument a parameter of the rule
    size: int, kernel: int, stride: int, padding: int = 0, dilation: int = 1, *, ceil_mode: bool = False
) -> int:
    """Give the output size of an axis under a sliding window.

    floor((size + 2*padding - dilation*(kernel - 1) - 1) / stride) + 1, with ceil for floor where ceil_mode is set; then
    a last window that would start in the right padding or beyond is dropped. The rule is that of pooling_output_shape
    in PyTorch's aten/src/ATen/native/Pool.h, whose printed formulas (torch.nn's docs) leave the last part out.

    The result is below 1 where no window fits.
    """
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return span // stride + 1
    out = -(-span // stride) + 1
    return out - 1 if starts_outside(out, size, stride, padding) else out


def starts_outside(out: int, size: int, stride: int, padding: int) -> bool:
    """Tell whether the last of `out` windows starts right of the input, where ceil_mode drops it."""
    return (out - 1) * stride >= size + padding


def unpooled(size: int, kernel: int, stride: int, padding: int) -> int:
    """Give the default output size of an axis that MaxUnpool restores (torch.nn.functional._unpool_output_size)."""
    return (size - 1) * stride + kernel - 2 * padding


def adaptive_window(index: int, size: int, out: int) -> tuple[int, int]:
    """Give the start and the end of window `index` of an adaptive layer (aten/src/ATen/native/AdaptivePooling.h)."""
    return index * size // out, -(-(index + 1) * size // out)


def fractional(size: int, ratio: float) -> int:
    """Give the output size of an axis of a fractional layer, as torch.nn.functional truncates it."""
    return int(size * ratio)


def check_shape(shape: tuple[int, ...], spatial_dims: int | None) -> int:
    """Check that a shape, of either layout, can be pooled and give its number of spatial axes.

    Args:
        shape: (N, C, spatial...) or (C, spatial...); only (N, C, spatial...) where spatial_dims is None.
        spatial_dims: How many axes are spatial, or None where the layers take any number.

    Raises:
        InvalidArgumentError: The rank doesn't fit, or an axis is out of its range.

    """
    rank = len(shape)
    if spatial_dims is None:
        if rank not in (3, 4, 5):
            msg = f"expected a batched tensor of 3, 4 or 5 dims (N, C, spatial...), got shape {clip(shape)}"
            raise InvalidArgumentError(msg, field="shape")
        spatial_dims = rank - 2
    elif rank not in (spatial_dims + 1, spatial_dims + 2):
        msg = (
            f"expected {spatial_dims + 2} dims (N, C, spatial...) or {spatial_dims + 1} dims (C, spatial...) "
            f"for a {spatial_dims}d layer, got shape {clip(shape)}"
        )
        raise InvalidArgumentError(msg, field="shape")
    batched = rank == spatial_dims + 2
    if any(size < 1 for size in shape[batched:]) or shape[0] < 0 or max(shape) > MAX_NUMEL:
        msg = f"expected every dim to be 1 to {MAX_NUMEL} (N may be 0), got shape {clip(shape)}"
        raise InvalidArgumentError(msg, field="shape")
    return spatial_dims


def clip(value: object, most: int = 120) -> str:
    """Give repr(value), cut so that a hostile value can't fill a message."""
    if isinstance(value, list | tuple) and len(value) > most:
        value = value[:most]  # its repr is longer than `most` all the same
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = f"<{type(value).__name__} too long to print>"
    return text if len(text) <= most else f"{text[: most - 3]}..."

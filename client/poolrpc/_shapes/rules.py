"""torch's rules for the size of a pooled axis, in Python ints: exact for any size, without torch."""

from __future__ import annotations

from poolrpc._shapes.limits import MAX_NUMEL
from poolrpc.errors import InvalidArgumentError


def pooled_size(  # noqa: PLR0913 - one argument per parameter of the rule
    size: int,
    kernel: int,
    stride: int,
    padding: int = 0,
    dilation: int = 1,
    *,
    padding_end: int | None = None,
    ceil_mode: bool = False,
) -> int:
    """Return the output size of an axis that a window slides over; below 1 if no window fits.

    The rule is floor((size + 2*padding - dilation*(kernel - 1) - 1) / stride) + 1, with ceil in place of floor if
    ceil_mode is set; a last window that would start in the right padding or beyond is then dropped. If padding_end is
    given, it is the padding after the axis. This is pooling_output_shape_pad_lr in PyTorch's
    aten/src/ATen/native/Pool.h; the formulas in torch.nn's documentation leave out the dropped window.
    """
    after = padding if padding_end is None else padding_end
    span = size + padding + after - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return span // stride + 1
    out = -(-span // stride) + 1
    return out - 1 if last_window_starts_outside(out, size, stride, padding) else out


def last_window_starts_outside(out: int, size: int, stride: int, padding: int) -> bool:
    """Return whether the last of `out` windows starts right of the input, in which case ceil_mode drops it."""
    return (out - 1) * stride >= size + padding


def same_padding(size: int, stride: int, span: int, *, lower: bool) -> tuple[int, int]:
    """Return the padding before and after an axis for which it has ceil(size / stride) windows of `span` cells.

    Args:
        size: The length of the axis.
        stride: The step from window to window.
        span: The length of a window with the gaps of its dilation.
        lower: Whether an odd cell of padding is before the axis, rather than after it.

    """
    cells = max(0, (-(-size // stride) - 1) * stride + span - size)
    half = cells // 2
    return (cells - half, half) if lower else (half, cells - half)


def unpooled_size(size: int, kernel: int, stride: int, padding: int) -> int:
    """Return the default output size of an axis under MaxUnpool (torch.nn.functional._unpool_output_size)."""
    return (size - 1) * stride + kernel - 2 * padding


def adaptive_window(index: int, size: int, out: int) -> tuple[int, int]:
    """Return the start and the end of window `index` of an adaptive layer (aten/src/ATen/native/AdaptivePooling.h)."""
    return index * size // out, -(-(index + 1) * size // out)


def fractional_size(size: int, ratio: float) -> int:
    """Return the output size of an axis of a fractional layer, truncated as in torch.nn.functional."""
    return int(size * ratio)


def check_shape(shape: tuple[int, ...], spatial_dims: int) -> int:
    """Check that a shape, in either layout, can be pooled, and return its number of spatial axes.

    Args:
        shape: (N, C, spatial...) or (C, spatial...).
        spatial_dims: Number of spatial axes.

    Raises:
        InvalidArgumentError: The rank doesn't fit, or an axis is outside its range.

    """
    rank = len(shape)
    if rank not in (spatial_dims + 1, spatial_dims + 2):
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


def clip(value: object, limit: int = 120) -> str:
    """Return repr(value), cut to `limit` characters so that a hostile value can't fill a message."""
    if isinstance(value, list | tuple) and len(value) > limit:
        value = value[:limit]  # its repr is longer than `limit` anyway
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python prints
        text = f"<{type(value).__name__} too long to print>"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."

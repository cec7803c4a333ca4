"""The dtypes and the shape of each operand, by its name."""

from __future__ import annotations

from poolrpc._shapes.limits import MAX_NUMEL
from poolrpc._shapes.rules import clip
from poolrpc.errors import InvalidArgumentError

OPERAND_DTYPES: dict[str, tuple[str, ...]] = {
    "indices": ("int64",),
    "weights": ("float32", "float64"),
    "offsets": ("int64",),
    "boxes": ("float32", "float64"),
}
"""The dtypes of each operand on the wire, by its name."""

BOX_NUMBERS = 5
"""The numbers of a box: that of its image, x1, y1, x2, y2."""


def check_operand_shape(
    name: str, operand: tuple[int, ...], shape: tuple[int, ...], dims: int, field: str = "operand_shape"
) -> None:
    """Check the shape of an operand.

    Args:
        name: The name of the operand.
        operand: Its shape.
        shape: The shape of the input, checked, with channels first.
        dims: The number of spatial axes of the input.
        field: The name of the shape in the error.

    Raises:
        InvalidArgumentError: The operand has another shape.

    """
    if name == "weights":
        expected = (*shape[: -dims - 1], *shape[-dims:])
        fits, rule = operand == expected, f"{expected}, the input's without its channels"
    elif name == "offsets":
        fits = len(operand) == 1 and 2 <= operand[0] <= MAX_NUMEL  # noqa: PLR2004 - a segment has two offsets
        rule = "(S + 1,) for S segments, at least one"
    elif name == "boxes":
        fits = len(operand) == 2 and 0 <= operand[0] <= MAX_NUMEL and operand[1] == BOX_NUMBERS  # noqa: PLR2004 - (K, 5)
        rule = f"(K, {BOX_NUMBERS}) for K boxes"
        if fits and operand[0] and not shape[0] and len(shape) == dims + 2:
            fits, rule = False, f"(0, {BOX_NUMBERS}) for no images"
    else:
        fits, rule = operand == shape, f"the input's {shape}"
    if not fits:
        raise InvalidArgumentError(f"expected {rule}, got {clip(operand)}", field=field)

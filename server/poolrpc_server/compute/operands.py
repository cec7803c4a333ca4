"""The operands of requests that have another shape than the input: copies of their bytes, whose values are checked."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from poolrpc.chains import to_channels_first
from poolrpc.errors import InvalidArgumentError
from poolrpc_server.compute.kernels.segments import Segments, buckets_of
from poolrpc_server.compute.planes import images_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from poolrpc._wire.codec import Request
    from poolrpc.tensors import Bytes

MAX_COORDINATE = 2.0**30
"""The largest coordinate of a box, times the layer's spatial_scale: float32 still has one number for each."""


@dataclass(frozen=True, slots=True)
class WholeOperand:
    """An operand that every block of planes gets whole.

    Attributes:
        value: The checked copy of it, as the operator of its layer takes it.
        host: Whether the operator reads it in the host's memory, wherever the input is: that of boxes makes its tables
            of cells and weights with NumPy.

    """

    value: Any
    host: bool = False

    def on(self, device: torch.device) -> Any:  # noqa: ANN401 - as above
        """Return the value where the operator takes it for an input on a device."""
        return self.value if self.host else self.value.to(device)


def whole_operand(data: Bytes, request: Request, spatial_dims: int) -> WholeOperand:
    """Return a request's operand, other than indices, whose values are checked.

    A client that writes to shared memory can't change the copy after the check.

    Args:
        data: Its bytes.
        request: The request.
        spatial_dims: The number of spatial axes of its input.

    Raises:
        InvalidArgumentError: A value is out of range, or out of order.

    """
    spec, name = request.operand, request.operand_name
    assert spec is not None  # noqa: S101 - the caller has one
    if name == "offsets":
        shape = to_channels_first(request.input.shape, spatial_dims, request.input.layout)
        return WholeOperand(Segments(((prod(shape[:-1]), buckets_of(bytes(data), shape[-1])),)))
    copied = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
    if spec.numel:
        copied.view(-1).view(torch.uint8).copy_(torch.frombuffer(data, dtype=torch.uint8))
    if name == "weights":
        check_weights(copied)
        return WholeOperand(copied)
    check_boxes(
        copied,
        images_of(request.input, spatial_dims),
        max(getattr(chain[0], "spatial_scale", 1.0) for chain in request.branches if chain[0].operand),
    )
    return WholeOperand(copied, host=True)


def joined(operands: Sequence[WholeOperand], requests: Sequence[Request], spatial_dims: int) -> WholeOperand:
    """Return the operand of a batch: the planes of its requests, which have the same layers, follow each other.

    Args:
        operands: The operand of each request, checked: a box then names no image of another request.
        requests: The requests.
        spatial_dims: The number of spatial axes of their inputs.

    """
    name, values = requests[0].operand_name, [each.value for each in operands]
    if name == "offsets":
        return WholeOperand(Segments.joined(values))
    if name == "weights":
        plane = values[0].shape[-spatial_dims:]
        return WholeOperand(torch.cat([each.view(-1, *plane) for each in values]))
    boxes, images = torch.cat(values), (images_of(request.input, spatial_dims) for request in requests)
    starts = accumulate(images, initial=0)
    end = 0
    for start, each in zip(starts, values, strict=False):
        boxes[end : end + len(each), 0] += start
        end += len(each)
    return WholeOperand(boxes, host=True)


def check_weights(weights: torch.Tensor) -> None:
    """Check that weights are finite, and at least 0.

    Raises:
        InvalidArgumentError: They are not.

    """
    # NaN is neither at least 0 nor finite; it is both the min and the max of a tensor that has one.
    low, high = (float(weights.min()), float(weights.max())) if weights.numel() else (0.0, 0.0)
    if not (low >= 0 and high < float("inf")):
        raise InvalidArgumentError(f"expected finite weights of at least 0, got {low}..{high}", field="weights")


def check_boxes(boxes: torch.Tensor, images: int, scale: float) -> None:
    """Check that the coordinates of boxes are finite and not huge, and that there are their images.

    Args:
        boxes: The boxes, (K, 5).
        images: The number of images.
        scale: The largest spatial_scale of the layers.

    Raises:
        InvalidArgumentError: They are not, or there are not.

    """
    if not len(boxes):
        return
    largest = float(boxes[:, 1:].abs().max())
    if not largest * max(1.0, scale) <= MAX_COORDINATE:
        at = int((~(boxes[:, 1:].abs() * max(1.0, scale) <= MAX_COORDINATE)).any(1).int().argmax())
        msg = (
            f"expected finite coordinates within {MAX_COORDINATE:.0f} cells, got {boxes[at, 1:].tolist()} for box {at}"
        )
        raise InvalidArgumentError(msg, field="boxes")
    numbers = boxes[:, 0]
    wrong = ~((numbers >= 0) & (numbers < images) & (numbers == numbers.floor()))
    if bool(wrong.any()):
        at = int(wrong.int().argmax())
        msg = f"expected the number of an image, 0..{images - 1}, got {float(numbers[at]):g} for box {at}"
        raise InvalidArgumentError(msg, field="boxes")

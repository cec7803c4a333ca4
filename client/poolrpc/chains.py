"""Chains and branches of layers: their shapes, in either layout, and tensors as planes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import lcm, prod
from typing import TypeAlias

from poolrpc._shapes.limits import MAX_OUTPUTS
from poolrpc._shapes.operands import check_operand_shape
from poolrpc._shapes.parameters import integer
from poolrpc._shapes.rules import check_shape, clip
from poolrpc.errors import ExpressionError, InvalidArgumentError, LimitExceededError
from poolrpc.expression import parse_branches, parse_chain
from poolrpc.layers import Layer
from poolrpc.modules import TorchModule, is_module, layers_of
from poolrpc.tensors import ITEM_BYTES, LAYOUTS, Layout, TensorSpec

Shape: TypeAlias = tuple[int, ...]
Chain: TypeAlias = tuple[Layer, ...]
Outputs: TypeAlias = tuple[int, ...]
"""The numbers of the layers of a chain whose outputs are returned, in ascending order; empty: the last one."""


LayerLike: TypeAlias = Layer | str | TorchModule
"""A layer, an expression, or a pooling module of torch.nn; the last two may be a chain of layers."""
ChainLike: TypeAlias = LayerLike | Iterable[LayerLike]
"""What `as_chain` takes: one of these, or several in order."""


def as_chain(layers: ChainLike) -> Chain:
    """Return a layer, an expression or a module, or several in order, as a chain.

    Raises:
        InvalidArgumentError: There is no layer, an element is not one of these, or a module cannot be a layer.
        ExpressionError: A string is not an expression.

    """
    chain = _as_layers(layers)
    if chain is None:
        elements = tuple(layers) if isinstance(layers, Iterable) else ()
        parts = tuple(map(_as_layers, elements))
        if not parts or None in parts:
            nested = any(isinstance(each, list | tuple) for each in elements)
            hint = "; pool_each takes several branches" if nested else ""
            msg = f"expected a layer or a sequence of layers, got {clip(layers)}{hint}"
            raise InvalidArgumentError(msg, field="layers")
        chain = tuple(layer for part in parts for layer in part or ())
    if not chain:
        raise InvalidArgumentError("expected at least one layer, got an empty Sequential", field="layers")
    return chain


def as_branches(branches: LayerLike | Iterable[ChainLike]) -> tuple[Chain, ...]:
    """Return several branches, each of which `as_chain` takes, or a single one.

    Raises:
        InvalidArgumentError: There is no branch, `as_chain` does not take one, or the branches are a string of a list
            of layers, which is a chain for `parse_branches`, and several branches as a list.
        ExpressionError: A string is not an expression.

    """
    if isinstance(branches, str):
        try:
            single = parse_chain(branches)
        except ExpressionError:
            return parse_branches(branches)
        if len(single) > 1:
            msg = f"expected [[...]] for a chain, or [[...], [...]] for several branches, got {clip(branches)}"
            raise InvalidArgumentError(msg, field="branches")
        return (single,)
    if isinstance(branches, Layer) or is_module(branches):
        return (as_chain(branches),)
    chains = tuple(map(as_chain, branches)) if isinstance(branches, (tuple, Iterable)) else ()
    if not chains:
        msg = f"expected at least one branch, got {clip(branches)}"
        raise InvalidArgumentError(msg, field="branches")
    return chains


def as_steps(layers: ChainLike, steps: Iterable[int] | None) -> tuple[Chain, Outputs]:
    """Return a chain, and the numbers of its layers whose outputs are returned; None stands for all layers.

    Raises:
        InvalidArgumentError: `as_chain` does not take the layers, there is no number, or the chain has no such layer.
        ExpressionError: A string is not an expression.

    """
    chain = as_chain(layers)
    if steps is None:
        return chain, tuple(range(len(chain)))
    if not isinstance(steps, Iterable):
        raise InvalidArgumentError(f"expected the numbers of layers, got {clip(steps)}", field="steps")
    outputs = tuple(integer("steps", step, 0, len(chain) - 1) for step in steps)
    if not outputs:
        raise InvalidArgumentError("expected the number of at least one layer, got none", field="steps")
    return chain, outputs


def _as_layers(value: object) -> Chain | None:
    """Return the layers of a layer, an expression or a module; None for anything else."""
    if isinstance(value, Layer):
        return (value,)
    if isinstance(value, str):
        return parse_chain(value)
    return layers_of(value) if is_module(value) else None


def check_layout(layout: str) -> None:
    """Check that `layout` is one of LAYOUTS."""
    if layout not in LAYOUTS:
        msg = f"expected one of {', '.join(LAYOUTS)}, got {clip(layout)}"
        raise InvalidArgumentError(msg, field="layout")


def to_channels_first(shape: Shape, spatial_dims: int, layout: Layout) -> Shape:
    """Return a shape in `layout` as channels first, torch's order."""
    if layout == "NCHW":
        return shape
    lead = len(shape) - spatial_dims - 1
    return (*shape[:lead], shape[-1], *shape[lead:-1])


def from_channels_first(shape: Shape, spatial_dims: int, layout: Layout) -> Shape:
    """Return a channels-first shape in `layout`: the inverse of to_channels_first."""
    if layout == "NCHW":
        return shape
    lead = len(shape) - spatial_dims - 1
    return (*shape[:lead], *shape[lead + 1 :], shape[lead])


def spatial_dims(branches: Sequence[Chain]) -> int:
    """Return the number of spatial axes that all layers of a call share; element-wise steps take any number.

    Raises:
        InvalidArgumentError: Two layers have different numbers of spatial axes, or all of them are element-wise steps.

    """
    dims = 0
    for i, chain in enumerate(branches):
        for j, layer in enumerate(chain):
            dims = dims or layer.spatial_dims
            if layer.spatial_dims not in {0, dims}:
                msg = f"expected a {dims}d layer like the ones before, got {layer.name}"
                raise InvalidArgumentError(msg, field=layer_path(i, j, layer))
    if not dims:
        msg = f"expected a pooling layer too, which says how many spatial axes there are, got {clip(list(branches[0]))}"
        raise InvalidArgumentError(msg, field=layer_path(0, len(branches[0]) - 1, branches[0][-1]))
    return dims


def period(branches: Iterable[Chain]) -> int:
    """Return the number of planes after which every layer treats planes alike again: 1 if always, 0 if never."""
    return lcm(*(layer.period for chain in branches for layer in chain))


def returned_steps(chain: Chain, outputs: Outputs) -> Outputs:
    """Return the numbers of the layers of a chain whose outputs are returned."""
    return outputs or (len(chain) - 1,)


def check_outputs(branches: Sequence[Chain], outputs: Sequence[Outputs]) -> None:
    """Check which outputs of each branch are returned; `outputs` is empty if it is the last of each.

    Raises:
        InvalidArgumentError: A branch has no such layers, or they are not in ascending order.
        LimitExceededError: There are more than MAX_OUTPUTS outputs.

    """
    for i, (chain, numbers) in enumerate(zip(branches, outputs, strict=False)):
        ascending = all(one < other for one, other in pairwise(numbers))
        if numbers and not (ascending and numbers[0] >= 0 and numbers[-1] < len(chain)):
            msg = f"expected numbers of layers in ascending order, each in 0..{len(chain) - 1}, got {clip(numbers)}"
            raise InvalidArgumentError(msg, field=f"branches[{i}].outputs")
    if (count := sum(len(numbers) or 1 for numbers in outputs)) > MAX_OUTPUTS:
        msg = f"branches: expected at most {MAX_OUTPUTS} outputs in all, got {count}"
        raise LimitExceededError(
            msg, reason="TOO_MANY_OUTPUTS", metadata={"limit": str(MAX_OUTPUTS), "actual": str(count)}
        )


def branch_shapes(
    shape: Shape,
    branches: LayerLike | Iterable[ChainLike],
    layout: Layout = "NCHW",
    outputs: Sequence[Outputs] = (),
    operand_shape: Shape | None = None,
) -> list[tuple[Shape, ...]]:
    """Return, for each branch, the shape after every layer of its chain, exactly as torch computes it.

    Args:
        shape: The shape of the input, in the order of `layout`.
        branches: The branches, as PoolClient.pool_each takes them.
        layout: "NCHW" (channels first) or "NHWC" (channels last), for any number of spatial axes. Default: "NCHW".
        outputs: For each branch, the numbers of the layers whose outputs are returned, counted from 0 and in ascending
            order; only these layers may return indices. An empty tuple stands for the last layer. Default: the last
            layer of each branch.
        operand_shape: The shape of the operand that the first layers take. Default: None, if there is none, or no shape
            depends on it.

    Returns:
        A list with one tuple of shapes per branch, in the order of `layout`.

    Raises:
        InvalidArgumentError: The layers don't fit the shape or each other, or a branch has no such outputs.
        LimitExceededError: There are too many outputs.

    Examples:
        >>> from poolrpc import AvgPool2d, GlobalPool2d, MaxPool2d, branch_shapes
        >>> branch_shapes((8, 64, 56, 56), [[MaxPool2d(2), AvgPool2d(2)], [GlobalPool2d("max")]])
        [((8, 64, 28, 28), (8, 64, 14, 14)), ((8, 64, 1, 1),)]

    """
    sizes = tuple(integer("shape", size, -(2**63), 2**63) for size in shape)  # the range is that of the layers
    return shapes_of(sizes, as_branches(branches), layout, outputs, operand_shape)


def shapes_of(  # noqa: PLR0913 - what branch_shapes has
    shape: Shape,
    chains: Sequence[Chain],
    layout: Layout,
    outputs: Sequence[Outputs] = (),
    operand_shape: Shape | None = None,
    *,
    is_block: bool = False,
) -> list[tuple[Shape, ...]]:
    """Return the shapes of `branch_shapes`.

    Args:
        shape: The shape of the input.
        chains: The branches.
        layout: The layout.
        outputs: For each branch, the numbers of the layers whose outputs are returned. Empty: the last of each.
        operand_shape: The shape of the operand. None: there is none.
        is_block: Whether the input is some of the planes of a tensor, whose number is not that of the channels. The
            shape of an operand is then not checked.

    Raises:
        InvalidArgumentError: The layers don't fit the shape or each other, or a branch has no such outputs.
        LimitExceededError: There are too many outputs.

    """
    check_layout(layout)
    check_outputs(chains, outputs)
    dims = check_shape(shape, spatial_dims(chains))
    first = to_channels_first(shape, dims, layout)
    name = operand_name(chains, given=operand_shape is not None)
    if operand_shape is not None and name and not is_block:
        check_operand_shape(name, operand_shape, first if name != "indices" else shape, dims)
    results = []
    for i, chain in enumerate(chains):
        pooled, shapes = first, []
        returned = returned_steps(chain, outputs[i] if outputs else ())
        for j, layer in enumerate(chain):
            path = layer_path(i, j, layer)
            if layer.operand and not layer.operand_optional and j > 0:
                owned = f"its {layer.operand} belong to the input"
                msg = f"expected {layer.name} first in its chain, since {owned}, got layer {j}"
                raise InvalidArgumentError(msg, field=path)
            if layer.returns_indices and j < returned[-1] and j not in returned:
                which = (
                    f"layers {clip(returned)}, whose outputs are returned"
                    if any(outputs)
                    else "the last layer of a chain"
                )
                msg = f"expected return_indices only on {which}, got it on {layer.name}"
                raise InvalidArgumentError(msg, field=f"{path}.return_indices")
            try:
                if not is_block:
                    layer.check_channels(first[-dims - 1])
                pooled = layer.pooled_shape(pooled, dims, None if j else operand_shape)
            except InvalidArgumentError as error:
                raise error if error.violations[0].field == "operand_shape" else error.with_prefix(path) from None
            shapes.append(from_channels_first(pooled, dims, layout))
        results.append(tuple(shapes))
    if operand_shape is not None and not name:
        msg = (
            f"expected none, since no layer that is the first of its chain takes an operand, got {clip(operand_shape)}"
        )
        raise InvalidArgumentError(msg, field="operand_shape")
    return results


def operand_name(chains: Iterable[Chain], *, given: bool) -> str:
    """Return the name of the operand that the first layers of branches take; empty if they take none.

    Args:
        chains: The branches.
        given: Whether there is an operand, which then is also that of a layer that may be without it.

    Raises:
        InvalidArgumentError: The layers of two branches need different operands.

    """
    firsts = [chain[0] for chain in chains]
    names = dict.fromkeys(layer.operand for layer in firsts if layer.operand and not layer.operand_optional)
    if given and not names:
        names = dict.fromkeys(layer.operand for layer in firsts if layer.operand)
    if len(names) > 1:
        one, other = [*names][:2]
        raise InvalidArgumentError(f"expected branches that share one operand, got {one} and {other}", field="branches")
    return next(iter(names), "")


def layer_path(branch: int, step: int, layer: Layer) -> str:
    """Return the path of a layer in a request, for errors."""
    return f"branches[{branch}].layers[{step}].{layer.family}"


@dataclass(frozen=True, slots=True)
class Planes:
    """A tensor as planes that may be sent and computed separately.

    The channels of a channels-last image are adjacent in memory, so all planes of such an image count as one.

    Attributes:
        spec: The tensor.
        spatial_dims: Number of its spatial axes.

    """

    spec: TensorSpec
    spatial_dims: int

    @property
    def count(self) -> int:
        """Number of planes."""
        return prod(self.spec.shape[: -self._tail])

    @property
    def plane_bytes(self) -> int:
        """Size of one plane in bytes, also if the tensor has none."""
        return prod(self.spec.shape[-self._tail :]) * ITEM_BYTES[self.spec.dtype]

    def spec_for(self, count: int) -> TensorSpec:
        """Return the spec of a batched tensor of `count` such planes."""
        tail = self.spec.shape[-self._tail :]
        lead = (1, count) if self.spec.layout == "NCHW" else (count,)
        return TensorSpec(self.spec.dtype, (*lead, *tail), self.spec.layout)

    @property
    def _tail(self) -> int:
        return self.spatial_dims if self.spec.layout == "NCHW" else self.spatial_dims + 1

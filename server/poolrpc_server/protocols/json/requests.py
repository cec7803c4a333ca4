"""Requests in JSON: the fields of each method, and layers as expressions or as objects."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, NoReturn

from poolrpc._shapes.limits import MAX_BRANCHES, MAX_CHAIN
from poolrpc._shapes.operands import OPERAND_DTYPES
from poolrpc._shapes.rules import clip
from poolrpc._wire.codec import Request
from poolrpc.chains import spatial_dims
from poolrpc.errors import ExpressionError, FieldViolation, InvalidArgumentError, LimitExceededError
from poolrpc.expression import parse_chain
from poolrpc.layers import LAYERS, STEPS, Layer
from poolrpc.operands import check_operand_name
from poolrpc.tensors import LAYOUTS, TensorSpec
from poolrpc_server.protocols.json.tensors import JsonTensor, read_shape, read_tensor

if TYPE_CHECKING:
    from poolrpc.chains import Chain
    from poolrpc.tensors import Bytes, Layout

MAX_VALUES = 2**18
"""Maximum number of values of a request: to parse a million of them takes the interpreter for 0.1 s."""

ENCODINGS = ("list", "base64")
POOL_FIELDS = ("layer", "branches", "input", *OPERAND_DTYPES, "dtype", "layout", "steps", "encoding")
SHAPE_FIELDS = ("layer", "shape", "layout")
EXPLAIN_FIELDS = ("layer", "input", "shape")

CLASSES: dict[str, type[Layer]] = {**LAYERS, **STEPS}
"""Every layer and element-wise step by its name."""


@dataclass(frozen=True, slots=True)
class PoolQuery:
    """A request of Pool.

    Attributes:
        request: The request, with C of 1 in front if the input has no such axis.
        payload: The bytes of its tensors.
        is_plane: Whether the input is a single plane, without N and C.
        encoding: "list" or "base64", the form of the answer's tensors.
        steps: Whether the output of each layer is returned.

    """

    request: Request
    payload: Bytes
    is_plane: bool
    encoding: str
    steps: bool


def parse_object(body: bytes, names: tuple[str, ...]) -> dict[str, Any]:
    """Return a request's JSON object.

    Args:
        body: The JSON text, in UTF-8.
        names: The fields that it may have.

    Raises:
        InvalidArgumentError: It is not a JSON object, or has an unknown field, or one of them twice.
        LimitExceededError: It has too many values.

    """
    count = body.count(b",") + body.count(b"[") + body.count(b"{")
    if count > MAX_VALUES:
        msg = f"expected at most {MAX_VALUES} values in lists, got {count} or more; base64 has no such limit"
        raise LimitExceededError(msg, reason="JSON_ELEMENTS", metadata={"limit": str(MAX_VALUES), "actual": str(count)})
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_unique)
    except InvalidArgumentError:
        raise
    except RecursionError:
        raise InvalidArgumentError("expected a JSON object, got one that is nested too deeply", field="body") from None
    except ValueError as error:  # not JSON, not UTF-8, or a number with too many digits
        raise InvalidArgumentError(f"expected a JSON object, got {clip(body[:60])}: {error}", field="body") from None
    if not isinstance(value, dict):
        raise InvalidArgumentError(f"expected a JSON object, got {clip(value)}", field="body")
    for name in value:
        if name not in names:
            raise InvalidArgumentError(f"expected one of {', '.join(names)}, got {clip(name)}", field="body")
    return value


def _no_constant(name: str) -> NoReturn:
    raise InvalidArgumentError(f'expected "{name}" in quotes, since JSON has no such number, got {name}', field="body")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise InvalidArgumentError(f"expected {clip(twice)} once, got it twice", field="body")
    return found


def read_pool(body: bytes) -> PoolQuery:
    """Return a request of Pool.

    Raises:
        InvalidArgumentError: A field is missing or invalid.
        LimitExceededError: It has too many values.

    """
    found = parse_object(body, POOL_FIELDS)
    branches = (read_chain(_required(found, "layer")), *_read_branches(found.get("branches", [])))
    dims = spatial_dims(branches)
    tensor = read_tensor(_required(found, "input"), found.get("dtype", "float32"), "input")
    layout = _choice(found, "layout", LAYOUTS)
    is_plane = len(tensor.shape) == dims
    if is_plane and layout != "NCHW":
        raise InvalidArgumentError("expected NCHW for a plane without channels, got NHWC", field="layout")
    specs, payload = [_spec(tensor, layout, is_plane=is_plane)], tensor.data
    for name in OPERAND_DTYPES.keys() & found.keys():
        check_operand_name(name, branches)
        operand = read_tensor(found[name], OPERAND_DTYPES[name][0], name)
        # Indices have a cell for each of the input; the other operands have no channels.
        specs.append(_spec(operand, layout, is_plane=is_plane and name == "indices"))
        payload = b"".join((payload, operand.data))
    steps = found.get("steps", False)
    if not isinstance(steps, bool):
        raise InvalidArgumentError(f"expected true or false, got {clip(steps)}", field="steps")
    outputs = tuple(tuple(range(len(chain))) for chain in branches) if steps else ()
    request = Request(specs[0], branches, specs[1] if len(specs) > 1 else None, outputs)
    return PoolQuery(request, payload, is_plane, _choice(found, "encoding", ENCODINGS), steps)


def _spec(tensor: JsonTensor, layout: Layout, *, is_plane: bool) -> TensorSpec:
    return TensorSpec(tensor.dtype, (1, *tensor.shape) if is_plane else tensor.shape, layout)


def read_shapes(body: bytes) -> tuple[Chain, tuple[int, ...], Layout]:
    """Return the chain, the shape and the layout of a request of Shape; raises as `read_pool` does."""
    found = parse_object(body, SHAPE_FIELDS)
    chain = read_chain(_required(found, "layer"))
    return chain, read_shape(_required(found, "shape"), "shape"), _choice(found, "layout", LAYOUTS)


def read_explain(body: bytes) -> tuple[Layer, tuple[int, ...], JsonTensor | None]:
    """Return the layer, the plane's shape, and the plane's values, if there are any, of a request of Explain.

    Raises:
        InvalidArgumentError: A field is missing or invalid, or there is more than one layer.

    """
    found = parse_object(body, EXPLAIN_FIELDS)
    chain = read_chain(_required(found, "layer"))
    if len(chain) > 1:
        raise InvalidArgumentError(f"expected one layer, got {len(chain)}", field="layer")
    if ("input" in found) == ("shape" in found):
        got = "both" if "input" in found else "neither"
        raise InvalidArgumentError(f"expected either input or shape, got {got}", field="input")
    if "shape" in found:
        return chain[0], read_shape(found["shape"], "shape"), None
    plane = read_tensor(found["input"], "float64", "input")
    return chain[0], plane.shape, plane


def _required(found: dict[str, Any], name: str) -> Any:  # noqa: ANN401 - JSON
    if name not in found:
        raise InvalidArgumentError("expected a value, got none", field=name)
    return found[name]


def _choice(found: dict[str, Any], name: str, among: tuple[Any, ...]) -> Any:  # noqa: ANN401 - a Literal
    value = found.get(name, among[0])
    if not isinstance(value, str) or value not in among:
        raise InvalidArgumentError(f"expected {' or '.join(among)}, got {clip(value)}", field=name)
    return value


def _read_branches(value: object) -> tuple[Chain, ...]:
    if not isinstance(value, list):
        raise InvalidArgumentError(f"expected a list of layers or chains, got {clip(value)}", field="branches")
    if len(value) >= MAX_BRANCHES:
        raise _too_many("branches", MAX_BRANCHES - 1, len(value))
    return tuple(read_chain(each, f"branches[{i}]") for i, each in enumerate(value))


def read_chain(value: object, field: str = "layer") -> Chain:
    """Return the chain of a request.

    Args:
        value: An expression, "[MaxPool2d(3, stride=2), AvgPool2d(2)]"; an object, {"name": "MaxPool2d", "kernel_size":
            3, "stride": 2}; or a list of both, in order.
        field: The request's field, for errors.

    Raises:
        InvalidArgumentError: It is none of these, or a parameter is invalid; the field is "layer" for an expression,
            and "layer[0].kernel_size" for a parameter of an object.
        LimitExceededError: There are too many layers.

    """
    parts = value if isinstance(value, list) else [value]
    if not parts:
        raise InvalidArgumentError("expected at least one layer, got an empty list", field=field)
    if len(parts) > MAX_CHAIN:
        raise _too_many(field, MAX_CHAIN, len(parts))
    layers: list[Layer] = []
    for i, part in enumerate(parts):
        path = f"{field}[{i}]" if isinstance(value, list) else field
        if isinstance(part, str):
            try:
                layers += parse_chain(part)
            except ExpressionError as error:
                raise error.with_prefix(path) from None
        elif isinstance(part, dict):
            layers.append(_read_layer(part, f"{field}[{i}]"))
        else:
            msg = f"expected an expression such as MaxPool2d(2), or an object with its name, got {clip(part)}"
            raise InvalidArgumentError(msg, field=path)
    if len(layers) > MAX_CHAIN:
        raise _too_many(field, MAX_CHAIN, len(layers))
    return tuple(layers)


def _too_many(field: str, limit: int, count: int) -> LimitExceededError:
    msg = f"{field}: expected at most {limit}, got {count}"
    return LimitExceededError(msg, reason="TOO_MANY_LAYERS", metadata={"limit": str(limit), "actual": str(count)})


def _read_layer(part: dict[str, Any], path: str) -> Layer:
    name = part.get("name")
    cls = CLASSES.get(name) if isinstance(name, str) else None
    if cls is None:
        msg = f"expected the name of a layer, got {clip(name)}; the layers are {', '.join(CLASSES)}"
        raise InvalidArgumentError(msg, field=f"{path}.name")
    parameters = fields(cls)  # type: ignore[arg-type]  # every layer is a dataclass
    names = [each.name for each in parameters]
    for key in part:
        if key != "name" and key not in names:
            msg = f"expected a parameter of {name} ({', '.join(names) or 'none'}), got {clip(key)}"
            raise InvalidArgumentError(msg, field=f"{path}.{clip(key)[1:-1]}")
    missing = [each.name for each in parameters if each.default is MISSING and each.name not in part]
    if missing:
        violations = [FieldViolation(f"{path}.{each}", "expected a value, got none") for each in missing]
        raise InvalidArgumentError("", violations=violations)
    try:
        return cls(**{key: _as_tuples(each) for key, each in part.items() if key != "name"})
    except InvalidArgumentError as error:
        raise error.with_prefix(path) from None


def _as_tuples(value: Any) -> Any:  # noqa: ANN401 - JSON
    """Return a parameter with lists as tuples, and the names of numbers that JSON lacks as these numbers."""
    if isinstance(value, list):
        return tuple(map(_as_tuples, value))
    return float(value.replace("Infinity", "inf")) if value in ("Infinity", "-Infinity") else value

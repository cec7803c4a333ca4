"""Layer expressions such as "MaxPool2d(3, stride=2)", parsed through Python's ast without evaluation.

`repr(layer)` is the inverse. A list is a chain: "[MaxPool2d(3, stride=2), AvgPool2d(2)]". A list that contains a list
is branches: "[[AdaptiveAvgPool2d(1)], [MaxPool2d(2), AdaptiveAvgPool2d(2)]]".
"""

from __future__ import annotations

import ast
import math
import re
from dataclasses import fields
from typing import Any, TypeVar

from poolrpc._shapes.limits import MAX_BRANCHES, MAX_CHAIN, MAX_EXPRESSION_CHARS
from poolrpc._shapes.rules import clip
from poolrpc.errors import ExpressionError, InvalidArgumentError
from poolrpc.layers import LAYERS, STEPS, Layer
from poolrpc.layers.reductions import WITH_PARAMETERS

INVALID = re.compile(
    r"[^\w\s,.=()\[\]+*'\"-]|[^\x00-\x7f]|(?:[0-9]\.?[jJ]?|0[xX][0-9a-fA-F_]+)(?:and|else|for|if|in|is|not|or)"
)
"""Text that no layer expression contains: an invalid character, or a number directly followed by a keyword."""

GLOBAL = re.compile(r"Global_?(Max|Avg|Average)?_?Pool(?:ing)?_?([123]?)d?", re.IGNORECASE)
"""The names of global layers in ONNX, Keras and elsewhere."""

TORCH_PREFIX = re.compile(r"^(?:(?:torch\.)?nn\.(?:modules\.)?(?:pooling\.)?|(?:torchvision\.transforms\.)?v2\.)")
"""What may precede the name of a layer: the module of torch or torchvision that has it."""

T = TypeVar("T")

MAX_DEPTH = 2
"""The depth of a value: padding may have a pair for each axis."""

NAMES: dict[str, type[Layer]] = {**LAYERS, **STEPS}
"""Every layer and element-wise step by its name."""


def parse_layer(text: str) -> Layer:
    """Return the layer of an expression; the inverse of repr.

    The text that torch.nn's modules print is an expression too, but not always of the same layer: it leaves out
    return_indices, and of averages ceil_mode, count_include_pad and divisor_override. Pass the module to the client
    instead of its text.

    Args:
        text: A layer's name and arguments in Python's syntax, up to 4096 characters. Arguments are numbers, inf, True,
            False, None, strings, and tuples or lists of these. The name may be that of torch's module:
            torch.nn.MaxPool2d or nn.MaxPool2d.

    Raises:
        ExpressionError: The text is not a layer expression, or an argument is invalid; `column` says where.

    Examples:
        >>> from poolrpc import parse_layer
        >>> parse_layer("MaxPool2d(3, stride=2)")
        MaxPool2d(3, stride=2)

    """
    parser = _Parser(text)
    return parser.layer(parser.root)


def parse_chain(text: str) -> tuple[Layer, ...]:
    """Return the chain of an expression.

    Args:
        text: One layer, or a list of layers in order.

    Raises:
        ExpressionError: As in parse_layer.

    Examples:
        >>> from poolrpc import parse_chain
        >>> parse_chain("[MaxPool2d(3, stride=2), AvgPool2d(2)]")
        (MaxPool2d(3, stride=2), AvgPool2d(2))

    """
    parser = _Parser(text)
    return parser.chain(parser.root)


def parse_branches(text: str) -> tuple[tuple[Layer, ...], ...]:
    """Return the branches of an expression.

    Args:
        text: One layer or a list of layers, which is a single branch; or a list that contains a list, each element of
            which is a branch: a layer, or a list of layers in order.

    Raises:
        ExpressionError: As in parse_layer, or there are more than 64 branches, or more than 64 layers in one.

    Examples:
        >>> from poolrpc import parse_branches
        >>> parse_branches("[GlobalPool2d('max'), [MaxPool2d(2), AvgPool2d(2)]]")
        ((GlobalPool2d('max'),), (MaxPool2d(2), AvgPool2d(2)))

    """
    parser = _Parser(text)
    root = parser.root
    several = isinstance(root, ast.List | ast.Tuple) and any(isinstance(e, ast.List | ast.Tuple) for e in root.elts)
    nodes = root.elts if isinstance(root, ast.List | ast.Tuple) and several else [root]
    if len(nodes) > MAX_BRANCHES:
        raise parser.error(f"expected at most {MAX_BRANCHES} branches, got {len(nodes)}", root)
    for node in nodes:
        if isinstance(node, ast.List | ast.Tuple) and len(node.elts) > MAX_CHAIN:
            raise parser.error(f"expected at most {MAX_CHAIN} layers in a chain, got {len(node.elts)}", node)
    return tuple(map(parser.chain, nodes))


def _similar_layers(name: str) -> list[str]:
    """Return the layers that a name may stand for: "maxpool2d", "F.max_pool2d", "MaxPooling2D", "GlobalAvgPool"."""
    if named := GLOBAL.fullmatch(name.rpartition(".")[2]):
        reduce = "max" if (named[1] or "").lower() == "max" else "mean"
        return [f"GlobalPool{named[2] or 2}d({reduce!r})"]
    import difflib  # noqa: PLC0415 - keeps `import poolrpc` fast

    by_key = {each.lower(): each for each in NAMES}
    key = name.rpartition(".")[2].lower().replace("_", "").replace("pooling", "pool").replace("average", "avg")
    ranks = [layer for each, layer in by_key.items() if re.fullmatch(rf"{re.escape(key)}[123]d", each)]
    near = [key] if key in by_key else difflib.get_close_matches(key, by_key, n=1)
    return ranks or [by_key[each] for each in near]


class _Parser:
    """The text of an expression, its syntax tree, and the conversion of nodes to layers."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_EXPRESSION_CHARS:
            msg = f"expected at most {MAX_EXPRESSION_CHARS} characters, got {len(text)}"
            raise ExpressionError(msg)
        # Joined into one line, so that a column is enough to locate an error. Leading blanks would be an indentation.
        line = " ".join(text.splitlines()) if len(text.splitlines()) > 1 else text
        stripped = line.lstrip()
        self.indent = len(line) - len(stripped)
        self.line = stripped
        # Rejected before parsing, since Python warns on stderr of invalid string escapes and of "2if".
        invalid = INVALID.search(stripped)
        if invalid:
            msg = f"expected a number, True, False, None or a string in quotes, got {clip(invalid.group())}"
            raise ExpressionError(msg, column=self.indent + invalid.start() + 1)
        try:
            self.root = ast.parse(stripped, mode="eval").body
        except SyntaxError as error:
            column = self.indent + max(error.offset or 1, 1)
            raise ExpressionError(f"expected a layer expression: {error.msg}", column=column) from None
        except (ValueError, RecursionError, MemoryError):
            # A NUL byte, a number with too many digits, or too deep nesting.
            raise ExpressionError("expected a layer expression such as MaxPool2d(3, stride=2)") from None

    def error(self, description: str, node: ast.AST) -> ExpressionError:
        offset: int = node.col_offset  # type: ignore[attr-defined]  # expressions and keywords have it
        return ExpressionError(description, column=self.indent + offset + 1)

    def source(self, node: ast.expr) -> str:
        return ast.get_source_segment(self.line, node) or ""

    def chain(self, node: ast.expr) -> tuple[Layer, ...]:
        if not isinstance(node, ast.List | ast.Tuple):
            return (self.layer(node),)
        if not node.elts:
            raise self.error("expected at least one layer, got an empty list", node)
        return tuple(map(self.layer, node.elts))

    def layer(self, node: ast.expr) -> Layer:
        if not isinstance(node, ast.Call):
            raise self.error(f"expected a layer such as MaxPool2d(2), got {clip(self.source(node))}", node)
        written = self.source(node.func)
        name = TORCH_PREFIX.sub("", written)
        if name not in NAMES:
            near = _similar_layers(written)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the layers are {', '.join(NAMES)}"
            raise self.error(f"expected the name of a layer, got {clip(written)}; {hint}", node.func)
        return self.call(NAMES[name], name, node)

    def call(self, cls: type[T], name: str, node: ast.Call) -> T:
        names = [each.name for each in fields(cls)]  # type: ignore[arg-type]  # every one is a dataclass
        nodes: dict[str, ast.AST] = {}
        values: dict[str, Any] = {}
        if len(node.args) > len(names):
            raise self.error(
                f"expected at most {len(names)} arguments for {name}, got {len(node.args)}", node.args[len(names)]
            )
        # The name and the value of every argument, and the node that an error points to.
        arguments = [
            *zip(names, node.args, node.args, strict=False),
            *((keyword.arg or "**", keyword.value, keyword) for keyword in node.keywords),
        ]
        for parameter, value, source in arguments:
            if parameter not in names:
                takes = ", ".join(names) or "none"
                raise self.error(f"expected a parameter of {name} ({takes}), got {clip(parameter)}", source)
            if parameter in values:
                raise self.error(f"expected {parameter} once, got it twice", source)
            nodes[parameter], values[parameter] = source, self.value(value)
        try:
            return cls(**values)
        except InvalidArgumentError as error:
            first = error.violations[0]
            raise self.error(str(error), nodes.get(first.field, node)) from None
        except TypeError:  # a required parameter is missing
            missing = next(each for each in names if each not in values)
        raise self.error(f"expected the parameter {missing} of {name}, got none", node)

    def value(self, node: ast.expr, depth: int = 0) -> object:
        if isinstance(node, ast.Call) and not depth and (name := self.source(node.func)) in WITH_PARAMETERS:
            return self.call(WITH_PARAMETERS[name], name, node)
        if isinstance(node, ast.Tuple | ast.List) and depth < MAX_DEPTH:
            return tuple(self.value(each, depth + 1) for each in node.elts)
        return self.scalar(node)

    def scalar(self, node: ast.expr) -> object:
        negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
        inner = node.operand if isinstance(node, ast.UnaryOp) and negative else node
        if isinstance(inner, ast.Name) and inner.id == "inf":
            return -math.inf if negative else math.inf
        if isinstance(inner, ast.Constant) and (inner.value is None or type(inner.value) in (bool, int, float, str)):
            if not negative:
                return inner.value
            if type(inner.value) in (int, float):
                return -inner.value  # type: ignore[operator]  # a number, by the line above
        # A name, which lacks quotes or is unknown, is shown without quotes.
        received = node.id[:120] if isinstance(node, ast.Name) else clip(self.source(node))
        raise self.error(f"expected a number, True, False, None or a string in quotes, got {received}", node)

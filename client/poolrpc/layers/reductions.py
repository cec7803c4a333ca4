"""Reductions: what becomes of the cells of a window. Each is one class of this file.

A reduction has its parameters, its dtypes, and its formula: the server applies it to tensors of torch, and the command
to arrays of NumPy. So it is written in functions that both have by the same name (`cells.xp`), and in the methods of
WindowCells, which know what a window is. Its name is that of its field in the proto's `oneof reduce`, or of its value
in the proto's `Reduction` if it has no parameter.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import inf, isfinite, nan
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

from poolrpc._shapes.limits import MAX_NORM
from poolrpc._shapes.parameters import finite_number, real
from poolrpc._shapes.rules import clip
from poolrpc.errors import InvalidArgumentError
from poolrpc.layers.base import FLOATS, INTEGERS, expression_of

Values: TypeAlias = Any
"""An array of NumPy or a tensor of torch."""

Arithmetic: TypeAlias = Literal["cells", "sums", "float64"]
"""The dtype in which a reduction computes: that of the cells; that in which torch adds them, which is float32 for half
precision; or float64, whose result is rounded once."""


class WindowCells(Protocol):
    """The cells of all windows at once; values of windows are arrays or tensors with one number for each window.

    The methods apply a function `of` to each cell before they reduce the cells. It has the cell as its first argument,
    and then the numbers of the cell's window from `values`, which can be computed with it by arithmetic.

    """

    @property
    def xp(self) -> Values:
        """The module of the arrays: numpy or torch."""

    @property
    def count(self) -> Values:
        """The number of cells of each window: a number, or values of windows."""

    def max(self, of: Callable[[Values], Values] | None = None) -> Values:
        """Return the max of each window."""

    def min(self) -> Values:
        """Return the min of each window."""

    def median(self) -> Values:
        """Return the cell in the middle of each window's sorted cells, the lower of two."""

    def sum(self, of: Callable[..., Values] | None = None, *values: Values) -> Values:
        """Return the sum of each window."""

    def mean(self, of: Callable[..., Values] | None = None, *values: Values) -> Values:
        """Return the sum of each window divided by its count, 0 if it has no cell."""


REDUCTIONS: dict[str, type["Reduction"]] = {}
"""Every reduction by its name."""


class Reduction:
    """The base class of reductions: frozen values, whose `repr` is an expression.

    Attributes:
        name: The name in the proto, and, of a reduction without parameters, in layers.
        dtypes: Names of the dtypes that it takes.
        arithmetic: The dtype in which it computes.
        gathers: Whether it needs all cells of a window side by side, which takes memory.
        empty: The value of no cells, as an empty segment has none: that of torch.segment_reduce, or NaN.
        work: Nanoseconds of one thread for each cell of a plane, and for each cell of each window, measured; a server's
            limit on work counts them.

    """

    __slots__ = ()
    name: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]] = FLOATS
    arithmetic: ClassVar[Arithmetic] = "float64"
    gathers: ClassVar[bool] = False
    empty: ClassVar[float] = nan
    work: ClassVar[tuple[float, float]] = (0.25, 0.4)

    def __init_subclass__(cls) -> None:
        """Register the reduction by its name."""
        REDUCTIONS[cls.name] = cls

    def of(self, cells: WindowCells) -> Values:
        """Return the value of each window."""
        raise NotImplementedError

    def __repr__(self) -> str:
        """Return an expression of the reduction, as of a layer."""
        return expression_of(self)


class _Max(Reduction):
    name = "max"
    empty = -inf
    dtypes = FLOATS + INTEGERS
    arithmetic = "cells"

    def of(self, cells: WindowCells) -> Values:
        return cells.max()


class _Min(Reduction):
    name = "min"
    empty = inf
    dtypes = FLOATS + INTEGERS
    arithmetic = "cells"

    def of(self, cells: WindowCells) -> Values:
        return cells.min()


class _Sum(Reduction):
    name = "sum"
    empty = 0.0
    dtypes = (*FLOATS, "int64")
    arithmetic = "sums"

    def of(self, cells: WindowCells) -> Values:
        return cells.sum()


class _Mean(Reduction):
    name = "mean"
    dtypes = (*FLOATS, "int64")
    arithmetic = "sums"

    def of(self, cells: WindowCells) -> Values:
        return cells.mean()


class _Median(Reduction):
    name = "median"
    dtypes = FLOATS + INTEGERS
    arithmetic = "cells"
    gathers = True
    work = (0.5, 8.0)

    def of(self, cells: WindowCells) -> Values:
        return cells.median()


class _Var(Reduction):
    name = "var"
    work = (0.5, 2.0)

    def of(self, cells: WindowCells) -> Values:
        squares = cells.sum(lambda x, mean: cells.xp.square(x - mean), cells.mean())
        return squares / (cells.count - 1 + (cells.count == 0))  # NaN for no cell, as for one


class _Std(_Var):
    name = "std"

    def of(self, cells: WindowCells) -> Values:
        return cells.xp.sqrt(_Var.of(self, cells))


@dataclass(frozen=True, slots=True, repr=False)
class Norm(Reduction):
    """The norm of the cells of a window, (sum of |x|^p)^(1/p): ONNX's LpPool.

    torch's LPPool differs for odd p, where it keeps the signs of the powers, and in partial windows, whose mean it
    multiplies by the size of the window.

    Args:
        p: The exponent, 1/32768 to 32768, or infinity, for which the norm is the max of |x|.

    Raises:
        InvalidArgumentError: p is not such a number.

    Examples:
        >>> from poolrpc import Norm, Pool2d
        >>> Pool2d(Norm(2), 3)
        Pool2d(Norm(2.0), 3)

    """

    name: ClassVar[str] = "norm"
    empty: ClassVar[float] = 0.0
    work: ClassVar[tuple[float, float]] = (3.0, 0.6)
    p: float

    def __post_init__(self) -> None:
        p = real("p", self.p)
        if not 1 / MAX_NORM <= p <= MAX_NORM and p != inf:
            msg = f"expected a number in 1/{MAX_NORM} to {MAX_NORM}, or inf, got {p!r}"
            raise InvalidArgumentError(msg, field="p")
        object.__setattr__(self, "p", p)

    def of(self, cells: WindowCells) -> Values:
        """Return the value of each window."""
        xp, p = cells.xp, self.p
        if p == inf:
            return cells.max(xp.abs)
        if p == 1:
            return cells.sum(xp.abs)
        if p == 2:  # noqa: PLR2004 - the Euclidean norm
            return xp.sqrt(cells.sum(xp.square))
        return _power(xp, cells.sum(lambda x: _power(xp, xp.abs(x), p)), 1 / p)


@dataclass(frozen=True, slots=True, repr=False)
class PowerMean(Reduction):
    """The power mean of the cells of a window, (mean of max(x, eps)^p)^(1/p): GeM, generalised mean pooling.

    Args:
        p: The exponent, 1/32768 to 32768, or one of these below 0.
        eps: The least value, above 0, that replaces those below it. Default: 1e-6.

    Raises:
        InvalidArgumentError: A parameter is not such a number.

    Examples:
        >>> from poolrpc import GlobalPool2d, PowerMean
        >>> GlobalPool2d(PowerMean(3)).output_shape((8, 64, 7, 7))
        (8, 64, 1, 1)

    """

    name: ClassVar[str] = "power_mean"
    work: ClassVar[tuple[float, float]] = (3.5, 0.6)
    p: float
    eps: float = 1e-6

    def __post_init__(self) -> None:
        p, eps = finite_number("p", self.p), real("eps", self.eps)
        if not 1 / MAX_NORM <= abs(p) <= MAX_NORM:
            msg = f"expected a number in 1/{MAX_NORM} to {MAX_NORM}, or in -{MAX_NORM} to -1/{MAX_NORM}, got {p!r}"
            raise InvalidArgumentError(msg, field="p")
        if not isfinite(eps):
            raise InvalidArgumentError(f"expected a finite number, got {eps!r}", field="eps")
        object.__setattr__(self, "p", p)
        object.__setattr__(self, "eps", eps)

    def of(self, cells: WindowCells) -> Values:
        """Return the value of each window."""
        xp = cells.xp
        return _power(xp, cells.mean(lambda x: _power(xp, xp.clip(x, self.eps, None), self.p)), 1 / self.p)


@dataclass(frozen=True, slots=True, repr=False)
class LogSumExp(Reduction):
    """The logarithm of the mean of exponentials, log(mean of exp(r*x))/r: a smooth max, as timm's LsePlus2d has it.

    torch.logsumexp has the sum in place of the mean.

    Args:
        r: The sharpness, above 0: small ones give nearly the mean, and large ones nearly the max. Default: 1.

    Raises:
        InvalidArgumentError: r is not a finite number above 0.

    Examples:
        >>> from poolrpc import GlobalPool2d, LogSumExp
        >>> GlobalPool2d(LogSumExp(10))
        GlobalPool2d(LogSumExp(r=10.0))

    """

    name: ClassVar[str] = "log_sum_exp"
    work: ClassVar[tuple[float, float]] = (0.5, 3.5)
    r: float = 1.0

    def __post_init__(self) -> None:
        r = real("r", self.r)
        if not isfinite(r):
            raise InvalidArgumentError(f"expected a finite number, got {r!r}", field="r")
        object.__setattr__(self, "r", r)

    def of(self, cells: WindowCells) -> Values:
        """Return the value of each window."""
        xp, largest = cells.xp, cells.max()
        shift = xp.where(xp.isfinite(largest), largest, 0.0)
        mean = cells.mean(lambda x, m: xp.exp((x - m) * self.r), shift)
        return xp.log(mean) / self.r + shift


@dataclass(frozen=True, slots=True, repr=False)
class Softmax(Reduction):
    """The mean of the cells of a window, weighted by their softmax, sum(x * exp(t*x)) / sum(exp(t*x)): SoftPool.

    Args:
        t: The sharpness: 0 gives the mean, large numbers nearly the max, those below 0 nearly the min. Default: 1.

    Raises:
        InvalidArgumentError: t is not a finite number.

    Examples:
        >>> from poolrpc import Pool2d, Softmax
        >>> Pool2d(Softmax(), 2)
        Pool2d(Softmax(), 2)

    """

    name: ClassVar[str] = "softmax"
    work: ClassVar[tuple[float, float]] = (0.5, 5.0)
    t: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "t", finite_number("t", self.t))

    def of(self, cells: WindowCells) -> Values:
        """Return the value of each window."""
        xp = cells.xp
        heaviest = cells.max() if self.t >= 0 else cells.min()
        total = cells.sum(lambda x, m: xp.exp((x - m) * self.t), heaviest)
        return cells.sum(lambda x, m: xp.exp((x - m) * self.t) * x, heaviest) / total


Reduce: TypeAlias = Literal["max", "min", "sum", "mean", "median", "std", "var"] | Reduction
"""What becomes of the cells of a window."""

NAMED: dict[str, Reduction] = {
    name: cls() for name, cls in REDUCTIONS.items() if not hasattr(cls, "__dataclass_fields__")
}
"""The reductions without parameters, by name."""

WITH_PARAMETERS: dict[str, type[Reduction]] = {
    cls.__name__: cls for cls in REDUCTIONS.values() if cls.name not in NAMED
}
"""The classes of the others, by their own names."""


def check_reduce(name: str, value: object) -> Reduce:
    """Return a reduction: a name of NAMED, or a value of one of the other classes."""
    if isinstance(value, Reduction) and value.name not in NAMED:
        return value
    if isinstance(value, str) and value in NAMED:
        return NAMED[value].name  # type: ignore[return-value]  # one of Reduce's
    calls = (f"{cls.__name__}({', '.join(each.name for each in fields(cls))})" for cls in WITH_PARAMETERS.values())  # type: ignore[arg-type]  # dataclasses
    msg = f"expected one of {', '.join((*map(repr, NAMED), *calls))}, got {clip(value)}"
    raise InvalidArgumentError(msg, field=name)


def reduction_of(reduce: Reduce) -> Reduction:
    """Return the reduction of a name, or the reduction itself."""
    return NAMED[reduce] if isinstance(reduce, str) else reduce


class ReducedDtypes:
    """The dtypes of a layer's reduction; on a class, those of any reduction."""

    def __get__(self, layer: Any, cls: type[Any]) -> tuple[str, ...]:  # noqa: ANN401 - a layer with a reduction
        return FLOATS + INTEGERS if layer is None else reduction_of(layer.reduce).dtypes


def _power(xp: Values, x: Values, p: float) -> Values:
    """Return the power of numbers that are not negative.

    torch's own power of a cell may differ in the last bit, depending on the cell's position in memory.
    """
    if p not in range(1, MAX_PRODUCT + 1):
        return xp.exp(xp.log(x) * p)
    product = x
    for _ in range(1, int(p)):
        product = product * x
    return product


MAX_PRODUCT = 6
"""The largest power that is a product: a logarithm and an exponential take as long as eight multiplications."""

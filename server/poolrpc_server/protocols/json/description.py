"""Descriptions of the layers for programs that let people choose one: names, parameters, defaults and help."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, Field, fields
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from poolrpc.errors import InvalidArgumentError
from poolrpc.layers import FLOATS, INTEGERS, LAYERS, STEPS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from poolrpc.layers import Layer

ARGUMENT = re.compile(r"^    (\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)
"""A parameter in a docstring's section Args, with the rest of its description."""

ARGS = re.compile(r"^Args:\n((?: {4}.*\n?|\n)+)", re.MULTILINE)
"""A docstring's section Args."""

EXAMPLE_CELLS = 8
"""Size of the axes of the plane that a layer with the values to begin with can pool."""

NAMED = {"dtype": FLOATS + INTEGERS}
"""The values of parameters whose type is only str."""


def describe_layers() -> list[dict[str, Any]]:
    """Return the description of every layer and element-wise step.

    Each has its name, family, number of spatial axes (0 for a step), dtypes, its operand and
    whether it may be without it, the first line of its docstring, its parameters, and values of them to begin with.
    """
    return [
        {
            "name": name,
            "family": cls.family,
            "spatial_dims": cls.spatial_dims,
            "dtypes": cls.dtypes,
            "operand": cls.operand,
            "operand_optional": cls.operand_optional,
            "summary": (inspect.getdoc(cls) or "").partition("\n")[0],
            "parameters": _parameters(cls),
            "example": _example(cls),
        }
        for name, cls in {**LAYERS, **STEPS}.items()
    ]


def _parameters(cls: type[Layer]) -> list[dict[str, Any]]:
    types, help_texts = get_type_hints(cls), _help_texts(cls)
    found: tuple[Field[Any], ...] = fields(cls)  # type: ignore[arg-type]  # every layer is a dataclass
    return [
        {
            "name": each.name,
            "kind": _kind(types[each.name]),
            "required": each.default is MISSING,
            "default": None if each.default is MISSING else each.default,
            "choices": NAMED.get(each.name) or _choices(types[each.name]),
            "help": help_texts.get(each.name, ""),
        }
        for each in found
    ]


def _example(cls: type[Layer]) -> dict[str, Any]:
    """Return values of the required parameters, and of what else a layer needs, with which it pools a small plane."""
    first = {"integer": 2, "integers": 2, "number": 2.0, "numbers": 0.5}
    described = _parameters(cls)
    values = {
        each["name"]: _first_choice(each["choices"]) if each["choices"] else first[each["kind"]]
        for each in described
        if each["required"]
    }
    for _ in described:
        try:
            cls(**values).output_shape((1, 1, *((EXAMPLE_CELLS,) * cls.spatial_dims)))
        except InvalidArgumentError as error:
            if error.violations[0].field == "operand_shape":  # the output depends on the operand
                break
            values[error.violations[0].field] = first["integer"]
        else:
            break
    return values


def _first_choice(choices: tuple[str, ...]) -> str:
    return "float32" if "float32" in choices else choices[0]


def _kind(annotation: Any) -> str:  # noqa: ANN401 - any type
    """Return the kind of a parameter's values: boolean, string, or numbers, of which there may be one per axis."""
    leaves = {*_leaves(annotation)}
    if bool in leaves:
        return "boolean"
    kind = "number" if float in leaves else "integer" if int in leaves else "string"
    return f"{kind}s" if any(get_origin(each) is tuple for each in _alternatives(annotation)) else kind


def _choices(annotation: Any) -> tuple[str, ...]:  # noqa: ANN401 - any type
    """Return the names that a parameter takes; empty if it takes numbers too."""
    if _kind(annotation) != "string":
        return ()
    return next((get_args(each) for each in _alternatives(annotation) if get_origin(each) is Literal), ())


def _alternatives(annotation: Any) -> tuple[Any, ...]:  # noqa: ANN401 - any type
    return get_args(annotation) if get_origin(annotation) in {Union, UnionType} else (annotation,)


def _leaves(annotation: Any) -> Iterator[Any]:  # noqa: ANN401 - any type
    """Yield the types of a union, of the elements of tuples, and so on."""
    if get_origin(annotation) in {Union, UnionType, tuple}:
        for each in get_args(annotation):
            yield from _leaves(each)
    else:
        yield annotation


def _help_texts(cls: type[Layer]) -> dict[str, str]:
    """Return the description of each parameter, from the docstring of the class or of its 2d or 3d relative."""
    name = cls.__name__
    for relative in (cls, *(LAYERS.get(f"{name[:-2]}{dims}d") for dims in (2, 3))):
        if relative is not None and (section := ARGS.search(inspect.getdoc(relative) or "")):
            return {match[1]: " ".join(match[2].split()) for match in ARGUMENT.finditer(section[1])}
    return {}

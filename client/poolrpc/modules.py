"""Modules of torch.nn and torchvision as layers: recognised by their class, and read by their attributes.

Neither torch nor torchvision is imported.
"""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from poolrpc.errors import InvalidArgumentError
from poolrpc.layers import LAYERS, STEPS, Layer

if TYPE_CHECKING:
    from collections.abc import Iterator

POOLING = "torch.nn.modules.pooling"
CONTAINER = "torch.nn.modules.container"

TRANSFORMS = "torchvision.transforms.v2"
TRANSFORM_STEPS = ("ToDtype", "Normalize")
"""The transforms of torchvision that are element-wise steps."""

NOT_IN_TORCH = {"fractional_max_pool": "seed", "max_unpool": "output_size"}
"""The parameter of a family that its modules lack: in torch, MaxUnpool's output_size is an argument of the call."""


class TorchModule(Protocol):
    """A torch.nn.Module, for type checkers: the client does not import torch."""

    training: bool

    def extra_repr(self) -> str:
        """Return the module's parameters as text."""


def is_module(value: object) -> TypeGuard[TorchModule]:
    """Return whether a value is a torch.nn.Module, other than a ModuleList, which is a list of modules."""
    return _is_module_class(type(value))  # type: ignore[arg-type]  # a class is hashable: mypy reads object.__hash__


@lru_cache(256)  # every call asks for the class of its layers
def _is_module_class(cls: type) -> bool:
    classes = {(each.__module__, each.__name__) for each in cls.__mro__}
    return ("torch.nn.modules.module", "Module") in classes and (CONTAINER, "ModuleList") not in classes


def pooling_name(module: object) -> str:
    """Return the name of the torch.nn pooling class that a module has or inherits from; "" if there is none."""
    for cls in type(module).__mro__:
        if cls.__module__ == POOLING and cls.__name__ in LAYERS:
            return cls.__name__
    return ""


def layers_of(module: Any, path: str = "layers") -> tuple[Layer, ...]:  # noqa: ANN401 - a torch.nn.Module
    """Return the layers that compute what a pooling module computes, or a Sequential of pooling modules.

    ToDtype and Normalize of torchvision.transforms.v2, and a Compose of these, may be among the modules.

    Args:
        module: The module.
        path: Its path, for errors.

    Raises:
        InvalidArgumentError: The module, or one in the Sequential, is not a pooling module, computes something of its
            own, has hooks, has parameters that no layer has, or has random windows.

    """
    return tuple(_walk(module, path))


def _walk(module: Any, path: str) -> Iterator[Layer]:  # noqa: ANN401 - a torch.nn.Module
    if any(cls.__module__ == CONTAINER and cls.__name__ == "Sequential" for cls in type(module).__mro__):
        _check_call(module, CONTAINER, "Sequential", path)
        # children() would leave out a module's second occurrence.
        for position, child in enumerate(module):
            yield from _walk(child, f"{path}[{position}]")
        return
    if name := _transform_name(module):
        if name == "Compose":
            _check_call(module, f"{TRANSFORMS}._container", name, path)
            for position, child in enumerate(module.transforms):
                yield from _walk(child, f"{path}[{position}]")
            return
        _check_call(module, f"{TRANSFORMS}._transform", "Transform", path)
        _check_method(module, "transform", f"{TRANSFORMS}._misc", name, path)
        yield _step(module, name, path)
        return
    name = pooling_name(module)
    if not name:
        raise InvalidArgumentError(f"expected a pooling layer of torch.nn, got {_class_name(module)}", field=path)
    _check_call(module, POOLING, name, path)
    yield _layer(module, name, path)


def _transform_name(module: object) -> str:
    """Return the name of the torchvision class that a transform has or inherits from; "" if it is not a known one."""
    for cls in type(module).__mro__:
        known = {f"{TRANSFORMS}._misc": TRANSFORM_STEPS, f"{TRANSFORMS}._container": ("Compose",)}
        if cls.__name__ in known.get(cls.__module__, ()):
            return cls.__name__
    return ""


def _step(module: Any, name: str, path: str) -> Layer:  # noqa: ANN401 - a transform of torchvision
    cls = STEPS[name]
    values = {each.name: getattr(module, each.name) for each in fields(cls)}  # type: ignore[arg-type]  # as in _layer
    try:
        return cls(**values)
    except InvalidArgumentError as error:
        raise error.with_prefix(path) from None


def _check_call(module: Any, origin: str, name: str, path: str) -> None:  # noqa: ANN401 - a torch.nn.Module
    """Check that calling a module runs the forward of torch.nn's class, and nothing else."""
    _check_method(module, "forward", origin, name, path)
    base = next(cls for cls in type(module).__mro__ if cls.__name__ == "Module")
    if type(module).__call__ is not base.__call__:
        raise _overridden(module, "forward", origin, name, path)
    if module._forward_hooks or module._forward_pre_hooks:  # noqa: SLF001 - torch has no public way to read them
        msg = f"expected a module without forward hooks, got {_class_name(module)} with some"
        raise InvalidArgumentError(msg, field=path)


def _check_method(module: Any, method: str, origin: str, name: str, path: str) -> None:  # noqa: ANN401 - as above
    # An override may be in a subclass, in the instance, or assigned to torch's own class.
    function = getattr(getattr(module, method), "__func__", None)
    defined = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    if defined != (origin, f"{name}.{method}"):
        raise _overridden(module, method, origin, name, path)


def _overridden(module: object, method: str, origin: str, name: str, path: str) -> InvalidArgumentError:
    package = TRANSFORMS if origin.startswith(TRANSFORMS) else "torch.nn"
    msg = f"expected the {method} of {package}.{name}, got {_class_name(module)} with one of its own"
    return InvalidArgumentError(msg, field=path)


def _layer(module: Any, name: str, path: str) -> Layer:  # noqa: ANN401 - a torch.nn.Module
    cls = LAYERS[name]
    values: dict[str, Any] = {
        each.name: getattr(module, each.name)
        for each in fields(cls)  # type: ignore[arg-type]  # every layer is a dataclass
        if each.name != NOT_IN_TORCH.get(cls.family)
    }
    try:
        layer = cls(**values)
    except InvalidArgumentError as error:
        raise error.with_prefix(path) from None
    if cls.family == "fractional_max_pool":
        drawn = module._random_samples is None  # noqa: SLF001 - a parameter of its class
        received = f"torch.nn.{name}, which {'draws them in every call' if drawn else 'has random samples'}"
        msg = f"expected a module without random windows, got {received}; use poolrpc's {layer!r} with a seed"
        raise InvalidArgumentError(msg, field=path)
    return layer


def _class_name(module: object) -> str:
    cls = type(module)
    in_torch_nn = cls.__module__.startswith("torch.nn.modules.")
    return f"torch.nn.{cls.__name__}" if in_torch_nn else f"{cls.__module__}.{cls.__qualname__}"

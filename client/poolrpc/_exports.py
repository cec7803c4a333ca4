"""What `import poolrpc` offers."""

from poolrpc._transport.result import PoolResult
from poolrpc._version import __version__
from poolrpc._wire.codec import Limit, ServerInfo
from poolrpc.async_client import AsyncPoolClient
from poolrpc.chains import branch_shapes
from poolrpc.client import PoolClient
from poolrpc.errors import (
    CancelledError,
    DeadlineExceededError,
    ExpressionError,
    FailedPreconditionError,
    FieldViolation,
    InternalError,
    InvalidArgumentError,
    LimitExceededError,
    NotFoundError,
    PermissionDeniedError,
    PoolError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
)
from poolrpc.expression import parse_branches, parse_chain, parse_layer
from poolrpc.layers import (
    LAYERS,
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveAvgPool3d,
    AdaptiveMaxPool1d,
    AdaptiveMaxPool2d,
    AdaptiveMaxPool3d,
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    FractionalMaxPool2d,
    FractionalMaxPool3d,
    GlobalPool1d,
    GlobalPool2d,
    GlobalPool3d,
    Layer,
    LPPool1d,
    LPPool2d,
    LPPool3d,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
    MaxUnpool1d,
    MaxUnpool2d,
    MaxUnpool3d,
)

__all__ = [
    "LAYERS",
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "AsyncPoolClient",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "CancelledError",
    "DeadlineExceededError",
    "ExpressionError",
    "FailedPreconditionError",
    "FieldViolation",
    "FractionalMaxPool2d",
    "FractionalMaxPool3d",
    "GlobalPool1d",
    "GlobalPool2d",
    "GlobalPool3d",
    "InternalError",
    "InvalidArgumentError",
    "LPPool1d",
    "LPPool2d",
    "LPPool3d",
    "Layer",
    "Limit",
    "LimitExceededError",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MaxUnpool1d",
    "MaxUnpool2d",
    "MaxUnpool3d",
    "NotFoundError",
    "PermissionDeniedError",
    "PoolClient",
    "PoolError",
    "PoolResult",
    "ServerInfo",
    "UnauthenticatedError",
    "UnavailableError",
    "UnsupportedError",
    "__version__",
    "branch_shapes",
    "parse_branches",
    "parse_chain",
    "parse_layer",
]

# Reprs, tracebacks and pickles name the package that exports a class, not the file that defines it.
for _name in __all__:
    if hasattr(globals()[_name], "__module__"):  # every export but LAYERS and __version__
        globals()[_name].__module__ = "poolrpc"

"""poolrpc: PyTorch's pooling layers over gRPC, for clients without PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from poolrpc._exports import *  # noqa: F403
    from poolrpc._exports import __all__ as __all__
    from poolrpc._exports import __version__ as __version__
else:

    def __getattr__(name: str) -> object:
        # Imported on first use, so that the command can handle Ctrl-C while gRPC and NumPy are imported.
        if name in ("__all__", "__version__") or not name.startswith("__"):
            exports = import_module("poolrpc._exports")
            globals().update({each: getattr(exports, each) for each in ("__all__", *exports.__all__)})
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})

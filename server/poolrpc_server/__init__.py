"""The server of poolrpc: runs PyTorch's pooling layers for clients without PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from poolrpc_server.app import Server, serve
    from poolrpc_server.config import Config, ConfigError
    from poolrpc_server.embedding import embedded

__all__ = ["Config", "ConfigError", "Server", "embedded", "serve"]


def __getattr__(name: str) -> object:
    # Imported on first use: `app` imports torch, which takes seconds that `poolrpc-server --help` must not wait for.
    if name not in __all__:
        raise AttributeError(name)
    module = "config" if name.startswith("Config") else "embedding" if name == "embedded" else "app"
    try:
        return getattr(import_module(f"poolrpc_server.{module}"), name)
    except ModuleNotFoundError as error:
        msg = f"poolrpc_server.{name}: the server needs its extra: pip install 'poolrpc[server]' ({error})"
        raise ImportError(msg, name=error.name) from error

"""The server of poolrpc: runs PyTorch's pooling layers for clients without PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from poolrpc_server.app import Server, embedded, serve
    from poolrpc_server.config import Config, ConfigError

__all__ = ["Config", "ConfigError", "Server", "embedded", "serve"]


def __getattr__(name: str) -> object:
    # Imported on first use: `app` imports torch, which takes seconds that `poolrpc-server --help` must not wait for.
    if name not in __all__:
        raise AttributeError(name)
    return getattr(import_module("poolrpc_server.config" if name.startswith("Config") else "poolrpc_server.app"), name)

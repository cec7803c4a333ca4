"""What computes a layer on a tensor: torch's own operators, one entry a family."""

from poolrpc_server.kernels.eager import run

__all__ = ["run"]

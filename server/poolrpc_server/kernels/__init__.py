"""What computes a layer: torch's own operators, and kernels that give the same answer sooner on a CPU."""

from poolrpc_server.kernels.plans import Plan, plan

__all__ = ["Plan", "plan"]

"""Pooling kernels: torch's own operators, and faster ones that give the same results on a CPU."""

from poolrpc_server.compute.kernels.plan import ParallelFor, Plan
from poolrpc_server.compute.kernels.table import plan_for

__all__ = ["ParallelFor", "Plan", "plan_for"]

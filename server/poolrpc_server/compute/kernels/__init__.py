"""Pooling kernels: torch's own operators, and faster ones that give the same results on a CPU."""

from poolrpc_server.compute.kernels.plan import Plan, Row
from poolrpc_server.compute.kernels.table import plan_for

__all__ = ["Plan", "Row", "plan_for"]

"""What computes a layer: torch's own operators, and kernels that give the same answer sooner on a CPU."""

from poolrpc_server.compute.kernels.plans import ParallelFor, Plan, plan

__all__ = ["ParallelFor", "Plan", "plan"]

"""The table of kernels, and the plans made with it."""

import logging
from functools import lru_cache

import torch

from poolrpc.layers import Layer
from poolrpc_server.compute.kernels.adaptive_average import ADAPTIVE_AVERAGE
from poolrpc_server.compute.kernels.adaptive_max import ADAPTIVE_MAX, GLOBAL_MAX
from poolrpc_server.compute.kernels.element_wise import ELEMENT_WISE
from poolrpc_server.compute.kernels.integer_average import INTEGER_AVERAGE, IntegerAverage
from poolrpc_server.compute.kernels.mirrored_max import mirrored
from poolrpc_server.compute.kernels.packed_max import PACKED_MAX
from poolrpc_server.compute.kernels.plan import Plan
from poolrpc_server.compute.kernels.power_average import POWER_AVERAGE
from poolrpc_server.compute.kernels.raster_average import RASTER_AVERAGE
from poolrpc_server.compute.kernels.separable_max import SEPARABLE_MAX
from poolrpc_server.compute.kernels.tiny_max import TINY_MAX
from poolrpc_server.compute.kernels.unsigned_max import unsigned
from poolrpc_server.compute.kernels.windows import Sizes
from poolrpc_server.compute.with_operand import WithOperand
from poolrpc_server.telemetry.logs import log

PLANS = 4096
"""The number of plans to remember; each takes 1 to 2.5 KiB."""

TABLE = (
    SEPARABLE_MAX,
    TINY_MAX,
    PACKED_MAX,
    RASTER_AVERAGE,
    POWER_AVERAGE,
    GLOBAL_MAX,
    ADAPTIVE_MAX,
    ADAPTIVE_AVERAGE,
    unsigned(SEPARABLE_MAX),
    unsigned(PACKED_MAX),
    mirrored(SEPARABLE_MAX),
    ELEMENT_WISE,
    INTEGER_AVERAGE,
)
"""Every kernel, in the order in which they are tried: the first that fits and pays is used, or else torch's operators.

Every kernel gives torch's result bit for bit (except for the sign of a zero among maxima), so the choice affects only
the speed.
"""


@lru_cache(maxsize=PLANS)
def plan_for(
    layer: Layer | IntegerAverage | WithOperand, dtype: torch.dtype, plane: Sizes, channels: int | None, device: str
) -> Plan:
    """Return the plan of a layer; it is made once.

    Args:
        layer: The layer.
        dtype: The dtype of the cells.
        plane: The spatial shape of the input.
        channels: The number of channels if they are last in memory, None if they are first.
        device: The type of the device: "cpu", "cuda", "mps".

    """
    plan = Plan(layer, dtype, plane, channels, device, layer.output_plane(plane), TABLE)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("plan", plan=plan.explain())
    return plan

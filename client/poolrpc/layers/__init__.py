"""The pooling layers: frozen values with torch.nn's names, parameters, order and defaults, that compute their shapes.

The element-wise steps of a chain are layers too, with torchvision's names.

A layer holds parameters; the server computes its output. Without torch, a layer knows the dtypes that it
supports (`dtypes`), the shape of its output (`output_shape`), and the work of a call (`work`).
"""

from poolrpc.layers.adaptive_pool import (
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveAvgPool3d,
    AdaptiveMaxPool1d,
    AdaptiveMaxPool2d,
    AdaptiveMaxPool3d,
)
from poolrpc.layers.avg_pool import AvgPool1d, AvgPool2d, AvgPool3d
from poolrpc.layers.base import FLOATS, INTEGERS, WIDE_FLOATS, Layer
from poolrpc.layers.blur_pool import BlurPool2d
from poolrpc.layers.element_wise import STEPS, Normalize, Round, ToDtype
from poolrpc.layers.fractional_max_pool import SEED_STEP, FractionalMaxPool2d, FractionalMaxPool3d
from poolrpc.layers.global_pool import GlobalPool1d, GlobalPool2d, GlobalPool3d
from poolrpc.layers.lp_pool import LPPool1d, LPPool2d, LPPool3d
from poolrpc.layers.max_pool import MaxPool1d, MaxPool2d, MaxPool3d
from poolrpc.layers.max_unpool import MaxUnpool1d, MaxUnpool2d, MaxUnpool3d
from poolrpc.layers.pool import Pool1d, Pool2d, Pool3d
from poolrpc.layers.reductions import REDUCTIONS, LogSumExp, Norm, PowerMean, Reduction, Softmax
from poolrpc.layers.regions import RoIAlign, RoIPool
from poolrpc.layers.segment_pool import SegmentPool

__all__ = [
    "FLOATS",
    "INTEGERS",
    "LAYERS",
    "REDUCTIONS",
    "SEED_STEP",
    "STEPS",
    "WIDE_FLOATS",
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "BlurPool2d",
    "FractionalMaxPool2d",
    "FractionalMaxPool3d",
    "GlobalPool1d",
    "GlobalPool2d",
    "GlobalPool3d",
    "LPPool1d",
    "LPPool2d",
    "LPPool3d",
    "Layer",
    "LogSumExp",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MaxUnpool1d",
    "MaxUnpool2d",
    "MaxUnpool3d",
    "Norm",
    "Normalize",
    "Pool1d",
    "Pool2d",
    "Pool3d",
    "PowerMean",
    "Reduction",
    "RoIAlign",
    "RoIPool",
    "Round",
    "SegmentPool",
    "Softmax",
    "ToDtype",
]

LAYERS: dict[str, type[Layer]] = {
    cls.__name__: cls
    for cls in (
        MaxPool1d,
        MaxPool2d,
        MaxPool3d,
        AvgPool1d,
        AvgPool2d,
        AvgPool3d,
        LPPool1d,
        LPPool2d,
        LPPool3d,
        FractionalMaxPool2d,
        FractionalMaxPool3d,
        AdaptiveMaxPool1d,
        AdaptiveMaxPool2d,
        AdaptiveMaxPool3d,
        AdaptiveAvgPool1d,
        AdaptiveAvgPool2d,
        AdaptiveAvgPool3d,
        MaxUnpool1d,
        MaxUnpool2d,
        MaxUnpool3d,
        GlobalPool1d,
        GlobalPool2d,
        GlobalPool3d,
        Pool1d,
        Pool2d,
        Pool3d,
        BlurPool2d,
        SegmentPool,
        RoIPool,
        RoIAlign,
    )
}
"""Every pooling layer by its name."""

"""Reductions for the tests of layers that reduce."""

from poolrpc.layers.reductions import NAMED, LogSumExp, Norm, PowerMean, Softmax

REDUCES = (
    *NAMED,
    *map(Norm, (1, 2, 3.5, float("inf"))),
    *(PowerMean(3), PowerMean(-1, eps=0.5), LogSumExp(), LogSumExp(10), Softmax(), Softmax(-0.5)),
)
"""A few reductions of each kind."""

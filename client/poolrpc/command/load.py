"""A load: the calls to make, and what became of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from poolrpc.tensors import BFLOAT16_BITS, numpy_dtype

if TYPE_CHECKING:
    from poolrpc._transport.options import Transport
    from poolrpc.chains import Chain, Shape
    from poolrpc.tensors import Array, Layout


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """The calls to make.

    Attributes:
        requests: The shape and the branches of each request; all are equally likely.
        dtype: The dtype of the tensors.
        layout: The layout of the tensors.
        rate: Calls per second, which are due at random times. None: each thread calls again once it has its answer.
        concurrency: The largest number of calls at a time.
        connections: The number of connections.
        seconds: Duration of the load.
        warmup: Seconds of the same load before it, which are not counted.
        timeout: The timeout of a call, in seconds. None: no limit.
        transport: The transport. None: the client chooses.
        expected: For each request, the arrays of its answer, to which each answer is compared. None: it is not.
        part: The part of the calls that a process makes, and the number of parts.

    """

    requests: tuple[tuple[Shape, tuple[Chain, ...]], ...]
    dtype: str = "float32"
    layout: Layout = "NCHW"
    rate: float | None = None
    concurrency: int = 1
    connections: int = 1
    seconds: float = 10.0
    warmup: float = 1.0
    timeout: float | None = 60.0
    transport: Transport | None = None
    expected: tuple[tuple[Array, ...], ...] | None = None
    part: tuple[int, int] = (0, 1)

    def input_of(self, request: int) -> Array:
        """Return a tensor of random values for a request, always the same."""
        shape = self.requests[request][0]
        draw, dtype = np.random.default_rng(request), numpy_dtype(self.dtype)
        if dtype == BFLOAT16_BITS:  # the bits of normal numbers, since NumPy lacks the dtype
            return (draw.integers(0, 2**12, shape, np.uint16) | np.uint16(0x3000)).view(dtype)
        if dtype.kind in "iu":
            limits = np.iinfo(dtype)
            return draw.integers(limits.min, limits.max, shape, dtype, endpoint=True)
        return draw.standard_normal(shape, np.float32).astype(dtype)

    def schedule(self) -> list[tuple[float, int]]:
        """Return when each call of a rate is due, in seconds from the beginning, and its request.

        The times are random and independent of each other, as calls of many clients are; those of the warm-up are
        negative. The parts of a load divide the same times among them.
        """
        draw, rate = np.random.default_rng(0), self.rate or 0.0
        warmup = draw.uniform(-self.warmup, 0, round(rate * self.warmup))
        times = np.sort(np.concatenate([warmup, draw.uniform(0, self.seconds, round(rate * self.seconds))]))
        requests = draw.integers(len(self.requests), size=len(times))
        number, count = self.part
        return list(zip(times[number::count].tolist(), requests[number::count].tolist(), strict=True))

    def split(self, count: int) -> list[Load]:
        """Return the load as the parts of so many processes."""

        def share(total: int, number: int) -> int:
            return total // count + (number < total % count)

        return [
            replace(
                self,
                concurrency=share(self.concurrency, number),
                connections=share(self.connections, number),
                part=(number, count),
            )
            for number in range(count)
        ]


@dataclass(frozen=True, slots=True, eq=False)
class LoadResult:
    """What became of the calls of a load, in the order in which they were due.

    Attributes:
        due: When each call was due, in seconds from the beginning; without a rate, a call is due when it is sent.
        late: Seconds after that time until each call was sent.
        latency: Seconds from that time to the answer of each call, or to its failure.
        request: The number of the request of each call.
        failed: Whether each call failed.
        errors: The number of calls that failed, by kind.
        messages: The message of a failure of each kind.
        unsent: The number of calls that were due but not sent, since the largest number of calls was in flight.
        seconds: Seconds from the beginning to the end of the load, or to the last answer if that is later.
        cpus: The number of CPUs that the processes which made the calls kept busy.
        busiest: The number of CPUs that the busiest of these processes kept busy.

    """

    due: Array
    late: Array
    latency: Array
    request: Array
    failed: Array
    errors: dict[str, int]
    messages: dict[str, str]
    unsent: int
    seconds: float
    cpus: float
    busiest: float

    @property
    def answered(self) -> Array:
        """The latencies of the calls that were answered, in seconds."""
        answered: Array = self.latency[~self.failed]
        return answered

    @property
    def rate(self) -> float:
        """Calls answered per second."""
        return len(self.answered) / self.seconds

    def within(self, part: float) -> float:
        """Return the seconds within which a part of all calls was answered; infinite if fewer were answered."""
        missing = len(self.latency) + self.unsent - len(self.answered)
        return quantile(np.concatenate([self.answered, np.full(missing, np.inf)]), part)


def quantile(values: Array, part: float) -> float:
    """Return the smallest value that at least a part of the values does not exceed; NaN without values."""
    # A little less, since 13 / 85 * 85 is more than 13 in floating point, which would be the next value.
    return float(np.quantile(values, max(part - 1e-12, 0), method="inverted_cdf")) if len(values) else float("nan")

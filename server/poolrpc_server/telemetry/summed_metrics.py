"""The metrics of several processes, summed by the process that starts them."""

from __future__ import annotations

import operator
from threading import Lock
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from poolrpc_server.telemetry.metrics import NOT_SUMMED, SILENT, SILENT_HELP, DroppedLines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Snapshot = list[tuple[str, str, str, list[tuple[str, dict[str, str], float]]]]
"""The metrics of a process at a moment, for JSON: name, type and help of each, and its samples."""


def snapshot(families: Iterable[Metric]) -> Snapshot:
    """Return the present values of metrics, such as those that a registry collects."""
    return [
        (
            family.name,
            family.type,
            family.documentation,
            # When a process began to count says nothing about a sum.
            [(each.name, each.labels, each.value) for each in family.samples if not each.name.endswith("_created")],
        )
        for family in families
    ]


class SummedMetrics(Collector):
    """The sums of the snapshots that several processes sent, and this process's own counters.

    A process that ends leaves its counters, and takes its gauges along. Nothing is shared but these snapshots: in files
    of a folder, as prometheus_client's multiprocess mode has them, a full disk would kill the processes.

    Attributes:
        registry: The registry that shows the sums.

    """

    def __init__(self, restarts: Callable[[], int], silent_seconds: Callable[[], float] = lambda: 0.0) -> None:
        """Make sums of no process.

        Args:
            restarts: Returns how many processes were restarted.
            silent_seconds: Returns for how long the most silent of the processes has not answered its watchdog.

        """
        self._restarts = restarts
        self._silent_seconds = silent_seconds
        self._own = ProcessCollector(registry=None)
        self._lock = Lock()
        self._living: dict[int, Snapshot] = {}
        self._ended: Snapshot = []
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def update(self, process: int, values: Snapshot) -> None:
        """Replace the values of a process, by its number."""
        with self._lock:
            self._living[process] = values

    def forget(self, process: int) -> None:
        """Add the counters of a process that has ended to those of earlier ones, and drop its gauges."""
        with self._lock:
            counted = [each for each in self._living.pop(process, []) if each[1] != "gauge"]
            self._ended = snapshot(_sum([self._ended, counted]))

    def collect(self) -> Iterable[Metric]:
        """Return the sums."""
        with self._lock:
            values = [*self._living.values(), self._ended]
        yield CounterMetricFamily("poolrpc_worker_restarts", "Workers that were restarted.", value=self._restarts())
        silent = GaugeMetricFamily(SILENT, SILENT_HELP, value=self._silent_seconds())
        own = snapshot([*DroppedLines().collect(), *self._own.collect()])
        yield from _sum([own, *values, snapshot([silent])])


def _sum(snapshots: Iterable[Snapshot]) -> list[Metric]:
    families: dict[str, Metric] = {}
    sums: dict[str, dict[tuple[Any, ...], float]] = {}
    for values in snapshots:
        for name, kind, help_text, samples in values:
            families.setdefault(name, Metric(name, help_text, kind))
            family = sums.setdefault(name, {})
            for sample, labels, value in samples:
                key = (sample, *labels.items())
                aggregate: Callable[[float, float], float] = NOT_SUMMED.get(name, operator.add)
                family[key] = aggregate(family[key], value) if key in family else value
    for name, family in sums.items():
        for (sample, *pairs), value in family.items():
            families[name].add_sample(sample, dict(pairs), value)
    return list(families.values())

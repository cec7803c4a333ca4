"""The command `poolrpc tune`: servers with different flags on this machine, measured under a load."""

from __future__ import annotations

import dataclasses
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from poolrpc._shapes.parameters import real
from poolrpc.client import PoolClient
from poolrpc.command.bench import add_load_arguments, check_files, load_of
from poolrpc.command.load_processes import LoadProcesses
from poolrpc.command.load_run import arrays_of, first_answers
from poolrpc.command.local_server import local_server, without_settings
from poolrpc.command.report import number
from poolrpc.errors import InvalidArgumentError, PoolError

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Callable, Sequence

    from poolrpc.command.load import Load, LoadResult

DURATION = 150.0
"""Seconds of all measurements, with the starts of servers, unless another number is given."""

TRIAL_SHARE = 0.4
"""The share of that time after which no more flags are tried."""

MIN_RATE = 10.0
"""The least calls per second: of fewer, a measurement of some seconds has no p99."""

TRIAL_SECONDS, TRIAL_WARMUP = 1.5, 0.5
ROUNDS, FINALISTS = 5, 3
MAX_ROUND_SECONDS, MIN_ROUND_SECONDS, ROUND_WARMUP = 4.0, 0.5, 0.3

GAIN = 1.05
"""How many times as good as the defaults flags must be, in the median, to be worth setting."""

TIMEOUT = 10.0
"""Seconds after which a call has failed."""

SMALL_BYTES = 256 * 2**10
"""Inputs and outputs of the calls that a server batches on a CPU."""

QUEUE_FLAGS = ("--max-queue", "1024", "--max-queue-seconds", "5")
"""For a load that the default queue rejects."""

BATCH_FLAGS = (("--max-queue-delay", "1"), ("--max-batch-bytes", "8MiB"))


@dataclass(slots=True)
class Trial:
    """Flags, and what was measured with them.

    Attributes:
        flags: The flags of poolrpc-server.
        results: The result of each run of the rounds, or of the first run if there were none.
        scores: The scores of these runs.
        failure: Why the server could not be measured; empty if it could.

    """

    flags: tuple[str, ...]
    results: list[LoadResult] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    failure: str = ""

    def data(self) -> dict[str, Any]:
        """Return the figures, for JSON."""
        if not self.results:
            return {"flags": self.flags, "runs": 0, "failure": self.failure}
        calls = sum(len(each.latency) + each.unsent for each in self.results)
        answered = sum(len(each.answered) for each in self.results)
        return {
            "flags": self.flags,
            "runs": len(self.results),
            "calls_per_second": median(each.rate for each in self.results),
            "p99_ms": median(each.within(0.99) for each in self.results) * 1000,
            "failed": (calls - answered) / max(calls, 1),
            "errors": sorted({kind for each in self.results for kind in each.errors}),
            "scores": self.scores,
        }


def add_tune_arguments(parser: ArgumentParser, layer_help: str) -> None:
    """Add the arguments of `poolrpc tune`."""
    add_load_arguments(parser, layer_help)
    parser.add_argument(
        "--p99",
        type=float,
        required=True,
        metavar="SECONDS",
        help="time within which 99 of 100 calls are to be answered, in seconds; a call that fails is not",
    )
    parser.add_argument(
        "--duration",
        type=float,
        default=DURATION,
        metavar="SECONDS",
        help=f"duration of all measurements, in seconds; with less, fewer flags are tried [default: {DURATION:g}]",
    )
    parser.set_defaults(timeout=TIMEOUT)


def score_of(result: LoadResult, load: Load, p99: float) -> float:
    """Return how good a result is; higher is better, and twice as good is twice as high.

    With a rate, it is how many times shorter the p99 of all calls is than the one that is asked for. Without, it is the
    calls per second, divided by how many times longer the p99 is, if it is longer.
    """
    margin = p99 / result.within(0.99)
    return margin if load.rate is not None else result.rate * min(margin, 1.0)


def cpu_flags(cpus: int) -> list[tuple[str, ...]]:
    """Return the flags to try first: numbers of threads and of worker processes."""
    threads = sorted({1, cpus // 2, 2 * cpus} - {0, cpus})
    workers = sorted({2**power for power in range(1, cpus.bit_length())} | ({cpus} if cpus > 1 else set()))
    return [
        *(("--threads", str(each)) for each in threads),
        *(("--workers", str(each)) for each in workers if each <= cpus),
    ]


def limit_flags(best: Trial, nbytes: int) -> list[tuple[str, ...]]:
    """Return the flags to try next: limits of the queue and of batches, alone and with the best flags so far.

    Args:
        best: The best trial so far.
        nbytes: Bytes of the largest call, with its answer.

    """
    further = [*(BATCH_FLAGS if nbytes <= SMALL_BYTES else ())]
    if any(kind.startswith("UnavailableError") for each in best.results for kind in each.errors):
        further.append(QUEUE_FLAGS)
    return [(*flags, *each) for flags in dict.fromkeys(((), best.flags)) for each in further]


def is_better(trial: Trial, defaults: Trial) -> bool:
    """Return whether flags are better than the defaults by more than the noise.

    In each round the defaults run twice, and the flags once. Flags that change nothing are the best of these three
    runs in one round of three, and in each of five rounds once in 243 times.
    """
    pairs = list(zip(defaults.scores[::2], defaults.scores[1::2], strict=True))
    return all(own > max(pair) for own, pair in zip(trial.scores, pairs, strict=True)) and gain(trial, defaults) >= GAIN


def gain(trial: Trial, defaults: Trial) -> float:
    """Return how many times as good as the defaults flags are, as the median of the rounds' ratios."""
    means = (sum(pair) / 2 for pair in zip(defaults.scores[::2], defaults.scores[1::2], strict=True))
    return median(own / mean if mean else math.inf for own, mean in zip(trial.scores, means, strict=True))


class Tuning:
    """The measurements of one command.

    Args:
        processes: The processes that make the calls.
        load: The load.
        p99: The p99 that is asked for, in seconds.
        duration: Seconds of all measurements.
        note: Called with a line for each measurement.

    Attributes:
        trials: All that was tried; the first has the defaults.
        cpus: The number of CPUs that a server finds.

    """

    def __init__(
        self, processes: LoadProcesses, load: Load, p99: float, duration: float, note: Callable[[str], None]
    ) -> None:
        self._processes = processes
        self._duration = duration
        self._overhead = 0.0
        self._load = load
        self._p99 = p99
        self._note = note
        self._unix = load.transport in {"arena", "local"}
        self._started = time.monotonic()
        self.trials: list[Trial] = []
        self.cpus = 1

    def run(self) -> Trial:
        """Try flags, compare the best with the defaults in rounds, and return the best."""
        with local_server((), unix=self._unix) as address:
            # All answers are compared with the first one, so that no flags win by wrong answers.
            answers = first_answers(address, self._load)
            self._load = dataclasses.replace(self._load, expected=tuple(map(arrays_of, answers)))
            with PoolClient(address) as client:
                self.cpus = client.server_info().threads
            self._measure(Trial(()), address, TRIAL_SECONDS, TRIAL_WARMUP)
        defaults = self.trials[0]
        for flags in cpu_flags(self.cpus):
            self._try(flags)
        nbytes = max(self._load.input_of(request).nbytes for request in range(len(answers)))
        nbytes += max(sum(each.nbytes for each in arrays) for arrays in self._load.expected or ())
        for flags in limit_flags(self._ranked()[0], nbytes):
            self._try(flags)
        finalists = [each for each in self._ranked() if each is not defaults][:FINALISTS]
        return self._compare(defaults, finalists)

    def _ranked(self) -> list[Trial]:
        return sorted((each for each in self.trials if each.scores), key=lambda each: -each.scores[0])

    def _try(self, flags: tuple[str, ...]) -> None:
        if len(self.trials) > 1 and time.monotonic() - self._started > self._duration * TRIAL_SHARE:
            self.trials.append(Trial(flags, failure="there was no time for it"))
            return
        trial = Trial(flags)
        try:
            with local_server(flags, unix=self._unix) as address:
                self._measure(trial, address, TRIAL_SECONDS, TRIAL_WARMUP)
        except PoolError as error:  # such as too little memory for so many processes
            trial.failure = str(error)
            self.trials.append(trial)

    def _measure(self, trial: Trial, address: str, seconds: float, warmup: float) -> None:
        started = time.monotonic()
        result = self._processes.run(address, dataclasses.replace(self._load, seconds=seconds, warmup=warmup))
        self._overhead = max(self._overhead, time.monotonic() - started - seconds - warmup)
        trial.results.append(result)
        trial.scores.append(score_of(result, self._load, self._p99))
        if trial not in self.trials:
            self.trials.append(trial)
        p99 = f"p99 {number(result.within(0.99) * 1000)} ms"
        self._note(f"{' '.join(trial.flags) or 'defaults'}: {number(result.rate)} calls per second, {p99}")

    def _compare(self, defaults: Trial, finalists: Sequence[Trial]) -> Trial:
        contenders = [defaults, *finalists, defaults]
        with ExitStack() as servers:
            addresses = {}
            for each in (defaults, *finalists):
                addresses[each.flags] = servers.enter_context(local_server(each.flags, unix=self._unix))
                each.results.clear()
                each.scores.clear()
            left = self._duration - (time.monotonic() - self._started)
            seconds = left / (ROUNDS * len(contenders)) - ROUND_WARMUP - self._overhead
            seconds = min(max(seconds, MIN_ROUND_SECONDS), MAX_ROUND_SECONDS)
            for turn in range(ROUNDS):
                shift = turn % len(contenders)
                for each in contenders[shift:] + contenders[:shift]:
                    self._measure(each, addresses[each.flags], seconds, ROUND_WARMUP)
        better = [each for each in finalists if is_better(each, defaults)]
        return max(better, key=lambda each: gain(each, defaults), default=defaults)


def tune(options: Namespace, note: Callable[[str], None]) -> tuple[object, Sequence[str], int]:
    """Measure servers with different flags, and return the result as data and as lines, and the exit status."""
    if options.rate is None and options.concurrency is None:
        raise InvalidArgumentError("expected calls per second, or a concurrency, got neither", field="rate")
    if options.rate is not None and not options.rate >= MIN_RATE:
        msg = f"expected at least {MIN_RATE:g} calls per second, of which some seconds have a p99, got {options.rate:g}"
        raise InvalidArgumentError(msg, field="rate")
    p99, duration = real("p99", options.p99), real("duration", options.duration)
    check_files(options.json)
    load = load_of(options, TRIAL_SECONDS, TRIAL_WARMUP)
    with without_settings(), LoadProcesses(options.processes) as processes:
        tuning = Tuning(processes, load, p99, duration, note)
        best = tuning.run()
    defaults = tuning.trials[0]
    command = " ".join(("poolrpc-server", *best.flags))
    noise = max(
        max(pair) / min(pair) - 1 if min(pair) else math.inf
        for pair in zip(defaults.scores[::2], defaults.scores[1::2], strict=True)
    )
    p99_ms = best.data()["p99_ms"]
    data = {
        "command": command,
        "flags": best.flags,
        "gain": 1.0 if best is defaults else gain(best, defaults),
        "noise": noise,
        "met": p99_ms <= p99 * 1000,
        "cpus": tuning.cpus,
        "trials": [each.data() for each in tuning.trials],
    }
    calls = f"{load.concurrency} at a time" if load.rate is None else f"{load.rate:g} per second"
    work = f"{' and '.join(options.layer)} of {load.dtype} {', '.join(options.shape)}"
    text = [
        f"{work}: {calls}, p99 within {number(p99 * 1000)} ms",
        f"{tuning.cpus} CPUs, which the server shares with the calls' own work",
        "",
        *_table(tuning.trials),
        "",
        f"Two runs of the defaults in the same round differed by up to {noise:.0%}.",
    ]
    if best is defaults:
        text.append(f"Nothing was better than both of them in each of {ROUNDS} rounds. Keep the defaults:")
    else:
        text.append(f"{data['gain']:.2f} times as good as the defaults, and better in each of {ROUNDS} rounds:")
    text.append(command)
    if not data["met"]:
        text.append(f"Its p99 is {number(p99_ms)} ms, which is more than was asked for.")
    return data, text, 0


def _table(trials: Sequence[Trial]) -> list[str]:
    rows = [("flags", "calls/s", "p99 ms", "failed", "runs")]
    for trial in trials:
        data, flags = trial.data(), " ".join(trial.flags) or "(defaults)"
        if trial.results:
            figures = (number(data["calls_per_second"]), number(data["p99_ms"]), f"{data['failed']:.1%}")
            rows.append((flags, *figures, str(data["runs"])))
        else:
            rows.append((flags, trial.failure, "", "", ""))
    width = max(len(row[0]) for row in rows)
    return [
        f"{flags:<{width}}  {one:>9} {two:>9} {three:>8} {four:>5}".rstrip() for flags, one, two, three, four in rows
    ]

"""The command `poolrpc pool`: one file, or many with several calls in flight."""

from __future__ import annotations

import errno
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np

from poolrpc.chains import branch_shapes, operand_name
from poolrpc.command.files import load, paths_of, target_for
from poolrpc.errors import PermissionDeniedError, PoolError, UnauthenticatedError, UnavailableError
from poolrpc.operands import operand_of, wire_name

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from poolrpc._transport.join import Join
    from poolrpc._transport.result import PoolResult
    from poolrpc.chains import Chain, Outputs, Shape
    from poolrpc.client import PoolClient
    from poolrpc.command.files import Source
    from poolrpc.command.inputs import Inputs
    from poolrpc.tensors import Array, Layout

SMALL_CELLS = 64
"""The number of cells up to which the values of an output are printed."""

IN_FLIGHT = 4
"""The number of files that are read, sent and written at a time."""

DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


@dataclass(frozen=True, slots=True)
class Work:
    """What is done with each file.

    Attributes:
        branches: The layers.
        layout: The layout that the user chose; None if none.
        skip_existing: Whether a file whose outputs exist is skipped.
        steps: The numbers of the layers of the one branch whose outputs are kept; None: the last of each branch.
        operand: The operand of every file, by its name; empty: that of a .npz.
        join: How the outputs of the branches are joined to one; None: they stay apart.

    """

    branches: tuple[Chain, ...]
    layout: Layout | None
    skip_existing: bool
    steps: Outputs | None = None
    operand: Mapping[str, Array] = field(default_factory=dict)
    join: Join | None = None

    @property
    def results(self) -> int:
        """The number of results."""
        return 1 if self.join else len(self.chains)

    @property
    def chains(self) -> tuple[Chain, ...]:
        """The layers that lead to each result."""
        if self.steps is None:
            return self.branches
        return tuple(self.branches[0][: step + 1] for step in self.steps)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a file.

    Attributes:
        name: The name of the file.
        data: The report, for JSON.
        text: The report, as lines.
        notes: What was left out or changed, one sentence each.
        error: Why the file failed; empty if it did not.
        skipped: Whether its outputs existed.

    """

    name: str
    data: dict[str, Any]
    text: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    error: str = ""
    skipped: bool = False


@dataclass(slots=True)
class Summary:
    """The outcomes of many files.

    Attributes:
        total: The number of files.
        pooled: The number of files that were pooled.
        skipped: The number of files whose outputs existed.
        failures: The name and the error of each file that failed.

    """

    total: int
    pooled: int = 0
    skipped: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Count an outcome."""
        if outcome.error:
            self.failures.append((outcome.name, outcome.error))
        elif outcome.skipped:
            self.skipped += 1
        else:
            self.pooled += 1

    def __str__(self) -> str:
        left = self.total - self.pooled - self.skipped - len(self.failures)
        counts = [(self.pooled, "pooled"), (self.skipped, "skipped"), (len(self.failures), "failed"), (left, "left")]
        parts = ", ".join(f"{count} {what}" for count, what in counts if count or what == "pooled")
        return f"{count_files(self.total)}: {parts}"


def count_files(count: int) -> str:
    """Return "1 file", "2 files"."""
    return f"{count} file{'' if count == 1 else 's'}"


def steps(chain: Chain, shapes: tuple[Shape, ...]) -> list[dict[str, object]]:
    """Return the layers of a chain and the shape after each, for JSON."""
    return [{"layer": repr(layer), "shape": shape} for layer, shape in zip(chain, shapes, strict=True)]


def step_lines(chain: Chain, shapes: tuple[Shape, ...]) -> list[str]:
    """Return the layers of a chain and the shape after each, as lines."""
    # The layers after a chain's first are indented, so that each branch starts at the margin.
    return [
        f"{'  then ' if step else ''}{layer!r} -> {shape}"
        for step, (layer, shape) in enumerate(zip(chain, shapes, strict=True))
    ]


def describe(error: BaseException) -> str:
    """Return the message of an error on one line, which is never empty."""
    return " ".join(str(error).split()) or type(error).__name__


def pool_file(client: PoolClient, path: Path, output: Path | None, work: Work) -> Outcome:
    """Read a file, pool it, and write the results.

    Args:
        client: The client.
        path: The file.
        output: The file for the results; None if they are not kept.
        work: What to do.

    Raises:
        PoolError: The file is invalid, or the call failed.
        OSError: A file can't be read or written.

    """
    if work.skip_existing and output and all(each.exists() for each in paths_of(output, work.results)):
        return Outcome(str(path), {"skipped": True}, (f"skipped, since {output} exists",), skipped=True)
    source = load(path).converted_for(operand_name(work.branches, given=bool(work.operand)))
    layout, x = source.layout_for(work.layout), source.x
    branches, chains = source.layers_for(work.branches), source.layers_for(work.chains)
    target = target_for(output, source, chains, work.layout, work.join) if output else None
    operand, notes = _operand_for(source, branches, work.operand)
    joined = {}
    if work.join:
        results = [client.pool_each(x, branches, join=work.join, layout=layout, **operand)]
        joined = {"join": work.join, **_described(results[0]), "shape": results[0].shape}
    elif work.steps is None:
        results = client.pool_each(x, branches, layout=layout, **operand)
    else:
        # An image's layers may have conversions between them, after which the numbers are others.
        numbers = [len(chain) - 1 for chain in chains]
        results = client.pool_steps(x, branches[0], numbers, layout=layout, **operand)
    if target:
        notes += target.save(results)
    text = [f"input: {x.dtype.name} {x.shape} {layout}"]
    if work.join:
        given = operand_of(operand, branches)
        shapes = branch_shapes(x.shape, branches, layout, (), None if given is None else given.shape)
        described: list[dict[str, Any]] = [{} for _ in chains]
        text += [line for each in zip(chains, shapes, strict=True) for line in step_lines(*each)]
        text += [f"join {work.join} -> {results[0].shape}", *_value_lines(results[0])]
    else:
        shapes, described = [result.shapes for result in results], [_described(result) for result in results]
        shown = 0
        for chain, result in zip(chains, results, strict=True):
            text += step_lines(chain, result.shapes)[shown:]
            text += _value_lines(result)
            shown = 0 if work.steps is None else len(chain)
    saved = target.paths if target else ()
    text += [f"saved {each}{target.remark if target else ''}" for each in saved]
    data = {
        "input": {"shape": x.shape, "dtype": x.dtype.name, "layout": layout},
        "branches": [
            {"steps": steps(chain, each), **rest} for chain, each, rest in zip(chains, shapes, described, strict=True)
        ],
        **({"joined": joined} if joined else {}),
        "saved": [str(each) for each in saved],
    }
    return Outcome(str(path), data, tuple(text), source.notes + notes)


def _operand_for(
    source: Source, branches: Sequence[Chain], given: Mapping[str, Array]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the operand of a call, by its name, and a note for each array that could be one and is left out."""
    if given:
        return dict(given), ()
    arrays = {**({} if source.indices is None else {"indices": source.indices}), **source.operands}
    needed = operand_name(branches, given=bool(arrays))
    taken = {name: array for name, array in arrays.items() if wire_name(name) == needed}
    return taken, tuple(f"the {name} are left out, since no layer takes them" for name in arrays if name not in taken)


def _small(result: PoolResult) -> list[tuple[str, Array]]:
    named = [("values", result.output), *([("indices", result.indices)] if result.indices is not None else [])]
    return named if 0 < result.output.size <= SMALL_CELLS else []


def _described(result: PoolResult) -> dict[str, Any]:
    return {"dtype": result.output.dtype.name, **{name: array.tolist() for name, array in _small(result)}}


def _value_lines(result: PoolResult) -> list[str]:
    lines = []
    for name, array in _small(result):
        text = np.array2string(array, separator=", ", max_line_width=10**6, prefix=" " * (len(name) + 4))
        lines += f"  {name}: {text}".splitlines()
    return lines


def pool_files(  # noqa: PLR0913 - what many files need
    client: PoolClient,
    inputs: Inputs,
    outputs: Sequence[Path] | None,
    work: Work,
    *,
    write: Callable[[Sequence[str]], None],
    note: Callable[[str], None],
) -> tuple[dict[str, object], Summary]:
    """Pool many files, several at a time, and report each in order. A file that fails does not end the others.

    Args:
        client: The client, which is closed.
        inputs: The files.
        outputs: The file for the results of each; None if they are not kept.
        work: What to do.
        write: Called with lines for the standard output.
        note: Called with a line for the standard error.

    Returns:
        The report for JSON, and the summary.

    Raises:
        PoolError: The server is unavailable, or rejects the token.
        OSError: The disk is full.

    """
    summary, reports = Summary(len(inputs.files)), []

    def pool_one(item: tuple[tuple[Path, Path], Path | None]) -> Outcome:
        (path, _), output = item
        try:
            if output:
                output.parent.mkdir(parents=True, exist_ok=True)
            return pool_file(client, path, output, work)
        except (UnavailableError, UnauthenticatedError, PermissionDeniedError):
            raise  # every other file would fail as well
        except (PoolError, OSError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            return Outcome(str(path), {"error": describe(error)}, error=describe(error))

    # The client is closed first: its calls in flight end, and with them the threads.
    with (
        ThreadPoolExecutor(IN_FLIGHT, "poolrpc-files") as executor,
        client,
        _progress(summary.total, note) as (bar, say),
    ):
        try:
            items = zip(inputs.files, outputs or repeat(None), strict=False)
            with closing(_in_order(executor, pool_one, items)) as outcomes:
                for outcome in outcomes:
                    summary.add(outcome)
                    reports.append({"file": outcome.name, **outcome.data})
                    for each in outcome.notes:
                        say(f"{outcome.name}: {each}")
                    if outputs is None and not outcome.error:
                        write([outcome.name, *(f"  {line}" for line in outcome.text)])
                    bar()
        except BaseException:
            say(f"{summary}; --skip-existing continues" if outputs else str(summary))
            raise
    data = {"files": reports, "pooled": summary.pooled, "skipped": summary.skipped, "failed": len(summary.failures)}
    return data, summary


def _in_order(
    executor: ThreadPoolExecutor, function: Callable[[Any], Outcome], items: Iterable[Any]
) -> Generator[Outcome, None, None]:
    """Yield the outcome of each item in order, with as many in progress as the executor has threads."""
    started: deque[Any] = deque()
    try:
        for item in items:
            if len(started) == IN_FLIGHT:
                yield started.popleft().result()
            started.append(executor.submit(function, item))
        while started:
            yield started.popleft().result()
    finally:
        for future in started:
            future.cancel()


@contextmanager
def _progress(total: int, note: Callable[[str], None]) -> Iterator[tuple[Callable[[], Any], Callable[[str], Any]]]:
    """Show a progress bar, on a terminal if tqdm is installed; yield what advances it and what notes a line."""
    try:
        from tqdm import tqdm  # noqa: PLC0415 - optional
    except ImportError:
        yield lambda: None, note
        return
    with tqdm(total=total, unit="file", disable=None, file=sys.stderr) as bar:

        def say(line: str) -> None:
            bar.clear()
            note(line)
            bar.refresh()

        yield bar.update, say

"""The command `poolrpc bench`: a load of calls on a server, and what it measured."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING

from poolrpc._shapes.parameters import integer, real
from poolrpc._shapes.rules import clip
from poolrpc._transport.options import TRANSPORTS
from poolrpc.chains import branch_shapes, operand_name
from poolrpc.command.load import Load
from poolrpc.command.load_processes import LoadInterrupted, LoadProcesses
from poolrpc.command.load_run import DIFFERENT, arrays_of, first_answers
from poolrpc.command.plot import svg
from poolrpc.command.report import LoadReport
from poolrpc.errors import InvalidArgumentError
from poolrpc.expression import parse_chain
from poolrpc.tensors import ITEM_BYTES, LAYOUTS

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Sequence

    from poolrpc.chains import Shape

MAX_RATE, MAX_DURATION = 1e6, 86_400.0
MAX_CALLS = 10**7
"""The largest number of calls of a rate: the times at which they are due are drawn before, with 0.1 KB for each."""

MAX_CONCURRENCY, MAX_CONNECTIONS = 4096, 1024
CONCURRENCY = {False: 1, True: 128}
"""The largest number of calls at a time, without a rate and with one, which rarely needs as many."""

CONNECTIONS = 16
"""The largest number of connections unless more are given."""


def add_load_arguments(parser: ArgumentParser, layer_help: str) -> None:
    """Add the arguments that describe a load."""
    parser.add_argument(
        "--shape",
        action="append",
        required=True,
        metavar="SHAPE",
        help="shape of the input, with x between the sizes: 8x64x56x56; repeat the flag for a mix of shapes, all "
        "equally likely",
    )
    parser.add_argument(
        "--layer",
        action="append",
        required=True,
        metavar="EXPR",
        help=f"{layer_help}; repeat the flag for several branches of each call",
    )
    parser.add_argument("--dtype", default="float32", help="dtype of the input [default: float32]")
    parser.add_argument("--layout", choices=LAYOUTS, default="NCHW", help="layout of the input [default: NCHW]")
    parser.add_argument(
        "--rate",
        type=float,
        metavar="CALLS",
        help="calls per second, which are due at random times, whether or not others have been answered (an open "
        "loop); latencies are measured from the time when a call was due [default: each caller waits for its answer, "
        "and calls again]",
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        metavar="N",
        help="largest number of calls at a time; a call that is due later waits, which is a part of its latency "
        f"[default: {CONCURRENCY[False]}, or {CONCURRENCY[True]} with --rate]",
    )
    parser.add_argument(
        "--connections",
        type=int,
        metavar="N",
        help=f"number of connections [default: one for each call at a time, at most {CONNECTIONS}]",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="number of processes that make the calls; each can use about one CPU [default: 1]",
    )
    parser.add_argument("--transport", choices=TRANSPORTS, help="transport of the tensors [default: the client's]")
    parser.add_argument(
        "--json",
        nargs="?",
        type=Path,
        const=True,
        default=False,
        metavar="FILE",
        help="print the result as JSON; or write it to a file, and print it as text",
    )


def add_arguments(parser: ArgumentParser, layer_help: str) -> None:
    """Add the arguments of `poolrpc bench`."""
    add_load_arguments(parser, layer_help)
    parser.add_argument(
        "--duration", type=float, default=10.0, metavar="SECONDS", help="duration of the load, in seconds [default: 10]"
    )
    parser.add_argument(
        "--warmup",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="duration of the same load before, which is not counted, in seconds [default: 1]",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare each answer with the first one, bit for bit; without it, only its shape is checked",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="SVG file to draw latencies and calls per second over time to"
    )


def parse_shape(text: str) -> Shape:
    """Return a shape from text such as 8x64x56x56.

    Raises:
        InvalidArgumentError: The text is something else.

    """
    if not re.fullmatch(r"\d{1,10}(x\d{1,10})*", text.lower(), re.ASCII):  # the digits of 2**31
        msg = f"expected sizes with x between them, such as 8x64x56x56, got {clip(text)}"
        raise InvalidArgumentError(msg, field="shape")
    return tuple(map(int, text.lower().split("x")))


def load_of(options: Namespace, seconds: float, warmup: float) -> Load:
    """Return the load that a command line describes.

    Raises:
        InvalidArgumentError: An argument is not valid, or the layers do not fit a shape.

    """
    chains = tuple(map(parse_chain, options.layer))
    if operand := operand_name(chains, given=False):
        msg = f"expected layers that need no {operand}, got {clip(options.layer)}"
        raise InvalidArgumentError(msg, field="layer")
    requests = tuple((parse_shape(text), chains) for text in options.shape)
    for shape, _ in requests:
        branch_shapes(shape, chains, options.layout)
    if options.dtype not in ITEM_BYTES:
        msg = f"expected one of {', '.join(ITEM_BYTES)}, got {clip(options.dtype)}"
        raise InvalidArgumentError(msg, field="dtype")
    processes = integer("processes", options.processes, 1, MAX_CONCURRENCY)
    rate = None if options.rate is None else real("rate", options.rate)
    if rate is not None and rate > MAX_RATE:
        raise InvalidArgumentError(f"expected at most {MAX_RATE:g} calls per second, got {rate:g}", field="rate")
    if rate is not None and rate * (seconds + warmup) > MAX_CALLS:
        msg = f"expected at most {MAX_CALLS:,} calls in all, got {rate * (seconds + warmup):,.0f}"
        raise InvalidArgumentError(msg, field="rate")
    chosen = options.concurrency
    if chosen is None:
        chosen = max(CONCURRENCY[rate is not None], processes)
    concurrency = integer("concurrency", chosen, processes, MAX_CONCURRENCY)
    chosen = options.connections
    if chosen is None:
        chosen = max(min(concurrency, CONNECTIONS), processes)
    return Load(
        requests,
        options.dtype,
        options.layout,
        rate,
        concurrency,
        integer("connections", chosen, processes, MAX_CONNECTIONS),
        seconds,
        warmup,
        real("timeout", options.timeout),
        options.transport,
    )


def bench(options: Namespace) -> tuple[object, Sequence[str], int]:
    """Run a load, and return its figures as data and as lines, and the exit status."""
    seconds = _seconds("duration", options.duration)
    load = load_of(options, seconds, _seconds("warmup", options.warmup) if options.warmup else 0.0)
    if options.plot and options.plot == options.json:
        raise InvalidArgumentError(f"expected another file than that of --plot, got {options.json}", field="json")
    check_files(options.plot, options.json)
    answers = first_answers(options.address, load)
    if options.check:
        load = dataclasses.replace(load, expected=tuple(map(arrays_of, answers)))
    status = 0
    with LoadProcesses(options.processes) as processes:
        try:
            result = processes.run(options.address, load)
        except LoadInterrupted as interrupted:
            result, status = interrupted.result, 130
    report = LoadReport(options.address, load, options.processes, answers, result)
    if options.plot:
        layers = " and ".join(options.layer)
        options.plot.write_text(svg(f"{layers} of {load.dtype} {', '.join(options.shape)}", result))
    if not status and (not len(result.answered) or DIFFERENT in result.errors):
        status = 1
    return report.data(), report.text(), status


def check_files(*files: object) -> None:
    """Check that the files among these can be written, before a load and not after it."""
    for file in files:
        if isinstance(file, Path):
            is_new = not file.exists()
            file.open("a").close()
            if is_new:
                file.unlink()  # the load may fail


def _seconds(name: str, value: float) -> float:
    number = real(name, value)
    if number > MAX_DURATION:
        raise InvalidArgumentError(f"expected at most {MAX_DURATION:g} seconds, got {number:g}", field=name)
    return number

"""One target under atheris, which measures the code that each case reaches; server and client are in this process."""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import atheris

with atheris.instrument_imports(include=["poolrpc", "poolrpc_server"]):
    from fuzz import arena_sockets, client_responses
    from fuzz.findings import FoundError, Report
    from fuzz.mutate import MAX_BYTES, MAX_MESSAGES, fields_of, mutated, pack, unpack
    from fuzz.resource_usage import check_at_rest, check_growth, measured
    from fuzz.seeds import LIMITS, MODELS, seeds
    from fuzz.server_calls import Peer
    from poolrpc_server import Config, Server
    from poolrpc_server.calls import pipeline
    from poolrpc_server.transports.local.arenas import ArenaListener

if TYPE_CHECKING:
    from collections.abc import Callable

    from fuzz.mutate import Case

WARM = 0.2
"""The part of the cases after which memory is measured, to compare it with the end."""

REGISTER_EVERY = 256
HUNG_SECONDS = 120
"""Seconds of a case after which libFuzzer ends the process; calls have a shorter deadline."""

MAX_MIB = 6144


class LastError(logging.Handler):
    """Keeps the server's last unexpected error, which explains a status without details."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.last = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        self.last = logging.Formatter().format(record)


class Embedded:
    """A server in this process, and a caller of it."""

    def __init__(self, folder: str, last_error: LastError) -> None:
        # Otherwise a stream that ends too early waits for its reset, and the fuzzer would be ten times slower.
        pipeline.RESET_SECONDS = 0.0
        for name in ("poolrpc_server", "grpc"):
            logger = logging.getLogger(name)
            logger.setLevel(logging.ERROR if name == "poolrpc_server" else logging.CRITICAL)
            logger.handlers[:], logger.propagate = [last_error], False
        settings = {"listen": (f"unix:{folder}/pool.sock",), "threads": 1, "model": MODELS}
        settings |= dict.fromkeys(("metrics", "explorer"), "127.0.0.1:0")
        self._server = Server(Config(**settings, **LIMITS, allow_client_shm=True))  # type: ignore[arg-type]  # the fields of Config
        self._server.start()
        self.peer = Peer(self._server.addresses[0], f"{folder}/pool.sock", self._server.explorer_address)
        self._count = 0

    def judge(self, target: str, case: Case) -> str:
        """Run a case, and return how it ended."""
        if self._count % REGISTER_EVERY == 0:
            self.peer.register()
        self._count += 1
        return self.peer.converse(case) if target == "local" else self.peer.judge(target, case)

    def check_calls(self) -> None:
        """Check that the server answers valid calls and is idle."""
        self.peer.check_calls()
        check_at_rest(self._server.metrics_address)


def _attach(folder: str) -> tuple[Callable[[Case], str], Callable[[], None]]:
    listener = ArenaListener(f"{folder}/pool.sock", max_bytes=2**20, max_arenas=3)

    def judge(case: Case) -> str:
        ending = arena_sockets.converse(f"{folder}/pool.sock.arena", case)
        if not listener.wait_for(0, arena_sockets.DEADLINE):
            raise FoundError("an arena that outlives its connection")
        return ending

    def check() -> None:
        if judge((b"\x0c\x08\x01",)) != "OK" or listener.nbytes:
            raise AssertionError("expected an arena of 1 byte which ends with its connection")

    return judge, check


def prepared(
    target: str, folder: str, last_error: LastError, closing: ExitStack
) -> tuple[Callable[[Case], str], Callable[[], None]]:
    """Return a function that runs a case of a target, and one that checks the state after all of them."""
    if target == "attach":
        return _attach(folder)
    if target == "attached":
        hostile = arena_sockets.HostileArenas()
        closing.callback(hostile.close)
        return hostile.judge, lambda: None
    if target == "answers":
        return client_responses.judge, lambda: None
    embedded = Embedded(folder, last_error)
    closing.callback(embedded.peer.close)
    embedded.check_calls()
    return lambda case: embedded.judge(target, case), embedded.check_calls


class Session:
    """The cases of one target, from the first to the last."""

    def __init__(self, target: str, cases: int, seed: int, report: Path) -> None:
        self._target, self._cases, self._report = target, cases, report
        self._closing = ExitStack()
        self.folder = self._closing.enter_context(tempfile.TemporaryDirectory(prefix="poolrpc-fuzz-"))
        self.corpus = Path(self.folder) / "corpus"
        self.corpus.mkdir()
        self._starts = seeds(target, seed)
        for number, case in enumerate(self._starts):
            (self.corpus / f"{number:04}").write_bytes(pack(case))
        self._last_error, self._findings = LastError(), Report()
        self._judge, self._check = prepared(target, self.folder, self._last_error, self._closing)
        self._started = time.monotonic()
        self._warm: dict[str, int] = {}

    def run(self, data: bytes) -> None:
        """Run a case; after the last one, write the row and end the process."""
        if self._findings.cases == int(WARM * self._cases):
            self._warm = self._measured()
        case = unpack(data)
        self._last_error.last = ""
        try:
            self._findings.ended(self._target, self._judge(case))
        except Exception as error:  # noqa: BLE001 - every exception is a finding
            if self._last_error.last:
                error.add_note(self._last_error.last)
            self._findings.found(self._target, case, error)
        if self._findings.cases >= self._cases:
            self._finish()
            sys.stdout.flush()
            os._exit(0)  # libFuzzer does not return, and does not end the server's threads

    def mutated(self, data: bytes, max_bytes: int, number: int) -> bytes:
        """Return the mutation of a case that a number selects."""
        rng = Random(number)
        if rng.randrange(8) == 0:
            return bytes(atheris.Mutate(data, max_bytes))
        case = unpack(data)
        # Mutations of bytes that are not a message stay so: mostly another case is used instead.
        if rng.randrange(4) and None in map(fields_of, case[-1:]):
            case = rng.choice(self._starts)
        return pack(mutated(case, self._starts, rng))[:max_bytes]

    def _finish(self) -> None:
        seconds, cases, after = time.monotonic() - self._started, self._findings.cases, self._measured()
        try:
            self._check()
            check_growth(self._warm, after)
        except Exception as error:  # noqa: BLE001 - every exception is a finding
            self._findings.found(self._target, (), error)
        row = {
            "target": self._target,
            "cases": cases,
            "seconds": round(seconds, 1),
            "warm": self._warm,
            "end": after,
            "corpus": len(list(self.corpus.iterdir())),
            "endings": dict(self._findings.endings[self._target].most_common()),
            "findings": self._findings.findings,
        }
        self._closing.close()
        self._report.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def _measured() -> dict[str, int]:
        gc.collect()
        return measured(os.getpid())


def fuzz(target: str, cases: int, seed: int, report: Path) -> None:
    """Run so many cases of a target, write the row, and end the process."""
    session = Session(target, cases, seed, report)
    flags = [
        f"-seed={seed + 1}",  # 0 is a random seed
        f"-timeout={HUNG_SECONDS}",
        f"-rss_limit_mb={MAX_MIB}",
        f"-max_len={MAX_MESSAGES * MAX_BYTES}",
        "-mutate_depth=2",
        "-verbosity=0",
        f"-artifact_prefix={session.folder}/",
    ]
    atheris.Setup(["fuzz", *flags, str(session.corpus)], session.run, custom_mutator=session.mutated)
    atheris.Fuzz()

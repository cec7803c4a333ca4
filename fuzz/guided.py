"""One target under atheris, which follows what code each case reaches; server, caller and judge are in this process."""

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
    from fuzz import answers, sockets
    from fuzz.findings import FoundError, ModelStatistics
    from fuzz.growth import check_at_rest, check_growth, measured
    from fuzz.mutate import MOST_BYTES, MOST_MESSAGES, fields_of, mutated, pack, unpack
    from fuzz.seeds import LIMITS, MODELS, seeds
    from fuzz.served import Peer
    from poolrpc_server import Config, Server, interceptors
    from poolrpc_server.transports.local.arenas import ArenaListener

if TYPE_CHECKING:
    from collections.abc import Callable

    from fuzz.mutate import Case

WARM = 0.2
"""Of the cases: memory is held against what it was after these."""

REGISTER_EVERY = 256
HUNG_SECONDS = 120
"""After which libFuzzer ends the process with the case that it is at; a call has a deadline of its own before."""

MOST_MIB = 6144


class ReloadingFile(logging.Handler):
    """Keeps the last thing that the server didn't expect: the traceback of a status that tells nothing."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.last = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.last = logging.Formatter().format(record)


class Embedded:
    """A server in this process, and a caller of it."""

    def __init__(self, folder: str, watched: ReloadingFile) -> None:
        # A stream that ends too early waits so long for its reset: a hundred streams a second would be ten.
        interceptors.RESET_SECONDS = 0.0
        for name in ("poolrpc_server", "grpc"):
            logger = logging.getLogger(name)
            logger.setLevel(logging.ERROR if name == "poolrpc_server" else logging.CRITICAL)
            logger.handlers[:], logger.propagate = [watched], False
        settings = {"listen": (f"unix:{folder}/pool.sock",), "metrics": "127.0.0.1:0", "threads": 1, "model": MODELS}
        self._server = Server(Config(**settings, **LIMITS, allow_client_shm=True))  # type: ignore[arg-type]  # its fields
        self._server.start()
        self.peer = Peer(self._server.addresses[0], f"{folder}/pool.sock")
        self._count = 0

    def judge(self, target: str, case: Case) -> str:
        """Run a case."""
        if self._count % REGISTER_EVERY == 0:
            self.peer.register()
        self._count += 1
        return self.peer.judge(target, case)

    def check_well(self) -> None:
        """See that the server is as it was."""
        self.peer.check_well()
        check_at_rest(self._server.metrics_address)


def _attach(folder: str) -> tuple[Callable[[Case], str], Callable[[], None]]:
    listener = ArenaListener(f"{folder}/pool.sock", max_bytes=2**20, max_arenas=3)

    def judge(case: Case) -> str:
        ending = sockets.converse(f"{folder}/pool.sock.arena", case)
        if not listener.wait_for(0, sockets.DEADLINE):
            raise FoundError("an arena that outlives its connection")
        return ending

    def check() -> None:
        if judge((b"\x0c\x08\x01",)) != "OK" or listener.nbytes:
            raise AssertionError("expected an arena of 1 byte, and that it ends")

    return judge, check


def prepared(
    target: str, folder: str, watched: ReloadingFile, closing: ExitStack
) -> tuple[Callable[[Case], str], Callable[[], None]]:
    """Give what runs a case of a target, and what sees, after all of them, that everything is well."""
    if target == "attach":
        return _attach(folder)
    if target == "attached":
        hostile = sockets.HostileArenas()
        closing.callback(hostile.close)
        return hostile.judge, lambda: None
    if target == "answers":
        return answers.judge, lambda: None
    embedded = Embedded(folder, watched)
    closing.callback(embedded.peer.close)
    embedded.check_well()
    return lambda case: embedded.judge(target, case), embedded.check_well


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
        self._watched, self._tally = ReloadingFile(), ModelStatistics()
        self._judge, self._check = prepared(target, self.folder, self._watched, self._closing)
        self._begun = time.monotonic()
        self._warm: dict[str, int] = {}

    def run(self, data: bytes) -> None:
        """Run a case; after the last one, write what came of all and end the process."""
        if self._tally.cases == int(WARM * self._cases):
            self._warm = self._measured()
        case = unpack(data)
        self._watched.last = ""
        try:
            self._tally.ended(self._target, self._judge(case))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is found
            if self._watched.last:
                error.add_note(self._watched.last)
            self._tally.found(self._target, case, error)
        if self._tally.cases >= self._cases:
            self._finish()
            sys.stdout.flush()
            os._exit(0)  # libFuzzer doesn't return, and knows nothing of the server's threads

    def mutated(self, data: bytes, most: int, number: int) -> bytes:
        """Give the case that comes of another one by a number."""
        rng = Random(number)
        if rng.randrange(8) == 0:
            return bytes(atheris.Mutate(data, most))
        case = unpack(data)
        # What is no message stays none, whatever is changed in it: mostly something else is taken instead.
        if rng.randrange(4) and None in map(fields_of, case[-1:]):
            case = rng.choice(self._starts)
        return pack(mutated(case, self._starts, rng))[:most]

    def _finish(self) -> None:
        seconds, cases, after = time.monotonic() - self._begun, self._tally.cases, self._measured()
        try:
            self._check()
            check_growth(self._warm, after)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is found
            self._tally.found(self._target, (), error)
        row = {
            "target": self._target,
            "cases": cases,
            "seconds": round(seconds, 1),
            "warm": self._warm,
            "end": after,
            "corpus": len(list(self.corpus.iterdir())),
            "endings": dict(self._tally.endings[self._target].most_common()),
            "findings": self._tally.findings,
        }
        self._closing.close()
        self._report.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def _measured() -> dict[str, int]:
        gc.collect()
        return measured(os.getpid())


def fuzz(target: str, cases: int, seed: int, report: Path) -> None:
    """Run so many cases of a target, write what came of them, and end the process."""
    session = Session(target, cases, seed, report)
    flags = [
        f"-seed={seed + 1}",  # 0 would be any
        f"-timeout={HUNG_SECONDS}",
        f"-rss_limit_mb={MOST_MIB}",
        f"-max_len={MOST_MESSAGES * MOST_BYTES}",
        "-mutate_depth=2",
        "-verbosity=0",
        f"-artifact_prefix={session.folder}/",
    ]
    atheris.Setup(["fuzz", *flags, str(session.corpus)], session.run, custom_mutator=session.mutated)
    atheris.Fuzz()

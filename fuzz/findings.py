"""The report of a run: how many cases ended in which way, and the findings."""

from __future__ import annotations

import threading
import traceback
from base64 import b64encode
from collections import Counter
from typing import TYPE_CHECKING, Any

from fuzz.mutate import pack

if TYPE_CHECKING:
    from fuzz.mutate import Case

MAX_FINDINGS = 50
"""Kinds of findings that are kept, each with its shortest case."""


class FoundError(Exception):
    """A case that ended in a way that is a bug."""


class Report:
    """Counts how cases ended, from any thread, and keeps the findings."""

    def __init__(self) -> None:
        self.endings: dict[str, Counter[str]] = {}
        self.findings: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()

    @property
    def cases(self) -> int:
        """The number of cases."""
        return sum(counter.total() for counter in self.endings.values())

    def ended(self, target: str, ending: str) -> None:
        """Count a case."""
        with self._lock:
            self.endings.setdefault(target, Counter())[ending] += 1

    def found(self, target: str, case: Case, error: BaseException) -> None:
        """Keep a case that ended in a way that is a bug."""
        frames = traceback.extract_tb(error.__traceback__)
        where = (
            "" if isinstance(error, FoundError) else f" at {frames[-1].filename.rpartition('/')[2]}:{frames[-1].name}"
        )
        kind = f"{target}: {type(error).__name__}{where}: {str(error).partition(':')[0][:120]}"
        text = "".join(traceback.format_exception(error))[-3000:]
        packed = b64encode(pack(case)).decode()
        with self._lock:
            self.endings.setdefault(target, Counter())["FINDING"] += 1
            known = self.findings.get(kind)
            if known is None and len(self.findings) >= MAX_FINDINGS:
                return
            if known is None or len(packed) < len(known["case"]):
                self.findings[kind] = {"count": 0 if known is None else known["count"], "case": packed, "text": text}
            self.findings[kind]["count"] += 1

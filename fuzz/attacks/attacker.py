"""The process of attacks: each runs in a thread until standard input ends, and may report what it found."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from typing import Any

from fuzz.attacks.attack import Target
from fuzz.attacks.catalogue import ATTACKS

LEAVE_SECONDS = 2.0
"""Seconds in which an attack should have ended by itself."""

ALONE_SECONDS = 90.0
"""The same for an attack that waits for a process of a server to start or to end."""


def main(settings: dict[str, Any]) -> None:
    """Attack.

    Args:
        settings: The names of the attacks, as "attacks", and the fields of Target, as "target".

    """
    target = Target(**settings["target"])
    until, findings = threading.Event(), []

    def run(name: str) -> None:
        try:
            findings.extend(f"{name}: {finding}" for finding in ATTACKS[name].run(target, until) or ())
        except Exception:  # noqa: BLE001 - a fault of the attack, which must not look like a success
            findings.append(f"{name}: the attack failed: {traceback.format_exc()[-600:]}")

    threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in settings["attacks"]]
    for thread in threads:
        thread.start()
    print("ready", flush=True)
    sys.stdin.read()
    until.set()
    # What an attack has open ends with this process, even if a server holds its threads.
    patience = ALONE_SECONDS if any(ATTACKS[name].alone for name in settings["attacks"]) else LEAVE_SECONDS
    deadline = time.monotonic() + patience
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    print(json.dumps({"findings": findings}), flush=True)
    os._exit(0)  # some threads may still wait for a server that answers nothing

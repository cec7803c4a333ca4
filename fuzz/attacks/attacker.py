"""The process of attacks: each runs in a thread until standard input ends, and may report what it found."""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from typing import Any

from fuzz.attacks.attack import Target
from fuzz.attacks.catalogue import ATTACKS


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
    for thread in threads:
        thread.join()
    print(json.dumps({"findings": findings}), flush=True)
    os._exit(0)  # gRPC's threads may still wait for a server that answers nothing

"""Run attacks: a server, the good client, the probes and the attackers, each in a process of its own."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fuzz.attacks.catalogue import ATTACKS
from fuzz.attacks.child import ATTACK, Child
from fuzz.attacks.server import VARIANTS, AttackedServer
from fuzz.attacks.usage import GUARD_MIB, KILL_MIB, Sampler, usage
from fuzz.attacks.verdict import BUSY, HEALTH_SECONDS, Verdict
from fuzz.resource_usage import REST_SECONDS, check_growth, check_soon

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LOST_SECONDS = 8.0
"""Seconds beyond the limit after which a call counts as lost, rather than late."""

AFTER_SECONDS = 1.0
"""Seconds for which the good client goes on when the attackers have left."""

ATTACKER_SECONDS = 100.0
"""Seconds that a process of attacks may take to end: a little more than it allows its attacks."""

WARM = 0.25
"""The part of a run of all attacks after which memory is measured, to compare it with the end."""

ALL = "all at once"
TOGETHER = ("tcp", "unix")
"""The transports of a run of all attacks at once, each attacked by a process of its own."""

TOGETHER_SECONDS = 20.0
"""Seconds that a call may take while all attacks run at once: they share this machine's processors with the server, so
what counts is that no call is lost, and that everything is back at the end."""

SKIPPED = "skipped: "
"""The beginning of what an attack reports if it cannot run on this machine."""


class Attacked:
    """A server with a good client and probes next to it, and everything that is measured; ends with the context.

    Args:
        stack: What ends with the server.
        variant: The name of the server's variant.
        attack: The name of the only attack; empty for several.
        calm: Seconds of good traffic before the first attack.
        busy_machine: Whether the limits on time follow what calls took before the attack.

    """

    def __init__(self, stack: ExitStack, variant: str, attack: str, calm: float, *, busy_machine: bool) -> None:
        only = ATTACKS.get(attack)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="poolrpc-attack-")))
        self.server = stack.enter_context(AttackedServer(folder, VARIANTS[variant], only))
        wait = only.wait_seconds if only else TOGETHER_SECONDS
        health = max(HEALTH_SECONDS, wait - 1)
        self.verdict = Verdict(attack or ALL, variant, wait, health)
        self._busy_machine = busy_machine
        self._attackers: list[Child] = []
        self._sampler = stack.enter_context(Sampler(self.server, self._kill_attackers))
        new_connections = not (only and only.new_connections_fail)
        settings = {**self.server.good_settings, "new_connections": new_connections}
        self._good = Child("good_client", {**settings, "timeout": wait + LOST_SECONDS, "patient": not only})
        stack.callback(self._good.kill)
        self._probes = Child("probes", {**settings, "timeout": health * (BUSY if busy_machine else 1)})
        stack.callback(self._probes.kill)
        stack.callback(self._kill_attackers)
        time.sleep(calm)
        self.before = usage(self.server)
        for child in (self._good, self._probes):
            child.enter(ATTACK)

    def attack(self, attacks: Mapping[str, Sequence[str]], seconds: float) -> None:
        """Attack for some seconds.

        Args:
            attacks: The names of the attacks of each process, by the address that it uses.
            seconds: The duration.

        """
        for address, names in attacks.items():
            target = {**self.server.target, "address": address}
            self._attackers.append(Child("attacker", {"attacks": names, "target": target}))
        time.sleep(seconds)
        attackers, self._attackers = self._attackers, []
        for attacker in attackers:
            report = attacker.finish(ATTACKER_SECONDS)
            for finding in report.get("findings", []):
                if SKIPPED in finding:
                    self.verdict.skipped = finding
                else:
                    self.verdict.reasons.append(finding)
        time.sleep(AFTER_SECONDS)

    def rest(self) -> None:
        """End the good client and the probes, and check that the server is as it was."""
        self.verdict.good, self.verdict.probes = self._good.finish(), self._probes.finish()
        self.verdict.counters = self.server.counters_at_rest(REST_SECONDS)

    def end(self) -> Verdict:
        """Stop the server, and return the verdict."""
        verdict, before, after = self.verdict, self.before, usage(self.server)
        verdict.rss_mib = (before["rss_mib"], self._sampler.peak_mib, after["rss_mib"])
        verdict.max_rss_mib = self.server.max_rss_mib(before["rss_mib"]) if verdict.attack != ALL else GUARD_MIB
        verdict.threads = (before["threads"], after["threads"])
        verdict.descriptors = (before["descriptors"], after["descriptors"])
        if self._sampler.guarded:
            verdict.reasons.append(f"memory: the attack was ended at {GUARD_MIB} MiB, to protect the machine")
        if self._sampler.peak_mib > KILL_MIB:
            verdict.reasons.append(f"memory: the server was killed at {KILL_MIB} MiB, to protect the machine")
        verdict.stop_s, faults = self.server.stop()
        verdict.reasons += faults
        if not verdict.skipped:
            verdict.judge(busy_machine=self._busy_machine)
        unexpected = [line for line in self.server.lines() if line["event"] == "unexpected error"]
        if unexpected:
            verdict.reasons.append(f"log: {len(unexpected)} unexpected errors: {str(unexpected[0])[-400:]}")
        return verdict

    def _kill_attackers(self) -> None:
        for attacker in self._attackers:
            attacker.kill()


def run_attack(name: str, variant: str, seconds: float, *, calm: float = 2.0, busy_machine: bool = False) -> Verdict:
    """Run one attack against a server of its own, and return the verdict.

    Args:
        name: The attack's name.
        variant: The name of the server's variant.
        seconds: The duration of the attack.
        calm: Seconds of good traffic before it.
        busy_machine: Whether the limits on time follow what calls took before the attack.

    """
    with ExitStack() as stack:
        attacked = Attacked(stack, variant, name, calm, busy_machine=busy_machine)
        attacked.attack({attacked.server.target["address"]: [name]}, seconds)
        attacked.rest()
        return attacked.end()


def run_all(seconds: float, names: Sequence[str] = ()) -> Verdict:
    """Run all attacks that do not harm the process itself against one server, and return the verdict.

    Args:
        seconds: The duration: a quarter to warm up, then memory is measured, and the rest.
        names: The names of the attacks; all of them if empty.

    """
    with ExitStack() as stack:
        attacked = Attacked(stack, TOGETHER[0], "", calm=2.0, busy_machine=False)
        addresses = {"tcp": attacked.server.tcp, "unix": f"unix:{attacked.server.target['path']}"}
        attacks = {
            addresses[variant]: [
                attack.name
                for attack in ATTACKS.values()
                if variant in attack.variants and not attack.alone and (attack.name in names or not names)
            ]
            for variant in TOGETHER
        }
        attacked.attack(attacks, WARM * seconds)
        attacked.before = usage(attacked.server)
        attacked.attack(attacks, (1 - WARM) * seconds)
        attacked.rest()
        try:
            check_soon(partial(_check_growth, attacked))
        except AssertionError as error:
            attacked.verdict.reasons.append(str(error))
        return attacked.end()


def _check_growth(attacked: Attacked) -> None:
    # Threads of a pool stay, and its size is a limit.
    samples = attacked.before, usage(attacked.server)
    check_growth(*({name: each[name] for name in ("rss_mib", "descriptors")} for each in samples))

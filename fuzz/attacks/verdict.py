"""The verdict on an attack: what was measured, and the reasons for which it is not acceptable."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fuzz.attacks.child import ATTACK, CALM

WAIT_SECONDS, HEALTH_SECONDS = 2.0, 1.0
"""What a call of the good client, and an answer to a probe, may take during an attack on an idle machine."""

BUSY = 4.0
"""On a busy machine they may take so many times as long, or as 99 % of the calls just before the attack."""


@dataclass
class Verdict:
    """What an attack did to a server and to its good client.

    Attributes:
        attack: The attack's name.
        variant: The variant's name.
        max_wait_s: Seconds that the good client may wait.
        max_health_s: Seconds that a probe may wait.
        max_rss_mib: The limit on the memory of the serving processes; see AttackedServer.
        good: The report of the good client.
        probes: The report of the probes.
        rss_mib: Memory before the attack, its peak, and at the end.
        threads: Threads before the attack and at the end.
        descriptors: Descriptors before the attack and at the end.
        counters: Gauges that did not return to what they were.
        stop_s: Seconds from SIGTERM to the end.
        skipped: Why the attack could not run here; empty if it ran.
        reasons: Why the outcome is not acceptable. Empty: it is.

    """

    attack: str
    variant: str
    max_wait_s: float
    max_health_s: float
    max_rss_mib: int = 0
    good: dict[str, Any] = field(default_factory=dict)
    probes: dict[str, Any] = field(default_factory=dict)
    rss_mib: tuple[int, int, int] = (0, 0, 0)
    threads: tuple[int, int] = (0, 0)
    descriptors: tuple[int, int] = (0, 0)
    counters: dict[str, float] = field(default_factory=dict)
    stop_s: float = 0.0
    skipped: str = ""
    reasons: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.reasons

    def judge(self, *, busy_machine: bool) -> None:
        """Add the reasons that follow from what was measured.

        Args:
            busy_machine: Whether the limits on time follow what calls took just before the attack, if that is more.

        """
        for name, report, limit in (
            ("good client", self.good, self.max_wait_s),
            ("probes", self.probes, self.max_health_s),
        ):
            if not report:
                self.reasons.append(f"{name}: expected a report, got none: it had to be killed")
                continue
            calm, seen = report[CALM], report[ATTACK]
            allowed = BUSY * max(limit, calm["p99_s"]) if busy_machine else limit
            if calm["lost"] or calm["wrong"]:
                self.reasons.append(f"{name}: failed before the attack: {report['errors']}")
            if seen["wrong"] or seen["lost"]:
                self.reasons.append(
                    f"{name}: {seen['wrong']} wrong and {seen['lost']} lost of {seen['count']}: {report['errors'][:2]}"
                )
            if seen["max_s"] > allowed:
                self.reasons.append(f"{name}: waited {seen['max_s']:.2f} s, allowed {allowed:.2f}")
            if not seen["count"]:
                self.reasons.append(f"{name}: expected calls during the attack, got none")
        if self.rss_mib[1] > self.max_rss_mib:
            self.reasons.append(f"memory: {self.rss_mib[1]} MiB, allowed {self.max_rss_mib}")
        if self.counters:
            self.reasons.append(f"counters: {self.counters}")

    def row(self) -> dict[str, Any]:
        """Return it as a row of the report."""
        good, probes = self.good.get(ATTACK, {}), self.probes.get(ATTACK, {})
        return {
            "attack": self.attack,
            "variant": self.variant,
            "ok": self.ok,
            "good_calls": good.get("count", 0),
            "wrong": good.get("wrong", 0),
            "lost": good.get("lost", 0),
            "max_wait_s": good.get("max_s"),
            "max_wait_s_by_kind": good.get("max_s_by_kind", {}),
            "health_probes": probes.get("count", 0),
            "health_misses": probes.get("lost", 0) + probes.get("wrong", 0),
            "health_max_s": probes.get("max_s"),
            "health_max_s_by_kind": probes.get("max_s_by_kind", {}),
            "rss_mib": self.rss_mib,
            "max_rss_mib": self.max_rss_mib,
            "threads": self.threads,
            "descriptors": self.descriptors,
            "counters": self.counters,
            "stop_s": self.stop_s,
            "skipped": self.skipped,
            "reasons": self.reasons,
        }

"""All attacks: importing a module registers those that it defines."""

from fuzz.attacks import (
    descriptors,
    expensive_messages,
    expensive_requests,
    health_watch,
    http_peers,
    local_peers,
    log_output,
    restart,
    stopped_worker,
    unread_answers,
    unsent_messages,
)
from fuzz.attacks.attack import ATTACKS

__all__ = [
    "ATTACKS",
    "descriptors",
    "expensive_messages",
    "expensive_requests",
    "health_watch",
    "http_peers",
    "local_peers",
    "log_output",
    "restart",
    "stopped_worker",
    "unread_answers",
    "unsent_messages",
]

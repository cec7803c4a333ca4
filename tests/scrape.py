"""A server's metrics, read over HTTP."""

from __future__ import annotations

import urllib.error
import urllib.request

from prometheus_client.parser import text_string_to_metric_families


def get(address: str, page: str) -> tuple[int, str]:
    """Return the status and the text of a page."""
    try:
        with urllib.request.urlopen(f"http://{address}/{page}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


class Scrape:
    """The samples of /metrics at the time of the call."""

    def __init__(self, address: str) -> None:
        families = text_string_to_metric_families(get(address, "metrics")[1])
        self.samples = [sample for family in families for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        """Return the value of a sample; 0 if there is none yet."""
        return sum(each.value for each in self.samples if each.name == name and each.labels == labels)

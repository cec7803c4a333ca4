"""A real Prometheus, installed by scripts/install_prometheus.sh."""

from __future__ import annotations

import json
import subprocess
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import yaml

from scripts.prometheus_queries import RULES, scaled_rules

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONFIG = RULES.with_name("prometheus.yml")


@contextmanager
def prometheus(programs: Path, folder: Path, target: str, divisor: int = 1) -> Iterator[str]:
    """Run Prometheus with our configuration, except for target and interval, and yield its address.

    Args:
        programs: The folder of the program.
        folder: A folder for its files.
        target: The address of the metrics. Empty: there is none.
        divisor: By how much the windows of the rules are shortened.

    """
    rules = folder / "alerts.yml"
    rules.write_text(scaled_rules(divisor))
    config = yaml.safe_load(CONFIG.read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(rules)]
    (job,) = config["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [target] if target else []}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    flags = {"config.file": folder / "prometheus.yml", "storage.tsdb.path": folder / "data", "log.format": "json"}
    process = subprocess.Popen(  # noqa: S603 - a program that we installed
        [programs / "prometheus", "--web.listen-address=127.0.0.1:0", *(f"--{k}={v}" for k, v in flags.items())],
        stderr=subprocess.PIPE,
        text=True,
    )
    lines: list[dict[str, str]] = []
    ready = threading.Event()

    def read() -> None:
        for line in process.stderr or ():
            lines.append(json.loads(line))
            if lines[-1].get("msg", "").startswith("Server is ready"):
                ready.set()
        ready.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert ready.wait(60)
        assert process.poll() is None, lines
        yield next(each["address"] for each in lines if each.get("msg") == "Listening on")
    finally:
        process.terminate()
        process.wait(60)
        reader.join()
        if process.stderr:
            process.stderr.close()

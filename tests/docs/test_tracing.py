"""The program of docs/tracing.md prints spans of one trace with the server's log line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from scripts.server_process import serving

PAGE = Path(__file__).parents[2] / "docs" / "tracing.md"


def test_the_program_prints_its_spans() -> None:
    """It prints the client's span and its own, and the server's log line has the same trace."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    with serving(env={"OTEL_TRACES_EXPORTER": "console"}) as server:
        assert server.start_line["traces"] == "console"
        program = code.replace("127.0.0.1:50051", server.address)
        printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout  # noqa: S603 - our own
        (line,) = server.wait_for("call")
    assert re.findall(r'"name": "([^"]+)"', printed) == ["poolrpc.v1.PoolService/Pool", "my work"]
    assert set(re.findall(r'"trace_id": "0x(\w+)"', printed)) == {line["trace_id"]}

"""The README's Python runs, and prints what the README says that it prints."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)


def test_the_readmes_python_prints_what_it_says() -> None:
    """Every Python block runs, after those before it, and its output is the text block below it."""
    blocks = BLOCKS.findall(README.read_text())
    assert len(blocks) == README.read_text().count("```python")
    names: dict[str, object] = {}
    for code, expected in blocks:
        with redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, "README.md", "exec"), names)  # noqa: S102 - our own README
        assert printed.getvalue() == expected
    assert blocks

"""The notebooks in examples/ run, and their stored outputs, pictures included, are those of the run.

`POOLRPC_UPDATE_EXAMPLES=1 pytest tests/integration/test_notebooks.py` stores the outputs of the run instead.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.pictures import UPDATE, check_picture, same_picture

ROOT = Path(__file__).parents[2]

SHOWN = {"quickstart": 1, "learn_pooling": 1}
"""For each notebook, the number of the picture that docs/examples.md shows."""


def outputs(notebook: Any) -> list[dict[str, str]]:
    """Return what each cell shows, by its media type; streams and errors are text."""
    found = []
    for cell in notebook.cells:
        for each in cell.get("outputs", ()):
            text = {"stream": each.get("text"), "error": "\n".join(each.get("traceback", ()))}
            found.append(dict(each.get("data") or {"text/plain": text.get(each.output_type)}))
    return found


def pictures(notebook: Any) -> list[bytes]:
    """Return the pictures in order."""
    return [base64.b64decode(each["image/png"]) for each in outputs(notebook) if "image/png" in each]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_the_stored_outputs_are_those_of_a_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell runs, and shows what the notebook has stored; docs/examples.md has one of its pictures."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    path = ROOT / f"examples/{name}.ipynb"
    stored, made = (nbformat.read(path, as_version=4) for _ in range(2))
    client = NotebookClient(made, timeout=100, record_timing=False, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    check_picture(pictures(made)[SHOWN[name]], ROOT / f"docs/figures/examples/{name}.png")
    if UPDATE:
        made.metadata = stored.metadata  # without the version of Python
        nbformat.write(made, path)
        return
    for expected, got in zip(outputs(stored), outputs(made), strict=True):
        assert expected.keys() == got.keys()
        for kind, value in expected.items():
            if kind == "image/png":
                assert same_picture(base64.b64decode(value), base64.b64decode(got[kind]))
            elif "image/png" not in expected:  # the text of a picture is only its size
                assert value == got[kind]

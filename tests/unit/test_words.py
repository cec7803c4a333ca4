"""The check of the project's vocabulary."""

import json

import pytest

from scripts.words import find, main


@pytest.mark.parametrize(
    ("path", "text", "use"),
    [
        ("docs/page.md", "The seat is free.", "slot"),
        ("docs/page.md", "The call was under\nway.", "in flight"),
        ("server/a.py", "x = 1  # a call that is under\n# way\n", "in flight"),
        ("server/a.py", '"""Give the shape."""\n', "Return"),
        ("server/a.py", 'def f():\n    """Tell whether it fits."""\n', "Return whether"),
        ("server/a.py", 'raise ValueError("no bytes beside it")\n', "in addition to"),
        ("server/a.py", "free_seats = 1\n", "slot"),
        ("server/a.py", "class NativeDoor:\n    pass\n", "transport"),
        ("server/a.py", "class _Tally:\n    pass\n", "ModelStatistics"),
        ("server/a.py", 'raise ValueError("it was told")\n', "configured"),
        ("server/a.py", "def check_wanted():\n    pass\n", "raise_if_cancelled"),
        ("protos/a.proto", "  // Not set: refused.\n", "reject"),
    ],
)
def test_a_word_to_avoid_is_found_with_its_replacement(path, text, use):
    """Each kind of entry is found where it applies, and the finding names the replacement."""
    (finding,) = find(path, text)
    assert use in str(finding)


@pytest.mark.parametrize(
    "text",
    [
        'from prometheus_client import Gauge\n\nin_flight = Gauge("in_flight", "Calls in flight.")\n',
        "logger.setLevel(level)\n",
        'health.Watch(request)\nparser.add_argument("--log-level", help="lowest level of the log")\n',
        "try:\n    connect()\nexcept ConnectionRefusedError:\n    pass  # connection refused\n",
        '"""Return the outdoor temperature; the path is no longer used."""\n',
        "position = file.tell()\n",
        "name = platform.machine()\n",
    ],
)
def test_a_legitimate_use_is_not_reported(text):
    """Words of other libraries, and words that contain a banned one, raise no alarm."""
    assert find("server/poolrpc_server/a.py", text) == []


def test_a_finding_has_the_line_of_its_first_character():
    """Lines count from 1, also after strings that span several lines."""
    text = '"""One.\n\nTwo.\n"""\n\nx = 1  # nobody\n'
    assert [finding.line for finding in find("server/a.py", text)] == [6]


def test_code_and_prose_are_distinguished():
    """A name is searched in code alone: its mention in a string or a comment is prose."""
    assert find("server/a.py", 'x = "took"  # took\n') == []
    assert len(find("server/a.py", "took = 1\n")) == 1


def test_the_command_prints_findings_and_fails(tmp_path, monkeypatch, capsys):
    """The command prints each finding with file and line, and its status is 1 if there is one, else 0."""
    monkeypatch.setattr("scripts.words.tracked", lambda _: ["page.md"])
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("Fine.\nNobody knows.\n")
    assert main([]) == 1
    assert capsys.readouterr().out == "page.md:2: Nobody: use no client, no caller, no one\n"
    page.write_text("Fine.\n")
    assert main([]) == 0


def test_a_notebook_is_read_by_its_cells(tmp_path, monkeypatch, capsys):
    """What the cells of a notebook say is searched, and what they show is not."""
    monkeypatch.setattr("scripts.words.tracked", lambda _: ["a.ipynb"])
    monkeypatch.chdir(tmp_path)
    shown = {"output_type": "stream", "text": ["Nobody"]}
    cells = [{"source": ["Fine.\n", "Fine."]}, {"source": ["Nobody knows."], "outputs": [shown]}]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}))
    assert main([]) == 1
    assert capsys.readouterr().out == "a.ipynb:3: Nobody: use no client, no caller, no one\n"

"""Code blocks of README.md and docs/, and how each is run: by its language and by what it calls.

Sybil finds the blocks and makes a test of each, which the root conftest.py collects. The blocks of a page run in order
and share names, files and a server. Blocks that need a Docker engine, Helm or Ray are run by the tests in tests/docker,
tests/deploy and tests/ray. A block without a rule fails.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from contextlib import ExitStack, chdir, redirect_stdout
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from sybil import Document, Region, Sybil
from sybil.evaluators.python import pad
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

from scripts.server_process import ServerProcess
from tests.installing import install

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sybil import Example

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))
FENCES = RawFencedCodeBlockLexer(re.compile(r"(?P<language>[^\n]*)$\n", re.MULTILINE))

ADDRESS, METRICS, PROBES, SOCKETS = "127.0.0.1:50051", "127.0.0.1:9464", "127.0.0.1:9465", "/run/poolrpc"
EXPLORER = "127.0.0.1:8080"
"""The addresses of servers in the docs. Tests use others, because these may be in use."""

ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "MAKEFLAGS": "n",  # make prints what it would do: some of its targets run these tests
    "BROWSER": "true",  # the command, which opens nothing
    "PIP_DRY_RUN": "1",  # what is to be installed is installed already, or the block fails
    "PIP_NO_INDEX": "1",
    "PIP_NO_BUILD_ISOLATION": "0",  # which means: without isolation, whose packages would be downloaded
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}
"""Environment variables of commands, besides this process's own."""

DATA: dict[str, Callable[[str], object]] = {
    "yaml": lambda text: list(yaml.safe_load_all(text)),
    "toml": tomllib.loads,
    "json": json.loads,
}
"""Languages whose blocks are only parsed."""

SHELL = "sh|bash"

RULES = {
    "docker": (SHELL, r"^\s*docker\b"),
    "helm": (SHELL, r"^\s*(helm|kubectl)\b"),
    "ray": (f"{SHELL}|python", r"^\s*(ray|serve)\s|^\s*(import|from) ray\b|\bpoolrpc(_server)?\.ray\b"),
    "systemd": (SHELL, r"^\s*(sudo|systemctl|journalctl)\b"),
    "server": (SHELL, r"^(\w+=\S+ )*poolrpc-server\b(?!.*--help)"),
    "c++": (f"{SHELL}|cpp", r"^protoc\b|^#include\b"),
    "shell": (SHELL, ""),
    "node": ("js", ""),
    "triton": ("python", r"^import tritonclient\b"),
    "process": ("python", r"^from opentelemetry\b"),  # sets up its whole process
    "python": ("python", ""),
    "data": ("|".join(DATA), ""),
    "figure": ("text", ""),
}
"""The rules: a block has the first one whose language it has, and whose pattern one of its lines matches."""

ELSEWHERE = ("docker", "helm", "ray", "systemd", "figure")
"""Rules of blocks that are run by other tests, or not at all."""

MARKS = {"triton": "conformance", "node": "conformance"}
"""pytest's marks of blocks that need something to be installed."""


@dataclass(frozen=True, slots=True)
class Block:
    """A block of code.

    Attributes:
        page: Its page, relative to the root.
        line: Its first line.
        rule: The rule by which it is run; empty if there is none.
        language: Its language.
        source: Its text.
        expected: Its output, from the text block right below it; None if there is none.

    """

    page: str
    line: int
    rule: str
    language: str
    source: str
    expected: str | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def check(self, printed: str) -> None:
        """Check that the output is what the page says, if it says something."""
        if self.expected not in {None, printed}:
            raise AssertionError(f"{self}: expected to print\n{self.expected}\ngot\n{printed}")


def read(document: Document) -> list[tuple[Region, Block]]:
    """Return the blocks of a page; a text block right below another one is its output."""
    found: list[tuple[Region, Block]] = []
    taken: Region | None = None
    last = Region(len(document.text), len(document.text), lexemes={"language": "", "source": ""})
    for region, after in pairwise([*FENCES(document), last]):
        if region is taken:
            continue
        language, source = region.lexemes["language"].strip(), str(region.lexemes["source"])
        prints = language != "text" and after.lexemes["language"].strip() == "text"
        taken = after if prints and not document.text[region.end : after.start].strip() else None
        page = str(Path(document.path).relative_to(ROOT))
        line = document.text.count("\n", 0, region.start) + 1
        expected = str(taken.lexemes["source"]) if taken else None
        found.append((region, Block(page, line, rule_of(language, source), language, source, expected)))
    return found


def rule_of(language: str, source: str) -> str:
    """Return the name of the rule for a block."""
    for name, (languages, line) in RULES.items():
        if re.fullmatch(languages, language) and re.search(line, source, re.MULTILINE):
            return name
    return ""


def blocks(rule: str) -> list[Block]:
    """Return all blocks of a rule."""
    documents = (Document(path.read_text(), str(path)) for path in PAGES)
    return [block for document in documents for _, block in read(document) if block.rule == rule]


class Page:
    """What the blocks of a page share: a folder with the files of a clone, a photograph, and a server.

    Attributes:
        folder: The folder.

    """

    def __init__(self) -> None:
        from matplotlib import get_data_path  # noqa: PLC0415 - keeps collection fast

        self._stack = ExitStack()
        # A short name, because a socket's path has at most 108 characters.
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="poolrpc-")))
        for each in ROOT.iterdir():
            if not each.name.startswith("."):
                (self.folder / each.name).symlink_to(each)
        shutil.copy(Path(get_data_path()) / "sample_data/grace_hopper.jpg", self.folder / "photo.jpg")
        self._actual = {SOCKETS: str(self.folder)}
        self._server = self._stack.enter_context(ExitStack())

    def close(self) -> None:
        """End the server and remove the folder."""
        self._stack.close()

    def run(self, block: Block, names: dict[str, Any]) -> None:
        """Run a block, and check its output."""
        source = self._with_actual(block.source)
        if block.rule == "server":
            self._serve(source)
            return
        if block.rule == "data":
            DATA[block.language](source)
            return
        if block.rule == "triton":
            install("scripts/install_clients.sh", "the clients")
            printed = self._command(ROOT / ".venv-triton/bin/python", "-c", source, PYTHONPATH=str(ROOT / "client"))
        elif block.rule == "node":
            install("scripts/install_clients.sh", "the clients")
            node = shutil.which("node") or ROOT / ".venv-triton/bin/node"
            printed = self._command(node, "-e", source, NODE_PATH=str(ROOT / ".venv-triton/node/node_modules"))
        elif block.rule == "c++":
            printed = self._cpp(block.language, source)
        elif block.rule == "process":
            printed = self._command(sys.executable, "-c", source)
        elif block.language != "python":
            printed = self._command("bash", "-euo", "pipefail", "-c", source)
        else:
            code = compile(pad(source, block.line), ROOT / block.page, "exec", dont_inherit=True)
            with chdir(self.folder), redirect_stdout(io.StringIO()) as output:
                exec(code, names)  # noqa: S102 - our own docs
            printed = output.getvalue()
        for written, actual in self._actual.items():
            printed = printed.replace(actual, written)
        block.check(printed)

    def _with_actual(self, source: str) -> str:
        for written, actual in self._actual.items():
            source = source.replace(written, actual)
        return source

    def _cpp(self, language: str, source: str) -> str:
        """Save a file of C++, or run the commands that compile it."""
        if language == "cpp":
            (self.folder / "pool.cc").write_text(source)
            return ""
        install("scripts/install_grpc_cpp.sh", "gRPC for C++")
        root = ROOT / ".debs/grpc"
        libraries = next(root.glob("usr/lib/*-linux-gnu"))
        return self._command(
            *("bash", "-euo", "pipefail", "-c", source),
            PATH=f"{root}/usr/bin{os.pathsep}{ENVIRONMENT['PATH']}",
            PKG_CONFIG_PATH=f"{libraries}/pkgconfig",
            PKG_CONFIG_SYSROOT_DIR=str(root),
            LD_LIBRARY_PATH=str(libraries),
        )

    def _command(self, *command: str | Path, **environment: str) -> str:
        own = {**ENVIRONMENT, "POOLRPC_ADDRESS": self._actual.get(ADDRESS, ADDRESS), **environment}
        done = subprocess.run(  # noqa: S603 - our own docs
            command, cwd=self.folder, capture_output=True, text=True, check=False, env={**os.environ, **own}
        )
        # pip only warns of an extra that does not exist.
        if done.returncode or "WARNING" in done.stderr:
            raise AssertionError(f"expected a command that succeeds, got {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def _serve(self, source: str) -> None:
        """Run commands that end with a server, and wait until it serves; the page's previous server ends."""
        self._server.close()
        command = re.sub(r"(--(?:listen|metrics|probes|explorer) )[\w.]+:\d+", r"\g<1>127.0.0.1:0", source)
        addresses = {f"POOLRPC_{name}": "127.0.0.1:0" for name in ("LISTEN", "METRICS", "PROBES")}
        own = {**addresses, "POOLRPC_LOG_FORMAT": "json"}
        process = subprocess.Popen(  # noqa: S603 - our own docs
            ["bash", "-euc", command],  # noqa: S607 - found by PATH
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **ENVIRONMENT, **own},
        )
        made = ServerProcess(process)
        made.reader.start()
        self._server.callback(made.wait)
        self._server.callback(os.killpg, process.pid, signal.SIGKILL)
        made.started.wait(120)
        if not made.start_line:
            raise AssertionError(f"expected a server that starts, got {made.log}")
        tcp = (each for each in made.start_line["addresses"] if not each.startswith("unix:"))
        self._actual |= {ADDRESS: next(tcp, ADDRESS), METRICS: made.start_line["metrics"] or METRICS}
        self._actual |= {PROBES: made.start_line["probes"] or PROBES, EXPLORER: made.start_line["explorer"] or EXPLORER}


def parse(document: Document) -> Iterator[Region]:
    """Yield the blocks for Sybil that run here."""
    for region, block in read(document):
        if block.rule not in ELSEWHERE:
            region.parsed, region.evaluator = block, evaluate
            yield region


def evaluate(example: Example) -> str | None:
    """Run a block, or return what is wrong with it."""
    block: Block = example.parsed
    if not block.rule:
        return f"expected a block of a language that a rule covers, got {block.language!r}: tests/docs/blocks.py"
    example.namespace["_page"].run(block, example.namespace)
    return None


def setup_page(namespace: dict[str, Any]) -> None:
    """Create what the blocks of a page share."""
    namespace["_page"] = Page()


def close_page(namespace: dict[str, Any]) -> None:
    """Release it."""
    namespace["_page"].close()


DOCUMENTS = Sybil([parse], patterns=["README.md", "docs/*.md"], path=str(ROOT), setup=setup_page, teardown=close_page)

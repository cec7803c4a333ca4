"""A real Chromium, without a window, and a server whose explorer it opens."""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from poolrpc_server import Config, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

ROOT = Path(__file__).parents[2]
CHROMIUM = ROOT / ".debs/chromium/chromium.sh"
AXE = ROOT / ".debs/axe/node_modules/axe-core/axe.min.js"
ARRIVAL_SECONDS = 20.0


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Return the browser, which scripts/install_browser.sh installs."""
    subprocess.run([ROOT / "scripts/install_browser.sh"], check=True)  # noqa: S603 - our own
    # Root has no sandbox for a browser. Nothing but this machine's server is opened in it.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield made
        made.close()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Return a server with an explorer."""
    made = Server(Config(listen=("127.0.0.1:0",), explorer="127.0.0.1:0"))
    made.start()
    yield made
    made.stop(0)


class Explorer:
    """The explorer's page in a browser, with what a person does to it and sees of it.

    Attributes:
        page: Playwright's page.
        hosts: The hosts of all requests of the page.
        failures: Errors of the page's script, and what its policy blocked.

    """

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.hosts: set[str] = set()
        self.failures: list[str] = []
        page.on("request", lambda request: self.hosts.add(request.url.partition("://")[2].partition("/")[0]))
        page.on("pageerror", lambda error: self.failures.append(str(error)))
        page.on("console", lambda message: self._heard(message.text))
        self._address = address

    def _heard(self, text: str) -> None:
        if "Content Security Policy" in text:
            self.failures.append(text)

    def open(self) -> None:
        """Open the page and wait for its first result."""
        self.page.goto(f"http://{self._address}")
        self.wait_for_run(1)

    @property
    def runs(self) -> int:
        """Number of calls that the page has shown the results of."""
        return int(self.page.get_attribute("#stage", "data-run") or 0)

    def wait_for_run(self, number: int) -> None:
        """Wait until the page shows the result of its call of this number."""
        self.page.wait_for_function(
            "number => Number(document.querySelector('#stage').dataset.run) >= number", arg=number
        )

    @contextmanager
    def next_run(self) -> Iterator[None]:
        """Wait after the block for the result of a further call."""
        runs = self.runs
        yield
        self.wait_for_run(runs + 1)

    def wait_for_error(self, field: str, beginning: str) -> None:
        """Wait for a message at a field that begins like this."""
        script = "([id, text]) => document.getElementById(id).textContent.startsWith(text)"
        self.page.wait_for_function(script, arg=[f"{field}-error", beginning])

    def cells(self, board: str) -> list[list[str]]:
        """Return the texts of a board's cells, by rows."""
        script = (
            "id => [...document.querySelectorAll(`#${id} tr`)].map(row => [...row.cells].map(cell => cell.textContent))"
        )
        return list(self.page.evaluate(script, board))

    def window(self, board: str) -> list[str]:
        """Return the positions of the marked cells of a board, "depth row column" each."""
        script = "id => [...document.querySelectorAll(`#${id} td.inside`)].map(cell => cell.dataset.at)"
        return list(self.page.evaluate(script, board))

    def step_to(self, window: int) -> None:
        """Move to a window by its number, from 0 on."""
        self.page.locator("#window").fill(str(window))


@pytest.fixture
def opened(browser: Browser, server: Server) -> Callable[..., AbstractContextManager[Explorer]]:
    """Return a context manager that opens the explorer: of the fixture's server, or of another address."""

    @contextmanager
    def open_page(address: str = "", *, at_once: bool = True, **options: Any) -> Iterator[Explorer]:
        chosen = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", "locale": "en", **options}
        context = browser.new_context(**chosen)
        context.set_default_timeout(ARRIVAL_SECONDS * 1000)
        explorer = Explorer(context.new_page(), address or server.explorer_address)
        try:
            if at_once:
                explorer.open()
            yield explorer
            assert explorer.failures == []
        finally:
            context.close()

    return open_page


@pytest.fixture
def explorer(opened: Callable[..., AbstractContextManager[Explorer]]) -> Iterator[Explorer]:
    """Return the explorer of the fixture's server."""
    with opened() as made:
        yield made


@cache
def axe() -> str:
    """Return the script that checks a page for people who use a keyboard or a screen reader."""
    return AXE.read_text("utf-8")

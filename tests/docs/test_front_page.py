"""The front page: README.md and docs/index.md, and the site's menu."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.docs.blocks import ROOT
from tests.parity.grid import GRID, cases

if TYPE_CHECKING:
    from collections.abc import Iterator

FRONT = [ROOT / "README.md", ROOT / "docs/index.md"]


@pytest.mark.parametrize("page", FRONT, ids=lambda page: page.name)
def test_the_front_page_opens_with_the_photograph_and_exactness(page: Any) -> None:
    """The picture comes first, then what the project is for, exactness, the installation, ten lines, three figures."""
    text = page.read_text()
    order = ["figures/photograph.svg", "PyTorch's pooling layers over gRPC", "**Exact.**"]
    order += ["## Install", "## Ten lines", "## Three figures"]
    found = [text.index(each) for each in order]
    assert found == sorted(found)


@pytest.mark.parametrize("page", FRONT, ids=lambda page: page.name)
def test_the_number_of_cases_is_that_of_the_grid(page: Any) -> None:
    """The number of comparisons with torch on the front page is the one that test_parity makes with the full grid."""
    count = sum(1 for name in GRID for _ in cases(name))
    assert re.search(r"compare\s+([\d,]+)\s+combinations", page.read_text())[1] == f"{count:,}"  # type: ignore[index]


def entries(menu: Any) -> Iterator[str]:
    """Yield the pages of a menu."""
    if isinstance(menu, str):
        yield menu
    for each in menu.values() if isinstance(menu, dict) else menu if isinstance(menu, list) else ():
        yield from entries(each)


def test_every_page_is_in_the_menu_once() -> None:
    """No page is missing from the site's menu, and none is in it twice, by its file or its name."""
    text = (ROOT / "mkdocs.yml").read_text()
    nav = yaml.safe_load(text[text.index("\nnav:") : text.index("\nmarkdown_extensions:")])["nav"]
    pages = Counter(entries(nav))
    assert set(pages) == {path.name for path in (ROOT / "docs").glob("*.md")}
    assert set(pages.values()) == {1}
    names = re.findall(r"^ +- ([^:]+): \w", text, re.MULTILINE)
    assert len(names) == len(set(names))

"""The pictures of the docs are what `make figures` draws, and every page that has one says what it shows."""

from __future__ import annotations

import base64
import io
import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from scripts import figures
from tests.docs.blocks import PAGES, ROOT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EMBEDDED = re.compile(r"data:image/\w+;base64,([\w+/=]+)")
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")


def committed(name: str) -> str:
    """Return a picture as it is in the repository."""
    return (figures.FOLDER / f"{name}.svg").read_text()


@pytest.mark.parametrize("draw", [figures.windows, figures.benchmarks], ids=["windows", "benchmarks"])
def test_pictures_are_what_is_drawn(draw: Callable[[], dict[str, str]]) -> None:
    """Pictures of windows and of benchmarks are up to date."""
    drawn = draw()
    assert {name for name, text in drawn.items() if text != committed(name)} == set()


def test_the_photograph_is_what_is_drawn() -> None:
    """The photograph is too, and its pixels are those that a server returns: encoders may write them differently."""
    drawn, kept = figures.photograph(), committed("photograph")
    assert EMBEDDED.sub("", drawn) == EMBEDDED.sub("", kept)
    for one, two in zip(EMBEDDED.findall(drawn), EMBEDDED.findall(kept), strict=True):
        assert np.array_equal(pixels(one), pixels(two))


def pixels(encoded: str) -> np.ndarray:
    """Return the pixels of an embedded image."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))


def test_every_picture_is_drawn_and_shown() -> None:
    """There is no SVG that nothing draws, and no picture that no page shows; tests make those of other formats."""
    files = {path.relative_to(figures.FOLDER).as_posix() for path in figures.FOLDER.rglob("*.*")}
    assert {path.removesuffix(".svg") for path in files if path.endswith(".svg")} == {
        *(f"pooling/{name}" for name in (*figures.STILL, *figures.MOVING, "convolution")),
        *figures.FIGURES,
        "photograph",
        figures.LOAD,
    }
    shown = {path.rpartition("figures/")[2] for page in PAGES for _, path in PICTURE.findall(page.read_text())}
    assert files - shown == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pictures_of_a_page_exist_and_are_described(page: Path) -> None:
    """Each picture has a text that says what it shows, for who cannot see it."""
    for text, path in PICTURE.findall(page.read_text()):
        assert (page.parent / path).exists(), path
        assert len(text) >= 10, path


@pytest.mark.parametrize("name", [*figures.STILL, *figures.MOVING, "convolution"])
def test_pictures_of_windows_are_legible_on_a_phone(name: str) -> None:
    """They are as wide as a phone, and no text in them has less than 9 pixels."""
    text = committed(f"pooling/{name}")
    assert text.startswith('<svg xmlns="http://www.w3.org/2000/svg" width="360"')
    assert min(float(size) for size in re.findall(r'font-size="([\d.]+)"', text)) >= 9


def test_both_languages_have_the_same_pictures_and_numbers() -> None:
    """The Chinese page has the pictures, tables of numbers and commands of the English one."""
    english, chinese = ((ROOT / f"docs/{name}.md").read_text() for name in ("pooling", "pooling.zh"))
    assert [path for _, path in PICTURE.findall(english)] == [path for _, path in PICTURE.findall(chinese)]
    assert re.findall(r"= \d+ \+ 1 \| \d+ \|", english) == re.findall(r"= \d+ \+ 1 \| \d+ \|", chinese)
    assert len(re.findall(r"^## ", english, re.MULTILINE)) == len(re.findall(r"^## ", chinese, re.MULTILINE))

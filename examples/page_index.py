"""Search the pages of a text as ColPali does: one vector for each patch, and the means of rows to search first.

python examples/page_index.py LICENSE 'when do patent licenses terminate' found.png --address 127.0.0.1:50051

ColPali (Faysse et al., 2024) has a vector for each patch of a page, and finds the page whose patches are most similar
to the words of a query. As a page has a thousand patches, indexes also keep the mean of each row of patches: these find
the candidates, and the patches themselves put the candidates in order. Here the server computes the means, and a patch
is a word, whose vector is a sum of random ones for each three of its letters, so no neural network is needed. The
picture shows the best page with the words that are similar to those of the query.
"""

import argparse
import functools
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from poolrpc import AvgPool2d, PoolClient

ROWS, COLUMNS, DIMS = 32, 20, 128  # of a page: lines, words of a line, and the length of a word's vector
ROW_MEANS = AvgPool2d((1, COLUMNS))
CANDIDATES = 3


@functools.cache
def vector(word: str) -> np.ndarray:
    """Return the unit vector of a word; words with the same letters have similar vectors."""
    letters = f"<{''.join(filter(str.isalnum, word.lower()))}>"
    threes = {letters[i : i + 3] for i in range(len(letters) - 2)}
    total = sum((np.random.default_rng(zlib.crc32(each.encode())).normal(size=DIMS) for each in threes), np.zeros(DIMS))
    return (total / (np.linalg.norm(total) or 1)).astype(np.float32)


def read_pages(path: str) -> list[list[list[str]]]:
    """Return the words of each line of each page of a text."""
    lines = [line.split()[:COLUMNS] for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    return [lines[start : start + ROWS] for start in range(0, len(lines), ROWS)]


def patches_of(pages: list[list[list[str]]]) -> np.ndarray:
    """Return the vectors of the patches of all pages, (pages, rows, columns, dims)."""
    patches = np.zeros((len(pages), ROWS, COLUMNS, DIMS), np.float32)
    for page, lines in zip(patches, pages, strict=True):
        for row, words in zip(page, lines, strict=False):
            for patch, word in zip(row, words, strict=False):
                patch[:] = vector(word)
    return patches


def score(query: np.ndarray, vectors: np.ndarray) -> float:
    """Return the sum over the query's words of the similarity of the most similar vector."""
    return float((query @ vectors.reshape(-1, DIMS).T).max(1).sum())


def picture(lines: list[list[str]], similarities: np.ndarray) -> Image.Image:
    """Return a picture of a page whose words have a background by their similarity."""
    font = ImageFont.load_default(15)
    image = Image.new("RGB", (600, 24 * len(lines) + 24), "white")
    draw = ImageDraw.Draw(image)
    for row, words in enumerate(lines):
        x, y = 12.0, 24 * row + 12
        for word, similarity in zip(words, similarities[row], strict=False):
            width = draw.textlength(word, font)
            shade = round(255 * (1 - max(similarity - 0.3, 0) / 0.7))  # below 0.3, words are alike by chance
            draw.rectangle((x - 2, y, x + width + 2, y + 21), (255, 255, shade))
            draw.text((x, y), word, "black", font)
            x += width + 6
    return image


def main() -> None:
    """Read the command line, index the pages, and print and draw what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("query")
    parser.add_argument("picture")
    parser.add_argument("--address", default="127.0.0.1:50051")
    options = parser.parse_args()
    pages = read_pages(options.text)
    if not pages:
        parser.error(f"expected a text with words, got {options.text}")
    patches = patches_of(pages)
    with PoolClient(options.address) as client:
        rows = client.pool(patches, ROW_MEANS, layout="NHWC").output
    rows = rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-9)
    print(f"{len(pages)} pages of {ROWS * COLUMNS} patches; {ROWS} means of rows on each are searched first")
    query = np.stack([vector(word) for word in options.query.split()])
    candidates = sorted(range(len(pages)), key=lambda page: -score(query, rows[page]))[:CANDIDATES]
    found = sorted(candidates, key=lambda page: -score(query, patches[page]))
    for page in found:
        row = max(range(len(pages[page])), key=lambda row: score(query, patches[page, row]))
        print(f"page {page + 1}, score {score(query, patches[page]):.2f}: {' '.join(pages[page][row])}")
    picture(pages[found[0]], (patches[found[0]] @ query.T).max(-1)).save(options.picture)


if __name__ == "__main__":
    main()

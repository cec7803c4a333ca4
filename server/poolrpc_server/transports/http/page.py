"""The explorer's page: its files, and the headers with which they and all answers are sent."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources

TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}

# Nothing from elsewhere, nothing inline, and no page of anyone else around it. Images of one's own are blobs.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

SECURITY_HEADERS = (
    ("Content-Security-Policy", POLICY),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
)
"""Headers of every answer. There is none of CORS: pages of other origins can't read anything."""


@dataclass(frozen=True, slots=True)
class PageFile:
    """A file of the page.

    Attributes:
        content: Its bytes.
        headers: Its headers.
        etag: The tag by which a browser asks whether it has changed.

    """

    content: bytes
    headers: tuple[tuple[str, str], ...]
    etag: str


def read_page() -> dict[str, PageFile]:
    """Return the files of the page, by their paths."""
    found = {}
    for each in (resources.files(__package__) / "page").iterdir():
        suffix = each.name.rpartition(".")[2]
        if suffix in TYPES:
            content = each.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            headers = (
                ("Content-Type", f"{TYPES[suffix]}; charset=utf-8"),
                ("Cache-Control", "no-cache"),  # asked for each time, so that a page fits its server
                ("ETag", etag),
            )
            found["/" if each.name == "index.html" else f"/{each.name}"] = PageFile(content, headers, etag)
    return found

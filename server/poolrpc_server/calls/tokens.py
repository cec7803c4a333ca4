"""Access tokens: the tokens file, which may change while the server runs, and the check of each call's token.

Each line of the file describes one token: a name for the log, the token's SHA-256 in hexadecimal, and the full names of
the services or methods that the token allows. A line without such names allows everything. Blank lines and lines that
start with # are ignored.

    # Create a token with: openssl rand -hex 32; its hash with: echo -n "$TOKEN" | sha256sum
    alice      03ac674216f3e15c761ee1a5e255f067953623c8b388b4459e13f978d7c846f4
    dashboard  88d4266fd4e6338d13b845fcf289579d209c897823b9217da3e161936f031589  poolrpc.v1.PoolService/GetServerInfo
    viewer     0b14d501a594442a01c6859541bcb3e8164d183d32937b851835442f69d5c94e  priority-0

The word priority-0 allows calls of the most urgent priority, which go before all others; it is not implied.

Several tokens may have the same name, for example the old and the new token during a rotation. A plain SHA-256 is as
safe as a slow hash only for tokens that cannot be guessed, so tokens should be random.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from poolrpc.errors import PermissionDeniedError, UnauthenticatedError
from poolrpc_server.reloading_file import ReloadingFile

if TYPE_CHECKING:
    from collections.abc import Sequence

TOKEN_NAME = re.compile(r"[\w.@-]{1,64}", re.ASCII)
DIGEST = re.compile(r"[0-9a-fA-F]{64}")
ALLOWED = re.compile(r"\w+(\.\w+)+(/\w+)?", re.ASCII)

URGENT = "priority-0"
"""The word of the tokens file that allows priority 0."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token, of which the server knows only the hash.

    Attributes:
        name: The caller's name.
        digest: The token's SHA-256.
        allowed: Full names of the services and methods that the token allows. Empty: all of them.
        urgent: Whether the token allows priority 0.

    """

    name: str
    digest: bytes = field(repr=False)
    allowed: frozenset[str] = frozenset()
    urgent: bool = False

    def allows(self, method: str) -> bool:
        """Return whether the token allows a method, "/package.Service/Method"."""
        full_name = method.removeprefix("/")
        return not self.allowed or full_name in self.allowed or full_name.rpartition("/")[0] in self.allowed

    def authorize(self, method: str) -> None:
        """Check that the token allows a method, "/package.Service/Method".

        Raises:
            PermissionDeniedError: The token does not allow the method.

        """
        if not self.allows(method):
            raise PermissionDeniedError("the token does not allow this method")


def parse_tokens(text: str) -> tuple[Token, ...]:
    """Return the tokens that a file's text describes.

    Raises:
        ValueError: There is no token, or a line is invalid. The message names the line but quotes nothing from it,
            because a token may have been written there in clear.

    """
    tokens: list[Token] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        name, digest, allowed = words[0], "".join(words[1:2]), [word for word in words[2:] if word != URGENT]
        if not TOKEN_NAME.fullmatch(name):
            raise ValueError(f"line {number}: expected a name of at most 64 letters, digits or ._@- first")
        if not DIGEST.fullmatch(digest):
            raise ValueError(
                f"line {number}: expected the token's SHA-256 as 64 hexadecimal digits after the name, "
                f"got {len(digest)} characters"
            )
        for position, full_name in enumerate(allowed, 3):
            if not ALLOWED.fullmatch(full_name):
                raise ValueError(
                    f"line {number}: expected package.Service, package.Service/Method or {URGENT} as word {position}"
                )
        tokens.append(Token(name, bytes.fromhex(digest), frozenset(allowed), URGENT in words[2:]))
    if not tokens:
        raise ValueError("expected at least one token, got none")
    if len({token.digest for token in tokens}) < len(tokens):
        raise ValueError("expected each token once, got one of them twice")
    return tuple(tokens)


class TokenFile:
    """The current tokens of a tokens file.

    Args:
        path: The file.

    Raises:
        ValueError: The file cannot be read or is invalid.

    """

    def __init__(self, path: str) -> None:
        self._tokens = ReloadingFile("the token file", [path], lambda: parse_tokens(Path(path).read_text("utf-8")))

    def find(self, token: str) -> Token | None:
        """Return the description of a token, or None if the file does not have it."""
        digest, found = hashlib.sha256(token.encode()).digest(), None
        # Every token is compared, so that the time reveals nothing about the position of a match.
        for known in self._tokens.get():
            if hmac.compare_digest(known.digest, digest):
                found = known
        return found

    def authenticate(self, authorization: Sequence[str]) -> Token:
        """Return the token that a call presents.

        Args:
            authorization: All values of the call's `authorization` metadata; exactly one, "Bearer TOKEN", is valid.

        Raises:
            UnauthenticatedError: There is no valid token. The message is the same whatever the reason.

        """
        scheme, _, token = authorization[0].partition(" ") if len(authorization) == 1 else ("", "", "")
        found = self.find(token) if scheme.lower() == "bearer" else None
        if found is None:
            raise UnauthenticatedError("expected a valid token, as the metadata authorization: Bearer TOKEN")
        return found

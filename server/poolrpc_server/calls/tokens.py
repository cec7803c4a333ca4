"""Who may call what: tokens by their hashes, in a file that may change while the server runs.

A line of the file is a token: a name for the log, the token's SHA-256 in hexadecimal, and what it may call: services or
methods by their full names, or nothing more for everything. Blank lines, and lines that start with #, say nothing.

    # A token is made by: openssl rand -hex 32; its hash by: echo -n "$TOKEN" | sha256sum
    alice      03ac674216f3e15c761ee1a5e255f067953623c8b388b4459e13f978d7c846f4
    dashboard  88d4266fd4e6338d13b845fcf289579d209c897823b9217da3e161936f031589  poolrpc.v1.PoolService/GetServerInfo

Several tokens may have one name, the old and the new one while a token is replaced. A plain hash is as good as a slow
one only for tokens that nobody can guess: let a program make them.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass, field
from pathlib import Path

from poolrpc_server.reloading_file import ReloadingFile

NAME = re.compile(r"[\w.@-]{1,64}", re.ASCII)
DIGEST = re.compile(r"[0-9a-fA-F]{64}")
ALLOWED = re.compile(r"\w+(\.\w+)+(/\w+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Token:
    """A token, of which nobody here knows more than its hash.

    Attributes:
        name: Whose it is.
        digest: Its SHA-256.
        allowed: Services and methods, by their full names. None of them: everything.

    """

    name: str
    digest: bytes = field(repr=False)
    allowed: frozenset[str] = frozenset()

    def allows(self, method: str) -> bool:
        """Tell whether it is good for a method, "/package.Service/Method"."""
        full = method.removeprefix("/")
        return not self.allowed or full in self.allowed or full.rpartition("/")[0] in self.allowed


def parse_tokens(text: str) -> tuple[Token, ...]:
    """Give the tokens of a file's text.

    Raises:
        ValueError: There is none, or a line is wrong; says which, and nothing of what stands there, a token perhaps.

    """
    tokens: list[Token] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        name, digest, allowed = words[0], "".join(words[1:2]), words[2:]
        if not NAME.fullmatch(name):
            raise ValueError(f"line {number}: expected a name of at most 64 letters, digits or ._@- first")
        if not DIGEST.fullmatch(digest):
            raise ValueError(
                f"line {number}: expected the token's SHA-256 as 64 hexadecimal digits after the name, "
                f"got {len(digest)} characters"
            )
        for place, each in enumerate(allowed, 3):
            if not ALLOWED.fullmatch(each):
                raise ValueError(f"line {number}: expected package.Service or package.Service/Method as word {place}")
        tokens.append(Token(name, bytes.fromhex(digest), frozenset(allowed)))
    if not tokens:
        raise ValueError("expected at least one token, got none")
    if len({each.digest for each in tokens}) < len(tokens):
        raise ValueError("expected each token once, got one of them twice")
    return tuple(tokens)


class TokenFile:
    """The tokens of a file, as it is now.

    Args:
        path: The file.

    Raises:
        ValueError: It can't be used, and why.

    """

    def __init__(self, path: str) -> None:
        self._watched = ReloadingFile("the token file", [path], lambda: parse_tokens(Path(path).read_text("utf-8")))

    def find(self, token: str) -> Token | None:
        """Give what is known of a token; None: nothing."""
        digest, found = hashlib.sha256(token.encode()).digest(), None
        # All of them, whichever it is: the time says nothing of where it stands.
        for each in self._watched.get():
            if hmac.compare_digest(each.digest, digest):
                found = each
        return found

"""Tokens: what a line of their file says, what they allow, and a file that changes."""

import hashlib
import logging
import re

import pytest

from poolrpc_server.calls.tokens import Token, TokenFile, parse_tokens

POOL = "/poolrpc.v1.PoolService/Pool"
INFO = "/poolrpc.v1.PoolService/GetServerInfo"
HEALTH = "/grpc.health.v1.Health/Check"


def digest(token):
    """Give a token's hash, as sha256sum writes it."""
    return hashlib.sha256(token.encode()).hexdigest()


@pytest.fixture
def logged(caplog, monkeypatch):
    """Give what catches the server's log."""
    monkeypatch.setattr(logging.getLogger("poolrpc_server"), "propagate", True)
    caplog.set_level(logging.INFO, "poolrpc_server")
    return caplog


def test_a_line_is_a_token():
    """A line has a name, a hash in either case, and what is allowed; blank lines and comments say nothing."""
    text = f"# who\n\n  alice\t{digest('a')}\r\n   # more\nbob@x {digest('b').upper()} poolrpc.v1.PoolService a.B/C\n"
    alice, bob = parse_tokens(text)
    assert alice == Token("alice", hashlib.sha256(b"a").digest())
    assert bob == Token("bob@x", hashlib.sha256(b"b").digest(), frozenset({"poolrpc.v1.PoolService", "a.B/C"}))


@pytest.mark.parametrize(
    ("allowed", "methods"),
    [
        ([], [POOL, INFO, HEALTH]),
        (["poolrpc.v1.PoolService"], [POOL, INFO]),
        (["poolrpc.v1.PoolService/Pool"], [POOL]),
        (["poolrpc.v1.PoolService/Pool", "grpc.health.v1.Health"], [POOL, HEALTH]),
        (["poolrpc.v1"], []),
        (["poolrpc.v1.Pool"], []),
    ],
    ids=str,
)
def test_a_token_allows_what_its_line_says(allowed, methods):
    """Whole services or single methods, by their full names and not by their beginnings; no list: everything."""
    token = Token("x", b"", frozenset(allowed))
    assert [method for method in (POOL, INFO, HEALTH) if token.allows(method)] == methods


SECRET = "a-token-put-there-in-clear"  # noqa: S105 - a test's


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (SECRET, "64 hexadecimal digits after the name, got 0 characters"),
        (f"alice {SECRET}", f"64 hexadecimal digits after the name, got {len(SECRET)} characters"),
        (f"alice {digest('a')[:-1]}", "got 63 characters"),
        (f"{SECRET}:x {digest('a')}", "a name of at most 64"),
        (f"{digest('a')}{SECRET} {digest('a')}", "a name of at most 64"),
        (f"alice {digest('b')} poolrpc.v1.PoolService {SECRET}", "package.Service or package.Service/Method as word 4"),
        (f"alice {digest('b')} /poolrpc.v1.PoolService/Pool", "as word 3"),
        (f"alice {digest('b')} # a comment", "as word 3"),
    ],
)
def test_a_wrong_line_is_named_by_its_number(line, words):
    """The error says which line and what was expected, and nothing of what stands there: it may be a token."""
    with pytest.raises(ValueError, match=f"^line 2: expected .*{re.escape(words)}") as raised:
        parse_tokens(f"carol {digest('c')}\n{line}")
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("text", ["", "\n\n", "# alice\n"])
def test_a_file_has_a_token(text):
    """A file without a token, a file cut short perhaps, is refused: nobody could call."""
    with pytest.raises(ValueError, match=r"^expected at least one token, got none$"):
        parse_tokens(text)


def test_a_token_is_there_once():
    """A hash that is there twice is refused; a name may be, of the old token and the new one."""
    with pytest.raises(ValueError, match="once"):
        parse_tokens(f"alice {digest('a')}\nbob {digest('a')}")
    assert [each.name for each in parse_tokens(f"alice {digest('a')}\nalice {digest('b')}")] == ["alice", "alice"]


def test_a_token_is_not_shown():
    """Not even its hash is in its repr."""
    assert repr(Token("alice", b"hash")) == "Token(name='alice', allowed=frozenset())"


def test_a_token_is_found_by_what_it_hashes_to(tmp_path):
    """The whole token is found, and no other string, of whatever characters."""
    path = tmp_path / "tokens"
    path.write_text(f"alice {digest('secret')}\nbob {digest('other')}")
    tokens = TokenFile(str(path))
    assert [tokens.find(each).name for each in ("secret", "other")] == ["alice", "bob"]
    for wrong in ("", "secre", "secrets", "Secret", digest("secret"), "\xff\u1234"):
        assert tokens.find(wrong) is None


def test_a_changed_file_is_read_at_the_next_call(tmp_path, logged):
    """Tokens come and go with the file, rewritten in place or replaced, and the log says that it changed."""
    path = tmp_path / "tokens"
    path.write_text(f"alice {digest('a')}")
    tokens = TokenFile(str(path))
    path.write_text(f"alice {digest('a')}\nbob {digest('b')}")
    assert tokens.find("b").name == "bob"
    new = tmp_path / "new"
    new.write_text(f"bob {digest('b')}")
    new.replace(path)
    assert tokens.find("a") is None
    assert tokens.find("b").name == "bob"
    assert [each.message for each in logged.records] == ["the token file changed"] * 2


@pytest.mark.parametrize("broken", ["", "nonsense", b"\xff\xfe", None], ids=["empty", "nonsense", "no text", "gone"])
def test_a_broken_file_leaves_the_tokens_before(tmp_path, logged, broken):
    """A file that can't be used is logged once as an error, and the tokens stay until there is one that can."""
    path = tmp_path / "tokens"
    path.write_text(f"alice {digest('a')}")
    tokens = TokenFile(str(path))
    if broken is None:
        path.unlink()
    else:
        path.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    for _ in range(3):
        assert tokens.find("a").name == "alice"
    (record,) = logged.records
    assert record.levelno == logging.ERROR
    assert "what was read before stays" in record.message
    path.write_text(f"bob {digest('b')}")
    assert tokens.find("a") is None
    assert tokens.find("b").name == "bob"


def test_a_file_that_can_not_be_used_at_the_start_says_why(tmp_path):
    """There is no server without the tokens that it was told to ask for."""
    with pytest.raises(ValueError, match=r"nowhere: No such file or directory$"):
        TokenFile(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"Is a directory$"):
        TokenFile(str(tmp_path))

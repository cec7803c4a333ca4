"""The tokens file: its format, its errors, what a token allows, and changes of the file."""

import errno
import hashlib
import logging
import re
from pathlib import Path

import pytest

from poolrpc.errors import PermissionDeniedError, UnauthenticatedError
from poolrpc_server.calls.tokens import Token, TokenFile, parse_tokens

POOL = "/poolrpc.v1.PoolService/Pool"
INFO = "/poolrpc.v1.PoolService/GetServerInfo"
HEALTH = "/grpc.health.v1.Health/Check"


def digest(token):
    """Return the SHA-256 of a token in hexadecimal."""
    return hashlib.sha256(token.encode()).hexdigest()


@pytest.fixture
def logged(caplog, monkeypatch):
    """Capture the server's log."""
    monkeypatch.setattr(logging.getLogger("poolrpc_server"), "propagate", True)
    caplog.set_level(logging.INFO, "poolrpc_server")
    return caplog


def test_parse_reads_one_token_per_line():
    """A line has a name, a hash in either case and allowed methods; blank lines and comments are ignored."""
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
def test_token_allows_only_listed_services_and_methods(allowed, methods):
    """A token allows services and methods by their full names, not by prefixes; an empty list allows everything."""
    token = Token("x", b"", frozenset(allowed))
    assert [method for method in (POOL, INFO, HEALTH) if token.allows(method)] == methods


@pytest.mark.parametrize(
    ("words", "allowed", "urgent"),
    [
        ("", [], False),
        ("priority-0", [], True),
        ("a.B/C", ["a.B/C"], False),
        ("a.B/C priority-0", ["a.B/C"], True),
        ("priority-0 a.B/C a.D priority-0", ["a.B/C", "a.D"], True),
    ],
)
def test_the_word_priority_0_allows_urgent_calls(words, allowed, urgent):
    """It may be anywhere among the methods, changes nothing about them, and is not implied by allowing all of them."""
    (token,) = parse_tokens(f"alice {digest('a')} {words}")
    assert token == Token("alice", hashlib.sha256(b"a").digest(), frozenset(allowed), urgent)
    assert [token.allows(method) for method in ("/a.B/C", "/e.F/G")] == [True, not allowed]


SECRET = "a-token-written-in-clear"  # noqa: S105 - made up for this test


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (SECRET, "64 hexadecimal digits after the name, got 0 characters"),
        (f"alice {SECRET}", f"64 hexadecimal digits after the name, got {len(SECRET)} characters"),
        (f"alice {digest('a')[:-1]}", "got 63 characters"),
        (f"{SECRET}:x {digest('a')}", "a name of at most 64"),
        (f"{digest('a')}{SECRET} {digest('a')}", "a name of at most 64"),
        (
            f"alice {digest('b')} poolrpc.v1.PoolService {SECRET}",
            "package.Service, package.Service/Method or priority-0 as word 4",
        ),
        (f"alice {digest('b')} /poolrpc.v1.PoolService/Pool", "as word 3"),
        (f"alice {digest('b')} # a comment", "as word 3"),
        (f"alice {digest('b')} priority-1", "as word 3"),
        (f"alice {digest('b')} Priority-0", "as word 3"),
        (f"alice priority-0 {digest('b')}", "got 10 characters"),
    ],
)
def test_parse_error_names_the_line_but_quotes_nothing(line, words):
    """The error has the line's number and what was expected, but none of its text, which may contain a token."""
    with pytest.raises(ValueError, match=f"^line 2: expected .*{re.escape(words)}") as raised:
        parse_tokens(f"carol {digest('c')}\n{line}")
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("text", ["", "\n\n", "# alice\n"])
def test_parse_rejects_a_file_without_tokens(text):
    """A file without any token, such as a truncated one, is rejected, because it would allow no caller."""
    with pytest.raises(ValueError, match=r"^expected at least one token, got none$"):
        parse_tokens(text)


def test_parse_rejects_duplicate_hashes_but_not_duplicate_names():
    """A repeated hash is an error; a repeated name is valid, as during a rotation."""
    with pytest.raises(ValueError, match="once"):
        parse_tokens(f"alice {digest('a')}\nbob {digest('a')}")
    assert [each.name for each in parse_tokens(f"alice {digest('a')}\nalice {digest('b')}")] == ["alice", "alice"]


def test_token_repr_hides_the_hash():
    """The repr of a token contains neither the token nor its hash."""
    assert repr(Token("alice", b"hash")) == "Token(name='alice', allowed=frozenset(), urgent=False)"


def test_find_matches_the_whole_token_only(tmp_path):
    """Only the exact token is found; prefixes, its hash and non-ASCII strings are not."""
    path = tmp_path / "tokens"
    path.write_text(f"alice {digest('secret')}\nbob {digest('other')}")
    tokens = TokenFile(str(path))
    assert [tokens.find(each).name for each in ("secret", "other")] == ["alice", "bob"]
    for wrong in ("", "secre", "secrets", "Secret", digest("secret"), "\xff\u1234"):
        assert tokens.find(wrong) is None


def test_a_file_that_cannot_be_read_for_now_is_read_later(tmp_path, monkeypatch):
    """A new version whose reading fails, for want of a descriptor, is read at a later access."""
    path = tmp_path / "tokens"
    path.write_text(f"alice {digest('old')}\n")
    tokens = TokenFile(str(path))
    path.write_text(f"alice {digest('the new one')}\n")

    def fail(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as context:
        context.setattr(Path, "read_text", fail)
        for _ in range(2):
            assert tokens.find("old").name == "alice"
    assert tokens.find("old") is None
    assert tokens.find("the new one").name == "alice"


@pytest.fixture
def tokens(tmp_path):
    """Return a tokens file with an unrestricted token, "secret", and a token for one method, "limited"."""
    path = tmp_path / "tokens"
    path.write_text(f"alice {digest('secret')}\nbob {digest('limited')} {INFO.removeprefix('/')}")
    return TokenFile(str(path))


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_authenticate_returns_the_presented_token(tokens, scheme):
    """The scheme is case-insensitive, and the token's name identifies the caller."""
    assert tokens.authenticate([f"{scheme} secret"]).name == "alice"


@pytest.mark.parametrize(
    "authorization",
    [
        [],
        [""],
        ["secret"],
        ["Bearer"],
        ["Bearer "],
        ["Bearer  secret"],
        ["Bearer secret "],
        ["Bearer Secret"],
        ["Basic secret"],
        ["Bearer secret", "Bearer secret"],
        ["Bearer secret", "Bearer wrong"],
    ],
    ids=str,
)
def test_authenticate_rejects_everything_else_with_the_same_message(tokens, authorization):
    """A missing, malformed, repeated or unknown token is rejected with one message that gives no hint."""
    with pytest.raises(UnauthenticatedError) as raised:
        tokens.authenticate(authorization)
    assert raised.value.message == "expected a valid token, as the metadata authorization: Bearer TOKEN"


def test_authorize_rejects_methods_that_the_token_does_not_allow(tokens):
    """A valid token is denied the methods that its line does not list."""
    token = tokens.authenticate(["Bearer limited"])
    token.authorize(INFO)
    with pytest.raises(PermissionDeniedError, match=r"^the token does not allow this method$"):
        token.authorize(POOL)


def test_changed_file_takes_effect_at_the_next_call(tmp_path, logged):
    """Tokens follow the file, whether rewritten in place or replaced, and each change is logged."""
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


@pytest.mark.parametrize(
    "broken", ["", "nonsense", b"\xff\xfe", None], ids=["empty", "nonsense", "not-utf-8", "missing"]
)
def test_invalid_file_keeps_the_last_valid_tokens(tmp_path, logged, broken):
    """An invalid or missing file is logged once as an error, and the last valid tokens stay until it is repaired."""
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
    assert "the last valid version stays in use" in record.message
    path.write_text(f"bob {digest('b')}")
    assert tokens.find("a") is None
    assert tokens.find("b").name == "bob"


def test_unusable_file_at_start_is_an_error(tmp_path):
    """A tokens file that cannot be read when the server starts is an error with the reason."""
    with pytest.raises(ValueError, match=r"nowhere: No such file or directory$"):
        TokenFile(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"Is a directory$"):
        TokenFile(str(tmp_path))

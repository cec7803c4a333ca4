"""The tree of errors: their classes, texts, attributes and pickles."""

import copy
import pickle
import re

import pytest

import poolrpc
from poolrpc import errors
from poolrpc.errors import (
    BY_CODE,
    ExpressionError,
    FieldViolation,
    InternalError,
    InvalidArgumentError,
    LimitExceededError,
    PoolError,
    UnavailableError,
    UnsupportedError,
)

BUILTINS = {
    "InvalidArgumentError": ValueError,
    "ExpressionError": ValueError,
    "UnsupportedError": TypeError,
    "UnavailableError": ConnectionError,
    "FailedPreconditionError": ConnectionError,
    "DeadlineExceededError": TimeoutError,
    "NotFoundError": LookupError,
}
TREE = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, PoolError) and value is not PoolError
}
ONE_OF_EACH = [
    PoolError("m", reason="R", metadata={"a": "b"}),
    InvalidArgumentError("expected 1, got 2", field="stride"),
    InvalidArgumentError("m", violations=[FieldViolation("a", "b"), FieldViolation("", "c")]),
    InvalidArgumentError("expected 1, got 2", field="stride").with_prefix("layers[0]"),
    ExpressionError("expected a number", column=7),
    UnsupportedError("m", reason="DTYPE", metadata={"dtypes": "float32"}),
    LimitExceededError("m", reason="WORK_BUDGET", metadata={"limit": "1", "actual": "2"}),
    UnavailableError("m", reason="DRAINING", metadata={"a": "b"}, retry_delay=0.5),
    InternalError("m", metadata={"error_id": "abc"}),
    *(cls("m", reason="R") for cls in BY_CODE.values() if not issubclass(cls, InvalidArgumentError)),
]


def state(error):
    """Return everything that an error holds."""
    return type(error), str(error), error.args, error.code, dict(vars(error))


def test_the_docstring_draws_every_error_with_its_status():
    """The module's tree has every class, with its builtin base class and its status."""
    drawn = re.findall(r"─ (\w+)(?: \((\w+)\))? +([A-Z_]+) ", errors.__doc__)
    assert {name for name, _, _ in drawn} == set(TREE)
    for name, builtin, code in drawn:
        assert TREE[name].code == code
        assert not builtin or issubclass(TREE[name], BUILTINS[name])
        assert bool(builtin) == (name in BUILTINS and name != "ExpressionError")


def test_the_status_table_has_every_class_once():
    """Every status code has its class, and every class but ExpressionError, a subclass, is in the table."""
    assert set(BY_CODE.values()) == set(TREE.values()) - {ExpressionError}
    assert all(cls.code == code for code, cls in BY_CODE.items())


def test_every_error_is_public():
    """The package exports every error of the tree."""
    assert all(getattr(poolrpc, name) is cls for name, cls in TREE.items())
    assert poolrpc.PoolError is PoolError


@pytest.mark.parametrize("error", ONE_OF_EACH, ids=lambda error: type(error).__name__)
def test_an_error_survives_a_pickle_and_a_copy(error):
    """A pickled or copied error has the same class, text and attributes."""
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):  # noqa: S301 - ours
        assert state(other) == state(error)


@pytest.mark.parametrize("cls", BY_CODE.values())
def test_an_error_has_a_message_and_a_default_reason(cls):
    """An error's text is its message, and its default reason is its class's."""
    error = cls("what happened")
    assert (str(error), error.message, error.metadata) == ("what happened", "what happened", {})
    assert re.fullmatch("[A-Z]+(_[A-Z]+)*", error.reason)


def test_metadata_is_copied():
    """An error's metadata doesn't change with the mapping that it was created from."""
    metadata = {"limit": "1"}
    error = LimitExceededError("m", metadata=metadata)
    metadata["limit"] = "2"
    assert error.metadata == {"limit": "1"}


def test_the_text_of_violations():
    """The text has the field's path and the description, or the description alone if there is no field."""
    assert str(InvalidArgumentError("expected 1, got 2", field="stride")) == "stride: expected 1, got 2"
    assert str(InvalidArgumentError("expected 1, got 2")) == "expected 1, got 2"
    several = [FieldViolation("a", "b"), FieldViolation("c", "d")]
    assert str(InvalidArgumentError("m", violations=several)) == "a: b; c: d"


def test_with_prefix_adds_a_path_before_each_field():
    """The prefix precedes each field's path, and is the path of a violation without a field."""
    error = InvalidArgumentError("m", violations=[FieldViolation("stride", "b"), FieldViolation("", "d")])
    moved = error.with_prefix("layers[1]").with_prefix("branches[0]")
    assert moved.violations == (
        FieldViolation("branches[0].layers[1].stride", "b"),
        FieldViolation("branches[0].layers[1]", "d"),
    )
    assert str(moved) == "branches[0].layers[1].stride: b; branches[0].layers[1]: d"
    assert error.violations[0].field == "stride"


def test_an_expression_error_has_its_column():
    """The column is an attribute, and begins the text."""
    error = ExpressionError("expected a number", column=7)
    assert (error.column, str(error), error.reason) == (7, "column 7: expected a number", "EXPRESSION")


@pytest.mark.parametrize(("metadata", "error_id"), [({"error_id": "abc"}, "abc"), ({}, "")])
def test_an_internal_error_has_its_id(metadata, error_id):
    """The id comes from the metadata, and is empty without it."""
    assert InternalError("m", metadata=metadata).error_id == error_id

"""Layer expressions: parsing, errors with their column, and hostile text."""

import re
import sys
import warnings

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from poolrpc import (
    LAYERS,
    AdaptiveAvgPool2d,
    AvgPool2d,
    ExpressionError,
    FractionalMaxPool2d,
    GlobalPool1d,
    GlobalPool2d,
    MaxPool1d,
    MaxPool2d,
    parse_branches,
    parse_chain,
    parse_layer,
)
from poolrpc._shapes.limits import MAX_BRANCHES, MAX_CHAIN, MAX_EXPRESSION_CHARS
from tests.unit.strategies import layers


@given(layers())
def test_repr_parses_back_to_its_layer(layer):
    """The repr of any layer parses to the layer, and to a chain of one layer."""
    assert parse_layer(repr(layer)) == layer
    assert parse_chain(repr(layer)) == (layer,)


@given(st.lists(layers(), min_size=1, max_size=4).map(tuple), st.sampled_from([list, tuple]))
def test_a_chain_parses_back(chain, kind):
    """The repr of a list or a tuple of layers parses to the chain."""
    assert parse_chain(repr(kind(chain))) == chain


@given(st.lists(st.lists(layers(), min_size=1, max_size=3).map(tuple), min_size=1, max_size=3).map(tuple))
def test_branches_parse_back(branches):
    """The repr of a list of chains parses to the branches; one chain or one layer is one branch."""
    assert parse_branches(repr([list(chain) for chain in branches])) == branches
    assert parse_branches(repr(list(branches[0]))) == branches[:1]
    assert parse_branches(repr(branches[0][0])) == ((branches[0][0],),)


def test_a_list_that_contains_a_list_is_branches():
    """Each element of such a list is a branch; a list of layers alone is one chain."""
    one, two = AvgPool2d(2), MaxPool2d(3)
    assert parse_branches("[AvgPool2d(2), [MaxPool2d(3), AvgPool2d(2)]]") == ((one,), (two, one))
    assert parse_branches("[AvgPool2d(2), MaxPool2d(3)]") == ((one, two),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "column 1: expected at least one layer, got an empty list"),
        ("[[]]", "column 2: expected at least one layer, got an empty list"),
        ("[[GlobalPool2d('mean')], []]", "column 26: expected at least one layer"),
        ("[[[GlobalPool2d('mean')]]]", "column 3: expected a layer such as MaxPool2d"),
        (repr([[GlobalPool2d("mean")]] * (MAX_BRANCHES + 1)), f"expected at most {MAX_BRANCHES} branches"),
        (repr([GlobalPool2d("mean")] * (MAX_CHAIN + 1)), f"expected at most {MAX_CHAIN} layers in a chain"),
        (repr([[GlobalPool2d("mean")] * (MAX_CHAIN + 1)]), f"expected at most {MAX_CHAIN} layers in a chain"),
    ],
)
def test_invalid_branches_are_rejected(text, words):
    """Empty lists, deeper nesting, and too many branches or layers are rejected with their column."""
    with pytest.raises(ExpressionError, match=re.escape(words)):
        parse_branches(text)


@pytest.mark.parametrize(
    ("text", "layer"),
    [
        ("MaxPool2d(3, 2, 1, 1, True, True)", MaxPool2d(3, 2, 1, 1, return_indices=True, ceil_mode=True)),
        ("MaxPool2d(kernel_size=(3, 2))", MaxPool2d((3, 2))),
        ("MaxPool2d([3, 2])", MaxPool2d((3, 2))),
        (" \t MaxPool2d ( 3 ,\n  stride = 2 ) \n", MaxPool2d(3, stride=2)),
        ("(MaxPool2d(2))", MaxPool2d(2)),
        ("MaxPool1d((2,))", MaxPool1d(2)),
        ("AvgPool2d(0x10, padding=0b11, divisor_override=1_000)", AvgPool2d(16, padding=3, divisor_override=1000)),
        ("AdaptiveAvgPool2d((None, 7))", AdaptiveAvgPool2d((None, 7))),
        ("FractionalMaxPool2d(2, None, 5e-1)", FractionalMaxPool2d(2, output_ratio=0.5)),
        ("GlobalPool2d('mean')", GlobalPool2d("mean")),
        ('GlobalPool1d(reduce = "max")', GlobalPool1d("max")),
    ],
)
def test_an_expression_has_pythons_syntax(text, layer):
    """Arguments may be positional or named, on several lines, in any notation of a number."""
    assert parse_layer(text) == layer


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("MaxPool2d(0)", 11, "kernel_size: expected 1 to 65535, got 0"),
        ("MaxPool2d(3, stride=0)", 14, "stride: expected 1 to 65535, got 0"),
        ("MaxPool2d(2, 1, 2)", 17, "padding: expected less than the span of a window, 2, got 2"),
        ("MaxPool2d(2, -1)", 14, "stride: expected 1 to 65535, got -1"),
        ("MaxPool2d(2.0)", 11, "kernel_size: expected an integer, got 2.0"),
        ("MaxPool2d(True)", 11, "kernel_size: expected an integer, got True"),
        ("MaxPool2d((1, 2, 3))", 11, "kernel_size: expected 1 value or 2, got 3"),
        ("  MaxPool2d(0)", 13, "kernel_size: expected"),
        ("MaxPool2d(2,\n stride=0)", 15, "stride: expected"),
        ("MaxPool2d(2, strid=2)", 14, "expected a parameter of MaxPool2d (kernel_size, stride,"),
        ("MaxPool2d(2, kernel_size=2)", 14, "expected kernel_size once, got it twice"),
        ("MaxPool2d(stride=2)", 1, "expected the parameter kernel_size of MaxPool2d, got none"),
        ("LPPool2d()", 1, "expected the parameter norm_type of LPPool2d, got none"),
        ("LPPool2d(2)", 1, "expected the parameter kernel_size of LPPool2d, got none"),
        ("FractionalMaxPool2d(2)", 1, "output_size: expected either output_size or output_ratio, got neither"),
        ("GlobalPool2d('max', 2)", 21, "expected at most 1 arguments for GlobalPool2d, got 2"),
        ("GlobalPool2d('avg')", 14, "reduce: expected one of 'max', 'min', "),
        ("GlobalPool2d(Norm(0))", 19, "p: expected a number above 0, got 0"),
        ("GlobalPool2d(Norm())", 14, "expected the parameter p of Norm, got none"),
        ("GlobalPool2d(Norm(2, q=1))", 22, "expected a parameter of Norm (p), got 'q'"),
        ("GlobalPool2d((Norm(2),))", 15, "expected a number, True, False, None or a string in quotes, got 'Norm(2)'"),
        ("MaxPool2d(Norm(2))", 11, "kernel_size: expected an integer, got Norm(2.0) (Norm)"),
        ("GlobalPool2d(mean)", 14, "expected a number, True, False, None or a string in quotes, got mean"),
        ("GlobalPool2d()", 1, "expected the parameter reduce of GlobalPool2d, got none"),
        ("AvgPool1d(2, 1, 0, True, True, 5)", 32, "expected at most 5 arguments for AvgPool1d, got 6"),
        ("MaxPol2d(2)", 1, "expected the name of a layer, got 'MaxPol2d'; did you mean MaxPool2d?"),
        ("Conv2d(3)", 1, "expected the name of a layer, got 'Conv2d'"),
        ("nn.Conv2d(3)", 1, "expected the name of a layer, got 'nn.Conv2d'"),
        ("MaxPool2d", 1, "expected a layer such as MaxPool2d(2), got 'MaxPool2d'"),
        ("7", 1, "expected a layer such as MaxPool2d(2), got '7'"),
        ("MaxPool2d('2')", 11, "kernel_size: expected an integer or a tuple, got '2'"),
        ("MaxPool2d(2, stride='2')", 14, "stride: expected an integer or a tuple, got '2'"),
        ("MaxPool2d((1, (2, 3)))", 11, "kernel_size: expected an integer, got (2, 3) (tuple)"),
        ("MaxPool2d(3, padding=((0, (1,)), 1))", 27, "expected a number, True, False, None or a string in quotes"),
        ("MaxPool2d(2", 10, "expected a layer expression"),
        ("MaxPool2d(2))", 13, "expected a layer expression"),
        ("MaxPool2d(2) MaxPool2d(2)", 14, "expected a layer expression"),
        ("", 1, "expected a layer expression"),
        ("[MaxPool2d(2)]", 1, "expected a layer such as MaxPool2d(2)"),
    ],
)
def test_an_error_says_what_was_expected_and_the_column(text, column, message):
    """The column is that of the invalid argument, name or character, counted from 1."""
    with pytest.raises(ExpressionError, match=re.escape(message)) as raised:
        parse_layer(text)
    assert raised.value.column == column
    assert str(raised.value).startswith(f"column {column}: ")


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("GlobalAvgPool", "GlobalPool2d('mean')"),
        ("GlobalMaxPool", "GlobalPool2d('max')"),
        ("GlobalAveragePool", "GlobalPool2d('mean')"),
        ("GlobalAvgPool1d", "GlobalPool1d('mean')"),
        ("GlobalMaxPool3d", "GlobalPool3d('max')"),
        ("GlobalAveragePooling2D", "GlobalPool2d('mean')"),
        ("GlobalMaxPooling1D", "GlobalPool1d('max')"),
        ("global_avg_pool", "GlobalPool2d('mean')"),
        ("global_max_pool3d", "GlobalPool3d('max')"),
        ("GlobalPool", "GlobalPool2d('mean')"),
        ("GlobelPool2d", "GlobalPool2d"),
    ],
)
def test_the_name_of_a_global_layer_elsewhere_has_a_suggestion(name, layer):
    """The names of global layers in ONNX, Keras and older versions lead to the layer that computes the same."""
    with pytest.raises(ExpressionError, match=re.escape(f"got '{name}'; did you mean {layer}?")):
        parse_layer(f"{name}()")


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("[MaxPool2d(2), AvgPool2d(0)]", 26),
        ("[MaxPool2d(2), 7]", 16),
        ("[MaxPool2d(2), [AvgPool2d(2)]]", 16),
        ("[]", 1),
        ("MaxPool2d(2), Foo(2)", 15),
        ("{MaxPool2d(2)}", 1),
    ],
)
def test_an_error_in_a_chain_has_its_column(text, column):
    """Columns count from the start of the chain's expression."""
    with pytest.raises(ExpressionError) as raised:
        parse_chain(text)
    assert raised.value.column == column


HOSTILE = {
    "calls": "__import__('os').system('touch evaluated')",
    "an attribute": "MaxPool2d(2).__class__",
    "an attribute of a name": "MaxPool2d.__init__(2)",
    "an argument's attribute": "MaxPool2d((1).real)",
    "an argument's call": "MaxPool2d(int(2))",
    "a subscript": "MaxPool2d([2][0])",
    "a lambda": "(lambda: MaxPool2d(2))()",
    "a lambda's argument": "MaxPool2d(lambda: 2)",
    "an f-string": "MaxPool2d(f'{2}')",
    "a walrus": "MaxPool2d(x := 2)",
    "a condition": "MaxPool2d(2 if True else 3)",
    "a comprehension": "MaxPool2d([x for x in (2, 2)])",
    "a generator": "MaxPool2d(*(2 for _ in (1,)))",
    "star arguments": "MaxPool2d(*[2])",
    "double star arguments": "MaxPool2d(**{'kernel_size': 2})",
    "both": "MaxPool2d(2, *(), **{})",
    "a keyword of object": "MaxPool2d(__class__=2)",
    "await": "await MaxPool2d(2)",
    "yield": "(yield MaxPool2d(2))",
    "a statement": "import os",
    "an assignment": "x = MaxPool2d(2)",
    "a semicolon": "MaxPool2d(2); MaxPool2d(3)",
    "two lines": "MaxPool2d(2)\nMaxPool2d(3)",
    "a comparison": "MaxPool2d(2) == MaxPool2d(2)",
    "arithmetic": "MaxPool2d(1 + 1)",
    "a power": "MaxPool2d(9 ** 9 ** 9)",
    "a shift": "MaxPool2d(1 << 99999999)",
    "a repetition": "MaxPool2d((1,) * 99999999)",
    "a complex number": "MaxPool2d(2j)",
    "bytes": "MaxPool2d(b'2')",
    "an ellipsis": "MaxPool2d(...)",
    "a set": "MaxPool2d({2})",
    "a dict": "MaxPool2d({2: 2})",
    "minus a flag": "MaxPool2d(-True)",
    "minus nothing": "MaxPool2d(-None)",
    "not": "MaxPool2d(not 0)",
    "twice minus": "MaxPool2d(--2)",
    "plus": "MaxPool2d(+2)",
    "minus infinity": "LPPool2d(-1e999, 2)",
    "a long number": f"MaxPool2d({'9' * 4000})",
    "a negative long number": f"MaxPool2d(-{'9' * 4000})",
    "a number longer than Python prints": f"MaxPool2d(0x{'f' * 4000})",
    "a negative number longer than Python prints": f"MaxPool2d(-0x{'f' * 4000})",
    "such a seed": f"FractionalMaxPool2d(2, 2, seed=0x{'f' * 4000})",
    "such a norm": f"LPPool2d(0x{'f' * 4000}, 2)",
    "such a ratio": f"FractionalMaxPool2d(2, output_ratio=0x{'f' * 4000})",
    "such a divisor": f"AvgPool2d(2, divisor_override=0x{'f' * 4000})",
    "such a flag": f"AvgPool2d(2, ceil_mode=0x{'f' * 4000})",
    "a thousand arguments": f"MaxPool2d({'2, ' * 1000})",
    "a thousand values": f"MaxPool2d(({'2, ' * 1000}))",
    "a sum of 2000 terms": "+".join(["1"] * 2000),
    "a sum of 2000 terms as argument": f"MaxPool2d({'+'.join(['1'] * 2000)})",
    "deep parentheses": "(" * 2000 + ")" * 2000,
    "open parentheses": "(" * 4000,
    "deep lists": "[" * 2000 + "]" * 2000,
    "deep calls": "MaxPool2d(" * 400,
    "many minus": f"MaxPool2d({'-' * 4000}2)",
    "many not": f"MaxPool2d({'not ' * 1000}2)",
    "a deep attribute": f"MaxPool2d{'.a' * 2000}(2)",
    "a deep call": f"MaxPool2d{'()' * 2000}",
    "a deep lambda": f"{'lambda:' * 500}0",
    "NUL": "MaxPool2d(2)\0",
    "NUL in an argument": "MaxPool2d(\0)",
    "NUL in a string": "MaxPool2d('\0')",
    "a surrogate": "MaxPool2d('\ud800')",
    "a surrogate as a name": "\ud800(2)",
    "non-ASCII": "МaxPool2d(2)",  # noqa: RUF001 - a Cyrillic letter
    "an emoji": "\N{GRINNING FACE}(2)",
    "digits of another script": "MaxPool2d(\N{ARABIC-INDIC DIGIT TWO})",
    "a direction override": "\u202eMaxPool2d(2)",
    "a backslash": "MaxPool2d(\\",
    "an escape that isn't": r"MaxPool2d('\d')",
    "a number that runs into a name": "MaxPool2d(2if True else 3)",
    "an octal escape that isn't": r"MaxPool2d('\777')",
    "a string that is called": "'MaxPool2d'(2)",
    "a number that is called": "2(2)",
    "an open string": "MaxPool2d('2",
    "an open block string": "MaxPool2d('''2",
    "a comment alone": "# MaxPool2d(2)",
    "form feeds": "\f\f\f",
    "newlines": "\n" * 4000,
    "carriage returns": "\r" * 4000,
    "blanks": " " * 4000,
    "too long": " " * MAX_EXPRESSION_CHARS + "MaxPool2d(2)",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("parse", [parse_layer, parse_chain])
def test_hostile_text_is_rejected_without_effects(parse, text, tmp_path, monkeypatch):
    """Invalid text raises an ExpressionError of one short line, evaluates nothing, and causes no warning."""
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with pytest.raises(ExpressionError) as raised:
            parse(text)
    assert not heard
    assert not list(tmp_path.iterdir())
    assert len(str(raised.value)) < 700
    assert 1 <= raised.value.column <= len(text) + 1


@given(st.text(max_size=80) | st.from_regex(r"[A-Za-z0-9_()\[\]{},=.*+'\"#\\ -]{0,60}", fullmatch=True))
@example("MaxPool2d(2)#")
@example("0is0")
@example("1.if 1 else 2")
@example("1jin 2")
@example("0xfor 1")
def test_any_text_is_a_layer_or_an_expression_error(text):
    """No text raises anything but an ExpressionError."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for parse in (parse_layer, parse_chain):
            try:
                parse(text)
            except ExpressionError:
                continue
    assert not heard


@given(st.sampled_from(list(LAYERS)), st.data())
def test_any_arguments_parse_or_raise_an_expression_error(name, data):
    """A layer's name with any numbers, positional or named, is a layer or an ExpressionError."""
    value = st.none() | st.booleans() | st.integers() | st.floats() | st.tuples(st.integers(), st.floats())
    arguments = data.draw(st.lists(value.map(repr), max_size=7))
    names = st.sampled_from(["kernel_size", "stride", "padding", "output_size", "seed", "nothing"])
    arguments += data.draw(st.lists(st.tuples(names, value).map(lambda pair: f"{pair[0]}={pair[1]!r}"), max_size=3))
    try:
        assert parse_layer(f"{name}({', '.join(arguments)})").name == name
    except ExpressionError as error:
        assert "\n" not in str(error)  # noqa: PT017 - which of the two happens is the point


@pytest.mark.parametrize(("text", "column"), [("MaxPool2d(é=1, *[2])", 11), ("  MaxPool2d(é=1, ])", 13)])
def test_a_column_counts_characters(text, column):
    """An invalid character is rejected with its column, which counts leading blanks."""
    with pytest.raises(ExpressionError) as raised:
        parse_layer(text)
    assert raised.value.column == column


def test_the_recursion_limit_does_not_change():
    """A deeply nested expression is rejected without changing the interpreter's limit."""
    before = sys.getrecursionlimit()
    with pytest.raises(ExpressionError):
        parse_layer("-" * 4000 + "1")
    assert sys.getrecursionlimit() == before


@pytest.mark.parametrize("prefix", ["nn.", "torch.nn.", "torch.nn.modules.pooling."])
def test_a_layer_may_have_the_name_of_torchs_module(prefix):
    """The name may be written with torch's module before it, also in a chain."""
    assert parse_layer(f"{prefix}MaxPool2d(3, stride=2)") == MaxPool2d(3, stride=2)
    assert parse_chain(f"[{prefix}MaxPool2d(2), AvgPool2d(2)]") == (MaxPool2d(2), AvgPool2d(2))


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("maxpool2d", "MaxPool2d"),
        ("MAXPOOL2D", "MaxPool2d"),
        ("max_pool2d", "MaxPool2d"),
        ("F.max_pool2d", "MaxPool2d"),
        ("torch.nn.functional.max_pool2d", "MaxPool2d"),
        ("torch.max_pool1d", "MaxPool1d"),
        ("nn.maxpool3d", "MaxPool3d"),
        ("F.max_unpool2d", "MaxUnpool2d"),
        ("F.adaptive_avg_pool2d", "AdaptiveAvgPool2d"),
        ("F.lp_pool1d", "LPPool1d"),
        ("fractional_max_pool3d", "FractionalMaxPool3d"),
        ("MaxPooling2D", "MaxPool2d"),
        ("AveragePooling1D", "AvgPool1d"),
        ("MaxPool", "MaxPool1d or MaxPool2d or MaxPool3d"),
        ("AveragePool", "AvgPool1d or AvgPool2d or AvgPool3d"),
        ("MaxPol2d", "MaxPool2d"),
    ],
)
def test_the_suggestion_is_the_layer_that_was_meant(name, suggestion):
    """Names of torch's functions and of other libraries, in any case, suggest the layer of that name and rank."""
    with pytest.raises(ExpressionError, match=re.escape(f"got '{name}'; did you mean {suggestion}?")):
        parse_layer(f"{name}(2)")


@pytest.mark.parametrize("name", ["conv", "F.relu", "x.y"])
def test_a_name_like_no_layer_lists_the_layers(name):
    """A name that is like no layer's suggests none."""
    with pytest.raises(ExpressionError, match="; the layers are MaxPool1d, "):
        parse_layer(f"{name}(2)")

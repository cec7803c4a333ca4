"""The settings' sources: flags, POOLRPC_* environment variables and a file in TOML."""

from __future__ import annotations

import argparse
import os
import re
import sys
import tomllib
from dataclasses import fields
from difflib import get_close_matches
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import configargparse

from poolrpc import __version__
from poolrpc._shapes.rules import clip
from poolrpc.credentials import CA, CLIENT_CERT, CLIENT_KEY, TOKEN
from poolrpc_server.config import Config, ConfigError
from poolrpc_server.log_format import find_log_format

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import IO

VARIABLE_PREFIX = "POOLRPC_"
"""What the name of a setting's environment variable starts with."""

CLIENT_VARIABLES = (CA, CLIENT_CERT, CLIENT_KEY, TOKEN, "POOLRPC_ADDRESS")
"""Variables of the client, which may be set in a server's environment too."""

SERVICE_LINK = re.compile(r"(\w+_)?(SERVICE_(HOST|PORT)(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)", re.ASCII)
"""Variables that Kubernetes sets in every container for a service that is named poolrpc, without the prefix."""

SIZE = re.compile(r"(-?\d+(?:\.\d+)?) ?(?:([kmgt])(i?b?))?", re.IGNORECASE | re.ASCII)
"""A number of bytes, with a unit or without."""

FLAG_ERROR = re.compile(r"argument (--[a-z-]+): ")
"""The beginning of argparse's errors of a flag's value."""


def parse_size(text: str) -> int:
    """Return a number of bytes from text: 65536, or with a unit, 64MiB, 1.5GiB, 512k.

    As in systemd and Docker, k, M, G and T are powers of 1024, the same as KiB, MiB, GiB and TiB; kB, MB, GB and TB are
    powers of 1000. Case does not matter.

    Raises:
        ValueError: The text is not a whole number of bytes.

    """
    match = SIZE.fullmatch(text.strip())
    if match:
        number, unit, suffix = match.groups()
        base = 1000 if (suffix or "").lower() == "b" else 1024
        nbytes = Fraction(number) * base ** ("kmgt".index(unit.lower()) + 1 if unit else 0)
        if nbytes.denominator == 1:
            return int(nbytes)
    raise ValueError(f"expected a size in bytes, such as 1048576, 64MiB or 1GiB, got {clip(text)}")


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def unknown_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the names of POOLRPC_* variables that nothing reads, each with the setting's that is closest to it.

    Args:
        environment: The environment variables.

    Returns:
        The closest name, or an empty string, for each unknown one.

    """
    settings = ("CONFIG", *(setting.name.upper() for setting in fields(Config)))
    unknown = {}
    for variable, value in environment.items():
        name = variable.removeprefix(VARIABLE_PREFIX)
        if not variable.startswith(VARIABLE_PREFIX) or variable in CLIENT_VARIABLES or name in settings:
            continue
        if SERVICE_LINK.fullmatch(name) or (name == "PORT" and "://" in value):
            continue
        closest = _closest(name, settings)
        unknown[variable] = closest and _variable(closest)
    return unknown


def _closest(name: str, known: Iterable[str]) -> str:
    return next(iter(get_close_matches(name, known, n=1)), "")


def _variable(name: str) -> str:
    return f"{VARIABLE_PREFIX}{name.upper()}"


def _flag(name: str) -> str:
    return name.replace("_", "-")


class _ConfigFile(configargparse.ConfigFileParser):  # type: ignore[misc]  # the package has no types
    """Reads a configuration file: TOML with the flags' names as keys. The flags' own checks follow."""

    def parse(self, stream: IO[bytes]) -> dict[str, str | list[str]]:
        """Return the text of each setting in a file."""
        try:
            settings = tomllib.load(stream)
        except ValueError as error:  # not TOML, or not UTF-8
            raise ConfigError(f"config: expected TOML, got {stream.name}: {error}") from None
        texts: dict[str, str | list[str]] = {}
        try:
            for key, value in settings.items():
                _add_text(texts, key, value)
        except ConfigError as error:
            raise ConfigError(f"{stream.name}: {error}") from None
        return texts

    def get_syntax_description(self) -> str:
        """Return nothing: the help of --config describes the file."""
        return ""


def _add_text(texts: dict[str, str | list[str]], key: str, value: object) -> None:
    """Add a setting of a configuration file in the form in which its flag takes it."""
    defaults = {_flag(setting.name): setting.default for setting in fields(Config)}
    flag = _flag(key)
    if flag not in defaults:
        closest = _closest(flag, defaults)
        raise ConfigError(f"expected the name of a flag, got {clip(key)}{closest and f'; did you mean {closest}?'}")
    if flag in texts:
        raise ConfigError(f"{key}: expected each setting once, got it with - and with _")
    match defaults[flag], value:
        case bool(), bool():
            texts[flag] = str(value).lower()
        case bool(), _:
            raise ConfigError(f"{key}: expected true or false, got {clip(value)}")
        case tuple(), list():
            if not all(isinstance(item, str) for item in value):
                raise ConfigError(f"{key}: expected a list of strings, got {clip(value)}")
            texts[flag] = value
        case _, str():
            texts[flag] = value
        case int() | float(), int() | float() if not isinstance(value, bool):
            texts[flag] = str(value)
        case default, _:
            expected = "a number" if isinstance(default, int | float) else "a string"
            raise ConfigError(f"{key}: expected {expected}, got {clip(value)}")


class _Parser(configargparse.ArgumentParser):  # type: ignore[misc]  # the package has no types
    """A parser that raises its errors if the log is JSON, and otherwise prints its usage with them, as commands do.

    Attributes:
        raises: Whether it raises its errors.
        given: The command line.

    """

    raises = False
    given: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        """End with an error, which names the variable or the file that a value is from."""
        if (match := FLAG_ERROR.match(message)) and not any(each.split("=")[0] == match[1] for each in self.given):
            variable = _variable(match[1].removeprefix("--").replace("-", "_"))
            source = variable if variable in os.environ else "the configuration file"
            message = f"{message} (from {source})"
        if self.raises:
            raise ConfigError(message)
        super().error(message)
        raise AssertionError("unreachable: the parser ends the process")


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Return the Config given by flags, by environment variables and by a configuration file, in this order.

    Args:
        arguments: The command line. None: that of the process.

    Raises:
        ConfigError: A setting is wrong.

    """
    parser = _Parser(
        prog="poolrpc-server",
        usage="%(prog)s [--config FILE] [--listen ADDRESS] [further flags]",
        description="Serve PyTorch's pooling layers over gRPC.",
        epilog="Every flag can also be set by its environment variable, a repeatable flag as a list: [a, b]; and in "
        "the configuration file. A flag takes precedence over a variable, and a variable over the file. Sizes in bytes "
        "may have a unit: 64MiB, 1GiB, 512k. The CPUs and the memory are those that this process may use, on the "
        "machine or within its container's limits.",
        add_config_file_help=False,
        add_env_var_help=False,
        config_file_parser_class=_ConfigFile,
        config_file_open_func=partial(open, mode="rb"),  # TOML is UTF-8 in any locale
    )
    parser.raises = find_log_format(arguments) == "json"
    parser.add_argument(
        "--version", action="version", version=f"poolrpc-server {__version__}", help="Print the version and exit."
    )
    parser.add_argument(
        "--config",
        is_config_file=True,
        env_var=_variable("config"),
        metavar="FILE",
        help="Configuration file: TOML with the flags' names as keys, a repeatable flag's value as a list. "
        f"[default: none; {_variable('config')}]",
    )
    for setting in fields(Config):
        default = setting.default
        unit = Config.unit(setting.name, default)
        shown = (
            ", ".join(default) or "none"
            if isinstance(default, tuple)
            else str(default).lower()
            if isinstance(default, bool)
            else default
            if default != ""
            else "none"
        )
        variable = _variable(setting.name)
        options: dict[str, Any] = {
            "dest": setting.name,
            "env_var": variable,
            "default": None,
            "help": f"{setting.metadata['help']} [default: {shown}{f' {unit}' if unit else ''}; {variable}]",
        }
        if isinstance(default, bool):
            options["action"] = "store_true"
        else:
            options["type"] = _size if unit == "bytes" else str if isinstance(default, tuple) else type(default)
            options["metavar"] = (setting.metadata["unit"] or setting.name.rpartition("_")[2]).upper()
            if isinstance(default, tuple):
                options["action"] = "append"
        parser.add_argument(f"--{_flag(setting.name)}", **options)
    parser.given = sys.argv[1:] if arguments is None else arguments
    values = vars(parser.parse_args(arguments))
    del values["config"]
    return Config(**{name: value for name, value in values.items() if value is not None})

"""The input files of `poolrpc pool`: files, folders and patterns, and where the output of each belongs."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from poolrpc._shapes.rules import clip
from poolrpc.command.files import STDIN, paths_of
from poolrpc.command.images import readable_suffixes
from poolrpc.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

ARRAY_SUFFIXES = frozenset({".npy", ".npz"})


@dataclass(frozen=True, slots=True)
class Inputs:
    """The input files of a command.

    Attributes:
        files: The path of each file, and its path in the folder of outputs.
        several: Whether the user named more than one file, a folder or a pattern.
        passed_over: The number of files in folders that are neither images nor arrays.

    """

    files: tuple[tuple[Path, Path], ...]
    several: bool
    passed_over: int


def find_inputs(names: Sequence[str], output: Path | None) -> Inputs:
    """Return the files that the user named.

    Args:
        names: Files, folders, which are searched with their subfolders for images and arrays, patterns such as
            "photos/**/*.png", or "-" alone for the standard input.
        output: The folder of outputs, whose files are not inputs; None if there is none.

    Raises:
        InvalidArgumentError: A name is empty, a folder or a pattern has no file, or "-" is one of several.

    """
    if str(STDIN) in names:
        if len(names) > 1:
            raise InvalidArgumentError(f"expected - alone, got {len(names)} names", field="file")
        return Inputs(((STDIN, STDIN),), several=False, passed_over=0)
    found: dict[Path, Path] = {}
    several, passed_over = len(names) > 1, 0
    for name in names:
        if not name:
            raise InvalidArgumentError("expected the name of a file, got ''", field="file")
        path = Path(name)
        is_pattern = glob.has_magic(name) and not path.exists()
        if not (is_pattern or path.is_dir()):
            found.setdefault(path, Path(path.name))
            continue
        several = True
        base = _fixed_part(path) if is_pattern else path
        files, others = _search(name, output) if is_pattern else _search_folder(path, output)
        passed_over += others
        if not files:
            kind = "files that match" if is_pattern else "images or arrays in the folder"
            raise InvalidArgumentError(f"expected {kind} {clip(name)}, got none", field="file")
        for each in files:
            found.setdefault(each, each.relative_to(base))
    return Inputs(tuple(found.items()), several, passed_over)


def _fixed_part(pattern: Path) -> Path:
    parts = pattern.parts
    return Path(*parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])


def _search(pattern: str, output: Path | None) -> tuple[list[Path], int]:
    """Return the files that a pattern names, and those in folders that it names, as _search_folder does."""
    files, others = [], 0
    excluded = None if output is None else output.resolve()
    # Path.glob has no absolute patterns.
    for path in sorted(map(Path, glob.iglob(pattern, recursive=True))):  # noqa: PTH207 - the line above
        if excluded in {path.resolve(), *path.resolve().parents}:
            continue
        if path.is_file():
            files.append(path)
        elif "**" not in pattern:  # which names the files in folders too
            found, count = _search_folder(path, output)
            files, others = files + found, others + count
    return files, others


def _search_folder(top: Path, output: Path | None) -> tuple[list[Path], int]:
    """Return the images and arrays in a folder and its subfolders, and the number of other files."""
    suffixes = ARRAY_SUFFIXES | readable_suffixes()
    excluded = None if output is None else output.resolve()
    files, others = [], 0
    for folder, folders, names in os.walk(top):
        folders[:] = sorted(each for each in folders if excluded is None or Path(folder, each).resolve() != excluded)
        paths = [Path(folder, each) for each in sorted(names)]
        files += [each for each in paths if each.suffix.lower() in suffixes]
        others += sum(each.suffix.lower() not in suffixes for each in paths)
    return files, others


def output_paths(inputs: Inputs, save: Path, suffix: str | None, results: int = 1) -> list[Path]:
    """Return the output path of each input.

    Args:
        inputs: The input files.
        save: The file of the output; the folder of the outputs, if there are several inputs.
        suffix: The suffix of the outputs; None: each input's own. That of an image is not for outputs of arrays.
        results: The number of results for each input; the path of each output stands for those of its results.

    Raises:
        InvalidArgumentError: Two inputs have the same output, an output would replace an input, or `save` is not a
            folder though there are several inputs.

    """
    if not inputs.several:
        outputs = [save]
    else:
        if save.suffix.lower() in ARRAY_SUFFIXES | readable_suffixes() and not save.is_dir():
            raise InvalidArgumentError(f"expected a folder for the outputs of several inputs, got {save}", field="save")
        arrays = not suffix or suffix.lower() in ARRAY_SUFFIXES
        outputs = [
            save
            / (name.with_suffix(suffix) if suffix and (arrays or name.suffix.lower() not in ARRAY_SUFFIXES) else name)
            for _, name in inputs.files
        ]
    taken: dict[Path, Path] = {}
    sources = {path.resolve(): path for path, _ in inputs.files if path != STDIN}
    for (path, _), named in zip(inputs.files, outputs, strict=True):
        for output in paths_of(named, results):
            if output.resolve() in sources:
                msg = f"expected another file than the input, got {output}"
                raise InvalidArgumentError(msg, field="save")
            other = taken.setdefault(output, path)
            if other != path:
                msg = f"expected an output of its own for each input, got {output} for {other} and {path}"
                raise InvalidArgumentError(msg, field="save")
    return outputs

"""A check of the project's vocabulary: words and phrases to avoid in code and docs, each with its replacement.

`python -m scripts.words [PATH ...]` prints one line per finding and exits with status 1 if there are any. Without a
path it reads every tracked text file except generated code. There is no way to silence a finding: if a word has a
legitimate use, narrow its pattern.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Where = Literal["code", "prose", "both"]


@dataclass(frozen=True, slots=True)
class Word:
    """A word or phrase to avoid.

    Attributes:
        pattern: A regular expression. A space also matches a line break and the comment marker of the next line.
        use: The replacement, as shown in the finding.
        where: Where to search: "code" (Python without comments and strings), "prose" (Python's comments and strings,
            and the whole text of other files), or "both".
        folders: Prefixes of the paths to search; empty for all.
        any_case: Whether to ignore case.
    """

    pattern: str
    use: str
    where: Where = "prose"
    folders: tuple[str, ...] = ()
    any_case: bool = True

    def compile(self) -> re.Pattern[str]:
        """Return the pattern as a compiled expression."""
        text = self.pattern.replace(" ", r"(?:[ \t]+|[ \t]*\n[ \t]*(?:#:?|//|>)?[ \t]*)")
        return re.compile(text, re.IGNORECASE if self.any_case else 0)


def _name(pattern: str, use: str, *folders: str) -> Word:
    return Word(pattern, use, "code", folders, any_case=False)


WORDS = (
    # Terms. For a class, its definition is enough: what is not defined is not used.
    Word(r'"(?:Give|Gives) ', "Return, Print, Show", any_case=False),
    Word(r'"(?:Tell|Say)s? [a-z]', "Return, Return whether, Print, Show", any_case=False),
    Word(r'"(?:See|Ask) (?:that|whether) ', "Check that, Check whether", any_case=False),
    Word(r"\bseat(?:s|ed)?\b", "slot"),
    _name(r"(?i:(?<![A-Za-z])seats?(?![a-z]))", "slot"),
    Word(
        r"\b(?:its|a|each|another|whose) level(?:'s)?\b(?! of)",
        "priority",
        folders=("server/poolrpc_server/calls/", "tests/unit/server/calls/"),
    ),
    _name(r"\b_?Level\b|\blevel = priority\b", "priority"),
    _name(r"\bclass _?Bounds\b", "QueueLimits"),
    _name(r"\bclass _Entry\b", "Pending (a queued request)"),
    _name(r"\bclass _?Alike\b", "BatchKey"),
    _name(r"\bclass _?Stage\b", "Workspace (the engine's memory)", "server/poolrpc_server/compute/engine.py"),
    _name(r"\bclass _?(?:Turn|Timeline)\b|\btimeline\b", "StageTimes"),
    Word(r"(?<!connection\x20)(?<!connections\x20)\brefus(?:e|es|ed|ing|al|als)\b(?!-stream)", "reject"),
    _name(r"(?<!Connection)(?<!Poolrpc)(?<!CONN)(?i:refus(?:es?|ed|ing|als?))(?![a-z])(?!_STREAM)", "reject"),
    _name(r"\bclass _?(?:Caller|Waiter)\b", "CallContext"),
    Word(r"\bcheck_wanted\b", "raise_if_cancelled", "both"),
    Word(r"\bon_leaving\b", "add_done_callback", "both"),
    _name(r"\bdef tell\b", "add_done_callback"),
    _name(r"\btook\b", "record_duration, or a name that says what was measured"),
    Word(r"\b(?:lend|lends|lent|lending)\b(?! itself)", "borrow, return (a buffer)"),
    _name(r"\b_?(?:lend|lent|settle)\b", "borrow, return (a buffer)"),
    _name(r"\bclass _?Lanes\b|\b_?lanes?\b", "DeviceStreams, stream"),
    _name(r"\bclass _Line\b", "CallRecord"),
    _name(r"\bclass _?Room\b", "AdmissionControl", "server/"),
    _name(r"\bclass _?Outline\b|\b_?outline\b", "PreparedRequest, prepared"),
    _name(r"\bclass _?Crossing\b|\b_?crossings?\b", "ArenaCall"),
    _name(r"\bclass _?Arrival\b", "StreamReader"),
    _name(r"\bclass _?Watch\b", "IdleTimer"),
    _name(r"\bclass _?Watched\b", "ReloadingFile"),
    _name(r"\bclass _?Tally\b|\b_?tally\b", "ModelStatistics, statistics", "server/", "tests/unit/server/"),
    _name(r"\bclass _?Regions\b", "SharedMemoryRegistry"),
    _name(r"\bclass _?Bell\b|\b_?bell\b", "SignalEvent"),
    _name(r"\b_?judge\b", "translate (an exception)", "client/", "server/"),
    Word(r"\bdoors?\b", "transport (how bytes arrive), protocol (what they mean)"),
    _name(r"(?i:(?<![A-Za-z])doors?(?![a-z]))|(?<=[a-z])Door\b", "transport, protocol"),
    _name(r"\b_?places\b", "indices (of maxima)", "client/", "server/"),
    _name(r"\bclass _?Gauges\b|\bgauges: ", "observer"),
    _name(r"\bclass _?Models\b", "presets", "server/"),
    _name(r"\bclass _?Settings\b", "BaseClient"),
    _name(r"(?<!\.)\bmachine\b(?!\()", "resources"),
    # Phrases.
    Word(r"\bunder way\b|\bunderway\b", "in flight, in progress"),
    Word(r"\bbeside\b", "in addition to, together with, next to"),
    _name(r"(?i:(?:\b|_)beside(?:_|\b))", "a name that says what it holds"),
    Word(r"\banew\b", "again"),
    Word(r"\b(?:can't|cannot|can not|could not|couldn't|can|could|to) be had\b", "fails, is available"),
    Word(r"\b(?:un)?told\b", "configured, set, given, informed"),
    _name(r"\b_?told\b", "a name that says what it holds"),
    Word(r"\b(?:whose|who's) turn\b", "which batch runs next"),
    Word(r"\btheir turns? come(?:s)?\b|\b(?:its|his) turn comes\b", "when it is scheduled"),
    Word(r"\bwhere there (?:is|are) (?:one|any|some)\b|\bwhere there's one\b", "if there is one"),
    Word(r"\bnobody\b", "no client, no caller, no one"),
    Word(r"\bwhoever\b|\bwhomever\b", "the client that, any user who"),
    Word(r"\bby way of\b", "through"),
    Word(r"\b(?:go|goes|going|went|send|sends|sent|come|comes|came|travels?|passe[sd]|pass) by (?:the|an) arena\b",
         "through the arena"),
    Word(r"\bstands?\b(?! (?:in )?for\b)(?!-)", "is"),
    Word(r"\b(?:it|this|that|which|who|they|these|those|path|address|file|one|bytes|text|what came|what comes) "
         r"(?:is|are|was|were) no (?!longer\b|more\b|less\b|fewer\b|larger\b|smaller\b|later\b|one\b)", "is not a"),
    Word(r"\bis none of (?:ours|its|theirs)\b", "does not belong to"),
    Word(r", perhaps\b(?!,)", "if any, may"),
    Word(r"\b(?:ask(?:s|ed)?|asking) for a sign\b", "sends a ping"),
    Word(r"\bfor good\b(?! (?:reasons?|measure)\b)", "permanently"),
    Word(r"\bof that\.\n", "what it is, its unit and its range"),
)  # fmt: skip

EXCLUDED = (
    "client/poolrpc/v1/",  # generated
    "server/poolrpc_server/protocols/triton/generated/",  # generated
    "scripts/words.py",  # the list itself
    "tests/unit/test_words.py",  # its test
)
SUFFIXES = {".py", ".pyi", ".md", ".ipynb", ".proto", ".yml", ".yaml", ".toml", ".sh", ".tpl"}
NAMES = {"Dockerfile", "Makefile", "run"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One use of a word to avoid."""

    path: str
    line: int
    text: str
    use: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}: use {self.use}"


def find(path: str, text: str) -> list[Finding]:
    """Return the findings in a file's text, ordered by line.

    Args:
        path: The file's path relative to the repository's root. The suffix decides how the text is read.
        text: The file's content.
    """
    prose, code = _split(text) if path.endswith((".py", ".pyi")) else (text, "")
    found = []
    for word, pattern in _COMPILED:
        if word.folders and not path.startswith(word.folders):
            continue
        for where, part in (("prose", prose), ("code", code)):
            if word.where in {where, "both"}:
                for match in pattern.finditer(part):
                    line = text.count("\n", 0, match.start()) + 1
                    found.append(Finding(path, line, " ".join(match[0].split()), word.use))
    return sorted(found, key=lambda finding: finding.line)


def _split(source: str) -> tuple[str, str]:
    """Return a module's prose and its code, each with the rest of the source replaced by NUL: offsets stay the same."""
    starts = [0]
    for line in source.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    prose, code = list(_blank(source)), list(source)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in {tokenize.STRING, tokenize.COMMENT} or tokenize.tok_name[token.type].startswith("FSTRING"):
            (first_row, first_column), (last_row, last_column) = token.start, token.end
            where = slice(starts[first_row - 1] + first_column, starts[last_row - 1] + last_column)
            prose[where], code[where] = source[where], _blank(source[where])
    # The indentation before a comment is a part of its prose, so that a phrase is found across two lines.
    return re.sub(r"(?<=\n)\0+(?=#)", lambda match: " " * len(match[0]), "".join(prose)), "".join(code)


def _blank(text: str) -> str:
    return re.sub(r"[^\n]", "\0", text)


_COMPILED = [(word, word.compile()) for word in WORDS]


def tracked(paths: Sequence[str] = ()) -> Iterator[str]:
    """Yield the paths of tracked text files that are not generated, under the given paths or everywhere."""
    listed = subprocess.run(["git", "ls-files", "-z", "--", *paths], check=True, capture_output=True, text=True)  # noqa: S603, S607 - git from the developer's PATH, with the developer's arguments
    for path in filter(None, listed.stdout.split("\0")):
        file = Path(path)
        if not path.startswith(EXCLUDED) and (file.suffix in SUFFIXES or file.name in NAMES) and file.exists():
            yield path


def read(path: str) -> str:
    """Return the text of a file; of a notebook, the sources of its cells, to which the lines of findings then refer."""
    text = Path(path).read_text(encoding="utf-8")
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"]) if path.endswith(".ipynb") else text


def main(paths: Sequence[str]) -> int:
    """Print the findings in the tracked files under the given paths, or in all; return the exit status."""
    found = [finding for path in tracked(paths) for finding in find(path, read(path))]
    for finding in found:
        print(finding)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

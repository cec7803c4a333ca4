"""Print the requirements of a pyproject.toml, with those of the extras named: images install them before the code."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
for requirements in (project["dependencies"], *(project["optional-dependencies"][each] for each in sys.argv[2:])):
    print(*requirements, sep="\n")

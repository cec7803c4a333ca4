"""Print what pyproject.toml says that the package needs, with the extras named: images install it before the code."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
for requirements in (project["dependencies"], *(project["optional-dependencies"][each] for each in sys.argv[2:])):
    print(*requirements, sep="\n")

"""Print the version. With a tag, fail unless it is the tag of this version: python scripts/version.py v1.2.3."""

import runpy
import sys
from pathlib import Path

FILE = Path(__file__).parents[1] / "client/poolrpc/_version.py"

version = runpy.run_path(str(FILE))["__version__"]
if sys.argv[1:] not in ([], [f"v{version}"]):
    sys.exit(f"expected the tag v{version}, the version in {FILE.name}, got {' '.join(sys.argv[1:])}")
print(version)

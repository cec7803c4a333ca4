"""The profile of the property tests; POOLRPC_EXAMPLES is how many examples each has."""

import os

from hypothesis import settings

# No deadline: on a busy machine one would fail what is right. In CI every run has the same examples.
settings.register_profile(
    "unit",
    deadline=None,
    max_examples=int(os.environ.get("POOLRPC_EXAMPLES", "100")),
    derandomize="CI" in os.environ,
    print_blob=True,
)
settings.load_profile("unit")

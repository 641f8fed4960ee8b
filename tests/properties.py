"""How many cases the property tests try: 300 fixed ones, or as many new ones as FUZZ_EXAMPLES says (`make fuzz`)."""

import os

from hypothesis import settings

WANTED = os.environ.get("FUZZ_EXAMPLES")
many_cases = settings(max_examples=int(WANTED or 300), derandomize=WANTED is None, deadline=None)

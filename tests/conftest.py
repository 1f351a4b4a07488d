"""Makes ``tests/distributed.py`` importable from any test: ``from distributed import run``."""

import sys
from pathlib import Path

TESTS = Path(__file__).parent

# The root comes first: beside it ``tests/trainer`` is no package, alone it would be taken for ``trainer``.
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

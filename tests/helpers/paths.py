"""Where things lie in the repository."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
DATA, SCRIPTS = TESTS / "data", TESTS / "scripts"
GOLDEN_ROOT = DATA / "golden"
